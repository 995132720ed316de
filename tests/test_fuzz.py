"""Damaged input: only the documented errors come out. Each fourth is undamaged and is accepted.

    FUZZ_CASES=3000 python -m pytest tests/test_fuzz.py      # of each kind; by default 40

A case is a function of its number and of FUZZ_SEED: a failure names both and can be repeated.
"""

import contextlib
import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import put
from PIL import Image

from efficientad import EfficientAD, ModelError
from support import checkpoints
from support.data import open_category
from support.images import SUFFIXES, DataError, read_image

CASES, SEED = int(os.environ.get("FUZZ_CASES", 40)), int(os.environ.get("FUZZ_SEED", 0))
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
MODES = {"PNG": ("RGB", "L", "1", "P", "RGBA", "LA"), "BMP": ("RGB", "P", "1")}
MODES |= {"JPEG": ("RGB", "L", "CMYK"), "TIFF": ("RGB", "CMYK", "1", "I", "LAB"), "WEBP": ("RGB",)}


def damaged(rng: np.random.Generator, content: bytes, other: bytes) -> bytes:
    """A few damages of the usual kinds; `other` is a file to splice from."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        i, j = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        j, k = min(j, i + int(rng.choice([1, 4, 30, 10**6]))), int(rng.integers(len(other)))
        changes = [
            (len(content), b""),  # cut off
            (j, b""),
            (i, content[i:j]),  # repeated
            (j, rng.bytes(j - i)),
            (j, other[k : k + j - i]),
            (i + 4, int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big")),
            (i + 1, bytes([int(rng.choice([0, 1, 64, 127, 128, 255]))])),
        ]
        end, new = changes[rng.integers(len(changes))]
        content[i:end] = new
    return bytes(content)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Images:
    """Image files: an RGB image, or DataError."""

    def __init__(self):
        self.files = [encoded(RGB.convert(mode), kind) for kind in MODES for mode in MODES[kind]]
        for name in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits"):
            self.files.append(encoded(RGB, "TIFF", compression=name))
        exif = Image.Exif()
        exif[0x0112] = 6
        self.files.append(encoded(RGB, "JPEG", exif=exif, progressive=True))
        self.files.append(encoded(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)]))

    def case(self, rng, folder: Path, whole: bool) -> None:
        content, other = (self.files[i] for i in rng.integers(len(self.files), size=2))
        content = content if whole else damaged(rng, content, other)
        path = put(folder / f"image{rng.choice(sorted(SUFFIXES))}", content)
        image = read_image(path)
        assert image.mode == "RGB" and np.asarray(image).shape == (*image.size[::-1], 3)


class Layouts:
    """Trees of the known layouts, disarranged: a category that is sound, or DataError."""

    def __init__(self):
        black, gray, white = (encoded(Image.new("L", (4, 4), value)) for value in (0, 9, 255))
        config = b'[{"pixel_value": 9, "saturation_threshold": 0.5, "relative_saturation": true}]'
        rows = ["object,split,label,image,mask"]
        rows += [f"part,train,normal,part/Data/Images/Normal/{i}.png," for i in range(2)]
        rows += ["part,test,anomaly,part/Data/Images/Anomaly/0.png,part/Data/Masks/Anomaly/0.png"]
        images = "Data/Images"
        files = {
            "mvtec": "train/good/0 train/good/1 test/good/a test/dent/b ground_truth/dent/b_mask",
            "loco": "train/good/0 validation/good/0 test/good/a test/dent/b ground_truth/dent/b/0",
            "visa": f"{images}/Normal/0 {images}/Normal/1 {images}/Anomaly/0 Data/Masks/Anomaly/0",
            "folder": "a sub/b",
        }
        self.trees = {k: {f"part/{n}.png": gray for n in v.split()} for k, v in files.items()}
        self.trees["loco"]["part/defects_config.json"] = config
        self.trees["visa"]["split_csv/1cls.csv"] = "\n".join(rows).encode()
        self.junk = [b"", b"junk", black, white, b"[1]", b'[{"pixel_value": 9}]', b"object,split"]
        self.junk += ["folder", "loop", None]

    def disarranged(self, rng, tree: dict) -> dict:
        names = "test/dent/b.jpg train test/good ground_truth/good/a.png x/train/good".split()
        names = [*tree, "part", *(f"part/{name}" for name in names)]
        for _ in range(rng.integers(1, 4)):
            name, content = names[rng.integers(len(names))], self.junk[rng.integers(len(self.junk))]
            if isinstance(tree.get(name), bytes) and rng.random() < 0.4:
                content = damaged(rng, tree[name], b"\xff[]{},\n0train")
            tree = tree | {name: content}
        return tree

    def case(self, rng, folder: Path, whole: bool) -> None:
        layout, root = str(rng.choice(list(self.trees))), folder / "tree"
        tree = self.trees[layout] if whole else self.disarranged(rng, self.trees[layout])
        for name, content in tree.items():
            with contextlib.suppress(OSError):  # a file where a folder should be
                if content == "folder":
                    (root / name).mkdir(parents=True)
                elif content == "loop":
                    (root / name).symlink_to((root / name).parent)
                elif content is not None:
                    put(root / name, content)
        place = "part" if whole else rng.choice(["part", ".", "part/test", "part/train", "nowhere"])
        try:
            assert self.read(root / str(place)) == layout or not whole
        finally:
            shutil.rmtree(root, ignore_errors=True)  # it may not exist

    def read(self, place: Path) -> str:
        """Read all of a category; returns its layout."""
        category = open_category(place)
        train, validation = category.split(0)
        assert train and validation and not {*train} & {*validation}
        if category.layout == "folder":
            names = {name for path in train for name in path.relative_to(place).parts}
            assert not {"train", "test", "ground_truth"} & names
        for sample in category.test:
            size = read_image(sample.path).size[::-1]
            assert sample.mask(size).any() == bool(sample.masks)
            regions = category.regions(sample, size) if category.layout == "loco" else []
            assert all(1 <= saturation <= mask.sum() for mask, saturation in regions)
        return category.layout


class Checkpoints:
    """Damaged files, and valid files of wrong content: a model of finite numbers, or ModelError."""

    def __init__(self):
        buffer, state = io.BytesIO(), {"a": torch.ones(3), "b": torch.zeros(2, 2).half()}
        torch.save({"format": "x", "state": state, "n": [1, (2.5, None)]}, buffer)
        self.file = buffer.getvalue()
        self.others = [self.file, *(pickle.dumps(x, 2) for x in ({"a": 1}, [print, 1]))]
        self.model = EfficientAD(image_size=(128, 128)).checkpoint()
        self.junk = [None, 0, -1, 2.5, "x", [], {}, (160, 128), "medium", ([],), torch.ones(2)]

    def case(self, rng, folder: Path, whole: bool) -> None:
        path, other = folder / "model.pt", self.others[rng.integers(len(self.others))]
        put(path, self.file if whole else damaged(rng, self.file, other))
        spoiled = self.model if whole else self.spoiled(rng)
        assert isinstance(checkpoints.read_checkpoint(path), dict)
        if rng.random() < 0.3:  # slower
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checkpoints, "read_checkpoint", lambda path: spoiled)
                state = checkpoints.load_model(path, EfficientAD).state_dict()
            assert checkpoints.all_finite(v for k, v in state.items() if k != "threshold")

    def spoiled(self, rng) -> dict:
        content = {k: dict(v) if isinstance(v, dict) else v for k, v in self.model.items()}
        part = (content, content["config"], content["state"])[rng.integers(3)]
        key, value = str(rng.choice(list(part))), self.junk[rng.integers(len(self.junk))]
        if isinstance(part[key], torch.Tensor) and rng.random() < 0.5:
            value = part[key] * float(rng.choice([np.nan, np.inf, 2]))
        part[key] = value
        return content


@pytest.mark.parametrize("kind", [Images, Layouts, Checkpoints])
@pytest.mark.filterwarnings("ignore")
def test_fuzz(kind, tmp_path):
    cases = kind()
    for i in range(CASES):
        whole = i % 4 == 0
        try:
            cases.case(np.random.default_rng((SEED, i)), tmp_path, whole)
        except (DataError, ModelError) as error:
            text = str(error)
            assert str(tmp_path) in text and "\n" not in text and not whole, (i, SEED, text)
        except Exception as error:
            raise AssertionError(f"case {i} of FUZZ_SEED={SEED}: {error}") from error
