"""Batches from any place of any epoch: the same whatever came before, and what they are named by."""

import pytest
import torch
from torch.utils.data import Dataset
from toys import Sentences, config

from nlpfast.train.distributed import Processes
from nlpfast.train.feed import Feed
from nlpfast.train.objective import count_targets


class Noise(Dataset):
    """Loading draws random numbers."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.rand(2), torch.tensor([index, -100])


def feed(dataset, workers=0):
    settings = config(num_workers=workers, batch_size=2, seed=3)
    options = {"count_fn": count_targets, "collate_fn": None, "processes": Processes(), "pinned": False}
    return Feed(dataset, settings, "shuffle", 2, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_does_not_depend_on_what_came_before(workers):
    first, second = feed(Noise(), workers), feed(Noise(), workers)
    epochs = []
    for batches in (first.batches(0), first.batches(1), second.batches(1)):
        torch.manual_seed(0)
        epochs.append([(batch.data[0].tolist(), batch.indices) for batch in batches])
    assert epochs[1] == epochs[2]
    assert epochs[0] != epochs[1]
    if workers:
        # in processes of their own, not by the seed above
        assert epochs[0][0][0] != epochs[1][0][0]


def test_batches_are_counted_and_named():
    data = Sentences(7, empty=(0, 1, 2, 3, 4, 5))
    found = list(feed(data).batches(2, 1))
    assert [len(batch.indices) for batch in found] == [2, 2, 1]
    for batch in found:
        assert batch.count == int(data.counts[batch.indices].sum())
        assert torch.equal(batch.data[0], data.tokens[batch.indices, :-1])
    assert feed(data).sources([4, 2]) == ["example 4", "example 2"]


def test_groups_of_a_step():
    sizes = [[len(batch.indices) for batch in group] for group in feed(Noise()).groups(0, 0, 3)]
    assert sizes == [[2, 2, 2], [1]]
    assert [len(group) for group in feed(Noise()).groups(0, 2, 3)] == [2]
