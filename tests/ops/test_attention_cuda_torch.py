"""Attention on a CUDA device as a citizen of PyTorch: streams, graphs, compile, autocast, large sizes."""

import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_attention_cuda import (
    DEVICE,
    REACHED,
    assert_equal,
    backward_kind,
    drawn,
    features,
    launch,
    pytestmark,  # noqa: F401  (the mark of this module too)
    results,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlpfast import attention
from nlpfast.ops.attention import reference
from nlpfast.testing import eager_attention

OP = "attention"
ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("whole_64", "owned", "dq")


def reaching(kind: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs of a call whose gradients this kernel computes, and an upstream gradient."""
    B, H, Hk, L, S = REACHED[kind]
    tensors = drawn(B, H, L, S, 32, Hk=Hk, dtype=dtype)
    assert backward_kind(tensors) == kind
    return tensors, drawn(B, H, L, 1, 32, dtype=dtype, seed=1)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_250_times(kind: str, dtype: torch.dtype) -> None:
    tensors, upstream = reaching(kind, dtype)
    expected = results(tensors, upstream, dropout_p=0.3, seed=1)
    for _ in range(250):
        assert_equal(results(tensors, upstream, dropout_p=0.3, seed=1), expected)


def test_threads_equal_serial_calls() -> None:
    tensors, upstream = reaching("whole_64", torch.bfloat16)
    serial = [results(tensors, upstream, dropout_p=0.3, seed=i) for i in range(8)]
    parallel: list = [None] * 8

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                parallel[i] = results(tensors, upstream, dropout_p=0.3, seed=i)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, expected in zip(parallel, serial, strict=True):
        assert_equal(actual, expected)


def keep_busy() -> None:
    """Give the current stream work for tens of milliseconds."""
    x = torch.zeros(4096, 4096, device=DEVICE)
    for _ in range(20):
        x = x @ x


@pytest.mark.parametrize("kind", KINDS)
def test_other_streams(kind: str) -> None:
    """Inputs that a busy stream has yet to write: kernels on any other stream would read NaN."""
    tensors, upstream = reaching(kind, torch.bfloat16)
    expected = results(tensors, upstream, dropout_p=0.3, seed=1)
    late = tuple(torch.full_like(x, math.nan) for x in (*tensors, upstream))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        keep_busy()
        for x, right in zip(late, (*tensors, upstream), strict=True):
            x.copy_(right)
        actual = [x.clone() for x in results(late[:3], late[3], dropout_p=0.3, seed=1)]
    stream.synchronize()
    assert_equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_from_another_stream(kind: str) -> None:
    """Autograd runs backward on forward's stream, after what the caller's stream has yet to write."""
    tensors, upstream = reaching(kind, torch.bfloat16)
    expected = results(tensors, upstream, dropout_p=0.3, seed=1)
    leaves, late = [x.detach().requires_grad_() for x in tensors], torch.full_like(upstream, math.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        out = attention(*leaves, enable_gqa=True, dropout_p=0.3, seed=1, backend="triton")
    keep_busy()
    late.copy_(upstream)
    grads = [x.clone() for x in torch.autograd.grad(out, leaves, late)]
    torch.cuda.synchronize()
    assert_equal([out.detach(), expected[1], *grads], expected)


def captured(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of what ``step`` launches, and the tensors in which each replay leaves the results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    return graph, static


@pytest.mark.parametrize("kind", KINDS)
def test_graph(kind: str) -> None:
    """Forward and backward in one graph read the seed anew at every replay."""
    tensors, upstream = reaching(kind, torch.bfloat16)
    seed = torch.tensor([1, 5], device=DEVICE)

    def step() -> list[Tensor]:
        return results(tensors, upstream, dropout_p=0.3, seed=seed)

    graph, static = captured(step)
    replayed = []
    for n in (1, 2, 3):
        seed.copy_(torch.tensor([n, 5]))
        graph.replay()
        replayed.append([x.clone() for x in static])
        assert_equal(replayed[-1], step())
    assert not torch.equal(replayed[0][0], replayed[1][0])
    tensors[0].normal_()
    graph.replay()
    assert_equal(static, step())
    assert not torch.equal(replayed[2][0], static[0])


@pytest.mark.parametrize("seed", [None, 7])
def test_graph_that_draws_its_seed(seed: int | None) -> None:
    tensors, upstream = reaching("whole_64", torch.float32)
    graph, static = captured(lambda: results(tensors, upstream, dropout_p=0.5, seed=seed))
    outs = []
    for _ in range(2):
        graph.replay()
        out, *_, dv = (x.clone() for x in static)
        # The output is linear in value: both sums are equal when backward dropped what forward dropped.
        torch.testing.assert_close((out * upstream).sum(), (tensors[2] * dv).sum(), rtol=1e-4, atol=1e-3)
        outs.append(out)
    assert torch.equal(*outs) == (seed is not None)


# The compiler warns of settings of the machine, such as TF32.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("variant", "compiler", "dynamic"),
    [
        ("dropout", "inductor", False),
        ("dropout", "inductor", True),
        ("mask", "inductor", False),
        ("lengths", "aot_eager", False),
        ("prefix", "aot_eager", True),
    ],
)
def test_compile_without_graph_breaks(variant: str, compiler: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    arguments = {} if variant == "mask" else features(variant)

    def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Products with powers of 2, exact in any order, give the compiler something to fuse.
        options = {"enable_gqa": True, "return_lse": True, "backend": "triton", **arguments}
        out, lse = attention(query * 2, key, value.mT.contiguous().mT, mask, **options)
        return out * 2, lse

    def run(function: Callable, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
        out, lse = function(*inputs)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, upstream)]

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=compiler)
    for L in (33, 70, 530) if dynamic else (33,):
        inputs = [x.requires_grad_() for x in drawn(2, 4, L, 65, 32, Hk=2, dtype=torch.bfloat16)]
        if variant == "mask":
            inputs.append(torch.randn(L, 65, device=DEVICE, requires_grad=True))
        upstream = drawn(2, 4, L, 1, 32, dtype=torch.bfloat16, seed=1)[0]
        assert_equal(run(compiled, inputs, upstream), run(call, inputs, upstream))


@pytest.mark.filterwarnings("default")
def test_compiled_dropout_drops_what_the_definition_drops() -> None:
    torch._dynamo.reset()

    def call(*tensors: Tensor, seed: Tensor) -> Tensor:
        return attention(*tensors, dropout_p=0.3, seed=seed, backend="triton")

    compiled = torch.compile(call, fullgraph=True)
    query, key, _ = drawn(2, 3, 70, 90, 32)
    values = torch.eye(90, device=DEVICE).expand(2, 3, 90, 90)
    for n in (3, 4):
        seed = torch.tensor([n, 2], device=DEVICE)
        kept = compiled(query, key, values, seed=seed) != 0
        assert torch.equal(kept, reference.dropout_keep(seed, 0.3, (2, 3, 70, 90)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    tensors = [x.requires_grad_() for x in drawn(2, 4, 33, 65, 32)]
    with torch.autocast(DEVICE, dtype=dtype):
        out, lse = attention(*tensors, is_causal=True, return_lse=True, backend="triton")
        grads = torch.autograd.grad(out.float().square().sum() + lse.sum(), tensors)
    halves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    expected, expected_lse = attention(*halves, is_causal=True, return_lse=True, backend="triton")
    outside = torch.autograd.grad(expected.float().square().sum() + expected_lse.sum(), halves)
    assert out.dtype == dtype and lse.dtype == torch.float32 and all(x.dtype == torch.float32 for x in grads)
    assert_equal([out, lse, *grads], [expected, expected_lse, *(x.float() for x in outside)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Recomputed dropout is that of the first pass, with a seed drawn from the device's generator."""
    drawn_once, upstream = reaching("whole_64", torch.bfloat16)

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, enable_gqa=True, dropout_p=0.3, backend="triton") * 2

    def recomputed(*tensors: Tensor) -> Tensor:
        return checkpoint(call, *tensors, use_reentrant=reentrant)

    def gradients(function: Callable) -> list[Tensor]:
        tensors = [x.detach().clone().requires_grad_() for x in drawn_once]
        torch.manual_seed(7)
        out = function(*tensors)
        out.backward(upstream)
        return [out.detach(), out.detach(), *(x.grad for x in tensors)]

    assert_equal(gradients(recomputed), gradients(call))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    tensors, upstream = reaching("whole_64", torch.bfloat16)
    expected = results(tensors, upstream, dropout_p=0.3, seed=1)
    assert torch.cuda.current_device() == 0
    elsewhere = [x.to("cuda:1") for x in (*tensors, upstream)]
    actual = results(tuple(elsewhere[:3]), elsewhere[3], dropout_p=0.3, seed=1)
    assert all(x.device.index == 1 for x in actual)
    assert_equal([x.to(DEVICE) for x in actual], expected)


def test_more_heads_than_a_grid_has_rows() -> None:
    """B * H is 65,600: more than 16 bits count, in the launch and in what dropout draws from."""
    shape = (4, 16_400, 2, 3)
    tensors, upstream = drawn(*shape, 16), drawn(*shape, 16, seed=1)[0]
    actual = results(tensors, upstream, is_causal=True, dropout_p=0.5, seed=2)
    keep = reference.dropout_keep(torch.tensor([2, 0], device=DEVICE), 0.5, shape)
    leaves = [x.detach().requires_grad_() for x in tensors]
    causal = torch.ones(2, 3, dtype=torch.bool).tril().expand(shape)
    out, lse = eager_attention(*leaves, allowed=causal, keep=keep, dropout_p=0.5)
    expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def need_memory(gigabytes: int) -> None:
    """Skip the test on a device that has less, other programs' share taken off."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of memory on the device, where {free:.0f} are free")


@pytest.mark.parametrize(("B", "H", "L"), [(16_400, 16, 128), (4_100, 16, 512), (520, 16, 4_096)])
def test_more_than_2_to_the_31_elements(B: int, H: int, L: int) -> None:
    """The first and the last entries of the batch get the bits that they get alone."""
    need_memory(24)
    x = torch.randn(B, H, L, 64, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    upstream = torch.randn(1, 1, L, 64, device=DEVICE).to(torch.bfloat16).expand(x.shape)
    whole = results((x, x, x), upstream)
    few = max(8, launch.MIN_OWNED_HEADS // H)
    for part in (slice(0, few), slice(B - few, B)):
        assert_equal([y[part] for y in whole], results((x[part],) * 3, upstream[part]))
    del whole, x
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_of_more_than_2_to_the_31_elements(kind: str) -> None:
    need_memory(24)
    H, T = 8, 16_448
    mask = torch.empty(1, H, T, T, dtype=torch.bool if kind == "bool" else torch.bfloat16, device=DEVICE)
    assert mask.numel() > 2**31
    mask = mask.bernoulli_(0.5) if kind == "bool" else mask.normal_().requires_grad_()
    tensors = drawn(1, H, T, T, 32, dtype=torch.bfloat16)
    upstream = drawn(1, H, T, 1, 32, dtype=torch.bfloat16, seed=1)[0]
    out, lse, dq, _, _, *dmask = results(tensors, upstream, attn_mask=mask)
    rows = mask.detach()[:, :, -64:].clone().requires_grad_(kind == "float")
    alone = results((tensors[0][:, :, -64:], *tensors[1:]), upstream[:, :, -64:], attn_mask=rows)
    expected = [alone[0], alone[1], alone[2], *alone[5:]]
    for a, e in zip((out, lse, dq, *dmask), expected, strict=True):
        torch.testing.assert_close(a[:, :, -64:], e, rtol=2e-2, atol=1e-5)
    del mask, dmask
    torch.cuda.empty_cache()


WATCHED = f"""
import torch
from nlpfast import attention
from nlpfast.testing import make_inputs

for kind, (B, H, Hk, L, S) in {REACHED!r}.items():
    where = dict(device="{DEVICE}", requires_grad=True)
    tensors = make_inputs(B, H, L, S, 24, Hk=Hk, Dv=16, dtype=torch.bfloat16, **where)
    mask = torch.randn(L, S, **where) if kind == "dmask" else None
    options = dict(is_causal=True, dropout_p=0.3, seed=1, enable_gqa=True, backend="triton")
    attention(*tensors, mask, **options).square().sum().backward()
torch.cuda.synchronize()
print("all kernels ran")
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer in the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # PyTorch asks the driver what it expects to be refused.
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    # Memory that PyTorch keeps for later would hide accesses beyond the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [sys.executable, "-c", WATCHED]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    try:
        done = subprocess.run([*command, *watched], check=False, **options)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} takes more than two minutes on this machine")
    printed = done.stdout + done.stderr
    if "Device not supported" in printed:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0 and "all kernels ran" in printed, printed[-4000:]
