"""What is minimised: the mean loss of a batch, how many targets that is a mean of, and that of a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlpfast.train.distributed import Processes
from nlpfast.train.feed import Batch


def model_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the loss of a model that is called as `model(*batch)` and returns `(logits, loss)`.

    Args:
        model: the model.
        batch: inputs and targets, on the model's device.
    """
    loss: Tensor = model(*batch)[1]
    return loss


def loss_alone(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the loss of a model that can leave out the logits, such as GPT: it never has all of them.

    Args:
        model: is called as `model(*batch, return_logits=False)`.
        batch: inputs and targets, on the model's device.
    """
    loss: Tensor = model(*batch, return_logits=False)[1]
    return loss


def count_targets(batch: Sequence[Tensor]) -> int:
    """Return how many entries of `batch[1]`, the targets, are not -100.

    Args:
        batch: inputs and targets.
    """
    return int((batch[1] != -100).sum())


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Have the model in evaluation mode, and no gradients, until the `with` block ends.

    Args:
        model: its mode is as before afterwards.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def mean_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_of: Callable[[Any], Tensor],
    processes: Processes,
) -> tuple[float, int]:
    """Return the mean loss over all targets that count, and their number, with the model in evaluation mode.

    The mean is NaN when no target counts. The model's mode is as before afterwards.

    Args:
        model: is put into evaluation mode.
        batches: this process's parts; as many in each process.
        loss_of: mean loss of a batch's data, a scalar tensor.
        processes: who shares the data.
    """
    total: float | Tensor = 0.0
    targets = 0
    with evaluation_mode(model):
        for batch in batches:
            # the mean over no target is NaN, and stays so with weight 0; processes compute together
            if batch.count or processes.world_size > 1:
                loss = loss_of(batch.data).double()
            if batch.count:
                total = total + loss * batch.count
                targets += batch.count
    loss_sum, count = processes.sum([float(total), targets])
    return (loss_sum / count if count else float("nan")), int(count)
