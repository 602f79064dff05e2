"""Documents of sentences: a sentence a line, and blank lines between documents, as BERT is pretrained on.

The order of sentences matters, so documents are not mixed: what follows a sentence in its document is what
next sentence prediction asks about.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nlpfast.data.biographies import biographies
from nlpfast.data.lines import DataError, ReadReport, read_lines

__all__ = [
    "Document",
    "EncodedDocuments",
    "PieceTokenizer",
    "embedded_documents",
    "encode_documents",
    "read_documents_of_sentences",
]

_BETWEEN_SENTENCES = re.compile(r"(?<=\.) ")
# Sentences that are encoded at a time, which bounds the memory for lists of numbers.
_ENCODED = 1024


class Document(list[str]):
    """The sentences of a document, in their order.

    Attributes:
        line: line of the file that the first sentence is in; each other one is in the line after the one
            before it.
    """

    __slots__ = ("line",)

    def __init__(self, sentences: Iterable[str], line: int) -> None:
        """Keep the sentences.

        Args:
            sentences: of the document.
            line: of the first one, from 1 on.
        """
        super().__init__(sentences)
        self.line = line


def read_documents_of_sentences(path: str | Path) -> tuple[list[Document], ReadReport]:
    """Read documents, a sentence a line, with one or more blank lines between two of them.

    A line of nothing but white space is blank. Blank lines at the beginning and at the end mean nothing.

    Args:
        path: UTF-8 text; the policies are those of `nlpfast.data.lines`.

    Returns:
        The documents, each with at least one sentence, and what became of the lines: blank ones are skipped.

    Raises:
        DataError: the file cannot be read, or has no sentence.
    """
    report = ReadReport(path)
    documents: list[Document] = []
    between = True
    for line in read_lines(path, report):
        if not line or line.isspace():
            report.skip("blank")
            between = True
            continue
        if between:
            documents.append(Document((), report.read))
            between = False
        documents[-1].append(line)
    if not documents:
        raise DataError(f"{path}: has no sentence; give one a line, with blank lines between documents")
    return documents, report


def embedded_documents(n: int, seed: int = 0) -> list[Document]:
    """Return the biographies of invented people, each a document of two or three sentences.

    Args:
        n: people, 0 up to more than 30,000.
        seed: chooses them.

    Returns:
        The documents, with the lines that they would have in a file with one blank line between two of them.

    Raises:
        ValueError: `n` is negative, or larger than the number of names.
    """
    documents, line = [], 1
    for biography in biographies(n, seed):
        documents.append(Document(_BETWEEN_SENTENCES.split(biography), line))
        line += len(documents[-1]) + 1
    return documents


class PieceTokenizer(Protocol):
    """What is asked of a tokenizer."""

    def __len__(self) -> int:
        """Return the number of pieces, special ones among them."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of the pieces of each text, without special ones around them."""

    @property
    def cls_id(self) -> int:
        """Return the number of [CLS]."""

    @property
    def sep_id(self) -> int:
        """Return the number of [SEP]."""

    @property
    def mask_id(self) -> int:
        """Return the number of [MASK]."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Return the numbers of all special pieces, which are never targets."""

    @property
    def continues(self) -> Sequence[bool]:
        """Return for each piece whether it goes on with the word of the piece before it."""


class EncodedDocuments(NamedTuple):
    """The pieces of S sentences in D documents, N pieces together, without lists: 4 bytes a piece.

    Attributes:
        pieces: int32 [N].
        offsets: int64 [S + 1], sentence i is ``pieces[offsets[i]:offsets[i + 1]]``.
        documents: int64 [D + 1], document d is the sentences from ``documents[d]`` to ``documents[d + 1]``.
        lines: int64 [S], the line of each sentence.
        truncated: how many sentences were cut.
        left_out: how many are not here, as all their pieces are special, or they have none.
    """

    pieces: NDArray[np.int32]
    offsets: NDArray[np.int64]
    documents: NDArray[np.int64]
    lines: NDArray[np.int64]
    truncated: int
    left_out: int


def encode_documents(
    documents: Iterable[Sequence[str]], tokenizer: PieceTokenizer, longest: int
) -> EncodedDocuments:
    """Return the pieces of documents; a document of which nothing is left does not count.

    Args:
        documents: sentences of each. One that is no `Document` has the lines that it would have in a file
            with one blank line between two documents.
        tokenizer: makes pieces of them.
        longest: the most pieces of a sentence; what is after them is cut off.
    """
    pieces, offsets, lines, numbers = array("i"), array("q", [0]), array("q"), array("q")
    truncated = left_out = 0
    special = tokenizer.special_ids
    sentences = _sentences(documents)
    while chunk := list(itertools.islice(sentences, _ENCODED)):
        rows = tokenizer.encode_batch([text for _, _, text in chunk])
        for (number, line, _), row in zip(chunk, rows, strict=True):
            cut = row[:longest]
            if special.issuperset(cut):
                left_out += 1
                continue
            truncated += len(row) > longest
            pieces.extend(cut)
            offsets.append(len(pieces))
            lines.append(line)
            numbers.append(number)
    sizes = np.bincount(np.asarray(numbers))
    return EncodedDocuments(
        pieces=np.asarray(pieces),
        offsets=np.asarray(offsets),
        documents=np.concatenate(([0], sizes[sizes > 0].cumsum())),
        lines=np.asarray(lines),
        truncated=truncated,
        left_out=left_out,
    )


def _sentences(documents: Iterable[Sequence[str]]) -> Iterator[tuple[int, int, str]]:
    """Yield the number of the document, the line and the text of each sentence."""
    first = 1
    for number, document in enumerate(documents):
        if isinstance(document, Document):
            first = document.line
        for place, text in enumerate(document):
            yield number, first + place, text
        first += len(document) + 1
