"""Cross entropy of a projection's logits written out in PyTorch: what every backend is held to.

    x = h Wᵀ (+ b)      loss, nll, correct and dx = g (softmax(x) - q) as in ops/cross_entropy/reference.py
    dh = dx W           dW = dxᵀ h           db = the sum of dx over the rows

float64 is computed in float64, everything else in float32 and rounded at the end: logits are not rounded to
16 bits, as a linear layer's are.

Shapes: B sequences, T rows of each, D features, V classes. Rows whose target is ignored have loss, nll and
gradient 0 and add nothing to the gradients of the projection, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nlpfast.ops.cross_entropy import reference as cross_entropy

SERVES = "every device and floating dtype; needs memory for several [N, V]"


def refusal(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> str | None:
    """Return None: the definition serves every call."""
    return None


def forward(
    input: Tensor,  # [B, T, D]
    linear_weight: Tensor,  # [V, D]
    linear_bias: Tensor | None,  # [V]
    target: Tensor,  # [B, T]
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Compute the loss of each row, and what a backward pass needs.

    Args:
        input: h, any strides.
        linear_weight: W, likewise.
        linear_bias: b, or None.
        target: int64, 0..V - 1 or ignore_index.
        ignore_index: the target of rows that do not count.
        pad_index: the class whose q is 0, unless it is the target; -1 for none.
        on_target: q at the target.
        on_other: q at the other classes.
        wanted: which of the gradients of input, weight and bias a backend may compute at once, for an
            upstream gradient of 1 in all rows. The definition computes none.

    Returns:
        loss [B, T] and nll [B, T], float32 (float64 for float64 inputs); correct [B, T], bool; statistics
        [B, T, 2], as of the logits alone; and either no tensors or three, the gradients that were wanted in a
        dtype of the backend's choice, and empty ones in the place of the others.
    """
    logits, _, _ = _logits(input, linear_weight, linear_bias, target, ignore_index)
    options = (ignore_index, pad_index, on_target, on_other)
    return (*cross_entropy.forward(logits, target, *options, None, False)[:4], [])


def backward(
    grad_loss: Tensor,  # [B, T]
    input: Tensor,  # [B, T, D]
    linear_weight: Tensor,  # [V, D]
    linear_bias: Tensor | None,  # [V]
    target: Tensor,  # [B, T]
    statistics: Tensor,  # [B, T, 2]
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of input, weight and bias; empty tensors for those that are not wanted.

    Args:
        grad_loss: the upstream gradient of each row's loss.
        input: as in `forward`.
        linear_weight: as in `forward`.
        linear_bias: as in `forward`.
        target: as in `forward`.
        statistics: what `forward` returned.
        ignore_index: as in `forward`.
        pad_index: as in `forward`.
        on_target: as in `forward`.
        on_other: as in `forward`.
        wanted: which of the three.

    Returns:
        Three tensors in the shapes of the inputs and a dtype of the backend's choice.
    """
    logits, rows, weight = _logits(input, linear_weight, linear_bias, target, ignore_index)
    options = (ignore_index, pad_index, on_target, on_other)
    slope = cross_entropy.backward(grad_loss, logits, target, statistics, None, None, *options, False)
    flat = slope.flatten(0, 1)
    none = logits.new_empty(0)
    return [
        slope @ weight if wanted[0] else none,
        flat.T @ rows.flatten(0, 1) if wanted[1] else none,
        flat.sum(0) if wanted[2] else none,
    ]


def _logits(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits, and what they are a product of, in computing precision."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    # rows that are ignored may hold anything
    rows = input.to(dtype).where((target != ignore_index).unsqueeze(-1), 0.0)
    weight = linear_weight.to(dtype)
    logits = rows @ weight.T
    return logits if linear_bias is None else logits + linear_bias.to(dtype), rows, weight
