"""The real scripts, run tiny."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import evaluate
import train
from backbone import ResNet
from data import open_category
from efficientad import PDN, EfficientAD, read_checkpoint
from metrics import image_auroc


@pytest.fixture(scope="module")
def run(tiny_demo, teacher, tmp_path_factory):
    """A finished run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "first"
    options = ["--data", tiny_demo, "--out", folder, "--steps", 3, "--seed", 5, *TINY, "--teacher", teacher]
    assert train.main(list(map(str, options))) == folder
    return folder


def states_equal(a, b) -> bool:
    a, b = (torch.load(path, weights_only=True)["state"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------------- train


def test_run_folder(run):
    assert sorted(p.name for p in run.iterdir()) == [".lock", "log.jsonl", "model.pt"]
    model = EfficientAD.load(str(run / "model.pt"))
    assert model.threshold.isfinite() and (model.quantiles[:, 1] > model.quantiles[:, 0]).all()
    assert model.training_info["steps"] == 3 and model.training_info["validation_images"] == 2
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [0, 2]
    assert {"hard", "autoencoder", "student_autoencoder", "lr"} <= entries[0].keys() and "penalty" not in entries[0]


def test_same_seed_same_model_and_other_seed_another(run, tiny_demo, teacher, run_script, tmp_path):
    for seed in (5, 6):
        options = ("--data", tiny_demo, "--out", f"s{seed}", "--steps", 3, "--seed", seed, *TINY, "--teacher", teacher)
        assert run_script("train.py", *options)[0] == 0
    assert states_equal(run / "model.pt", tmp_path / "s5/model.pt")
    assert not states_equal(run / "model.pt", tmp_path / "s6/model.pt")


def test_interrupted_and_resumed_equals_uninterrupted(tiny_demo, teacher, tmp_path):
    """Ctrl-C at an arbitrary moment, in a process of its own; with photos, so that every random choice is covered."""
    program = [sys.executable, str(ROOT / "train.py")]
    options = ["--data", tiny_demo, "--steps", 12, "--image-size", 128, "--device", "cpu"]
    options = [*map(str, options), "--teacher", teacher]
    subprocess.run([*program, *options, "--out", "whole"], cwd=tmp_path, check=True, capture_output=True)

    process = subprocess.Popen([*program, *options, "--out", "cut"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "cut/log.jsonl", time.time() + 120
    while not (log.exists() and log.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume cut" in errors and "Traceback" not in errors
    step = read_checkpoint(str(tmp_path / "cut/resume.pt"))["step"]
    assert 0 < step < 12 and not (tmp_path / "cut/model.pt").exists()

    result = subprocess.run([*program, "--resume", "cut"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert states_equal(tmp_path / "whole/model.pt", tmp_path / "cut/model.pt")
    assert not (tmp_path / "cut/resume.pt").exists()


def test_second_run_gets_its_own_folder(tiny_demo, teacher, run_script, tmp_path):
    for _ in range(2):
        status, out, _ = run_script("train.py", "--data", tiny_demo, "--steps", 1, *TINY, "--teacher", teacher)
        assert status == 0 and "wrote" in out
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tiny-small", "tiny-small-2"]


def test_medium_padded_gaussian_any_shape(tiny_demo, run_script, tmp_path):
    torch.save({k: v.half() for k, v in PDN("medium").state_dict().items()}, tmp_path / "teacher.pt")
    options = ("--size", "medium", "--padding", "--map-normalization", "gaussian", "--p-hard", 0, "--batch-size", 2)
    shape = ("--image-size", 128, 160, "--steps", 1, "--device", "cpu", "--teacher", "teacher.pt")
    assert run_script("train.py", "--data", tiny_demo, *options, *shape)[0] == 0
    status, out, err = run_script("evaluate.py")
    assert status == 0 and "structural" in out, err


def test_learning_rate_drops_at_95_percent(tiny_demo, teacher, run_script, tmp_path):
    run_script("train.py", "--data", tiny_demo, "--out", "o", "--steps", 21, "--lr", 1e-5, *TINY, "--teacher", teacher)
    rates = {e["step"]: e["lr"] for e in map(json.loads, (tmp_path / "o/log.jsonl").read_text().splitlines())}
    assert rates == {0: 1e-5, 10: 1e-5, 20: pytest.approx(1e-6)}
    run_script("train.py", "--data", tiny_demo, "--out", "p", "--steps", 11, "--lr", 1e-5, *TINY, "--teacher", teacher)
    assert json.loads((tmp_path / "p/log.jsonl").read_text().splitlines()[-1])["lr"] == pytest.approx(1e-6)  # from step 10 on


def test_bad_options_and_files_get_one_line(tiny_demo, teacher, run_script, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    cases = [
        (("--data", "nowhere"), "nowhere: no such folder"),
        (("--data", "empty"), "empty: no images"),
        (("--data", tiny_demo, "--teacher", "none.pt"), "none.pt: no such teacher; make one with"),
        (("--data", tiny_demo, "--teacher", "junk.pt"), "junk.pt: not a readable checkpoint"),
        (("--data", tiny_demo, "--size", "medium", "--teacher", teacher), "not a medium teacher"),
        (("--data", tiny_demo, "--out", "used"), "used: exists"),
        (("--data", tiny_demo, "--image-size", "100"), "multiples of 32"),
        (("--data", tiny_demo, "--steps", "0"), "--steps >= 1"),
        (("--data", tiny_demo, "--seed", "-1"), "--seed >= 0"),
        (("--data", tiny_demo, "--seed", 2**32), "--seed >= 0 and < 2**32"),
        (("--data", tiny_demo, "--device", "abacus"), "--device abacus: torch cannot use it"),
        (("--data", tiny_demo, "--a", "0.9", "--b", "0.8"), "--a < --b"),
        (("--data", tiny_demo, "--pretraining-images", "empty"), "empty: no images"),
        (("--resume", "empty"), "resume.pt: no such file"),
        (("--resume", "empty", "--lr", "1"), "no other option"),
    ]
    for options, message in cases:
        extra = () if "--resume" in options or "--teacher" in options else ("--teacher", teacher)
        status, _, err = run_script("train.py", *options, *extra)
        assert status == 2 and message in err and "Traceback" not in err, (options, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "junk.pt", "used"]  # nothing was written


def test_resume_of_a_finished_run(run, run_script):
    status, _, err = run_script("train.py", "--resume", run)
    assert status == 2 and "this run is complete" in err


def test_augmentation():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    _, factor, kind = train.draw(64)
    jittered = train.augment(images, factor, kind)
    assert jittered.shape == images.shape and 0 <= jittered.min() and jittered.max() <= 1
    x = images.float() / 255
    gray, kinds = train.luma(x), set()
    for i in range(64):
        inside = (jittered[i] > 0) & (jittered[i] < 1)
        for kind, reference in enumerate((torch.zeros(1, 1, 1), gray[i].mean(), gray[i].expand(3, 8, 8))):
            direction = (x[i] - reference)[inside]
            factor = ((jittered[i] - reference)[inside] * direction).sum() / direction.square().sum()
            if ((jittered[i] - reference)[inside] - factor * direction).abs().max() < 1e-5:
                kinds.add(kind)
                assert 0.8 - 1e-4 <= factor <= 1.2 + 1e-4
                break
        else:
            raise AssertionError("neither brightness nor contrast nor saturation")
    assert kinds == {0, 1, 2}
    photos = train.turn_gray(torch.randint(0, 256, (2000, 3, 2, 2), dtype=torch.uint8), train.draw(2000)[0])
    share = (photos[:, 0] == photos[:, 1]).all(-1).all(-1).float().mean()
    assert 0.25 < share < 0.35


def test_every_epoch_visits_every_image_once():
    images = [np.full((3, 1, 1), i, np.uint8) for i in range(5)]
    epochs = [tuple(int(train.shuffled(images, step, 1, 0)[0, 0, 0, 0]) for step in range(e * 5, e * 5 + 5)) for e in range(4)]
    assert all(sorted(e) == [0, 1, 2, 3, 4] for e in epochs) and len(set(epochs)) > 1
    batch = train.shuffled(images, 1, 2, 0)[:, 0, 0, 0].tolist()
    assert batch == list(epochs[0][2:4])


# ---------------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate(run, run_script, tiny_demo):
    status, out, err = run_script("evaluate.py", "--run", run, "--tiff", "--device", "cpu")
    assert status == 0, err
    results = json.loads((run / "results.json").read_text())
    types = results["types"]
    assert set(types) == {"logical_anomalies", "structural_anomalies"}
    assert results["image_auroc"] == pytest.approx(np.mean([t["image_auroc"] for t in types.values()]))  # LOCO: not pooled
    assert 0 <= results["au_spro"] == pytest.approx(np.mean([t["au_spro_by_limit"]["0.05"] for t in types.values()]))
    assert "| overall" in out and f"{100 * results['image_auroc']:.1f}" in out
    rows = list(csv.DictReader((run / "scores.csv").open()))
    assert len(rows) == 9 and {r["defect"] for r in rows} == {"good", *types}

    model = EfficientAD.load(str(run / "model.pt"))
    image = np.asarray(Image.open(tiny_demo / "test/good/001.png").resize((128, 128), Image.Resampling.BILINEAR))
    with torch.no_grad():
        anomaly_map, score = model(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    row = next(r for r in rows if r["image"] == "good/001")
    assert float(row["score"]) == pytest.approx(score.item(), abs=1e-5)
    assert int(row["anomalous"]) == int(score > model.threshold)

    tiff = np.asarray(Image.open(run / "anomaly_maps/tiny/test/good/001.tiff"))
    assert tiff.dtype == np.float32 and tiff.shape == (256, 256)
    small = np.asarray(Image.fromarray(tiff).resize((128, 128), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), anomaly_map[0, 0].numpy().ravel())[0, 1] > 0.99
    assert Image.open(run / "overlays/logical_anomalies/002.png").size == (5 * 260 - 4, 274)
    assert len(list((run / "overlays").rglob("*.png"))) == 9
    html = (run / "report.html").read_text(encoding="utf-8")
    content = json.loads(html.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    assert len(content["images"]) == 9 and sum("outline" in i for i in content["images"]) == 6
    assert all(i[key].startswith("data:image/") for i in content["images"] for key in ("input", "combined", "local", "global"))
    assert "http" not in (ROOT / "assets/report.html").read_text() and "@DATA@" not in html  # opens from disk, fetches nothing
    assert not list(run.rglob("*.tmp*"))


@pytest.mark.parametrize("masks", [True, False])
def test_evaluate_mvtec_layout(masks, run, run_script, tiny_demo, tmp_path):
    """Types pooled for the overall row, AU-PRO; and a set without masks."""
    for i, name in enumerate(("good/0", "good/1", "scratch/0", "dent/0", "dent/1")):
        image = tmp_path / f"part/test/{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        source = "good" if i < 2 else "structural_anomalies"
        image.write_bytes((tiny_demo / f"test/{source}/{i % 3:03d}.png").read_bytes())
        mask = tmp_path / f"part/ground_truth/{name}_mask.png"
        if masks and i > 1:
            mask.parent.mkdir(parents=True, exist_ok=True)
            mask.write_bytes((tiny_demo / f"ground_truth/structural_anomalies/{i % 3:03d}/000.png").read_bytes())
    (tmp_path / "part/train/good").mkdir(parents=True)
    (tmp_path / "part/train/good/0.png").write_bytes(image.read_bytes())
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/model.pt").write_bytes((run / "model.pt").read_bytes())
    status, _, err = run_script("evaluate.py", "--run", "copy", "--data", "part", "--device", "cpu")
    assert status == 0, err
    results = json.loads((tmp_path / "copy/results.json").read_text())
    assert set(results["types"]) == {"scratch", "dent"} and results["images"] == 3 and results["good_images"] == 2
    weighted = (results["types"]["scratch"]["image_auroc"] + 2 * results["types"]["dent"]["image_auroc"]) / 3
    assert results["image_auroc"] == pytest.approx(weighted)  # pooled
    assert ("au_pro" in results) == masks == ("pixel_auroc" in results)
    assert not masks or 0 <= results["au_pro"] == results["au_pro_by_limit"]["0.3"] <= 1


def test_models_that_cannot_be_evaluated(run_script, tmp_path, tiny_demo):
    (tmp_path / "raw").mkdir()
    model = EfficientAD(image_size=(128, 128))
    model.save(str(tmp_path / "raw/model.pt"))
    status, _, err = run_script("evaluate.py", "--run", "raw", "--data", tiny_demo)
    assert status == 2 and "not calibrated" in err and "Traceback" not in err
    model.threshold.fill_(1.0)
    model.save(str(tmp_path / "raw/model.pt"))
    status, _, err = run_script("evaluate.py", "--run", "raw")
    assert status == 2 and "name the category with --data" in err and "Traceback" not in err


def test_resume_on_a_machine_without_the_device(run_script, tmp_path):
    (tmp_path / "far").mkdir()
    torch.save({"format": "efficientad-resume", "options": {"device": "abacus"}}, tmp_path / "far/resume.pt")
    status, _, err = run_script("train.py", "--resume", "far")
    assert status == 2 and "--device abacus: torch cannot use it" in err


def test_score_a_folder(run, run_script, tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "in/a.png")
    Image.new("L", (300, 200)).save(tmp_path / "in/sub/a.jpg")
    status, out, err = run_script("evaluate.py", "--run", run, "--images", "in", "--device", "cpu")
    assert status == 0 and "of 2 images above the threshold" in out, err
    rows = list(csv.DictReader((run / "images/scores.csv").open()))
    assert [r["image"] for r in rows] == ["a.png", os.path.join("sub", "a.jpg")]
    assert Image.open(run / "images/overlays/a.png.png").size[0] == 4 * 260 - 4  # no mask
    assert rows[0]["score"] != rows[1]["score"]


def test_evaluate_takes_the_newest_run_and_explains_itself(run, run_script, tmp_path, tiny_demo):
    status, _, err = run_script("evaluate.py")
    assert status == 2 and "no trained model; run train.py first" in err
    status, _, err = run_script("evaluate.py", "--run", "nowhere")
    assert status == 2 and "model.pt: no such file" in err
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos/a.png")
    status, _, err = run_script("evaluate.py", "--run", run, "--data", "photos")
    assert status == 2 and "score a folder with --images" in err and "Traceback" not in err
    for i, name in enumerate(("old", "new")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.pt").write_bytes((run / "model.pt").read_bytes())
        os.utime(tmp_path / "runs" / name / "model.pt", (1e9 + i, 1e9 + i))
    assert run_script("evaluate.py", "--device", "cpu")[0] == 0
    assert (tmp_path / "runs/new/results.json").exists() and not (tmp_path / "runs/old/results.json").exists()


# ----------------------------------------------------------------------------------------------------------------- distill


@pytest.fixture
def photos(tmp_path):
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "photos").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(tmp_path / f"photos/{i}.png")
    return ("--images", "photos", "--backbone", "resnet18", "--backbone-weights", "resnet18.pth", "--image-size", 64,
            "--steps", 8, "--batch-size", 2, "--lr", 1e-3, "--device", "cpu")  # fmt: skip


def test_distill_makes_a_teacher(photos, run_script, tmp_path, tiny_demo):
    status, out, err = run_script("distill.py", *photos, "--out", "teacher.pt")
    assert status == 0 and "wrote teacher.pt" in out, err
    state = torch.load(tmp_path / "teacher.pt", weights_only=True)
    assert all(v.dtype == torch.float16 for v in state.values())
    log = [json.loads(line) for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    assert log[-2]["loss"] < log[0]["loss"]  # whitened targets: an untrained network starts near 1
    assert run_script("train.py", "--data", tiny_demo, "--steps", 1, *TINY, "--teacher", "teacher.pt")[0] == 0
    status, _, err = run_script("distill.py", *photos, "--out", "teacher.pt")
    assert status == 2 and "teacher.pt exists" in err


@pytest.mark.parametrize("options", [("--crops", 0.2, 0.9), ("--views", 2), ()])
def test_distill_resumed_equals_uninterrupted(options, photos, run_script, tmp_path, interrupt_at):
    assert run_script("distill.py", *photos, *options, "--out", "whole.pt", "--checkpoint-every", 3)[0] == 0
    with interrupt_at(5):
        status, _, err = run_script("distill.py", *photos, *options, "--out", "cut.pt")
    assert status == 130 and "--resume" in err and not (tmp_path / "cut.pt").exists()
    status, _, err = run_script("distill.py", *photos, *options, "--out", "cut.pt", "--seed", 1, "--resume")
    assert status == 2 and "made with other options" in err
    shutil.copy(tmp_path / "photos/0.png", tmp_path / "photos/9.png")
    status, _, err = run_script("distill.py", *photos, *options, "--out", "cut.pt", "--resume")
    assert status == 2 and "photos: other photos than when the run began; put them back, or remove cut.pt.resume" in err
    (tmp_path / "photos/9.png").unlink()
    assert run_script("distill.py", *photos, *options, "--out", "cut.pt", "--resume")[0] == 0
    whole, cut = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "cut.pt"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert not (tmp_path / "cut.pt.resume").exists()


def test_distill_errors(photos, run_script, tmp_path):
    for options, message in (
        (("--backbone-weights", "none.pth"), "none.pth: no such file"),
        (("--backbone", "resnet34"), "not the weights of resnet34"),
        (("--images", "nowhere"), "nowhere: no such folder"),
        (("--crops", "0.5", "0.2"), "0 < MIN <= MAX <= 1"),
        (("--lr", "-1"), "--lr > 0"),
        (("--seed", "-1"), "--seed >= 0"),
        (("--seed", 2**32), "--seed >= 0 and < 2**32"),
    ):
        status, _, err = run_script("distill.py", *photos, *options)
        assert status == 2 and message in err and "Traceback" not in err, err


def test_benchmark_compares_the_fast_form(run, run_script, tmp_path):
    status, out, err = run_script("benchmark.py", "--accuracy", run, "--device", "cpu", "--json", "figures.json")
    assert status == 0 and "against eager fp32" in out, err
    figures = json.loads((tmp_path / "figures.json").read_text())["accuracy"]
    model = evaluate.load(run, torch.device("cpu"))
    samples = open_category(model.training_info["data"]).test
    scores = np.array([evaluate.predict(model, s.path)[2]["combined"] for s in samples])
    good = np.array([s.defect == "good" for s in samples])
    assert figures["image_auroc"] == image_auroc(scores[good], scores[~good]) and figures["images"] == 9 and figures["pairs"] == 36
    assert figures["map_error_mean"] <= figures["map_error_max"] < 0.05 and figures["score_error_max"] < 0.1
    assert figures["pairs_in_other_order"] <= 3 and abs(figures["image_auroc_fast"] - figures["image_auroc"]) < 0.2
    status, _, err = run_script("benchmark.py", "--accuracy", "nowhere")
    assert status == 2 and err == "benchmark.py: nowhere/model.pt: no such file\n"
