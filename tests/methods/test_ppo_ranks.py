"""PPO on two processes is PPO on one: the same tokens, gradients and weights, through ordinary launch flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from rlhf_nb import registry
from rlhf_nb.errors import SpecError
from rlhf_nb.methods.ppo import PPO
from rlhf_nb.protocol.control import SetReward, Stop
from rlhf_nb.protocol.spec import CombinedReward, FunctionReward, Launch, LoRA, RewardPart
from rlhf_nb.training import checkpoints, sharding

from .conftest import LETTERS, ROWS, VOWELS, fold, function, pretraining

CONFIG = {
    "max_steps": 10, "rollout_batch_size": 9, "batch_size": 3, "num_ppo_epochs": 1, "max_new_tokens": 6,
    "max_length": 80, "sample_every": 0, "learning_rate": 3e-3, "kl_coef": 0.2,
}  # fmt: skip
"""Minibatches of three rows: two ranks share each unevenly."""
FLAGS = {1: "", 2: "--multi_gpu --num_processes 2 --main_process_port 0"}
RANK = """
import dataclasses, json, os, sys
from pathlib import Path
import torch
from rlhf_nb.compute.rundir import EventWriter, append_line
from rlhf_nb.compute import worker
from rlhf_nb.training import actor_critic, distributed, job, online
from rlhf_nb.training.rollout.transformers_backend import TransformersSampler

asked = json.loads(sys.argv[1])
place, rank = Path(asked["place"]), int(os.environ.get("RANK", "0"))

if asked.get("double"):
    torch.set_default_dtype(torch.float64)
    load = actor_critic.models.load_model
    actor_critic.models.load_model = lambda *a, **k: load(*a, **{**k, "dtype": torch.float64})

if asked.get("after_step_1") or asked.get("when_held"):
    write = EventWriter.write
    def written(self, event):
        if event.kind == "metric" and event.step == 1 and "loss" in event.values and "after_step_1" in asked:
            append_line(place / "control.jsonl", asked["after_step_1"])
        if event.kind == "notice" and event.code == "not_finite":
            append_line(place / "control.jsonl", asked["when_held"])
        return write(self, event)
    EventWriter.write = written

if asked.get("beyond_after"):
    update = online.OnlineTrainer.update
    def beyond(self, minibatch, *a, **k):
        if self.step == asked["beyond_after"]:
            if not asked.get("on_one_rank"):
                self.live.learning_rate = 1e30
            elif rank == 1:
                minibatch = dataclasses.replace(minibatch, advantages_BT=minibatch.advantages_BT * float("nan"))
        return update(self, minibatch, *a, **k)
    online.OnlineTrainer.update = beyond

if asked.get("sampled_at"):
    sample = TransformersSampler.sample
    TransformersSampler.sample = lambda self, p, u, *, temperature: sample(self, p, u, temperature=asked["sampled_at"])

if asked.get("rollout"):
    collect = online.OnlineTrainer.collect
    def injected(self):
        path = Path(asked["rollout"])
        if path.exists():
            return torch.load(path, weights_only=False), {}
        rollout, seconds = collect(self)
        torch.save(rollout, path)
        return rollout, seconds
    online.OnlineTrainer.collect = injected
    clip = online.OnlineTrainer._clip
    def kept(self, norms):
        if rank == 0:
            torch.save({n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}, place / "grads.pt")
        return clip(self, norms)
    online.OnlineTrainer._clip = kept

train = online.OnlineTrainer.train
def counted(self):
    from torch.distributed.tensor import DTensor
    (place / f"shards-{rank}").write_text(str(sum(isinstance(p, DTensor) for p in self.module.parameters())))
    train(self)
online.OnlineTrainer.train = counted

resume_from = Path(asked["resume_from"]) if asked.get("resume_from") else None
job.run(place, blobs=place.parent, runs_root=place.parent, rank=rank, world_size=int(os.environ.get("WORLD_SIZE", "1")),
        warm=False, attempt=2 if resume_from else 1, resume_from=resume_from)
distributed.stop()
# As the worker does: torch's threads do not survive that the interpreter takes itself apart.
worker.leave_in_order()
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def ranks(job, tiny_model_maker, tmp_path):
    """Runs a prepared job on some ranks, launched as a person's is."""
    job.model = tiny_model_maker("still", dropout=0.0)
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def prepare(
        name: str,
        world: int,
        *,
        method: str = "ppo",
        reward: Any = LETTERS,
        flags: str | None = None,
        spec: Any = None,
        **knobs: Any,
    ):
        launch = Launch.parse(FLAGS[world] if flags is None else flags)
        known = registry.methods.get(method).model_fields
        config = {name: value for name, value in CONFIG.items() if name in known} | knobs
        return job.prepare(method, ROWS, name=name, config=config, reward=reward, launch=launch, **(spec or {}))

    def run(place: Any, *, fails: bool = False, **asked: Any) -> str:
        flags = place.spec().launch.flags
        # One rank alone needs no launcher, which takes seconds to import.
        program = [Path(sys.executable).parent / "accelerate", "launch", *flags] if flags else [sys.executable]
        done = subprocess.run(
            [*program, script, json.dumps({"place": str(place.path), **asked})],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stderr[-4000:]
        return done.stderr

    run.prepare, run.job = prepare, job  # type: ignore[attr-defined]
    return run


def numbers(place: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in fold(place).table()]


def same(one: Any, two: Any, **tolerance: float) -> None:
    a, b = numbers(one), numbers(two)
    assert [row["step"] for row in a] == [row["step"] for row in b] != []
    for left, right in zip(a, b, strict=True):
        assert left == pytest.approx(right, **tolerance)


def test_in_float32_two_ranks_are_one_run_and_so_is_what_a_restart_makes_of_it(ranks):
    knobs = {"max_steps": 8, "checkpoint_every": 3, "sample_every": 2}
    one, two = ranks.prepare("one", 1, **knobs), ranks.prepare("two", 2, **knobs)
    ranks.job.run(one)
    ranks(two)
    assert two.events()[0].world_size == 2 and numbers(one)[0]["reward/score"] == numbers(two)[0]["reward/score"]
    same(one, two, rel=2e-3, abs=2e-5)
    before = numbers(two)
    ranks(two, resume_from=str(checkpoints.directory(two.path, 6)))
    for a, b in zip(before, numbers(two), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("features", ["plain", "everything", "groups"])
def test_in_float64_ten_steps_on_two_ranks_are_ten_on_one(ranks, features):
    """Everything: a combined reward, one part of it replaced on the way, Preference As Reward, pretraining rows,
    running normalisation and whitened rewards. Groups: DAPO, whose flat groups are sampled again."""
    reward: Any = LETTERS
    knobs: dict[str, Any] = {}
    asked: dict[str, Any] = {"double": True}
    spec: dict[str, Any] = {}
    if features == "everything":
        reward = CombinedReward(parts=(RewardPart(reward=LETTERS), RewardPart(reward=VOWELS, weight=0.5)))
        knobs = {"preference_references": 2, "ptx_coef": 0.5, "whiten_rewards": True, "score_normalisation": "running"}
        spec = {"pretraining": pretraining(ranks.job)}
        asked["after_step_1"] = SetReward(part="vowels", reward=LETTERS, id="fresh").model_dump(mode="json")
    if features == "groups":
        reward = function("thirds", "float(sum(c.isascii() and c.isalpha() for c in text) % 3 == 0)")
        knobs = {"method": "dapo", "group_size": 3, "num_iterations": 2, "beta": 0.2, "overlong_cache": 0}
    places = [ranks.prepare(f"{world}", world, reward=reward, spec=spec, **knobs) for world in (1, 2)]
    for place in places:
        ranks(place, **asked)
    one, two = places
    same(one, two, rel=1e-8, abs=1e-9)
    if features == "everything":
        assert [len(fold(place).rewards) for place in places] == [1, 1]
    if features == "groups":
        assert sum(row.get("group/replaced", 0) for row in numbers(two)) > 0
    # The model is saved as it was computed, in float64.
    first, second = (load_file(place.model / "model.safetensors") for place in places)
    for name, weight in first.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-9)


def test_in_float32_gradients_on_the_same_rollout_agree(ranks):
    injected = str(ranks.job.root / "rollout.pt")
    places = [ranks.prepare(f"{world}", world, max_steps=1) for world in (1, 2)]
    for place in places:
        ranks(place, rollout=injected)
    one, two = (torch.load(place.path / "grads.pt") for place in places)
    assert one.keys() == two.keys() and len(one) > 10
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_one_rank_s_exception_ends_all_quickly_with_its_message(ranks):
    source = (
        "def picky(prompts, completions):\n    import os\n"
        "    if os.environ['RANK'] == '1':\n        raise ValueError('rank one does not like it')\n"
        "    return [1.0] * len(completions)"
    )
    place = ranks.prepare("two", 2, reward=FunctionReward(name="picky", source=source))
    began = time.monotonic()
    assert "rank one does not like it" in ranks(place, fails=True)
    assert time.monotonic() - began < 200


def test_a_config_file_without_a_number_of_ranks_beside_it_is_refused():
    with pytest.raises(SpecError, match=r"say it beside: --config_file my\.yaml --num_processes 2"):
        Launch.parse("--config_file my.yaml")
    with pytest.raises(SpecError, match="close the quote"):
        Launch.parse("--config_file 'my.yaml")


def test_an_accelerate_config_file_launches_it_too(ranks):
    config = ranks.job.root / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nnum_machines: 1\n"
        "machine_rank: 0\nmain_process_port: 0\nmixed_precision: 'no'\nuse_cpu: false\nrdzv_backend: static\n"
        "same_network: true\n"
    )
    one = ranks.prepare("one", 1, max_steps=4, spec={"adapter": LoRA(r=4)})
    two = ranks.prepare(
        "two", 2, max_steps=4, spec={"adapter": LoRA(r=4)}, flags=f"--config_file {config} --num_processes 2"
    )
    ranks.job.run(one)
    ranks(two)
    assert two.events()[0].world_size == 2
    same(one, two, rel=2e-3, abs=2e-5)


FSDP = """compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_processes: 2
num_machines: 1
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
use_cpu: false
rdzv_backend: static
same_network: true
fsdp_config:
  fsdp_version: {version}
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
"""


@pytest.mark.parametrize(
    ("knobs", "adapter"),
    [
        ({"reference": "ema", "reference_decay": 0.7}, None),
        ({}, LoRA(r=4)),
        ({"value_model": "policy_trunk"}, LoRA(r=4)),
    ],
    ids=["full", "two adapters", "shared trunk"],
)
def test_weights_sharded_over_two_ranks_train_as_whole_ones_do(ranks, knobs, adapter):
    config = ranks.job.root / "fsdp.yaml"
    config.write_text(FSDP.format(version=2))
    knobs = {**knobs, "max_steps": 8, "checkpoint_every": 3, "sample_every": 4, "micro_batch_size": 1}
    one = ranks.prepare("one", 1, spec={"adapter": adapter}, **knobs)
    two = ranks.prepare("two", 2, spec={"adapter": adapter}, flags=f"--config_file {config} --num_processes 2", **knobs)
    ranks.job.run(one)
    ranks(two)
    assert two.events()[0].world_size == 2
    assert min(int((two.path / f"shards-{rank}").read_text()) for rank in (0, 1)) > 10
    for a, b in zip(numbers(one), numbers(two), strict=True):
        # A ratio of differences: rounding weighs more in it.
        snr = "optimizer/gradient_snr"
        assert a.keys() == b.keys() and a.pop(snr, 0.0) == pytest.approx(b.pop(snr, 0.0), rel=5e-2, abs=1e-3)
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)
    assert any("optimizer/gradient_snr" in row for row in numbers(two))
    first, second = (load_file(place.model / "model.safetensors") for place in (one, two))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=2e-3)
    if adapter is not None:
        return
    # A checkpoint of a sharded run is whole, and is gone on from.
    before = numbers(two)
    ranks(two, resume_from=str(checkpoints.directory(two.path, 6)))
    for a, b in zip(before, numbers(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


def test_a_doctor_that_looks_between_gradient_and_step_leaves_sharded_weights_as_they_are(ranks):
    config = ranks.job.root / "fsdp.yaml"
    config.write_text(FSDP.format(version=2))
    one = ranks.prepare("one", 1, max_steps=6)
    two = ranks.prepare("two", 2, flags=f"--config_file {config} --num_processes 2", max_steps=6)
    for place in (one, two):
        ranks(place, sampled_at=1.5)
        assert "kl_doctor/mismatch" in {notice.code for notice in fold(place).notices}
    for a, b in zip(numbers(one), numbers(two), strict=True):
        snr = "optimizer/gradient_snr"
        assert a.pop(snr, 0.0) == pytest.approx(b.pop(snr, 0.0), rel=5e-2, abs=1e-3)
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize(("on_one_rank", "culprit"), [(False, ""), (True, "advantages;")], ids=["all", "one"])
def test_sharded_weights_go_back_to_the_last_good_checkpoint_too(ranks, on_one_rank, culprit):
    config = ranks.job.root / "fsdp.yaml"
    config.write_text(FSDP.format(version=2))
    knobs = {"max_steps": 9, "checkpoint_every": 3}
    place = ranks.prepare("two", 2, flags=f"--config_file {config} --num_processes 2", **knobs)
    ranks(place, beyond_after=4, on_one_rank=on_one_rank, when_held=Stop().model_dump(mode="json"))
    (text,) = [notice.text for notice in fold(place).notices if notice.code == "not_finite"]
    assert f"first not finite is {culprit}" in text and "back at its checkpoint of step 3 and paused" in text
    saved = load_file(place.model / "model.safetensors")
    kept = load_file(checkpoints.directory(place.path, 3) / "trained.safetensors")
    for name, weight in saved.items():
        torch.testing.assert_close(weight, kept[f"policy.{name}"])


def test_a_sharding_that_the_loop_cannot_follow_is_refused_in_one_line(ranks):
    config = ranks.job.root / "fsdp.yaml"
    config.write_text(FSDP.format(version=1))
    place = ranks.prepare("two", 2, flags=f"--config_file {config} --num_processes 2")
    assert "use fsdp_version 2, or --multi_gpu" in ranks(place, fails=True)


@pytest.mark.parametrize(
    ("knobs", "adapter", "reason"),
    [
        ({}, LoRA(r=4, quantize="4bit"), "use quantize=none"),
        ({"optimizer": "adamw_8bit"}, None, "which FSDP does not shard; use optimizer=adamw"),
    ],
)
def test_what_is_packed_into_bytes_is_refused_before_it_is_sharded(monkeypatch, knobs, adapter, reason):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=True))
    found = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    monkeypatch.setattr(sharding, "Accelerator", lambda **_: found)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=reason) as said:
        sharding.accelerator(False, PPO(**knobs), SimpleNamespace(adapter=adapter))
    assert "\n" not in str(said.value)
    assert sharding.accelerator(False, PPO(), SimpleNamespace(adapter=None)) is found
