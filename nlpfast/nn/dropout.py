"""Dropout with cheaper random numbers: on a CPU they take longer than the matrix product they come after.

PyTorch draws a number for each element, one after the other, and keeps which were dropped.
`nlpfast.ops.dropout` takes 16 random bits an element from a counter, all threads at once, and keeps a seed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.nn.joined import joins
from nlpfast.ops import dropout as op
from nlpfast.ops.seeds import VALUES

__all__ = ["Dropout", "dropout"]


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Set elements to 0, each with probability p, and divide the others by 1 - p.

    Equivalent PyTorch: ``torch.nn.functional.dropout(x, p, training)``, with other random numbers. It is that
    on other devices than the CPU, while a graph is compiled, for other dtypes than floating ones, and for p
    that 16 bits make 0 or 1. A call takes two numbers of PyTorch's generator.

    Args:
        x: [...], floating point.
        p: probability, 0..1.
        training: False returns x.

    Raises:
        ValueError: p is outside 0..1.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} must be a probability in [0, 1]; 0 turns dropout off")
    drops = training and 0 < round(p * VALUES) < VALUES
    if not drops or not joins(x) or not x.is_floating_point():
        return F.dropout(x, p, training)
    return op.dropout(x, p)


class Dropout(nn.Dropout):
    """`dropout` as a module, with torch's constructor."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, in training with elements set to 0.

        Args:
            input: [...], floating point.
        """
        return dropout(input, self.p, self.training)
