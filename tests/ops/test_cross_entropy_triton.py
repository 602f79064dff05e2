"""The Triton backend of cross entropy in the interpreter: each kernel, skipped rows, bad targets, memory."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nlpfast import dispatch
from nlpfast.testing import between_canaries, poison

OP = "cross_entropy"
# Runs with TRITON_INTERPRET=1 alone: `make test-triton`.
INTERPRETED = True
missing = dispatch.registry[OP]["triton"]
if isinstance(missing, str):
    pytest.skip(missing, allow_module_level=True)

from nlpfast.ops.cross_entropy import reference, triton_configs, triton_launch  # noqa: E402
from nlpfast.ops.cross_entropy import triton as backend  # noqa: E402

IGNORED = -100
PLAIN = (IGNORED, -1, 1.0, 0.0)
SMOOTH = (IGNORED, -1, 0.91, 0.003)
PADDED = (IGNORED, 5, 0.9, 0.003)
SCALE = torch.tensor(0.25)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that changes how a kernel is compiled must not find, nor leave, one that is."""
    monkeypatch.setattr(triton_launch, "_remembered", {})


@pytest.fixture(params=["whole", "blocks"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every row goes to one of the two kernels, in "blocks" of 32 classes and 8 lanes, and was seen there."""
    config = triton_configs.Config(*((1024, 1024) if request.param == "whole" else (32, 8)), 1)
    few = triton_configs.Config(32, 32, 1)
    lines = {(request.param, 4, 1024): config, ("backward", 4, 1024): few}
    monkeypatch.setattr(triton_configs, "CONFIGS", lines)
    launched = spy(monkeypatch)
    yield request.param
    assert {name for name in launched if name.startswith("_fwd")} == {f"_fwd_{request.param}_kernel"}


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that the name of every kernel that is launched is appended to."""
    launched: list[str] = []
    run = triton_launch.Launch.__call__

    def noted(launch: triton_launch.Launch, *pointers: Tensor | None) -> None:
        launched.append(launch.kernel.fn.__name__)
        run(launch, *pointers)

    monkeypatch.setattr(triton_launch.Launch, "__call__", noted)
    return launched


def rows(B: int = 2, T: int = 3, V: int = 77, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and targets, one of which is ignored, and one in the last block."""
    x, target = scale * torch.randn(B, T, V), torch.randint(V, (B, T))
    target[0, 1], target[-1, -1] = IGNORED, V - 1
    return x, target


def close(found: tuple, expected: tuple, target: Tensor) -> None:
    """Loss, nll, correct, statistics and gradient are the reference's; statistics of ignored rows are 0."""
    kept = (target != IGNORED).unsqueeze(-1)
    for name, a, e in zip(("loss", "nll", "correct", "statistics"), found, expected, strict=False):
        if name == "statistics":
            # the largest of logits with a NaN may be any; `others` is NaN
            e = e.where(kept, 0.0)
            a = torch.where(e.isnan() & a[..., 1:].isnan(), math.nan, a)
        assert a.dtype == e.dtype
        torch.testing.assert_close(
            a, e, rtol=2e-6, atol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    if expected[4] is not None:
        torch.testing.assert_close(found[4], expected[4], rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("V", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("options", [PLAIN, SMOOTH, PADDED], ids=["plain", "smooth", "padded"])
def test_both_kernels(kind: str, V: int, options: tuple) -> None:
    """V a multiple of 16 bytes or not, of a block or not; with a gradient and without."""
    options = (IGNORED, min(options[1], V - 1), *options[2:])
    x, target = rows(V=V)
    expected = reference.forward(x, target, *options, SCALE, False)
    close(backend.forward(x, target, *options, SCALE, False), expected, target)
    close(backend.forward(x, target, *options, None, False), (*expected[:4], None), target)
    upstream = torch.randn(2, 3)
    arguments = (upstream, x, target, expected[3], None, None, *options, False)
    torch.testing.assert_close(
        backend.backward(*arguments), reference.backward(*arguments), rtol=2e-6, atol=1e-7
    )


ODD = {
    "nan": {40: math.nan},
    "nan at the target": {3: math.nan},
    "nan before and after": {2: math.nan, 70: math.nan},
    "nan before the largest": {1: math.nan, 3: 50.0},
    "nan after the largest": {3: 50.0, 70: math.nan},
    "inf": {40: math.inf},
    "inf at the target": {3: math.inf},
    "two inf": {3: math.inf, 40: math.inf},
    "-inf at the target": {3: -math.inf},
    "-inf elsewhere": {40: -math.inf},
    "first block -inf": dict.fromkeys(range(32), -math.inf),
    "all -inf": dict.fromkeys(range(77), -math.inf),
    "tie before": {1: 50.0, 3: 50.0},
    "tie after": {70: 50.0, 3: 50.0},
    "alone far above": {3: 120.0},
    "far below": {3: -120.0},
    "another far above": {40: 500.0},
}


@pytest.mark.parametrize("case", list(ODD))
@pytest.mark.parametrize("options", [PLAIN, PADDED], ids=["plain", "padded"])
def test_odd_rows(kind: str, case: str, options: tuple) -> None:
    x, target = rows(1, 2)
    target[0] = torch.tensor([3, 8])
    for v, value in ODD[case].items():
        x[0, 0, v] = value
    expected = reference.forward(x, target, *options, SCALE, False)
    found = backend.forward(x, target, *options, SCALE, False)
    close(found, expected, target)
    bad = expected[0].isnan()[0, 0]
    # the whole row, but for what was never added up
    assert not bad or found[4][0, 0].isnan().all() or "-inf at" in case
    upstream = torch.tensor([[1.5, -0.5]])
    arguments = (upstream, x, target, found[3], None, None, *options, False)
    again, wanted = backend.backward(*arguments), reference.backward(*arguments)
    torch.testing.assert_close(again, wanted, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("gap", [20.0, 60.0, 85.0])
def test_confident_rows_keep_their_digits(kind: str, gap: float) -> None:
    x, target = rows(1, 2, 300, 1.0)
    target[0] = torch.tensor([299, 0])
    x -= gap
    x.scatter_(-1, target.unsqueeze(-1), 0.25)
    _, nll, _, statistics, gradient = backend.forward(x, target, *PLAIN, torch.tensor(1.0), False)
    exact = x.double()
    at = target.unsqueeze(-1)
    others = (exact - 0.25).exp().scatter(-1, at, 0.0).sum(-1)
    torch.testing.assert_close(nll.double(), others.log1p(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(statistics[..., 1].double(), others, rtol=1e-6, atol=0.0)
    slope = gradient.gather(-1, at).squeeze(-1).double()
    torch.testing.assert_close(slope, -others / (1 + others), rtol=1e-6, atol=0.0)


def test_each_row_goes_to_the_kernel_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = spy(monkeypatch)
    for V in (8192, 8193):
        backend.forward(torch.randn(1, 1, V), torch.zeros(1, 1).long(), *PLAIN, None, False)
    assert launched == ["_fwd_whole_kernel", "_fwd_blocks_kernel"]
    for size in (2, 4):
        lines = [line for line in triton_configs.CONFIGS if line[1] == size and line[0] != "backward"]
        assert [line[2] for line in lines] == sorted(line[2] for line in lines)
        for V in (1, 31, 128, 129, 8192, 8193, 50257, 128256, triton_configs.MAX_CLASSES):
            kind, _, most = triton_configs.line_of(size, V)
            assert most >= V and (kind == "whole") == (V <= 8192)
            assert kind == "blocks" or triton_configs.CONFIGS[kind, size, most].BLOCK >= V
        assert triton_configs.CONFIGS[triton_configs.line_of(size, 112 * 1024 // size)].num_warps == 16
        assert triton_configs.CONFIGS[triton_configs.line_of(size, 112 * 1024 // size + 1)].num_warps == 32


POISON = 7777.0


@pytest.mark.parametrize("V", [31, 64])
def test_rows_with_the_foreseen_upstream_gradient_are_left_alone(V: int) -> None:
    """What lies in `gradient` comes back there, although it is wrong, and is made anew in all other rows."""
    x, target = rows(V=V)
    target[1, 0] = IGNORED
    upstream = torch.full((2, 3), 0.25)
    upstream[0, 2], upstream[1, 0] = 0.25 + 2**-20, -0.25
    statistics = reference.forward(x, target, *PADDED, None, False)[3]
    expected = reference.backward(upstream, x, target, statistics, None, None, *PADDED, False)
    expected[upstream == SCALE] = POISON
    assert (expected == POISON).sum() == 4 * V
    gradient = torch.full_like(x, POISON)
    found = backend.backward(upstream, x, target, statistics, gradient, SCALE, *PADDED, False)
    assert found is gradient
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    whole = torch.full_like(x, POISON)
    backend.backward(SCALE.expand(2, 3), x, target, statistics, whole, SCALE, *PADDED, False)
    assert (whole == POISON).all()


@pytest.mark.parametrize(("scale", "upstream"), [(0.0, -0.0), (math.nan, math.nan), (math.inf, math.inf)])
def test_upstream_gradients_are_compared_by_their_bits(scale: float, upstream: float) -> None:
    x, target = rows()
    statistics = reference.forward(x, target, *PLAIN, None, False)[3]
    gradient, grad_loss = torch.full_like(x, POISON), torch.full((2, 3), upstream)
    backend.backward(grad_loss, x, target, statistics, gradient, torch.tensor(scale), *PLAIN, False)
    assert (gradient == POISON).all() == (scale != 0.0)


@pytest.mark.parametrize("V", [31, 64])
def test_a_gradient_in_place_of_the_logits_is_rescaled(V: int) -> None:
    """Where the upstream gradient is another; rows of ignored targets stay 0, whatever comes."""
    x, target = rows(V=V)
    *_, gradient = backend.forward(x, target, *PADDED, SCALE, True)
    assert gradient is x and (gradient[0, 1] == 0).all()
    upstream = torch.tensor([[0.25, math.nan, 0.5], [-1.0, 0.25, 0.0]])
    expected = reference.rescaled(gradient.clone(), upstream, SCALE, target != IGNORED)
    before = gradient.clone()
    statistics = torch.full((2, 3, 2), math.nan)
    found = backend.backward(upstream, x, target, statistics, gradient, SCALE, *PADDED, True)
    assert found is x
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[0, 0], before[0, 0]) and torch.equal(found[1, 1], before[1, 1])
    # a number that the product would have to round leaves the rows that are skipped as they are
    third = torch.tensor(1 / 3)
    backend.backward(third.expand(2, 3), x, target, statistics, gradient, third, *PADDED, True)
    assert torch.equal(found[0, 0], before[0, 0])


def test_without_a_gradient_the_logits_may_be_overwritten() -> None:
    x, target = rows()
    statistics = reference.forward(x, target, *PADDED, None, False)[3]
    upstream = torch.randn(2, 3)
    for laid in (x.clone(), x.transpose(1, 2).contiguous().transpose(1, 2), between_canaries(x)[0]):
        arguments = (upstream, x, target, statistics, None, None, *PADDED, False)
        expected = reference.backward(*arguments)
        found = backend.backward(upstream, laid, target, statistics, None, None, *PADDED, True)
        assert found is laid
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


BAD = [-1, 77, 2**31 + 3, -(2**40), 2**62]


@pytest.mark.parametrize("bad", BAD)
def test_a_target_outside_of_the_classes_gives_nan(kind: str, bad: int) -> None:
    """And nothing else: its neighbours are right, and nothing is read or written around the tensors."""
    x, target = rows()
    expected = reference.forward(x, target, *PADDED, SCALE, False)
    inside, check = between_canaries(x)
    target[1, 0] = bad
    found = backend.forward(inside, target, *PADDED, SCALE, False)
    for result in (found[0], found[1], found[4]):
        assert result[1, 0].isnan().all()
    assert not found[2][1, 0]
    upstream = torch.ones(2, 3)
    grad = backend.backward(upstream, inside, target, found[3], None, None, *PADDED, False)
    assert grad[1, 0].isnan().all()
    for side in (*(x.clone() for x in found), grad):
        side[1, 0] = 0
        assert not side.isnan().any()
    for a, e in zip(found, expected, strict=True):
        others = torch.ones(2, 3, dtype=torch.bool)
        others[1, 0], others[0, 1] = False, False
        torch.testing.assert_close(a[others], e[others], rtol=2e-6, atol=1e-6)
    check()


def test_ignored_rows_are_zeros_whatever_they_hold(kind: str) -> None:
    x, target = rows()
    clean = backend.forward(x, target, *PADDED, SCALE, False)
    for garbage in (math.nan, math.inf):
        dirty = x.clone()
        dirty[0, 1] = garbage
        with poison():
            found = backend.forward(dirty, target, *PADDED, SCALE, False)
        for a, e in zip(found, clean, strict=True):
            assert torch.equal(a, e)
            assert not a[0, 1].any()
        grad = backend.backward(torch.ones(2, 3), dirty, target, found[3], None, None, *PADDED, False)
        assert not grad[0, 1].any() and grad.isfinite().all()


@pytest.mark.parametrize("V", [1, 31, 32, 77])
def test_nothing_is_written_beside_the_results(monkeypatch: pytest.MonkeyPatch, kind: str, V: int) -> None:
    """The interpreter writes where it is told to; every result lies between canaries here, full of NaN."""
    checks: list[Callable[[], None]] = []
    original = Tensor.new_empty

    def surrounded(like: Tensor, *shape: object, **options: object) -> Tensor:
        plain = original(like, *shape, **options)
        # the interpreter has some of its own
        if plain.numel() == 0:
            return plain
        inside, check = between_canaries(
            plain.fill_(math.nan) if plain.is_floating_point() else plain.zero_()
        )
        # a truth value has no canary of its own
        checks.extend([check] * plain.is_floating_point())
        return inside

    monkeypatch.setattr(Tensor, "new_empty", surrounded)
    x, target = rows(V=V)
    (inside, check), (index, check_index) = between_canaries(x), between_canaries(target)
    options = (IGNORED, V - 1, 0.9, 0.01)
    found = backend.forward(inside, index, *options, SCALE, False)
    grad = backend.backward(torch.randn(2, 3), inside, index, found[3], None, None, *options, False)
    assert len(checks) == 5
    for each in (*checks, check, check_index):
        each()
    assert torch.equal(inside, x) and torch.equal(index, target)
    assert all(result.isfinite().all() for result in (*found, grad))


def test_rows_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any strides, and copied only where their classes lie apart or a row begins at a worse place."""
    read: list[Tensor] = []
    run = triton_launch.Launch.__call__
    monkeypatch.setattr(
        triton_launch.Launch,
        "__call__",
        lambda launch, *pointers: (read.append(pointers[0]), run(launch, *pointers)),
    )
    wide = torch.randn(4, 6, 64)
    x, target = wide[:, :-1], torch.randint(64, (4, 5))
    layouts = {
        "sliced": (x, True),
        "batch inside": (x.transpose(0, 1).contiguous().transpose(0, 1), True),
        "expanded": (x[:1, :1].expand(4, 5, 64), True),
        "rows apart": (torch.nn.functional.pad(x, (0, 4))[..., :64], True),
        "columns": (x.transpose(1, 2).contiguous().transpose(1, 2), False),
        "rows at odd places": (torch.nn.functional.pad(x, (0, 1))[..., :64], False),
        "misaligned": (between_canaries(x)[0], False),
        "odd number of classes": (x[..., :63], True),
        "misaligned and odd": (between_canaries(x[..., :63])[0], True),
    }
    for name, (laid, in_place) in layouts.items():
        index = target.clamp(max=laid.shape[-1] - 1)
        found = backend.forward(laid, index, *SMOOTH, SCALE, False)
        assert (read[-1].data_ptr() == laid.data_ptr()) == in_place, name
        expected = backend.forward(laid.contiguous().clone(), index, *SMOOTH, SCALE, False)
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True)), name
        upstream = torch.randn(4, 1).expand(4, 5)
        arguments = (upstream, laid, index, found[3], None, None, *SMOOTH, False)
        assert torch.equal(
            backend.backward(*arguments), backend.backward(*arguments[:1], laid.clone(), *arguments[2:])
        )
        assert read[-2].data_ptr() == upstream.data_ptr()
    columns = layouts["columns"][0].clone(memory_format=torch.preserve_format)
    *_, gradient = backend.forward(columns, target, *SMOOTH, SCALE, True)
    assert gradient is columns
    assert torch.equal(gradient, backend.forward(x, target, *SMOOTH, SCALE, False)[4])


def test_other_calls_are_not_answered_with_a_remembered_launch() -> None:
    """Calls that differ in one thing each, after one another and again."""
    x, target = rows(2, 3, 64)
    wide = torch.nn.functional.pad(x, (0, 4))[..., :64]
    changes = [
        (x, target, PADDED, SCALE), (x, target, PLAIN, SCALE), (x, target, PADDED, None),
        (x, target, (IGNORED, 6, 0.9, 0.003), SCALE), (x, target, (IGNORED, 5, 0.8, 0.003), SCALE),
        (x, target, (int(target[0, 0]), 5, 0.9, 0.003), SCALE), (wide, target, PADDED, SCALE),
        (x[:1], target[:1], PADDED, SCALE), (x[..., :60], target.clamp(max=59), PADDED, SCALE),
        (x, target, PADDED, torch.tensor(3.0)), (x.view(3, 2, 64), target.view(3, 2), PADDED, SCALE),
    ]  # fmt: skip
    for logits, index, options, scale in (*changes, *changes):
        index = torch.where(index == IGNORED, options[0], index)
        found = backend.forward(logits, index, *options, scale, False)
        close(
            found,
            reference.forward(logits, index, *options, scale, False),
            index.where(index != options[0], IGNORED),
        )
    assert len(triton_launch._remembered) == len(changes) - 1
    for upstream in (torch.randn(2, 3), torch.randn(2, 1).expand(2, 3), torch.randn(3, 2).T):
        statistics = reference.forward(x, target, *PADDED, None, False)[3]
        arguments = (upstream, x, target, statistics, None, None, *PADDED, False)
        torch.testing.assert_close(
            backend.backward(*arguments), reference.backward(*arguments), rtol=2e-6, atol=1e-7
        )


def test_the_memory_of_launches_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MAX_REMEMBERED", 2)
    for V in (3, 4, 5):
        backend.forward(torch.randn(1, 1, V), torch.zeros(1, 1).long(), *PLAIN, None, False)
        assert len(triton_launch._remembered) <= 2


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (0, 0, 1)])
def test_empty_batches(shape: tuple) -> None:
    x, target = torch.randn(shape), torch.zeros(shape[:2]).long()
    *losses, gradient = backend.forward(x, target, *SMOOTH, SCALE, False)
    assert [list(y.shape) for y in losses] == [list(shape[:2])] * 3 + [[*shape[:2], 2]]
    assert gradient.shape == shape
    assert (
        backend.backward(torch.ones(shape[:2]), x, target, losses[3], None, None, *SMOOTH, False).shape
        == shape
    )


def test_operations_for_the_compiler() -> None:
    """Shapes, strides and aliasing are as declared."""
    x, target = rows(2, 3, 17)
    operations = torch.ops.nlpfast
    torch.library.opcheck(operations.triton_cross_entropy_forward.default, (x, target, *PADDED))
    statistics = operations.triton_cross_entropy_forward(x, target, *PADDED)[3]
    arguments = (torch.randn(2, 3), x, target, statistics, *PADDED)
    torch.library.opcheck(operations.triton_cross_entropy_backward.default, arguments)


def test_what_it_refuses() -> None:
    target = torch.zeros(1, 1).long()
    assert backend.refusal(torch.zeros(1, 1, 3), target) is None
    assert "the logits are torch.float64" in backend.refusal(torch.zeros(1, 1, 3).double(), target)
    assert "interpreter computes in float32" in backend.refusal(torch.zeros(1, 1, 3).bfloat16(), target)
    many = torch.zeros(1).expand(1, 1, triton_configs.MAX_CLASSES + 1)
    assert f"it takes up to {triton_configs.MAX_CLASSES} classes" in backend.refusal(many, target)
