"""The folded recurrent network against its equations in loops; what teacher forcing and free running mean for it."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from crevnet.baselines.frnn import FRNN, FRNNConfig
from crevnet.models import MODELS

PLANS = [[True, True, True], [True, True, False, False], [True, False, True, False]]


def tiny(**changes):
    options = {"image_size": 8, "channels": 2, "front": (3, 2), "front_kernel_size": 3, "widths": (3, 2)}
    return FRNNConfig(**options | {"kernel_sizes": (3, 1)} | changes)


def random_model(oracle, **changes):
    """All weights of order one, biases and initial states included; small enough not to saturate the gates."""
    return oracle.randomise(tiny(**changes).build(), scale=0.4)


def gru(oracle, cell, x, h):
    r, z = np.split(oracle.sigmoid(oracle.conv(cell.gates, np.concatenate([x, h], axis=1))), 2, axis=1)
    candidate = np.tanh(oracle.conv(cell.candidate, np.concatenate([x, r * h], axis=1)))
    return (1 - z) * h + z * candidate


def pooled(x):
    out = np.empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2))
    for i, j in np.ndindex(*out.shape[2:]):
        out[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(2, 3))
    return out


def repeated(x):
    out = np.empty((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    for i, j in np.ndindex(*out.shape[2:]):
        out[:, :, i, j] = x[:, :, i // 2, j // 2]
    return out


def transposed(weight, bias, x):
    """Each input element adds its share of the kernel to the outputs that it would have been computed from."""
    _, inputs, k, _ = weight.shape
    size = x.shape[2]
    out = np.zeros((x.shape[0], inputs, size + k - 1, size + k - 1))
    for i, j in np.ndindex(size, size):
        for channel, values in enumerate(x[:, :, i, j].T):
            out[:, :, i : i + k, j : j + k] += values[:, None, None, None] * weight[channel]
    return out[:, :, k // 2 : k // 2 + size, k // 2 : k // 2 + size] + bias[:, None, None]


def upwards(oracle, model, frame, above):
    """The states below and above each unit, from a frame and the states above."""
    x = 2 * frame - 1
    for layer in model.front:
        x = np.tanh(oracle.conv(layer, x))
    below, new = [], []
    for unit, cell in enumerate(model.up):
        if unit % model.config.units == 0:
            x = pooled(x)
        below.append(x)
        x = gru(oracle, cell, x, above[unit])
        new.append(x)
    return below, new


def downwards(oracle, model, below, above):
    """The next frame, and the states below and above each unit that belong to it."""
    below, above = list(below), list(above)
    x = above[-1]
    for unit in range(len(below) - 1, -1, -1):
        above[unit] = x
        below[unit] = gru(oracle, model.down[unit], x, below[unit])
        x = below[unit] if unit % model.config.units else repeated(below[unit])
    above[-1] = gru(oracle, model.up[-1], below[-1], above[-1])
    for layer, bias in zip(list(model.front)[::-1], list(model.front_down_biases)[::-1], strict=True):
        x = np.tanh(transposed(oracle.array(layer.weight), oracle.array(bias), x))
    return (x + 1) / 2, below, above


def initial(oracle, model, batch):
    sides = [model.config.folded_size[0] // 2 ** (1 + unit // model.config.units) for unit in range(len(model.initial))]
    values = [oracle.array(v)[None, :, None, None] for v in model.initial]
    return [np.tile(v, (batch, 1, side, side)) for v, side in zip(values, sides, strict=True)]


@pytest.mark.parametrize("fed", PLANS)
@pytest.mark.parametrize("units", [1, 2])
def test_matches_the_equations(oracle, fed, units):
    model = random_model(oracle, units=units)
    clips = oracle.clips(model.config, sum(fed) if fed[-1] else len(fed))
    predictions = []
    state = ahead = [], initial(oracle, model, 2)
    for t, given in enumerate(fed):
        state = upwards(oracle, model, clips[:, t].numpy(), state[1]) if given else ahead
        prediction, *ahead = downwards(oracle, model, *state)
        predictions.append(prediction)
    found = model(clips, fed=fed, steps=len(fed)).detach().numpy()
    np.testing.assert_allclose(found, np.stack(predictions, axis=1), rtol=0, atol=1e-12)


def test_patches_are_folded_before_and_unfolded_after(oracle):
    folded = random_model(oracle, channels=1, image_size=16, patch=2)
    plain = random_model(oracle, channels=4, image_size=8)
    plain.load_state_dict(folded.state_dict())
    clips = oracle.clips(folded.config, 2)
    expected = plain(torch.stack([folded.config.fold(clips[:, t]) for t in range(2)], dim=1))
    for t in range(2):
        assert torch.equal(folded(clips)[:, t], folded.config.unfold(expected[:, t]))


def test_free_running_reads_no_frame(oracle, monkeypatch):
    model = random_model(oracle)
    clips = oracle.clips(model.config, 2)
    read = []
    encode = FRNN.encode
    monkeypatch.setattr(FRNN, "encode", lambda self, frame, state: read.append(frame) or encode(self, frame, state))
    model(clips, steps=5)
    assert len(read) == 2
    assert all(torch.equal(frame, clips[:, t]) for t, frame in enumerate(read))


def test_a_prediction_leaves_no_trace_in_the_states_that_the_next_given_frame_meets(oracle):
    model = random_model(oracle)
    clips = oracle.clips(model.config, 3)
    state = model.initial_state(clips)
    for t in range(3):
        state = model.encode(clips[:, t], state)
    assert torch.equal(model(clips)[:, -1], model.decode(state)[0])


def test_states_are_not_changed_in_place(oracle):
    model = random_model(oracle)
    clips = oracle.clips(model.config, 1)
    state = model.encode(clips[:, 0], model.initial_state(clips))
    before = [x.clone() for x in (*state.below, *state.above)]
    with torch.no_grad():
        model.decode(state)
        model.encode(clips[:, 0], state)
    assert all(torch.equal(a, b) for a, b in zip((*state.below, *state.above), before, strict=True))


def test_all_weights_learn(oracle):
    model = random_model(oracle)
    model.loss(oracle.clips(model.config, 4), fed=[True, False, True]).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_states_are_zero_at_first():
    model = FRNNConfig(image_size=8, front=(4,), widths=(4, 2), kernel_sizes=(3, 3)).build()
    assert [v.numel() for v in model.initial] == [4, 4, 2, 2]
    assert not any(v.any() for v in model.initial)
    assert not any(h.any() for h in model.initial_state(torch.rand(2, 1, 8, 8)).above)


def test_shapes_and_range():
    model = FRNNConfig(image_size=32, front=(4,), widths=(4,), kernel_sizes=(3,)).build()
    frames = torch.rand(3, 2, 1, 32, 32)
    predicted = model.predict(frames, 3)
    assert predicted.shape == (3, 3, 1, 32, 32)
    assert float(predicted.min()) >= 0
    assert float(predicted.max()) <= 1


def test_published_configuration():
    """Per unit on the way up 3 (below + above) above k^2 multiplications per position, down 3 (below + above) below."""
    units = [(64, 128, 5, 32), (128, 128, 5, 32), (128, 256, 5, 16), (256, 256, 5, 16)]
    units += [(256, 512, 3, 8), (512, 512, 3, 8), (512, 256, 3, 4), (256, 256, 3, 4)]
    front = 25 * (32 + 32 * 64) * 64**2
    up = [3 * (b + a) * a * k**2 * side**2 for b, a, k, side in units]
    down = [3 * (b + a) * b * k**2 * side**2 for b, a, k, side in units]
    weights = sum(3 * (b + a) * (b + a) * k**2 + 3 * (b + a) + a for b, a, k, _ in units)
    weights += 25 * (32 + 32 * 64) + (32 + 64) + (1 + 32)
    with FakeTensorMode():
        model = FRNNConfig().build()
        clips = torch.empty(1, 2, 1, 64, 64)
        with FlopCounterMode(display=False) as teacher_forced:
            model(clips[:, :1])
        with FlopCounterMode(display=False) as free_running:
            model.predict(clips, 8)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert teacher_forced.get_total_flops() == 2 * (2 * front + sum(up) + sum(down) + up[-1])
    assert teacher_forced.get_total_flops() == pytest.approx(38.8e9, rel=1e-3)
    # The teacher-forced prediction of the first of two frames is made, too.
    assert free_running.get_total_flops() == 2 * (2 * (front + sum(up)) + 9 * (front + sum(down) + up[-1]))


def test_learns_one_batch_by_heart(learn):
    config = FRNNConfig(image_size=16, front=(8,), widths=(16, 16), kernel_sizes=(3, 3), units=1)
    assert learn(config.build(), steps=60, learning_rate=1e-2) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"front": ()}, r"model.front must name one or more layers of at least one channel, got \(\)"),
        ({"front": (0,)}, r"model.front must name one or more layers of at least one channel, got \(0,\)"),
        ({"widths": (), "kernel_sizes": ()}, r"model.widths must name one or more layers"),
        ({"kernel_sizes": (3,)}, r"model.kernel_sizes must name one size for each of the 2 stages .* got \(3,\)"),
        ({"kernel_sizes": (3, 2)}, "model.kernel_sizes must be odd, got 3, 2"),
        ({"front_kernel_size": 4}, "model.front_kernel_size must be odd, got 4"),
        ({"image_size": 10}, "model.image_size 10 is not a multiple of 4, by which model.patch and 2 stages fold it"),
        ({"image_size": 8, "patch": 4}, "model.image_size 8 is not a multiple of 16"),
        ({"units": 0}, "model.units must be at least 1, got 0"),
        ({"clip": 2}, "model.clip must be 1"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_wrong_input_is_refused():
    model = tiny().build()
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) given, but the model is built for \(2, 8, 8\)"):
        model(torch.rand(1, 2, 1, 8, 8))
    with pytest.raises(ValueError, match="the first one always"):
        model(torch.rand(1, 2, 2, 8, 8), fed=[False, True])


def test_by_name():
    assert MODELS["frnn"] is FRNNConfig
