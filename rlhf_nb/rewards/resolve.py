"""One call for every kind of reward a spec can name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlhf_nb import registry
from rlhf_nb.protocol.spec import FunctionReward, ModelReward, NamedReward, reward_parts
from rlhf_nb.rewards.ensemble import EnsembleScorer, is_ensemble, load_reward_model
from rlhf_nb.rewards.functions import RewardFunction, checked, from_reference
from rlhf_nb.rewards.model import RewardModelScorer

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


def load(
    context: Context,
    reference: NamedReward | ModelReward | FunctionReward,
    *,
    device: Any = None,
    backbone: tuple[str, Any] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> RewardFunction:
    """f(prompts, completions, **columns) → one finite number each.

    A reward model is loaded now, onto `device`. A registered reward with an attribute `ready`, a function of its
    options, is asked whether it can work here; what it answers stands in the run's log. One with an attribute `open`,
    a function of the context and its options, is what that gives: it may hold a model.

    Args:
        backbone: A base model's directory, and its trunk with weights that stay as they are. A reward model that is an
            adapter of the same base then stands on them, and holds no weights of its own but the adapter's.
        precision: What a reward model computes in. bf16 also halves its memory; its head, and so the score, stays as it
            is.

    Raises:
        RlhfError: No such model, no reward model, source that does not run, or a reward that cannot work here.
    """
    if isinstance(reference, ModelReward):
        path = context.model_path(reference.model)
        over: dict[str, Any] = {"over": reference.over, "std_coef": reference.std_coef}
        found: RewardModelScorer | EnsembleScorer | None = None
        if backbone is not None and is_ensemble(path):
            found = EnsembleScorer.load_on(path, *backbone, device=device, **over)
        elif backbone is not None and reference.over == "mean":
            found = RewardModelScorer.load_on(path, *backbone, device=device)
        if found is not None:
            context.emit.notice(
                "shared_backbone", f"{found.name} is an adapter of the policy's base: it stands on the same weights"
            )
        else:
            found = load_reward_model(path, device=device, emit=context.emit, **over)
        members = found.members if isinstance(found, EnsembleScorer) else [found]
        for member in members if precision == "bf16" else ():
            member.compute_in_bf16()
        # Members of an ensemble read as much as each other.
        members[0].emit = context.emit
        return found
    if isinstance(reference, NamedReward):
        if (opening := getattr(registry.rewards.get(reference.name), "open", None)) is not None:
            return checked(opening(context, reference.config), reference.name)
        ready = getattr(registry.rewards.get(reference.name), "ready", None)
        if ready is not None:
            context.emit.notice("reward_ready", f"reward {reference.name}: {ready(**reference.config)}")
    return from_reference(reference)


def scorer(context: Context, role: Literal["reward", "gold"], *, device: Any = None) -> RewardFunction | None:
    """The reward that a spec names alone in a role, or None."""
    parts = reward_parts(getattr(context.spec, role))
    return load(context, parts[0].reward, device=device) if parts else None
