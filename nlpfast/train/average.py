"""The mean of a run's last models, which is often better than any of them (Vaswani et al. 2017, section 6.1).

    step-00000250/, step-00000500/    the models of the last evaluations
    averaged/                         their mean, written at the end of the run

Each is a checkpoint without an optimizer: a run cannot go on from it, and everything else reads it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nlpfast.models import pretrained
from nlpfast.train import checkpoint
from nlpfast.train.checkpoint import CheckpointError

__all__ = ["AVERAGED", "average_models", "keep_model", "models_of", "remove_models", "write_average"]

AVERAGED = "averaged"
# a model's folder, and what a process that was killed while it wrote or removed one may leave beside it
_FOLDER = re.compile(r"step-(\d{8,})(\.partial|\.previous|\.older)?")


def average_models(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Tensor]:
    """Return the mean of the weights of several models.

    Floating tensors are added up in float64, in the order of the folders, and their mean gets their dtype
    back. Of others, such as counters, the last model's are taken.

    Args:
        folders: saved models, or checkpoints, of one configuration; each has a model.safetensors.

    Returns:
        A state dict, on the CPU.

    Raises:
        ValueError: there are no folders.
        CheckpointError: a file cannot be read, or its keys, shapes or dtypes are not those of the first;
            names it.
    """
    if not folders:
        raise ValueError("folders is empty; give at least one model")
    first: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for folder in folders:
        try:
            weights = pretrained.read_weights(Path(folder))
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from error
        first = first or weights
        _check_alike(Path(folder), first, weights)
        for name, weight in weights.items():
            if not weight.is_floating_point():
                means[name] = weight
            elif name in means:
                means[name] += weight
            else:
                means[name] = weight.double()
    for name, weight in first.items():
        if weight.is_floating_point():
            means[name] = (means[name] / len(folders)).to(weight.dtype)
    return means


def _check_alike(folder: Path, first: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    path, fix = folder / pretrained.WEIGHTS_FILE, "average models of one run"
    for name in sorted(first.keys() ^ weights.keys()):
        reason = "is missing" if name in first else "is not part of the first model"
        raise CheckpointError(f"{path}: {name} {reason}; {fix}")
    for name, weight in weights.items():
        other = first[name]
        if weight.shape != other.shape or weight.dtype != other.dtype:
            here, there = (f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (weight, other))
            raise CheckpointError(f"{path}: {name} is {here}, in the first model {there}; {fix}")


def models_of(output_dir: Path) -> dict[int, Path]:
    """Return the folders of the models that a run kept, by their step, in its order.

    Args:
        output_dir: of the run; may be missing.
    """
    found = {}
    for path in output_dir.glob("step-*"):
        match = _FOLDER.fullmatch(path.name)
        if match and not match[2] and (path / checkpoint.STATE).is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def keep_model(
    output_dir: Path, step: int, model: nn.Module, config: Mapping[str, Any], **options: Any
) -> None:
    """Write the model of a step to its folder; of several processes all have to ask.

    Args:
        output_dir: of the run.
        step: optimizer steps that it took.
        model: as it is.
        config: settings of the run, plain values.
        **options: `metadata` and `write` of `checkpoint.save`.

    Raises:
        CheckpointError: the folder holds something else.
        OSError: it cannot be written.
    """
    checkpoint.save(output_dir / f"step-{step:08d}", model, None, {"step": step}, config, **options)


def remove_models(output_dir: Path, *, newest: int, until: int) -> None:
    """Remove the models that a run kept but for some, and what killed processes left of such folders.

    A folder gets another name first, so that it is whole or not there.

    Args:
        output_dir: of the run; may be missing.
        newest: how many are to stay, at least 1.
        until: models of later steps go too: a run that goes on from this step makes them again.
    """
    for path in output_dir.glob("step-*.*"):
        if _FOLDER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    kept = models_of(output_dir)
    staying = [step for step in kept if step <= until][-newest:]
    for step, path in kept.items():
        if step not in staying:
            older = path.with_name(f"{path.name}.older")
            os.replace(path, older)
            shutil.rmtree(older, ignore_errors=True)


def write_average(output_dir: Path, model: nn.Module, config: Mapping[str, Any], **options: Any) -> list[int]:
    """Write the mean of the models that a run kept to `averaged/`, and return their steps.

    Args:
        output_dir: of the run, with at least one of them.
        model: how its weights are written; its own are not looked at.
        config: settings of the run, plain values.
        **options: `metadata` of `checkpoint.save`.

    Raises:
        ValueError: the run kept no model.
        CheckpointError: a model cannot be read or is not like the others, or the folder holds something else.
        OSError: it cannot be written.
    """
    kept = models_of(output_dir)
    steps, weights = list(kept), average_models(list(kept.values()))
    state = {"step": steps[-1], "averaged": steps}
    checkpoint.save(output_dir / AVERAGED, model, None, state, config, weights=weights, **options)
    return steps
