"""The order of batches: complete, repeatable, another one every epoch, and apart from torch's generator."""

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
