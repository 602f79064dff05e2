"""A layer of GPT: attention over the positions so far, then a two-layer network at each position.

Both add to what they are given, and read a layer-normalised copy of it (pre-norm).

Shapes: B batch, T sequence length, C channels (n_embd), N tokens of a packed batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from nlpfast.models.gpt_config import GPTConfig
from nlpfast.nn import CausalSelfAttention
from nlpfast.nn.key_value_cache import KeyValueCache
from nlpfast.nn.network import Network
from nlpfast.nn.packing import Packing
from nlpfast.nn.residual import Stream, add_norm

__all__ = ["Block"]


class Block(nn.Module):
    """One layer: ``x = x + attn(ln1(x))``, then ``x = x + mlp(ln2(x))``."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the attention and the two-layer network, 4 C wide in the middle."""
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = Network(config.n_embd, config.resid_pdrop)

    def forward(
        self,
        x: Tensor | Stream,
        layer_past: KeyValueCache | None = None,
        *,
        prefix_lengths: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor | Stream:
        """Return the next layer's input; [B, T, C] -> [B, T, C], or [N, C] -> [N, C] with `packing`.

        The options are those of `CausalSelfAttention`. The layers of a model leave their last sum to the next
        norm: given a `Stream`, it returns one.
        """
        reads, total = (x if isinstance(x, Stream) else Stream(x)).normed(self.ln1)
        options = {"prefix_lengths": prefix_lengths, "packing": packing, "drop_output": False}
        part = self.attn(reads, layer_past, **options)
        reads, total = add_norm(part, total, self.ln2, self.attn.resid_drop, for_linear=True)
        out = Stream(total, self.mlp(reads, drop_output=False), self.mlp.dropout)
        return out if isinstance(x, Stream) else out.total()
