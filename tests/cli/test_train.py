"""`nlpfast train lm` and `nlpfast generate`, end to end on a tiny model."""

import json

import pytest

from nlpfast.cli import main
from nlpfast.models.gpt import GPT
from nlpfast.train import checkpoint
from nlpfast.train.trainer import Trainer

TEXT = "the quick brown fox jumps over the lazy dog\n" * 30
SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8", "--device", "cpu"]
SHORT = ["--max-steps", "20", "--eval-every", "10", "--log-every", "5", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train once through the command line; return the run's folder."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text.txt").write_text(TEXT)
    argv = ["train", "lm", "--text", str(folder / "text.txt"), "--output-dir", str(folder / "run")]
    assert main([*argv, *SMALL, *SHORT]) == 0
    return folder / "run"


def say(capsys, *argv):
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_training_prints_results_on_stdout_and_progress_on_stderr(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    run = tmp_path / "deep" / "run"
    argv = ["train", "lm", "--text", str(tmp_path / "text.txt"), "--output-dir", str(run)]
    assert main([*argv, *SMALL, *SHORT]) == 0
    out, err = capsys.readouterr()
    results = dict(line.split(maxsplit=1) for line in out.replace("validation loss", "loss").splitlines())
    assert results["steps"] == "20"
    assert results["checkpoint"] == str(run / "best")
    first, *records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert first["data"]["used"] == first["data"]["read"] == 30
    assert results["loss"].startswith(f"{records[-1]['val_loss']:.4f} (best ")
    assert [record["step"] for record in records] == [1, 5, 10, 15, 20]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    lines = err.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'text.txt'}: 30 lines used, 1,320 characters, ")
    assert lines[0].endswith("20 steps on cpu, float32")
    assert len(lines) == 1 + len(records)
    assert sorted(path.name for path in run.iterdir()) == ["best", "last", "last.previous", "log.jsonl"]


def test_options_reach_model_and_loop(tmp_path, capsys):
    argv = ["train", "lm", "--output-dir", str(tmp_path / "run"), "--biographies", "40", *SMALL]
    argv += ["--max-epochs", "1", "--max-steps", "3", "--batch-size", "2", "--accumulation-steps", "2"]
    argv += ["--betas", "0.8", "0.95", "--dtype", "bfloat16", "--sampling", "replacement", "--tensorboard"]
    argv += ["--eval-batches", "2", "--dropout", "0.25", "--warmup-tokens", "0", "--schedule", "mingpt"]
    assert main(argv) == 0
    saved = checkpoint.load(tmp_path / "run" / "last")
    assert saved.state["step"] == 3
    assert saved.state["tokens"] == 3 * 2 * 2 * 8
    wanted = {"max_epochs": 1, "dtype": "bfloat16", "betas": [0.8, 0.95], "tensorboard": True}
    assert wanted.items() <= saved.config.items()
    model = GPT.from_pretrained(tmp_path / "run" / "last")
    assert (model.config.n_layer, model.config.n_embd, model.block_size) == (1, 16, 8)
    assert model.config.attn_pdrop == model.config.embd_pdrop == model.config.resid_pdrop == 0.25
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_generation_is_the_prompt_and_the_characters_asked_for(trained, capsys):
    out = say(capsys, "generate", str(trained), "--prompt", "the ", "--max-new-tokens", "12", "--greedy")
    assert out.startswith("the ")
    assert len(out) == 4 + 12 + 1
    assert set(out) <= set(TEXT)
    assert say(capsys, "generate", str(trained), "--prompt", "the ", "--max-new-tokens", "0") == "the \n"


@pytest.mark.parametrize("options", [[], ["--temperature", "0.8"], ["--top-k", "5"], ["--top-p", "0.9"]])
def test_generation_is_repeatable_with_a_seed(options, trained, capsys):
    argv = ["generate", str(trained / "last"), "--max-new-tokens", "60", *options]
    one, again, other = (say(capsys, *argv, "--seed", seed) for seed in ("1", "1", "2"))
    assert one == again
    assert one != other


@pytest.mark.parametrize("options", [["--top-k", "1"], ["--top-p", "0.01"], ["--temperature", "0.001"]])
def test_the_narrowest_sampling_is_greedy(options, trained, capsys):
    argv = ["generate", str(trained), "--max-new-tokens", "40"]
    assert say(capsys, *argv, *options) == say(capsys, *argv, "--greedy")
    assert say(capsys, *argv) != say(capsys, *argv, "--greedy")


def test_greedy_needs_no_seed_and_a_run_folder_means_its_best(trained, capsys):
    argv = ["--greedy", "--max-new-tokens", "20"]
    texts = {say(capsys, "generate", str(trained / name), *argv, "--seed", "5") for name in (".", "best")}
    texts.add(say(capsys, "generate", str(trained), *argv))
    assert len(texts) == 1


def test_a_second_run_into_the_same_folder_needs_overwrite(trained, capsys):
    argv = ["train", "lm", "--biographies", "40", "--output-dir", str(trained), *SMALL, "--max-steps", "1"]
    before = (trained / "log.jsonl").read_text()
    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (trained / "log.jsonl").read_text() == before


def test_an_interrupt_ends_with_130_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    one_step = Trainer._one_step

    def interrupted(trainer, *args):
        if trainer.state.step == 3:
            raise KeyboardInterrupt
        return one_step(trainer, *args)

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    argv = ["train", "lm", "--biographies", "40", "--output-dir", str(tmp_path), *SMALL]
    assert main([*argv, "--max-steps", "9", "--eval-every", "2"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "nlpfast: error: interrupted"
    assert checkpoint.load(tmp_path / "last").state["step"] == 2


def test_a_loss_that_explodes_ends_with_1_and_one_line(tmp_path, capsys):
    argv = ["train", "lm", "--biographies", "40", "--output-dir", str(tmp_path / "run"), *SMALL]
    argv += ["--max-steps", "50", "--learning-rate", "1e30", "--schedule", "constant", "--warmup-tokens", "0"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "the loss is nan" in err.splitlines()[-1] or "the loss is inf" in err.splitlines()[-1]


def test_a_run_goes_on_with_its_own_options_but_for_those_given(tmp_path, capsys):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    argv = ["train", "lm", "--text", str(text), "--output-dir", str(run), "--batch-size", "3", *SMALL]
    assert main([*argv, "--max-steps", "4"]) == 0
    capsys.readouterr()
    assert main(["train", "lm", "--resume", str(run), "--max-steps", "6", "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert "steps            6" in out
    assert [line for line in err.splitlines() if line.startswith("changed: ")] == [
        "changed: max_steps: 4 -> 6",
        "changed: dtype: float32 -> bfloat16",
    ]
    saved = checkpoint.load(run / "last")
    assert (saved.state["step"], saved.config["batch_size"], saved.config["dtype"]) == (6, 3, "bfloat16")
    assert saved.metadata["options"]["n_embd"] == 16
    # of any of its checkpoints, and after a move of the folder
    run = run.rename(tmp_path / "moved")
    assert main(["train", "lm", "--resume", str(run / "last"), "--max-steps", "7"]) == 0
    assert checkpoint.load(run / "last").state["step"] == 7
    capsys.readouterr()
    before = (run / "log.jsonl").read_bytes()
    for words, code, message in [
        (["--block-size", "4"], 2, "--block-size 4: a run that is resumed keeps its own, 8"),
        (["--batch-size", "4"], 2, "--batch-size 4: a run that is resumed keeps its own, 3"),
        (["--output-dir", "elsewhere"], 2, "--output-dir is given with --resume"),
        (["--overwrite"], 2, "--overwrite is given with --resume"),
        (["--text", str(tmp_path / "none")], 65, "no such file"),
    ]:
        assert main(["train", "lm", "--resume", str(run), *words]) == code, words
        assert message in capsys.readouterr().err
    text.write_text(TEXT[1:])
    assert main(["train", "lm", "--resume", str(run)]) == 65
    assert f"{text}: is not the text that the run was trained on" in capsys.readouterr().err
    assert (run / "log.jsonl").read_bytes() == before


def test_a_recurrent_model_of_characters_writes_text_too(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    run = tmp_path / "run"
    argv = ["train", "lm", "--text", str(tmp_path / "text.txt"), "--output-dir", str(run), "--model", "rnn"]
    argv += ["--embed-size", "16", "--hidden-size", "32", "--block-size", "16", "--device", "cpu"]
    assert main([*argv, "--max-steps", "60", "--eval-every", "60", "--learning-rate", "0.02"]) == 0
    capsys.readouterr()
    words = ["generate", str(run), "--prompt", "the quick", "--max-new-tokens", "12", "--greedy"]
    assert say(capsys, *words) == "the quick brown fox j\n"
