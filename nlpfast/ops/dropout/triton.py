"""Dropout on GPUs: launches the kernel of triton_kernels.py.

With TRITON_INTERPRET=1 set when Python starts, the kernel runs on the CPU, in float32.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nlpfast.ops.dropout.reference import COLUMNS
from nlpfast.ops.dropout.triton_kernels import _kernel
from nlpfast.ops.launch import on_device_of
from nlpfast.ops.seeds import VALUES

SERVES = "CUDA devices; float32, bfloat16 and float16, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED: bool = triton.knobs.runtime.interpret
# of a program; a multiple of the eight that share a call of Philox
ROWS = 32


def refusal(x: Tensor) -> str | None:
    """Return why the kernel does not serve this call, in one line, or None."""
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and x is {x.dtype}"
    if x.device.type != "cuda":
        if not INTERPRETED or x.device.type != "cpu":
            return f"it computes on CUDA devices, and x is on {x.device}"
        if x.dtype != torch.float32:
            return f"Triton's interpreter computes in float32, and x is {x.dtype}"
    return None


def forward(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return x with elements set to 0, and the others divided by what is left of 1."""
    if torch.compiler.is_compiling():
        return torch.ops.nlpfast.triton_dropout(x, seed, threshold)
    return _run(x, seed, threshold)


def backward(grad: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return the gradient of x."""
    return forward(grad, seed, threshold)


def _run(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    x = x.contiguous()
    out, n = torch.empty_like(x), x.numel()
    factor = VALUES / (VALUES - threshold)
    if n > 0:
        with on_device_of(x):
            grid = (triton.cdiv(n, ROWS * COLUMNS),)
            constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "enable_fp_fusion": True}
            _kernel[grid](x, seed.contiguous(), out, n, threshold, factor, **constants)
    return out


def _register() -> None:
    """Make an operation that torch.compile does not look into."""
    schema = "(Tensor x, Tensor seed, int threshold) -> Tensor"
    run = torch.library.custom_op("nlpfast::triton_dropout", _run, mutates_args=(), schema=schema)

    @run.register_fake
    def _(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
        return x.new_empty(x.shape)


_register()
