import pytest

from crevnet.progress import Progress

TOLD = {"loss": 0.25, "norm": 1.0, "learning_rate": 0.5, "seconds": 4.0, "peak": 3_000_000}
METRICS = {"mse": 12.25, "ssim": 0.5, "psnr": 20.0, "per_frame": {}}


@pytest.fixture
def progress(tiny, tmp_path):
    return Progress(tiny.config(tmp_path, {"steps": 6, "run.log_every": 4}), tmp_path, 2)


def test_the_bar_tells_of_steps_and_from_then_on_of_the_last_validation(progress, capsys):
    with progress:
        progress.step(3, **TOLD)
        before = capsys.readouterr().err
        progress.validated(3, METRICS)
        validated = capsys.readouterr().err
        for step in (4, 5, 6):
            progress.step(step, **TOLD)
        progress.validated(6, METRICS | {"mse": 9.0})
    last = capsys.readouterr().err
    assert "validation" not in before
    assert "loss 0.25000, 0.5 sequences/s, peak activations 3.0 MB, validation MSE 12.25" in validated
    assert "validation MSE 9.00" in last
    assert "6/6" in last


def test_logs_have_every_so_many_steps_the_last_one_and_all_validations(progress, tiny, tmp_path):
    with progress:
        for step in (3, 4, 5, 6):
            progress.step(step, **TOLD)
        progress.validated(6, METRICS)
    assert tiny.column(tmp_path, "step") == ["4", "6"]
    names = ("loss", "gradient_norm", "learning_rate", "sequences_per_second")
    assert [tiny.column(tmp_path, name)[0] for name in names] == ["0.25", "1", "0.5", "0.5"]
    assert [tiny.column(tmp_path, n, "validation") for n in ("step", "mse", "psnr")] == [["6"], ["12.25"], ["20"]]


def test_a_gradient_that_stays_vanished_is_told(progress):
    with progress:
        for step in range(49):
            progress.step(step, **TOLD | {"norm": 0.0})
        with pytest.warns(RuntimeWarning, match="step 49: gradients have vanished"):
            progress.step(49, **TOLD | {"norm": 0.0})


def test_what_ends_a_run_closes_logs_and_bar(progress, tiny, tmp_path):
    def train():
        with progress:
            progress.step(4, **TOLD)
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert progress._bar.disable  # closed
    assert tiny.column(tmp_path, "step") == ["4"]
