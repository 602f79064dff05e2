r"""Sentences and their translations, from two files or from one with columns.

Lines are those of `nlpfast.data.lines`, with all its policies. What is done with pairs of sentences:

    two files           line i of one is the translation of line i of the other; another number of lines is an
                        error, after the last line of the longer file.
    one file            a row has columns with one tab between two of them. Rows may have more columns than
                        are asked for; one with fewer is an error at its line. There is no header: a row of
                        names is a pair like any other.
    empty side          nothing, or nothing but white space: the pair is skipped, and counted. So is an empty
                        row of a file with columns.
    all else            is used as it is. Spaces around a sentence and within it stay, so that translations
                        are scored against the references that the file has.
    no pair to use      is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nlpfast.data.lines import DataError, ReadReport, read_lines, read_lines_together

__all__ = ["ParallelText", "read_parallel_text"]


@dataclasses.dataclass(frozen=True, eq=False)
class ParallelText:
    """Pairs of sentences, in the order of their file.

    Attributes:
        path: what messages call them: the file, of two that of the source.
        source: one side of each pair, as it is in the file.
        target: the other.
        lines: int64 [pairs], the line of each pair in its file, from 1.
        report: what became of all lines; ``report.used`` is the number of pairs.
    """

    path: str
    source: list[str]
    target: list[str]
    lines: NDArray[np.int64]
    report: ReadReport

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.source)

    @classmethod
    def of_sentences(
        cls, source: Sequence[str], target: Sequence[str], path: str = "sentences"
    ) -> ParallelText:
        """Return pairs of sentences that are at hand, as if a file had one in each line.

        Args:
            source: sentences.
            target: their translations, as many.
            path: what messages call them.

        Raises:
            ValueError: the numbers of sentences differ.
            DataError: no pair has two sides.
        """
        if len(source) != len(target):
            rule = "there must be as many; give each sentence its translation"
            raise ValueError(f"target has {len(target)} sentences for the {len(source)} of source; {rule}")
        report = ReadReport(path)
        return _used(_counted(zip(source, target, strict=True), report), report)


def read_parallel_text(
    source: str | Path, target: str | Path | None = None, *, columns: tuple[int, int] = (1, 2)
) -> ParallelText:
    """Read sentences and their translations; the policies are at the top of this module.

    Args:
        source: UTF-8 text, compressed by gzip or not, one sentence a line; without `target` a file with
            columns, separated by tabs.
        target: the translation of each line of `source`.
        columns: where source and target are in a file with columns, counted from 1.

    Raises:
        ValueError: `columns` are not two different numbers from 1 on.
        DataError: a file cannot be read, the files differ in their number of lines, a row lacks a column, or
            there is no pair to use; names file and line.
    """
    if min(columns) < 1 or columns[0] == columns[1]:
        raise ValueError(f"columns={columns} must be two different numbers from 1 on; name source and target")
    report = ReadReport(source)
    if target is not None:
        rows = read_lines_together((source, target), report)
        return _used(((first, second) for first, second in rows), report)
    return _used(_cells(source, columns, report), report)


def _cells(path: str | Path, columns: tuple[int, int], report: ReadReport) -> Iterator[tuple[str, str]]:
    """Yield the two columns of each row."""
    needed = max(columns)
    first, second = (column - 1 for column in columns)
    for row in read_lines(path, report):
        if not row.strip():
            yield "", ""
            continue
        cells = row.split("\t")
        if len(cells) < needed:
            has = f"has {len(cells)} column{'s' * (len(cells) != 1)}"
            rule = f"the pair is in columns {columns[0]} and {columns[1]}; separate columns by one tab each"
            raise DataError(f"{path}:{report.read}: {has}, {rule}")
        yield cells[first], cells[second]


def _counted(pairs: Iterable[tuple[str, str]], report: ReadReport) -> Iterator[tuple[str, str]]:
    """Yield pairs, each counted as a line before it is given out."""
    for pair in pairs:
        report.read += 1
        yield pair


def _used(pairs: Iterable[tuple[str, str]], report: ReadReport) -> ParallelText:
    """Return the pairs of which both sides have something to read.

    Args:
        pairs: the sides of each line, of which `report` has counted no more than it has given out.
        report: counts those that are skipped.
    """
    sources: list[str] = []
    targets: list[str] = []
    lines: list[int] = []
    for source, target in pairs:
        if empty := [name for name, side in (("source", source), ("target", target)) if not side.strip()]:
            report.skip("with two empty sides" if len(empty) == 2 else f"with an empty {empty[0]}")
            continue
        sources.append(source)
        targets.append(target)
        lines.append(report.read)
    if not sources:
        raise DataError(f"{report.path}: has no pair with two sides ({report}); give a text that has some")
    return ParallelText(report.path, sources, targets, np.array(lines, dtype=np.int64), report)
