"""A reward model from pairs or rankings: the likelihood of what people preferred.

Paper    Ouyang et al. 2022, arXiv:2203.02155, eq. 1: all comparisons of a prompt in one batch element, each completion
         scored once. Margins, Llama 2, arXiv:2307.09288, eq. 2; centring, Eisenstein et al. 2023, arXiv:2312.09244;
         ensembles, Coste et al. 2023, arXiv:2310.02743; the length term, Dubois et al. 2024, arXiv:2404.04475, with
         the score kept off length as in Chen et al. 2024, arXiv:2402.07319.
Rows     prompt, chosen, rejected, and `margin` where there is one; or prompt, completions, ranks. Either may carry
         `weight` and `annotator`.
Models   the base with a new head that gives one score; all of it is trained. No reference. `members` of them: under
         LoRA on one backbone.
Live     learning_rate, center_rewards_coefficient.
Agrees   with trl.RewardTrainer on pairs, bit for bit, margins included; on rankings of two, to the last digits of
         float32. tests/training/test_identical.py and tests/methods/test_reward_rankings.py.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.data.rows import canonical_json, prompt_key
from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.methods.base import LEARNING_RATE, GradientMethod, LiveCoefficient, Trainer

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.control import BoundCoefficient

NAMES = {
    "min_reward": "score/min",
    "mean_reward": "score/mean",
    "max_reward": "score/max",
    "std_reward": "score/std",
    "accuracy": "pairs/accuracy",
    "margin": "pairs/margin",
    "length_correlation": "length/correlation",
    "length_term": "length/term",
}
CENTRE = LiveCoefficient(
    "center_rewards_coefficient",
    low=0.0,
    high=1.0,
    meaning="Weight of (r_chosen + r_rejected)², which keeps scores around 0. It changes no preference by itself.",
    # TRL reads it from its arguments at every loss.
    writes="trainer.args.center_rewards_coefficient",
)


class RewardModel(GradientMethod):
    """Learn one score for a completion, so that preferred ones score higher."""

    name: ClassVar[str] = "reward"
    title: ClassVar[str] = "Reward model"
    paper: ClassVar[str] = "arXiv:2203.02155"
    rows: ClassVar[str] = "pairs"
    also: ClassVar[tuple[str, ...]] = ("rankings",)
    models: ClassVar[str] = "reward model, or several; under LoRA on one backbone"
    live: ClassVar[tuple[LiveCoefficient, ...]] = (LEARNING_RATE, CENTRE)

    batch_size: int = Field(8, gt=0)
    """Prompts an optimizer step sees, over all ranks: of rankings of K, batch_size × K completions."""
    learning_rate: float = Field(1e-4, ge=0)
    """Peak of the schedule. 1e-4 is TRL's; whole models of a billion parameters want 1e-5."""
    center_rewards_coefficient: float | None = Field(None, ge=0)
    """Weight of (r_chosen + r_rejected)², which keeps scores around 0. 0.01 in the paper; None leaves it out."""
    loss_type: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    """bradley_terry: mean over the comparisons of a prompt. plackett_luce: −log likelihood of its whole ranking."""
    ties: Literal["half", "leave_out"] = "half"
    """Under bradley_terry, what a tie says: one half in either direction, which draws both scores together, or nothing.
    Under plackett_luce a tie leaves the order open, and the mean over the open orders is taken."""
    annotator_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """What rows by these annotators count, times the row's own `weight`; 1 for everybody else, 0 leaves them out."""
    length_debias: float = Field(0.0, ge=0)
    """Weight of the squared slope of score on length over a micro-batch, the length in standard deviations. Above 0 the
    fit also has a term for the difference in length, which is no part of the score: what length explains is not learnt
    as quality."""
    members: int = Field(1, ge=1, le=16)
    """Reward models trained at once, each on its own batches; the run's model is then all of them."""
    members_by: Literal["seed", "fold"] = "seed"
    """How members differ. seed: head, adapter and order of the rows. fold: also, each leaves out one part of the
    prompts in `members`."""
    sample_every: int = Field(0, ge=0, le=0)
    """A reward model writes no completions."""

    def check(self, spec: RunSpec) -> None:
        if self.members_by == "fold" and self.members == 1:
            raise SpecError("reward: members_by=fold needs parts to leave out; give members=5, or members_by=seed")
        if self.members > 1 and spec.adapter is not None and spec.adapter.quantize != "none":
            raise SpecError(
                f"reward: adapter quantize={spec.adapter.quantize}: members={self.members} stand on a base in full; "
                f"use quantize=none, or one run a member"
            )

    @classmethod
    def preload(cls) -> None:
        from trl import RewardConfig, RewardTrainer  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from rlhf_nb.training import models

        base = context.model_path(context.spec.policy)
        models.refuse_ensemble(base)
        tokenizer = models.load_tokenizer(base, context.emit)
        max_length = models.max_length(base, self.max_length, context.emit)
        context.emit.stage("tokenizing rows")
        weighted = bool(self.annotator_weights) or any(row.get("weight") is not None for row in context.rows)
        plain = context.row_kind == "pairs" and self.loss_type == "bradley_terry"
        if plain and not weighted and not self.length_debias and self.members == 1:
            return self._on_pairs(context, base, tokenizer, max_length)
        return self._kept_together(context, base, tokenizer, max_length)

    def _on_pairs(self, context: Context, base: str, tokenizer: Any, max_length: int) -> Trainer:
        """TRL's own trainer and loss."""
        from datasets import Dataset
        from trl import RewardTrainer

        from rlhf_nb.training import data
        from rlhf_nb.training.arguments import lora_config
        from rlhf_nb.training.trainer import SteeredTrainer

        rows = data.for_trl(context.rows, "pairs", tokenizer)
        margins = self._margins(context)
        if any(margins):
            rows = [{**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)]
        trainer = RewardTrainer(
            model=base,
            args=self._arguments(context, max_length),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            # The head is new, so an adapter alone would leave it random.
            peft_config=lora_config(context, "SEQ_CLS", modules_to_save=["score"]),
        )
        _head_in_full(trainer)
        data.say_what_fits(context, trainer.train_dataset, (("chosen_ids",), ("rejected_ids",)), max_length)
        return SteeredTrainer(trainer, context, names=NAMES, live=[_centre(trainer)])

    def _kept_together(self, context: Context, base: str, tokenizer: Any, max_length: int) -> Trainer:
        """The comparisons of a prompt in one batch element: our loss and batches in TRL's trainer."""
        from datasets import Dataset
        from trl import RewardTrainer

        from rlhf_nb.training import rankings
        from rlhf_nb.training.arguments import lora_config
        from rlhf_nb.training.ensemble import SteeredEnsemble, load_members
        from rlhf_nb.training.ranking_loss import RankingLoss
        from rlhf_nb.training.trainer import SteeredTrainer

        if any(self._margins(context)) and self.loss_type == "plackett_luce":
            raise SpecError("reward: plackett_luce has no margins, and rows have a margin; use bradley_terry")
        items, dropped = rankings.prepare(
            context.rows, context.row_kind, tokenizer,
            max_length=max_length, ties=self.ties, annotator_weights=self.annotator_weights,
        )  # fmt: skip
        self._say(context, items, dropped, max_length)

        class Trainer(RankingLoss, RewardTrainer):
            loss_type = self.loss_type
            length_debias = self.length_debias
            members = self.members

        def lora() -> Any:
            return lora_config(context, "SEQ_CLS", modules_to_save=["score"])

        several = self.members > 1
        seeds = [self.seed + number for number in range(self.members)]
        adapter = lora if context.spec.adapter is not None else None
        trainer = Trainer(
            model=load_members(base, seeds, adapter) if several else base,
            args=self._arguments(context, max_length),
            train_dataset=Dataset.from_dict({"places": self._places(items, seeds)}),
            processing_class=tokenizer,
            peft_config=None if several else lora(),
            data_collator=rankings.Collator(items, tokenizer.pad_token_id, self.members),
        )
        if several and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise SpecError("reward: members are not trained in shards; leave FSDP out, or train one run a member")
        _head_in_full(trainer)
        steered = SteeredEnsemble if several else SteeredTrainer
        return steered(trainer, context, names=NAMES, live=[_centre(trainer)])

    def _arguments(self, context: Context, max_length: int) -> Any:
        from trl import RewardConfig

        from rlhf_nb.training.arguments import training_arguments

        return RewardConfig(
            **training_arguments(context),
            max_length=max_length,
            center_rewards_coefficient=self.center_rewards_coefficient,
        )

    def _places(self, items: list[Any], seeds: list[int]) -> list[list[int]]:
        """Which row each member takes at each place of the data.

        A member's rows are shuffled by its seed, so that members part ways even from equal starts; one that has fewer,
        because of its fold, begins again.
        """
        import numpy as np

        if len(seeds) == 1:
            return [[place] for place in range(len(items))]
        columns = []
        for member, seed in enumerate(seeds):
            kept = [
                place for place, item in enumerate(items)
                if self.members_by == "seed" or fold(item.prompt, len(seeds), self.seed) != member
            ]  # fmt: skip
            if not kept:
                raise DataError(
                    f"reward: all prompts fall into part {member} of {len(seeds)}, and nothing is left for member "
                    f"{member}; give more prompts, or members_by=seed"
                )
            columns.append(np.random.default_rng([seed, len(kept)]).permutation(kept).tolist())
        longest = max(map(len, columns))
        return [[column[place % len(column)] for column in columns] for place in range(longest)]

    @staticmethod
    def _margins(context: Context) -> list[float]:
        from rlhf_nb.training.rankings import margin

        if context.row_kind != "pairs":
            return []
        return [margin(row, f"row {index}") for index, row in enumerate(context.rows)]

    def _say(self, context: Context, items: list[Any], dropped: dict[str, int], max_length: int) -> None:
        """What was left out, and what is left to train on.

        Raises:
            DataError: Nothing.
        """
        n, kind = len(context.rows), context.row_kind
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        if not items:
            raise DataError(
                f"reward: none of the {n:,} {kind} can be trained on (max_length={max_length}): {reasons}; raise "
                f"max_length, or give {kind} in which something is better than something else"
            )
        if dropped:
            context.emit.notice("rows_dropped", f"of {n:,} {kind}, left out: {reasons}", "warning")
        comparisons = sum(share for item in items for _, _, share in item.comparisons)
        completions = sum(len(item.ids) for item in items)
        context.emit.notice(
            "comparisons",
            f"{comparisons:,.0f} comparisons of {completions:,} completions to {len(items):,} prompts, each completion "
            f"scored once",
        )
        if len(items) < self.batch_size:
            context.emit.notice(
                "few_rows",
                f"{len(items)} of {kind} for batch_size={self.batch_size}: every step sees the same rows",
                "warning",
            )


def fold(prompt: Any, folds: int, seed: int) -> int:
    """Which part of the data a prompt belongs to: all rows of a prompt to the same one."""
    digest = hashlib.sha256(canonical_json([seed, prompt_key(prompt)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % folds


def _head_in_full(trainer: Any) -> None:
    """TRL puts what trains on a base of 4 bits into bfloat16; a head, unlike an adapter, does not cast its input."""
    for name, parameter in trainer.model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data = parameter.data.float()


def _centre(trainer: Any) -> BoundCoefficient:
    from rlhf_nb.training.control import BoundCoefficient

    def read() -> float:
        return float(trainer.args.center_rewards_coefficient or 0.0)

    def write(value: float) -> None:
        trainer.args.center_rewards_coefficient = value

    return BoundCoefficient(CENTRE, read, write)
