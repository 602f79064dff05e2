"""What cross entropy of logits and of a projection's logits have in common: labels, smoothing, reductions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "sequence")
SMOOTHINGS = ("uniform", "fairseq", "exclude_pad")


class Labels(NamedTuple):
    """Targets that were checked, and the distribution that they stand for.

    Attributes:
        target: [...], int64, a class or the index of rows that do not count.
        counted: [], the number of rows that do, for the mean of them; None otherwise.
        options: what the backends of both ops take: that index; the class without mass, -1 for none; q at the
            target; q at the other classes.
    """

    target: Tensor
    counted: Tensor | None
    options: tuple[int, int, float, float]

    def reduced(self, rows: Tensor, reduction: str) -> Tensor:
        """Return the rows as [...], their sum, their mean over those that count, or a sum a sequence.

        Args:
            rows: a number a row, in the order of the targets.
            reduction: one of REDUCTIONS.
        """
        rows = rows.view(self.target.shape)
        if reduction == "none":
            return rows
        if reduction == "sequence":
            return rows.sum(-1)
        return rows.sum() if self.counted is None else rows.sum() / self.counted

    def results(
        self, loss: Tensor, nll: Tensor, correct: Tensor, reduction: str, return_nll: bool
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return what the ops do: the loss alone, or with nll and the number of correct rows.

        Args:
            loss: a number a row.
            nll: likewise.
            correct: a truth value a row.
            reduction: one of REDUCTIONS.
            return_nll: whether all three are wanted.
        """
        if not return_nll:
            return self.reduced(loss, reduction)
        counts = correct.sum() if reduction == "mean" else self.reduced(correct.long(), reduction)
        return self.reduced(loss, reduction), self.reduced(nll, reduction), counts


def prepare(
    target: Tensor,
    input: Tensor,
    V: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    smoothing: str,
    pad_index: int | None,
) -> Labels:
    """Return the labels of an op's call, after checking all that concerns them.

    Args:
        target: [...], int64.
        input: [..., D], what the op's rows are made of.
        V: number of classes.
        ignore_index: the target of rows that do not count.
        reduction: one of REDUCTIONS.
        label_smoothing: eps, 0..1.
        smoothing: one of SMOOTHINGS.
        pad_index: the class without mass, for "exclude_pad".

    Raises:
        ValueError: for shapes, values or names that do not fit; for targets outside of the classes, on the
            CPU and in uncompiled code.
        TypeError: for targets that are not int64.
    """
    _check(target, input, V, reduction, label_smoothing, smoothing, pad_index)
    if pad_index is not None:
        target = target.masked_fill(target.eq(pad_index), ignore_index)
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(target, ignore_index, V)
    on_target, on_other = _smoothed(label_smoothing, smoothing, V)
    options = (ignore_index, -1 if pad_index is None else pad_index, on_target, on_other)
    return Labels(target, (target != ignore_index).sum() if reduction == "mean" else None, options)


def as_sequences(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs as [B, T, D] and targets as [B, T]; views, but for more than three dimensions.

    Args:
        input: [..., D].
        target: [...].
    """
    if input.ndim < 3:
        lead = (1,) * (3 - input.ndim)
        return input.view(lead + tuple(input.shape)), target.reshape(lead + tuple(target.shape))
    return input.flatten(0, -3), target.flatten(0, -2)


def _check(
    target: Tensor,
    input: Tensor,
    V: int,
    reduction: str,
    label_smoothing: float,
    smoothing: str,
    pad_index: int | None,
) -> None:
    """Raise for arguments that do not fit; the values of the targets are looked at elsewhere."""
    if target.dtype != torch.int64:
        rule = "it must be torch.int64, one class a row"
        raise TypeError(
            f"target has the dtype {target.dtype}; {rule}: call .long() on it, "
            "or F.cross_entropy for probabilities"
        )
    if target.shape != input.shape[:-1]:
        rule = f"it must be input's without the last, {list(input.shape[:-1])}"
        raise ValueError(f"target has the shape {list(target.shape)}; {rule}: reshape one of the two")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} and input on {input.device}: move one of the two")
    for name, value, known in (("reduction", reduction, REDUCTIONS), ("smoothing", smoothing, SMOOTHINGS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {known}: pass one of them")
    if reduction == "sequence" and target.ndim not in (1, 2):
        rule = "reduction='sequence' takes targets [B, T] or [T]"
        raise ValueError(f"target has the shape {list(target.shape)}; {rule}: view them so")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in 0..1: pass a share")
    if (smoothing == "exclude_pad") != (pad_index is not None):
        raise ValueError(
            f"pad_index is {pad_index} and smoothing {smoothing!r}; 'exclude_pad' needs a pad_index, "
            "the others have none: change one of the two"
        )
    if pad_index is not None and not 0 <= pad_index < V:
        raise ValueError(f"pad_index is {pad_index}; it must lie in 0..{V - 1}: name a class")


def _check_values(target: Tensor, ignore_index: int, V: int) -> None:
    """Raise for a target that is no class; only where looking at values costs nothing."""
    if target.numel() == 0:
        return
    least, largest = target.aminmax()
    if int(least) >= 0 and int(largest) < V:
        return
    outside = ((target < 0) | (target >= V)) & (target != ignore_index)
    if outside.any():
        where = outside.nonzero()[0].tolist()
        value = int(target[tuple(where)])
        raise ValueError(
            f"target{where} is {value}; it must be a class, 0..{V - 1}, or ignore_index={ignore_index}: "
            "encode the labels for these logits"
        )


def _smoothed(eps: float, smoothing: str, V: int) -> tuple[float, float]:
    """Return q at the target and at the classes that share eps."""
    sharing = {"uniform": V, "fairseq": V - 1, "exclude_pad": V - 2}[smoothing]
    if sharing <= 0:
        return 1.0, 0.0
    on_other = eps / sharing
    return 1.0 - eps + (on_other if smoothing == "uniform" else 0.0), on_other
