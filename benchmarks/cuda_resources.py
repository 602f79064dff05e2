"""What the CUDA library holds: its kernels, their registers and their instructions, read by cuobjdump.

No device is needed; the library is the one that was built where nvcc was found, and cuobjdump comes with
Triton.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from nlpfast import native

__all__ = ["Kernel", "dumped", "executed", "instructions", "listings", "resources"]

LIBRARY = native.FOLDER / "libnlpfast_cuda.so"
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\d+ )?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
# Exponentials or maxima of a block that has all those of a row.
AT_ONCE = 32


class Kernel(NamedTuple):
    """A kernel in the library.

    Attributes:
        arch: sm_80 or another.
        source: the op.
        name: of the function.
        types: of its elements, as C++ has them.
        numbers: what it is compiled for besides, truths too.
    """

    arch: str
    source: str
    name: str
    types: tuple[str, ...]
    numbers: tuple[int, ...]


@cache
def dumped(*options: str) -> str:
    """Return what cuobjdump says of the library."""
    package = find_spec("triton")
    assert package is not None and package.origin is not None
    program = Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([program, *options, LIBRARY], capture_output=True, text=True, check=True)
    return done.stdout


def kernel_of(arch: str, mangled: str) -> Kernel:
    """Return what a mangled name says."""
    found = re.search(r"_\d+_([a-z_]+)_cuda_cu_.*?\d([a-z_]+)(?:I(.+)Ev|E)NS", mangled)
    assert found is not None, mangled
    given = found[3] or ""
    numbers = re.findall(r"L[ib](\d+)E", given)
    types = re.findall(r"Bfloat16|Float16|^f|(?<=E)f", given)
    return Kernel(arch, found[1], found[2], tuple(types), tuple(map(int, numbers)))


def resources() -> Iterator[tuple[Kernel, dict[str, int]]]:
    """Yield each kernel with its resources: REG, STACK, SHARED, LOCAL and others."""
    arch, name = "", ""
    for line in dumped("--dump-resource-usage").splitlines():
        if found := re.search(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            yield kernel_of(arch, name), used


def listings(arch: str) -> Iterator[tuple[Kernel, str]]:
    """Yield each kernel of an architecture with its code in words."""
    for part in dumped("-sass", "-arch", arch).split("Function : ")[1:]:
        yield kernel_of(arch, part.split()[0]), part


def instructions(code: str) -> list[str]:
    """Return the names of a kernel's instructions, in their order."""
    return [found[2] for found in INSTRUCTION.findall(code)]


def executed(code: str, dropout: bool, masked: bool = False) -> list[int]:
    """Return how many instructions a warp executes outside of loops, in one, in one within it, and so on.

    Not counted are blocks that it jumps over: what stands after the end of the kernel, for warps whose lanes
    went different ways, and without dropout what draws random numbers and what follows from them. Where the
    exponentials of a row stand twice, tile by tile for rows with a mask and all at once for others, `masked`
    says which are counted. Of branches for a piece or a tile with something special about it both sides are.
    """
    lines = [(int(address, 16), when, name, rest) for address, when, name, rest in INSTRUCTION.findall(code)]
    jumps = [(at, when, _target(rest)) for at, when, name, rest in lines if name.startswith("BRA")]
    loops = [(to, at) for at, when, to in jumps if when and to is not None and to < at]
    targets = {to for _, _, to in jumps}
    blocks: list[list[tuple[int, str]]] = [[]]
    for at, _, name, _ in lines:
        if at in targets:
            blocks.append([])
        blocks[-1].append((at, name))
        if name.startswith(("BRA", "EXIT", "RET")):
            blocks.append([])
    counts, found = [0] * (len(loops) + 1), False
    twice = any(sum(name == "MUFU.EX2" for _, name in block) >= AT_ONCE for block in blocks)
    for block in filter(None, blocks):
        names = [name for _, name in block]
        late = any(name.startswith(("ENDCOLLECTIVE", "WARPSYNC.COLLECTIVE")) for name in names)
        draws = sum(".HI.U32" in name or ".WIDE.U32" in name for name in names) >= 8
        drops = names.count("SHFL.IDX") >= 4
        exps, maxima = names.count("MUFU.EX2"), names.count("FMNMX")
        by_tile = twice and len(block) < 40 and max(exps, maxima, names.count("FSEL")) >= 4
        # all at once they stand a third time, after the end of the kernel
        other = (masked or found) if max(exps, maxima) >= AT_ONCE else by_tile and not masked
        found = found or exps >= AT_ONCE
        if not late and not other and (dropout or not (draws or drops)):
            counts[sum(begin <= block[0][0] <= end for begin, end in loops)] += len(block)
    while len(counts) > 1 and not counts[-1]:
        counts.pop()
    return counts


def _target(operands: str) -> int | None:
    found = re.findall("0x([0-9a-f]+)", operands)
    return int(found[-1], 16) if found else None
