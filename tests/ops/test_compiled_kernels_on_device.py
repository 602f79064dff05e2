"""The compiled CUDA kernels on a device: errors, bits, streams, graphs, large grids, compute-sanitizer.

With EMULATED_CUDA the same calls run on the CPU, but for what only a device has.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nlpfast
from nlpfast import dispatch
from nlpfast.testing import poison

EMULATED = bool(os.environ.get("EMULATED_CUDA"))
DEVICE = "cpu" if EMULATED else "cuda"
ROOT = Path(__file__).resolve().parents[2]
HALVES = [torch.bfloat16, torch.float16]
on_device_alone = pytest.mark.skipif(EMULATED, reason="an emulator has no streams, no graphs and no races")
pytestmark = [
    *([] if EMULATED else [pytest.mark.cuda]),
    pytest.mark.skipif(
        isinstance(dispatch.registry["attention"]["cuda"], str), reason="the CUDA library is not there"
    ),
]

# A call takes a backend and inputs, and returns what there is to compare: outputs, then gradients.
Call = Callable[..., list[Tensor]]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a sum of them with weights that differ."""
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for x in outputs:
        weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=x.device).view_as(x)
        total = total + (weights * x.double()).sum()
    wanted = [x for x in inputs if x.requires_grad]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, wanted)]


def losses(V: int, **options) -> tuple[Call, tuple[tuple[int, ...], ...]]:
    def call(backend: str, x: Tensor) -> list[Tensor]:
        target = (torch.arange(x.shape[0], device=x.device) * 977) % V
        target[::5] = -100
        options_ = {"reduction": "none", "label_smoothing": 0.1, **options}
        return gradients([nlpfast.cross_entropy(x, target, **options_, backend=backend)], [x])

    return call, ((12, V),)


def projected(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    target = torch.arange(x.shape[0], device=x.device) % weight.shape[0]
    if backend == "reference":
        # eager code has logits in 16 bits, as ours has
        logits = torch.nn.functional.linear(x, weight, bias)
        loss = nlpfast.cross_entropy(logits, target, backend=backend)
    else:
        loss = nlpfast.linear_cross_entropy(x, weight, target, linear_bias=bias, backend=backend)
    return gradients([loss], [x, weight, bias])


def attending(sizes: tuple[int, ...], Hk: int | None = None, **options) -> tuple[Call, tuple]:
    B, H, L, S, D = sizes

    def call(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        given = {key: x.to(q.device) if isinstance(x, Tensor) else x for key, x in options.items()}
        out, lse = nlpfast.attention(q, k, v, return_lse=True, enable_gqa=True, backend=backend, **given)
        return gradients([out, lse], [q, k, v])

    heads = H if Hk is None else Hk
    return call, ((B, H, L, D), (B, heads, S, D), (B, heads, S, D))


def packed(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    ends = torch.tensor([0, 31, 31, 97, 130], device=q.device)
    out, lse = nlpfast.varlen_attention(
        q, k, v, ends, ends, 66, 66, is_causal=True, dropout_p=0.2, seed=3, return_lse=True, backend=backend
    )
    return gradients([out, lse], [q, k, v])


def supervised(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    B, _, L, _ = q.shape
    rows = torch.arange(B * L, device=q.device)
    pairs = torch.stack((rows // L, rows % L, rows * 7 % k.shape[2]), 1)
    out, lse = nlpfast.attention(q, k, v, return_lse=True, backend=backend)
    loss = nlpfast.alignment_loss(q, k, lse, pairs, heads=(1, 0), reduction="none", backend=backend)
    return gradients([out, loss], [q, k, v])


def at_pairs(backend: str, q: Tensor, k: Tensor) -> list[Tensor]:
    """Without attention of the same backend, so in any dtype and size."""
    rows = torch.arange(300, device=q.device)
    pairs = torch.stack((rows % q.shape[0], rows * 5 % q.shape[2], rows * 11 % k.shape[2]), 1)
    wide = (q.detach().double() @ k.detach().double().mT * q.shape[-1] ** -0.5).logsumexp(-1)
    lse = wide.to(torch.promote_types(q.dtype, torch.float32)).requires_grad_()
    return gradients(
        [nlpfast.alignment_loss(q, k, lse, pairs, reduction="none", backend=backend)], [q, k, lse]
    )


def normed(backend: str, part: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    total, out = nlpfast.add_layer_norm(
        part, residual, weight.float(), bias.float(), dropout_p=0.1, seed=9, backend=backend
    )
    return gradients([total, out], [part, residual])


ALL = [torch.float32, *HALVES]
CALLS: dict[str, tuple[Call, tuple[tuple[int, ...], ...], list[torch.dtype]]] = {
    "cross_entropy 1000": (*losses(1000), ALL),
    "cross_entropy 1001": (*losses(1001, smoothing="fairseq"), ALL),
    "cross_entropy 32000": (*losses(32000), ALL),
    "cross_entropy 50257": (*losses(50257), ALL),
    "cross_entropy 70000": (*losses(70000, smoothing="exclude_pad", pad_index=1), ALL),
    "linear_cross_entropy": (projected, ((40, 32), (1003, 32), (1003,)), ALL),
    "attention 64": (*attending((3, 4, 64, 64, 64)), HALVES),
    "attention 128": (*attending((2, 8, 128, 128, 32), is_causal=True), HALVES),
    "attention with dropout": (*attending((2, 4, 100, 77, 64), dropout_p=0.1, seed=4), HALVES),
    "attention of grouped heads": (
        *attending((2, 6, 90, 128, 64), Hk=2, is_causal=True, causal_align="bottom_right"),
        HALVES,
    ),
    "attention 256": (*attending((2, 2, 200, 256, 64), is_causal=True, causal_align="bottom_right"), HALVES),
    "attention with lengths": (
        *attending((3, 2, 33, 65, 32), key_lengths=torch.tensor([65, 0, 17])),
        HALVES,
    ),
    "varlen_attention": (packed, ((130, 3, 32),) * 3, HALVES),
    "alignment in attention": (supervised, ((2, 3, 50, 64), (2, 3, 64, 64), (2, 3, 64, 64)), HALVES),
    "alignment_loss": (at_pairs, ((2, 3, 50, 33), (2, 3, 70, 33)), ALL),
    "add_layer_norm": (normed, ((37, 768), (37, 768), (768,), (768,)), ALL),
}
SERVED = [(name, dtype) for name, (_, _, dtypes) in CALLS.items() for dtype in dtypes]
over_calls = pytest.mark.parametrize(("name", "dtype"), SERVED, ids=str)


def inputs_of(name: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(size, generator=generator) for size in CALLS[name][1]]
    return [x.to(DEVICE, dtype).requires_grad_() for x in drawn]


def converted(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in inputs]


@over_calls
def test_no_worse_than_eager(name: str, dtype: torch.dtype) -> None:
    """Twice eager's error in the same dtype, and some units in the last place; in memory full of NaN."""
    call, inputs = CALLS[name][0], inputs_of(name, dtype)
    with poison():
        found = call("cuda", *inputs)
    eager, exact = call("reference", *inputs), call("reference", *converted(inputs, torch.float64))
    for number, (ours, same, right) in enumerate(zip(found, eager, exact, strict=True)):
        assert ours.shape == right.shape and torch.equal(ours.isinf(), right.isinf()), number
        some = right.isfinite()
        error, allowed = ((x.double() - right)[some].abs().max().item() for x in (ours, same))
        size = right[some].abs().max().item()
        assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * max(size, 1e-2), (
            number,
            error,
            allowed,
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(dtype: torch.dtype, D: int, causal: bool) -> None:
    lengths = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 256)
    for L in lengths if not EMULATED else lengths[::4]:
        for S in lengths if not EMULATED else lengths[::4]:
            call, sizes = attending((1, 2, L, S, D), is_causal=causal)
            inputs = [torch.randn(size).to(DEVICE, dtype).requires_grad_() for size in sizes]
            found = call("cuda", *inputs)
            eager, exact = call("reference", *inputs), call("reference", *converted(inputs, torch.float64))
            for ours, same, right in zip(found, eager, exact, strict=True):
                some = right.isfinite()
                if not some.any():
                    continue
                error, allowed = ((x.double() - right)[some].abs().max() for x in (ours, same))
                assert error <= 2 * allowed + 4e-3, (L, S)


@over_calls
@on_device_alone
def test_same_bits_every_time(name: str, dtype: torch.dtype) -> None:
    call, inputs = CALLS[name][0], inputs_of(name, dtype)
    first = call("cuda", *inputs)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, call("cuda", *inputs), strict=True))


@over_calls
@on_device_alone
def test_another_stream(name: str, dtype: torch.dtype) -> None:
    """Kernels run on the current stream: what is queued there before is waited for."""
    call, inputs = CALLS[name][0], inputs_of(name, dtype)
    expected = call("cuda", *inputs)
    late = [torch.full_like(x, torch.nan).requires_grad_() for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
        found = call("cuda", *late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "dtype"), [x for x in SERVED if "alignment" not in x[0]], ids=str)
@on_device_alone
def test_cuda_graph(name: str, dtype: torch.dtype) -> None:
    """Forward and backward in a graph, on new values in the same memory."""
    call, inputs = CALLS[name][0], inputs_of(name, dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call("cuda", *inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                found = call("cuda", *inputs)
        except RuntimeError as error:
            if "capturing" not in str(error):
                raise
            pytest.skip("the test's own copies from the host cannot be captured")
    torch.cuda.synchronize()
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, call("cuda", *inputs), strict=True))


def test_more_rows_than_a_dimension_of_the_grid_has() -> None:
    """65,535 blocks are the most in the second dimension of a grid."""
    n = 70 if EMULATED else 70_000
    q = torch.randn(n, 1, 3, 32).to(DEVICE, torch.bfloat16)
    out = nlpfast.attention(q, q, q, backend="cuda")
    assert torch.equal(out[-2:], nlpfast.attention(q[-2:], q[-2:], q[-2:], backend="cuda"))
    x = torch.randn(n, 40, device=DEVICE)
    target = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    loss = nlpfast.cross_entropy(x, target, reduction="none", backend="cuda")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, target, reduction="none"))
    pairs = torch.stack((torch.arange(n), torch.zeros(n).long(), torch.ones(n).long()), 1).to(DEVICE)
    lse = (q.float() @ q.float().mT * 32**-0.5).logsumexp(-1)
    found = nlpfast.alignment_loss(q, q, lse, pairs, reduction="none", backend="cuda")
    expected = nlpfast.alignment_loss(q, q, lse, pairs, reduction="none", backend="reference")
    torch.testing.assert_close(found, expected)


SMALL = """
import sys; sys.path[:0] = ["tests/ops", "tests"]
import test_compiled_kernels_on_device as tests, torch
for name in ("cross_entropy 1001", "cross_entropy 70000", "attention 64", "attention of grouped heads",
             "varlen_attention", "alignment in attention", "alignment_loss", "add_layer_norm"):
    tests.CALLS[name][0]("cuda", *tests.inputs_of(name, tests.CALLS[name][2][-1]))
torch.cuda.synchronize()
print("all ran")
"""


def sanitizers() -> Iterator[str]:
    """The tools of compute-sanitizer, where there is one."""
    if shutil.which("compute-sanitizer"):
        yield from ("memcheck", "racecheck", "initcheck")


@pytest.mark.parametrize("tool", list(sanitizers()))
@on_device_alone
def test_compute_sanitizer(tool: str) -> None:
    """No access outside of memory, no race in shared memory, nothing read that was not written."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=nlpfast"]
    done = subprocess.run(
        [*command, sys.executable, "-c", SMALL],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 240},
    )
    said = done.stdout + done.stderr
    if "Device not supported" in said or "not supported on" in said:
        pytest.skip("compute-sanitizer does not know this machine's device")
    assert done.returncode == 0 and "all ran" in said, said[-3000:]
