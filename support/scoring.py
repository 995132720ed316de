"""Scores of image files: one for evaluation, a folder of unlabelled ones as fast as possible."""

import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from efficientad import EfficientAD, ModelError
from support import report
from support.appearance import Appearance, appearance_of, differences, drift
from support.fast import optimize
from support.images import SUFFIXES, DataError, in_threads, list_images, read_image, to_array
from support.metrics import p_value, threshold_for
from support.runs import fingerprint, threshold_meaning, write


def fast_form(model: nn.Module, precision: str) -> nn.Module:
    """The fast form of EfficientAD or SimpleNet; "fp32" leaves a model as it is. A note says where
    int8 cannot run."""
    if precision == "fp32":
        return model
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        ours = isinstance(model, EfficientAD)
        fast = optimize(model, precision) if ours else model.optimize(precision)
    for note in notes:
        print(f"note: {note.message}", file=sys.stderr)
    return fast


def read(path: Path, size: tuple[int, int]) -> tuple[Image.Image, Tensor]:
    """Image file -> RGB image, and what a model of this image size takes, uint8 1×3×H×W."""
    image = read_image(path)
    return image, torch.from_numpy(to_array(image, size))[None]


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> tuple[dict, dict]:
    """uint8 1×3×H×W -> anomaly maps by name (float32 H×W of the model's image size), scores by
    name. The model's own map and score are the first ones."""
    images = images.to(model.threshold.device, memory_format=torch.channels_last)
    maps, scores = model.predict(images)
    maps = {name: m[0, 0].float().cpu().numpy() for name, m in maps.items()}
    return maps, {name: score.item() for name, score in scores.items()}


def resize(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Map h×w -> the map of an image of `size` (W, H)."""
    return Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)


def read_back(file: BinaryIO, like: np.ndarray, sizes: list) -> Iterator[Image.Image]:
    """The maps that a file holds, of `like`'s shape and type, each at its image's size (W, H)."""
    file.seek(0)
    for size in sizes:
        stored = np.frombuffer(file.read(like.nbytes), like.dtype)
        yield resize(stored.reshape(like.shape), size)


def read_ahead(paths: list[Path], size: tuple[int, int]) -> Iterator[tuple]:
    """(image, model's input) or a DataError for each path, decoded by a thread."""

    def attempt(i: int) -> tuple | DataError:
        try:
            return read(paths[i], size)
        except DataError as error:
            return error

    return in_threads(attempt, range(len(paths)), threads=1)


def judge(info: dict, threshold: float, score: float, look: Appearance) -> tuple:
    """(p-value or None, how the image differs from the known normal images, what to do with it):
    "reject" above the threshold (or NaN), "check" what is unlike those images or has a p-value up
    to 0.1, else "ok". `info`: the model's training_info."""
    known, looks = info.get("scores"), info.get("appearance")
    p, odd = p_value(score, known) if known else None, differences(look, looks) if looks else []
    if not score <= threshold:
        return p, odd, "reject"
    return p, odd, "check" if odd or (p is not None and p <= 0.1) else "ok"


def threshold_at(model: nn.Module, rate: float | None) -> tuple[float, str]:
    """The threshold for this rate of false alarms, or the model's, and what it promises. Raises
    ModelError if the model cannot tell that rate."""
    info, threshold = model.training_info, model.threshold.item()
    if rate is None:
        return threshold, threshold_meaning(info.get("validation_images"))
    known = info.get("scores", [])
    try:
        margin = max(0, threshold - max(known, default=0))  # as `EfficientAD.set_quantiles` has it
        threshold = threshold_for(rate, known) + margin
    except ValueError as error:
        raise ModelError(f"--false-alarms: {error}; choose a higher share") from None
    share = f"at most {100 * rate:g} % false alarms"
    return threshold, f"expect {share}, by the {len(known)} images that it was calibrated on"


def score_folder(
    place: Path, model: nn.Module, folder: Path, skip_bad: bool, rate: float | None = None
) -> None:
    """Score the images below a folder, with overlays, into `place`. Decoding, scoring and overlays
    have a thread each, and a few images are in memory at a time. `rate`: see `threshold_at`. Raises
    DataError for an image that cannot be read (with `skip_bad` it is left out and listed), or if
    the folder holds `place` or lies in its overlays."""
    own, images = Path(os.path.realpath(place)), Path(os.path.realpath(folder))
    if images in (own, *own.parents) or own / "overlays" in (images, *images.parents):
        raise DataError(f"{place}: overlays would lie among the images; choose another --out")
    info, (threshold, meaning) = model.training_info, threshold_at(model, rate)
    scale, known_looks = (float(model.floor), threshold), info.get("appearance")
    paths, rows, skipped, began = list_images(folder, recursive=True), [], [], time.time()
    looks, entries = [], []
    with report.new_folder(place / "overlays") as overlays, ThreadPoolExecutor(1) as pool:
        decoded, pending = read_ahead(paths, model.image_size), []
        for path, found in zip(tqdm(paths, "scoring", unit="image"), decoded):
            name = str(path.relative_to(folder))
            if isinstance(found, DataError):
                if not skip_bad:
                    remedy = "or leave such files out with --skip-bad-images"
                    raise DataError(f"{found}; {remedy}")
                print(f"skipped: {found}", file=sys.stderr)
                skipped.append([name, str(found)])
                continue
            image, images = found
            maps, scores = predict(model, images)
            score = next(iter(scores.values()))
            looks.append(appearance_of(image))
            p, odd, decision = judge(info, threshold, score, looks[-1])
            anomalous = int(decision == "reject")
            rows.append([name, *scores.values(), p, decision, anomalous, ", ".join(odd)])
            about = {"name": name, "score": score if math.isfinite(score) else None, "p_value": p}
            about |= {"verdict": decision, "unlike": ", ".join(odd)}
            overlay = overlays / overlay_name(name)
            arguments = (about, overlay, image, (maps, scores), scale)
            pending.append(pool.submit(draw_overlay, *arguments))
            if len(pending) > 2:
                entries = report.worst([*entries, pending.pop(0).result()])
        entries = report.worst([*entries, *(drawing.result() for drawing in pending)])
        if not rows:
            reason = f"none of its {len(skipped)} images can be read; the first: {skipped[0][1]}"
            raise DataError(f"{folder}: {reason}")
    speed = len(rows) / (time.time() - began)
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        hidden = any(part[0] == "." for part in file.parts)
        if not hidden and file.suffix.lower() not in SUFFIXES:
            skipped.append([file, "a file of another kind"])
    header = ["image", *report.scores_header(scores), "p_value", "verdict", "anomalous"]
    content = {"model": report.label(model.config), "category": folder.resolve().name}
    content |= {"origin": f"threshold {threshold:.4f}: {meaning}", "images": entries}
    content |= {"floor": scale[0], "threshold": threshold}
    report.write_scores(place, [[*header, "unlike_training"], *rows], skipped, content)
    if not known_looks:
        print("how its images looked is not in the model: unusual images are not marked")
    elif change := drift(looks, known_looks):
        remedy = "the threshold is not for them; recalibrate with --accept DIR, or train anew"
        print(f"{change} than the known normal images: {remedy}")
    how = [getattr(model, name, "") for name in ("precision", "choice")]
    print(f"{speed:.1f} images/s, {'; '.join(filter(None, how)) or 'fp32'}")


def overlay_name(name: str) -> Path:
    """The file of an image's overlay; a file system's names have 255 bytes at most."""
    path = Path(f"{name}.png")
    too_long = len(os.fsencode(path.name)) > 255
    return path.with_name(f"{path.name[:40]}-{fingerprint([path]):08x}.png") if too_long else path


def draw_overlay(entry: dict, path: Path, image: Image.Image, found: tuple, scale: tuple) -> dict:
    """Write an image's overlay from its maps and scores. Returns the entry with its pictures for
    the report."""
    write(path, report.overlay(image, None, *found, scale))
    return entry | report.report_entry(image, None, found[0], scale)
