"""What all verbs have in common: errors while they run, signals, and an output that nobody takes."""

import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_forked

import nlpfast
from nlpfast.cli import VERBS, bench, build_parser, main
from nlpfast.cli.output import OutputError
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.stop import Terminated
from nlpfast.train import checkpoint

DATA, OTHER, INTERRUPTED, TERMINATED = 65, 1, 130, 143
LM = ["train", "lm", "--device", "cpu"]
SIGNALS = [
    (signal.SIGINT, INTERRUPTED, "interrupted"),
    (signal.SIGTERM, TERMINATED, "terminated"),
    (signal.SIGUSR1, TERMINATED, "terminated"),
]

LINKS = "0-0 1-1\n0-0\n" * 1000

each_signal = pytest.mark.parametrize(("number", "code", "word"), SIGNALS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Be in a folder with a checkpoint, alignments and a text."""
    monkeypatch.chdir(tmp_path)
    Path("hyp").write_text(LINKS)
    Path("bad").write_text("0-0 1-\n")
    model = GPT(GPTConfig(3, 8, n_layer=1, n_head=1, n_embd=4))
    checkpoint.save("whole", model, None, {}, {}, metadata={"vocabulary": ["\n", "a", "b"]})
    # what PyTorch imports for it now, no forked process has to import
    GPT.from_pretrained("whole")
    return tmp_path


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_debug_shows_the_traceback_before_or_after_the_verb(folder, capsys):
    for argv in (["--debug", *LM, "--text", "missing.txt"], [*LM, "--debug", "--text", "missing.txt"]):
        assert main(argv) == DATA
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("nlpfast: error: missing.txt")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (Terminated(), TERMINATED, "terminated"),
        (OSError(28, "No space left on device", "x.safetensors"), OTHER, "x.safetensors"),
        (RuntimeError("two\nlines"), OTHER, "two lines"),
        (KeyError("weight"), OTHER, "KeyError: 'weight'; run again with --debug"),
        (OutputError("stdout: it is closed"), OTHER, "stdout: it is closed"),
    ],
)
def test_errors_while_running(error, code, message, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr("nlpfast.cli.generate.run", run)
    assert main(["generate", "x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nlpfast: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nlpfast {nlpfast.__version__}\n"
    for argv in ([], ["train"], ["train", "lm"], ["generate"]):
        assert main([*argv, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("usage: nlpfast")
        assert err == ""


def test_every_verb_has_a_line_of_help():
    text = build_parser().format_help()
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        module = sys.modules[f"nlpfast.cli.{verb}"]
        assert module.__doc__
        assert callable(module.run)


def test_the_process_ends_with_the_code(folder):
    run = subprocess.run(
        [sys.executable, "-m", "nlpfast", "generate", "missing"], capture_output=True, text=True, check=False
    )
    assert run.returncode == DATA
    assert run.stdout == ""
    assert run.stderr.startswith("nlpfast: error: ")
    assert run.stderr.count("\n") == 1


FULL = "nlpfast: error: stdout: cannot be written (No space left on device); send the results elsewhere\n"
GONE = "nlpfast: error: stdout: its reader closed it before the end; let it read all\n"


@pytest.mark.parametrize("message", [GONE, FULL])
def test_a_process_whose_output_nobody_takes(message):
    """In a process of its own, as the interpreter flushes once more when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    run = subprocess.run(
        [sys.executable, "-m", "nlpfast", "--version"],
        stdout=writer if message == GONE else full,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        # or nothing would be left to flush
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(writer)
    os.close(full)
    assert (run.returncode, run.stderr) == (OTHER, message)


def open_full():
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def given_stdout(folder, argv, opening):
    """Run a command line in a forked process of which `opening` makes the streams."""

    def run():
        sys.stdout, sys.stderr = opening()
        return main(argv)

    return run_forked(run, folder)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        [*LM, "--help"],
        ["info"],
        ["align", "score", "hyp", "--gold", "hyp"],
        ["align", "symmetrize", "hyp", "hyp"],
    ],
    ids=" ".join,
)
def test_no_output_of_any_verb_is_lost_silently(argv, folder):
    full = given_stdout(folder, argv, lambda: (open_full(), sys.stderr))
    assert full == (OTHER, "", FULL)
    code, out, err = given_stdout(folder, argv, lambda: (None, sys.stderr))
    assert (code, out, err) == (
        OTHER,
        "",
        "nlpfast: error: stdout: it is closed; send the results somewhere\n",
    )


def test_without_stderr_messages_do_not_go_among_the_results(folder):
    argv = ["align", "score", "bad", "--gold", "bad"]
    assert given_stdout(folder, argv, lambda: (sys.stdout, None)) == (DATA, "", "")


def test_an_error_after_lines_that_cannot_be_written_is_one_line(folder, monkeypatch):
    def run(args):
        print("a result")
        raise ValueError("wrong")

    monkeypatch.setattr("nlpfast.cli.info.run", run)
    full = given_stdout(folder, ["info"], lambda: (open_full(), sys.stderr))
    assert full == (OTHER, "", "nlpfast: error: wrong\n")


def test_main_leaves_the_streams_and_the_handlers_as_they_were(folder, capsys):
    numbers = [number for number, _, _ in SIGNALS]
    before = sys.stdout, sys.stderr, [signal.getsignal(number) for number in numbers]
    for argv in (["--version"], ["align", "score", "bad", "--gold", "bad"], ["fly"]):
        main(argv)
        assert (sys.stdout, sys.stderr, [signal.getsignal(number) for number in numbers]) == before


# what a verb calls in its midst, after a line of output where it writes any
MIDST = {
    "generate whole --max-new-tokens 5": ("nlpfast.models.gpt.GPT.decode", 3),
    "align score hyp --gold hyp": ("nlpfast.alignment.alignment_error_rate", 1),
    "align symmetrize hyp hyp": ("nlpfast.data.alignments.format_links", 1600),
    "align train hyp hyp": ("nlpfast.train.aligner.align_words", 1),
    "info": ("nlpfast.dispatch.explain", 1),
    "bench attention --output out.json": ("nlpfast.cli.bench.benchmark_module", 3),
    "bench --output out.json": ("os.fsync", 1),
    "bench modules --output out.json": ("os.replace", 1),
}


@pytest.fixture
def quick_bench(monkeypatch):
    """Let `bench` measure nothing, and have a results file to write."""
    measure, report = bench.benchmark_module("measure"), bench.benchmark_module("report")
    monkeypatch.setattr(measure, "run", lambda *arguments: {})
    monkeypatch.setattr(measure, "machine_facts", lambda device: {"machine": {}})
    monkeypatch.setattr(report, "section", lambda *arguments: "a table")


def signals_itself(monkeypatch, where, call, *numbers):
    """Let a call of a function, by its number, send the process signals, the second as the first unwinds."""
    really, calls = pkgutil.resolve_name(where), []

    def send(numbers):
        try:
            signal.raise_signal(numbers[0])
        finally:
            if numbers[1:]:
                send(numbers[1:])

    def stands_in(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            send(numbers)
        return really(*arguments, **options)

    monkeypatch.setattr(where, stands_in)


@each_signal
@pytest.mark.parametrize("command", MIDST)
def test_a_signal_in_the_midst(command, number, code, word, folder, quick_bench, monkeypatch, tmp_path):
    if command == "bench --output out.json":
        Path("out.json").write_text("old")
    before = tree(folder)
    signals_itself(monkeypatch, *MIDST[command], number)
    found, out, err = run_forked(lambda: main(command.split()), tmp_path)
    assert (found, err.splitlines()[-1:]) == (code, [f"nlpfast: error: {word}"])
    assert err.count("nlpfast: error") == 1 and "Traceback" not in err
    assert tree(folder) == before
    if command.startswith("align symmetrize"):
        assert LINKS.startswith(out) and out.count("\n") == 1599
    elif not command.startswith("bench"):
        assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("command", MIDST)
def test_without_a_signal_the_same_commands_end_well(command, folder, quick_bench, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "nlpfast.train.aligner.align_words",
        lambda *texts, **options: nlpfast.train.aligner.Alignment([{(0, 0)}], [], []),
    )
    found, out, _ = run_forked(lambda: main(command.split()), tmp_path)
    assert found == 0 and out
    assert "--output" not in command or Path("out.json").stat().st_size > 2


@each_signal
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_first_unwinds(second, number, code, word, folder, monkeypatch, tmp_path):
    signals_itself(monkeypatch, "nlpfast.models.gpt.GPT.decode", 2, number, second)
    assert run_forked(lambda: main(["generate", "whole"]), tmp_path) == (code, "", "")


def test_a_second_signal_while_the_first_is_reported(folder, monkeypatch, tmp_path):
    signals_itself(monkeypatch, "nlpfast.models.gpt.GPT.decode", 2, signal.SIGTERM)
    signals_itself(monkeypatch, "nlpfast.cli.finish_output", 1, signal.SIGINT)
    assert run_forked(lambda: main(["generate", "whole"]), tmp_path) == (TERMINATED, "", "")


@each_signal
def test_a_signal_while_an_error_is_reported(number, code, word, folder, monkeypatch, tmp_path):
    signals_itself(monkeypatch, "nlpfast.cli.finish_output", 1, number)
    run = run_forked(lambda: main(["align", "score", "bad", "--gold", "bad"]), tmp_path)
    assert run == (code, "", f"nlpfast: error: {word}\n")


@each_signal
def test_a_signal_that_is_ignored_stops_nothing(number, code, word, folder, monkeypatch, tmp_path):
    signals_itself(monkeypatch, "nlpfast.models.gpt.GPT.decode", 2, number)

    def run():
        signal.signal(number, signal.SIG_IGN)
        return main(["generate", "whole", "--max-new-tokens", "5"])

    found, out, err = run_forked(run, tmp_path)
    assert (found, err) == (0, "") and len(out) >= 6


def test_the_traceback_of_a_signal_only_with_debug(folder, monkeypatch, tmp_path):
    signals_itself(monkeypatch, "nlpfast.models.gpt.GPT.decode", 2, signal.SIGTERM)
    code, out, err = run_forked(lambda: main(["generate", "whole", "--debug"]), tmp_path)
    assert (code, out) == (TERMINATED, "")
    assert err.startswith("Traceback") and err.endswith("Terminated\nnlpfast: error: terminated\n")


def test_the_process_ends_with_the_code_of_a_signal(folder):
    """As the interpreter ends it: nothing more on stderr, and no death by the signal itself."""
    program = (
        "import signal, sys\n"
        "import nlpfast.decoding\n"
        "from nlpfast.cli import main\n"
        "nlpfast.decoding.generate = lambda *arguments, **options: signal.raise_signal(signal.SIGTERM)\n"
        "sys.exit(main(['generate', 'whole']))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (TERMINATED, "", "nlpfast: error: terminated\n")
