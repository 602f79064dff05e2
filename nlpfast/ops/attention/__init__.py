"""Attention: checks the arguments, picks a backend, and holds the only autograd.Function of this op."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops.additions import PairGradients
from nlpfast.ops.attention import reference
from nlpfast.ops.second_derivative import refuse_second_derivative
from nlpfast.ops.seeds import seed_pair

_backends: dict[str, ModuleType | str] = {
    "cpu": native.status(),
    "cuda": dispatch.cuda_status(),
    "triton": dispatch.triton_status(),
}
if native.status() == "ok":
    from nlpfast.ops.attention import cpu

    _backends["cpu"] = cpu
if dispatch.cuda_status() == "ok":
    from nlpfast.ops.attention import cuda

    _backends["cuda"] = cuda
if dispatch.triton_status() == "ok":
    from nlpfast.ops.attention import triton

    _backends["triton"] = triton
dispatch.registry["attention"] = {**_backends, "reference": reference}

NO_SECOND = (
    "attention has no second derivatives: use F.scaled_dot_product_attention under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or drop create_graph=True"
)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# fmt: off
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, causal_align: str = ...,
    key_lengths: Tensor | None = ..., prefix_lengths: Tensor | None = ..., return_lse: Literal[False] = ...,
    seed: int | Tensor | None = ..., backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, causal_align: str = ...,
    key_lengths: Tensor | None = ..., prefix_lengths: Tensor | None = ..., return_lse: Literal[True],
    seed: int | Tensor | None = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str = "top_left",
    key_lengths: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``dropout(softmax(scale * Q Kᵀ + mask)) V``.

    Equivalent PyTorch, which is also its signature up to ``enable_gqa``::

        F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    It differs in four points. Masks may be combined, ``is_causal`` with ``attn_mask`` included (PyTorch
    refuses that pair): a key is visible when all of them allow it. A query without a visible key gives output
    0, lse -inf and gradients 0. Dropout is a function of the seed and the element's place alone, the same on
    every backend. Sums are kept in float32 for 16-bit inputs. Keys and values that no query sees may hold
    anything, NaN included.

    Args:
        query: [B, H, L, D], float32, bfloat16, float16 or float64; any strides, as for all inputs. B, L and S
            may be 0.
        key: [B, H, S, D] in the query's dtype; [B, Hk, S, D] with ``enable_gqa``.
        value: [B, H, S, Dv], likewise.
        attn_mask: broadcastable to [B, H, L, S]. bool: True = attend (``nn.MultiheadAttention`` means the
            opposite). float32 or the query's dtype: added to the scores, -inf masks; it may require grad.
        dropout_p: probability, 0..1, of dropping an attention weight; pass 0 outside of training.
        is_causal: hide later keys from a query.
        scale: factor of Q Kᵀ; ``1 / sqrt(D)`` if None.
        enable_gqa: allow fewer key heads than query heads; query head h reads key head ``h // (H // Hk)``.
        causal_align: "top_left", query i sees keys j <= i, as in PyTorch; or "bottom_right", j <= i + S - L,
            as for decoding with a cache. They differ when L != S.
        key_lengths: int64 [B], in 0..S; keys from there on are padding.
        prefix_lengths: int64 [B], in 0..S, with ``is_causal``; keys before it are visible to every query.
        return_lse: also return the natural log-sum-exp of the undropped scores; it is differentiable.
        seed: of dropout. None draws one from PyTorch's generator of the device; an int is used with offset 0;
            an int64 tensor holds [seed, offset] or a seed alone.
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call. ``nlpfast info`` prints them.

    Returns:
        The output [B, H, L, Dv] in the query's dtype; with ``return_lse`` also lse [B, H, L] in float32
        (float64 for float64). Under autocast, inputs are first cast to its dtype, as PyTorch does.

    Raises:
        ValueError: for shapes, values or names that do not fit.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.

    Papers: Vaswani et al., "Attention is all you need", 2017. Dao et al., "FlashAttention", 2022. Ainslie et
    al., "GQA", 2023. Dong et al., "Unified language model pre-training" (prefix mask), 2019. Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3" (Philox), 2011.
    """
    device_type = query.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        query, key, value = autocast(query, key, value)
    if not _fit(query, key, value, enable_gqa):
        raise _misfit(query, key, value)
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, query, key)
    if key_lengths is not None:
        _check_lengths("key_lengths", key_lengths, query)
    if prefix_lengths is not None:
        _check_lengths("prefix_lengths", prefix_lengths, query)
        if not is_causal:
            raise ValueError(
                "prefix_lengths is given with is_causal=False, where every key is visible: set is_causal=True"
            )
    _check_options(causal_align, dropout_p)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[3])
    seed = seed_pair(seed, query.device) if dropout_p > 0.0 else None
    if torch.compiler.is_compiling():
        query, key, value, key_lengths, prefix_lengths = _distinct(
            query, key, value, key_lengths, prefix_lengths
        )
    request = (query, key, value, attn_mask, key_lengths, prefix_lengths)
    module = dispatch.choose("attention", device_type, backend, request)
    options = (seed, dropout_p, causal_align if is_causal else "none", scale)
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
    ):
        return _Attention.apply(*request, *options, module, return_lse)
    out, lse, _ = module.forward(*request, *options)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    """Join a backend's forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
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
        module: ModuleType,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the backend and save what its backward reads."""
        masks = (attn_mask, key_lengths, prefix_lengths, seed)
        out, lse, lse_low = module.forward(query, key, value, *masks, dropout_p, causal, scale)
        ctx.save_for_backward(query, key, value, out, lse, lse_low, *masks)
        # An output that nobody used then has the gradient None, and costs nothing.
        ctx.set_materialize_grads(False)
        ctx.module, ctx.options = module, (dropout_p, causal, scale)
        ctx.additions = []
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Run the backend's backward; grads of everything but query, key, value and the mask are None."""
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        extra: list[PairGradients] = []
        if not torch.compiler.is_compiling():
            extra = [x for x in ctx.additions if x.is_of_this_pass()]
            ctx.additions.clear()
        grads = ctx.module.backward(grad_out, grad_lse, *saved, *ctx.options, extra)
        grads = refuse_second_derivative(NO_SECOND, grads, grad_out, grad_lse, *saved[:3], saved[6])
        return (*grads, None, None, None, None, None, None, None, None)


def _fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Return whether the three inputs fit each other: one quick look, since it runs on every call."""
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4 or q[0] != k[0] or q[3] != k[3] or k[:3] != v[:3]:
        return False
    if q[3] == 0 or v[3] == 0 or (k[1] != q[1] and not (enable_gqa and k[1] > 0 and q[1] % k[1] == 0)):
        return False
    dtype, device = query.dtype, query.device
    return (
        dtype in _FLOATING
        and dtype == key.dtype == value.dtype
        and device == key.device
        and device == value.device
    )


def _misfit(query: Tensor, key: Tensor, value: Tensor) -> Exception:
    """Build the error for inputs that do not fit."""
    alone = _misfit_alone(query, key, value, "[B, H, length, D]")
    if alone is not None:
        return alone
    B, H, _, D = query.shape
    Hk, S = key.shape[1:3]
    if key.shape[0] != B or key.shape[3] != D:
        rule = f"B and D must be those of query, {_shape(query)}"
        return ValueError(f"key has the shape {_shape(key)}; {rule}: expand or project it")
    if value.shape[:3] != key.shape[:3]:
        rule = f"it must be {[B, Hk, S]} and Dv, as key's {_shape(key)}"
        return ValueError(f"value has the shape {_shape(value)}; {rule}: expand it or cut it")
    return _misfit_of_heads(H, Hk)


def _misfit_alone(query: Tensor, key: Tensor, value: Tensor, layout: str) -> Exception | None:
    """Build the error for an input that fits no other, or return None."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != layout.count(",") + 1:
            return ValueError(f"{name} has the shape {_shape(x)}; it must be {layout}: view it so")
        if x.dtype != query.dtype or x.dtype not in _FLOATING:
            rule = "query, key and value must share float32, bfloat16, float16 or float64"
            return TypeError(f"{name} has the dtype {x.dtype}; {rule}: convert it")
        if x.device != query.device:
            return _elsewhere(name, x, query)
        if x.shape[-1] == 0:
            return ValueError(f"{name} has the head size 0; it must be at least 1: widen the last dimension")
    return None


def _misfit_of_heads(H: int, Hk: int) -> ValueError:
    """Build the error for numbers of heads that do not fit."""
    if Hk > 0 and H % Hk == 0:
        return ValueError(
            f"key has {Hk} heads and query has {H}; they must be equal: pass enable_gqa=True to share"
        )
    return ValueError(f"query has {H} heads; it must be a multiple of key's {Hk}: change the head counts")


def _check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask with four dimensions, or raise."""
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        rule = f"it must be bool, float32 or the query's {query.dtype}"
        raise TypeError(f"attn_mask has the dtype {attn_mask.dtype}; {rule}: convert it")
    if attn_mask.device != query.device:
        raise _elsewhere("attn_mask", attn_mask, query)
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    mask = attn_mask
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    if mask.ndim != 4 or any(n != 1 and n != whole for n, whole in zip(mask.shape, full, strict=True)):
        rule = f"it must broadcast to [B, H, L, S] = {list(full)}"
        raise ValueError(f"attn_mask has the shape {_shape(attn_mask)}; {rule}: reshape it")
    return mask


def _check_lengths(name: str, lengths: Tensor, query: Tensor) -> None:
    """Raise unless ``lengths`` is an int64 vector of the batch; its values are the backend's to check."""
    if lengths.dtype != torch.int64:
        raise TypeError(f"{name} has the dtype {lengths.dtype}; it must be torch.int64: call .long() on it")
    if lengths.ndim != 1 or lengths.shape[0] != query.shape[0]:
        rule = f"it must be [B] = [{query.shape[0]}]"
        raise ValueError(
            f"{name} has the shape {_shape(lengths)}; {rule}: give one length for each batch entry"
        )
    if lengths.device != query.device:
        raise _elsewhere(name, lengths, query)


def _check_options(causal_align: str, dropout_p: float) -> None:
    """Raise unless the alignment is known and the probability is one."""
    if causal_align not in ("top_left", "bottom_right"):
        raise ValueError(
            f"causal_align is {causal_align!r}; it must be 'top_left' or 'bottom_right': pass one of them"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must lie in 0..1: pass a probability")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of autocast, as PyTorch's own attention does; float64 stays.

    Args:
        *tensors: on one device.
    """
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.dtype in _FLOATING[:3] else x for x in tensors)


def _distinct(*tensors: Any) -> tuple[Any, ...]:
    """Replace repeated tensors by views: the compiler refuses a Function that gets one tensor twice."""
    return tuple(
        x if x is None or all(x is not y for y in tensors[:i]) else x.view_as(x)
        for i, x in enumerate(tensors)
    )


def _elsewhere(name: str, x: Tensor, query: Tensor) -> ValueError:
    """Build the error for an argument on another device."""
    return ValueError(
        f"{name} is on {x.device}; it must be on the query's device {query.device}: move it there"
    )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
