"""The log: plain lines where there is no terminal, a bar where there is one, JSON lines always."""

import io
import json
import math

import pytest

from nlpfast.train.config import ConfigError
from nlpfast.train.log import Meter, RunLog

RECORD = {"step": 5, "loss": 1.25, "lr": 0.001, "tokens_per_second": 12345.6, "skipped_steps": 0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    with RunLog(None, stream=stream) as log:
        log.progress(4, 10, 1.5)
        log.record(RECORD, 10)
        log.record({**RECORD, "step": 10, "val_loss": 1.5, "best": True}, 10)
        log.record({**RECORD, "skipped_steps": 2, "empty_batches": 1}, None)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step        5/10  loss 1.2500  lr 1.00e-03  12,346 tokens/s"
    assert "val 1.5000 (best)" in lines[1]
    assert "2 steps skipped by the loss scaler  1 batches without a counted target" in lines[2]
    assert len(lines) == 3
    assert "\r" not in stream.getvalue()


def test_a_bar_on_a_terminal_that_leaves_only_evaluations(monkeypatch):
    monkeypatch.setattr("nlpfast.train.log.SECONDS_BETWEEN_REDRAWS", 0.0)
    stream = Terminal()
    with RunLog(None, stream=stream) as log:
        log.progress(4, 10, 1.5)
        log.record(RECORD, 10)
        log.progress(6, None, 1.5)
        log.record({**RECORD, "val_loss": 1.5}, 10)
        log.progress(9, 10, 1.5)
    text = stream.getvalue()
    assert "[==========              ]  40%  step 4/10  loss 1.5000" in text
    assert text.count("\n") == 1
    # what stays on the screen after carriage returns
    assert text.endswith(" \r")
    last_line = text.split("\n")[0].split("\r")[-1]
    assert "val 1.5000" in last_line


def test_a_line_takes_the_place_of_the_bar(monkeypatch):
    monkeypatch.setattr("nlpfast.train.log.SECONDS_BETWEEN_REDRAWS", 0.0)
    stream = Terminal()
    with RunLog(None, stream=stream) as log:
        log.progress(4, 10, 1.5)
        bar = stream.getvalue().lstrip("\r")
        log.say("short")
    assert stream.getvalue() == "\r" + bar + "\r" + " " * len(bar) + "\rshort\n"


def test_the_bar_is_redrawn_rarely(monkeypatch):
    monkeypatch.setattr("nlpfast.train.log.SECONDS_BETWEEN_REDRAWS", 1000.0)
    stream = Terminal()
    with RunLog(None, stream=stream) as log:
        log._last_drawing = float("-inf")
        for step in range(50):
            log.progress(step, 50, 1.0)
    assert stream.getvalue().count("loss") == 1


def test_nothing_is_said_without_a_stream():
    with RunLog(None, stream=None) as log:
        log.progress(1, 2, 1.0)
        log.record(RECORD, 2)
        log.say("x")


def test_json_lines_are_replaced_or_continued_after_the_bytes_that_count(tmp_path):
    lengths = []
    for step in (1, 2, 3):
        with RunLog(tmp_path, stream=None, length=lengths[0] if lengths else 0) as log:
            log.record({**RECORD, "step": step}, 10)
            # each record is on disk at once
            assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == step
            lengths.append(log.sync())
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 3], "the second record came after the checkpoint from which the third run went on"
    assert lengths[1] == lengths[2] == (tmp_path / "log.jsonl").stat().st_size
    with RunLog(tmp_path, stream=None) as log:
        log.record(RECORD, 10)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_what_is_not_a_number_is_recorded_as_such(tmp_path):
    meter = Meter()
    meter.add(1.0, 5, 1.0)
    meter.add(math.nan, 5, math.nan)
    meter.add(1.0, 5, 1.0)
    with RunLog(tmp_path, stream=None) as log:
        log.record({"step": 3, **meter.record(0.1, 1.0)}, None)
    assert math.isnan(json.loads((tmp_path / "log.jsonl").read_text())["loss"])


def test_tensorboard_gets_the_scalars(tmp_path):
    with RunLog(tmp_path, tensorboard=True, stream=None) as log:
        log.record({**RECORD, "val_loss": 2.0}, 10)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "val_loss"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(5, 2.0)]


def test_tensorboard_that_cannot_be_had_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="output folder"):
        RunLog(None, tensorboard=True, stream=None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install nlpfast\[log\]"):
        RunLog(tmp_path, tensorboard=True, stream=None)
    assert list(tmp_path.iterdir()) == []


def test_the_meter_weights_by_tokens_and_keeps_the_latest():
    meter = Meter()
    meter.add(1.0, 1, 5.0)
    meter.add(4.0, 3, 6.0)
    record = meter.record(0.1, 2.0)
    assert record["loss"] == (1.0 + 12.0) / 4
    assert record["grad_norm"] == 6.0
    meter.restart()
    assert meter.record(0.1, 2.0)["loss"] == 4.0
    meter.add(1.0, 1, float("inf"))
    assert meter.record(0.1, 2.0)["grad_norm"] is None
