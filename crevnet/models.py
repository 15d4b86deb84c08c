"""All models by the name that `python -m crevnet.train --model NAME` knows them by."""

from crevnet.baselines.convlstm import ConvLSTMConfig
from crevnet.baselines.e3d_lstm import E3DLSTMConfig
from crevnet.baselines.frnn import FRNNConfig
from crevnet.baselines.predrnn import PredRNNConfig
from crevnet.baselines.predrnn_plus_plus import PredRNNPlusPlusConfig
from crevnet.baselines.stacked_rnn import StackedRNNConfig
from crevnet.baselines.unet_rnn import UNetRNNConfig
from crevnet.baselines.vpn import VPNConfig
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig

MODELS: dict[str, type[VideoConfig]] = {
    "crevnet": CrevNetConfig,
    "convlstm": ConvLSTMConfig,
    "predrnn": PredRNNConfig,
    "predrnn++": PredRNNPlusPlusConfig,
    "frnn": FRNNConfig,
    "vpn": VPNConfig,
    "e3d-lstm": E3DLSTMConfig,
    "stacked-rnn": StackedRNNConfig,
    "unet-rnn": UNetRNNConfig,
}
