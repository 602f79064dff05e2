"""Scores of a corpus under a language model: by batches as one by one, kept on the disk, and recomputed."""

import logging

import numpy as np
import pytest
import torch

from nlpfast.data.token_pairs import TokenLists
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.rnnlm import RNNLM, RNNLMConfig
from nlpfast.train import language_model_scores as module
from nlpfast.train.language_model_scores import language_model_scores, scores_key

SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2}
SENTENCES = TokenLists.of([[5, 6], [], [7] * 9, [3, 4, 8], [9], [6, 6, 6, 6]])


def gpt(seed=0, **given) -> GPT:
    torch.manual_seed(seed)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "embd_pdrop": 0.5}
    return GPT(GPTConfig(10, 16, **{**sizes, **given}))


def rnn() -> RNNLM:
    torch.manual_seed(0)
    return RNNLM(RNNLMConfig(vocab_size=10, embed_size=6, hidden_size=8, dropout=0.5))


@pytest.mark.parametrize("build", [gpt, rnn])
@pytest.mark.parametrize("tokens", [1, 8, 8192])
def test_batches_change_nothing(build, tokens, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BATCH_TOKENS", tokens)
    model = build().train()
    found = language_model_scores(model, SENTENCES, **SPECIAL, folder=tmp_path)
    assert model.training and found.dtype == np.float64
    model.eval()
    for score, sentence in zip(found, SENTENCES.lists(), strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([[1, *sentence]]))[0][0].log_softmax(-1)
        alone = log_p.gather(1, torch.tensor([*sentence, 2])[:, None]).sum()
        assert score == pytest.approx(float(alone), rel=1e-5)


def test_the_key_is_of_all_that_scores_follow_from():
    special = tuple(SPECIAL.values())
    keys = {
        scores_key(model, sentences, marks)
        for model, sentences, marks in (
            (gpt(), SENTENCES, special),
            (gpt(1), SENTENCES, special),
            (gpt(n_head=4), SENTENCES, special),
            (rnn(), SENTENCES, special),
            (gpt(), TokenLists.of([[5], [6], *SENTENCES.lists()[2:]]), special),
            (gpt(), TokenLists.of([[5, 6, 7], *SENTENCES.lists()[1:]]), special),
            (gpt(), SENTENCES, (0, 2, 1)),
        )
    }
    assert len(keys) == 7
    assert scores_key(gpt(), SENTENCES, special) in keys


def test_what_is_kept_is_read(tmp_path, monkeypatch):
    first = language_model_scores(gpt(), SENTENCES, **SPECIAL, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    def computed(*_):
        raise AssertionError("scores are computed again")

    monkeypatch.setattr(module, "_computed", computed)
    assert np.array_equal(language_model_scores(gpt(), SENTENCES, **SPECIAL, folder=tmp_path), first)


@pytest.mark.parametrize("content", [b"", b"noise", None])
def test_a_damaged_file_is_written_again(content, tmp_path, caplog):
    first = language_model_scores(gpt(), SENTENCES, **SPECIAL, folder=tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    if content is None:
        with path.open("wb") as file:
            np.save(file, first[:3])
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "nlpfast"):
        again = language_model_scores(gpt(), SENTENCES, **SPECIAL, folder=tmp_path)
    assert np.array_equal(again, first) and path.read_bytes() == whole
    if content is not None:
        assert "cannot be read" in caplog.text and "computed again" in caplog.text


def test_a_cache_that_cannot_be_written_is_told(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "nlpfast"):
        found = language_model_scores(gpt(), SENTENCES, **SPECIAL, folder=tmp_path / "file")
    assert len(found) == 6 and "scores are not kept" in caplog.text and "XDG_CACHE_HOME" in caplog.text
