"""The order in which examples are seen: seeded, cheap, and apart from torch's global generator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class BatchOrder(Sampler[list[int]]):
    """Give the batches of an epoch as lists of indices; the same seed and epoch give the same batches.

    Memory is one int64 tensor of `size` numbers with "shuffle" and a single batch with "replacement".

    Args:
        size: number of examples.
        batch_size: examples in a batch; the last batch of a shuffled epoch may be smaller.
        seed: of the order.
        sampling: "shuffle" (each example once an epoch) or "replacement" (independent draws, as minGPT does
            since 2023).

    Raises:
        ValueError: `size` or `batch_size` below 1, or an unknown `sampling`.
    """

    def __init__(self, size: int, batch_size: int, seed: int, sampling: str = "shuffle") -> None:
        """Keep the settings and start at epoch 0."""
        if size < 1:
            raise ValueError(f"size={size}: give a data set with at least 1 example")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        if sampling not in ("shuffle", "replacement"):
            raise ValueError(f"sampling={sampling!r}: give one of shuffle, replacement")
        self.size, self.batch_size, self.seed, self.sampling = size, batch_size, seed, sampling
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the current epoch."""
        # neighbouring seeds must not share epochs, hence a large odd step; manual_seed takes 64 bits
        generator = torch.Generator().manual_seed((self.seed + self.epoch * 0x9E3779B97F4A7C15) % 2**63)
        if self.sampling == "replacement":
            for _ in range(len(self)):
                yield torch.randint(self.size, (self.batch_size,), generator=generator).tolist()
            return
        for batch in torch.randperm(self.size, generator=generator).split(self.batch_size):
            yield batch.tolist()
