"""The command lines of CS224N's assignment 5, with `nlpfast birthplaces` for `python src/run.py`."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from nlpfast.cli import main
from nlpfast.data.birthplaces_files import invented
from nlpfast.train import birthplaces, birthplaces_demo
from nlpfast.train.birthplaces_options import SIZES, trainer_config

ASSIGNMENT = """
birthplaces finetune vanilla wiki.txt --writing_params_path vanilla.model.params \
    --finetune_corpus_path birth_places_train.tsv
birthplaces evaluate vanilla wiki.txt --reading_params_path vanilla.model.params \
    --eval_corpus_path birth_dev.tsv --outputs_path vanilla.nopretrain.dev.predictions
birthplaces evaluate vanilla wiki.txt --reading_params_path vanilla.model.params \
    --eval_corpus_path birth_test_inputs.tsv --outputs_path vanilla.nopretrain.test.predictions
birthplaces pretrain vanilla wiki.txt --writing_params_path vanilla.pretrain.params
birthplaces finetune vanilla wiki.txt --reading_params_path vanilla.pretrain.params \
    --writing_params_path vanilla.finetune.params --finetune_corpus_path birth_places_train.tsv
birthplaces evaluate vanilla wiki.txt --reading_params_path vanilla.finetune.params \
    --eval_corpus_path birth_dev.tsv --outputs_path vanilla.pretrain.dev.predictions
birthplaces pretrain perceiver wiki.txt --bottleneck_dim 64 --pretrain_lr 6e-3 \
    --writing_params_path perceiver.pretrain.params
birthplaces finetune perceiver wiki.txt --bottleneck_dim 64 --reading_params_path perceiver.pretrain.params \
    --writing_params_path perceiver.finetune.params --finetune_corpus_path birth_places_train.tsv
birthplaces evaluate perceiver wiki.txt --bottleneck_dim 64 --reading_params_path perceiver.finetune.params \
    --eval_corpus_path birth_dev.tsv --outputs_path perceiver.pretrain.dev.predictions
birthplaces evaluate perceiver wiki.txt --bottleneck_dim 64 --reading_params_path perceiver.finetune.params \
    --eval_corpus_path birth_test_inputs.tsv --outputs_path perceiver.pretrain.test.predictions
"""


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    """A folder with the assignment's files, of invented people, and models that are trained in no time."""
    monkeypatch.chdir(tmp_path)
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, {"n_layer": 3, "n_head": 1, "n_embd": 4})
    corpus, training, asked = invented(4)
    unanswered = [row.split("\t")[0] for row in asked]
    files = {"wiki.txt": corpus, "birth_places_train.tsv": training, "birth_dev.tsv": asked}
    for name, lines in {**files, "birth_test_inputs.tsv": unanswered}.items():
        Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_the_command_lines_of_the_assignment(capsys, monkeypatch):
    epochs = []

    def shortened(*arguments):
        config = trainer_config(*arguments)
        epochs.append(config.max_epochs)
        return dataclasses.replace(config, max_epochs=2)

    monkeypatch.setattr(birthplaces, "trainer_config", shortened)
    for line in ASSIGNMENT.replace("\\\n", "").strip().splitlines():
        assert main(shlex.split(line)) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        words = shlex.split(line)
        if "evaluate" not in words:
            assert out == "" and Path(words[words.index("--writing_params_path") + 1]).is_file()
            continue
        outputs = words[words.index("--outputs_path") + 1]
        assert len(Path(outputs).read_text(encoding="utf-8").splitlines()) == 2
        if "birth_dev.tsv" in words:
            assert re.fullmatch(r"Correct: [0-2] out of 2: (0\.0|50\.0|100\.0)%\n", out)
        else:
            assert out == f"Predictions written to {outputs}; no targets provided\n"
    assert epochs == [75, 650, 10, 650, 10]


def test_options_in_both_spellings(capsys):
    for options in ("--writing_params_path a --max_steps 1", "--writing-params-path b --max-steps 1"):
        assert main(shlex.split(f"birthplaces pretrain vanilla wiki.txt {options}")) == 0
    assert Path("a").read_bytes() == Path("b").read_bytes()
    assert "lines read" not in capsys.readouterr().out


def test_what_is_told_of_a_run(capsys):
    line = "birthplaces pretrain perceiver wiki.txt --writing_params_path a --max_steps 1 --bottleneck_dim 5"
    assert main([*shlex.split(line), "--tb_expt_name", "first"]) == 0
    err = capsys.readouterr().err
    assert "wiki.txt: 16 lines read, 16 used; " in err
    assert "perceiver GPT of " in err and "1 steps on cpu, float32" in err
    (folder,) = Path("expt/pretrain").iterdir()
    assert folder.name == "first_perceiver_5_pt_lr_0.006000_ft_lr_0.000600"
    assert list((folder / "tensorboard").glob("events*"))


def test_london(capsys):
    rows = ["Where was A born?\tLondon", "Where was B born?\tLondon ", "Where was C born?\tParis"]
    Path("asked.tsv").write_text("\n".join([*rows, "Where was D born?\tLondon"]), encoding="utf-8")
    assert main(shlex.split("birthplaces baseline --eval_corpus_path asked.tsv")) == 0
    assert capsys.readouterr().out == "Correct: 2 out of 4: 50.0%\n"
    assert main(shlex.split("birthplaces baseline --eval-corpus-path asked.tsv --answer Paris")) == 0
    assert capsys.readouterr().out == "Correct: 1 out of 4: 25.0%\n"


def test_a_failed_evaluation_leaves_the_predictions_that_were_there(capsys, monkeypatch):
    assert (
        main(shlex.split("birthplaces pretrain vanilla wiki.txt --writing_params_path a --max_steps 1")) == 0
    )
    Path("found").write_text("before")

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nlpfast.train.birthplaces_answers.generate", fail)
    words = "--reading_params_path a --eval_corpus_path birth_dev.tsv --outputs_path found"
    assert main(shlex.split(f"birthplaces evaluate vanilla wiki.txt {words}")) == 130
    assert Path("found").read_text() == "before"
    assert capsys.readouterr().out == ""


def test_the_demo(capsys, monkeypatch):
    monkeypatch.setattr(birthplaces_demo, "PEOPLE", 10)
    monkeypatch.setattr(birthplaces_demo, "STEPS", {"pretrain": 1, "finetune": 1, "scratch": 1})
    assert main(shlex.split("birthplaces demo --output_dir out")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("perceiver, pretrained")
    assert Path("out/perceiver.pretrained.predictions").is_file()
