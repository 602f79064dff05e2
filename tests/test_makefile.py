"""`make gpu` on machines that are not this one, played by a stand-in for the interpreter."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Writes down what it is asked to run, and answers what the test says.
INTERPRETER = """#!/bin/sh
echo "$*" | tr '\\n' ' ' >> "$CALLS"
echo >> "$CALLS"
case "$*" in
*"import torch") exit "$NO_TORCH" ;;
*"import pybind11") exit "$NO_PYBIND11" ;;
*get_device_capability*) echo 90a ;;
*is_available*) exit "$NO_DEVICE" ;;
*find_spec*) echo "$MISSING" ;;
*pytest*) exit "$FAILING" ;;
esac
"""
# In the place of nvcc, cmake and ninja.
TOOL = """#!/bin/sh
echo "-m $(basename "$0") $*" >> "$CALLS"
exit "$NO_BUILD"
"""
TOOLS = ("nvcc", "cmake", "ninja")
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make_gpu(folder: Path, **answers: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `make gpu`; return what it did and which modules it had the interpreter run."""
    interpreter, calls = folder / "python", folder / "calls"
    interpreter.write_text(INTERPRETER, encoding="utf-8")
    interpreter.chmod(0o755)
    for name in TOOLS:
        (folder / name).write_text(TOOL, encoding="utf-8")
        (folder / name).chmod(0o755)
    # A make that runs these tests must not hand its own options down.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = {"NO_TORCH": "0", "NO_DEVICE": "0", "MISSING": "", "FAILING": "0", "NO_BUILD": "0"}
    environment |= {"NO_PYBIND11": "0", "PATH": f"{folder}:{kept['PATH']}", **answers}
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={interpreter}"],
        cwd=ROOT,
        env={**kept, **environment, "CALLS": str(calls)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = calls.read_text(encoding="utf-8").splitlines()
    return done, [line.strip() for line in lines if line.startswith("-m ")]


BENCH = "-m nlpfast bench --quick --device cuda --output benchmarks/results"
OVERHEAD = "-m benchmarks.overhead benchmarks/results"
TESTS = "-m pytest tests -m cuda"


def test_the_library_then_tests_then_results_of_either_kernels(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    configure, *rest = ran
    assert configure.startswith("-m cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE=")
    assert configure.endswith("/python -DNLPFAST_CUDA_ARCHITECTURES=90a")
    library = ["-m cmake --build build/gpu", "-m cmake --install build/gpu --prefix nlpfast"]
    assert rest == [*library, TESTS, BENCH, f"{BENCH} --backend cuda", OVERHEAD]


def test_what_does_not_build_is_an_error(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path, NO_BUILD="1")
    assert done.returncode == 2 and len(ran) == 1 and "cmake -S" in ran[0]


def test_without_what_a_build_takes_there_are_tritons_kernels(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path, NO_PYBIND11="1")
    assert done.returncode == 0 and ran == [TESTS, BENCH]
    assert done.stderr.startswith("make gpu: Triton's kernels alone: ")


def test_without_a_device_there_is_nothing_to_do(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path, NO_DEVICE="1")
    assert done.returncode == 0 and ran == []
    assert done.stdout == "make gpu: PyTorch sees no CUDA device here: nothing to do\n"


def test_failing_tests_are_an_error_and_nothing_is_measured(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path, FAILING="1")
    assert done.returncode == 2 and ran[-1] == TESTS


@pytest.mark.parametrize("missing", ["hypothesis", "pytest hypothesis"])
def test_what_is_missing_is_named_with_the_fix(tmp_path: Path, missing: str) -> None:
    done, ran = make_gpu(tmp_path, MISSING=missing)
    assert done.returncode == 2 and ran == []
    line = done.stderr.splitlines()[0]
    assert line.startswith("make gpu: ") and line.endswith(f"-m pip install {missing}")
