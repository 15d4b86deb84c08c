import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crevnet.export import export_predictor, save_predictor
from crevnet.model import CrevNetConfig
from crevnet.packaged import DESCRIPTION, load_predictor

OBSERVED, STEPS, CHANNELS, SIZE = 3, 2, 2, (8, 16)


def frames_of(batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, OBSERVED, CHANNELS, *SIZE, generator=generator)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"cell": "convlstm", "stacking": "channels", "clip": 1, "blocks": (1,), "modules": 1}
    return CrevNetConfig(channels=CHANNELS, image_size=SIZE, arithmetic="float", **options).build().eval()


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    """Not to be written to."""
    path = tmp_path_factory.mktemp("package") / "new" / "predictor.pt2"
    save_predictor(model, path, OBSERVED, STEPS)
    return path


@pytest.fixture(scope="module")
def predictor(package):
    return load_predictor(package)


# --- what it predicts ---


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_number_of_sequences(batch, model, predictor):
    found = predictor(frames_of(batch))
    assert found.shape == (batch, STEPS, CHANNELS, *SIZE)
    torch.testing.assert_close(found, model.predict(frames_of(batch), STEPS), rtol=1e-6, atol=1e-7)


def test_it_says_what_it_takes(predictor):
    found = predictor.signature
    assert (found.model, found.observed, found.steps, found.compiled_for) == ("crevnet", OBSERVED, STEPS, None)
    assert (found.channels, found.image_size) == (CHANNELS, SIZE)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_arrays_in_arrays_out(dtype, predictor):
    array = frames_of().numpy().astype(dtype)
    found = predictor(array)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert np.array_equal(found, predictor(torch.from_numpy(array)).numpy())


def test_arrays_with_other_strides(predictor):
    array = frames_of().numpy()
    array.flags.writeable = False
    assert np.array_equal(predictor(array[:, :, :, ::-1]), predictor(array[:, :, :, ::-1].copy()))


def test_predictions_have_no_graph(predictor):
    assert not predictor(frames_of().requires_grad_()).requires_grad


def test_a_package_may_be_renamed(package, predictor, tmp_path):
    path = tmp_path / "other name.pt2"
    path.write_bytes(package.read_bytes())
    assert torch.equal(load_predictor(str(path))(frames_of()), predictor(frames_of()))


def test_on_another_device(package):
    predictor = load_predictor(package, "meta")  # where no tensor may be left on the CPU
    found = predictor(frames_of())
    assert (found.device.type, found.shape) == ("meta", (2, STEPS, CHANNELS, *SIZE))


# --- what it refuses ---


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 2, 8, 16),
        (2, 3, 1, 8, 16),
        (2, 3, 2, 16, 8),
        (2, 3, 2, 8, 4),
        (3, 2, 8, 16),
        (0, 3, 2, 8, 16),
        (1, 2, 3, 2, 8, 16),
    ],
)
def test_another_shape_is_named(shape, predictor):
    for frames in (torch.rand(shape), np.zeros(shape)):
        with pytest.raises(ValueError, match=r"of shape \[B, 3, 2, 8, 16\] with B at least 1, got \[") as error:
            predictor(frames)
        assert str(error.value).endswith(f"got {list(shape)}")


def test_bytes_are_refused(predictor):
    with pytest.raises(ValueError, match=r"floats in 0 .. 1, got torch.uint8; divide bytes by 255"):
        predictor((frames_of() * 255).to(torch.uint8))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.pt2: no such file"):
        load_predictor(tmp_path / "nothing.pt2")


@pytest.mark.parametrize("content", [b"", b"damage", b"PK\x03\x04"])
def test_what_is_no_package(content, tmp_path):
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pt2 is damaged, or no package"):
        load_predictor(path)


@pytest.mark.parametrize("part", [0.2, 0.7, 0.999])
def test_a_package_that_was_cut_off(part, package, tmp_path):
    path = tmp_path / "x.pt2"
    path.write_bytes(package.read_bytes()[: int(part * package.stat().st_size)])
    with pytest.raises(ValueError, match=r"x.pt2 (is damaged, or no package|holds no predictor)"):
        load_predictor(path)


@settings(max_examples=20)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_damage_never_changes_a_prediction(where, bit, package, predictor, tmp_path_factory):
    content = bytearray(package.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path = tmp_path_factory.mktemp("damaged") / "x.pt2"
    path.write_bytes(content)
    with suppress(ValueError):
        # What is between the files of the archive does not matter.
        assert torch.equal(load_predictor(path)(frames_of()), predictor(frames_of()))


def test_a_damaged_weight(package, tmp_path):
    content = bytearray(package.read_bytes())
    content[content.index(b"data/weights/weight_0") + 100] ^= 1
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pt2 is damaged: .*weight_0 in it is not what was written"):
        load_predictor(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no predictor.json, which python -m crevnet.export writes"),
        ({DESCRIPTION: "{"}, "Expecting property name"),
        ({DESCRIPTION: json.dumps({"frames": 3})}, "unexpected keyword argument 'frames'"),
    ],
)
def test_a_package_of_something_else(files, message, model, tmp_path):
    torch.export.save(export_predictor(model, 1, 1), tmp_path / "x.pt2", extra_files=files)
    with pytest.raises(ValueError, match=rf"x.pt2 holds no predictor that PyTorch .* can load: .*{message}"):
        load_predictor(tmp_path / "x.pt2")
