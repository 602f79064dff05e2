"""Cross entropy: its definitions, its error against eager PyTorch, odd rows, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nlpfast import cross_entropy
from nlpfast.testing import assert_no_worse

OP = "cross_entropy"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257, 1000, 1023, 1024, 1025, 2049, 5003]
IGNORED = -100


def rows(N: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 2.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(N, V, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(V, (N,), generator=generator)
    if N > 2:
        target[1] = IGNORED
        target[-1] = V - 1
    return x.requires_grad_(), target


def labels(
    target: Tensor, V: int, eps: float, smoothing: str, pad: int | None, ignore: int = IGNORED
) -> Tensor:
    """The distribution q of every row, as published; rows of zeros where the target is ignored."""
    others = {"uniform": V, "fairseq": V - 1, "exclude_pad": V - 2}[smoothing]
    q = torch.full((*target.shape, V), eps / others if others > 0 else 0.0, dtype=torch.float64)
    if pad is not None:
        q[..., pad] = 0.0
    at = target.clamp(min=0).unsqueeze(-1)
    on_target = 1 - eps + (eps / V if smoothing == "uniform" else 0.0) if others > 0 else 1.0
    q.scatter_(-1, at, on_target)
    q[(target == ignore) | (target == pad if pad is not None else False)] = 0.0
    return q


def eager(
    x: Tensor, target: Tensor, eps: float, smoothing: str = "uniform", pad: int | None = None
) -> Tensor:
    """The losses of all rows, by log_softmax, in the precision of x; ignored rows may hold anything."""
    q = labels(target, x.shape[-1], eps, smoothing, pad).to(x.dtype)
    x = x.masked_fill((q == 0).all(-1, keepdim=True), 0.0)
    terms = torch.where(q == 0, 0.0, q * x.log_softmax(-1))
    return -terms.sum(-1)


def reduce(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    return {
        "none": lambda: losses,
        "sum": losses.sum,
        "mean": lambda: losses.sum() / counted.sum(),
        "sequence": lambda: losses.sum(-1),
    }[reduction]()


SMOOTHINGS = [("uniform", None), ("fairseq", None), ("exclude_pad", 3)]


@pytest.mark.parametrize(("smoothing", "pad"), SMOOTHINGS)
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence"])
def test_published_definitions(smoothing, pad, eps, reduction) -> None:
    x, target = rows(24, 11, torch.float64)
    x, target = x.detach().view(4, 6, 11).requires_grad_(), target.view(4, 6)
    options = {"label_smoothing": eps, "smoothing": smoothing, "pad_index": pad}
    found = cross_entropy(x, target, reduction=reduction, **options, backend="reference")
    counted = (target != IGNORED) & (target != (IGNORED if pad is None else pad))
    expected = reduce(eager(x, target, eps, smoothing, pad), counted, reduction)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-10
    (mine,), (other,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    assert other.abs().max() > 0
    assert (mine - other).abs().max() < 1e-10


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("ignore", [-100, 3])
def test_equals_pytorch(backend, reduction, eps, ignore) -> None:
    x, target = rows(20, 33)
    target[target == IGNORED] = ignore
    target[7] = ignore
    options = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": eps}
    found, expected = (
        cross_entropy(x, target, **options, backend=backend),
        F.cross_entropy(x, target, **options),
    )
    upstream = torch.randn(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (mine,), (other,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_fairseq_is_uniform_with_another_eps(backend) -> None:
    x, target = rows(9, 40)
    eps, V = 0.1, 40
    found = cross_entropy(
        x, target, label_smoothing=eps, smoothing="fairseq", reduction="none", backend=backend
    )
    other = cross_entropy(x, target, label_smoothing=eps * V / (V - 1), reduction="none", backend=backend)
    torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("eps", "expected"), [(0.4, 2.1326), (0.0, 5.6268)])
def test_fixtures_of_joeynmt(backend, eps, expected) -> None:
    """JoeyNMT's test_loss.py; it reports the divergence from q, which is less by the entropy of q."""
    x = torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1]).log().expand(3, 2, 5)
    target = torch.tensor([[2, 1], [2, 0], [1, 0]])
    options = {"smoothing": "exclude_pad", "pad_index": 0, "label_smoothing": eps, "reduction": "sum"}
    q = labels(target, 5, eps, "exclude_pad", 0)
    entropy = -torch.special.xlogy(q, q).sum()
    assert abs((cross_entropy(x, target, **options, backend=backend) - entropy).item() - expected) < 5e-5


@pytest.mark.parametrize("V", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("smoothing", "pad", "eps"), [("uniform", None, 0.1), ("exclude_pad", 0, 0.2), ("uniform", None, 0.0)]
)
def test_no_worse_than_eager(backend, V, dtype, smoothing, pad, eps) -> None:
    x, target = rows(18, V, dtype)
    target = target if pad is None else target.where(target != pad, IGNORED)
    options = {"label_smoothing": eps, "smoothing": smoothing, "pad_index": pad, "reduction": "none"}
    upstream = torch.randn(18)
    results = []
    for kind in ("ours", dtype, torch.float64):
        y = x.detach().to(x.dtype if kind == "ours" else kind).requires_grad_()
        if kind == "ours":
            loss = cross_entropy(y, target, **options, backend=backend)
        else:
            # as PyTorch computes 16-bit losses: in float32, rounded at the end
            wide = y if kind == torch.float64 else y.float()
            loss = eager(wide, target, eps, smoothing, pad)
        (grad,) = torch.autograd.grad(loss, y, upstream.to(loss.dtype))
        results.append((loss.detach().unsqueeze(-1), grad))
    (ours, grad), (theirs, theirs_grad), (exact, exact_grad) = results
    assert ours.dtype == torch.float32 and grad.dtype == dtype
    size = exact.abs() + x.detach().double().abs().amax(-1, keepdim=True)
    assert_no_worse("loss", ours, theirs, exact, factor=1.0, size=size)
    assert_no_worse("gradient", grad, theirs_grad, exact_grad, factor=1.5)


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 100.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_confident_rows_keep_their_digits(backend, gap, eps, reduction) -> None:
    """At the target softmax - q is a difference of nearly equal numbers, and nll the log of one near 1."""
    x, target = rows(6, 301, scale=1.0)
    target[1] = 4
    x = x.detach() - gap
    x.scatter_(1, target.unsqueeze(1), 0.25)
    exact = x.double().requires_grad_()
    x.requires_grad_()
    options = {"label_smoothing": eps, "reduction": reduction}
    found, nll, _ = cross_entropy(x, target, **options, return_nll=True, backend=backend)
    with torch.no_grad():
        others = (
            (exact - exact.gather(1, target.unsqueeze(1))).exp().scatter(1, target.unsqueeze(1), 0.0).sum(1)
        )
        expected = torch.log1p(others)
    torch.testing.assert_close(nll.double().sum(), expected.sum(), rtol=1e-6, atol=1e-38)
    (mine,) = torch.autograd.grad(found.sum(), x)
    at = mine.gather(1, target.unsqueeze(1)).squeeze(1).double()
    on_target = 1 - eps + eps / 301
    torch.testing.assert_close(at, (1 - on_target) - others / (1 + others), rtol=2e-6, atol=1e-38)


def test_correct_predictions_are_those_of_argmax(backend) -> None:
    torch.manual_seed(3)
    x = torch.randint(0, 4, (120, 6)).float()
    target = torch.randint(6, (120,))
    target[::7] = IGNORED
    expected = (x.argmax(-1) == target) & (target != IGNORED)
    assert 0 < expected.sum() < 120
    for reduction in ("mean", "sum", "none", "sequence"):
        x_, target_ = (x.view(8, 15, 6), target.view(8, 15)) if reduction == "sequence" else (x, target)
        loss, nll, correct = cross_entropy(
            x_, target_, label_smoothing=0.3, reduction=reduction, return_nll=True, backend=backend
        )
        plain = cross_entropy(x_, target_, reduction=reduction, backend=backend)
        torch.testing.assert_close(nll, plain)
        assert not torch.equal(loss, nll)
        counts = expected.view(target_.shape)
        wanted = {"none": counts.long(), "sequence": counts.sum(-1)}.get(reduction, counts.sum())
        assert correct.dtype == torch.int64
        assert torch.equal(correct, wanted)


def test_nll_and_counts_are_not_differentiable(backend) -> None:
    x, target = rows(5, 7)
    loss, nll, correct = cross_entropy(x, target, return_nll=True, backend=backend)
    assert loss.requires_grad and not nll.requires_grad and not correct.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_may_hold_anything(backend, dtype, reduction) -> None:
    x, target = rows(6, 37, dtype)
    expected = cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, backend=backend)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    spoilt = x.detach().clone()
    spoilt[1] = math.nan
    spoilt.requires_grad_()
    found = cross_entropy(spoilt, target, reduction=reduction, label_smoothing=0.1, backend=backend)
    assert torch.equal(found, expected)
    (mine,) = torch.autograd.grad(found.sum(), spoilt)
    assert torch.equal(mine, grad)
    assert (mine[1] == 0).all()


def test_all_rows_ignored(backend) -> None:
    x, _ = rows(4, 9)
    target = torch.full((4,), IGNORED)
    assert cross_entropy(x, target, reduction="sum", backend=backend) == 0
    mean = cross_entropy(x, target, backend=backend)
    assert mean.isnan() and F.cross_entropy(x, target).isnan()
    assert (torch.autograd.grad(mean, x)[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5), (2, 3, 4, 5), (5,)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_shapes(backend, shape, reduction) -> None:
    x = torch.randn(shape, requires_grad=True)
    target = torch.randint(5, shape[:-1])
    found = cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, backend=backend)
    flat = F.cross_entropy(x.reshape(-1, 5), target.reshape(-1), reduction=reduction, label_smoothing=0.1)
    expected = flat.view(shape[:-1]) if reduction == "none" else flat
    torch.testing.assert_close(found, expected, equal_nan=True)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize(
    "kind", ["one -inf", "target -inf", "all -inf", "one inf", "target inf", "nan", "first block -inf"]
)
def test_infinite_logits_give_what_pytorch_gives(backend, kind, eps) -> None:
    x, target = rows(3, 2500)
    target[1] = 7
    x = x.detach()
    column = {"target -inf": int(target[0]), "target inf": int(target[0])}.get(kind, 40)
    if kind == "all -inf":
        x[0] = -math.inf
    elif kind == "first block -inf":
        x[0, :1500] = -math.inf
        target[0] = 2000
    else:
        x[0, column] = {"one inf": math.inf, "target inf": math.inf, "nan": math.nan}.get(kind, -math.inf)
    x.requires_grad_()
    options = {"label_smoothing": eps, "reduction": "none"}
    found, expected = (
        cross_entropy(x, target, **options, backend=backend),
        F.cross_entropy(x, target, **options),
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    if kind in ("one -inf", "first block -inf"):
        (mine,), (other,) = (torch.autograd.grad(y.sum(), x) for y in (found, expected))
        if eps == 0.0:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
        assert torch.isfinite(mine).all()


def test_padding_column_of_minus_infinity(backend) -> None:
    """The class without mass may be masked out: its logit is in no sum of the loss."""
    x, target = rows(5, 50)
    target[1] = 4
    target = target.where(target != 3, 4)
    x = x.detach()
    x[:, 3] = -math.inf
    x.requires_grad_()
    loss = cross_entropy(
        x, target, smoothing="exclude_pad", pad_index=3, label_smoothing=0.1, backend=backend
    )
    assert torch.isfinite(loss)
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(grad).all() and (grad[:, 3] == 0).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.zeros(())}, ValueError, r"input has the shape \[\]; it must be \[..., V\]"),
        ({"input": torch.zeros(3, 0)}, ValueError, r"input has the shape \[3, 0\]"),
        ({"input": torch.zeros(3, 4).int()}, TypeError, r"input has the dtype torch\.int32"),
        (
            {"target": torch.zeros(3)},
            TypeError,
            r"target has the dtype torch\.float32; .* F\.cross_entropy for prob",
        ),
        ({"target": torch.zeros(4).long()}, ValueError, r"target has the shape \[4\]; it must be .*\[3\]"),
        ({"target": torch.zeros(3, device="meta").long()}, ValueError, "target is on meta and input on cpu"),
        ({"target": torch.tensor([0, 4, 1])}, ValueError, r"target\[1\] is 4; it must be a class, 0\.\.3"),
        ({"target": torch.tensor([0, 1, -1])}, ValueError, r"target\[2\] is -1; .*ignore_index=-100"),
        ({"reduction": "median"}, ValueError, "reduction is 'median'"),
        ({"smoothing": "rough"}, ValueError, "smoothing is 'rough'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing is 1\.5; it must lie in 0\.\.1"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing is nan"),
        ({"smoothing": "exclude_pad"}, ValueError, "pad_index is None and smoothing 'exclude_pad'"),
        ({"pad_index": 1}, ValueError, "pad_index is 1 and smoothing 'uniform'"),
        ({"pad_index": 4, "smoothing": "exclude_pad"}, ValueError, r"pad_index is 4; it must lie in 0\.\.3"),
        ({"backend": "abacus"}, ValueError, "abacus"),
        (
            {
                "input": torch.zeros(1, 1, 3, 4),
                "target": torch.zeros(1, 1, 3).long(),
                "reduction": "sequence",
            },
            ValueError,
            "reduction='sequence' takes",
        ),
    ],
)
def test_errors_name_the_argument(changes, error, message) -> None:
    arguments = {"input": torch.zeros(3, 4), "target": torch.zeros(3).long(), **changes}
    with pytest.raises(error, match=message):
        cross_entropy(**arguments)


def test_float64_goes_to_the_definition_and_not_to_the_kernels() -> None:
    x, target = rows(3, 5, torch.float64)
    assert cross_entropy(x, target).dtype == torch.float64
    with pytest.raises(RuntimeError, match="computes in float32, bfloat16 and float16"):
        cross_entropy(x, target, backend="cpu")


@pytest.mark.parametrize(("smoothing", "pad"), SMOOTHINGS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sequence"])
def test_gradcheck_of_the_definition(smoothing, pad, reduction) -> None:
    x, target = rows(6, 7, torch.float64)

    def call(x: Tensor) -> Tensor:
        options = {"smoothing": smoothing, "pad_index": pad, "label_smoothing": 0.2, "reduction": reduction}
        return cross_entropy(x.view(2, 3, 7), target.view(2, 3), **options, backend="reference")

    assert torch.autograd.gradcheck(call, (x,))
