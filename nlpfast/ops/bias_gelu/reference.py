"""Bias, an activation and dropout as plain PyTorch: the definition, and the backend of last resort."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nlpfast.ops.dropout.reference import dropped_rows

SERVES = "float32, bfloat16, float16 and float64 on any device"
# The activations: GELU by the error function, GELU by a hyperbolic tangent, ReLU.
ERF, TANH, RELU = range(3)
# Of the second: sqrt(2 / pi) (v + 0.044715 v^3).
CUBIC = 0.044715


def refusal(x: Tensor) -> str | None:
    """Return None: it serves every call."""
    return None


def forward(x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int) -> Tensor:
    """Return the activation of x + bias, with elements set to 0 and the others divided by what is left of 1.

    Element (n, c) has the random bits of the attention probability of query n and key c, for one head.

    Args:
        x: [N, C].
        bias: [C], or None.
        activation: which; see above.
        seed: int64 [2], seed and offset, or None when `threshold` is 0.
        threshold: elements whose 16 bits are below it are dropped; in 0..65535.
    """
    v = _sum(x, bias)
    out = v.relu() if activation == RELU else v * _share(v, activation)
    return dropped_rows(out, seed, threshold).to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of bias; the latter is not rounded.

    Args:
        grad: [N, C], of what forward returned.
        x: as of forward, and so are the others.
        bias: see there.
        activation: see there.
        seed: see there.
        threshold: see there.
    """
    v = _sum(x, bias)
    if activation == RELU:
        # as PyTorch has it, 1 for a NaN
        slope = 1 - (v <= 0).to(v.dtype)
    elif activation == TANH:
        # where its square is infinite, share times 1 - share is 0
        rise = math.sqrt(2 / math.pi) * (1 + 3 * CUBIC * v.clamp(-100, 100).square())
        share = _share(v, TANH)
        slope = share + v * 2 * share * _share(-v, TANH) * rise
    else:
        slope = _share(v, ERF) + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    dv = dropped_rows(grad.to(v.dtype), seed, threshold) * slope
    return dv.to(x.dtype), dv.sum(0)


def _sum(x: Tensor, bias: Tensor | None) -> Tensor:
    v = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return v if bias is None else v + bias.to(v.dtype)


def _share(v: Tensor, activation: int) -> Tensor:
    """Return what GELU multiplies v by."""
    if activation == TANH:
        return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (v + CUBIC * v * v * v))
    return 0.5 * torch.erfc(v * -math.sqrt(0.5))
