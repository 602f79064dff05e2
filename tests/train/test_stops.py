"""Whole runs of the command line that are killed or told to stop anywhere, and what they go on to."""

import contextlib
import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from faults import TrialServer
from safetensors.torch import load_file

from nlpfast.cli import main
from nlpfast.models import gpt
from nlpfast.train import checkpoint, evaluation, language_model, trainer
from nlpfast.train import step as optimizer_step

RUN = [
    *("train", "lm", "--biographies", "8", "--n-layer", "1", "--n-embd", "8", "--n-head", "1", "--seed", "1"),
    *("--block-size", "8", "--max-steps", "12", "--eval-every", "4", "--log-every", "3", "--save-every", "2"),
    *("--eval-batches", "3", "--accumulation-steps", "2", "--batch-size", "2", "--dropout", "0.1"),
    *("--device", "cpu"),
]
# what differs between runs of the same bits
OTHERS = {"time", "tokens_per_second", "seconds", "log_bytes", "output_dir", "overwrite"}
KILLS, KILLS_OF_SOAK = 50, 1000


def call(*argv: str) -> int:
    """Run the command line; in a trial."""
    return main(argv)


def plain(content):
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key not in OTHERS}
    return content


def contents(folder: Path) -> dict:
    """All that a run leaves, but for the times and the folder's name."""
    found = {"log": [plain(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]}
    for name in ("last", "best"):
        found[name, "state"] = plain(json.loads((folder / name / "state.json").read_text()))
        for path in sorted((folder / name).glob("*.safetensors")):
            found |= {(name, path.name, key): tensor.tolist() for key, tensor in load_file(path).items()}
    return found


@pytest.fixture(scope="module")
def unstopped(trials: TrialServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, float]:
    """What an undisturbed run leaves, and how long it takes."""
    folder = tmp_path_factory.mktemp("unstopped")
    times = []
    for name in ("warm", "run"):
        start = time.monotonic()
        result = trials.run(call, *RUN, "--output-dir", folder / name)
        times.append(time.monotonic() - start)
        assert result.code == 0, result.text
    assert contents(folder / "warm") == contents(folder / "run")
    assert len(contents(folder / "run")) > 50
    return contents(folder / "run"), times[1]


def argv_to_go_on(folder: Path) -> list[str]:
    with contextlib.suppress(checkpoint.CheckpointError):
        checkpoint.find_latest(folder)
        return ["train", "lm", "--resume", str(folder)]
    return [*RUN, "--output-dir", str(folder), "--overwrite"]


def test_kills_at_any_instant(trials, unstopped, tmp_path, pytestconfig, capsys) -> None:
    wanted, seconds = unstopped
    instants = random.Random(0)
    soak = pytestconfig.getoption("--hypothesis-profile") == "soak"
    kills = runs = resumes = 0
    while kills < (KILLS_OF_SOAK if soak else KILLS):
        folder, result = tmp_path / str(runs), None
        while result is None or result.code != 0:
            argv = argv_to_go_on(folder)
            result = trials.run(call, *argv, kill_after=instants.uniform(0, 0.9 * seconds))
            assert result.code in (0, -signal.SIGKILL), result.text
            kills += result.code != 0
            resumes += argv[2] == "--resume"
        assert contents(folder) == wanted
        runs += 1
    with capsys.disabled():
        print(f"\n{kills} kills, {resumes} times resumed, {runs} runs ended bit for bit")
    assert resumes > kills / 3


# where a signal comes: the module or class, its function, and which call of it
PLACES = {
    "reading": (language_model, "split_tokens", 1),
    "building": (gpt.GPT, "__init__", 1),
    "first batch": (gpt.GPT, "forward", 1),
    "in a step": (gpt.GPT, "forward", 10),
    "between batches": (optimizer_step.OptimizerStep, "_weighted", 10),
    "clipping": (optimizer_step.OptimizerStep, "_step", 5),
    "evaluation": (evaluation.Evaluation, "loss", 2),
    "saving": (checkpoint, "save", 3),
    "renaming": (checkpoint, "_take_place", 4),
    "last evaluation": (evaluation.Evaluation, "loss", 3),
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


def signalled(place: str, numbers: list[int], folder: str) -> int:
    """Train, and send this process a signal at a place, and a second one when it is about to save."""
    owner, name, which = PLACES[place]
    function, calls = getattr(owner, name), []

    @functools.wraps(function)
    def sending(*args, **options):
        calls.append(None)
        if len(calls) == which:
            os.kill(os.getpid(), numbers[0])
        return function(*args, **options)

    setattr(owner, name, sending)
    if len(numbers) > 1:
        leave = trainer.Trainer._leave

        def twice(run):
            os.kill(os.getpid(), numbers[1])
            leave(run)

        trainer.Trainer._leave = twice
    return main([*RUN, "--output-dir", folder])


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("place", PLACES)
def test_signals_in_any_phase(place, number, trials, unstopped, tmp_path) -> None:
    result = trials.run(signalled, place, [number], tmp_path / "run")
    assert result.code == CODES[number], result.text
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert result.text.splitlines()[-1] == f"nlpfast: error: {word}"
    assert "Traceback" not in result.text
    if place in ("reading", "building"):
        assert not (tmp_path / "run").exists()
    else:
        assert "go" in result.text.splitlines()[-2]
        assert checkpoint.find_latest(tmp_path / "run").name == "last"
    again = trials.run(call, *argv_to_go_on(tmp_path / "run"))
    assert again.code == 0, again.text
    assert contents(tmp_path / "run") == unstopped[0]


def all_signalled(number: int, folder: str) -> int:
    """Train with processes that load, and send all of them a signal in a step, as a terminal does."""
    forward, calls = gpt.GPT.forward, []

    def sending(*args, **options):
        calls.append(None)
        if len(calls) == 10:
            # from outside: a worker of PyTorch's takes it in another way from its parent
            sender = os.fork()
            if sender == 0:
                os.killpg(0, number)
                os._exit(0)
            os.waitpid(sender, 0)
        return forward(*args, **options)

    gpt.GPT.forward = sending
    return main([*RUN, "--num-workers", "2", "--output-dir", folder])


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_to_loading_processes_too(number, trials, unstopped, tmp_path) -> None:
    result = trials.run(all_signalled, number, tmp_path / "run")
    assert result.code == CODES[number], result.text
    assert "Traceback" not in result.text and "worker" not in result.text
    again = trials.run(call, *argv_to_go_on(tmp_path / "run"), "--num-workers", "0")
    assert again.code == 0, again.text
    assert contents(tmp_path / "run") == unstopped[0]


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_second_signal_ends_at_once(number, trials, unstopped, tmp_path) -> None:
    result = trials.run(signalled, "in a step", [number, signal.SIGTERM], tmp_path / "run")
    assert result.code == CODES[number], result.text
    assert "stopped after step" not in result.text
    again = trials.run(call, *argv_to_go_on(tmp_path / "run"))
    assert again.code == 0, again.text
    assert contents(tmp_path / "run") == unstopped[0]


@pytest.mark.parametrize("action", ["terminate", "interrupt"])
def test_signals_at_calls_of_saves(action, trials, unstopped, tmp_path) -> None:
    calls = trials.run(
        call, *RUN, "--output-dir", tmp_path / "count", fault=(tmp_path / "count", 0, "count")
    ).calls
    for number in range(5, len(calls), len(calls) // 5):
        folder = tmp_path / str(number)
        result = trials.run(call, *RUN, "--output-dir", folder, fault=(folder, number, action))
        assert result.code == {"terminate": 143, "interrupt": 130}[action], result.text
        again = trials.run(call, *argv_to_go_on(folder))
        assert again.code == 0, again.text
        assert contents(folder) == unstopped[0]


@pytest.mark.parametrize("action", ["ENOSPC", "EROFS", "disk full"])
def test_a_save_that_fails_ends_the_run_and_names_the_file(action, trials, unstopped, tmp_path) -> None:
    folder = tmp_path / "run"
    calls = trials.run(
        call, *RUN, "--output-dir", tmp_path / "count", fault=(tmp_path / "count", 0, "count")
    ).calls
    wheres = [
        n for n, one in enumerate(calls, 1) if one.name in ("write", "mkdir") and "last.partial" in one.path
    ]
    result = trials.run(call, *RUN, "--output-dir", folder, fault=(folder, wheres[len(wheres) // 2], action))
    assert result.code == 1, result.text
    assert str(folder / "last") in result.text.splitlines()[-1]
    assert "the previous one is still good" in result.text
    again = trials.run(call, *argv_to_go_on(folder))
    assert again.code == 0, again.text
    assert contents(folder) == unstopped[0]
