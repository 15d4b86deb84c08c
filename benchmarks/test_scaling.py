"""Memory and step time as CrevNet grows: `pytest benchmarks/test_scaling.py --benchmark-only --sweeps`.

Reversible against stored autograd and `torch.utils.checkpoint` around every time step, with the same weights: against
the number of predictive modules, the number of frames and the resolution; and the largest model that trains in 16 GB.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.memory import marginal_mb_of, training_peak
from benchmarks.pictures import scaling_curves
from benchmarks.reporting import Report, Table, spread
from benchmarks.timing import processor_seconds, rotated
from benchmarks.training import STEPS, Variant, random_clips, training_step
from crevnet.convolution import use_channels_last
from crevnet.model import CrevNetConfig

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

STORED, CHECKPOINT = Variant("stored", "float"), Variant("checkpoint", "float")
EXACT, INVERTED = Variant("reversible"), Variant("reversible", cell_states="inverted")
VARIANTS = (STORED, CHECKPOINT, EXACT, INVERTED)
PAPER = CrevNetConfig()
FEW = 2
"""Time steps where it is not their number that grows."""
AXES: dict[str, list[tuple[int, CrevNetConfig, int]]] = {
    "modules": [(n, replace(PAPER, modules=n), FEW) for n in (4, 8, 16, 32, 64)],
    "frames": [(n, PAPER, n - 1) for n in (10, 20, 40, 80)],
    "pixels": [(n, replace(PAPER, image_size=n), FEW) for n in (64, 128, 256, 512)],
}
"""Per axis: the value, the configuration and the number of time steps."""
ROUNDS, LARGE = 2, 20
"""How often every variant is timed, and from how many seconds a round on it is timed once."""
BUDGET = 16e9
SHOWN = 2e9
"""What is run to show that the computed sizes are right: a process takes half as much again as its tensors."""
_BYTES_PER_WEIGHT = 16
"""The weight, its gradient and Adam's two moments in float32."""

NOTES = (
    "Paper's Moving MNIST configuration with ST-LSTM, batch 1, float32, one thread; random weights and frames.",
    "Reversible in exact arithmetic: in float arithmetic, 64 gated modules do not invert, which the engine refuses.",
    f"{FEW} time steps against modules and pixels; against frames n - 1, which in clips of three are n + 2 frames.",
    "MB: what one more sample takes, that is, the peak of a step with batch 2 minus that with batch 1.",
    f"Step time: processor time, median of {ROUNDS} rounds, in each of which every variant runs once, in rotating "
    f"order, after a round that does not count; one round where it takes more than {LARGE} seconds. `over stored` is "
    "the median of the ratios within a round.",
    f"Largest model: so many predictive modules that weights, gradients, Adam's moments and the activations of one "
    f"sequence of {STEPS} time steps take 16 GB, computed from the slope between 4 and 8 modules. That the slope holds "
    f"is shown by a training step of the model that is computed for {SHOWN / 1e9:.0f} GB.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, list[dict[str, Any]]]]:
    rows: dict[str, list[dict[str, Any]]] = {"rows": [], "largest": []}
    yield rows
    points = sum(map(len, AXES.values()))
    complete = len(rows["rows"]) == points * len(VARIANTS) and len(rows["largest"]) == len(VARIANTS)
    tables = {
        "rows": Table(
            "Memory of a sample and time of a training step",
            {"axis": "against", "value": "value", "variant": "variant", "mb": "MB", "seconds": "s"}
            | {"over_stored": "over stored"},
            rows["rows"],
        ),
        "largest": Table(
            "The largest CrevNet that trains in 16 GB",
            {"variant": "variant", "modules": "modules", "weights_millions": "M weights"}
            | {"run_modules": "modules run", "planned_gb": "computed, GB", "measured_gb": "measured, GB"},
            rows["largest"],
        ),
    }
    configuration = {"model": str(PAPER), "steps": STEPS, "few_steps": FEW, "rounds": ROUNDS}
    pictures = {"scaling.png": scaling_curves(rows["rows"])} if complete else {}
    publish(Report("scaling", "Scaling", tables, configuration, NOTES, pictures, complete))


@pytest.mark.parametrize(("axis", "point"), [(a, i) for a in AXES for i in range(len(AXES[a]))])
def test_growth(benchmark, results, axis, point):
    value, config, steps = AXES[axis][point]
    warm_up()
    rounds = benchmark.pedantic(timed_rounds, (training_steps(config, steps),), rounds=1)
    for variant in VARIANTS:
        row = {
            "axis": axis,
            "value": value,
            "variant": str(variant),
            "mb": marginal_mb_of(variant.of(config), steps),
            "seconds": spread([r[variant] for r in rounds])["median"],
            "over_stored": spread([r[variant] / r[STORED] for r in rounds])["median"],
        }
        results["rows"].append(row)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_largest_model(benchmark, results, variant):
    sizes = {n: bytes_to_train(variant.of(replace(PAPER, modules=n))) for n in (4, 8)}
    slope = (sizes[8] - sizes[4]) / 4
    largest, shown = (8 + int((budget - sizes[8]) / slope) for budget in (BUDGET, SHOWN))
    planned = sizes[8] + (shown - 8) * slope
    config = variant.of(replace(PAPER, modules=shown))
    measured = benchmark.pedantic(bytes_to_train, (config,), rounds=1)
    row = {
        "variant": str(variant),
        "modules": largest,
        "weights_millions": weights(replace(PAPER, modules=largest)) / 1e6,
        "run_modules": shown,
        "planned_gb": planned / 1e9,
        "measured_gb": measured / 1e9,
    }
    results["largest"].append(row)
    assert measured == pytest.approx(planned, rel=0.02)


def training_steps(config: CrevNetConfig, steps: int) -> dict[Variant, Callable[[], float]]:
    """A training step of the same weights in every variant, which returns its seconds."""
    model, clips = config.build(), random_clips(config, 1, steps)
    use_channels_last(model)

    def stepping(variant: Variant) -> Callable[[], float]:
        def seconds() -> float:
            model.config = variant.of(config)
            model.zero_grad(set_to_none=True)
            return processor_seconds(lambda: training_step(model, clips))

        return seconds

    return {variant: stepping(variant) for variant in VARIANTS}


def timed_rounds(steps: Mapping[Variant, Callable[[], float]]) -> list[dict[Variant, float]]:
    """The seconds of every step in every round but the first, which asks the system for memory of this size."""
    rounds: list[dict[Variant, float]] = []
    for i in range(1 + ROUNDS):
        rounds.append({variant: steps[variant]() for variant in rotated(list(steps), i)})
        if i > 0 and sum(rounds[-1].values()) > LARGE:
            break
    return rounds[1:]


@cache
def warm_up() -> None:
    """What is loaded or tabulated once must not count."""
    for variant in VARIANTS:
        marginal_mb_of(variant.of(replace(PAPER, modules=1)), 1)


def bytes_to_train(config: CrevNetConfig) -> int:
    """Weights, gradients and Adam's moments, and the activations of one sequence, by a training step that is run."""
    return weights(config) * _BYTES_PER_WEIGHT + training_peak(config, 1, STEPS)


def weights(config: CrevNetConfig) -> int:
    """Number of weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())
