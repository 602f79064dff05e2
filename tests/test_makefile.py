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
*is_available*) exit "$NO_DEVICE" ;;
*find_spec*) echo "$MISSING" ;;
*pytest*) exit "$FAILING" ;;
esac
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make_gpu(folder: Path, **answers: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `make gpu`; return what it did and which modules it had the interpreter run."""
    interpreter, calls = folder / "python", folder / "calls"
    interpreter.write_text(INTERPRETER, encoding="utf-8")
    interpreter.chmod(0o755)
    # A make that runs these tests must not hand its own options down.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = {"NO_TORCH": "0", "NO_DEVICE": "0", "MISSING": "", "FAILING": "0", **answers}
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


def test_tests_come_first_and_the_benchmark_writes_its_results(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    bench = "-m nlpfast bench --quick --device cuda --output benchmarks/results"
    assert ran == ["-m pytest tests -m cuda", bench]


def test_without_a_device_there_is_nothing_to_do(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path, NO_DEVICE="1")
    assert done.returncode == 0 and ran == []
    assert done.stdout == "make gpu: PyTorch sees no CUDA device here: nothing to do\n"


def test_failing_tests_are_an_error_and_nothing_is_measured(tmp_path: Path) -> None:
    done, ran = make_gpu(tmp_path, FAILING="1")
    assert done.returncode == 2
    assert ran == ["-m pytest tests -m cuda"]


@pytest.mark.parametrize("missing", ["hypothesis", "pytest hypothesis"])
def test_what_is_missing_is_named_with_the_fix(tmp_path: Path, missing: str) -> None:
    done, ran = make_gpu(tmp_path, MISSING=missing)
    assert done.returncode == 2 and ran == []
    line = done.stderr.splitlines()[0]
    assert line.startswith("make gpu: ") and line.endswith(f"-m pip install {missing}")
