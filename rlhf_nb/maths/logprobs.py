"""Log-probabilities of completions. The only module that knows the offset by one at the prompt/completion border.

A causal model's output at position i predicts token i + 1. With prompts of width P (padded on the left) and
completions of width T (padded on the right) in one row of L = P + T tokens, completion token t stands at position P +
t and is predicted at P + t − 1: `predicting_slice` is `[P − 1, L − 1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_nb.errors import ShapeError

MAX_LOGITS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


def predicting_slice(prompt_width: int, length: int) -> slice:
    """Positions of a row of `length` tokens at which the tokens after its first `prompt_width` are predicted.

    Raises:
        ShapeError: prompt_width < 1: nothing predicts the first token of a row.
    """
    if prompt_width < 1:
        raise ShapeError("a completion needs at least one prompt token before it: its first token is predicted there")
    return slice(prompt_width - 1, length - 1)


def position_ids(attention_mask_BL: Tensor) -> Tensor:
    """(B, L) positions that start at 0 on each row's first real token, wherever it was padded."""
    return (attention_mask_BL.long().cumsum(1) - 1).clamp(min=0)


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given tokens.

    Args:
        logits_NV: (..., V).
        tokens_N: (...) int.
        temperature: > 0; the same as in sampling, or the ratio of two policies is off.

    Returns:
        (...) nats, ≤ 0.

    Raises:
        ShapeError: The shapes do not fit.
    """
    if logits_NV.shape[:-1] != tokens_N.shape:
        raise ShapeError(f"logits {tuple(logits_NV.shape)} do not fit tokens {tuple(tokens_N.shape)}")
    scaled_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
    chosen_N = scaled_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)
    return chosen_N - scaled_NV.logsumexp(-1)


def entropy(logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """(...) entropy of softmax(logits / temperature), nats, in [0, log V]."""
    logprobs_NV = torch.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, dim=-1)
    # A logit of −inf is a token that never occurs: 0 · −inf must be 0.
    return -(logprobs_NV.exp() * logprobs_NV.clamp(min=torch.finfo(logprobs_NV.dtype).min)).sum(-1)


def completion_logprobs(
    hidden_BTD: Tensor,
    head: nn.Module,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability (and entropy) of the tokens that count, from the hidden states that predict them.

    Never holds `[B, T, V]`: tokens that do not count are left out, and the others go through the head in pieces of at
    most `max_logits` logits, which the backward pass computes again. Arithmetic after the head is float32 or better.

    Args:
        hidden_BTD: (B, T, D), at `predicting_slice`.
        head: D → V, the model's output embedding.
        tokens_BT: (B, T) int.
        mask_BT: (B, T) bool.
        temperature: > 0.
        entropy_gradient: Let gradients flow through the entropy, for an entropy bonus. Without, watching it costs no
            backward pass.
        max_logits: Tokens × vocabulary held at once.

    Returns:
        (logprobs_BT, entropy_BT or None), nats; 0 where the mask is False.

    Raises:
        ShapeError: The shapes do not fit, or the mask is not bool.
    """
    if not hidden_BTD.shape[:2] == tokens_BT.shape == mask_BT.shape or mask_BT.dtype != torch.bool:
        raise ShapeError(
            f"hidden states {tuple(hidden_BTD.shape)}, tokens {tuple(tokens_BT.shape)} and mask {tuple(mask_BT.shape)} "
            f"({mask_BT.dtype}) do not fit"
        )
    hidden_ND, tokens_N = hidden_BTD[mask_BT], tokens_BT[mask_BT]

    def piece(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = token_logprobs(logits, tokens, temperature=temperature)
        if not with_entropy:
            return logprobs, logprobs.new_zeros(())
        return logprobs, entropy(logits if entropy_gradient else logits.detach(), temperature=temperature)

    rows = max(1, max_logits // int(head.get_parameter("weight").shape[0]))
    if len(tokens_N) <= rows:
        pieces = [piece(hidden_ND, tokens_N)]
    else:
        recompute = torch.is_grad_enabled() and (
            hidden_ND.requires_grad or any(p.requires_grad for p in head.parameters())
        )
        pieces = [
            checkpoint(piece, h, t, use_reentrant=False) if recompute else piece(h, t)
            for h, t in zip(hidden_ND.split(rows), tokens_N.split(rows), strict=True)
        ]
    logprobs_N = torch.cat([p[0] for p in pieces])
    # masked_scatter is differentiable and leaves the rest at zero.
    blank_BT = logprobs_N.new_zeros(mask_BT.shape)
    logprobs_BT = blank_BT.masked_scatter(mask_BT, logprobs_N)
    if not with_entropy:
        return logprobs_BT, None
    return logprobs_BT, blank_BT.masked_scatter(mask_BT, torch.cat([p[1] for p in pieces]))
