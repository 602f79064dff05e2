"""The parameters of a recurrent translation model: names, initial values, files.

Shapes: e embed_size, h hidden_size, V target_vocab.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nlpfast.models.pretrained import SavedModel
from nlpfast.models.seq2seq_config import Seq2SeqConfig
from nlpfast.nn.dropout import Dropout

__all__ = ["Seq2SeqParameters"]

# weights are drawn from -INITIAL..INITIAL
INITIAL = 0.1


class Seq2SeqParameters(SavedModel):
    """What a `Seq2Seq` learns, by the names of the assignment.

    Attributes:
        config: the configuration it was built from.
    """

    config_class = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        """Build the model; all weights come from U(-0.1, 0.1), the embeddings of padding are 0.

        Args:
            config: the sizes.
        """
        super().__init__(config)
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
        self.dropout = Dropout(config.dropout)
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
