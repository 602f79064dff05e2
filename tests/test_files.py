"""A file is replaced by a whole one, or stays as it was: at every call that can fail, and at every signal."""

import os
import signal
import stat
from pathlib import Path

import pytest
from forked import run_forked

from nlpfast.files import flush, replacing

FULL = OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=[None, b"old"], ids=["a new file", "an old file"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the path of a file, that is there or not."""
    found = tmp_path / "results.json"
    if request.param is not None:
        found.write_bytes(request.param)
    return found


def is_untouched(path: Path) -> bool:
    there = [path.name] if path.exists() else []
    return names(path.parent) == there and (not there or path.read_bytes() == b"old")


def test_the_file_is_there_when_the_block_is_done_and_not_before(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        part = Path(file.name)
        assert part.parent == path.parent and part.read_bytes() == b"new"
        assert not path.exists() or path.read_bytes() == b"old"
        assert part.name.startswith(".results.json.")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["results.json"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3), FULL])
def test_an_exception_in_the_block_leaves_what_was_there(error: BaseException, path: Path) -> None:
    with pytest.raises(type(error)), replacing(path) as file:
        file.write(b"new")
        raise error
    assert is_untouched(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_call_of_the_system_that_fails(call: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise FULL

    monkeypatch.setattr(os, call, fail)
    message = r"results\.json: cannot be written \(No space left on device\); free some space or name another"
    with pytest.raises(OSError, match=message), replacing(path) as file:
        file.write(b"new")
    assert is_untouched(path)


def test_a_disk_that_is_full_when_the_buffer_is_written(path: Path) -> None:
    with pytest.raises(OSError, match=r"results\.json: cannot be written"), replacing(path) as file:
        file.write(b"new")
        # nothing can be written there, as on a disk that has no space
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        os.close(full)
    assert is_untouched(path)


def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_folder_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        status = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else f"file of {status.st_size}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with replacing(path) as file:
        file.write(b"12345")
    assert done == ["file of 5", "rename", "folder"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/file", "No such file or directory"),
        ("plain/file", "Not a directory"),
        ("folder", "it is a folder or a device"),
        ("/dev/null", "it is a folder or a device"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_replaced(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain").write_text("mine")
    Path("folder").mkdir()
    before = names(tmp_path)
    with pytest.raises(OSError) as caught, replacing(name) as file:
        file.write(b"new")
    assert str(caught.value).startswith(f"{name}: cannot be written ({reason})")
    assert names(tmp_path) == before and names(tmp_path / "folder") == []
    assert Path("plain").read_text() == "mine" and not Path("/dev/null").is_file()


def test_permissions_are_kept_and_a_new_file_has_the_usual_ones(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        with replacing(path) as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    with replacing(path) as file:
        file.write(b"newer")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to(target)
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert names(target.parent) == ["file"]


def test_two_writers_of_a_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_kill_at_any_call_leaves_the_old_or_the_new_file(
    call: str, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    was_there, process = path.exists(), os.getpid()

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        assert os.getpid() != process
        if call != "write":
            setattr(os, call, die)
        with replacing(path) as file:
            file.write(b"new")
            if call == "write":
                die()

    assert run_forked(write, tmp_path_factory.mktemp("printed"))[0] == -signal.SIGKILL
    assert path.exists() == was_there and (not was_there or path.read_bytes() == b"old")


def test_flush_takes_files_and_folders_and_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("new")
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path, tmp_path / "file"):
        flush(path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "missing")
    assert os.listdir("/proc/self/fd") == before
