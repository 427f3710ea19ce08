// Two completions of a prompt, one key an answer. Plain data and callbacks: the cell's labeller and the panel both use it.
import { h, setText } from "../lib/dom";
import { uniqueId } from "../lib/link";
import type { LabelFailed, LabelQueue, LabelSaved, LabelStart, LabelSubmitted, LabelUndone } from "../lib/protocol";

export interface LabelLink {
  send(message: LabelStart | LabelSubmitted | LabelUndone): void;
  onAnswer(heard: (answer: LabelQueue | LabelSaved | LabelFailed) => void): () => void;
  /** True when the kernel of this view will never answer again. */
  gone(): boolean;
  onHealth(changed: () => void): () => void;
}

const RUBRIC = ["helpful", "honest", "harmless", "concise"];
const RESEND_MS = 4000;
type Choice = LabelSubmitted["choice"];
const KEYS: Record<string, Choice> = { "1": "a", "2": "b", t: "tie", s: "skip" };

export function createLabeller(el: HTMLElement, link: LabelLink, options: { onClose?: () => void } = {}): () => void {
  let queue: LabelQueue | null = null;
  /** Sent and not yet acknowledged; resent with the same id, which the kernel takes once. */
  let pending: (LabelSubmitted | LabelUndone) | null = null;
  let shownAt = performance.now();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const marked = new Set<string>();

  const position = h("span.rlhf-position");
  const keys = h("div.rlhf-keys", { hidden: true }, "1 and 2 choose a side · t tie · s skip · u undo · h o m c mark the rubric · ? these keys");
  const prompt = h("div.rlhf-prompt");
  const left = h("div.rlhf-side", { "data-side": "a" });
  const right = h("div.rlhf-side", { "data-side": "b" });
  const button = (key: string, text: string, act: () => void): HTMLButtonElement =>
    h("button.rlhf-button", { type: "button", "data-key": key, onclick: () => (act(), root.focus()) }, h("kbd", {}, key), ` ${text}`);
  const choices = [
    button("1", "A better", () => answer("a")),
    button("2", "B better", () => answer("b")),
    button("t", "tie", () => answer("tie")),
    button("s", "skip", () => answer("skip")),
  ];
  const undo = button("u", "undo", () => takeBack());
  const help = button("?", "keys", () => (keys.hidden = !keys.hidden));
  const toggles = RUBRIC.map((name) =>
    h("button.rlhf-toggle", { type: "button", "aria-pressed": "false", "data-criterion": name, onclick: () => (mark(name), root.focus()) }, name));
  const bar = h("div.rlhf-bar", { role: "progressbar", "aria-label": "labelled" }, h("span"));
  const saved = h("span.rlhf-saved", { role: "status" });
  const banner = h("div.rlhf-banner", { role: "alert", hidden: true });
  const pair = h("div.rlhf-pair", {},
    h("section", {}, h("div.rlhf-sidename", {}, "A"), left),
    h("section", {}, h("div.rlhf-sidename", {}, "B"), right));
  const done = h("div.rlhf-done", { hidden: true });
  const close = options.onClose ? h("button.rlhf-link", { type: "button", onclick: options.onClose }, "back to the run") : null;
  // JupyterLab's command mode takes single keys for itself, before they come here: `1` would make the cell a heading.
  const root = h("div.rlhf-labeller", { tabindex: 0, role: "region", "aria-label": "label pairs", "data-lm-suppress-shortcuts": "true" },
    h("div.rlhf-labelhead", {}, position, help, close), keys, banner, prompt, pair, done,
    h("div.rlhf-choices", {}, ...choices, undo, h("span.rlhf-rubric", {}, ...toggles)),
    h("div.rlhf-labelfoot", {}, bar, saved));

  root.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const choice = KEYS[event.key];
    if (choice) answer(choice);
    else if (event.key === "u") takeBack();
    else if (event.key === "?") keys.hidden = !keys.hidden;
    else if (event.key === "Escape" && options.onClose) options.onClose();
    else if ("homc".includes(event.key) && event.key.length === 1) mark(RUBRIC["homc".indexOf(event.key)] as string);
    else return;
    event.preventDefault();
  });

  function mark(name: string): void {
    if (!marked.delete(name)) marked.add(name);
    draw();
  }
  function answer(choice: Choice): void {
    if (!queue?.task || pending || link.gone()) return;
    send({ kind: "label_submitted", task_id: queue.task.task_id, client_id: uniqueId(), choice, ms: performance.now() - shownAt, rubric: [...marked] });
  }
  function takeBack(): void {
    if (!queue?.can_undo || pending || link.gone()) return;
    send({ kind: "label_undone", client_id: uniqueId() });
  }
  function send(message: LabelSubmitted | LabelUndone): void {
    pending = message;
    clearTimeout(timer);
    timer = setTimeout(() => pending && !link.gone() && send(pending), RESEND_MS);
    link.send(message);
    draw();
  }
  function show(next: LabelQueue): void {
    const other = next.task?.task_id !== queue?.task?.task_id;
    queue = next;
    if (other) {
      shownAt = performance.now();
      marked.clear();
    }
    draw();
  }
  const off = link.onAnswer((heard) => {
    if (heard.kind === "label_queue") return show(heard);
    if (!pending || heard.client_id !== pending.client_id) return;
    clearTimeout(timer);
    if (heard.kind === "label_failed") {
      const again = pending;
      pending = null;
      banner.hidden = false;
      banner.replaceChildren(`not saved: ${heard.text} `, h("button.rlhf-link", { type: "button", onclick: () => (send(again), root.focus()) }, "try again"));
      return draw();
    }
    const undone = pending.kind === "label_undone";
    pending = null;
    banner.hidden = true;
    show(heard.queue);
    setText(saved, undone ? "taken back ✓" : "saved ✓");
  });
  const health = (): void => {
    if (link.gone()) {
      banner.hidden = false;
      setText(banner, "This view's kernel is gone. What was saved is kept; run the cell again to go on at this pair.");
    }
    draw();
  };
  const offHealth = link.onHealth(health);

  function draw(): void {
    const hadFocus = root.contains(document.activeElement);
    const task = queue?.task ?? null;
    if (!queue) setText(position, "waiting for the kernel");
    else {
      const pace = queue.seconds_per_label === null ? "" : ` · ${Math.round(queue.seconds_per_label)} s`;
      const at = task ? `pair ${Math.min(queue.done + 1, queue.total)} of ${queue.total}` : `${queue.done} of ${queue.total} done`;
      setText(position, `${queue.title} · ${at} · ${queue.annotator}${pace}`);
    }
    prompt.hidden = pair.hidden = task === null;
    setText(prompt, task?.prompt ?? "");
    setText(left, task?.a ?? "");
    setText(right, task?.b ?? "");
    done.hidden = queue === null || task !== null;
    setText(done, queue && !task ? `All ${queue.total} pairs are answered. ${queue.summary}` : "");
    const off = task === null || pending !== null || link.gone();
    for (const each of choices) each.disabled = off;
    undo.disabled = !queue?.can_undo || pending !== null || link.gone();
    for (const each of toggles) {
      const on = marked.has(each.dataset.criterion ?? "");
      each.setAttribute("aria-pressed", String(on));
      each.disabled = task === null;
    }
    const share = queue && queue.total ? queue.done / queue.total : 0;
    (bar.firstChild as HTMLElement).style.transform = `scaleX(${share})`;
    bar.setAttribute("aria-valuenow", String(Math.round(100 * share)));
    if (pending) setText(saved, "saving …");
    // A disabled button drops the focus, and with it every following key.
    if (hadFocus && !root.contains(document.activeElement)) root.focus();
    root.dataset.done = String(queue?.done ?? 0);
  }

  el.append(root);
  draw();
  link.send({ kind: "label_start" });
  // The first question may be lost while the comm opens; asking again changes nothing.
  const ask = setInterval(() => (queue === null && !link.gone() ? link.send({ kind: "label_start" }) : clearInterval(ask)), 1500);
  health();
  return () => {
    clearTimeout(timer);
    clearInterval(ask);
    off();
    offHealth();
    root.remove();
  };
}
