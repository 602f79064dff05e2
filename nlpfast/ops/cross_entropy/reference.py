"""Label-smoothed cross entropy written out in PyTorch: the definition that every backend is held to.

    q = on_target at the target, 0 at pad_index if there is one, on_other elsewhere
    lse = log sum_v exp(x_v)   nll = lse - x_target   loss = sum_v q_v (lse - x_v)   dx = g (softmax(x) - q)

q sums to 1. What a row of confident logits leaves is a difference of nearly equal numbers, so neither lse nor
softmax is formed at the target: with others = sum over v != target of exp(x_v - max) and
total = others + exp(x_target - max), softmax(x)_target - 1 = -others / total, and nll = log1p(others) where
the target has the maximum. float64 is computed in float64, everything else in float32 and rounded at the end.

Shapes: B sequences, T rows of each, V classes. Rows whose target is ignored have loss, nll and gradient 0,
whatever their logits hold, and are not correct.
"""

from __future__ import annotations

import torch
from torch import Tensor

SERVES = "every device and floating dtype; needs memory for several [N, V]"


def refusal(input: Tensor, target: Tensor) -> str | None:
    """Return None: the definition serves every call."""
    return None


def forward(
    input: Tensor,  # [B, T, V]
    target: Tensor,  # [B, T]
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    grad_scale: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the loss of each row, and what a backward pass needs.

    Args:
        input: logits, any strides.
        target: int64, 0..V - 1 or ignore_index.
        ignore_index: the target of rows that do not count.
        pad_index: the class whose q is 0, unless it is the target; -1 for none.
        on_target: q at the target.
        on_other: q at the other classes.
        grad_scale: []; also compute the gradient, for an upstream gradient of that number in all rows.
        inplace: write that gradient over the logits.

    Returns:
        loss [B, T] and nll [B, T], float32 (float64 for float64 inputs); correct [B, T], bool, whether the
        target is the first class with the largest logit; statistics [B, T, 2], the maximum and `others`; and
        the gradient in the input's shape and dtype, or None.
    """
    kept, index, x = _rows(input, target, ignore_index)
    top = x.amax(-1)
    at_target = x.gather(-1, index).squeeze(-1)
    others = (x - top.unsqueeze(-1)).exp().scatter(-1, index, 0.0).sum(-1)
    # no sum of probabilities without a finite maximum, as in PyTorch
    others = others + (top - top)
    statistics = torch.stack((top, others), -1)
    log_total = torch.log(others + (at_target - top).exp())
    # without cancellation at the maximum
    nll = torch.where(at_target == top, torch.log1p(others), log_total - (at_target - top))
    loss = on_target * nll
    if on_other != 0.0:
        below = (top + log_total).unsqueeze(-1) - x
        below = below.scatter(-1, index, 0.0)
        if pad_index >= 0:
            below[..., pad_index] = 0.0
        loss = loss + on_other * below.sum(-1)
    correct = (x.argmax(-1) == index.squeeze(-1)) & kept
    gradient = None
    if grad_scale is not None:
        rows = grad_scale.to(x.dtype).expand(kept.shape)
        gradient = backward(
            *(
                rows,
                input,
                target,
                statistics,
                None,
                None,
                ignore_index,
                pad_index,
                on_target,
                on_other,
                False,
            )
        )
        gradient = input.copy_(gradient) if inplace else gradient
    return loss.where(kept, 0.0), nll.where(kept, 0.0), correct, statistics, gradient


def backward(
    grad_loss: Tensor,  # [B, T]
    input: Tensor,  # [B, T, V]
    target: Tensor,  # [B, T]
    statistics: Tensor,  # [B, T, 2]
    gradient: Tensor | None,  # [B, T, V]
    grad_scale: Tensor | None,  # []
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    inplace: bool,
) -> Tensor:
    """Return the gradient of the logits.

    Args:
        grad_loss: the upstream gradient of each row's loss.
        input: as in `forward`.
        target: as in `forward`.
        statistics: what `forward` returned.
        gradient: the gradient that `forward` returned, which nobody else holds; or None.
        grad_scale: for which upstream gradient that is.
        ignore_index: as in `forward`.
        pad_index: as in `forward`.
        on_target: as in `forward`.
        on_other: as in `forward`.
        inplace: with a gradient, the logits are no more: it is there instead. Without one, it is to be
            written over the logits.

    Returns:
        The input's shape and dtype.
    """
    if gradient is not None and grad_scale is not None and inplace:
        return rescaled(gradient, grad_loss, grad_scale, target != ignore_index)
    kept, index, x = _rows(input, target, ignore_index)
    top, others = (part.unsqueeze(-1) for part in statistics.unbind(-1))
    exponentials = (x - top).exp()
    total = others + exponentials.gather(-1, index)
    slope = exponentials / total - on_other
    if pad_index >= 0:
        slope[..., pad_index] += on_other
    # softmax - q at the target, where both are nearly 1
    slope = slope.scatter(-1, index, (1.0 - on_target) - others / total)
    slope = slope * grad_loss.to(x.dtype).unsqueeze(-1)
    slope = slope.where(kept.unsqueeze(-1), 0.0).to(input.dtype)
    return input.copy_(slope) if inplace else slope


def rescaled(gradient: Tensor, grad_loss: Tensor, grad_scale: Tensor, kept: Tensor) -> Tensor:
    """Return the gradient, which was made for `grad_scale`, for other upstream gradients, in place.

    Args:
        gradient: [B, T, V].
        grad_loss: [B, T].
        grad_scale: [].
        kept: [B, T], bool, the rows that count.
    """
    return gradient.mul_((grad_loss / grad_scale).where(kept, 0.0).unsqueeze(-1))


def _rows(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows count, the class [B, T, 1] to read in each, and the logits in computing precision."""
    kept = target != ignore_index
    x = input if input.dtype == torch.float64 else input.float()
    # rows that are ignored may hold anything
    return kept, target.where(kept, 0).unsqueeze(-1), x.where(kept.unsqueeze(-1), 0.0)
