"""Attention classes and a GPT as users have them, in eager PyTorch: what ours are compared with.

Names, constructors, state dicts and results are those of minGPT (2020 and 2023), nanoGPT, CS224N's assignment
5, minBERT, and the BERT of Hugging Face transformers 4.x. Shapes: B batch, T length, C channels, H heads, m
latents.
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
        # not in the originals: the attention is left to PyTorch
        self.fused = getattr(config, "fused", False)

    def _mix(self, x_q: Tensor, x_kv: Tensor) -> Tensor:
        q, k, v = (
            heads_first(layer(x), self.n_head)
            for layer, x in ((self.query, x_q), (self.key, x_kv), (self.value, x_kv))
        )
        if self.fused:
            p = self.attn_drop.p if self.training else 0.0
            q = q.expand(k.shape[0], -1, -1, -1)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
            return self._projected(y)
        scores = q @ k.mT / math.sqrt(k.shape[-1])
        hidden = self.mask[:, :, : q.shape[2], : k.shape[2]] == 0
        weights = self.attn_drop(scores.masked_fill(hidden, -1e10).softmax(-1))
        return self._projected(weights @ v)

    def _projected(self, y: Tensor) -> Tensor:
        out: Tensor = self.resid_drop(self.proj(rows_first(y)))
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


class _PreNorm(nn.Module):
    """What the blocks of the assignment's GPT are made of."""

    def __init__(self, config: Any, attention: nn.Module) -> None:
        super().__init__()
        C = config.n_embd
        self.ln1, self.ln2, self.attn = nn.LayerNorm(C), nn.LayerNorm(C), attention
        self.mlp = nn.Sequential(
            nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(config.resid_pdrop)
        )

    def _through_mlp(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.mlp(self.ln2(h))
        return out


class Block(_PreNorm):
    """The block of minGPT (2020) and of the assignment."""

    def __init__(self, config: Any) -> None:
        """Build it with self-attention."""
        super().__init__(config, CausalSelfAttention(config))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, C] of x [B, T, C]."""
        return self._through_mlp(x + self.attn(self.ln1(x)))


class DownProjectBlock(_PreNorm):
    """The assignment's block from tokens to latents."""

    def __init__(self, config: Any) -> None:
        """Build it with cross-attention and latents."""
        super().__init__(config, CausalCrossAttention(config))
        self.C = nn.Parameter(torch.empty(1, config.bottleneck_dim, config.n_embd))
        nn.init.xavier_uniform_(self.C)

    def forward(self, x: Tensor) -> Tensor:
        """Return latents [B, m, C] of x [B, T, C]; all T keys are computed, most of them to be masked."""
        return self._through_mlp(self.attn(self.ln1(x), self.ln1(self.C)))


class UpProjectBlock(_PreNorm):
    """The assignment's block from latents to tokens."""

    def __init__(self, config: Any) -> None:
        """Build it with cross-attention."""
        super().__init__(config, CausalCrossAttention(config))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return [B, T, C] of latents y [B, m, C] and of x [B, T, C], which the down block was given."""
        return self._through_mlp(self.attn(self.ln1(y), x))


class GPT(nn.Module):
    """The assignment's GPT, with `perceiver` that of its bottleneck."""

    def __init__(self, config: Any) -> None:
        """Build the model; linear and embedding weights come from N(0, 0.02), biases and positions are 0."""
        super().__init__()
        V, C, self.perceiver = config.vocab_size, config.n_embd, config.perceiver
        self.tok_emb, self.pos_emb = nn.Embedding(V, C), nn.Parameter(torch.zeros(1, config.block_size, C))
        self.drop = nn.Dropout(config.embd_pdrop)
        if self.perceiver:
            self.down_block, self.up_block = DownProjectBlock(config), UpProjectBlock(config)
        blocks = config.n_layer - (2 if self.perceiver else 0)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(blocks)])
        self.ln_f, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.apply(_draw_weights)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, T, V] of tokens [B, T], and the loss of targets [B, T], of which 0 is padding."""
        x = self.drop(self.tok_emb(idx) + self.pos_emb[:, : idx.shape[1]])
        y = self.up_block(self.blocks(self.down_block(x)), x) if self.perceiver else self.blocks(x)
        logits: Tensor = self.head(self.ln_f(y))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=0)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return all parameters for an optimizer; the weights of linear layers alone are decayed."""
        decayed = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        others = [p for p in self.parameters() if all(p is not weight for weight in decayed)]
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]


def _draw_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
