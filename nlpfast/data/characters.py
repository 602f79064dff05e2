"""Text files as characters, for language models: encoded once, and mapped into memory ever after."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nlpfast.data import token_cache
from nlpfast.data.lines import DataError, file_digest, text_blocks
from nlpfast.data.read_report import ReadReport
from nlpfast.data.text import CharVocabulary, code_points, line_of
from nlpfast.data.token_cache import Tokens

__all__ = ["CharCorpus", "read_characters"]

# part of the key of a cache entry; another number makes all entries be built again
_FORMAT = 1

_CODE_POINTS = 0x110000


@dataclasses.dataclass(frozen=True, eq=False)
class CharCorpus:
    """The characters of a file.

    Attributes:
        path: the file.
        vocabulary: all its characters, sorted by code point.
        tokens: the number of each character in the vocabulary; read-only, of the smallest unsigned type,
            a map of a file as a rule.
        digest: SHA-256 of the file's bytes, in hexadecimal.
        report: the number of its lines, all of them used.
    """

    path: str
    vocabulary: CharVocabulary
    tokens: Tokens
    digest: str
    report: ReadReport

    def source(self, position: int) -> str:
        """Return where a character is from, as ``file:line``, for messages.

        Args:
            position: its place in `tokens`, from 0.
        """
        return f"{self.path}:{line_of(self.tokens, position, self.vocabulary)}"


def read_characters(path: str | Path, *, cache_dir: str | Path | None = None) -> CharCorpus:
    """Read the exact text of a file as numbers of its characters, without ever holding it in memory.

    The same as `read_text`, ``CharVocabulary.from_text`` and ``encode``. The first time the file is read
    three times and its numbers are kept in the cache, which `nlpfast.data.token_cache` describes; as long as
    the file is the same, it is then read once, to find that it is.

    Args:
        path: UTF-8 text, compressed by gzip or not; policies are at the top of `nlpfast.data.lines`.
        cache_dir: the cache's folder; None is `nlpfast` in $XDG_CACHE_HOME or `~/.cache`.

    Raises:
        DataError: what `read_text` raises, or the file changes in the meantime, or it is a pipe.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise DataError(
            f"{path}: is not a regular file, and is read more than once; write it to a file first"
        )
    folder = token_cache.default_folder() if cache_dir is None else Path(cache_dir)
    digest = file_digest(path)
    key = f"characters-{_FORMAT}-{digest}"
    entry = token_cache.load(key, folder)
    if entry is None:
        notes, count = _scan(path, digest)
        chars = notes["characters"]
        dtype = np.min_scalar_type(len(chars) - 1).newbyteorder("<").str
        blocks = functools.partial(_encoded, path, digest, chars, dtype)
        entry = token_cache.store(key, notes, dtype, count, blocks, folder)
    report = ReadReport(path)
    report.read = entry.notes["lines"]
    report.byte_order_marks = entry.notes["byte_order_marks"]
    return CharCorpus(str(path), CharVocabulary(entry.notes["characters"]), entry.tokens, digest, report)


def _unchanged_text(path: str | Path, digest: str, report: ReadReport | None = None) -> Iterator[str]:
    now = hashlib.sha256()
    yield from text_blocks(path, report, tap=now.update)
    if now.hexdigest() != digest:
        raise DataError(f"{path}: changed while it was read; start again when it is complete")


def _scan(path: str | Path, digest: str) -> tuple[dict[str, Any], int]:
    """Return what the cache notes of a text, and the number of its characters."""
    report = ReadReport(path)
    seen = np.zeros(_CODE_POINTS, dtype=np.bool_)
    count = newlines = 0
    text = ""
    for text in _unchanged_text(path, digest, report):
        seen[code_points(text)] = True
        count += len(text)
        newlines += text.count("\n")
    notes = {
        "characters": "".join(map(chr, np.flatnonzero(seen).tolist())),
        "lines": newlines + (not text.endswith("\n")),
        "byte_order_marks": report.byte_order_marks,
    }
    return notes, count


def _encoded(path: str | Path, digest: str, chars: str, dtype: str) -> Iterator[Tokens]:
    numbers = np.zeros(_CODE_POINTS, dtype=dtype)
    numbers[code_points(chars)] = np.arange(len(chars))
    for text in _unchanged_text(path, digest):
        yield numbers[code_points(text)]
