import numpy as np
import pytest
from PIL import Image

from crevnet.data import DataError, find_videos


def test_videos_are_found_in_all_folders_in_the_order_of_their_names(tmp_path, frames):
    drive, hidden = tmp_path / "b" / "drive" / "data", tmp_path / ".cache"
    for folder in (drive, hidden, tmp_path / "empty"):
        folder.mkdir(parents=True)
    Image.fromarray(frames[0]).save(drive / "0.png")
    np.save(hidden / "x.npy", frames)
    np.save(tmp_path / "c.npy", frames)
    (tmp_path / "b" / "a.NPZ").write_bytes(b"")
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("hello")
    found = [tmp_path / "a.mp4", tmp_path / "b" / "a.NPZ", drive, tmp_path / "c.npy"]
    assert find_videos(tmp_path) == found
    assert find_videos(drive) == [drive]
    assert find_videos(tmp_path / "c.npy") == [tmp_path / "c.npy"]
    with pytest.raises(DataError, match=r"empty: holds no video, which is a \.npy"):
        find_videos(tmp_path / "empty")
