import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import crevnet.video_model
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import load_config
from crevnet.training import TrainingDiverged, feeding_plan, summary
from revgrad import ReversibilityError

pytestmark = pytest.mark.usefixtures("single_thread")


def snapshot(folder):
    """Every file below a folder, with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def training_batch(trainer, batch_size=2):
    return trainer.config.data.build_train().batch(range(batch_size))


# --- a run from start to end ---


def test_metrics_are_written_with_everything_that_is_promised(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert set(metrics) == {
        "mse", "ssim", "psnr", "per_frame", "sequences", "copy_last_frame", "step", "steps", "seconds",
        "peak_activation_bytes", "way", "parameters", "digits", "data_range",
    }  # fmt: skip
    assert set(metrics["copy_last_frame"]) == {"mse", "ssim", "psnr"}
    assert {k: len(v) for k, v in metrics["per_frame"].items()} == {"mse": 3, "ssim": 3, "psnr": 3}
    assert (metrics["sequences"], metrics["steps"], metrics["data_range"]) == (5, 24, 1.0)
    assert metrics["digits"] == "embedded in scikit-learn"
    weights = load_file(finished_run / "checkpoints" / "step-00000024" / "weights.safetensors")
    assert metrics["parameters"] == sum(x.numel() for x in weights.values())
    assert metrics["seconds"] > 0
    assert metrics["peak_activation_bytes"] > 0
    assert all(math.isfinite(metrics[k]) for k in ("mse", "ssim", "psnr"))


def test_the_weights_that_are_reported_are_the_best_by_validation(finished_run, tiny):
    steps = [int(s) for s in tiny.column(finished_run, "step", "validation")]
    errors = [float(e) for e in tiny.column(finished_run, "mse", "validation")]
    assert steps == [10, 20, 24]
    best = steps[errors.index(min(errors))]
    assert json.loads((finished_run / "metrics.json").read_text())["step"] == best
    assert CheckpointDirectory(finished_run / "checkpoints").best().step == best
    assert tiny.state(finished_run, 24)["best_mse"] == pytest.approx(min(errors), rel=1e-6)


def test_pictures_are_written_and_whole(finished_run):
    for name in ("predictions.png", "loss.png"):
        with Image.open(finished_run / name) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 100
    with Image.open(finished_run / "predictions.gif") as image:
        assert image.n_frames == 6
        for i in range(6):
            image.seek(i)
            image.load()


def test_a_test_set_smaller_than_the_picture_grid(train_tiny):
    folder = train_tiny({"steps": 1, "data.test_sequences": 3}, pictures=True)
    assert json.loads((folder / "metrics.json").read_text())["sequences"] == 3
    assert (folder / "predictions.png").exists()


def test_every_step_is_logged_once_with_its_learning_rate(finished_run, tiny):
    assert [int(s) for s in tiny.column(finished_run, "step")] == list(range(1, 25))
    optimiser = load_config(finished_run / "config.yaml").optimiser
    rates = [float(r) for r in tiny.column(finished_run, "learning_rate")]
    assert rates == pytest.approx([optimiser.rate(step, 24) for step in range(24)], rel=1e-6)
    assert rates[0] < rates[2] == 5e-3 > rates[-1]


def test_tensorboard_has_what_the_csv_files_have(finished_run, tiny):
    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    losses = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("train/loss")]
    assert losses == list(enumerate(map(float, tiny.column(finished_run, "loss")), start=1))
    assert [e.step for e in events.Scalars("validation/mse")] == [10, 20, 24]


def test_logs_and_checkpoints_come_as_often_as_configured(train_tiny, tiny):
    options = {"steps": 7, "run.log_every": 3, "run.checkpoint_every": 2, "run.validate_every": 100, "run.keep": 2}
    folder = train_tiny(options)
    assert tiny.column(folder, "step") == ["3", "6", "7"]
    assert tiny.column(folder, "step", "validation") == ["7"]
    assert CheckpointDirectory(folder / "checkpoints").steps() == [6, 7]


@pytest.mark.parametrize(
    "options",
    [
        {"model.cell": "convlstm"},
        {"model.cell": "stlstm"},
        {"model.cell": "stlstm", "model.stacking": "channels"},
        {"model.cell": "convlstm", "model.stacking": "channels", "model.norm": "batch"},
        {"feeding.kind": "free", "model.keep_states_every": 2},
        {"feeding.kind": "free", "model.cell_states": "inverted", "model.cell": "stlstm"},
        {"model.mode": "checkpoint", "model.arithmetic": "float"},
        {"run.precision": "bf16-mixed", "model.cell": "stlstm"},
        {"run.precision": "bf16-mixed", "model.cell": "stlstm", "model.arithmetic": "float"},
        {"run.precision": "bf16-mixed", "model.cell": "stlstm", "model.mode": "stored"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_training_decreases_the_loss(options, trainer):
    trainer = trainer(options | {"optimiser.learning_rate": 1e-2})
    batch = training_batch(trainer)
    losses = [trainer._train_step(batch)[0] for _ in range(8)]
    assert losses[-1] < 0.85 * losses[0]


def test_a_run_without_steps_measures_the_random_weights(train_tiny):
    folder = train_tiny({"steps": 0}, pictures=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["step"], metrics["peak_activation_bytes"]) == (0, 0)
    assert not (folder / "loss.png").exists()


def test_the_first_steps_are_adam_on_the_mean_squared_error(trainer, tiny):
    """Written out by hand, in stored autograd."""
    trainer = trainer({"optimiser.learning_rate": 1e-3, "optimiser.betas": [0.8, 0.95], "optimiser.clip_norm": 0.01})
    config = trainer.config
    config.model.mode = "stored"
    torch.manual_seed(config.seed)
    model = config.model.build()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.8, 0.95))
    for step in range(3):
        frames = config.data.build_train().batch(range(2 * step, 2 * step + 2))
        clips = torch.stack([frames[:, t : t + 2].transpose(1, 2) for t in range(5)], dim=1)
        loss = (model(clips[:, :-1]) - clips[:, 1:]).square().mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 0.01 / (float(norm) + 1e-6))
        adam.step()
        found_loss, found_norm = trainer._train_step(frames)
        assert found_loss == pytest.approx(loss.item(), rel=1e-5)
        assert found_norm == pytest.approx(float(norm), rel=1e-5)
    for (name, p), q in zip(trainer.raw_model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=2e-6), name


# --- feeding ---


def test_the_observed_clips_are_always_given(tiny):
    # 5 clips of 2 frames, of which 2 lie within the 3 observed frames
    assert feeding_plan(tiny.config(options={"feeding.kind": "free"}), 4, 0) == [True, True, False, False]
    assert feeding_plan(tiny.config(options={"feeding.kind": "teacher"}), 4, 0) == [True] * 4


def test_the_plan_is_a_pure_function_of_configuration_and_step(tiny):
    scheduled = {"feeding.kind": "scheduled", "feeding.fall_to": 100}
    config = tiny.config(options=scheduled)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    plans = [feeding_plan(config, 64, step) for step in range(0, 100, 10)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert [feeding_plan(tiny.config(options=scheduled), 64, step) for step in range(0, 100, 10)] == plans
    assert len({tuple(plan) for plan in plans}) == len(plans)
    assert feeding_plan(tiny.config(options=scheduled | {"seed": 1}), 64, 50) != plans[5]


def test_scheduled_feeding_gives_the_truth_as_often_as_it_says(tiny):
    config = tiny.config(options={"feeding.kind": "scheduled", "feeding.fall_from": 100, "feeding.fall_to": 200})
    for step, probability in ((0, 1), (100, 1), (125, 0.75), (175, 0.25), (200, 0), (999, 0)):
        plan = feeding_plan(config, 4000, step)
        assert plan[:2] == [True, True]
        assert sum(plan[2:]) / 3998 == pytest.approx(probability, abs=0.03)


def test_the_loss_of_free_running_differs_from_that_of_teacher_forcing(trainer, tmp_path):
    one, other = (
        trainer({"feeding.kind": kind}, tmp_path / kind)._train_step(training_batch(trainer()))[0]
        for kind in ("teacher", "free")
    )
    assert one != other


# --- divergence ---


def test_a_weight_that_is_nan_stops_the_run_and_names_the_step(trainer):
    trainer = trainer({"steps": 9, "run.checkpoint_every": 2})
    for _ in range(2):
        trainer._train_step(training_batch(trainer))
    trainer.save()
    before = snapshot(trainer.folder / "checkpoints")
    with torch.no_grad():
        parameter = next(trainer.raw_model.parameters())
        parameter[(0,) * parameter.ndim] = math.nan
    with pytest.raises(TrainingDiverged, match="step 3: "):
        trainer.fit()
    assert trainer.step == 2
    assert snapshot(trainer.folder / "checkpoints") == before


def test_a_loss_that_is_not_finite_is_named(trainer, monkeypatch):
    trainer = trainer({"steps": 9})
    usual = crevnet.video_model.mse_loss
    monkeypatch.setattr(crevnet.video_model, "mse_loss", lambda *args: usual(*args) * math.nan)
    with pytest.raises(TrainingDiverged, match="step 1: the loss is nan; the last checkpoint is untouched"):
        trainer.fit()
    assert not list(trainer.folder.glob("checkpoints/step-*"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_the_parameter(value, trainer, tiny):
    trainer = trainer({"steps": 9, "optimiser.clip_norm": 1.0})
    before = {k: v.clone() for k, v in trainer.raw_model.state_dict().items()}
    names = [name for name, _ in trainer.raw_model.named_parameters()]
    parameter = dict(trainer.raw_model.named_parameters())[names[2]]
    parameter.register_hook(lambda g: g + value)
    with pytest.raises(TrainingDiverged) as error:
        trainer.fit()
    assert f"step 1: the gradient is not finite, first in {names[2]} (1 parameters)" in str(error.value)
    tiny.assert_equal(trainer.raw_model.state_dict(), before)


def test_an_engine_that_loses_its_way_stops_the_run_too(trainer, monkeypatch):
    trainer = trainer({"steps": 9})

    def lose(*args):
        raise ReversibilityError("out of range")

    monkeypatch.setattr(trainer, "_backward", lose)
    with pytest.raises(TrainingDiverged, match="step 1: out of range"):
        trainer.fit()


def test_weights_that_break_in_the_last_step_are_found_by_validation(trainer, monkeypatch):
    trainer = trainer({"steps": 1})
    step = trainer.optimiser.step

    def explode():
        step()
        with torch.no_grad():
            for p in trainer.raw_model.parameters():
                p.fill_(math.nan)

    monkeypatch.setattr(trainer.optimiser, "step", explode)
    with pytest.raises(TrainingDiverged, match="step 1: validation failed: "):
        trainer.fit()
    assert not list(trainer.folder.glob("checkpoints/step-*"))


# --- precision ---


def test_in_mixed_precision_convolutions_are_bfloat16_and_streams_float32(trainer):
    trainer = trainer({"run.precision": "bf16-mixed"})
    seen = {"convolution": set(), "stream": set()}
    for module in trainer.raw_model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(lambda module, given, out: seen["convolution"].add(out.dtype))
        if type(module).__name__ == "ConvLSTMCell":
            module.register_forward_hook(lambda module, given, out: seen["stream"].add(given[0].dtype))
    loss, norm = trainer._train_step(training_batch(trainer))
    assert seen == {"convolution": {torch.bfloat16}, "stream": {torch.float32}}
    assert {p.dtype for p in trainer.raw_model.parameters()} == {torch.float32}
    assert math.isfinite(loss)
    assert math.isfinite(norm)


def test_mixed_precision_computes_almost_the_same(trainer, tmp_path):
    full, mixed = (
        made._train_step(training_batch(made))
        for made in (trainer({"run.precision": p}, tmp_path / p) for p in ("32-true", "bf16-mixed"))
    )
    assert mixed != full
    assert mixed == pytest.approx(full, rel=0.02)


# --- processes ---


def test_only_rank_0_writes(trainer, monkeypatch):
    trainer = trainer({"steps": 1})
    trainer.main = False
    assert trainer.fit()
    trainer.finish()
    assert not trainer.folder.exists()


def test_the_summary_has_both_lines_and_their_ratio(tmp_path):
    result = {"mse": 30.0, "ssim": 0.8, "psnr": 20.0, "sequences": 7}
    text = summary("predrnn", result | {"copy_last_frame": {"mse": 60.0, "ssim": 0.5, "psnr": 15.0}}, tmp_path)
    assert "7 sequences" in text
    assert "predrnn               30.00   0.8000    20.00" in text
    assert "60.00   0.5000    15.00" in text
    assert "MSE is 0.50 of copying" in text
    assert str(tmp_path) in text
