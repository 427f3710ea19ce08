"""PPO beside TRL 1.12.0, the last TRL that had one: seconds a rollout and peak memory, same work on both sides.

A Llama of random weights (12.6 M parameters at a vocabulary of 8,000), prompts of 16 tokens, completions of `--length`
tokens without an end token, a reward model of the policy's size; `--rows` completions a rollout in two minibatches, two
passes over them; the same precision for rollout and update on both sides (in bf16 ours has reference and reward model in it
too, which TRL leaves in float32). Each arm is a process of its own; of
`--rollouts` the first warms up and the others count. Must: full parameters in fp32 at least 0.95 of TRL's speed (lower quartile), in bf16 at least 1.3.

The LoRA rows do less work than TRL's with LoRA, which trains a whole value model beside the adapter, and are another
learner: two adapters on one backbone (must 1.2), the value head on the policy's trunk (must 1.7; peak memory above imports
at most half). `--trl DIR` is a folder that `pip install --no-deps --target DIR trl==1.12.0` filled. `--count` counts the
multiplications of matrices and attention in a rollout instead, on both sides: whether it is the same work.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import child, interleave, parser, ratios, report, say, scratch, summary, text

ROLLOUTS = 4
ROWS = {
    "full fp32": ({}, {}),
    "full bf16": ({"precision": "bf16"}, {"bf16": True}),
    "lora, two adapters, fp32": ({"lora": True}, {"lora": True}),
    "lora, shared trunk, fp32": ({"lora": True, "value_model": "policy_trunk"}, {"lora": True}),
    "lora, two adapters, bf16": ({"lora": True, "precision": "bf16"}, {"lora": True, "bf16": True}),
    "lora, shared trunk, bf16": (
        {"lora": True, "value_model": "policy_trunk", "precision": "bf16"},
        {"lora": True, "bf16": True},
    ),
}
MUST = {
    "full fp32": ("q1", 0.95),
    "full bf16": ("median", 1.3),
    "lora, two adapters, fp32": ("median", 1.2),
    "lora, shared trunk, fp32": ("median", 1.7),
    # Held to the same as in fp32, though nobody asked.
    "lora, two adapters, bf16": ("median", 1.2),
    "lora, shared trunk, bf16": ("median", 1.7),
}


def save_models(folder: Path, vocabulary: int, layers: int = 6) -> None:
    """A word-level tokenizer, in which text and tokens are one to one, a policy and a reward model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = {f"w{number}": number for number in range(vocabulary)} | {"<end>": vocabulary}
    words["w0"] = 0
    raw = Tokenizer(models.WordLevel(words, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The end token lies beyond the policy's vocabulary: no completion can have one.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="w0")
    shape = {
        "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": None,
        "bos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape)).save_pretrained(folder / "policy")
    reward = LlamaForSequenceClassification(LlamaConfig(vocab_size=vocabulary + 8, num_labels=1, **shape))
    reward.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)


def prompts(vocabulary: int, n: int = 64) -> list[str]:
    import random

    chance = random.Random(0)
    # The space at the end keeps the first word of a completion from growing into the prompt's last.
    return [" ".join(f"w{chance.randrange(2, vocabulary)}" for _ in range(16)) + " " for _ in range(n)]


def memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


class Meter:
    """Seconds of each rollout, and the most memory above what was there when it was made."""

    def __init__(self, count: bool = False) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        Path("/proc/self/clear_refs").write_text("5")
        self.before = memory("VmRSS")
        self.marks = [time.perf_counter()]
        self.counter = FlopCounterMode(display=False) if count else None
        self.counted = [0]
        if self.counter is not None:
            self.counter.__enter__()

    def mark(self) -> None:
        self.marks.append(time.perf_counter())
        if self.counter is not None:
            self.counted.append(self.counter.get_total_flops())

    def found(self) -> dict[str, float]:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            return {"gflop": statistics.median(b - a for a, b in pairwise(self.counted[1:])) / 1e9}
        # The first rollout's time holds the loading of the models.
        seconds = [b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False)]
        return {"seconds": statistics.median(seconds), "memory": memory("VmHWM") - self.before}


def run_ours(asked: dict[str, Any]) -> dict[str, float]:
    from rlhf_nb.compute.rundir import EventWriter, RunDir
    from rlhf_nb.data.rows import content_hash, encode_rows
    from rlhf_nb.methods.ppo import PPO
    from rlhf_nb.protocol.spec import BlobData, LoRA, ModelReward, PathModel, RunSpec
    from rlhf_nb.training import job

    job.preload()
    root = Path(asked["folder"])
    rows = [{"prompt": prompt} for prompt in prompts(asked["vocabulary"])]
    (root / f"{content_hash(rows)}.jsonl").write_bytes(encode_rows(rows))
    method = PPO(
        max_steps=4 * asked.get("rollouts", ROLLOUTS), rollout_batch_size=asked["rows"],
        batch_size=asked["rows"] // 2, num_ppo_epochs=2,
        max_new_tokens=asked["length"], max_length=16 + asked["length"] + 1, sample_every=0, learning_rate=1e-6,
        value_model=asked.get("value_model", "own"), precision=asked.get("precision", "fp32"),
    )  # fmt: skip
    place = RunDir(root / f"run-{os.getpid()}")
    place.create(
        RunSpec(
            run_id=place.run_id, workspace_id="bench", method="ppo", config=method.model_dump(mode="json"),
            policy=PathModel(path=str(root / "policy")), reward=ModelReward(model=PathModel(path=str(root / "reward"))),
            data=BlobData(content_hash=content_hash(rows), row_kind="prompts", n=len(rows)),
            adapter=LoRA(r=16, alpha=32) if asked.get("lora") else None, created=0.0,
        )
    )  # fmt: skip
    meter = Meter(asked.get("count", False))
    write = EventWriter.write

    def written(self: EventWriter, event: Any) -> Any:
        if event.kind == "metric" and "time/update_s" in event.values:
            meter.mark()
        return write(self, event)

    EventWriter.write = written  # type: ignore[method-assign]
    job.run(place.path, blobs=root, runs_root=root, rank=0, world_size=1, warm=False, attempt=1, resume_from=None)
    sampling = [
        e.values["time/rollout_s"] for e in place.events() if e.kind == "metric" and "time/rollout_s" in e.values
    ]
    return {**meter.found(), "sampling": statistics.median(sampling[1:])}


def run_trl(asked: dict[str, Any]) -> dict[str, float]:
    sys.path.insert(0, asked["trl"])
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if trl.__version__ != "1.12.0":
        raise RuntimeError(f"--trl {asked['trl']} holds trl {trl.__version__}, not 1.12.0")
    root = Path(asked["folder"])
    tokenizer = AutoTokenizer.from_pretrained(root / "policy", padding_side="left")
    meter = Meter(asked.get("count", False))

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.mark()

    def model(architecture: Any, name: str, **more: Any) -> Any:
        return architecture.from_pretrained(root / name, dtype=torch.float32, **more)

    policy = model(AutoModelForCausalLM, "policy")
    adapter = None
    if asked.get("lora"):
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    # A rollout is per_device_train_batch_size × gradient_accumulation_steps, whatever num_mini_batches says.
    config = PPOConfig(
        output_dir=str(root / "trl"), per_device_train_batch_size=asked["rows"], gradient_accumulation_steps=1,
        num_mini_batches=2, total_episodes=asked.get("rollouts", ROLLOUTS) * asked["rows"],
        num_ppo_epochs=2, response_length=asked["length"],
        local_rollout_forward_batch_size=asked["rows"], learning_rate=1e-6, kl_coef=0.05, num_sample_generations=0,
        stop_token=None, temperature=1.0, report_to="none", save_strategy="no", use_cpu=True, logging_steps=1,
        bf16=asked.get("bf16", False), gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts(asked["vocabulary"])]
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy,
        ref_model=None if adapter else model(AutoModelForCausalLM, "policy"),
        reward_model=model(AutoModelForSequenceClassification, "reward", num_labels=1),
        value_model=model(AutoModelForSequenceClassification, "reward", num_labels=1),
        train_dataset=Dataset.from_list(rows), peft_config=adapter, callbacks=[Marks()],
    )  # fmt: skip
    trainer.train()
    return meter.found()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--trl", type=Path, metavar="DIR", help="folder with trl 1.12.0")
    made.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS on both sides (default 2)")
    made.add_argument("--length", type=int, default=48, help="tokens of a completion (default 48)")
    made.add_argument("--rows", type=int, default=16, help="completions of a rollout (default 16)")
    made.add_argument("--vocabulary", type=int, default=8000)
    made.add_argument(
        "--rollouts", type=int, default=ROLLOUTS, help="the first one warms up (default 4; 2 for memory alone)"
    )
    made.add_argument("--count", action="store_true", help="count operations instead of seconds")
    made.add_argument("--only", choices=list(ROWS), action="append", help="only this row")
    made.add_argument("--arm", help="be one side of one row (used by this script)")
    args = made.parse_args()
    if args.arm:
        asked = json.loads(args.arm)
        print(json.dumps({"ours": run_ours, "trl": run_trl}[asked["side"]](asked)))
        return
    if args.trl is None:
        made.error("--trl is needed: pip install --no-deps --target DIR trl==1.12.0")
    repeats = args.repeats or (1 if args.quick else 5)
    wanted = args.only or (["full fp32"] if args.quick else list(ROWS))
    figures: dict[str, Any] = {}
    lines, met = [], {}
    trl = str(args.trl.resolve())
    with scratch(args.threads) as folder:
        save_models(folder, args.vocabulary)
        base = {"folder": str(folder), "length": args.length, "rows": args.rows, "vocabulary": args.vocabulary}
        base |= {"trl": trl, "rollouts": args.rollouts}
        for name in wanted:
            ours, theirs = ROWS[name]
            say(name)
            if args.count:
                arms = {
                    side: {**base, **more, "side": side, "count": True}
                    for side, more in (("ours", ours), ("trl", theirs))
                }
                counted = {
                    side: child("ppo_vs_trl.py", "--arm", json.dumps(arm))["gflop"] for side, arm in arms.items()
                }
                figures[name] = {f"{side}_gflop": count for side, count in counted.items()}
                lines.append(f"{name}: ours {counted['ours']:.0f}, TRL {counted['trl']:.0f} GFLOP a rollout")
                continue
            found = interleave(
                repeats,
                {
                    "ours": lambda ours=ours: child(
                        "ppo_vs_trl.py", "--arm", json.dumps({**base, **ours, "side": "ours"})
                    ),
                    "trl": lambda theirs=theirs: child(
                        "ppo_vs_trl.py", "--arm", json.dumps({**base, **theirs, "side": "trl"})
                    ),
                },
                args.calm,
            )
            seconds = {side: [one["seconds"] for one in found[side]] for side in found}
            peak = {side: [one["memory"] / 2**20 for one in found[side]] for side in found}
            # Speed: TRL's seconds over ours, above 1 is faster than TRL.
            speed, less = ratios(seconds["trl"], seconds["ours"]), ratios(peak["ours"], peak["trl"])
            figures[name] = {"speed": speed, "memory": less}
            figures[name] |= {f"{side}_s": summary(seconds[side]) for side in seconds}
            figures[name] |= {f"{side}_mib": summary(peak[side]) for side in peak}
            lines += [
                f"{name}: TRL {text(summary(seconds['trl']))} a rollout, ours {text(summary(seconds['ours']))}",
                f"{name}: speed against TRL {text(speed, '×')}",
                f"{name}: peak memory {text(summary(peak['ours']), 'MiB', digits=0)} against "
                f"{text(summary(peak['trl']), 'MiB', digits=0)}: {text(less, '×')}",
            ]
            which, least = MUST[name]
            met[f"{name}: {which} at least {least}"] = speed[which] >= least
            if "shared trunk" in name:
                met[f"{name}: peak memory at most 0.5"] = less["median"] <= 0.5
    settings = {"rows": args.rows, "length": args.length, "vocabulary": args.vocabulary, "threads": args.threads}
    report("ppo_vs_trl", args, [f"{repeats} pairs, {settings}", *lines], met, settings=settings, rows=figures)


if __name__ == "__main__":
    main()
