// Live coefficients: what is asked and what is in effect stay apart until they agree.
import { h, setAttribute, setText } from "../lib/dom";
import { number } from "../lib/format";
import type { Foreseen, Slider } from "../lib/protocol";
import type { RunStore } from "../lib/run_store";
import { makeScale, type Scale } from "../lib/scale";

const DEBOUNCE_MS = 150;
const STEPS = 1000;
/** More than these stand behind "more": the first ones are what a method is steered by. */
const PRINCIPAL = 4;
const TERMINAL = new Set(["finished", "stopped", "failed"]);
const KEYS: Record<string, number> = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 6, PageDown: -6 };

interface Row {
  element: HTMLElement;
  update(slider: Slider): void;
  dispose(): void;
}

export function createSliders(store: RunStore): { element: HTMLElement; dispose(): void } {
  const element = h("aside.rlhf-sliders", { "aria-label": "live coefficients" });
  const rows = new Map<string, Row>();
  const rest = h("div.rlhf-morebody");
  const summary = h("summary", {});
  const more = h("details.rlhf-more", { hidden: true }, summary, rest);
  element.append(more);
  const draw = (): void => {
    const sliders = store.controls?.sliders ?? [];
    more.hidden = sliders.length <= PRINCIPAL + 1;
    setText(summary, `${sliders.length - PRINCIPAL} more`);
    for (const [place, slider] of sliders.entries()) {
      let row = rows.get(slider.name);
      if (!row) {
        row = createRow(slider, store);
        rows.set(slider.name, row);
        if (place < PRINCIPAL || more.hidden) more.before(row.element);
        else rest.append(row.element);
      }
      row.update(slider);
    }
    element.hidden = rows.size === 0;
  };
  const off = [store.on("controls", draw), store.on("status", draw), store.on("health", draw), store.on("foreseen", draw)];
  draw();
  return {
    element,
    dispose() {
      for (const end of off) end();
      for (const row of rows.values()) row.dispose();
    },
  };
}

function createRow(first: Slider, store: RunStore): Row {
  let slider = first;
  const scale = makeScale(first.low, first.high, first.scale);
  /** What the person last chose here and the kernel has not answered yet. */
  let mine: { value: number; sentAt: number | null } | null = null;
  let timer: ReturnType<typeof setTimeout> | undefined;

  const field = h("input.rlhf-number", { type: "text", inputmode: "decimal", "aria-label": `${first.name}, typed`, spellcheck: "false" });
  const range = h("input.rlhf-range", { type: "range", min: 0, max: STEPS, step: 1, "aria-label": first.name });
  const effect = h("span.rlhf-effect", { "aria-hidden": "true", title: "in effect" });
  const words = h("div.rlhf-slidertext", { role: "status" });
  const unit = first.unit ? ` (${first.unit})` : "";
  const whatIf = h("button.rlhf-whatif", { type: "button", hidden: true, title: "Move the handle without moving the run: where would it settle?" }, "what if");
  const apply = h("button.rlhf-apply", { type: "button", hidden: true }, "apply");
  const element = h("div.rlhf-slider", { "data-name": first.name, title: [first.meaning, `${number(first.low)} to ${number(first.high)}${unit}`].filter(Boolean).join("\n") },
    h("div.rlhf-sliderhead", {}, h("label", {}, first.name), whatIf, field),
    h("div.rlhf-track", {}, effect, range), h("div.rlhf-sliderfoot", {}, words, apply));

  /** A value that is only thought of: nothing is sent to the run before it is applied. */
  let thought: number | null = null;
  const current = (): number => thought ?? mine?.value ?? slider.asked ?? slider.value;

  const think = (on: boolean): void => {
    thought = on ? slider.value : null;
    if (on) {
      store.foreseen.delete(slider.name);
      store.unforeseen.delete(slider.name);
      store.send({ kind: "preview", name: slider.name, values: along(scale) });
      range.focus();
    }
    draw();
  };
  whatIf.addEventListener("click", () => think(thought === null));
  apply.addEventListener("click", () => {
    const value = current();
    think(false);
    choose(value, true);
  });
  element.addEventListener("keydown", (event) => {
    if (thought === null || event.target === field) return;
    if (event.key === "Escape") think(false);
    else if (event.key === "Enter" && event.target === range) apply.click();
    else return;
    event.stopPropagation();
  });

  const send = (): void => {
    clearTimeout(timer);
    if (!mine || mine.sentAt !== null) return;
    mine.sentAt = Date.now();
    store.send({ kind: "set", name: slider.name, value: mine.value });
    draw();
  };
  const choose = (value: number, now: boolean): void => {
    if (thought !== null) {
      thought = value;
      draw();
      return;
    }
    mine = { value, sentAt: null };
    clearTimeout(timer);
    if (now) send();
    else timer = setTimeout(send, DEBOUNCE_MS);
    draw();
  };

  range.addEventListener("input", () => choose(scale.value(range.valueAsNumber / STEPS), false));
  range.addEventListener("change", send);
  range.addEventListener("keydown", (event) => {
    const steps = KEYS[event.key];
    if (steps === undefined) return;
    // The browser's own step is a thousandth of the track; a key moves by what a person would call a notch.
    event.preventDefault();
    choose(scale.nudge(current(), steps), false);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      field.value = number(current());
      range.focus();
    }
    const steps = event.key === "ArrowUp" ? 1 : event.key === "ArrowDown" ? -1 : 0;
    if (steps) {
      event.preventDefault();
      choose(scale.nudge(current(), steps), false);
      field.value = number(current());
    }
    if (event.key !== "Enter") return;
    const value = Number(field.value.trim().replace(",", "."));
    if (field.value.trim() === "" || !Number.isFinite(value)) {
      problem(`“${field.value}” is no number`);
    } else if (value < slider.low || value > slider.high) {
      problem(`${number(value)} is outside ${number(slider.low)} to ${number(slider.high)}`);
    } else choose(value, true);
  });
  field.addEventListener("blur", () => (field.value = number(current())));

  function problem(text: string): void {
    setText(words, text);
    words.classList.add("rlhf-is-error");
  }

  function draw(): void {
    const over = store.gone || TERMINAL.has(store.status?.state ?? "");
    const reason = slider.unavailable_reason ?? "";
    range.disabled = field.disabled = over || reason !== "";
    element.classList.toggle("rlhf-is-off", range.disabled);
    if (range.disabled) thought = null;
    const asked = mine?.value ?? slider.asked;
    const shown = thought ?? asked ?? slider.value;
    const position = scale.position(shown);
    if (range.valueAsNumber !== Math.round(position * STEPS)) range.valueAsNumber = Math.round(position * STEPS);
    setAttribute(range, "aria-valuetext", `${number(shown)}${unit}`);
    element.style.setProperty("--position", String(position));
    element.style.setProperty("--effect", String(scale.position(slider.value)));
    if (document.activeElement !== field && field.value !== number(shown)) field.value = number(shown);
    const waiting = asked !== null && asked !== undefined && asked !== slider.value;
    element.classList.toggle("rlhf-is-waiting", waiting);
    words.classList.remove("rlhf-is-error");
    whatIf.hidden = !slider.can_preview || range.disabled;
    setText(whatIf, thought === null ? "what if" : "leave");
    apply.hidden = thought === null || thought === slider.value;
    element.classList.toggle("rlhf-is-thought", thought !== null);
    if (thought !== null) {
      const refusal = store.unforeseen.get(slider.name);
      setText(words, refusal ?? foreseen(thought, store.foreseen.get(slider.name)));
      words.classList.toggle("rlhf-is-error", refusal !== undefined);
      setAttribute(range, "aria-valuetext", `${number(thought)}${unit}: ${words.textContent}`);
    } else if (reason) setText(words, reason);
    else if (waiting) setText(words, `${number(slider.value)} in effect · ${number(asked)} asked`);
    else setText(words, over ? `${number(slider.value)} at the end` : `${number(slider.value)} in effect`);
  }

  return {
    element,
    update(next) {
      slider = next;
      // The kernel's word replaces ours once it has heard us: it says asked, or in effect, or it refused and says neither.
      if (mine?.sentAt) mine = heard(mine, next) ? null : mine;
      draw();
    },
    dispose: () => clearTimeout(timer),
  };
}

/** Of the hundred that the protocol allows: an eighth of a decade apart over six decades. */
const GRID = 49;

/** Values to ask about: the whole track. A tether of 0 has no optimum to foresee. */
function along(scale: Scale): number[] {
  return Array.from({ length: GRID }, (_, i) => scale.value(i / (GRID - 1))).filter((value) => value > 0);
}

/** What the nearest values that were asked about say of this one, between them in the logarithm. */
export function foreseen(value: number, answer: Foreseen | undefined): string {
  if (!answer) return "asking the policy…";
  const rows = answer.predictions;
  const [lowest, highest] = [rows[0]!.value, rows.at(-1)!.value];
  if (value < lowest * (1 - 1e-9) || value > highest * (1 + 1e-9)) {
    return `${number(value)} is outside ${number(lowest)} to ${number(highest)}: nothing is foreseen there`;
  }
  const above = rows.findIndex((row) => row.value >= value);
  const right = above < 0 ? rows.length - 1 : above;
  const left = Math.max(0, right - 1);
  const [a, b] = [rows[left]!, rows[right]!];
  const share = a.value === b.value ? 1 : Math.min(1, Math.max(0, Math.log(value / a.value) / Math.log(b.value / a.value)));
  const between = (from: number, to: number): number => from + share * (to - from);
  const effective = between(a.effective, b.effective);
  if (effective < answer.enough) return `too far to foresee: ${effective.toFixed(1)} of ${answer.samples} completions carry it`;
  return `would settle at reward ${between(a.reward, b.reward).toFixed(2)}, KL ${between(a.kl, b.kl).toFixed(1)} nats (now ${answer.reward.toFixed(2)}, ${answer.kl.toFixed(1)})`;
}

/** Status messages arrive between sending and the kernel's reading: those of the first moments may not yet know of it. */
function heard(mine: { value: number; sentAt: number | null }, slider: Slider): boolean {
  if (slider.asked === mine.value || slider.value === mine.value) return true;
  return mine.sentAt !== null && Date.now() - mine.sentAt > 1500;
}
