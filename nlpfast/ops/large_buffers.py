"""Memory for large results on the CPU, used again from one step to the next.

The operating system hands out memory in pages that it has to find and clear at their first use. For a
gradient of the size of the logits that takes several times as long as writing it, and PyTorch gives such
memory back at once. Here what a tensor leaves is kept for the next of about its size, marked so that the
system may take it where it is short of memory.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Smaller ones come from PyTorch's allocator, which keeps what it has.
SMALLEST = 4 << 20
# Memory that was given back; no more than a step needs at the same time.
_free: list[mmap.mmap] = []
_KEPT = 3


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized, contiguous tensor on the CPU.

    Equivalent PyTorch: ``torch.empty(shape, dtype=dtype)``, whose settings for memory that must not stay
    uninitialized count here too. It cannot be resized.

    Args:
        shape: its sizes.
        dtype: of its elements.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype)
    memory = _take(nbytes)
    lent = np.frombuffer(memory, dtype=np.uint8, count=nbytes)
    # the tensor holds the array, and nobody else does: it goes when the tensor's storage does
    weakref.finalize(lent, _give_back, memory)
    return torch.from_numpy(lent).view(dtype).view(shape)


def _take(nbytes: int) -> mmap.mmap:
    """Return memory that was given back, if there is some of about this size, or else new memory."""
    for memory in tuple(_free):
        if nbytes <= len(memory) <= 2 * nbytes:
            # one operation, so that threads need no lock: what another has taken is not there
            with contextlib.suppress(ValueError):
                _free.remove(memory)
                return memory
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_FREE"):
        memory.madvise(mmap.MADV_FREE)
    _free.append(memory)
    # what nobody asks for any more goes first
    del _free[:-_KEPT]
