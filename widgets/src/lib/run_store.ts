// All that a page knows of a run. One for each widget model, shared by its views, so that every view shows the same.
import * as bokehScript from "./bokeh";
import { type Link, uniqueId } from "./link";
import type { Controls, Figure, Foreseen, KernelMessage, LabelFailed, LabelQueue, LabelSaved, Said, ShownSamples, Status, ViewMessage } from "./protocol";
import { doubles, Rows } from "./rows";

export type Topic = "status" | "controls" | "figures" | "rows" | "samples" | "foreseen" | "log" | "said" | "health";
export type LabelAnswer = LabelQueue | LabelSaved | LabelFailed;

const ALIVE_MS = 10_000;
/** No answer to a hello for so long, with a kernel that is not busy: say so. */
const PATIENCE_MS = 4_000;
const RETRY_MS = 2_000;

export class RunStore {
  readonly page = uniqueId();
  readonly rows = new Rows();
  status: Status | null = null;
  controls: Controls | null = null;
  figures: Figure[] = [];
  samples: ShownSamples | null = null;
  /** By coefficient: where other values would lead. */
  foreseen = new Map<string, Foreseen>();
  /** By coefficient: why nothing was foreseen. */
  unforeseen = new Map<string, string>();
  log: string[] = [];
  said: (Said & { at: number }) | null = null;
  /** Why what is shown may be stale; empty when all is well. */
  trouble = "";
  /** Unix seconds at the kernel minus this page's clock. */
  clockSkew = 0;

  private listeners = new Map<Topic, Set<() => void>>();
  private labelListeners = new Set<(answer: LabelAnswer) => void>();
  private helloAt: number | null = null;
  private firstHelloAt: number | null = null;
  private endings: (() => void)[] = [];

  constructor(private readonly link: Link) {
    this.endings.push(link.onMessage((message, buffers) => this.receive(message, buffers)));
    this.endings.push(link.onKernelState(() => this.judge()));
    const heart = setInterval(() => this.link.send({ kind: "alive", page: this.page }), ALIVE_MS);
    const watch = setInterval(() => this.judge(), 1000);
    this.endings.push(() => clearInterval(heart), () => clearInterval(watch));
    // A page that is left or reloaded no longer watches; one that the browser kept and shows again does.
    const left = (): void => this.send({ kind: "bye", page: this.page });
    const back = (event: PageTransitionEvent): void => void (event.persisted && this.hello());
    addEventListener("pagehide", left);
    addEventListener("pageshow", back);
    this.endings.push(() => removeEventListener("pagehide", left), () => removeEventListener("pageshow", back));
    this.hello();
  }

  on(topic: Topic, changed: () => void): () => void {
    const listeners = this.listeners.get(topic) ?? new Set();
    this.listeners.set(topic, listeners.add(changed));
    return () => listeners.delete(changed);
  }

  onLabel(answered: (answer: LabelAnswer) => void): () => void {
    this.labelListeners.add(answered);
    return () => this.labelListeners.delete(answered);
  }

  send(message: ViewMessage): void {
    this.link.send(message);
  }

  get gone(): boolean {
    return this.link.kernelState() === "gone";
  }

  /** BokehJS, asked of this kernel if the page has none yet. */
  bokeh(): Promise<bokehScript.Bokeh> {
    if (bokehScript.shouldAsk()) this.send({ kind: "want_asset", name: "bokeh" });
    // Another panel of this page may have asked, and its kernel may have died since.
    const again = setInterval(() => {
      if (bokehScript.shouldAsk()) this.send({ kind: "want_asset", name: "bokeh" });
    }, 1000);
    return bokehScript.bokeh().finally(() => clearInterval(again));
  }

  dispose(): void {
    this.send({ kind: "bye", page: this.page });
    for (const end of this.endings) end();
    this.listeners.clear();
  }

  private tell(topic: Topic): void {
    for (const listener of this.listeners.get(topic) ?? []) listener();
  }

  private hello(): void {
    const now = performance.now();
    // While an answer is on its way every further live frame has a gap; one question is enough.
    if (this.helloAt !== null && now - this.helloAt < RETRY_MS) return;
    this.helloAt = now;
    this.firstHelloAt ??= now;
    this.send({ kind: "hello", page: this.page, have: this.rows.have, generation: this.rows.generation, figures: this.figures.length });
  }

  private answered(): void {
    this.helloAt = this.firstHelloAt = null;
  }

  private receive(message: KernelMessage, buffers: readonly DataView[]): void {
    switch (message.kind) {
      case "status":
        this.status = message;
        this.clockSkew = message.now - Date.now() / 1000;
        // A header that knows of more rows than came means frames were lost on the way.
        if (message.generation === this.rows.generation && message.rows <= this.rows.have) this.answered();
        this.tell("status");
        break;
      case "controls":
        this.controls = message;
        this.tell("controls");
        break;
      case "figures":
        this.figures = message.figures;
        this.tell("figures");
        break;
      case "frame": {
        const buffer = buffers[0];
        if (!buffer) break;
        const taken = this.rows.take(message, doubles(buffer));
        if (taken === "gap") this.hello();
        else this.answered();
        if (taken === "new") this.tell("rows");
        break;
      }
      case "samples":
        this.samples = message;
        this.tell("samples");
        break;
      case "foreseen":
        this.foreseen.set(message.name, message);
        this.unforeseen.delete(message.name);
        this.tell("foreseen");
        break;
      case "log":
        this.log = message.lines;
        this.tell("log");
        break;
      case "said":
        this.said = { ...message, at: Date.now() };
        this.tell("said");
        if (message.unforeseen) {
          this.unforeseen.set(message.unforeseen, message.text);
          this.tell("foreseen");
        }
        break;
      case "asset": {
        const buffer = buffers[0];
        if (buffer) void bokehScript.receive(new TextDecoder().decode(buffer)).catch((error) => this.complain(String(error)));
        break;
      }
      default:
        for (const listener of this.labelListeners) listener(message);
    }
    this.judge();
  }

  private complain(text: string): void {
    this.said = { kind: "said", level: "error", text, cell: "", unforeseen: "", at: Date.now() };
    this.tell("said");
  }

  private judge(): void {
    const now = performance.now();
    const waited = this.firstHelloAt === null ? 0 : now - this.firstHelloAt;
    const kernel = this.link.kernelState();
    let trouble = "";
    if (kernel === "gone") {
      trouble = `this view's kernel is gone; re-run the cell or %rlhf watch ${this.status?.run_id ?? "RUN"}`;
    } else if (waited > PATIENCE_MS) {
      trouble =
        kernel === "busy"
          ? "the kernel is busy with a cell; buttons and sliders wait for it"
          : "the kernel does not answer this view. JupyterLab's setting commsOverSubshells may have cut it off: set it to “disabled” " +
            "(Settings → Kernels) and reload, or re-run the cell";
    }
    if (kernel !== "gone" && this.helloAt !== null && now - this.helloAt >= RETRY_MS) this.hello();
    if (trouble !== this.trouble) {
      this.trouble = trouble;
      this.tell("health");
    }
  }
}
