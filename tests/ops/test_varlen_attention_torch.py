"""Packed attention as a citizen of PyTorch: compile, autocast, threads, memory, the operations, errors."""

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from nlpfast import varlen_attention
from nlpfast.testing import between_canaries, make_inputs, poison

OP = "varlen_attention"
OPS = torch.ops.nlpfast
CU_Q, CU_K, MAX_Q, MAX_K = torch.tensor([0, 5, 5, 22, 23]), torch.tensor([0, 7, 9, 42, 42]), 17, 33
VARIANTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_align": "bottom_right"},
    "dropout": {"dropout_p": 0.3, "seed": 11, "is_causal": True},
    "lse": {"return_lse": True},
}


def inputs(factor: int = 1, **kwargs) -> tuple[Tensor, ...]:
    """Query, key and value of ``factor`` times the batch above, which want gradients."""
    drawn = make_inputs(1, 4, 23 * factor, 42 * factor, 8, Hk=2, **kwargs)
    return tuple(x[0].transpose(0, 1).contiguous().requires_grad_() for x in drawn)


def call(*tensors: Tensor, cu_seq: tuple = (CU_Q, CU_K), **kwargs) -> Tensor | tuple[Tensor, Tensor]:
    return varlen_attention(*tensors, *cu_seq, MAX_Q, MAX_K, enable_gqa=True, **kwargs)


def run(function, tensors: tuple, upstream: Tensor | None = None, **kwargs) -> list[Tensor]:
    """Outputs and gradients of one call, with an upstream gradient that is not uniform."""
    outputs = function(*tensors, **kwargs)
    tops = list(outputs) if isinstance(outputs, tuple) else [outputs]
    grads = [torch.linspace(-1, 2, top.numel()).to(top.dtype).view(top.shape) for top in tops]
    if upstream is not None:
        grads[0] = upstream
    return [*(x.detach() for x in tops), *torch.autograd.grad(tops, tensors, grads)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"tensor {i}: {(a - e).abs().max()}"


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend: str, variant: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def attend(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        cu_seq = tensors[3:]
        return call(*tensors[:3], cu_seq=cu_seq, **VARIANTS[variant], backend=backend)

    # Inductor is slow on graphs of the definition: one is enough.
    compiler = "inductor" if variant == "lse" and not dynamic else "aot_eager"
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend=compiler)
    for factor in (1, 2) if dynamic else (1,):
        tensors = inputs(factor)
        twice = [torch.cat((cu, cu[1:] + cu[-1]))[: 4 * factor + 1] for cu in (CU_Q, CU_K)]
        actual = run(lambda *x, cu=twice: compiled(*x, *cu), tensors)
        expected = run(lambda *x, cu=twice: attend(*x, *cu), tensors)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_compile_of_a_call_that_repeats_tensors_and_chooses_its_backend() -> None:
    torch._dynamo.reset()
    x = inputs()[1]

    def attend(x: Tensor, cu_seq: Tensor) -> Tensor:
        return varlen_attention(x, x, x, cu_seq, cu_seq, MAX_K, MAX_K)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, CU_K), attend(x, CU_K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    tensors = inputs()
    with torch.autocast("cpu", dtype=dtype):
        inside = run(call, tensors, return_lse=True)
        double = call(*inputs(dtype=torch.float64), backend="reference")
    halves = tuple(x.detach().to(dtype).requires_grad_() for x in tensors)
    outside = run(call, halves, return_lse=True)
    assert inside[0].dtype == dtype and inside[1].dtype == torch.float32 and double.dtype == torch.float64
    assert_equal(inside, [*outside[:2], *(x.float() for x in outside[2:])])


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["bottom_right", "dropout"])
@pytest.mark.parametrize("lengths", [[300], [1] * 40, [70, 3, 0, 129, 40]], ids=str)
def test_thread_counts_agree(backend: str, lengths: list, variant: str, dtype: torch.dtype) -> None:
    cu_seq, longest = torch.tensor([0, *lengths]).cumsum(0), max(lengths)
    drawn = make_inputs(1, 2, sum(lengths), sum(lengths), 32, dtype=dtype)
    tensors = tuple(x[0].transpose(0, 1).requires_grad_() for x in drawn)

    def attend(*x: Tensor) -> Tensor:
        return varlen_attention(*x, cu_seq, cu_seq, longest, longest, **VARIANTS[variant], backend=backend)

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 8, 8):
            torch.set_num_threads(threads)
            results.append(run(attend, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["bottom_right", "dropout", "lse"])
def test_memory(backend: str, variant: str, dtype: torch.dtype) -> None:
    """Inputs unchanged, margins intact, and nothing read from memory that was never written."""
    plain = inputs(dtype=dtype)
    upstream = torch.randn(23, 4, 8).to(dtype)
    expected = run(call, plain, upstream, **VARIANTS[variant], backend=backend)
    before = [x.detach().clone() for x in (*plain, upstream, CU_Q, CU_K)]
    surrounded = [between_canaries(x) for x in before]
    *tensors, grad, cu_seq_q, cu_seq_k = (x for x, _ in surrounded)
    leaves = tuple(x.requires_grad_() for x in tensors)
    options = {"cu_seq": (cu_seq_q, cu_seq_k), **VARIANTS[variant], "backend": backend}
    with poison():
        actual = run(call, leaves, grad, **options)
    assert_equal(actual, expected)
    assert_equal([x.detach() for x, _ in surrounded], before)
    for _, check in surrounded:
        check()


def test_seeds() -> None:
    tensors = inputs()
    torch.manual_seed(1)
    first, second = call(*tensors, dropout_p=0.5), call(*tensors, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(call(*tensors, dropout_p=0.5), first) and not torch.equal(first, second)
    seeds = (6, torch.tensor(6), torch.tensor([6, 7, 0])[::2], torch.tensor([6, 1]))
    same = [call(*tensors, dropout_p=0.5, seed=seed) for seed in seeds]
    assert torch.equal(same[1], same[0]) and torch.equal(same[2], same[0])
    assert not torch.equal(same[3], same[0])


def test_second_derivatives_are_an_error(backend: str) -> None:
    query, *rest = inputs()
    out, lse = call(query, *rest, return_lse=True, backend=backend)
    for loss in (out.sum(), lse[lse.isfinite()].sum(), out.square().sum()):
        (dq,) = torch.autograd.grad(loss, query, create_graph=True)
        with pytest.raises(RuntimeError, match="attention has no second derivatives"):
            dq.square().sum().backward(retain_graph=True)


def test_nothing_is_saved_without_a_gradient(backend: str) -> None:
    with torch.no_grad():
        assert call(*inputs(), backend=backend).grad_fn is None
    with torch.inference_mode():
        assert call(*(x.detach() for x in inputs()), backend=backend).shape == (23, 4, 8)


def forward_arguments(dropout_p: float) -> tuple:
    tensors = (x.detach() for x in inputs())
    seed = torch.tensor([5, 6]) if dropout_p else None
    return *tensors, CU_Q, CU_K, MAX_Q, MAX_K, seed, dropout_p, 2, 0.3


def backward_arguments(dropout_p: float) -> tuple:
    forward = forward_arguments(dropout_p)
    results = OPS.varlen_attention_forward(*forward)
    upstream = torch.randn_like(results[0]), torch.randn_like(results[1])
    return *upstream, *forward[:3], *results, *forward[3:]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(dropout_p: float) -> None:
    opcheck(OPS.varlen_attention_forward, forward_arguments(dropout_p))
    opcheck(OPS.varlen_attention_backward, backward_arguments(dropout_p))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(1, 23, 4, 8), "query must have 3 dimensions"),
        (0, torch.randn(24, 4, 8), r"cu_seq_q\[4\] is 23; it must be 24"),
        (1, torch.randn(42, 2, 9), "key must have size 8 in dimension 2"),
        (2, torch.randn(41, 2, 8), "value must have size 42 in dimension 0"),
        (3, CU_Q.int(), "cu_seq_q must be int64"),
        (3, torch.tensor([1, 5, 5, 22, 23]), r"cu_seq_q\[0\] is 1"),
        (3, CU_Q[:0], r"cu_seq_q must be \[B \+ 1\]"),
        (4, torch.tensor([0, 9, 7, 40, 42]), r"cu_seq_k\[2\] is 7, less than the 9"),
        (4, CU_K[1:], r"cu_seq_k must be contiguous \[5\]"),
        (5, 16, "sequence 2 of cu_seq_q has length 17; it must be at most max_q = 16"),
        (6, 32, "sequence 2 of cu_seq_k has length 33; it must be at most max_k = 32"),
        (7, None, "seed must be given"),
    ],
)
def test_bad_arguments_of_the_operation_are_refused(position: int, value: object, message: str) -> None:
    arguments = list(forward_arguments(0.2))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.varlen_attention_forward(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(23, 4, 7), "grad_out must have size 8"),
        (1, torch.randn(23, 4), "grad_lse must have size 4"),
        (5, torch.randn(22, 4, 8), "out must have size 23"),
        (6, torch.randn(4, 22), "lse must have size 23"),
        (7, torch.randn(4, 24), "lse_low must have size 23"),
        (8, torch.tensor([0, 5, 5, 22, 24]), r"cu_seq_q\[4\] is 24"),
    ],
)
def test_bad_arguments_of_backward_are_refused(position: int, value: Tensor, message: str) -> None:
    arguments = list(backward_arguments(0.0))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.varlen_attention_backward(*arguments)


Q, K = torch.zeros(23, 4, 8), torch.zeros(42, 4, 8)
META = torch.device("meta")
MISTAKES = {
    "query_4d": (ValueError, r"query has the shape \[1, 23, 4, 8\]", {"query": Q[None]}),
    "key_2d": (ValueError, r"key has the shape \[4, 8\]; it must be \[total, H, D\]", {"key": K[0]}),
    "dtype": (TypeError, "value has the dtype torch.float64", {"value": K.double()}),
    "integers": (TypeError, "query has the dtype torch.int64", {"query": Q.long()}),
    "device": (ValueError, "key is on meta", {"key": K.to(META)}),
    "head_size": (ValueError, r"key has the shape \[42, 4, 7\]; D must be", {"key": K[..., 1:]}),
    "head_size_0": (ValueError, "query has the head size 0", {"query": Q[..., :0]}),
    "value_head_size_0": (ValueError, "value has the head size 0", {"value": K[..., :0]}),
    "value_rows": (ValueError, r"value has the shape \[41, 4, 8\]; it must be \[42, 4\]", {"value": K[1:]}),
    "value_heads": (ValueError, r"value has the shape \[42, 2, 8\]", {"value": K[:, :2]}),
    "heads": (ValueError, "pass enable_gqa=True", {"key": K[:, :2], "value": K[:, :2]}),
    "heads_do_not_divide": (
        ValueError,
        "multiple of key's 3",
        {"key": K[:, :3], "value": K[:, :3], "enable_gqa": True},
    ),
    "no_key_heads": (
        ValueError,
        "multiple of key's 0",
        {"key": K[:, :0], "value": K[:, :0], "enable_gqa": True},
    ),
    "cu_seq_dtype": (TypeError, "cu_seq_q has the dtype torch.float32", {"cu_seq_q": CU_Q.float()}),
    "cu_seq_2d": (ValueError, r"cu_seq_k has the shape \[1, 5\]", {"cu_seq_k": CU_K[None]}),
    "cu_seq_empty": (ValueError, r"cu_seq_q has the shape \[0\]", {"cu_seq_q": CU_Q[:0]}),
    "cu_seq_device": (ValueError, "cu_seq_k is on meta", {"cu_seq_k": CU_K.to(META)}),
    "cu_seq_sizes": (
        ValueError,
        r"cu_seq_k has the shape \[4\]; it must be that of cu_seq_q, \[5\]",
        {"cu_seq_k": CU_K[:-1]},
    ),
    "begin": (ValueError, r"cu_seq_q\[0\] is 2", {"cu_seq_q": torch.tensor([2, 5, 5, 22, 23])}),
    "decreasing": (
        ValueError,
        r"cu_seq_q\[2\] is 4; it must be between cu_seq_q\[1\] = 5 and",
        {"cu_seq_q": torch.tensor([0, 5, 4, 20, 23])},
    ),
    "end": (
        ValueError,
        r"cu_seq_k\[4\] is 41; the last sequence must end at 42",
        {"cu_seq_k": torch.tensor([0, 7, 9, 41, 41])},
    ),
    "end_int32": (
        ValueError,
        r"cu_seq_q\[4\] is 24",
        {"cu_seq_q": torch.tensor([0, 5, 5, 22, 24], dtype=torch.int32)},
    ),
    "max_q": (ValueError, r"cu_seq_q\[3\] is 22; .* 16 more, max_q: pass a larger max_q", {"max_q": 16}),
    "max_k": (ValueError, r"cu_seq_k\[3\] is 42; .* pass a larger max_k", {"max_k": 32}),
    "max_negative": (ValueError, "max_q is -1", {"max_q": -1}),
    "max_tensor": (TypeError, "max_k is of the type Tensor", {"max_k": torch.tensor(33)}),
    "align": (ValueError, "causal_align is 'left'", {"causal_align": "left"}),
    "dropout": (ValueError, "dropout_p is 1.5", {"dropout_p": 1.5}),
    "dropout_nan": (ValueError, "dropout_p is nan", {"dropout_p": math.nan}),
    "seed": (ValueError, "seed is 9223372036854775808", {"dropout_p": 0.1, "seed": 2**63}),
    "backend": (ValueError, "varlen_attention has no such backend", {"backend": "abacus"}),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named_in_one_line(mistake: str) -> None:
    kind, message, changed = MISTAKES[mistake]
    right = {"query": Q, "key": K, "value": K, "cu_seq_q": CU_Q, "cu_seq_k": CU_K}
    arguments = {**right, "max_q": MAX_Q, "max_k": MAX_K, **changed}
    with pytest.raises(kind, match=message) as caught:
        varlen_attention(**arguments)
    # What was seen, the rule, and the fix after a colon.
    assert "\n" not in str(caught.value) and ": " in str(caught.value)
