"""Several reward models that were trained in one run, as one reward function."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.data.rows import Prompt
from rlhf_nb.errors import SpecError
from rlhf_nb.protocol.spec import Over
from rlhf_nb.rewards.functions import finite
from rlhf_nb.rewards.model import BATCH, RewardModelScorer, check_head, on_trunk, trained_on
from rlhf_nb.training import models

if TYPE_CHECKING:
    from rlhf_nb.training.context import Emitter


class EnsembleScorer:
    """The members' scores of each completion, and the one number that they become."""

    def __init__(self, members: Sequence[RewardModelScorer], *, name: str, over: Over = "mean", std_coef: float = 1.0):
        self.members, self.name, self.over, self.std_coef = list(members), name, over, std_coef

    @classmethod
    def load(
        cls,
        path: str,
        *,
        over: Over = "mean",
        std_coef: float = 1.0,
        device: Any = None,
        emit: Emitter | None = None,
        batch_size: int = BATCH,
        dtype: Any = None,
    ) -> EnsembleScorer:
        """From a directory as training/ensemble.py saves it. Members that are adapters stand on one backbone."""
        from transformers import AutoModelForSequenceClassification

        layout = _layout(path)
        if layout["backbone"] is None:
            load = {"device": device, "batch_size": batch_size, "dtype": dtype}
            # The tokenizer is one for all and lies beside the members.
            found = [RewardModelScorer.load(member, tokenizer=path, **load) for member in _members(path, layout)]
        else:
            kwargs = {"dtype": dtype} if dtype is not None else {}
            backbone = str(Path(path) / layout["backbone"])
            whole = models.load_model(backbone, AutoModelForSequenceClassification, num_labels=1, **kwargs)
            more = {"device": device, "batch_size": batch_size}
            found = [on_trunk(path, member, whole.base_model, **more) for member in _members(path, layout)]
        return cls(found, name=Path(path).name, over=over, std_coef=std_coef)

    @classmethod
    def load_on(
        cls, path: str, base: str, trunk: Any, *, over: Over = "mean", std_coef: float = 1.0, device: Any = None
    ) -> EnsembleScorer | None:
        """On another model's weights, where the members are adapters that were trained on `base`; else None."""
        layout = _layout(path)
        members = _members(path, layout)
        if layout["backbone"] is None or not all(trained_on(member, base) for member in members):
            return None
        found = [on_trunk(path, member, trunk, device=device) for member in members]
        return cls(found, name=Path(path).name, over=over, std_coef=std_coef)

    def score_members(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[float]]:
        """(M, B) scores, a row a member.

        Raises:
            RewardError: A score that is not finite, with its index.
        """
        return [member.score(prompts, completions) for member in self.members]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One finite score for each completion, in order."""
        import torch

        from rlhf_nb.maths.rewards import combine

        if not completions:
            return []
        scores_MB = torch.tensor(self.score_members(prompts, completions), dtype=torch.float64)
        one_M = scores_MB.new_ones(len(self.members))
        return finite(combine(scores_MB.T, one_M, self.over, std_coef=self.std_coef), len(completions), self.name)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
        return self.score(prompts, completions)


def load_reward_model(
    path: str,
    *,
    over: Over = "mean",
    std_coef: float = 1.0,
    device: Any = None,
    emit: Emitter | None = None,
    batch_size: int = BATCH,
) -> RewardModelScorer | EnsembleScorer:
    """What a reward-model run saved: one model, or several.

    Raises:
        SpecError: It is no reward model; or it is a single one, and `over` asks for members.
    """
    check_head(path)
    if not is_ensemble(path):
        if over != "mean":
            raise SpecError(
                f"reward {Path(path).parent.name}: over={over} is over the members of an ensemble, and this is one "
                f"model; leave it out, or train with --set members=5"
            )
        return RewardModelScorer.load(path, device=device, emit=emit, batch_size=batch_size)
    return EnsembleScorer.load(path, over=over, std_coef=std_coef, device=device, emit=emit, batch_size=batch_size)


def is_ensemble(path: str) -> bool:
    return (Path(path) / models.ENSEMBLE).exists()


def _layout(path: str) -> dict[str, Any]:
    return json.loads((Path(path) / models.ENSEMBLE).read_text(encoding="utf-8"))


def _members(path: str, layout: dict[str, Any]) -> list[str]:
    # Names, never paths: a directory from elsewhere must not reach out of itself.
    return [str(Path(path) / Path(name).name) for name in layout["members"]]
