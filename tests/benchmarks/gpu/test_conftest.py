"""The fixtures of `benchmarks/gpu/`, in a folder with one test that may run without a GPU."""

import pytest

from benchmarks.gpu.pytest_summary import run_file


@pytest.fixture
def outside_of_a_checkout(tmp_path, monkeypatch):
    """A file of measurements; git finds no checkout."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "missing"))
    monkeypatch.delenv("REVGRAD_COMMIT", raising=False)
    (tmp_path / "conftest.py").write_text("from benchmarks.gpu.conftest import known_commit\n")
    file = tmp_path / "test_it.py"
    file.write_text("def test_a():\n    print('mea' + 'sured')\n    assert 0\n")
    return str(file)


def test_without_a_commit_nothing_is_measured(outside_of_a_checkout):
    run = run_file(outside_of_a_checkout, timeout=300)
    assert run.counts == {"passed": 0, "failed": 0, "skipped": 0, "errors": 1}
    assert "set REVGRAD_COMMIT" in run.output
    assert "measured\n" not in run.output


def test_with_a_commit_it_is(outside_of_a_checkout, monkeypatch):
    monkeypatch.setenv("REVGRAD_COMMIT", "abc")
    run = run_file(outside_of_a_checkout, timeout=300)
    assert run.counts == {"passed": 0, "failed": 1, "skipped": 0, "errors": 0}
    assert "measured\n" in run.output
