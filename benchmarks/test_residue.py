"""What exactness costs: bits of residue per gated update against the entropy bound: `pytest benchmarks/test_residue.py
--benchmark-only`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.reporting import Report, Table
from revgrad import Residue, snap
from revgrad.residue import entropy_bits, quantise_gate

MEAN_GATES = (0.1, 0.5, 0.9, 0.99)
MODULES, STEPS, ELEMENTS, SPREAD = 40, 20, 6144, 1.5
NOTES = (
    f"{MODULES} gated updates at each of {STEPS} time steps on {ELEMENTS} elements (one stream of the paper's "
    f"model); gates sigmoid(N(m, {SPREAD})) with m "
    "set to the mean gate.",
    "The bound is -log2(1 - gate), the information that scaling by the quantised 1 - gate forgets.",
    "'words and filled' counts spilled words and the filled part of the reservoirs; 'stored' adds their fixed 80 "
    "bits per element.",
    "Every run is undone afterwards and compared bit for bit with its start.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {
        "gate": "mean gate",
        "bound": "bound, bits/update",
        "used": "words and filled, bits/update",
        "ratio": "over bound",
        "stored": "stored, bits/update",
    }
    tables = {"rows": Table("Residue of exact gated updates", columns, rows, decimals=3)}
    configuration = {"modules": MODULES, "steps": STEPS, "elements": ELEMENTS, "spread": SPREAD}
    publish(Report("residue", "Residue", tables, configuration, NOTES, complete=len(rows) == len(MEAN_GATES)))


@pytest.mark.parametrize("gate", MEAN_GATES)
def test_residue(benchmark, results, gate):
    generator = torch.Generator().manual_seed(0)
    shift = logit_shift(gate)
    logits = [torch.randn(ELEMENTS, generator=generator) * SPREAD + shift for _ in range(MODULES * STEPS)]
    numerators = [quantise_gate(torch.sigmoid(a)) for a in logits]
    start = snap(torch.randn(ELEMENTS, generator=generator))
    residue = Residue()

    def forward() -> torch.Tensor:
        x = start
        for numerator in numerators:
            x = residue.scale(x, numerator)
        return x

    x = benchmark.pedantic(forward, rounds=1)
    updates = ELEMENTS * len(numerators)
    bound = sum(map(entropy_bits, numerators)) / updates
    used, stored = residue.used_bits / updates, residue.bits / updates
    for numerator in reversed(numerators):
        x = residue.unscale(x, numerator)
    assert torch.equal(x, start)
    assert used <= 1.1 * bound
    results.append({"gate": gate, "bound": bound, "used": used, "ratio": used / bound, "stored": stored})


def logit_shift(gate: float) -> float:
    """The m for which sigmoid(N(m, SPREAD)) has this mean, by bisection."""
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * SPREAD
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(noise + middle).mean() < gate else (low, middle)
    return low
