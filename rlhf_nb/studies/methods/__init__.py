"""Every method on the toy world, from one start, with the same pairs, steps and tuning: what each did to the truth.

Made by  python -m rlhf_nb.studies.methods DIRECTORY
Kept in  results.json beside this file, as it came out.

For each seed 2,000 toy-pairs are drawn and labelled by `toy-annotator`; a proxy reward model is fitted to four fifths
of their prompts. Methods that train on rows get those pairs, KTO as thumbs and SFT as demonstrations of what was
chosen; methods that sample get toy-prompts and the proxy; best-of-n picks by the proxy. Each starts from `toy-sft` and
takes `STEPS` optimizer steps of `BATCH` rows or completions. Everything else is the method's default.

Tuning   The same for all: three learning rates, once each at `TUNING_SEED`, chosen by the true reward on prompts that
         the table is not measured on. The true reward is used for nothing else.
Measured One completion of each of `PROMPTS` held-out prompts at temperature 1, every model with the same chance: true
         reward, KL to `toy-sft` (k1, nats), length. Less `toy-sft` on the same prompts and chance; Student's 95 %
         interval over seeds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import DataError

if TYPE_CHECKING:
    from rlhf_nb.stages.tables import Table

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 1000
STEPS, BATCH = 60, 32
PROMPTS = 256
MAX_NEW_TOKENS = 48
BEST_OF = 8
PROXY: dict[str, Any] = {"max_steps": 60, "learning_rate": 5e-4, "batch_size": 32}
OFFLINE_RATES, ONLINE_RATES = (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    method: str
    knobs: dict[str, Any] = field(default_factory=dict)
    rows: str = "pairs"
    """What it is given: pairs, thumbs, demonstrations, or prompts with the proxy."""

    @property
    def rates(self) -> tuple[float, ...]:
        return ONLINE_RATES if self.rows == "prompts" else OFFLINE_RATES


_GROUPS = {"rollout_batch_size": 64, "group_size": 8}
ARMS = (
    Arm("SFT on what was chosen", "sft", rows="demonstrations"),
    Arm("DPO", "dpo"),
    Arm("IPO", "dpo", {"loss_type": "ipo"}),
    Arm("KTO", "kto", rows="thumbs"),
    Arm("ORPO", "orpo"),
    Arm("SimPO", "simpo"),
    Arm("PPO", "ppo", {"rollout_batch_size": 64}, "prompts"),
    Arm("REINFORCE++", "ppo", {"rollout_batch_size": 64, "value_model": "none", "samples_per_prompt": 8}, "prompts"),
    Arm("GRPO", "grpo", _GROUPS, "prompts"),
    Arm("Dr. GRPO", "dr-grpo", _GROUPS, "prompts"),
    Arm("GSPO", "gspo", _GROUPS, "prompts"),
    Arm("DAPO", "dapo", _GROUPS, "prompts"),
    Arm("RLOO", "rloo", _GROUPS, "prompts"),
    Arm("online DPO", "online-dpo", rows="prompts"),
)
SETTINGS: dict[str, Any] = {
    "world": "toy",
    "annotator": "toy-annotator",
    "policy": "toy-sft",
    "seeds": SEEDS,
    "tuning_seed": TUNING_SEED,
    "steps": STEPS,
    "batch": BATCH,
    "prompts": PROMPTS,
    "max_new_tokens": MAX_NEW_TOKENS,
    "best_of": BEST_OF,
    "proxy": {**PROXY, "pairs": 2000, "held_out": 0.2},
    "arms": [[arm.name, arm.method, arm.knobs, arm.rows, arm.rates] for arm in ARMS],
}


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


def table(results: dict[str, Any]) -> Table:
    """A line a method: mean over seeds with Student's 95 % interval. A run that failed is counted and not averaged."""
    from rlhf_nb.stages.tables import Table
    from rlhf_nb.statistics.intervals import mean

    rows: list[dict[str, Any]] = []
    for name in results["arms"]:
        runs = [of_seed["runs"][name] for of_seed in results["seeds"]]
        pairs = [
            (run, of_seed["start"])
            for run, of_seed in zip(runs, results["seeds"], strict=True)
            if run["state"] == "finished"
        ]
        row: dict[str, Any] = {"method": name}
        if len(pairs) > 1:
            row |= {
                "true reward over toy-sft": _told(mean([run["true"] - start["true"] for run, start in pairs])),
                "proxy over toy-sft (std)": _told(
                    mean([(run["proxy"] - start["proxy"]) / start["proxy_std"] for run, start in pairs])
                ),
                "KL (nats)": _told(mean([run["kl"] for run, _ in pairs])),
                "tokens": round(sum(run["length"] for run, _ in pairs) / len(pairs), 1),
                "seconds": round(sum(run["train_s"] for run, _ in pairs) / len(pairs), 1),
            }
        row |= {"learning rate": results["tuned"].get(name, ""), "seeds": len(pairs), "failed": len(runs) - len(pairs)}
        rows.append(row)
    start = mean([of_seed["start"]["true"] for of_seed in results["seeds"]])
    line = (
        f"{STEPS} steps of {BATCH} from toy-sft, whose true reward is {start.value:.3f}; mean [95 % interval] over "
        f"{len(results['seeds'])} seeds. Seconds on {results['made_with']['machine']}; threads: "
        f"{results['made_with']['threads']}."
    )
    return Table(list(dict.fromkeys(column for row in rows for column in row)), rows, lines=[line])


def markdown(results: dict[str, Any]) -> str:
    """The table as the README has it."""
    found = table(results)
    columns = [column for column in found.columns if column != "seeds"]
    cells = [[str(row.get(column, "")) for column in columns] for row in found.rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _told(estimate: Any) -> str:
    value, low, high = (f"{x:.3f}" for x in (estimate.value, estimate.interval.low, estimate.interval.high))
    return f"{value} [{low}, {high}]".replace("-", "−")
