import os
import signal
import time

import pytest

from crevnet.interrupt import Interrupt

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def usual():
    """A usual behaviour that can be watched: the default one of SIGTERM would end the tests."""
    received = []
    before = {
        n: signal.signal(n, lambda number, frame: received.append(number)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python runs the handler between two instructions


@BOTH
def test_the_first_signal_only_sets_requested(number, usual):
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        send(number)
        assert interrupt.requested is number
    assert usual == []


@BOTH
def test_a_second_signal_acts_as_usual(number, usual):
    with Interrupt():
        send(number)
        send(number)
        assert usual == [number]


def test_another_signal_after_the_first_acts_as_usual_too(usual):
    with Interrupt() as interrupt:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert interrupt.requested is signal.SIGTERM
    assert usual == [signal.SIGINT]


def test_ctrl_c_twice_is_a_keyboard_interrupt():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@BOTH
def test_afterwards_signals_act_as_usual(number, usual):
    with Interrupt():
        pass
    send(number)
    assert usual == [number]


def test_an_error_inside_restores_too_and_is_passed_on():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interrupt():
        1 / 0  # noqa: B018
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
