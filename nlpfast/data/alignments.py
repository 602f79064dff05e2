r"""Word alignments in files: Pharaoh format, and gold standards with sure and possible links.

A file has one line a sentence; a line has one link per word pair, source position before target position:

    line   = [ link { " " link } [ " " ] ] [ "\r" ] "\n"
    link   = number "-" number
    number = one to six digits of 0..9

An empty line is a sentence without links. The one space at the end is what programs leave that print each
link with a space after it, and "\r" is what Windows leaves; both mean nothing. Everything else is an error:
signs, other digits, tabs, two spaces in a row, a lone space. A gold standard may mark a link as possible
instead of sure, by "p" (neulab, lilt) or "?" (CMU) in the place of "-".

An alignment is a set of links, so that one which comes twice in a line counts once, and is sure if one of the
two is. (fairseq keeps both, which gives the link twice the weight.) How many were dropped is in `duplicates`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Set, Sized
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nlpfast.data.lines import DataError, read_lines, unequal_lengths

__all__ = ["MAX_DIGITS", "Alignments", "Link", "check_same_length", "format_links", "read_alignments"]

# Positions of a source and a target word, both from 0.
Link = tuple[int, int]

# A sentence has less than a million words; more digits are damage, and would overflow sooner or later.
MAX_DIGITS = 6

_NUMBER = f"[0-9]{{1,{MAX_DIGITS}}}"
_SURE = re.compile(f"{_NUMBER}-{_NUMBER}")
_ANY = re.compile(f"{_NUMBER}[-p?]{_NUMBER}")
_SEPARATORS = str.maketrans("-p?", "   ")


@dataclasses.dataclass(frozen=True, eq=False)
class Alignments:
    """The links of a corpus, sentence after sentence, in the order of the file.

    Attributes:
        path: the file, for messages.
        pairs: int32 [N, 2], source and target position of each link, from 0.
        sure: bool [N], False for a possible link.
        ends: int64 [sentences + 1]; links ends[i] to ends[i + 1] belong to sentence i.
        duplicates: links that were dropped because their line has them already.
    """

    path: str
    pairs: NDArray[np.int32]
    sure: NDArray[np.bool_]
    ends: NDArray[np.int64]
    duplicates: int = 0

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.ends) - 1

    def links(self) -> list[set[Link]]:
        """Return the links of each sentence, sure and possible."""
        return self._sets(self.pairs, self.ends)

    def sure_links(self) -> list[set[Link]]:
        """Return the sure links of each sentence."""
        before = np.concatenate(([0], np.cumsum(self.sure)))
        return self._sets(self.pairs[self.sure], before[self.ends])

    def swapped(self) -> Alignments:
        """Return the same links with source and target exchanged."""
        return dataclasses.replace(self, pairs=np.ascontiguousarray(self.pairs[:, ::-1]))

    @staticmethod
    def _sets(pairs: NDArray[np.int32], ends: NDArray[np.int64]) -> list[set[Link]]:
        links = list(map(tuple, pairs.tolist()))
        return [set(links[a:b]) for a, b in itertools.pairwise(ends.tolist())]

    @classmethod
    def from_links(cls, sentences: Iterable[Iterable[Link]], path: str = "alignments") -> Alignments:
        """Return the alignments of sentences whose links are at hand, all of them sure.

        Args:
            sentences: for each the links; one that comes twice counts once.
            path: what messages call them.

        Raises:
            DataError: a position is negative or has more than six digits; names sentence and link.
        """
        # a dict keeps the order
        lists = [list(dict.fromkeys(links)) for links in sentences]
        for number, links in enumerate(lists, 1):
            for link in links:
                if not all(0 <= position < 10**MAX_DIGITS for position in link):
                    reason = f"positions are 0..{10**MAX_DIGITS - 1}; repair the link"
                    raise DataError(f"{path}:{number}: link {link[0]}-{link[1]}: {reason}")
        pairs = np.array([link for links in lists for link in links], dtype=np.int32).reshape(-1, 2)
        ends = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return cls(path, pairs, np.ones(len(pairs), dtype=np.bool_), ends)


def read_alignments(path: str | Path, *, one_based: bool = False, possible: bool = False) -> Alignments:
    """Read word alignments in Pharaoh format; the grammar is at the top of this module.

    For all that is no matter of the grammar see `nlpfast.data.lines`.

    Args:
        path: the file.
        one_based: words are counted from 1 in the file, and from 0 in the result.
        possible: the file is a gold standard, which may have possible links.

    Returns:
        The links of every line, each once.

    Raises:
        DataError: with ``file:line:column: reason`` for the first thing that the grammar does not allow,
            or a 0 where words are counted from 1; and what `read_lines` raises.
    """
    lines = list(read_lines(path))
    link = _ANY if possible else _SURE
    fits = re.compile(rf"(?:{link.pattern}(?: {link.pattern})* ?)?").fullmatch
    for number, line in enumerate(lines, 1):
        if fits(line) is None:
            column, reason = _fault(line, link)
            raise DataError(f"{path}:{number}:{column}: {reason}")
    text = "\n".join(lines)
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    marks = codes[(codes == ord("-")) | (codes == ord("p")) | (codes == ord("?"))]
    positions = list(map(int, text.translate(_SEPARATORS).split()))
    pairs = np.array(positions, dtype=np.int32).reshape(-1, 2)
    counts = np.array([line.count("-") + line.count("p") + line.count("?") for line in lines], dtype=np.int64)
    sentence = np.repeat(np.arange(len(lines)), counts)
    if one_based:
        pairs -= 1
        negative = (pairs < 0).any(axis=1)
        if negative.any():
            _raise_zero(path, lines, int(sentence[negative.argmax()]))
    sure = marks == ord("-")
    kept = _first_of_each(sentence, pairs, sure)
    ends = np.concatenate(([0], np.cumsum(np.bincount(sentence[kept], minlength=len(lines)))))
    return Alignments(str(path), pairs[kept], sure[kept], ends.astype(np.int64), len(pairs) - len(kept))


def format_links(links: Set[Link]) -> str:
    """Return the links of a sentence as a line of Pharaoh format, sorted by source, then target position.

    Args:
        links: source and target positions, from 0.

    Returns:
        The line without its end; empty without links.
    """
    return " ".join(f"{source}-{target}" for source, target in sorted(links))


def check_same_length(first: str, lines: Sized, second: str, others: Sized) -> None:
    """Raise unless two files that belong together line by line have as many lines.

    Args:
        first: name of one file.
        lines: its lines, or what became of them.
        second: name of the other.
        others: its lines.

    Raises:
        DataError: they have not; names both and their numbers of lines.
    """
    if len(lines) != len(others):
        raise unequal_lengths([(first, len(lines)), (second, len(others))])


def _first_of_each(
    sentence: NDArray[np.int64], pairs: NDArray[np.int32], sure: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return which links to keep, in order: of equal ones in a sentence the first that is sure, if any."""
    place = pairs[:, 0].astype(np.int64) * 10**MAX_DIGITS + pairs[:, 1]
    order = np.lexsort((~sure, place, sentence))
    sentence, place = sentence[order], place[order]
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (sentence[1:] != sentence[:-1]) | (place[1:] != place[:-1])
    return np.sort(order[first])


def _raise_zero(path: str | Path, lines: list[str], sentence: int) -> None:
    fields = re.finditer(r"[0-9]+[-p?][0-9]+", lines[sentence])
    field = next(field for field in fields if 0 in map(int, re.split("[-p?]", field[0])))
    place = f"{path}:{sentence + 1}:{field.start() + 1}"
    raise DataError(f"{place}: {field[0]} has word 0, where words count from 1; read the file as 0-based")


def _fault(line: str, link: re.Pattern[str]) -> tuple[int, str]:
    """Return the column, from 1, of the first thing in a line that is not allowed, and the reason."""
    column, fields = 1, line.split(" ")
    for index, field in enumerate(fields):
        ends_line = 0 < index == len(fields) - 1
        if not field and ends_line and fields[index - 1]:
            break
        if not field:
            return column, "a space too many: put one between two links, and at most one at the end"
        if link.fullmatch(field) is None:
            return column, _link_fault(field)
        column += len(field) + 1
    raise AssertionError(f"no fault in {line!r}")


def _link_fault(field: str) -> str:
    shown = repr(field if len(field) <= 40 else field[:40] + "...")
    if re.fullmatch("[0-9]+[-p?][0-9]+", field):
        if _ANY.fullmatch(field):
            return f"{shown} is a possible link, which only a gold standard has; write '-' or remove it"
        return f"{shown} has a number of more than {MAX_DIGITS} digits; check what wrote the file"
    return f"{shown} is not a link; write source-target, two numbers such as 0-3"
