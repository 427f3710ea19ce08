"""Names to classes, for methods, rewards and launchers. A plugin package adds its own through an entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from rlhf_nb.errors import NotFoundError, did_you_mean


class Registry:
    """A literal table of `name → "module:attribute"`, plus what installed packages declare in an entry-point group."""

    def __init__(self, what: str, group: str, table: dict[str, str]) -> None:
        self.what, self.group, self._table = what, group, dict(table)
        self._plugins: dict[str, Any] | None = None

    def _entry_points(self) -> dict[str, Any]:
        if self._plugins is None:
            self._plugins = {point.name: point for point in entry_points(group=self.group)}
        return self._plugins

    def names(self) -> list[str]:
        return [*self._table, *(name for name in self._entry_points() if name not in self._table)]

    def __contains__(self, name: str) -> bool:
        return name in self._table or name in self._entry_points()

    def get(self, name: str) -> Any:
        """The object a name stands for.

        Raises:
            NotFoundError: No such name; the message suggests the nearest.
        """
        if name in self._table:
            module, _, attribute = self._table[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in self._entry_points():
            return self._entry_points()[name].load()
        raise NotFoundError(
            f'{self.what} "{name}" does not exist{did_you_mean(name, self.names())}  known: {", ".join(self.names())}'
        )


methods = Registry(
    "method",
    "rlhf_nb.methods",
    {
        "sft": "rlhf_nb.methods.sft:SFT",
        "reward": "rlhf_nb.methods.reward_model:RewardModel",
        "dpo": "rlhf_nb.methods.dpo:DPO",
        "kto": "rlhf_nb.methods.kto:KTO",
        "orpo": "rlhf_nb.methods.orpo:ORPO",
        "simpo": "rlhf_nb.methods.simpo:SimPO",
        "online-dpo": "rlhf_nb.methods.online_dpo:OnlineDPO",
        "ppo": "rlhf_nb.methods.ppo:PPO",
        "grpo": "rlhf_nb.methods.grpo:GRPO",
        "dr-grpo": "rlhf_nb.methods.grpo:DrGRPO",
        "gspo": "rlhf_nb.methods.grpo:GSPO",
        "dapo": "rlhf_nb.methods.grpo:DAPO",
        "rloo": "rlhf_nb.methods.rloo:RLOO",
        "generate": "rlhf_nb.methods.generate:Generate",
        "judge": "rlhf_nb.methods.judge:JudgePairs",
        "constitutional": "rlhf_nb.methods.constitutional:ConstitutionalAI",
        "export": "rlhf_nb.methods.export:Export",
        "evaluate": "rlhf_nb.evaluation.accuracy:Evaluate",
    },
)
"""Training methods: `rl.SFT`, `%rlhf sft` and the form in the panel are the same class."""

rewards = Registry(
    "reward",
    "rlhf_nb.rewards",
    {
        "toy-true": "rlhf_nb.toy.reward:true_reward",
        "math-answer": "rlhf_nb.rewards.answers:math_answer",
        "numeric": "rlhf_nb.rewards.answers:numeric",
        "exact-match": "rlhf_nb.rewards.answers:exact_match",
        "regex": "rlhf_nb.rewards.patterns:regex",
        "json-schema": "rlhf_nb.rewards.patterns:json_schema",
        "ifeval": "rlhf_nb.rewards.ifeval:ifeval",
        "unit-tests": "rlhf_nb.rewards.unit_tests:unit_tests",
        "judge": "rlhf_nb.rewards.judge:judge",
    },
)
"""Reward functions `f(prompts, completions, **columns) -> list[float]`. Keyword-only parameters are the spec's options,
which no column can set."""

judges = Registry("judge", "rlhf_nb.judges", {"toy-annotator": "rlhf_nb.toy.judge:ToyJudge"})
"""Judges that are no chat model: classes with `create(**knobs)` and what `rlhf_nb.feedback.judge.Judge` asks for."""

launchers = Registry(
    "launcher",
    "rlhf_nb.launchers",
    {
        "local": "rlhf_nb.compute.transports.local:LocalKernel",
        "kernel": "rlhf_nb.compute.transports.kernel_file:KernelFile",
        "server": "rlhf_nb.compute.transports.server:Server",
    },
)
"""How the compute side's Jupyter kernel is started or found: classes with `to_dict` and `from_dict`."""
