"""The aligned layer: dense probabilities, soft alignments, the loss, what its gradient reaches."""

import pytest
import torch
import torch.nn.functional as F
from plain_transformer import TARGET_LENGTHS, H, Plain, V, batch, ours, packed
from torch import nn

from nlpfast import alignment_loss
from nlpfast.models.transformer import Decoded
from nlpfast.nn.losses import LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing

# sentence, target row, source column; rows have one, two or four links, so that their weights are exact
LINKS = [
    *((0, 0, 1), (0, 2, 4), (0, 2, 0), (1, 0, 0), (1, 4, 0), (2, 0, 6)),
    *((3, 1, 2), (3, 1, 0), (3, 1, 1), (3, 1, 2)),
]


def dense(attended):
    """Return all probabilities of a packed batch as one entry, [H, M, N]."""
    q, k, lse = (part[0] for part in attended)
    return (q @ k.mT * q.shape[-1] ** -0.5 - lse[..., None]).exp()


def links(sides, shift=0):
    """Return `LINKS` as pairs of a packed batch."""
    sources, targets = (Packing.of_lengths(lengths).cu_seqlens for lengths in (sides[1], sides[3]))
    return torch.tensor([[0, int(targets[b]) + t + shift, int(sources[b]) + s] for b, t, s in LINKS])


@pytest.mark.parametrize("full_context", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("layer", [0, 1, 3, -1, None])
def test_probabilities_are_those_of_the_layer(layer, norm, full_context):
    model, sides = ours(norm=norm, alignment_layer=layer, full_context=full_context), batch()
    number = {None: 1, -1: 3}.get(layer, layer)
    want = Plain(model).probabilities(number, *sides, causal=not full_context)
    source, target, *packings = packed(*sides)
    decoded = model(source, target, *packings, aligned=True)
    got = dense(decoded.attended)
    bounds = [packing.cu_seqlens.tolist() for packing in packings]
    for b, (S, T) in enumerate(zip(sides[1], sides[3], strict=True)):
        block = got[:, bounds[1][b] : bounds[1][b + 1], bounds[0][b] : bounds[0][b + 1]]
        torch.testing.assert_close(block, want[b, :, :T, :S], rtol=0, atol=1e-9)
    torch.testing.assert_close(decoded.features, model(source, target, *packings).features)
    assert model(source, target, *packings).attended is None


@torch.no_grad()
@pytest.mark.parametrize("full_context", [False, True])
def test_only_full_context_sees_later_tokens(full_context):
    model, sides = ours(full_context=full_context), batch([4, 6], [7, 5])
    before = model.soft_alignment(*sides)
    target = sides[2].clone()
    target[0, 4] = target[0, 4] % (V - 1) + 1
    changed = (model.soft_alignment(*sides[:2], target, sides[3]) != before).any(-1)
    assert changed[0, 4:].all() and changed[0, :4].all() == full_context and not changed[1].any()
    assert full_context or not changed[0, :4].any()


@torch.no_grad()
@pytest.mark.parametrize("full_context", [False, True])
@pytest.mark.parametrize("heads", [1, 3, H])
def test_soft_alignment_is_the_mean_of_the_first_heads(heads, full_context):
    model, sides = ours(alignment_heads=heads, full_context=full_context), batch()
    got = model.soft_alignment(*sides)
    want = Plain(model).probabilities(1, *sides, causal=not full_context)[:, :heads].mean(1)
    real = torch.arange(max(TARGET_LENGTHS)) < sides[3][:, None]
    assert got.dtype == torch.float32 and got.shape == (4, 6, 7)
    torch.testing.assert_close(got[real], want[real].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.sum(-1), real.float(), rtol=0, atol=1e-5)
    padding = ~(real[:, :, None] & (torch.arange(7) < sides[1][:, None])[:, None])
    assert not got[padding].any() and (got[~padding] > 0).all()


@torch.no_grad()
def test_soft_alignment_of_the_step_that_reads_a_word():
    sides = batch()
    plain, shifted = (ours(align_shift=shift).soft_alignment(*sides) for shift in (0, 1))
    for b, T in enumerate(TARGET_LENGTHS):
        assert torch.equal(shifted[b, : T - 1], plain[b, 1:T]) and not shifted[b, T - 1 :].any()


@torch.no_grad()
def test_soft_alignment_of_another_layer_and_other_heads():
    model, sides = ours(), batch()
    config = model.config
    for layer, heads in ((0, None), (-2, 2), (None, H), (3, 1)):
        changes = {"alignment_layer": layer, "alignment_heads": heads or 1}
        want = ours(**changes).soft_alignment(*sides)
        assert torch.equal(model.soft_alignment(*sides, layer=layer, heads=heads), want)
        assert model.config is config and config.alignment_layer is None and config.alignment_heads == 1
    with pytest.raises(ValueError, match="alignment_layer=4 must be a layer of the decoder"):
        model.soft_alignment(*sides, layer=4)
    with pytest.raises(ValueError, match="alignment_heads=5 must be at most heads=4"):
        model.soft_alignment(*sides, heads=5)
    sides[0][0, 0] = V
    with pytest.raises(ValueError, match="vocabulary"):
        model.soft_alignment(*sides, layer=0)
    assert model.config is config


@torch.no_grad()
def test_soft_alignment_of_16_bits_is_near():
    model, sides = ours(torch.float32, alignment_heads=2), batch()
    want = model.soft_alignment(*sides)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.soft_alignment(*sides)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)


def formula(model, sides, target_out, criterion, *, ignored=-100):
    """Return fairseq's loss of dense logits and probabilities, its parts, and the number of targets."""
    plain, config = Plain(model), model.config
    real = torch.arange(max(TARGET_LENGTHS)) < sides[3][:, None]
    log_p = F.log_softmax(plain(*sides)[real], -1)
    counted = target_out != ignored
    eps, few = criterion.label_smoothing, criterion.label_smoothing / (V - 1)
    nll = -log_p.gather(1, target_out.clamp(min=0)[:, None])[:, 0][counted].sum()
    smoothed = (1 - eps - few) * nll - few * log_p[counted].sum()
    number = config.aligned_layer()
    a = plain.probabilities(number, *sides, causal=not config.full_context)[:, : config.alignment_heads].mean(
        1
    )
    rows = [(b, t) for b, t, _ in LINKS]
    aligned = sum(-a[b, t + criterion.align_shift, s].log() / rows.count((b, t)) for b, t, s in LINKS)
    return plain, smoothed, nll, aligned, counted.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alignment_heads": 3, "full_context": True, "norm": "post"},
        {"alignment_layer": 3, "tied": "none", "positions": "learned"},
        {"alignment_layer": 0, "full_context": True, "alignment_heads": H, "tied": "decoder"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shift", [0, 1])
def test_loss_is_the_formula_of_fairseq(changes, shift, monkeypatch):
    if shift:
        # rows of the last token of a sentence have no step after them
        monkeypatch.setattr("test_transformer_alignment.LINKS", [x for x in LINKS if x[0] != 2])
    model, sides = ours(align_shift=shift, **changes), batch()
    criterion = LabelSmoothedCrossEntropyWithAlignment(0.1, 0.7, align_shift=shift)
    source, target, *packings = packed(*sides)
    target_out = torch.randint(V, target.shape)
    target_out[[2, 9]] = -100
    plain, smoothed, nll, aligned, count = formula(model, sides, target_out, criterion)
    options = {"criterion": criterion, "target_out": target_out}
    found = model(source, target, *packings, **options, pairs=links(sides))
    assert found.sample_size == count == len(target) - 2
    want = {"loss": smoothed, "nll": nll, "alignment": aligned}
    for name, value in want.items():
        torch.testing.assert_close(found.logged[name], value.detach(), rtol=1e-9, atol=0)
    total = smoothed + 0.7 * aligned
    torch.testing.assert_close(found.loss, total, rtol=1e-9, atol=0)
    total.backward()
    found.loss.backward()
    for theirs, those in plain.correspondence(model):
        gradient = torch.cat([p.grad for p in those])
        torch.testing.assert_close(gradient, theirs.grad, rtol=0, atol=1e-9 * max(1, theirs.grad.abs().max()))
    for without in ({}, {"pairs": None}):
        found = model(source, target, *packings, **options, **without)
        torch.testing.assert_close(found.loss, smoothed, rtol=1e-9, atol=0)
        assert found.logged["alignment"] == 0
    empty = model(source, target, *packings, **options, pairs=torch.empty(0, 3, dtype=torch.int64))
    torch.testing.assert_close(empty.loss, smoothed, rtol=1e-9, atol=0)


def reached(model, full_context):
    """Return the names of the parameters that the alignment's gradient reaches, with its size."""
    sides = batch()
    source, target, *packings = packed(*sides)
    memory = model.encode(source, packings[0])
    decoded = model.decode(target, packings[1], memory, packings[0], aligned=True)
    assert isinstance(decoded, Decoded)
    alignment_loss(*decoded.attended, links(sides), heads=1).backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-12
    }


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("full_context", [True, False])
def test_gradient_of_the_alignment_ends_in_its_layer(full_context, norm, layer):
    model = ours(alignment_layer=layer, norm=norm, full_context=full_context, tied="none")
    found = reached(model, full_context)
    names = dict(model.named_parameters())
    # the bias of the keys adds as much to all scores of a row, which softmax does not see
    key_bias = "cross_attention.key_value_proj.bias"
    behind = ("network.", "network_norm.", "cross_attention.out_proj.", key_bias)
    here = f"decoder.{layer}."
    beyond = {f"{here}{part}" for part in behind} | {f"decoder.{n}." for n in range(layer + 1, 4)}
    beyond |= {"decoder_norm", "output"}
    if norm == "post":
        beyond.add(f"{here}cross_attention_norm.")
    wanted = {name for name in names if not name.startswith(tuple(beyond))}
    assert set(found) == wanted
    C = model.config.d_model
    projection = found[f"{here}cross_attention.key_value_proj.weight"]
    assert projection[: C // H].any() and not projection[C:].any()


class Counting(nn.Module):
    """Counts the calls of a module."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *arguments, **options):
        self.calls += 1
        return self.module(*arguments, **options)


@pytest.mark.parametrize("full_context", [True, False])
def test_second_pass_ends_in_the_aligned_layer(full_context):
    model = ours(alignment_layer=1, full_context=full_context)
    networks = []
    for layer in (*model.encoder, *model.decoder):
        layer.network = Counting(layer.network)
        networks.append(layer.network)
    for aligned, twice in ((False, 0), (True, full_context)):
        for network in networks:
            network.calls = 0
        model(*packed(*batch()), aligned=aligned)
        assert [network.calls for network in networks] == [1, 1, 1 + twice, 1, 1, 1]


def test_dropout_leaves_the_probabilities_alone():
    """Attention's lse is of the scores before dropout."""
    model, sides = ours(alignment_layer=0), batch()
    want = model.soft_alignment(*sides)
    model.train()
    for layer in model.decoder:
        layer.cross_attention.dropout.p = 0.5
    assert torch.equal(model.soft_alignment(*sides), want)
    model.target.dropout.p = 0.5
    assert not torch.equal(model.soft_alignment(*sides), want)


def test_both_must_take_the_same_step():
    model, sides = ours(align_shift=1), batch()
    packed = Packing.of_lengths(sides[1]), Packing.of_lengths(sides[3])
    rows = [x[:, : p.longest][p.within()] for x, p in zip((sides[0], sides[2]), packed, strict=True)]
    criterion = LabelSmoothedCrossEntropyWithAlignment(align_shift=0)
    with pytest.raises(ValueError, match="align_shift differs: the criterion's is 0, the model's 1"):
        model(*rows, *packed, criterion=criterion, target_out=rows[1], pairs=torch.tensor([[0, 0, 0]]))
    model(*rows, *packed, criterion=criterion, target_out=rows[1])
