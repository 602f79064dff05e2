r"""The one reader of text files: what every corpus does with every kind of damage.

A file is read as bytes, in blocks, so that a corpus may be larger than memory. An error is a DataError,
``file:line: reason; fix``, with lines counted from 1; of several the first in the file. What is before it has
been given out by then.

    end of a line       \n and nothing else. \r, \v, \f, U+0085, U+2028 and U+2029 are characters.
    last line           counts, whether a \n is after it or not.
    \r\n                lines lose one \r at their end, the last line too. In exact text (`text_blocks`,
                        `read_text`, `read_characters`) the \r stays.
    empty line          is given out like any other. A corpus that cannot use it skips it by
                        ``ReadReport.skip``, with a reason, and so it is counted.
    long line           more than MAX_LINE characters (\r included) are an error at that line: the file is
                        binary, or its lines end in something else. Exact text has no such limit, and texts
                        of one long line are common there.
    byte order mark     one at the start of the file is taken off, and the report says so. Elsewhere U+FEFF is
                        a character.
    bytes not UTF-8     an error at their line; overlong forms and surrogates are not UTF-8.
    NUL                 an error at its line; it is the mark of a binary or UTF-16 file.
    empty file          an error. So is a file with nothing but a byte order mark.
    gzip                is known by its first two bytes, whatever the file is called, and read. Several parts
                        one after another are one text; zeros after the last mean nothing.
    gzip cut short      an error at the line in which the data ends; the message has the last whole line.
    gzip damaged        the same at the line in which the damage is noticed, which is not before it happened:
                        a wrong checksum is noticed at the end.
    no such file, a folder, no permission, an error of the disk: an error with the file's name.
    several files, line i of one belonging to line i of the others: as many lines each, or an error with all
                        names and counts, after the last line of the longest.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from nlpfast.data.read_report import ReadReport

__all__ = [
    "MAX_LINE",
    "DataError",
    "ReadReport",
    "file_digest",
    "read_lines",
    "read_lines_together",
    "text_blocks",
    "unequal_lengths",
]

# Longer than the longest novel on one line. A line takes at most four times that in bytes, and as the
# longest line bounds the memory, a damaged file must not.
MAX_LINE = 8 << 20

# bytes read at a time
BLOCK = 1 << 18

# compressed bytes at a time; each can become a thousand
GZIP_BLOCK = 1 << 13

_GZIP = zlib.MAX_WBITS | 16


class DataError(ValueError):
    """Say what is wrong with a user's data, in one line; the command line exits with 65 on it."""


@contextlib.contextmanager
def _data_errors(path: str | Path) -> Iterator[None]:
    """Turn what the system says about a file into a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; give a text file") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be read ({reason}); check its permissions") from None


def _file_blocks(path: str | Path, tap: Callable[[bytes], None] | None) -> Iterator[bytes]:
    with _data_errors(path), Path(path).open("rb") as file:
        while block := file.read(BLOCK):
            if tap is not None:
                tap(block)
            yield block


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Args:
        path: the file; a compressed one is not unpacked.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    for _ in _file_blocks(path, digest.update):
        pass
    return digest.hexdigest()


class _GzipError(Exception):
    """Gzip data that cannot be unpacked any further."""


def _unpacked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what gzip data holds, none of it empty; if a byte of the data is wrong, all that is before it."""
    member = zlib.decompressobj(_GZIP)
    for block in blocks:
        for start in range(0, len(block), GZIP_BLOCK):
            data = block[start : start + GZIP_BLOCK]
            while data:
                if member.eof:
                    data = data.lstrip(b"\0")
                    member = zlib.decompressobj(_GZIP) if data else member
                    continue
                before = member.copy()
                try:
                    content = member.decompress(data)
                except zlib.error as error:
                    yield from filter(None, _before_damage(before, data))
                    raise _GzipError(f"is damaged ({error})") from None
                if content:
                    yield content
                data = member.unused_data
    if not member.eof:
        raise _GzipError("is cut short")


def _before_damage(member: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    with contextlib.suppress(zlib.error):
        for byte in data:
            yield member.decompress(bytes((byte,)))


def _decoded(path: str | Path, tap: Callable[[bytes], None] | None) -> Iterator[str]:
    """Yield the text of a file; before the error, if there is one, all that is before its place."""
    blocks = _file_blocks(path, tap)
    first = next(blocks, b"")
    blocks = itertools.chain((first,), blocks)
    if first.startswith(b"\x1f\x8b"):
        blocks = _unpacked(blocks)
    decode = codecs.getincrementaldecoder("utf-8")().decode
    line, reason, block = 1, None, b"more"
    while block and reason is None:
        try:
            block = next(blocks, b"")
            text = decode(block, final=not block)
        except _GzipError as error:
            text = ""
            reason = f"the gzip data {error} here, after {line - 1} whole lines; get or compress it again"
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode("utf-8")
            bad = error.object[error.start]
            reason = f"byte 0x{bad:02x} is not UTF-8 ({error.reason}); convert the file to UTF-8"
        nul = text.find("\0")
        if nul >= 0:
            text = text[:nul]
            reason = "NUL byte; this is not a UTF-8 text file, convert it or remove the byte"
        line += text.count("\n")
        yield text
    if reason is not None:
        raise DataError(f"{path}:{line}: {reason}")


def text_blocks(
    path: str | Path, report: ReadReport | None = None, *, tap: Callable[[bytes], None] | None = None
) -> Iterator[str]:
    r"""Yield the exact text of a file, piece by piece; the policies are at the top of this module.

    Args:
        path: UTF-8 text, compressed by gzip or not.
        report: a byte order mark is counted here, and nothing else.
        tap: is given the bytes of the file, as they are; ``hashlib.sha256().update`` for example.

    Yields:
        Pieces of at least one character; put together they are the text, \r\n and all.

    Raises:
        DataError: the text is empty, damaged or not to be had.
    """
    start = empty = True
    for text in _decoded(path, tap):
        if start and text:
            start = False
            if text.startswith("\ufeff"):
                text = text[1:]
                if report is not None:
                    report.byte_order_marks += 1
        if text:
            empty = False
            yield text
    if empty:
        raise DataError(f"{path}: the file is empty; give a file with text")


def read_lines(path: str | Path, report: ReadReport | None = None) -> Iterator[str]:
    r"""Yield the lines of a file without their ends; the policies are at the top of this module.

    Args:
        path: UTF-8 text, compressed by gzip or not.
        report: counts each line before it is given out, so that ``report.read`` is its number, and
            ``report.skip(reason)`` says that it is not used.

    Yields:
        Each line without its \n or \r\n, empty ones too.

    Raises:
        DataError: the text is empty, damaged or not to be had, or a line is longer than MAX_LINE.
    """
    report = ReadReport(path) if report is None else report
    rest = ""
    for text in text_blocks(path, report):
        lines = text.split("\n")
        lines[0] = rest + lines[0]
        rest = lines.pop()
        for line in lines:
            report.read += 1
            if len(line) > MAX_LINE:
                raise _long_line(path, report.read)
            yield line.removesuffix("\r")
        if len(rest) > MAX_LINE:
            report.read += 1
            raise _long_line(path, report.read)
    if rest:
        report.read += 1
        yield rest.removesuffix("\r")


def _long_line(path: str | Path, line: int) -> DataError:
    reason = rf"the line has more than {MAX_LINE:,} characters; lines end at \n, so check what wrote the file"
    return DataError(f"{path}:{line}: {reason}")


def read_lines_together(
    paths: Sequence[str | Path], report: ReadReport | None = None
) -> Iterator[tuple[str, ...]]:
    """Yield line i of each of several files, for all i.

    Args:
        paths: the files; each is read as `read_lines` does.
        report: counts lines as one, whatever the number of files.

    Yields:
        One line of each file, in the order of `paths`.

    Raises:
        DataError: the files differ in their number of lines; after all their lines have been counted, and
            after the lines that all of them have were given out. And what `read_lines` raises.
    """
    report = ReadReport(paths[0]) if report is None else report
    sides = [ReadReport(path) for path in paths]
    complete = True
    for row in itertools.zip_longest(*map(read_lines, paths, sides)):
        # a file that has ended gives None from there on
        complete = None not in row
        if complete:
            report.read += 1
            report.byte_order_marks = sum(side.byte_order_marks for side in sides)
            yield cast("tuple[str, ...]", row)
    if not complete:
        raise unequal_lengths([(side.path, side.read) for side in sides])


def unequal_lengths(counts: Sequence[tuple[str, int]]) -> DataError:
    """Return the error of files that belong together line by line, and differ in their number of lines.

    Args:
        counts: name and number of lines of each.
    """
    first, *others = (f"{name} has {count}" for name, count in counts)
    each = ", ".join((f"{first} lines", *others))
    return DataError(f"{each}: line i of one belongs to line i of the other; find the line too many")
