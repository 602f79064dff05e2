"""Batches of one language, and translations turned round."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nlpfast.data.sentence_batches import make_sentence_batch, targets_of, turned
from nlpfast.data.translation_batches import TranslationBatch, make_batch

SPECIAL = {"pad_id": 0, "bos_id": 2, "eos_id": 3}
SENTENCE = st.lists(st.integers(4, 99), max_size=70)
PAIRS = st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=6)


def test_a_batch_of_sentences_by_hand() -> None:
    batch = make_sentence_batch([[5, 6], [], [7]], **SPECIAL)
    assert batch.tokens_in.tolist() == [2, 5, 6, 2, 2, 7] + [0] * 58
    assert batch.tokens_out.tolist() == [5, 6, 3, 3, 7, 3] + [-100] * 58
    assert batch.cu_seqlens[:4].tolist() == [0, 3, 4, 6] and batch.cu_seqlens[-1] == 64
    assert batch.longest == 3 and batch.sentences == 3
    assert int(batch.cu_seqlens.diff().max()) == 3


def test_no_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match="sentences is empty; give at least one"):
        make_sentence_batch([], **SPECIAL)


def same(one: TranslationBatch, other: TranslationBatch) -> None:
    for name, value in one._asdict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name
        else:
            assert value == getattr(other, name), name


def sequences(tokens: torch.Tensor, cu: torch.Tensor, count: int) -> list[list[int]]:
    return [tokens[begin:end].tolist() for begin, end in pairwise(cu[: count + 1].tolist())]


@given(PAIRS, st.data())
def test_turned_is_the_batch_of_the_other_direction(
    pairs: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    sources, targets = [x for x, _ in pairs], [y for _, y in pairs]
    links = [
        (b, data.draw(st.integers(0, len(y) - 1)), data.draw(st.integers(0, len(x) - 1)))
        for b, (x, y) in enumerate(pairs)
        if x and y
    ]
    there = make_batch(sources, targets, **SPECIAL, pairs=torch.tensor(links, dtype=torch.int64).view(-1, 3))
    kept = TranslationBatch(*(part.clone() if isinstance(part, torch.Tensor) else part for part in there))
    back = turned(there, pad_id=0, bos_id=2)
    same(there, kept)
    linked = torch.tensor([(b, s, t) for b, t, s in links], dtype=torch.int64).view(-1, 3)
    opposite = make_batch(targets, sources, **SPECIAL, pairs=linked)
    assert back.pairs is not None and opposite.pairs is not None
    assert back.pairs.tolist() == opposite.pairs.tolist()
    same(back._replace(pairs=None), opposite._replace(pairs=None))
    same(turned(back, pad_id=0, bos_id=2), there)
    of_targets = targets_of(there)
    assert sequences(of_targets.tokens_in, of_targets.cu_seqlens, there.sentences) == [
        [2, *y] for y in targets
    ]
    assert sequences(of_targets.tokens_out, of_targets.cu_seqlens, there.sentences) == [
        [*y, 3] for y in targets
    ]


def test_turned_without_links() -> None:
    assert turned(make_batch([[4]], [[5, 6]], **SPECIAL), pad_id=0, bos_id=2).pairs is None
