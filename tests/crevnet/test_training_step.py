import math

import pytest
import torch

import crevnet.video_model
from crevnet.training_step import TrainingDiverged, feeding_plan
from revgrad import ReversibilityError
from tests.crevnet.test_training import snapshot, training_batch

pytestmark = pytest.mark.usefixtures("single_thread")


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

    monkeypatch.setattr(trainer.training_step, "_backward", lose)
    with pytest.raises(TrainingDiverged, match="step 1: out of range"):
        trainer.fit()


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
