"""CrevNet: encode with the two-way autoencoder, predict with reversible modules, decode with the inverse of the same
autoencoder.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from crevnet.at_once import apply_at_once
from crevnet.autoencoder import two_way_autoencoder
from crevnet.cells import zero_states
from crevnet.clips import Stacking
from crevnet.convolution import Normalisation
from crevnet.frame_size import check_foldable
from crevnet.predictor import AttentionNorm, reversible_predictor
from crevnet.video_model import VideoConfig, VideoModel
from revgrad import ChainState, Inverse, Residue, unroll
from revgrad.chain import Saved
from revgrad.layer import State, Streams
from revgrad.program import CORE, Part, Program
from revgrad.replay import Snapshot


@dataclass(kw_only=True)
class CrevNetConfig(VideoConfig):
    """Configuration of a CrevNet. The defaults are the paper's Moving MNIST setting with ST-LSTM (section 3.1)."""

    name: Literal["crevnet"] = "crevnet"
    """Which model this is."""
    clip: int = 3
    """Frames per time step."""
    stacking: Stacking = "depth"
    """`depth`: clips are three-dimensional, with 3D convolutions; `channels`: the frames of a clip are channels, with
    2D convolutions.
    """
    cell: Literal["convlstm", "stlstm"] = "stlstm"
    """Recurrent cell of the predictive modules."""
    blocks: tuple[int, ...] = (4, 5, 3)
    """Autoencoder blocks (of three convolutions) per stage."""
    bottleneck: int = 2
    """By how much the inner convolutions of a block are narrower."""
    modules: int = 8
    """Reversible predictive modules."""
    norm: Normalisation = "none"
    """Normalisation in the autoencoder's blocks: `none`, `group` (groups of 16 channels; the released code for
    Traffic4cast has one group of all) or `batch` (as in that for Moving MNIST). Measured, `none` is the most stable:
    `benchmarks/results/normalisation.md`.
    """
    attention_norm: AttentionNorm = "none"
    """Normalisation in the predictive modules' attention: `none`, as the paper writes it, or `group`, over all channels
    at once, as the released code for Traffic4cast normalises: gates then stay open on films that hardly move.
    """
    mode: Literal["auto", "reversible", "checkpoint", "stored"] = "auto"
    """What is kept for the backward pass; the results are the same. With `auto` the trainer takes what is fastest of
    what fits into memory (`run.memory`); a model by itself is reversible.
    """
    arithmetic: Literal["exact", "float"] = "exact"
    """`exact`: fixed-point streams whose inverse is exact bit for bit; `float`: as they come, ill-conditioned for
    closed gates.
    """
    keep_states_every: int = 1
    """Keep the recurrent states of every n-th time step only, recompute the others: less memory, one more forward pass.
    """
    clips_at_once: int = 1
    """Time steps whose clips the autoencoder takes as one batch, since none waits for another: faster, most of all for
    small batches. It takes the memory of one more tensor like all of the clips, about 1 MB a sample in a step of
    10 -> 10 frames; a block's activations on that many clips are not what the peak is made of. Normalisation in
    batches (`norm: batch`) then has the statistics of all of them.
    """
    offload: bool = False
    """On CUDA, keep the recurrent states in host memory between forward and backward pass; in reversible mode."""

    cell_states: Literal["kept", "inverted"] = "kept"
    """The recurrent cells' own states: `kept` for the backward pass, or `inverted` from the last ones, in exact
    arithmetic only: a fifth to a third less memory at the same FLOPs in sequences of about 10 frames and more (with two
    time steps it takes more: `benchmarks/results/scaling.md`), but cell states rounded to 2^-16 and no fused kernel for
    their update.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell_states == "inverted" and self.arithmetic == "float":
            raise ValueError(
                "model.cell_states 'inverted' needs model.arithmetic 'exact': in float arithmetic the inverse would "
                "divide by the forget gate"
            )
        fold = 2 ** len(self.blocks)
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"model.blocks must name at least one block per stage, got {self.blocks}")
        check_foldable(self.image_size, fold, f"{fold}, by which {len(self.blocks)} stages fold it")

    def ways(self, steps: int, begun: str | None = None) -> Mapping[str, VideoConfig]:
        """As in `VideoConfig`: all give equal gradients, up to the order of sums where the model goes on by itself.

        Options of the reversible mode choose it. A run goes on in the way in which it was begun if that still fits, bit
        for bit; in float arithmetic, where the ways round differently, in no other.
        """
        if self.mode != "auto":
            return {self.mode: self}
        reversible = replace(self, mode="reversible")
        if self.keep_states_every > 1 or self.offload:
            return {"reversible": reversible}
        root = math.isqrt(steps - 1) + 1
        sparse = {f"reversible, states every {root} steps": replace(reversible, keep_states_every=root)}
        ways = {"stored": replace(self, mode="stored"), "reversible": reversible, **(sparse if root > 1 else {})}
        if begun in ways:
            first = {begun: ways[begun]}
            return first if self.arithmetic == "float" else first | ways
        return ways

    def build(self) -> "CrevNet":
        """The model, with random weights."""
        return CrevNet(self)


@dataclass
class StepState:
    """What one time step leaves: what the next step needs, and what undoing this step needs."""

    chain: ChainState
    """The recurrent states after the step."""
    features: Streams
    """The predictor's output; a step without input goes on from it."""
    read: list[State]
    """The states that each module of the step has read, without cells that are inverted: what its inverse is
    conditioned on (eq. 5)."""
    residue: Residue | None
    """What exact arithmetic has forgotten up to and including this step; None in float arithmetic."""


class CrevNet(VideoModel):
    """The conditionally reversible network: `x'_t = E^-1(P(E(x_(t-1)) | x_(0:t-2)))` (eq. 4).

    Attributes:
        autoencoder: E, a reversible chain.
        predictor: P, a reversible chain with recurrent states.
    """

    def __init__(self, config: CrevNetConfig) -> None:
        super().__init__(config)
        self.config: CrevNetConfig = config
        channels, *depth, height, width = config.clip_shape()
        stages = len(config.blocks)
        self.size = (*depth, height // 2**stages, width // 2**stages)
        self.width = 2 * channels * 4 ** (stages - 1)
        self.autoencoder = two_way_autoencoder(
            channels, len(self.size), blocks=config.blocks, bottleneck=config.bottleneck, norm=config.norm
        )
        self.predictor = reversible_predictor(
            config.cell, config.modules, self.width, self.size, config.cell_states, config.attention_norm
        )

    def forward(self, clips: Tensor, fed: Sequence[bool] | None = None, steps: int | None = None) -> Tensor:
        """As in `VideoModel`; where nothing is fed, the predictor goes on from its own features (figure 1)."""
        fed = self.feeding(clips, fed, steps)
        given = [clips[:, t] for t, f in enumerate(fed) if f]
        encoder, decoder, together = self.autoencoder, Inverse(self.autoencoder), self.config.clips_at_once
        mode = "reversible" if self.config.mode == "auto" else self.config.mode
        how: dict[str, Any] = {"mode": mode, "arithmetic": self.config.arithmetic}
        ends: dict[str, Any] = {"entry": encoder, "exit": decoder}
        inputs: Iterator[Tensor | Streams] = iter(given)
        if together > 1:
            inputs, ends = zip(*apply_at_once(encoder, (torch.stack(given),), together, **how), strict=True), {}
        outputs, _ = unroll(
            self.predictor,
            [next(inputs) if f else None for f in fed],
            self.initial_state(clips),
            keep_states_every=self.config.keep_states_every,
            offload=self.config.offload,
            **ends,
            **how,
        )
        if together > 1:
            outputs = apply_at_once(decoder, outputs, together, **how)
        return outputs[0].transpose(0, 1)

    def predict_clips(self, clips: Tensor, steps: int) -> Tensor:
        """As in `VideoModel`; what is observed is encoded and not decoded, what is predicted decoded and not encoded.

        Nothing is kept for a backward pass.
        """
        observed = clips.shape[1]
        program = self._program()
        residue = Residue(keep=False) if program.exact else None
        features: Streams = ()
        state = self.initial_state(clips)
        predicted: list[Tensor] = []
        for t, given in enumerate(self.feeding(clips, None, observed + steps - 1)):
            entered = program.enter((clips[:, t],), residue) if given else None
            features, state = program.run_core(0, entered, features, state, residue)
            if t >= observed - 1:
                predicted += program.run_exit(0, features, residue)
        if residue is not None:
            residue.check_range()
        return torch.stack(predicted, dim=1)

    def initial_state(self, like: Tensor) -> ChainState:
        """Zero states for a batch of clips."""
        zero = like.new_zeros(like.shape[0], self.width, *self.size)
        return zero_states(self.config.cell, self.config.modules, zero)

    @torch.no_grad()
    def step(self, clip: Tensor | None, states: StepState | None = None) -> tuple[Tensor, StepState]:
        """One time step, undoable by `reconstruct`.

        Args:
            clip: `[B, C, K, H, W]` or, stacked in channels, `[B, K C, H, W]`; None goes on from the features of the
                step before.
            states: What the step before has left; None at the first step.

        Returns:
            The predicted clip, and the states that belong to it.
        """
        program = self._program()
        if clip is not None:
            self.check_clip(clip)
        elif states is None:
            raise ValueError("step: the first time step needs a clip")
        residue = None
        if program.exact:
            residue = states.residue.clone() if states is not None and states.residue is not None else Residue()
        chain = states.chain if states is not None else self.initial_state(clip)  # type: ignore[arg-type]
        read: list[State] = []

        def keep(part: Part, what: Saved) -> None:
            if part is CORE:
                read.append(what.state)

        given = None if clip is None else program.enter((clip,), residue)
        features, chain = program.run_core(0, given, states.features if states else (), chain, residue, keep=keep)
        (prediction,) = program.run_exit(0, features, residue)
        if residue is not None:
            residue.check_range()
        return prediction, StepState(chain, features, read, residue)

    @torch.no_grad()
    def reconstruct(self, prediction: Tensor, states: StepState) -> Tensor:
        """The clip that a step was given, from what it predicted (eq. 5).

        Bit for bit in exact arithmetic, where the clip is its fixed-point value (`revgrad.snap`).

        Args:
            prediction: The predicted clip that `step` returned.
            states: The states that `step` returned with it.
        """
        self.check_clip(prediction)
        program = self._program()
        residue = states.residue.clone() if states.residue is not None else None
        with Snapshot(program.layers()).frozen_statistics():
            (clip,) = program.undo((prediction,), states.read, residue, states.chain)
        return clip

    def _program(self) -> Program:
        """One time step."""
        decoder = Inverse(self.autoencoder)
        return Program.of_parts(self.autoencoder, self.predictor, decoder, arithmetic=self.config.arithmetic)
