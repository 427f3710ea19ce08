// Prompt, the reference's completion and the policy's, side by side.
import { wordDiff, type Piece } from "../lib/diff";
import { h, setText } from "../lib/dom";
import { number, signed } from "../lib/format";
import type { SampleItem } from "../lib/protocol";
import type { RunStore } from "../lib/run_store";
import type { Tab } from "./panel";

type Order = "prompt" | "score" | "change" | "length" | "kl";
const ORDERS: readonly [Order, string][] = [
  ["prompt", "as drawn"],
  ["score", "score, lowest first"],
  ["change", "score change, worst first"],
  ["length", "length, longest first"],
  ["kl", "KL, largest first"],
];
const words = (text: string): number => text.split(/\s+/).filter(Boolean).length;

const KEYS: Record<Exclude<Order, "prompt">, (item: SampleItem) => number> = {
  score: (item) => item.score ?? Infinity,
  change: (item) => (item.score ?? Infinity) - (item.reference_score ?? 0),
  length: (item) => -(item.length ?? words(item.completion)),
  kl: (item) => -(item.kl ?? -Infinity),
};

export function createSamples(store: RunStore): Tab {
  let order: Order = "prompt";
  let shown = false;
  const pinned = new Set<string>();
  const caption = h("span.rlhf-quiet");
  const steps = h("select", { "aria-label": "step of the samples", onchange: () => store.send({ kind: "want_samples", step: Number(steps.value) }) });
  const sort = h("select", {
    "aria-label": "sort",
    onchange: () => {
      order = sort.value as Order;
      draw();
    },
  }, ...ORDERS.map(([value, text]) => h("option", { value }, text)));
  const list = h("div.rlhf-samples");
  const element = h("div.rlhf-samplestab", {}, h("div.rlhf-toolbar", {}, h("label", {}, "step ", steps), h("label", {}, "sort ", sort), caption), list);

  function draw(): void {
    if (!shown) return;
    const samples = store.samples;
    const known = [...new Set(store.controls?.sample_steps ?? [])];
    const options = known.map(String).join();
    if (steps.dataset.options !== options) {
      steps.dataset.options = options;
      steps.replaceChildren(...known.map((step) => h("option", { value: step }, String(step))));
    }
    if (!samples) {
      list.replaceChildren(h("p.rlhf-quiet", {}, "No samples yet. The run draws some every few steps; %rlhf sample asks for your own."));
      setText(caption, "");
      return;
    }
    steps.value = String(samples.step);
    const items = [...samples.items];
    if (order !== "prompt") items.sort((a, b) => KEYS[order as Exclude<Order, "prompt">](a) - KEYS[order as Exclude<Order, "prompt">](b));
    items.sort((a, b) => Number(pinned.has(b.prompt)) - Number(pinned.has(a.prompt)));
    setText(caption, `${items.length} prompts`);
    list.replaceChildren(...items.map(card));
  }

  function card(item: SampleItem): HTMLElement {
    const reference = item.reference_completion ?? null;
    const [before, after] = reference === null ? [[], [{ text: item.completion, only: false }]] : wordDiff(reference, item.completion);
    const pin = h("button.rlhf-link", {
      type: "button",
      title: "Keep this prompt on top",
      "aria-pressed": String(pinned.has(item.prompt)),
      onclick: () => {
        if (!pinned.delete(item.prompt)) pinned.add(item.prompt);
        draw();
      },
    }, pinned.has(item.prompt) ? "★ pinned" : "☆ pin");
    return h("article.rlhf-sample", {},
      h("div.rlhf-prompt", {}, h("span", {}, item.prompt), pin),
      h("div.rlhf-pair", {},
        reference !== null && side("reference", before, item.reference_score, item.reference_gold, null, null),
        side("policy", after, item.score, item.gold, item.length ?? null, item.kl ?? null,
          item.score !== null && item.score !== undefined && item.reference_score !== null && item.reference_score !== undefined ? item.score - item.reference_score : null)));
  }

  const off = [store.on("samples", draw), store.on("controls", draw)];
  return {
    element,
    setShown(now) {
      shown = now;
      draw();
    },
    dispose: () => off.forEach((end) => end()),
  };
}

function side(
  name: string, pieces: Piece[], score: number | null | undefined, gold: number | null | undefined, length: number | null, kl: number | null, change: number | null = null,
): HTMLElement {
  const facts = [
    score !== null && score !== undefined ? `score ${number(score)}` : "",
    change !== null ? `(${signed(change)})` : "",
    gold !== null && gold !== undefined ? `true ${number(gold)}` : "",
    length !== null ? `${length} tokens` : "",
    kl !== null ? `KL ${number(kl)} nats` : "",
  ].filter(Boolean);
  return h("div.rlhf-side", {},
    h("div.rlhf-sidehead", {}, h("span", {}, name), h("span.rlhf-facts", {}, facts.join("  "))),
    h("div.rlhf-text", {}, ...pieces.map((piece) => (piece.only ? h("mark", {}, piece.text) : piece.text))));
}
