"""Attention on thousands of searched calls, and its dropout against a Philox in plain integers."""

import math
import os
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nlpfast import attention, dispatch
from nlpfast.ops.attention import reference
from nlpfast.testing import allowed_keys, eager_attention, make_inputs, rounding_sizes

OP = "attention"
CASES: Counter[str] = Counter()
# Triton's interpreter takes half a second for a call.
EXAMPLES = 150 if os.environ.get("TRITON_INTERPRET") == "1" else 2000
# test_attention_native.py runs them again for each lower instruction set.
EXAMPLES = 400 if "ATEN_CPU_CAPABILITY" in os.environ else EXAMPLES
CAUSAL = ("none", "top_left", "bottom_right")
NAMES = ("out", "lse", "dq", "dk", "dv", "dmask")
EPS = torch.finfo(torch.float32).eps
# The sizes suppose independent errors; one that all rows share, as that of 1 / (1 - p), adds up in dv.
ROUNDINGS = 16


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> dict:
    """Shapes, dtype, masks, magnitudes, dropout and seed of one call; the tensors follow from them."""
    length = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33]))
    width = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 32, 33, 64]))
    Hk = draw(st.integers(1, 2))
    dtype = draw(st.sampled_from(dtypes))
    # The products of larger or smaller numbers leave the range of float16.
    exponent = st.integers(-1, 1) if dtype == torch.float16 else st.integers(-4, 4)
    return {
        "dtype": dtype,
        "B": draw(st.integers(0, 2)),
        "H": Hk * draw(st.integers(1, 2)),
        "Hk": Hk,
        "L": draw(length),
        "S": draw(length),
        "D": draw(width),
        "Dv": draw(width),
        "magnitude": 10.0 ** draw(exponent),
        "value_magnitude": 10.0 ** draw(exponent),
        "causal": draw(st.sampled_from(CAUSAL)),
        "mask": draw(st.sampled_from(["none", "none", "bool", "float", "infinite"])),
        "mask_dims": draw(st.tuples(*[st.booleans()] * 4)),
        "lengths": draw(st.booleans()),
        "prefix": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "scale": draw(st.sampled_from([None, "unit", "unit", 0.5, -1.0])),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
    }


def arguments(call: dict) -> tuple[tuple[Tensor, ...], dict, float | None]:
    """The tensors of a call, its masks and its scale; "unit" brings scores to about 1 at any magnitude."""
    B, H, L, S = (call[name] for name in "BHLS")
    seed = call["seed"] % 2**31
    generator = torch.Generator().manual_seed(seed)
    tensors = make_inputs(B, H, L, S, call["D"], Hk=call["Hk"], Dv=call["Dv"], seed=seed)
    sizes = (call["magnitude"], call["magnitude"], call["value_magnitude"])
    tensors = tuple(
        (x * size).to(call["dtype"]).requires_grad_() for x, size in zip(tensors, sizes, strict=True)
    )
    shape = [1 if one else n for one, n in zip(call["mask_dims"], (B, H, L, S), strict=True)]
    bits, added = torch.rand(shape, generator=generator) < 0.7, torch.randn(shape, generator=generator)
    masks: dict = {}
    if call["mask"] != "none":
        added = added.masked_fill(~bits, -math.inf) if call["mask"] == "infinite" else added
        masks["attn_mask"] = bits if call["mask"] == "bool" else added.requires_grad_()
    if call["lengths"]:
        masks["key_lengths"] = torch.randint(0, S + 1, (B,), generator=generator)
    if call["prefix"] and call["causal"] != "none":
        masks["prefix_lengths"] = torch.randint(0, S + 1, (B,), generator=generator)
    unit = 1 / (call["magnitude"] ** 2 * math.sqrt(call["D"]))
    return tensors, masks, unit if call["scale"] == "unit" else call["scale"]


def check(backend: str, call: dict) -> None:
    """Compare one call with eager PyTorch in float64, within the rounding of its own terms."""
    torch.manual_seed(call["seed"] % 2**31)
    tensors, masks, scale = arguments(call)
    causal, p, seed = call["causal"], call["dropout_p"], call["seed"]
    shape = tuple(call[name] for name in "BHLS")
    named = {"is_causal": causal != "none", "causal_align": CAUSAL[1] if causal == "none" else causal}
    named |= {"dropout_p": p, "scale": scale, "enable_gqa": True, "seed": seed, "backend": backend}
    request = (*tensors, *(masks.get(name) for name in ("attn_mask", "key_lengths", "prefix_lengths")))
    if dispatch.registry[OP][backend].refusal(*request) is not None:
        with pytest.raises(RuntimeError, match="cannot run there"):
            attention(*tensors, **masks, **named)
        CASES[f"{backend}, refused"] += 1
        return
    CASES[f"{backend}, {call['dtype']}"] += 1
    mask = masks.get("attn_mask")
    inputs = [*tensors, *([mask] if mask is not None and mask.is_floating_point() else [])]
    allowed = allowed_keys(shape, causal=causal, **masks)
    dropped = {
        "keep": reference.dropout_keep(torch.tensor([seed, 0]), p, shape) if p > 0 else None,
        "dropout_p": p,
    }
    out, lse = attention(*tensors, **masks, **named, return_lse=True)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    wide = doubles[3] if len(doubles) > 3 else mask
    exact, exact_lse = eager_attention(*doubles[:3], wide, allowed=allowed, scale=scale, **dropped)
    some = allowed.any(-1)
    assert torch.equal(lse.isneginf(), ~some) and torch.equal(lse.isfinite(), some), (
        "lse is -inf in empty rows alone"
    )
    grad, grad_lse = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape)
    actual = torch.autograd.grad([out, lse[some]], inputs, [grad, grad_lse[some]])
    wanted = torch.autograd.grad([exact, exact_lse[some]], doubles, [grad.double(), grad_lse[some].double()])
    sizes = rounding_sizes(*tensors, grad, grad_lse, mask, allowed=allowed, scale=scale, **dropped)
    # Where scores are so large that their rounding moves the weights at will, no result is known but lse.
    known = not sizes["scores"].numel() or sizes["scores"].max() * ROUNDINGS * EPS < 0.1
    CASES[f"{backend}, of these with known gradients"] += bool(known)
    for name, a, e in zip(NAMES, (out, lse, *actual), (exact, exact_lse, *wanted), strict=False):
        assert a.shape == e.shape and not a.isnan().any() and (name == "lse" or a.isfinite().all()), name
        if known or name == "lse":
            eps = EPS if name == "lse" else torch.finfo(call["dtype"]).eps
            close(name, a.detach(), e.detach(), sizes[name].sum_to_size(e.shape), eps)


def close(name: str, actual: Tensor, exact: Tensor, size: Tensor, eps: float) -> None:
    """Assert that the error is that of a few roundings; weights below 1e-38 are 0 in float32."""
    error = (actual.double() - exact).masked_fill(actual.double() == exact, 0.0).abs()
    smallest = torch.finfo(actual.dtype).smallest_normal if actual.dtype == torch.float16 else 1e-28
    bound = ROUNDINGS * eps * size + smallest
    assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times what is allowed"


SEARCH = settings(max_examples=max(EXAMPLES, settings().max_examples))


@SEARCH
@given(call=calls((torch.float32,)))
def test_any_call(backend: str, call: dict) -> None:
    check(backend, call)


@SEARCH
@given(call=calls((torch.bfloat16, torch.float16)))
def test_any_call_in_16_bits(call: dict) -> None:
    for backend, module in dispatch.registry[OP].items():
        if backend != "reference" and not isinstance(module, str):
            check(backend, call)


def philox_of_integers(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k[0], product1 % 2**32, product0 >> 32 ^ c[3] ^ k[1], product0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


# Counter, key and output of the test vectors that the authors of Philox publish.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    assert philox_of_integers(counter, key) == words
    tensors = [tuple(torch.tensor(x) for x in side) for side in (counter, key)]
    assert tuple(int(word) for word in reference.philox(*tensors)) == words


def weights(backend: str, B: int, H: int, L: int, S: int, p: float, seed: int | Tensor | None) -> Tensor:
    """The attention weights after dropout, [B, H, L, S]: the output for unit vectors as values."""
    query, key, _ = make_inputs(B, H, L, S, 4)
    return attention(query, key, torch.eye(S).expand(B, H, S, S), dropout_p=p, seed=seed, backend=backend)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropped_elements(backend: str, seed: int, offset: int, p: float) -> None:
    B, H, L, S = 2, 3, 17, 21
    kept = weights(backend, B, H, L, S, p, torch.tensor([seed, offset])) != 0
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for b, h, i, j in [
        (0, 0, 0, 0),
        (1, 2, 16, 20),
        (0, 1, 7, 5),
        (1, 0, 8, 5),
        (1, 1, 9, 19),
        (0, 2, 14, 0),
    ]:
        words = philox_of_integers((j, i // 8, b * H + h, offset), key)
        field = words[i % 8 // 2] >> (16 if i % 2 else 0) & 0xFFFF
        assert bool(kept[b, h, i, j]) == (field >= round(p * 65536)), (b, h, i, j)
    assert torch.equal(kept, reference.dropout_keep(torch.tensor([seed, offset]), p, (B, H, L, S)))


@pytest.mark.parametrize("p", [0.1, *(pytest.param(p, marks=pytest.mark.long) for p in (0.01, 0.5, 0.9))])
def test_keep_rate(backend: str, p: float) -> None:
    kept = (weights(backend, 4, 8, 128, 128, p, 42) != 0).double()
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        rate = kept.mean(dims)
        sigma = math.sqrt(p * (1 - p) * rate.numel() / kept.numel())
        # Four sigma for the whole; among 128 rows or columns five is as rare.
        assert ((rate - (1 - p)).abs() < (4 if rate.numel() == 1 else 5) * sigma).all()
    # Neighbours in each dimension, and query and key swapped, are independent.
    pairs = [(kept, kept.roll(1, dim)) for dim in range(4)] + [(kept, kept.mT)]
    for a, b in pairs:
        covariance = ((a - (1 - p)) * (b - (1 - p))).mean()
        assert abs(covariance) < 6 * p * (1 - p) / math.sqrt(kept.numel())


@pytest.mark.parametrize("kept_of_65536", [1, 2])
def test_threshold_is_exact(kept_of_65536: int) -> None:
    keep = reference.dropout_keep(torch.tensor([3, 0]), 1 - kept_of_65536 / 65536, (1, 1, 2048, 2048))
    wanted = 64 * kept_of_65536
    assert abs(int(keep.sum()) - wanted) < 4 * math.sqrt(wanted)


def test_backward_drops_what_forward_dropped(backend: str) -> None:
    query, key, _ = make_inputs(2, 3, 19, 23, 8)
    values = torch.eye(23).expand(2, 3, 23, 23).clone().requires_grad_()
    kept = attention(query, key, values, dropout_p=0.4, seed=9, backend=backend)
    (dv,) = torch.autograd.grad(kept, values, torch.eye(19, 23).expand(2, 3, 19, 23))
    # dV = Pᵀ dO with unit vectors upstream is the transposed weight matrix itself.
    torch.testing.assert_close(dv[..., :19], kept[..., :19, :].mT[..., :19])


@pytest.mark.parametrize(("L", "S"), [(70, 300), (300, 70), (200, 200)])
def test_dropout_over_several_tiles(backend: str, L: int, S: int) -> None:
    tensors = make_inputs(1, 2, L, S, 16, requires_grad=True)
    upstream = torch.randn(1, 2, L, 16)
    results = []
    for name in (backend, "reference"):
        out = attention(*tensors, dropout_p=0.3, is_causal=True, seed=4, backend=name)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_probability_zero_and_one(backend: str) -> None:
    tensors = make_inputs(2, 3, 9, 7, 8, requires_grad=True)
    plain = attention(*tensors, backend=backend)
    assert torch.equal(attention(*tensors, dropout_p=0.0, seed=3, backend=backend), plain)
    out, lse = attention(*tensors, dropout_p=1.0, seed=3, return_lse=True, backend=backend)
    assert not out.any() and lse.isfinite().all()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), tensors))


def test_seeds(backend: str) -> None:
    def call(seed: int | Tensor | None) -> Tensor:
        return weights(backend, 2, 2, 16, 16, 0.5, seed) != 0

    torch.manual_seed(1)
    first, second = call(None), call(None)
    torch.manual_seed(1)
    assert torch.equal(call(None), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    same = [call(seed) for seed in (6, torch.tensor(6), torch.tensor([6, 0]), torch.tensor([6, 7, 0])[::2])]
    assert torch.equal(torch.get_rng_state(), state), "a seed of the caller's leaves the generator alone"
    assert all(torch.equal(x, same[0]) for x in same)
    others = [call(seed) for seed in (7, 6 + 2**32, -6, torch.tensor([6, 1]))]
    assert not any(torch.equal(x, same[0]) for x in others)
