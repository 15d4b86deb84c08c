"""Which normalisation trains most stably: `pytest benchmarks/test_normalisation.py --benchmark-only --sweeps`.

The same small CrevNet is trained for a few hundred steps with each normalisation, from low to too high learning
rates and from two seeds; it is scored on validation digits by free running, as in use.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from benchmarks.reporting import Report, Table
from crevnet.clips import frames_to_clips
from crevnet.data import MovingMNISTConfig
from crevnet.evaluate import score
from crevnet.model import CrevNet, CrevNetConfig
from revgrad import ReversibilityError

pytestmark = pytest.mark.sweep

NORMS = ("group", "batch", "none")
RATES = (5e-4, 2e-3, 8e-3)
SEEDS = (0, 1)
STEPS, BATCH, OBSERVED, SEQUENCES = 60, 4, 5, 32
MODEL: dict[str, Any] = {"image_size": 32, "blocks": (2, 2), "modules": 2, "cell": "stlstm"}
DATA = MovingMNISTConfig(image_size=32, digit_size=14, frames=10)

NOTES = (
    "MSE summed over the 32 x 32 frame, mean of 5 frames predicted by free running; validation digits; lower is "
    "better.",
    f"{STEPS} steps of Adam at a constant learning rate, batch {BATCH}, teacher forcing, no gradient clipping.",
    "'diverged': the loss stopped being finite, or a stream left the range of exact arithmetic.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {
        "norm": "normalisation",
        "rate": "learning rate",
        "seed": "seed",
        "mse": "MSE",
        "train": "MSE, teacher forcing",
        "outcome": "outcome",
    }
    tables = {"rows": Table("Free-running error after a short training", columns, rows)}
    configuration = {"model": MODEL, "data": str(DATA), "steps": STEPS, "batch": BATCH, "sequences": SEQUENCES}
    complete = len(rows) == len(NORMS) * len(RATES) * len(SEEDS)
    publish(Report("normalisation", "Normalisation and learning rate", tables, configuration, NOTES, complete=complete))


@pytest.mark.parametrize(("norm", "rate", "seed"), itertools.product(NORMS, RATES, SEEDS))
def test_normalisation(benchmark, results, norm, rate, seed):
    torch.manual_seed(seed)
    model = CrevNetConfig(norm=norm, **MODEL).build()
    row: dict[str, Any] = {
        "norm": norm,
        "rate": f"{rate:g}",
        "seed": seed,
        "mse": None,
        "train": None,
        "outcome": "diverged",
    }
    loss = benchmark.pedantic(train, args=(model, rate), rounds=1)
    if math.isfinite(loss):
        validation = score(model, DATA.build_validation(SEQUENCES), OBSERVED, batch_size=32, device=torch.device("cpu"))
        row |= {"mse": validation["mse"], "train": loss * 32 * 32, "outcome": "trained"}
    results.append(row)


def train(model: CrevNet, rate: float) -> float:
    """Train; the mean loss of the last steps, or NaN if it diverged."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    dataset = DATA.build_train()
    losses = []
    for step in range(STEPS):
        clips = frames_to_clips(dataset.batch(range(step * BATCH, (step + 1) * BATCH)), 3, "depth")
        optimiser.zero_grad()
        try:
            loss = mse_loss(model(clips[:, :-1]), clips[:, 1:]).clone()
            loss.backward()
        except ReversibilityError:
            return math.nan
        if not math.isfinite(float(loss.detach())):
            return math.nan
        optimiser.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20
