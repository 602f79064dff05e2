"""Gradients that one op's backward pass leaves to another's, which adds them to its own in place.

What supervises single rows of a tensor has a gradient of as many rows. Autograd would have it as a tensor of
zeros with these rows, and add that to the other gradients: for attention supervised at a few pairs, several
times as long as all the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PairGradients:
    """Gradients of ``query . key`` at pairs, which attention's backward pass adds to its own.

    Attributes:
        coefficients: [P, n], float32 (float64 for float64): the gradients of ``scale * query . key``.
        query: [B, H, L, D].
        key: [B, Hk, S, D].
        pairs: [P, 3], int64: batch entry, row of query, row of key.
        heads: the numbers of the n heads.
        scale: see `coefficients`.
        backward: adds them to gradients of query and key that are there, as of alignment_loss's backends.
    """

    def __init__(
        self,
        coefficients: Tensor,
        query: Tensor,
        key: Tensor,
        pairs: Tensor,
        heads: tuple[int, ...],
        scale: float,
        backward: Callable[..., None],
    ) -> None:
        """Take them, and remember in which backward pass this is."""
        self.coefficients, self.pairs, self.heads, self.scale = coefficients, pairs, heads, scale
        self.query, self.key, self.backward = query, key, backward
        self.task = torch._C._current_graph_task_id()

    def is_of_this_pass(self) -> bool:
        """Return whether this was not left behind in another pass, which had no use for these gradients."""
        return bool(self.task == torch._C._current_graph_task_id())

    def of_heads(self, H: int) -> Tensor:
        """Return the gradients of ``query . key`` of all H heads, contiguous [P, H]."""
        values = self.scale * self.coefficients
        if self.heads == tuple(range(H)):
            return values.contiguous()
        numbers = torch.tensor(self.heads, device=values.device)
        return values.new_zeros(len(values), H).index_add_(1, numbers, values)

    def add_to(self, d_query: Tensor, d_key: Tensor) -> None:
        """Add to the gradients of query and key, row by row."""
        inputs = (self.coefficients, self.query, self.key, self.pairs, self.heads, self.scale)
        self.backward(*inputs, d_query, d_key, None)


def link_to(lse: Tensor, query: Tensor, key: Tensor) -> list[PairGradients] | None:
    """Return the additions of the call of attention that lse came from, if it had this query and this key.

    None elsewhere: the gradients must go where attention's go, and attention's backward pass must come later.
    """
    call = None if torch.compiler.is_compiling() else lse.grad_fn
    additions: list[PairGradients] | None = getattr(call, "additions", None)
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
