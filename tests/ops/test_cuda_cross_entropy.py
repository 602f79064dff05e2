"""The CUDA kernels of cross entropy, by the emulator: rows that begin anywhere."""

import os

import pytest
import torch

from nlpfast import cross_entropy

EMULATED = True
pytestmark = pytest.mark.skipif("EMULATED_CUDA" not in os.environ, reason="make test-cuda emulates a device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [4, 5, 1017, 1024, 2048, 4089, 4096, 8193, 16384])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_begin_anywhere(dtype: torch.dtype, V: int, reduction: str, inplace: bool) -> None:
    """Rows at each place within 16 bytes, the gradient's at others; what lies around stays as it is.

    Where V is a multiple of 16 bytes those that lie together begin at such, and give the same bits.
    """
    compare(dtype, V, reduction, inplace, rows=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_rows_that_a_block_does_not_hold(dtype: torch.dtype, reduction: str) -> None:
    """They are read twice, and written in several rounds."""
    compare(dtype, 65537 if dtype == torch.bfloat16 else 32769, reduction, inplace=True, rows=3)


def compare(dtype: torch.dtype, V: int, reduction: str, inplace: bool, rows: int) -> None:
    """Losses and gradients beside those in float64, and of rows elsewhere in memory."""
    margin = 5
    generator = torch.Generator().manual_seed(V)
    x = torch.randn(rows, V, generator=generator).to(dtype)
    target = torch.randint(V, (rows,), generator=generator)
    # the last class, one in the first 16 bytes, and a row that does not count
    target[0], target[1], target[2] = V - 1, 3, -100
    upstream = torch.linspace(0.5, 2.0, rows) if reduction == "none" else torch.tensor(2.0)

    def results(logits: torch.Tensor, backend: str) -> list[torch.Tensor]:
        leaf = logits.detach().requires_grad_()
        # a gradient takes the place of what is no leaf
        given = leaf.view_as(leaf) if inplace else leaf
        loss = cross_entropy(
            given, target, reduction=reduction, label_smoothing=0.1, inplace=inplace, backend=backend
        )
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        return [loss.detach(), gradient]

    exact = results(x.double(), "reference")
    found = results(x.clone(), "cuda")
    for shift in (0, 3):
        around = torch.full((rows, V + 2 * margin), 77.0, dtype=dtype).flatten()
        lying = around[shift : shift + rows * (V + margin)].view(rows, V + margin)[:, :V]
        lying.copy_(x)
        for ours, once, right in zip(results(lying, "cuda"), found, exact, strict=True):
            assert torch.equal(ours, once)
            bound = 4 * torch.finfo(ours.dtype).eps * right.abs().max() + 1e-7
            assert (ours.double() - right).abs().max() <= bound
        beside = around[shift : shift + rows * (V + margin)].view(rows, V + margin)[:, V:]
        assert (beside == 77).all() and (around[:shift] == 77).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [0.0, 1e3, 123456.7, 1.07e9, 1.08e9, 1e20, 3.4e38])
@pytest.mark.parametrize("V", [40, 33000])
def test_logits_of_any_size(size: float, sign: int, V: int) -> None:
    """All close to one number: an exponential's base is rounded, and that is made up for."""
    generator = torch.Generator().manual_seed(V)
    base = torch.tensor(sign * size)
    # as far apart as floats are, and by numbers around 1 where they lie closer
    ulp = (torch.nextafter(base, torch.tensor(0.0)) - base).abs()
    steps = torch.randint(8, (2, V), generator=generator) * max(ulp.item(), 0.25)
    # towards 0, where there is still something
    x = base - sign * steps
    target = torch.randint(V, (2,), generator=generator)
    found = []
    for logits, backend in ((x, "cuda"), (x.double(), "reference")):
        leaf = logits.requires_grad_()
        loss = cross_entropy(leaf, target, reduction="none", backend=backend)
        found.append((loss.detach().double(), *torch.autograd.grad(loss.sum(), leaf)))
    (ours, gradient), (exact, slope) = found
    assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-6)
    assert (gradient.double() - slope).abs().max() <= 1e-6
