"""Workers that outlive Ctrl-C and SIGTERM, which a run answers by finishing the step in progress and saving."""

import os
import signal
import threading


def outlive_interrupts(worker: int) -> None:
    """In a worker process: leave SIGINT and SIGTERM to the process that trains.

    A terminal, SLURM and systemd send them to all processes at once. A worker that obeyed would take away the next
    batch, and with it the step after which the run is saved. SIGTERM from the process that trains still ends the
    worker: that is how Python ends workers that are left at its exit, and it would wait for them forever.

    Args:
        worker: Number of the worker, which `DataLoader` gives.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere nothing tells who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
