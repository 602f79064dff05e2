"""The sizes and options of a BERT, by the names of Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nlpfast.nn.packing import Packing

__all__ = ["ACTIVATIONS", "BertConfig", "check_call"]

# hidden_act, and what torch's gelu calls it; None is relu
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "relu": None}


@dataclasses.dataclass(kw_only=True)
class BertConfig:
    """The sizes of a BERT; the defaults are those of bert-base-uncased.

    Attributes:
        vocab_size: V.
        hidden_size: channels, C.
        num_hidden_layers: layers.
        num_attention_heads: H, a divisor of `hidden_size`.
        intermediate_size: channels in the middle of a layer.
        hidden_act: "gelu" (with erf), "gelu_new" or "gelu_pytorch_tanh" (with tanh), or "relu".
        hidden_dropout_prob: dropout of the embeddings and of what a layer adds.
        attention_probs_dropout_prob: dropout of the attention probabilities.
        max_position_embeddings: longest sequence.
        type_vocab_size: segments.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: added to variances.
        pad_token_id: token whose embedding is 0 at first, and gets no gradient.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a model of these sizes."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        if self.hidden_size % self.num_attention_heads:
            rule = f"must divide hidden_size={self.hidden_size}; change one of the two"
            raise ValueError(f"num_attention_heads={self.num_attention_heads} {rule}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r} must be a probability in [0, 1]; 0 turns dropout off")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} must be one of {', '.join(ACTIVATIONS)}")
        if not isinstance(self.pad_token_id, int) or not 0 <= self.pad_token_id < self.vocab_size:
            rule = f"must be a token, 0..{self.vocab_size - 1}"
            raise ValueError(f"pad_token_id={self.pad_token_id!r} {rule}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BertConfig:
        """Return the configuration of a config.json.

        Args:
            fields: by the names of Hugging Face, of which those that are no attribute are left out, such as
                of its decoding.

        Raises:
            ValueError: a value that there is no model for; of a decoder, or with relative positions.
        """
        served = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
        for name, value in served.items():
            if fields.get(name, value) not in (value, None):
                rule = f"is not served, only {value!r} is; load the model with transformers"
                raise ValueError(f"{name}={fields[name]!r} {rule}")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known and value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds, for transformers too."""
        return {"model_type": "bert", **dataclasses.asdict(self)}


def check_call(
    config: BertConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    packing: Packing | None,
) -> None:
    """Raise ValueError unless a model of these sizes can be called like that; see `BertModel.forward`.

    Args:
        config: of the model.
        input_ids: tokens.
        attention_mask: which of them are seen.
        token_type_ids: segments.
        packing: of a packed batch.
    """
    if input_ids.dim() != (2 if packing is None else 1):
        shape = "[N] with packing" if packing is not None else "[B, T]; add the batch dimension"
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}, expected {shape}")
    if packing is not None and attention_mask is not None:
        raise ValueError("attention_mask is given with packing, which has no padding: leave it out")
    for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if given is not None and given.shape != input_ids.shape:
            shapes = f"has shape {list(given.shape)}, input_ids {list(input_ids.shape)}"
            raise ValueError(f"{name} {shapes}; both must be the same")
    T = input_ids.shape[1] if packing is None else packing.longest
    if config.max_position_embeddings < T:
        most = f"max_position_embeddings={config.max_position_embeddings} is the most this model reads"
        raise ValueError(f"input_ids has T={T} tokens a row, {most}; truncate the sentences")
