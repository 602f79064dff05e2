"""Choose the backend of an op, and say why the others were not chosen.

The registry is a plain dictionary that each op's package fills when it is imported, so that a call can be
traced by ``torch.compile(fullgraph=True)``: nothing is imported at the time of a call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from nlpfast import native

# Which backends are tried for tensors of a device, best first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
}
# Devices without an entry of their own.
DEFAULT_PREFERENCE: tuple[str, ...] = ("reference",)

# registry[op][backend] is the backend's module, or one line that says why it is missing.
registry: dict[str, dict[str, ModuleType | str]] = {}

ENV_BACKEND: str | None = os.environ.get("NLPFAST_BACKEND") or None
ENV_LOG: str | None = os.environ.get("NLPFAST_LOG") or None

# By `use_backend`.
_used: str | None = None

logger = logging.getLogger("nlpfast")
_logged: set[tuple[Any, ...]] = set()


def start_logging(level: str) -> None:
    """Send messages of the logger ``nlpfast`` from ``level`` upwards to stderr.

    Args:
        level: debug, info, warning or error, in any case; NLPFAST_LOG sets it when nlpfast is imported.

    Raises:
        ValueError: if the level is none of these.
    """
    levels = ("debug", "info", "warning", "error")
    if level.lower() not in levels:
        raise ValueError(
            f"NLPFAST_LOG is {level!r}; it must be one of {', '.join(levels)}: correct or unset it"
        )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("nlpfast %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the calls of a block by one backend, unless they name another: a whole model, to compare.

    Example::

        with nlpfast.use_backend("reference"):
            logits = model(idx)  # each op by its definition in plain PyTorch

    It holds for all threads, and in nested blocks the innermost counts. A gradient is computed by the backend
    that served forward. As with `NLPFAST_BACKEND`, over which it has precedence, a call that the backend does
    not serve is an error.

    Args:
        name: of a backend that some op has.

    Raises:
        ValueError: no op has such a backend.
    """
    global _used
    known = sorted({known for backends in registry.values() for known in backends})
    if name not in known:
        raise ValueError(f"use_backend({name!r}): no op has such a backend, name one of {', '.join(known)}")
    before, _used = _used, name
    try:
        yield
    finally:
        _used = before


def triton_status() -> str:
    """Return "ok" where Triton kernels can run, or why they cannot; Triton itself is not imported here."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET") != "1":
        return "PyTorch was built without CUDA; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
    return "ok"


def cuda_status() -> str:
    """Return "ok" where the compiled CUDA kernels can run, or why they cannot."""
    if native.cuda_status() == "ok" and torch.version.cuda is None:
        return "PyTorch was built without CUDA: install one that is built with it"
    return native.cuda_status()


def choose(op: str, device_type: str, backend: str | None, request: tuple[Any, ...]) -> ModuleType:
    """Return the backend module that serves this call.

    Without a name, and without `use_backend` and NLPFAST_BACKEND, the first of the device's list whose
    ``refusal`` is None is taken. A backend that was asked for by name serves the call or the call fails:
    there is no silent fallback.

    Args:
        op: the op's name, such as "attention".
        device_type: ``tensor.device.type`` of the op's inputs.
        backend: a backend's name, or None to choose.
        request: the arguments of the backends' ``refusal`` functions.

    Raises:
        ValueError: if the op has no backend of that name.
        RuntimeError: if the named backend is missing or does not serve the call, or if none does.
    """
    backends = registry[op]
    named = ((backend, "backend"), (_used, "use_backend"), (ENV_BACKEND, "NLPFAST_BACKEND"))
    name, source = next(((name, source) for name, source in named if name is not None), (None, ""))
    refusals: dict[str, str] = {}
    if name is not None:
        reason = _refusal(backends, name, request)
        if reason is not None:
            raise _refused(op, name, source, reason, backends)
        chosen = name
    else:
        chosen, refusals = _first_willing(op, device_type, request)
    if ENV_LOG is not None and not torch.compiler.is_compiling():
        _log_choice(op, chosen, refusals, request)
    module = backends[chosen]
    assert not isinstance(module, str)
    return module


def explain() -> list[tuple[str, str, str]]:
    """Return one row ``(op, backend, status)`` for every backend of every op.

    The status is ``ok; `` and what the backend serves, or the reason why it is missing.
    """
    return [
        (op, name, module if isinstance(module, str) else f"ok; {module.SERVES}")
        for op, backends in registry.items()
        for name, module in backends.items()
    ]


def _first_willing(op: str, device_type: str, request: tuple[Any, ...]) -> tuple[str, dict[str, str]]:
    """Return the first backend of the device's list that serves the call, and why those before it do not."""
    backends = registry[op]
    refusals: dict[str, str] = {}
    for name in PREFERENCE.get(device_type, DEFAULT_PREFERENCE):
        # A backend that the op does not have is no news; one that is missing or refuses is.
        if name in backends:
            reason = _refusal(backends, name, request)
            if reason is None:
                return name, refusals
            refusals[name] = reason
    said = "; ".join(f"{name}: {reason}" for name, reason in refusals.items()) or "it has none"
    raise RuntimeError(
        f"no backend of {op} serves this call on device {device_type!r} ({said}): change the inputs"
    )


def _refusal(backends: dict[str, ModuleType | str], name: str, request: tuple[Any, ...]) -> str | None:
    """Return why the backend does not serve the call, or None."""
    if name not in backends:
        return "unknown"
    module = backends[name]
    return module if isinstance(module, str) else module.refusal(*request)


def _refused(
    op: str, name: str, source: str, reason: str, backends: dict[str, ModuleType | str]
) -> Exception:
    """Build the error for a backend that was asked for by name and does not serve the call."""
    asked, fix = {
        "backend": (f"backend={name!r}", "pass backend=None"),
        "use_backend": (f"use_backend({name!r})", "leave that block"),
        "NLPFAST_BACKEND": (f"NLPFAST_BACKEND={name}", "unset NLPFAST_BACKEND"),
    }[source]
    fix = f"{fix} to let nlpfast choose"
    if name not in backends:
        known = ", ".join(repr(known) for known in backends)
        return ValueError(f"{asked}: {op} has no such backend; it must be one of {known}: {fix}")
    return RuntimeError(f"{asked}: {op} cannot run there: {reason}: {fix}")


def _log_choice(op: str, chosen: str, refusals: dict[str, str], request: tuple[Any, ...]) -> None:
    """Log the choice once for every distinct combination of shapes, dtypes and devices."""
    shapes = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in request)
    entry = (op, chosen, shapes)
    if entry in _logged:
        return
    _logged.add(entry)
    inputs = " ".join(f"{list(s[0])}:{str(s[1])[6:]}:{s[2]}" for s in shapes if isinstance(s, tuple))
    others = "".join(f"; not {name}: {reason}" for name, reason in refusals.items())
    logger.debug("%s %s -> %s%s", op, inputs, chosen, others)


if ENV_LOG is not None:
    start_logging(ENV_LOG)
