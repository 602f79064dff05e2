"""Dropout as plain PyTorch: the definition, and the backend of last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from nlpfast.ops.attention.reference import dropout_keep
from nlpfast.ops.seeds import VALUES

SERVES = "float32, bfloat16, float16 and float64 on any device, slowly"
# Columns of the matrix that a tensor's elements count as.
COLUMNS = 64


def refusal(x: Tensor) -> str | None:
    """Return None: it serves every call."""
    return None


def forward(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return x with elements set to 0, and the others divided by what is left of 1.

    Element e in row-major order counts as that of row e // 64 and column e % 64 of a matrix, whose random
    bits are those of attention's probabilities for one head.

    Args:
        x: [...], any strides.
        seed: int64 [2], seed and offset.
        threshold: elements whose 16 bits are below it are dropped; in 1..65535.
    """
    n = x.numel()
    keep = dropout_keep(seed, threshold / VALUES, (1, 1, -(-n // COLUMNS), COLUMNS)).flatten()[:n]
    return torch.where(keep.view(x.shape), x * (VALUES / (VALUES - threshold)), 0.0)


def backward(grad: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return the gradient of x: dropout of its own, with the same mask and factor."""
    return forward(grad, seed, threshold)


def dropped_rows(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """Return x [N, C] with elements set to 0, and the others divided by what is left of 1.

    Element (n, c) has the random bits of the attention probability of query n and key c, for one head. Other
    ops drop what they compute by this.

    Args:
        x: [N, C].
        seed: int64 [2], seed and offset; None for no dropout.
        threshold: as of `forward`, or 0 for no dropout.
    """
    if seed is None or threshold == 0:
        return x
    keep = dropout_keep(seed, threshold / VALUES, (1, 1, x.shape[0], x.shape[1]))[0, 0]
    return x * (keep.to(x.dtype) * (VALUES / (VALUES - threshold)))
