"""Residual sum, dropout and layer norm on CUDA devices: the compiled kernels of csrc/add_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

SERVES = "CUDA devices; float32, bfloat16 and float16, C <= 2048, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of csrc/add_layer_norm/add_layer_norm_cuda.cu: rows of a group, channels and threads of a block, blocks.
MAX_CHANNELS, GROUP, COLUMNS, THREADS, BLOCKS = 2048, 8, 8, 128, 1056
# The tests have kernels that run on the CPU.
DEVICE = "cuda"


def refusal(part: Tensor, residual: Tensor, out_dtype: torch.dtype) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if residual.device.type != DEVICE:
        return f"it computes on CUDA devices, and residual is on {residual.device}"
    dtypes = {"part": part.dtype, "residual": residual.dtype, "out_dtype": out_dtype}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, and {name} is {dtype}"
    kinds = tuple(dtypes.values())
    half = part.dtype if part.dtype != torch.float32 else torch.bfloat16
    mixed = ((half, torch.float32, half), (half, torch.float32, torch.float32))
    if len(set(kinds)) > 1 and kinds not in mixed:
        named = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        return f"it takes one dtype, or 16 bits of part with a residual in float32, and got {named}"
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
    return torch.ops.nlpfast.cuda_add_layer_norm_forward(
        *(_lying(part), _lying(residual), _floats(weight), None if bias is None else _floats(bias)),
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
    d_part, d_residual, sums = torch.ops.nlpfast.cuda_add_layer_norm_backward(
        *(_lying(grad_out), None if grad_sum is None else _lying(grad_sum), total, statistics),
        *(_floats(weight), None if seed is None else seed.contiguous(), threshold, part_dtype),
    )
    # without dropout and with one dtype the first two are the same
    apart = threshold > 0 or part_dtype != total.dtype
    d_weight, d_bias = sums.sum(0)
    return d_part if apart else d_residual, d_residual, d_weight, d_bias


def _lying(x: Tensor) -> Tensor:
    """Return the rows side by side, from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x if torch.compiler.is_compiling() or x.data_ptr() % 16 == 0 else x.clone()


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _blocks(N: int, C: int) -> int:
    """Return how many blocks the backward pass has, as the library says it."""
    groups, threads = -(-N // GROUP), -(-C // (COLUMNS * 32)) * 32
    return min(-(-groups // max(1, THREADS // threads)), BLOCKS)


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::cuda_add_layer_norm_forward")
    def _(part, residual, weight, bias, seed, threshold, eps, out_dtype):  # type: ignore[no-untyped-def]
        statistics = residual.new_empty((residual.shape[0], 2), dtype=torch.float32)
        out = residual.new_empty(residual.shape, dtype=out_dtype)
        return residual.new_empty(residual.shape), out, statistics

    @torch.library.register_fake("nlpfast::cuda_add_layer_norm_backward")
    def _(grad_out, grad_sum, total, statistics, weight, seed, threshold, part_dtype):  # type: ignore[no-untyped-def]
        (N, C), blocks = total.shape, _blocks(*total.shape)
        d_part = total.new_empty(
            (N if threshold > 0 or part_dtype != total.dtype else 0, C), dtype=part_dtype
        )
        return d_part, total.new_empty((N, C)), total.new_empty((blocks, 2, C), dtype=torch.float32)


_register_fakes()
