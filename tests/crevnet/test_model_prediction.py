"""Prediction goes on from features, step by step, and every step can be undone."""

import pytest
import torch
from torch import nn

from crevnet.clips import frames_to_clips, newest_frames
from revgrad import LiveMemory, Residue, ReversibilityError, snap
from tests.crevnet.test_model import (
    BATCH,
    CELLS,
    CLIP,
    MODES,
    NORMS,
    SIDE,
    clips_for,
    count_transforms,
    frames_for,
    make,
    train_once,
    twins,
)

pytestmark = pytest.mark.usefixtures("single_thread")


class TestNoReencoding:
    """Past the warm-up the predictor goes on from its own output (figure 1)."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("given", "steps"), [(3, 3), (2, 5)])
    def test_transforms_evaluated(self, mode, given, steps):
        model = make(mode=mode)
        blocks, modules = sum(model.config.blocks), model.config.modules
        calls = count_transforms(model)
        out = model(clips_for(model, given), steps=steps)
        forward = {"autoencoder": blocks * (given + steps), "predictor": modules * steps}
        assert calls == forward
        out.sum().backward()
        again = 1 if mode == "stored" else 2
        assert calls == {part: again * count for part, count in forward.items()}

    @pytest.mark.parametrize("arithmetic", ["exact", "float"])
    @pytest.mark.parametrize(("observed", "steps"), [(1, 1), (3, 1), (1, 3), (3, 4)])
    def test_prediction_encodes_what_is_observed_and_decodes_what_is_asked_for(self, arithmetic, observed, steps):
        model = make(arithmetic=arithmetic).eval()
        blocks, modules = sum(model.config.blocks), model.config.modules
        calls = count_transforms(model)
        model.predict(frames_for(model, observed + CLIP - 1), steps)
        assert calls == {"autoencoder": blocks * (observed + steps), "predictor": modules * (observed + steps - 1)}

    @pytest.mark.parametrize("arithmetic", ["exact", "float"])
    def test_prediction_keeps_nothing_but_what_it_predicts(self, arithmetic):
        model = make(arithmetic=arithmetic).eval()
        frames = frames_for(model, CLIP)
        clip = model.predict(frames, 1).nbytes * CLIP  # and makes what is made once
        peaks = []
        for steps in (2, 10):
            with LiveMemory() as memory:
                model.predict(frames, steps)
            peaks.append(memory.peak)
        assert 8 * clip <= peaks[1] - peaks[0] <= 8 * (clip + 64)  # and the largest magnitude of each stream

    def test_a_step_without_a_clip_only_decodes(self):
        model = make()
        calls = count_transforms(model)
        _, state = model.step(clips_for(model)[:, 0])
        assert calls == {"autoencoder": 6, "predictor": 3}
        model.step(None, state)
        assert calls == {"autoencoder": 9, "predictor": 6}

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("training", [True, False])
    def test_encoding_a_prediction_returns_the_kept_features_bit_for_bit(self, cell, norm, training):
        model = make(cell, norm=norm)
        train_once(model, clips_for(model))
        model.train(training).autoencoder.arithmetic = "exact"
        state = None
        for t in range(3):
            prediction, state = model.step(clips_for(model)[:, t], state)
            with torch.no_grad():
                encoded = model.autoencoder(prediction)
            assert all(torch.equal(a, b) for a, b in zip(encoded, state.features, strict=True))

    @pytest.mark.parametrize("cell", CELLS)
    def test_feeding_the_predictions_back_predicts_the_same_bit_for_bit(self, cell):
        model = make(cell).eval()
        clip = clips_for(model)[:, 0]
        kept, fed = model.step(clip), model.step(clip)
        for _ in range(4):
            kept, fed = model.step(None, kept[1]), model.step(fed[0], fed[1])
            assert torch.equal(kept[0], fed[0])

    def test_feeding_predictions_back_in_float_arithmetic(self):
        model = make(arithmetic="float").eval()
        clip = clips_for(model)[:, 0]
        kept, fed = model.step(clip), model.step(clip)
        for _ in range(4):
            kept, fed = model.step(None, kept[1]), model.step(fed[0], fed[1])
        torch.testing.assert_close(kept[0], fed[0], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("arithmetic", ["exact", "float"])
    @pytest.mark.parametrize("stacking", ["depth", "channels"])
    @pytest.mark.parametrize("steps", [1, 4])
    def test_predict_is_the_free_running_forward_pass(self, cell, arithmetic, stacking, steps):
        model = make(cell, arithmetic=arithmetic, stacking=stacking, channels=2).eval()
        frames = frames_for(model, 4)
        predicted = model.predict(frames, steps)
        assert predicted.shape == (BATCH, steps, 2, SIDE, SIDE)
        assert not predicted.requires_grad
        clips = frames_to_clips(frames, CLIP, stacking)
        whole = model(clips, steps=3 + steps - 1).detach()
        assert torch.equal(predicted, newest_frames(whole, 2, stacking)[:, 2:])

    @pytest.mark.parametrize("cell", CELLS)
    def test_predict_equals_single_steps_with_predictions_fed_back(self, cell):
        model = make(cell).eval()
        frames = frames_for(model, 4)
        state, frames_out = None, []
        for clip in frames_to_clips(frames, CLIP, "depth").unbind(1):
            prediction, state = model.step(clip, state)
        for _ in range(3):
            frames_out.append(prediction[:, :, -1])
            prediction, state = model.step(prediction, state)
        assert torch.equal(model.predict(frames, 3), torch.stack(frames_out, dim=1))

    @pytest.mark.parametrize("steps", [1, 3])
    def test_predictions_beyond_the_range_of_exact_arithmetic_are_refused(self, steps):
        model = make().eval()
        for p in model.parameters():
            p.data *= 60
        with pytest.raises(ReversibilityError, match="largest value that the grid holds"):
            model.predict(frames_for(model, 3), steps)


class TestReconstruct:
    """Conditional reversibility: equation 5."""

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("stacking", ["depth", "channels"])
    def test_every_step_gives_its_clip_back_bit_for_bit(self, cell, norm, stacking):
        model = make(cell, norm=norm, stacking=stacking)
        train_once(model, clips_for(model))  # statistics of batch normalisation
        model.eval()
        clips = clips_for(model, 5, seed=3)
        done, state = [], None
        for clip in (*clips.unbind(1), None, None, None):
            before = snap(clip) if clip is not None else done[-1][1]
            prediction, state = model.step(clip, state)
            done.append((before, prediction, state))
        for before, prediction, states in reversed(done):
            assert torch.equal(model.reconstruct(prediction, states), before)
        before, prediction, states = done[2]
        assert torch.equal(model.reconstruct(prediction, states), before), "and as often as one likes"

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("stacking", ["depth", "channels"])
    def test_features_of_one_pixel(self, cell, norm, stacking):
        """Where shuffled pixels are a mere view, batch statistics must not depend on memory layout."""
        options = {"image_size": 8, "blocks": (1, 2, 2), "channels": 3, "stacking": stacking}
        model = make(cell, norm=norm, **options)
        clips, state = clips_for(model), None
        for clip in clips.unbind(1):
            prediction, state = model.step(clip, state)
            assert torch.equal(model.reconstruct(prediction, state), snap(clip))

    def test_statistics_are_those_of_before(self):
        """What a step moved is not moved once more by undoing it."""
        model = make(norm="batch").train()
        prediction, states = model.step(clips_for(model)[:, 0])
        before = {name: b.clone() for name, b in model.named_buffers()}
        assert any("running" in name for name in before)
        model.reconstruct(prediction, states)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    @pytest.mark.parametrize("cell", CELLS)
    def test_closed_gates(self, cell):
        """Where nearly all is forgotten the float inverse is lost, the exact one is not."""
        model = make(cell).eval()
        for module in model.predictor:
            nn.init.constant_(module.transform.attention[2].bias, 12.0)
        clip = clips_for(model)[:, 0]
        errors = {}
        for arithmetic in ("exact", "float"):
            twin = twins(model, arithmetic=arithmetic)
            errors[arithmetic] = float((twin.reconstruct(*twin.step(clip)) - snap(clip)).abs().max())
        assert errors["exact"] == 0
        assert errors["float"] > 1e-3

    @pytest.mark.parametrize("cell", CELLS)
    def test_the_states_matter(self, cell):
        model = make(cell, arithmetic="float").eval()
        prediction, first = model.step(clips_for(model)[:, 0])
        prediction, second = model.step(clips_for(model)[:, 1], first)
        right = model.reconstruct(prediction, second)
        torch.testing.assert_close(right, clips_for(model)[:, 1], atol=1e-2, rtol=0)
        assert float((model.reconstruct(prediction, first) - right).abs().max()) > 0.1

    def test_a_missing_residue_is_noticed(self):
        model = make()
        prediction, states = model.step(clips_for(model)[:, 0])
        states.residue = Residue()
        with pytest.raises(ReversibilityError, match="needs the residue"):
            model.reconstruct(prediction, states)

    @pytest.mark.parametrize("cell", CELLS)
    def test_steps_equal_the_forward_pass(self, cell):
        model = make(cell).eval()
        clips = clips_for(model, 3)
        state, predictions = None, []
        for clip in (*clips.unbind(1), None, None):
            prediction, state = model.step(clip, state)
            predictions.append(prediction)
        assert torch.equal(torch.stack(predictions, dim=1), model(clips, steps=5))

    def test_float_arithmetic_keeps_no_residue(self):
        model = make(arithmetic="float")
        assert model.step(clips_for(model)[:, 0])[1].residue is None

    def test_the_first_step_needs_a_clip(self):
        with pytest.raises(ValueError, match="first time step needs a clip"):
            make().step(None)
