import errno
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crevnet.logs import RunLog, read_column


def log_steps(folder, first, steps, kind="train", scale=1.0):
    log = RunLog(folder, first)
    for step in steps:
        log.write(kind, step, {"loss": step * scale, "rate": 0.5})
    log.close()


def board(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_rows_are_written_with_a_header(tmp_path):
    log_steps(tmp_path, 1, [1, 2])
    assert (tmp_path / "train.csv").read_text().split() == ["step,loss,rate", "1,1,0.5", "2,2,0.5"]


def test_kinds_have_files_of_their_own(tmp_path):
    log = RunLog(tmp_path, 1)
    log.write("train", 1, {"loss": 0.25})
    log.write("validation", 1, {"mse": 2.0, "ssim": 0.5})
    log.close()
    assert read_column(tmp_path / "train.csv", "loss") == ([1], [0.25])
    assert read_column(tmp_path / "validation.csv", "ssim") == ([1], [0.5])


def test_float32_losses_keep_their_digits(tmp_path):
    log = RunLog(tmp_path, 1)
    log.write("train", 1, {"loss": 0.0123456789, "tiny": 1.5e-12})
    log.close()
    assert read_column(tmp_path / "train.csv", "loss")[1] == [pytest.approx(0.0123456789, rel=1e-7)]
    assert read_column(tmp_path / "train.csv", "tiny")[1] == [1.5e-12]


def test_a_row_is_in_the_file_at_once(tmp_path):
    """What was logged must survive a process that is killed."""
    log = RunLog(tmp_path, 1)
    log.write("train", 1, {"loss": 1.0})
    assert (tmp_path / "train.csv").read_text().split() == ["step,loss", "1,1"]
    log.close()


def test_a_resumption_drops_the_rows_from_its_first_step_on(tmp_path):
    log_steps(tmp_path, 1, range(1, 8))
    log_steps(tmp_path, 5, range(5, 10), scale=10)
    assert read_column(tmp_path / "train.csv", "loss") == (list(range(1, 10)), [1, 2, 3, 4, 50, 60, 70, 80, 90])


def test_tensorboard_shows_no_step_twice_after_a_resumption(tmp_path, monkeypatch):
    log_steps(tmp_path, 1, range(1, 8))
    # Its files are read in the order of their names, which begin with the second they were made in.
    later = time.time() + 10
    monkeypatch.setattr(time, "time", lambda: later)
    log_steps(tmp_path, 5, range(5, 10), scale=10)
    assert board(tmp_path, "train/loss") == list(zip(range(1, 10), [1, 2, 3, 4, 50, 60, 70, 80, 90], strict=True))


class Full:
    """A file, or TensorBoard's writer, on a disk that is full."""

    def __init__(self, *failing):
        self.failing = failing

    def __getattr__(self, name):
        def call(*arguments):
            if name in self.failing:
                raise OSError(errno.ENOSPC, "No space left on device")

        return call


def test_a_full_disk_names_the_log(tmp_path):
    log = RunLog(tmp_path, 1)
    log.write("train", 1, {"loss": 1.0})
    files, log._files = log._files, {"train": Full("write")}
    with pytest.raises(OSError, match=r"No space left on device: .*/train\.csv'"):
        log.write("train", 2, {"loss": 1.0})
    log._files = files
    log.close()
    log._board = Full("add_scalar", "close")
    for fail in (lambda: log.write("validation", 2, {"loss": 1.0}), log.close):
        with pytest.raises(OSError, match=r"No space left on device: .*/tensorboard'"):
            fail()
    log._files["validation"].close()


def test_what_ends_a_run_is_told_though_its_logs_cannot_be_closed(tmp_path):
    def run(log, error=None):
        with log:
            log._board.close()
            log._board = Full("close")
            if error:
                raise error

    with pytest.raises(KeyError):
        run(RunLog(tmp_path, 1), KeyError())
    with pytest.raises(OSError, match="tensorboard"):
        run(RunLog(tmp_path, 1))


def test_what_was_logged_before_an_error_is_in_tensorboard(tmp_path):
    def fail():
        with RunLog(tmp_path, 1) as log:
            for step in (1, 2, 3):
                log.write("train", step, {"loss": step})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert board(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_torn_last_row_is_dropped(tmp_path):
    (tmp_path / "train.csv").write_text("step,loss,rate\n1,1,0.5\n2,2,0.5\n3")
    log_steps(tmp_path, 3, [3])
    assert (tmp_path / "train.csv").read_text().split() == ["step,loss,rate", "1,1,0.5", "2,2,0.5", "3,3,0.5"]


def test_a_resumption_that_logs_nothing_leaves_the_file(tmp_path):
    log_steps(tmp_path, 1, [1, 2])
    RunLog(tmp_path, 1).close()
    assert len((tmp_path / "train.csv").read_text().split()) == 3


def test_reading_leaves_no_file(tmp_path):
    """Least of all one that TensorBoard would show as another run."""
    assert read_column(tmp_path / "train.csv", "loss") == ([], [])
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_while_it_drops_rows_loses_none(tmp_path, monkeypatch):
    log_steps(tmp_path, 1, [1, 2, 3])
    before = (tmp_path / "train.csv").read_text()

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        log_steps(tmp_path, 3, [3])
    assert (tmp_path / "train.csv").read_text() == before


@pytest.mark.parametrize("kind", ["train", "validation"])
@pytest.mark.parametrize(
    ("row", "reason"), [("x,2,0.5", "int.*'x'"), ("2,x,0.5", "float.*'x'"), ("2,,0.5", "float.*''"), ("\0,1,2", "int")]
)
def test_a_damaged_row_is_named_before_anything_is_logged(kind, row, reason, tmp_path):
    path = tmp_path / f"{kind}.csv"
    text = f"step,loss,rate\n1,1,0.5\n{row}\n3,3,0.5\n"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}, line 3: .*{reason}.*; delete this line, or the file"):
        RunLog(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == text


def test_of_a_torn_row_the_others_are_read(tmp_path):
    (tmp_path / "train.csv").write_text("step,loss,rate\n1,1,0.5\n2,2")
    assert read_column(tmp_path / "train.csv", "loss") == ([1], [1.0])


def test_a_damaged_header_costs_no_row_and_is_named_where_it_is_needed(tmp_path):
    (tmp_path / "train.csv").write_text("step,l\xf6ss\n1,1,0.5\n")
    log_steps(tmp_path, 2, [2])
    assert (tmp_path / "train.csv").read_text().split() == ["step,loss,rate", "1,1,0.5", "2,2,0.5"]
    (tmp_path / "train.csv").write_text("stop\n1\n")
    with pytest.raises(ValueError, match=r"train.csv, line 1: names no column loss; mend this line"):
        read_column(tmp_path / "train.csv", "loss")
