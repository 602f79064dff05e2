"""Attention's probabilities at pairs on GPUs: launches the kernels of triton_kernels.py.

With TRITON_INTERPRET=1 set when Python starts, the kernels run on the CPU, in float32. Nothing waits for the
GPU; heads that are named for the first time are sent there, which a CUDA graph cannot hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nlpfast.ops.alignment_loss.triton_kernels import _bwd_key_kernel, _bwd_query_kernel, _fwd_kernel
from nlpfast.ops.launch import on_device_of

SERVES = "CUDA devices; float32, bfloat16 and float16, D <= 1024, any strides"
MAX_HEAD_SIZE = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED: bool = triton.knobs.runtime.interpret


def refusal(query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if query.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and query is {query.dtype}"
    if query.device.type != "cuda":
        if not INTERPRETED or query.device.type != "cpu":
            return f"it computes on CUDA devices, and query is on {query.device}"
        if query.dtype != torch.float32:
            return f"Triton's interpreter computes in float32, and query is {query.dtype}"
    if query.shape[-1] > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, and got {query.shape[-1]}"
    return None


def forward(
    query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor, heads: Sequence[int], scale: float
) -> Tensor:
    """Return the logarithm of each head's probability at each pair, [P, n]; NaN for one that is not there."""
    if torch.compiler.is_compiling():
        return torch.ops.nlpfast.triton_alignment_loss_forward(query, key, lse, pairs, list(heads), scale)
    return _forward(query, key, lse, pairs, heads, scale)


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
    run = torch.ops.nlpfast.triton_alignment_loss_backward if torch.compiler.is_compiling() else _backward
    run(coefficients, query, key, pairs, list(heads), scale, d_query, d_key, d_lse)


@functools.lru_cache(maxsize=256)
def _numbers(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, dtype=torch.int64, device=device)


def _shared(query: Tensor, key: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the numbers that all kernels take, and what they are compiled for."""
    D = query.shape[3]
    sizes = (query.shape[1] // key.shape[1], query.shape[2], key.shape[2])
    return sizes, {
        "D": D,
        "BLOCK_D": triton.next_power_of_2(D),
        "num_warps": 1 if D <= 128 else 4,
        "enable_fp_fusion": True,
    }


def _forward(
    query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor, heads: Sequence[int], scale: float
) -> Tensor:
    n, P = len(heads), len(pairs)
    terms = query.new_empty((P, n), dtype=torch.float32)
    sizes, constants = _shared(query, key)
    if P > 0:
        pointers = (query, key, lse, pairs.contiguous(), _numbers(tuple(heads), query.device), terms)
        strides = (query.stride(), key.stride(), lse.stride())
        with on_device_of(query):
            _fwd_kernel[(P * n,)](*pointers, *strides, query.shape[0], *sizes, n, scale, **constants)
    return terms


def _backward(
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
    n, P = len(heads), len(pairs)
    if P == 0:
        return
    (B, _, L, _), (_, Hk, S, _) = query.shape, key.shape
    sizes, constants = _shared(query, key)
    pairs, numbers = pairs.contiguous(), _numbers(tuple(heads), query.device)
    coefficients = coefficients.contiguous()
    rest = (P, n, scale)
    with on_device_of(query):
        if d_query is not None or d_lse is not None:
            order = (pairs[:, 0] * L + pairs[:, 1]).sort(stable=True).indices
            places = (_strides(d_query, 4), _strides(d_lse, 3))
            _bwd_query_kernel[(P * n,)](
                *(coefficients, key, pairs, order, numbers, d_query, d_lse),
                *(key.stride(), *places, B, *sizes, *rest),
                **constants,
            )
        if d_key is not None:
            order = (pairs[:, 0] * S + pairs[:, 2]).sort(stable=True).indices
            _bwd_key_kernel[(P * Hk,)](
                *(coefficients, query, pairs, order, numbers, d_key),
                *(query.stride(), d_key.stride(), B, Hk, *sizes, *rest),
                **constants,
            )


def _strides(x: Tensor | None, ndim: int) -> tuple[int, ...]:
    return (0,) * ndim if x is None else x.stride()


def _register() -> None:
    """Make operations that torch.compile does not look into."""
    shared = "int[] heads, float scale"
    forward = torch.library.custom_op(
        *("nlpfast::triton_alignment_loss_forward", _forward),
        mutates_args=(),
        schema=f"(Tensor query, Tensor key, Tensor lse, Tensor pairs, {shared}) -> Tensor",
    )
    backward = torch.library.custom_op(
        *("nlpfast::triton_alignment_loss_backward", _backward),
        mutates_args=("d_query", "d_key", "d_lse"),
        schema=f"(Tensor coefficients, Tensor query, Tensor key, Tensor pairs, {shared}, "
        "Tensor(a!)? d_query, Tensor(b!)? d_key, Tensor(c!)? d_lse) -> ()",
    )

    @forward.register_fake
    def _(
        query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor, heads: Sequence[int], scale: float
    ) -> Tensor:
        return query.new_empty((pairs.shape[0], len(heads)), dtype=torch.float32)

    @backward.register_fake
    def _(*arguments: Any) -> None:
        return None


_register()
