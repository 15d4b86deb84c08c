"""Data-parallel training on several GPUs, projected on paper: `python -m benchmarks.scale_out`.

Nothing is run on several GPUs. What is known is the time of a step on one GPU, from a result of
`benchmarks/gpu/test_training_step.py`, and the bytes of all gradients, counted on the model. What is assumed is the
network. Every GPU keeps its batch, so that more GPUs train on more sequences per step.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.reporting import RESULTS, Table
from crevnet.command import run_command
from crevnet.model import CrevNetConfig

_MEASURED = {"kernels": "triton", "weights": "channels-last", "launched": "called"}


@dataclass(frozen=True)
class Network:
    """What connects GPUs."""

    bytes_per_second: float
    """Per GPU, in each direction."""
    latency: float
    """Seconds that each step of a ring takes besides."""

    def all_reduce(self, size: int, gpus: int) -> float:
        """Seconds in which a ring sums a tensor of so many bytes over all GPUs.

        The ring takes 2 (n - 1) steps, in each of which every GPU sends the n-th part of the tensor.
        """
        return 2 * (gpus - 1) * (size / gpus / self.bytes_per_second + self.latency)


def gradient_bytes(config: CrevNetConfig) -> int:
    """Bytes of all gradients, counted on the model."""
    return sum(p.nbytes for p in config.build().parameters() if p.requires_grad)


def measured_step(path: Path, batch: int, variant: str, precision: str) -> tuple[float, str] | None:
    """Seconds of a training step on one GPU and the GPU's name; None if it has not been measured on one.

    Raises:
        ValueError: The file has no such step; lists those that it has.
    """
    report = json.loads(path.read_text()) if path.exists() else {"device": "CPU"}
    if report["device"].startswith("CPU"):
        return None
    wanted = {"batch": batch, "variant": variant, "precision": precision, **_MEASURED}
    for row in report["rows"]:
        if "median" in row and all(row[key] == value for key, value in wanted.items()):
            return row["median"], report["device"]
    there = sorted({f"{r['variant']}, {r['precision']}, batch {r['batch']}" for r in report["rows"] if "median" in r})
    raise ValueError(f"{path} has no step {variant}, {precision}, batch {batch}; it has: {'; '.join(there)}")


def projection(
    size: int, gpus: int, network: Network, step: float | None, batch: int, backward_share: float
) -> dict[str, Any]:
    """A row of the table.

    Args:
        size: Bytes of all gradients.
        gpus: How many.
        network: What connects them.
        step: Seconds of a step on one GPU; None if unknown.
        batch: Sequences per GPU.
        backward_share: Part of the step that is the backward pass, beside which gradients may be summed.
    """
    summing = network.all_reduce(size, gpus)
    row = {"gpus": gpus, "all_reduce_ms": 1e3 * summing}
    if step is None:
        return row
    for name, seconds in (
        ("after", step + summing),
        ("beside", step + max(0.0, summing - backward_share * step)),
    ):
        row |= {f"{name}_ms": 1e3 * seconds, f"{name}_efficiency": step / seconds}
    return row | {"sequences_per_second": gpus * batch / (step + summing)}


def page(
    size: int, rows: list[dict[str, Any]], step: tuple[float, str] | None, what: str, assumptions: list[str]
) -> str:
    """The projection as Markdown, with what it rests on."""
    columns = {"gpus": "GPUs", "all_reduce_ms": "all-reduce, ms"}
    if step is None:
        source = "The step is not yet measured on a GPU: only the time that the gradients take is known."
    else:
        source = f"From a measured step of {1e3 * step[0]:.1f} ms on one GPU: {what}, on {step[1]}."
        columns |= {
            "after_ms": "step, summed after backward, ms",
            "after_efficiency": "efficiency",
            "beside_ms": "step, summed beside backward, ms",
            "beside_efficiency": "efficiency",
            "sequences_per_second": "sequences/s, summed after",
        }
    formats = {"all_reduce_ms": ".3f", "after_efficiency": ".1%", "beside_efficiency": ".1%"}
    notes = [
        "This is a projection, not a measurement on several GPUs.",
        source,
        f"Gradients: {size / 1e6:.2f} MB, counted on the model.",
        *assumptions,
        "All-reduce in a ring of n GPUs: 2 (n - 1) (bytes / n / bandwidth + latency).",
        "CrevNet uses its weights at every time step, so that their gradients are whole only when the backward "
        "pass ends: `after` is what to expect, `beside` a bound.",
        "Not counted: waiting for the slowest GPU, and memory bandwidth that summing takes from the step.",
    ]
    table = Table("Data-parallel training, projected", columns, rows, formats=formats)
    return table.to_markdown() + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def scale_out(
    cell: Literal["stlstm", "convlstm"] = "stlstm",
    *,
    results: Path | None = None,
    batch: int = 16,
    variant: str = "reversible exact",
    precision: str = "float32",
    gpus: tuple[int, ...] = (8, 64),
    gpus_per_node: int = 8,
    nvlink_gb: float = 450.0,
    nvlink_latency_us: float = 2.0,
    network_gbit: float = 400.0,
    network_latency_us: float = 5.0,
    backward_share: float = 3 / 4,
) -> str:
    """Project the training of the paper's CrevNet to several GPUs, and print the table.

    Args:
        cell: Which CrevNet.
        results: A JSON file of `benchmarks/gpu/test_training_step.py`; by default that of the cell.
        batch: Sequences per GPU, as measured.
        variant: Way to train, as measured.
        precision: `float32` or `bfloat16`, as measured.
        gpus: For how many GPUs.
        gpus_per_node: How many of them NVLink connects; between nodes it is the network, which then sets the pace.
        nvlink_gb: GB/s per GPU and direction; NVLink 4 has 450.
        nvlink_latency_us: Microseconds per step of the ring inside a node.
        network_gbit: Gbit/s per GPU and direction between nodes; InfiniBand NDR has 400.
        network_latency_us: Microseconds per step of the ring between nodes.
        backward_share: Part of a step that is its backward pass: in FLOPs 3/4 if reversible, 2/3 if stored.

    Raises:
        ValueError: The results do not have the step, or a number makes no sense.
    """
    if min(gpus, default=0) < 1 or min(nvlink_gb, network_gbit) <= 0 or not 0 <= backward_share <= 1:
        raise ValueError("gpus must be at least 1, bandwidths positive, and backward_share within 0 .. 1")
    inside = Network(1e9 * nvlink_gb, 1e-6 * nvlink_latency_us)
    between = Network(1e9 * network_gbit / 8, 1e-6 * network_latency_us)
    size = gradient_bytes(CrevNetConfig(cell=cell))
    step = measured_step(results or RESULTS / f"gpu_training_step_{cell}.json", batch, variant, precision)
    rows = [
        projection(size, n, inside if n <= gpus_per_node else between, step and step[0], batch, backward_share)
        for n in gpus
    ]
    assumptions = [
        f"Up to {gpus_per_node} GPUs: NVLink with {nvlink_gb:g} GB/s and {nvlink_latency_us:g} us per step of the "
        f"ring; more: a network between nodes with {network_gbit:g} Gbit/s and {network_latency_us:g} us. Both are "
        "assumed, per GPU and direction.",
    ]
    text = page(size, rows, step, f"{cell}, {variant}, {precision}, batch {batch} per GPU", assumptions)
    print(text)
    return text


if __name__ == "__main__":
    run_command(scale_out)
