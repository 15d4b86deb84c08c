import numpy as np
import pytest
import torch
from PIL import Image


def test_gif(videos, tmp_path, frames):
    videos.save_gif(tmp_path / "a.gif", frames)
    assert torch.equal(videos.read(tmp_path / "a.gif"), videos.expected(frames))


def test_gif_in_capitals(videos, tmp_path, frames):
    videos.save_gif(tmp_path / "A.GIF", frames)
    assert torch.equal(videos.read(tmp_path / "A.GIF"), videos.expected(frames))


def test_a_gif_whose_frames_are_stored_as_differences(videos, tmp_path):
    """Encoders store only what changes from frame to frame: each must come back whole."""
    moving = np.zeros((4, 16, 16), np.uint8)
    for t in range(4):
        moving[t, 4:8, 2 * t : 2 * t + 4] = 255
    videos.save_gif(tmp_path / "a.gif", moving)
    assert torch.equal(videos.read(tmp_path / "a.gif"), videos.expected(moving))


def test_images_in_a_folder_are_read_in_the_order_of_their_names(videos, tmp_path, frames):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (3, 0, 4, 2, 1):
        Image.fromarray(frames[i]).save(folder / f"frame-{i}.png")
    (folder / ".DS_Store").write_bytes(b"not a frame")
    assert torch.equal(videos.read(folder), videos.expected(frames))


def test_colour_images_are_converted_to_grey_and_back(videos, tmp_path, frames):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.stack([frames[0]] * 3, axis=-1)).save(folder / "0.png")
    Image.fromarray(frames[1]).save(folder / "1.png")
    assert torch.equal(videos.read(folder), videos.expected(frames[:2]))
    assert torch.equal(videos.read(folder, 3), videos.expected(frames[:2]).expand(-1, 3, -1, -1))


def test_the_channels_of_colour_images_stay_in_order(videos, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0], pixels[2, 5, 1], pixels[..., 2] = 255, 51, 102
    Image.fromarray(pixels).save(folder / "0.png")
    assert torch.equal(videos.read(folder, 3)[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def test_what_is_no_image_in_a_folder_is_passed_over(videos, tmp_path, frames):
    Image.fromarray(frames[0]).save(tmp_path / "0.PNG")
    (tmp_path / "timestamps.txt").write_text("hello")
    assert torch.equal(videos.read(tmp_path), videos.expected(frames[:1]))


@pytest.mark.parametrize(("orientation", "degrees"), [(1, 0), (6, 90), (3, 180), (8, 270)])
def test_photographs_are_turned_upright(videos, orientation, degrees, tmp_path):
    image, turned = videos.corners(degrees)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(image).save(tmp_path / "0.png", exif=exif)
    assert (videos.quarters_of(videos.read(tmp_path, 3, 16)) - torch.from_numpy(turned.copy())).abs().max() < 30


# --- what is refused ---


def test_an_empty_folder(videos, tmp_path):
    (tmp_path / ".hidden").write_bytes(b"")
    videos.refused(tmp_path, "the folder holds no images")


def test_images_for_a_model_with_other_channels(videos, tmp_path, frames):
    videos.save_gif(tmp_path / "a.gif", frames)
    videos.refused(tmp_path / "a.gif", "images have 1 or 3 channels, the model needs 4", channels=4)
