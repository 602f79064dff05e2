"""`nlpfast train translation`, `translate` and `align extract` through the command line, to the end."""

import io
import itertools
import sys
from pathlib import Path

import pytest
import torch

from nlpfast.cli import main, translate
from nlpfast.data.subwords import Subwords
from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.models.translation_files import save_vocabularies
from nlpfast.models.translator import Translator

TRAIN = [
    *("train", "translation", "--pairs", "100", "--vocab-size", "200", "--d-model", "32", "--heads", "2"),
    *("--d-ff", "64", "--encoder-layers", "1", "--decoder-layers", "1", "--max-steps", "3"),
    *("--warmup-steps", "1", "--device", "cpu", "--eval-sentences", "5", "--max-tokens", "600"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("translation") / "run"
    torch.set_num_threads(1)
    assert main([*TRAIN, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def text(run, tmp_path) -> Path:
    lines = (run / "data" / "test.source").read_text().splitlines()[:5]
    path = tmp_path / "text"
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    return path


def out_of(argv: list[str], capsys) -> list[str]:
    capsys.readouterr()
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_training_prints_its_figures(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, target = run / "data" / "train.source", run / "data" / "train.target"
    words = [word for word in TRAIN if word not in ("--pairs", "100")]
    argv = [*words[:2], str(source), str(target), *words[2:], "--valid"]
    argv += [str(run / "data" / "valid.source"), str(run / "data" / "valid.target"), "--output-dir", "mine"]
    assert main(argv) == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [
        *("steps", "parameters", "val loss", "ppl", "bleu", "smoothed loss", "accuracy", "seconds", "model"),
    ]
    again = ["train", "translation", "--resume", "mine", "--max-steps", "5"]
    assert main(again) == 0
    assert capsys.readouterr().out.startswith("steps            5\n")


def test_a_line_for_each_line(run, text, capsys):
    translator = Translator.from_folder(run)
    lines = text.read_text().split("\n")[:-1]
    expected = translator.translate(lines, beam=5, max_len_a=1.5, max_len_b=20)
    assert out_of(["translate", str(run), str(text)], capsys) == [best[0].text for best in expected]
    greedy = translator.translate(lines, beam=1, max_len_a=0.5, max_len_b=3, min_length=2)
    argv = ["translate", str(run), str(text), "--beam", "1", "--max-len-a", "0.5", "--max-len-b", "3"]
    assert out_of([*argv, "--min-length", "2"], capsys) == [best[0].text for best in greedy]


def test_parts_are_as_the_whole(run, text, capsys, monkeypatch):
    argv = ["translate", str(run), str(text), "--scores"]
    whole = out_of(argv, capsys)
    monkeypatch.setattr(translate, "_LINES", 2)
    parts = out_of(argv, capsys)
    assert [line.split(" ||| ")[:2] for line in parts] == [line.split(" ||| ")[:2] for line in whole]
    assert [int(line.split(" ||| ")[0]) for line in parts] == [0, 1, 2, 3, 4, 5]


def test_best_lists(run, text, capsys):
    lines = out_of(["translate", str(run), str(text), "--n-best", "2", "--beam", "3"], capsys)
    rows = [line.split(" ||| ") for line in lines]
    assert [row[0] for row in rows] == ["0", "0", "1", "1", "2", "3", "3", "4", "4", "5", "5"]
    assert all(float(a[2]) >= float(b[2]) for a, b in itertools.pairwise(rows) if a[0] == b[0])


def test_alignments_are_printed(run, text, capsys):
    translator = Translator.from_folder(run)
    sources = text.read_text().split("\n")[:-1]
    argv = ["translate", str(run), str(text), "--print-alignment"]
    plain = out_of(argv[:3], capsys)
    hard = [line.split("\t") for line in out_of([*argv, "hard"], capsys)]
    soft = [line.split("\t") for line in out_of([*argv, "soft"], capsys)]
    assert [row[0] for row in hard] == [row[0] for row in soft] == plain
    best = translator.translate(sources, max_len_a=1.5, max_len_b=20)
    for source, translations, links, table in zip(sources, best, hard, soft, strict=True):
        words = len(source.split(" ")), len(translations[0].text.split(" "))
        pairs = [tuple(map(int, link.split("-"))) for link in links[1].split()]
        assert all(s < words[0] and t < words[1] for s, t in pairs) and (pairs or not source)
        # each word of the translation is linked to one, if not to more
        assert {t for _, t in pairs} == (set(range(words[1])) if translations[0].tokens else set())
        rows = [[float(p) for p in row.split(",")] for row in table[1].split(" ")]
        assert len(rows) == len(translations[0].tokens) + 1
        assert all(len(row) == len(translator.source.encode(source)) + 1 for row in rows)
        assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in rows)


def test_options_reach_the_search(run, text, capsys, monkeypatch):
    calls, found = [], Translator.translate

    def recorded(self, lines, **options):
        calls.append({**options, "dtype": self.dtype})
        return found(self, lines, **options)

    monkeypatch.setattr(Translator, "translate", recorded)
    argv = [
        "--beam",
        "4",
        "--n-best",
        "2",
        "--length-penalty",
        "gnmt",
        "--alpha",
        "0.6",
        "--max-len-a",
        "0.5",
    ]
    argv += ["--max-len-b", "6", "--min-length", "2", "--no-repeat-ngram", "3", "--dtype", "bfloat16"]
    lines = out_of(["translate", str(run), str(text), *argv], capsys)
    [given] = calls
    given.pop("place")
    assert given.pop("dtype") == torch.bfloat16
    assert given == {
        **{"beam": 4, "n_best": 2, "length_penalty": "gnmt", "alpha": 0.6, "max_len_a": 0.5},
        **{"max_len_b": 6, "min_length": 2, "no_repeat_ngram": 3},
    }
    translator = Translator.from_folder(run, dtype=torch.bfloat16)
    best = found(translator, text.read_text().split("\n")[:-1], **given)
    assert lines == [f"{i} ||| {t.text} ||| {t.score:.6f}" for i, row in enumerate(best) for t in row]


def test_sentences_that_are_too_long_are_named(run, tmp_path, capsys, monkeypatch):
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_text("mit\n" * 3 + "mit " * 1100 + "\n")
    short.write_text("mit\n" * 4)
    monkeypatch.setattr(translate, "_LINES", 2)
    for argv in (["translate", str(run), str(long)], ["align", "extract", str(run), str(long), str(short)]):
        assert main(argv) == 65
        assert f"{long}:4: has 2200 subwords" in capsys.readouterr().err


def test_two_vocabularies_stay_on_their_sides(tmp_path, capsys):
    sides = Subwords.train(["mit lu"] * 9, 20), Subwords.train(["nevö ta"] * 9, 30)
    sizes = {"d_model": 16, "d_ff": 16, "heads": 1, "encoder_layers": 1, "decoder_layers": 1, "tied": "none"}
    torch.manual_seed(2)
    pieces = {"source_vocab": len(sides[0]), "target_vocab": len(sides[1])}
    model = Transformer(TransformerConfig(**pieces, **sizes)).eval()
    model.save_pretrained(tmp_path)
    save_vocabularies(tmp_path, *sides)
    for name, line in (("source", "mit lu"), ("target", "nevö ta")):
        (tmp_path / name).write_text(f"{line}\n")
    texts = str(tmp_path / "source"), str(tmp_path / "target")
    [alignment] = Translator(model, *sides).align([sides[0].encode("mit lu")], [sides[1].encode("nevö ta")])
    [line] = out_of(["align", "extract", str(tmp_path), *texts, "--subwords"], capsys)
    assert line == " ".join(f"{s}-{t}" for s, t in sorted(alignment.links()))
    [[best]] = Translator(model, *sides).translate(["mit lu"], max_len_a=1.5, max_len_b=20)
    [line] = out_of(["translate", str(tmp_path), texts[0]], capsys)
    assert line == best.text == sides[1].decode(best.tokens)


def test_from_stdin(run, text, capsys, monkeypatch):
    expected = out_of(["translate", str(run), str(text)], capsys)
    monkeypatch.setattr(translate, "_STDIN", str(text))
    assert out_of(["translate", str(run)], capsys) == expected
    assert out_of(["translate", str(run), "-"], capsys) == expected


def test_who_types_is_answered_line_by_line(run, text, capsys, monkeypatch):
    monkeypatch.setattr(translate, "_STDIN", str(text))
    calls = []
    found = Translator.translate
    monkeypatch.setattr(
        Translator,
        "translate",
        lambda *args, **options: calls.append(len(args[1])) or found(*args, **options),
    )

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    out_of(["translate", str(run)], capsys)
    assert calls == [1] * 6


def test_extracted_alignments(run, capsys):
    data = run / "data"
    argv = ["align", "extract", str(run), str(data / "test.source"), str(data / "test.target")]
    translator = Translator.from_folder(run)
    source = (data / "test.source").read_text().splitlines()
    target = (data / "test.target").read_text().splitlines()
    tokens = translator.source.encode_batch(source), translator.target.encode_batch(target)
    for more, options in (([], {}), (["--heads", "2", "--layer", "-1"], {"heads": 2, "layer": -1})):
        lines = out_of([*argv, *more], capsys)
        expected = [translator.word_links(found) for found in translator.align(*tokens, **options)]
        assert [{tuple(map(int, link.split("-"))) for link in line.split()} for line in lines] == expected
    lines = out_of([*argv, "--subwords"], capsys)
    for line, ids in zip(lines, tokens[1], strict=True):
        assert len(line.split()) == len(ids)


def test_a_picture_of_a_translation(run, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    translator = Translator.from_folder(run)
    output = tmp_path / "picture.png"
    argv = ["plot", "attention", str(run), "mit lu", "--output", str(output)]
    _, _, target = translator.attention("mit lu")
    assert out_of(argv, capsys) == [
        f"subwords                 {' '.join(target)}",
        f"picture                  {output}",
    ]
    first = output.read_bytes()
    assert first.startswith(b"\x89PNG")
    lines = out_of([*argv, "--target", "nevö", "--layer", "0"], capsys)
    assert lines[0].split()[1:] == [*translator.target.pieces(translator.target.encode("nevö")), "</s>"]
    assert output.read_bytes() != first
