"""From a metric event in a worker to pixels in a browser: latency at 10 events/s, backlog at 1,000 events/s.

A real JupyterLab and a real headless Chromium; in the notebook `%rlhf attach local` and `%rlhf ticker …`, a method (a
plugin, found here in plugin/) that trains nothing and writes metric events of nine numbers at a given rate. The way is
the product's: worker → events.jsonl → agent's kernel → client in the notebook's kernel → panel → comm → websocket → page →
Bokeh → canvas.

Measured in the page, in every animation frame: the rows the panel has taken (`data-rows`); the step that the captions
show (the ticker's loss *is* its step, and the panel writes captions and curves in one go); and whether the canvas of the
entropy curve, which is noise, has other pixels than in the frame before (all of them are read back and hashed).
*Pixel* for step S is the first frame that finds changed pixels with a caption of S or later. Where pixels and caption
are found changed in the same frame, the change may still be that of the step before; such steps are counted, and the
*late* reading beside takes the next change for them, an upper bound. Latency is that frame's `Date.now()` minus the
event's `t`, which the worker stamped: the same clock, one machine. The screen shows a canvas at the end of the frame that
drew it; a change is found in the next frame at the latest, so the figures are one frame (16 ms) too high rather than too
low.

The lag at 1,000 events/s is that of the newest drawn step, sampled at every frame in which new pixels were found. No
growing backlog: its slope over the run, in seconds of lag a second, is below 0.01 and the median of the last third is not
0.1 s above that of the first. Must: p95 at most 150 ms at 10 events/s, no growing backlog at 1,000 events/s.
"""

from __future__ import annotations

import bisect
import json
import os
import time
from pathlib import Path
from typing import Any

from common import HERE, calm, parser, report, say, scratch, slope, summary

CELLS = (
    "%load_ext rlhf_nb\n%rlhf workspace {workspace}\n%rlhf attach local --no-standby",
    "run = %rlhf ticker --base toy --data toy-demonstrations --set rate={rate} max_steps={steps}",
)

OBSERVE = """() => {
  const panel = document.querySelector('.rlhf-panel');
  const caption = document.querySelector('.rlhf-curve[data-metric="loss"] .rlhf-value');
  const figure = document.querySelector('.rlhf-curve[data-metric="policy/entropy"]');
  const canvases = [];
  const dig = (root) => {
    for (const element of root.querySelectorAll('*')) {
      if (element.tagName === 'CANVAS') canvases.push(element);
      if (element.shadowRoot) dig(element.shadowRoot);
    }
  };
  dig(figure);
  const canvas = canvases.sort((a, b) => b.width * b.height - a.width * a.height)[0];
  const copy = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const hash = () => {
    copy.canvas.width = canvas.width; copy.canvas.height = canvas.height;
    copy.drawImage(canvas, 0, 0);
    const data = new Uint32Array(copy.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    let h = 2166136261;
    for (let i = 0; i < data.length; i++) h = Math.imul(h ^ data[i], 16777619);
    return h;
  };
  const seen = { rows: [], caption: [], pixels: [], frames: 0, cost: 0, canvases: canvases.length, size: [canvas.width, canvas.height] };
  window.__seen = seen;
  let rows = -1, named = -1, pixels = null;
  const look = () => {
    const now = Date.now(), began = performance.now();
    const r = Number(panel.dataset.rows), s = parseInt(caption.textContent, 10) || -1;
    if (r !== rows) seen.rows.push([now, rows = r]);
    const both = s !== named;
    if (both) seen.caption.push([now, named = s]);
    const h = hash();
    if (h !== pixels) { pixels = h; seen.pixels.push([now, named, both]); }
    seen.frames++; seen.cost += performance.now() - began;
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
  return seen.size;
}"""


def watch(folder: Path, rate: float, seconds: float, browser: Any, lab_module: Any, running: Any) -> dict[str, Any]:
    """One run at a rate, in a notebook of its own; what the page saw and the events with their times."""
    name, steps = f"rate-{rate:g}", int(rate * (seconds + 20)) + 1000
    workspace = folder / name
    cells = [cell.format(workspace=workspace, rate=rate, steps=steps) for cell in CELLS]
    view, seen = lab_module.page(browser)
    lab_module.open_notebook(view, running.url(running.notebook(f"{name}.ipynb", *cells)))
    lab_module.run_all(view)
    view.wait_for_selector('.rlhf-curve[data-metric="policy/entropy"] canvas', timeout=180_000)
    view.wait_for_timeout(500)
    size = view.evaluate(OBSERVE)
    place = next((workspace / "runs").glob("*/events.jsonl")).parent
    (place / "go").touch()
    went = time.time()
    say(f"  {rate:g} events/s: watching a canvas of {size[0]} × {size[1]} pixels for {seconds:g} s")
    view.wait_for_timeout(1000 * seconds)
    found = view.evaluate("() => window.__seen")
    if path := os.environ.get("RLHF_NB_SCREENSHOTS"):
        view.screenshot(path=str(Path(path) / f"pixels-{rate:g}.png"))
    if any("pageerror" in line for line in seen.console):
        raise RuntimeError(f"the page had an error: {seen.console}")
    lines = [
        json.loads(line)
        for line in (place / "events.jsonl").read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    view.context.close()
    return found | {"went": went, "t": {one["step"]: one["t"] for one in lines if one["kind"] == "metric"}}


def latencies(seen: dict[str, Any], settle_s: float) -> dict[str, list[float]]:
    """Seconds from an event to the page's rows, caption and pixels, for every step after `settle_s`."""
    t = seen["t"]
    first = seen["went"] + settle_s
    last = seen["pixels"][-1][1]
    steps = [step for step, at in t.items() if at > first and step <= last]
    # By order of log the n-th row is step n: this run writes one metric event a step.
    later = [entry for entry in seen["pixels"] if not entry[2]]
    found: dict[str, list[float]] = {"rows": [], "caption": [], "pixels": [], "late": []}
    for what in found:
        entries = later if what == "late" else seen[what]
        reached = [entry[1] for entry in entries]
        for step in steps:
            place = bisect.bisect_left(reached, step)
            if place < len(entries):
                found[what].append(entries[place][0] / 1000 - t[step])
    return found


def lag(seen: dict[str, Any], settle_s: float) -> dict[str, Any]:
    """Age of the newest drawn step over time, at the frames that drew something."""
    t, points = seen["t"], []
    first = seen["went"]
    for now, step, _ in seen["pixels"]:
        if now / 1000 > first + settle_s and step in t:
            points.append((now / 1000 - first, now / 1000 - t[step]))
    if len(points) < 6:
        raise RuntimeError(
            f"{len(points)} drawings after {settle_s} s in {seen['frames']} frames: the browser got no time, run it again "
            f"on a quieter machine; last: {seen['pixels'][-1:]}, rows {seen['rows'][-1:]}"
        )
    times, lags = [p[0] for p in points], [p[1] for p in points]
    third = len(points) // 3
    span = sorted(at for at in t.values() if at > first + 1)
    return {
        "lag": summary(lags),
        "slope": slope(times, lags),
        "first_third": summary(lags[:third]),
        "last_third": summary(lags[-third:]),
        "draws_per_s": len(points) / (times[-1] - times[0]),
        "events_per_s": (len(span) - 1) / (span[-1] - span[0]),
        "steps_drawn": seen["pixels"][-1][1],
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    slow, fast = (8, 8) if args.quick else (40, 40)
    rounds = args.repeats or (1 if args.quick else 2)
    import lab as lab_module

    slow_rounds, fast_rounds, frames = [], [], []
    with scratch() as folder:
        path = [str(HERE / "plugin"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        for _ in range(rounds):
            # A server and a browser of its own for every round: a notebook left open would go on working beside.
            place = folder / f"lab-{len(slow_rounds)}"
            place.mkdir()
            calm(args.calm)
            with lab_module.lab(place) as running, lab_module.chromium() as browser:
                found = watch(folder / f"w{len(slow_rounds)}", 10, slow, browser, lab_module, running)
                slow_rounds.append(latencies(found, 2))
                frames.append(
                    {
                        "frames_per_s": round(found["frames"] / slow, 1),
                        "look_ms": round(found["cost"] / found["frames"], 2),
                        "changes": len(found["pixels"]),
                        "with_caption": sum(entry[2] for entry in found["pixels"]),
                    }
                )
            place = folder / f"lab-{len(fast_rounds)}-fast"
            place.mkdir()
            calm(args.calm)
            with lab_module.lab(place) as running, lab_module.chromium() as browser:
                found = watch(folder / f"w{len(fast_rounds)}", 1000, fast, browser, lab_module, running)
                fast_rounds.append(lag(found, 3))
    together = {what: [one for round_ in slow_rounds for one in round_[what]] for what in slow_rounds[0]}
    ten = {what: summary(values) for what, values in together.items()}
    lines = [f"10 events/s, {rounds} rounds of {slow} s, {ten['pixels']['n']} events; frame loop: {frames}"]
    for what, name in (
        ("rows", "rows in the page"), ("caption", "caption"), ("pixels", "pixels"), ("late", "pixels, at most"),
    ):  # fmt: skip
        each = ", ".join(f"{summary(one[what])['p95'] * 1e3:.0f}" for one in slow_rounds)
        lines.append(
            f"  event → {name:17s} p50 {ten[what]['median'] * 1e3:6.1f} ms  p95 {ten[what]['p95'] * 1e3:6.1f} ms  "
            f"[{ten[what]['q1'] * 1e3:.1f}, {ten[what]['q3'] * 1e3:.1f}]  max {ten[what]['max'] * 1e3:.0f}  "
            f"p95 of the rounds: {each}"
        )
    for one in fast_rounds:
        lines.append(
            f"1,000 events/s asked, {one['events_per_s']:.0f} written: lag of what is drawn "
            f"{one['lag']['median'] * 1e3:.0f} ms [{one['lag']['q1'] * 1e3:.0f}, {one['lag']['q3'] * 1e3:.0f}] "
            f"p95 {one['lag']['p95'] * 1e3:.0f}; first third {one['first_third']['median'] * 1e3:.0f}, last third "
            f"{one['last_third']['median'] * 1e3:.0f} ms; slope {one['slope'] * 1e3:+.2f} ms/s; "
            f"{one['draws_per_s']:.1f} draws/s up to step {one['steps_drawn']}"
        )
    growing = [
        one["slope"] > 0.01 or one["last_third"]["median"] > one["first_third"]["median"] + 0.1 for one in fast_rounds
    ]
    met = {
        "10 events/s: metric → pixel p95 at most 150 ms": ten["pixels"]["p95"] <= 0.15,
        "1,000 events/s: no growing backlog": not any(growing),
    }
    report("pixels", args, lines, met, at_10=ten, at_1000=fast_rounds, frames=frames)


if __name__ == "__main__":
    main()
