// Reward against the distance from the reference: how much was bought, and how far the policy went for it.
import { onTheme, theme } from "../lib/bokeh";
import { bins, span } from "../lib/decimate";
import { beforePaint, h } from "../lib/dom";
import { number } from "../lib/format";
import type { RunStore } from "../lib/run_store";
import type { Series } from "../lib/rows";
import { Chart, redrawer } from "./chart";
import type { Tab } from "./panel";

/** More dots than this overlap; beyond it each dot is the mean of a stretch of steps. */
const DOTS = 60;

interface Path {
  x: number[];
  y: number[];
  step: number[];
}

export function createTether(store: RunStore): Tab {
  const host = h("div.rlhf-chart");
  const item = (kind: string, text: string): HTMLElement => h("span.rlhf-key", { "data-kind": kind, hidden: true }, h("i", { "aria-hidden": "true" }), text);
  const legend = {
    proxy: item("proxy", "proxy reward"),
    gold: item("gold", "true reward"),
    human: item("human", "human win rate"),
    change: item("change", "you moved something"),
  };
  const note = h("p.rlhf-quiet", {}, "Waiting for the first reward and KL.");
  const element = h("div.rlhf-tether", {}, h("div.rlhf-legend", {}, ...Object.values(legend)), note, host);
  let chart: Chart | null = null;
  let loading = false;
  let shown = false;
  let disposed = false;
  const redraw = redrawer(draw, beforePaint, () => 40);

  async function load(): Promise<void> {
    const figure = store.figures.find((each) => each.id === "tether");
    if (!figure || chart || loading || !shown) return;
    loading = true;
    const bokeh = await store.bokeh();
    if (disposed) return;
    chart = await Chart.embed(bokeh, figure, host);
    dress();
    redraw.ask();
  }

  function dress(): void {
    if (!chart) return;
    const colours = theme(element);
    chart.paint(colours);
    for (const name of ["path", "proxy"]) chart.renderer(name)?.glyph.setv({ line_color: colours.accent });
    chart.renderer("proxy")?.glyph.setv({ fill_color: colours.accent });
    for (const name of ["gold", "gold_path", "human"]) chart.renderer(name)?.glyph.setv({ line_color: colours.second });
    chart.renderer("changes")?.glyph.setv({ line_color: colours.warn, fill_color: colours.warn });
    const whisker = chart.plot.center.find((each: { name: string | null }) => each.name === "whisker");
    if (whisker) {
      whisker.line_color = colours.second;
      whisker.upper_head.line_color = whisker.lower_head.line_color = colours.second;
    }
  }

  function draw(): void {
    if (!chart || !shown || disposed) return;
    const names = chart.figure.series;
    const kl = store.rows.first(names.kl);
    const proxy = along(store.rows.first(names.proxy), kl);
    const gold = along(store.rows.first(names.gold), kl);
    note.hidden = proxy.x.length > 0 || gold.x.length > 0;
    const dots = bins(proxy.x, proxy.y, proxy.step, DOTS);
    const goldDots = bins(gold.x, gold.y, gold.step, DOTS);
    chart.set("path", { x: dots.x, y: dots.y });
    chart.set("proxy", { ...dots });
    chart.set("gold_path", { x: goldDots.x, y: goldDots.y });
    chart.set("gold", { ...goldDots });
    const human = (store.controls?.human ?? []).map((point) => ({ ...point, x: sqrtKl(kl, point.step) })).filter((point) => Number.isFinite(point.x));
    chart.set("human", {
      x: human.map((point) => point.x),
      y: human.map((point) => point.win_rate),
      low: human.map((point) => point.low),
      high: human.map((point) => point.high),
      n: human.map((point) => point.n),
      step: human.map((point) => point.step),
    });
    const axis = chart.plot.right.find((each: { name: string | null }) => each.name === "win_axis");
    if (axis && axis.visible !== human.length > 0) axis.visible = human.length > 0;
    const moved = (store.controls?.changes ?? [])
      .map((change) => ({ change, x: sqrtKl(kl, change.step), y: at(dots, change.step) }))
      .filter((each) => Number.isFinite(each.x) && each.y !== null);
    chart.set("changes", {
      x: moved.map((each) => each.x),
      y: moved.map((each) => each.y),
      step: moved.map((each) => each.change.step),
      name: moved.map((each) => each.change.name),
      move: moved.map((each) => `${number(each.change.old)} → ${number(each.change.new)}`),
      who: moved.map((each) => each.change.who || "–"),
      why: moved.map((each) => each.change.why || "–"),
    });
    const far = Math.max(0.5, ...dots.x, ...goldDots.x, ...human.map((point) => point.x));
    chart.range("x", -0.02 * far, far * 1.05);
    const y = span(dots.y, goldDots.y);
    if (y) chart.range("y", y[0], y[1]);
    legend.proxy.hidden = dots.x.length === 0;
    legend.gold.hidden = goldDots.x.length === 0;
    legend.change.hidden = moved.length === 0;
    legend.human.hidden = human.length === 0;
    const labels = human.reduce((sum, point) => sum + point.n, 0);
    if (legend.human.lastChild) legend.human.lastChild.textContent = `human win rate (n=${labels})`;
  }

  const off = [
    store.on("figures", () => void load()),
    store.on("rows", () => redraw.ask()),
    store.on("controls", () => redraw.ask()),
    onTheme(() => dress()),
  ];
  return {
    element,
    setShown(now) {
      shown = now;
      if (!now) return redraw.stop();
      void load();
      redraw.ask();
    },
    dispose() {
      disposed = true;
      redraw.stop();
      for (const end of off) end();
      chart?.dispose();
    },
  };
}

/** √KL at a step, from the newest estimate up to it. An estimate below zero counts as zero. */
function sqrtKl(kl: Series | undefined, step: number): number {
  if (!kl?.length) return NaN;
  return Math.sqrt(Math.max(0, kl.y.at(Math.max(0, kl.indexAt(step)))));
}

function along(reward: Series | undefined, kl: Series | undefined): Path {
  const path: Path = { x: [], y: [], step: [] };
  if (!reward || !kl?.length) return path;
  for (let index = 0; index < reward.length; index++) {
    const step = reward.x.at(index);
    path.x.push(sqrtKl(kl, step));
    path.y.push(reward.y.at(index));
    path.step.push(step);
  }
  return path;
}

function at(path: Path, step: number): number | null {
  if (!path.step.length) return null;
  const index = path.step.findIndex((each) => each >= step);
  return path.y[index < 0 ? path.y.length - 1 : index] ?? null;
}
