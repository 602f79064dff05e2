"""Measure the kernels of this machine against PyTorch's own.

Outputs and gradients are checked against float64 first. Tables go to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from nlpfast.cli.options import UsageError
from nlpfast.files import replacing

# The benchmarks of whole models, besides those of the ops: they have no backend to name.
MODELS = ("modules", "training", "bert", "translation", "dual")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb.

    Args:
        parser: the verb's own parser.
    """
    parser.add_argument(
        "op",
        nargs="?",
        choices=[*ops(), *MODELS],
        help="the op to measure; or training, whole steps against eager code; or on a CPU modules, models "
        "before and after the switch, bert, steps of a packed BERT against padding, translation, those of a "
        "Transformer and its beam search, or dual, steps of two that teach each other (all)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes: 70 seconds on a CPU")
    parser.add_argument(
        "--threads",
        type=_threads,
        default=(),
        metavar="N,N",
        help="numbers of CPU threads (1 and all)",
    )
    parser.add_argument("--backend", help="backend of ours (the one that nlpfast chooses)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    parser.add_argument(
        "--output",
        type=_path,
        metavar="PATH",
        help="JSON file for the results, or a folder, in which it is named after the machine; what it has of "
        "other ops is kept",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables on stdout, and write the results file if asked for.

    Args:
        args: the parsed command line.

    Returns:
        The exit code: 0 also when a goal is missed, which the table says.

    Raises:
        UsageError: no such backend or device here, or the results file cannot be written.
        RuntimeError: a result of ours is wrong, and is not timed then; or there are no benchmarks here.
    """
    from nlpfast.train.device import resolve_device

    path: Path | None = args.output
    if path is not None:
        _check_output(path)
    device = str(resolve_device(args.device))
    names = _names(args.op, device, args.backend)
    measure, report = benchmark_module("measure"), benchmark_module("report")
    facts = measure.machine_facts(device)
    if path is not None and path.is_dir():
        path = path / f"{report.slug(facts['machine'])}.json"
    settings = measure.Settings(args.quick, args.threads, args.backend, device)
    results = _kept(path, facts)
    for op in names:
        bench = benchmark_module(f"bench_{op}")
        result = measure.run(bench, settings, lambda line: print(line, file=sys.stderr, flush=True))
        # those of a backend that was asked for stand beside those of the one that users get
        heading = op if args.backend is None else f"{op} by {args.backend}"
        print(report.section(heading, result), flush=True)
        results["ops"][heading] = result
        if path is not None:
            # after each, as the next may take long
            with replacing(path) as file:
                file.write((json.dumps(results, indent=2) + "\n").encode())
    if path is not None:
        print(f"results written to {path}", file=sys.stderr)
    return 0


def ops() -> list[str]:
    """Return the names of the ops that this installation has."""
    folder = Path(__file__).parents[1] / "ops"
    return sorted(entry.parent.name for entry in folder.glob("*/reference.py"))


def _names(asked: str | None, device: str, backend: str | None) -> list[str]:
    """Return what to measure: on a GPU what has cases for one; the ops that have the backend, or models."""
    from nlpfast import dispatch

    names = [*ops(), *(MODELS if backend is None else ())]
    if device != "cpu":
        names = [name for name in names if hasattr(benchmark_module(f"bench_{name}"), "CUDA_CASES")]
    if asked and asked not in names:
        raise UsageError(f"{asked} is not measured with this --device or --backend: drop the option")
    names = [asked] if asked else names
    if backend is None:
        return names
    with_it = [op for op, name, _ in dispatch.explain() if name == backend]
    found = [op for op in names if op in with_it]
    if not found:
        known = dict.fromkeys(name for op, name, _ in dispatch.explain() if op in names)
        raise UsageError(f"--backend {backend}: {asked or 'an op'} has {', '.join(known)}, give one of them")
    return found


def _kept(path: Path | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what a results file holds already, of this machine and these versions, or an empty one."""
    if path is not None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if isinstance(found, dict) and "ops" in found and all(found.get(k) == facts[k] for k in facts):
            return found
        print(f"{path} is of other versions or another machine, and is replaced", file=sys.stderr)
    return {**facts, "ops": {}}


def _check_output(path: Path) -> None:
    """Raise if the results could not be written, before anything is measured."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UsageError(f"--output {path}: there is no folder {folder}, create it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--output {path}: the folder {folder} is read-only, name another")
    if path.exists() and path != folder and not path.is_file():
        raise UsageError(f"--output {path}: it is a device, name a file or a folder")


def _threads(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers such as 1,2")
    return tuple(int(number) for number in numbers)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("give the name of a file or of a folder")
    return Path(text)


def benchmark_module(name: str) -> ModuleType:
    """Import a module of the benchmarks: part of an installed nlpfast, beside it in a source tree."""
    for package in ("nlpfast.benchmarks", "benchmarks"):
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name not in (package, f"{package}.{name}"):
                raise
    raise RuntimeError(f"no benchmarks/{name}.py in this installation: install nlpfast from its source")
