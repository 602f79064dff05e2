"""Show versions, the machine, the native library, and which backend serves each op.

The output is plain text in aligned columns, ready to be pasted into a bug report.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
ENVIRONMENT = ("NLPFAST_BACKEND", "NLPFAST_NATIVE", "NLPFAST_LOG")
_MISSING = "not installed"
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb: there are none.

    Args:
        parser: the verb's own parser.
    """


def run(args: argparse.Namespace) -> int:
    """Print the report on stdout.

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.
    """
    print(report())
    return 0


def report() -> str:
    """Describe this installation.

    Returns:
        Blocks of aligned lines: versions, machine, native library, environment, and the table op x backend.
    """
    from nlpfast import dispatch

    environment = [(name, os.environ.get(name, "not set")) for name in ENVIRONMENT]
    backends = [("op", "backend", "status"), *dispatch.explain()]
    blocks = [
        aligned(list(versions().items())),
        aligned([*machine().items(), *_devices()]),
        aligned(list(native_library().items())),
        aligned(environment),
        aligned(backends),
    ]
    return "\n\n".join(blocks)


def versions() -> dict[str, str]:
    """Return the versions of nlpfast, Python, and the packages that decide how fast and how exact it is.

    Returns:
        Name to version; "not installed" for a package that is not there.
    """
    import torch

    import nlpfast

    return {
        "nlpfast": nlpfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "transformers": _installed("transformers"),
    }


def machine() -> dict[str, str]:
    """Describe the machine: processor, cores, instruction sets, memory, operating system.

    Returns:
        Name to description, "unknown" for what this system does not tell.
    """
    known = _cpuinfo("flags").split()
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count() or "unknown"),
        "flags": " ".join(flag for flag in _FLAGS if flag in known) or "unknown",
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def native_library() -> dict[str, str]:
    """Describe the compiled library: whether it is there, how it was built, which instruction set it uses.

    Returns:
        "native library" to "ok" or the reason why it is missing, "capability" to the instruction set in use,
        and what the build recorded (compiler and the like), if there was one.
    """
    from nlpfast import native

    recorded = native.build_info().items()
    built = {f"build {name.replace('_', ' ')}": value or "none" for name, value in recorded}
    return {"native library": native.status(), "capability": native.cpu_capability(), **built}


def cpu_model() -> str:
    """Return the name of the processor as the system gives it, "unknown" if it gives none."""
    named = _cpuinfo("model name")
    if not named and platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        named = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return named or platform.processor() or platform.machine() or "unknown"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns, two spaces apart.

    Args:
        rows: rows of equal length; the last column is not padded.

    Returns:
        One line per row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("threads", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "none")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        rows.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"))
    return rows


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _cpuinfo(field: str) -> str:
    """Return the first value of a field of CPUINFO, empty where there is no such file or field."""
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return ""


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"
