"""Cross entropy of a projection: its definition, its error against eager PyTorch, odd rows, and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import IGNORED, SMOOTHINGS, eager, reduce
from torch import Tensor

from nlpfast import dispatch, linear_cross_entropy
from nlpfast.ops import projected_chunks
from nlpfast.testing import assert_no_worse

OP = "linear_cross_entropy"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, features, classes
SIZES = [
    *((1, 1, 1), (2, 3, 2), (17, 16, 31), (33, 1, 65), (64, 48, 1025), (50, 31, 5003), (18, 129, 257)),
    *((0, 4, 5), (5, 0, 7), (16, 64, 16)),
]


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All rows at a time, and as few as a chunk may have."""
    if request.param == "chunks":
        monkeypatch.setattr(projected_chunks, "chunk_rows", lambda N, V, logits: max(1, min(N, 16)))
    return request.param


def inputs(
    N: int = 40,
    D: int = 24,
    V: int = 57,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Rows, weight and, if asked for, bias, whose logits are about normal; and targets."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(N, D), (V, D), (V,)][: 3 if bias else 2]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] *= 2 / math.sqrt(max(D, 1))
    target = torch.randint(V, (N,), generator=generator)
    if N > 2:
        target[1] = IGNORED
        target[-1] = V - 1
    return [x.to(dtype).requires_grad_() for x in tensors], target


def call(tensors: list[Tensor], target: Tensor, **options) -> Tensor | tuple[Tensor, ...]:
    return linear_cross_entropy(
        *tensors[:2], target, linear_bias=tensors[2] if len(tensors) > 2 else None, **options
    )


def gradient_sizes(tensors: list[Tensor], target: Tensor, upstream: Tensor) -> list[Tensor]:
    """How large the terms are whose rounding makes up the errors of the gradients, in float64.

    A probability's error is relative to it and to the row's logits; that of a sum grows with the root of its
    squared terms, where the sum itself may cancel.
    """
    rows, weight, bias = (x.detach().double() for x in tensors)
    rows = rows.masked_fill((target == IGNORED).unsqueeze(-1), 0.0)
    logits = F.linear(rows, weight, bias)
    terms = logits.softmax(-1) * (1 + logits.abs().amax(-1, keepdim=True))
    terms = (terms + F.one_hot(target.clamp(min=0), len(weight))) * upstream.unsqueeze(-1)
    squares = terms.masked_fill((target == IGNORED).unsqueeze(-1), 0.0).square()
    sums = (squares @ weight.square(), squares.T @ rows.square(), squares.sum(0))
    return [x.sqrt() for x in sums]


def gradients(loss: Tensor, tensors: list[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return list(torch.autograd.grad(loss, tensors, upstream.to(loss.dtype)))


@pytest.mark.parametrize(("smoothing", "pad"), SMOOTHINGS)
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence"])
def test_published_definitions(smoothing, pad, eps, reduction) -> None:
    tensors, target = inputs(24, 5, 11, torch.float64)
    rows, target = tensors[0].detach().view(4, 6, 5).requires_grad_(), target.view(4, 6)
    tensors = [rows, *tensors[1:]]
    options = {"label_smoothing": eps, "smoothing": smoothing, "pad_index": pad}
    found = call(tensors, target, reduction=reduction, **options, backend="reference")
    counted = (target != IGNORED) & (target != (IGNORED if pad is None else pad))
    expected = reduce(eager(F.linear(*tensors), target, eps, smoothing, pad), counted, reduction)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-10
    for mine, other in zip(*(gradients(y, tensors, upstream) for y in (found, expected)), strict=True):
        assert other.abs().max() > 0
        assert (mine - other).abs().max() < 1e-10


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence"])
@pytest.mark.parametrize(("smoothing", "pad"), SMOOTHINGS)
def test_gradcheck(reduction, smoothing, pad) -> None:
    tensors, target = inputs(6, 3, 5, torch.float64)
    target = target.view(2, 3)
    options = {"label_smoothing": 0.2, "smoothing": smoothing, "pad_index": pad, "reduction": reduction}

    def loss(*tensors: Tensor) -> Tensor:
        return call([tensors[0].view(2, 3, 3), *tensors[1:]], target, **options, backend="reference")

    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignore", [-100, 3])
@pytest.mark.usefixtures("chunked")
def test_equals_pytorch(backend, reduction, bias, ignore) -> None:
    tensors, target = inputs(bias=bias)
    target[target == IGNORED] = ignore
    target[7] = ignore
    # some of them are predicted
    target[20:30] = F.linear(*tensors)[20:30].argmax(-1)
    options = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": 0.1}
    found, nll, correct = call(tensors, target, **options, return_nll=True, backend=backend)
    logits = F.linear(*tensors)
    expected = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    plain = F.cross_entropy(logits, target, ignore_index=ignore, reduction=reduction)
    torch.testing.assert_close(nll, plain, rtol=1e-6, atol=1e-6)
    hits = ((logits.argmax(-1) == target) & (target != ignore)).long()
    assert 0 < hits.sum() < 20
    assert torch.equal(correct, hits if reduction == "none" else hits.sum())
    upstream = torch.randn(expected.shape)
    for mine, other in zip(*(gradients(y, tensors, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("N", "D", "V"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("chunked")
def test_no_worse_than_eager(backend, N, D, V, dtype, reduction) -> None:
    tensors, target = inputs(N, D, V, dtype)
    weights = torch.randn(N) if reduction == "none" else torch.ones(N)
    results = []
    for kind in ("ours", dtype, torch.float64):
        leaves = [x.detach().to(dtype if kind == "ours" else kind).requires_grad_() for x in tensors]
        if kind == "ours":
            losses = call(leaves, target, label_smoothing=0.1, reduction="none", backend=backend)
            # the gradients of a sum are made along with the loss, those of rows are not
            total = (
                losses
                if reduction == "none"
                else call(leaves, target, label_smoothing=0.1, reduction="sum", backend=backend)
            )
        else:
            logits = F.linear(*leaves)
            losses = total = eager(logits if kind == torch.float64 else logits.float(), target, 0.1)
        upstream = weights if total.ndim else torch.ones(())
        results.append([losses.detach().unsqueeze(-1), *gradients(total, leaves, upstream)])
    size = results[2][0].abs() + F.linear(*tensors).detach().double().abs().amax(-1, keepdim=True)
    assert results[0][0].dtype == torch.float32
    assert_no_worse("loss", *(x.pop(0) for x in results), factor=1.0, size=size)
    sizes = gradient_sizes(tensors, target, weights)
    for name, *matrices in zip(("dh", "dW", "db"), *results, sizes, strict=True):
        assert matrices[0].dtype == dtype
        *compared, terms = (x.view(len(x), -1) if x.numel() else x for x in matrices)
        assert_no_worse(name, *compared, factor=1.5, size=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("chunked")
def test_ignored_rows_may_hold_anything(backend, dtype, reduction) -> None:
    tensors, target = inputs(dtype=dtype)
    target[::3] = IGNORED
    options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
    spoilt = [x.detach().clone() for x in tensors]
    spoilt[0][target == IGNORED] = math.nan
    results = []
    for leaves in (tensors, [x.requires_grad_() for x in spoilt]):
        loss = call(leaves, target, **options)
        results.append([loss.detach(), *gradients(loss, leaves)])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other) and torch.isfinite(mine).all()
    assert (results[1][1][target == IGNORED] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(backend, reduction) -> None:
    tensors, _ = inputs(5)
    target = torch.full((5,), IGNORED)
    loss = call(tensors, target, reduction=reduction, backend=backend)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    for grad in gradients(loss, tensors):
        assert (grad == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4), ()])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_shapes(backend, shape, reduction) -> None:
    tensors, _ = inputs(0, 6, 5)
    rows, target = torch.randn(*shape, 6, requires_grad=True), torch.randint(5, shape)
    found = call([rows, *tensors[1:]], target, reduction=reduction, label_smoothing=0.1, backend=backend)
    logits = F.linear(rows, *tensors[1:]).reshape(-1, 5)
    flat = F.cross_entropy(logits, target.reshape(-1), reduction=reduction, label_smoothing=0.1)
    expected = flat.view(shape) if reduction == "none" else flat
    torch.testing.assert_close(found, expected, equal_nan=True)
    for grad, x in zip(gradients(found, [rows, *tensors[1:]]), [rows, *tensors[1:]], strict=True):
        assert grad.shape == x.shape
        assert rows.numel() > 0 or (grad == 0).all()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("chunked")
def test_gradients_of_some_inputs(backend, wanted, reduction) -> None:
    tensors, target = inputs()
    options = {"reduction": reduction, "backend": backend}
    expected = gradients(call(tensors, target, **options), tensors)
    leaves = [x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
    call(leaves, target, **options).sum().backward()
    for leaf, want, other in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or torch.equal(leaf.grad, other)


@pytest.mark.parametrize("gap", [20.0, 60.0])
def test_confident_rows_keep_their_digits(backend, gap) -> None:
    """The gradient of a row that is nearly right is small, not rounded away."""
    V = 33
    weight = torch.eye(V).requires_grad_()
    target = torch.arange(6)
    rows = torch.randn(6, V) - gap
    rows.scatter_(1, target.unsqueeze(1), 0.25)
    rows.requires_grad_()
    loss = linear_cross_entropy(rows, weight, target, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, rows)
    exact = rows.detach().double()
    others = (exact - 0.25).exp().scatter(1, target.unsqueeze(1), 0.0).sum(1)
    torch.testing.assert_close(loss.double(), torch.log1p(others).sum(), rtol=1e-5, atol=1e-38)
    at = grad.gather(1, target.unsqueeze(1)).squeeze(1).double()
    torch.testing.assert_close(at, -others / (1 + others), rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.zeros(())}, ValueError, r"input has the shape \[\]; it must be \[..., D\]"),
        ({"input": torch.zeros(3, 4).int()}, TypeError, r"input has the dtype torch\.int32"),
        ({"linear_weight": torch.zeros(5, 3)}, ValueError, r"linear_weight has the shape \[5, 3\]; .* D = 4"),
        ({"linear_weight": torch.zeros(0, 4)}, ValueError, "with at least one class"),
        (
            {"linear_weight": torch.zeros(5, 4).double()},
            TypeError,
            "linear_weight has the dtype torch.float64",
        ),
        ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias has the shape \[4\]; .*\[5\]"),
        ({"linear_bias": torch.zeros(5).half()}, TypeError, "linear_bias has the dtype torch.float16"),
        ({"linear_weight": torch.zeros(5, 4, device="meta")}, ValueError, "linear_weight is on meta"),
        ({"target": torch.zeros(3)}, TypeError, r"target has the dtype torch\.float32"),
        ({"target": torch.zeros(4).long()}, ValueError, r"target has the shape \[4\]; it must be .*\[3\]"),
        ({"target": torch.tensor([0, 5, 1])}, ValueError, r"target\[1\] is 5; it must be a class, 0\.\.4"),
        ({"reduction": "median"}, ValueError, "reduction is 'median'"),
        ({"pad_index": 5, "smoothing": "exclude_pad"}, ValueError, r"pad_index is 5; it must lie in 0\.\.4"),
        ({"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_errors_name_the_argument(changes, error, message) -> None:
    arguments = {
        "input": torch.zeros(3, 4),
        "linear_weight": torch.zeros(5, 4),
        "target": torch.zeros(3).long(),
        **changes,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_16_bits_come_in_few_sizes(dtype, monkeypatch):
    """Each number of rows is compiled and kept by oneDNN: gigabytes, were it another in every step."""
    cpu = dispatch.registry[OP]["cpu"]
    sizes = []
    real = cpu._Products

    def watched(rows, *others):
        sizes.append(len(rows))
        return real(rows, *others)

    monkeypatch.setattr(cpu, "_Products", watched)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 8, generator=generator).to(dtype).requires_grad_() for n in (300, 11))
    for count in (0, 1, 63, 64, 65, 200, 299):
        target = torch.randint(11, (300,), generator=generator)
        target[torch.randperm(300, generator=generator)[count:]] = -100
        loss = linear_cross_entropy(x, weight, target, reduction="none", backend="cpu")
        (loss * torch.arange(300)).sum().backward()
        assert loss.shape == (300,) and not x.grad[target == -100].any()
        x.grad = weight.grad = None
        expected = count if dtype == torch.float32 else -(-count // 64) * 64
        assert set(sizes) == {expected}, count
        sizes.clear()


@pytest.mark.parametrize(
    ("N", "V", "most"),
    [
        *((4096, 4000, 4096 / 5), (4096, 8000, 4096 / 5), (4096, 32000, 2**24 / 32000)),
        *((1024, 1000, 512), (307, 30522, 307), (1, 2**25, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_have_a_fifth_of_the_logits(N: int, V: int, most: float, dtype: torch.dtype) -> None:
    """Or 2^24 of them where that is less; 512 rows are not divided."""
    cpu = dispatch.registry[OP]["cpu"]
    rows, weight = (torch.zeros(size, 2, dtype=dtype) for size in (N, V))
    products = cpu._Products(rows, weight, None, (False, False, False))
    assert products.buffer.shape == (products.rows, V)
    assert 0.75 * most - 16 <= products.rows <= most
