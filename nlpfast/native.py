"""The compiled library: load it, say how it was built and what the CPU offers, or why it is missing."""

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parent
_PROCESS = os.getpid()


def _load(name: str, hint: str) -> str:
    """Load one shared library of operations; "ok", or the reason why it is missing in one line."""
    path = FOLDER / name
    if not path.exists():
        return f"{name} was not built ({hint})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} does not load: {' '.join(str(error).split())}"
    return "ok"


def _import_c() -> ModuleType | None:
    try:
        return importlib.import_module("nlpfast._C")
    except ImportError:
        return None


_C = _import_c()
_STATUS = _load("libnlpfast_cpu.so", "reinstall with NLPFAST_NATIVE=required to see the compiler's error")
# The schemas of its operations are in the other.
_NO_NVCC = "reinstall where nvcc is on the PATH or below CUDA_HOME"
_CUDA_STATUS = _load("libnlpfast_cuda.so", _NO_NVCC) if _STATUS == "ok" else _STATUS


def status() -> str:
    """Return "ok" if the CPU operations are loaded, else one line with the reason."""
    return _STATUS


def cuda_status() -> str:
    """Return "ok" if the operations of CUDA devices are loaded, else one line with the reason.

    They load on a machine without a device, and with a PyTorch that knows none.
    """
    return _CUDA_STATUS


def build_info() -> dict[str, str]:
    """Return how the native library was built, {} if it is missing.

    Keys: compiler, torch (whose headers), instruction_sets, cuda, sanitizers.
    """
    return dict(_C.build_info()) if _C else {}


def cpu_capability() -> str:
    """Return the instruction set in use: DEFAULT, AVX2, AVX512, AVX512_BF16, AVX512_AMX; NONE if not built.

    `ATEN_CPU_CAPABILITY` (default, avx2, avx512) lowers it, as it lowers PyTorch's own kernels.
    """
    return str(_C.cpu_capability()) if _C else "NONE"


def join_no_lost_threads() -> None:
    """In a forked process, have PyTorch's own operations use one thread.

    It has the pool of its parent but not its threads, and would wait for them for ever. nlpfast's own kernels
    do not need this.
    """
    if os.getpid() != _PROCESS and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
