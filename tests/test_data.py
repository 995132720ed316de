"""Image decoding, layouts and the demo set."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from data import DataError, Images, PhotographCrops, Sample, list_images, open_category, read_image, to_array
from demo import DEMO_LOGICAL, DEMO_STRUCTURAL, draw_demo_image, make_demo

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(path, array_or_image=RAMP, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    image.save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------------------------ images


def test_every_mode_becomes_rgb(tmp_path):
    rgb = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
    cases = {
        "gray.png": (RAMP, np.stack([RAMP] * 3, -1)),
        "gray16.png": (RAMP.astype(np.uint16) * 257, np.stack([RAMP] * 3, -1)),
        "gray16.tiff": (RAMP.astype(np.uint16) * 257, np.stack([RAMP] * 3, -1)),
        "rgb.png": (rgb, rgb),
        "rgba.png": (np.dstack([rgb, RAMP]), rgb),
        "palette.png": (Image.fromarray(RAMP).convert("P"), np.stack([RAMP] * 3, -1)),
        "bits.png": (Image.fromarray(RAMP > 127), np.stack([(RAMP > 127) * np.uint8(255)] * 3, -1)),
        "int32.tiff": (RAMP.astype(np.int32) * 257, np.stack([RAMP] * 3, -1)),
        "rgb.bmp": (rgb, rgb),
    }
    for name, (content, expected) in cases.items():
        image = read_image(save(tmp_path / name, content))
        assert image.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)
    cmyk = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    assert np.abs(np.asarray(read_image(cmyk)).astype(int) - [255, 0, 0]).max() < 40


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    path = save(tmp_path / "a.png", RAMP[:, :8], exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path))[..., 0], np.rot90(RAMP[:, :8], -1))


def test_unreadable_images_are_named(tmp_path):
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    save(tmp_path / "float.tiff", RAMP.astype(np.float32))
    for name in ("half.png", "empty.png", "text.png", "float.tiff", "missing.png"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


def test_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    for size in (20, 40):  # above the limit, above twice the limit
        with pytest.raises(DataError, match="bomb.png: more than 300 pixels"):
            read_image(save(tmp_path / "bomb.png", np.zeros((size, size), np.uint8)))


def test_resizing():
    image = Image.fromarray(np.stack([np.tile(RAMP[0] * 16, (16, 1))] * 3, -1).astype(np.uint8))
    assert to_array(image, (8, 4)).shape == (3, 8, 4)
    assert to_array(image, (8, 4))[0, 0].tolist() == sorted(to_array(image, (8, 4))[0, 0].tolist())
    np.testing.assert_array_equal(to_array(image, (16, 16))[1], np.asarray(image)[..., 1])


def test_image_cache_is_bounded_and_right(tmp_path):
    paths = [save(tmp_path / f"{i}.png", np.full((20, 30, 3), 10 * i, np.uint8)) for i in range(4)]
    images = Images(paths, (8, 8), cache_bytes=2 * 3 * 64)
    for _ in range(2):
        assert [int(images[i].max()) for i in range(4)] == [0, 10, 20, 30]
    assert len(images.kept) == 2
    zoomed = Images([save(tmp_path / "z.png", np.pad(np.full((8, 8), 255, np.uint8), 4))], (4, 4), zoom=2)
    assert zoomed[0].shape == (3, 4, 4) and zoomed[0].min() > 100  # the bright centre, not the dark rim


def test_photograph_crops():
    crops = PhotographCrops((32, 64), count=5)
    assert len(crops) == 5 and crops[0].shape == (3, 32, 64) and crops[0].dtype == np.uint8
    np.testing.assert_array_equal(crops[3], PhotographCrops((32, 64))[3])
    assert len({crops[i].tobytes() for i in range(5)}) == 5


# ----------------------------------------------------------------------------------------------------------------- layouts


def test_mvtec_layout(tmp_path):
    root = tmp_path / "bottle"
    for i in range(20):
        save(root / f"train/good/{i:03d}.png")
    save(root / "test/good/000.png")
    for i in range(2):
        save(root / f"test/broken/{i:03d}.png")
        save(root / f"ground_truth/broken/{i:03d}_mask.png", (RAMP > 250 - i).astype(np.uint8) * 255)
    category = open_category(root)
    assert (category.name, category.layout, category.validation) == ("bottle", "mvtec", None)
    assert [(s.defect, s.path.name, len(s.masks)) for s in category.test] == [
        ("broken", "000.png", 1),
        ("broken", "001.png", 1),
        ("good", "000.png", 0),
    ]
    assert category.test[1].mask((16, 16)).sum() == 6 and category.test[2].mask((16, 16)).sum() == 0
    train, validation = category.split(seed=0)
    assert (len(train), len(validation)) == (18, 2)
    assert sorted(train + validation) == category.train
    assert category.split(0) == (train, validation)
    assert any(category.split(seed)[1] != validation for seed in range(1, 5))
    (root / "ground_truth/broken/001_mask.png").unlink()
    with pytest.raises(DataError, match="001_mask.png is missing"):
        open_category(root)


def test_mask_of_another_size(tmp_path):
    sample = Sample(tmp_path / "a.png", "broken", (save(tmp_path / "a_mask.png"),))
    with pytest.raises(DataError, match="a_mask.png: mask of 16×16 for an image of 20×16"):
        sample.mask((16, 20))


def test_loco_layout(tmp_path):
    root = tmp_path / "pushpins"
    root.mkdir()
    entry = {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True}
    other = {"defect_name": "surplus", "pixel_value": 254, "saturation_threshold": 7, "relative_saturation": False}
    (root / "defects_config.json").write_text(json.dumps([entry, other]))
    for folder in ("train", "validation", "test"):
        save(root / folder / "good/000.png")
    save(root / "test/logical_anomalies/007.png")
    for i in range(2):
        save(root / f"ground_truth/logical_anomalies/007/{i:03d}.png", (RAMP // 8 == i).astype(np.uint8) * (255 - i))
    category = open_category(root)
    assert category.layout == "loco" and len(category.validation) == 1
    assert category.split(0) == (category.train, category.validation)
    assert category.test[1].defect == "logical_anomalies" and category.test[1].mask((16, 16)).sum() == 16  # their union
    assert [(int(m.sum()), s) for m, s in category.regions(category.test[1], (16, 16))] == [(8, 4), (8, 7)]
    save(root / "ground_truth/logical_anomalies/007/000.png", np.zeros((16, 16), np.uint8))
    with pytest.raises(DataError, match="000.png: the mask of a defect is empty"):
        category.test[1].mask((16, 16))


def test_visa_layouts(tmp_path):
    root = tmp_path / "VisA/candle"
    rows = [("candle", "train", "normal", "Normal/000.JPG", ""), ("candle", "train", "normal", "Normal/001.JPG", "")]
    rows.append(("candle", "test", "normal", "Normal/002.JPG", ""))
    rows.append(("candle", "test", "anomaly", "Anomaly/000.JPG", "Anomaly/000.png"))
    for _, _, _, image, mask in rows:
        save(root / "Data/Images" / image)
        if mask:
            save(root / "Data/Masks" / mask, (RAMP > 253).astype(np.uint8))  # VisA's masks hold 1, 2, … rather than 255
    with pytest.raises(DataError, match="1cls.csv: missing"):
        open_category(root)
    table = tmp_path / "VisA/split_csv/1cls.csv"
    table.parent.mkdir()
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["object", "split", "label", "image", "mask"])
        for name, split, label, image, mask in rows + [("pcb1", *rows[0][1:])]:
            writer.writerow([name, split, label, f"{name}/Data/Images/{image}", mask and f"{name}/Data/Masks/{mask}"])
    category = open_category(root)
    assert (category.name, category.layout, len(category.train)) == ("candle", "visa", 2)
    assert [(s.defect, int(s.mask((16, 16)).sum())) for s in category.test] == [("bad", 2), ("good", 0)]

    other = tmp_path / "visa_pytorch/candle"  # as VisA's own script rearranges it
    for path in ("train/good/0.JPG", "test/good/1.JPG", "test/bad/2.JPG"):
        save(other / path)
    save(other / "ground_truth/bad/2.png", (RAMP > 253).astype(np.uint8) * 255)
    assert [(s.defect, int(s.mask((16, 16)).sum())) for s in open_category(other).test] == [("bad", 2), ("good", 0)]


def test_folder_of_images_and_wrong_folders(tmp_path):
    save(tmp_path / "photos/b.png"), save(tmp_path / "photos/sub/a.jpg"), save(tmp_path / "photos/.hidden.png")
    category = open_category(tmp_path / "photos")
    assert category.layout == "folder" and [p.name for p in category.train] == ["b.png", "a.jpg"] and not category.test
    assert [p.name for p in list_images(tmp_path / "photos")] == ["b.png"]
    with pytest.raises(DataError, match="no such folder"):
        open_category(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images"):
        open_category(tmp_path / "empty")
    save(tmp_path / "mvtec/bottle/train/good/0.png"), save(tmp_path / "mvtec/screw/train/good/0.png")
    with pytest.raises(DataError, match="several categories; choose one: .*bottle.*screw"):
        open_category(tmp_path / "mvtec")
    with pytest.raises(DataError, match="only 1 normal image"):
        open_category(tmp_path / "mvtec/bottle").split(0)


def test_real_mvtec(shared):
    for name, train, test in (("bottle", 209, 83), ("screw", 320, 160)):
        category = open_category(shared / "data/mvtec" / name)
        assert (len(category.train), len(category.test)) == (train, test)
        assert all(s.mask((384, 384)).any() == (s.defect != "good") for s in category.test[::8])


# ------------------------------------------------------------------------------------------------------------ the demo set


def test_demo_images():
    normal, masks = draw_demo_image(np.random.default_rng(1), None)
    assert normal.size == (256, 256) and normal.mode == "RGB" and masks == []
    assert np.array_equal(draw_demo_image(np.random.default_rng(1), None)[0], normal)
    for defect in DEMO_LOGICAL + DEMO_STRUCTURAL:
        image, masks = draw_demo_image(np.random.default_rng(1), defect)
        assert masks and all(m.size == (256, 256) and 20 < (np.asarray(m) > 127).sum() < 6000 for m in masks), defect
        assert np.abs(np.asarray(image).astype(float) - np.asarray(normal)).mean() > 0.5


def test_demo_set_is_in_locos_layout(tiny_demo, tmp_path):
    category = open_category(tiny_demo)
    assert category.layout == "loco"
    assert (len(category.train), len(category.validation), len(category.test)) == (5, 2, 9)
    for sample in category.test:
        assert sample.mask((256, 256)).any() == (sample.defect != "good")
    assert (tiny_demo / "defects_config.json").exists()
    with pytest.raises(OSError):
        make_demo(tiny_demo)  # never over an existing folder
    assert [p.name for p in tiny_demo.parent.iterdir()] == ["tiny"]  # and nothing half-made is left
