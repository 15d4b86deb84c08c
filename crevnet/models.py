"""All models by the name that `python -m crevnet.train --model NAME` knows them by."""

from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig

MODELS: dict[str, type[VideoConfig]] = {
    "crevnet": CrevNetConfig,
}
