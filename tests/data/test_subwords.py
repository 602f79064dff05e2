"""Subwords: text comes back, words are counted, the same vocabulary each time, dropout by its seed."""

import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import nlpfast
from nlpfast.alignment import words_of
from nlpfast.data.biographies import biographies
from nlpfast.data.bpe import SPECIAL
from nlpfast.data.lines import DataError
from nlpfast.data.subwords import FILES, Subwords

tokenizers = pytest.importorskip("tokenizers")

# Characters of one kind each; a word is made of one or of several kinds.
KINDS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEÄÖÜßéèñçåøœ",
    "e\u0301u\u0308n\u0303A\u030a\u0323",
    "日本語中国人𠀀ひらがなカタカナ한국어",
    "العَرَبِيَّةُ٣\u0640",
    "हिन्दीไทยกำ",
    "\x01\x07\x7f\x80\x85\u200b\u200d\ufeff\u00ad",
    "👩\u200d💻👧🏽❤\ufe0f🇩🇪",
    "\u00a0\u2028\u2029\u3000\x0b\x0c\r",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "¡«»¿\u2018\u2019“”\u2013—…。、‿⁇",
    "0123456789²Ⅳ½€",
    "\ue000\U0010ffff\ufffd",
]
NAMES = [*SPECIAL, "<S>", "<unk", "##s", "@@"]


def varied(number, seed):
    """Lines of words of one kind of characters or of several, with names of special tokens."""
    draw = random.Random(seed)
    lines = ["", " ", "\t", " a  b\t c ", "a" * 300]
    while len(lines) < number:
        words = []
        for _ in range(draw.randrange(9)):
            kinds = [draw.choice(KINDS) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
            words.append("".join(draw.choice(draw.choice(kinds)) for _ in range(draw.choice((1, 2, 4, 7)))))
            if draw.random() < 0.1:
                words.append(draw.choice(NAMES))
        lines.append(draw.choice((" ", " ", "  ", "\t")).join(words))
    return lines


LINES = varied(1500, 0)
# (hug, 10), (pug, 5), (pun, 12), (bun, 4), (hugs, 5)
WORDS = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
ALPHABET = [*"bghnpsu", "▁"]
# joined at 20, 17, 16, 15, 15 and 12
LEARNT = ["ug", "▁p", "un", "hug", "▁hug", "▁pun"]


def words_in(text):
    return [word for word in re.split("[ \t]", text) if word]


@pytest.fixture(scope="module")
def whole():
    """A vocabulary that has every character of the lines."""
    return Subwords.train(LINES, 1500, min_frequency=1)


@pytest.fixture
def small():
    return Subwords.train(WORDS, 20)


def test_what_is_learnt_by_hand():
    for joined in range(len(LEARNT) + 1):
        tokens = Subwords.train(WORDS, len(SPECIAL) + len(ALPHABET) + joined).tokens
        assert tokens == [*SPECIAL, *ALPHABET, *LEARNT[:joined]]


def test_pieces_by_hand(small):
    tokens = small.tokens
    # (▁p, ug) and (▁hug, s) come 5 times each; ▁p has the lower number
    assert tokens[12:] == [*LEARNT, "▁pug", "▁hugs"]
    for text, pieces, words in (
        ("pun hugs", "▁pun ▁hugs", [0, 1]),
        ("hunb", "▁ h un b", [0, 0, 0, 0]),
        ("pun  \t hug ", "▁pun ▁hug", [0, 1]),
        ("x pun", "▁ <unk> ▁pun", [0, 0, 1]),
        ("(hug)s", "▁ <unk> hug <unk> s", [0, 0, 0, 0, 0]),
        ("", "", []),
        (" ", "", []),
    ):
        ids = small.encode(text)
        assert small.pieces(ids) == pieces.split(), text
        assert small.word_numbers(ids) == words
    assert small.decode(small.encode("(hug)s  xpun")) == "⁇hug⁇s ⁇pun"
    assert (small.pad_id, small.bos_id, small.eos_id, small.unk_id) == (0, 1, 2, 3)
    assert len(small) == len(tokens) == len(small.begins)
    assert [token for token, begins in zip(tokens, small.begins, strict=True) if begins] == [
        token for token in tokens if token[0] == "▁"
    ]


def test_signs_are_pieces_of_their_own():
    text = 'Der Mann, der 12 Hunde (a) "bb" v_w ... sah.'
    ours = Subwords.train([text] * 9, 200)
    pieces = '▁Der ▁Mann , ▁der ▁12 ▁Hunde ▁( a ) ▁" bb " ▁v_w ▁. . . ▁sah .'
    assert " ".join(ours.pieces(ours.encode(text))) == pieces
    # no piece is part of two words
    assert not any("▁" in token[1:] for token in ours.tokens)


def test_text_comes_back_with_single_spaces(whole):
    encoded = whole.encode_batch(LINES)
    for line, ids in zip(LINES, encoded, strict=True):
        assert whole.unk_id not in ids
        assert whole.decode(ids) == " ".join(words_in(line))
    assert encoded[:300] == [whole.encode(line) for line in LINES[:300]]
    assert whole.encode_batch([]) == [] and whole.encode_batch(("", "a")) == [[], whole.encode("a")]
    # not characters alone
    assert len({number for ids in encoded for number in ids if len(whole.tokens[number]) > 3}) > 20


def test_words_are_those_between_spaces():
    """Unknown characters too, and a "▁" in the text, which is one of them."""
    poor = Subwords.train(biographies(50), 300)
    lines = [*LINES, "▁", "a▁b ▁c ▁ d", "▁▁ ▁", "\uffff"]
    for line, ids in zip(lines, poor.encode_batch(lines), strict=True):
        numbers = poor.word_numbers(ids)
        assert numbers == words_of(poor.pieces(ids), "sentencepiece")
        words = words_in(line)
        assert sorted(set(numbers)) == list(range(len(words)))
        # each word gets the pieces that it has by itself
        assert [len(list(same)) for _, same in itertools.groupby(numbers)] == [
            len(poor.encode(word)) for word in words
        ]
        assert len(poor.decode(ids).split(" ")) == max(1, len(words))
    assert poor.pieces(poor.encode("a▁b")) == ["▁a", "<unk>", "b"]
    ours = Subwords.train(["a▁b \uffff"] * 9, 100)
    assert sorted(ours.tokens[4:7]) == ["a", "b", "▁"]
    assert ours.pieces(ours.encode("a▁b \uffff")) == ["▁a", "<unk>", "b", "▁", "<unk>"]


def test_the_first_piece_begins_a_word_whatever_it_is(small):
    ids = [small.tokens.index(piece) for piece in ("ug", "un", "▁p", "ug")]
    assert small.word_numbers(ids) == [0, 0, 1, 1]
    assert small.decode(ids) == "ugun pug" and small.word_numbers([]) == [] and small.decode([]) == ""
    # words without characters count too
    ids = [small.tokens.index(piece) for piece in ("▁", "▁pun", "▁", "▁pun")]
    assert small.word_numbers(ids) == [0, 1, 2, 3] and small.decode(ids).split(" ") == ["", "pun", "", "pun"]


def test_special_tokens_are_left_out_of_text_and_not_read_from_it(whole):
    ids = whole.encode("a </s> <pad>")
    assert not {0, 1, 2, 3} & set(ids) and whole.decode(ids) == "a </s> <pad>"
    assert whole.decode([1, *ids, 2, 0, 0]) == "a </s> <pad>"
    assert whole.pieces([1, 3, 2, 0]) == ["<s>", "<unk>", "</s>", "<pad>"] and whole.decode([3]) == "⁇"


@pytest.mark.parametrize("number", [-1, 20, 2**40])
def test_ids_that_are_not_there(number, small):
    for call in (small.decode, small.pieces):
        with pytest.raises(IndexError, match=re.escape(f"id {number} is not in 0..19; use the vocabulary")):
            call([0, number])


def test_how_frequent_a_piece_has_to_be():
    # the letter b is there 4 times, s 5 times, h 15 times
    for least, letters in ((2, "bghnpsu"), (4, "bghnpsu"), (5, "ghnpsu"), (6, "ghnpu"), (16, "gnpu")):
        tokens = Subwords.train(WORDS, 1000, min_frequency=least).tokens
        assert [token for token in tokens[4:] if len(token) == 1] == [*letters, "▁"]
    assert "▁bun" in Subwords.train(WORDS, 1000, min_frequency=4).tokens
    # of characters that are frequent enough
    assert "▁pug" in Subwords.train(WORDS, 1000, min_frequency=5).tokens
    assert "▁pug" not in Subwords.train(WORDS, 1000, min_frequency=6).tokens
    assert Subwords.train(["ab"], 100, min_frequency=1).tokens == [*SPECIAL, "a", "b", "▁", "ab", "▁ab"]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "wiki: there are no words, or no characters that occur min_frequency=2 times; give more"),
        (["", " \t▁▁"] * 9, {}, "wiki: there are no words"),
        (["ab"], {}, "wiki: there are no words, or no characters that occur min_frequency=2 times"),
        (WORDS, {"size": 11}, "wiki: special tokens and characters are 12, more than size=11; give as many"),
    ],
)
def test_texts_that_teach_nothing(lines, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        Subwords.train(lines, **{"size": 100, "source": "wiki", **options})


def test_min_frequency_is_checked():
    with pytest.raises(ValueError, match="min_frequency=0 must be at least 1; 1 keeps all"):
        Subwords.train(WORDS, 100, min_frequency=0)
    assert len(Subwords.train(WORDS, 12)) == 12


def test_lines_of_every_kind():
    tokens = Subwords.train(iter(WORDS), 18).tokens
    assert tokens == Subwords.train(tuple(WORDS), 18).tokens
    assert tokens == Subwords.train([" ".join(WORDS)], 18).tokens


# Words at random have many pairs that are equally frequent: there the order of a hash map would show.
TIES = """
import random, sys, types
package = types.ModuleType("nlpfast")
package.__path__ = [sys.argv[1]]
sys.modules["nlpfast"] = package
from nlpfast.data.subwords import Subwords

for seed in range(12):
    draw = random.Random(seed)
    letters = "abcdeÉß日" * 4 + "-"
    words = ["".join(draw.choice(letters) for _ in range(draw.randrange(2, 9))) for _ in range(400)]
    lines = [" ".join(words[i : i + 7]) for i in range(0, 400, 7)]
    found = Subwords.train(lines, 70 + 20 * seed, min_frequency=1 + seed % 3)
    print(found.digest(), found.encode_batch(lines[:5], dropout=0.3, seed=seed))
assert "torch" not in sys.modules
"""


def test_the_same_lines_give_the_same_vocabulary():
    folder = str(Path(nlpfast.__file__).parent)
    found = []
    for seed, threads, parallel in (("0", "1", "true"), ("1", "3", "true"), ("2", "2", "false")):
        environment = {
            "PYTHONHASHSEED": seed,
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": parallel,
        }
        run = subprocess.run(
            [sys.executable, "-c", TIES, folder],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(run.stdout)
    assert found[0].count("\n") == 12 and len(set(found[0].splitlines())) == 12
    assert found[0] == found[1] == found[2]


def test_a_digest_tells_vocabularies_apart(small, tmp_path):
    small.save(tmp_path)
    assert Subwords.from_folder(tmp_path).digest() == small.digest()
    assert re.fullmatch("[0-9a-f]{64}", small.digest())
    assert Subwords.train(WORDS, 19).digest() != small.digest()
    # the same pieces, joined otherwise: a b c and ab c against b c and a bc
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"] = {piece: i for i, piece in enumerate([*SPECIAL, *"abc▁", "ab", "bc", "abc"])}
    digests = set()
    for merges in ([["a", "b"], ["b", "c"], ["ab", "c"]], [["b", "c"], ["a", "b"], ["a", "bc"]]):
        state["model"]["merges"] = merges
        path.write_text(json.dumps(state))
        digests.add(Subwords.from_folder(tmp_path).digest())
        state["model"]["vocab"]["x"] = 11
        path.write_text(json.dumps(state))
        digests.add(Subwords.from_folder(tmp_path).digest())
        del state["model"]["vocab"]["x"]
    assert len(digests) == 4


def test_a_saved_folder_gives_the_same_ids_everywhere(whole, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    folder = tmp_path / "new" / "folder"
    whole.save(folder)
    assert [entry.name for entry in folder.iterdir()] == ["tokenizer.json"]
    lines = [line for line in LINES if not any(name in line for name in SPECIAL)]
    expected = whole.encode_batch(lines)
    again = Subwords.from_folder(folder)
    assert again.tokens == whole.tokens and again.encode_batch(lines) == expected
    assert again.encode_batch(LINES[:500], dropout=0.5, seed=3) == whole.encode_batch(
        LINES[:500], dropout=0.5, seed=3
    )
    path = str(folder / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(path)
    assert [encoding.ids for encoding in plain.encode_batch(lines)] == expected
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path, pad_token="<pad>", eos_token="</s>")
    assert theirs(lines, add_special_tokens=False)["input_ids"] == expected
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (0, 2, len(whole))
    for ids in expected[:200]:
        assert plain.decode([1, *ids, 2]) == whole.decode(ids)
    # as it says: the names of special tokens are text here alone
    assert plain.encode("a</s>").ids[-1] == 2 != whole.encode("a</s>")[-1]


def damaged(state, change):
    """Return a tokenizer.json with one change."""
    state = json.loads(json.dumps(state))
    change(state)
    return json.dumps(state)


def without_the_mark(state):
    """Take away "▁", and the pairs with it."""
    model = state["model"]
    model["merges"] = [pair for pair in model["merges"] if "▁" not in "".join(pair)]
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if "▁" not in piece]
    model["vocab"] = {piece: number for number, piece in enumerate(pieces)}


CHANGES = {
    "does not begin with <pad>, <s>, </s>, <unk>, or has no ▁": without_the_mark,
    "has another normalizer": lambda state: state.update(normalizer={"type": "NFC"}),
    "has another pre_tokenizer": lambda state: state.update(pre_tokenizer={"type": "Whitespace"}),
    "has another decoder": lambda state: state.update(decoder=None),
    "has another model": lambda state: state["model"].update(dropout=0.1),
    "has another added_tokens": lambda state: state["added_tokens"].pop(),
    "has another truncation": lambda state: state.update(
        truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    ),
    "does not begin with <pad>, <s>, </s>, <unk>": lambda state: state["model"]["vocab"].update(
        {"<pad>": 1, "<s>": 0}
    ),
    "is no tokenizer": lambda state: state["model"]["merges"].append(["x", "y"]),
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_files_are_refused(message, small, tmp_path):
    small.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(damaged(json.loads(path.read_text()), CHANGES[message]))
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: {re.escape(message)}.*; (give|save)"):
        Subwords.from_folder(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 100, -2])
def test_files_that_are_cut_are_refused(size, small, tmp_path):
    small.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=re.escape(str(path))):
        Subwords.from_folder(tmp_path)


def test_folders_without_a_vocabulary(small, tmp_path):
    with pytest.raises(DataError, match=r"has no tokenizer.json or sentencepiece.model; give a folder of"):
        Subwords.from_folder(tmp_path)
    with pytest.raises(DataError, match=r"missing: has no tokenizer.json"):
        Subwords.from_folder(tmp_path / "missing")
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    pieces.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer.json: is WordPiece, not BPE; give a folder of"):
        Subwords.from_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/below: cannot be made \(.*\); name another folder"):
        small.save(tmp_path / "file" / "below")
    for name in FILES:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"has tokenizer.json and sentencepiece.model; remove the one"):
        Subwords.from_folder(tmp_path)


def test_dropout_depends_on_its_seed_alone(whole):
    lines = LINES[:400]
    first = whole.encode_batch(lines, dropout=0.2, seed=1)
    assert whole.encode_batch(lines, dropout=0.2, seed=1) == first
    assert whole.encode_batch(lines, dropout=0.2, seed=2) != first
    for line, ids in zip(lines, first, strict=True):
        assert whole.decode(ids) == " ".join(words_in(line))
        assert whole.word_numbers(ids)[-1:] == [len(words_in(line)) - 1][: len(ids)]


def test_how_much_is_dropped(whole):
    lines = LINES[:400]
    lengths = [sum(map(len, whole.encode_batch(lines, dropout=p, seed=0))) for p in (0, 0.1, 0.5, 1)]
    assert lengths == sorted(lengths) and len(set(lengths)) == 4
    # characters, each word with its "▁"
    assert lengths[-1] == sum(len(word) + 1 for line in lines for word in words_in(line))
    # without any draw it is what the library does
    poor = Subwords.train(biographies(50), 300)
    for ours in (whole, poor):
        marked = [*lines, "a▁b ▁"]
        assert ours._pieces.sample_batch(marked, 0.0, 0) == ours.encode_batch(marked)


def test_dropout_by_hand():
    """Of ▁ a b first a b are joined, then ▁ ab; if the first is passed over there is nothing to join."""
    ours = Subwords.train(["ab"], 100, min_frequency=1)
    n = 10_000
    found = Counter(" ".join(ours.pieces(ids)) for ids in ours.encode_batch(["ab"] * n, dropout=0.25, seed=5))
    expected = {"▁ab": 0.75**2, "▁ ab": 0.75 * 0.25, "▁ a b": 0.25}
    assert set(found) == set(expected)
    for pieces, share in expected.items():
        assert abs(found[pieces] / n - share) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": -0.1, "seed": 1}, "dropout=-0.1 must be at least 0 and at most 1; 0.1 is common"),
        ({"dropout": 1.1, "seed": 1}, "dropout=1.1 must be at least 0 and at most 1"),
        ({"dropout": float("nan"), "seed": 1}, "dropout=nan must be at least 0 and at most 1"),
        ({"dropout": 0.1}, "seed=None must be at least 0 with dropout=0.1; give a number"),
        ({"dropout": 0.1, "seed": -1}, "seed=-1 must be at least 0 with dropout=0.1"),
    ],
)
def test_dropout_is_checked(options, message, small):
    with pytest.raises(ValueError, match=re.escape(message)):
        small.encode_batch(["hug"], **options)


def test_it_goes_to_other_processes(whole):
    again = pickle.loads(pickle.dumps(whole))
    assert again.tokens == whole.tokens and again.digest() == whole.digest()
    assert again.encode_batch(LINES[:200]) == whole.encode_batch(LINES[:200])
    assert again.encode_batch(LINES[:99], dropout=0.5, seed=7) == whole.encode_batch(
        LINES[:99], dropout=0.5, seed=7
    )


def test_without_the_packages_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(RuntimeError, match=r"BPE needs tokenizers .* pip install 'nlpfast\[nmt\]'$"):
        Subwords.train(WORDS, 100)
    (tmp_path / "some.model").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"needs its package .*: pip install 'nlpfast\[nmt\]'$"):
        Subwords.from_folder(tmp_path / "some.model")
