"""Dropout of 16 bits: how much it drops, which elements, what it takes of the generator, its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nlpfast import ops
from nlpfast.nn.dropout import VALUES, Dropout, dropout

SIZES = [1, 3, 4, 5, 7, 8, 1003]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def left(p):
    """Return what is left of 1 with p in 16 bits."""
    return (VALUES - round(p * VALUES)) / VALUES


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.1, 0.3, 0.5, 0.9, 0.9999])
def test_rate_in_many_elements(p):
    n = 1_000_003
    kept = dropout(torch.ones(n), p).count_nonzero().item()
    assert abs(kept - n * left(p)) <= 4 * math.sqrt(n * left(p) * (1 - left(p)))


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_rate_in_each_place_of_few_elements(size):
    calls, p = 3000, 0.3
    kept = torch.stack([dropout(torch.ones(size), p) for _ in range(calls)]).ne(0).double().mean(0)
    assert (kept - 0.7).abs().max() <= 4 * math.sqrt(p * (1 - p) / calls)


def test_is_the_op_and_its_rate_is_exact_in_16_bits():
    """An element is dropped if its 16 bits are below round(65536 p)."""
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (2,))
    for p in (1 / VALUES, 0.3, (VALUES - 1) / VALUES):
        torch.manual_seed(5)
        assert torch.equal(dropout(torch.ones(1003), p), ops.dropout.dropout(torch.ones(1003), p, seed=seed))
    # what is dropped rarely is dropped often, too
    rarely, often = (ops.dropout.dropout(torch.ones(70_000), p, seed=1) == 0 for p in (16 / VALUES, 0.5))
    assert rarely.any() and often[rarely].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.77])
def test_kept_elements_are_divided_by_what_is_left(p, dtype):
    x = torch.randn(257, dtype=torch.float64).add(3).to(dtype)
    out = dropout(x, p)
    kept = out != 0
    assert out.dtype == dtype and 0 < kept.sum() < 257
    factor = 1 / left(p)
    exact = (x.double() * factor).to(dtype) if dtype != torch.float32 else x * factor
    # a product that is rounded once, of a factor that is rounded to the dtype it is computed in
    torch.testing.assert_close(out[kept], exact[kept], rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gradient_has_the_same_mask_and_factor(size, dtype):
    x = torch.ones(size, dtype=dtype, requires_grad=True)
    out = dropout(x, 0.4)
    out.backward(torch.ones_like(out))
    assert x.grad.dtype == dtype and torch.equal(x.grad, out)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)], ids=str)
def test_gradcheck(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(3)
        return dropout(x, 0.4)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)


def test_seeds_repeat_and_states_go_on():
    x = torch.ones(1000)
    torch.manual_seed(11)
    first, state, second = dropout(x), torch.get_rng_state(), dropout(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x), second)
    torch.manual_seed(11)
    assert torch.equal(dropout(x), first) and torch.equal(dropout(x), second)


@pytest.mark.parametrize("size", [1, 5, 1003])
def test_takes_two_numbers_of_the_generator(size):
    torch.manual_seed(11)
    dropout(torch.ones(size))
    after = torch.get_rng_state()
    torch.manual_seed(11)
    torch.randint(2**63 - 1, (2,))
    assert torch.equal(torch.get_rng_state(), after)


def test_mask_depends_on_the_number_of_elements_alone():
    torch.manual_seed(11)
    flat = dropout(torch.ones(24))
    for x in (
        torch.ones(2, 3, 4),
        torch.ones(4, 6).mT,
        torch.ones(4, 12)[:, ::2],
        torch.ones(1, 1).expand(4, 6),
    ):
        torch.manual_seed(11)
        out = dropout(x)
        assert out.shape == x.shape and torch.equal(out.flatten(), flat)


@pytest.mark.parametrize("make", [lambda: torch.randn(5, 7).mT, lambda: torch.randn(5, 14)[:, ::2]], ids=str)
def test_any_strides(make):
    x = make().requires_grad_()
    torch.manual_seed(11)
    out = dropout(x, 0.3)
    torch.manual_seed(11)
    copy = x.detach().contiguous().requires_grad_()
    want = dropout(copy, 0.3)
    assert torch.equal(out, want)
    upstream = torch.randn(x.shape[::-1]).mT
    out.backward(upstream)
    want.backward(upstream)
    assert torch.equal(x.grad, copy.grad)


def test_input_is_left_alone_and_nothing_is_empty():
    x = torch.randn(100)
    before = x.clone()
    dropout(x, 0.5)
    assert torch.equal(x, before)
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize(
    ("p", "training"),
    [*((p, training) for p in (0.0, 1e-7, 1 - 1e-7, 1.0) for training in (False, True)), (0.3, False)],
)
def test_is_torch_where_nothing_or_everything_is_dropped(p, training):
    """And in evaluation, where it takes no number of the generator."""
    x = torch.randn(50)
    torch.manual_seed(1)
    state, got = torch.get_rng_state(), dropout(x, p, training)
    drawn = not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(got, F.dropout(x, p, training))
    torch.testing.assert_close(got, x if p < 0.5 or not training else torch.zeros(50))
    assert training or (not drawn and torch.equal(got, x))


@pytest.mark.parametrize("p", [-0.1, -1e-9, 1.1, 1 + 1e-9, math.inf, math.nan])
@pytest.mark.parametrize("training", [False, True])
def test_a_probability_outside(p, training):
    with pytest.raises(ValueError, match=rf"p={p} must be a probability in \[0, 1\]; 0 turns"):
        dropout(torch.ones(3), p, training)


def test_neighbours_and_calls_are_independent():
    """Correlations of what is kept, of elements in the same and in other words of bits, and of calls."""
    n, p = 400_000, 0.3
    first, second = ((dropout(torch.ones(n), p) != 0).double() - 0.7 for _ in range(2))
    bound = 4.5 / math.sqrt(n)
    for lag in (1, 2, 3, 4, 5, 8, 16, 64, 256):
        assert abs((first[lag:] * first[:-lag]).mean().item() / (p * (1 - p))) < bound, lag
        assert abs((first[lag:] * second[:-lag]).mean().item() / (p * (1 - p))) < bound, lag
    assert abs((first * second).mean().item() / (p * (1 - p))) < bound
    rows = first.view(-1, 1000).mean(1) * math.sqrt(1000 / (p * (1 - p)))
    # the variance of means of 1000 elements, from 400 of them
    assert abs(rows.square().mean().item() - 1) < 4.5 * math.sqrt(2 / 400)


def test_seeds_that_follow_one_another_are_independent():
    kept = []
    for seed in range(200):
        torch.manual_seed(seed)
        kept.append((dropout(torch.ones(1000), 0.5) != 0).double() - 0.5)
    kept = torch.stack(kept)
    assert abs((kept[1:] * kept[:-1]).mean().item() * 4) < 4.5 / math.sqrt(199_000)
    assert (kept.mean(0).abs().max() * 2 * math.sqrt(200)).item() < 4.5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_again(use_reentrant):
    torch.manual_seed(2)
    layer = nn.Sequential(nn.Linear(8, 64), Dropout(0.5), nn.Linear(64, 64), Dropout(0.3))
    x, found = torch.randn(16, 8, requires_grad=True), []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant, preserve_rng_state=True)):
        x.grad = None
        torch.manual_seed(11)
        out = call(x)
        out.square().sum().backward()
        found.append((out, x.grad, torch.get_rng_state()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_compiled_as_one_graph():
    layer = Dropout(0.25)
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, backend="aot_eager")
    x = torch.ones(100_000, requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    kept = out != 0
    assert torch.equal(x.grad, out)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 2 / 0.75))
    assert abs(kept.double().mean().item() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 1e5)


def test_the_default_device_is_another():
    with torch.device("meta"):
        assert dropout(torch.ones(100, device="cpu"), 0.5).count_nonzero() > 0


def test_on_other_devices_it_is_torch():
    out = dropout(torch.ones(5, device="meta"), 0.5)
    assert out.device.type == "meta" and out.shape == (5,)


def test_module_is_torchs():
    layer = Dropout(0.25)
    assert isinstance(layer, nn.Dropout) and repr(layer) == "Dropout(p=0.25, inplace=False)"
    x = torch.randn(1000)
    torch.manual_seed(4)
    got = layer(x)
    torch.manual_seed(4)
    assert torch.equal(got, dropout(x, 0.25)) and not torch.equal(got, x)
    assert layer.eval()(x) is x or torch.equal(layer(x), x)
    layer.train().p = 1.0
    assert not layer(x).any()
    with pytest.raises(ValueError, match="probability has to be between 0 and 1"):
        Dropout(1.5)
