"""What calls of operations take: the figures, and where they go."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import overhead, report, sections


def test_figures_are_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on with each call tells how long it takes; the first round does not count."""
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 1.0 if calls[0] <= overhead.CALLS else 4e-6

    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    waited: list[None] = []
    (forward, other) = overhead.measured(
        {"x, forward": call, "x, backward": lambda: None}, lambda: waited.append(None)
    )
    assert forward["us"] == {"min": pytest.approx(4.0, rel=1e-3), "median": pytest.approx(4.0, rel=1e-3)}
    assert (forward["goal"], other["goal"]) == (overhead.GOAL, None)
    assert calls == [(overhead.ROUNDS + 1) * overhead.CALLS] and len(waited) == 2 * (overhead.ROUNDS + 1)


def test_rows_are_added_to_the_results_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"machine": {"gpu": "a", "cpu": "b", "cores": "1"}, "versions": {}, "native": {}}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**facts, "ops": {}, "convergence": {"date": "then", "rows": []}}))
    monkeypatch.setattr(sections, "machine_facts", lambda device: facts)
    monkeypatch.setattr(overhead, "operations", lambda device: {"x, forward": list})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    overhead.main([str(tmp_path)])
    data = json.loads(path.read_text())
    assert data["convergence"]["date"] == "then" and len(data["overhead"]["rows"]) == 1
    data["overhead"]["rows"] = [
        {"name": "x, forward", "us": {"min": 3.0, "median": 6.25}, "goal": 6.0},
        {"name": "y, forward", "us": {"min": 3.0, "median": 6.0}, "goal": 6.0},
        {"name": "PyTorch: x", "us": {"min": 3.0, "median": 6.0}, "goal": None},
    ]
    path.write_text(json.dumps(data))
    page = report.page([path], {})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["x, forward", "3.0 / 6.2", "<= 6 MISSED"] in cells
    assert ["y, forward", "3.0 / 6.0", "<= 6 met"] in cells and ["PyTorch: x", "3.0 / 6.0", "-"] in cells
