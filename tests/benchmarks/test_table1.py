from dataclasses import replace

import pytest

from benchmarks import table1
from benchmarks.table1 import PATCHED, SYSTEMS, activations_mb, count_ahead, gflops_per_frame, parameters, training_mb
from crevnet.baselines.convlstm import ConvLSTMConfig

SMALL = ConvLSTMConfig(patch=1, image_size=16, hidden=(4, 4), kernel_size=3)


def test_all_systems_of_table_1_are_there():
    names = ["ConvLSTM", "FRNN", "VPN", "PredRNN", "PredRNN++", "E3D-LSTM", "CrevNet+ConvLSTM", "CrevNet+ST-LSTM"]
    assert [s.name for s in SYSTEMS] == names
    assert set(PATCHED) < set(names)


def test_flops_are_twice_the_multiply_accumulates():
    per_pixel = 1 * 4 + 2 * (8 * 16 * 9) + 4 * 1
    assert gflops_per_frame(SMALL) == pytest.approx(2 * per_pixel * 16 * 16 / 1e9, rel=1e-12)


def test_all_memory_is_four_numbers_per_weight_and_the_activations():
    assert training_mb(SMALL, 3.0) == pytest.approx(parameters(SMALL) * 16 / 1e6 + 3.0)


def test_stored_memory_grows_with_steps_and_batch():
    one, two, longer = activations_mb(SMALL, 1, 2), activations_mb(SMALL, 2, 2), activations_mb(SMALL, 1, 4)
    assert one < two < 2.1 * one
    assert one < longer < 2.5 * one


def test_counting_ahead_in_other_processes_finds_the_same():
    config = replace(SMALL, hidden=(4, 6))
    wanted = [(config, batch, 2) for batch in (1, 2)]
    here = [activations_mb(*w) for w in wanted]
    table1._COUNTED.clear()
    count_ahead(wanted)
    assert [table1._COUNTED[str(config), batch, 2] for batch in (1, 2)] == here


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_a_deeper_system_is_the_same_one_at_once_the_depth(system):
    assert system.deeper(1) == system.config
    assert parameters(system.deeper(2)) > 1.5 * parameters(system.config)
