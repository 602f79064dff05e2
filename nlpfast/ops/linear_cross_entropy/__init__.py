"""Cross entropy of projected logits: checks the arguments, picks a backend, holds the autograd.Function."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops import labels, large_buffers
from nlpfast.ops.linear_cross_entropy import reference
from nlpfast.ops.second_derivative import refuse_second_derivative

_backends: dict[str, ModuleType | str] = {
    "cpu": native.status(),
    "triton": dispatch.triton_status(),
    "cuda": dispatch.cuda_status(),
}
if native.status() == "ok":
    from nlpfast.ops.linear_cross_entropy import cpu

    _backends["cpu"] = cpu
if dispatch.triton_status() == "ok":
    from nlpfast.ops.linear_cross_entropy import triton

    _backends["triton"] = triton
if dispatch.cuda_status() == "ok":
    from nlpfast.ops.linear_cross_entropy import cuda

    _backends["cuda"] = cuda
dispatch.registry["linear_cross_entropy"] = {**_backends, "reference": reference}

NO_SECOND = (
    "linear_cross_entropy has no second derivatives: use F.linear and F.cross_entropy, "
    "or drop create_graph=True"
)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# fmt: off
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    ignore_index: int = ..., reduction: str = ..., label_smoothing: float = ..., smoothing: str = ...,
    pad_index: int | None = ..., return_nll: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    ignore_index: int = ..., reduction: str = ..., label_smoothing: float = ..., smoothing: str = ...,
    pad_index: int | None = ..., return_nll: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
# fmt: on
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing: str = "uniform",
    pad_index: int | None = None,
    return_nll: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute the cross entropy of ``input @ linear_weight.T + linear_bias`` without keeping these logits.

    Equivalent PyTorch, for ``smoothing="uniform"`` and an input of two dimensions::

        logits = F.linear(input, linear_weight, linear_bias)
        F.cross_entropy(logits, target, ignore_index=..., reduction=..., label_smoothing=...)

    Logits exist for some rows at a time, a few dozen megabytes. With the reductions "mean" and "sum" the
    gradients are made along with the loss, with the three products that they take at the least; with
    "none" and "sequence" the backward pass computes the logits once more.

    Args:
        input: [..., D], float32, bfloat16, float16 or float64; any strides.
        linear_weight: [V, D], in the input's dtype.
        target: [...], int64, in 0..V - 1, or ``ignore_index``.
        linear_bias: [V], in the input's dtype, or None.
        ignore_index: see ``cross_entropy``. On the CPU such rows take no time.
        reduction: see ``cross_entropy``.
        label_smoothing: see ``cross_entropy``.
        smoothing: see ``cross_entropy``.
        pad_index: see ``cross_entropy``.
        return_nll: see ``cross_entropy``.
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call. ``nlpfast info`` prints them.

    Returns:
        As ``cross_entropy``: the loss in float32 (float64 for float64), and with ``return_nll`` nll and the
        count of correct rows. Under autocast, inputs are first cast to its dtype, as a linear layer's are.

    Raises:
        ValueError: for shapes, values or names that do not fit; for targets outside of the classes, on the
            CPU and in uncompiled code.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.

    Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025, and Hsu et al.,
    "Liger Kernel", 2024 (losses in chunks, with gradients made in the forward pass).
    """
    device_type = input.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
        with torch.autocast(device_type, enabled=False):
            return linear_cross_entropy(
                *(input, linear_weight, target),
                linear_bias=linear_bias,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                smoothing=smoothing,
                pad_index=pad_index,
                return_nll=return_nll,  # type: ignore[call-overload]
                backend=backend,
            )
    if device_type == "cpu" and not torch.compiler.is_compiling():
        native.join_no_lost_threads()
    _check(input, linear_weight, linear_bias)
    options = (ignore_index, reduction, label_smoothing, smoothing, pad_index)
    known = labels.prepare(target, input, linear_weight.shape[0], *options)
    rows, index = labels.as_sequences(input, known.target)
    tensors = (rows, linear_weight, linear_bias, index)
    module = dispatch.choose("linear_cross_entropy", device_type, backend, tensors)
    inputs = (input, linear_weight, linear_bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        at_once = reduction in ("mean", "sum")
        loss, nll, correct = _LinearCrossEntropy.apply(*tensors, at_once, *known.options, module)
    else:
        loss, nll, correct, *_ = module.forward(*tensors, *known.options, (False, False, False))
    return known.results(loss, nll, correct, reduction, return_nll)


class _LinearCrossEntropy(torch.autograd.Function):
    """Join a backend's forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        at_once: bool,
        ignore_index: int,
        pad_index: int,
        on_target: float,
        on_other: float,
        module: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backend and save what its backward reads.

        Where all rows are going to have the same upstream gradient, the gradients are made `at_once`, for 1.
        """
        tensors = (input, linear_weight, linear_bias, target)
        options = (ignore_index, pad_index, on_target, on_other)
        wanted = [want and at_once for want in ctx.needs_input_grad[:3]]
        loss, nll, correct, statistics, gradients = module.forward(*tensors, *options, wanted)
        ctx.mark_non_differentiable(nll, correct)
        ctx.set_materialize_grads(False)
        ctx.module, ctx.options, ctx.gradients = module, options, None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*tensors, statistics, *gradients)
        else:
            ctx.save_for_backward(*tensors, statistics)
            # handed out once, after which nobody else holds them: they may be scaled in place
            ctx.gradients = gradients or None
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        """Scale the gradients that were made, or run the backend's backward."""
        if grad_loss is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        tensors, statistics, made = saved[:4], saved[4], saved[5:] or ctx.gradients
        ctx.gradients = None
        wanted = ctx.needs_input_grad[:3]
        if made is None:
            gradients = ctx.module.backward(grad_loss, *tensors, statistics, *ctx.options, wanted)
        else:
            scale = _common(grad_loss, tensors[3], ctx.options[0])
            gradients = [_scaled(x, scale, tensors[0].dtype) for x in made]
        grads = tuple(
            gradient.to(tensors[0].dtype) if want else None
            for want, gradient in zip(wanted, gradients, strict=True)
        )
        grads = refuse_second_derivative(NO_SECOND, grads, grad_loss, *tensors[:3])
        return (*grads, *(None,) * 7)


def _common(grad_loss: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the upstream gradient that all rows have; 0 where none counts, as their mean's is infinite."""
    # of no rows the sum is 0
    return grad_loss.reshape(-1)[:1].sum().where((target != ignore_index).any(), 0.0)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient, which nobody else holds, times a number and in a dtype."""
    if torch.compiler.is_compiling():
        return (gradient * scale).to(dtype)
    with torch.no_grad():
        gradient.mul_(scale)
        if gradient.dtype == dtype:
            return gradient
        on_cpu = gradient.device.type == "cpu"
        return large_buffers.empty(gradient.shape, dtype).copy_(gradient) if on_cpu else gradient.to(dtype)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise for shapes, dtypes and devices that do not fit one another."""
    if input.ndim == 0:
        raise ValueError("input has the shape []; it must be [..., D]: give a row its features")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != input.shape[-1]:
        rule = f"it must be [V, D] with at least one class and D = {input.shape[-1]}, as input has"
        raise ValueError(f"linear_weight has the shape {list(weight.shape)}; {rule}: check the projection")
    if input.dtype not in _FLOATING:
        rule = "it must be float32, bfloat16, float16 or float64"
        raise TypeError(f"input has the dtype {input.dtype}; {rule}: convert it")
    if bias is not None and bias.shape != weight.shape[:1]:
        rule = f"it must be [V] = {list(weight.shape[:1])}"
        raise ValueError(f"linear_bias has the shape {list(bias.shape)}; {rule}: check the projection")
    for name, x in (("linear_weight", weight), ("linear_bias", bias)):
        if x is not None and x.dtype != input.dtype:
            raise TypeError(f"{name} has the dtype {x.dtype} and input {input.dtype}: convert one of the two")
        if x is not None and x.device != input.device:
            raise ValueError(f"{name} is on {x.device} and input on {input.device}: move one of the two")


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast to the dtype of autocast, as PyTorch does for a linear layer; float64 stays."""
    first = tensors[0]
    assert first is not None
    dtype = torch.get_autocast_dtype(first.device.type)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
