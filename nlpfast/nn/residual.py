"""What stands between two parts of a Transformer: dropout, the residual sum, and a layer norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nlpfast.ops.add_layer_norm import add_layer_norm
from nlpfast.ops.seeds import VALUES

__all__ = ["add_norm"]


def add_norm(
    part: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout, *, for_linear: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``norm(residual + dropout(part))`` and the sum; [..., C] both.

    It is `nlpfast.add_layer_norm` on the CPU, and the two steps on other devices, while a graph is compiled
    and for a dropout that 16 bits make 1.

    Args:
        part: [..., C].
        residual: [..., C].
        norm: over the channels, with weight.
        dropout: of `part`.
        for_linear: under autocast, give the norm in the dtype that linear layers read, instead of the
            residual's.
    """
    p = dropout.p if dropout.training else 0.0
    if residual.device.type != "cpu" or torch.compiler.is_compiling() or round(p * VALUES) == VALUES:
        total = residual + dropout(part)
        return norm(total), total
    out_dtype = None
    if for_linear and torch.is_autocast_enabled("cpu") and residual.dtype == torch.float32:
        out_dtype = torch.get_autocast_dtype("cpu")
    return add_layer_norm(part, residual, norm.weight, norm.bias, p, norm.eps, out_dtype=out_dtype)
