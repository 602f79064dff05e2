"""Between [B, T, C], where projections work, and [B, H, T, D], where attention works.

Shapes: B batch, T sequence length, C = H D channels, H heads, D head size.
"""

from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [B, H, T, D], a view of x [B, T, H D]."""
    return x.view(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    """Return [B, T, H D] of y [B, H, T, D], a copy unless the heads of a position lie side by side."""
    B, H, T, D = y.shape
    return y.transpose(1, 2).reshape(B, T, H * D)


def dropout_of(layer: nn.Dropout) -> float:
    """Return the probability with which the layer drops now: 0 in evaluation."""
    return layer.p if layer.training else 0.0


def check_heads(channels_name: str, channels: int, heads_name: str, heads: int) -> None:
    """Raise ValueError unless the channels are a positive multiple of the heads."""
    if heads < 1 or channels < 1 or channels % heads != 0:
        raise ValueError(
            f"{channels_name}={channels} must be a positive multiple of {heads_name}={heads}; "
            "change one of the two"
        )


def check_sequence(name: str, x: Tensor, channels: int, channels_name: str) -> None:
    """Raise ValueError unless x is [B, T, channels]."""
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, expected [B, T, {channels}]; the last size is {channels_name}"
        )
