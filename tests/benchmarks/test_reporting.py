import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks.reporting import Report, Table, commit, environment, include, spread, write_file

ROWS = [{"mode": "stored", "mb": 1234.5678, "n": 4}, {"mode": "reversible", "mb": 7.0, "n": None}]
TABLE = Table("Memory", {"mode": "mode", "mb": "MB", "n": "modules"}, ROWS)


def report(**changes):
    arguments = {"name": "memory", "title": "Training memory", "tables": {"rows": TABLE}, "configuration": {"n": 1}}
    return Report(**{**arguments, **changes})


def test_a_table_is_aligned_markdown():
    assert TABLE.to_markdown().splitlines() == [
        "**Memory**",
        "",
        "| mode       |       MB | modules |",
        "| ---------- | -------: | ------: |",
        "| stored     | 1,234.57 |       4 |",
        "| reversible |     7.00 |         |",
    ]


def test_a_column_may_have_its_own_format():
    table = Table("Errors", {"error": "error"}, [{"error": 1.5e-6}, {"error": None}], formats={"error": ".1e"})
    assert table.to_markdown().splitlines()[-2:] == ["| 1.5e-06 |", "|         |"]


def test_environment_says_where_when_and_with_what():
    where = environment("pytest benchmarks/")
    assert where["command"] == "pytest benchmarks/"
    for key in ("date", "device", "cores", "threads", "torch", "numpy", "python", "platform"):
        assert where[key], key
    assert {"commit", "uncommitted_changes"} <= where.keys()


def test_environment_of_a_gpu_names_all_that_drives_it(monkeypatch):
    properties = SimpleNamespace(
        name="Some GPU", major=9, minor=0, multi_processor_count=8, total_memory=10**10, L2_cache_size=10**7
    )
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91000)
    monkeypatch.setattr("benchmarks.reporting._driver", lambda: "580.1")
    where = environment("pytest benchmarks/", cuda=True)
    assert where["device"].startswith("Some GPU, driver 580.1, CUDA 13.0, cuDNN 91000")
    assert (where["capability"], where["memory_gb"], where["l2_mb"]) == ("9.0", 10.0, 10.0)
    assert "Some GPU" in report(cuda=True).to_markdown(where)


def test_commit_notices_changes_but_not_those_of_results(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    clean = commit(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["uncommitted_changes"] is False
    write_file(tmp_path / "benchmarks" / "results" / "memory.json", b"{}")
    assert commit(tmp_path) == clean
    write_file(tmp_path / "model.py", b"")
    assert commit(tmp_path)["uncommitted_changes"] is True


def test_commit_is_none_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("REVGRAD_COMMIT", raising=False)
    assert commit(tmp_path) == {"commit": None, "uncommitted_changes": None}
    monkeypatch.setenv("REVGRAD_COMMIT", "abc")
    assert commit(tmp_path) == {"commit": "abc", "uncommitted_changes": None}


def test_spread_is_median_and_percentiles():
    assert spread([0.0, 1.0, 2.0, 3.0, 4.0, 10.0]) == {"p20": 1.0, "median": 2.5, "p80": 4.0}


def test_a_report_is_written_whole(tmp_path):
    where = environment("pytest")
    paths = report(pictures={"depth.png": b"picture"}, notes=["one note"], versions={"peer": "1.0"}).write(
        where, tmp_path
    )
    assert sorted(path.name for path in paths) == ["depth.png", "memory.json", "memory.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth.png", "memory.json", "memory.md"]
    data = json.loads((tmp_path / "memory.json").read_text())
    assert data["rows"] == ROWS
    assert data["configuration"] == {"n": 1}
    assert data["device"] == where["device"]
    assert data["commit"] == where["commit"]
    assert data["versions"] == {"peer": "1.0", **{key: where[key] for key in ("python", "torch", "numpy")}}
    assert data["environment"].keys() == where.keys() - {"device", "commit", "python", "torch", "numpy"}
    text = (tmp_path / "memory.md").read_text()
    for part in ("# Training memory\n", "| reversible |", "![Training memory](depth.png)", "- one note", "`pytest`"):
        assert part in text


def test_a_number_that_is_none_is_refused_and_the_old_files_stay(tmp_path):
    report().write(environment("pytest"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = Table("Memory", TABLE.columns, [{"mode": "stored", "mb": float("nan"), "n": 1}])
    with pytest.raises(ValueError, match="JSON"):
        report(tables={"rows": broken}).write(environment("pytest"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_file(tmp_path / "a" / "memory.json", b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["memory.json"]


PAGE = (
    "# Page\n\n<!-- begin speed -->\n{}<!-- end speed -->\n\n"
    "Below.\n\n<!-- begin other -->\nstays\n<!-- end other -->\n"
)


def test_a_text_takes_the_place_of_the_one_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(""))
    for text in ("a first table\nof two lines", "another"):
        assert include(page, "speed", f"\n{text}\n\n")
        assert page.read_text() == PAGE.format(f"{text}\n")


def test_a_page_without_a_place_for_it_stays_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("text\n"))
    assert not include(page, "memory", "a table")
    assert page.read_text() == PAGE.format("text\n")


def test_what_stands_before_the_place_does_not_end_it(tmp_path):
    """Of two places for the same text the first one is filled, and the second one kept."""
    page = tmp_path / "page.md"
    page.write_text(2 * PAGE.format("old\n"))
    assert include(page, "speed", "new")
    assert page.read_text() == PAGE.format("new\n") + PAGE.format("old\n")
