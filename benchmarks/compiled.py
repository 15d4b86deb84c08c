"""Does `torch.compile` make stored training faster on a CPU? `python -m benchmarks.compiled` (needs a C++ compiler).

Prints the time of a training step with every transform compiled, over that of one that is not, with CrevNet's own
convolutions and with PyTorch's, which are what a compiler sees; and the time of pointwise operators that are compiled,
over that of the fused ones. All take turns in one process.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.operators import OPERATORS, Inputs
from benchmarks.reporting import spread
from benchmarks.test_cpu_operators import forward_and_backward
from benchmarks.timing import processor_seconds, rotated
from benchmarks.training import Variant, random_clips
from crevnet.model import CrevNetConfig

BATCHES, STEPS, ROUNDS = (4, 16), 2, 5
POINTWISE = ("weighted_sum", "hidden_output", "convlstm", "stlstm_states")


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # the autoencoder's convolutions have many shapes
    for batch in BATCHES:
        print(f"batch {batch}, ST-LSTM, stored:", compared(training_steps(batch)), flush=True)
        for operator in OPERATORS:
            if operator.name in POINTWISE:
                leaves = operator.leaves(Inputs(batch))
                torch.compiler.reset()
                calls = {
                    "fused": forward_and_backward(operator.fused, leaves),
                    "compiled": forward_and_backward(torch.compile(operator.plain, dynamic=False), leaves),
                }
                print(f"batch {batch}, {operator.name}:", compared(calls), flush=True)


def training_steps(batch: int) -> dict[str, Callable[[], Any]]:
    """A step of the same weights in three ways."""
    torch.manual_seed(0)
    config = Variant("stored", "float").of(CrevNetConfig())
    model, clips = config.build(), random_clips(config, batch, STEPS)
    compiled = copy.deepcopy(model)
    for part in (compiled.autoencoder, compiled.predictor):
        for layer in part:
            if hasattr(layer, "transform"):
                layer.transform.compile(dynamic=False)

    def with_pytorchs_convolutions() -> None:
        with mock.patch("crevnet.convolution_cpu.convolve", return_value=None):
            model.loss(clips).backward()

    return {
        "eager": lambda: model.loss(clips).backward(),
        "eager, PyTorch's convolutions": with_pytorchs_convolutions,
        "compiled": lambda: compiled.loss(clips).backward(),
    }


def compared(calls: Mapping[str, Callable[[], Any]]) -> str:
    """Processor time of each over that of the first, median of the rounds."""
    names = list(calls)
    # The first two compile.
    rounds = [{name: processor_seconds(calls[name]) for name in rotated(names, i)} for i in range(-2, ROUNDS)]
    ratio = {n: spread([times[n] / times[names[0]] for times in rounds[2:]])["median"] for n in names}
    return ", ".join(f"{name} {ratio[name]:.2f}" for name in names)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
