"""The birthplaces task of CS224N's assignment 5: a character GPT learns where people were born.

    pretrain   documents with a hole, which is to be filled           -> parameters
    finetune   questions with answers, perhaps from such parameters   -> parameters
    evaluate   questions (birthplaces_answers.py)                     -> predictions, and how many are right

The vocabulary is that of the corpus, so that all three need it. Parameters are files of
nlpfast.models.parameter_file; a run keeps its log and, until it is done, its checkpoints in a folder below
expt/, from which `resume` goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nlpfast.data import birthplaces as data
from nlpfast.data.birthplaces_files import read_documents
from nlpfast.data.lines import DataError, file_digest, read_lines
from nlpfast.models.parameter_file import write_parameters
from nlpfast.nn.packing import Packing
from nlpfast.train import checkpoint
from nlpfast.train.birthplaces_answers import build_model
from nlpfast.train.birthplaces_options import (
    BLOCK_SIZE,
    BirthplacesOptions,
    needed,
    run_folder,
    trainer_config,
)
from nlpfast.train.config import ConfigError
from nlpfast.train.device import resolve_device
from nlpfast.train.distributed import joined, own_device
from nlpfast.train.log import check_tensorboard
from nlpfast.train.random_state import set_seed
from nlpfast.train.task_run import own_dropout
from nlpfast.train.trainer import Trainer, TrainState

__all__ = ["count_characters", "packed_loss", "prefix_loss", "train"]


def packed_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """Return the loss of a batch of `nlpfast.data.birthplaces.packed`."""
    tokens, targets, cu_seqlens, longest = batch
    loss: Tensor = model(tokens, targets, return_logits=False, packing=Packing(cu_seqlens, longest))[1]
    return loss


def prefix_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the loss of a batch of `nlpfast.data.birthplaces.padded` with prefixes."""
    loss: Tensor = model(batch[0], batch[1], return_logits=False, prefix_lengths=batch[2])[1]
    return loss


def count_characters(batch: tuple[Any, ...]) -> int:
    """Return how many targets of a batch count."""
    return int((batch[1] != data.PAD_ID).sum())


def train(
    action: str,
    variant: str,
    corpus: str,
    options: BirthplacesOptions,
    *,
    folder: str | Path | None = None,
    quiet: bool = False,
) -> TrainState:
    """Pretrain or finetune, and write the parameters.

    Everything that can be wrong with options and files is found before anything is written. Seeds the
    generators of Python, NumPy and PyTorch. Under torchrun each of its processes calls this.

    Args:
        action: pretrain or finetune.
        variant: vanilla or perceiver.
        corpus: file with a document a line; it makes the vocabulary.
        options: files, model and recipe.
        folder: for log and checkpoints; None for the one below expt/.
        quiet: print nothing; otherwise progress goes to stderr.

    Returns:
        The run's progress; the mean loss of its last steps is in the log.

    Raises:
        ConfigError: an option that cannot be served.
        DataError: a file cannot be read, or does not fit.
        CheckpointError: there is nothing to resume, or it is damaged.
        TrainingError: the run cannot go on.
        OSError: a file cannot be written.
        KeyboardInterrupt: after SIGINT, once the run is saved.
        Terminated: after SIGTERM or SIGUSR1, once the run is saved.
    """
    needed(options, action, variant)
    if options.tb_expt_name is not None:
        check_tensorboard()
    device = resolve_device(own_device(options.device))
    folder = Path(folder or run_folder(options, action, variant))
    target = str(options.writing_params_path)
    _check_target(target)
    unfinished = checkpoint.find_exact(folder / "last") is not None
    if unfinished and not (options.resume or options.overwrite):
        rule = f"a run that was stopped is in {folder}, go on with --resume or begin anew with --overwrite"
        raise ConfigError("writing_params_path", target, rule)
    if options.resume and not unfinished:
        raise ConfigError("resume", True, f"no run was stopped in {folder}, leave it out")
    with joined(device) as processes:
        trainer, words = _prepared(action, variant, corpus, options, str(device), folder, quiet)
        changes = _resumed(trainer, folder, options) if options.resume else []
        if not trainer.quiet:
            for line in (words, *(f"changed: {change}" for change in changes)):
                print(line, file=sys.stderr, flush=True)
        if options.overwrite and processes.rank == 0:
            _remove_checkpoints(folder)
        state = trainer.run()
        if processes.rank == 0:
            facts = {"variant": variant, "vocabulary": trainer.metadata["vocabulary"]}
            facts["residual"] = options.residual
            write_parameters(target, trainer.model.state_dict(), facts)
            # what the run was for is there; its log stays
            _remove_checkpoints(folder)
    return state


def _check_target(path: str) -> None:
    """Raise unless there can be a file of this name: better before the training than after it."""
    folder = Path(path).parent
    if not folder.is_dir() or Path(path).is_dir():
        rule = f"there is no folder {folder}, create it first" if not folder.is_dir() else "name a file"
        raise ConfigError("writing_params_path", path, rule)


def _remove_checkpoints(folder: Path) -> None:
    for ending in ("", ".previous", ".older", ".partial"):
        shutil.rmtree(folder / f"last{ending}", ignore_errors=True)


def _resumed(trainer: Trainer, folder: Path, options: BirthplacesOptions) -> list[str]:
    """Go on with the run in the folder, and return which options are different."""
    saved = checkpoint.load(checkpoint.find_latest(folder)).metadata
    for name, what in (("digest", "files"), ("options", "model")):
        if saved.get(name) != trainer.metadata[name]:
            raise DataError(f"{folder}: the run had another {what}; give its own, or begin with --overwrite")
    return trainer.resume(folder)


def _prepared(
    action: str,
    variant: str,
    corpus: str,
    options: BirthplacesOptions,
    device: str,
    folder: Path,
    quiet: bool,
) -> tuple[Trainer, str]:
    """Return the trainer at the start of a run, and what there is to say of it."""
    seeded = options.compat == "seed"
    documents, vocabulary, report = read_documents(corpus, keep_empty=seeded)
    config = dataclasses.replace(trainer_config(options, action, len(documents)), device=device)
    read, files = f"{report}", [corpus]
    dataset: data.CharCorruptionDataset | data.NameDataset
    if action == "pretrain":
        dataset = data.CharCorruptionDataset(
            *(documents, vocabulary, BLOCK_SIZE),
            seed=options.seed,
            compat=options.compat,
            prefix=options.prefix_lm,
            spans=options.spans,
            source=corpus,
        )
    else:
        names = str(options.finetune_corpus_path)
        rows = list(read_lines(names))
        if seeded:
            # as the assignment's code reads these, and not the questions of its evaluation
            rows = [row.encode("ascii", "ignore").decode() for row in rows]
        dataset = data.NameDataset(rows, vocabulary, BLOCK_SIZE, prefix=options.prefix_lm, source=names)
        read, files = f"{names}: {len(rows):,} questions", [corpus, names]
    set_seed(options.seed)
    model = build_model(options, variant, vocabulary)
    digest = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
    own = {"action": action, "variant": variant, "latents": options.bottleneck_dim, "config": options.config}
    of_model = ("prefix_lm", "compat", "spans", "dropout", "residual")
    own |= {name: getattr(options, name) for name in of_model}
    trainer = Trainer(
        *(model, dataset, config),
        loss_fn=cast(Callable[[nn.Module, Any], Tensor], prefix_loss if options.prefix_lm else packed_loss),
        count_fn=count_characters,
        collate_fn=data.padded if options.prefix_lm else data.packed,
        output_dir=folder,
        metadata={"digest": digest, "options": own, "vocabulary": vocabulary.chars},
        quiet=quiet,
        schedule_tokens=BLOCK_SIZE - 1 if seeded else None,
        how_to_resume="the same command with --resume",
    )
    if seeded:
        _decay_all_weights(model, trainer.optimizer)
    own_dropout(trainer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return trainer, (
        f"{read}; {len(vocabulary)} characters; {variant} GPT of {parameters:,} parameters; "
        f"{trainer.total_steps():,} steps on {device}, {config.dtype}"
    )


def _decay_all_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let everything but biases decay: the assignment looks for names that layer norms do not have."""
    decayed, others = optimizer.param_groups
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    decayed["params"] += [p for p in others["params"] if id(p) not in biases]
    others["params"] = [p for p in others["params"] if id(p) in biases]
