"""Triton's interpreter without two things that take most of its time and change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["hasten"]


def hasten() -> None:
    """Make kernels in the interpreter several times as fast, with the same results.

    For every call of a function within a kernel the interpreter puts its own operations in the place of
    those of `triton.language`: here once a launch is enough. And it computes whether whole numbers overflow,
    to look at that in debug mode alone, which it is never in.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set[frozenset[int]]()

    def patch_once(function: Callable[..., Any]) -> Any:
        seen = frozenset(id(lang) for lang in (tl, tl.core) if _sees(function, lang))
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(function)

    def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
        # what the launch before has put in place, it has taken away
        patched.clear()
        launch(executor, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _sees(function: Callable[..., Any], lang: Any) -> bool:
    return any(value is lang for value in function.__globals__.values())
