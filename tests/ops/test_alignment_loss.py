"""Alignment loss: against all probabilities, its gradients through attention, odd pairs, memory, refusals."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlpfast import alignment_loss, attention, attention_at, dispatch, hard_alignment
from nlpfast.ops import additions
from nlpfast.ops.alignment_loss import pair_weights
from nlpfast.testing import between_canaries, layouts, make_inputs, poison

OP = "alignment_loss"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES: Counter[str] = Counter()
EXAMPLES = 50 if os.environ.get("TRITON_INTERPRET") == "1" else 2000


def drawn(P: int, B: int, L: int, S: int, seed: int = 0) -> Tensor:
    """Pairs in no order; some twice, and rows and columns with several."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.stack([torch.randint(max(n, 1), (P,), generator=generator) for n in (B, L, S)], 1)
    if P > 3:
        pairs[3] = pairs[0]
    return pairs


def numbers(heads: object, H: int) -> list[int]:
    return (
        list(range(H if heads is None else heads)) if heads is None or isinstance(heads, int) else list(heads)
    )


def dense(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, heads: object, scale: float, weights: Tensor | None
):
    """Output of attention and alignment loss of each pair, from all probabilities, by autograd."""
    H, Hk = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(H // Hk, 1) for x in (k, v))
    log_p = (scale * q @ k.mT).log_softmax(-1)
    chosen = log_p[:, numbers(heads, H)]
    log_mean = chosen.logsumexp(1) - math.log(chosen.shape[1])
    if weights is None:
        same = (pairs[:, None, :2] == pairs[None, :, :2]).all(-1)
        weights = 1.0 / same.sum(1, dtype=torch.promote_types(q.dtype, torch.float32))
    return log_p.exp() @ v, -weights * log_mean[pairs[:, 0], pairs[:, 1], pairs[:, 2]]


def both(
    backend: str | None,
    tensors: tuple[Tensor, ...],
    pairs: Tensor,
    upstream: Tensor,
    linked: bool = True,
    **options,
) -> list[Tensor]:
    """Loss and gradients of attention and alignment loss together."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    scale = options.get("scale")
    out, lse = attention(*leaves, enable_gqa=True, return_lse=True, scale=scale)
    query = leaves[0] if linked else leaves[0] * 1
    loss = alignment_loss(query, leaves[1], lse, pairs, backend=backend, **options)
    total = (out * upstream).sum() + 0.7 * loss.sum()
    return [loss.detach(), *torch.autograd.grad(total, leaves)]


def expected(
    tensors: tuple[Tensor, ...], pairs: Tensor, upstream: Tensor, dtype: torch.dtype, **options
) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    scale = options.get("scale") or tensors[0].shape[3] ** -0.5
    weights = options.get("weights")
    out, losses = dense(*leaves, pairs, options.get("heads"), scale, weights)
    loss = {"none": lambda: losses, "sum": losses.sum}[options.get("reduction", "sum")]()
    total = (out * upstream.to(dtype)).sum() + 0.7 * loss.sum()
    return [loss.detach(), *torch.autograd.grad(total, leaves)]


HEADS = (None, 1, 2, (3, 1))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("Hk", [4, 2, 1])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("P", [0, 1, 40])
def test_exact_in_float64(heads, Hk, linked, P) -> None:
    tensors = make_inputs(3, 4, 7, 9, 5, Hk=Hk, Dv=6, dtype=torch.float64)
    pairs, upstream = drawn(P, 3, 7, 9), torch.randn(3, 4, 7, 6, dtype=torch.float64)
    for options in ({}, {"weights": torch.rand(P, dtype=torch.float64)}, {"scale": 0.3, "reduction": "none"}):
        found = both("reference", tensors, pairs, upstream, linked, heads=heads, **options)
        wanted = expected(tensors, pairs, upstream, torch.float64, heads=heads, **options)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-9 if a.numel() else True


def test_gradcheck() -> None:
    q, k, _ = make_inputs(2, 2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    pairs = drawn(9, 2, 3, 4)
    assert torch.autograd.gradcheck(lambda *x: alignment_loss(*x, pairs, reduction="none"), (q, k, lse))
    assert torch.autograd.gradcheck(lambda *x: attention_at(*x, pairs, heads=1), (q, k, lse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("L", "S", "D"), [(1, 1, 1), (17, 33, 16), (40, 9, 31), (64, 64, 64)])
@pytest.mark.parametrize("linked", [False, True])
def test_no_worse_than_eager(backend, dtype, heads, L, S, D, linked) -> None:
    tensors = make_inputs(2, 4, L, S, D, Hk=2, Dv=8, dtype=dtype)
    pairs, upstream = drawn(30, 2, L, S), torch.randn(2, 4, L, 8).to(dtype)
    found = both(backend, tensors, pairs, upstream, linked, heads=heads, reduction="none")
    options = {"heads": heads, "reduction": "none"}
    eager, exact = (expected(tensors, pairs, upstream, kind, **options) for kind in (dtype, torch.float64))
    assert found[0].dtype == torch.float32
    size = (
        1 + exact[0].abs() + tensors[0].double().abs().max() * tensors[1].double().abs().max() * math.sqrt(D)
    )
    assert ((found[0] - exact[0]).abs() <= 4 * 2**-23 * size).all()
    for name, a, e, x in zip(("dq", "dk", "dv"), found[1:], eager[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        # attention's own errors are held to their bounds elsewhere; terms of the size of rows may cancel
        unit = torch.finfo(dtype).eps * (x.abs().amax() + max(y.abs().amax() for y in tensors[:2]))
        assert (a - x).abs().max() <= 1.5 * (e - x).abs().max() + 4 * unit, name


def test_large_gaps_stay_finite(backend) -> None:
    """The probability is exp(-200), of which float32 knows nothing."""
    q = torch.tensor([[[[200.0]]]], requires_grad=True)
    k = torch.tensor([[[[0.0], [1.0]]]], requires_grad=True)
    _, lse = attention(q, k, k, scale=1.0, return_lse=True)
    loss = alignment_loss(q, k, lse, torch.tensor([[0, 0, 0]]), scale=1.0, backend=backend)
    assert abs(loss.item() - 200.0) < 1e-4
    dq, dk = torch.autograd.grad(loss, (q, k))
    assert torch.allclose(dq, torch.ones(1, 1, 1, 1)) and torch.allclose(
        dk.flatten(), torch.tensor([-200.0, 200.0])
    )


def test_weights_are_those_of_fairseq() -> None:
    links = torch.tensor([[5, 7], [2, 3], [1, 3], [4, 2]])
    pairs = torch.stack((torch.zeros(4).long(), links[:, 1], links[:, 0]), 1)
    assert pair_weights(pairs, 8, 1).tolist() == [1.0, 0.5, 0.5, 1.0]
    thirds = pair_weights(pairs[[1, 1, 1]], 8, 1, torch.float64)
    assert thirds.dtype == torch.float64 and thirds.tolist() == [1 / 3] * 3
    # another batch entry's pairs are others
    pairs[2, 0] = 1
    assert pair_weights(pairs, 8, 2).tolist() == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions(backend, reduction) -> None:
    q, k, v = make_inputs(2, 2, 5, 6, 4)
    _, lse = attention(q, k, v, return_lse=True)
    pairs, weights = drawn(9, 2, 5, 6), torch.rand(9)
    options = {"heads": 1, "backend": backend}
    probabilities = attention_at(q, k, lse, pairs, **options)
    rows = -weights * probabilities.log()
    wanted = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weights.sum()}[reduction]
    found = alignment_loss(q, k, lse, pairs, weights, reduction=reduction, **options)
    torch.testing.assert_close(found, wanted)
    p = (q @ k.mT / 2).softmax(-1)[pairs[:, 0], 0, pairs[:, 1], pairs[:, 2]]
    torch.testing.assert_close(probabilities, p)


def needs_finder(backend: str, dtype: torch.dtype) -> None:
    """Skip where a backend does not look for the most probable keys of this dtype."""
    if not hasattr(dispatch.registry[OP][backend], "hard_alignment"):
        pytest.skip("this backend has no hard_alignment")
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels compute in float32")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("Hk", [4, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_hard_alignment(monkeypatch, heads, Hk, dtype, backend) -> None:
    needs_finder(backend, dtype)
    monkeypatch.setattr("nlpfast.ops.alignment_loss.reference.KEYS", 4)
    q, k, v = make_inputs(3, 4, 7, 11, 5, Hk=Hk, dtype=dtype)
    lengths = torch.tensor([11, 0, 6])
    _, lse = attention(q, k, v, enable_gqa=True, return_lse=True)
    wide = k.double().repeat_interleave(4 // Hk, 1)
    p = (q.double() @ wide.mT / 5**0.5).softmax(-1)[:, numbers(heads, 4)].mean(1)
    assert torch.equal(hard_alignment(q, k, lse, heads=heads, backend=backend), p.argmax(-1))
    hidden = torch.arange(11) >= lengths[:, None, None]
    found = hard_alignment(q, k, lse, heads=heads, source_lengths=lengths, backend=backend)
    assert (found[1] == -1).all()
    assert torch.equal(found[::2], p.masked_fill(hidden, -1.0).argmax(-1)[::2])


def test_hard_alignment_takes_the_first_of_equals(backend) -> None:
    needs_finder(backend, torch.float32)
    q, k = torch.ones(1, 1, 5, 3), torch.ones(1, 1, 600, 3)
    # one that is looked at before, and one after
    k[:, :, [40, 69]] *= 2
    _, lse = attention(q, k, k, return_lse=True)
    assert hard_alignment(q, k, lse, backend=backend).tolist() == [[40] * 5]


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_hard_alignment_runs_where_it_is_asked_to_or_not_at_all(name) -> None:
    q = torch.ones(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"backend='{name}'"):
        hard_alignment(q, q, torch.zeros(1, 1, 2, dtype=torch.float64), backend=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_no_key_have_no_probability(backend, dtype) -> None:
    q, k, v = make_inputs(2, 2, 3, 4, 8, dtype=dtype)
    _, lse = attention(q, k, v, key_lengths=torch.tensor([0, 4]), return_lse=True)
    pairs = torch.tensor([[0, 1, 2], [1, 1, 2]])
    found = attention_at(q, k, lse, pairs, backend=backend)
    assert found[0] == 0 and 0 < found[1] < 1
    assert hard_alignment(q, k, lse, source_lengths=torch.tensor([0, 4]))[0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linked", [False, True])
def test_layouts_give_the_same_bits(backend, dtype, linked) -> None:
    tensors = make_inputs(2, 4, 6, 8, 16, dtype=dtype)
    pairs, upstream = drawn(20, 2, 6, 8), torch.randn(2, 4, 6, 16).to(dtype)
    wanted = both(backend, tensors, pairs, upstream, linked)
    for name in layouts(tensors[0]):
        laid = tuple(layouts(x)[name] for x in tensors)
        found = both(
            backend,
            laid,
            pairs.T.contiguous().T,
            upstream,
            linked,
        )
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linked", [False, True])
def test_memory(backend, dtype, linked) -> None:
    """Inputs unchanged, margins intact, nothing read that was never written."""
    tensors = make_inputs(2, 4, 6, 8, 19, dtype=dtype)
    pairs, upstream = drawn(20, 2, 6, 8), torch.randn(2, 4, 6, 19).to(dtype)
    wanted = both(backend, tensors, pairs, upstream, linked)
    inside, checks = zip(*(between_canaries(x) for x in (*tensors, pairs)), strict=True)
    with poison():
        found = both(backend, inside[:3], inside[3], upstream, linked)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    for x, y, check in zip(inside, (*tensors, pairs), checks, strict=True):
        assert torch.equal(x, y)
        check()


def test_rows_that_no_pair_names_may_hold_anything(backend) -> None:
    q, k, v = make_inputs(2, 2, 5, 6, 8)
    _, lse = attention(q, k, v, return_lse=True)
    pairs = torch.tensor([[0, 1, 2], [0, 1, 3], [1, 4, 2]])
    wanted = [x.clone() for x in (q, k, lse)]
    unused_q, unused_k = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    unused_q[pairs[:, 0], pairs[:, 1]] = False
    unused_k[pairs[:, 0], pairs[:, 2]] = False
    spoilt = [
        q.masked_fill(unused_q[:, None, :, None], math.nan),
        k.masked_fill(unused_k[:, None, :, None], math.nan),
        lse.masked_fill(unused_q[:, None], math.nan),
    ]
    results = []
    for tensors in (wanted, spoilt):
        leaves = [x.requires_grad_() for x in tensors]
        loss = alignment_loss(*leaves, pairs, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all()


def test_attention_takes_the_gradients_where_it_can(monkeypatch) -> None:
    made = []
    taken = additions.PairGradients.of_heads
    monkeypatch.setattr(additions.PairGradients, "of_heads", lambda *x: made.append(x) or taken(*x))
    q, k, v = make_inputs(1, 2, 4, 5, 3, requires_grad=True)
    pairs = drawn(6, 1, 4, 5)

    def runs(query: Tensor, key: Tensor, lse: Tensor) -> int:
        made.clear()
        alignment_loss(query, key, lse, pairs).backward()
        return len(made)

    projected = [x * 1 for x in (q, k, v)]
    assert runs(q, k, attention(q, k, v, return_lse=True)[1]) == 1
    assert runs(*projected[:2], attention(*projected, return_lse=True)[1]) == 1
    # elsewhere autograd adds them: another query, another call's lse, an lse without its history
    assert runs(q * 1, k, attention(q, k, v, return_lse=True)[1]) == 0
    assert runs(q, k.detach(), attention(q, k, v, return_lse=True)[1]) == 0
    assert runs(q, k, attention(q * 1, k, v, return_lse=True)[1]) == 0
    assert runs(q, k, attention(q, k, v, return_lse=True)[1].detach()) == 0
    assert runs(q, k, attention(q, k, v, return_lse=True)[1] * 1) == 0


def visible(kind: str, L: int, S: int) -> tuple[dict, Tensor]:
    """Options of attention over two batch entries, and what they let be seen, [2, L, S]."""
    rows, columns, lengths = torch.arange(L)[:, None], torch.arange(S), torch.tensor([S, S // 2])
    seen = torch.ones(2, L, S, dtype=torch.bool)
    some = torch.rand(2, 1, L, S, generator=torch.Generator().manual_seed(3)) < 0.6
    some[:, :, :, S // 3 : S // 3 + 140] = False  # whole tiles, where there are several
    options: dict[str, dict] = {
        "none": {},
        "dropout": {"dropout_p": 0.3, "seed": 5},
        "causal": {"is_causal": True, "causal_align": "bottom_right"},
        "prefix": {"is_causal": True, "prefix_lengths": lengths // 2},
        "lengths": {"key_lengths": lengths},
        "mask": {"attn_mask": some},
        "additive": {"attn_mask": torch.zeros(2, 1, L, S).masked_fill(~some, -math.inf).requires_grad_()},
    }
    if kind == "causal":
        seen &= columns <= rows + S - L
    elif kind == "prefix":
        seen &= (columns <= rows) | (columns < (lengths // 2)[:, None, None])
    elif kind == "lengths":
        seen &= columns < lengths[:, None, None]
    elif "attn_mask" in options[kind]:
        seen &= some[:, 0]
    return options[kind], seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "dropout", "causal", "prefix", "lengths", "mask", "additive"])
@pytest.mark.parametrize(("L", "S"), [(5, 6), (64, 64), (71, 300)])
@pytest.mark.parametrize(("Hk", "heads"), [(4, None), (2, (3, 1))])
def test_attention_adds_what_autograd_would(dtype, kind, L, S, Hk, heads) -> None:
    options, seen = visible(kind, L, S)
    places = seen.nonzero()
    pairs = places[torch.randint(len(places), (200,), generator=torch.Generator().manual_seed(1))]
    tensors = make_inputs(2, 4, L, S, 24, Hk=Hk, Dv=8, dtype=dtype)
    results = []
    # several threads: tiles are then computed by two passes, one for queries and one for keys
    for linked, threads in ((False, 1), (True, 1), (True, 8)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaves = [x.detach().requires_grad_() for x in tensors]
        if kind == "additive":
            leaves.append(options["attn_mask"])
        out, lse = attention(*leaves[:3], enable_gqa=True, return_lse=True, **options)
        query = leaves[0] if linked else leaves[0] * 1
        loss = alignment_loss(query, leaves[1], lse, pairs, heads=heads)
        results.append(torch.autograd.grad(out.sum() + 0.7 * loss, leaves))
        torch.set_num_threads(before)
    for a, b, c in zip(*results, strict=True):
        size = 8 * torch.finfo(a.dtype).eps * a.abs().max().item()
        torch.testing.assert_close(b, a, rtol=0, atol=size)
        assert torch.equal(b, c)


def test_two_losses_of_one_attention(backend) -> None:
    q, k, v = make_inputs(2, 4, 9, 8, 19, requires_grad=True)
    results = []
    for linked in (False, True):
        _, lse = attention(q, k, v, return_lse=True)
        query = q if linked else q * 1
        losses = [
            alignment_loss(query, k, lse, drawn(20, 2, 9, 8, n), heads=n, backend=backend) for n in (1, 3)
        ]
        results.append(torch.autograd.grad(losses[0] + 2 * losses[1], (q, k)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("linked", [False, True])
def test_backward_twice_and_in_parts(backend, linked) -> None:
    """What a pass left to attention that attention's pass never came for is not added in another."""
    q, k, v = make_inputs(2, 2, 5, 6, 8, requires_grad=True)
    pairs = drawn(9, 2, 5, 6)
    out, lse = attention(q, k, v, return_lse=True)
    loss = alignment_loss(q if linked else q * 1, k, lse, pairs, backend=backend)
    alone = torch.autograd.grad(out.sum(), (q, k), retain_graph=True)
    torch.autograd.grad(loss, lse, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k), retain_graph=True), alone, strict=True):
        assert torch.equal(a, b)
    first, second = (torch.autograd.grad(loss, (q, k), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0
    both_at_once = torch.autograd.grad(out.sum() + loss, (q, k))
    for a, b, c in zip(both_at_once, first, alone, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend, reentrant) -> None:
    tensors = make_inputs(2, 2, 5, 6, 8)
    pairs, upstream = drawn(9, 2, 5, 6), torch.ones(2, 2, 5, 8)
    wanted = both(backend, tensors, pairs, upstream)
    leaves = [x.clone().requires_grad_() for x in tensors]

    def total(*leaves: Tensor) -> Tensor:
        out, lse = attention(*leaves, return_lse=True)
        return out.sum() + 0.7 * alignment_loss(*leaves[:2], lse, pairs, backend=backend)

    checkpoint(total, *leaves, use_reentrant=reentrant).backward()
    for leaf, b in zip(leaves, wanted[1:], strict=True):
        assert torch.equal(leaf.grad, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend, dynamic) -> None:
    torch._dynamo.reset()

    def total(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
        out, lse = attention(q * 2, k, v, return_lse=True)
        return out.sum() + alignment_loss(q * 2, k, lse, pairs, heads=1, backend=backend)

    compiled = torch.compile(total, fullgraph=True, dynamic=None if dynamic else False, backend="aot_eager")
    for P in (9, 14, 5) if dynamic else (9,):
        tensors = [x.requires_grad_() for x in make_inputs(2, 2, 5, 6, 8)]
        pairs = drawn(P, 2, 5, 6)
        results = []
        for function in (compiled, total):
            value = function(*tensors, pairs)
            results.append([value.detach(), *torch.autograd.grad(value, tensors)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype) -> None:
    q, k, _ = make_inputs(2, 4, 5, 6, 8, Hk=2, dtype=dtype)
    lse, pairs, heads = torch.randn(2, 4, 5), drawn(9, 2, 5, 6), torch.tensor([2, 0])
    arguments = (q, k, lse, pairs, heads, 0.5)
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.nlpfast.alignment_loss_forward, arguments, test_utils=tests)
    grads = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(lse))
    inputs = (torch.randn(9, 2), q, k, pairs, heads, 0.5)
    torch.library.opcheck(torch.ops.nlpfast.alignment_loss_backward, (*inputs, *grads), test_utils=tests)


@pytest.mark.skipif(isinstance(dispatch.registry[OP]["cpu"], str), reason="no native library")
@pytest.mark.parametrize(
    ("pair", "head", "message"),
    [
        ((2, 0, 0), 0, "pair 1 lies outside"),
        ((-1, 0, 0), 0, "pair 1 lies outside"),
        ((0, 5, 0), 0, "pair 1 lies outside"),
        ((0, -1, 0), 0, "pair 1 lies outside"),
        ((0, 0, 6), 0, "pair 1 lies outside"),
        ((0, 0, -1), 0, "pair 1 lies outside"),
        ((0, 0, 0), 4, "head 4 lies outside"),
        ((0, 0, 0), -1, "head -1 lies outside"),
    ],
)
def test_the_operations_read_and_write_nowhere_else(pair, head, message) -> None:
    q, k, _ = make_inputs(2, 4, 5, 6, 8, Hk=2)
    pairs, heads = torch.tensor([(0, 0, 0), pair]), torch.tensor([0, head])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nlpfast.alignment_loss_forward(q, k, torch.randn(2, 4, 5), pairs, heads, 0.5)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nlpfast.alignment_loss_backward(
            torch.randn(2, 2), q, k, pairs, heads, 0.5, torch.zeros_like(q), None, None
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype) -> None:
    tensors = [x.requires_grad_() for x in make_inputs(2, 2, 5, 6, 8)]
    pairs = drawn(9, 2, 5, 6)
    with torch.autocast("cpu", dtype):
        _, lse = attention(*tensors, return_lse=True)
        loss = alignment_loss(*tensors[:2], lse, pairs, backend=backend)
    narrow = [x.detach().to(dtype).requires_grad_() for x in tensors]
    _, lse = attention(*narrow, return_lse=True)
    wanted = alignment_loss(*narrow[:2], lse, pairs, backend=backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, wanted)
    for a, b in zip(
        *(torch.autograd.grad(x, y[:2]) for x, y in ((loss, tensors), (wanted, narrow))), strict=True
    ):
        limit = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b.float(), rtol=4 * limit, atol=4 * limit)


@pytest.mark.long
def test_more_than_65536_heads(backend) -> None:
    q, k, _ = make_inputs(8192, 9, 2, 3, 4, requires_grad=True)
    lse = torch.randn(8192, 9, 2, requires_grad=True)
    pairs = drawn(9000, 8192, 2, 3)
    results = []
    for name in (backend, "reference"):
        loss = alignment_loss(q, k, lse, pairs, backend=name)
        results.append([loss.detach(), *torch.autograd.grad(loss, (q, k, lse))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_offsets_beyond_32_bits(backend) -> None:
    far = 2**31 + 64
    # only pages that are touched take memory
    storage = torch.empty(2 * far, dtype=torch.bfloat16)
    rows, columns = (storage[first:].as_strided((1, 1, 2, 8), (0, 0, far, 1)) for first in (0, 16))
    rows.copy_(torch.randn(1, 1, 2, 8))
    columns.copy_(torch.randn(1, 1, 2, 8))
    lse, pairs = torch.randn(1, 1, 2), torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 0]])
    results = []
    for tensors in ((rows, columns), (rows.contiguous(), columns.contiguous())):
        q, k = (x.detach().requires_grad_() for x in tensors)
        loss = alignment_loss(q, k, lse, pairs, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, (q, k))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_an_error(backend) -> None:
    q, k, _ = make_inputs(1, 1, 2, 3, 4, requires_grad=True)
    lse = torch.zeros(1, 1, 2, requires_grad=True)
    loss = alignment_loss(q, k, lse, drawn(4, 1, 2, 3), backend=backend)
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="alignment_loss has no second derivatives"):
        grad.square().sum().backward()


@pytest.mark.long
def test_same_bits_for_any_number_of_threads_and_order_of_entries(backend) -> None:
    tensors = make_inputs(8, 4, 20, 20, 16)
    pairs, upstream = drawn(300, 8, 20, 20), torch.randn(8, 4, 20, 16)
    wanted = both(backend, tensors, pairs, upstream)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            for _ in range(30):
                for a, b in zip(both(backend, tensors, pairs, upstream), wanted, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    # within a batch entry the order is that of the pairs; entries may come in any
    order = pairs[:, 0].sort(stable=True).indices
    for a, b in zip(both(backend, tensors, pairs[order], upstream)[1:], wanted[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 4)}, ValueError, r"query has the shape \[2, 3, 4\]"),
        ({"query": torch.zeros(1, 2, 3, 4).int()}, TypeError, "query has the dtype torch.int32"),
        ({"key": torch.zeros(1, 2, 5, 4).half()}, TypeError, "key has the dtype torch.float16"),
        ({"key": torch.zeros(1, 3, 5, 4)}, ValueError, r"key has the shape \[1, 3, 5, 4\]; .* divisor"),
        ({"key": torch.zeros(2, 2, 5, 4)}, ValueError, r"key has the shape \[2, 2, 5, 4\]"),
        ({"lse": torch.zeros(1, 2, 5)}, ValueError, r"lse has the shape \[1, 2, 5\]; it must be \[1, 2, 3\]"),
        ({"lse": torch.zeros(1, 2, 3).half()}, TypeError, "lse has the dtype torch.float16"),
        ({"pairs": torch.zeros(4, 2).long()}, ValueError, r"pairs has the shape \[4, 2\]"),
        ({"pairs": torch.zeros(4, 3)}, TypeError, "pairs has the dtype torch.float32"),
        (
            {"pairs": torch.tensor([[0, 0, 0], [1, 0, 0]])},
            ValueError,
            r"pairs\[1\] is \[1, 0, 0\]; its batch entry",
        ),
        ({"pairs": torch.tensor([[0, 3, 0]])}, ValueError, r"its row must lie in 0\.\.2"),
        ({"pairs": torch.tensor([[0, 0, -1]])}, ValueError, r"its column must lie in 0\.\.4"),
        ({"pairs": torch.zeros(4, 3, device="meta").long()}, ValueError, "pairs is on meta"),
        ({"weights": torch.zeros(2)}, ValueError, r"weights has the shape \[2\]; it must be \[P\] = \[1\]"),
        ({"heads": 3}, ValueError, "heads is 3; it must be a number of heads, 1..2"),
        ({"heads": 0}, ValueError, "heads is 0"),
        ({"heads": (0, 0)}, ValueError, r"heads is \(0, 0\)"),
        ({"heads": (0, 2)}, ValueError, r"heads is \(0, 2\)"),
        ({"reduction": "median"}, ValueError, "reduction is 'median'"),
        ({"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_errors_name_the_argument(changes, error, message) -> None:
    arguments = {
        "query": torch.zeros(1, 2, 3, 4),
        "key": torch.zeros(1, 2, 5, 4),
        "lse": torch.zeros(1, 2, 3),
        "pairs": torch.zeros(1, 3).long(),
        **changes,
    }
    with pytest.raises(error, match=message):
        alignment_loss(**arguments)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Sizes, heads, dtype and magnitude of one call; the tensors follow from them."""
    size = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33]))
    Hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    H = Hk * group
    some = st.lists(st.integers(0, H - 1), min_size=1, max_size=H, unique=True)
    return {
        "shape": (draw(st.integers(1, 3)), H, draw(size), draw(size), draw(size)),
        "Hk": Hk,
        "P": draw(st.sampled_from([0, 1, 2, 7, 30])),
        "dtype": draw(st.sampled_from([*DTYPES, torch.float64])),
        "heads": draw(st.one_of(st.none(), st.integers(1, H), some.map(tuple))),
        "magnitude": 10.0 ** draw(st.integers(-4, 1)),
        "linked": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def check(backend: str, call: dict) -> None:
    """Compare one call with the dense definition in float64."""
    B, H, L, S, D = call["shape"]
    tensors = make_inputs(
        *call["shape"], Hk=call["Hk"], dtype=call["dtype"], seed=call["seed"], magnitude=call["magnitude"]
    )
    pairs = drawn(call["P"], B, L, S, call["seed"])
    if call["causal"]:
        pairs[:, 2] = torch.minimum(pairs[:, 1], pairs[:, 2])
    request = (*tensors[:2], torch.empty(0), pairs)
    if dispatch.registry[OP][backend].refusal(*request) is not None:
        CASES[f"{backend}, refused"] += 1
        return
    CASES[f"{backend}, {call['dtype']}"] += 1
    leaves = [x.requires_grad_() for x in tensors]
    _, lse = attention(*leaves, enable_gqa=True, return_lse=True, is_causal=call["causal"])
    query = leaves[0] if call["linked"] else leaves[0] * 1
    losses = alignment_loss(
        query, leaves[1], lse, pairs, heads=call["heads"], reduction="none", backend=backend
    )
    weight = torch.randn(call["P"], generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((losses * weight).sum(), leaves[:2])
    q, k = (x.detach().double().requires_grad_() for x in tensors[:2])
    wide = k.repeat_interleave(H // call["Hk"], 1)
    scores = q @ wide.mT / math.sqrt(D)
    if call["causal"]:
        scores = scores.masked_fill(torch.ones(L, S).tril() == 0, -1e30)
    chosen = scores.log_softmax(-1)[:, numbers(call["heads"], H)]
    log_mean = chosen.logsumexp(1) - math.log(chosen.shape[1])
    # float32 where the op computes in it
    shares = pair_weights(pairs, L, B, torch.float64 if call["dtype"] == torch.float64 else torch.float32)
    exact = -shares.double() * log_mean[pairs[:, 0], pairs[:, 1], pairs[:, 2]]
    wanted = torch.autograd.grad((exact * weight).sum(), (q, k))
    eps = 2.0**-52 if call["dtype"] == torch.float64 else 2.0**-23
    top = float(scores.detach().masked_fill(scores < -1e29, 0.0).abs().max())
    rounding = 16 * eps * (1 + top + math.log(S))
    assert ((losses - exact).abs() <= rounding).all()
    narrow = torch.finfo(call["dtype"]).eps
    for a, b, other in zip(grads, wanted, (k, q), strict=True):
        slack = 4 * narrow * b.abs() + float(other.detach().abs().max()) * max(call["P"], 1) * 4 * rounding
        # attention's gradient and this one's, each rounded
        slack = slack + 4 * narrow * float(other.detach().abs().max()) * (
            weight.abs().sum() if call["P"] else 0
        )
        assert ((a.double() - b).abs() <= slack + (2.0**-22 if call["dtype"] == torch.float16 else 0.0)).all()


@settings(max_examples=max(EXAMPLES, settings().max_examples))
@given(call=calls())
def test_any_call(backend: str, call: dict) -> None:
    check(backend, call)


PEAK = """
import torch
from pathlib import Path
from nlpfast import alignment_loss, attention

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))

def step(T):
    q, k, v = (torch.randn(1, 8, T, 64).requires_grad_() for _ in range(3))
    pairs = torch.stack((torch.zeros(T).long(), torch.arange(T), torch.randint(T, (T,))), 1)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    out, lse = attention(q, k, v, return_lse=True)
    torch.autograd.grad(out.sum() + alignment_loss(q, k, lse, pairs), (q, k, v))
    return kilobytes("VmHWM") - before

torch.set_num_threads(1)
step(64)
print(step(2048))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.skipif(isinstance(dispatch.registry[OP]["cpu"], str), reason="needs the native library")
def test_no_memory_of_the_size_of_all_probabilities() -> None:
    """Those of 8 heads and 2,048 x 2,048 positions take 128 MB; output, gradients and lse 17 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 16_000 < int(done.stdout) < 40_000
