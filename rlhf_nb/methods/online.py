"""What methods share that sample, score and update in turns: their knobs, their live coefficients, their checks.

What an algorithm is stands in its own file: `credit(rollout, live)` and `loss(minibatch, outputs, live)`, both pure.
The loop that calls them is training/online.py; hooks are named for when it calls them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LEARNING_RATE, LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.spec import reward_parts

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context
    from rlhf_nb.training.online_types import Credit, Extent, Live, Minibatch, Outputs, Rollout, TokenLosses


def without_spread(method: OnlineMethod) -> str | None:
    return None if method.combine_rewards == "mean_minus_std" else "only combine_rewards=mean_minus_std reads it"


def without_reference(method: OnlineMethod) -> str | None:
    return "reference=none: there is no reference to be held to" if method.reference == "none" else None


TEMPERATURE = LiveCoefficient(
    "temperature", low=0.1, high=2.0, meaning="Of sampling. Lower is surer.", enters="rollout"
)
ENTROPY = LiveCoefficient(
    "entropy_coef", low=0.0, high=0.1, unit="1/nat", meaning="Bonus on entropy. Higher explores more."
)
LENGTH_PENALTY = LiveCoefficient(
    "length_penalty",
    low=0.0,
    high=0.1,
    unit="score/token",
    meaning="Taken off the score for each token. Higher is shorter.",
    enters="rollout",
)
PRETRAINING = LiveCoefficient(
    "ptx_coef", low=0.0, high=10.0, meaning="Weight of the likelihood of pretraining rows. Higher forgets less."
)
REWARD_STD = LiveCoefficient(
    "reward_std_coef",
    low=0.0,
    high=10.0,
    meaning="What a unit of disagreement between rewards costs.",
    enters="rollout",
    unavailable_when=without_spread,
)


ROLLOUT = (LEARNING_RATE, TEMPERATURE, ENTROPY, LENGTH_PENALTY, PRETRAINING, REWARD_STD)
"""Live in all of them."""


class OnlineMethod(Method):
    """Learns from completions of its own, in rollouts."""

    rows: ClassVar[str] = "prompts"
    needs_reward: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True
    tether: ClassVar[str]
    """Name of the live coefficient that prices the KL to the reference."""
    group_knob: ClassVar[str] = "group_size"
    """Name of the knob that says how many completions a prompt gets."""

    # The objective. Every knob that moves the optimum says so.
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
    reward_timeout: float = Field(600.0, ge=0)
    """Seconds a reward may take over one rank's part of a rollout; 0 waits for ever."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the score of a completion that was cut at `max_new_tokens`. Moves the optimum to that of the penalised
    score."""
    length_penalty: float = Field(0.0, ge=0)
    """Taken off the score for every token. Moves the optimum to that of the penalised score."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the mean token entropy in the loss, a bonus. Moves the optimum towards flatter policies."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the mean negative log-likelihood of `pretraining` rows in the loss, a minibatch of them each step
    (PPO-ptx, arXiv:2203.02155). Moves the optimum towards what those rows say."""

    # The rollout
    rollout_batch_size: int = Field(64, gt=0)
    """Completions of one rollout, over all ranks."""
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
    vllm_transfer: Literal["disk", "nccl"] = "disk"
    """How whole models reach a vllm_server. disk: saved in the run's directory and read again. nccl: from GPU to GPU,
    to a server on another GPU of this machine, started with --weight-transfer-config '{"backend": "nccl"}'; the trainer
    needs vllm beside it too. Adapters always go by disk: they are small."""
    cuda_graphs: bool = False
    """Of rollout_backend=transformers, on CUDA: sample over a static cache, each token of all rows one replay of a
    captured graph, which frees the GPU from waiting for Python."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling (Yao et al. 2025): completions are read once more by the trainer, and a token's
    policy loss is weighted by min(π_trainer/π_sampler, importance_cap). For samplers that compute otherwise than the
    trainer does; 2 is usual. None: the sampler is believed."""

    # The update
    learning_rate: float = Field(1e-5, ge=0)
    """1e-5 suits whole models of a billion parameters; LoRA wants 1e-4, the toy model 2e-4."""
    batch_size: int = Field(32, gt=0)
    """Completions an optimizer step sees, over all ranks; a rollout has rollout_batch_size / batch_size minibatches."""
    target_kl: float | None = Field(None, gt=0)
    """End a rollout's passes once a step's mean KL to the policy that sampled exceeds this, nats a token."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this L2 norm, the policy's and a value model's of its own apart; 0 leaves them."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps its moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861), on CUDA, with bitsandbytes."""
    lr_scheduler: Literal["constant", "linear"] = "constant"
    """linear falls to 0 at max_steps."""
    on_not_finite: Literal["pause", "fail"] = "pause"
    """When a loss or gradient is not finite. pause: go back to the last good checkpoint and wait there for a person.
    fail: end the run."""
    stop_at_score: float | None = None
    """End the run, with its model saved, once a rollout's mean score reaches this."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: models compute in bfloat16 (autocast). What trains keeps float32 weights, what does not is held in
    bfloat16 (not under FSDP); log-probabilities, a reward model's head, credit and loss stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth slower. Dropout is then off for good."""
    micro_batch_size: int = Field(0, ge=0)
    """Completions of one forward and backward pass on one rank, to save memory; 0 takes a minibatch whole."""

    @property
    def has_reference(self) -> bool:  # type: ignore[override]
        return self.reference != "none"

    def live_in(self, spec: RunSpec) -> tuple[LiveCoefficient, ...]:
        live = super().live_in(spec)
        return live if spec.pretraining is not None else tuple(one for one in live if one.name != "ptx_coef")

    # --- what a method says of itself -------------------------------------------------------------------------------

    @property
    def each(self) -> int:
        """Completions of each prompt in a rollout."""
        return 1

    @property
    def passes(self) -> int:
        """Passes over each rollout."""
        return 1

    @property
    def values(self) -> Literal["own", "policy_trunk", "none"]:
        """Where the value model stands."""
        return "none"

    @property
    def compared_with(self) -> int:
        """Completions of the reference that each score is compared with."""
        return 0

    @property
    def normalises_scores(self) -> bool:
        """Scores are shifted and divided by the mean and standard deviation of all so far."""
        return False

    @property
    def resamplings(self) -> int:
        """How often, at most, the groups of a rollout that `wasted` names are replaced by those of other prompts."""
        return 0

    def wasted(self, score_PG: Tensor) -> Tensor:
        """(P,) bool: groups from which nothing can be learnt, since their scores are all equal."""
        from rlhf_nb.maths.advantages import flat_groups

        return flat_groups(score_PG)

    @property
    def num_mini_batches(self) -> int:
        return self.rollout_batch_size // self.batch_size

    def preview_refusal(self, live: Live) -> str | None:
        """Why no preview can be made: it reads the optimum of the objective that the tether prices in the reward."""
        if self.reference != "frozen":
            return f"reference={self.reference}: there is no fixed reference that an optimum could be told from"
        for name in ("entropy_coef", "ptx_coef"):
            if (value := getattr(live, name)) > 0:
                return f"{name}={value:g} moves the optimum to where no completion's score alone tells it; set it to 0"
        return None

    def settles_at(self, tether: float) -> float:
        """The β of π_ref·exp(r/β) that the method comes to at a tether, where it comes to such a policy."""
        return tether

    def check(self, spec: RunSpec) -> None:
        if self.rollout_batch_size % self.batch_size:
            raise SpecError(
                f"{self.name}: rollout_batch_size={self.rollout_batch_size} is no multiple of "
                f"batch_size={self.batch_size}; use "
                f"{self.batch_size * max(1, round(self.rollout_batch_size / self.batch_size))}"
            )
        if self.rollout_batch_size % self.each:
            raise SpecError(
                f"{self.name}: rollout_batch_size={self.rollout_batch_size} does not hold whole groups of "
                f"{self.group_knob}={self.each}; use a multiple of it"
            )
        if self.ptx_coef and spec.pretraining is None:
            raise SpecError(
                f"{self.name}: ptx_coef={self.ptx_coef:g} and no rows to keep up; give pretraining=, demonstrations"
            )
        if self.combine_rewards != "sum" and len(reward_parts(spec.reward)) < 2:
            raise SpecError(
                f"{self.name}: combine_rewards={self.combine_rewards} needs several rewards and there is one; "
                f"give reward=[first, second], or of an ensemble reward='RUN(over=\"{self.combine_rewards}\")'"
            )
        if self.reference == "ema" and spec.adapter is not None:
            raise SpecError(
                f"{self.name}: reference=ema averages whole models, and an adapter's reference is the policy with it "
                f"off; use reference=frozen, or no adapter"
            )
        if self.batch_size < spec.launch.num_processes:
            raise SpecError(
                f"{self.name}: batch_size={self.batch_size} leaves some of {spec.launch.num_processes} ranks without a "
                f"completion; use at least {spec.launch.num_processes}"
            )
        if self.rollout_backend == "vllm_server":
            from rlhf_nb.training.rollout.vllm_engine import loopback

            loopback(self.vllm_url)
        if self.vllm_transfer == "nccl" and (self.rollout_backend != "vllm_server" or spec.adapter is not None):
            which = "an adapter" if spec.adapter is not None else f"rollout_backend={self.rollout_backend}"
            raise SpecError(
                f"{self.name}: vllm_transfer=nccl sends whole models to a vllm_server and there is {which}; leave it "
                f"out"
            )
        if self.cuda_graphs and self.rollout_backend != "transformers":
            raise SpecError(
                f"{self.name}: cuda_graphs=True is of rollout_backend=transformers; {self.rollout_backend} has its "
                f"own: leave it out"
            )
        if self.rollout_backend == "vllm" and spec.launch.num_processes > 1:
            raise SpecError(
                f"{self.name}: rollout_backend=vllm holds its engine in one process and there are "
                f"{spec.launch.num_processes}; start a server and use rollout_backend=vllm_server"
            )
        if self.max_new_tokens >= self.max_length:
            raise SpecError(
                f"{self.name}: max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"max_length={self.max_length}"
            )
        if spec.adapter is not None and spec.adapter.quantize != "none" and self.rollout_backend != "transformers":
            raise SpecError(
                f"{self.name}: adapter quantize={spec.adapter.quantize} with rollout_backend={self.rollout_backend}: "
                f"vLLM would sample from the base in full; use rollout_backend=transformers"
            )
        if spec.adapter is not None and spec.adapter.dropout:
            raise SpecError(
                f"{self.name}: adapter dropout={spec.adapter.dropout} makes the ratio of the policy to itself differ "
                f"from one; use dropout=0"
            )

    # --- the maths --------------------------------------------------------------------------------------------------

    def compared(self, rollout: Rollout) -> Any:
        """(B,) the scores, or what is taken in their place, before they are normalised."""
        return rollout.score_B

    def penalised(self, rollout: Rollout, live: Live) -> Any:
        """(B,) the score that is optimised: less what a cut completion and each token cost."""
        cut_B = (~rollout.ended_B).to(rollout.score_B.dtype)
        return rollout.score_B - self.missing_eos_penalty * cut_B - live.length_penalty * rollout.mask_BT.sum(1)

    @abstractmethod
    def credit(self, rollout: Rollout, live: Live) -> Credit:
        """From scores to an advantage for each token; once a rollout, over all ranks' completions."""

    @abstractmethod
    def loss(self, batch: Minibatch, outputs: Outputs, live: Live) -> TokenLosses:
        """Losses of each token."""

    def importance_weight(self, batch: Minibatch) -> Any:
        """(B, T) what a token's loss is weighted by: 1, or where `importance_cap` is given the trainer's odds over the
        sampler's."""
        from rlhf_nb.maths.policy_gradient import truncated_importance

        if self.importance_cap is None:
            return 1.0
        return truncated_importance(
            batch.behavior_logprobs_BT, batch.sampler_logprobs_BT, batch.mask_BT, cap=self.importance_cap
        )

    def normaliser(self, extent: Extent) -> float:
        """What the sum of a global minibatch's token losses is divided by."""
        return extent.tokens

    def measured(self, rollout: Rollout) -> list[float] | None:
        """What `adapt` needs of a rollout that was used up; None where nothing is adapted."""
        return None

    def adapt(self, measured: list[float], live: Live) -> None:
        """Move coefficients before the next rollout, by what was measured of the last."""

    # --- the loop ---------------------------------------------------------------------------------------------------

    @classmethod
    def preload(cls) -> None:
        import rlhf_nb.training.online  # noqa: F401

    def build_trainer(self, context: Context) -> Trainer:
        from rlhf_nb.training.online import OnlineTrainer

        return OnlineTrainer(self, context)


def kl_penalty(batch: Minibatch, logprobs_BT: Tensor, estimator: Literal["k2", "ratio_k3"]) -> Tensor:
    """(B, T) nats, what the tether's coefficient multiplies where it stands in the loss.

    Its gradient is that of the KL of each token's choice. Plain k3 in the loss would converge to the optimum of the
    forward KL, and k1 there is no penalty at all: the gradient of each is another one's.
    """
    from rlhf_nb.maths import kl
    from rlhf_nb.maths.masked import fill

    logprobs_BT, reference_BT = fill(logprobs_BT, batch.mask_BT), fill(batch.reference_logprobs_BT, batch.mask_BT)
    if estimator == "k2":
        return kl.estimate(logprobs_BT, reference_BT, "k2")
    # The ratio makes it an expectation under the policy that is differentiated, whoever sampled.
    ratio_BT = (logprobs_BT - fill(batch.behavior_logprobs_BT, batch.mask_BT)).exp()
    return ratio_BT * kl.estimate(logprobs_BT, reference_BT, "k3")
