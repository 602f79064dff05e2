"""What the decoder of a recurrent translation model reads, and where its hypotheses are.

Shapes: B batch, S source tokens of the longest sentence, K hypotheses of a sentence, h hidden_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Memory", "Seq2SeqState", "padding_of"]


class Memory(NamedTuple):
    """What the decoder reads of a batch of sentences.

    Attributes:
        hiddens: encoder states [B, S, 2h].
        keys: what scores are computed from, [B, S, h].
        masks: True at padding, bool [B, S]; None if there is none.
    """

    hiddens: Tensor
    keys: Tensor
    masks: Tensor | None


class Seq2SeqState:
    """Where the hypotheses of a batch are: what `Seq2Seq.advance` goes on from.

    Encoder states are kept once for a sentence, not once for a hypothesis.

    Attributes:
        memory: encoder states.
        hidden: of the decoder, [B, K, h].
        cell: of the decoder, [B, K, h].
        output: the last combined outputs, [B, K, h].
    """

    def __init__(self, memory: Memory, hidden: Tensor, cell: Tensor) -> None:
        """Begin: no combined output is there yet.

        Args:
            memory: encoder states.
            hidden: [B, K, h].
            cell: [B, K, h].
        """
        self.memory, self.hidden, self.cell = memory, hidden, cell
        self.output = torch.zeros_like(hidden)

    def reorder(self, beams: Tensor) -> None:
        """Let each hypothesis go on from what another one of its sentence was.

        Args:
            beams: int64 [B, K]: hypothesis k goes on from ``beams[:, k]``.
        """
        rows = torch.arange(len(beams), device=beams.device)[:, None]
        self._take((rows, beams))

    def keep(self, sentences: Tensor) -> None:
        """Go on with some sentences alone.

        Args:
            sentences: int64 [B'], their places in the batch, which they then have in this order.
        """
        hiddens, keys, masks = self.memory
        masks = None if masks is None else masks[sentences]
        self.memory = Memory(hiddens[sentences], keys[sentences], masks)
        self._take((sentences,))

    def _take(self, index: tuple[Tensor, ...]) -> None:
        self.hidden, self.cell, self.output = self.hidden[index], self.cell[index], self.output[index]


def padding_of(lengths: Tensor, longest: int) -> Tensor:
    """Return where a padded batch [B, longest] has padding.

    Args:
        lengths: int64 [B].
        longest: its columns.
    """
    return torch.arange(longest, device=lengths.device) >= lengths[:, None]
