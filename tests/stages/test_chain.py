"""A chain of methods, each stage from the last one's saved model."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from rlhf_nb.protocol.spec import NamedReward, RunModel
from rlhf_nb.toy import demonstrations, pairs, prompts

FEW = {"max_steps": 1, "batch_size": 2, "sample_every": 0, "max_length": 200, "learning_rate": 0.0}
ONLINE = {**FEW, "max_new_tokens": 4, "rollout_batch_size": 2}
STAGES = {
    # Only the first one learns: what comes out at the end shows what every later stage began with.
    "sft": (demonstrations(4), {**FEW, "learning_rate": 1e-2}, {}),
    "dpo": (pairs(4), FEW, {}),
    "grpo": (prompts(4), {**ONLINE, "group_size": 2}, {"reward": NamedReward(name="toy-true")}),
    "ppo": (prompts(4), {**ONLINE, "num_ppo_epochs": 1}, {"reward": NamedReward(name="toy-true")}),
}


@pytest.mark.slow
def test_each_stage_takes_the_last_ones_saved_model(job):
    places, last = [], {}
    for method, (rows, config, given) in STAGES.items():
        places.append(job(method, rows, name=f"{method}-1", config=config, **last, **given))
        last = {"policy": RunModel(run_id=f"{method}-1")}
    assert [place.spec().parents for place in places] == [(), *((place.run_id,) for place in places[:-1])]
    base = load_file(job.model / "model.safetensors")
    first, *later = (load_file(place.model / "model.safetensors") for place in places)
    assert any((first[name] != base[name]).any() for name in base)
    for weights in later:
        assert weights.keys() == first.keys() and all((weights[name] == first[name]).all() for name in first)
