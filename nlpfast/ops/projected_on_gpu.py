"""Cross entropy of a projection's logits on GPUs: cuBLAS's products, a backend of cross entropy in place.

Nothing here waits for the GPU: a CUDA graph can hold it. Chunks are large enough to keep a GPU busy, and
their logits are written once, in the inputs' dtype, and become their gradient in place. The gradients of
input and weight are added up in float32, for an upstream gradient of 1, and rounded once that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nlpfast.ops import projected_chunks

__all__ = ["passes"]

# Logits of a chunk: 4,096 rows of 32,000 classes, which are 268 MB in 16 bits.
CHUNK_LOGITS = 1 << 27
# Rows of logits begin at multiples of 128 bytes, as products like it, however many classes there are.
ALIGNMENT = 128


class _Products:
    """The products of a call (see projected_chunks.Products)."""

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, wanted: Sequence[bool]
    ) -> None:
        """Take all rows as [N, D], and which of them count."""
        self.weight, self.bias, self.wanted = weight.contiguous(), bias, wanted
        # rows that are ignored may hold anything, which 0 times a gradient of 0 would not stay
        self.input = input.where(kept.unsqueeze(1), 0.0)
        (N, D), V = input.shape, weight.shape[0]
        self.rows = projected_chunks.chunk_rows(N, V, CHUNK_LOGITS)
        grain = ALIGNMENT // input.element_size()
        self.buffer = input.new_empty(self.rows, -(-V // grain) * grain)[:, :V]
        wide = torch.float32
        self.d_input = input.new_empty(N, D, dtype=wide) if wanted[0] else None
        self.d_weight = input.new_empty(V, D, dtype=wide) if wanted[1] else None
        self.d_bias = input.new_zeros(V, dtype=wide) if wanted[2] else None

    def logits(self, rows: slice) -> Tensor:
        """Return the logits of a chunk."""
        x = self.input[rows]
        out = self.buffer[: len(x)]
        if self.bias is None:
            torch.mm(x, self.weight.T, out=out)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=out)
        return out.unsqueeze(0)

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Add what follows from a chunk's gradient of the logits to the gradients."""
        slope = gradient.squeeze(0)
        if self.d_input is not None:
            _multiply(slope, self.weight, self.d_input[rows], False)
        if self.d_weight is not None:
            _multiply(slope.T, self.input[rows], self.d_weight, rows.start > 0)
        if self.d_bias is not None:
            self.d_bias += slope.sum(0, dtype=torch.float32)

    def gradients(self, shape: torch.Size) -> list[Tensor]:
        """Return the gradients, that of the input in its shape, and empty tensors for those not wanted."""
        d_input = None if self.d_input is None else self.d_input.view(shape)
        found = (d_input, self.d_weight, self.d_bias)
        return [self.buffer.new_empty(0, dtype=torch.float32) if x is None else x for x in found]


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Write a product of matrices of any dtype in float32, or add it."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=1 if add else 0, out=out)
    elif add:
        torch.addmm(out, a, b, torch.float32, out=out)
    else:
        torch.mm(a, b, torch.float32, out=out)


def passes(name: str, losses: ModuleType) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return forward and backward of a backend of linear_cross_entropy, and register them for torch.compile.

    Args:
        name: of the backend.
        losses: the backend of cross_entropy that it computes with.
    """

    @torch.no_grad()
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        pad_index: int,
        on_target: float,
        on_other: float,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        index = target.reshape(1, -1)
        kept = (index != ignore_index).squeeze(0)
        products = _Products(input.flatten(0, 1), linear_weight, linear_bias, kept, wanted)
        options = (ignore_index, pad_index, on_target, on_other)
        results = projected_chunks.forward(products, losses, index, options, any(wanted))
        loss, nll, correct = (x.view(target.shape) for x in results[:3])
        statistics = results[3].view(*target.shape, 2)
        return loss, nll, correct, statistics, products.gradients(input.shape) if any(wanted) else []

    @torch.no_grad()
    def backward(
        grad_loss: Tensor,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        statistics: Tensor,
        ignore_index: int,
        pad_index: int,
        on_target: float,
        on_other: float,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        index = target.reshape(1, -1)
        kept = (index != ignore_index).squeeze(0)
        products = _Products(input.flatten(0, 1), linear_weight, linear_bias, kept, wanted)
        saved = (grad_loss.reshape(1, -1), index, statistics.view(1, -1, 2))
        options = (ignore_index, pad_index, on_target, on_other)
        projected_chunks.backward(products, losses, *saved, options)
        return products.gradients(input.shape)

    projected_chunks.register(name, forward, backward, lambda dtype: torch.float32)
    return forward, backward
