"""Magic executed → first metric, against a plain TRL script from the start of its process to its first logged loss.

Each repeat is a fresh notebook process: an InteractiveShell with `%load_ext rlhf_nb` and `%rlhf attach local`, the standby
ready (that wait is not in the figure, it is printed beside), then `%rlhf sft …` and `%rlhf dpo …` on the toy model. The
clock starts when the cell is handed to the shell and ends when the first metric event has arrived in that process; so
it holds the magic, the panel's Python half, submission, tokenizing, loading, the first step and the way back. The
*cold* figure is the same with `--no-standby`. The peer trains with the same settings on the same rows with the same
number of threads. All arms run in turns. Must: 0.35 of the peer at most, with a standby.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from common import Watch, child, interleave, parser, plain_trl, ratios, report, say, scratch, shell, summary, text

SETTINGS = {"max_steps": 40, "batch_size": 8, "max_length": 256, "learning_rate": 1e-4}
DATA = {"sft": "toy-demonstrations", "dpo": "toy-pairs"}
MODEL = {"sft": "--base toy", "dpo": "--policy toy"}


def notebook(methods: list[str], standby: bool, threads: int) -> dict[str, Any]:
    """In this process: attach, then each method by its magic."""
    from rlhf_nb import workspace

    figures: dict[str, Any] = {}
    with scratch(threads), shell() as run_cell:
        run_cell("%load_ext rlhf_nb")
        run_cell("%rlhf workspace w")
        run_cell("%rlhf attach local" + ("" if standby else " --no-standby"))
        for method in methods:
            if standby:
                info = workspace.current().client.wait_standby(180)
                if info.standby != "ready":
                    raise RuntimeError(f"the standby is {info.standby}: {info.standby_reason}")
                figures[f"{method}/standby_s"] = info.standby_seconds
            time.sleep(0.5)
            knobs = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
            began = time.time()
            run = run_cell(f"run = %rlhf {method} {MODEL[method]} --data {DATA[method]} --set {knobs}\nrun")
            returned = time.time()
            watch = Watch(run)
            arrived, event = watch.first("metric")
            if watch.of("started")[0].warm != standby:
                raise RuntimeError(f"warm is {not standby}, {standby} was to be measured")
            watch.close()
            figures[method] = {"arrived": arrived - began, "written": event.t - began, "cell": returned - began}
            run.wait(300)
    return figures


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS on both sides (default 1)")
    made.add_argument("--notebook", nargs="+", metavar="METHOD", help="be one notebook process (used by this script)")
    made.add_argument("--no-standby", action="store_true", help="with --notebook: cold")
    args = made.parse_args()
    if args.notebook:
        print(json.dumps(notebook(args.notebook, not args.no_standby, args.threads)))
        return
    methods = ["sft"] if args.quick else ["sft", "dpo"]
    repeats = args.repeats or (1 if args.quick else 5)
    cold_repeats = 0 if args.quick else min(3, repeats)
    turns = {"warm": 0, "cold": 0}

    def ours(kind: str) -> dict[str, Any] | None:
        if kind == "cold" and turns["cold"] == cold_repeats:
            return None
        # Each method is the first of its notebook every other time: the first magic also loads the panel's modules.
        turns[kind] += 1
        order = methods if turns[kind] % 2 else methods[::-1]
        flags = ["--no-standby"] if kind == "cold" else []
        return child("first_metric.py", "--threads", str(args.threads), *flags, "--notebook", *order)

    with scratch(args.threads) as folder:

        def plain() -> dict[str, float]:
            found = {}
            for method in methods:
                done = plain_trl(folder, method, **SETTINGS)
                found[method] = done["first_log"] - done["started"]
            return found

        plain_trl(folder, "sft", **SETTINGS | {"max_steps": 1})
        say("  files are in the page cache")
        arms = {"warm": lambda: ours("warm"), "plain": plain, "cold": lambda: ours("cold")}
        found = interleave(repeats, arms, args.calm)
    figures: dict[str, Any] = {}
    lines, met = [f"{repeats} rounds, {args.threads} thread(s), settings {SETTINGS}"], {}
    for method in methods:
        theirs = [one[method] for one in found["plain"]]
        warm = [one[method]["arrived"] for one in found["warm"]]
        cold = [one[method]["arrived"] for one in found["cold"] if one is not None]
        written = [one[method]["written"] for one in found["warm"]]
        standby = [one[f"{method}/standby_s"] for one in found["warm"]]
        ratio = ratios(warm, theirs)
        figures[method] = {
            "warm": summary(warm), "warm_written": summary(written), "plain": summary(theirs), "ratio": ratio,
            "standby": summary(standby),
        }  # fmt: skip
        cell = statistics.median(one[method]["cell"] for one in found["warm"])
        lines += [
            f"{method}: plain TRL, process start → first loss   {text(summary(theirs))}",
            f"{method}: standby, magic → first metric           {text(summary(warm))} (cell returns after {cell:.2f} s)",
            f"{method}: ratio with standby {text(ratio, '')}",
            f"{method}: the standby took {text(summary(standby))} to get ready, before",
        ]
        if cold:
            # The cold runs are the first rounds': they are compared with the peer's of the same rounds.
            cold_ratio = ratios(cold, theirs[: len(cold)])
            figures[method] |= {"cold": summary(cold), "ratio_cold": cold_ratio}
            lines.append(
                f"{method}: cold, magic → first metric              {text(summary(cold))} · ratio {text(cold_ratio, '')}"
            )
        met[f"{method}: ratio with standby at most 0.35"] = ratio["median"] <= 0.35
    report("first_metric", args, lines, met, settings=SETTINGS, threads=args.threads, **figures)


if __name__ == "__main__":
    main()
