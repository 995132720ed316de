"""Images and data sets: MVTec AD, MVTec LOCO, VisA, folders, the demo set. Knows no model."""

import contextlib
import csv
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from support.appearance import appearance_of, appearance_range
from support.demo import make_demo

warnings.filterwarnings("ignore", module=r"PIL\b")  # `_open_image` says what matters
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
UNREAD = {".arw", ".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".raw"}
NORMAL = {"good", "normal", "ok"}  # names of folders, in whatever case
OTHERS = {"abnormal", "anomaly", "anomalies", "bad", "defect", "defective", "defects", "ko", "ng"}
OTHERS |= {"ground_truth", "label", "labels", "mask", "masks", "test", "train"}
OTHERS |= {f"test_{part}" for part in ("public", "private", "private_mixed")}  # MVTec AD 2
MASKS = SUFFIXES - {".jpg", ".jpeg", ".webp"}  # those blur a mask's edge
MASK_ENDING = re.compile("_(mask|gt|label)$", re.IGNORECASE)
Size = tuple[int, int]  # (H, W)


class DataError(ValueError):
    """A file or folder is missing, damaged or unknown. The message names it and the remedy."""


def _open_image(path: str | Path) -> Image.Image:
    """The image in a file, in mode RGB, or I if it has 16 or 32 bits; see `read_image`."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow allows twice as many
                raise Image.DecompressionBombError
            # Cameras write MPO: a JPEG followed by previews of itself.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise DataError(f"{path}: holds {image.n_frames} images; save the one to use alone")
            if image.mode == "F":
                raise DataError(f"{path}: floating-point image; save it with 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            return image if image.mode.startswith("I") else image.convert("RGB")
    except DataError:
        raise
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "not an image that Pillow can read; remove it or save it again"
    except Image.DecompressionBombError:
        reason = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down first"
    except Exception as error:  # decoders of damaged files raise all kinds
        words = " ".join(str(error).split()) or type(error).__name__
        reason = f"damaged image ({words}); remove it or save it again"
        if isinstance(error, OSError) and error.errno:
            reason = f"cannot be read ({error.strerror})"
    raise DataError(f"{path}: {reason}")


def read_image(path: str | Path) -> Image.Image:
    """Any image file -> RGB image, 8 bit. Gray, palette, CMYK and 1-bit files are converted, alpha
    is dropped, 16-bit gray is scaled by 255/65535, and EXIF orientation is applied. Raises
    DataError if the file cannot be read or holds several images."""
    image = _open_image(path)
    if image.mode == "RGB":
        return image
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)  # convert would clip at 255
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def to_array(image: Image.Image, size: Size) -> np.ndarray:
    """RGB image -> uint8 3×H×W of the given size, resized bilinearly with antialiasing."""
    image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by path, without hidden files and folders. Links are
    followed; a folder is entered once. A link that leads nowhere is listed: reading it says so.
    Photos of other kinds are left out, with a note on stderr. Raises DataError if there is no such
    folder, if one cannot be read, or without an image."""
    folder, paths, entered, unread = Path(folder), [], set(), []
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.is_file() else "no such folder"
        raise DataError(f"{folder}: {reason}")

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in entered:  # links may lead around in circles
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if name[0] != ".") if recursive else []
        for path in (os.path.join(place, name) for name in names if name[0] != "."):
            usable = os.path.isfile(path) or not os.path.exists(path)  # not a pipe
            suffix = os.path.splitext(path)[1].lower()
            if usable and suffix in SUFFIXES | UNREAD:
                (paths if suffix in SUFFIXES else unread).append(Path(path))
    if unread:
        what = f"{len(unread)} of another kind, such as {min(unread)}"
        print(f"note: {folder}: left out {what}: save as .png or .jpg", file=sys.stderr)
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) in it")
    return sorted(paths)


class Images:
    """The images of `paths` by index, as uint8 arrays 3×H×W of one size. They are decoded on first
    use and kept while they fit into `cache_bytes`. With `zoom` 2 each is resized to 2H×2W and its
    centre is cut out, as the pretraining images are. One that cannot be read raises DataError; with
    `skip_bad` the next one takes its place. `appearances` of those decoded so far (without zoom)
    are by index too, and `errors` of those that cannot be read, by the index before `check`."""

    def __init__(self, paths: list[Path], size: Size, zoom=1, cache_bytes=2**32, skip_bad=False):
        self.paths, self.size, self.zoom = list(paths), size, zoom
        self.cache_bytes, self.skip_bad = cache_bytes, skip_bad
        self.kept, self.appearances, self.errors = {}, {}, {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.decode(index)

    def decode(self, index: int) -> np.ndarray:
        for i in (k % len(self) for k in range(index, index + len(self))):
            if i in self.kept:
                return self.kept[i]
            try:
                return self._keep(i, read_image(self.paths[i]))
            except DataError as error:
                self.errors[i] = str(error)
            if not self.skip_bad:
                raise DataError(f"{self.errors[i]}; or leave such files out with --skip-bad-images")
        raise DataError(f"none of {len(self)} images can be read; the last: {self.errors[i]}")

    def _keep(self, index: int, image: Image.Image) -> np.ndarray:
        if self.zoom == 1 and index not in self.appearances:  # of photos it is not used
            self.appearances[index] = appearance_of(image)
        (height, width), zoom = self.size, self.zoom
        array = to_array(image, (height * zoom, width * zoom))
        top, left = (height * zoom - height) // 2, (width * zoom - width) // 2
        array = np.ascontiguousarray(array[:, top : top + height, left : left + width])
        if (len(self.kept) + 1) * array.nbytes <= self.cache_bytes:
            self.kept[index] = array
        return array

    def check(self) -> None:
        """Decode all images once. With `skip_bad` the bad ones are named on stderr and taken out.
        Raises DataError for one, or if none can be read."""
        for i in tqdm(range(len(self)), "decoding", unit="image"):
            self.decode(i)
        for error in self.errors.values():
            print(f"skipped: {error}", file=sys.stderr)
        good = [i for i in range(len(self)) if i not in self.errors]
        self.paths = [self.paths[i] for i in good]
        self.kept = {n: self.kept[i] for n, i in enumerate(good) if i in self.kept}
        self.appearances = {n: self.appearances[i] for n, i in enumerate(good)}


class PhotographCrops:
    """Stand-in for a folder of pretraining images: `count` square crops of the two photographs that
    scikit-learn ships, each a function of its index, as uint8 arrays 3×H×W."""

    def __init__(self, size: Size, count: int = 1000):
        from sklearn.datasets import load_sample_images  # imported here: it takes a second

        self.photographs = [Image.fromarray(array) for array in load_sample_images().images]
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        rng, image = np.random.default_rng(index), self.photographs[index % len(self.photographs)]
        side = rng.uniform(0.3, 1) * min(image.size)
        x, y = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
        box = (x, y, x + side, y + side)
        return to_array(image.resize(self.size[::-1], Image.Resampling.BILINEAR, box), self.size)


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
        pixels = [np.asarray(_open_image(file)) for file in self.masks]
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
        except OSError:  # another process has drawn it meanwhile
            if not root.is_dir():
                raise
    if not root.is_dir():
        choice = "a category's folder, a folder of normal images, or 'demo'"
        raise DataError(f"{root}: no such folder; --data takes {choice}")
    place, name = root.resolve(), Path(os.path.abspath(root)).name  # a link has its own name
    if (root / "Data/Images/Normal").is_dir():
        return _open_visa(root, place.name)
    if (root / "train").is_dir():
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
        return (folder / "train").is_dir() or (folder / "Data/Images/Normal").is_dir()

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
    for folder in sorted(d for d in folders if d.is_dir() and d.name[0] != "." and d != truth):
        if folder.name == "overall":
            raise DataError(f"{folder}: the figures of all types have this name; rename the folder")
        if folder.name != "good" and folder.name.lower() in NORMAL:
            raise DataError(f"{folder}: the folder of normal images has the name good; rename it")
        files = (truth / folder.name).glob("[!.]*")
        known = {file.stem: file for file in files if file.suffix.lower() in MASKS}
        for path in list_images(folder):
            own = truth / folder.name / path.stem
            masks = [known[n] for n in (f"{path.stem}_mask", path.stem) if n in known][:1]
            if loco:
                masks = list_images(own) if own.is_dir() else []
            if folder.name == "good":
                for mask in masks:
                    if np.asarray(_open_image(mask)).any():
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
    return Category(name, "visa", root, sorted({sample.path for sample in train}), None, test)


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
    skipped = [*training.errors.values(), *validation.errors.values()]
    trained_on, held_out = (list(images.appearances.values()) for images in (training, validation))
    appearance = appearance_range(trained_on + held_out)
    appearance["trained_on"] = sorted(a.fingerprint for a in trained_on)
    appearance["calibrated_on"] = sorted(a.fingerprint for a in held_out)
    return NormalImages(category, training, validation, skipped, appearance)
