"""100,000 events of a finished run: from its log through the attached client to a fold, as a re-opened notebook does it.

The log is written as a run writes it (metrics of a PPO step's size, some coefficient changes), then read in three ways
by a client over a real Jupyter kernel: `client.events` into a RunFold; a subscription into a RunFold, as the panel
does; and `run.fold` of a workspace, which also refills the workspace's index. Must: 3 s for the first.

The CPU seconds of both ends (this process and the agent's kernel, which work at the same time) stand beside the wall
time: they say what the work is where other jobs hold the machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
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

        agent = psutil.Process(client.info.agent_pid)

        def cpu() -> float:
            theirs = agent.cpu_times()
            return time.process_time() + theirs.user + theirs.system

        def timed(read: Callable[[], RunFold]) -> dict[str, float]:
            wall, used = time.perf_counter(), cpu()
            fold = read()
            wall, used = time.perf_counter() - wall, cpu() - used
            check(fold)
            return {"wall": wall, "cpu": used}

        def by_events() -> RunFold:
            fold = RunFold()
            for event in client.events("sft-1"):
                fold.add(event)
            return fold

        def by_subscription() -> RunFold:
            fold, done = RunFold(), threading.Event()

            def take(events: list[Any]) -> None:
                for event in events:
                    fold.add(event)
                if fold.is_terminal:
                    done.set()

            subscription = client.subscribe("sft-1", 0, take)
            done.wait(120)
            subscription.close()
            return fold

        def by_run() -> RunFold:
            return Run(workspace, "sft-1").fold

        ways = {"events": by_events, "subscription": by_subscription, "run": by_run}
        arms = {name: lambda read=read: timed(read) for name, read in ways.items()}
        found = interleave(repeats, arms, args.calm)
        workspace.close()
    walls = {name: summary([one["wall"] for one in values]) for name, values in found.items()}
    cpus = {name: summary([one["cpu"] for one in values]) for name, values in found.items()}
    names = {
        "events": "client.events → RunFold", "subscription": "client.subscribe → RunFold", "run": "run.fold",
    }  # fmt: skip
    lines = [f"{n:,} events, {size / 1e6:.1f} MB, {len(NAMES)} metrics in each"]
    lines += [
        f"{names[way]:27s} wall {text(walls[way])}, fastest {walls[way]['min']:.2f} · CPU of both ends {text(cpus[way])}"
        for way in ways
    ]
    met = {"client.events → fold at most 3 s": walls["events"]["median"] <= 3}
    report("replay", args, lines, met, events=n, bytes=size, wall=walls, cpu=cpus)


if __name__ == "__main__":
    main()
