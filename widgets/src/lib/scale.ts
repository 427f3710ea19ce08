// A slider's position and its value.

export interface Scale {
  /** 0 … 1 for a value. */
  position(value: number): number;
  value(position: number): number;
  /** The value one arrow key away: ~12 % where the scale is logarithmic, else a hundredth of the range. */
  nudge(value: number, steps: number): number;
}

/** Three significant digits: what a person would type. */
export function tidy(value: number): number {
  return value === 0 ? 0 : Number(value.toPrecision(3));
}

export function makeScale(low: number, high: number, kind: "linear" | "log"): Scale {
  const clamp = (value: number): number => Math.min(high, Math.max(low, value));
  if (kind === "linear") {
    return {
      position: (value) => (clamp(value) - low) / (high - low),
      value: (position) => tidy(clamp(low + position * (high - low))),
      nudge: (value, steps) => tidy(clamp(value + (steps * (high - low)) / 100)),
    };
  }
  // A logarithmic coefficient that may be switched off: its leftmost position is exactly `low`, six decades below `high` follow.
  const floor = low > 0 ? low : high * 1e-6;
  const decades = Math.log10(high / floor);
  return {
    position: (value) => (value <= floor ? 0 : Math.log10(clamp(value) / floor) / decades),
    value: (position) => (position <= 0 ? low : tidy(clamp(floor * 10 ** (position * decades)))),
    nudge: (value, steps) => {
      if (value < floor) return steps > 0 ? tidy(floor) : low;
      const next = value * 10 ** (0.05 * steps);
      return next < floor ? low : tidy(clamp(next));
    },
  };
}
