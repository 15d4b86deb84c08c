"""Benchmarks that say `one thread` run on one, and their reports say so."""

from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.gpu.pytest_summary import run_file

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "benchmarks").glob("test_*.py"))

MEASUREMENT = """
from pathlib import Path
import pytest
import torch
from benchmarks.reporting import environment

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def results():
    yield
    Path(__file__).with_suffix(".txt").write_text(str(environment("")["threads"]))

def test_a(results):
    assert torch.get_num_threads() == 1

def test_b(results):
    assert torch.get_num_threads() == 1
"""
AFTERWARDS = """
import torch

def test_the_threads_are_back():
    assert torch.get_num_threads() == 2
"""


def test_a_report_that_is_written_at_the_end_names_the_threads_of_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import one_thread\n")
    (tmp_path / "test_it.py").write_text(MEASUREMENT)
    (tmp_path / "test_later.py").write_text(AFTERWARDS)
    run = run_file(str(tmp_path), timeout=300)
    assert run.counts["passed"] == 3, run.output
    assert (tmp_path / "test_it.txt").read_text() == "1"


@pytest.mark.parametrize("name", FILES)
def test_what_says_one_thread_has_one(name):
    module = import_module(f"benchmarks.{name}")
    marks = getattr(module, "pytestmark", [])
    fixtures = [f for mark in (marks if isinstance(marks, list) else [marks]) for f in mark.args]
    # Inference is on one thread where there is no GPU, which its notes leave to the device.
    says = "one thread" in " ".join(module.NOTES) or name == "test_inference"
    assert "one_thread" in fixtures or not says


def test_some_say_so_and_some_do_not():
    said = {"one thread" in " ".join(import_module(f"benchmarks.{name}").NOTES) for name in FILES}
    assert said == {True, False}
