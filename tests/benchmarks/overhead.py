"""What watching and steering costs a step: worker CPU in our hooks, measured directly, and wall time beside plain TRL.

Real runs on the toy model of every method that wraps a trainer of TRL, and of PPO and GRPO for those on our own loop, short
steps and long ones, with events on, control read at every step and a live panel's Python half attached and answering a page. Every step's event carries `time/hooks_s`, the
CPU time (`time.thread_time`) that the worker spent in our callback since the last one, and `time/step_s`, the wall time of
the step. Must: for steps of 50 ms or more the hooks take at most 1 % of the step, for shorter ones at most 0.5 ms.

Beside it, interleaved: the wall time of a step (time between two metric events) against a plain TRL script with the same
settings, which logs every step too (with `--every10` also against one that logs every 10th, TRL's default). PPO and GRPO have no such
peer here (ppo_vs_trl.py, grpo_vs_trl.py); their step is the time between two updates, with its share of the rollout. Wall time holds
the panel's own work where both share the cores, and everything else that the machine does.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

from common import Watch, interleave, parser, plain_trl, ratios, report, scratch, summary, text

DATA = {
    "sft": "toy-demonstrations", "dpo": "toy-pairs", "reward": "toy-pairs", "kto": "toy-thumbs", "orpo": "toy-pairs",
    "simpo": "toy-pairs", "online-dpo": "toy-prompts", "ppo": "toy-prompts", "grpo": "toy-prompts",
}  # fmt: skip
SAMPLED = {"max_new_tokens": 16}
"""Of the method that samples; its reward counts vowels on both sides."""
OWN_LOOP = {"ppo": {}, "grpo": {"group_size": 4}}
BATCHES = {"short": 1, "long": 16}
LEAST = {"kto": 2, "grpo": 4}
"""KTO's reference point is read off another row of its batch; GRPO takes whole groups."""
WARM_UP = 5


def vowels(prompts, completions, **columns):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def ours(workspace: Any, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    from rlhf_nb import registry

    cls = registry.methods.get(method)
    reward = vowels if cls.needs_reward else None
    run = workspace.train(cls(sample_every=0, **settings), base="toy", data=DATA[method], reward=reward)
    panel = run.panel()
    # A page that says hello: from then on the panel sends figures and frames as to a browser.
    panel._handle_custom_msg({"kind": "hello", "page": "bench", "have": 0, "generation": -1, "figures": 0}, [])
    watch = Watch(run)
    run.wait(600)
    metrics = [event for event in watch.of("metric") if event.step > WARM_UP and "time/step_s" in event.values]
    watch.close()
    panel.close()
    assert len(metrics) == settings["max_steps"] - WARM_UP
    hooks = [event.values["time/hooks_s"] for event in metrics]
    walls = [b.t - a.t for a, b in pairwise(metrics)]
    # On our loop `time/step_s` is the update alone; a step has its share of the rollout, too.
    steps = walls if method in OWN_LOOP else [event.values["time/step_s"] for event in metrics]
    return {
        "wall": statistics.median(walls),
        "step": statistics.median(steps),
        "hooks": statistics.median(hooks),
        "hooks_mean": statistics.fmean(hooks),
        "share": sum(hooks) / sum(steps),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--only", choices=list(DATA), action="append", help="only this method")
    made.add_argument("--every10", action="store_true", help="also against plain TRL that logs every 10th step")
    args = made.parse_args()
    repeats = args.repeats or (1 if args.quick else 3)
    cases = [("sft", "short")] if args.quick else [(m, size) for m in args.only or DATA for size in BATCHES]
    figures: dict[str, Any] = {}
    lines, met = [], {}
    import rlhf_nb as rl

    with scratch() as folder, rl.Workspace("w") as workspace:
        # No standby: while a run trains, the next one imports, and that is seen on shared cores for some seconds.
        workspace.attach("local", standby=False)
        for method, size in cases:
            steps = 120 if size == "short" else 30
            settings = {
                "max_steps": WARM_UP + steps, "batch_size": max(BATCHES[size], LEAST.get(method, 1)), "max_length": 256,
                "learning_rate": 1e-4, **(SAMPLED if DATA[method] == "toy-prompts" else {}),
                **OWN_LOOP.get(method, {}),
            }  # fmt: skip
            if method in OWN_LOOP:
                settings["rollout_batch_size"] = settings["batch_size"]

            def plain(every: int, method: str = method, settings: dict[str, Any] = settings) -> float:
                ends = plain_trl(folder, method, **settings, logging_steps=every)["step_ends"][WARM_UP - 1 :]
                if every == 1:
                    return statistics.median(b - a for a, b in pairwise(ends))
                # The log falls on every tenth step: the median over whole tens holds its share.
                return statistics.median((b - a) / every for a, b in zip(ends, ends[every:], strict=False))

            arms: dict[str, Any] = {"ours": lambda method=method, settings=settings: ours(workspace, method, settings)}
            if method not in OWN_LOOP:
                arms["plain"] = lambda plain=plain: plain(1)
                if args.every10:
                    arms["plain10"] = lambda plain=plain: plain(10)
            found = interleave(repeats, arms, args.calm)
            mine = found["ours"]
            step, hooks = summary([one["step"] for one in mine]), summary([one["hooks"] for one in mine])
            mean, share = summary([one["hooks_mean"] for one in mine]), summary([one["share"] for one in mine])
            name = f"{method}/{size}"
            figures[name] = {"settings": settings, "step": step, "hooks": hooks, "hooks_mean": mean, "share": share}
            lines += [
                f"{name}, batch {settings['batch_size']}: step {text(step, 'ms', 1e3, 1)}",
                f"  hooks, CPU a step: mean {text(mean, 'ms', 1e3)}, median {text(hooks, 'ms', 1e3)} "
                f"= {text(share, '%', 100, 2)} of the step",
            ]
            for peer, said in (("plain", "plain TRL"), ("plain10", "plain TRL logging every 10th step")):
                if peer in found:
                    wall = ratios([one["wall"] for one in mine], found[peer])
                    figures[name] |= {peer: summary(found[peer]), f"wall, {peer}": wall}
                    lines.append(
                        f"  {said} {text(summary(found[peer]), 'ms', 1e3, 1)}; wall, ours / it {text(wall, '')}"
                    )
            # Judged by the quieter of the two: a machine that slows steps down must not make hooks look cheaper.
            peers = [statistics.median(found["plain"])] if "plain" in found else []
            quiet = min([step["median"], *peers])
            if quiet >= 0.05:
                met[f"{name}: at most 1 % of a step"] = mean["median"] / quiet <= 0.01
            else:
                met[f"{name}: at most 0.5 ms a step"] = mean["median"] <= 0.0005
        time.sleep(0.2)
    report("overhead", args, lines, met, **figures)


if __name__ == "__main__":
    main()
