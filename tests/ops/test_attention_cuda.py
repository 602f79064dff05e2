"""Attention on a CUDA device: the Triton kernels held to the promises on values, masks, layouts and memory.

Triton compiles a kernel for each combination of features, of divisibility by 16 and of numbers that are 1:
calls here share their head sizes, and other sizes where that takes nothing from the test.
"""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import test_attention
import test_attention_hidden as hidden
import test_attention_properties as properties
import torch
from test_attention import NAMES, compare, eager, masks, run
from torch import Tensor

from nlpfast import attention, dispatch
from nlpfast.testing import between_canaries, layouts, make_inputs, poison

OP = "attention"
DEVICE = "cuda"
# Where Triton is not installed, these tests are skipped rather than an error.
launch = pytest.importorskip("nlpfast.ops.attention.triton_launch")
pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257, 512, 513, 1000)
CAUSAL = ("none", "top_left", "bottom_right")
# B, H, Hk, L and S of a call whose gradients this kernel computes.
REACHED = {
    "whole_64": (1, 16, 8, 60, 60),
    "whole": (1, 16, 8, 70, 120),
    "owned": (launch.MIN_OWNED_HEADS // 8, 16, 8, 90, 200),
    "dq": (1, 16, 8, 530, 200),
    "dmask": (1, 16, 8, 530, 200),
}
FEATURES = {
    "dropout": {"dropout_p": 0.3, "seed": 11, "is_causal": True},
    "lengths": {"is_causal": True, "causal_align": "bottom_right", "key_lengths": [40, 17]},
    "prefix": {"is_causal": True, "prefix_lengths": [0, 33]},
}


def moved(*tensors: Tensor, **kwargs) -> Tensor | tuple[Tensor, ...]:
    """Attention on the device, of tensors on the CPU."""
    kwargs = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    outputs = attention(*(x.to(DEVICE) for x in tensors), **kwargs)
    return tuple(x.cpu() for x in outputs) if isinstance(outputs, tuple) else outputs.cpu()


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of other modules, which a test calls, compute on the device."""
    for module in (test_attention, hidden, properties):
        monkeypatch.setattr(module, "attention", moved)
    monkeypatch.setattr(dispatch.registry[OP]["triton"], "refusal", lambda *request: None)


def features(name: str) -> dict:
    """Arguments of attention for a batch of 2, on the device."""
    return {
        k: torch.tensor(v, device=DEVICE) if isinstance(v, list) else v for k, v in FEATURES[name].items()
    }


def drawn(B: int, H: int, L: int, S: int, D: int, **kwargs) -> tuple[Tensor, ...]:
    return make_inputs(B, H, L, S, D, device=DEVICE, **kwargs)


def results(tensors: tuple, upstream: Tensor, **kwargs) -> list[Tensor]:
    """Output, lse and gradients of one call; ``upstream`` reaches the kernels as it lies in memory."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    mask = kwargs.get("attn_mask")
    inputs = [*leaves, *([mask] if mask is not None and mask.requires_grad else [])]
    kwargs = {"enable_gqa": True, "backend": "triton", **kwargs}
    out, lse = attention(*leaves, **kwargs, return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, upstream)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, e in zip(NAMES[: len(expected)], actual, expected, strict=True):
        assert torch.equal(a, e), f"{name}: {(a.double() - e.double()).abs().max()}"


def backward_kind(tensors: tuple, mask: Tensor | None = None) -> str:
    """The kernel that computes the gradients of a call."""
    lengths = tensors[0].shape[2], tensors[1].shape[2]
    call = launch.Call(*tensors, mask, None, None, None, None, *lengths, None, 0.0, "none", 1.0)
    return call.backward_kind(mask is not None and mask.requires_grad)


def test_choice_of_the_backend() -> None:
    for dtype in DTYPES:
        request = (*drawn(1, 1, 2, 3, 4, dtype=dtype), None, None, None)
        assert dispatch.choose(OP, DEVICE, None, request) is dispatch.registry[OP]["triton"]
    doubles = drawn(2, 3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(attention(*doubles), attention(*doubles, backend="reference"))
    with pytest.raises(RuntimeError, match="it computes in float32, bfloat16 and float16"):
        attention(*doubles, backend="triton")


@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize(
    ("L", "dtype", "causal"),
    [
        (L, *((torch.float32, "bottom_right"), (torch.bfloat16, "top_left"))[i % 2])
        for i, L in enumerate(LENGTHS)
    ],
    ids=str,
)
def test_lengths(L: int, S: int, dtype: torch.dtype, causal: str) -> None:
    compare("triton", drawn(1, 16, L, S, 48, Dv=32, dtype=dtype, seed=L * 1000 + S), causal)


# Those of "dkdv" go with "dq"; the gradient of a mask needs one.
CONFIGURATIONS = [key for key in launch.CONFIGS if key[0] in REACHED and (key[0] != "dmask" or key[3])]


@pytest.mark.parametrize(("kind", "size", "D", "masked"), CONFIGURATIONS, ids=str)
def test_every_configuration(kind: str, size: int, D: int, masked: bool) -> None:
    B, H, Hk, L, S = REACHED[kind]
    tensors = drawn(B, H, L, S, D, Hk=Hk, dtype={2: torch.bfloat16, 4: torch.float32}[size])
    mask = torch.randn(L, S, device=DEVICE).requires_grad_(kind == "dmask") if masked else None
    assert backward_kind(tensors, mask) == ("dq" if kind == "dmask" else kind)
    compare("triton", tensors, **({} if mask is None else {"attn_mask": mask}))


HEAD_SIZES = ((1, 40), (7, 3), (33, 65), (80, 96), (129, 1), (255, 256))


@pytest.mark.parametrize(("D", "Dv"), HEAD_SIZES)
def test_head_sizes(D: int, Dv: int) -> None:
    dtype = DTYPES[HEAD_SIZES.index((D, Dv)) % 3]
    compare("triton", drawn(2, 3, 37, 65, D, Dv=Dv, dtype=dtype), "top_left")


# Without those that broadcasting makes equal to others.
MASKS = [kind for kind in masks(1, 1, 1, 1) if not kind.endswith(("_2d", "_3d", "_expanded"))]


@pytest.mark.parametrize("kind", MASKS)
def test_masks_and_grouped_heads(kind: str) -> None:
    dtype = DTYPES[MASKS.index(kind) % 3]
    tensors = drawn(3, 6, 40, 70, 16, Hk=2, dtype=dtype)
    compare("triton", tensors, **masks(3, 6, 40, 70, DEVICE)[kind])


@pytest.mark.parametrize("causal", CAUSAL[::2])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_that_hide_whole_tiles(kind: str, causal: str) -> None:
    L, S, dtype = 200, 300, torch.bfloat16
    visible = torch.zeros(2, 1, L, S, dtype=torch.bool, device=DEVICE)
    visible[0, :, :70, 130:260], visible[1, :, 64:128] = True, True
    visible[0, :, 150:, 3] = True
    mask = torch.randn(2, 1, L, S, device=DEVICE).masked_fill(~visible, -math.inf).to(dtype)
    mask = visible if kind == "bool" else mask.requires_grad_()
    arguments = {"attn_mask": mask, "key_lengths": torch.tensor([270, 300], device=DEVICE)}
    if causal != "none":
        arguments["prefix_lengths"] = torch.tensor([140, 5], device=DEVICE)
    compare("triton", drawn(2, 2, L, S, 32, dtype=dtype), causal, **arguments)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (1, 1, 0, 0)])
def test_empty(shape: tuple) -> None:
    B, H, L, S = shape
    upstream = torch.randn(B, H, L, 16, device=DEVICE)
    for kwargs in ({}, {"key_lengths": torch.zeros(B, dtype=torch.int64, device=DEVICE)}):
        tensors = drawn(B, H, L, S, 16)
        out, lse, *grads = results(tensors, upstream, dropout_p=0.3, enable_gqa=False, **kwargs)
        assert out.shape == (B, H, L, 16) and lse.shape == (B, H, L)
        assert (S > 0 and not kwargs) or (not out.any() and lse.isneginf().all())
        assert [x.shape for x in grads] == [(B, H, n, 16) for n in (L, S, S)]
        assert not any(x.any() for x in grads) or (S > 0 and not kwargs)


def test_long_sums_round_no_more_than_eager() -> None:
    """dK and dV of early keys sum over all queries: a longer chain of additions than eager's shows."""
    tensors = tuple(x.requires_grad_() for x in drawn(1, 4, 1024, 1024, 64))
    upstream = torch.randn(1, 4, 1024, 64, device=DEVICE), torch.zeros(1, 4, 1024, device=DEVICE)
    actual = run("triton", tensors, upstream, is_causal=True)
    same, exact = (eager(tensors, upstream, dtype, "top_left") for dtype in (torch.float32, torch.float64))
    for name, a, e, r in list(zip(NAMES, actual, same, exact, strict=False))[2:]:
        error, base = ((x.double() - r).square().mean().sqrt() for x in (a, e))
        assert error < 1.3 * base, f"{name}: {error:.2e}, eager's {base:.2e}"


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("scale", [0.0, -1.0, 1e4])
def test_equal_keys_share_the_weight_at_any_scale(scale: float) -> None:
    test_attention.test_equal_keys_share_the_weight_at_any_scale("triton", scale)


@pytest.mark.usefixtures("on_device")
def test_garbage_that_nobody_sees() -> None:
    dtype = torch.bfloat16
    hidden.test_rows_without_keys("triton")
    for blind in hidden.BLIND:
        hidden.test_garbage_in_queries_that_see_nothing("triton", blind, dtype)
    for kind in hidden.HIDDEN:
        for garbage in (math.nan, math.inf):
            hidden.test_garbage_in_hidden_keys_and_values("triton", kind, garbage, 0.3, dtype)


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    tensors, upstream = drawn(2, 3, 33, 65, 40, dtype=dtype), drawn(2, 3, 33, 1, 40, dtype=dtype, seed=1)[0]
    expected = results(tensors, upstream, **features("dropout"))
    laid = tuple(layouts(x)[layout] for x in tensors)
    assert laid[0].stride() != tensors[0].stride() or layout == "misaligned"
    assert_equal(results(laid, layouts(upstream)[layout], **features("dropout")), expected)


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_layouts_of_a_mask_give_the_same_bits(layout: str, kind: torch.dtype) -> None:
    tensors, upstream = drawn(2, 3, 33, 65, 32, dtype=torch.bfloat16), torch.randn(1, device=DEVICE)
    mask = torch.randn(2, 3, 33, 65, device=DEVICE).to(torch.bfloat16)
    laid = layouts(mask)[layout]
    if kind == "bool":
        # Comparing keeps the strides of a tensor without gaps; padding makes gaps again.
        mask, laid = mask > 0, laid > 0
        laid = torch.nn.functional.pad(laid, (1, 2))[..., 1:-2] if layout == "sliced" else laid
    upstream = upstream.to(torch.bfloat16).expand(2, 3, 33, 32)
    expected = results(tensors, upstream, attn_mask=mask)
    assert_equal(results(tensors, upstream, attn_mask=laid), expected)


@pytest.mark.parametrize("S", [1, 33, 300])
def test_expanded_inputs_and_upstream(S: int) -> None:
    tensors = drawn(1, 1, 70, S, 32, dtype=torch.bfloat16)
    upstream = torch.randn(1, 1, 1, 1, device=DEVICE).to(torch.bfloat16).expand(3, 4, 70, 32)
    expanded = tuple(x.expand(3, 4, -1, -1) for x in tensors)
    expected = results(tuple(x.contiguous() for x in expanded), upstream.contiguous())
    assert_equal(results(expanded, upstream), expected)


def requested_bytes() -> int:
    """How many bytes PyTorch's allocator has been asked for since the start."""
    return torch.cuda.memory_stats()["requested_bytes.all.allocated"]


@pytest.mark.parametrize("T", [60, 120, 300])
def test_packed_input_is_read_in_place(T: int) -> None:
    B, H, D = 8, 16, 64
    packed = torch.randn(B, T, 3, H, D, device=DEVICE).to(torch.bfloat16)
    tensors = tuple(x.transpose(1, 2) for x in packed.unbind(2))
    upstream = torch.randn(B, T, H, D, device=DEVICE).to(torch.bfloat16).transpose(1, 2)
    expected = results(tuple(x.contiguous() for x in tensors), upstream.contiguous())
    assert_equal(results(tensors, upstream), expected)
    backend = dispatch.registry[OP]["triton"]
    masks, options = (None, None, None), (None, 0.0, "none", 0.125)
    begin = requested_bytes()
    outputs = backend.forward(*tensors, *masks, *options)
    after_forward = requested_bytes()
    grads = backend.backward(upstream, None, *tensors, *outputs, *masks, *options)
    after_backward = requested_bytes()
    assert after_forward - begin == sum(x.nbytes for x in outputs)
    # Above 64 keys or so a kernel may also want a float32 sum of dQ, twice the bytes of a 16-bit tensor.
    sums = 0 if backward_kind(tensors).startswith("whole") else 2 * packed[:, :, 0].nbytes
    spent, size = after_backward - after_forward, sum(x.nbytes for x in grads[:3])
    assert size <= spent <= size + sums + outputs[1].nbytes


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Put NaN into and around all memory that a call asks for; counts and checks it."""
    checks, counted = [], Counter[str]()
    original = Tensor.new_empty

    def surrounded(like: Tensor, *shape, **kwargs) -> Tensor:
        plain = original(like, *shape, **kwargs)
        if not plain.is_floating_point():
            return plain
        # A margin of 1,024 elements leaves the alignment as it is.
        inside, check = between_canaries(plain.fill_(math.nan), 1024)
        checks.append(check)
        counted["tensors"] += 1
        return inside

    monkeypatch.setattr(Tensor, "new_empty", surrounded)
    yield counted
    for check in checks:
        check()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("variant", "S"), [("dropout", 41), ("lengths", 300), ("prefix", 41), ("mask", 41)])
def test_memory(canaries: Counter[str], S: int, variant: str, dtype: torch.dtype) -> None:
    """Inputs unchanged, margins of inputs and results intact, nothing read that was never written."""
    arguments = {"attn_mask": torch.randn(31, S, device=DEVICE).requires_grad_()}
    arguments = arguments if variant == "mask" else features(variant)
    *tensors, upstream = (
        *drawn(2, 4, 31, S, 24, dtype=dtype),
        drawn(2, 4, 31, 1, 24, dtype=dtype, seed=1)[0],
    )
    surrounded = [between_canaries(x, 1024) for x in (*tensors, upstream)]
    expected = results(tuple(tensors), upstream, **arguments)
    *inside, grad = (x for x, _ in surrounded)
    before = canaries["tensors"]
    assert before >= 6, "the results of this call were not surrounded"
    with poison():
        actual = results(tuple(inside), grad, **arguments)
    assert canaries["tensors"] == 2 * before
    assert_equal(actual, expected)
    assert all(torch.equal(x, y) for x, y in zip((*inside, grad), (*tensors, upstream), strict=True))
    for _, check in surrounded:
        check()
