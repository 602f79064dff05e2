"""Log-probabilities of whole sentences: against sums over logits, with a weight for each sentence."""

import pytest
import torch
from torch import Tensor

from nlpfast.data.sentence_batches import make_sentence_batch
from nlpfast.data.translation_batches import make_batch
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.seq2seq import Seq2Seq, Seq2SeqConfig
from nlpfast.models.sequence_log_probabilities import (
    sentence_log_probabilities,
    translation_log_probabilities,
)
from nlpfast.models.transformer import Transformer, TransformerConfig

SPECIAL = {"pad_id": 0, "bos_id": 2, "eos_id": 3}
SOURCES, TARGETS = [[5, 6, 7], [8], [], [9, 10, 4, 4]], [[11], [5, 5, 6, 4], [7, 8], []]
V = 12
WEIGHTS = torch.tensor((1.0, -2.0, 0.5, 3.0), dtype=torch.float64)


def transformer() -> Transformer:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    config = TransformerConfig(
        source_vocab=V, target_vocab=V, d_model=8, heads=2, d_ff=16, dropout=0.0, **sizes
    )
    return Transformer(config).double()


def rnn() -> Seq2Seq:
    config = Seq2SeqConfig(source_vocab=V, target_vocab=V, embed_size=6, hidden_size=8, dropout=0.0)
    return Seq2Seq(config).double()


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def alone(model: Transformer | Seq2Seq, source: list[int], target: list[int]) -> Tensor:
    """Return the log-probability of one translation by the steps of the decoder, with gradients."""
    batch = make_batch([source], [target], **SPECIAL)
    S, T = len(source) + 1, len(target) + 1
    both = (batch.source[None, :S], batch.target_in[None, :T])
    if isinstance(model, Transformer):
        logits = model.logits(both[0], torch.tensor([S]), both[1], torch.tensor([T]))
    else:
        memory, state = model.encode(both[0].T, [S])
        whole = torch.cat((both[1], both[1][:, :1]), 1)
        logits = (model.decode(memory, None, state, whole.T) @ model.output_weight.T).transpose(0, 1)
    return logits[0].log_softmax(-1).gather(1, batch.target_out[:T, None]).sum()


@pytest.mark.parametrize("build", [transformer, rnn])
def test_translations_have_the_probabilities_of_each_alone(build: type) -> None:
    torch.manual_seed(0)
    model = build()
    found = translation_log_probabilities(model, make_batch(SOURCES, TARGETS, **SPECIAL))
    one_by_one = torch.stack([alone(model, x, y) for x, y in zip(SOURCES, TARGETS, strict=True)])
    torch.testing.assert_close(found, one_by_one, rtol=1e-10, atol=1e-10)
    expected = gradients(model, WEIGHTS @ one_by_one)
    for name, grad in gradients(model, WEIGHTS @ found).items():
        torch.testing.assert_close(grad, expected.pop(name), rtol=1e-9, atol=1e-9, msg=name)
    assert not expected


def test_sentences_have_the_probabilities_of_each_alone() -> None:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(V, 8, n_layer=2, n_head=2, n_embd=8, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    ).double()
    found = sentence_log_probabilities(model, make_sentence_batch(TARGETS, **SPECIAL))
    one_by_one = []
    for row in TARGETS:
        logits, _ = model(torch.tensor([[2, *row]]))
        one_by_one.append(logits[0].log_softmax(-1).gather(1, torch.tensor([*row, 3])[:, None]).sum())
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-10, atol=1e-10)
    expected = gradients(model, WEIGHTS @ torch.stack(one_by_one))
    for name, grad in gradients(model, WEIGHTS @ found).items():
        torch.testing.assert_close(grad, expected.pop(name), rtol=1e-9, atol=1e-9, msg=name)
    assert not expected
