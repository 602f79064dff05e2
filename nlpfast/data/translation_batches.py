"""Batches of sentence pairs without padding, by the number of their tokens: what translation is trained on.

A batch has the sentences of one side one after the other, and those of the other side in the same order.
Decoding starts with BOS; both sides end with EOS.

Shapes: B sentence pairs; N tokens of the sources and M of the targets, with what fills up; B' sequences of
either side, those that fill up among them; P links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nlpfast.data.packed_sentences import filled
from nlpfast.data.parallel import AlignmentPairs
from nlpfast.data.read_report import FIRST
from nlpfast.data.token_pairs import TokenLists, TokenPairs, places_of

__all__ = [
    "IGNORED",
    "Encode",
    "TokenPairs",
    "TranslationBatch",
    "TranslationDataset",
    "count_targets_of",
    "first",
    "make_batch",
]

# The target of a row that does not count, the default of the losses.
IGNORED = -100

# (side, rows, epoch) -> the tokens of sentences, see TranslationDataset
Encode = Callable[[int, Sequence[int], int], Sequence[Sequence[int]]]


class TranslationBatch(NamedTuple):
    """A packed batch of sentences and their translations, on the CPU.

    Sequences after the first B fill up. They may have no tokens on one of the sides, so that attention finds
    no key: its output is 0 then.

    Attributes:
        source: int64 [N], the tokens of each sentence and EOS; the padding token where filled up.
        source_cu: int64 [B' + 1], cumulative numbers of tokens, for ``Packing(source_cu, source_longest)``.
        source_longest: tokens of the longest source.
        target_in: int64 [M], BOS and the tokens of each translation; the padding token where filled up.
        target_out: int64 [M], the tokens and EOS, what `target_in` predicts; -100 where filled up.
        target_cu: int64 [B' + 1], likewise.
        target_longest: tokens of the longest target.
        pairs: int64 [P, 3], as ``nlpfast.alignment_loss`` takes them if all of the batch is one entry:
            0, the row of `target_in` that predicts the target token, the place in `source`. None if the
            corpus has no alignments.
        sentences: B.
    """

    source: Tensor
    source_cu: Tensor
    source_longest: int
    target_in: Tensor
    target_out: Tensor
    target_cu: Tensor
    target_longest: int
    pairs: Tensor | None
    sentences: int


def count_targets_of(batch: TranslationBatch) -> int:
    """Return the number of targets that count: tokens and EOS of each translation."""
    return int((batch.target_out != IGNORED).sum())


def first(items: Sequence[TranslationBatch]) -> TranslationBatch:
    """Return the only item: it is a batch already.

    Args:
        items: one batch.

    Raises:
        ValueError: another number of items.
    """
    if len(items) != 1:
        rule = "an item is a batch already; pass batch_size=1"
        raise ValueError(f"items has {len(items)} batches, must have one: {rule}")
    return items[0]


def make_batch(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    pairs: Tensor | None = None,
) -> TranslationBatch:
    """Make a batch of sentences and their translations.

    Args:
        sources: tokens of each, without special ones; at least one sentence, which may be empty.
        targets: tokens of the translations, as many.
        pad_id: token that fills up.
        bos_id: token before the first of a target.
        eos_id: token after the last of each side.
        pairs: links, as `AlignmentPairs.batch` gives them for padding at the ends: int64 [P, 3], the number
            of the sentence, target token, source token.

    Raises:
        ValueError: there is no sentence, the numbers of sources and targets differ, or a pair is outside of
            its sentence.
    """
    if not sources or len(sources) != len(targets):
        rule = "give at least one of each, and as many"
        raise ValueError(f"sources has {len(sources)} sentences, targets has {len(targets)}; {rule}")
    source, target = TokenLists.of(sources), TokenLists.of(targets)
    if pairs is not None and len(pairs):
        sentence, row, column = pairs.numpy().T
        outside = pairs.numpy().min(axis=1) < 0
        outside |= sentence >= len(source)
        sentence = np.where(outside, 0, sentence)
        outside |= (row >= target.lengths()[sentence]) | (column >= source.lengths()[sentence])
        if outside.any():
            bad = pairs[int(outside.argmax())].tolist()
            raise ValueError(f"pairs has {bad}, which is outside of its sentence; EOS has no links: drop it")
    return _packed(source, target, (pad_id, bos_id, eos_id), pairs)


def _packed(
    source: TokenLists, target: TokenLists, special: tuple[int, int, int], pairs: Tensor | None
) -> TranslationBatch:
    """Make a batch; `special` are PAD, BOS and EOS."""
    pad, bos, eos = special
    source_lengths, target_lengths = source.lengths() + 1, target.lengths() + 1
    source_cu, source_missing = filled(source_lengths.tolist())
    target_cu, target_missing = filled(target_lengths.tolist())
    # the side with fewer sequences gets empty ones: their numbers are the same, and their tokens full
    sequences = max(len(source_cu), len(target_cu))
    source_cu, target_cu = (
        torch.cat((cu, cu[-1].expand(sequences - len(cu)))) for cu in (source_cu, target_cu)
    )
    if pairs is not None:
        sentence, row, column = pairs.T
        pairs = torch.stack(
            (torch.zeros_like(sentence), row + target_cu[sentence], column + source_cu[sentence]), dim=1
        )
    return TranslationBatch(
        source=_joined(source, source_missing, pad, after=eos),
        source_cu=source_cu,
        source_longest=int(source_lengths.max()),
        target_in=_joined(target, target_missing, pad, before=bos),
        target_out=_joined(target, target_missing, IGNORED, after=eos),
        target_cu=target_cu,
        target_longest=int(target_lengths.max()),
        pairs=pairs,
        sentences=len(source),
    )


def _joined(
    sentences: TokenLists, missing: int, fill: int, *, before: int | None = None, after: int | None = None
) -> Tensor:
    """Return the tokens of all sentences, with one more before or after each, and what fills up."""
    lengths, number = sentences.lengths(), len(sentences)
    out = np.full(len(sentences.flat) + number + missing, fill, dtype=np.int64)
    begins = sentences.ends[:-1] + np.arange(number)
    if before is not None:
        out[begins] = before
        begins = begins + 1
    out[places_of(begins, lengths)] = sentences.flat
    if after is not None:
        out[begins + lengths] = after
    return torch.from_numpy(out)


class TranslationDataset(Dataset[TranslationBatch]):
    """Parallel text whose items are whole batches, for a Trainer with ``batch_size=1, collate_fn=first``.

    Pairs of similar lengths are in a batch together: they are sorted by the length of the source, then of the
    target, pairs with the same lengths at random, and cut where a batch is full. Batches are the same for the
    same seed, in every epoch; the Trainer mixes their order.

    Attributes:
        pairs: the pairs of sentences.
        epoch: the epoch for which sentences are encoded anew; 0 at first.
        count: targets that count in all batches, as the pairs are encoded: tokens and EOS.
    """

    def __init__(
        self,
        pairs: TokenPairs,
        *,
        pad_id: int,
        bos_id: int,
        eos_id: int,
        max_tokens: int,
        max_sentences: int | None = None,
        padded: bool = False,
        seed: int = 0,
        alignments: AlignmentPairs | None = None,
        encode: Encode | None = None,
    ) -> None:
        """Choose the pairs of each batch.

        Args:
            pairs: the corpus.
            pad_id: token that fills up.
            bos_id: token before the first of a target.
            eos_id: token after the last of each side.
            max_tokens: the most tokens of a side of a batch, EOS included, without what fills up.
            max_sentences: the most pairs of a batch; None for any number.
            padded: a model pads its batches, so that `max_tokens` bounds the number of pairs times the
                longest sentence of both sides.
            seed: of the order of pairs with the same lengths, from 0.
            alignments: of the same pairs, see `subword_alignments`; None for batches without them.
            encode: ``encode(side, rows, epoch)`` gives the tokens that sentences have in this epoch, as
                BPE dropout does, without special ones; side 0 is the source, rows are numbers of sentences
                in ``pairs.text``. A sentence keeps the tokens of `pairs` where it gives none, or with EOS
                more than ``pairs.max_length``. Batches stay those of the tokens of `pairs`, and may be
                larger than `max_tokens` then. None for the tokens of `pairs` always.

        Raises:
            ValueError: a pair has more tokens than `max_tokens`, `max_sentences` is below 1, or `alignments`
                are given with `encode`: links are between tokens that it would change.
        """
        if alignments is not None and encode is not None:
            rule = "encode changes the tokens that links are between, of words as of subwords"
            raise ValueError(f"alignments and encode are both given; {rule}: drop BPE dropout or alignments")
        if max_sentences is not None and max_sentences < 1:
            raise ValueError(f"max_sentences={max_sentences} must be >= 1, or None for any; raise it")
        self.epoch = 0
        self.pairs, self._alignments, self._encode = pairs, alignments, encode
        self._special = (pad_id, bos_id, eos_id)
        source, target = pairs.source.lengths() + 1, pairs.target.lengths() + 1
        longer = np.maximum(source, target)
        if longer.max() > max_tokens:
            worst = int(longer.argmax())
            has = f"{pairs.place(worst)} has {longer[worst]:,} with EOS"
            raise ValueError(f"max_tokens={max_tokens}, but {has}; raise it, or lower max_length")
        self.count = int(target.sum())
        ties = np.random.Generator(np.random.Philox(key=seed)).random(len(pairs))
        order = np.lexsort((ties, target, source))
        cuts = _cuts(source[order], target[order], max_tokens, max_sentences or len(pairs), padded=padded)
        self._batches: list[NDArray[np.int64]] = np.split(order, cuts)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def rows(self, index: int) -> NDArray[np.int64]:
        """Return the numbers of a batch's pairs in the corpus, int64 [B]."""
        return self._batches[index]

    def __getitem__(self, index: int) -> TranslationBatch:
        """Return a batch."""
        rows = self.rows(index)
        links = None if self._alignments is None else self._alignments.batch(rows.tolist())
        return _packed(self._tokens(0, rows), self._tokens(1, rows), self._special, links)

    def _tokens(self, side: int, rows: NDArray[np.int64]) -> TokenLists:
        tokens = (self.pairs.source, self.pairs.target)[side].take(rows)
        if self._encode is None:
            return tokens
        found = self._encode(side, self.pairs.rows[rows].tolist(), self.epoch)
        longest = self.pairs.max_length - 1
        both = zip(found, tokens.lists(), strict=True)
        return TokenLists.of([anew if 1 <= len(anew) <= longest else kept for anew, kept in both])

    def source(self, index: int) -> str:
        """Return where the first pairs of a batch are from, ``file:line, file:line, ...``."""
        rows = self.rows(index).tolist()
        return ", ".join([*map(self.pairs.place, rows[:FIRST]), *["..."] * (len(rows) > FIRST)])


def _cuts(
    source: NDArray[np.int64], target: NDArray[np.int64], most: int, sentences: int, *, padded: bool
) -> list[int]:
    """Return where batches begin, but the first, for pairs with these lengths in their order."""
    cuts: list[int] = []
    begin = sources = targets = longest = 0
    for place, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        sources, targets, longest = sources + s, targets + t, max(longest, s, t)
        number = place + 1 - begin
        tokens = number * longest if padded else max(sources, targets)
        if tokens > most or number > sentences:
            cuts.append(place)
            begin, sources, targets, longest = place, s, t, max(s, t)
    return cuts
