"""Attention on packed sequences on CPUs: the compiled kernels of attention, which read sequences in place."""

import torch
from torch import Tensor

from nlpfast.ops.attention import cpu as attention

SERVES = "float32, bfloat16 and float16, D and Dv <= 256, any strides"


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
    """Return out [total_q, H, Dv] and lse [H, total_q], as the reference defines them, and lse_low.

    lse + lse_low is lse to twice its precision, which backward wants as that of attention does.
    """
    return torch.ops.nlpfast.varlen_attention_forward(
        *(query, key, value, _integers(cu_seq_q), _integers(cu_seq_k), max_q, max_k),
        *(None if seed is None else _integers(seed), dropout_p, attention.CAUSAL[causal], scale),
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
    return torch.ops.nlpfast.varlen_attention_backward(
        *(grad_out, grad_lse, query, key, value, out, lse, lse_low),
        *(_integers(cu_seq_q), _integers(cu_seq_k), max_q, max_k),
        *(None if seed is None else _integers(seed), dropout_p, attention.CAUSAL[causal], scale),
    )


def _integers(x: Tensor) -> Tensor:
    """Return a vector as the operations read it: int64, without strides."""
    return x.long().contiguous()


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::varlen_attention_forward")
    def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
        total, H, _ = query.shape
        lse = query.new_empty((H, total), dtype=torch.float32)
        return query.new_empty(total, H, value.shape[2]), lse, torch.empty_like(lse)

    @torch.library.register_fake("nlpfast::varlen_attention_backward")
    def _(grad_out, grad_lse, query, key, value, *rest):  # type: ignore[no-untyped-def]
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_register_fakes()
