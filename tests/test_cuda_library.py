"""The CUDA library where it was built, device or not: it loads, and its kernels keep to their limits.

Registers, local memory and instructions are read from its code by cuobjdump, which comes with Triton.
"""

import re
import subprocess
from collections import Counter

import pytest
import torch

from benchmarks.cuda_resources import LIBRARY, Kernel, dumped, instructions, listings, resources
from nlpfast import dispatch, native
from nlpfast.ops.cross_entropy import cuda

pytestmark = pytest.mark.skipif(
    not native.build_info().get("cuda"), reason="the native library was built without nvcc"
)
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
# leave two blocks of 512 threads, or one of 1,024, on a multiprocessor, and 32 all 2,048 threads, 48 for rows
# that begin anywhere 1,280; of attention forward, 128 leave four blocks and 168 three; of attention at pairs,
# 80 leave six blocks.
REGISTERS: dict[tuple[str | int, ...], int] = {
    ("cross_entropy", "whole_row"): 64,
    ("cross_entropy", "long_row"): 64,
    ("cross_entropy", "gradient_row", 0): 32,
    ("cross_entropy", "gradient_row", 1): 48,
    ("add_layer_norm", "forward"): 128,
    ("add_layer_norm", "backward"): 128,
    ("alignment_loss", "forward"): 64,
    ("alignment_loss", "backward"): 80,
    ("alignment_loss", "largest"): 80,
    ("alignment_loss", "group_pairs"): 64,
    ("attention", "forward", 64): 128,
    ("attention", "forward", 128): 168,
    ("attention", "forward_chunked", 128): 168,
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
    ("attention", "forward"): 2 * 2 * 2,
    ("attention", "forward_chunked"): 2 * 2,
    ("attention", "backward"): 2 * (6 + 9),
}


def wanted_of(kernel: Kernel) -> int:
    """How many registers it may have."""
    keys = kernel.numbers[1:2] if kernel.source == "attention" else ()
    if kernel.name == "gradient_row":
        keys = kernel.numbers[-1:]
    return REGISTERS[(kernel.source, kernel.name, *keys)]


def reads_vectors(kernel: Kernel) -> bool:
    """Whether it reads 16 bytes at once."""
    if kernel.source in ("cross_entropy", "attention"):
        return True
    return bool(kernel.numbers and kernel.numbers[-1])


def accesses(kernel: Kernel) -> tuple[str, ...]:
    """The instructions with which it moves vectors, if it does."""
    if kernel.source == "attention":
        return "LDGSTS", "STG"
    # of attention at pairs numbers and places are written, but for the gradients
    return ("LDG",) if kernel.source == "alignment_loss" and kernel.name != "backward" else ("LDG", "STG")


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
        assert used["REG"] <= wanted_of(kernel), (kernel, used)
        # nothing is spilled, and no array is in local memory
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, used)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_instructions(arch: str) -> None:
    """Memory is read and written in vectors, products are of matrices, and there are no atomics."""
    counted: Counter[tuple[str, str]] = Counter()
    for kernel, code in listings(arch):
        counted[kernel.source, kernel.name] += 1
        names = set(instructions(code))
        assert names and not [name for name in names if name.startswith(("ATOM", "RED."))], kernel
        for kind in accesses(kernel):
            wide = [name for name in names if name.startswith(f"{kind}.") and "128" in name]
            assert bool(wide) == reads_vectors(kernel), (kernel, kind, names)
        if kernel.source == "attention":
            assert any(name.startswith("HMMA.16816.F32") for name in names), kernel
            assert any(name.startswith("LDSM.16.M88.4") for name in names), kernel
            assert any(name.startswith("LDSM.16.MT88.4") for name in names), kernel
    assert counted == KERNELS


def test_code_for_later_devices() -> None:
    assert "compute_90" in dumped("--list-ptx") or "sm_90" in dumped("--list-ptx")
