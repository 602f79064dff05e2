"""How a backend is chosen, refused, explained and logged."""

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from nlpfast import attention, dispatch
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
