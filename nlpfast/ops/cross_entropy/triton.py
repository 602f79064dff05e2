"""Cross entropy on GPUs: the Triton kernels of triton_forward.py and triton_backward.py.

With TRITON_INTERPRET=1 set when Python starts, the kernels run on the CPU, in float32.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nlpfast.ops.cross_entropy.triton_configs import MAX_CLASSES
from nlpfast.ops.cross_entropy.triton_launch import run_backward, run_forward

SERVES = "CUDA devices; float32, bfloat16 and float16, any number of classes, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED: bool = triton.knobs.runtime.interpret


def refusal(input: Tensor, target: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if input.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and the logits are {input.dtype}"
    if input.device.type != "cuda":
        if not INTERPRETED or input.device.type != "cpu":
            return f"it computes on CUDA devices, and the logits are on {input.device}"
        if input.dtype != torch.float32:
            return f"Triton's interpreter computes in float32, and the logits are {input.dtype}"
    if input.shape[-1] > MAX_CLASSES:
        return f"it takes up to {MAX_CLASSES} classes, and got {input.shape[-1]}"
    return None


def forward(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    grad_scale: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return loss, nll and correct [B, T], statistics [B, T, 2] and the gradient, as the reference does.

    A target that is neither a class nor ``ignore_index`` is seen by the kernel, which reads nothing for it:
    the row's loss, nll and gradient are NaN, and the GPU goes on, which after PyTorch's assertion it cannot.
    """
    options = (ignore_index, pad_index, on_target, on_other)
    return run_forward(input, target, *options, grad_scale, inplace)


def backward(
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
    """Return the gradient of the logits: the one that forward made, in rows that it was made for.

    Which rows those are is found out by the kernel: the CPU does not wait for an answer.
    """
    tensors = (grad_loss, input, target, statistics, gradient, grad_scale)
    return run_backward(*tensors, ignore_index, pad_index, on_target, on_other, inplace)
