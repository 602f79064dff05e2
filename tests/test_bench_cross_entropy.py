"""The benchmark of cross entropy, at small sizes."""

import json
import types

import pytest
import torch
from test_benchmarks import FakeGpu

import nlpfast
from benchmarks import bench_cross_entropy as bench
from benchmarks import measure, report
from benchmarks.measure import Settings
from nlpfast import dispatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_implementations_have_small_errors(dtype: torch.dtype, inplace: bool) -> None:
    case = bench.Case((9, 50), dtype, inplace)
    names = [bench.OURS, "F.cross_entropy", "fairseq", "copy"]
    for name, errors in bench.errors(case, names, Settings()).items():
        assert errors.keys() == {"loss", "gradient"}
        assert (max(errors.values()) == 0) == (name == "copy")
        assert max(errors.values()) < (0.05 if dtype == torch.bfloat16 else 1e-5)
        if name in names:
            bench.passes(case, name, Settings(), 1)[0].step()


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.cross_entropy
    monkeypatch.setattr(nlpfast, "cross_entropy", lambda *a, **k: 1.01 * right(*a, **k))
    with pytest.raises(RuntimeError, match=r"\(9,50\) float32: .* has error .* fix the kernel"):
        bench.errors(bench.Case((9, 50)), [bench.OURS], Settings())


def test_goals_are_those_that_were_promised() -> None:
    goals = {case.name: dict(case.goals) for case in bench.CASES if case.goals}
    assert {name: g["copy"] for name, g in goals.items()} == {
        "(2048,32000) float32": 0.9,
        "(2048,32000) bfloat16": 0.65,
        "(2048,50257) float32": 0.9,
        "(2048,50257) bfloat16": 0.65,
    }
    assert all((g["F.cross_entropy"], g["compile"]) == (10.0, 5.0) for g in goals.values())


def test_goals_of_a_gpu_are_those_that_were_promised() -> None:
    cases = {(*case.shape, case.dtype): dict(case.goals) for case in bench.CUDA_CASES}
    shapes = ((16384, 32000), (16384, 50257), (2048, 32000))
    assert cases == {
        (*shape, dtype): {"F.cross_entropy": 3.0, "compile": 1.5, "copy": 0.9}
        for shape in shapes
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert set(cases[16384, 32000, torch.float32]) <= set(bench.CUDA_PEERS[: bench.CUDA_QUICK_PEERS])
    assert {case.shape for case in bench.CUDA_CASES if case.quick} == set(shapes[:2])


def test_traffic() -> None:
    # 10 rows of 50 numbers, read and written; 8 + 4 + 4 + 1 + 8 bytes of a row, and its upstream gradient
    assert bench.traffic(bench.Case((10, 50))) == (2 * 2000 + 250, 40)
    assert bench.traffic(bench.Case((10, 50), torch.bfloat16)) == (2 * 1000 + 250, 40)


def test_one_copy_of_large_logits_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.Case((9, 50))
    assert len(bench.passes(case, "copy", Settings(), 4)) == 4
    monkeypatch.setattr(bench, "LARGE", 9 * 50 * 4)
    assert len(bench.passes(case, "copy", Settings(), 4)) == 1


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CUDA_SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    peers = ("F.cross_entropy", "copy", "fairseq")
    monkeypatch.setattr(bench, "CUDA_PEERS", peers)
    cases = tuple(bench.Case(shape, goals=bench.CUDA_GOALS) for shape in ((9, 50), (5, 70)))
    monkeypatch.setattr(bench, "CUDA_CASES", cases)


@pytest.mark.usefixtures("short")
def test_run_on_a_gpu() -> None:
    result = measure.run(bench, Settings(), gpu=FakeGpu())
    assert [(row["name"], row["peer"]) for row in result["rows"]] == [
        (case.name, peer) for case in bench.CUDA_CASES for peer in bench.CUDA_PEERS
    ]
    assert result["notes"] == []
    verdicts = [report.verdict(row) for row in result["rows"]]
    assert verdicts == [">= 3 MISSED", ">= 0.9 met", "-"] * 2
    forward, backward = bench.traffic(bench.CUDA_CASES[0])
    assert result["rows"][0]["forward_gbytes"] == round(forward / 1e-3 / 1e9, 1)
    assert result["rows"][0]["backward_gbytes"] == round(backward / 2e-3 / 1e9, 1)
    assert json.loads(json.dumps(result)) == result
    assert "(9,50) float32" in report.section("cross_entropy", result)


@pytest.mark.usefixtures("short")
def test_compiled_kernels_have_those_of_triton_as_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that they do not serve is left out."""
    definition = dispatch.registry["cross_entropy"]["reference"]
    compiled = types.ModuleType("nlpfast.ops.cross_entropy.cuda")
    compiled.forward, compiled.backward = definition.forward, definition.backward
    compiled.refusal = lambda input, target: None if input.shape[-1] == 50 else "no so many"
    monkeypatch.setitem(dispatch.registry["cross_entropy"], "cuda", compiled)
    monkeypatch.setitem(dispatch.registry["cross_entropy"], "triton", definition)
    result = measure.run(bench, Settings(backend="cuda", quick=False), gpu=FakeGpu())
    served = bench.CUDA_CASES[0].name
    assert [(row["name"], row["peer"]) for row in result["rows"]] == [
        (served, peer) for peer in ("triton", *bench.CUDA_PEERS)
    ]
    assert {row["backend"] for row in result["rows"]} == {"cuda"}
    (note,) = result["notes"]
    assert note.startswith(f"{bench.CUDA_CASES[1].name}: left out: ") and "no so many" in note


@pytest.mark.usefixtures("short")
def test_ours_must_be_right_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.cross_entropy
    monkeypatch.setattr(nlpfast, "cross_entropy", lambda *a, **k: 1.01 * right(*a, **k))
    with pytest.raises(RuntimeError, match=r"\(9,50\) float32: .* has error .* fix the kernel"):
        measure.run(bench, Settings(), gpu=FakeGpu())


@pytest.mark.usefixtures("short")
def test_a_peer_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench._fairseq
    monkeypatch.setattr(bench, "_fairseq", lambda x, target: 1.1 * right(x, target))
    result = measure.run(bench, Settings(), gpu=FakeGpu())
    assert {row["peer"] for row in result["rows"]} == {"F.cross_entropy", "copy"}
    assert all("fairseq was left out: it computes something else" in note for note in result["notes"])


def test_a_loss_in_16_bits_is_not_blamed_for_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where peers are held to the errors of ours; a wrong one still is."""
    monkeypatch.setattr(bench, "_inputs", lambda case, device, make=bench._inputs: make(case, "cpu"))
    case, names = bench.Case((64, 3000), torch.bfloat16), ["nlpfast", "F.cross_entropy", "fairseq"]
    elsewhere = bench.errors(case, names, Settings(device="cuda"))
    assert set(names) == elsewhere.keys()
    here = bench.errors(case, names, Settings())
    assert elsewhere["F.cross_entropy"]["loss"] < 1e-3 < here["F.cross_entropy"]["loss"]
    assert elsewhere["nlpfast"] == here["nlpfast"] and elsewhere["fairseq"] == here["fairseq"]
    right = bench._fairseq
    monkeypatch.setattr(bench, "_fairseq", lambda x, target: 1.1 * right(x, target))
    assert bench.errors(case, ["fairseq"], Settings(device="cuda"))["fairseq"]["loss"] > 0.5
