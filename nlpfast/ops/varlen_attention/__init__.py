"""Packed attention: checks the arguments, picks a backend, and holds the autograd.Function of this op."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops.attention import (
    NO_SECOND,
    _check_options,
    _distinct,
    _elsewhere,
    _misfit_alone,
    _misfit_of_heads,
    _shape,
    autocast,
)
from nlpfast.ops.second_derivative import refuse_second_derivative
from nlpfast.ops.seeds import seed_pair
from nlpfast.ops.varlen_attention import reference

_backends: dict[str, ModuleType | str] = {
    "cpu": native.status(),
    "triton": dispatch.triton_status(),
    "cuda": dispatch.cuda_status(),
}
if native.status() == "ok":
    from nlpfast.ops.varlen_attention import cpu

    _backends["cpu"] = cpu
if dispatch.triton_status() == "ok":
    from nlpfast.ops.varlen_attention import triton

    _backends["triton"] = triton
if dispatch.cuda_status() == "ok":
    from nlpfast.ops.varlen_attention import cuda

    _backends["cuda"] = cuda
dispatch.registry["varlen_attention"] = {**_backends, "reference": reference}


# fmt: off
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    is_causal: bool = ..., dropout_p: float = ..., scale: float | None = ..., enable_gqa: bool = ...,
    causal_align: str = ..., return_lse: Literal[False] = ..., seed: int | Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    is_causal: bool = ..., dropout_p: float = ..., scale: float | None = ..., enable_gqa: bool = ...,
    causal_align: str = ..., return_lse: Literal[True], seed: int | Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_align: str = "top_left",
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention within each of many sequences that lie one after the other, without padding.

    Equivalent PyTorch::

        for b in range(B):  # with the heads moved in front of the rows, and back
            q, k, v = query[cu_seq_q[b]:cu_seq_q[b + 1]], key[cu_seq_k[b]:cu_seq_k[b + 1]], ...
            out[cu_seq_q[b]:cu_seq_q[b + 1]] = F.scaled_dot_product_attention(q, k, v, is_causal=..., ...)

    The first seven arguments are those of ``torch.nn.attention.varlen.varlen_attn``. A query without a
    visible key gives output 0, lse -inf and gradients 0. Dropout drops what ``nlpfast.attention`` drops with
    the same seed on the padded batch, whatever that is padded to.

    Args:
        query: [total_q, H, D], float32, bfloat16, float16 or float64; any strides, as for all inputs.
        key: [total_k, H, D] in the query's dtype; [total_k, Hk, D] with ``enable_gqa``.
        value: [total_k, H, Dv], likewise.
        cu_seq_q: int32 or int64 [B + 1], cumulative lengths: sequence b has the queries from ``cu_seq_q[b]``
            to before ``cu_seq_q[b + 1]``. The first is 0, the last total_q. Lengths and B may be 0.
        cu_seq_k: [B + 1], the same of keys and values.
        max_q: the number of queries of the longest sequence, or more.
        max_k: the number of keys of the longest sequence, or more.
        is_causal: hide later keys of its sequence from a query.
        dropout_p: probability, 0..1, of dropping an attention weight; pass 0 outside of training.
        scale: factor of Q Kᵀ; ``1 / sqrt(D)`` if None.
        enable_gqa: allow fewer key heads than query heads; query head h reads key head ``h // (H // Hk)``.
        causal_align: "top_left", query i of a sequence sees its keys j <= i; or "bottom_right",
            j <= i + keys - queries of the sequence, as for decoding with a cache.
        return_lse: also return the natural log-sum-exp of the undropped scores; it is differentiable.
        seed: of dropout. None draws one from PyTorch's generator of the device; an int is used with offset 0;
            an int64 tensor holds [seed, offset] or a seed alone.
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call. ``nlpfast info`` prints them.

    Returns:
        The output [total_q, H, Dv] in the query's dtype; with ``return_lse`` also lse [total_q, H] in float32
        (float64 for float64). Under autocast, inputs are first cast to its dtype, as PyTorch does.

    Raises:
        ValueError: for shapes, values or names that do not fit. The values of ``cu_seq_q`` and ``cu_seq_k``
            are looked at on the CPU and in uncompiled code only.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.

    Papers: see ``nlpfast.attention``.
    """
    device_type = query.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        query, key, value = autocast(query, key, value)
    _check_packed(query, key, value, enable_gqa)
    _check_sequences("q", cu_seq_q, max_q, query.shape[0], query)
    _check_sequences("k", cu_seq_k, max_k, key.shape[0], query)
    if cu_seq_k.shape != cu_seq_q.shape:
        rule = f"it must be that of cu_seq_q, {_shape(cu_seq_q)}"
        raise ValueError(f"cu_seq_k has the shape {_shape(cu_seq_k)}; {rule}: give every sequence its keys")
    _check_options(causal_align, dropout_p)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[2])
    seed = seed_pair(seed, query.device) if dropout_p > 0.0 else None
    request = (query, key, value, cu_seq_q, cu_seq_k)
    if torch.compiler.is_compiling():
        request = _distinct(*request)
    module = dispatch.choose("varlen_attention", device_type, backend, (*request, max_k))
    options = (max_q, max_k, seed, dropout_p, causal_align if is_causal else "none", scale)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out, lse = _VarlenAttention.apply(*request, *options, module)
    else:
        out, lse, _ = module.forward(*request, *options)
    # The kernels keep the numbers of a head together; PyTorch those of a row.
    return (out, lse.mT) if return_lse else out


class _VarlenAttention(torch.autograd.Function):
    """Join a backend's forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        seed: Tensor | None,
        dropout_p: float,
        causal: str,
        scale: float,
        module: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        """Run the backend and save what its backward reads."""
        inputs, sequences = (query, key, value), (cu_seq_q, cu_seq_k)
        out, lse, lse_low = module.forward(*inputs, *sequences, max_q, max_k, seed, dropout_p, causal, scale)
        ctx.save_for_backward(*inputs, out, lse, lse_low, *sequences, seed)
        # An output that nobody used then has the gradient None, and costs nothing.
        ctx.set_materialize_grads(False)
        ctx.module, ctx.longest, ctx.options = module, (max_q, max_k), (dropout_p, causal, scale)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the backend's backward; grads of everything but query, key and value are None."""
        *saved, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        grads = ctx.module.backward(grad_out, grad_lse, *saved, *ctx.longest, seed, *ctx.options)
        grads = refuse_second_derivative(NO_SECOND, grads, grad_out, grad_lse, *saved[:3])
        return (*grads, None, None, None, None, None, None, None, None, None)


def _check_packed(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise unless the three inputs fit each other."""
    alone = _misfit_alone(query, key, value, "[total, H, D]")
    if alone is not None:
        raise alone
    (_, H, D), (total_k, Hk, Dk) = query.shape, key.shape
    if Dk != D:
        rule = f"D must be that of query, {_shape(query)}"
        raise ValueError(f"key has the shape {_shape(key)}; {rule}: project it")
    if value.shape[:2] != key.shape[:2]:
        rule = f"it must be {[total_k, Hk]} and Dv, as key's {_shape(key)}"
        raise ValueError(f"value has the shape {_shape(value)}; {rule}: expand it or cut it")
    if Hk != H and not (enable_gqa and Hk > 0 and H % Hk == 0):
        raise _misfit_of_heads(H, Hk)


def _check_sequences(side: str, cu_seq: Tensor, longest: int, total: int, query: Tensor) -> None:
    """Raise unless ``cu_seq_q`` or ``cu_seq_k`` cuts ``total`` rows into sequences of at most ``longest``."""
    name, max_name = f"cu_seq_{side}", f"max_{side}"
    if cu_seq.dtype not in (torch.int32, torch.int64):
        rule = "it must be torch.int32 or torch.int64"
        raise TypeError(f"{name} has the dtype {cu_seq.dtype}; {rule}: call .int() on it")
    if cu_seq.ndim != 1 or cu_seq.shape[0] == 0:
        rule = "it must be [B + 1]"
        raise ValueError(
            f"{name} has the shape {_shape(cu_seq)}; {rule}: give the cumulative lengths, after a 0"
        )
    if cu_seq.device != query.device:
        raise _elsewhere(name, cu_seq, query)
    if not isinstance(longest, int):
        kind = type(longest).__name__
        raise TypeError(f"{max_name} is of the type {kind}; it must be an int: call int() on it")
    if longest < 0:
        raise ValueError(f"{max_name} is {longest}; it must be at least 0: pass the longest length")
    if cu_seq.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_boundaries(name, cu_seq.tolist(), total, max_name, longest)


def _check_boundaries(name: str, cu_seq: list[int], total: int, max_name: str, longest: int) -> None:
    """Raise for a boundary that does not fit; only where looking at values costs nothing."""
    if cu_seq[0] != 0:
        raise ValueError(f"{name}[0] is {cu_seq[0]}; the first sequence must begin at 0: prepend a 0")
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seq)):
        if not 0 <= end - begin <= longest:
            rule = f"it must be between {name}[{b}] = {begin} and {longest} more, {max_name}"
            fix = "pass cumulative lengths" if end < begin else f"pass a larger {max_name}"
            raise ValueError(f"{name}[{b + 1}] is {end}; {rule}: {fix}")
    if cu_seq[-1] != total:
        rule = f"the last sequence must end at {total}, the number of packed rows"
        raise ValueError(f"{name}[{len(cu_seq) - 1}] is {cu_seq[-1]}; {rule}: cut the rows or add a sequence")
