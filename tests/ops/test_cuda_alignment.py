"""The CUDA kernels of attention at pairs, by the emulator: groups, odd pairs, and attention with them."""

import math
import os

import pytest
import torch
from torch import Tensor

from nlpfast import alignment_loss, attention, attention_at, dispatch, hard_alignment
from nlpfast.ops import pair_rows

EMULATED = True
pytestmark = pytest.mark.skipif("EMULATED_CUDA" not in os.environ, reason="make test-cuda emulates a device")


def drawn(P: int, *sizes: int, outside: int = 0) -> Tensor:
    """Pairs in no order, some of them outside of the sizes by as much as `outside`."""
    generator = torch.Generator().manual_seed(P)
    columns = [torch.randint(-outside, n + outside, (P,), generator=generator) for n in sizes]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("P", [0, 1, 31, 300, 1000])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 33), (3, 64, 40)], ids=str)
@pytest.mark.parametrize("outside", [0, 2])
def test_groups(monkeypatch: pytest.MonkeyPatch, P: int, sizes: tuple[int, int, int], outside: int) -> None:
    """Each row has its pairs in their order; by the kernel and by sorting."""
    B, L, S = sizes
    pairs = drawn(P, *sizes, outside=outside)
    found = pair_rows.group_pairs(pairs, B, L, S)
    there = ((pairs >= 0) & (pairs < torch.tensor(sizes))).all(1)
    for (order, begin), column, rows in ((found[:2], 1, L), (found[2:], 2, S)):
        assert begin.dtype == order.dtype == torch.int32 and begin.shape == (B * rows + 1,)
        for row in range(B * rows):
            own = there & (pairs[:, 0] == row // rows) & (pairs[:, column] == row % rows)
            assert torch.equal(order[begin[row] : begin[row + 1]].long(), own.nonzero()[:, 0])
        assert begin[-1] == there.sum()
    monkeypatch.setattr(pair_rows, "READ", 0)
    total = int(there.sum())
    for number, (ours, sorted_) in enumerate(zip(found, pair_rows.group_pairs(pairs, B, L, S), strict=True)):
        # of the orders what comes after the last pair that is there means nothing
        end = total if number % 2 == 0 else None
        assert torch.equal(ours[:end], sorted_[:end])


def test_many_pairs_of_one_row() -> None:
    pairs = torch.tensor([[0, 2, 1]]).repeat(777, 1)
    by_query, query_begin, by_key, key_begin = pair_rows.group_pairs(pairs, 1, 4, 3)
    assert torch.equal(by_query, torch.arange(777, dtype=torch.int32)) and torch.equal(by_key, by_query)
    assert query_begin.tolist() == [0, 0, 0, 777, 777] and key_begin.tolist() == [0, 0, 777, 777]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_that_are_not_there(dtype: torch.dtype) -> None:
    """They have NaN, and change no gradient of others."""
    module = dispatch.registry["alignment_loss"]["cuda"]
    q, k = (torch.randn(2, 3, n, 16).to(dtype) for n in (5, 6))
    lse = torch.randn(2, 3, 5)
    pairs = torch.tensor([[0, 1, 2], [2, 0, 0], [1, 4, 5], [0, 5, 0], [1, -1, 3], [0, 0, 6], [-1, 0, 0]])
    there = torch.tensor([True, False, True, False, False, False, False])
    terms = module.forward(q, k, lse, pairs, (2, 0), 0.5)
    assert torch.equal(terms.isnan().all(1), ~there)
    found, expected = ([torch.zeros_like(x) for x in (q, k, lse)] for _ in range(2))
    slopes = torch.randn(7, 2)
    module.backward(slopes, q, k, pairs, (2, 0), 0.5, *found)
    module.backward(slopes[there], q, k, pairs[there], (2, 0), 0.5, *expected)
    assert all(
        torch.equal(ours, theirs) and theirs.any() for ours, theirs in zip(found, expected, strict=True)
    )


def supervised(backend: str, tensors: list[Tensor], pairs: Tensor, heads: object, **options) -> list[Tensor]:
    """Gradients of a sum of attention's output and of an alignment loss."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attention(*leaves, return_lse=True, backend=backend, **options)
    # the reference has no backend of its own for the loss: float64
    loss = alignment_loss(*leaves[:2], lse, pairs, heads=heads, backend=backend)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return list(torch.autograd.grad(loss + (weights * out).sum(), leaves))


@pytest.mark.parametrize("kind", ["plain", "causal", "lengths", "dropout"])
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("L", "S", "heads"), [(64, 64, 1), (17, 40, None), (5, 6, (2, 0)), (65, 30, None)])
def test_attention_and_alignment(
    monkeypatch: pytest.MonkeyPatch, kind: str, D: int, dtype: torch.dtype, L: int, S: int, heads: object
) -> None:
    B, H = 2, 3
    generator = torch.Generator().manual_seed(L + S)
    tensors = [torch.randn(B, H, n, D, generator=generator).to(dtype) for n in (L, S, S)]
    pairs = drawn(120, B, L, S)
    options: dict[str, object] = {}
    if kind == "causal":
        options = {"is_causal": True}
        pairs = pairs[pairs[:, 2] <= pairs[:, 1]]
    elif kind == "lengths":
        options = {"key_lengths": torch.tensor([S, S // 2])}
        pairs = pairs[(pairs[:, 0] == 0) | (pairs[:, 2] < S // 2)]
    elif kind == "dropout":
        options = {"dropout_p": 0.25, "seed": 11}
    added = []
    module = dispatch.registry["attention"]["cuda"]
    taken = module._slopes
    monkeypatch.setattr(module, "_slopes", lambda *x: added.append(taken(*x)) or added[-1])
    found = supervised("cuda", tensors, pairs, heads, **options)
    assert len(added) == 1 and (added[0] is None) == (L > 64)
    exact = supervised("reference", [x.double() for x in tensors], pairs, heads, **options)
    eager = supervised("reference", tensors, pairs, heads, **options)
    for ours, theirs, wanted in zip(found, eager, exact, strict=True):
        error, allowed = (ours.double() - wanted).abs().max(), (theirs.double() - wanted).abs().max()
        assert error <= 2 * allowed + 2e-3
    assert all(
        torch.equal(*x) for x in zip(found, supervised("cuda", tensors, pairs, heads, **options), strict=True)
    )


def test_what_is_refused() -> None:
    refusal = dispatch.registry["alignment_loss"]["cuda"].refusal
    q, lse, pairs = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64)
    assert refusal(q, q, lse, pairs) is None
    assert "query is torch.float64" in refusal(q.double(), q.double(), lse.double(), pairs)
    assert "query is on meta" in refusal(q.to("meta"), q, lse, pairs)
    many = torch.zeros(1, 129, 3, 4)
    assert "got 129" in refusal(many, many, lse, pairs)


def test_sizes_of_nothing() -> None:
    """No pairs, no keys, no queries, no batch."""
    for B, L, S in ((0, 3, 3), (1, 0, 3), (1, 3, 0), (1, 3, 3)):
        q, k = torch.zeros(B, 2, L, 8, requires_grad=True), torch.zeros(B, 2, S, 8, requires_grad=True)
        lse, none = torch.zeros(B, 2, L, requires_grad=True), torch.zeros(0, 3, dtype=torch.int64)
        loss = alignment_loss(q, k, lse, none, backend="cuda")
        assert loss == 0 and not any(x.any() for x in torch.autograd.grad(loss, (q, k, lse)))
        found = hard_alignment(q, k, lse, backend="cuda")
        assert found.shape == (B, L) and (found == (0 if S else -1)).all()


def test_probabilities_sum_to_one() -> None:
    q, k = (torch.randn(2, 4, n, 24) for n in (3, 7))
    lse = (q @ k.mT / math.sqrt(24)).logsumexp(-1)
    b, t, s = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 7)), indexing="ij")
    found = attention_at(q, k, lse, torch.stack((b, t, s), -1).view(-1, 3), heads=(1, 3), backend="cuda")
    torch.testing.assert_close(found.view(2, 3, 7).sum(-1), torch.ones(2, 3))
