"""Signals that ask to stop: an exception at once or a mark, a second one that ends, and all as before."""

import os
import signal
import threading
from pathlib import Path

import pytest
from forked import run_forked

from nlpfast.stop import StopSignals, Terminated

SIGNALS = [
    (signal.SIGINT, KeyboardInterrupt, 130),
    (signal.SIGTERM, Terminated, 143),
    (signal.SIGUSR1, Terminated, 143),
]
NUMBERS = [number for number, _, _ in SIGNALS]

each_signal = pytest.mark.parametrize(("number", "error", "code"), SIGNALS)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.fixture(autouse=True)
def unchanged():
    """See that a test leaves the handlers as they were."""
    before = handlers()
    yield
    assert handlers() == before


@each_signal
def test_a_signal_raises_at_once(number, error, code):
    stop = StopSignals(raise_at_once=True)
    with pytest.raises(error), stop:
        assert (stop.received, stop.exit_code) == (None, 0)
        signal.raise_signal(number)
        pytest.fail("it went on")
    assert (stop.received, stop.exit_code) == (number, code)


@each_signal
def test_a_signal_is_a_mark_until_somebody_looks(number, error, code):
    with StopSignals(raise_at_once=False) as stop:
        stop.check()
        signal.raise_signal(number)
        assert (stop.received, stop.exit_code) == (number, code)
        with pytest.raises(error):
            stop.check()


def test_no_handler_of_exceptions_stops_it():
    assert not issubclass(Terminated, Exception)


@each_signal
@pytest.mark.parametrize("second", NUMBERS)
@pytest.mark.parametrize("raise_at_once", [True, False])
def test_a_second_signal_ends_the_process_with_the_code_of_the_first(
    raise_at_once, second, number, error, code, tmp_path: Path
):
    def twice():
        with StopSignals(raise_at_once=raise_at_once):
            try:
                signal.raise_signal(number)
            except BaseException as raised:
                os.write(1, type(raised).__name__.encode())
            os.write(1, b" first")
            signal.raise_signal(second)
            os.write(1, b" it went on")

    seen = error.__name__ if raise_at_once else ""
    assert run_forked(twice, tmp_path) == (code, f"{seen} first", "")


@each_signal
def test_the_inner_one_gets_the_signal_and_the_outer_one_knows(number, error, code):
    with pytest.raises(error), StopSignals(raise_at_once=True) as outer:
        with StopSignals(raise_at_once=False) as inner:
            signal.raise_signal(number)
            assert (inner.received, outer.received) == (number, None)
        assert outer.received == number
        outer.check()


def test_after_the_inner_one_a_second_signal_ends_the_process(tmp_path):
    def nested():
        with StopSignals(raise_at_once=True):
            with StopSignals(raise_at_once=False):
                signal.raise_signal(signal.SIGINT)
            os.write(1, b"saved")
            signal.raise_signal(signal.SIGTERM)
            os.write(1, b" it went on")

    assert run_forked(nested, tmp_path) == (130, "saved", "")


def test_an_inner_one_without_a_signal_leaves_the_outer_one_ready():
    with pytest.raises(Terminated), StopSignals(raise_at_once=True):
        with StopSignals(raise_at_once=False) as inner:
            pass
        assert inner.received is None
        signal.raise_signal(signal.SIGTERM)


def test_the_handlers_of_others_come_back():
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with StopSignals(raise_at_once=True):
            assert signal.getsignal(signal.SIGUSR1) is not mine
        assert signal.getsignal(signal.SIGUSR1) is mine
        with pytest.raises(ValueError), StopSignals(raise_at_once=True):
            raise ValueError
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals(raise_at_once=True) as stop:
            signal.raise_signal(number)
            assert stop.received is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_of_a_library_is_left_alone(monkeypatch):
    really = signal.getsignal
    monkeypatch.setattr(
        signal, "getsignal", lambda number: None if number == signal.SIGTERM else really(number)
    )
    with StopSignals(raise_at_once=True):
        assert really(signal.SIGTERM) == signal.SIG_DFL
        assert really(signal.SIGUSR1) != signal.SIG_DFL
    assert really(signal.SIGTERM) == signal.SIG_DFL


def test_outside_of_the_main_thread_nothing_is_caught():
    seen = []

    def work():
        with StopSignals(raise_at_once=True) as stop:
            seen.append((handlers(), stop.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(handlers(), None)]


def test_a_system_without_sigusr1(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    with pytest.raises(Terminated), StopSignals(raise_at_once=True):
        signal.raise_signal(signal.SIGTERM)
