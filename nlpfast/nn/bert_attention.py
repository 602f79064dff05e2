"""BERT's self-attention, with the interface of minBERT and that of Hugging Face.

Shapes: B batch, T sequence length, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from nlpfast.nn.heads import check_heads, check_sequence, dropout_of, merge_heads, split_heads
from nlpfast.nn.packing import Packing
from nlpfast.ops.attention import attention
from nlpfast.ops.varlen_attention import varlen_attention

# What Hugging Face's layers pass along and what changes nothing here.
_HARMLESS = ("cache_position", "position_ids", "use_cache")


class BertConfig(Protocol):
    """What `BertSelfAttention` reads from its configuration; any object with these attributes will do."""

    hidden_size: int
    num_attention_heads: int
    attention_probs_dropout_prob: float


class BertSelfAttention(nn.Module):
    """Attend from every position to every position that the mask allows, with several heads.

    The module has the constructor, the methods and the state-dict names of minBERT (CS224N's default project
    and its descendants): `query`, `key` and `value` are linear layers with bias. It computes the same as::

        q, k, v = (layer(x).view(B, T, H, D).transpose(1, 2) for layer in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, dropout_p=attention_probs_dropout_prob)
        y.transpose(1, 2).reshape(B, T, C)

    Attention weights are dropped in training, as Hugging Face does and some copies of minBERT do not; a
    probability of 0 gives the latter. The output projection belongs to the layer round this module.

    Attributes:
        return_tuple: return ``(context, None)``, as Hugging Face's class of the same name does.
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    return_tuple: bool = False
    backend: str | None = None

    def __init__(self, config: BertConfig, *, return_tuple: bool = False) -> None:
        """Build the three linear layers.

        Args:
            config: object with `hidden_size` (C), `num_attention_heads` (H), `attention_probs_dropout_prob`.
            return_tuple: return ``(context, None)``, for use inside Hugging Face's layers.

        Raises:
            ValueError: when `hidden_size` is not a positive multiple of `num_attention_heads`.
        """
        super().__init__()
        C, H = config.hidden_size, config.num_attention_heads
        check_heads("hidden_size", C, "num_attention_heads", H)
        self.num_attention_heads = H
        self.attention_head_size = C // H
        self.all_head_size = C
        self.query = nn.Linear(C, C)
        self.key = nn.Linear(C, C)
        self.value = nn.Linear(C, C)
        # carries the probability and the train/eval switch; the kernel does the dropping
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.return_tuple = return_tuple

    def transform(self, x: Tensor, linear_layer: nn.Linear) -> Tensor:
        """Project x [B, T, C] with the layer and return it as heads [B, H, T, D]."""
        return split_heads(linear_layer(x), self.num_attention_heads)

    def attention(
        self, key: Tensor, query: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the heads' outputs side by side.

        Args:
            key: [B, H, S, D].
            query: [B, H, T, D].
            value: [B, H, S, D].
            attention_mask: broadcastable to [B, H, T, S]; floating: added to the scores (minBERT's 0 and
                -10000, [B, 1, 1, S]); bool: True = attend.

        Returns:
            [B, T, C]. A query whose mask is -inf or False everywhere gets 0.
        """
        dropout_p = dropout_of(self.dropout)
        y = attention(query, key, value, attention_mask, dropout_p, backend=self.backend)
        return merge_heads(y)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *others: Any,
        packing: Packing | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, None]:
        """Return the attended sequence.

        Args:
            hidden_states: [B, T, C], any floating dtype that the backend serves; [N, C] with `packing`.
            attention_mask: as in `attention`; not with `packing`.
            packing: `hidden_states` has the rows of several sequences, one after the other.
            others: as `options`, by position.
            options: what the layers of Hugging Face pass; of those that would change the result (a head
                mask, a cache, another sequence to attend to, attention weights as a result) none is served.

        Returns:
            [B, T, C], or [N, C], the dtype of `hidden_states`; with `return_tuple` followed by None for the
            weights.

        Raises:
            ValueError: when `hidden_states` is not [B, T, hidden_size], or a mask is given with `packing`.
            NotImplementedError: for an option that would change the result; names it.
        """
        if packing is None:
            check_sequence("hidden_states", hidden_states, self.all_head_size, "hidden_size")
        elif attention_mask is not None:
            raise ValueError("attention_mask is given with packing, which has no padding: leave it out")
        unnamed = {f"argument {i} of the forward call": value for i, value in enumerate(others, 3)}
        for name, value in {**unnamed, **options}.items():
            if value is not None and value is not False and name not in _HARMLESS:
                raise NotImplementedError(
                    f"{name} is given, which this module does not serve: leave it out, or keep the original"
                )
        layers = (self.query, self.key, self.value)
        if packing is not None:
            q, k, v = (layer(hidden_states).unflatten(1, (self.num_attention_heads, -1)) for layer in layers)
            context = self._attend_packed(q, k, v, packing)
        else:
            q, k, v = (self.transform(hidden_states, layer) for layer in layers)
            context = self.attention(k, q, v, attention_mask)
        return (context, None) if self.return_tuple else context

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """Return the heads' outputs side by side, [N, C], of q, k, v [N, H, D]."""
        cu, longest = packing.cu_seqlens, packing.longest
        dropout_p = dropout_of(self.dropout)
        y = varlen_attention(q, k, v, cu, cu, longest, longest, dropout_p=dropout_p, backend=self.backend)
        return y.flatten(1)
