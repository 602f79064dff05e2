"""Parallel text, and the pairs of a batch against the tokens that they must meet in the padded batch."""

import random

import pytest
import torch

from nlpfast.data.alignments import Alignments, read_alignments
from nlpfast.data.parallel import AlignmentPairs, read_parallel
from nlpfast.data.text import DataError

PAD, BOS, EOS = -1, -2, -3


def test_words_are_what_spaces_and_tabs_separate(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(b"\xef\xbb\xbfa b\r\n\n  c\td  \n" + "x\u00a0y \u2028 z\x0b\n".encode())
    target.write_bytes(b"A\n\nB\nC")
    assert read_parallel(source, target) == (
        [["a", "b"], [], ["c", "d"], ["x\u00a0y", "\u2028", "z\x0b"]],
        [["A"], [], ["B"], ["C"]],
    )


def test_texts_of_other_lengths_are_named(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_text("a\nb\n")
    target.write_text("a\nb\n\n")
    with pytest.raises(DataError) as error:
        read_parallel(source, target)
    assert str(error.value).startswith(f"{source} has 2 lines, {target} has 3: ")


def padded(sentences, width, left):
    rows = [[PAD] * (width - len(s)) + s if left else s + [PAD] * (width - len(s)) for s in sentences]
    return rows


def corpus(rng, count):
    """Sentences whose tokens say where they are from, and links in range."""
    source = [[(i, p) for p in range(rng.randrange(1, 7))] + [EOS] for i in range(count)]
    target = [[(i, p) for p in range(rng.randrange(1, 7))] + [EOS] for i in range(count)]
    links = []
    for s, t in zip(source, target, strict=True):
        every = [(i, j) for i in range(len(s) - 1) for j in range(len(t) - 1)]
        links.append(rng.sample(every, rng.randrange(min(6, len(every)) + 1)))
    return source, target, links


@pytest.mark.parametrize("left_pad_target", [False, True])
@pytest.mark.parametrize("left_pad_source", [False, True])
@pytest.mark.parametrize("extra", [None, 3])
def test_pairs_meet_their_tokens(left_pad_target, left_pad_source, extra):
    rng = random.Random(0)
    source, target, links = corpus(rng, 40)
    pairs = AlignmentPairs(Alignments.from_links(links), list(map(len, source)), list(map(len, target)))
    assert pairs.report.used == 40
    met = 0
    for _ in range(100):
        chosen = [rng.randrange(40) for _ in range(rng.randrange(1, 6))]
        width_s = max(len(source[i]) for i in chosen) + (extra or 0)
        width_t = max(len(target[i]) for i in chosen) + (extra or 0)
        columns = padded([source[i] for i in chosen], width_s, left_pad_source)
        # row r of the decoder reads inputs[r] and predicts labels[r]
        labels = padded([target[i] for i in chosen], width_t, left_pad_target)
        inputs = padded([[BOS, *target[i][:-1]] for i in chosen], width_t, left_pad_target)
        widths = {} if extra is None else {"source_width": width_s, "target_width": width_t}
        batch = pairs.batch(
            chosen,
            left_pad_source=left_pad_source,
            left_pad_target=left_pad_target,
            **widths,
        )
        assert batch.dtype == torch.int64 and batch.shape == (sum(len(links[i]) for i in chosen), 3)
        expected = [(b, (i, s), (i, t)) for b, i in enumerate(chosen) for s, t in links[i]]
        assert [(b, columns[b][s], labels[b][t]) for b, t, s in batch.tolist()] == expected
        # and, as EOS is never linked, there is a step that reads the token
        assert [(b, columns[b][s], inputs[b][t + 1]) for b, t, s in batch.tolist()] == expected
        met += len(expected)
    assert met > 500


def test_a_sentence_with_a_link_to_eos_or_beyond_is_left_out_and_named(tmp_path):
    path = tmp_path / "a.talp"
    path.write_text("0-0 2-1\n3-0 0-0\n0-2\n\n2-1\n0-0 99-99\n")
    pairs = AlignmentPairs(read_alignments(path), [4] * 6, [3] * 6)
    report = pairs.report
    assert [skipped.line for skipped in report.skipped] == [2, 3, 6]
    assert report.skipped[0].reason == "link 3-0 is out of range: source has 3 tokens and EOS, target 2"
    assert "link 0-2 " in report.skipped[1].reason and "link 99-99 " in report.skipped[2].reason
    assert (report.read, report.used, report.empty) == (6, 3, 1)
    assert str(report).startswith(
        f"{path}: 3 of 6 alignments used, 1 of them without links; 3 skipped, the first"
    )
    assert f"{path}:2: link 3-0 is out" in str(report)
    assert pairs.batch(range(6)).tolist() == [[0, 0, 0], [0, 1, 2], [4, 1, 2]]
    assert pairs.batch([1, 2, 5]).shape == pairs.batch([]).shape == (0, 3)
    whole = AlignmentPairs(Alignments.from_links([[(0, 0)]]), [2], [2])
    assert str(whole.report) == "alignments: 1 of 1 alignments used, 0 of them without links"


def test_wrong_arguments_of_batches():
    links = Alignments.from_links([[(0, 0)], []])
    with pytest.raises(DataError, match="alignments has 2 lines, the source text has 3"):
        AlignmentPairs(links, [2, 2, 2], [2, 2])
    with pytest.raises(DataError, match="alignments has 2 lines, the target text has 1"):
        AlignmentPairs(links, [2, 2], [2])
    with pytest.raises(ValueError, match=r"target_lengths\[1\] is 0, must be >= 1"):
        AlignmentPairs(links, [2, 1], [2, 0])
    pairs = AlignmentPairs(links, [3, 2], [4, 2])
    for outside in (-1, 2):
        with pytest.raises(IndexError, match=r"there are 0\.\.1"):
            pairs.batch([0, outside])
    with pytest.raises(ValueError, match="source_width=2 is less than the 3 tokens"):
        pairs.batch([0], source_width=2)
    with pytest.raises(ValueError, match="target_width=3 is less than the 4 tokens"):
        pairs.batch([0, 1], target_width=3, left_pad_target=True)
