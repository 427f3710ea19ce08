"""A loss or gradient that is not finite: caught before the weights take it, traced, and gone back from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlhf_nb.errors import ComputeError
from rlhf_nb.protocol.events import Resumed
from rlhf_nb.training import checkpoints, distributed, sharding
from rlhf_nb.training.online_checkpoint import load_checkpoint, note_kept

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer
    from rlhf_nb.training.online_types import Minibatch


class NotFiniteError(ComputeError):
    """A step was not taken, because it would have written what is not finite into the weights."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what


def check(trainer: OnlineTrainer, metrics: dict[str, float], batch: Minibatch, temperature: float) -> None:
    """Stop before a step that would write what is not finite into the weights, and say where it began.

    Raises:
        NotFiniteError: The loss or the gradient's norm is NaN or infinite.
    """
    wrong = [name for name in ("loss", "optimizer/grad_norm") if not np.isfinite(metrics[name])]
    if not wrong:
        return
    what = f"{wrong[0]}={metrics[wrong[0]]} at step {trainer.step + 1}: first not finite is "
    what += _culprit(trainer, batch, temperature, metrics["loss"])
    raise NotFiniteError(
        what,
        f"{what}; the weights are as after step {trainer.step}. Start again with a lower learning_rate (now "
        f"{trainer.live.learning_rate:g})",
    )


def hold(trainer: OnlineTrainer, error: NotFiniteError, batch: Minibatch, temperature: float) -> None:
    """Go back to the last good checkpoint and pause there, so that a person can lower what was too much.

    Good is a state from which the models still say something finite about the completions at hand: weights may be
    finite and far beyond use.
    """
    context = trainer.context
    if trainer.method.on_not_finite == "fail":
        raise error
    failed_at, asked, saved = trainer.step, dict(vars(trainer.live)), checkpoints.newest_first(context.run_dir)
    scoring = trainer.scoring
    rewards, last = list(scoring.parts), scoring.last
    beyond_use = []
    for path in saved:
        trainer.step, trainer.rollouts = load_checkpoint(path, trainer)
        if _speaks(trainer, batch, temperature):
            break
        beyond_use.append(path)
    else:
        if saved or not _speaks(trainer, batch, temperature):
            raise error
    # What a person asked for since then still holds.
    vars(trainer.live).update(asked)
    scoring.parts, scoring.last = rewards, last
    # kl_coef has moved by it.
    trainer.measured = None
    # Those of the rollout that is given up.
    trainer.noise.take()
    if saved:
        note_kept(path, trainer)
    distributed.barrier()
    if context.is_main:
        # A restart would take the newest that is there.
        for path in beyond_use:
            checkpoints.discard(path)
    trainer.optimizer.zero_grad(set_to_none=True)
    context.control.paused = True
    if saved:
        trainer.checkpointed = trainer.step
        trainer.emit.event(Resumed(step=trainer.step, attempt=context.attempt, from_step=trainer.step))
        back = f"the run is back at its checkpoint of step {trainer.step}"
    else:
        trainer.rollouts += 1
        back = f"no checkpoint was taken yet, so the weights stay as after step {failed_at}"
    trainer.emit.notice(
        "not_finite",
        f"{error.what}; {back} and paused. Lower learning_rate (now {trainer.live.learning_rate:g}) and resume, or "
        f"stop",
        "warning",
    )


@torch.no_grad()
def _speaks(trainer: OnlineTrainer, batch: Minibatch, temperature: float) -> bool:
    """Whether the models give finite numbers for a minibatch; the same answer on every rank."""
    with sharding.gathered(trainer.module):
        logprobs, _, values = trainer.module(
            batch.tokens_BL, batch.attention_mask_BL, batch.mask_BT, temperature=temperature, with_entropy=False
        )
    sound = all(each[batch.mask_BT].isfinite().all() for each in (logprobs, values))
    return all(distributed.gather_objects(bool(sound)))


@torch.no_grad()
def _culprit(trainer: OnlineTrainer, batch: Minibatch, temperature: float, loss: float) -> str:
    """The first thing, in the order of computing, that is not finite on any rank; the same answer on every rank."""
    # A forward takes all ranks, and each sees its own rows and its own part of the weights: so none looks before it.
    with sharding.gathered(trainer.module):
        logprobs, _, values = trainer.module(
            batch.tokens_BL, batch.attention_mask_BL, batch.mask_BT, temperature=temperature
        )
    parameters = dict(trainer.module.named_parameters())
    read = ("behavior_logprobs_BT", "reference_logprobs_BT", "values_BT", "returns_BT", "advantages_BT")
    looked_at: dict[str, Tensor] = {f"the weight {name}": parameter for name, parameter in parameters.items()}
    looked_at |= {name.removesuffix("_BT").replace("_", " "): getattr(batch, name)[batch.mask_BT] for name in read}
    looked_at |= {"the policy's log-probabilities": logprobs[batch.mask_BT], "the values": values[batch.mask_BT]}
    looked_at |= {f"the gradient of {name}": p.grad for name, p in parameters.items() if p.grad is not None}
    wrong = [name for name, tensor in looked_at.items() if not sharding.part(tensor).isfinite().all()]
    found = {name for names in distributed.gather_objects(wrong[:1]) for name in names}
    if found:
        return next(name for name in looked_at if name in found)
    return (
        "the loss itself" if not np.isfinite(loss) else "the gradients' norm, of gradients that are finite one by one"
    )
