"""The commands of `benchmarks/gpu/README.md` measure everything there is."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = "benchmarks/gpu"
COLLECT = """
import json, pytest, sys

class Collected:
    def pytest_collection_finish(self, session):
        self.items = [item.nodeid for item in session.items]

found = []
for arguments in json.loads(sys.argv[1]):
    collected = Collected()
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *arguments], plugins=[collected])
    found.append(collected.items)
print("FOUND" + json.dumps(found))
"""


def pieces():
    """The arguments of every command of the list of pieces."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / FOLDER / "README.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert all(command[0] == "pytest" and command[2:4] == ["--benchmark-only", "-k"] for command in commands)
    return [command[1:] for command in commands]


@pytest.fixture(scope="module")
def collected():
    """What pytest collects for each piece, for the whole folder by its name, and for all benchmarks: one process."""
    wanted = [*pieces(), [FOLDER], ["benchmarks"]]
    # A worker of pytest-xdist says so to what it starts, where pytest-benchmark would refuse to be alone.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    command = [sys.executable, "-c", COLLECT, json.dumps(wanted)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.rpartition("FOUND")[2])


def test_the_pieces_together_are_everything_once(collected):
    *of_pieces, everything, _ = collected
    assert all(of_pieces)
    assert sorted(item for items in of_pieces for item in items) == sorted(everything)


def test_all_benchmarks_are_all_but_these(collected):
    """Which take hours, and are run by name."""
    *_, everything, benchmarks = collected
    assert everything
    assert benchmarks
    assert not set(everything) & set(benchmarks)
    assert all(item.startswith("benchmarks/test_") for item in benchmarks)
