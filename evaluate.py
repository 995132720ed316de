"""Evaluate a trained model on its category's test images, a folder of such runs, or score any folder of images.

    python evaluate.py                               # the newest run
    python evaluate.py --run runs/bottle-small --tiff
    python evaluate.py --run runs/bottle-small --images new_photos
    python evaluate.py --run runs/bottle-small --export model.onnx   # or model.pt2: uint8 images in, map and score out
    python evaluate.py --run runs/mvtec              # a collection: a row per category, the mean, the paper's values
    python evaluate.py --run runs/bottle-small-ablation  # tables 3 to 5

The model of a run is an EfficientAD or a SimpleNet. Writes into the run folder: report.html, results.json, results.md, scores.csv,
overlays/ (input, mask, combined, local and global map; SimpleNet has one map) and, with --tiff, anomaly maps as the official
evaluation scripts of MVTec AD and MVTec LOCO read them. A folder of runs gets summary.json and summary.md.
"""

import argparse
import copy
import csv
import io
import json
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import Category, DataError, Images, Sample, list_images, look_of, open_category, read_image, to_array, unlike
from efficientad import EfficientAD, ModelError, false_alarms, pick_device, read_checkpoint
from metrics import (
    area_under_curve,
    average_precision,
    best_f1,
    image_auroc,
    pixel_metrics,
    pro_curve,
    recall_at_fpr,
    spro_curve,
)
from report import (
    LOCALIZATION,
    QUANTILES,
    html_report,
    normalizations,
    overlay,
    report_entry,
    results_table,
    summarize_runs,
    table,
)
from runs import lock, remove_leftovers, write
from simplenet import SimpleNet

MAPS = ("combined", "local", "global")  # EfficientAD's; the first one gives the image's score


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Evaluate a trained model, or score a folder of images.")
    p.add_argument("--run", metavar="DIR", help="run folder of train.py, or a folder of such; default the newest run in runs/")
    p.add_argument("--data", help="category to test on; default the one that the model was trained on")
    p.add_argument("--images", metavar="DIR", help="score the images in this folder instead: images/scores.csv and overlays")
    p.add_argument("--tiff", action="store_true", help="also write anomaly_maps/<category>/test/<type>/<name>.tiff: float32,"
                   " original image size")
    p.add_argument("--skip-bad-images", action="store_true", help="with --images: leave out files that cannot be read and list them"
                   " in images/skipped.csv, instead of stopping")
    p.add_argument("--export", metavar="FILE", help="write the model as FILE.onnx or FILE.pt2 (torch.export) instead")
    p.add_argument("--device", help="cuda or cpu; default cuda if there is one")
    args = p.parse_args(argv)
    if args.images is not None and (args.data or args.tiff):
        p.error("--images scores unlabelled images; --data and --tiff belong to an evaluation")
    if args.skip_bad_images and args.images is None:
        p.error("--skip-bad-images goes with --images; test images that are left out would change the figures")
    if args.export and (args.data or args.tiff or args.images is not None):
        p.error("--export goes with --run alone")
    return args


def newest_run() -> Path:
    models = [*Path("runs").glob("*/model.pt"), *Path("runs").glob("*/*/model.pt")]  # the latter lie in a collection's folder
    if not models:
        raise DataError("runs/: no trained model; run train.py first, or name a run with --run")
    return max(models, key=lambda p: p.stat().st_mtime).parent


def to_tensor(image: Image.Image, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(to_array(image, size))[None].to(device, memory_format=torch.channels_last)


@torch.no_grad()
def predict(model: EfficientAD | SimpleNet, path: Path) -> tuple[Image.Image, dict[str, np.ndarray], dict[str, float]]:
    """Image file -> (RGB image, anomaly maps by name as float32 H×W of the model's image size, scores by name). The first of the
    names is the model's own map and score."""
    image = read_image(path)
    x = to_tensor(image, model.image_size, model.threshold.device)
    if isinstance(model, SimpleNet):
        m, score = model(x)
        return image, {"anomaly": m[0, 0].cpu().numpy()}, {"anomaly": score.item()}
    local_map, global_map = model.maps(x)
    combined_map, _ = model.combine(local_map, global_map)
    maps = {name: m[0, 0].cpu().numpy() for name, m in zip(MAPS, (combined_map, local_map, global_map))}
    return image, maps, {name: float(m.max()) for name, m in maps.items()}


def csv_text(header: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def summarize(scores: dict[str, np.ndarray], samples: list[Sample], category: Category, threshold: float) -> dict:
    """Image AU-ROC and average precision for each map (`scores`: by map, the image's own first): of every defect type against the
    good images, and overall: all types pooled, but for LOCO the mean of logical and structural, as its authors define it."""
    defects = np.array([s.defect for s in samples])
    types = [d for d in dict.fromkeys(defects.tolist()) if d != "good"]
    if not types or "good" not in defects:
        raise DataError(f"{category.root}: its test images need 'good' ones and at least one defect type")

    own = next(iter(scores.values()))

    def measure(which: np.ndarray) -> dict:
        entry = {"images": int(which.sum())}
        for name, values in scores.items():
            normal, anomalous = values[defects == "good"], values[which]
            suffix = "" if values is own else f"_{name}"
            entry[f"image_auroc{suffix}"] = image_auroc(normal, anomalous)
            entry[f"image_ap{suffix}"] = average_precision(normal, anomalous)
        normal, anomalous = own[defects == "good"], own[which]
        entry["best_f1"], entry["best_f1_threshold"] = best_f1(normal, anomalous)
        entry["recall_at_fpr_0.05"] = recall_at_fpr(normal, anomalous, 0.05)
        entry["detected"] = float((anomalous > threshold).mean())
        return entry

    by_type = {t: measure(defects == t) for t in types}
    overall = measure(defects != "good")
    if category.layout == "loco":
        overall |= {k: float(np.mean([by_type[t][k] for t in types])) for k in overall if k not in ("images", "best_f1_threshold")}
    alarms = float((own[defects == "good"] > threshold).mean())
    good = {"good_images": int((defects == "good").sum()), "threshold": threshold, "false_alarms": alarms}
    return {"category": category.name, **overall, **good, "types": by_type}


def localization(maps: list[np.ndarray], samples: list[Sample], category: Category) -> tuple[dict, dict]:
    """(areas, curves). Areas: AU-PRO of each defect type with the good images, and "overall", by integration limit; for LOCO
    AU-sPRO, overall the mean of the types. Curves: (fpr, pro) by type. `maps` have their images' original sizes. Both are empty
    if the category has no masks."""
    defects = [s for s in samples if s.defect != "good"]
    if not all(s.masks for s in defects):
        return {}, {}
    loco = category.layout == "loco"
    truth = [category.regions(s, m.shape) if loco else s.mask(m.shape) for s, m in zip(samples, maps)]

    def curve(chosen: set[str]) -> tuple[np.ndarray, np.ndarray]:
        which = [i for i, s in enumerate(samples) if s.defect in chosen]
        return (spro_curve if loco else pro_curve)([maps[i] for i in which], [truth[i] for i in which])

    types = dict.fromkeys(s.defect for s in defects)
    curves = {t: curve({t, "good"}) for t in types}
    limits = (0.01, 0.05, 0.1, 0.3, 1)
    areas = {t: {str(limit): area_under_curve(*c, limit) for limit in limits} for t, c in curves.items()}
    if loco:
        areas["overall"] = {str(limit): float(np.mean([areas[t][str(limit)] for t in types])) for limit in limits}
    else:
        whole = curve({*types, "good"})
        areas["overall"] = {str(limit): area_under_curve(*whole, limit) for limit in limits}
    return areas, curves


@torch.no_grad()
def ablation_scores(model: EfficientAD, category: Category) -> list[dict]:
    """Image AU-ROC under each map normalization that the paper's tables 3 to 5 want of this training: the same weights, calibrated
    anew on the validation images of the run."""
    info, device, model = model.training_info, model.threshold.device, copy.deepcopy(model)
    images, entries, raw = Images(open_category(info["data"]).split(info["seed"])[1], model.image_size, cache_bytes=0), [], {}
    images.skip_bad = info.get("skip_bad_images", False)
    if images.skip_bad:
        images.check(range(len(images)))  # leaves out what training left out
    for path in tqdm([*images.paths, *(s.path for s in category.test)], "ablation", unit="image"):
        raw[path] = model.raw_maps(to_tensor(read_image(path), model.image_size, device))
    model.raw_maps = raw.__getitem__  # calibration takes file names now: no network runs a second time
    penalty = info["pretraining_images"] != "none"
    for quantiles in normalizations(info["p_hard"], penalty):
        model.calibrate(images.paths, *(quantiles or QUANTILES), gaussian=quantiles is None)
        maps = [model.normalize_maps(*raw[s.path]) for s in category.test]
        maps = [(model.combine(*m)[0], *m) for m in maps]
        scores = {name: np.array([m[i].max().item() for m in maps]) for i, name in enumerate(MAPS)}
        auroc = summarize(scores, category.test, category, model.threshold.item())["image_auroc"]
        entries.append({"p_hard": info["p_hard"], "penalty": penalty, "quantiles": quantiles, "image_auroc": auroc})
    return entries


def scale(model: EfficientAD | SimpleNet) -> tuple[float, float]:
    """The heat colours' scale: an ordinary position's value, and the threshold in the middle."""
    return model.floor.item() if isinstance(model, SimpleNet) else 0.0, model.threshold.item()


def score_folder(run: Path, model: EfficientAD | SimpleNet, images: str, skip_bad: bool) -> None:
    """Score the images below a folder, with overlays. One image is in memory at a time."""
    threshold, usual = model.threshold.item(), model.training_info.get("usual")
    folder, rows, skipped = run / "images", [], []
    for path in tqdm(list_images(images, recursive=True), "scoring", unit="image"):
        name = str(path.relative_to(images))
        try:
            image, maps, scores = predict(model, path)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{error}; or leave such files out with --skip-bad-images") from None
            skipped.append([name, str(error)])
            continue
        odd = ", ".join(unlike(look_of(image), usual)) if usual else ""
        score, *parts = scores.values()
        rows.append([name, *(f"{s:.6f}" for s in (score, *parts)), int(score > threshold), odd])
        write(folder / "overlays" / f"{name}.png", overlay(image, None, maps, score, scale(model)))
    if not rows:
        raise DataError(f"{images}: none of its {len(skipped)} images can be read; the first: {skipped[0][1]}")
    header = ["image", "score", *(f"score_{name}" for name in list(scores)[1:]), "anomalous", "unlike_training"]
    write(folder / "scores.csv", csv_text(header, rows))
    write(folder / "skipped.csv", csv_text(["image", "reason"], skipped))
    print("".join(f"skipped: {reason}\n" for _, reason in skipped), end="", file=sys.stderr)
    print(f"{sum(row[-2] for row in rows)} of {len(rows)} images above the threshold {threshold:.4f}; {calibration_note(model)}")
    odd = [row for row in rows if row[-1]]
    if odd:
        print(f"{len(odd)} of {len(rows)} images are unlike the training images in size, colour or brightness: do not trust their"
              f" scores; the first is {odd[0][0]} ({odd[0][-1]}), the others are in the last column")  # fmt: skip
    if not usual:
        print("the model does not say how its training images looked: images unlike them are not marked")
    print(f"wrote {folder / 'scores.csv'} and {folder / 'overlays'}" + (f"; {len(skipped)} skipped" if skipped else ""))


def calibration_note(model: EfficientAD | SimpleNet) -> str:
    """What the threshold means, in words."""
    n = model.training_info.get("validation_images")
    if not n:
        return "the model does not say how many validation images it was calibrated on"
    expected, bound = (100 * share for share in false_alarms(n))
    return (f"it is the highest score of {n} validation images: expect {expected:.2g} % false alarms on normal images, with 95 %"
            f" confidence less than {bound:.2g} %")  # fmt: skip


def evaluate(run: Path, model: EfficientAD | SimpleNet, args: argparse.Namespace) -> dict:
    """Evaluate a run on its category's test images, write and print the results; returns what results.json has."""
    threshold = model.threshold.item()
    data = args.data or model.training_info.get("data")
    if not data:
        raise DataError(f"{run}: the model does not say what it was trained on; name the category with --data")
    category = open_category(data)
    if not category.test:
        raise DataError(f"{category.root}: no test images (test/good, test/<defect>); score a folder with --images DIR")
    rows, full_maps, entries = [], [], []
    for sample in tqdm(category.test, "evaluating", unit="image"):
        image, maps, scores = predict(model, sample.path)
        name, (score, *parts) = f"{sample.defect}/{sample.path.stem}", scores.values()
        rows.append([name, sample.defect, score, *parts, int(score > threshold)])
        mask = sample.mask(image.size[::-1])
        entry = {"name": name, "defect": sample.defect, "score": score}
        entries.append(entry | report_entry(image, mask, maps, scale(model)))
        write(run / "overlays" / f"{name}.png", overlay(image, mask, maps, score, scale(model)))
        full_map = Image.fromarray(next(iter(maps.values()))).resize(image.size, Image.Resampling.BILINEAR)
        full_maps.append(np.asarray(full_map))
        if args.tiff:
            write(run / "anomaly_maps" / category.name / "test" / f"{name}.tiff", full_map)
    scores = {name: np.array([row[2 + i] for row in rows]) for i, name in enumerate(scores)}
    results = summarize(scores, category.test, category, threshold)
    key, _, limit = LOCALIZATION[category.layout == "loco"]
    areas_by_type, curves = localization(full_maps, category.test, category)
    if areas_by_type:
        masks = [s.mask(m.shape) for s, m in zip(category.test, full_maps)]
        results["pixel_auroc"], results["pixel_ap"] = pixel_metrics(full_maps, masks)
    for name, areas in areas_by_type.items():
        (results if name == "overall" else results["types"][name]).update({key: areas[limit], f"{key}_by_limit": areas})
    keys = ("backbone", "noise", "adaptor", "layers") if isinstance(model, SimpleNet) else ("size",)
    info = {"model": "simplenet" if isinstance(model, SimpleNet) else "efficientad", **{k: model.config[k] for k in keys}}
    info |= {k: model.training_info.get(k) for k in ("image_size", "steps", "epochs", "seed", "precision", "category")}
    results |= {"training": info, "floor": scale(model)[0]}
    n = model.training_info.get("validation_images")
    expected, bound = false_alarms(n) if n else (None, None)
    results["calibration"] = {"validation_images": n, "expected_false_alarms": expected, "upper_bound_95": bound}
    if model.training_info.get("ablation"):
        results["ablation"] = [] if isinstance(model, SimpleNet) else ablation_scores(model, category)
    header = ["image", "defect", "score", *(f"score_{name}" for name in list(scores)[1:]), "anomalous"]
    write(run / "scores.csv", csv_text(header, rows))
    cells = results_table(results)
    note = f"percent; threshold {threshold:.4f}: {calibration_note(model)}"
    write(run / "results.md", f"{table(cells)}\n\n{note}\n")
    origin = ", ".join(f"{k} {v}" for k, v in info.items() if k != "category" and v is not None)
    origin += f"; {note.removeprefix('percent; ')}"
    write(run / "report.html", html_report(results, origin, cells, entries, curves))
    text = json.dumps(results, indent=1) + "\n"
    write(run / "results.json", text)  # last: with it the evaluation counts as done
    print(table(cells))
    print(note)
    print(f"wrote {run / 'report.html'}, results.json, results.md, scores.csv and overlays/")
    return json.loads(text)


def evaluate_runs(folder: Path, runs: list[Path], args: argparse.Namespace) -> None:
    """Evaluate each run of a collection, of several seeds or of an ablation that has no results newer than its model, then write
    and print the summary. A run that fails does not stop the rest; it makes the exit status 1, as does an unfinished one."""
    if args.data or args.images or args.export:
        raise DataError(f"{folder}: is a folder of runs; --data, --images and --export take one of them, such as --run {runs[0]}")
    results, failed = [], {}
    for run in runs:
        try:
            path = run / "results.json"
            known = path.exists() and path.stat().st_mtime >= (run / "model.pt").stat().st_mtime and not args.tiff
            known = known and json.loads(path.read_text())
            if known and known["category"] == known["training"].get("category"):  # else of another --data
                results.append(known)
                continue
            print(f"{run}:", file=sys.stderr)
            model = load(run, args.device)
            with lock(run / ".lock"):
                remove_leftovers(run)
                results.append(evaluate(run, model, args))
        except Exception as error:
            if not isinstance(error, (DataError, ModelError, OSError)):
                traceback.print_exc()
            failed[run.name] = str(error)
    begun = [d for d in folder.iterdir() if d.is_dir() and (holds_run(d) or not any(d.iterdir()))]
    unfinished = sorted(d.name for d in begun if not (d / "model.pt").exists())
    failed |= dict.fromkeys(unfinished, "not trained to the end")

    try:
        content, sections = summarize_runs(results) if results else ({"collections": []}, {})
    except ValueError as error:
        raise DataError(f"{folder}: {error}") from None
    text = "\n\n".join(f"### {title}\n\n{table(rows)}" for title, rows in sections.items()) + "\n"
    text += "".join(f"\nfailed: {name}: {reason}\n" for name, reason in failed.items())
    write(folder / "summary.json", json.dumps(content | {"failed": failed}, indent=1) + "\n")
    write(folder / "summary.md", text)
    print(f"\n{text}\nwrote {folder / 'summary.json'} and summary.md")
    if failed:
        raise SystemExit(1)


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("log.jsonl", "resume.pt", "model.pt"))


def load(run: Path, device: torch.device) -> EfficientAD | SimpleNet:
    """The run's calibrated model on the device; the file says which of the two it is."""
    path = str(run / "model.pt")
    model = (SimpleNet if read_checkpoint(path).get("format") == "simplenet" else EfficientAD).load(path)
    if not model.threshold.isfinite():
        raise ModelError(f"{run / 'model.pt'}: not calibrated; train it with train.py, or call model.calibrate before saving")
    return model.to(device, memory_format=torch.channels_last)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    run = Path(args.run) if args.run else newest_run()
    runs = [] if (run / "model.pt").exists() else sorted(path.parent for path in run.glob("*/model.pt"))
    if runs:
        evaluate_runs(run, runs, args)
        return
    model = load(run, args.device)
    if args.export:
        from export import export  # imported here: it takes a second

        export(model, Path(args.export))
        return
    with lock(run / ".lock"):
        remove_leftovers(run)
        if args.images is not None:
            score_folder(run, model, args.images, args.skip_bad_images)
        else:
            evaluate(run, model, args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        main()
    except (DataError, ModelError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nevaluate.py: interrupted", file=sys.stderr)
        sys.exit(130)
