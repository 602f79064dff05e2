"""Gradients of several tasks that contradict each other: each loses what points against another.

For each task i, and the others j in random order: if g_i . g_j < 0, then g_i -= (g_i . g_j / g_j . g_j) g_j.
The step is taken with the mean of what is left. Source: Yu et al. 2020, "Gradient Surgery for Multi-Task
Learning".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["projected", "surrogate"]


def projected(gradients: Tensor, order: Sequence[Sequence[int]]) -> Tensor:
    """Return the gradients of the tasks without what contradicts others.

    Args:
        gradients: [K, P] of K tasks and P parameters.
        order: for each task the others, in the order in which they are looked at.

    Returns:
        [K, P].
    """
    left = gradients.clone()
    squares = (gradients * gradients).sum(1)
    for i, others in enumerate(order):
        for j in others:
            product = left[i] @ gradients[j]
            if product < 0:
                left[i] -= product / squares[j] * gradients[j]
    return left


def surrogate(
    losses: Sequence[Callable[[], Tensor]], shared: Sequence[Tensor], own: Sequence[Tensor]
) -> Tensor:
    """Return the mean loss of several tasks, whose gradient is the mean of their projected gradients.

    The order in which a task looks at others is drawn from PyTorch's generator.

    Args:
        losses: of each task, a scalar; called one after the other, so that one graph exists at a time.
        shared: parameters that all tasks have.
        own: parameters of single tasks, whose gradients stay as they are.
    """
    values, rows, others = [], [], [torch.zeros_like(parameter) for parameter in own]
    for loss in losses:
        value = loss()
        found = torch.autograd.grad(value, [*shared, *own], allow_unused=True)
        values.append(value.detach())
        pairs = zip(found, [*shared, *own], strict=True)
        full = [torch.zeros_like(p) if gradient is None else gradient for gradient, p in pairs]
        rows.append(torch.cat([gradient.flatten() for gradient in full[: len(shared)]]))
        others = [total + part for total, part in zip(others, full[len(shared) :], strict=True)]
    K = len(values)
    order = [[j for j in torch.randperm(K).tolist() if j != i] for i in range(K)]
    mean = projected(torch.stack(rows), order).mean(0)
    parts = mean.split([parameter.numel() for parameter in shared])
    # its value is 0, and its gradient is what is wanted
    change = torch.zeros((), dtype=values[0].dtype, device=mean.device)
    for parameter, part in zip(shared, parts, strict=True):
        change = change + (parameter * part.view_as(parameter)).sum()
    for parameter, total in zip(own, others, strict=True):
        change = change + (parameter * total / K).sum()
    return torch.stack(values).mean() + (change - change.detach())
