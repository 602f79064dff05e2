"""`nlpfast score`: a score a line on stdout, what is odd about the text on stderr, exit codes."""

import os
import sys
from pathlib import Path

import pytest

from nlpfast.cli import main

USAGE, DATA, OTHER = 2, 65, 1

HYP, REF = "the cat sat on the mat\nA dog barks\n", "the cat sat on a mat today\na big dog barks\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hyp").write_text(HYP)
    Path("ref").write_text(REF)
    Path("other").write_text(HYP)
    Path("three").write_text("a\nb\nc\n")
    Path("gaps").write_text("the cat\n \n")
    Path("none").write_text("\n\n")
    Path("latin").write_bytes(b"a\n\xe9\n")
    return tmp_path


@pytest.fixture
def sacrebleu():
    return pytest.importorskip("sacrebleu")


@pytest.fixture
def stdin():
    """Give a function that lets this process read from a text."""
    before = os.dup(0)

    def replace(text):
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        os.dup2(reader, 0)
        os.close(reader)

    yield replace
    os.dup2(before, 0)
    os.close(before)


def run(capsys, *argv):
    code = main(["score", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_score(folder, sacrebleu, capsys):
    """A and a are two words for BLEU: 7 of 9, 4 of 7, 2 of 5, 1 of 3 n-grams; TER's edits are 3 of 11."""
    code, out, err = run(capsys, "hyp", "ref")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert [(name, score) for name, score, _ in lines if name != "chrF2"] == [
        ("BLEU", "39.51"),
        ("TER", "27.27"),
    ]
    assert out.splitlines()[0] == (
        f"BLEU      39.51  nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    assert lines[1][2].startswith("nrefs:1|case:mixed|") and lines[2][2].startswith("nrefs:1|case:lc|")


def test_options(folder, sacrebleu, capsys):
    code, out, err = run(capsys, "hyp", "ref", "--lowercase", "--metric", "bleu", "--tokenize", "none")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    # a dog barks: 8 of 9 words
    assert out.startswith("BLEU      40.85  nrefs:1|case:lc|eff:no|tok:none|")
    code, out, err = run(capsys, "hyp", "ref", "other", "--metric", "ter", "chrf++")
    assert [line.split("|")[0] for line in out.splitlines()] == [
        "TER        0.00  nrefs:2",
        "chrF2++  100.00  nrefs:2",
    ]


def test_translations_from_stdin(folder, sacrebleu, stdin, capsys):
    expected = run(capsys, "hyp", "ref")
    stdin(HYP)
    assert run(capsys, "-", "ref") == expected
    stdin("one line\n")
    code, out, err = run(capsys, "-", "ref")
    assert (code, out) == (DATA, "") and "/dev/stdin has 1 lines, ref has 2" in err
    code, out, err = run(capsys, "hyp", "-")
    assert (code, out) == (USAGE, "") and "only HYP may be read from stdin" in err


def test_what_is_odd_about_the_text_is_told(folder, sacrebleu, capsys):
    code, out, err = run(capsys, "gaps", "ref", "none", "--metric", "bleu")
    assert code == 0 and out.startswith("BLEU ")
    assert err == (
        "nlpfast: gaps: 1 of 2 lines are empty, and scored; the first gaps:2\n"
        "nlpfast: none: 2 of 2 lines are empty, and scored; the first none:1\n"
    )
    Path("marked").write_bytes(b"\xef\xbb\xbf" + REF.encode())
    plain = run(capsys, "hyp", "ref")[1]
    assert run(capsys, "hyp", "marked") == (0, plain, "nlpfast: byte order marks taken off: 1\n")


def test_tokenised_text_is_told(folder, sacrebleu, capsys):
    Path("tokens").write_text("it is so .\nit was so . \nnot so.\n")
    warning = (
        "nlpfast: tokens: 2 of 3 lines end in ' .' as tokenised text does, of which the scores mean little"
    )
    assert run(capsys, "tokens", "three")[2] == f"{warning}; the first tokens:1\n"
    assert run(capsys, "tokens", "three", "--tokenize", "none")[2] == ""
    assert run(capsys, "three", "tokens")[2] == ""
    Path("tokens").write_text("it is so .\nnot so.\n")
    assert run(capsys, "tokens", "ref")[2] == ""


BAD = [
    ([], USAGE, "HYP, REF"),
    (["hyp"], USAGE, "REF"),
    (["hyp", "ref", "--metric", "rouge"], USAGE, "--metric: invalid choice: 'rouge'"),
    (["--metric", "bleu", "hyp", "ref"], USAGE, "--metric: invalid choice: 'hyp'"),
    (["hyp", "ref", "--tokenize", "flores200"], USAGE, "--tokenize: invalid choice: 'flores200'"),
    (["hyp", "three"], DATA, "hyp has 2 lines, three has 3"),
    (["hyp", "ref", "three"], DATA, "hyp has 2 lines, ref has 2, three has 3"),
    (["missing", "ref"], DATA, "missing: no such file"),
    (["hyp", "."], DATA, ".: is a folder"),
    (["hyp", "latin"], DATA, "latin:2: byte 0xe9 is not UTF-8"),
]


@pytest.mark.parametrize(("argv", "code", "message"), BAD, ids=[" ".join(case[0]) or "-" for case in BAD])
def test_a_bad_invocation(argv, code, message, folder, capsys):
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, "")
    assert err.startswith("nlpfast: error: ") and err.count("\n") == 1
    assert message in err


def test_without_sacrebleu(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    code, out, err = run(capsys, "hyp", "ref")
    assert (code, out) == (OTHER, "") and err.count("\n") == 1
    assert "pip install 'nlpfast[nmt]'" in err


def test_help(capsys):
    assert main(["score", "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: nlpfast score") and err == ""
    assert "- for stdin" in out and "sacreBLEU" in out
