"""The sizes and options of a recurrent language model, and how it can be called."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from nlpfast.models.pretrained import SavedConfig
from nlpfast.nn.packing import Packing

__all__ = ["RNNLMConfig", "check_call"]

SPECIAL = ("pad_id", "bos_id", "eos_id")


@dataclasses.dataclass(kw_only=True)
class RNNLMConfig(SavedConfig):
    """The sizes of an `RNNLM`.

    Attributes:
        vocab_size: V.
        embed_size: channels of the embeddings, e.
        hidden_size: channels of the LSTM, h.
        layers: of the LSTM.
        dropout: of embeddings, between layers, and of what the last layer gives.
        tied: embeddings and output have one matrix; needs ``embed_size == hidden_size``.
        pad_id: token that fills up, or None: the model makes no difference between tokens.
        bos_id: token before a sentence, or None.
        eos_id: token after a sentence, or None.
    """

    model_type = "rnnlm"

    vocab_size: int
    embed_size: int = 256
    hidden_size: int = 512
    layers: int = 1
    dropout: float = 0.2
    tied: bool = False
    pad_id: int | None = 0
    bos_id: int | None = 1
    eos_id: int | None = 2

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a model of these sizes."""
        for name in ("vocab_size", "embed_size", "hidden_size", "layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout={self.dropout!r} must be a probability in [0, 1]; 0 turns dropout off")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied={self.tied!r} must be True or False")
        if self.tied and self.embed_size != self.hidden_size:
            sizes = f"embed_size={self.embed_size} and hidden_size={self.hidden_size}"
            raise ValueError(f"tied=True needs one size, found {sizes}; make them equal, or tied=False")
        special = {name: getattr(self, name) for name in SPECIAL if getattr(self, name) is not None}
        for name, value in special.items():
            if not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}={value!r} must be a token, 0..{self.vocab_size - 1}, or None")
        if len(set(special.values())) < len(special):
            ids = ", ".join(f"{name}={value}" for name, value in special.items())
            raise ValueError(f"{ids} must differ; give each its own token, or None")


def check_call(idx: Tensor, targets: Tensor | None, packing: Packing | None) -> None:
    """Raise ValueError unless a model can be called like that; see `RNNLM.forward`.

    Args:
        idx: tokens.
        targets: those that follow.
        packing: of a packed batch; is looked into on the CPU alone.
    """
    dimensions = 1 if packing is not None else 2
    if idx.dim() != dimensions:
        shape = "[N] with packing" if packing is not None else "[B, T]; add the batch dimension"
        raise ValueError(f"idx has shape {list(idx.shape)}, expected {shape}")
    if not idx.numel():
        raise ValueError(f"idx has shape {list(idx.shape)}, which has no token; give at least one")
    if targets is not None and targets.shape != idx.shape:
        raise ValueError(
            f"targets has shape {list(targets.shape)}, idx {list(idx.shape)}; both must be the same"
        )
    # nobody is to wait for a GPU
    if packing is not None and packing.cu_seqlens.device.type == "cpu":
        rows, longest = int(packing.cu_seqlens[-1]), int(packing.lengths().max())
        if rows != len(idx):
            raise ValueError(f"packing has {rows} tokens, idx {len(idx)}; give the packing of this batch")
        if longest > packing.longest:
            rule = f"has a sequence of {longest} tokens; give longest={longest}"
            raise ValueError(f"packing.longest={packing.longest}, but it {rule}")
