"""The op of dropout: backends bit for bit, the definition by hand, seeds, layouts, stray accesses, errors."""

import math

import pytest
import torch

from nlpfast import dispatch
from nlpfast.ops.attention.reference import philox
from nlpfast.ops.dropout import dropout
from nlpfast.testing import between_canaries, layouts, poison

OP = "dropout"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# around rows of 64 and groups of 8 rows, and enough for two threads
SIZES = [0, 1, 3, 63, 64, 65, 511, 512, 513, 1000, 70_001]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_backends_agree_bit_for_bit(backend, size, dtype):
    x = torch.randn(size).to(dtype)
    with poison():
        found = dropout(x, 0.3, seed=size, backend=backend)
    assert found.dtype == dtype
    assert torch.equal(found, dropout(x, 0.3, seed=size, backend="reference"))


def test_definition_by_hand(backend):
    """Element e is in row e // 64, column e % 64; its bits are field row % 8 of the call of row // 8."""
    seed, offset, threshold = 0x1234_5678_9ABC_DEF0, 77, round(0.4 * 65536)
    out = dropout(torch.ones(2000), 0.4, seed=torch.tensor([seed, offset]), backend=backend)
    for e in (*range(0, 2000, 37), 1999):
        row, column = divmod(e, 64)
        counter = [torch.tensor(number) for number in (column, row // 8, 0, offset)]
        words = philox(tuple(counter), (torch.tensor(seed & 0xFFFF_FFFF), torch.tensor(seed >> 32)))
        field = int(words[row % 8 // 2]) >> 16 * (row % 2) & 0xFFFF
        want = 65536 / (65536 - threshold) if field >= threshold else 0.0
        assert out[e] == torch.tensor(want), e


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_give_the_same_bits(backend, dtype):
    x = torch.randn(2, 3, 5, 40).to(dtype)
    want = dropout(x, 0.3, seed=5, backend=backend)
    for name, laid in layouts(x).items():
        laid = laid.detach().requires_grad_()
        out = dropout(laid, 0.3, seed=5, backend=backend)
        assert torch.equal(out, want), name
        upstream = torch.randn(2, 5, 3, 40).to(dtype).transpose(1, 2)
        (grad,) = torch.autograd.grad(out, laid, upstream)
        assert torch.equal(grad, dropout(upstream, 0.3, seed=5, backend=backend)), name


def test_no_stray_access(backend):
    for size in (5, 63, 513):
        x, intact = between_canaries(torch.randn(size))
        assert dropout(x, 0.3, seed=1, backend=backend).isfinite().all()
        intact()


def test_gradient_is_dropout_with_the_same_mask_and_so_is_its_own(backend):
    x = torch.randn(1000, requires_grad=True)
    out = dropout(x, 0.4, seed=9, backend=backend)
    upstream = torch.randn(1000, requires_grad=True)
    (grad,) = torch.autograd.grad(out, x, upstream, create_graph=True)
    assert torch.equal(grad, dropout(upstream, 0.4, seed=9, backend=backend))
    (again,) = torch.autograd.grad(grad, upstream, torch.ones(1000))
    assert torch.equal(again, dropout(torch.ones(1000), 0.4, seed=9, backend=backend))


def test_what_is_dropped_is_zero_whatever_it_was(backend):
    x = torch.tensor([math.nan, math.inf, -math.inf] * 100)
    out = dropout(x, 0.5, seed=3, backend=backend)
    dropped = dropout(torch.ones(300), 0.5, seed=3, backend=backend) == 0
    assert 0 < dropped.sum() < 300
    assert (out[dropped] == 0).all() and not out[~dropped].isfinite().any()


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_seeds_of_all_64_bits(backend, seed):
    x = torch.ones(500)
    out = dropout(x, 0.5, seed=seed, backend=backend)
    assert torch.equal(out, dropout(x, 0.5, seed=torch.tensor([seed, 0]), backend=backend))
    assert not torch.equal(out, dropout(x, 0.5, seed=torch.tensor([seed, 1]), backend=backend))
    assert not torch.equal(out, dropout(x, 0.5, seed=seed ^ 1 << 40, backend=backend))


def test_threads_do_not_matter():
    x, before = torch.randn(300_000), torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(dropout(x, 0.3, seed=2))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_float64_is_served_by_the_definition():
    x = torch.ones(100, dtype=torch.float64)
    assert torch.equal(dropout(x, 0.5, seed=1), dropout(x.float(), 0.5, seed=1).double())
    assert dispatch.choose(OP, "cpu", None, (x,)) is dispatch.registry[OP]["reference"]
    with pytest.raises(RuntimeError, match=r"it computes in float32, bfloat16 and float16"):
        dropout(x, 0.5, backend="cpu")


def test_nothing_to_drop_is_the_input():
    x = torch.randn(10)
    assert dropout(x, 0.0) is x and dropout(x, 1e-6) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1 - 1e-6, math.nan])
def test_a_probability_outside(p):
    with pytest.raises(ValueError, match=rf"p is {p}; it must be at least 0 and below 1"):
        dropout(torch.ones(3), p)


def test_other_errors():
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"x has the dtype torch.int64; it must be floating"):
        dropout(x.long(), 0.5)
    for seed, error, words in (
        (2**63, ValueError, "must fit in 64 bits"),
        (torch.ones(2), TypeError, "seed has the dtype torch.float32"),
        (torch.ones(3).long(), ValueError, r"seed has the shape \[3\]"),
        (torch.ones(2, device="meta").long(), ValueError, "seed is on meta; it must be on the inputs' cpu"),
    ):
        with pytest.raises(error, match=words):
            dropout(x, 0.5, seed=seed)


def test_native_arguments_are_checked():
    native, x, seed = torch.ops.nlpfast.dropout_forward, torch.ones(4, 4), torch.zeros(2).long()
    for arguments, words in (
        ((x.mT[:, :2], seed, 5), "x must be a contiguous CPU tensor"),
        ((x.double(), seed, 5), "x must be float32, bfloat16 or float16"),
        ((x, seed[:1], 5), "seed must be a contiguous CPU tensor with 2 elements"),
        ((x, seed.int(), 5), "seed must be int64"),
        ((x, seed, 65536), r"threshold must be in \[0, 65536\), got 65536"),
        ((x, seed, -1), "threshold must be in"),
    ):
        with pytest.raises(RuntimeError, match=words):
            native(*arguments)
