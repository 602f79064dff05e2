"""The run that --resume names: its options are those of the command line, but for what is given."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeVar

from nlpfast.cli.options import UsageError, given, option_name

if TYPE_CHECKING:
    from nlpfast.train.checkpoint import Checkpoint

__all__ = ["resumed_options", "resumed_run"]

Settings = TypeVar("Settings")


def resumed_run(args: argparse.Namespace) -> Checkpoint:
    """Return the latest checkpoint of the run in `--resume`.

    Args:
        args: the parsed command line.

    Raises:
        UsageError: another folder is named, or the run is to be overwritten.
        CheckpointError: there is none, or it is damaged.
    """
    from nlpfast.train import checkpoint

    for option in ("output_dir", "overwrite"):
        if hasattr(args, option):
            raise UsageError(
                f"{option_name(option)} is given with --resume, which goes on in its folder: leave it out"
            )
    return checkpoint.load(checkpoint.find_latest(args.resume))


def resumed_options(kind: type[Settings], run: Checkpoint, args: argparse.Namespace) -> Settings:
    """Return the options of a run, but for those that are given.

    Args:
        kind: their dataclass.
        run: its checkpoint.
        args: the parsed command line.

    Raises:
        ConfigError: a value outside its bounds.
    """
    from nlpfast.train.resume import saved_options

    found = run.folder
    folder = found.parent if found.name.partition(".")[0] in ("best", "last") else found
    options: dict[str, Any] = run.metadata.get("options", {})
    own = {**options, "output_dir": str(folder), "overwrite": False}
    return saved_options(kind, own, given(kind, args))
