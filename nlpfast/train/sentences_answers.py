"""What a model of sentence tasks answers, and how good that is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nlpfast.data.sentences import (
    CFIMDB,
    PARAPHRASE,
    SIMILARITY,
    SST,
    Example,
    SentenceDataset,
    SentenceTask,
    collate_sentences,
    read_examples,
    task_of,
)
from nlpfast.metrics import accuracy, f1, pearson
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.nn.packing import Packing
from nlpfast.train.device import autocast, to_device
from nlpfast.train.sentences_options import TaskFiles

__all__ = ["TaskData", "Validation", "figures_of", "predict", "read_task", "score_of"]

TASKS = {"sst": SST, "cfimdb": CFIMDB, "para": PARAPHRASE, "sts": SIMILARITY}
# examples that are predicted for together
TOGETHER = 64


@dataclasses.dataclass
class TaskData:
    """A task with its examples.

    Attributes:
        task: what is to be said.
        key: in names of files.
        examples: by part: "train", "dev", and perhaps "test".
        reports: what became of the lines of each part's file.
        files: of each part.
    """

    task: SentenceTask
    key: str
    examples: dict[str, list[Example]]
    reports: dict[str, Any]
    files: dict[str, str]

    def majority(self, part: str) -> float:
        """Return the share of the most frequent label."""
        labels = [example.label for example in self.examples[part]]
        return Counter(labels).most_common(1)[0][1] / len(labels)


def read_task(files: TaskFiles) -> TaskData:
    """Read the files of a task.

    Args:
        files: of the task.

    Raises:
        DataError: one cannot be read, or is damaged.
    """
    task = TASKS[files.key] if files.key else task_of(files.train)
    parts = {"train": files.train, "dev": files.dev, "test": files.test}
    data = TaskData(task, files.key or task.name, {}, {}, {})
    for part, path in parts.items():
        if path is not None:
            labelled = part != "test"
            data.examples[part], report = read_examples(path, task, labelled=labelled)
            data.reports[path], data.files[part] = report.as_dict(), path
    return data


def predict(
    model: BertForSentences,
    task: SentenceTask,
    dataset: SentenceDataset,
    *,
    dtype: str = "float32",
    pause: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return what a model says of all examples: classes, 0.0 or 1.0, or scores; [len(dataset)].

    Args:
        model: in evaluation mode.
        task: one of its tasks.
        dataset: examples of it.
        dtype: precision, through autocast.
        pause: is called before each batch.
    """
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for first in range(0, len(dataset), TOGETHER):
            pause()
            last = min(first + TOGETHER, len(dataset))
            batch = to_device(collate_sentences([dataset[i] for i in range(first, last)]), device)
            packed = batch.packed
            packing = Packing(packed.cu_seqlens, packed.longest)
            with autocast(device, dtype):
                parts = [(task.name, batch.count)]
                (output,) = model(packed.input_ids, parts, packed.token_type_ids, packing=packing)
            found.append(output.float().cpu())
    outputs = torch.cat(found)
    if task.kind == "classes":
        return outputs.argmax(1)
    return outputs if task.kind == "score" else (outputs > 0).float()


def figures_of(
    task: SentenceTask, key: str, predictions: Tensor, examples: Sequence[Example]
) -> dict[str, float]:
    """Return accuracy and F1 of classes and binary labels, or Pearson's r of scores, by "key metric".

    Args:
        task: what was predicted.
        key: names it.
        predictions: of `predict`, [len(examples)].
        examples: with labels.
    """
    labels = torch.tensor([example.label for example in examples])
    if task.kind == "score":
        return {f"{key} pearson": pearson(predictions, labels)}
    average = "macro" if task.kind == "classes" else "binary"
    labels = labels.long()
    return {
        f"{key} accuracy": accuracy(predictions, labels),
        f"{key} f1": f1(predictions.long(), labels, average=cast(Any, average)),
    }


def score_of(figures: Mapping[str, float]) -> float:
    """Return the mean over the tasks of accuracy or (1 + r) / 2.

    Args:
        figures: of all tasks, by "task metric"; r is nan where all predictions are the same, and counts as 0.
    """
    parts = [value for name, value in figures.items() if name.endswith("accuracy")]
    for name, value in figures.items():
        if name.endswith("pearson"):
            parts.append((1 + (value if value == value else 0.0)) / 2)
    return sum(parts) / len(parts)


class Validation:
    """The figures of all tasks on their dev examples."""

    def __init__(
        self, tasks: Sequence[TaskData], datasets: Mapping[str, SentenceDataset], dtype: str
    ) -> None:
        """Keep the arguments.

        Args:
            tasks: with their dev examples.
            datasets: the same as tokens, by key.
            dtype: precision, through autocast.
        """
        self.tasks, self.datasets, self.dtype = tasks, datasets, dtype

    def __call__(self, model: nn.Module, pause: Callable[[], None]) -> dict[str, float]:
        """Return the figures by "task metric", and their "score"; a `score_fn` of the trainer.

        Args:
            model: BertForSentences, in evaluation mode.
            pause: is called before each batch.
        """
        figures: dict[str, float] = {}
        for data in self.tasks:
            dataset = self.datasets[data.key]
            found = predict(cast(BertForSentences, model), data.task, dataset, dtype=self.dtype, pause=pause)
            figures |= figures_of(data.task, data.key, found, data.examples["dev"])
        # JSON has no nan
        return {**{k: v for k, v in figures.items() if v == v}, "score": score_of(figures)}
