"""The cache of tokens: whole entries only, whatever happens to those who build them."""

import errno
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import warnings

import numpy as np
import pytest
from forked import run_forked

from nlpfast.data import token_cache
from nlpfast.data.token_cache import MappedTokens, default_folder, load, store

KEY = "characters-1-abc"
NOTES = {"characters": "ab\n\U0001f600", "lines": 7}
TOKENS = np.random.default_rng(0).integers(0, 60_000, 10_000).astype("<u2")


def blocks():
    return np.array_split(TOKENS, 7)


def put(folder, key=KEY, tokens=blocks):
    return store(key, NOTES, "<u2", len(TOKENS), tokens, folder)


def check(entry):
    assert entry.notes == NOTES and entry.tokens.dtype == np.uint16
    assert np.array_equal(entry.tokens, TOKENS)
    assert not entry.tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        entry.tokens[0] = 1


def names(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_an_entry_is_found_again(tmp_path):
    folder = tmp_path / "a" / "b"
    assert load(KEY, folder) is None
    check(put(folder))
    assert names(folder) == [f"{KEY}.tokens"]
    entry = load(KEY, folder)
    check(entry)
    assert entry.tokens.offset % 64 == 0
    assert load("characters-1-abd", folder) is None
    # another entry takes its place, and who has the old one keeps it
    store(KEY, {}, "<u1", 3, lambda: [np.arange(3, dtype=np.uint8)], folder)
    assert load(KEY, folder).tokens.tolist() == [0, 1, 2]
    check(entry)


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
def test_types_come_back(tmp_path, dtype):
    tokens = np.array([0, 255, np.iinfo(dtype).max], dtype=dtype)
    entry = store("key", {}, dtype, 3, lambda: [tokens[:1], tokens[1:]], tmp_path)
    assert entry.tokens.dtype == np.dtype(dtype) and np.array_equal(entry.tokens, tokens)


def damages():
    whole = token_cache._header(KEY, NOTES, "<u2", len(TOKENS)) + TOKENS.tobytes()
    start = len(whole) - TOKENS.nbytes
    for size in (0, 1, 16, 94, 95, 96, start - 1, start, start + 1, len(whole) - 1):
        yield f"of {size} bytes", whole[:size]
    yield "longer", whole + b"\0"
    for place in (0, 15, 17, 50, 82, 90, 94, 95, 120, start - 1):
        yield f"byte {place}", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    yield "zeros", bytes(len(whole))
    yield "another key", token_cache._header(KEY[:-1] + "d", NOTES, "<u2", len(TOKENS)) + TOKENS.tobytes()
    yield "another version", whole.replace(b"tokens 1", b"tokens 2", 1)


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in damages()])
def test_a_damaged_entry_is_built_again(tmp_path, caplog, data):
    path = tmp_path / f"{KEY}.tokens"
    path.write_bytes(data)
    assert load(KEY, tmp_path) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{path}: not a whole cache entry (it")
    check(put(tmp_path))
    check(load(KEY, tmp_path))


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_block(number):
    def tokens():
        for index, block in enumerate(blocks()):
            if index == number:
                kill()
            yield block

    return lambda folder, _: put(folder, tokens=tokens)


def killed_at(module, name, before):
    """Kill at a call of the system, before or after it is done."""

    def action(folder, patch):
        real = getattr(module, name, open)

        def call(*arguments, **options):
            if not before:
                real(*arguments, **options)
            kill()

        patch.setattr(module, name, call, raising=False)
        put(folder)

    return action


KILLS = [(f"block {i}", killed_in_block(i), False) for i in range(7)] + [
    ("before making the file", killed_at(token_cache, "open", True), False),
    ("after making the file", killed_at(token_cache, "open", False), False),
    ("before syncing", killed_at(os, "fsync", True), False),
    ("after syncing", killed_at(os, "fsync", False), False),
    ("before renaming", killed_at(os, "replace", True), False),
    ("after renaming", killed_at(os, "replace", False), True),
    ("at syncing the folder", killed_at(token_cache, "flush", True), True),
]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(("action", "there"), [pytest.param(*rest, id=name) for name, *rest in KILLS])
def test_a_builder_that_is_killed_leaves_no_entry_or_a_whole_one(tmp_path, action, there, earlier):
    path = tmp_path / f"{KEY}.tokens"
    if earlier:
        path.write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        code, _, _ = run_forked(lambda: action(tmp_path, patch), tmp_path)
    assert code == -signal.SIGKILL
    left = [name for name in names(tmp_path) if name.endswith(".partial")]
    assert len(left) <= 1
    entry = load(KEY, tmp_path)
    assert (entry is not None) == there and path.exists() == (there or earlier)
    # whoever builds next removes what was left
    put(tmp_path, "other")
    check(put(tmp_path))
    assert names(tmp_path) == [f"{KEY}.tokens", "other.tokens"]
    check(load(KEY, tmp_path))


def test_an_interrupted_builder_tidies_up(tmp_path):
    def tokens():
        yield TOKENS[:50]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, tokens=tokens)
    assert names(tmp_path) == []


@pytest.mark.parametrize("given", [9_999, 10_001])
def test_another_number_of_tokens_is_an_error(tmp_path, given):
    with pytest.raises(ValueError, match=r"it has .* bytes, not"):
        put(tmp_path, tokens=lambda: [np.zeros(given, "<u2")])
    assert names(tmp_path) == []


def test_the_entry_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    events = []

    def fsync(handle, real=os.fsync):
        path = os.readlink(f"/proc/self/fd/{handle}")
        whole = os.path.getsize(path) > TOKENS.nbytes if os.path.isfile(path) else None
        events.append(("sync", path.rpartition(".")[2] if whole else path))
        real(handle)

    def replace(source, target, real=os.replace):
        events.append(("rename", str(target)))
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    put(tmp_path)
    path = str(tmp_path / f"{KEY}.tokens")
    assert events == [("sync", "partial"), ("rename", path), ("sync", str(tmp_path))]


def test_litter_goes_when_its_process_is_gone_or_it_is_old(tmp_path):
    _, printed, _ = run_forked(lambda: print(os.getpid()), tmp_path)
    host, dead, alive = socket.gethostname(), int(printed), os.getppid()
    old = time.time() - token_cache.OLD - 60
    cases = {
        f"k.{dead}@{host}.abc_1.partial": (None, False),
        f"k.{alive}@{host}.abc_2.partial": (None, True),
        f"k.{os.getpid()}@{host}.abc_3.partial": (None, True),
        f"k.1@{host}.abc_4.partial": (None, True),
        f"k.{alive}@{host}.abc_5.partial": (old, False),
        f"k.{dead}@elsewhere.net.abc_6.partial": (None, True),
        f"k.{dead}@elsewhere.net.abc_7.partial": (old, False),
        "mine.partial": (old, True),
        "k.x.tokens": (old, True),
    }
    for name, (changed, _) in cases.items():
        (tmp_path / name).write_bytes(b"")
        if changed is not None:
            os.utime(tmp_path / name, (changed, changed))
    put(tmp_path)
    kept = {name for name, (_, stays) in cases.items() if stays}
    assert set(names(tmp_path)) == kept | {f"{KEY}.tokens"}


def build_at_once(folder, barrier, results):
    def tokens():
        # all have begun, and none is done
        barrier.wait(60)
        yield from blocks()

    for round_ in range(5):
        entry = store(f"key{round_}", NOTES, "<u2", len(TOKENS), tokens, folder)
        results.put(np.array_equal(entry.tokens, TOKENS) and MappedTokens.of(entry.tokens) is not None)


def test_builders_at_once_all_end_with_a_good_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    builders = [context.Process(target=build_at_once, args=(tmp_path, barrier, results)) for _ in range(3)]
    with warnings.catch_warnings():
        # Python 3.12 warns of any thread, and PyTorch has some
        warnings.simplefilter("ignore", DeprecationWarning)
        for builder in builders:
            builder.start()
    assert [results.get(timeout=60) for _ in range(15)] == [True] * 15
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert names(tmp_path) == [f"key{i}.tokens" for i in range(5)]
    for i in range(5):
        check(load(f"key{i}", tmp_path))


def test_a_removed_cache_leaves_open_entries(tmp_path):
    entry = put(tmp_path)
    (tmp_path / f"{KEY}.tokens").unlink()
    check(entry)
    with pytest.raises(FileNotFoundError):
        MappedTokens.of(entry.tokens).open()


def full(monkeypatch, folder):
    """Let the disk of a folder be full after two blocks."""
    real = token_cache._write

    def write(file, header, tokens):
        def until_full():
            yield from itertools.islice(tokens(), 2)
            raise OSError(errno.ENOSPC, "No space left on device")

        name = file.name if isinstance(file.name, str) else os.readlink(f"/proc/self/fd/{file.fileno()}")
        real(file, header, until_full if name.startswith(str(folder)) else tokens)

    monkeypatch.setattr(token_cache, "_write", write)


def unwritable(kind, folder, monkeypatch):
    if kind == "a file is in the way":
        folder.write_text("")
        return "File exists"
    if kind == "a file is above":
        folder.parent.write_text("")
        return "Not a directory"
    if kind == "read-only":

        def opened(path, mode):
            if "x" in mode:
                raise OSError(errno.EROFS, "Read-only file system")
            return open(path, mode)

        monkeypatch.setattr(token_cache, "open", opened, raising=False)
        return "Read-only file system"
    full(monkeypatch, folder)
    return "No space left on device"


@pytest.mark.parametrize("kind", ["a file is in the way", "a file is above", "read-only", "full"])
def test_without_a_cache_there_is_a_temporary_file(tmp_path, caplog, monkeypatch, kind):
    folder = tmp_path / "above" / "cache" if kind == "a file is above" else tmp_path / "cache"
    reason = unwritable(kind, folder, monkeypatch)
    assert load(KEY, folder) is None
    assert not caplog.records
    entry = put(folder)
    check(entry)
    assert MappedTokens.of(entry.tokens) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"{folder}: the cache cannot be written ({reason}), using a temporary file; "
        "set XDG_CACHE_HOME to a folder that can be"
    )
    assert not folder.is_dir() or names(folder) == []
    # the tokens stay while there is someone who has them
    assert np.array_equal(pickle.loads(pickle.dumps(entry.tokens)), TOKENS)


def test_without_any_file_there_is_memory(tmp_path, caplog, monkeypatch):
    def refuse():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    full(monkeypatch, tmp_path)
    check(put(tmp_path))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert caplog.records[1].message == (
        "no temporary file (No usable temporary directory found), using memory; set TMPDIR"
    )
    with pytest.raises(ValueError, match=f"{KEY}: 20000 tokens came, count=10000"):
        put(tmp_path, tokens=lambda: [*blocks(), TOKENS])


def test_a_folder_that_cannot_be_synced_is_no_matter(tmp_path, caplog, monkeypatch):
    def refuse(handle, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    check(put(tmp_path))
    assert not caplog.records and names(tmp_path) == [f"{KEY}.tokens"]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/nlpfast"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/nlpfast"),
        # the standard has relative paths ignored
        ({"XDG_CACHE_HOME": "x", "HOME": "/h"}, "/h/.cache/nlpfast"),
        ({"HOME": "/h"}, "/h/.cache/nlpfast"),
    ],
)
def test_the_default_folder(monkeypatch, variables, folder):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(default_folder()) == folder


def test_a_slice_of_a_map_is_found_in_its_file(tmp_path):
    whole = put(tmp_path).tokens
    for part in (whole, whole[5:], whole[17:99], whole[10:20][3:], np.asarray(whole)[7:], whole[3:4]):
        mapped = MappedTokens.of(part)
        assert mapped.path == str(tmp_path / f"{KEY}.tokens")
        assert np.array_equal(mapped.open(), part) and not mapped.open().flags.writeable
        assert pickle.loads(pickle.dumps(mapped)) == mapped
    for other in (TOKENS, whole[::2], whole[::-1], whole.astype("<u4"), np.array(whole)):
        assert MappedTokens.of(other) is None
