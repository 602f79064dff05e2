"""Cross entropy of a projection on a CUDA device: values, memory, graphs, streams, odd targets."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import eager
from test_linear_cross_entropy import IGNORED, call, gradient_sizes, gradients, inputs
from torch import Tensor

from nlpfast import dispatch, linear_cross_entropy
from nlpfast.ops import projected_chunks
from nlpfast.testing import assert_no_worse, between_canaries, poison

OP = "linear_cross_entropy"
DEVICE = "cuda"
pytest.importorskip("nlpfast.ops.linear_cross_entropy.triton")
pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"label_smoothing": 0.1, "backend": "triton"}


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "chunks":
        monkeypatch.setattr(projected_chunks, "chunk_rows", lambda N, V, logits: max(1, min(N, 48)))
    return request.param


@pytest.fixture(autouse=True)
def _exact_products() -> object:
    """Errors are compared with those of eager PyTorch, in products of full precision."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def drawn(N: int, D: int, V: int, dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], Tensor]:
    tensors, target = inputs(N, D, V, dtype, bias)
    return [x.detach().to(DEVICE).requires_grad_() for x in tensors], target.to(DEVICE)


def results(tensors: list[Tensor], target: Tensor, **options) -> list[Tensor]:
    loss = call(tensors, target, **{**OPTIONS, **options})
    return [loss.detach(), *gradients(loss, tensors)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}: {(a.double() - b.double()).abs().max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D", "V"), [(1, 8, 1), (100, 64, 31), (130, 96, 50257), (97, 33, 1001)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("chunked")
def test_no_worse_than_eager(dtype: torch.dtype, N: int, D: int, V: int, reduction: str) -> None:
    tensors, target = drawn(N, D, V, dtype)
    weights = torch.randn(N, device=DEVICE) if reduction == "none" else torch.ones(N, device=DEVICE)
    found = []
    for kind in ("ours", dtype, torch.float64):
        leaves = [x.detach().to(dtype if kind == "ours" else kind).requires_grad_() for x in tensors]
        if kind == "ours":
            losses = total = call(leaves, target, **OPTIONS, reduction="none")
            if reduction == "sum":
                total = call(leaves, target, **OPTIONS, reduction="sum")
        else:
            logits = F.linear(*leaves)
            losses = total = eager(
                (logits if kind == torch.float64 else logits.float()).cpu(), target.cpu(), 0.1
            ).to(DEVICE)
        upstream = weights if total.ndim else torch.ones((), device=DEVICE)
        found.append(
            [losses.detach().unsqueeze(-1).cpu(), *(x.cpu() for x in gradients(total, leaves, upstream))]
        )
    here = [x.detach().cpu() for x in tensors]
    size = found[2][0].abs() + F.linear(*(x.double() for x in here)).abs().amax(-1, keepdim=True)
    assert_no_worse(
        "loss", *(x.pop(0).double().float() for x in found[:2]), found[2].pop(0), factor=1.0, size=size
    )
    sizes = gradient_sizes(here, target.cpu(), weights.cpu())
    for name, *matrices in zip(("dh", "dW", "db"), *found, sizes, strict=True):
        assert matrices[0].dtype == dtype
        assert_no_worse(
            name,
            *(x.view(len(x), -1) for x in matrices[:3]),
            factor=1.5,
            size=matrices[3].view(len(matrices[3]), -1),
        )


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence"])
@pytest.mark.usefixtures("chunked")
def test_nothing_waits_for_the_gpu(reduction: str) -> None:
    tensors, target = drawn(120, 32, 501, torch.bfloat16)
    expected = results(
        tensors, target.view(4, 30).flatten(), reduction="mean" if reduction == "mean" else "none"
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(tensors, target, reduction=reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if reduction != "sequence":
        assert_equal(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("chunked")
def test_cuda_graph(reduction: str) -> None:
    tensors, target = drawn(120, 32, 501, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(tensors, target, reduction=reduction)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(tensors, target, reduction=reduction)
    for seed in range(3):
        fresh, labels = inputs(120, 32, 501, torch.bfloat16, seed=seed)
        for x, y in zip((*tensors, target), (*fresh, labels), strict=True):
            x.detach().copy_(y.detach())
        graph.replay()
        assert_equal(captured, results(tensors, target, reduction=reduction))


def test_another_stream() -> None:
    tensors, target = drawn(400, 64, 5003, torch.bfloat16)
    expected = results(tensors, target)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        moved = [x.detach().clone().requires_grad_() for x in tensors]
        found = results(moved, target)
    stream.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_targets_that_are_no_class(reduction: str) -> None:
    tensors, target = drawn(60, 16, 33, torch.float32)
    wrong = target.clone()
    wrong[5], wrong[6] = 33, -7
    losses = call(tensors, wrong, **OPTIONS, reduction="none")
    assert losses[5:7].isnan().all() and torch.isfinite(losses[:5]).all() and torch.isfinite(losses[7:]).all()
    d_rows = torch.autograd.grad(
        losses.nan_to_num().sum() if reduction == "mean" else losses.sum(), tensors[0]
    )[0]
    assert torch.isfinite(d_rows[7:]).all()
    # the context is as good as before
    torch.cuda.synchronize()
    assert all(torch.isfinite(x).all() for x in results(tensors, target, reduction=reduction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("chunked")
def test_memory(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str) -> None:
    """Inputs unchanged, margins intact, nothing read that was never written; ignored rows hold NaN."""
    tensors, target = drawn(100, 24, 1100, dtype)
    expected = results(tensors, target, reduction=reduction)
    spoilt = [x.detach().clone() for x in tensors]
    spoilt[0][target == IGNORED] = math.nan
    inside, checks = zip(*(between_canaries(x) for x in (*spoilt, target)), strict=True)
    # cuBLAS asks for it where PyTorch is to be deterministic, as it is to fill memory
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with poison():
        *kept, labels = inside
        found = results([x.requires_grad_() for x in kept], labels, reduction=reduction)
    assert_equal(found, expected)
    for x, y, check in zip(inside, (*spoilt, target), checks, strict=True):
        assert torch.equal(x.detach().nan_to_num(), y.detach().nan_to_num())
        check()


def test_peak_memory() -> None:
    """Of 16,384 x 32,000 logits in bfloat16, a gigabyte, there is a quarter at a time."""
    tensors, target = drawn(16384, 256, 32000, torch.bfloat16, bias=False)
    results(tensors, target, reduction="mean")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(tensors, target, reduction="mean")
    # a chunk, the gradients in float32, and as they are returned
    expected = 2**27 * 2 + 6 * 256 * (32000 + 16384)
    assert torch.cuda.max_memory_allocated() - before < 1.2 * expected


def test_same_bits_250_times() -> None:
    tensors, target = drawn(200, 64, 1003, torch.bfloat16)
    expected = results(tensors, target), results(tensors, target, reduction="none")
    for _ in range(250):
        assert_equal(results(tensors, target), expected[0])
        assert_equal(results(tensors, target, reduction="none"), expected[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(reduction: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    tensors, target = drawn(64, 32, 301, dtype)

    def loss_of(rows: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            rows * 2, weight, target, linear_bias=bias, reduction=reduction, **OPTIONS
        )

    found = []
    for function in (torch.compile(loss_of, fullgraph=True), loss_of):
        loss = function(*tensors, target)
        found.append([loss.detach(), *gradients(loss, tensors)])
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    tensors, target = drawn(64, 32, 301, torch.float32)
    with torch.autocast(DEVICE, dtype):
        loss = call(tensors, target, **OPTIONS)
    narrow = [x.detach().to(dtype).requires_grad_() for x in tensors]
    expected = call(narrow, target, **OPTIONS)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    for mine, other in zip(gradients(loss, tensors), gradients(expected, narrow), strict=True):
        assert torch.equal(mine, other.float())


def test_choice_of_the_backend() -> None:
    tensors, target = drawn(4, 8, 9, torch.bfloat16)
    request = (tensors[0].unsqueeze(0), tensors[1], None, target.unsqueeze(0))
    assert dispatch.choose(OP, DEVICE, None, request) is dispatch.registry[OP]["triton"]
    wide = [x.detach().double() for x in tensors]
    torch.testing.assert_close(call(wide, target), call(wide, target, backend="reference"))
