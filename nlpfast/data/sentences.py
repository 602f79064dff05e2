"""Sentence tasks for BERT: their files, tokens of their examples, and batches of these.

    SST, CFIMDB     what a sentence says of a film: 5 classes, and 2
    PARAPHRASE      whether two questions ask the same
    SIMILARITY      how much two sentences have in common, from 0 to 5

Files are read and written by `nlpfast.data.sentence_files`, whose names are here too.

Shapes: B examples, C classes, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nlpfast.data.packed_sentences import PackedSentences, pack_sentences
from nlpfast.data.sentence_files import (
    CFIMDB,
    HIGHEST_SCORE,
    PARAPHRASE,
    SIMILARITY,
    SST,
    Example,
    Kind,
    SentenceReport,
    SentenceTask,
    read_examples,
    task_of,
    write_predictions,
)

__all__ = [
    "CFIMDB",
    "HIGHEST_SCORE",
    "PARAPHRASE",
    "SIMILARITY",
    "SST",
    "Example",
    "Kind",
    "SentenceBatch",
    "SentenceDataset",
    "SentenceItem",
    "SentenceReport",
    "SentenceTask",
    "SentenceTokenizer",
    "class_weights",
    "collate_sentences",
    "read_examples",
    "split",
    "task_of",
    "write_predictions",
]

_Item = TypeVar("_Item")


class SentenceTokenizer(Protocol):
    """What makes tokens of texts."""

    @property
    def cls_id(self) -> int:
        """Return the token before the first sentence."""

    @property
    def sep_id(self) -> int:
        """Return the token after each sentence."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text, without those before and after it."""


class SentenceItem(NamedTuple):
    """An example as tokens.

    Attributes:
        tokens: of each sequence: two for a pair, one for a single sentence and for a pair that is joint.
        types: the segment of each token, in the same form.
        label: of the example.
    """

    tokens: tuple[list[int], ...]
    types: tuple[list[int], ...]
    label: int | float | None


class SentenceBatch(NamedTuple):
    """A batch of examples.

    Attributes:
        packed: the sequences of all examples. Pairs that are not joint have 2 B: the first sentences of all
            examples come first, then the second ones.
        labels: [B], float32 for scores and int64 otherwise; None if they are not known.
        count: B.
    """

    packed: PackedSentences
    labels: Tensor | None
    # the method of this name, which tuples have, is none that a batch is asked for
    count: int  # type: ignore[assignment]


class SentenceDataset(Dataset[SentenceItem]):
    """Examples as tokens, made once: "[CLS] sentence [SEP]", a sequence for each sentence of a pair.

    With `joint` a pair is one sequence, "[CLS] first [SEP] second [SEP]", in which the second sentence and
    the [SEP] after it are segment 1, all else segment 0.

    Attributes:
        truncated: examples that lost tokens, because a sequence would have had more than `max_length`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: SentenceTokenizer,
        *,
        max_length: int = 512,
        joint: bool = False,
        source: str = "examples",
    ) -> None:
        """Encode all examples.

        Args:
            examples: at least one, all with as many sentences.
            tokenizer: makes the tokens; it is not kept.
            max_length: the most tokens of a sequence, [CLS] and [SEP] among them. Sentences lose tokens at
                their ends; of a joint pair the longer one does until both are equally long, then both do.
            joint: pairs are one sequence.
            source: the file, for messages.

        Raises:
            ValueError: there are no examples, their numbers of sentences differ or are not 2 with `joint`, or
                `max_length` leaves no token to a sentence.
        """
        numbers = sorted({len(example.sentences) for example in examples})
        if len(numbers) != 1 or (joint and numbers != [2]):
            rule = "must all have 2, as joint=True" if joint else "must be some, and all have as many"
            raise ValueError(
                f"examples with {numbers or 'no'} sentences: they {rule}; pass those of one task"
            )
        marks = 3 if joint else 2
        if max_length < marks + (2 if joint else 1):
            rule = f"must leave a token to each sentence, beside {marks} marks; raise it"
            raise ValueError(f"max_length={max_length} {rule}")
        self.truncated, self._source = 0, source
        self._items: list[SentenceItem] = []
        self._lines = [example.line for example in examples]
        columns = zip(*(example.sentences for example in examples), strict=True)
        sides = [tokenizer.encode_batch(list(column)) for column in columns]
        for example, *pieces in zip(examples, *sides, strict=True):
            kept = _cut_joint(pieces, max_length - 3) if joint else [row[: max_length - 2] for row in pieces]
            self.truncated += kept != pieces
            tokens = [[*row, tokenizer.sep_id] for row in kept]
            types = [[int(joint and side > 0)] * len(row) for side, row in enumerate(tokens)]
            if joint:
                tokens, types = [tokens[0] + tokens[1]], [types[0] + types[1]]
            begun = tuple([tokenizer.cls_id, *row] for row in tokens)
            self._items.append(SentenceItem(begun, tuple([0, *row] for row in types), example.label))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._items)

    def __getitem__(self, index: int) -> SentenceItem:
        """Return an example."""
        return self._items[index]

    def source(self, index: int) -> str:
        """Return where an example is from, as ``file:line``."""
        return f"{self._source}:{self._lines[index]}"


def _cut_joint(pieces: Sequence[list[int]], room: int) -> list[list[int]]:
    """Return two sentences with at most `room` tokens, of which the longer one gives first."""
    first, second = pieces
    kept = min(len(second), max(room // 2, room - len(first)))
    return [first[: room - kept], second[:kept]]


def collate_sentences(items: Sequence[SentenceItem]) -> SentenceBatch:
    """Make a batch without padding.

    Args:
        items: of one data set, at least one; all with a label, or none.

    Returns:
        The batch; its sequences are the first ones of all items, then the second ones, if there are any.

    Raises:
        ValueError: there is no item, or some have a label and others have none.
    """
    # the first sequences of all items, then the second ones
    tokens, types = (
        [row for side in zip(*rows, strict=True) for row in side]
        for rows in ([item.tokens for item in items], [item.types for item in items])
    )
    known = [item.label for item in items if item.label is not None]
    if known and len(known) != len(items):
        raise ValueError(f"items have {len(known)} labels for {len(items)} examples; give all or none")
    dtype = torch.float32 if any(isinstance(label, float) for label in known) else torch.int64
    labels = torch.tensor(known, dtype=dtype) if known else None
    return SentenceBatch(pack_sentences(tokens, types), labels, len(items))


def split(examples: Sequence[_Item], parts: Sequence[int], seed: int) -> list[list[_Item]]:
    """Return random parts of some examples, and what is left; the same for the same seed everywhere.

    Every example is in one part. Two with the same sentence may be in different ones.

    Args:
        examples: what to split.
        parts: how many examples each part gets.
        seed: chooses them.

    Returns:
        ``len(parts) + 1`` lists, the last with what is left; each in the order of `examples`.

    Raises:
        ValueError: the parts need more examples than there are, or one is negative.
    """
    total, number = sum(parts), len(examples)
    if min(parts, default=0) < 0 or total > number:
        raise ValueError(f"parts={list(parts)} must be 0 or more, together at most {number}; lower them")
    draws, order = Random(seed), list(range(number))
    for i in range(total):
        # of Random the sequence of random() alone is the same in every version of Python
        j = i + int(draws.random() * (number - i))
        order[i], order[j] = order[j], order[i]
    found, begin = [], 0
    for size in [*parts, number - total]:
        found.append([examples[i] for i in sorted(order[begin : begin + size])])
        begin += size
    return found


def class_weights(examples: Sequence[Example], classes: int) -> Tensor:
    """Return weights of classes for a loss, which make up for classes that are rare.

    A weight is inverse to the number of the class's examples, and the mean over the examples is 1.

    Args:
        examples: with labels, at least one.
        classes: C.

    Returns:
        float32 [C]; 0 for a class without an example.

    Raises:
        ValueError: there is no example, or one has no label in 0..C-1.
    """
    counts = [0] * classes
    for example in examples:
        if example.label is None or example.label not in range(classes):
            rule = f"must be in 0..{classes - 1}; pass the classes of the task"
            raise ValueError(f"label={example.label} of line {example.line} {rule}")
        counts[int(example.label)] += 1
    present = sum(count > 0 for count in counts)
    if not present:
        raise ValueError("examples is empty; pass those of the training file")
    return torch.tensor([len(examples) / (present * count) if count else 0.0 for count in counts])
