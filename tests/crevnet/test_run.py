import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from crevnet.checkpoint import DamagedCheckpoint
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import load_config, save_config
from crevnet.config import TrainConfig
from crevnet.data import VideosConfig
from crevnet.run import (
    check_same_architecture,
    check_same_run,
    find_checkpoint,
    initial_weights,
    load_run,
    opened,
    run_folder,
    select_device,
    with_whole_paths,
)
from tests.crevnet.test_run_lock import another_training

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny, tmp_path):
    """A run with three checkpoints of recognisable weights, the second one the best; and those weights."""
    folder = tmp_path / "run"
    config = tiny.config(folder)
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    directory = CheckpointDirectory(folder / "checkpoints")
    saved = {}
    for step in (5, 10, 15):
        saved[step] = {k: torch.full_like(v, step) for k, v in config.model.build().state_dict().items()}
        directory.save(step, saved[step], {}, best=step == 10)
    return folder, saved


@pytest.mark.parametrize(("checkpoint", "step"), [("best", 10), ("last", 15), ("5", 5), ("10", 10), ("00015", 15)])
def test_a_checkpoint_by_name(checkpoint, step, run, tiny):
    folder, saved = run
    loaded = load_run(folder, checkpoint, CPU)
    assert loaded.step == step
    assert loaded.config == tiny.config(folder)
    tiny.assert_equal(loaded.model.state_dict(), saved[step])
    assert not loaded.model.training


def test_weights_are_laid_out_as_in_training(finished_run):
    model = load_run(finished_run, "last", CPU).model
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    found = [(m, f) for m in model.modules() for kind, f in formats.items() if isinstance(m, kind)]
    assert found
    assert all(m.weight.is_contiguous(memory_format=f) for m, f in found)


def test_the_last_one_is_the_best_where_none_was_validated(run):
    (run[0] / "checkpoints" / "best.json").unlink()
    assert load_run(run[0], "best", CPU).step == 15


def test_a_run_that_was_moved_is_found(run, tmp_path):
    shutil.move(run[0], tmp_path / "elsewhere")
    assert load_run(tmp_path / "elsewhere", "best", CPU).step == 10


@pytest.mark.parametrize("name", ["newest", "", "-1", "1.5", "step-00000005"])
def test_another_name_is_refused(name, run):
    with pytest.raises(ValueError, match="checkpoint must be 'best', 'last' or the number of a step, got"):
        load_run(run[0], name, CPU)


def test_an_unknown_step_lists_those_that_are_there(run):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint, there are steps \[5, 10, 15\]"):
        load_run(run[0], "7", CPU)


def test_a_folder_that_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no config\.yaml"):
            load_run(folder, "best", CPU)


def test_a_run_without_a_checkpoint(tiny, tmp_path):
    save_config(tiny.config(tmp_path), tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        load_run(tmp_path, "best", CPU)
    assert find_checkpoint(CheckpointDirectory(tmp_path / "checkpoints"), "last") is None


def test_a_damaged_best_checkpoint_is_not_silently_replaced_by_another(run):
    (run[0] / "checkpoints" / "step-00000010" / "weights.safetensors").write_bytes(b"damage")
    with pytest.raises(DamagedCheckpoint, match="step-00000010"):
        load_run(run[0], "best", CPU)


def test_weights_that_do_not_fit_the_configuration(run, tiny):
    save_config(tiny.config(run[0], {"model.modules": 3}), run[0] / "config.yaml")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_run(run[0], "best", CPU)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == CPU
    assert select_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match="PyTorch sees no CUDA device here; use device cpu"):
            select_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto") == torch.device("cuda")
    assert select_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    "name",
    ["gpu", "tpu9", "", "xpu", "mps", "meta", "cpu:0", "cuda1", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:300"],
)
def test_another_device_is_refused(name, monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(ValueError, match=rf"^device must be auto, cpu or cuda, got '{name}'$"):
            select_device(name)


def test_options_that_leave_the_weights_alone_may_change(tiny, tmp_path):
    save_config(tiny.config(tmp_path, {"steps": 1}), tmp_path / "config.yaml")
    save_step(tmp_path, 1)
    free = {"steps": 99, "run.workers": 2, "run.threads": 3, "run.log_every": 7, "run.keep": 9, "run.device": "auto"}
    free |= {"run.checkpoint_every": 7, "run.validate_every": 7, "data.test_sequences": 7}
    check_same_run(tiny.config(tmp_path / "moved", free), tmp_path)


def test_digits_that_were_fetched_need_not_be_fetched_again(tiny, tmp_path):
    fetched = {"data.root": tmp_path / "mnist", "data.download": True}
    save_config(tiny.config(tmp_path, fetched), tmp_path / "config.yaml")
    save_step(tmp_path, 1)
    check_same_run(tiny.config(tmp_path, fetched | {"data.download": False}), tmp_path)


def test_another_validation_set_is_another_run(tiny, tmp_path):
    save_config(tiny.config(tmp_path), tmp_path / "config.yaml")
    save_step(tmp_path, 1)
    with pytest.raises(ValueError, match=r"\(run.validation_sequences was 4, is 5\)"):
        check_same_run(tiny.config(tmp_path, {"run.validation_sequences": 5}), tmp_path)


COSINE = {"optimiser.schedule": "cosine", "steps": 9}


def save_step(folder, step):
    CheckpointDirectory(folder / "checkpoints").save(step, {}, {})


@pytest.mark.parametrize("steps", [8, 10])
def test_where_the_learning_rate_depends_on_the_number_of_steps_another_one_is_another_run(steps, tiny, tmp_path):
    save_config(tiny.config(tmp_path, COSINE), tmp_path / "config.yaml")
    save_step(tmp_path, 2)
    check_same_run(tiny.config(tmp_path, COSINE), tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"\(steps was 9, is {steps}\); choose another run.folder; with .* needs optimiser.schedule constant or ",
    ):
        check_same_run(tiny.config(tmp_path, COSINE | {"steps": steps}), tmp_path)


@pytest.mark.parametrize("step", [None, 0])
def test_before_its_first_step_a_run_may_still_change_its_number_of_steps(step, tiny, tmp_path):
    save_config(tiny.config(tmp_path, COSINE), tmp_path / "config.yaml")
    if step is not None:
        save_step(tmp_path, step)
    check_same_run(tiny.config(tmp_path, COSINE | {"steps": 10}), tmp_path)


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_where_the_learning_rate_does_not_depend_on_it_a_longer_run_is_the_same(schedule, tiny, tmp_path):
    options = {"optimiser.schedule": schedule}
    save_config(tiny.config(tmp_path, options | {"steps": 9}), tmp_path / "config.yaml")
    save_step(tmp_path, 2)
    check_same_run(tiny.config(tmp_path, options | {"steps": 10}), tmp_path)
    with pytest.raises(ValueError, match=r"optimiser.drop_every was 250000, is 5\)"):
        check_same_run(tiny.config(tmp_path, options | {"steps": 9, "optimiser.drop_every": 5}), tmp_path)


def test_a_run_is_not_made_shorter_than_what_it_has_reached(tiny, tmp_path):
    constant = {"optimiser.schedule": "constant"}
    save_config(tiny.config(tmp_path, constant | {"steps": 9}), tmp_path / "config.yaml")
    save_step(tmp_path, 2)
    save_step(tmp_path, 5)
    check_same_run(tiny.config(tmp_path, constant | {"steps": 5}), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds a run that has reached step 5, and steps is 4; set steps to 5 or more, or choose another run.fol",
    ):
        check_same_run(tiny.config(tmp_path, constant | {"steps": 4}), tmp_path)


def test_a_run_that_ended_before_its_first_checkpoint_leaves_the_folder_to_others(tiny, tmp_path):
    (tmp_path / "config.yaml").write_text("bogus: 3")
    other = tiny.config(tmp_path, {"model.modules": 3})
    check_same_run(other, tmp_path)
    with opened(other) as folder:
        assert load_config(folder / "config.yaml") == other
    save_step(tmp_path, 0)
    with pytest.raises(ValueError, match=r"model\.modules was 3, is 2"):
        check_same_run(tiny.config(tmp_path), tmp_path)


# --- paths ---


def test_paths_of_the_data_are_kept_so_that_they_are_found_from_anywhere(tiny, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = tiny.config(tmp_path / "run", {"data.root": Path("../digits")})
    with opened(config) as folder:
        pass
    assert config.data.root == Path("../digits")
    assert load_config(folder / "config.yaml").data.root == tmp_path / "digits"
    videos = VideosConfig(train=Path("a"), test=Path("b"), cache=Path("c"), channels=1)
    whole = with_whole_paths(TrainConfig(data=videos)).data
    assert (whole.train, whole.validation) == (tmp_path / "elsewhere" / "a", None)
    assert (whole.test, whole.cache) == (tmp_path / "elsewhere" / "b", tmp_path / "elsewhere" / "c")


def test_a_path_is_the_same_however_it_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_step(tmp_path, 1)
    ways = [Path("digits"), tmp_path / "digits", tmp_path / "checkpoints" / ".." / "digits"]
    for recorded in ways:
        save_config(tiny.config(tmp_path, {"data.root": recorded}), tmp_path / "config.yaml")
        for given in ways:
            check_same_run(tiny.config(tmp_path, {"data.root": given}), tmp_path)
        with pytest.raises(ValueError, match=rf"data.root was {tmp_path}/digits, is {tmp_path}/others\)"):
            check_same_run(tiny.config(tmp_path, {"data.root": Path("others")}), tmp_path)


def test_the_path_of_a_run_to_begin_with_is_kept_whole_and_links_are_not_followed(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    whole = with_whole_paths(tiny.config(None, {"run.init": Path("a/../link")}))
    assert whole.run.init == tmp_path / "link"
    assert with_whole_paths(tiny.config()).run.init is None


# --- weights to begin with ---


@pytest.mark.parametrize(("name", "step"), [("", 10), ("checkpoints/step-00000015", 15)])
def test_a_run_begins_with_the_best_weights_of_another_or_with_a_checkpoint(name, step, run, tiny):
    folder, saved = run
    found = initial_weights(folder / name)
    assert found.step == step
    tiny.assert_equal(found.weights, saved[step])


def test_without_a_validation_it_begins_with_the_last_weights(run):
    (run[0] / "checkpoints" / "best.json").unlink()
    assert initial_weights(run[0]).step == 15


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_what_is_no_run_to_begin_with_is_named(make, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=rf"run.init {tmp_path}/x is neither the folder of a run nor that of a"):
        initial_weights(tmp_path / "x")


def test_a_run_without_a_checkpoint_is_none_to_begin_with(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"run.init {tmp_path} has no checkpoint yet"):
        initial_weights(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_none_to_begin_with(name, run):
    best = run[0] / "checkpoints" / "step-00000010"
    (best / name).unlink()
    for source in (run[0], best):
        with pytest.raises(DamagedCheckpoint, match=rf"step-00000010/{name}: is missing"):
            initial_weights(source)


@pytest.mark.parametrize(
    ("weights", "model", "message"),
    [
        (
            {"a": (2,), "b": (3, 1)},
            {"a": (2,), "b": (3, 4)},
            r"b is \[3, 1\] there and \[3, 4\] here; give the options",
        ),
        ({"a": (2,)}, {"a": (2,), "b": (3,)}, r"b is missing there and \[3\] here"),
        ({"a": (2,), "c": ()}, {"a": (2,)}, r"c is \[\] there and missing here"),
    ],
)
def test_another_architecture_is_refused_by_the_first_tensor_that_differs(weights, model, message):
    weights, model = ({name: torch.zeros(shape) for name, shape in x.items()} for x in (weights, model))
    check_same_architecture(model, model, Path("run"))
    with pytest.raises(ValueError, match=rf"^run.init run is of another architecture: {message}"):
        check_same_architecture(weights, model, Path("run"))


# --- the folder ---


def test_an_empty_folder_takes_any_run(tiny, tmp_path):
    check_same_run(tiny.config(tmp_path), tmp_path)


def test_the_folder_is_the_configured_one_or_a_new_one(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_folder(tiny.config(tmp_path / "some" / "x")) == tmp_path / "some" / "x"
        assert (tmp_path / "some" / "x").is_dir()
    made = run_folder(tiny.config(None))
    assert made.is_dir()
    assert made.parent.name == "runs"
    assert made.name[:8].isdecimal()


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tiny, tmp_path, monkeypatch):
    class StoppedClock:
        def now():
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crevnet.run.datetime", StoppedClock)
    made = [run_folder(tiny.config(None)) for _ in range(3)]
    assert made == [Path("runs") / f"20260102-030405{end}" for end in ("", "-2", "-3")]
    assert all(folder.is_dir() for folder in made)


def test_a_file_in_place_of_the_folder_of_new_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    with pytest.raises(FileExistsError):
        run_folder(tiny.config(None))


def test_a_folder_in_which_another_process_trains_is_left_alone(tiny, tmp_path):
    with another_training(tmp_path):
        with pytest.raises(ValueError, match="another process trains in"), opened(tiny.config(tmp_path)):
            pass
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
