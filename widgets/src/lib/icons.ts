// Small shapes drawn here: fonts that hold ⏸ or ⧉ are not on every machine.

const SHAPES = {
  pause: "M1 0h3v11h-3zM7 0h3v11h-3z",
  play: "M1 0l10 5.5l-10 5.5z",
  stop: "M0.5 0.5h10v10h-10z",
  diamond: "M5.5 0l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
  copy: "M0 3h1.4v6.6h6.6v1.4h-8zM3 0h8v8h-8zM4.4 1.4v5.2h5.2v-5.2z",
} as const;

export type IconName = keyof typeof SHAPES;

export function icon(name: IconName): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 11 11");
  svg.setAttribute("class", "rlhf-icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[name]);
  path.setAttribute("fill-rule", "evenodd");
  svg.append(path);
  return svg;
}
