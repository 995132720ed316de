"""Evaluate a trained model on its category's test images, or score any folder of images.

    python evaluate.py                               # the newest run
    python evaluate.py --run runs/bottle-small --tiff
    python evaluate.py --run runs/bottle-small --images new_photos
    python evaluate.py --run runs/bottle-small --accept good_photos  # recalibrates

Writes into the run folder: report.html, results.json, results.md, scores.csv, overlays/ (input,
mask if the set has masks, each map) and, with --tiff, anomaly_maps/ as the official evaluation
scripts of MVTec AD and MVTec LOCO read them.
A folder of runs: python -m tools.sweep --evaluate DIR.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from baselines.simplenet import SimpleNet
from efficientad import ModelError
from support import data, metrics, report
from support.appearance import appearance_of, drift
from support.checkpoints import load_model
from support.fast import PRECISIONS
from support.images import DataError
from support.options import OptionError, option, parse_options, pick_device, share
from support.recalibration import recalibrate
from support.runs import checksum, find_run, fingerprint, lock, remove_leftovers, run_command, write
from support.scoring import fast_form, predict, read, read_back, resize, score_folder
from support.tiling import TiledEfficientAD

GOES_WITH = {"data": [""], "tiff": [""], "skip_bad_images": ["images", "accept"], "yes": ["accept"]}
GOES_WITH |= {"out": ["images", ""], "false_alarms": ["images"], "precision": ["images"]}
REPORTED = "recipe steps epochs schedule batch_size lr seed precision category data teacher".split()
REPORTED += "p_hard pretraining_images map_normalization a b accepted".split()


@dataclass
class Options:
    """Evaluate a trained model on test images, or score a folder of images."""

    run: str | None = option(None, "run folder; default the newest in runs/", metavar="DIR")
    data: str | None = option(None, "category to test on; default the run's own", metavar="DIR")
    images: str | None = option(None, "score the images in DIR instead", metavar="DIR")
    out: str | None = option(None, "folder of the results; default the run's", metavar="DIR")
    tiff: bool = option(False, "also write anomaly maps of the images' size, float32")
    skip_bad_images: bool = option(
        False, "leave out and list unreadable files of --images or --accept"
    )
    precision: str = option(
        "auto", "for --images; test images are always in fp32", choices=PRECISIONS
    )
    false_alarms: float | None = option(
        None,
        "with --images: threshold for this share of normal images, such as 1%%",
        type=share,
        metavar="X%",
    )
    accept: str | None = option(
        None, "recalibrate on the confirmed-good images in DIR", metavar="DIR"
    )
    yes: bool = option(False, "with --accept: also on images that look like defects")
    device: str | None = option(None, "cuda or cpu; default cuda if there is one")

    def __post_init__(self) -> None:
        self.device = str(pick_device(self.device))
        mode = "images" if self.images is not None else "accept" if self.accept is not None else ""
        if mode == "images" and self.accept is not None:
            raise OptionError("--images and --accept: give one of them")
        for name, modes in GOES_WITH.items():
            if mode not in modes and getattr(self, name) != getattr(Options, name):
                where = "with --" + " or --".join(modes) if "" not in modes else f"without --{mode}"
                raise OptionError(f"--{name.replace('_', '-')} goes {where}")


def load_run(run: Path, device: str | torch.device) -> nn.Module:
    """The run's calibrated model on the device, in eval mode."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    model = load_model(run / "model.pt", TiledEfficientAD, SimpleNet)
    if not model.threshold.isfinite():
        remedy = "train it with train.py, or call model.calibrate before saving"
        raise ModelError(f"{run / 'model.pt'}: not calibrated; {remedy}")
    return model.to(device, memory_format=torch.channels_last)


def find_tests(run: Path, model: nn.Module, options: Options) -> tuple[data.Category, Path, bool]:
    """The category to test on, the folder for the results, and whether it is the run's own set.
    That may have moved; it keeps its name. Results on another set lie in a folder of their own
    within the run's."""
    info, folder = model.training_info, Path(options.out or run)
    if not (options.data or info.get("data")):
        remedy = "name the category with --data"
        raise DataError(f"{run}: the model does not say what it was trained on; {remedy}")
    category = data.open_category(options.data or info["data"])
    if len({sample.defect == "good" for sample in category.test}) < 2:
        reason = "needs good and defective test images (test/good, test/<defect>)"
        raise DataError(f"{category.root}: {reason}; score a folder with --images DIR")
    place, trained = category.root.resolve(), Path(info.get("data", category.root)).resolve()
    known = info.get("appearance", {}).get("trained_on", [])
    moved = not trained.exists() and info.get("category") == category.name
    if place == trained or (moved and data.any_known(category.train, known)):
        return replace(category, name=info.get("category", category.name)), folder, True
    return category, folder / f"on-{category.name}-{fingerprint([place]):08x}", False


def evaluate(run: Path, model: nn.Module, options: Options) -> dict:
    """Evaluate a run on test images; write, print and return the results, as in results.json."""
    category, folder, own_data = find_tests(run, model, options)
    info, loco = model.training_info, category.layout == "loco"
    scale = (float(model.floor), model.threshold.item())

    # Predict: maps and scores of each image. Maps are kept in a file. `looks`: of good images.
    entries, sizes, looks, localization = [], [], [], metrics.Localization(saturated=loco)
    masked = any(sample.masks for sample in category.test)
    tiffs = folder / "anomaly_maps" / category.name
    new_tiffs = report.new_folder(tiffs) if options.tiff else nullcontext()
    new_overlays = report.new_folder(folder / "overlays")
    with new_tiffs as tiffs, new_overlays as overlays, TemporaryFile(dir=overlays) as kept:
        for sample in tqdm(category.test, "evaluating", unit="image"):
            image, images = read(sample.path, model.image_size)
            maps, scores = predict(model, images)
            if not np.isfinite(list(scores.values())).all():
                raise ModelError(f"{sample.path}: its score is not a number; train again")
            name, size = f"{sample.defect}/{sample.path.stem}", image.size[::-1]
            own, mask = next(iter(maps.values())), sample.mask(size)
            truth = category.regions(sample, size) if loco else mask
            full_map = resize(own, image.size)
            looks += [appearance_of(image)] if sample.defect == "good" else []
            if options.tiff:
                write(tiffs / "test" / f"{name}.tiff", full_map)
            localization.add(np.asarray(full_map), truth, sample.defect)
            kept.write(own.tobytes())
            sizes.append(image.size)
            entry = {"name": name, "defect": sample.defect, "scores": scores}
            entries.append(entry | report.report_entry(image, mask, maps, scale))
            shown = mask if masked else None
            write(overlays / f"{name}.png", report.overlay(image, shown, maps, scores, scale))
        if localization.located:
            localization.measure(tqdm(read_back(kept, own, sizes), "measuring", len(sizes)))

    # Measure: which images are defective, and where.
    defects = [sample.defect for sample in category.test]
    by_map = {k: np.array([e["scores"][k] for e in entries]) for k in entries[0]["scores"]}
    results = {"category": category.name, "data": str(category.root.resolve())}
    results |= metrics.image_metrics(by_map, defects, scale[1], average_types=loco)
    areas, curves = {}, {}
    if localization.located:
        areas, curves = localization.areas(), dict(localization.curves())
        results["pixel_auroc"], results["pixel_ap"] = localization.pixel_metrics()
    key, _, limit = report.AU_SPRO if loco else report.AU_PRO
    for name, by_limit in areas.items():
        entry = results if name == "overall" else results["types"][name]
        entry |= {key: by_limit[limit], f"{key}_by_limit": by_limit}

    # Write: tables, scores, the page.
    training = {"model": model.format, **model.config, **{k: info.get(k) for k in REPORTED}}
    n, known = info.get("validation_images"), info.get("appearance", {})
    expected, bound = metrics.false_alarms(n) if n else (None, None)
    promise = {"expected_false_alarms": expected, "upper_bound_95": bound}
    results |= {"training": training, "floor": scale[0], "own_data": own_data}
    results["model_checksum"] = checksum(run / "model.pt")
    results["calibration"] = {"validation_images": n, **promise}
    results["drift"] = drift(looks, known)
    seen = {*known.get("trained_on", []), *known.get("calibrated_on", [])}  # older models: none
    results["seen"] = sum(look.fingerprint in seen for look in looks) if seen else None
    report.write_results(folder, results, entries, curves)
    return results


def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, "python evaluate.py [--run DIR] [options]", argv)
    run = find_run(options.run)
    model = load_run(run, options.device)
    place = Path(options.out) if options.out else run
    place.mkdir(parents=True, exist_ok=True)
    if not place.samefile(run):
        if any(place.glob("*.pt")):
            raise DataError(f"{place}: holds another run; choose another --out")
        pictures = [place / name for name in ("overlays", "anomaly_maps", "images/overlays")]
        if any(map(Path.exists, pictures)) and not (place / ".lock").exists():
            raise DataError(f"{place}: holds pictures of another program; choose another --out")
    with lock(place / ".lock"):
        remove_leftovers(place)
        if options.accept is not None:
            recalibrate(run, model, Path(options.accept), options.yes, options.skip_bad_images)
        elif options.images is None:
            evaluate(run, model, options)
        else:
            about = Path(options.images), options.skip_bad_images, options.false_alarms
            score_folder(place / "images", fast_form(model, options.precision), *about)


if __name__ == "__main__":
    run_command(main, "evaluate.py")
