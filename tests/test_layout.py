"""The measures of a good room: sizes, names, documentation, one-way imports, no global side effects."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "nlpfast").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
SOURCES = [*PACKAGE, *BENCHMARKS, *NATIVE, ROOT / "setup.py", ROOT / "CMakeLists.txt"]
OPS = sorted(path.parent for path in (ROOT / "nlpfast" / "ops").glob("*/reference.py"))

MAX_FILE, MAX_SETUP = 350, 60
MAX_FUNCTION, MAX_KERNEL = 60, 100

TOP = {
    *(".ci", ".clang-format", ".git", ".gitignore", ".pre-commit-config.yaml"),
    *("CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
    *("constraints.txt", "pyproject.toml", "setup.py"),
    *("benchmarks", "csrc", "nlpfast", "tests"),
}
# Ops without kernels of their own: those of the named op serve them, in its folder, by a binding of theirs.
KERNELS_OF = {"varlen_attention": "attention"}
# Ops whose backends put together PyTorch's products and the kernels of another op.
COMPOSED = {"linear_cross_entropy"}
BACKENDS = {"__init__", "reference", "cpu", "triton", "cuda"}
BANNED = re.compile(r"^(utils?|common|misc|helpers?|.*_new|.*_v2)$")
ENVIRONMENT = {"NLPFAST_BACKEND", "NLPFAST_NATIVE", "NLPFAST_LOG"}
# Parts may import parts of a lower rank, and themselves; "nlpfast" is the package's own __init__.
RANKS = {
    **dict.fromkeys(("files", "native", "stop", "testing"), 0),
    **dict.fromkeys(("dispatch", "optim"), 1),
    **dict.fromkeys(("ops", "data"), 2),
    **dict.fromkeys(("nn", "hf", "decoding", "metrics", "alignment", "plot_run", "hypotheses"), 3),
    "sentence_rewards": 3,
    **dict.fromkeys(("convert", "beam_search", "sampling"), 4),
    "nlpfast": 5,
    **dict.fromkeys(("models", "plot"), 6),
    "train": 7,
    "cli": 8,
    "__main__": 9,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def decorators(node: Function) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def lines_without_docstring(node: Function) -> int:
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Yield the public classes, functions and methods of a module, with their dotted names."""
    for node in body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        if isinstance(node, Function) and "overload" in decorators(node):
            continue
        yield owner + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{owner}{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_is_short(path: Path) -> None:
    limit = MAX_SETUP if path.name == "setup.py" else MAX_FILE
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{name_of(path)} has {lines} lines, at most {limit}: split it"


@pytest.mark.parametrize("path", [*PACKAGE, *BENCHMARKS, *TESTS, ROOT / "setup.py"], ids=name_of)
def test_functions_are_short(path: Path) -> None:
    for node in functions(path):
        limit = MAX_KERNEL if any("triton" in decorator for decorator in decorators(node)) else MAX_FUNCTION
        lines = lines_without_docstring(node)
        assert lines <= limit, f"{name_of(path)}: {node.name} has {lines} lines, at most {limit}: split it"


@pytest.mark.parametrize("path", NATIVE, ids=name_of)
def test_native_functions_are_short(path: Path) -> None:
    """In formatted code a function is from an unindented line that ends in `{` to an unindented `}`."""
    kernels = path.stem.endswith(("_simd", "_tile")) or "_cuda" in path.stem
    limit = MAX_KERNEL if kernels else MAX_FUNCTION
    begin = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        opens = re.match(r"\S.*\{$", line) and not re.match(r"(inline )?(namespace|extern)\b", line)
        if opens and begin is None:
            begin = number
        elif line.startswith("}") and begin is not None:
            assert number - begin < limit, f"{name_of(path)}:{begin}: at most {limit} lines: split it"
            begin = None


@pytest.mark.parametrize("path", [*PACKAGE, *BENCHMARKS], ids=name_of)
def test_public_names_are_documented_and_typed(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for name, node in public(tree.body):
        assert ast.get_docstring(node), f"{name_of(path)}: {name} has no docstring"
        # Triton's compiler finds types itself.
        if isinstance(node, ast.ClassDef) or "triton.jit" in decorators(node):
            continue
        assert node.returns is not None, f"{name_of(path)}: {name} has no return type"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not untyped, f"{name_of(path)}: {name} has arguments without a type: {untyped}"


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_no_banned_name(path: Path) -> None:
    names = [Path(part).stem for part in path.relative_to(ROOT).parts]
    if path.suffix == ".py":
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names += [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | Function)]
    banned = [name for name in names if BANNED.match(name)]
    assert not banned, f"{name_of(path)}: {banned} say nothing: name what it does"


def imported_parts(path: Path) -> Iterator[str]:
    """Yield the parts of nlpfast that a module imports, "nlpfast" for the package itself."""
    package = ("nlpfast", *path.relative_to(ROOT / "nlpfast").parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            words = name.split(".")
            if words[0] == "nlpfast" and words[-1] != "_C":
                yield words[1] if len(words) > 1 and words[1] in RANKS else "nlpfast"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(ROOT / "nlpfast").parts[0].removesuffix(".py")
    part = "nlpfast" if part == "__init__" else part
    assert part in RANKS, f"nlpfast/{part} has no rank: say in RANKS what it may import"
    for other in imported_parts(path):
        allowed = other == part or RANKS[other] < RANKS[part]
        assert allowed, f"{name_of(path)} imports {other}, which is not below it"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_op_is_complete(op: Path) -> None:
    schemas = (ROOT / "csrc" / "library.cpp").read_text(encoding="utf-8")
    needed = [ROOT / "tests" / "ops" / f"test_{op.name}.py", ROOT / "benchmarks" / f"bench_{op.name}.py"]
    if (op / "cpu.py").exists() and op.name not in COMPOSED:
        kernels = KERNELS_OF.get(op.name, op.name)
        folder = ROOT / "csrc" / kernels
        needed += [folder / f"{kernels}.h", folder / f"{kernels}_simd.cpp", folder / f"{op.name}_cpu.cpp"]
        for name in (f"{op.name}_forward", f"{op.name}_backward"):
            assert f'"{name}(' in schemas, f"csrc/library.cpp has no schema of {name}"
    missing = [name_of(path) for path in needed if not path.exists()]
    assert not missing, f"{op.name} lacks {missing}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_backends_keep_the_contract(op: Path) -> None:
    def signatures(path: Path) -> dict[str, list[str]]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        return {
            name: [argument.arg for argument in found[name].args.args]
            for name in ("forward", "backward", "refusal")
            if name in found
        }

    definition = signatures(op / "reference.py")
    assert len(definition) == 3
    for path in sorted(op.glob("*.py")):
        backend, _, part = path.stem.partition("_") if path.stem != "__init__" else (path.stem, "", "")
        assert backend in BACKENDS, f"{name_of(path)} is not a backend, or part of one: {sorted(BACKENDS)}"
        if path.stem != "__init__" and not part:
            assert signatures(path) == definition, f"{name_of(path)} differs from reference.py"


def test_ops_were_found() -> None:
    folders = [
        entry.name for entry in (ROOT / "nlpfast" / "ops").iterdir() if (entry / "__init__.py").exists()
    ]
    assert folders
    assert sorted(folders) == [op.name for op in OPS], "an op without reference.py has no definition"


def test_top_level_is_the_layout() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    entries = {
        entry.name
        for entry in ROOT.iterdir()
        if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored)
    }
    assert entries <= TOP, f"{sorted(entries - TOP)} have no place in the layout"
    assert TOP - {".git"} <= entries, f"{sorted(TOP - entries)} are missing"


def test_environment_variables_are_three() -> None:
    for path in [*PACKAGE, *BENCHMARKS, ROOT / "setup.py"]:
        named = set(re.findall(r"\bNLPFAST_[A-Z_]+", path.read_text(encoding="utf-8")))
        assert named <= ENVIRONMENT, f"{name_of(path)} names {sorted(named - ENVIRONMENT)}"
    for path in NATIVE:
        asked = set(re.findall(r"getenv\(([^)]*)\)", path.read_text(encoding="utf-8")))
        assert asked <= {'"ATEN_CPU_CAPABILITY"'}, f"{name_of(path)} reads {sorted(asked)}"


GLOBAL_STATE = """
import json, locale, logging, os, random, signal, sys, threading, warnings
import numpy, torch

def state():
    memory = torch.utils.deterministic.fill_uninitialized_memory
    return {
        "torch": [
            str(torch.get_default_dtype()), torch.get_num_threads(), torch.get_num_interop_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.get_rng_state().tolist(), memory,
            str(torch.get_default_device()), torch.backends.mkldnn.enabled,
        ],
        "random": [repr(random.getstate()), repr(numpy.random.get_state(legacy=False))],
        "warnings": [repr(entry) for entry in warnings.filters],
        "logging": [logging.root.level, [repr(handler) for handler in logging.root.handlers],
                    [repr(handler) for handler in logging.getLogger("nlpfast").handlers]],
        "environ": dict(os.environ),
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), list(sys.path), sys.getrecursionlimit()],
        "locale": locale.setlocale(locale.LC_ALL),
        "threads": threading.active_count(),
        "folder": os.getcwd(),
    }

before = state()
import MODULE
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


@pytest.mark.parametrize("module", ["nlpfast", "nlpfast.models.gpt", "nlpfast.train.trainer", "nlpfast.cli"])
def test_import_changes_nothing_global(module: str) -> None:
    program = GLOBAL_STATE.replace("MODULE", module)
    # This process has imported nlpfast; what that did to its environment must not be inherited.
    kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "ASAN_OPTIONS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"importing {module} changed {done.stdout.strip()}"
    assert done.stderr == "", f"importing {module} printed {done.stderr}"
