import json
import subprocess
from pathlib import Path

import pytest
import torch

from crevnet.machine import commit, cpu_model, trained_on


@pytest.mark.usefixtures("single_thread")
def test_what_is_told_is_plain_data():
    found = trained_on(torch.device("cpu"), 3)
    assert json.loads(json.dumps(found)) == found
    assert type(found["torch"]) is str
    assert (found["device"], found["device_name"], found["threads"], found["processes"]) == ("cpu", cpu_model(), 1, 3)


def test_a_cuda_device_has_its_own_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    found = trained_on(torch.device("cuda", 1), 1)
    assert (found["device"], found["device_name"]) == ("cuda", "GPU 1")


def test_cpu_model_is_read_or_replaced(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert cpu_model(info) == "Some CPU @ 3 GHz"
    assert cpu_model(tmp_path / "missing")


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def file(tmp_path):
    """One in a checkout, committed."""
    git(tmp_path, "init")
    file = tmp_path / "package" / "a.py"
    file.parent.mkdir()
    file.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    git(tmp_path, "tag", "-a", "v1", "-m", "a")
    return file


def test_the_commit_of_a_file_and_whether_there_are_changes(file):
    head = subprocess.run(["git", "-C", file.parent, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit(file) == head.stdout.strip()
    file.write_text("2")
    assert commit(file) == f"{head.stdout.strip()}-dirty"


def test_what_is_only_installed_in_a_checkout_is_of_no_commit(file):
    other = file.with_name("b.py")
    other.write_text("1")
    assert commit(other) is None


def test_there_is_no_commit_outside_a_checkout_or_without_git(tmp_path, file, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent.parent))
    assert commit(tmp_path.parent / "a.py") is None
    monkeypatch.setenv("PATH", "")
    assert commit(Path(file)) is None
