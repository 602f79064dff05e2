"""Residual sum, dropout and layer norm on CPUs: the compiled kernels of csrc/add_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

SERVES = "float32, bfloat16 and float16, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(part: Tensor, residual: Tensor, out_dtype: torch.dtype) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if residual.device.type != "cpu":
        return f"it computes on the CPU, and residual is on {residual.device}"
    for name, dtype in (("part", part.dtype), ("residual", residual.dtype), ("out_dtype", out_dtype)):
        if dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, and {name} is {dtype}"
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
    return torch.ops.nlpfast.add_layer_norm_forward(
        *(part.contiguous(), residual.contiguous(), _floats(weight), None if bias is None else _floats(bias)),
        *(None if seed is None else seed.contiguous(), threshold, eps, out_dtype),
    )


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
    d_part, d_residual, d_weight, d_bias = torch.ops.nlpfast.add_layer_norm_backward(
        *(grad_out.contiguous(), None if grad_sum is None else grad_sum.contiguous(), total, statistics),
        *(_floats(weight), None if seed is None else seed.contiguous(), threshold, part_dtype),
    )
    # without dropout and with one dtype the first two are the same
    apart = threshold > 0 or part_dtype != total.dtype
    return d_part if apart else d_residual, d_residual, d_weight, d_bias


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::add_layer_norm_forward")
    def _(part, residual, weight, bias, seed, threshold, eps, out_dtype):  # type: ignore[no-untyped-def]
        statistics = residual.new_empty((residual.shape[0], 2), dtype=torch.float32)
        return (
            residual.new_empty(residual.shape),
            residual.new_empty(residual.shape, dtype=out_dtype),
            statistics,
        )

    @torch.library.register_fake("nlpfast::add_layer_norm_backward")
    def _(grad_out, grad_sum, total, statistics, weight, seed, threshold, part_dtype):  # type: ignore[no-untyped-def]
        apart = threshold > 0 or part_dtype != total.dtype
        d_part = total.new_empty((total.shape[0] if apart else 0, total.shape[1]), dtype=part_dtype)
        channels = total.new_empty(total.shape[1:], dtype=torch.float32)
        return d_part, total.new_empty(total.shape), channels, torch.empty_like(channels)


_register_fakes()
