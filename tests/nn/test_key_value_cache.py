"""Keys and values of one layer: what is seen after every step is what came, as far as there is room."""

import pytest
import torch

from nlpfast.nn.key_value_cache import KeyValueCache

B, H, D = 3, 2, 4


def drawn(count):
    """Keys, and values that tell them from the keys."""
    keys = torch.randn(B, H, count, D, dtype=torch.float64)
    return keys, -2 * keys


def assert_seen(cache, kept):
    """The cache has, of each sequence, the keys of these columns of `drawn`, in this order."""
    keys, values, lengths = cache.seen()
    assert keys.shape == values.shape == (B, H, cache.longest, D)
    assert lengths.tolist() == [expected.shape[1] for expected in kept]
    assert max(lengths.tolist()) <= cache.longest <= cache.capacity
    for b, expected in enumerate(kept):
        assert torch.equal(keys[b, :, : lengths[b]], expected)
        assert torch.equal(values[b, :, : lengths[b]], -2 * expected)


@pytest.mark.parametrize("prompts", [[3, 1, 2], [6, 1, 5], [4, 4, 4], [1, 1, 1], [5, 6, 7]], ids=str)
@pytest.mark.parametrize("capacity", [1, 4, 5, 20])
@pytest.mark.parametrize("more", [0, 3])
def test_the_first_ones_are_kept_and_later_ones_forgotten(prompts, capacity, more):
    """Rows of the prompts beyond the lengths are padding, and there may be more of it than any prompt has."""
    T, steps = max(prompts) + more, 9
    keys, values = drawn(T + steps)
    cache = KeyValueCache(capacity, torch.tensor(prompts))
    assert (cache.longest, cache.capacity) == (0, capacity)
    cache.extend(keys[:, :, :T], values[:, :, :T])
    came = [keys[b, :, : prompts[b]] for b in range(B)]
    assert_seen(cache, [x[:, :capacity] for x in came])
    for step in range(T, T + steps):
        cache.extend(keys[:, :, step : step + 1], values[:, :, step : step + 1])
        came = [torch.cat((x, keys[b, :, step : step + 1]), 1) for b, x in enumerate(came)]
        assert_seen(cache, [x[:, :capacity] for x in came])
    assert cache.longest == min(capacity, T + steps)


def test_a_full_sequence_keeps_its_bytes_while_a_short_one_still_grows():
    cache = KeyValueCache(3, torch.tensor([3, 1, 5]))
    keys, values = drawn(9)
    cache.extend(keys[:, :, :5], values[:, :, :5])
    for step in range(5, 9):
        cache.extend(keys[:, :, step:][:, :, :1], values[:, :, step:][:, :, :1])
        k, v, lengths = cache.seen()
        for b in (0, 2):
            assert torch.equal(k[b], keys[b, :, :3]) and torch.equal(v[b], values[b, :, :3])
        assert lengths.tolist() == [3, min(1 + step - 4, 3), 3]
    assert torch.equal(k[1], keys[1][:, [0, 5, 6]])


def test_what_it_was_given_is_copied():
    lengths, (keys, values) = torch.tensor([1, 2, 2]), drawn(2)
    before = keys.clone()
    cache = KeyValueCache(4, lengths)
    cache.extend(keys, values)
    cache.extend(keys[:, :, :1], values[:, :, :1])
    assert lengths.tolist() == [1, 2, 2] and torch.equal(keys, before)
    keys.zero_()
    assert torch.equal(cache.seen()[0][1], before[1][:, [0, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept(dtype):
    cache = KeyValueCache(4, torch.tensor([2, 2, 2]))
    cache.extend(*(x.to(dtype) for x in drawn(2)))
    assert [x.dtype for x in cache.seen()] == [dtype, dtype, torch.int64]
