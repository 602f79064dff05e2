"""Gradients that one op's backward pass leaves to another's, which adds them to its own in place.

What supervises single rows of a tensor has a gradient of as many rows. Autograd would have it as a tensor of
zeros with these rows, and add that to the other gradients: for attention supervised at a few pairs, several
times as long as all the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Addition:
    """What another op's backward pass leaves to that of attention, to be added to its gradients in place.

    Attributes:
        backward: adds to the gradients of query and key; its last three arguments are those, and that of lse.
        arguments: all before them.
    """

    def __init__(self, backward: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Take both, and remember in which backward pass this is."""
        self.backward, self.arguments = backward, arguments
        self.task = torch._C._current_graph_task_id()

    def run(self, d_query: Tensor, d_key: Tensor) -> None:
        """Add, unless this was left behind in another pass, which had no use for these gradients."""
        if self.task == torch._C._current_graph_task_id():
            self.backward(*self.arguments, d_query, d_key, None)


def link_to(lse: Tensor, query: Tensor, key: Tensor) -> list[Addition] | None:
    """Return the additions of the call of attention that lse came from, if it had this query and this key.

    None elsewhere: the gradients must go where attention's go, and attention's backward pass must come later.
    """
    call = None if torch.compiler.is_compiling() else lse.grad_fn
    additions: list[Addition] | None = getattr(call, "additions", None)
    if call is None or additions is None:
        return None
    for x, (node, number) in zip((query, key), call.next_functions, strict=False):
        if not x.requires_grad:
            same = node is None
        elif x.grad_fn is None:
            same = getattr(node, "variable", None) is x
        else:
            same = node is x.grad_fn and number == x.output_nr
        if not same:
            return None
    return additions
