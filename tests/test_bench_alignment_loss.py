"""The benchmark of alignment loss, at small sizes."""

import pytest
import torch
from test_benchmarks import FakeGpu

import nlpfast
from benchmarks import bench_alignment_loss as bench
from benchmarks import measure, report
from benchmarks.measure import Settings

NAMES = [bench.OURS, "eager", "attention"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [None, 1])
def test_implementations_have_small_errors(dtype: torch.dtype, heads: int | None) -> None:
    case = bench.Case((2, 3, 7, 9, 8), dtype, heads)
    found = bench.errors(case, NAMES, Settings())
    assert set(found) == set(NAMES)
    for name, errors in found.items():
        assert errors.keys() == {"total", "dq", "dk", "dv"}
        assert 0 < max(errors.values()) < (0.1 if dtype == torch.bfloat16 else 1e-5)
        (work,) = bench.passes(case, name, Settings(), 1)
        assert [x.shape for x in work.step()] == [(2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)]


def test_ours_is_attention_and_the_loss() -> None:
    case = bench.Case((2, 3, 7, 9, 8))
    steps = {name: bench.passes(case, name, Settings(), 1)[0].step() for name in NAMES}
    for ours, eager in zip(steps[bench.OURS], steps["eager"], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert (steps[bench.OURS][0] - steps["attention"][0]).abs().max() > 1e-3


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.alignment_loss
    monkeypatch.setattr(nlpfast, "alignment_loss", lambda *a, **k: 1.01 * right(*a, **k))
    with pytest.raises(RuntimeError, match=r"float32: .* has error .* fix the kernel"):
        bench.errors(bench.Case((2, 2, 5, 6, 4)), [bench.OURS], Settings())


def test_goals_are_those_that_were_promised() -> None:
    goals = {(case.shape[0], case.dtype): dict(case.goals) for case in bench.CASES if case.goals}
    for B in (32, 128):
        assert goals[B, torch.float32] == {"eager": 1.6, "attention": 1 / 1.25}
        assert goals[B, torch.bfloat16] == {"eager": 2.0, "attention": 1 / 1.25}
    assert {case.shape[1:] for case in bench.CASES} == {(8, 64, 64, 64)}


def test_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CUDA_SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    monkeypatch.setattr(bench, "CUDA_CASES", (bench.Case((1, 2, 5, 6, 4), goals=(("eager", 1e9),)),))
    result = measure.run(bench, Settings(), gpu=FakeGpu())
    assert [row["peer"] for row in result["rows"]] == ["eager", "attention"]
    assert report.verdict(result["rows"][0]) == ">= 1e+09 MISSED"
    # attention's products, inputs, outputs and gradients
    assert bench.traffic(bench.Case((1, 2, 5, 6, 4))) == (2 * 4 * (40 + 48), 4 * 4 * (40 + 48))
