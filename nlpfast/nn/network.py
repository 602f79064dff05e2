"""The two-layer network of a Transformer: its activation with the first layer's bias, in one pass."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.nn.dropout import Dropout
from nlpfast.nn.hooks import is_plain
from nlpfast.nn.joined import joins
from nlpfast.ops.bias_gelu import bias_gelu, bias_relu

__all__ = ["Network", "linear_gelu", "linear_relu"]


def linear_gelu(x: Tensor, linear: nn.Linear, approximate: str = "none") -> Tensor:
    """Return ``F.gelu(linear(x), approximate=approximate)``; [..., C_in] -> [..., C_out].

    On the CPU the bias is added by `nlpfast.bias_gelu`. It is the two modules' own work on other devices,
    while a graph is compiled, in float64, and where the linear layer has hooks or is of a class of its own.

    Args:
        x: [..., C_in].
        linear: the first layer.
        approximate: as of `F.gelu`.
    """
    if _apart(x, linear):
        return F.gelu(linear(x), approximate=approximate)
    return bias_gelu(F.linear(x, linear.weight), linear.bias, approximate=approximate)


def linear_relu(x: Tensor, linear: nn.Linear) -> Tensor:
    """Return ``F.relu(linear(x))``; otherwise as `linear_gelu`.

    Args:
        x: [..., C_in].
        linear: the first layer.
    """
    if _apart(x, linear):
        return F.relu(linear(x))
    return bias_relu(F.linear(x, linear.weight), linear.bias)


def _apart(x: Tensor, linear: nn.Linear) -> bool:
    """Return whether the linear layer and the activation are to do their own work."""
    return not joins(x) or x.dtype == torch.float64 or not is_plain(linear, nn.Linear)


class Network(nn.Sequential):
    """Linear, GELU, linear, dropout, four times as wide in the middle; parameters have minGPT's names."""

    def __init__(self, channels: int, dropout: float) -> None:
        """Build the layers.

        Args:
            channels: C.
            dropout: probability that an element of the result is dropped.
        """
        super().__init__(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Dropout(dropout),
        )

    @property
    def dropout(self) -> nn.Dropout:
        """The last module."""
        return cast(nn.Dropout, self[3])

    def forward(self, input: Tensor, *, drop_output: bool = True) -> Tensor:
        """Return the network's output; [..., C] -> [..., C].

        Args:
            input: [..., C].
            drop_output: False leaves the dropout to the caller.
        """
        fc1, gelu, fc2, _ = self
        # what someone has put in its place, or looks at, does its own work
        fused = is_plain(gelu, nn.GELU)
        middle = (
            linear_gelu(input, cast(nn.Linear, fc1), cast(nn.GELU, gelu).approximate)
            if fused
            else gelu(fc1(input))
        )
        out: Tensor = fc2(middle)
        return self.dropout(out) if drop_output else out
