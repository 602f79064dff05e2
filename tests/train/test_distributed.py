"""Several processes: the run of one, all stopping together, resume, and one that dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from together import Loss, trainer

from nlpfast.cli import main
from nlpfast.train import checkpoint
from nlpfast.train.translation_data import write_invented_pairs

HERE = Path(__file__).parent
TIMES = ("time", "tokens_per_second")
CLI = [
    *(
        "train",
        "lm",
        "--biographies",
        "20",
        "--n-layer",
        "1",
        "--n-embd",
        "16",
        "--n-head",
        "2",
        "--seed",
        "1",
    ),
    *(
        "--block-size",
        "8",
        "--max-steps",
        "9",
        "--eval-every",
        "4",
        "--log-every",
        "1",
        "--eval-batches",
        "3",
    ),
    *("--accumulation-steps", "2", "--device", "cpu"),
]


def torchrun(*words, seconds=120):
    """Start two processes; return exit code, output, and how long it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *map(str, words),
    ]
    start = time.monotonic()
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    return process.returncode, process.stdout, process.stderr, time.monotonic() - start


def records(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_close(one, other):
    assert [record.keys() for record in one] == [record.keys() for record in other]
    for a, b in zip(one, other, strict=True):
        assert b == pytest.approx(a, rel=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert main([*CLI, "--batch-size", "6", "--eval-batch-size", "6", "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_command_line_gives_the_losses_of_one_process(strategy, alone, tmp_path):
    words = ["-m", "nlpfast", *CLI, "--batch-size", "3", "--eval-batch-size", "3", "--strategy", strategy]
    code, out, err, _ = torchrun(*words, "--output-dir", tmp_path)
    assert code == 0, err
    assert_close(records(alone), records(tmp_path))
    # one process speaks
    assert out.count("validation loss") == 1
    assert err.count("9 steps on cpu") == 1
    weights, wanted = (load_file(x / "last" / "model.safetensors") for x in (tmp_path, alone))
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of two processes, by strategy."""
    folder = tmp_path_factory.mktemp("whole")
    for strategy in ("ddp", "fsdp"):
        code, _, err, _ = torchrun(HERE / "together.py", "whole", folder / strategy, strategy)
        assert code == 0, err
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_parts_without_targets_and_without_examples(strategy, whole, tmp_path):
    trainer(tmp_path, "ddp", Loss(), 2, dropout=0.0).run()
    assert_close(records(tmp_path), records(whole / strategy / "whole"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_stop_at_the_same_step_and_go_on_bit_for_bit(strategy, tmp_path):
    code, _, err, _ = torchrun(HERE / "together.py", "resume", tmp_path, strategy)
    assert code == 0, err
    for number in (0, 1):
        steps = [json.loads((tmp_path / f"stopped.{number}.{rank}").read_text()) for rank in (0, 1)]
        assert steps[0] == steps[1] and len(set(steps[0])) == 1
    assert records(tmp_path / "stopped") == records(tmp_path / "unstopped")
    for file in ("model", "optimizer", "random", "losses"):
        one, other = (
            load_file(tmp_path / x / "last" / f"{file}.safetensors") for x in ("stopped", "unstopped")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file
    kept = {path.name for path in (tmp_path / "unstopped").glob("step-*")}
    assert len(kept) == 2 and {path.name for path in (tmp_path / "stopped").glob("step-*")} == kept
    for name in (*kept, "averaged"):
        one, other = (load_file(tmp_path / x / name / "model.safetensors") for x in ("stopped", "unstopped"))
        assert all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()
    # dropout is another one in each process, and both come again
    random = load_file(tmp_path / "stopped" / "last" / "random.safetensors")
    assert {name.partition(".")[0] for name in random} == {"0", "1"}


def test_another_number_of_processes_is_refused(whole):
    folder = whole / "ddp" / "whole"
    with pytest.raises(checkpoint.CheckpointError, match="with 2 processes, not 1"):
        trainer(folder, "ddp", Loss(), 1, dropout=0.0).resume(folder)


@pytest.mark.parametrize(("task", "named"), [("raise", "ZeroDivisionError"), ("kill", "exitcode  : -9")])
def test_a_process_that_dies_ends_the_others_with_its_name(task, named, tmp_path):
    code, _, err, seconds = torchrun(HERE / "together.py", task, tmp_path, "ddp")
    assert code != 0
    # that a process dies some seconds after the start is part of it
    assert seconds < 60
    assert named in err
    assert "rank      : 1" in err


def test_the_command_line_names_the_process(tmp_path):
    (tmp_path / "text").write_bytes(b"\xff")
    words = ["-m", "nlpfast", "train", "lm", "--text", tmp_path / "text", "--output-dir", tmp_path / "run"]
    code, out, err, _ = torchrun(*words)
    assert code != 0 and not out and not (tmp_path / "run").exists()
    assert any(f"nlpfast: error: rank {rank}: " in err for rank in (0, 1))
    assert ":1: byte 0xff is not UTF-8" in err


@pytest.mark.parametrize("model", ["transformer", "rnn"])
def test_a_translation_gives_the_losses_of_one_process(model, tmp_path):
    """Two processes take the batches of a step that accumulates two; the last step of an epoch has one."""
    words = ["train", "translation", "--pairs", "100", "--vocab-size", "200", "--max-tokens", "400"]
    words += ["--model", model, "--d-model", "32", "--heads", "2", "--d-ff", "64", "--hidden-size", "32"]
    words += ["--encoder-layers", "1", "--decoder-layers", "1", "--dropout", "0", "--max-epochs", "2"]
    words += ["--log-every", "1", "--device", "cpu", "--eval-sentences", "5", "--warmup-steps", "2"]
    if model == "transformer":
        words += ["--criterion", "label_smoothed_cross_entropy_with_alignment"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert main([*words, "--accumulation-steps", "2", "--output-dir", str(alone)]) == 0
    code, out, err, _ = torchrun("-m", "nlpfast", *words, "--output-dir", both)
    assert code == 0, err
    one, two = records(alone), records(both)
    assert len(one) == len(two) > 6
    for a, b in zip(one[1:], two[1:], strict=True):
        names = ("step", "loss", "val_loss", "bleu", "tokens")
        assert a.keys() == b.keys()
        assert [b[name] for name in names if name in a] == pytest.approx(
            [a[name] for name in names if name in a], rel=1e-5
        )
    assert out.count("val loss") == 1


@pytest.fixture
def translators(tmp_path, monkeypatch):
    """Train two translators and two language models for a step; return the words that all tasks take."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = write_invented_pairs(tmp_path / "text", 100, 0)
    sides = [str(files[f"train.{side}"]) for side in ("source", "target")]
    vocab = str(tmp_path / "vocab")
    assert main(["vocab", "bpe", *sides, "--size", "200", "--output-dir", vocab]) == 0
    small = ["--vocab", vocab, "--max-steps", "1", "--device", "cpu"]
    sizes = [
        "--d-model",
        "32",
        "--heads",
        "2",
        "--d-ff",
        "64",
        "--encoder-layers",
        "1",
        "--decoder-layers",
        "1",
    ]
    few = ["--max-tokens", "400", "--eval-sentences", "5", "--dropout", "0"]
    for name, way in (("there", 1), ("back", -1)):
        words = ["train", "translation", *sides[::way], *small, *sizes, *few]
        assert main([*words, "--output-dir", str(tmp_path / name)]) == 0
    for name, text in zip(("lm-source", "lm-target"), sides, strict=True):
        words = ["train", "lm", "--text", text, *small, "--n-layer", "1", "--n-embd", "16", "--n-head", "2"]
        assert main([*words, "--output-dir", str(tmp_path / name)]) == 0
    return [*sides, "--max-tokens", "400", "--eval-sentences", "5", "--device", "cpu", "--log-every", "1"]


def test_dual_learning_gives_the_losses_of_one_process(translators, tmp_path):
    models = (
        ("forward", "there"),
        ("backward", "back"),
        ("lm-source", "lm-source"),
        ("lm-target", "lm-target"),
    )
    words = ["train", "dual", *translators, "--max-epochs", "2", "--warmup-steps", "1"]
    words += [word for option, name in models for word in (f"--{option}", str(tmp_path / name))]
    words += ["--dsl-warmup-epochs", "1", "--dsl-lambda", "0.001", "--grad-norm-clip", "1"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert main([*words, "--accumulation-steps", "2", "--output-dir", str(alone)]) == 0
    code, out, err, _ = torchrun("-m", "nlpfast", *words, "--output-dir", both)
    assert code == 0, err
    one, two = records(alone), records(both)
    assert len(one) == len(two) >= 5
    assert_close(one[1:], two[1:])
    assert out.count("forward model") == 1


def test_minimum_risk_training_goes_on_in_two_processes(translators, tmp_path):
    words = ["train", "mrt", *translators, "--model", tmp_path / "there", "--output-dir", tmp_path / "mrt"]
    code, _, err, _ = torchrun("-m", "nlpfast", *words, "--max-steps", "2", "--eval-every", "1")
    assert code == 0, err
    code, out, err, _ = torchrun(
        "-m", "nlpfast", "train", "mrt", "--resume", tmp_path / "mrt", "--max-steps", "3"
    )
    assert code == 0, err
    steps = [record["step"] for record in records(tmp_path / "mrt")]
    assert steps == [0, 1, 2, 3] and out.count("bleu") == 1
    # both drew samples of their own: what they did with them is one model
    random = load_file(tmp_path / "mrt" / "last" / "random.safetensors")
    assert {name.partition(".")[0] for name in random} == {"0", "1"}
