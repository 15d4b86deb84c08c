import hashlib
import json
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch

from crevnet.checkpoint import DamagedCheckpoint, is_checkpoint, read_checkpoint
from crevnet.checkpoint_directory import CheckpointDirectory

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


def saved(directory, step, weights, state):
    """Save a checkpoint; returns its folder, the only one there."""
    directory.save(step, weights, state)
    return next(directory.path.glob("step-*"))


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
    assert saved(directory, 1200, weights, {}) == directory.path / "step-00001200"
    assert_equal(directory.load(1200).weights, weights)


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
    path = saved(directory, 7, weights_of(7), state_of(7))
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 7)
    for name in ("weights.safetensors", "state.pt"):
        data = (path / name).read_bytes()
        expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert manifest["files"][name] == expected
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)


def test_a_checkpoint_can_be_loaded_from_a_folder_copied_elsewhere(directory, tmp_path):
    saved(directory, 7, weights_of(7), state_of(7)).rename(tmp_path / "released")
    assert_holds(read_checkpoint(tmp_path / "released", None), 7)


def test_a_checkpoint_is_told_from_other_folders(directory, tmp_path):
    path = saved(directory, 7, weights_of(7), state_of(7))
    for name in FILES:
        assert is_checkpoint(path)
        (path / name).unlink()
    for other in (path, tmp_path, tmp_path / "nowhere"):
        assert not is_checkpoint(other)


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
    path = saved(directory, 3, weights_of(3), state_of(3)) / name
    damage(path)
    with pytest.raises(DamagedCheckpoint, match=rf"step-00000003/{name}: "):
        directory.load(3)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unnoticed(directory, name):
    """A flip in the white space of the manifest leaves it equivalent: the content is what was saved."""
    path = saved(directory, 3, weights_of(3), state_of(3)) / name
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
    path = saved(directory, 3, weights_of(3), state_of(3))
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
    path = saved(directory, 3, weights_of(3), state_of(3))
    torch.save({"innocent": [Bomb(tmp_path / "exploded")]}, tmp_path / "bomb.pt")
    forge(path, "state.pt", (tmp_path / "bomb.pt").read_bytes())
    with pytest.raises(DamagedCheckpoint, match=r"state.pt: refused .*mkdir"):
        directory.load(3)
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "exploded").exists(), "the bomb is a dud, so the test showed nothing"


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
def test_garbage_with_a_matching_manifest_is_refused(directory, name):
    forge(saved(directory, 3, weights_of(3), state_of(3)), name, b"not what it should be")
    with pytest.raises(DamagedCheckpoint, match=name):
        directory.load(3)


def test_a_state_that_is_no_dict_is_refused(directory, tmp_path):
    with pytest.raises(TypeError, match="must be a dict, not a list"):
        directory.save(3, {}, [1])
    torch.save([1], tmp_path / "list.pt")
    forge(saved(directory, 3, {}, {}), "state.pt", (tmp_path / "list.pt").read_bytes())
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
