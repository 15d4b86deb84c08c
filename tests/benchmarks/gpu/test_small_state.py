import pytest
import torch

from benchmarks.gpu.small_state import grow, shrink
from crevnet.checkpoint_directory import CheckpointDirectory


@pytest.fixture(params=[1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
def run(tmp_path, request):
    """A run with one checkpoint, after three updates of Adam; a CUDA graph's learning rate is in a tensor."""
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    optimiser = torch.optim.Adam(parameters, lr=request.param)
    for _ in range(3):
        for p in parameters:
            p.grad = 1e-4 * torch.randn_like(p)
        optimiser.step()
    plain = {"step": 3, "seconds": 1.5, "best_mse": float("inf"), "peak_activation_bytes": 7, "way": "reversible"}
    state = plain | {"optimiser": optimiser.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": None}
    weights = {"a": parameters[0].detach(), "b": parameters[1].detach(), "count": torch.tensor(70000)}
    CheckpointDirectory(tmp_path / "run" / "checkpoints").save(3, weights, state)
    shrink(tmp_path / "run", tmp_path / "state")
    return tmp_path / "run"


def latest(run):
    return CheckpointDirectory(run / "checkpoints").latest()


def test_a_run_goes_on_from_half_the_bytes(run, tmp_path):
    grow(tmp_path / "state", tmp_path / "other")
    before, after = latest(run), latest(tmp_path / "other")
    assert after.step == 3
    for name, weight in before.weights.items():
        torch.testing.assert_close(after.weights[name], weight, rtol=1e-3, atol=1e-6)
    for key in ("step", "seconds", "best_mse", "peak_activation_bytes", "way"):
        assert after.state[key] == before.state[key]
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))])
    optimiser.load_state_dict(after.state["optimiser"])
    assert optimiser.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert isinstance(optimiser.param_groups[0]["lr"], float)
    for i, own in before.state["optimiser"]["state"].items():
        found = optimiser.state_dict()["state"][i]
        assert found["step"] == own["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], own[name], rtol=1e-2, atol=0)


def test_moments_may_be_left_out(run, tmp_path):
    (tmp_path / "state" / "exp_avg.safetensors").unlink()
    grow(tmp_path / "state", tmp_path / "other")
    assert latest(tmp_path / "other").state["optimiser"]["state"] == {}


def test_a_run_that_has_begun_is_left_alone(run, tmp_path):
    weights = latest(run).weights
    grow(tmp_path / "state", run)
    assert all(torch.equal(latest(run).weights[name], weight) for name, weight in weights.items())


def test_nothing_to_shrink_or_to_grow(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        shrink(tmp_path, tmp_path / "state")
    with pytest.raises(FileNotFoundError, match=r"state\.json"):
        grow(tmp_path / "state", tmp_path / "run")
