"""The command line: `nlpfast VERB ...`, one module a verb.

Exit codes: 0 done, 2 wrong usage, 65 bad data, 130 interrupted, 143 terminated, 1 anything else. Errors are
one line on stderr; results go to stdout and everything else to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from nlpfast.cli.options import UsageError, as_usage_error
from nlpfast.cli.output import OutputError, finish_output, named_streams
from nlpfast.stop import INTERRUPTED, TERMINATED, StopSignals, Terminated
from nlpfast.train.config import ConfigError

# each is a module of this package with add_arguments(parser) and run(args) -> int; its docstring is the help
VERBS = (
    *("train", "generate", "birthplaces", "sentences", "translate"),
    *("vocab", "align", "score", "plot", "info", "bench"),
)

USAGE, DATA, OTHER = 2, 65, 1


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing a page, and takes no abbreviated options."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, *arguments: Any) -> tuple[Any, list[str]]:  # type: ignore[override]
        # here, and not in the parser of all verbs, whose help does not have the verb's options
        found, unknown = super().parse_known_args(*arguments)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def print_help(self, file: object = None) -> None:
        # argparse's own ignores a full disk
        print(self.format_help(), end="")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all verbs."""
    parser = _Parser(prog="nlpfast", description="Attention and loss kernels for NLP training with PyTorch.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    # main looks for the word itself, as an error may come before there is a parsed command line
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for name in VERBS:
        module = importlib.import_module(f"nlpfast.cli.{name}")
        text = (module.__doc__ or "").strip()
        verb = verbs.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("--debug", action="store_true", help="print the traceback of an error")
        module.add_arguments(verb)
    return parser


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        import nlpfast

        print(f"nlpfast {nlpfast.__version__}")
        return 0
    if args.verb is None:
        parser.error(f"name a verb: {', '.join(VERBS)}")
    try:
        code = importlib.import_module(f"nlpfast.cli.{args.verb}").run(args)
    except ConfigError as error:
        raise as_usage_error(error) from error
    return int(code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UsageError):
        return USAGE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Terminated):
        return TERMINATED
    # imports torch, which a usage error does not need
    from nlpfast.data.text import DataError

    return DATA if isinstance(error, DataError) else OTHER


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Terminated):
        return "terminated"
    text = " ".join(str(error).split())
    if isinstance(error, (UsageError, OutputError, OSError, ValueError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}; run again with --debug to see where"


def _report(error: BaseException, argv: Sequence[str]) -> int:
    """Print one line for an error, below its traceback if that is wanted, and return the exit code."""
    if "--debug" in argv:
        traceback.print_exception(error)
    finish_output()
    # torchrun sets it
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"nlpfast: error: {rank}{_message(error)}", file=sys.stderr)
    return _exit_code(error)


def _run_and_report(argv: Sequence[str]) -> int:
    try:
        try:
            code = _run(argv)
        except SystemExit as exit_:
            # argparse ends --help this way
            code = int(exit_.code or 0)
        # a full disk or a closed pipe shows here, not when the interpreter ends
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt, Terminated) as error:
        return _report(error, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    SIGINT, SIGTERM and SIGUSR1 unwind what runs; a second one ends the process.

    Args:
        argv: the words after `nlpfast`; those of the process when None.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with StopSignals(raise_at_once=True), named_streams():
            return _run_and_report(argv)
    except (KeyboardInterrupt, Terminated) as error:
        # a signal while an error was reported, or when all was done
        with named_streams():
            return _report(error, argv)
