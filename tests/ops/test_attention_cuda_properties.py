"""Attention on a CUDA device: dropout bit by bit, and thousands of searched calls in each dtype."""

import pytest
import test_attention_properties as properties
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention_cuda import (
    DEVICE,
    DTYPES,
    REACHED,
    drawn,
    moved,
    on_device,  # noqa: F401  (a fixture)
    pytestmark,  # noqa: F401  (the mark of this module too)
    results,
)

from nlpfast import attention, dispatch
from nlpfast.ops.attention import reference
from nlpfast.testing import make_inputs

OP = "attention"


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("seed", [-1, 2**63 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 2**32 - 1])
def test_dropped_elements(seed: int, offset: int) -> None:
    properties.test_dropped_elements("triton", seed, offset, 0.1)
    # What a kernel on the CPU drops; the definition stands in where the native library is missing.
    backend = "cpu" if not isinstance(dispatch.registry[OP]["cpu"], str) else "reference"
    query, key, _ = make_inputs(2, 3, 70, 90, 4)
    arguments = {"dropout_p": 0.1, "seed": torch.tensor([seed, offset])}
    values = torch.eye(90).expand(2, 3, 90, 90)
    here = attention(query, key, values, **arguments, backend=backend)
    there = moved(query, key, values, **arguments, backend="triton")
    assert torch.equal(here != 0, there != 0)


@pytest.mark.usefixtures("on_device")
def test_dropout() -> None:
    for p in (0.01, 0.5):
        properties.test_keep_rate("triton", p)
    properties.test_backward_drops_what_forward_dropped("triton")
    properties.test_probability_zero_and_one("triton")
    properties.test_seeds("triton")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["whole_64", "whole", "owned", "dq"])
def test_dropped_weights_in_every_kernel(kind: str, dtype: torch.dtype) -> None:
    """The output for unit vectors as values is the weights, dV for unit vectors upstream their transpose."""
    B, H, Hk, L, S = REACHED[kind]
    query, key, _ = drawn(B, H, L, S, 32, Hk=Hk, dtype=dtype)
    seed = torch.tensor([5, 3], device=DEVICE)
    keep = reference.dropout_keep(seed, 0.3, (B, H, L, S))
    # A key head's gradients are summed over its query heads.
    kept_by_some = keep.unflatten(1, (Hk, -1)).any(2).mT
    for first in range(0, max(L, S), 32):
        columns, rows = (torch.eye(n, device=DEVICE).roll(-first, 1)[:, :32].to(dtype) for n in (S, L))
        upstream = rows.expand(B, H, L, 32)
        out, *_, dv = results((query, key, columns.expand(B, Hk, S, 32)), upstream, dropout_p=0.3, seed=seed)
        for actual, whole in ((out, keep), (dv, kept_by_some)):
            expected = whole[..., first : first + 32]
            assert torch.equal(actual[..., : expected.shape[-1]] != 0, expected)


# What the searched calls ask for; the rest of a call, its sizes and numbers, is searched.
SEARCHED = (
    {"causal": "none"},
    {"causal": "top_left", "dropout": True},
    {"causal": "top_left", "lengths": True, "prefix": True},
    {"causal": "bottom_right", "lengths": True, "dropout": True},
    {"causal": "none", "mask": "bool", "mask_dims": (False, True, True, False), "dropout": True},
    {"causal": "bottom_right", "mask": "infinite", "mask_dims": (True, True, False, False), "prefix": True},
)


def of_few_kernels(call: dict, changes: dict) -> dict:
    """The call with the given features, its heads fixed and its lengths off 1 and multiples of 16."""
    lengths = {name: call[name] + 2 * (call[name] == 1 or call[name] % 16 == 0) for name in "LS"}
    sizes = {"B": call["B"] * 2, "H": 16, "Hk": 8, "D": 48, "Dv": 16, **lengths}
    features = {"mask": "none", "lengths": False, "prefix": False, "dropout": False, **changes}
    p = max(call["dropout_p"], 0.5) if features["dropout"] else 0.0
    return {**call, **sizes, **features, "dropout_p": p}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_call(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    before = properties.CASES.copy()

    @properties.SEARCH
    @given(call=properties.calls((dtype,)), changes=st.sampled_from(SEARCHED))
    def search(call: dict, changes: dict) -> None:
        properties.check("triton", of_few_kernels(call, changes))

    search()
    counted = properties.CASES - before
    assert counted[f"triton, {dtype}"] >= properties.EXAMPLES
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nsearched calls of attention on {DEVICE}: {dict(counted)}")
