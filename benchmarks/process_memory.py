"""What the system says of this process' memory; on Linux."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["megabytes_in_a_process", "megabytes_of"]


def megabytes_in_a_process(module: str, *words: object) -> float | None:
    """Return the number that a module prints when it is run in a new process; None but on Linux.

    Args:
        module: of the benchmarks; `megabytes_of` is what it prints.
        words: its arguments.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    if not Path("/proc/self").exists():
        return None
    command = [sys.executable, "-m", module, *map(str, words)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return float(done.stdout)


def megabytes_of(step: Callable[[], object]) -> float:
    """Return how many megabytes a call takes at most beyond what the process has before it.

    Args:
        step: is called once.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kilobytes("VmRSS")
    step()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
