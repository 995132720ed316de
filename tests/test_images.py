"""Images: decoding, resizing, keeping."""

import time
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import put
from PIL import Image

from support.images import (
    DataError,
    Images,
    PhotographCrops,
    in_threads,
    open_image,
    read_image,
    to_array,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_every_mode_becomes_rgb(tmp_path):
    rgb, gray = np.stack([RAMP, RAMP[::-1], RAMP.T], -1), np.stack([RAMP] * 3, -1)
    deep = RAMP.astype(np.uint16) * 257
    cases = {
        "gray.png": (RAMP, gray),
        "gray16.png": (deep, gray),
        "gray16.tiff": (deep, gray),
        "int32.tiff": (deep.astype(np.int32), gray),
        "rgb.png": (rgb, rgb),
        "rgba.png": (np.dstack([rgb, RAMP]), rgb),
        "palette.png": (Image.fromarray(RAMP).convert("P"), gray),
        "bits.png": (RAMP > 127, (gray > 127) * np.uint8(255)),
    }
    for name, (content, expected) in cases.items():
        image = read_image(put(tmp_path / name, content))
        assert image.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)
    between = np.uint16([[385, 386], [65150, 65535]])  # 1.498, 1.502 and 253.502 times 257
    rounded = np.asarray(read_image(put(tmp_path / "deep.png", between)))[..., 0]
    assert rounded.tolist() == [[1, 2], [254, 255]]
    for value in (65536, -1):
        path = put(tmp_path / "wide.tiff", np.full((4, 4), value, np.int32))
        with pytest.raises(DataError, match="wide.tiff: has values beyond 0 to 65535; save it"):
            read_image(path)
    red = put(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    assert np.abs(np.asarray(read_image(red)).astype(int) - [255, 0, 0]).max() < 40


def test_transparent_parts_of_masks_are_black(tmp_path):
    mask = np.full((4, 4, 4), 255, np.uint8)  # white; only alpha has a shape
    mask[1:, :, 3] = 0
    path = put(tmp_path / "mask.png", mask)
    assert np.asarray(open_image(path, black=True)).any(-1).sum() == 4
    assert np.asarray(open_image(path)).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    image = np.asarray(read_image(put(tmp_path / "a.png", RAMP[:, :8], exif=exif)))
    np.testing.assert_array_equal(image[..., 0], np.rot90(RAMP[:, :8], -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored(tmp_path):
    upright = Image.fromarray(RAMP[:, :8])
    for content in (b"Exif\0\0junkjunk", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        path = put(tmp_path / "a.jpg", upright, exif=content, dpi=(72, 72))
        assert read_image(path).size == (8, 16)
    exif = Image.Exif()
    exif[0x0112], exif[0x9286] = 6, "text"
    odd = exif.tobytes().replace(b"\x86\x92\x02", b"\x86\x92\x0c")  # text as a float
    assert read_image(put(tmp_path / "b.jpg", upright, exif=odd)).size == (16, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_above_pillows_limit(tmp_path, monkeypatch):
    path = put(tmp_path / "bomb.png", RAMP)
    for limit in (200, 100):  # Pillow warns of the first, and raises at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=f"bomb.png: more than {limit} pixels"):
            read_image(path)


def test_resizing():
    stripes = np.tile(np.array([0, 255], np.uint8), (16, 8))
    image = Image.fromarray(stripes).convert("RGB")
    assert to_array(image, (8, 4)).shape == (3, 8, 4)
    assert np.ptp(to_array(image, (8, 4))[..., 1:-1]) < 20  # antialiased
    np.testing.assert_array_equal(to_array(image, (16, 16))[1], stripes)


def test_image_cache_is_bounded_and_right(tmp_path):
    paths = [put(tmp_path / f"{i}.png", np.full((20, 30), 10 * i, np.uint8)) for i in range(4)]
    images = Images(paths, (8, 8), cache_bytes=2 * 3 * 64)
    for _ in range(2):
        assert [int(images[i].max()) for i in range(4)] == [0, 10, 20, 30]
    assert len(images.kept) == 2
    framed = np.pad(np.full((8, 8), 255, np.uint8), 4)
    zoomed = Images([put(tmp_path / "framed.png", framed)], (4, 4), zoom=2)
    assert zoomed[0].shape == (3, 4, 4) and zoomed[0].min() > 100  # the centre without the frame


def test_bad_images_are_read_once(tmp_path, monkeypatch):
    paths = [put(tmp_path / f"{i:02}.png", b"" if i else RAMP) for i in range(20)]
    images, read = Images(paths, (8, 8), skip_bad=True), Mock(side_effect=read_image)
    monkeypatch.setattr("support.images.read_image", read)
    for i in range(20):
        assert images[i].any()
    assert read.call_count == 20


def test_threads_keep_the_order():
    def slowest_first(i: int) -> int:
        time.sleep(0.02 if i % 4 == 0 else 0)
        return i * i

    assert list(in_threads(slowest_first, range(3, 30))) == [i * i for i in range(3, 30)]
    assert list(in_threads(slowest_first, range(0))) == []
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // (5 - i), range(9)))


def test_photograph_crops():
    crops = PhotographCrops((32, 64), count=5)
    assert len(crops) == 5 and crops[0].shape == (3, 32, 64) and crops[0].dtype == np.uint8
    np.testing.assert_array_equal(crops[3], PhotographCrops((32, 64))[3])
    assert len({crops[i].tobytes() for i in range(5)}) == 5
