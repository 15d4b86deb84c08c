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


def ramp():
    """16 bits, `[16, 16]`; the upper ones count up from 0 to 255, but for rounding."""
    near = np.arange(256) * 257 + np.random.default_rng(0).integers(-128, 129, 256)
    return near.clip(0, 0xFFFF).astype(np.uint16).reshape(16, 16)


def save_pgm(path):
    path.write_bytes(b"P5\n16 16\n65535\n" + ramp().astype(">u2").tobytes())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("0.png", lambda path: Image.fromarray(ramp()).save(path)),
        ("0.tif", lambda path: Image.fromarray(ramp()).save(path)),
        ("1.tif", lambda path: Image.fromarray(ramp().astype(">u2")).save(path)),
        ("2.tif", lambda path: Image.fromarray(ramp().astype(np.int32)).save(path)),
        ("0.pgm", save_pgm),
    ],
)
def test_sixteen_bits_become_eight(videos, name, save, channels, tmp_path):
    save(tmp_path / name)
    found = videos.read(tmp_path, channels) * 255
    assert torch.equal(found, torch.arange(256.0).view(1, 1, 16, 16).expand(-1, channels, -1, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "I;16"])
def test_transparent_pixels_are_black_whatever_they_hide(videos, mode, tmp_path):
    """By an alpha channel, or a value that stands for it."""
    image = Image.new("RGBA", (16, 16), (200, 200, 200, 255))
    image.paste((90, 90, 90, 0), (4, 4, 8, 8))
    hidden = {"RGB": {"transparency": (90,) * 3}, "L": {"transparency": 90}, "I;16": {"transparency": 90 * 257}}
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "0.png", **hidden.get(mode, {}))
    expected = np.full((16, 16), 200)
    expected[4:8, 4:8] = 0
    for channels in (1, 3):
        found = videos.read(tmp_path, channels)[0] * 255
        assert torch.equal(found, torch.from_numpy(expected).float().expand(channels, -1, -1))


def test_half_transparent_pixels_are_half_as_bright(videos, tmp_path):
    Image.new("RGBA", (16, 16), (200, 100, 50, 128)).save(tmp_path / "0.png")
    assert (videos.read(tmp_path, 3)[0, :, 3, 3] * 255 - torch.tensor([100, 50, 25])).abs().max() <= 1


def test_transparent_pixels_of_a_gif_are_black(videos, tmp_path):
    frames = []
    for t in range(3):
        image = Image.new("RGBA", (16, 16), (250, 0, 0, 0))
        image.paste((255, 255, 255, 255), (4 * t, 0, 4 * t + 4, 16))
        frames.append(image)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2)
    expected = torch.zeros(3, 1, 16, 16)
    for t in range(3):
        expected[t, :, :, 4 * t : 4 * t + 4] = 1
    assert torch.equal(videos.read(tmp_path / "a.gif"), expected)
    assert torch.equal(videos.read(tmp_path / "a.gif", 3), expected.expand(-1, 3, -1, -1))


def test_a_photograph_with_a_second_picture_hidden_in_it(videos, tmp_path):
    """As phones write it."""
    first, second = (Image.new("L", (16, 16), level) for level in (51, 204))
    first.save(tmp_path / "0.jpg", format="MPO", save_all=True, append_images=[second])
    assert (videos.read(tmp_path) * 255).round().unique().tolist() == [51]


# --- what is refused ---


@pytest.mark.parametrize("value", [-1, 0x10000])
def test_more_than_sixteen_bits(videos, value, tmp_path):
    pixels = np.zeros((16, 16), np.int32)
    pixels[3, 3] = value
    Image.fromarray(pixels).save(tmp_path / "0.tif")
    videos.refused(tmp_path, "0.tif: not a readable image: more than 16 bits per pixel; give an array file")


def test_floats(videos, tmp_path):
    Image.fromarray(np.zeros((16, 16), np.float32)).save(tmp_path / "0.tif")
    videos.refused(tmp_path, "0.tif: not a readable image: floats have no known range; give an array file")


@pytest.mark.parametrize("kind", ["webp", "png", "tif"])
def test_an_animation_in_a_folder_of_images(videos, kind, tmp_path):
    first, *rest = [Image.new("RGB", (16, 16), (40 * t, 0, 0)) for t in range(5)]
    first.save(tmp_path / f"0.{kind}", save_all=True, append_images=rest)
    message = f"0.{kind}: holds 5 frames; make it a .gif or a film, or save its frames as images"
    videos.refused(tmp_path, message)


def test_an_empty_folder(videos, tmp_path):
    (tmp_path / ".hidden").write_bytes(b"")
    videos.refused(tmp_path, "the folder holds no images")


def test_images_for_a_model_with_other_channels(videos, tmp_path, frames):
    videos.save_gif(tmp_path / "a.gif", frames)
    videos.refused(tmp_path / "a.gif", "images have 1 or 3 channels, the model needs 4", channels=4)
