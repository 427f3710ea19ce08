// Words that two texts share and words that only one has.

export interface Piece {
  text: string;
  only: boolean;
}

const MOSTLY = 0.7;

/** Each text in pieces; `only` marks words the other lacks (longest common subsequence over words). */
export function wordDiff(a: string, b: string): [Piece[], Piece[]] {
  const left = a.split(/(\s+)/);
  const right = b.split(/(\s+)/);
  // Quadratic: beyond this two long texts are shown whole.
  if (left.length * right.length > 1_000_000) return [[{ text: a, only: false }], [{ text: b, only: false }]];
  const width = right.length + 1;
  const common = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i--) {
    for (let j = right.length - 1; j >= 0; j--) {
      common[i * width + j] =
        left[i] === right[j]
          ? (common[(i + 1) * width + j + 1] as number) + 1
          : Math.max(common[(i + 1) * width + j] as number, common[i * width + j + 1] as number);
    }
  }
  const out: [Piece[], Piece[]] = [[], []];
  const add = (side: 0 | 1, text: string, only: boolean): void => {
    const last = out[side].at(-1);
    const blank = /^\s*$/.test(text);
    if (last && (last.only === only || blank)) last.text += text;
    else if (text) out[side].push({ text, only: only && !blank });
  };
  let i = 0;
  let j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) {
      add(0, left[i++] as string, false);
      add(1, right[j++] as string, false);
    } else if (j >= right.length || (i < left.length && (common[(i + 1) * width + j] as number) >= (common[i * width + j + 1] as number))) {
      add(0, left[i++] as string, true);
    } else add(1, right[j++] as string, true);
  }
  // Where next to nothing is shared, marking everything would say no more than the two texts do.
  const whole = a.length + b.length;
  const own = [...out[0], ...out[1]].reduce((sum, piece) => sum + (piece.only ? piece.text.length : 0), 0);
  return own > MOSTLY * whole ? [[{ text: a, only: false }], [{ text: b, only: false }]] : out;
}
