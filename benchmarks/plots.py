"""Draw results: speed of attention against length, memory of the projected loss against vocabulary.

`python -m benchmarks.plots FOLDER` draws `<machine>-speed.png` and `<machine>-memory.png` beside each results
file that has such rows, by matplotlib (the extra `plot`). Nothing but these files is read.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlpfast.plot import _canvas, _written

Result = dict[str, Any]
Points = set[tuple[float, float]]
Lines = dict[str, list[tuple[float, float]]]

OURS = "nlpfast"
DTYPES = ("float32", "bfloat16")


def speeds(data: Result, dtype: str) -> Lines:
    """Return GFLOP/s of forward and backward against the length of a sequence, for each implementation.

    Of causal attention with one thread, in the cases that differ by their length alone. The rate of ours is
    its share of a matrix product's rate, and a peer's follows from the times of both.

    Args:
        data: what a results file holds.
        dtype: whose rows.
    """
    result, lines = data["ops"].get("attention", {"rows": []}), defaultdict[str, Points](set)
    for row in result["rows"]:
        if not row.get("sweep") or row["dtype"] != dtype or row["threads"] != 1:
            continue
        length = row["shape"][2]
        kind = "gemm_gflops" if dtype == "float32" else "gemm_16_gflops"
        rate = row["gemm_share"] * result["rates"]["1"][kind]
        lines[OURS].add((length, rate))
        lines[row["peer"]].add((length, rate / row["ratio_of_minima"]))
    return {name: sorted(points) for name, points in lines.items()}


def memories(data: Result) -> Lines:
    """Return MB for a thousand tokens against the vocabulary, for each implementation that was measured."""
    result, lines = data["ops"].get("linear_cross_entropy", {"rows": []}), defaultdict[str, Points](set)
    for row in result["rows"]:
        tokens, words, _ = row["shape"]
        for who, name in (("ours", OURS), ("peer", row["peer"])):
            megabytes = row.get("memory_mb", {}).get(who)
            if megabytes is not None:
                lines[f"{name}, {row['dtype']}"].add((words, 1000 * megabytes / tokens))
    return {name: sorted(points) for name, points in lines.items()}


def draw(path: Path) -> list[Path]:
    """Draw what a results file has; return the pictures.

    Args:
        path: the file.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    panels = {f"attention, {dtype}, one thread": speeds(data, dtype) for dtype in DTYPES}
    panels = {title: lines for title, lines in panels.items() if lines}
    drawn = []
    for what, labels, parts in (
        ("speed", ("length", "GFLOP/s, forward and backward"), panels),
        ("memory", ("vocabulary", "MB for 1,000 tokens"), {"linear_cross_entropy": memories(data)}),
    ):
        if any(parts.values()):
            drawn.append(path.with_name(f"{path.stem}-{what}.png"))
            _draw(parts, labels, drawn[-1])
    return drawn


def main(arguments: Sequence[str]) -> int:
    """Draw the results of a folder; 2 for a wrong call."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m benchmarks.plots FOLDER (of results)", file=sys.stderr)
        return 2
    for path in sorted(Path(arguments[0]).glob("*.json")):
        for picture in draw(path):
            print(picture)
    return 0


def _draw(parts: dict[str, Lines], labels: tuple[str, str], path: Path) -> None:
    canvas = _canvas(5.5 * len(parts), 4.0)
    for number, (title, lines) in enumerate(parts.items(), 1):
        axes = canvas.figure.add_subplot(1, len(parts), number)
        for name in sorted(lines, key=lambda name: (not name.startswith(OURS), name)):
            style = {"linewidth": 2.5} if name.startswith(OURS) else {"linestyle": "--"}
            axes.plot(*zip(*lines[name], strict=True), marker="o", label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _written(canvas, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
