"""Every configuration of the Triton kernels compiles for sm_80 or sm_90, and keeps to what a GPU has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
# What a block may have on the smallest GPUs since sm_80 (sm_86, sm_89): sm_80 has 163 and sm_90 227.
SHARED_KILOBYTES = 99
# The exceptions that triton_configs.py names.
SPILLING = {("dq", 4, 256, False), ("dq", 4, 256, True), ("dkdv", 4, 256, True)}

CONFIGS = (
    "from nlpfast.ops.{} import triton_configs; import json; print(json.dumps(list(triton_configs.CONFIGS)))"
)


def start(*arguments: str) -> subprocess.Popen[str]:
    """A process of its own: kernels that are interpreted elsewhere in the tests are compiled there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def rows_of(process: subprocess.Popen[str]) -> list[dict]:
    printed = process.communicate()[0]
    assert process.returncode == 0
    return [json.loads(line) for line in printed.splitlines()]


def compiled(op: str, capsys: pytest.CaptureFixture[str]) -> tuple[list, list[dict]]:
    """The keys of an op's table, and what every configuration takes of one architecture, also printed.

    They take turns; in a longer search (`make soak`) each is compiled for both.
    """
    half = () if settings().max_examples > 1000 else ("--half",)
    resources = ("-m", "benchmarks.triton_resources", op, "--json", *half, "--arch")
    both = [start(*resources, arch) for arch in ("80", "90")]
    (table,) = rows_of(start("-c", CONFIGS.format(op)))
    rows = [row for process in both for row in rows_of(process)]
    with capsys.disabled():
        print()
        for row in rows:
            used = f"{row['registers']} registers, {row['spills']} spills, {row['shared']} KB shared"
            print(f"sm_{row['arch']} {row['key']} {row['config']}: {used}")
    return table, rows


@pytest.mark.slow
def test_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    table, rows = compiled("attention", capsys)
    assert len(table) > 50
    assert {tuple(row["key"]) for row in rows} == {tuple(key) for key in table}
    assert all(sum(row["arch"] == arch for row in rows) > len(table) // 3 for arch in (80, 90))
    for row in rows:
        assert row["registers"] <= 255 and row["shared"] <= SHARED_KILOBYTES, row
        assert row["spills"] <= (1024 if tuple(row["key"]) in SPILLING else 0), row


@pytest.mark.slow
def test_every_configuration_of_cross_entropy(capsys: pytest.CaptureFixture[str]) -> None:
    table, rows = compiled("cross_entropy", capsys)
    assert len(table) >= 20
    wanted = {(*key, vectors) for key in table for vectors in (False, True)}
    assert {tuple(row["key"]) for row in rows} == wanted
    assert all(sum(row["arch"] == arch for row in rows) > len(wanted) // 3 for arch in (80, 90))
    for row in rows:
        (kind, _, _, vectors), (_, _, warps, _) = row["key"], row["config"]
        assert row["spills"] == 0 and row["shared"] <= 1, row
        # Two programs a multiprocessor, or one of 32 warps; rows that begin anywhere take more where the
        # table sets no limit.
        resident = 65536 // (32 * warps * row["registers"])
        assert resident >= (2 if warps <= 16 and (vectors or kind != "whole") else 1), row


@pytest.mark.slow
def test_what_stands_between() -> None:
    both = [
        start("-m", "benchmarks.triton_resources", "between", "--json", "--arch", arch)
        for arch in ("80", "90")
    ]
    for rows in map(rows_of, both):
        keys = {tuple(row["key"]) for row in rows}
        assert {op for op, *_ in keys} == {"add_layer_norm", "bias_gelu", "dropout"}
        # two dtypes; dropout, five widths with and without it, three activations with and without it
        assert len(keys) == 2 * (1 + 5 * 2 + 2) and len(rows) == 2 * (1 + 5 * 2 * 2 + 2 * 3 * 2)
        for row in rows:
            # eight rows of 2,048 channels are more than 16 warps can hold without spilling some
            assert row["spills"] <= (256 if row["key"][2] == 2048 else 0), row
            assert row["registers"] <= 255 and row["shared"] <= 16, row


@pytest.mark.slow
def test_every_feature_compiles() -> None:
    rows = rows_of(
        start("-m", "benchmarks.triton_resources", "attention", "--json", "--arch", "90", "--features")
    )
    kernels = {row["kernel"] for row in rows}
    assert {"_fwd_kernel", "_bwd_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel"} <= kernels
    assert len({row["request"] for row in rows}) >= 9
    for row in rows:
        # Head sizes that are no multiple of 16 bytes are read number by number, and spill as it comes.
        if row["request"] != "odd head size":
            assert row["spills"] <= (128 if row["request"] == "all" else 0), row


LAUNCH_TWICE = """
from types import SimpleNamespace
import torch, triton
from benchmarks.triton_resources import NoDevice

launched = []

class Recorder(NoDevice):
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *rest: (1, 2, 0, 0, 1024),
        unload_module=lambda module: None,
    )
    def launcher_cls(self, src, metadata):
        return lambda *arguments: launched.append((metadata.hash, arguments))

triton.runtime.driver.set_active(Recorder(90))
seen_by_triton = []
run = triton.JITFunction.run
triton.JITFunction.run = lambda *rest, **names: (seen_by_triton.append(rest[0]), run(*rest, **names))[1]
CALL
def plain(entry):
    # The seventh argument holds what a profiler would be told, a new object each time.
    values = [(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in entry[1]]
    return (entry[0], *values[:6], *values[7:])

for offset, kernels in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 2)):
    call(offset)
    assert len(seen_by_triton) == kernels * EACH, "a shape with other alignment is one that Triton has to see"
first, second, unaligned, again, third = (
    [plain(x) for x in launched[i * EACH : (i + 1) * EACH]] for i in range(5)
)
assert first == second == third and unaligned == again
assert launched[0][0] != launched[2 * EACH][0], "unaligned memory needs another kernel"
"""

# How many kernels a process launches in a call, and the call; with an offset of 0 memory is aligned.
CALLS = {
    "attention": (
        2,
        """
from nlpfast.ops.attention import triton_launch

storage = torch.empty(3, 40 * 64 * 32 + 1, dtype=torch.bfloat16)

def call(offset):
    q, k, v = (x[offset : offset + 40 * 64 * 32].view(2, 20, 64, 32) for x in storage)
    seed = torch.zeros(2, dtype=torch.int64)
    shared = (q, k, v, None, None, None, None, None, 64, 64, seed, 0.1, "top_left", 0.125)
    out, lse, stats = triton_launch.run_forward(*shared)
    triton_launch.run_backward(out, lse, out, stats, False, *shared)
""",
    ),
    "cross_entropy": (
        3,
        """
from nlpfast.ops.cross_entropy import triton_launch

storage = torch.empty(40 * 63 + 1, dtype=torch.bfloat16)

def call(offset):
    x = storage[offset : offset + 40 * 63].view(2, 20, 63)
    target, scale = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(())
    options = (-100, 1, 0.9, 0.01)
    triton_launch.run_forward(x, target, *options, None, False)
    *_, statistics, gradient = triton_launch.run_forward(x, target, *options, scale, True)
    triton_launch.run_backward(scale.expand(2, 20), x, target, statistics, gradient, scale, *options, True)
""",
    ),
}


@pytest.mark.parametrize("op", list(CALLS))
def test_second_launch_passes_what_triton_passed_at_the_first(op: str) -> None:
    each, call = CALLS[op]
    process = start("-c", LAUNCH_TWICE.replace("CALL", call).replace("EACH", str(each)))
    process.communicate()
    assert process.returncode == 0


ALIGNMENT = """
import json, sys, torch, triton
from benchmarks.triton_resources import NoDevice, resources
from nlpfast.ops.alignment_loss import triton as backend

arch = int(sys.argv[1])
triton.runtime.driver.set_active(NoDevice(arch))
rows = []

def compile_only(kernel, *arguments, grid, warmup, **constants):
    compiled = run(kernel, *arguments, grid=grid, warmup=True, **constants)
    rows.append({"kernel": kernel.__name__, **resources(compiled, arch)})

run, triton.JITFunction.run = triton.JITFunction.run, compile_only
for dtype, D in ((torch.bfloat16, 64), (torch.float32, 33), (torch.float32, 1024)):
    q, k = torch.empty(2, 8, 5, D, dtype=dtype), torch.empty(2, 4, 6, D, dtype=dtype)
    lse, pairs, heads = torch.empty(2, 8, 5), torch.zeros(7, 3, dtype=torch.int64), (0, 3)
    shared = (q, k, pairs, heads, 0.5)
    c = backend.forward(q, k, lse, *shared[2:])
    backend.backward(c, *shared, q.clone(), k.clone(), lse.clone())
    backend.backward(c, *shared, None, None, lse.clone())
    backend.backward(c, *shared, q.clone(), k.clone(), None)
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_of_alignment_loss_compile(arch: str) -> None:
    (rows,) = rows_of(start("-c", ALIGNMENT, arch))
    assert [row["kernel"] for row in rows].count("_fwd_kernel") == 3
    assert {row["kernel"] for row in rows} == {"_fwd_kernel", "_bwd_query_kernel", "_bwd_key_kernel"}
    for row in rows:
        # a few addresses, with the head size 1024
        assert row["spills"] <= 32 and row["registers"] <= 255, row
