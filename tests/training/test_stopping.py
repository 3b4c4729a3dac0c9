"""Signals: the first marks a request, the second acts at once, and handlers are put back."""

import signal
import threading

import pytest

from voxdino.training.stopping import stop_on_signals


def send(number):
    signal.raise_signal(number)  # to this thread: os.kill may choose another one, which runs later


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number):
    with stop_on_signals() as request:
        assert not request
        send(number)
        assert request and request.signal_number == number


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """Programs in the background of a shell start with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as request:
        send(signal.SIGINT)
        assert request
        send(signal.SIGINT)


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_signals_are_left_alone():
    seen = []

    def work():
        with stop_on_signals() as request:
            seen.append(bool(request))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_which_signal_and_ends_with_its_exit_code(number, tmp_path):
    with stop_on_signals() as request:
        send(number)
    error = request.error("at step 3 of 9", where=tmp_path)
    assert error.exit_code == 128 + number
    assert f"stopped by signal {number:d} at step 3 of 9" in str(error) and "the same command goes on" in str(error)
