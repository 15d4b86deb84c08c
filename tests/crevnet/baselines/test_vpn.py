"""The Video Pixel Network as a whole: encoder, LSTM and decoder in loops, causality, generation, its objectives."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from crevnet.baselines.vpn import VPNConfig
from crevnet.models import MODELS


def tiny(**changes):
    options = {"image_size": 4, "width": 2, "encoder_blocks": 2, "decoder_blocks": 1, "lstm_kernel_size": 3}
    return VPNConfig(**options | changes)


def unit(oracle, layer, h):
    g3, g2, u, g1 = np.split(oracle.conv(layer, h), 4, axis=1)
    return oracle.sigmoid(g1) * np.tanh(oracle.sigmoid(g2) * h + oracle.sigmoid(g3) * np.tanh(u))


def block(oracle, layers, h):
    x = unit(oracle, layers.second.gates, unit(oracle, layers.first.gates, oracle.conv(layers.narrow, h)))
    return h + oracle.conv(layers.widen, x)


def masked(model):
    """For one channel: weights of pixels that are not before are set to zero, those of the pixel itself in `first`."""
    for name, layer in model.decoder.named_modules():
        if hasattr(layer, "weight"):
            k = layer.kernel_size[0]
            weight = layer.weight.data.flatten(2)
            weight[:, :, k * k // 2 + (name != "first") :] = 0
    return model


def network(oracle, model, frame, hidden, cell, following):
    """Means of the next frame where it is known, and the LSTM's state."""
    h = oracle.conv(model.widen, frame)
    for layers in model.encoder:
        h = block(oracle, layers, h)
    i, f, g, o = np.split(oracle.conv(model.lstm, np.concatenate([h, hidden], axis=1)), 4, axis=1)
    cell = oracle.sigmoid(f) * cell + oracle.sigmoid(i) * np.tanh(g)
    hidden = oracle.sigmoid(o) * np.tanh(cell)
    h = oracle.conv(model.decoder.first, following) + hidden
    for layers in model.decoder.blocks:
        h = block(oracle, layers, h)
    return oracle.sigmoid(oracle.conv(model.decoder.last, h)), hidden, cell


def random_model(oracle, **changes):
    return oracle.randomise(tiny(**changes).build())


def test_teacher_forced_it_matches_the_equations(oracle):
    model = random_model(oracle)
    clips = oracle.clips(model.config, 4)
    found = torch.sigmoid(model.logits(clips)).detach().numpy()
    masked(model)
    hidden = cell = np.zeros((2, 4, 4, 4))
    for t in range(3):
        expected, hidden, cell = network(oracle, model, clips[:, t].numpy(), hidden, cell, clips[:, t + 1].numpy())
        np.testing.assert_allclose(found[:, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fed", [[True, True, False], [True, False, True]])
def test_generation_matches_the_equations(oracle, fed):
    """Pixel by pixel with a whole pass each; the states go on from frames that are given or generated."""
    model = random_model(oracle, image_size=3)
    clips = oracle.clips(model.config, 3)
    found = model(clips, fed=fed).numpy()
    masked(model)
    frame = None
    hidden = cell = np.zeros((2, 4, 3, 3))
    for t, given in enumerate(fed):
        read = clips[:, t].numpy() if given else frame
        frame = np.zeros_like(read)
        for row, column in np.ndindex(3, 3):
            means, *state = network(oracle, model, read, hidden, cell, frame)
            frame[:, :, row, column] = means[:, :, row, column]
        hidden, cell = state
        np.testing.assert_allclose(found[:, t], frame, rtol=0, atol=1e-12)


def test_a_pixel_depends_on_earlier_frames_and_earlier_pixels_only(oracle):
    model = random_model(oracle, channels=2)
    clips = oracle.clips(model.config, 4, batch=1).requires_grad_()
    logits = model.logits(clips)
    place = torch.arange(16).view(1, 4, 4) * 2 + torch.arange(2).view(2, 1, 1)
    for t, k, row, column in [(0, 0, 0, 0), (1, 1, 0, 0), (1, 0, 2, 1), (2, 1, 3, 3), (2, 0, 1, 3)]:
        (seen,) = torch.autograd.grad(logits[0, t, k, row, column], clips, retain_graph=True)
        here = int(place[k, row, column])
        assert seen[0, : t + 1].all(), "every earlier frame counts, all of it at this size"
        assert not seen[0, t + 1][place >= here].any()
        assert not seen[0, t + 2 :].any()
        if here:
            assert seen[0, t + 1][place == here - 1].all()


@pytest.mark.parametrize("changes", [{}, {"channels": 2}, {"patch": 2, "width": 4}, {"dilated": True}])
def test_generation_is_the_teacher_forced_pass_on_its_own_output(oracle, changes):
    model = random_model(oracle, **changes)
    clips = oracle.clips(model.config, 2)
    generated = model(clips, steps=3)
    assert generated.shape == (2, 3, *model.config.clip_shape())
    first = torch.sigmoid(model.logits(torch.stack([clips[:, 0], generated[:, 0]], dim=1)))
    video = torch.cat([clips, generated[:, 1:]], dim=1)
    later = torch.sigmoid(model.logits(video))[:, 1:]
    for t, means in enumerate([first[:, 0], later[:, 0], later[:, 1]]):
        torch.testing.assert_close(generated[:, t], model.config.unfold(means), rtol=0, atol=1e-12)


def test_predict_generates_only_what_is_asked_for(oracle, monkeypatch):
    model = random_model(oracle)
    frames = oracle.clips(model.config, 3)
    expected = model(frames, steps=4)[:, 2:]
    count = []
    generate = model.decoder.generate
    monkeypatch.setattr(model.decoder, "generate", lambda context: count.append(1) or generate(context))
    assert torch.equal(model.predict(frames, 2), expected)
    assert len(count) == 2


@pytest.mark.parametrize("objective", ["mse", "cross_entropy"])
@pytest.mark.parametrize("changes", [{}, {"patch": 2, "width": 4}])
def test_the_loss_is_of_the_means_given_the_true_pixels(oracle, objective, changes):
    model = random_model(oracle, objective=objective, **changes)
    clips = oracle.clips(model.config, 3)
    means = torch.sigmoid(model.logits(clips)).detach()
    y = torch.stack([model.config.unfold(means[:, t]) for t in range(2)], dim=1).numpy()
    z = clips[:, 1:].numpy()
    expected = {"mse": (y - z) ** 2, "cross_entropy": -z * np.log(y) - (1 - z) * np.log(1 - y)}[objective].mean()
    assert float(model.loss(clips).detach()) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(model.loss(clips, fed=[True, True]), model.loss(clips))


def test_by_default_the_loss_is_the_mean_squared_error_as_of_all_models():
    assert VPNConfig().objective == "mse"


def test_the_loss_keeps_no_storage_but_its_own():
    loss = tiny().build().loss(torch.rand(2, 3, 1, 4, 4))
    assert loss.untyped_storage().nbytes() == loss.element_size()


def test_generation_keeps_nothing_for_a_backward_pass():
    model, saved = tiny().build(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        predictions = model(torch.rand(1, 2, 1, 4, 4), steps=3)
    assert not saved
    assert not predictions.requires_grad


def test_training_without_the_truth_is_refused():
    model = tiny().build()
    with pytest.raises(ValueError, match=r"VPN: training is teacher forced only \(feeding.kind=teacher\)"):
        model.loss(torch.rand(1, 3, 1, 4, 4), fed=[True, False])
    with pytest.raises(ValueError, match="fed must say for each of 2 steps"):
        model.loss(torch.rand(1, 3, 1, 4, 4), fed=[True])


def test_all_weights_learn(oracle):
    model = random_model(oracle, channels=2)
    model.loss(oracle.clips(model.config, 3)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dilation_doubles_four_times_and_begins_again():
    def dilations(**changes):
        encoder = tiny(encoder_blocks=6, **changes).build().encoder
        return [b.first.gates.dilation[0] for b in encoder]

    assert dilations() == [1] * 6
    assert dilations(dilated=True) == [1, 2, 4, 8, 1, 2]


def test_published_configuration():
    """Blocks of eight 3 x 3 and four 1 x 1 convolutions between 128 channels, an LSTM of 5 x 5 between 256 and 256."""
    block = 8 * 9 * 128**2 + 4 * 128**2
    ends = 256 + 9 * 256 + 256
    lstm = 25 * 512 * 1024
    biases = 20 * (8 * 128 + 128 + 256) + 1024 + 256 + 256 + 1
    with FakeTensorMode():
        model = VPNConfig().build()
        with FlopCounterMode(display=False) as counter:
            model.loss(torch.empty(1, 2, 1, 64, 64))
    assert sum(p.numel() for p in model.parameters()) == 20 * block + lstm + ends + biases
    assert counter.get_total_flops() == 2 * 64**2 * (20 * block + lstm + ends)
    assert counter.get_total_flops() == pytest.approx(311.4e9, rel=1e-3)


@pytest.mark.parametrize("objective", ["mse", "cross_entropy"])
def test_learns_one_batch_by_heart(learn, objective):
    options = {"encoder_blocks": 1, "decoder_blocks": 1, "lstm_kernel_size": 3, "objective": objective}
    config = VPNConfig(image_size=12, width=8, **options)
    assert learn(config.build(), steps=100, learning_rate=5e-3) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 4}, "model.kernel_size must be odd, got 4"),
        ({"lstm_kernel_size": 2}, "model.lstm_kernel_size must be odd, got 2"),
        ({"patch": 2}, "model.width must be at least 4, one for each channel of a pixel, got 2"),
        ({"decoder_blocks": 0}, "model.decoder_blocks must be at least 1, got 0"),
        ({"objective": "l1"}, r"model.objective must be one of \['mse', 'cross_entropy'\], got 'l1'"),
        ({"clip": 3}, "model.clip must be 1"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_wrong_input_is_refused():
    model = tiny().build()
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) given, but the model is built for \(1, 4, 4\)"):
        model.loss(torch.rand(1, 2, 2, 4, 4))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        model.predict(torch.rand(1, 2, 1, 4, 4), 0)


def test_by_name():
    assert MODELS["vpn"] is VPNConfig
