import pytest

from benchmarks.gpu.pytest_summary import parse_summary, run_file


def counts(passed=0, failed=0, skipped=0, errors=0):
    return {"passed": passed, "failed": failed, "skipped": skipped, "errors": errors}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("12 passed in 4.56s", counts(passed=12)),
        ("1 failed, 12 passed, 3 skipped, 7 warnings in 75.31s (0:01:15)", counts(12, 1, 3)),
        ("===== 2 failed, 1 passed, 4 deselected, 1 xfailed, 2 errors in 0.10s =====", counts(1, 2, 0, 2)),
        ("1 error in 0.50s", counts(errors=1)),
        ("no tests ran in 0.01s", counts()),
    ],
)
def test_the_last_line_is_counted(line, expected):
    assert parse_summary(f"....s.F   [100%]\nSKIPPED [3] a.py: took 5 tries in 2.5s of 9 passed\n{line}\n") == expected


def test_output_without_a_summary_is_an_error():
    with pytest.raises(ValueError, match=r"no summary.*Segmentation fault"):
        parse_summary("....\nFatal Python error: Segmentation fault\n")


def test_a_file_is_run_by_pytest(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    run = run_file(str(file), timeout=300)
    assert run.counts == counts(1, 1, 1)
    assert not run.good
    assert "assert 0" in run.output


def test_a_file_that_passes_is_good_and_one_without_tests_is_not(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("def test_a(): pass\n")
    assert run_file(str(file), timeout=300).good
    file.write_text("")
    assert not run_file(str(file), timeout=300).good


def test_what_takes_too_long_or_crashes_is_an_error(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("import time\ndef test_a(): time.sleep(60)\n")
    late = run_file(str(file), timeout=1)
    assert late.counts == counts(errors=1)
    assert not late.good
    assert "not done after 1 s" in late.output
    file.write_text("import os\ndef test_a(): os._exit(3)\n")
    assert run_file(str(file), timeout=300).counts == counts(errors=1)
