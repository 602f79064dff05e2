"""A packed batch is the padded one whose padding does not count, and its padding is not computed."""

import pytest
import torch

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.nn.packing import Packing

V, T, M, C, H, LAYERS, IGNORED = 11, 12, 5, 16, 4, 3, -7

VANILLA = {"perceiver": False}
MODELS = [
    VANILLA,
    {"bottleneck_dim": 1},
    {"bottleneck_dim": M},
    {"bottleneck_dim": T},
    {"normalize_query": True},
    {"residual": True},
    {"bottleneck_dim": 1, "normalize_query": True, "residual": True},
]
LENGTHS = [[1, T, M, M - 1, M + 1], [T], [1, 1], [3, 3, 3], [T, 1]]
PRECISIONS = [(torch.float64, 0.3, 1e-11), (torch.float32, 0.05, 1e-5)]


def model(dtype=torch.float64, std=0.3, **changes):
    sizes = {"n_layer": LAYERS, "n_head": H, "n_embd": C, "perceiver": True, "bottleneck_dim": M}
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(V, T, **{**sizes, **no_dropout, "ignore_index": IGNORED, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0.0, std)
    return gpt


def batch(lengths):
    """Tokens and targets, filled up with tokens like any others, and where they are none of these."""
    generator = torch.Generator().manual_seed(2)
    idx, targets = (torch.randint(V, (len(lengths), max(lengths)), generator=generator) for _ in range(2))
    # some real targets do not count either
    targets[:, 2::4] = IGNORED
    return idx, targets, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def gradients(gpt, loss):
    parts = dict(gpt.named_parameters())
    return dict(zip(parts, torch.autograd.grad(loss, parts.values(), materialize_grads=True), strict=True))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize(("dtype", "std", "tolerance"), PRECISIONS)
def test_equals_the_padded_batch(lengths, options, dtype, std, tolerance):
    gpt = model(dtype, std, **options)
    idx, targets, real = batch(lengths)
    padded_logits, padded_loss = gpt(idx, targets.masked_fill(~real, IGNORED))
    expected = gradients(gpt, padded_loss)
    packing = Packing.of_lengths(torch.tensor(lengths))
    for return_logits in (True, False):
        logits, loss = gpt(idx[real], targets[real], packing=packing, return_logits=return_logits)
        torch.testing.assert_close(loss, padded_loss, rtol=0, atol=tolerance)
        for name, grad in gradients(gpt, loss).items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=tolerance, msg=name)
        if return_logits:
            assert logits.shape == (sum(lengths), V) and logits.dtype == dtype
            torch.testing.assert_close(logits, padded_logits[real], rtol=0, atol=tolerance)
        else:
            assert logits is None
    alone, nothing = gpt(idx[real].int(), packing=packing)
    assert nothing is None
    torch.testing.assert_close(alone, padded_logits[real], rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [VANILLA, {}, {"bottleneck_dim": T}], ids=str)
def test_every_parameter_is_trained(options):
    gpt = model(**options)
    idx, _, real = batch([4, 1, 8])
    packing, targets = Packing.of_lengths(torch.tensor([4, 1, 8])), idx[real].flip(0)
    found = gradients(gpt, gpt(idx[real], targets, packing=packing, return_logits=False)[1])
    for name, grad in found.items():
        # what is added to all keys alike leaves the softmax as it is
        assert name.endswith("attn.key.bias") or grad.abs().max() > 1e-6, name
    used = torch.zeros(V, dtype=torch.bool).index_fill(0, idx[real], True)
    assert torch.equal((found["tok_emb.weight"] != 0).any(1), used)
    assert (found["pos_emb"] != 0).any(2)[0].tolist() == [True] * 8 + [False] * (T - 8)
    if "down_block.C" in found:
        latents = min(gpt.config.bottleneck_dim, 8)
        trained = (found["down_block.C"] != 0).any(2)[0].tolist()
        # the first latent sees one token, whatever it asks
        assert trained == [0 < place < latents for place in range(gpt.config.bottleneck_dim)]


@pytest.mark.parametrize("options", [VANILLA, {}, {"bottleneck_dim": 1}], ids=str)
def test_padding_and_unseen_latents_are_not_computed(options):
    gpt, lengths = model(**options), [3, T, 1]
    m = gpt.config.bottleneck_dim if gpt.config.perceiver else T
    shapes = {}
    names = ["blocks.0.attn.key", "blocks.0.mlp.0", "head"]
    if gpt.config.perceiver:
        names += ["down_block.attn.key", "down_block.attn.query", "up_block.attn.key", "up_block.attn.query"]
    for name in names:
        gpt.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: shapes.update({name: list(inputs[0].shape)})
        )
    idx, _, real = batch(lengths)
    gpt(idx[real], packing=Packing.of_lengths(torch.tensor(lengths)))
    whole = {"head", "up_block.attn.query"}
    rows = {name: sum(lengths) if name in whole else sum(min(n, m) for n in lengths) for name in names}
    assert shapes == {name: [count, C] for name, count in rows.items()}


@pytest.mark.parametrize("options", [VANILLA, {}], ids=str)
def test_sequences_without_tokens_and_a_larger_longest_change_nothing(options):
    gpt = model(**options)
    idx, targets, real = batch([3, 5])
    tokens = idx[real], targets[real]
    expected = gpt(*tokens, packing=Packing.of_lengths(torch.tensor([3, 5])))
    for packing in (Packing.of_lengths(torch.tensor([0, 3, 0, 5, 0])), Packing(torch.tensor([0, 3, 8]), T)):
        for ours, theirs in zip(gpt(*tokens, packing=packing), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pdrop", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
@pytest.mark.parametrize("options", [VANILLA, {}], ids=str)
def test_dropout_acts_in_training_only(options, pdrop):
    gpt = model(**options, **{pdrop: 0.5})
    idx, _, real = batch([3, 7])
    packing = Packing.of_lengths(torch.tensor([3, 7]))
    torch.manual_seed(3)
    first, second = (gpt(idx[real], packing=packing)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(gpt(idx[real], packing=packing)[0], first)
    assert not torch.equal(first, second)
    plain = model(**options)(idx[real], packing=packing)[0]
    assert torch.equal(gpt.eval()(idx[real], packing=packing)[0], plain)


FIVE = torch.tensor([1, 2, 3, 4, 5])
PACKING = Packing.of_lengths(torch.tensor([2, 3]))
LONG = {"packing": Packing.of_lengths(torch.tensor([2, T + 1]))}


@pytest.mark.parametrize(
    ("idx", "options", "message"),
    [
        (FIVE, {}, "idx has shape [5], expected [B, T]"),
        (FIVE[None], {"packing": PACKING}, "idx has shape [1, 5], expected [N] with packing"),
        (torch.zeros(T + 3, dtype=torch.int64), LONG, f"idx has T={T + 1} tokens a row, block_size={T} is"),
        (FIVE, {"packing": PACKING, "targets": FIVE[:4]}, "targets has shape [4], idx [5]"),
        (FIVE, {"packing": PACKING, "targets": FIVE[None]}, "targets has shape [1, 5], idx [5]"),
        (
            FIVE.index_fill(0, torch.tensor([3]), V),
            {"packing": PACKING},
            "idx[3] is 11, outside the vocabulary 0..10",
        ),
        (-FIVE, {"packing": PACKING}, "idx[0] is -1, outside the vocabulary"),
    ],
)
@pytest.mark.parametrize("model_options", [VANILLA, {}], ids=str)
def test_what_does_not_fit_is_refused(idx, options, message, model_options):
    with pytest.raises(ValueError) as error:
        model(**model_options)(idx, **options)
    assert message in str(error.value)


def test_perceiver_ar_has_no_packed_batches():
    with pytest.raises(ValueError, match="packing is given to a model with causal_align='bottom_right'"):
        model(causal_align="bottom_right")(FIVE, packing=PACKING)


def test_a_packed_batch_has_no_prefixes():
    with pytest.raises(ValueError, match="prefix_lengths and packing cannot be given together"):
        model(**VANILLA)(FIVE, prefix_lengths=torch.tensor([1, 1]), packing=PACKING)
