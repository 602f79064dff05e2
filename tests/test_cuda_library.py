"""The CUDA library where it was built, device or not: it loads, and its kernels keep to their limits.

Registers, local memory and instructions are read from its code by cuobjdump, which comes with Triton.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nlpfast import dispatch, native
from nlpfast.ops.cross_entropy import cuda

pytestmark = pytest.mark.skipif(
    not native.build_info().get("cuda"), reason="the native library was built without nvcc"
)
LIBRARY = native.FOLDER / "libnlpfast_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a")
OPERATIONS = (
    *("cuda_cross_entropy_forward", "cuda_cross_entropy_backward", "cuda_attention_forward"),
    "cuda_attention_backward",
    *("cuda_add_layer_norm_forward", "cuda_add_layer_norm_backward"),
    *(
        "cuda_alignment_loss_forward",
        "cuda_alignment_loss_backward",
        "cuda_group_pairs",
        "cuda_hard_alignment",
    ),
)

# Registers of a thread, at most, by the source, the kernel and what it is compiled for. Of cross entropy, 64
# leave two blocks of 512 threads, or one of 1,024, on a multiprocessor, and 32 all of its 2,048 threads; of
# attention forward, 128 leave four blocks and 168 three where there are at most 64 or 128 keys; of attention
# at pairs, 80 leave six blocks.
REGISTERS: dict[tuple[str | int, ...], int] = {
    ("cross_entropy", "whole_row"): 64,
    ("cross_entropy", "long_row"): 64,
    ("cross_entropy", "gradient_row"): 32,
    ("add_layer_norm", "forward"): 128,
    ("add_layer_norm", "backward"): 128,
    ("alignment_loss", "forward"): 80,
    ("alignment_loss", "backward"): 80,
    ("alignment_loss", "largest"): 80,
    ("alignment_loss", "group_pairs"): 32,
    ("attention", "forward", 64): 128,
    ("attention", "forward", 128): 168,
    ("attention", "forward", 256): 255,
    ("attention", "backward", 64): 255,
    ("attention", "backward", 128): 255,
}
# How many kernels there are: dtypes or their combinations, pieces, sizes.
KERNELS = {
    ("cross_entropy", "whole_row"): 3 * 2 * 5,
    ("cross_entropy", "long_row"): 3 * 2,
    ("cross_entropy", "gradient_row"): 3 * 2,
    ("add_layer_norm", "forward"): 7 * 2,
    ("add_layer_norm", "backward"): 7 * 2,
    ("alignment_loss", "forward"): 3 * 2,
    ("alignment_loss", "backward"): 3 * 2,
    ("alignment_loss", "largest"): 3 * 2,
    ("alignment_loss", "group_pairs"): 1,
    ("attention", "forward"): 2 * 2 * 3,
    ("attention", "backward"): 2 * 2 * (2 + 3 + 1),
}


class Kernel(NamedTuple):
    """A kernel in the library.

    Attributes:
        arch: sm_80 or another.
        source: the op.
        name: of the function.
        numbers: what it is compiled for, truths too.
    """

    arch: str
    source: str
    name: str
    numbers: tuple[int, ...]

    @property
    def vectors(self) -> bool:
        """Whether it reads 16 bytes at once."""
        if self.source == "cross_entropy":
            return self.numbers[0] > 1
        return self.source == "attention" or bool(self.numbers and self.numbers[-1])

    @property
    def accesses(self) -> tuple[str, ...]:
        """The instructions with which it moves vectors, if it does."""
        if self.source == "attention":
            return "LDGSTS", "STG"
        # of attention at pairs numbers and places are written, but for the gradients
        return ("LDG",) if self.source == "alignment_loss" and self.name != "backward" else ("LDG", "STG")

    @property
    def registers(self) -> int:
        """How many it may have."""
        keys = self.numbers[1:2] if self.source == "attention" else ()
        return REGISTERS[(self.source, self.name, *keys)]


@cache
def dumped(*options: str) -> str:
    """What cuobjdump says of the library."""
    package = find_spec("triton")
    assert package is not None and package.origin is not None
    program = Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([program, *options, LIBRARY], capture_output=True, text=True, check=True)
    return done.stdout


def kernel_of(arch: str, mangled: str) -> Kernel:
    """What a mangled name says."""
    found = re.search(r"_\d+_([a-z_]+)_cuda_cu_.*?\d([a-z_]+)(?:I(.+)Ev|E)NS", mangled)
    assert found is not None, mangled
    numbers = re.findall(r"L[ib](\d+)E", found[3] or "")
    return Kernel(arch, found[1], found[2], tuple(map(int, numbers)))


def resources() -> Iterator[tuple[Kernel, dict[str, int]]]:
    """Each kernel with its resources."""
    arch, name = "", ""
    for line in dumped("--dump-resource-usage").splitlines():
        if found := re.search(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            yield kernel_of(arch, name), used


def test_it_loads_without_a_device() -> None:
    assert native.cuda_status() == "ok"
    # the reason says what there is not
    if torch.version.cuda is None:
        assert dispatch.cuda_status().startswith("PyTorch was built without CUDA")
    for name in OPERATIONS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nlpfast::{name}", "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"nlpfast::{name}", "CPU")


def test_it_needs_no_cuda_library() -> None:
    needed = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.+)\]", needed)
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if "cuda" in name]


def test_it_is_asked_for_by_name_alone() -> None:
    """Until a device has shown that it is faster."""
    assert "cuda" not in dispatch.PREFERENCE["cuda"]
    x, target = torch.zeros(1, 2, 3), torch.zeros(1, 2).long()
    with pytest.raises(RuntimeError, match="backend='cuda': cross_entropy cannot run there"):
        dispatch.choose("cross_entropy", "cpu", "cuda", (x, target))
    assert "the logits are on cpu" in str(cuda.refusal(x, target))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = [(kernel, used) for kernel, used in resources() if kernel.arch == arch]
    assert Counter((kernel.source, kernel.name) for kernel, _ in found) == KERNELS
    with capsys.disabled():
        print()
        for kernel, used in sorted(found, key=str):
            print(*kernel, f"{used['REG']} registers, {used['STACK']} bytes of stack")
    for kernel, used in found:
        assert used["REG"] <= kernel.registers, (kernel, used)
        # nothing is spilled, and no array is in local memory
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, used)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_instructions(arch: str) -> None:
    """Memory is read and written in vectors, products are of matrices, and there are no atomics."""
    counted: Counter[tuple[str, str]] = Counter()
    for part in dumped("-sass", "-arch", arch).split("Function : ")[1:]:
        kernel = kernel_of(arch, part.split()[0])
        counted[kernel.source, kernel.name] += 1
        names = set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", part, re.MULTILINE))
        assert names and not [name for name in names if name.startswith(("ATOM", "RED."))], kernel
        for kind in kernel.accesses:
            wide = [name for name in names if name.startswith(f"{kind}.") and "128" in name]
            assert bool(wide) == kernel.vectors, (kernel, kind, names)
        if kernel.source == "attention":
            assert any(name.startswith("HMMA.16816.F32") for name in names), kernel
            assert any(name.startswith("LDSM.16.M88.4") for name in names), kernel
            assert any(name.startswith("LDSM.16.MT88.4") for name in names), kernel
    assert counted == KERNELS


def test_code_for_later_devices() -> None:
    assert "compute_90" in dumped("--list-ptx") or "sm_90" in dumped("--list-ptx")
