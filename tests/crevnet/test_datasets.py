import pytest

from crevnet.data import DataConfig
from crevnet.datasets import DATASETS


@pytest.mark.parametrize("name", DATASETS)
def test_the_configuration_is_that_of_its_name(name, tmp_path):
    needed = {"train": tmp_path} if name == "videos" else {}
    config = DATASETS[name](**needed)
    assert isinstance(config, DataConfig)
    assert config.name == name
