"""What the cheaper learners of PPO learn: true reward after equal samples, beside TRL 1.12.0 with LoRA.

ppo_vs_trl.py times them; here is what is bought. The toy world's `toy-sft`, its true reward as the reward on both sides,
LoRA of rank 16 on all linear layers, the same learning rate, kl_coef, rollouts and passes, nothing tuned for either. An
arm's figure is the mean score of its last five rollouts, less that of its first. `--trl DIR` is a folder that `pip install
--no-deps --target DIR trl==1.12.0` filled. Must: nothing; it stands beside the speed of the LoRA rows.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import child, interleave, parser, report, scratch, summary, text

ROWS, LENGTH, ROLLOUTS, RATE, KL_COEF, PASSES, LAST = 64, 48, 40, 1e-3, 0.05, 2, 5
ARMS = {
    "two adapters": {"side": "ours", "value_model": "own"},
    "shared trunk": {"side": "ours", "value_model": "policy_trunk"},
    "TRL": {"side": "trl"},
}


def toy_sft() -> str:
    from rlhf_nb.protocol.spec import NamedModel
    from rlhf_nb.training import models
    from rlhf_nb.training.context import Emitter

    return models.resolver(Path(), Emitter(None))(NamedModel(name="toy-sft"))


def found(scores: list[float], kl: list[float]) -> dict[str, float]:
    first, last = scores[0], statistics.fmean(scores[-LAST:])
    return {"start": first, "end": last, "gain": last - first, "kl": statistics.fmean(kl[-LAST:])}


def run_ours(asked: dict[str, Any]) -> dict[str, float]:
    from rlhf_nb.compute.rundir import RunDir
    from rlhf_nb.methods.ppo import PPO
    from rlhf_nb.protocol.spec import LoRA, NamedData, NamedModel, NamedReward, RunSpec
    from rlhf_nb.training import job

    method = PPO(
        max_steps=2 * PASSES * ROLLOUTS, rollout_batch_size=ROWS, batch_size=ROWS // 2, num_ppo_epochs=PASSES,
        max_new_tokens=LENGTH, max_length=256, sample_every=0, learning_rate=RATE, kl_coef=KL_COEF, seed=asked["seed"],
        value_model=asked["value_model"],
    )  # fmt: skip
    root = Path(asked["folder"])
    place = RunDir(root / f"run-{os.getpid()}")
    place.create(
        RunSpec(
            run_id=place.run_id, workspace_id="bench", method="ppo", config=method.model_dump(mode="json"),
            policy=NamedModel(name="toy-sft"), reward=NamedReward(name="toy-true"), data=NamedData(name="toy-prompts"),
            adapter=LoRA(r=16, alpha=32), created=0.0,
        )
    )  # fmt: skip
    job.run(place.path, blobs=root, runs_root=root, rank=0, world_size=1, warm=False, attempt=1, resume_from=None)
    rows = [e.values for e in place.events() if e.kind == "metric" and "reward/score" in e.values]
    return found([row["reward/score"] for row in rows], [row["kl/policy_reference"] for row in rows])


def run_trl(asked: dict[str, Any]) -> dict[str, float]:
    sys.path.insert(0, asked["trl"])
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from rlhf_nb.toy import true_reward
    from rlhf_nb.training import data
    from rlhf_nb.training.data import embedded_rows

    path = toy_sft()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    _, rows = embedded_rows("toy-prompts")
    by_tokens = {tuple(data.prompt_ids(row["prompt"], tokenizer)): row["prompt"] for row in rows}
    longest = max(map(len, by_tokens))

    class Backbone(torch.nn.Module):
        """Reads the text of each row and gives its true reward at every position: TRL takes a model, not a function."""

        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            prompts, completions = [], []
            for tokens, seen in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
                kept = [token for token, on in zip(tokens, seen, strict=True) if on]
                end = next(n for n in range(min(longest, len(kept)), 0, -1) if tuple(kept[:n]) in by_tokens)
                prompts.append(by_tokens[tuple(kept[:end])])
                completions.append(tokenizer.decode(kept[end:], skip_special_tokens=True).strip())
            scores = torch.tensor(true_reward(prompts, completions))
            return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1).clone()])

    class TrueReward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    config = PPOConfig(
        output_dir=str(Path(asked["folder"]) / "trl"), per_device_train_batch_size=ROWS, gradient_accumulation_steps=1,
        num_mini_batches=2, total_episodes=ROLLOUTS * ROWS, num_ppo_epochs=PASSES, response_length=LENGTH,
        local_rollout_forward_batch_size=ROWS, learning_rate=RATE, lr_scheduler_type="constant", kl_coef=KL_COEF,
        num_sample_generations=0, stop_token="eos", temperature=1.0, report_to="none", save_strategy="no", use_cpu=True,
        logging_steps=1, bf16=False, gradient_checkpointing=False, seed=asked["seed"],
    )  # fmt: skip
    torch.manual_seed(asked["seed"])
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, ref_model=None, reward_model=TrueReward(),
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        value_model=AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=1),
        train_dataset=Dataset.from_list([{"input_ids": list(tokens)} for tokens in by_tokens]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    log = [row for row in trainer.state.log_history if "objective/scores" in row]
    return found([row["objective/scores"] for row in log], [row["objective/kl"] for row in log])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--trl", type=Path, metavar="DIR", help="folder with trl 1.12.0")
    made.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS (default 2)")
    made.add_argument("--arm", help="be one run (used by this script)")
    args = made.parse_args()
    if args.arm:
        asked = json.loads(args.arm)
        print(json.dumps({"ours": run_ours, "trl": run_trl}[asked["side"]](asked)))
        return
    if args.trl is None:
        made.error("--trl is needed: pip install --no-deps --target DIR trl==1.12.0")
    repeats = args.repeats or (1 if args.quick else 3)
    seeds = dict.fromkeys(ARMS, 0)

    def arm(name: str) -> dict[str, float]:
        seed, seeds[name] = seeds[name], seeds[name] + 1
        asked = {**ARMS[name], "seed": seed, "folder": str(folder), "trl": str(args.trl.resolve())}
        return child("lora_learning.py", "--arm", json.dumps(asked))

    with scratch(args.threads) as folder:
        toy_sft()
        runs = interleave(repeats, {name: lambda name=name: arm(name) for name in ARMS}, args.calm)
    figures = {name: {key: summary([one[key] for one in runs[name]]) for key in runs[name][0]} for name in ARMS}
    lines = [
        f"{name}: true reward {text(of['start'], '')} → {text(of['end'], '')}, gain {text(of['gain'], '')}, "
        f"KL {text(of['kl'], 'nats', digits=1)}"
        for name, of in figures.items()
    ]
    settings = {"rows": ROWS, "rollouts": ROLLOUTS, "learning_rate": RATE, "kl_coef": KL_COEF, "passes": PASSES}
    report(
        "lora_learning",
        args,
        [f"{ROWS * ROLLOUTS} samples, {repeats} seeds", *lines],
        {},
        settings=settings,
        arms=figures,
    )


if __name__ == "__main__":
    main()
