"""A Transformer in a folder: config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from nlpfast.models import pretrained
from nlpfast.models.transformer_config import MODEL_TYPE, TransformerConfig

__all__ = ["TransformerPretrained"]

# the embeddings of both sides; where they are one, the state dict has it once
FIRST, SECOND = "source.tokens.weight", "target.tokens.weight"

Model = TypeVar("Model", bound="TransformerPretrained")


class TransformerPretrained(nn.Module):
    """What can be saved and read.

    Attributes:
        config: the configuration the model was built from.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """Keep the configuration.

        Args:
            config: the sizes.
        """
        super().__init__()
        self.config = config
        self.register_state_dict_post_hook(_name_once)
        self.register_load_state_dict_pre_hook(_name_twice)

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
                names the file.
        """
        return pretrained.read_model(
            folder, MODEL_TYPE, lambda fields: cls(TransformerConfig.from_dict(fields))
        )


def _name_once(model: TransformerPretrained, state: dict[str, Any], prefix: str, _: Any) -> None:
    if model.config.tied == "all":
        state.pop(prefix + SECOND)


def _name_twice(model: TransformerPretrained, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if model.config.tied == "all" and prefix + FIRST in state:
        state.setdefault(prefix + SECOND, state[prefix + FIRST])
