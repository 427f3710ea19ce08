"""Make the study: `python -m rlhf_nb.studies.over_optimisation DIRECTORY`.

What is finished is kept in DIRECTORY, one file for each part, and a second call goes on from there. A run that fails
stays in with its reason and the rollouts it had. At the end DIRECTORY/results.json holds everything.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from rlhf_nb import toy
from rlhf_nb.errors import RunFailedError
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.methods.reward_model import RewardModel
from rlhf_nb.studies import over_optimisation as study
from rlhf_nb.studies.making import DIGITS, Parts, made_with
from rlhf_nb.workspace import Workspace

STREAM_START, STREAM_BEST_OF = 2**40, 2**40 + 1
"""Chance that no rollout meets."""
BATCH = 256


def proxy(workspace: Workspace, seed: int) -> dict[str, Any]:
    rows = toy.pairs(study.SETTINGS["proxy"]["pairs"], seed)
    pairs = workspace.add_data(rows, name=f"pairs-{seed}", kind="pairs", source="toy-pairs")
    train, held_out = pairs.split(test=study.SETTINGS["proxy"]["held_out"], seed=seed)
    run = workspace.train(RewardModel(**study.PROXY, seed=seed), base="toy-sft", data=train).wait()
    found = workspace.evaluate(run, data=held_out)
    return {
        "run": run.id,
        "accuracy": round(found.value, DIGITS),
        "interval": [round(bound, DIGITS) for bound in found.interval],
        "n": found.n,
        "longer_accuracy": round(found.detail["longer_accuracy"], DIGITS),
    }


def ppo(workspace: Workspace, seed: int, kl_coef: float, reward: str) -> dict[str, Any]:
    run = workspace.train(
        PPO(**study.PPO, kl_coef=kl_coef, seed=seed),
        policy="toy-sft",
        prompts="toy-prompts",
        reward=workspace.run(reward),
        gold="toy-true",
    )
    reason = ""
    try:
        run.wait()
    except RunFailedError as error:
        reason = str(error)
    rows = run.metrics()
    rows = rows.dropna(subset=["reward/gold"]) if "reward/gold" in rows else rows.iloc[:0]
    columns = {
        "proxy": "reward/score",
        "true": "reward/gold",
        "kl": "kl/policy_reference",
        "length": "completion/length_mean",
    }
    rollouts = {
        name: [round(float(value), DIGITS) for value in rows[column]] if len(rows) else []
        for name, column in columns.items()
    }
    return {"kl_coef": kl_coef, "state": run.state, "reason": reason, "rollouts": rollouts}


class Start:
    """`toy-sft` as it is: completions sampled as PPO samples them, scored by a proxy and by the truth."""

    def __init__(self, reward_model: Path) -> None:
        from rlhf_nb.rewards.model import RewardModelScorer
        from rlhf_nb.training import models
        from rlhf_nb.training.rollout.transformers_backend import TransformersSampler
        from rlhf_nb.training.sampling import end_tokens

        path = str(models.toy_sft_path())
        model = models.load_model(path).eval()
        self.tokenizer = models.load_tokenizer(path)
        self.sampler = TransformersSampler(
            model.model,
            model.lm_head,
            end_tokens=end_tokens(model, self.tokenizer),
            pad_token=self.tokenizer.pad_token_id,
        )
        self.scorer = RewardModelScorer.load(str(reward_model))

    def scores(self, prompts: list[str], samples: int, seed: int, stream: int) -> tuple[Any, Any]:
        """(P, samples) of the proxy and of the true reward."""
        import torch

        from rlhf_nb.training import data
        from rlhf_nb.training.rollout.base import uniforms

        repeated = [prompt for prompt in prompts for _ in range(samples)]
        completions: list[str] = []
        for at in range(0, len(repeated), BATCH):
            some = repeated[at : at + BATCH]
            ids = [data.prompt_ids(prompt, self.tokenizer) for prompt in some]
            chance = uniforms(seed, stream, range(at, at + len(some)), study.PPO["max_new_tokens"])
            said = self.sampler.sample(ids, chance, temperature=1.0)
            completions += [
                self.tokenizer.decode(tokens[mask], skip_special_tokens=True).strip()
                for tokens, mask in zip(said.tokens_BT, said.mask_BT, strict=True)
            ]
        # The toy model repeats itself: each text is scored once.
        texts = list(dict.fromkeys(zip(repeated, completions, strict=True)))
        proxy = dict(zip(texts, self.scorer.score([p for p, _ in texts], [c for _, c in texts]), strict=True))
        both = list(zip(repeated, completions, strict=True))
        shape = (len(prompts), samples)
        return (
            torch.tensor([proxy[one] for one in both], dtype=torch.float64).view(shape),
            torch.tensor(toy.true_reward(repeated, completions), dtype=torch.float64).view(shape),
        )


def start(reward_model: Path, seed: int) -> dict[str, Any]:
    prompts = [row["prompt"] for row in toy.prompts(toy.DEFAULT_SIZES["toy-prompts"])]
    proxy, true = Start(reward_model).scores(prompts, study.START_SAMPLES, seed, STREAM_START)
    values = {"proxy": proxy.mean(), "proxy_std": proxy.std(), "true": true.mean(), "true_std": true.std()}
    return {name: round(value.item(), DIGITS) for name, value in values.items()}


def best_of(reward_model: Path, seed: int) -> dict[str, Any]:
    from rlhf_nb.maths.best_of_n import best_of_n_mean, kl_bound

    prompts = [row["prompt"] for row in toy.prompts(toy.DEFAULT_SIZES["toy-prompts"])]
    random.Random(seed).shuffle(prompts)
    prompts = prompts[: study.BEST_OF_PROMPTS]
    proxy, true = Start(reward_model).scores(prompts, study.BEST_OF_SAMPLES, seed, STREAM_BEST_OF)
    rows = []
    for n in study.BEST_OF:
        values = {
            "kl_bound": kl_bound(n),
            "proxy": best_of_n_mean(proxy, proxy, n).mean().item(),
            "true": best_of_n_mean(proxy, true, n).mean().item(),
        }
        rows.append({"n": n, **{name: round(value, DIGITS) for name, value in values.items()}})
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rlhf_nb.studies.over_optimisation", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    part = Parts(directory / "parts")
    seeds = []
    with Workspace(directory / "workspace") as workspace:
        workspace.attach("local")
        for seed in study.SEEDS:
            reward = part(f"{seed}-proxy", proxy, workspace, seed)
            made = part("made-with", made_with, "over_optimisation")
            model = directory / "workspace" / "runs" / reward["run"] / "model"
            origin = part(f"{seed}-start", start, model, seed)
            best = part(f"{seed}-best-of", best_of, model, seed)
            runs = [
                part(f"{seed}-ppo-{kl_coef:g}", ppo, workspace, seed, kl_coef, reward["run"])
                for kl_coef in study.KL_COEFS
            ]
            seeds.append({"seed": seed, "proxy": reward, "start": origin, "best_of": best["rows"], "ppo": runs})
    results = {"study": "over-optimisation", "settings": study.SETTINGS, "made_with": made, "seeds": seeds}
    (directory / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(directory / "results.json")


if __name__ == "__main__":
    main()
