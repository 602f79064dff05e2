import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from nlpfast.models import pretrained
from nlpfast.models.gpt import GPT, GPTConfig

V, T, N_LAYER = 11, 8, 2


def model(std=0.1, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(V, T, n_layer=N_LAYER, n_head=4, n_embd=16, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0.0, std)
    return gpt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_and_read_again(tmp_path, dtype):
    gpt = model(0.3, dtype, ignore_index=0, bottleneck_dim=3)
    folder = tmp_path / "a" / "b"
    gpt.save_pretrained(folder)
    random_state = torch.get_rng_state()
    again = GPT.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert again.config.to_dict() == gpt.config.to_dict()
    assert not any(module.training for module in again.modules())
    assert again.state_dict().keys() == gpt.state_dict().keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, gpt.state_dict()[name]) and parameter.dtype == dtype
        assert parameter.requires_grad and parameter.device.type == "cpu"
    idx = torch.arange(T)[None]
    again.train()(idx, idx)[1].backward()


def test_weights_in_memory_do_not_follow_the_file(tmp_path):
    model(0.3).save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(again.head.weight, model(0.3).head.weight)


def with_masks(state):
    return {**state, **{f"blocks.{n}.attn.mask": torch.ones(1, 1, T, T).tril() for n in range(N_LAYER)}}


def test_reads_weights_that_hold_masks(tmp_path):
    gpt = model(0.3)
    gpt.save_pretrained(tmp_path)
    save_file(with_masks(gpt.state_dict()), tmp_path / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(tmp_path).head.weight, gpt.head.weight)


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

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
        (lambda f: (f / "config.json").write_bytes(b"\xff"), ValueError, ["config.json: not valid JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, ["config.json: holds a list"]),
        (lambda f: (f / "config.json").write_text("{}"), ValueError, ["config.json: config.vocab_size=None"]),
        (edit_config(model_type="bert"), ValueError, ["config.json: model_type is 'bert', expected 'gpt'"]),
        (edit_config(n_layer="two"), ValueError, ["config.json: config.n_layer='two' must be"]),
        (edit_config(n_head=5), ValueError, ["config.json: n_embd=16 must be"]),
        (
            edit_config(vocab_size=V + 1),
            ValueError,
            ["model.safetensors: ", "has shape [11, 16], the configuration says [12, 16]"],
        ),
        (edit_config(block_size=4), ValueError, ["safetensors: pos_emb has shape [1, 8, 16]", "[1, 4, 16]"]),
        (edit_config(n_layer=3), ValueError, ["safetensors: blocks.2.attn.key.bias is missing"]),
        (edit_config(n_layer=1), ValueError, ["blocks.1.attn.key.bias is not part of the model"]),
        (edit_weights(lambda s: s.pop("ln_f.bias")), ValueError, ["safetensors: ln_f.bias is missing"]),
        (edit_weights(lambda s: s.update(mask=torch.ones(1))), ValueError, [": mask is not part of the"]),
        (
            lambda f: os.truncate(f / "model.safetensors", 500),
            ValueError,
            ["model.safetensors: not a readable safetensors file"],
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 0),
            ValueError,
            ["model.safetensors: not a readable"],
        ),
    ],
)
def test_a_damaged_model_is_named(tmp_path, damage, kind, parts):
    model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(kind) as error:
        GPT.from_pretrained(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    for part in parts:
        assert part in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json: cannot be read"):
        GPT.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_model_that_was_there(tmp_path, monkeypatch, failing):
    model(0.3).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained if failing == "save_file" else os, failing, fail)
    with pytest.raises(OSError, match=r"model\.safetensors: cannot be written \(No space left on device\)"):
        model(0.1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"file: cannot be written"):
        model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_only_plain_values_are_saved(tmp_path):
    with pytest.raises(ValueError, match=r"config.extra is a list, expected a number"):
        model(extra=[1]).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
