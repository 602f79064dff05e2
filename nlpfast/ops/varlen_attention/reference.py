"""Attention on packed sequences, the definition: unpack them into a padded batch, and attend there.

The padded batch goes through the definition of attention with a mask that hides the padding, so that
formulas, dropout and empty rows are those of ``nlpfast/ops/attention/reference.py``. No control flow depends
on the tensors' values, so both directions trace into one graph.

Shapes: B sequences, total_q and total_k packed rows, H query heads, Hk key heads, D head size of query and
key, Dv of value. Sequence b has the rows ``cu_seq[b] .. cu_seq[b + 1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlpfast.ops.attention import reference as attention

SERVES = "every device and floating dtype; needs memory for [B, H, max_q, max_k]"


def refusal(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_k: int
) -> str | None:
    """Return None: the definition serves every call."""
    return None


def forward(
    query: Tensor,  # [total_q, H, D]
    key: Tensor,  # [total_k, Hk, D]
    value: Tensor,  # [total_k, Hk, Dv]
    cu_seq_q: Tensor,  # [B + 1]
    cu_seq_k: Tensor,  # [B + 1]
    max_q: int,
    max_k: int,
    seed: Tensor | None,  # [2]: seed, offset
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, None]:
    """Compute attention within each sequence and the log-sum-exp of its scores.

    Args:
        query: queries, any strides.
        key: keys; query head h reads key head ``h // (H // Hk)``.
        value: values.
        cu_seq_q: int32 or int64, where the queries of each sequence begin, and at last total_q.
        cu_seq_k: the same of keys and values.
        max_q: at least the number of queries of every sequence.
        max_k: at least the number of keys of every sequence.
        seed: int64, or None when ``dropout_p`` is 0.
        dropout_p: the probability of dropping an attention weight.
        causal: "none", "top_left" (j <= i) or "bottom_right" (j <= i + keys - queries), within a sequence.
        scale: the factor of Q Kᵀ.

    Returns:
        The output [total_q, H, Dv] in the query's dtype, and lse [H, total_q] in float32 (float64 for float64
        inputs). A query without a visible key has output 0 and lse -inf. A third result is for backends whose
        backward wants lse to more than its precision; None here.
    """
    visible = _visible(cu_seq_q, cu_seq_k, max_q, max_k, causal)
    padded = _pad(query, cu_seq_q, max_q), _pad(key, cu_seq_k, max_k), _pad(value, cu_seq_k, max_k)
    out, lse, _ = attention.forward(*padded, visible, None, None, seed, dropout_p, "none", scale)
    total = query.shape[0]
    packed_lse = _unpad(lse.unsqueeze(-1), cu_seq_q, total).squeeze(-1)
    return _unpad(out, cu_seq_q, total), packed_lse.mT.contiguous(), None


def backward(
    grad_out: Tensor,  # [total_q, H, Dv]
    grad_lse: Tensor | None,  # [H, total_q]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``forward``.

    Args:
        grad_out: gradient of the output, any strides.
        grad_lse: gradient of lse, or None.
        query: see ``forward``, as all that follow and are not described.
        key: see ``forward``.
        value: see ``forward``.
        out: result of ``forward``.
        lse: result of ``forward``.
        lse_low: result of ``forward``.
        cu_seq_q: see ``forward``.
        cu_seq_k: see ``forward``.
        max_q: see ``forward``.
        max_k: see ``forward``.
        seed: the seed of the forward call, which regenerates its dropout mask.
        dropout_p: see ``forward``.
        causal: see ``forward``.
        scale: see ``forward``.

    Returns:
        Gradients of query, key and value in their shapes and dtypes.
    """
    visible = _visible(cu_seq_q, cu_seq_k, max_q, max_k, causal)
    padded = _pad(query, cu_seq_q, max_q), _pad(key, cu_seq_k, max_k), _pad(value, cu_seq_k, max_k)
    saved = _pad(out, cu_seq_q, max_q), _pad_heads(lse, cu_seq_q, max_q)
    upstream = _pad(grad_out, cu_seq_q, max_q)
    upstream_lse = None if grad_lse is None else _pad_heads(grad_lse, cu_seq_q, max_q)
    dq, dk, dv, _ = attention.backward(
        *(upstream, upstream_lse, *padded, *saved, None),
        *(visible, None, None, seed, dropout_p, "none", scale),
    )
    total_q, total_k = query.shape[0], key.shape[0]
    return _unpad(dq, cu_seq_q, total_q), _unpad(dk, cu_seq_k, total_k), _unpad(dv, cu_seq_k, total_k)


def _visible(cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, causal: str) -> Tensor:
    """Return which key each query sees, as bool [B, 1, max_q, max_k]; padding neither sees nor is seen."""
    queries, keys = (cu_seq.diff().view(-1, 1, 1, 1) for cu_seq in (cu_seq_q, cu_seq_k))
    i = torch.arange(max_q, device=cu_seq_q.device).unsqueeze(-1)
    j = torch.arange(max_k, device=cu_seq_q.device)
    visible = (i < queries) & (j < keys)
    if causal != "none":
        visible = visible & (j <= i + (keys - queries if causal == "bottom_right" else 0))
    return visible


def _pad(x: Tensor, cu_seq: Tensor, longest: int) -> Tensor:
    """Unpack [total, H, D] into [B, H, longest, D], with zeros after the rows of each sequence."""
    i = torch.arange(longest, device=x.device)
    rows = torch.where(i < cu_seq.diff().unsqueeze(-1), cu_seq[:-1].unsqueeze(-1) + i, x.shape[0])
    # A row of zeros behind the others is what padding points to.
    zeros = x.new_zeros((1, *x.shape[1:]))
    return torch.cat((x, zeros))[rows].transpose(1, 2)


def _pad_heads(x: Tensor, cu_seq: Tensor, longest: int) -> Tensor:
    """Unpack [H, total] into [B, H, longest]."""
    return _pad(x.mT.unsqueeze(-1), cu_seq, longest).squeeze(-1)


def _unpad(x: Tensor, cu_seq: Tensor, total: int) -> Tensor:
    """Pack [B, H, longest, D] into [total, H, D]."""
    row = torch.arange(total, device=x.device)
    # Sequences without rows are passed over: b is the last one that begins at or before the row.
    b = torch.searchsorted(cu_seq[1:].long().contiguous(), row, right=True)
    return x.transpose(1, 2)[b, row - cu_seq[b]]
