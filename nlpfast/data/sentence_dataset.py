"""Sentences of one language, one a line: from a file to the batches that a language model is trained on.

Lines are those of `nlpfast.data.lines`, with all its policies. Empty ones, or with nothing but white space,
are skipped, and so are sentences without a token, or with more than the most; all are counted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from nlpfast.data.lines import DataError, ReadReport, read_lines
from nlpfast.data.read_report import FIRST, Skips
from nlpfast.data.sentence_batches import SentenceBatch, make_sentence_batch
from nlpfast.data.subwords import Subwords
from nlpfast.data.token_pairs import TokenLists
from nlpfast.data.translation_batches import IGNORED

__all__ = ["SentenceDataset", "SentenceText", "count_sentence_targets", "read_sentence_text"]


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceText:
    """Sentences, in the order of their file.

    Attributes:
        path: what messages call them.
        sentences: as they are in the file.
        lines: int64 [sentences], the line of each in its file, from 1.
        report: what became of all lines; ``report.used`` is the number of sentences.
    """

    path: str
    sentences: list[str]
    lines: NDArray[np.int64]
    report: ReadReport

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.sentences)

    def part(self, start: int, stop: int, reason: str) -> SentenceText:
        """Return some sentences that follow one another.

        Args:
            start: the first of them, from 0.
            stop: the one after the last.
            reason: why the report says that the others are not used, such as "kept to evaluate on".
        """
        report = copy.deepcopy(self.report)
        _skip(report, reason, np.delete(self.lines, slice(start, stop)))
        return SentenceText(self.path, self.sentences[start:stop], self.lines[start:stop], report)


def read_sentence_text(path: str | Path) -> SentenceText:
    """Read sentences, one a line.

    Args:
        path: UTF-8 text, compressed by gzip or not.

    Raises:
        DataError: the file cannot be read, or has no sentence.
    """
    report = ReadReport(path)
    sentences: list[str] = []
    lines: list[int] = []
    for line in read_lines(path, report):
        if not line.strip():
            report.skip("empty")
            continue
        sentences.append(line)
        lines.append(report.read)
    if not sentences:
        raise DataError(f"{path}: has no sentence ({report}); give a text with one a line")
    return SentenceText(str(path), sentences, np.array(lines, dtype=np.int64), report)


def _skip(report: ReadReport, reason: str, lines: NDArray[np.int64]) -> None:
    if len(lines):
        first = [f"{report.path}:{line}" for line in lines[:FIRST].tolist()]
        report.skipped[reason] = Skips(len(lines), first)


class SentenceDataset(Dataset[list[int]]):
    """Sentences as tokens, for a Trainer with `collate` of this data set.

    Attributes:
        tokens: of the sentences, without special ones.
        report: what became of the lines they are from; None of sentences without a file.
    """

    def __init__(
        self,
        tokens: TokenLists,
        *,
        pad_id: int,
        bos_id: int,
        eos_id: int,
        lines: NDArray[np.int64] | None = None,
        report: ReadReport | None = None,
    ) -> None:
        """Take over the sentences.

        Args:
            tokens: of each, without special ones; a sentence may be empty.
            pad_id: token that fills up batches.
            bos_id: token before the first.
            eos_id: token after the last.
            lines: int64 [sentences], the line of each in its file, for messages; None for their numbers,
                from 1.
            report: of the file.
        """
        self.tokens, self.report = tokens, report
        self._special = {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id}
        self._lines = np.arange(1, len(tokens) + 1) if lines is None else lines

    @classmethod
    def of_text(cls, text: SentenceText, vocabulary: Subwords, max_length: int) -> SentenceDataset:
        """Return the sentences of a text that a model is to read.

        Skipped, counted and named in the report are those without a token, and longer ones than `max_length`.

        Args:
            text: the sentences; its report stays as it is.
            vocabulary: makes tokens of them.
            max_length: the most tokens of a sentence, EOS included, at least 2.

        Raises:
            ValueError: `max_length` is too low.
            DataError: no sentence is left.
        """
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be >= 2, a token and EOS; raise it")
        tokens = TokenLists.of(vocabulary.encode_batch(text.sentences))
        lengths, report = tokens.lengths(), copy.deepcopy(text.report)
        _skip(report, "without tokens", text.lines[lengths == 0])
        _skip(report, f"longer than {max_length:,} tokens with EOS", text.lines[lengths >= max_length])
        kept = np.flatnonzero((lengths > 0) & (lengths < max_length))
        if not len(kept):
            raise DataError(f"{text.path}: no sentence is left ({report}); check the text and max_length")
        special = {name: getattr(vocabulary, name) for name in ("pad_id", "bos_id", "eos_id")}
        return cls(tokens.take(kept), **special, lines=text.lines[kept], report=report)

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> list[int]:
        """Return the tokens of a sentence."""
        begin, end = self.tokens.ends[index : index + 2].tolist()
        found: list[int] = self.tokens.flat[begin:end].tolist()
        return found

    def collate(self, sentences: Sequence[Sequence[int]]) -> SentenceBatch:
        """Return a batch of some of the sentences, without padding.

        Args:
            sentences: items of this data set, at least one.
        """
        return make_sentence_batch(sentences, **self._special)

    def source(self, index: int) -> str:
        """Return where a sentence is from, as ``file:line``."""
        path = "sentences" if self.report is None else self.report.path
        return f"{path}:{self._lines[index]}"


def count_sentence_targets(batch: SentenceBatch) -> int:
    """Return the number of targets that count: tokens and EOS of each sentence."""
    return int((batch.tokens_out != IGNORED).sum())
