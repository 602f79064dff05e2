"""The Transformer against PyTorch's own layers; what a sentence depends on; sequences that fill up."""

import math

import pytest
import torch
from plain_transformer import SOURCE_LENGTHS, TARGET_LENGTHS, C, Plain, V, batch, ours, packed, sizes

from nlpfast.models import transformer_layers
from nlpfast.models.transformer import Transformer
from nlpfast.models.transformer_layers import Embeddings, sinusoids
from nlpfast.nn.losses import LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing

KINDS = [
    {"norm": "pre", "activation": "relu", "tied": "all", "positions": "sinusoidal"},
    {"norm": "post", "activation": "gelu", "tied": "decoder", "positions": "learned"},
    {"norm": "pre", "activation": "gelu", "tied": "none", "positions": "sinusoidal"},
    {"norm": "post", "activation": "relu", "tied": "all", "positions": "learned"},
    {"norm": "post", "tied": "decoder", "source_vocab": V + 4, "decoder_layers": 1, "heads": 1},
]
TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_the_layers_of_pytorch(kind, dtype, tolerance):
    model = ours(dtype, **kind)
    plain, sides = Plain(model), batch()
    real = torch.arange(max(TARGET_LENGTHS)) < sides[3][:, None]
    want, got = plain(*sides)[real], model.logits(*sides)
    assert got.dtype == dtype and not got[~real].any()
    scale = want.abs().max().item()
    torch.testing.assert_close(got[real], want, rtol=0, atol=tolerance * scale)
    features = model(*packed(*sides)).features
    torch.testing.assert_close(features @ model.output_weight.T, want, rtol=0, atol=tolerance * scale)
    upstream = torch.randn(want.shape, dtype=dtype)
    (want * upstream).sum().backward()
    (got[real] * upstream).sum().backward()
    seen = set()
    for theirs, those in plain.correspondence(model):
        gradient = torch.cat([p.grad for p in those])
        scale = max(1.0, theirs.grad.abs().max().item())
        torch.testing.assert_close(gradient, theirs.grad, rtol=0, atol=tolerance * scale)
        seen |= {id(p) for p in those}
    assert seen == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("tied", ["all", "decoder", "none"])
def test_weights_are_tied(tied):
    model = Transformer(sizes(tied=tied))
    assert (model.source.tokens.weight is model.target.tokens.weight) == (tied == "all")
    assert (model.output_weight is model.target.tokens.weight) == (tied != "none")
    embeddings = {"all": 1, "decoder": 2, "none": 3}[tied]
    assert sum(p.shape == (V, C) for p in model.parameters()) == embeddings


def test_sinusoids_are_the_formula():
    table = sinusoids(60, 6)
    assert table.shape == (60, 6) and table.dtype == torch.float32
    for p in (0, 1, 2, 7, 59):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_embeddings_are_scaled_and_have_positions(positions):
    part = Embeddings(sizes(positions=positions), V, None)
    tokens, places = torch.tensor([3, 5, 3]), torch.tensor([0, 1, 4])
    table = sinusoids(50, C) if positions == "sinusoidal" else part.positions.weight
    want = part.tokens.weight[tokens] * 4.0 + table[places]
    torch.testing.assert_close(part(tokens, places, 5), want, rtol=0, atol=1e-6)
    assert ("positions.weight" in part.state_dict()) == (positions == "learned")
    assert len(part.state_dict()) == 1 + (positions == "learned")


def test_positions_go_as_far_as_they_may():
    """The table begins short and grows; what it says of a place stays the same."""
    part = Embeddings(sizes(max_positions=300), V, None)
    for most in (1, 64, 65, 129, 300):
        places = torch.arange(most)
        want = part.tokens.weight[3] * 4.0 + sinusoids(300, C)[:most]
        torch.testing.assert_close(part(torch.full((most,), 3), places, most), want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"a sentence has 301 tokens, max_positions=300 is the most"):
        part(torch.full((301,), 3), torch.arange(301), 301)


def test_positions_are_made_again_seldom(monkeypatch):
    part, made = Embeddings(sizes(max_positions=200), V, None), []
    monkeypatch.setattr(transformer_layers, "sinusoids", lambda n, c: made.append(n) or sinusoids(n, c))
    for place in range(200):
        part(torch.tensor([3]), torch.tensor([place]), place + 1)
    assert made == [64, 128, 200]


def test_positions_follow_the_weights():
    part = Embeddings(sizes(), V, None)
    tokens, places = torch.tensor([3, 5]), torch.tensor([0, 1])
    assert part.to("meta")(tokens.to("meta"), places.to("meta"), 2).device.type == "meta"
    part.to_empty(device="cpu").tokens.reset_parameters()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        with torch.inference_mode():
            out = part.to(dtype)(tokens, places, 2)
        assert out.dtype == dtype and out.device.type == "cpu"
    # the table is one that was made without gradients
    part(tokens, places, 2).sum().backward()
    assert part.tokens.weight.grad[3].eq(4.0).all()


def test_initial_weights():
    model = Transformer(sizes(d_model=256, source_vocab=400, target_vocab=500, tied="none", d_ff=300))
    for side in (model.source, model.target):
        weight = side.tokens.weight
        assert not weight[0].any() and weight[1:].std().item() == pytest.approx(1 / 16, rel=0.02)
        assert abs(weight.mean().item()) < 1e-3
    for name, parameter in model.named_parameters():
        if "norm." in name:
            assert parameter.eq(1.0 if name.endswith("weight") else 0.0).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        elif "tokens" not in name:
            attends = "query_proj" in name or "key_value_proj" in name
            bound = math.sqrt(6 / (4 * 256 if attends else sum(parameter.shape)))
            assert 0.99 * bound < parameter.abs().max().item() <= bound


def test_padding_is_not_read():
    model, (source, source_lengths, target, target_lengths) = ours(), batch()
    want = model.logits(source, source_lengths, target, target_lengths)
    for pad in (7, V + 100):
        wider = [torch.nn.functional.pad(x, (0, 3), value=pad) for x in (source, target)]
        for x, lengths in zip(wider, (source_lengths, target_lengths), strict=True):
            x[torch.arange(x.shape[1]) >= lengths[:, None]] = pad
        got = model.logits(wider[0], source_lengths, wider[1], target_lengths)
        assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_sentence_does_not_depend_on_the_others(norm):
    model, sides = ours(norm=norm), batch()
    together = model(*packed(*sides), aligned=True)
    cu = Packing.of_lengths(sides[3]).cu_seqlens
    for b in range(len(SOURCE_LENGTHS)):
        alone = model(*packed(*(x[b : b + 1] for x in sides)), aligned=True)
        rows = slice(cu[b], cu[b + 1])
        torch.testing.assert_close(together.features[rows], alone.features, rtol=0, atol=1e-12)
        torch.testing.assert_close(together.attended.lse[:, :, rows], alone.attended.lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "post", "full_context": True, "positions": "learned"}], ids=str
)
@pytest.mark.parametrize("more", [([2], [0]), ([0], [3]), ([4, 0, 3], [3, 2, 0]), ([0, 0], [1, 0])], ids=str)
def test_sequences_that_fill_up_change_nothing(changes, more):
    """One of their sides may have no tokens; their targets do not count."""
    criterion = LabelSmoothedCrossEntropyWithAlignment()
    pairs = torch.tensor([[0, 0, 1], [0, 3, 4], [0, 5, 5], [0, 13, 15]])
    found = []
    for sources, targets in (([], []), more):
        model, sides = ours(**changes), batch()
        rows = packed(*sides)
        target_out = torch.arange(len(rows[1])) % V
        packings = [
            Packing.of_lengths(torch.tensor(a + b))
            for a, b in ((SOURCE_LENGTHS, sources), (TARGET_LENGTHS, targets))
        ]
        pads = [torch.zeros(sum(n), dtype=torch.int64) for n in (sources, targets)]
        tokens = [torch.cat((x, pad)) for x, pad in zip(rows, pads, strict=False)]
        target_out = torch.cat((target_out, torch.full_like(pads[1], -100)))
        options = {"criterion": criterion, "target_out": target_out, "pairs": pairs}
        loss, sample_size, logged = model(*tokens, *packings, **options)
        loss.backward()
        assert sample_size.item() == sum(TARGET_LENGTHS)
        features = model(*tokens, *packings).features[: sum(TARGET_LENGTHS)]
        gradients = [p.grad for p in model.parameters()]
        found.append([loss.detach(), logged["alignment"], features.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all() and one.abs().max() > 0
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_a_token_does_not_see_those_after_it():
    model, sides = ours(), batch([4, 6], [7, 5])
    before = model.logits(*sides)
    for j in range(5):
        target = sides[2].clone()
        target[:, j] = target[:, j] % (V - 1) + 1
        after = model.logits(*sides[:2], target, sides[3])
        changed = (after != before).any(-1)
        assert not changed[:, :j].any() and changed[:, j].all() and changed[0, j:].all()


@torch.no_grad()
def test_every_target_token_depends_on_every_source_token():
    model, sides = ours(), batch([4, 6], [7, 5])
    before = model.logits(*sides)
    for i in range(4):
        source = sides[0].clone()
        source[0, i] = source[0, i] % (V - 1) + 1
        changed = (model.logits(source, *sides[1:]) != before).any(-1)
        assert changed[0].all() and not changed[1].any()


@torch.no_grad()
@pytest.mark.parametrize("side", [0, 2])
def test_a_sentence_that_is_too_long(side):
    model, lengths = ours(max_positions=6), [[6, 5], [6, 2]]
    assert model.logits(*batch(*lengths)).isfinite().all()
    lengths[side // 2][0] = 7
    with pytest.raises(ValueError, match=r"a sentence has 7 tokens, max_positions=6 is the most .*; cut it"):
        model.logits(*batch(*lengths))


@torch.no_grad()
@pytest.mark.parametrize("token", [-1, V, V + 100])
@pytest.mark.parametrize("side", [0, 2])
def test_a_token_outside_of_the_vocabulary(side, token):
    model, sides = ours(), batch()
    sides[side][1, 0] = token
    with pytest.raises(ValueError, match=rf"token {token}, which is not in the vocabulary, 0\.\.{V - 1};"):
        model.logits(*sides)
    with pytest.raises(ValueError, match=f"token {token}"):
        model.advance(sides[2][:, :1], model.begin(*sides[:2]))


@torch.no_grad()
def test_vocabularies_are_those_of_the_sides():
    model = ours(tied="decoder", source_vocab=V + 4)
    sides = batch()
    sides[0][0, 0] = V + 3
    assert model.logits(*sides).shape == (4, 6, V)
    sides[2][0, 0] = V + 3
    with pytest.raises(ValueError, match=rf"token {V + 3}, which is not in the vocabulary, 0\.\.{V - 1};"):
        model.logits(*sides)


def test_a_criterion_needs_targets():
    with pytest.raises(ValueError, match="criterion is given without target_out: pass"):
        ours()(*packed(*batch()), criterion=LabelSmoothedCrossEntropyWithAlignment())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_autocast_is_near(norm):
    # the weights a model begins with; gelu, as a number that changes its sign moves relu's gradient a lot
    model, sides = Transformer(sizes(norm=norm, activation="gelu")), batch()
    want = model.logits(*sides)
    want.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        got = model.logits(*sides)
        aligned = model(*packed(*sides), aligned=True).attended
    assert got.dtype == aligned.query.dtype == torch.bfloat16 and aligned.lse.dtype == torch.float32
    got.float().square().sum().backward()
    error = (got.float() - want).norm() / want.norm()
    assert 0 < error < 0.02
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() <= 0.1 * gradient.norm() + 0.02
