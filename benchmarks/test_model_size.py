"""FLOPs per predicted frame and parameters of the paper's CrevNets: `pytest benchmarks/test_model_size.py --benchmark-
only`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reporting import Report, Table
from crevnet.model import CrevNetConfig

PAPER_GFLOPS = {"convlstm": 0.919, "stlstm": 1.618}
NOTES = (
    "One time step while predicting (predictor and decoding pass, no re-encoding), one sequence; FLOPs are twice "
    "the multiply-accumulates.",
    "64 x 64 pixels, one channel, clips of 3 frames, 36-layer autoencoder, 8 modules with 3 x 3 x 3 convolutions, "
    "attention of two 3 x 3 x 3 convolutions; cells as appendix A writes them.",
    "The paper's column is table 1; it gives no parameter counts.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {
        "cell": "cell",
        "gflops": "GFLOPs",
        "paper": "paper",
        "ratio": "ratio",
        "parameters": "parameters, millions",
    }
    tables = {"rows": Table("FLOPs per frame while predicting", columns, rows, decimals=3)}
    publish(Report("model_size", "Model size", tables, {"model": str(CrevNetConfig())}, NOTES, complete=len(rows) == 2))


@pytest.mark.parametrize("cell", PAPER_GFLOPS)
def test_model_size(benchmark, results, cell):
    model = CrevNetConfig(cell=cell).build().eval()
    _, states = model.step(torch.rand(1, 1, 3, 64, 64))
    with FlopCounterMode(display=False) as counter:
        model.step(None, states)
    benchmark.pedantic(model.step, args=(None, states), rounds=3)
    gflops = counter.get_total_flops() / 1e9
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    paper = PAPER_GFLOPS[cell]
    results.append({"cell": cell, "gflops": gflops, "paper": paper, "ratio": gflops / paper, "parameters": parameters})
    assert gflops == pytest.approx(paper, rel=0.03)
