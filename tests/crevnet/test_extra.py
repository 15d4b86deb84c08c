"""Of the package itself: what is said where its extra is not installed."""

import importlib
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
