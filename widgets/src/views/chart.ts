// One Bokeh figure in the page: its sources by name, its ranges, its colours.
import { type Bokeh, type BokehModel, type BokehView, paint, type Theme } from "../lib/bokeh";
import type { Figure } from "../lib/protocol";

export class Chart {
  private constructor(
    readonly figure: Figure,
    readonly plot: BokehModel,
    readonly view: BokehView,
    private readonly clear: () => void,
  ) {}

  static async embed(bokeh: Bokeh, figure: Figure, host: HTMLElement): Promise<Chart> {
    const views = await bokeh.embed.embed_item(figure.item, host);
    const roots = (views as { roots?: Iterable<BokehView> }).roots ?? (views as unknown as Iterable<BokehView>);
    const view = [...roots][0] as BokehView;
    colourFromModels(view);
    return new Chart(figure, view.model, view, () => views.clear());
  }

  model(name: string): BokehModel {
    return this.plot.document.get_model_by_name(name) as BokehModel;
  }

  /** Replace a source's columns. */
  set(source: string, data: Record<string, unknown[]>): void {
    for (const renderer of this.plot.renderers) {
      if (renderer.data_source?.name === source) {
        renderer.data_source.data = data;
        return;
      }
    }
  }

  renderer(name: string): BokehModel | undefined {
    return this.plot.renderers.find((each: BokehModel) => each.name === name);
  }

  range(axis: "x" | "y", low: number, high: number): void {
    const range = this.plot[`${axis}_range`];
    if (range.start !== low || range.end !== high) range.setv({ start: low, end: high });
  }

  paint(colours: Theme): void {
    paint(this.plot, colours);
  }

  /** Data x under a pixel of the page; null outside the frame. */
  xAt(clientX: number): number | null {
    const { box, frame } = this.box();
    if (!box || !frame) return null;
    const sx = clientX - box.left;
    if (sx < frame.bbox.left || sx > frame.bbox.right) return null;
    return frame.x_scale.invert(sx) as number;
  }

  /** Pixels from the figure's left edge for a data x, with the frame's top and height; null outside the frame. */
  place(x: number): { left: number; top: number; height: number } | null {
    const { frame } = this.box();
    if (!frame) return null;
    const left = frame.x_scale.compute(x) as number;
    if (left < frame.bbox.left || left > frame.bbox.right) return null;
    return { left, top: frame.bbox.top, height: frame.bbox.height };
  }

  dispose(): void {
    this.clear();
  }

  private box(): { box: DOMRect | undefined; frame: any } {
    return { box: (this.view.el as HTMLElement | undefined)?.getBoundingClientRect(), frame: this.view.frame };
  }
}

/**
 * Bokeh 3.9 asks the page's style sheets for every colour and width at every paint, for a way of theming that is not used
 * here; measured, 60 % of a paint. This copy of it is ours alone and takes them from its models.
 */
function colourFromModels(view: BokehView): void {
  let visual = view.visuals?.outline_line as object | undefined;
  while (visual && !Object.hasOwn(visual, "_get_css_value")) visual = Object.getPrototypeOf(visual) as object | undefined;
  if (visual) (visual as { _get_css_value(): string })._get_css_value = () => "";
}

/** Calls `draw` before the next paint, and never again before `every` milliseconds have passed. */
export function redrawer(draw: () => void, later: (run: () => void) => () => void, every: () => number): { ask(): void; stop(): void } {
  let waiting: (() => void) | null = null;
  let lastAt = -Infinity;
  const run = (): void => {
    waiting = null;
    lastAt = performance.now();
    draw();
  };
  return {
    ask() {
      if (waiting) return;
      const rest = lastAt + every() - performance.now();
      if (rest <= 0) waiting = later(run);
      else {
        const timer = setTimeout(() => (waiting = later(run)), rest);
        waiting = () => clearTimeout(timer);
      }
    },
    stop() {
      waiting?.();
      waiting = null;
    },
  };
}
