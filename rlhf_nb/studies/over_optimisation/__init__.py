"""Over-optimisation on the toy world: proxy and true reward against √KL, for PPO at several kl_coef and for best-of-n.

Paper    Gao, Schulman and Hilton 2023, arXiv:2210.10760.
Made by  python -m rlhf_nb.studies.over_optimisation DIRECTORY
Kept in  results.json beside this file, as it came out.

For each seed: 2,000 toy-pairs drawn and labelled by `toy-annotator` with that seed; a proxy reward model fitted to 80 %
of their prompts; PPO from `toy-sft` against this proxy, once for each kl_coef; best-of-n of `toy-sft` by the same
proxy. Everything but kl_coef is the quickstart's and the same for every setting: nothing was tuned, for any of them.

Units    The proxy's scores have none of their own: they are given in standard deviations of its scores on `toy-sft`,
         less their mean there. The true reward is in its own [0, 1], less its mean on `toy-sft`.
d        √KL(π‖π_ref), √nats. PPO: k1 over a rollout's completions, averaged over `ROLLOUTS_A_POINT` rollouts before the
         root is taken; a point whose mean is not above 0 is left out of the fits and counted. Best-of-n: from
         log n − (n − 1)/n, an upper bound of its KL, so that its true points lie further left than drawn.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from rlhf_nb.errors import DataError

if TYPE_CHECKING:
    from rlhf_nb.stages.tables import Table
    from rlhf_nb.statistics.intervals import Estimate
    from rlhf_nb.statistics.over_optimisation import FitOverSeeds

Reward = Literal["proxy", "true"]
Points = tuple[list[float], list[float]]

SEEDS = (0, 1, 2, 3, 4)
KL_COEFS = (0.0001, 0.01, 0.05, 0.2)
PROXY: dict[str, Any] = {"max_steps": 60, "learning_rate": 5e-4, "batch_size": 32}
PPO: dict[str, Any] = {
    "max_steps": 200,
    "learning_rate": 3e-4,
    "rollout_batch_size": 64,
    "batch_size": 32,
    "max_new_tokens": 48,
    "sample_every": 0,
}
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
BEST_OF_PROMPTS, BEST_OF_SAMPLES = 128, 64
"""Of toy-prompts, the first ones in an order drawn by the seed."""
START_SAMPLES = 4
"""Completions of each of the 1,000 toy-prompts, for the mean and the spread on `toy-sft`."""
ROLLOUTS_A_POINT = 5
SETTINGS: dict[str, Any] = {
    "world": "toy",
    "annotator": "toy-annotator",
    "policy": "toy-sft",
    "seeds": SEEDS,
    "kl_coef": KL_COEFS,
    "proxy": {**PROXY, "pairs": 2000, "held_out": 0.2},
    "ppo": PPO,
    "best_of": BEST_OF,
    "best_of_prompts": BEST_OF_PROMPTS,
    "best_of_samples": BEST_OF_SAMPLES,
    "start_samples": START_SAMPLES,
    "rollouts_a_point": ROLLOUTS_A_POINT,
}


@dataclass(frozen=True)
class Setting:
    """PPO at one kl_coef, or best-of-n (None)."""

    kl_coef: float | None

    @property
    def name(self) -> str:
        return "best-of-n" if self.kl_coef is None else f"PPO, kl_coef {self.kl_coef:g}"


def settings() -> list[Setting]:
    return [*(Setting(kl_coef) for kl_coef in KL_COEFS), Setting(None)]


def load() -> dict[str, Any]:
    """The committed results.

    Raises:
        DataError: There are none in this installation.
    """
    file = resources.files(__name__) / "results.json"
    if not file.is_file():
        raise DataError(
            "this installation carries no results of the study; the module's docstring says how to make them"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def curve(of_seed: dict[str, Any], setting: Setting, reward: Reward) -> Points:
    """(√KL, reward less that of `toy-sft`) of one seed, in the order in which they were reached.

    A PPO point is the mean over `ROLLOUTS_A_POINT` rollouts; its √KL is NaN where the mean KL is below 0, which chance
    allows near the start. A run that failed gives the points it reached, one that never ran none.
    """
    start = of_seed["start"]
    if setting.kl_coef is None:
        # The same prompts at n=1: what differs between prompts then cancels.
        base, rows = of_seed["best_of"][0][reward], of_seed["best_of"]
        scale = start["proxy_std"] if reward == "proxy" else 1.0
        return [math.sqrt(row["kl_bound"]) for row in rows], [(row[reward] - base) / scale for row in rows]
    run = next((run for run in of_seed["ppo"] if run["kl_coef"] == setting.kl_coef), None)
    rollouts = run["rollouts"] if run is not None else {"kl": [], reward: []}
    points: Points = ([], [])
    for at in range(0, len(rollouts["kl"]) - ROLLOUTS_A_POINT + 1, ROLLOUTS_A_POINT):
        part = slice(at, at + ROLLOUTS_A_POINT)
        kl, mean = (sum(rollouts[name][part]) / ROLLOUTS_A_POINT for name in ("kl", reward))
        points[0].append(math.sqrt(kl) if kl >= 0 else math.nan)
        points[1].append((mean - start[reward]) / (start["proxy_std"] if reward == "proxy" else 1.0))
    return points


def fits(results: dict[str, Any], setting: Setting, reward: Reward) -> FitOverSeeds:
    """The form of arXiv:2210.10760 fitted to the points of every seed."""
    from rlhf_nb.statistics.over_optimisation import fit_over_seeds

    curves: list[tuple[list[float], list[float]]] = []
    for of_seed in results["seeds"]:
        points = [(d, r) for d, r in zip(*curve(of_seed, setting, reward), strict=True) if d > 0]
        if points:
            curves.append(([d for d, _ in points], [r for _, r in points]))
    return fit_over_seeds(curves, "best_of_n" if setting.kl_coef is None else "reinforcement_learning")


def last_points(results: dict[str, Any], setting: Setting) -> dict[str, list[float]]:
    """Where each seed ended: `distance`, `proxy` and `true` of its last point, best-of-n's at its largest n."""
    found: dict[str, list[float]] = {"distance": [], "proxy": [], "true": []}
    for of_seed in results["seeds"]:
        distance, proxy = curve(of_seed, setting, "proxy")
        _, true = curve(of_seed, setting, "true")
        if distance:
            for name, value in (("distance", distance[-1]), ("proxy", proxy[-1]), ("true", true[-1])):
                found[name].append(value)
    return found


def ends_table(results: dict[str, Any]) -> Table:
    """Where each setting ended: mean over seeds with Student's 95 % interval."""
    from rlhf_nb.stages.tables import Table
    from rlhf_nb.statistics.intervals import mean

    rows = []
    for setting in settings():
        ends = last_points(results, setting)
        runs = [run for of_seed in results["seeds"] for run in of_seed["ppo"] if run["kl_coef"] == setting.kl_coef]
        rows.append(
            {
                "at the end of": setting.name if setting.kl_coef is not None else f"best of {BEST_OF[-1]}",
                "√KL (√nats)": _told(mean(ends["distance"]))
                if setting.kl_coef is not None
                else f"≤ {ends['distance'][0]:.2f}",
                "proxy (std)": _told(mean(ends["proxy"])),
                "true (0 to 1)": _told(mean(ends["true"])),
                "seeds": len(ends["true"]),
                "failed": sum(run["state"] != "finished" for run in runs),
            }
        )
    start = mean([of_seed["start"]["true"] for of_seed in results["seeds"]])
    accuracy = mean([of_seed["proxy"]["accuracy"] for of_seed in results["seeds"]])
    longer = mean([of_seed["proxy"]["longer_accuracy"] for of_seed in results["seeds"]])
    lines = [
        "Change from toy-sft, mean [95 % interval] over seeds.",
        f"The true reward of toy-sft is {start.value:.3f}.",
        f"Of held-out pairs the proxies get {_told(accuracy)} right, picking the longer {_told(longer)}.",
    ]
    return Table(list(rows[0]), rows, lines=lines)


def fits_table(results: dict[str, Any]) -> Table:
    """The fits, with 95 % percentile intervals over resampled seeds."""
    from rlhf_nb.stages.tables import Table

    rows = []
    rewards: tuple[Reward, ...] = ("true", "proxy")
    for reward in rewards:
        for setting in settings():
            found = fits(results, setting, reward)
            rows.append(
                {
                    "reward": reward,
                    "setting": setting.name,
                    "a": _told(found.a),
                    "b": _told(found.b),
                    "d* (√nats)": _told_peak(found),
                    "R(d*)": _told(found.peak_reward) if found.peak_reward and found.fit.peak_within else "",
                    "rms": round(found.fit.residual, 3),
                }
            )
    lines = [
        "R = d·(a − b·log d) for PPO, d·(a − b·d) for best-of-n; [95 % over resampled seeds], too narrow with so few."
    ]
    return Table(list(rows[0]), rows, lines=lines)


def _told_peak(found: FitOverSeeds) -> str:
    """d*, where it lies among the data: what a fit says outside them is no result."""
    peak, nearest, furthest = found.peak_distance, found.fit.nearest, found.fit.furthest
    if peak is None:
        return "none: b ≤ 0" if found.fit.b <= 0 else "none: a ≤ 0"

    def told(d: float) -> str:
        return f"< {nearest:.2g}" if d < nearest else f"> {furthest:.2g}" if d > furthest else f"{d:.3g}"

    return f"{told(peak.value)} [{told(peak.interval.low)}, {told(peak.interval.high)}]"


def _told(estimate: Estimate) -> str:
    value, low, high = (f"{x:.3g}" for x in (estimate.value, estimate.interval.low, estimate.interval.high))
    return f"{value} [{low}, {high}]".replace("-", "−").replace("inf", "∞")
