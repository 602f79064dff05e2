"""Cross entropy of a projection's logits on GPUs: cuBLAS's products, the kernels of cross entropy in place.

Nothing here waits for the GPU: a CUDA graph can hold it. Chunks are large enough to keep a GPU busy, and
their logits are written once, in the inputs' dtype, and become their gradient in place. The gradients of
input and weight are added up in float32, for an upstream gradient of 1, and rounded once that is known.

With TRITON_INTERPRET=1 set when Python starts, this runs on the CPU, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nlpfast.ops import projected_chunks
from nlpfast.ops.cross_entropy import triton as cross_entropy
from nlpfast.ops.cross_entropy.triton_configs import MAX_CLASSES

SERVES = "CUDA devices; float32, bfloat16 and float16, any sizes, any strides"
# Logits of a chunk: 4,096 rows of 32,000 classes, which are 268 MB in 16 bits.
CHUNK_LOGITS = 1 << 27
# Rows of logits begin at multiples of 128 bytes, as products like it, however many classes there are.
ALIGNMENT = 128


def refusal(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> str | None:
    """Return why this does not serve the call, in one line, or None."""
    if linear_weight.shape[0] > MAX_CLASSES:
        return f"it takes up to {MAX_CLASSES} classes, and got {linear_weight.shape[0]}"
    # as of logits in the dtype of the input
    return cross_entropy.refusal(input[..., :1], target)


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
    """Return loss, nll, correct and statistics, as the reference does, and the gradients that are wanted.

    A target that is no class has the loss NaN, as in cross_entropy, and so have the gradients.
    """
    run = torch.ops.nlpfast.triton_linear_cross_entropy_forward if torch.compiler.is_compiling() else _forward
    options = (ignore_index, pad_index, on_target, on_other)
    return run(input, linear_weight, linear_bias, target, *options, list(wanted))


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
    """Return the gradients that are wanted, from logits that are computed again."""
    compiled = torch.ops.nlpfast.triton_linear_cross_entropy_backward
    run = compiled if torch.compiler.is_compiling() else _backward
    tensors = (grad_loss, input, linear_weight, linear_bias, target, statistics)
    return run(*tensors, ignore_index, pad_index, on_target, on_other, list(wanted))


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


@torch.no_grad()
def _forward(
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
    results = projected_chunks.forward(products, cross_entropy, index, options, any(wanted))
    loss, nll, correct = (x.view(target.shape) for x in results[:3])
    statistics = results[3].view(*target.shape, 2)
    return loss, nll, correct, statistics, products.gradients(input.shape) if any(wanted) else []


@torch.no_grad()
def _backward(
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
    projected_chunks.backward(products, cross_entropy, *saved, options)
    return products.gradients(input.shape)


projected_chunks.register("triton", _forward, _backward, lambda dtype: torch.float32)
