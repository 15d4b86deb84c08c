import pytest
import torch

from revgrad import StreamError
from revgrad.in_place import Unchanged


def test_a_change_in_place_is_seen():
    x = torch.ones(3)

    def error(found):
        return StreamError(f"changed: {tuple(found.shape)}")

    with Unchanged([x], error):
        x + 1
    with pytest.raises(StreamError, match=r"changed: \(3,\)"), Unchanged([x], error):
        x.add_(1)
    with torch.inference_mode():
        y = torch.ones(3)
    with Unchanged([y], error):
        pass
