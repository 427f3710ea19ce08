"""Means and whitening over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_nb.errors import ShapeError


def check_mask(values: Tensor, mask: Tensor) -> None:
    """Raises ShapeError where a mask is not bool or has another shape than its values."""
    if mask.dtype != torch.bool:
        raise ShapeError(f"mask has dtype {mask.dtype}; a mask is bool, True where the token counts")
    if mask.shape != values.shape:
        raise ShapeError(f"mask has shape {tuple(mask.shape)} but the values have {tuple(values.shape)}")


def fill(values: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """The values, with `value` where the mask is False. Call it before any arithmetic.

    Masking the result instead lets NaN through: 0 · NaN is NaN, in the value and in the gradient.
    """
    check_mask(values, mask)
    return values.masked_fill(~mask, value)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the tokens that count; 0 where none does."""
    filled = fill(values, mask)
    return filled.sum() if dim is None else filled.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the tokens that count.

    Args:
        values: Any shape, float.
        mask: Same shape, bool.
        dim: Reduce this dimension only; None reduces all: a *token* mean, in which long completions weigh more.

    Returns:
        Scalar, or `values` without `dim`. Where no token counts: 0, with a zero gradient.

    Raises:
        ShapeError: The mask is not bool or has another shape.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Sample variance (n − 1) over all tokens that count; 0 for fewer than two."""
    centred = fill(values - masked_mean(values, mask), mask)
    return centred.square().sum() / (mask.sum() - 1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values scaled to unit sample variance over the tokens that count.

    Huang et al. 2024, arXiv:2403.17031, detail 8, and TRL 1.12 `masked_whiten`. Without the shift both add the mean
    back once they have divided, (x − m)/s + m: every token then earns m·(1 − 1/s) beside x/s, and a completion for its
    length. Here x/s.

    Args:
        values: Any shape, float. With several ranks, the values of all of them: statistics are global.
        mask: Same shape, bool.
        shift_mean: Also subtract the mean. False only divides, as for rewards, whose level matters.

    Returns:
        Same shape; 0 where the mask is False. Values that are all equal, up to rounding, become 0 (or stay, without
        the shift).

    Raises:
        ShapeError: The mask is not bool or has another shape.
    """
    filled, variance = fill(values, mask), masked_var(values, mask)
    flat = variance <= (4 * torch.finfo(values.dtype).eps) ** 2 * masked_mean(filled.square(), mask)
    scale = torch.where(flat, 0.0 if shift_mean else 1.0, torch.rsqrt(variance + 1e-8))
    return fill((filled - masked_mean(values, mask)) * scale, mask) if shift_mean else filled * scale
