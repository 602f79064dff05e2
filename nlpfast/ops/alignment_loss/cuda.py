"""Attention's probabilities at pairs on CUDA devices: the compiled kernels of csrc/alignment_loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nlpfast.ops.pair_rows import group_pairs

SERVES = "CUDA devices; float32, bfloat16 and float16, up to 128 heads asked for, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads that a launch takes (csrc/alignment_loss/alignment_loss_cuda_pairs.h).
MAX_HEADS = 128
# The tests have kernels that run on the CPU.
DEVICE = "cuda"


def refusal(query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor | None) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if query.device.type != DEVICE:
        return f"it computes on CUDA devices, and query is on {query.device}"
    if query.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and query is {query.dtype}"
    if query.shape[1] > MAX_HEADS:
        return f"it takes up to {MAX_HEADS} heads, and got {query.shape[1]}"
    return None


def forward(
    query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor, heads: Sequence[int], scale: float
) -> Tensor:
    """Return the logarithm of each head's probability at each pair, [P, n]; NaN for one that is not there."""
    return torch.ops.nlpfast.cuda_alignment_loss_forward(
        *(_rows(query), _rows(key), lse.contiguous(), pairs.contiguous(), list(heads), scale)
    )


def backward(
    coefficients: Tensor,
    query: Tensor,
    key: Tensor,
    pairs: Tensor,
    heads: Sequence[int],
    scale: float,
    d_query: Tensor | None,
    d_key: Tensor | None,
    d_lse: Tensor | None,
) -> None:
    """Add the gradients to what is there, where it is given."""
    pairs = pairs.contiguous()
    grouped = group_pairs(pairs, query.shape[0], query.shape[2], key.shape[2])
    # a gradient whose rows do not lie together is added to by way of a copy
    laid = [x if x is None else _rows(x) for x in (d_query, d_key)]
    torch.ops.nlpfast.cuda_alignment_loss_backward(
        *(coefficients.contiguous(), _rows(query), _rows(key), pairs, *grouped, list(heads), scale),
        *(*laid, d_lse),
    )
    for x, y in zip((d_query, d_key), laid, strict=True):
        if x is not None and y is not None and y is not x:
            x.copy_(y)


def hard_alignment(
    query: Tensor, key: Tensor, lse: Tensor, source_lengths: Tensor | None, heads: Sequence[int], scale: float
) -> Tensor:
    """Return the most probable key of each query, as the reference does."""
    lengths = None if source_lengths is None else source_lengths.contiguous()
    return torch.ops.nlpfast.cuda_hard_alignment(
        *(_rows(query), _rows(key), lse.contiguous(), lengths, list(heads), scale)
    )


def _rows(x: Tensor) -> Tensor:
    """Return a tensor of which the elements of a row lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::cuda_alignment_loss_forward")
    def _(query, key, lse, pairs, heads, scale):  # type: ignore[no-untyped-def]
        return query.new_empty((pairs.shape[0], len(heads)), dtype=torch.float32)

    @torch.library.register_fake("nlpfast::cuda_group_pairs")
    def _(pairs, B, L, S):  # type: ignore[no-untyped-def]
        sizes = (pairs.shape[0], B * L + 1, pairs.shape[0], B * S + 1)
        return tuple(pairs.new_empty(size, dtype=torch.int32) for size in sizes)

    @torch.library.register_fake("nlpfast::cuda_alignment_loss_backward")
    def _(*arguments):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("nlpfast::cuda_hard_alignment")
    def _(query, *rest):  # type: ignore[no-untyped-def]
        return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.int64)


_register_fakes()
