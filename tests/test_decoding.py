import math

import pytest
import torch

from nlpfast.decoding import generate, next_token_probabilities
from nlpfast.models.gpt import GPT, GPTConfig

V = 7


class Table(torch.nn.Module):
    """Logits of the next token from a table of the current one; remembers what it was given."""

    def __init__(self, block_size=4, logits=None):
        super().__init__()
        self.block_size = block_size
        self.logits = (
            torch.randn(V, V, generator=torch.Generator().manual_seed(1)) if logits is None else logits
        )
        self.drop = torch.nn.Dropout(0.5)
        self.seen = []

    def forward(self, idx):
        self.seen.append((idx.clone(), self.training, self.drop.training, torch.is_grad_enabled()))
        return self.logits[idx.long()], None


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_is_the_argmax_loop():
    model, expected = Table(), PROMPT
    for _ in range(9):
        expected = torch.cat([expected, model.logits[expected[:, -1]].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, PROMPT, 9, greedy=True), expected)
    assert torch.equal(generate(model, PROMPT, 9, top_k=1), expected)
    assert torch.equal(generate(model, PROMPT, 9, top_p=1e-9), expected)
    assert torch.equal(generate(model, PROMPT, 9, temperature=1e-30), expected)


def test_reads_at_most_a_block_of_what_it_wrote():
    model = Table(block_size=4)
    out = generate(model, PROMPT, 6, generator=seeded())
    assert out.shape == (2, 9) and torch.equal(out[:, :3], PROMPT)
    for step, (idx, *_) in enumerate(model.seen):
        assert torch.equal(idx, out[:, max(0, step - 1) : 3 + step])


def test_prompts_longer_than_a_block():
    long = torch.arange(10)[None] % V
    model = Table(block_size=3)
    out = generate(model, long, 2, greedy=True)
    assert torch.equal(out[:, :10], long)
    assert [idx.shape[1] for idx, *_ in model.seen] == [3, 3]
    assert torch.equal(out[:, 7:], generate(Table(block_size=3), long[:, -3:], 2, greedy=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_prompt_is_kept_and_not_written_to(dtype):
    prompt = PROMPT.to(dtype)
    before = prompt.clone()
    out = generate(Table(), prompt, 0)
    assert torch.equal(out, prompt) and out.dtype == dtype
    out.fill_(0)
    assert torch.equal(prompt, before)
    assert generate(Table(), prompt, 2).dtype == dtype


def test_the_mode_of_every_module_is_put_back():
    model = Table().train()
    model.drop.eval()
    generate(model, PROMPT, 2)
    assert model.training and not model.drop.training
    assert all(seen[1:] == (False, False, False) for seen in model.seen)
    assert torch.is_grad_enabled()


def test_the_mode_is_put_back_after_an_error():
    model = Table(logits=torch.full((V, V), math.nan)).train()
    with pytest.raises(ValueError, match="NaN logits for token 3"):
        generate(model, PROMPT, 2, greedy=True)
    assert model.training and model.drop.training


def test_a_function_is_a_model_too():
    def model(idx):
        return torch.nn.functional.one_hot((idx + 1) % V, V).float(), None

    model.block_size = 1
    assert generate(model, torch.tensor([[5]]), 3, greedy=True).tolist() == [[5, 6, 0, 1]]


def test_the_generator_decides_and_the_global_one_is_left_alone():
    state = torch.get_rng_state()
    first = generate(Table(), PROMPT, 20, generator=seeded(1))
    assert torch.equal(generate(Table(), PROMPT, 20, generator=seeded(1)), first)
    assert not torch.equal(generate(Table(), PROMPT, 20, generator=seeded(2)), first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    first = generate(Table(), PROMPT, 20)
    torch.manual_seed(3)
    assert torch.equal(generate(Table(), PROMPT, 20), first)


LOGITS = [math.log(p) for p in (0.05, 0.4, 0.1, 0.3, 0.15)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.0025, 0.16, 0.01, 0.09, 0.0225]),
        ({"temperature": 2.0}, [0.05**0.5, 0.4**0.5, 0.1**0.5, 0.3**0.5, 0.15**0.5]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 3}, [0, 0.4, 0, 0.3, 0.15]),
        ({"top_k": 9}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 0.4, 0, 0.3, 0]),
        ({"top_p": 0.69}, [0, 0.4, 0, 0.3, 0]),
        ({"top_p": 0.71}, [0, 0.4, 0, 0.3, 0.15]),
        ({"top_p": 0.949}, [0, 0.4, 0.1, 0.3, 0.15]),
        ({"top_p": 1.0}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        # 0.4 is 0.57 of what the two largest have, 0.7
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 0.4, 0, 0.3, 0]),
        # the temperature comes first: 0.16 of 0.285 is 0.561
        ({"temperature": 0.5, "top_p": 0.55}, [0, 1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distribution(options, expected, dtype):
    logits = torch.tensor([LOGITS, LOGITS[::-1]], dtype=dtype) + 100
    before = logits.clone()
    probs = next_token_probabilities(logits, **options)
    expected = torch.tensor([expected, expected[::-1]], dtype=dtype)
    expected /= expected.sum(-1, keepdim=True)
    assert probs.dtype == dtype
    assert (probs - expected).abs().max() < (1e-4 if dtype == torch.float32 else 1e-12)
    assert ((probs == 0) == (expected == 0)).all()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set(top_p):
    logits = 3 * torch.randn(200, 30, generator=seeded(5), dtype=torch.float64)
    full, kept = logits.softmax(-1), next_token_probabilities(logits, top_p=top_p) > 0
    mass = (full * kept).sum(-1)
    smallest = full.masked_fill(~kept, math.inf).amin(-1)
    assert (mass >= top_p).all()
    # without its least probable token the set does not reach the mass, and nothing more probable is left out
    assert (mass - smallest < top_p).all()
    assert (full.masked_fill(kept, 0.0).amax(-1) <= smallest).all()


def test_equal_logits_and_extreme_values():
    assert next_token_probabilities(torch.zeros(4), top_k=2).tolist() == [0.5, 0.5, 0, 0]
    assert next_token_probabilities(torch.tensor([1e4, -1e4, 9e3]), temperature=1e-3).tolist() == [1, 0, 0]
    assert next_token_probabilities(torch.tensor([3e38, -math.inf]), temperature=1e-30).tolist() == [1, 0]
    half = next_token_probabilities(torch.zeros(4, dtype=torch.bfloat16))
    assert half.dtype == torch.float32 and half.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 4}, {"top_p": 0.8}]
)
def test_samples_follow_the_distribution(options):
    rows, draws = torch.randn(1, V, generator=seeded(6), dtype=torch.float64), 40_000
    model = Table(logits=rows.expand(V, V))
    drawn = generate(model, torch.zeros(draws, 1, dtype=torch.int64), 1, generator=seeded(7), **options)[:, 1]
    probs = next_token_probabilities(rows[0], **options)
    counts = torch.bincount(drawn, minlength=V)
    assert (counts[probs == 0] == 0).all()
    expected = draws * probs[probs > 0]
    chi_square = ((counts[probs > 0] - expected).square() / expected).sum()
    # the 99.99 % quantile of chi square with 6 degrees of freedom
    assert chi_square < 27.9


@pytest.mark.parametrize(
    ("idx", "options", "message"),
    [
        (torch.tensor([1, 2]), {}, "idx is torch.int64 of shape [2], expected"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, "of shape [1, 0], expected"),
        (torch.zeros(0, 3, dtype=torch.int64), {}, "of shape [0, 3], expected"),
        (torch.zeros(1, 3), {}, "idx is torch.float32 of shape [1, 3], expected int64 or int32"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens=-1 must be >= 0"),
        (PROMPT, {"temperature": 0.0}, "temperature=0.0 must be finite and > 0; use greedy=True"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0 must be"),
        (PROMPT, {"temperature": math.nan}, "temperature=nan must be"),
        (PROMPT, {"temperature": math.inf}, "temperature=inf must be"),
        (PROMPT, {"top_k": 0}, "top_k=0 must be >= 1"),
        (PROMPT, {"top_p": 0.0}, "top_p=0.0 must be in (0, 1]"),
        (PROMPT, {"top_p": 1.1}, "top_p=1.1 must be in (0, 1]"),
        (PROMPT, {"top_p": math.nan}, "top_p=nan must be in (0, 1]"),
        (PROMPT, {"top_k": -2, "greedy": True}, "top_k=-2 must be >= 1"),
    ],
)
def test_wrong_arguments_are_refused(idx, options, message):
    model = Table()
    with pytest.raises(ValueError) as error:
        generate(model, idx, **{"max_new_tokens": 2, **options})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not model.seen


BLOCK, WORDS = 8, 19
VANILLA = {"perceiver": False}
CACHED = [VANILLA, {"bottleneck_dim": 1}, {"bottleneck_dim": 3}, {"bottleneck_dim": BLOCK}]
WITHOUT_CACHE = {"causal_align": "bottom_right"}
# the longest becomes longer than a block while others are within, with its first token, or was so before
UNEQUAL = [[2, 5, 3, 5], [1, BLOCK], [1, BLOCK + 2, 4]]


@torch.no_grad()
def gpt(**changes):
    """A model that does not say one word over and over."""
    sizes = {
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 16,
        "perceiver": True,
        "bottleneck_dim": 3,
        "residual": True,
    }
    torch.manual_seed(4)
    model = GPT(GPTConfig(WORDS, BLOCK, **{**sizes, **changes})).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.5)
    seen = []
    handle = model.ln_f.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.eval()(torch.randint(WORDS, (50, BLOCK)))
    handle.remove()
    # what all texts have in common would decide the words otherwise
    model.ln_f.bias -= seen[0].mean((0, 1))
    return model


def prompts(lengths, filling=-1):
    """Prompts filled up with what is no token at all."""
    idx = torch.randint(1, WORDS, (len(lengths), max(lengths)), generator=seeded(8))
    lengths = torch.tensor(lengths)
    return idx.masked_fill(torch.arange(idx.shape[1]) >= lengths[:, None], filling), lengths


@torch.no_grad()
def loop(model, prompt, count, prefix=False):
    """One prompt [T], and the tokens that the loop of the docstring appends to it."""
    text = prompt[None]
    for _ in range(count):
        window = text[:, -BLOCK:]
        start = text.shape[1] - window.shape[1]
        options = {"prefix_lengths": torch.tensor([max(0, len(prompt) - start)])} if prefix else {}
        text = torch.cat([text, model(window, **options)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return text[0]


@pytest.mark.parametrize("lengths", UNEQUAL, ids=str)
@pytest.mark.parametrize("options", [*CACHED, {"residual": False}, WITHOUT_CACHE], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_different_lengths_are_written_as_each_alone(lengths, options, use_cache):
    model, (idx, lengths), count = gpt(**options), prompts(lengths), BLOCK - 2
    out = generate(model, idx, count, lengths=lengths, greedy=True, use_cache=use_cache)
    assert out.shape == (len(idx), idx.shape[1] + count) and out.dtype == idx.dtype
    news = set()
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(out[row, : n + count], loop(model, idx[row, :n], count))
        assert not out[row, n + count :].any()
        alone = generate(model, idx[row : row + 1, :n], count, greedy=True, use_cache=use_cache)
        assert torch.equal(alone[0], out[row, : n + count])
        news |= set(out[row, n : n + count].tolist())
    assert len(news) > 3


@pytest.mark.parametrize("lengths", [*UNEQUAL, [4, 4]], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_seen_in_both_directions(lengths, use_cache):
    model, (idx, lengths), count = gpt(**VANILLA), prompts(lengths), BLOCK - 2
    options = {"lengths": lengths, "greedy": True, "use_cache": use_cache}
    out = generate(model, idx, count, prefix=True, **options)
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(out[row, : n + count], loop(model, idx[row, :n], count, prefix=True))
        assert not out[row, n + count :].any()
    assert not torch.equal(out, generate(model, idx, count, **options))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_bottleneck_reads_no_prompt_in_both_directions(use_cache):
    with pytest.raises(ValueError, match="prefix_lengths is given to a model with a bottleneck"):
        generate(gpt(), PROMPT, 2, prefix=True, use_cache=use_cache)


@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.7, "top_k": 9, "top_p": 0.95}], ids=str)
def test_samples_are_the_same_with_and_without_a_cache(options, sampling):
    model, (idx, lengths) = gpt(**options), prompts([2, 5, 1, 6])
    sampling = {"temperature": 3.0, "lengths": lengths, **sampling}
    with_cache, without, other = (
        generate(model, idx, BLOCK, generator=seeded(seed), use_cache=use_cache, **sampling)
        for seed, use_cache in ((1, True), (1, False), (2, True))
    )
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, other)


def read_shapes(model):
    shapes = []
    model.tok_emb.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


@pytest.mark.parametrize("options", CACHED, ids=str)
def test_each_token_is_read_once_up_to_a_block(options):
    model, (idx, lengths) = gpt(**options), prompts([2, 5, 3, 5])
    shapes = read_shapes(model)
    # the last token that is written is read by nobody
    generate(model, idx, BLOCK - 4, lengths=lengths, greedy=True)
    assert shapes == [(4, 5), (4,), (4,), (4,)]
    shapes.clear()
    generate(model, idx, BLOCK - 2, lengths=lengths, greedy=True)
    # beyond it whole windows, those of one length together
    assert shapes == [
        *((4, 5), (4,), (4,), (4,)),
        *((1, 6), (1, 7), (2, BLOCK)),
        *((1, 7), (3, BLOCK)),
    ]
    shapes.clear()
    generate(model, idx, 2, lengths=lengths, greedy=True, use_cache=False)
    assert shapes == [(1, 2), (1, 3), (2, 5), (1, 3), (1, 4), (2, 6)]


def test_columns_that_no_prompt_has_are_not_read():
    model, (idx, lengths) = gpt(), prompts([2, 3])
    shapes = read_shapes(model)
    wide = torch.cat([idx, torch.full((2, BLOCK), -1)], 1)
    out = generate(model, wide, 4, lengths=lengths, greedy=True)
    assert shapes == [(2, 3), (2,), (2,), (2,)]
    assert out.shape == (2, 3 + BLOCK + 4) and not out[:, 7:].any()
    assert torch.equal(out[:, :7], generate(model, idx, 4, lengths=lengths, greedy=True))


def test_a_model_without_a_cache_gets_windows_of_equal_length():
    model, idx = Table(block_size=4), torch.tensor([[1, 0, 0], [2, 3, 4], [5, 6, 0]])
    lengths = torch.tensor([1, 3, 2])
    out = generate(model, idx, 3, lengths=lengths, greedy=True)
    assert [list(seen[0].shape) for seen in model.seen] == [
        *([1, 1], [1, 2], [1, 3]),
        *([1, 2], [1, 3], [1, 4]),
        *([1, 3], [2, 4]),
    ]
    for row, n in enumerate(lengths.tolist()):
        alone = generate(Table(block_size=4), idx[row : row + 1, :n], 3, greedy=True)[0]
        assert torch.equal(out[row, : n + 3], alone) and not out[row, n + 3 :].any()
    # every window is the end of a row, and each row is read in each step
    for step in range(3):
        expected = {
            tuple(out[row, max(0, n + step - 4) : n + step].tolist()) for row, n in enumerate((1, 3, 2))
        }
        windows = model.seen[3 * step : 3 * step + 3]
        assert expected == {tuple(line) for seen in windows for line in seen[0].tolist()}


def test_no_new_tokens_leave_the_prompts_and_zeros():
    idx, lengths = prompts([2, 4])
    out = generate(gpt(), idx, 0, lengths=lengths)
    assert torch.equal(out, prompts([2, 4], filling=0)[0])
    assert idx[0, 2] == -1 and lengths.tolist() == [2, 4]


def test_a_cached_model_runs_in_evaluation_mode_and_without_gradients():
    model, (idx, lengths) = gpt(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5), prompts([2, 4])
    model.train().blocks[0].eval()
    out = generate(model, idx, BLOCK, lengths=lengths, greedy=True)
    assert model.training and model.up_block.training and not model.blocks[0].training
    assert torch.equal(out, generate(gpt(), idx, BLOCK, lengths=lengths, greedy=True))


@pytest.mark.parametrize("lengths", [[0, 3], [3, 4], [-1, 2], [3], [1, 2, 3], [[3, 3]]], ids=str)
@pytest.mark.parametrize("model", [gpt, Table])
def test_lengths_that_do_not_fit_are_refused(lengths, model):
    with pytest.raises(ValueError) as error:
        generate(model(), PROMPT, 2, lengths=torch.tensor(lengths))
    assert f"lengths={lengths} must be one number within 1..3 for each of 2 rows" in str(error.value)


def test_lengths_are_whole_numbers_of_any_kind():
    expected = generate(gpt(), PROMPT, 4, lengths=torch.tensor([3, 2]), greedy=True)
    found = generate(gpt(), PROMPT, 4, lengths=torch.tensor([3, 2], dtype=torch.int32), greedy=True)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"within 1..3 for each of 2 rows"):
        generate(gpt(), PROMPT, 2, lengths=torch.tensor([3.0, 2.0]))
