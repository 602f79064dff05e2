"""Every backend of attention against the same computation in float64: shapes, masks, dtypes, empty rows."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nlpfast import attention, dispatch
from nlpfast.testing import (
    allowed_keys,
    assert_no_worse,
    eager_attention,
    make_inputs,
    rounding_sizes,
)

OP = "attention"
LENGTHS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257)
HEAD_SIZES = (1, 2, 3, 7, 8, 16, 17, 32, 33, 63, 64, 65, 80, 96, 127, 128, 129, 255, 256)
NAMES = ("out", "lse", "dq", "dk", "dv", "dmask")
CAUSAL = ("none", "top_left", "bottom_right")
MULTIPLIED_BY_NUMPY = os.environ.get("TRITON_INTERPRET") == "1"


def causal_arguments(causal: str) -> dict:
    return {"is_causal": causal != "none", "causal_align": "top_left" if causal == "none" else causal}


def served(backend: str, tensors: tuple, **kwargs) -> bool:
    """Whether the backend serves the call; if it does not, naming it must raise."""
    names = ("attn_mask", "key_lengths", "prefix_lengths")
    request = (*tensors, *(kwargs.get(name) for name in names))
    reason = dispatch.registry[OP][backend].refusal(*request)
    if reason is None:
        return True
    with pytest.raises(RuntimeError, match="cannot run there"):
        attention(*tensors, **kwargs, backend=backend)
    return False


def gradients(
    outputs: tuple[Tensor, Tensor], inputs: list[Tensor], upstream: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Gradients through the output and lse; lse of an empty row is a constant."""
    out, lse = outputs
    finite = lse.isfinite()
    loss = (out * upstream[0].to(out.dtype)).sum() + (lse[finite] * upstream[1].to(lse.dtype)[finite]).sum()
    return list(torch.autograd.grad(loss, inputs))


def run(backend: str, tensors: tuple, upstream: tuple, **kwargs) -> list[Tensor]:
    """Output, lse and gradients of one call."""
    outputs = attention(*tensors, **kwargs, return_lse=True, backend=backend)
    inputs = [x for x in (*tensors, kwargs.get("attn_mask")) if x is not None and x.requires_grad]
    return [*(x.detach() for x in outputs), *gradients(outputs, inputs, upstream)]


def eager(tensors: tuple, upstream: tuple, dtype: torch.dtype, causal: str, **kwargs) -> list[Tensor]:
    """The same in eager PyTorch, computed in ``dtype``."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().to(dtype).requires_grad_(mask.requires_grad)
    shape = (*tensors[0].shape[:3], tensors[1].shape[2])
    lengths = {name: kwargs.get(name) for name in ("key_lengths", "prefix_lengths")}
    allowed = allowed_keys(shape, attn_mask=mask, causal=causal, **lengths)
    outputs = eager_attention(*inputs, mask, allowed=allowed, scale=kwargs.get("scale"))
    inputs += [mask] if mask is not None and mask.requires_grad else []
    return [*(x.detach() for x in outputs), *gradients(outputs, inputs, upstream)]


def compare(backend: str, tensors: tuple, causal: str = "none", **kwargs) -> None:
    """Hold output, lse and gradients to promise 1: no worse than eager PyTorch in the same dtype."""
    tensors = tuple(x.detach().requires_grad_() for x in tensors)
    arguments = {
        **kwargs,
        **causal_arguments(causal),
        "enable_gqa": tensors[0].shape[1] != tensors[1].shape[1],
    }
    if not served(backend, tensors, **arguments):
        return
    device, (B, H, L, _) = tensors[0].device, tensors[0].shape
    upstream = (
        torch.randn(B, H, L, tensors[2].shape[3], device=device),
        torch.randn(B, H, L, device=device),
    )
    actual = run(backend, tensors, upstream, **arguments)
    hold(actual, tensors, upstream, causal, **kwargs)


def hold(actual: list[Tensor], tensors: tuple, upstream: tuple, causal: str, **kwargs) -> None:
    """Hold what ``run`` returned to promise 1; eager PyTorch computes where the tensors are."""
    same, exact = (
        eager(tensors, upstream, dtype, causal, **kwargs) for dtype in (tensors[0].dtype, torch.float64)
    )
    lengths = {name: kwargs.get(name) for name in ("key_lengths", "prefix_lengths")}
    mask = kwargs.get("attn_mask")
    shape = (*tensors[0].shape[:3], tensors[1].shape[2])
    allowed = allowed_keys(shape, attn_mask=mask, causal=causal, **lengths).to(tensors[0].device)
    sizes = rounding_sizes(*tensors, *upstream, mask, allowed=allowed, scale=kwargs.get("scale"))
    assert len(actual) == len(exact)
    for name, a, e, r in zip(NAMES, actual, same, exact, strict=False):
        size = sizes[name].sum_to_size(r.shape)
        if name == "lse":
            a, e, r, size = (x.unsqueeze(-1) for x in (a, e, r, size))
        # In float64 the yardstick itself has errors of that size. Triton's interpreter multiplies by NumPy,
        # which adds up in another order on each machine.
        ulps = 8.0 if tensors[0].dtype == torch.float64 else 3.0 if MULTIPLIED_BY_NUMPY else 2.0
        assert_no_worse(name, a, e, r, factor=1.5 if name.startswith("d") else 1.0, ulps=ulps, size=size)


SHAPES = [
    pytest.param(L, S, D, causal, marks=[pytest.mark.long] * (L * S > 10_000))
    for (L, S), D, causal in zip(
        itertools.product(LENGTHS, LENGTHS),
        itertools.cycle(HEAD_SIZES),
        itertools.cycle(CAUSAL),
        strict=False,
    )
]


@pytest.mark.parametrize(("L", "S", "D", "causal"), SHAPES)
def test_lengths_and_head_sizes(backend: str, L: int, S: int, D: int, causal: str) -> None:
    compare(backend, make_inputs(2, 3, L, S, D, Dv=D, seed=L * 1000 + S), causal)


@pytest.mark.parametrize(
    "D", [pytest.param(D, marks=[pytest.mark.long] * (D % 16 not in (0, 1))) for D in range(1, 257)]
)
def test_every_head_size(backend: str, D: int) -> None:
    compare(backend, make_inputs(1, 2, 5, 9, D, Dv=257 - D, seed=D), CAUSAL[D % 3])


def masks(B: int, H: int, L: int, S: int, device: str = "cpu") -> dict[str, dict]:
    """Arguments of every kind of mask, by name; some hide all keys of a row."""
    generator = torch.Generator().manual_seed(L * S)
    bits = torch.rand(B, H, L, S, generator=generator) < 0.7
    bits[0, 0, 0] = False
    added = torch.randn(B, H, L, S, generator=generator)
    lengths = torch.randint(0, S + 1, (B,), generator=generator)
    prefix = torch.randint(0, S + 1, (B,), generator=generator)
    bits, added, lengths, prefix = (x.to(device) for x in (bits, added, lengths, prefix))
    return {
        "bool": {"attn_mask": bits},
        "bool_2d": {"attn_mask": bits[0, 0]},
        "bool_3d": {"attn_mask": bits[0]},
        "bool_keys": {"attn_mask": bits[:, :1, -1:]},
        "bool_queries": {"attn_mask": bits[:1, :, :, :1]},
        "float": {"attn_mask": added.clone().requires_grad_()},
        "float_2d": {"attn_mask": added[0, 0].clone().requires_grad_()},
        "float_heads": {"attn_mask": added[:1, :, -1:].clone().requires_grad_()},
        "float_scalar": {"attn_mask": added[:1, :1, :1, :1].clone().requires_grad_()},
        "float_infinite": {"attn_mask": added.masked_fill(~bits, -math.inf).requires_grad_()},
        "float_expanded": {"attn_mask": added[:, :1].expand(B, H, L, S)},
        "lengths": {"key_lengths": lengths},
        "lengths_0": {"key_lengths": torch.zeros_like(lengths)},
        "lengths_causal": {"key_lengths": lengths, "causal": "top_left"},
        "lengths_bottom_right": {"key_lengths": lengths, "causal": "bottom_right"},
        "prefix": {"prefix_lengths": prefix, "causal": "top_left"},
        "prefix_bottom_right": {"prefix_lengths": prefix, "causal": "bottom_right"},
        "float_causal": {"attn_mask": added.clone().requires_grad_(), "causal": "top_left"},
        "all": {
            "attn_mask": bits,
            "key_lengths": lengths,
            "prefix_lengths": prefix,
            "causal": "bottom_right",
        },
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize(
    "heads",
    [(3, 3), (6, 2), pytest.param((4, 1), marks=pytest.mark.long)],
    ids=["equal", "grouped", "one_key_head"],
)
@pytest.mark.parametrize(("L", "S"), [(17, 17), (5, 33), (40, 7), pytest.param(1, 1, marks=pytest.mark.long)])
@pytest.mark.parametrize("mask", list(masks(1, 1, 1, 1)))
def test_masks_and_grouped_heads(backend: str, mask: str, L: int, S: int, heads: tuple[int, int]) -> None:
    H, Hk = heads
    compare(backend, make_inputs(3, H, L, S, 12, Hk=Hk, Dv=10), **masks(3, H, L, S)[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", ["scale", "float", "lengths_causal", "prefix"])
@pytest.mark.parametrize(("L", "S", "D"), [(33, 65, 32), (1, 17, 64), (129, 16, 7)])
def test_dtypes(backend: str, dtype: torch.dtype, mask: str, L: int, S: int, D: int) -> None:
    compare(backend, make_inputs(2, 4, L, S, D, Hk=2, dtype=dtype), **masks(2, 4, L, S)[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("D", [1, 7, 16, 17, 32, 33, 64, 65, 80, 128, 256])
@pytest.mark.parametrize(("L", "S"), [(15, 17), (64, 64), (65, 63), (127, 129), (257, 300), (1, 130)])
def test_16_bit_lengths_and_head_sizes(
    backend: str, dtype: torch.dtype, causal: str, D: int, L: int, S: int
) -> None:
    if D > 65 and L > 130:
        D = 40
    compare(backend, make_inputs(1, 2, L, S, D, Dv=max(1, 80 - D), dtype=dtype, seed=L + D), causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(
    "kind",
    ["bool", "float", *(pytest.param(f"float_{of}", marks=pytest.mark.long) for of in ("keys", "queries"))],
)
def test_masks_that_hide_whole_tiles(backend: str, dtype: torch.dtype, causal: str, kind: str) -> None:
    L, S = 200, 300
    visible = torch.zeros(2, 1, L, S, dtype=torch.bool)
    visible[0, :, :70, 130:260], visible[1, :, 64:128] = True, True
    visible[0, :, 150:, 3] = True
    mask = torch.randn(2, 1, L, S).masked_fill(~visible, -math.inf)
    mask = {
        "bool": visible,
        "float": mask,
        "float_keys": mask[:, :, :1],
        "float_queries": mask[..., 130:131],
    }[kind]
    if kind != "bool":
        mask = mask.clone().requires_grad_()
    prefix = {} if causal == "none" else {"prefix_lengths": torch.tensor([140, 5])}
    tensors = make_inputs(2, 2, L, S, 24, dtype=dtype)
    compare(backend, tensors, causal, attn_mask=mask, key_lengths=torch.tensor([270, 300]), **prefix)


@pytest.mark.parametrize("magnitude", [1e-4, 1e-2, 3.0])
def test_magnitudes(backend: str, magnitude: float) -> None:
    compare(backend, make_inputs(2, 2, 33, 65, 32, magnitude=magnitude), "top_left")


@pytest.mark.long
def test_long_sums_round_no_more_than_eager(backend: str) -> None:
    """dK and dV of early keys sum over all queries; a single chain of 1,024 terms doubles the error."""
    tensors = make_inputs(1, 4, 1024, 1024, 64, requires_grad=True)
    upstream = torch.randn(1, 4, 1024, 64), torch.zeros(1, 4, 1024)
    actual = run(backend, tensors, upstream, is_causal=True)
    same, exact = (eager(tensors, upstream, dtype, "top_left") for dtype in (torch.float32, torch.float64))
    for name, a, e, r in list(zip(NAMES, actual, same, exact, strict=False))[2:]:
        error, base = ((x.double() - r).square().mean().sqrt() for x in (a, e))
        assert error < 1.3 * base, f"{name}: {error:.2e}, eager's {base:.2e}"


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0, 1e2, 1e4])
def test_equal_keys_share_the_weight_at_any_scale(backend: str, scale: float) -> None:
    query, value = make_inputs(1, 1, 3, 4, 8, magnitude=10.0)[::2]
    tensors = tuple(x.requires_grad_() for x in (query, torch.full((1, 1, 4, 8), 100.0), value))
    out = attention(*tensors, scale=scale, backend=backend)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))
    (grad,) = torch.autograd.grad(out.sum(), value)
    # A kernel that recomputes exp(score - lse) from lse in float32 would fail: its rounding is the relative
    # error of a weight, 0.4 % at scores of 1e5.
    torch.testing.assert_close(grad, torch.full_like(value, 0.75), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "grouped", "scale"])
def test_equals_pytorch(backend: str, kind: str) -> None:
    L, S = 31, 47
    grouped = kind == "grouped"
    tensors = make_inputs(2, 4, L, S, 16, Hk=2 if grouped else 4, requires_grad=True)
    arguments: dict = {
        "is_causal": kind == "causal",
        "scale": 0.2 if kind == "scale" else None,
        "enable_gqa": grouped,
    }
    if kind in ("bool", "float"):
        mask = torch.rand(2, 4, L, S) < 0.6
        arguments["attn_mask"] = mask | (torch.arange(S) == 0) if kind == "bool" else torch.randn(L, S)
    if not served(backend, tensors, **arguments):
        return
    out = attention(*tensors, **arguments, backend=backend)
    expected = F.scaled_dot_product_attention(*tensors, **arguments)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, e in zip(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(a, e)


GRADCHECK = [
    "scale",
    "float",
    "float_2d",
    "float_heads",
    "float_infinite",
    "lengths_bottom_right",
    "prefix",
    "all",
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("mask", GRADCHECK)
def test_gradcheck_of_the_definition(mask: str, dropout_p: float) -> None:
    query, key, value = make_inputs(2, 4, 3, 5, 3, Hk=2, Dv=2, dtype=torch.float64, requires_grad=True)
    arguments = masks(2, 4, 3, 5)[mask]
    added = arguments.pop("attn_mask", None)
    if added is not None and added.is_floating_point():
        # There is no finite difference at -inf; gradients there are held to be those of eager PyTorch above.
        hidden = added.isneginf()
        added = added.detach().double().masked_fill(hidden, 0.0).requires_grad_()
    arguments |= causal_arguments(arguments.pop("causal", "none"))

    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            q, k, v, m, dropout_p, **arguments, enable_gqa=True, seed=5, return_lse=True, backend="reference"
        )
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(call, (query, key, value, added))


@pytest.mark.parametrize("use", ["out", "lse", "both"])
def test_every_gradient_is_there(backend: str, use: str) -> None:
    tensors = make_inputs(2, 3, 9, 11, 8, requires_grad=True)
    lengths = torch.tensor([9, 9])
    out, lse = attention(*tensors, key_lengths=lengths, return_lse=True, backend=backend)
    (out.square().sum() * (use != "lse") + lse.square().sum() * (use != "out")).backward()
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        assert x.grad is not None and x.grad.isfinite().all(), name
        # Keys and values from index 9 on are hidden, and lse does not read values.
        assert (x.grad[:, :, :9] != 0).all() == (use != "lse" or name != "value"), name
        assert name == "query" or not x.grad[:, :, 9:].any(), name


@pytest.mark.parametrize(
    ("B", "H", "L", "S"), [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (0, 0, 0, 0), (1, 1, 0, 0)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(backend: str, B: int, H: int, L: int, S: int, dropout_p: float) -> None:
    tensors = make_inputs(B, H, L, S, 4, requires_grad=True)
    for kwargs in ({}, {"is_causal": True}, {"key_lengths": torch.zeros(B, dtype=torch.int64)}):
        out, lse = attention(*tensors, dropout_p=dropout_p, **kwargs, return_lse=True, backend=backend)
        assert out.shape == (B, H, L, 4) and lse.shape == (B, H, L)
        assert S > 0 or (not out.any() and lse.isneginf().all())
        for x, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
            assert grad.shape == x.shape and grad.isfinite().all()
