"""Real processes that get real signals."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

TRAINING = """
    import multiprocessing, signal
    from crevnet.data import MovingMNISTConfig, train_batches

    data = MovingMNISTConfig(image_size=12, digit_size=8, frames=3).build_train()
    batches = train_batches(data, 2, workers=2)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM):  # as a run does, to end after the step in progress
        signal.signal(number, signal.SIG_IGN)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    while (word := input()) == "more":
        for _ in range(9):  # more than were made ahead
            next(batches)
        print("got them", flush=True)
    if word == "drop":
        del batches
"""


def started(code):
    """A process in a group of its own that runs this."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def training():
    """A process in a group of its own that draws batches when asked, and the numbers of its two workers."""
    process = started(TRAINING)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    yield process, workers
    for number in (process.pid, *workers):
        if is_alive(number):
            os.kill(number, signal.SIGKILL)
    process.communicate()


def say(process, word):
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def is_alive(number):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{number}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_end(numbers, seconds=60):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["drop", "exit"])
def test_workers_outlive_signals_to_all_processes_and_end_with_the_iterator_or_the_program(end, training):
    process, workers = training
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.killpg(process.pid, number)
        say(process, "more")
        assert process.stdout.readline() == "got them\n"
    say(process, end)
    assert process.wait(timeout=300) == 0
    assert_end(workers)


def test_workers_that_are_still_starting_outlive_signals_to_all_processes():
    code = """
        import signal, time
        from crevnet.data import MovingMNISTConfig, loader

        def start_slowly(worker):
            time.sleep(1)
            outlive_interrupts(worker)

        outlive_interrupts, loader.outlive_interrupts = loader.outlive_interrupts, start_slowly
        data = MovingMNISTConfig(image_size=12, digit_size=8, frames=3).build_train()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {})
        batches = loader.train_batches(data, 2, workers=2)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, {}) == mask
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("ready", flush=True)
        input()
        next(batches), next(batches)  # one of each worker
    """
    with started(code) as process:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
        say(process, "go on")
        assert process.wait(timeout=300) == 0


def test_workers_end_when_the_process_that_trains_is_killed(training):
    process, workers = training
    process.kill()
    assert_end(workers)


def test_a_worker_that_was_still_starting_when_its_parent_was_killed_ends():
    code = """
        import multiprocessing, os, signal, time
        from crevnet.data import worker_signals

        def work():
            print(os.getpid(), flush=True)
            while os.getppid() == parent:
                time.sleep(0.01)
            worker_signals.outlive_interrupts(0)
            time.sleep(600)

        worker_signals.SECONDS, parent = 0.1, os.getpid()
        multiprocessing.get_context("fork").Process(target=work).start()
        time.sleep(0.5)
        os.kill(parent, signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            assert_end([worker])
        finally:
            if is_alive(worker):
                os.kill(worker, signal.SIGKILL)
