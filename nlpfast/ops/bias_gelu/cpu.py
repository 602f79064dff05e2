"""Bias, GELU and dropout on CPUs: the compiled kernels of csrc/bias_gelu."""

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


def forward(x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int) -> Tensor:
    """Return GELU of x + bias with elements dropped, as the reference does."""
    return torch.ops.nlpfast.bias_gelu_forward(
        x.contiguous(), _floats(bias), activation, _flat(seed), threshold
    )


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: int, seed: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias, as the reference does."""
    return torch.ops.nlpfast.bias_gelu_backward(
        grad.contiguous(), x.contiguous(), _floats(bias), activation, _flat(seed), threshold
    )


def _floats(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _flat(seed: Tensor | None) -> Tensor | None:
    return None if seed is None else seed.contiguous()


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::bias_gelu_forward")
    def _(x, bias, activation, seed, threshold):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape)

    @torch.library.register_fake("nlpfast::bias_gelu_backward")
    def _(grad, x, bias, activation, seed, threshold):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape), x.new_empty(x.shape[1:], dtype=torch.float32)


_register_fakes()
