"""A saved model: a folder with config.json and model.safetensors. Reading one executes nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nlpfast.files import flush

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "SavedConfig",
    "SavedModel",
    "check_weights",
    "model_type",
    "read_config",
    "read_model",
    "read_weights",
    "saved_once",
    "write",
]

Model = TypeVar("Model", bound=nn.Module)
Saved = TypeVar("Saved", bound="SavedModel")
Config = TypeVar("Config", bound="SavedConfig")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def write(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write a model's configuration and weights.

    Both files are first written under temporary names in the same folder and flushed to the disk, then
    renamed: a write that fails leaves the files that were there.

    Args:
        folder: made when missing.
        config: plain values by name.
        state: a state dict; no two tensors may share memory.

    Raises:
        OSError: when the folder cannot be made or a file cannot be written; names it.
    """
    folder = Path(folder)
    text = json.dumps(config, indent=2) + "\n"
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS_FILE: lambda path: save_file(tensors, path),
        CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
    }
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    target = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write_file in writers.items():
            target = folder / name
            write_file(temporary[name])
            flush(temporary[name])
        for name, path in temporary.items():
            target = folder / name
            os.replace(path, target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{target}: cannot be written ({reason}); free space or choose another folder"
        ) from error
    finally:
        # what was renamed is gone by now; whatever is left belongs to a write that failed
        for path in temporary.values():
            if path.exists():
                path.unlink()


def read_config(folder: str | Path, model_type: str) -> dict[str, Any]:
    """Return the fields of config.json without `model_type`.

    Args:
        folder: a saved model.
        model_type: the kind of model that is expected; a file that names none is taken for it.

    Raises:
        OSError: when the file is missing or unreadable; names it.
        ValueError: when it is not JSON, or of another kind of model; names it.
    """
    fields = _fields(folder)
    found = fields.pop("model_type", model_type)
    if found != model_type:
        path = Path(folder) / CONFIG_FILE
        raise ValueError(
            f"{path}: model_type is {found!r}, expected {model_type!r}; load it with the class it is for"
        )
    return fields


def model_type(folder: str | Path) -> str | None:
    """Return the kind of model that config.json names; None if it names none.

    Args:
        folder: a saved model.

    Raises:
        OSError: when the file is missing or unreadable; names it.
        ValueError: when it is not JSON; names it.
    """
    found: str | None = _fields(folder).get("model_type")
    return found


def _fields(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); save the model again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds a {type(fields).__name__}, expected an object; save the model again")
    return fields


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, on the CPU, in memory of their own.

    Args:
        folder: a saved model.

    Raises:
        OSError: when the file is missing or unreadable; names it.
        ValueError: when it is damaged; names it.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        # copied, as the tensors of load_file may be a view of the file, which somebody may replace
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}); save the model again"
        ) from error


def check_weights(folder: str | Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise an error that names the file and the first key that differs, unless keys and shapes agree.

    Args:
        folder: a saved model, for the error.
        expected: the state dict of a model of the configuration.
        found: what `read_weights` returned.

    Raises:
        ValueError: when a key is missing, is not part of the model, or has another shape.
    """
    path = Path(folder) / WEIGHTS_FILE
    fix = f"use the {CONFIG_FILE} that belongs to these weights"
    for name in sorted(expected.keys() ^ found.keys()):
        reason = "is missing" if name in expected else "is not part of the model"
        raise ValueError(f"{path}: {name} {reason}; {fix}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            shapes = f"has shape {list(found[name].shape)}, the configuration says {list(tensor.shape)}"
            raise ValueError(f"{path}: {name} {shapes}; {fix}")


def _unreadable(path: Path, error: OSError) -> OSError:
    # the class stays that of the cause, such as FileNotFoundError
    reason = error.strerror or ("no such file" if isinstance(error, FileNotFoundError) else str(error))
    return type(error)(f"{path}: cannot be read ({reason}); give a folder with a saved model")


def read_model(folder: str | Path, model_type: str, build: Callable[[dict[str, Any]], Model]) -> Model:
    """Return a saved model in evaluation mode, on the CPU, in the dtype in which it was saved.

    Args:
        folder: a saved model.
        model_type: the kind of model that is expected.
        build: makes a model of the fields of config.json; ValueError when there is none of these.

    Raises:
        OSError: when a file is missing or unreadable; names it.
        ValueError: when a file is damaged, or its keys or shapes are not those of the configuration; names
            the file.
    """
    fields = read_config(folder, model_type)
    try:
        # no memory and no random numbers for weights that the file replaces
        with torch.device("meta"):
            model = build(fields)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: {error}") from error
    state = read_weights(folder)
    check_weights(folder, model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    return model.eval()


class SavedConfig:
    """A configuration, a dataclass, that config.json holds.

    Attributes:
        model_type: the kind of model, by which the file is known.
    """

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls: type[Config], fields: Mapping[str, Any]) -> Config:
        """Return the configuration of a config.json.

        Args:
            fields: what `to_dict` returned, without `model_type`.

        Raises:
            ValueError: a field is missing, is none of this kind, or has a wrong value.
        """
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in sorted(known ^ fields.keys()):
            reason = "is missing" if name in known else f"is not a field of {cls.__name__}"
            raise ValueError(f"{name} {reason}; save the model again")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}  # type: ignore[call-overload]


class SavedModel(nn.Module):
    """A model that can be saved and read.

    Attributes:
        config: the configuration it was built from.
        config_class: what its constructor takes.
    """

    config_class: ClassVar[type[SavedConfig]]

    def __init__(self, config: Any) -> None:
        """Keep the configuration.

        Args:
            config: the sizes.
        """
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; a write that fails leaves the files that were there.

        Args:
            folder: made when missing.
            state_dict: the weights to be written, where the module has only parts of them; None for its own.

        Raises:
            OSError: when the folder cannot be made or a file cannot be written; names it.
        """
        write(folder, self.config.to_dict(), state_dict or self.state_dict())

    @classmethod
    def from_pretrained(cls: type[Saved], folder: str | Path) -> Saved:
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
        kind = cls.config_class
        return read_model(folder, kind.model_type, lambda fields: cls(kind.from_dict(fields)))


def saved_once(model: nn.Module, first: str, second: str) -> None:
    """Have one name in the state dict for a weight that a model has under two.

    Args:
        model: gets hooks for that.
        first: the name that stays.
        second: the other one.
    """
    model.register_state_dict_post_hook(functools.partial(_name_once, second=second))
    model.register_load_state_dict_pre_hook(functools.partial(_name_twice, first=first, second=second))


def _name_once(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any, second: str) -> None:
    state.pop(prefix + second)


def _name_twice(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any, first: str, second: str) -> None:
    if prefix + first in state:
        state.setdefault(prefix + second, state[prefix + first])
