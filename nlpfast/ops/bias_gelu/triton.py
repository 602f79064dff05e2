"""Bias, GELU and dropout on GPUs: launches the kernels of triton_kernels.py.

With TRITON_INTERPRET=1 set when Python starts, the kernels run on the CPU, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nlpfast.ops.bias_gelu.triton_kernels import _bwd_kernel, _fwd_kernel
from nlpfast.ops.launch import on_device_of
from nlpfast.ops.seeds import VALUES

SERVES = "CUDA devices; float32, bfloat16 and float16, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED: bool = triton.knobs.runtime.interpret
# Rows of a group, as in the kernels, and columns of a program.
GROUP, COLUMNS = 8, 256
# Rows of programs of the backward pass at most, each of which leaves a sum.
PROGRAMS = 256


def refusal(x: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and x is {x.dtype}"
    if x.device.type != "cuda":
        if not INTERPRETED or x.device.type != "cpu":
            return f"it computes on CUDA devices, and x is on {x.device}"
        if x.dtype != torch.float32:
            return f"Triton's interpreter computes in float32, and x is {x.dtype}"
    return None


def forward(x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int) -> Tensor:
    """Return GELU of x + bias with elements dropped, as the reference does."""
    run = torch.ops.nlpfast.triton_bias_gelu_forward if torch.compiler.is_compiling() else _forward
    return run(x, bias, activation, seed, threshold)


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias, as the reference does."""
    run = torch.ops.nlpfast.triton_bias_gelu_backward if torch.compiler.is_compiling() else _backward
    dx, sums = run(grad, x, bias, activation, seed, threshold)
    return dx, sums.sum(0)


def _options(activation: int, threshold: int) -> dict[str, Any]:
    constants = {"COLUMNS": COLUMNS, "ACTIVATION": activation, "DROPOUT": threshold > 0}
    return {**constants, "num_warps": 4, "enable_fp_fusion": True}


def _forward(x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int) -> Tensor:
    (N, C), factor = x.shape, VALUES / (VALUES - threshold)
    out = x.new_empty((N, C))
    inputs = [None if y is None else y.contiguous() for y in (x, bias, seed)]
    if N > 0:
        with on_device_of(x):
            grid = (triton.cdiv(N, GROUP), triton.cdiv(C, COLUMNS))
            _fwd_kernel[grid](*inputs, out, N, C, threshold, factor, **_options(activation, threshold))
    return out


def _backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and sums [programs, C] of that of bias."""
    (N, C), factor = x.shape, VALUES / (VALUES - threshold)
    dx, groups = x.new_empty((N, C)), triton.cdiv(N, GROUP)
    programs = min(groups, PROGRAMS)
    sums = x.new_empty((programs, C), dtype=torch.float32)
    inputs = [None if y is None else y.contiguous() for y in (grad, x, bias, seed)]
    if N > 0:
        with on_device_of(x):
            _bwd_kernel[(programs, triton.cdiv(C, COLUMNS))](
                *(*inputs, dx, sums, N, C, groups, programs, threshold, factor),
                **_options(activation, threshold),
            )
    return dx, sums


def _register() -> None:
    """Make operations that torch.compile does not look into."""
    rest = "Tensor x, Tensor? bias, int activation, Tensor? seed, int threshold)"
    forward = torch.library.custom_op(
        *("nlpfast::triton_bias_gelu_forward", _forward), mutates_args=(), schema=f"({rest} -> Tensor"
    )
    backward = torch.library.custom_op(
        *("nlpfast::triton_bias_gelu_backward", _backward),
        mutates_args=(),
        schema=f"(Tensor grad, {rest} -> (Tensor, Tensor)",
    )

    @forward.register_fake
    def _(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape)

    @backward.register_fake
    def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        N, C = x.shape
        return x.new_empty((N, C)), x.new_empty((min(-(-N // GROUP), PROGRAMS), C), dtype=torch.float32)


_register()
