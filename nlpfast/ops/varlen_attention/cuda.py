"""Attention on packed sequences on CUDA devices: the compiled kernels of attention over few keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlpfast.ops.attention import cuda as attention

SERVES = "CUDA devices; bfloat16 and float16, D and Dv both 32 or 64, up to 512 keys a sequence, any strides"


def refusal(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_k: int
) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    return attention.misfit(query, value, max_k)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return out [total_q, H, D] and lse [H, total_q], as the reference does; backward takes these."""
    out = query.new_empty(query.shape)
    *masks, max_k, seed, dropout_p, kind, scale = _options(
        cu_seq_q, cu_seq_k, max_k, seed, dropout_p, causal, scale
    )
    lse = torch.ops.nlpfast.cuda_attention_forward(
        *(attention.lying(x) for x in (query, key, value)),
        *(*masks, max_q, max_k, seed, dropout_p, kind, scale),
        out,
    )
    return out, lse, None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
    """Return the gradients of query, key and value, contiguous."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    torch.ops.nlpfast.cuda_attention_backward(
        *(attention.lying(grad_out), None if grad_lse is None else grad_lse.contiguous()),
        *(attention.lying(x) for x in (query, key, value)),
        *_options(cu_seq_q, cu_seq_k, max_k, seed, dropout_p, causal, scale),
        *(attention.lying(out), lse),
        # no gradients at pairs
        *(None, None, None, None, []),
        *(dq, dk, dv),
    )
    return dq, dk, dv


def _options(
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_k: int,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Any, ...]:
    # neither key_lengths nor prefix_lengths
    sequences = (None, None, cu_seq_q.long().contiguous(), cu_seq_k.long().contiguous(), max_k)
    return *sequences, None if seed is None else seed.contiguous(), dropout_p, attention.CAUSAL[causal], scale
