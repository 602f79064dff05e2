"""Compile every configuration of the Triton kernels, without a GPU, and print what each takes of one.

    python -m benchmarks.triton_resources --arch 80 90

prints registers of a thread, bytes that a thread spills to memory, and kilobytes of shared memory of a block.
Each configuration is compiled as training uses it: attention causal, with dropout, and with a mask that is
added where the table has a line of its own for masks; cross entropy with and without a gradient, and rows
that begin at multiples of 16 bytes or anywhere; what stands between them, the ops of `BETWEEN`, of several
widths. `--features` compiles one head size of attention with each
feature alone, and with all at once, instead.

The launches are the backend's own: a driver that knows no device stands in for Triton's, and a kernel is
compiled where it would be started. ptxas, which comes with Triton, reports the numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What is to be interpreted is not compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from nlpfast.ops.add_layer_norm import triton as norms
from nlpfast.ops.attention import triton_configs, triton_launch
from nlpfast.ops.bias_gelu import triton as activations
from nlpfast.ops.cross_entropy import triton_configs as loss_configs
from nlpfast.ops.cross_entropy import triton_launch as losses
from nlpfast.ops.dropout import triton as dropouts

# Kilobytes of shared memory that a block may have on sm_86 and sm_89, the fewest since sm_80.
SHARED_LIMIT = 99
OPS = ("attention", "cross_entropy", "between")
BETWEEN = ("add_layer_norm", "bias_gelu", "dropout")
# Of add_layer_norm, which holds whole rows and serves no wider ones; the others are compiled for the first.
WIDTHS = (256, 64, 768, 1024, 2048)
DTYPES = {2: torch.bfloat16, 4: torch.float32}

Row = dict[str, Any]
# What the rows are named after, and a call of a backend.
NamedCall = tuple[str, Callable[[], object]]


class Request(NamedTuple):
    """A call to compile the kernels for."""

    name: str
    size: int = 2
    D: int = 64
    mask: str = ""
    mask_gradient: bool = False
    lengths: bool = False
    dropout: bool = False
    causal: str = "top_left"
    packed: bool = False


# What training has to serve at least; a line for masks serves a mask too.
TRAINING = Request("training", dropout=True)
FEATURES = (
    Request("plain", causal="none"),
    Request("causal"),
    Request("bottom_right", causal="bottom_right"),
    Request("lengths", lengths=True),
    Request("bool mask", mask="bool"),
    Request("16-bit mask", mask="narrow"),
    Request("dropout", dropout=True),
    Request("packed", packed=True, dropout=True),
    Request("odd head size", D=33),
    Request("all", lengths=True, dropout=True, mask="added", mask_gradient=True),
    Request("all", lengths=True, dropout=True, mask="added"),
    Request("all", lengths=True, dropout=True),
)


class NoDevice:
    """What Triton asks its driver before it compiles, answered for an architecture that is not here."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """Return the architecture."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Return a number that is another for each architecture: compiled kernels are kept by it."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


def compile_all(op: str, arch: int, calls: Iterable[NamedCall], half: bool = False) -> Iterator[Row]:
    """Compile the kernels that the calls would launch, for an architecture such as 90; a row for each.

    Args:
        op: whose calls these are.
        arch: 80 or 90.
        calls: a line of CONFIGS that a call of the same name has led to is not compiled again.
        half: every other line, for 80 those that are left out for 90.
    """
    triton.runtime.driver.set_active(NoDevice(arch))
    found: list[Row] = []
    seen: set[tuple[Any, ...]] = set()
    configs: dict[Any, Any] = {"attention": triton_configs, "cross_entropy": loss_configs}[op].CONFIGS

    def compile_only(launch: triton_launch.Launch, *pointers: Tensor | None) -> None:
        if (name, launch.line) not in seen:
            seen.add((name, launch.line))
            if half and len(seen) % 2 == (arch == 80):
                return
            compiled = launch.kernel.warmup(*pointers, *launch.numbers, **launch.constants, grid=(1,))
            row = {"op": op, "request": name, "arch": arch, "kernel": launch.kernel.__name__}
            # whether rows of cross entropy begin at multiples of 16 bytes is no part of the table's key
            config = configs.get(launch.line) or configs[launch.line[:3]]
            found.append({**row, "key": launch.line, "config": config, **resources(compiled, arch)})

    triton_launch.Launch.__call__ = compile_only
    for each in calls:
        name, call = each
        call()
        yield from found
        found.clear()


def compile_between(arch: int, calls: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
    """Compile what the calls would launch, as `compile_all`, of kernels without a table of configurations.

    Args:
        arch: 80 or 90.
        calls: op, bytes of an element, width, whether there is dropout, name, call.
    """
    triton.runtime.driver.set_active(NoDevice(arch))
    found: list[Row] = []
    launch = triton.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        compiled = launch(kernel, *arguments, grid=(1,), warmup=True, **constants)
        row = {"kernel": kernel.__name__, "config": (compiled.metadata.num_warps,)}
        found.append({**row, **resources(compiled, arch)})

    triton.JITFunction.run = compile_only
    try:
        for *key, name, call in calls:
            call()
            yield from ({"op": "between", "request": name, "arch": arch, "key": key, **row} for row in found)
            found.clear()
    finally:
        triton.JITFunction.run = launch


def between_calls() -> Iterator[tuple[Any, ...]]:
    """Yield calls of the ops of `BETWEEN` for each dtype, width and activation, with and without dropout."""
    pair, N = torch.zeros(2, dtype=torch.int64), 512
    for (size, dtype), width in itertools.product(DTYPES.items(), WIDTHS):
        x, wide, c = torch.empty(N, width, dtype=dtype), torch.empty(N, width), torch.empty(width)
        first = width == WIDTHS[0]
        if first:
            yield "dropout", size, width, True, "both ways", partial(dropouts.forward, x, pair, 6554)
        for rest in ((pair, 6554), (None, 0)):
            key = (size, width, rest[0] is not None)
            forward = partial(norms.forward, x, wide, c, c, *rest, 1e-5, dtype)
            backward = partial(norms.backward, x, wide, wide, torch.empty(N, 2), c, *rest, dtype)
            yield "add_layer_norm", *key, "forward", forward
            yield "add_layer_norm", *key, "backward", backward
            for activation, name in enumerate(("erf", "tanh", "relu") if first else ()):
                forward = partial(activations.forward, x, c, activation, *rest)
                backward = partial(activations.backward, x, x, c, activation, *rest)
                yield "bias_gelu", *key, f"{name} forward", forward
                yield "bias_gelu", *key, f"{name} backward", backward


def attention_calls(requests: Iterable[Request]) -> Iterator[NamedCall]:
    """Yield calls of several lengths for each request, so that all kernels have their turn."""
    for request in requests:
        for heads, length in ((2, 64), (2, 128), (triton_launch.MIN_OWNED_HEADS, 512), (2, 1024)):
            yield request.name, partial(_call, request, heads, length)


def cross_entropy_calls() -> Iterator[NamedCall]:
    """Yield the calls that lead to every line of the table, with rows that begin at 16 bytes or anywhere."""
    for _, size, most in loss_configs.CONFIGS:
        for V in (min(most, 2**17), min(most, 2**17) - 1):
            x, upstream = torch.empty(1, 1, V, dtype=DTYPES[size]), torch.empty(1, 1)
            target, statistics = torch.zeros(1, 1, dtype=torch.int64), torch.empty(1, 1, 2)
            scale, options = torch.empty(()), (-100, -1, 0.9, 0.1 / V)
            columns = torch.empty(1, V, 2, dtype=x.dtype)[..., :1].transpose(1, 2)
            yield "gradient", partial(losses.run_forward, x, target, *options, scale, False)
            yield "loss alone", partial(losses.run_forward, x, target, *options, None, False)
            for name, logits, gradient, inplace in (
                ("backward", x, None, False),
                ("where needed", x, x.clone(), False),
                ("rescaled", x, x, True),
                ("columns", columns, None, True),
            ):
                tensors = (upstream, logits, target, statistics, gradient, scale)
                yield name, partial(losses.run_backward, *tensors, *options, inplace)


def resources(compiled: Any, arch: int) -> Row:
    """Return registers of a thread, bytes it spills, and kilobytes of shared memory, as ptxas counts them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        # As Triton itself calls it.
        options = ["-v", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(arch)}"]
        command = [get_ptxas(arch).path, *options, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    return {"registers": registers, "spills": spills, "shared": round(compiled.metadata.shared / 1024, 1)}


def table() -> list[Request]:
    """Return the requests that lead to every line of CONFIGS, with all that such a line may have to serve."""
    lines = sorted({(size, D, masked) for _, size, D, masked in triton_configs.CONFIGS})
    return [
        TRAINING._replace(size=size, D=D, mask="added" * masked, mask_gradient=gradient, dropout=dropout)
        for size, D, masked in lines
        for gradient, dropout in ((masked, True), (False, True), (False, False))
    ]


def main(argv: list[str] | None = None) -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("op", nargs="?", choices=OPS, help="whose kernels to compile (all)")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="80, 90 or both")
    parser.add_argument(
        "--features", action="store_true", help="attention, one head size, each feature alone"
    )
    parser.add_argument(
        "--half", action="store_true", help="every other line of a table, for 80 those left out for 90"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line, for programs")
    args = parser.parse_args(argv)
    for arch, op in itertools.product(args.arch, (args.op,) if args.op else OPS):
        if args.features and op != "attention":
            continue
        for row in _rows(op, arch, args.features, args.half):
            print(json.dumps(row) if args.json else _line(row), flush=True)


def _rows(op: str, arch: int, features: bool, half: bool) -> Iterator[Row]:
    if op == "between":
        return compile_between(arch, between_calls())
    if op == "cross_entropy":
        return compile_all(op, arch, cross_entropy_calls(), half)
    return compile_all(op, arch, attention_calls(FEATURES if features else table()), half)


def _line(row: Row) -> str:
    kind, size, most, special = row["key"]
    if row["op"] == "attention":
        what = f"D <= {most:3}{', mask' if special else '':6}"
    elif row["op"] == "between":
        what = f"C = {most:4}{', dropout' if special else '':9}"
    else:
        what = f"V <= {most:10}, rows {'at 16 bytes' if special else 'anywhere':11}"
    config = "x".join(str(number) for number in row["config"] if number is not None)
    what = f"sm_{row['arch']} {kind:14} {8 * size} bits, {what} {config:12}"
    used = f"{row['registers']:3} registers, {row['spills']:4} bytes spilled, {row['shared']:5.1f} KB shared"
    return f"{what} {used}  ({row['request']})"


def _call(request: Request, heads: int, length: int) -> None:
    """Call the backend once, forward and backward."""
    shape = (length, heads, request.D) if request.packed else (heads // 2, 2, length, request.D)
    q, k, v = (torch.empty(shape, dtype=DTYPES[request.size]) for _ in range(3))
    mask = None
    if request.mask:
        kinds = {"added": torch.float32, "bool": torch.bool, "narrow": q.dtype}
        mask = torch.empty(heads // 2, 1, length, length, dtype=kinds[request.mask])
    numbers = torch.zeros(heads // 2 + 1, dtype=torch.int64)
    lengths = numbers[1:] if request.lengths else None
    cu_seq = (numbers, numbers) if request.packed else (None, None)
    seed = torch.zeros(2, dtype=torch.int64) if request.dropout else None
    arguments = (q, k, v, mask, lengths, lengths, *cu_seq, length, length, seed, 0.1, request.causal, 0.125)
    out, lse, stats = triton_launch.run_forward(*arguments)
    grad_lse = torch.empty_like(lse) if request.name == "all" else None
    triton_launch.run_backward(torch.empty_like(out), grad_lse, out, stats, request.mask_gradient, *arguments)


if __name__ == "__main__":
    main()
