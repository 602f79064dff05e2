"""GPT: a Transformer that predicts the next token, with the interface of minGPT (2020).

    tokens -> tok_emb + pos_emb -> drop -> Block x n_layer -> ln_f -> head -> logits

With `perceiver` the first and the last layer are those of a bottleneck (perceiver.py), and the blocks between
them work on its `bottleneck_dim` latents, m. Such a model does not see tokens >= m through the bottleneck:
each of them is seen in its own position alone.

The blocks are in gpt_block.py. Sources: Radford et al., "Improving Language
Understanding by Generative Pre-Training", 2018; "Language Models are Unsupervised Multitask Learners", 2019.

Shapes: B batch, T sequence length, C channels (n_embd), V vocabulary, N tokens of a packed batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.models import pretrained
from nlpfast.models.gpt_block import Block
from nlpfast.models.gpt_cache import GPTCache
from nlpfast.models.gpt_config import (
    GPT1Config,
    GPTConfig,
    check_call,
    check_config,
    check_prompts,
    outside_vocabulary,
)
from nlpfast.models.perceiver import DownProjectBlock, RecentTokensBlock, UpProjectBlock
from nlpfast.nn import CausalCrossAttention, CausalSelfAttention
from nlpfast.nn.dropout import Dropout
from nlpfast.nn.hooks import has_hooks
from nlpfast.nn.packing import Packing
from nlpfast.nn.residual import Stream
from nlpfast.ops.cross_entropy import cross_entropy
from nlpfast.ops.linear_cross_entropy import linear_cross_entropy
from nlpfast.optim import OptimizerOptions, build_optimizer, linear_weights_and_rest

__all__ = ["GPT", "Block", "GPT1Config", "GPTCache", "GPTConfig", "OptimizerOptions"]


class GPT(nn.Module):
    """The language model.

    Attributes:
        config: the configuration it was built from.
        block_size: longest sequence it reads.
    """

    def __init__(self, config: GPTConfig) -> None:
        """Build the model; linear and embedding weights come from N(0, 0.02), biases and positions are 0.

        Args:
            config: all of `vocab_size`, `block_size`, `n_layer`, `n_head` and `n_embd` set.

        Raises:
            ValueError: when a size is missing or below 1, `n_head` does not divide `n_embd`, a dropout
                probability is outside [0, 1], or a bottleneck is wider than a sequence or without layers.
        """
        super().__init__()
        check_config(config)
        self.config = config
        self.block_size = config.block_size
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, config.n_embd))
        self.drop = Dropout(config.embd_pdrop)
        self._recent = config.perceiver and config.causal_align == "bottom_right"
        blocks = config.n_layer
        if self._recent:
            self.recent_block = RecentTokensBlock(config)
            blocks -= 1
        elif config.perceiver:
            self.down_block, self.up_block = DownProjectBlock(config), UpProjectBlock(config)
            blocks -= 2
        self.blocks = nn.Sequential(*[Block(config) for _ in range(blocks)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_init_weights)

    def get_block_size(self) -> int:
        """Return the longest sequence that the model reads, `block_size`."""
        return self.block_size

    @property
    def can_cache(self) -> bool:
        """Return whether there are `prefill` and `decode`: in Perceiver AR every token moves all latents."""
        return not self._recent

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        return_logits: bool = True,
        prefix_lengths: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the logits of the token after each position, and the loss if targets are given.

        The loss is ``F.cross_entropy(logits.view(-1, V), targets.view(-1),
        ignore_index=config.ignore_index)``, in float32. A packed batch gives the loss and the gradients of
        the padded one whose further targets do not count, without computing them.

        Args:
            idx: tokens [B, T], int64 or int32, 0 <= idx < V, T <= block_size; [N] with `packing`.
            targets: the tokens that follow, int64, of the shape of `idx`; `config.ignore_index` where none
                counts.
            return_logits: without, and with targets, the loss alone is computed, by ``linear_cross_entropy``,
                and there are never all logits at once; hooks of `head` are not called.
            prefix_lengths: int64 [B]; tokens before are seen from everywhere (UniLM, Dong et al. 2019), so
                that their targets should not count. Without a bottleneck.
            packing: `idx` has several sequences, one after the other.

        Returns:
            logits [B, T, V], or [N, V], and a scalar loss, or None in the place of each that was not asked
            for. With ``causal_align="bottom_right"`` they are of the last min(T, m) positions.

        Raises:
            ValueError: when the shapes do not fit, T > block_size, an option is not served by the model, or
                (on the CPU) a token is outside the vocabulary; a GPU stops with its own assertion in that
                case.
        """
        check_call(self.config, idx, targets, prefix_lengths, packing)
        x, _ = self._last_layer(idx, prefix_lengths, packing).normed(self.ln_f)
        if targets is not None and self._recent:
            targets = targets[:, -x.shape[1] :]
        ignored = self.config.ignore_index
        if targets is not None and not return_logits:
            return None, linear_cross_entropy(x, self.head.weight, targets, ignore_index=ignored)
        logits = self.head(x)
        return logits, None if targets is None else cross_entropy(logits, targets, ignore_index=ignored)

    def features(self, idx: Tensor, packing: Packing) -> Tensor:
        """Return what `head` makes logits of; [N] -> [N, C].

        Args:
            idx: tokens of a packed batch.
            packing: where its sequences begin and end.

        Raises:
            ValueError: as `forward`.
        """
        check_call(self.config, idx, None, None, packing)
        return self._last_layer(idx, packing=packing).normed(self.ln_f)[0]

    def _last_layer(
        self,
        idx: Tensor,
        prefix_lengths: Tensor | None = None,
        packing: Packing | None = None,
        cache: GPTCache | None = None,
    ) -> Stream:
        """Return what the last layer gives, [B, T, C] or [N, C]."""
        x = self._embedded(idx, packing)
        if not self.config.perceiver:
            return self._through_blocks(x, cache, prefix_lengths=prefix_lengths, packing=packing)
        if self._recent:
            return self._through_blocks(self.recent_block(x))
        if packing is not None:
            latents, of_latents = self.down_block.packed(x, packing)
            y = self._through_blocks(latents, packing=of_latents).total()
            return Stream(self.up_block(y, x, packing=packing, kv_packing=of_latents))
        y = self._through_blocks(self.down_block(x, cache and cache.down), cache).total()
        return Stream(self.up_block(y, x, layer_past=cache and cache.up))

    def _words(self, idx: Tensor) -> Tensor:
        try:
            words: Tensor = self.tok_emb(idx)
        except IndexError:
            raise outside_vocabulary(idx, self.config.vocab_size) from None
        return words

    def _embedded(self, idx: Tensor, packing: Packing | None) -> Tensor:
        places = self.pos_emb[:, : idx.shape[-1]]
        if packing is not None:
            places = F.embedding(packing.positions(len(idx)), self.pos_emb[0])
        out: Tensor = self.drop(self._words(idx) + places)
        return out

    def _through_blocks(self, x: Tensor, cache: GPTCache | None = None, **options: Any) -> Stream:
        stream = Stream(x)
        for number, block in enumerate(self.blocks):
            past = cache and cache.layers[number]
            # hooks are for tensors
            hooked = has_hooks(block)
            out = block(stream.total() if hooked else stream, past, **options)
            stream = Stream(out) if hooked else out
        return stream

    @torch.no_grad()
    def prefill(
        self, idx: Tensor, lengths: Tensor, *, prefix_lengths: Tensor | None = None
    ) -> tuple[Tensor, GPTCache]:
        """Read prompts, and return the logits of the token after each, and what `decode` goes on from.

        Args:
            idx: prompts [B, T], the shorter ones filled up at their ends.
            lengths: tokens of each prompt, int64 [B], 1..T.
            prefix_lengths: see `forward`; within the prompts.

        Returns:
            logits [B, V], and the keys and values of all layers.

        Raises:
            ValueError: as `forward`, the lengths do not fit, or the model has no cache.
        """
        check_call(self.config, idx, None, prefix_lengths, None)
        if self._recent:
            rule = "every token moves all of its latents; read the last block_size tokens again"
            raise ValueError(f"config.causal_align='bottom_right' has no cache: {rule}")
        check_prompts(idx, lengths, prefix_lengths)
        cache = GPTCache(self.config, lengths)
        x = self._last_layer(idx, prefix_lengths, cache=cache).total()
        rows = torch.arange(len(idx), device=idx.device)
        return self.head(self.ln_f(x[rows, lengths - 1])), cache

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: GPTCache) -> Tensor:
        """Read one token more of each sequence, and return the logits of the next.

        Args:
            tokens: int64 or int32 [B].
            cache: of `prefill`; gets the token's keys and values. With a bottleneck all of whose latents are
                there, a step computes one layer, over m keys.

        Returns:
            logits [B, V].

        Raises:
            ValueError: when a sequence has `block_size` tokens already, or there is not a token for each.
        """
        if tokens.shape != cache.lengths.shape:
            rule = f"the cache has {len(cache.lengths)} sequences; give [B]"
            raise ValueError(f"tokens has shape {list(tokens.shape)}, {rule}")
        if cache.longest >= self.block_size:
            fix = "read the last of them again, by prefill"
            raise ValueError(f"cache has {cache.longest} tokens, block_size={self.block_size}: {fix}")
        x = self._words(tokens) + self.pos_emb[0, cache.lengths]
        x = self.drop(x)[:, None]
        if not self.config.perceiver:
            x = self._through_blocks(x, cache).total()
        else:
            y = None
            if cache.shortest < self.config.bottleneck_dim:
                y = self._through_blocks(self.down_block(x, cache.down), cache).total()
            x = self.up_block(y, x, layer_past=cache.up)
        cache.advance()
        return self.head(self.ln_f(x[:, 0]))

    def configure_optimizers(self, train_config: OptimizerOptions) -> torch.optim.Optimizer:
        """Return an optimizer, AdamW unless told otherwise, that decays the weights of linear layers alone.

        Biases, layer norms, embeddings and positions are not decayed (the first group decays, the second does
        not).

        Args:
            train_config: object with `learning_rate`, `betas`, `weight_decay`, and perhaps `optimizer`: see
                `nlpfast.optim.build_optimizer`.
        """
        return build_optimizer(*linear_weights_and_rest(self), train_config)

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; a write that fails leaves the files that were there.

        Args:
            folder: made when missing.
            state_dict: the weights to be written, where the module has only parts of them; None for its own.

        Raises:
            ValueError: when the configuration holds something other than plain values.
            OSError: when the folder cannot be made or a file cannot be written; names it.
        """
        pretrained.write(
            folder, {"model_type": "gpt", **self.config.to_dict()}, state_dict or self.state_dict()
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GPT:
        """Read a model that `save_pretrained` wrote.

        It comes in evaluation mode, on the CPU, in the dtype in which it was saved. `mask` buffers of minGPT
        among the weights are left out. Nothing in the files is executed.

        Args:
            folder: holds config.json and model.safetensors.

        Raises:
            OSError: when a file is missing or unreadable; names it.
            ValueError: when a file is damaged, or its keys or shapes are not those of the configuration;
                names the file, the key and both shapes.
        """
        fields = pretrained.read_config(folder, "gpt")
        try:
            # no memory and no random numbers for weights that the file replaces
            with torch.device("meta"):
                model = cls(GPTConfig(**{"vocab_size": None, "block_size": None, **fields}))
        except ValueError as error:
            raise ValueError(f"{Path(folder) / pretrained.CONFIG_FILE}: {error}") from error
        masks = {
            f"{name}.mask"
            for name, module in model.named_modules()
            if isinstance(module, (CausalSelfAttention, CausalCrossAttention))
        }
        state = {name: w for name, w in pretrained.read_weights(folder).items() if name not in masks}
        pretrained.check_weights(folder, model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        return model.eval()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
