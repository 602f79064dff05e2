"""The order in which examples are seen: seeded, cheap, apart from torch's generator, from any place on.

Several processes share one order: a batch of theirs is that of one process with as many examples, cut in
parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

SAMPLINGS = ("shuffle", "replacement", "sequential")
# Up to so many examples the permutation of an epoch is drawn whole.
LARGEST_DRAWN = 2**24
ROUNDS = 8


class BatchOrder(Sampler[list[int]]):
    """Give the batches of an epoch as lists of indices; the same seed and epoch give the same batches.

    Memory is one int64 tensor of `size` numbers with "shuffle" up to 2^24 examples, and a single batch
    elsewhere.

    Attributes:
        epoch: which one the next iteration gives.
        start: the batch that it begins with; 0 again afterwards.
        given: of the batches that an iteration gave and nobody took from here: the indices, and whether they
            are a part of their batch. A process whose part is empty gets an example in its stead that must
            not count.

    Args:
        size: number of examples.
        batch_size: examples in a process's part of a batch; the last batch of an epoch may be smaller.
        seed: of the order.
        sampling: "shuffle" (each example once an epoch), "replacement" (independent draws, as in minGPT
            since 2023) or "sequential".
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: `size` or `batch_size` below 1, or an unknown `sampling`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        sampling: str = "shuffle",
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Keep the settings and start at epoch 0."""
        if size < 1:
            raise ValueError(f"size={size}: give a data set with at least 1 example")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling={sampling!r}: give one of {', '.join(SAMPLINGS)}")
        self.size, self.batch_size, self.seed, self.sampling = size, batch_size, seed, sampling
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0
        self.given: deque[tuple[list[int], bool]] = deque()

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's part of each batch of the current epoch, from `start` on."""
        start, self.start = self.start, 0
        self.given.clear()
        for indices in self._batches(start):
            mine = indices[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            self.given.append((mine or indices[:1], bool(mine)))
            yield mine or indices[:1]

    def _batches(self, start: int) -> Iterator[list[int]]:
        """Yield the batches of all processes together."""
        together = self.batch_size * self.world_size
        # neighbouring seeds must not share epochs, hence a large odd step; manual_seed takes 64 bits
        seed = (self.seed + self.epoch * 0x9E3779B97F4A7C15) % 2**63
        generator = torch.Generator().manual_seed(seed)
        if self.sampling == "replacement":
            for number in range(len(self)):
                indices = torch.randint(self.size, (together,), generator=generator)
                if number >= start:
                    yield indices.tolist()
            return
        drawn = None
        if self.sampling == "shuffle" and self.size <= LARGEST_DRAWN:
            drawn = torch.randperm(self.size, generator=generator)
        for first in range(start * together, self.size, together):
            last = min(first + together, self.size)
            if drawn is not None:
                yield drawn[first:last].tolist()
            elif self.sampling == "shuffle":
                yield permuted(np.arange(first, last), self.size, seed).tolist()
            else:
                yield list(range(first, last))


def permuted(positions: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Return what a pseudo-random permutation of 0..size-1 has at some positions, without the rest of it.

    A Feistel network permutes the next power of four; results from `size` on go through it again (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        positions: int64, of any shape, each below `size`.
        size: at most 2^62.
        seed: of the permutation.

    Returns:
        int64, of the shape of `positions`.
    """
    half = ((size - 1).bit_length() + 1) // 2
    low = np.uint64((1 << half) - 1)
    keys = np.random.Generator(np.random.Philox(key=seed)).integers(2**64, size=ROUNDS, dtype=np.uint64)
    numbers = positions.astype(np.uint64)
    outside = np.ones(numbers.shape, dtype=np.bool_)
    while outside.any():
        left, right = numbers[outside] >> np.uint64(half), numbers[outside] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & low)
        numbers[outside] = left << np.uint64(half) | right
        outside = numbers >= size
    return numbers.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers whose every bit depends on all of x's (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ x >> np.uint64(31)
    return mixed
