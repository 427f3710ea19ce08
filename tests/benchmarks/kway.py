"""A reward model fitted to rankings of K: all comparisons of a prompt together, against the same comparisons as pairs.

One optimizer step over the same prompts on the toy model, either as rankings (each completion scored once) or as the pairs
they contain, which is what plain TRL trains on (each completion scored K − 1 times); in turns, each in a process of its own.
At a learning rate of 0, so that both must log the same loss.
Must: the same loss to 1e-4, and tokens of a step in the ratio 1 : K − 1.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import child, interleave, parser, ratios, report, scratch, summary, text

WAYS = ("rankings", "pairs")
PROMPTS, WARM = 4, 2


def rows_of(K: int) -> list[dict[str, Any]]:
    """Rankings of K different answers."""
    from rlhf_nb.toy import demonstrations, prompts

    answers = list(dict.fromkeys(row["completion"] for row in demonstrations(400)))
    asked = [row["prompt"] for row in prompts(PROMPTS)]
    return [
        {"prompt": prompt, "completions": answers[K * i : K * (i + 1)], "ranks": list(range(K))}
        for i, prompt in enumerate(asked)
    ]


def run(asked: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds by the clock and of this process, tokens and loss of a step, at each K."""
    from rlhf_nb.compute.rundir import EventWriter, RunDir
    from rlhf_nb.data.conversions import convert
    from rlhf_nb.data.rows import content_hash, encode_rows
    from rlhf_nb.methods.reward_model import RewardModel
    from rlhf_nb.protocol.spec import BlobData, NamedModel, RunSpec
    from rlhf_nb.training import job

    job.preload()
    root, found = Path(asked["folder"]), {}
    used: list[float] = []
    write = EventWriter.write

    def written(self: EventWriter, event: Any) -> Any:
        if event.kind == "metric":
            used.append(time.process_time())
        return write(self, event)

    EventWriter.write = written  # type: ignore[method-assign]
    for K in asked["sizes"]:
        rows, _ = convert(rows_of(K), "rankings", asked["way"])
        (root / f"{content_hash(rows)}.jsonl").write_bytes(encode_rows(rows))
        method = RewardModel(max_steps=WARM + asked["steps"], batch_size=len(rows), learning_rate=0.0)
        place = RunDir(root / f"run-{os.getpid()}-{K}")
        data = BlobData(content_hash=content_hash(rows), row_kind=asked["way"], n=len(rows))
        place.create(
            RunSpec(run_id=place.run_id, workspace_id="bench", method="reward", config=method.model_dump(mode="json"),
                    policy=NamedModel(name="toy"), data=data, created=0.0)
        )  # fmt: skip
        used.clear()
        job.run(place.path, blobs=root, runs_root=root, rank=0, world_size=1, warm=False, attempt=1, resume_from=None)
        steps = [event.values for event in place.events() if event.kind == "metric"][WARM:]
        names = {"seconds": "time/step_s", "tokens": "data/tokens", "loss": "loss"}
        found[str(K)] = {key: statistics.median(step[name] for step in steps) for key, name in names.items()}
        found[str(K)]["cpu"] = statistics.median(b - a for a, b in pairwise(used[WARM - 1 :]))
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (default 1)")
    made.add_argument("--arm", help="be one way (used by this script)")
    args = made.parse_args()
    if args.arm:
        print(json.dumps(run(json.loads(args.arm))))
        return
    sizes = [2, 4] if args.quick else [2, 4, 6, 9]
    repeats = args.repeats or (1 if args.quick else 3)
    with scratch(args.threads) as folder:
        asked = {"folder": str(folder), "sizes": sizes, "steps": 4 if args.quick else 6}
        arms = {way: lambda way=way: child("kway.py", "--arm", json.dumps({**asked, "way": way})) for way in WAYS}
        found = interleave(repeats, arms, args.calm)
    lines, figures, met = [], {}, {}
    for K in sizes:
        seconds, cpu, tokens, losses = (
            {way: [one[str(K)][what] for one in found[way]] for way in WAYS}
            for what in ("seconds", "cpu", "tokens", "loss")
        )
        faster, cheaper = (ratios(each["pairs"], each["rankings"]) for each in (seconds, cpu))
        saved = tokens["pairs"][0] / tokens["rankings"][0]
        apart = abs(losses["pairs"][0] - losses["rankings"][0])
        figures[str(K)] = {
            "speed": faster, "cpu": cheaper, "tokens": saved, "loss_apart": apart,
            **{way: summary(seconds[way]) for way in WAYS},
        }  # fmt: skip
        milliseconds = ", ".join(f"{way} {text(figures[str(K)][way], 'ms', 1000, 0)}" for way in WAYS)
        lines.append(
            f"K={K}: {saved:.2f} × the tokens as pairs, {text(faster, '×', digits=2)} the time, {text(cheaper, '×', digits=2)} "
            f"the CPU time; a step {milliseconds}"
        )
        met[f"K={K}: the same loss, and K − 1 times the tokens as pairs"] = apart < 1e-4 and abs(saved - (K - 1)) < 1e-9
    report("kway", args, lines, met, sizes=figures)


if __name__ == "__main__":
    main()
