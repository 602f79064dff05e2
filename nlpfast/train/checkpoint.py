"""Checkpoints: a folder of safetensors and JSON, complete or not there at all.

    config.json, model.safetensors    the model, as its own from_pretrained(folder) reads it
    optimizer.safetensors             "<slot>.<parameter>", for example "exp_avg.head.weight"
    <name>.safetensors                what the caller adds, such as the random state
    state.json                        progress, settings, metadata such as the vocabulary, versions

A checkpoint is written to `<folder>.partial`, every file is synced, the old one moves to `<folder>.previous`,
the new one takes its name, and only then an older one goes. A crash between the two renames leaves
`<folder>.previous`, which `find` returns. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nlpfast
from nlpfast.data.text import DataError
from nlpfast.files import flush
from nlpfast.models import pretrained
from nlpfast.train.distributed import like, whole

FORMAT = 4
OPTIMIZER, ENDING, STATE = "optimizer", ".safetensors", "state.json"


class CheckpointError(DataError):
    """Report a checkpoint that is missing, damaged, or of another model; names the file and the fix."""


@dataclasses.dataclass
class Checkpoint:
    """What `load` found beside the tensors.

    Attributes:
        folder: the folder that was read.
        state: progress of the run.
        config: settings of the run.
        metadata: what the caller of `save` added, for example the vocabulary.
        tensors: what the caller of `save` added: tensors by name, by the name of their file.
    """

    folder: Path
    state: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f"{folder.name}.{ending}")


def _plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share memory, as safetensors asks for."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the parameter names of each group of the optimizer, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _optimizer_parts(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    names = _parameter_names(model, optimizer)
    flat = [name for group in names for name in group]
    content = optimizer.state_dict()
    tensors = {}
    for index, slots in content["state"].items():
        for slot, value in slots.items():
            tensors[f"{slot}.{flat[index]}"] = whole(torch.as_tensor(value))
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": group_names}
        for group, group_names in zip(content["param_groups"], names, strict=True)
    ]
    return tensors, groups


def _write(
    folder: Path,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    files: Mapping[str, Mapping[str, Tensor]],
    content: Mapping[str, Any],
) -> None:
    folder.mkdir(parents=True)
    if hasattr(model, "save_pretrained"):
        cast(Any, model).save_pretrained(folder, state_dict=weights)
    else:
        save_file(_plain_tensors(weights), folder / pretrained.WEIGHTS_FILE)
    for name, tensors in files.items():
        save_file(_plain_tensors(tensors), folder / f"{name}{ENDING}")
    (folder / STATE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def _take_place(partial: Path, folder: Path, keep_previous: bool) -> None:
    previous, older = _beside(folder, "previous"), _beside(folder, "older")
    try:
        if folder.exists():
            if previous.exists():
                os.replace(previous, older)
            os.replace(folder, previous)
        os.replace(partial, folder)
    except BaseException:
        if previous.exists() and not folder.exists():
            os.replace(previous, folder)
        if older.exists() and not previous.exists():
            os.replace(older, previous)
        raise
    flush(folder.parent)
    shutil.rmtree(older, ignore_errors=True)
    if not keep_previous:
        shutil.rmtree(previous, ignore_errors=True)


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    keep_previous: bool = False,
    write: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint so that `folder` holds either the old one or the new one, whole.

    Args:
        folder: its name; a folder that holds something else than a checkpoint is refused.
        model: writes itself by `save_pretrained(folder, state_dict=...)` where it has that.
        optimizer: its state is written by parameter name; None to leave it out.
        state: progress of the run, plain values.
        config: settings of the run, plain values.
        metadata: anything else that is plain, for example `{"vocabulary": [...]}`.
        tensors: further tensors by name, by the name of their file, for example `{"random": {...}}`.
        keep_previous: leave the checkpoint that this one replaces in `<folder>.previous`.
        write: False in all but one of several processes, which only bring their parts of weights and
            optimizer.
        weights: those to be written, whole; None for the model's own.

    Raises:
        CheckpointError: `folder` is a file, or a folder with other content.
        OSError: the disk is full or not writable; the previous checkpoint is unharmed.
    """
    folder = Path(os.path.realpath(folder))
    partial = _beside(folder, "partial")
    if folder.exists() and not (folder / STATE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} holds something else than a checkpoint: name another folder")
    if weights is None:
        weights = {name: whole(weight) for name, weight in model.state_dict().items()}
    files, groups = dict(tensors or {}), None
    if optimizer is not None:
        files[OPTIMIZER], groups = _optimizer_parts(model, optimizer)
    if not write:
        return
    content = {
        "format": FORMAT,
        "nlpfast": getattr(nlpfast, "__version__", "unknown"),
        "torch": str(torch.__version__),
        "state": dict(state),
        "config": dict(config),
        "metadata": dict(metadata or {}),
        "files": sorted(files),
        "optimizer": groups,
    }
    try:
        # what an earlier process left when it was killed
        for litter in (partial, _beside(folder, "older")):
            shutil.rmtree(litter, ignore_errors=True)
        _write(partial, model, weights, files, content)
        _take_place(partial, folder, keep_previous)
    except (OSError, SafetensorError) as error:
        kept = find_exact(folder)
        rest = f"the previous one is still good in {kept}" if kept else "no earlier one exists"
        raise OSError(f"cannot write the checkpoint {folder}: {error}; {rest}; free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_exact(folder: Path) -> Path | None:
    """Return `folder` if it is a checkpoint, what a crash left of its predecessor otherwise, or None."""
    for candidate in (folder, _beside(folder, "previous")):
        if (candidate / STATE).is_file():
            return candidate
    return None


def find(folder: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that `folder` stands for: itself, or `best`, or `last` in it.

    Raises:
        CheckpointError: there is none; the message says what was looked for.
    """
    folder = Path(os.path.realpath(folder))
    for candidate in (folder, folder / "best", folder / "last"):
        found = find_exact(candidate)
        if found is not None:
            return found
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such checkpoint: name the folder that `nlpfast train` wrote")
    missing = f"no {STATE} in it, in best/ or in last/"
    raise CheckpointError(f"{folder} is not a checkpoint: {missing}: name one that `nlpfast train` wrote")


def find_latest(folder: str | os.PathLike[str]) -> Path:
    """Return the checkpoint from which a run goes on: `folder` itself, or the latest one in it.

    Raises:
        CheckpointError: there is none; the message says what was looked for.
    """
    folder = Path(os.path.realpath(folder))
    for candidate in (folder, folder / "last"):
        found = find_exact(candidate)
        if found is not None:
            return found
    missing = "no such folder" if not folder.exists() else f"no {STATE} in it or in last/"
    raise CheckpointError(f"{folder}: {missing}: name the folder that `nlpfast train` wrote")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): use another checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not of format {FORMAT}: use a checkpoint of this version of nlpfast")
    for key in ("state", "config", "metadata"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"{path}: {key} is missing or no object: use another checkpoint")
    files = content.get("files")
    if not isinstance(files, list) or not all(
        isinstance(name, str) and name.isidentifier() for name in files
    ):
        raise CheckpointError(f"{path}: files is missing or no list of names: use another checkpoint")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # copies, as what load_file gives may be a view of the file
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): use another checkpoint") from error


def _optimizer_content(
    folder: Path, groups: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    path = folder / f"{OPTIMIZER}{ENDING}"
    names = _parameter_names(model, optimizer)
    if groups is None:
        raise CheckpointError(f"{folder / STATE}: no optimizer, only a model: name the last/ of its run")
    if not isinstance(groups, list) or [group.get("params") for group in groups] != names:
        raise CheckpointError(f"{folder / STATE}: other optimizer groups: build it from the same model")
    flat = [name for group in names for name in group]
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(path).items():
        slot, _, name = key.partition(".")
        if name not in parameters or (tensor.ndim > 0 and tensor.shape != parameters[name].shape):
            raise CheckpointError(f"{path}: {key} {list(tensor.shape)} fits no parameter: take another")
        part = like(tensor, parameters[name]) if tensor.ndim > 0 else tensor
        state.setdefault(flat.index(name), {})[slot] = part
    new_groups, start = [], 0
    for group in groups:
        indices = list(range(start, start + len(group["params"])))
        start += len(indices)
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        new_groups.append({**plain, "params": indices})
    return {"state": state, "param_groups": new_groups}


def load(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Checkpoint:
    """Read a checkpoint into a model and an optimizer; everything is checked before anything changes.

    Args:
        folder: a checkpoint, or a run's folder with `best` or `last` in it; a run that goes on wants what
            `find_latest` returns.
        model: takes the weights; None to read only state and metadata.
        optimizer: takes its state; it has to have been built from `model`.

    Raises:
        CheckpointError: a file is missing or damaged, or keys or shapes differ: names file, key and shapes.
    """
    found = find(folder)
    content = _read_json(found / STATE)
    extra = [name for name in content["files"] if name != OPTIMIZER]
    files = {name: _read_tensors(found / f"{name}{ENDING}") for name in extra}
    if model is not None:
        own = model.state_dict()
        try:
            weights = pretrained.read_weights(found)
            pretrained.check_weights(found, own, weights)
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from error
        if optimizer is not None:
            optimizer_state = _optimizer_content(found, content.get("optimizer"), model, optimizer)
            optimizer.load_state_dict(optimizer_state)
        model.load_state_dict({name: like(weight, own[name]) for name, weight in weights.items()})
    return Checkpoint(found, content["state"], content["config"], content["metadata"], files)
