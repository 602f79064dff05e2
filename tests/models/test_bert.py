"""BERT: the numbers of transformers, in padded and packed batches; its files; its losses."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nlpfast.data.packed_sentences import pack_sentences
from nlpfast.models import pretrained
from nlpfast.models.bert import BertConfig, BertForPreTraining, BertModel
from nlpfast.models.bert_files import MINBERT
from nlpfast.nn.packing import Packing

transformers = pytest.importorskip("transformers")

SHAPES = [(2, 3, 48), (3, 4, 64), (5, 7, 56), (12, 1, 16), (4, 5, 40)]
TINY = BertConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=50,
    max_position_embeddings=20,
)


def theirs(config: BertConfig, name: str = "BertModel") -> torch.nn.Module:
    """Return transformers' model, with weights that make every part count."""
    torch.manual_seed(1)
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    model = getattr(transformers, name)(transformers.BertConfig(**fields)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            if key.endswith("LayerNorm.weight"):
                parameter.add_(1)
    return model


def batch(config: BertConfig, B: int = 4, T: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, mask and segments of sentences of unequal lengths, padded on the right."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, config.vocab_size, (B, T), generator=generator)
    lengths = torch.tensor([T, 1, 5, 9, 2, 12][:B])
    mask = (torch.arange(T) < lengths[:, None]).long()
    return ids * mask, mask, torch.randint(0, 2, (B, T), generator=generator) * mask


@pytest.mark.parametrize(
    ("shape", "activation"),
    [*((shape, "gelu") for shape in SHAPES), (SHAPES[0], "gelu_new"), (SHAPES[0], "relu")],
    ids=str,
)
def test_hidden_states_are_those_of_transformers(tmp_path, shape, activation):
    layers, heads, C = shape
    config = BertConfig(
        vocab_size=50,
        hidden_size=C,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=70,
        hidden_act=activation,
        max_position_embeddings=16,
    )
    expected = theirs(config)
    expected.save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    assert model.missing_keys == [] and not model.training
    ids, mask, types = batch(config)
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "token_type_ids": types}):
        want, got = expected(ids, **given), model(ids, **given)
        seen = given.get("attention_mask", torch.ones_like(mask)).bool()
        torch.testing.assert_close(
            got.last_hidden_state[seen], want.last_hidden_state[seen], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(got.pooler_output, want.pooler_output, atol=1e-5, rtol=0)


def test_padding_on_the_left_is_that_of_transformers(tmp_path):
    expected = theirs(TINY)
    expected.save_pretrained(tmp_path)
    ids, mask, _ = (x.flip(1) for x in batch(TINY))
    got = BertModel.from_pretrained(tmp_path)(ids, mask).last_hidden_state
    want = expected(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)


def test_packed_batch_is_the_padded_one_in_float64():
    torch.manual_seed(0)
    model = BertModel(TINY).double().eval()
    ids, mask, types = batch(TINY, 6)
    packing = Packing.of_lengths(mask.sum(1))
    results = {}
    for name in ("padded", "packed"):
        model.zero_grad()
        seen = mask.bool()
        if name == "padded":
            out = model(ids, mask, types)
            states = out.last_hidden_state[seen]
        else:
            out = model(ids[seen], token_type_ids=types[seen], packing=packing)
            states = out.last_hidden_state
            assert states.shape == (int(mask.sum()), TINY.hidden_size)
            there = packing.padded(states)
            assert torch.equal(there[seen], states) and not there[~seen].any()
        weights = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).view_as(states)
        ((states * weights).sum() + (out.pooler_output**2).sum()).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results[name] = [states.detach(), out.pooler_output.detach(), *gradients]
    for padded, packed in zip(*results.values(), strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-11, rtol=1e-9)
        assert padded.abs().max() > 0


def test_packed_training_run_in_float32_is_near_the_padded_one():
    torch.manual_seed(0)
    model = BertModel(TINY).eval()
    ids, mask, _ = batch(TINY, 6)
    packed = model(ids[mask.bool()], packing=Packing.of_lengths(mask.sum(1))).last_hidden_state
    torch.testing.assert_close(packed, model(ids, mask).last_hidden_state[mask.bool()], atol=1e-5, rtol=0)


def test_pretraining_heads_are_those_of_transformers(tmp_path):
    expected = theirs(TINY, "BertForPreTraining")
    expected.save_pretrained(tmp_path)
    model = BertForPreTraining.from_pretrained(tmp_path)
    assert model.missing_keys == []
    ids, mask, types = batch(TINY)
    labels = torch.where((torch.arange(ids.numel()).view_as(ids) % 3 == 0) & mask.bool(), ids, -100)
    follows = torch.tensor([0, 1, 1, 0])
    want = expected(
        ids, attention_mask=mask, token_type_ids=types, labels=labels, next_sentence_label=follows
    )
    got = model(ids, mask, types, labels=labels, next_sentence_label=follows)
    seen = mask.bool()
    torch.testing.assert_close(
        got.prediction_logits[seen], want.prediction_logits[seen], atol=2e-5, rtol=1e-5
    )
    torch.testing.assert_close(got.seq_relationship_logits, want.seq_relationship_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-6)
    # the same from the masked rows alone, packed, without logits
    rows = (labels[seen] != -100).nonzero().flatten()
    lean = model(
        ids[seen],
        token_type_ids=types[seen],
        packing=Packing.of_lengths(mask.sum(1)),
        rows=rows,
        labels=labels[seen][rows],
        next_sentence_label=follows,
        return_logits=False,
    )
    assert lean.prediction_logits is None
    torch.testing.assert_close(lean.loss, want.loss, atol=1e-5, rtol=1e-6)
    expected.zero_grad()
    want.loss.backward()
    lean.loss.backward()
    gradients = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=2e-5, rtol=1e-4, msg=name)


def test_what_fills_a_batch_up_does_not_count():
    torch.manual_seed(0)
    model = BertForPreTraining(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    packed = pack_sentences(rows)
    assert len(packed.cu_seqlens) - 1 > packed.sentences
    follows, labels = torch.tensor([0, 1, 1]), torch.tensor([3, 4])
    given = {"rows": torch.tensor([1, 6]), "labels": labels, "next_sentence_label": follows}
    layouts = {
        len(packed.input_ids): Packing(packed.cu_seqlens, packed.longest),
        9: Packing.of_lengths(torch.tensor([len(row) for row in rows])),
    }
    losses = [model(packed.input_ids[:n], packing=packing, **given).loss for n, packing in layouts.items()]
    torch.testing.assert_close(*losses)


def test_without_labels_there_is_no_loss_and_all_logits():
    model = BertForPreTraining(TINY).eval()
    ids, mask, _ = batch(TINY)
    out = model(ids, mask, return_logits=False)
    assert out.loss is None
    assert out.prediction_logits.shape == (*ids.shape, TINY.vocab_size)
    alone = model(ids, mask, next_sentence_label=torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(
        alone.loss, F.cross_entropy(alone.seq_relationship_logits, torch.tensor([0, 1, 0, 1]))
    )


@pytest.mark.parametrize("model_class", [BertModel, BertForPreTraining])
def test_saved_models_are_read_by_transformers_and_by_us(tmp_path, model_class):
    torch.manual_seed(3)
    model = model_class(TINY).eval()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == [model_class.__name__]
    other = getattr(transformers, model_class.__name__).from_pretrained(tmp_path).eval()
    again = model_class.from_pretrained(tmp_path)
    ids, mask, types = batch(TINY)
    out, want, back = (
        (m(ids, attention_mask=mask, token_type_ids=types)[0] for m in (model, other, again))
        if model_class is BertModel
        else (
            m(ids, attention_mask=mask, token_type_ids=types).prediction_logits for m in (model, other, again)
        )
    )
    torch.testing.assert_close(out[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)
    assert torch.equal(out, back)


def test_the_encoder_is_read_from_files_of_other_heads(tmp_path):
    expected = theirs(TINY, "BertForMaskedLM")
    expected.save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    # this model of transformers has no pooler
    assert model.missing_keys == ["pooler.dense.weight", "pooler.dense.bias"]
    ids, mask, _ = batch(TINY)
    torch.testing.assert_close(
        model(ids, mask).last_hidden_state[mask.bool()],
        expected.bert(ids, attention_mask=mask).last_hidden_state[mask.bool()],
        atol=1e-5,
        rtol=0,
    )
    pretraining = BertForPreTraining.from_pretrained(tmp_path)
    assert all("predictions" not in name for name in pretraining.missing_keys)
    assert "cls.seq_relationship.weight" in pretraining.missing_keys


def test_the_bias_of_masked_tokens_has_two_names(tmp_path):
    torch.manual_seed(4)
    model = BertForPreTraining(TINY)
    bias = torch.randn(TINY.vocab_size)
    state = {k: v for k, v in model.state_dict().items() if k != "cls.predictions.bias"}
    pretrained.write(tmp_path, TINY.to_dict(), {**state, "cls.predictions.decoder.bias": bias})
    again = BertForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(again.cls["predictions"].bias, bias) and again.missing_keys == []


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def old(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

    return {old(name): tensor for name, tensor in state.items()}


def minbert_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        new = name
        for theirs_, ours in sorted(MINBERT.items(), key=lambda pair: -len(pair[1])):
            if f".{ours}." in f".{new}":
                new = new.replace(f"{ours}.", f"{theirs_}.").replace("encoder.layer.", "bert_layers.")
                break
        found[f"bert.{new}"] = tensor
    return found


@pytest.mark.parametrize("names", [old_names, minbert_names, dict])
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_keys_of_old_files_and_of_minbert_load(tmp_path, names, kind):
    torch.manual_seed(4)
    model = BertModel(TINY).eval()
    state = names(model.state_dict())
    assert names is dict or not set(state) & set(model.state_dict())
    state["bert.embeddings.position_ids" if names is not dict else "position_ids"] = torch.arange(20)
    if kind == "pickle":
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        pretrained.write(tmp_path, TINY.to_dict(), state)
    again = BertModel.from_pretrained(tmp_path)
    assert again.missing_keys == []
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_names_of_minbert_are_those_of_its_modules():
    # the module tree of the course's bert.py
    layer = "bert_layers.1"
    expected = {
        "word_embedding.weight",
        "tk_type_embedding.weight",
        "embed_layer_norm.bias",
        "pooler_dense.weight",
        f"{layer}.self_attention.query.weight",
        f"{layer}.attention_dense.bias",
        f"{layer}.attention_layer_norm.weight",
        f"{layer}.interm_dense.weight",
        f"{layer}.out_dense.weight",
        f"{layer}.out_layer_norm.bias",
    }
    found = {name.removeprefix("bert.") for name in minbert_names(BertModel(TINY).state_dict())}
    assert expected <= found


def test_half_precision_files_become_float32(tmp_path):
    BertModel(TINY).half().save_pretrained(tmp_path)
    assert {p.dtype for p in BertModel.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_options_change_the_configuration(tmp_path):
    BertModel(TINY).save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path, hidden_dropout_prob=0.3)
    assert model.config.hidden_dropout_prob == 0.3
    assert model.embeddings.dropout.p == model.encoder["layer"][1].output.dropout.p == 0.3


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(OSError, match="no/such/folder"):
        BertModel.from_pretrained(tmp_path / "no/such/folder")
    model = BertModel(TINY)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    lacking = {k: v for k, v in state.items() if k != "encoder.layer.1.output.dense.bias"}
    pretrained.write(tmp_path, TINY.to_dict(), lacking)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        BertModel.from_pretrained(tmp_path)
    pretrained.write(tmp_path, {**TINY.to_dict(), "vocab_size": 41}, state)
    with pytest.raises(ValueError, match=r"has shape \[40, 24\], the configuration says \[41, 24\]"):
        BertModel.from_pretrained(tmp_path)
    for field, value in (("hidden_size", 25), ("hidden_act", "swish"), ("is_decoder", True)):
        pretrained.write(tmp_path, {**TINY.to_dict(), field: value}, state)
        with pytest.raises(ValueError, match=r"config\.json.*(num_attention_heads|swish|is_decoder)"):
            BertModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n(S'true'\ntR.")
    pretrained_config = TINY.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(pretrained_config))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        BertModel.from_pretrained(tmp_path)


def test_models_of_the_hub_come_from_its_cache(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    BertModel(TINY).save_pretrained(tmp_path)
    asked = []

    def download(source: str, name: str) -> str:
        asked.append((source, name))
        if source == "no/such":
            raise OSError("offline, and not in the cache\nsecond line")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert BertModel.from_pretrained("google/bert-tiny").config == TINY
    assert asked == [("google/bert-tiny", "config.json"), ("google/bert-tiny", "model.safetensors")]
    with pytest.raises(OSError, match=r"no/such: is no folder.*\(offline, and not in the cache\)"):
        BertModel.from_pretrained("no/such")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"\[3\], expected \[B, T\]"),
        ({"input_ids": torch.ones(1, 21, dtype=torch.int64)}, "T=21 tokens a row"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)},
            "attention_mask has shape",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "token_type_ids": torch.ones(2, 4)},
            "token_type_ids has shape",
        ),
        ({"input_ids": torch.full((1, 2), 40)}, "number that is too large"),
    ],
)
def test_wrong_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        BertModel(TINY)(**arguments)


def test_a_mask_does_not_go_with_a_packing():
    packing = Packing.of_lengths(torch.tensor([2, 1]))
    ids = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="leave it out"):
        BertModel(TINY)(ids, torch.ones(3), packing=packing)
    attention = BertModel(TINY).encoder["layer"][0].attention["self"]
    with pytest.raises(ValueError, match="leave it out"):
        attention(torch.ones(3, 24), torch.ones(3), packing=packing)


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 0},
        {"num_attention_heads": 5},
        {"hidden_dropout_prob": 1.5},
        {"hidden_act": "tanh"},
        {"pad_token_id": 30522},
    ],
    ids=str,
)
def test_wrong_configurations(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        BertConfig(**fields)


def test_initial_weights():
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab_size=3000, num_hidden_layers=1, hidden_size=384))
    embeddings = model.bert.embeddings.word_embeddings.weight
    assert not embeddings[0].any() and abs(float(embeddings[1:].detach().std()) - 0.02) < 2e-4
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        if name.endswith("LayerNorm.weight"):
            assert bool((parameter == 1).all()), name


def test_dropout_is_where_transformers_has_it():
    places = {"embeddings.dropout"}
    for layer in range(TINY.num_hidden_layers):
        here = f"encoder.layer.{layer}"
        places |= {f"{here}.attention.self.dropout", f"{here}.attention.output.dropout"}
        places |= {f"{here}.output.dropout"}
    found = []
    for model in (BertModel(TINY), theirs(TINY)):
        found.append({n for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)})
    assert found == [places, places]


@pytest.mark.parametrize("packed", [False, True])
def test_each_dropout_acts_as_that_of_transformers(packed):
    """With everything dropped at one place, nothing at others, the result is no longer random."""
    expected = theirs(TINY)
    model = BertModel(TINY)
    model.load_state_dict({k: v for k, v in expected.state_dict().items() if k in model.state_dict()})
    ids, mask, _ = batch(TINY)
    for place in [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]:
        for whole in (model, expected):
            for name, module in whole.train().named_modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = float(name == place)
        want = expected(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        if packed:
            got = model(ids[mask.bool()], packing=Packing.of_lengths(mask.sum(1))).last_hidden_state
        else:
            got = model(ids, mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0, msg=place)
