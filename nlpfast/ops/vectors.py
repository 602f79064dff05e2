"""Whether a tensor lies so that kernels of a GPU can read 16 bytes of a row at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["on_vectors"]


def on_vectors(x: Tensor, vec: int) -> bool:
    """Return whether a row lies side by side, and all rows begin at a multiple of so many numbers.

    Compiled code does not know where tensors are going to lie: there it is the strides alone.

    Args:
        x: [..., n].
        vec: of how many, 16 bytes or fewer.
    """
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return False
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    begins = torch.compiler.is_compiling() or x.data_ptr() % (vec * x.element_size()) == 0
    return begins and all(stride % vec == 0 for stride in strides)
