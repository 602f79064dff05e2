"""The two streams of a command: results that cannot be written are an error that names stdout."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class OutputError(Exception):
    """Report that stdout cannot be written; `main` prints it in one line and exits with 1."""


class _Results:
    """Stdout, None where the process was started without one."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _errors_named():
            return self._open().write(text)

    def flush(self) -> None:
        with _errors_named():
            self._open().flush()

    def _open(self) -> TextIO:
        if self._stream is None:
            raise OutputError("stdout: it is closed; send the results somewhere")
        return self._stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise OutputError("stdout: its reader closed it before the end; let it read all") from error
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"stdout: cannot be written ({reason}); send the results elsewhere") from error


@contextlib.contextmanager
def named_streams() -> Iterator[None]:
    """Let `sys.stdout` raise OutputError, and `sys.stderr` be there, while a `with` block runs."""
    results = cast(TextIO, _Results(sys.stdout))
    # print(file=None) would print among the results
    messages = sys.stderr or io.StringIO()
    with contextlib.redirect_stdout(results), contextlib.redirect_stderr(messages):
        yield


def finish_output() -> None:
    """Write what is left of the results; if that fails drop it, or the interpreter would fail at its end."""
    try:
        sys.stdout.flush()
    except OutputError:
        with contextlib.suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
