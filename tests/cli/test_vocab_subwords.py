"""`nlpfast vocab bpe`, `encode` and `decode`: figures, files, and a line for each line."""

import contextlib
import gzip
import io
import os
import re
import sys
from pathlib import Path

import pytest

from nlpfast.cli import main
from nlpfast.cli.vocab import SENTENCES
from nlpfast.data.invented_languages import invented_pairs
from nlpfast.data.subwords import Subwords

pytest.importorskip("tokenizers")

USAGE, DATA, OTHER = 2, 65, 1
# (hug, 10), (pug, 5), (pun, 12), (bun, 4), (hugs, 5)
WORDS = ["hug " * 10, "pug " * 5, "", "pun " * 12, "bun " * 4, "", "hugs " * 5]
TEXT = ["Hug a pug, or two!", "", " pun \tbun  ", "(hugs)", "日 <s> </s>", "", "hugpun", "a\u00a0b"]


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words").write_text("\n".join(WORDS))
    Path("text").write_text("\n".join(TEXT) + "\n", encoding="utf-8")


def run(capsys, *argv):
    code = main(["vocab", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_figures_by_hand(capsys):
    """12 pieces without a join, then ug, ▁p, un, hug, ▁hug, ▁pun: the words have 1, 2, 1, 3 and 2 pieces."""
    code, out, err = run(capsys, "bpe", "words", "--output-dir", "new/folder", "--size", "18")
    assert (code, err) == (0, "")
    pieces = 10 * 1 + 5 * 2 + 12 * 1 + 4 * 3 + 5 * 2
    assert out == (
        "pieces           18\n"
        "lines            5 used, 2 skipped as they are empty\n"
        f"pieces per word  {pieces / 36:.3f}\n"
        "unknown          0.000 % of the pieces\n"
        "folder           new/folder\n"
    )
    assert [entry.name for entry in Path("new/folder").iterdir()] == ["tokenizer.json"]
    assert Subwords.from_folder("new/folder").digest() == Subwords.train(WORDS, 18).digest()


def test_rare_pairs_and_characters_are_left_out(capsys):
    code, out, _ = run(capsys, "bpe", "words", "--output-dir", "new", "--min-frequency", "5")
    assert code == 0
    assert Subwords.from_folder("new").digest() == Subwords.train(WORDS, 8000, min_frequency=5).digest()
    # the letter b, of 4 words, is left out: they are ▁, <unk> and un
    assert (
        f"pieces per word  {(36 + 2 * 4) / 36:.3f}\n" in out
        and f"unknown          {400 / 44:.3f} % of" in out
    )


def test_several_texts_are_one_vocabulary(capsys):
    Path("more").write_bytes(gzip.compress("Ada ÁDA\r\n\r\nada".encode()))
    code, out, _ = run(capsys, "bpe", "words", "more", "--output-dir", "new")
    assert code == 0 and "lines            7 used, 3 skipped" in out
    assert Subwords.from_folder("new").digest() == Subwords.train([*WORDS, "Ada ÁDA", "ada"], 8000).digest()


def test_invented_languages(capsys):
    code, out, _ = run(capsys, "bpe", "--output-dir", "new")
    assert code == 0 and f"lines            {2 * SENTENCES} used, 0 skipped" in out
    pairs = invented_pairs(SENTENCES)
    expected = Subwords.train([*pairs.source, *pairs.target], 8000)
    assert Subwords.from_folder("new").digest() == expected.digest() and len(expected) > 1000
    assert "unknown          0.000 %" in out
    code, _, err = run(capsys, "bpe", "--output-dir", "other", "--size", "11")
    assert code == DATA and "two invented languages: special tokens and characters are" in err


def test_an_earlier_vocabulary_is_kept_or_replaced(capsys):
    Path("new").mkdir()
    for name in ("tokenizer.json", "sentencepiece.model"):
        path = Path("new", name)
        path.write_text("mine")
        code, out, err = run(capsys, "bpe", "words", "--output-dir", "new")
        assert (code, out) == (USAGE, "") and path.read_text() == "mine"
        assert f"--output-dir new: has a {name}, name another folder or add --overwrite" in err
        assert run(capsys, "bpe", "words", "--output-dir", "new", "--overwrite", "--size", "18")[0] == 0
        assert [entry.name for entry in Path("new").iterdir()] == ["tokenizer.json"]
        assert len(Subwords.from_folder("new")) == 18
        Path("new/tokenizer.json").unlink()


def test_bad_texts_leave_nothing(capsys):
    Path("bad").write_bytes(b"hug\xff")
    for text, size in (("bad", "100"), ("words", "11")):
        code, out, err = run(capsys, "bpe", text, "--output-dir", "new", "--size", size)
        assert (code, out) == (DATA, "") and text in err and not Path("new").exists()


def test_a_line_of_pieces_for_each_line_and_back(capsys):
    Subwords.train(WORDS, 18).save("poor")
    Subwords.train([*TEXT, *WORDS], 100, min_frequency=1).save("new")
    code, out, err = run(capsys, "encode", "poor", "text")
    assert (code, err) == (0, "")
    assert out.split("\n") == [
        "▁ <unk> ug ▁ <unk> ▁p ug <unk> ▁ <unk> <unk> ▁ <unk> <unk> <unk> <unk>",
        "",
        "▁pun ▁ b un",
        "▁ <unk> hug s <unk>",
        "▁ <unk> ▁ <unk> s <unk> ▁ <unk> <unk> s <unk>",
        "",
        "▁hug p un",
        "▁ <unk> <unk> b",
        "",
    ]
    code, out, err = run(capsys, "encode", "new", "text")
    assert (code, err) == (0, "")
    Path("encoded").write_text(out, encoding="utf-8")
    code, out, err = run(capsys, "decode", "new", "encoded")
    assert (code, err) == (0, "")
    assert out == "".join(" ".join(re.split("[ \t]+", line.strip())) + "\n" for line in TEXT)


def test_many_lines_keep_their_order(capsys):
    Subwords.train(WORDS, 18).save("new")
    lines = [" ".join(["hug"] * (number % 7)) for number in range(2501)]
    Path("many").write_text("\n".join(lines))
    code, out, _ = run(capsys, "encode", "new", "many")
    assert code == 0 and out == "".join(line.replace("hug", "▁hug") + "\n" for line in lines)
    Path("many").write_text(out)
    code, out, _ = run(capsys, "decode", "new", "many")
    assert code == 0 and out == "".join(line + "\n" for line in lines)


def test_special_tokens_are_left_out_and_other_words_refused(capsys):
    Subwords.train(WORDS, 18).save("new")
    Path("pieces").write_text("<s> ▁hug  un <unk> </s> <pad> \nun ▁pun\nhug ▁dog hug\n")
    code, out, err = run(capsys, "decode", "new", "pieces")
    assert code == DATA and out == "hugun⁇\nun pun\n"
    assert err == (
        "nlpfast: error: pieces:3: '▁dog' is not a piece of new; use the vocabulary that encoded the text\n"
    )


def test_a_model_of_sentencepiece(capsys):
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 9),
        model_writer=content,
        vocab_size=14,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    )
    Path("my.model").write_bytes(content.getvalue())
    Path("folder").mkdir()
    Path("folder/sentencepiece.model").write_bytes(content.getvalue())
    for name in ("my.model", "folder"):
        code, out, _ = run(capsys, "encode", name, "words")
        assert code == 0 and out.count("\n") == len(WORDS) and "▁hug" in out.replace(" ", "")
        Path("encoded").write_text(out)
        code, out, _ = run(capsys, "decode", name, "encoded")
        assert code == 0 and out == "".join(line.strip() + "\n" for line in WORDS)


@contextlib.contextmanager
def stdin(text):
    """Let the process read a text from its stdin."""
    Path("given").write_text(text)
    before = os.dup(0)
    with open("given", "rb") as given:
        os.dup2(given.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


@pytest.mark.parametrize("file", [[], ["-"]])
def test_lines_come_from_stdin(file, capsys):
    Subwords.train(WORDS, 18).save("new")
    with stdin("hug\n\npun hug"):
        assert run(capsys, "encode", "new", *file) == (0, "▁hug\n\n▁pun ▁hug\n", "")
    with stdin("▁hug\n\n▁pun ▁hug"):
        assert run(capsys, "decode", "new", *file) == (0, "hug\n\npun hug\n", "")
    with stdin("▁dog"):
        code, out, err = run(capsys, "decode", "new", *file)
    assert (code, out) == (DATA, "") and "/dev/stdin:1: '▁dog' is not a piece of new" in err


def test_without_tokenizers_it_says_what_to_install(capsys, monkeypatch):
    Subwords.train(WORDS, 18).save("new")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for command in (["bpe", "words", "--output-dir", "other"], ["encode", "new", "words"]):
        code, out, err = run(capsys, *command)
        assert (code, out) == (OTHER, "") and err.endswith("pip install 'nlpfast[nmt]'\n")
