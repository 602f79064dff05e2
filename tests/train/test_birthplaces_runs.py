"""Pretraining, finetuning and evaluation: what is written, what is learned, going on, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nlpfast.data import birthplaces as data
from nlpfast.data.birthplaces_files import Questions, invented, read_documents
from nlpfast.data.lines import DataError
from nlpfast.models.parameter_file import read_parameters, write_parameters
from nlpfast.nn.packing import Packing
from nlpfast.train import birthplaces, birthplaces_answers
from nlpfast.train.birthplaces import packed_loss, prefix_loss, train
from nlpfast.train.birthplaces_answers import build_model, evaluate, predict, score
from nlpfast.train.birthplaces_demo import demo
from nlpfast.train.birthplaces_options import SIZES, BirthplacesOptions
from nlpfast.train.config import ConfigError
from nlpfast.train.schedule import learning_rate_multiplier

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    """A folder with files of invented people, seven documents, and models that are trained in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "full", TINY)
    monkeypatch.setitem(SIZES, "small", {**TINY, "n_embd": 8})
    corpus, training, asked = invented(8)
    # the third wording of the first has the question mark
    files = {"wiki.txt": [*corpus[::4][:6], corpus[2]], "train.tsv": training, "dev.tsv": asked[:2]}
    for name, lines in files.items():
        Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def options(**fields):
    return BirthplacesOptions(**{"writing_params_path": "out.params", "max_steps": 3, **fields})


def pretrain(variant="vanilla", **fields):
    return train("pretrain", variant, "wiki.txt", options(**fields), quiet=True)


def finetune(variant="vanilla", **fields):
    given = options(finetune_corpus_path="train.tsv", **fields)
    return train("finetune", variant, "wiki.txt", given, quiet=True)


def evaluated(variant="vanilla", **fields):
    files = {"reading_params_path": "out.params", "eval_corpus_path": "dev.tsv", "outputs_path": "found"}
    return evaluate(variant, "wiki.txt", BirthplacesOptions(**{**files, **fields}))


def parameters(path="out.params"):
    return read_parameters(path)[0]


@pytest.mark.parametrize("variant", ["vanilla", "perceiver"])
def test_the_whole_way(variant):
    pretrain(variant, writing_params_path="pre.params", bottleneck_dim=9)
    state, facts = read_parameters("pre.params")
    assert facts["variant"] == variant and facts["vocabulary"] == read_documents("wiki.txt")[1].chars
    assert ("down_block.C" in state) == (variant == "perceiver")
    finetune(variant, reading_params_path="pre.params", bottleneck_dim=9)
    changed = [name for name, tensor in parameters().items() if not torch.equal(tensor, state[name])]
    assert len(changed) == len(state)
    found = evaluated(variant, bottleneck_dim=9)
    lines = Path("found").read_text(encoding="utf-8").split("\n")
    assert found.total == 2 == len(lines) - 1 and lines[-1] == ""
    # log and nothing else: what the run was for is in its file
    folders = list(Path("expt").glob("*/*"))
    assert len(folders) == 2
    for folder in folders:
        assert [path.name for path in folder.iterdir()] == ["log.jsonl"]


def test_a_residual_is_of_the_parameters():
    pretrain("perceiver", writing_params_path="with.params", residual=True)
    assert read_parameters("with.params")[1]["residual"] is True
    _, vocabulary, _ = read_documents("wiki.txt")
    assert build_model(options(residual=True), "perceiver", vocabulary).up_block.residual
    assert not build_model(options(), "perceiver", vocabulary).up_block.residual
    with pytest.raises(DataError, match=r"with.params: was trained with it; give --residual"):
        finetune("perceiver", reading_params_path="with.params")
    finetune("perceiver", reading_params_path="with.params", residual=True)
    evaluated("perceiver", residual=True)
    pretrain("perceiver", writing_params_path="without.params")
    with pytest.raises(DataError, match="without it; leave out --residual"):
        finetune("perceiver", reading_params_path="without.params", residual=True)
    # the assignment's have none, and its files tell nothing
    torch.save(read_parameters("without.params")[0], "assignment.params")
    finetune("perceiver", reading_params_path="assignment.params")


def test_answers_that_are_known_by_heart_are_right(monkeypatch):
    """The training questions, after many steps on them: data, loss, decoding and scoring fit together."""
    monkeypatch.setitem(SIZES, "full", {**TINY, "n_embd": 64})
    finetune(max_steps=200, max_epochs=200, finetune_lr=5e-3)
    found = evaluated(eval_corpus_path="train.tsv")
    assert (found.total, found.correct) == (4, 4)
    rows = Path("train.tsv").read_text(encoding="utf-8").splitlines()
    assert Path("found").read_text(encoding="utf-8").splitlines() == [row.split("\t")[1] for row in rows]


def test_prefixes_are_learned_and_used(monkeypatch):
    monkeypatch.setitem(SIZES, "full", {**TINY, "n_embd": 64})
    finetune(max_steps=200, max_epochs=200, finetune_lr=5e-3, prefix_lm=True)
    assert evaluated(eval_corpus_path="train.tsv", prefix_lm=True).correct == 4
    seen = []
    real = birthplaces_answers.generate

    def watched(*arguments, **given):
        seen.append(given["prefix"])
        return real(*arguments, **given)

    monkeypatch.setattr(birthplaces_answers, "generate", watched)
    evaluated(prefix_lm=True)
    evaluated()
    assert seen == [True, False]


@pytest.mark.parametrize("variant", ["vanilla", "perceiver"])
def test_a_packed_batch_has_the_loss_of_the_assignments(variant):
    documents, vocabulary, _ = read_documents("wiki.txt")
    items = [data.CharCorruptionDataset(documents, vocabulary, 128)[i] for i in range(len(documents))]
    torch.manual_seed(0)
    model = build_model(options(bottleneck_dim=9), variant, vocabulary).double().eval()
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    logits = model(x)[0]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=0)
    batch = data.packed(items)
    assert birthplaces.count_characters(batch) == int((y != 0).sum())
    assert packed_loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-12)
    assert isinstance(Packing(*batch[2:]), Packing)


def test_a_batch_with_prefixes_has_the_loss_of_what_is_written():
    documents, vocabulary, _ = read_documents("wiki.txt")
    dataset = data.CharCorruptionDataset(documents, vocabulary, 128, prefix=True)
    items = [dataset[i] for i in range(len(documents))]
    torch.manual_seed(0)
    model = build_model(options(), "vanilla", vocabulary).double().eval()
    x, y, prefixes = (torch.stack(column) for column in zip(*items, strict=True))
    logits = model(x, prefix_lengths=prefixes)[0]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=0)
    assert prefix_loss(model, data.padded(items)).item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_assignments_schedule_counts_padding_and_decays_all_but_biases(monkeypatch):
    seen = []
    real = birthplaces.Trainer.run

    def watched(trainer):
        result = real(trainer)
        seen.append(trainer)
        return result

    monkeypatch.setattr(birthplaces.Trainer, "run", watched)
    pretrain("perceiver", compat="seed", max_steps=2, bottleneck_dim=9)
    pretrain("perceiver", max_steps=2, bottleneck_dim=9)
    seeded, ours = seen
    # seven documents of the corpus, all of them in each step
    assert seeded.state.tokens == 2 * 7 * 127 and ours.state.tokens < seeded.state.tokens
    multiplier = learning_rate_multiplier(2 * 7 * 127, 512 * 20, 200 * 7 * 128, "mingpt")
    assert seeded.optimizer.param_groups[0]["lr"] == pytest.approx(6e-3 * multiplier)
    for trainer, all_weights in ((seeded, True), (ours, False)):
        decayed = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
        groups = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert len(groups) == len(list(trainer.model.parameters()))
        for name, p in trainer.model.named_parameters():
            linear = name.endswith("weight") and p.dim() == 2 and "emb" not in name
            assert (id(p) in decayed) == (not name.endswith("bias") if all_weights else linear), name


def test_spans_and_dropout_reach_data_and_model(monkeypatch):
    seen = []
    real = birthplaces.Trainer.run

    def watched(trainer):
        seen.append(trainer)
        return real(trainer)

    monkeypatch.setattr(birthplaces.Trainer, "run", watched)
    pretrain(spans="names", dropout=0.25, max_steps=1)
    pretrain(max_steps=1)
    for trainer, dropout in zip(seen, (0.25, 0.1), strict=True):
        config = trainer.model.config
        assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (dropout,) * 3
    named, plain = (trainer.feed.dataset for trainer in seen)
    differs = 0
    for epoch in range(20):
        named.epoch = plain.epoch = epoch
        differs += sum(not torch.equal(named[i][0], plain[i][0]) for i in range(len(named)))
    assert differs > 10


def test_the_assignment_reads_names_without_accents_and_keeps_empty_documents(monkeypatch):
    seen = []
    real = birthplaces.Trainer.__init__

    def watched(trainer, model, dataset, *rest, **given):
        seen.append(dataset)
        real(trainer, model, dataset, *rest, **given)

    monkeypatch.setattr(birthplaces.Trainer, "__init__", watched)
    Path("wiki.txt").write_text("Émil Bell?\tWhere was born\n\nAda\n", encoding="utf-8")
    Path("train.tsv").write_text("Where was Émil born?\tBell\n", encoding="utf-8")
    for compat, documents, name in ((None, 2, "Émil"), ("seed", 3, "mil")):
        pretrain(compat=compat, max_steps=1)
        assert len(seen[-1]) == documents
        finetune(compat=compat, max_steps=1)
        assert seen[-1].vocabulary.decode(seen[-1][0][0]).startswith(f"Where was {name} born?⁇Bell⁇")


class Killed(Exception):  # noqa: N818
    """In the place of kill -9."""


def test_going_on_gives_the_bits_of_a_run_that_never_stopped(monkeypatch):
    pretrain(max_steps=9, save_every=2, writing_params_path="whole.params")
    real = birthplaces.Trainer._after_step

    def dies(trainer, **given):
        real(trainer, **given)
        if trainer.state.step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(birthplaces.Trainer, "_after_step", dies)
        pretrain(max_steps=9, save_every=2)
    assert not Path("out.params").exists()
    with pytest.raises(ConfigError, match="go on with --resume or begin anew with --overwrite"):
        pretrain(max_steps=9, save_every=2)
    pretrain(max_steps=9, save_every=2, resume=True)
    whole = parameters("whole.params")
    for name, tensor in parameters().items():
        assert torch.equal(tensor, whole[name]), name
    assert not list(Path("expt").glob("*/*/last*"))
    (log,) = Path("expt").glob("*/*/log.jsonl")
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 9


def test_a_stopped_run_keeps_to_its_files_and_can_be_begun_anew(monkeypatch):
    def dies(*arguments):
        raise Killed

    def stop():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(birthplaces, "write_parameters", dies)
            pretrain()

    stop()
    corpus = Path("wiki.txt").read_bytes()
    Path("wiki.txt").write_bytes(corpus + b"Another document\n")
    with pytest.raises(DataError, match="the run had another files"):
        pretrain(resume=True)
    Path("wiki.txt").write_bytes(corpus)
    with pytest.raises(DataError, match="the run had another model"):
        pretrain(resume=True, prefix_lm=True)
    pretrain(overwrite=True, max_steps=1)
    assert Path("out.params").exists()
    # the run was at its end, so there is nothing left to do but to write
    stop()
    Path("out.params").unlink()
    pretrain(resume=True)
    assert Path("out.params").exists()


def test_parameters_of_something_else_are_told_apart():
    pretrain("perceiver", bottleneck_dim=9)
    cases = [
        ("vanilla", {}, "has the parameters of the perceiver variant; name that"),
        ("perceiver", {"bottleneck_dim": 8}, "has 9 latents, not 8; give --bottleneck_dim 9"),
        ("perceiver", {"bottleneck_dim": 9, "config": "small"}, "give its --config"),
    ]
    for variant, given, message in cases:
        with pytest.raises(DataError, match=message):
            evaluated(variant, **given)
    pretrain()
    with pytest.raises(DataError, match="has the parameters of the vanilla variant"):
        evaluated("perceiver")
    state = parameters()
    for name in ("blocks.1.ln1.weight", "surplus"):
        broken = {**state, "surplus": torch.zeros(1)} if name == "surplus" else {**state}
        if name != "surplus":
            del broken[name]
        write_parameters("broken", broken, {})
        with pytest.raises(DataError, match=f"broken: .*{name}; give the --config"):
            evaluated(reading_params_path="broken")
    Path("wiki.txt").write_text(Path("wiki.txt").read_text() + "Ω\n", encoding="utf-8")
    with pytest.raises(DataError, match="is of a corpus with other characters"):
        evaluated()
    write_parameters("factless", state, {})
    with pytest.raises(DataError, match=r"tok_emb.weight|head.weight.*name its corpus"):
        evaluated(reading_params_path="factless")
    assert not Path("found").exists()


def test_state_dicts_of_the_assignment_are_read():
    pretrain("perceiver", bottleneck_dim=9)
    state = parameters()
    masks = {f"{name}.attn.mask": torch.ones(1, 1, 9, 9) for name in ("down_block", "up_block")}
    torch.save({**state, **masks}, "pickled")
    evaluated("perceiver", bottleneck_dim=9)
    expected = Path("found").read_text()
    evaluated("perceiver", bottleneck_dim=9, reading_params_path="pickled")
    assert Path("found").read_text() == expected


def test_questions_without_answers_are_answered_alone():
    pretrain()
    rows = Path("dev.tsv").read_text(encoding="utf-8").splitlines()
    Path("dev.tsv").write_text("".join(row.split("\t")[0] + "\n" for row in rows), encoding="utf-8")
    assert evaluated() == birthplaces_answers.Score(2, None)
    assert len(Path("found").read_text(encoding="utf-8").splitlines()) == 2


def test_scores_compare_whole_answers():
    asked = Questions(["a", "b", "c"], ["Rome", "Bern", "New York"])
    assert score(asked, ["Rome", "Bern ", "New"]) == birthplaces_answers.Score(3, 1)
    assert score(dataclasses.replace(asked, answers=None), ["", "", ""]).correct is None


def test_a_prediction_is_what_comes_before_the_mark_and_one_line(monkeypatch):
    _, vocabulary, _ = read_documents("wiki.txt")
    model = build_model(options(), "vanilla", vocabulary)
    written = {"Where was born?": "ra\ne⁇rest", "Where?": "⁇", "was?": "a" * 40}

    def write(model, idx, room, *, lengths, **given):
        out = torch.zeros(len(idx), idx.shape[1] + room, dtype=torch.int64)
        for row, (question, text) in enumerate(written.items()):
            assert vocabulary.decode(idx[row, : lengths[row]]) == question + "⁇"
            out[row, lengths[row] : lengths[row] + room] = vocabulary.encode(text.ljust(40)[:room])
        return out

    monkeypatch.setattr(birthplaces_answers, "generate", write)
    assert predict(model, vocabulary, list(written)) == ["ra e", "", "a" * 32]


def test_many_questions_are_answered_in_parts(monkeypatch):
    _, vocabulary, _ = read_documents("wiki.txt")
    torch.manual_seed(0)
    model = build_model(options(), "vanilla", vocabulary).eval()
    questions = [f"Where was {'A' * n} born?" for n in range(1, 8)]
    together = predict(model, vocabulary, questions)
    monkeypatch.setattr(birthplaces_answers, "TOGETHER", 3)
    assert predict(model, vocabulary, questions) == together
    assert [predict(model, vocabulary, [question])[0] for question in questions] == together


@pytest.mark.parametrize(
    ("action", "variant", "given", "error", "message"),
    [
        ("pretrain", "vanilla", {"writing_params_path": None}, ConfigError, "pretrain needs it"),
        ("pretrain", "vanilla", {"writing_params_path": "no/file"}, ConfigError, "no folder no"),
        ("pretrain", "vanilla", {"writing_params_path": "."}, ConfigError, "name a file"),
        ("pretrain", "perceiver", {"prefix_lm": True}, ConfigError, "name vanilla or leave it out"),
        ("pretrain", "vanilla", {"residual": True}, ConfigError, "name perceiver or leave it out"),
        ("finetune", "vanilla", {}, ConfigError, "finetune needs it"),
        ("finetune", "vanilla", {"finetune_corpus_path": "wiki.txt"}, DataError, "wiki.txt:1: has 0 answers"),
        ("finetune", "vanilla", {"finetune_corpus_path": "nowhere"}, DataError, "nowhere"),
        ("pretrain", "vanilla", {"reading_params_path": "nowhere"}, DataError, "nowhere: cannot be read"),
        ("pretrain", "vanilla", {"resume": True}, ConfigError, "no run was stopped in expt/pretrain/run_"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(action, variant, given, error, message):
    before = sorted(path.name for path in Path().iterdir())
    with pytest.raises(error, match=message):
        train(action, variant, "wiki.txt", options(**given), quiet=True)
    assert sorted(path.name for path in Path().iterdir()) == before


def test_the_demo_tells_the_story(capsys):
    steps = {"pretrain": 2, "finetune": 1, "scratch": 4}
    lines = list(demo("out", people=10, steps=steps, quiet=True))
    assert len(lines) == 6 and capsys.readouterr().err == ""
    assert lines[0].startswith("5 questions about people of whom the corpus tells")
    assert [line.split("  ")[0] for line in lines[2:]] == [
        *(
            f"{variant}, {how}"
            for variant in ("vanilla", "perceiver")
            for how in ("not pretrained", "pretrained")
        )
    ]
    assert "4 steps, " in lines[2] and "3 steps, " in lines[3]
    # once more over what is there
    assert len(list(demo("out", people=10, steps=steps, quiet=True))) == 6
    assert not list(Path("out").rglob("last"))
