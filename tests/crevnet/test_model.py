import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from crevnet.clips import frames_to_clips, newest_frames
from crevnet.convolution import Convolution2d, Convolution3d
from crevnet.model import CrevNet, CrevNetConfig
from revgrad import AdditiveCoupling, LiveMemory, Residue, ReversibilityError, snap

CELLS = ["convlstm", "stlstm"]
NORMS = ["group", "batch"]
MODES = ["stored", "checkpoint", "reversible"]
SCHEDULES = {
    "free running": (2, None, 5),
    "from one clip": (1, None, 4),
    "scheduled": (4, [True, False, True, False, False], 5),
}
SIDE, CLIP, BATCH = 16, 2, 2
STEPS = 4


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in one order, so that results can be compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(cell="stlstm", seed=0, **changes):
    """A tiny model whose states, gates and peepholes are not those of a fresh one."""
    torch.manual_seed(seed)
    options = {"image_size": SIDE, "clip": CLIP, "blocks": (2, 1), "modules": 3, "cell": cell} | changes
    model = CrevNetConfig(**options).build()
    for name, p in model.predictor.named_parameters():
        if name.endswith("peephole"):
            nn.init.normal_(p)
        elif p.ndim > 1:
            p.data *= 2
    return model


def twins(model, **changes):
    """The same weights under another configuration."""
    other = copy.deepcopy(model)
    for name, value in changes.items():
        setattr(other.config, name, value)
    return other


def clips_for(model, steps=STEPS, batch=BATCH, seed=1):
    return frames_to_clips(
        frames_for(model, steps + model.config.clip - 1, batch, seed),
        model.config.clip,
        model.config.stacking,
    )


def frames_for(model, time, batch=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    side = model.config.image_size
    return torch.rand(batch, time, model.config.channels, side, side, generator=generator)


def train_once(model, clips, fed=None, steps=None):
    """Prediction, and all gradients by name, of a loss that weighs every output differently."""
    model.zero_grad()
    clips = clips.clone().requires_grad_()
    out = model(clips, fed=fed, steps=steps)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    ((out - 0.3).square() * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.detach(), grads | {"clips": clips.grad}


def differing(found, wanted):
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


def relative_errors(found, wanted):
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - w).norm() / w.norm().clamp_min(1e-30)) for n, w in wanted.items()}


def whole_error(found, wanted):
    """Relative error of all gradients taken as one vector."""
    assert found.keys() == wanted.keys()
    error = torch.cat([(found[n] - w).flatten() for n, w in wanted.items()]).norm()
    return float(error / torch.cat([w.flatten() for w in wanted.values()]).norm())


def count_transforms(model):
    """Calls of the autoencoder's residual functions and of the predictor's cells."""
    calls = {"autoencoder": 0, "predictor": 0}
    for part in calls:
        for layer in getattr(model, part):
            if hasattr(layer, "transform"):
                hook = lambda *_, part=part: calls.__setitem__(part, calls[part] + 1)  # noqa: E731
                layer.transform.register_forward_hook(hook)
    return calls


class TestThePaper:
    """The defaults are the paper's Moving MNIST setting."""

    @pytest.mark.parametrize(("cell", "published"), [("convlstm", 0.919e9), ("stlstm", 1.618e9)])
    def test_flops_of_a_predicted_frame(self, cell, published):
        model = CrevNetConfig(cell=cell).build().eval()
        _, state = model.step(torch.rand(1, 1, 3, 64, 64))
        with FlopCounterMode(display=False) as counter:
            model.step(None, state)
        assert counter.get_total_flops() == pytest.approx(published, rel=0.03)
        assert counter.get_total_flops() == decoding_flops(cell)

    @pytest.mark.parametrize(
        ("cell", "published", "exactly"), [("convlstm", 2.3e6, 2_377_836), ("stlstm", 4.1e6, 4_115_308)]
    )
    def test_parameters(self, cell, published, exactly):
        model = CrevNetConfig(cell=cell).build()
        total = sum(p.numel() for p in model.parameters())
        assert total == pytest.approx(published, rel=0.05)
        assert total == exactly

    def test_the_default_configuration(self):
        model = CrevNetConfig().build()
        convolutions = [m for m in model.autoencoder.modules() if isinstance(m, nn.Conv3d)]
        assert len(convolutions) == 36
        assert len(model.predictor) == 8
        assert (model.width, model.size) == (32, (3, 8, 8))

    def test_the_decoder_has_no_weights_of_its_own(self):
        names = {name.split(".")[0] for name in make().state_dict()}
        assert names == {"autoencoder", "predictor"}


def decoding_flops(cell):
    """Two per multiplication, of the 3x3x3 convolutions of the paper's setting written out by hand."""

    def conv(inputs, outputs, volume, taps=27):
        return 2 * inputs * outputs * taps * volume

    c, volume = 32, 3 * 8 * 8
    attention = 2 * conv(c, c, volume)
    gates = {
        "convlstm": conv(2 * c, 4 * c, volume),
        "stlstm": conv(2 * c, (4 + 3 + 1) * c, volume) + conv(2 * c, c, volume, taps=1),
    }[cell]
    decoder = 0
    for stage, blocks in enumerate((4, 5, 3)):
        width, volume = 2 * 4**stage, 3 * (32 // 2**stage) ** 2
        inner = width // 2
        decoder += blocks * (2 * conv(width, inner, volume) + conv(inner, inner, volume))
    return 8 * (gates + attention) + decoder


class TestModes:
    """Stored, checkpointed and reversible: the same weights, the same results."""

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
    def test_teacher_forcing_equals_stored_autograd_bit_for_bit(self, cell, norm, mode):
        model = make(cell, norm=norm)
        clips = clips_for(model)
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips)
        found, grads = train_once(twins(model, mode=mode), clips)
        assert torch.equal(found, wanted)
        assert differing(grads, wanted_grads) == []
        assert all(bool(g.any()) for g in wanted_grads.values()), "every gradient is really there"

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize(("given", "fed", "steps"), SCHEDULES.values(), ids=SCHEDULES)
    def test_free_running_equals_stored_autograd(self, cell, norm, given, fed, steps):
        """What is summed for one tensor comes in another order here: only the rounding differs."""
        model = make(cell, norm=norm)
        clips = clips_for(model, given)
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips, fed, steps)
        whole = torch.cat([g.flatten() for g in wanted_grads.values()]).norm()
        for mode in ("checkpoint", "reversible"):
            found, grads = train_once(twins(model, mode=mode), clips, fed, steps)
            assert torch.equal(found, wanted)
            assert whole_error(grads, wanted_grads) <= 1e-6
            # In the gradient of a scale that another normalisation undoes, large terms cancel: hence the
            # share of the whole. In double precision below there is none.
            errors = {n: float((grads[n] - g).norm()) for n, g in wanted_grads.items()}
            off = [n for n, g in wanted_grads.items() if errors[n] > 1e-6 * g.norm() + 1e-8 * whole]
            assert off == []

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize(("given", "fed", "steps"), SCHEDULES.values(), ids=SCHEDULES)
    @pytest.mark.parametrize("cell_states", ["kept", "inverted"])
    def test_free_running_in_double_precision(self, cell, given, fed, steps, cell_states):
        model = make(cell, cell_states=cell_states).double()
        clips = clips_for(model, given).double()
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips, fed, steps)
        found, grads = train_once(model, clips, fed, steps)
        assert torch.equal(found, wanted)
        errors = relative_errors(grads, wanted_grads)
        assert max(errors.values()) <= 1e-8, {n: e for n, e in errors.items() if e > 1e-8}

    @pytest.mark.parametrize("stacking", ["depth", "channels"])
    @pytest.mark.parametrize(("channels", "clip"), [(1, 1), (3, 2)])
    def test_two_dimensional_and_coloured_variants(self, stacking, channels, clip):
        model = make(stacking=stacking, channels=channels, clip=clip)
        kind = Convolution3d if stacking == "depth" else Convolution2d
        assert {type(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))} == {kind}
        clips = clips_for(model)
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips)
        found, grads = train_once(model, clips)
        assert found.shape == clips.shape
        assert torch.equal(found, wanted)
        assert differing(grads, wanted_grads) == []

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("every", [2, 3, 10])
    @pytest.mark.parametrize(("given", "steps"), [(4, 4), (2, 5)])
    def test_keeping_fewer_states_changes_nothing(self, cell, every, given, steps):
        model = make(cell, norm="batch")
        clips = clips_for(model, given)
        one, other = twins(model), twins(model, keep_states_every=every)
        wanted, wanted_grads = train_once(one, clips, steps=steps)
        found, grads = train_once(other, clips, steps=steps)
        assert torch.equal(found, wanted)
        assert differing(grads, wanted_grads) == []
        assert differing(dict(other.named_buffers()), dict(one.named_buffers())) == []

    @pytest.mark.parametrize("changes", [{"mode": "checkpoint"}, {"mode": "reversible"}])
    def test_running_statistics_move_as_in_stored_mode(self, changes):
        model = make(norm="batch")
        clips = clips_for(model, 3)
        stored, other = twins(model, mode="stored"), twins(model, **changes)
        for _ in range(2):
            train_once(stored, clips, steps=5)
            train_once(other, clips, steps=5)
        wanted, found = dict(stored.named_buffers()), dict(other.named_buffers())
        assert differing(found, wanted) == []
        counts = {int(b) for name, b in wanted.items() if name.endswith("num_batches_tracked")}
        assert counts == {2 * (3 + 5)}, "once per encoded clip and once per decoded one"

    def test_evaluation_mode_leaves_the_statistics_alone(self):
        model = make(norm="batch")
        train_once(model, clips_for(model))
        before = {name: b.clone() for name, b in model.named_buffers()}
        out, _ = train_once(model.eval(), clips_for(model))
        assert differing(dict(model.named_buffers()), before) == []
        alone, _ = train_once(model, clips_for(model)[:1])
        torch.testing.assert_close(alone, out[:1], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("cell", CELLS)
    def test_without_gradients_the_output_is_the_same(self, cell):
        model = make(cell)
        clips = clips_for(model, 2)
        wanted = model(clips, steps=4)
        with torch.no_grad():
            assert torch.equal(model(clips, steps=4), wanted)
        with torch.inference_mode():
            assert torch.equal(model(clips, steps=4), wanted)

    @pytest.mark.parametrize("cell", CELLS)
    def test_float_arithmetic_in_double_precision(self, cell):
        model = make(cell, arithmetic="float").double()
        clips = clips_for(model, 2).double()
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips, steps=3)
        found, grads = train_once(model, clips, steps=3)
        assert torch.equal(found, wanted)
        assert max(relative_errors(grads, wanted_grads).values()) < 1e-9

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("mode", ["stored", "reversible"])
    def test_gradcheck_of_a_whole_sequence(self, cell, mode):
        model = make(cell, arithmetic="float", mode=mode, image_size=4, blocks=(1,), modules=2).double()
        clips = clips_for(model, 2, batch=1).double()
        names = [name for name, _ in model.named_parameters()]

        def call(clips, *values):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (clips,), {"steps": 3})

        inputs = [clips, *(p.detach() for p in model.parameters())]
        assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)

    def test_exact_arithmetic_is_close_to_float(self):
        model = make()
        clips = clips_for(model, 2)
        with torch.no_grad():
            exact, floating = model(clips, steps=4), twins(model, arithmetic="float")(clips, steps=4)
        assert not torch.equal(exact, floating)
        torch.testing.assert_close(exact, floating, atol=2e-3, rtol=0)

    def test_frozen_parameters_get_no_gradient_and_the_others_the_same(self):
        model = make()
        clips = clips_for(model)
        _, wanted = train_once(model, clips)
        model.zero_grad(set_to_none=True)
        model.autoencoder.requires_grad_(requires_grad=False)
        out = model(clips)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        ((out - 0.3).square() * weights).sum().backward()
        assert all(p.grad is None for p in model.autoencoder.parameters())
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert found
        assert differing(found, {name: wanted[name] for name in found}) == []


class TestInvertedCellStates:
    """Cell states recovered instead of kept: other rounding, the same gradients as stored autograd's."""

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize(
        "changes", [{"mode": "checkpoint"}, {}, {"keep_states_every": 2}, {"stacking": "channels"}], ids=str
    )
    def test_teacher_forcing_equals_stored_autograd_bit_for_bit(self, cell, changes):
        model = make(cell, cell_states="inverted", **changes)
        clips = clips_for(model)
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips)
        found, grads = train_once(model, clips)
        assert torch.equal(found, wanted)
        assert differing(grads, wanted_grads) == []
        assert all(bool(g.any()) for g in wanted_grads.values()), "every gradient is really there"

    @pytest.mark.parametrize("cell", CELLS)
    def test_both_have_the_same_weights_and_close_predictions(self, cell):
        kept, inverted = make(cell), make(cell, cell_states="inverted")
        assert differing(inverted.state_dict(), kept.state_dict()) == []
        inverted.load_state_dict(kept.state_dict())
        clips = clips_for(kept, 2)
        with torch.no_grad():
            found, wanted = inverted(clips, steps=4), kept(clips, steps=4)
        assert not torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)
        with torch.no_grad():
            assert torch.equal(kept(clips, steps=4), wanted)

    @pytest.mark.parametrize("cell", CELLS)
    def test_every_step_gives_its_clip_back_bit_for_bit(self, cell):
        model = make(cell, cell_states="inverted").eval()
        done, state = [], None
        for clip in (*clips_for(model, 3, seed=3).unbind(1), None, None):
            before = snap(clip) if clip is not None else done[-1][1]
            prediction, state = model.step(clip, state)
            done.append((before, prediction, state))
        for before, prediction, states in reversed(done):
            assert torch.equal(model.reconstruct(prediction, states), before)

    @pytest.mark.parametrize("cell", CELLS)
    def test_predict_is_the_free_running_forward_pass(self, cell):
        model = make(cell, cell_states="inverted").eval()
        frames = frames_for(model, 4)
        whole = model(frames_to_clips(frames, CLIP, "depth"), steps=5).detach()
        assert torch.equal(model.predict(frames, 3), newest_frames(whole, 1, "depth")[:, 2:])

    def test_a_step_evaluates_each_module_once_forwards_and_once_backwards(self):
        model = make(cell_states="inverted")
        calls = count_transforms(model)
        out = model(clips_for(model))
        forward = dict(calls)
        out.sum().backward()
        assert calls == {part: 2 * count for part, count in forward.items()}

    def test_float_arithmetic_is_refused(self):
        with pytest.raises(ValueError, match=r"model.cell_states 'inverted' needs model.arithmetic 'exact'"):
            CrevNetConfig(cell_states="inverted", arithmetic="float")


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


class TestMemory:
    @pytest.mark.parametrize("cell", CELLS)
    def test_reversible_training_holds_least(self, cell):
        peaks = {}
        for mode in MODES:
            model = make(cell, mode=mode, image_size=32, blocks=(1, 1), modules=3)
            clips = clips_for(model)
            with LiveMemory() as memory:
                model(clips).square().mean().backward()
            peaks[mode] = memory.peak
        assert peaks["reversible"] < min(peaks["checkpoint"], 0.5 * peaks["stored"])

    def test_the_autoencoders_depth_costs_nothing_between_forward_and_backward(self):
        held = []
        for blocks in [(1, 1), (6, 6)]:
            model = make(blocks=blocks, norm="none")
            clips = clips_for(model)
            with LiveMemory() as memory:
                out = model(clips)
                held.append(memory.live)
            del out
        assert held[1] == held[0]


class TestShapes:
    @settings(max_examples=15, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
    @given(
        cell=st.sampled_from(CELLS),
        stacking=st.sampled_from(["depth", "channels"]),
        channels=st.integers(1, 3),
        clip=st.integers(1, 3),
        blocks=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
        modules=st.integers(1, 3),
        norm=st.sampled_from(["group", "batch", "none"]),
        given_clips=st.integers(1, 3),
        more=st.integers(0, 2),
        training=st.booleans(),
    )
    def test_any_configuration(
        self, cell, stacking, channels, clip, blocks, modules, norm, given_clips, more, training
    ):
        options = {"stacking": stacking, "channels": channels, "clip": clip, "blocks": blocks, "norm": norm}
        model = make(cell, image_size=8, modules=modules, **options)
        clips = clips_for(model, given_clips)
        if more:  # free running sums in another order: double precision, where batches of two values do no harm
            model, clips = model.double(), clips.double()
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips, steps=given_clips + more)
        found, grads = train_once(model, clips, steps=given_clips + more)
        assert found.shape == (BATCH, given_clips + more, *clips.shape[2:])
        assert torch.equal(found, wanted)
        assert whole_error(grads, wanted_grads) <= (1e-9 if more else 0)
        model.train(training)
        prediction, state = model.step(clips[:, 0])
        assert torch.equal(model.reconstruct(prediction, state), snap(clips[:, 0]))

    @pytest.mark.parametrize(
        ("stacking", "shape"),
        [
            ("depth", (2, 4, 1, 2, 16, 8)),
            ("depth", (2, 4, 1, 3, 16, 16)),
            ("depth", (2, 4, 3, 2, 16, 16)),
            ("depth", (2, 4, 2, 16, 16)),
            ("depth", (4, 1, 2, 16, 16)),
            ("channels", (2, 4, 1, 2, 16, 16)),
            ("channels", (2, 4, 3, 16, 16)),
        ],
    )
    def test_clips_that_do_not_fit_are_refused(self, stacking, shape):
        with pytest.raises(ValueError, match="but the model is built for"):
            make(stacking=stacking)(torch.zeros(shape))

    def test_steps_and_reconstructions_are_checked_too(self):
        model = make()
        prediction, state = model.step(clips_for(model)[:, 0])
        with pytest.raises(ValueError, match="but the model is built for"):
            model.step(torch.zeros(2, 1, 3, 16, 16), state)
        with pytest.raises(ValueError, match="but the model is built for"):
            model.reconstruct(prediction[..., :8], state)

    @pytest.mark.parametrize(
        ("fed", "steps"),
        [
            ([False, True], 2),
            ([True], 2),
            ([True] * 3, 2),
            ([True] * 3, 3),
            ([True, False, True], 3),
            ([], 0),
            (None, 0),
        ],
    )
    def test_impossible_schedules_are_refused(self, fed, steps):
        model = make()
        with pytest.raises(ValueError, match=f"each of {steps} steps whether one of the 2 clips"):
            model(clips_for(model, 2), fed=fed, steps=steps)

    def test_fewer_steps_than_clips(self):
        model = make().eval()
        clips = clips_for(model, 3)
        with torch.no_grad():
            assert torch.equal(model(clips, steps=2), model(clips)[:, :2])

    @pytest.mark.parametrize("steps", [0, -1])
    def test_predict_wants_at_least_one_step(self, steps):
        model = make()
        with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
            model.predict(frames_for(model, 3), steps)

    def test_predict_wants_a_whole_clip(self):
        model = make(clip=3)
        with pytest.raises(ValueError, match="a clip has 3 frames, but only 2 were given"):
            model.predict(frames_for(model, 2), 1)


class TestConfig:
    def test_builds_a_model_that_knows_its_configuration(self):
        config = CrevNetConfig(image_size=16, blocks=(1,), modules=1)
        model = config.build()
        assert isinstance(model, CrevNet)
        assert model.config is config

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"blocks": ()}, "blocks must name at least one block per stage"),
            ({"blocks": (4, 0, 3)}, "blocks must name at least one block per stage"),
            ({"image_size": 60}, "image_size 60 is not a multiple of 8, by which 3 stages fold it"),
            ({"image_size": 0}, "image_size must be at least 1, got 0"),
            ({"image_size": -8}, "image_size must be at least 1, got -8"),
            ({"cell": "gru"}, r"cell must be one of \['convlstm', 'stlstm'\], got 'gru'"),
            ({"channels": 0}, "channels must be at least 1, got 0"),
            ({"clip": 0}, "clip must be at least 1, got 0"),
            ({"modules": 0}, "modules must be at least 1, got 0"),
            ({"bottleneck": 0}, "bottleneck must be at least 1, got 0"),
            ({"keep_states_every": 0}, "keep_states_every must be at least 1, got 0"),
            ({"stacking": "width"}, "stacking must be one of .*, got 'width'"),
            ({"norm": "layer"}, "norm must be one of .*, got 'layer'"),
            ({"mode": "magic"}, "mode must be one of .*, got 'magic'"),
            ({"arithmetic": "fuzzy"}, "arithmetic must be one of .*, got 'fuzzy'"),
        ],
    )
    def test_what_cannot_be_built_is_named(self, changes, message):
        with pytest.raises(ValueError, match=f"model.{message}"):
            CrevNetConfig(**changes)

    def test_options_are_named_not_numbered(self):
        with pytest.raises(TypeError):
            CrevNetConfig("convlstm")

    def test_couplings_are_where_the_blocks_are(self):
        model = make(blocks=(3, 2))
        assert sum(isinstance(layer, AdditiveCoupling) for layer in model.autoencoder) == 5
