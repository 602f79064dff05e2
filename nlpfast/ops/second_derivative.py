"""The error for second derivatives, which none of the ops has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_second_derivative(message: str, grads: tuple[Any, ...], *inputs: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients, which raise RuntimeError with the message when they are differentiated.

    ``once_differentiable`` is not enough: where the upstream gradient is a constant it detaches the result,
    and what depends on a second derivative comes out wrong, without an error.

    Args:
        message: what is missing, and what to use instead.
        grads: the results of a backward pass; a None stays one.
        inputs: the tensors on which they depend.
    """
    # Only with create_graph=True. Compiled code has an error of its own for second derivatives.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return _FirstDerivative.apply(message, len(grads), *grads, *inputs)


class _FirstDerivative(torch.autograd.Function):
    """Hand gradients on, and fail when they are differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the first ``count`` tensors, attached to the graph of the others, on which they depend."""
        ctx.message = message
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Raise: there is no formula here for second derivatives."""
        raise RuntimeError(ctx.message)
