"""Batches of dual learning: pairs in both directions, with what language models say of their sentences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nlpfast.data.sentence_batches import turned
from nlpfast.data.translation_batches import TranslationBatch, TranslationDataset

__all__ = ["DualBatch", "DualDataset", "count_pairs_of"]


class DualBatch(NamedTuple):
    """A batch of B pairs, on the CPU.

    Attributes:
        there: sentences and their translations.
        back: the same pairs, turned round.
        lm_source: float64 [B], log p of the sentences.
        lm_target: float64 [B], of the translations.
        dsl_lambda: how much agreement counts in this epoch.
    """

    there: TranslationBatch
    back: TranslationBatch
    lm_source: Tensor
    lm_target: Tensor
    dsl_lambda: float


def count_pairs_of(batch: DualBatch) -> int:
    """Return the number of pairs in a batch."""
    return batch.there.sentences


class DualDataset(Dataset[DualBatch]):
    """The batches of a `TranslationDataset`, for both directions.

    Attributes:
        dsl_lambda: how much agreement counts, once the warm-up is over.
        warmup_epochs: in the first so many epochs it does not count.
    """

    def __init__(
        self,
        batches: TranslationDataset,
        scores: tuple[NDArray[np.float64], NDArray[np.float64]],
        *,
        pad_id: int,
        bos_id: int,
        dsl_lambda: float,
        warmup_epochs: int = 0,
    ) -> None:
        """Take over batches and scores.

        Args:
            batches: without alignments.
            scores: log p of the sources and of the targets of all pairs, in their order.
            pad_id: token that fills up.
            bos_id: token before the first of a target.
            dsl_lambda: see the class.
            warmup_epochs: see the class.
        """
        self.dsl_lambda, self.warmup_epochs = dsl_lambda, warmup_epochs
        self._batches, self._scores = batches, scores
        self._special = {"pad_id": pad_id, "bos_id": bos_id}
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> DualBatch:
        """Return a batch."""
        there, rows = self._batches[index], self._batches.rows(index)
        source, target = (torch.from_numpy(scores[rows]) for scores in self._scores)
        counts = self.dsl_lambda if self.epoch >= self.warmup_epochs else 0.0
        return DualBatch(there, turned(there, **self._special), source, target, counts)

    def source(self, index: int) -> str:
        """Return where the first pairs of a batch are from."""
        return self._batches.source(index)
