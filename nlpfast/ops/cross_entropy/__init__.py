"""Cross entropy: checks the arguments, picks a backend, and holds the autograd.Function of this op."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops import labels
from nlpfast.ops.cross_entropy import reference
from nlpfast.ops.second_derivative import refuse_second_derivative

_backends: dict[str, ModuleType | str] = {
    "cpu": native.status(),
    "cuda": dispatch.cuda_status(),
    "triton": dispatch.triton_status(),
}
if native.status() == "ok":
    from nlpfast.ops.cross_entropy import cpu

    _backends["cpu"] = cpu
if dispatch.cuda_status() == "ok":
    from nlpfast.ops.cross_entropy import cuda

    _backends["cuda"] = cuda
if dispatch.triton_status() == "ok":
    from nlpfast.ops.cross_entropy import triton

    _backends["triton"] = triton
dispatch.registry["cross_entropy"] = {**_backends, "reference": reference}

NO_SECOND = "cross_entropy has no second derivatives: use F.cross_entropy, or drop create_graph=True"
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# fmt: off
@overload
def cross_entropy(
    input: Tensor, target: Tensor, *, ignore_index: int = ..., reduction: str = ...,
    label_smoothing: float = ..., smoothing: str = ..., pad_index: int | None = ...,
    return_nll: Literal[False] = ..., inplace: bool = ..., backend: str | None = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor, target: Tensor, *, ignore_index: int = ..., reduction: str = ...,
    label_smoothing: float = ..., smoothing: str = ..., pad_index: int | None = ...,
    return_nll: Literal[True], inplace: bool = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
# fmt: on
def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing: str = "uniform",
    pad_index: int | None = None,
    return_nll: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute the cross entropy of logits and smoothed labels, ``-sum_v q_v log softmax(input)_v`` a row.

    Equivalent PyTorch, for ``smoothing="uniform"`` and an input of two dimensions::

        F.cross_entropy(input, target, ignore_index=..., reduction=..., label_smoothing=...)

    Here the classes are always the last dimension. A row of logits is read once, and where a gradient is
    wanted and the reduction is "mean" or "sum", it is made at the same time; no other tensor has that size.

    With eps = ``label_smoothing``, q is, at the target and elsewhere, for

    - "uniform" (PyTorch): 1 - eps + eps / V and eps / V;
    - "fairseq" (also Megatron, LightSeq): 1 - eps and eps / (V - 1);
    - "exclude_pad" (JoeyNMT, The Annotated Transformer, which report this minus the entropy of q): 1 - eps
      and eps / (V - 2), and 0 at ``pad_index``; rows whose target is ``pad_index`` are ignored.

    Where no class is left for eps, the target has all of q.

    Args:
        input: [..., V], logits, float32, bfloat16, float16 or float64; any strides.
        target: [...], int64, in 0..V - 1, or ``ignore_index``.
        ignore_index: the target of rows that do not count: their loss and gradient are 0.
        reduction: "none", a loss a row, [...]; "sum"; "mean", over the rows that count (NaN if there are
            none, as in PyTorch); "sequence", [B, T] rows summed to [B], or [T] rows to [].
        label_smoothing: eps, 0..1.
        smoothing: how it is spread, see above.
        pad_index: the class without mass, for "exclude_pad" and only there.
        return_nll: also return the loss without smoothing, and the number of rows that count and whose first
            largest logit is the target's; both reduced like the loss (counts are summed for "mean"),
            neither differentiable.
        inplace: the logits may be overwritten with their gradient; reading them afterwards is an error of
            autograd's or gives anything. A second backward pass is then an error.
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call. ``nlpfast info`` prints them.

    Returns:
        The loss in float32 (float64 for float64); with ``return_nll`` also nll, likewise, and the count, an
        int64.

    Raises:
        ValueError: for shapes, values or names that do not fit; for targets outside of the classes, on the
            CPU and in uncompiled code.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.

    Papers: Szegedy et al., "Rethinking the Inception architecture", 2016 (label smoothing). Vaswani et al.,
    "Attention is all you need", 2017.
    """
    _check(input)
    options = (ignore_index, reduction, label_smoothing, smoothing, pad_index)
    known = labels.prepare(target, input, input.shape[-1], *options)
    logits, index = labels.as_sequences(input, known.target)
    module = dispatch.choose("cross_entropy", input.device.type, backend, (logits, index))
    # rows that share memory have gradients that do not
    shared = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    inplace = inplace and not shared and not torch.compiler.is_compiling()
    if torch.is_grad_enabled() and input.requires_grad:
        scale = _grad_scale(reduction, known.counted, inplace, logits)
        loss, nll, correct = _CrossEntropy.apply(logits, index, scale, *known.options, inplace, module)
    else:
        loss, nll, correct, _, _ = module.forward(logits, index, *known.options, None, False)
    return known.results(loss, nll, correct, reduction, return_nll)


class _CrossEntropy(torch.autograd.Function):
    """Join a backend's forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        grad_scale: Tensor | None,
        ignore_index: int,
        pad_index: int,
        on_target: float,
        on_other: float,
        inplace: bool,
        module: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backend and save what its backward reads."""
        options = (ignore_index, pad_index, on_target, on_other)
        loss, nll, correct, statistics, gradient = module.forward(
            input, target, *options, grad_scale, inplace
        )
        ctx.mark_non_differentiable(nll, correct)
        ctx.set_materialize_grads(False)
        ctx.module, ctx.options, ctx.inplace = module, options, inplace
        if inplace:
            # whoever saved the logits for a backward pass of its own hears of it
            torch.autograd.graph.increment_version(input)
        ctx.save_for_backward(input, target, statistics, grad_scale)
        # not among the saved tensors: handed out once, after which nobody else holds it
        ctx.gradient = gradient
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        """Run the backend's backward; only the logits have a gradient."""
        if grad_loss is None:
            return (None,) * 9
        gradient, ctx.gradient = ctx.gradient, None
        if ctx.inplace and gradient is None:
            raise RuntimeError(
                "the logits of cross_entropy(inplace=True) became a gradient, which was handed out: "
                "drop inplace=True to call backward twice"
            )
        input, target, statistics, grad_scale = ctx.saved_tensors
        grad = ctx.module.backward(
            grad_loss, input, target, statistics, gradient, grad_scale, *ctx.options, ctx.inplace
        )
        (grad,) = refuse_second_derivative(NO_SECOND, (grad,), grad_loss, input)
        return (grad, *(None,) * 8)


def _check(input: Tensor) -> None:
    """Raise for logits that do not fit."""
    if input.ndim == 0 or input.shape[-1] == 0:
        rule = "it must be [..., V] with at least one class"
        raise ValueError(f"input has the shape {list(input.shape)}; {rule}: give a logit a class")
    if input.dtype not in _FLOATING:
        rule = "it must be float32, bfloat16, float16 or float64"
        raise TypeError(f"input has the dtype {input.dtype}; {rule}: convert it")


def _grad_scale(reduction: str, count: Tensor | None, inplace: bool, input: Tensor) -> Tensor | None:
    """Return the upstream gradient that a row's loss is going to have if nothing else scales the loss.

    None where there is no telling; the gradient is then made in the backward pass, but for ``inplace``.
    """
    if torch.compiler.is_compiling() or (reduction in ("none", "sequence") and not inplace):
        return None
    dtype = input.dtype if input.dtype == torch.float64 else torch.float32
    if count is None:
        return torch.ones((), dtype=dtype, device=input.device)
    # the reciprocal of an integer has the default dtype
    return (count if dtype == torch.get_default_dtype() else count.to(dtype)).reciprocal()
