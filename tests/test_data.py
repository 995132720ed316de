"""Data sets and their layouts, appearances, the demo set."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import put
from PIL import Image, ImageStat

from support import data, demo
from support.appearance import Appearance, appearance_of, appearance_range, differences, drift
from support.data import open_category
from support.images import DataError, list_images

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(path, content=RAMP):
    return put(path, content)


def test_normal_images_are_loaded_once_without_bad_ones(tmp_path, capsys):
    for i in range(20):
        gray = Image.new("L", (9 + i, 8), 10 * i)
        put(tmp_path / f"part/{i:02}.png", gray if i % 9 else b"")
    with pytest.raises(DataError, match="00.png: not an image.*--skip-bad-images"):
        data.load_normal_images(str(tmp_path / "part"), (8, 8), 0, skip_bad=False)
    loaded = data.load_normal_images(str(tmp_path / "part"), (8, 8), 0, skip_bad=True)
    assert capsys.readouterr().err.count("skipped: ") == len(loaded.skipped) == 3
    train, validation = loaded.category.split(0)
    assert [error.split(":")[0][-6:] for error in loaded.skipped] == ["00.png", "09.png", "18.png"]
    for images, paths in ((loaded.training, train), (loaded.validation, validation)):
        good = [path for path in paths if int(path.stem) % 9]
        assert images.paths == good and len(images) == len(good)
        for path in good:
            path.unlink()  # they are in memory
        assert [images[i].max() for i in range(len(good))] == [10 * int(p.stem) for p in good]
    assert loaded.appearance["width"] == [10, 28] and loaded.appearance["gray"] == 1
    del loaded.training.kept[0]
    with pytest.raises(DataError, match="no such file"):  # no other image takes its place later
        loaded.training[0]


def test_validation_images_that_are_trained_on_are_noticed(tmp_path, capsys):
    for i, name in enumerate(("train/good/0", "train/good/1", "validation/good/new")):
        put(tmp_path / f"part/{name}.png", Image.new("L", (8, 8), 9 * i))
    put(tmp_path / "part/validation/good/0.png", Image.new("L", (8, 8)))
    data.load_normal_images(str(tmp_path / "part"), (8, 8), 0, skip_bad=False)
    note = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "part/validation/good/0.png"
    assert f"1 of 2 validation images are copies of training images, such as {path}:" in note


def test_a_set_that_cannot_be_evaluated_later_is_noticed(tmp_path, capsys):
    for name in ("train/good/0", "train/good/1", "test/scratch/0"):
        put(tmp_path / f"part/{name}.png", Image.new("L", (8, 8)))
    data.load_normal_images(str(tmp_path / "part"), (8, 8), 0, skip_bad=False)
    assert "all test images are defective; put good test images" in capsys.readouterr().err


def test_differences_from_the_training_images():
    first = Appearance(100, 80, False, 100.0, 50.0, 9.0)
    seen = appearance_range([first, Appearance(120, 80, False, 140.0, 50.0, 11.0)])
    sizes = {"width": [100, 120], "height": [80, 80], "aspect": [1.25, 1.5]}
    looks = {"brightness": [120, 20], "contrast": [50, 0], "tint": [10, 1]}
    assert seen == sizes | {"brightness": [100, 140], "gray": 0, "looks": looks}
    black = Appearance(9, 9, True, 0.0)
    gray, both = (appearance_range([black, black._replace(gray=g)]) for g in (True, False))
    for appearance, known, expected in (
        ((110, 80, False, 91), seen, []),  # within a quarter of the range
        ((110, 80, False, 89), seen, ["darker: 89"]),
        ((100, 81, True, 151), seen, ["size 100×81", "gray", "brighter: 151"]),
        ((9, 9, False, 5), gray, ["coloured"]),
        ((9, 9, True, 0), both, []),
    ):
        assert differences(Appearance(*appearance), known) == expected
    image = Image.new("RGB", (3, 2), (255, 0, 0))
    assert appearance_of(image)[:6] == (3, 2, False, 76.0, 0.0, 255.0)
    other = image.copy()
    other.putpixel((0, 0), (254, 0, 0))
    assert appearance_of(image).fingerprint != appearance_of(other).fingerprint


def test_drift_of_a_set():
    """A deviation or more, and three standard errors: of four images, 1.5 deviations."""
    known = {"looks": {"brightness": [120, 20], "contrast": [50, 0], "tint": [10, 1]}}
    brighter = "brighter by 1.6 standard deviations"
    both = "darker by 3.0 standard deviations (brightness 60.0 instead of 120.0) and redder by 2.0"
    for n, brightness, tint, expected in (
        (9, 141, 10, "brighter by 1.1 standard deviations (brightness 141.0 instead of 120.0)"),
        (9, 139, 10, ""),
        (4, 149, 10, ""),
        (4, 151, 8, f"{brighter} (brightness 151.0 instead of 120.0) and bluer"),
        (9, 60, 12, both),
    ):
        images = [Appearance(9, 9, False, brightness, 50.2, tint)] * n
        images[0] = images[0]._replace(brightness=0)  # one alone means little
        found = drift(images, known)
        assert found.startswith(expected) and bool(found) == bool(expected)
    assert drift(images, {}) == ""  # of earlier versions


def contents(category):
    """Name -> number of defective pixels of each test image."""
    return {f"{s.defect}/{s.path.stem}": s.mask((16, 16)).sum() for s in category.test}


def test_12_bits_in_files_of_16_are_noticed(tmp_path, capsys):
    for i in range(2):
        put(tmp_path / f"dark/{i}.png", RAMP.astype(np.uint16) * (16 + i))
    data.load_normal_images(str(tmp_path / "dark"), (16, 16), 0, skip_bad=False)
    assert "no pixel is brighter than 17 of 255, as with 12 bits" in capsys.readouterr().err


def test_rounding_leaves_no_negative_variance(monkeypatch):
    """As of an image of one colour, in Pillow before 13."""
    monkeypatch.setattr(ImageStat.Stat, "var", [-1e-9] * 3)
    assert appearance_of(Image.new("RGB", (8, 8))).contrast == 0


def test_mvtec_layout(tmp_path):
    root = tmp_path / "bottle"
    for name in [f"train/good/{i:03d}" for i in range(20)] + ["test/good/000", "test/.hidden/1"]:
        save(root / f"{name}.png")
    for i in range(2):
        save(root / f"test/broken/{i:03d}.png")
        ending = (".png", ".BMP")[i]
        save(root / f"ground_truth/broken/{i:03d}_mask{ending}", RAMP > 250 - i)
        save(root / f"ground_truth/broken/{i:03d}.png")  # a copy of the photo
    category = open_category(root)
    assert (category.name, category.layout) == ("bottle", "mvtec")
    assert contents(category) == {"broken/000": 5, "broken/001": 6, "good/000": 0}
    train, validation = category.split(seed=0)
    assert (len(train), len(validation)) == (18, 2)
    assert sorted(train + validation) == category.train and category.split(0)[0] == train
    assert any(category.split(seed)[1] != validation for seed in range(1, 5))
    for name in ("test/overall", "test/OK", "train/normal", "validation/ok"):
        save(root / name / "000.png")
        with pytest.raises(DataError, match=f"{name}: .*rename"):
            open_category(root)
        shutil.rmtree(root / name)
    of_nas = "@eaDir/001.png/SYNOFILE_THUMB_M.jpg"
    for name in ("train/good/001.cr2", f"train/good/{of_nas}", f"test/{of_nas}"):
        put(root / name, b"")
    assert len(open_category(root).train) == 20
    loose = save(root / "test/loose.png")
    with pytest.raises(
        DataError, match="loose.png: belongs into a folder of test, such as test/good"
    ):
        open_category(root)
    loose.unlink()
    (root / "test").rename(root / "test_public")  # MVTec AD 2
    (root / "ground_truth").rename(root / "test_public/ground_truth")
    assert contents(open_category(root)) == {"broken/000": 5, "broken/001": 6, "good/000": 0}


def test_loco_layout(tmp_path):
    root = tmp_path / "pushpins"
    keys = ("pixel_value", "saturation_threshold", "relative_saturation")
    config = [dict(zip(keys, values)) for values in ((255, 0.5, True), (254, 7, False))]
    put(root / "defects_config.json", json.dumps(config).encode())
    for folder in ("train", "validation", "test"):
        save(root / folder / "good/000.png")
    save(root / "test/logical_anomalies/007.png")
    for i in range(2):
        mask = (RAMP // 8 == i).astype(np.uint8) * (255 - i)
        save(root / f"ground_truth/logical_anomalies/007/{i:03d}.png", mask)
    category = open_category(root)
    assert category.layout == "loco" and len(category.validation) == 1
    assert category.split(0) == (category.train, category.validation)
    assert contents(category) == {"good/000": 0, "logical_anomalies/007": 16}  # the masks' union
    regions = category.regions(category.test[1], (16, 16))
    assert [(int(mask.sum()), saturation) for mask, saturation in regions] == [(8, 4), (8, 7)]
    (root / "defects_config.json").unlink()
    with pytest.raises(DataError, match="007_mask.png is missing; copy defects_config.json"):
        open_category(root)


def test_visa_layouts(tmp_path):
    root, lines = tmp_path / "VisA/candle", ["object,split,label,image,mask"]
    for split, label, image, mask in (
        ("train", "normal", "Images/Normal/000.JPG", ""),
        ("train", "normal", "Images/Normal/001.JPG", ""),
        ("test", "normal", "Images/Normal/002.JPG", ""),
        ("test", "anomaly", "Images/Anomaly/000.JPG", "Masks/Anomaly/000.png"),
    ):
        save(root / "Data" / image)
        mask = mask and f"candle/Data/{mask}"
        lines += [f"{n},{split},{label},candle/Data/{image},{mask}" for n in ("candle", "pcb1")]
    save(root / "Data/Masks/Anomaly/000.png", (RAMP > 253).astype(np.uint8))  # 1, not 255
    put(tmp_path / "VisA/split_csv/1cls.csv", "\n".join(lines).encode())
    category = open_category(root)
    assert (category.name, category.layout, len(category.train)) == ("candle", "visa", 2)
    assert contents(category) == {"bad/000": 2, "good/002": 0}
    assert data.list_categories(tmp_path / "VisA") == [root]
    (tmp_path / "link").symlink_to(tmp_path / "VisA")
    assert open_category(tmp_path / "link/candle") == category  # and so for a resumed run
    for right, wrong, reason in (
        (",candle/Data/Masks/Anomaly/000.png", ",", "000.JPG is an anomaly without a mask"),
        ("test,anomaly", "train,anomaly", "000.JPG is an anomaly to train on"),
        ("test,anomaly", "test,normal", "000.JPG is normal and has a mask"),
    ):
        table = "\n".join(lines + [lines[-2].replace("000", "001")])  # another anomaly, of candle
        put(tmp_path / "VisA/split_csv/1cls.csv", table.replace(right, wrong, 1).encode())
        with pytest.raises(DataError, match=f"1cls.csv: {reason}; mend its row"):
            open_category(root)

    other = tmp_path / "visa_pytorch/candle"  # as VisA's own script rearranges it
    for path in ("train/good/0.JPG", "test/good/1.JPG", "test/bad/2.JPG"):
        save(other / path)
    save(other / "ground_truth/bad/2.png", RAMP > 253)
    assert contents(open_category(other)) == {"bad/2": 2, "good/1": 0}


def test_folders(tmp_path, capfd):
    for name in ("b.png", "sub/a.jpg", ".hidden.png", "sub/.hidden/c.png"):
        save(tmp_path / "photos" / name)
    category = open_category(tmp_path / "photos")
    assert category.layout == "folder" and not category.test
    assert [path.name for path in category.train] == ["b.png", "a.jpg"]
    with pytest.raises(DataError, match="sub/a.jpg: lies in a folder within .*photos; move it up"):
        list_images(tmp_path / "photos")  # as in train/good, where all lie side by side
    assert not capfd.readouterr().err
    for name in ("IMG_1.HEIC", "a.jfif"):
        put(tmp_path / "photos" / name, b"")
    assert len(list_images(tmp_path / "photos", recursive=True)) == 2
    assert "left out 2 of another kind, such as" in (note := capfd.readouterr().err)
    assert "IMG_1.HEIC: save as .png or .jpg" in note
    for name in ("b.png", "sub/a.jpg"):
        (tmp_path / "photos" / name).unlink()
    with pytest.raises(DataError, match="photos: no images .* in it"):
        list_images(tmp_path / "photos", recursive=True)
    assert capfd.readouterr().err == note
    with pytest.raises(DataError, match="IMG_1.HEIC: of a kind that is not read; save it as .png"):
        list_images(tmp_path / "photos")
    with pytest.raises(DataError, match="nowhere: no such folder; --data takes"):
        open_category(tmp_path / "nowhere")
    assert open_category(save(tmp_path / "line/ok/0.png").parents[1]).layout == "folder"
    parts = [save(tmp_path / f"mvtec/{name}/train/good/0.png").parents[2] for name in ("a", "b")]
    save(tmp_path / "mvtec/.cache/train/good/0.png")
    assert data.list_categories(tmp_path / "mvtec") == parts
    assert data.list_categories(parts[0]) == []
    with pytest.raises(DataError, match="several categories; choose one: .*/a, .*/b$"):
        open_category(tmp_path / "mvtec")


def test_only_the_word_demo_means_the_built_in_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "DEMO_SPLITS", {"train/good": 2})
    own = save(tmp_path / "demo/own.png")
    for name in ("./demo", "demo/", Path("demo"), own.parent):
        assert [path.name for path in open_category(name).train] == ["own.png"], name
    with monkeypatch.context() as patch:
        patch.setattr(data, "make_demo", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(DataError, match="demo set cannot be drawn here .No space left"):
            open_category("demo")
    save(Path(f"datasets/.demo.tmp{os.getpid()}/train/good/old.png"))  # of a container that ended
    assert len(open_category("demo").train) == 2
    save(tmp_path / "demo/part/train/good/0.png")
    assert len(data.list_categories("demo/")) == 1 and data.list_categories("demo") == []


def test_demo_images():
    normal, masks = demo.draw_demo_image(np.random.default_rng(1), None)
    assert normal.size == (256, 256) and normal.mode == "RGB" and masks == []
    assert demo.draw_demo_image(np.random.default_rng(1), None)[0] == normal
    for defect in demo.DEMO_LOGICAL + demo.DEMO_STRUCTURAL:
        image, masks = demo.draw_demo_image(np.random.default_rng(1), defect)
        assert masks and all(20 < (np.asarray(mask) > 127).sum() < 6000 for mask in masks), defect
        assert np.abs(np.asarray(image).astype(float) - np.asarray(normal)).mean() > 0.5


def test_demo_set_is_in_locos_layout(tiny_demo, monkeypatch):
    category = open_category(tiny_demo)
    assert (len(category.train), len(category.validation), len(category.test)) == (5, 2, 9)
    for sample in category.test:
        assert bool(category.regions(sample, (256, 256))) == (sample.defect != "good")
    monkeypatch.setattr(demo, "DEMO_SPLITS", {"train/good": 1})
    with pytest.raises(OSError):
        demo.make_demo(tiny_demo)  # never over an existing folder
    assert [path.name for path in tiny_demo.parent.iterdir()] == ["tiny"]  # nothing half-made
