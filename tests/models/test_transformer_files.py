"""A saved Transformer, and damaged ones; the configuration and its errors."""

import json
import os

import pytest
import torch
from plain_transformer import C, V, batch, ours, packed, sizes
from safetensors.torch import load_file, save_file
from torch import nn

from nlpfast.models.transformer import Transformer, TransformerConfig

KINDS = [
    {},
    {"tied": "decoder", "source_vocab": V + 4, "norm": "post", "positions": "learned", "full_context": True},
    {"tied": "none", "activation": "gelu", "alignment_layer": -1, "alignment_heads": 2, "align_shift": 1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saved_and_read_again(tmp_path, kind, dtype):
    model, folder = ours(dtype, dropout=0.25, **kind), tmp_path / "a" / "b"
    model.save_pretrained(folder)
    random_state = torch.get_rng_state()
    again = Transformer.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert again.config == model.config
    assert not any(module.training for module in again.modules())
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, state[name]) and weight.dtype == dtype and weight.device.type == "cpu"
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again.logits(*batch()), model.logits(*batch()))


@pytest.mark.parametrize("tied", ["all", "decoder", "none"])
def test_tied_weights_remain_tied(tmp_path, tied):
    ours(tied=tied).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("target.tokens.weight" in names) == (tied != "all") and "source.tokens.weight" in names
    assert ("output.weight" in names) == (tied == "none")
    again = Transformer.from_pretrained(tmp_path).train()
    before = again.output_weight.detach().clone()
    again.logits(*batch()).square().sum().backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    source, target, output = again.source.tokens.weight, again.target.tokens.weight, again.output_weight
    assert (source is target) == (tied == "all") and (target is output) == (tied != "none")
    assert not torch.equal(output, before)
    assert torch.equal(source, target) == (tied == "all") and torch.equal(target, output) == (tied != "none")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_state_dict_names_a_weight_once(kind):
    # of another model, within a module, with other weights
    model, other = nn.Sequential(ours(**kind)), nn.Sequential(ours(**kind))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    state = model.state_dict()
    assert len({weight.data_ptr() for weight in state.values()}) == len(state)
    assert ("0.target.tokens.weight" in state) == (model[0].config.tied != "all")
    assert len(state) == len(list(model.parameters()))
    names = set(state)
    other.load_state_dict(state)
    assert set(state) == names
    assert torch.equal(other[0].logits(*batch()), model[0].logits(*batch()))
    # a state dict that has both names, as modules without hooks write them, is read too
    other.load_state_dict({**state, "0.target.tokens.weight": model[0].target.tokens.weight})
    del state["0.source.tokens.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.source\.tokens\.weight"):
        other.load_state_dict(state)


def test_weights_that_are_given_are_written(tmp_path):
    model = ours()
    state = {name: weight * 2 for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again.target.tokens.weight, model.source.tokens.weight * 2)
    assert len(state) == len(model.state_dict())


def test_weights_in_memory_do_not_follow_the_file(tmp_path):
    ours().save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(again.source.tokens.weight, ours().source.tokens.weight)


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def without(name):
    def edit(folder):
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        del fields[name]
        path.write_text(json.dumps(fields))

    return edit


def edit_weights(change):
    def edit(folder):
        path = folder / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


@pytest.mark.parametrize(
    ("damage", "kind", "parts"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, ["config.json: cannot be read (No such"]),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, ["model.safetensors: cannot be"]),
        (lambda f: (f / "config.json").write_text("{"), ValueError, ["config.json: not valid JSON"]),
        (
            edit_config(model_type="gpt"),
            ValueError,
            ["config.json: model_type is 'gpt', expected", TransformerConfig.model_type],
        ),
        (edit_config(norm="middle"), ValueError, ["config.json: norm='middle' must be one of pre, post"]),
        (edit_config(depth=3), ValueError, ["config.json: depth is not a field of TransformerConfig"]),
        (without("source_vocab"), ValueError, ["config.json: source_vocab is missing"]),
        (edit_config(d_ff="20"), ValueError, ["config.json: d_ff='20' must be an integer"]),
        (edit_config(d_ff=21), ValueError, ["safetensors: encoder.0.network.fc1.weight has shape [20, 16]"]),
        (edit_config(decoder_layers=5), ValueError, ["safetensors: decoder.4.", "is missing"]),
        (edit_config(decoder_layers=3), ValueError, ["safetensors: decoder.3.", "is not part of the model"]),
        (edit_config(tied="decoder"), ValueError, ["safetensors: target.tokens.weight is missing"]),
        (edit_config(tied="none"), ValueError, ["safetensors: output.weight is missing"]),
        (edit_config(norm="post"), ValueError, ["decoder_norm.bias is not part of the model"]),
        (edit_config(positions="learned"), ValueError, ["source.positions.weight is missing"]),
        (edit_weights(lambda s: s.pop("encoder_norm.bias")), ValueError, ["encoder_norm.bias is missing"]),
        (
            edit_weights(lambda s: s.update({"target.tokens.weight": torch.ones(V, C)})),
            ValueError,
            ["target.tokens.weight is not part of the model"],
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 500),
            ValueError,
            ["model.safetensors: not a readable safetensors file"],
        ),
    ],
)
def test_a_damaged_model_is_named(tmp_path, damage, kind, parts):
    ours().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(kind) as error:
        Transformer.from_pretrained(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    for part in parts:
        assert part in message


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    model = ours()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nlpfast.models.pretrained.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: cannot be written \(No space left"):
        ours(d_ff=24).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_configuration_is_the_same_after_json():
    for kind in KINDS:
        config = sizes(dropout=0.25, **kind)
        fields = json.loads(json.dumps(config.to_dict()))
        assert fields.pop("model_type") == TransformerConfig.model_type
        assert TransformerConfig.from_dict(fields) == config


SIZES = ("source_vocab", "target_vocab", "encoder_layers", "decoder_layers", "d_model", "heads", "d_ff")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, rf"{name}={value!r} must be an integer >= 1")
            for name in (*SIZES, "max_positions", "alignment_heads")
            for value in (0, -1, 2.0, None)
        ),
        ({"d_model": 18}, "d_model=18 must be a positive multiple of heads=4"),
        *(
            ({name: value}, f"{name}={value!r} must be a probability")
            for name in ("dropout", "attention_dropout", "activation_dropout")
            for value in (-0.01, 1.01, float("nan"), "0.1")
        ),
        ({"norm": "both"}, "norm='both' must be one of pre, post"),
        ({"positions": "rotary"}, "positions='rotary' must be one of sinusoidal, learned"),
        ({"tied": "encoder"}, "tied='encoder' must be one of all, decoder, none"),
        ({"activation": "tanh"}, "activation='tanh' must be one of relu, gelu"),
        ({"full_context": "no"}, "full_context='no' must be True or False"),
        ({"d_model": 15, "heads": 3}, "d_model=15 must be even, for sines and cosines"),
        ({"source_vocab": V + 1}, f"source_vocab={V + 1} must be target_vocab={V}; use one vocabulary, or"),
        *(
            (
                {"source_vocab": V + 1, "tied": "none", name: value},
                rf"{name}={value!r} must be .* 0\.\.{V - 1}",
            )
            for name in ("pad_id", "bos_id", "eos_id")
            for value in (-1, V, 1.5)
        ),
        ({"pad_id": 1}, "pad_id, bos_id and eos_id are 1, 1 and 2; they must differ"),
        ({"eos_id": 0}, "pad_id, bos_id and eos_id are 0, 1 and 0; they must differ"),
        ({"eos_id": 1}, "pad_id, bos_id and eos_id are 0, 1 and 1; they must differ"),
        ({"alignment_layer": 4}, r"alignment_layer=4 must be a layer of the decoder, 0\.\.3, or -4\.\.-1"),
        ({"alignment_layer": -5}, "alignment_layer=-5 must be a layer of the decoder"),
        ({"alignment_layer": "last"}, "alignment_layer='last' must be a layer of the decoder"),
        ({"alignment_heads": 5}, "alignment_heads=5 must be at most heads=4"),
        ({"align_shift": 2}, "align_shift=2 must be 0 or 1"),
        ({"align_shift": -1}, "align_shift=-1 must be 0 or 1"),
    ],
    ids=str,
)
def test_a_configuration_without_a_model(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sizes(**changes)


def test_configurations_at_the_edge():
    smallest = {"source_vocab": 3, "target_vocab": 3, "d_model": 2, "heads": 1, "d_ff": 1, "max_positions": 1}
    model = Transformer(sizes(**smallest, encoder_layers=1, decoder_layers=1, pad_id=2, bos_id=0, eos_id=1))
    one = torch.ones(1, 1, dtype=torch.int64)
    assert model.logits(one, one[0], one, one[0]).shape == (1, 1, 3)
    for p in (0, 1, 1.0):
        assert sizes(dropout=p, attention_dropout=p, activation_dropout=p).dropout == p
    assert Transformer(sizes(positions="learned", d_model=15, heads=3)).config.d_model == 15


@pytest.mark.parametrize(
    ("layers", "aligned"), [(1, 0), (2, 1), (3, 0), (4, 1), (5, 2), (6, 3), (7, 4), (8, 5)]
)
def test_aligned_layer(layers, aligned):
    assert sizes(decoder_layers=layers).aligned_layer() == aligned
    for layer in range(layers):
        assert sizes(decoder_layers=layers, alignment_layer=layer).aligned_layer() == layer
        assert sizes(decoder_layers=layers, alignment_layer=layer - layers).aligned_layer() == layer


def test_a_read_model_trains(tmp_path):
    """Its positions, which no file has, are made anew."""
    model = ours(torch.float32)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path).train()
    for each in (model.train(), again):
        each(*packed(*batch())).features.square().sum().backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
