"""Every method killed by SIGKILL, in every phase it has, equals a run that never was. PPO has a test of its own."""

from __future__ import annotations

import pytest

from rlhf_nb import registry
from rlhf_nb.methods.base import Method
from rlhf_nb.methods.online import OnlineMethod
from rlhf_nb.toy import demonstrations, pairs
from tests.methods.conftest import ROWS, function, killed, same_to_the_bit

COMMON = {"max_steps": 14, "batch_size": 4, "sample_every": 0, "checkpoint_every": 1, "learning_rate": 1e-3}
GROUPS = {"rollout_batch_size": 8, "group_size": 4, "num_iterations": 2, "max_new_tokens": 6, "max_length": 80}
# Some groups are right or wrong as a whole: DAPO dies amid groups that are sampled again, too.
EVENS = function("evens", "float(sum(c.isascii() and c.isalpha() for c in text) % 5 == 0)")
ROWS_OF = {
    "demonstrations": demonstrations(12),
    "pairs": pairs(12),
    "thumbs": [row for n, pair in enumerate(pairs(6)) for row in
               ({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True},
                {"prompt": pair["prompt"], "completion": pair["rejected"], "label": False})],
    "prompts": ROWS,
}  # fmt: skip


def methods() -> list[type[Method]]:
    """Ours that train, but PPO."""
    found = (registry.methods.get(name) for name in registry.methods.names())
    return [one for one in found if one.trains and one.__module__.startswith("rlhf_nb.methods.") and one.name != "ppo"]


@pytest.mark.timeout(900)
def test_every_method_killed_in_every_phase_equals_a_run_that_never_was(job, tiny_model_maker):
    job.model = tiny_model_maker("still", dropout=0.0)

    def prepare(method: type[Method], name: str):
        config = dict(COMMON)
        if issubclass(method, OnlineMethod):
            config |= {**GROUPS, "batch_size": 8, "max_steps": 32}
        elif method.needs_reward:
            config |= {"batch_size": 2, "max_new_tokens": 6}
        reward = EVENS if method.needs_reward else None
        named = {"config": config, "kind": method.rows, "reward": reward}
        return job.prepare(method.name, ROWS_OF[method.rows], name=f"{method.name}-{name}", **named)

    chosen = methods()
    assert len(chosen) >= 12
    whole = [job.run(prepare(method, "whole")) for method in chosen]
    places = [prepare(method, "killed") for method in chosen]
    said = killed(*places, each=1)
    for method, one, place, never in zip(chosen, said, places, whole, strict=True):
        assert len(one["hit"]) == (4 if method.needs_reward else 2), (method.name, one)
        same_to_the_bit(place, never)
