"""What there is to draw of a run: the curves in `log.jsonl`, which training writes to the run's folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nlpfast.data.lines import DataError, ReadReport, text_blocks

__all__ = ["RunCurves", "panels_of", "read_log", "read_runs"]

_LOG = "log.jsonl"

# what decides which evaluation is the best
_SCORE = "score"
# what a record has beside the figures that are worth a look
_BOOKKEEPING = {
    *("epoch", "tokens", "skipped_steps", "nonfinite_steps", "empty_batches"),
    *("time", "tokens_per_second"),
}
# of every record, that of an evaluation as well
_TRAINING = {"loss", "lr", "grad_norm"}
# fields whose names end in the same word are in one panel, and so are these
_SAME_PANEL = {"nll": "loss"}
_FIRST, _LAST = ("loss",), ("lr", "norm")


class RunCurves(NamedTuple):
    """The numbers in the log of a run.

    Attributes:
        name: of the run's folder, or of a log with another name than usual.
        curves: field to its steps and its values, in the order of the log; nan is what was not finite.
        best: field to its value in the best evaluation, for those that only evaluations have.
        best_step: the step of that evaluation; 0 without one.
    """

    name: str
    curves: dict[str, tuple[list[int], list[float]]]
    best: dict[str, float]
    best_step: int


def read_log(run: str | Path) -> tuple[list[dict[str, Any]], ReadReport]:
    r"""Read the records of a run.

    Args:
        run: the folder of a run, or a log.

    Returns:
        The records in the order of the file: `step` is a whole number where there is one, NaN is a number.
        And the counts; a last line that is cut off, as a kill leaves it, is skipped.

    Raises:
        DataError: there is no log, it is empty, or a line that ends in \n is no record.
    """
    path = Path(run)
    if path.is_dir():
        path /= _LOG
        if not path.exists():
            raise DataError(f"{run}: no {_LOG} in it; name the folder of a run")
    report = ReadReport(path)
    *lines, rest = "".join(text_blocks(path, report)).split("\n")
    records = []
    for line in lines:
        report.read += 1
        record = _record(line)
        if record is None:
            reason = "not a record, a JSON object with a whole number as its step"
            raise DataError(f"{path}:{report.read}: {reason}; correct the line or remove it")
        records.append(record)
    if rest:
        report.read += 1
        record = _record(rest)
        if record is None:
            report.skip("cut off at the end")
        else:
            records.append(record)
    return records, report


def _record(line: str) -> dict[str, Any] | None:
    """Return what a line says, None if that is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    # True is an int as well
    if not isinstance(record, dict) or type(record.get("step", 0)) is not int:
        return None
    return record


def read_runs(runs: Sequence[str | Path]) -> list[RunCurves]:
    """Return what there is to draw of each run.

    Args:
        runs: folders of runs, or logs.

    Raises:
        DataError: a log has no figures, and what `read_log` raises.
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("runs is empty; name at least one")
    paths = [Path(os.path.abspath(run)) for run in runs]
    names = [path.parent.name if path.name == _LOG else path.name for path in paths]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    return [_curves(run, name, read_log(run)[0]) for run, name in zip(runs, names, strict=True)]


def _curves(run: str | Path, name: str, records: list[dict[str, Any]]) -> RunCurves:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    best: dict[str, float] = {}
    best_step, not_evaluated = 0, _TRAINING | _BOOKKEEPING
    for record in records:
        if "step" not in record:
            continue
        # None is what is not finite; True is no figure
        values = {field: math.nan if value is None else value for field, value in record.items()}
        values = {field: value for field, value in values.items() if type(value) in (int, float)}
        del values["step"]
        for field, value in values.items():
            steps, numbers = curves.setdefault(field, ([], []))
            steps.append(record["step"])
            numbers.append(value)
        if "best" not in record:
            not_evaluated = not_evaluated | values.keys()
        elif record["best"]:
            best, best_step = values, record["step"]
    # what is never a number is no figure
    curves = {field: curve for field, curve in curves.items() if not all(map(math.isnan, curve[1]))}
    if not curves.keys() - _BOOKKEEPING:
        raise DataError(f"{run}: no figures in its log; wait for the first record of the loss")
    best = {field: value for field, value in best.items() if field not in not_evaluated}
    return RunCurves(name, curves, best, best_step)


def panels_of(runs: Sequence[RunCurves], fields: Sequence[str] | None = None) -> list[list[str]]:
    """Return the fields that share a panel, for each panel: those whose names end in the same word.

    Args:
        runs: their fields are the choice.
        fields: what to draw, in this order; None for all but counts, times, and a score that another field
            is too; losses first.

    Raises:
        ValueError: a field is in no log, or there are none.
    """
    there = list(dict.fromkeys(field for run in runs for field in run.curves))
    left_out = _BOOKKEEPING | ({_SCORE} if all(map(_scored_by_another, runs)) else set())
    for field in fields or ():
        if field not in there:
            raise ValueError(f"fields with {field!r}, which no log has; there are {', '.join(there)}")
    if fields is not None and not fields:
        raise ValueError("fields is empty; name at least one, or give None for all")
    panels: dict[str, list[str]] = {}
    for field in [name for name in there if name not in left_out] if fields is None else fields:
        word = re.split("[ _]", field)[-1]
        panels.setdefault(_SAME_PANEL.get(word, word), []).append(field)
    if fields is not None:
        return list(panels.values())
    middle = [word for word in panels if word not in (*_FIRST, *_LAST)]
    return [panels[word] for word in (*_FIRST, *middle, *_LAST) if word in panels]


def _scored_by_another(run: RunCurves) -> bool:
    """Return whether the score of a run, where there is one, is another of its figures."""
    score = run.curves.get(_SCORE)
    return score is None or any(curve == score for field, curve in run.curves.items() if field != _SCORE)
