"""The faults that trials inject happen, where and as they are asked for, and a trial always ends."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faults import ACTIONS, TrialServer


def write_and_rename(folder: str) -> int:
    """Make nine calls that change files; the error number of what failed, else 0."""
    file, final = Path(folder) / "new", Path(folder) / "final"
    try:
        with file.open("wb", buffering=0) as stream:
            for part in (b"0123456789", b"abcdefghij"):
                while part:
                    part = part[stream.write(part) :]
            os.fsync(stream.fileno())
        os.rename(file, final)
        (Path(folder) / "more").mkdir()
        folder_descriptor = os.open(folder, os.O_RDONLY)
        os.rmdir("more", dir_fd=folder_descriptor)
        os.truncate(final, 15)
    except OSError as error:
        return error.errno
    return 0


CALLS = ["open", "write", "write", "sync", "close", "rename", "mkdir", "unlink", "truncate"]


def test_calls_are_counted_with_their_paths(trials: TrialServer, tmp_path: Path) -> None:
    result = trials.run(write_and_rename, tmp_path, fault=(tmp_path, 0, "count"))
    assert result.code == 0, result.text
    assert [call.name for call in result.calls] == CALLS
    assert [call.bytes for call in result.calls if call.bytes] == [10, 10]
    paths = ["new"] * 5 + ["final", "more", "more", "final"]
    assert [call.path for call in result.calls] == [str(tmp_path / name) for name in paths]
    assert [call.renamed for call in result.calls if call.renamed] == [str(tmp_path / "new")]


def test_calls_elsewhere_are_not_counted(trials: TrialServer, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run2").mkdir()
    result = trials.run(write_and_rename, tmp_path / "run2", fault=(tmp_path / "run", 1, "EIO"))
    assert (result.code, result.calls) == (0, [])


@pytest.mark.parametrize("number", range(1, len(CALLS) + 1))
@pytest.mark.parametrize("action", ["kill before", "kill after"])
def test_killed_at_a_call(trials: TrialServer, tmp_path: Path, action: str, number: int) -> None:
    assert trials.run(write_and_rename, tmp_path, fault=(tmp_path, number, action)).code == -signal.SIGKILL
    done = number - (action == "kill before")
    content = [None, b"", b"0123456789", *[b"0123456789abcdefghij"] * 6, b"0123456789abcde"][done]
    file = tmp_path / ("new" if done < 6 else "final")
    assert (file.read_bytes() if file.exists() else None) == content
    assert (tmp_path / "more").exists() == (done == 7)


@pytest.mark.parametrize("number", range(1, len(CALLS) + 1))
@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "EROFS", "EDQUOT"])
def test_a_call_fails(trials: TrialServer, tmp_path: Path, action: str, number: int) -> None:
    result = trials.run(write_and_rename, tmp_path, fault=(tmp_path, number, action))
    assert result.code == getattr(errno, action)
    # a stream that could not write is closed all the same
    assert len(result.calls) == number + (CALLS[number - 1] in ("write", "sync"))


def test_short_writes(trials: TrialServer, tmp_path: Path) -> None:
    result = trials.run(write_and_rename, tmp_path, fault=(tmp_path, 2, "short write"))
    assert result.code == 0
    assert [call.bytes for call in result.calls if call.bytes] == [10, 5, 10]
    assert (tmp_path / "final").read_bytes() == b"0123456789abcde"


def fill(folder: str) -> None:
    """Print what still works: writing, making a folder, renaming, removing."""

    def works(call, *arguments) -> str:
        try:
            return str(call(*arguments))
        except OSError as error:
            return errno.errorcode[error.errno]

    old, moved = os.path.join(folder, "old"), os.path.join(folder, "moved")
    descriptor = os.open(os.path.join(folder, "new"), os.O_WRONLY | os.O_CREAT)
    for call, *arguments in (
        *((os.write, descriptor, b"01234567"), (os.write, descriptor, b"01234567")),
        *((os.writev, descriptor, [b"", b"012", b"3"]), (os.mkdir, os.path.join(folder, "more"))),
        *((os.rename, old, moved), (os.unlink, moved), (os.close, descriptor)),
    ):
        print(works(call, *arguments))


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ((0, "count"), "8 8 4 None None None None"),
        ((2, "disk full"), "4 ENOSPC ENOSPC ENOSPC None None None"),
        ((3, "quota exceeded"), "8 4 EDQUOT EDQUOT None None None"),
        ((4, "short write"), "8 8 2 None None None None"),
        ((3, "read-only"), "8 EROFS EROFS EROFS EROFS EROFS None"),
    ],
)
def test_faults_that_last(trials: TrialServer, tmp_path: Path, fault: tuple[int, str], outcome: str) -> None:
    (tmp_path / "old").write_text("x")
    assert trials.run(fill, tmp_path, fault=(tmp_path, *fault)).text.split() == outcome.split()


def test_signals_at_a_call(trials: TrialServer, tmp_path: Path) -> None:
    terminated = trials.run(write_and_rename, tmp_path, fault=(tmp_path, 6, "terminate"))
    assert terminated.code == -signal.SIGTERM
    assert (tmp_path / "new").exists()
    interrupted = trials.run(write_and_rename, tmp_path, fault=(tmp_path, 1, "interrupt"))
    assert "KeyboardInterrupt" in interrupted.text


def leave(code: int | str | None) -> None:
    raise SystemExit(code)


def stay(file: str) -> None:
    """Start another process that stays too."""
    print("staying", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; print('x', flush=True); time.sleep(600)"])
    Path(file).write_text(str(child.pid))
    threading.Event().wait()


def test_how_functions_end(trials: TrialServer) -> None:
    assert [trials.run(leave, code).code for code in (None, 0, 143, "text")] == [0, 0, 143, 1]
    failed = trials.run("os:mkdir", "/proc/nothing")
    assert failed.code == 1 and failed.text.startswith("Traceback") and "/proc/nothing" in failed.text
    # no failure of a function, or a trial that is to fail would pass without one
    for name, reason in (
        ("nowhere:nothing", "No module named 'nowhere'"),
        ("os:nothing", "has no attribute"),
    ):
        with pytest.raises(LookupError, match=reason):
            trials.run(name)


def test_killed_after_some_time(trials: TrialServer, tmp_path: Path) -> None:
    assert trials.run(stay, tmp_path / "pid", kill_after=0.2).code == -signal.SIGKILL
    assert trials.run(leave, 7, kill_after=60).code == 7


def test_limit_ends_a_trial_and_what_it_started(trials: TrialServer, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"stay ran for more than 3 s:\nstaying"):
        trials.run(stay, tmp_path / "pid", limit=3)
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"
    assert trials.run(leave, 7).code == 7


def end_the_server(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_lost_server_is_an_error(trials: TrialServer, tmp_path: Path) -> None:
    with TrialServer(tmp_path) as server:
        with pytest.raises(RuntimeError, match="the server of trials ended with -9"):
            server.run(end_the_server, server.process.pid)
        with pytest.raises(RuntimeError, match="ended with -9"):
            server.run(leave, 0)


def test_every_action_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [action for action in ACTIONS if f'"{action}"' not in text] == []
