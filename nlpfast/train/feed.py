"""Batches on their way into the training loop: in groups of a step, from any place of any epoch."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nlpfast.train.config import TrainerConfig
from nlpfast.train.distributed import Processes
from nlpfast.train.sampling import BatchOrder


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step computes with.

    Attributes:
        data: of the data set's making.
        count: targets that count in the loss; 0 for an example that stands in for an empty part of a batch.
        indices: of the examples.
    """

    data: Any
    count: int
    indices: list[int]


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Keep a worker alive when its whole group is told to stop: the trainer ends it, after saving."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Feed:
    """The batches of a data set for one of several processes.

    Args:
        dataset: has a length; its `epoch`, if it has one, is set before each pass.
        config: batch size, seed and workers.
        sampling: order of the examples.
        batch_size: examples in this process's part of a batch.
        count_fn: `batch -> number of targets that count`; it gets the batch on the CPU.
        collate_fn: makes a batch from a list of examples; torch's default when None.
        processes: who shares the batches.
        pinned: put batches into page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        config: TrainerConfig,
        sampling: str,
        batch_size: int,
        *,
        count_fn: Callable[[Any], int],
        collate_fn: Callable[[list[Any]], Any] | None,
        processes: Processes,
        pinned: bool,
    ) -> None:
        """Build order and loader; nothing is loaded yet."""
        size = len(dataset)  # type: ignore[arg-type]
        sharing = {"rank": processes.rank, "world_size": processes.world_size}
        self.dataset, self.count_fn = dataset, count_fn
        self.order = BatchOrder(size, batch_size, config.seed, sampling, **sharing)
        # torch's global generator is left to dropout, or the data order would change its numbers
        self._generator = torch.Generator()
        self._seed = config.seed
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=config.num_workers,
            collate_fn=collate_fn,
            pin_memory=pinned,
            generator=self._generator,
            batch_sampler=self.order,
            worker_init_fn=_leave_signals_to_the_trainer,
        )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.order)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from the one with the number `start` on."""
        self.order.epoch, self.order.start = epoch, start
        if hasattr(self.dataset, "epoch"):
            # before workers get their copies
            self.dataset.epoch = epoch
        # workers are seeded from it: the same in every epoch's repetition, whatever came before
        self._generator.manual_seed((self._seed + epoch) % 2**63)
        loaded = iter(self._loader)
        try:
            for data in loaded:
                indices, counts = self.order.given.popleft()
                yield Batch(data, self.count_fn(data) if counts else 0, indices)
        finally:
            # the last reference: workers end here, not whenever an exception's traceback goes
            del loaded

    def groups(self, epoch: int, start: int, size: int) -> Iterator[list[Batch]]:
        """Yield the batches of each optimizer step, `size` of them; at the end of an epoch perhaps fewer."""
        batches = self.batches(epoch, start)
        try:
            while group := list(itertools.islice(batches, size)):
                yield group
        finally:
            batches.close()  # type: ignore[attr-defined]

    def sources(self, indices: list[int]) -> list[str]:
        """Return where examples come from, `file:line`, or their numbers where the data set does not say."""
        source = getattr(self.dataset, "source", None)
        if source is None:
            return [f"example {index}" for index in indices]
        return [str(source(index)) for index in indices]
