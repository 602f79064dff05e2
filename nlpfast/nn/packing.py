"""Where the sequences of a packed batch begin and end: their rows lie one after the other, without padding.

Shapes: B sequences, N rows of all sequences together.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Packing"]


@dataclasses.dataclass(frozen=True)
class Packing:
    """The layout of a packed batch, as ``varlen_attention`` takes it.

    Attributes:
        cu_seqlens: int64 [B + 1], cumulative lengths: sequence b has the rows from ``cu_seqlens[b]`` to
            before ``cu_seqlens[b + 1]``.
        longest: rows of the longest sequence, or more.
    """

    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of_lengths(cls, lengths: Tensor) -> Packing:
        """Return the layout of sequences with these lengths.

        Args:
            lengths: int64 [B], B >= 1, on the CPU if nothing is to wait for a device.
        """
        ends = lengths.cumsum(0)
        return cls(torch.cat((ends.new_zeros(1), ends)), int(lengths.max()))

    def lengths(self) -> Tensor:
        """Return the rows of each sequence, [B]."""
        return self.cu_seqlens.diff()

    def positions(self, rows: int) -> Tensor:
        """Return the place of each row in its sequence, counted from 0; [N].

        Args:
            rows: N.
        """
        starts = self.cu_seqlens[:-1].repeat_interleave(self.lengths(), output_size=rows)
        return torch.arange(rows, device=starts.device) - starts

    def cut(self, most: int) -> Packing:
        """Return the layout of the first rows of each sequence.

        Args:
            most: rows that a sequence keeps, as far as it has them.
        """
        ends = self.lengths().clamp(max=most).cumsum(0)
        return Packing(torch.cat((ends.new_zeros(1), ends)), min(self.longest, most))

    def padded(self, x: Tensor) -> Tensor:
        """Return the sequences one below the other, with zeros after their ends: [B, longest, ...].

        Args:
            x: the rows, [N, ...].
        """
        out = x.new_zeros(len(self.cu_seqlens) - 1, self.longest, *x.shape[1:])
        out[self.within()] = x
        return out

    def within(self) -> Tensor:
        """Return where a padded batch has rows of its sequences, bool [B, longest]."""
        return torch.arange(self.longest, device=self.cu_seqlens.device) < self.lengths()[:, None]
