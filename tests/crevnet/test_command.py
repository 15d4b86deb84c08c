import json
import sys
from pathlib import Path

import pytest
import yaml

from crevnet.checkpoint import DamagedCheckpoint
from crevnet.command import as_plain, load_config, run_command, save_config
from crevnet.config import TrainConfig
from crevnet.data import DataError


def test_a_configuration_becomes_plain_data(tiny, tmp_path):
    config = tiny.config(tmp_path / "run")
    plain = as_plain(config)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["model"]["blocks"] == [1]
    assert plain["optimiser"]["betas"] == [0.9, 0.999]
    assert plain["run"]["folder"] == str(tmp_path / "run")
    assert plain["data"]["root"] is None
    assert as_plain(TrainConfig())["run"]["folder"] is None


def test_the_written_file_is_plain_yaml_and_leaves_nothing_beside_it(tiny, tmp_path):
    config = tiny.config(tmp_path / "run")
    save_config(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == as_plain(config)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_saving_replaces_the_file_as_a_whole(tiny, tmp_path, monkeypatch):
    """A process killed while it writes must not leave half a configuration, which would lock the run's folder."""
    path = tmp_path / "config.yaml"
    save_config(tiny.config(), path)
    before = path.read_text()

    def out_of_disk(self, text, *args, **kwargs):
        with self.open("w") as f:
            f.write(text[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", out_of_disk)
    with pytest.raises(OSError, match="no space left"):
        save_config(tiny.config(options={"seed": 1}), path)
    assert path.read_text() == before


def test_an_unreadable_configuration_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {cell: gru}\n")
    with pytest.raises(SystemExit) as stop:
        load_config(tmp_path / "config.yaml")
    assert stop.value.code == 2
    assert "cell" in capsys.readouterr().err


def command(folder: Path, *, times: int = 1) -> None:
    """Say something.

    Args:
        folder: Where.
        times: How often.
    """
    if times < 0:
        raise {-1: ValueError, -2: FileNotFoundError, -3: DamagedCheckpoint, -4: DataError, -5: KeyError}[times]("oops")
    print(f"{folder} " * times)


def test_a_function_is_a_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["say", "here", "--times", "2"])
    run_command(command)
    assert capsys.readouterr().out == "here here \n"


def test_help_comes_from_the_docstring(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["say", "--help"])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "Say something." in out
    assert "How often." in out


def test_an_unknown_option_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["say", "here", "--loud"])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == 2
    assert "--loud" in capsys.readouterr().err


@pytest.mark.parametrize("times", [-1, -2, -3, -4])
def test_what_the_user_can_mend_ends_with_a_message(times, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["say", "here", f"--times={times}"])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == "error: oops"  # Python prints it to stderr and ends with status 1


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["say", "here", "--times=-5"])
    with pytest.raises(KeyError):
        run_command(command)
