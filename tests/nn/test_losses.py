"""nlpfast.nn.CrossEntropyLoss against torch's class, LabelSmoothedCrossEntropy against fairseq's recipe."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nlpfast import attention
from nlpfast.nn import (
    CrossEntropyLoss,
    LabelSmoothedCrossEntropy,
    LabelSmoothedCrossEntropyWithAlignment,
    losses,
)


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


def recipe(logits, target, eps, ignore_index):
    """Loss and nll, summed, as fairseq's criterion is published to compute them."""
    logp = F.log_softmax(logits, -1)
    kept = target != ignore_index
    nll = -logp[kept].gather(-1, target[kept].unsqueeze(-1)).sum()
    share = eps / (logits.shape[-1] - 1)
    return (1 - eps - share) * nll - share * logp[kept].sum(), nll


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_recipe_of_fairseq(projected, reduction):
    rows, weight, bias = torch.randn(3, 5, 8), torch.randn(11, 8), torch.randn(11)
    tensors = [x.requires_grad_() for x in (rows, weight, bias)]
    target = torch.randint(2, 11, (3, 5))
    target[1, 2:] = 1
    loss = LabelSmoothedCrossEntropy(0.2, ignore_index=1, reduction=reduction)
    logits = F.linear(*tensors)
    arguments = (rows, target, weight, bias) if projected else (logits, target)
    found, nll, correct = loss(*arguments, return_nll=True)
    count = (target != 1).sum() if reduction == "mean" else 1
    expected, expected_nll = (x / count for x in recipe(logits, target, 0.2, 1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(nll, expected_nll)
    assert correct == ((logits.argmax(-1) == target) & (target != 1)).sum()
    assert torch.equal(loss(*arguments), found)
    grads = (torch.autograd.grad(x, tensors, retain_graph=True) for x in (found, expected))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_attributes_are_those_of_the_functions(monkeypatch):
    seen = []
    monkeypatch.setattr(losses, "cross_entropy", lambda *a, **k: seen.append(k))
    monkeypatch.setattr(losses, "linear_cross_entropy", lambda *a, **k: seen.append(k))
    options = {"smoothing": "exclude_pad", "ignore_index": 7, "pad_index": 0, "reduction": "sequence"}
    loss = LabelSmoothedCrossEntropy(0.3, **options)
    loss.backend = "reference"
    x, target = torch.randn(2, 3, 4), torch.zeros(2, 3).long()
    loss(x, target)
    loss(x, target, torch.randn(4, 4), return_nll=True)
    expected = {"label_smoothing": 0.3, **options, "backend": "reference"}
    assert seen[0] == {**expected, "return_nll": False}
    assert seen[1] == {**expected, "return_nll": True, "linear_bias": None}
    with pytest.raises(ValueError, match="linear_bias is given without linear_weight"):
        loss(x, target, linear_bias=torch.zeros(4))
    assert repr(loss) == (
        "LabelSmoothedCrossEntropy(label_smoothing=0.3, smoothing='exclude_pad', ignore_index=7, "
        "pad_index=0, reduction='sequence')"
    )


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("heads", [None, 1])
def test_criterion_with_alignment(shift, heads):
    B, H, T, S, D, V = 2, 3, 5, 6, 4, 11
    q, k, v = (torch.randn(B, H, n, D, requires_grad=True) for n in (T, S, S))
    logits, target = torch.randn(B, T, V, requires_grad=True), torch.randint(2, V, (B, T))
    target[1, 4:] = 1
    # target word 2 of the first sentence has two links
    pairs = torch.tensor([[0, 2, 5], [0, 2, 1], [0, 3, 0], [1, 1, 2]])
    loss = LabelSmoothedCrossEntropyWithAlignment(0.1, 0.3, align_shift=shift, ignore_index=1)
    _, lse = attention(q, k, v, return_lse=True)
    found = loss(logits, target, pairs=pairs, query=q, key=k, lse=lse, heads=heads)
    p = (q @ k.mT / D**0.5).softmax(-1)[:, : H if heads is None else heads].mean(1)
    weights = torch.tensor([0.5, 0.5, 1.0, 1.0])
    alignment = -(weights * p[pairs[:, 0], pairs[:, 1] + shift, pairs[:, 2]].log()).sum()
    smoothed, nll = recipe(logits, target, 0.1, 1)
    torch.testing.assert_close(found.loss, smoothed + 0.3 * alignment)
    assert found.sample_size == (target != 1).sum()
    for name, value in (("loss", smoothed), ("nll", nll), ("alignment", alignment)):
        torch.testing.assert_close(found.logged[name], value.detach())
        assert not found.logged[name].requires_grad
    assert found.logged["correct"] == ((logits.argmax(-1) == target) & (target != 1)).sum()
    grads = (torch.autograd.grad(x, (logits, q, k)) for x in (found.loss, smoothed + 0.3 * alignment))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_criterion_of_a_batch_without_alignments():
    logits, target = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    loss = LabelSmoothedCrossEntropyWithAlignment(0.1)
    found = loss(logits, target)
    torch.testing.assert_close(found.loss, recipe(logits, target, 0.1, -100)[0])
    assert found.logged["alignment"] == 0
    with pytest.raises(ValueError, match="pairs is given without query, key and lse"):
        loss(logits, target, pairs=torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match="align_shift is 2"):
        LabelSmoothedCrossEntropyWithAlignment(align_shift=2)
