"""The benchmark of residual sum, dropout and layer norm, at small sizes; on a GPU that is none."""

import json

import pytest
import torch
from test_benchmarks import FakeGpu

from benchmarks import bench_add_layer_norm as bench
from benchmarks import measure, report
from benchmarks.measure import Settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_implementations_have_small_errors(dtype: torch.dtype) -> None:
    names = [bench.OURS, bench.EAGER, bench.COPY]
    case = bench.Case((9, 24), dtype)
    found = bench.errors(case, names, Settings())
    assert set(found) == set(names)
    for name, errors in found.items():
        assert (max(errors.values()) == 0) == (name == bench.COPY)
        assert max(errors.values()) < (0.1 if dtype == torch.bfloat16 else 1e-4)
        step = bench.passes(case, name, Settings(), 1)[0]
        assert len(step.step()) == (1 if name == bench.COPY else 4)


def test_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CUDA_SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    monkeypatch.setattr(bench, "CUDA_PEERS", (bench.EAGER, bench.COPY))
    cases = (bench.Case((9, 24), torch.bfloat16), bench.Case((17, 8)))
    monkeypatch.setattr(bench, "CUDA_CASES", cases)
    result = measure.run(bench, Settings(), gpu=FakeGpu())
    assert [(row["name"], row["peer"]) for row in result["rows"]] == [
        (case.name, peer) for case in cases for peer in (bench.EAGER, bench.COPY)
    ]
    forward, backward = bench.traffic(cases[0])
    assert (forward, backward) == (9 * 24 * 12 + 72, 9 * 24 * 16 + 72)
    assert result["rows"][0]["forward_gbytes"] == round(forward / 1e-3 / 1e9, 1)
    assert json.loads(json.dumps(result)) == result
    assert "(9,24) bfloat16" in report.section("add_layer_norm", result)
