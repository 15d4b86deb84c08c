"""Frames per second of the paper's CrevNet, eager and exported: `pytest benchmarks/test_inference.py --benchmark-only
--sweeps`.

On a GPU, where there is one, and there under CUDA graphs too; else on one thread. All ways have the same weights and
take turns in one process.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from benchmarks.gpu.timing import timed
from benchmarks.reporting import Report, Table, spread
from benchmarks.timing import processor_seconds, ratios, rotated
from benchmarks.training import CELLS
from crevnet.capture import captured, side_stream
from crevnet.export import export_predictor
from crevnet.model import CrevNet, CrevNetConfig

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

CUDA = torch.cuda.is_available()
DEVICE = "cuda:0" if CUDA else "cpu"
OBSERVED, STEPS = 10, 10
ROUNDS = {1: 6, 4: 4, 16: 3}
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
EXACT, FLOAT, EXPORTED = "eager, exact", "eager, float", "exported"
GRAPHS = (f"{FLOAT}, CUDA graph", f"{EXPORTED}, CUDA graph") if CUDA else ()
WAYS = (EXACT, FLOAT, EXPORTED, *GRAPHS)

NOTES = (
    f"The paper's Moving MNIST configuration: {STEPS} frames of 64 x 64 pixels predicted from {OBSERVED}, float32, "
    "random weights and frames.",
    "Frames per second: predicted frames of all sequences over the time from observed to last predicted frame, median "
    "over the rounds, each of which runs all ways once. Speed-up: over the model as it is trained, in exact "
    "arithmetic.",
    "Exported: what `python -m crevnet.export` writes, not compiled ahead of time. Difference: largest one to the "
    "predictions in exact arithmetic, pixels being 0 to 1.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {"cell": "cell", "batch": "batch", "way": "way", "fps": "frames/s", "ms": "ms per frame"}
    columns |= {"speedup": "speed-up", "p20": "p20", "p80": "p80", "difference": "difference"}
    tables = {"rows": Table("Frames predicted per second", columns, rows, formats={"difference": ".1e"})}
    configuration = {
        "model": str(CrevNetConfig()),
        "observed": OBSERVED,
        "steps": STEPS,
        "rounds": ROUNDS,
        "dtype": "float32",
    }
    complete = len(rows) == len(CELLS) * len(ROUNDS) * len(WAYS)
    name = "gpu_inference" if CUDA else "inference"
    publish(Report(name, "Prediction", tables, configuration, NOTES, complete=complete, page=PAGE, cuda=CUDA))


@pytest.mark.parametrize("batch", ROUNDS)
@pytest.mark.parametrize("cell", CELLS)
def test_frames_per_second(benchmark, results, cell, batch):
    frames = torch.rand(batch, OBSERVED, 1, 64, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rounds: list[dict[str, float]] = []
    with torch.no_grad(), side_stream(torch.device(DEVICE)):
        ways = calls(cell, frames)

        def run_round() -> None:
            rounds.append({way: seconds(ways[way]) for way in rotated(WAYS, len(rounds))})

        benchmark.pedantic(run_round, rounds=ROUNDS[batch])
        if benchmark.disabled:
            return
        wanted = ways[EXACT]()
        differences = {way: float((ways[way]() - wanted).abs().max()) for way in WAYS}
    for way in WAYS:
        taken = [times[way] for times in rounds]
        median = spread(taken)["median"]
        faster = spread(ratios([times[EXACT] for times in rounds], taken))
        row = {
            "cell": cell,
            "batch": batch,
            "way": way,
            "fps": batch * STEPS / median,
            "ms": 1e3 * median / batch / STEPS,
            "speedup": faster["median"],
            "p20": faster["p20"],
            "p80": faster["p80"],
            "difference": differences[way],
            "seconds": taken,
        }
        results.append(row)


def calls(cell: str, frames: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every way to predict what follows these frames; each has run once."""
    model, exported = subject(cell)

    def eager(arithmetic: str) -> Tensor:
        model.config = replace(model.config, arithmetic=arithmetic)
        return model.predict(frames, STEPS)

    ways = {EXACT: lambda: eager("exact"), FLOAT: lambda: eager("float"), EXPORTED: lambda: exported(frames)}
    for way in list(ways.values()):
        way()
    return ways | {name: replaying(ways[name.removesuffix(", CUDA graph")]) for name in GRAPHS}


@cache
def subject(cell: str) -> tuple[CrevNet, Callable[[Tensor], Tensor]]:
    """A model and its exported prediction; writing it down takes as long as a round."""
    torch.manual_seed(0)
    model = CrevNetConfig(cell=cell).build().eval()
    program = export_predictor(model, OBSERVED, STEPS)
    return model.to(DEVICE), move_to_device_pass(program, DEVICE).module()


def replaying(predict: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same from a CUDA graph; its result is overwritten by the next replay."""
    replay = captured(predict)
    replay()  # the first launch of a graph also brings it to the device
    return replay


def seconds(predict: Callable[[], Tensor]) -> float:
    """Wall-clock time on a GPU until it is done, else processor time."""
    return timed(predict)[0] if CUDA else processor_seconds(predict)
