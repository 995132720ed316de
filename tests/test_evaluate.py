"""evaluate.py and what it writes, on tiny sets."""

import base64
import ctypes
import errno
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, PHOTO, ROOT, assert_refused, content_of, pictures, put, rows_of
from PIL import Image, ImageDraw

import evaluate
from efficientad import EfficientAD, ModelError
from support import report, scoring
from support.appearance import appearance_of
from support.data import Category, Sample
from support.images import read_image, to_array


def part(root, tiny_demo, masks: bool) -> None:
    """A category in MVTec AD's layout: two good test images, one scratch, two dents."""
    for i, name in enumerate(("good/0", "good/1", "scratch/0", "dent/0", "dent/1")):
        kind, number = "good" if i < 2 else "structural_anomalies", f"{i % 3:03d}"
        put(root / f"test/{name}.png", (tiny_demo / f"test/{kind}/{number}.png").read_bytes())
        if masks and i > 1:
            mask = tiny_demo / f"ground_truth/{kind}/{number}/000.png"
            put(root / f"ground_truth/{name}_mask.png", mask.read_bytes())
    put(root / "train/good/0.png")


def test_everything_that_an_evaluation_writes(own, tiny_demo, model, run_script):
    paths = sorted((tiny_demo / "test").rglob("*.png"))
    images = [torch.from_numpy(to_array(read_image(path), (128, 128)))[None] for path in paths]
    with torch.no_grad():
        medium = np.median([model(image)[1].item() for image in images])
    checkpoint = torch.load(own / "model.pt")
    checkpoint["state"]["threshold"].fill_(medium + 1e-4)
    torch.save(checkpoint, own / "model.pt")
    status, out, err = run_script("evaluate.py", "--run", own, "--tiff", *CPU)
    assert status == 0, err
    results = json.loads((own / "results.json").read_text())
    types = results["types"]
    assert set(types) == {"logical_anomalies", "structural_anomalies"}
    for key in ("image_ap", "au_spro"):  # MVTec LOCO: the mean of the types, not pooled
        assert results[key] == pytest.approx(np.mean([entry[key] for entry in types.values()]))
    assert results["au_spro"] == results["au_spro_by_limit"]["0.05"]
    training = results["training"]
    assert (training["model"], training["size"], training["steps"]) == ("efficientad", "small", 3)
    assert "| overall" in out and f"{100 * results['image_auroc']:.1f}" in out
    assert (own / "results.md").read_text() in out
    observed = f"observed {100 * results['false_alarms']:.3g} % on 3 good test images, which are "
    assert observed + results["drift"] in out and "standard deviations" in results["drift"]

    rows = {row["image"]: row for row in rows_of(own / "scores.csv")}
    assert len(rows) == 9 and {row["defect"] for row in rows.values()} == {"good", *types}
    image = to_array(read_image(tiny_demo / "test/good/001.png"), (128, 128))
    with torch.no_grad():
        maps, scores = model.predict(torch.from_numpy(image)[None])
    row = rows["good/001"]
    for name, key in (("combined", "score"), ("local", "score_local"), ("global", "score_global")):
        assert float(row[key]) == pytest.approx(scores[name].item(), abs=1e-5)
    assert sum(int(row["anomalous"]) for row in rows.values()) == 4
    assert all(int(r["anomalous"]) == (float(r["score"]) > medium + 1e-4) for r in rows.values())
    tiff = Image.open(own / "anomaly_maps/tiny/test/good/001.tiff")
    assert tiff.mode == "F" and tiff.size == (256, 256)
    small = np.asarray(tiff.resize((128, 128), Image.Resampling.BOX)).ravel()
    assert np.corrcoef(small, maps["combined"].numpy().ravel())[0, 1] > 0.99

    assert len(pictures(own / "overlays")) == 9
    assert Image.open(own / "overlays/logical_anomalies/002.png").size == (5 * 260 - 4, 274)
    assert "http" not in (ROOT / "support/report.html").read_text(
        encoding="utf-8"
    )  # the page fetches nothing
    images = content_of(own / "report.html")["images"]
    assert len(images) == 9 and sum("outline" in image for image in images) == 6
    assert list(images[0]["maps"]) == ["combined", "local", "global"]
    assert images[0]["score"] == float(rows["good/000"]["score"])
    assert not list(own.rglob("*.unfinished*")) and not list(own.rglob("*.new"))


def test_small_defects_have_an_outline():
    mask = np.zeros((2000, 2000), bool)
    mask[1200:1203, 700:703] = True
    image = Image.new("RGB", mask.shape)
    uri = report.report_entry(image, mask, {}, (0.0, 1.0))["outline"]
    outline = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA")
    )
    assert 4 < np.count_nonzero(outline[..., 3]) < 30


DOM = """
const made = [], node = () => ({append() {}, setAttribute() {}, insertBefore() {}, style: {},
  removeAttribute() {}, set innerHTML(text) { made.push(text); }, lastChild: null});
globalThis.document = {createElement: node, getElementById: id =>
  id === "data" ? {textContent: DATA} : node()};
"""


def run_page(page: str, tmp_path) -> list[str]:
    """The SVGs and lists that the page's script draws."""
    data, script = (part.split("</script>")[0] for part in page.split("<script")[1:])
    script = DOM.replace("DATA", json.dumps(data.split(">", 1)[1])) + script.split(">", 1)[1]
    (tmp_path / "page.js").write_text(script + "console.log(JSON.stringify(made))")
    output = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True)
    return json.loads(output.stdout)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_page_of_unlabelled_images_has_no_plots(tmp_path):
    image = {"name": "a", "score": None, "p_value": 0.05, "verdict": "reject", "unlike": "gray"}
    content = {"images": [image | {"maps": {"combined": ""}}], "floor": 0, "threshold": 1}
    content |= {"model": "S", "category": "c", "origin": "o", "table": [["image"]], "total": 9}
    assert run_page(report.fill_page(content), tmp_path) == []


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_pages_plots(tmp_path):
    """Ten defect types are told apart by dash and number; ticks are whole, however many
    images there are; a negative threshold lies within the axes."""
    types = {f"type {i}": {} for i in range(10)}
    results = {"types": types, "threshold": -2.5, "floor": -4.0, "category": "c"}
    results |= {"training": {"size": "small"}, "own_data": True, "good_images": 10, "drift": ""}
    results |= {"false_alarms": 0.0, "images": 10, "calibration": {"validation_images": 5}}
    results["types"] = dict.fromkeys(types, {"images": 1})
    entries = [{"name": str(i), "defect": "good", "score": -3.0, "maps": {}} for i in range(10)]
    entries += [{"name": t, "defect": t, "score": -1.0, "maps": {}} for t in types]
    curves = {name: (np.array([0, 0.1, 1]), np.array([0, 0.5, 1])) for name in types}
    page = report.html_report(results, entries, curves)
    histogram, roc, legend, overlap, _ = run_page(page, tmp_path)
    assert re.findall(r'text-anchor="end">([^<]*)<', histogram) == ["0", "3", "6", "9", "12"]
    (x,) = re.findall(r'<line x1="([\d.]+)" x2="\1" [^>]*dasharray="4 3"', histogram)
    assert 56 < float(x) < 292
    looks = re.findall(r'stroke="([^"]*)" stroke-dasharray="([^"]*)" points', roc)
    assert len(set(looks)) == 10 and len({dash for _, dash in looks}) == 5
    labels = re.findall(r'<text class="number"[^>]*>(\d+)<', overlap)
    assert labels == [str(i) for i in range(1, 11)]
    assert "</svg> 10 type 9</li>" in legend
    entries += [entries[0]] * (1236 - 10)
    histogram = run_page(report.html_report(results, entries, curves), tmp_path)[0]
    ticks = re.findall(r'text-anchor="end">([^<]*)<', histogram)
    assert ticks == ["0", "309", "618", "927", "1236"]


@pytest.mark.parametrize("masks", [True, False])
def test_another_set_than_the_models_own(masks, own, tiny_demo, run_script, tmp_path):
    """MVTec AD's layout: types are pooled. Results of another set lie in a folder of their own."""
    part(tmp_path / "part", tiny_demo, masks)
    put(own / "results.json", b"earlier")
    status, out, err = run_script("evaluate.py", "--run", own, "--data", "part", *CPU)
    assert status == 0 and f"trained on tiny ({tiny_demo.resolve()})" in out, err
    assert (own / "results.json").read_bytes() == b"earlier" and not (own / "overlays").exists()
    (folder,) = own.glob("on-part-*")
    assert "trained on tiny" in (folder / "report.html").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text())
    assert set(results["types"]) == {"scratch", "dent"}
    assert results["images"] == 3 and results["good_images"] == 2
    scratch, dent = (results["types"][name]["image_auroc"] for name in ("scratch", "dent"))
    assert results["image_auroc"] == pytest.approx((scratch + 2 * dent) / 3)
    assert ("au_pro" in results) == masks == ("pixel_auroc" in results)
    assert not masks or results["au_pro"] == results["au_pro_by_limit"]["0.3"]
    assert Image.open(folder / "overlays/dent/0.png").width == (5 if masks else 4) * 260 - 4
    if masks:
        return
    (folder / "overlays").rename(tmp_path / "disk")  # moved to where there is room
    (folder / "overlays").symlink_to(tmp_path / "disk")
    shutil.rmtree(tmp_path / "part/test/dent")
    assert run_script("evaluate.py", "--run", own, "--data", "part", *CPU)[0] == 0
    assert pictures(folder / "overlays") == ["good/0.png", "good/1.png", "scratch/0.png"]
    assert (folder / "overlays").is_symlink()


def test_own_set_in_another_place(model, tiny_demo, run_script, tmp_path, monkeypatch):
    """It is the model's own, if nothing lies where it was and its images were trained on."""
    checkpoint = model.checkpoint()
    checkpoint["training"] = {"data": str(tmp_path / "gone/tiny"), "category": "tiny"}
    (tmp_path / "moved").mkdir()
    torch.save(checkpoint, tmp_path / "moved/model.pt")
    assert_refused(run_script("evaluate.py", "--run", "moved", *CPU), "gone/tiny: no such folder")
    assert run_script("evaluate.py", "--run", "moved", "--data", tiny_demo, *CPU)[0] == 0
    assert json.loads((tmp_path / "moved/results.json").read_text())["own_data"]
    moved, known = tmp_path / "moved", {"trained_on": [appearance_of(PHOTO).fingerprint]}
    info = SimpleNamespace(training_info=checkpoint["training"] | {"appearance": known})
    options = evaluate.Options(data=str(tiny_demo), device="cpu")
    assert not evaluate.find_tests(moved, info, options)[2]  # another set of that name
    damaged = put(tiny_demo / "train/good/-.png", b"")  # it tells nothing
    known["trained_on"] += [appearance_of(read_image(tiny_demo / "train/good/000.png")).fingerprint]
    assert evaluate.find_tests(moved, info, options)[1:] == (moved, True)
    damaged.unlink()
    elsewhere = put(tmp_path / "elsewhere/.lock", b"").parent  # evaluated into before
    put(elsewhere / "anomaly_maps/tiny/test/good/gone.tiff")
    put(elsewhere / "anomaly_maps/other/test/good/kept.tiff")
    command = ("evaluate.py", "--run", "moved", "--data", tiny_demo, "--tiff", "--out", elsewhere)
    assert run_script(*command, *CPU)[0] == 0 and (elsewhere / "results.json").exists()
    maps = [path.name for path in (elsewhere / "anomaly_maps").rglob("good/*.tiff")]
    assert sorted(maps) == ["000.tiff", "001.tiff", "002.tiff", "kept.tiff"]

    def read_only(path, mode):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("support.runs.open", read_only, raising=False)
    result = run_script("evaluate.py", "--run", "moved", "--data", tiny_demo, *CPU)
    assert_refused(result, "moved: cannot be written; make it writable, or take another")


def test_pictures_are_replaced_whole(tmp_path, monkeypatch):
    """Whenever the process ends, there are the old ones or the new ones."""
    folder, rename = tmp_path / "overlays", Path.rename

    def renew(name: str) -> None:
        with report.new_folder(folder) as new:
            put(new / name)

    renew("a.png")
    for stop in (1, 2):  # at which renaming
        moves = []

        def interrupted(path: Path, target: Path) -> None:
            moves.append(target)
            if len(moves) == stop:
                raise KeyboardInterrupt
            rename(path, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", interrupted)
            renew("b.png")
        assert pictures(tmp_path) == ["overlays/a.png"]
    folder.rename(tmp_path / ".overlays.old")  # as kill -9 leaves it
    with pytest.raises(ValueError), report.new_folder(folder):
        raise ValueError
    assert pictures(tmp_path) == ["overlays/a.png"]
    renew("c.png")
    assert pictures(tmp_path) == ["overlays/c.png"] and len([*tmp_path.iterdir()]) == 1


def test_what_cannot_be_evaluated(run, model, tiny_demo, run_script, tmp_path):
    command = ("evaluate.py", "--run", run, *CPU)
    assert_refused(run_script(*command), "name the category with --data")
    put(tmp_path / "photos/a.png")
    part(tmp_path / "good", tiny_demo, False)
    part(tmp_path / "defective", tiny_demo, False)
    for name in ("scratch", "dent"):
        shutil.rmtree(tmp_path / "good/test" / name)
    shutil.rmtree(tmp_path / "defective/test/good")
    for data in ("photos", "good", "defective"):
        result = run_script(*command, "--data", data)
        assert_refused(result, f"{data}: needs good and defective test images", "--images DIR")
    EfficientAD(image_size=(128, 128)).save(str(run / "model.pt"))
    assert_refused(run_script(*command, "--data", tiny_demo), "not calibrated")
    assert sorted(path.name for path in run.iterdir()) == [".lock", "model.pt"]


def test_which_run(run, run_script, tmp_path):
    assert_refused(run_script("evaluate.py"), "no trained model; run train.py first")
    assert_refused(run_script("evaluate.py", "--run", "nowhere"), "model.pt: no such file")
    put(tmp_path / "photos/a.png")
    put(tmp_path / "runs/cut/resume.pt", b"")
    cut = "runs/cut is not trained to the end: go on with --resume"
    assert_refused(run_script("evaluate.py"), f"no trained model; {cut}")
    for i, name in enumerate(("old", "set/new")):
        shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "model.pt", (1e9 + i, 1e9 + i))
    status, _, err = run_script("evaluate.py", "--images", "photos", *CPU)
    assert status == 0 and f"runs/set/new: the newest model; {cut}\n" in err
    assert (tmp_path / "runs/set/new/images/scores.csv").exists()
    result = run_script("evaluate.py", "--run", "runs/cut", *CPU)
    assert_refused(result, "runs/cut: not trained to the end; go on with:", "--resume runs/cut")
    result = run_script("evaluate.py", "--run", "runs/set", *CPU)
    assert_refused(result, "runs/set: is a folder of runs", "tools.sweep --evaluate runs/set")
    result = run_script("evaluate.py", "--run", "runs/old", "--out", "runs/set/new")
    assert_refused(result, "runs/set/new: holds another run; choose another --out")


def test_nan_is_never_called_normal(own, run_script, monkeypatch):
    assert scoring.judge({}, 0.1, float("nan"), None)[2] == "reject"
    known = zip(("ok", "reject", "check", "reject", "reject"), (9.0, 1.0, 3.0, 2.0, None))
    entries = [{"verdict": verdict, "score": score} for verdict, score in known]
    assert [e["score"] for e in report.worst(entries, 4)] == [None, 2.0, 1.0, 3.0]
    titles = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *words: titles.append(words[2]))
    for score in (float("nan"), 0.2, 0.1):
        report.overlay(PHOTO, None, {"m": np.zeros((4, 4))}, {"m": score}, (0, 0.1))
    signs = [title.split()[3] for title in titles if title.startswith("m")]
    assert signs == [">", ">", "<="]
    no_number = {"combined": np.full((8, 8), np.nan)}, {"combined": float("nan")}
    monkeypatch.setattr(evaluate, "predict", lambda *_: no_number)
    with pytest.raises(ModelError, match="000.png: its score is not a number"):
        evaluate.main(["--run", str(own), *CPU])
    assert not (own / "overlays").exists()


def test_heat_colours():
    """An ordinary value is black, the threshold in the middle, whatever their signs."""
    image = Image.new("RGB", (20, 10))

    def colour(value: float, scale: tuple[float, float]) -> list[int]:
        maps = {"anomaly": np.full((5, 5), value)}
        sheet = report.overlay(image, None, maps, {"anomaly": value}, scale)
        assert sheet.size == (2 * 260 - 4, 128 + 18)
        return np.asarray(sheet)[100, 400].tolist()

    middle = pytest.approx([160, 32, 48], abs=1)  # at an opacity of 0.8
    assert colour(-0.1, (-0.4, -0.1)) == middle  # SimpleNet's scores are −D
    assert colour(-0.4, (-0.4, -0.1)) == colour(-9, (-0.4, -0.1)) == [0, 0, 0]
    assert colour(-0.5, (0.0, -0.5)) == middle  # a threshold below the ordinary value
    assert colour(-0.6, (0.0, -0.5)) == [0, 0, 0]
    mask = np.ones((10, 20), bool)
    assert report.overlay(PHOTO, mask, {"a": np.zeros((4, 4))}, {"a": 0}, (0, 1)).width == 776


@pytest.mark.parametrize("work", ["score", "evaluate"])
def test_many_images_at_flat_memory(work, run, model, tmp_path, monkeypatch):
    """Resident memory after 30 and after 130 images of 1.4 MB, with maps of 1.9 MB."""
    maps, calls, sizes = {"combined": np.zeros((128, 128), np.float32)}, [], []

    def predict(*_):
        calls.append(1)
        if len(calls) in (30, 130):
            ctypes.CDLL(None).malloc_trim(0)  # what is free does not count
            status = Path("/proc/self/status").read_text()
            sizes.append(int(status.split("VmRSS:")[1].split()[0]))  # KiB
        return maps, {"combined": 0.0}

    for module in (scoring, evaluate):
        monkeypatch.setattr(module, "predict", predict)
        monkeypatch.setattr(module, "read", lambda *_: (Image.new("RGB", (800, 600), "red"), None))
    paths = [tmp_path / f"in/{i}.png" for i in range(131)]
    if work == "score":
        monkeypatch.setattr(scoring, "list_images", lambda *_, **__: paths)
        scoring.score_folder(run, model, tmp_path / "in", False)
    else:
        samples = [Sample(path, "good" if i else "bad", ()) for i, path in enumerate(paths)]
        category = Category("many", "mvtec", tmp_path, [], None, samples)
        monkeypatch.setattr(evaluate, "find_tests", lambda *_: (category, run, True))
        evaluate.evaluate(run, model, evaluate.Options(data="many", device="cpu"))
    assert sizes[1] - sizes[0] < 30_000, sizes  # 100 images would be 140,000, as many maps 190,000
