"""Training one encoder on several sentence tasks: which task a step is of, its batch, its loss.

    round_robin     one task after the other, in turns
    proportional    a task is drawn with a probability proportional to its examples, n
    annealed        proportional to n^a, where a falls from 1 to 0.2 over the run, so that small tasks come up
                    more often at its end (Stickland and Murray 2019, "BERT and PALs")
    sequential      all steps of the first task, then all of the second ...; as many of each
    mixed           each step has a batch of every task, all in one packed batch

Every task goes through its examples in an order of its own, and begins anew with another when it is through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from nlpfast.data.packed_sentences import PackedSentences, pack_sentences
from nlpfast.data.sentences import SentenceDataset, SentenceTask
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.nn.packing import Packing
from nlpfast.ops.cross_entropy import cross_entropy
from nlpfast.train.pcgrad import surrogate
from nlpfast.train.sampling import permuted
from nlpfast.train.sentences_options import STRATEGIES

__all__ = ["TaskBatch", "TaskBatches", "TaskLoss", "count_examples", "plan_tasks", "whole_batch"]

# Sources of a batch that messages name.
NAMED = 3


class TaskBatch(NamedTuple):
    """Examples of one or several tasks.

    Attributes:
        packed: their sentences, as `BertForSentences` takes them.
        parts: names of tasks, and how many examples each has.
        labels: of each part.
    """

    packed: PackedSentences
    parts: list[tuple[str, int]]
    labels: list[Tensor]


def plan_tasks(sizes: Mapping[str, int], strategy: str, steps: int, seed: int) -> list[tuple[str, ...]]:
    """Return the tasks of every step of a run.

    Args:
        sizes: examples of each task.
        strategy: see above.
        steps: of the run.
        seed: of "proportional" and "annealed".

    Raises:
        ValueError: the strategy is unknown.
    """
    names = list(sizes)
    if strategy == "mixed":
        return [tuple(names)] * steps
    if strategy == "round_robin":
        return [(names[step % len(names)],) for step in range(steps)]
    if strategy == "sequential":
        return [(names[step * len(names) // steps],) for step in range(steps)]
    if strategy not in ("proportional", "annealed"):
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(STRATEGIES)}; pass one of them")
    draws = np.random.Generator(np.random.Philox(key=seed))
    examples = np.array([sizes[name] for name in names], dtype=np.float64)
    plan: list[tuple[str, ...]] = []
    for step in range(steps):
        power = 1 - 0.8 * step / max(steps - 1, 1) if strategy == "annealed" else 1.0
        shares = examples**power
        plan.append((names[int(draws.choice(len(names), p=shares / shares.sum()))],))
    return plan


class TaskBatches(Dataset[list[TaskBatch]]):
    """The batches of a run, planned beforehand: item i of epoch e is step e * len + i.

    An item is one batch, or, with `apart`, a batch for each of its tasks.

    Attributes:
        epoch: which part of the run the items are of.
        plan: tasks of every step.
        apart: whether the tasks of a step are batches of their own.
    """

    def __init__(
        self,
        datasets: Mapping[str, SentenceDataset],
        *,
        batch_size: int,
        strategy: str,
        steps: int,
        total: int,
        seed: int,
        apart: bool = False,
    ) -> None:
        """Plan the run.

        Args:
            datasets: examples of each task.
            batch_size: examples of each task in a batch.
            strategy: see the top of this module.
            steps: of an epoch.
            total: steps of the run.
            seed: of plan and orders.
            apart: tasks of a step are batches of their own.
        """
        self.datasets, self.batch_size, self.epoch, self._seed, self.apart = (
            datasets,
            batch_size,
            0,
            seed,
            apart,
        )
        self._steps = steps
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        self.plan = plan_tasks(sizes, strategy, total, seed)
        # how many batches of its task came before a step
        self._before: list[tuple[int, ...]] = []
        counts = dict.fromkeys(datasets, 0)
        for names in self.plan:
            self._before.append(tuple(counts[name] for name in names))
            for name in names:
                counts[name] += 1

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return self._steps

    def __getitem__(self, index: int) -> list[TaskBatch]:
        """Return the batch of a step, or one for each of its tasks."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} steps")
        chosen = self._chosen(index)
        groups = [[part] for part in chosen] if self.apart else [chosen]
        return [self._batch(group) for group in groups]

    def _chosen(self, index: int) -> list[tuple[str, list[int]]]:
        """Return the tasks of a step, and their examples."""
        step = self.epoch * self._steps + index
        found = []
        for name, before in zip(self.plan[step], self._before[step], strict=True):
            size = len(self.datasets[name])
            batches = math.ceil(size / self.batch_size)
            # a pass through the examples has an order of its own
            number, place = divmod(before, batches)
            first = place * self.batch_size
            positions = np.arange(first, min(first + self.batch_size, size))
            order = list(self.datasets).index(name) + len(self.datasets) * number
            seed = (self._seed + order * 0x9E3779B97F4A7C15) % 2**63
            found.append((name, permuted(positions, size, seed).tolist()))
        return found

    def _batch(self, chosen: Sequence[tuple[str, list[int]]]) -> TaskBatch:
        sentences: list[list[int]] = []
        types: list[list[int]] = []
        labels = []
        for name, indices in chosen:
            items = [self.datasets[name][index] for index in indices]
            for side in zip(*(item.tokens for item in items), strict=True):
                sentences.extend(side)
            for segments in zip(*(item.types for item in items), strict=True):
                types.extend(segments)
            labels.append(torch.tensor([item.label for item in items]))
        parts = [(name, len(indices)) for name, indices in chosen]
        return TaskBatch(pack_sentences(sentences, types), parts, labels)

    def source(self, index: int) -> str:
        """Return where the first examples of a step's batch are from, as ``file:line``."""
        places = [self.datasets[name].source(i) for name, indices in self._chosen(index) for i in indices]
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        return ", ".join(places[:NAMED]) + more


def whole_batch(items: list[list[TaskBatch]]) -> list[TaskBatch]:
    """Return the only item: it is a batch already."""
    (item,) = items
    return item


def count_examples(batches: list[TaskBatch]) -> int:
    """Return the number of examples."""
    return sum(count for batch in batches for _, count in batch.parts)


class TaskLoss:
    """The loss of a step: the mean over its tasks.

    Classes have cross entropy, perhaps with weights; binary labels its form for one logit; scores the mean
    squared error.
    """

    def __init__(
        self, tasks: Mapping[str, SentenceTask], weights: Mapping[str, Tensor], *, pcgrad: bool = False
    ) -> None:
        """Keep the arguments.

        Args:
            tasks: by name.
            weights: of the classes, for tasks that have them, float32 [C].
            pcgrad: gradients of tasks that contradict each other are projected (pcgrad.py).
        """
        self.tasks, self.weights, self.pcgrad = tasks, weights, pcgrad

    def __call__(self, model: nn.Module, batches: list[TaskBatch]) -> Tensor:
        """Return the loss.

        Args:
            model: BertForSentences.
            batches: on its device; several only if their gradients are to be projected.
        """
        if not self.pcgrad:
            (batch,) = batches
            losses = self._losses(model, batch)
            return torch.stack(losses).mean()
        own = list(cast(BertForSentences, model).heads.parameters())
        heads = {id(parameter) for parameter in own}
        shared = [p for p in model.parameters() if p.requires_grad and id(p) not in heads]
        parts = [functools.partial(self._first_loss, model, batch) for batch in batches]
        return surrogate(parts, shared, own)

    def _first_loss(self, model: nn.Module, batch: TaskBatch) -> Tensor:
        return self._losses(model, batch)[0]

    def _losses(self, model: nn.Module, batch: TaskBatch) -> list[Tensor]:
        packing = Packing(batch.packed.cu_seqlens, batch.packed.longest)
        outputs = model(batch.packed.input_ids, batch.parts, batch.packed.token_type_ids, packing=packing)
        return [
            self._loss(self.tasks[name], output, labels)
            for (name, _), output, labels in zip(batch.parts, outputs, batch.labels, strict=True)
        ]

    def _loss(self, task: SentenceTask, output: Tensor, labels: Tensor) -> Tensor:
        if task.kind == "score":
            return F.mse_loss(output.float(), labels.float())
        if task.kind == "binary":
            return F.binary_cross_entropy_with_logits(output.float(), labels.float())
        if task.name in self.weights:
            weight = self.weights[task.name].to(output.device)
            return F.cross_entropy(output.float(), labels, weight)
        return cross_entropy(output, labels)
