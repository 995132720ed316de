"""Recalibration of a trained model on images that a person has confirmed as good."""

import statistics
import sys
from pathlib import Path

from torch import nn

from support.appearance import appearance_range
from support.calibration import calibrate
from support.checkpoints import write_checkpoint
from support.images import DataError, Images, list_images
from support.runs import threshold_meaning, write
from support.scoring import judge, predict
from support.training import one_by_one


def recalibrate(run: Path, model: nn.Module, folder: Path, confirmed: bool, skip_bad: bool) -> None:
    """Set quantiles, threshold and p-values of the run's model anew from the good images below a
    folder, all that calibration then rests on, and print whose verdict changes. The former model
    stays in the run as model-1.pt, model-2.pt, … Raises DataError for a training image among them,
    whose score says nothing about new ones, and, unless `confirmed`, for one that looks like a
    defect: as far above the threshold as that is above the median known score, or farther."""
    images = Images(list_images(folder, recursive=True), model.image_size, skip_bad=skip_bad)
    images.check()
    info, looks = model.training_info, list(images.appearances.values())
    trained_on = set(info.get("appearance", {}).get("trained_on", []))
    if not trained_on:
        unknown = "an older model; whether it was trained on some of them cannot be told"
        print(f"note: {unknown}", file=sys.stderr)
    for path, look in zip(images.paths, looks):
        if look.fingerprint in trained_on:
            remedy = "the model was trained on it, so its score is too low: take such images out"
            raise DataError(f"{path}: {remedy}")
    batches = one_by_one(images, model.threshold.device, "scoring")
    scores = [next(iter(predict(model, x)[1].values())) for x in batches]
    threshold, known = model.threshold.item(), info.get("scores", [])
    before = [judge(info, threshold, s, look)[2] for s, look in zip(scores, looks)]
    if known and not confirmed:
        limit = 2 * threshold - statistics.median(known)
        odd = [f"{path} ({s:.3f})" for path, s in zip(images.paths, scores) if not s <= limit]
        if odd:
            problem = f"above the threshold of {threshold:.3f} by far, like a defect"
            remedy = "take defects out, or confirm with --yes"
            raise DataError(f"{', '.join(odd)}: {problem}; {remedy}")
    had_int8 = "int8" in info
    how = info.get("map_normalization", "quantile"), info.get("a", 0.9), info.get("b", 0.995)
    scores = calibrate(model, images, *how)
    fingerprints = sorted(look.fingerprint for look in looks)
    kept = {"trained_on": sorted(trained_on), "calibrated_on": fingerprints}
    info |= {"validation_images": len(images), "accepted": str(folder.resolve())}
    info["appearance"] = appearance_range(looks) | kept
    number = 1
    while (run / f"model-{number}.pt").exists():
        number += 1
    write(run / f"model-{number}.pt", (run / "model.pt").read_bytes())
    write_checkpoint(model.cpu().checkpoint(), run / "model.pt")
    threshold, changed = model.threshold.item(), 0
    for path, old, score, look in zip(images.paths, before, scores, looks):
        new = judge(info, threshold, score, look)[2]
        if old != new:
            changed += 1
            print(f"{path.relative_to(folder)}: {old} -> {new}")
    print(f"{changed} of {len(images)} verdicts change")
    if had_int8 and "int8" not in info:
        print("note: int8 is not calibrated: that takes a CPU with VNNI", file=sys.stderr)
    print(f"threshold {threshold:.4f}: {threshold_meaning(len(images))}")
    print(f"wrote {run / 'model.pt'}; the former one is model-{number}.pt")
