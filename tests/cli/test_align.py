"""`nlpfast align`: figures and alignments on stdout, everything else on stderr, exit codes."""

import sys
from pathlib import Path

import pytest

from nlpfast.cli import main

USAGE, DATA, OTHER = 2, 65, 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hyp").write_text("0-0 1-1 2-2\n0-0\n")
    Path("gold").write_text("0-0 1p1\n0-0 3?3\n")
    Path("gold1").write_text("1-1 2p2\n1-1 4p4\n")
    Path("three").write_text("0-0\n\n0-0\n")
    Path("none").write_text("\n\n")
    Path("bad").write_text("0-0\n0-0 1-\n")
    Path("zero").write_text("1-1\n2-2 0-1\n")
    Path("twice").write_text("0-0 0-0 1-1\n0-0\n")
    Path("fwd").write_text("0-0 1-1 4-3 2-0\n0-1 3-2\n")
    Path("rev").write_text("0-0 1-1 2-1 4-4\n0-1\n")
    Path("rev.swapped").write_text("0-0 1-1 1-2 4-4\n1-0\n")
    Path("src").write_text("a b c\n\nb a\n" * 20)
    Path("tgt").write_text("A B C\nX\nB A\n" * 20)
    return tmp_path


def run(capsys, *argv):
    code = main(["align", *argv])
    out, err = capsys.readouterr()
    return code, out, err


SCORE = "AER        16.67\nprecision  75.00\nrecall     100.00\nlinks      4\nsentences  2\n"


def test_score(folder, capsys):
    """By hand: A has 4 links, S 2, all found; 3 of the 4 are possible: 1 - (2 + 3) / (4 + 2)."""
    assert run(capsys, "score", "hyp", "--gold", "gold") == (0, SCORE, "")
    assert run(capsys, "score", "hyp", "--gold", "gold1", "--gold-one-based") == (0, SCORE, "")
    assert run(capsys, "score", "hyp", "--gold", "gold1")[1] != SCORE


def test_score_of_the_other_direction(folder, capsys):
    Path("here").write_text("0-1\n2-0\n")
    Path("there").write_text("1-0\n0-2\n")
    right = run(capsys, "score", "here", "--gold", "here")[1]
    assert right.startswith("AER        0.00\n")
    assert run(capsys, "score", "there", "--gold", "here", "--target-source")[1] == right
    assert run(capsys, "score", "there", "--gold", "here")[1].startswith("AER        100.00\n")


def test_links_that_come_twice_are_told(folder, capsys):
    code, out, err = run(capsys, "score", "twice", "--gold", "gold")
    assert code == 0 and "links      3\n" in out
    assert err == "nlpfast: twice: links that come twice in their line, counted once: 1\n"
    code, out, err = run(capsys, "symmetrize", "twice", "twice")
    assert (code, out) == (0, "0-0 1-1\n0-0\n") and err.count("counted once: 1\n") == 2


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("intersection", "0-0 1-1", "0-1"),
        ("union", "0-0 1-1 2-0 2-1 4-3 4-4", "0-1 3-2"),
        ("grow-diag", "0-0 1-1 2-1", "0-1"),
        ("grow-diag-final", "0-0 1-1 2-1 4-3 4-4", "0-1 3-2"),
        ("grow-diag-final-and", "0-0 1-1 2-1 4-3", "0-1 3-2"),
    ],
)
def test_symmetrize(method, first, second, folder, capsys):
    lines = f"{first}\n{second}\n"
    assert run(capsys, "symmetrize", "fwd", "rev", "--method", method) == (0, lines, "")
    argv = ("symmetrize", "fwd", "rev.swapped", "--target-source", "--method", method)
    assert run(capsys, *argv) == (0, lines, "")
    if method == "grow-diag-final-and":
        assert run(capsys, "symmetrize", "fwd", "rev") == (0, lines, "")


def test_a_direction_that_is_read_the_wrong_way_round_is_told(folder, capsys):
    code, out, err = run(capsys, "symmetrize", "fwd", "rev.swapped")
    assert code == 0 and out.count("\n") == 2
    assert err == (
        "nlpfast: warning: 2 links agree, and 3 would with rev.swapped read the other way round; "
        "add --target-source?\n"
    )
    err = run(capsys, "symmetrize", "fwd", "rev", "--target-source")[2]
    assert "rev read the other way round; leave out --target-source?" in err


@pytest.mark.parametrize("model", ["eflomal", "fast_align"])
def test_train(model, folder, capsys):
    pytest.importorskip("thot")
    code, out, err = run(capsys, "train", "src", "tgt", "--model", model)
    assert code == 0
    assert out == "0-0 1-1 2-2\n\n0-0 1-1\n" * 20
    assert err == "nlpfast: 20 of 60 sentences without links, as a side is empty; the first src:2\n"
    Path("made").write_text(out)
    assert run(capsys, "score", "made", "--gold", "made")[1].startswith("AER        0.00\n")


BAD = [
    ([], USAGE, "ACTION"),
    (["glue"], USAGE, "glue"),
    (["score", "hyp"], USAGE, "--gold"),
    (["score", "--gold", "gold"], USAGE, "HYP"),
    (["symmetrize", "fwd"], USAGE, "REV"),
    (["symmetrize", "fwd", "rev", "--method", "grow"], USAGE, "--method: invalid choice: 'grow'"),
    (["train", "src"], USAGE, "TGT"),
    (["train", "src", "tgt", "--model", "giza"], USAGE, "--model: invalid choice: 'giza'"),
    (["score", "missing", "--gold", "gold"], DATA, "missing: no such file"),
    (["score", "hyp", "--gold", "."], DATA, ".: is a folder"),
    (["score", "bad", "--gold", "gold"], DATA, "bad:2:5: '1-' is not a link"),
    (["score", "gold", "--gold", "gold"], DATA, "gold:1:5: '1p1' is a possible link"),
    (["score", "hyp", "--gold", "zero", "--gold-one-based"], DATA, "zero:2:5: 0-1 has word 0"),
    (["score", "hyp", "--gold", "three"], DATA, "hyp has 2 lines, three has 3"),
    (["score", "none", "--gold", "none"], DATA, "none: no links in it"),
    (["symmetrize", "fwd", "three"], DATA, "fwd has 2 lines, three has 3"),
    (["symmetrize", "fwd", "bad"], DATA, "bad:2:5: "),
    (["train", "src", "hyp"], DATA, "src has 60 lines, hyp has 2"),
    (["train", "src", "missing"], DATA, "missing: no such file"),
]


@pytest.mark.parametrize(("argv", "code", "message"), BAD, ids=[" ".join(case[0]) or "-" for case in BAD])
def test_a_bad_invocation(argv, code, message, folder, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, "")
    assert err.startswith("nlpfast: error: ") and err.count("\n") == 1
    assert message in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_without_the_aligner(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "thot", None)
    code, out, err = run(capsys, "train", "src", "tgt")
    assert (code, out) == (OTHER, "") and err.count("\n") == 1
    assert "pip install 'nlpfast[align]'" in err


def test_help(capsys):
    for argv in ([], ["score"], ["symmetrize"], ["train"]):
        assert main(["align", *argv, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("usage: nlpfast align") and err == ""
