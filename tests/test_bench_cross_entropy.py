"""The benchmark of cross entropy, at small sizes."""

import pytest
import torch

import nlpfast
from benchmarks import bench_cross_entropy as bench
from benchmarks.measure import Settings


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
