// The panel's frame: header, tabs, sliders, footer. Each tab is a view of its own.
import { createLabeller } from "./labeller";
import { h, setAttribute, setText } from "../lib/dom";
import { copyText } from "../lib/clipboard";
import { icon, type IconName } from "../lib/icons";
import { ago, clock, number, rate } from "../lib/format";
import type { Command, Status } from "../lib/protocol";
import type { RunStore } from "../lib/run_store";
import { createCurves } from "./panel_curves";
import { createLog } from "./panel_log";
import { createSamples } from "./panel_samples";
import { createSliders } from "./panel_sliders";
import { createTether } from "./panel_tether";

export interface Tab {
  element: HTMLElement;
  /** Shown or hidden: a hidden tab does no work. */
  setShown(shown: boolean): void;
  dispose(): void;
}

type TabName = "Tether" | "Curves" | "Samples" | "Log";
const TABS: readonly TabName[] = ["Tether", "Curves", "Samples", "Log"];
const MAKE: Record<TabName, (store: RunStore) => Tab> = {
  Tether: createTether,
  Curves: createCurves,
  Samples: createSamples,
  Log: createLog,
};
const TERMINAL = new Set(["finished", "stopped", "failed"]);

export function createPanel(el: HTMLElement, store: RunStore): () => void {
  const endings: (() => void)[] = [];
  const on = (topic: Parameters<RunStore["on"]>[0], run: () => void): void => void endings.push(store.on(topic, run));

  // -- header
  const state = h("span.rlhf-state");
  const name = h("strong.rlhf-name");
  const title = h("span.rlhf-title");
  const progress = h("span.rlhf-progress");
  const command = (op: Command["op"], shape: IconName, text: string, hint: string): HTMLButtonElement =>
    h("button.rlhf-button", { type: "button", title: hint, "data-op": op, onclick: () => store.send({ kind: "command", op }) },
      icon(shape), ` ${text}`);
  const pause = command("pause", "pause", "pause", "Hold before the next optimizer step");
  const resume = command("resume", "play", "resume", "Go on");
  const stop = command("stop", "stop", "stop", "End after this step; the model is saved");
  const checkpoint = command("checkpoint", "diamond", "checkpoint", "Save a checkpoint at the next step");
  const copy = h("button.rlhf-button", { type: "button", title: "Copy what you did here as a cell", onclick: () => offerCells() },
    icon("copy"), " copy as cell");
  const bar = h("div.rlhf-bar", { role: "progressbar" }, h("span"));
  const where = h("span.rlhf-where");
  const header = h("header.rlhf-header", {},
    h("div.rlhf-line", {}, name, title, state, progress),
    h("div.rlhf-buttons", {}, pause, resume, stop, checkpoint, copy));
  const banner = h("div.rlhf-banner", { role: "status", hidden: true });
  const failureLines = h("pre.rlhf-failurelog");
  const failureLog = h("details.rlhf-failure", { hidden: true }, h("summary", {}, "how it ended, whole, and its last log lines"), failureLines);

  // -- tabs
  const tablist = h("div.rlhf-tabs", { role: "tablist" });
  const stage = h("div.rlhf-stage");
  const tabs = new Map<TabName, { button: HTMLButtonElement; tab: Tab }>();
  let shown: TabName | null = null;
  let chosen = false;
  const select = (wanted: TabName): void => {
    if (shown === wanted) return;
    for (const [each, { button, tab }] of tabs) {
      const active = each === wanted;
      setAttribute(button, "aria-selected", String(active));
      button.tabIndex = active ? 0 : -1;
      tab.element.hidden = !active;
      tab.setShown(active);
    }
    shown = wanted;
  };
  for (const each of TABS) {
    const tab = MAKE[each](store);
    const button = h("button.rlhf-tab", {
      type: "button",
      role: "tab",
      onclick: () => ((chosen = true), select(each)),
      onkeydown: (event: KeyboardEvent) => {
        const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
        if (!step) return;
        event.preventDefault();
        event.stopPropagation();
        const visible = TABS.filter((other) => !tabs.get(other)?.button.hidden);
        const next = visible[(visible.indexOf(each) + step + visible.length) % visible.length] as TabName;
        chosen = true;
        select(next);
        tabs.get(next)?.button.focus();
      },
    }, each);
    tab.element.hidden = true;
    tab.element.setAttribute("role", "tabpanel");
    tab.element.setAttribute("aria-label", each);
    tablist.append(button);
    stage.append(tab.element);
    tabs.set(each, { button, tab });
    endings.push(() => tab.dispose());
  }
  const chooseTab = (): void => {
    // A tether needs a reference and a measured distance to it: DPO has the one without the other.
    const status = store.status;
    const kl = store.figures.find((figure) => figure.id === "tether")?.series.kl;
    const tether = Boolean(status?.has_reference) && (store.rows.have === 0 || Boolean(store.rows.first(kl)));
    const button = tabs.get("Tether")?.button;
    if (button) button.hidden = !tether;
    if (!status && !store.rows.have) return;
    if (!chosen || (shown === "Tether" && !tether)) select(tether ? "Tether" : "Curves");
  };

  // -- sliders and footer
  const sliders = createSliders(store);
  endings.push(() => sliders.dispose());
  const applied = h("span.rlhf-applied", { role: "status" });
  const undo = h("button.rlhf-link", { type: "button", hidden: true, onclick: () => undoLast() }, "undo");
  const cells = h("div.rlhf-cells", { hidden: true });
  const label = h("button.rlhf-link.rlhf-labelkey", { type: "button", hidden: true, title: "Judge six pairs blind: the policy as it is now against its start", onclick: () => openLabels() },
    h("kbd", {}, "L"), " label 6");
  const footer = h("footer.rlhf-footer", {}, applied, undo, label);
  const body = h("div.rlhf-body", {}, stage, sliders.element);
  const labels = h("div.rlhf-labels", { hidden: true });

  // JupyterLab's command mode takes single keys for itself, before they come here: `d d` would delete the cell.
  const root = h("div.rlhf-panel", { tabindex: 0, role: "region", "aria-label": "run", "data-lm-suppress-shortcuts": "true" },
    header, bar, banner, failureLog,
    h("div.rlhf-tabline", {}, tablist, where),
    body, labels, footer, cells);
  // How many metric rows this view holds: what a test or a screen reader's script can wait for.
  const countRows = (): void => void (root.dataset.rows = String(store.rows.have));
  on("rows", countRows);
  countRows();
  root.addEventListener("keydown", (event) => {
    event.stopPropagation();
    const typing = event.target instanceof HTMLInputElement && event.target.type === "text";
    if (event.key.toLowerCase() !== "l" || event.ctrlKey || event.metaKey || event.altKey || typing) return;
    event.preventDefault();
    openLabels();
  });

  // -- label what you watch
  let endLabels: (() => void) | null = null;
  function closeLabels(): void {
    endLabels?.();
    endLabels = null;
    labels.hidden = true;
    body.hidden = false;
    root.focus();
  }
  function openLabels(): void {
    if (endLabels || !store.controls?.can_label || store.gone) return;
    labels.hidden = false;
    body.hidden = true;
    endLabels = createLabeller(labels, {
      send: (message) => store.send(message),
      onAnswer: (heard) => store.onLabel(heard),
      gone: () => store.gone,
      onHealth: (changed) => store.on("health", changed),
    }, { onClose: closeLabels });
    labels.querySelector<HTMLElement>(".rlhf-labeller")?.focus();
  }
  endings.push(() => endLabels?.());

  function drawHeader(): void {
    const status = store.status;
    if (!status) {
      setText(name, "");
      setText(state, "waiting for the kernel");
      return;
    }
    setText(name, status.run_id);
    setText(title, status.title ? `${status.title}` : status.method);
    setText(state, stateLine(status));
    setAttribute(state, "title", status.state === "failed" ? stateLine(status) : null);
    state.dataset.state = store.gone ? "gone" : status.state;
    setText(progress, progressLine(status));
    const share = status.max_steps ? Math.min(1, status.step / status.max_steps) : 0;
    (bar.firstChild as HTMLElement).style.transform = `scaleX(${share})`;
    setAttribute(bar, "aria-valuenow", String(Math.round(100 * share)));
    bar.dataset.state = status.state;
    const over = TERMINAL.has(status.state) || store.gone;
    pause.hidden = over || status.state === "paused";
    resume.hidden = store.gone || !["paused", "failed", "stopped"].includes(status.state);
    const last = resume.lastChild as Text;
    last.data = status.state === "paused" ? " resume" : " resume from checkpoint";
    resume.disabled = status.state !== "paused" && status.checkpoint_step === null;
    resume.title = resume.disabled ? "There is no checkpoint to resume from" : "Go on";
    stop.hidden = checkpoint.hidden = over;
    pause.disabled = stop.disabled = checkpoint.disabled = status.state === "waiting" || status.state === "starting";
    const ranks = status.world_size === null ? "" : `${status.world_size} ${status.world_size === 1 ? "rank" : "ranks"}`;
    setText(where, [status.device, ranks, status.attempt > 1 ? `attempt ${status.attempt}` : "", status.watching > 1 ? `watching: ${status.watching}` : ""].filter(Boolean).join(" · "));
    failureLog.hidden = status.failure_log.length === 0;
    setText(failureLines, [status.failure, "", ...status.failure_log].join("\n"));
    drawBanner();
    chooseTab();
  }

  function drawBanner(): void {
    const text = store.trouble || store.status?.trouble || "";
    banner.hidden = !text;
    setText(banner, text);
    root.classList.toggle("rlhf-is-gone", store.gone);
  }

  // -- what was done, as words and as cells
  function drawFooter(): void {
    const last = changed().at(-1);
    const now = Date.now() / 1000 + store.clockSkew;
    const said = store.said;
    const saidIsNewer = said !== null && (!last || said.at / 1000 + store.clockSkew > last.t + 0.5);
    applied.classList.toggle("rlhf-is-error", saidIsNewer && said.level === "error");
    if (saidIsNewer && (said.level === "error" || !last || Date.now() - said.at < 6000)) setText(applied, said.text);
    else if (last) {
      const who = last.who ? ` · ${last.who}` : "";
      setText(applied, `applied: ${last.name} ${number(last.old)} → ${number(last.new)} at step ${last.step}${who} · ${ago(now - last.t)}`);
    } else setText(applied, store.status?.notices.at(-1) ?? "");
    const running = store.status !== null && !TERMINAL.has(store.status.state) && !store.gone;
    undo.hidden = !last || !running;
    if (last) undo.title = `set ${last.name} back to ${number(last.old)}`;
    copy.disabled = !last && !said?.cell;
    label.hidden = !store.controls?.can_label || store.gone;
  }
  /** What a person did; what followed from it is undone with it. */
  function changed() {
    return (store.controls?.changes ?? []).filter((change) => !change.follows);
  }
  function undoLast(): void {
    const last = changed().at(-1);
    if (!last) return;
    const along = store.controls?.changes.filter((change) => change.follows === last.id) ?? [];
    for (const each of [last, ...along]) store.send({ kind: "set", name: each.name, value: each.old, why: "undo" });
  }
  function offerCells(): void {
    const done = changed().slice(-8).map((change) => change.cell);
    if (store.said?.cell && !done.includes(store.said.cell)) done.push(store.said.cell);
    const text = done.join("\n");
    const note = h("span.rlhf-quiet", {}, "");
    const box = h("textarea.rlhf-cell", { rows: String(Math.min(8, done.length)), readonly: true, "aria-label": "cell" });
    box.value = text;
    cells.replaceChildren(box, h("div", {}, note, h("button.rlhf-link", { type: "button", onclick: () => ((cells.hidden = true), root.focus()) }, "close")));
    cells.hidden = false;
    box.select();
    void copyText(text).then((copied) => setText(note, copied ? "copied; paste it into a cell  " : "select and copy it into a cell  "));
  }

  on("status", drawHeader);
  on("figures", chooseTab);
  on("rows", chooseTab);
  on("status", drawFooter);
  on("controls", drawFooter);
  on("said", drawFooter);
  on("health", drawHeader);
  on("health", drawBanner);
  const tick = setInterval(drawFooter, 1000);
  endings.push(() => clearInterval(tick));
  drawHeader();
  drawBanner();
  drawFooter();
  el.append(root);
  return () => {
    for (const end of endings) end();
    root.remove();
  };
}

function stateLine(status: Status): string {
  if (status.state === "failed") return `failed: ${status.failure || "no cause was recorded"}`;
  if (status.stage && (status.state === "starting" || status.state === "waiting" || status.step === 0)) return `${status.state}: ${status.stage}`;
  return status.state;
}

function progressLine(status: Status): string {
  const parts: string[] = [];
  if (status.step || status.max_steps) parts.push(status.max_steps ? `${status.step}/${status.max_steps}` : `step ${status.step}`);
  if (status.state === "running" && status.steps_per_s) parts.push(rate(status.steps_per_s));
  if (status.state === "running" && status.eta_s !== null) parts.push(`ETA ${clock(status.eta_s)}`);
  if (TERMINAL.has(status.state) && status.seconds !== null) parts.push(`in ${clock(status.seconds)}`);
  return parts.join(" · ");
}
