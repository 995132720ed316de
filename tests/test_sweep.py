"""Collections, seeds and ablations: the real script on a tiny collection, and the tables."""

import json
import os
import shutil
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import CPU, TINY, assert_refused, log_of, put

import evaluate
import train
from efficientad import ModelError
from support.images import DataError
from support.runs import checksum
from tools import sweep
from tools.summary import COLLECTIONS, TABLES, cells, normalizations, spread, summarize

STEP = ("--steps", 1, *TINY)


@pytest.fixture(scope="module")
def loco(tiny_demo, tmp_path_factory):
    """A collection of two categories."""
    root = tmp_path_factory.mktemp("sets") / "loco"
    for name in ("pushpins", "screw_bag"):
        shutil.copytree(tiny_demo, root / name)
    (root / "readme.txt").write_text("not a category")
    return root


@pytest.fixture
def made(monkeypatch):
    """Options of the runs that would be trained, in place of training them."""
    jobs = []
    monkeypatch.setattr(train, "train", jobs.append)
    return jobs


def models(folder) -> dict[str, int]:
    found = sorted(folder.rglob("model.pt"))
    return {str(p.parent.relative_to(folder)): p.stat().st_mtime_ns for p in found}


def read(path) -> dict:
    return json.loads(path.read_text())


# -------------------------------------------------------------------------------------- training


def test_collection_from_training_to_summary(loco, run_script, tmp_path):
    """Two categories × two seeds; one fails; the same command makes up for it."""
    command = ("tools.sweep", "--data", "loco", "--seeds", "0,1", *STEP)
    evaluation = ("tools.sweep", "--evaluate", "runs/loco", *CPU)
    shutil.copytree(loco, tmp_path / "loco")
    images, runs = tmp_path / "loco/screw_bag/train", tmp_path / "runs/loco"
    images.rename(tmp_path / "hidden")
    (images / "good").mkdir(parents=True)

    status, out, err = run_script(*command)
    assert status == 1 and "2 of 4 runs complete in runs/loco" in out and "Traceback" not in err
    assert err.count("screw_bag-small-seed0: failed: loco/screw_bag/train/good: no images") == 1
    first = models(runs)
    assert list(first) == ["pushpins-small-seed0", "pushpins-small-seed1"]

    shutil.rmtree(images)
    (tmp_path / "hidden").rename(images)
    (runs / "screw_bag-small-seed0/log.jsonl").write_text("stopped before anything was saved\n")
    status, out, err = run_script(*evaluation)
    assert status == 1 and "failed: screw_bag-small-seed0: not trained to the end" in out
    status, out, err = run_script(*command)
    assert status == 0 and "4 of 4 runs complete" in out and err.count("finished, skipped") == 2
    second = models(runs)
    assert len(second) == 4 and all(second[name] == first[name] for name in first)

    evaluated = (runs / "pushpins-small-seed0/results.json").stat().st_mtime_ns
    whole = (runs / "pushpins-small-seed1/results.json").read_bytes()
    (runs / "pushpins-small-seed1/results.json").write_bytes(whole[:99])  # damaged
    earlier = {"category": "screw_bag", "training": {"category": "screw_bag"}}  # does not say where
    (runs / "screw_bag-small-seed0/results.json").write_text(json.dumps(earlier))
    (runs / "summary.json.unfinished7").write_text("left by a killed process")
    status, out, err = run_script(*evaluation)
    assert status == 0 and not (runs / "summary.json.unfinished7").exists(), err
    assert (runs / "pushpins-small-seed0/results.json").stat().st_mtime_ns == evaluated
    assert (runs / "pushpins-small-seed1/results.json").read_bytes() == whole
    results = {name: read(runs / name / "results.json") for name in second}
    rows = read(runs / "summary.json")["tables"]["EfficientAD-S, 1 steps"]
    for metric in ("image_auroc", "au_spro"):
        a, b, c, d = (100 * results[name][metric] for name in sorted(results))
        assert rows[0][metric]["mean"] == pytest.approx((a + b) / 2)
        assert rows[0][metric]["std"] == pytest.approx(abs(a - b) / 2**0.5)
        assert rows[2][metric]["values"] == pytest.approx([(a + c) / 2, (b + d) / 2])
    table = (runs / "summary.md").read_text()
    assert table in out and "| mean of these 2 |" in table and "±" in table
    model = runs / "pushpins-small-seed0/model.pt"
    checkpoint = torch.load(model)
    checkpoint["state"]["threshold"] += 1
    torch.save(checkpoint, model)
    os.utime(model, (1e9, 1e9))  # another model is another model, however old its file
    assert run_script(*evaluation)[0] == 0
    threshold = results["pushpins-small-seed0"]["threshold"]
    changed = read(model.with_name("results.json"))["threshold"]
    assert changed == pytest.approx(threshold + 1)
    assert not list(tmp_path.rglob("*.unfinished*"))

    (tmp_path / "loco").rename(tmp_path / "moved")
    (runs / "pushpins-small-seed1/results.json").unlink()
    status, out, err = run_script(*evaluation, "--data", "moved/screw_bag")
    assert status == 1 and "Traceback" not in err and not list(runs.glob("*/on-*"))
    assert "failed: pushpins-small-seed1: moved/screw_bag: neither is nor holds the set push" in out
    status, out, err = run_script(*evaluation, "--data", "moved")
    assert status == 0 and read(runs / "pushpins-small-seed1/results.json")["own_data"], err


def test_runs_begun_in_another_place(tmp_path):
    """The project and the data may have moved; another teacher is another run."""
    job = train.Options(device="cpu", data=str(put(tmp_path / "set/part/a.png").parent))
    known = vars(job) | {"teacher": "/gone/weights/teacher_small.pt", "data": "/gone/set/part"}
    assert sweep.changed_options(job, known) == []
    (found,) = sweep.changed_options(job, known | {"teacher": "/gone/weights/other.pt"})
    assert found.startswith("--teacher /gone/weights/other.pt, not ")


def test_a_run_that_fails_is_one_line(loco, run_script, tmp_path, monkeypatch):
    """A teacher in a model's place; too little memory."""
    command = ("tools.sweep", "--data", loco, *STEP)
    torch.save({"0.weight": 1}, put(tmp_path / "runs/loco/pushpins-small/model.pt", b""))
    put(tmp_path / "runs/loco/screw_bag-small-seed0/model.pt", b"junk")
    monkeypatch.setattr(train, "train", Mock(side_effect=MemoryError))
    status, _, err = run_script(*command)
    assert status == 1 and "Traceback" not in err
    assert "pushpins-small/model.pt: not of a run of this program; move it away" in err
    assert "screw_bag-small: failed: too little memory; take smaller images or batches" in err
    status, _, err = run_script(*command, "--seeds", 0)
    assert "screw_bag-small-seed0/model.pt: not a readable checkpoint" in err


def test_minutes_count_for_each_run(loco, run_script, monkeypatch):
    """However old the process is."""
    left = []

    def measure(end, *_):
        left.append(end - time.time())
        raise ModelError("measured")

    monkeypatch.setattr("support.training.steps_until", measure)
    monkeypatch.setattr("support.training.process_start", lambda: time.time() - 9000)
    status, _, err = run_script("tools.sweep", "--data", loco, *TINY, "--minutes", 900)
    assert status == 1 and len(left) == 2 and all(50_000 < s <= 54_000 for s in left), err


def test_links_and_hidden_folders(loco, run_script, tmp_path):
    """A category has the name of its link; the word demo is not a folder of that name."""
    for name in ("demo", "v1"):
        shutil.copytree(loco / "pushpins", tmp_path / "sets" / name)
    (tmp_path / "all").mkdir()
    for name in ("alpha", "beta"):
        (tmp_path / "all" / name).symlink_to(tmp_path / "sets/v1")
    assert run_script("tools.sweep", "--data", "all", *STEP, "--out", "my runs")[0] == 0
    shutil.copytree(tmp_path / "my runs/alpha-small", tmp_path / "my runs/.trash")
    beta = tmp_path / "my runs/beta-small"
    broken = {"own_data": True, "training": {}, "model_checksum": checksum(beta / "model.pt")}
    (beta / "results.json").write_text(json.dumps(broken))
    status, out, err = run_script("tools.sweep", "--evaluate", "my runs", *CPU)
    assert status == 0 and "| alpha " in out and "| beta " in out and ".trash" not in out, err
    (tmp_path / "demo").symlink_to(tmp_path / "sets/demo")
    status, out, err = run_script("tools.sweep", "--data", "./demo", "--seeds", 0, *STEP)
    assert status == 0, err
    info = torch.load("runs/demo/demo-small-seed0/model.pt")["training"]
    assert info["data"] == str((tmp_path / "sets/demo").resolve())


def test_interrupted_run_is_resumed(loco, run_script, tmp_path, interrupt_at):
    """Although its data have moved."""
    shutil.copytree(loco, tmp_path / "old/loco")
    command = ("tools.sweep", *STEP, "--steps", 3, "--data")
    with interrupt_at(10):
        assert run_script(*command, "old/loco")[0] == 130
    runs = tmp_path / "runs/loco"
    assert list(models(runs)) == ["pushpins-small"]
    (tmp_path / "old").rename(tmp_path / "new")
    status, _, err = run_script(*command, "new/loco")
    assert status == 0 and "screw_bag-small: interrupted, goes on" in err, err
    assert [entry["step"] for entry in log_of(runs / "screw_bag-small")] == [0, 2]


def test_interrupted_run_goes_on_with_its_own_options_on_the_device_given_now(tmp_path, made):
    """It began on a GPU, with that one's defaults, and goes on without."""
    job = train.Options(out=str(tmp_path), device="cpu", data=str(tmp_path), skip_bad_images=True)
    begun = vars(job) | {"device": "cuda", "steps": 70000, "recipe": "paper", "lr": 1e-4}
    begun["skip_bad_images"] = False
    torch.save({"format": "run", "options": begun}, tmp_path / "resume.pt")
    sweep.train_run(job, made.append)
    (resumed,) = made
    assert (resumed.device, resumed.resume) == ("cpu", str(tmp_path)) and resumed.skip_bad_images
    assert (resumed.steps, resumed.recipe) == (70000, "paper") != (job.steps, job.recipe)


def test_a_run_of_other_data_or_options_is_refused(loco, run_script, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(loco, tmp_path / name / "parts")
    command = ("tools.sweep", "--categories", "pushpins", *STEP, "--data")
    assert run_script(*command, "a/parts")[0] == 0
    for options, words in (
        (["b/parts"], f"--data {tmp_path}/a/parts/pushpins, not b/parts/pushpins"),
        (["a/parts", "--p-hard", 0.9], "--p-hard 0.999, not 0.9"),
    ):
        status, out, err = run_script(*command, *options)
        assert status == 1 and "0 of 1 runs complete" in out and words in err, err
    status, _, err = run_script(*command, tmp_path / "a/parts")  # the same, named otherwise
    assert status == 0 and "finished, skipped" in err


def test_simplenet(tiny_demo, run_script, resnet18):
    backbone = ("--backbone", "resnet18", "--backbone-weights", resnet18, "--image-size", 64)
    command = ("tools.sweep", "--model", "simplenet", "--data", tiny_demo, *CPU)
    assert_refused(run_script(*command, *backbone, "--ablation"), "--ablation trains EfficientAD")
    for words in ("1 of 1 runs complete in runs/tiny", "finished, skipped"):
        result = run_script(*command, *backbone, "--seeds", 3, "--epochs", 1, "--batch-size", 4)
        assert result[0] == 0 and words in result[1] + result[2]
    status, out, err = run_script("tools.sweep", "--evaluate", "runs/tiny", *CPU)
    assert status == 0 and "### SimpleNet (resnet18), 1 epochs" in out and "| tiny " in out, err


def test_processes_share_the_runs(loco, run_script, made, monkeypatch, tmp_path):
    """As torchrun starts them, over a folder of links, which name the runs. A failure must not end
    the other processes: torchrun would stop them all."""
    (tmp_path / "all").mkdir()
    for name in ("alpha", "beta"):
        (tmp_path / "all" / name).symlink_to(loco / "pushpins")
    command = ("tools.sweep", "--data", "all", *STEP)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run_script(*command, "--seeds", "3,4,5")[0] == 0
    names = [f"runs/all/{c}-small-seed{s}" for c in ("alpha", "beta") for s in (3, 4, 5)]
    assert [job.out for job in made] == names[::2] + names[1::2]

    def fail(job):
        raise DataError("no")

    monkeypatch.setattr(train, "train", fail)
    status, out, err = run_script(*command)
    assert status == 0 and "0 of 1 runs complete" in out and "failed runs" in err


def test_bad_options_get_one_line(loco, run_script, tmp_path):
    one, photos = loco / "pushpins", ("--pretraining-images", loco)
    for case, message in (
        (("--data", loco, "--categories", "a,b"), "no category a, b; it has: pushpins, screw_bag"),
        (("--data", one, "--categories", "a"), "has no category a; it has: none"),
        (("--data", loco, "--ablation", *photos), "takes one category"),
        (("--data", one, "--ablation", *photos, "--minutes", 1), "--ablation takes --steps"),
        (("--data", loco, "--seeds", "0,1", "--seed", 2), "--seed or --seeds"),
        (("--data", one, "--ablation"), "--ablation chooses"),  # `STEP` has no penalty
        (("--data", one, "--model", "simplenet"), "unrecognized arguments: --pretraining-images"),
        (("--data", one), "this is one run; use: python train.py --data"),
        (("--data", loco, "--resume", "x"), "--resume belongs to"),
    ):
        assert_refused(run_script("tools.sweep", *STEP, *case), message)
    assert_refused(
        run_script("tools.sweep", "--evaluate", "x", "--seeds", 1), "only --data, --tiff"
    )
    assert_refused(
        run_script("tools.sweep", "--evaluate", "x", "--accept", "y"), "only --data, --t"
    )
    assert_refused(run_script("tools.sweep", "--evaluate", "."), ".: has no runs in it")
    assert not list(tmp_path.iterdir())


def test_no_run_can_be_evaluated(run_script, tmp_path):
    for name in ("a-small", "b-small"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "model.pt").write_text("damaged")
    status, out, err = run_script("tools.sweep", "--evaluate", "all", *CPU)
    assert status == 1 and "Traceback" not in err and "|" not in out
    assert out.count("failed: ") == 2 and read(tmp_path / "all/summary.json")["tables"] == {}


# -------------------------------------------------------------------------------------- ablation


def test_ablation(loco, run_script, tmp_path, monkeypatch):
    options = [*map(str, ("--data", loco / "pushpins", *STEP[:-2]))]
    kept = ("default", "no-penalty", "p_hard-0-no-penalty")
    monkeypatch.setattr(sweep, "ABLATION", {name: sweep.ABLATION[name] for name in kept})
    sweep.main(["--ablation", *options])
    folder = tmp_path / "runs/pushpins-small-ablation"
    assert set(models(folder)) == {*kept, "recipe-paper"}
    status, out, err = run_script("tools.sweep", "--evaluate", folder, *CPU)
    assert status == 0, err
    tables = read(folder / "summary.json")["tables"]
    assert [len(rows) for rows in tables.values()] == [6, 6, 6, 4, 4, 2]
    cumulative, isolated = list(tables.values())[3:5]
    for rows, published in ((cumulative, [0.8, 1.0, 0.4]), (isolated, [-0.7, -0.7, -0.4])):
        assert [round(row["difference paper"], 1) for row in rows[1:]] == published
    before, after = (row["image_auroc"]["mean"] for row in cumulative[:2])
    assert cumulative[1]["difference"] == pytest.approx(after - before)
    named = [(title[:7] + row["percent"], row) for title in tables for row in tables[title]]
    ours = {name: row["image_auroc"] for name, row in named}
    missing = [f"Table 3p_hard = {p}" for p in (0, 0.9, 0.99, 0.9999, 0.99999)]
    missing += ["Table 5without hard feature loss"]
    assert [name for name, entry in ours.items() if entry is None] == missing
    for name, run in (
        ("Table 5without pretraining penalty", "no-penalty"),
        ("Table 4+ map normalization", "p_hard-0-no-penalty"),
        ("Table 3a = 0.9", "default"),
        ("Recipe recipe short", "default"),
        ("Recipe recipe paper", "recipe-paper"),
    ):
        auroc = read(folder / run / "results.json")["image_auroc"]
        assert ours[name]["mean"] == pytest.approx(100 * auroc), name
    assert "| a = 0.5" in out and "95.9" in out and "–" in out

    # The Gaussian baseline of the same weights is what a training with that option gives.
    train.main(["--map-normalization", "gaussian", "--out", "gaussian", *options])
    evaluate.main(["--run", "gaussian", *CPU])
    auroc = read(tmp_path / "gaussian/results.json")["image_auroc"]
    assert ours["Table 5without map normalization"]["mean"] == pytest.approx(100 * auroc)


def test_ablation_without_images_that_cannot_be_read(loco, model, tmp_path):
    """What --skip-bad-images left out of training is left out when maps are normalized anew."""
    shutil.copytree(loco / "pushpins", tmp_path / "pushpins")
    (tmp_path / "pushpins/validation/good/bad.png").write_text("not an image")
    info = {"data": str(tmp_path / "pushpins"), "seed": 0, "p_hard": 0}
    info["pretraining_images"] = "none"
    model.training_info = info | {"skip_bad_images": True}
    entries = sweep.ablation_scores(model, info["data"])
    assert [entry["quantiles"] for entry in entries] == [(), (0.9, 0.995)]
    put(tmp_path / "pushpins/test/good/bad.png", b"")  # no option leaves that out
    with pytest.raises(DataError, match="good/bad.png: not an image .* or save it again$"):
        sweep.ablation_scores(model, info["data"])
    model.training_info = info
    with pytest.raises(DataError, match="bad.png: not an image"):
        sweep.ablation_scores(model, info["data"])


def test_every_row_has_its_training():
    wanted = {(p_hard, penalty) for rows in TABLES.values() for _, _, p_hard, penalty, _ in rows}
    trained = [train.Options(**changes) for changes in sweep.ABLATION.values()]
    assert wanted == {(o.p_hard, o.pretraining_images != "none") for o in trained}
    assert len(normalizations(0.999, True)) == 12  # 6 + 6 quantiles, one in common, the baseline
    assert normalizations(0.5, True) == []


# --------------------------------------------------------------------------------------- summary


def results(category, seed, auroc, size="small", **more):
    training = {"model": "efficientad", "size": size, "steps": 70000, "seed": seed}
    if size == "simplenet":
        training = {"model": size, "backbone": "resnet18", "epochs": 40, "steps": 9, "seed": seed}
    training |= more.pop("training", {})
    return {"category": category, "image_auroc": auroc, "types": {}, **more, "training": training}


def table(runs: list[dict]) -> tuple[str, list[list[str]]]:
    """The title and the cells of their one table."""
    ((title, rows),) = summarize(runs).items()
    return title, cells(rows)


def test_summary_by_hand():
    assert spread([0.5]) == {"mean": 50, "std": None, "values": [50]}
    assert spread([0.9, 1.0])["std"] == pytest.approx(100 * 0.05 * 2**0.5)
    runs = [results("bottle", 0, 0.9, au_pro=0.8), results("bottle", 1, 1.0, au_pro=0.9)]
    title, rows = table([*runs, results("screw", 0, 0.5)])
    assert title == "EfficientAD-S, 70000 steps" and rows == [
        ["percent", "runs", "image AU-ROC", "paper", "AU-PRO 0.3", "paper"],
        ["bottle", "2", "95.0 ± 7.1", "99.9", "85.0 ± 7.1", "95.2"],
        ["screw", "1", "50.0", "97.9", "–", "95.6"],
        # Seed 1 lacks the screw. The paper's mean is over all fifteen.
        ["mean of these 2", "1", "70.0", "–", "–", "–"],
    ]
    _, rows = table([results("bottle", 0, 0.9), results("screw", 1, 0.9)])
    assert rows[-1][1:3] == ["0", "–"]  # no seed in common
    varied = [results("bottle", 0, 0.9, training={"p_hard": p}) for p in (0, 0.9)]
    for runs, words in (
        ([results("bottle", 0, 0.9)] * 2, "two small runs of bottle with seed 0"),
        ([*varied, results("screw", 0, 0.9)], "one category"),
    ):
        with pytest.raises(ValueError, match=words):
            summarize(runs)


def test_ablation_is_of_the_recipe_that_most_runs_have():
    """One run of the other recipe has more normalizations than two runs of this one."""

    def run(p_hard, recipe, count):
        entry = {"p_hard": p_hard, "penalty": True, "quantiles": [0.9, 0.995], "recipe": recipe}
        entries = [entry | {"image_auroc": 0.9}] * count
        return results("screw", 0, 0.9, ablation=entries, training={"p_hard": p_hard})

    tables = summarize([run(0, "short", 1), run(0.9, "short", 1), run(0.99, "paper", 9)])
    shown = {row["percent"] for rows in tables.values() for row in rows if row["image_auroc"]}
    assert shown == {"p_hard = 0", "p_hard = 0.9", "without hard feature loss"}


def test_complete_collection_has_the_papers_means():
    types = {f"{name}_anomalies": {"image_auroc": 0.7} for name in ("logical", "structural")}
    names = COLLECTIONS["MVTec LOCO"].split()
    _, rows = table([results(name, 0, 0.8, "medium", types=types) for name in names])
    mean = ["mean of MVTec LOCO", "1", "80.0", "90.7", "70.0", "86.8", "70.0", "94.7"]
    assert rows[-1] == mean


def test_several_models_in_one_table():
    s, n = "EfficientAD-S, 70000 steps", "SimpleNet (resnet18), 40 epochs"
    title, rows = table([results("bottle", 0, 0.7, "simplenet"), results("bottle", 0, 0.9)])
    assert title == f"{s}; {n}" and rows == [
        ["percent", "model", "runs", "image AU-ROC", "paper"],
        ["bottle", s, "1", "90.0", "99.9"],
        ["bottle", n, "1", "70.0", "–"],
        ["mean of these 1", s, "1", "90.0", "–"],
        ["mean of these 1", n, "1", "70.0", "–"],
    ]
