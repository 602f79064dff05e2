"""Cross entropy of a projection in PyTorch: layouts, memory, backward twice, compile, and searched calls."""

import math
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_cross_entropy import DTYPES, IGNORED, call, gradients, inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlpfast import dispatch, linear_cross_entropy
from nlpfast.ops import projected_chunks
from nlpfast.testing import between_canaries, poison

OP = "linear_cross_entropy"
CASES: Counter[str] = Counter()
OPTIONS = {"label_smoothing": 0.1}
EXAMPLES = 150 if os.environ.get("TRITON_INTERPRET") == "1" else 2000


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projected_chunks, "chunk_rows", lambda N, V, logits: max(1, min(N, 16)))


def run(tensors: list[Tensor], target: Tensor, upstream: Tensor | float = 1.0, **options) -> list[Tensor]:
    loss = call(tensors, target, **{**OPTIONS, **options})
    upstream = torch.as_tensor(upstream).expand(loss.shape)
    return [loss.detach(), *gradients(loss, tensors, upstream)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"result {i}: {(a - b).abs().max()}"


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts_give_the_same_bits(backend, dtype, reduction) -> None:
    tensors, target = inputs(dtype=dtype)
    options = {"reduction": reduction, "backend": backend}
    expected = run(tensors, target, **options)
    rows, weight, bias = (x.detach() for x in tensors)
    transposed = [rows.T.contiguous().T, weight.T.contiguous().T, bias.repeat(2)[: len(bias)]]
    assert not transposed[0].is_contiguous() and not transposed[1].is_contiguous()
    sliced = [F.pad(rows, (3, 2))[:, 3:-2], F.pad(weight, (1, 1))[:, 1:-1], bias.repeat_interleave(2)[::2]]
    # nothing is aligned to more than an element
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (rows, weight, bias)]
    for laid in (transposed, sliced, shifted):
        assert_equal(run(leaves(laid), target, **options), expected)
    strided = torch.stack((target, target), -1)[..., 0]
    assert_equal(run(tensors, strided, **options), expected)


def test_expanded_inputs_and_upstream(backend) -> None:
    tensors, target = inputs(40)
    row = tensors[0].detach()[:1]
    copied = [row.expand(40, -1).contiguous(), *tensors[1:]]
    wanted = run(leaves(copied), target, reduction="none", backend=backend)
    leaf = row.clone().requires_grad_()
    loss = call([leaf.expand(40, -1), *tensors[1:]], target, reduction="none", **OPTIONS, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones(()).expand(40))
    assert torch.equal(loss, wanted[0])
    torch.testing.assert_close(grad, wanted[1].sum(0, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 17, 1100])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory(backend, dtype, V, reduction) -> None:
    """Inputs unchanged, margins intact, and nothing read from memory that was never written."""
    tensors, target = inputs(V=V, dtype=dtype)
    expected = run(tensors, target, reduction=reduction, backend=backend)
    inside, checks = zip(*(between_canaries(x.detach()) for x in (*tensors, target)), strict=True)
    with poison():
        *kept, target_inside = inside
        found = run([x.requires_grad_() for x in kept], target_inside, reduction=reduction, backend=backend)
    assert_equal(found, expected)
    for x, y, check in zip(inside, (*tensors, target), checks, strict=True):
        assert torch.equal(x.detach(), y.detach())
        check()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_and_with_other_upstream_gradients(backend, reduction) -> None:
    tensors, target = inputs()
    loss = call(tensors, target, reduction=reduction, **OPTIONS, backend=backend)
    ones = torch.ones(loss.shape)
    first, second, half = (
        torch.autograd.grad(loss, tensors, ones * f, retain_graph=True) for f in (1.0, 1.0, 0.5)
    )
    for x in first:
        x.zero_()
    third = torch.autograd.grad(loss, tensors, ones)
    for b, c, d in zip(second, third, half, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(c, b)
        torch.testing.assert_close(2 * d, b)
    fresh = call(tensors, target, reduction=reduction, **OPTIONS, backend=backend)
    for b, d in zip(second, torch.autograd.grad(fresh, tensors, -3 * ones), strict=True):
        torch.testing.assert_close(d, -3 * b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_scaled_losses_of_float16_keep_small_gradients(backend, dtype) -> None:
    """The gradient of a mean over many rows is below what float16 holds; that of the scaled loss is not."""
    tensors, target = inputs(2000, 8, 300, dtype, bias=False)
    tensors[1] = (0.01 * tensors[1].detach()).requires_grad_()
    scale = 2.0**14
    found = torch.autograd.grad(scale * call(tensors, target, backend=backend), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = torch.autograd.grad(scale * F.cross_entropy(F.linear(*wide), target), wide)
    for mine, other in zip(found, exact, strict=True):
        assert torch.isfinite(mine).all() and (mine.double() - other).norm() < 2e-3 * other.norm()


def test_second_derivatives_are_an_error(backend) -> None:
    tensors, target = inputs(6, 3, 5)
    grads = torch.autograd.grad(call(tensors, target, backend=backend), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivatives"):
        grads[0].square().sum().backward()


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_same_bits_250_times(backend, threads) -> None:
    tensors, target = inputs(64, 40, 700)
    before = torch.get_num_threads()
    one = run(tensors, target, backend=backend)
    try:
        torch.set_num_threads(threads)
        expected = run(tensors, target, backend=backend)
        for _ in range(250):
            assert_equal(run(tensors, target, backend=backend), expected)
    finally:
        torch.set_num_threads(before)
    # the products are those of a linear layer: MKL's bits depend on the number of threads
    for a, b in zip(one, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_without_graph_breaks(backend, reduction, dynamic, dtype) -> None:
    torch._dynamo.reset()

    def loss_of(rows: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        options = {"smoothing": "exclude_pad", "pad_index": 2, **OPTIONS, "backend": backend}
        return linear_cross_entropy(
            rows * 2, weight, target, linear_bias=bias, reduction=reduction, **options
        )

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=None if dynamic else False, backend="aot_eager")
    for N in (40, 56, 24) if dynamic else (40,):
        tensors, target = inputs(N, dtype=dtype)
        results = []
        for function in (compiled, loss_of):
            loss = function(*tensors, target)
            results.append([loss.detach(), *gradients(loss, tensors)])
        for a, b in zip(*results, strict=True):
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype) -> None:
    if backend == "reference":
        pytest.skip("it is not an operation")
    tensors, target = inputs(20, dtype=dtype)
    rows, weight, bias = (x.detach() for x in tensors)
    arguments = (rows.unsqueeze(0), weight, bias, target.unsqueeze(0), IGNORED, -1, 0.9, 0.01)
    forward_op, backward_op = (
        getattr(torch.ops.nlpfast, f"{backend}_linear_cross_entropy_{name}")
        for name in ("forward", "backward")
    )
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    for wanted in ([True, True, True], [False, True, False], [False] * 3):
        forward = (*arguments, wanted)
        torch.library.opcheck(forward_op, forward, test_utils=tests)
    statistics = forward_op(*arguments, [False] * 3)[3]
    for wanted in ([True, True, True], [True, False, False]):
        backward = (torch.randn(1, 20), *arguments[:4], statistics, *arguments[4:], wanted)
        torch.library.opcheck(backward_op, backward, test_utils=tests)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend, reentrant) -> None:
    tensors, target = inputs()
    expected = run(tensors, target, backend=backend)

    def loss_of(*tensors: Tensor) -> Tensor:
        return call(list(tensors), target, **OPTIONS, backend=backend)

    loss = checkpoint(loss_of, *tensors, use_reentrant=reentrant)
    loss.backward()
    assert_equal([loss.detach(), *(x.grad for x in tensors)], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(backend, dtype, reduction) -> None:
    tensors, target = inputs(40, 64, 100)
    with torch.autocast("cpu", dtype):
        loss = call(tensors, target, reduction=reduction, **OPTIONS, backend=backend)
    narrow = [x.detach().to(dtype).requires_grad_() for x in tensors]
    expected = call(narrow, target, reduction=reduction, **OPTIONS, backend=backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    grads, wanted = (gradients(*pair) for pair in ((loss, tensors), (expected, narrow)))
    for mine, other in zip(grads, wanted, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, other.float())


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Sizes, dtype, magnitude, smoothing and reduction of one call; the tensors follow from them."""
    smoothing = draw(st.sampled_from(["uniform", "fairseq", "exclude_pad"]))
    sizes = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 63, 65, 127, 129, 257]))
    V = draw(st.one_of(sizes, st.sampled_from([1023, 1025])))
    return {
        "dtype": draw(st.sampled_from([*DTYPES, torch.float64])),
        "B": draw(st.integers(0, 3)),
        "T": draw(st.integers(0, 15)),
        "D": draw(sizes),
        "V": V,
        "magnitude": 10.0 ** draw(st.integers(-4, 2)),
        "smoothing": smoothing,
        "pad_index": draw(st.integers(0, V - 1)) if smoothing == "exclude_pad" else None,
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "sequence"])),
        "ignored": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "bias": draw(st.booleans()),
        "factor": draw(st.sampled_from([1.0, 1.0, -0.3])),
        "seed": draw(st.integers(0, 2**31)),
    }


def check(backend: str, drawn: dict) -> None:
    """Compare one call with the definition in float64, within what rounding the logits may do."""
    generator = torch.Generator().manual_seed(drawn["seed"])
    B, T, D, V = (drawn[name] for name in "BTDV")
    dtype = drawn["dtype"]
    shapes = [(B, T, D), (V, D), (V,)][: 3 if drawn["bias"] else 2]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] *= drawn["magnitude"] / math.sqrt(D)
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    target = torch.randint(V, (B, T), generator=generator)
    target[torch.rand(B, T, generator=generator) < drawn["ignored"]] = IGNORED
    options = {name: drawn[name] for name in ("smoothing", "pad_index", "label_smoothing", "reduction")}
    request = (tensors[0], tensors[1], None, target)
    if dispatch.registry[OP][backend].refusal(*request) is not None:
        with pytest.raises(RuntimeError, match="cannot run there"):
            call(tensors, target, **options, backend=backend)
        CASES[f"{backend}, refused"] += 1
        return
    CASES[f"{backend}, {dtype}"] += 1
    wide = [x.detach().double().requires_grad_() for x in tensors]
    results = []
    for leaves_, name in ((tensors, backend), (wide, "reference")):
        loss = call(leaves_, target, **options, backend=name)
        upstream = torch.full(loss.shape, drawn["factor"], dtype=loss.dtype)
        results.append([loss.detach().double(), *(x.double() for x in gradients(loss, leaves_, upstream))])
    logits = F.linear(*wide).detach()
    top = float(logits.abs().max()) if logits.numel() else 0.0
    counted = max(int(((target != IGNORED) & (target != drawn["pad_index"])).sum()), 1)
    rows = 1 if drawn["reduction"] in ("none", "mean") else T if drawn["reduction"] == "sequence" else counted
    eps = torch.finfo(dtype).eps
    narrow = dtype in (torch.bfloat16, torch.float16)
    # the rounding of a logit: of the number itself, and of the sum that it is
    rounding = eps * (1 + top) if narrow else eps * (1 + top) * (2 + math.sqrt(D))
    (loss, *grads), (exact, *exact_grads) = results
    torch.testing.assert_close(loss.isnan(), exact.isnan())
    assert ((loss - exact).abs().nan_to_num() <= 4 * rows * (rounding + eps)).all()
    share = abs(drawn["factor"]) / (counted if drawn["reduction"] == "mean" else 1)
    largest = [w.detach().abs().max() if w.numel() else 0.0 for w in (wide[1], wide[0])] + [1.0]
    for i, (mine, other) in enumerate(zip(grads, exact_grads, strict=True)):
        terms = 1 if i == 0 else counted
        slack = 8 * share * float(largest[i]) * terms * (rounding + 2 * eps) + 2 * eps * other.abs()
        assert ((mine - other).abs() <= slack + (2.0**-23 if dtype == torch.float16 else 0.0)).all()


@settings(max_examples=max(EXAMPLES, settings().max_examples))
@given(drawn=calls())
def test_any_call(backend: str, drawn: dict) -> None:
    check(backend, drawn)
