"""One call for every kind of reward a spec can name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from rlhf_nb.protocol.spec import ModelReward
from rlhf_nb.rewards.functions import RewardFunction
from rlhf_nb.rewards.model import RewardModelScorer

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


def scorer(
    context: Context, role: Literal["reward", "gold"] = "reward", *, device: Any = None
) -> RewardFunction | None:
    """f(prompts, completions, **columns) → one finite number each, or None where the spec names no such reward.

    A reward model is loaded now, onto `device`; call it once a run.
    """
    reference = getattr(context.spec, role)
    if isinstance(reference, ModelReward):
        return RewardModelScorer.load(context.model_path(reference.model), device=device, emit=context.emit)
    function: Callable[..., list[float]] | None = getattr(context, role)
    return function
