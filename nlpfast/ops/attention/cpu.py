"""Attention on CPUs: the compiled kernels of csrc/attention, one set per instruction set."""

import torch
from torch import Tensor

SERVES = (
    "float32, D and Dv <= 256, any strides, causal, key_lengths, dropout, lse, grouped heads; "
    "no kernel yet for other dtypes, attn_mask and prefix_lengths, which the reference serves"
)
MAX_HEAD_SIZE = 256

# As csrc/library.cpp numbers them.
_CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if query.device.type != "cpu":
        return f"it computes on the CPU, and the tensors are on {query.device}"
    if query.dtype != torch.float32:
        return f"it computes in float32, and the tensors are {query.dtype}"
    if attn_mask is not None:
        return "it has no attn_mask yet"
    if prefix_lengths is not None:
        return "it has no prefix_lengths yet"
    if query.shape[3] > MAX_HEAD_SIZE or value.shape[3] > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, and got {max(query.shape[3], value.shape[3])}"
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
    """Return out [B, H, L, Dv] and lse [B, H, L], as the reference defines them, and lse_low [B, H, L].

    lse + lse_low is lse to twice its precision: backward recomputes exp(score - lse), where the rounding of
    lse is a relative error of every weight, 0.4 % at scores of 1e5.
    """
    if key_lengths is not None:
        key_lengths = key_lengths.contiguous()
    if seed is not None:
        seed = seed.contiguous()
    return torch.ops.nlpfast.attention_forward(
        query, key, value, key_lengths, seed, dropout_p, _CAUSAL[causal], scale
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
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Return the gradients of query, key and value, contiguous; there is no mask to have one."""
    if key_lengths is not None:
        key_lengths = key_lengths.contiguous()
    if seed is not None:
        seed = seed.contiguous()
    dq, dk, dv = torch.ops.nlpfast.attention_backward(
        *(grad_out, grad_lse, query, key, value, out, lse, lse_low),
        *(key_lengths, seed, dropout_p, _CAUSAL[causal], scale),
    )
    return dq, dk, dv, None


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::attention_forward")
    def _(query, key, value, key_lengths, seed, dropout_p, causal, scale):  # type: ignore[no-untyped-def]
        B, H, L, _ = query.shape
        lse = query.new_empty(B, H, L)
        return query.new_empty(B, H, L, value.shape[3]), lse, torch.empty_like(lse)

    @torch.library.register_fake("nlpfast::attention_backward")
    def _(  # type: ignore[no-untyped-def]
        grad_out, grad_lse, query, key, value, out, lse, lse_low, key_lengths, seed, dropout_p, causal, scale
    ):
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_register_fakes()
