"""The layout of a packed batch: where its sequences lie, their first rows, and the padded batch of them."""

import dataclasses

import pytest
import torch

from nlpfast.nn.packing import Packing

LENGTHS = [[1], [5], [3, 1, 4], [2, 2], [0, 3, 0, 2, 0]]


def packing(lengths):
    return Packing.of_lengths(torch.tensor(lengths))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sequences_lie_one_after_the_other(lengths):
    layout, ends = packing(lengths), [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert layout.cu_seqlens.dtype == torch.int64 and layout.cu_seqlens.tolist() == ends
    assert layout.longest == max(lengths)
    assert layout.lengths().tolist() == lengths
    assert layout.positions(sum(lengths)).tolist() == [place for n in lengths for place in range(n)]


def test_the_layout_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        packing([3, 1]).longest = 4


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_cut_keeps_the_first_rows_of_each_sequence(lengths, most):
    whole, expected = packing(lengths), packing([min(n, most) for n in lengths])
    layout = whole.cut(most)
    assert torch.equal(layout.cu_seqlens, expected.cu_seqlens)
    assert layout.longest == expected.longest
    assert whole.lengths().tolist() == lengths
    # its rows are those whose place in the sequence is below `most`
    positions = whole.positions(sum(lengths))
    assert torch.equal(positions[positions < most], layout.positions(int(layout.cu_seqlens[-1])))


@pytest.mark.parametrize("more", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padded_has_every_row_in_its_place_and_zeros_after_the_ends(lengths, more):
    rows = torch.arange(1.0, 1 + sum(lengths)).view(-1, *[1] * len(more)).expand(-1, *more)
    out, inside = packing(lengths).padded(rows), packing(lengths).within()
    assert out.shape == (len(lengths), max(lengths), *more) and out.dtype == rows.dtype
    assert inside.dtype == torch.bool and inside.shape == out.shape[:2]
    begin = 0
    for b, n in enumerate(lengths):
        assert torch.equal(out[b, :n], rows[begin : begin + n])
        assert not out[b, n:].any()
        assert inside[b].tolist() == [True] * n + [False] * (max(lengths) - n)
        begin += n


def test_padded_keeps_the_dtype_and_passes_gradients_back():
    rows = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 3, dtype=torch.float64)
    layout = packing([3, 1, 4])
    (layout.padded(rows) * weights).sum().backward()
    assert torch.equal(rows.grad, weights[layout.within()])
    assert layout.padded(torch.arange(8, dtype=torch.int32)).dtype == torch.int32


def test_longest_may_be_more_than_there_is():
    layout = Packing(torch.tensor([0, 3, 4]), 6)
    assert layout.padded(torch.ones(4)).tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert layout.within().sum(1).tolist() == [3, 1]
    assert layout.cut(5).longest == 5 and layout.cut(5).lengths().tolist() == [3, 1]
