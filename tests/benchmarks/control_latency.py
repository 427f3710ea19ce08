"""From `run.set` in the notebook to a value in force, during real SFT and DPO runs of short steps.

Clock starts just before `run.set`. *acknowledged*: `t` of the control_acknowledged event, written by the worker when it
read the line (and, beside it, when that event reached the notebook's process). *in force*: `t` of coefficient_changed,
written where the value is used. The next optimizer step is the first that begins after `run.set` has returned; a
change is *late* when its `effective_step` is beyond that one. Must: acknowledged within 200 ms (p95), none late, the step
of the change logs the new value and the one before it the old.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import Any

from common import Watch, calm, parser, report, scratch, summary, text

SETS = (("sft", "learning_rate", (1e-5, 1e-3)), ("dpo", "beta", (0.02, 2.0)))


def measure(workspace: Any, method: Any, coefficient: str, between: tuple[float, float], sets: int) -> dict[str, Any]:
    data = "toy-demonstrations" if method.name == "sft" else "toy-pairs"
    run = workspace.train(method, base="toy", data=data)
    watch = Watch(run)
    watch.first("metric", step=10)
    chance, asked = random.Random(0), []
    for _ in range(sets):
        value = between[0] * (between[1] / between[0]) ** chance.random()
        began = time.time()
        pending = run.set(coefficient, value)
        returned = time.time()
        arrived, acknowledged = watch.first("control_acknowledged", id=pending.id)
        heard, changed = watch.first("coefficient_changed", id=pending.id)
        asked.append((value, began, returned, arrived, acknowledged, heard, changed))
        time.sleep(chance.uniform(0.03, 0.3))
    watch.first("metric", step=asked[-1][-1].effective_step + 1)
    run.stop()
    run.wait(120)
    watch.close()
    metrics = watch.of("metric")
    ends = {event.step: event for event in metrics}
    late, unfinished, wrong = 0, 0, 0
    for value, _, returned, _, _, _, changed in asked:
        step = changed.effective_step
        # A step begins when the one before it has been logged.
        next_step = min(event.step for event in metrics if event.t >= returned) + 1
        late += step > next_step
        finished = max(event.step for event in metrics if event.seq < changed.seq)
        unfinished += step != finished + 1
        wrong += abs(changed.new - value) > 1e-12 * abs(value)
        if coefficient == "learning_rate":
            wrong += abs(ends[step].values["optimizer/learning_rate"] / value - 1) > 1e-6
            wrong += abs(ends[step - 1].values["optimizer/learning_rate"] / changed.old - 1) > 1e-6
    return {
        "acknowledged": summary([a[4].t - a[1] for a in asked]),
        "acknowledged_seen": summary([a[3] - a[1] for a in asked]),
        "in_force": summary([a[6].t - a[1] for a in asked]),
        "in_force_seen": summary([a[5] - a[1] for a in asked]),
        "set_returns": summary([a[2] - a[1] for a in asked]),
        "step": summary([b.t - a.t for a, b in pairwise(metrics)]),
        "sets": len(asked),
        "late": late,
        "not_at_last_finished_plus_one": unfinished,
        "wrong_value": wrong,
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    sets = args.repeats or (8 if args.quick else 60)
    import rlhf_nb as rl

    options = {"max_steps": 100_000, "batch_size": 2, "max_length": 256, "sample_every": 0, "lr_scheduler": "constant"}
    figures, lines, met = {}, [], {}
    with scratch(), rl.Workspace("w") as workspace:
        workspace.attach("local", standby=False)
        for name, coefficient, between in SETS[:1] if args.quick else SETS:
            method = {"sft": rl.SFT, "dpo": rl.DPO}[name](**options, learning_rate=1e-4)
            calm(args.calm)
            found = figures[name] = measure(workspace, method, coefficient, between, sets)
            lines += [
                f"{name} {coefficient}, {found['sets']} sets, steps of {text(found['step'], 'ms', 1e3, 1)}",
                *(
                    f"  {what:42s} p50 {found[key]['median'] * 1e3:6.1f} ms  p95 {found[key]['p95'] * 1e3:6.1f} ms  "
                    f"[{found[key]['q1'] * 1e3:.1f}, {found[key]['q3'] * 1e3:.1f}]  max {found[key]['max'] * 1e3:.1f}"
                    for what, key in (
                        ("run.set returns (line durable)", "set_returns"),
                        ("→ acknowledged, at the worker", "acknowledged"),
                        ("→ acknowledged, seen in the notebook", "acknowledged_seen"),
                        ("→ coefficient_changed, at the worker", "in_force"),
                        ("→ coefficient_changed, seen in the notebook", "in_force_seen"),
                    )
                ),
                f"  late {found['late']}, not at last finished step + 1: {found['not_at_last_finished_plus_one']}, "
                f"wrong value at a step: {found['wrong_value']}",
            ]
            met[f"{name}: acknowledged p95 at most 200 ms"] = found["acknowledged"]["p95"] <= 0.2
            exact = found["late"] + found["not_at_last_finished_plus_one"] + found["wrong_value"] == 0
            met[f"{name}: every set in force at the next optimizer step"] = exact
    report("control_latency", args, lines, met, **figures)


if __name__ == "__main__":
    main()
