"""A run's memory: the peak that it reports, and the way to train that it chooses for a budget."""

import json
import re

import pytest
import torch

from crevnet.command import load_config
from crevnet.training_step import _Allocated
from crevnet.ways import MARGIN, NoWayFits, training_bytes
from revgrad import LiveMemory
from tests.crevnet.test_training import snapshot, training_batch

pytestmark = pytest.mark.usefixtures("single_thread")


AUTO = {"model.mode": "auto", "model.cell": "stlstm", "steps": 3}


def reversible_need(tiny, options):
    """Bytes in which reversible training fits, and stored does not."""
    return int(training_bytes(tiny.config(None, options).model.ways(4)["reversible"], 2, 6, torch.device("cpu")))


# --- the peak that is reported ---


def test_reversible_training_holds_less_than_stored(trainer, tmp_path):
    deep = {"model.blocks": [3], "model.modules": 6}
    peaks = {}
    for mode in ("reversible", "stored"):
        made = trainer(deep | {"model.mode": mode}, tmp_path / mode)
        for _ in range(2):
            made._train_step(training_batch(made))
        peaks[mode] = made.training_step.peak_activation_bytes
    assert 0 < peaks["reversible"] < 0.35 * peaks["stored"]


def test_the_reported_peak_is_that_of_any_step_after_the_first(trainer, tmp_path):
    """What the first step of a process makes for good, tables for instance, are no activations."""
    made = trainer()
    peaks = []
    for step in range(4):
        made.step = step % 2
        made._train_step(training_batch(made))
        peaks.append(made.training_step.peak_activation_bytes)
    assert peaks[1] == peaks[2] == peaks[3]


def test_the_peak_on_a_gpu_is_the_allocators_without_what_was_there_before(monkeypatch):
    """Weights, and the memory in which Triton tunes kernels, are no activations."""
    held = {"now": 5, "most": 99}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(most=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["most"])
    with _Allocated(torch.device("cuda")) as memory:
        held["most"] = 12
    assert memory.peak == 7


def peak_of(folder):
    return json.loads((folder / "metrics.json").read_text())["peak_activation_bytes"]


def test_in_another_way_the_peak_is_measured_anew(train_tiny, tiny):
    reversible = AUTO | {"steps": 5, "run.memory": reversible_need(tiny, AUTO)}
    straight = peak_of(train_tiny(reversible))
    folder = train_tiny(AUTO | {"run.memory": "1 GiB"})
    assert peak_of(folder) > 1.2 * straight
    train_tiny(reversible, folder)
    assert peak_of(folder) == straight


def test_on_another_device_too_and_on_the_same_one_not(train_tiny, monkeypatch):
    folder = train_tiny({"steps": 3})
    measured = peak_of(folder)
    monkeypatch.setattr("crevnet.training_step.LiveMemory", _Doubled)
    train_tiny({"steps": 5}, folder)
    assert peak_of(folder) == measured
    monkeypatch.setattr("crevnet.training.trained_on", lambda *args: {"device_name": "another"})
    train_tiny({"steps": 7}, folder)
    assert peak_of(folder) == 2 * measured


class _Doubled(LiveMemory):
    """A device that takes twice the memory."""

    def __exit__(self, *error):
        super().__exit__(*error)
        self.peak *= 2


def test_measuring_memory_leaves_the_gradients_alone(trainer, tmp_path, tiny):
    one, other = trainer(folder=tmp_path / "one"), trainer(folder=tmp_path / "other")
    other._train_step(training_batch(other))  # so that its third and later steps are not measured
    other.step = 5
    other.raw_model.load_state_dict(one.raw_model.state_dict())
    other.optimiser.load_state_dict(one.optimiser.state_dict())
    for made in (one, other):
        made._train_step(training_batch(made))
    tiny.assert_equal(one.raw_model.state_dict(), other.raw_model.state_dict())


# --- memory against speed ---


def way_of(folder):
    return json.loads((folder / "metrics.json").read_text())["way"]


def test_with_memory_to_spare_training_is_stored_and_says_so(train_tiny, tiny, capsys):
    folder = train_tiny(AUTO)
    assert way_of(folder) == "stored"
    assert re.search(r"\nTraining stored: needs 0\.\d MiB of [\d,.]+ MiB\n", capsys.readouterr().out)
    assert load_config(folder / "config.yaml").model.mode == "auto"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_budget_gives_the_same_weights_bit_for_bit(precision, train_tiny, tiny, monkeypatch):
    options = AUTO | {"run.precision": precision}
    ways = tiny.config(None, options).model.ways(4)
    assert list(ways) == ["stored", "reversible", "reversible, states every 2 steps"]
    monkeypatch.setattr(
        "crevnet.training.training_bytes", lambda config, *args, **kw: 9 - list(ways.values()).index(config)
    )
    folders = [train_tiny(options | {"run.memory": need}) for need in (9, 8, 7)]
    assert [way_of(folder) for folder in folders] == list(ways)
    for folder in folders[1:]:
        tiny.assert_equal(tiny.weights(folder, 3), tiny.weights(folders[0], 3))


def test_a_resumed_run_keeps_its_way_as_long_as_that_fits(train_tiny, tiny, capsys):
    straight = train_tiny(AUTO | {"run.memory": "1 GiB"})
    folder = train_tiny(AUTO | {"run.memory": "0.1 GiB", "steps": 1})
    assert way_of(folder) == "stored"
    train_tiny(AUTO | {"run.memory": reversible_need(tiny, AUTO), "steps": 2}, folder)
    assert way_of(folder) == "reversible"
    train_tiny(AUTO | {"run.memory": "1 GiB"}, folder)
    assert way_of(folder) == "reversible"
    tiny.assert_equal(tiny.weights(folder, 3), tiny.weights(straight, 3))


def test_in_float_arithmetic_a_resumed_run_has_no_other_way(train_tiny, tiny):
    options = AUTO | {"model.arithmetic": "float"}
    folder = train_tiny(options | {"steps": 1})
    before = snapshot(folder / "checkpoints")
    need = reversible_need(tiny, options)
    with pytest.raises(
        NoWayFits,
        match=rf"no way to train fits into .*: the least is .*, stored; lower batch_size or raise run.memory; "
        rf"another batch_size needs another run.folder, since {folder} has checkpoints$",
    ):
        train_tiny(options | {"run.memory": need}, folder)
    assert snapshot(folder / "checkpoints") == before


def test_before_its_first_checkpoint_a_run_that_does_not_fit_may_be_begun_anew_in_the_same_folder(train_tiny, tmp_path):
    with pytest.raises(NoWayFits, match=r"raise run.memory$"):
        train_tiny(AUTO | {"run.memory": 1000, "steps": 1}, tmp_path)
    train_tiny(AUTO | {"steps": 1, "batch_size": 1}, tmp_path)
    assert way_of(tmp_path) == "stored"


def test_a_mode_that_is_set_is_not_measured(train_tiny, monkeypatch, capsys):
    monkeypatch.setattr("crevnet.training.training_bytes", None)
    folder = train_tiny({"steps": 1})
    assert way_of(folder) == "reversible"
    assert "\nTraining reversible\n" in capsys.readouterr().out


def test_a_budget_holds_for_a_mode_that_is_set(train_tiny):
    with pytest.raises(ValueError, match=r"fits into 0\.0 MiB: the least is 0\.\d MiB, reversible;"):
        train_tiny({"steps": 1, "run.memory": "1 KiB"})


def test_where_nothing_fits_no_step_is_made(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("crevnet.training.free_bytes", lambda device: 0)
    with pytest.raises(ValueError, match=r"lower batch_size or raise run\.memory"):
        train_tiny(AUTO, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_what_is_there_already_counts_as_free(trainer, monkeypatch):
    made = trainer(AUTO)
    made._train_step(training_batch(made))
    weights = sum(p.nbytes for p in made.raw_model.parameters())
    counters = sum(s["step"].nbytes for s in made.optimiser.state_dict()["state"].values())
    monkeypatch.setattr("crevnet.training.free_bytes", lambda device: 2**20)
    assert made.available_bytes() == pytest.approx(MARGIN * (2**20 + 3 * weights + counters))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes that share the memory of a machine
    assert made.available_bytes() == pytest.approx(MARGIN * (2**18 + 3 * weights + counters))
