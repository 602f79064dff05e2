"""Batches of the sentences of one language, and translations turned round, for models of the other direction.

Shapes: B sentences, N tokens of all of them, with what fills up; B' sequences, those that fill up among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nlpfast.data.packed_sentences import filled
from nlpfast.data.translation_batches import IGNORED, TranslationBatch

__all__ = ["SentenceBatch", "make_sentence_batch", "targets_of", "turned"]


class SentenceBatch(NamedTuple):
    """A packed batch of sentences that are to be predicted word by word, on the CPU.

    Attributes:
        tokens_in: int64 [N], BOS and the tokens of each sentence; the padding token where filled up.
        tokens_out: int64 [N], the tokens and EOS, what `tokens_in` predicts; -100 where filled up.
        cu_seqlens: int64 [B' + 1], cumulative numbers of tokens, for ``Packing(cu_seqlens, longest)``.
        longest: tokens of the longest sentence, with BOS or EOS.
        sentences: B.
    """

    tokens_in: Tensor
    tokens_out: Tensor
    cu_seqlens: Tensor
    longest: int
    sentences: int


def make_sentence_batch(
    sentences: Sequence[Sequence[int]], *, pad_id: int, bos_id: int, eos_id: int
) -> SentenceBatch:
    """Make a batch of sentences.

    Args:
        sentences: tokens of each, without special ones; at least one sentence, which may be empty.
        pad_id: token that fills up.
        bos_id: token before the first.
        eos_id: token after the last.

    Raises:
        ValueError: there is no sentence.
    """
    if not sentences:
        raise ValueError("sentences is empty; give at least one")
    lengths = [len(sentence) + 1 for sentence in sentences]
    cu_seqlens, missing = filled(lengths)
    return SentenceBatch(
        tokens_in=torch.tensor([*(t for row in sentences for t in (bos_id, *row)), *[pad_id] * missing]),
        tokens_out=torch.tensor([*(t for row in sentences for t in (*row, eos_id)), *[IGNORED] * missing]),
        cu_seqlens=cu_seqlens,
        longest=max(lengths),
        sentences=len(sentences),
    )


def targets_of(batch: TranslationBatch) -> SentenceBatch:
    """Return the translations of a batch as sentences of their own.

    Args:
        batch: sentences and their translations.
    """
    return SentenceBatch(
        *(batch.target_in, batch.target_out, batch.target_cu, batch.target_longest, batch.sentences)
    )


def turned(batch: TranslationBatch, *, pad_id: int, bos_id: int) -> TranslationBatch:
    """Return the same pairs in the same order, the translations as sources and the sources as translations.

    Turned twice, a batch is as it was.

    Args:
        batch: sentences and their translations; its tensors are not changed.
        pad_id: token that fills up.
        bos_id: token before the first of a target.
    """
    starts = batch.source_cu[: batch.sentences]
    counted = torch.arange(len(batch.source)) < batch.source_cu[batch.sentences]
    # EOS is one token later than BOS: moved by one, a sentence with EOS has its place before the next one's
    target_in = batch.source.roll(1)
    target_in[starts] = bos_id
    return TranslationBatch(
        source=batch.target_out.masked_fill(batch.target_out == IGNORED, pad_id),
        source_cu=batch.target_cu,
        source_longest=batch.target_longest,
        target_in=target_in.masked_fill(~counted, pad_id),
        target_out=batch.source.masked_fill(~counted, IGNORED),
        target_cu=batch.source_cu,
        target_longest=batch.source_longest,
        # the row that predicts a token is its place among the sources
        pairs=None if batch.pairs is None else batch.pairs[:, [0, 2, 1]],
        sentences=batch.sentences,
    )
