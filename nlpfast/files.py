"""Files that are there whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["flush", "replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a new file, which takes the place of `path` when the `with` block ends without an exception.

    It is written under another name in the same folder, `.<name>.<random>.part`, flushed to the disk and
    renamed. After an exception it is gone, and what was at `path` is as it was.

    Args:
        path: a file, there or not. One that is there keeps its permissions; a link stays a link.

    Yields:
        The new file, open for writing bytes; its `name` is for what writes by name.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    target = Path(os.path.realpath(path))
    # the name is known before there is a file, so that a signal at any instant leaves none
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is a folder or a device")
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
        flush(target.parent)
    except OSError as error:
        reason, fix = error.strerror or error, "free some space or name another file"
        raise OSError(f"{path}: cannot be written ({reason}); {fix}") from error
    finally:
        # it is not there if all went well, or if its folder is not
        with contextlib.suppress(OSError):
            part.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk.

    Args:
        path: there already.

    Raises:
        OSError: the disk reports an error.
    """
    # a folder cannot be opened for writing, and fsync asks for no more than reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
