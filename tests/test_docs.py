"""The documentation builds without a warning, and its reference has every public name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import revgrad_kernels

import revgrad

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.parametrize(("package", "page"), [(revgrad, "revgrad"), (revgrad_kernels, "kernels")])
def test_the_reference_has_every_public_name(site, package, page):
    html = (site / "api" / page / "index.html").read_text()
    missing = [name for name in package.__all__ if f'.{name}"' not in html]
    assert missing == []


def test_the_front_page_is_the_readme_with_its_pictures(site):
    html = (site / "index.html").read_text()
    assert "Reversible autograd for PyTorch" in html
    assert (site / "images" / "mnist.gif").is_file()
    assert (site / "benchmarks" / "results" / "table1" / "index.html").is_file()
    assert (site / "benchmarks" / "results" / "table1_memory.png").is_file()
