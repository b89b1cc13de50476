from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from optcpu.runtime.signals import StopRequest


@pytest.fixture(autouse=True)
def interrupts_are_raised() -> Iterator[None]:
    """As in a terminal; a shell has its background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_is_noted(name: str) -> None:
    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        assert stop.by is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.by == name
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_one_acts_as_ever() -> None:
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_left_alone() -> None:
    handlers = []

    def listen() -> None:
        with StopRequest().listening():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_a_signal_stops_the_run_around_this_one_too() -> None:
    outer, inner = StopRequest(), StopRequest()
    with outer.listening(), inner.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert (inner.by, outer.by) == ("SIGTERM", "SIGTERM")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_first_to_ask_is_the_one_that_is_named() -> None:
    stop = StopRequest()
    stop.ask("stop()")
    stop.ask("SIGTERM")
    assert stop.by == "stop()"


def test_waiting_for_one_outlives_the_news_of_a_dead_loading_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch raises it from a handler, in whatever the main thread does."""
    stop, sleeps = StopRequest(), 0

    def sleep(seconds: float) -> None:
        nonlocal sleeps
        sleeps += 1
        if sleeps == 3:
            stop.ask("SIGINT")
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(time, "sleep", sleep)
    assert stop.comes_soon()
    assert sleeps == 3


def test_for_how_long_it_was_wanted() -> None:
    stop = StopRequest()
    assert stop.seconds == 0
    stop.ask("SIGTERM")
    time.sleep(0.02)
    stop.ask("SIGINT")
    assert 0.01 < stop.seconds < 60
    assert stop.by == "SIGTERM"
