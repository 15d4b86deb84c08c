"""Record a training run in the documentation: `python -m benchmarks.record_run RUN`.

Writes `docs/mnist-run.md` and the run's pictures, losses and metrics into `docs/images/` and `docs/mnist-run/`; the
page's numbers come from there.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.reporting import Table, write_file

DOCS = Path(__file__).parents[1] / "docs"


def record(run: Path, docs: Path = DOCS) -> None:
    """Copy what a finished run has written, and write the page about it.

    Raises:
        FileNotFoundError: The run is not finished.
    """
    metrics = json.loads((run / "metrics.json").read_text())
    (docs / "images").mkdir(parents=True, exist_ok=True)
    (docs / "mnist-run").mkdir(exist_ok=True)
    for name, target in {
        "predictions.gif": docs / "images" / "mnist.gif",
        "predictions.png": docs / "images" / "mnist.png",
        "loss.png": docs / "images" / "mnist-loss.png",
        "metrics.json": docs / "mnist-run" / "metrics.json",
        "train.csv": docs / "mnist-run" / "train.csv",
        "validation.csv": docs / "mnist-run" / "validation.csv",
    }.items():
        shutil.copyfile(run / name, target)
    write_file(docs / "mnist-run.md", page(metrics, validations(run / "validation.csv")).encode())


def page(metrics: dict, validation: list[dict[str, float]]) -> str:
    """The Markdown page."""
    columns = {"what": "", "mse": "MSE", "ssim": "SSIM", "psnr": "PSNR, dB"}
    rows = [{"what": "CrevNet", **metrics}, {"what": "copying the last frame", **metrics["copy_last_frame"]}]
    caption = f"{metrics['sequences']} sequences of digits never seen in training, weights of step {metrics['step']}"
    test = Table(caption, columns, rows)
    progress = Table("Validation while training", {"step": "step", "mse": "MSE", "ssim": "SSIM"}, validation)
    return f"""# A run on real MNIST

Two MNIST digits in 32 x 32 frames, 10 frames in and 10 out, with a network small enough for a laptop
(`crevnet/configs/mnist_small.yaml`, {metrics["parameters"]:,} parameters). MSE is the squared error summed over the
frame; SSIM and PSNR are for values in 0 .. 1. It is a short run of a small model: the paper trains a network of 4.1
million parameters for 300,000 steps on 64 x 64 frames, and its numbers are not to be compared with these. The digits go
the right way up to the last frame, and keep their shape in the first few.

```bash
python -m crevnet.train --config crevnet/configs/mnist_small.yaml --data.root MNIST
```

{test.to_markdown()}

![Ground truth above, prediction below](images/mnist.gif)

![Predictions, frame by frame](images/mnist.png)

{progress.to_markdown()}

![Training loss](images/mnist-loss.png)

{metrics["steps"]} steps took {metrics["seconds"] / 60:.0f} minutes{where(metrics.get("trained_on"))}. Peak activation
memory of a training step ({metrics["way"]}) was {metrics["peak_activation_bytes"] / 1e6:.1f} MB. The files behind this
page: [metrics](mnist-run/metrics.json), [training log](mnist-run/train.csv), [validation
log](mnist-run/validation.csv).
"""


def where(machine: dict[str, Any] | None) -> str:
    """What a run was trained on, as the end of a clause; nothing where it does not say."""
    if machine is None:
        return ""
    told = f" on {machine['device_name']}"
    if machine["device"] == "cpu":
        told += f", {counted(machine['threads'], 'thread')}"
    if machine["processes"] > 1:
        told += f" in each of {machine['processes']} processes"
    told += f",\nwith PyTorch {machine['torch']}"
    if machine["commit"]:
        hashed, _, changed = machine["commit"].partition("-")
        told += f", at commit {hashed[:12]}{' with uncommitted changes' if changed else ''}"
    return told


def counted(number: int, what: str) -> str:
    """So many, in words."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def validations(path: Path) -> list[dict[str, float]]:
    """The rows of a run's validation log."""
    with path.open(newline="") as f:
        return [{"step": int(r["step"]), "mse": float(r["mse"]), "ssim": float(r["ssim"])} for r in csv.DictReader(f)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    record(parser.parse_args().run)
