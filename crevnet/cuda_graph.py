"""A whole training step as one CUDA graph: forward pass, reversible backward pass and Adam.

A step launches thousands of operators, most of them a few microseconds long; replayed from a graph they cost the host
one launch. What is captured must not wait for the device, so that the engine's checks are deferred: one tensor tells
whether all passed, Adam leaves everything as it is where one failed, and the host looks once per step.

Not yet run on a GPU. All but the capture runs on a CPU as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from crevnet.capture import captured, side_stream
from crevnet.config import TrainConfig
from revgrad import DeferredChecks, ResidueOverflow

_WARM_UP = 2
"""Steps before the capture, in which libraries make their workspaces and kernels are tuned. They change nothing."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work that has run before, returns what repeats it."""


def check_possible(config: TrainConfig, device: torch.device, processes: int) -> None:
    """Raise for a run whose steps cannot be one and the same graph.

    Raises:
        ValueError: Names the option.
    """
    mode, offload = (getattr(config.model, name, None) for name in ("mode", "offload"))
    reasons = [
        (device.type != "cuda", f"needs a CUDA device, and this run is on {device.type}"),
        (processes > 1, f"is for one process, and this run has {processes}"),
        (config.feeding.kind == "scheduled", "repeats one step: with feeding.kind 'scheduled' each is another"),
        (offload, "cannot wait for states on the host: set model.offload to false"),
        (mode == "checkpoint", "knows no model.mode 'checkpoint', which sets random states: choose another"),
        (
            config.run.memory_bytes is not None,
            "has memory of its own, which run.memory does not count: leave that 'auto'",
        ),
    ]
    for holds, reason in reasons:
        if holds:
            raise ValueError(f"run.cuda_graph {reason}")


class GraphedStep:
    """Training steps on batches of one shape, all of them replays of one graph.

    The first one measures how much the residue spills, warms up, and captures; and so does a step whose residue has
    spilled more than there is room for, before it is repeated. None of that changes weights, moments or statistics.

    Args:
        loss: Of a batch, a scalar.
        model: What is trained.
        optimiser: `adam(..., capturable=True)`: a graph can capture it, and a tensor can tell it to change nothing.
        backward: Pulls the gradients back.
        clip_norm: Largest norm of the whole gradient; 0 does not clip.
        capture: By default `captured`.
    """

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        model: nn.Module,
        optimiser: torch.optim.Adam,
        *,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        clip_norm: float = 0.0,
        capture: Capture | None = None,
    ) -> None:
        self.checks = DeferredChecks()
        self._loss, self._backward, self._optimiser, self._clip_norm = loss, backward, optimiser, clip_norm
        self._capture = captured if capture is None else capture
        self._parameters = list(model.parameters())
        self._buffers = list(model.buffers())
        self._before = [b.clone() for b in self._buffers]
        device = self._parameters[0].device
        self._rate = torch.zeros((), device=device)
        self._frozen = torch.ones((), device=device)
        self._batch: Tensor | None = None
        self._report: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        for group in optimiser.param_groups:
            group["lr"] = self._rate

    def __call__(self, batch: Tensor, rate: float) -> tuple[float, float]:
        """One step; returns the loss and the norm of the gradient.

        Where one of them is not finite, or an error is raised, nothing has changed but the gradients.

        Args:
            batch: Of the same shape every time.
            rate: Learning rate.

        Raises:
            ReversibilityError: A check of the engine failed.
            ValueError: The batch has another shape than the first one.
        """
        if self._batch is None:
            self._batch = torch.empty_like(batch)
        if batch.shape != self._batch.shape:
            raise ValueError(
                f"a graph repeats steps on batches of shape {tuple(self._batch.shape)}, got {tuple(batch.shape)}: make "
                "another GraphedStep for them"
            )
        self._rate.fill_(rate)
        self._batch.copy_(batch)
        if self._replay is None:
            self._prepare()
        try:
            return self._step()
        except ResidueOverflow:
            self._prepare()
            return self._step()

    def _step(self) -> tuple[float, float]:
        self._replay()  # type: ignore[misc]
        loss, norm, passed = self._report.tolist()  # type: ignore[union-attr]  # the only wait
        if not passed:
            self._restore()
            self.checks.raise_if_failed()
        return loss, norm

    def _prepare(self) -> None:
        """Measure, warm up and capture."""
        self._replay = self._report = None  # frees the graph before
        self._frozen.fill_(1)
        with side_stream(self._rate.device):
            self._save()
            try:
                with self.checks.measuring():
                    self._pass()
            finally:
                self._restore()
            for _ in range(_WARM_UP):
                self._work()
                self._restore()
            self._replay = self._capture(self._work)
            self._restore()
        self._frozen.fill_(0)

    def _work(self) -> None:
        """What is captured. Nothing in it waits for the device."""
        self._save()
        self.checks.forget()
        with self.checks:
            loss = self._pass()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip_norm:
            # A norm that is not finite would make every gradient so; they are to be looked at.
            total = norm.nan_to_num(0.0, 0.0, 0.0)
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, total)
        passed = self.checks.passed(loss.device) & loss.isfinite() & norm.isfinite()
        self._optimiser.found_inf = (~passed).float().maximum(self._frozen)  # type: ignore[attr-defined]
        self._optimiser.step()
        self._report = torch.stack([loss.double(), norm.double(), passed.double()])

    def _pass(self) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._loss(self._batch)  # type: ignore[arg-type]
        self._backward(loss)
        return loss.detach()

    def _save(self) -> None:
        """Statistics of normalisation layers, which a forward pass moves."""
        for kept, buffer in zip(self._before, self._buffers, strict=True):
            kept.copy_(buffer)

    def _restore(self) -> None:
        for kept, buffer in zip(self._before, self._buffers, strict=True):
            buffer.copy_(kept)
