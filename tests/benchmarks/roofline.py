"""How far a rollout of PPO is from what this machine can do at best, and how its cost grows.

The floor: operations counted in a rollout (matrices and attention) over the rate at which this machine multiplies
matrices, and for sampling, token by token, at least the bytes of weights and cache over the rate at which it reads
memory; both rates are measured in this run, before and after. Three points each for completions, tokens of a completion
and layers; the middle one is that of ppo_vs_trl.py, fp32, full parameters. Must: nothing; it says where time could still
be won.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from common import child, interleave, parser, report, scratch, summary, text
from ppo_vs_trl import run_ours, save_models

ROWS, LENGTH, LAYERS, PROMPT, VOCABULARY = 16, 48, 6, 16, 8000
POINTS = {
    "middle": {},
    "8 completions": {"rows": 8},
    "32 completions": {"rows": 32},
    "24 tokens": {"length": 24},
    "96 tokens": {"length": 96},
    "3 layers": {"layers": 3},
    "12 layers": {"layers": 12},
}
WIDTH = 320


def rates() -> dict[str, float]:
    """GFLOP/s of a matrix product in float32, GB/s of reading memory; medians of a second's worth."""
    import torch

    a, b, out = (torch.randn(1024, 1024) for _ in range(3))
    big = torch.randn(1 << 26)
    found: dict[str, list[float]] = {"gemm": [], "read": []}
    deadline = time.perf_counter() + 2.0
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        found["gemm"].append(2 * 1024**3 / (time.perf_counter() - began) / 1e9)
        began = time.perf_counter()
        big.sum()
        found["read"].append(4 * len(big) / (time.perf_counter() - began) / 1e9)
    return {name: statistics.median(values) for name, values in found.items()}


def decode_bytes(rows: int, length: int, layers: int) -> float:
    """Read while sampling: all weights and the cache so far, at every token."""
    weights = layers * (4 * WIDTH**2 + 3 * WIDTH * 864) + WIDTH * VOCABULARY
    cache = sum(2 * layers * rows * WIDTH * (PROMPT + t) for t in range(length))
    return 4.0 * (weights * length + cache)


def decode_flops(rows: int, length: int, layers: int) -> float:
    weights = layers * (4 * WIDTH**2 + 3 * WIDTH * 864) + WIDTH * VOCABULARY
    attention = sum(4 * layers * rows * WIDTH * (PROMPT + t) for t in range(length))
    prompt = 2.0 * rows * (PROMPT - 1) * (weights - WIDTH * VOCABULARY)
    return 2.0 * weights * rows * length + attention + prompt


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS (default 2)")
    made.add_argument("--arm", help="be one point, or `rates` (used by this script)")
    args = made.parse_args()
    if args.arm:
        print(json.dumps(rates() if args.arm == "rates" else run_ours(json.loads(args.arm))))
        return
    repeats = args.repeats or (1 if args.quick else 3)
    points = {"middle": {}} if args.quick else POINTS
    lines, figures = [], {}
    with scratch(args.threads) as folder:
        before = child("roofline.py", "--arm", "rates")
        arms: dict[str, Any] = {}
        counted = {}
        for name, more in points.items():
            asked = {"rows": ROWS, "length": LENGTH, "layers": LAYERS, "vocabulary": VOCABULARY, **more}
            asked["folder"] = str(folder / name.replace(" ", "-"))
            (folder / name.replace(" ", "-")).mkdir()
            save_models(folder / name.replace(" ", "-"), VOCABULARY, asked["layers"])
            counted[name] = (asked, child("roofline.py", "--arm", json.dumps({**asked, "count": True}))["gflop"])
            arms[name] = lambda asked=asked: child("roofline.py", "--arm", json.dumps(asked))
        found = interleave(repeats, arms, args.calm)
        after = child("roofline.py", "--arm", "rates")
        gemm, read = ((before[name] + after[name]) / 2 for name in ("gemm", "read"))
        lines.append(f"{gemm:.0f} GFLOP/s of matrices, {read:.1f} GB/s of memory")
        for name, (asked, gflop) in counted.items():
            shape = (asked["rows"], asked["length"], asked["layers"])
            sampling = decode_flops(*shape) / 1e9
            sampling_floor = max(sampling / gemm, decode_bytes(*shape) / 1e9 / read)
            floor = sampling_floor + (gflop - sampling) / gemm
            seconds = [one["seconds"] for one in found[name]]
            decode = [one["sampling"] for one in found[name]]
            figures[name] = {
                "seconds": summary(seconds), "floor": floor, "gflop": gflop, "sampling": summary(decode),
                "sampling_floor": sampling_floor, "of_floor": statistics.median(seconds) / floor,
            }  # fmt: skip
            lines.append(
                f"{name}: {text(summary(seconds))} a rollout of {gflop:.0f} GFLOP, {statistics.median(seconds) / floor:.2f} × "
                f"its floor of {floor:.2f} s; sampling {text(summary(decode))}, "
                f"{statistics.median(decode) / sampling_floor:.2f} × its floor of {sampling_floor:.2f} s"
            )
    report("roofline", args, lines, {}, rates={"gemm": gemm, "read": read}, points=figures)


if __name__ == "__main__":
    main()
