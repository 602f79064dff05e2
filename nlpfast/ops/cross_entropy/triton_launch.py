"""Launches the Triton kernels of cross entropy: which one, and how compiled.

What follows from shapes, strides and options is worked out once and looked up afterwards; so is the compiled
kernel. Under torch.compile the launches are operations that the compiler does not look into.

Nothing here waits for the GPU, and what a launch does depends on no value there: a CUDA graph can hold it.

Legend: B sequences, T rows of each, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlpfast.ops.cross_entropy import triton_configs
from nlpfast.ops.cross_entropy.triton_backward import _bwd_kernel
from nlpfast.ops.cross_entropy.triton_forward import _fwd_blocks_kernel, _fwd_whole_kernel
from nlpfast.ops.launch import MAX_REMEMBERED, Launch, on_device_of
from nlpfast.ops.vectors import on_vectors

_remembered: dict[tuple[Any, ...], Launch] = {}

Losses = tuple[Tensor, Tensor, Tensor, Tensor]


def run_forward(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    grad_scale: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Run a forward kernel; arguments and results are those of the reference."""
    options = (ignore_index, pad_index, on_target, on_other)
    if torch.compiler.is_compiling() and grad_scale is None:
        return (*torch.ops.nlpfast.triton_cross_entropy_forward(input, target, *options), None)
    rows, gradient = _as_a_copy_lies(input), None
    if grad_scale is not None:
        gradient = rows if inplace else rows.new_empty(rows.shape)
    results = _forward(rows, target, *options, grad_scale, gradient)
    # logits that had to be copied get their gradient by a copy
    return (*results, input.copy_(rows) if gradient is rows and rows is not input else gradient)


def run_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    statistics: Tensor,
    gradient: Tensor | None,
    grad_scale: Tensor | None,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    inplace: bool,
) -> Tensor:
    """Run the backward kernel; arguments and result are those of the reference."""
    options = (ignore_index, pad_index, on_target, on_other)
    if torch.compiler.is_compiling() and gradient is None:
        tensors = (grad_loss, input, target, statistics)
        made = torch.ops.nlpfast.triton_cross_entropy_backward(*tensors, *options)
        return input.copy_(made) if inplace else made
    rescale = gradient is not None and grad_scale is not None and inplace
    if gradient is None:
        gradient = input if inplace else input.new_empty(input.shape)
        # there is nothing yet that it could be equal to
        grad_scale = None
    _backward(grad_loss, input, target, statistics, *options, grad_scale, gradient, rescale)
    return gradient


def _forward(
    rows: Tensor,
    target: Tensor,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
) -> Losses:
    """Launch a forward kernel; `gradient` is written if it is there."""
    results = _new_losses(rows)
    # without a gradient its strides are not looked at
    strides = (*rows.stride()[:2], *(rows if gradient is None else gradient).stride()[:2])
    options = (ignore_index, pad_index, on_target, on_other)
    what = (rows.shape, strides, rows.dtype, rows.device, gradient is None, options)
    launch = _remembered.get(what)
    if launch is None:
        B, T, V = rows.shape
        line = triton_configs.line_of(rows.element_size(), V)
        kernel = _fwd_whole_kernel if line[0] == "whole" else _fwd_blocks_kernel
        vec = _vec(V, rows.dtype)
        # 1 - on_target is taken before it is rounded
        numbers = (*strides, T, V, *options[:2], on_target, 1.0 - on_target, on_other)
        launch = _remember(what, _launch(kernel, line, B * T, numbers, VEC=vec))
    with on_device_of(rows):
        launch(rows, target.contiguous(), grad_scale, *results, gradient)
    return results


def _backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    statistics: Tensor,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    grad_scale: Tensor | None,
    gradient: Tensor,
    rescale: bool,
) -> None:
    """Launch the backward kernel, which writes `gradient`."""
    strides = (*grad_loss.stride(), *input.stride(), *gradient.stride())
    options = (ignore_index, pad_index, on_target, on_other)
    vec = _vec(input.shape[-1], input.dtype)
    vec = vec if on_vectors(input, vec) and on_vectors(gradient, vec) else 1
    what = (input.shape, strides, input.dtype, input.device, grad_scale is None, rescale, vec, options)
    launch = _remembered.get(what)
    if launch is None:
        B, T, V = input.shape
        line = triton_configs.line_of(input.element_size(), V, backward=True)
        unit = V == 1 or input.stride(-1) == gradient.stride(-1) == 1
        numbers = (*strides, T, V, *options[:2], 1.0 - on_target, on_other)
        constants = {"VEC": vec if unit else 1, "UNIT": unit, "RESCALE": rescale}
        launch = _remember(what, _launch(_bwd_kernel, line, B * T, numbers, **constants))
    with on_device_of(input):
        launch(grad_loss, input, target.contiguous(), statistics.contiguous(), grad_scale, gradient)


def _launch(
    kernel: Any, line: triton_configs.Line, programs: int, numbers: tuple[Any, ...], **constants: Any
) -> Launch:
    """Return a kernel as CONFIGS has it."""
    config = triton_configs.CONFIGS[line]._asdict()
    if "LANES" not in kernel.arg_names:
        del config["LANES"]
    vec = constants["VEC"]
    if line[0] == "whole" and vec == 1:
        del config["maxnreg"]
    return Launch(kernel, (*line, vec > 1), programs, numbers, **constants, **config, enable_fp_fusion=True)


def _remember(what: tuple[Any, ...], launch: Launch) -> Launch:
    if len(_remembered) >= MAX_REMEMBERED:
        _remembered.clear()
    _remembered[what] = launch
    return launch


def _vec(V: int, dtype: torch.dtype) -> int:
    """Return how many numbers are read at once from rows that lie as in a contiguous tensor."""
    vec = 16 // dtype.itemsize
    return vec if V % vec == 0 else 1


def _as_a_copy_lies(input: Tensor) -> Tensor:
    """Return the logits, or a copy where their rows begin at worse places than those of a copy would.

    The kernels add up a row in an order that depends on how they read it. As it is, that is the number of
    classes alone.
    """
    vec = _vec(input.shape[-1], input.dtype)
    return input if on_vectors(input, vec) else input.clone(memory_format=torch.contiguous_format)


def _new_losses(rows: Tensor) -> Losses:
    """Return memory for loss, nll, correct and statistics."""
    B, T, _ = rows.shape
    loss, nll = (rows.new_empty((B, T), dtype=torch.float32) for _ in range(2))
    correct = rows.new_empty((B, T), dtype=torch.bool)
    return loss, nll, correct, rows.new_empty((B, T, 2), dtype=torch.float32)


def _register() -> None:
    """Make operations of the launches, and tell torch.compile the shapes of what they return."""
    options = "int ignore_index, int pad_index, float on_target, float on_other"

    def losses_alone(input: Tensor, target: Tensor, *rest: Any) -> Losses:
        ignore_index, pad_index, on_target, on_other = rest
        rows = _as_a_copy_lies(input)
        return _forward(rows, target, ignore_index, pad_index, on_target, on_other, None, None)

    def gradient_alone(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
        target, statistics, ignore_index, pad_index, on_target, on_other = rest
        gradient = input.new_empty(input.shape)
        options = (ignore_index, pad_index, on_target, on_other)
        _backward(grad_loss, input, target, statistics, *options, None, gradient, False)
        return gradient

    forward = torch.library.custom_op(
        *("nlpfast::triton_cross_entropy_forward", losses_alone),
        mutates_args=(),
        schema=f"(Tensor input, Tensor target, {options}) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        *("nlpfast::triton_cross_entropy_backward", gradient_alone),
        mutates_args=(),
        schema=f"(Tensor grad_loss, Tensor input, Tensor target, Tensor statistics, {options}) -> Tensor",
    )

    @forward.register_fake
    def _(input: Tensor, *rest: Any) -> Losses:
        return _new_losses(input)

    @backward.register_fake
    def _(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
        return input.new_empty(input.shape)


_register()
