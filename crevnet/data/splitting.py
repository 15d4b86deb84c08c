"""Hold part of a digit set out, so that no image is on both sides."""

import numpy as np

from crevnet.data.digit_images import DigitImages


def hold_out(digits: DigitImages, fraction: float, names: tuple[str, str]) -> tuple[DigitImages, DigitImages]:
    """Split off the last `fraction` of every label, in file order.

    Going by file order needs no random numbers, so everyone gets the same split. Identical images stay
    together, on the side of the first of them.

    Args:
        digits: the set to split.
        fraction: the part of each label to hold out, between 0 and 1 exclusive.
        names: what to call the kept and the held-out set.

    Returns:
        The kept and the held-out set, both in file order.

    Raises:
        ValueError: `fraction` is out of range, or either side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    seen: dict[bytes, int] = {}
    original = np.array([seen.setdefault(image.tobytes(), i) for i, image in enumerate(digits.images)], np.int64)
    distinct = np.unique(original)
    held_originals = []
    for label in np.unique(digits.labels):
        of_label = distinct[digits.labels[distinct] == label]
        held_originals.append(of_label[len(of_label) - round(fraction * len(of_label)) :])
    held = np.isin(original, np.concatenate([np.empty(0, np.int64), *held_originals]))
    if held.all() or not held.any():
        raise ValueError(
            f"cannot hold out {fraction} of the {len(digits)} images of {digits.name}: "
            "one side would be empty; use more images"
        )
    return digits.take(np.flatnonzero(~held), names[0]), digits.take(np.flatnonzero(held), names[1])
