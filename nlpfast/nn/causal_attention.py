"""Causal attention modules with separate projections: those of minGPT (2020) and of CS224N's assignment 5.

Shapes: B batch, T sequence length, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from nlpfast.nn.heads import check_heads, check_sequence, dropout_of, merge_heads, split_heads
from nlpfast.ops.attention import attention


class AttentionConfig(Protocol):
    """What the causal modules read from their configuration; any object with these attributes will do."""

    n_embd: int
    n_head: int
    attn_pdrop: float
    resid_pdrop: float
    block_size: int


class _CausalAttention(nn.Module):
    """The four projections, the two dropouts, and state dicts with the `mask` buffer of the originals."""

    n_head: int
    # name of the attention backend, None to let the device and the dtype decide
    backend: str | None = None

    def __init__(self, config: AttentionConfig) -> None:
        """Build the four linear layers.

        Args:
            config: object with `n_embd` (C), `n_head` (H), `attn_pdrop`, `resid_pdrop`; its `block_size` is
                not used.

        Raises:
            ValueError: when `n_embd` is not a positive multiple of `n_head`.
        """
        super().__init__()
        check_heads("n_embd", config.n_embd, "n_head", config.n_head)
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        # carries the probability and the train/eval switch; the kernel does the dropping
        self.attn_drop = nn.Dropout(config.attn_pdrop)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def _attend(self, x_q: Tensor, x_kv: Tensor) -> Tensor:
        """Return the attended queries, [B, Tq, C]; a batch of 1 on either side goes with every other."""
        q, k, v = (
            split_heads(layer(x), self.n_head)
            for layer, x in ((self.query, x_q), (self.key, x_kv), (self.value, x_kv))
        )
        B = q.shape[0] if k.shape[0] == 1 else k.shape[0]
        q, k, v = (x if x.shape[0] == B else x.expand(B, -1, -1, -1) for x in (q, k, v))
        dropout_p = dropout_of(self.attn_drop)
        y = attention(q, k, v, dropout_p=dropout_p, is_causal=True, backend=self.backend)
        out: Tensor = self.resid_drop(self.proj(merge_heads(y)))
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # state_dict is torch's own copy, so the caller's dictionary keeps its mask
        if "mask" not in self._buffers:
            state_dict.pop(prefix + "mask", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class CausalSelfAttention(_CausalAttention):
    """Attend from every position to itself and the positions before it, with several heads.

    The module has the constructor and the state-dict names of minGPT (2020): `key`, `query`, `value` and
    `proj` are linear layers with bias. It computes the same as::

        q, k, v = (layer(x).view(B, T, H, D).transpose(1, 2) for layer in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn_pdrop, is_causal=True)
        resid_drop(proj(y.transpose(1, 2).reshape(B, T, C)))

    The causal mask is part of the attention kernel, so the module has no `mask` buffer and takes any T; state
    dicts that hold the `mask` buffer of the original load with ``strict=True``, the buffer is left out.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    def forward(self, x: Tensor, layer_past: None = None) -> Tensor:
        """Return the attended sequence.

        Args:
            x: [B, T, C], any floating dtype that the backend serves.
            layer_past: part of the original signature; there is no cache here, so it must be None.

        Returns:
            [B, T, C], the dtype of `x`.

        Raises:
            ValueError: when `x` is not [B, T, n_embd] or `layer_past` is given.
        """
        if layer_past is not None:
            raise ValueError(
                "layer_past must be None: this module keeps no cache; pass the whole sequence as x"
            )
        check_sequence("x", x, self.proj.in_features, "n_embd")
        return self._attend(x, x)


class CausalCrossAttention(_CausalAttention):
    """Attend from the queries of one sequence to the keys of another; query i sees the keys 0..i.

    The attention of the Perceiver bottleneck in CS224N's assignment 5, with its constructor and state-dict
    names. It computes the same as::

        q = query(x_q).view(Bq, Tq, H, D).transpose(1, 2)
        k, v = (layer(x_kv).view(Bk, Tk, H, D).transpose(1, 2) for layer in (key, value))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn_pdrop, is_causal=True)
        resid_drop(proj(y.transpose(1, 2).reshape(B, Tq, C)))

    The mask is aligned at the top left, so keys from position Tq on are seen by no query: neither they nor
    their projections are computed, and their gradient is 0. A bottleneck of m latents does not see the tokens
    from m on. There is no `mask` buffer and any length will do; state dicts with a `mask` load strictly.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    def forward(self, x_kv: Tensor, x_q: Tensor) -> Tensor:
        """Return the attended queries.

        Args:
            x_kv: [B, Tk, C], any floating dtype that the backend serves; or [1, Tk, C] for every query.
            x_q: [B, Tq, C], or [1, Tq, C], such as learned latents, for every sequence of the batch.

        Returns:
            [B, Tq, C], the dtype of `x_q`.

        Raises:
            ValueError: when an input is not [B, T, n_embd] or the batches differ and neither is 1.
        """
        C = self.proj.in_features
        check_sequence("x_kv", x_kv, C, "n_embd")
        check_sequence("x_q", x_q, C, "n_embd")
        if x_kv.shape[0] != x_q.shape[0] and 1 not in (x_kv.shape[0], x_q.shape[0]):
            raise ValueError(
                f"x_kv has a batch of {x_kv.shape[0]} and x_q one of {x_q.shape[0]}; "
                "they must be equal, or one of them 1"
            )
        return self._attend(x_q, x_kv[:, : x_q.shape[1]])
