"""Wrong command lines: the exit code, one line on stderr, nothing on stdout, nothing left on the disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nlpfast
from nlpfast.cli import VERBS, build_parser, main
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.train import checkpoint

USAGE, DATA, OTHER = 2, 65, 1
LM = ["train", "lm", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Be in a folder with texts, checkpoints whole and broken, and a file in the way."""
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("the quick brown fox\n" * 40)
    Path("short.txt").write_text("the quick brown fox\n")
    Path("empty.txt").write_text("")
    Path("bad.txt").write_bytes(b"fine\nfine\nnot \xff fine\n" * 100)
    Path("nul.txt").write_bytes(b"fine\nno\0t\n" * 100)
    Path("file").write_text("mine")
    torch.manual_seed(0)
    model = GPT(GPTConfig(3, 8, n_layer=1, n_head=1, n_embd=4))
    checkpoint.save("whole", model, None, {}, {}, metadata={"vocabulary": ["\n", "a", "b"]})
    checkpoint.save("run/last", model, None, {}, {}, metadata={"vocabulary": ["\n", "a", "b"]})
    checkpoint.save("wordless", model, None, {}, {})
    checkpoint.save("twoletters", model, None, {}, {}, metadata={"vocabulary": ["a", "b"]})
    shutil.copytree("whole", "cut")
    os.truncate("cut/model.safetensors", 100)
    shutil.copytree("whole", "weightless")
    os.remove("weightless/model.safetensors")
    shutil.copytree("whole", "othershape")
    config = json.loads(Path("othershape/config.json").read_text())
    Path("othershape/config.json").write_text(json.dumps({**config, "n_embd": 8}))
    return tmp_path


BAD = [
    # usage
    ([], USAGE, "name a verb"),
    (["fly"], USAGE, "fly"),
    (["--fly"], USAGE, "--fly"),
    (["train"], USAGE, "TASK"),
    (["train", "kites"], USAGE, "kites"),
    ([*LM, "--nothing"], USAGE, "--nothing"),
    ([*LM, "--max-step", "3"], USAGE, "--max-step"),
    ([*LM, "extra"], USAGE, "extra"),
    ([*LM, "--max-steps"], USAGE, "--max-steps: expected one argument"),
    ([*LM, "--max-steps", "many"], USAGE, "invalid int value: 'many'"),
    ([*LM, "--max-steps", "1.5"], USAGE, "invalid int value: '1.5'"),
    ([*LM, "--max-steps", "0"], USAGE, "--max-steps 0: give a whole number at least 1"),
    ([*LM, "--learning-rate", "-1"], USAGE, "--learning-rate -1.0: give a finite number above 0"),
    ([*LM, "--learning-rate", "nan"], USAGE, "--learning-rate nan"),
    ([*LM, "--learning-rate", "inf"], USAGE, "--learning-rate inf"),
    ([*LM, "--betas", "0.9"], USAGE, "--betas: expected 2 arguments"),
    ([*LM, "--betas", "0.9", "1"], USAGE, "--betas 0.9 1.0: give 2 values"),
    ([*LM, "--dropout", "2"], USAGE, "--dropout 2.0"),
    ([*LM, "--n-embd", "30"], USAGE, "--n-embd 30: give a multiple of n_head, which is 4"),
    ([*LM, "--schedule", "linear"], USAGE, "--schedule: invalid choice: 'linear'"),
    ([*LM, "--dtype", "int8"], USAGE, "--dtype: invalid choice"),
    ([*LM, "--warmup-tokens", "9", "--final-tokens", "8"], USAGE, "--warmup-tokens 9"),
    ([*LM, "--seed", "-1"], USAGE, "--seed -1"),
    ([*LM, "--device", "cuda:99"], USAGE, "--device cuda:99: PyTorch sees"),
    ([*LM, "--device", "toaster"], USAGE, "--device toaster: give one of auto, cpu, cuda"),
    ([*LM, "--output-dir", "file"], USAGE, "--output-dir file: file is a file"),
    ([*LM, "--output-dir", "file/below"], USAGE, "--output-dir file/below: file is a file"),
    ([*LM, "--output-dir", "run"], USAGE, "--output-dir run: holds the checkpoint 'last'"),
    ([*LM, "--output-dir", ""], USAGE, "--output-dir"),
    (["generate"], USAGE, "CHECKPOINT"),
    (["generate", "whole", "--temperature", "0"], USAGE, "--temperature 0.0"),
    (["generate", "whole", "--top-k", "0"], USAGE, "--top-k 0"),
    (["generate", "whole", "--top-p", "1.5"], USAGE, "--top-p 1.5"),
    (["generate", "whole", "--max-new-tokens", "-1"], USAGE, "--max-new-tokens -1"),
    (["generate", "whole", "--device", "cuda:99"], USAGE, "--device cuda:99"),
    (["generate", "whole", "--prompt", "abc"], USAGE, "--prompt: text has 'c'"),
    # data
    ([*LM, "--text", "missing.txt"], DATA, "missing.txt: no such file"),
    ([*LM, "--text", "."], DATA, ".: is a folder"),
    ([*LM, "--text", "empty.txt"], DATA, "empty.txt: the file is empty"),
    ([*LM, "--text", "short.txt"], DATA, "short.txt: 20 characters are too few"),
    ([*LM, "--text", "good.txt", "--block-size", "100"], DATA, "good.txt: 800 characters are too few"),
    ([*LM, "--text", "bad.txt"], DATA, "bad.txt:3: "),
    ([*LM, "--text", "nul.txt"], DATA, "nul.txt:2: "),
    (["generate", "missing"], DATA, "missing: no such checkpoint"),
    (["generate", "."], DATA, "is not a checkpoint"),
    (["generate", "wordless"], DATA, "state.json: no vocabulary in it"),
    (["generate", "twoletters"], DATA, "the vocabulary has 2 characters, the model 3"),
    (["generate", "cut"], DATA, "model.safetensors: "),
    (["generate", "weightless"], DATA, "model.safetensors: cannot be read"),
    (["generate", "othershape"], DATA, "has shape"),
]


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(("argv", "code", "message"), BAD, ids=[" ".join(case[0]) or "-" for case in BAD])
def test_a_bad_invocation(argv, code, message, folder, capsys):
    before = tree(folder)
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nlpfast: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert tree(folder) == before


def test_debug_shows_the_traceback_before_or_after_the_verb(folder, capsys):
    for argv in (["--debug", *LM, "--text", "missing.txt"], [*LM, "--debug", "--text", "missing.txt"]):
        assert main(argv) == DATA
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("nlpfast: error: missing.txt")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x.safetensors"), OTHER, "x.safetensors"),
        (RuntimeError("two\nlines"), OTHER, "two lines"),
        (KeyError("weight"), OTHER, "KeyError: 'weight'; run again with --debug"),
        (BrokenPipeError(), OTHER, "closed"),
    ],
)
def test_errors_while_running(error, code, message, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr("nlpfast.cli.generate.run", run)
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)
    assert main(["generate", "x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nlpfast: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nlpfast {nlpfast.__version__}\n"
    for argv in ([], ["train"], ["train", "lm"], ["generate"]):
        assert main([*argv, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("usage: nlpfast")
        assert err == ""


def test_every_verb_has_a_line_of_help():
    text = build_parser().format_help()
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        module = sys.modules[f"nlpfast.cli.{verb}"]
        assert module.__doc__
        assert callable(module.run)


def test_the_process_ends_with_the_code(folder):
    run = subprocess.run(
        [sys.executable, "-m", "nlpfast", "generate", "missing"], capture_output=True, text=True, check=False
    )
    assert run.returncode == DATA
    assert run.stdout == ""
    assert run.stderr.startswith("nlpfast: error: ")
    assert run.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_crash(folder):
    argv = [sys.executable, "-m", "nlpfast", "generate", "whole", "--max-new-tokens", "5"]
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert run.returncode == OTHER
    assert run.stderr == "nlpfast: error: the reader of the output closed it\n"
