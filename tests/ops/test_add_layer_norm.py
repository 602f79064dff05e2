"""Residual sum, dropout and layer norm: against PyTorch in float64, masks, layouts, odd values, errors."""

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

from nlpfast import add_layer_norm, dispatch
from nlpfast.ops.attention.reference import dropout_keep
from nlpfast.testing import between_canaries, layouts, poison

OP = "add_layer_norm"
# of part, residual and norm, as autocast and 16-bit models have them; one for all three
DTYPES = [
    torch.float32,
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float16),
    (torch.bfloat16,) * 3,
    (torch.float16,) * 3,
]
# around groups of 8 rows and registers of 4, 8 and 16 floats; enough for two threads and for all chunks
SHAPES = [(1, 1), (7, 3), (8, 4), (9, 15), (3, 16), (17, 33), (2, 300), (1, 1024), (600, 40)]
CASES: Counter[str] = Counter()
EXAMPLES = 100 if "ATEN_CPU_CAPABILITY" in os.environ else 500
EPS = 1e-5


def types_of(dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Return the dtypes of part, residual and norm."""
    return dtype if isinstance(dtype, tuple) else (dtype,) * 3


def inputs(N: int, C: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """Return part, residual, weight and bias."""
    types = types_of(dtype)
    generator = torch.Generator().manual_seed(seed)
    part, residual = (torch.randn(N, C, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(C, generator=generator) for _ in range(2))
    return [part.to(types[0]), (3 * residual + 1).to(types[1]), weight, bias]


def results(tensors, upstream, *options, **keywords) -> list[Tensor]:
    """Return norm, sum, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    found = add_layer_norm(*leaves, *options, **keywords)
    return [x.detach() for x in found] + list(torch.autograd.grad(found, leaves, upstream))


def exact(tensors, upstream, dropout_p: float, eps: float, seed: int) -> list[Tensor]:
    """The same by PyTorch's own operations in float64, from the sum as a tensor of its dtype has it."""
    part, residual, weight, bias = (x.detach().double().requires_grad_() for x in tensors)
    N, C = part.shape
    threshold = round(65536 * dropout_p)
    factor = torch.ones(N, C, dtype=torch.float64)
    if threshold:
        keep = dropout_keep(torch.tensor([seed, 0]), threshold / 65536, (1, 1, N, C))[0, 0]
        factor = keep.double() * 65536 / (65536 - threshold)
    total = residual + factor * part
    # rounding has the gradient of the number itself
    total = total + (total.detach().to(tensors[1].dtype).double() - total.detach())
    out = F.layer_norm(total, (C,), weight, bias, eps)
    grads = torch.autograd.grad((out, total), (part, residual, weight, bias), [g.double() for g in upstream])
    return [out.detach(), total.detach(), *grads]


def assert_close(found: list[Tensor], wanted: list[Tensor], dtype, rows: int) -> None:
    types = types_of(dtype)
    names = ("norm", "sum", "d_part", "d_residual", "d_weight", "d_bias")
    kinds = (types[2], types[1], types[0], types[1], torch.float32, torch.float32)
    for name, kind, x, y in zip(names, kinds, found, wanted, strict=True):
        assert x.dtype == kind, name
        # one rounding of the result, and sums of rows and channels in float32
        bound = torch.finfo(kind).eps * y.abs() + 2e-6 * (rows**0.5 if name[2:] in ("weight", "bias") else 1)
        scale = max([1.0, *y.abs().flatten().tolist()])
        if name == "sum":
            # and that of the product, which may be larger than the sum
            bound = 1.5 * torch.finfo(kind).eps * y.abs() + 1e-6
        assert ((x.double() - y).abs() <= bound * (1 if name == "sum" else 1 + 2 * scale)).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_pytorch_in_float64(backend, shape, dropout_p, dtype):
    tensors, types = inputs(*shape, dtype), types_of(dtype)
    upstream = [torch.randn(shape).to(types[2]), torch.randn(shape).to(types[1])]
    # a single channel has no variance: its gradients would be differences of large numbers
    eps = EPS if shape[1] > 1 else 1.0
    with poison():
        found = results(tensors, upstream, dropout_p, eps, out_dtype=types[2], seed=11, backend=backend)
    assert_close(found, exact(tensors, upstream, dropout_p, eps, 11), dtype, shape[0])


def test_by_hand(backend):
    part, residual = torch.tensor([[1.0, 0.0, 2.0, -1.0]]), torch.tensor([[0.0, 3.0, 3.0, 4.0]])
    weight, bias = torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 5.0])
    out, total = add_layer_norm(part, residual, weight, bias, eps=0.0, backend=backend)
    assert total.tolist() == [[1.0, 3.0, 5.0, 3.0]]
    # mean 3, variance 2
    torch.testing.assert_close(out, torch.tensor([[-(2**0.5), 0.0, 2**0.5, 5.0]]))


def test_the_mask_is_that_of_attention(backend):
    """Row n and column c have the bits of query n and key c; what stays is over what is left of 1."""
    part, residual = torch.ones(21, 50), torch.zeros(21, 50)
    seed = torch.tensor([-123456789, 4])
    _, total = add_layer_norm(part, residual, torch.ones(50), None, 0.25, seed=seed, backend=backend)
    keep = dropout_keep(seed, 0.25, (1, 1, 21, 50))[0, 0]
    assert torch.equal(total, keep.float() / 0.75) and 0 < keep.sum() < keep.numel()


def test_no_dropout_takes_no_number_and_dropout_two(backend):
    tensors = inputs(5, 6)
    before = torch.get_rng_state()
    add_layer_norm(*tensors, backend=backend)
    add_layer_norm(*tensors, 1e-6, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (add_layer_norm(*tensors, 0.5, backend=backend)[1] for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(before)
    assert torch.equal(add_layer_norm(*tensors, 0.5, backend=backend)[1], first)
    torch.set_rng_state(before)
    seed = torch.randint(2**63 - 1, (2,))
    assert torch.equal(add_layer_norm(*tensors, 0.5, seed=seed, backend=backend)[1], first)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts_give_the_same_bits(backend, dtype):
    types = types_of(dtype)
    part, residual, weight, bias = inputs(30, 24, dtype)
    upstream = [torch.randn(2, 3, 5, 24).to(types[2]), torch.randn(2, 3, 5, 24)]
    laid_out = [layouts(x.view(2, 3, 5, 24)) for x in (part, residual)]
    options = {"out_dtype": types[2], "seed": 5, "backend": backend}
    shaped = [part.view(2, 3, 5, 24), residual.view(2, 3, 5, 24), weight, bias]
    wanted = results(shaped, upstream, 0.3, **options)
    for name in laid_out[0]:
        wide = torch.randn(24, 3)
        wide[:, 1] = weight
        tensors = [laid_out[0][name], laid_out[1][name], wide[:, 1], bias]
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in upstream]
        found = results(tensors, strided, 0.3, **options)
        assert all(map(torch.equal, found, wanted)), name


def test_no_stray_access(backend):
    for shape in ((3, 5), (9, 33)):
        checked = [between_canaries(x) for x in inputs(*shape)]
        upstream = [between_canaries(torch.randn(shape)) for _ in range(2)]
        found = results([x for x, _ in checked], [x for x, _ in upstream], 0.3, seed=1, backend=backend)
        assert all(x.isfinite().all() for x in found)
        for _, intact in (*checked, *upstream):
            intact()


def test_no_rows(backend):
    tensors = inputs(0, 7)
    found = results(tensors, [torch.empty(0, 7)] * 2, 0.3, backend=backend)
    assert [list(x.shape) for x in found] == [[0, 7]] * 4 + [[7]] * 2
    assert not found[4].any() and not found[5].any()


@pytest.mark.parametrize("used", ["norm", "sum"])
def test_one_output_unused(backend, used):
    tensors = inputs(9, 12)
    leaves = [x.requires_grad_() for x in tensors]
    out, total = add_layer_norm(*leaves, 0.3, seed=1, backend=backend)
    upstream, zeros = torch.randn(9, 12), torch.zeros(9, 12)
    chosen = out if used == "norm" else total
    found = torch.autograd.grad(chosen, leaves, upstream)
    both = [upstream, zeros] if used == "norm" else [zeros, upstream]
    wanted = results(tensors, both, 0.3, seed=1, backend=backend)[2:]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_without_bias_and_of_other_dtypes(backend):
    part, residual, weight, bias = inputs(9, 12)
    out, _ = add_layer_norm(part, residual, weight, backend=backend)
    want, _ = add_layer_norm(part, residual, weight, torch.zeros(12), backend=backend)
    assert torch.equal(out, want)
    narrow = [weight.bfloat16().requires_grad_(), bias.bfloat16().requires_grad_()]
    out, _ = add_layer_norm(part, residual, *narrow, backend=backend)
    grads = torch.autograd.grad(out.sum(), narrow)
    assert [x.dtype for x in grads] == [torch.bfloat16] * 2
    want, _ = add_layer_norm(part, residual, *(x.float() for x in narrow), backend=backend)
    assert torch.equal(out, want)


def test_rows_do_not_depend_on_others_and_threads_do_not_matter(backend):
    tensors, before = inputs(500, 96), torch.get_num_threads()
    upstream = [torch.randn(500, 96) for _ in range(2)]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(tensors, upstream, 0.2, seed=1, backend=backend))
    torch.set_num_threads(before)
    if backend == "cpu":
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
    part, residual, *norm = tensors
    part, residual = part.clone(), residual.clone()
    part[37], residual[41] = math.nan, math.inf
    out, _ = add_layer_norm(part, residual, *norm, 0.2, seed=1, backend=backend)
    others = [n for n in range(500) if n not in (37, 41)]
    assert torch.equal(out[others], found[0][0][others])
    assert out[37].isnan().all() and out[41].isnan().all()


def test_large_means_do_not_cancel(backend):
    """A mean of 1e4 times the deviation: the variance is not a difference of squares."""
    part, residual, weight, bias = inputs(4, 256)
    residual = residual + 3e4
    out, _ = add_layer_norm(part, residual, weight, bias, backend=backend)
    want = F.layer_norm((residual + part).double(), (256,), weight.double(), bias.double())
    # a float32 mean of 3e4 is right to 2e-3
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-2)


def test_gradcheck():
    part, residual, weight, bias = (x.double().requires_grad_() for x in inputs(5, 6))

    def call(*tensors):
        return add_layer_norm(*tensors, 0.3, seed=3)

    assert torch.autograd.gradcheck(call, (part, residual, weight, bias))


def test_no_second_derivative(backend):
    tensors = [x.requires_grad_() for x in inputs(3, 4)]
    out, _ = add_layer_norm(*tensors, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"add_layer_norm has no second derivatives: use F\.layer_norm"):
        grad.sum().backward()


def test_inputs_are_left_alone(backend):
    tensors = inputs(9, 12)
    copies = [x.clone() for x in tensors]
    upstream = [torch.randn(9, 12) for _ in range(2)]
    kept = [x.clone() for x in upstream]
    results(tensors, upstream, 0.0, backend=backend)
    assert all(map(torch.equal, tensors, copies)) and all(map(torch.equal, upstream, kept))


def test_gradients_that_are_one_tensor_add_up_apart():
    """Without dropout part and residual have one gradient: what is added to one must not reach the other."""
    part, residual, weight, bias = (x.requires_grad_() for x in inputs(9, 12))
    for _ in range(2):
        out, total = add_layer_norm(part, residual, weight, bias)
        (out.sum() + total.square().sum() + residual.sum()).backward()
    torch.testing.assert_close(residual.grad - part.grad, torch.full_like(part, 2.0))


def test_checkpointing_draws_the_same_again(backend):
    tensors = [x.requires_grad_() for x in inputs(9, 12)]
    found = []
    for call in (add_layer_norm, lambda *a, **k: checkpoint(add_layer_norm, *a, use_reentrant=False, **k)):
        torch.manual_seed(4)
        out, _ = call(*tensors, 0.5, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert all(map(torch.equal, *found))


def test_compiled_as_one_graph(backend):
    tensors = [x.requires_grad_() for x in inputs(9, 12)]

    def call(*tensors):
        out, total = add_layer_norm(*tensors, 0.3, seed=3, backend=backend)
        return out * 2 + total

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
    st.integers(2, 70),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    st.integers(0, 2**31),
)
def test_any_call(N, C, dtype, dropout_p, seed):
    tensors, types = inputs(N, C, dtype, seed), types_of(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = [torch.randn(N, C, generator=generator).to(x) for x in (types[2], types[1])]
    # two channels that are nearly equal have next to no variance
    eps = 0.1
    found = results(tensors, upstream, dropout_p, eps, out_dtype=types[2], seed=seed)
    assert_close(found, exact(tensors, upstream, dropout_p, eps, seed), dtype, max(N, 1))
    CASES[f"{types[0]}, {types[1]}, {types[2]}"] += 1


def test_float64_is_served_by_the_definition():
    tensors = [x.double() for x in inputs(3, 4)]
    out, total = add_layer_norm(*tensors, 0.3, seed=1)
    assert out.dtype == total.dtype == torch.float64
    request = (*tensors[:2], torch.float64)
    assert dispatch.choose(OP, "cpu", None, request) is dispatch.registry[OP]["reference"]
    with pytest.raises(RuntimeError, match=r"it computes in float32, bfloat16 and float16, and part is"):
        add_layer_norm(*tensors, backend="cpu")


X, W = torch.ones(2, 3), torch.ones(3)
ERRORS = {
    "scalar": (ValueError, r"residual has the shape \[\]", (X, torch.ones(()), W), {}),
    "no channels": (ValueError, r"at least one channel", (torch.ones(2, 0), torch.ones(2, 0), W), {}),
    "part": (
        ValueError,
        r"part has the shape \[1, 3\]; it must be the residual's \[2, 3\]",
        (X[:1], X, W),
        {},
    ),
    "weight": (ValueError, r"weight has the shape \[2\]; it must be \[C\] = \[3\]", (X, X, W[:2]), {}),
    "bias": (ValueError, r"bias has the shape \[2\]", (X, X, W, W[:2]), {}),
    "integers": (TypeError, "residual has the dtype torch.int64", (X, X.long(), W), {}),
    "out_dtype": (TypeError, "out_dtype has the dtype torch.int8", (X, X, W), {"out_dtype": torch.int8}),
    "wider": (TypeError, "part has the dtype torch.float32; it must be the res", (X, X.bfloat16(), W), {}),
    "double": (TypeError, "part has the dtype torch.float64", (X.double(), X, W), {}),
    "device": (ValueError, "weight is on meta; it must be on the residual's cpu", (X, X, W.to("meta")), {}),
    "negative": (ValueError, "dropout_p is -0.1", (X, X, W, None, -0.1), {}),
    "one": (ValueError, "dropout_p is 1.0; it must be at least 0 and below 1", (X, X, W, None, 1.0), {}),
    "backend": (ValueError, "add_layer_norm has no such backend", (X, X, W), {"backend": "tpu"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, words, arguments, options = ERRORS[name]
    with pytest.raises(error, match=words):
        add_layer_norm(*arguments, **options)


def test_native_arguments_are_checked():
    forward, backward = torch.ops.nlpfast.add_layer_norm_forward, torch.ops.nlpfast.add_layer_norm_backward
    rest = (None, 0, EPS, torch.float32)
    for arguments, words in (
        ((X, X.double(), W, None, *rest), "residual must be float32"),
        ((X.double(), X, W, None, *rest), "part must be float32"),
        ((X, X[0], W, None, *rest), r"residual must be \[N, C\]"),
        ((X[:1], X, W, None, *rest), "part must be a contiguous CPU tensor with 6 elements"),
        ((X, X, W[:2], None, *rest), "weight must be a contiguous CPU tensor with 3 elements"),
        ((X, X, W.half(), None, *rest), "weight must be float32"),
        ((X, X, W, W[:1], *rest), "bias must be a contiguous CPU tensor with 3"),
        ((X, X, W, None, None, 5, EPS, torch.float32), "seed must be given with dropout"),
        ((X, X, W, None, None, 65536, EPS, torch.float32), "threshold must be in"),
        ((X, X, W, None, None, 0, EPS, torch.int32), "out_dtype must be float32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            forward(*arguments)
    pairs = torch.ones(2, 2)
    for arguments, words in (
        ((X[:1], None, X, pairs, W, None, 0, torch.float32), "grad_out must be a contiguous"),
        ((X, X[:1], X, pairs, W, None, 0, torch.float32), "grad_sum must be a contiguous"),
        ((X, X.half(), X, pairs, W, None, 0, torch.float32), "grad_sum must have the dtype of sum"),
        ((X, None, X, pairs[:1], W, None, 0, torch.float32), "statistics must be a contiguous"),
    ):
        with pytest.raises(RuntimeError, match=words):
            backward(*arguments)
