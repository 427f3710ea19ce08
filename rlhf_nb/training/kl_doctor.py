"""When the KL to the reference reads wrong: what exactly is wrong, by name.

A KL that is negative, explodes, never moves, or is not zero before the first step is a symptom of a handful of faults.
Each has a check of its own here, run only once a symptom shows; what they find is one notice a symptom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_nb.maths import kl
from rlhf_nb.maths.masked import masked_mean, masked_sum
from rlhf_nb.training import sharding
from rlhf_nb.training.actor_critic import chances, trunk_and_head

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer
    from rlhf_nb.training.online_types import Rollout

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Nats a token by which sampler and trainer may differ: their kernels sum in another order."""
ROWS = 16
"""Completions that a check scores again."""
TEMPERATURES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0)


class KLDoctor:
    """Looks at every rollout; costs nothing while nothing is wrong."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self.still = 0
        self.last: float | None = None
        self.agreed = False
        """The sampler's log-probabilities were once the trainer's."""
        self.said: set[str] = set()
        self._rollout: Rollout | None = None

    @property
    def tolerance(self) -> float:
        if self.trainer.method.precision == "bf16":
            return TOLERANCE[torch.bfloat16]
        return TOLERANCE.get(next(self.trainer.module.policy.parameters()).dtype, 1e-3)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a restart repeats no notice and forgets no symptom."""
        kept = {name: getattr(self, name) for name in ("still", "last", "agreed")}
        return kept | {"said": sorted(self.said)}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, set(value) if name == "said" else value)

    def look(self, rollout: Rollout) -> None:
        """Before the rollout's first update."""
        self._rollout = rollout
        if self.trainer.method.has_reference:
            for symptom, text in self._symptoms(rollout):
                self._say(symptom, text, rollout)

    def compared(self, nats: float) -> None:
        """What a rollout's first update measured, before it moved a weight: mean |log π_trainer − log π_sampler| a
        token."""
        rollout, self._rollout = self._rollout, None
        if nats <= self.tolerance:
            self.agreed = True
        elif rollout is not None:
            text = f"sampler and trainer differ by {nats:.3g} nats a token, where {self.tolerance:g} is rounding"
            # A forward outside would leave sharded weights half together before the step that is to come.
            with sharding.gathered(self.trainer.module):
                self._say("mismatch", text, rollout)

    def _say(self, symptom: str, text: str, rollout: Rollout) -> None:
        if symptom in self.said:
            return
        self.said.add(symptom)
        found = [line for check in CHECKS[symptom] if (line := check(self, rollout)) is not None]
        level = "info" if symptom == "noise" else "warning"
        reason = found[0] if found else OTHERWISE[symptom]
        self.trainer.emit.notice(f"kl_doctor/{symptom}", f"{text}: {reason}", level)

    def _symptoms(self, rollout: Rollout) -> Iterator[tuple[str, str]]:
        difference_BT = rollout.behavior_logprobs_BT - rollout.reference_logprobs_BT
        kl_B = masked_sum(difference_BT, rollout.mask_BT, 1)
        mean, error = kl_B.mean().item(), (kl_B.std() / len(kl_B) ** 0.5).item() if len(kl_B) > 1 else 0.0
        apart = masked_mean(difference_BT.abs(), rollout.mask_BT).item()
        before, self.last = self.last, mean
        if self.trainer.step == 0:
            if apart > self.tolerance:
                yield "start", f"KL is {mean:.3g} nats before the first step, where policy and reference are one model"
            return
        self.still = self.still + 1 if apart < 0.01 * self.tolerance else 0
        if self.still == 3:
            yield "stuck", "policy and reference have said the same for three rollouts"
        if mean < -3 * error - 1e-2:
            yield "negative", f"KL is {mean:.3g} ± {error:.2g} nats, and no KL is negative"
        elif mean < -1e-2:
            yield "noise", f"KL reads {mean:.3g} ± {error:.2g} nats"
        if not mean < 1.0 * rollout.mask_BT.sum(1).float().mean().item() or (before and mean > max(10.0, 5 * before)):
            yield "exploding", f"KL went from {before or 0.0:.3g} to {mean:.3g} nats in one rollout"

    # --- what the checks ask of the models --------------------------------------------------------------------------

    @torch.no_grad()
    def scored(self, rollout: Rollout, temperature: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The trainer's own log-probabilities of some completions, the sampler's, and the mask."""
        tokens, seen, mask = (each[:ROWS] for each in (rollout.tokens_BL, rollout.attention_mask_BL, rollout.mask_BT))
        policy, _, _ = self.trainer.module(
            tokens, seen, mask, temperature=temperature or rollout.temperature, with_values=False, with_entropy=False
        )
        return policy, rollout.sampler_logprobs_BT[:ROWS], mask

    def apart(self, rollout: Rollout, temperature: float | None = None) -> float:
        policy, behavior, mask = self.scored(rollout, temperature)
        return masked_mean((policy - behavior).abs(), mask).item()


def dropout(doctor: KLDoctor, rollout: Rollout) -> str | None:
    """A policy with dropout differs from itself."""
    module = doctor.trainer.module
    for name, holder, attribute in chances(module):
        if module.get_submodule(name).training:
            rate = f"{'dropout' if attribute == 'p' else attribute}={getattr(holder, attribute):g}"
            return f"{rate} is on in {name or 'the policy'}; set it to 0 in the model's config"
    return None


def end_tokens(doctor: KLDoctor, rollout: Rollout) -> str | None:
    """A completion's last token that counts is its end token, and none stands before; pads never count."""
    ends = torch.tensor(sorted(doctor.trainer.sampler.end_tokens), device=rollout.mask_BT.device)
    completion_BT = rollout.tokens_BL[:, -rollout.mask_BT.shape[1] :]
    is_end_BT = torch.isin(completion_BT, ends) & rollout.mask_BT
    inside = int((is_end_BT.sum(1) > rollout.ended_B.long()).sum())
    if inside:
        return (
            f"{inside} of {len(completion_BT)} completions count tokens after their end token; the pad token "
            f"{doctor.trainer.tokenizer.pad_token!r} may be taken for text"
        )
    missing = int((rollout.ended_B & ~is_end_BT.any(1)).sum())
    return f"{missing} of {len(completion_BT)} completions do not count their end token" if missing else None


def tokenizer(doctor: KLDoctor, rollout: Rollout) -> str | None:
    """Token numbers mean what the policy learnt they mean."""
    trainer = doctor.trainer
    known, rows = len(trainer.tokenizer), int(trunk_and_head(trainer.module.policy)[1].get_parameter("weight").shape[0])
    if known > rows:
        return f"the tokenizer has {known} tokens and the policy {rows}; give the tokenizer it was trained with"
    unknown = trainer.tokenizer.unk_token_id
    if unknown is not None and any(unknown in ids for ids in trainer.prompt_ids[:64]):
        return "prompts hold tokens that the tokenizer does not know; give the tokenizer the policy was trained with"
    return None


def sampling_settings(doctor: KLDoctor, rollout: Rollout) -> str | None:
    """Completions were drawn as they are scored: same temperature, no tokens cut off."""
    here = doctor.apart(rollout)
    if here <= doctor.tolerance:
        return None
    gaps = {temperature: doctor.apart(rollout, temperature) for temperature in TEMPERATURES}
    best = min(gaps, key=lambda temperature: gaps[temperature])
    if gaps[best] <= doctor.tolerance:
        return f"completions were drawn at temperature {best:g} and are scored at {rollout.temperature:g}"
    policy, behavior, mask = doctor.scored(rollout)
    if ((behavior - policy)[mask] >= -doctor.tolerance).all():
        return "the sampler gives every token more than the policy does, as with top-k or top-p; sample from all tokens"
    return None


def stale_sampler(doctor: KLDoctor, rollout: Rollout) -> str | None:
    """The sampler has the policy's weights of now."""
    if doctor.trainer.step and doctor.agreed and doctor.apart(rollout) > doctor.tolerance:
        return "the sampler agreed before the first update and no longer does: it samples from weights of before"
    return None


def another_reference(doctor: KLDoctor, rollout: Rollout) -> str | None:
    """Before the first step the reference is the policy."""
    if doctor.trainer.step or doctor.apart(rollout) > doctor.tolerance:
        return None
    return "the reference is another model than the one the policy starts from"


def only_noise(doctor: KLDoctor, rollout: Rollout) -> str | None:
    """k1 is right on average and negative by chance; k3 of the same completions never is."""
    k3_BT = kl.estimate(rollout.behavior_logprobs_BT, rollout.reference_logprobs_BT, "k3")
    k3 = masked_sum(k3_BT, rollout.mask_BT, 1).mean().item()
    return f"noise of k1 on {len(k3_BT)} completions; k3 on the same reads {k3:.3g} nats"


def nothing_moves(doctor: KLDoctor, rollout: Rollout) -> str | None:
    trainer = doctor.trainer
    if trainer.live.learning_rate == 0:
        return "learning_rate is 0"
    if (rollout.score_B == rollout.score_B[0]).all():
        return "every completion gets the same score"
    return None


Check = Callable[[KLDoctor, "Rollout"], "str | None"]
_FAULTS: tuple[Check, ...] = (dropout, tokenizer, end_tokens, sampling_settings, stale_sampler)
CHECKS: dict[str, tuple[Check, ...]] = {
    "start": (*_FAULTS, another_reference),
    "negative": _FAULTS,
    "noise": (only_noise,),
    "exploding": _FAULTS,
    "stuck": (nothing_moves,),
    "mismatch": _FAULTS,
}
"""Symptom → what may cause it, in the order in which one would hide the next."""
OTHERWISE = {
    "start": "no check found why; compare the two models' weights",
    "negative": "no check found why; score the completions with both models by hand",
    "noise": "",
    "exploding": "no fault was found; the policy is moving fast: raise kl_coef, or lower learning_rate",
    "stuck": "the updates are too small to change a word; raise learning_rate",
    "mismatch": "no check found why; sampler and trainer may compute in different precisions",
}
