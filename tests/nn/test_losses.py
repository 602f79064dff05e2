"""nlpfast.nn.CrossEntropyLoss against torch.nn.CrossEntropyLoss."""

import pytest
import torch
from torch import nn

from nlpfast.nn import CrossEntropyLoss, losses


def pair(**options):
    return nn.CrossEntropyLoss(**options), CrossEntropyLoss(**options)


def assert_equal(theirs, ours, x, target):
    results = []
    for module in (ours, theirs):
        loss = module(x, target)
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5))
        results.append((loss, torch.autograd.grad(loss, x, upstream)[0]))
    for mine, other in zip(*results, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (4, 7, 3), (2, 7, 3, 5), (0, 7)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_shapes_are_those_of_torch(monkeypatch, shape, reduction, label_smoothing):
    theirs, ours = pair(reduction=reduction, label_smoothing=label_smoothing, ignore_index=2)
    x = torch.randn(shape, requires_grad=True)
    target = torch.randint(7, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    if target.ndim == 0:
        target.fill_(3)
    calls, op = [], losses.cross_entropy
    monkeypatch.setattr(losses, "cross_entropy", lambda *a, **k: calls.append(1) or op(*a, **k))
    if x.numel() == 0 and reduction == "mean":
        assert ours(x, target).isnan() and theirs(x, target).isnan()
    else:
        assert_equal(theirs, ours, x, target)
    assert calls == [1]


def test_weights_and_probabilities_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(losses, "cross_entropy", lambda *a, **k: pytest.fail("not served"))
    x = torch.randn(5, 7, requires_grad=True)
    weighted = pair(weight=torch.rand(7), label_smoothing=0.1)
    assert_equal(*weighted, x, torch.randint(7, (5,)))
    assert_equal(*pair(), x, torch.rand(5, 7).softmax(-1))


def test_backend_by_name():
    loss = CrossEntropyLoss()
    loss.backend = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        loss(torch.randn(2, 3), torch.tensor([0, 1]))
    assert not loss.state_dict()
