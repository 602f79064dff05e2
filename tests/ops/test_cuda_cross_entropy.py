"""The CUDA kernels of cross entropy, by the emulator: long rows that begin anywhere."""

import os

import pytest
import torch

from nlpfast import cross_entropy

EMULATED = True
pytestmark = pytest.mark.skipif("EMULATED_CUDA" not in os.environ, reason="make test-cuda emulates a device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [8193, 8199])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_begin_anywhere(dtype: torch.dtype, V: int, reduction: str, inplace: bool) -> None:
    """Rows at each place within 16 bytes, the gradient's at others; what lies around stays as it is."""
    rows, margin = 9, 5
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
