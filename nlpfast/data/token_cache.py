r"""Encoded corpora on disk, mapped into memory: a start that need not encode, and corpora larger than memory.

An entry is one file, `<key>.tokens`, in the cache's folder; its key says what content was encoded, and how:

    nlpfast tokens 1 <SHA-256 of the description, in hexadecimal> <bytes of the description>\n
    the description: JSON with key, type and number of the tokens, and what the caller adds
    the tokens, little-endian

It is written under a name that no reader takes for an entry, synced, renamed, and the folder synced, so that
an entry is there as a whole or not at all; of two processes that build the same entry, the later one's takes
the place of the equal earlier one. An entry of another size than its description says, or with a damaged
description, is built again. Entries are never changed; removing them is safe at any time, and left to the
user.

What a killed process left is removed by whoever builds next, once that process is gone from the same machine,
or after a day.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nlpfast.files import flush

__all__ = ["Entry", "MappedTokens", "Tokens", "default_folder", "load", "store"]

Tokens = NDArray[np.integer[Any]]

_MAGIC = b"nlpfast tokens 1"
_FIRST_LINE = re.compile(re.escape(_MAGIC) + rb" ([0-9a-f]{64}) ([0-9]{12})\n")
_FIRST_LINE_BYTES = len(_MAGIC) + 1 + 64 + 1 + 12 + 1

# the process that writes, its machine, and what makes the name its own
_PARTIAL = re.compile(r".+\.([0-9]{1,9})@(.+)\.[^.]+\.partial")

# seconds after which a file that was not finished is litter, whoever began it
OLD = 24 * 3600

_logger = logging.getLogger("nlpfast")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An encoded corpus.

    Attributes:
        notes: what the caller of `store` added.
        tokens: the tokens; read-only.
    """

    notes: dict[str, Any]
    tokens: Tokens


@dataclasses.dataclass(frozen=True)
class MappedTokens:
    """Where in a file an array of tokens is: what another process needs to map it too.

    Attributes:
        path: the file.
        dtype: type of a token.
        offset: bytes before the first token.
        count: number of tokens.
    """

    path: str
    dtype: str
    offset: int
    count: int

    @classmethod
    def of(cls, tokens: Tokens) -> MappedTokens | None:
        """Return the place of an array, or None if it is no part of a map of a file with a name."""
        whole = tokens
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        if not isinstance(whole, np.memmap) or whole.filename is None or tokens.strides != whole.strides:
            return None
        offset = whole.offset + tokens.ctypes.data - whole.ctypes.data
        return cls(str(whole.filename), tokens.dtype.str, offset, len(tokens))

    def open(self) -> Tokens:
        """Map the array.

        Raises:
            OSError: the file is no longer there.
        """
        return np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=(self.count,))


def default_folder() -> Path:
    """Return the cache's folder: `nlpfast` in $XDG_CACHE_HOME or in `~/.cache`."""
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path(os.path.expanduser("~/.cache"))) / "nlpfast"


def load(key: str, folder: Path) -> Entry | None:
    """Return an entry, or None if there is none that can be used.

    Args:
        key: its name.
        folder: the cache's.
    """
    path = folder / f"{key}.tokens"
    try:
        with path.open("rb") as file:
            return _entry(file, key)
    except OSError:
        return None
    except ValueError as error:
        _logger.warning("%s: not a whole cache entry (%s); it is built again", path, error)
        return None


def store(
    key: str,
    notes: dict[str, Any],
    dtype: str,
    count: int,
    blocks: Callable[[], Iterable[Tokens]],
    folder: Path,
) -> Entry:
    """Write an entry and return it.

    Where the folder cannot be written, the tokens are in a temporary file without a name, where that cannot
    be had either in memory; a line in the log says so.

    Args:
        key: its name, which depends on the content and the way of encoding; fit for a file's name.
        notes: anything else that belongs to the entry, as JSON has it.
        dtype: type of a token, one of <u1, <u2, <u4.
        count: number of tokens.
        blocks: gives the tokens, in order; called again if the first place fails. What it raises passes
            through, unless it is an OSError.
        folder: the cache's; made if need be.

    Raises:
        ValueError: `blocks` gave another number of tokens.
    """
    header = _header(key, notes, dtype, count)
    try:
        return _write_entry(key, header, blocks, folder)
    except OSError as error:
        rule = "using a temporary file; set XDG_CACHE_HOME to a folder that can be"
        _logger.warning("%s: the cache cannot be written (%s), %s", folder, error.strerror or error, rule)
    try:
        with tempfile.TemporaryFile() as file:
            _write(file, header, blocks)
            return _entry(file, key)
    except OSError as error:
        _logger.warning("no temporary file (%s), using memory; set TMPDIR", error.strerror or error)
    tokens = np.concatenate(list(blocks()))
    if len(tokens) != count:
        raise ValueError(f"{key}: {len(tokens)} tokens came, count={count}")
    tokens.flags.writeable = False
    return Entry(notes, tokens)


def _header(key: str, notes: dict[str, Any], dtype: str, count: int) -> bytes:
    description = json.dumps({"key": key, "dtype": dtype, "count": count, "notes": notes}).encode()
    # spaces up to a multiple of 64, for the alignment of the tokens
    description += b" " * (-(_FIRST_LINE_BYTES + len(description)) % 64)
    digest = hashlib.sha256(description).hexdigest().encode()
    return b"%s %s %012d\n%s" % (_MAGIC, digest, len(description), description)


def _entry(file: IO[bytes], key: str) -> Entry:
    """Map an entry; raise ValueError unless it is whole."""
    file.seek(0)
    first = _FIRST_LINE.fullmatch(file.read(_FIRST_LINE_BYTES))
    if first is None:
        raise ValueError("it begins otherwise")
    size = os.fstat(file.fileno()).st_size
    description = file.read(min(int(first[2]), size))
    if hashlib.sha256(description).hexdigest().encode() != first[1]:
        raise ValueError("its description is damaged")
    fields = json.loads(description)
    if fields["key"] != key:
        raise ValueError(f"it is {fields['key']}")
    dtype, count, offset = np.dtype(fields["dtype"]), fields["count"], file.tell()
    expected = offset + count * dtype.itemsize
    if size != expected:
        raise ValueError(f"it has {size} bytes, not {expected}")
    return Entry(fields["notes"], np.memmap(file, dtype, mode="r", offset=offset, shape=(count,)))


def _write(file: IO[bytes], header: bytes, blocks: Callable[[], Iterable[Tokens]]) -> None:
    file.write(header)
    for block in blocks():
        file.write(block.data)
    file.flush()


def _write_entry(key: str, header: bytes, blocks: Callable[[], Iterable[Tokens]], folder: Path) -> Entry:
    folder.mkdir(parents=True, exist_ok=True)
    _remove_litter(folder)
    path = folder / f"{key}.tokens"
    builder = f"{os.getpid()}@{socket.gethostname()}"
    partial = folder / f"{key}.{builder}.{secrets.token_hex(4)}.partial"
    try:
        with open(partial, "x+b") as file:
            _write(file, header, blocks)
            os.fsync(file.fileno())
            _entry(file, key)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    # an entry whose name is lost with the power is built again; not every file system can do this
    with contextlib.suppress(OSError):
        flush(folder)
    with path.open("rb") as file:
        return _entry(file, key)


def _remove_litter(folder: Path) -> None:
    for path in folder.glob("*.partial"):
        name = _PARTIAL.fullmatch(path.name)
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > OLD
            if name and (old or (name[2] == socket.gethostname() and not _is_running(int(name[1])))):
                path.unlink()


def _is_running(process: int) -> bool:
    # elsewhere than on POSIX systems there is no such question, and the call would end the process
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
