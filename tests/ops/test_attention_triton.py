"""The Triton backend of attention in Triton's interpreter: every kernel, memory of outputs, layouts."""

import math
from collections.abc import Callable

import pytest
import torch
from test_attention import run
from torch import Tensor

from nlpfast import attention, dispatch, varlen_attention
from nlpfast.testing import between_canaries, make_inputs

OP = "attention"
# Runs with TRITON_INTERPRET=1 alone: `make test-triton`.
INTERPRETED = True
missing = dispatch.registry[OP]["triton"]
if isinstance(missing, str):
    pytest.skip(missing, allow_module_level=True)

from nlpfast.ops.attention import triton_launch  # noqa: E402


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that changes which kernel is chosen must not find, nor leave, a choice that is made."""
    monkeypatch.setattr(triton_launch, "_remembered", {})


LENGTHS = torch.tensor([40, 0, 133])
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_align": "bottom_right", "key_lengths": LENGTHS},
    "prefix": {"is_causal": True, "prefix_lengths": LENGTHS, "dropout_p": 0.2, "seed": 5},
    "bool": {"attn_mask": torch.arange(133) % 3 != 0, "dropout_p": 0.2, "seed": 5},
    "float": {"attn_mask": torch.linspace(-1, 1, 133).masked_fill(torch.arange(133) == 7, -math.inf)},
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kind", ["owned", "dq"])
def test_kernels_for_several_tiles_of_keys(monkeypatch: pytest.MonkeyPatch, kind: str, case: str) -> None:
    """One program a head, and tiles shared out: the tests of other files have too few heads for the first."""
    monkeypatch.setattr(triton_launch, "MIN_OWNED_HEADS", 1 if kind == "owned" else 10**9)
    chosen = spy_on_kinds(monkeypatch)
    tensors = make_inputs(3, 2, 70, 133, 16, Hk=1, Dv=8, requires_grad=True)
    upstream = torch.randn(3, 2, 70, 8), torch.randn(3, 2, 70)
    arguments = {**CASES[case], "enable_gqa": True}
    actual, expected = (run(name, tensors, upstream, **arguments) for name in ("triton", "reference"))
    assert chosen[-1] == kind
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((64, 2, 64, 64), "whole_64"),
        ((64, 2, 512, 64), "whole_64"),
        ((64, 2, 64, 128), "whole"),
        ((64, 2, 128, 129), "owned"),
        ((1, 2, 128, 129), "dq"),
        ((64, 2, 513, 64), "whole_64"),
        ((1, 2, 513, 64), "dq"),
        ((64, 2, 513, 129), "dq"),
        ((64, 2, 64, 513), "dq"),
    ],
)
def test_choice_of_the_backward_kernel(shape: tuple[int, int, int, int], kind: str) -> None:
    B, H, L, S = shape
    tensors = (torch.empty(B, H, L, 32), torch.empty(B, H, S, 32), torch.empty(B, H, S, 32))
    call = triton_launch.Call(*tensors, *[None] * 5, L, S, None, 0.0, "none", 1.0)
    assert call.backward_kind(mask_gradient=False) == kind
    assert call.backward_kind(mask_gradient=True) == "dq"


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("heads", [1, 10**9], ids=["owned", "tiled"])
@pytest.mark.parametrize(("L", "S", "D"), [(17, 33, 7), (1, 1, 1), (64, 64, 16), (70, 133, 33)])
def test_nothing_is_written_beside_the_outputs(
    monkeypatch: pytest.MonkeyPatch, L: int, S: int, D: int, heads: int, packed: bool
) -> None:
    """The interpreter writes where it is told to; every result lies between canaries here, full of NaN."""
    monkeypatch.setattr(triton_launch, "MIN_OWNED_HEADS", heads)
    checks: list[Callable[[], None]] = []

    def surrounded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*arguments: object) -> Tensor:
            inside, check = between_canaries(make(*arguments).fill_(math.nan))
            checks.append(check)
            return inside

        return new

    for name in ("new_rows", "new_numbers"):
        method = surrounded(getattr(triton_launch.Call, name))
        monkeypatch.setattr(triton_launch.Call, name, method)
    mask = None if packed else torch.randn(2, 1, L, S, requires_grad=True)
    query, key, value = make_inputs(2, 4, L, S, D, Hk=2, Dv=D + 1, requires_grad=True)
    options = {"dropout_p": 0.1, "seed": 3, "is_causal": True, "enable_gqa": True, "backend": "triton"}
    if packed:
        rows = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in (query, key, value)]
        cu_seq = (torch.tensor([0, n, 2 * n]) for n in (L, S))
        out = varlen_attention(*rows, *cu_seq, L, S, **options)
        grads = torch.autograd.grad(out.sum(), rows)
    else:
        out = attention(query, key, value, mask, **options)
        grads = torch.autograd.grad(out.sum(), (query, key, value, mask))
    assert len(checks) >= 6
    for check in checks:
        check()
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("order", ["B T 3 H D", "B T H 3 D"])
def test_packed_projections_are_read_in_place(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    B, T, H, D = 2, 19, 3, 8
    shape = (B, T, 3, H, D) if order == "B T 3 H D" else (B, T, H, 3, D)
    joint = torch.randn(shape, requires_grad=True)
    parts = joint.unbind(2 if order == "B T 3 H D" else 3)
    query, key, value = (x.transpose(1, 2) for x in parts)
    read: list[tuple[Tensor | None, ...]] = []
    run_kernel = triton_launch.Launch.__call__
    monkeypatch.setattr(
        triton_launch.Launch,
        "__call__",
        lambda launch, *pointers: (read.append(pointers), run_kernel(launch, *pointers)),
    )
    out = attention(query, key, value, is_causal=True, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), joint)
    # Forward's pointers begin with query, key and value; backward's with two upstream gradients.
    for pointers, first in zip(read, (0, 2), strict=True):
        inputs = pointers[first : first + 3]
        assert [x.data_ptr() for x in inputs] == [x.data_ptr() for x in (query, key, value)]
    # A model joins the heads of each row: where they lay together in the input, that is a view.
    assert out.transpose(1, 2).is_contiguous()
    expected = attention(*(x.contiguous() for x in (query, key, value)), is_causal=True, backend="reference")
    (wanted,) = torch.autograd.grad(expected.square().sum(), joint)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("case", ["causal", "float", "packed"])
def test_operations_for_the_compiler(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Shapes, strides and aliasing are as declared."""
    # Where backward does not read them, the statistics are memory that nobody wrote, never twice the same.
    monkeypatch.setattr(triton_launch, "MAX_OWNED", 0)
    query, key, value = make_inputs(2, 4, 9, 7, 8, Hk=2, Dv=5)
    mask = torch.randn(9, 7).view(1, 1, 9, 7) if case == "float" else None
    cu_seq: tuple[Tensor | None, ...] = (None, None)
    if case == "packed":
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        cu_seq = (torch.tensor([0, 9, 18]), torch.tensor([0, 7, 14]))
    seed = torch.tensor([1, 2])
    shared = (query, key, value, mask, None, None, *cu_seq, 9, 7, seed, 0.1, "top_left", 0.3)
    forward = torch.ops.nlpfast.triton_attention_forward
    torch.library.opcheck(forward.default, shared)
    out, lse, stats = forward(*shared)
    upstream = (torch.randn_like(out), torch.randn_like(lse), out, stats, mask is not None)
    torch.library.opcheck(torch.ops.nlpfast.triton_attention_backward.default, (*upstream, *shared))


def spy_on_kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that each choice of a backward kernel is appended to."""
    chosen: list[str] = []
    choose = triton_launch.Call.backward_kind

    def spy(call: triton_launch.Call, mask_gradient: bool) -> str:
        chosen.append(choose(call, mask_gradient))
        return chosen[-1]

    monkeypatch.setattr(triton_launch.Call, "backward_kind", spy)
    return chosen
