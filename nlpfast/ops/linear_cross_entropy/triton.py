"""Cross entropy of a projection's logits on GPUs: cuBLAS's products and Triton's kernels of cross entropy.

With TRITON_INTERPRET=1 set when Python starts, this runs on the CPU, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nlpfast.ops import projected_on_gpu
from nlpfast.ops.cross_entropy import triton as cross_entropy
from nlpfast.ops.cross_entropy.triton_configs import MAX_CLASSES

SERVES = "CUDA devices; float32, bfloat16 and float16, any sizes, any strides"


def refusal(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> str | None:
    """Return why this does not serve the call, in one line, or None."""
    if linear_weight.shape[0] > MAX_CLASSES:
        return f"it takes up to {MAX_CLASSES} classes, and got {linear_weight.shape[0]}"
    # as of logits in the dtype of the input
    return cross_entropy.refusal(input[..., :1], target)


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Return loss, nll, correct and statistics, as the reference does, and the gradients that are wanted.

    A target that is no class has the loss NaN, as in cross_entropy, and so have the gradients.
    """
    compiled = torch.ops.nlpfast.triton_linear_cross_entropy_forward
    run = compiled if torch.compiler.is_compiling() else _forward
    options = (ignore_index, pad_index, on_target, on_other)
    return run(input, linear_weight, linear_bias, target, *options, list(wanted))


def backward(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients that are wanted, from logits that are computed again."""
    compiled = torch.ops.nlpfast.triton_linear_cross_entropy_backward
    run = compiled if torch.compiler.is_compiling() else _backward
    tensors = (grad_loss, input, linear_weight, linear_bias, target, statistics)
    return run(*tensors, ignore_index, pad_index, on_target, on_other, list(wanted))


_forward, _backward = projected_on_gpu.passes("triton", cross_entropy)
