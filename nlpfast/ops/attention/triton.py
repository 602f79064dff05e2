"""Attention on GPUs: the Triton kernels of triton_forward.py and triton_backward*.py.

With TRITON_INTERPRET=1 set when Python starts, the kernels run on the CPU, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from nlpfast.ops.additions import PairGradients
from nlpfast.ops.attention.reference import check_lengths
from nlpfast.ops.attention.triton_launch import run_backward, run_forward

SERVES = "CUDA devices; float32, bfloat16 and float16, D and Dv <= 256, every mask, any strides"
MAX_HEAD_SIZE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED: bool = triton.knobs.runtime.interpret


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if query.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and the tensors are {query.dtype}"
    if query.device.type != "cuda":
        if not INTERPRETED or query.device.type != "cpu":
            return f"it computes on CUDA devices, and the tensors are on {query.device}"
        if query.dtype != torch.float32:
            return f"Triton's interpreter computes in float32, and the tensors are {query.dtype}"
    if query.shape[-1] > MAX_HEAD_SIZE or value.shape[-1] > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, and got {max(query.shape[-1], value.shape[-1])}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [B, H, L, Dv] and lse [B, H, L], as the reference defines them, and [B, H, L, 2].

    The third holds the maximum of each row's scores and the inverse of its sum, where backward reads them.
    """
    check_lengths("key_lengths", key_lengths, key.shape[2])
    check_lengths("prefix_lengths", prefix_lengths, key.shape[2])
    masks = (attn_mask, key_lengths, prefix_lengths, None, None)
    return run_forward(
        *(query, key, value, *masks, query.shape[2], key.shape[2], seed, dropout_p, causal, scale)
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
    extra: Sequence[PairGradients] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key and value, and of a mask that requires one."""
    mask_gradient = attn_mask is not None and attn_mask.requires_grad
    masks = (attn_mask, key_lengths, prefix_lengths, None, None)
    dq, dk, dv, dmask = run_backward(
        grad_out,
        grad_lse,
        out,
        lse_low,
        mask_gradient,
        *(query, key, value, *masks, query.shape[2], key.shape[2], seed, dropout_p, causal, scale),
    )
    for pairs in extra:
        pairs.add_to(dq, dk)
    return dq, dk, dv, dmask.to(attn_mask.dtype) if mask_gradient and attn_mask is not None else None
