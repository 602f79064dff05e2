"""Keys and values of one attention layer, kept while text is written: a step computes those of one token.

Shapes: B sequences, H heads, T rows of the longest prompt, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """The first `capacity` keys and values of every sequence; later ones are forgotten at once.

    The first call of `extend` brings the keys of all prompts, and every other call one key more for each
    sequence. A sequence that has `capacity` of them keeps what it has: the latents of a bottleneck do not
    change once they are all there, while those of a shorter sequence in the same batch still come.

    Attributes:
        capacity: keys that a sequence can have.
        lengths: keys that each sequence has, int64 [B].
        longest: those of the longest one, or more.
    """

    def __init__(self, capacity: int, lengths: Tensor) -> None:
        """Keep nothing yet.

        Args:
            capacity: keys that a sequence can have, >= 1.
            lengths: rows of each prompt that are not padding, int64 [B].
        """
        self.capacity = capacity
        self.lengths = lengths.clamp(max=capacity)
        self.longest = 0
        self._keys = self._values = lengths.new_empty(0)

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Take in the keys and values of the prompts, or one of each sequence.

        Args:
            keys: [B, H, T, D], or [B, H, 1, D] after the prompts.
            values: likewise.
        """
        if self.longest == 0:
            T = min(keys.shape[2], self.capacity)
            # one more place, which is never read, for keys of a sequence that is full
            B, H, _, D = keys.shape
            self._keys, self._values = keys.new_zeros(2, B, H, self.capacity + 1, D)
            self._keys[:, :, :T], self._values[:, :, :T] = keys[:, :, :T], values[:, :, :T]
            self.longest = T
            return
        every = torch.arange(len(keys), device=keys.device)
        self._keys[every, :, self.lengths], self._values[every, :, self.lengths] = (
            keys[:, :, 0],
            values[:, :, 0],
        )
        self.lengths = (self.lengths + 1).clamp(max=self.capacity)
        self.longest = min(self.longest + 1, self.capacity)

    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values, [B, H, longest, D] each, views, and how many of them count, [B]."""
        return self._keys[:, :, : self.longest], self._values[:, :, : self.longest], self.lengths
