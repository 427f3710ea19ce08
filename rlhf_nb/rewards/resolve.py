"""One call for every kind of reward a spec can name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlhf_nb.protocol.spec import FunctionReward, ModelReward, NamedReward, reward_parts
from rlhf_nb.rewards.functions import RewardFunction, from_reference
from rlhf_nb.rewards.model import RewardModelScorer

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


def load(
    context: Context, reference: NamedReward | ModelReward | FunctionReward, *, device: Any = None
) -> RewardFunction:
    """f(prompts, completions, **columns) → one finite number each.

    A reward model is loaded now, onto `device`.

    Raises:
        RlhfError: No such model, no reward model, or source that does not run.
    """
    if isinstance(reference, ModelReward):
        return RewardModelScorer.load(context.model_path(reference.model), device=device, emit=context.emit)
    return from_reference(reference)


def scorer(context: Context, role: Literal["reward", "gold"], *, device: Any = None) -> RewardFunction | None:
    """The reward that a spec names alone in a role, or None."""
    parts = reward_parts(getattr(context.spec, role))
    return load(context, parts[0].reward, device=device) if parts else None
