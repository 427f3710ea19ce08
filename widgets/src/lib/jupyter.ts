// The link over an anywidget model. Imported only by the glue files.
import type { AnyModel } from "@anywidget/types";
import type { KernelState, Link } from "./link";
import type { KernelMessage } from "./protocol";

interface Signal {
  connect(slot: () => void): void;
  disconnect(slot: () => void): void;
}
/** The parts of JupyterLab's kernel connection that are read, all of them optional: other front ends have none. */
interface Kernel {
  status?: string;
  connectionStatus?: string;
  isDisposed?: boolean;
  statusChanged?: Signal;
  connectionStatusChanged?: Signal;
  disposed?: Signal;
}

const GONE = new Set(["restarting", "autorestarting", "dead", "terminating"]);

export function jupyterLink(model: AnyModel): Link {
  // The kernel connection as it was when this widget was made: after a restart the same object lives on, the widget does not.
  const kernel = (model.widget_manager as unknown as { kernel?: Kernel | null } | undefined)?.kernel ?? undefined;
  let gone = false;
  const watchers = new Set<() => void>();
  const look = (): void => {
    if (kernel?.isDisposed || GONE.has(kernel?.status ?? "")) gone = true;
    for (const watcher of watchers) watcher();
  };
  kernel?.statusChanged?.connect(look);
  kernel?.disposed?.connect(look);
  // anywidget's proxy passes Backbone's events through; the widget base says so when its comm is lost.
  (model.on as (name: string, callback: () => void) => void)("comm:close", () => {
    gone = true;
    look();
  });
  return {
    send(message) {
      if (gone) return;
      try {
        model.send(message);
      } catch {
        gone = true;
        look();
      }
    },
    onMessage(receive) {
      const listener = (message: unknown, buffers: DataView[]): void => receive(message as KernelMessage, buffers ?? []);
      model.on("msg:custom", listener as never);
      return () => model.off("msg:custom", listener as never);
    },
    kernelState(): KernelState {
      if (gone) return "gone";
      return kernel?.status === "busy" ? "busy" : "live";
    },
    onKernelState(changed) {
      watchers.add(changed);
      return () => watchers.delete(changed);
    },
  };
}

/** A script error belongs in the cell, where the person looks, and not only in the console. */
export function showError(el: HTMLElement, error: unknown): void {
  const box = document.createElement("pre");
  box.className = "rlhf-error";
  box.textContent = `rlhf_nb could not draw this widget: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`;
  el.append(box);
}
