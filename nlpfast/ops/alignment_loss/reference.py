"""The probability of attention at single pairs of query and key, written out in PyTorch: the definition.

    l_h = scale * q_ht . k_hs - lse_ht        log a = log mean_h exp(l_h)

for each pair (b, t, s), over the heads that are asked for. Nothing of size L x S is needed: lse, as attention
returns it, is all that a probability has to know of the other keys. The mean of probabilities is never
formed, so that log a is finite where they all vanish.

    c_h = g exp(l_h) / sum of exp(l_h) over the heads
    dq_ht += c_h scale k_hs      dk_hs += c_h scale q_ht      dlse_ht -= c_h

How other keys' scores change a probability goes through lse, whose gradient attention's backward pass takes.
Where a query sees no key, lse is -inf, and so is log a.

Shapes: B batch, H query heads, Hk key heads, L queries, S keys, D head size, P pairs, n heads asked for.
float64 is computed in float64, everything else in float32 and rounded at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SERVES = "every device and floating dtype"
# Keys that hard_alignment looks at together.
KEYS = 256


def refusal(query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor) -> str | None:
    """Return None: the definition serves every call."""
    return None


def forward(
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hk, S, D]
    lse: Tensor,  # [B, H, L]
    pairs: Tensor,  # [P, 3]
    heads: Sequence[int],
    scale: float,
) -> Tensor:
    """Compute l for each pair and head.

    Args:
        query: as attention was given it, any strides.
        key: likewise; query head h reads key head h // (H // Hk).
        lse: as attention returned it.
        pairs: int64: batch entry, query, key.
        heads: query heads, n of them.
        scale: the factor of attention's scores.

    Returns:
        [P, n], float32 (float64 for float64).
    """
    rows, columns = _places(query, key, pairs, heads)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = scale * (query[rows].to(dtype) * key[columns].to(dtype)).sum(-1)
    norms = lse[rows].to(dtype)
    return (scores - norms).masked_fill(norms == -math.inf, -math.inf)


def backward(
    coefficients: Tensor,  # [P, n]
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hk, S, D]
    pairs: Tensor,  # [P, 3]
    heads: Sequence[int],
    scale: float,
    d_query: Tensor | None,  # [B, H, L, D]
    d_key: Tensor | None,  # [B, Hk, S, D]
    d_lse: Tensor | None,  # [B, H, L]
) -> None:
    """Add the gradients to what is there, where it is given.

    Args:
        coefficients: c, the upstream gradients of l.
        query: as in `forward`.
        key: as in `forward`.
        pairs: as in `forward`.
        heads: as in `forward`.
        scale: as in `forward`.
        d_query: in the dtype of query.
        d_key: in the dtype of key.
        d_lse: float32 (float64 for float64), contiguous.
    """
    rows, columns = _places(query, key, pairs, heads)
    factors = (scale * coefficients).unsqueeze(-1)
    if d_query is not None:
        _add(d_query, rows, factors * key[columns].to(factors.dtype))
    if d_key is not None:
        _add(d_key, columns, factors * query[rows].to(factors.dtype))
    if d_lse is not None:
        _add(d_lse, rows, -coefficients)


def hard_alignment(
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hk, S, D]
    lse: Tensor,  # [B, H, L]
    source_lengths: Tensor | None,  # [B]
    heads: Sequence[int],
    scale: float,
) -> Tensor:
    """Return the key of each query with the largest sum of probabilities over the heads, the first of equals.

    Args:
        query: as in `forward`.
        key: as in `forward`.
        lse: as in `forward`.
        source_lengths: int64: keys from there on are not looked at.
        heads: as in `forward`.
        scale: as in `forward`.

    Returns:
        int64 [B, L]; -1 where there are no keys.
    """
    (B, H, L, _), (_, Hk, S, _) = query.shape, key.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    best = query.new_full((B, L), -math.inf, dtype=dtype)
    found = torch.full((B, L), -1, dtype=torch.int64, device=query.device)
    chosen = torch.tensor(heads, dtype=torch.int64, device=query.device)
    q, norms = scale * query[:, chosen].to(dtype), lse[:, chosen].unsqueeze(-1)
    readers = chosen // max(H // max(Hk, 1), 1)
    for first in range(0, S, KEYS):
        k = key[:, :, first : first + KEYS][:, readers].to(dtype)
        totals = torch.exp(q @ k.mT - norms).masked_fill(norms == -math.inf, 0.0).sum(1)
        if source_lengths is not None:
            columns = torch.arange(first, first + k.shape[2], device=query.device)
            totals = totals.masked_fill(columns >= source_lengths[:, None, None], -math.inf)
        top, where = totals.max(-1)
        better = top > best
        best, found = torch.where(better, top, best), torch.where(better, where + first, found)
    return found


Index = tuple[Tensor, Tensor, Tensor]


def _places(query: Tensor, key: Tensor, pairs: Tensor, heads: Sequence[int]) -> tuple[Index, Index]:
    """Return where the rows of queries and of keys are, [P, n] each."""
    b, t, s = (x.unsqueeze(1) for x in pairs.unbind(1))
    numbers = torch.tensor(heads, dtype=torch.int64, device=pairs.device)
    b, h = torch.broadcast_tensors(b, numbers)
    group = query.shape[1] // max(key.shape[1], 1)
    return (b, h, t.expand_as(b)), (b, h // max(group, 1), s.expand_as(b))


def _add(to: Tensor, where: Index, what: Tensor) -> None:
    """Add rows, of which several may go to one place: in computing precision first."""
    total = torch.zeros_like(to, dtype=what.dtype).index_put_(where, what, accumulate=True)
    to += total
