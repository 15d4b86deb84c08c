"""Every model by its name, from the command line to its metrics."""

import inspect
import json

import pytest
import torch
from PIL import Image

from crevnet.clips import frames_to_clips
from crevnet.command import load_config, parse_train_config
from crevnet.evaluate import evaluate
from crevnet.models import MODELS
from crevnet.train import main
from crevnet.training import Trainer
from crevnet.video_model import VideoConfig, VideoModel

pytestmark = pytest.mark.usefixtures("single_thread")

SMALL = {
    "crevnet": {"clip": 2, "blocks": [1], "modules": 2},
    "convlstm": {"hidden": [4, 4], "kernel_size": 3},
    "predrnn": {"hidden": [4, 4], "kernel_size": 3},
    "predrnn++": {"hidden": [4, 4], "highway": 4, "kernel_size": 3},
    "frnn": {"front": [4], "front_kernel_size": 3, "widths": [4, 4], "kernel_sizes": [3, 3], "units": 1},
    "vpn": {"width": 4, "encoder_blocks": 1, "decoder_blocks": 1, "lstm_kernel_size": 3},
    "e3d-lstm": {"hidden": [4, 4], "kernel_size": 3},
    "stacked-rnn": {"clip": 2, "layers": 2, "hidden": 4},
    "unet-rnn": {"width": 2, "stages": 2, "modules": 2},
}
"""Options that make each model small."""

ABLATIONS = {
    "Stacked-RNN": ("stacked-rnn", {"stacking": "channels", "clip": 1, "layers": 2, "hidden": 4}),
    "3D Stacked-RNN": ("stacked-rnn", {"clip": 2, "layers": 2, "hidden": 4}),
    "UNet+StackedRNN": ("unet-rnn", {"predictor": "stacked", "width": 2, "stages": 2, "modules": 2}),
    "UNet+RPM": ("unet-rnn", {"width": 2, "stages": 2, "modules": 2}),
    "CrevNet w/o 3D": ("crevnet", {"stacking": "channels", "clip": 1, "blocks": [1, 1], "modules": 2}),
    "CrevNet w/o 3D, frames as channels": (
        "crevnet",
        {"stacking": "channels", "clip": 3, "blocks": [1, 1], "modules": 2},
    ),
    "CrevNet + 3D": ("crevnet", {"clip": 2, "blocks": [1, 1], "modules": 2}),
}
"""Rows of table 2: a model and its options, small."""

RUN = {
    "data.image_size": 16,
    "data.digit_size": 8,
    "data.num_digits": 1,
    "data.frames": 5,
    "data.test_sequences": 2,
    "run.device": "cpu",
    "run.threads": 1,
    "run.log_every": 1,
    "run.validation_sequences": 2,
    "optimiser.schedule": "constant",  # so that a run may be made longer
    "observed": 3,
    "batch_size": 2,
}


def words(folder, name, options, **run):
    """The command line of a small run."""
    options = {f"model.{k}": v for k, v in ({"image_size": 16} | options).items()}
    return ["--model", name, *(f"--{k}={v}" for k, v in (RUN | options | {"run.folder": folder} | run).items())]


@pytest.mark.parametrize("name", MODELS)
def test_trained_resumed_and_evaluated(name, tmp_path, capsys, monkeypatch):
    assert name in SMALL, f"test_models.SMALL has no options that make the model {name!r} small: add them"
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda *_: None)  # takes as long as the training
        assert main(words(folder, name, SMALL[name], steps=2)) == 0
    assert f"Run folder: {folder}" in capsys.readouterr().out
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 2
    assert main(words(folder, name, SMALL[name], steps=3)) == 0
    out = capsys.readouterr().out
    assert f"Going on from step 2 in {folder}" in out
    assert f"\n{name} " in out, "its row of the table"
    config = load_config(folder / "config.yaml").model
    assert type(config) is MODELS[name]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 3
    assert metrics["parameters"] == sum(p.numel() for p in config.build().parameters())
    with Image.open(folder / "predictions.png") as picture:
        picture.verify()
    again = evaluate(folder, device="cpu")
    for kind in ("mse", "ssim", "psnr"):
        assert again[kind] == pytest.approx(metrics[kind], rel=1e-6), kind
        assert len(again["per_frame"][kind]) == 2


@pytest.mark.parametrize("cell", ["convlstm", "stlstm"])
@pytest.mark.parametrize("row", ABLATIONS)
def test_every_row_of_table_2_learns(row, cell):
    name, options = ABLATIONS[row]
    config = parse_train_config("train", "", words("run", name, options | {"cell": cell}))
    model = config.model.build()
    clips = frames_to_clips(config.data.build_train().batch([0, 1]), config.model.clip, config.model.stacking)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model.loss(clips)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses
    given = config.data.build_test().batch([0, 1])[:, : config.observed]
    assert model.predict(given, config.predicted).shape == (2, 2, 1, 16, 16)


@pytest.mark.parametrize("name", MODELS)
class TestRegistration:
    """What the command line and the trainer count on."""

    def test_the_configuration_is_that_of_its_name(self, name):
        config = MODELS[name]()
        assert isinstance(config, VideoConfig)
        assert config.name == name
        with pytest.raises(ValueError, match=r"model\.name must be one of"):
            MODELS[name](name="another")

    def test_it_builds_a_model_that_predicts(self, name):
        small = {k: tuple(v) if isinstance(v, list) else v for k, v in SMALL[name].items()}
        model = MODELS[name](image_size=16, **small).build()
        assert isinstance(model, VideoModel)
        assert model.config.name == name
        frames = torch.rand(2, 3, 1, 16, 16)
        assert model.eval().predict(frames, 2).shape == (2, 2, 1, 16, 16)

    def test_frames_need_not_be_square(self, name):
        small = {k: tuple(v) if isinstance(v, list) else v for k, v in SMALL[name].items()}
        torch.manual_seed(0)
        wide = MODELS[name](image_size=(16, 32), channels=3, **small).build().eval()
        frames = torch.rand(2, 4, 3, 16, 32)
        assert wide.predict(frames, 1).shape == (2, 1, 3, 16, 32)
        clips = frames_to_clips(frames, wide.config.clip, wide.config.stacking)
        wide.loss(clips).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in wide.parameters())
        with pytest.raises(ValueError, match=r"model is built for .*16, 32\)"):
            wide.predict(torch.rand(2, 4, 3, 32, 16), 1)

    def test_every_option_says_what_it_is(self, name):
        own = [c for c in MODELS[name].__mro__ if issubclass(c, VideoConfig)]
        for cls in own:
            lines = inspect.getsource(cls).splitlines()
            for i, line in enumerate(lines):
                if line.startswith("    ") and line[4:5].isalpha() and ": " in line and " = " in line:
                    assert lines[i + 1].strip().startswith('"""'), f"{cls.__name__}: {line.strip()}"


def test_the_table_of_small_options_names_no_model_that_is_gone():
    assert set(SMALL) <= set(MODELS)
