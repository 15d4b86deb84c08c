"""Of the package itself: what is said where its extra is not installed, and how threads wait."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import crevnet.extra

ROOT = Path(__file__).parents[2]


ENTRY_POINTS = ("train", "evaluate", "predict", "export")


def test_packages_of_the_extra_that_are_missing_are_named_with_what_installs_them(monkeypatch):
    for module in ("einops", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"needs einops, pillow: .*pip install .*'\.\[crevnet\]'"):
        importlib.reload(crevnet.extra)


def run_without(modules, code):
    """Run code where these modules are not installed."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); {code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", hidden], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_command_lines_name_all_that_is_missing_at_once(entry_point):
    found = run_without(list(crevnet.extra._EXTRA), f"import crevnet.{entry_point}")
    assert f"crevnet needs {', '.join(crevnet.extra._EXTRA.values())}:" in found.stderr


def test_a_model_runs_without_what_only_the_command_lines_need():
    code = "import crevnet.model, crevnet.files, crevnet.capture, crevnet.ways; crevnet.model.CrevNetConfig().build()"
    needed_by_models = {"einops", "torchmetrics"}
    found = run_without(sorted(set(crevnet.extra._EXTRA) - needed_by_models), code)
    assert found.returncode == 0, found.stderr


def test_all_packages_of_the_extra_are_looked_for():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["crevnet"]
    assert sorted(crevnet.extra._EXTRA.values()) == sorted(requirement.split(">=")[0] for requirement in extra)


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
