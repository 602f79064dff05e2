"""Dropout with cheaper random numbers: on a CPU they take longer than the matrix product they come after.

PyTorch draws a number for each element, one after the other. Here 64 random bits are for four elements: one
is dropped if its 16 bits, as a number, are below ``round(65536 p)``. The probability is that number over
65536, p to within 8e-6, and what stays is divided by exactly what is left of 1. Of PyTorch's generator each
call takes one number, the seed of its bits.

Source of the bits: Doty-Humphrey's SFC64 (PractRand), as NumPy has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Dropout", "dropout"]

# values of 16 bits
VALUES = 1 << 16


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Set elements to 0, each with probability p, and divide the others by 1 - p.

    Equivalent PyTorch: ``torch.nn.functional.dropout(x, p, training)``, with other random numbers. It is that
    on other devices than the CPU, while a graph is compiled, and for p that 16 bits make 0 or 1.

    Args:
        x: [...], floating point.
        p: probability, 0..1.
        training: False returns x.

    Raises:
        ValueError: p is outside 0..1.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} must be a probability in [0, 1]; 0 turns dropout off")
    below = round(p * VALUES)
    if not training or x.device.type != "cpu" or not 0 < below < VALUES or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    out: Tensor = _Dropout.apply(x, below)
    return out


class Dropout(nn.Dropout):
    """`dropout` as a module, with torch's constructor."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, in training with elements set to 0.

        Args:
            input: [...], floating point.
        """
        return dropout(input, self.p, self.training)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, below: int) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        bits = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.uint16)
        stays = torch.from_numpy(bits[: x.numel()] >= below).view(torch.uint8).to(x.dtype).view(x.shape)
        ctx.save_for_backward(stays)
        ctx.factor = VALUES / (VALUES - below)
        return _scaled(x, stays, ctx.factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (stays,) = ctx.saved_tensors
        return _scaled(grads[0], stays, ctx.factor), None


def _scaled(x: Tensor, stays: Tensor, factor: float) -> Tensor:
    """Return the product of the three, in one pass."""
    return torch.addcmul(x.new_zeros(()), x, stays, value=factor)
