import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

from crevnet.run_lock import sole_training

HOLDER = """
    import os, sys
    from pathlib import Path
    from crevnet.run_lock import sole_training

    with sole_training(Path(sys.argv[1])):
        if os.fork() == 0:  # a worker, which outlives the process that trains
            print("held", flush=True)
            sys.stdin.read()
            os._exit(0)
        os.wait()
"""


@contextmanager
def another_training(folder):
    """A process that trains in a folder, with a worker that only ends when all else has."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    with (
        another_training(tmp_path),
        pytest.raises(
            ValueError, match=rf"^another process trains in {tmp_path}: wait for it, or choose another run.folder$"
        ),
        sole_training(tmp_path),
    ):
        pass


def test_a_killed_training_gives_the_folder_back_at_once_though_its_workers_live(tmp_path):
    with another_training(tmp_path) as process:
        process.kill()
        process.wait()
        with sole_training(tmp_path):
            pass


def test_it_is_given_back_in_the_end(tmp_path):
    with sole_training(tmp_path):
        pass
    with another_training(tmp_path):
        pass


def test_other_folders_are_free(tmp_path):
    (tmp_path / "other").mkdir()
    with another_training(tmp_path), sole_training(tmp_path / "other"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_training_goes_on(number, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with sole_training(tmp_path):
        pass
