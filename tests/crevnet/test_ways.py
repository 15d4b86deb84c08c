import math

import pytest
import torch

from crevnet.adam import adam
from crevnet.baselines.convlstm import ConvLSTMConfig
from crevnet.clips import frames_to_clips
from crevnet.convolution import use_channels_last
from crevnet.model import CrevNetConfig
from crevnet.ways import NoWayFits, _MemoryOf, choose, training_bytes
from revgrad import LiveMemory

pytestmark = pytest.mark.usefixtures("single_thread")
CPU = torch.device("cpu")
FRAMES = 6
SMALL = {"image_size": 16, "clip": 2, "blocks": (2,), "modules": 2, "norm": "batch"}
MIB = 2**20


def small(cell="stlstm", **options):
    return CrevNetConfig(cell=cell, **SMALL, **options)


def ways(config=None):
    return (config or small()).ways(FRAMES - 2)


def used(config, batch, frames=FRAMES):
    """Bytes at the peak of one training step from the first forward pass to Adam's step, counted."""
    torch.manual_seed(0)
    model = config.build()
    use_channels_last(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held = 2 * sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    with LiveMemory() as memory:
        # Adam's moments are there from the first step on.
        optimiser = adam(model.parameters(), 0.0, (0.9, 0.999))
        optimiser.step()
        memory.reset_peak()
        x = torch.rand(batch, frames, config.channels, config.image_size, config.image_size)
        model.loss(frames_to_clips(x, config.clip, config.stacking)).backward()
        optimiser.step()
    return held + memory.peak


# --- choosing ---


def test_the_first_that_fits_is_taken_and_those_after_it_are_not_measured():
    measured = []

    def need(config):
        measured.append(config.mode)
        return {"stored": 30 * MIB, "reversible": 10 * MIB}[config.mode]

    choice = choose(ways(), 10 * MIB, need)
    assert (choice.name, choice.config.mode) == ("reversible", "reversible")
    assert measured == ["stored", "reversible"]
    told = "Training reversible: needs 10.0 MiB of 10.0 MiB; stored would need 30.0 MiB"
    assert str(choice) == told
    assert choose(ways(), 30 * MIB, need).name == "stored"


def test_a_way_that_cannot_even_be_measured_does_not_fit():
    choice = choose(ways(), math.inf, lambda way: math.inf if way.mode == "stored" else 5.0)
    assert choice.name == "stored", "an endless memory has room for all"
    choice = choose(ways(), MIB, lambda way: math.inf if way.mode == "stored" else 5.0)
    assert "stored would need more than there is" in str(choice)


def test_where_nothing_fits_the_error_names_the_least_and_the_fix():
    needs = iter([30 * MIB, 10 * MIB, 20 * MIB])
    with pytest.raises(NoWayFits, match=r"fits into 9\.0 MiB: the least is 10\.0 MiB, reversible; lower batch_size"):
        choose(ways(), 9 * MIB, lambda way: next(needs))


# --- the ways there are ---


def test_the_fastest_comes_first_and_states_are_kept_at_the_root_of_the_steps():
    found = small().ways(10)
    assert list(found) == ["stored", "reversible", "reversible, states every 4 steps"]
    assert [c.mode for c in found.values()] == ["stored", "reversible", "reversible"]
    assert [c.keep_states_every for c in found.values()] == [1, 1, 4]
    assert list(small().ways(1)) == ["stored", "reversible"]
    assert "reversible, states every 3 steps" in small().ways(9)


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
def test_a_mode_that_is_set_is_obeyed(mode):
    config = small(mode=mode)
    assert config.ways(9) == {mode: config}


@pytest.mark.parametrize("options", [{"keep_states_every": 2}, {"offload": True}])
def test_options_of_the_reversible_mode_choose_it(options):
    assert small(**options).ways(9) == {"reversible": small(mode="reversible", **options)}


def test_a_run_goes_on_as_it_was_begun_if_that_fits():
    begun = "reversible, states every 3 steps"
    assert list(small().ways(9, begun)) == [begun, "stored", "reversible"]
    assert list(small(arithmetic="float").ways(9, begun)) == [begun]
    assert list(small(arithmetic="float").ways(9)) == list(small().ways(9)) == list(small().ways(9, "unheard of"))


def test_what_is_computed_is_as_configured():
    inverted = small(cell_states="inverted").ways(9)
    assert {c.cell_states for c in inverted.values()} == {"inverted"}
    assert {c.arithmetic for c in small(arithmetic="float").ways(9).values()} == {"float"}


def test_another_model_has_one_way():
    config = ConvLSTMConfig()
    assert config.ways(9) == {"stored": config}


@pytest.mark.parametrize("options", [{}, {"cell_states": "inverted"}, {"clips_at_once": 3}], ids=str)
@pytest.mark.parametrize("cell", ["convlstm", "stlstm"])
def test_all_ways_have_the_same_gradients_bit_for_bit(cell, options):
    found = []
    for config in ways(small(cell, **options)).values():
        torch.manual_seed(0)
        model = config.build()
        loss = model.loss(frames_to_clips(torch.rand(2, FRAMES, 1, 16, 16), 2, "depth"))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    assert len(found) == 3
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- what they need ---


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", list(ways()))
def test_the_need_of_a_batch_is_what_its_step_takes(name, batch):
    config = ways()[name]
    assert training_bytes(config, batch, FRAMES, CPU) == pytest.approx(used(config, batch), rel=0.02)


def test_less_memory_is_bought_with_speed():
    needs = [training_bytes(config, 4, FRAMES, CPU) for config in ways().values()]
    assert needs[0] > 2 * needs[1] > 2 * needs[2]


def test_of_a_model_of_many_weights_adams_step_needs_no_more():
    config = ConvLSTMConfig(image_size=16, hidden=(32, 32, 32), patch=4)
    weights = sum(p.nbytes for p in config.build().parameters())
    need = training_bytes(config, 1, 2, CPU)
    assert 4 * weights < need < 5 * weights
    assert need == pytest.approx(used(config, 1, frames=2), rel=0.02)


def test_every_gradient_may_be_there_twice():
    config = small()
    one, two = (training_bytes(config, 2, FRAMES, CPU, gradients=n) for n in (1, 2))
    assert two - one == sum(p.nbytes for p in config.build().parameters())


def test_measuring_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    training_bytes(small(), 2, FRAMES, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_on_the_device_needs_more_than_there_is(monkeypatch):
    def run_out(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("crevnet.model.CrevNet.loss", run_out)
    assert training_bytes(small(), 2, FRAMES, CPU) == math.inf


def test_copies_on_the_host_are_not_memory_of_the_device():
    with _MemoryOf(torch.device("meta")) as memory:
        states = torch.empty(100, device="meta"), torch.empty(1000)
    assert memory.peak == states[0].nbytes
