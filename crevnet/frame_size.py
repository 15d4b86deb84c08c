"""The size of frames: height and width, or one number for both."""

FrameSize = int | tuple[int, int]


def height_width(size: FrameSize) -> tuple[int, int]:
    """Height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def in_words(size: FrameSize) -> str:
    """The size as messages have it: `64`, or `128 x 160`."""
    height, width = height_width(size)
    return str(height) if height == width else f"{height} x {width}"


def check_foldable(size: FrameSize, fold: int, by: str) -> None:
    """Raise unless height and width of `model.image_size` are multiples of a number.

    Args:
        size: The size.
        fold: What is to divide it.
        by: Says what that number is and who folds.

    Raises:
        ValueError: It does not divide both.
    """
    if any(side % fold for side in height_width(size)):
        raise ValueError(f"model.image_size {in_words(size)} is not a multiple of {by}")
