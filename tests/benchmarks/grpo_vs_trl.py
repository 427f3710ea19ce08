"""GRPO and RLOO beside TRL 1.16: seconds a rollout and peak memory, the same work on both sides.

The models of ppo_vs_trl.py: a Llama of random weights, prompts of 16 tokens, completions of `--length` tokens without an
end token, so that no row leaves early on either side; `--rows` completions in groups of four, one minibatch, two passes, a
reference held, a reward function that costs nothing. Ours samples with its own decode loop, TRL with transformers'
generate. Each arm is a process of its own; one rollout warms up, three count. Must: at least 1.2 of TRL's speed (median),
or the wrapped trainer would do.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from common import child, interleave, parser, ratios, report, say, scratch, summary, text
from ppo_vs_trl import ROLLOUTS, Meter, prompts, save_models

GROUP, PASSES = 4, 2
ROWS: dict[str, dict[str, Any]] = {
    "grpo fp32": {"method": "grpo"},
    "grpo bf16": {"method": "grpo", "bf16": True},
    "grpo lora, fp32": {"method": "grpo", "lora": True},
    "rloo fp32": {"method": "rloo"},
}
SOURCE = "def vowels(prompts, completions):\n    return [float(text.count('1')) for text in completions]"


def run_ours(asked: dict[str, Any]) -> dict[str, float]:
    from rlhf_nb import registry
    from rlhf_nb.compute.rundir import EventWriter, RunDir
    from rlhf_nb.data.rows import content_hash, encode_rows
    from rlhf_nb.protocol.spec import BlobData, FunctionReward, LoRA, PathModel, RunSpec
    from rlhf_nb.training import job

    job.preload()
    root = Path(asked["folder"])
    rows = [{"prompt": prompt} for prompt in prompts(asked["vocabulary"])]
    (root / f"{content_hash(rows)}.jsonl").write_bytes(encode_rows(rows))
    method = registry.methods.get(asked["method"]).create(
        max_steps=PASSES * ROLLOUTS, rollout_batch_size=asked["rows"], batch_size=asked["rows"], group_size=GROUP,
        num_iterations=PASSES, max_new_tokens=asked["length"], max_length=16 + asked["length"] + 1, sample_every=0,
        learning_rate=1e-6, precision="bf16" if asked.get("bf16") else "fp32",
    )  # fmt: skip
    place = RunDir(root / f"run-{os.getpid()}")
    place.create(
        RunSpec(
            run_id=place.run_id, workspace_id="bench", method=method.name, config=method.model_dump(mode="json"),
            policy=PathModel(path=str(root / "policy")), reward=FunctionReward(name="vowels", source=SOURCE),
            data=BlobData(content_hash=content_hash(rows), row_kind="prompts", n=len(rows)),
            adapter=LoRA(r=16, alpha=32) if asked.get("lora") else None, created=0.0,
        )
    )  # fmt: skip
    meter = Meter()
    write = EventWriter.write

    def written(self: EventWriter, event: Any) -> Any:
        if event.kind == "metric" and "time/update_s" in event.values:
            meter.mark()
        return write(self, event)

    EventWriter.write = written  # type: ignore[method-assign]
    job.run(place.path, blobs=root, runs_root=root, rank=0, world_size=1, warm=False, attempt=1, resume_from=None)
    events = [e.values for e in place.events() if e.kind == "metric"]
    sampling = [values["time/rollout_s"] for values in events if "time/rollout_s" in values]
    return {**meter.found(), "sampling": statistics.median(sampling[1:])}


def run_trl(asked: dict[str, Any]) -> dict[str, float]:
    import time

    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    root = Path(asked["folder"])
    meter = Meter()
    steps, sampling = [0], []

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps[0] += 1
            if steps[0] % PASSES == 0:
                meter.mark()

    kind = asked["method"].upper()
    base = getattr(trl, f"{kind}Trainer")

    class Timed(base):
        def _generate(self, *given: Any, **more: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate(*given, **more)
            sampling.append(time.perf_counter() - began)
            return made

    adapter = None
    if asked.get("lora"):
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    trainer = Timed(
        model=str(root / "policy"),
        reward_funcs=lambda prompts, completions, **_: scope["vowels"](prompts, completions),
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(root / "trl"), max_steps=PASSES * ROLLOUTS, per_device_train_batch_size=asked["rows"],
            num_generations=GROUP, num_iterations=PASSES, max_completion_length=asked["length"], learning_rate=1e-6,
            beta=0.04, lr_scheduler_type="constant", gradient_checkpointing=False, bf16=asked.get("bf16", False),
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts(asked["vocabulary"])]),
        processing_class=AutoTokenizer.from_pretrained(root / "policy"),
        peft_config=adapter,
        callbacks=[Marks()],
    )  # fmt: skip
    trainer.train()
    return {**meter.found(), "sampling": statistics.median(sampling[1:])}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS on both sides (default 2)")
    made.add_argument("--length", type=int, default=48, help="tokens of a completion (default 48)")
    made.add_argument("--rows", type=int, default=16, help="completions of a rollout (default 16)")
    made.add_argument("--vocabulary", type=int, default=8000)
    made.add_argument("--only", choices=list(ROWS), action="append", help="only this row")
    made.add_argument("--arm", help="be one side of one row (used by this script)")
    args = made.parse_args()
    if args.arm:
        asked = json.loads(args.arm)
        print(json.dumps({"ours": run_ours, "trl": run_trl}[asked["side"]](asked)))
        return
    repeats = args.repeats or (1 if args.quick else 5)
    wanted = args.only or (["grpo fp32"] if args.quick else list(ROWS))
    settings = {"rows": args.rows, "length": args.length, "vocabulary": args.vocabulary, "threads": args.threads}
    figures: dict[str, Any] = {}
    lines, met = [], {}
    with scratch(args.threads) as folder:
        save_models(folder, args.vocabulary)
        for name in wanted:
            say(name)
            asked = {**ROWS[name], "folder": str(folder), **settings}
            arms = {
                side: lambda asked={**asked, "side": side}: child("grpo_vs_trl.py", "--arm", json.dumps(asked))
                for side in ("ours", "trl")
            }
            found = interleave(repeats, arms, args.calm)
            # Speed: TRL's seconds over ours, above 1 is faster than TRL.
            told = {what: {side: [one[what] for one in found[side]] for side in found} for what in found["ours"][0]}
            speed = ratios(told["seconds"]["trl"], told["seconds"]["ours"])
            sampling = ratios(told["sampling"]["trl"], told["sampling"]["ours"])
            less = ratios(told["memory"]["ours"], told["memory"]["trl"])
            figures[name] = {"speed": speed, "sampling": sampling, "memory": less}
            figures[name] |= {f"{side}_s": summary(told["seconds"][side]) for side in arms}
            lines += [
                f"{name}: TRL {text(figures[name]['trl_s'])} a rollout, ours {text(figures[name]['ours_s'])}",
                f"{name}: speed against TRL {text(speed, '×')}; sampling alone {text(sampling, '×')}",
                f"{name}: peak memory against TRL {text(less, '×')}",
            ]
            met[f"{name}: median at least 1.2"] = speed["median"] >= 1.2
    report("grpo_vs_trl", args, [f"{repeats} pairs, {settings}", *lines], met, settings=settings, rows=figures)


if __name__ == "__main__":
    main()
