"""attn_implementation="nlpfast": small random models of Hugging Face against their own eager attention."""

import copy
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import nlpfast
from nlpfast import hf

transformers = pytest.importorskip("transformers", minversion="4.56")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

V, B, S, T = 50, 3, 11, 6
SMALL = {"vocab_size": V, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SEQ2SEQ = {
    **SMALL,
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0, "attention_dropout": 0.0},
}


def bert():
    config = transformers.BertConfig(
        **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return transformers.BertForMaskedLM(config)


def gpt2():
    config = transformers.GPT2Config(
        **SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, embd_pdrop=0.0, resid_pdrop=0.0
    )
    config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config)


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ))


def marian():
    return transformers.MarianMTModel(transformers.MarianConfig(**SEQ2SEQ))


def t5():
    config = transformers.T5Config(
        **{**SMALL, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
        **{"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, "dropout_rate": 0.0},
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def llama():
    """Grouped heads, rotary positions."""
    config = transformers.LlamaConfig(
        **SMALL,
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def mistral():
    """A sliding window."""
    config = transformers.MistralConfig(
        **SMALL,
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "sliding_window": 4},
    )
    return transformers.MistralForCausalLM(config)


def gpt_oss():
    """Attention sinks, a sliding window in every other layer."""
    config = transformers.GptOssConfig(
        **SMALL,
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "num_local_experts": 2},
        **{"num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    )
    return transformers.GptOssForCausalLM(config)


MODELS = {f.__name__: f for f in (bert, gpt2, bart, marian, t5, llama, mistral, gpt_oss)}
SEQ2SEQ_MODELS = ("bart", "marian", "t5")


@pytest.fixture(autouse=True)
def _registered():
    hf.register()


def model(name, implementation="eager"):
    torch.manual_seed(1)
    made = MODELS[name]()
    with torch.no_grad():
        for key, p in made.named_parameters():
            # positions and sinks that matter, attention that is not uniform
            p.mul_(3.0 if "relative_attention_bias" in key or "q" in key.rsplit(".", 2)[-2] else 1.0)
            if "sinks" in key:
                p.normal_()
    made.set_attn_implementation(implementation)
    return made


def batch(name, padded="right"):
    torch.manual_seed(2)
    ids = torch.randint(4, V, (B, S))
    mask = torch.ones(B, S, dtype=torch.int64)
    if padded != "none":
        mask[1, 7:] = mask[2, 4:] = 0
    if padded == "left":
        mask = mask.flip(1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in SEQ2SEQ_MODELS:
        targets = torch.randint(4, V, (B, T))
        labels, decoder_mask = targets.clone(), torch.ones(B, T, dtype=torch.int64)
        decoder_mask[1, 4:] = 0
        labels[1, 4:] = -100
        return {
            **inputs,
            "decoder_input_ids": targets,
            "decoder_attention_mask": decoder_mask,
            "labels": labels,
        }
    labels = ids.masked_fill(mask == 0, -100)
    # the first token is predicted from nothing, or from padding
    labels[torch.arange(B), mask.argmax(1)] = -100
    return {**inputs, "labels": labels}


def visible(inputs):
    return inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()


def run(which, inputs, training):
    """Return the loss, the logits of what is not padding and, in training, all gradients."""
    which.train(training)
    with torch.set_grad_enabled(training):
        out = which(**inputs)
    results = {"loss": out.loss, "logits": out.logits[visible(inputs)]}
    if training:
        used = {key: p for key, p in which.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out.loss, used.values(), allow_unused=True)
        results |= dict(zip(used, grads, strict=True))
    return results


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", ["none", "right", "left"])
def test_equals_eager(name, training, padded):
    inputs = batch(name, padded)
    expected = run(model(name), inputs, training)
    found = run(model(name, "nlpfast"), inputs, training)
    assert found.keys() == expected.keys()
    for key, other in expected.items():
        assert (found[key] is None) == (other is None), key
        if other is not None:
            assert torch.isfinite(other).all(), key
            assert (found[key] - other).abs().max() <= 1e-5 * max(1.0, other.abs().max()), key


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_inside_the_error_of_eager(name):
    inputs = batch(name)
    exact = run(model(name), inputs, False)["logits"].double()
    errors = {}
    for implementation in ("eager", "nlpfast"):
        logits = run(model(name, implementation).bfloat16(), inputs, False)["logits"]
        errors[implementation] = (logits.double() - exact).square().mean().sqrt()
    assert errors["eager"] > 0
    assert errors["nlpfast"] <= 1.1 * errors["eager"]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_generation(name, beams, padded):
    side = "right" if name in SEQ2SEQ_MODELS else "left"
    inputs = batch(name, side if padded else "none")
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 1}
    found, expected = (
        model(name, implementation)
        .eval()
        .generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        for implementation in ("nlpfast", "eager")
    )
    assert torch.equal(found, expected)


def test_a_static_cache_generates_the_same():
    inputs = batch("llama", "left")
    options = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    found, expected = (
        model("llama", implementation)
        .eval()
        .generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            cache_implementation=cache,
            **options,
        )
        for implementation, cache in (("nlpfast", "static"), ("eager", "dynamic"))
    )
    assert torch.equal(found, expected)


def test_packed_sequences_are_kept_apart():
    """position_ids that start again say where a sequence starts; cu_seq_lens say it a second time."""
    torch.manual_seed(2)
    ids, positions = torch.randint(4, V, (1, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    which = model("llama", "nlpfast").eval()
    with torch.no_grad():
        lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
        packed = which(
            ids, position_ids=positions, use_cache=False, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths
        ).logits
        apart = torch.cat([which(ids[:, :4]).logits, which(ids[:, 4:]).logits], 1)
        with pytest.raises(NotImplementedError, match="cu_seq_lens_q was passed"):
            which(ids, use_cache=False, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    assert (packed - apart).abs().max() < 1e-5


def test_dropout_in_training_only():
    which = model("bert", "nlpfast")
    for layer in which.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.3
    inputs = batch("bert")
    torch.manual_seed(3)
    a, b = (run(which, inputs, True)["logits"] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(run(which, inputs, True)["logits"], a)
    assert not torch.equal(a, b)
    assert (
        run(which, inputs, False)["logits"] - run(model("bert"), inputs, False)["logits"]
    ).abs().max() < 1e-5


def layer_call(**options):
    q = torch.randn(2, 3, 5, 8)
    return hf.attention_forward(torch.nn.Module(), q, q, q, None, is_causal=False, **options)[0]


@pytest.mark.parametrize(
    "name", ["softcap", "sinks", "head_mask", "output_attentions", "cache", "indices", "unheard_of"]
)
def test_what_changes_the_result_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=f'{name} was passed to attn_implementation="nlpfast"'):
        layer_call(**{name: torch.ones(3)})
    assert layer_call(**{name: None}).shape == (2, 5, 3, 8)


@pytest.mark.parametrize("from_module", [False, True])
def test_causal_is_for_several_queries_without_a_mask(from_module):
    torch.manual_seed(4)
    layer = torch.nn.Module()
    layer.is_causal = from_module
    options = {} if from_module else {"is_causal": True}
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    everything = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    full = ((q @ k.mT) / 8**0.5).softmax(-1) @ k
    triangle = ((q @ k.mT) / 8**0.5).masked_fill(~everything.tril(), -torch.inf).softmax(-1) @ k
    for query, mask, expected in (
        (q, None, triangle),
        (q, everything, full),
        (q[:, :, -1:], None, full[:, :, -1:]),
    ):
        found, _ = hf.attention_forward(layer, query, k, k, mask, **options)
        assert (found.transpose(1, 2) - expected).abs().max() < 1e-6


def test_a_sliding_window_needs_its_mask():
    assert layer_call(sliding_window=5).shape == (2, 5, 3, 8)
    with pytest.raises(NotImplementedError, match=r"sliding_window was passed .* without a mask"):
        layer_call(sliding_window=4)


def test_a_bias_is_added_to_whatever_mask_there_is():
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 5) < 0.6
    mask[..., 0] = True
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    square = torch.ones(5, 5, dtype=torch.bool).tril()
    for given, causal, meant in (
        (None, False, 0.0),
        (mask, False, added),
        (added, False, added),
        (None, True, None),
    ):
        if meant is None:
            meant = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~square, -torch.inf)
        expected = ((q @ k.mT) / 8**0.5 + bias + meant).softmax(-1) @ v
        found, _ = hf.attention_forward(
            torch.nn.Module(), q, k, v, given, is_causal=causal, position_bias=bias
        )
        assert (found.transpose(1, 2) - expected).abs().max() < 1e-12


def test_output_attentions_is_refused_where_the_layer_is_asked():
    with pytest.raises(NotImplementedError, match="output_attentions was passed"):
        model("bert", "nlpfast")(**batch("bert"), output_attentions=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ["sdpa", "eager"])
def test_accelerate_and_undo(name, first, capsys):
    if name == "gpt_oss" and first == "sdpa":
        pytest.skip("transformers has no sdpa for it")
    which, inputs = model(name, first), batch(name)
    expected = run(which, inputs, True)
    outer = torch.nn.ModuleDict({"inner": which})
    nlpfast.accelerate(outer)
    assert f"1 x {type(which).__name__}, {first} -> nlpfast (inner)" in capsys.readouterr().out
    assert which.config._attn_implementation == "nlpfast"
    assert (run(which, inputs, True)["loss"] - expected["loss"]).abs() < 1e-5
    nlpfast.accelerate(outer)
    assert capsys.readouterr().out == "nlpfast: nothing to switch\n"
    nlpfast.undo(outer)
    assert which.config._attn_implementation == first
    for key, x in run(which, inputs, True).items():
        assert x is expected[key] is None or torch.equal(x, expected[key]), key


def test_parts_with_implementations_of_their_own_get_them_back(capsys):
    which = model("t5", "eager")
    whole = torch.nn.ModuleDict({"a": which, "b": model("bert", "sdpa")})
    nlpfast.accelerate(whole)
    nlpfast.undo(copy.deepcopy(whole))
    assert {p.config._attn_implementation for p in which.modules() if hasattr(p, "config")} >= {"nlpfast"}
    nlpfast.undo(whole)
    assert which.config._attn_implementation == which.encoder.config._attn_implementation == "eager"
    assert whole["b"].config._attn_implementation == whole["b"].bert.config._attn_implementation == "sdpa"


def test_a_model_without_the_interface_is_left_alone(capsys):
    class Old(transformers.PreTrainedModel):
        config_class = transformers.BertConfig

        @classmethod
        def _can_set_attn_implementation(cls):
            return False

    which = Old(transformers.BertConfig())
    before = which.config._attn_implementation
    nlpfast.accelerate(which)
    assert "not switched: 1 x Old" in capsys.readouterr().out
    assert which.config._attn_implementation == before


@pytest.mark.parametrize("make", [bart, marian])
def test_alignments_of_a_layer(make):
    """As an eager model's attention weights say, of a padded batch; and with gradients."""
    torch.manual_seed(0)
    eager = make().eval()
    eager.set_attn_implementation("eager")
    ours = copy.deepcopy(eager)
    hf.register()
    ours.set_attn_implementation("nlpfast")
    source, target = torch.randint(3, V, (B, S)), torch.randint(3, V, (B, T))
    lengths = torch.tensor([S, S - 4, 1])
    mask = (torch.arange(S) < lengths[:, None]).long()
    batch = {"input_ids": source, "attention_mask": mask, "labels": target}
    weights = eager(**batch, output_attentions=True).cross_attentions[1]
    layer = ours.model.decoder.layers[1].encoder_attn
    with hf.recording(layer) as seen:
        ours(**batch)
    arguments = (seen.query, seen.key, seen.lse)
    found = nlpfast.hard_alignment(*arguments, source_lengths=lengths, scale=seen.scale)
    assert torch.equal(found, weights.mean(1).argmax(-1))
    pairs = torch.tensor([[0, 1, 10], [1, 5, 6], [2, 0, 0], [0, 1, 3]])
    expected = weights.mean(1)[pairs[:, 0], pairs[:, 1], pairs[:, 2]]
    torch.testing.assert_close(nlpfast.attention_at(*arguments, pairs, scale=seen.scale), expected)
    nlpfast.alignment_loss(*arguments, pairs, torch.ones(4), scale=seen.scale).backward()
    (-expected.log().sum()).backward()
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        # of the watched layer's values attention's gradient is 0, where eager has none
        mine, other = (torch.zeros_like(x) if x.grad is None else x.grad for x in (a, b))
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5), name
    # nothing is kept afterwards
    before = seen.query
    ours(**batch)
    assert seen.query is before
    with hf.recording(layer), pytest.raises(ValueError, match="being recorded"), hf.recording(layer):
        pass


def test_a_bias_cannot_be_recorded():
    model = t5().eval()
    hf.register()
    model.set_attn_implementation("nlpfast")
    layer = model.decoder.block[0].layer[0].SelfAttention
    tokens = torch.randint(3, V, (1, 5))
    with hf.recording(layer), pytest.raises(NotImplementedError, match="cannot be recorded"):
        model(input_ids=tokens, labels=tokens)


def test_importing_and_accelerating_leave_transformers_alone():
    program = """
import sys, torch, nlpfast
nlpfast.accelerate(torch.nn.MultiheadAttention(4, 2))
assert "transformers" not in sys.modules
from transformers import AttentionInterface, AttentionMaskInterface
assert "nlpfast" not in AttentionInterface() and "nlpfast" not in AttentionMaskInterface()
nlpfast.accelerate(torch.nn.MultiheadAttention(4, 2))
assert "nlpfast" not in AttentionInterface() and "nlpfast" not in AttentionMaskInterface()
nlpfast.hf.register()
assert "nlpfast" in AttentionInterface() and "nlpfast" in AttentionMaskInterface()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_old_or_missing_transformers_is_named(monkeypatch):
    for missing in (None, ModuleType("transformers")):
        monkeypatch.setitem(sys.modules, "transformers", missing)
        with pytest.raises(
            ImportError, match=r"needs transformers 4.56 or later: pip install 'nlpfast\[hf\]'"
        ):
            hf.register()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.slow
def test_compiled_without_a_break(name):
    inputs = batch(name)
    # the loss of transformers logs, which breaks the graph
    del inputs["labels"]
    which = model(name, "nlpfast").eval()
    with torch.no_grad():
        expected = which(**inputs).logits
        found = torch.compile(which, fullgraph=True, backend="aot_eager")(**inputs).logits
    assert (found - expected)[visible(inputs)].abs().max() < 1e-5
