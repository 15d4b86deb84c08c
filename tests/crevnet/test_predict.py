import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from crevnet.data import DataError, MovingMNISTConfig, array_files
from crevnet.predict import predict
from crevnet.run import load_run

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def sequence(finished_run):
    """The second sequence of the run's test set, [T, C, H, W]."""
    return load_run(finished_run, "best", torch.device("cpu")).config.data.build_test().batch([1])[0]


@pytest.fixture
def expected(finished_run, sequence):
    """What the model predicts from its first three frames."""
    model = load_run(finished_run, "best", torch.device("cpu")).model
    return model.predict(sequence[None, :3], 3)[0].clamp(0, 1).numpy()


def arrays(path):
    with np.load(path) as read:
        return dict(read)


# --- what comes out ---


def test_arrays_of_a_test_sequence(finished_run, sequence, expected, tmp_path, capsys):
    predict(finished_run, tmp_path / "new" / "x.npz", index=1, device="cpu")
    found = arrays(tmp_path / "new" / "x.npz")
    assert sorted(found) == ["observed", "prediction", "target"]
    assert np.array_equal(found["observed"], sequence[:3])
    assert np.array_equal(found["target"], sequence[3:])
    assert np.array_equal(found["prediction"], expected)
    assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}
    assert capsys.readouterr().out == f"3 frames predicted from 3: {tmp_path}/new/x.npz\n"


def test_sequences_are_made_as_long_as_is_asked_for(finished_run, sequence, tmp_path):
    data = load_run(finished_run, "best", torch.device("cpu")).config.data
    predict(finished_run, tmp_path / "x.npz", index=1, observed=7, steps=4, device="cpu")
    found = arrays(tmp_path / "x.npz")
    assert {k: len(v) for k, v in found.items()} == {"observed": 7, "prediction": 4, "target": 4}
    assert np.array_equal(found["observed"][:6], sequence)
    assert np.array_equal(found["target"], data.build_test(11).batch([1])[0, 7:])


def test_a_target_only_where_the_sequence_goes_on(finished_run, sequence, tmp_path, monkeypatch):
    """Videos end, and so does the truth."""
    build = MovingMNISTConfig.build_test

    def ended(self, frames=None):
        if frames is not None:
            raise DataError(f"no video has the {frames} frames of a sequence")
        return build(self)

    monkeypatch.setattr(MovingMNISTConfig, "build_test", ended)
    for observed, steps, target in ((5, 4, 1), (6, 2, None)):
        predict(finished_run, tmp_path / "x.npz", index=1, observed=observed, steps=steps, device="cpu")
        found = arrays(tmp_path / "x.npz")
        expected = {"observed": observed, "prediction": steps} | ({"target": target} if target else {})
        assert {k: len(v) for k, v in found.items()} == expected
        if target:
            assert np.array_equal(found["target"], sequence[5:])


def test_several_sequences(finished_run, sequence, expected, tmp_path):
    predict(finished_run, tmp_path / "x.npz", index=1, count=3, device="cpu")
    found = arrays(tmp_path / "x.npz")
    assert {k: v.shape for k, v in found.items()} == dict.fromkeys(found, (3, 3, 1, 16, 16))
    assert np.array_equal(found["observed"][0], sequence[:3])
    np.testing.assert_allclose(found["prediction"][0], expected, rtol=0, atol=1e-3)  # rounds elsewhere in a batch
    sizes = []
    for count in (1, 5):
        predict(finished_run, tmp_path / "x.png", count=count, device="cpu")
        with Image.open(tmp_path / "x.png") as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] - sizes[0][1] == 4 * (2 * 64 + 2 + 12)  # all five, one below the other


def test_another_checkpoint(finished_run, expected, tmp_path):
    predict(finished_run, tmp_path / "x.npz", index=1, checkpoint="22", device="cpu")
    assert not np.array_equal(arrays(tmp_path / "x.npz")["prediction"], expected)


@pytest.mark.parametrize(("observed", "steps"), [(None, None), (6, 2), (4, 5), (2, 1)])
def test_an_animation_has_a_frame_for_every_time_step(observed, steps, finished_run, tmp_path):
    predict(finished_run, tmp_path / "x.gif", observed=observed, steps=steps, device="cpu")
    with Image.open(tmp_path / "x.gif") as image:
        image.verify()
    with Image.open(tmp_path / "x.gif") as image:
        assert image.format == "GIF"
        assert image.n_frames == (observed or 3) + (steps or 3)


@pytest.mark.parametrize(("observed", "steps"), [(None, None), (6, 2)])
def test_a_picture(observed, steps, finished_run, tmp_path):
    predict(finished_run, tmp_path / "x.png", observed=observed, steps=steps, device="cpu")
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG"
        image.load()
        assert image.width > 64 * ((observed or 3) + (steps or 3))
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


# --- what goes in ---


@pytest.mark.parametrize("kind", ["npy", "npz", "gif", "folder"])
def test_a_sequence_of_ones_own(kind, finished_run, sequence, expected, tmp_path):
    pixels = (sequence[:, 0] * 255).round().numpy().astype(np.uint8)
    path = tmp_path / f"own.{kind}"
    if kind == "npy":
        np.save(path, sequence.numpy())
    elif kind == "npz":
        np.savez(path, frames=pixels, other=np.zeros(3))
    elif kind == "gif":
        first, *rest = [Image.fromarray(frame) for frame in pixels]
        first.save(path, save_all=True, append_images=rest)
    else:
        path.mkdir()
        for i, frame in enumerate(pixels):
            Image.fromarray(frame).save(path / f"{i}.png")
    predict(finished_run, tmp_path / "x.npz", sequence=path, device="cpu")
    found = arrays(tmp_path / "x.npz")
    assert np.array_equal(found["observed"], sequence[:3])
    assert np.array_equal(found["target"], sequence[3:])
    assert np.array_equal(found["prediction"], expected)


def test_a_sequence_of_another_size_is_cropped_and_resized(finished_run, sequence, tmp_path):
    larger = np.repeat(np.repeat(sequence[:, 0], 2, axis=1), 2, axis=2)  # its area average is the sequence
    np.save(tmp_path / "own.npy", np.pad(larger, ((0, 0), (0, 0), (5, 5))))
    predict(finished_run, tmp_path / "x.npz", sequence=tmp_path / "own.npy", device="cpu")
    observed = arrays(tmp_path / "x.npz")["observed"]
    assert observed.shape == sequence[:3].shape
    assert np.corrcoef(observed.ravel(), sequence[:3].ravel())[0, 1] > 0.95


def test_no_more_is_decoded_than_is_shown(finished_run, sequence, expected, tmp_path, monkeypatch):
    """A film may be hours long; here what follows would even be refused."""
    values = np.concatenate([sequence.numpy(), np.full((100, 1, 16, 16), np.nan, np.float32)])
    monkeypatch.setattr(array_files, "_CHUNK", 1)
    np.save(tmp_path / "own.npy", values)
    predict(finished_run, tmp_path / "x.npz", sequence=tmp_path / "own.npy", device="cpu")
    assert np.array_equal(arrays(tmp_path / "x.npz")["prediction"], expected)
    assert np.array_equal(arrays(tmp_path / "x.npz")["target"], sequence[3:])


@pytest.mark.parametrize("every", [1, 2, 5])
def test_one_of_so_many_frames(every, finished_run, sequence, expected, tmp_path):
    between = np.zeros((6, every, 1, 16, 16), np.float32)
    between[:, 0] = sequence
    np.save(tmp_path / "own.npy", between.reshape(-1, 1, 16, 16))
    predict(finished_run, tmp_path / "x.npz", sequence=tmp_path / "own.npy", every=every, device="cpu")
    assert np.array_equal(arrays(tmp_path / "x.npz")["prediction"], expected)
    np.save(tmp_path / "own.npy", np.zeros((18, 16, 16), np.uint8))
    with pytest.raises(ValueError, match="at most the 2 frames of the sequence, one of 9 kept, got 3"):
        predict(finished_run, tmp_path / "x.npz", sequence=tmp_path / "own.npy", every=9, device="cpu")


# --- the command line ---


def main(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["crevnet.predict", *map(str, options)])
    monkeypatch.delitem(sys.modules, "crevnet.predict")  # as if nobody had imported it
    runpy.run_module("crevnet.predict", run_name="__main__")


def test_the_command_line(finished_run, expected, tmp_path, monkeypatch):
    main(monkeypatch, finished_run, tmp_path / "x.npz", "--index", 1, "--steps", 2, "--device", "cpu")
    assert np.array_equal(arrays(tmp_path / "x.npz")["prediction"], expected[:2])


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("x.mp4", [], "x.mp4: the output must be a .gif, .png or .npz file"),
        ("x.npz", ["--index", 5], "index must be 0 to 4, got 5"),
        ("x.npz", ["--index", -1], "index must be 0 to 4, got -1"),
        ("x.npz", ["--observed", 1], "observed must be at least the model's clip (2)"),
        ("x.npz", ["--count", 0], "count must be at least 1, got 0"),
        ("x.npz", ["--index", 2, "--count", 4], "count must be at most 3 from index 2 on, got 4"),
        ("x.npz", ["--index", 0, "--sequence", "/nonexistent.npy"], "index and count are for sequences of the run's"),
        ("x.npz", ["--count", 2, "--sequence", "/nonexistent.npy"], "leave them out with --sequence"),
        ("x.npz", ["--every", 2], "every is for the frames of a sequence of your own: give --sequence too"),
        ("x.npz", ["--every", 0, "--sequence", "/nonexistent.npy"], "every must be at least 1, got 0"),
        ("x.npz", ["--observed", -9], "observed must be at least the model's clip (2), got -9"),
        ("x.npz", ["--steps", 0], "steps must be at least 1, got 0"),
        ("x.npz", ["--checkpoint", "3"], "no such checkpoint, there are steps"),
        ("x.npz", ["--sequence", "/nonexistent.npy"], "/nonexistent.npy: no such file or folder"),
    ],
)
def test_mistakes_end_with_a_message_and_write_nothing(output, options, message, finished_run, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, finished_run, tmp_path / output, *options)
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.mp4", "file/x.gif"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    name, finished_run, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("crevnet.predict.load_run", None)
    with pytest.raises((OSError, ValueError), match=r"cannot be written, choose another place|must be a \.gif"):
        predict(finished_run, tmp_path / name, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((6, 3, 16, 16), np.uint8), "an array of shape (6, 3, 16, 16), but 1 channel(s) take [T, 1, H, W]"),
        (np.zeros((2, 16, 16), np.uint8), "at most the 2 frames of the sequence, got 3"),
        (np.array([{"a": 1}]), "not a readable array file: Array can't be memory-mapped"),
        (b"damage", "not a readable array file"),
    ],
    ids=["channels", "short", "pickle", "damage"],
)
def test_a_sequence_that_does_not_fit_ends_with_a_message(content, message, finished_run, tmp_path, monkeypatch):
    path = tmp_path / "own.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, finished_run, tmp_path / "x.gif", "--sequence", path)
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert not (tmp_path / "x.gif").exists()
