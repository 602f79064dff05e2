"""Attention on packed sequences on GPUs: the Triton kernels of attention, which read sequences in place."""

from __future__ import annotations

from torch import Tensor

from nlpfast.ops.attention import triton as attention
from nlpfast.ops.attention.triton_launch import run_backward, run_forward

SERVES = "CUDA devices; float32, bfloat16 and float16, D and Dv <= 256, any strides"


def refusal(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_k: int
) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    return attention.refusal(query, key, value, None, None, None)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [total_q, H, Dv] and lse [H, total_q], as the reference defines them, and [H, total_q, 2].

    The third holds the maximum of each row's scores and the inverse of its sum, where backward reads them.
    """
    masks = (None, None, None, cu_seq_q, cu_seq_k)
    return run_forward(query, key, value, *masks, max_q, max_k, seed, dropout_p, causal, scale)


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
    """Return the gradients of query, key and value."""
    masks = (None, None, None, cu_seq_q, cu_seq_k)
    dq, dk, dv, _ = run_backward(
        grad_out,
        grad_lse,
        out,
        lse_low,
        False,
        *(query, key, value, *masks, max_q, max_k, seed, dropout_p, causal, scale),
    )
    return dq, dk, dv
