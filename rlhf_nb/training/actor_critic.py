"""The models of online RL: policy, reference, value model; as one module that trains, or beside it."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_nb.errors import SpecError
from rlhf_nb.maths.logprobs import completion_logprobs, position_ids, predicting_slice
from rlhf_nb.training import models
from rlhf_nb.training.arguments import lora_config
from rlhf_nb.training.precision import halve_frozen

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


CHANCE = re.compile("drop|jitter")
"""In the names of rates at which modules draw lots in train mode."""


class ChangedHead(nn.Module):
    """An output embedding with what its model does to the logits after it: they are scaled, or capped."""

    def __init__(self, embedding: nn.Module, *, times: float = 1.0, over: float = 1.0, cap: float | None = None):
        super().__init__()
        self.embedding, self.times, self.over, self.cap = embedding, times, over, cap

    @property
    def weight(self) -> nn.Parameter:
        return self.embedding.get_parameter("weight")

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.embedding(hidden) * self.times / self.over
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class ValueHead(nn.Linear):
    """Hidden states → (…, 1) values, in the precision of its own weights whatever autocast casts around it."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def trunk_and_head(model: Any) -> tuple[Any, nn.Module]:
    """A causal model's hidden-state part for text, and what makes logits of it; adapters inside stay in force."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk, head, config = base.get_decoder(), base.get_output_embeddings(), base.config.get_text_config()
    # Cohere and Falcon-H1 multiply, Granite divides, Gemma caps. The check below finds who does yet another thing.
    times = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    over, cap = getattr(config, "logits_scaling", None) or 1.0, getattr(config, "final_logit_softcapping", None)
    if head is None or (times == over == 1.0 and cap is None):
        return trunk, head
    return trunk, ChangedHead(head, times=times, over=over, cap=cap)


@torch.no_grad()
def check_trunk_and_head(model: Any) -> None:
    """See that they say what the model says, token by token too.

    Raises:
        SpecError: The model changes its logits in another way, or keeps what it has read elsewhere than in a cache.
    """
    name = type(model).__name__
    trunk, head = trunk_and_head(model)
    if head is None:
        raise SpecError(f"model {name} has no output embedding; give a causal language model")
    if "past_key_values" not in inspect.signature(type(trunk).forward).parameters:
        raise SpecError(f"model {name} decodes with a state of its own, which is not followed here; give another model")
    probe = torch.tensor([[0, 1, 2]], device=next(model.parameters()).device)
    probe = probe % model.config.get_text_config().vocab_size
    there = model.eval()(input_ids=probe, use_cache=False).logits
    if not torch.allclose(head(trunk(input_ids=probe, use_cache=False).last_hidden_state), there, rtol=1e-3, atol=1e-3):
        raise SpecError(
            f"model {name} changes its logits after its output embedding in a way that is not followed here; give "
            f"another model"
        )


def hidden_states(trunk: Any, tokens_BL: Tensor, attention_mask_BL: Tensor, at: slice) -> Tensor:
    """(B, T, D) hidden states at some positions of rows that may be padded on either side."""
    return trunk(
        input_ids=tokens_BL,
        attention_mask=attention_mask_BL,
        position_ids=position_ids(attention_mask_BL),
        use_cache=False,
    ).last_hidden_state[:, at]


class ActorCritic(nn.Module):
    """Policy and value model in one module, so that one wrapper shares the gradients of both."""

    def __init__(
        self, policy: Any, critic: Any | None, width: int | None, precision: Literal["fp32", "bf16"] = "fp32"
    ) -> None:
        """
        Args:
            policy: Causal model, an adapter on it or not.
            critic: The value model's own trunk; None reads the values off the policy's.
            width: Of the hidden states; None for no value model at all: every value is 0.
            precision: What the models compute in; log-probabilities, entropies and values are float32 or better.
        """
        super().__init__()
        self.policy, self.critic = policy, critic
        self.bf16 = precision == "bf16"
        # What an FSDP plugin wraps one by one.
        self._no_split_modules = getattr(policy, "_no_split_modules", None)
        self.value_head = None
        if width is None:
            return
        # Zero: the first advantages are then the returns themselves, and no random function of the state.
        self.value_head = ValueHead(width, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        tokens_BL: Tensor,
        attention_mask_BL: Tensor,
        mask_BT: Tensor,
        *,
        temperature: float = 1.0,
        with_policy: bool = True,
        with_values: bool = True,
        with_entropy: bool = True,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """
        Args:
            tokens_BL: (B, P + T) prompts padded on the left, completions on the right.
            attention_mask_BL: (B, P + T) bool.
            mask_BT: (B, T) bool, which completion tokens count.
            with_policy: False gives values alone.
            with_values: False gives zeros for them, and no value model is asked.

        Returns:
            (logprobs_BT, entropy_BT, values_BT) of the completion tokens; V_t is the value *before* token t.
        """
        with torch.autocast(tokens_BL.device.type, torch.bfloat16, enabled=self.bf16):
            return self._outputs(
                tokens_BL,
                attention_mask_BL,
                mask_BT,
                temperature=temperature,
                with_policy=with_policy,
                with_values=with_values,
                with_entropy=with_entropy,
                entropy_gradient=entropy_gradient,
            )

    def _outputs(
        self,
        tokens_BL: Tensor,
        attention_mask_BL: Tensor,
        mask_BT: Tensor,
        *,
        temperature: float,
        with_policy: bool,
        with_values: bool,
        with_entropy: bool,
        entropy_gradient: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        T = mask_BT.shape[1]
        prompt_width = tokens_BL.shape[1] - T
        at = predicting_slice(prompt_width, tokens_BL.shape[1])
        trunk, head = trunk_and_head(self.policy)
        logprobs_BT = entropy_BT = hidden_BTD = None
        if with_policy or (self.critic is None and self.value_head is not None):
            hidden_BTD = hidden_states(trunk, tokens_BL, attention_mask_BL, at)
        if with_policy and hidden_BTD is not None:
            logprobs_BT, entropy_BT = completion_logprobs(
                hidden_BTD,
                head,
                tokens_BL[:, prompt_width:],
                mask_BT,
                temperature=temperature,
                with_entropy=with_entropy,
                entropy_gradient=entropy_gradient,
            )
        if self.value_head is None or not with_values:
            return logprobs_BT, entropy_BT, torch.zeros(mask_BT.shape, device=mask_BT.device)
        if self.critic is not None:
            hidden_BTD = hidden_states(self.critic, tokens_BL, attention_mask_BL, at)
        assert hidden_BTD is not None
        values_BT = self.value_head(hidden_BTD).squeeze(-1)
        return logprobs_BT, entropy_BT, values_BT if values_BT.dtype == torch.float64 else values_BT.float()

    def groups(self) -> list[list[nn.Parameter]]:
        """Trained parameters whose gradients are clipped together: the policy's, and those of a value model of its
        own."""
        value = list(self.value_head.parameters()) if self.value_head is not None else []
        value += list(self.critic.parameters()) if self.critic is not None else []
        policy = list(self.policy.parameters())
        together = [policy, value] if self.critic is not None else [policy + value]
        return [[p for p in group if p.requires_grad] for group in together]


class Reference:
    """The model that the KL is taken to: a second copy, or the policy with its adapter off, or none."""

    def __init__(
        self,
        policy: Any,
        frozen: Any | None,
        *,
        absent: bool = False,
        precision: Literal["fp32", "bf16"] = "fp32",
        backbone: nn.Module | None = None,
    ) -> None:
        """
        Args:
            backbone: The trunk's weights without any adapter, where training leaves them as they are: others may stand
                on them.
        """
        self._policy, self._frozen, self._absent, self.backbone = policy, frozen, absent, backbone
        self._bf16 = precision == "bf16"

    def state(self) -> dict[str, Tensor]:
        """Weights of a copy of its own; empty without one."""
        return dict(self._frozen.named_parameters()) if self._frozen is not None else {}

    @torch.no_grad()
    def follow(self, policy: Any, decay: float) -> None:
        """Move towards the policy: an exponential moving average of its weights."""
        assert self._frozen is not None, "a moving reference is a copy of its own"
        for mine, theirs in zip(self._frozen.parameters(), policy.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 1 - decay)

    def to(self, device: torch.device) -> None:
        if self._frozen is not None:
            self._frozen.to(device)

    @contextmanager
    def open(self) -> Iterator[tuple[Any, nn.Module]]:
        """Its trunk and head."""
        if self._frozen is not None:
            yield trunk_and_head(self._frozen)
            return
        with self._policy.disable_adapter():
            yield trunk_and_head(self._policy)

    @torch.no_grad()
    def logprobs(
        self, tokens_BL: Tensor, attention_mask_BL: Tensor, mask_BT: Tensor, *, temperature: float = 1.0
    ) -> Tensor | None:
        """(B, T) nats, of the completion tokens at the temperature that sampled them; 0 outside the mask. None where
        there is no reference."""
        if self._absent:
            return None
        prompt_width = tokens_BL.shape[1] - mask_BT.shape[1]
        device = tokens_BL.device.type
        with self.open() as (trunk, head), torch.autocast(device, torch.bfloat16, enabled=self._bf16):
            hidden = hidden_states(
                trunk, tokens_BL, attention_mask_BL, predicting_slice(prompt_width, tokens_BL.shape[1])
            )
            tokens_BT = tokens_BL[:, prompt_width:]
            return completion_logprobs(hidden, head, tokens_BT, mask_BT, temperature=temperature)[0]


def same_weights(module: nn.Module) -> Any:
    """A copy of a module's structure on the very same parameters and buffers: what is added to it is its own."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def chances(module: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Where a model draws lots in train mode: a module's name, what holds the rate, and under which attribute."""
    for name, one in module.named_modules():
        if isinstance(one, nn.Dropout) and one.p > 0:
            yield name, one, "p"
        # Others hand a rate of their own, or of their configuration, to a function. A whole model reads none there.
        for holder in (one, None if isinstance(one, PreTrainedModel) else vars(one).get("config")):
            for attribute, rate in list(getattr(holder, "__dict__", {}).items()):
                if CHANCE.search(attribute) and isinstance(rate, float) and rate > 0:
                    yield name, holder, attribute


def without_dropout(module: nn.Module) -> None:
    """Take the chance out of a model, so that train mode computes what eval mode does."""
    # The configuration that is saved with the model keeps its rates.
    copies: dict[int, Any] = {}
    for one in module.modules():
        config = vars(one).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(one, PreTrainedModel):
            one.config = copies.setdefault(id(config), copy.copy(config))
    for _, holder, attribute in list(chances(module)):
        setattr(holder, attribute, 0.0)


def load(
    context: Context,
    path: str,
    *,
    value_model: Literal["own", "policy_trunk", "none"],
    reference: Literal["frozen", "ema", "none"] = "frozen",
    precision: Literal["fp32", "bf16"] = "fp32",
    sharded: bool = False,
) -> tuple[ActorCritic, Reference]:
    """Policy, value model and reference, all three from the policy's start.

    Args:
        sharded: Weights will be sharded over the ranks, each for one module alone.

    Every module stays in eval mode: with dropout the ratio of a policy to itself would not be one.
    """
    quantize = context.spec.adapter.quantize if context.spec.adapter is not None else "none"
    policy = models.load_model(path, quantize=quantize)
    check_trunk_and_head(policy)
    trunk, _ = trunk_and_head(policy)
    backbone = same_weights(trunk) if context.spec.adapter is not None else None
    critic = None
    if value_model == "own":
        # Under LoRA both train adapters only: the weights below them are one and the same, where one can stand for two.
        shares = context.spec.adapter is not None and not sharded
        critic = same_weights(trunk) if shares else copy.deepcopy(trunk)
    width = trunk.config.get_text_config().hidden_size if value_model != "none" else None
    if context.spec.adapter is not None:
        from peft import get_peft_model

        policy = get_peft_model(policy, lora_config(context, "CAUSAL_LM"))
        if critic is not None:
            critic = get_peft_model(critic, lora_config(context, "FEATURE_EXTRACTION"))
        frozen = None
    elif reference == "none":
        frozen = None
    else:
        frozen = models.load_model(path).eval().requires_grad_(False)
    models.freeze_beside_text(policy)
    if precision == "bf16":
        # Without an adapter what is frozen is saved with the rest; a shard's weights are of one kind; an average moves.
        if context.spec.adapter is not None and not sharded:
            # A value model of its own stands on the same weights.
            halve_frozen(policy)
        if frozen is not None and reference == "frozen":
            halve_frozen(frozen)
    return ActorCritic(policy, critic, width, precision).eval(), Reference(
        policy, frozen, absent=reference == "none", precision=precision, backbone=backbone
    )
