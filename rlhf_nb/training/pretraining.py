"""Rows whose likelihood is kept up while a policy is optimised: PPO-ptx.

Ouyang et al. 2022, arXiv:2203.02155, eq. 2: the objective gains `ptx_coef` times the mean log-likelihood of a token of
the pretraining data, so that what the reward does not ask about is not forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlhf_nb.errors import DataError
from rlhf_nb.maths.masked import masked_sum
from rlhf_nb.training import data

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer


class Pretraining:
    def __init__(self, trainer: OnlineTrainer, max_length: int) -> None:
        self.trainer = trainer
        rows = trainer.context.pretraining or []
        ids = [data.conversation_ids(row["prompt"], row["completion"], trainer.tokenizer) for row in rows]
        self.ids = [tokens[:max_length] for tokens in ids if len(tokens) > 1]
        if not self.ids:
            raise DataError(f"{trainer.method.name}: pretraining has no row of two tokens or more; give other rows")

    def backward(self) -> Tensor:
        """Add the gradient of ptx_coef × the mean negative log-likelihood of a token; its sum over this rank's tokens
        divided by the tokens of all ranks, nats."""
        trainer = self.trainer
        chance = np.random.default_rng([trainer.method.seed, trainer.step, 4])
        chosen = chance.choice(
            len(self.ids), trainer.method.batch_size, replace=len(self.ids) < trainer.method.batch_size
        )
        tokens = sum(len(self.ids[index]) - 1 for index in chosen)
        mine = [self.ids[index] for index in chosen[trainer.context.rank :: trainer.context.world_size]]
        width = max(len(ids) for ids in mine)
        pad = trainer.tokenizer.pad_token_id
        tokens_BL = torch.tensor([ids + [pad] * (width - len(ids)) for ids in mine], device=trainer.device)
        lengths_B = torch.tensor([len(ids) for ids in mine], device=trainer.device)
        seen_BL = torch.arange(width, device=trainer.device) < lengths_B[:, None]
        loss = tokens_BL.new_zeros((), dtype=torch.float32)
        for rows, counts in trainer.shares(len(mine)):
            # The first token of a row is given: nothing predicts it.
            logprobs_BT, _, _ = trainer.model(
                tokens_BL[rows], seen_BL[rows], seen_BL[rows, 1:], with_values=False, with_entropy=False
            )
            part = -masked_sum(logprobs_BT, seen_BL[rows, 1:]) / tokens
            weight = trainer.live.ptx_coef if counts else 0.0
            trainer.accelerator.backward(weight * trainer.context.world_size * part)
            loss = loss + part.detach() * counts
        return loss
