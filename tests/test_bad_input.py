"""An untidy world: what is not as it should be gets one clear line and exit status 2, and what was
there before stays."""

import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU, PHOTO, ROOT, TINY, assert_refused, files, put, rows_of
from PIL import Image

from efficientad import CHANNELS, PDN, EfficientAD, ModelError
from support.checkpoints import load_model, load_teacher, read_checkpoint, write_checkpoint
from support.data import list_categories, open_category
from support.images import DataError, list_images, read_image
from support.runs import fingerprint, holds_results, run_command


@pytest.fixture
def score(run, run_script):
    """score("in", …) runs evaluate.py --images in."""

    def function(folder, *options):
        return run_script("evaluate.py", "--run", run, "--images", folder, *options, *CPU)

    return function


def test_images_that_cannot_be_used(run, score, tmp_path):
    whole = put(tmp_path / "whole.png").read_bytes()
    put(tmp_path / "in/truncated.png", whole[: len(whole) // 2])
    put(tmp_path / "in/truncated.jpg", put(tmp_path / "whole.jpg").read_bytes()[:900])
    put(tmp_path / "in/zero.png", b"")
    put(tmp_path / "in/text.jpg", b"not an image")
    put(tmp_path / "in/animated.webp", PHOTO, save_all=True, append_images=[PHOTO.rotate(180)])
    put(tmp_path / "in/animated.png", PHOTO, save_all=True, append_images=[PHOTO.rotate(180)])
    put(tmp_path / "in/pages.tiff", PHOTO, save_all=True, append_images=[PHOTO])
    put(tmp_path / "in/float.tiff", Image.new("F", (8, 8)))
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    (tmp_path / "in/nowhere.png").symlink_to("gone.png")
    reasons = {name: "damaged image" for name in ("truncated.png", "truncated.jpg")}
    reasons |= {name: "not an image that Pillow can read" for name in ("zero.png", "text.jpg")}
    reasons |= {name: "holds 2 images" for name in ("animated.webp", "animated.png", "pages.tiff")}
    reasons |= {"float.tiff": "floating-point", "nowhere.png": "no such file"}
    reasons |= {"loop.png": "Too many levels of symbolic links"}

    assert sorted(reasons) == [p.name for p in list_images(tmp_path / "in")]
    assert_refused(score("in"), "animated.png", "holds 2 images", "--skip-bad-images")

    put(tmp_path / "in/sub/z.png")
    status, out, err = score("in", "--skip-bad-images")
    assert status == 0 and f"{len(reasons)} skipped" in out, err
    assert err.count("skipped: ") == len(reasons)
    listed = {row["image"]: row["reason"] for row in rows_of(run / "images/skipped.csv")}
    assert listed.keys() == reasons.keys()
    assert all(reasons[name] in reason for name, reason in listed.items())
    scored = [row["image"] for row in rows_of(run / "images/scores.csv")]
    assert scored == [os.path.join("sub", "z.png")]
    shutil.rmtree(tmp_path / "in/sub")
    assert_refused(score("in", "--skip-bad-images"), "none of", "10 images can be read")


def test_odd_images_are_scored_and_marked(run, score, tmp_path):
    expected = {
        "like.png": (PHOTO, ""),
        "gray.png": (PHOTO.convert("L"), "gray"),
        "pixel.png": (Image.new("RGB", (1, 1), "white"), "size 1×1, gray, brighter: 255"),
        "strip.png": (Image.new("RGB", (1, 3000), (255, 0, 0)), "size 1×3000, darker: 76"),
    }
    for name, (image, _) in expected.items():
        put(tmp_path / "in" / name, image)
    small = PHOTO.resize((25, 20))
    mpo = put(tmp_path / "in/mpo.jpg", format="MPO", save_all=True, append_images=[small])
    assert read_image(mpo).size == PHOTO.size
    cafe = tmp_path / os.fsdecode(b"in/caf\xe9.png")
    cafe.write_bytes((tmp_path / "in/like.png").read_bytes())
    status, out, err = score("in")
    assert status == 0 and "3 of 6 images are unlike the known normal images" in out, err
    rows = {row["image"]: row for row in rows_of(run / "images/scores.csv")}
    for name, (_, words) in expected.items():
        assert rows[name]["unlike_training"] == words
    assert rows["caf\\udce9.png"]["score"] == rows["like.png"]["score"]  # a name that is not UTF-8
    assert all(np.isfinite(float(row["score"])) for row in rows.values())
    assert Image.open(run / "images/overlays/strip.png.png").height < 1100  # not 256 × 3000
    assert "expect at most 33 % false alarms on normal images" in out


def test_folders_that_cannot_be_used(tmp_path, run_script, run):
    put(tmp_path / "mine/images/overlays/x.png")
    for command, words in (
        (("--images", "nowhere"), ("nowhere", "no such folder")),
        (("--images", "run/model.pt"), ("model.pt", "is a file, not a folder")),
        (("--images", "run/images/overlays"), ("images: overlays would lie among",)),
        (("--images", ""), ("images: overlays would lie among the images; choose another --out",)),
        (("--images", "a", "--accept", "a"), ("--images and --accept: give one",)),
        (("--accept", "nowhere"), ("nowhere", "no such folder")),
        (("--yes",), ("--yes goes with --accept",)),
        (("--accept", "a", "--out", "o"), ("--out goes without --accept",)),
        (("--images", "a", "--out", "mine"), ("mine: holds pictures of another program",)),
    ):
        assert_refused(run_script("evaluate.py", "--run", run, *CPU, *command), *words)
    assert files(run).keys() <= {"model.pt", ".lock"}
    put(tmp_path / "a/x.png")
    (tmp_path / "a/round").symlink_to(tmp_path / "a")  # a loop
    put(tmp_path / "far/y.png")
    (tmp_path / "a/linked").symlink_to(tmp_path / "far")
    found = [p.name for p in list_images(tmp_path / "a", recursive=True)]
    assert found == ["y.png", "x.png"]  # each once


def test_folders_that_a_file_manager_has_looked_at(tmp_path):
    for name in (".lock", "log.jsonl", ".DS_Store", "Thumbs.db"):
        put(tmp_path / name, b"")
        assert not holds_results(tmp_path)
    put(tmp_path / "model.pt", b"")
    assert holds_results(tmp_path)


def too_little(*_, **__):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


@pytest.mark.parametrize("fail", [too_little, partial(torch.empty, 2**50)])
def test_too_little_memory(fail, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(fail, "train.py")
    assert_refused((2, "", capsys.readouterr().err), "too little memory; take smaller images")


def test_too_little_memory_is_no_damage(run_script, tiny_demo, interrupt_at, monkeypatch):
    command = ("train.py", "--data", tiny_demo, "--steps", 2, *TINY, "--out", "r")
    with interrupt_at(1):
        assert run_script(*command)[0] == 130
    for place in ("torch.load", "torch.nn.Module.load_state_dict"):
        with monkeypatch.context() as patch:
            patch.setattr(place, too_little)
            assert_refused(run_script("train.py", "--resume", "r"), "train.py: too little memory")
    monkeypatch.setattr("PIL.Image.Image.convert", Mock(side_effect=MemoryError))
    assert_refused(run_script(*command[:-2], "--skip-bad-images"), "train.py: too little memory")


def test_other_ends(capsys, monkeypatch):
    """Ctrl-C outside the steps; a bug, which keeps its traceback."""
    with pytest.raises(SystemExit, match="130"):
        run_command(Mock(side_effect=KeyboardInterrupt), "train.py")
    assert capsys.readouterr().err == "\ntrain.py: interrupted\n"
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_command(Mock(side_effect=RuntimeError("shapes differ")), "train.py")
    monkeypatch.setattr(sys, "stdout", None)  # closed by the shell
    run_command(main := Mock(), "train.py")
    main.assert_called_once()


def test_unreadable_permissions():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders keep other users out
        folder = Path(name)
        secret, locked = put(folder / "in/secret.png"), put(folder / "in/locked/a.png").parent
        write_checkpoint({}, folder / "model.pt")
        folder.chmod(0o755)
        for path in (secret, locked, folder / "model.pt"):
            path.chmod(0)
        denied = "Permission denied"
        try:
            if os.geteuid() == 0:
                os.seteuid(65534)  # root may read everything
            with pytest.raises(DataError, match=f"secret.png: cannot be read .{denied}"):
                read_image(secret)
            with pytest.raises(DataError, match=f"locked: cannot be read .{denied}"):
                list_images(folder / "in", recursive=True)
            assert list_categories(folder / "in") == []  # nor does it stop a collection
            with pytest.raises(ModelError, match="model.pt: cannot be read"):
                read_checkpoint(folder / "model.pt")
            with pytest.raises(ModelError, match=f"other.pt: cannot be written .{denied}"):
                write_checkpoint({}, folder / "other.pt")
        finally:
            os.seteuid(os.getuid())
        locked.chmod(0o755)


# ---------------------------------------------------------------------------------------- data sets


def test_data_sets_that_cannot_be_trained_on(tmp_path, run_script, monkeypatch):
    for i in range(4):
        put(tmp_path / f"above/mvtec/part/train/good/{i}.png")
        put(tmp_path / f"above/mvtec/other/train/good/{i}.png")
        put(tmp_path / f"broken/train/good/{i}.png", b"junk" if i == 2 else PHOTO)
        put(tmp_path / f"checked/train/good/{i}.png")
    put(tmp_path / "above/mvtec/part/test/good/0.png")
    put(tmp_path / "above/mvtec/part/test/dent/0.png")
    put(tmp_path / "checked/validation/good/0.png", b"")
    put(tmp_path / "lonely/train/good/0.png")
    put(tmp_path / "scored/runs/own-small/overlays/0.png")
    put(tmp_path / "scored/0.png")
    names = "DAGM/Train/0 named/train/ok/0 unnamed/train/2/0 marked/0 marked/0_GT mixed/OK/0"
    for name in [*names.split(), "mixed/1"]:
        put(tmp_path / f"{name}.png")
    (tmp_path / "bare/train/good").mkdir(parents=True)
    put(tmp_path / "file", b"mine")
    (tmp_path / "used").mkdir()
    put(tmp_path / "used/notes.txt", b"mine")
    part, before = "above/mvtec/part", files(tmp_path)
    for options, *words in (
        (("--data", f"{part}/train"), "part/train/good/0.png: lies in a part of a data set"),
        (("--data", f"{part}/test/dent"), "lies in a part of a data set", "train/good"),
        (("--data", "above"), "lies in a part of a data set"),
        (("--data", "DAGM"), "Train/0.png: lies in a part of a data set", "normal images alone"),
        (("--data", "mixed"), "mixed/OK/0.png: lies in a part of a data set"),
        (("--data", "marked"), "marked/0_GT.png: may be a mask of 0.png"),
        (("--data", "scored"), "overlays/0.png: lies in a part of a data set"),
        (("--data", "named"), "named/train/ok: the folder of normal images has the name good"),
        (("--data", "unnamed"), "unnamed: its normal images belong into train/good"),
        (("--data", "bare"), "bare/train/good: no images"),
        (("--data", "lonely"), "lonely: only 1 normal image"),
        (("--data", "broken"), "2.png: not an image", "--skip-bad-images"),
        (("--data", "checked"), "validation/good/0.png", "--skip-bad-images"),
        (("--data", "checked", "--skip-bad-images"), "none of 1 images can be read", "0.png"),
        (("--data", part, "--pretraining-images", "bare"), "bare: no images"),
        (("--data", part, "--teacher", "none.pt"), "none.pt: no such teacher; make one with"),
        (("--data", part, "--out", "file"), "file: exists"),
        (("--data", part, "--out", "used"), "used: exists"),
        (("--data", part, "--out", "file/below"), "Not a directory: 'file/below'"),
        (("--image-size", "100"), "multiples of 32"),
        (("--image-size", 128, 192, 256), "--image-size takes H W or one number, got 3"),
        (("--steps", "0"), "--steps >= 1"),
        (("--device", "abacus"), "--device abacus: torch cannot use it"),
        (("--device", "meta"), "--device meta: torch cannot use it"),
        (("--device", "hpu"), "--device hpu: torch cannot use it"),  # a module that is missing
        (("--a", "0.9", "--b", "0.8"), "--a < --b"),
        (("--lr", "inf"), "--lr > 0"),
        (("--checkpoint-every", "nan"), "--checkpoint-every >= 0"),
        (("--map-normalization", "gaussian", "--a", 0.5), "--a and --b belong to"),
        (("--resume", "used"), "with it go --device, --skip-bad-images and, if"),
    ):
        command = ("train.py", *TINY, "--steps", 1, *options)
        assert_refused(run_script(*command), *words)
    after = files(tmp_path)
    assert {p: c for p, c in after.items() if not p.endswith(".lock")} == before
    command = ("train.py", *TINY, "--data", part, "--steps", 1)
    with monkeypatch.context() as patch:  # as on a medium that can be read alone
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        patch.setattr("train.load_normal_images", None)  # it is found before images are decoded
        words = "cannot be written; name another folder with --out"
        assert_refused(run_script(*command), f"{tmp_path}: {words}")
        (tmp_path / "empty").mkdir()
        assert_refused(run_script(*command, "--out", "empty"), f"empty: {words}")
    put(tmp_path / "runs", b"mine")
    assert_refused(run_script(*command), "Not a directory: 'runs/part-small'")
    assert_refused(run_script("evaluate.py", "--run", "file"), "file/model.pt: no such file")


def test_bad_images_are_left_out_of_training(tmp_path, run_script):
    for i in range(4):
        put(tmp_path / f"part/train/good/{i}.png", b"junk" if i == 2 else PHOTO)
        put(tmp_path / f"photos/{i}.png", b"" if i else PHOTO)
    put(tmp_path / "part/validation/good/0.png")
    options = ("--steps", 2, *TINY, "--pretraining-images", "photos", "--skip-bad-images")
    command = ("train.py", "--data", "part", *options, "--out", "o")
    status, _, err = run_script(*command)
    assert status == 0 and "skipped: part/train/good/2.png: not an image" in err, err
    assert "3 training and 1 validation" in err
    info = load_model(tmp_path / "o/model.pt", EfficientAD).training_info
    assert info["training_images"] == 3 and info["appearance"]["width"] == [50, 50]
    skipped = info["skipped_images"]
    assert (tmp_path / "o/skipped.txt").read_text().splitlines() == skipped
    assert "part/train/good/2.png" in skipped[0] and "photos/" in skipped[-1]
    put(tmp_path / "part/train/good/2.png")
    command = ("train.py", "--data", "part", *options[:-1], "--out", "cut")
    assert_refused(run_script(*command), "photos/", "or leave such files out")
    assert run_script("train.py", "--resume", "cut", "--skip-bad-images")[0] == 0


def test_masks_that_cannot_be_used(tmp_path, run, run_script):
    for name in ("train/good/0", "test/good/0", "test/dent/0", "test/dent/1"):
        put(tmp_path / f"part/{name}.png")
    truth, white = tmp_path / "part/ground_truth", Image.new("L", PHOTO.size, 255)
    masks = [put(truth / f"dent/{i}_mask.png", white) for i in range(2)]
    command = ("evaluate.py", "--run", run, "--data", "part", *CPU)
    for content, *words in (
        (Image.new("L", (8, 8), 255), "1_mask.png: mask of 8×8 for an image of 50×40"),
        (Image.new("L", PHOTO.size), "1_mask.png: the mask of a defect is empty"),
        (b"junk", "1_mask.png: not an image"),
        (None, "dent/1.png: its mask", "1_mask.png is missing"),
    ):
        put(masks[1], content) if content else masks[1].unlink()
        assert_refused(run_script(*command), *words)
    assert not list(run.rglob("results.json"))
    put(masks[1], white)
    wrong = put(truth / "good/0_mask.png", white)
    message = "good/0_mask.png: marks a defect in an image of test/good"
    assert_refused(run_script(*command), message)
    put(wrong, Image.new("L", PHOTO.size))  # all black is harmless
    double = put(tmp_path / "part/test/dent/1.jpg")
    assert_refused(run_script(*command), "1.png: has the name of", "1.jpg; rename one")
    double.unlink()
    assert run_script(*command)[0] == 0 and list(run.rglob("results.json"))


def test_damaged_tables_of_data_sets(tmp_path):
    put(tmp_path / "VisA/candle/Data/Images/Normal/0.png")
    (tmp_path / "VisA/split_csv/1cls.csv").mkdir(parents=True)
    with pytest.raises(DataError, match="1cls.csv: missing"):
        open_category(tmp_path / "VisA/candle")
    (tmp_path / "VisA/split_csv/1cls.csv").rmdir()
    short, lacking = b"object,split,label,image,mask\ncandle\n", b"object,split\ncandle,train\n"
    for content in (b"\xff\xfe", lacking, short, b"a\x00b\n1\n"):
        put(tmp_path / "VisA/split_csv/1cls.csv", content)
        with pytest.raises(DataError, match="1cls.csv"):
            open_category(tmp_path / "VisA/candle")
    loco = tmp_path / "loco"
    put(loco / "train/good/0.png")
    put(loco / "test/logical/0.png")
    put(loco / "ground_truth/logical/0/0.png", Image.new("L", PHOTO.size, 255))
    entry = b'[{"pixel_value": 255, "saturation_threshold": %b, "relative_saturation": %b}]'
    values = ((b"NaN", b"true"), (b"1e-9", b"true"), (b"-1", b"false"), (b'"x"', b"true"))
    for content in (b"{}", b"[1]", b"[{}]", b"[" * 10000, *(entry % pair for pair in values)):
        put(loco / "defects_config.json", content)
        category = open_category(loco)
        with pytest.raises(DataError, match="defects_config.json"):
            category.regions(category.test[0], PHOTO.size[::-1])


# -------------------------------------------------------------------------------------- checkpoints


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoints_that_cannot_be_used(model, run, run_script, tmp_path):
    path = run / "model.pt"
    whole, state, victim = path.read_bytes(), model.state_dict(), tmp_path / "executed"
    good = model.checkpoint()
    missing = {k: v for k, v in state.items() if k != "quantiles"}
    weight = state["student.8.weight"].numpy().tobytes()[:64]
    assert whole.count(weight) == 1
    nan, inf = torch.full((128,), torch.nan), torch.full((1, CHANNELS, 1, 1), torch.inf)
    command = ("evaluate.py", "--run", run, "--images", ROOT / "docs", *CPU)
    for content, words in (
        (whole[: len(whole) // 2], "not a readable checkpoint"),
        (whole.replace(weight, weight[::-1]), "not a readable checkpoint"),
        (good | {"training": Exploit(str(victim))}, "not a readable checkpoint"),
        (torch.zeros(3), "not a checkpoint of this program"),
        (state, "not a model of this program"),
        (good | {"config": model.config | {"image_size": (160, 128)}}, "damaged model file"),
        (good | {"config": model.config | {"size": "large"}}, "damaged model file"),
        (good | {"state": missing}, "damaged model file"),
        (good | {"state": state | {"student.0.bias": nan}}, "not a number"),
        (good | {"state": state | {"teacher_std": inf}}, "not a number"),
        (good | {"state": state | {"threshold": torch.tensor(torch.nan)}}, "not calibrated"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert_refused(run_script(*command), "model.pt", words)

    for i in range(2):
        put(tmp_path / f"part/train/good/{i}.png")
    for weights, words in (
        (PDN("medium").state_dict(), "not a small teacher; pass one that `python -m tools.distill"),
        (PDN().state_dict() | {"0.bias": nan}, "not finite"),
        ({"0.weight": 1}, "not a small teacher"),
        (Exploit(str(victim)), "not a readable"),
    ):
        torch.save(weights, tmp_path / "t.pt")
        options = (*TINY, "--steps", 1, "--teacher", "t.pt", "--out", "new")
        assert_refused(run_script("train.py", "--data", "part", *options), "t.pt", words)
    assert not victim.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", ["small", "medium"])
def test_teacher_files_in_both_published_layouts(size, tmp_path):
    state = PDN(size).half().state_dict()
    layers = list(dict.fromkeys(k.split(".")[0] for k in state))
    names = {layer: f"conv{i}" for i, layer in enumerate(layers, 1)}
    renamed = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in state.items()}
    for content in (state, renamed):
        torch.save(content, tmp_path / "t.pt")
        teacher = PDN(size)
        load_teacher(teacher, size, tmp_path / "t.pt")
        for weight, expected in zip(teacher.parameters(), state.values()):
            assert torch.equal(weight, expected.float())
    load_teacher(teacher, size, ROOT / f"weights/teacher_{size}.pt")  # the bundled one


def test_models_of_earlier_versions_load(model, tmp_path):
    checkpoint = model.checkpoint()
    training = {"usual" if k == "appearance" else k: v for k, v in model.training_info.items()}
    torch.save(checkpoint | {"training": training}, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt", EfficientAD).training_info == model.training_info


def test_training_states_that_cannot_be_resumed(model, run_script, tmp_path):
    (tmp_path / "cut").mkdir()
    for i in range(2):
        put(tmp_path / f"part/train/good/{i}.png")
    options = {"device": "cpu", "data": "part", "image_size": [128, 128], "steps": 2}
    options["pretraining_images"] = "none"
    names = {"data": fingerprint(sum(open_category("part").split(0), []), "part")}
    good = {"format": "run", "options": options, "step": 1, "seconds": 0.0, "files": names}
    good |= {"model": model.state_dict(), "errors": {}, "optimizers": [{}]}
    path = tmp_path / "cut/resume.pt"
    for content, words in (
        (b"half", "not a readable checkpoint"),
        ({"format": "other", "options": {}}, "of another program or an earlier version"),
        (good | {"options": {"device": "abacus"}}, "--device abacus: torch cannot use it"),
        (good | {"command": "other"}, "a run of another kind; go on with: other --resume cut"),
        (good | {"model": PDN().state_dict()}, "damaged, or of another model"),
        ({k: v for k, v in good.items() if k != "step"}, "damaged, or of another model"),
        (good, "damaged, or of another model"),  # its optimizer
        (good | {"errors": ["x"]}, "damaged, or of another model"),
        (good | {"files": {"data": 1}}, "part: has other images than when the run began"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        assert_refused(run_script("train.py", "--resume", "cut"), words)
        assert path.read_bytes() == before
    path.unlink()
    model.save(str(tmp_path / "cut/model.pt"))
    assert_refused(run_script("train.py", "--resume", "cut"), "this run is complete")
    assert_refused(run_script("train.py", "--resume", "none"), "resume.pt: no such file")
