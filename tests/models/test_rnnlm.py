"""The recurrent language model: against a loop over an LSTM's formulas, packed, saved and called wrongly."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nlpfast.data.sentence_batches import make_sentence_batch
from nlpfast.decoding import generate
from nlpfast.models.bert import BertConfig, BertModel
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.language_model_files import load_language_model, load_vocabulary
from nlpfast.models.rnnlm import RNNLM, RNNLMConfig
from nlpfast.models.sequence_log_probabilities import sentence_log_probabilities
from nlpfast.nn.packing import Packing

V = 11
SPECIAL = {"pad_id": 0, "bos_id": 2, "eos_id": 3}
SENTENCES = [[5, 6, 7], [8], [], [9, 10, 4, 4, 4]]
TWO, TIED = {"layers": 2}, {"tied": True, "embed_size": 8}


def model(**given):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "embed_size": 6, "hidden_size": 8, "dropout": 0.0}
    return RNNLM(RNNLMConfig(**{**sizes, **given})).double()


def by_hand(net, idx):
    """Return the logits [T, V] of one sequence by a loop over its tokens."""
    weights = dict(net.lstm.named_parameters())
    x = net.tok_emb.weight[idx]
    for layer in range(net.config.layers):
        of_input, of_state, b_input, b_state = (
            weights[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = cell = x.new_zeros(net.config.hidden_size)
        outputs = []
        for row in x:
            gates = of_input @ row + b_input + of_state @ hidden + b_state
            put, forget, candidate, give = gates.chunk(4)
            cell = forget.sigmoid() * cell + put.sigmoid() * candidate.tanh()
            hidden = give.sigmoid() * cell.tanh()
            outputs.append(hidden)
        x = torch.stack(outputs)
    return x @ net.head.weight.T + net.head.bias


def gradients(net, loss):
    found = torch.autograd.grad(loss, list(net.parameters()))
    return dict(zip(dict(net.named_parameters()), found, strict=True))


def batch_of(sentences=SENTENCES):
    batch = make_sentence_batch(sentences, **SPECIAL)
    return batch, Packing(batch.cu_seqlens, batch.longest)


@pytest.mark.parametrize("given", [{}, TWO, TIED], ids=str)
def test_packed_and_padded_are_a_loop_over_each_alone(given):
    net = model(**given)
    batch, packing = batch_of()
    by_loops, nll = [], []
    for sentence in SENTENCES:
        logits = by_hand(net, torch.tensor([2, *sentence]))
        by_loops.append(logits)
        nll.append(F.cross_entropy(logits, torch.tensor([*sentence, 3]), reduction="none"))
    expected, loss = torch.cat(by_loops), torch.cat(nll).mean()

    logits, with_logits = net(batch.tokens_in, batch.tokens_out, packing=packing)
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-9, atol=1e-9)
    nothing, alone = net(batch.tokens_in, batch.tokens_out, return_logits=False, packing=packing)
    assert nothing is None
    features = net.features(batch.tokens_in, packing)
    assert features.shape == (64, 8)
    torch.testing.assert_close(net.head(features), logits, rtol=1e-9, atol=1e-9)
    # the packed batch, padded
    targets = batch.tokens_out.new_full((len(packing.lengths()), 6), -100)
    targets[packing.within()] = batch.tokens_out
    padded, of_padded = net(packing.padded(batch.tokens_in), targets)
    torch.testing.assert_close(padded[packing.within()], logits, rtol=1e-9, atol=1e-9)
    of_padded_alone = net(packing.padded(batch.tokens_in), targets, return_logits=False)[1]
    wanted = gradients(net, loss)
    assert all(grad.abs().max() > 1e-6 for grad in wanted.values())
    for found in (with_logits, alone, of_padded, of_padded_alone):
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-9)
        for name, grad in gradients(net, found).items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_sentences_that_fill_up_and_others_are_alone():
    net = model(**TWO)
    batch, _ = batch_of()
    probabilities = sentence_log_probabilities(net, batch)
    for sentence, found in zip(SENTENCES, probabilities, strict=True):
        logits = by_hand(net, torch.tensor([2, *sentence]))
        wanted = logits.log_softmax(-1).gather(1, torch.tensor([*sentence, 3])[:, None]).sum()
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    # an empty sequence between others, and a bound that is not reached
    three = Packing(torch.tensor([0, 2, 2, 5]), 9)
    idx = torch.tensor([4, 5, 6, 7, 8])
    logits, loss = net(idx, packing=three)
    assert loss is None and logits.shape == (5, V)
    alone = torch.cat([by_hand(net, idx[:2]), by_hand(net, idx[2:])])
    torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)


def test_characters_may_be_any_token_and_int32():
    net = model(pad_id=None, bos_id=None, eos_id=None, vocab_size=2)
    idx = torch.tensor([[0, 1, 1], [1, 0, 0]])
    logits, loss = net(idx, idx)
    torch.testing.assert_close(logits, torch.stack([by_hand(net, row) for row in idx]), rtol=1e-9, atol=1e-9)
    assert torch.equal(net(idx.int())[0], logits)
    assert gradients(net, loss)["tok_emb.weight"].abs().amin() > 0


def test_weights_at_first():
    net = model(vocab_size=400)
    for weight in (net.tok_emb.weight, net.head.weight):
        assert weight.abs().max() <= 0.1 and 0.055 < weight.std() < 0.06
    assert not net.head.bias.any()
    tied = model(**TIED)
    assert tied.head.weight is tied.tok_emb.weight
    assert sum(p.numel() for p in tied.parameters()) == V * 8 + V + 4 * 8 * (8 + 8 + 2)


def test_dropout_is_of_embeddings_between_layers_and_of_outputs():
    net = model(**TWO, dropout=0.5)
    idx = torch.arange(8)[None]
    torch.testing.assert_close(net.eval()(idx)[0][0], by_hand(net, idx[0]), rtol=1e-9, atol=1e-9)
    net.train()
    seen = {}
    net.lstm.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output[0]))
    net.head.register_forward_hook(lambda module, inputs, output: seen.update(z=inputs[0]))
    net(idx)
    words = 2 * net.tok_emb.weight[idx]
    for found, whole in ((seen["x"], words), (seen["z"], 2 * seen["y"])):
        kept = found != 0
        assert 0.2 < kept.double().mean() < 0.8
        torch.testing.assert_close(found[kept], whole[kept])
    assert net.lstm.dropout == 0.5 and model(dropout=0.5).lstm.dropout == 0.0


def test_autocast_keeps_states_in_float32_and_the_loss_close():
    net = model(**TWO).float()
    batch, packing = batch_of()
    exact = net(batch.tokens_in, batch.tokens_out, return_logits=False, packing=packing)[1]
    with torch.autocast("cpu", torch.bfloat16):
        features = net.features(batch.tokens_in, packing)
        loss = net(batch.tokens_in, batch.tokens_out, return_logits=False, packing=packing)[1]
        logits, _ = net(batch.tokens_in, packing=packing)
    assert (features.dtype, loss.dtype, logits.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert torch.equal(features, net.features(batch.tokens_in, packing))
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=1e-3)
    for name, grad in gradients(net, loss).items():
        assert grad.isfinite().all() and grad.dtype == torch.float32, name


@pytest.mark.parametrize("given", [TWO, TIED], ids=str)
def test_it_comes_back_from_its_files(given, tmp_path):
    net = model(**given, **SPECIAL)
    net.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("head.weight" in names) is not ("tied" in given) and "tok_emb.weight" in names
    for read in (RNNLM.from_pretrained, load_language_model):
        back = read(tmp_path)
        assert type(back) is RNNLM and back.config == net.config and not back.training
        idx = torch.arange(V)[None]
        assert torch.equal(back(idx)[0], net(idx)[0])
        assert (back.head.weight is back.tok_emb.weight) is net.config.tied
    # the weights of a moved or copied model are still one
    other = copy.deepcopy(back).float()
    assert (other.head.weight is other.tok_emb.weight) is net.config.tied
    other.load_state_dict(back.state_dict())
    torch.testing.assert_close(other(idx)[0], net(idx)[0].float(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        other.tok_emb.weight.zero_()
    assert (not other.head.weight.any()) is net.config.tied


def test_files_of_other_models_are_refused(tmp_path):
    model().save_pretrained(tmp_path / "rnn")
    GPT(GPTConfig(V, 4, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path / "gpt")
    assert type(load_language_model(tmp_path / "gpt")) is GPT
    with pytest.raises(ValueError, match="model_type is 'gpt', expected 'rnnlm'"):
        RNNLM.from_pretrained(tmp_path / "gpt")
    sizes = {"num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4}
    BertModel(BertConfig(vocab_size=V, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"config.json: model_type is 'bert', which is no language model"):
        load_language_model(tmp_path / "bert")
    with pytest.raises(OSError, match="give a folder with a saved model"):
        load_language_model(tmp_path / "none")
    with pytest.raises(ValueError, match="give a folder of `nlpfast vocab bpe`"):
        load_vocabulary(tmp_path / "rnn")
    path = tmp_path / "rnn" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "head.bias": weights["head.bias"][1:]}, path)
    with pytest.raises(ValueError, match=r"head.bias has shape \[10\], the configuration says \[11\]"):
        RNNLM.from_pretrained(tmp_path / "rnn")
    config = tmp_path / "rnn" / "config.json"
    config.write_text(config.read_text().replace('"layers": 1,', ""))
    with pytest.raises(ValueError, match=r"config.json: layers is missing; save the model again"):
        RNNLM.from_pretrained(tmp_path / "rnn")
    config.write_text(config.read_text().replace("{", '{"layers": 1, "depth": 1,'))
    with pytest.raises(ValueError, match="depth is not a field of RNNLMConfig"):
        RNNLM.from_pretrained(tmp_path / "rnn")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be an integer >= 1"),
        ({"embed_size": 1.5}, "embed_size=1.5 must be"),
        ({"hidden_size": -1}, "hidden_size=-1 must be"),
        ({"layers": 0}, "layers=0 must be"),
        ({"dropout": 1.1}, "dropout=1.1 must be a probability"),
        ({"dropout": "half"}, "dropout='half' must be a probability"),
        ({"tied": 1}, "tied=1 must be True or False"),
        ({"tied": True}, "tied=True needs one size, found embed_size=6 and hidden_size=8"),
        ({"pad_id": -1}, "pad_id=-1 must be a token, 0..10, or None"),
        ({"bos_id": V}, "bos_id=11 must be a token"),
        ({"eos_id": "</s>"}, "eos_id='</s>' must be a token"),
        ({"eos_id": 1}, "pad_id=0, bos_id=1, eos_id=1 must differ"),
        ({"pad_id": None, "eos_id": 1}, "bos_id=1, eos_id=1 must differ"),
    ],
)
def test_there_is_no_such_model(given, message):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        model(**given)


FIVE = torch.tensor([4, 5, 6, 7, 8])
PACKED = Packing.of_lengths(torch.tensor([2, 3]))


@pytest.mark.parametrize(
    ("idx", "options", "message"),
    [
        (FIVE, {}, "idx has shape [5], expected [B, T]; add the batch dimension"),
        (FIVE[None], {"packing": PACKED}, "idx has shape [1, 5], expected [N] with packing"),
        (FIVE[None, :0], {}, "idx has shape [1, 0], which has no token"),
        (FIVE[:0], {"packing": Packing(torch.tensor([0, 0]), 0)}, "idx has shape [0], which has no token"),
        (FIVE, {"packing": PACKED, "targets": FIVE[:4]}, "targets has shape [4], idx [5]"),
        (FIVE[None], {"targets": FIVE}, "targets has shape [5], idx [1, 5]"),
        (FIVE[:4], {"packing": PACKED}, "packing has 5 tokens, idx 4"),
        (FIVE, {"packing": Packing(PACKED.cu_seqlens, 2)}, "packing.longest=2, but it has a sequence of 3"),
        (FIVE + 4, {"packing": PACKED}, "idx[3] is 11, outside the vocabulary 0..10"),
        (FIVE[None] - 5, {}, "idx[0, 0] is -1, outside the vocabulary 0..10"),
    ],
)
def test_a_wrong_call_is_refused(idx, options, message):
    with pytest.raises(ValueError) as caught:
        model()(idx, **options)
    assert str(caught.value).startswith(message)
    if "packing" in options and "targets" not in options:
        with pytest.raises(ValueError) as caught:
            model().features(idx, options["packing"])
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("layers", [1, 2])
def test_text_is_written_from_the_state_as_from_the_beginning(layers):
    torch.manual_seed(0)
    config = RNNLMConfig(vocab_size=11, embed_size=6, hidden_size=7, layers=layers, dropout=0.5)
    model = RNNLM(config).double()
    prompts, lengths = torch.randint(11, (3, 5)), torch.tensor([2, 5, 1])
    written = [
        generate(model, prompts, 9, lengths=lengths, greedy=True, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*written) and written[0].shape == (3, 14)
    model.eval()
    logits, state = model.prefill(prompts, lengths)
    for row, size in enumerate(lengths.tolist()):
        whole = torch.cat((prompts[row, :size], torch.tensor([4])))
        expected = model(whole[None])[0][0]
        torch.testing.assert_close(logits[row], expected[size - 1], rtol=1e-12, atol=1e-12)
    following = model.decode(torch.tensor([4, 4, 4]), state)
    for row, size in enumerate(lengths.tolist()):
        whole = torch.cat((prompts[row, :size], torch.tensor([4])))
        torch.testing.assert_close(following[row], model(whole[None])[0][0, -1], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"the state has 3 sequences; give \[B\]"):
        model.decode(torch.tensor([4, 4]), state)
    with pytest.raises(ValueError, match="vocab"):
        model.decode(torch.tensor([4, 11, 4]), state)


def test_a_file_that_names_no_kind_is_a_gpts(tmp_path):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(V, 8, n_layer=1, n_head=2, n_embd=8))
    gpt.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("model_type") == "gpt"
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_language_model(tmp_path)
    assert isinstance(found, GPT) and torch.equal(found.head.weight, gpt.head.weight)
