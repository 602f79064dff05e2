"""Attention classes as users have them, in eager PyTorch: what the drop-in modules are compared with.

Names, constructors, state dicts and results are those of minGPT (2020 and 2023), nanoGPT, CS224N's assignment
5, minBERT, and the BERT of Hugging Face transformers 4.x. Shapes: B batch, T length, C channels, H heads.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gpt_config(**changes: Any) -> SimpleNamespace:
    """Return a small configuration of minGPT, nanoGPT and CS224N, with changes."""
    fields = {"n_embd": 12, "n_head": 3, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "block_size": 16}
    return SimpleNamespace(**{**fields, **changes})


def bert_config(**changes: Any) -> SimpleNamespace:
    """Return a small configuration of BERT, with changes."""
    fields = {"hidden_size": 12, "num_attention_heads": 3, "attention_probs_dropout_prob": 0.0}
    return SimpleNamespace(**{**fields, **changes})


def heads_first(x: Tensor, H: int) -> Tensor:
    """Return x [B, T, C] as [B, H, T, C / H]."""
    return x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2)


def rows_first(y: Tensor) -> Tensor:
    """Return y [B, H, T, D] as [B, T, H D]."""
    return y.transpose(1, 2).flatten(2)


class _SeparateProjections(nn.Module):
    mask: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        C = config.n_embd
        self.key, self.query, self.value = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.attn_drop, self.resid_drop = nn.Dropout(config.attn_pdrop), nn.Dropout(config.resid_pdrop)
        self.proj = nn.Linear(C, C)
        square = torch.ones(config.block_size, config.block_size)
        self.register_buffer("mask", square.tril()[None, None])
        self.n_head = config.n_head

    def _mix(self, x_q: Tensor, x_kv: Tensor) -> Tensor:
        q, k, v = (
            heads_first(layer(x), self.n_head)
            for layer, x in ((self.query, x_q), (self.key, x_kv), (self.value, x_kv))
        )
        scores = q @ k.mT / math.sqrt(k.shape[-1])
        hidden = self.mask[:, :, : q.shape[2], : k.shape[2]] == 0
        weights = self.attn_drop(scores.masked_fill(hidden, -1e10).softmax(-1))
        out: Tensor = self.resid_drop(self.proj(rows_first(weights @ v)))
        return out


class CausalSelfAttention(_SeparateProjections):
    """minGPT's class of 2020; CS224N has the same."""

    def forward(self, x: Tensor, layer_past: None = None) -> Tensor:
        """Return [B, T, C] of x [B, T, C]."""
        return self._mix(x, x)


class CausalCrossAttention(_SeparateProjections):
    """CS224N's class for the Perceiver bottleneck."""

    def forward(self, x_kv: Tensor, x_q: Tensor) -> Tensor:
        """Return [B, Tq, C] of x_kv [B or 1, Tk, C] and x_q [B or 1, Tq, C]."""
        return self._mix(x_q, x_kv)


class _PackedProjection(nn.Module):
    bias: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        C, bias = config.n_embd, getattr(config, "bias", True)
        dropout = getattr(config, "dropout", None)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.attn_dropout = nn.Dropout(config.attn_pdrop if dropout is None else dropout)
        self.resid_dropout = nn.Dropout(config.resid_pdrop if dropout is None else dropout)
        self.n_head, self.n_embd = config.n_head, C
        # nanoGPT leaves the attention to PyTorch where it can, and then has no mask
        self.fused = getattr(config, "fused", False)
        if not self.fused:
            square = torch.ones(config.block_size, config.block_size)
            self.register_buffer("bias", square.tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_first(part, self.n_head) for part in self.c_attn(x).split(self.n_embd, 2))
        if self.fused:
            p = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            scores = q @ k.mT / math.sqrt(k.shape[-1])
            hidden = self.bias[:, :, : x.shape[1], : x.shape[1]] == 0
            y = self.attn_dropout(scores.masked_fill(hidden, -math.inf).softmax(-1)) @ v
        out: Tensor = self.resid_dropout(self.c_proj(rows_first(y)))
        return out


# minGPT's class of 2023 and nanoGPT's have the name of that of 2020.
Packed = type("CausalSelfAttention", (_PackedProjection,), {"__module__": __name__})


class _Bert(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        C, self.num_attention_heads = config.hidden_size, config.num_attention_heads
        self.attention_head_size, self.all_head_size = C // self.num_attention_heads, C
        self.query, self.key, self.value = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT / math.sqrt(self.attention_head_size)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return rows_first(self.dropout(weights) @ v)


class BertSelfAttention(_Bert):
    """minBERT's class."""

    def transform(self, x: Tensor, linear_layer: nn.Linear) -> Tensor:
        """Return x [B, T, C], projected, as [B, H, T, D]."""
        return heads_first(linear_layer(x), self.num_attention_heads)

    def attention(self, key: Tensor, query: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [B, T, C] of heads; the mask [B, 1, 1, T] is added."""
        return self._mix(query, key, value, attention_mask)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [B, T, C] of hidden_states [B, T, C]."""
        k, v, q = (self.transform(hidden_states, part) for part in (self.key, self.value, self.query))
        return self.attention(k, q, v, attention_mask)


class _TupleBert(_Bert):
    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return heads_first(x, self.num_attention_heads)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor]:
        q, k, v = (
            self.transpose_for_scores(part(hidden_states)) for part in (self.query, self.key, self.value)
        )
        return (self._mix(q, k, v, attention_mask),)


TupleBert = type("BertSelfAttention", (_TupleBert,), {"__module__": __name__})


class Layer(nn.Module):
    """A pre-norm block round an attention module: what a model has of each."""

    def __init__(self, attention: nn.Module, C: int = 12) -> None:
        """Take the attention module and its number of channels."""
        super().__init__()
        self.ln, self.attn, self.ln2 = nn.LayerNorm(C), attention, nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Return [B, T, C] of x [B, T, C]; others go to the attention."""
        y = self.attn(self.ln(x), *others)
        x = x + (y[0] if isinstance(y, tuple) else y)
        out: Tensor = x + self.mlp(self.ln2(x))
        return out
