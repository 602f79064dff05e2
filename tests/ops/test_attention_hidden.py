"""What no query sees and queries that see nothing: exact zeros, whatever is stored there."""

import math

import pytest
import torch
from test_attention import NAMES, run, served

from nlpfast import attention
from nlpfast.testing import make_inputs

OP = "attention"


def test_rows_without_keys(backend: str) -> None:
    tensors = make_inputs(2, 2, 6, 3, 4, requires_grad=True)
    lengths = torch.tensor([3, 0])
    arguments = {"is_causal": True, "causal_align": "bottom_right", "key_lengths": lengths}
    out, lse = attention(*tensors, **arguments, return_lse=True, backend=backend)
    # bottom_right hides all keys from the first L - S queries, and the second batch entry has none at all.
    empty = torch.zeros(2, 2, 6, dtype=torch.bool)
    empty[0, :, :3], empty[1] = True, True
    assert torch.equal(lse.isneginf(), empty) and lse[~empty].isfinite().all()
    assert not out[empty].any() and out[~empty].all()
    # Nor must gradients matter that reach lse where it is -inf, infinite for lse².
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.exp().sum() + lse.square().sum(), tensors)
    assert not dq[empty].any() and not dk[1].any() and not dv[1].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


BLIND = {
    "bottom_right": {"is_causal": True, "causal_align": "bottom_right"},
    "bool": {"attn_mask": (torch.arange(6) >= 2).unsqueeze(-1)},
    "float": {"attn_mask": torch.zeros(6, 4).masked_fill((torch.arange(6) < 2).unsqueeze(-1), -math.inf)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blind", list(BLIND))
def test_garbage_in_queries_that_see_nothing(backend: str, blind: str, dtype: torch.dtype) -> None:
    clean, upstream = make_inputs(2, 2, 6, 4, 8, dtype=dtype), (torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6))
    upstream = (upstream[0].to(dtype), upstream[1])
    arguments = BLIND[blind]
    if not served(backend, clean, **arguments):
        return
    expected = run(backend, tuple(x.clone().requires_grad_() for x in clean), upstream, **arguments)
    for garbage in (math.nan, math.inf):
        clean[0][:, :, :2] = garbage
        upstream[0][:, :, :2] = garbage
        leaves = [x.clone().requires_grad_() for x in clean]
        out, lse = attention(*leaves, **arguments, return_lse=True, backend=backend)
        grads = torch.autograd.grad([out, lse], leaves, list(upstream))
        for name, a, e in zip(NAMES, (out, lse, *grads), expected, strict=False):
            assert torch.equal(a, e), name


HIDDEN = {
    "lengths": {"key_lengths": torch.tensor([4, 9])},
    "top_left": {"is_causal": True},
    "bool": {"attn_mask": torch.arange(9) < 4},
    "float": {"attn_mask": torch.zeros(9).masked_fill(torch.arange(9) >= 4, -math.inf)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("hidden", list(HIDDEN))
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_garbage_in_hidden_keys_and_values(
    backend: str, hidden: str, garbage: float, dropout_p: float, dtype: torch.dtype
) -> None:
    arguments = {k: v.unsqueeze(0) if k == "attn_mask" else v for k, v in HIDDEN[hidden].items()}
    query, key, value = make_inputs(2, 2, 4, 9, 8, dtype=dtype)
    arguments |= {"dropout_p": dropout_p, "seed": 3}
    if not served(backend, (query, key, value), **arguments):
        return
    upstream = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4)
    clean, dirty = (tuple(x.clone() for x in (query, key, value)) for _ in range(2))
    for x in dirty[1:]:
        x[: 1 if hidden == "lengths" else 2, :, 4:] = garbage
    clean, dirty = (tuple(x.requires_grad_() for x in side) for side in (clean, dirty))
    expected, actual = (run(backend, side, upstream, **arguments) for side in (clean, dirty))
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        assert torch.equal(a, e), name


@pytest.mark.parametrize(("S", "hidden"), [(5, 5), (200, 130), (200, 200)])
def test_scores_of_minus_infinity_weigh_nothing(backend: str, S: int, hidden: int) -> None:
    """Keys that are -inf give scores of -inf without a mask; a row of nothing else is an empty row."""
    query, key, value = torch.ones(1, 1, 2, 4), torch.randn(1, 1, S, 4), torch.randn(1, 1, S, 3)
    key[:, :, :hidden] = -math.inf
    value.requires_grad_()
    out, lse = attention(query, key, value, return_lse=True, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), value)
    expected = attention(query, key[:, :, hidden:], value[:, :, hidden:], backend=backend)
    torch.testing.assert_close(out, expected)
    assert not grad[:, :, :hidden].any() and grad.isfinite().all()
    assert lse.isneginf().all() == (hidden == S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_garbage_in_hidden_keys_or_values_alone(
    backend: str, kind: str, where: str, garbage: float, dtype: torch.dtype
) -> None:
    """One of the two is clean, and must not stand for the other."""
    mask = (torch.arange(9) < 4).unsqueeze(0)
    if kind == "float":
        mask = torch.zeros(1, 9).masked_fill(~mask, -math.inf)
    clean = make_inputs(2, 2, 4, 9, 8, dtype=dtype)
    if not served(backend, clean, attn_mask=mask):
        return
    dirty = tuple(x.clone() for x in clean)
    dirty[1 if where == "keys" else 2][:, :, 4:] = garbage
    upstream = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4)
    expected, actual = (
        run(backend, tuple(x.requires_grad_() for x in side), upstream, attn_mask=mask)
        for side in (clean, dirty)
    )
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        assert torch.equal(a, e), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keys_of_minus_infinity_that_one_head_of_a_group_sees(backend: str, dtype: torch.dtype) -> None:
    """Such a key weighs nothing for the head that sees it, and is no garbage to be cleaned for it."""
    query, key, value = torch.ones(1, 2, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 3)
    key[:, :, 2] = -math.inf
    query, key, value = (x.to(dtype) for x in (query, key, value))
    mask = torch.ones(1, 2, 3, 5, dtype=torch.bool)
    mask[:, 0, :, 2] = False
    value.requires_grad_()
    if not served(backend, (query, key, value), attn_mask=mask, enable_gqa=True):
        return
    out = attention(query, key, value, mask, enable_gqa=True, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), value)
    assert grad.isfinite().all() and not grad[:, :, 2].any() and grad[:, :, [0, 1, 3, 4]].all()
