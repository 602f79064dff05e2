"""Residual sum, dropout and layer norm as plain PyTorch: the definition, and the backend of last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from nlpfast.ops.dropout.reference import dropped_rows

SERVES = "float32, bfloat16, float16 and float64 on any device"


def refusal(part: Tensor, residual: Tensor, out_dtype: torch.dtype) -> str | None:
    """Return None: it serves every call."""
    return None


def forward(
    part: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum [N, C], its norm [N, C], and statistics [N, 2]: mean, and 1 over standard deviation.

    The norm is that of the sum as it is returned, rounded to the residual's dtype. Element (n, c) has the
    random bits of the attention probability of query n and key c, for one head.

    Args:
        part: [N, C], what is added.
        residual: [N, C].
        weight: [C].
        bias: [C], or None.
        seed: int64 [2], seed and offset, or None when `threshold` is 0.
        threshold: elements of `part` whose 16 bits are below it are dropped; in 0..65535.
        eps: is added to the variance.
        out_dtype: of the norm.
    """
    compute = _compute(residual)
    total = (residual.to(compute) + dropped_rows(part.to(compute), seed, threshold)).to(residual.dtype)
    x = total.to(compute)
    mean = x.mean(1, keepdim=True)
    rstd = ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()
    out = (x - mean) * rstd * weight.to(compute)
    if bias is not None:
        out = out + bias.to(compute)
    return total, out.to(out_dtype), torch.cat((mean, rstd), 1)


def backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    part_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of part, residual, weight and bias; those of the last two are not rounded.

    Args:
        grad_out: [N, C], of the norm.
        grad_sum: [N, C], of the sum; None for 0.
        total: [N, C], the sum that forward returned.
        statistics: [N, 2], of forward.
        weight: [C].
        seed: as of forward.
        threshold: as of forward.
        part_dtype: of the first gradient.
    """
    compute = _compute(total)
    mean, rstd = statistics[:, :1], statistics[:, 1:]
    x, slope = (total.to(compute) - mean) * rstd, grad_out.to(compute)
    g = slope * weight.to(compute)
    d_sum = rstd * (g - g.mean(1, keepdim=True) - x * (g * x).mean(1, keepdim=True))
    if grad_sum is not None:
        d_sum = d_sum + grad_sum.to(compute)
    d_part = dropped_rows(d_sum, seed, threshold).to(part_dtype)
    return d_part, d_sum.to(total.dtype), (slope * x).sum(0), slope.sum(0)


def _compute(residual: Tensor) -> torch.dtype:
    return torch.float64 if residual.dtype == torch.float64 else torch.float32
