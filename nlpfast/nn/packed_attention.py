"""Causal self-attention with one projection for query, key and value: minGPT (2023), nanoGPT, GPT-2.

Shapes: B batch, T sequence length, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nlpfast.nn.causal_attention import AttentionConfig
from nlpfast.nn.dropout import Dropout
from nlpfast.nn.heads import check_heads, check_sequence, dropout_of, merge_heads
from nlpfast.ops.attention import attention


class PackedCausalSelfAttention(nn.Module):
    """Attend from every position to itself and the positions before it, with several heads.

    The module has the state-dict names of minGPT (2023) and nanoGPT: `c_attn` projects to query, key and
    value at once, `c_proj` projects back. It computes the same as::

        q, k, v = c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn_pdrop, is_causal=True)
        resid_dropout(c_proj(y.transpose(1, 2).reshape(B, T, C)))

    The kernel reads the three where they lie. There is no mask: state dicts with the `bias` buffer of the
    originals, [1, 1, block_size, block_size], load with ``strict=True``, the buffer is left out.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    n_head: int
    backend: str | None = None

    def __init__(self, config: AttentionConfig) -> None:
        """Build the two linear layers.

        Args:
            config: object with `n_embd` (C), `n_head` (H), and `attn_pdrop` and `resid_pdrop` (minGPT) or one
                `dropout` for both and `bias` (nanoGPT; True where it is missing).

        Raises:
            ValueError: when `n_embd` is not a positive multiple of `n_head`.
        """
        super().__init__()
        check_heads("n_embd", config.n_embd, "n_head", config.n_head)
        bias = bool(getattr(config, "bias", True))
        both = getattr(config, "dropout", None)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        # carries the probability and the train/eval switch; the kernel does the dropping
        self.attn_dropout = nn.Dropout(config.attn_pdrop if both is None else both)
        self.resid_dropout = Dropout(config.resid_pdrop if both is None else both)
        self.n_head = config.n_head

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended sequence.

        Args:
            x: [B, T, C], any floating dtype that the backend serves.

        Returns:
            [B, T, C], the dtype of `x`.

        Raises:
            ValueError: when `x` is not [B, T, n_embd].
        """
        C = self.c_proj.in_features
        check_sequence("x", x, C, "n_embd")
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        dropout_p = dropout_of(self.attn_dropout)
        y = attention(q, k, v, dropout_p=dropout_p, is_causal=True, backend=self.backend)
        out: Tensor = self.resid_dropout(self.c_proj(merge_heads(y)))
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # state_dict is torch's own copy, so the caller's dictionary keeps its mask
        if "bias" not in self._buffers:
            state_dict.pop(prefix + "bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
