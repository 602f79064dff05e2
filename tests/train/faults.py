"""Trials: a function in a fresh fork of a process with torch, killed or made to fail where one wants.

One server imports torch and nlpfast under faults.c and forks for each trial, which then takes milliseconds.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
COUNT, SIGNAL_BEFORE, SIGNAL_AFTER, FAIL, SHORT, FULL, READ_ONLY = range(7)
# What may happen at the n-th call that changes a file, as (mode of faults.c, signal or errno).
ACTIONS = {
    "count": (COUNT, 0),
    "kill before": (SIGNAL_BEFORE, signal.SIGKILL),
    "kill after": (SIGNAL_AFTER, signal.SIGKILL),
    "terminate": (SIGNAL_BEFORE, signal.SIGTERM),
    "interrupt": (SIGNAL_BEFORE, signal.SIGINT),
    # this call alone
    "ENOSPC": (FAIL, errno.ENOSPC),
    "EIO": (FAIL, errno.EIO),
    "EROFS": (FAIL, errno.EROFS),
    "EDQUOT": (FAIL, errno.EDQUOT),
    "short write": (SHORT, 0),
    # half of the bytes, and from then on nothing that takes space
    "disk full": (FULL, errno.ENOSPC),
    "quota exceeded": (FULL, errno.EDQUOT),
    # from then on nothing changes
    "read-only": (READ_ONLY, errno.EROFS),
}
START_SECONDS, LIMIT_SECONDS = 300, 60
PR_SET_PDEATHSIG = 1


class Call(NamedTuple):
    """A call that changed a file: open, write, sync, close, rename, mkdir, unlink, link or truncate."""

    name: str
    bytes: int
    path: str
    renamed: str


class Result(NamedTuple):
    """How a trial ended.

    code: what the function returned (None is 0, an exception 1), or minus the signal that killed it.
    text: what it wrote to stdout and stderr.
    calls: what was counted; empty without a fault, and for a process that was killed.
    """

    code: int
    text: str
    calls: list[Call]


class TrialServer:
    """Runs functions of importable modules in forks, one after the other; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Compile faults.c and start the server, with files of its own in `folder`."""
        self._errors = folder / "server.txt"
        library = folder / "faults.so"
        compile_faults(library)
        self._socket, other = socket.socketpair()
        # what this process can import the server can
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
        with other, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=environment,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        self._replies = self._socket.makefile("r", encoding="utf-8")
        self._reply(START_SECONDS)

    def run(
        self,
        function: Callable[..., object] | str,
        *args: Any,
        fault: tuple[Path | str, int, str] | None = None,
        kill_after: float | None = None,
        limit: float = LIMIT_SECONDS,
    ) -> Result:
        """Run a function in a fork of its own, in a session of its own, and wait for its end.

        Args:
            function: of a module's top level, or "module:function".
            args: what JSON can hold.
            fault: a folder, the number of a call in it that changes files (1 is the first, 0 none), and the
                name of what happens there, one of `ACTIONS`.
            kill_after: send SIGKILL after as many seconds.
            limit: after as many seconds the trial is killed, and a TimeoutError.

        Raises:
            LookupError: there is no such function.
            TimeoutError: the limit was reached.
        """
        if not isinstance(function, str):
            function = f"{function.__module__}:{function.__name__}"
        if fault is not None:
            folder, number, action = fault
            fault = (str(Path(folder).resolve()), number, action)
            assert action in ACTIONS, f"{action!r} is none of {sorted(ACTIONS)}"
        request = {
            "function": function,
            "args": [str(arg) if isinstance(arg, Path) else arg for arg in args],
            "fault": fault,
            "kill_after": kill_after,
            "limit": limit,
        }
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._lost() from error
        reply = self._reply(limit + LIMIT_SECONDS)
        if "missing" in reply:
            raise LookupError(f"{function} cannot be imported:\n{reply['missing']}")
        if reply["code"] is None:
            raise TimeoutError(f"{function} ran for more than {limit} s:\n{reply['text']}")
        calls = [line.split("\t") for line in reply["calls"].splitlines()]
        return Result(
            reply["code"],
            reply["text"],
            [Call(name, int(size), path, moved) for name, size, path, moved in calls],
        )

    def _reply(self, limit: float) -> dict[str, Any]:
        self._socket.settimeout(limit)
        try:
            line = self._replies.readline()
        except OSError as error:
            raise self._lost() from error
        if not line:
            raise self._lost()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _lost(self) -> RuntimeError:
        self.close()
        text = self._errors.read_text(encoding="utf-8", errors="replace")
        return RuntimeError(f"the server of trials ended with {self.process.returncode}:\n{text}")

    def close(self) -> None:
        """End the server; a trial that it waits for goes with it."""
        self._socket.close()
        self._replies.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def __enter__(self) -> "TrialServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compiler() -> str | None:
    """Return the C compiler: $CC, cc or gcc; None without one."""
    names = [os.environ.get("CC", ""), "cc", "gcc"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def reason_to_skip() -> str | None:
    """Return why there can be no trials here, or None."""
    if sys.platform != "linux":
        return "faults.c is for Linux"
    return None if compiler() else "no C compiler for faults.c: install gcc, or name one in CC"


def compile_faults(library: Path) -> None:
    """Make the shared library of faults.c."""
    # with fortification the headers define open themselves
    flags = ["-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    subprocess.run(
        [str(compiler()), *flags, str(SOURCE), "-o", str(library), "-ldl"], check=True, timeout=120
    )


def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _child(request: dict[str, Any], function: Callable[..., Any], output: int, calls: int) -> None:
    """Run the function with its output in files, and leave; never returns."""
    code = 1
    try:
        os.setsid()
        # goes when the server goes
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        library.faults_log.restype = ctypes.c_char_p
        if request["fault"]:
            folder, number, action = request["fault"]
            mode, value = ACTIONS[action]
            library.faults_arm(os.fsencode(folder), ctypes.c_long(number), mode, int(value))
        try:
            code = int(function(*request["args"]) or 0)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        library.faults_disarm()
        os.write(calls, library.faults_log())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(file, "r", encoding="utf-8", errors="replace") as text:
        return text.read()


def _trial(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait for the end, and tell about it; code is None when the limit was reached."""
    start = time.monotonic()
    try:
        function = _resolve(request["function"])
    except (ImportError, AttributeError):
        return {"missing": traceback.format_exc()}
    output, calls = os.memfd_create("output"), os.memfd_create("calls")
    pid = os.fork()
    if pid == 0:
        _child(request, function, output, calls)
    ending = os.pidfd_open(pid)
    waiting = select.poll()
    waiting.register(ending, select.POLLIN)
    ended = False
    if request["kill_after"] is not None:
        ended = bool(waiting.poll(1000 * request["kill_after"]))
        if not ended:
            os.kill(pid, signal.SIGKILL)
    left = request["limit"] - (time.monotonic() - start)
    ended = ended or bool(waiting.poll(max(0, 1000 * left)))
    os.close(ending)
    # its number is taken until waitpid; processes that it started go with it
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"code": status if ended else None, "text": _read(output), "calls": _read(calls)}


def _serve(connection: socket.socket) -> None:
    import torch
    import torch._dynamo  # the first optimizer of a process would import it, in each trial anew

    import nlpfast  # noqa: F401

    torch.set_num_threads(1)
    # collections in a fork need not look at, and so copy, what all forks share
    gc.freeze()
    requests = connection.makefile("r", encoding="utf-8")
    connection.sendall(b"{}\n")
    for line in requests:
        connection.sendall(json.dumps(_trial(json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
