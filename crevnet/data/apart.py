"""What is trained, validated and tested on must share nothing."""

import os
from collections.abc import Mapping
from pathlib import Path

from crevnet.data.errors import DataError
from crevnet.data.video_search import find_videos, is_searched


def check_apart(roots: Mapping[str, Path], cache: Path | None) -> None:
    """Raise if two sets share a video, or if the files of the cache would be read as videos.

    Args:
        roots: Where the videos of each set are, by its option. A set that is not there is passed over: a model is
            tested where its training videos may not be.
        cache: Folder of decoded frames, which need not be there yet; None for none.

    Raises:
        DataError: Names the video that is shared, or the cache, and the options.
    """
    found: dict[str, str] = {}
    for option, root in roots.items():
        if cache is not None and is_searched(cache, root):
            raise DataError(
                f"data.cache {cache} lies within data.{option} {root}, where its files would be read as videos; choose "
                "a folder elsewhere, or one whose name begins with a dot"
            )
        for path in find_videos(root) if root.exists() else []:
            other = found.setdefault(os.path.realpath(path), option)
            if other != option:
                raise DataError(
                    f"{path} is in data.{other} and in data.{option}; move it, or name folders that share no video"
                )
