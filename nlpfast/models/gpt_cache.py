"""What a GPT keeps of the tokens that it has read, so that one more costs one position's work."""

from __future__ import annotations

from torch import Tensor

from nlpfast.models.gpt_config import GPTConfig
from nlpfast.nn.key_value_cache import KeyValueCache

__all__ = ["GPTCache"]


class GPTCache:
    """Keys and values of every layer, and how far each sequence has come.

    Attributes:
        lengths: tokens of each sequence, int64 [B].
        shortest: those of the shortest one.
        longest: those of the longest one.
        layers: of the blocks; of their latents, where there is a bottleneck.
        down: of the tokens, in the bottleneck.
        up: of the latents, in the bottleneck.
    """

    down: KeyValueCache | None = None
    up: KeyValueCache | None = None

    def __init__(self, config: GPTConfig, lengths: Tensor) -> None:
        """Keep nothing yet.

        Args:
            config: of the model.
            lengths: tokens of each prompt, int64 [B].
        """
        self.lengths = lengths
        self.shortest, self.longest = int(lengths.min()), int(lengths.max())
        capacity = config.bottleneck_dim if config.perceiver else config.block_size
        blocks = config.n_layer - 2 if config.perceiver else config.n_layer
        self.layers = [KeyValueCache(capacity, lengths) for _ in range(blocks)]
        if config.perceiver:
            self.down, self.up = KeyValueCache(capacity, lengths), KeyValueCache(capacity, lengths)

    def advance(self) -> None:
        """Count one token more of every sequence."""
        self.lengths = self.lengths + 1
        self.shortest, self.longest = self.shortest + 1, self.longest + 1
