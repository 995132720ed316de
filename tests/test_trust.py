"""An untidy world: what is not as it should be gets one clear line and exit status 2, and what was there before stays."""

import contextlib
import csv
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import distill
import efficientad
import evaluate
import runs
from backbone import ResNet
from data import DataError, Images, list_images, look_of, open_category, range_of, read_image, unlike
from efficientad import CHANNELS, PDN, EfficientAD, ModelError, false_alarms, read_checkpoint, write_checkpoint
from runs import fingerprint, last_line, write
from train import permutation

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
TINY = ("--image-size", 128, "--pretraining-images", "none", "--device", "cpu")


def put(path: Path, content=PHOTO, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path, **options)
    return path


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(result: tuple[int, str, str], *words: object) -> None:
    """Exit status 2, and the last line alone says why (argparse writes the usage before it, tqdm its bar)."""
    status, _, err = result
    assert status == 2 and "Traceback" not in err, err
    line = err.splitlines()[-1].split("\r")[-1]
    assert all(str(word) in line for word in words), err
    assert line.split(".py: ")[0] in ("train", "evaluate", "distill"), err


@pytest.fixture(scope="module")
def model():
    """Calibrated on noise; says that its training images looked like PHOTO."""
    torch.manual_seed(0)
    model = EfficientAD(image_size=(128, 128))
    model.fit_teacher_statistics([torch.rand(2, 3, 128, 128)])
    model.calibrate([torch.rand(2, 3, 128, 128)])
    model.training_info = {"validation_images": 2, "usual": range_of([look_of(PHOTO)])}
    return model


@pytest.fixture
def run(model, tmp_path):
    (tmp_path / "run").mkdir()
    model.save(str(tmp_path / "run/model.pt"))
    return tmp_path / "run"


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


# ---------------------------------------------------------------------------------------------------- NaN, and a full disk


@pytest.fixture
def command(tmp_path, teacher):
    for i in range(3):
        put(tmp_path / f"part/train/good/{i}.png", PHOTO.rotate(90 * i))
    return ("train.py", "--data", "part", *TINY, "--teacher", teacher, "--precision", "fp32", "--out", "o")


def test_a_loss_that_is_not_finite_stops_training(command, run_script, tmp_path, monkeypatch):
    losses, calls = EfficientAD.losses, []

    def spoiled(*args):
        calls.append(1)
        return losses(*args) | ({"penalty": torch.tensor(torch.nan, requires_grad=True)} if len(calls) == 4 else {})

    monkeypatch.setattr(EfficientAD, "losses", spoiled)
    assert_refused(run_script(*command, "--steps", 9), "o: step 3: the loss is not finite; lower --lr")
    state = read_checkpoint(str(tmp_path / "o/resume.pt"))
    assert state["step"] == 0 and all(v.isfinite().all() for k, v in state["model"].items() if k != "threshold")
    assert not (tmp_path / "o/model.pt").exists()
    assert_refused(run_script(*command[:-1], "p", "--steps", 9, "--lr", 1e30), "the loss is not finite")  # the real thing


def test_photos_left_out_and_photos_changed_while_a_run_was_interrupted(command, run_script, tmp_path, monkeypatch):
    """The junk is the first photo seen, and is seen no more after the interruption before step 3."""
    order = permutation(4, 0, 1, 0).tolist()  # of epoch 0
    for i in range(4):
        put(tmp_path / f"photos/{i}.png", b"junk" if i == order[0] else PHOTO)
    losses, calls = EfficientAD.losses, []

    def spoiled(*args):
        calls.append(1)
        return losses(*args) | ({"penalty": torch.tensor(torch.nan, requires_grad=True)} if len(calls) == 4 else {})

    monkeypatch.setattr(EfficientAD, "losses", spoiled)
    options = ("--steps", 4, "--pretraining-images", "photos", "--skip-bad-images", "--checkpoint-every", 0)
    assert_refused(run_script(*command, *options), "o: step 3: the loss is not finite")
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/9.png")
    assert_refused(run_script("train.py", "--resume", "o"), "photos: has other images than when the run began; put them back")
    (tmp_path / "photos/9.png").rename(tmp_path / "photos/0.png")
    assert run_script("train.py", "--resume", "o")[0] == 0
    assert f"photos/{order[0]}.png" in (tmp_path / "o/skipped.txt").read_text()


def test_weights_that_are_not_finite_are_never_saved(command, run_script, tmp_path, monkeypatch):
    step, calls = torch.optim.Adam.step, []

    def spoil(self, *args, **kwargs):
        calls.append(1)
        result = step(self, *args, **kwargs)
        if len(calls) == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] = torch.inf
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    assert_refused(run_script(*command, "--steps", 9, "--checkpoint-every", 0), "o: step 1: it left weights that are not finite")
    assert read_checkpoint(str(tmp_path / "o/resume.pt"))["step"] == 1


@contextlib.contextmanager
def file_limit(size: int):
    """No file may grow beyond so many bytes: to the writer like a full disk, and no disk need be filled."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(command, run, run_script, tmp_path, monkeypatch, model):
    monkeypatch.setattr(EfficientAD, "load", lambda path: model)
    with file_limit(2**20):
        assert_refused(run_script(*command, "--steps", 1), "o/resume.pt: cannot be written (File too large)")
    assert {p.name for p in (tmp_path / "o").iterdir()} == {".lock"}  # no half file
    assert run_script(*command, "--steps", 1)[0] == 0
    put(tmp_path / "o/model.pt", b"earlier")
    with file_limit(2**20), pytest.raises(ModelError, match="what it held before is untouched"):
        model.save(str(tmp_path / "o/model.pt"))
    assert (tmp_path / "o/model.pt").read_bytes() == b"earlier"
    with pytest.raises(ModelError, match="gone/m.pt: cannot be written .No such file or directory"):
        write_checkpoint({}, str(tmp_path / "gone/m.pt"))
    write_checkpoint({"data": "caf\udce9"}, str(tmp_path / "caf\udce9.pt"))  # names that are not UTF-8
    assert read_checkpoint(str(tmp_path / "caf\udce9.pt")) == {"data": "caf\udce9"}

    put(tmp_path / "in/a.png"), put(tmp_path / "run/images/scores.csv", b"earlier")
    with file_limit(2**12):
        assert_refused(run_script("evaluate.py", "--run", run, "--images", "in", "--device", "cpu"), "File too large", "a.png.png")
        assert_refused(run_script("evaluate.py", "--run", run, "--export", "m.pt2"), "File too large", "m.pt2")
    assert (run / "images/scores.csv").read_bytes() == b"earlier" and not (tmp_path / "m.pt2").exists()
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]
    write(tmp_path / "whole.txt", "first")
    with file_limit(2), pytest.raises(OSError, match="whole.txt"):
        write(tmp_path / "whole.txt", "second")
    assert (tmp_path / "whole.txt").read_text() == "first"


def test_distillation_refuses(run_script, tmp_path):
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "resnet18.pth")
    for i in range(3):
        put(tmp_path / f"photos/{i}.png", PHOTO.rotate(90 * i))
    command = ("distill.py", "--backbone", "resnet18", "--backbone-weights", "resnet18.pth", "--image-size", 32, "--steps", 3,
               "--batch-size", 1, "--device", "cpu", "--precision", "fp32")  # fmt: skip
    put(tmp_path / "file", b"mine"), put(tmp_path / "bad/a.png", b"junk")
    assert_refused(run_script(*command, "--images", "photos", "--out", "file/t.pt"), "file")
    assert_refused(run_script(*command, "--images", "photos", "--lr", "inf"), "--lr > 0")
    assert_refused(run_script(*command, "--images", "bad", "--out", "o/t.pt"), "bad/a.png: not an image")
    views = distill.Views([Path("bad/a.png")], 1, distill.parse_arguments(["--images", "bad", "--backbone-weights", "x"]))
    with pytest.raises(DataError) as error:  # a loader's worker sends its traceback along
        next(iter(DataLoader(views, 1, num_workers=1)))
    assert len(str(error.value).splitlines()) > 3 and last_line(error.value).startswith("bad/a.png: not an image")
    assert_refused(run_script(*command, "--images", "photos", "--out", "o/t.pt", "--lr", 1e30), "the loss is not finite")
    state = read_checkpoint(str(tmp_path / "o/t.pt.resume"))
    assert state["step"] == 0 and all(v.isfinite().all() for v in state["pdn"].values())


# --------------------------------------------------------------------------------------- calibration, repeatability, load


def test_false_alarms_against_simulation():
    """The share of new scores above the highest of n has this mean, and keeps the bound in 95 % of cases, whatever the scores'
    distribution: uniform ones do."""
    rng = np.random.default_rng(0)
    for n in (2, 21, 200):
        shares = 1 - rng.random((20000, n)).max(1)
        expected, bound = false_alarms(n)
        assert shares.mean() == pytest.approx(expected, rel=0.03)
        assert (shares < bound).mean() == pytest.approx(0.95, abs=0.01)


def test_what_is_unlike_the_training_images():
    usual = range_of([(100, 80, False, 100.0), (120, 80, False, 140.0)])
    assert usual == {"width": [100, 120], "height": [80, 80], "aspect": [1.25, 1.5], "brightness": [100, 140], "gray": 0}
    assert unlike((110, 80, False, 91), usual) == []  # within a quarter of the range
    assert unlike((110, 80, False, 89), usual) == ["darker: 89"]
    assert unlike((100, 81, True, 151), usual) == ["size 100×81", "gray", "brighter: 151"]
    assert unlike((9, 9, False, 5), range_of([(9, 9, True, 0.0)])) == ["coloured"]
    assert unlike((9, 9, True, 0), range_of([(9, 9, True, 0.0), (9, 9, False, 0.0)])) == []
    assert look_of(Image.new("RGB", (3, 2), (255, 0, 0))) == (3, 2, False, 76.0)
    with pytest.raises(ValueError):
        range_of([])


def test_views_do_not_depend_on_the_number_of_workers(tmp_path):
    for i in range(3):
        put(tmp_path / f"{i}.png", PHOTO.rotate(90 * i))
    options = ["--images", str(tmp_path), "--backbone-weights", "x", "--image-size", "32", "--crops", "0.2", "0.9"]
    views = distill.Views(list_images(tmp_path), 8, distill.parse_arguments(options))
    alone, shared = (list(DataLoader(views, 2, num_workers=n)) for n in (0, 2))
    assert all(torch.equal(a, b) for x, y in zip(alone, shared, strict=True) for a, b in zip(x, y, strict=True))


def rms_ratio(a, b) -> float:
    return ((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()).item()


def differences(a: EfficientAD, b: EfficientAD, dtype=None) -> dict[str, float]:
    """Of losses and raw maps, between devices or (with dtype) between autocast and float32."""
    torch.manual_seed(1)
    images, results = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), []
    for model, half in ((a, dtype), (b, None)):
        device = model.threshold.device.type
        x = images.to(device)
        with torch.no_grad(), torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
            values = model.losses(x, x, x) | dict(zip(("local", "global"), model.raw_maps(x)))
        results.append({k: v.cpu() for k, v in values.items()})
    return {k: rms_ratio(results[0][k], results[1][k]) for k in results[0]}


def test_half_precision_stays_close(model):
    found = differences(model, model, torch.bfloat16)
    assert 0 < max(found.values()) < 0.02, found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CPU and GPU: there is no GPU")
def test_gpu_stays_close(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gpu = EfficientAD(image_size=(128, 128))
    gpu.load_state_dict(model.state_dict())
    gpu = gpu.eval().cuda()
    assert max(differences(gpu, model).values()) < 1e-4
    assert max(differences(gpu, model, torch.bfloat16).values()) < 0.02
    monkeypatch.setattr(efficientad, "KERNELS", False)
    assert max(differences(gpu, model).values()) < 1e-4


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_strips_have_no_seams(size, padding, monkeypatch):
    """Large batches are divided, large images computed strip by strip: the same maps from smaller tensors."""
    model = EfficientAD(size=size, image_size=(192, 128), padding=padding).eval()
    images = torch.randint(0, 256, (3, 3, 192, 128), dtype=torch.uint8)
    with torch.no_grad(), Largest() as whole:
        expected = model.raw_maps(images)
    for tile, bound in ((model.activation // 3, 0.3), (2 * model.activation, 0.7)):
        monkeypatch.setattr(efficientad, "TILE", tile)
        with torch.no_grad(), Largest() as parts:
            found = model.raw_maps(images)
        assert parts.elements < bound * whole.elements
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected))
    assert not model.oversized(images)  # with gradient nothing is divided


def test_many_images_at_flat_memory(run, tmp_path, monkeypatch, model, capsys):
    """Scoring keeps no image: after the first few, 300 more need next to nothing."""
    import tracemalloc

    image = put(tmp_path / "image.png", PHOTO.resize((200, 160)))
    maps = {name: np.zeros((128, 128), np.float32) for name in evaluate.MAPS}
    predict = [(read_image(image), maps, dict.fromkeys(evaluate.MAPS, 0.0))]
    monkeypatch.setattr(evaluate, "predict", lambda *_: (predict[0][0].copy(), *predict[0][1:]))
    monkeypatch.setattr(evaluate, "list_images", lambda *_, **__: iter(paths()))
    sizes = []

    def paths():
        for i in range(330):
            if i in (30, 329):
                sizes.append(tracemalloc.get_traced_memory()[0])
            yield tmp_path / f"{i:05}.png"

    tracemalloc.start()
    try:
        evaluate.score_folder(run, model, str(tmp_path), False)
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 400_000, sizes  # rows of a table: an image alone has 96,000 bytes
    assert "of 330 images" in capsys.readouterr().out


def test_check_of_losses():
    losses = [torch.tensor(1.0), torch.tensor(torch.inf), torch.tensor(torch.nan)]
    with pytest.raises(ModelError, match="here: step 8: the loss is not finite"):
        runs.check_losses(losses, 9, "here")
    assert losses == [] and efficientad.all_finite([torch.ones(2)])
    assert not efficientad.all_finite([torch.ones(2), torch.tensor([torch.nan])])
