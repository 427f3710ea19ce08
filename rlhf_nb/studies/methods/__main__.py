"""Make the study: `python -m rlhf_nb.studies.methods DIRECTORY`.

What is finished is kept in DIRECTORY, one file for each part, and a second call goes on from there. A run that fails
stays in with its reason. At the end DIRECTORY/results.json holds everything.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_nb import registry, toy
from rlhf_nb.errors import RlhfError
from rlhf_nb.methods.reward_model import RewardModel
from rlhf_nb.studies import methods as study
from rlhf_nb.studies.making import DIGITS, Parts, made_with
from rlhf_nb.studies.methods import Arm
from rlhf_nb.workspace import Workspace

STREAM = 2**40 + 2
"""Chance that no rollout meets."""


def given(workspace: Workspace, seed: int) -> dict[str, Any]:
    """The rows of a seed, stored, and a proxy fitted to their larger part."""
    rows = toy.pairs(study.SETTINGS["proxy"]["pairs"], seed)
    pairs = workspace.add_data(rows, name=f"pairs-{seed}", kind="pairs", source="toy-pairs")
    train, held_out = pairs.split(test=study.SETTINGS["proxy"]["held_out"], seed=seed)
    workspace.add_data(train.rows, name=f"train-{seed}", kind="pairs", source=pairs.name)
    run = workspace.train(RewardModel(**study.PROXY, seed=seed), base="toy-sft", data=train).wait()
    found = workspace.evaluate(run, data=held_out)
    return {"run": run.id, "accuracy": round(found.value, DIGITS), "n": found.n}


def trained(workspace: Workspace, arm: Arm, seed: int, rate: float, proxy: str) -> dict[str, Any]:
    """One run, and what it says of held-out prompts. The tuning seed is measured on other prompts."""
    cls = registry.methods.get(arm.method)
    common = {"max_steps": study.STEPS, "batch_size": study.BATCH, "sample_every": 0, "seed": seed}
    if "max_new_tokens" in cls.model_fields:
        common["max_new_tokens"] = study.MAX_NEW_TOKENS
    method = cls.create(**common, **arm.knobs, learning_rate=rate)
    run = None
    try:
        if arm.rows == "prompts":
            run = workspace.train(method, policy="toy-sft", prompts="toy-prompts", reward=workspace.run(proxy))
        else:
            data = workspace.dataset(f"train-{seed}")
            data = data if arm.rows == "pairs" else data.to(arm.rows)
            run = workspace.train(method, policy="toy-sft", data=data)
        run.wait()
    except RlhfError as error:
        if run is not None and run.state == "paused":
            # It would keep its turn, and the next run would wait for it for ever.
            run.stop().wait()
        return {"state": "failed", "run": run.id if run else "", "rate": rate, "reason": str(error)}
    scored = measured(saved(workspace, run.id), saved(workspace, proxy), seed)
    return {"state": run.state, "run": run.id, "rate": rate, "train_s": _seconds(run.fold), **scored}


def _seconds(fold: Any) -> float:
    """Wall time of the steps; of rollouts too, where they are no part of a step."""
    names = ("time/rollout_s", "time/score_s", "time/reference_s", "time/sync_s")
    apart = sum(row.get(name, 0.0) for row in fold.table() if "time/rollout_s" in row for name in names)
    return round(apart + sum(row.get("time/step_s", 0.0) for row in fold.table()), 2)


def saved(workspace: Workspace, run: str) -> str:
    assert workspace.directory is not None
    return str(workspace.directory / "runs" / run / "model")


def start(proxy: str, seed: int) -> dict[str, Any]:
    """`toy-sft` itself, measured as every model is."""
    from rlhf_nb.training.models import toy_sft_path

    return measured(str(toy_sft_path()), proxy, seed)


def best_of(proxy: str, seed: int) -> dict[str, Any]:
    """`toy-sft`, the best of `BEST_OF` by the proxy. Its KL is bounded by log n − (n − 1)/n."""
    from rlhf_nb.maths.best_of_n import kl_bound
    from rlhf_nb.training.models import toy_sft_path

    found = [said(str(toy_sft_path()), proxy, seed, stream=k) for k in range(study.BEST_OF)]
    picked = [max(of_prompt, key=lambda one: one["proxy"]) for of_prompt in zip(*found, strict=True)]
    means = {name: _mean([one[name] for one in picked]) for name in ("true", "proxy", "length")}
    return {"state": "finished", "rate": None, "train_s": 0.0, **means, "kl": kl_bound(study.BEST_OF)}


def measured(model: str, proxy: str, seed: int) -> dict[str, Any]:
    """Means over the prompts, and the spread of the proxy."""
    rows = said(model, proxy, seed)
    proxies = [row["proxy"] for row in rows]
    spread = math.sqrt(_mean([(one - _mean(proxies)) ** 2 for one in proxies]))
    means = {name: round(_mean([row[name] for row in rows]), DIGITS) for name in ("true", "proxy", "kl", "length")}
    return {**means, "proxy_std": round(spread, DIGITS)}


def said(model: str, proxy: str, seed: int, stream: int = 0) -> list[dict[str, float]]:
    """What a model says of each prompt: its true reward, its proxy's, its length, its log-ratio to `toy-sft`."""
    import torch

    from rlhf_nb.training import data, models
    from rlhf_nb.training.actor_critic import ActorCritic, trunk_and_head
    from rlhf_nb.training.rollout.base import uniforms
    from rlhf_nb.training.rollout.transformers_backend import TransformersSampler, pad_left
    from rlhf_nb.training.sampling import end_tokens

    if seed == study.TUNING_SEED:
        prompts = [row["prompt"] for row in toy.prompts(study.PROMPTS)]
    else:
        prompts = [row["prompt"] for row in toy.held_out_prompts(study.PROMPTS)]
    tokenizer, policy = models.load_tokenizer(model), models.load_model(model).eval()
    reference = ActorCritic(models.load_model(str(models.toy_sft_path())).eval(), None, None)
    trunk, head = trunk_and_head(policy)
    sampler = TransformersSampler(
        trunk, head, end_tokens=end_tokens(policy, tokenizer), pad_token=tokenizer.pad_token_id
    )
    ids = [data.prompt_ids(prompt, tokenizer) for prompt in prompts]
    noise = uniforms(seed, STREAM + stream, range(len(ids)), study.MAX_NEW_TOKENS)
    drawn = sampler.sample(ids, noise, temperature=1.0)
    tokens_BP, seen_BP = pad_left(ids, tokenizer.pad_token_id, drawn.tokens_BT.device)
    with torch.no_grad():
        there_BT, _, _ = reference(
            torch.cat([tokens_BP, drawn.tokens_BT], 1), torch.cat([seen_BP, drawn.mask_BT], 1), drawn.mask_BT
        )
    ratios = ((drawn.behavior_logprobs_BT - there_BT) * drawn.mask_BT).sum(1).tolist()
    texts = [
        tokenizer.decode(row[mask], skip_special_tokens=True).strip()
        for row, mask in zip(drawn.tokens_BT, drawn.mask_BT, strict=True)
    ]
    values = zip(toy.true_reward(prompts, texts), scorer(proxy).score(prompts, texts), strict=True)
    lengths = drawn.mask_BT.sum(1).tolist()
    return [
        {"true": true, "proxy": score, "kl": ratio, "length": length}
        for (true, score), ratio, length in zip(values, ratios, lengths, strict=True)
    ]


@cache
def scorer(proxy: str) -> Any:
    from rlhf_nb.rewards.model import RewardModelScorer

    return RewardModelScorer.load(proxy)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rlhf_nb.studies.methods", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    part = Parts(directory / "parts")
    with Workspace(directory / "workspace") as workspace:
        workspace.attach("local")
        proxies = {
            seed: part(f"{seed}-given", given, workspace, seed)["run"] for seed in (*study.SEEDS, study.TUNING_SEED)
        }
        # By now toy-sft has been trained on this machine.
        made = part("made-with", made_with, "methods")
        tuned, tuning = {}, proxies[study.TUNING_SEED]
        for arm in study.ARMS:
            tries = [
                part(f"tuning-{arm.name}-{rate:g}", trained, workspace, arm, study.TUNING_SEED, rate, tuning)
                for rate in arm.rates
            ]
            # Where every rate failed, the middle one is kept, and fails again for all to see.
            sound = [one for one in tries if one["state"] == "finished"] or [tries[1]]
            tuned[arm.name] = max(sound, key=lambda one: one.get("true", 0.0))["rate"]
        seeds: list[dict[str, Any]] = []
        for seed in study.SEEDS:
            proxy = proxies[seed]
            model = saved(workspace, proxy)
            runs = {"best of 8": part(f"{seed}-best-of", best_of, model, seed)}
            for arm in study.ARMS:
                runs[arm.name] = part(f"{seed}-{arm.name}", trained, workspace, arm, seed, tuned[arm.name], proxy)
            seeds.append({"seed": seed, "start": part(f"{seed}-start", start, model, seed), "runs": runs})
    results = {
        "study": "methods",
        "settings": study.SETTINGS,
        "made_with": made,
        "arms": list(seeds[0]["runs"]),
        "tuned": tuned,
        "seeds": seeds,
    }
    (directory / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(directory / "results.json")


if __name__ == "__main__":
    main()
