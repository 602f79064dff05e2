"""BERT for sentence tasks: what heads compute, several tasks in a batch, frozen encoders, saved models."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nlpfast.data.packed_sentences import pack_sentences
from nlpfast.data.sentences import PARAPHRASE, SIMILARITY, SST
from nlpfast.models.bert import BertConfig, BertForPreTraining, BertModel
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.nn.packing import Packing

TINY = BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=12,
)
TASKS = [SST, PARAPHRASE, SIMILARITY]


def model_of(**options) -> BertForSentences:
    torch.manual_seed(0)
    model = BertForSentences(TINY, TASKS, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def sentences(number: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (number,), generator=generator).tolist()
    return [torch.randint(1, 30, (n,), generator=generator).tolist() for n in lengths]


def outputs(model, rows, parts):
    packed = pack_sentences(rows)
    packing = Packing(packed.cu_seqlens, packed.longest)
    return model(packed.input_ids, parts, packed.token_type_ids, packing=packing)


def vectors(model, rows):
    """Return the pooled vectors of sentences, one by one."""
    return torch.stack([model.bert(torch.tensor([row])).pooler_output[0] for row in rows])


@pytest.mark.parametrize("rlayer", [False, True])
@pytest.mark.parametrize("objective", ["cosine", "regression"])
def test_what_the_heads_say(objective, rlayer):
    model = model_of(objective=objective, rlayer=rlayer)
    rows = sentences(3 + 2 * 2 + 2 * 4)
    sst, para, sts = outputs(model, rows, [("sst", 3), ("paraphrase", 2), ("similarity", 4)])
    pooled = vectors(model, rows)
    torch.testing.assert_close(sst, model.heads["sst"](pooled[:3]))
    pairs = torch.tanh(model.relation(pooled)) if rlayer else pooled
    u, v = pairs[3:5], pairs[5:7]
    expected = model.heads["paraphrase"](torch.cat((u, v, (u - v).abs()), 1))[:, 0]
    torch.testing.assert_close(para, expected)
    u, v = pairs[7:11], pairs[11:15]
    if objective == "cosine":
        expected = 2.5 + 2.5 * (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))
        assert "similarity" not in model.heads
    else:
        expected = model.heads["similarity"](torch.cat((u, v, (u - v).abs()), 1))[:, 0]
    torch.testing.assert_close(sts, expected)
    assert hasattr(model, "relation") == rlayer


def test_a_batch_of_several_tasks_is_that_of_each():
    model = model_of()
    rows = sentences(5 + 6)
    both = outputs(model, rows, [("paraphrase", 3), ("sst", 5)])
    alone = outputs(model, rows[:6], [("paraphrase", 3)]) + outputs(model, rows[6:], [("sst", 5)])
    for together, single in zip(both, alone, strict=True):
        torch.testing.assert_close(together, single)


def test_the_same_sentence_twice_has_the_highest_score():
    (score,) = outputs(model_of(), [[3, 4, 5], [3, 4, 5]], [("similarity", 1)])
    torch.testing.assert_close(score, torch.tensor([5.0], dtype=torch.float64))


def test_pairs_in_one_sequence_have_a_head_for_one_vector():
    task = dataclasses.replace(SST, name="own", classes=3, columns=("a", "b"))
    model = BertForSentences(TINY, [task]).eval()
    (logits,) = outputs(model, sentences(8), [("own", 4)])
    assert logits.shape == (4, 3)
    assert model.heads["own"].in_features == 2 * TINY.hidden_size


def test_a_frozen_encoder_learns_nothing_and_drops_nothing():
    model = model_of(frozen=True).train()
    rows = sentences(4)
    assert not model.bert.training and model.dropout.training
    model.dropout.p = 0.0
    (first,) = outputs(model, rows, [("sst", 4)])
    (second,) = outputs(model, rows, [("sst", 4)])
    assert torch.equal(first, second)
    F.cross_entropy(first, torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is None for parameter in model.bert.parameters())
    assert model.heads["sst"].weight.grad.abs().max() > 0
    settings = type("Settings", (), {"learning_rate": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01})
    trained = {id(p) for group in model.configure_optimizers(settings).param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.heads.parameters()}
    assert model.eval().training is False


def test_a_whole_model_learns_everywhere():
    model = model_of(rlayer=True, objective="regression").train()
    rows = sentences(3 + 4 + 4)
    sst, para, sts = outputs(model, rows, [("sst", 3), ("paraphrase", 2), ("similarity", 2)])
    (sst.sum() + para.sum() + sts.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        unused = "bias" in name and ".key." in name
        assert unused or parameter.grad.abs().max() > 0, name


def test_weights_and_biases_decay_as_in_bert():
    model = model_of()
    settings = type("Settings", (), {"learning_rate": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = model.configure_optimizers(settings).param_groups
    assert decayed["weight_decay"] == 0.01 and kept["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("bias") or "LayerNorm" in names[id(p)] for p in kept["params"])
    assert not any(names[id(p)].endswith("bias") or "LayerNorm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_saved_models_come_back_with_their_tasks(tmp_path):
    model = model_of(rlayer=True, objective="regression").float()
    model.save_pretrained(tmp_path)
    again = BertForSentences.from_pretrained(tmp_path)
    assert again.tasks == {task.name: task for task in TASKS}
    assert (again.rlayer, again.objective, again.missing_keys) == (True, "regression", [])
    rows = sentences(4)
    assert torch.equal(
        outputs(model, rows, [("similarity", 2)])[0], outputs(again, rows, [("similarity", 2)])[0]
    )


def test_an_encoder_of_pretraining_gets_new_heads(tmp_path):
    torch.manual_seed(2)
    pretrained = BertForPreTraining(TINY)
    pretrained.save_pretrained(tmp_path)
    model = BertForSentences.from_pretrained(tmp_path, tasks=[SST], hidden_dropout_prob=0.4)
    assert model.missing_keys == ["heads.sst.weight", "heads.sst.bias"]
    assert model.dropout.p == 0.4 and model.bert.embeddings.dropout.p == 0.4
    for name, tensor in model.bert.state_dict().items():
        assert torch.equal(tensor, pretrained.bert.state_dict()[name]), name
    BertModel(TINY).save_pretrained(tmp_path)
    assert BertForSentences.from_pretrained(tmp_path, tasks=[SST]).missing_keys == model.missing_keys


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="at least one, each with a name"):
        BertForSentences(TINY, [])
    with pytest.raises(ValueError, match="at least one, each with a name"):
        BertForSentences(TINY, [SST, SST])
    with pytest.raises(ValueError, match="objective='dot'"):
        BertForSentences(TINY, TASKS, objective="dot")
    model = model_of()
    with pytest.raises(ValueError, match="parts has 'cfimdb', the tasks are sst, paraphrase, similarity"):
        outputs(model, sentences(2), [("cfimdb", 2)])
    with pytest.raises(ValueError, match=r"parts=.* need 200"):
        outputs(model, sentences(3), [("paraphrase", 100)])
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"classes":', '"clases":', 1))
    with pytest.raises(ValueError, match=r"config\.json: tasks="):
        BertForSentences.from_pretrained(tmp_path)
