"""Cross entropy of a projection's logits on CPUs: PyTorch's products, the kernels of cross entropy in place.

The products, which take nearly all the time, are those of the libraries that come with PyTorch (oneDNN, MKL),
with AMX where there is AMX. Rows whose target is ignored are left out before: they cost nothing. The weight's
gradient is added up in float32; products of float16 are computed in float32 on CPUs that have none of their
own, with blocks of the weight that are converted as they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlpfast.ops import large_buffers, projected_chunks
from nlpfast.ops.cross_entropy import cpu as cross_entropy

SERVES = "float32, bfloat16 and float16, any sizes, any strides"
# Logits of a chunk, of which more is faster: the weight and its gradient go through memory once a chunk. With
# 2^22 a step takes 7 % longer, with 2^25 2 % less (N = 4096, V = 32000, D = 512).
CHUNK_LOGITS = 1 << 24
# Nor has a chunk more than a fifth of all, but for so many rows: cross entropy of all logits takes 2.7 times
# their size, of which a fifth of them is less than a tenth. Products of fewer rows are slower.
SHARE, LEAST_ROWS = 5, 512
# Classes whose products are converted together: a megabyte or two, which stay in a cache.
CLASSES = 1024

# Rows that count are made a multiple of it, in 16 bits: oneDNN compiles a product for each number of rows and
# keeps the last 1,024 of them, gigabytes if their number is another in every step.
ROUNDED = 64

# Whether the CPU multiplies the type itself: without, PyTorch's products are slower than those of float32.
_MULTIPLIES = {
    torch.float32: True,
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def refusal(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    return cross_entropy.refusal(input, target)


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
    """Return loss, nll, correct and statistics, as the reference does, and the gradients that are wanted."""
    run = torch.ops.nlpfast.cpu_linear_cross_entropy_forward if torch.compiler.is_compiling() else _forward
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
    run = torch.ops.nlpfast.cpu_linear_cross_entropy_backward if torch.compiler.is_compiling() else _backward
    tensors = (grad_loss, input, linear_weight, linear_bias, target, statistics)
    return run(*tensors, ignore_index, pad_index, on_target, on_other, list(wanted))


def _computing(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products, and of the gradient of the input."""
    return dtype if _MULTIPLIES[dtype] else torch.float32


class _Products:
    """The products of a call (see projected_chunks.Products)."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> None:
        """Take the rows that count, as [N, D]."""
        self.input, self.weight, self.bias, self.wanted = input, weight.contiguous(), bias, wanted
        (N, D), V = input.shape, weight.shape[0]
        self.dtype = _computing(input.dtype)
        self.blocks = [slice(0, V)] if self.dtype == input.dtype else list(_blocks(V))
        most = min(CHUNK_LOGITS, max(LEAST_ROWS * V, N * V // SHARE))
        self.rows = projected_chunks.chunk_rows(N, V, most)
        self.buffer = large_buffers.empty((self.rows, V), self.dtype)
        # a single chunk leaves nothing to add up
        summed = self.dtype if self.rows == N else torch.float32
        self.d_input = large_buffers.empty((N, D), self.dtype) if wanted[0] else None
        self.d_weight = large_buffers.empty((V, D), summed) if wanted[1] else None
        self.d_bias = torch.zeros(V) if wanted[2] else None

    def logits(self, rows: slice) -> Tensor:
        """Return the logits of a chunk."""
        x = self.input[rows].to(self.dtype)
        out = self.buffer[: len(x)]
        for classes in self.blocks:
            w = self.weight[classes].to(self.dtype).T
            if self.bias is None:
                torch.mm(x, w, out=out[:, classes])
            else:
                torch.addmm(self.bias[classes].to(self.dtype), x, w, out=out[:, classes])
        return out.unsqueeze(0)

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Add what follows from a chunk's gradient of the logits to the gradients."""
        slope = gradient.squeeze(0)
        if self.d_input is not None:
            out = self.d_input[rows]
            for classes in self.blocks:
                w = self.weight[classes].to(self.dtype)
                torch.addmm(out, slope[:, classes], w, beta=0 if classes.start == 0 else 1, out=out)
        if self.d_weight is not None:
            self._add_to_weight(self.d_weight, slope.T, self.input[rows].to(self.dtype), rows.start == 0)
        if self.d_bias is not None:
            self.d_bias += slope.sum(0, dtype=torch.float32)

    def _add_to_weight(self, total: Tensor, slope: Tensor, x: Tensor, first: bool) -> None:
        if total.dtype == self.dtype:
            torch.addmm(total, slope, x, beta=0 if first else 1, out=total)
            return
        for classes in _blocks(len(total)):
            product = torch.mm(slope[classes], x)
            if first:
                total[classes] = product
            else:
                total[classes] += product


def _blocks(V: int) -> Iterator[slice]:
    for begin in range(0, V, CLASSES):
        yield slice(begin, min(begin + CLASSES, V))


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
    rows, index, kept = _rows(input, target, ignore_index)
    products = _Products(rows, linear_weight, linear_bias, wanted)
    options = (ignore_index, pad_index, on_target, on_other)
    results = projected_chunks.forward(products, cross_entropy, index, options, any(wanted))
    loss, nll, correct, statistics = (_spread(x.squeeze(0), kept, target.shape) for x in results)
    return loss, nll, correct, statistics, _gradients(products, kept, input) if any(wanted) else []


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
    rows, index, kept = _rows(input, target, ignore_index)
    products = _Products(rows, linear_weight, linear_bias, wanted)
    upstream, saved = grad_loss.reshape(1, -1), statistics.view(1, -1, 2)
    if kept is not None:
        more = len(rows) - len(kept)
        upstream = F.pad(upstream[:, kept], (0, more))
        saved = F.pad(saved[:, kept], (0, 0, 0, more))
    options = (ignore_index, pad_index, on_target, on_other)
    projected_chunks.backward(products, cross_entropy, upstream, index, saved, options)
    return _gradients(products, kept, input)


def _rows(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows that count, [N, D], their targets, [1, N], and which these are, None for all.

    There may be more rows than that, of zeros, which do not count.
    """
    rows, index = input.flatten(0, -2), target.flatten()
    counted = index != ignore_index
    if bool(counted.all()):
        return rows.contiguous(), index.unsqueeze(0), None
    kept = counted.nonzero().squeeze(1)
    rows, index = rows.index_select(0, kept), index[kept]
    if rows.dtype != torch.float32:
        missing = -len(rows) % ROUNDED
        rows, index = F.pad(rows, (0, 0, 0, missing)), F.pad(index, (0, missing), value=ignore_index)
    return rows, index.unsqueeze(0), kept


def _spread(rows: Tensor, kept: Tensor | None, lead: torch.Size) -> Tensor:
    """Return what the rows that count have in the shape of all rows, with 0 for the others."""
    shape = (*lead, *rows.shape[1:])
    if kept is None:
        return rows.view(shape)
    rows = rows[: len(kept)]
    return rows.new_zeros(lead.numel(), *rows.shape[1:]).index_copy_(0, kept, rows).view(shape)


def _gradients(products: _Products, kept: Tensor | None, input: Tensor) -> list[Tensor]:
    """Return the gradients in the inputs' shapes, and empty tensors for those that are not wanted."""
    d_input = products.d_input
    if d_input is not None:
        d_input = _spread(d_input, kept, input.shape[:-1])
    gradients = (d_input, products.d_weight, products.d_bias)
    return [torch.empty(0) if gradient is None else gradient for gradient in gradients]


def _compiled_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Run forward for torch.compile, which has to know dtypes beforehand."""
    loss, nll, correct, statistics, gradients = _forward(*arguments)
    return loss, nll, correct, statistics, [*gradients[:1], *(x.float() for x in gradients[1:])]


def _compiled_backward(*arguments: Any) -> list[Tensor]:
    first, *others = _backward(*arguments)
    return [first, *(x.float() for x in others)]


projected_chunks.register("cpu", _compiled_forward, _compiled_backward, _computing)
