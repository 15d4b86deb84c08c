"""All data sets by the name that `python -m crevnet.train --data NAME` knows them by."""

from crevnet.data import DataConfig, MovingMNISTConfig, VideosConfig

DATASETS: dict[str, type[DataConfig]] = {
    "moving-mnist": MovingMNISTConfig,
    "videos": VideosConfig,
}
