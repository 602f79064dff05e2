"""Attention's probabilities at pairs on CPUs: the compiled kernels of csrc/alignment_loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SERVES = "float32, bfloat16 and float16, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if query.device.type != "cpu":
        return f"it computes on the CPU, and query is on {query.device}"
    if query.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and query is {query.dtype}"
    return None


def forward(
    query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor, heads: Sequence[int], scale: float
) -> Tensor:
    """Return the logarithm of each head's probability at each pair, [P, n]."""
    return torch.ops.nlpfast.alignment_loss_forward(
        *(_rows(query), _rows(key), lse.contiguous(), pairs.contiguous(), _numbers(heads), scale)
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
    inputs = (coefficients.contiguous(), _rows(query), _rows(key), pairs.contiguous(), _numbers(heads), scale)
    wanted = (d_query, d_key, d_lse)
    # a gradient whose rows do not lie together is added to by way of a copy
    laid = [x if x is None or x.ndim < 4 else _rows(x) for x in wanted]
    torch.ops.nlpfast.alignment_loss_backward(*inputs, *laid)
    for x, y in zip(wanted, laid, strict=True):
        if x is not None and y is not None and y is not x:
            x.copy_(y)


def _rows(x: Tensor) -> Tensor:
    """Return a tensor of which the elements of a row lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _numbers(heads: Sequence[int]) -> Tensor:
    return torch.tensor(heads, dtype=torch.int64)


@torch.library.register_fake("nlpfast::alignment_loss_forward")
def _(query, key, lse, pairs, heads, scale):  # type: ignore[no-untyped-def]
    return query.new_empty((pairs.shape[0], heads.shape[0]), dtype=torch.float32)


@torch.library.register_fake("nlpfast::alignment_loss_backward")
def _(*arguments):  # type: ignore[no-untyped-def]
    return None
