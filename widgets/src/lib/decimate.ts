// Fewer points with the same picture.

export interface Points {
  x: number[];
  y: number[];
}

/** Points within [from, to]; where there are more than `most`, the lowest and the highest of each bucket, in order. */
export function decimate(x: Float64Array, y: Float64Array, from: number, to: number, most: number): Points {
  let start = 0;
  let end = x.length;
  // One point beyond each edge keeps the line running out of the picture.
  while (start + 1 < end && (x[start + 1] as number) < from) start++;
  while (end - 1 > start && (x[end - 2] as number) > to) end--;
  const count = end - start;
  if (count <= most) return { x: Array.from(x.subarray(start, end)), y: Array.from(y.subarray(start, end)) };
  const buckets = Math.max(1, Math.floor(most / 2));
  const out: Points = { x: [], y: [] };
  const take = (index: number): void => {
    out.x.push(x[index] as number);
    out.y.push(y[index] as number);
  };
  for (let bucket = 0; bucket < buckets; bucket++) {
    const a = start + Math.floor((bucket * count) / buckets);
    const b = start + Math.floor(((bucket + 1) * count) / buckets);
    if (a === b) continue;
    let low = a;
    let high = a;
    for (let index = a + 1; index < b; index++) {
      if ((y[index] as number) < (y[low] as number)) low = index;
      if ((y[index] as number) > (y[high] as number)) high = index;
    }
    take(Math.min(low, high));
    if (low !== high) take(Math.max(low, high));
  }
  return out;
}

/** Means over at most `most` stretches of equal length: dots that stay apart. */
export function bins(x: readonly number[], y: readonly number[], step: readonly number[], most: number): Points & { step: number[] } {
  const out = { x: [] as number[], y: [] as number[], step: [] as number[] };
  const size = Math.max(1, Math.ceil(x.length / most));
  for (let start = 0; start < x.length; start += size) {
    const end = Math.min(start + size, x.length);
    let sumX = 0;
    let sumY = 0;
    for (let index = start; index < end; index++) {
      sumX += x[index] as number;
      sumY += y[index] as number;
    }
    out.x.push(sumX / (end - start));
    out.y.push(sumY / (end - start));
    out.step.push(step[end - 1] as number);
  }
  return out;
}

/** A range that moves only when it must: each move lays out a figure's axes anew, and the eye loses its place. */
export function steady(now: [number, number] | null, wanted: [number, number]): [number, number] {
  if (!now || wanted[0] < now[0] || wanted[1] > now[1]) return wanted;
  return wanted[1] - wanted[0] < 0.6 * (now[1] - now[0]) ? wanted : now;
}

/** A y-range around values with a margin; equal values get room on both sides. */
export function span(...lists: ArrayLike<number>[]): [number, number] | null {
  let low = Infinity;
  let high = -Infinity;
  for (const list of lists) {
    for (let index = 0; index < list.length; index++) {
      const value = list[index] as number;
      if (!Number.isFinite(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return null;
  const margin = high > low ? (high - low) * 0.08 : Math.abs(high) * 0.1 || 0.5;
  return [low - margin, high + margin];
}
