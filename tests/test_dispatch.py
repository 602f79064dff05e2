"""How a backend is chosen, refused, explained and logged."""

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from nlpfast import attention, dispatch, native
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.testing import make_inputs


def backend_of(name: str, refusal: str | None) -> ModuleType:
    module = ModuleType(name)
    module.SERVES = f"what {name} serves"  # type: ignore[attr-defined]
    module.refusal = lambda *request: refusal  # type: ignore[attr-defined]
    return module


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op with a backend that refuses, one that is missing and one that serves."""
    backends = {
        "picky": backend_of("picky", "it is tired"),
        "gone": "not built",
        "solid": backend_of("solid", None),
    }
    monkeypatch.setitem(dispatch.registry, "toy", backends)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("gone", "picky", "absent", "solid"))
    monkeypatch.setattr(dispatch, "ENV_BACKEND", None)
    return "toy"


def test_first_of_the_list_that_serves(op: str) -> None:
    assert dispatch.choose(op, "cpu", None, ()).__name__ == "solid"


def test_a_device_without_a_list_gets_the_reference(op: str) -> None:
    dispatch.registry[op]["reference"] = backend_of("reference", None)
    assert dispatch.choose(op, "xpu", None, ()).__name__ == "reference"


def test_named(op: str) -> None:
    assert dispatch.choose(op, "cpu", "solid", ()).__name__ == "solid"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("picky", RuntimeError, "backend='picky': toy cannot run there: it is tired: pass backend=None"),
        ("gone", RuntimeError, "backend='gone': toy cannot run there: not built: pass backend=None"),
        ("absent", ValueError, "backend='absent': toy has no such backend; .*'picky', 'gone', 'solid'"),
        ("", ValueError, "backend=''"),
    ],
)
def test_a_named_backend_never_falls_back(op: str, name: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dispatch.choose(op, "cpu", name, ())


def test_environment_names_a_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ENV_BACKEND", "picky")
    with pytest.raises(RuntimeError, match=r"NLPFAST_BACKEND=picky: .* it is tired: unset NLPFAST_BACKEND"):
        dispatch.choose(op, "cpu", None, ())
    assert dispatch.choose(op, "cpu", "solid", ()).__name__ == "solid"


def test_nobody_serves(op: str) -> None:
    del dispatch.registry[op]["solid"]
    with pytest.raises(RuntimeError, match=r"no backend of toy serves .*gone: not built; picky: it is tired"):
        dispatch.choose(op, "cpu", None, ())


def test_explain_has_a_row_for_every_backend(op: str) -> None:
    rows = dispatch.explain()
    assert ("toy", "picky", "ok; what picky serves") in rows and ("toy", "gone", "not built") in rows
    attention_rows = {backend: status for name, backend, status in rows if name == "attention"}
    assert attention_rows["reference"].startswith("ok; ")
    assert all(status and "\n" not in status for status in attention_rows.values())


def test_log_says_once_what_was_chosen_and_why(op: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(dispatch, "ENV_LOG", "debug")
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.DEBUG, logger="nlpfast"):
        for shape in ((2, 3), (2, 3), (4, 5)):
            dispatch.choose(op, "cpu", None, (torch.zeros(shape), None))
    assert [record.getMessage() for record in caplog.records] == [
        "toy [2, 3]:float32:cpu -> solid; not gone: not built; not picky: it is tired",
        "toy [4, 5]:float32:cpu -> solid; not gone: not built; not picky: it is tired",
    ]


def test_every_device_ends_with_the_reference_and_every_backend_states_itself() -> None:
    for order in (*dispatch.PREFERENCE.values(), dispatch.DEFAULT_PREFERENCE):
        assert order[-1] == "reference"
    for backends in dispatch.registry.values():
        assert not isinstance(backends["reference"], str)


def test_what_no_kernel_serves_goes_to_the_reference() -> None:
    tensors = make_inputs(1, 2, 3, 4, 8, dtype=torch.float64)
    expected = attention(*tensors, backend="reference")
    assert torch.equal(attention(*tensors), expected)


@pytest.mark.parametrize(
    ("variables", "code", "wanted"),
    [
        ({"NLPFAST_LOG": "debug"}, 0, "nlpfast DEBUG: attention [1, 1, 1, 1]:float32:cpu"),
        ({"NLPFAST_LOG": "loud"}, 1, "NLPFAST_LOG is 'loud'"),
        ({"NLPFAST_BACKEND": "abacus"}, 1, "NLPFAST_BACKEND=abacus: attention has no such backend"),
        ({"NLPFAST_BACKEND": "reference", "NLPFAST_LOG": "DEBUG"}, 0, "-> reference"),
        ({"NLPFAST_BACKEND": "", "NLPFAST_LOG": ""}, 0, ""),
    ],
)
def test_environment(variables: dict[str, str], code: int, wanted: str) -> None:
    program = "import torch, nlpfast; x = torch.zeros(1, 1, 1, 1); nlpfast.attention(x, x, x)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLPFAST_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | variables, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert wanted in done.stderr and (wanted or not done.stderr)


def test_a_block_has_its_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ENV_BACKEND", "gone")
    dispatch.registry[op]["picky"] = backend_of("picky", None)
    with dispatch.use_backend("solid"):
        assert dispatch.choose(op, "cpu", None, ()).__name__ == "solid"
        # a name is nearer
        assert dispatch.choose(op, "cpu", "picky", ()).__name__ == "picky"
        with dispatch.use_backend("picky"):
            assert dispatch.choose(op, "cpu", None, ()).__name__ == "picky"
        assert dispatch.choose(op, "cpu", None, ()).__name__ == "solid"
    with pytest.raises(KeyError), dispatch.use_backend("solid"):
        raise KeyError
    with pytest.raises(RuntimeError, match="NLPFAST_BACKEND=gone"):
        dispatch.choose(op, "cpu", None, ())


def test_a_block_never_falls_back(op: str) -> None:
    with (
        dispatch.use_backend("picky"),
        pytest.raises(RuntimeError, match=r"use_backend\('picky'\): .* it is tired: leave that block to let"),
    ):
        dispatch.choose(op, "cpu", None, ())
    message = r"use_backend\('abacus'\): no op .* name one of .*, reference"
    with pytest.raises(ValueError, match=message), dispatch.use_backend("abacus"):
        pass


@pytest.mark.skipif(native.status() != "ok", reason="there are no kernels")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_by_its_definitions(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op of a block goes by the definition, forward and backward, with the same result."""
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
    model = GPT(GPTConfig(11, 8, n_layer=2, n_head=2, n_embd=16, **rates))
    x, found, chosen = torch.arange(8)[None], {}, set()
    log = dispatch._log_choice
    monkeypatch.setattr(dispatch, "ENV_LOG", "debug")
    monkeypatch.setattr(
        dispatch, "_log_choice", lambda op, name, *rest: chosen.add((op, name)) or log(op, name, *rest)
    )
    for name in ("cpu", "reference"):
        torch.manual_seed(0)
        model.zero_grad()
        with dispatch.use_backend(name):
            loss = model(x, x)[1]
        loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in model.parameters())]
    ops = {op for op, _ in chosen}
    assert {"attention", "add_layer_norm", "bias_gelu", "cross_entropy"} <= ops
    assert chosen == {(op, name) for op in ops for name in found}
    for ours, plain in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_compiled_code_follows_the_block() -> None:
    q, k, v = torch.randn(3, 1, 2, 33, 8)
    compiled = torch.compile(lambda: attention(q, k, v), fullgraph=True, backend="eager")
    with dispatch.use_backend("reference"):
        assert torch.equal(compiled(), attention(q, k, v, backend="reference"))
    assert torch.equal(compiled(), attention(q, k, v))
    if native.status() == "ok":
        assert not torch.equal(compiled(), attention(q, k, v, backend="reference"))
