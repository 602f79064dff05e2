"""Bias, GELU or ReLU, dropout: checks arguments, picks a backend, and holds the autograd.Function."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops.bias_gelu import reference
from nlpfast.ops.second_derivative import refuse_second_derivative
from nlpfast.ops.seeds import drop_threshold, seed_pair

__all__ = ["bias_gelu", "bias_relu"]

_backends: dict[str, ModuleType | str] = {"cpu": native.status(), "triton": dispatch.triton_status()}
if native.status() == "ok":
    from nlpfast.ops.bias_gelu import cpu

    _backends["cpu"] = cpu
if dispatch.triton_status() == "ok":
    from nlpfast.ops.bias_gelu import triton

    _backends["triton"] = triton
dispatch.registry["bias_gelu"] = {**_backends, "reference": reference}

NO_SECOND = "bias_{0} has no second derivatives: use F.{0} of the sum, or drop create_graph=True"
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of GELU, as PyTorch calls them, and their numbers
_KINDS = {"none": reference.ERF, "tanh": reference.TANH}


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    approximate: str = "none",
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a bias, apply GELU, and drop: what stands between the two linear layers of a Transformer's network.

    Equivalent PyTorch, with other random numbers::

        F.dropout(F.gelu(x + bias, approximate=approximate), dropout_p)

    The sum is not rounded before GELU reads it. For the backward pass x is kept, and nothing else: the random
    bits come from the seed again. They are those of `nlpfast.add_layer_norm`, by row and column: an element
    is dropped if its 16 bits are below ``round(65536 dropout_p)``.

    Args:
        x: [..., C], a linear layer's product; float32, bfloat16, float16 or float64; any strides.
        bias: [C], of the linear layer, floating, or None.
        dropout_p: probability that an element is dropped; at least 0 and below 1 - 1 / 131072.
        approximate: "none" is v times the normal distribution function of v; "tanh" is its approximation by a
            hyperbolic tangent, which GPT-2 has.
        seed: None draws one from PyTorch's generator of the device; an int is used with offset 0; an int64
            tensor holds [seed, offset] or a seed alone.
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call.

    Returns:
        [..., C], in the dtype of x.

    Raises:
        ValueError: for shapes or values that do not fit.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.

    Papers: Hendrycks and Gimpel, "Gaussian error linear units (GELUs)", 2016. Srivastava et al., "Dropout",
    2014. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Philox), 2011.
    """
    if approximate not in (*_KINDS,):
        raise ValueError(f"approximate is {approximate!r}; it must be 'none' or 'tanh'")
    return _activated(x, bias, _KINDS[approximate], dropout_p, seed, backend)


def bias_relu(
    x: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a bias, apply ReLU, and drop; otherwise as `bias_gelu`.

    Equivalent PyTorch, with other random numbers: ``F.dropout(F.relu(x + bias), dropout_p)``.

    Args:
        x: [..., C], a linear layer's product; float32, bfloat16, float16 or float64; any strides.
        bias: [C], of the linear layer, floating, or None.
        dropout_p: probability that an element is dropped; at least 0 and below 1 - 1 / 131072.
        seed: see `bias_gelu`.
        backend: see `bias_gelu`.

    Returns:
        [..., C], in the dtype of x.

    Raises:
        ValueError: for shapes or values that do not fit.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.
    """
    return _activated(x, bias, reference.RELU, dropout_p, seed, backend)


def _activated(
    x: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    threshold = _check(x, bias, dropout_p)
    pair = seed_pair(seed, x.device) if threshold else None
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    module = dispatch.choose("bias_gelu", x.device.type, backend, (x,))
    options = (activation, pair, threshold)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        out: Tensor = _BiasGelu.apply(x, bias, *options, module)
    else:
        out = module.forward(x, bias, *options)
    return out.view(shape)


class _BiasGelu(torch.autograd.Function):
    """Join a backend's forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        activation: int,
        seed: Tensor | None,
        threshold: int,
        module: ModuleType,
    ) -> Tensor:
        """Run the backend and save what its backward reads."""
        ctx.save_for_backward(x, bias, seed)
        ctx.module, ctx.activation, ctx.threshold = module, activation, threshold
        out: Tensor = module.forward(x, bias, activation, seed, threshold)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backend's backward."""
        x, bias, seed = ctx.saved_tensors
        dx, d_bias = ctx.module.backward(grads[0], x, bias, ctx.activation, seed, ctx.threshold)
        found = (dx, None if bias is None else d_bias.to(bias.dtype))
        refusal = NO_SECOND.format("relu" if ctx.activation == reference.RELU else "gelu")
        return (*refuse_second_derivative(refusal, found, grads[0], x, bias), None, None, None, None)


def _check(x: Tensor, bias: Tensor | None, dropout_p: float) -> int:
    """Return the threshold of dropout, or raise for what does not fit."""
    if x.ndim == 0 or x.shape[-1] == 0:
        rule = "it must be [..., C] with at least one channel"
        raise ValueError(f"x has the shape {list(x.shape)}; {rule}: give a row its features")
    if x.dtype not in _FLOATING:
        raise TypeError(f"x has the dtype {x.dtype}; it must be floating: convert it")
    if bias is not None:
        if bias.shape != x.shape[-1:]:
            rule = f"it must be [C] = {list(x.shape[-1:])}"
            raise ValueError(f"bias has the shape {list(bias.shape)}; {rule}: give that of the linear layer")
        if bias.dtype not in _FLOATING:
            raise TypeError(f"bias has the dtype {bias.dtype}; it must be floating: convert it")
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device}; it must be on x's {x.device}: move it")
    return drop_threshold(dropout_p, "dropout_p")
