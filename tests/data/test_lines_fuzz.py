"""A million generated lines, with every kind of damage: the outcome is that of a slow definition.

The definition works on whole files and one line, character or byte at a time, without a decoder: UTF-8 is the
grammar of RFC 3629. An outcome is the lines and the error after them, with its line and kind.
"""

import functools
import gzip
import io
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nlpfast.data import lines
from nlpfast.data.lines import DataError, read_lines, text_blocks
from nlpfast.data.read_report import ReadReport

LINES = 1_000_000
LIMIT = 150
BOM = b"\xef\xbb\xbf"

TAIL = rb"[\x80-\xbf]"
# NUL is UTF-8, and not allowed
ALLOWED = (
    rb"[\x01-\x7f]|[\xc2-\xdf]%(t)s|\xe0[\xa0-\xbf]%(t)s|[\xe1-\xec\xee\xef]%(t)s%(t)s|\xed[\x80-\x9f]%(t)s|"
    rb"\xf0[\x90-\xbf]%(t)s%(t)s|[\xf1-\xf3]%(t)s%(t)s%(t)s|\xf4[\x80-\x8f]%(t)s%(t)s"
) % {b"t": TAIL}
BEGUN = (
    rb"[\xc2-\xdf]|\xe0[\xa0-\xbf]?|[\xe1-\xec\xee\xef]%(t)s?|\xed[\x80-\x9f]?|"
    rb"\xf0(?:[\x90-\xbf]%(t)s?)?|[\xf1-\xf3]%(t)s?%(t)s?|\xf4(?:[\x80-\x8f]%(t)s?)?"
) % {b"t": TAIL}
character, valid, begun = re.compile(ALLOWED), re.compile(rb"(?:%s)*" % ALLOWED), re.compile(BEGUN)


@functools.cache
def decoded(sequence):
    """One character by the arithmetic of UTF-8."""
    if len(sequence) == 1:
        return chr(sequence[0])
    code = sequence[0] & (0x7F >> len(sequence))
    for byte in sequence[1:]:
        code = code << 6 | byte & 0x3F
    return chr(code)


def fault(line, limit, unfinished):
    """The characters of a line, and the kind of the first thing that is wrong, or None."""
    end = valid.match(line).end()
    characters = character.findall(line[:end])
    if limit is not None and len(characters) > limit:
        return "", "more than"
    text = "".join(map(decoded, characters))
    rest = line[end:]
    if not rest or (unfinished and begun.fullmatch(rest)):
        return text, unfinished
    return text, "NUL byte" if rest[0] == 0 else f"byte 0x{rest[0]:02x} is not UTF-8"


def definition(data, limit):
    """The lines of a file with their ends, and line and kind of the error or None."""
    content, unfinished = unpacked(data) if data[:2] == b"\x1f\x8b" else (data, None)
    content = content.removeprefix(BOM)
    if not content and not unfinished:
        return [], (0, "the file is empty")
    *whole, last = content.split(b"\n")
    found = []
    for number, line in enumerate(whole, 1):
        text, kind = fault(line, limit, None)
        if kind:
            return [*found, text], (number, kind)
        found.append(text + "\n")
    text, kind = fault(last, limit, unfinished)
    if text:
        found.append(text)
    return found, (len(whole) + 1, kind) if kind else None


def unpacked(data):
    """The content of gzip members, taken byte by byte."""
    content, member = [], zlib.decompressobj(wbits=31)
    for i in range(len(data)):
        if member.eof:
            if data[i] == 0:
                continue
            member = zlib.decompressobj(wbits=31)
        try:
            content.append(member.decompress(data[i : i + 1]))
        except zlib.error:
            return b"".join(content), "is damaged"
    return b"".join(content), None if member.eof else "is cut short"


RANGES = [(0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
SPECIAL = np.array([*b"\r\r\r\t\x01\x0b\x0c\x1c\x7f", 0x85, 0x2028, 0x2029, 0xFEFF, 0xFFFF], dtype=np.uint32)
PIECES = [
    b"\0",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf0\x9f",
    b"\xe2\x80",
    BOM,
    b"\r",
    b"\n\n",
    b"\r\n",
]


def good_text(rng):
    """UTF-8 of all lengths, with empty lines and with line ends of every kind."""
    size = int(rng.integers(0, rng.choice([20, 500, 9000])))
    newlines = rng.choice([0.03, 0.1, 0.4])
    others = (1 - newlines) * np.array([0.74, 0.08, 0.08, 0.03, 0.05, 0.02])
    kinds = rng.choice(7, size, p=[*others, newlines])
    codes = np.full(size, ord("\n"), dtype=np.uint32)
    for kind, (low, high) in enumerate(RANGES):
        chosen = kinds == kind
        codes[chosen] = rng.integers(low, high, int(chosen.sum()))
    codes[kinds == 5] = rng.choice(SPECIAL, int((kinds == 5).sum()))
    ends = np.flatnonzero(kinds[1:] == 6)
    codes[ends[rng.random(len(ends)) < rng.choice([0, 0.3, 1])]] = ord("\r")
    text = codes.astype("<u4").tobytes().decode("utf-32-le").encode()
    return BOM * int(rng.random() < 0.2) + text


def damaged(rng, data):
    """A byte or a piece more, another byte, fewer at the end, or a line around the limit."""
    where = int(rng.integers(0, len(data) + 1))
    way = rng.integers(0, 5)
    if way == 0:
        return data[:where] + PIECES[rng.integers(0, len(PIECES))] + data[where:]
    if way == 1:
        return data[:where] + rng.bytes(1) + data[where + 1 :]
    if way == 2:
        return data[:where] + data[where + 1 :]
    if way == 3:
        return data[: len(data) - int(rng.integers(0, 4))]
    wide = "\U0001f600".encode() if rng.random() < 0.5 else b"x"
    return data[:where] + b"\n" * int(rng.random() < 0.7) + wide * int(rng.integers(140, 161)) + data[where:]


def compressed(rng, data):
    """One part, or two; most of them whole."""
    middle = int(rng.integers(0, len(data) + 1)) if rng.random() < 0.3 else len(data)
    level = int(rng.integers(0, 10))
    packed = gzip.compress(data[:middle], level, mtime=0)
    if middle < len(data):
        packed += gzip.compress(data[middle:], level, mtime=0)
    where = int(rng.integers(2, len(packed)))
    way = rng.integers(0, 12)
    if way == 0:
        return packed[:where]
    if way == 1:
        return packed[:where] + rng.bytes(1) + packed[where + 1 :]
    return packed + b"\0" * int(rng.integers(1, 9)) if way == 2 else packed + b"x" * int(way == 3)


def generated(rng):
    data = good_text(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        data = damaged(rng, data)
    return compressed(rng, data) if rng.random() < 0.4 else data


def outcome(reader, path):
    found = []
    try:
        found.extend(reader(path))
    except DataError as error:
        place, _, message = str(error).removeprefix(f"{path}:").partition(": ")
        return found, (int(place), message) if place.isdigit() else (0, str(error))
    return found, None


def matches(error, expected):
    if error is None or expected is None:
        return error is expected
    return error[0] == expected[0] and expected[1] in error[1]


@pytest.mark.long
def test_a_million_lines(monkeypatch):
    rng = np.random.default_rng(16)
    monkeypatch.setattr(lines, "MAX_LINE", LIMIT)
    # files on a disk would take most of the time
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BytesIO(data))
    path = "corpus"
    count, kinds = 0, Counter()
    while count < LINES:
        data = generated(rng)
        monkeypatch.setattr(lines, "BLOCK", int(rng.integers(2, 70 + len(data) // 25)))
        monkeypatch.setattr(lines, "GZIP_BLOCK", int(rng.integers(1, 200)))
        expected, error = definition(data, LIMIT)
        report = ReadReport(path)
        found, raised = outcome(lambda p, report=report: read_lines(p, report), path)
        if error is not None:
            # a line that is not whole is not given out
            expected = [line for line in expected if line.endswith("\n")]
        assert found == [line.removesuffix("\n").removesuffix("\r") for line in expected], data
        assert matches(raised, error), (raised, error, data)
        assert report.read - len(found) in (0, 1) and (raised or report.read == len(found))
        if kinds.total() % 4 == 0:
            exact, exact_error = definition(data, None)
            pieces, raised = outcome(text_blocks, path)
            assert "".join(pieces) == "".join(exact), data
            assert matches(raised, exact_error), (raised, exact_error, data)
        kinds[error and re.sub("0x..", "", error[1])] += 1
        count += len(expected)
    # each kind of outcome came up often
    assert len(kinds) == 7 and min(kinds.values()) >= 30, kinds
    assert kinds[None] > kinds.total() / 3, kinds
