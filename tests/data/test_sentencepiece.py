"""Models of SentencePiece as vocabularies: their own ids, text, dropout, what is refused."""

import io
import pickle
import random
import re

import pytest

from nlpfast.alignment import words_of
from nlpfast.data.biographies import biographies
from nlpfast.data.lines import DataError
from nlpfast.data.subwords import FILES, Subwords

sentencepiece = pytest.importorskip("sentencepiece")

IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
TEXT = biographies(200)
KINDS = ("bpe", "unigram")


def trained(kind, text=TEXT, **options):
    """Return the bytes of a model."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=content,
        model_type=kind,
        num_threads=1,
        minloglevel=2,
        character_coverage=1.0,
        **{"vocab_size": 400, **IDS, **options},
    )
    return content.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The file of a model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        (folder / f"{kind}.model").write_bytes(trained(kind))
    return {kind: folder / f"{kind}.model" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_the_package(kind, models):
    ours = Subwords.from_sentencepiece(models[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models[kind]))
    expected = theirs.encode(TEXT)
    assert ours.encode_batch(TEXT) == expected and ours.encode(TEXT[0]) == expected[0]
    assert len(ours) == 400 and ours.tokens == [theirs.id_to_piece(number) for number in range(400)]
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.unk_id) == (0, 1, 2, 3)
    for line, ids in zip(TEXT, expected, strict=True):
        assert ours.decode(ids) == ours.decode([1, *ids, 2, 0]) == line
        assert ours.pieces(ids) == theirs.encode(line, out_type=str)
        numbers = ours.word_numbers(ids)
        assert numbers == words_of(ours.pieces(ids), "sentencepiece")
        assert numbers[-1] + 1 == len(line.split(" "))
    assert ours.encode_batch([]) == [] and ours.encode("") == [] and ours.decode([]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_characters_have_no_spaces_of_their_own(kind, models):
    ours = Subwords.from_sentencepiece(models[kind])
    for text, again in (
        ("born in 日本語", "born in ⁇"),
        ("日 born", "⁇ born"),
        ("bo日rn", "bo⁇rn"),
        ("日", "⁇"),
    ):
        ids = ours.encode(text)
        assert ours.unk_id in ids and ours.decode(ids) == again
        assert ours.word_numbers(ids)[-1] + 1 == len(text.split())
    with pytest.raises(IndexError, match=re.escape("id 400 is not in 0..399; use the vocabulary")):
        ours.decode([400])


def test_the_sign_of_what_is_unknown_may_be_known(tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(trained("bpe", [*TEXT, "born ⁇ in"], normalization_rule_name="identity"))
    ours = Subwords.from_sentencepiece(path)
    ids = ours.encode("born ⁇ in")
    assert ours.unk_id not in ids and ours.decode(ids) == "born ⁇ in"


def test_ids_are_where_a_model_has_them(tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(trained("bpe", pad_id=3, bos_id=2, eos_id=1, unk_id=0))
    ours = Subwords.from_sentencepiece(path)
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.unk_id) == (3, 2, 1, 0)
    ids = ours.encode(TEXT[0])
    assert ours.decode([2, *ids, 1, 3, 3]) == TEXT[0] and ours.decode([0]) == "⁇"


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_the_model_as_it_was(kind, models, tmp_path):
    ours = Subwords.from_folder(models[kind])
    ours.save(tmp_path / "new")
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["sentencepiece.model"]
    assert (tmp_path / "new" / "sentencepiece.model").read_bytes() == models[kind].read_bytes()
    again = Subwords.from_folder(tmp_path / "new")
    assert again.encode_batch(TEXT) == ours.encode_batch(TEXT)
    assert again.digest() == ours.digest() and re.fullmatch("[0-9a-f]{64}", ours.digest())
    assert pickle.loads(pickle.dumps(ours)).encode_batch(TEXT) == ours.encode_batch(TEXT)


def test_models_differ_in_their_digest(models):
    assert len({Subwords.from_folder(path).digest() for path in models.values()}) == 2


def test_a_folder_has_one_vocabulary(models, tmp_path):
    pytest.importorskip("tokenizers")
    model, pairs = Subwords.from_folder(models["bpe"]), Subwords.train(TEXT, 200)
    (tmp_path / "config.json").write_text("{}")
    for ours in (model, pairs, model):
        ours.save(tmp_path)
        names = {entry.name for entry in tmp_path.iterdir()}
        assert "config.json" in names and len(names & set(FILES)) == 1 and len(names) == 2
        assert Subwords.from_folder(tmp_path).digest() == ours.digest()


def test_dropout_depends_on_its_seed_alone(models):
    ours = Subwords.from_folder(models["bpe"])
    first = ours.encode_batch(TEXT, dropout=0.2, seed=1)
    second = ours.encode_batch(TEXT, dropout=0.2, seed=2)
    assert ours.encode_batch(TEXT, dropout=0.2, seed=1) == first != second
    assert ours.encode_batch(TEXT, dropout=0.2, seed=2**40 + 1) == first
    assert [ours.decode(ids) for ids in first] == TEXT
    lengths = [sum(map(len, ours.encode_batch(TEXT, dropout=p, seed=1))) for p in (0, 0.1, 0.5, 1)]
    assert lengths == sorted(lengths) and len(set(lengths)) == 4
    # characters, each word with its "▁"
    assert lengths[-1] == sum(len(line) + 1 for line in TEXT)


def test_dropout_is_that_of_bpe(models):
    ours = Subwords.from_folder(models["unigram"])
    message = "dropout=0.1 is for BPE, which this model is not; leave dropout at 0"
    with pytest.raises(ValueError, match=message):
        ours.encode_batch(TEXT, dropout=0.1, seed=1)
    assert ours.encode_batch(TEXT, dropout=0.0, seed=1) == ours.encode_batch(TEXT)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["pad_id"], "has no pad; train it again with --pad_id=0 --bos_id=1 --eos_id=2 --unk_id=3"),
        (["bos_id", "eos_id"], "has no bos and no eos; train it again with"),
    ],
)
def test_models_without_the_ids_are_refused(without, message, tmp_path):
    path = tmp_path / "m.model"
    # the ids that are left have to follow one another
    kept = {name: number for number, name in enumerate(name for name in IDS if name not in without)}
    path.write_bytes(trained("bpe", **kept, **dict.fromkeys(without, -1)))
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
        Subwords.from_folder(path)


def test_damaged_models_are_refused(models, tmp_path):
    whole, draw = models["bpe"].read_bytes(), random.Random(0)
    path = tmp_path / "sentencepiece.model"
    for content in (b"", b"\n", b"hug pug", draw.randbytes(500), whole[:100], whole[:-1], b"\xff" + whole):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: (is no model|has no)"):
            Subwords.from_folder(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"sentencepiece.model: is no model of SentencePiece; get it again"):
        Subwords.from_folder(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(
        DataError, match=rf"^{re.escape(str(path))}: cannot be read \(Is a directory\); check"
    ):
        Subwords.from_folder(tmp_path)
    with pytest.raises(DataError, match=r"missing: cannot be read \(No such file or directory\); check the"):
        Subwords.from_sentencepiece(tmp_path / "missing")
