"""Residual sum, dropout, layer norm: checks arguments, picks a backend, holds the autograd.Function."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops.add_layer_norm import reference
from nlpfast.ops.second_derivative import refuse_second_derivative
from nlpfast.ops.seeds import drop_threshold, seed_pair

__all__ = ["add_layer_norm"]

_backends: dict[str, ModuleType | str] = {
    "cpu": native.status(),
    "cuda": dispatch.cuda_status(),
    "triton": dispatch.triton_status(),
}
if native.status() == "ok":
    from nlpfast.ops.add_layer_norm import cpu

    _backends["cpu"] = cpu
if dispatch.cuda_status() == "ok":
    from nlpfast.ops.add_layer_norm import cuda

    _backends["cuda"] = cuda
if dispatch.triton_status() == "ok":
    from nlpfast.ops.add_layer_norm import triton

    _backends["triton"] = triton
dispatch.registry["add_layer_norm"] = {**_backends, "reference": reference}

NO_SECOND = "add_layer_norm has no second derivatives: use F.layer_norm of the sum, or drop create_graph=True"
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


def add_layer_norm(
    part: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to a residual, with dropout, and normalise the sum: what stands between two parts of a Transformer.

    Equivalent PyTorch, with other random numbers::

        total = residual + F.dropout(part, dropout_p)
        return F.layer_norm(total, residual.shape[-1:], weight, bias, eps), total

    The norm is that of the sum as it is returned; its mean and variance are float32 (float64 for float64).
    The random bits are those of `nlpfast.ops.dropout`, here by row and column: an element is dropped if its
    16 bits are below ``round(65536 dropout_p)``.

    Args:
        part: [..., C], what a part of a layer gives; in the residual's dtype, or in bfloat16 or float16 where
            that is float32, as under autocast.
        residual: [..., C], float32, bfloat16, float16 or float64; any strides.
        weight: [C], of the norm, floating.
        bias: [C], of the norm, floating, or None.
        dropout_p: probability that an element of `part` is dropped; at least 0 and below 1 - 1 / 131072.
        eps: is added to the variance.
        out_dtype: of the norm; None for the residual's. Another one saves the cast before a linear layer.
        seed: None draws one from PyTorch's generator of the device; an int is used with offset 0; an int64
            tensor holds [seed, offset] or a seed alone.
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call.

    Returns:
        The norm [..., C], and the sum [..., C] in the residual's dtype.

    Raises:
        ValueError: for shapes or values that do not fit.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.

    Papers: Ba et al., "Layer normalization", 2016. Srivastava et al., "Dropout", 2014. Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3" (Philox), 2011.
    """
    out_dtype = residual.dtype if out_dtype is None else out_dtype
    threshold = _check(part, residual, weight, bias, dropout_p, out_dtype)
    pair = seed_pair(seed, residual.device) if threshold else None
    shape, C = residual.shape, residual.shape[-1]
    part, residual = part.reshape(-1, C), residual.reshape(-1, C)
    module = dispatch.choose("add_layer_norm", residual.device.type, backend, (part, residual, out_dtype))
    options = (pair, threshold, eps, out_dtype)
    tensors = (part, residual, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        total, out = _AddLayerNorm.apply(*tensors, *options, module)
    else:
        total, out, _ = module.forward(*tensors, *options)
    return out.view(shape), total.view(shape)


class _AddLayerNorm(torch.autograd.Function):
    """Join a backend's forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        part: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        threshold: int,
        eps: float,
        out_dtype: torch.dtype,
        module: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        """Run the backend and save what its backward reads: the sum, and two numbers a row."""
        total, out, statistics = module.forward(part, residual, weight, bias, seed, threshold, eps, out_dtype)
        ctx.save_for_backward(total, statistics, weight, seed)
        ctx.set_materialize_grads(False)
        ctx.module, ctx.options = module, (threshold, part.dtype)
        ctx.out_dtype, ctx.bias_dtype = out_dtype, None if bias is None else bias.dtype
        return total, out

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the backend's backward."""
        total, statistics, weight, seed = ctx.saved_tensors
        slope = torch.zeros_like(total, dtype=ctx.out_dtype) if grad_out is None else grad_out
        saved = (total, statistics, weight, seed)
        d_part, d_residual, d_weight, d_bias = ctx.module.backward(slope, grad_sum, *saved, *ctx.options)
        grads = (
            *(d_part, d_residual, d_weight.to(weight.dtype)),
            None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype),
        )
        grads = refuse_second_derivative(NO_SECOND, grads, grad_sum, grad_out, total, weight)
        return (*grads, None, None, None, None, None)


def _check(
    part: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> int:
    """Return the threshold of dropout, or raise for what does not fit."""
    if residual.ndim == 0 or residual.shape[-1] == 0:
        rule = "it must be [..., C] with at least one channel"
        raise ValueError(f"residual has the shape {list(residual.shape)}; {rule}: give a row its features")
    if part.shape != residual.shape:
        rule = f"it must be the residual's {list(residual.shape)}"
        raise ValueError(f"part has the shape {list(part.shape)}; {rule}: expand it")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.shape != residual.shape[-1:]:
            rule = f"it must be [C] = {list(residual.shape[-1:])}"
            raise ValueError(f"{name} has the shape {list(x.shape)}; {rule}: check the norm")
    for name, dtype in (("residual", residual.dtype), ("weight", weight.dtype), ("out_dtype", out_dtype)):
        if dtype not in _FLOATING:
            raise TypeError(f"{name} has the dtype {dtype}; it must be floating: convert it")
    if part.dtype != residual.dtype and not (residual.dtype == torch.float32 and part.dtype in _HALF):
        rule = f"it must be the residual's {residual.dtype}, or bfloat16 or float16 with a float32 residual"
        raise TypeError(f"part has the dtype {part.dtype}; {rule}: convert it")
    for name, x in (("part", part), ("weight", weight), ("bias", bias)):
        if x is not None and x.device != residual.device:
            raise ValueError(
                f"{name} is on {x.device}; it must be on the residual's {residual.device}: move it"
            )
    return drop_threshold(dropout_p, "dropout_p")
