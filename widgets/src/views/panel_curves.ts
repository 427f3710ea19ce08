// Small multiples over optimizer steps: one x-range, one crosshair, one zoom.
import { onTheme, theme } from "../lib/bokeh";
import { decimate, span, steady } from "../lib/decimate";
import { beforePaint, h, setText } from "../lib/dom";
import { number } from "../lib/format";
import type { Figure } from "../lib/protocol";
import type { RunStore } from "../lib/run_store";
import type { Series } from "../lib/rows";
import { Chart, redrawer } from "./chart";
import type { Tab } from "./panel";

const POINTS = 600;
/** Room to the right of the newest step, as a share of it: with none, every step would move every axis. */
const ROOM = 0.12;

const NONE: never[] = [];

interface Cell {
  figure: Figure;
  element: HTMLElement;
  value: HTMLElement;
  host: HTMLElement;
  line: HTMLElement;
  chart: Chart | null;
  range: [number, number] | null;
  changes: unknown;
  visible: boolean;
  stale: boolean;
}

/** What a person or a schedule sets has no noise: smoothing it would show values that never were. */
export const SET = /^(objective\/.*|optimizer\/learning_rate|data\/epoch)$/;

export function createCurves(store: RunStore): Tab {
  const grid = h("div.rlhf-grid");
  const note = h("p.rlhf-quiet", {}, "Waiting for the first numbers.");
  const reset = h("button.rlhf-link.rlhf-zoomed", { type: "button", hidden: true, title: "Double-click on a curve does the same", onclick: () => follow() }, "show all steps");
  const element = h("div.rlhf-curves", {}, note, reset, grid);
  const cells = new Map<string, Cell>();
  let shown = false;
  let disposed = false;
  let zoom: [number, number] | null = null;
  let settingRanges = false;
  /** Right end of the shared x-range. */
  let end = 0;
  let crosshair: number | null = null;

  const observer =
    typeof IntersectionObserver === "undefined"
      ? null
      : new IntersectionObserver((entries) => {
          for (const entry of entries) {
            const cell = [...cells.values()].find((each) => each.element === entry.target);
            if (cell) cell.visible = entry.isIntersecting;
          }
          redraw.ask();
        });

  const redraw = redrawer(draw, beforePaint, () => Math.max(33, 5 * cells.size));

  // One at a time: a slow page hears of figures again before the first of them stands, and would draw each twice.
  let adding: Promise<void> = Promise.resolve();
  function addFigures(): Promise<void> {
    adding = adding.then(addMissing, addMissing);
    return adding;
  }

  async function addMissing(): Promise<void> {
    if (!shown) return;
    const wanted = store.figures.filter((figure) => figure.metric);
    note.hidden = wanted.length > 0;
    if (wanted.every((figure) => cells.get(figure.id)?.chart)) return;
    const bokeh = await store.bokeh();
    if (disposed) return;
    for (const figure of wanted) {
      if (cells.has(figure.id)) continue;
      const value = h("span.rlhf-value");
      const host = h("div.rlhf-chart");
      const line = h("div.rlhf-crosshair", { hidden: true });
      const cell: Cell = {
        figure, value, host, line, chart: null, range: null, changes: null, visible: observer === null, stale: true,
        element: h("figure.rlhf-curve", { "data-metric": figure.metric },
          h("figcaption", { title: figure.glossary }, h("span.rlhf-metric", {}, figure.label), value),
          h("div.rlhf-chartbox", {}, host, line)),
      };
      cells.set(figure.id, cell);
      observer?.observe(cell.element);
    }
    // The kernel sends figures in reading order; a metric found late takes its place among the others.
    grid.append(...wanted.map((figure) => (cells.get(figure.id) as Cell).element));
    for (const cell of cells.values()) {
      if (cell.chart) continue;
      cell.chart = await Chart.embed(bokeh, cell.figure, cell.host);
      if (disposed) return cell.chart.dispose();
      dress(cell.chart);
      // Bokeh tells of a drag by changing the range; every other chart then follows.
      cell.chart.plot.x_range.change.connect(() => {
        const range = cell.chart?.plot.x_range;
        if (settingRanges || !range) return;
        zoom = [range.start, range.end];
        redraw.ask();
      });
      redraw.ask();
    }
  }

  function follow(): void {
    zoom = null;
    redraw.ask();
  }

  function dress(chart: Chart): void {
    const colours = theme(grid);
    chart.paint(colours);
    chart.renderer("raw")?.glyph.setv({ line_color: colours.accent });
    chart.renderer("smooth")?.glyph.setv({ line_color: colours.accent });
    chart.renderer("last")?.glyph.setv({ fill_color: colours.accent, line_color: colours.accent });
    chart.renderer("changes")?.glyph.setv({ line_color: colours.warn });
  }

  function draw(): void {
    if (!shown || disposed) return;
    reset.hidden = zoom === null;
    const last = store.rows.lastStep;
    if (last > end || last < 0.5 * end) end = Math.max(10, Math.ceil(last * (1 + ROOM)));
    const [from, to] = zoom ?? [0, end];
    settingRanges = true;
    for (const cell of cells.values()) {
      const series = store.rows.series.get(cell.figure.metric);
      const exact = SET.test(cell.figure.metric);
      if (cell.chart && cell.visible) drawOne(cell, cell.chart, series, from, to, exact);
    }
    settingRanges = false;
    drawValues();
  }

  function drawOne(cell: Cell, chart: Chart, series: Series | undefined, from: number, to: number, exact: boolean): void {
    const steps = series?.x.view() ?? new Float64Array();
    const raw = decimate(steps, series?.y.view() ?? new Float64Array(), from, to, POINTS);
    const calm = exact ? series?.y : series?.smooth;
    const smooth = decimate(steps, calm?.view() ?? new Float64Array(), from, to, POINTS);
    chart.set("raw", raw as never);
    chart.set("smooth", series && series.length > 3 ? (smooth as never) : { x: [], y: [] });
    chart.set("last", series?.length && zoom === null ? { x: [series.x.at(series.length - 1)], y: [(series.length > 3 && calm ? calm : series.y).at(series.length - 1)] } : { x: [], y: [] });
    const changes = store.controls?.changes ?? NONE;
    if (cell.changes !== changes) {
      cell.changes = changes;
      chart.set("changes", {
        x: changes.map((change) => change.step),
        y: changes.map(() => 0),
        name: changes.map((change) => change.name),
        move: changes.map((change) => `${number(change.old)} → ${number(change.new)}`),
        who: changes.map((change) => change.who || "–"),
        why: changes.map((change) => change.why || "–"),
      });
    }
    chart.range("x", from, to);
    const y = span(raw.y);
    if (y) cell.range = steady(zoom ? null : cell.range, y);
    if (cell.range) chart.range("y", ...cell.range);
  }

  function drawValues(): void {
    for (const cell of cells.values()) {
      const series = store.rows.series.get(cell.figure.metric);
      const index = !series ? -1 : crosshair === null ? series.length - 1 : series.indexAt(crosshair);
      const unit = cell.figure.unit ? ` ${cell.figure.unit}` : "";
      setText(cell.value, series && index >= 0 ? `${number(series.y.at(index))}${unit}${crosshair === null ? "" : ` at step ${series.x.at(index)}`}` : "");
      const place = crosshair === null ? null : (cell.chart?.place(crosshair) ?? null);
      cell.line.hidden = place === null;
      if (place) {
        cell.line.style.transform = `translateX(${place.left}px)`;
        cell.line.style.top = `${place.top}px`;
        cell.line.style.height = `${place.height}px`;
      }
    }
  }

  grid.addEventListener("mousemove", (event) => {
    const box = (event.target as Element).closest(".rlhf-curve");
    const cell = [...cells.values()].find((each) => each.element === box);
    const x = cell?.chart?.xAt(event.clientX) ?? null;
    crosshair = x === null ? null : Math.round(x);
    drawValues();
  });
  grid.addEventListener("mouseleave", () => {
    crosshair = null;
    drawValues();
  });
  grid.addEventListener("dblclick", follow);

  const off = [
    store.on("figures", () => void addFigures()),
    store.on("rows", () => redraw.ask()),
    store.on("controls", () => redraw.ask()),
    onTheme(() => {
      for (const cell of cells.values()) if (cell.chart) dress(cell.chart);
    }),
  ];
  return {
    element,
    setShown(now) {
      shown = now;
      if (!now) return redraw.stop();
      void addFigures();
      redraw.ask();
    },
    dispose() {
      disposed = true;
      redraw.stop();
      observer?.disconnect();
      for (const end of off) end();
      for (const cell of cells.values()) cell.chart?.dispose();
    },
  };
}
