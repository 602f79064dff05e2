"""The build: what NLPFAST_NATIVE means, and the CUDA library on a machine with or without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nlpfast import native

ROOT = Path(__file__).parents[1]

# As small as a CUDA operation can be: a schema, a kernel, a launch.
PROBE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

__global__ void double_kernel(const float* x, float* y, int64_t n) {
  int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}

Tensor doubled(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  int64_t n = x.numel();
  double_kernel<<<(n + 255) / 256, 256>>>(static_cast<const float*>(x.const_data_ptr()),
                                          static_cast<float*>(y.mutable_data_ptr()), n);
  return y;
}

STABLE_TORCH_LIBRARY(nlpfast_probe, m) { m.def("doubled(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(nlpfast_probe, CUDA, m) { m.impl("doubled", TORCH_BOX(&doubled)); }
"""


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that a failing build leaves this one alone."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "nlpfast", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def build(tree: Path, native_wish: str, compiler: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "NLPFAST_NATIVE": native_wish, "CXX": compiler}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    return run(command, cwd=tree, env=environment)


def test_this_installation_has_its_native_library() -> None:
    assert native.status() == "ok"
    info = native.build_info()
    assert set(info) == {"compiler", "torch", "instruction_sets", "cuda", "sanitizers"}
    assert info["compiler"] and info["torch"] and "baseline" in info["instruction_sets"]
    assert native.cpu_capability() in ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16", "AVX512_AMX")


def test_a_failing_compiler_warns_and_installs_anyway(tree: Path) -> None:
    result = build(tree, "auto", "/bin/false")
    assert result.returncode == 0, result.stderr
    assert "warning: native build failed" in result.stderr


def test_a_failing_compiler_is_an_error_when_the_native_library_is_required(tree: Path) -> None:
    assert build(tree, "required", "/bin/false").returncode != 0


def test_no_native_build_is_tried_when_it_is_unwanted(tree: Path) -> None:
    result = build(tree, "0", "/bin/false")
    assert result.returncode == 0 and "warning" not in result.stderr
    assert not (tree / "build").exists()


def test_a_missing_library_is_said(tree: Path) -> None:
    # An editable installation would still lend this tree its own library.
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
    code = "from nlpfast import native; print(native.status(), native.build_info(), native.cpu_capability())"
    result = run([sys.executable, "-c", alone + code], cwd=tree)
    assert "libnlpfast_cpu.so was not built" in result.stdout and "{} NONE" in result.stdout, result.stderr
    code = "import nlpfast; print(nlpfast.dispatch.explain())"
    assert "was not built" in run([sys.executable, "-c", alone + code], cwd=tree).stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_cuda_library_builds_and_loads_whatever_torch_is_installed(tmp_path: Path) -> None:
    source = tmp_path / "probe_cuda.cu"
    source.write_text(PROBE)
    folder = tmp_path / "build"
    settings = [
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DNLPFAST_CUDA_SOURCES={source}",
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=Path(sys.executable).parent) or 'ninja'}",
    ]
    configured = run(["cmake", "-S", str(ROOT), "-B", str(folder), *settings])
    assert configured.returncode == 0, configured.stderr
    built = run(["cmake", "--build", str(folder), "--target", "nlpfast_cuda"])
    assert built.returncode == 0, built.stdout
    code = (
        f"import torch; torch.ops.load_library({str(folder / 'libnlpfast_cuda.so')!r}); "
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('nlpfast_probe::doubled', 'CUDA'))"
    )
    assert run([sys.executable, "-c", code]).stdout.strip() == "True"
