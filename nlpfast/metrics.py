"""Numbers that say how good predictions are, computed in float64.

accuracy    how many are right
f1          how many are right of those said to be in a class, and of those that are
pearson     how far one list of numbers is a straight line of another
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["accuracy", "f1", "pearson"]

Numbers = Sequence[float] | Tensor


def accuracy(predictions: Numbers, labels: Numbers) -> float:
    """Return the share of predictions that equal their labels.

    Args:
        predictions: numbers of classes, [N] of any dtype.
        labels: the same.

    Raises:
        ValueError: the lengths differ or are 0, or a number is not whole.
    """
    predicted, right = _classes(predictions, labels)
    return float((predicted == right).double().mean())


def f1(predictions: Numbers, labels: Numbers, *, average: Literal["macro", "binary"] = "macro") -> float:
    """Return the harmonic mean of precision and recall, 0 where both are.

    Args:
        predictions: numbers of classes, [N] of any dtype.
        labels: the same.
        average: "macro" for the mean over all classes that are predicted or right; "binary" for class 1
            alone, of the classes 0 and 1.

    Raises:
        ValueError: the lengths differ or are 0, a number is not whole, `average` is another, or a class is
            neither 0 nor 1 with "binary".
    """
    predicted, right = _classes(predictions, labels)
    found: list[float] = torch.cat((predicted, right)).unique().tolist()
    if average == "binary":
        if not set(found) <= {0, 1}:
            raise ValueError(f"classes {found[:8]} must be 0 and 1 with average='binary'; pass 'macro'")
        found = [1]
    elif average != "macro":
        raise ValueError(f"average={average!r} must be 'macro' or 'binary'; pass one of them")
    scores = []
    for number in found:
        said, true = predicted == number, right == number
        total = int(said.sum() + true.sum())
        scores.append(2 * int((said & true).sum()) / total if total else 0.0)
    return sum(scores) / len(scores)


def pearson(x: Numbers, y: Numbers) -> float:
    """Return Pearson's correlation, from -1 to 1.

    A number that is added to all, or a factor, makes no difference, even if it is large.

    Args:
        x: [N] of any dtype.
        y: the same.

    Returns:
        The correlation; nan where x or y is constant, or has a number that is not finite.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    x, y = _pair(x, y, ("x", "y"))
    a, b = _centred(x), _centred(y)
    correlation = float((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())
    # rounding may lead beyond; nan stays nan
    return correlation if math.isnan(correlation) else max(-1.0, min(1.0, correlation))


def _centred(values: Tensor) -> Tensor:
    """Return numbers with the mean 0, of which the largest are about 1; nan if all are equal."""
    # equal numbers differ by exactly 0, which their mean, being rounded, does not; and halves do not overflow
    differences = values / 2 - values[0] / 2
    differences = differences / differences.abs().max()
    return differences - differences.mean()


def _classes(predictions: Numbers, labels: Numbers) -> tuple[Tensor, Tensor]:
    """Return predictions and labels as numbers of classes."""
    pair = _pair(predictions, labels, ("predictions", "labels"))
    for name, values in zip(("predictions", "labels"), pair, strict=True):
        wrong = values[values != values.round()]
        if wrong.numel():
            rule = "must be whole numbers, those of classes; round scores first"
            raise ValueError(f"{name} with {wrong[0].item()} {rule}")
    return pair


def _pair(first: Numbers, second: Numbers, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Return two lists of numbers as float64, [N] each."""
    found = []
    for name, values in zip(names, (first, second), strict=True):
        if isinstance(values, Tensor):
            # where the tensor is there may be no float64
            values = values.detach().cpu()
        tensor = torch.as_tensor(values, dtype=torch.float64)
        if tensor.dim() != 1 or not len(tensor):
            raise ValueError(f"{name} of shape {list(tensor.shape)} must be [N], N at least 1; flatten it")
        found.append(tensor)
    if len(found[0]) != len(found[1]):
        lengths = f"{len(found[0])} and {len(found[1])} numbers"
        raise ValueError(f"{names[0]} and {names[1]} have {lengths}; they must have as many, one for each")
    return found[0], found[1]
