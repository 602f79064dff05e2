"""The benchmark of cross entropy of a projection, at small sizes."""

import pytest
import torch
from test_benchmarks import FakeGpu

import nlpfast
from benchmarks import bench_linear_cross_entropy as bench
from benchmarks import measure, report
from benchmarks.measure import Settings

NAMES = [bench.OURS, bench.EAGER, bench.CHUNKED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("smoothing", "counted"), [(0.1, 1.0), (0.0, 0.5)])
def test_implementations_have_small_errors(dtype: torch.dtype, smoothing: float, counted: float) -> None:
    case = bench.Case((20, 50, 8), dtype, smoothing, counted)
    found = bench.errors(case, NAMES, Settings())
    assert list(found) == [bench.EAGER, bench.OURS, bench.CHUNKED]
    for name, errors in found.items():
        assert errors.keys() == {"loss", "d_input", "d_weight"}
        assert 0 < max(errors.values()) < (0.05 if dtype == torch.bfloat16 else 1e-5)
        (work,) = bench.passes(case, name, Settings(), 1)
        assert [x.shape for x in work.step()] == [(20, 8), (50, 8)]


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.linear_cross_entropy
    monkeypatch.setattr(nlpfast, "linear_cross_entropy", lambda *a, **k: 1.01 * right(*a, **k))
    with pytest.raises(RuntimeError, match=r"\(9,50,4\) float32: .* has error .* fix the kernel"):
        bench.errors(bench.Case((9, 50, 4)), [bench.OURS], Settings())


def test_ignored_targets_are_the_share_that_is_named() -> None:
    case = bench.Case((40, 50, 4), counted=0.15)
    assert case.name == "(40,50,4) float32 15%"
    *_, target = bench._inputs(case, "cpu")
    assert (target != bench.IGNORED).sum() == 6
    assert bench.flops(case) == 6 * 6 * 50 * 4


def test_goals_are_those_that_were_promised() -> None:
    goals = {case.name: (case.best_goal, case.memory_goal) for case in bench.CASES if case.best_goal}
    assert goals == {"(4096,32000,512) float32": (1.3, 0.1), "(4096,32000,512) bfloat16": (3.0, 0.1)}
    assert {case.memory_goal for case in bench.CUDA_CASES if case.dtype == torch.bfloat16} == {0.35}


def test_traffic() -> None:
    # rows [10, 4] and weight [50, 4] in and out; logits [10, 50] four times; gradients in and out
    assert bench.traffic(bench.Case((10, 50, 4))) == ((2 * 240 + 4 * 500) * 4, 2 * 240 * 4)


def test_memory_is_that_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, their logarithms and gradients take three times their size at least; ours a chunk."""
    case = bench.CASES[0]
    size = case.shape[0] * case.shape[1] * 4 / 2**20
    monkeypatch.setattr(bench, "CASES", (case,))
    peer, ours = (bench.memory(case, name) for name in (bench.EAGER, bench.OURS))
    assert peer is not None and ours is not None
    assert 2.5 * size < peer < 4 * size and 32 < ours < 0.1 * peer
    assert bench.memory(case, bench.CHUNKED) is None
    assert bench.memory(bench.Case((9, 50, 4)), bench.OURS) is None


@pytest.mark.parametrize(("ours", "word"), [(9.0, "met"), (11.0, "MISSED")])
def test_goals_in_the_table(monkeypatch: pytest.MonkeyPatch, ours: float, word: str) -> None:
    monkeypatch.setattr(measure, "SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    monkeypatch.setattr(bench, "PEERS", (bench.EAGER, bench.CHUNKED))
    monkeypatch.setattr(bench, "CASES", (bench.Case((9, 50, 4), best_goal=1e9, memory_goal=0.1),))
    used = {bench.OURS: ours, bench.EAGER: 100.0, bench.CHUNKED: None}
    monkeypatch.setattr(bench, "memory", lambda case, name: used[name])
    result = measure.run(bench, Settings(threads=(1,)))
    verdicts = {row["peer"]: report.verdict(row) for row in result["rows"]}
    (best,) = {row["best_peer"] for row in result["rows"]}
    assert f"memory <= 10% {word}" in verdicts[bench.EAGER]
    assert "best >= 1e+09 MISSED" in verdicts[best]
    assert f"| 100 / {ours:.0f} " in report.table(result)


def test_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CUDA_SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    monkeypatch.setattr(bench, "CUDA_PEERS", (bench.EAGER, bench.CHUNKED))
    cases = (bench.Case((9, 50, 4), memory_goal=1.0), bench.Case((9, 50, 4), smoothing=0.0))
    monkeypatch.setattr(bench, "CUDA_CASES", cases)
    result = measure.run(bench, Settings(), gpu=FakeGpu())
    assert [row["peer"] for row in result["rows"]] == [bench.EAGER, bench.EAGER, bench.CHUNKED]
    assert len(result["notes"]) == 1 and "it does not take smoothed labels in chunks" in result["notes"][0]
    assert "memory <= 100% met" in report.verdict(result["rows"][0])
