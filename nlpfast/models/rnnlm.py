"""A recurrent language model: an LSTM predicts the next token, of sentences or of a text.

    tokens -> tok_emb -> drop -> lstm -> drop -> head -> logits

It is called as `nlpfast.models.gpt.GPT` is, so that what trains one or computes probabilities with it does so
with both. Sources: Mikolov et al. 2010, "Recurrent neural network based language model"; Zaremba et al. 2014,
"Recurrent Neural Network Regularization" (dropout before, between and after the layers, not between steps);
Press and Wolf 2017, "Using the Output Embedding to Improve Language Models" (one matrix for both).

Shapes: B sequences, T tokens of each, or of the longest; N tokens of a packed batch; e embed_size,
h hidden_size, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from nlpfast.models.gpt_config import outside_vocabulary
from nlpfast.models.pretrained import SavedModel, saved_once
from nlpfast.models.rnnlm_config import RNNLMConfig, check_call
from nlpfast.nn.dropout import Dropout
from nlpfast.nn.packing import Packing
from nlpfast.ops.cross_entropy import cross_entropy
from nlpfast.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["RNNLM", "RNNLMConfig", "RNNLMState"]

# embeddings and output are drawn from -INITIAL..INITIAL
INITIAL = 0.1


@dataclasses.dataclass
class RNNLMState:
    """What the LSTM has read, all [layers, B, h].

    Attributes:
        hidden: its outputs after the last token of each sequence.
        cell: its cells.
    """

    hidden: Tensor
    cell: Tensor


class RNNLM(SavedModel):
    """The language model.

    Attributes:
        config: the configuration it was built from.
        block_size: longest sequence it reads; there is none.
        can_cache: there are `prefill` and `decode`.
    """

    config_class = RNNLMConfig
    block_size = sys.maxsize
    can_cache = True

    def __init__(self, config: RNNLMConfig) -> None:
        """Build the model; embeddings and output come from U(-0.1, 0.1), its bias is 0, the LSTM is torch's.

        Args:
            config: the sizes.
        """
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.embed_size)
        self.drop = Dropout(config.dropout)
        # of a single layer torch would say that there is nothing between layers
        between = config.dropout if config.layers > 1 else 0.0
        self.lstm = nn.LSTM(
            config.embed_size, config.hidden_size, config.layers, batch_first=True, dropout=between
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        for weight in (self.tok_emb.weight, self.head.weight):
            nn.init.uniform_(weight, -INITIAL, INITIAL)
        nn.init.zeros_(self.head.bias)
        if config.tied:
            _tie(self)
            saved_once(self, "tok_emb.weight", "head.weight")
            self.register_load_state_dict_post_hook(_tie)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        return_logits: bool = True,
        packing: Packing | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the logits of the token after each position, and the loss if targets are given.

        The loss is ``F.cross_entropy(logits.view(-1, V), targets.view(-1))``, in float32. A packed batch
        gives the loss and the gradients of the padded one whose further targets do not count.

        Args:
            idx: tokens [B, T], int64 or int32, 0 <= idx < V; [N] with `packing`.
            targets: the tokens that follow, int64, of the shape of `idx`; -100 where none counts.
            return_logits: without, and with targets, the loss alone is computed, by ``linear_cross_entropy``,
                and there are never all logits at once; hooks of `head` are not called.
            packing: `idx` has several sequences, one after the other; each begins with a state of 0. They may
                be empty.

        Returns:
            logits [B, T, V], or [N, V], and a scalar loss, or None in the place of each that was not asked
            for.

        Raises:
            ValueError: when the shapes do not fit, or (on the CPU) the packing is of another batch, or a
                token is outside the vocabulary; a GPU stops with its own assertion in that case.
        """
        check_call(idx, targets, packing)
        x = self._outputs(idx, packing)
        if targets is not None and not return_logits:
            return None, linear_cross_entropy(x, self.head.weight, targets, linear_bias=self.head.bias)
        logits = self.head(x)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def features(self, idx: Tensor, packing: Packing) -> Tensor:
        """Return what `head` makes logits of; [N] -> [N, h].

        Args:
            idx: tokens of a packed batch.
            packing: where its sequences begin and end.

        Raises:
            ValueError: as `forward`.
        """
        check_call(idx, None, packing)
        return self._outputs(idx, packing)

    def _outputs(self, idx: Tensor, packing: Packing | None) -> Tensor:
        """Return what the last layer gives, [B, T, h] or [N, h]."""
        # No token sees what is after it: padding at the ends changes nothing. Of the sentences of a batch,
        # padded to more than twice their tokens, it takes less time than PyTorch's packed sequences.
        words = self._words(idx, packing)
        # a state adds up over a sentence: it is float32 under autocast too
        with torch.autocast(idx.device.type, enabled=False):
            outputs, _ = self.lstm(self.drop(words))
        out: Tensor = self.drop(outputs if packing is None else outputs[packing.within()])
        return out

    def _words(self, idx: Tensor, packing: Packing | None = None) -> Tensor:
        try:
            words: Tensor = self.tok_emb(idx if packing is None else packing.padded(idx))
        except IndexError:
            raise outside_vocabulary(idx, self.config.vocab_size) from None
        return words

    @torch.no_grad()
    def prefill(self, idx: Tensor, lengths: Tensor) -> tuple[Tensor, RNNLMState]:
        """Read prompts, and return the logits of the token after each, and what `decode` goes on from.

        Args:
            idx: prompts [B, T], the shorter ones filled up at their ends.
            lengths: tokens of each prompt, int64 [B], 1..T.

        Returns:
            logits [B, V], and the state after each prompt.

        Raises:
            ValueError: as `forward`.
        """
        check_call(idx, None, None)
        with torch.autocast(idx.device.type, enabled=False):
            words = self.drop(self._words(idx))
            read = pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)
            _, state = self.lstm(read)
        return self.head(self.drop(state[0][-1])), RNNLMState(*state)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: RNNLMState) -> Tensor:
        """Read one token more of each sequence, and return the logits of the next.

        Args:
            tokens: int64 or int32 [B].
            cache: of `prefill`; becomes the state after the tokens.

        Returns:
            logits [B, V].

        Raises:
            ValueError: when there is not a token for each sequence.
        """
        if tokens.shape != cache.hidden.shape[1:2]:
            rule = f"the state has {cache.hidden.shape[1]} sequences; give [B]"
            raise ValueError(f"tokens has shape {list(tokens.shape)}, {rule}")
        with torch.autocast(tokens.device.type, enabled=False):
            words = self.drop(self._words(tokens[:, None]))
            outputs, (cache.hidden, cache.cell) = self.lstm(words, (cache.hidden, cache.cell))
        logits: Tensor = self.head(self.drop(outputs[:, 0]))
        return logits


def _tie(model: RNNLM, *_: Any) -> None:
    """Have one matrix for both; tensors that are loaded may have come in the place of each."""
    model.head.weight = model.tok_emb.weight
