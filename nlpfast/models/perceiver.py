"""The Perceiver bottleneck of CS224N's assignment 5: down to a few latents, and up again to the tokens.

    tokens [B, T, C] -> DownProjectBlock -> latents [B, m, C] -> Blocks -> UpProjectBlock -> [B, T, C]

Latent i sees the tokens 0..i, and token t the latents 0..t, so that nothing looks ahead. Two things follow
from such a mask, aligned at the top left. The tokens from m on are seen by no latent: the bottleneck carries
nothing of them, they are neither normalised nor projected there, and their gradient through it is exactly 0.
And with fewer than m tokens the latents from T on are seen by no token, so that they are not computed.

Two things more follow for writing text. A latent does not change once its tokens are there, so with m of them
a further token costs one query over m keys. And such a model cannot remember in its latents what came later:
token t >= m is predicted from the first m tokens and from token t itself.

`RecentTokensBlock` is the other bottleneck, of Perceiver AR: the last m tokens look at all before them, the
mask is aligned at the bottom right, and only they are predicted from.

Shapes: B batch, T tokens, C channels (n_embd), m latents (bottleneck_dim), N rows of a packed batch. Sources:
Jaegle et al. 2021, "Perceiver: General Perception with Iterative Attention"; Hawthorne et al. 2022,
"General-purpose, long-context autoregressive modeling with Perceiver AR".
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.nn import CausalCrossAttention
from nlpfast.nn.key_value_cache import KeyValueCache
from nlpfast.nn.network import Network
from nlpfast.nn.packing import Packing
from nlpfast.nn.residual import add_norm

__all__ = ["DownProjectBlock", "PerceiverConfig", "RecentTokensBlock", "UpProjectBlock"]

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
        self.mlp = Network(config.n_embd, config.resid_pdrop)

    def forward(self, x: Tensor, layer_past: KeyValueCache | None = None) -> Tensor:
        """Return the latents that tokens can see.

        Args:
            x: tokens [B, T, C].
            layer_past: keys of the tokens before, with T = 1; an empty one is filled with those of `x`.

        Returns:
            [B, min(m, T), C]; with keys in `layer_past` the one latent that the new token brings, [B, 1, C],
            which is of no use where a sequence has all of its latents.
        """
        m = self.C.shape[1]
        if layer_past is not None and layer_past.longest:
            latents = self.C[0, layer_past.lengths.clamp(max=m - 1)][:, None]
        else:
            latents = self.C[:, : min(x.shape[1], m)]
            x = x[:, :m]
        h: Tensor = self.attn(x_kv=self.ln1(x), x_q=self.ln1(latents), layer_past=layer_past)
        return h + self.mlp(self.ln2(h))

    def packed(self, x: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """Return the latents that tokens can see, of packed sequences.

        Args:
            x: tokens [N, C].
            packing: of `x`.

        Returns:
            Latents of all sequences, at most m and at most as many as it has tokens of each, and their
            packing.
        """
        m = self.C.shape[1]
        positions = packing.positions(len(x))
        of_latents = packing.cut(m)
        seen = positions < m
        latents = F.embedding(positions[seen], self.ln1(self.C[0]))
        h: Tensor = self.attn(self.ln1(x[seen]), latents, packing=of_latents, kv_packing=of_latents)
        return h + self.mlp(self.ln2(h)), of_latents


class RecentTokensBlock(nn.Module):
    """The last m tokens, which look at all: ``h = x + attn(ln1(all), ln1(x))``, then ``h + mlp(ln2(h))``."""

    def __init__(self, config: PerceiverConfig) -> None:
        """Build attention and network."""
        super().__init__()
        self.m = config.bottleneck_dim
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalCrossAttention(config, "bottom_right")
        self.mlp = Network(config.n_embd, config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation of the last tokens.

        Args:
            x: tokens [B, T, C].

        Returns:
            [B, min(m, T), C].
        """
        normal = self.ln1(x)
        part = self.attn(x_kv=normal, x_q=normal[:, -self.m :], drop_output=False)
        reads, h = add_norm(part, x[:, -self.m :], self.ln2, self.attn.resid_drop, for_linear=True)
        out: Tensor = h + self.mlp(reads)
        return out


class UpProjectBlock(nn.Module):
    """Tokens that have looked at the latents: ``h = attn(ln1(y), x)``, then ``h + mlp(ln2(h))``."""

    def __init__(self, config: PerceiverConfig) -> None:
        """Build attention and network."""
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalCrossAttention(config)
        self.mlp = Network(config.n_embd, config.resid_pdrop)
        self.normalize_query, self.residual = config.normalize_query, config.residual

    def forward(
        self,
        y: Tensor | None,
        x_input: Tensor,
        *,
        layer_past: KeyValueCache | None = None,
        packing: Packing | None = None,
        kv_packing: Packing | None = None,
    ) -> Tensor:
        """Return the tokens' next representation.

        Args:
            y: latents [B, m, C], or as many as there are tokens; [Ny, C] with `packing`. Where `layer_past`
                has keys one latent more, or None.
            x_input: tokens [B, T, C], what the down block was given; [N, C] with `packing`.
            layer_past: keys of the latents so far; T is 1 then. An empty one is filled with those of `y`.
            packing: of `x_input`.
            kv_packing: of `y`.

        Returns:
            [B, T, C], or [N, C].
        """
        query = self.ln1(x_input) if self.normalize_query else x_input
        part = self.attn(
            x_kv=None if y is None else self.ln1(y),
            x_q=query,
            layer_past=layer_past,
            packing=packing,
            kv_packing=kv_packing,
            drop_output=not self.residual,
        )
        if not self.residual:
            return part + self.mlp(self.ln2(part))
        reads, h = add_norm(part, x_input, self.ln2, self.attn.resid_drop, for_linear=True)
        out: Tensor = h + self.mlp(reads)
        return out
