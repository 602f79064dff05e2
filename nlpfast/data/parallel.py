"""Parallel text, and word alignments as the pairs that supervise a batch's attention.

Shapes: B sentences in a batch, T target rows, S source columns (lengths with EOS, padding included), P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlpfast.data.alignments import Alignments, check_same_length
from nlpfast.data.lines import read_lines_together

__all__ = ["AlignmentPairs", "AlignmentReport", "Skipped", "read_parallel"]


def read_parallel(source: str | Path, target: str | Path) -> tuple[list[list[str]], list[list[str]]]:
    r"""Read two files of which line i of one is the translation of line i of the other.

    Words are what spaces and tabs separate, as aligners count them; a no-break space is part of a word. For
    all else see `nlpfast.data.lines`.

    Args:
        source: UTF-8 text, one sentence a line, already in words or subwords.
        target: the same.

    Returns:
        The words of each source line, and of each target line; empty lists for empty lines.

    Raises:
        DataError: the files differ in their number of lines, or one cannot be read.
    """
    sides: tuple[list[list[str]], list[list[str]]] = [], []
    for row in read_lines_together((source, target)):
        for line, side in zip(row, sides, strict=True):
            side.append([word for word in line.replace("\t", " ").split(" ") if word])
    return sides


class Skipped(NamedTuple):
    """A sentence that gives no pairs.

    Attributes:
        line: its line in the alignment file, from 1.
        reason: why.
    """

    line: int
    reason: str


class AlignmentReport(NamedTuple):
    """How many sentences of an alignment file supervise attention, and what became of the others.

    Attributes:
        path: the alignment file.
        read: sentences of the file.
        empty: sentences of the file that have no links; they are used, and give no pairs.
        skipped: sentences with a link out of range.
    """

    path: str
    read: int
    empty: int
    skipped: tuple[Skipped, ...]

    @property
    def used(self) -> int:
        """Return the number of sentences that were not skipped."""
        return self.read - len(self.skipped)

    def __str__(self) -> str:
        """Return the counts in one line, with the first sentence that was skipped."""
        text = f"{self.path}: {self.used} of {self.read} alignments used, {self.empty} of them without links"
        if not self.skipped:
            return text
        line, reason = self.skipped[0]
        return f"{text}; {len(self.skipped)} skipped, the first {self.path}:{line}: {reason}"


class AlignmentPairs:
    """The alignments of a corpus, checked once, from which each batch takes its pairs.

    A sentence with a link to or beyond the EOS of a side gives no pairs at all, as in fairseq: its links were
    made for another text. It stays in the corpus for every other loss.

    Attributes:
        report: how many sentences are used, and which are not.
    """

    def __init__(
        self, alignments: Alignments, source_lengths: Sequence[int], target_lengths: Sequence[int]
    ) -> None:
        """Check every link against the length of its sentence.

        Args:
            alignments: one entry a sentence; possible links count like sure ones.
            source_lengths: tokens of each source sentence, EOS included, so at least 1.
            target_lengths: the same of each target sentence.

        Raises:
            DataError: another number of sentences than of alignments.
            ValueError: a length below 1.
        """
        self._source = _lengths("source_lengths", source_lengths)
        self._target = _lengths("target_lengths", target_lengths)
        check_same_length(alignments.path, alignments, "the source text", self._source)
        check_same_length(alignments.path, alignments, "the target text", self._target)
        self._pairs = alignments.pairs.astype(np.int64)
        self._starts = alignments.ends[:-1]
        links = np.diff(alignments.ends)
        sentence = np.repeat(np.arange(len(alignments)), links)
        # the position of EOS itself cannot be aligned
        limits = np.stack((self._source[sentence], self._target[sentence]), axis=1) - 1
        outside = np.flatnonzero((self._pairs >= limits).any(axis=1))
        bad, first = np.unique(sentence[outside], return_index=True)
        skipped = []
        for index, link in zip(bad.tolist(), outside[first].tolist(), strict=True):
            (source, target), (s, t) = self._pairs[link].tolist(), limits[link].tolist()
            reason = f"link {source}-{target} is out of range: source has {s} tokens and EOS, target {t}"
            skipped.append(Skipped(index + 1, reason))
        self._counts = links.copy()
        self._counts[bad] = 0
        empty = int((links == 0).sum())
        self.report = AlignmentReport(alignments.path, len(alignments), empty, tuple(skipped))

    def batch(
        self,
        sentences: Sequence[int],
        *,
        source_width: int | None = None,
        target_width: int | None = None,
        left_pad_source: bool = False,
        left_pad_target: bool = False,
    ) -> Tensor:
        """Return the pairs of a batch, as `nlpfast.alignment_loss` takes them; its weights are the default.

        Row t of the decoder is the step that predicts target token t, and its attention should be at column s
        for a link (s, t); LabelSmoothedCrossEntropyWithAlignment can take the step after instead, which there
        always is. Left padding moves rows by T - length and columns by S - length.

        Args:
            sentences: number of each sentence of the batch in the corpus, from 0.
            source_width: S; None is the longest source sentence of the batch.
            target_width: T; None is the longest target sentence of the batch.
            left_pad_source: padding of the source is before its tokens, not after them.
            left_pad_target: the same of the target.

        Returns:
            int64 [P, 3]: batch entry, target row, source column, sentence after sentence; P may be 0.

        Raises:
            IndexError: no such sentence.
            ValueError: a sentence is longer than the width given.
        """
        chosen = np.asarray(sentences, dtype=np.int64).reshape(-1)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self._counts)):
            raise IndexError(f"sentences names {chosen.tolist()}; there are 0..{len(self._counts) - 1}")
        counts = self._counts[chosen]
        before = np.cumsum(counts) - counts
        link = np.arange(counts.sum()) + np.repeat(self._starts[chosen] - before, counts)
        entry = np.repeat(np.arange(len(chosen)), counts)
        columns, rows = self._pairs[link].T
        target_padding = _padding("target", self._target[chosen], target_width)
        source_padding = _padding("source", self._source[chosen], source_width)
        if left_pad_target:
            rows = rows + target_padding[entry]
        if left_pad_source:
            columns = columns + source_padding[entry]
        return torch.from_numpy(np.stack((entry, rows, columns), axis=1))


def _lengths(name: str, lengths: Sequence[int]) -> NDArray[np.int64]:
    values = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if len(values) and values.min() < 1:
        where = int(values.argmin())
        raise ValueError(f"{name}[{where}] is {values[where]}, must be >= 1: count EOS with the tokens")
    return values


def _padding(side: str, lengths: NDArray[np.int64], width: int | None) -> NDArray[np.int64]:
    """Return the padding tokens of each sentence."""
    longest = int(lengths.max(initial=0))
    if width is not None and width < longest:
        raise ValueError(f"{side}_width={width} is less than the {longest} tokens of a sentence in the batch")
    return (longest if width is None else width) - lengths
