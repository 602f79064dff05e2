"""`nlpfast vocab wordpiece`: figures on stdout, files, what is refused before any work."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nlpfast.cli import main
from nlpfast.cli.vocab import BIOGRAPHIES
from nlpfast.data.biographies import biographies
from nlpfast.data.wordpiece import FILES, WordPiece

pytest.importorskip("tokenizers")

USAGE, DATA, OTHER = 2, 65, 1
# (hug, 10), (pug, 5), (pun, 12), (bun, 4), (hugs, 5)
WORDS = ["hug " * 10, "pug " * 5, "", "pun " * 12, "bun " * 4, "", "hugs " * 5]


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("\n".join(WORDS))
    Path("file").write_text("mine")


def run(capsys, *argv):
    code = main(["vocab", "wordpiece", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def files(folder):
    return {entry.name: entry.read_bytes() for entry in Path(folder).iterdir()}


def test_figures_by_hand(capsys):
    """19 pieces without a join; with ##ug, ##un, hug and pun 22 of the 36 words are whole, 9 are in two."""
    code, out, err = run(capsys, "text", "--output-dir", "new/folder", "--size", "23")
    assert (code, err) == (0, "")
    pieces = 10 + 12 + 2 * (5 + 4) + 2 * 5
    assert out == (
        "pieces           23\n"
        "lines            5 used, 2 skipped as they are empty\n"
        f"pieces per word  {pieces / 36:.3f}\n"
        "unknown          0.000 % of the pieces\n"
        "folder           new/folder\n"
    )
    assert sorted(files("new/folder")) == sorted(FILES)
    found = WordPiece.from_folder("new/folder")
    assert found.tokens == WordPiece.train(WORDS, 23).tokens and found.lowercase
    assert found.tokens[-4:] == ["##ug", "##un", "hug", "pun"]


def test_rare_pairs_and_characters_are_left_out(capsys):
    code, out, _ = run(capsys, "text", "--output-dir", "new", "--min-frequency", "5")
    assert code == 0
    # the letter b, of 4 words, is left out; hugs is one piece
    assert WordPiece.from_folder("new").tokens == WordPiece.train(WORDS, 100, min_frequency=5).tokens
    assert "pieces per word  1.000\n" in out and f"unknown          {400 / 36:.3f} % of" in out


def test_several_texts_of_every_kind(capsys):
    Path("more").write_bytes(gzip.compress("Ada ÁDA\r\n\r\nada".encode()))
    Path("third").write_bytes(b"\xef\xbb\xbfada")
    code, out, _ = run(capsys, "text", "more", "third", "--output-dir", "new", "--cased")
    assert code == 0 and "lines            8 used, 3 skipped" in out
    found = WordPiece.from_folder("new")
    everything = [*WORDS, "Ada ÁDA", "ada", "ada"]
    assert not found.lowercase and found.tokens == WordPiece.train(everything, 100, lowercase=False).tokens
    assert "A" in found.tokens and "Á" not in found.tokens


def test_embedded_biographies(capsys):
    code, out, _ = run(capsys, "--output-dir", "new", "--size", "500")
    assert (
        code == 0
        and f"lines            {BIOGRAPHIES} used, 0 skipped" in out
        and "pieces           500\n" in out
    )
    lines = biographies(BIOGRAPHIES)
    found = WordPiece.train(lines, 500)
    assert WordPiece.from_folder("new").tokens == found.tokens
    encoded = [number for ids in found.encode_batch(lines) for number in ids]
    words = sum(not found.continues[number] for number in encoded)
    assert f"pieces per word  {len(encoded) / words:.3f}\n" in out


def test_an_earlier_vocabulary_is_kept_or_replaced(capsys):
    assert run(capsys, "text", "--output-dir", "new", "--size", "23")[0] == 0
    Path("new/config.json").write_text("{}")
    before = files("new")
    code, out, err = run(capsys, "text", "--output-dir", "new")
    assert (code, out) == (USAGE, "") and files("new") == before
    assert "--output-dir new: has a tokenizer.json, name another folder or add --overwrite" in err
    for name in FILES:
        Path("one").mkdir(exist_ok=True)
        Path("one", name).write_text("")
        code, out, err = run(capsys, "text", "--output-dir", "one")
        assert (code, out) == (USAGE, "") and f"--output-dir one: has a {name}, name" in err
        Path("one", name).unlink()
    assert run(capsys, "text", "--output-dir", "new", "--overwrite", "--cased")[0] == 0
    after = files("new")
    assert {name for name in after if after[name] == before[name]} == {"config.json"}
    assert len(WordPiece.from_folder("new")) == 26


def test_a_folder_that_cannot_be_written_to(capsys, monkeypatch):
    asked = []

    def access(path, mode):
        asked.append((str(path), mode))
        return False

    monkeypatch.setattr(os, "access", access)
    code, _, err = run(capsys, "text", "--output-dir", "new/folder")
    assert code == USAGE and "--output-dir new/folder: . cannot be written to, name another folder" in err
    assert asked == [(".", os.W_OK | os.X_OK)]


@pytest.mark.parametrize("content", [b"hug hug\npug \xff", b"hug\0", b"\n\n", b" \t\n", b""])
def test_damaged_texts_leave_nothing(content, capsys):
    Path("bad").write_bytes(content)
    code, out, err = run(capsys, "text" if b"u" in content else "bad", "bad", "--output-dir", "new")
    assert (code, out) == (DATA, "") and "bad" in err and err.count("\n") == 1
    assert not Path("new").exists()


def test_too_many_characters(capsys):
    code, out, err = run(capsys, "text", "file", "--output-dir", "new", "--size", "18")
    assert (code, out) == (DATA, "") and not Path("new").exists()
    assert "text, file: special tokens and characters are 19, more than vocab_size=18; give as many" in err


def test_without_tokenizers_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, out, err = run(capsys, "text", "--output-dir", "new")
    assert (code, out) == (OTHER, "") and err.endswith("pip install 'nlpfast[bert]'\n")


def test_wrong_options_are_told_without_torch_or_tokenizers():
    import nlpfast

    folder = str(Path(nlpfast.__file__).parent)
    code = (
        f"import sys, types; package = types.ModuleType('nlpfast'); package.__path__ = [{folder!r}]\n"
        "sys.modules['nlpfast'] = package\n"
        "import nlpfast.cli.vocab\n"
        "assert not {'torch', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
