"""Causal attention modules with separate projections: those of minGPT (2020) and of CS224N's assignment 5.

Shapes: B batch, T sequence length, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from nlpfast.nn.dropout import Dropout
from nlpfast.nn.heads import check_heads, check_sequence, dropout_of, merge_heads, split_heads
from nlpfast.nn.key_value_cache import KeyValueCache
from nlpfast.nn.packing import Packing
from nlpfast.ops.attention import attention
from nlpfast.ops.varlen_attention import varlen_attention


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
    causal_align: str = "top_left"

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
        self.resid_drop = Dropout(config.resid_pdrop)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def _attend(
        self, x_q: Tensor, x_kv: Tensor, prefix_lengths: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Return the attended queries, [B, Tq, C]; a batch of 1 on either side goes with every other."""
        q, k, v = self._heads(self.query, x_q), self._heads(self.key, x_kv), self._heads(self.value, x_kv)
        if cache is not None:
            cache.extend(k, v)
        B = q.shape[0] if k.shape[0] == 1 else k.shape[0]
        q, k, v = (x if x.shape[0] == B else x.expand(B, -1, -1, -1) for x in (q, k, v))
        y = attention(
            *(q, k, v),
            dropout_p=dropout_of(self.attn_drop),
            is_causal=True,
            causal_align=self.causal_align,
            prefix_lengths=prefix_lengths,
            backend=self.backend,
        )
        return merge_heads(y)

    def _attend_packed(self, x_q: Tensor, x_kv: Tensor, packing: Packing, kv_packing: Packing) -> Tensor:
        """Return the attended queries of packed sequences, [Nq, C]."""
        q, k, v = (
            layer(x).unflatten(1, (self.n_head, -1))
            for layer, x in ((self.query, x_q), (self.key, x_kv), (self.value, x_kv))
        )
        y = varlen_attention(
            *(q, k, v, packing.cu_seqlens, kv_packing.cu_seqlens, packing.longest, kv_packing.longest),
            is_causal=True,
            dropout_p=dropout_of(self.attn_drop),
            causal_align=self.causal_align,
            backend=self.backend,
        )
        return y.flatten(1)

    def _attend_cached(self, x_q: Tensor, x_kv: Tensor | None, cache: KeyValueCache) -> Tensor:
        """Return one attended query of each sequence, [B, 1, C], after adding the keys of `x_kv`, if any."""
        if x_kv is not None:
            cache.extend(self._heads(self.key, x_kv), self._heads(self.value, x_kv))
        k, v, lengths = cache.seen()
        q = self._heads(self.query, x_q)
        return merge_heads(attention(q, k, v, key_lengths=lengths, backend=self.backend))

    def _heads(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return split_heads(layer(x), self.n_head)

    def _projected(self, y: Tensor, drop_output: bool) -> Tensor:
        out: Tensor = self.proj(y)
        return self.resid_drop(out) if drop_output else out

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

    def forward(
        self,
        x: Tensor,
        layer_past: KeyValueCache | None = None,
        *,
        prefix_lengths: Tensor | None = None,
        packing: Packing | None = None,
        drop_output: bool = True,
    ) -> Tensor:
        """Return the attended sequence.

        Args:
            x: [B, T, C], any floating dtype that the backend serves; [N, C] with `packing`.
            layer_past: keys and values of earlier positions. An empty one is filled with those of `x`, and
                any other takes one position more, so that T is 1. Without gradients.
            prefix_lengths: int64 [B]; earlier positions are seen from everywhere, later ones as ever.
            packing: `x` has the rows of several sequences, one after the other.
            drop_output: False leaves `resid_drop` to the caller.

        Returns:
            [B, T, C], or [N, C], the dtype of `x`.

        Raises:
            ValueError: when `x` is not [B, T, n_embd], or `packing` is given with another option.
        """
        given = {"layer_past": layer_past, "prefix_lengths": prefix_lengths, "packing": packing}
        names = [name for name, value in given.items() if value is not None]
        if "packing" in names and len(names) > 1:
            raise ValueError(f"{' and '.join(names)} cannot be given together; leave out packing")
        if packing is not None:
            return self._projected(self._attend_packed(x, x, packing, packing), drop_output)
        check_sequence("x", x, self.proj.in_features, "n_embd")
        if layer_past is not None and layer_past.longest:
            if x.shape[1] != 1:
                rule = "with keys in layer_past it takes one position more"
                raise ValueError(f"x has T={x.shape[1]} positions, {rule}; give them one by one")
            return self._projected(self._attend_cached(x, x, layer_past), drop_output)
        return self._projected(self._attend(x, x, prefix_lengths, layer_past), drop_output)


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
    ``causal_align="bottom_right"`` is for queries that are the last Tq of the Tk positions, as in Perceiver
    AR: query i sees the keys 0..i + Tk - Tq.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
        causal_align: "top_left" or "bottom_right".
    """

    def __init__(self, config: AttentionConfig, causal_align: str = "top_left") -> None:
        """Build the four linear layers.

        Args:
            config: see `AttentionConfig`; its `block_size` is not used.
            causal_align: "top_left" or "bottom_right".

        Raises:
            ValueError: when `n_embd` is not a positive multiple of `n_head`, or `causal_align` is unknown.
        """
        super().__init__(config)
        if causal_align not in ("top_left", "bottom_right"):
            raise ValueError(f"causal_align={causal_align!r} must be 'top_left' or 'bottom_right'")
        self.causal_align = causal_align

    def forward(
        self,
        x_kv: Tensor | None,
        x_q: Tensor,
        *,
        layer_past: KeyValueCache | None = None,
        packing: Packing | None = None,
        kv_packing: Packing | None = None,
        drop_output: bool = True,
    ) -> Tensor:
        """Return the attended queries.

        Args:
            x_kv: [B, Tk, C], any floating dtype that the backend serves; or [1, Tk, C] for every query;
                [Nk, C] with `packing`. None, or Tk = 1, where `layer_past` has keys.
            x_q: [B, Tq, C], or [1, Tq, C], such as learned latents, for every sequence of the batch;
                [Nq, C] with `packing`; Tq = 1 where `layer_past` has keys, all of which the query sees.
            layer_past: an empty one is filled with the keys of `x_kv`, any other gets those of one position
                more, or none. Without gradients.
            packing: `x_q` has the queries of several sequences, one after the other.
            kv_packing: the same of `x_kv`; all of these keys are computed.
            drop_output: False leaves `resid_drop` to the caller.

        Returns:
            [B, Tq, C], or [Nq, C], the dtype of `x_q`.

        Raises:
            ValueError: when an input is not [B, T, n_embd] or the batches differ and neither is 1; when one
                packing is given without the other, or with `layer_past`.
        """
        C = self.proj.in_features
        if packing is not None or kv_packing is not None:
            if packing is None or kv_packing is None or x_kv is None or layer_past is not None:
                rule = "go together, with x_kv and without layer_past; give both or none"
                raise ValueError(f"packing and kv_packing {rule}")
            return self._projected(self._attend_packed(x_q, x_kv, packing, kv_packing), drop_output)
        check_sequence("x_q", x_q, C, "n_embd")
        if x_kv is not None:
            check_sequence("x_kv", x_kv, C, "n_embd")
        if layer_past is not None and layer_past.longest:
            if x_q.shape[1] != 1 or (x_kv is not None and x_kv.shape[1] != 1):
                rule = "with keys in layer_past there is one position of each"
                raise ValueError(f"x_q has Tq={x_q.shape[1]} positions, {rule}; give them one by one")
            return self._projected(self._attend_cached(x_q, x_kv, layer_past), drop_output)
        if x_kv is None:
            raise ValueError("x_kv is None, and there are no keys in layer_past; give [B, Tk, C]")
        if x_kv.shape[0] != x_q.shape[0] and 1 not in (x_kv.shape[0], x_q.shape[0]):
            raise ValueError(
                f"x_kv has a batch of {x_kv.shape[0]} and x_q one of {x_q.shape[0]}; "
                "they must be equal, or one of them 1"
            )
        seen = x_kv[:, : x_q.shape[1]] if self.causal_align == "top_left" else x_kv
        return self._projected(self._attend(x_q, seen, None, layer_past), drop_output)
