"""Training on people's own videos, from the command line to predictions of another film."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from crevnet.evaluate import evaluate
from crevnet.predict import predict
from crevnet.train import main

pytestmark = pytest.mark.usefixtures("single_thread")

OPTIONS = {
    "data.name": "videos",
    "data.channels": 3,
    "data.image_size": [16, 24],
    "data.digit_size": None,
    "data.num_digits": None,
    "model.channels": 3,
    "model.image_size": [16, 24],
    "steps": 4,
}


def moving_square(length, seed):
    """Colour frames `[T, 20, 40, 3]` of a square that goes its way."""
    frames = np.zeros((length, 20, 40, 3), np.uint8)
    for t in range(length):
        frames[t, 4:12, (2 * t + seed) % 32 : (2 * t + seed) % 32 + 8] = (255, 120, 40)
    return frames


@pytest.fixture
def folder(tmp_path):
    """A folder of images, a GIF and an array; and a test set beside it."""
    (tmp_path / "films" / "images").mkdir(parents=True)
    for t, frame in enumerate(moving_square(30, 0)):
        Image.fromarray(frame).save(tmp_path / "films" / "images" / f"{t:03}.png")
    first, *rest = map(Image.fromarray, moving_square(30, 5))
    first.save(tmp_path / "films" / "a.gif", save_all=True, append_images=rest)
    np.save(tmp_path / "films" / "b.npy", moving_square(30, 9))
    np.save(tmp_path / "other.npy", moving_square(20, 3))
    return tmp_path / "films"


@pytest.fixture
def run(tiny, folder, tmp_path):
    """Runs the command line with options."""

    def train(name="run", **options):
        words = tiny.arguments(tmp_path / name, OPTIONS | {"data.train": folder} | options)
        return main([word for word in words if not word.endswith("=null")])

    return train


def test_frames_that_cannot_be_drawn_are_measured_all_the_same(run, folder, tmp_path, capsys):
    flow = np.random.default_rng(0).random((30, 2, 16, 24), np.float32)
    np.save(tmp_path / "flow.npy", flow)
    assert run(**{"data.train": tmp_path / "flow.npy", "data.channels": 2, "model.channels": 2, "steps": 1}) == 0
    out = capsys.readouterr().out
    assert "No pictures of predictions: frames of 2 channels are not drawn\n" in out
    assert "copy last frame" in out
    assert sorted(p.name for p in (tmp_path / "run").glob("*.[pgj]*")) == ["loss.png", "metrics.json"]


def test_trained_evaluated_and_used(run, tmp_path, capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert f"Test videos, held out of {tmp_path}/films, 3 sequences" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["data"] == f"videos in {tmp_path}/films"
    with Image.open(tmp_path / "run" / "predictions.png") as picture:
        assert picture.mode == "RGB"
    assert evaluate(tmp_path / "run", device="cpu")["mse"] == pytest.approx(metrics["mse"], rel=1e-6)
    other = evaluate(tmp_path / "run", device="cpu", test=tmp_path / "other.npy")
    assert other["sequences"] == 5  # data.test_sequences, of 15 windows
    with pytest.raises(ValueError, match=r"the longest has 6; lower --frames .* or name other videos with --test"):
        evaluate(tmp_path / "run", device="cpu", frames=9)
    longer = evaluate(tmp_path / "run", device="cpu", test=tmp_path / "other.npy", frames=9)
    assert len(longer["per_frame"]["mse"]) == 6
    predict(tmp_path / "run", tmp_path / "x.npz", sequence=tmp_path / "other.npy", device="cpu")
    with np.load(tmp_path / "x.npz") as found:
        assert found["prediction"].shape == (3, 3, 16, 24)
    with pytest.raises(ValueError, match="num_digits, root does not apply to the data of this run, videos"):
        evaluate(tmp_path / "run", device="cpu", num_digits=2, root=tmp_path)


def test_a_run_goes_on_bit_for_bit_with_or_without_a_cache(run, tiny, tmp_path):
    assert run("whole", **{"optimiser.schedule": "constant"}) == 0
    assert run("parts", **{"optimiser.schedule": "constant", "steps": 2}) == 0
    shutil.rmtree(tmp_path / "parts" / "tensorboard")
    assert run("parts", **{"optimiser.schedule": "constant", "data.cache": tmp_path / "cache"}) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 3
    tiny.assert_equal(tiny.weights(tmp_path / "parts", 4), tiny.weights(tmp_path / "whole", 4))


def test_ones_own_film_is_thinned_as_the_test_videos_are(run, tmp_path):
    """So that the model sees things move as fast as it was trained for."""
    options = {"data.every": 2, "data.test": tmp_path / "other.npy", "data.test_every": 3, "steps": 1}
    assert run(**options) == 0
    film = moving_square(40, 7)
    for every, thinned in ((3, film[::3]), (5, film[::5])):
        np.save(tmp_path / "film.npy", film)
        np.save(tmp_path / "thinned.npy", thinned)
        default = {} if every == 3 else {"every": every}
        predict(tmp_path / "run", tmp_path / "a.npz", sequence=tmp_path / "film.npy", device="cpu", **default)
        predict(tmp_path / "run", tmp_path / "b.npz", sequence=tmp_path / "thinned.npy", device="cpu", every=1)
        with np.load(tmp_path / "a.npz") as found, np.load(tmp_path / "b.npz") as expected:
            assert sorted(found) == ["observed", "prediction", "target"]
            assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_it_learns(run, tmp_path):
    assert run(**{"steps": 40, "optimiser.learning_rate": 5e-3, "model.modules": 1}) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mse"] < 0.8 * metrics["copy_last_frame"]["mse"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.channels": 1}, "model.channels is 1, but the frames of videos in"),
        ({"data.image_size": 16}, "data.image_size 16 and model.image_size 16 x 24 differ; set both"),
        ({"data.num_digits": 2}, "num_digits"),
        ({"data.train": None}, "data.train"),
    ],
)
def test_mistakes_in_options(options, message, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(**options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [({"data.frames": 31}, "no video has the 31 frames"), ({"data.train": "none"}, "none: no such file or folder")],
)
def test_mistakes_in_files(options, message, run, capsys):
    assert run(**options) == 1
    assert message in capsys.readouterr().err
