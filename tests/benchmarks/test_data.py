import pytest
import torch

from benchmarks import test_data
from benchmarks.test_data import WORKERS, report


@pytest.fixture
def beside_a_gpu(monkeypatch):
    """PyTorch says that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("beside_a_gpu")
def test_the_report_is_of_the_cpu():
    made = report([{"num_digits": 1}], [])
    assert made.name == "moving_mnist"
    assert not made.cuda


@pytest.mark.usefixtures("beside_a_gpu")
@pytest.mark.parametrize("prefetch", WORKERS)
def test_the_step_that_is_fed_runs_on_the_cpu(rehearsal, prefetch):
    """On a GPU this would raise, as there is none."""
    test_data.test_waiting_for_data_beside_the_training_step(rehearsal, {}, prefetch)
    assert rehearsal.asked == {"rounds": test_data.STEPS, "warmup_rounds": 1}
