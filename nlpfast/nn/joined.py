"""Where modules have several operations done as one, by our kernels: on devices for which that is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["joined_on", "joins"]

# On CUDA devices the kernels have not been timed yet; `nlpfast bench training --device cuda` does it.
_devices = {"cpu"}


def joins(x: Tensor) -> bool:
    """Return whether modules that are given this tensor have operations joined; never in compiled graphs."""
    return x.device.type in _devices and not torch.compiler.is_compiling()


@contextlib.contextmanager
def joined_on(device_type: str) -> Iterator[None]:
    """Have operations joined on a device of that type as well, by all modules of the process.

    Args:
        device_type: ``tensor.device.type``.
    """
    before = set(_devices)
    _devices.add(device_type)
    try:
        yield
    finally:
        _devices.intersection_update(before)
