"""Packed attention on thousands of searched calls, against float64 on the padded batch."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nlpfast import dispatch, varlen_attention
from nlpfast.ops.attention.reference import dropout_keep
from nlpfast.testing import allowed_keys, eager_attention, make_inputs, rounding_sizes

OP = "varlen_attention"
CASES: Counter[str] = Counter()
# Triton's interpreter takes half a second for a call.
EXAMPLES = 80 if os.environ.get("TRITON_INTERPRET") == "1" else 2000
# test_attention_native.py runs them again for each lower instruction set.
EXAMPLES = 400 if "ATEN_CPU_CAPABILITY" in os.environ else EXAMPLES
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAUSAL = ("none", "top_left", "bottom_right")
NAMES = ("out", "lse", "dq", "dk", "dv")
# How many roundings of its own terms a result may be off.
ROUNDINGS = 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Tensors so small take longer on several threads, by far when other programs run.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Sequences, heads, dtype, dropout and seed of one call; the tensors follow from them."""
    length = st.one_of(st.integers(0, 4), st.integers(0, 20), st.sampled_from([31, 33, 65]))
    width = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 33, 64]))
    Hk = draw(st.integers(1, 2))
    return {
        "lengths": draw(st.lists(st.tuples(length, length), max_size=4)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "H": Hk * draw(st.integers(1, 2)),
        "Hk": Hk,
        "D": draw(width),
        "Dv": draw(width),
        "longer": draw(st.tuples(st.integers(0, 9), st.integers(0, 9))),
        "causal": draw(st.sampled_from(CAUSAL)),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "scale": draw(st.sampled_from([None, 0.5, -1.0])),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
    }


def pad(x: Tensor, lengths: list[int]) -> Tensor:
    """[total, H, ...] as [B, H, longest, ...]."""
    return pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)


def pack(x: Tensor, lengths: list[int]) -> Tensor:
    """The reverse of ``pad``."""
    return torch.cat([x[b, :, :length].transpose(0, 1) for b, length in enumerate(lengths)])


def exact_results(
    call: dict, tensors: list[Tensor], upstream: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Output, lse and gradients in float64, and the sizes of what is rounded on the way; packed."""
    queries, keys = sides(call)
    shape = (len(queries), call["H"], max(queries), max(keys))
    allowed = torch.zeros(shape, dtype=torch.bool)
    for b, (L, S) in enumerate(call["lengths"]):
        allowed[b, :, :L, :S] = allowed_keys((1, 1, L, S), causal=call["causal"])[0]
    p = call["dropout_p"]
    keep = dropout_keep(torch.tensor([call["seed"], 0]), p, shape) if p > 0 else None
    options = {"allowed": allowed, "keep": keep, "dropout_p": p, "scale": call["scale"]}
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    padded = [pad(x, side) for x, side in zip(doubles, (queries, keys, keys), strict=True)]
    tops = [pad(x.double(), queries) for x in upstream]
    out, lse = eager_attention(*padded, **options)
    some = allowed.any(-1)
    grads = torch.autograd.grad([out, lse[some]], doubles, [tops[0], tops[1][some]])
    sizes = rounding_sizes(*padded, *tops, **options)
    ends = (queries, queries, queries, keys, keys)
    packed_sizes = [pack(sizes[name], side) for name, side in zip(NAMES, ends, strict=True)]
    return [pack(out.detach(), queries), pack(lse.detach(), queries), *grads], packed_sizes


def sides(call: dict) -> tuple[list[int], list[int]]:
    """The lengths of the queries and those of the keys."""
    queries, keys = ([pair[side] for pair in call["lengths"]] for side in (0, 1))
    return queries, keys


def results(backend: str, call: dict, tensors: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Output, lse and gradients of the backend."""
    causal = call["causal"]
    out, lse = varlen_attention(
        *tensors,
        *(torch.tensor([0, *side]).cumsum(0, dtype=torch.int32) for side in sides(call)),
        *(max(side, default=0) + more for side, more in zip(sides(call), call["longer"], strict=True)),
        is_causal=causal != "none",
        causal_align="top_left" if causal == "none" else causal,
        enable_gqa=True,
        return_lse=True,
        backend=backend,
        **{name: call[name] for name in ("dropout_p", "scale", "seed")},
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], tensors, upstream)]


def close(name: str, actual: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Assert that the error is that of a few roundings; weights below 1e-38 are 0 in float32."""
    assert actual.shape == exact.shape and actual.dtype == dtype, name
    error = (actual.double() - exact).masked_fill(actual.double() == exact, 0.0).abs()
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 1e-28
    bound = ROUNDINGS * torch.finfo(dtype).eps * size + smallest
    assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times what is allowed"


@settings(max_examples=max(EXAMPLES, settings().max_examples))
@given(call=calls())
def test_any_call(backend: str, call: dict) -> None:
    torch.manual_seed(call["seed"] % 2**31)
    if dispatch.registry[OP][backend].refusal(
        *[torch.empty(0, 1, 1, dtype=call["dtype"])] * 3, None, None, 0
    ):
        # What the backend does not serve is asked of it in float32.
        call = {**call, "dtype": torch.float32}
    dtype, H, totals = call["dtype"], call["H"], [sum(side) for side in sides(call)]
    drawn = make_inputs(1, H, *totals, call["D"], Hk=call["Hk"], Dv=call["Dv"], seed=call["seed"] % 2**31)
    tensors = [x[0].transpose(0, 1).to(dtype).requires_grad_() for x in drawn]
    upstream = [torch.randn(totals[0], H, call["Dv"]).to(dtype), torch.randn(totals[0], H)]
    exact, sizes = exact_results(call, tensors, upstream) if call["lengths"] else ([], [])
    actual = results(backend, call, tensors, upstream)
    CASES[f"{backend}, {dtype}"] += 1
    for name, a, e, size in zip(NAMES, actual, exact, sizes, strict=False):
        close(name, a, e, size, torch.float32 if name == "lse" else dtype)
    assert exact or [list(x.shape[:2]) for x in actual] == [[0, H]] * 3 + [[0, call["Hk"]]] * 2
