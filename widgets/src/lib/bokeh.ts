// BokehJS from the installed wheel: asked of a kernel once per page, shared by every panel, never on the page's globals.

/* Bokeh ships no types for its bundle; these are the few members that are used. */
export interface BokehModel {
  name: string | null;
  [property: string]: any;
}
export interface BokehView {
  model: BokehModel;
  [property: string]: any;
}
export interface Bokeh {
  version: string;
  embed: { embed_item(item: unknown, target: HTMLElement): Promise<{ roots: BokehView[]; clear(): void }> };
}

interface Shared {
  promise: Promise<Bokeh>;
  resolve(bokeh: Bokeh): void;
  reject(error: Error): void;
  state: "absent" | "loading" | "ready";
  askedAt: number;
}

const KEY = Symbol.for("rlhf_nb.bokeh");

function shared(): Shared {
  const page = globalThis as unknown as Record<symbol, Shared | undefined>;
  if (!page[KEY]) {
    let resolve!: Shared["resolve"];
    let reject!: Shared["reject"];
    const promise = new Promise<Bokeh>((yes, no) => ((resolve = yes), (reject = no)));
    promise.catch(() => undefined);
    page[KEY] = { promise, resolve, reject, state: "absent", askedAt: -Infinity };
  }
  return page[KEY];
}

/** BokehJS, once some panel of this page has received it. */
export function bokeh(): Promise<Bokeh> {
  return shared().promise;
}

/** True where nobody has it yet and nobody asked within the last seconds. */
export function shouldAsk(now = performance.now()): boolean {
  const page = shared();
  if (page.state !== "absent" || now - page.askedAt < 3000) return false;
  page.askedAt = now;
  return true;
}

/** Evaluate the script that a kernel sent; later copies are ignored. */
export async function receive(script: string): Promise<void> {
  const page = shared();
  if (page.state !== "absent") return;
  page.state = "loading";
  // The bundle hangs itself on `this`, and on an AMD or CommonJS loader where it sees one: it gets a scope of its own.
  const module = `const scope = {};\n(function () { var define, require, module, exports;\n${script}\n}).call(scope);\nexport default scope.Bokeh;`;
  const url = URL.createObjectURL(new Blob([module], { type: "text/javascript" }));
  try {
    page.resolve(((await import(/* @vite-ignore */ url)) as { default: Bokeh }).default);
    page.state = "ready";
  } catch (error) {
    page.state = "absent";
    page.reject(error as Error);
    throw error;
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** Colours of the page's theme, as the canvas needs them: resolved, not as variables. */
export interface Theme {
  text: string;
  quiet: string;
  grid: string;
  accent: string;
  second: string;
  warn: string;
  font: string;
}

export function theme(element: Element): Theme {
  const style = getComputedStyle(element);
  const read = (name: string, otherwise: string): string => style.getPropertyValue(name).trim() || otherwise;
  return {
    text: read("--jp-ui-font-color1", "#222"),
    quiet: read("--jp-ui-font-color2", "#666"),
    grid: read("--jp-border-color2", "#e0e0e0"),
    accent: read("--rlhf-accent", read("--jp-brand-color1", "#1976d2")),
    second: read("--jp-ui-font-color1", "#222"),
    warn: read("--jp-warn-color1", "#d55e00"),
    font: read("--jp-ui-font-family", "sans-serif"),
  };
}

/** Call when JupyterLab changes its theme. Returns what stops it. */
export function onTheme(changed: () => void): () => void {
  const observer = new MutationObserver(() => setTimeout(changed, 50));
  observer.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
  return () => observer.disconnect();
}

/** Axes, grid and text in the theme's colours. */
export function paint(plot: BokehModel, colours: Theme): void {
  plot.background_fill_color = null;
  plot.border_fill_color = null;
  plot.outline_line_color = null;
  for (const side of ["left", "right", "above", "below"]) {
    for (const axis of plot[side] ?? []) {
      if (!("major_label_text_color" in axis)) continue;
      axis.setv({
        axis_line_color: colours.grid,
        major_tick_line_color: colours.grid,
        minor_tick_line_color: null,
        major_label_text_color: colours.quiet,
        axis_label_text_color: colours.quiet,
        major_label_text_font: colours.font,
        axis_label_text_font: colours.font,
        major_label_text_font_size: "11px",
        axis_label_text_font_size: "11px",
        axis_label_text_font_style: "normal",
        axis_label_standoff: 4,
        major_label_standoff: 3,
      });
    }
  }
  for (const grid of plot.center ?? []) if ("grid_line_color" in grid) grid.setv({ grid_line_color: colours.grid, grid_line_alpha: 0.6 });
}
