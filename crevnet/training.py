"""The trainer: set up, fit, validate, and finish with metrics and pictures of the test set."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.seed import seed_everything
from torch import Tensor
from torch.utils._pytree import tree_leaves

from crevnet.adam import adam
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.config import TrainConfig
from crevnet.convolution import use_channels_last
from crevnet.cuda_graph import check_possible
from crevnet.data import train_batches, worker_deaths
from crevnet.evaluate import score
from crevnet.files import written_whole
from crevnet.free_memory import free_bytes
from crevnet.interrupt import Interrupt
from crevnet.launch import from_first, launch, local_processes
from crevnet.logs import RunLog
from crevnet.machine import trained_on
from crevnet.progress import Progress
from crevnet.run import check_same_architecture, initial_weights, opened
from crevnet.sharding import load_moments, load_weights, own_part, whole, whole_model
from crevnet.training_step import TrainingDiverged, TrainingStep
from crevnet.video_model import VideoConfig, VideoModel
from crevnet.visualize import DRAWN_CHANNELS, loss_curve, prediction_gif, prediction_grid
from crevnet.ways import MARGIN, NoWayFits, choose, training_bytes
from revgrad import ReversibilityError


class Trainer:
    """One training run in one process (of several, under torchrun).

    Args:
        config: The run.
        fabric: Launched; device, precision and process group.
        folder: Folder of the run.
    """

    def __init__(self, config: TrainConfig, fabric: Fabric, folder: Path) -> None:
        self.config = config
        self.fabric = fabric
        self.folder = folder
        self.main = fabric.global_rank == 0
        self.checkpoints = CheckpointDirectory(folder / "checkpoints", keep=config.run.keep)
        if config.run.cuda_graph:
            check_possible(config, fabric.device, fabric.world_size)
        seed_everything(config.seed, verbose=False)
        self.raw_model = config.model.build()
        if config.run.strategy == "ddp":  # FSDP refuses weights of another layout
            use_channels_last(self.raw_model)
        self.model = fabric.setup_module(self.raw_model)
        rate, betas = config.optimiser.learning_rate, config.optimiser.betas
        optimiser = adam(self.raw_model.parameters(), rate, betas, capturable=config.run.cuda_graph)
        self.optimiser: Any = fabric.setup_optimizers(optimiser)
        self.model.mark_forward_method("loss")
        self.training_step = TrainingStep(config, fabric, self.model, self.raw_model, self.optimiser)
        self.step = 0
        self.seconds = 0.0
        self.best_mse = math.inf
        self.way: str | None = None
        self.trained_on: dict[str, Any] | None = None
        """What the last steps were taken on, where that is known."""
        self._measured: tuple[str | None, dict[str, Any] | None] = (None, None)
        """The way and what it was on, when the peak of activations was measured."""

    def resume(self) -> bool:
        """Go on from the newest undamaged checkpoint, if there is one.

        Raises:
            DamagedCheckpoint: All are damaged.
        """
        found = self.checkpoints.latest()
        if found is None:
            return False
        load_weights(self.raw_model, found.weights)
        load_moments(self.optimiser, found.state["optimiser"], list(self.raw_model.parameters()))
        self.step = found.state["step"]
        self.seconds = found.state["seconds"]
        # An error whose weights are lost would keep later ones from being the best.
        self.best_mse = math.inf if self.checkpoints.intact_best() is None else found.state["best_mse"]
        self.training_step.peak_activation_bytes = found.state["peak_activation_bytes"]
        self.way = found.state.get("way")
        self.trained_on = found.state.get("trained_on")
        self._measured = (self.way, self.trained_on)
        torch.set_rng_state(found.state["rng"])
        if found.state["cuda_rng"] is not None and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(found.state["cuda_rng"], self.fabric.device)
        return True

    def begin(self) -> str | None:
        """Take the weights of `run.init`, if that is set; returns a line that tells.

        Raises:
            FileNotFoundError: No run and no checkpoint is there.
            DamagedCheckpoint: The checkpoint is damaged.
            ValueError: It is of another architecture.
        """
        source = self.config.run.init
        if source is None:
            return None

        def read() -> tuple[int, dict[str, Tensor]]:
            found = initial_weights(source)
            return found.step, found.weights

        # Read by one: a run that still trains may have a better checkpoint for the next process.
        step, weights = from_first(self.fabric, read)
        check_same_architecture(weights, self.raw_model.state_dict(), source)
        load_weights(self.raw_model, weights)
        return f"Beginning with the weights of step {step} in {source}"

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint; only rank 0 does.

        Raises:
            OSError: Say that the disk is full; in all processes.
        """
        weights, optimiser = whole(self.raw_model.state_dict()), whole(self.optimiser.state_dict())

        def write() -> None:
            cuda = self.fabric.device.type == "cuda"
            state = {
                "optimiser": optimiser,
                "step": self.step,
                "seconds": self.seconds,
                "best_mse": self.best_mse,
                "peak_activation_bytes": self.training_step.peak_activation_bytes,
                "way": self.way,
                "trained_on": self.trained_on,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
            }
            self.checkpoints.save(self.step, weights, state, best=best)

        from_first(self.fabric, write)

    def choose_way(self) -> str:
        """Train in the fastest way that fits into memory, the same on all processes; returns a line that tells.

        Raises:
            NoWayFits: None does.
        """
        config, world = self.config, self.fabric.world_size
        ways = config.model.ways(config.data.frames - config.model.clip, self.way)
        if len(ways) == 1 and config.run.memory_bytes is None:
            self.way, self.raw_model.config = next(iter(ways.items()))
            return f"Training {self.way}"

        def need(way: VideoConfig) -> float:
            found = training_bytes(
                way,
                config.batch_size // world,
                config.data.frames,
                self.fabric.device,
                gradients=2 if world > 1 and config.run.strategy == "ddp" else 1,
                autocast=self.fabric.autocast,
            )
            return self._agree(found, "max")

        try:
            choice = choose(ways, self.available_bytes(), need)
        except NoWayFits as error:
            raise NoWayFits(f"{error}{self._elsewhere('another batch_size')}") from error
        self.way, self.raw_model.config = choice.name, choice.config
        return str(choice)

    def available_bytes(self) -> float:
        """What training may take of the memory of each process's device: as configured, or what is free."""
        if self.config.run.memory_bytes is not None:
            return self.config.run.memory_bytes
        device = self.fabric.device
        free = free_bytes(device) / (local_processes() if device.type == "cpu" else 1)
        # Training takes these too, but they are there already; Adam's moments only in a run that goes on.
        held = [*self.raw_model.parameters(), *tree_leaves(self.optimiser.state_dict())]
        free += sum(own_part(x).nbytes for x in held if isinstance(x, Tensor))
        return self._agree(MARGIN * free, "min")

    def fit(self) -> bool:
        """Train to the last step; False if interrupted before (and saved).

        Raises:
            TrainingDiverged: Something is not finite; the last checkpoint is untouched.
            WorkerDied: A worker has ended; as untouched.
        """
        config, run = self.config, self.config.run
        progress = Progress(config, self.folder, self.step) if self.main else None
        dataset = config.data.build_train()
        validation = config.data.build_validation(run.validation_sequences)
        world = self.fabric.world_size
        batches = train_batches(
            dataset,
            config.batch_size,
            start_step=self.step,
            rank=self.fabric.global_rank,
            world_size=world,
            workers=run.workers,
        )
        saved_at = self.step
        if config.steps == 0:
            self.fabric.barrier()  # until all have looked for checkpoints
            self.save()
        if self.step < config.steps:
            self.trained_on = from_first(self.fabric, lambda: trained_on(self.fabric.device, world))
            if self._measured != (self.way, self.trained_on):
                self.training_step.measure_anew(self.step)
        with self._divergence(), worker_deaths(), Interrupt() as interrupt, progress or nullcontext():
            while self.step < config.steps:
                started = time.perf_counter()
                loss, norm = self._train_step(next(batches).to(self.fabric.device))
                elapsed = time.perf_counter() - started
                self.seconds += elapsed
                if progress is not None:
                    rate, peak = float(self.optimiser.param_groups[0]["lr"]), self.training_step.peak_activation_bytes
                    progress.step(self.step, loss=loss, norm=norm, learning_rate=rate, seconds=elapsed, peak=peak)
                best = False
                if self.step % run.validate_every == 0 or self.step == config.steps:
                    best = self._validate(validation, progress)
                stop = bool(self._agree(interrupt.requested is not None, "max"))
                if best or stop or self.step % run.checkpoint_every == 0 or self.step == config.steps:
                    self.save(best=best)
                    saved_at = self.step
                if stop:
                    break
        if self.step < config.steps:
            command = "the same command" if run.folder else f"the same command with --run.folder {self.folder}"
            self.fabric.print(
                f"Interrupted and saved at step {saved_at} in {self.folder}: {command} goes on from there."
            )
        return self.step >= config.steps

    def finish(self) -> dict[str, Any]:
        """Evaluate the best weights on the test set; write `metrics.json`, pictures and the loss curve.

        If the best checkpoint is damaged, a RuntimeWarning says so, and the newest undamaged one is evaluated.

        Raises:
            DamagedCheckpoint: All are damaged.
        """
        found = self.checkpoints.intact_best() or self.checkpoints.latest()
        if found is not None:
            load_weights(self.raw_model, found.weights)
        config = self.config
        dataset = config.data.build_test()
        result = self._score(dataset, progress=True)
        result |= {
            "step": found.step if found is not None else self.step,
            "steps": config.steps,
            "seconds": self.seconds,
            "peak_activation_bytes": self.training_step.peak_activation_bytes,
            "way": self.way,
            "trained_on": self.trained_on,
            "parameters": sum(p.numel() for p in self.raw_model.parameters()),
            "data": config.data.source(),
            "data_range": 1.0,
        }
        model = whole_model(self.raw_model)

        def write() -> None:
            with written_whole(self.folder / "metrics.json") as part:
                part.write_text(json.dumps(result, indent=2) + "\n")
            self._draw(model, dataset.batch(range(min(4, len(dataset)))))

        from_first(self.fabric, write)
        return result

    def _train_step(self, frames: Tensor) -> tuple[float, float]:
        """One optimiser step on `[B, T, C, H, W]`; returns the loss and the norm of the gradient."""
        found = self.training_step(frames, self.step)
        self.step += 1
        return found

    @contextmanager
    def _divergence(self) -> Iterator[None]:
        """Completes the advice of `TrainingDiverged`, which is to change options."""
        try:
            yield
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}{self._elsewhere('a run with other options')}") from error

    def _elsewhere(self, what: str) -> str:
        """Ends an error whose advice this folder would refuse, because it has checkpoints."""
        kept = self.checkpoints.steps()
        return f"; {what} needs another run.folder, since {self.folder} has checkpoints" if kept else ""

    def _validate(self, dataset: Any, progress: Progress | None) -> bool:
        """Validate; whether this is the best so far."""
        try:
            result = self._score(dataset)
        except (ReversibilityError, ValueError) as error:
            raise TrainingDiverged(
                f"step {self.step}: validation failed: {error}; the last checkpoint is untouched"
            ) from error
        if progress is not None:
            progress.validated(self.step, result)
        best = result["mse"] < self.best_mse
        self.best_mse = min(self.best_mse, result["mse"])
        return best

    def _score(self, dataset: Any, *, progress: bool = False) -> dict[str, Any]:
        several = self.fabric.world_size > 1
        return score(
            whole_model(self.raw_model),
            dataset,
            self.config.observed,
            batch_size=max(1, self.config.batch_size // self.fabric.world_size),
            device=self.fabric.device,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            all_reduce=(lambda x: self.fabric.all_reduce(x, reduce_op="sum")) if several else None,  # type: ignore[arg-type,return-value]
            progress=progress,
        )

    def _draw(self, model: VideoModel, frames: Tensor) -> None:
        channels = frames.shape[2]
        if channels in DRAWN_CHANNELS:
            observed = self.config.observed
            given, target = frames[:, :observed], frames[:, observed:]
            prediction = model.eval().predict(given.to(self.fabric.device), target.shape[1]).cpu()
            prediction_grid(given, target, prediction, path=self.folder / "predictions.png")
            prediction_gif(given, target, prediction, path=self.folder / "predictions.gif")
        else:
            self.fabric.print(f"No pictures of predictions: frames of {channels} channels are not drawn")
        with RunLog(self.folder, self.step + 1) as log:
            steps, losses = log.read("train", "loss")
        if steps:
            loss_curve(steps, losses, path=self.folder / "loss.png")

    def _agree(self, value: float, reduce_op: str) -> float:
        """One number of all processes, `min` or `max`."""
        if self.fabric.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.fabric.device)
        return float(self.fabric.all_reduce(tensor, reduce_op=reduce_op))  # type: ignore[arg-type]


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Run a training to its end, or until interrupted (then None)."""
    fabric = launch(config)
    try:
        with ExitStack() as held:
            folder = from_first(fabric, lambda: held.enter_context(opened(config)))
            result = _train(config, fabric, folder)
            fabric.barrier()
            return result
    finally:
        # A process that ends with its group still alive, or leaves it after another has, may abort in its threads.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _train(config: TrainConfig, fabric: Fabric, folder: Path) -> dict[str, Any] | None:
    trainer = Trainer(config, fabric, folder)
    if trainer.resume():
        fabric.print(f"Going on from step {trainer.step} in {folder}")
    else:
        fabric.print(f"Run folder: {folder}")
        if begun := trainer.begin():
            fabric.print(begun)
    if trainer.step < config.steps:
        fabric.print(trainer.choose_way())
    if not trainer.fit():
        return None
    result = trainer.finish()
    fabric.print(summary(config, result, folder))
    return result


def summary(config: TrainConfig, result: dict[str, Any], folder: Path) -> str:
    """The closing table: the model beside the copy-last-frame baseline."""
    copied = result["copy_last_frame"]
    lines = [
        f"{config.data.test_source()}, {result['sequences']} sequences (MSE summed over the frame; SSIM, PSNR for "
        f"values in 0 .. 1):",
        f"{'':18}{'MSE':>9}{'SSIM':>9}{'PSNR':>9}",
        f"{config.model.name:18}{result['mse']:9.2f}{result['ssim']:9.4f}{result['psnr']:9.2f}",
        f"{'copy last frame':18}{copied['mse']:9.2f}{copied['ssim']:9.4f}{copied['psnr']:9.2f}",
        f"{_beside_copying(result['mse'], copied['mse'])}. Metrics, pictures and checkpoints: {folder}",
    ]
    return "\n".join(lines)


def _beside_copying(error: float, copied: float) -> str:
    return f"MSE is {error / copied:.2f} of copying" if copied else "Copying is perfect: nothing moves in the test set"
