"""An untidy world: what is not as it should be gets one clear line and exit status 2, and what was there before stays."""

import contextlib
import csv
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTO, ROOT, TINY, assert_refused, put
from PIL import Image

from data import DataError, Images, list_images, open_category, read_image
from efficientad import CHANNELS, PDN, EfficientAD, ModelError, read_checkpoint, write_checkpoint
from runs import fingerprint


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def unprivileged():
    """Root may read everything; some other user may not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


# ------------------------------------------------------------------------------------------------------------------ images


@pytest.fixture
def bad_images(tmp_path) -> dict[str, str]:
    """in/*: files of all kinds that cannot be used -> the reason that must be given."""
    whole = put(tmp_path / "whole.png").read_bytes()
    put(tmp_path / "in/truncated.png", whole[: len(whole) // 2])
    put(tmp_path / "in/truncated.jpg", put(tmp_path / "whole.jpg").read_bytes()[:900])
    put(tmp_path / "in/zero.png", b"")
    put(tmp_path / "in/text.jpg", b"not an image")
    put(tmp_path / "in/animated.webp", PHOTO, save_all=True, append_images=[PHOTO.rotate(180)])
    put(tmp_path / "in/animated.png", PHOTO, save_all=True, append_images=[PHOTO.rotate(180)])
    put(tmp_path / "in/pages.tiff", PHOTO, save_all=True, append_images=[PHOTO])
    put(tmp_path / "in/bomb.png", Image.new("1", (20000, 20000)))
    put(tmp_path / "in/float.tiff", Image.new("F", (8, 8)))
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    (tmp_path / "in/nowhere.png").symlink_to("gone.png")
    reasons = {name: "damaged image" for name in ("truncated.png", "truncated.jpg")}
    reasons |= {name: "not an image that Pillow can read" for name in ("zero.png", "text.jpg")}
    reasons |= {name: "holds 2 images" for name in ("animated.webp", "animated.png", "pages.tiff")}
    return reasons | {"bomb.png": "more than 89,478,485 pixels", "float.tiff": "floating-point", "nowhere.png": "no such file",
                      "loop.png": "Too many levels of symbolic links"}  # fmt: skip


def test_images_that_cannot_be_used(bad_images, run, run_script, tmp_path, monkeypatch, model):
    monkeypatch.setattr(EfficientAD, "load", lambda path: model)
    assert sorted(bad_images) == [p.name for p in list_images(tmp_path / "in")]
    put(tmp_path / "one/a.png")
    assert run_script("evaluate.py", "--run", run, "--images", "one", "--device", "cpu")[0] == 0
    before = files(run)
    for name, reason in bad_images.items():
        (tmp_path / "one" / name).symlink_to(tmp_path / "in" / name)
        result = run_script("evaluate.py", "--run", run, "--images", "one", "--device", "cpu")
        assert_refused(result, name, reason, "--skip-bad-images")
        (tmp_path / "one" / name).unlink()
    assert files(run) == before

    put(tmp_path / "in/sub/z.png")
    status, out, err = run_script("evaluate.py", "--run", run, "--images", "in", "--skip-bad-images", "--device", "cpu")
    assert status == 0 and f"{len(bad_images)} skipped" in out and err.count("skipped: ") == len(bad_images), err
    with open(run / "images/skipped.csv", newline="") as file:
        listed = {row["image"]: row["reason"] for row in csv.DictReader(file)}
    assert listed.keys() == bad_images.keys() and all(bad_images[name] in reason for name, reason in listed.items())
    with open(run / "images/scores.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [os.path.join("sub", "z.png")]
    shutil.rmtree(tmp_path / "in/sub")
    result = run_script("evaluate.py", "--run", run, "--images", "in", "--skip-bad-images", "--device", "cpu")
    assert_refused(result, "none of its 11 images can be read")


def test_odd_images_are_scored_and_marked(run, run_script, tmp_path, monkeypatch, model):
    monkeypatch.setattr(EfficientAD, "load", lambda path: model)
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (40, 50), np.uint16))
    expected = {"cmyk.jpg": (PHOTO.convert("CMYK"), ""), "deep.png": (deep, "gray"), "gray.png": (PHOTO.convert("L"), "gray"),
                "dark.png": (PHOTO.point(lambda v: v // 4), "darker: 32"), "like.png": (PHOTO, ""),
                "pixel.png": (Image.new("RGB", (1, 1), "white"), "size 1×1, gray, brighter: 255"),
                "strip.png": (Image.new("RGB", (1, 3000), (255, 0, 0)), "size 1×3000, darker: 76")}  # fmt: skip
    for name, (image, _) in expected.items():
        put(tmp_path / "in" / name, image)
    mpo = put(tmp_path / "in/mpo.jpg", PHOTO, format="MPO", save_all=True, append_images=[PHOTO.resize((25, 20))])
    assert read_image(mpo).size == PHOTO.size
    (tmp_path / os.fsdecode(b"in/caf\xe9.png")).write_bytes((tmp_path / "in/like.png").read_bytes())
    status, out, err = run_script("evaluate.py", "--run", run, "--images", "in", "--device", "cpu")
    assert status == 0 and "5 of 9 images are unlike the training images" in out, err
    with open(run / "images/scores.csv", newline="", encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert {name: rows[name]["unlike_training"] for name in expected} == {name: words for name, (_, words) in expected.items()}
    assert rows["caf\\udce9.png"]["score"] == rows["like.png"]["score"]  # a name that is not UTF-8
    assert all(np.isfinite(float(row["score"])) for row in rows.values())
    assert Image.open(run / "images/overlays/strip.png.png").height < 1100  # not 256 × 3000
    assert "expect 33 % false alarms on normal images, with 95 % confidence less than 78 %" in out


def test_folders_that_cannot_be_used(tmp_path, run_script, run):
    for command, words in (
        (("--images", "nowhere"), ("nowhere", "no such folder")),
        (("--images", ""), ("no images",)),
        (("--images", "run/model.pt"), ("model.pt", "is a file, not a folder")),
        (("--images", "a", "--data", "b"), ("--images scores unlabelled images",)),
        (("--images", "a", "--tiff"), ("--images scores unlabelled images",)),
        (("--skip-bad-images",), ("--skip-bad-images goes with --images",)),
        (("--export", "a.onnx", "--tiff"), ("--export goes with --run alone",)),
        (("--export", "a.h5"), ("a.h5", ".onnx or .pt2")),
        (("--export", "nowhere/a.onnx"), ("no folder nowhere",)),
    ):
        assert_refused(run_script("evaluate.py", "--run", run, "--device", "cpu", *command), *words)
    assert files(run).keys() <= {run / "model.pt", run / ".lock"}
    put(tmp_path / "a/x.png")
    (tmp_path / "a/round").symlink_to(tmp_path / "a", target_is_directory=True)  # a loop
    put(tmp_path / "far/y.png")
    (tmp_path / "a/linked").symlink_to(tmp_path / "far", target_is_directory=True)
    assert [p.name for p in list_images(tmp_path / "a", recursive=True)] == ["y.png", "x.png"]  # each once


def test_unreadable_permissions():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders keep other users out
        folder = Path(name)
        secret, locked = put(folder / "in/secret.png"), put(folder / "in/locked/a.png").parent
        write_checkpoint({}, str(folder / "model.pt"))
        folder.chmod(0o755)
        for path in (secret, locked, folder / "model.pt"):
            path.chmod(0)
        with unprivileged():
            for action, match in (
                (lambda: read_image(secret), "secret.png: cannot be read .Permission denied"),
                (lambda: list_images(folder / "in", recursive=True), "locked: cannot be read .Permission denied"),
                (lambda: read_checkpoint(str(folder / "model.pt")), "model.pt: cannot be read"),
                (lambda: write_checkpoint({}, str(folder / "other.pt")), "other.pt: cannot be written .Permission denied"),
            ):
                with pytest.raises((DataError, ModelError), match=match):
                    action()
        locked.chmod(0o755)


# --------------------------------------------------------------------------------------------------------------- data sets


def test_data_sets_that_cannot_be_trained_on(tmp_path, run_script, teacher):
    for i in range(4):
        put(tmp_path / f"above/mvtec/part/train/good/{i}.png")
        put(tmp_path / f"above/mvtec/other/train/good/{i}.png")
        put(tmp_path / f"broken/train/good/{i}.png", b"junk" if i == 2 else PHOTO)
        put(tmp_path / f"checked/train/good/{i}.png")
    put(tmp_path / "above/mvtec/part/test/good/0.png")
    put(tmp_path / "above/mvtec/part/test/dent/0.png")
    put(tmp_path / "checked/validation/good/0.png", b"")
    put(tmp_path / "lonely/train/good/0.png")
    (tmp_path / "bare/train/good").mkdir(parents=True)
    put(tmp_path / "file", b"mine")
    part, before = "above/mvtec/part", files(tmp_path)
    for options, words in (
        (("--data", f"{part}/train"), ("part/train/good/0.png: lies in a part of a data set",)),
        (("--data", f"{part}/test"), ("lies in a part of a data set", "train/good")),
        (("--data", f"{part}/test/dent"), ("lies in a part of a data set",)),
        (("--data", "above"), ("lies in a part of a data set",)),
        (("--data", part, "--categories", "part"), ("--categories takes a folder of categories",)),
        (("--data", "above/mvtec", "--categories", "screw"), ("has no category screw; it has: other, part",)),
        (("--data", "bare"), ("bare/train/good: no images",)),
        (("--data", "lonely"), ("lonely: only 1 normal image",)),
        (("--data", "broken"), ("2.png: not an image", "--skip-bad-images")),
        (("--data", "checked"), ("validation/good/0.png", "--skip-bad-images")),
        (("--data", "checked", "--skip-bad-images"), ("none of 1 images can be read", "0.png")),
        (("--data", part, "--out", "file"), ("file: exists",)),
        (("--data", part, "--out", "file/below"), ("Not a directory: 'file/below'",)),
        (("--data", "above/mvtec", "--out", "file"), ("file: is a file",)),
        (("--data", part, "--lr", "inf"), ("--lr > 0",)),
        (("--data", part, "--checkpoint-every", "nan"), ("--checkpoint-every >= 0",)),
        (("--data", part, "--seed", 1, "--seeds", "1,2"), ("--seed or --seeds",)),
        (("--data", part, "--map-normalization", "gaussian", "--a", 0.5), ("--a and --b belong to",)),
        (("--data", part, "--ablation", "--p-hard", 0.5), ("--ablation chooses",)),
    ):
        assert_refused(run_script("train.py", *TINY, "--steps", 1, "--teacher", teacher, *options), *words)
    assert {p: c for p, c in files(tmp_path).items() if p.name != ".lock"} == before
    put(tmp_path / "runs", b"mine")
    command = ("train.py", *TINY, "--data", part, "--steps", 1, "--teacher", teacher)
    assert_refused(run_script(*command), "Not a directory: 'runs/part-small'")
    assert_refused(run_script("evaluate.py", "--run", "file"), "file/model.pt: no such file")


def test_bad_images_are_left_out_of_training(tmp_path, run_script, teacher):
    for i in range(4):
        put(tmp_path / f"part/train/good/{i}.png", b"junk" if i == 2 else PHOTO)
        put(tmp_path / f"photos/{i}.png", b"" if i else PHOTO)
    put(tmp_path / "part/validation/good/0.png")
    options = ("--data", "part", "--steps", 2, "--teacher", teacher, "--image-size", 128, "--device", "cpu", "--out", "o")
    status, _, err = run_script("train.py", *options, "--pretraining-images", "photos", "--skip-bad-images")
    assert status == 0 and "skipped: part/train/good/2.png: not an image" in err and "3 training and 1 validation" in err, err
    info = EfficientAD.load(str(tmp_path / "o/model.pt")).training_info
    assert info["training_images"] == 3 and info["usual"]["width"] == [50, 50] and info["usual"]["gray"] == 0
    assert (tmp_path / "o/skipped.txt").read_text().splitlines() == info["skipped_images"]
    assert "part/train/good/2.png" in info["skipped_images"][0] and "photos/" in info["skipped_images"][-1]
    images = Images(list_images(tmp_path / "photos"), (8, 8))
    images.skip_bad = True
    assert np.array_equal(images[2], images[0]) and images.errors.keys() == {2, 3}  # the next one that can be read


def test_masks_that_cannot_be_used(tmp_path, run, run_script, monkeypatch, model):
    monkeypatch.setattr(EfficientAD, "load", lambda path: model)
    put(tmp_path / "part/train/good/0.png"), put(tmp_path / "part/test/good/0.png"), put(tmp_path / "part/test/dent/0.png")
    put(tmp_path / "part/test/dent/1.png")
    truth, white = tmp_path / "part/ground_truth", Image.new("L", PHOTO.size, 255)
    masks = [truth / f"dent/{i}_mask.png" for i in range(2)]
    for mask in masks:
        put(mask, white)
    whole = masks[1].read_bytes()
    command = ("evaluate.py", "--run", run, "--data", "part", "--device", "cpu")
    for content, words in (
        (Image.new("L", (8, 8), 255), ("1_mask.png: mask of 8×8 for an image of 50×40",)),
        (Image.new("L", PHOTO.size), ("1_mask.png: the mask of a defect is empty",)),
        (whole[: len(whole) - 30], ("1_mask.png: damaged image",)),
        (b"junk", ("1_mask.png: not an image",)),
        (None, ("dent/1.png: its mask", "1_mask.png is missing")),
    ):
        put(masks[1], content) if content else masks[1].unlink()
        assert_refused(run_script(*command), *words)
    assert not (run / "results.json").exists()
    put(masks[1], white)
    wrong = put(truth / "good/0_mask.png", white)
    assert_refused(run_script(*command), "good/0_mask.png: marks a defect in an image of test/good")
    put(wrong, Image.new("L", PHOTO.size))  # all black is harmless
    double = put(tmp_path / "part/test/dent/1.jpg")
    assert_refused(run_script(*command), "1.png: has the name of", "1.jpg; rename one")
    double.unlink()
    assert run_script(*command)[0] == 0 and (run / "results.json").exists()


def test_damaged_tables_of_data_sets(tmp_path):
    put(tmp_path / "VisA/candle/Data/Images/Normal/0.png")
    (tmp_path / "VisA/split_csv/1cls.csv").mkdir(parents=True)
    with pytest.raises(DataError, match="1cls.csv: missing"):
        open_category(tmp_path / "VisA/candle")
    (tmp_path / "VisA/split_csv/1cls.csv").rmdir()
    for content in (b"\xff\xfe", b"object,split\ncandle,train\n", b"object,split,label,image,mask\ncandle\n", b"a\x00b\n1\n"):
        put(tmp_path / "VisA/split_csv/1cls.csv", content)
        with pytest.raises(DataError, match="1cls.csv"):
            open_category(tmp_path / "VisA/candle")
    loco = tmp_path / "loco"
    put(loco / "train/good/0.png"), put(loco / "test/logical/0.png")
    put(loco / "ground_truth/logical/0/0.png", Image.new("L", PHOTO.size, 255))
    entry = b'[{"pixel_value": 255, "saturation_threshold": %b, "relative_saturation": %b}]'
    for content in (b"{}", b"[1]", b"[{}]", b"[" * 10000, entry % (b"NaN", b"true"), entry % (b"1e-9", b"true"),
                    entry % (b"-1", b"false"), entry % (b'"x"', b"true")):  # fmt: skip
        put(loco / "defects_config.json", content)
        category = open_category(loco)
        with pytest.raises(DataError, match="defects_config.json"):
            category.regions(category.test[0], PHOTO.size[::-1])


# ------------------------------------------------------------------------------------------------------------- checkpoints


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoints_that_cannot_be_used(model, run, run_script, tmp_path, teacher):
    path = run / "model.pt"
    whole, state = path.read_bytes(), model.state_dict()
    good = {"format": "efficientad", "config": model.config, "training": {}, "state": state}
    victim = tmp_path / "executed"
    command = ("evaluate.py", "--run", run, "--images", ROOT / "assets", "--device", "cpu")
    for content, words in (
        (whole[: len(whole) // 2], ("not a readable checkpoint",)),
        (b"", ("not a readable checkpoint",)),
        (good | {"training": Exploit(str(victim))}, ("not a readable checkpoint",)),
        (state, ("not a model of this program",)),
        (good | {"config": model.config | {"image_size": (160, 128)}}, ("damaged model file",)),
        (good | {"config": model.config | {"size": "large"}}, ("damaged model file",)),
        (good | {"config": model.config | {"size": "medium"}}, ("damaged model file",)),
        (good | {"state": {k: v for k, v in state.items() if k != "quantiles"}}, ("damaged model file",)),
        (good | {"state": state | {"student.0.bias": torch.full((128,), torch.nan)}}, ("not a number",)),
        (good | {"state": state | {"teacher_std": torch.full((1, CHANNELS, 1, 1), torch.inf)}}, ("not a number",)),
        (good | {"state": state | {"threshold": torch.tensor(torch.nan)}}, ("not calibrated",)),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert_refused(run_script(*command), "model.pt", *words)
    assert not victim.exists()
    path.unlink()
    assert_refused(run_script(*command), "model.pt: no such file")

    widths, narrow = PDN().state_dict(), PDN(channels=256).state_dict()
    for weights, words in ((narrow, "not a small teacher"), (widths | {"0.bias": torch.full((128,), torch.nan)}, "not finite"),
                           ({"0.weight": 1}, "not a small teacher"), (Exploit(str(victim)), "not a readable")):  # fmt: skip
        torch.save(weights, tmp_path / "teacher.pt")
        put(tmp_path / "part/train/good/0.png"), put(tmp_path / "part/train/good/1.png")
        result = run_script("train.py", "--data", "part", *TINY, "--steps", 1, "--teacher", "teacher.pt", "--out", "new")
        assert_refused(result, "teacher.pt", words)
    assert not victim.exists() and not (tmp_path / "new").exists()


def test_training_states_that_cannot_be_resumed(model, run_script, tmp_path):
    (tmp_path / "cut").mkdir()
    put(tmp_path / "part/train/good/0.png"), put(tmp_path / "part/train/good/1.png")
    options = {"device": "cpu", "data": "part", "image_size": [128, 128], "pretraining_images": "none", "steps": 2, "lr": 1e-4}
    names = {"data": fingerprint(sum(open_category("part").split(0), [])), "pretraining_images": fingerprint([])}
    good = {"format": "efficientad-resume", "options": options, "step": 1, "seconds": 0.0, "model": model.state_dict(),
            "files": names, "bad_photos": {}, "optimizer": {}}  # fmt: skip
    for content, words in (
        (b"half", ("not a readable checkpoint",)),
        ({"format": "other"}, ("not a training state of this program",)),
        (good | {"model": PDN().state_dict()}, ("damaged, or of another model",)),
        ({k: v for k, v in good.items() if k != "step"}, ("damaged, or of another model",)),
        (good, ("damaged, or of another model",)),  # its optimizer
        (good | {"bad_photos": ["x"]}, ("damaged, or of another model",)),
        (good | {"files": names | {"data": 1}}, ("part: has other images than when the run began",)),
    ):
        path = tmp_path / "cut/resume.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        assert_refused(run_script("train.py", "--resume", "cut"), *words)
        assert path.read_bytes() == before
