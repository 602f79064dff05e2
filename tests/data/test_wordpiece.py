"""WordPiece: the ids of transformers, the same vocabulary each time, whole files, what is refused."""

import gzip
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import nlpfast
from nlpfast.data.biographies import biographies
from nlpfast.data.lines import DataError
from nlpfast.data.wordpiece import FILES, SPECIAL, WordPiece

tokenizers = pytest.importorskip("tokenizers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Characters of one kind each; a word is made of one or of several kinds.
KINDS = [
    LETTERS,
    LETTERS.upper(),
    "éèüñçåøœÉÜÑÅǆǅΐ",
    "e\u0301u\u0308n\u0303c\u0327A\u030a\u0323\u0345",
    "ßẞİ\u0131\u017f\u017fﬁŉςΣ\u03c3ǰKÅΩ",
    "日本語中国人𠀀𪜶豈",
    "ひらがなカタカナｶﾀ",
    "한국어글뷁\u1112\u1161\u11ab",
    "العَرَبِيَّةُ٣\u0640",
    "עִבְרִית",
    "हिन्दीक्षि",
    "ไทยกำ",
    "\x01\x07\x1b\x7f\x80\x85\x9f\ufffd",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e\u0600",
    "👩\u200d💻👨\u200d👩\u200d👧🏽❤\ufe0f🇩🇪1\ufe0f\u20e3",
    "\t\u00a0\u2028\u2029\u3000\u1680\x0b\x0c\r\n",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "¡§«»¿\u2018\u2019“”\u2013—…・。、「」〜\uff0d‿⁇֊؟၊᚛\U00010100\U0001056f\U00016a6e\U0001e95e",
    "€£¥©®°\u00d7÷±µ¼²∑∞♥\u2581",
    "0123456789²①Ⅳ½",
    "\ue000\U000f0000\U0010ffff\u0378\uffff",
    "𝒜𝓫𝟘🄰Ａｂ",
]
NAMES = [*SPECIAL, "[mask]", "[Mask]", "[MASK", "MASK]", "[[MASK]]", "[UNUSED0]", "##s", "##"]


def varied(number, seed):
    """Lines of words of one kind of characters or of several, long ones, and names of special tokens."""
    draw = random.Random(seed)
    lines = ["", " ", "\t", "[MASK]", "a" * 100, "b" * 101, "é" * 101, "日" * 300]
    while len(lines) < number:
        words = []
        for _ in range(draw.randrange(12)):
            kinds = [draw.choice(KINDS) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
            length = draw.choice((1, 2, 4, 6, 9)) if draw.random() < 0.98 else draw.randrange(95, 130)
            words.append("".join(draw.choice(draw.choice(kinds)) for _ in range(length)))
            if draw.random() < 0.1:
                words.append(draw.choice(NAMES))
        lines.append(draw.choice(("", " ", " ", "  ")).join(words))
    return lines


LINES = varied(10_000, 0)


@pytest.fixture(scope="module")
def trained():
    """A vocabulary in lower case and one that keeps capitals, of a part of the lines."""
    return {lower: WordPiece.train(LINES[:3000], 3000, lowercase=lower) for lower in (True, False)}


@pytest.fixture
def small():
    return WordPiece.train(biographies(100), 300)


def of(*tokens, **options):
    """A tokenizer of a few pieces."""
    return WordPiece(bert([*SPECIAL, *tokens], **options))


def bert(tokens, **options):
    ids = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(**options)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return made


def write(folder, tokens=None, **config):
    """Write vocab.txt and, if something is to be in it, tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens or SPECIAL), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def ids_of(other, lines):
    return other(lines, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("lower", [True, False])
def test_ids_are_those_of_transformers(lower, trained, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    ours = trained[lower]
    write(tmp_path, ours.tokens, do_lower_case=lower)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    expected = ids_of(theirs, LINES)
    assert ours.encode_batch(LINES) == expected
    assert [ours.encode(line) for line in LINES[:500]] == expected[:500]
    used = {number for ids in expected for number in ids}
    assert len(used) > 1500 and ours.special_ids <= used
    for ids in expected[:300]:
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("lower", [True, False])
def test_a_saved_folder_gives_the_same_ids_everywhere(lower, trained, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    ours, folder = trained[lower], tmp_path / "new" / "folder"
    ours.save(folder)
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(FILES)
    lines = LINES[:1000]
    expected = ours.encode_batch(lines)
    for kind in (transformers.BertTokenizerFast, transformers.BertTokenizer, transformers.AutoTokenizer):
        theirs = kind.from_pretrained(folder)
        # the BertTokenizer before 5 is another program, with the Unicode tables of Python
        if theirs.is_fast:
            assert ids_of(theirs, lines) == expected
        assert theirs.get_vocab() == {token: number for number, token in enumerate(ours.tokens)}
        assert theirs("a", "b")["input_ids"] == [
            *(ours.cls_id, *ours.encode("a"), ours.sep_id, *ours.encode("b"), ours.sep_id)
        ]
        assert theirs("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
        assert theirs.mask_token_id == ours.mask_id and theirs.pad_token_id == ours.pad_id
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a", "b")
    assert plain.tokens == ["[CLS]", "a", "[SEP]", "b", "[SEP]"] and plain.type_ids == [0, 0, 0, 1, 1]
    for left_out in (None, "tokenizer.json"):
        if left_out:
            (folder / left_out).unlink()
        again = WordPiece.from_folder(folder)
        assert again.tokens == ours.tokens and again.lowercase == lower
        assert again.encode_batch(lines) == expected


def test_what_a_configuration_says_goes_before_the_tokenizer(small, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    small.save(tmp_path)
    text = "Zürich ZÜRICH 日本 born"
    options = [
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": None, "tokenize_chinese_chars": False},
        {},
    ]
    seen = set()
    write(tmp_path / "plain", [*small.tokens, "Zürich", "zürich", "Zurich", "zurich", "ZURICH", "日本"])
    for config in options:
        write(tmp_path / "plain", WordPiece.from_folder(tmp_path / "plain").tokens, **(config or {"x": 1}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for folder in (tmp_path, tmp_path / "plain"):
            ids = WordPiece.from_folder(folder).encode(text)
            assert ids == ids_of(transformers.BertTokenizerFast.from_pretrained(folder), text)
        seen.add(tuple(ids))
    assert len(seen) == len(options)


def test_without_a_configuration_the_tokenizer_counts(tmp_path):
    cased = WordPiece.train(["Ada ada Ada ada"], 20, lowercase=False)
    cased.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for without in (lambda: path.write_text("{}"), path.unlink):
        without()
        again = WordPiece.from_folder(tmp_path)
        assert not again.lowercase and again.encode("Ada ada") == cased.encode("Ada ada")
    (tmp_path / "tokenizer.json").unlink()
    assert WordPiece.from_folder(tmp_path).lowercase


def test_pieces_by_hand():
    """The longest piece that there is, from the front; none is unknown as a whole, and so are long words."""
    ours = of("un", "a", "##aff", "##able", "##a", "#", "##b", "!", "unaff")
    by_name = {token: number for number, token in enumerate(ours.tokens)}
    for text, pieces in {
        "unaffable": "unaff ##able",
        "Unaable!": "un ##a ##able !",
        "##a #": "# # a #",
        "unx una": "[UNK] un ##a",
        "á\u0301 a\u200bb": "a a ##b",
        "a" * 100: "a" + " ##a" * 99,
        "a" * 101: "[UNK]",
        "a[MASK]un[mask]": "a [MASK] un [UNK] [UNK] [UNK]",
        "": "",
    }.items():
        assert ours.encode(text) == [by_name[piece] for piece in pieces.split()], text
        assert [ours.token(number) for number in ours.encode(text)] == pieces.split()
    assert ours.decode(ours.encode("Unaable! [MASK]a")) == "unaable! [MASK] a"
    assert ours.encode_batch([]) == [] and ours.encode_batch(("a", "")) == [[6], []]
    assert [ours.tokens[i] for i in range(len(ours)) if ours.continues[i]] == [
        "##aff",
        "##able",
        "##a",
        "##b",
    ]
    assert (ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id) == (0, 1, 2, 3, 4)
    assert ours.special_ids == {0, 1, 2, 3, 4} and len(ours) == len(ours.tokens) == 14


def test_ids_are_where_a_file_has_them(tmp_path):
    tokens = ["b", "[MASK]", "[SEP]", "##c", "[CLS]", "[PAD]", "[UNK]"]
    ours = WordPiece.from_folder(write(tmp_path, tokens))
    assert (ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id) == (5, 6, 4, 2, 1)
    assert ours.special_ids == {1, 2, 4, 5, 6} and ours.tokens == tokens
    assert ours.encode("BC d [MASK]") == [0, 3, 6, 1] and ours.continues == [t == "##c" for t in tokens]


@pytest.mark.parametrize("number", [-1, 13, 2**40])
def test_ids_that_are_not_there(number):
    ours = of("un", "a", "##aff", "##able", "##a", "!", "##b", "unaff")
    for call in (ours.token, lambda number: ours.decode([0, number])):
        with pytest.raises(IndexError, match=re.escape(f"id {number} is not in 0..12; use the vocabulary")):
            call(number)


WORDS = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
# joined at 20, 16, 15, 12, 5 and 4; equally frequent ones in the order of their numbers
LEARNT = ["##ug", "##un", "hug", "pun", "pug", "hugs", "bun"]
ALPHABET = [*"bghnpsu", *("##" + char for char in "bghnpsu")]


@pytest.mark.parametrize("joined", [0, 1, 4, 7])
def test_what_is_learnt_by_hand(joined):
    first = [*SPECIAL, *ALPHABET]
    assert WordPiece.train(WORDS, len(first) + joined).tokens == [*first, *LEARNT[:joined]]


def test_how_frequent_a_piece_has_to_be():
    everything = [*SPECIAL, *ALPHABET, *LEARNT]
    assert WordPiece.train(WORDS, 1000).tokens == everything
    # the letter s is there 5 times, b 4 times
    for least, letters, joined in ((4, "bghnpsu", 7), (5, "ghnpsu", 6), (6, "ghnpu", 4)):
        rarer = WordPiece.train(WORDS, 1000, min_frequency=least).tokens
        assert rarer[5:] == [*letters, *(f"##{letter}" for letter in letters), *LEARNT[:joined]]
    assert WordPiece.train(["ab", "AB c"], 100, min_frequency=1).tokens[5:] == [
        *"abc",
        "##a",
        "##b",
        "##c",
        "ab",
    ]
    assert "c" not in WordPiece.train(["ab", "AB c"], 100).tokens


def test_characters_that_are_words_of_their_own_continue_none():
    tokens = WordPiece.train(["a! 日本 (x) é 한 ß"] * 2, 100, lowercase=False).tokens
    assert tokens[5:14] == ["!", "(", ")", "a", "x", "ß", "é", "日", "本"]
    assert tokens[14:] == ["한", "##a", "##x", "##ß", "##é", "##한"]
    lower = WordPiece.train(["É\u0301 한 SS"] * 2, 100).tokens
    assert lower[5:9] == ["e", "s", "\u1112", "\u1161"] and "##\u11ab" in lower and "é" not in lower
    assert "ss" in lower


def test_nothing_of_the_text_is_unknown():
    for lower in (True, False):
        lines = [line for line in LINES[:2000] if not any(len(word) > 60 for word in line.split())]
        ours = WordPiece.train(lines, 3000, lowercase=lower, min_frequency=1)
        plain = [line.replace("[UNK]", "") for line in lines]
        long = {len(word) for line in plain for word in re.split(r"[\s\W]", line)}
        assert max(long) < 100
        assert not any(ours.unk_id in ids for ids in ours.encode_batch(plain))


def test_lines_of_every_kind():
    once = WordPiece.train(iter(WORDS), 25)
    assert (
        once.tokens
        == WordPiece.train(tuple(WORDS), 25).tokens
        == WordPiece.train([" ".join(WORDS)], 25).tokens
    )

    def broken():
        yield "ab"
        raise DataError("file:2: damaged")

    class Broken:
        """Whole at first."""

        times = 0

        def __iter__(self):
            self.times += 1
            yield from broken() if self.times == 2 else ["ab ab"]

    for lines in (broken(), Broken()):
        with pytest.raises(DataError, match="file:2: damaged"):
            WordPiece.train(lines, 25)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            [],
            {},
            "wiki: there are no words, or no characters that occur min_frequency=2 times; give more text",
        ),
        (["", " \t\x01"] * 9, {}, "wiki: there are no words"),
        (["ab"], {}, "wiki: there are no words, or no characters that occur min_frequency=2 times"),
        (
            WORDS,
            {"vocab_size": 18},
            "wiki: special tokens and characters are 19, more than vocab_size=18; give",
        ),
        (WORDS, {"vocab_size": -1}, "wiki: special tokens and characters are 19, more than vocab_size=-1"),
    ],
)
def test_texts_that_teach_nothing(lines, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        WordPiece.train(lines, **{"vocab_size": 100, "source": "wiki", **options})


def test_min_frequency_is_checked():
    with pytest.raises(ValueError, match="min_frequency=0 must be at least 1; 1 keeps all"):
        WordPiece.train(WORDS, 100, min_frequency=0)


# Words at random have many pairs that are equally frequent: there the order of a hash map would show.
TIES = """
import hashlib, random, sys, types
package = types.ModuleType("nlpfast")
package.__path__ = [sys.argv[1]]
sys.modules["nlpfast"] = package
from nlpfast.data.wordpiece import WordPiece

for seed in range(12):
    draw = random.Random(seed)
    letters = "abcdeÉß日" * 4 + "-"
    words = ["".join(draw.choice(letters) for _ in range(draw.randrange(2, 9))) for _ in range(400)]
    lines = [" ".join(words[i : i + 7]) for i in range(0, 400, 7)]
    options = {"lowercase": seed % 2 == 0, "min_frequency": 1 + seed % 3}
    tokens = WordPiece.train(lines, 70 + 20 * seed, **options).tokens
    print(len(tokens), hashlib.sha256("\\n".join(tokens).encode()).hexdigest())
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


def test_in_one_process_too():
    assert len({tuple(WordPiece.train(LINES[:400], 1200).tokens) for _ in range(6)}) == 1


class Lengths:
    def __init__(self, wordpiece):
        self.wordpiece = wordpiece

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return len(self.wordpiece.encode("born " * index))


def test_it_goes_to_other_processes(small):
    again = pickle.loads(pickle.dumps(small))
    assert again.tokens == small.tokens and again.encode_batch(LINES[:99]) == small.encode_batch(LINES[:99])
    assert again.special_ids == small.special_ids and again.lowercase
    loader = DataLoader(Lengths(small), batch_size=6, num_workers=1)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3, 4, 5]]


def test_a_file_that_pads_and_cuts_does_not_here(small, tmp_path):
    small.save(tmp_path)
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole.enable_padding(length=50)
    whole.enable_truncation(3)
    whole.save(str(tmp_path / "tokenizer.json"))
    again = WordPiece.from_folder(tmp_path)
    assert again.encode("born " * 9) == small.encode("born " * 9)
    assert again.encode_batch(["born", "born " * 9]) == [small.encode("born"), small.encode("born " * 9)]


def test_further_tokens_of_a_folder(small, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    size = len(small)
    small.save(tmp_path)
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole.add_special_tokens(["[DRUG]"])
    whole.add_tokens(["new word"])
    whole.save(str(tmp_path / "tokenizer.json"))
    found = WordPiece.from_folder(tmp_path)
    text = "a [DRUG] and NEW WORDS"
    assert found.tokens[size:] == ["[DRUG]", "new word"] and found.special_ids == {0, 1, 2, 3, 4, size}
    assert found.encode(text)[1] == size and size + 1 in found.encode(text)
    found.save(tmp_path / "again")
    again = WordPiece.from_folder(tmp_path / "again")
    assert again.tokens == found.tokens and again.encode(text) == found.encode(text)
    assert ids_of(transformers.BertTokenizerFast.from_pretrained(tmp_path / "again"), text) == found.encode(
        text
    )
    (tmp_path / "again" / "tokenizer.json").unlink()
    with pytest.raises(
        DataError, match=r"tokenizer_config.json: has the token '\[DRUG\]', which vocab.txt lacks"
    ):
        WordPiece.from_folder(tmp_path / "again")


def test_the_names_of_special_tokens_are_special_even_if_a_file_does_not_say_so(tmp_path):
    bert([*SPECIAL, "a"]).save(str(tmp_path / "tokenizer.json"))
    ours = WordPiece.from_folder(tmp_path)
    assert ours.encode("a[MASK]a") == [5, 4, 5] and ours.special_ids == {0, 1, 2, 3, 4}


def test_vocab_txt_is_read_as_text_is(tmp_path):
    expected = [*SPECIAL, "é", "##日"]
    text = "".join(f"{token}\n" for token in expected)
    for content in (
        text.encode(),
        text[:-1].encode(),
        b"\xef\xbb\xbf" + text.encode(),
        text.replace("\n", "\r\n").encode(),
        gzip.compress(text.encode()),
    ):
        (tmp_path / "vocab.txt").write_bytes(content)
        assert WordPiece.from_folder(tmp_path).tokens == expected


LISTED = "".join(f"{token}\n" for token in SPECIAL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "vocab.txt: the file is empty"),
        (LISTED.encode() + b"a\n\xff\n", "vocab.txt:7: byte 0xff is not UTF-8"),
        (LISTED.encode() + b"a\0\n", "vocab.txt:6: NUL byte"),
        (
            f"{LISTED}a\nb\na\n".encode(),
            "vocab.txt:8: repeats 'a' of line 6, a piece has one id; get the file",
        ),
        *(
            (LISTED.replace(token, "a").encode(), f"vocab.txt: has no {token}; give the vocabulary of a BERT")
            for token in SPECIAL
        ),
    ],
)
def test_a_damaged_vocab_txt_is_named(content, message, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        WordPiece.from_folder(tmp_path)


def changed(**parts):
    made = bert([*SPECIAL, "a"])
    for name, part in parts.items():
        setattr(made, name, part)
    return made.to_str()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json: is no tokenizer ("),
        ("[]", "tokenizer.json: is no tokenizer ("),
        ("", "tokenizer.json: the file is empty"),
        (b"\xff", "tokenizer.json:1: byte 0xff is not UTF-8"),
        (changed(model=tokenizers.models.BPE()), "has BPE for WordPiece; give the tokenizer of a BERT model"),
        (changed(normalizer=tokenizers.normalizers.NFC()), "has NFC for BertNormalizer; give the tokenizer"),
        (changed(normalizer=None), "has NoneType for BertNormalizer"),
        (
            changed(pre_tokenizer=tokenizers.pre_tokenizers.Whitespace()),
            "tokenizer.json: has Whitespace for BertPreTokenizer",
        ),
        (bert(["a", *SPECIAL[1:]]).to_str(), "tokenizer.json: has no [PAD]; give the vocabulary"),
        (
            changed().replace('"##"', '"@@"'),
            "continues words by '@@', not by '##'; give that of a BERT model",
        ),
        (changed().replace('"a":5', '"a":6'), "its 6 ids are not 0..5; save the tokenizer again"),
    ],
)
def test_a_damaged_tokenizer_json_is_named(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)):
        WordPiece.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no such file ("),
        ("[]", "is no such file ("),
        ("1", "is no such file ("),
        ("[" * 200_000, "is no such file ("),
        ('{"added_tokens_decoder": [1]}', "is no such file ("),
        ('{"added_tokens_decoder": {"5": "a"}}', "is no such file ("),
        ('{"added_tokens_decoder": {"5": {}}}', "is no such file ("),
        ("", "the file is empty"),
        (b"\xff", ":1: byte 0xff is not UTF-8"),
        ('{"do_lower_case": "yes"}', "do_lower_case is 'yes', expected true or false; correct it"),
        ('{"do_lower_case": null}', "do_lower_case is None, expected true or false"),
        ('{"strip_accents": 1}', "strip_accents is 1, expected true or false"),
        ('{"tokenize_chinese_chars": 0}', "tokenize_chinese_chars is 0, expected true or false"),
    ],
)
def test_a_damaged_configuration_is_named(content, message, tmp_path):
    path = write(tmp_path) / "tokenizer_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)) as error:
        WordPiece.from_folder(tmp_path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing", "file", "empty"])
def test_folders_without_a_vocabulary(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    message = f"{name}: has no tokenizer.json or vocab.txt; give the folder of a BERT model"
    with pytest.raises(DataError, match=re.escape(message)):
        WordPiece.from_folder(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_a_vocabulary_that_cannot_be_saved_leaves_the_old_one(name, small, tmp_path):
    small.save(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    before = {entry.name: entry.is_file() and entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / name))}: cannot be written"):
        of("a").save(tmp_path)
    assert {entry.name: entry.is_file() and entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_files_take_their_places_when_all_are_written(small, tmp_path, monkeypatch):
    """And tokenizer.json, which alone would do, is the last."""
    order = []
    really = os.replace

    def replace(source, target):
        assert len(list(tmp_path.glob(".*.part"))) == len(FILES) - len(order)
        order.append(Path(target).name)
        really(source, target)

    monkeypatch.setattr(os, "replace", replace)
    small.save(tmp_path)
    assert order == ["tokenizer_config.json", "vocab.txt", "tokenizer.json"]
    with pytest.raises(OSError, match=r"below: cannot be made \(Not a directory\); name another folder"):
        small.save(tmp_path / "vocab.txt" / "below")


def test_without_tokenizers_it_says_what_to_install(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: WordPiece.train(WORDS, 100), lambda: WordPiece.from_folder(tmp_path)):
        with pytest.raises(RuntimeError, match=r"needs tokenizers \(.*\): pip install 'nlpfast\[bert\]'$"):
            call()
