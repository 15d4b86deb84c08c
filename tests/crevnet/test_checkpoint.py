import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch

from crevnet.checkpoint import CheckpointDirectory, DamagedCheckpoint

FILES = ["weights.safetensors", "state.pt", "manifest.json"]


def weights_of(step):
    return {"layer.weight": torch.full((3, 4), float(step)), "layer.bias": torch.arange(4) + step}


def state_of(step):
    return {"step": step, "optimizer": {"lr": 0.1 * step, "moments": [torch.full((2,), float(step))]}}


def assert_holds(checkpoint, step):
    """Compare a loaded checkpoint with what `save_steps` saved at a step."""
    assert checkpoint.step == step
    assert_equal(checkpoint.weights, weights_of(step))
    assert checkpoint.state["step"] == step
    assert checkpoint.state["optimizer"]["lr"] == 0.1 * step
    assert torch.equal(checkpoint.state["optimizer"]["moments"][0], torch.full((2,), float(step)))


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        raw, wanted = (t.contiguous().reshape(-1).view(torch.uint8) for t in (actual[name], tensor))
        assert torch.equal(raw, wanted), name


def save_steps(directory, *steps, **options):
    for step in steps:
        directory.save(step, weights_of(step), state_of(step), **options)


def snapshot(path):
    """Every visible file below a folder, with its content."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def hidden(path):
    return [entry.name for entry in path.iterdir() if entry.name.startswith(".") and entry.name != ".lock"]


@pytest.fixture
def directory(tmp_path):
    return CheckpointDirectory(tmp_path / "run" / "checkpoints")


# --- what is saved comes back ---


def test_round_trip_is_exact_for_every_dtype(directory):
    weights = {
        str(dtype): torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
    }
    weights["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    weights |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3)}
    path = directory.save(1200, weights, {})
    checkpoint = directory.load(1200)
    assert path == checkpoint.path == directory.path / "step-00001200"
    assert_equal(checkpoint.weights, weights)


def test_shared_strided_and_differentiable_tensors_come_back_equal_and_separate(directory):
    base = torch.arange(24.0).reshape(4, 6)
    weights = {
        "base": torch.nn.Parameter(base),
        "tied": base,
        "slice": base[1:3],
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.tensor([2.0]).expand(5),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    directory.save(1, weights, {})
    loaded = directory.load(1).weights
    assert_equal(loaded, {name: tensor.detach() for name, tensor in weights.items()})
    loaded["base"].add_(1)
    assert torch.equal(loaded["tied"], base)


def test_tied_modules_round_trip(directory):
    def tied():
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    saved, restored = tied(), tied()
    directory.save(1, saved.state_dict(), {})
    restored.load_state_dict(directory.load(1).weights)
    assert restored[0].weight is restored[1].weight
    assert_equal(restored.state_dict(), saved.state_dict())


def test_the_state_of_an_optimizer_and_a_generator_round_trips(directory):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "history": [(1, 0.5), (2, None)],
        "ordered": OrderedDict(a=1),
    }
    directory.save(1, model.state_dict(), state)
    loaded = directory.load(1).state
    assert torch.equal(loaded["rng"], state["rng"])
    assert loaded["history"] == state["history"]
    assert loaded["ordered"] == state["ordered"]
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    moment = loaded["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment, state["optimizer"]["state"][0]["exp_avg"])


def test_the_manifest_records_sizes_and_hashes(directory):
    path = directory.save(7, weights_of(7), state_of(7))
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 7)
    for name in ("weights.safetensors", "state.pt"):
        data = (path / name).read_bytes()
        expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert manifest["files"][name] == expected
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)


def test_a_checkpoint_can_be_loaded_from_a_folder_copied_elsewhere(directory, tmp_path):
    directory.save(7, weights_of(7), state_of(7)).rename(tmp_path / "released")
    assert_holds(CheckpointDirectory(tmp_path / "nowhere").load(tmp_path / "released"), 7)


def test_an_empty_directory_has_no_checkpoints(directory):
    assert directory.steps() == []
    assert directory.latest() is None
    assert directory.best() is None
    assert not directory.path.exists()
    with pytest.raises(FileNotFoundError, match=r"step-00000003"):
        directory.load(3)


# --- what is kept ---


def test_only_the_newest_and_the_best_are_kept(directory):
    save_steps(directory, 1)
    save_steps(directory, 2, best=True)
    save_steps(directory, 3, 4, 5, 6)
    assert directory.steps() == [2, 4, 5, 6]
    assert_holds(directory.best(), 2)
    assert_holds(directory.latest(), 6)
    save_steps(directory, 7, best=True)
    assert directory.steps() == [5, 6, 7]
    assert_holds(directory.best(), 7)
    assert hidden(directory.path) == []


def test_steps_are_ordered_as_numbers(directory):
    save_steps(directory, 99_999_999, 100_000_000)
    assert directory.steps() == [99_999_999, 100_000_000]
    assert_holds(directory.latest(), 100_000_000)


def test_unrelated_entries_are_neither_listed_nor_deleted(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=1)
    strangers = ["notes", "step-12", "step-000000001", "step-00000001.bak", "xstep-00000001"]
    for name in strangers:
        (tmp_path / name).mkdir()
    save_steps(directory, 2, 3)
    assert directory.steps() == [3]
    assert all((tmp_path / name).is_dir() for name in strangers)


def test_going_back_to_an_earlier_step_deletes_no_later_one_and_not_itself(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=2)
    save_steps(directory, 8, 9, 1, 2, 3)
    assert directory.steps() == [2, 3, 8, 9]


def test_saving_a_step_again_replaces_it(directory):
    save_steps(directory, 1, 2)
    directory.save(2, weights_of(50), state_of(50))
    assert directory.steps() == [1, 2]
    assert_equal(directory.load(2).weights, weights_of(50))
    assert hidden(directory.path) == []


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_nothing_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointDirectory(tmp_path, keep=keep)


def test_a_negative_step_is_refused(directory):
    with pytest.raises(ValueError, match="must not be negative"):
        directory.save(-1, {}, {})


# --- what is damaged is refused ---


def damage_by_truncating(path):
    path.write_bytes(path.read_bytes()[:-2])


def damage_by_emptying(path):
    path.write_bytes(b"")


def damage_by_appending(path):
    path.write_bytes(path.read_bytes() + b"x")


def damage_by_deleting(path):
    path.unlink()


def damage_by_a_folder_in_its_place(path):
    path.unlink()
    path.mkdir()


DAMAGES = [
    damage_by_truncating,
    damage_by_emptying,
    damage_by_appending,
    damage_by_deleting,
    damage_by_a_folder_in_its_place,
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(directory, name, damage):
    path = directory.save(3, weights_of(3), state_of(3)) / name
    damage(path)
    with pytest.raises(DamagedCheckpoint, match=rf"step-00000003/{name}: "):
        directory.load(3)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unnoticed(directory, name):
    """A flip in the white space of the manifest leaves it equivalent: the content is what was saved."""
    path = directory.save(3, weights_of(3), state_of(3)) / name
    whole = path.read_bytes()
    refused = 0
    positions = range(0, len(whole), max(1, len(whole) // 150))
    for position in positions:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            checkpoint = directory.load(3)
        except DamagedCheckpoint:
            refused += 1
        else:
            assert_holds(checkpoint, 3)
    assert refused >= (0.7 if name == "manifest.json" else 1) * len(positions)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ("\ud800", "not JSON"),
        ("{}", "format None"),
        ('{"format": 2}', "format 2, this program reads 1"),
        ('{"format": 1, "step": 3.0}', "step 3.0"),
        ('{"format": 1, "step": 4}', "step 4, its folder is of step 3"),
        ('{"format": 1, "step": 3, "files": {"../other": {}}}', "does not list"),
        ('{"format": 1, "step": 3, "files": {"weights.safetensors": 1, "state.pt": 2}}', "says None"),
    ],
)
def test_a_nonsensical_manifest_is_refused(directory, manifest, message):
    path = directory.save(3, weights_of(3), state_of(3))
    (path / "manifest.json").write_bytes(manifest.encode(errors="surrogatepass"))
    with pytest.raises(DamagedCheckpoint, match=message):
        directory.load(3)


def forge(path, name, data):
    """Replace a file, and make the manifest vouch for it, as an attacker could."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_state_is_not_run(directory, tmp_path):
    path = directory.save(3, weights_of(3), state_of(3))
    torch.save({"innocent": [Bomb(tmp_path / "exploded")]}, tmp_path / "bomb.pt")
    forge(path, "state.pt", (tmp_path / "bomb.pt").read_bytes())
    with pytest.raises(DamagedCheckpoint, match=r"state.pt: refused .*mkdir"):
        directory.load(3)
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "exploded").exists(), "the bomb is a dud, so the test showed nothing"


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
def test_garbage_with_a_matching_manifest_is_refused(directory, name):
    forge(directory.save(3, weights_of(3), state_of(3)), name, b"not what it should be")
    with pytest.raises(DamagedCheckpoint, match=name):
        directory.load(3)


def test_a_state_that_is_no_dict_is_refused(directory, tmp_path):
    with pytest.raises(TypeError, match="must be a dict, not a list"):
        directory.save(3, {}, [1])
    torch.save([1], tmp_path / "list.pt")
    forge(directory.save(3, {}, {}), "state.pt", (tmp_path / "list.pt").read_bytes())
    with pytest.raises(DamagedCheckpoint, match="holds a list"):
        directory.load(3)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"fine": 1, "a": {"b": [0, Bomb("x")]}}, r"state\['a'\]\['b'\]\[1\], a .*Bomb,"),
        ({"hook": lambda: 0}, r"state\['hook'\], a builtins.function,"),
        ({"loss": np.float64(3)}, r"state\['loss'\], a numpy.float64,"),
        ({"random": ("MT19937", np.zeros(3))}, r"state\['random'\]\[1\], a numpy.ndarray,"),
        ({np.float64(3): 1}, r"state, a builtins.dict,"),
    ],
)
def test_a_state_that_would_need_code_to_load_is_refused_before_anything_is_written(directory, state, named):
    with pytest.raises(TypeError, match=named + " cannot be saved") as caught:
        directory.save(1, {}, state)
    assert "False" not in str(caught.value), "it must not advise loading without the safeguard"
    assert not directory.path.exists()


# --- falling back ---


def test_latest_passes_over_damaged_checkpoints_loudly_and_leaves_them(directory):
    save_steps(directory, 1, 2, 3)
    damage_by_truncating(directory.path / "step-00000003" / "weights.safetensors")
    damage_by_deleting(directory.path / "step-00000002" / "manifest.json")
    before = snapshot(directory.path)
    with pytest.warns(RuntimeWarning, match="passing over") as caught:
        assert_holds(directory.latest(), 1)
    newer, older = (str(warning.message) for warning in caught)
    assert "step-00000003/weights.safetensors: bytes is" in newer
    assert "step-00000002/manifest.json: is missing" in older
    assert snapshot(directory.path) == before


def test_an_undamaged_latest_is_loaded_in_silence(directory):
    save_steps(directory, 1, 2)
    damage_by_truncating(directory.path / "step-00000001" / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(directory.latest(), 2)


def test_all_damaged_is_an_error_and_not_a_fresh_start(directory):
    save_steps(directory, 1, 2)
    for step in (1, 2):
        damage_by_emptying(directory.path / f"step-0000000{step}" / "state.pt")
    with pytest.warns(RuntimeWarning), pytest.raises(DamagedCheckpoint, match="all checkpoints") as caught:
        directory.latest()
    assert "step-00000001" in str(caught.value)
    assert "step-00000002" in str(caught.value)


def test_a_run_that_fell_back_replaces_what_was_damaged(directory):
    save_steps(directory, 1, 2, 3)
    damage_by_truncating(directory.path / "step-00000003" / "state.pt")
    save_steps(directory, 2, 3)
    assert_holds(directory.latest(), 3)


def test_a_damaged_best_checkpoint_is_an_error(directory):
    save_steps(directory, 1, best=True)
    save_steps(directory, 2)
    damage_by_truncating(directory.path / "step-00000001" / "state.pt")
    with pytest.raises(DamagedCheckpoint, match=r"step-00000001/state.pt"):
        directory.best()


def test_a_best_checkpoint_that_is_gone_is_an_error(directory):
    save_steps(directory, 1, best=True)
    (directory.path / "step-00000001").rename(directory.path / "moved")
    with pytest.raises(DamagedCheckpoint, match=r"best.json: names step 1, which is not there"):
        directory.best()


@pytest.mark.parametrize("content", ["", "7", "{}", '{"format": 1}', '{"format": 1, "step": -1}'])
def test_a_damaged_pointer_is_an_error_and_stops_deletion(directory, content):
    save_steps(directory, 1, best=True)
    (directory.path / "best.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"best.json"):
        directory.best()
    with pytest.warns(RuntimeWarning, match="deleting no old checkpoint"):
        save_steps(directory, 2, 3, 4, 5)
    assert directory.steps() == [1, 2, 3, 4, 5]


# --- failures and crashes while saving ---


class Failing:
    """Stands in for a function of `os`: fails at its n-th call, as a full disk or an interrupt would."""

    def __init__(self, function, at, error):
        self.function, self.left, self.error = function, at, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), OSError("unspecified"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: f"{type(error).__name__}-{error}")
@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "mkdir"])
@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step"])
def test_a_failure_anywhere_leaves_the_old_or_the_new(tmp_path, monkeypatch, step, name, error):
    for call in range(1, 20):
        directory = CheckpointDirectory(tmp_path / str(call), keep=1)
        save_steps(directory, 1, best=True)
        save_steps(directory, 2)
        failing = Failing(getattr(os, name), call, error)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            failure = failure_of_saving(directory, step)
        if failing.left > 0:
            break
        if isinstance(failure, OSError):
            assert f"the checkpoint of step {step}: " in str(failure)
            assert str(directory.path) in str(failure)
        assert not [entry for entry in hidden(directory.path) if entry.startswith(".saving-")]
        assert_holds_the_old_or_the_new(directory, step, new_only=failure is None)
        save_steps(directory, 4)
        assert hidden(directory.path) == []
    assert call > 1, f"os.{name} was never called"


def failure_of_saving(directory, step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failure to delete what is old does not fail the save
        try:
            directory.save(step, weights_of(50), state_of(50), best=True)
        except (OSError, KeyboardInterrupt) as error:
            return error
    return None


def assert_holds_the_old_or_the_new(directory, step, new_only):
    best, latest = directory.best(), directory.latest()
    is_new = latest.state["step"] == 50
    assert is_new or not new_only
    if is_new:
        assert latest.step == step
        assert_equal(latest.weights, weights_of(50))
    else:
        assert_holds(latest, 2)
    if best.step == 1:
        assert_holds(best, 1)
        assert not new_only
    else:
        assert is_new
        assert best.step == step


def test_a_write_to_a_full_disk_leaves_earlier_checkpoints_intact(directory):
    save_steps(directory, 1)
    before = snapshot(directory.path)
    with file_size_limit(50_000), pytest.raises(OSError, match=r"of step 2: .*checkpoints") as caught:
        directory.save(2, {"large": torch.zeros(100_000)}, {})
    assert caught.value.errno == errno.EFBIG
    assert snapshot(directory.path) == before
    assert hidden(directory.path) == []


@contextlib.contextmanager
def file_size_limit(size):
    """Make the system fail writes beyond a size, in the middle of a file."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


CRASHES = """
    import os, sys
    from pathlib import Path
    import torch
    from crevnet.checkpoint import CheckpointDirectory

    torch.set_num_threads(1)
    countdown = 0

    def die_at_the_nth_change(event, args):
        global countdown
        changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if event in changes or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa")):
            countdown -= 1
            if countdown == 0:
                os._exit(77)

    def weights(value):
        return {"w": torch.full((3,), float(value))}

    def check(directory, step):
        directory.best()
        latest = directory.latest()
        value = latest.state["value"]
        assert torch.equal(latest.weights["w"], torch.full((3,), float(value)))
        assert (latest.step, value) in ((2, 2), (step, 50)), (latest.step, value)
        assert set(directory.steps()) <= {1, 2, step}
        return value

    sys.addaudithook(die_at_the_nth_change)
    root, step = Path(sys.argv[1]), int(sys.argv[2])
    outcomes = []
    for crash in range(1, 100):
        directory = CheckpointDirectory(root / str(crash), keep=1)
        for value in (1, 2):
            directory.save(value, weights(value), {"value": value}, best=value == 1)
        child = os.fork()
        if child == 0:
            countdown = crash
            directory.save(step, weights(50), {"value": 50}, best=True)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
        outcomes.append(check(directory, step))
        directory.save(9, weights(9), {"value": 9})
        assert {entry.name for entry in directory.path.iterdir() if entry.name[0] == "."} == {".lock"}
        if not died:
            break
    assert not died
    print(*outcomes)
"""


@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step"])
def test_a_process_that_dies_at_any_change_of_the_disk_leaves_the_old_or_the_new(tmp_path, step):
    """A fresh process forks a child for every change that a save makes, to die just before it."""
    command = [sys.executable, "-c", textwrap.dedent(CRASHES), str(tmp_path), str(step)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    outcomes = result.stdout.split()
    assert outcomes == sorted(outcomes), "the change from the old to the new checkpoint happens once"
    assert outcomes.count("2") >= 6
    assert outcomes.count("50") >= 6


def test_leftovers_of_dead_saves_are_cleared_by_the_next(directory):
    save_steps(directory, 1)
    for name in (".saving-step-00000002-dead", ".removing-dead"):
        (directory.path / name).mkdir()
        (directory.path / name / "weights.safetensors").write_bytes(b"half")
    (directory.path / ".saving-best.json-dead").write_bytes(b"{")
    assert directory.steps() == [1]
    save_steps(directory, 2)
    assert hidden(directory.path) == []
    assert directory.steps() == [1, 2]


def test_what_cannot_be_deleted_is_reported_and_does_not_fail_the_save(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path, keep=1)
    save_steps(directory, 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", Failing(None, 1, PermissionError(errno.EACCES, "Permission denied")))
        with pytest.warns(RuntimeWarning, match=r"could not delete .*Permission denied"):
            save_steps(directory, 2)
    assert directory.steps() == [2]
    save_steps(directory, 3)
    assert hidden(directory.path) == []


def test_saves_of_two_threads_take_turns(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=50)
    parts = (range(0, 20, 2), range(1, 20, 2))
    threads = [threading.Thread(target=save_steps, args=(directory, *steps)) for steps in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert directory.steps() == list(range(20))
    for step in range(20):
        assert_holds(directory.load(step), step)
