"""The benchmark of a Transformer's training step and beam search, at a small size."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_translation as bench
from benchmarks import eager_training, process_memory
from benchmarks.measure import Settings
from nlpfast.data.translation_batches import make_batch
from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.nn import LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing
from nlpfast.train.translation_options import TranslationOptions

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
    search = bench._Search.step

    def misjudged(self: bench._Search) -> list:
        best = search(self)
        if type(self.model) is Transformer:
            best = [[hypotheses[0]._replace(score=hypotheses[0].score + 0.01)] for hypotheses in best]
        return best

    monkeypatch.setattr(bench._Search, "step", misjudged)
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
    taken = process_memory.megabytes_of(lambda: torch.ones(200 * 2**18).sum())
    # what the process had is used again
    assert 190 < taken < 210
    assert bench.memory(bench.CASES[4], bench.OURS) is None
    assert bench.memory(bench.CASES[2], bench.UNSUPERVISED) is None


def test_nothing_is_lacking() -> None:
    assert [bench.unavailable(name) for name in (bench.OURS, *bench.PEERS)] == [None] * 4


def test_the_eager_loss_of_a_packed_batch_is_ours() -> None:
    special = {"pad_id": 3, "bos_id": 1, "eos_id": 2}
    config = TransformerConfig(
        source_vocab=30, target_vocab=30, d_model=32, d_ff=32, heads=2, dropout=0, **special
    )
    model = Transformer(config).double()
    batch = make_batch([[4, 5, 6], [7], [8, 9]], [[10, 11], [12, 13, 14, 15], [16]], **special)
    packings = Packing(batch.source_cu, batch.source_longest), Packing(batch.target_cu, batch.target_longest)
    criterion = LabelSmoothedCrossEntropyWithAlignment(0.1)
    found = model(batch.source, batch.target_in, *packings, criterion=criterion, target_out=batch.target_out)
    eager = eager_training.padded_loss(model, batch, 0.1)
    torch.testing.assert_close(eager, found.loss / found.sample_size, atol=1e-12, rtol=1e-12)


def test_eager_training_prints_a_line_an_epoch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"pairs": 100, "d_model": 32, "d_ff": 32, "heads": 2, "vocab_size": 200, "eval_sentences": 5}
    monkeypatch.setattr(eager_training, "TranslationOptions", partial(TranslationOptions, **small))
    argv = ["--epochs", "3", "--stop-after", "2", "--max-tokens", "400", "--output-dir", str(tmp_path)]
    eager_training.main(argv)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["1", "2"]
    for name, at in (("nlpfast", 2), ("eager", 7)):
        assert all(line[at] == name and line[at + 2 : at + 4] == ["s", "BLEU"] for line in lines)
        assert 0 < float(lines[0][at + 1]) < float(lines[1][at + 1])
    ratio = float(lines[1][8]) / float(lines[1][3])
    assert lines[1][12] == "ratio" and abs(float(lines[1][13]) - ratio) < 0.3 * ratio


def test_eager_training_and_ours_are_one_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without dropout the two models stay the same, but for rounding."""
    small = {"pairs": 100, "d_model": 32, "d_ff": 32, "heads": 2, "vocab_size": 200, "dropout": 0.0}
    monkeypatch.setattr(eager_training, "TranslationOptions", partial(TranslationOptions, **small))
    models: list[Transformer] = []
    monkeypatch.setattr(eager_training, "_bleu", lambda model, data, dtype: models.append(model) or 0.0)
    argv = ["--epochs", "2", "--dtype", "float32", "--max-tokens", "400", "--output-dir", str(tmp_path)]
    eager_training.main(argv)
    ours, eager = models[-2].state_dict(), models[-1].state_dict()
    assert models[-2] is not models[-1]
    for name, weight in ours.items():
        # the softmax takes no notice of a key's bias: its gradient is rounding alone, which Adam makes large
        whole = torch.ones(len(weight), dtype=torch.bool)
        if name.endswith(("in_proj.bias", "key_value_proj.bias")):
            whole.view(-1, 32)[-2] = False
        torch.testing.assert_close(weight[whole], eager[name][whole], rtol=1e-3, atol=1e-4, msg=name)
