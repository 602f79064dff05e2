"""Dropout of a tensor: checks the arguments, picks a backend, and holds the autograd.Function."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops.dropout import reference
from nlpfast.ops.seeds import drop_threshold, seed_pair

__all__ = ["dropout"]

_backends: dict[str, ModuleType | str] = {"cpu": native.status(), "triton": dispatch.triton_status()}
if native.status() == "ok":
    from nlpfast.ops.dropout import cpu

    _backends["cpu"] = cpu
if dispatch.triton_status() == "ok":
    from nlpfast.ops.dropout import triton

    _backends["triton"] = triton
dispatch.registry["dropout"] = {**_backends, "reference": reference}

Run = Callable[[Tensor, Tensor, int], Tensor]


def dropout(x: Tensor, p: float, *, seed: int | Tensor | None = None, backend: str | None = None) -> Tensor:
    """Set elements to 0, each with probability p, and divide the others by 1 - p.

    Equivalent PyTorch: ``torch.nn.functional.dropout(x, p)``, with other random numbers. An element is
    dropped if its 16 random bits, as a number, are below ``round(65536 p)``: the probability is that number
    over 65536, and what stays is divided by exactly what is left of 1. Which elements are dropped follows
    from the seed and the number of elements alone, the same on every backend; nothing but the seed is kept
    for the backward pass.

    Args:
        x: [...], float32, bfloat16, float16 or float64, any strides.
        p: probability, at least 0 and below 1 - 1 / 131072.
        seed: None draws one from PyTorch's generator of the device; an int is used with offset 0; an int64
            tensor holds [seed, offset] or a seed alone.
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call.

    Raises:
        ValueError: p is outside of its range, or the seed does not fit.
        TypeError: x is not of these dtypes.
        RuntimeError: when the named backend cannot serve the call.

    Papers: Srivastava et al., "Dropout", 2014. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
    (Philox), 2011.
    """
    threshold = drop_threshold(p, "p")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"x has the dtype {x.dtype}; it must be floating: convert it")
    module = dispatch.choose("dropout", x.device.type, backend, (x,))
    if threshold == 0:
        return x
    out: Tensor = _Dropout.apply(x, seed_pair(seed, x.device), threshold, module.forward, module.backward)
    return out


class _Dropout(torch.autograd.Function):
    """Join a backend's forward and backward, which are each other's derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, threshold: int, run: Run, derivative: Run) -> Tensor:
        """Run the backend and save the seed."""
        ctx.save_for_backward(seed)
        ctx.options = (threshold, derivative, run)
        return run(x, seed, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Drop the same elements of the gradient."""
        return _Dropout.apply(grads[0], *ctx.saved_tensors, *ctx.options), None, None, None, None
