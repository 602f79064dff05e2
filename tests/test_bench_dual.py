"""The benchmark of a step of dual learning, at a small size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_dual as bench
from benchmarks import bench_translation
from benchmarks.measure import Settings


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"V": 60, "C": 32, "H": 2, "D_FF": 64, "LAYERS": 2, "LENGTHS": ((4, 7), (5, 3), (6, 6))}
    for name, value in sizes.items():
        monkeypatch.setattr(bench_translation, name, value)
    monkeypatch.setattr(bench, "COMPARED", 3)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_every_case_is_right_and_runs(case: bench.Case) -> None:
    names = [bench.OURS, *bench.PEERS]
    found = bench.errors(case, names, Settings())
    assert list(found) == names
    for errors in found.values():
        assert max(errors.values()) < (0.1 if case.dtype == torch.bfloat16 else 1e-5)
    for name in names:
        (step,) = bench.passes(case, name, Settings(), 1)
        before = [parameter.detach().clone() for parameter in step.trained.parameters()]
        step.step()
        assert all(not torch.equal(x, y) for x, y in zip(before, step.trained.parameters(), strict=True))
        one = step.trained is step.model.source_to_target
        assert one == (name == bench.ONE)
    assert bench.describe(case)["name"] == case.name and bench.chosen(case, Settings()) in (
        "cpu",
        "reference",
    )


def test_two_steps_are_those_of_both_directions() -> None:
    two, one = (bench.Step(bench.CASES[0], name, 0.0).results() for name in (bench.TWO, bench.ONE))
    for name, grad in one["gradients"].items():
        assert torch.equal(two["gradients"][f"source_to_target.{name}"], grad)
    assert two["loss"]["loss"] > 1.5 * one["loss"]["loss"]
    assert sum(name.startswith("target_to_source.") for name in two["gradients"]) == len(one["gradients"])


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    results = bench.Step.results

    def wrong(step: bench.Step) -> dict[str, dict[str, Tensor]]:
        found = results(step)
        if step.implementation == bench.OURS:
            next(iter(found["gradients"].values())).add_(1e-2)
        return found

    monkeypatch.setattr(bench.Step, "results", wrong)
    with pytest.raises(RuntimeError, match="dual step float32: gradients"):
        bench.errors(bench.CASES[0], [bench.OURS], Settings())


def test_operations_are_those_of_eager_code_and_logits_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # of one length, so that nothing is padded
    monkeypatch.setattr(bench_translation, "LENGTHS", ((7, 7), (7, 7)))
    eager = bench.Step(bench.CASES[0], bench.EAGER, 0.0)
    with FlopCounterMode(display=False) as counter:
        eager.backward()
    with FlopCounterMode(display=False) as asked, torch.no_grad():
        for model in eager.language_models:
            model(eager.rows[0][:, :-1])
    # the first layer of a side has a product less for the gradient of nothing: none of the embeddings'
    assert bench.flops(bench.CASES[0]) == pytest.approx(
        counter.get_total_flops() - asked.get_total_flops() + 2.0 * 28 * 32 * 60, rel=0.1
    )


def test_memory_is_of_what_has_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.memory(bench.CASES[0], bench.TWO) is None
    asked: list[str] = []

    def megabytes(step: Callable[[], None]) -> float:
        step()
        owner = step.__self__  # type: ignore[attr-defined]
        asked.append(owner.implementation)
        return 3.5

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(bench, "megabytes_of", megabytes)
    for name in (bench.OURS, bench.EAGER, bench.ONE):
        bench.main("0", name)
    assert asked == [bench.OURS, bench.EAGER, bench.ONE]
    assert capsys.readouterr().out == "3.5\n" * 3
