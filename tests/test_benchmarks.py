"""The bench harness: fair rounds, honest verdicts, and no time for a wrong result."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nlpfast
from nlpfast.cli.bench import benchmark_module

attention = benchmark_module("bench_attention")
measure = benchmark_module("measure")
report = benchmark_module("report")

TINY = attention.Case((2, 2, 5, 7, 4), goal=2.0, quick=True)
SETTINGS = measure.Settings()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARMUP_ROUNDS", 1)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 3)
    monkeypatch.setattr(measure, "SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    other = {"causal": True, "dropout": 0.25, "transposed": True, "goal": None, "quick": False}
    cases = (TINY, dataclasses.replace(TINY, **other))
    monkeypatch.setattr(attention, "CASES", cases)
    monkeypatch.setattr(attention, "PEERS", ("sdpa", "eager"))


def test_rounds_take_turns() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.interleave(steps, 0.0)
    rounds = measure.WARMUP_ROUNDS + measure.MIN_ROUNDS
    assert order == ["a", "b"] * rounds
    assert [len(times["a"]), len(times["b"])] == [measure.MIN_ROUNDS] * 2
    assert min(*times["a"], *times["b"]) >= 0


def test_machine_rates_are_plausible() -> None:
    rates = measure.machine_rates()
    assert 0.1 < rates["gemm_gflops"] < 1e6
    assert 0.1 < rates["gemm_16_gflops"] < 1e6
    assert 0.1 < rates["copy_gbytes"] < 1e5


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, 35),
        ({"causal": True}, 12.5),
        ({"shape": (2, 2, 7, 5, 4), "causal": True}, 22.5),
        ({"fill": 0.8}, 28),
    ],
)
def test_flops(changes: dict[str, Any], pairs: float) -> None:
    assert attention.flops(dataclasses.replace(TINY, **changes)) == pytest.approx(7 * 2 * 2 * 2 * pairs * 4)


def test_goals_are_those_that_were_promised() -> None:
    goals = {
        (*c.shape, c.causal, c.dropout > 0, c.fill < 1, c.dtype == torch.bfloat16): (c.goal, c.best_goal)
        for c in attention.CASES
        if c.goal is not None
    }
    table = {
        (32, 8, 128, 128, 32, True): (3, 6, 12, 3, 10),
        (32, 8, 64, 64, 64, False): (2, 3, 12, 2, 10),
        (2, 12, 512, 512, 64, False): (1.3, 3, 3, 3, 10),
        (1, 12, 1024, 1024, 64, True): (1.5, 5, 3, 3, 10),
    }
    promised: dict[tuple[Any, ...], tuple[float, float | None]] = {}
    for case, (plain, dropped, half, best, half_dropped) in table.items():
        promised[(*case, False, False, False)] = (plain, None)
        promised[(*case, True, False, False)] = (dropped, None)
        promised[(*case, False, False, True)] = (half, best)
        promised[(*case, True, False, True)] = (half_dropped, None)
    for dtype in (False, True):
        promised[8, 8, 64, 1024, 64, True, False, False, dtype] = (10, None)
        promised[8, 8, 1024, 64, 64, False, False, False, dtype] = (2, None)
        promised[32, 12, 128, 128, 64, False, False, True, dtype] = (1.3, None)
    assert goals == promised
    names = [case.name for case in attention.CASES]
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("short")
def test_run_measures_every_case_and_peer() -> None:
    before = torch.get_num_threads()
    lines: list[str] = []
    result = measure.run(attention, measure.Settings(threads=(1, 2)), lines.append)
    assert torch.get_num_threads() == before
    assert len(lines) == 4
    found = [(row["name"], row["threads"], row["peer"]) for row in result["rows"]]
    cases = [case.name for case in attention.CASES]
    assert found == [(name, count, peer) for count in (1, 2) for name in cases for peer in ("sdpa", "eager")]
    for row in result["rows"]:
        assert row["ours_ms"]["min"] <= row["ours_ms"]["median"]
        assert row["rounds"] == 3
        assert row["best_peer"] in ("sdpa", "eager")
        assert row["ratio_of_minima"] > 0
        assert set(row["ours_error"]) == {"out", "dq", "dk", "dv"}
        assert max(*row["ours_error"].values(), *row["peer_error"].values()) < 1e-5
    assert json.loads(json.dumps(result)) == result


@pytest.mark.usefixtures("short")
def test_quick_run_is_the_goals_against_the_first_peer() -> None:
    result = measure.run(attention, measure.Settings(quick=True, threads=(1,)))
    assert [(row["name"], row["peer"]) for row in result["rows"]] == [(TINY.name, "sdpa")]


def wrong(out: Tensor) -> Tensor:
    return out * 1.001


def poisoned(out: Tensor) -> Tensor:
    hole = torch.zeros_like(out)
    hole[0, 0, 0, 0] = math.nan
    return out + hole


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("spoil", [wrong, poisoned])
def test_wrong_results_are_not_timed(spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.attention
    monkeypatch.setattr(nlpfast, "attention", lambda *inputs, **options: spoil(right(*inputs, **options)))
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("a wrong result was timed"))
    with pytest.raises(RuntimeError, match=r"out has error .*fix the kernel"):
        measure.run(attention, measure.Settings(threads=(1,)))


@pytest.mark.parametrize("implementation", ["nlpfast", "sdpa", "eager"])
def test_implementations_have_small_errors(implementation: str) -> None:
    case = dataclasses.replace(TINY, causal=implementation == "eager", transposed=True, fill=0.8)
    errors = attention.errors(case, ["nlpfast", implementation], SETTINGS)
    assert max(errors[implementation].values()) < 1e-5


def test_ours_is_checked_in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = nlpfast.attention, []

    def watched(*inputs: Tensor, **options: Any) -> Tensor:
        seen.append(torch.empty(3).isnan().all().item())
        return right(*inputs, **options)

    monkeypatch.setattr(nlpfast, "attention", watched)
    attention.errors(TINY, ["nlpfast", "sdpa"], SETTINGS)
    assert seen == [True]


def test_missing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in attention.unavailable("compile")
    names, notes = measure._implementations(attention, SETTINGS)
    assert names == ["nlpfast", "sdpa", "eager"]
    assert len(notes) == 1


def a_row(**changes: Any) -> dict[str, Any]:
    row = {"goal": 2.0, "peer": "sdpa", "goal_peer": "sdpa", "ratio_of_minima": 2.0, "ratio_of_medians": 2.1}
    return {**row, **changes}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, ">= 2 met"),
        ({"ratio_of_minima": 1.999}, ">= 2 MISSED"),
        ({"ratio_of_medians": 1.999}, ">= 2 MISSED"),
        ({"goal": 1.2}, ">= 1.2 met"),
        ({"goal": None}, "-"),
        ({"peer": "eager", "ratio_of_minima": 0.1}, "-"),
        ({"best_peer": "sdpa", "best_goal": 2.05}, ">= 2 met, best >= 2.05 MISSED"),
        ({"best_peer": "eager", "best_goal": 3.0}, ">= 2 met"),
        ({"peer": "eager", "best_peer": "eager", "best_goal": 1.5}, "best >= 1.5 met"),
    ],
)
def test_verdict(changes: dict[str, Any], verdict: str) -> None:
    assert report.verdict(a_row(**changes)) == verdict


def test_slug() -> None:
    machine = {"cpu": "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz", "cores": "2"}
    assert report.slug(machine) == "intel-xeon-gold-6130-cpu-2-10ghz-2-cores"


@pytest.mark.usefixtures("short")
def test_page_is_made_from_results_alone(tmp_path: Path) -> None:
    result = measure.run(attention, measure.Settings(threads=(1,)))
    result["rows"][0].update(ratio_of_minima=1.5, ratio_of_medians=2.5)
    data = {**measure.machine_facts(), "ops": {"attention": result}}
    (tmp_path / "a.json").write_text(json.dumps(data), encoding="utf-8")
    assert report.main([str(tmp_path), str(tmp_path / "R.md")]) == 0
    text = (tmp_path / "R.md").read_text(encoding="utf-8")
    assert "1.50 / 2.50" in text
    assert ">= 2 MISSED" in text
    assert "Goals: 0 of 1 met." in text
    assert data["machine"]["cpu"] in text
    assert torch.__version__ in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 2


def test_page_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path), str(tmp_path / "R.md")]) == 2
    assert "make bench" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    report.write_atomically(file, "old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_atomically(file, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text(encoding="utf-8") == "old"
