"""Of the package itself: what is said where its extra is not installed, and how threads wait."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import crevnet

ROOT = Path(__file__).parents[2]


def test_packages_of_the_extra_that_are_missing_are_named_with_what_installs_them(monkeypatch):
    for module in ("einops", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"needs einops, pillow: .*pip install .*'\.\[crevnet\]'"):
        importlib.reload(crevnet)


def test_all_packages_of_the_extra_are_looked_for():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["crevnet"]
    assert sorted(crevnet._EXTRA.values()) == sorted(requirement.split(">=")[0] for requirement in extra)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_shortly_in_a_loop_unless_the_user_says_otherwise(given, expected):
    code = "import crevnet, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **given}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == expected
