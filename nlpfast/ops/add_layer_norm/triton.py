"""Residual sum, dropout and layer norm on GPUs: launches the kernels of triton_kernels.py.

With TRITON_INTERPRET=1 set when Python starts, the kernels run on the CPU, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nlpfast.ops.add_layer_norm.triton_kernels import _bwd_kernel, _fwd_kernel
from nlpfast.ops.launch import on_device_of
from nlpfast.ops.seeds import VALUES

SERVES = "CUDA devices; float32, bfloat16 and float16, C <= 2048, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED: bool = triton.knobs.runtime.interpret
# Eight rows of more do not stay in the registers of 16 warps; of so many a few numbers do not either.
MAX_CHANNELS = 2048
# Rows of a group, as in the kernels.
GROUP = 8
# Programs of the backward pass at most, each of which leaves two sums.
PROGRAMS = 512


def refusal(part: Tensor, residual: Tensor, out_dtype: torch.dtype) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    dtypes = {"part": part.dtype, "residual": residual.dtype, "out_dtype": out_dtype}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, and {name} is {dtype}"
    if residual.device.type != "cuda":
        if not INTERPRETED or residual.device.type != "cpu":
            return f"it computes on CUDA devices, and residual is on {residual.device}"
        for name, dtype in dtypes.items():
            if dtype != torch.float32:
                return f"Triton's interpreter computes in float32, and {name} is {dtype}"
    if residual.shape[-1] > MAX_CHANNELS:
        return f"it takes up to {MAX_CHANNELS} channels, and got {residual.shape[-1]}"
    return None


def forward(
    part: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum [N, C], its norm [N, C] and statistics [N, 2], as the reference does."""
    run = torch.ops.nlpfast.triton_add_layer_norm_forward if torch.compiler.is_compiling() else _forward
    return run(part, residual, weight, bias, seed, threshold, eps, out_dtype)


def backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    part_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of part, residual, weight and bias, as the reference does."""
    run = torch.ops.nlpfast.triton_add_layer_norm_backward if torch.compiler.is_compiling() else _backward
    d_part, d_residual, sums = run(grad_out, grad_sum, total, statistics, weight, seed, threshold, part_dtype)
    apart = threshold > 0 or part_dtype != total.dtype
    d_weight, d_bias = sums.sum(0)
    return d_part if apart else d_residual, d_residual, d_weight, d_bias


def _options(C: int, threshold: int) -> dict[str, Any]:
    block = max(16, triton.next_power_of_2(C))
    warps = 4 if block <= 256 else 8 if block <= 1024 else 16
    return {"C": C, "BLOCK_C": block, "DROPOUT": threshold > 0, "num_warps": warps, "enable_fp_fusion": True}


def _forward(
    part: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    (N, C), factor = residual.shape, VALUES / (VALUES - threshold)
    total, out = residual.new_empty((N, C)), residual.new_empty((N, C), dtype=out_dtype)
    statistics = residual.new_empty((N, 2), dtype=torch.float32)
    inputs = [None if x is None else x.contiguous() for x in (part, residual, weight, bias, seed)]
    if N > 0:
        with on_device_of(residual):
            _fwd_kernel[(triton.cdiv(N, GROUP),)](
                *(*inputs, total, out, statistics, N, threshold, factor, eps), **_options(C, threshold)
            )
    return total, out, statistics


def _backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    threshold: int,
    part_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of part and residual, and sums [programs, 2, C] of those of weight and bias."""
    (N, C), factor = total.shape, VALUES / (VALUES - threshold)
    apart = threshold > 0 or part_dtype != total.dtype
    d_part = total.new_empty((N if apart else 0, C), dtype=part_dtype)
    d_residual, groups = total.new_empty((N, C)), triton.cdiv(N, GROUP)
    programs = min(groups, PROGRAMS)
    sums = total.new_empty((programs, 2, C), dtype=torch.float32)
    inputs = [None if x is None else x.contiguous() for x in (grad_out, grad_sum, total, statistics, weight)]
    if N > 0:
        with on_device_of(total):
            _bwd_kernel[(programs,)](
                *(*inputs, None if seed is None else seed.contiguous()),
                *(d_part if apart else None, d_residual, sums),
                *(N, groups, programs, threshold, factor),
                **_options(C, threshold),
            )
    return d_part, d_residual, sums


def _register() -> None:
    """Make operations that torch.compile does not look into."""
    forward = torch.library.custom_op(
        *("nlpfast::triton_add_layer_norm_forward", _forward),
        mutates_args=(),
        schema="(Tensor part, Tensor residual, Tensor weight, Tensor? bias, Tensor? seed, int threshold, "
        "float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        *("nlpfast::triton_add_layer_norm_backward", _backward),
        mutates_args=(),
        schema="(Tensor grad_out, Tensor? grad_sum, Tensor total, Tensor statistics, Tensor weight, "
        "Tensor? seed, int threshold, ScalarType part_dtype) -> (Tensor, Tensor, Tensor)",
    )

    @forward.register_fake
    def _(part: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        statistics = residual.new_empty((residual.shape[0], 2), dtype=torch.float32)
        out = residual.new_empty(residual.shape, dtype=rest[-1])
        return residual.new_empty(residual.shape), out, statistics

    @backward.register_fake
    def _(
        grad_out: Tensor, grad_sum: Tensor | None, total: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        (N, C), part_dtype = total.shape, rest[-1]
        d_part = total.new_empty((N if rest[-2] > 0 or part_dtype != total.dtype else 0, C), dtype=part_dtype)
        sums = total.new_empty((min(-(-N // GROUP), PROGRAMS), 2, C), dtype=torch.float32)
        return d_part, total.new_empty((N, C)), sums


_register()
