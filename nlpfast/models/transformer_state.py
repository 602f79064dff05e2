"""What a decoder keeps of hypotheses that are being written: one token more costs one position's work.

Shapes: B sentences, K hypotheses of each, R = B K; S source tokens of the longest, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TransformerState"]

# places for tokens that come at a time
ROOM = 8


class TransformerState:
    """Keys and values: of each sentence's source once, and of the tokens of its hypotheses.

    Attributes:
        lengths: int64 [B], source tokens of each sentence.
        memory: of each layer the keys and values of the sources, [B, H, S, D].
        beam: K.
        position: tokens that each hypothesis has.
    """

    def __init__(self, memory: list[tuple[Tensor, Tensor]], lengths: Tensor, beam: int) -> None:
        """Keep no token yet.

        Args:
            memory: of each layer the keys and values of the sources, [B, H, S, D].
            lengths: int64 [B], source tokens of each sentence.
            beam: K, at least 1.
        """
        self.memory, self.lengths, self.beam, self.position = memory, lengths, beam, 0
        keys = memory[0][0]
        B, H, _, D = keys.shape
        # of each layer keys, then values
        self._own = keys.new_empty(2 * len(memory), B * beam, H, ROOM, D)

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the hypotheses' tokens, [R, H, room, D] each, views.

        Args:
            layer: its number.
        """
        return self._own[2 * layer], self._own[2 * layer + 1]

    def make_room(self) -> None:
        """Have a place for one token more; what `own` gave is out of date then."""
        if self.position == self._own.shape[3]:
            more = torch.empty_like(self._own[:, :, :, :ROOM])
            self._own = torch.cat((self._own, more), dim=3)

    def reorder(self, beams: Tensor) -> None:
        """Have each hypothesis go on from what another of its sentence was.

        Args:
            beams: int64 [B, K], which.
        """
        first = torch.arange(len(beams), device=beams.device) * self.beam
        self._select((beams + first[:, None]).flatten())

    def keep(self, sentences: Tensor) -> None:
        """Forget all sentences but some.

        Args:
            sentences: int64, their numbers.
        """
        self.lengths = self.lengths[sentences]
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        self.memory = [
            (keys[sentences, :, :longest], values[sentences, :, :longest]) for keys, values in self.memory
        ]
        beams = torch.arange(self.beam, device=sentences.device)
        self._select((sentences[:, None] * self.beam + beams).flatten())

    def _select(self, rows: Tensor) -> None:
        # in one copy, with the few places that have no token yet
        self._own = self._own.index_select(1, rows)
