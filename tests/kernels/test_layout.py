import json
from importlib import import_module

import pytest
import torch
from revgrad_kernels import layout, weighted_sum
from revgrad_kernels.backend import INTERPRETED, tl, triton

from tests.kernels.cases import DEVICE, needs_triton


@triton.jit
def counted(out_ptr, columns, WIDTH: tl.constexpr):
    tl.store(out_ptr, layout.tiles_across(columns, WIDTH))


@needs_triton
@pytest.mark.parametrize("width", [1, 128, 1024])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 2**31 - 1, 2**31 + 1, 2**40])
def test_columns_are_counted_in_tiles_up_to_the_limit_of_32_bits_and_beyond(columns, width):
    out = torch.empty(1, dtype=torch.int64, device=DEVICE)
    counted[(1,)](out, columns, WIDTH=width)
    assert out.item() == -(-columns // width)


def named(name):
    """Of a module whose name the package has for its operator."""
    module, name = name.split(".")
    return getattr(import_module(f"revgrad_kernels.{module}"), name)


@needs_triton
@pytest.mark.parametrize(
    ("tuner", "variants"),
    [
        ("weighted_sum._forward_tuned", {"INVERSE", "BIAS", "WIDTH"}),
        ("weighted_sum._backward_tuned", {"BIAS", "WIDTH"}),
        ("pixel_shuffle._tuned", {"N", "FOLD", "SPLIT", "IREVNET", "CHANNELS_LAST", "WIDTH"}),
        ("stlstm_states._forward_tuned", {"WIDTH"}),
        ("exact_weighted_sum._inverse_tuned", {"DIGITS", "STEPS"}),
    ],
)
def test_every_variant_of_a_kernel_is_tuned_by_itself(tuner, variants):
    assert set(named(tuner).keys) == {"size", *variants}


@needs_triton
def test_a_kernel_is_not_compiled_for_the_class_of_its_size():
    kernel = named("weighted_sum._forward_kernel")
    found = kernel.kwargs["do_not_specialize"] if INTERPRETED else kernel.do_not_specialize
    assert found == ["size"]


@needs_triton
def test_what_tuning_keeps_on_disk_can_be_written(monkeypatch):
    """The key goes into a JSON file, which a dtype of Triton does not."""
    tuner, seen = named("weighted_sum._forward_tuned"), []
    monkeypatch.setattr(tuner, "configs", [*tuner.configs, triton.Config({"TILE": 2048}, num_warps=8)])
    monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setattr(tuner, "_bench", lambda *_, **__: [1.0, 1.0, 1.0])
    x = torch.randn(2, 3, 4, 5, device=DEVICE)
    for bias in (None, torch.randn(3, device=DEVICE)):
        weighted_sum(x, x, x, bias=bias, backend="triton")
        seen.append(len(tuner.cache))
    assert seen == [1, 2]
    json.dumps(list(tuner.cache))
