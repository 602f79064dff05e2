"""Pretraining data of BERT (Devlin et al. 2019): masked pieces, and whether one text follows another.

    sentences     [CLS] sentence [SEP]
    pairs         [CLS] A [SEP] B [SEP]      with segments 0 0 0 1 1; B follows A, or is of another document

Of the pieces of an item that are not special, 15 % are targets: a budget of ``max(1, round(0.15 * n))``.
Which ones they are, `masking` says:

    pieces        any, exactly as many as the budget.
    words         whole words, in random order (whole word masking, of BERT's authors). The word that no
                  longer fits is taken with the probability (rest of the budget) / (its pieces), and is the
                  last one in any case. So the budget is met on average, and long words are hidden as often
                  as short ones. The first word is taken though it does not fit.
    ngrams        the same with spans of 1 to 3 words instead of words, n of them with a probability
                  proportional to 1/n. Phrases are hidden as in ERNIE (Sun et al. 2019); spans of random
                  length are those of SpanBERT (Joshi et al. 2020), the probabilities those of ALBERT (Lan et
                  al. 2020). A span ends early before a word that is a target already, that does not follow
                  at once, or that no longer fits.

Of the targets 80 % are replaced by [MASK], 10 % by a random piece that is not special, and 10 % stay. This
is drawn for each piece, of whole words too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nlpfast.data.lines import DataError
from nlpfast.data.packed_sentences import PackedSentences, pack_sentences
from nlpfast.data.text_documents import (
    PieceTokenizer,
    embedded_documents,
    encode_documents,
    read_documents_of_sentences,
)

__all__ = [
    "MASKINGS",
    "MaskedBatch",
    "MaskedItem",
    "MaskedTextDataset",
    "PieceTokenizer",
    "collate_masked",
    "count_masked",
    "embedded_documents",
    "read_documents_of_sentences",
    "unigram_entropy",
]

MASKINGS = ("pieces", "words", "ngrams")
# Words of a span, with probabilities proportional to 1/n.
_SPANS = np.array([1, 2, 3])
_SPAN_PROBABILITIES = 1 / _SPANS / (1 / _SPANS).sum()

_Numbers = NDArray[np.integer[Any]]


class MaskedItem(NamedTuple):
    """A text with hidden pieces.

    Attributes:
        tokens: pieces as the model sees them.
        types: segment of each token.
        positions: places of the targets in `tokens`, rising; at least one.
        targets: pieces that were there.
        is_next: 1 where the second part follows the first, 0 where it does not; None without pairs.
    """

    tokens: list[int]
    types: list[int]
    positions: list[int]
    targets: list[int]
    is_next: int | None


class MaskedTextDataset(Dataset[MaskedItem]):
    """Sentences, or pairs of texts, with hidden pieces.

    Without pairs item i is sentence i. With pairs item i begins at the i-th of the sentences after which
    their document goes on. A is sentences from there on, at least one and as many as fit into half of the
    room, but for the document's last. B is, as far as the room goes, what follows in the document, or, with
    probability 1/2, what follows the A of an item of another document, any of them as often as any other. So
    B is drawn from the same texts in both cases, and nothing can be told from B alone.

    Which pieces are hidden, and what B is, depends on the seed, the epoch and the index alone, whichever
    process draws it.

    Attributes:
        epoch: of the draws.
        truncated: sentences that were cut: without pairs to `max_length` - 2 pieces, with pairs to half of
            `max_length` - 3, which always leaves room for both parts.
        left_out: sentences without any piece that can be a target.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[str]],
        tokenizer: PieceTokenizer,
        *,
        max_length: int = 128,
        nsp: bool = True,
        masking: str = "pieces",
        probability: float = 0.15,
        seed: int = 0,
        source: str = "documents",
    ) -> None:
        """Encode all sentences.

        Args:
            documents: sentences of each, in their order.
            tokenizer: makes pieces of them.
            max_length: the most tokens of an item, with the special ones; at least 3, or 5 with pairs.
            nsp: items are pairs of texts, for next sentence prediction.
            masking: "pieces", "words" or "ngrams", see above.
            probability: share of the pieces that are targets, above 0 and at most 1.
            seed: of the draws, from 0 to below 2^64.
            source: the file, for messages.

        Raises:
            ValueError: an argument is outside its bounds.
            DataError: no sentence has a piece that can be a target; or, with pairs, fewer than two documents
                have two sentences.
        """
        least = 5 if nsp else 3
        if max_length < least:
            rule = f"must be at least {least} with nsp={nsp}; special tokens take part of it"
            raise ValueError(f"max_length={max_length} {rule}")
        if masking not in MASKINGS:
            raise ValueError(f"masking={masking!r} must be one of {', '.join(MASKINGS)}; pass one of them")
        if not 0 < probability <= 1:
            raise ValueError(f"probability={probability} must be above 0 and at most 1; 0.15 is BERT's")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be in 0..2^64-1; pass another one")
        self.nsp, self.masking, self.probability, self.epoch = nsp, masking, probability, 0
        self._seed, self._source = seed, source
        self._cls, self._sep, self._mask = tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id
        self._maskable = np.ones(len(tokenizer), dtype=bool)
        self._maskable[list(tokenizer.special_ids)] = False
        self._ordinary = np.flatnonzero(self._maskable)
        self._continues = np.array(tokenizer.continues, dtype=bool)
        self._room = max_length - (3 if nsp else 2)
        data = encode_documents(documents, tokenizer, self._room // 2 if nsp else self._room)
        if len(data.lines) == 0:
            raise DataError(f"{source}: no sentence has a piece that can be masked; give a text with words")
        self.truncated, self.left_out = data.truncated, data.left_out
        self._pieces, self._offsets = data.pieces, data.offsets
        self._documents, self._lines = data.documents, data.lines
        # items of each document are one fewer than its sentences, as its last has nothing after it
        self._items = data.documents - np.arange(len(data.documents))
        pairs = int((np.diff(self._items) > 0).sum())
        if nsp and pairs < 2:
            rule = "next sentence prediction needs 2; put blank lines between documents"
            raise DataError(f"{source}: has documents with two sentences or more: {pairs}, {rule}")

    def __len__(self) -> int:
        """Return the number of items."""
        return int(self._items[-1]) if self.nsp else len(self._lines)

    def __getitem__(self, index: int) -> MaskedItem:
        """Return an item; the same seed, epoch and index give the same one."""
        self._check(index)
        # as many streams as there are numbers: nothing is drawn twice
        stream = np.random.Philox(key=self._seed, counter=[0, index, self.epoch, 0])
        draws = np.random.Generator(stream)
        parts: list[Any]
        is_next = None
        if self.nsp:
            is_next = int(draws.random() < 0.5)
            first, second = self._pair(index, index if is_next else self._elsewhere(index, draws))
            parts = [[self._cls], first, [self._sep], second, [self._sep]]
            types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        else:
            first = self._pieces[self._offsets[index] : self._offsets[index + 1]]
            parts = [[self._cls], first, [self._sep]]
            types = [0] * (len(first) + 2)
        tokens = np.concatenate(parts)
        positions = self._positions(tokens, draws)
        targets = tokens[positions]
        tokens[positions] = self._replaced(targets, draws)
        return MaskedItem(tokens.tolist(), types, positions.tolist(), targets.tolist(), is_next)

    def source(self, index: int) -> str:
        """Return where an item begins, as ``file:line``."""
        self._check(index)
        sentence = self._begin(index)[0] if self.nsp else index
        return f"{self._source}:{self._lines[sentence]}"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} items")

    def _begin(self, item: int) -> tuple[int, int]:
        """Return the sentence that a pair begins at, and the document that it is in."""
        document = int(self._items.searchsorted(item, "right")) - 1
        return item + document, document

    def _elsewhere(self, index: int, draws: np.random.Generator) -> int:
        """Return an item of another document than that of item `index`."""
        _, document = self._begin(index)
        start, stop = int(self._items[document]), int(self._items[document + 1])
        other = int(draws.integers(len(self) - (stop - start)))
        return other if other < start else other + stop - start

    def _pair(self, item: int, other: int) -> tuple[_Numbers, _Numbers]:
        """Return A of an item, and the B that would follow the A of an item, the same one or another."""
        sentence, document = self._begin(item)
        first = self._pieces[self._offsets[sentence] : self._offsets[self._middle(sentence, document)]]
        sentence, document = self._begin(other)
        start = self._middle(sentence, document)
        stop = self._fitting(start, int(self._documents[document + 1]), self._room - len(first))
        return first, self._pieces[self._offsets[start] : self._offsets[stop]]

    def _middle(self, sentence: int, document: int) -> int:
        """Return where the A that begins at a sentence ends, and B would begin."""
        return self._fitting(sentence, int(self._documents[document + 1]) - 1, self._room // 2)

    def _fitting(self, start: int, stop: int, room: int) -> int:
        """Return the last of the ends start + 1 .. stop of a text whose pieces do not exceed `room`."""
        ends = self._offsets[start + 1 : stop + 1]
        return start + int(ends.searchsorted(self._offsets[start] + room, "right"))

    def _positions(self, tokens: _Numbers, draws: np.random.Generator) -> _Numbers:
        """Return the places of the targets, rising."""
        maskable = self._maskable[tokens]
        places = np.flatnonzero(maskable)
        budget = max(1, round(self.probability * len(places)))
        if self.masking == "pieces":
            return np.sort(draws.choice(places, budget, replace=False))
        begins = maskable.copy()
        begins[1:] &= ~(self._continues[tokens[1:]] & maskable[:-1])
        lengths = np.bincount(begins.cumsum()[places] - 1)
        sizes = np.ones_like(lengths)
        if self.masking == "ngrams":
            sizes = draws.choice(_SPANS, len(lengths), p=_SPAN_PROBABILITIES)
        words = list(zip(np.flatnonzero(begins).tolist(), lengths.tolist(), strict=True))
        return np.array(_whole_words(words, sizes.tolist(), budget, draws))

    def _replaced(self, targets: _Numbers, draws: np.random.Generator) -> _Numbers:
        """Return what the model sees in place of the targets."""
        fate = draws.random(len(targets))
        anything = self._ordinary[draws.integers(len(self._ordinary), size=len(targets))]
        return np.where(fate < 0.8, self._mask, np.where(fate < 0.9, anything, targets))


def _whole_words(
    words: Sequence[tuple[int, int]], sizes: Sequence[int], budget: int, draws: np.random.Generator
) -> list[int]:
    """Return the places of the pieces of random words, or spans of words, rising.

    Args:
        words: place and number of pieces of each.
        sizes: words in the span that begins at a word.
        budget: pieces that there shall be on average.
        draws: gives the order, and whether the last word is taken.
    """
    taken, places, left = [False] * len(words), list[int](), budget
    for number in draws.permutation(len(words)).tolist():
        end, pieces = words[number]
        if taken[number]:
            continue
        # also when nothing is left: the probability is 0 then
        if pieces > left and places and draws.random() >= left / pieces:
            break
        for word in range(number, min(number + sizes[number], len(words))):
            start, pieces = words[word]
            if word > number and (taken[word] or start != end or pieces > left):
                break
            taken[word], end = True, start + pieces
            places += range(start, end)
            left -= pieces
    return sorted(places)


class MaskedBatch(NamedTuple):
    """Items one after the other, without padding: S of them with M targets.

    Attributes:
        packed: the tokens of all items.
        rows: int64 [M], the place of each target among the packed tokens.
        targets: int64 [M].
        is_next: int64 [S], or None without pairs.
    """

    packed: PackedSentences
    rows: Tensor
    targets: Tensor
    is_next: Tensor | None


def collate_masked(items: Sequence[MaskedItem]) -> MaskedBatch:
    """Make a batch.

    Args:
        items: of one data set, at least one.
    """
    packed = pack_sentences([item.tokens for item in items], [item.types for item in items])
    starts = packed.cu_seqlens.tolist()
    rows = [start + place for start, item in zip(starts, items, strict=False) for place in item.positions]
    labels = [item.is_next for item in items if item.is_next is not None]
    return MaskedBatch(
        packed=packed,
        rows=torch.tensor(rows),
        targets=torch.tensor([target for item in items for target in item.targets]),
        is_next=torch.tensor(labels) if labels else None,
    )


def count_masked(batch: MaskedBatch) -> int:
    """Return the number of targets, M."""
    return len(batch.rows)


def unigram_entropy(dataset: MaskedTextDataset) -> float:
    """Return the entropy of the pieces that can be targets, in nats.

    It is the loss of a model that knows how often each piece occurs and nothing about its neighbours: what a
    masked language model must beat.

    Args:
        dataset: each of its sentences counts once.
    """
    counts = np.bincount(dataset._pieces, minlength=len(dataset._maskable))[dataset._maskable]
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
