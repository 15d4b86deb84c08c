"""Training a model stored, checkpointed, reversible, or with its cell states inverted: the same gradients."""

import pytest
import torch
from torch import nn

from crevnet.clips import frames_to_clips, newest_frames
from crevnet.convolution import Convolution2d, Convolution3d
from crevnet.model import CrevNetConfig
from revgrad import LiveMemory, snap
from tests.crevnet.test_model import (
    CELLS,
    CLIP,
    MODES,
    NORMS,
    SCHEDULES,
    clips_for,
    count_transforms,
    differing,
    frames_for,
    make,
    relative_errors,
    train_once,
    twins,
    whole_error,
)

pytestmark = pytest.mark.usefixtures("single_thread")


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
    @pytest.mark.parametrize("stacking", ["depth", "channels"])
    @pytest.mark.parametrize("changes", [{}, {"keep_states_every": 2}], ids=["", "sparse"])
    def test_frames_need_not_be_square(self, cell, stacking, changes):
        model = make(cell, stacking=stacking, image_size=(8, 20), channels=3)
        clips = clips_for(model)
        wanted, wanted_grads = train_once(twins(model, mode="stored"), clips)
        found, grads = train_once(twins(model, mode="reversible", **changes), clips)
        assert found.shape[-2:] == (8, 20)
        assert torch.equal(found, wanted)
        assert differing(grads, wanted_grads) == []

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
