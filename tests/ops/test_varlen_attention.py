"""Every backend of packed attention: against float64 and eager PyTorch, and against attention itself."""

import math

import pytest
import torch
from torch import Tensor

from nlpfast import attention, dispatch, varlen_attention
from nlpfast.testing import (
    allowed_keys,
    assert_no_worse,
    eager_attention,
    layouts,
    make_inputs,
    rounding_sizes,
)

OP = "varlen_attention"
NAMES = ("out", "lse", "dq", "dk", "dv")
CAUSAL = ("none", "top_left", "bottom_right")
# Lengths of the queries and of the keys of each sequence.
BATCHES = {
    "mixed": ([3, 0, 5, 70, 1, 17, 9], [4, 2, 0, 130, 1, 33, 6]),
    "equal": ([1, 33, 0, 64, 16, 129], [1, 33, 0, 64, 16, 129]),
    "one": ([257], [129]),
    "ones": ([1] * 9, [1] * 9),
    "no_keys": ([3, 4], [0, 0]),
    "no_queries": ([0, 0], [3, 4]),
    "all_empty": ([0, 0], [0, 0]),
    "no_sequences": ([], []),
}


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def pack(x: Tensor) -> Tensor:
    """[1, H, total, D] as [total, H, D]."""
    return x.detach()[0].transpose(0, 1).contiguous()


def packed(batch: tuple, H: int = 4, Hk: int = 2, D: int = 12, Dv: int = 10, **kwargs) -> tuple[Tensor, ...]:
    """Query, key and value of a batch, which want gradients."""
    drawn = make_inputs(1, H, sum(batch[0]), sum(batch[1]), D, Hk=Hk, Dv=Dv, **kwargs)
    return tuple(pack(x).requires_grad_() for x in drawn)


def sequences(batch: tuple) -> tuple[Tensor, Tensor, int, int]:
    """The arguments that say where sequences begin."""
    return *(cumulative(side) for side in batch), *(max(side, default=0) for side in batch)


def causal_arguments(causal: str) -> dict:
    return {"is_causal": causal != "none", "causal_align": "top_left" if causal == "none" else causal}


def gradients(out: Tensor, lse: Tensor, inputs: tuple, upstream: tuple) -> list[Tensor]:
    """Gradients through the output and lse, where that is finite."""
    some = lse.isfinite()
    loss = (out * upstream[0].to(out.dtype)).sum() + (lse[some] * upstream[1].to(lse.dtype)[some]).sum()
    return list(torch.autograd.grad(loss, inputs))


def run(backend: str | None, tensors: tuple, batch: tuple, upstream: tuple, **kwargs) -> list[Tensor]:
    """Output, lse and gradients of one call."""
    arguments = {"enable_gqa": True, "return_lse": True, "backend": backend, **kwargs}
    out, lse = varlen_attention(*tensors, *sequences(batch), **arguments)
    return [out.detach(), lse.detach(), *gradients(out, lse, tensors, upstream)]


def upstreams(tensors: tuple) -> tuple[Tensor, Tensor]:
    """Upstream gradients of the output and of lse."""
    total, H, _ = tensors[0].shape
    return torch.randn(total, H, tensors[2].shape[2], dtype=tensors[0].dtype), torch.randn(total, H)


def of_sequence(b: int, batch: tuple, queries: tuple = (), keys: tuple = ()) -> list[Tensor]:
    """Sequence b of packed tensors, as [1, H, length, ...]."""
    parts = []
    for side, tensors in zip(batch, (queries, keys), strict=True):
        begin = sum(side[:b])
        parts += [x[begin : begin + side[b]].transpose(0, 1).unsqueeze(0) for x in tensors]
    return parts


def eager(tensors: list[Tensor], upstream: list[Tensor], dtype: torch.dtype, **kwargs) -> list[Tensor]:
    """Output, lse and gradients of one sequence in eager PyTorch, computed in ``dtype``."""
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in tensors)
    out, lse = eager_attention(*inputs, **kwargs)
    return [out.detach(), lse.detach(), *gradients(out, lse, inputs, tuple(upstream))]


def compare(backend: str, tensors: tuple, batch: tuple, causal: str, scale: float | None = None) -> None:
    """Hold every sequence to promise 1: no worse than eager PyTorch in the same dtype."""
    upstream = upstreams(tensors)
    actual = run(backend, tensors, batch, upstream, scale=scale, **causal_arguments(causal))
    for b in range(len(batch[0])):
        q, grad, grad_lse = of_sequence(b, batch, queries=(tensors[0], *upstream))
        k, v = of_sequence(b, batch, keys=tensors[1:])
        allowed = allowed_keys((*q.shape[:3], k.shape[2]), causal=causal)
        masks = {"allowed": allowed, "scale": scale}
        same, exact = (eager([q, k, v], [grad, grad_lse], x, **masks) for x in (q.dtype, torch.float64))
        sizes = rounding_sizes(q, k, v, grad, grad_lse, **masks)
        mine = of_sequence(b, batch, tuple(actual[:3]), tuple(actual[3:]))
        for name, a, e, r in zip(NAMES, mine, same, exact, strict=True):
            size = sizes[name]
            if name == "lse":
                a, e, r, size = (x.unsqueeze(-1) for x in (a, e, r, size))
            ulps = 8.0 if q.dtype == torch.float64 else 2.0
            factor = 1.5 if name.startswith("d") else 1.0
            assert_no_worse(f"{name} of sequence {b}", a, e, r, factor=factor, ulps=ulps, size=size)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", list(BATCHES))
def test_no_worse_than_eager(backend: str, batch: str, dtype: torch.dtype, causal: str) -> None:
    tensors = packed(BATCHES[batch], dtype=dtype)
    ends_q, ends_k, _, longest = sequences(BATCHES[batch])
    request = (*tensors, ends_q, ends_k, longest)
    if dispatch.registry[OP][backend].refusal(*request) is None:
        compare(backend, tensors, BATCHES[batch], causal)
        return
    with pytest.raises(RuntimeError, match="cannot run there"):
        varlen_attention(*tensors, *sequences(BATCHES[batch]), enable_gqa=True, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (8, 8), (33, 17), (64, 64), (80, 256)], ids=str)
def test_heads_and_head_sizes(backend: str, sizes: tuple, heads: tuple, dtype: torch.dtype) -> None:
    batch = ([5, 0, 31, 66, 2], [7, 3, 31, 20, 0])
    tensors = packed(batch, *heads, *sizes, dtype=dtype)
    compare(backend, tensors, batch, CAUSAL[sum(heads) % 3], scale=0.3)


@pytest.mark.parametrize("seed", range(20))
def test_random_lengths(backend: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, (10, 40, 150)[seed % 3], (2, 1 + seed), generator=generator).tolist()
    compare(backend, packed(drawn, seed=seed), drawn, CAUSAL[seed % 3])


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_attention_of_each_sequence(backend: str, dtype: torch.dtype, causal: str) -> None:
    batch = BATCHES["mixed"]
    tensors = packed(batch, dtype=dtype)
    upstream = upstreams(tensors)
    actual = run(backend, tensors, batch, upstream, **causal_arguments(causal))
    for b in range(len(batch[0])):
        q, grad, grad_lse = of_sequence(b, batch, queries=(tensors[0], *upstream))
        parts = tuple(x.detach().requires_grad_() for x in (q, *of_sequence(b, batch, keys=tensors[1:])))
        arguments = {"enable_gqa": True, "return_lse": True, "backend": backend, **causal_arguments(causal)}
        out, lse = attention(*parts, **arguments)
        expected = [out.detach(), lse.detach(), *gradients(out, lse, parts, (grad, grad_lse))]
        mine = of_sequence(b, batch, tuple(actual[:3]), tuple(actual[3:]))
        for name, a, e in zip(NAMES, mine, expected, strict=True):
            # The definition pads, Triton's kernels are chosen by the longest sequence: sums in another order.
            if backend != "cpu":
                torch.testing.assert_close(a, e)
            else:
                assert torch.equal(a, e), f"{name} of sequence {b}: {(a - e).abs().max()}"


def pad(x: Tensor, lengths: list[int], longest: int) -> Tensor:
    """[total, H, ...] as [B, H, longest, ...], with numbers that must not matter as padding."""
    batch = torch.full((len(lengths), longest, *x.shape[1:]), 7.0, dtype=x.dtype)
    for b, part in enumerate(x.split(lengths)):
        batch[b, : len(part)] = part
    return batch.transpose(1, 2)


def unpad(x: Tensor, lengths: list[int]) -> Tensor:
    """The reverse of ``pad``."""
    return torch.cat([x[b, :, :length].transpose(0, 1) for b, length in enumerate(lengths)])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("causal", CAUSAL[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_attention_on_a_padded_batch(
    backend: str, dtype: torch.dtype, causal: str, dropout_p: float
) -> None:
    queries, keys = batch = ([3, 0, 5, 70, 1], [4, 2, 0, 130, 1])
    tensors = packed(batch, dtype=dtype)
    upstream = upstreams(tensors)
    options = {"dropout_p": dropout_p, "seed": 11, **causal_arguments(causal)}
    actual = run(backend, tensors, batch, upstream, **options)
    # Padded further than the longest sequence, which must not change what is dropped.
    whole = [
        pad(x.detach(), side, size)
        for x, side, size in zip(tensors, (queries, keys, keys), (81, 140, 140), strict=True)
    ]
    leaves = tuple(x.requires_grad_() for x in whole)
    lengths = torch.tensor(keys)
    out, lse = attention(
        *leaves, **options, key_lengths=lengths, enable_gqa=True, return_lse=True, backend=backend
    )
    rows = torch.arange(81) < torch.tensor(queries).unsqueeze(-1)
    grads = [pad(x, queries, 81) for x in upstream]
    grads = [x.masked_fill(~rows.view(5, 1, 81, *[1] * (x.ndim - 3)), 0.0) for x in grads]
    expected = [out.detach(), lse.detach(), *gradients(out, lse, leaves, tuple(grads))]
    sides = (queries, queries, queries, keys, keys)
    for name, a, e, side in zip(NAMES, actual, expected, sides, strict=True):
        e = unpad(e, side)
        if backend == "reference":
            torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(a, e), f"{name}: {(a - e).abs().max()}"
    assert dropout_p in (0.0, 1.0) or not torch.equal(actual[0], run(backend, tensors, batch, upstream)[0])


@pytest.mark.parametrize("longer", [(0, 0), (1, 0), (0, 60), (200, 300)])
def test_max_may_be_larger_than_the_longest(backend: str, longer: tuple[int, int]) -> None:
    batch = BATCHES["mixed"]
    tensors = packed(batch)
    cu_seq_q, cu_seq_k, max_q, max_k = sequences(batch)
    options = {"is_causal": True, "causal_align": "bottom_right", "enable_gqa": True, "backend": backend}
    expected = varlen_attention(*tensors, cu_seq_q, cu_seq_k, max_q, max_k, **options)
    longest = max_q + longer[0], max_k + longer[1]
    actual = varlen_attention(*tensors, cu_seq_q, cu_seq_k, *longest, **options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("D", [1, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits(backend: str, layout: str, D: int, dtype: torch.dtype) -> None:
    batch = BATCHES["mixed"]
    tensors = packed(batch, D=D, Dv=D, dtype=dtype)
    upstream = upstreams(tensors)
    options = {"is_causal": True, "dropout_p": 0.2, "seed": 3}
    expected = run(backend, tensors, batch, upstream, **options)
    *laid, grad = (layouts(x.detach().unsqueeze(0))[layout][0] for x in (*tensors, upstream[0]))
    grad_lse = layouts(upstream[1][None, None])[layout][0, 0]
    actual = run(backend, tuple(x.requires_grad_() for x in laid), batch, (grad, grad_lse), **options)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a, e), name


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_kinds_of_boundaries(backend: str, kind: torch.dtype, step: int) -> None:
    batch = BATCHES["equal"]
    tensors = packed(batch)
    cu_seq, _, longest, _ = sequences(batch)
    expected = varlen_attention(*tensors, cu_seq, cu_seq, longest, longest, enable_gqa=True, backend=backend)
    other = cu_seq.to(kind).repeat_interleave(step)[::step]
    actual = varlen_attention(*tensors, other, cu_seq, longest, longest, enable_gqa=True, backend=backend)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_garbage_stays_in_its_sequence(backend: str, garbage: float, dtype: torch.dtype) -> None:
    """Sequences 0, 2 and 4 are computed; 1 has no keys, 3 no queries, and 5 is garbage throughout."""
    batch = ([3, 4, 5, 0, 6, 2], [4, 0, 7, 5, 6, 2])
    clean = packed(batch, dtype=dtype)
    upstream = upstreams(clean)
    expected = run(backend, clean, batch, upstream)
    dirty = [x.detach().clone() for x in (*clean, *upstream)]
    (q0, q1, q5), (k3, k5) = (
        [sum(batch[side][:b]) for b in some] for side, some in ((0, (1, 2, 5)), (1, (3, 5)))
    )
    for x in (dirty[0], dirty[3], dirty[4]):
        x[q0:q1], x[q5:] = garbage, garbage
    for x in dirty[1:3]:
        x[k3 : k3 + 5], x[k5:] = garbage, garbage
    tensors = tuple(x.requires_grad_() for x in dirty[:3])
    out, lse = varlen_attention(
        *tensors, *sequences(batch), enable_gqa=True, return_lse=True, backend=backend
    )
    grads = torch.autograd.grad([out, lse], tensors, [x.detach() for x in dirty[3:]])
    ends = (q5, q5, q5, k5, k5)
    for name, a, e, end in zip(NAMES, (out, lse, *grads), expected, ends, strict=True):
        assert torch.equal(a[:end], e[:end]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("causal", CAUSAL)
def test_gradcheck_of_the_definition(causal: str, dropout_p: float) -> None:
    batch = ([2, 0, 3, 1], [3, 2, 2, 0])
    tensors = packed(batch, D=3, Dv=2, dtype=torch.float64)

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        options = {"dropout_p": dropout_p, "seed": 5, "enable_gqa": True, **causal_arguments(causal)}
        out, lse = varlen_attention(
            *inputs, *sequences(batch), **options, return_lse=True, backend="reference"
        )
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("use", ["out", "lse", "both"])
def test_every_gradient_is_there(backend: str, use: str) -> None:
    batch = ([9, 4, 0], [11, 0, 6])
    tensors = packed(batch)
    out, lse = varlen_attention(
        *tensors, *sequences(batch), enable_gqa=True, return_lse=True, backend=backend
    )
    # Nor must gradients matter that reach lse where it is -inf, infinite for lse².
    (out.square().sum() * (use != "lse") + lse.square().sum() * (use != "out")).backward()
    for name, x, rows in zip(("query", "key", "value"), tensors, (9, 11, 11), strict=True):
        assert x.grad is not None and x.grad.isfinite().all(), name
        assert (x.grad[:rows] != 0).all() == (use != "lse" or name != "value"), name
        assert not x.grad[rows:].any(), name
    assert out.shape == (13, 4, 10) and lse.shape == (13, 4) and lse.dtype == torch.float32
    assert lse[9:].isneginf().all() and not out[9:].any()
