"""Cross entropy: checks the arguments, picks a backend, and holds the autograd.Function of this op."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops.cross_entropy import reference
from nlpfast.ops.second_derivative import refuse_second_derivative

_backends: dict[str, ModuleType | str] = {"cpu": native.status()}
if native.status() == "ok":
    from nlpfast.ops.cross_entropy import cpu

    _backends["cpu"] = cpu
dispatch.registry["cross_entropy"] = {**_backends, "reference": reference}

REDUCTIONS = ("none", "sum", "mean", "sequence")
SMOOTHINGS = ("uniform", "fairseq", "exclude_pad")
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
    _check(input, target, reduction, label_smoothing, smoothing, pad_index)
    V = input.shape[-1]
    if pad_index is not None:
        target = target.masked_fill(target.eq(pad_index), ignore_index)
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(target, ignore_index, V)
    on_target, on_other = _smoothed(label_smoothing, smoothing, V)
    logits, index = _as_sequences(input, target)
    module = dispatch.choose("cross_entropy", input.device.type, backend, (logits, index))
    count = (target != ignore_index).sum()
    # rows that share memory have gradients that do not
    shared = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    inplace = inplace and not shared and not torch.compiler.is_compiling()
    options = (ignore_index, -1 if pad_index is None else pad_index, on_target, on_other)
    if torch.is_grad_enabled() and input.requires_grad:
        scale = _grad_scale(reduction, count, inplace, logits)
        loss, nll, correct = _CrossEntropy.apply(logits, index, scale, *options, inplace, module)
    else:
        loss, nll, correct, _, _ = module.forward(logits, index, *options, None, False)
    loss = _reduced(loss.view(target.shape), reduction, count)
    if not return_nll:
        return loss
    correct = _reduced(correct.view(target.shape).long(), "sum" if reduction == "mean" else reduction, count)
    return loss, _reduced(nll.view(target.shape), reduction, count), correct


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


def _check(
    input: Tensor,
    target: Tensor,
    reduction: str,
    label_smoothing: float,
    smoothing: str,
    pad_index: int | None,
) -> None:
    """Raise for arguments that do not fit; the values of the targets are looked at elsewhere."""
    if input.ndim == 0 or input.shape[-1] == 0:
        rule = "it must be [..., V] with at least one class"
        raise ValueError(f"input has the shape {list(input.shape)}; {rule}: give a logit a class")
    if input.dtype not in _FLOATING:
        rule = "it must be float32, bfloat16, float16 or float64"
        raise TypeError(f"input has the dtype {input.dtype}; {rule}: convert it")
    if target.dtype != torch.int64:
        rule = "it must be torch.int64, one class a row"
        raise TypeError(
            f"target has the dtype {target.dtype}; {rule}: call .long() on it, "
            "or F.cross_entropy for probabilities"
        )
    if target.shape != input.shape[:-1]:
        rule = f"it must be input's without the classes, {list(input.shape[:-1])}"
        raise ValueError(f"target has the shape {list(target.shape)}; {rule}: reshape one of the two")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} and input on {input.device}: move one of the two")
    for name, value, known in (("reduction", reduction, REDUCTIONS), ("smoothing", smoothing, SMOOTHINGS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {known}: pass one of them")
    if reduction == "sequence" and target.ndim not in (1, 2):
        rule = "reduction='sequence' takes [B, T, V] or [T, V]"
        raise ValueError(f"input has the shape {list(input.shape)}; {rule}: view it so")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in 0..1: pass a share")
    if (smoothing == "exclude_pad") != (pad_index is not None):
        raise ValueError(
            f"pad_index is {pad_index} and smoothing {smoothing!r}; 'exclude_pad' needs a pad_index, "
            "the others have none: change one of the two"
        )
    if pad_index is not None and not 0 <= pad_index < input.shape[-1]:
        raise ValueError(f"pad_index is {pad_index}; it must lie in 0..{input.shape[-1] - 1}: name a class")


def _check_targets(target: Tensor, ignore_index: int, V: int) -> None:
    """Raise for a target that is no class; only where looking at values costs nothing."""
    outside = ((target < 0) | (target >= V)) & (target != ignore_index)
    if outside.any():
        where = outside.nonzero()[0].tolist()
        value = int(target[tuple(where)])
        raise ValueError(
            f"target{where} is {value}; it must be a class, 0..{V - 1}, or ignore_index={ignore_index}: "
            "encode the labels for these logits"
        )


def _smoothed(eps: float, smoothing: str, V: int) -> tuple[float, float]:
    """Return q at the target and at the classes that share eps."""
    sharing = {"uniform": V, "fairseq": V - 1, "exclude_pad": V - 2}[smoothing]
    if sharing <= 0:
        return 1.0, 0.0
    on_other = eps / sharing
    return 1.0 - eps + (on_other if smoothing == "uniform" else 0.0), on_other


def _as_sequences(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits as [B, T, V] and the targets as [B, T]; views, but for more than three dimensions."""
    if input.ndim < 3:
        lead = (1,) * (3 - input.ndim)
        return input.view(lead + tuple(input.shape)), target.reshape(lead + tuple(target.shape))
    return input.flatten(0, -3), target.flatten(0, -2)


def _grad_scale(reduction: str, count: Tensor, inplace: bool, input: Tensor) -> Tensor | None:
    """Return the upstream gradient that a row's loss is going to have if nothing else scales the loss.

    None where there is no telling; the gradient is then made in the backward pass, but for ``inplace``.
    """
    if torch.compiler.is_compiling() or (reduction in ("none", "sequence") and not inplace):
        return None
    dtype = input.dtype if input.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=dtype, device=input.device)
    return one / count if reduction == "mean" else one


def _reduced(rows: Tensor, reduction: str, count: Tensor) -> Tensor:
    """Return the rows [...], their sum, their mean over those that count, or a sum a sequence."""
    if reduction == "none":
        return rows
    if reduction == "sequence":
        return rows.sum(-1)
    return rows.sum() / count if reduction == "mean" else rows.sum()
