import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crevnet.data import DataError, find_videos
from crevnet.data.video_search import images_in, is_searched


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


def test_numbers_in_names_count_by_their_value(tmp_path):
    names = ["2.npy", "10.npy", "a", "b2_1.npy", "b2_10.npy", "b10_1.npy", "b010_1.npy"]
    for name in [*reversed(names), "a/1.npy", "a/9.npy", "a/11.npy"]:
        (tmp_path / name).mkdir() if name == "a" else (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)]
    ordered = ["2.npy", "10.npy", "a/1.npy", "a/9.npy", "a/11.npy", "b2_1.npy", "b2_10.npy", "b010_1.npy", "b10_1.npy"]
    assert found == ordered
    for i in (1, 2, 10, 100):
        (tmp_path / "a" / f"frame_{i}.png").write_bytes(b"")
    assert [path.name for path in images_in(tmp_path / "a")] == [f"frame_{i}.png" for i in (1, 2, 10, 100)]


def test_what_links_lead_to_twice_is_found_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "a" / "x.npy").write_bytes(b"")
    (tmp_path / "images" / "0.png").write_bytes(b"")
    found = find_videos(tmp_path)
    assert len(found) == 2
    os.symlink(".", tmp_path / "loop")
    os.symlink(tmp_path / "a", tmp_path / "z")
    os.symlink(tmp_path / "images", tmp_path / "zz")
    os.symlink(tmp_path / "a" / "x.npy", tmp_path / "y.npy")
    assert find_videos(tmp_path) == found
    os.symlink("self.npy", tmp_path / "self.npy")
    os.symlink("nowhere.npy", tmp_path / "nowhere.npy")  # said to be missing where it is read
    assert find_videos(tmp_path) == [*found, tmp_path / "nowhere.npy", tmp_path / "self.npy"]


@pytest.mark.parametrize(
    ("place", "inside"),
    [
        ("films", True),
        ("films/cache", True),
        ("films/a/b", True),
        ("other/../films/cache", True),
        ("link/cache", True),
        ("films/.cache/a", False),
        ("films2", False),
        (".", False),
        ("films/../cache", False),
    ],
)
def test_where_videos_are_searched_for(place, inside, tmp_path, monkeypatch):
    (tmp_path / ".hidden" / "films").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / ".hidden")
    os.symlink("films", "link")
    for root in (tmp_path / ".hidden" / "films", "films", "link"):
        assert is_searched(place, root) is inside


@pytest.mark.parametrize(
    ("place", "root", "inside"),
    [
        ("films/run", "films", True),
        ("films", "./films", True),
        ("runs", ".", True),
        ("../films/run", "../films", True),
        ("/films/a/../run", "/films", True),
        ("../runs", ".", False),
        ("runs", "../films", False),
        ("/films/run", "films", False),
        ("run", "/films", False),
    ],
)
def test_by_name_the_working_folder_does_not_matter(place, root, inside, tmp_path, monkeypatch):
    (tmp_path / "films" / "films").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "films"):
        monkeypatch.chdir(folder)
        assert is_searched(Path(place), Path(root), by_name=True) is inside


def test_folders_of_runs_are_passed_over(tmp_path):
    """Their pictures are none to learn from."""
    run = tmp_path / "runs" / "first"
    (run / "checkpoints").mkdir(parents=True)
    (run / "predictions.png").write_bytes(b"")
    (tmp_path / "a.npy").write_bytes(b"")
    assert find_videos(tmp_path) == [tmp_path / "a.npy", run]
    (run / "config.yaml").write_text("")
    assert find_videos(tmp_path) == [tmp_path / "a.npy"]
