"""evaluate.py --images and --accept: images without labels."""

import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU, PHOTO, assert_refused, content_of, files, pictures, put, rows_of
from PIL import Image

import evaluate
from efficientad import EfficientAD, ModelError
from support.appearance import appearance_of
from support.images import list_images, read_image, to_array


def test_score_a_folder(run, run_script, tmp_path):
    put(tmp_path / "in/a.png", Image.new("RGB", (50, 40), "red"))
    put(tmp_path / "in/sub/a.jpg", Image.new("L", (300, 200)))
    longest = 251 * "n" + ".png"
    put(tmp_path / "in" / longest, Image.new("L", (30, 20)))  # its overlay needs a shorter name
    for name in ("b.gif", "sub/c.heic", "sub/noend", ".hidden/d.txt"):
        put(tmp_path / "in" / name, b"x")
    command = ("evaluate.py", "--run", run, "--images")
    status, out, err = run_script(*command, "in", *CPU)
    assert status == 0 and "of 3 images above the threshold" in out and "3 skipped" in out, err
    rows = rows_of(run / "images/scores.csv")
    assert [row["image"] for row in rows] == ["a.png", longest, os.path.join("sub", "a.jpg")]
    assert rows[0]["score"] != rows[1]["score"]
    skipped = [row["image"] for row in rows_of(run / "images/skipped.csv")]
    assert skipped == ["b.gif", os.path.join("sub", "c.heic"), os.path.join("sub", "noend")]
    assert Image.open(run / "images/overlays/a.png.png").size[0] == 4 * 260 - 4  # no mask

    put(tmp_path / "other/b.png")
    put(tmp_path / "other/z.png", b"damaged")
    before = (run / "images/scores.csv").read_bytes()
    assert_refused(run_script(*command, "other", *CPU), "z.png: not an image")
    first, long, last = pictures(run / "images")
    assert (first, last) == ("overlays/a.png.png", "overlays/sub/a.jpg.png")
    assert long.startswith("overlays/nnn") and len(long) < 100
    assert (run / "images/scores.csv").read_bytes() == before
    assert run_script(*command, "other", "--skip-bad-images", *CPU)[0] == 0
    assert pictures(run / "images") == ["overlays/b.png.png"]

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    put(tmp_path / "away/images/a.unfinished1", b"left by a killed process")
    others = put(tmp_path / "away/another/.lock", b"").with_name("resume.pt.unfinished1")
    put(others, b"being written")
    assert run_script(*command, "in", "--out", "away", *CPU)[0] == 0  # the run may be read-only
    assert others.exists() and not (tmp_path / "away/images/a.unfinished1").exists()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert rows_of(tmp_path / "away/images/scores.csv") == rows


def test_verdicts(model, run_script, tmp_path):
    """A black image is unlike the training images; scores are compared with known ones. What needs
    a look stands first in the report."""
    put(tmp_path / "in/a.png")
    put(tmp_path / "in/black.png", Image.new("RGB", PHOTO.size))
    checkpoint = model.checkpoint()
    command = ("evaluate.py", "--run", tmp_path / "r", "--images", "in", *CPU)
    (tmp_path / "r").mkdir()
    for known, rate, expected, p in (
        ([1e9] * 18 + [2e9], None, ["ok", "check"], 1),
        ([-9.0] * 19, None, ["check", "check"], 0.05),
        ([-9.0] * 19, "5%", ["reject", "reject"], 0.05),
        ([-9.0] * 18 + [1e9], "0.1", ["reject", "reject"], 0.1),
    ):
        checkpoint["training"] = model.training_info | {"scores": known}
        checkpoint["state"]["threshold"] = torch.tensor(max(known) if rate else 1e9)
        torch.save(checkpoint, tmp_path / "r/model.pt")
        options = ("--false-alarms", rate) if rate else ()
        status, out, err = run_script(*command, *options)
        rows = rows_of(tmp_path / "r/images/scores.csv")
        assert status == 0 and [row["verdict"] for row in rows] == expected, err
        assert [float(row["p_value"]) for row in rows] == [p, p]
        assert f"{expected.count('reject')} reject" in out
        page = content_of(tmp_path / "r/images/report.html")
        assert sorted(image["verdict"] for image in page["images"]) == sorted(expected)
        assert page["images"][0]["verdict"] != "ok" and page["images"][0]["p_value"] == p
        assert page["origin"] in out and page["table"][1][3] == page["images"][0]["verdict"]
    result = run_script(*command, "--false-alarms", "1%")
    assert_refused(result, "1 % false alarms need 99 normal images", "the model has 19")
    assert_refused(run_script(*command, "--false-alarms", "few"), "a share such as 1%, got few")


def test_recalibration_on_accepted_images(own, run_script, tmp_path, monkeypatch):
    """Good images become ok, the former model is kept; images of training and defects are refused,
    the latter unless confirmed."""
    model = EfficientAD.load(own / "model.pt")
    model.threshold.fill_(-9.0)
    model.training_info |= {"scores": [-9.2, -9.0], "p_hard": 0.99}
    model.training_info["appearance"]["trained_on"] = [appearance_of(PHOTO).fingerprint]
    model.save(own / "model.pt")
    former = (own / "model.pt").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(4):
        put(tmp_path / f"good/{i}.png", Image.fromarray(rng.integers(0, 99, (40, 50, 3), np.uint8)))
    command = ("evaluate.py", "--run", own, *CPU, "--accept", "good")
    assert_refused(run_script(*command), "0.png (", "like a defect", "--yes")
    assert files(own) == {"model.pt": former, ".lock": b""}
    scored = run_script(*command[:-2], "--images", "good")
    assert "than the known normal images: the threshold is not for them" in scored[1], scored[2]
    with monkeypatch.context() as patch:
        constant = ModelError("a map is constant")
        patch.setattr("support.recalibration.calibrate", Mock(side_effect=constant))
        assert_refused(run_script(*command, "--yes"), "a map is constant")
    assert [path.name for path in own.glob("*.pt")] == ["model.pt"]
    status, out, err = run_script(*command, "--yes")
    assert status == 0 and out.count("reject -> ok") == 4, err
    assert "4 of 4 verdicts change" in out and "expect at most 20 % false alarms" in out
    assert (own / "model-1.pt").read_bytes() == former

    new = evaluate.load_run(own, "cpu")
    info = new.training_info
    scores = [
        new(torch.from_numpy(to_array(read_image(p), (128, 128)))[None])[1].item()
        for p in list_images(tmp_path / "good")
    ]
    assert info["scores"] == pytest.approx(sorted(scores)) and info["p_hard"] == 0.99
    assert new.threshold.item() >= max(info["scores"]) and info["validation_images"] == 4
    assert info["appearance"]["width"] == [50, 50]
    for name in ("train/good/0", "test/good/0", "test/good/1", "test/dent/0"):
        put(tmp_path / f"part/{name}.png")
    shutil.copy(tmp_path / "good/0.png", tmp_path / "part/test/good/2.png")
    status, out, err = run_script(*command[:-2], "--data", "part")  # PHOTO was trained on
    assert status == 0 and "; 3 of these the model was trained or calibrated on" in out, err
    status, out, err = run_script(*command)  # once more: nothing is far above, nothing changes
    assert status == 0 and "0 of 4 verdicts change" in out and (own / "model-2.pt").exists(), err
    put(tmp_path / "good/known.png")
    before = files(own)
    assert_refused(run_script(*command, "--yes"), "known.png: the model was trained on it")
    put(tmp_path / "good/known.png", b"no image")
    assert_refused(run_script(*command), "known.png: not an image", "--skip-bad-images")
    assert files(own) == before
    assert run_script(*command, "--skip-bad-images")[0] == 0
