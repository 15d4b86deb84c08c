import os

import pytest

from crevnet.data import DataError
from crevnet.data.apart import check_apart


@pytest.fixture
def roots(tmp_path):
    """Two sets, of a video each."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.npy").write_bytes(b"")
    return {"train": tmp_path / "a", "test": tmp_path / "b"}


def test_sets_that_share_nothing_pass_and_so_does_a_cache_elsewhere(roots, tmp_path):
    check_apart(roots, None)
    check_apart(roots, tmp_path / "cache")
    check_apart(roots, tmp_path / "a" / ".cache")
    check_apart(roots | {"validation": tmp_path / "none"}, None)


@pytest.mark.parametrize("shared", ["a", "a/a.npy", "."])
def test_a_video_in_two_sets_is_named_with_both(shared, roots, tmp_path):
    with pytest.raises(
        DataError, match=r"a/a\.npy is in data\.train and in data\.validation; move it, or name folders"
    ):
        check_apart(roots | {"validation": tmp_path / shared}, None)


def test_links_hide_nothing(roots, tmp_path):
    os.symlink(tmp_path / "a" / "a.npy", tmp_path / "b" / "other.npy")
    with pytest.raises(DataError, match=r"b/other\.npy is in data\.train and in data\.test"):
        check_apart(roots, None)


@pytest.mark.parametrize(("cache", "option"), [("a", "train"), ("b/new/cache", "test"), ("link/cache", "train")])
def test_a_cache_among_the_videos(cache, option, roots, tmp_path):
    os.symlink(tmp_path / "a", tmp_path / "link")
    with pytest.raises(DataError, match=rf"data\.cache .*{cache} lies within data\.{option} .*begins with a dot"):
        check_apart(roots, tmp_path / cache)
