"""100,000 events of a finished run: from its log through the attached client to a fold, as a re-opened notebook does it.

The log is written as a run writes it (metrics of a PPO step's size, some coefficient changes), then read in three ways
by a client over a real Jupyter kernel: `client.events` into a RunFold; a subscription into a RunFold, as the panel
does; and `run.fold` of a workspace, which also refills the workspace's index. Must: 3 s for the first.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from common import interleave, parser, report, scratch, summary, text

NAMES = (
    "reward/mean", "reward/score", "reward/gold", "kl/policy_reference", "loss", "loss/policy", "loss/value",
    "policy/entropy", "policy/clip_fraction", "completion/length_mean", "optimizer/learning_rate",
    "optimizer/grad_norm", "time/step_s", "time/hooks_s",
)  # fmt: skip


def write_log(run: Any, n: int) -> int:
    """A finished run of `n` events; its size in bytes."""
    from rlhf_nb.compute.rundir import write_json
    from rlhf_nb.protocol import events as kinds

    began = time.time() - n * 0.1
    lines = [kinds.Started(world_size=1, max_steps=n, has_reference=True, seq=1, t=began)]
    for seq in range(2, n):
        t = began + seq * 0.1
        if seq % 1000 == 0:
            event = kinds.CoefficientChanged(
                id=f"c{seq}", name="kl_coef", old=0.1, new=0.2, effective_step=seq, who="alice", seq=seq, t=t
            )
        else:
            values = {name: (seq * 37 % 1000) / 997 + place for place, name in enumerate(NAMES)}
            event = kinds.Metric(step=seq, max_steps=n, values=values, seq=seq, t=t)
        lines.append(event)
    lines.append(kinds.Finished(step=n, seconds=n * 0.1, seq=n, t=began + n * 0.1))
    run.events_path.write_bytes(b"".join(line.model_dump_json().encode() + b"\n" for line in lines))
    write_json(run.attempt_path, {"attempt": 1, "resume_from": None})
    ended = {"outcome": "finished", "reason": "", "seconds": n * 0.1, "step": n, "attempt": 1, "at": time.time()}
    write_json(run.exit_path, ended)
    return run.events_path.stat().st_size


def main() -> None:
    args = parser(__doc__).parse_args()
    n, repeats = (100_000, args.repeats or (2 if args.quick else 7))
    from rlhf_nb.compute.rundir import RunDir
    from rlhf_nb.protocol.fold import RunFold
    from rlhf_nb.protocol.spec import NamedData, NamedModel, RunSpec
    from rlhf_nb.run import Run
    from rlhf_nb.workspace import Workspace

    with scratch() as folder:
        place = RunDir(folder / "w" / "runs" / "sft-1")
        place.create(
            RunSpec(
                run_id="sft-1", workspace_id="w", method="sft", config={}, policy=NamedModel(name="toy"),
                data=NamedData(name="toy-demonstrations"), created=time.time(),
            )
        )  # fmt: skip
        size = write_log(place, n)
        workspace = Workspace(str(Path("w")))
        workspace.attach("local", standby=False)
        client = workspace.client

        def check(fold: RunFold) -> None:
            assert fold.last_seq == n and fold.state == "finished"
            assert len(fold.rows) + len(fold.changes) + 2 == n

        def by_events() -> float:
            began, fold = time.perf_counter(), RunFold()
            for event in client.events("sft-1"):
                fold.add(event)
            took = time.perf_counter() - began
            check(fold)
            return took

        def by_subscription() -> float:
            began, fold, done = time.perf_counter(), RunFold(), threading.Event()

            def take(events: list[Any]) -> None:
                for event in events:
                    fold.add(event)
                if fold.is_terminal:
                    done.set()

            subscription = client.subscribe("sft-1", 0, take)
            done.wait(120)
            took = time.perf_counter() - began
            subscription.close()
            check(fold)
            return took

        def by_run() -> float:
            began = time.perf_counter()
            fold = Run(workspace, "sft-1").fold
            took = time.perf_counter() - began
            check(fold)
            return took

        found = interleave(repeats, {"events": by_events, "subscription": by_subscription, "run": by_run})
        workspace.close()
    figures = {name: summary(values) for name, values in found.items()}
    lines = [
        f"{n:,} events, {size / 1e6:.1f} MB, {len(NAMES)} metrics in each",
        f"client.events → RunFold             {text(figures['events'])}",
        f"client.subscribe → RunFold          {text(figures['subscription'])}",
        f"run.fold (first time: index filled) {text(figures['run'])}",
    ]
    met = {"client.events → fold at most 3 s": figures["events"]["median"] <= 3}
    report("replay", args, lines, met, events=n, bytes=size, seconds=figures)


if __name__ == "__main__":
    main()
