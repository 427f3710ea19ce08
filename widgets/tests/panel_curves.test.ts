import { expect, test } from "vitest";
import type { Link } from "../src/lib/link";
import type { Figure, KernelMessage } from "../src/lib/protocol";
import { RunStore } from "../src/lib/run_store";
import { createCurves, SET } from "../src/views/panel_curves";

const figure = (metric: string): Figure => ({ id: metric, metric, label: metric, glossary: "", unit: "", series: {}, item: metric }) as unknown as Figure;

test("a page that hears of figures again while the first are being drawn draws each once", async () => {
  let hear: (message: KernelMessage) => void = () => undefined;
  const link: Link = {
    send: () => undefined,
    onMessage: (receive) => ((hear = (message) => receive(message, [])), () => undefined),
    kernelState: () => "live",
    onKernelState: () => () => undefined,
  };
  // Bokeh is the boundary: drawing takes its time, as on a busy machine.
  const drawn: unknown[] = [];
  const plot = { renderers: [], left: [], right: [], above: [], below: [], center: [], x_range: { change: { connect: () => undefined }, setv: () => undefined } };
  const bokeh = {
    embed: {
      embed_item: async (item: unknown) => {
        drawn.push(item);
        await new Promise((done) => setTimeout(done, 5));
        return { roots: [{ model: plot }], clear: () => undefined };
      },
    },
  };
  const page = globalThis as unknown as Record<symbol, unknown>;
  page[Symbol.for("rlhf_nb.bokeh")] = { promise: Promise.resolve(bokeh), state: "ready", askedAt: 0 };

  const store = new RunStore(link);
  const curves = createCurves(store);
  curves.setShown(true);
  hear({ kind: "figures", figures: [figure("loss"), figure("policy/entropy")] });
  hear({ kind: "figures", figures: [figure("loss"), figure("policy/entropy"), figure("data/epoch")] });
  await expect.poll(() => drawn.length).toBeGreaterThanOrEqual(3);
  await new Promise((done) => setTimeout(done, 50));
  expect(drawn).toEqual(["loss", "policy/entropy", "data/epoch"]);
  curves.dispose();
  store.dispose();
});

test("what is set is drawn as it was, whatever a method calls its tether", () => {
  for (const metric of ["objective/kl_coef", "objective/beta", "objective/temperature", "optimizer/learning_rate"]) {
    expect(SET.test(metric)).toBe(true);
  }
  for (const metric of ["kl/policy_reference", "reward/score", "loss", "group/flat_fraction"]) expect(SET.test(metric)).toBe(false);
});
