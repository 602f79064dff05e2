"""Prompts read once, then a token at a time: the logits of the whole text at every step, for less work."""

import pytest
import torch

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.nn import causal_attention

V, T, M, C, H, LAYERS = 11, 12, 5, 16, 4, 4

VANILLA = {"perceiver": False}
BOTTLENECKS = [
    {"bottleneck_dim": 1},
    {"bottleneck_dim": M},
    {"bottleneck_dim": T},
    {"normalize_query": True},
    {"residual": True},
    {"n_layer": 2},
]
LENGTHS = [
    *([n] for n in range(1, T + 1)),
    # some have all of their latents and others do not
    [1, M - 1, M, M + 1, T - 1],
    [M - 1, M],
    [M + 1, 2],
    [1, T],
    [3, 3],
]


def model(dtype=torch.float64, std=0.3, **changes):
    sizes = {"n_layer": LAYERS, "n_head": H, "n_embd": C, "perceiver": True, "bottleneck_dim": M}
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(V, T, **{**sizes, **no_dropout, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0.0, std)
    return gpt


def texts(B):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


def prompts(whole, lengths, padding=1, columns=None):
    """The first tokens of each row, filled up with one token that may not make a difference."""
    columns = int(lengths.max()) if columns is None else columns
    return whole[:, :columns].masked_fill(torch.arange(columns) >= lengths[:, None], padding)


def assert_follows(gpt, whole, lengths, expected, tolerance, start):
    """From `start`, what prefill gave, every step has the logits of the text so far, up to the last token."""
    rows, (logits, cache) = torch.arange(len(whole)), start
    for step in range(T - int(lengths.max()) + 1):
        if step:
            logits = gpt.decode(whole[rows, lengths + step - 1], cache)
        assert logits.shape == (len(whole), V) and logits.dtype == expected.dtype
        torch.testing.assert_close(logits, expected[rows, lengths + step - 1], rtol=0, atol=tolerance)
        assert cache.lengths.tolist() == (lengths + step).tolist()
    assert cache.longest == T and cache.shortest == T - int(lengths.max() - lengths.min())


@torch.no_grad()
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", [VANILLA, *BOTTLENECKS], ids=str)
@pytest.mark.parametrize(
    ("dtype", "std", "tolerance"), [(torch.float64, 0.3, 1e-11), (torch.float32, 0.05, 1e-5)]
)
def test_equals_reading_the_whole_text(lengths, options, dtype, std, tolerance):
    gpt, whole, lengths = model(dtype, std, **options), texts(len(lengths)), torch.tensor(lengths)
    start = gpt.prefill(prompts(whole, lengths), lengths)
    assert_follows(gpt, whole, lengths, gpt(whole)[0], tolerance, start)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1, 3], [M - 1, M, M + 2], [2, T]], ids=str)
@pytest.mark.parametrize("options", [VANILLA, {}, {"bottleneck_dim": T}], ids=str)
def test_padding_that_all_prompts_have_makes_no_difference(lengths, options):
    gpt, whole, lengths = model(**options), texts(len(lengths)), torch.tensor(lengths)
    for padding, dtype in ((0, torch.int64), (7, torch.int32)):
        start = gpt.prefill(prompts(whole, lengths, padding, T).to(dtype), lengths)
        assert_follows(gpt, whole.to(dtype), lengths, gpt(whole)[0], 1e-11, start)


@torch.no_grad()
@pytest.mark.parametrize("prefixes", [[0, 0, 0], [1, 3, 0], [2, 4, 7]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "std", "tolerance"), [(torch.float64, 0.3, 1e-11), (torch.float32, 0.05, 1e-5)]
)
def test_prefixes_are_seen_from_everywhere_in_the_prompt_alone(prefixes, dtype, std, tolerance):
    """Within the prompts, and as long as these."""
    gpt, whole, lengths = model(dtype, std, **VANILLA), texts(3), torch.tensor([2, 4, 7])
    prefixes = torch.tensor(prefixes)
    start = gpt.prefill(prompts(whole, lengths), lengths, prefix_lengths=prefixes)
    assert_follows(gpt, whole, lengths, gpt(whole, prefix_lengths=prefixes)[0], tolerance, start)


@torch.no_grad()
def test_caches_of_one_model_know_nothing_of_each_other():
    gpt, whole = model(), texts(2)
    one, other = (gpt.prefill(whole[row : row + 1, :3], torch.tensor([3]))[1] for row in (0, 1))
    expected = gpt(whole)[0]
    for place in range(3, T):
        for row, cache in ((0, one), (1, other)):
            logits = gpt.decode(whole[row, place : place + 1], cache)
            torch.testing.assert_close(logits[0], expected[row, place], rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [VANILLA, {}], ids=str)
def test_callers_need_not_turn_gradients_off(options):
    gpt, whole, lengths = model(**options), texts(2), torch.tensor([2, M + 1])
    start = gpt.prefill(prompts(whole, lengths), lengths)
    assert_follows(gpt, whole, lengths, gpt(whole)[0].detach(), 1e-11, start)
    assert not start[0].requires_grad and not gpt.prefill(whole, lengths)[1].layers[0].seen()[0].requires_grad
    assert torch.is_grad_enabled()


@torch.no_grad()
@pytest.mark.parametrize("options", [VANILLA, {}], ids=str)
@pytest.mark.parametrize("lengths", [[T], [3, T], [2, T - 1]], ids=str)
def test_no_sequence_becomes_longer_than_a_block(options, lengths):
    gpt, whole, lengths = model(**options), texts(len(lengths)), torch.tensor(lengths)
    cache = gpt.prefill(prompts(whole, lengths), lengths)[1]
    for _ in range(T - int(lengths.max())):
        gpt.decode(whole[:, 0], cache)
    before = cache.lengths.tolist()
    with pytest.raises(ValueError, match="cache has 12 tokens, block_size=12: read the last of them again"):
        gpt.decode(whole[:, 0], cache)
    assert cache.lengths.tolist() == before


def test_perceiver_ar_has_no_cache():
    assert model().can_cache and model(**VANILLA).can_cache
    gpt = model(causal_align="bottom_right")
    assert not gpt.can_cache
    with pytest.raises(ValueError, match="causal_align='bottom_right' has no cache: every token moves all"):
        gpt.prefill(texts(1), torch.tensor([T]))


@pytest.mark.parametrize("options", [VANILLA, {}], ids=str)
def test_prompts_that_do_not_fit_are_refused(options):
    gpt = model(**options)
    with pytest.raises(ValueError, match="idx has T=13 tokens a row, block_size=12 is the most"):
        gpt.prefill(torch.zeros(1, T + 1, dtype=torch.int64), torch.tensor([T]))
    with pytest.raises(ValueError, match=r"idx has shape \[12\], expected \[B, T\]"):
        gpt.prefill(texts(1)[0], torch.tensor([T]))
    with pytest.raises(ValueError, match=r"idx\[0, 2\] is 11, outside the vocabulary"):
        gpt.prefill(torch.tensor([[1, 2, V]]), torch.tensor([3]))


def watched(gpt, monkeypatch):
    """What runs from now on: layers with their positions, attention with its queries and keys."""
    ran, looked = [], []
    for name, module in gpt.named_modules():
        if name in ("down_block", "up_block") or (name.startswith("blocks.") and name.count(".") == 1):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: ran.append((name, output.shape[1]))
            )
    attention = causal_attention.attention

    def counted(q, k, v, **options):
        looked.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(causal_attention, "attention", counted)
    return ran, looked


@torch.no_grad()
def test_a_step_computes_one_position_of_each_layer(monkeypatch):
    gpt, whole = model(**VANILLA), texts(2)
    cache = gpt.prefill(whole[:, :3], torch.tensor([3, 2]))[1]
    ran, looked = watched(gpt, monkeypatch)
    for place in range(3, T):
        ran.clear(), looked.clear()
        gpt.decode(whole[:, place], cache)
        assert ran == [(f"blocks.{n}", 1) for n in range(LAYERS)]
        assert looked == [(1, place + 1)] * LAYERS


@torch.no_grad()
def test_with_all_latents_a_step_is_one_query_of_as_many_keys(monkeypatch):
    """Blocks and the way down run until the shortest sequence has its m latents, and never again."""
    gpt, whole, lengths = model(), texts(2), torch.tensor([2, M + 1])
    cache = gpt.prefill(prompts(whole, lengths), lengths)[1]
    ran, looked = watched(gpt, monkeypatch)
    inner = [("down_block", 1), *((f"blocks.{n}", 1) for n in range(LAYERS - 2))]
    for step in range(T - M - 1):
        ran.clear(), looked.clear()
        gpt.decode(whole[:, step], cache)
        missing = 2 + step < M
        assert ran == [*(inner if missing else []), ("up_block", 1)]
        assert looked == [(1, M)] * (LAYERS if missing else 1)
    assert not missing


@torch.no_grad()
@pytest.mark.parametrize("length", [M, T - 1])
def test_prompts_with_all_latents_go_through_no_block_again(length, monkeypatch):
    gpt, whole = model(), texts(1)
    ran, looked = watched(gpt, monkeypatch)
    cache = gpt.prefill(whole[:, :length], torch.tensor([length]))[1]
    assert ran == [("down_block", M), *((f"blocks.{n}", M) for n in range(LAYERS - 2)), ("up_block", length)]
    ran.clear(), looked.clear()
    gpt.decode(whole[:, length], cache)
    assert (ran, looked) == ([("up_block", 1)], [(1, M)])


@pytest.mark.parametrize("options", [VANILLA, {}], ids=str)
@pytest.mark.parametrize("lengths", [[0, 3], [4, 3], [2], [1, 2, 3]], ids=str)
def test_lengths_that_are_not_of_the_prompts_are_refused(options, lengths):
    with pytest.raises(ValueError) as error:
        model(**options).prefill(texts(2)[:, :3], torch.tensor(lengths))
    assert f"lengths={lengths} must be one number within 1..3 for each of 2 rows" in str(error.value)


def test_a_prefix_is_part_of_its_prompt():
    lengths = torch.tensor([2, 3])
    with pytest.raises(ValueError, match=r"prefix_lengths=\[2, 4\] must lie within the prompts, .*\[2, 3\]"):
        model(**VANILLA).prefill(texts(2), lengths, prefix_lengths=torch.tensor([2, 4]))


@pytest.mark.parametrize("options", [VANILLA, {}], ids=str)
def test_there_is_one_known_token_for_each_sequence(options):
    gpt = model(**options)
    _, cache = gpt.prefill(texts(2)[:, :3], torch.tensor([2, 3]))
    for shape in ((2, 1), (1,), (3,), ()):
        with pytest.raises(ValueError, match="the cache has 2 sequences; give"):
            gpt.decode(torch.ones(shape, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=rf"idx\[1\] is {V}, outside the vocabulary"):
        gpt.decode(torch.tensor([0, V]), cache)
    assert cache.lengths.tolist() == [2, 3]
