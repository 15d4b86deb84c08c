"""The eight systems of table 1: their configurations, FLOPs and training memory, counted on the real models.

Nothing is computed where it need not be: fake tensors have shapes and storages, but no values. What they count is
what real tensors count.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import MB, training_peak
from benchmarks.training import STEPS, random_clips
from crevnet.baselines.convlstm import ConvLSTMConfig
from crevnet.baselines.e3d_lstm import E3DLSTMConfig
from crevnet.baselines.frnn import FRNNConfig
from crevnet.baselines.predrnn import PredRNNConfig
from crevnet.baselines.predrnn_plus_plus import PredRNNPlusPlusConfig
from crevnet.baselines.vpn import VPNConfig
from crevnet.model import CrevNet, CrevNetConfig
from crevnet.video_model import VideoConfig

_COUNTED: dict[tuple[str, int, int], float] = {}
_WARM: set[str] = set()
_FLOAT = 4
_ADAM = 2
"""Numbers per parameter that Adam keeps."""


@dataclass(frozen=True)
class System:
    """A row of table 1."""

    name: str
    config: VideoConfig
    paper_gflops: float
    paper_mb: float
    source: str
    """Where the configuration comes from."""
    remark: str
    """What to know about its FLOPs beside the paper's."""
    deeper: Callable[[int], VideoConfig]
    """The same system, so many times as deep."""


def crevnet(cell: Any) -> CrevNetConfig:
    """The paper's CrevNet in float arithmetic, which fake tensors can run."""
    return CrevNetConfig(cell=cell, arithmetic="float", mode="stored")


SYSTEMS = (
    System(
        "ConvLSTM",
        ConvLSTMConfig(patch=1),
        107.4,
        1043,
        "Shi et al. 2015; 4 x 128 channels, 5 x 5, frame embedded by 1 x 1",
        "The paper's figure.",
        lambda n: ConvLSTMConfig(patch=1, hidden=(128,) * 4 * n),
    ),
    System(
        "FRNN",
        FRNNConfig(),
        80.1,
        717,
        "Oliu et al. 2018 and the authors' code; 8 bijective GRUs, 128 to 512 channels",
        "The authors' network takes half of the paper's figure; reading a frame 21.5 and predicting one 17.3 of it.",
        lambda n: FRNNConfig(units=2 * n),
    ),
    System(
        "VPN",
        VPNConfig(),
        309.6,
        5206,
        "Kalchbrenner et al. 2016; 8 + 12 multiplicative blocks, c = 128",
        "The paper's figure, with the masked weights of the decoder counted like any others; generation repeats the "
        "decoder's part for every pixel unless rows are cached.",
        lambda n: VPNConfig(encoder_blocks=8 * n, decoder_blocks=12 * n),
    ),
    System(
        "PredRNN",
        PredRNNConfig(patch=1),
        192.9,
        1666,
        "Wang et al. 2017; 4 x 128 channels, 5 x 5",
        "The paper's figure.",
        lambda n: PredRNNConfig(patch=1, hidden=(128,) * 4 * n),
    ),
    System(
        "PredRNN++",
        PredRNNPlusPlusConfig(patch=1),
        106.8,
        2017,
        "Wang et al. 2018; 128, 64, 64, 64 channels, highway 128, 5 x 5",
        "The published channels with the published equations; the authors' code, which has larger convolutions, would "
        "take 123.1. The paper's figure fits neither.",
        lambda n: PredRNNPlusPlusConfig(patch=1, hidden=(128,) + (64,) * (4 * n - 1)),
    ),
    System(
        "E3D-LSTM",
        E3DLSTMConfig(patch=1),
        381.3,
        2695,
        "Wang et al. 2019 and the authors' code; 4 x 64 channels, 2 x 5 x 5, windows of 2 frames",
        "Convolutions only. Attention takes another 68.7 for each memory recalled, 19 at the end of a sequence; the "
        "paper's figure lies between.",
        lambda n: E3DLSTMConfig(patch=1, hidden=(64,) * 4 * n),
    ),
    System(
        "CrevNet+ConvLSTM",
        crevnet("convlstm"),
        0.919,
        130,
        "section 3.1 and appendix A; 36-layer autoencoder, 8 modules of 2 x 32 channels, 3 x 3 x 3",
        "The paper's figure: predictor and decoding pass, as predictions are not encoded again.",
        lambda n: replace(crevnet("convlstm"), modules=8 * n),
    ),
    System(
        "CrevNet+ST-LSTM",
        crevnet("stlstm"),
        1.618,
        195,
        "as above",
        "As above.",
        lambda n: replace(crevnet("stlstm"), modules=8 * n),
    ),
)
PATCHED = ("ConvLSTM", "PredRNN", "PredRNN++", "E3D-LSTM")
"""Those whose public code trains on frames folded 4 x 4."""


def gflops_per_frame(config: VideoConfig) -> float:
    """GFLOPs of the convolutions that predict one frame, batch 1; FLOPs are twice the multiply-accumulates.

    The baselines read a frame and predict the next. CrevNet is past its warm-up, where nothing is encoded.
    """
    with torch.no_grad(), fake():
        model, clips = config.build().eval(), random_clips(config, 1, 1)
        if isinstance(model, CrevNet):
            _, state = model.step(clips[:, 0])
            return _counted(lambda: model.step(None, state))
        return _counted(lambda: model.loss(clips))


def parameters(config: VideoConfig) -> int:
    """Number of weights."""
    with fake():
        return sum(p.numel() for p in config.build().parameters())


def activations_mb(config: VideoConfig, batch: int, steps: int = STEPS) -> float:
    """Most activation memory of a training step, counted once.

    CrevNet is computed, which takes less time than its thousands of small operators take under fake tensors; the
    others are not.
    """
    key = str(config), batch, steps
    if key not in _COUNTED:
        with nullcontext() if isinstance(config, CrevNetConfig) else fake():
            if key[0] not in _WARM:
                training_peak(config, 1, 1)  # tables that are made once must not count
                _WARM.add(key[0])
            _COUNTED[key] = training_peak(config, batch, steps) / MB
    return _COUNTED[key]


def count_ahead(wanted: Sequence[tuple[VideoConfig, int, int]]) -> None:
    """Count activations by config, batch and steps in a process for every core; `activations_mb` then knows them.

    Counts do not depend on what else the machine does.
    """
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        # In pairs, the batches of one configuration: a process that has counted one need not warm up for the other.
        for (config, batch, steps), mb in zip(wanted, pool.map(_activations_mb, wanted, chunksize=2), strict=True):
            _COUNTED[str(config), batch, steps] = mb


def _activations_mb(wanted: tuple[VideoConfig, int, int]) -> float:
    return activations_mb(*wanted)


def per_sample_mb(config: VideoConfig, steps: int = STEPS) -> float:
    """Memory that one more sample takes."""
    return activations_mb(config, 2, steps) - activations_mb(config, 1, steps)


def training_mb(config: VideoConfig, activations: float) -> float:
    """Everything that training on one sample takes: weights, gradients, Adam's moments, activations."""
    return parameters(config) * (2 + _ADAM) * _FLOAT / MB + activations


def allocated_mb(config: VideoConfig) -> float | None:
    """Memory of one more sample by the books of CUDA's allocator; None where there is no device."""
    if not torch.cuda.is_available():
        return None
    peaks = []
    for batch in (1, 2):
        model, clips = config.build().cuda(), random_clips(config, batch, STEPS).cuda()
        for _ in range(2):  # the first step also makes workspaces that stay
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.loss(clips).backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
        del model, clips
    return (peaks[1] - peaks[0]) / MB


@contextmanager
def fake() -> Iterator[None]:
    """Tensors made inside have no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _counted(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 1e9
