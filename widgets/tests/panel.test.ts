import { afterEach, expect, test, vi } from "vitest";
import type { KernelState, Link } from "../src/lib/link";
import type { Change, Controls, KernelMessage, Slider, Status, ViewMessage } from "../src/lib/protocol";
import { RunStore } from "../src/lib/run_store";
import { createPanel } from "../src/views/panel";

const status = (more: Partial<Status> = {}): Status => ({
  kind: "status", run_id: "ppo-1", title: "toy-sft → toy-true", method: "ppo", state: "running", stage: "", step: 30, max_steps: 120,
  steps_per_s: 2, eta_s: 45, seconds: 15, attempt: 1, device: "CPU, 2 threads", world_size: 2, warm: true, watching: 1, has_reference: true,
  failure: "", failure_log: [], trouble: "", notices: [], checkpoint_step: null, model_saved: false, rows: 0, generation: 0, now: Date.now() / 1000,
  ...more,
});
const slider = (name: string, more: Partial<Slider> = {}): Slider => ({
  name, low: 1e-4, high: 1, scale: "log", unit: "", meaning: "", value: 0.05, asked: null, unavailable_reason: null, can_preview: false, ...more,
});
const controls = (more: Partial<Controls> = {}): Controls => ({
  kind: "controls", sliders: [slider("kl_coef"), slider("learning_rate")], changes: [], human: [], sample_steps: [], can_label: false, ...more,
});
const change = (more: Partial<Change> = {}): Change => ({
  id: "c1", name: "kl_coef", old: 0.05, new: 0.08, step: 31, who: "mira", why: "", t: Date.now() / 1000, cell: "%rlhf set ppo-1 kl_coef=0.08", follows: "", ...more,
});

function setUp() {
  const sent: ViewMessage[] = [];
  let hear: (message: KernelMessage, buffers?: DataView[]) => void = () => undefined;
  let kernel: KernelState = "live";
  let look: () => void = () => undefined;
  const link: Link = {
    send: (message) => void sent.push(message),
    onMessage: (receive) => ((hear = (message, buffers) => receive(message, buffers ?? [])), () => undefined),
    kernelState: () => kernel,
    onKernelState: (changed) => ((look = changed), () => undefined),
  };
  const el = document.createElement("div");
  document.body.append(el);
  const store = new RunStore(link);
  const end = createPanel(el, store);
  const find = <E extends HTMLElement>(selector: string): E => el.querySelector<E>(selector)!;
  return {
    sent, store, find, end: () => (end(), store.dispose()),
    hear: (message: KernelMessage, ...buffers: DataView[]) => hear(message, buffers),
    lose: () => ((kernel = "gone"), look()),
    sets: () => sent.filter((message) => message.kind === "set"),
    slider: (name: string) => find(`.rlhf-slider[data-name="${name}"]`),
    type: (name: string, text: string) => {
      const field = find<HTMLInputElement>(`.rlhf-slider[data-name="${name}"] input[type=text]`);
      field.value = text;
      field.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
    },
  };
}

afterEach(() => {
  document.body.replaceChildren();
  vi.useRealTimers();
});

test("the header says state, progress, speed and who watches in one line", () => {
  const view = setUp();
  view.hear(status({ watching: 2 }));
  const line = view.find(".rlhf-header").textContent!;
  for (const part of ["ppo-1", "toy-sft → toy-true", "running", "30/120", "ETA 0:45"]) expect(line).toContain(part);
  expect(view.find(".rlhf-where").textContent).toBe("CPU, 2 threads · 2 ranks · watching: 2");
  view.end();
});

test("a dead run says in its header how it died, keeps its log folded, and offers what is left to do", () => {
  const view = setUp();
  view.hear(status({ state: "failed", failure: "rank 1 was killed by SIGKILL", failure_log: ["<b>last</b>"], checkpoint_step: 20 }));
  expect(view.find(".rlhf-state").textContent).toBe("failed: rank 1 was killed by SIGKILL");
  const log = view.find<HTMLDetailsElement>(".rlhf-failure");
  expect(log.hidden).toBe(false);
  expect(log.open).toBe(false);
  expect(log.textContent).toContain("<b>last</b>");
  expect(log.querySelector("b")).toBeNull();
  expect(view.find<HTMLButtonElement>('[data-op="resume"]').disabled).toBe(false);
  expect(view.find('[data-op="stop"]').hidden).toBe(true);
  view.end();
});

test("a failed run without a checkpoint says why it cannot be resumed", () => {
  const view = setUp();
  view.hear(status({ state: "failed", failure: "out of memory" }));
  const resume = view.find<HTMLButtonElement>('[data-op="resume"]');
  expect(resume.disabled).toBe(true);
  expect(resume.title).toContain("no checkpoint");
  view.end();
});

test("asked and in effect stay apart until they agree", () => {
  const view = setUp();
  view.hear(status());
  view.hear(controls());
  view.type("kl_coef", "0.08");
  expect(view.sets()).toEqual([{ kind: "set", name: "kl_coef", value: 0.08 }]);
  expect(view.slider("kl_coef").textContent).toContain("0.05 in effect · 0.08 asked");
  view.hear(controls({ sliders: [slider("kl_coef", { asked: 0.08 })] }));
  expect(view.slider("kl_coef").textContent).toContain("0.05 in effect · 0.08 asked");
  view.hear(controls({ sliders: [slider("kl_coef", { value: 0.08 })], changes: [change()] }));
  expect(view.slider("kl_coef").textContent).toContain("0.08 in effect");
  expect(view.find(".rlhf-applied").textContent).toContain("applied: kl_coef 0.05 → 0.08 at step 31 · mira");
  view.end();
});

test("undo takes back what a person moved, and what followed from it", () => {
  const view = setUp();
  view.hear(status());
  const holds = change({ id: "c1-holds", name: "kl_controller", old: 1, new: 0, cell: "", follows: "c1" });
  view.hear(controls({ changes: [change(), holds] }));
  expect(view.find(".rlhf-applied").textContent).toContain("applied: kl_coef 0.05 → 0.08 at step 31");
  const undo = view.find<HTMLButtonElement>(".rlhf-footer button.rlhf-link");
  expect(undo.title).toBe("set kl_coef back to 0.05");
  undo.click();
  expect(view.sets()).toEqual([
    { kind: "set", name: "kl_coef", value: 0.05, why: "undo" },
    { kind: "set", name: "kl_controller", value: 1, why: "undo" },
  ]);
  view.end();
});

test("a value outside the range and a word are refused where they were typed", () => {
  const view = setUp();
  view.hear(status());
  view.hear(controls());
  view.type("kl_coef", "5");
  expect(view.slider("kl_coef").textContent).toContain("outside 1e-4 to 1");
  view.type("kl_coef", "much");
  expect(view.slider("kl_coef").textContent).toContain("is no number");
  expect(view.sets()).toEqual([]);
  view.end();
});

test("a frozen coefficient is grey and says why", () => {
  const view = setUp();
  view.hear(status());
  view.hear(controls({ sliders: [slider("beta", { unavailable_reason: "the fused loss captured beta when it was built" })] }));
  expect(view.slider("beta").textContent).toContain("the fused loss captured beta");
  expect(view.slider("beta").querySelector<HTMLInputElement>("input[type=range]")!.disabled).toBe(true);
  view.end();
});

test("what a method is steered by stands first, the rest behind one word", () => {
  const view = setUp();
  view.hear(status());
  view.hear(controls({ sliders: ["kl_coef", "learning_rate", "a", "b", "c", "d", "e"].map((name) => slider(name)) }));
  const more = view.find(".rlhf-more");
  expect(more.querySelector("summary")!.textContent).toBe("3 more");
  expect([...more.querySelectorAll<HTMLElement>(".rlhf-slider")].map((each) => each.dataset.name)).toEqual(["c", "d", "e"]);
  view.end();
});

test("a refusal reaches the footer", () => {
  const view = setUp();
  view.hear(status());
  view.hear(controls());
  view.hear({ kind: "said", level: "error", text: "refused: kl_coef is frozen", cell: "", unforeseen: "" });
  expect(view.find(".rlhf-applied").textContent).toBe("refused: kl_coef is frozen");
  expect(view.find(".rlhf-applied").classList).toContain("rlhf-is-error");
  view.end();
});

test("everything clicked is offered as a cell", () => {
  const view = setUp();
  view.hear(status());
  view.hear(controls({ changes: [change(), change({ id: "c2", cell: "%rlhf set ppo-1 kl_coef=0.1" })] }));
  [...document.querySelectorAll("button")].find((each) => each.textContent!.includes("copy as cell"))!.click();
  expect(view.find<HTMLTextAreaElement>("textarea").value).toBe("%rlhf set ppo-1 kl_coef=0.08\n%rlhf set ppo-1 kl_coef=0.1");
  view.end();
});

test("single keys are kept from JupyterLab's command mode", () => {
  const view = setUp();
  const panel = view.find(".rlhf-panel");
  expect(panel.dataset.lmSuppressShortcuts).toBe("true");
  let escaped = 0;
  document.body.addEventListener("keydown", () => escaped++);
  panel.dispatchEvent(new KeyboardEvent("keydown", { key: "d", bubbles: true }));
  expect(escaped).toBe(0);
  view.end();
});

test("a view whose kernel is gone says so and lets nothing be moved", () => {
  const view = setUp();
  view.hear(status());
  view.hear(controls());
  view.lose();
  expect(view.find(".rlhf-banner").textContent).toContain("%rlhf watch ppo-1");
  expect(view.slider("kl_coef").querySelector<HTMLInputElement>("input[type=range]")!.disabled).toBe(true);
  expect(view.find('[data-op="stop"]').hidden).toBe(true);
  view.end();
});

test("a page that is left says goodbye, and one that comes back asks for what it missed", () => {
  const view = setUp();
  view.hear(status());
  dispatchEvent(new Event("pagehide"));
  expect(view.sent.at(-1)).toMatchObject({ kind: "bye", page: view.store.page });
  view.end();
});

const frame = (first: number, ...losses: number[]): [KernelMessage, DataView] => {
  const n = losses.length;
  const steps = losses.map((_, row) => first + row + 1);
  const data = new Float64Array([...steps, ...losses]);
  return [{ kind: "frame", generation: 0, first, n, columns: ["step", "loss"] }, new DataView(data.buffer)];
};

test("a frame seen twice counts once, and one with rows missing before it is asked for again", () => {
  vi.useFakeTimers();
  const view = setUp();
  view.hear(...frame(0, 3, 2));
  view.hear(...frame(0, 3, 2));
  view.hear(...frame(1, 2, 1));
  expect(view.store.rows.have).toBe(3);
  expect([...view.store.rows.series.get("loss")!.y.view()]).toEqual([3, 2, 1]);
  vi.advanceTimersByTime(2100);
  view.hear(...frame(7, 0));
  expect(view.store.rows.have).toBe(3);
  expect(view.sent.filter((message) => message.kind === "hello").at(-1)).toMatchObject({ have: 3 });
  expect(view.find(".rlhf-panel").dataset.rows).toBe("3");
  view.end();
});

test("what if: the handle moves and the run does not, until the value is applied", () => {
  vi.useFakeTimers();
  const view = setUp();
  view.hear(status());
  view.hear(controls({ sliders: [slider("kl_coef", { can_preview: true }), slider("learning_rate")] }));
  const row = view.slider("kl_coef");
  expect(view.slider("learning_rate").querySelector<HTMLElement>(".rlhf-whatif")!.hidden).toBe(true);
  row.querySelector<HTMLButtonElement>(".rlhf-whatif")!.click();
  const asked = view.sent.find((message) => message.kind === "preview")!;
  expect(asked).toMatchObject({ kind: "preview", name: "kl_coef" });
  const values = (asked as { values: number[] }).values;
  expect([values[0], values.at(-1), values.length]).toEqual([1e-4, 1, 49]);
  expect(values.every((value, i) => i === 0 || value > values[i - 1]!)).toBe(true);
  const words = row.querySelector(".rlhf-slidertext")!;
  expect(words.textContent).toBe("asking the policy…");
  view.hear({
    kind: "foreseen", name: "kl_coef", step: 30, now: 0.05, reward: 0.4, kl: 1.5, samples: 16, enough: 4,
    predictions: [
      { value: 0.001, reward: 1, kl: 30, effective: 1.2 }, { value: 0.05, reward: 0.5, kl: 2, effective: 16 }, { value: 0.5, reward: 0.1, kl: 0.2, effective: 12 },
    ],
  });
  expect(words.textContent).toBe("would settle at reward 0.50, KL 2.0 nats (now 0.40, 1.5)");
  const range = row.querySelector<HTMLInputElement>("input[type=range]")!;
  const press = (key: string) => range.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  for (let i = 0; i < 3; i++) press("PageUp");
  expect(words.textContent).toMatch(/^would settle at reward 0\.[0-4]/);
  for (let i = 0; i < 8; i++) press("PageDown");
  expect(words.textContent).toMatch(/^too far to foresee: \d\.\d of 16 completions carry it$/);
  vi.advanceTimersByTime(2000);
  expect(view.sets()).toEqual([]);
  for (let i = 0; i < 6; i++) press("PageUp");
  press("Enter");
  expect(view.sets()).toHaveLength(1);
  expect(words.textContent).toContain("asked");
  view.end();
});

test("leaving a what-if puts the handle back and sends nothing", () => {
  vi.useFakeTimers();
  const view = setUp();
  view.hear(status());
  view.hear(controls({ sliders: [slider("kl_coef", { can_preview: true })] }));
  const row = view.slider("kl_coef");
  row.querySelector<HTMLButtonElement>(".rlhf-whatif")!.click();
  const range = row.querySelector<HTMLInputElement>("input[type=range]")!;
  const before = range.value;
  range.dispatchEvent(new KeyboardEvent("keydown", { key: "PageUp", bubbles: true, cancelable: true }));
  expect(range.value).not.toBe(before);
  range.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  vi.advanceTimersByTime(2000);
  expect(range.value).toBe(before);
  expect(view.sets()).toEqual([]);
  expect(row.querySelector(".rlhf-slidertext")!.textContent).toBe("0.05 in effect");
  view.end();
});

const answer = (): KernelMessage => ({
  kind: "foreseen", name: "kl_coef", step: 30, now: 0, reward: 0.4, kl: 1.5, samples: 16, enough: 4,
  predictions: [{ value: 1e-4, reward: 1, kl: 30, effective: 16 }, { value: 1, reward: 0.1, kl: 0.2, effective: 16 }],
});

function whatIf(more: Partial<Slider>) {
  const view = setUp();
  view.hear(status());
  view.hear(controls({ sliders: [slider("kl_coef", { can_preview: true, ...more })] }));
  const row = view.slider("kl_coef");
  row.querySelector<HTMLButtonElement>(".rlhf-whatif")!.click();
  const asked = view.sent.filter((message) => message.kind === "preview") as { values: number[] }[];
  return { view, row, values: asked.at(-1)!.values, words: row.querySelector(".rlhf-slidertext")! };
}

test.each([
  { low: 1e-4, value: 0, first: 1e-4 },
  { low: 0, value: 0, first: 1.33e-6 },
  { low: 1e-4, value: 1, first: 1e-4 },
])("what is asked about is above 0 and reaches both ends, from $value with low $low", ({ low, value, first }) => {
  const { view, values } = whatIf({ low, value });
  expect(values.every((one) => Number.isFinite(one) && one > 0)).toBe(true);
  expect([values[0], values.at(-1)]).toEqual([first, 1]);
  expect(values.length).toBeLessThanOrEqual(100);
  view.end();
});

test("of a value that was not asked about, nothing is foreseen", () => {
  const { view, row, words } = whatIf({ value: 0 });
  view.hear(answer());
  expect(words.textContent).toBe("0 is outside 1e-4 to 1: nothing is foreseen there");
  row.querySelector("input[type=range]")!.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, cancelable: true }));
  expect(words.textContent).toBe("would settle at reward 1.00, KL 30.0 nats (now 0.40, 1.5)");
  view.hear(controls({ sliders: [slider("kl_coef", { can_preview: true, value: 7 })] }));
  row.querySelector<HTMLButtonElement>(".rlhf-whatif")!.click();
  row.querySelector<HTMLButtonElement>(".rlhf-whatif")!.click();
  view.hear(answer());
  expect(words.textContent).toBe("7 is outside 1e-4 to 1: nothing is foreseen there");
  view.end();
});

test("a refused preview says why in its place, and asking again asks again", () => {
  const { view, row, words } = whatIf({});
  view.hear({ kind: "said", level: "error", text: "refused: something else", cell: "", unforeseen: "" });
  expect(words.textContent).toBe("asking the policy…");
  view.hear({ kind: "said", level: "error", text: "refused: reference=none: nothing to preview", cell: "", unforeseen: "kl_coef" });
  expect(words.textContent).toBe("refused: reference=none: nothing to preview");
  expect(words.classList.contains("rlhf-is-error")).toBe(true);
  const button = row.querySelector<HTMLButtonElement>(".rlhf-whatif")!;
  button.click();
  expect([words.textContent, words.classList.contains("rlhf-is-error")]).toEqual(["0.05 in effect", false]);
  button.click();
  expect(words.textContent).toBe("asking the policy…");
  view.hear(answer());
  expect(words.textContent).toMatch(/^would settle/);
  view.end();
});
