"""Bias, GELU or ReLU, dropout: against PyTorch in float64, by hand, masks, layouts, odd values, errors."""

import math
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nlpfast import bias_gelu, bias_relu, dispatch
from nlpfast.ops.attention.reference import dropout_keep
from nlpfast.testing import between_canaries, layouts, poison

OP = "bias_gelu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["none", "tanh", "relu"]
# around groups of 8 rows and registers of 4, 8 and 16 floats; enough for two threads and for all chunks
SHAPES = [(1, 1), (7, 3), (8, 4), (9, 15), (3, 16), (17, 33), (2, 300), (1, 1024), (600, 40)]
CASES: Counter[str] = Counter()
EXAMPLES = 100 if "ATEN_CPU_CAPABILITY" in os.environ else 400


def inputs(N: int, C: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """Return x and bias; the sums are where GELU bends."""
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(N, C, generator=generator), torch.randn(C, generator=generator)
    return [(2 * x).to(dtype), bias]


def activated(*arguments, kind: str = "none", **options) -> Tensor:
    """Return what the op gives."""
    if kind == "relu":
        return bias_relu(*arguments, **options)
    return bias_gelu(*arguments, approximate=kind, **options)


def pytorch(v: Tensor, kind: str) -> Tensor:
    """Return the activation of v."""
    return F.relu(v) if kind == "relu" else F.gelu(v, approximate=kind)


def results(tensors, upstream, *options, **keywords) -> list[Tensor]:
    """Return the output, and the gradients of both inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = activated(*leaves, *options, **keywords)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def factors(shape, dropout_p: float, seed: int) -> Tensor:
    """Return what dropout multiplies by."""
    threshold = round(65536 * dropout_p)
    if not threshold:
        return torch.ones(shape, dtype=torch.float64)
    keep = dropout_keep(torch.tensor([seed, 0]), threshold / 65536, (1, 1, *shape))[0, 0]
    return keep.double() * 65536 / (65536 - threshold)


def exact(tensors, upstream, dropout_p: float, kind: str, seed: int) -> list[Tensor]:
    """The same by PyTorch's own operations in float64."""
    x, bias = (x.detach().double().requires_grad_() for x in tensors)
    v = x + bias
    if kind == "relu":
        # on the same side of the bend, however small it is
        v = v + ((tensors[0].float() + tensors[1]).double() - v).detach()
    out = pytorch(v, kind) * factors(x.shape, dropout_p, seed)
    return [out.detach(), *torch.autograd.grad(out, (x, bias), upstream.double())]


def assert_close(
    found: list[Tensor], wanted: list[Tensor], upstream: Tensor, dtype, dropout_p: float
) -> None:
    rows, largest = max(1, len(upstream)), max([1.0, *upstream.double().abs().flatten().tolist()])
    for name, x, y in zip(("out", "dx", "d_bias"), found, wanted, strict=True):
        kind = torch.float32 if name == "d_bias" else dtype
        assert x.dtype == kind, name
        # one rounding of the result, and those of the sum v and of the function, which is shorter for 16 bits
        small = (1e-6 if dtype == torch.float32 else 2e-5) / (1 - dropout_p)
        bound = torch.finfo(kind).eps * y.abs() + small * (1 if name == "out" else 2 * largest)
        if name == "d_bias":
            bound = bound * rows**0.5
            if dtype != torch.float32:
                # each of its terms is right to much less than a rounding of it
                bound = bound + 5e-5 / (1 - dropout_p) * upstream.double().abs().sum(0)
        assert ((x.double() - y).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_pytorch_in_float64(backend, shape, kind, dropout_p, dtype):
    tensors, upstream = inputs(*shape, dtype), torch.randn(shape).to(dtype)
    options = {"kind": kind, "seed": 11, "backend": backend}
    with poison():
        found = results(tensors, upstream, dropout_p, **options)
    assert_close(found, exact(tensors, upstream, dropout_p, kind, 11), upstream, dtype, dropout_p)


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_of_number(backend, kind):
    """Values from 1e-30 to 1e30 of both signs, zeros too: nothing overflows on the way."""
    sizes = torch.logspace(-30, 30, 241)
    values = torch.cat((sizes, -sizes, torch.linspace(-20, 20, 4001), torch.zeros(2)))[None]
    x = values.clone().requires_grad_()
    out = activated(x, kind=kind, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    wide = values.double().requires_grad_()
    want = pytorch(wide, kind)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    # PyTorch's own is nan where the cube is infinite and the share 0
    slope = torch.where(wide < -1e3, 0.0, torch.where(wide > 1e3, 1.0, slope))
    assert ((out.double() - want).abs() <= 3e-7 * values.abs().double() + 1e-40).all()
    assert ((grad.double() - slope).abs() <= 1e-6).all()


def test_small_results_are_right_to_their_last_digits():
    """1 + erf is 0 below -6 in float32; here the share of a negative number keeps its digits."""
    x = torch.linspace(-12, -1, 1000)
    want = x.double() * 0.5 * torch.erfc(x.double() * -math.sqrt(0.5))
    assert ((bias_gelu(x, backend="cpu").double() / want - 1).abs() < 1e-5).all()


def test_by_hand(backend):
    """The normal distribution function is 0.8413447 at 1 and 0.9772499 at 2."""
    x, bias = torch.tensor([[0.0, 0.0, 2.0, -3.0]]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    want = torch.tensor([[0.0, 0.8413447, 2 * 0.9772499, -2 * 0.0227501]])
    torch.testing.assert_close(bias_gelu(x, bias, backend=backend), want)
    assert bias_relu(x, bias, backend=backend).tolist() == [[0.0, 1.0, 2.0, 0.0]]
    # tanh(sqrt(2 / pi) 1.044715) = 0.6823839 at 1
    assert bias_gelu(x, bias, approximate="tanh", backend=backend)[0, 1].item() == pytest.approx(0.841192)


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nan_as_pytorch_has_them(backend, kind):
    """And those of one row reach no other."""
    x, bias = inputs(20, 17)
    clean = activated(x, bias, kind=kind, backend=backend)
    x[3, 5], x[8, 2], x[9, 16] = math.nan, math.inf, -math.inf
    out = activated(x, bias, kind=kind, backend=backend)
    assert out[3, 5].isnan() and out[8, 2] == math.inf and not out[9, 16] > 0
    out[3, 5], out[8, 2], out[9, 16] = clean[3, 5], clean[8, 2], clean[9, 16]
    assert torch.equal(out, clean)


def test_the_mask_is_that_of_attention(backend):
    """Row n and column c have the bits of query n and key c; what stays is over what is left of 1."""
    seed = torch.tensor([-123456789, 4])
    out = bias_gelu(torch.full((21, 300), 50.0), None, 0.25, seed=seed, backend=backend)
    keep = dropout_keep(seed, 0.25, (1, 1, 21, 300))[0, 0]
    torch.testing.assert_close(out, 50.0 * keep.float() / 0.75)
    assert 0 < keep.sum() < keep.numel()


def test_no_dropout_takes_no_number_and_dropout_two(backend):
    tensors = inputs(5, 6)
    before = torch.get_rng_state()
    bias_gelu(*tensors, backend=backend)
    bias_gelu(*tensors, 1e-6, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (bias_gelu(*tensors, 0.5, backend=backend) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(before)
    seed = torch.randint(2**63 - 1, (2,))
    assert torch.equal(bias_gelu(*tensors, 0.5, seed=seed, backend=backend), first)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts_give_the_same_bits(backend, dtype):
    x, bias = inputs(30, 24, dtype)
    upstream = torch.randn(2, 3, 5, 24).to(dtype)
    options = {"seed": 5, "backend": backend}
    wanted = results([x.view(2, 3, 5, 24), bias], upstream, 0.3, **options)
    wide = torch.randn(24, 3)
    wide[:, 1] = bias
    for name, laid in layouts(x.view(2, 3, 5, 24)).items():
        strided = upstream.transpose(0, 1).contiguous().transpose(0, 1)
        found = results([laid, wide[:, 1]], strided, 0.3, **options)
        assert all(map(torch.equal, found, wanted)), name


def test_no_stray_access(backend):
    for shape in ((3, 5), (9, 33)):
        checked = [between_canaries(x) for x in (*inputs(*shape), torch.randn(shape))]
        x, bias, upstream = (x for x, _ in checked)
        found = results([x, bias], upstream, 0.3, seed=1, backend=backend)
        assert all(x.isfinite().all() for x in found)
        for _, intact in checked:
            intact()


def test_no_rows(backend):
    found = results(inputs(0, 7), torch.empty(0, 7), 0.3, backend=backend)
    assert [list(x.shape) for x in found] == [[0, 7], [0, 7], [7]] and not found[2].any()


def test_without_bias_and_of_other_dtypes(backend):
    x, bias = inputs(9, 12)
    out = bias_gelu(x, backend=backend)
    assert torch.equal(out, bias_gelu(x, torch.zeros(12), backend=backend))
    narrow = bias.bfloat16().requires_grad_()
    out = bias_gelu(x, narrow, backend=backend)
    assert torch.autograd.grad(out.sum(), narrow)[0].dtype == torch.bfloat16
    assert torch.equal(out, bias_gelu(x, narrow.float(), backend=backend))


@pytest.mark.parametrize("wants", ["x", "bias"])
def test_one_gradient_alone(backend, wants):
    x, bias = inputs(9, 12)
    upstream = torch.randn(9, 12)
    wanted = results([x, bias], upstream, backend=backend)[1 if wants == "x" else 2]
    leaf = (x if wants == "x" else bias).requires_grad_()
    assert torch.equal(torch.autograd.grad(bias_gelu(x, bias, backend=backend), leaf, upstream)[0], wanted)


def test_threads_do_not_matter():
    tensors, before = inputs(500, 96), torch.get_num_threads()
    upstream, found = torch.randn(500, 96), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(tensors, upstream, 0.2, seed=1, backend="cpu"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_inputs_are_left_alone(backend):
    tensors, upstream = inputs(9, 12), torch.randn(9, 12)
    copies = [x.clone() for x in (*tensors, upstream)]
    results(tensors, upstream, backend=backend)
    assert all(map(torch.equal, (*tensors, upstream), copies))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tensors = [x.double().requires_grad_() for x in inputs(5, 6)]
    assert torch.autograd.gradcheck(lambda *a: activated(*a, 0.3, kind=kind, seed=3), tuple(tensors))


@pytest.mark.parametrize(("kind", "name"), [("tanh", "gelu"), ("relu", "relu")])
def test_no_second_derivative(backend, kind, name):
    x, bias = (x.requires_grad_() for x in inputs(3, 4))
    out = activated(x, bias, kind=kind, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"bias_{name} has no second derivatives: use F\.{name}"):
        grad.sum().backward()


def test_compiled_as_one_graph(backend):
    tensors = [x.requires_grad_() for x in inputs(9, 12)]

    def call(*tensors):
        return bias_gelu(*tensors, 0.3, seed=3, backend=backend) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(*tensors).square().sum(), tensors),
        torch.autograd.grad(call(*tensors).square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@settings(max_examples=EXAMPLES)
@given(
    st.integers(0, 40),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.integers(-(2**63), 2**63 - 1),
)
def test_any_call(N, C, dtype, kind, dropout_p, seed):
    tensors = inputs(N, C, dtype, seed % 2**32)
    upstream = torch.randn(N, C, generator=torch.Generator().manual_seed(N)).to(dtype)
    found = results(tensors, upstream, dropout_p, kind=kind, seed=seed)
    wanted = exact(tensors, upstream, dropout_p, kind, seed)
    assert_close(found, wanted, upstream, dtype, dropout_p)
    CASES[f"{dtype}, {kind}"] += 1


def test_float64_is_served_by_the_definition():
    x, bias = (x.double() for x in inputs(3, 4))
    assert bias_gelu(x, bias, 0.3, seed=1).dtype == torch.float64
    assert dispatch.choose(OP, "cpu", None, (x,)) is dispatch.registry[OP]["reference"]
    with pytest.raises(RuntimeError, match=r"it computes in float32, bfloat16 and float16, and x is"):
        bias_gelu(x, bias, backend="cpu")


X, B = torch.ones(2, 3), torch.ones(3)
ERRORS = {
    "scalar": (ValueError, r"x has the shape \[\]", (torch.ones(()),), {}),
    "no channels": (ValueError, "at least one channel", (torch.ones(2, 0),), {}),
    "integers": (TypeError, "x has the dtype torch.int64", (X.long(),), {}),
    "kind": (ValueError, "approximate is 'erf'; it must be 'none' or 'tanh'", (X,), {"approximate": "erf"}),
    "bias": (ValueError, r"bias has the shape \[2\]; it must be \[C\] = \[3\]", (X, B[:2]), {}),
    "whole bias": (TypeError, "bias has the dtype torch.int64", (X, B.long()), {}),
    "device": (ValueError, "bias is on meta; it must be on x's cpu", (X, B.to("meta")), {}),
    "negative": (ValueError, "dropout_p is -0.1", (X, B, -0.1), {}),
    "one": (ValueError, "dropout_p is 1.0; it must be at least 0 and below 1", (X, B, 1.0), {}),
    "unhashable": (ValueError, r"approximate is \['none'\]", (X,), {"approximate": ["none"]}),
    "backend": (ValueError, "bias_gelu has no such backend", (X, B), {"backend": "tpu"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, words, arguments, options = ERRORS[name]
    with pytest.raises(error, match=words):
        bias_gelu(*arguments, **options)


def test_native_arguments_are_checked():
    forward, backward = torch.ops.nlpfast.bias_gelu_forward, torch.ops.nlpfast.bias_gelu_backward
    for arguments, words in (
        ((X.double(), B, 0, None, 0), "x must be float32"),
        ((X[0], B, 0, None, 0), r"x must be \[N, C\]"),
        ((torch.ones(3, 2).mT, B, 0, None, 0), "x must be a contiguous CPU tensor"),
        ((X, B[:2], 0, None, 0), "bias must be a contiguous CPU tensor with 3 elements"),
        ((X, B.half(), 0, None, 0), "bias must be float32"),
        ((X, B, 0, None, 5), "seed must be given with dropout"),
        ((X, B, 0, None, 65536), "threshold must be in"),
        ((X, B, 3, None, 0), "activation must be 0, 1 or 2, got 3"),
    ):
        with pytest.raises(RuntimeError, match=words):
            forward(*arguments)
        with pytest.raises(RuntimeError, match=words):
            backward(X, *arguments)
    for grad, words in ((X[:1], "grad must be a contiguous"), (X.half(), "grad must have the dtype of x")):
        with pytest.raises(RuntimeError, match=words):
            backward(grad, X, B, 0, None, 0)
