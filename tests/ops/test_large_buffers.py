"""Memory for large results: what it is, when it is used again, and when it is not."""

import gc

import numpy as np
import pytest
import torch

from nlpfast.ops import large_buffers
from nlpfast.testing import poison

LARGE = large_buffers.SMALLEST // 4


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_buffers, "_free", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype(dtype: torch.dtype) -> None:
    x = large_buffers.empty((LARGE // 8, 2, 8), dtype)
    assert x.shape == (LARGE // 8, 2, 8) and x.dtype == dtype and x.is_contiguous()
    x.fill_(1.0)
    assert x.sum(dtype=torch.float64) == x.numel()


def test_memory_is_used_again_when_the_last_tensor_has_gone() -> None:
    first = large_buffers.empty((LARGE,), torch.float32)
    address, view = first.data_ptr(), first[3:]
    del first
    second = large_buffers.empty((LARGE,), torch.float32)
    assert second.data_ptr() != address
    view.fill_(2.0)
    assert (view == 2.0).all()
    del view
    assert large_buffers.empty((LARGE,), torch.float32).data_ptr() == address


def test_autograd_keeps_what_it_needs() -> None:
    x = large_buffers.empty((LARGE,), torch.float32).fill_(3.0).requires_grad_()
    y = x * x
    del x
    others = [large_buffers.empty((LARGE,), torch.float32).fill_(5.0) for _ in range(3)]
    y.sum().backward()
    assert len({t.data_ptr() for t in others}) == 3


def test_small_and_poisoned_memory_is_pytorchs() -> None:
    assert large_buffers.empty((LARGE - 1,), torch.float32).untyped_storage().resizable()
    assert not large_buffers.empty((LARGE,), torch.float32).untyped_storage().resizable()
    with poison():
        assert large_buffers.empty((LARGE,), torch.float32).isnan().all()


def test_little_is_kept_and_what_was_kept_longest_goes_first() -> None:
    for _ in range(3):
        tensors = [large_buffers.empty((LARGE,), torch.float32) for _ in range(5)]
    del tensors
    assert len(large_buffers._free) == large_buffers._KEPT
    kept = list(large_buffers._free)
    large = large_buffers.empty((4 * LARGE,), torch.float32)
    assert large_buffers._free == kept
    # more than twice the size would be a waste
    address = large.data_ptr()
    del large
    assert large_buffers._free[:-1] == kept[1:]
    held = [large_buffers.empty((LARGE,), torch.float32) for _ in range(4)]
    assert address not in {x.data_ptr() for x in held}
    assert large_buffers.empty((2 * LARGE,), torch.float32).data_ptr() == address


def test_arrays_of_numpy_keep_the_memory_too() -> None:
    x = large_buffers.empty((LARGE,), torch.float32).fill_(7.0)
    array = x.numpy()
    del x
    gc.collect()
    assert large_buffers._free == []
    assert (np.asarray(array) == 7.0).all()
