"""Images: files read with care, resized, kept in memory. Knows no data set and no model."""

import contextlib
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from support.appearance import appearance_of

warnings.filterwarnings("ignore", module=r"PIL\b")  # `open_image` says what matters
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
UNREAD = {".arw", ".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif"}
UNREAD |= {".jp2", ".jpe", ".jxl", ".mpo", ".nef", ".pbm", ".pgm", ".pnm", ".ppm", ".raw", ".tga"}
Size = tuple[int, int]  # (H, W)
THREADS = max(4, min(12, (os.cpu_count() or 1) - 2))  # that decode


class DataError(ValueError):
    """A file or folder is missing, damaged or unknown. The message names it and the remedy."""


def open_image(path: str | Path, black: bool = False) -> Image.Image:
    """The image in a file, in mode RGB, or I if it has 16 or 32 bits, as a mask may have. Alpha is
    dropped; with `black` transparent pixels become black. Raises DataError if the file cannot be
    read or holds several images."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow allows twice as many
                raise Image.DecompressionBombError
            # Cameras write MPO: a JPEG followed by previews of itself.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise DataError(f"{path}: holds {image.n_frames} images; save the one to use alone")
            if image.mode == "F":
                raise DataError(f"{path}: floating-point image; save it with 8 or 16 bits")
            image.load()
            with contextlib.suppress(SyntaxError, ValueError, struct.error):
                image.getexif()  # if it is damaged, it tells no orientation
            image.info.pop("exif", None)  # Pillow would write it anew, and fail at odd tags
            image = ImageOps.exif_transpose(image)
            if black and image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            return image if image.mode.startswith("I") else image.convert("RGB")
    except (DataError, MemoryError):
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
    image = open_image(path)
    if image.mode == "RGB":
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{path}: has values beyond 0 to 65535; save it with 8 or 16 bits")
    values = (values.astype(np.int32) * 255 + 32767) // 65535  # convert would clip at 255
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def to_array(image: Image.Image, size: Size) -> np.ndarray:
    """RGB image -> uint8 3×H×W of the given size, resized bilinearly with antialiasing."""
    image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by path, without hidden files and folders. Links are
    followed; a folder is entered once. A link that leads nowhere is listed: reading it says so.
    If `recursive`, images below are read too, and photos of other kinds left out, with a note on
    stderr; else they are refused. Raises DataError for them, if there is no such folder, if one
    cannot be read, or without an image."""
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
        folders[:] = sorted(name for name in folders if name[0] not in ".@")  # @eaDir: of a NAS
        for path in (os.path.join(place, name) for name in names if name[0] != "."):
            usable = os.path.isfile(path) or not os.path.exists(path)  # not a pipe
            suffix = os.path.splitext(path)[1].lower()
            if usable and suffix in SUFFIXES | UNREAD:
                (paths if suffix in SUFFIXES else unread).append(Path(path))
    pairs = set() if recursive else {path.with_suffix("") for path in paths}  # raw and JPEG
    for path in () if recursive else (*paths, *unread):
        if path.parent != folder:
            raise DataError(f"{path}: lies in a folder within {folder}; move it up, or out of it")
        if path in unread and path.with_suffix("") not in pairs:
            raise DataError(f"{path}: of a kind that is not read; save it as .png, or remove it")
    if unread:
        what = f"{len(unread)} of another kind, such as {min(unread)}"
        print(f"note: {folder}: left out {what}: save as .png or .jpg", file=sys.stderr)
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) in it")
    return sorted(paths)


def in_threads(function: Callable, arguments: range, threads: int = THREADS) -> Iterator:
    """function(i) for each i in turn, computed by threads a little before it is wanted."""
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(function, i) for i in arguments[: 2 * threads]]
        for i in arguments:
            yield pending.pop(0).result()
            if i + 2 * threads < arguments.stop:
                pending.append(pool.submit(function, i + 2 * threads))


class Images:
    """The images of `paths` by index, as uint8 arrays 3×H×W of one size. They are decoded on first
    use and kept while they fit into `cache_bytes`. With `zoom` 2 each is resized to 2H×2W and its
    centre is cut out, as the pretraining images are. One that cannot be read raises DataError; with
    `skip_bad` the next one takes its place. `appearances` of those decoded so far (without zoom)
    are by index too, and `errors` of those that cannot be read, by the index before `check`."""

    remedy = "; or leave such files out with --skip-bad-images"

    def __init__(self, paths: list[Path], size: Size, zoom=1, cache_bytes=2**32, skip_bad=False):
        self.paths, self.size, self.zoom = list(paths), size, zoom
        self.cache_bytes, self.skip_bad = cache_bytes, skip_bad
        self.kept, self.appearances, self.errors = {}, {}, {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        for i in (k % len(self) for k in range(index, index + len(self))):
            if i in self.kept:
                return self.kept[i]
            if i in self.errors and self.skip_bad:
                continue
            try:
                return self._keep(i, read_image(self.paths[i]))
            except DataError as error:
                self.errors[i] = str(error)
            if not self.skip_bad:
                raise DataError(self.errors[i] + self.remedy)
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
        """Decode all images once. With `skip_bad` the bad ones are named on stderr and taken out,
        and later no other one is. Raises DataError for one, or if none can be read."""
        decoded = in_threads(self.__getitem__, range(len(self)), 4)  # large photos take much memory
        for _ in tqdm(decoded, "decoding", len(self), unit="image"):
            pass
        self.errors = dict(sorted(self.errors.items()))
        for error in self.errors.values():
            print(f"skipped: {error}", file=sys.stderr)
        good, self.skip_bad = [i for i in range(len(self)) if i not in self.errors], False
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
