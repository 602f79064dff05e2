"""A run of a task: its output folder, its start or its going on, and its end; the same for every task."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nlpfast.data.lines import DataError
from nlpfast.train import checkpoint
from nlpfast.train.average import AVERAGED, models_of
from nlpfast.train.checkpoint import find_exact
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.device import resolve_device
from nlpfast.train.distributed import joined, own_device
from nlpfast.train.log import check_tensorboard
from nlpfast.train.random_state import set_seed
from nlpfast.train.resume import changed_options
from nlpfast.train.trainer import Trainer, TrainState

__all__ = ["CHECKPOINTS", "TaskOptions", "check_output_dir", "own_dropout", "run_task"]

CHECKPOINTS = ("best", "last")


class TaskOptions(Protocol):
    """What options of every task have: a dataclass whose fields were declared with `option`."""

    output_dir: str
    overwrite: bool


def check_output_dir(folder: Path, overwrite: bool) -> None:
    """Raise unless a run can write its results to `folder`.

    Args:
        folder: made later; may exist.
        overwrite: checkpoints of an earlier run are no reason to refuse.

    Raises:
        ConfigError: it is a file, cannot be written to, or holds checkpoints that must not be replaced.
    """
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError("output_dir", str(folder), f"{part} is a file, name a folder")
        if part.is_symlink() and not part.exists():
            raise ConfigError("output_dir", str(folder), f"{part} is a link to nothing, name another folder")
    there = next(part for part in (folder, *folder.parents, Path()) if part.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError("output_dir", str(folder), f"{there} cannot be written to, name another folder")
    for name in (*CHECKPOINTS, AVERAGED, *(path.name for path in models_of(folder).values())):
        if find_exact(folder / name) and not overwrite:
            rule = f"holds the checkpoint {name!r} of an earlier run, name another folder or add --overwrite"
            raise ConfigError("output_dir", str(folder), rule)
        if (folder / name).exists() and not find_exact(folder / name):
            raise ConfigError(
                "output_dir", str(folder), f"{name!r} in it is no checkpoint, name another folder"
            )


def own_dropout(trainer: Trainer) -> None:
    """Seed the generators of this process anew, where there are several: dropout differs between them.

    Args:
        trainer: of the run.
    """
    if trainer.processes.rank > 0:
        set_seed((trainer.config.seed + trainer.processes.rank * 0x9E3779B97F4A7C15) % 2**63)


def run_task(
    options: Any,
    config: TrainerConfig,
    prepare: Callable[[Any, TrainerConfig, bool], tuple[Trainer, str]],
    *,
    resume: str | None = None,
    quiet: bool = False,
) -> tuple[Trainer, TrainState]:
    """Train, and write `log.jsonl`, `last/` and `best/`, perhaps more, to `options.output_dir`.

    Everything that can be wrong with options and data is found before anything is written. Under torchrun
    each of its processes calls this, and they train one model together.

    Args:
        options: `TaskOptions` of the task, a dataclass.
        config: the training loop's settings.
        prepare: `(options, config, quiet) -> trainer at the start of the run, what there is to say of it`.
            Its metadata has "text", what messages call the data, and "digest", which tells them apart.
        resume: go on from the latest checkpoint in this folder, with the bits of a run that never stopped.
        quiet: print nothing; otherwise progress goes to stderr.

    Raises:
        ConfigError: an option that cannot be served, or that a run which is resumed cannot change.
        DataError: the data cannot be read, or is not that of the run.
        CheckpointError: there is nothing to resume, or it is damaged.
        TrainingError: the run cannot go on.
        OSError: a file cannot be written.
        KeyboardInterrupt: after SIGINT, once the run is saved.
        Terminated: after SIGTERM or SIGUSR1, once the run is saved.
    """
    folder = Path(options.output_dir)
    changes = []
    if resume is None:
        check_output_dir(folder, options.overwrite)
    else:
        saved = checkpoint.load(checkpoint.find_latest(resume)).metadata
        changes = changed_options(options, saved.get("options", {}))
    device = resolve_device(own_device(config.device))
    if config.tensorboard:
        check_tensorboard()
    with joined(device) as processes:
        trainer, words = prepare(options, dataclasses.replace(config, device=str(device)), quiet)
        if resume is not None:
            if saved.get("digest") != trainer.metadata["digest"]:
                source = trainer.metadata["text"]
                raise DataError(f"{source}: is not the text that the run was trained on; give that one")
            changes += trainer.resume(resume)
        if not trainer.quiet:
            for line in (words, *(f"changed: {change}" for change in changes)):
                print(line, file=sys.stderr, flush=True)
        if options.overwrite and resume is None and processes.rank == 0:
            for name in (*CHECKPOINTS, AVERAGED, *(path.name for path in models_of(folder).values())):
                for ending in ("", ".previous", ".older", ".partial"):
                    shutil.rmtree(folder / f"{name}{ending}", ignore_errors=True)
        return trainer, trainer.run()
