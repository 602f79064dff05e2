"""The loss of a projection's logits and its gradients, a chunk of rows at a time.

A chunk's logits are a product of matrices; the kernels of cross entropy turn them into their own gradient in
place; products with that gradient add to those of the projection's inputs. Of all [N, V] logits only the
chunk's [n, V] exist, and they are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

# Rows of a chunk come in multiples of it, which the blocks of a product like.
GRAIN = 16


class Products(Protocol):
    """The products of a call.

    Attributes:
        rows: the size of a chunk.
    """

    rows: int

    def logits(self, rows: slice) -> Tensor:
        """Return the logits of a chunk, [1, n, V], which may be overwritten until the next are asked for."""

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Add what follows from a chunk's gradient of the logits, [1, n, V], to the gradients."""


def chunk_rows(N: int, V: int, logits: int) -> int:
    """Return how many rows to take at a time: chunks of about equal size.

    Args:
        N: rows in all.
        V: classes.
        logits: how many of them a chunk may have.
    """
    most = max(GRAIN, logits // V // GRAIN * GRAIN)
    chunks = max(1, -(-N // most))
    return max(1, min(N, -(-N // (chunks * GRAIN)) * GRAIN))


def forward(
    products: Products,
    losses: ModuleType,
    target: Tensor,
    options: tuple[int, int, float, float],
    with_gradients: bool,
) -> list[Tensor]:
    """Return loss, nll, correct and statistics of all rows, and add up the gradients if wanted.

    Args:
        products: of the call.
        losses: a backend of cross_entropy.
        target: [1, N].
        options: of the backends of cross_entropy.
        with_gradients: for an upstream gradient of 1 in all rows.
    """
    one = torch.ones((), device=target.device) if with_gradients else None
    found = []
    for rows in _chunks(target, products.rows):
        logits = products.logits(rows)
        *results, gradient = losses.forward(logits, target[:, rows], *options, one, with_gradients)
        if with_gradients:
            products.add(rows, gradient)
        found.append(results)
    return found[0] if len(found) == 1 else [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


def backward(
    products: Products,
    losses: ModuleType,
    grad_loss: Tensor,
    target: Tensor,
    statistics: Tensor,
    options: tuple[int, int, float, float],
) -> None:
    """Add up the gradients for any upstream gradient, from logits that are computed again.

    Args:
        products: of the call.
        losses: a backend of cross_entropy.
        grad_loss: [1, N].
        target: [1, N].
        statistics: [1, N, 2], from `forward`.
        options: of the backends of cross_entropy.
    """
    for rows in _chunks(target, products.rows):
        saved = (products.logits(rows), target[:, rows], statistics[:, rows])
        products.add(rows, losses.backward(grad_loss[:, rows], *saved, None, None, *options, True))


def register(
    backend: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    computing: Callable[[torch.dtype], torch.dtype],
) -> None:
    """Make operations of linear_cross_entropy out of a backend's functions: torch.compile stays outside.

    Their names are nlpfast::<backend>_linear_cross_entropy_forward and _backward.

    Args:
        backend: its name.
        forward: the backend's, whose gradients of weight and bias are float32.
        backward: likewise.
        computing: returns the dtype of the input's gradient.
    """
    shared = "SymInt ignore_index, SymInt pad_index, float on_target, float on_other, bool[] wanted"
    tensors = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target"
    name = f"nlpfast::{backend}_linear_cross_entropy"
    forward_op = torch.library.custom_op(
        *(f"{name}_forward", forward),
        mutates_args=(),
        schema=f"({tensors}, {shared}) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    )
    backward_op = torch.library.custom_op(
        *(f"{name}_backward", backward),
        mutates_args=(),
        schema=f"(Tensor grad_loss, {tensors}, Tensor statistics, {shared}) -> Tensor[]",
    )

    def gradients(input: Tensor, weight: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
        kinds = (
            (input.shape, computing(input.dtype)),
            (weight.shape, torch.float32),
            (weight.shape[:1], torch.float32),
        )
        return [
            input.new_empty(shape if want else (0,), dtype=dtype if want else torch.float32)
            for want, (shape, dtype) in zip(wanted, kinds, strict=True)
        ]

    @forward_op.register_fake
    def _(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> Any:
        loss, nll = (input.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
        correct = input.new_empty(target.shape, dtype=torch.bool)
        statistics = input.new_empty((*target.shape, 2), dtype=torch.float32)
        made = gradients(input, weight, rest[-1]) if any(rest[-1]) else []
        return loss, nll, correct, statistics, made

    @backward_op.register_fake
    def _(grad_loss: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
        return gradients(input, weight, rest[-1])


def _chunks(target: Tensor, size: int) -> Iterator[slice]:
    """Yield the slices of the rows; a single empty one if there are none."""
    N = target.shape[1]
    for begin in range(0, max(N, 1), size):
        yield slice(begin, min(begin + size, N))
