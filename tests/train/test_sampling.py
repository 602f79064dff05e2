"""The order of batches: complete, repeatable, another one every epoch, and apart from torch's generator."""

import numpy as np
import pytest
import torch

from nlpfast.train.sampling import BatchOrder


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (10, 3), (12, 4), (5, 100)])
def test_shuffling_gives_every_example_once(size, batch):
    order = BatchOrder(size, batch, seed=3)
    batches = list(order)
    assert sorted(index for part in batches for index in part) == list(range(size))
    assert len(batches) == len(order)
    assert all(len(part) == batch for part in batches[:-1])


@pytest.mark.parametrize("sampling", ["shuffle", "replacement"])
def test_same_seed_same_order_other_epoch_other_order(sampling):
    first, second = (BatchOrder(50, 7, seed=1, sampling=sampling) for _ in range(2))
    assert list(first) == list(second) == list(first)
    second.epoch = 1
    assert list(first) != list(second)
    assert list(first) != list(BatchOrder(50, 7, seed=2, sampling=sampling))
    assert list(second) != list(BatchOrder(50, 7, seed=2, sampling=sampling))


def test_replacement_repeats_examples_within_the_range():
    draws = [index for batch in BatchOrder(10, 5, seed=0, sampling="replacement") for index in batch]
    draws += [index for batch in BatchOrder(10, 5, seed=1, sampling="replacement") for index in batch]
    assert set(draws) <= set(range(10))
    assert len(draws) == 20


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(BatchOrder(100, 8, seed=0))
    list(BatchOrder(100, 8, seed=0, sampling="replacement"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampling", ["shuffle", "replacement"])
def test_a_million_examples_never_become_python_integers_at_once(sampling, monkeypatch):
    tolist, sizes = torch.Tensor.tolist, []

    def recording_tolist(tensor):
        sizes.append(tensor.numel())
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", recording_tolist)
    batches = iter(BatchOrder(1_000_000, 12, seed=0, sampling=sampling))
    assert all(len(next(batches)) == 12 for _ in range(3))
    assert sizes == [12, 12, 12]


@pytest.mark.parametrize(
    ("values", "message"),
    [((0, 1, 0), "size=0"), ((1, 0, 0), "batch_size=0"), ((1, 1, 0, "sorted"), "sampling='sorted'")],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        BatchOrder(*values)


@pytest.mark.parametrize("sampling", ["shuffle", "replacement", "sequential"])
@pytest.mark.parametrize("largest", [0, 2**24])
def test_an_epoch_goes_on_from_any_batch(sampling, largest, monkeypatch):
    monkeypatch.setattr("nlpfast.train.sampling.LARGEST_DRAWN", largest)
    order = BatchOrder(53, 7, seed=2, sampling=sampling)
    order.epoch = 3
    whole = list(order)
    for start in range(len(order) + 1):
        order.start = start
        assert list(order) == whole[start:]
    assert list(order) == whole, "only once"


@pytest.mark.parametrize("sampling", ["shuffle", "replacement", "sequential"])
@pytest.mark.parametrize(("size", "batch"), [(53, 3), (48, 4), (5, 2), (1, 1)])
def test_processes_share_the_batches_of_one(sampling, size, batch):
    whole = list(BatchOrder(size, 2 * batch, seed=2, sampling=sampling))
    shares = [BatchOrder(size, batch, 2, sampling, rank=rank, world_size=2) for rank in (0, 1)]
    for together, *parts in zip(whole, *shares, strict=True):
        counted = [order.given.popleft() for order in shares]
        assert [indices for indices, _ in counted] == parts
        assert [i for indices, counts in counted if counts for i in indices] == together
        # every process has something to compute with
        assert all(parts)


def test_large_data_sets_are_permuted_without_a_permutation(monkeypatch):
    monkeypatch.setattr("nlpfast.train.sampling.LARGEST_DRAWN", 0)
    test_shuffling_gives_every_example_once(1000, 7)
    test_same_seed_same_order_other_epoch_other_order("shuffle")
    drawn = np.array([i for part in BatchOrder(4096, 64, seed=0) for i in part])
    # each place gets each example equally often, and neighbours have nothing to do with each other
    assert abs(np.corrcoef(drawn, np.arange(4096))[0, 1]) < 0.06
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06
    first = [next(iter(BatchOrder(100, 1, seed=seed)))[0] for seed in range(3000)]
    counts = np.bincount(first, minlength=100)
    assert ((counts - 30) ** 2 / 30).sum() < 160, "chi-squared with 99 degrees of freedom, 1 in 10,000"
    order = BatchOrder(10**15, 5, seed=0)
    assert len(set(next(iter(order)))) == 5
