"""A run that is stopped anywhere and resumed ends with the bits of one that never was."""

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from toys import VOCABULARY, Sentences, config

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.stop import Terminated
from nlpfast.train import checkpoint
from nlpfast.train.checkpoint import CheckpointError
from nlpfast.train.config import ConfigError
from nlpfast.train.random_state import random_state
from nlpfast.train.trainer import Trainer

TIMES = ("time", "tokens_per_second")
# 11 sentences: an epoch of 6 batches, 3 steps of 2; empty ones, so that some batches count nothing
SETTINGS = {
    **{"max_steps": None, "max_epochs": 2, "batch_size": 2, "accumulation_steps": 2, "learning_rate": 0.01},
    **{
        "schedule": "cosine",
        "warmup_tokens": 9,
        "eval_every": 2,
        "log_every": 3,
        "save_every": 5,
        "seed": 3,
        "eval_batch_size": 2,
    },
}


# the rate is so high that evaluations get worse
LATE = {"warmup_tokens": None, "warmup_steps": 2, "eval_every": 1, "learning_rate": 0.3, "average": 2}
VARIANTS = {
    "early": {**LATE, "optimizer": "adamax", "schedule": "inverse_sqrt", "early_stop": 3},
    "plateau": {
        **LATE,
        "optimizer": "sgd",
        "schedule": "plateau",
        "plateau_patience": 1,
        "learning_rate": 9.0,
    },
    "noam": {**LATE, "optimizer": "adam", "schedule": "noam", "early_stop": 99},
}


class Drawing(Dataset):
    """Sentences of which loading draws from every generator that there is."""

    def __init__(self):
        self.sentences = Sentences(11, empty=(1, 4, 5))

    def __len__(self):
        return len(self.sentences)

    def __getitem__(self, index):
        idx, targets = self.sentences[index]
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        # a second normal number, which some generators keep for the next time
        noise += random.gauss(0, 1) + np.random.randn() if index % 3 == 0 else 0
        return (idx + int(noise * 100)) % VOCABULARY, targets


class Stopper:
    """A loss function that sends a signal to its own process in its n-th call."""

    def __init__(self, call=None, number=signal.SIGTERM):
        self.calls, self.call, self.number = 0, call, number

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), self.number)
        return model(*batch)[1]


def trainer(folder, loss_fn, settings):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = GPT(GPTConfig(VOCABULARY, 8, n_layer=1, n_head=2, n_embd=8))
    data = Drawing() if settings.num_workers == 0 else Sentences(11, empty=(1, 4, 5))
    return Trainer(
        *(model, data, settings),
        **{"validation": Sentences(5), "output_dir": folder, "loss_fn": loss_fn, "quiet": True, "width": 8},
    )


def records(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def outcome(run: Trainer) -> dict:
    """All that two equal runs have in common: flat, tensors as lists."""
    state = dataclasses.asdict(run.state)
    # times differ, and with them the length of the log
    del state["seconds"], state["log_bytes"]
    tensors = {f"weight {name}": weight for name, weight in run.model.state_dict().items()}
    for index, slots in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {index} {slot}": value for slot, value in slots.items()}
    tensors |= {f"random {name}": value for name, value in random_state().items()}
    values = {name: torch.as_tensor(tensor).tolist() for name, tensor in tensors.items()}
    best = checkpoint.load(run.output_dir / "best").state["step"]
    for folder in (*run.output_dir.glob("step-*"), *run.output_dir.glob("averaged*")):
        values[folder.name] = checkpoint.load(folder).state
        kept = load_file(folder / "model.safetensors")
        values |= {f"{folder.name} {name}": tensor.tolist() for name, tensor in kept.items()}
    values |= {"log": records(run.output_dir), "scaler": run.steps.scaler.state_dict(), "best": best}
    groups = run.optimizer.state_dict()["param_groups"]
    return {**values, **state, "groups": groups, "meter": run.meter.state()}


def uninterrupted(folder, settings):
    loss = Stopper()
    run = trainer(folder, loss, settings)
    run.run()
    return outcome(run), loss.calls


def stopped(folder, settings, call, number=signal.SIGTERM):
    run = trainer(folder, Stopper(call, number), settings)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        run.run()


def resumed(folder, settings):
    run = trainer(folder, Stopper(), settings)
    # whatever the generators did meanwhile
    torch.rand(3), np.random.rand(3), random.random()
    assert run.resume(folder) == []
    run.run()
    return outcome(run)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert other[key] == value, key


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_stopped_at_any_batch(workers, dtype, tmp_path):
    settings = config(**SETTINGS, num_workers=workers, dtype=dtype)
    wanted, calls = uninterrupted(tmp_path / "whole", settings)
    kinds = set()
    # processes that load are slow to start
    for call in range(1, calls + 1) if workers == 0 and dtype == "float32" else (2, 3, 9, calls - 1):
        folder = tmp_path / str(call)
        stopped(folder, settings, call)
        state = checkpoint.load(folder / "last").state
        window = load_file(folder / "last" / "losses.safetensors")["window"].numel()
        kinds.add(("due" if state["due"] else "window" if window else "step", state["epoch"]))
        assert_same(wanted, resumed(folder, settings))
    if workers == 0 and dtype == "float32":
        assert kinds >= {(kind, epoch) for kind in ("due", "window", "step") for epoch in (0, 1)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_optimizers_schedules_ends_and_averages(variant, tmp_path):
    settings = config(**{**SETTINGS, **VARIANTS[variant]})
    wanted, calls = uninterrupted(tmp_path / "whole", settings)
    assert wanted["ended"] == ("early_stop" if variant == "early" else "max_epochs")
    assert wanted["step"] < 6 or variant != "early", "the case must end early"
    assert (wanted["halvings"] > 0) is (variant == "plateau")
    assert wanted["averaged"] == {"step": wanted["step"], "averaged": [wanted["step"] - 1, wanted["step"]]}
    needed = set()
    for call in (*range(1, calls, 3), calls) if variant != "noam" else (5, calls - 2):
        folder = tmp_path / str(call)
        stopped(folder, settings, call)
        state = checkpoint.load(folder / "last").state
        for field in ("stale_evaluations", "halvings"):
            if state[field] and field not in needed:
                shutil.copytree(folder, tmp_path / field)
                changed(tmp_path / field / "last", field)
                needed |= {field} if resumed(tmp_path / field, settings) != wanted else set()
        assert_same(wanted, resumed(folder, settings))
    fields = {"early": {"stale_evaluations"}, "plateau": {"halvings"}, "noam": set()}
    assert needed >= fields[variant]


def test_a_schedule_that_is_changed_is_planned_anew(tmp_path):
    """From tokens to steps, of which there are fewer."""
    stopped(tmp_path / "run", config(**SETTINGS), 9)
    before = checkpoint.load(tmp_path / "run" / "last").state
    assert before["schedule_end"] > 6 and before["warmup_end"] == 9
    run = trainer(
        tmp_path / "run", Stopper(), config(**{**SETTINGS, "warmup_tokens": None, "warmup_steps": 1})
    )
    assert run.resume(tmp_path / "run") == ["warmup_tokens: 9 -> None", "warmup_steps: None -> 1"]
    run.run()
    assert (run.state.schedule_end, run.state.warmup_end) == (6, 1)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1)


def test_another_optimizer_is_refused(tmp_path):
    stopped(tmp_path, config(**SETTINGS), 9)
    run = trainer(tmp_path, Stopper(), config(**{**SETTINGS, "optimizer": "adamax"}))
    with pytest.raises(ConfigError, match="optimizer='adamax': a run that is resumed keeps its own, adamw"):
        run.resume(tmp_path)


def test_stopped_again_and_again(tmp_path):
    settings = config(**SETTINGS)
    wanted, calls = uninterrupted(tmp_path / "whole", settings)
    stops = 0
    for call in [2, 3, 1, 4, 2, 5, 3, 1, calls]:
        run = trainer(tmp_path / "run", Stopper(call), settings)
        if stops:
            run.resume(tmp_path / "run")
        try:
            run.run()
        except Terminated:
            stops += 1
        else:
            break
    assert stops >= 6
    assert_same(wanted, outcome(run))


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """The log has records from after the checkpoint, and half of one."""
    settings = config(**SETTINGS)
    wanted, _ = uninterrupted(tmp_path / "whole", settings)
    stopped(tmp_path / "run", settings, 9)
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 99, "loss": 1.0}\n{"step": 1')
    assert_same(wanted, resumed(tmp_path / "run", settings))


def test_a_finished_run_stays_as_it_is(tmp_path):
    settings = config(**SETTINGS)
    wanted, _ = uninterrupted(tmp_path / "run", settings)
    assert_same(wanted, resumed(tmp_path / "run", settings))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_in_a_save(number, tmp_path, monkeypatch):
    settings = config(**SETTINGS)
    wanted, _ = uninterrupted(tmp_path / "whole", settings)
    save, saves = checkpoint.save, []

    def signalled(folder, *args, **options):
        saves.append(Path(folder).name)
        if len(saves) == 3:
            os.kill(os.getpid(), number)
        save(folder, *args, **options)

    monkeypatch.setattr(checkpoint, "save", signalled)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        trainer(tmp_path / "run", Stopper(), settings).run()
    monkeypatch.undo()
    assert len(saves) <= 4, "the save at hand is finished, and at most one follows"
    assert_same(wanted, resumed(tmp_path / "run", settings))


def without(value):
    """What a field holds where nobody restores it."""
    return {bool: False, int: 0, float: None, type(None): 0.5, list: []}[type(value)]


def changed(folder: Path, field: str) -> None:
    path = folder / "state.json"
    content = json.loads(path.read_text())
    state = content["state"]
    state[field] = not state[field] if field == "due" else without(state[field])
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def mid_run(tmp_path_factory):
    """A run stopped in the middle of a step of its second epoch, and one stopped in an evaluation."""
    settings = config(**{**SETTINGS, "dtype": "bfloat16"})
    folder = tmp_path_factory.mktemp("mid")
    wanted, calls = uninterrupted(folder / "whole", settings)
    found = {}
    for call in range(calls, 0, -1):
        stopped(folder / str(call), settings, call)
        state = checkpoint.load(folder / str(call) / "last")
        if state.state["due"]:
            found.setdefault("due", folder / str(call))
        elif state.tensors["gradients"] and state.state["step"] % 3:
            found.setdefault("window", folder / str(call))
        if len(found) == 2:
            break
    return settings, wanted, {**found, "whole": folder / "whole"}


FIELDS = [
    *("step", "epoch", "batch", "tokens", "warmup_end", "schedule_end", "best_loss", "val_loss", "due"),
    *("empty_batches", "evaluated_step", "log_bytes"),
]
# counters of what does not happen in this run; without them it is refused, which the next test shows
STILL = {
    "skipped_steps",
    "skipped_in_a_row",
    "nonfinite_steps",
    "best_score",
    "stale_evaluations",
    "halvings",
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_needed(field, mid_run, tmp_path):
    settings, wanted, folders = mid_run
    differ = []
    for kind, folder in folders.items():
        copy = tmp_path / kind
        shutil.copytree(folder, copy)
        assert_same(wanted, resumed(copy, settings))
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        changed(copy / "last", field)
        if resumed(copy, settings) != wanted:
            differ.append(kind)
    assert differ


def test_every_field_is_there_or_refused(mid_run, tmp_path):
    settings, _, folders = mid_run
    known = json.loads((folders["due"] / "last" / "state.json").read_text())["state"]
    assert set(known) == {*FIELDS, *STILL, "seconds", "scaler", "processes"}
    for field in known:
        copy = tmp_path / field
        shutil.copytree(folders["due"], copy)
        content = json.loads((copy / "last" / "state.json").read_text())
        del content["state"][field]
        (copy / "last" / "state.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=field):
            trainer(copy, Stopper(), settings).resume(copy)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        *[
            ("random", f"0.{when}.{name}")
            for when in ("now", "window")
            for name in ("torch", "numpy", "python")
        ],
        *[("losses", name) for name in ("window", "meter")],
        *[("gradients", "head.weight"), ("optimizer", "exp_avg."), ("optimizer", "exp_avg_sq.")],
        *[("optimizer", "step."), ("model", "head.weight")],
    ],
)
def test_every_tensor_is_needed(file, part, mid_run, tmp_path):
    settings, wanted, folders = mid_run
    shutil.copytree(folders["window"], tmp_path / "run")
    path = tmp_path / "run" / "last" / f"{file}.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if part in name]
    assert names, sorted(tensors)
    if file == "random":
        # of another place of the same generator
        torch.manual_seed(6)
        np.random.seed(6)
        random.seed(6)
        fresh = random_state()
        which = part.rpartition(".")[2]
        replacement = fresh[which]
        save_file({**tensors, part: replacement}, path)
    else:
        save_file({name: t * 0 if name in names else t for name, t in tensors.items()}, path)
    assert resumed(tmp_path / "run", settings) != wanted


def test_what_can_change_is_told_and_what_cannot_is_refused(tmp_path):
    stopped(tmp_path / "run", config(**SETTINGS), 9)
    longer = trainer(
        tmp_path / "run", Stopper(), config(**{**SETTINGS, "max_epochs": 3, "learning_rate": 0.5})
    )
    assert longer.resume(tmp_path / "run") == ["max_epochs: 2 -> 3", "learning_rate: 0.01 -> 0.5"]
    assert {group["initial_lr"] for group in longer.optimizer.param_groups} == {0.5}
    assert longer.optimizer.state_dict()["state"], "the averages stay"
    longer.run()
    assert longer.state.epoch == 3
    fixed = {"batch_size": 3, "accumulation_steps": 3, "seed": 4, "sampling": "replacement"}
    for name, value in fixed.items():
        changed = trainer(tmp_path / "run", Stopper(), config(**{**SETTINGS, name: value}))
        with pytest.raises(ConfigError, match=f"{name}={value!r}: a run that is resumed keeps its own"):
            changed.resume(tmp_path / "run")


def test_the_last_two_checkpoints_are_kept(tmp_path):
    run = trainer(tmp_path, Stopper(), config(**{**SETTINGS, "save_every": 1}))
    run.run()
    steps = {name: checkpoint.load(tmp_path / name).state["step"] for name in ("last", "last.previous")}
    assert steps == {"last": run.state.step, "last.previous": run.state.step - 1}
    shutil.rmtree(tmp_path / "last")
    assert checkpoint.find_latest(tmp_path).name == "last.previous"


def test_evaluation_does_not_change_the_run(tmp_path):
    weights = []
    for every in (1, 4):
        run = trainer(tmp_path / str(every), Stopper(), config(**{**SETTINGS, "eval_every": every}))
        run.run()
        weights.append(run.model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    stopped(tmp_path, config(**SETTINGS), 9)
    run = Trainer(nn.Linear(2, 2), Sentences(11), config(**SETTINGS), quiet=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        run.resume(tmp_path)


def test_time_goes_on(tmp_path):
    settings = config(**SETTINGS)
    stopped(tmp_path / "run", settings, 9)
    path = tmp_path / "run" / "last" / "state.json"
    content = json.loads(path.read_text())
    assert 0 < content["state"]["seconds"] < 900
    content["state"]["seconds"] = 1000.0
    path.write_text(json.dumps(content))
    before = len(records(tmp_path / "run"))
    resumed(tmp_path / "run", settings)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[before:]
    assert lines and all(1000 < json.loads(line)["time"] < 2000 for line in lines)
