"""Train CrevNet on Moving MNIST for some minutes: `python -m benchmarks.gpu.train_moving_mnist --minutes 20 --out OUT`.

The trainer runs in a process of its own (`crevnet/configs/moving_mnist_stlstm.yaml`), is interrupted when the time is
up, and is then called once more to evaluate the best weights on the test set. The run itself is `OUT/run`: the same
command goes on with it. In OUT is what to keep: configuration, metrics, logs, pictures, loss curve, and the best
weights, below 15 MB; in OUT/state, in three files of half precision, what another machine goes on from:
`--begin OUT --out OTHER`. Options after `--` go to the trainer:
`-- --run.precision bf16-mixed --data.test_sequences 1000`.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.gpu.small_state import grow, shrink
from benchmarks.record_run import validations
from benchmarks.reporting import RESULTS, Report, Table, environment, write_file
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import CONFIGS, as_plain, load_config
from crevnet.evaluate import score
from crevnet.interrupt import Interrupt
from crevnet.run import load_run, select_device

ROOT = Path(__file__).parents[2]
LIMIT = 15_000_000
"""Bytes that the weights may take; in half precision if they must."""
CHECKED = 256
"""Validation sequences on which stored weights are compared with those that were trained."""
OFTEN = ("--run.checkpoint_every", "200", "--run.validate_every", "500")
"""Fewer steps than the configuration's: a time budget ends long before its 300,000."""
_LOOK_EVERY = 0.2
KEPT = ("config.yaml", "metrics.json", "train.csv", "validation.csv", "predictions.png", "predictions.gif", "loss.png")

NOTES = (
    "MSE is the squared error summed over the frame; SSIM and PSNR are for values in 0 .. 1.",
    "The paper trains for 300,000 steps.",
)


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, collect; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="time to train, without the evaluation after it")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is to be kept, and for the run")
    parser.add_argument("--begin", type=Path, help="folder of an earlier OUT: go on from its OUT/state")
    parser.add_argument("--root", type=Path, help="folder of the MNIST files; without, digits embedded in scikit-learn")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for gpu_moving_mnist.json and .md")
    parser.add_argument("options", nargs="*", help="for the trainer, after --")
    given = parser.parse_args(arguments)
    try:
        device = select_device(given.device)
    except ValueError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 0
    run = given.out / "run"
    if given.begin:
        grow(given.begin / "state", run)
    options = [
        f"--config={CONFIGS / 'moving_mnist_stlstm.yaml'}",
        *OFTEN,
        *(["--data.root", str(given.root.resolve())] if given.root else []),
        *given.options,
        *("--run.device", device.type, "--run.folder", str(run.resolve())),
    ]
    if not train_for(60 * given.minutes, options):
        print(f"error: not trained to the end of the time; if it was saved in {run}, the same command goes on with it")
        return 1
    step = CheckpointDirectory(run / "checkpoints").steps()[-1]
    # With no step left to do, the trainer evaluates.
    if trainer([*options, "--steps", str(step)]).wait():
        return 1
    weights = collect(run, given.out, device)
    command = shlex.join(["python", "-m", "benchmarks.gpu.train_moving_mnist", *(arguments or sys.argv[1:])])
    made = report(run, weights, given.minutes, device)
    for path in made.write(environment(command, made.cuda), given.results):
        print(path)
    # Last: what was measured is written whatever comes of this.
    shrink(run, given.out / "state")
    return 0


def trainer(options: list[str]) -> "subprocess.Popen[bytes]":
    """Start the trainer."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    command = [sys.executable, "-m", "crevnet.train", *options]
    # In a group of its own it gets no Ctrl-C from the terminal, which together with ours would be one too many.
    return subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)


def train_for(seconds: float, options: list[str]) -> bool:
    """Train until the time is up or the last step is done; False if it failed or this process is interrupted."""
    process = trainer(options)
    stop = time.monotonic() + seconds
    with Interrupt() as interrupt:
        while process.poll() is None and interrupt.requested is None and time.monotonic() < stop:
            time.sleep(_LOOK_EVERY)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it ends after the step in progress, and saves
        return process.wait() == 0 and interrupt.requested is None


def collect(run: Path, out: Path, device: torch.device) -> dict[str, Any]:
    """Copy what is to be kept; what became of the weights."""
    for name in KEPT:
        if (run / name).exists():
            shutil.copyfile(run / name, out / name)
    loaded = load_run(run, "best", device)
    trained = loaded.model.state_dict()
    data, stored = fit_weights(trained, LIMIT)
    write_file(out / "weights.safetensors", data)
    kept = {"step": loaded.step, "megabytes": len(data) / 1e6, "dtype": stored}
    validation = loaded.config.data.build_validation(min(CHECKED, loaded.config.run.validation_sequences))
    for key, weights in {"mse_as_trained": trained, "mse_as_stored": safetensors.torch.load(data)}.items():
        loaded.model.load_state_dict(weights)
        options = {"batch_size": loaded.config.batch_size, "device": device}
        kept[key] = score(loaded.model, validation, loaded.config.observed, **options)["mse"]
    return kept


def fit_weights(weights: Mapping[str, Tensor], limit: int) -> tuple[bytes, str]:
    """Weights as a safetensors file, as they are or else in half precision; and which of the two.

    Raises:
        ValueError: Neither is small enough.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    half = {name: t.half() if t.is_floating_point() else t for name, t in plain.items()}
    for tensors, stored in ((plain, "as trained"), (half, "float16")):
        data = safetensors.torch.save(tensors)
        if len(data) <= limit:
            return data, stored
    raise ValueError(f"the weights take {len(data) / 1e6:.1f} MB in float16, more than {limit / 1e6:.1f} MB")


def report(run: Path, weights: dict[str, Any], minutes: float, device: torch.device) -> Report:
    """The report of a finished run."""
    metrics = json.loads((run / "metrics.json").read_text())
    columns = {"what": "", "mse": "MSE", "ssim": "SSIM", "psnr": "PSNR, dB"}
    compared = [{"what": "CrevNet", **metrics}, {"what": "copying the last frame", **metrics["copy_last_frame"]}]
    validated = validations(run / "validation.csv") if (run / "validation.csv").exists() else []
    steps = CheckpointDirectory(run / "checkpoints").steps()[-1]
    training = {
        "minutes": metrics["seconds"] / 60,
        "steps": steps,
        "seconds_per_step": metrics["seconds"] / max(1, steps),
        "peak_mb": metrics["peak_activation_bytes"] / 1e6,
    }
    tables = {
        "metrics": Table(
            f"{metrics['sequences']} test sequences, {metrics['data']}, weights of step {metrics['step']}",
            columns,
            compared,
        ),
        "validation": Table(
            "Validation while training", {"step": "step", "mse": "MSE", "ssim": "SSIM"}, validated, decimals=3
        ),
        "training": Table(
            "Training",
            {"minutes": "minutes", "steps": "steps", "seconds_per_step": "s per step", "peak_mb": "activations, MB"},
            [training],
            decimals=3,
        ),
        "weights": Table(
            "Weights that were kept, and their error on validation sequences",
            {"step": "step", "dtype": "dtype", "megabytes": "MB"}
            | {"mse_as_trained": "MSE as trained", "mse_as_stored": "MSE as stored"},
            [weights],
        ),
    }
    configuration = {"minutes": minutes, **as_plain(load_config(run / "config.yaml"))}
    cuda = device.type == "cuda"
    return Report("gpu_moving_mnist", "CrevNet on Moving MNIST", tables, configuration, NOTES, cuda=cuda)


if __name__ == "__main__":
    sys.exit(main())
