"""From text to text: batches of any order give each sentence its own translation, alignments, folders."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from nlpfast.beam_search import beam_search
from nlpfast.data.lines import DataError
from nlpfast.data.subwords import Subwords
from nlpfast.models import translator as module
from nlpfast.models.seq2seq import Seq2Seq, Seq2SeqConfig
from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.models.translation_files import load_model, load_vocabularies, save_vocabularies
from nlpfast.models.translator import Alignment, Translator

LINES = ["ein Hund bellt", "", "eine Katze", "ein Hund und eine Katze und ein Hund", "   ", "Hund"]


@pytest.fixture(scope="module")
def vocabulary() -> Subwords:
    return Subwords.train([*LINES, "a dog and a cat barks"] * 5, 60)


def transformer(vocabulary: Subwords, **given) -> Transformer:
    torch.manual_seed(1)
    sizes = {"d_model": 16, "d_ff": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    pieces = {"source_vocab": len(vocabulary), "target_vocab": len(vocabulary)}
    return Transformer(TransformerConfig(**{**sizes, **pieces, "dropout": 0.0, **given})).eval()


def rnn(vocabulary: Subwords) -> Seq2Seq:
    torch.manual_seed(1)
    pieces = {"source_vocab": len(vocabulary), "target_vocab": len(vocabulary)}
    return Seq2Seq(Seq2SeqConfig(**pieces, embed_size=12, hidden_size=16)).eval()


@pytest.mark.parametrize("build", [transformer, rnn])
@pytest.mark.parametrize(("beam", "n_best"), [(1, 1), (3, 1), (3, 2)])
def test_each_sentence_gets_its_own_translations(vocabulary, build, beam, n_best, monkeypatch):
    translator = Translator(build(vocabulary), vocabulary, vocabulary)
    options = {"beam": beam, "n_best": n_best, "max_len_b": 12, "min_length": 2}
    alone = [translator.translate([line], **options)[0] for line in LINES]
    for most in (10, 60, 100_000):
        monkeypatch.setattr(module, "BATCH_TOKENS", most)
        pauses: list[int] = []
        found = translator.translate(LINES, pause=partial(pauses.append, 1), **options)
        assert [[t.tokens for t in best] for best in found] == [[t.tokens for t in best] for best in alone]
        for best, other in zip(found, alone, strict=True):
            assert [t.score for t in best] == pytest.approx([t.score for t in other], abs=1e-4)
        assert len(pauses) == 1 if most > 1000 else len(pauses) > (most == 10)
    for line, best in zip(LINES, found, strict=True):
        if line.strip():
            assert len(best) == n_best and all(t.text == vocabulary.decode(t.tokens) for t in best)
            assert [t.score for t in best] == sorted((t.score for t in best), reverse=True)
        else:
            assert best == [("", [], 0.0, 0.0, True)]


@pytest.mark.parametrize("build", [transformer, rnn])
def test_alignments_are_those_of_each_sentence(vocabulary, build, monkeypatch):
    translator = Translator(build(vocabulary), vocabulary, vocabulary)
    sources = vocabulary.encode_batch(LINES)
    targets = vocabulary.encode_batch(["a dog", "a", "", "a cat barks and a dog", "cat", "dog barks"])
    alone = [translator.align([s], [t])[0] for s, t in zip(sources, targets, strict=True)]
    monkeypatch.setattr(module, "BATCH_TOKENS", 80)
    found = translator.align(sources, targets)
    for one, other, s, t in zip(found, alone, sources, targets, strict=True):
        assert (one.source, one.target) == (s, t)
        assert one.probabilities.shape == (len(t) + 1, len(s) + 1)
        torch.testing.assert_close(one.probabilities, other.probabilities, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one.probabilities.sum(1), torch.ones(len(t) + 1))


def test_links_leave_out_eos_and_join_subwords(vocabulary):
    translator = Translator(transformer(vocabulary), vocabulary, vocabulary)
    source = vocabulary.encode("ein Hund")
    words = vocabulary.word_numbers(source)
    target = vocabulary.encode("a dog")
    table = torch.zeros(len(target) + 1, len(source) + 1)
    # EOS has most of all rows; the rest of each is at the last subword of the first word
    table[:, -1] = 0.9
    last = max(i for i, word in enumerate(words) if word == 0)
    table[:, last] = 0.1
    alignment = Alignment(source, target, table)
    assert alignment.links() == [(last, t) for t in range(len(target))]
    assert translator.word_links(alignment) == {(0, 0), (0, 1)}
    assert Alignment([], target, torch.ones(len(target) + 1, 1)).links() == []


def test_layers_and_heads_are_passed_on(vocabulary):
    model = transformer(vocabulary)
    translator = Translator(model, vocabulary, vocabulary)
    tokens = vocabulary.encode_batch(LINES[:1]), vocabulary.encode_batch(["a dog"])
    one, other = (translator.align(*tokens, layer=layer)[0].probabilities for layer in (0, 1))
    assert not torch.allclose(one, other)
    assert torch.equal(translator.align(*tokens)[0].probabilities, other), "of two layers it is the last"
    with pytest.raises(ValueError, match="leave it out"):
        Translator(rnn(vocabulary), vocabulary, vocabulary).align(*tokens, layer=0)
    with pytest.raises(ValueError, match="alignment_layer"):
        translator.align(*tokens, layer=2)


def test_long_sentences_are_named(vocabulary):
    translator = Translator(transformer(vocabulary, max_positions=8), vocabulary, vocabulary)
    with pytest.raises(DataError, match=r"text:4: has \d+ subwords, the model reads 7 at most"):
        translator.translate(LINES, place=lambda row: f"text:{row + 1}")
    ids = vocabulary.encode_batch(LINES)
    with pytest.raises(DataError, match=r"sentence 0: has"):
        translator.align([[]], [ids[3]])
    translator.align([ids[0][:7]], [ids[3][:7]])


def test_precision(vocabulary):
    model = transformer(vocabulary)
    ids = vocabulary.encode_batch(LINES[:1]), vocabulary.encode_batch(["a dog"])
    whole, half = (
        Translator(model, vocabulary, vocabulary, dtype=dtype).align(*ids)[0].probabilities
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert not torch.equal(whole, half) and half.dtype == torch.float32
    torch.testing.assert_close(whole, half, atol=0.02, rtol=0.05)
    scores = [
        Translator(model, vocabulary, vocabulary, dtype=dtype).translate(LINES[:1], max_len_b=4)[0][0].score
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert scores[0] != scores[1] and scores[0] == pytest.approx(scores[1], abs=0.05)


@pytest.mark.parametrize("joint", [True, False])
def test_folders(vocabulary, joint, tmp_path):
    other = vocabulary if joint else Subwords.train(["a dog and a cat"] * 9, 40)
    tied = {} if joint else {"tied": "decoder", "target_vocab": len(other)}
    model = transformer(vocabulary, **tied)
    save_vocabularies(tmp_path, vocabulary, other)
    model.save_pretrained(tmp_path / "last")
    source, target = load_vocabularies(tmp_path)
    assert (
        source.tokens == vocabulary.tokens and target.tokens == other.tokens and (source is target) == joint
    )
    for folder in (tmp_path, tmp_path / "last"):
        found = Translator.from_folder(folder)
        assert type(found.model) is Transformer and not found.model.training
        assert found.dtype == torch.float32
        assert Translator.from_folder(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert found.translate(LINES, max_len_b=9) == Translator(model, vocabulary, other).translate(
            LINES, max_len_b=9
        )
    # the best before the last, and what is finished before both
    for name, seed in (("best", 2), ("model", 3)):
        better = transformer(vocabulary, **tied)
        torch.nn.init.normal_(better.decoder_norm.weight, generator=torch.Generator().manual_seed(seed))
        better.save_pretrained(tmp_path / name)
        assert torch.equal(
            Translator.from_folder(tmp_path).model.decoder_norm.weight, better.decoder_norm.weight
        )
    # a model's own vocabulary before that of the folder round it
    save_vocabularies(tmp_path / "model", vocabulary, other)
    shutil.rmtree(tmp_path / "vocab")
    Subwords.train(["a b"] * 9, 12).save(tmp_path / "vocab")
    assert Translator.from_folder(tmp_path / "model").source.tokens == vocabulary.tokens


def test_folders_that_have_no_model(vocabulary, tmp_path):
    with pytest.raises(OSError, match="no translation model in it"):
        Translator.from_folder(tmp_path)
    model = transformer(vocabulary)
    model.save_pretrained(tmp_path / "best")
    with pytest.raises(DataError, match="has no vocab/"):
        Translator.from_folder(tmp_path / "best")
    Subwords.train(["a b"] * 9, 12).save(tmp_path / "vocab")
    with pytest.raises(DataError, match=r"vocab: has \d+ pieces, the model \d+"):
        Translator.from_folder(tmp_path)
    config = tmp_path / "best" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt"}))
    with pytest.raises(ValueError, match="model_type is 'gpt', which does not translate"):
        load_model(tmp_path / "best")
    (tmp_path / "best" / "config.json").unlink()
    with pytest.raises(OSError, match=r"config.json"):
        load_model(Path(tmp_path / "best"))


def test_attention_of_all_heads_of_a_layer(vocabulary):
    model = transformer(vocabulary)
    translator = Translator(model, vocabulary, vocabulary)
    for layer in (None, 0, -1):
        found, source, target = translator.attention(LINES[0], "a dog", layer=layer)
        assert source == [*vocabulary.pieces(vocabulary.encode(LINES[0])), "</s>"]
        assert target == [*vocabulary.pieces(vocabulary.encode("a dog")), "</s>"]
        assert found.shape == (2, len(target), len(source))
        ids = [vocabulary.encode(LINES[0])], [vocabulary.encode("a dog")]
        for heads in (1, 2):
            [mean] = translator.align(*ids, layer=-1 if layer is None else layer, heads=heads)
            torch.testing.assert_close(found[:heads].mean(0), mean.probabilities)
    own = translator.attention(LINES[0])[2]
    assert own == [*vocabulary.pieces(translator.translate(LINES[:1])[0][0].tokens), "</s>"]
    with pytest.raises(ValueError, match="alignment_layer"):
        translator.attention(LINES[0], layer=2)
    other = Translator(rnn(vocabulary), vocabulary, vocabulary)
    found, source, target = other.attention(LINES[0], "a dog")
    assert found.shape == (1, len(target), len(source))
    with pytest.raises(ValueError, match="leave it out"):
        other.attention(LINES[0], layer=0)
    with pytest.raises(DataError, match="the sentence: has"):
        Translator(transformer(vocabulary, max_positions=4), vocabulary, vocabulary).attention(LINES[3], "a")


def test_two_vocabularies_stay_on_their_sides(vocabulary):
    other = Subwords.train(["dogs bark at cats and cats bark at a dog"] * 9, 40)
    model = transformer(vocabulary, tied="decoder", target_vocab=len(other))
    translator = Translator(model, vocabulary, other)
    line, target = LINES[3], "cats bark at dogs"
    [[best]] = translator.translate([line], max_len_b=9, min_length=3)
    assert best.tokens and best.text == other.decode(best.tokens)
    _, source_pieces, pieces = translator.attention(line, target)
    assert source_pieces == [*vocabulary.pieces(vocabulary.encode(line)), "</s>"]
    assert pieces == [*other.pieces(other.encode(target)), "</s>"]
    assert translator.attention(line)[2] == [*other.pieces(translator.translate([line])[0][0].tokens), "</s>"]
    ids = list(range(4, len(vocabulary))), list(range(4, len(other)))
    words = vocabulary.word_numbers(ids[0]), other.word_numbers(ids[1])
    table = torch.rand(len(ids[1]) + 1, len(ids[0]) + 1, generator=torch.Generator().manual_seed(1))
    alignment = Alignment(*ids, table)
    assert alignment.links() == [(int(row[:-1].argmax()), t) for t, row in enumerate(table[:-1])]
    assert translator.word_links(alignment) == {(words[0][s], words[1][t]) for s, t in alignment.links()}


@pytest.mark.parametrize("build", [transformer, rnn])
def test_sources_end_with_eos(vocabulary, build):
    model = build(vocabulary)
    ids = vocabulary.encode(LINES[0])
    source, lengths = torch.tensor([[*ids, vocabulary.eos_id]]), torch.tensor([len(ids) + 1])
    [[expected]] = beam_search(model, source, lengths, beam=3, max_len_b=9)
    [[found]] = Translator(model, vocabulary, vocabulary).translate(LINES[:1], beam=3, max_len_b=9)
    assert found.tokens == expected.tokens and found.score == pytest.approx(expected.score, abs=1e-6)


@pytest.mark.parametrize("beam", [1, 3])
def test_batches_are_of_similar_lengths_and_within_their_size(vocabulary, beam, monkeypatch):
    model = transformer(vocabulary)
    begin, shapes = model.begin, []

    def recorded(source, *more):
        shapes.append(source.shape)
        return begin(source, *more)

    monkeypatch.setattr(model, "begin", recorded)
    lines = [*LINES, *["Hund"] * 9, *["eine Katze bellt"] * 5]
    most = 90
    monkeypatch.setattr(module, "BATCH_TOKENS", most)
    Translator(model, vocabulary, vocabulary).translate(lines, beam=beam, max_len_b=2)
    lengths = sorted((len(tokens) + 1 for tokens in vocabulary.encode_batch(lines) if tokens), reverse=True)
    # the longest first, and as many as there is room for
    for B, S in shapes:
        assert lengths[0] == S and min(len(lengths), max(1, most // beam // S)) == B
        lengths = lengths[B:]
    assert not lengths
