"""Attention over few keys on CUDA devices: the compiled kernels of csrc/attention/attention_cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nlpfast.ops.additions import PairGradients
from nlpfast.ops.attention.reference import check_lengths
from nlpfast.ops.pair_rows import group_pairs
from nlpfast.ops.vectors import on_vectors

SERVES = (
    "CUDA devices; bfloat16 and float16, D and Dv both 32 or 64, up to 512 keys, no attn_mask, any strides"
)
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES, MAX_KEYS = (32, 64), 512
# What the kernels count in 32 bits, in numbers.
MAX_STRIDE = 2**31 - 1
# Heads and rows at most for which gradients at pairs are added on the way.
HEADS_WITH_PAIRS, ROWS_WITH_PAIRS = 32, 64
CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}
# The tests have kernels that run on the CPU.
DEVICE = "cuda"


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if attn_mask is not None:
        return "it takes no attn_mask"
    numbers = query.shape[1:].numel()
    if numbers > MAX_STRIDE:
        return f"it takes up to {MAX_STRIDE} numbers of a sequence's queries, and got {numbers}"
    return misfit(query, value, key.shape[2])


def misfit(query: Tensor, value: Tensor, max_k: int) -> str | None:
    """Return why the kernels do not serve heads like these, also of packed sequences, in one line, or None.

    Args:
        query: [..., D].
        value: [..., Dv].
        max_k: the keys of a sequence, at most.
    """
    if query.device.type != DEVICE:
        return f"it computes on CUDA devices, and the tensors are on {query.device}"
    if query.dtype not in DTYPES:
        return f"it computes in bfloat16 and float16, and the tensors are {query.dtype}"
    sizes = (query.shape[-1], value.shape[-1])
    if sizes[0] not in HEAD_SIZES or sizes[0] != sizes[1]:
        return f"it takes head sizes of 32 and 64, the same of values, and got {sizes[0]} and {sizes[1]}"
    if max_k > MAX_KEYS:
        return f"it takes up to {MAX_KEYS} keys, and got {max_k}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return out [B, H, L, D] and lse [B, H, L], as the reference defines them; backward takes these."""
    check_lengths("key_lengths", key_lengths, key.shape[2])
    check_lengths("prefix_lengths", prefix_lengths, key.shape[2])
    out = _like(query)
    *masks, max_k, seed, dropout_p, kind, scale = _options(
        key, key_lengths, prefix_lengths, seed, dropout_p, causal, scale
    )
    lse = torch.ops.nlpfast.cuda_attention_forward(
        *(lying(x) for x in (query, key, value)),
        *(*masks, query.shape[2], max_k, seed, dropout_p, kind, scale),
        out,
    )
    return out, lse, None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
    extra: Sequence[PairGradients] = (),
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Return the gradients of query, key and value."""
    gradients = [_like(x) for x in (query, key, value)]
    first = _slopes(extra[0], query, key) if extra else None
    torch.ops.nlpfast.cuda_attention_backward(
        *(lying(grad_out), None if grad_lse is None else grad_lse.contiguous()),
        *(lying(x) for x in (query, key, value)),
        *_options(key, key_lengths, prefix_lengths, seed, dropout_p, causal, scale),
        *(lying(out), lse),
        *(first or (None, None, None, None, [])),
        *gradients,
    )
    dq, dk, dv = gradients
    for pairs in extra[bool(first) :]:
        pairs.add_to(dq, dk)
    return dq, dk, dv, None


def _slopes(extra: PairGradients, query: Tensor, key: Tensor) -> tuple[Any, ...] | None:
    """Return what the kernel takes to add gradients at pairs on the way, or None where it does not."""
    (B, H, L, _), (_, Hk, S, _) = query.shape, key.shape
    if Hk != H or max(L, S) > ROWS_WITH_PAIRS or len(extra.heads) > HEADS_WITH_PAIRS:
        return None
    pairs = extra.pairs.contiguous()
    by_query, query_begin, _, _ = group_pairs(pairs, B, L, S)
    return extra.coefficients.contiguous(), pairs, by_query, query_begin, list(extra.heads)


def _options(
    key: Tensor,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Any, ...]:
    lengths = (None if x is None else x.contiguous() for x in (key_lengths, prefix_lengths))
    # no sequences that are packed
    masks = (*lengths, None, None)
    return *masks, key.shape[2], None if seed is None else seed.contiguous(), dropout_p, CAUSAL[causal], scale


def _like(x: Tensor) -> Tensor:
    """Return memory for as many rows as ``x`` has, with its heads outside of the rows or inside."""
    B, H, rows, D = x.shape
    if 0 < x.stride(1) < x.stride(2):
        return x.new_empty(B, rows, H, D).transpose(1, 2)
    return x.new_empty(x.shape)


def lying(x: Tensor) -> Tensor:
    """Return rows that begin at multiples of 16 bytes, less than 2^31 numbers apart; a copy if need be."""
    near = all(stride <= MAX_STRIDE for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    fits = near and on_vectors(x, 16 // x.element_size())
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::cuda_attention_forward")
    def _(query, *rest):  # type: ignore[no-untyped-def]
        # of packed rows by heads
        sizes = query.shape[:-1] if query.ndim == 4 else (query.shape[1], query.shape[0])
        return query.new_empty(sizes, dtype=torch.float32)

    @torch.library.register_fake("nlpfast::cuda_attention_backward")
    def _(*arguments):  # type: ignore[no-untyped-def]
        return None


_register_fakes()
