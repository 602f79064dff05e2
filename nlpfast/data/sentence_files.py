r"""Files of sentence tasks: one or two sentences a row, with a label or without, separated by tabs.

The form is that of CS224N's minBERT project: a header, then rows of an index, an id, the sentences and the
label. Columns are found by their names in the header, and others are not looked at. Lines are those of
`nlpfast.data.lines`, with all its policies. What is done with rows:

    quotes              as `csv.reader` of Python does: a field that begins with " ends at the next " that is
                        not doubled, and may have tabs and line ends in it; "" in it stands for ". Elsewhere a
                        " is a character. A field without an end, or with more than MAX_LINES lines, is an
                        error at its first line.
    spaces              around a field do not count.
    empty line          is skipped, and counted.
    missing label       in a file with labels: the row is skipped, and counted.
    empty sentence      in a file with labels: the row is skipped, and counted. In one without, every row is
                        used, so that each gets a prediction, and these are counted.
    id twice            is used, and counted.
    other label         one that is no number, or out of the task's range, is an error at its line. Scores are
                        never made whole numbers.
    id                  must be one word without commas: it is written into the file of predictions.
    number of fields    other than the header's: an error at its line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nlpfast.data.lines import DataError, ReadReport, read_lines
from nlpfast.files import replacing

__all__ = [
    "CFIMDB",
    "HIGHEST_SCORE",
    "PARAPHRASE",
    "SIMILARITY",
    "SST",
    "Example",
    "Kind",
    "SentenceReport",
    "SentenceTask",
    "raw_rows",
    "read_examples",
    "task_of",
    "write_predictions",
]

Kind = Literal["classes", "binary", "score"]

# Scores are from 0 to this.
HIGHEST_SCORE = 5.0

# Lines that a row may have. A quote without its partner would otherwise make the rest of the file one row.
MAX_LINES = 100

_CELL = re.compile(r'"([^"]*(?:""[^"]*)*)"(?!")([^\t]*)|(?!")([^\t]*)')
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_ID = re.compile(r"[^\s,]+")


@dataclasses.dataclass(frozen=True)
class SentenceTask:
    """What is to be said of one sentence, or of two.

    Attributes:
        name: in a word.
        kind: what labels are: numbers of "classes" from 0, "binary" 0 or 1, or a "score" from 0 to
            HIGHEST_SCORE.
        classes: how many there are; None if `kind` is another.
        columns: names of the one or two columns with sentences.
        label: name of the column with labels.
        prediction: what the course calls the column of predictions.
    """

    name: str
    kind: Kind
    classes: int | None
    columns: tuple[str, ...]
    label: str
    prediction: str

    @property
    def sentences(self) -> int:
        """Return the number of sentences of an example, 1 or 2."""
        return len(self.columns)


SST = SentenceTask("sst", "classes", 5, ("sentence",), "sentiment", "Predicted_Sentiment")
CFIMDB = dataclasses.replace(SST, name="cfimdb", classes=2)
PARAPHRASE = SentenceTask(
    "paraphrase", "binary", None, ("sentence1", "sentence2"), "is_duplicate", "Predicted_Is_Paraphrase"
)
# the course's spelling
SIMILARITY = SentenceTask(
    "similarity", "score", None, ("sentence1", "sentence2"), "similarity", "Predicted_Similiary"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a file.

    Attributes:
        id: its name in the file of predictions.
        sentences: one or two.
        label: whole for classes and binary labels, a float for scores, None if it is not known.
        line: where the row begins, counted from 1.
    """

    id: str
    sentences: tuple[str, ...]
    label: int | float | None
    line: int


class SentenceReport(ReadReport):
    """What became of the lines of a file; `used` is the number of examples.

    Attributes:
        duplicate_ids: examples whose id another before them has.
        empty_sentences: examples with an empty sentence, which only files without labels keep.
    """

    def __init__(self, path: str | Path) -> None:
        """Begin with no lines.

        Args:
            path: the file, for messages.
        """
        super().__init__(path)
        self.duplicate_ids = 0
        self.empty_sentences = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values, for logs."""
        more = {"duplicate_ids": self.duplicate_ids, "empty_sentences": self.empty_sentences}
        return {**super().as_dict(), **more}

    def __str__(self) -> str:
        """Return the counts in one line."""
        text = super().__str__()
        if self.duplicate_ids:
            text += f"; {self.duplicate_ids:,} with the id of another"
        if self.empty_sentences:
            text += f"; {self.empty_sentences:,} used with an empty sentence"
        return text


def read_examples(
    path: str | Path, task: SentenceTask, *, labelled: bool | None = None
) -> tuple[list[Example], SentenceReport]:
    """Return the examples of a file, in its order; the policies are at the top of this module.

    Args:
        path: UTF-8 text, compressed by gzip or not.
        task: which columns to read, and which labels there can be.
        labelled: whether to read labels; None to read them if the header has their column.

    Raises:
        DataError: the file cannot be read, lacks a column, has a row or a label that cannot be, or no example
            that can be used; names file and line.
    """
    report = SentenceReport(path)
    rows = _rows(path, report)
    names, labelled = _header(rows, report, task, labelled)
    id_place, *places = (names.index(name) for name in ("id", *task.columns))
    examples: list[Example] = []
    ids: set[str] = set()
    for line, _, cells in rows:
        place = f"{path}:{line}"
        if len(cells) != len(names):
            rule = f"the header has {len(names)}; separate fields by one tab each"
            raise DataError(f"{place}: has {len(cells)} field{'s' * (len(cells) != 1)}, {rule}")
        name, sentences = cells[id_place], tuple(cells[i] for i in places)
        if _ID.fullmatch(name) is None:
            raise DataError(f"{place}: id {name[:40]!r} must be one word without commas; give each row one")
        label = None
        if labelled:
            text = cells[names.index(task.label)]
            if not text:
                report.skip("without a label")
                continue
            label = _label(text, task, place)
        if "" in sentences:
            if labelled:
                report.skip("with an empty sentence")
                continue
            report.empty_sentences += 1
        report.duplicate_ids += name in ids
        ids.add(name)
        examples.append(Example(name, sentences, label, line))
    # last, so that the place that the report shows is one to look at
    report.skipped["header"] = report.skipped.pop("header")
    if not examples:
        found = ", ".join(f"{skips.count:,} {reason}" for reason, skips in report.skipped.items())
        raise DataError(f"{path}: has no examples to use, its lines are {found}; give a file that has some")
    return examples, report


def task_of(path: str | Path, kind: Kind = "classes") -> SentenceTask:
    """Return the task of a file with labels, of the same form: its columns are id, the sentences, the label.

    Args:
        path: a training file. The label is its last column, sentences are those between it and the id.
        kind: what its labels are. Classes are counted, and each has to have an example.

    Raises:
        DataError: the header has another form, or a class no example; and what `read_examples` raises.
    """
    rows = _rows(path, SentenceReport(path))
    line, _, names = next(rows, (1, "", []))
    *columns, label = names[names.index("id") + 1 :] if "id" in names[:-1] else [""]
    if not 1 <= len(columns) <= 2:
        rule = "must be id, one or two sentences, and the label, in this order and separated by tabs"
        raise DataError(f"{path}:{line}: the columns {_shown(names)} {rule}; correct the first line")
    task = SentenceTask(label, kind, None, tuple(columns), label, f"Predicted_{label.title()}")
    examples, _ = read_examples(path, task)
    if kind != "classes":
        return task
    found = {int(example.label or 0) for example in examples}
    classes = max(found) + 1
    if len(found) < max(classes, 2):
        missing = next(number for number in range(len(found) + 1) if number not in found)
        rule = "number at least two classes from 0, without a gap"
        raise DataError(f"{path}: no {label} is {missing}, the highest is {classes - 1}; {rule}")
    return dataclasses.replace(task, classes=classes)


def write_predictions(
    path: str | Path, examples: Sequence[Example], predictions: Sequence[float] | Tensor, column: str
) -> None:
    r"""Write a file of predictions, byte by byte in the course's form, whole or not at all.

    The first line is ``id \t COLUMN \n``, the others ``ID , PREDICTION \n``. The course writes classes as 3,
    binary predictions as 1.0: pass the former as whole numbers, the latter as floats.

    Args:
        path: the file to write.
        examples: what was predicted for.
        predictions: one for each example, [len(examples)], of any dtype.
        column: ``task.prediction``.

    Raises:
        ValueError: another number of predictions than of examples, or one that is not finite.
        OSError: the file cannot be written.
    """
    values = predictions.tolist() if isinstance(predictions, Tensor) else list(predictions)
    if len(values) != len(examples):
        raise ValueError(f"predictions has {len(values)} for {len(examples)} examples; give one for each")
    lines = [f"id \t {column} \n"]
    for i, (example, value) in enumerate(zip(examples, values, strict=True)):
        if not math.isfinite(value):
            raise ValueError(
                f"predictions[{i}]={value} of {example.id} must be finite; see what predicted it"
            )
        # True is written as 1
        lines.append(f"{example.id} , {value + 0} \n")
    with replacing(path) as file:
        file.write("".join(lines).encode("utf-8"))


def raw_rows(path: str | Path) -> Iterator[str]:
    r"""Yield the rows of a file, the header first, as they are in it; \n is within them alone.

    Args:
        path: UTF-8 text, compressed by gzip or not.

    Raises:
        DataError: the file cannot be read, or has a quote without an end; names file and line.
    """
    for _, row, _ in _rows(path, SentenceReport(path)):
        yield row


def _rows(path: str | Path, report: SentenceReport) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the line in which each row begins, the row, and its fields; the header first."""
    row, begin = "", 0
    for line in read_lines(path, report):
        if not line and not begin:
            report.skip("empty")
            continue
        row, begin = (f"{row}\n{line}", begin) if begin else (line, report.read)
        cells = _cells(row)
        if cells is not None:
            yield begin, row, [cell.strip() for cell in cells]
            begin = 0
        elif report.read - begin + 1 < MAX_LINES:
            report.skip("continued in the next line")
        else:
            break
    if begin:
        rule = f"has no end within {MAX_LINES} lines; add a quote at its end"
        raise DataError(f"{path}:{begin}: a field in quotes {rule}")


def _cells(row: str) -> list[str] | None:
    """Return the fields of a row, or None if a quote is open at its end."""
    if '"' not in row:
        return row.split("\t")
    cells, place = [], 0
    while place <= len(row):
        match = _CELL.match(row, place)
        if match is None:
            return None
        quoted, rest, plain = match.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"') + rest)
        place = match.end() + 1
    return cells


def _header(
    rows: Iterator[tuple[int, str, list[str]]],
    report: SentenceReport,
    task: SentenceTask,
    labelled: bool | None,
) -> tuple[list[str], bool]:
    """Return the names of the columns, and whether labels are read."""
    line, _, names = next(rows, (1, "", []))
    labelled = task.label in names if labelled is None else labelled
    needed = ["id", *task.columns, *[task.label] * labelled]
    if any(names.count(name) != 1 for name in needed):
        rule = f"must have {', '.join(needed)}, each once and separated by tabs; correct the first line"
        raise DataError(f"{report.path}:{line}: the columns {_shown(names)} {rule}")
    report.skip("header")
    return names, labelled


def _shown(names: list[str]) -> str:
    """Return names for a message, of which some may be long: the first line may be no header."""
    return ", ".join(repr(name[:40]) for name in names[:8] or [""]) + ", ..." * (len(names) > 8)


def _label(text: str, task: SentenceTask, place: str) -> int | float:
    """Return a label, and refuse what is not one of the task."""
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if task.kind == "score" and 0 <= number <= HIGHEST_SCORE:
        return number
    highest = 1 if task.kind == "binary" else math.inf if task.classes is None else task.classes - 1
    if task.kind != "score" and 0 <= number <= highest and number.is_integer():
        return int(number)
    allowed = {"score": f"a number from 0 to {HIGHEST_SCORE:g}", "binary": "0 or 1"}.get(
        task.kind, "a whole number from 0" + f" to {highest}" * (task.classes is not None)
    )
    raise DataError(f"{place}: {task.label} {text[:40]!r} must be {allowed}; correct it, or leave it empty")
