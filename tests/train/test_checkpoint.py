"""Checkpoints: what is saved comes back, and whatever goes wrong the good one stays good."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.train import checkpoint
from nlpfast.train.checkpoint import CheckpointError

STATE = {"step": 3, "best_loss": None}
SETTINGS = {"learning_rate": 0.1, "betas": [0.9, 0.99]}


def gpt(width=8, layers=1):
    torch.manual_seed(0)
    return GPT(GPTConfig(5, 4, n_layer=layers, n_head=2, n_embd=width))


def adamw(model):
    decayed = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))


def take_steps(model, optimizer, steps):
    idx = torch.tensor([[0, 1, 2, 3]])
    for _ in range(steps):
        optimizer.zero_grad()
        model.eval()(idx, idx)[1].backward()
        optimizer.step()


@pytest.fixture
def trained():
    model = gpt()
    optimizer = adamw(model)
    take_steps(model, optimizer, 2)
    return model, optimizer


def fill(folder, step):
    """Save a checkpoint whose weights are all `step`."""
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, step)
    checkpoint.save(folder, model, torch.optim.SGD(model.parameters()), {"step": step}, {})


def assert_whole(folder, step):
    """Assert that `folder` is the whole checkpoint of `step`: files of one generation only."""
    model = nn.Linear(2, 1)
    assert checkpoint.load(folder, model, torch.optim.SGD(model.parameters())).state == {"step": step}
    assert model.weight.tolist() == [[step, step]]


def test_round_trip_continues_bit_for_bit(trained, tmp_path):
    model, optimizer = trained
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    checkpoint.save(tmp_path / "a", model, optimizer, STATE, SETTINGS, metadata={"vocabulary": ["\n", "é"]})
    other = gpt()
    other_optimizer = adamw(other)
    loaded = checkpoint.load(tmp_path / "a", other, other_optimizer)
    assert loaded.state == STATE
    assert loaded.config == SETTINGS
    assert loaded.metadata == {"vocabulary": ["\n", "é"]}
    assert other_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    take_steps(model, optimizer, 3)
    take_steps(other, other_optimizer, 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_files_and_what_is_in_them(trained, tmp_path):
    checkpoint.save(tmp_path / "a", *trained, STATE, SETTINGS)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    names = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(os.listdir(tmp_path / "a")) == names
    content = json.loads((tmp_path / "a" / "state.json").read_text())
    assert content["torch"] == torch.__version__
    assert {"nlpfast", "format", "state", "config", "metadata", "optimizer"} <= content.keys()
    assert "exp_avg.head.weight" in load_file(tmp_path / "a" / "optimizer.safetensors")


def test_from_pretrained_reads_a_checkpoint(trained, tmp_path):
    model, optimizer = trained
    checkpoint.save(tmp_path / "a", model, optimizer, STATE, SETTINGS)
    again = GPT.from_pretrained(tmp_path / "a")
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(idx)[0], model.eval()(idx)[0])


def test_tied_and_transposed_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias = nn.Parameter(torch.arange(6.0).view(3, 2).t()[0])
    checkpoint.save(tmp_path / "a", model, None, STATE, SETTINGS)
    again = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    checkpoint.load(tmp_path / "a", again)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def interrupt(monkeypatch, module, name, at_call, error):
    """Let the call number `at_call` of a function, and all later ones, raise."""
    function, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) >= at_call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)
    return calls


STAGES = [
    # first checkpoint's file, its sync (three files and a folder), the state, both renames
    *[(checkpoint, "save_file", call) for call in (1, 2)],
    *[(os, "fsync", call) for call in (1, 2, 3, 4)],
    (Path, "write_text", 1),
    *[(os, "replace", call) for call in (1, 2)],
]


@pytest.mark.parametrize(("module", "name", "call"), STAGES)
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full", "interrupt"],
)
def test_a_save_that_fails_at_any_stage_leaves_the_old_one(module, name, call, error, tmp_path, monkeypatch):
    folder = tmp_path / "last"
    fill(folder, 1)
    with monkeypatch.context() as patch:
        calls = interrupt(patch, module, name, call, error)
        expected = OSError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            fill(folder, 2)
        assert len(calls) >= call, "the stage must have been reached"
    if expected is OSError:
        assert str(folder) in str(caught.value)
        assert "still good" in str(caught.value)
    assert not (tmp_path / "last.partial").exists()
    assert_whole(folder, 1)
    fill(folder, 3)
    assert_whole(folder, 3)
    assert os.listdir(tmp_path) == ["last"]


@pytest.mark.parametrize("call", range(1, 6))
def test_a_first_save_that_fails_leaves_nothing(call, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, os, "fsync" if call < 5 else "replace", call if call < 5 else 1, OSError("full"))
        with pytest.raises(OSError, match="no earlier one exists"):
            fill(tmp_path / "last", 1)
    assert os.listdir(tmp_path) == []


def test_every_state_that_a_killed_process_can_leave_is_read_right(tmp_path):
    fill(tmp_path / "one", 1)
    fill(tmp_path / "two", 2)
    last, partial, previous = (tmp_path / f"last{ending}" for ending in ("", ".partial", ".previous"))
    # killed while writing
    shutil.copytree(tmp_path / "one", last)
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert_whole(last, 1)
    # killed between the two renames
    shutil.rmtree(partial)
    shutil.copytree(tmp_path / "two", partial)
    last.rename(previous)
    assert_whole(last, 1)
    assert checkpoint.find(tmp_path).name == "last.previous"
    # killed before the previous one was removed
    partial.rename(last)
    assert_whole(last, 2)
    # and the next save clears up
    fill(last, 3)
    assert_whole(last, 3)
    assert sorted(os.listdir(tmp_path)) == ["last", "one", "two"]


def test_what_a_killed_process_left_half_written_is_no_obstacle(tmp_path):
    fill(tmp_path / "last", 1)
    (tmp_path / "last.partial").mkdir()
    (tmp_path / "last.partial" / "stray").write_bytes(b"half")
    fill(tmp_path / "last", 2)
    assert_whole(tmp_path / "last", 2)
    assert "stray" not in os.listdir(tmp_path / "last")


def test_the_old_one_gets_its_name_back_when_the_new_one_cannot_take_it(tmp_path, monkeypatch):
    fill(tmp_path / "last", 1)
    replace = os.replace

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=r"still good in .*/last;"):
        fill(tmp_path / "last", 2)
    assert os.listdir(tmp_path) == ["last"]


def test_files_are_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_replace(source, target):
        events.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    fill(tmp_path / "a", 1)
    rename = events.index(("replace", str(tmp_path / "a")))
    partial = tmp_path / "a.partial"
    files = [partial / name for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
    for path in [*files, partial]:
        assert ("sync", str(path)) in events[:rename]
    assert events[rename + 1 :] == [("sync", str(tmp_path))]


@pytest.mark.parametrize("content", ["file", "folder"])
def test_a_name_that_is_taken_by_something_else_is_refused(content, tmp_path):
    target = tmp_path / "work"
    if content == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else than a checkpoint"):
        fill(target, 1)
    assert (target if content == "file" else target / "thesis.txt").read_text() == "mine"


def break_file(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def edit_state(**values):
    def edit(folder):
        content = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**content, **values}))

    return edit


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "head.weight"}
    save_file(tensors, folder / "model.safetensors")


def odd_moment(folder):
    save_file({"exp_avg.head.weight": torch.zeros(2)}, folder / "optimizer.safetensors")


DAMAGE = [
    (lambda folder: shutil.rmtree(folder), "no such checkpoint"),
    (lambda folder: (folder / "state.json").unlink(), "no state.json in it"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors: cannot be read"),
    (break_file("state.json", b"{"), "state.json: cannot be read"),
    (break_file("state.json", b"\xff"), "state.json: cannot be read"),
    (break_file("state.json", b"[]"), "state.json: not of format 4"),
    (break_file("model.safetensors", b"short"), "model.safetensors: "),
    (break_file("model.safetensors", b"\x80\x04cposix\nsystem\n"), "model.safetensors: "),
    (break_file("optimizer.safetensors", b""), "optimizer.safetensors: cannot be read"),
    (edit_state(format=3), "not of format 4"),
    (edit_state(state=3), "state is missing or no object"),
    (edit_state(optimizer=None), "state.json: no optimizer, only a model: name the last/ of its run"),
    (edit_state(optimizer=[]), "other optimizer groups"),
    (edit_state(optimizer=3), "other optimizer groups"),
    (drop_tensor, "model.safetensors: head.weight is missing"),
    (odd_moment, r"exp_avg.head.weight \[2\] fits no parameter"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(damage, message, trained, tmp_path):
    checkpoint.save(tmp_path / "a", *trained, STATE, SETTINGS)
    damage(tmp_path / "a")
    model = gpt()
    optimizer = adamw(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(tmp_path / "a", model, optimizer)
    assert str(tmp_path / "a") in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("sizes", "key"),
    [({"width": 16}, r"has shape \[1, 4, 8\]"), ({"layers": 2}, r"blocks\.1\..* is missing")],
)
def test_a_checkpoint_of_another_shape_names_file_key_and_shapes(sizes, key, trained, tmp_path):
    checkpoint.save(tmp_path / "a", *trained, STATE, SETTINGS)
    with pytest.raises(CheckpointError, match="model.safetensors: .*" + key) as caught:
        checkpoint.load(tmp_path / "a", gpt(**sizes))
    assert "\n" not in str(caught.value)


def test_find_takes_the_best_then_the_last_of_a_run(tmp_path):
    fill(tmp_path / "last", 2)
    assert checkpoint.find(tmp_path) == tmp_path / "last"
    fill(tmp_path / "best", 1)
    assert checkpoint.find(tmp_path) == tmp_path / "best"
    assert checkpoint.find(tmp_path / "last") == tmp_path / "last"


def test_values_that_json_cannot_hold_leave_the_old_one(tmp_path):
    fill(tmp_path / "a", 1)
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "a", model, None, {"loss": float("nan")}, {})
    assert_whole(tmp_path / "a", 1)
    assert os.listdir(tmp_path) == ["a"]
