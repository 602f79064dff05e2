"""Cross entropy in PyTorch: layouts, memory, in place, backward twice, compile, and searched calls."""

import math
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlpfast import cross_entropy, dispatch
from nlpfast.testing import between_canaries, layouts, poison

OP = "cross_entropy"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100
CASES: Counter[str] = Counter()
OPTIONS = {"label_smoothing": 0.1}
# Triton's interpreter takes some milliseconds for a row.
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLES = 150 if INTERPRETER else 2000


def inputs(
    B: int = 3, T: int = 5, V: int = 1100, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    x, target = torch.randn(B, T, V).to(dtype), torch.randint(V, (B, T))
    target[0, 1] = IGNORED
    return x.requires_grad_(), target


def run(x: Tensor, target: Tensor, upstream: Tensor | float = 1.0, **options) -> list[Tensor]:
    loss = cross_entropy(x, target, **{**OPTIONS, **options})
    (grad,) = torch.autograd.grad(loss, x, torch.as_tensor(upstream).expand(loss.shape), retain_graph=True)
    return [loss.detach(), grad]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"result {i}: {(a - b).abs().max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none", "sequence"])
def test_layouts_give_the_same_bits(backend, dtype, reduction) -> None:
    x, target = inputs(4, 6, 33, dtype)
    x4 = x.detach().view(2, 2, 6, 33)
    expected = run(x, target, reduction=reduction, backend=backend)
    for laid in layouts(x4).values():
        y = laid.reshape(4, 6, 33) if laid.is_contiguous() else laid.flatten(0, 1)
        found = run(y.detach().requires_grad_(), target, reduction=reduction, backend=backend)
        assert_equal(found, expected)
    wide = torch.randn(4, 7, 33).to(dtype)
    wide[:, :-1] = x.detach()
    shifted = wide.requires_grad_()
    loss = cross_entropy(shifted[:, :-1], target, reduction=reduction, **OPTIONS, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), shifted)
    assert_equal([loss.detach(), grad[:, :-1]], run(x, target, reduction=reduction, backend=backend))
    assert (grad[:, -1] == 0).all()
    columns = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not columns.is_contiguous()
    assert_equal(run(columns, target, reduction=reduction, backend=backend), expected)


def test_expanded_logits_and_upstream(backend) -> None:
    row, target = torch.randn(1, 1, 40), torch.randint(40, (3, 5))
    copied = row.expand(3, 5, 40).contiguous().requires_grad_()
    leaf = row.requires_grad_()
    for options in ({"reduction": "none"}, {"reduction": "mean"}, {"reduction": "mean", "inplace": True}):
        expected = cross_entropy(copied, target, reduction=options["reduction"], backend=backend)
        (wanted,) = torch.autograd.grad(expected.sum(), copied)
        loss = cross_entropy(leaf.expand(3, 5, 40), target, **options, backend=backend)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert torch.equal(loss, expected)
        torch.testing.assert_close(grad, wanted.sum((0, 1), keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 17, 1100])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory(backend, dtype, V, reduction) -> None:
    """Inputs unchanged, margins intact, and nothing read from memory that was never written."""
    x, target = inputs(2, 3, V, dtype)
    expected = run(x, target, reduction=reduction, backend=backend)
    inside, check = between_canaries(x)
    inner, check_target = between_canaries(target)
    with poison():
        found = run(inside.requires_grad_(), inner, reduction=reduction, backend=backend)
    assert_equal(found, expected)
    assert torch.equal(inside.detach(), x.detach()) and torch.equal(inner, target)
    check()
    check_target()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_in_place(backend, dtype, reduction, factor) -> None:
    x, target = inputs(dtype=dtype)
    options = {"reduction": reduction, **OPTIONS, "backend": backend}
    loss = cross_entropy(x, target, **options)
    upstream = factor * torch.ones(loss.shape)
    (expected,) = torch.autograd.grad(loss, x, upstream)
    kept, check = between_canaries(x)
    logits = kept.requires_grad_() * 1
    address = logits.data_ptr()
    found = cross_entropy(logits, target, inplace=True, **options)
    assert torch.equal(found, loss)
    assert torch.equal(kept, x)
    grads = []
    logits.register_hook(grads.append)
    found.backward(upstream)
    if factor == 1.0 and reduction in ("mean", "sum"):
        assert torch.equal(kept.grad, expected)
    else:
        # rounded once more where the upstream gradient is another than foreseen
        limit = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(kept.grad, expected, rtol=limit, atol=limit / 2**3)
    assert grads[0].data_ptr() == address
    check()


def test_in_place_is_seen_by_autograd(backend) -> None:
    x, target = inputs()
    logits = x.exp()
    loss = cross_entropy(logits, target, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_is_for_one_backward(backend) -> None:
    x, target = inputs()
    logits = x * 1
    loss = cross_entropy(logits, target, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="drop inplace=True to call backward twice"):
        loss.backward()


def test_in_place_without_a_gradient_leaves_the_logits(backend) -> None:
    x, target = inputs()
    before = x.detach().clone()
    with torch.no_grad():
        cross_entropy(x, target, inplace=True, backend=backend)
    assert torch.equal(x, before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_and_with_other_upstream_gradients(backend, reduction) -> None:
    x, target = inputs()
    loss = cross_entropy(x, target, reduction=reduction, **OPTIONS, backend=backend)
    ones = torch.ones(loss.shape)
    first, second, half = (
        torch.autograd.grad(loss, x, ones * f, retain_graph=True)[0] for f in (1.0, 1.0, 0.5)
    )
    first.zero_()
    (third,) = torch.autograd.grad(loss, x, ones)
    torch.testing.assert_close(third, second, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(half, 0.5 * second, rtol=1e-5, atol=1e-9)


def test_the_gradient_is_not_copied_for_a_leaf() -> None:
    x, target = inputs()
    seen = []
    x.register_hook(lambda grad: seen.append(grad.data_ptr()))
    cross_entropy(x, target, backend="cpu").backward()
    assert x.grad is not None and seen == [x.grad.data_ptr()]


def test_second_derivatives_are_an_error(backend) -> None:
    x, target = inputs(V=9)
    (grad,) = torch.autograd.grad(cross_entropy(x, target, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cross_entropy has no second derivatives: use F\.cross_entropy"):
        grad.square().sum().backward()


def test_same_bits_250_times_and_for_any_number_of_threads(backend) -> None:
    x, target = inputs(*((2, 3) if INTERPRETER else (8, 16)), 1500)
    expected = run(x, target, backend=backend), run(x, target, reduction="none", backend=backend)
    for _ in range(3 if INTERPRETER else 250):
        assert_equal(run(x, target, backend=backend), expected[0])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            if backend != "reference":
                assert_equal(run(x, target, backend=backend), expected[0])
                assert_equal(run(x, target, reduction="none", backend=backend), expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_gradients_past_the_caches_are_the_same(dtype, offset) -> None:
    """From 16 MB on they are written another way; rows of an odd length begin anywhere in a cache line."""
    V = 4099 + offset
    rows = (16 << 20) // (V * dtype.itemsize) + 2
    x = torch.randn(rows, V)
    # the exponentials of a row are then relative to two numbers, one after the other
    x[:, 2048:] += 63.0
    x[:, :2048] += 40.0 * (torch.arange(2048) > 2030)
    x = x.to(dtype).requires_grad_()
    target = torch.randint(V, (rows,))
    for reduction in ("sum", "none"):
        loss = cross_entropy(x, target, reduction=reduction, **OPTIONS, backend="cpu")
        (large,) = torch.autograd.grad(loss.sum(), x)
        for begin in (0, rows - 3):
            part = x.detach()[begin : begin + 3].clone().requires_grad_()
            loss = cross_entropy(
                part, target[begin : begin + 3], reduction=reduction, **OPTIONS, backend="cpu"
            )
            (small,) = torch.autograd.grad(loss.sum(), part)
            limit = 2**-7 if dtype == torch.bfloat16 else 2**-10 if dtype == torch.float16 else 1e-6
            torch.testing.assert_close(large[begin : begin + 3], small, rtol=limit, atol=1e-7)
        assert torch.isfinite(large).all()


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend, reduction, dynamic) -> None:
    torch._dynamo.reset()

    def call(x: Tensor, target: Tensor) -> Tensor:
        options = {"smoothing": "exclude_pad", "pad_index": 2, "inplace": True, **OPTIONS}
        return cross_entropy(x * 2, target, reduction=reduction, **options, backend=backend)

    # classes are not what changes from call to call
    compiled = torch.compile(call, fullgraph=True, dynamic=None if dynamic else False, backend="aot_eager")
    for T in (5, 7, 9) if dynamic else (5,):
        x, target = inputs(T=T, V=33)
        results = []
        for function in (compiled, call):
            loss = function(x, target)
            results.append([loss.detach(), torch.autograd.grad(loss.sum(), x)[0]])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype) -> None:
    x, target = inputs(2, 3, 17, dtype)
    x = x.detach()
    options = (IGNORED, -1, 0.9, 0.01)
    operations = torch.ops.nlpfast
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operations.cross_entropy_forward, (x, target, *options), test_utils=tests)
    statistics = operations.cross_entropy_forward(x, target, *options)[3]
    arguments = (torch.randn(2, 3), x, target, statistics, *options)
    torch.library.opcheck(operations.cross_entropy_backward, arguments, test_utils=tests)
    outs = ["test_schema"]
    forward = (x, target, *options, 0.5, torch.empty_like(x))
    torch.library.opcheck(operations.cross_entropy_forward_out, forward, test_utils=outs)
    torch.library.opcheck(
        operations.cross_entropy_backward_out, (*arguments, torch.empty_like(x)), test_utils=outs
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend, reentrant) -> None:
    x, target = inputs()
    expected = run(x, target, backend=backend)
    loss = checkpoint(
        lambda x: cross_entropy(x, target, **OPTIONS, backend=backend), x, use_reentrant=reentrant
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    assert_equal([loss.detach(), x.grad], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype) -> None:
    x, target = inputs(V=64)
    weight = torch.randn(64, 64, requires_grad=True)
    with torch.autocast("cpu", dtype):
        logits = F.linear(x, weight)
        loss = cross_entropy(logits, target, **OPTIONS, backend=backend)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.float32
    expected = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), **OPTIONS)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Shape, dtype, magnitude, smoothing and reduction of one call; the tensors follow from them."""
    smoothing = draw(st.sampled_from(["uniform", "fairseq", "exclude_pad"]))
    V = draw(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 1023, 1024, 1025, 1500, 2050])))
    return {
        "dtype": draw(st.sampled_from([*(DTYPES[:1] * 9 if INTERPRETER else DTYPES), torch.float64])),
        "B": draw(st.integers(0, 3)),
        "T": draw(st.integers(0, 4)),
        "V": V,
        "magnitude": 10.0 ** draw(st.integers(-4, 4)),
        "smoothing": smoothing,
        "pad_index": draw(st.integers(0, V - 1)) if smoothing == "exclude_pad" else None,
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "sequence"])),
        "ignored": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "inplace": draw(st.booleans()),
        "factor": draw(st.sampled_from([1.0, 1.0, -0.3])),
        "seed": draw(st.integers(0, 2**31)),
    }


def check(backend: str, call: dict) -> None:
    """Compare one call with log_softmax in float64, within the rounding of its own terms."""
    generator = torch.Generator().manual_seed(call["seed"])
    B, T, V = (call[name] for name in "BTV")
    magnitude = min(call["magnitude"], 1e3) if call["dtype"] == torch.float16 else call["magnitude"]
    x = (magnitude * torch.randn(B, T, V, generator=generator)).to(call["dtype"]).requires_grad_()
    target = torch.randint(V, (B, T), generator=generator)
    target[torch.rand(B, T, generator=generator) < call["ignored"]] = IGNORED
    names = ("smoothing", "pad_index", "label_smoothing", "reduction")
    options = {name: call[name] for name in names}
    if dispatch.registry[OP][backend].refusal(x, target) is not None:
        with pytest.raises(RuntimeError, match="cannot run there"):
            cross_entropy(x, target, **options, backend=backend)
        CASES[f"{backend}, refused"] += 1
        return
    CASES[f"{backend}, {call['dtype']}"] += 1
    eps, pad = call["label_smoothing"], call["pad_index"]
    others = {"uniform": V, "fairseq": V - 1, "exclude_pad": V - 2}[call["smoothing"]]
    share = eps / others if others > 0 else 0.0
    kept = (target != IGNORED) & (target != (IGNORED if pad is None else pad))
    q = torch.full((B, T, V), share, dtype=torch.float64)
    if pad is not None:
        q[..., pad] = 0.0
    own = 1.0 if others <= 0 else 1 - eps + (share if call["smoothing"] == "uniform" else 0.0)
    q.scatter_(-1, target.clamp(min=0).unsqueeze(-1), own)
    exact = x.detach().double()
    logp = exact.log_softmax(-1)
    rows = torch.where(kept, -(q * logp).sum(-1), 0.0)
    count = kept.sum()
    weight = torch.full((B, T), call["factor"], dtype=torch.float64) * kept
    weight = weight / count if call["reduction"] == "mean" else weight
    slope = torch.where(kept.unsqueeze(-1), logp.exp() - q, 0.0) * weight.nan_to_num().unsqueeze(-1)
    logits = x * 1
    loss = cross_entropy(logits, target, **options, inplace=call["inplace"], backend=backend)
    (grad,) = torch.autograd.grad(loss, x, torch.full(loss.shape, call["factor"], dtype=loss.dtype))
    wide = 2.0**-52 if call["dtype"] == torch.float64 else 2.0**-23
    # a loss is a sum of terms of the size of the logits; 1 - eps has an error of its own
    size = exact.abs().amax(-1) + rows.abs() + math.log(V)
    expected = {"none": rows, "sequence": rows.sum(-1), "sum": rows.sum()}.get(
        call["reduction"], rows.sum() / count
    )
    bound = {"none": size, "sequence": size.sum(-1), "sum": size.sum()}.get(
        call["reduction"], size.sum() / count
    )
    torch.testing.assert_close(loss.isnan(), expected.isnan())
    assert ((loss.double() - expected).abs().nan_to_num() <= 8 * wide * bound.nan_to_num()).all()
    narrow = torch.finfo(call["dtype"]).eps
    # exp of a difference has the error of its argument; float16 has no numbers below 6e-8
    slack = 2 * narrow * slope.abs() + (
        4 + exact.abs().amax(-1, keepdim=True)
    ) * 4 * wide * weight.nan_to_num().abs().unsqueeze(-1)
    slack = slack + (2.0**-24 if call["dtype"] == torch.float16 else 0.0)
    assert ((grad.double() - slope).abs() <= slack).all()


@settings(max_examples=max(EXAMPLES, settings().max_examples))
@given(call=calls())
def test_any_call(backend: str, call: dict) -> None:
    check(backend, call)
