"""`nlpfast plot`: a picture, its name on stdout, what was left out on stderr, exit codes."""

import sys
from pathlib import Path

import pytest

from nlpfast.cli import main

USAGE, DATA, OTHER = 2, 65, 1
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("first").mkdir()
    Path("first/log.jsonl").write_text('{"step": 0, "data": {}}\n{"step": 1, "loss": 2.0}\n')
    Path("second.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    Path("damaged").write_text('{"step": 1, "lo\n{"step": 2, "loss": 2.0}\n')
    Path("begun").write_text('{"step": 0, "data": {}}\n')
    return tmp_path


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def run(capsys, *argv):
    code = main(["plot", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_curves(folder, matplotlib, capsys):
    printed = "records                  2 of first\npicture                  a.png\n"
    assert run(capsys, "curves", "first", "--output", "a.png") == (0, printed, "")
    first = Path("a.png").read_bytes()
    assert first.startswith(PNG)
    code, out, err = run(capsys, "curves", "first", "second.jsonl", "--output", "a.png")
    assert code == 0 and out.splitlines() == [
        *("records                  2 of first", "records                  1 of second.jsonl"),
        "picture                  a.png",
    ]
    counts = "2 lines read, 1 used, 1 skipped (1 cut off at the end; first: second.jsonl:2)"
    assert err == f"nlpfast: second.jsonl: {counts}\n"
    # it takes the place of the one before, and has more in it
    again = Path("a.png").read_bytes()
    assert again.startswith(PNG) and again != first
    assert run(capsys, "curves", "first", "--output", "B.PNG")[0] == 0


BAD = [
    ([], USAGE, "ACTION"),
    (["heads"], USAGE, "heads"),
    (["curves", "first"], USAGE, "--output"),
    (["curves", "--output", "a.png"], USAGE, "RUN"),
    (["curves", "first", "--output", "a.pdf"], USAGE, "--output a.pdf: pictures are PNG files"),
    (["curves", "first", "--output", "no/a.png"], USAGE, "there is no folder no, create it first"),
    (["curves", "missing", "--output", "a.png"], DATA, "missing: no such file"),
    (["curves", ".", "--output", "a.png"], DATA, ".: no log.jsonl in it"),
    (["curves", "damaged", "--output", "a.png"], DATA, "damaged:1: not a record"),
    (["curves", "first", "begun", "--output", "a.png"], DATA, "begun: no figures in its log"),
]


@pytest.mark.parametrize(("argv", "code", "message"), BAD, ids=[" ".join(case[0]) or "-" for case in BAD])
def test_a_bad_invocation(argv, code, message, folder, capsys):
    before = sorted(folder.iterdir())
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, "")
    assert err.startswith("nlpfast: error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(folder.iterdir()) == before


def test_a_folder_is_not_replaced(folder, capsys):
    Path("a.png").mkdir()
    code, out, err = run(capsys, "curves", "first", "--output", "a.png")
    assert (code, out) == (USAGE, "") and "it is a folder, name a file" in err


def test_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = run(capsys, "curves", "first", "--output", "a.png")
    assert (code, out) == (OTHER, "") and "pip install 'nlpfast[plot]'" in err
    assert not Path("a.png").exists()


def test_help(capsys):
    for argv in ([], ["curves"]):
        assert main(["plot", *argv, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("usage: nlpfast plot") and err == ""
