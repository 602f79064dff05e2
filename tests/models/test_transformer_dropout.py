"""Dropout in the Transformer: each place acts on the part it is of, in training and not in evaluation."""

import pytest
import torch
from plain_transformer import batch, ours, packed
from torch import nn

from nlpfast.models.transformer import Transformer
from nlpfast.nn import residual
from nlpfast.nn.dropout import Dropout

KIND = {"tied": "none", "positions": "learned"}
# a module with a probability, and the weights without which its part is left out
PARTS = [
    ("source.dropout", ["source.tokens", "source.positions"]),
    ("target.dropout", ["target.tokens", "target.positions"]),
    *(
        (f"{side}.dropout", [f"{side}.self_attention.out_proj", f"{side}.network.fc2", *more])
        for side, more in (("encoder.1", []), ("decoder.0", ["decoder.0.cross_attention.out_proj"]))
    ),
    *(
        (f"{side}.network.dropout", [f"{side}.network.fc2.weight"])
        for side in ("encoder.0", "encoder.1", "decoder.0", "decoder.3")
    ),
    # the bias of the projection is what is left of attention without probabilities
    *(
        (f"{side}.dropout", [f"{side}.out_proj.weight"])
        for side in (
            "encoder.0.self_attention",
            "encoder.1.self_attention",
            *("decoder.0.self_attention", "decoder.3.self_attention"),
            *("decoder.0.cross_attention", "decoder.3.cross_attention"),
        )
    ),
]


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(("place", "names"), PARTS, ids=str)
def test_all_dropped_is_the_part_left_out(place, names, norm):
    model, sides = ours(norm=norm, **KIND), packed(*batch())
    want = model(*sides).features
    model.get_submodule(place).p = 1.0
    assert torch.equal(model(*sides).features, want)
    got = model.train()(*sides).features
    assert not torch.allclose(got, want)
    without = ours(norm=norm, **KIND)
    for name, parameter in without.named_parameters():
        if name.startswith(tuple(names)):
            parameter.zero_()
    torch.testing.assert_close(got, without(*sides).features, rtol=0, atol=1e-12)


def test_each_place_has_its_probability():
    model = Transformer(ours(dropout=0.1, attention_dropout=0.2, activation_dropout=0.3).config)
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    for name, p in found.items():
        kind = "attention" if "_attention." in name else "network" if "network" in name else "rest"
        assert p == {"attention": 0.2, "network": 0.3, "rest": 0.1}[kind]
        # attention takes the probability alone, and drops by itself
        assert kind == "attention" or isinstance(model.get_submodule(name), Dropout)
    # embeddings of both sides; a layer's own, its network's and those of its attention
    assert len(found) == 2 + 2 * 3 + 4 * 4


@torch.no_grad()
@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "activation_dropout"])
def test_drops_in_training_only(option):
    model, sides = ours(**{option: 0.5}), packed(*batch())
    want = ours()(*sides).features
    assert torch.equal(model(*sides).features, want)
    model.train()
    torch.manual_seed(7)
    first, second = model(*sides).features, model(*sides).features
    assert not torch.allclose(first, want) and not torch.allclose(first, second)
    torch.manual_seed(7)
    assert torch.equal(model(*sides).features, first)


def test_parts_are_dropped_by_themselves(monkeypatch):
    """The three parts of a layer share a module, and each draws its own numbers."""
    seen, right = [], residual.add_layer_norm

    def spied(part, x, *rest, **options):
        found = right(part, x, *rest, **options)
        seen.append((found[1] - x == 0, rest[2]))
        return found

    monkeypatch.setattr(residual, "add_layer_norm", spied)
    model = ours(dropout=0.5, decoder_layers=1, encoder_layers=1).train()
    model(*packed(*batch()))
    assert [p for _, p in seen] == [0.5] * 5
    masks = [mask for mask, _ in seen][2:]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_second_pass_drops_anew():
    model, seen = ours(dropout=0.5, full_context=True).train(), []
    model.target.dropout.register_forward_hook(lambda _m, _i, out: seen.append(out == 0))
    model(*packed(*batch()), aligned=True)
    assert len(seen) == 2 and not torch.equal(*seen)
