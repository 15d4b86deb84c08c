import pytest
import torch
from torch import nn

from revgrad import ReversibilityError
from revgrad.modules import Frozen, check_materialised, modules_of, switch, switched


def test_every_module_is_found_once_in_pytorchs_order():
    shared = nn.Tanh()
    root = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.ModuleDict({"a": nn.ReLU()}))
    root.register_module("nothing", None)
    assert modules_of(root) == list(root.modules())


def test_modules_without_parameters_yet_are_named():
    lazy = nn.LazyLinear(3)
    with pytest.raises(ReversibilityError, match="LazyLinear has no parameters yet"):
        check_materialised([nn.Tanh(), lazy])
    lazy(torch.ones(2, 4))
    check_materialised([lazy])


def test_modes_are_switched_one_by_one_and_back():
    outer = nn.Sequential(nn.Dropout(), nn.Tanh())
    outer[0].eval()
    modules = modules_of(outer)
    others = switched(modules, [True, True, False])
    assert [m.training for m in modules] == [True, True, False]
    assert others == [outer[0], outer[1]]
    switch(others)
    assert [m.training for m in modules] == [True, False, True]


def test_frozen_statistics_come_back_after_an_error():
    norm = nn.BatchNorm1d(2)
    buffers = dict(norm._buffers)

    def fail():
        with Frozen([norm]):
            norm(torch.randn(3, 2))
            assert norm.num_batches_tracked == 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(norm._buffers[k] is b for k, b in buffers.items())
    assert norm.num_batches_tracked == 0
