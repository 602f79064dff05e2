"""Pretraining of BERT: from a text to a folder that transformers reads; vocabularies; exact resumption."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from nlpfast.data.lines import DataError
from nlpfast.data.masked_text import MaskedTextDataset, collate_masked, unigram_entropy
from nlpfast.data.text_documents import embedded_documents
from nlpfast.data.wordpiece import WordPiece
from nlpfast.models.bert import BertForPreTraining
from nlpfast.stop import Terminated
from nlpfast.train import bert_pretraining
from nlpfast.train.bert_options import MASKINGS, SIZES, BertPretrainingOptions
from nlpfast.train.bert_pretraining import bert_config, pretrain_bert, pretraining_loss
from nlpfast.train.config import ConfigError, TrainerConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setitem(SIZES, "tiny", (1, 64))
    monkeypatch.chdir(tmp_path)


def options(**given) -> BertPretrainingOptions:
    return BertPretrainingOptions(**{"biographies": 30, "vocab_size": 300, "max_length": 48, **given})


def settings(**given) -> TrainerConfig:
    return TrainerConfig(**{"max_steps": 4, "eval_every": 2, "device": "cpu", "batch_size": 4, **given})


def records(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_a_run_and_what_is_left_of_it(capsys):
    run = pretrain_bert(options(output_dir="run"), settings())
    assert sorted(path.name for path in Path("run").iterdir()) == [
        *("best", "last", "last.previous", "log.jsonl", "model"),
    ]
    assert run.folder == Path("run/model")
    assert {"mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "val_loss", "score"} == run.figures.keys()
    last = records("run")[-1]
    assert last["mlm_loss"] == run.figures["mlm_loss"]
    assert last["val_loss"] == pytest.approx(last["mlm_loss"] + last["nsp_loss"]) == -last["score"]
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("embedded biographies: 30 documents, ") and "unigram entropy" in err[0]
    # what is read by others
    theirs = transformers.BertForPreTraining.from_pretrained("run/model").eval()
    best = BertForPreTraining.from_pretrained("run/best")
    tokenizer = transformers.BertTokenizer.from_pretrained("run/model")
    ids = torch.tensor([tokenizer("Ada Abbott was born in Rome.")["input_ids"]])
    torch.testing.assert_close(
        theirs(ids).prediction_logits, best(ids).prediction_logits, atol=1e-5, rtol=1e-5
    )


def test_validation_is_the_loss_of_the_last_documents():
    run = pretrain_bert(options(output_dir="run", dropout=0.0), settings(), quiet=True)
    documents, vocabulary = embedded_documents(30), WordPiece.from_folder("run/model")
    training, validation = documents[:27], documents[27:]
    made = WordPiece.train([line for part in training for line in part], 300)
    assert made.tokens == vocabulary.tokens, "the vocabulary is that of the training documents"
    dataset = MaskedTextDataset(validation, vocabulary, max_length=48, seed=0)
    items = [dataset[i] for i in range(len(dataset))]
    with torch.no_grad():
        loss = float(pretraining_loss(run.model.eval(), collate_masked(items)))
    assert run.figures["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert run.unigram_entropy == unigram_entropy(dataset)


def test_runs_can_be_repeated_and_resumed_to_the_bit(monkeypatch):
    whole = pretrain_bert(options(output_dir="whole"), settings(), quiet=True)
    again = pretrain_bert(options(output_dir="again"), settings(), quiet=True)
    stopped = []
    loss = bert_pretraining.pretraining_loss

    def stop(model, batch):
        if not stopped:
            stopped.append(signal.raise_signal(signal.SIGTERM))
        return loss(model, batch)

    monkeypatch.setattr(bert_pretraining, "pretraining_loss", stop)
    with pytest.raises(Terminated):
        pretrain_bert(options(output_dir="parts"), settings(), quiet=True)
    assert not Path("parts/model").exists()
    parts = pretrain_bert(options(output_dir="parts"), settings(), resume="parts", quiet=True)
    assert parts.state.step == 4 and stopped == [None]
    for other in (again, parts):
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, other.model.state_dict()[name]), name
        assert other.figures == whole.figures


def test_class_0_is_follows_as_in_hugging_faces_heads():
    vocabulary = WordPiece.train(["one two three four"] * 9, 60)
    documents = [["one two.", "three four.", "two three."], ["four one.", "two.", "one one."]]
    dataset = MaskedTextDataset(documents, vocabulary, max_length=16, seed=1)
    batch = collate_masked([dataset[i] for i in range(len(dataset))])
    assert 0 < int(batch.is_next.sum()) < len(batch.is_next)
    torch.manual_seed(0)
    model = BertForPreTraining(bert_config("tiny", len(vocabulary), 0.0)).eval()
    with torch.no_grad():
        # sure that all follow
        model.cls["seq_relationship"].bias.copy_(torch.tensor([9.0, -9.0]))
        surprised = pretraining_loss(model, batch)
        told = pretraining_loss(model, batch._replace(is_next=torch.ones_like(batch.is_next)))
    assert float(surprised) > float(told) + 2


def test_the_model_is_that_of_the_best_evaluation(monkeypatch):
    scores = iter((-1.0, -2.0))
    monkeypatch.setattr(bert_pretraining._Validation, "__call__", lambda *_: {"score": next(scores)})
    run = pretrain_bert(options(output_dir="run"), settings(), quiet=True)
    kept, best, last = (
        BertForPreTraining.from_pretrained(f"run/{name}").bert.pooler["dense"].weight
        for name in ("model", "best", "last")
    )
    assert torch.equal(kept, best) and not torch.equal(best, last)
    assert run.folder == Path("run/model")


def test_another_text_or_vocabulary_is_not_that_of_the_run():
    text = "\n\n".join("\n".join(document) for document in embedded_documents(20))
    Path("text").write_text(text)
    pretrain_bert(options(text="text", output_dir="first"), settings(), quiet=True)
    given = options(text="text", output_dir="run", vocab="first/model")
    pretrain_bert(given, settings(), quiet=True)
    refused = pytest.raises(DataError, match="text: is not the text that the run was trained on")
    Path("first/model/tokenizer.json").unlink()
    pieces = Path("first/model/vocab.txt").read_text().split("\n")
    pieces[10], pieces[11] = pieces[11], pieces[10]
    Path("first/model/vocab.txt").write_text("\n".join(pieces))
    with refused:
        pretrain_bert(given, settings(max_steps=8), resume="run", quiet=True)
    pieces[10], pieces[11] = pieces[11], pieces[10]
    Path("first/model/vocab.txt").write_text("\n".join(pieces))
    assert pretrain_bert(given, settings(max_steps=6), resume="run", quiet=True).state.step == 6
    Path("text").write_text(text.replace("was", "is"))
    with refused:
        pretrain_bert(given, settings(max_steps=8), resume="run", quiet=True)


def test_masked_words_alone_and_a_text_of_one_document():
    lines = [line for document in embedded_documents(20) for line in document]
    Path("lines.txt").write_text("\n".join(lines) + "\n")
    run = pretrain_bert(options(text="lines.txt", no_nsp=True, output_dir="run"), settings(), quiet=True)
    assert run.figures.keys() == {"mlm_loss", "mlm_accuracy", "val_loss", "score"}
    first = records("run")[0]
    assert first["data"]["used"] == len(lines)
    with pytest.raises(DataError, match=r"lines.txt: has 1 document.*--no-nsp"):
        pretrain_bert(options(text="lines.txt", output_dir="other"), settings(), quiet=True)


@pytest.mark.parametrize("masking", MASKINGS)
def test_every_masking_trains(masking):
    run = pretrain_bert(options(masking=masking, output_dir=masking), settings(max_steps=1), quiet=True)
    assert math.isfinite(run.figures["mlm_loss"])


def test_going_on_with_a_model_and_its_vocabulary():
    pretrain_bert(options(output_dir="first", cased=True), settings(), quiet=True)
    before = BertForPreTraining.from_pretrained("first/model").state_dict()
    given = options(output_dir="second", model="first/model", dropout=0.0)
    second = pretrain_bert(given, settings(max_steps=1, learning_rate=1e-9), quiet=True)
    assert WordPiece.from_folder("second/model").tokens == WordPiece.from_folder("first/model").tokens
    for name, tensor in second.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)
    assert second.model.config.hidden_dropout_prob == 0.0
    WordPiece.train(["a b c d e f g h i j"] * 9, 400).save("wider")
    tokens = [*WordPiece.from_folder("first/model").tokens, *(f"more{i}" for i in range(400))]
    Path("wider/vocab.txt").write_text("\n".join(tokens) + "\n")
    Path("wider/tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"first/model: has .* pieces, the vocabulary"):
        pretrain_bert(options(output_dir="third", model="first/model", vocab="wider"), settings(), quiet=True)


def test_sizes_are_those_of_the_miniatures(monkeypatch):
    monkeypatch.undo()
    for size, (layers, channels, heads) in {
        "tiny": (2, 128, 2),
        "mini": (4, 256, 4),
        "small": (4, 512, 8),
        "medium": (8, 512, 8),
        "base": (12, 768, 12),
    }.items():
        config = bert_config(size, 30522, 0.1)
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (
            layers,
            channels,
            heads,
        )
        assert config.intermediate_size == 4 * channels
    assert bert_config("base", 30522, 0.1) == type(config)()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"text": "nowhere"}, DataError, "nowhere: no such file"),
        ({"vocab": "nowhere"}, DataError, "nowhere: has no tokenizer.json or vocab.txt"),
        ({"model": "no/where/"}, (DataError, OSError), "no/where"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(given, error, message):
    with pytest.raises(error, match=message):
        pretrain_bert(options(output_dir="run", **given), settings(), quiet=True)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "given",
    [{"masking": "letters"}, {"config": "huge"}, {"max_length": 513}, {"vocab": ""}, {"dropout": 1.5}],
    ids=str,
)
def test_wrong_options(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        BertPretrainingOptions(**given)


def test_the_loss_falls_below_the_unigram_entropy():
    """On a text with few sentences, which are learned by heart."""
    Path("text").write_text(
        "\n".join(["the red fox runs\nit runs far\n", "a blue bird sings\nit sings well\n"] * 20)
    )
    run = pretrain_bert(
        options(text="text", output_dir="run", dropout=0.0, max_length=16, vocab_size=60),
        settings(max_steps=150, eval_every=150, learning_rate=5e-3, batch_size=20),
        quiet=True,
    )
    assert run.figures["mlm_loss"] < 0.5 * run.unigram_entropy
