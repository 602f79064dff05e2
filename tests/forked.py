"""A function in a forked process, for what ends a process."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

DID_NOT_END, RAISED = 98, 99
LIMIT_SECONDS = 120


def run_forked(function: Callable[[], object], folder: Path) -> tuple[int, str, str]:
    """Return how a forked process ended that ran a function, and what it printed.

    Args:
        function: ends the process, or returns its exit code.
        folder: for the files `stdout` and `stderr`, which are removed.

    Returns:
        The exit code, -N after signal N; 98 if `function` returned no code and 99 if it raised; then stdout
        and stderr.
    """
    paths = folder / "stdout", folder / "stderr"
    with warnings.catch_warnings():
        # Python 3.12 warns of any thread, and PyTorch has some
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = RAISED
        # a fork lacks the threads of its parent's pool, and would wait for them
        torch.set_num_threads(1)
        # what hangs all the same ends here
        signal.alarm(LIMIT_SECONDS)
        try:
            for descriptor, path in enumerate(paths, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            # those of pytest write elsewhere
            sys.stdout = printed = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            result = function()
            printed.flush()
            code = result if isinstance(result, int) else DID_NOT_END
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    out, err = (path.read_text() for path in paths)
    for path in paths:
        path.unlink()
    return os.waitstatus_to_exitcode(status), out, err
