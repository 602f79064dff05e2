"""Turn results into tables: nothing in them is typed by hand.

`python -m benchmarks.report FOLDER FILE` writes a folder's results files as one Markdown file. Why a goal is
missed no measurement says: `reasons.json` beside FILE does, for each machine and op as pairs of a regular
expression, which is searched for in "case, threads, peer" as of `misses`, and a reason; the first that fits
counts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nlpfast.files import replacing

Result = dict[str, Any]

HEADINGS = (
    "case",
    "threads",
    "peer",
    "peer ms",
    "ours ms",
    "ratio",
    "goal",
    "peer error",
    "our error",
    "GEMM share",
    "limit",
    "memory MB",
)
# On a GPU; times are medians there.
GPU_HEADINGS = (
    "case",
    "peer",
    "step us: peer / ours",
    "ratio",
    "forward us",
    "backward us",
    "backward ratio",
    "goal",
    "latency us",
    "our GB/s",
    "of a copy",
    "memory MB",
    "error",
)
LEGEND = """\
Times are of forward and backward together, of training steps with clipping and the optimizer too: minimum /
median of rounds in which ours and the peers take turns. The ratio is the peer's time over ours, of the minima
/ of the medians; a goal is met when both reach it. Goals marked "best" are against the fastest peer of the
case. Errors are the largest absolute difference from float64, over the output and all gradients; in rows with
dropout the peer's error is taken without it, since its mask cannot be repeated; of models, blocks and
training steps they are shares of the largest value. GEMM share: the rate of ours over that of a large matrix
product in the same run, in float32 or bfloat16 as the case. Limit: what the ratio would be at a share of
100 %. Inference of models is forward alone. Memory, peer / ours: what a step takes at most beyond inputs and
gradients, of training steps beyond the model; its goal is a share of the peer's."""

CONVERGENCE_HEADINGS = (
    "trained",
    "by",
    "against",
    "dtype",
    "dropout",
    "seeds",
    "steps",
    "loss",
    "difference",
    "of the band",
)
CONVERGENCE_LEGEND = """\
Losses of the same training by the kernels and by plain PyTorch: "definition" with the kernels' random
numbers, "eager" with code and random numbers of its own (`make convergence`). Loss: of the first step and of
the last 20, mean of the seeds. Difference: the largest of a step's losses, relative. Of the band: that
difference over what lies between the seeds of plain PyTorch in that step; with random numbers of its own, of
means over the seeds and 20 steps. A dash: the seeds have one loss, or each drops what it will. A
definition that rounds otherwise computes by other instructions; beside itself eager code has other random
numbers: what is as near as that is not to be told from it."""

OVERHEAD_HEADINGS = ("operation", "us", "goal")
OVERHEAD_LEGEND = """\
Microseconds until a call from Python returns, minimum / median of rounds: checks, outputs and the launch, but
not the kernel, which is over before the next."""

GPU_LEGEND = """\
A step is a forward and a backward pass, each timed as replays of a CUDA graph over several copies of the
inputs, which together exceed the cache; a star marks what could not be captured and was launched from Python.
All pairs are peer / ours, medians of the times, but ratios: of the minima / of the medians. Latency: from
Python's call of a step until the GPU is done. GB/s, forward / backward: the bytes that must be moved at the
least over our time; then their share of the rate of a large copy in the same run. Memory: what a step takes
at most beyond its inputs. Goals are against the peer in whose row they stand, in attention the fastest
backend of PyTorch's own."""


def slug(machine: Result) -> str:
    """Return a name for a results file: the processor's model and the number of cores, or the GPU's name."""
    name = machine.get("gpu", f"{machine['cpu']} {machine['cores']} cores").lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", name)).strip("-")


def verdict(row: Result) -> str:
    """Return which goals a row has and whether they are met, as it stands in the table."""
    against = (
        (row["goal_peer"], row["goal"], "", "ratio"),
        (row.get("best_peer"), row.get("best_goal"), "best ", "ratio"),
        (row.get("backward_peer"), row.get("backward_goal"), "backward ", "backward_ratio"),
        (row["peer"], row.get("goals", {}).get(row["peer"]), "", "ratio"),
    )
    goals = []
    for peer, goal, which, name in against:
        if goal is not None and peer == row["peer"]:
            ratio = min(row[f"{name}_of_minima"], row[f"{name}_of_medians"])
            goals.append(f"{which}>= {goal:g} {'met' if ratio >= goal else 'MISSED'}")
    share, memory = row.get("memory_goal"), row.get("memory_mb", {})
    if share is not None and row["peer"] == row["memory_peer"] and memory.get("peer"):
        met = memory["ours"] <= share * memory["peer"]
        goals.append(f"memory <= {share:.0%} {'met' if met else 'MISSED'}")
    return ", ".join(goals) or "-"


def misses(result: Result, reasons: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Return a line for each missed goal: of what, by how much, and why.

    Args:
        result: of one op.
        reasons: pairs of a regular expression and a reason.
    """
    lines = []
    for row in result["rows"]:
        for goal in verdict(row).split(", "):
            if not goal.endswith("MISSED"):
                continue
            what = f"{row['name']}, {row['threads']} thread(s), {row['peer']}"
            ratios = f"{row['ratio_of_minima']:.2f} / {row['ratio_of_medians']:.2f}"
            if "memory" in goal:
                ratios = f"{row['memory_mb']['ours'] / row['memory_mb']['peer']:.0%}"
            why = _reason(what, reasons)
            lines.append(f"{what}: {ratios} instead of {goal.removesuffix(' MISSED')}: {why}")
    return lines


def _reason(what: str, reasons: Sequence[tuple[str, str]]) -> str:
    return next((reason for pattern, reason in reasons if re.search(pattern, what)), "not explained yet")


def convergence(result: Result, reasons: Sequence[tuple[str, str]] = ()) -> str:
    """Return the section on how losses go in training.

    Args:
        result: of a results file.
        reasons: why goals are missed, as `misses` takes them, by the names of trainers.
    """
    rows, missed = [CONVERGENCE_HEADINGS], []
    for row in result["rows"]:
        difference, band = row["difference"], row["of_band"]
        goal = row["goal"]
        words = "" if goal is None else f", <= {goal:g} {'met' if difference <= goal else 'MISSED'}"
        if goal is not None and difference > goal:
            missed.append(f"- Missed: {row['name']}: {_reason(row['name'], reasons)}")
        rows.append(
            (
                *(row["name"], row.get("by", "nlpfast"), row["against"], row["dtype"]),
                "yes" if row["dropout"] else "no",
                *(str(row["seeds"]), str(row["steps"]), " to ".join(f"{loss:.4g}" for loss in row["losses"])),
                "-" if difference is None else f"{difference:.1e}{words}",
                "-" if band is None else f"{band:.2%}",
            )
        )
    parts = [f"## convergence: {result['date']}", CONVERGENCE_LEGEND, markdown(rows), "\n".join(missed)]
    return "\n\n".join(filter(None, parts))


def overhead(result: Result) -> str:
    """Return the section on what a call of the compiled operations takes.

    Args:
        result: of a results file.
    """
    rows = [OVERHEAD_HEADINGS]
    for row in result["rows"]:
        us, goal = row["us"], row["goal"]
        words = "-" if goal is None else f"<= {goal:g} {'met' if us['median'] <= goal else 'MISSED'}"
        rows.append((row["name"], f"{us['min']:.1f} / {us['median']:.1f}", words))
    return "\n\n".join((f"## overhead: {result['date']}", OVERHEAD_LEGEND, markdown(rows)))


def table(result: Result) -> str:
    """Lay out the rows of one op as a Markdown table, padded so that it also reads well on a terminal."""
    rows = result["rows"]
    if _on_gpu(result):
        return markdown([GPU_HEADINGS, *(_gpu_cells(row) for row in rows)])
    return markdown([HEADINGS, *(_cells(row) for row in rows)])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, of which the first holds the headings, as a padded Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def section(op: str, result: Result, reasons: Sequence[tuple[str, str]] = ()) -> str:
    """Return the table of one op with what the machine can do, the notes and the missed goals.

    Args:
        op: its name.
        result: of it.
        reasons: why goals are missed, as `misses` takes them.
    """
    goals = [goal for row in result["rows"] for goal in verdict(row).split(", ") if goal != "-"]
    missed = misses(result, reasons)
    rates = [
        f"{threads} thread(s): GEMM {rate['gemm_gflops']} GFLOP/s in float32, "
        f"{rate.get('gemm_16_gflops', '-')} in bfloat16, copy {rate['copy_gbytes']} GB/s"
        for threads, rate in result["rates"].items()
    ]
    backends = ", ".join(sorted({row["backend"] for row in result["rows"]}))
    head = f"{op}: backend {backends}, device {result['device']}, {result['date']}"
    legend = [GPU_LEGEND, ""] if _on_gpu(result) else []
    quick = ["Quick run: few rounds, so the figures are rough."] if result["quick"] else []
    met = f"Goals: {len(goals) - len(missed)} of {len(goals)} met."
    tail = [met, *(f"Missed: {line}" for line in missed), *quick, *rates, *result["notes"]]
    return "\n".join([f"## {head}", "", *legend, table(result), "", *(f"- {line}" for line in tail)])


def page(files: Sequence[Path], reasons: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]) -> str:
    """Return the Markdown page of some results files.

    Args:
        files: the results.
        reasons: of missed goals, by the stems of the files and ops.
    """
    parts = ["# Results", "Written by `make bench` from the files of this folder; do not edit.", LEGEND]
    for path in files:
        data = json.loads(path.read_text(encoding="utf-8"))
        facts = {**data["machine"], **data["versions"], **data["native"]}
        name = data["machine"].get("gpu", f"{data['machine']['cpu']}, {data['machine']['cores']} cores")
        parts.append(f"# {name} ({path.name})")
        parts.append(markdown([("what", "value"), *facts.items()]))
        pictures = (path.with_name(f"{path.stem}-{what}.png") for what in ("speed", "memory"))
        parts += [f"![{p.stem}](results/{p.name})" for p in pictures if p.is_file()]
        known = reasons.get(path.stem, {})
        parts += [section(op, result, known.get(op, ())) for op, result in data["ops"].items()]
        if "overhead" in data:
            parts.append(overhead(data["overhead"]))
        if "convergence" in data:
            parts.append(convergence(data["convergence"], known.get("convergence", ())))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the page of a folder of results; 2 when the folder holds none."""
    if len(arguments) != 2:
        print("usage: python -m benchmarks.report FOLDER FILE", file=sys.stderr)
        return 2
    files = sorted(Path(arguments[0]).glob("*.json"))
    if not files:
        print(f"no results in {arguments[0]}: run `make bench` first", file=sys.stderr)
        return 2
    path = Path(arguments[1]).with_name("reasons.json")
    reasons = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with replacing(arguments[1]) as file:
        file.write(page(files, reasons).encode())
    return 0


def _cells(row: Result) -> tuple[str, ...]:
    ours, peer, memory = row["ours_ms"], row["peer_ms"], row.get("memory_mb", {})
    return (
        row["name"],
        str(row["threads"]),
        row["peer"],
        f"{peer['min']:.2f} / {peer['median']:.2f}",
        f"{ours['min']:.2f} / {ours['median']:.2f}",
        f"{row['ratio_of_minima']:.2f} / {row['ratio_of_medians']:.2f}",
        verdict(row),
        f"{max(row['peer_error'].values()):.1e}",
        f"{max(row['ours_error'].values()):.1e}",
        f"{row['gemm_share']:.0%}",
        f"{row['ratio_of_minima'] / row['gemm_share']:.1f}" if row["gemm_share"] else "-",
        f"{memory['peer']:.0f} / {memory['ours']:.0f}" if memory.get("peer") else "-",
    )


def _on_gpu(result: Result) -> bool:
    return any("backward_ms" in row for row in result["rows"])


def _gpu_cells(row: Result) -> tuple[str, ...]:
    def pair(times: Result) -> str:
        stars = {who: "" if captured else "*" for who, captured in row["captured"].items()}
        return " / ".join(f"{times[who]['median'] * 1e3:.1f}{stars[who]}" for who in ("peer", "ours"))

    errors = (max(row[f"{who}_error"].values()) for who in ("peer", "ours"))
    return (
        row["name"],
        row["peer"],
        pair({"peer": row["peer_ms"], "ours": row["ours_ms"]}),
        f"{row['ratio_of_minima']:.2f} / {row['ratio_of_medians']:.2f}",
        pair(row["forward_ms"]),
        pair(row["backward_ms"]),
        f"{row['backward_ratio_of_minima']:.2f} / {row['backward_ratio_of_medians']:.2f}",
        verdict(row),
        " / ".join(f"{row['latency_ms'][who]['median'] * 1e3:.0f}" for who in ("peer", "ours")),
        f"{row['forward_gbytes']:.0f} / {row['backward_gbytes']:.0f}",
        f"{row['forward_copy_share']:.0%} / {row['backward_copy_share']:.0%}",
        f"{row['memory_mb']['peer']:.0f} / {row['memory_mb']['ours']:.0f}",
        " / ".join(f"{error:.1e}" for error in errors),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
