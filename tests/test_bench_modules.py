"""The benchmark of models before and after the switch, at small sizes."""

import pytest
import torch

from benchmarks import bench_modules
from benchmarks.measure import Settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"B": 2, "T": 9, "C": 16, "H": 2, "V": 20, "M": 4}.items():
        monkeypatch.setattr(bench_modules, name, size)


@pytest.mark.parametrize("case", bench_modules.CASES, ids=lambda case: case.name)
def test_every_case_is_switched_and_right(case: bench_modules.Case) -> None:
    errors = bench_modules.errors(case, ["after", "before"], Settings())
    assert errors.keys() == {"after", "before"}
    expected = {"out", "gradients"} if case.training else {"out"}
    for found in errors.values():
        assert found.keys() == expected
        assert 0 < max(found.values()) < (0.2 if case.dtype == torch.bfloat16 else 1e-4)
    assert bench_modules.flops(case) > 0
    (step,) = bench_modules.passes(case, "after", Settings(), 1)
    step.step()
    assert any(p.grad is not None for p in step.model.parameters()) == case.training


def test_a_wrong_switch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench_modules.Case("minGPT", False)
    results = bench_modules._Step.results

    def wrong(step: bench_modules._Step) -> dict[str, list[torch.Tensor]]:
        found = results(step)
        if "nlpfast" in type(step.model.layers[0].attn).__module__:
            found["out"][0] += 1.0
        return found

    monkeypatch.setattr(bench_modules._Step, "results", wrong)
    with pytest.raises(RuntimeError, match=r"minGPT inference float32: out has error .* fix the kernel"):
        bench_modules.errors(case, ["after", "before"], Settings())


def test_a_model_that_is_not_switched_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        bench_modules.MODELS, "nothing", lambda p: (torch.nn.Linear(2, 2), (torch.randn(1, 1, 2),), {})
    )
    with pytest.raises(RuntimeError, match="nothing inference float32: nlpfast: nothing to switch"):
        bench_modules.passes(bench_modules.Case("nothing", False), "after", Settings(), 1)


def test_every_model_is_there_in_both_uses() -> None:
    assert {case.model for case in bench_modules.CASES} == set(bench_modules.MODELS)
    assert all(
        {case.training for case in bench_modules.CASES if case.model == name} == {True, False}
        for name in bench_modules.MODELS
    )
