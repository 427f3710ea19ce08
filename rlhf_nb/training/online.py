"""The loop of online methods: sample, score, give credit, update; steered at every boundary between optimizer steps.

What an algorithm *is* stands in its method's file: `credit(rollout, live)` and `loss(minibatch, outputs, live)`. Here
is what all of them share. Every rank samples and scores its part of a rollout; the parts are then put together, so
that every rank holds the whole and statistics are global by construction; the ranks share each minibatch again for the
update.

Nothing random depends on a generator's history: prompts, sampling noise and shuffles are keyed by seed and rollout. A
checkpoint between two rollouts is therefore weights, optimizer and two counters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from rlhf_nb.errors import SpecError
from rlhf_nb.maths import kl
from rlhf_nb.maths.controllers import RunningMoments
from rlhf_nb.maths.masked import masked_sum
from rlhf_nb.protocol.events import CoefficientChanged
from rlhf_nb.training import actor_critic, distributed, models, not_finite, sharding
from rlhf_nb.training.collect import collect
from rlhf_nb.training.control import BoundCoefficient
from rlhf_nb.training.gradient_noise import GradientNoise
from rlhf_nb.training.kl_doctor import KLDoctor
from rlhf_nb.training.not_finite import NotFiniteError
from rlhf_nb.training.online_checkpoint import load_checkpoint, save_checkpoint
from rlhf_nb.training.online_report import Report
from rlhf_nb.training.online_samples import SampleTable
from rlhf_nb.training.online_serving import Serving
from rlhf_nb.training.online_types import Credit, Extent, Minibatch, Outputs, Read, Rollout
from rlhf_nb.training.pretraining import Pretraining
from rlhf_nb.training.prompt_order import prompts_that_fit
from rlhf_nb.training.reference_said import ReferenceSaid
from rlhf_nb.training.rollout.base import Sampler
from rlhf_nb.training.rollout.choose import sampler_for
from rlhf_nb.training.rollout.cuda_graphs import GraphSampler
from rlhf_nb.training.rollout.transformers_backend import TransformersSampler
from rlhf_nb.training.sampling import end_tokens
from rlhf_nb.training.scoring import Scoring

if TYPE_CHECKING:
    from rlhf_nb.methods.online import OnlineMethod
    from rlhf_nb.training.context import Context

ADAM_EPS = 1e-5
"""Huang et al. 2024, arXiv:2403.17031: torch's 1e-8 lets the first steps of PPO jump."""


class OnlineTrainer:
    def __init__(self, method: OnlineMethod, context: Context) -> None:
        self.method, self.context, self.emit = method, context, context.emit
        self.accelerator = sharding.accelerator(context.use_cpu, method, context.spec)
        self.device = self.accelerator.device
        self.sharded = self.accelerator.is_fsdp2
        path = context.model_path(context.spec.policy)
        self.tokenizer = models.load_tokenizer(path, self.emit)
        self.module, self.reference = actor_critic.load(
            context,
            path,
            value_model=method.values,
            reference=method.reference,
            precision=method.precision,
            sharded=self.sharded,
        )
        if self.sharded:
            # What stands on weights that are not sharded would keep them all.
            self.reference.backbone = None
        max_length = models.max_length(path, method.max_length, self.emit)
        fitting = prompts_that_fit(context, self.tokenizer, max_length)
        self.prompt_room, self.prompt_ids, self.prompt_order = fitting.room, fitting.ids, fitting.order
        self.rows = [context.rows[index] for index in fitting.kept]
        self.pretraining = Pretraining(self, max_length) if context.pretraining is not None else None
        if context.spec.reward is None:
            raise SpecError(f"{method.name}: no reward; give reward= a reward model, a registered name or a function")
        self.live: Any = SimpleNamespace(**method.start_values(context.spec))
        backbone = (path, self.reference.backbone) if self.reference.backbone is not None else None
        self.scoring = Scoring(method, context, self.live, self.device, tokenizer=self.tokenizer, backbone=backbone)

        if method.gradient_checkpointing:
            actor_critic.without_dropout(self.module)
            self.module.policy.gradient_checkpointing_enable({"use_reentrant": False})
            if self.module.critic is not None:
                self.module.critic.gradient_checkpointing_enable({"use_reentrant": False})
        self.module.to(self.device)
        self.reference.to(self.device)
        self.doctor = KLDoctor(self)
        self.sampler: Sampler = sampler_for(self, path, max_length)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = self._optimizer(trained)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        # accelerate switches prepared modules to train mode.
        self.model.eval()
        if self.sharded:
            sharding.settle(self.model, self.device)

        self.moments = RunningMoments()
        self.step = 0
        """Optimizer steps taken."""
        self.rollouts = 0
        """Rollouts used up."""
        self.prompts = 0
        """Prompts drawn so far."""
        self.measured: list[float] | None = None
        """What the last rollout has the next one's coefficients moved by."""
        self._hooks_s = 0.0
        self.serving = Serving(self)
        self.checkpointed = 0
        """Step of the last checkpoint."""
        self.samples = SampleTable(self)
        self.reference_said = ReferenceSaid(self)
        self.report = Report(self)
        # Sharding has put others in the place of those that trained until now.
        sharded = [p for p in self.module.parameters() if p.requires_grad] if self.sharded else None
        self.noise = GradientNoise(sharded or trained, total=self._added_up if self.sharded else None)

    def _added_up(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _optimizer(self, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": self.method.learning_rate, "eps": ADAM_EPS, "weight_decay": 0.0}
        if self.method.optimizer == "adamw":
            return torch.optim.AdamW(trained, **settings, fused=True)
        if self.device.type != "cuda":
            raise SpecError(
                f"{self.method.name}: optimizer=adamw_8bit needs a CUDA device and this one is {self.device.type}; use "
                f"optimizer=adamw"
            )
        found = models.require_bitsandbytes(f"{self.method.name}: optimizer=adamw_8bit", "use optimizer=adamw")
        return found.optim.AdamW8bit(trained, **settings)

    def make_sampler(
        self, trunk: Any, head: Any, value_head: Any = None, *, graphs: bool = False
    ) -> TransformersSampler:
        if graphs and self.device.type != "cuda":
            raise SpecError(
                f"{self.method.name}: cuda_graphs=True needs a CUDA device and this one is {self.device.type}; leave "
                f"it out"
            )
        if graphs and self.sharded:
            raise SpecError(
                f"{self.method.name}: cuda_graphs=True reads weights where they lie, and FSDP moves them; leave it out"
            )
        made: Any = TransformersSampler
        if graphs:
            limit = self.method.max_new_tokens
            made = partial(GraphSampler, room=max(map(len, self.prompt_ids)) + limit, limit=limit)
        return made(
            trunk,
            head,
            end_tokens=end_tokens(self.module.policy, self.tokenizer),
            pad_token=self.tokenizer.pad_token_id,
            precision=self.method.precision,
            value_head=value_head,
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        with closing(self.sampler):
            self._train()

    def _train(self) -> None:
        loop = self.context.control
        loop.bind([self._bound(live) for live in self.method.live_in(self.context.spec)])
        loop.rewards = self.scoring
        loop.preview_refusal = partial(self.method.preview_refusal, self.live)
        loop.on_checkpoint = partial(self._because_asked, self.serving.checkpoint)
        loop.on_idle = partial(self._because_asked, self.serving.all)
        loop.on_change = self._hold_controller
        loop.holds = {"kl_coef": "kl_controller"}
        if self.context.resume_from is not None:
            self.step, self.rollouts = load_checkpoint(self.context.resume_from, self)
            self.checkpointed = self.step
        self.report.tether()
        while self._goes_on(new_rollout=True):
            measured, self.measured = self.measured, None
            if measured is not None:
                self.method.adapt(measured, self.live)
            with sharding.gathered(self.module):
                rollout, seconds = self.collect()
                if self._good_enough(rollout):
                    break
                credit = self.method.credit(rollout, self.live)
                self.report.rollout(rollout, credit, seconds)
                self.doctor.look(rollout)
            self.serving.rollout_begins()
            held, stopped, updating_s = False, False, 0.0
            for index, (minibatch, extent) in enumerate(self.minibatches(rollout, credit)):
                if index and not self._goes_on(new_rollout=False):
                    stopped = self.step < self.method.max_steps
                    break
                if index % self.method.num_mini_batches == 0:
                    self.noise.new_pass()
                try:
                    metrics = self.update(minibatch, extent, rollout.temperature, as_sampled=index == 0)
                except NotFiniteError as error:
                    not_finite.hold(self, error, minibatch, rollout.temperature)
                    held = True
                    break
                updating_s += metrics["time/step_s"]
                if self._far_enough(metrics):
                    break
            if held:
                self.serving.between_rollouts = True
                continue
            with sharding.gathered(self.module):
                self.report.update(rollout, updating_s)
                if self.method.reference == "ema":
                    self.reference.follow(self.module.policy, self.method.reference_decay)
            if stopped:
                # A checkpoint counts the rollout as used up: whoever went on from it would never see the rest.
                break
            self.measured = self.method.measured(rollout)
            self.rollouts += 1
            self.serving.between_rollouts = True
            self._checkpoint_when_due()
        self.serving.all()

    def _goes_on(self, *, new_rollout: bool) -> bool:
        """The boundary before the next optimizer step; False where there is none."""
        if self.step >= self.method.max_steps or self.context.control.stopping:
            return False
        with self.hook():
            self.context.control.boundary(self.step + 1, rollout=new_rollout)
        self.serving.all()
        return not self.context.control.stopping

    @contextmanager
    def hook(self) -> Iterator[None]:
        """Around what is there for watching and steering alone: its CPU time is told with the next step."""
        began = time.thread_time()
        try:
            yield
        finally:
            self._hooks_s += time.thread_time() - began

    def _far_enough(self, metrics: dict[str, float]) -> bool:
        target = self.method.target_kl
        return target is not None and metrics["policy/approx_kl"] > target

    def _good_enough(self, rollout: Rollout) -> bool:
        wanted = self.method.stop_at_score
        score = (rollout.drawn.score_B if rollout.drawn is not None else rollout.score_B).mean().item()
        if wanted is None or score < wanted:
            return False
        self.emit.metric(self.step, {"reward/score": score}, rollout=self.rollouts)
        self.emit.notice(
            "score_reached", f"rollout {self.rollouts} scores {score:.4g}, stop_at_score={wanted:g}: the run ends here"
        )
        return True

    def _hold_controller(self, change: CoefficientChanged) -> None:
        """A person who sets kl_coef means it: the controller lets go until it is told to go on."""
        if change.name == "kl_coef" and getattr(self.live, "kl_controller", 0.0) >= 0.5:
            self.live.kl_controller = 0.0
            self.emit.event(
                CoefficientChanged(
                    id=f"{change.id}-holds",
                    name="kl_controller",
                    old=1.0,
                    new=0.0,
                    effective_step=change.effective_step,
                    who=change.who,
                    why="kl_coef was set by hand; kl_controller=1 releases it",
                    follows=change.id,
                )
            )

    def _bound(self, live: Any) -> BoundCoefficient:
        return BoundCoefficient(
            live,
            lambda: getattr(self.live, live.name),
            lambda value: setattr(self.live, live.name, value),
            live.unavailable_when(self.method) if live.unavailable_when else None,
            # What moves by a measurement is not in use before there is one.
            waits=(lambda: self.measured is None) if live.enters == "adaptation" else None,
        )

    def _because_asked(self, serve: Callable[[], None]) -> None:
        """Within a hook: what a person asked for is no cost of watching."""
        began = time.thread_time()
        serve()
        self._hooks_s -= time.thread_time() - began

    def _checkpoint_when_due(self) -> None:
        every = self.method.checkpoint_every
        if every and self.step // every > self.checkpointed // every:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        save_checkpoint(self)
        self.checkpointed = self.step

    # --- a rollout --------------------------------------------------------------------------------------------------

    def next_prompts(self, P: int) -> list[int]:
        """Which prompt each row of the next P groups completes."""
        self.prompts += P
        return [row for row in self.prompt_order(self.prompts - P, P) for _ in range(self.method.each)]

    def collect(self) -> tuple[Rollout, dict[str, float]]:
        """A rollout of all ranks, and what each part of making it took in seconds."""
        rollout, seconds = collect(self)
        self.report.odd(rollout)
        if self.method.normalises_scores:
            self.moments.add(self.method.compared(rollout))
            rollout = replace(rollout, score_shift=self.moments.mean, score_spread=self.moments.spread)
        return rollout, seconds

    def texts(self, tokens_BT: Tensor, mask_BT: Tensor) -> list[str]:
        rows = [t[m].tolist() for t, m in zip(tokens_BT, mask_BT, strict=True)]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def reference_scores(self, indices: list[int], at: list[int] | None = None) -> list[list[list[float]]] | None:
        """(B, R, M) scores of what the reference says to each prompt; None where nothing is compared with it.

        Args:
            at: Numbers of the completions in the rollout that are compared with it; None where they are only looked at.
        """
        R = self.method.compared_with
        if not R:
            return None
        said = self.reference_said(indices)
        rows = [self.rows[index] for index in indices for _ in range(R)]
        texts = [text for each in said for text in each]
        if at is None:
            scores_NM = self.scoring.scores(rows, texts)
        else:
            places = [row * R + each for row in at for each in range(R)]
            scores_NM = self.scoring.compared(self.rollouts, rows, texts, places)
        return [scores_NM[at : at + R] for at in range(0, len(scores_NM), R)]

    # --- the update -------------------------------------------------------------------------------------------------

    def minibatches(self, rollout: Rollout, credit: Credit) -> Iterator[tuple[Minibatch, Extent]]:
        """This rank's rows of each minibatch, and how much the whole minibatch holds over all ranks."""
        read = {field.name: getattr(rollout, field.name) for field in fields(Read)}
        whole = Minibatch(**read, advantages_BT=credit.advantages_BT, returns_BT=credit.returns_BT)
        B, size = len(rollout.score_B), self.method.batch_size
        for epoch in range(self.method.passes):
            order = np.random.default_rng([self.method.seed, self.rollouts, epoch, 1]).permutation(B)
            for start in range(0, B, size):
                rows = torch.from_numpy(order[start : start + size]).to(self.device)
                mine = rows[self.context.rank :: self.context.world_size]
                yield whole.rows(mine), Extent(int(rollout.mask_BT[rows].sum()), len(rows))

    def micro(self, rows: int) -> int:
        return min(self.method.micro_batch_size or rows, rows)

    def shares(self, rows: int) -> list[tuple[Tensor, bool]]:
        """Micro-batches of this rank's rows, and whether they count.

        Sharded weights are gathered by all ranks together: one that has fewer micro-batches goes through its first
        again, for nothing.
        """
        parts = torch.arange(rows, device=self.device).split(self.micro(rows))
        missing = max(distributed.gather_objects(len(parts))) - len(parts) if self.sharded else 0
        return [(part, True) for part in parts] + [(parts[0], False)] * missing

    def update(self, batch: Minibatch, extent: Extent, temperature: float, *, as_sampled: bool) -> dict[str, float]:
        """One optimizer step on the global minibatch.

        Args:
            as_sampled: The policy is still the one that sampled, so that trainer and sampler can be compared.
        """
        began = time.perf_counter()
        rate = self.live.learning_rate * self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        # transformers checkpoints activations in train mode only; there is no dropout left that it could turn on.
        self.model.train(self.method.gradient_checkpointing)
        pretraining = None
        if self.pretraining is not None and self.live.ptx_coef > 0:
            with self.accelerator.no_sync(self.model):
                pretraining = self.pretraining.backward()
        parts = self.shares(len(batch.mask_BT))
        for index, (rows, counts) in enumerate(parts):
            part = batch.rows(rows).trimmed()
            kept = sums if counts else None
            if index + 1 < len(parts):
                with self.accelerator.no_sync(self.model):
                    self._backward(part, extent, temperature, kept, as_sampled)
            else:
                self._backward(part, extent, temperature, kept, as_sampled)
        self.model.eval()
        metrics = self._reduce(sums, extent.tokens)
        metrics["loss"] *= extent.tokens / self.method.normaliser(extent)
        if pretraining is not None:
            metrics["loss/pretraining"] = self.accelerator.reduce(pretraining, reduction="sum").item()
            metrics["loss"] += self.live.ptx_coef * metrics["loss/pretraining"]
        self.noise.add()
        norms = self._norms()
        metrics["optimizer/grad_norm"] = torch.stack([sharding.whole(norm) for norm in norms]).norm().item()
        metrics["optimizer/learning_rate"] = rate
        # Before they are scaled: a norm that is not finite would make every gradient so, and hide which it was.
        not_finite.check(self, metrics, batch, temperature)
        if as_sampled:
            self.doctor.compared(metrics["rollout/logprob_mismatch"])
        self._clip(norms)
        self.optimizer.step()
        self.step += 1
        metrics["time/step_s"] = time.perf_counter() - began
        metrics["time/hooks_s"], self._hooks_s = self._hooks_s, 0.0
        with self.hook():
            self.emit.metric(self.step, metrics)
        every = self.method.sample_every
        if every and self.step % every == 0:
            with sharding.gathered(self.module):
                self.samples.periodic()
        return metrics

    def _backward(
        self, part: Minibatch, extent: Extent, temperature: float, sums: dict[str, Tensor] | None, as_sampled: bool
    ) -> None:
        """Add a micro-batch's gradient, and its sums; without `sums` it goes through and counts for nothing."""
        outputs = self._outputs(part, temperature)
        losses = self.method.loss(part, outputs, self.live)
        # Gradients are averaged over ranks: times the world size, they become the sum that the normaliser divides.
        scale = self.context.world_size / self.method.normaliser(extent) if sums is not None else 0.0
        self.accelerator.backward(masked_sum(losses.loss_BT, part.mask_BT) * scale)
        if sums is None:
            return
        metrics = {
            "loss": losses.loss_BT,
            **losses.metrics,
            "policy/approx_kl": kl.estimate(part.behavior_logprobs_BT, outputs.logprobs_BT, "k3"),
            "policy/entropy": outputs.entropy_BT,
        }
        if self.method.importance_cap is not None:
            metrics["policy/importance_weight"] = self.method.importance_weight(part)
        if as_sampled:
            metrics["rollout/logprob_mismatch"] = (outputs.logprobs_BT - part.sampler_logprobs_BT).abs()
        for name, values in metrics.items():
            total = masked_sum(values.detach().to(losses.loss_BT.dtype), part.mask_BT)
            sums[name] = sums.get(name, 0) + total

    def _outputs(self, part: Minibatch, temperature: float) -> Outputs:
        logprobs, entropy, values = self.model(
            part.tokens_BL,
            part.attention_mask_BL,
            part.mask_BT,
            temperature=temperature,
            entropy_gradient=getattr(self.live, "entropy_coef", 0.0) > 0,
        )
        return Outputs(logprobs, entropy, values)

    @property
    def temperature(self) -> float:
        """Of sampling, at this step."""
        end = self.method.temperature_end
        if end is None:
            return float(self.live.temperature)
        done = min(1.0, self.step / self.method.max_steps)
        return float(self.live.temperature * (1 + (end / self.method.temperature - 1) * done))

    def _schedule(self) -> float:
        if self.method.lr_scheduler == "constant":
            return 1.0
        return 1 - self.step / self.method.max_steps

    def _reduce(self, sums: dict[str, Tensor], tokens: int) -> dict[str, float]:
        stacked = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
        return dict(zip(sums, (stacked / tokens).tolist(), strict=True))

    def _norms(self) -> list[Tensor]:
        """Of the gradients of each group."""
        groups = ([p.grad for p in group if p.grad is not None] for group in self.module.groups())
        return [torch.nn.utils.get_total_norm(gradients) for gradients in groups]

    def _clip(self, norms: list[Tensor]) -> None:
        """Scale gradients down, group by group."""
        for group, norm in zip(self.module.groups(), norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(group, self.method.max_grad_norm or float("inf"), norm)

    # --- the model --------------------------------------------------------------------------------------------------

    def save_model(self, directory: str) -> None:
        """The policy alone, for plain transformers. An adapter is merged in, and kept beside in `adapter/`."""
        policy: Any = self.module.policy
        weights = (
            {name: sharding.whole(tensor) for name, tensor in policy.state_dict().items()} if self.sharded else None
        )
        if not self.context.is_main:
            return
        if self.context.spec.adapter is not None:
            adapter = Path(directory) / "adapter"
            policy.save_pretrained(str(adapter), state_dict=weights)
            held_whole = self.context.spec.adapter.quantize == "none" and self.method.precision == "fp32"
            if self.sharded or not held_whole:
                base = models.load_model(self.context.model_path(self.context.spec.policy))
                policy, weights = PeftModel.from_pretrained(base, str(adapter)), None
            policy = policy.merge_and_unload()
        policy.save_pretrained(directory, state_dict=weights)
        self.tokenizer.save_pretrained(directory)
