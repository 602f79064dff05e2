"""The tokens of parallel text, stored as arrays, and which pairs of sentences are of use for training.

Shapes: n sentences, N tokens of all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpfast.data.lines import DataError
from nlpfast.data.parallel_text import ParallelText
from nlpfast.data.read_report import FIRST, Skips

__all__ = ["TokenLists", "TokenPairs", "places_of"]


def places_of(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places of some pieces of an array, piece after piece.

    Args:
        starts: int64 [n], the place in which each piece begins.
        lengths: int64 [n].

    Returns:
        int64 [sum of `lengths`]: ``starts[0], starts[0] + 1, ...``, ``starts[1], ...``.
    """
    before = lengths.cumsum() - lengths
    places: NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return places


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLists:
    """The tokens of sentences, one after the other.

    Attributes:
        flat: int32 [N], the tokens.
        ends: int64 [n + 1]; sentence i has the tokens from ``ends[i]`` to before ``ends[i + 1]``.
    """

    flat: NDArray[np.int32]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, sentences: Sequence[Sequence[int]]) -> TokenLists:
        """Return the tokens of some lists.

        Args:
            sentences: tokens of each; a list may be empty.
        """
        lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
        tokens = itertools.chain.from_iterable(sentences)
        return cls(np.fromiter(tokens, np.int32, int(lengths.sum())), np.append(0, lengths.cumsum()))

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.ends) - 1

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each sentence, int64 [n]."""
        return np.diff(self.ends)

    def take(self, rows: ArrayLike) -> TokenLists:
        """Return some of the sentences.

        Args:
            rows: their numbers, from 0, in the order that is wanted.

        Raises:
            IndexError: there is no such sentence.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths()[chosen]
        places = places_of(self.ends[:-1][chosen], lengths)
        return TokenLists(self.flat[places], np.append(0, lengths.cumsum()))

    def lists(self) -> list[list[int]]:
        """Return a list of each sentence's tokens."""
        tokens = self.flat.tolist()
        return [tokens[begin:end] for begin, end in itertools.pairwise(self.ends.tolist())]


class TokenPairs:
    """The pairs of a parallel text that a model is trained on, as tokens without special ones.

    Skipped, counted and named in the report are pairs of which a side has no token, or more than `max_length`
    with EOS, or many times as many as the other.

    Attributes:
        text: where the pairs are from.
        rows: int64 [pairs], the number of each in ``text.source`` and ``text.target``.
        source: tokens of the sources.
        target: tokens of the targets.
        max_length: the most tokens of a side, EOS included.
        report: what became of all lines of the text; ``report.used`` is the number of pairs.
    """

    def __init__(
        self,
        text: ParallelText,
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        *,
        max_length: int = 256,
        max_ratio: float | None = None,
    ) -> None:
        """Choose the pairs and store them.

        Args:
            text: the sentences; its report stays as it is.
            source: tokens of each source sentence, without BOS and EOS.
            target: tokens of each target sentence, likewise.
            max_length: the most tokens of a side, EOS included, at least 2.
            max_ratio: how many times as many tokens one side may have as the other, at least 1, without EOS,
                as in Moses' clean-corpus-n; None for any number.

        Raises:
            ValueError: another number of sentences than in `text`, or a limit that is too low.
            DataError: no pair is left.
        """
        for name, side in (("source", source), ("target", target)):
            if len(side) != len(text):
                rule = f"{text.path} has {len(text)} pairs; give tokens for each"
                raise ValueError(f"{name} has tokens of {len(side)} sentences, but {rule}")
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be >= 2, a token and EOS; raise it")
        if max_ratio is not None and not max_ratio >= 1:
            raise ValueError(f"max_ratio={max_ratio} must be >= 1, or None for any; raise it")
        sides = TokenLists.of(source), TokenLists.of(target)
        fewer, more = (limit(*(side.lengths() for side in sides)) for limit in (np.minimum, np.maximum))
        reasons = {"with a side without tokens": fewer == 0}
        reasons[f"longer than {max_length:,} tokens with EOS"] = more >= max_length
        if max_ratio is not None:
            reasons[f"more than {max_ratio:g} times as long on one side"] = more > max_ratio * fewer
        self.text, self.max_length = text, max_length
        self.report = copy.deepcopy(text.report)
        kept = np.ones(len(text), dtype=np.bool_)
        for reason, unfit in reasons.items():
            self._skip(reason, text.lines[unfit & kept])
            kept &= ~unfit
        if not kept.any():
            raise DataError(f"{text.path}: no pair is left ({self.report}); check the text and the limits")
        self.rows: NDArray[np.int64] = np.flatnonzero(kept)
        self.source, self.target = (side.take(self.rows) for side in sides)

    def _skip(self, reason: str, lines: NDArray[np.int64]) -> None:
        if len(lines):
            first = [f"{self.text.path}:{line}" for line in lines[:FIRST].tolist()]
            self.report.skipped[reason] = Skips(len(lines), first)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.rows)

    def lines(self) -> NDArray[np.int64]:
        """Return the line of each pair in its file, from 1, int64 [pairs]."""
        return self.text.lines[self.rows]

    def place(self, index: int) -> str:
        """Return where a pair is from, as ``file:line``."""
        return f"{self.text.path}:{self.text.lines[self.rows[index]]}"
