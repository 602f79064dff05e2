"""What all BERT models share: folders as Hugging Face writes them, and state dicts of minBERT.

Reading executes nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nlpfast.data.lines import DataError
from nlpfast.models import pretrained
from nlpfast.models.bert_config import BertConfig
from nlpfast.models.parameter_file import read_parameters
from nlpfast.optim import OptimizerOptions, build_optimizer

__all__ = ["BertPretrained", "load", "local_folder", "read"]

Model = TypeVar("Model", bound="BertPretrained")

WEIGHTS = (pretrained.WEIGHTS_FILE, "pytorch_model.bin")

# names of minBERT (CS224N's default project), and of Hugging Face
MINBERT = {
    "word_embedding": "embeddings.word_embeddings",
    "pos_embedding": "embeddings.position_embeddings",
    "tk_type_embedding": "embeddings.token_type_embeddings",
    "embed_layer_norm": "embeddings.LayerNorm",
    "pooler_dense": "pooler.dense",
    "self_attention": "attention.self",
    "attention_dense": "attention.output.dense",
    "attention_layer_norm": "attention.output.LayerNorm",
    "interm_dense": "intermediate.dense",
    "out_dense": "output.dense",
    "out_layer_norm": "output.LayerNorm",
}
_MINBERT_LAYER = re.compile(r"bert_layers\.(\d+)\.(\w+)\.(.+)")
# what the encoder can do without: a new one takes its place
_OPTIONAL = "pooler.dense."


class BertPretrained(nn.Module):
    """What all BERT models share: initial weights, and folders of Hugging Face's form.

    Attributes:
        config: the configuration the model was built from.
    """

    config: BertConfig
    # how keys of the encoder begin
    base_prefix = "bert."

    def _init_weights(self) -> None:
        """Draw weights from N(0, initializer_range); biases, and the embedding of padding, are 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()

    def configure_optimizers(self, train_config: OptimizerOptions) -> torch.optim.Optimizer:
        """Return an optimizer, AdamW unless told otherwise, that decays as BERT's authors do.

        All weights decay but biases and those of layer norms. Parameters that need no gradient are left out.

        Args:
            train_config: object with `learning_rate`, `betas`, `weight_decay`, and perhaps `optimizer`: see
                `nlpfast.optim.build_optimizer`.
        """
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        kept = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
        decayed = [p for name, p in named if not (name.endswith("bias") or "LayerNorm" in name)]
        return build_optimizer(decayed, kept, train_config)

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors, which transformers reads too.

        Args:
            folder: made when missing; a write that fails leaves the files that were there.
            state_dict: the weights to be written, where the module has only parts of them; None for its own.

        Raises:
            OSError: when the folder cannot be made or a file cannot be written; names it.
        """
        more = {"architectures": [type(self).__name__], **self.more_fields()}
        pretrained.write(folder, {**self.config.to_dict(), **more}, state_dict or self.state_dict())

    def more_fields(self) -> dict[str, Any]:
        """Return what config.json holds of the model beside its configuration; plain values."""
        return {}

    @classmethod
    def keywords(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor's keywords that config.json has, as `more_fields` put them there.

        Args:
            fields: all of config.json.

        Raises:
            ValueError: they are damaged.
        """
        return {}

    @classmethod
    def from_pretrained(cls: type[Model], source: str | Path, **options: Any) -> Model:
        """Read a BERT of Hugging Face's form, or one that `save_pretrained` wrote, or a minBERT state dict.

        It comes in evaluation mode, on the CPU, in float32. Weights that the files lack, such as those of a
        head, are new; `missing_keys` of the model names them. Weights without a place are left out. Nothing
        in the files is executed.

        Args:
            source: a folder with config.json and model.safetensors or pytorch_model.bin, or the name of a
                model on the Hugging Face hub, which is downloaded unless it is in the cache.
            **options: attributes of the configuration that are to be others, such as dropout; and keywords
                of the class.

        Raises:
            OSError: when a file is missing or unreadable; names it.
            ValueError: when a file is damaged, the encoder's weights are not all there, or of other shapes.
        """
        fields, state = read(source)
        own = {field.name for field in dataclasses.fields(BertConfig)}
        try:
            config = BertConfig.from_dict({**fields, **{k: v for k, v in options.items() if k in own}})
            rest = cls.keywords(fields) | {k: v for k, v in options.items() if k not in own}
        except ValueError as error:
            raise ValueError(f"{source}: {pretrained.CONFIG_FILE}: {error}") from error
        model = cls(config, **rest)
        model.missing_keys = load(model, state, cls.base_prefix, str(source))
        return model.eval()

    missing_keys: list[str]


def read(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of config.json, and the weights of a model.

    Args:
        source: a folder, or the name of a model on the hub.

    Raises:
        OSError: when a file is missing or unreadable; names it.
        ValueError: when a file is damaged; names it.
    """
    folder = local_folder(source, (pretrained.CONFIG_FILE, WEIGHTS))
    fields = pretrained.read_config(folder, "bert")
    if (folder / WEIGHTS[0]).exists() or not (folder / WEIGHTS[1]).exists():
        return fields, pretrained.read_weights(folder)
    try:
        return fields, read_parameters(folder / WEIGHTS[1])[0]
    except DataError as error:
        raise ValueError(str(error)) from error


def local_folder(source: str | Path, files: tuple[str | tuple[str, ...], ...]) -> Path:
    """Return a folder that has the files of a model; those of the hub are downloaded or in its cache.

    Args:
        source: a folder, or the name of a model on the Hugging Face hub, such as ``bert-base-uncased``.
        files: names; of several in a tuple the first that there is.

    Raises:
        OSError: there is no such folder or model, or it cannot be had.
    """
    folder = Path(source)
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        return folder
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError
    except ImportError:
        fix = "and huggingface_hub, for models of the hub, is not installed: pip install 'nlpfast[bert]'"
        raise OSError(f"{source}: is no folder, {fix}") from None
    found = folder
    for names in files:
        for name in (names,) if isinstance(names, str) else names:
            try:
                found = Path(hf_hub_download(str(source), name)).parent
                break
            except EntryNotFoundError:
                continue
            except (OSError, ValueError, HFValidationError) as error:
                reason = str(error).partition("\n")[0]
                raise OSError(f"{source}: is no folder, and the hub does not give it ({reason})") from error
    return found


def load(model: nn.Module, state: Mapping[str, Tensor], base_prefix: str, source: str) -> list[str]:
    """Put weights into a model, and return the names of those that are not among them and stay new.

    Keys may have ``bert.`` before them or not, be those of old files (`gamma`, `beta`) or of minBERT.

    Args:
        model: gets the weights.
        state: weights by name.
        base_prefix: how the model's keys of the encoder begin.
        source: what messages call the weights.

    Raises:
        ValueError: a weight of the encoder is missing, or one has another shape; names it.
    """
    found = {_canonical(name): tensor for name, tensor in state.items()}
    # an output layer of its own is the word embeddings once more, and its bias is this
    if "cls.predictions.decoder.bias" in found:
        found.setdefault("cls.predictions.bias", found["cls.predictions.decoder.bias"])
    missing = []
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            plain = name.removeprefix(base_prefix)
            tensor = found.get(plain)
            encoder = base_prefix == "" or name.startswith(base_prefix)
            if tensor is None and encoder and not plain.startswith(_OPTIONAL):
                raise ValueError(f"{source}: {plain} is missing; give the weights of a BERT")
            if tensor is None:
                missing.append(name)
            elif tensor.shape != parameter.shape:
                shapes = f"{list(tensor.shape)}, the configuration says {list(parameter.shape)}"
                raise ValueError(
                    f"{source}: {plain} has shape {shapes}; use the config.json of these weights"
                )
            else:
                parameter.copy_(tensor)
    return missing


def _canonical(name: str) -> str:
    """Return Hugging Face's name of a weight, without ``bert.``."""
    name = name.removeprefix("bert.")
    layer = _MINBERT_LAYER.fullmatch(name)
    if layer and layer[2] in MINBERT:
        return f"encoder.layer.{layer[1]}.{MINBERT[layer[2]]}.{layer[3]}"
    first, _, rest = name.partition(".")
    if first in MINBERT and rest in ("weight", "bias"):
        return f"{MINBERT[first]}.{rest}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
