"""The Perceiver bottleneck of CS224N's assignment 5: down to a few latents, and up again to the tokens.

    tokens [B, T, C] -> DownProjectBlock -> latents [B, m, C] -> Blocks -> UpProjectBlock -> [B, T, C]

Latent i sees the tokens 0..i, and token t the latents 0..t, so that nothing looks ahead. Two things follow
from such a mask, aligned at the top left. The tokens from m on are seen by no latent: the bottleneck carries
nothing of them, they are neither normalised nor projected there, and their gradient through it is exactly 0.
And with fewer than m tokens the latents from T on are seen by no token, so that they are not computed.

Shapes: B batch, T tokens, C channels (n_embd), m latents (bottleneck_dim). Source: Jaegle et al.,
    "Perceiver", 2021.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from nlpfast.nn import CausalCrossAttention

__all__ = ["DownProjectBlock", "PerceiverConfig", "UpProjectBlock"]

LATENT_INITS = ("xavier", "normal")


class PerceiverConfig(Protocol):
    """What the two blocks read from their configuration.

    Attributes:
        n_embd: channels, C.
        n_head: attention heads.
        block_size: longest sequence.
        attn_pdrop: dropout of the attention probabilities.
        resid_pdrop: dropout of what a block gives.
        bottleneck_dim: latents, m.
        latent_init: "xavier", U(-b, b) with b = sqrt(6 / ((m + 1) C)) as the assignment draws them, or
            "normal",
            N(0, 0.02) as the embeddings.
        normalize_query: the tokens that ask in the up block go through its layer norm too.
        residual: the up block adds what it finds to the tokens.
    """

    n_embd: int
    n_head: int
    block_size: int
    attn_pdrop: float
    resid_pdrop: float
    bottleneck_dim: int
    latent_init: str
    normalize_query: bool
    residual: bool


def _mlp(config: PerceiverConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.n_embd, 4 * config.n_embd),
        nn.GELU(),
        nn.Linear(4 * config.n_embd, config.n_embd),
        nn.Dropout(config.resid_pdrop),
    )


class DownProjectBlock(nn.Module):
    """Latents that have looked at the tokens: ``h = attn(ln1(x), ln1(C))``, then ``h + mlp(ln2(h))``.

    Attributes:
        C: the latents, a parameter [1, m, C]; the whole batch reads them in place.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        """Build latents, attention and network.

        Raises:
            ValueError: when `latent_init` is unknown.
        """
        super().__init__()
        self.C = nn.Parameter(torch.empty(1, config.bottleneck_dim, config.n_embd))
        if config.latent_init not in LATENT_INITS:
            rule = f"must be one of {', '.join(LATENT_INITS)}; pass one of them"
            raise ValueError(f"config.latent_init={config.latent_init!r} {rule}")
        if config.latent_init == "xavier":
            nn.init.xavier_uniform_(self.C)
        else:
            nn.init.normal_(self.C, std=0.02)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalCrossAttention(config)
        self.mlp = _mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents that tokens can see.

        Args:
            x: tokens [B, T, C].

        Returns:
            [B, min(m, T), C].
        """
        seen = min(x.shape[1], self.C.shape[1])
        h: Tensor = self.attn(x_kv=self.ln1(x[:, :seen]), x_q=self.ln1(self.C[:, :seen]))
        return h + self.mlp(self.ln2(h))


class UpProjectBlock(nn.Module):
    """Tokens that have looked at the latents: ``h = attn(ln1(y), x)``, then ``h + mlp(ln2(h))``."""

    def __init__(self, config: PerceiverConfig) -> None:
        """Build attention and network."""
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalCrossAttention(config)
        self.mlp = _mlp(config)
        self.normalize_query, self.residual = config.normalize_query, config.residual

    def forward(self, y: Tensor, x_input: Tensor) -> Tensor:
        """Return the tokens' next representation.

        Args:
            y: latents [B, m, C], or as many as there are tokens.
            x_input: tokens [B, T, C], what the down block was given.

        Returns:
            [B, T, C].
        """
        query = self.ln1(x_input) if self.normalize_query else x_input
        h: Tensor = self.attn(x_kv=self.ln1(y), x_q=query)
        if self.residual:
            h = x_input + h
        return h + self.mlp(self.ln2(h))
