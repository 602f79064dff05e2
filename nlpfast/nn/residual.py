"""What stands between two parts of a Transformer: dropout, the residual sum, and a layer norm."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nlpfast.nn.hooks import is_plain
from nlpfast.nn.joined import joins
from nlpfast.ops.add_layer_norm import add_layer_norm
from nlpfast.ops.seeds import VALUES

__all__ = ["Stream", "add_norm"]


def add_norm(
    part: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout, *, for_linear: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``norm(residual + dropout(part))`` and the sum; [..., C] both.

    It is `nlpfast.add_layer_norm` on the CPU, and the two steps on other devices, while a graph is compiled,
    for a dropout that 16 bits make 1, and where the norm has hooks or is of another class.

    Args:
        part: [..., C].
        residual: [..., C].
        norm: over the channels, with weight where it is `nn.LayerNorm` itself.
        dropout: of `part`.
        for_linear: under autocast, give the norm in the dtype that linear layers read, instead of the
            residual's.
    """
    p = dropout.p if dropout.training else 0.0
    if not joins(residual) or round(p * VALUES) >= VALUES or not is_plain(norm, nn.LayerNorm):
        total = residual + dropout(part)
        return norm(total), total
    out_dtype = None
    device_type = residual.device.type
    if for_linear and torch.is_autocast_enabled(device_type) and residual.dtype == torch.float32:
        out_dtype = torch.get_autocast_dtype(device_type)
    return add_layer_norm(part, residual, norm.weight, norm.bias, p, norm.eps, out_dtype=out_dtype)


class Stream(NamedTuple):
    """What goes from part to part, [..., C], where each part adds to it and reads a norm of it (pre-norm).

    The sum is left to the norm of the next part, as both are one operation.


    Attributes:
        x: the input of the next part, or what it is to be added to.
        part: what the last part gave, which is not added yet; None if there is nothing to add.
        dropout: of that.
    """

    x: Tensor
    part: Tensor | None = None
    dropout: nn.Dropout | None = None

    def normed(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the norm of the sum, for linear layers, and the sum.

        Args:
            norm: `nn.LayerNorm` of the part that comes; any module if there is nothing to add.
        """
        if self.part is None or self.dropout is None:
            return norm(self.x), self.x
        return add_norm(self.part, self.x, cast(nn.LayerNorm, norm), self.dropout, for_linear=True)

    def total(self) -> Tensor:
        """Return the sum."""
        return self.x if self.part is None or self.dropout is None else self.x + self.dropout(self.part)
