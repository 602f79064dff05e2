"""Options from dataclasses: a field is an option, its type checks the words, the class checks the values."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, get_type_hints

from nlpfast.train.config import ConfigError, kinds_of

Settings = TypeVar("Settings")


class UsageError(Exception):
    """Report a wrong command line; `main` prints it in one line and exits with 2."""


def option_name(field: str) -> str:
    """Return the option of a field: `max_steps` is `--max-steps`."""
    return "--" + field.replace("_", "-")


def add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    """Return the parser of a new action of a verb.

    Args:
        actions: of the verb.
        name: the word on the command line.
        text: its help, in lower case and without a full stop.
    """
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return parser


def add_options(
    parser: argparse.ArgumentParser,
    settings: type,
    title: str,
    *,
    underscores: bool = False,
    without: Sequence[str] = (),
) -> None:
    """Add an option for every field of a dataclass whose fields were declared with `option`.

    Args:
        parser: gets the options, in a group.
        settings: the dataclass.
        title: of the group in the help.
        underscores: options also have the names of the fields: `--max_steps`.
        without: fields that there is no option for.
    """
    group = parser.add_argument_group(title)
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.name in without:
            continue
        kinds = kinds_of(hints[field.name])
        # what is not given is left out, for `build` to know
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        text = field.metadata["help"]
        if kinds == [bool]:
            arguments["action"] = "store_true"
        else:
            arguments.update(type=kinds[0], choices=field.metadata["choices"])
            if not field.metadata["choices"]:
                arguments["metavar"] = field.metadata["metavar"] or {int: "N", float: "X"}.get(
                    kinds[0], "WORD"
                )
            if len(kinds) > 1:
                arguments["nargs"] = len(kinds)
            if field.default is not None:
                default: Any = field.default
                text += f" [{' '.join(map(str, default)) if len(kinds) > 1 else default}]"
        names = dict.fromkeys((option_name(field.name), *([f"--{field.name}"] if underscores else [])))
        group.add_argument(*names, help=text.replace("%", "%%"), **arguments)


def given(settings: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options that a command line gives, by field.

    Args:
        settings: the dataclass that was given to `add_options`.
        args: the parsed command line.
    """
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(settings)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if hasattr(args, name)
    }


def build(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """Return the settings that a parsed command line asks for.

    Args:
        settings: the dataclass that was given to `add_options`.
        args: the parsed command line.

    Raises:
        UsageError: a value is outside its bounds; names the option.
    """
    try:
        return settings(**given(settings, args))
    except ConfigError as error:
        raise as_usage_error(error) from error


def as_usage_error(error: ConfigError) -> UsageError:
    """Return the error with the option's name instead of the field's."""
    value = " ".join(map(str, error.value)) if isinstance(error.value, tuple) else error.value
    return UsageError(f"{option_name(error.argument)} {value}: {error.rule}")
