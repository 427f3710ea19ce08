import { afterEach, expect, test, vi } from "vitest";
import type { LabelFailed, LabelQueue, LabelSaved } from "../src/lib/protocol";
import { createLabeller } from "../src/views/labeller";

type Answer = LabelQueue | LabelSaved | LabelFailed;
const queue = (done: number, text = "plain"): LabelQueue => ({
  kind: "label_queue", title: "hh", annotator: "mira", done, total: 3, seconds_per_label: null, can_undo: done > 0, summary: "",
  task: { task_id: 10 + done, prompt: "why?", a: text, b: "other" },
});

function setUp() {
  const sent: any[] = [];
  let hear: (answer: Answer) => void = () => undefined;
  let gone = false;
  let health: () => void = () => undefined;
  const el = document.createElement("div");
  document.body.append(el);
  const end = createLabeller(el, {
    send: (message) => sent.push(message),
    onAnswer: (heard) => ((hear = heard), () => undefined),
    gone: () => gone,
    onHealth: (changed) => ((health = changed), () => undefined),
  });
  const root = el.querySelector<HTMLElement>(".rlhf-labeller")!;
  root.focus();
  return {
    sent, root, end,
    hear: (answer: Answer) => hear(answer),
    press: (key: string) => root.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true })),
    lose: () => ((gone = true), health()),
    submitted: () => sent.filter((message) => message.kind === "label_submitted"),
  };
}

afterEach(() => {
  document.body.replaceChildren();
  vi.useRealTimers();
});

test("a key is one answer, and the view advances only when it is saved", () => {
  const view = setUp();
  view.hear(queue(0));
  view.press("1");
  view.press("2");
  expect(view.submitted()).toHaveLength(1);
  expect(view.submitted()[0]).toMatchObject({ task_id: 10, choice: "a" });
  expect(view.root.textContent).toContain("saving");
  view.hear({ kind: "label_saved", client_id: view.submitted()[0].client_id, queue: queue(1) });
  expect(view.root.textContent).toContain("saved ✓");
  expect(view.root.textContent).toContain("pair 2 of 3");
});

test("an answer that was not acknowledged is sent again under the same id", () => {
  vi.useFakeTimers();
  const view = setUp();
  view.hear(queue(0));
  view.press("t");
  vi.advanceTimersByTime(4100);
  const [first, second] = view.submitted();
  expect(second).toEqual(first);
});

test("a refusal keeps the pair and offers the same answer again", () => {
  const view = setUp();
  view.hear(queue(0));
  view.press("2");
  const asked = view.submitted()[0];
  view.hear({ kind: "label_failed", client_id: asked.client_id, text: "the database is locked" });
  expect(view.root.textContent).toContain("the database is locked");
  expect(view.root.textContent).toContain("pair 1 of 3");
  [...view.root.querySelectorAll("button")].find((button) => button.textContent === "try again")!.click();
  expect(view.submitted()[1]).toEqual(asked);
});

test("what a model wrote stays text", () => {
  const view = setUp();
  view.hear(queue(0, "<img src=x onerror=alert(1)>"));
  expect(view.root.querySelector("img")).toBeNull();
  expect(view.root.textContent).toContain("<img src=x");
});

test("keys keep working after a redraw, and none leaves the view", () => {
  const view = setUp();
  const outside = vi.fn();
  document.addEventListener("keydown", outside);
  view.hear(queue(0));
  view.press("s");
  view.hear({ kind: "label_saved", client_id: view.submitted()[0].client_id, queue: queue(1) });
  expect(view.root.contains(document.activeElement)).toBe(true);
  view.press("u");
  expect(view.sent.at(-1).kind).toBe("label_undone");
  expect(outside).not.toHaveBeenCalled();
});

test("with its kernel gone the view says so and sends nothing", () => {
  const view = setUp();
  view.hear(queue(0));
  view.lose();
  view.press("1");
  expect(view.submitted()).toHaveLength(0);
  expect(view.root.textContent).toContain("kernel is gone");
});
