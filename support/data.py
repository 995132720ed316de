"""Data sets: MVTec AD, MVTec LOCO, VisA, folders, the demo set. Knows no model."""

import contextlib
import csv
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support.appearance import appearance_of, appearance_range
from support.demo import make_demo
from support.images import SUFFIXES, DataError, Images, Size, list_images, open_image, read_image

NORMAL = {"good", "normal", "ok"}  # names of folders, in whatever case
OTHERS = {"abnormal", "anomaly", "anomalies", "bad", "defect", "defective", "defects", "ko", "ng"}
OTHERS |= {"ground_truth", "label", "labels", "mask", "masks", "test", "train"}
OTHERS |= {"overlays", "anomaly_maps"}  # evaluate.py's
OTHERS |= {f"test_{part}" for part in ("public", "private", "private_mixed")}  # MVTec AD 2
MASKS = SUFFIXES - {".jpg", ".jpeg", ".webp"}  # those blur a mask's edge
MASK_ENDING = re.compile("_(mask|gt|label)$", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """A test image: its file, its defect type ("good", or the name of its folder) and its masks."""

    path: Path
    defect: str = "good"
    masks: tuple[Path, ...] = ()

    def mask(self, size: Size) -> np.ndarray:
        """Union of the defect's masks, bool H×W of the image's own size. Raises DataError if a mask
        has another size, is empty or cannot be read."""
        return np.any([np.zeros(size, bool), *(mask > 0 for mask in self.mask_values(size))], 0)

    def mask_values(self, size: Size) -> list[np.ndarray]:
        """The defect's masks as they are stored, integer H×W each; see `mask`."""
        pixels = [np.asarray(open_image(file, black=True)) for file in self.masks]
        masks = [mask.max(-1) if mask.ndim == 3 else mask for mask in pixels]
        for file, mask in zip(self.masks, masks):
            if not mask.any():
                raise DataError(f"{file}: the mask of a defect is empty; mend it or drop the image")
            if mask.shape != size:
                shapes = "mask of {1}×{0} for an image of {3}×{2}".format(*mask.shape, *size)
                raise DataError(f"{file}: {shapes}")
        return masks


@dataclass(frozen=True)
class Category:
    """A data set: normal training images, normal validation images (None: held out of the training
    images, see `split`), test images. `layout` is "mvtec", "loco", "visa" or "folder" (any folder
    of normal images; it has no test images)."""

    name: str
    layout: str
    root: Path
    train: list[Path]
    validation: list[Path] | None = None
    test: list[Sample] = field(default_factory=list)

    def __post_init__(self):
        known = {}
        for sample in self.test:  # their masks and results have these names, without the ending
            other = known.setdefault((sample.defect, sample.path.stem), sample)
            if other is not sample:
                raise DataError(f"{sample.path}: has the name of {other.path}; rename one of them")

    def split(self, seed: int) -> tuple[list[Path], list[Path]]:
        """(training, validation) images: the set's own, else 10 % of the training images, drawn by
        `seed`, are held out. Raises DataError if there are fewer than two."""
        if self.validation is not None:
            return self.train, self.validation
        n = len(self.train)
        if n < 2:
            raise DataError(f"{self.root}: only {n} normal image; training needs at least 2")
        order = np.random.default_rng(seed).permutation(n)
        held_out = set(order[: max(1, round(0.1 * n))].tolist())
        training = [path for i, path in enumerate(self.train) if i not in held_out]
        return training, [self.train[i] for i in sorted(held_out)]

    def regions(self, sample: Sample, size: Size) -> list[tuple[np.ndarray, float]]:
        """MVTec LOCO's defect regions of an image: (mask bool H×W, saturation area in pixels), one
        for each mask file. Its pixel value names the defect in defects_config.json. Raises
        DataError if that file is missing, damaged or lacks the defect."""
        path = self.root / "defects_config.json"
        try:
            entries = json.loads(path.read_bytes())
            keys = ("saturation_threshold", "relative_saturation")
            config = {int(e["pixel_value"]): tuple(float(e[key]) for key in keys) for e in entries}
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            origin = "it comes with MVTec LOCO and names the defects"
            raise DataError(f"{path}: missing or damaged; {origin}") from None
        regions = []
        for file, values in zip(sample.masks, sample.mask_values(size)):
            value, area = int(values.max()), int((values > 0).sum())
            if value not in config:
                raise DataError(f"{file}: pixel value {value} is not in {path}")
            threshold, relative = config[value]
            saturation = threshold * area if relative else min(threshold, area)
            if not 1 <= saturation <= area:  # NaN neither
                impossible = f"saturation threshold {threshold:g} is impossible"
                raise DataError(f"{path}: {impossible} for {file} with {area} pixels")
            regions.append((values > 0, int(saturation) if relative else saturation))
        return regions


def any_known(paths: list[Path], fingerprints: list[int]) -> bool:
    """Whether one of the first 20 image files has one of these fingerprints of its pixels, or there
    are none, as older models know none."""
    for path in paths[:20] if fingerprints else []:
        with contextlib.suppress(DataError):  # a damaged one tells nothing
            if appearance_of(read_image(path)).fingerprint in fingerprints:
                return True
    return not fingerprints


def open_category(data: str | Path) -> Category:
    """Recognize a data set by its layout: MVTec AD (train/good, test/…, ground_truth/…), MVTec LOCO
    (defects_config.json too), VisA (as downloaded, or in MVTec layout), or a folder of normal
    images. "demo" is the built-in set, drawn into datasets/demo when it is not there. Raises
    DataError for anything else."""
    root = Path("datasets/demo" if data == "demo" else data)
    if data == "demo" and not root.exists():
        try:
            make_demo(root)
        except OSError as error:
            if not root.is_dir():  # nor has another process drawn it meanwhile
                reason = f"the demo set cannot be drawn here ({error.strerror})"
                raise DataError(f"{root}: {reason}; name a data set with --data") from None
    if not root.is_dir():
        choice = "a category's folder, a folder of normal images, or 'demo'"
        raise DataError(f"{root}: no such folder; --data takes {choice}")
    place, name = root.resolve(), Path(os.path.abspath(root)).name  # a link has its own name
    if (root / "Data/Images/Normal").is_dir():
        return _open_visa(root, place.name)
    if (root / "train").is_dir():
        for part in ("train", "validation", "test", "test_public"):
            for path in (root / part).glob("[!.]*"):
                if path.is_dir() and path.name != "good" and path.name.lower() in NORMAL:
                    reason = "the folder of normal images has the name good; rename it"
                    raise DataError(f"{path}: {reason}")
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    reason = f"belongs into a folder of {part}, such as {part}/good"
                    raise DataError(f"{path}: {reason}, or out of it")
        own, loco = root / "validation/good", (root / "defects_config.json").exists()
        if not (root / "train/good").is_dir():
            raise DataError(f"{root}: its normal images belong into train/good, but there is none")
        validation = list_images(own) if own.is_dir() else None
        train, test = list_images(root / "train/good"), _mvtec_test(root, loco)
        return Category(name, "loco" if loco else "mvtec", root, train, validation, test)
    categories = ", ".join(map(str, list_categories(root)))
    if categories:
        raise DataError(f"{root}: holds several categories; choose one: {categories}")
    parts, paths, images = OTHERS - {"train"}, list_images(root, recursive=True), {}
    inside = any(p.name in parts and (p.parent / "train").is_dir() for p in (place, place.parent))
    alone = len({path.relative_to(root).parts[0] for path in paths}) == 1  # ok/, and nothing else
    normal = {"good"} if alone else NORMAL
    remedy = "--data takes normal images alone, or a category's folder, which holds train/good"
    for path in paths:  # defects and masks must not pass for normal images
        folders = [folder.lower() for folder in path.relative_to(root).parts[:-1]]
        if inside or OTHERS.intersection(folders) or normal.intersection(folders[:1]):
            reason = "lies in a part of a data set, by its folder's name"
            raise DataError(f"{path}: {reason}; {remedy}")
        other = images.setdefault(MASK_ENDING.sub("", str(path.with_suffix(""))), path)
        if other is not path:
            raise DataError(f"{path}: may be a mask of {other.name}, or that of it; rename one")
    return Category(name, "folder", root, paths)


def list_categories(data: str | Path) -> list[Path]:
    """The category folders in a collection's folder (such as MVTec AD's), sorted; empty for
    anything else, such as a single category."""

    def is_category(folder: Path) -> bool:
        parts = ("train", "Data/Images/Normal")
        return any(os.path.isdir(folder / part) for part in parts)  # False where it may not look

    if data == "demo" or not Path(data).is_dir() or is_category(Path(data)):
        return []
    return sorted(d for d in Path(data).iterdir() if d.name[0] != "." and is_category(d))


def _mvtec_test(root: Path, loco: bool) -> list[Sample]:
    """Test images of an MVTec layout. A mask is ground_truth/<type>/<name>_mask.png (MVTec AD),
    …/<name>.png (VisA), or every file in the folder …/<name> (LOCO)."""
    samples, place, truth = [], root / "test", root / "ground_truth"
    if not place.is_dir():  # MVTec AD 2
        place, truth = root / "test_public", root / "test_public/ground_truth"
    folders = place.iterdir() if place.is_dir() else []
    for folder in sorted(d for d in folders if d.is_dir() and d.name[0] not in ".@" and d != truth):
        if folder.name == "overall":
            raise DataError(f"{folder}: the figures of all types have this name; rename the folder")
        files = (truth / folder.name).glob("[!.]*")
        known = {file.stem: file for file in files if file.suffix.lower() in MASKS}
        for path in list_images(folder):
            own = truth / folder.name / path.stem
            masks = [known[n] for n in (f"{path.stem}_mask", path.stem) if n in known][:1]
            if loco:
                masks = list_images(own) if own.is_dir() else []
            if folder.name == "good":
                for mask in masks:
                    if np.asarray(open_image(mask, black=True)).any():
                        where = "marks a defect in an image of test/good"
                        raise DataError(f"{mask}: {where}; move the image or remove the mask")
                masks = []
            elif truth.is_dir() and not masks:  # without any masks there are no pixel metrics
                mask = f"its mask {own}{'' if loco else '_mask.png'} is missing"
                remedy = f"add it, or take {truth} away" if loco or not own.is_dir() else ""
                raise DataError(f"{path}: {mask}; {remedy or 'copy defects_config.json as well'}")
            samples.append(Sample(path, folder.name, tuple(masks)))
    return samples


def _open_visa(root: Path, name: str) -> Category:
    """VisA as downloaded: <VisA>/<category>/Data/…, split by <VisA>/split_csv/1cls.csv."""
    visa = root.resolve().parent
    table, train, test = visa / "split_csv/1cls.csv", [], []
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["object"] == name]
        for row in rows:
            masks = (visa / row["mask"],) if row["mask"] else ()
            defect = "good" if row["label"] == "normal" else "bad"
            sample = Sample(visa / row["image"], defect, masks)
            (train if row["split"] == "train" else test).append(sample)
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        origin = "it comes with VisA and has the columns object, split, label, image and mask"
        raise DataError(f"{table}: missing or damaged; {origin}") from None
    if not train:
        raise DataError(f"{table}: has no training images of '{name}'")
    masked = any(sample.masks for sample in test)  # without any masks there are no pixel metrics
    for sample in train:
        if sample.defect != "good":
            raise DataError(f"{table}: {sample.path.name} is an anomaly to train on; mend its row")
    for sample in test:
        if masked and (sample.defect == "good") == bool(sample.masks):
            reason = "is normal and has a mask" if sample.masks else "is an anomaly without a mask"
            raise DataError(f"{table}: {sample.path.name} {reason}; mend its row")
    test.sort(key=lambda sample: (sample.defect, sample.path))
    return Category(
        name, "visa", root.resolve(), sorted({sample.path for sample in train}), None, test
    )


@dataclass
class NormalImages:
    """The normal images of a category, decoded; see `load_normal_images`."""

    category: Category
    training: Images
    validation: Images
    skipped: list[str]  # why images were left out: training images first
    appearance: dict  # `appearance_range` of all; fingerprints by "trained_on", "calibrated_on"


def load_normal_images(data: str, size: Size, seed: int, skip_bad: bool) -> NormalImages:
    """Open a category, split its normal images by `seed` and decode every one, so that a damaged
    one is found before hours of work. With `skip_bad` it is left out and named on stderr instead.
    Raises DataError as `open_category`, `Category.split` and `Images.check` do."""
    category = open_category(data)
    if category.test and not any(sample.defect == "good" for sample in category.test):
        remedy = "put good test images into test/good to evaluate the model"
        print(f"note: {category.root}: all test images are defective; {remedy}", file=sys.stderr)
    parts = category.split(seed)
    training, validation = (Images(paths, size, skip_bad=skip_bad) for paths in parts)
    for images in (training, validation):
        images.check()
    kept = [array.max() for images in (training, validation) for array in images.kept.values()]
    if max(kept, default=255) < 32:
        reason = f"no pixel is brighter than {max(kept)} of 255, as with 12 bits in files of 16"
        print(f"note: {category.root}: {reason}: scale the images", file=sys.stderr)
    skipped = [*training.errors.values(), *validation.errors.values()]
    trained_on, held_out = (list(images.appearances.values()) for images in (training, validation))
    appearance = appearance_range(trained_on + held_out)
    appearance["trained_on"] = sorted(a.fingerprint for a in trained_on)
    appearance["calibrated_on"] = sorted(a.fingerprint for a in held_out)
    known = {*appearance["trained_on"]}
    copies = [i for i, look in validation.appearances.items() if look.fingerprint in known]
    if copies:
        path, n = validation.paths[copies[0]], f"{len(copies)} of {len(validation)}"
        reason = f"{n} validation images are copies of training images, such as {path}"
        remedy = "the threshold is too low; remove copies"
        print(f"note: {category.root}: {reason}: {remedy}", file=sys.stderr)
    return NormalImages(category, training, validation, skipped, appearance)
