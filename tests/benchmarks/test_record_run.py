import json
import re
from pathlib import Path

import pytest

from benchmarks.record_run import page, record, where

DOCS = Path(__file__).parents[2] / "docs"
VALIDATION = [{"step": 250, "mse": 30.5, "ssim": 0.5}]
TRAINED_ON = {
    "torch": "2.13.0+cpu",
    "device": "cpu",
    "device_name": "Some CPU",
    "threads": 1,
    "processes": 1,
    "commit": "0123456789abcdef" * 2 + "01234567",
}


@pytest.fixture
def metrics():
    """Those of the recorded run, which does not say what trained it."""
    metrics = json.loads((DOCS / "mnist-run" / "metrics.json").read_text())
    metrics.pop("trained_on", None)
    return metrics


def told(metrics):
    """The sentence about time."""
    return re.search(r"\d+ steps took .*?\. Peak", " ".join(page(metrics, VALIDATION).split()))[0]


def test_a_run_that_does_not_say_what_trained_it_is_recorded_without(metrics):
    assert re.fullmatch(r"4500 steps took \d+ minutes\. Peak", told(metrics))


def test_what_trained_is_told_and_not_what_records(metrics):
    assert told(metrics | {"trained_on": TRAINED_ON}).endswith(
        "minutes on Some CPU, 1 thread, with PyTorch 2.13.0+cpu, at commit 0123456789ab. Peak"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"threads": 4}, " on Some CPU, 4 threads, with PyTorch"),
        ({"threads": 4, "processes": 2}, " on Some CPU, 4 threads in each of 2 processes, with PyTorch"),
        ({"device": "cuda", "device_name": "Some GPU"}, " on Some GPU, with PyTorch"),
        ({"commit": TRAINED_ON["commit"] + "-dirty"}, ", at commit 0123456789ab with uncommitted changes"),
    ],
)
def test_other_machines(changes, expected):
    assert expected in " ".join(("x" + where(TRAINED_ON | changes)).split())


def test_a_commit_that_is_not_known_is_left_out():
    assert "commit" not in where(TRAINED_ON | {"commit": None})


def test_a_run_is_recorded_with_its_files(metrics, tmp_path):
    run, docs = tmp_path / "run", tmp_path / "docs"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps(metrics | {"trained_on": TRAINED_ON}))
    (run / "validation.csv").write_text("step,mse,ssim,psnr\n250,30.5,0.5,15\n")
    for name in ("predictions.gif", "predictions.png", "loss.png", "train.csv"):
        (run / name).write_text(name)
    record(run, docs)
    text = (docs / "mnist-run.md").read_text()
    assert "|  250 | 30.50 | 0.50 |" in text
    assert "Some CPU" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (docs / link).exists(), link


def test_a_run_that_is_not_finished_is_not_recorded(tmp_path):
    with pytest.raises(FileNotFoundError):
        record(tmp_path, tmp_path / "docs")
