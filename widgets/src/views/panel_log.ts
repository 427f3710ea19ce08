// The tail of the run's log, read while the tab is open.
import { h, setText } from "../lib/dom";
import type { RunStore } from "../lib/run_store";
import type { Tab } from "./panel";

const EVERY_MS = 1500;

export function createLog(store: RunStore): Tab {
  const text = h("pre.rlhf-log", { tabindex: 0 });
  const element = h("div.rlhf-logtab", {}, text);
  let timer: ReturnType<typeof setInterval> | undefined;
  const ask = (): void => store.send({ kind: "want_log", lines: 200 });
  const draw = (): void => {
    // Stay at the end unless the person has scrolled up to read.
    const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 24;
    setText(text, store.log.length ? store.log.join("\n") : "The log is empty.");
    if (atEnd) text.scrollTop = text.scrollHeight;
  };
  const off = store.on("log", draw);
  return {
    element,
    setShown(shown) {
      clearInterval(timer);
      if (!shown) return;
      ask();
      draw();
      timer = setInterval(ask, EVERY_MS);
    },
    dispose() {
      clearInterval(timer);
      off();
    },
  };
}
