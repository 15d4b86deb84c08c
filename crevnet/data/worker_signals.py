"""Workers that outlive Ctrl-C and SIGTERM, which a run answers by finishing the step in progress and saving."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import parent_process

SECONDS = 5.0
"""Between two looks for the process that trains."""


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """While worker processes start, which inherit it: SIGINT and SIGTERM wait for `outlive_interrupts`.

    In this process they wait for the end of the context.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_interrupts(worker: int) -> None:
    """In a worker process: leave SIGINT and SIGTERM to the process that trains, and end with it.

    A terminal, SLURM and systemd send them to all processes at once. A worker that obeyed would take away the next
    batch, and with it the step after which the run is saved. SIGTERM from the process that trains still ends the
    worker: that is how Python ends workers that are left at its exit, and it would wait for them forever. PyTorch ends
    workers whose parent has died, but not those whose parent died while they were starting.

    Args:
        worker: Number of the worker, which `DataLoader` gives.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # nothing tells who has sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with_the_parent() -> None:
    parent = parent_process()
    if parent is None:  # not in a worker
        return
    while True:
        told = signal.sigtimedwait({signal.SIGTERM}, SECONDS)
        if told is not None and told.si_pid == parent.pid:
            os._exit(0)
        # A fork server is the parent of its workers, whoever asked for them.
        served = multiprocessing.get_start_method() == "forkserver"
        if (not parent.is_alive()) if served else os.getppid() != parent.pid:
            os._exit(0)
