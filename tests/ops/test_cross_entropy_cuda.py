"""Cross entropy on a CUDA device: errors against float64, layouts, graphs, streams, large sizes, bad targets.

Triton compiles a kernel for each line of its table, and for rows that begin at multiples of 16 bytes or
anywhere; numbers of classes are chosen so that all of these have their turn.
"""

import math
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import eager
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlpfast import cross_entropy, dispatch
from nlpfast.testing import assert_no_worse, between_canaries, poison

OP = "cross_entropy"
DEVICE = "cuda"
pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 31, 128, 333, 1000, 1001, 2048, 4096, 5003, 8192, 8193, 30000, 32000, 50257, 128256]
IGNORED = -100
SMOOTHINGS = [("uniform", None, 0.0), ("uniform", None, 0.1), ("fairseq", None, 0.1), ("exclude_pad", 0, 0.2)]
OPTIONS = {"label_smoothing": 0.1, "backend": "triton"}
# Rows in registers, in blocks, and of each kind one that begins anywhere.
KINDS = [1000, 1001, 32000, 50257]


def inputs(
    N: int = 24, V: int = 1000, dtype: torch.dtype = torch.float32, scale: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits, which want a gradient, and targets, one of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(N, V, generator=generator)).to(DEVICE, dtype)
    target = torch.randint(V, (N,), generator=generator).to(DEVICE)
    if N > 2:
        target[1], target[-1] = IGNORED, V - 1
    return x.requires_grad_(), target


def results(x: Tensor, target: Tensor, upstream: Tensor | float = 1.0, **options) -> list[Tensor]:
    """Loss, nll, number of correct rows, and gradient."""
    losses = cross_entropy(x, target, **{**OPTIONS, **options}, return_nll=True)
    grad = torch.as_tensor(upstream, dtype=losses[0].dtype, device=DEVICE).expand(losses[0].shape)
    return [y.detach() for y in (*losses, *torch.autograd.grad(losses[0], x, grad))]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"result {i}: {(a.double() - b.double()).abs().max()}"


def test_choice_of_the_backend() -> None:
    for dtype in DTYPES:
        x, target = torch.zeros(1, 2, 3, dtype=dtype, device=DEVICE), torch.zeros(1, 2, device=DEVICE).long()
        assert dispatch.choose(OP, DEVICE, None, (x, target)) is dispatch.registry[OP]["triton"]
    x, target = inputs(dtype=torch.float64)
    torch.testing.assert_close(cross_entropy(x, target), cross_entropy(x, target, backend="reference"))
    with pytest.raises(RuntimeError, match="computes in float32, bfloat16 and float16"):
        cross_entropy(x, target, backend="triton")


@pytest.mark.parametrize("V", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(V: int, dtype: torch.dtype) -> None:
    """Every smoothing, with upstream gradients of the rows' own, and those that forward foresees."""
    x, target = inputs(24, V, dtype)
    for smoothing, pad, eps in SMOOTHINGS:
        kept = target if pad is None else target.where(target != pad, IGNORED)
        options = {"label_smoothing": eps, "smoothing": smoothing, "pad_index": pad, "backend": "triton"}
        for reduction in ("none", "sum"):
            upstream = (
                torch.randn(24, device=DEVICE) if reduction == "none" else torch.ones(24, device=DEVICE)
            )
            exact_x, same_x = (x.detach().to(d).requires_grad_() for d in (torch.float64, torch.float32))
            loss = cross_entropy(x, kept, reduction=reduction, **options)
            (grad,) = torch.autograd.grad(loss, x, upstream if reduction == "none" else None)
            others = []
            for y in (same_x, exact_x):
                # q is made on the CPU
                rows = eager(y.cpu(), kept.cpu(), eps, smoothing, pad)
                (slope,) = torch.autograd.grad(rows, y, upstream.cpu().to(rows.dtype))
                others += [
                    rows.detach().to(DEVICE).unsqueeze(-1),
                    slope.to(dtype if y is same_x else slope.dtype),
                ]
            same, same_grad, exact, exact_grad = others
            assert loss.dtype == torch.float32 and grad.dtype == dtype
            if reduction == "none":
                size = exact.abs() + x.detach().double().abs().amax(-1, keepdim=True)
                assert_no_worse("loss", loss.detach().unsqueeze(-1), same, exact, factor=1.0, size=size)
            assert_no_worse("gradient", grad, same_grad, exact_grad, factor=1.5)


@pytest.mark.parametrize("V", KINDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence"])
@pytest.mark.parametrize("inplace", [False, True])
def test_reductions_and_in_place(V: int, reduction: str, inplace: bool) -> None:
    """Against the definition; in place also with an upstream gradient that nobody foresaw."""
    x, target = inputs(24, V)
    shaped = x.detach().view(4, 6, V).requires_grad_()
    for upstream in (1.0, 0.3):
        logits = shaped * 1
        address = logits.data_ptr()
        options = {"reduction": reduction, "label_smoothing": 0.1}
        found = cross_entropy(logits, target.view(4, 6), **options, inplace=inplace, backend="triton")
        seen: list[int] = []
        logits.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        (grad,) = torch.autograd.grad(found, shaped, torch.full_like(found, upstream))
        assert (seen == [address]) == inplace
        wide = shaped.detach().double().requires_grad_()
        expected = cross_entropy(wide, target.view(4, 6), **options, backend="reference")
        (wanted,) = torch.autograd.grad(expected, wide, torch.full_like(expected, upstream))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(grad.double(), wanted, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 85.0])
@pytest.mark.parametrize("V", KINDS)
def test_confident_rows_keep_their_digits(gap: float, V: int) -> None:
    x, target = inputs(8, V, scale=1.0)
    target[1] = 4
    at = target.unsqueeze(1)
    x = (x.detach() - gap).scatter(1, at, 0.25).requires_grad_()
    exact = x.detach().double()
    others = (exact - 0.25).exp().scatter(1, at, 0.0).sum(1)
    _, nll, _, grad = results(x, target, reduction="none", label_smoothing=0.0)
    torch.testing.assert_close(nll.double(), others.log1p(), rtol=2e-6, atol=1e-38)
    torch.testing.assert_close(
        grad.gather(1, at).squeeze(1).double(), -others / (1 + others), rtol=2e-6, atol=1e-38
    )


@pytest.mark.parametrize("V", KINDS)
def test_correct_rows_are_those_of_argmax(V: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 3, (64, V), generator=generator).to(DEVICE).float()
    x[::2, 5:9] = 3.0
    x[10, 700], x[11, 5] = math.nan, math.nan
    target = torch.randint(4, 10, (64,), generator=generator).to(DEVICE)
    target[::7] = IGNORED
    expected = (x.argmax(-1) == target) & (target != IGNORED)
    assert 0 < expected.sum() < 64
    found = cross_entropy(x, target, reduction="none", return_nll=True, backend="triton")[2]
    assert torch.equal(found, expected.long())


@pytest.mark.parametrize("V", KINDS)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize(
    "kind", ["one -inf", "target -inf", "all -inf", "one inf", "target inf", "nan", "block"]
)
def test_logits_that_are_not_finite(V: int, eps: float, kind: str) -> None:
    x, target = inputs(3, V)
    x, value = x.detach(), {"one inf": math.inf, "target inf": math.inf, "nan": math.nan}.get(kind, -math.inf)
    columns = {"all -inf": slice(None), "block": slice(0, V // 2)}.get(kind, 40)
    target[0] = 40 if kind.startswith("target") else V - 2
    x[0, columns] = value
    options = {"label_smoothing": eps, "reduction": "none"}
    found, expected = (
        cross_entropy(x, target, **options, backend="triton"),
        F.cross_entropy(x, target, **options),
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("V", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts_give_the_same_bits(V: int, dtype: torch.dtype, reduction: str) -> None:
    x, target = inputs(20, V, dtype)
    x, target = x.detach().view(4, 5, V), target.view(4, 5)
    expected = results(x.clone().requires_grad_(), target, reduction=reduction)
    wide = torch.full((5, 8, V + 3), math.nan, dtype=dtype, device=DEVICE)
    layouts = {
        "sliced": wide[1:, 1:6, 2 : V + 2],
        "rows at 16 bytes": torch.full((4, 5, V + 16 - V % 16), math.nan, dtype=dtype, device=DEVICE)[
            ..., :V
        ],
        "batch inside": torch.empty(5, 4, V, dtype=dtype, device=DEVICE).transpose(0, 1),
        "columns": torch.empty(4, V, 5, dtype=dtype, device=DEVICE).transpose(1, 2),
        "misaligned": between_canaries(x, 1)[0],
    }
    for laid in layouts.values():
        laid.copy_(x)
        assert_equal(results(laid.requires_grad_(), target, reduction=reduction), expected)
    # a row has the same bits in other company, at another place
    alone = x[1:2, 2:].clone().requires_grad_()
    some = cross_entropy(alone, target[1:2, 2:], reduction="none", **OPTIONS)
    rows = cross_entropy(x, target, reduction="none", **OPTIONS)
    assert torch.equal(some, rows[1:2, 2:])


@pytest.mark.parametrize("V", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_memory(monkeypatch: pytest.MonkeyPatch, V: int, dtype: torch.dtype) -> None:
    """Inputs unchanged, margins intact, nothing read that was never written, no NaN out of ignored rows."""
    x, target = inputs(6, V, dtype)
    expected = results(x, target, reduction="none")
    dirty = x.detach().clone()
    dirty[1] = math.nan
    (inside, check), (index, check_index) = between_canaries(dirty, 1024), between_canaries(target, 1024)
    checks = [check, check_index]
    original = Tensor.new_empty

    def surrounded(like: Tensor, *shape, **kwargs) -> Tensor:
        plain = original(like, *shape, **kwargs)
        if not plain.is_floating_point():
            return plain
        # a margin of 1,024 elements leaves the alignment as it is
        result, check = between_canaries(plain.fill_(math.nan), 1024)
        checks.append(check)
        return result

    monkeypatch.setattr(Tensor, "new_empty", surrounded)
    with poison():
        found = results(inside.requires_grad_(), index, reduction="none")
    assert len(checks) >= 2 + 4
    assert_equal(found, expected)
    assert torch.equal(inside.detach().nan_to_num(), dirty.nan_to_num()) and torch.equal(index, target)
    for check in checks:
        check()


@pytest.mark.parametrize("V", KINDS)
@pytest.mark.parametrize("bad", [-1, 10**6, 2**33, -(2**40)])
def test_bad_targets_do_not_poison_the_context(V: int, bad: int) -> None:
    x, target = inputs(8, V)
    expected = results(x, target, reduction="none")
    target[3] = bad
    found = results(x, target, reduction="none")
    torch.cuda.synchronize()
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a[3] == 0).all() if i == 2 else a[3].isnan().all()
        rest = [0, 1, 2, 4, 5, 6, 7]
        assert torch.equal(a[rest], b[rest])
    mean, *_, grad = results(x, target)
    assert mean.isnan() and grad[3].isnan().all() and grad[:3].isfinite().all()


@pytest.fixture
def without_waiting() -> Iterator[None]:
    """An operation that waits for the device raises; kernels must be compiled before."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def every_call(x: Tensor, target: Tensor) -> list[Tensor]:
    """Forward and backward in each way that there is, with foreseen upstream gradients and others."""
    found = []
    for reduction in ("mean", "none"):
        for inplace in (False, True):
            for upstream in (1.0, 0.5):
                logits = x * 1
                loss = cross_entropy(logits, target, reduction=reduction, inplace=inplace, **OPTIONS)
                found += [loss.detach(), *torch.autograd.grad(loss * upstream, x, torch.ones_like(loss))]
    return found


@pytest.mark.parametrize("V", KINDS)
def test_nothing_waits_for_the_device(request: pytest.FixtureRequest, V: int) -> None:
    x, target = inputs(8, V, torch.bfloat16)
    expected = every_call(x, target)
    request.getfixturevalue("without_waiting")
    found = every_call(x, target)
    torch.cuda.set_sync_debug_mode("default")
    assert_equal(found, expected)


@pytest.mark.parametrize("V", KINDS)
def test_graph(V: int) -> None:
    """Forward and backward in one graph; logits, targets and upstream gradients change between replays."""
    x, target = inputs(8, V, torch.bfloat16)
    factor = torch.ones((), device=DEVICE)

    def step() -> list[Tensor]:
        loss = cross_entropy(x, target, **OPTIONS)
        (grad,) = torch.autograd.grad(loss * factor, x)
        return [loss.detach(), grad, *every_call(x, target)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    replayed = []
    for change in (
        lambda: None,
        lambda: factor.fill_(2.0),
        lambda: x.data.normal_(),
        lambda: target.fill_(3),
    ):
        change()
        graph.replay()
        replayed.append([y.clone() for y in static])
        assert_equal(replayed[-1], step())
    assert torch.equal(replayed[0][0], replayed[1][0]) and not torch.equal(replayed[0][1], replayed[1][1])
    assert not torch.equal(replayed[1][0], replayed[2][0]) and not torch.equal(replayed[2][0], replayed[3][0])


@pytest.mark.parametrize("V", KINDS)
def test_other_streams(V: int) -> None:
    """Inputs that a busy stream has yet to write: kernels on any other stream would read NaN."""
    x, target = inputs(8, V, torch.bfloat16)
    expected = results(x, target)
    late, stream = torch.full_like(x, math.nan), torch.cuda.Stream()
    busy = torch.zeros(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy
        late.copy_(x.detach())
        found = [y.clone() for y in results(late.requires_grad_(), target)]
    stream.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("V", KINDS)
def test_same_bits_250_times_and_in_threads(V: int) -> None:
    x, target = inputs(64, V, torch.bfloat16)
    expected = results(x, target), results(x, target, reduction="none")
    for _ in range(250):
        assert_equal(results(x, target), expected[0])
        assert_equal(results(x, target, reduction="none"), expected[1])
    found: list = [None] * 8

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[i] = results(x, target)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        assert_equal(each, expected[0])


# The compiler warns of settings of the machine, such as TF32.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("V", KINDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(V: int, dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(x: Tensor, target: Tensor) -> Tensor:
        # a product with a power of 2, exact in any order, gives the compiler something to fuse
        return cross_entropy(x * 2, target, reduction="none", **OPTIONS)

    # classes are not what changes from call to call
    compiled = torch.compile(call, fullgraph=True, dynamic=None if dynamic else False)
    for N in (5, 7, 9) if dynamic else (5,):
        x, target = inputs(N, V, torch.bfloat16)
        upstream = torch.randn(N, device=DEVICE)
        both = []
        for function in (compiled, call):
            loss = function(x, target)
            both.append([loss.detach(), *torch.autograd.grad(loss, x, upstream)])
        assert_equal(*both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, target = inputs(24, 64)
    weight = torch.randn(64, 64, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype):
        logits = F.linear(x, weight)
        loss = cross_entropy(logits, target, **OPTIONS)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.any()
    expected = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    x, target = inputs(8, 1000)

    def call(x: Tensor) -> Tensor:
        return cross_entropy(x, target, **OPTIONS)

    def gradient(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        loss = function(x)
        x.grad = None
        loss.backward()
        return [loss.detach(), x.grad]

    assert_equal(gradient(lambda x: checkpoint(call, x, use_reentrant=reentrant)), gradient(call))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    x, target = inputs(8, 1000)
    loss = cross_entropy(x, target, **OPTIONS)
    elsewhere = x.detach().to("cuda:1").requires_grad_()
    found = cross_entropy(elsewhere, target.to("cuda:1"), **OPTIONS)
    assert found.device.index == 1
    gradients = (torch.autograd.grad(y, z)[0].to(DEVICE) for y, z in ((found, elsewhere), (loss, x)))
    assert torch.equal(found.to(DEVICE), loss) and torch.equal(*gradients)


@pytest.mark.parametrize("V", [1000, 50257, 2**20 + 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_more_than_2_to_the_31_elements(V: int, inplace: bool) -> None:
    """The first and the last rows get the bits that they get alone."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of memory on the device")
    N = 2**31 // V + 100
    x = torch.empty(N, V, dtype=torch.bfloat16, device=DEVICE).normal_()
    assert x.numel() > 2**31
    target = torch.randint(V, (N,), device=DEVICE)
    parts = (slice(0, 40), slice(N - 40, N))
    copies = [x[part].clone().requires_grad_() for part in parts]
    logits = x.requires_grad_() if not inplace else x.requires_grad_().view(N, V)
    options = {"reduction": "none", **OPTIONS}
    loss = cross_entropy(logits, target, inplace=inplace, **options)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    for part, few in zip(parts, copies, strict=True):
        alone = cross_entropy(few, target[part], inplace=False, **options)
        assert torch.equal(loss[part], alone)
        (wanted,) = torch.autograd.grad(alone, few, torch.ones_like(alone))
        torch.testing.assert_close(grad[part], wanted, rtol=2**-7 if inplace else 0.0, atol=0.0)
    del x, logits, loss, grad
    torch.cuda.empty_cache()
