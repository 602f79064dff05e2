"""Dropout on CPUs: the compiled kernels of csrc/dropout."""

from __future__ import annotations

import torch
from torch import Tensor

SERVES = "float32, bfloat16 and float16, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(x: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if x.device.type != "cpu":
        return f"it computes on the CPU, and x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and x is {x.dtype}"
    return None


def forward(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return x with elements set to 0, and the others divided by what is left of 1."""
    return torch.ops.nlpfast.dropout_forward(x.contiguous(), seed.contiguous(), threshold)


def backward(grad: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Return the gradient of x."""
    return torch.ops.nlpfast.dropout_backward(grad.contiguous(), seed.contiguous(), threshold)


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""
    for name in ("forward", "backward"):

        @torch.library.register_fake(f"nlpfast::dropout_{name}")
        def _(x, seed, threshold):  # type: ignore[no-untyped-def]
            return x.new_empty(x.shape)


_register_fakes()
