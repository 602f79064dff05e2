"""Attention as a citizen of PyTorch: compile, autocast, checkpointing, threads, layouts, memory."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlpfast import attention
from nlpfast.ops.attention import reference
from nlpfast.testing import between_canaries, eager_attention, layouts, make_inputs, poison

OP = "attention"
LENGTHS = torch.tensor([5, 17])
VARIANTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_align": "bottom_right", "key_lengths": LENGTHS},
    "dropout": {"dropout_p": 0.3, "seed": 11, "is_causal": True},
    "lse": {"return_lse": True, "key_lengths": LENGTHS},
    "prefix": {"is_causal": True, "prefix_lengths": LENGTHS},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(function, tensors, upstream: Tensor | None = None, **kwargs) -> list[Tensor]:
    """Outputs and gradients of one call, with an upstream gradient that is not uniform."""
    outputs = function(*tensors, **kwargs)
    out, lse = outputs if isinstance(outputs, tuple) else (outputs, None)
    if upstream is None:
        # In float32: linspace of more elements than float16 can count is NaN.
        upstream = torch.linspace(-1, 2, out.numel()).to(out.dtype).view(out.shape)
    tops, grads = (
        ([out], [upstream]) if lse is None else ([out, lse], [upstream, torch.linspace(0, 1, lse.numel())])
    )
    grads = [g.view(t.shape) if g is not upstream else g for t, g in zip(tops, grads, strict=True)]
    return [*(x.detach() for x in tops), *torch.autograd.grad(tops, tensors, grads)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"tensor {i}: {(a - e).abs().max()}"


def inputs(L: int = 19, S: int = 17, D: int = 8, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    return make_inputs(2, 4, L, S, D, requires_grad=True, **kwargs)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend: str, variant: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return attention(*tensors, **VARIANTS[variant], backend=backend)

    # Inductor is slow on graphs of the definition: one here and one in the test of dropout below.
    compiler = "inductor" if variant == "bottom_right" and not dynamic else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=compiler)
    for L in (19, 33) if dynamic else (19,):
        tensors = inputs(L)
        for a, e in zip(run(compiled, tensors), run(call, tensors), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_compile_of_a_call_that_repeats_a_tensor_and_chooses_its_backend() -> None:
    torch._dynamo.reset()
    x = inputs()[1]

    def call(x: Tensor) -> Tensor:
        return attention(x, x, x, is_causal=True, key_lengths=LENGTHS, prefix_lengths=LENGTHS)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


def test_compiled_dropout_draws_anew_and_its_backward_agrees(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: attention(*x, dropout_p=0.5, backend=backend), fullgraph=True)
    query, key, _ = inputs()
    # The output is linear in value: out . grad must equal value . dvalue exactly when both saw one mask.
    value = torch.randn(2, 4, 17, 8, requires_grad=True)
    outs = [compiled(query, key, value) for _ in range(2)]
    assert not torch.equal(*outs)
    for out in outs:
        grad = torch.randn_like(out)
        (dv,) = torch.autograd.grad(out, value, grad)
        torch.testing.assert_close((out * grad).sum(), (value * dv).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    tensors = inputs()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = attention(*tensors, is_causal=True, return_lse=True)
        assert out.dtype == F.scaled_dot_product_attention(*tensors, is_causal=True).dtype == dtype
        # Backward inside the region, where products would be cast if the definition let them.
        grads = torch.autograd.grad(out.float().square().sum() + lse.sum(), tensors)
    halves = tuple(x.detach().to(dtype).requires_grad_() for x in tensors)
    expected, expected_lse = attention(*halves, is_causal=True, return_lse=True)
    outside = torch.autograd.grad(expected.float().square().sum() + expected_lse.sum(), halves)
    assert lse.dtype == torch.float32
    assert_equal([out, lse, *grads], [expected, expected_lse, *(x.float() for x in outside)])
    assert all(x.dtype == torch.float32 for x in grads)


def test_autocast_leaves_float64_and_gradients_of_a_float_mask(backend: str) -> None:
    mask = torch.randn(19, 17, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = attention(*inputs(dtype=torch.float64), backend="reference")
        attention(*inputs(), mask).float().sum().backward()
    assert double.dtype == torch.float64
    assert mask.grad is not None and mask.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpointing(backend: str, reentrant: bool, dropout_p: float) -> None:
    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, dropout_p=dropout_p, backend=backend) * 2

    def recomputed(*tensors: Tensor) -> Tensor:
        out = checkpoint(call, *tensors, use_reentrant=reentrant)
        assert isinstance(out, Tensor)
        return out

    def gradients(function) -> list[Tensor]:
        tensors = inputs()
        torch.manual_seed(7)
        out = function(*tensors)
        out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape))
        return [out.detach(), *(x.grad for x in tensors)]

    assert_equal(gradients(recomputed), gradients(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_250_times(backend: str, dtype: torch.dtype) -> None:
    tensors = inputs(65, 70, dtype=dtype)
    expected = run(attention, tensors, dropout_p=0.2, seed=1, is_causal=True, backend=backend)
    # The interpreter takes a second each time; on a device 250 times are in test_attention_cuda_torch.py.
    for _ in range(10 if backend == "triton" else 250):
        assert_equal(
            run(attention, tensors, dropout_p=0.2, seed=1, is_causal=True, backend=backend), expected
        )


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["causal", "dropout"])
@pytest.mark.parametrize(("B", "H", "L"), [(1, 1, 300), (3, 5, 129), (16, 8, 33)])
def test_thread_counts_agree(backend: str, variant: str, B: int, H: int, L: int, dtype: torch.dtype) -> None:
    tensors = make_inputs(B, H, L, L, 32, dtype=dtype, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(run(attention, tensors, **VARIANTS[variant], backend=backend))
    finally:
        torch.set_num_threads(before)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


# The interpreter has one state for all threads.
@pytest.mark.long
def test_sixteen_threads_equal_serial_calls(backend: str) -> None:
    cases = [inputs(20 + i, 17, seed=i) for i in range(16)]
    serial = [run(attention, case, dropout_p=0.1, seed=i, backend=backend) for i, case in enumerate(cases)]
    parallel: list = [None] * 16
    start = threading.Barrier(16)

    def work(i: int) -> None:
        start.wait()
        for _ in range(5):
            parallel[i] = run(attention, cases[i], dropout_p=0.1, seed=i, backend=backend)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, e in zip(parallel, serial, strict=True):
        assert_equal(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize(("L", "S", "D"), [(1, 1, 1), (33, 65, 40), (17, 1, 33), (65, 33, 64)])
@pytest.mark.parametrize("variant", ["plain", "causal", "dropout"])
def test_layouts_give_the_same_bits(
    backend: str, layout: str, L: int, S: int, D: int, variant: str, dtype: torch.dtype
) -> None:
    query, key, value = make_inputs(2, 3, L, S, D, dtype=dtype)
    upstream = torch.randn(2, 3, L, D).to(dtype)
    expected = run(
        attention,
        [x.requires_grad_() for x in (query, key, value)],
        upstream,
        **VARIANTS[variant],
        backend=backend,
    )
    laid = [layouts(x.detach())[layout].requires_grad_() for x in (query, key, value)]
    actual = run(attention, laid, layouts(upstream)[layout], **VARIANTS[variant], backend=backend)
    assert_equal(actual, expected)


@pytest.mark.parametrize("S", [1, 32, 33, 65])
def test_expanded_inputs_and_upstream(backend: str, S: int) -> None:
    query, key, value = (x.requires_grad_() for x in make_inputs(1, 1, 5, S, 16))
    upstream = torch.randn(1, 1, 1, 1).expand(3, 4, 5, 16)

    def copied(*tensors: Tensor) -> Tensor:
        return attention(*(x.expand(3, 4, -1, -1).contiguous() for x in tensors), backend=backend)

    def expanded(*tensors: Tensor) -> Tensor:
        return attention(*(x.expand(3, 4, -1, -1) for x in tensors), backend=backend)

    expected = run(copied, (query, key, value), upstream.contiguous())
    assert_equal(run(expanded, (query, key, value), upstream), expected)


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *[(torch.float32, torch.bool), (torch.float32, torch.float32)],
        *[(torch.bfloat16, torch.bool), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ],
    ids=str,
)
def test_layouts_of_a_mask_give_the_same_bits(
    backend: str, layout: str, dtype: torch.dtype, kind: torch.dtype
) -> None:
    tensors = inputs(33, 65, dtype=dtype)
    mask = torch.randn(2, 4, 33, 65) if kind != torch.bool else torch.rand(2, 4, 33, 65) < 0.7
    laid = layouts(torch.where(mask, 1.0, 0.0))[layout] != 0 if kind == torch.bool else None
    if kind == torch.bool:
        # Comparing keeps dense strides only; cut the others out again.
        laid = torch.nn.functional.pad(mask, (1, 2))[..., 1:-2] if layout == "sliced" else laid
    else:
        mask = mask.to(kind)
        laid = layouts(mask)[layout]
    expected = run(attention, tensors, attn_mask=mask, backend=backend)
    assert_equal(run(attention, tensors, attn_mask=laid, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["bottom_right", "dropout", "prefix"])
def test_memory(backend: str, variant: str, dtype: torch.dtype) -> None:
    """Inputs unchanged, margins intact, and nothing read from memory that was never written."""
    plain = inputs(31, 33, 24, dtype=dtype)
    upstream = torch.randn(2, 4, 31, 24).to(dtype)
    expected = run(attention, plain, upstream, **VARIANTS[variant], backend=backend)
    surrounded = [between_canaries(x) for x in (*plain, upstream)]
    *tensors, grad = (x for x, _ in surrounded)
    with poison():
        actual = run(
            attention, [x.requires_grad_() for x in tensors], grad, **VARIANTS[variant], backend=backend
        )
    assert_equal(actual, expected)
    assert_equal([*tensors, grad], [*plain, upstream])
    for _, check in surrounded:
        check()


@pytest.mark.long
def test_many_heads(backend: str) -> None:
    tensors = make_inputs(4, 16_400, 2, 3, 2, requires_grad=True)
    actual = run(attention, tensors, is_causal=True, dropout_p=0.5, seed=2, backend=backend)
    keep = reference.dropout_keep(torch.tensor([2, 0]), 0.5, (4, 16_400, 2, 3))
    causal = torch.ones(2, 3, dtype=torch.bool).tril()

    def eager(*x: Tensor) -> Tensor:
        return eager_attention(*x, allowed=causal.expand(4, 16_400, 2, 3), keep=keep, dropout_p=0.5)[0]

    for a, e in zip(actual, run(eager, tensors), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_an_error(backend: str) -> None:
    query, key, value = inputs()
    out, lse = attention(query, key, value, return_lse=True, backend=backend)
    # Upstream gradients that are constants: nothing but the inputs ties the gradient to the graph.
    for loss in (out.sum(), lse.sum(), (out.square() * 2).sum()):
        (dq,) = torch.autograd.grad(loss, query, create_graph=True)
        with pytest.raises(RuntimeError, match="attention has no second derivatives"):
            (dq.square().sum() + loss).backward(retain_graph=True)
    dv = torch.autograd.grad(out.sum(), value, create_graph=True)[0]
    torch.testing.assert_close(dv.detach(), torch.autograd.grad(out.sum(), value)[0])


def test_nothing_is_saved_without_a_gradient(backend: str) -> None:
    with torch.no_grad():
        assert attention(*inputs(), backend=backend).grad_fn is None
    assert attention(*make_inputs(1, 1, 2, 3, 4), backend=backend).grad_fn is None
    with torch.inference_mode():
        assert attention(*make_inputs(1, 1, 2, 3, 4), backend=backend).shape == (1, 1, 2, 4)
