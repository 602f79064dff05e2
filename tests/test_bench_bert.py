"""The benchmark of BERT's training step, at a small size."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_bert as bench
from benchmarks.measure import Settings


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"C": 64, "LAYERS": 2, "V": 300, "LENGTHS": (5, 9, 30, 7)}.items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_every_case_is_right_and_trains(case: bench.Case) -> None:
    names = [bench.OURS, *bench.PEERS]
    errors = bench.errors(case, names, Settings())
    assert list(errors) == names
    for found in errors.values():
        half = case.dtype == torch.bfloat16
        assert (1e-4 if half else 0) < max(found.values()) < (0.1 if half else 1e-5)
    for name in names:
        (step,) = bench.passes(case, name, Settings(), 1)
        assert step.model.training
        before = [parameter.detach().clone() for parameter in step.model.parameters()]
        step.step()
        moved = [not torch.equal(x, y) for x, y in zip(before, step.model.parameters(), strict=True)]
        assert all(moved)


def test_all_start_from_the_same_weights_and_see_the_same_sentences() -> None:
    case = bench.CASES[0]
    ours, padded, theirs = (bench.Step(case, name, 0.0) for name in (bench.OURS, *bench.PEERS))
    assert torch.equal(padded.ids[padded.mask.bool()], ours.ids[: sum(bench.LENGTHS)])
    assert torch.equal(theirs.ids, padded.ids)
    losses = {float(step.backward()) for step in (ours, padded, theirs)}
    assert max(losses) - min(losses) < 1e-5


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    results = bench.Step.results

    def wrong(step: bench.Step) -> dict[str, dict[str, Tensor]]:
        found = results(step)
        if step.packed:
            next(iter(found["gradients"].values())).add_(1e-3)
        return found

    monkeypatch.setattr(bench.Step, "results", wrong)
    with pytest.raises(RuntimeError, match="step on 32 sentences, float32"):
        bench.errors(bench.CASES[0], [bench.OURS], Settings())


def test_operations_are_those_of_one_sentence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.CASES[0]
    total = 0.0
    for length in bench.LENGTHS:
        monkeypatch.setattr(bench, "LENGTHS", (length,))
        step = bench.Step(case, bench.TRANSFORMERS, 0.0)
        step.model.config._attn_implementation = "eager"
        with FlopCounterMode(display=False) as counter:
            step.backward()
        total += counter.get_total_flops()
    monkeypatch.undo()
    monkeypatch.setattr(bench, "C", 64)
    monkeypatch.setattr(bench, "LAYERS", 2)
    monkeypatch.setattr(bench, "LENGTHS", (5, 9, 30, 7))
    # the classifier, and the gradient of the embeddings' input, which nobody needs
    assert bench.flops(case) == pytest.approx(total, rel=0.03)


def test_it_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [bench.unavailable(name) for name in (bench.OURS, *bench.PEERS)] == [None] * 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'nlpfast[hf]'" in str(bench.unavailable(bench.TRANSFORMERS))


def test_cases_are_plain_data() -> None:
    case = dataclasses.replace(bench.CASES[1])
    found = bench.describe(case)
    assert (found["dtype"], found["goal"], found["goals"]) == ("bfloat16", 1.4, {"transformers": 2.0})
    assert (found["memory_goal"], found["memory_peer"]) == (0.6, "transformers")
    assert bench.chosen(case, Settings()) in ("cpu", "reference")


def test_memory_is_that_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def megabytes(step: Callable[[], None]) -> float:
        owner = step.__self__  # type: ignore[attr-defined]
        assert all(p.grad is None for p in owner.model.parameters())
        assert len(owner.optimizer.state) == len(list(owner.model.parameters()))
        asked.append("packed" if owner.packed else "theirs" if owner.theirs else "padded")
        return 3.5

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(bench, "megabytes_of", megabytes)
    for name in (bench.OURS, *bench.PEERS):
        bench.main("1", name)
    assert asked == ["packed", "padded", "theirs"]
    assert capsys.readouterr().out == "3.5\n" * 3
    monkeypatch.setattr(bench, "megabytes_in_a_process", lambda *words: words)
    assert bench.memory(bench.CASES[1], bench.OURS) == ("benchmarks.bench_bert", 1, "nlpfast")
