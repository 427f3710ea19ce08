"""Proximal Policy Optimization on a learned or given reward, tethered to a reference.

Papers   Schulman et al. 2017, arXiv:1707.06347 (the clipped loss); Ziegler et al. 2019, arXiv:1909.08593 (KL in the
         reward); Ouyang et al. 2022, arXiv:2203.02155; Huang et al. 2024, arXiv:2403.17031 (the details that matter;
         tests/methods/test_ppo_details.py says of each where it is).
Rows     prompt.
Models   policy (trained); reference (frozen; the policy with its adapter off under LoRA); value model (trained);
         reward. Without a value model (`value_model="none"`) it is REINFORCE++ (Hu et al. 2025, arXiv:2501.03262).
Live     kl_coef, kl_target, kl_controller, temperature, length_penalty, reward_std_coef, the weights of a combined
         reward and the reward itself from the next rollout; learning_rate, cliprange, cliprange_value, vf_coef and
         entropy_coef from the next step. Raising kl_coef keeps the policy closer to the reference.
Agrees   with the maths of TRL 1.12, the last that had a PPO (tests/maths); in enumerable worlds with the optimum
         π_ref·exp(r/β) (tests/fidelity). Not with four of TRL's faults: here the score stands on the last token that
         counts and not one after it, padding enters no average, the end token counts when it is also the pad token,
         and minibatches are honoured with any gradient accumulation.

One rollout: sample completions of `rollout_batch_size` prompts, score them, give credit to tokens; then
`num_ppo_epochs` passes over them in minibatches of `batch_size`, an optimizer step each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LEARNING_RATE, LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.spec import reward_parts

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.online_types import Credit, Live, Minibatch, Outputs, Rollout, TokenLosses


PENALTIES = {"reward": "k1", "loss": "ratio_k3"}
"""Where β·KL is taken → the estimator that `kl_estimator="auto"` means there."""
REFUSED = {
    ("reward", "k2"): "only k1 in the reward has a gradient of its own that is zero on average; use kl_estimator=k1",
    ("reward", "k3"): "only k1 in the reward has a gradient of its own that is zero on average; use kl_estimator=k1",
    ("reward", "ratio_k3"): "the importance ratio belongs into the loss; use kl_in=loss, or kl_estimator=k1",
    ("loss", "k1"): "k1 in the loss is no penalty at all, its gradient is zero on average; use kl_in=reward",
    ("loss", "k3"): "plain k3 in the loss converges to the optimum of the forward KL, half a nat away at beta=0.1; "
    "use ratio_k3 or k2, or kl_in=reward",
}
"""Penalties that do not lead where a person who asks for them wants to go."""


def without_controller(method: PPO) -> str | None:
    return "no controller moves kl_coef in this run; start it with kl_target" if method.kl_target is None else None


def without_values(method: PPO) -> str | None:
    return "value_model=none: there is no value loss" if method.value_model == "none" else None


def without_spread(method: PPO) -> str | None:
    return None if method.combine_rewards == "mean_minus_std" else "only combine_rewards=mean_minus_std reads it"


def without_reference(method: PPO) -> str | None:
    return "reference=none: there is no reference to be held to" if method.reference == "none" else None


class PPO(Method):
    """Raise the reward of what the policy says, and pay for every nat it moves away from the reference."""

    name: ClassVar[str] = "ppo"
    title: ClassVar[str] = "Proximal policy optimization"
    paper: ClassVar[str] = "arXiv:1707.06347"
    rows: ClassVar[str] = "prompts"
    models: ClassVar[str] = (
        "policy, value (or none), reference (frozen, moving or none), reward; under LoRA all on one backbone"
    )
    needs_reward: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True

    # The objective. With γ = 1, temperature 1 and no penalty, bonus or whitening of rewards its optimum is
    # π_ref·exp(r/β). Every knob that moves it says so; tests/fidelity/test_ppo_exact.py enumerates where to.
    kl_coef: float = Field(0.05, ge=0)
    """β, score per nat of KL to the reference. 0 cuts the tether; the reference is held anyway, so that it can be
    raised."""
    kl_in: Literal["reward", "loss"] = "reward"
    """reward: −β·k1 at each token, credited to the tokens before it. loss: β times an estimate that is differentiated;
    token-local, so that a prefix gets no credit for the divergence it leads to: the optimum moves, except for
    completions of one token."""
    kl_estimator: Literal["auto", "k1", "k2", "k3", "ratio_k3"] = "auto"
    """auto: k1 in the reward, ratio_k3 in the loss. Estimators that do not lead to the tethered optimum are refused."""
    kl_target: float | None = Field(None, gt=0)
    """Nats a completion. Given, a controller moves kl_coef to hold the measured KL there (Ziegler et al. 2019, §2.2); a
    kl_coef set by hand holds the controller until kl_controller is set to 1."""
    kl_horizon: int = Field(10_000, gt=0)
    """Completions over which an error of the controller is corrected e-fold; its step is
    1 + clip(KL/kl_target − 1, ±0.2)·completions/kl_horizon."""
    reference: Literal["frozen", "ema", "none"] = "frozen"
    """frozen: where the policy started. ema: an exponential moving average of the policy, so that the optimum moves
    with it and no distance is kept from the start. none: no reference and no tether, and half the memory."""
    reference_decay: float = Field(0.95, ge=0, lt=1)
    """Of reference=ema, a rollout: reference ← decay·reference + (1 − decay)·policy."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling. Every log-probability is taken at it, so that the tether holds the tempered policy to the tempered
    reference."""
    temperature_end: float | None = Field(None, gt=0)
    """Temperature at max_steps, reached linearly; the live temperature is scaled along. None: constant."""
    combine_rewards: Literal["sum", "mean", "min", "mean_minus_std"] = "sum"
    """Of several rewards: how their weighted scores become one. An ensemble's mean, its worst case, or its mean less
    `reward_std_coef` times its spread (Coste et al. 2024, arXiv:2310.02743). The optimum is that of the one score."""
    reward_std_coef: float = Field(1.0, ge=0)
    """λ of combine_rewards=mean_minus_std."""
    preference_references: int = Field(0, ge=0)
    """M ≥ 1: Preference As Reward (arXiv:2502.18770): the score is the mean over M completions of the reference to the
    same prompt of σ(r(x, y) − r(x, y_ref)), between 0 and 1. Moves the optimum to that of this score; β is then in
    units of it, so that a smaller one is usual."""
    reward_timeout: float = Field(600.0, ge=0)
    """Seconds a reward may take over one rank's part of a rollout; 0 waits for ever."""
    score_normalisation: Literal["none", "running"] = "none"
    """running: scores are shifted and divided by the mean and standard deviation of all scores so far. Moves the
    optimum: β is then in standard deviations, which change as the policy does."""
    score_scale: float = Field(1.0, gt=0)
    """Scores are multiplied by this. Moves the optimum as dividing β by it would."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are then clipped to ± this. Moves the optimum: beyond it completions earn the same."""
    length_normalised: bool = False
    """Divide the score by the completion's tokens. Moves the optimum towards short completions of high scores and long
    ones of low scores."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the score of a completion that was cut at `max_new_tokens`. Moves the optimum to that of the penalised
    score."""
    length_penalty: float = Field(0.0, ge=0)
    """Taken off the score for every token. Moves the optimum to that of the penalised score."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the mean token entropy in the loss, a bonus. Moves the optimum towards flatter policies."""

    # The rollout
    rollout_batch_size: int = Field(64, gt=0)
    """Completions of one rollout, over all ranks."""
    samples_per_prompt: int = Field(1, gt=0)
    """Completions of each prompt in a rollout. Without a value model their mean score is the baseline."""
    max_new_tokens: int = Field(48, gt=0)
    """Longest completion, in tokens."""
    rollout_backend: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    """Who samples. transformers: the trained model itself, bit for bit the same again after a restart. vllm: an engine
    in the trainer's process, for one process. vllm_server: a server on this machine, at `vllm_url`. Weights go over
    after every update, an adapter's alone under LoRA."""
    vllm_url: str = ""
    """Of rollout_backend=vllm_server, such as http://127.0.0.1:8000. Loopback only: it has no authentication."""
    vllm_memory: float = Field(0.3, gt=0, lt=1)
    """Of rollout_backend=vllm: the share of the accelerator's memory that it takes."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling (Yao et al. 2025): completions are read once more by the trainer, and a token's
    policy loss is weighted by min(π_trainer/π_sampler, importance_cap). For samplers that compute otherwise than the
    trainer does; 2 is usual. None: the sampler is believed."""

    # Credit
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token. Below 1 the optimum moves: late tokens are paid less for the score, and less for their KL."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Scale token rewards to unit variance over the rollout. Moves the optimum: β is then in other units."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout's tokens."""

    # The update
    learning_rate: float = Field(1e-5, ge=0)
    """1e-5 suits whole models of a billion parameters; LoRA wants 1e-4, the toy model 2e-4."""
    batch_size: int = Field(32, gt=0)
    """Completions an optimizer step sees, over all ranks; a rollout has rollout_batch_size / batch_size minibatches."""
    num_ppo_epochs: int = Field(2, gt=0)
    """Passes over each rollout."""
    cliprange: float = Field(0.2, gt=0)
    """ε of the clipped policy loss."""
    cliprange_value: float = Field(0.2, gt=0)
    """How far a value may move in one rollout, in score."""
    vf_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    target_kl: float | None = Field(None, gt=0)
    """End a rollout's passes once a step's mean KL to the policy that sampled exceeds this, nats a token."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this L2 norm, the policy's and a value model's of its own apart; 0 leaves them."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps its moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861), on CUDA, with bitsandbytes."""
    lr_scheduler: Literal["constant", "linear"] = "constant"
    """linear falls to 0 at max_steps."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the mean negative log-likelihood of `pretraining` rows in the loss, a minibatch of them each step
    (PPO-ptx, arXiv:2203.02155). Moves the optimum towards what those rows say."""
    on_not_finite: Literal["pause", "fail"] = "pause"
    """When a loss or gradient is not finite. pause: go back to the last good checkpoint and wait there for a person.
    fail: end the run."""
    stop_at_score: float | None = None
    """End the run, with its model saved, once a rollout's mean score reaches this."""
    value_model: Literal["own", "policy_trunk", "none"] = "own"
    """own: a second trunk from the policy's start. policy_trunk: a head on the policy's, half the work; value errors
    then pull at the policy too, by vf_coef. none: no value model, the light variant; a token's advantage is the score
    less the KL still to come, less the mean score of its prompt where samples_per_prompt is above 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: models compute in bfloat16 (autocast) on float32 weights; log-probabilities, credit and loss stay
    float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth slower. Dropout is then off for good."""
    micro_batch_size: int = Field(0, ge=0)
    """Completions of one forward and backward pass on one rank, to save memory; 0 takes a minibatch whole."""

    live: ClassVar = (
        LiveCoefficient(
            "kl_coef",
            low=1e-4,
            high=10.0,
            scale="log",
            unit="score/nat",
            meaning="Price of moving away from the reference. Higher is closer to it.",
            enters="rollout",
            can_preview=True,
            unavailable_when=without_reference,
        ),
        LEARNING_RATE,
        LiveCoefficient("temperature", low=0.1, high=2.0, meaning="Of sampling. Lower is surer.", enters="rollout"),
        LiveCoefficient(
            "entropy_coef", low=0.0, high=0.1, unit="1/nat", meaning="Bonus on entropy. Higher explores more."
        ),
        LiveCoefficient(
            "cliprange", low=0.01, high=1.0, scale="log", meaning="How far a step may move a token's odds."
        ),
        LiveCoefficient(
            "cliprange_value",
            low=0.01,
            high=100.0,
            scale="log",
            unit="score",
            meaning="How far a value may move.",
            unavailable_when=without_values,
        ),
        LiveCoefficient(
            "vf_coef",
            low=1e-3,
            high=10.0,
            scale="log",
            meaning="Weight of the value loss.",
            unavailable_when=without_values,
        ),
        LiveCoefficient(
            "length_penalty",
            low=0.0,
            high=0.1,
            unit="score/token",
            meaning="Taken off the score for each token. Higher is shorter.",
            enters="rollout",
        ),
        LiveCoefficient(
            "ptx_coef",
            low=0.0,
            high=10.0,
            meaning="Weight of the likelihood of pretraining rows. Higher forgets less.",
        ),
        LiveCoefficient(
            "reward_std_coef",
            low=0.0,
            high=10.0,
            meaning="What a unit of disagreement between rewards costs.",
            enters="rollout",
            unavailable_when=without_spread,
        ),
        LiveCoefficient(
            "kl_target",
            low=0.01,
            high=1000.0,
            scale="log",
            unit="nats",
            meaning="KL a completion at which the controller holds the policy.",
            enters="rollout",
            unavailable_when=without_controller,
        ),
        LiveCoefficient(
            "kl_controller",
            low=0.0,
            high=1.0,
            meaning="1: the controller moves kl_coef. 0: kl_coef stays as it was set by hand.",
            enters="rollout",
            unavailable_when=without_controller,
        ),
    )

    def live_in(self, spec: RunSpec) -> tuple[LiveCoefficient, ...]:
        live = super().live_in(spec)
        return live if spec.pretraining is not None else tuple(one for one in live if one.name != "ptx_coef")

    @property
    def has_reference(self) -> bool:  # type: ignore[override]
        return self.reference != "none"

    @property
    def kl_controller(self) -> float:
        """Whether the controller runs at the start."""
        return float(self.kl_target is not None)

    @property
    def penalty(self) -> str:
        """The estimator in force."""
        return PENALTIES[self.kl_in] if self.kl_estimator == "auto" else self.kl_estimator

    @property
    def num_mini_batches(self) -> int:
        return self.rollout_batch_size // self.batch_size

    def check(self, spec: RunSpec) -> None:
        if self.rollout_batch_size % self.batch_size:
            raise SpecError(
                f"ppo: rollout_batch_size={self.rollout_batch_size} is no multiple of batch_size={self.batch_size}; "
                f"use {self.batch_size * max(1, round(self.rollout_batch_size / self.batch_size))}"
            )
        if reason := REFUSED.get((self.kl_in, self.kl_estimator)):
            raise SpecError(f"ppo: kl_in={self.kl_in} with kl_estimator={self.kl_estimator}: {reason}")
        if self.ptx_coef and spec.pretraining is None:
            raise SpecError(
                f"ppo: ptx_coef={self.ptx_coef:g} and no rows to keep up; give pretraining=, demonstrations"
            )
        if self.combine_rewards != "sum" and len(reward_parts(spec.reward)) < 2:
            raise SpecError(
                f"ppo: combine_rewards={self.combine_rewards} needs several rewards and there is one; "
                f"give reward=[first, second], or of an ensemble reward='RUN(over=\"{self.combine_rewards}\")'"
            )
        if self.preference_references and self.reference != "frozen":
            raise SpecError(
                f"ppo: preference_references={self.preference_references} compares with what the reference says, and "
                f"reference={self.reference} does not stay; use reference=frozen"
            )
        if self.rollout_batch_size % self.samples_per_prompt:
            raise SpecError(
                f"ppo: rollout_batch_size={self.rollout_batch_size} does not hold whole groups of "
                f"samples_per_prompt={self.samples_per_prompt}; use a multiple of it"
            )
        if self.reference == "none" and self.kl_target is not None:
            raise SpecError(
                f"ppo: kl_target={self.kl_target:g} needs a reference to measure KL to; use reference=frozen"
            )
        if self.reference == "ema" and spec.adapter is not None:
            raise SpecError(
                "ppo: reference=ema averages whole models, and an adapter's reference is the policy with it off; "
                "use reference=frozen, or no adapter"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise SpecError("ppo: kl_coef=0 with kl_target: the controller multiplies kl_coef; start with kl_coef > 0")
        if self.kl_horizon <= 0.2 * self.rollout_batch_size:
            raise SpecError(
                f"ppo: kl_horizon={self.kl_horizon} lets one rollout of {self.rollout_batch_size} take kl_coef to 0; "
                f"use more than {0.2 * self.rollout_batch_size:g}, 10000 is usual"
            )
        if self.value_model == "none" and self.whiten_rewards:
            raise SpecError(
                "ppo: whiten_rewards scales what a value model learns; with value_model=none use whiten_advantages"
            )
        if self.value_model == "none" and self.gamma < 1:
            raise SpecError(
                f"ppo: gamma={self.gamma:g} discounts towards a value model; use gamma=1 or value_model=own"
            )
        if self.batch_size < spec.launch.num_processes:
            raise SpecError(
                f"ppo: batch_size={self.batch_size} leaves some of {spec.launch.num_processes} ranks without a "
                f"completion; use at least {spec.launch.num_processes}"
            )
        if self.rollout_backend == "vllm_server":
            from rlhf_nb.training.rollout.vllm_engine import loopback

            loopback(self.vllm_url)
        if self.rollout_backend == "vllm" and spec.launch.num_processes > 1:
            raise SpecError(
                f"ppo: rollout_backend=vllm holds its engine in one process and there are "
                f"{spec.launch.num_processes}; start a server and use rollout_backend=vllm_server"
            )
        if self.max_new_tokens >= self.max_length:
            raise SpecError(
                f"ppo: max_new_tokens={self.max_new_tokens} leaves no room for a prompt in max_length={self.max_length}"
            )
        if spec.adapter is not None and spec.adapter.quantize != "none" and self.rollout_backend != "transformers":
            raise SpecError(
                f"ppo: adapter quantize={spec.adapter.quantize} with rollout_backend={self.rollout_backend}: vLLM "
                f"would sample from the base in full; use rollout_backend=transformers"
            )
        if spec.adapter is not None and spec.adapter.dropout:
            raise SpecError(
                f"ppo: adapter dropout={spec.adapter.dropout} makes the ratio of the policy to itself differ from one; "
                f"use dropout=0"
            )

    def preview_refusal(self) -> str | None:
        """Why no preview can be made: it reads the optimum of the objective that kl_coef prices in the reward."""
        if self.reference != "frozen":
            return f"reference={self.reference}: there is no fixed reference that an optimum could be told from"
        if self.kl_in == "loss":
            return "kl_in=loss: its optimum is not known in closed form; a preview needs kl_in=reward"
        return None

    # --- the maths --------------------------------------------------------------------------------------------------

    def penalised(self, rollout: Rollout, live: Live) -> Any:
        """(B,) the score that is optimised: preferred to the reference's, normalised, scaled, clipped, less what a cut
        completion and each token cost."""
        from rlhf_nb.maths.rewards import preference_as_reward

        score_B = rollout.score_B
        if rollout.reference_score_BR is not None:
            score_B = preference_as_reward(score_B, rollout.reference_score_BR)
        score_B = (score_B - rollout.score_shift) / rollout.score_spread * self.score_scale
        if self.score_clip is not None:
            score_B = score_B.clamp(-self.score_clip, self.score_clip)
        if self.length_normalised:
            score_B = score_B / rollout.mask_BT.sum(1).clamp(min=1)
        cut_B = (~rollout.ended_B).to(score_B.dtype)
        return score_B - self.missing_eos_penalty * cut_B - live.length_penalty * rollout.mask_BT.sum(1)

    def credit(self, rollout: Rollout, live: Live) -> Credit:
        """From scores to an advantage and a return for each token; once a rollout, over all ranks' completions."""
        from rlhf_nb.maths import kl
        from rlhf_nb.maths.advantages import gae, group_advantages, returns_to_go, token_rewards
        from rlhf_nb.maths.masked import masked_whiten
        from rlhf_nb.training.online_types import Credit

        mask_BT = rollout.mask_BT
        kl_BT = kl.estimate(rollout.behavior_logprobs_BT, rollout.reference_logprobs_BT, "k1")
        kl_coef = live.kl_coef if self.kl_in == "reward" else 0.0
        score_B = self.penalised(rollout, live)
        rewards_BT = token_rewards(score_B, kl_BT, mask_BT, kl_coef=kl_coef)
        total_B = rewards_BT.sum(1)
        if self.value_model == "none":
            if self.samples_per_prompt > 1:
                groups_PG = score_B.view(-1, self.samples_per_prompt)
                score_B = group_advantages(groups_PG, scale="none").view(-1)
                rewards_BT = token_rewards(score_B, kl_BT, mask_BT, kl_coef=kl_coef)
            returns_BT = returns_to_go(rewards_BT, mask_BT)
            return Credit(
                total_B, masked_whiten(returns_BT, mask_BT) if self.whiten_advantages else returns_BT, returns_BT
            )
        if self.whiten_rewards:
            rewards_BT = masked_whiten(rewards_BT, mask_BT, shift_mean=False)
        advantages_BT, returns_BT = gae(rewards_BT, rollout.values_BT, mask_BT, gamma=self.gamma, lam=self.lam)
        if self.whiten_advantages:
            advantages_BT = masked_whiten(advantages_BT, mask_BT)
        return Credit(total_B, advantages_BT, returns_BT)

    def loss(self, batch: Minibatch, outputs: Outputs, live: Live) -> TokenLosses:
        """Losses of each token. The optimizer sees policy + vf_coef·value − entropy_coef·entropy, a mean over
        tokens."""
        from rlhf_nb.maths import kl
        from rlhf_nb.maths.policy_gradient import clipped_policy_loss, clipped_value_loss, truncated_importance
        from rlhf_nb.training.online_types import TokenLosses

        policy = clipped_policy_loss(
            outputs.logprobs_BT,
            batch.behavior_logprobs_BT,
            batch.advantages_BT,
            batch.mask_BT,
            cliprange=live.cliprange,
        )
        total_BT, metrics = policy.loss_BT, {"loss/policy": policy.loss_BT, "policy/clip_fraction": policy.clipped_BT}
        weight_BT: Any = 1.0
        if self.importance_cap is not None:
            weight_BT = truncated_importance(
                batch.behavior_logprobs_BT, batch.sampler_logprobs_BT, batch.mask_BT, cap=self.importance_cap
            )
            metrics["policy/importance_weight"] = weight_BT
            total_BT = total_BT * weight_BT
        if self.value_model != "none":
            value = clipped_value_loss(
                outputs.values_BT,
                batch.values_BT,
                batch.returns_BT,
                batch.mask_BT,
                cliprange_value=live.cliprange_value,
            )
            total_BT = total_BT + live.vf_coef * value.loss_BT
            metrics |= {"loss/value": value.loss_BT, "value/clip_fraction": value.clipped_BT}
        if self.kl_in == "loss":
            penalty_BT = self._penalty(batch, outputs.logprobs_BT)
            total_BT = total_BT + live.kl_coef * weight_BT * penalty_BT
            metrics["loss/kl"] = penalty_BT
        if live.entropy_coef:
            total_BT = total_BT - live.entropy_coef * outputs.entropy_BT
        return TokenLosses(
            total_BT,
            {
                "loss": total_BT,
                **metrics,
                "policy/approx_kl": kl.estimate(batch.behavior_logprobs_BT, outputs.logprobs_BT, "k3"),
                "policy/entropy": outputs.entropy_BT,
            },
        )

    def _penalty(self, batch: Minibatch, logprobs_BT: Tensor) -> Tensor:
        """(B, T) nats, what kl_coef multiplies in the loss; its gradient is that of the KL of each token's choice."""
        from rlhf_nb.maths import kl
        from rlhf_nb.maths.masked import fill

        logprobs_BT, reference_BT = fill(logprobs_BT, batch.mask_BT), fill(batch.reference_logprobs_BT, batch.mask_BT)
        if self.penalty == "k2":
            return kl.estimate(logprobs_BT, reference_BT, "k2")
        # The ratio makes it an expectation under the policy that is differentiated, whoever sampled.
        ratio_BT = (logprobs_BT - fill(batch.behavior_logprobs_BT, batch.mask_BT)).exp()
        return ratio_BT * kl.estimate(logprobs_BT, reference_BT, "k3")

    # --- the loop ---------------------------------------------------------------------------------------------------

    @classmethod
    def preload(cls) -> None:
        import rlhf_nb.training.online  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from rlhf_nb.training.online import OnlineTrainer

        return OnlineTrainer(self, context)
