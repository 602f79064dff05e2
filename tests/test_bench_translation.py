"""The benchmark of a Transformer's training step and beam search, at a small size."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_translation as bench
from benchmarks import process_memory
from benchmarks.measure import Settings

LENGTHS = ((4, 7), (5, 3), (6, 6))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"V": 60, "C": 32, "H": 2, "D_FF": 64, "LAYERS": 2, "LENGTHS": LENGTHS, "COMPARED": 3}
    for name, value in {**sizes, "SENTENCES": 3, "BEAM": 2, "LONGEST": 5}.items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_every_case_is_right_and_runs(case: bench.Case) -> None:
    names = [bench.OURS, *case.peers]
    errors = bench.errors(case, names, Settings())
    assert list(errors) == names
    half = case.dtype == torch.bfloat16
    for found in errors.values():
        assert max(found.values()) < (0.1 if half else 1e-5)
    for name in names:
        (step,) = bench.passes(case, name, Settings(), 1)
        if isinstance(case, bench.Translating):
            assert [len(best[0].tokens) for best in step.step()] == [5, 5, 5]
            continue
        assert step.model.training
        before = [parameter.detach().clone() for parameter in step.model.parameters()]
        step.step()
        moved = [not torch.equal(x, y) for x, y in zip(before, step.model.parameters(), strict=True)]
        assert all(moved)
    assert bench.describe(case)["name"] == case.name and bench.chosen(case, Settings()) in (
        "cpu",
        "reference",
    )


def test_all_start_from_the_same_weights_and_see_the_same_sentences() -> None:
    case = bench.Training(torch.float32, 1.0, aligned=True)
    ours, eager, plain = (
        bench.Step(case, name, 0.0) for name in (bench.OURS, bench.EAGER, bench.UNSUPERVISED)
    )
    assert (
        eager.target_out[eager.target_out != 0].tolist()
        == ours.batch.target_out[: sum(n for _, n in LENGTHS)].tolist()
    )
    losses = [float(step.backward()) for step in (ours, eager, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[2] < losses[0] - 0.01


def test_wrong_gradients_and_scores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    results = bench.Step.results

    def wrong(step: bench.Step) -> dict[str, dict[str, Tensor]]:
        found = results(step)
        if not step.eager:
            next(iter(found["gradients"].values())).add_(1e-3)
        return found

    monkeypatch.setattr(bench.Step, "results", wrong)
    with pytest.raises(RuntimeError, match="training step float32: gradients"):
        bench.errors(bench.CASES[0], [bench.OURS], Settings())
    scores = bench._Search.scores
    monkeypatch.setattr(
        bench._Search,
        "scores",
        lambda search: {
            "scores": scores(search)["scores"] + (type(search.model).__name__ == "Transformer") / 100
        },
    )
    with pytest.raises(RuntimeError, match="beam 2, float32: scores"):
        bench.errors(bench.CASES[4], [bench.OURS], Settings())


@pytest.mark.parametrize("length", LENGTHS)
def test_operations_of_a_step_are_those_of_its_sentences(
    length: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (length,))
    step = bench.Step(bench.CASES[0], bench.EAGER, 0.0)
    with FlopCounterMode(display=False) as counter:
        step.backward()
    total = counter.get_total_flops()
    # eager code computes the scores above the diagonal too
    above = 6 * 2 * bench.C * bench.LAYERS * (length[1] * (length[1] - 1) // 2)
    assert bench.flops(bench.CASES[0]) == pytest.approx(total - above, rel=1e-3)


def test_memory_is_that_of_a_step() -> None:
    assert process_memory.measured()
    taken = process_memory.megabytes_of(lambda: torch.ones(20 * 2**18).sum())
    assert 19 < taken < 23
    assert bench.memory(bench.CASES[4], bench.OURS) is None
    assert bench.memory(bench.CASES[2], bench.UNSUPERVISED) is None


def test_nothing_is_lacking() -> None:
    assert [bench.unavailable(name) for name in (bench.OURS, *bench.PEERS)] == [None] * 4
