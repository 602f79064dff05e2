"""Packed attention on a CUDA device: values, borders, dropout, memory, graphs, compile, large sizes."""

import math
from collections import Counter

import pytest
import test_varlen_attention_properties as properties
import torch
from hypothesis import given, settings
from test_attention import hold
from test_attention_cuda import DEVICE, assert_equal, canaries, launch, pytestmark, requested_bytes  # noqa: F401
from test_attention_cuda_torch import captured, need_memory
from test_varlen_attention import BATCHES, CAUSAL, causal_arguments, cumulative, of_sequence, packed
from torch import Tensor

from nlpfast import dispatch, varlen_attention
from nlpfast.ops.attention.reference import dropout_keep
from nlpfast.testing import between_canaries, layouts, poison

OP = "varlen_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths of the queries and of the keys of batches whose gradients this kernel computes, with two key heads.
REACHED = {
    "whole_64": ([3, 0, 5, 60, 1, 17], [4, 2, 0, 60, 1, 33]),
    "whole": ([3, 70, 0, 125, 33], [100, 126, 3, 0, 17]),
    "owned": ([200, 3] * (launch.MIN_OWNED_HEADS // 4), [150, 245] * (launch.MIN_OWNED_HEADS // 4)),
    "dq": ([600, 5, 129], [300, 0, 513]),
}


def drawn(batch: tuple, D: int = 32, Dv: int = 32, **kwargs) -> tuple[Tensor, ...]:
    return packed(batch, D=D, Dv=Dv, device=DEVICE, **kwargs)


def sequences(batch: tuple, dtype: torch.dtype = torch.int64) -> tuple:
    """The arguments that say where sequences begin, on the device."""
    return (
        *(cumulative(side).to(DEVICE, dtype) for side in batch),
        *(max(side, default=0) for side in batch),
    )


def results(tensors: tuple, where: tuple, upstream: tuple, **kwargs) -> list[Tensor]:
    """Output, lse and gradients of one call; upstream gradients reach the kernels as they lie in memory."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    arguments = {"enable_gqa": True, "return_lse": True, "backend": "triton", **kwargs}
    outputs = varlen_attention(*leaves, *where, **arguments)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def upstreams(tensors: tuple) -> tuple[Tensor, Tensor]:
    (total, H, _), Dv = tensors[0].shape, tensors[2].shape[2]
    return torch.randn(total, H, Dv, device=DEVICE).to(tensors[0].dtype), torch.randn(total, H, device=DEVICE)


def compare(batch: tuple, tensors: tuple, causal: str, scale: float | None = None) -> None:
    """Hold every sequence to promise 1: no worse than eager PyTorch in the same dtype on the device."""
    upstream = upstreams(tensors)
    actual = results(tensors, sequences(batch), upstream, scale=scale, **causal_arguments(causal))
    for b in range(len(batch[0])):
        q, grad, grad_lse = of_sequence(b, batch, queries=(tensors[0], *upstream))
        inputs = (q, *of_sequence(b, batch, keys=tensors[1:]))
        mine = of_sequence(b, batch, tuple(actual[:3]), tuple(actual[3:]))
        hold(mine, inputs, (grad, grad_lse), causal, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(REACHED))
def test_every_kernel(kind: str, dtype: torch.dtype) -> None:
    batch = REACHED[kind]
    tensors = drawn(batch, dtype=dtype)
    cu_seq_q, cu_seq_k, *longest = sequences(batch)
    masks = (None, None, None, cu_seq_q, cu_seq_k)
    call = launch.Call(*tensors, *masks, *longest, None, 0.0, "none", 1.0)
    assert call.backward_kind(mask_gradient=False) == kind
    compare(batch, tensors, "none")


@pytest.mark.parametrize(("causal", "dtype"), list(zip(CAUSAL, DTYPES, strict=True)), ids=str)
def test_lengths(causal: str, dtype: torch.dtype) -> None:
    batches = [*BATCHES.values(), ([513, 1, 0], [2, 1000, 31])]
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, (10, 40, 150)[seed % 3], (2, 1 + seed), generator=generator)
        batches.append(tuple(lengths.tolist()))
    for seed, batch in enumerate(batches):
        compare(batch, drawn(batch, dtype=dtype, seed=seed), causal)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 9), (33, 17), (80, 256)], ids=str)
def test_heads_and_head_sizes(sizes: tuple, heads: tuple) -> None:
    batch = ([5, 0, 31, 66, 2], [7, 3, 31, 20, 0])
    tensors = packed(batch, *heads, *sizes, dtype=torch.bfloat16, device=DEVICE)
    compare(batch, tensors, CAUSAL[sum(heads) % 3], scale=0.3)


def test_int32_and_int64_boundaries_give_the_same_bits() -> None:
    """One after the other in the same shapes: a kernel compiled for one kind must not meet the other."""
    batch = BATCHES["mixed"]
    tensors = drawn(batch, dtype=torch.bfloat16)
    upstream = upstreams(tensors)
    expected = results(tensors, sequences(batch), upstream, is_causal=True)
    for kind in (torch.int32, torch.int64, torch.int32):
        assert_equal(results(tensors, sequences(batch, kind), upstream, is_causal=True), expected)
    cu_seq_q, cu_seq_k, *longest = sequences(batch)
    for mixed in ((cu_seq_q.int(), cu_seq_k), (cu_seq_q, cu_seq_k.int())):
        assert_equal(results(tensors, (*mixed, *longest), upstream, is_causal=True), expected)


@pytest.mark.parametrize("longer", [(1, 0), (0, 60), (200, 300)])
def test_max_may_be_larger_than_the_longest(longer: tuple[int, int]) -> None:
    batch = BATCHES["mixed"]
    tensors, (*cu_seq, max_q, max_k) = drawn(batch), sequences(batch)
    upstream = upstreams(tensors)
    options = {"is_causal": True, "causal_align": "bottom_right"}
    expected = results(tensors, (*cu_seq, max_q, max_k), upstream, **options)
    actual = results(tensors, (*cu_seq, max_q + longer[0], max_k + longer[1]), upstream, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["whole_64", "whole", "dq"])
def test_dropped_elements(kind: str) -> None:
    """The output for unit vectors as values is the weights: those that the definition keeps are not 0."""
    queries, keys = batch = REACHED[kind]
    seed, longest = torch.tensor([-3, 4], device=DEVICE), (max(queries), max(keys))
    keep = dropout_keep(seed, 0.3, (len(queries), 4, *longest))
    query, key, _ = drawn(batch)
    for first in range(0, longest[1], 32):
        units = torch.eye(longest[1], device=DEVICE)[:, first : first + 32]
        value = torch.cat([units[:length] for length in keys]).unsqueeze(1).expand(-1, 2, -1)
        arguments = {"enable_gqa": True, "dropout_p": 0.3, "seed": seed, "backend": "triton"}
        out = varlen_attention(query, key, value, *sequences(batch), **arguments)
        for b, (L, S) in enumerate(zip(*batch, strict=True)):
            (mine,) = of_sequence(b, batch, queries=(out,))
            wanted = keep[b : b + 1, :, :L, first : first + 32].clone()
            wanted[..., max(S - first, 0) :] = False
            assert torch.equal(mine[..., : wanted.shape[-1]] != 0, wanted)


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_layouts_give_the_same_bits(layout: str) -> None:
    batch = BATCHES["mixed"]
    tensors = drawn(batch, dtype=torch.bfloat16)
    upstream = upstreams(tensors)
    options = {"is_causal": True, "dropout_p": 0.3, "seed": 3}
    expected = results(tensors, sequences(batch), upstream, **options)
    *laid, grad = (layouts(x.detach().unsqueeze(0))[layout][0] for x in (*tensors, upstream[0]))
    grad_lse = layouts(upstream[1][None, None])[layout][0, 0]
    assert_equal(results(tuple(laid), sequences(batch), (grad, grad_lse), **options), expected)


def test_packed_input_is_read_in_place() -> None:
    lengths, H, D = [60, 128, 3] * 20, 4, 64
    total, longest = sum(lengths), max(lengths)
    whole = torch.randn(total, 3, H, D, device=DEVICE).to(torch.bfloat16)
    cu_seq = cumulative(lengths).to(DEVICE)
    where, options = (cu_seq, cu_seq, longest, longest), (None, 0.0, "none", 0.125)
    upstream = torch.randn(total, H, D, device=DEVICE).to(torch.bfloat16)
    backend = dispatch.registry[OP]["triton"]
    tensors, begin = whole.unbind(1), requested_bytes()
    outputs = backend.forward(*tensors, *where, *options)
    after_forward = requested_bytes()
    grads = backend.backward(upstream, None, *tensors, *outputs, *where[:2], *where[2:], *options)
    assert after_forward - begin == sum(x.nbytes for x in outputs)
    assert requested_bytes() - after_forward == sum(x.nbytes for x in grads)


@pytest.mark.parametrize("kind", ["whole", "dq"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_memory(canaries: Counter[str], kind: str, dtype: torch.dtype) -> None:  # noqa: F811
    """Inputs unchanged, margins of inputs and results intact, nothing read that was never written."""
    batch, options = REACHED[kind], {"is_causal": True, "dropout_p": 0.3, "seed": 3}
    plain = drawn(batch, D=24, Dv=16, dtype=dtype)
    everything = [x.detach() for x in (*plain, *upstreams(plain), *sequences(batch)[:2])]
    surrounded = [between_canaries(x, 1024) for x in everything]
    longest = sequences(batch)[2:]
    expected = results(plain, (*everything[5:], *longest), tuple(everything[3:5]), **options)
    inside, before = [x for x, _ in surrounded], canaries["tensors"]
    assert before >= 6, "the results of this call were not surrounded"
    with poison():
        actual = results(tuple(inside[:3]), (*inside[5:], *longest), tuple(inside[3:5]), **options)
    assert_equal(actual, expected)
    assert all(torch.equal(x, y) for x, y in zip(inside, everything, strict=True))
    for _, check in surrounded:
        check()


@pytest.mark.parametrize("kind", ["whole", "dq"])
def test_garbage_stays_in_its_sequence(kind: str) -> None:
    """Neighbours full of NaN, in front and behind, leave the bits of a sequence as they are."""
    queries, keys = batch = REACHED[kind]
    tensors = drawn(batch, dtype=torch.bfloat16)
    upstream = upstreams(tensors)
    expected = results(tensors, sequences(batch), upstream)
    for b in range(len(queries)):
        dirty = []
        for x, side in zip((*tensors, *upstream), (queries, keys, keys, queries, queries), strict=True):
            own = slice(sum(side[:b]), sum(side[: b + 1]))
            dirty.append(torch.full_like(x, math.nan).detach())
            dirty[-1][own] = x.detach()[own]
        actual = results(tuple(dirty[:3]), sequences(batch), tuple(dirty[3:]))
        for which in (actual, expected):
            which[:] = [x.detach() for x in which]
        mine, wanted = (of_sequence(b, batch, tuple(x[:3]), tuple(x[3:])) for x in (actual, expected))
        assert_equal(mine, wanted)


@pytest.mark.parametrize("kind", list(REACHED))
def test_same_bits_250_times(kind: str) -> None:
    tensors = drawn(REACHED[kind], dtype=torch.bfloat16)
    upstream, where = upstreams(tensors), sequences(REACHED[kind])
    expected = results(tensors, where, upstream, dropout_p=0.3, seed=1)
    for _ in range(250):
        assert_equal(results(tensors, where, upstream, dropout_p=0.3, seed=1), expected)


@pytest.mark.parametrize(("kind", "step_of_border"), [("whole", 1), ("dq", -1)])
def test_graph(kind: str, step_of_border: int) -> None:
    """Replays read the seed and the sequences' borders anew: lengths may change, not their maximum."""
    batch = REACHED[kind]
    tensors, (cu_seq_q, cu_seq_k, *longest) = drawn(batch, dtype=torch.bfloat16), sequences(batch)
    upstream, seed = upstreams(tensors), torch.tensor([1, 5], device=DEVICE)

    def step() -> list[Tensor]:
        return results(tensors, (cu_seq_q, cu_seq_k, *longest), upstream, dropout_p=0.3, seed=seed)

    graph, static = captured(step)
    for n in (1, 2):
        seed.copy_(torch.tensor([n, 5]))
        # The second time the border between the first two sequences moves by a row of each side.
        cu_seq_q[1] += (n - 1) * step_of_border
        cu_seq_k[1] += (n - 1) * step_of_border
        before = [x.clone() for x in static]
        graph.replay()
        assert_equal(static, step())
        assert not torch.equal(static[0], before[0]) or n == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor) -> Tensor:
        options = {"is_causal": True, "dropout_p": 0.3, "seed": 3, "enable_gqa": True, "backend": "triton"}
        return varlen_attention(query * 2, key, value, cu_seq_q, cu_seq_k, 150, 150, **options) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for name in ("mixed", "equal") if dynamic else ("mixed",):
        batch = BATCHES[name]
        tensors, cu_seq = drawn(batch, dtype=torch.bfloat16), sequences(batch)[:2]
        upstream = upstreams(tensors)[0]
        both = []
        for function in (compiled, call):
            out = function(*tensors, *cu_seq)
            both.append([out.detach(), *torch.autograd.grad(out, tensors, upstream)])
        assert_equal(*both)


def test_more_than_2_to_the_31_elements() -> None:
    """The first and the last sequences get the bits that they get alone."""
    need_memory(24)
    B, T, H = 4_100, 512, 16
    x = torch.randn(B * T, H, 64, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    upstream = torch.randn(1, 1, 64, device=DEVICE).to(torch.bfloat16).expand(x.shape)
    grad_lse = torch.randn(1, 1, device=DEVICE).expand(x.shape[:2])
    cu_seq = torch.arange(B + 1, dtype=torch.int32, device=DEVICE) * T
    whole = results((x, x, x), (cu_seq, cu_seq, T, T), (upstream, grad_lse))
    few = max(8, launch.MIN_OWNED_HEADS // H)
    for part in (slice(0, few * T), slice((B - few) * T, B * T)):
        rows, cu_few = (upstream[part], grad_lse[part]), cu_seq[: few + 1]
        alone = results((x[part],) * 3, (cu_few, cu_few, T, T), rows)
        assert_equal([y[part] for y in whole], alone)
    del whole, x
    torch.cuda.empty_cache()


def test_any_call(request: pytest.FixtureRequest) -> None:
    counted = Counter[str]()
    # Few kernels for many calls: sizes that Triton compiles a kernel for are fixed.
    fixed = {"H": 4, "Hk": 2, "D": 48, "Dv": 16}

    @settings(max_examples=max(properties.EXAMPLES, settings().max_examples))
    @given(call=properties.calls())
    def search(call: dict) -> None:
        # A last sequence makes the totals of queries and keys 2 more than multiples of 16.
        last = tuple((2 - sum(side)) % 16 for side in properties.sides(call))
        call = {**call, **fixed, "lengths": [*call["lengths"], last], "longer": (0, 0)}
        call["dropout_p"] = 0.5 if call["dropout_p"] else 0.0
        torch.manual_seed(call["seed"] % 2**31)
        sides = properties.sides(call)
        leaves = [x.detach().cpu().requires_grad_() for x in drawn(sides, D=48, Dv=16, dtype=call["dtype"])]
        upstream = [x.cpu() for x in upstreams(leaves)]
        exact, sizes = properties.exact_results(call, leaves, upstream)
        options = {name: call[name] for name in ("dropout_p", "scale", "seed")}
        tensors, grads = (tuple(x.to(DEVICE) for x in side) for side in (leaves, upstream))
        # One maximum for all: a number that is 1 or a multiple of 16 is compiled for.
        where = (*sequences(sides, torch.int32)[:2], 65, 65)
        actual = results(tensors, where, grads, **options, **causal_arguments(call["causal"]))
        counted[str(call["dtype"])] += 1
        for name, a, e, size in zip(properties.NAMES, actual, exact, sizes, strict=True):
            properties.close(name, a.cpu(), e, size, torch.float32 if name == "lse" else call["dtype"])

    search()
    assert counted.total() >= properties.EXAMPLES
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nsearched calls of varlen_attention on {DEVICE}: {dict(counted)}")
