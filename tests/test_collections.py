"""Collections, seeds and ablations: the real scripts on tiny trees in MVTec LOCO's and VisA's layout."""

import argparse
import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch

import demo
import evaluate
import runs
import train
from data import DataError, list_categories, open_category
from demo import draw_demo_image
from efficientad import EfficientAD
from report import ABLATION, collection_rows, normalizations, spread, summarize_collection, summarize_runs

LOCO = {"train/good": 3, "validation/good": 1, "test/good": 2, "test/logical_anomalies": 2, "test/structural_anomalies": 2}


@pytest.fixture(scope="module")
def loco(tmp_path_factory):
    """A collection of two categories."""
    root = tmp_path_factory.mktemp("sets") / "loco"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_SPLITS", LOCO)
        for seed, name in enumerate(("pushpins", "screw_bag")):
            root.mkdir(exist_ok=True)
            demo.make_demo(root / name, seed)
    (root / "readme.txt").write_text("not a category")
    return root


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    """Two categories as VisA's download has them."""
    root = tmp_path_factory.mktemp("sets") / "visa"
    rows = [["object", "split", "label", "image", "mask"]]
    for c, name in enumerate(("candle", "pcb1")):
        for kind in ("Images/Normal", "Images/Anomaly", "Masks/Anomaly"):
            (root / name / "Data" / kind).mkdir(parents=True)
        for i, split in enumerate(["train"] * 4 + ["test"] * 4):
            anomaly = i > 5
            image, masks = draw_demo_image(np.random.default_rng((c, i)), "stain" if anomaly else None)
            path = f"{name}/Data/Images/{'Anomaly' if anomaly else 'Normal'}/{i:03d}.JPG"
            image.save(root / path)
            mask = path.replace("Images", "Masks").replace("JPG", "png") if anomaly else ""
            if anomaly:
                masks[0].point(lambda v: v > 127).save(root / mask)
            rows.append([name, split, "anomaly" if anomaly else "normal", path, mask])
    (root / "split_csv").mkdir()
    with open(root / "split_csv/1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.fixture
def options(teacher):
    return ("--steps", 1, "--image-size", 128, "--pretraining-images", "none", "--device", "cpu", "--teacher", teacher)


def models(folder) -> dict[str, float]:
    return {str(p.parent.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("model.pt"))}


def test_list_categories(loco, visa, tmp_path, monkeypatch):
    assert [c.name for c in list_categories(loco)] == ["pushpins", "screw_bag"]
    assert [c.name for c in list_categories(visa)] == ["candle", "pcb1"]
    monkeypatch.chdir(tmp_path)
    for single in (loco / "pushpins", visa / "candle", tmp_path, "nowhere", "demo"):
        assert list_categories(single) == []
    with pytest.raises(DataError, match="several categories; choose one: .*candle.*pcb1"):
        open_category(visa)


# ------------------------------------------------------------------------------------------------------------ collections


def test_collection_from_training_to_summary(loco, options, run_script, tmp_path):
    """Two categories × two seeds; one is interrupted, one fails, and the same command makes up for it."""
    command = ("train.py", "--data", "loco", "--seeds", "0,1", *options)
    shutil.copytree(loco, tmp_path / "loco")
    config = tmp_path / "loco/screw_bag/train"
    config.rename(tmp_path / "hidden")
    (tmp_path / "loco/screw_bag/train/good").mkdir(parents=True)  # no images

    status, out, err = run_script(*command)
    assert status == 1 and "2 of 4 runs complete in runs/loco" in out
    assert err.count("screw_bag-small-seed0: loco/screw_bag/train/good: no images") == 1 and "Traceback" not in err
    runs = tmp_path / "runs/loco"
    first = models(runs)
    assert list(first) == ["pushpins-small-seed0", "pushpins-small-seed1"]

    shutil.rmtree(config)
    (tmp_path / "hidden").rename(config)
    (runs / "screw_bag-small-seed0/log.jsonl").write_text("stopped before anything was saved\n")
    status, out, err = run_script("evaluate.py", "--run", "runs/loco", "--device", "cpu")
    assert status == 1 and "failed: screw_bag-small-seed0: not trained to the end" in out
    status, out, err = run_script(*command)
    assert status == 0 and "4 of 4 runs complete" in out and err.count("finished, skipped") == 2, err
    second = models(runs)
    assert len(second) == 4 and all(second[name] == first[name] for name in first)
    assert json.loads((runs / "screw_bag-small-seed0/log.jsonl").read_text())["step"] == 0

    evaluated = (runs / "pushpins-small-seed0/results.json").stat().st_mtime_ns
    status, out, err = run_script("evaluate.py", "--run", "runs/loco", "--device", "cpu")
    assert status == 0, err
    assert (runs / "pushpins-small-seed0/results.json").stat().st_mtime_ns == evaluated  # up to date
    results = {name: json.loads((runs / name / "results.json").read_text()) for name in second}
    summary = json.loads((runs / "summary.json").read_text())["collections"][0]
    assert summary["collection"] is None and summary["steps"] == [1]
    for metric in ("image_auroc", "au_spro"):
        a, b, c, d = (100 * results[f"{n}-small-seed{s}"][metric] for n in ("pushpins", "screw_bag") for s in (0, 1))
        entry = summary["categories"]["pushpins"][metric]
        assert entry["mean"] == pytest.approx((a + b) / 2) and entry["std"] == pytest.approx(abs(a - b) / 2**0.5)
        assert summary["mean"][metric]["values"] == pytest.approx([(a + c) / 2, (b + d) / 2])
    both = summary["mean"]["logical_anomalies/image_auroc"]["mean"], summary["mean"]["structural_anomalies/image_auroc"]["mean"]
    assert summary["mean"]["image_auroc"]["mean"] == pytest.approx(np.mean(both))
    table = (runs / "summary.md").read_text()
    assert table in out + "\n" and "| mean of these 2 |" in table and "±" in table
    assert not list(tmp_path.rglob("*.tmp*"))

    os.utime(runs / "screw_bag-small-seed0/model.pt", (2e9, 2e9))  # the newest run, and newer than its results
    (runs / "summary.json").unlink()
    status, out, err = run_script("evaluate.py", "--device", "cpu")
    assert status == 0 and "runs/loco/screw_bag-small-seed0/report.html" in out and not (runs / "summary.json").exists()
    status, _, err = run_script("evaluate.py", "--run", "runs/loco", "--data", "loco/pushpins")
    assert status == 2 and "is a folder of runs" in err


def test_interrupted_run_is_resumed(visa, options, run_script, tmp_path, interrupt_at):
    """Ctrl-C during the second category: the same command goes on where it stopped, to the same model."""
    command = ("train.py", "--data", visa, *options, "--steps", 3)
    assert run_script(*command, "--out", "whole")[0] == 0
    with interrupt_at(5):
        assert run_script(*command, "--out", "cut")[0] == 130
    assert list(models(tmp_path / "cut")) == ["candle-small"] and (tmp_path / "cut/pcb1-small/resume.pt").exists()
    assert run_script(*command, "--out", "cut")[0] == 0
    for name in models(tmp_path / "whole"):
        a, b = (torch.load(tmp_path / f / name / "model.pt", weights_only=True)["state"] for f in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/pcb1-small/log.jsonl").read_text().splitlines()]
    assert steps == [0, 2]


def test_no_run_of_a_collection_can_be_evaluated(run_script, tmp_path):
    for name in ("a-small", "b-small"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "model.pt").write_text("damaged")
    status, out, err = run_script("evaluate.py", "--run", "all", "--device", "cpu")
    assert status == 1 and "Traceback" not in err and "|" not in out
    assert out.count("failed: ") == 2 and json.loads((tmp_path / "all/summary.json").read_text())["collections"] == []


def test_interrupted_run_goes_on_on_another_device(tmp_path, monkeypatch):
    """One that began on a GPU, on a machine without: the command's device counts, not the one that it began with."""
    state, made = {"format": "efficientad-resume", "options": {"device": "abacus"}}, []
    (tmp_path / "bottle-small").mkdir()
    torch.save(state, tmp_path / "bottle-small/resume.pt")
    monkeypatch.setattr(train, "train", made.append)
    train.train_all([argparse.Namespace(out=str(tmp_path / "bottle-small"), device="cpu")])
    assert [(job.device, job.resume) for job in made] == [("cpu", str(tmp_path / "bottle-small"))]


def test_processes_share_the_runs(visa, options, run_script, tmp_path, monkeypatch):
    """As torchrun starts them. A failure must not end the others: torchrun would stop them all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    monkeypatch.setattr(train, "train", lambda job: made.append(job.out))
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        train.main(["--data", str(visa), "--seeds", "3,4,5", *map(str, options)])
    names = [f"runs/visa/{c}-small-seed{s}" for c in ("candle", "pcb1") for s in (3, 4, 5)]
    assert made == names[::2] + names[1::2]

    monkeypatch.setenv("RANK", "1")
    status, out, err = run_script("train.py", "--data", visa, *options)
    assert status == 0 and list(models(tmp_path)) == ["runs/visa/pcb1-small"]
    status, out, err = run_script("evaluate.py", "--run", "runs/visa", "--device", "cpu")
    assert status == 0 and "AU-PRO 0.3" in out, err
    (tmp_path / "broken/candle/train/good").mkdir(parents=True)
    (tmp_path / "broken/pcb1/train/good").mkdir(parents=True)
    status, out, err = run_script("train.py", "--data", "broken", *options)
    assert status == 0 and "failed runs" in err and "0 of 1 runs complete" in out
    status, _, err = run_script("train.py", "--data", visa / "candle", *options)
    assert status == 2 and "this is one run" in err


def test_bad_options_get_one_line(visa, loco, options, run_script, tmp_path):
    cases = [
        (("--data", visa, "--categories", "candle,pcb9"), "has no category pcb9; it has: candle, pcb1"),
        (("--data", visa, "--ablation", "--pretraining-images", visa), "--ablation takes one category"),
        (("--data", visa, "--seeds", "0,x"), "--seeds: invalid"),
        (("--data", visa, "--seeds", "0,1", "--seed", 2), "--seed or --seeds"),
        (("--data", loco / "pushpins", "--ablation"), "--ablation chooses"),  # the fixture's options have no penalty
        (("--data", "nowhere", "--seeds", "0,1"), "nowhere: no such folder"),
    ]
    for case, message in cases:
        status, _, err = run_script("train.py", *options, *case)
        assert status == 2 and message in err and "Traceback" not in err, (case, err)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- ablation


def test_ablation(loco, teacher, run_script, tmp_path, monkeypatch):
    options = ("--data", loco / "pushpins", "--steps", 1, "--image-size", 128, "--device", "cpu", "--teacher", teacher)
    monkeypatch.delitem(runs.ABLATION, "p_hard-0.9")  # the test is long enough without them
    monkeypatch.delitem(runs.ABLATION, "p_hard-0")
    monkeypatch.delitem(runs.ABLATION, "p_hard-0.9999")
    monkeypatch.delitem(runs.ABLATION, "p_hard-0.99999")
    folder = tmp_path / train.main(["--ablation", *map(str, options)])
    assert folder == tmp_path / "runs/pushpins-small-ablation" and set(models(folder)) == set(runs.ABLATION)
    status, out, err = run_script("evaluate.py", "--run", folder, "--device", "cpu")
    assert status == 0, err
    tables = json.loads((folder / "summary.json").read_text())["tables"]
    assert [len(rows) for rows in tables.values()] == [6, 6, 6, 4, 4]
    differences = [[round(row["paper_diff"], 1) if row["paper_diff"] is not None else None for row in rows]
                   for rows in list(tables.values())[3:]]  # fmt: skip
    assert differences == [[None, 0.8, 1.0, 0.4], [None, -0.7, -0.7, -0.4]]  # as printed in the paper
    cumulative = list(tables.values())[3]
    assert cumulative[1]["diff"] == pytest.approx(cumulative[1]["ours"]["mean"] - cumulative[0]["ours"]["mean"])
    ours = {title[:7] + row["row"]: row["ours"] for title, rows in tables.items() for row in rows}
    missing = [f"Table 3p_hard = {p}" for p in ("0", "0.9", "0.9999", "0.99999")] + ["Table 5without hard feature loss"]
    assert [name for name, entry in ours.items() if entry is None] == missing
    for name, run in (("Table 5without pretraining penalty", "no-penalty"), ("Table 3p_hard = 0.99", "p_hard-0.99"),
                      ("Table 4+ map normalization", "p_hard-0-no-penalty"), ("Table 3a = 0.9", "default")):  # fmt: skip
        auroc = json.loads((folder / run / "results.json").read_text())["image_auroc"]
        assert ours[name]["mean"] == pytest.approx(100 * auroc), name
    assert "| a = 0.5" in out and "95.9" in out and "–" in out

    # the Gaussian baseline of the same weights is what a training with that option gives
    train.main(["--map-normalization", "gaussian", "--out", "gaussian", *map(str, options)])
    assert run_script("evaluate.py", "--run", "gaussian", "--device", "cpu")[0] == 0
    auroc = json.loads((tmp_path / "gaussian/results.json").read_text())["image_auroc"]
    assert ours["Table 5without map normalization"]["mean"] == pytest.approx(100 * auroc)


def test_ablation_without_images_that_cannot_be_read(loco, tmp_path):
    """What --skip-bad-images left out of training is left out when maps are normalized anew."""
    shutil.copytree(loco / "pushpins", tmp_path / "pushpins")
    (tmp_path / "pushpins/validation/good/bad.png").write_text("not an image")
    category, model = open_category(tmp_path / "pushpins"), EfficientAD(image_size=(128, 128)).eval()
    info = {"data": str(category.root), "seed": 0, "p_hard": 0.0, "pretraining_images": "none"}
    model.training_info = info | {"skip_bad_images": True}
    assert [entry["quantiles"] for entry in evaluate.ablation_scores(model, category)] == [None, (0.9, 0.995)]
    model.training_info = info
    with pytest.raises(DataError, match="bad.png: not an image"):
        evaluate.ablation_scores(model, category)


def test_every_ablation_row_has_its_training():
    wanted = {(p_hard, penalty) for rows in ABLATION.values() for _, _, p_hard, penalty, _ in rows}
    trained = {(o.get("p_hard", 0.999), o.get("pretraining_images") != "none") for o in runs.ABLATION.values()}
    assert trained == wanted
    assert len(normalizations(0.999, True)) == 12  # 6 + 6 quantiles, one in common, and the baseline
    assert normalizations(0.5, True) == []


# ---------------------------------------------------------------------------------------------------------------- summary


def results(category, seed, auroc, size="small", **more):
    return {"category": category, "image_auroc": auroc, "types": {}, **more,
            "training": {"size": size, "seed": seed, "steps": 70000}}  # fmt: skip


def test_summary_by_hand():
    assert spread([0.5]) == {"mean": 50, "std": None, "values": [50]}
    assert spread([0.9, 1.0])["std"] == pytest.approx(100 * 0.05 * 2**0.5)
    runs = [results("bottle", 0, 0.9, au_pro=0.8), results("bottle", 1, 1.0, au_pro=0.9), results("screw", 0, 0.5)]
    summary = summarize_collection([*runs, results("screw", 0, 0.1, "medium")], "small")
    assert summary["mean"]["seeds"] == [0] and summary["mean"]["image_auroc"]["values"] == [70]  # seed 1 lacks the screw
    assert "au_pro" not in summary["mean"]
    header, *rows = collection_rows(summary)
    assert header == ["percent", "runs", "image AU-ROC", "paper", "AU-PRO 0.3", "paper"]
    assert rows[0] == ["bottle", "2", "95.0 ± 7.1", "99.9", "85.0 ± 7.1", "95.2"]
    assert rows[1] == ["screw", "1", "50.0", "97.9", "–", "95.6"]
    assert rows[2] == ["mean of these 2", "1", "70.0", "–", "–", "–"]  # the paper's mean is over all fifteen
    only = summarize_collection([results("bottle", 0, 0.9), results("screw", 1, 0.9)], "small")
    assert only["mean"] is None and collection_rows(only)[-1][1:3] == ["0", "–"]
    with pytest.raises(ValueError, match="same seed"):
        summarize_runs([results("bottle", 0, 0.9)] * 2)
    with pytest.raises(ValueError, match="one category"):
        summarize_runs([results("bottle", 0, 0.9, ablation=[]), results("screw", 0, 0.9, ablation=[])])


def test_complete_collection_has_the_papers_means():
    names = ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors")
    runs = [results(n, 0, 0.8, "medium", types={"logical_anomalies": {"image_auroc": 0.7},
                                                "structural_anomalies": {"image_auroc": 0.9}}) for n in names]  # fmt: skip
    content, sections = summarize_runs(runs)
    (title, rows), = sections.items()
    assert title == "MVTec LOCO, EfficientAD-M, 70000 steps"
    assert rows[-1] == ["mean of MVTec LOCO", "1", "80.0", "90.7", "70.0", "86.8", "90.0", "94.7"]
