"""Sentence tasks on BERT, one or several: from files and options to a model, its figures and predictions.

The best checkpoint is that of the best score on the dev files: the mean over the tasks of the accuracy, or of
(1 + Pearson's r) / 2, as CS224N ranks its projects.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any, cast

from nlpfast.data.invented_sentences import write_invented
from nlpfast.data.lines import file_digest
from nlpfast.data.sentences import (
    SentenceDataset,
    SentenceTask,
    class_weights,
    write_predictions,
)
from nlpfast.data.wordpiece import WordPiece
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.train.bert_pretraining import bert_config, check_vocabulary, new_vocabulary
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.multitask import TaskBatches, TaskLoss, count_examples, whole_batch
from nlpfast.train.random_state import set_seed
from nlpfast.train.sentences_answers import TaskData, Validation, figures_of, predict, read_task, score_of
from nlpfast.train.sentences_options import MultitaskOptions, SentencesOptions, TaskFiles
from nlpfast.train.task_run import run_task
from nlpfast.train.trainer import Trainer, TrainState

__all__ = ["SentencesRun", "train_sentences"]


@dataclasses.dataclass
class SentencesRun:
    """What a run gave.

    Attributes:
        model: the one of the best score.
        state: progress.
        figures: of the best model on the dev files, by "task metric".
        predictions: files that were written.
        folder: with the best model and its vocabulary.
    """

    model: BertForSentences
    state: TrainState
    figures: dict[str, float]
    predictions: list[Path]
    folder: Path


def train_sentences(
    options: SentencesOptions, *, resume: str | None = None, quiet: bool = False
) -> SentencesRun:
    """Train on one task or several, and predict with the best checkpoint.

    Writes log and checkpoints to `options.output_dir`; to `model/` in it the best model with its vocabulary;
    and `<task>-dev-out.csv`, and `<task>-test-out.csv` where there are examples for it, in the course's form.
    Seeds the generators of Python, NumPy and PyTorch. See `nlpfast.train.task_run.run_task` for what is found
    before anything is written, and for exceptions.

    Args:
        options: files, model and recipe.
        resume: go on from the latest checkpoint in this folder.
        quiet: print nothing; otherwise progress goes to stderr.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rule = "sentence tasks are trained by one process, leave out torchrun"
        raise ConfigError("output_dir", options.output_dir, rule)
    made: list[tuple[WordPiece, list[TaskData]]] = []
    prepare = functools.partial(_prepared, made=made)
    # the settings of the loop depend on the data, which `prepare` reads
    config = TrainerConfig(max_epochs=options.epochs, device=options.device, seed=options.seed)
    trainer, state = run_task(options, config, prepare, resume=resume, quiet=quiet)
    (vocabulary, tasks), folder = made[0], Path(options.output_dir)
    model = BertForSentences.from_pretrained(folder / "best").to(trainer.device)
    model.save_pretrained(folder / "model")
    vocabulary.save(folder / "model")
    figures: dict[str, float] = {}
    written = []
    for data in tasks:
        for part in ("dev", "test"):
            if part not in data.examples:
                continue
            dataset = _dataset(data, part, vocabulary, options, model)
            found = predict(model, data.task, dataset, dtype=options.dtype)
            written.append(folder / f"{data.key}-{part}-out.csv")
            write_predictions(written[-1], data.examples[part], found, data.task.prediction)
            if part == "dev":
                figures |= figures_of(data.task, data.key, found, data.examples[part])
    figures["score"] = score_of(figures)
    return SentencesRun(model, state, figures, written, folder / "model")


def _read(options: SentencesOptions) -> list[TaskData]:
    """Return the tasks with their examples; embedded ones are written to files first."""
    files = options.files()
    if not files:
        folder = Path(options.output_dir) / "data"
        paths = write_invented(folder, 0)
        keys = ("sst", "para", "sts") if isinstance(options, MultitaskOptions) else ("sst",)
        names = [[str(paths[f"{key}-{part}"]) for part in ("train", "dev", "test")] for key in keys]
        files = [TaskFiles(key, *row) for key, row in zip(keys, names, strict=True)]
    return [read_task(part) for part in files]


def _dataset(
    data: TaskData, part: str, vocabulary: WordPiece, options: SentencesOptions, model: BertForSentences
) -> SentenceDataset:
    # a model may read less than is asked for
    longest = min(options.max_length, model.config.max_position_embeddings)
    return SentenceDataset(*(data.examples[part], vocabulary), max_length=longest, source=data.files[part])


def _prepared(
    options: SentencesOptions,
    config: TrainerConfig,
    quiet: bool,
    made: list[tuple[WordPiece, list[TaskData]]],
) -> tuple[Trainer, str]:
    """Return the trainer at its start, and what there is to say; `made` gets vocabulary and tasks."""
    tasks = _read(options)

    def texts() -> list[str]:
        return [text for data in tasks for example in data.examples["train"] for text in example.sentences]

    vocabulary = new_vocabulary(
        *(options.model, options.vocab, texts), size=options.vocab_size, cased=options.cased
    )
    made.append((vocabulary, tasks))
    set_seed(options.seed)
    model = _model(options, [data.task for data in tasks], len(vocabulary))
    train = {data.task.name: _dataset(data, "train", vocabulary, options, model) for data in tasks}
    dev = {data.key: _dataset(data, "dev", vocabulary, options, model) for data in tasks}
    steps = sum(-(-len(dataset) // options.batch_size) for dataset in train.values())
    multitask = options if isinstance(options, MultitaskOptions) else None
    if multitask is not None and multitask.strategy == "mixed":
        steps = -(-steps // len(train))
    total = min(steps * options.epochs, options.max_steps or steps * options.epochs)
    batches = TaskBatches(
        train,
        batch_size=options.batch_size,
        strategy=multitask.strategy if multitask else "round_robin",
        steps=steps,
        total=total,
        seed=options.seed,
        apart=multitask is not None and multitask.pcgrad,
    )
    weights = {
        data.task.name: class_weights(data.examples["train"], cast(int, data.task.classes))
        for data in tasks
        if options.class_weights and data.task.kind == "classes"
    }
    trainer = Trainer(
        *(model, batches, dataclasses.replace(options.trainer_config(steps), device=config.device)),
        loss_fn=cast(Any, TaskLoss(model.tasks, weights, pcgrad=batches.apart)),
        count_fn=cast(Any, count_examples),
        collate_fn=cast(Any, whole_batch),
        score_fn=Validation(tasks, dev, options.dtype),
        output_dir=options.output_dir,
        metadata=_facts(options, tasks, vocabulary),
        quiet=quiet,
    )
    return trainer, _words(tasks, [*train.values(), *dev.values()], vocabulary, trainer)


def _model(options: SentencesOptions, tasks: list[SentenceTask], pieces: int) -> BertForSentences:
    dropout, frozen = options.hidden_dropout_prob, options.option == "pretrain"
    more: dict[str, Any] = {"tasks": tasks, "frozen": frozen}
    if isinstance(options, MultitaskOptions):
        more |= {"objective": options.objective, "rlayer": options.rlayer}
    if options.model is None:
        return BertForSentences(bert_config(options.config, pieces, dropout), **more)
    model = BertForSentences.from_pretrained(options.model, hidden_dropout_prob=dropout, **more)
    check_vocabulary(options.model, model.config, pieces)
    return model


def _facts(options: SentencesOptions, tasks: list[TaskData], vocabulary: WordPiece) -> dict[str, Any]:
    """Return what a checkpoint tells of the data."""
    digest = hashlib.sha256("\n".join(vocabulary.tokens).encode("utf-8", "surrogatepass"))
    for data in tasks:
        for path in data.files.values():
            digest.update(file_digest(path).encode())
    names = ", ".join(data.files["train"] for data in tasks)
    reports = {path: report for data in tasks for path, report in data.reports.items()}
    return {
        "text": names,
        "digest": digest.hexdigest(),
        "data": reports,
        "options": dataclasses.asdict(options),
    }


def _words(
    tasks: list[TaskData], datasets: list[SentenceDataset], vocabulary: WordPiece, trainer: Trainer
) -> str:
    """Return what there is to say at the start: counts, what was skipped, the most frequent labels."""
    lines = []
    for data in tasks:
        parts = [f"{len(examples):,} {part}" for part, examples in data.examples.items()]
        line = f"{data.key}: {', '.join(parts)}"
        if data.task.kind != "score":
            line += f"; always the most frequent label {data.majority('dev'):.3f}"
        lines.append(line)
        for path, report in data.reports.items():
            skipped = {k: v for k, v in report["skipped"].items() if k != "header"}
            lines += [f"{path}: skipped {skipped}"] * bool(skipped)
    cut = sum(dataset.truncated for dataset in datasets)
    lines += [f"{cut:,} examples cut"] * bool(cut)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    lines.append(
        f"{len(vocabulary):,} pieces; BERT of {parameters:,} parameters; {trainer.total_steps():,} steps on "
        f"{trainer.device}, {trainer.config.dtype}"
    )
    return "\n".join(lines)
