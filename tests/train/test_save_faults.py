"""A save that is killed or fails at any call leaves a whole checkpoint, and the next save works."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Call, Result, TrialServer

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.train import checkpoint

FAILED = 3
NUMBER_OF = {"trials": 0}


def build(generation: int) -> tuple[GPT, torch.optim.Optimizer]:
    """Return a model and an optimizer whose every number is that of a generation; 0 is not saved."""
    torch.manual_seed(generation)
    model = GPT(GPTConfig(5, 8, n_layer=1, n_head=2, n_embd=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (generation + 1))
    for _ in range(generation):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


# made once, here and in the server of trials
SAVED = [build(generation) for generation in range(6)]


def save(folder: str, generation: int, options: dict[str, Any]) -> int:
    """Save a generation; run in a trial."""
    plain = {"generation": generation}
    try:
        checkpoint.save(folder, *SAVED[generation], plain, plain, metadata=plain, **options)
    except OSError as error:
        print(error)
        return FAILED
    return 0


def tensors(model: GPT, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict().items()
    content = optimizer.state_dict()
    yield "lr", torch.tensor(content["param_groups"][0]["lr"])
    for index, slots in content["state"].items():
        for slot, value in slots.items():
            yield f"{index}.{slot}", value


def found(folder: Path) -> int:
    """Return the generation that loads, all of it; 0 for no checkpoint."""
    try:
        checkpoint.find(folder)
    except checkpoint.CheckpointError:
        return 0
    model, optimizer = build(0)
    content = checkpoint.load(folder, model, optimizer)
    generation = content.metadata["generation"]
    assert content.state["generation"] == content.config["generation"] == generation
    loaded, expected = dict(tensors(model, optimizer)), dict(tensors(*SAVED[generation]))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), f"{name} is not of generation {generation}"
    return generation


def tree(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


# What is saved already, and how.
STARTS = {"first save": (0, {}), "second save": (1, {}), "third save": (2, {"keep_previous": True})}


class Trials:
    """Runs that have saved `before` generations; how one looks without faults, and its calls."""

    def __init__(self, server: TrialServer, folder: Path, before: int, options: dict[str, Any]) -> None:
        self.server, self.folder, self.before, self.options = server, folder, before, options
        self.saved, clean = folder / "saved", folder / "clean"
        self.saved.mkdir()
        for generation in range(1, before + 1):
            save(str(self.saved / "last"), generation, options)
        shutil.copytree(self.saved, clean)
        result = self.save(clean, before + 1, 0, "count")
        self.calls, self.names = result.calls, tree(clean)
        assert self.save(clean, before + 2, 0, "count").code == 0
        self.names |= tree(clean)

    def run(self) -> Path:
        """Return the folder of a run that has saved what is saved already."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.saved, run)
        return run

    def save(self, run: Path, generation: int, number: int, action: str) -> Result:
        NUMBER_OF["trials"] += 1
        return self.server.run(save, run / "last", generation, self.options, fault=(run, number, action))

    def check(self, run: Path, result: Result, before: int, generation: int) -> int:
        """Return the generation that is there after a save of `generation` that was killed or failed."""
        now = found(run / "last")
        assert now in (before, generation)
        if result.code == 0:
            assert now == generation, "saved, it says"
        elif result.code != -9:
            assert result.code == FAILED, result.text
            assert str(run / "last") in result.text, "the message names the checkpoint"
        return now

    def check_next(self, run: Path, generation: int) -> None:
        """Save once more, with nothing in the way."""
        assert save(str(run / "last"), generation, self.options) == 0
        assert found(run / "last") == generation
        assert tree(run) <= self.names, "something was left over"


@pytest.fixture(scope="module", params=STARTS)
def at(request, trials: TrialServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    start, number = time.monotonic(), NUMBER_OF["trials"]
    yield Trials(trials, tmp_path_factory.mktemp("runs").resolve(), *STARTS[request.param])
    print(f"\n{request.param}: {NUMBER_OF['trials'] - number} saves in {time.monotonic() - start:.0f} s")


@pytest.mark.parametrize(
    "action", ["kill before", "kill after", "EIO", "disk full", "quota exceeded", "read-only", "short write"]
)
def test_save_that_fails_at_any_call(at: Trials, action: str) -> None:
    before, outcomes = at.before, set()
    for number, call in enumerate(at.calls, 1):
        # killed after a call is killed before the next, but at the end and where that is not seen
        if action == "kill after" and call.name != "write" and number < len(at.calls):
            continue
        if action in ("short write", "quota exceeded") and call.name != "write":
            continue
        run = at.run()
        result = at.save(run, before + 1, number, action)
        where = f"{action} at call {number}, {call.name} {call.path}, exit code {result.code}: {result.text}"
        try:
            now = at.check(run, result, before, before + 1)
            can_remove = action != "read-only" and (action, call.name) != ("EIO", "unlink")
            if result.code == FAILED and now == before and can_remove:
                assert tree(run) == tree(at.saved), "not as it was"
            at.check_next(run, before + 2)
        except Exception as error:
            pytest.fail(f"{where}\n{type(error).__name__}: {error}")
        outcomes.add((result.code, now))
    if action.startswith("kill"):
        assert outcomes == {(-9, before), (-9, before + 1)}
    elif action == "short write":
        assert outcomes == {(0, before + 1)}
    else:
        assert (FAILED, before) in outcomes


def test_two_saves_in_a_row_are_killed(at: Trials) -> None:
    before, calls = at.before, len(at.calls)
    for number in range(1, calls + 1):
        run = at.run()
        at.save(run, before + 1, number, "kill before")
        first = found(run / "last")
        # another place each time; the second save may have more to tidy up, and so more calls
        second_number = 1 + 7 * number % calls
        result = at.save(run, before + 2, second_number, "kill before")
        second = at.check(run, result, first, before + 2)
        assert before <= first <= second, f"killed at {number} and {second_number}"
        at.check_next(run, before + 3)


def test_every_byte_is_seen(at: Trials) -> None:
    run = at.run()
    result = at.save(run, at.before + 1, 0, "count")
    size = sum(path.stat().st_size for path in (run / "last").rglob("*"))
    assert sum(call.bytes for call in result.calls) == size


class Disk:
    """What a power cut would lose after some calls: contents and entries that no sync has reached."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.folders: set[str] = set()
        self.moved: set[str] = set()

    def change(self, call: Call) -> None:
        path, parent = call.path, str(Path(call.path).parent)
        if call.name == "sync":
            for lost in (self.files, self.folders, self.moved):
                lost.discard(path)
        elif call.name in ("write", "truncate"):
            self.files.add(path)
        elif call.name == "close" and path not in self.files:
            # safetensors has renamed what it wrote
            self.files = {path if Path(file).name.startswith(".tmp") else file for file in self.files}
        elif call.name == "rename":
            inside = [lost for lost in self.files | self.folders if f"{lost}/".startswith(f"{call.renamed}/")]
            assert not inside, f"{call.renamed} is renamed before {inside} are on the disk"
            self.moved |= {parent, str(Path(call.renamed).parent)}
        elif call.name == "unlink":
            assert not self.moved - {parent}, f"{path} goes before renames in {self.moved} are on the disk"
        if call.name in ("open", "mkdir", "rename"):
            self.folders.add(parent)


def test_all_is_on_the_disk_before_it_takes_its_place(at: Trials) -> None:
    disk = Disk()
    for call in at.calls:
        disk.change(call)
    assert not disk.files and not disk.moved
    assert any(call.name == "rename" and call.path.endswith("/last") for call in at.calls)
