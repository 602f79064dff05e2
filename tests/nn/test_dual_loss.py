"""The loss of dual supervised learning: its gradients are those of the two written losses."""

import pytest
import torch
from torch import Tensor

from nlpfast.nn.dual_loss import dual_supervised_loss

LAMBDA = 0.03


def values() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    a, b, lx, ly = -20 * torch.rand(4, 5, dtype=torch.float64) - 1
    return a.requires_grad_(), b.requires_grad_(), lx, ly


def test_a_worked_example() -> None:
    # Delta = (-10 - 3) - (-12 - 4) = 3; with lambda 0.01: 3 + 0.09, 4 + 0.09
    parts = [torch.tensor([value]) for value in (-3.0, -4.0, -10.0, -12.0)]
    found = dual_supervised_loss(*parts, 0.01)
    assert found.gap.item() == pytest.approx(3.0)
    assert found.forward.item() == pytest.approx(3.09) and found.backward.item() == pytest.approx(4.09)


def test_gradients_of_each_loss_alone() -> None:
    a, b, lx, ly = values()
    found = dual_supervised_loss(a, b, lx, ly, LAMBDA)
    written = -a + LAMBDA * ((lx + a) - (ly + b.detach())) ** 2
    opposite = -b + LAMBDA * ((lx + a.detach()) - (ly + b)) ** 2
    torch.testing.assert_close(found.forward, written, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.backward, opposite, rtol=0, atol=1e-12)
    delta = ((lx + a) - (ly + b)).detach()
    torch.testing.assert_close(found.gap, delta, rtol=0, atol=0)
    assert not found.gap.requires_grad
    da, db = torch.autograd.grad((found.forward + found.backward).sum(), (a, b))
    torch.testing.assert_close(da, -1 + 2 * LAMBDA * delta, rtol=0, atol=1e-12)
    torch.testing.assert_close(db, -1 - 2 * LAMBDA * delta, rtol=0, atol=1e-12)
    assert torch.autograd.grad(written.sum(), b, allow_unused=True)[0] is None


def test_without_detach_the_weights_are_others() -> None:
    a, b, lx, ly = values()
    found = dual_supervised_loss(a, b, lx, ly, LAMBDA, detach=False)
    da, db = torch.autograd.grad((found.forward + found.backward).sum(), (a, b))
    torch.testing.assert_close(da, -1 + 4 * LAMBDA * found.gap, rtol=0, atol=1e-12)
    torch.testing.assert_close(db, -1 - 4 * LAMBDA * found.gap, rtol=0, atol=1e-12)


def test_of_a_token() -> None:
    a, b, lx, ly = values()
    n, m = torch.tensor([3, 1, 7, 2, 9]), torch.tensor([4, 2, 5, 2, 6])
    found = dual_supervised_loss(a, b, lx, ly, LAMBDA, source_tokens=n, target_tokens=m)
    delta = ((lx / n + a / m) - (ly / m + b / n)).detach()
    torch.testing.assert_close(found.gap, delta, rtol=0, atol=1e-12)
    da, db = torch.autograd.grad((found.forward + found.backward).sum(), (a, b))
    torch.testing.assert_close(da, -1 + 2 * LAMBDA * delta / m, rtol=0, atol=1e-12)
    torch.testing.assert_close(db, -1 - 2 * LAMBDA * delta / n, rtol=0, atol=1e-12)


def test_wrong_arguments() -> None:
    a, b, lx, ly = (part.detach() for part in values())
    with pytest.raises(ValueError, match="log-probabilities are \\[B\\]; pass one for each pair"):
        dual_supervised_loss(a, b[:2], lx, ly, LAMBDA)
    with pytest.raises(ValueError, match="pass one for each pair"):
        dual_supervised_loss(*(part[None] for part in (a, b, lx, ly)), LAMBDA)
    with pytest.raises(ValueError, match="dsl_lambda=-1 must be >= 0"):
        dual_supervised_loss(a, b, lx, ly, -1)
    with pytest.raises(ValueError, match="source_tokens and target_tokens go together"):
        dual_supervised_loss(a, b, lx, ly, LAMBDA, source_tokens=torch.ones(5))
