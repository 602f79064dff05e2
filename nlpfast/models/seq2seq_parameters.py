"""The parameters of a recurrent translation model: names, initial values, files.

Shapes: e embed_size, h hidden_size, V target_vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from nlpfast.models import pretrained
from nlpfast.models.seq2seq_config import Seq2SeqConfig

__all__ = ["Seq2SeqParameters"]

Model = TypeVar("Model", bound="Seq2SeqParameters")

# weights are drawn from -INITIAL..INITIAL
INITIAL = 0.1


class Seq2SeqParameters(nn.Module):
    """What a `Seq2Seq` learns, by the names of the assignment.

    Attributes:
        config: the configuration it was built from.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        """Build the model; all weights come from U(-0.1, 0.1), the embeddings of padding are 0.

        Args:
            config: the sizes.
        """
        super().__init__()
        self.config = config
        e, h = config.embed_size, config.hidden_size
        source = nn.Embedding(config.source_vocab, e, padding_idx=config.pad_id)
        target = nn.Embedding(config.target_vocab, e, padding_idx=config.pad_id)
        self.model_embeddings = nn.ModuleDict({"source": source, "target": target})
        self.post_embed_cnn = nn.Conv1d(e, e, kernel_size=2, padding="same")
        self.encoder = nn.LSTM(e, h, bidirectional=True)
        self.decoder = nn.LSTMCell(e + h if config.input_feeding else e, h)
        self.h_projection = nn.Linear(2 * h, h, bias=False)
        self.c_projection = nn.Linear(2 * h, h, bias=False)
        if config.attention != "dot":
            self.att_projection = nn.Linear(2 * h, h, bias=False)
        if config.attention == "additive":
            self.att_query_projection = nn.Linear(h, h, bias=False)
            self.att_vector = nn.Linear(h, 1, bias=False)
        self.combined_output_projection = nn.Linear(3 * h, h, bias=False)
        if not config.tied:
            self.target_vocab_projection = nn.Linear(h, config.target_vocab, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -INITIAL, INITIAL)
            for embedding in (source, target):
                embedding.weight[config.pad_id].zero_()

    @property
    def output_weight(self) -> Tensor:
        """Return the matrix that makes logits of combined outputs, [V, h]; there is no bias."""
        layer = self.model_embeddings["target"] if self.config.tied else self.target_vocab_projection
        return cast(Tensor, layer.weight)

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; a write that fails leaves the files that were there.

        Args:
            folder: made when missing.
            state_dict: the weights to be written, where the module has only parts of them; None for its own.

        Raises:
            OSError: when the folder cannot be made or a file cannot be written; names it.
        """
        pretrained.write(folder, self.config.to_dict(), state_dict or self.state_dict())

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path) -> Model:
        """Read a model that `save_pretrained` wrote.

        It comes in evaluation mode, on the CPU, in the dtype in which it was saved. Nothing in the files is
        executed.

        Args:
            folder: holds config.json and model.safetensors.

        Raises:
            OSError: when a file is missing or unreadable; names it.
            ValueError: when a file is damaged, or its keys or shapes are not those of the configuration;
                names the file, the key and both shapes.
        """
        return pretrained.read_model(folder, "seq2seq", lambda fields: cls(Seq2SeqConfig.from_dict(fields)))
