"""The random bits of an op's dropout: Philox's key and offset, and how many values drop an element."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["VALUES", "drop_threshold", "seed_pair"]

# of the 16 random bits of an element
VALUES = 1 << 16


def drop_threshold(p: float, name: str) -> int:
    """Return below which of its `VALUES` an element is dropped.

    Args:
        p: probability.
        name: of p, for the message.

    Raises:
        ValueError: p is not at least 0 and, in 16 bits, below 1.
    """
    if not 0.0 <= p < 1.0 or (threshold := round(p * VALUES)) == VALUES:
        raise ValueError(f"{name} is {p}; it must be at least 0 and below 1: pass a probability")
    return threshold


def seed_pair(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return the int64 tensor [seed, offset].

    Args:
        seed: None draws both from the device's generator; an int is used with offset 0; an int64 tensor holds
            [seed, offset] or a seed alone.
        device: of the inputs.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: a tensor has another shape or device; an int does not fit in 64 bits.
    """
    if seed is None:
        # From the device's own generator, which torch.manual_seed, checkpointing and CUDA graphs govern.
        return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed has the dtype {seed.dtype}; it must be torch.int64: call .long() on it")
        if seed.shape not in ((), (2,)):
            shape = list(seed.shape)
            raise ValueError(f"seed has the shape {shape}; it must be [] or [2], seed and offset: reshape it")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}; it must be on the inputs' {device}: move it there")
        return seed if seed.ndim == 1 else torch.stack((seed, torch.zeros_like(seed)))
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must fit in 64 bits with sign: take it modulo 2**63")
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    pair = torch.zeros(2, dtype=torch.int64, device=device)
    pair[:1] = seed
    return pair
