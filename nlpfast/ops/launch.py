"""A Triton kernel that is launched again and again with the same numbers and other tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# Launches that an op keeps, of different shapes.
MAX_REMEMBERED = 4096


class Launch:
    """A kernel with all its arguments but the pointers."""

    def __init__(
        self, kernel: Any, line: tuple[Any, ...], programs: int, numbers: tuple[Any, ...], **constants: Any
    ):
        """Take strides and numbers in the kernel's order, and what it is compiled for by name.

        Args:
            kernel: of Triton.
            line: of the op's table of configurations, for those who ask.
            programs: how many to run.
            numbers: the arguments after the pointers.
            **constants: what the kernel is compiled for.
        """
        self.kernel, self.line, self.programs, self.numbers = kernel, line, programs, numbers
        self.constants = constants
        self.constexprs = tuple(constants[name] for name in kernel.arg_names if name in constants)
        # By which pointers are aligned to 16 bytes: the rest of what Triton specializes for is fixed here.
        self.compiled: dict[tuple[bool | None, ...], Any] = {}

    def __call__(self, *pointers: Tensor | None) -> None:
        """Run the kernel on the current device."""
        if self.programs == 0:
            return
        aligned = tuple([None if x is None else x.data_ptr() % 16 == 0 for x in pointers])
        compiled = self.compiled.get(aligned)
        if compiled is not None:
            compiled[(self.programs, 1, 1)](*pointers, *self.numbers, *self.constexprs)
        else:
            launched = self.kernel[(self.programs,)](*pointers, *self.numbers, **self.constants)
            # The interpreter returns nothing.
            if launched is not None:
                self.compiled[aligned] = launched


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the device of ``x`` is the current one, on which Triton launches."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
