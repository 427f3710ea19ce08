// Metric rows as a view holds them: every row exactly once, whatever order and however often frames arrive.
import type { Frame } from "./protocol";

/** A growing array of doubles. */
export class Doubles {
  private buffer = new Float64Array(256);
  length = 0;

  push(value: number): void {
    if (this.length === this.buffer.length) {
      const larger = new Float64Array(this.buffer.length * 2);
      larger.set(this.buffer);
      this.buffer = larger;
    }
    this.buffer[this.length++] = value;
  }

  at(index: number): number {
    return this.buffer[index] ?? NaN;
  }

  view(): Float64Array {
    return this.buffer.subarray(0, this.length);
  }
}

/** One metric over optimizer steps; rows without it leave no hole. */
export class Series {
  readonly x = new Doubles();
  readonly y = new Doubles();
  readonly smooth = new Doubles();
  private mean = 0;
  private weight = 0;

  push(step: number, value: number): void {
    this.x.push(step);
    this.y.push(value);
    // An exponential mean without the bias towards zero at its start.
    this.mean = MEMORY * this.mean + (1 - MEMORY) * value;
    this.weight = MEMORY * this.weight + (1 - MEMORY);
    this.smooth.push(this.mean / this.weight);
  }

  get length(): number {
    return this.x.length;
  }

  get last(): number {
    return this.y.at(this.length - 1);
  }

  /** Index of the last point at or before a step; −1 where there is none. */
  indexAt(step: number): number {
    let low = 0;
    let high = this.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.x.at(middle) <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }
}

const MEMORY = 0.85;
const LEADING = new Set(["step", "rollout", "t"]);

export type Taken = "new" | "duplicate" | "gap";

export class Rows {
  generation = -1;
  have = 0;
  series = new Map<string, Series>();
  lastStep = 0;

  /** Take a frame. "gap": rows before it are missing, nothing was taken, ask again from `have`. */
  take(frame: Frame, data: Float64Array): Taken {
    if (frame.generation < this.generation) return "duplicate";
    if (frame.generation > this.generation) {
      // A restart superseded rows: what was drawn after its checkpoint no longer counts.
      this.clear(frame.generation);
    }
    if (frame.first > this.have) return "gap";
    const skip = this.have - frame.first;
    if (skip >= frame.n) return "duplicate";
    const steps = data.subarray(0, frame.n);
    frame.columns.forEach((name, column) => {
      if (LEADING.has(name)) return;
      let series = this.series.get(name);
      if (!series) this.series.set(name, (series = new Series()));
      const values = data.subarray(column * frame.n, (column + 1) * frame.n);
      for (let row = skip; row < frame.n; row++) {
        const value = values[row] as number;
        if (!Number.isNaN(value)) series.push(steps[row] as number, value);
      }
    });
    for (let row = skip; row < frame.n; row++) this.lastStep = Math.max(this.lastStep, steps[row] as number);
    this.have = frame.first + frame.n;
    return "new";
  }

  clear(generation: number): void {
    this.generation = generation;
    this.have = 0;
    this.lastStep = 0;
    this.series = new Map();
  }

  /** The first of several candidates that this run has. */
  first(candidates: readonly string[] | undefined): Series | undefined {
    for (const name of candidates ?? []) {
      const series = this.series.get(name);
      if (series?.length) return series;
    }
    return undefined;
  }
}

/** The buffer of a frame as doubles, copied: a DataView need not be aligned to eight bytes. */
export function doubles(buffer: DataView | ArrayBuffer): Float64Array {
  if (buffer instanceof ArrayBuffer) return new Float64Array(buffer.slice(0));
  return new Float64Array(buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.byteLength) as ArrayBuffer);
}
