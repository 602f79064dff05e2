"""torch.nn.MultiheadAttention on the kernels of nlpfast.

Shapes: B batch, L query length, S key length, E embedding, H heads, D = E / H head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.ops.attention import attention
from nlpfast.ops.varlen_attention import varlen_attention


class MultiheadAttention(nn.MultiheadAttention):
    """Attend with several heads: torch's class of that name, its constructor, masks and state dict.

    Equivalent PyTorch: ``torch.nn.MultiheadAttention`` with the same arguments. Inside
    ``nn.TransformerEncoderLayer`` it is used in evaluation too, where torch's layer would bypass the module.

    Three things differ. A query without a visible key gets the output projection's bias (torch: that or NaN,
    depending on the path). ``is_causal=True`` is enough for a causal mask; an ``attn_mask`` beside it is
    taken for that mask and not read. And calls that ask for the attention weights, which the kernel never
    builds, run in PyTorch: pass ``need_weights=False``, as torch's Transformer layers do. So do modules with
    ``add_bias_kv`` or ``add_zero_attn``.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    backend: str | None = None

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, once built: torch's encoder layer then calls this module and not its own fused operation."""
        # the last attribute that torch's constructor sets; until then it asks in earnest
        built = "add_zero_attn" in self.__dict__
        return not built and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        # kept where torch's class looks for it, should this module become one again
        self.__dict__["_qkv_same_embed_dim"] = value

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended queries, and the attention weights if they are asked for.

        Args:
            query: [L, B, E], [B, L, E] with `batch_first`, or [L, E]. Nested tensors are taken for
                self-attention.
            key: [S, B, kdim], [B, S, kdim] or [S, kdim].
            value: [S, B, vdim], [B, S, vdim] or [S, vdim].
            key_padding_mask: [B, S] or [S]. bool: True = hide this key. Floating: added to the scores.
            need_weights: also return the weights; the call then runs in PyTorch.
            attn_mask: [L, S] or [B * H, L, S]. bool: True = hide. Floating: added to the scores.
            average_attn_weights: average the returned weights over the heads.
            is_causal: hide later keys from a query.

        Returns:
            The output in query's shape and layout, and the weights ([B, L, S], or [B, H, L, S] when not
            averaged) or None.

        Raises:
            ValueError, TypeError, RuntimeError: as `nlpfast.attention` does, and torch for `need_weights`.
        """
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, attn_mask), None
        if need_weights or self.bias_k is not None or self.add_zero_attn:
            return self._forward_torch(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        rows_first = self.batch_first or not batched
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        # [B, L, H, D] or [L, B, H, D] -> [B, H, L, D]
        q, k, v = (x.permute((0, 2, 1, 3) if rows_first else (1, 2, 0, 3)) for x in (q, k, v))
        mask = self._mask(q, k, key_padding_mask, None if is_causal else attn_mask)
        dropout_p = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, dropout_p, is_causal, backend=self.backend)
        out = self.out_proj(y.permute((0, 2, 1, 3) if rows_first else (2, 0, 1, 3)).flatten(2))
        return (out if batched else out.squeeze(0)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values with their last dimension split into [H, D]."""
        heads = (self.num_heads, self.head_dim)
        if self.in_proj_weight is not None and query is key and key is value:
            packed = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, *heads))
            q, k, v = packed.unbind(-3)
            return q, k, v
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, heads) for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        return q, k, v

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Return both masks as one that `attention` takes: True = attend, or to be added."""
        padding = None if key_padding_mask is None else key_padding_mask.view(-1, 1, 1, k.shape[2])
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(q.shape[0], self.num_heads, q.shape[2], k.shape[2])
        if padding is None or attn_mask is None:
            mask = padding if attn_mask is None else attn_mask
            return ~mask if mask is not None and mask.dtype == torch.bool else mask
        if padding.dtype == attn_mask.dtype == torch.bool:
            return ~(padding | attn_mask)
        if padding.dtype == torch.bool:
            return attn_mask.masked_fill(padding, -math.inf)
        if attn_mask.dtype == torch.bool:
            return padding.masked_fill(attn_mask, -math.inf)
        return padding + attn_mask

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Attend within each sequence of a nested tensor [B, *, E], as torch's encoder makes them."""
        masked = key_padding_mask is not None or attn_mask is not None
        if query is not key or key is not value or need_weights or masked or self.bias_k is not None:
            raise ValueError(
                "query is nested; nested tensors are served for self-attention without masks and weights: "
                "pad the others with to_padded_tensor"
            )
        rows = query.unbind()
        lengths = [len(x) for x in rows]
        ends = torch.tensor([0, *lengths], device=query.device).cumsum(0)
        x = torch.cat(rows)
        q, k, v = self._project(x, x, x)
        dropout_p = self.dropout if self.training else 0.0
        longest = max(lengths, default=0)
        y = varlen_attention(q, k, v, ends, ends, longest, longest, dropout_p=dropout_p, backend=self.backend)
        return torch.nested.as_nested_tensor(list(self.out_proj(y.flatten(1)).split(lengths)))

    def _forward_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Let PyTorch compute what the kernel does not have: weights, added biases, added zeros."""
        swap = self.batch_first and query.dim() == 3
        if swap:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out, weights = F.multi_head_attention_forward(
            *(query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias),
            *(self.bias_k, self.bias_v, self.add_zero_attn, self.dropout),
            *(self.out_proj.weight, self.out_proj.bias, self.training),
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if swap else out), weights
