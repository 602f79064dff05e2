"""Options of a run that is resumed: those that are not given are its own, and some cannot change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from nlpfast.train.config import ConfigError

Settings = TypeVar("Settings")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def changed_options(settings: Any, saved: Mapping[str, Any]) -> list[str]:
    """Return which options differ from those of the run, as `name: before -> now`.

    Args:
        settings: a dataclass whose fields were declared with `option`.
        saved: the values of the run; what is missing was an option that its version did not have.

    Raises:
        ConfigError: an option that is fixed differs.
    """
    changes = []
    for field in dataclasses.fields(settings):
        value, before = _plain(getattr(settings, field.name)), _plain(saved.get(field.name, field.default))
        if value == before:
            continue
        if field.metadata["fixed"]:
            raise ConfigError(
                field.name, value, f"a run that is resumed keeps its own, {before}; leave it out"
            )
        changes.append(f"{field.name}: {before} -> {value}")
    return changes


def saved_options(settings: type[Settings], saved: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Return a run's options, but for those that are given.

    Args:
        settings: a dataclass whose fields were declared with `option`.
        saved: the values of the run; others than those of the dataclass are left out.
        given: values by field.

    Raises:
        ConfigError: a value outside its bounds.
    """
    names = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return settings(**{name: value for name, value in {**own, **given}.items() if name in names})
