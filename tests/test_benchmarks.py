"""The bench harness: fair rounds, honest verdicts, and no time for a wrong result."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nlpfast
from nlpfast.cli.bench import benchmark_module

attention = benchmark_module("bench_attention")
gpu = benchmark_module("gpu")
varlen = benchmark_module("bench_varlen_attention")
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
    ratios = {"ratio_of_minima": 2.0, "ratio_of_medians": 2.1}
    return {
        "name": "case",
        "threads": 1,
        "goal": 2.0,
        "peer": "sdpa",
        "goal_peer": "sdpa",
        **ratios,
        **changes,
    }


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
    missed = f"- Missed: {result['rows'][0]['name']}, 1 thread(s), sdpa: 1.50 / 2.50 instead of >= 2: "
    assert f"{missed}not explained yet\n" in text
    why = {"a": {"attention": [["no such", "wrong"], ["float32.*, sdpa", "slow"], ["", "wrong"]]}, "b": {}}
    (tmp_path / "reasons.json").write_text(json.dumps(why), encoding="utf-8")
    # the folder is that of the results
    (tmp_path / "results").mkdir()
    (tmp_path / "a.json").rename(tmp_path / "results" / "a.json")
    assert report.main([str(tmp_path / "results"), str(tmp_path / "R.md")]) == 0
    assert f"{missed}slow\n" in (tmp_path / "R.md").read_text(encoding="utf-8")


def test_missed_memory() -> None:
    row = a_row(memory_mb={"ours": 70.0, "peer": 100.0}, memory_goal=0.6, memory_peer="sdpa", goal=None)
    [line] = report.misses({"rows": [row]}, [("", "large")])
    assert line.endswith("sdpa: 70% instead of memory <= 60%: large")


def test_convergence_in_the_page() -> None:
    row = {
        "name": "lm",
        "against": "definition",
        "dtype": "float32",
        "dropout": False,
        "seeds": 5,
        "steps": 50,
    }
    figures = {"difference": 2e-5, "of_band": 0.0123, "losses": [4.25, 2.5], "goal": 1e-5}
    other = {"difference": None, "of_band": None, "goal": None, "dropout": True, "by": "eager"}
    rows = [{**row, **figures}, {**row, **figures, "difference": 1e-6}, {**row, **figures, **other}]
    text = report.convergence({"date": "today", "rows": rows}, [("b", "no"), ("l.", "small")])
    assert text.endswith("\n\n- Missed: lm: small")
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "lm" in line[:5]
    ]
    assert [line[1] for line in cells] == ["nlpfast", "nlpfast", "eager"]
    assert [line[4:] for line in cells] == [
        ["no", "5", "50", "4.25 to 2.5", "2.0e-05, <= 1e-05 MISSED", "1.23%"],
        ["no", "5", "50", "4.25 to 2.5", "1.0e-06, <= 1e-05 met", "1.23%"],
        ["yes", "5", "50", "4.25 to 2.5", "-", "-"],
    ]


def test_page_needs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path), str(tmp_path / "R.md")]) == 2
    assert "make bench" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "arguments"), [("report", ["results"]), ("predict_attention", [])])
def test_a_page_that_cannot_be_written_leaves_the_old_one(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module(name)
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/a.json").write_text("{}")
    Path("page.md").write_text("old")
    monkeypatch.setattr(module, "page", lambda *files: "new")

    def full(*_: object) -> None:
        raise OSError("disk full")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"page\.md: cannot be written \(disk full"),
    ):
        patch.setattr(os, "replace", full)
        module.main([*arguments, "page.md"])
    assert Path("page.md").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    assert module.main([*arguments, "page.md"]) == 0
    assert Path("page.md").read_text() == "new"


class FakeGpu:
    """A GPU that computes on the CPU, and notes what it is asked for."""

    def __init__(self, l2_bytes: int = 0, refusal: str | None = None) -> None:
        self.l2_bytes, self.refusal = l2_bytes, refusal
        self.log: list[str] = []

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def warm_up(self, step: Callable[[], object]) -> int:
        self.log.append("warm up")
        step()
        return 2_000_000

    def capture(self, works: Sequence[Callable[[], object]]) -> list[Callable[[], None]]:
        for work in works:
            self.log.append("capture")
            work()
        if self.refusal is not None:
            raise RuntimeError(self.refusal)
        parts = ("forward", "backward")[: len(works)]
        return [lambda part=part: self.log.append(f"replay {part}") for part in parts]

    def seconds_of(self, work: Callable[[], object]) -> float:
        work()
        return 0.006

    def seconds(self, works: Sequence[Callable[[], object]]) -> list[float]:
        for work in works:
            work()
        return [0.004, 0.008]


class Calls:
    """A function of one tensor that notes where it was called."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.places.append(x.data_ptr())
        return x * 2


def some_passes(calls: Calls, copies: int) -> list[Any]:
    return [gpu.Pass(calls, (torch.ones(3, requires_grad=True),), torch.ones(3)) for _ in range(copies)]


@pytest.mark.parametrize(
    ("nbytes", "copies"), [(0, 1001), (1, 1001), (100, 11), (249, 5), (300, 4), (5000, 4)]
)
def test_copies_exceed_the_cache(nbytes: int, copies: int) -> None:
    assert gpu.copies_of(nbytes, FakeGpu(1000)) == copies


def test_graphs_go_over_all_copies() -> None:
    fake, calls = FakeGpu(), Calls()
    timer = gpu.Timer(some_passes(calls, 4), fake)
    assert fake.log == ["warm up"] * 4 + ["capture"] * 2
    places = calls.places[:4]
    assert len(set(places)) == 4
    assert calls.places == places * 2
    # each copy has results of its own
    assert len({x.data_ptr() for x in (*timer.outs, *(grads[0] for grads in timer.grads))}) == 8
    assert (timer.memory, timer.refusal) == (2_000_000, None)
    fake.log.clear()
    calls.places.clear()
    for _ in range(5):
        times = timer.times()
        assert (times.forward, times.backward, times.step) == (0.001, 0.002, 0.003)
        assert times.latency > 0
    assert fake.log == ["replay forward", "replay backward", "synchronize", "synchronize"] * 5
    assert calls.places == [*places, places[0]], "the latency takes turns with the copies"


def test_what_cannot_be_captured_is_launched() -> None:
    calls = Calls()
    timer = gpu.Timer(some_passes(calls, 4), FakeGpu(refusal="operation not permitted\nwhen capturing"))
    assert timer.refusal == "operation not permitted"
    assert timer.outs == timer.grads == []
    calls.places.clear()
    assert timer.times().step == 0.003
    assert len(calls.places) == 5
    assert [grads[0].tolist() for grads in timer.grads] == [[2.0] * 3] * 4


class Training:
    """A step that notes that it was taken."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def step(self) -> None:
        self.log.append("step")


def test_steps_are_replayed_and_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu()
    timer = gpu.StepTimer([Training(fake.log)], fake)
    assert fake.log == ["warm up", "step", "capture", "step"]
    assert (timer.memory, timer.refusal) == (2_000_000, None)
    fake.log.clear()
    clock = iter((1.0, 1.5))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    assert timer.times() == gpu.StepTimes(0.006, 0.5 / gpu.STEPS_IN_A_ROW)
    launched = ["step"] * gpu.STEPS_IN_A_ROW
    assert fake.log == ["replay forward", "synchronize", *launched, "synchronize"]


def test_a_step_that_cannot_be_captured_is_launched() -> None:
    fake = FakeGpu(refusal="operation not permitted\nwhen capturing")
    timer = gpu.StepTimer([Training(fake.log)], fake)
    assert timer.refusal == "operation not permitted"
    fake.log.clear()
    assert timer.times().step == 0.006
    assert fake.log[0] == "step"


def test_reasons_are_lines() -> None:
    def fail() -> None:
        try:
            raise ValueError("\n  the cause\nand more")
        except ValueError:
            raise RuntimeError("what followed " + "x" * 500) from None

    with pytest.warns(UserWarning) as said, pytest.raises(RuntimeError) as caught:
        import warnings

        warnings.warn("flash wants 16 bits\n (Triggered internally)", stacklevel=1)
        fail()
    reason = gpu._reason(caught.value, said.list)
    assert reason.startswith("what followed ...; the cause; flash wants 16 bits")
    assert gpu._reason(AssertionError()) == "AssertionError"


@pytest.fixture
def short_gpu(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CUDA_SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    case = dataclasses.replace(TINY, goal=0.5, backward_goal=2.0)
    dropped = dataclasses.replace(case, dropout=0.25, fill=0.8, dtype=torch.bfloat16, quick=False)
    monkeypatch.setattr(attention, "CUDA_CASES", (case, dropped))
    peers = ("sdpa flash", "sdpa math", "sdpa efficient", "eager", "flex")
    monkeypatch.setattr(attention, "CUDA_PEERS", peers)


@pytest.mark.usefixtures("short_gpu")
def test_run_on_a_gpu() -> None:
    lines: list[str] = []
    result = measure.run(attention, measure.Settings(threads=(1, 2)), lines.append, FakeGpu())
    first, second = (case.name for case in attention.CUDA_CASES)
    assert [(row["name"], row["peer"]) for row in result["rows"] if row["peer"] != "sdpa flash"] == [
        (name, peer) for name in (first, second) for peer in ("sdpa math", "eager")
    ]
    for row in result["rows"]:
        assert row["ours_ms"] == row["peer_ms"] == {"min": 3.0, "median": 3.0}
        assert row["forward_ms"] == {who: {"min": 1.0, "median": 1.0} for who in ("ours", "peer")}
        assert row["backward_ms"]["ours"] == {"min": 2.0, "median": 2.0}
        assert row["latency_ms"]["ours"]["min"] > 0
        assert row["ratio_of_minima"] == row["backward_ratio_of_medians"] == 1.0
        assert row["goal_peer"] == row["backward_peer"] == "sdpa math"
        assert row["captured"] == {"ours": True, "peer": True}
        assert row["memory_mb"] == {"ours": 2.0, "peer": 2.0}
        assert row["copies"] == gpu.MIN_COPIES
        assert row["rounds"] == measure.MIN_ROUNDS
    forward, backward = attention.traffic(attention.CUDA_CASES[0])
    assert result["rows"][0]["forward_gbytes"] == round(forward / 1e-3 / 1e9, 1)
    assert result["rows"][0]["backward_copy_share"] == round(backward / 2e-3 / 1e10, 3)
    left_out = dict(note.split(" was left out: ") for note in result["notes"])
    assert left_out[f"{first}: sdpa flash"] == "it computes in bfloat16 and float16"
    assert left_out[f"{second}: sdpa flash"] == "it takes no mask"
    assert left_out[f"{second}: flex"] == "it has no dropout"
    assert left_out[f"{first}: sdpa efficient"].startswith("No viable backend")
    assert json.loads(json.dumps(result)) == result


@pytest.mark.usefixtures("short_gpu")
def test_quick_run_on_a_gpu_has_the_first_peers() -> None:
    result = measure.run(attention, measure.Settings(quick=True), gpu=FakeGpu())
    assert {row["peer"] for row in result["rows"]} == {"sdpa math"}
    assert {row["name"] for row in result["rows"]} == {attention.CUDA_CASES[0].name}


@pytest.mark.usefixtures("short_gpu")
def test_timing_without_graphs_is_noted(tmp_path: Path) -> None:
    result = measure.run(attention, measure.Settings(quick=True), gpu=FakeGpu(refusal="not permitted"))
    assert result["rows"][0]["captured"] == {"ours": False, "peer": False}
    name = attention.CUDA_CASES[0].name
    for who in ("nlpfast", "sdpa math"):
        assert f"{name}: {who} was timed without a CUDA graph: not permitted" in result["notes"]
    text = report.section("attention", result)
    assert "3000.0* / 3000.0*" in text
    assert ">= 0.5 met, backward >= 2 MISSED" in text
    assert all(note in text for note in result["notes"])
    machine = {**measure.machine_facts()["machine"], "gpu": "NVIDIA H200"}
    assert report.slug(machine) == "nvidia-h200"
    data = {**measure.machine_facts(), "machine": machine, "ops": {"attention": result}}
    (tmp_path / "a.json").write_text(json.dumps(data), encoding="utf-8")
    assert "# NVIDIA H200 (a.json)" in report.page([tmp_path / "a.json"], {})
    assert "![" not in report.page([tmp_path / "a.json"], {})
    (tmp_path / "a-speed.png").touch()
    assert report.page([tmp_path / "a.json"], {}).count("\n![a-speed](results/a-speed.png)\n") == 1


@pytest.mark.usefixtures("short_gpu")
def test_a_peer_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._eager
    monkeypatch.setattr(attention, "_eager", lambda *given: lambda *inputs: right(*given)(*inputs) * 2)
    result = measure.run(attention, SETTINGS, gpu=FakeGpu())
    assert "eager" not in {row["peer"] for row in result["rows"]}
    assert any("eager was left out: it computes something else: out has error" in x for x in result["notes"])


@pytest.mark.usefixtures("short_gpu")
def test_ours_must_be_right_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.attention
    monkeypatch.setattr(nlpfast, "attention", lambda *inputs, **options: wrong(right(*inputs, **options)))
    with pytest.raises(RuntimeError, match=r"out has error .*fix the kernel"):
        measure.run(attention, SETTINGS, gpu=FakeGpu())


@pytest.mark.usefixtures("short_gpu")
def test_a_case_too_large_for_the_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "errors", exhausted)
    result = measure.run(attention, SETTINGS, gpu=FakeGpu())
    assert result["rows"] == []
    names = [case.name for case in attention.CUDA_CASES]
    assert result["notes"] == [f"{name}: nlpfast was left out: CUDA out of memory" for name in names]


def test_packed_run_on_a_gpu(short_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "CUDA_CASES", (varlen.Case((4, 2, 9, 4), goal=1.3, quick=True),))
    monkeypatch.setattr(varlen, "CUDA_PEERS", ("varlen_attn", "sdpa math", "nlpfast.attention"))
    result = measure.run(varlen, measure.Settings(quick=True), gpu=FakeGpu())
    assert [row["peer"] for row in result["rows"]] == ["sdpa math", "nlpfast.attention"]
    assert report.verdict(result["rows"][0]) == ">= 1.3 MISSED"
    assert "varlen_attn was left out: it computes in bfloat16 and float16" in result["notes"][0]


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"fill": 0.8}, {"causal": True, "fill": 0.8}])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_are_right(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = dataclasses.replace(TINY, **changes)
    inputs, _ = attention._inputs(case, "cpu")
    inputs = tuple(x.detach() for x in inputs)
    expected = attention._function(case, "eager", SETTINGS, 0.0)(*inputs)
    assert (attention._flex(case, "cpu")(*inputs) - expected).abs().max() < 1e-6


def test_traffic() -> None:
    # (2, 2, 5, 7, 4) in float32: 320 bytes of queries, 448 of keys, 20 rows
    assert attention.traffic(TINY) == (2 * 320 + 2 * 448 + 4 * 20, 3 * 320 + 4 * 448)
    # top left: five of the seven keys are seen
    causal = dataclasses.replace(TINY, causal=True)
    assert attention.traffic(causal) == (4 * 320 + 4 * 20, 3 * 320 + 2 * 320 + 2 * 448)
    # 0.8 full: lengths 4 and 7
    padded = dataclasses.replace(TINY, fill=0.8)
    assert attention.traffic(padded) == (2 * 320 + 2 * 352 + 4 * 20, 3 * 320 + 2 * 352 + 2 * 448)
    # lengths 3 and 5
    packed = varlen.Case((2, 3, 5, 4), fill=0.8)
    assert varlen.traffic(packed) == (4 * 8 * 3 * 16 + 4 * 8 * 3, 7 * 8 * 3 * 16)


def test_goals_of_a_gpu_are_those_that_were_promised() -> None:
    found = {
        (*c.shape, c.dropout > 0, c.fill < 1): (c.causal, c.goal, c.backward_goal)
        for c in attention.CUDA_CASES
        if c.dtype == torch.bfloat16 and not c.transposed
    }
    promised = {
        (256, 8, 128, 128, 32): (True, 1.6, 1.8, 1.6),
        (256, 12, 128, 128, 64): (False, 1.6, 1.8, 1.6),
        (128, 12, 256, 256, 64): (True, 1.6, 1.8, 1.6),
        (64, 12, 512, 512, 64): (False, 1.0, 1.0, 1.6),
        (64, 12, 1024, 1024, 64): (True, 1.0, 1.0, 1.6),
        (64, 8, 64, 1024, 64): (True, None, 2.0, None),
        (64, 8, 1024, 64, 64): (False, None, 1.6, None),
        (128, 8, 64, 64, 64): (False, 1.6, 1.8, 1.6),
    }
    expected: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for shape, (causal, plain, backward, dropped) in promised.items():
        expected[(*shape, False, False)] = (causal, plain, backward)
        expected[(*shape, True, False)] = (causal, dropped, None)
    expected[256, 12, 128, 128, 64, False, True] = (False, 1.3, None)
    assert found == expected
    assert torch.float16 in {case.dtype for case in attention.CUDA_CASES}
    assert varlen.CUDA_CASES[0].goal == 1.3
    names = [case.name for case in attention.CUDA_CASES]
    assert len(set(names)) == len(names)


@pytest.fixture
def cuda_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what `Gpu` uses of torch.cuda by functions that note their calls."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.place = len(log)
            log.append("record")

        def elapsed_time(self, end: "Event") -> float:
            return float(end.place - self.place)

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def capture(graph: Graph, *, pool: str, stream: str) -> Iterator[None]:
        assert (pool, stream) == ("pool", "side stream")
        log.append("capture")
        yield
        log.append("captured")

    @contextmanager
    def on_stream(stream: str) -> Iterator[None]:
        log.append(stream)
        yield
        log.append("main stream")

    replaced = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=60_000_000),
        "Stream": lambda device: "side stream",
        "stream": on_stream,
        "graph": capture,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: "pool",
        "Event": Event,
        "synchronize": lambda device: log.append("synchronize"),
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350,
        "reset_peak_memory_stats": lambda device: log.append("reset"),
    }
    for name, substitute in replaced.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, substitute)
    return log


def test_gpu_warms_up_and_captures_on_a_side_stream(cuda_log: list[str]) -> None:
    device = gpu.Gpu("cuda")
    assert device.l2_bytes == 60_000_000
    assert device.warm_up(lambda: cuda_log.append("step")) == 250
    inside = ["step"] * gpu.WARMUP_STEPS + ["synchronize", "reset", "step"]
    assert cuda_log == ["synchronize", "side stream", *inside, "main stream", "synchronize"]
    cuda_log.clear()
    replays = device.capture([lambda: cuda_log.append("forward"), lambda: cuda_log.append("backward")])
    graphs = ["capture", "forward", "captured", "capture", "backward", "captured"]
    assert cuda_log == ["synchronize", "side stream", *graphs, "main stream"]
    cuda_log.clear()
    # between the events lie one replay and one event
    assert device.seconds(replays) == [0.002, 0.002]
    timed = ["record", "replay", "record", "replay", "record"]
    assert cuda_log == ["replay", "replay", *timed, "synchronize"]
    assert device.seconds_of(replays[0]) == 0.002


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("short_gpu")
def test_run_on_a_real_gpu() -> None:
    result = measure.run(attention, measure.Settings(device="cuda"))
    assert {"eager", "sdpa math"} <= {row["peer"] for row in result["rows"]}
    assert all(row["captured"] == {"ours": True, "peer": True} for row in result["rows"]), result["notes"]
    assert all(row["forward_ms"]["ours"]["min"] > 0 for row in result["rows"])


def prediction() -> Any:
    pytest.importorskip("triton")
    return benchmark_module("predict_attention")


def test_forward_is_counted() -> None:
    """Five queries in tiles of two, seven keys in tiles of four, rows of four float32 numbers."""
    predict = prediction()
    walk = predict.Walk(2, 4, 16, 16, dropout=True, saves=True)
    count = predict._fwd_kernel(walk, predict.Entry(5, 7, 6))
    assert count == {
        # Q, and keys and values once; then twice more for the other tiles of queries
        "read": 5 * 16 + 2 * 6 * 16,
        "again": 2 * 2 * 6 * 16,
        "written": 5 * (16 + 4 + 8),
        # three tiles of queries times two of keys, two products of 2 x 4 x 16
        "products": 6 * 2 * 2 * 2 * 4 * 16,
        "exp": 6 * 8,
        "philox": 0,
        "kept": 2 * 6 * 16,
    }
    eight = dataclasses.replace(walk, M=8, saves=False)
    count = predict._fwd_kernel(eight, predict.Entry(5, 7, 6))
    assert (count["written"], count["again"], count["philox"]) == (5 * 20, 0, 2 * 4)


def test_causal_forward_is_counted() -> None:
    """Queries 0..1 see two keys, 2..3 four, 4 five: keys are read once, then what earlier tiles have read."""
    predict = prediction()
    count = predict._fwd_kernel(predict.Walk(2, 4, 16, 16, causal=True), predict.Entry(5, 7, 7))
    assert count["read"] == 5 * 16 + 2 * 5 * 16
    assert count["again"] == 2 * (2 + 4) * 16
    assert count["exp"] == (1 + 1 + 2) * 8


def test_backward_of_whole_rows_is_counted() -> None:
    """All keys in one tile: Q, K, V and dO in, dQ, dK and dV out, nothing twice."""
    predict = prediction()
    count = predict._bwd_kernel(predict.Walk(2, 8, 16, 16, whole=True), predict.Entry(5, 7, 6))
    assert count["read"] == 2 * 5 * 16 + 2 * 6 * 16
    assert count["again"] == 0
    assert count["written"] == 5 * 16 + 2 * 7 * 16
    assert count["products"] == 3 * 5 * 2 * 2 * 8 * 16
    assert count["exp"] == 3 * 16


def test_backward_of_several_tiles_is_counted() -> None:
    """Tiles of two queries and four keys, causal: the second tile of keys is visited by query 4 alone."""
    predict = prediction()
    count = predict._bwd_kernel(predict.Walk(2, 4, 16, 16, causal=True), predict.Entry(5, 7, 7))
    query = 3 * 16 + 8
    assert count["read"] == 5 * query + 2 * 5 * 16
    # query 4 again, and its sum, which the first tile of keys wrote
    assert count["again"] == query + 2 * 4 * 16
    assert count["written"] == 5 * 16 + 2 * 7 * 16
    assert count["exp"] == (3 + 1) * 8
    assert count["kept"] == 5 * (query + 4 * 16)


def test_tiled_backward_is_counted() -> None:
    predict = prediction()
    walk, entry = predict.Walk(2, 4, 16, 16, causal=True), predict.Entry(5, 7, 7)
    count = predict._bwd_dkdv_kernel(walk, entry)
    assert (count["read"], count["again"]) == (5 * 44 + 2 * 5 * 16, 44)
    assert (count["written"], count["products"]) == (2 * 7 * 16, 4 * 4 * 2 * 2 * 4 * 16)
    count = predict._bwd_dq_kernel(walk, entry)
    # query 4 sees two tiles of keys, with which its maximum and sum come again
    assert (count["read"], count["again"]) == (5 * (3 * 16 + 8) + 2 * 5 * 16, 2 * 6 * 16 + 8)
    assert (count["written"], count["products"]) == (5 * 20, 4 * 3 * 2 * 2 * 4 * 16)
    whole = predict._bwd_dq_kernel(dataclasses.replace(walk, N=8, whole=True), entry)
    assert whole["read"] == 5 * 2 * 16 + 2 * 5 * 16


COUNTED = """
import collections, json, torch
from triton.runtime import interpreter
import nlpfast
from nlpfast.cli.bench import benchmark_module
from nlpfast.ops.attention import triton_launch

# The interpreter takes a while for long rows: every kernel shall have short ones.
triton_launch.MAX_OWNED, triton_launch.MIN_OWNED_HEADS = 160, 2
attention, predict = benchmark_module("bench_attention"), benchmark_module("predict_attention")
builder, launch = interpreter.InterpreterBuilder, triton_launch.Launch.__call__
load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
found = collections.defaultdict(collections.Counter)

def size(ptrs, mask):
    return int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8

def watched_launch(launched, *pointers):
    global count
    count = found[launched.kernel.__name__]
    launch(launched, *pointers)

def watched_load(self, ptrs, mask, *rest):
    count["bytes"] += size(ptrs, mask)
    return load(self, ptrs, mask, *rest)

def watched_store(self, ptrs, value, mask, *rest):
    count["bytes"] += size(ptrs, mask)
    return store(self, ptrs, value, mask, *rest)

def watched_dot(self, a, b, *rest):
    count["products"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
    return dot(self, a, b, *rest)

builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
builder.create_dot, triton_launch.Launch.__call__ = watched_dot, watched_launch
for shape, causal, dropout, fill in CASES:
    case = attention.Case(tuple(shape), bool(causal), dropout, fill=fill)
    found.clear()
    inputs, grad_out = attention._inputs(case, "cpu")
    options = {"dropout_p": dropout, "key_lengths": attention.lengths_of(case, "cpu"), "backend": "triton"}
    out = nlpfast.attention(*inputs, is_causal=case.causal, **options)
    torch.autograd.grad(out, inputs, grad_out)
    watched = dict(found)
    predicted = predict.predict(case)
    rows = []
    for launched in (*predicted.forward, *predicted.backward):
        counted = launched.count(predicted.entries)
        moved = counted["read"] + counted["again"] + counted["written"]
        name = launched.launch.kernel.__name__
        seen = watched[name]
        rows.append([name, moved, seen["bytes"], counted["products"], seen["products"]])
    print(json.dumps(rows))
"""


@pytest.mark.slow
def test_counts_are_those_of_the_kernels() -> None:
    """In Triton's interpreter every load, store and product is seen."""
    pytest.importorskip("triton")
    cases = (
        ((1, 2, 100, 120, 32), 1, 0.1, 1.0),
        ((2, 1, 70, 100, 64), 0, 0.0, 0.75),
        ((1, 2, 70, 150, 32), 1, 0.0, 1.0),
        ((1, 1, 40, 170, 32), 1, 0.0, 1.0),
        ((2, 1, 170, 70, 32), 0, 0.1, 0.75),
        ((1, 1, 170, 180, 32), 1, 0.0, 1.0),
    )
    found = subprocess.run(
        [sys.executable, "-c", COUNTED.replace("CASES", repr(cases))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    kernels = set()
    for line in found.stdout.splitlines():
        for kernel, moved, seen_bytes, products, seen_products in json.loads(line):
            kernels.add(kernel)
            # the seed and the lengths are not counted
            assert moved <= seen_bytes <= 1.005 * moved, line
            assert products == seen_products, line
    assert kernels == set(benchmark_module("predict_attention").KERNELS)


def test_every_launch_on_a_gpu_is_predicted() -> None:
    predict = prediction()
    for case in (*attention.CUDA_CASES, *varlen.CUDA_CASES):
        found = predict.predict(case)
        assert [each.launch.kernel.__name__ for each in found.forward] == ["_fwd_kernel"]
        kernels = {each.launch.kernel.__name__ for each in found.backward}
        assert kernels in ({"_bwd_kernel"}, {"_bwd_dq_kernel", "_bwd_dkdv_kernel"})
        bench = attention if isinstance(case, attention.Case) else varlen
        floor, (forward, backward) = predict.floor_of(found), bench.traffic(case)
        for launches, nbytes, least in (
            (found.forward, forward, floor.forward),
            (found.backward, backward, floor.backward),
        ):
            counts = [each.count(found.entries) for each in launches]
            assert sum(count["read"] + count["written"] for count in counts) >= nbytes
            assert found.seconds(launches) >= least
        assert all(each.launch.programs > 0 for each in (*found.forward, *found.backward))


def test_the_kernel_of_whole_rows_moves_what_it_must() -> None:
    """14 bytes a number, and nothing twice: what the single backward kernel is for."""
    predict = prediction()
    found = predict.predict(attention.Case((3, 2, 64, 64, 32), dtype=torch.bfloat16))
    (launched,) = found.backward
    count = launched.count(found.entries)
    assert launched.launch.kernel.__name__ == "_bwd_kernel"
    assert count["read"] + count["written"] == 14 * 3 * 2 * 64 * 32
    assert count["again"] == 0


@pytest.mark.parametrize(
    ("shape", "causal", "forward", "backward", "three_kernels"),
    [
        ((256, 8, 128, 128, 32), True, 16, 27, 66),
        ((256, 12, 128, 128, 64), False, 47, 82, 199),
        ((64, 12, 512, 512, 64), False, 65, 163, 199),
        ((64, 12, 1024, 1024, 64), True, 131, 327, 398),
        ((64, 8, 1024, 64, 64), False, 34, 51, 207),
        ((128, 8, 64, 64, 64), False, 8, 14, 33),
    ],
)
def test_floors(
    shape: tuple[int, ...], causal: bool, forward: int, backward: int, three_kernels: int
) -> None:
    predict = prediction()
    found = predict.floor_of(predict.predict(attention.Case(shape, causal, dtype=torch.bfloat16)))
    expected = pytest.approx([forward, backward, three_kernels], abs=1)
    assert [seconds * 1e6 for seconds in (found.forward, found.backward, found.three_kernels)] == expected
    assert found.zeros == 0


def test_gradients_of_unseen_keys_are_zeros() -> None:
    predict = prediction()
    case = attention.Case((64, 8, 64, 1024, 64), True, dtype=torch.bfloat16)
    floor = predict.floor_of(predict.predict(case))
    assert floor.zeros == pytest.approx(4 * 64 * 8 * 960 * 64 / 4.3e12)
    assert floor.backward == pytest.approx(14 * 64 * 8 * 64 * 64 / 4.3e12)
    assert floor.backward + floor.zeros == pytest.approx(attention.traffic(case)[1] / 4.3e12)


def test_what_the_cache_cannot_hold_comes_from_memory() -> None:
    predict = prediction()
    (launched,) = predict.predict(attention.Case((1, 1, 64, 64, 64), dtype=torch.bfloat16)).forward
    count = predict.Count(read=43, again=4300, written=0, kept=60e6)
    terms = launched.terms(count)
    assert terms["memory"] == pytest.approx(43 / 4.3e12)
    assert terms["L2"] == pytest.approx(4343 / 5.5e12)
    count["kept"] = 61e6
    assert launched.terms(count)["memory"] == pytest.approx(4343 / 4.3e12)


def test_predictions_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = prediction()
    assert predict.main([]) == 0
    text = capsys.readouterr().out
    for case in attention.CUDA_CASES:
        assert text.count(f"| {case.name} ") >= 3
    assert predict.main([str(tmp_path / "P.md")]) == 0
    assert (tmp_path / "P.md").read_text(encoding="utf-8") == text
