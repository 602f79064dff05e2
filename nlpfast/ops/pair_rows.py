"""Pairs of queries and keys by their rows, so that of the gradients of a row there is one writer."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_pairs"]

# The kernel reads every pair once for each batch entry, and counts the rows of an entry in 160 KB.
READ, COUNTED = 2**26, 40_000


def group_pairs(pairs: Tensor, B: int, L: int, S: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the pairs of each query, and of each key, in the order in which they are given.

    Args:
        pairs: int64 [P, 3], contiguous: batch entry, query, key, where CUDA kernels compute; those that lie
            outside of batch, queries or keys are left out.
        B: batch entries.
        L: queries of an entry.
        S: keys of an entry.

    Returns:
        by_query [P], query_begin [B L + 1], by_key [P], key_begin [B S + 1], int32: row r of all queries has
        the pairs ``by_query[query_begin[r] : query_begin[r + 1]]``.
    """
    if B > 0 and B * len(pairs) <= READ and L + S <= COUNTED:
        grouped: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.nlpfast.cuda_group_pairs(pairs, B, L, S)
        return grouped
    b, t, s = pairs.unbind(1)
    there = (b >= 0) & (b < B) & (t >= 0) & (t < L) & (s >= 0) & (s < S)
    return (*_sorted(b * L + t, there, B * L), *_sorted(b * S + s, there, B * S))


def _sorted(places: Tensor, there: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    places, order = places.masked_fill(~there, rows).sort(stable=True)
    begin = torch.searchsorted(places, torch.arange(rows + 1, device=places.device), out_int32=True)
    return order.int(), begin
