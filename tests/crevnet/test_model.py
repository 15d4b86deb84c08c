import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from crevnet.clips import frames_to_clips
from crevnet.model import CrevNet, CrevNetConfig
from revgrad import AdditiveCoupling, snap

pytestmark = pytest.mark.usefixtures("single_thread")

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
    return torch.rand(batch, time, model.config.channels, *model.config.frame_size, generator=generator)


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
