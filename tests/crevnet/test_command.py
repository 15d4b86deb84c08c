import json
import sys
from pathlib import Path

import pytest
import yaml

from crevnet.baselines.stacked_rnn import StackedRNNConfig
from crevnet.baselines.unet_rnn import UNetRNNConfig
from crevnet.checkpoint import DamagedCheckpoint
from crevnet.command import (
    CONFIGS,
    as_plain,
    choose,
    load_config,
    parse_train_config,
    run_command,
    save_config,
)
from crevnet.config import TrainConfig
from crevnet.data import DataError, VideosConfig
from crevnet.model import CrevNetConfig
from crevnet.models import MODELS
from revgrad import ReversibilityError


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus: 1", "Option 'bogus' is not accepted"),
        ("run: {bogus: 1}", "Group 'run' does not accept option 'bogus'"),
        ("model: {cell: gru}", 'Parser key "model.cell"'),
        ("steps: many", 'Parser key "steps"'),
        ("observed: 99", "observed must be at least model.clip"),
        ("data: {name: videos}", "data.train"),
        ("data: {name: films}", "data must be one of moving-mnist, videos, got 'films'"),
    ],
)
def test_a_configuration_that_is_none_is_refused_by_its_name_and_the_option(text, message, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}: ") as error:
        load_config(path)
    assert message in str(error.value)
    assert capsys.readouterr().err == ""


def command(folder: Path, *, times: int = 1) -> None:
    """Say something.

    Args:
        folder: Where.
        times: How often.
    """
    if times < 0:
        errors = [KeyError, ValueError, FileNotFoundError, DamagedCheckpoint, DataError, ReversibilityError]
        raise errors[-1 - times]("oops")
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


@pytest.mark.parametrize("times", [-2, -3, -4, -5, -6])
def test_what_the_user_can_mend_ends_with_a_message(times, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["say", "here", f"--times={times}"])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == "error: oops"  # Python prints it to stderr and ends with status 1


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["say", "here", "--times=-1"])
    with pytest.raises(KeyError):
        run_command(command)


# --- which model ---

QUICK = CONFIGS / "quick.yaml"
STACKED = {"model": {"name": "stacked-rnn", "hidden": 4, "image_size": 48, "clip": 2, "layers": 3}, "steps": 7}


def parse(*arguments):
    return parse_train_config("train", "", [str(a) for a in arguments])


@pytest.fixture
def stacked(tmp_path):
    """A YAML file for another model than the default one."""
    path = tmp_path / "stacked.yaml"
    path.write_text(yaml.safe_dump(STACKED | {"data": {"image_size": 48}}))
    return path


@pytest.fixture
def refused(capsys):
    """Parse what must be refused, with status 2; returns the last paragraph of the message."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            parse(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err.split("error: ", 1)[1].strip()

    return run


@pytest.mark.parametrize("form", [["--model", "{}"], ["--model={}"], ["--model.name", "{}"], ["--model.name={}"]])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_chosen_by_its_name(form, name):
    config = parse(*(word.format(name) for word in form))
    assert type(config.model) is MODELS[name]
    assert config.model == MODELS[name]()
    assert config.model.name == name


def test_without_a_name_it_is_crevnet():
    assert parse() == TrainConfig()
    names = {"model": "crevnet", "data": "moving-mnist"}
    assert choose(["--steps", "3"]) == (names, ["--steps", "3", "--model.name=crevnet", "--data.name=moving-mnist"])


def test_options_of_the_chosen_model_are_known_in_any_order():
    config = parse("--model.predictor", "stacked", "--steps=3", "--model", "unet-rnn", "--model.width=4")
    assert config.model == UNetRNNConfig(predictor="stacked", width=4)
    assert config.steps == 3


def test_options_of_another_model_are_refused(refused):
    assert refused("--model", "unet-rnn", "--model.blocks", "[1]") == "unrecognized arguments: --model.blocks [1]"


def test_values_of_the_chosen_model_are_checked(refused):
    assert "model.width must be at least 1, got 0" in refused("--model", "unet-rnn", "--model.width", "0")
    assert "gru" in refused("--model", "unet-rnn", "--model.cell", "gru")


def test_a_file_names_its_model(stacked):
    config = parse("--config", stacked)
    assert config.model == StackedRNNConfig(hidden=4, image_size=48, clip=2, layers=3)
    assert config.steps == 7


def test_the_command_line_overrides_a_file_of_the_same_model(stacked):
    config = parse("--config", stacked, "--model", "stacked-rnn", "--model.layers", "1", "--steps=9")
    assert config.model == StackedRNNConfig(hidden=4, image_size=48, clip=2, layers=1)
    assert config.steps == 9


@pytest.mark.parametrize("name_first", [True, False])
def test_of_a_file_of_another_model_what_all_share_is_kept(stacked, name_first):
    name, file = ["--model", "unet-rnn"], ["--config", stacked]
    config = parse(*name, *file) if name_first else parse(*file, *name)
    assert config.model == UNetRNNConfig(image_size=48)
    assert config.steps == 7


def test_of_the_quick_configuration_too():
    quick = load_config(QUICK)
    config = parse(f"--config={QUICK}", "--model=unet-rnn")
    assert config.model == UNetRNNConfig(image_size=32)
    assert (config.data, config.optimiser, config.steps) == (quick.data, quick.optimiser, quick.steps)


def test_the_last_name_wins(stacked):
    assert parse("--model", "stacked-rnn", "--model", "unet-rnn").model == UNetRNNConfig()
    assert parse("--model=unet-rnn", "--model.name=stacked-rnn").model == StackedRNNConfig()
    assert parse("--model", "unet-rnn", "--config", stacked).model.name == "unet-rnn"


def test_the_last_file_with_a_model_wins(stacked):
    config = parse("--config", stacked, "--config", QUICK)
    assert config.model == load_config(QUICK).model
    config = parse("--config", QUICK, "--config", stacked)
    assert config.model == StackedRNNConfig(hidden=4, image_size=48, clip=2, layers=3)
    assert config.batch_size == load_config(QUICK).batch_size
    assert config.steps == 7


@pytest.mark.parametrize("text", ["steps: 11\n", "steps: 11\nmodel:\n", "steps: 11\nmodel: {}\n"])
def test_a_file_that_says_nothing_of_the_model_leaves_it_alone(text, stacked, tmp_path):
    (tmp_path / "more.yaml").write_text(text)
    config = parse("--config", stacked, "--config", tmp_path / "more.yaml")
    assert config.model == load_config(stacked).model
    assert config.steps == 11
    assert parse("--config", tmp_path / "more.yaml").model == CrevNetConfig()


@pytest.mark.parametrize("form", [["--model", "unet"], ["--model.name=unet"], ["--model="]])
def test_an_unknown_name_is_answered_with_all_names(form, refused):
    given = form[-1].rpartition("=")[2]
    assert refused(*form) == f"model must be one of {', '.join(MODELS)}, got {given!r}"


def test_a_file_that_names_an_unknown_model_too(tmp_path, refused):
    (tmp_path / "config.yaml").write_text("model: {name: unet}\n")
    assert refused("--config", tmp_path / "config.yaml").startswith("model must be one of crevnet, ")
    with pytest.raises(ValueError, match=r"model must be one of crevnet, .*, got 'unet'"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("option", ["--model", "--config"])
def test_an_option_without_its_value_is_refused(option, refused):
    assert refused("--steps", "3", option) == f"argument {option}: expected one argument"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [1", "{} is not a YAML file: while parsing"),
        (b"\xff\xfe", "{} is not a YAML file: 'utf-8' codec"),
        (b"", "{} is not the configuration of a training run: it must hold sections such as model:"),
        (b"- model", "{} is not the configuration of a training run"),
        (b"model: unet-rnn", "{} is not the configuration of a training run"),
        (b"model: {name: unet-rnn, blocks: [1]}", "blocks"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content, message, tmp_path, refused):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert message.format(path) in refused("--config", path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, refused):
    assert str(tmp_path / "none.yaml") in refused("--config", tmp_path / "none.yaml")
    assert str(tmp_path) in refused(f"--config={tmp_path}")


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_configuration_is_that_of_its_model(name, tmp_path):
    config = TrainConfig(
        model=MODELS[name](image_size=(64, 32)), data=VideosConfig(train=Path("v"), channels=1, image_size=(64, 32))
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert parse("--config", tmp_path / "config.yaml") == config
