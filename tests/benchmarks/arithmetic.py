"""GRPO and DAPO on sums: the share that is right, from a stated start, after a stated budget.

For each seed SFT teaches the toy base model to answer the 36 sums of `toy-sums` from demonstrations of which half are wrong;
GRPO and DAPO then start from that model with the reward `numeric`, 60 steps of 64 completions, the same settings but for
what makes them what they are. Measured before and after: eight answers to each sum at temperature 1, the same chance for
every model. Must: both end above their start in every seed. The settings were found on one run of seed 0 and then fixed; none was
tuned on them.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import parser, report, say, scratch

SFT: dict[str, Any] = {"max_steps": 200, "learning_rate": 2e-3, "batch_size": 32, "max_length": 64, "sample_every": 0}
RL: dict[str, Any] = {
    "max_steps": 60, "learning_rate": 1e-3, "group_size": 8, "rollout_batch_size": 64, "batch_size": 64,
    "max_new_tokens": 12, "max_length": 64, "sample_every": 0,
}  # fmt: skip
ANSWERS = 8


def right(workspace: Any, model: Any) -> float:
    """Share of `ANSWERS` answers to each sum that are right."""
    made = workspace.generate(model, prompts="toy-sums", n=ANSWERS, reward="numeric", max_new_tokens=12, seed=0).wait()
    return statistics.fmean(score for row in made.data.rows for score in row["scores"])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS (default 2)")
    args = made.parse_args()
    import rlhf_nb as rl

    found: dict[str, list[Any]] = {"start": [], "grpo": [], "dapo": [], "replaced": [], "seconds": []}
    with scratch(args.threads), rl.Workspace(Path("w")) as workspace:
        workspace.attach("local")
        for seed in range(args.repeats or (1 if args.quick else 5)):
            began = time.monotonic()
            start = workspace.train(rl.SFT(**SFT, seed=seed), base="toy", data="toy-sums-demonstrations").wait()
            found["start"].append(right(workspace, start))
            for name, method in (("grpo", rl.GRPO), ("dapo", rl.DAPO)):
                run = workspace.train(
                    method(**RL, seed=seed), policy=start, prompts="toy-sums", reward="numeric", adapter=None
                ).wait()
                found[name].append(right(workspace, run))
                if name == "dapo":
                    found["replaced"].append(float(run.metrics()["group/replaced"].sum()))
            found["seconds"].append(time.monotonic() - began)
            say(json.dumps({name: values[-1] for name, values in found.items()}))
    lines = [
        f"{name}: {statistics.fmean(found[name]):.3f} right, seeds {', '.join(f'{x:.2f}' for x in found[name])}"
        for name in ("start", "grpo", "dapo")
    ]
    lines.append(f"dapo: {statistics.fmean(found['replaced']):.0f} groups sampled again beside 480")
    met = {
        f"{name}: above its start in every seed": all(a > b for a, b in zip(found[name], found["start"], strict=True))
        for name in ("grpo", "dapo")
    }
    report("arithmetic", args, lines, met, settings={"sft": SFT, "rl": RL, "answers": ANSWERS}, **found)


if __name__ == "__main__":
    main()
