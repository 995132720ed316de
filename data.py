"""Images and data sets: MVTec AD, MVTec LOCO, VisA, any folder of images, the demo set of demo.py. Knows no model."""

import contextlib
import csv
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps, ImageStat, UnidentifiedImageError

from demo import make_demo

warnings.filterwarnings("ignore", module=r"PIL\b")  # damaged metadata, many pixels: `open_image` says what matters
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class DataError(ValueError):
    """A folder or file is missing, damaged or laid out in an unknown way; the message names it and the remedy."""


# ------------------------------------------------------------------------------------------------------------------ images


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """The image in a file, decoded, still in its own mode. Raises DataError if it cannot be read, for whatever reason: decoders of
    damaged files raise all kinds of errors, and so may a conversion inside the `with` block. A file of several images is refused
    too, since none of them is the obvious one; MPO is not: cameras write it, a JPEG followed by previews of itself."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow warns, and raises at twice as many
                raise Image.DecompressionBombError
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise DataError(f"{path}: holds {image.n_frames} images (animated, or pages); save the one to use by itself")
            image.load()
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image that Pillow can read; remove it or save it again") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged image ({reason}); remove it or save it again") from None


def read_image(path: str | Path) -> Image.Image:
    """Any image file -> RGB image, 8 bit. Gray, palette, CMYK and 1-bit files are converted, alpha is dropped, 16-bit gray is
    scaled by 255/65535, and EXIF orientation is applied. Raises DataError if the file cannot be read."""
    with open_image(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit gray; convert("RGB") would clip it at 255
            values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        elif image.mode == "F":
            raise DataError(f"{path}: floating-point image; save it with 8 or 16 bits a channel")
        return image.convert("RGB")


def to_array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """RGB image -> uint8 3×H×W of the given (H, W), resized bilinearly with antialiasing."""
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by path; hidden ones are left out. Links are followed, a folder is entered once. A link
    that leads nowhere is listed: reading it says so. Raises DataError if there is no such folder, if one cannot be read, or if
    there is no image."""
    folder, paths, entered = Path(folder), [], set()
    if not folder.is_dir():
        raise DataError(f"{folder}: " + ("is a file, not a folder" if folder.is_file() else "no such folder"))

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)
        key = (status.st_dev, status.st_ino)
        if key in entered:  # links may lead around in circles
            folders.clear()
            continue
        entered.add(key)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        images = [os.path.join(place, n) for n in names if os.path.splitext(n)[1].lower() in SUFFIXES and not n.startswith(".")]
        paths += [p for p in images if os.path.isfile(p) or (os.path.islink(p) and not os.path.exists(p))]
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) in it")
    return sorted(map(Path, paths))


class Images:
    """The images of `paths` by index, as uint8 arrays 3×H×W of one size: decoded on first use, and kept while they fit into
    `cache_bytes`. With `zoom` 2 each is resized to 2H×2W and its centre is cut out, as the pretraining images are. `looks` holds
    the looks of those decoded so far, by index. With `skip_bad` the next one takes the place of one that cannot be read; `errors`
    says why, by index."""

    def __init__(self, paths: list[Path], size: tuple[int, int], zoom: int = 1, cache_bytes: int = 4 * 2**30):
        self.paths, self.size, self.zoom, self.kept = list(paths), size, zoom, {}
        self.room, self.skip_bad, self.looks, self.errors = cache_bytes // (3 * size[0] * size[1]), False, {}, {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        if index in self.kept:
            return self.kept[index]
        (h, w), z, image = self.size, self.zoom, self._read(index)
        image = to_array(image, (h * z, w * z))
        top, left = (h * z - h) // 2, (w * z - w) // 2
        image = np.ascontiguousarray(image[:, top : top + h, left : left + w])
        if len(self.kept) < self.room:
            self.kept[index] = image
        return image

    def _read(self, index: int) -> Image.Image:
        for i in (*range(index, len(self)), *range(index)):
            try:
                image = read_image(self.paths[i])
                if i not in self.looks:
                    self.looks[i] = look_of(image)
                return image
            except DataError as error:
                if not self.skip_bad:
                    raise DataError(f"{error}; or leave such files out with --skip-bad-images") from None
                self.errors[i] = str(error)
        raise DataError(f"none of {len(self)} images can be read; the last: {self.errors[index - 1 if index else len(self) - 1]}")

    def check(self, indices: Iterable[int]) -> None:
        """Decode all images once (`indices`: all of them, say behind a progress bar), so that a damaged one is found now and not an
        hour later. With `skip_bad` such are taken out. Raises DataError for one that cannot be read, or if none can."""
        for i in indices:
            self[i]
        good = [i for i in range(len(self)) if i not in self.errors]
        self.paths = [self.paths[i] for i in good]
        self.kept, self.looks = ({n: d[i] for n, i in enumerate(good) if i in d} for d in (self.kept, self.looks))


class PhotographCrops:
    """Stand-in for a folder of pretraining images: `count` square crops, each a function of its index, of the two photographs
    that scikit-learn ships, as uint8 arrays 3×H×W."""

    def __init__(self, size: tuple[int, int], count: int = 1000):
        from sklearn.datasets import load_sample_images  # imported here: it takes a second

        self.photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        rng, image = np.random.default_rng(index), self.photographs[index % len(self.photographs)]
        side = rng.uniform(0.3, 1) * min(image.size)
        x, y = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
        image = image.resize(self.size[::-1], Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# --------------------------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Sample:
    """A test image: its file, its defect type ("good", or the name of its folder) and the files of its masks, if any."""

    path: Path
    defect: str = "good"
    masks: tuple[Path, ...] = ()

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """Union of the defect's masks, bool H×W of the image's own size (H, W). Raises DataError if a mask has another."""
        return np.any([np.zeros(size, bool), *(values > 0 for values in self.mask_values(size))], 0)

    def mask_values(self, size: tuple[int, int]) -> list[np.ndarray]:
        """The defect's masks as they are stored, integer H×W each; see `mask`."""
        values = []
        for path in self.masks:
            with open_image(path) as image:
                if image.mode in ("P", "1"):
                    image = image.convert("L")
                elif "A" in image.getbands():
                    image = image.convert("RGB")
                elif image.mode == "F":
                    raise DataError(f"{path}: floating-point mask; save it with 8 bits")
                mask = np.asarray(image)
            mask = mask.max(-1) if mask.ndim == 3 else mask
            if not mask.any():
                raise DataError(f"{path}: the mask of a defect is empty; mend it or remove the image")
            if mask.shape != size:
                raise DataError(f"{path}: mask of {mask.shape[1]}×{mask.shape[0]} for an image of {size[1]}×{size[0]}")
            values.append(mask)
        return values


@dataclass(frozen=True)
class Category:
    """A data set: normal training images, normal validation images (None: to be held out of training, see `split`) and test
    images. `layout` is "mvtec", "loco", "visa" or "folder" (any folder of normal images; it has no test images)."""

    name: str
    layout: str
    root: Path
    train: list[Path]
    validation: list[Path] | None = None
    test: list[Sample] = field(default_factory=list)

    def split(self, seed: int) -> tuple[list[Path], list[Path]]:
        """(training, validation) images: the set's own, else 10 % of the training images, drawn by `seed`, are held out.
        Raises DataError if there are fewer than two."""
        if self.validation is not None:
            return self.train, self.validation
        n = len(self.train)
        if n < 2:
            raise DataError(f"{self.root}: only {n} normal image; training and validation need at least 2")
        order = np.random.default_rng(seed).permutation(n)
        held_out = set(order[: max(1, round(0.1 * n))].tolist())
        return [p for i, p in enumerate(self.train) if i not in held_out], [self.train[i] for i in sorted(held_out)]

    def regions(self, sample: Sample, size: tuple[int, int]) -> list[tuple[np.ndarray, float]]:
        """MVTec LOCO's defect regions of an image: (mask bool H×W, saturation area in pixels), one for each mask file; its
        pixel value names the defect in defects_config.json. Raises DataError if that file is missing or lacks the defect."""
        path = self.root / "defects_config.json"
        try:
            entries = json.loads(path.read_bytes())
            keys = ("saturation_threshold", "relative_saturation")
            config = {int(entry["pixel_value"]): tuple(float(entry[key]) for key in keys) for entry in entries}
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise DataError(f"{path}: missing or damaged; it comes with MVTec LOCO and names the defects") from None
        regions = []
        for file, values in zip(sample.masks, sample.mask_values(size)):
            value, area = int(values.max()), int((values > 0).sum())
            if value not in config:
                raise DataError(f"{file}: pixel value {value} is not in {path}")
            threshold, relative = config[value]
            saturation = threshold * area if relative else min(threshold, area)
            if not 1 <= saturation <= area:  # NaN neither
                raise DataError(f"{path}: saturation threshold {threshold:g} is impossible for {file} with {area} pixels")
            regions.append((values > 0, int(saturation) if relative else saturation))
        return regions


def open_category(path: str | Path) -> Category:
    """Recognize a data set by its layout: MVTec AD (train/good, test/…, ground_truth/…), MVTec LOCO (defects_config.json too),
    VisA (as downloaded, or in MVTec layout), or a folder of normal images. "demo" is the built-in set, drawn into datasets/demo
    when it is not there. Raises DataError for anything else."""
    root = Path(path)
    if str(path) == "demo":
        root = Path("datasets/demo")
        if not root.exists():
            try:
                make_demo(root)
            except OSError:  # another process has drawn it meanwhile
                if not root.is_dir():
                    raise
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data takes a category's folder, a folder of normal images, or 'demo'")
    name = root.resolve().name
    if (root / "Data/Images/Normal").is_dir():
        return _open_visa(root, name)
    if (root / "train").is_dir():
        train, loco = list_images(root / "train/good"), (root / "defects_config.json").exists()
        validation = list_images(root / "validation/good") if (root / "validation/good").is_dir() else None
        return Category(name, "loco" if loco else "mvtec", root, train, validation, _mvtec_test(root, loco))
    categories = list_categories(root)
    if categories:
        raise DataError(f"{root}: holds several categories; choose one: {', '.join(map(str, categories))}")
    paths, place = list_images(root, recursive=True), root.resolve()
    inside = any(p.name in ("test", "ground_truth") and (p.parent / "train").is_dir() for p in (place, place.parent))
    for path in paths:  # defects and masks must not pass for normal images
        folders = path.relative_to(root).parts[:-1]
        if inside or {"train", "test", "ground_truth"} & set(folders) or "good" in folders[:1]:
            raise DataError(f"{path}: lies in a part of a data set; --data takes a category's folder, which holds train/good")
    return Category(name, "folder", root, paths)


def list_categories(path: str | Path) -> list[Path]:
    """The category folders in a collection's folder (MVTec AD's, VisA's or MVTec LOCO's, say), sorted; empty if `path` is
    anything else, a single category for one."""
    root, marks = Path(path), ("train", "Data/Images/Normal")
    if str(path) == "demo" or not root.is_dir() or any((root / mark).is_dir() for mark in marks):
        return []
    return sorted(d for d in root.iterdir() if not d.name.startswith(".") and any((d / mark).is_dir() for mark in marks))


def _mvtec_test(root: Path, loco: bool) -> list[Sample]:
    """Test images of an MVTec layout. A mask is ground_truth/<type>/<name>_mask.png (MVTec AD), …/<name>.png (VisA), or every
    file in the folder …/<name> (LOCO)."""
    samples, with_masks = [], (root / "ground_truth").is_dir()  # a set without masks is fine: then there are no pixel metrics
    if not (root / "test").is_dir():
        return []
    for folder in sorted(d for d in (root / "test").iterdir() if d.is_dir()):
        for path in list_images(folder):
            stem, end = root / "ground_truth" / folder.name / path.stem, "" if loco else "_mask.png"
            if loco:
                masks = list_images(stem) if stem.is_dir() else []
            else:
                masks = [mask for mask in (Path(f"{stem}_mask.png"), Path(f"{stem}.png")) if mask.exists()]
            if folder.name == "good":
                for mask in masks:  # all black: harmless
                    with open_image(mask) as image:
                        if image.convert("L").getbbox():
                            raise DataError(f"{mask}: marks a defect in an image of test/good; move the image or remove the mask")
                masks = []
            elif with_masks and not masks:
                raise DataError(f"{path}: its mask {stem}{end} is missing")
            samples.append(Sample(path, folder.name, tuple(masks)))
    return _distinct(samples)


def _distinct(samples: list[Sample]) -> list[Sample]:
    """The samples. Raises DataError if two of a type differ in the file's ending alone: they would share masks and results."""
    known = {}
    for sample in samples:
        other = known.setdefault((sample.defect, sample.path.stem), sample)
        if other is not sample:
            raise DataError(f"{sample.path}: has the name of {other.path}; rename one of them")
    return samples


def _open_visa(root: Path, name: str) -> Category:
    """VisA as downloaded: <VisA>/<category>/Data/…, split by <VisA>/split_csv/1cls.csv."""
    table = root.resolve().parent / "split_csv/1cls.csv"
    if not table.is_file():
        raise DataError(f"{table}: missing; it comes with VisA and names the training and test images")
    train, test = [], []
    try:
        with open(table, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["object"] == name:
                    image, mask = table.parent.parent / row["image"], row["mask"]
                    if row["split"] == "train":
                        train.append(image)
                    else:
                        defect = "good" if row["label"] == "normal" else "bad"
                        test.append(Sample(image, defect, (table.parent.parent / mask,) if mask else ()))
    except (KeyError, TypeError, ValueError, csv.Error):
        raise DataError(f"{table}: damaged; it comes with VisA and has the columns object, split, label, image and mask") from None
    if not train:
        raise DataError(f"{table}: has no training images of '{name}'")
    return Category(name, "visa", root, sorted(train), None, _distinct(sorted(test, key=lambda s: (s.defect, s.path))))


# --------------------------------------------------------------------------------------------------------- how images look

Look = tuple[int, int, bool, float]  # width, height, gray?, mean brightness 0–255


def look_of(image: Image.Image) -> Look:
    """RGB image -> its look. Gray is what all three channels show alike: the network sees no more of a file's mode."""
    red, green, blue = image.split()
    gray = not ImageChops.difference(red, green).getbbox() and not ImageChops.difference(red, blue).getbbox()
    return image.width, image.height, gray, ImageStat.Stat(image.convert("L")).mean[0]


def range_of(looks: list[Look]) -> dict:
    """The looks of the training images -> what is usual, to be kept with the model: {"width", "height", "aspect", "brightness":
    [least, greatest], "gray": share of gray images}. Raises ValueError without an image."""
    if not looks:
        raise ValueError("what is usual needs at least one image")
    widths, heights, gray, brightness = zip(*looks)
    values = {"width": widths, "height": heights, "aspect": [w / h for w, h, *_ in looks], "brightness": brightness}
    return {name: [min(v), max(v)] for name, v in values.items()} | {"gray": sum(gray) / len(gray)}


def unlike(look: Look, usual: dict) -> list[str]:
    """In what an image differs from the training images, in words; empty if in nothing. Size and shape beyond theirs; gray among
    coloured ones or coloured among gray ones; darker or brighter than all of them by more than a quarter of their range, and by
    more than 5 of 255: a new image lies a little outside the range of n others by chance, with probability 2/(n + 1)."""
    width, height, gray, brightness = look
    reasons, (least, greatest) = [], usual["brightness"]
    sizes = {"width": width, "height": height, "aspect": width / height}
    if any(not usual[name][0] <= value <= usual[name][1] for name, value in sizes.items()):
        reasons.append(f"size {width}×{height}")
    if usual["gray"] == (0 if gray else 1):
        reasons.append("gray" if gray else "coloured")
    margin = max(5, (greatest - least) / 4)
    if not least - margin <= brightness <= greatest + margin:
        reasons.append(f"{'darker' if brightness < least else 'brighter'}: {brightness:.0f}")
    return reasons
