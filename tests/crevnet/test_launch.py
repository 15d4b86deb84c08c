import pickle
from types import SimpleNamespace

import pytest
import torch

from crevnet.launch import from_first
from crevnet.training import train


def test_a_device_that_is_not_there_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device here"):
        train(tiny.config(tmp_path / "run", {"run.device": "cuda"}))
    assert not (tmp_path / "run").exists()


def test_an_unknown_device_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'gpu'"):
        train(tiny.config(tmp_path / "run", {"run.device": "gpu"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_the_number_of_a_device_is_refused_instead_of_ignored(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=rf"run.device '{name}' .* run.device cuda and CUDA_VISIBLE_DEVICES"):
        train(tiny.config(tmp_path / "run", {"run.device": name}))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_divided_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="batch_size 6 is not a multiple of the 4 processes"):
        train(tiny.config(tmp_path / "run", {"batch_size": 6}))
    assert not (tmp_path / "run").exists()


def test_one_process_cannot_shard(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"shards a model among processes: start several with torchrun"):
        train(tiny.config(tmp_path / "run", {"run.strategy": "fsdp"}))
    assert not (tmp_path / "run").exists()


def test_what_the_first_process_finds_or_raises_all_do():
    said = []

    def broadcast(value):
        """Sends what the first process has, as a process group does."""
        said.append(pickle.dumps(value))
        return pickle.loads(said[0])

    def fail():
        raise ValueError("no room")

    for function in (lambda: "found", fail):
        said.clear()
        for rank in (0, 1):
            fabric = SimpleNamespace(global_rank=rank, broadcast=broadcast)
            if function is fail:
                with pytest.raises(ValueError, match=r"^no room$"):
                    from_first(fabric, fail)
            else:
                assert from_first(fabric, function if rank == 0 else fail) == "found"
