"""What a reward model's trainer computes when the completions of a prompt stay together.

`RankingLoss` goes in front of TRL's RewardTrainer, which keeps the model, the adapters, the log and the checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_nb.maths.rankings import (
    bradley_terry_rankings,
    length_correlation,
    length_slope,
    plackett_luce_loss,
    prompt_mean,
)

LossType = Literal["bradley_terry", "plackett_luce"]
STATE = "length_term.json"
SMOOTHING = 0.05
"""Smallest share of the newest step in the length term's estimate: it forgets what is 20 steps and more ago."""
FURTHEST = 10.0
"""Bound of the length term, nats a standard deviation: comparisons that length alone separates have no finite one."""


class RankingLoss:
    """Mixin. Set `loss_type`, `length_debias` and `members` on the class before the trainer is built."""

    loss_type: LossType = "bradley_terry"
    length_debias: float = 0.0
    members: int = 1
    _total_train_tokens: int
    """TRL's; it sets it to 0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parts: list[Tensor] = []
        self.length_term = LengthTerm(self.members)
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # Places of rows: the collator has the tokens.
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["places"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        more = {"rows_M": inputs["rows_M"]} if self.members > 1 else {}
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **more)
        scores_N = outputs.logits.squeeze(-1).float()
        loss = self._loss(scores_N, inputs)
        if self.length_debias:
            still_N = scores_N.detach()
            derivatives = self.length_term.derivatives(lambda term_M: self._fit(still_N, inputs, term_M), still_N)
            self.length_term.add(self.accelerator.reduce(derivatives, "mean"))  # type: ignore[attr-defined]
            if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
                self.length_term.step()
        self._parts.append(self._measured(scores_N.detach(), inputs))
        return (loss, outputs) if return_outputs else loss

    def _loss(self, scores_N: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The sum over members: each one's gradient is what it would be alone."""
        loss = self._fit(scores_N, inputs, self.length_term.on(scores_N)).sum()
        if coefficient := self.args.center_rewards_coefficient:  # type: ignore[attr-defined]
            square_C = (scores_N[inputs["better_C"]] + scores_N[inputs["worse_C"]]).square()
            square_P = prompt_mean(square_C, inputs["prompt_C"], len(inputs["ranks"]), inputs["count_C"])
            loss = loss + coefficient * self._mean(square_P, inputs).sum()
        if self.length_debias:
            slopes_M = self._per_member(length_slope, scores_N, inputs)
            loss = loss + self.length_debias * slopes_M.square().sum()
        return loss

    def _fit(self, scores_N: Tensor, inputs: Mapping[str, Any], term_M: Tensor) -> Tensor:
        """(M,) −log likelihood of the comparisons, mean over prompts, each times its weight."""
        n_prompts = len(inputs["ranks"])
        if self.length_debias:
            scores_N = scores_N + term_M[inputs["member_P"]][inputs["prompt_N"]] * inputs["length_N"]
        if self.loss_type == "plackett_luce":
            sizes = [len(ranks) for ranks in inputs["ranks"]]
            pieces = zip(scores_N.split(sizes), inputs["ranks"], strict=True)
            loss_P = torch.stack([plackett_luce_loss(scores_K, ranks_K) for scores_K, ranks_K in pieces])
        else:
            loss_P = bradley_terry_rankings(
                scores_N, inputs["better_C"], inputs["worse_C"], inputs["count_C"], inputs["prompt_C"], n_prompts,
                margins_C=inputs["margin_C"],
            )  # fmt: skip
        return self._mean(loss_P, inputs)

    def _mean(self, values_P: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """(M,) mean over each member's prompts of weight × value. Weights are 1 on average over the data, not over the
        batch: a batch of unimportant rows takes a small step."""
        return prompt_mean(inputs["weight_P"] * values_P, inputs["member_P"], self.members)

    def _per_member(self, statistic: Callable[..., Tensor], scores_N: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """(M,) of scores and lengths, each member's own."""
        parts = zip(
            scores_N.split(inputs["rows_M"]),
            inputs["length_N"].split(inputs["rows_M"]),
            inputs["prompt_N"].split(inputs["rows_M"]),
            strict=True,
        )
        n_prompts = len(inputs["ranks"])
        return torch.stack([statistic(scores, lengths, prompt, n_prompts) for scores, lengths, prompt in parts])

    # --- what the step was like -------------------------------------------------------------------------------------

    def _measured(self, scores_N: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Sums over this micro-batch, a row a rank; nothing is read from the device before the log asks."""
        strict_C = (inputs["count_C"] == 1).float()
        difference_C = scores_N[inputs["better_C"]] - scores_N[inputs["worse_C"]]
        sums = [
            strict_C.sum(),
            (strict_C * (difference_C > 0)).sum(),
            (strict_C * difference_C).sum(),
            scores_N.new_tensor(float(len(scores_N))),
            scores_N.sum(),
            scores_N.square().sum(),
            scores_N.min(),
            scores_N.max(),
            inputs["attention_mask"].sum().float(),
            self._per_member(length_correlation, scores_N, inputs).mean(),
        ]
        return self.accelerator.gather(torch.stack(sums)[None])  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._parts:
            logs.update(self._numbers())
            if "loss" in logs:
                logs["loss"] /= self.members
        super().log(logs, start_time)  # type: ignore[misc]

    def _numbers(self) -> dict[str, float]:
        table = torch.cat(self._parts).double().cpu()
        self._parts.clear()
        pairs, hits, margins, n, total, squares, low, high, tokens, correlation = table.T
        self._total_train_tokens += int(tokens.sum())
        mean = float(total.sum() / n.sum())
        numbers = {
            "num_tokens": float(self._total_train_tokens),
            "accuracy": float(hits.sum() / pairs.sum()),
            "margin": float(margins.sum() / pairs.sum()),
            "mean_reward": mean,
            "std_reward": max(0.0, float(squares.sum() / n.sum()) - mean**2) ** 0.5,
            "min_reward": float(low.min()),
            "max_reward": float(high.max()),
            "length_correlation": float(correlation.mean()),
        }
        if self.length_debias:
            numbers["length_term"] = sum(self.length_term.value_M) / self.members
        return numbers

    # --- members keep to themselves; the length term is part of a checkpoint ----------------------------------------

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.members == 1:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        largest = self.args.max_grad_norm  # type: ignore[attr-defined]
        whole = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        norms = [torch.nn.utils.clip_grad_norm_(member.parameters(), largest) for member in whole.members]
        return torch.stack(norms).norm()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.length_debias and self.args.should_save:  # type: ignore[attr-defined]
            target = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
            (target / STATE).write_text(json.dumps(self.length_term.state()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        kept = os.path.join(resume_from_checkpoint, STATE)
        if os.path.exists(kept):
            self.length_term.load(json.loads(Path(kept).read_text(encoding="utf-8")))


class LengthTerm:
    """γ, the part of a comparison's log odds that its difference in length explains, a number for each member.

    The fit is joint, as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475): logit = r(y_w) − r(y_l)
    + γ·(ℓ_w − ℓ_l), and the score is r alone. By gradient steps of the model's size γ would lag behind the model, which
    would learn the length instead; so it takes Newton steps on the batches' log-likelihood, averaged over steps.
    """

    def __init__(self, members: int) -> None:
        self.value_M = [0.0] * members
        self._curvature_M = [0.0] * members
        self._step = 0
        self._waiting: list[Tensor] = []

    def on(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.value_M)

    def derivatives(self, loss_M: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """(2, M) slope and curvature of each member's loss in its own γ; `loss_M` takes (M,) terms."""
        with torch.enable_grad():
            term_M = self.on(like).requires_grad_()
            (slope_M,) = torch.autograd.grad(loss_M(term_M).sum(), term_M, create_graph=True)
            (curvature_M,) = torch.autograd.grad(slope_M.sum(), term_M)
        return torch.stack([slope_M.detach(), curvature_M])

    def add(self, derivatives: Tensor) -> None:
        """What a micro-batch says; in force once the step is over."""
        self._waiting.append(derivatives)

    def step(self) -> None:
        slope_M, curvature_M = torch.stack(self._waiting).mean(0).double().cpu().tolist()
        self._waiting.clear()
        self._step += 1
        share = max(1 / self._step, SMOOTHING)
        for member, (slope, curvature) in enumerate(zip(slope_M, curvature_M, strict=True)):
            self._curvature_M[member] += share * (curvature - self._curvature_M[member])
            if self._curvature_M[member] > 1e-8:
                moved = self.value_M[member] - share * slope / self._curvature_M[member]
                self.value_M[member] = min(max(moved, -FURTHEST), FURTHEST)

    def state(self) -> dict[str, Any]:
        return {"value": self.value_M, "curvature": self._curvature_M, "step": self._step}

    def load(self, state: Mapping[str, Any]) -> None:
        self.value_M, self._curvature_M = list(state["value"]), list(state["curvature"])
        self._step = int(state["step"])
