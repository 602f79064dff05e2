"""What there is to draw of a run: the records of a log, whole and damaged, their curves, and the panels."""

import json
import math

import pytest

from nlpfast.data.lines import DataError
from nlpfast.plot_run import RunCurves, panels_of, read_log, read_runs

DATA = {"step": 0, "data": {"lines": 3}}
FIRST = {"step": 1, "epoch": 0, "tokens": 9, "loss": 4.0, "lr": 0.1, "grad_norm": 2.0, "time": 0.5}
SECOND = {**FIRST, "step": 2, "loss": 3, "grad_norm": None}
SCORED = {"val_loss": 3.5, "bleu": 20.0, "score": 20.0, "best": True}
RECORDS = [DATA, FIRST, SECOND, {**SECOND, "step": 4, **SCORED}, {**FIRST, "step": 5}]


def written(folder, records, rest=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + rest)
    return folder


def curves(folder, records):
    (run,) = read_runs([written(folder, records)])
    return run


def test_the_records_of_a_folder_and_of_a_file(tmp_path):
    folder = written(tmp_path / "run", RECORDS)
    for run in (folder, str(folder), folder / "log.jsonl"):
        records, report = read_log(run)
        assert records == RECORDS
        assert (report.read, report.used, report.path) == (5, 5, str(folder / "log.jsonl"))


def test_a_line_that_is_cut_off_at_the_end_is_skipped_and_counted(tmp_path):
    whole = json.dumps(SECOND)
    for length in range(1, len(whole)):
        records, report = read_log(written(tmp_path / "run", [FIRST], whole[:length]))
        assert records == [FIRST]
        assert (report.read, report.used, list(report.skipped)) == (2, 1, ["cut off at the end"])
    # the line is whole, only its end is not there
    records, report = read_log(written(tmp_path / "run", [FIRST], whole))
    assert records == [FIRST, SECOND] and (report.read, report.used) == (2, 2)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "lo',
        "",
        "[1]",
        "3",
        "null",
        '{"step": "2"}',
        '{"step": 2.5}',
        '{"step": true}',
        "[" * 10**5,
    ],
    ids=lambda line: line[:16] or "empty",
)
def test_a_damaged_line_is_an_error_with_its_number(line, tmp_path):
    path = written(tmp_path / "run", [FIRST], f"{line}\n{json.dumps(SECOND)}\n") / "log.jsonl"
    with pytest.raises(DataError, match=r"log\.jsonl:2: not a record, .*; correct the line or remove it"):
        read_log(path)
    # the last line too, if it has an end
    written(tmp_path / "run", [FIRST], f"{line}\n")
    with pytest.raises(DataError, match=r"log\.jsonl:2: not a record"):
        read_log(path)


def test_what_has_no_log(tmp_path):
    with pytest.raises(DataError, match=r"no log\.jsonl in it; name the folder of a run"):
        read_log(tmp_path)
    with pytest.raises(DataError, match="missing: no such file"):
        read_log(tmp_path / "missing")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(DataError, match="the file is empty"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match="runs is empty"):
        read_runs([])


@pytest.mark.parametrize("records", [[DATA], [{"step": 1, "tokens": 3, "best": True}], [{"loss": 1.0}]])
def test_a_log_without_figures(records, tmp_path):
    with pytest.raises(DataError, match="run: no figures in its log; wait for the first record"):
        curves(tmp_path / "run", records)


def test_curves_have_the_steps_of_the_records_with_the_field(tmp_path):
    run = curves(tmp_path / "run", RECORDS)
    assert run.name == "run"
    assert run.curves["loss"] == ([1, 2, 4, 5], [4, 3, 3, 4])
    assert run.curves["val_loss"] == ([4], [3.5])
    # what is not finite is written as None
    steps, norms = run.curves["grad_norm"]
    assert steps == [1, 2, 4, 5] and [norms[0], norms[3]] == [2, 2] and all(map(math.isnan, norms[1:3]))
    # the step is where the figures belong, and words and True are none
    assert list(run.curves) == [
        *("epoch", "tokens", "loss", "lr", "grad_norm", "time", "val_loss", "bleu", "score")
    ]


def test_a_note_without_a_step_or_a_number_is_passed_over(tmp_path):
    notes = [{"note": 3.0}, {"step": 3, "why": None}, {"step": 3, "why": "patience"}]
    assert curves(tmp_path / "run", [*RECORDS, *notes]) == curves(tmp_path / "run", RECORDS)


def test_not_a_number_is_one(tmp_path):
    run = curves(tmp_path / "run", [FIRST, {**FIRST, "loss": math.nan}, {**FIRST, "loss": math.inf}])
    assert math.isnan(run.curves["loss"][1][1]) and run.curves["loss"][1][2] == math.inf


def test_the_best_evaluation_is_the_last_of_the_best(tmp_path):
    def evaluation(step, bleu, best):
        return {**FIRST, "step": step, "nll": 1.0, "val_loss": bleu / 10, "bleu": bleu, "best": best}

    # nll is a figure of training too
    records = [
        {**FIRST, "nll": 2.0},
        evaluation(2, 10, True),
        evaluation(3, 12, True),
        evaluation(4, 11, False),
    ]
    run = curves(tmp_path / "run", records)
    assert (run.best, run.best_step) == ({"val_loss": 1.2, "bleu": 12}, 3)
    # a run that evaluates whenever it logs
    assert curves(tmp_path / "run", records[1:]).best == {"val_loss": 1.2, "bleu": 12, "nll": 1.0}
    assert curves(tmp_path / "run", RECORDS[:3])[2:] == ({}, 0)


def test_a_run_is_called_as_its_folder(tmp_path, monkeypatch):
    first, second = written(tmp_path / "first", RECORDS), written(tmp_path / "second", RECORDS)
    (tmp_path / "copy.jsonl").write_bytes((first / "log.jsonl").read_bytes())
    found = read_runs([first, second / "log.jsonl", tmp_path / "copy.jsonl"])
    assert [run.name for run in found] == ["first", "second", "copy.jsonl"]
    monkeypatch.chdir(first)
    assert [run.name for run in read_runs(["."])] == ["first"]
    (tmp_path / "more").mkdir()
    again = written(tmp_path / "more" / "first", RECORDS)
    found = read_runs([str(first), str(again), str(second)])
    assert [run.name for run in found] == [str(first), str(again), str(second)]


def run_with(*fields):
    return RunCurves("run", {field: ([1], [1.0]) for field in fields}, {}, 0)


def test_fields_that_end_in_the_same_word_share_a_panel():
    fields = ("tokens", "lr", "grad_norm", "time", "sst accuracy", "loss", "ppl", "val_nll", "para accuracy")
    runs = [run_with(*fields), run_with("lr", "val_loss", "bleu", "val_ppl")]
    assert panels_of(runs) == [
        ["loss", "val_nll", "val_loss"],
        ["sst accuracy", "para accuracy"],
        ["ppl", "val_ppl"],
        ["bleu"],
        ["lr"],
        ["grad_norm"],
    ]
    assert panels_of(runs, ["lr", "tokens", "val_loss", "bleu", "loss"]) == [
        *(["lr"], ["tokens"], ["val_loss", "loss"], ["bleu"])
    ]
    assert panels_of([run_with("bleu", "time")]) == [["bleu"]]


def test_fields_that_are_not_there():
    with pytest.raises(ValueError, match="fields with 'ter', which no log has; there are loss, bleu"):
        panels_of([run_with("loss"), run_with("bleu")], ["loss", "ter"])
    with pytest.raises(ValueError, match="fields is empty"):
        panels_of([run_with("loss")], [])


def test_a_score_is_drawn_unless_it_is_another_figure():
    def run(score: list[float] | None, bleu: list[float]) -> RunCurves:
        curves = {"bleu": ([1, 2], bleu)} | ({"score": ([1, 2], score)} if score else {})
        return RunCurves("run", curves, {}, 0)

    assert panels_of([run([3.0, 4.0], [3.0, 4.0])]) == [["bleu"]]
    assert panels_of([run([3.0, 5.0], [3.0, 4.0])]) == [["bleu"], ["score"]]
    assert panels_of([run([3.0, 4.0], [3.0, 4.0]), run([1.0, 2.0], [3.0, 4.0])]) == [["bleu"], ["score"]]
    assert panels_of([run([3.0, 4.0], [3.0, 4.0]), run(None, [3.0, 4.0])]) == [["bleu"]]
    assert panels_of([run([3.0, 4.0], [3.0, 4.0])], ["score"]) == [["score"]]
