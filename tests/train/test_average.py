"""The mean of a run's last models: its numbers, the folders that are kept for it, and what a kill leaves."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Bigram, Counting, Sentences, config, small_gpt, train

from nlpfast.models.gpt import GPT
from nlpfast.train import average, checkpoint
from nlpfast.train.average import average_models, models_of, remove_models, write_average
from nlpfast.train.checkpoint import CheckpointError
from nlpfast.train.config import ConfigError
from nlpfast.train.language_model import train_language_model
from nlpfast.train.language_model_options import LanguageModelOptions
from nlpfast.train.task_run import check_output_dir
from nlpfast.train.trainer import Trainer


def saved(folder, **tensors):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_mean_is_taken_in_float64_and_has_the_dtype_of_the_weights(tmp_path):
    values = [1.0, 2.0**-24, 2.0**-24]
    folders = [
        saved(
            tmp_path / str(number),
            single=torch.tensor([value, 3.0 * number]),
            half=torch.tensor([[number]], dtype=torch.bfloat16),
            count=torch.tensor([number]),
        )
        for number, value in enumerate(values)
    ]
    mean = average_models(folders)
    # in float32 the small ones would each be lost in the sum
    assert mean["single"].tolist() == [torch.tensor((1 + 2.0**-23) / 3).item(), 3.0]
    assert mean["single"][0] != torch.tensor(1.0) / 3
    assert mean["single"].dtype == torch.float32
    assert torch.equal(mean["half"], torch.ones(1, 1, dtype=torch.bfloat16))
    # nothing has two halves of a counter
    assert torch.equal(mean["count"], torch.tensor([2]))
    assert list(average_models(folders[1:2])["single"]) == [2.0**-24, 3.0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2)}, r"b is missing; average models of one run"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)},
            "c is not part of the first model; average",
        ),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, r"a is \[3\] float32, in the first model \[2\] float32"),
        (
            {"a": torch.zeros(2).double(), "b": torch.zeros(1)},
            r"a is \[2\] float64, in the first model \[2\] float32",
        ),
    ],
)
def test_models_that_are_not_alike_are_named(tensors, message, tmp_path):
    first = saved(tmp_path / "first", a=torch.zeros(2), b=torch.zeros(1))
    other = saved(tmp_path / "other", **tensors)
    with pytest.raises(CheckpointError, match=f"other/model.safetensors: {message}"):
        average_models([first, other])


def test_models_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="folders is empty; give at least one model"):
        average_models([])
    with pytest.raises(CheckpointError, match=r"nowhere/model\.safetensors: cannot be read"):
        average_models([tmp_path / "nowhere"])
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable"):
        average_models([tmp_path])
    with pytest.raises(ValueError, match="folders is empty"):
        write_average(tmp_path, nn.Linear(1, 1), {})


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_models_of_the_last_evaluations_and_their_mean(tmp_path):
    seen = {}

    def score(model, pause):
        seen[len(seen) + 1] = {name: weight.clone() for name, weight in model.state_dict().items()}
        return {"score": -len(seen)}

    trainer = train(
        *(small_gpt(), Counting(), config(max_steps=7, eval_every=2, average=3, learning_rate=0.01)),
        score_fn=score,
        output_dir=tmp_path,
        metadata={"vocabulary": list("abcdefg")},
    )
    folders = models_of(tmp_path)
    # evaluations after steps 2, 4, 6 and 7
    assert {step: path.name for step, path in folders.items()} == {
        step: f"step-{step:08d}" for step in (4, 6, 7)
    }
    names = {"log.jsonl", "last", "last.previous", "best", "averaged", *(p.name for p in folders.values())}
    assert {path.name for path in tmp_path.iterdir()} == names
    for evaluation, path in zip((2, 3, 4), folders.values(), strict=True):
        found = weights(path)
        assert found.keys() == seen[evaluation].keys()
        assert all(torch.equal(found[name], weight) for name, weight in seen[evaluation].items())
    mean = GPT.from_pretrained(tmp_path / "averaged").state_dict()
    for name in mean:
        parts = [seen[evaluation][name].double() for evaluation in (2, 3, 4)]
        assert torch.equal(mean[name], (sum(parts) / 3).float())
    assert not torch.equal(mean["head.weight"], trainer.model.head.weight)
    # checkpoints, but for the optimizer
    for path in (*folders.values(), tmp_path / "averaged"):
        content = checkpoint.load(path, small_gpt())
        assert content.metadata == {"vocabulary": list("abcdefg")} and content.config["average"] == 3
        assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors", "state.json"}
    assert content.state == {"step": 7, "averaged": [4, 6, 7]}
    again = Trainer(
        small_gpt(), Counting(), config(max_steps=7, eval_every=2, average=3), output_dir=tmp_path
    )
    with pytest.raises(CheckpointError, match=r"step-00000007/state\.json: no optimizer, only a model"):
        again.resume(folders[7])


def test_fewer_evaluations_than_asked_for_and_one_alone(tmp_path, capsys):
    settings = config(max_steps=2, eval_every=1, average=5)
    Trainer(Bigram(), Sentences(8), settings, output_dir=tmp_path).run()
    assert list(models_of(tmp_path)) == [1, 2]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "averaged/: mean of the models after step 1, 2"
    train(Bigram(), Sentences(8), config(max_steps=3, eval_every=1, average=1), output_dir=tmp_path)
    assert list(models_of(tmp_path)) == [3]
    assert torch.equal(weights(tmp_path / "averaged")["table"], weights(tmp_path / "last")["table"])


def test_without_it_there_are_no_such_folders(tmp_path):
    train(Bigram(), Sentences(8), config(max_steps=2, eval_every=1), output_dir=tmp_path)
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "last.previous", "log.jsonl"][1:]
    )


def test_files_need_a_folder():
    with pytest.raises(ConfigError, match="average=2: it keeps models in files, pass output_dir="):
        Trainer(Bigram(), Sentences(8), config(average=2), quiet=True)


def kept(folder, *steps):
    for step in steps:
        average.keep_model(folder, step, nn.Linear(1, 1), {})


def test_later_and_older_models_and_litter_go_and_nothing_else(tmp_path):
    kept(tmp_path, 10, 5, 123456789, 20)
    for name in ("step-00000005.older", "step-00000007.partial", "step-00000008.previous"):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    others = ["step-5", "step-00000006", "step-00000005.mine", "step-00000005x", "my-step-00000005"]
    for name in others:
        (tmp_path / name).mkdir()
    assert list(models_of(tmp_path)) == [5, 10, 20, 123456789]
    remove_models(tmp_path, newest=2, until=20)
    assert list(models_of(tmp_path)) == [10, 20]
    names = ["step-00000010", "step-00000020", *others]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert models_of(tmp_path / "nowhere") == {}
    remove_models(tmp_path / "nowhere", newest=1, until=1)


def test_a_run_that_goes_on_is_not_confused_by_later_models(tmp_path):
    """They are of a run that was killed, and evaluated at other steps."""

    def run(folder, **values):
        settings = config(**{"max_steps": 6, "eval_every": 2, "average": 2, "learning_rate": 0.1, **values})
        return Trainer(Bigram(), Sentences(40), settings, output_dir=folder, quiet=True)

    run(tmp_path, max_steps=4).run()
    kept(tmp_path, 5, 99)
    again = run(tmp_path)
    again.resume(tmp_path)
    again.run()
    assert list(models_of(tmp_path)) == [4, 6]
    assert checkpoint.load(tmp_path / "averaged").state["averaged"] == [4, 6]
    # a run from the start has no use for any of them
    run(tmp_path, max_steps=2).run()
    assert list(models_of(tmp_path)) == [2]


@pytest.mark.parametrize("name", ["averaged", "step-00000002"])
def test_such_folders_are_of_an_earlier_run(name, tmp_path):
    checkpoint.save(tmp_path / name, nn.Linear(1, 1), None, {}, {})
    with pytest.raises(ConfigError, match=f"holds the checkpoint '{name}' of an earlier run.*--overwrite"):
        check_output_dir(tmp_path, overwrite=False)
    check_output_dir(tmp_path, overwrite=True)
    (tmp_path / name / "state.json").unlink()
    if name == "averaged":
        with pytest.raises(ConfigError, match="'averaged' in it is no checkpoint"):
            check_output_dir(tmp_path, overwrite=True)


def test_overwrite_removes_them_and_the_width_is_the_models(tmp_path):
    options = {"biographies": 20, "n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8}
    settings = {"device": "cpu", "eval_batches": 1, "log_every": 1, "schedule": "noam", "learning_rate": 2.0}

    def run(overwrite, **values):
        own = LanguageModelOptions(**options, output_dir=str(tmp_path), overwrite=overwrite)
        train_language_model(own, config(**{**settings, "warmup_tokens": None, **values}), quiet=True)

    run(False, average=2, max_steps=3, eval_every=1)
    assert list(models_of(tmp_path)) == [2, 3] and (tmp_path / "averaged").is_dir()
    GPT.from_pretrained(tmp_path / "averaged")
    with pytest.raises(ConfigError, match="add --overwrite"):
        run(False, max_steps=1)
    run(True, max_steps=1)
    assert models_of(tmp_path) == {} and not (tmp_path / "averaged").exists()
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert record["lr"] == pytest.approx(2.0 * 4**-0.5 * 4000**-1.5)


def run_with_averages(folder):
    """Train, from the latest checkpoint where there is one; run in a trial."""
    settings = config(max_steps=4, eval_every=1, average=2, learning_rate=0.1)
    options = {"validation": Sentences(8), "output_dir": folder, "quiet": True}
    trainer = Trainer(Bigram(), Sentences(40), settings, **options)
    with contextlib.suppress(CheckpointError):
        trainer.resume(folder)
    trainer.run()


def test_a_kill_anywhere_leaves_models_that_a_run_can_go_on_with(trials, tmp_path):
    result = trials.run(run_with_averages, tmp_path / "whole", fault=(tmp_path / "whole", 0, "count"))
    assert result.code == 0, result.text
    names = ["averaged", "step-00000003", "step-00000004", "last", "best"]
    removals = [
        n for n, call in enumerate(result.calls, 1) if call.name == "unlink" and "/step-" in call.path
    ]
    assert len(removals) >= 6, "the case must remove models"
    # also those within removals, and at the end
    count = len(result.calls)
    numbers = {*range(1, count + 1, 37), *removals[::2], *range(count - 40, count + 1, 10)}
    for number in sorted(numbers):
        folder = tmp_path / str(number)
        assert trials.run(run_with_averages, folder, fault=(folder, number, "kill before")).code == -9
        run_with_averages(folder)
        left = {path.name for path in folder.iterdir() if path.name.startswith(("step-", "averaged"))}
        assert left == set(names[:3]), number
        for name in names:
            one, other = weights(folder / name)["table"], weights(tmp_path / "whole" / name)["table"]
            assert torch.equal(one, other), (number, name)
        shutil.rmtree(folder)
