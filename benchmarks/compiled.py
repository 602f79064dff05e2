"""The peer that `torch.compile` makes."""

from __future__ import annotations

import os
import shutil

__all__ = ["unavailable"]


def unavailable(implementation: str) -> str | None:
    """Return why an implementation cannot run on this machine, or None."""
    compiler = os.environ.get("CXX", "g++")
    if implementation == "compile" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and finds no {compiler}: install g++ or set CXX"
    return None
