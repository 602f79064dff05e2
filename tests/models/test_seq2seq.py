"""Recurrent translation against its formulas, written out for one sentence and one token at a time."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from torch import nn

from nlpfast.models.seq2seq import Seq2Seq, Seq2SeqConfig
from nlpfast.nn.losses import LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing
from nlpfast.ops.linear_cross_entropy import linear_cross_entropy

SOURCE, TARGET, EMBED, HIDDEN = 13, 11, 6, 5
PAD, BOS, EOS = 0, 1, 2

VARIANTS = [
    {},
    {"attention": "dot"},
    {"attention": "additive"},
    {"input_feeding": False},
    {"attention": "additive", "input_feeding": False},
    {"tied": True, "embed_size": HIDDEN},
    {"pad_id": 3, "bos_id": 0, "eos_id": 1},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def config(**changes):
    sizes = {"source_vocab": SOURCE, "target_vocab": TARGET, "embed_size": EMBED, "hidden_size": HIDDEN}
    return Seq2SeqConfig(**{**sizes, "dropout": 0.0, **changes})


def model(dtype=torch.float64, std=0.7, **changes):
    torch.manual_seed(1)
    seq2seq = Seq2Seq(config(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in seq2seq.parameters():
            parameter.normal_(0.0, std)
    return seq2seq


def sentences(lengths, vocab, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab, (length,), generator=generator) for length in lengths]


def pad(rows, filler=PAD, columns=None):
    columns = columns or max(map(len, rows))
    filled = torch.full((len(rows), columns), filler)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = tokens
    return filled


def lengths_of(rows):
    return torch.tensor([len(row) for row in rows])


def pack(rows):
    return torch.cat(rows), Packing.of_lengths(lengths_of(rows))


def lstm_step(x, h, c, weights):
    """An LSTM's cell for one vector, by the gates' names."""
    of_input, of_hidden, bias_input, bias_hidden = weights
    i, f, g, o = (of_input @ x + bias_input + of_hidden @ h + bias_hidden).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def encoded(p, tokens):
    """Encoder states [S, 2h] of one sentence, and the first hidden and cell of the decoder."""
    x = p["model_embeddings.source.weight"][tokens]
    x = torch.cat((x, torch.zeros_like(x[:1])))
    here, right = p["post_embed_cnn.weight"].unbind(2)
    x = [here @ x[i] + right @ x[i + 1] + p["post_embed_cnn.bias"] for i in range(len(tokens))]
    states, ends = [], []
    for suffix, order in (("", range(len(x))), ("_reverse", reversed(range(len(x))))):
        parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [p[f"encoder.{name}_l0{suffix}"] for name in parts]
        h = c = x[0].new_zeros(HIDDEN)
        found = {}
        for i in order:
            h, c = lstm_step(x[i], h, c, weights)
            found[i] = h
        states.append(torch.stack([found[i] for i in range(len(x))]))
        ends.append((h, c))
    (h1, c1), (h2, c2) = ends
    h, c = torch.cat((h1, h2)), torch.cat((c1, c2))
    return torch.cat(states, 1), p["h_projection.weight"] @ h, p["c_projection.weight"] @ c


def score(p, attention, s, state):
    if attention == "dot":
        return s @ (state[:HIDDEN] + state[HIDDEN:])
    key = p["att_projection.weight"] @ state
    if attention == "multiplicative":
        return s @ key
    return p["att_vector.weight"][0] @ torch.tanh(key + p["att_query_projection.weight"] @ s)


def by_hand(seq2seq, source, target_in):
    """The combined outputs [T, h] and the attention [T, S] of one sentence; gradients flow."""
    p, settings = dict(seq2seq.named_parameters()), seq2seq.config
    states, s, c = encoded(p, source)
    weights = [p[f"decoder.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    o = torch.zeros_like(s)
    outputs, attention = [], []
    for token in target_in:
        y = p["model_embeddings.target.weight"][token]
        s, c = lstm_step(torch.cat((y, o)) if settings.input_feeding else y, s, c, weights)
        e = torch.stack([score(p, settings.attention, s, state) for state in states])
        weight = torch.exp(e) / torch.exp(e).sum()
        a = sum(w * state for w, state in zip(weight, states, strict=True))
        o = torch.tanh(p["combined_output_projection.weight"] @ torch.cat((a, s)))
        outputs.append(o)
        attention.append(weight)
    return torch.stack(outputs), torch.stack(attention)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def gradients(seq2seq, outputs):
    seq2seq.zero_grad()
    logits = outputs @ seq2seq.output_weight.T
    logits.sin().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in seq2seq.named_parameters()}


@variants
def test_features_and_gradients_are_those_of_the_formulas(variant):
    seq2seq = model(**variant)
    sources, targets = sentences([4, 1, 6, 3], SOURCE), sentences([2, 5, 1, 5], TARGET)
    (source, source_packing), (target_in, target_packing) = pack(sources), pack(targets)
    found = seq2seq.features(source, target_in, source_packing, target_packing)
    expected = torch.cat([by_hand(seq2seq, s, t)[0] for s, t in zip(sources, targets, strict=True)])
    close(found, expected)
    mine, theirs = gradients(seq2seq, found), gradients(seq2seq, expected)
    for name, gradient in theirs.items():
        close(mine[name], gradient, 1e-9)
        assert gradient.abs().max() > 0, name


@variants
def test_decode_is_step_in_a_loop_and_both_are_the_formulas(variant):
    seq2seq = model(**variant)
    sources, targets = sentences([4, 1, 6], SOURCE), sentences([5, 5, 5], TARGET)
    states, init = seq2seq.encode(pad(sources).T, [4, 1, 6])
    masks = seq2seq.generate_sent_masks(states, [4, 1, 6])
    target = pad(targets).T
    outputs = seq2seq.decode(states, masks.float(), init, target)
    assert outputs.shape == (4, 3, HIDDEN)
    O_t, state, keys = torch.zeros(3, HIDDEN, dtype=torch.float64), init, seq2seq.project(states)
    assert keys.shape == (3, 6, HIDDEN)
    for t in range(4):
        Y_t = seq2seq.model_embeddings.target(target[t])
        Ybar_t = torch.cat((Y_t, O_t), 1) if seq2seq.config.input_feeding else Y_t
        state, O_t, e_t = seq2seq.step(Ybar_t, state, states, keys, masks.float())
        close(O_t, outputs[t])
        assert e_t.shape == (3, 6) and torch.equal(e_t == -torch.inf, masks)
        for b in range(3):
            by, attention = by_hand(seq2seq, sources[b], targets[b][: t + 1])
            close(O_t[b], by[-1])
            close(e_t[b].softmax(0)[: len(sources[b])], attention[-1])


def test_without_masks_all_states_are_seen():
    seq2seq = model()
    sources, targets = sentences([4, 4], SOURCE), sentences([3, 3], TARGET)
    states, init = seq2seq.encode(pad(sources).T, [4, 4])
    nothing = torch.zeros(2, 4)
    target = pad(targets).T
    expected = seq2seq.decode(states, nothing, init, target)
    assert torch.equal(seq2seq.decode(states, None, init, target), expected)
    step = [
        seq2seq.step(torch.ones(2, EMBED + HIDDEN).double(), init, states, states[..., :HIDDEN], masks)[1]
        for masks in (None, nothing)
    ]
    assert torch.equal(*step)


def test_encode_has_the_assignments_shapes_in_any_order_of_lengths():
    seq2seq = model()
    rows = sentences([2, 7, 1, 4], SOURCE)
    states, (hidden, cell) = seq2seq.encode(pad(rows).T, [2, 7, 1, 4])
    assert states.shape == (4, 7, 2 * HIDDEN) and hidden.shape == cell.shape == (4, HIDDEN)
    masks = seq2seq.generate_sent_masks(states, [2, 7, 1, 4])
    assert masks.tolist() == [[i >= length for i in range(7)] for length in (2, 7, 1, 4)]
    assert not states[masks].any()
    for b, row in enumerate(rows):
        for found, expected in zip(
            (states[b, : len(row)], hidden[b], cell[b]), encoded(dict(seq2seq.named_parameters()), row),
            strict=True,
        ):  # fmt: skip
            close(found, expected)


def test_padding_makes_no_difference():
    seq2seq = model()
    assert seq2seq.model_embeddings.source.weight[PAD].any()
    rows, lengths = sentences([3, 5], SOURCE), torch.tensor([3, 5])
    states, init = seq2seq.encode(pad(rows).T, lengths)
    for filler in (PAD, 7):
        again, init_again = seq2seq.encode(pad(rows, filler, 9).T, lengths)
        close(again, nn.functional.pad(states, (0, 0, 0, 4)))
        close(torch.stack(init_again), torch.stack(init))


def test_convolution_is_that_of_the_module():
    seq2seq = model()
    tokens = sentences([6], SOURCE)[0]
    with warnings.catch_warnings():
        # torch warns of the copy that an even kernel takes
        warnings.simplefilter("ignore")
        x = seq2seq.post_embed_cnn(seq2seq.model_embeddings.source(tokens).T[None])[0].T
    states, _ = seq2seq.encode(tokens[:, None], [6])
    close(states[0], seq2seq.encoder(x)[0])


def test_dot_attention_is_multiplicative_with_the_sum_of_both_directions():
    dot, multiplicative = model(attention="dot"), model()
    state = {"att_projection.weight": torch.eye(HIDDEN).repeat(1, 2), **dot.state_dict()}
    multiplicative.load_state_dict(state)
    rows, targets = pack(sentences([4, 2], SOURCE)), pack(sentences([3, 4], TARGET))
    arguments = rows[0], targets[0], rows[1], targets[1]
    close(dot.features(*arguments), multiplicative.features(*arguments))


@variants
@pytest.mark.parametrize(("of_source", "of_target"), [([0, 3], [4, 0]), ([1, 0], [0, 1]), ([6], [6])])
def test_sequences_that_fill_up_make_no_difference(variant, of_source, of_target):
    seq2seq = model(**variant)
    sources, targets = sentences([4, 2], SOURCE), sentences([2, 3], TARGET)
    (source, source_packing), (target_in, target_packing) = pack(sources), pack(targets)
    expected = seq2seq.features(source, target_in, source_packing, target_packing)
    pad_id = seq2seq.config.pad_id
    source, source_packing = pack([*sources, *(torch.full((n,), pad_id) for n in of_source)])
    target_in, target_packing = pack([*targets, *(torch.full((n,), pad_id) for n in of_target)])
    found = seq2seq.features(source, target_in, source_packing, target_packing)
    assert found.shape == (5 + sum(of_target), HIDDEN) and bool(found.isfinite().all())
    close(found[:5], expected)
    mine, theirs = gradients(seq2seq, found[:5]), gradients(seq2seq, expected)
    for name, gradient in theirs.items():
        close(mine[name], gradient)


@torch.no_grad()
@variants
def test_hypotheses_step_by_step(variant):
    """Different hypotheses of each sentence; some go on from others, and sentences leave."""
    seq2seq = model(**variant)
    sources = sentences([3, 5, 1], SOURCE)
    state = seq2seq.begin(pad(sources), lengths_of(sources), 3)
    prefixes = [[[] for _ in range(3)] for _ in sources]
    generator = torch.Generator().manual_seed(5)
    moves = [
        None,
        ("reorder", [[0, 2, 1], [1, 1, 0], [2, 2, 2]]),
        ("keep", [2, 0]),
        None,
        ("keep", [1]),
        None,
    ]
    for move in moves:
        if move is not None and move[0] == "reorder":
            state.reorder(torch.tensor(move[1]))
            prefixes = [[list(row[k]) for k in ks] for row, ks in zip(prefixes, move[1], strict=True)]
        elif move is not None:
            state.keep(torch.tensor(move[1]))
            prefixes, sources = [prefixes[b] for b in move[1]], [sources[b] for b in move[1]]
        tokens = torch.randint(TARGET, (len(sources), 3), generator=generator)
        logits = seq2seq.advance(tokens, state)
        assert logits.shape == (len(sources), 3, TARGET)
        # one copy of the encoder states for all hypotheses
        assert state.memory.hiddens.shape[0] == len(sources)
        for b, row in enumerate(prefixes):
            for k, prefix in enumerate(row):
                prefix.append(int(tokens[b, k]))
                outputs, _ = by_hand(seq2seq, sources[b], prefix)
                close(logits[b, k], seq2seq.output_weight @ outputs[-1])


@torch.no_grad()
def test_reorder_may_change_the_number_of_hypotheses():
    seq2seq = model()
    sources = sentences([3, 4], SOURCE)
    state = seq2seq.begin(pad(sources), lengths_of(sources), 1)
    seq2seq.advance(torch.full((2, 1), BOS), state)
    state.reorder(torch.zeros(2, 2, dtype=torch.int64))
    logits = seq2seq.advance(torch.tensor([[4, 5], [6, 4]]), state)
    outputs, _ = by_hand(seq2seq, sources[1], [BOS, 6])
    close(logits[1, 0], seq2seq.output_weight @ outputs[-1])


@torch.no_grad()
@variants
def test_soft_alignment(variant):
    seq2seq = model(**variant)
    sources, targets = sentences([4, 1, 6], SOURCE), sentences([2, 5, 3], TARGET)
    found = seq2seq.soft_alignment(pad(sources), lengths_of(sources), pad(targets), lengths_of(targets))
    assert found.shape == (3, 5, 6) and found.dtype == torch.float32
    for b, (source, target) in enumerate(zip(sources, targets, strict=True)):
        expected = torch.zeros(5, 6)
        expected[: len(target), : len(source)] = by_hand(seq2seq, source, target)[1]
        close(found[b], expected, 1e-6)
        assert torch.equal(found[b] == 0, expected == 0)


def test_decoding_keeps_no_graph():
    seq2seq = model(torch.float32)
    source, lengths = torch.tensor([[4, 5, EOS]]), torch.tensor([3])
    state = seq2seq.begin(source, lengths, 2)
    logits = seq2seq.advance(torch.full((1, 2), BOS), state)
    alignment = seq2seq.soft_alignment(source, lengths, torch.tensor([[BOS, 4]]), torch.tensor([2]))
    assert logits.dtype == torch.float32
    kept = (*state.memory, state.hidden, state.cell, state.output, logits, alignment)
    assert not any(x.requires_grad for x in kept)


class TheirModules(nn.Module):
    """The modules of the assignment, by its names."""

    def __init__(self):
        super().__init__()
        e, h = EMBED, HIDDEN
        self.model_embeddings = nn.Module()
        self.model_embeddings.source = nn.Embedding(SOURCE, e, padding_idx=PAD)
        self.model_embeddings.target = nn.Embedding(TARGET, e, padding_idx=PAD)
        self.post_embed_cnn = nn.Conv1d(e, e, kernel_size=2, padding="same")
        self.encoder = nn.LSTM(e, h, bias=True, bidirectional=True)
        self.decoder = nn.LSTMCell(e + h, h, bias=True)
        self.h_projection = nn.Linear(2 * h, h, bias=False)
        self.c_projection = nn.Linear(2 * h, h, bias=False)
        self.att_projection = nn.Linear(2 * h, h, bias=False)
        self.combined_output_projection = nn.Linear(3 * h, h, bias=False)
        self.target_vocab_projection = nn.Linear(h, TARGET, bias=False)
        self.dropout = nn.Dropout(0.2)


def test_state_dict_of_the_assignment_loads_as_it_is():
    theirs = TheirModules().state_dict()
    seq2seq = Seq2Seq(config())
    seq2seq.load_state_dict(theirs, strict=True)
    assert seq2seq.state_dict().keys() == theirs.keys()
    assert torch.equal(seq2seq.output_weight, theirs["target_vocab_projection.weight"])


def test_weights_of_the_other_order_are_rolled():
    weight = torch.randn(HIDDEN, 3 * HIDDEN)
    a, s = torch.randn(2 * HIDDEN), torch.randn(HIDDEN)
    expected = weight @ torch.cat((s, a))
    torch.testing.assert_close(weight.roll(2 * HIDDEN, 1) @ torch.cat((a, s)), expected)


@pytest.mark.parametrize("variant", [{}, {"attention": "additive"}, {"tied": True}, {"pad_id": 4}], ids=str)
def test_initial_weights(variant):
    torch.manual_seed(3)
    seq2seq = Seq2Seq(config(**{"embed_size": 32, "hidden_size": 32, **variant}))
    for name, parameter in seq2seq.named_parameters():
        assert 0.06 < parameter.abs().max() <= 0.1, name
        if parameter.numel() > 500:
            assert abs(float(parameter.detach().std()) - 0.1 / math.sqrt(3)) < 0.004, name
    pad_id = seq2seq.config.pad_id
    for embedding in seq2seq.model_embeddings.values():
        assert embedding.weight.detach().any(1).logical_not().nonzero().tolist() == [[pad_id]]


@pytest.mark.parametrize("pad_id", [0, 3])
def test_embedding_of_padding_learns_nothing(pad_id):
    seq2seq = model(pad_id=pad_id, bos_id=1, eos_id=2)
    tokens, packing = pack([torch.tensor([5, pad_id, 4])])
    seq2seq.features(tokens, tokens, packing, packing).sum().backward()
    for embedding in seq2seq.model_embeddings.values():
        assert embedding.weight.grad.any(1).nonzero()[:, 0].tolist() == [4, 5]


def test_tied_model_has_one_matrix_for_both():
    seq2seq = Seq2Seq(config(tied=True, embed_size=HIDDEN))
    assert seq2seq.output_weight is seq2seq.model_embeddings.target.weight
    assert "target_vocab_projection.weight" not in seq2seq.state_dict()


@variants
def test_dropout_is_of_combined_outputs_which_are_fed_back(variant):
    seq2seq = model(**{**variant, "dropout": 0.5})
    sources, targets = sentences([4, 4], SOURCE), sentences([6, 6], TARGET)
    (source, source_packing), (target_in, target_packing) = pack(sources), pack(targets)
    arguments = source, target_in, source_packing, target_packing
    dropped = seq2seq.features(*arguments)
    assert not torch.equal(dropped, seq2seq.features(*arguments))
    # in both sentences: a step that reads what was dropped differs from the one that does not
    dropped = dropped.unflatten(0, (2, 6))
    assert 10 <= int((dropped == 0).sum()) <= 50
    quiet = model(**variant).features(*arguments).unflatten(0, (2, 6))
    kept = dropped[:, 0] != 0
    close(dropped[:, 0][kept], 2 * quiet[:, 0][kept])
    kept = dropped[:, 1] != 0
    fed = not torch.allclose(dropped[:, 1][kept], 2 * quiet[:, 1][kept])
    assert fed == seq2seq.config.input_feeding
    assert torch.equal(seq2seq.eval().features(*arguments), model(**variant).features(*arguments))


@pytest.mark.parametrize("attention", ["multiplicative", "dot", "additive"])
def test_bfloat16_autocast_has_float32_states(attention):
    seq2seq = model(torch.float32, 0.5, attention=attention)
    sources, targets = sentences([4, 1, 6], SOURCE), sentences([5, 3, 4], TARGET)
    (source, source_packing), (target_in, target_packing) = pack(sources), pack(targets)
    arguments = source, target_in, source_packing, target_packing

    def loss():
        features = seq2seq.features(*arguments)
        return linear_cross_entropy(features, seq2seq.output_weight, target_in)

    plain = loss()
    expected = torch.autograd.grad(plain, list(seq2seq.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss()
        state = seq2seq.begin(pad(sources), lengths_of(sources), 2)
        logits = seq2seq.advance(torch.full((3, 2), BOS), state)
        states, init = seq2seq.encode(pad(sources).T, [4, 1, 6])
        alignment = seq2seq.soft_alignment(
            pad(sources), lengths_of(sources), pad(targets), lengths_of(targets)
        )
    assert mixed.dtype == logits.dtype == alignment.dtype == torch.float32
    assert {x.dtype for x in (state.hidden, state.cell, states, *init)} == {torch.float32}
    torch.testing.assert_close(mixed, plain, rtol=0.01, atol=0)
    for name, found, wanted in zip(
        dict(seq2seq.named_parameters()), torch.autograd.grad(mixed, list(seq2seq.parameters())), expected,
        strict=True,
    ):  # fmt: skip
        assert found.dtype == torch.float32
        assert float((found - wanted).norm()) <= 0.05 * float(wanted.norm()), name


def test_learns_to_turn_sentences_around():
    torch.manual_seed(4)
    V, B = 9, 64
    seq2seq = Seq2Seq(config(source_vocab=V, target_vocab=V, embed_size=32, hidden_size=32))
    optimizer = torch.optim.Adam(seq2seq.parameters(), lr=0.02)
    packing = Packing.of_lengths(torch.full((B,), 3))

    def batch():
        words = torch.randint(3, V, (B, 2))
        turned = words.flip(1)
        sides = (words, (0, 1), EOS), (turned, (1, 0), BOS), (turned, (0, 1), EOS)
        return [nn.functional.pad(tokens, place, value=token) for tokens, place, token in sides]

    for _ in range(100):
        source, target_in, target_out = batch()
        features = seq2seq.features(source.flatten(), target_in.flatten(), packing, packing)
        loss = linear_cross_entropy(features, seq2seq.output_weight, target_out.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(seq2seq.parameters(), 5.0)
        optimizer.step()
    source, _, target_out = batch()
    state, tokens, found = seq2seq.begin(source, torch.full((B,), 3), 1), torch.full((B, 1), BOS), []
    for _ in range(3):
        tokens = seq2seq.advance(tokens, state).argmax(-1)
        found.append(tokens)
    assert float((torch.cat(found, 1) == target_out).all(1).float().mean()) >= 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@variants
def test_saved_and_read_again(tmp_path, variant, dtype):
    seq2seq = model(dtype, **variant)
    seq2seq.save_pretrained(tmp_path / "a")
    random_state = torch.get_rng_state()
    again = Seq2Seq.from_pretrained(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert again.config == seq2seq.config
    assert not any(module.training for module in again.modules())
    assert again.state_dict().keys() == seq2seq.state_dict().keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, seq2seq.state_dict()[name]) and parameter.dtype == dtype
        assert parameter.requires_grad
    source, packing = pack(sentences([3, 2], TARGET))
    arguments = source, source, packing, packing
    features = again.train().features(*arguments)
    assert torch.equal(features, seq2seq.features(*arguments))
    features.sum().backward()


def test_weights_of_another_place_are_saved(tmp_path):
    seq2seq = model()
    state = {name: torch.zeros_like(tensor) for name, tensor in seq2seq.state_dict().items()}
    seq2seq.save_pretrained(tmp_path, state_dict=state)
    assert not any(parameter.any() for parameter in Seq2Seq.from_pretrained(tmp_path).parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt"}, "model_type is 'gpt', expected 'seq2seq'"),
        ({"layers": 2}, r"config\.json: layers is not a field of Seq2SeqConfig; save the model again"),
        ({"hidden_size": None}, r"config\.json: hidden_size is missing; save the model again"),
        ({"hidden_size": 0}, r"config\.json: hidden_size=0 must be an integer >= 1"),
        ({"hidden_size": 6}, r"model\.safetensors: encoder\.weight_ih_l0 has shape \[20, 6\]"),
        ({"attention": "dot"}, r"model\.safetensors: att_projection\.weight is not part of the model"),
        ({"attention": "additive"}, r"model\.safetensors: att_query_projection\.weight is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message):
    model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        Seq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: value}, rf"^{name}={value!r} must be an integer >= 1$")
            for name in ("source_vocab", "target_vocab", "embed_size", "hidden_size")
            for value in (0, 1.5, None)
        ),
        ({"dropout": -0.1}, r"^dropout=-0\.1 must be a probability in \[0, 1\]; 0 turns dropout off$"),
        ({"dropout": 1.1}, "must be a probability"),
        ({"dropout": None}, "must be a probability"),
        ({"attention": "bilinear"}, "^attention='bilinear' must be one of multiplicative, dot, additive$"),
        ({"input_feeding": 1}, "^input_feeding=1 must be True or False$"),
        ({"tied": "no"}, "^tied='no' must be True or False$"),
        ({"tied": True}, "^tied=True needs one size, found embed_size=6 and hidden_size=5; make them equal"),
        ({"pad_id": 11}, r"^pad_id=11 must be a token, 0\.\.10$"),
        ({"pad_id": -1}, r"^pad_id=-1 must be a token, 0\.\.10$"),
        ({"eos_id": 8, "source_vocab": 8}, r"^eos_id=8 must be a token, 0\.\.7$"),
        ({"bos_id": 11}, r"^bos_id=11 must be a token, 0\.\.10$"),
        ({"bos_id": "a"}, r"^bos_id='a' must be a token"),
        ({"eos_id": 1}, "^pad_id=0, bos_id=1, eos_id=1 must be three tokens; give each its own$"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_extreme_configurations():
    assert config(dropout=1).dropout == 1 and config(dropout=0).dropout == 0
    # BOS is of the target language alone
    assert config(bos_id=9, source_vocab=4).bos_id == 9
    assert config(pad_id=10).pad_id == 10
    fields = config().to_dict()
    assert fields.pop("model_type") == "seq2seq"
    assert Seq2SeqConfig.from_dict(fields) == config() and fields == dataclasses.asdict(config())


def call(name, *changes):
    """Call a method with arguments that fit, but for those given by their places."""
    seq2seq = model()
    source, lengths = torch.full((2, 3), 4), torch.tensor([3, 2])
    packing = Packing.of_lengths(lengths)
    states, init = seq2seq.encode(source.T, lengths)
    arguments = {
        "encode": [source.T, [3, 2]],
        "decode": [states, None, init, source.T],
        "begin": [source, lengths, 2],
        "advance": [torch.full((2, 2), 4), seq2seq.begin(source, lengths, 2)],
        "soft_alignment": [source, lengths, source, lengths],
        "features": [torch.full((5,), 4), torch.full((5,), 4), packing, packing],
    }[name]
    for place, value in changes:
        arguments[place] = value
    return getattr(seq2seq, name)(*arguments)


@pytest.mark.parametrize("name", ["encode", "decode", "begin", "advance", "soft_alignment", "features"])
def test_calls_that_fit(name):
    call(name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("encode", (0, torch.ones(3)), r"^source_padded\.T has shape \[3\], expected \[B, tokens\]; pad the"),
        ("encode", (0, torch.full((3, 2), SOURCE)), r"^source_padded\.T\[0, 0\] is 13, outside .* 0\.\.12;"),
        (
            "encode",
            (1, [4, 2]),
            r"^source_padded\.T lengths=\[4, 2\] must be one number within 1\.\.3 for each",
        ),
        ("encode", (1, [3, 0]), r"must be one number within 1\.\.3 for each of 2 rows; count each row's"),
        ("encode", (1, [3, 2, 1]), "must be one number"),
        (
            "decode",
            (3, torch.ones(1, 2).long()),
            r"^target_padded has shape \[1, 2\], expected \[T, 2\] with T",
        ),
        ("decode", (3, torch.ones(3, 1).long()), r"^target_padded has shape \[3, 1\]"),
        ("decode", (3, torch.ones(3).long()), r"^target_padded has shape \[3\]"),
        ("decode", (3, torch.full((3, 2), TARGET)), r"^target_padded\[0, 0\] is 11, outside the vocabulary"),
        ("begin", (0, torch.full((3,), 4)), r"^source has shape \[3\], expected \[B, tokens\]"),
        ("begin", (0, torch.tensor([[4, 4, 4], [4, -1, 4]])), r"^source\[1, 1\] is -1, outside .* 0\.\.12"),
        ("begin", (1, torch.tensor([3])), r"^source lengths=\[3\] must be one number within 1\.\.3"),
        ("begin", (2, 0), "^beam=0 must be >= 1; 1 is greedy$"),
        ("advance", (0, torch.full((2, 3), 4)), r"^tokens has shape \[2, 3\], .*hypotheses \[2, 2\]; give a"),
        (
            "advance",
            (0, torch.full((2, 2), TARGET)),
            r"^tokens\[0, 0\] is 11, outside the vocabulary 0\.\.10",
        ),
        ("soft_alignment", (0, torch.full((2, 3), SOURCE)), r"^source\[0, 0\] is 13"),
        ("soft_alignment", (1, torch.tensor([3, 4])), r"^source lengths=\[3, 4\]"),
        ("soft_alignment", (2, torch.full((2, 3), TARGET)), r"^target_in\[0, 0\] is 11, outside .* 0\.\.10"),
        (
            "soft_alignment",
            (2, torch.full((3, 3), 4)),
            r"^target_in has shape \[3, 3\], expected \[2, tokens\]",
        ),
        ("soft_alignment", (3, torch.tensor([0, 3])), r"^target_in lengths=\[0, 3\]"),
        ("features", (0, torch.full((5,), SOURCE)), r"^source\[0\] is 13, outside the vocabulary 0\.\.12;"),
        (
            "features",
            (1, torch.full((5,), TARGET)),
            r"^target_in\[0\] is 11, outside the vocabulary 0\.\.10;",
        ),
        ("features", (0, torch.full((2, 3), 4)), r"^source has shape \[2, 3\], expected one row of packed"),
        ("features", (1, torch.full((2, 3), 4)), r"^target_in has shape \[2, 3\], expected one row"),
        (
            "features",
            (3, Packing.of_lengths(torch.tensor([3, 1, 1]))),
            "^target_packing has 3 sequences, source_packing 2; give one translation for each sentence$",
        ),
    ],
)
def test_calls_are_checked(name, change, message):
    with pytest.raises(ValueError, match=message):
        call(name, change)


def test_loss_of_a_packed_batch():
    seq2seq = model()
    (source, source_packing), (target_in, target_packing) = (
        pack(sentences([4, 2], SOURCE)),
        pack(sentences([3, 4], TARGET)),
    )
    arguments = source, target_in, source_packing, target_packing
    target_out = torch.randint(TARGET, (7,), generator=torch.Generator().manual_seed(3))
    target_out[2] = -100
    criterion = LabelSmoothedCrossEntropyWithAlignment(0.1)
    found = seq2seq(*arguments, criterion=criterion, target_out=target_out)
    logits = seq2seq.features(*arguments) @ seq2seq.output_weight.T
    assert found.sample_size == 6
    expected = nn.functional.cross_entropy(logits, target_out, reduction="sum")
    close(found.logged["nll"], expected.detach(), 1e-9)
    with pytest.raises(ValueError, match="no attention of an RNN is supervised; leave them out"):
        seq2seq(*arguments, criterion=criterion, target_out=target_out, pairs=torch.zeros(1, 3).long())
