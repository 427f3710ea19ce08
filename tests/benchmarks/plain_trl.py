"""The peer: a plain TRL script, as a person writes it, that never heard of rlhf_nb. Settings come as one JSON argument.

Prints one JSON object: `first_log` (Unix seconds of the first logged loss), `step_ends` (Unix seconds at which each
optimizer step's log was there) and `cpu` (process CPU seconds then).
"""

import json
import sys
import time

import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, set_seed


def vowels(completions, **columns):
    return [float(sum(c in "aeiou" for c in said[0]["content"])) for said in completions]


settings = json.loads(sys.argv[1])
more, beside = {}, {}
match settings["method"]:
    case "orpo":
        import trl.experimental.orpo as home

        kind = "ORPO"
    case "simpo":
        import trl.experimental.cpo as home

        kind, more = "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}
    case "online-dpo":
        import trl.experimental.online_dpo as home

        kind, more, beside = "OnlineDPO", {"max_new_tokens": settings["max_new_tokens"]}, {"reward_funcs": vowels}
    case method:
        home, kind = trl, {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO"}[method]
trainer_class, config_class = getattr(home, f"{kind}Trainer"), getattr(home, f"{kind}Config")


class Clock(TrainerCallback):
    def __init__(self):
        self.first_log, self.step_ends, self.cpu = None, [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.first_log is None and logs and "loss" in logs:
            self.first_log = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ends.append(time.time())
        self.cpu.append(time.process_time())


with open(settings["rows"]) as lines:
    rows = [json.loads(line) for line in lines]
set_seed(0)
clock = Clock()
trainer = trainer_class(
    model=settings["model"],
    args=config_class(
        output_dir=settings["output"],
        max_steps=settings["max_steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="linear",
        max_length=settings["max_length"],
        seed=0,
        activation_checkpointing=False,
        bf16=False,
        logging_steps=settings.get("logging_steps", 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    callbacks=[clock],
    **beside,
)
trainer.train()
print(json.dumps({"first_log": clock.first_log, "step_ends": clock.step_ends, "cpu": clock.cpu}))
