"""`python -m crevnet.train`: train CrevNet, or with `--model NAME` another video predictor, on Moving MNIST, or with
`--data videos` on videos.

Without `--config`, a small configuration on embedded digits that takes a few minutes on two cores
(`configs/quick.yaml`). Other options override it: `python -m crevnet.train --steps 100`.
"""

import sys

import crevnet.extra  # noqa: F401  first
from crevnet.checkpoint import DamagedCheckpoint
from crevnet.command import CONFIGS, parse_train_config
from crevnet.data import WorkerDied
from crevnet.datasets import DATASETS
from crevnet.models import MODELS
from crevnet.training import train
from crevnet.training_step import TrainingDiverged
from revgrad import ReversibilityError


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, report; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = [f"--config={CONFIGS / 'quick.yaml'}", *arguments]
    config = parse_train_config(
        "python -m crevnet.train",
        f"Train a video predictor. --model NAME chooses it: {', '.join(MODELS)}. --data NAME chooses what to train on: "
        f"{', '.join(DATASETS)}. Without --config, configs/quick.yaml is read, whose values take the place of the "
        "defaults listed here.",
        arguments,
    )
    try:
        train(config)
    except (TrainingDiverged, WorkerDied, DamagedCheckpoint, ReversibilityError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
