"""Images and data sets: MVTec AD, MVTec LOCO, VisA, any folder of images, and the built-in demo set. Knows no model."""

import contextlib
import csv
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from appearance import look_of

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


# ------------------------------------------------------------------------------------------------------------ the demo set
# An inspection station: a tray with four fasteners, seen from above. Each place takes one kind of part, anywhere within
# a few pixels and turned by any angle. A patch as small as the PDN's sees at most one part, so a missing, surplus or
# misplaced part looks normal everywhere, and only the arrangement of the whole image gives it away.

DEMO_PLACES = {"nut": (70, 70), "washer": (186, 70), "screw": (70, 186), "gear": (186, 186)}  # x, y in a 256² image
DEMO_LOGICAL, DEMO_STRUCTURAL = ("missing", "surplus", "misplaced"), ("scratch", "stain", "foreign")
DEMO_SPLITS = {  # folder: how many images
    "train/good": 160,
    "validation/good": 32,
    "test/good": 40,
    "test/logical_anomalies": 36,
    "test/structural_anomalies": 36,
}


def make_demo(root: str | Path, seed: int = 0) -> None:
    """Draw the demo set into the new folder `root`, in MVTec LOCO's layout: 304 RGB images of 256×256 pixels, a mask for every
    defect. The same seed draws the same images. The folder appears when it is complete."""
    root = Path(root)
    temporary = root.with_name(f".{root.name}.tmp{os.getpid()}")  # hidden: after kill -9 it must not pass for a category
    try:
        for s, (folder, count) in enumerate(DEMO_SPLITS.items()):
            kinds = {"logical_anomalies": DEMO_LOGICAL, "structural_anomalies": DEMO_STRUCTURAL}.get(folder.split("/")[1], (None,))
            (temporary / folder).mkdir(parents=True)
            for i in range(count):
                defect = kinds[i % len(kinds)]
                image, masks = draw_demo_image(np.random.default_rng((seed, s, i)), defect)
                image.save(temporary / folder / f"{i:03d}.png")
                for j, mask in enumerate(masks):
                    truth = temporary / folder.replace("test", "ground_truth") / f"{i:03d}"
                    truth.mkdir(parents=True, exist_ok=True)
                    value = 255 - (DEMO_LOGICAL + DEMO_STRUCTURAL).index(defect)
                    mask.point(lambda v, value=value: value if v > 127 else 0).save(truth / f"{j:03d}.png")
        config = [
            {"defect_name": d, "pixel_value": 255 - i, "saturation_threshold": 1.0, "relative_saturation": True}
            for i, d in enumerate(DEMO_LOGICAL + DEMO_STRUCTURAL)
        ]
        (temporary / "defects_config.json").write_text(json.dumps(config, indent=1))
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def draw_demo_image(rng: np.random.Generator, defect: str | None) -> tuple[Image.Image, list[Image.Image]]:
    """One image of the demo set, RGB 256×256, and the masks of its defect (mode L, 0 or 255), none for a normal image. `defect`
    is None or one of DEMO_LOGICAL and DEMO_STRUCTURAL."""
    scale = 2  # drawn at twice the size, for smooth edges
    canvas, masks = _tray(rng, 256 * scale), []
    parts = [[kind, *place] for kind, place in DEMO_PLACES.items()]
    if defect == "missing":
        _, x, y = parts.pop(int(rng.integers(4)))
        masks.append(_disc(x, y, 26))
    elif defect == "misplaced" and rng.random() < 0.5:  # two parts have changed places
        i, j = rng.choice(4, 2, replace=False)
        parts[i][0], parts[j][0] = parts[j][0], parts[i][0]
    elif defect == "misplaced":  # one part lies too far off, at most in the middle of the tray
        (_, x, y), share = (part := parts[rng.integers(4)]), rng.uniform(0.2, 0.9)
        masks.append(_disc(x, y, 26))
        part[1:] = x + share * (128 - x), y + share * (128 - y)
    elif defect == "surplus":
        x, y = ((128, 128), (128, 70), (70, 128), (186, 128), (128, 186))[rng.integers(5)]
        parts.append([("nut", "washer", "gear")[rng.integers(3)], x, y])
    for i, (kind, x, y) in enumerate(parts):
        alpha = _place(canvas, _part(kind, rng), x + rng.uniform(-7, 7), y + rng.uniform(-7, 7), rng)
        if (defect == "surplus" and i == 4) or (defect == "misplaced" and DEMO_PLACES[kind] != (x, y)):
            masks.append(alpha)
    if defect in DEMO_STRUCTURAL:
        masks.append(_damage(canvas, defect, rng))
    image = canvas.resize((256, 256), Image.Resampling.BOX)
    noise = rng.normal(0, 2.5, (256, 256, 3))
    light = 1 + np.add.outer(np.linspace(-1, 1, 256) * rng.uniform(-0.06, 0.06), np.linspace(-1, 1, 256) * rng.uniform(-0.06, 0.06))
    pixels = np.asarray(image, np.float64) * light[..., None] * rng.uniform(0.95, 1.05) + noise
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8)), [m.resize((256, 256)) for m in masks]


def _disc(x: float, y: float, radius: float) -> Image.Image:
    mask = Image.new("L", (512, 512))
    ImageDraw.Draw(mask).ellipse([2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)], fill=255)
    return mask


def _tray(rng: np.random.Generator, size: int) -> Image.Image:
    """Green rubber mat: a colour, coarse and fine mottling, faint ribs, dust."""
    field = np.zeros((size, size))
    for cell, strength in ((64, 3.0), (16, 3.0), (4, 5.0)):
        noise = Image.fromarray(rng.normal(0, 1, (size // cell, size // cell)).astype(np.float32))
        field += strength * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    field += 4 * np.sin(np.arange(size) * (2 * math.pi / 16) + rng.uniform(0, 6))[None, :]
    mat = np.array([70, 96, 88]) * rng.uniform(0.93, 1.07, 3) + field[..., None]
    image = Image.fromarray(np.clip(mat, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y, r in zip(rng.uniform(0, size, 40), rng.uniform(0, size, 40), rng.uniform(0.7, 2, 40)):
        tone = int(rng.integers(95, 135))
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(tone, tone + 6, tone))
    return image


def _part(kind: str, rng: np.random.Generator) -> Image.Image:
    """A part, RGBA 144×144 at twice the final scale."""
    tile = Image.new("RGBA", (144, 144))
    draw, c, tone = ImageDraw.Draw(tile), 72, rng.uniform(0.92, 1.08)

    def colour(r, g, b):
        return tuple(int(min(255, v * tone)) for v in (r, g, b)) + (255,)

    def ring(radius, width, shade):
        draw.ellipse([c - radius, c - radius, c + radius, c + radius], outline=shade, width=width)

    def corners(radii, n):
        return [(c + r * math.cos(2 * math.pi * i / n), c + r * math.sin(2 * math.pi * i / n)) for i, r in zip(range(n), radii)]

    if kind == "nut":
        draw.polygon(corners([48] * 6, 6), fill=colour(176, 146, 78), outline=colour(112, 88, 40))
        ring(41, 3, colour(222, 196, 128))
        ring(25, 4, colour(120, 96, 48))
        hole = 22
    elif kind == "washer":
        draw.ellipse([c - 44, c - 44, c + 44, c + 44], fill=colour(168, 174, 180), outline=colour(96, 100, 106))
        ring(41, 3, colour(216, 220, 226))
        ring(33, 1, colour(140, 146, 152))
        hole = 19
    elif kind == "gear":
        teeth = [r for _ in range(12) for r in (50, 50, 40, 40)]
        draw.polygon(corners(teeth, 48), fill=colour(176, 60, 48), outline=colour(104, 30, 24))
        ring(32, 3, colour(214, 104, 90))
        ring(16, 3, colour(120, 36, 28))
        hole = 13
    else:  # screw, lying
        draw.rectangle([c - 12, c - 34, c + 12, c + 60], fill=colour(120, 122, 132))
        for y in range(c - 22, c + 58, 8):
            draw.line([c - 12, y + 3, c + 12, y - 3], fill=colour(66, 68, 78), width=3)
        draw.line([c - 5, c - 34, c - 5, c + 60], fill=colour(172, 174, 184), width=2)
        draw.rounded_rectangle([c - 28, c - 60, c + 28, c - 34], 8, fill=colour(138, 140, 150), outline=colour(70, 72, 80))
        draw.line([c - 22, c - 53, c + 22, c - 53], fill=colour(196, 198, 206), width=3)
        hole = 0
    if hole:
        draw.ellipse([c - hole, c - hole, c + hole, c + hole], fill=(0, 0, 0, 0))
    return tile


def _place(canvas: Image.Image, tile: Image.Image, x: float, y: float, rng: np.random.Generator) -> Image.Image:
    """Put a part on the tray at (x, y), turned by any angle, with its shadow. Returns where it lies, as a mask."""
    tile = tile.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    corner = (round(2 * x) - 72, round(2 * y) - 72)
    alpha = tile.getchannel("A")
    shadow = alpha.filter(ImageFilter.GaussianBlur(6)).point(lambda v: v * 0.55)
    canvas.paste((18, 24, 22), (corner[0] + 7, corner[1] + 9, corner[0] + 151, corner[1] + 153), shadow)
    canvas.paste(tile.convert("RGB"), corner, alpha)
    mask = Image.new("L", canvas.size)
    mask.paste(alpha, corner)
    return mask


def _damage(canvas: Image.Image, defect: str, rng: np.random.Generator) -> Image.Image:
    """Scratch, stain or foreign object, anywhere. Returns its mask."""
    x, y = rng.uniform(50, 462, 2)
    mask = Image.new("L", canvas.size)
    draw = ImageDraw.Draw(mask)
    if defect == "scratch":  # a bent bright line with a dark rim
        angle, points = rng.uniform(0, 2 * math.pi), [(x, y)]
        for _ in range(6):
            angle += rng.uniform(-0.35, 0.35)
            x, y = x + 18 * math.cos(angle), y + 18 * math.sin(angle)
            points.append((x, y))
        width = int(rng.integers(6, 14))
        draw.line(points, fill=255, width=width, joint="curve")
        canvas.paste((30, 40, 36), mask=mask.point(lambda v: v * 0.7))
        bright = Image.new("L", canvas.size)
        ImageDraw.Draw(bright).line(points, fill=int(rng.integers(120, 256)), width=width // 2, joint="curve")
        canvas.paste((206, 214, 208), mask=bright)
    elif defect == "stain":  # oil: soft, dark, translucent
        for _ in range(6):
            r = rng.uniform(8, 20)
            dx, dy = rng.uniform(-18, 18, 2)
            draw.ellipse([x + dx - r, y + dy - r, x + dx + r, y + dy + r], fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(3))
        strength = rng.uniform(0.2, 0.7)
        canvas.paste((44, 34, 22), mask=mask.point(lambda v: v * strength))
    else:  # a chip of plastic or metal, or a fibre
        tint = [(214, 200, 60), (70, 120, 200), (222, 222, 226), (150, 80, 160)][rng.integers(4)]
        if rng.random() < 0.5:
            turns = (np.arange(6) + rng.uniform(-0.35, 0.35, 6)) * math.pi / 3
            corners = [(x + rng.uniform(7, 20) * math.cos(t), y + rng.uniform(7, 20) * math.sin(t)) for t in turns]
            draw.polygon(corners, fill=255)
        else:
            start = rng.uniform(0, 360)
            draw.arc([x - 34, y - 34, x + 34, y + 34], start, start + rng.uniform(110, 220), fill=255, width=5)
        shadow = ImageChops.offset(mask, 5, 6).filter(ImageFilter.GaussianBlur(4)).point(lambda v: v * 0.5)
        canvas.paste((18, 24, 22), mask=shadow)
        canvas.paste(tint, mask=mask)
    return mask
