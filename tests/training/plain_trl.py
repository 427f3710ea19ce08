"""Plain TRL scripts, as a person writes them: no code of ours. Prints each trainer's log as one JSON object."""

import json
import sys

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def vowels(completions, **columns):
    return [float(sum(c in "aeiou" for c in said[0]["content"])) for said in completions]


settings = json.loads(sys.argv[1])
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "reward": (RewardTrainer, RewardConfig, {}),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "orpo": (ORPOTrainer, ORPOConfig, {}),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    "online-dpo": (OnlineDPOTrainer, OnlineDPOConfig, {"max_new_tokens": 8}),
}
logs = {}
for name, rows in settings["rows"].items():
    trainer_class, config_class, more = TRAINERS[name]
    set_seed(settings["seed"])
    trainer = trainer_class(
        model=settings["model"],
        args=config_class(
            output_dir=settings["output"],
            max_steps=settings["max_steps"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type=settings["lr_scheduler"],
            max_length=settings["max_length"],
            seed=settings["seed"],
            weight_decay=settings["weight_decay"],
            warmup_steps=settings["warmup_steps"],
            activation_checkpointing=False,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **more,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        **({"reward_funcs": vowels} if name == "online-dpo" else {}),
    )
    trainer.train()
    logs[name] = [log for log in trainer.state.log_history if "loss" in log]
print(json.dumps(logs))
