"""What an online run says of itself: the metrics of each rollout and of its update, and what is odd, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_nb.maths import kl
from rlhf_nb.maths.masked import masked_sum
from rlhf_nb.maths.reweighting import gap_variance

if TYPE_CHECKING:
    from rlhf_nb.training.online import OnlineTrainer
    from rlhf_nb.training.online_types import Credit, Rollout

UPDATE_KL_ROWS = 4


class Report:
    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self.said: set[str] = set()
        """Notices that are given once in a run."""

    def tether(self) -> None:
        """Say at the start where nothing holds the policy: a reward is then followed wherever it leads."""
        method = self.trainer.method
        if method.reference == "none":
            self._once("no_tether", "reference=none: no distance is measured and nothing holds the policy to its start")
        elif not getattr(self.trainer.live, method.tether):
            self._once(
                "no_tether",
                f"{method.tether}=0: nothing holds the policy to the reference. The KL is measured all the same, and "
                f"{method.tether} can be raised while the run goes on",
            )

    def rollout(self, rollout: Rollout, credit: Credit, seconds: dict[str, float]) -> None:
        """Before the rollout's first update; the metrics stand at the step that follows."""
        trainer, mask_BT = self.trainer, rollout.mask_BT
        method = trainer.method
        kl_B = masked_sum(rollout.behavior_logprobs_BT - rollout.reference_logprobs_BT, mask_BT, 1)
        score_B = rollout.drawn.score_B if rollout.drawn is not None else rollout.score_B
        gold_B = rollout.drawn.gold_B if rollout.drawn is not None else rollout.gold_B
        values = {
            "reward/mean": credit.total_B.mean().item(),
            "reward/score": score_B.mean().item(),
            "reward/std": score_B.std().item() if len(score_B) > 1 else 0.0,
            "completion/length_mean": mask_BT.sum(1).float().mean().item(),
            "completion/truncated_fraction": (~rollout.ended_B).float().mean().item(),
            **seconds,
        }
        if method.has_reference:
            kl_coef = getattr(trainer.live, method.tether)
            values |= {"kl/policy_reference": kl_B.mean().item(), f"objective/{method.tether}": kl_coef}
            if method.each > 1 and kl_coef > 0 and method.preview_refusal(trainer.live) is None:
                groups = (-1, method.each)
                score_PG = method.penalised(rollout, trainer.live).view(groups)
                beta = method.settles_at(kl_coef)
                values["convergence/gap"] = gap_variance(score_PG, kl_B.view(groups), beta) / (2 * beta)
        if method.values != "none":
            values["value/explained_variance"] = _explained(rollout.values_BT[mask_BT], credit.returns_BT[mask_BT])
        if method.temperature_end is not None:
            values["objective/temperature"] = rollout.temperature
        if rollout.parts_BM is not None and rollout.parts_BM.shape[1] > 1:
            means = rollout.parts_BM.mean(0).tolist()
            values |= {f"reward_part/{name}": mean for name, mean in zip(trainer.scoring.names, means, strict=True)}
            values["reward/disagreement"] = rollout.parts_BM.std(1, correction=0).mean().item()
        if gold_B is not None:
            values["reward/gold"] = gold_B.mean().item()
        if method.each > 1:
            score_PG = score_B.view(-1, method.each)
            values["group/std"] = score_PG.std(1).mean().item()
            values["group/flat_fraction"] = (score_PG == score_PG[:, :1]).all(1).float().mean().item()
        if rollout.drawn is not None:
            values |= {"group/replaced": rollout.drawn.replaced, "group/flat_left": rollout.drawn.left}
        with trainer.hook():
            trainer.emit.metric(trainer.step + 1, values, rollout=trainer.rollouts)

    def update(self, rollout: Rollout, seconds: float) -> None:
        """What the rollout's steps did together."""
        trainer = self.trainer
        values = {"time/update_s": seconds, "policy/update_kl": self._update_kl(rollout)}
        if (ratio := trainer.noise.take()) is not None:
            values["optimizer/gradient_snr"] = ratio
        with trainer.hook():
            trainer.emit.metric(trainer.step, values, rollout=trainer.rollouts)

    def odd(self, rollout: Rollout) -> None:
        """Completions that were all cut, and scores that are all one: what moves the policy then is noise."""
        score_B, number = rollout.score_B, self.trainer.rollouts
        if not rollout.ended_B.any():
            self._once(
                "all_truncated",
                f"every completion of rollout {number} was cut at max_new_tokens="
                f"{self.trainer.method.max_new_tokens}; raise it, or give missing_eos_penalty",
            )
        if len(score_B) > 1 and (score_B == score_B[0]).all():
            self._once(
                "reward_constant",
                f"every completion of rollout {number} got the score {score_B[0].item():g}: there is nothing to learn "
                f"from it; try the reward on a few completions",
            )

    def _once(self, code: str, message: str) -> None:
        if code not in self.said:
            self.said.add(code)
            self.trainer.emit.notice(code, message, "warning")

    @torch.no_grad()
    def _update_kl(self, rollout: Rollout) -> float:
        """Nats a completion, KL(π_behavior ‖ π) by k3 on the first completions of the rollout."""
        trainer, context = self.trainer, self.trainer.context
        rows = torch.arange(min(UPDATE_KL_ROWS, len(rollout.score_B)), device=trainer.device)
        rows = rows[context.rank :: context.world_size]
        total = torch.zeros(2, device=trainer.device, dtype=torch.float64)
        if len(rows):
            mask_BT = rollout.mask_BT[rows]
            now_BT, _, _ = trainer.module(
                rollout.tokens_BL[rows],
                rollout.attention_mask_BL[rows],
                mask_BT,
                temperature=rollout.temperature,
                with_values=False,
                with_entropy=False,
            )
            k3_BT = kl.estimate(rollout.behavior_logprobs_BT[rows], now_BT, "k3")
            total[0], total[1] = masked_sum(k3_BT, mask_BT).double(), len(rows)
        total = trainer.accelerator.reduce(total, reduction="sum")
        return (total[0] / total[1]).item()


def _explained(values_N: Tensor, returns_N: Tensor) -> float:
    """1 − Var(R − V) / Var(R); 0 where all returns are equal."""
    spread = returns_N.var(correction=0)
    return (1 - (returns_N - values_N).var(correction=0) / spread).item() if spread > 0 else 0.0
