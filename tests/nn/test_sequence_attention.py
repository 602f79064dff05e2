"""Attention of packed sentences against PyTorch's of each sentence alone, and step by step."""

import pytest
import torch
from torch import nn

from nlpfast.nn.packing import Packing
from nlpfast.nn.sequence_attention import CrossAttention, SelfAttention

C, H, D = 12, 3, 4
TARGETS, SOURCES = [4, 1, 6], [2, 5, 3]


def own(kind, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(1)
    return kind(C, H, dropout).to(dtype).eval()


def rows(lengths, dtype=torch.float64, seed=0):
    packing = Packing.of_lengths(torch.tensor(lengths))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), C, dtype=torch.float64, generator=generator).to(dtype)
    return x.requires_grad_(), packing


def torchs(layer):
    """Return PyTorch's layer with our weights, and pairs of its parameters and ours."""
    theirs = nn.MultiheadAttention(C, H, batch_first=True, dtype=layer.out_proj.weight.dtype)
    projections = [
        getattr(layer, n) for n in ("in_proj", "query_proj", "key_value_proj") if hasattr(layer, n)
    ]
    pairs = [
        (theirs.in_proj_weight, [p.weight for p in projections]),
        (theirs.in_proj_bias, [p.bias for p in projections]),
        (theirs.out_proj.weight, [layer.out_proj.weight]),
        (theirs.out_proj.bias, [layer.out_proj.bias]),
    ]
    with torch.no_grad():
        for projection in projections:
            projection.bias.normal_()
        layer.out_proj.bias.normal_()
        for theirs_, ours in pairs:
            theirs_.copy_(torch.cat(ours))
    return theirs, pairs


def compare(got, want, inputs, pairs, tolerance):
    """Compare outputs, and gradients with respect to inputs and parameters."""
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    upstream = torch.randn_like(want)
    gradients = torch.autograd.grad(want, [*inputs, *(t for t, _ in pairs)], upstream)
    flat = [p for _, ours in pairs for p in ours]
    found = iter(torch.autograd.grad(got, [*inputs, *flat], upstream))
    counts = [1] * len(inputs) + [len(ours) for _, ours in pairs]
    for count, want in zip(counts, gradients, strict=True):
        got = torch.cat([next(found) for _ in range(count)])
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
        assert want.any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_self_attention_is_that_of_each_sentence(is_causal, dtype, tolerance):
    layer, (x, packing) = own(SelfAttention, dtype), rows(TARGETS, dtype)
    theirs, pairs = torchs(layer)
    want = []
    for part in x.split(TARGETS):
        n = len(part)
        mask = torch.ones(n, n).triu(1).bool() if is_causal else None
        want.append(theirs(part[None], part[None], part[None], attn_mask=mask, need_weights=False)[0][0])
    compare(layer(x, packing, is_causal=is_causal), torch.cat(want), [x], pairs, tolerance)
    if not is_causal:
        assert torch.equal(layer(x, packing), layer(x, packing, is_causal=False))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cross_attention_is_that_of_each_sentence(dtype, tolerance):
    layer, (x, packing), (memory, sources) = (
        own(CrossAttention, dtype),
        rows(TARGETS, dtype),
        rows(SOURCES, dtype, 1),
    )
    theirs, pairs = torchs(layer)
    want, weights = [], []
    for part, keys in zip(x.split(TARGETS), memory.split(SOURCES), strict=True):
        out, probabilities = theirs(part[None], keys[None], keys[None], average_attn_weights=False)
        want.append(out[0])
        weights.append(probabilities[0])
    got, nothing = layer(x, packing, memory, sources)
    assert nothing is None
    compare(got, torch.cat(want), [x, memory], pairs, tolerance)
    again, attended = layer(x, packing, memory, sources, aligned=True)
    assert torch.equal(again, got)
    q, k, lse = attended
    assert q.shape == (1, H, sum(TARGETS), D) and k.shape == (1, H, sum(SOURCES), D)
    assert lse.shape == (1, H, sum(TARGETS)) and lse.dtype == dtype
    dense = (q[0] @ k[0].mT * D**-0.5 - lse[0, :, :, None]).exp()
    for b, want in enumerate(weights):
        t, s = sum(TARGETS[:b]), sum(SOURCES[:b])
        block = dense[:, t : t + TARGETS[b], s : s + SOURCES[b]]
        torch.testing.assert_close(block, want, rtol=0, atol=tolerance)


def test_probe_is_what_the_layer_attends_to():
    layer, (x, packing), (memory, sources) = (
        own(CrossAttention, dropout=0.5),
        rows(TARGETS),
        rows(SOURCES, seed=1),
    )
    torchs(layer)
    want = layer(x, packing, memory, sources, aligned=True)[1]
    layer.train()
    state = torch.get_rng_state()
    got = layer.probe(x, packing, memory, sources)
    # nothing is dropped of what is not computed
    assert torch.equal(torch.get_rng_state(), state)
    parameters = [layer.query_proj.weight, layer.key_value_proj.weight, x, memory]
    upstream = [torch.randn_like(part) for part in want]
    gradients = [torch.autograd.grad(parts, parameters, upstream) for parts in (got, want)]
    for one, other in (*zip(got, want, strict=True), *zip(*gradients, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert gradients[0][1][:C].any() and not gradients[0][1][C:].any()


@torch.no_grad()
def test_self_attention_step_by_step():
    layer, n = own(SelfAttention), 5
    x, packing = rows([n, n, n])
    torchs(layer)
    want = layer(x, packing, is_causal=True).view(3, n, C)
    # what is not written yet is not read
    keys, values = (torch.full((3, H, n + 2, D), torch.nan, dtype=torch.float64) for _ in range(2))
    for position, token in enumerate(x.view(3, n, C).unbind(1)):
        got = layer.step(token, keys, values, position)
        torch.testing.assert_close(got, want[:, position], rtol=0, atol=1e-12)
        for part in (keys, values):
            assert part[:, :, : position + 1].isfinite().all() and part[:, :, position + 1 :].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 4])
def test_cross_attention_step_by_step(beam):
    layer, (memory, sources) = own(CrossAttention), rows(SOURCES, seed=1)
    torchs(layer)
    x, packing = rows([beam] * len(SOURCES), seed=2)
    want = layer(x, packing, memory, sources)[0]
    keys, values = layer.memory_of(memory, sources)
    assert keys.shape == values.shape == (3, H, max(SOURCES), D)
    assert keys.is_contiguous() and values.is_contiguous()
    # what is behind a sentence's end is not read
    for part in (keys, values):
        for b, n in enumerate(SOURCES):
            part[b, :, n:] = 1e3
    got = layer.step(x, keys, values, torch.tensor(SOURCES))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_sentence_without_a_source_attends_to_nothing():
    layer, (x, packing) = own(CrossAttention), rows(TARGETS)
    torchs(layer)
    memory, sources = rows([2, 0, 3], seed=1)
    out, attended = layer(x, packing, memory, sources, aligned=True)
    assert torch.equal(out[4], layer.out_proj.bias) and out.isfinite().all()
    assert attended.lse[0, :, 4].eq(-torch.inf).all() and attended.lse[0, :, :4].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_dropout_is_of_training(kind):
    layer = own(kind, dropout=0.5)
    torchs(layer)
    sides = [rows(TARGETS), rows(SOURCES, seed=1)][: 1 if kind is SelfAttention else 2]
    arguments = [part for side in sides for part in side]

    def run():
        out = layer(*arguments)
        return out if kind is SelfAttention else out[0]

    want = run()
    assert torch.equal(run(), want)
    layer.train()
    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.allclose(first, want) and not torch.allclose(first, second)
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    layer.dropout.p = 1.0
    assert torch.equal(run(), layer.out_proj.bias.expand_as(want))
    # the mean over many sentences is what is not dropped
    layer.dropout.p, many = 0.2, 400
    batches = [
        (part.repeat(many, 1), Packing.of_lengths(side.lengths().repeat(many))) for part, side in sides
    ]
    out = layer(*(part for pair in batches for part in pair))
    mean = (out if kind is SelfAttention else out[0]).view(many, -1, C).mean(0)
    assert (mean - want).abs().max() < 0.1 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_the_backend_is_the_one_that_is_named(kind):
    layer, (x, packing) = own(kind), rows(TARGETS)
    layer.backend = "nonsense"
    tokens, lengths = x[:3], torch.tensor(TARGETS)
    cache = [torch.zeros(3, H, 6, D, dtype=torch.float64) for _ in range(2)]
    if kind is SelfAttention:
        calls = [lambda: layer(x, packing), lambda: layer.step(tokens, *cache, 0)]
    else:
        both = (x, packing, x, packing)
        calls = [
            lambda: layer(*both),
            lambda: layer.probe(*both),
            lambda: layer.step(tokens, *cache, lengths),
        ]
    for call in calls:
        with pytest.raises(ValueError, match="nonsense"):
            call()


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_channels_that_are_no_multiple_of_heads(kind):
    with pytest.raises(ValueError, match="channels=13 must be a positive multiple of heads=3"):
        kind(13, 3, 0.0)


@torch.no_grad()
def test_autocast_is_near():
    layer, (x, packing), (memory, sources) = (
        own(CrossAttention, torch.float32),
        rows(TARGETS, torch.float32),
        rows(SOURCES, torch.float32, 1),
    )
    want = layer(x, packing, memory, sources)[0]
    probed = layer.probe(x, packing, memory, sources)
    with torch.autocast("cpu", torch.bfloat16):
        got, attended = layer(x, packing, memory, sources, aligned=True)
        again = layer.probe(x, packing, memory, sources)
    assert got.dtype == attended.query.dtype == torch.bfloat16 and attended.lse.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.03)
    for one, other, exact in zip(attended, again, probed, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.float(), exact, rtol=0, atol=0.03)
