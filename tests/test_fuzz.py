"""Random and mutated input: only the documented errors may come out, and properties must hold.

    FUZZ_CASES=3000 python -m pytest tests/test_fuzz.py      # of each of the five kinds; by default 40

A case is a function of its number (and FUZZ_SEED): a failure names the number and can be repeated.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import efficientad
from data import SUFFIXES, DataError, list_categories, list_images, open_category, read_image
from efficientad import EfficientAD, ModelError, all_finite, quantile, read_checkpoint
from metrics import (
    area_under_curve,
    au_pro,
    au_spro,
    average_precision,
    best_f1,
    image_auroc,
    pixel_metrics,
    pro_curve,
    recall_at_fpr,
)

CASES, SEED = int(os.environ.get("FUZZ_CASES", 40)), int(os.environ.get("FUZZ_SEED", 0))


def mutated(rng: np.random.Generator, content: bytes, other: bytes) -> bytes:
    """A few damages of the usual kinds; `other` is a file to splice from."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        i, j = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        j = min(j, i + int(rng.choice([1, 4, 30, 10**6])))
        k = int(rng.integers(0, len(other)))
        match rng.integers(8):
            case 0:
                del content[i:]
            case 1:
                del content[i:j]
            case 2:
                content[i:i] = content[i:j]
            case 3:
                content[i:j] = rng.bytes(j - i)
            case 4:
                content[i : i + 4] = int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big")
            case 5:
                content[i:j] = other[k : k + j - i]
            case 6 if i < len(content):
                content[i] ^= 1 << int(rng.integers(8))
            case 7:
                content[i : i + 1] = bytes([int(rng.choice([0, 127, 128, 255]))])
    return bytes(content)


# ------------------------------------------------------------------------------------------------------------------- cases


def encoded_images() -> list[bytes]:
    """Small valid files of many formats and modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    rgb, files = Image.fromarray(pixels), []
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, kind, options in (
        *((rgb.convert(mode), "PNG", {}) for mode in ("RGB", "L", "1", "P", "RGBA", "LA")),
        *((rgb.convert(mode), "TIFF", {}) for mode in ("RGB", "CMYK", "1", "F", "I", "LAB")),
        *((rgb, "TIFF", {"compression": c}) for c in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")),
        *((rgb.convert(mode), "JPEG", {}) for mode in ("RGB", "L", "CMYK")),
        *((rgb, "WEBP", {"lossless": lossless}) for lossless in (True, False)),
        *((rgb.convert(mode), "BMP", {}) for mode in ("RGB", "P", "1")),
        (deep, "PNG", {}), (deep, "TIFF", {}), (rgb, "JPEG", {"exif": exif, "progressive": True}),
        *((rgb, kind, {"save_all": True, "append_images": [rgb]}) for kind in ("PNG", "WEBP", "TIFF", "GIF", "MPO")),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


class Images:
    """Mutated image files: an RGB image, or DataError."""

    def __init__(self):
        self.files = encoded_images()

    def case(self, rng, folder: Path) -> None:
        pick = [self.files[i] for i in rng.integers(0, len(self.files), 2)]
        path = folder / f"image{rng.choice(sorted(SUFFIXES))}"
        path.write_bytes(mutated(rng, *pick))
        try:
            image = read_image(path)
            assert image.mode == "RGB" and np.asarray(image).shape == (*image.size[::-1], 3)
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def png(value: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


class Layouts:
    """Trees of the known layouts, disarranged: a category whose parts are what they should be, or DataError."""

    def __init__(self):
        image = png()
        base = dict.fromkeys((f"part/{name}.png" for name in ("train/good/0", "train/good/1", "test/good/a", "test/dent/b")), image)
        config = [{"pixel_value": 9, "saturation_threshold": 0.5, "relative_saturation": True}]
        table = "object,split,label,image,mask\n" + "".join(
            f"part,{split},{label},part/Data/Images/{name}.png,{mask}\n"
            for split, label, name, mask in (("train", "normal", "Normal/0", ""), ("train", "normal", "Normal/1", ""),
                                             ("test", "anomaly", "Anomaly/0", "part/Data/Masks/Anomaly/0.png"))
        )  # fmt: skip
        self.trees = [
            base | {"part/ground_truth/dent/b_mask.png": png(255)},
            base | {"part/ground_truth/dent/b/0.png": png(9), "part/validation/good/0.png": image,
                    "part/defects_config.json": json.dumps(config).encode()},
            {f"part/Data/{name}.png": image for name in ("Images/Normal/0", "Images/Normal/1", "Images/Anomaly/0",
                                                         "Masks/Anomaly/0")}
            | {"split_csv/1cls.csv": table.encode()},
            {"part/a.png": image, "part/sub/b.jpg": image},
        ]  # fmt: skip

    def case(self, rng, folder: Path) -> None:
        tree = dict(self.trees[rng.integers(len(self.trees))])
        names = [*tree, "part/test/dent/b.jpg", "part/train", "part/test/good", "part/ground_truth/good/a.png", "part",
                 "part/x/train/good"]  # fmt: skip
        contents = [b"", b"junk", png(0), png(255), b"[1]", b'[{"pixel_value": 9}]', b"object,split\n", "folder", "loop", None]
        for _ in range(rng.integers(0, 4)):
            name, content = names[rng.integers(len(names))], contents[rng.integers(len(contents))]
            if isinstance(tree.get(name), bytes) and rng.random() < 0.4:
                content = mutated(rng, tree[name], b"\xff[]{},\n0train")
            tree[name] = content
        root = folder / "tree"
        for name, content in tree.items():
            try:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                if content == "folder":
                    (root / name).mkdir()
                elif content == "loop":
                    (root / name).symlink_to((root / name).parent)
                elif content is not None:
                    (root / name).write_bytes(content)
            except OSError:  # a file where a folder should be
                continue
        place = root / str(rng.choice(["part", ".", "part/test", "part/train", "nowhere"]))
        try:
            assert all(c.is_dir() for c in list_categories(place))
            category = open_category(place)
            train, validation = category.split(int(rng.integers(9)))
            assert train and validation and not {*train} & {*validation}
            if category.layout == "folder":
                assert not any({"train", "test", "ground_truth"} & {*p.relative_to(place).parts} for p in train)
            for sample in category.test:
                size = read_image(sample.path).size[::-1]
                assert sample.mask(size).any() == bool(sample.masks)
                if category.layout == "loco":
                    assert all(1 <= saturation <= mask.sum() for mask, saturation in category.regions(sample, size))
            list_images(place, recursive=True)
        except DataError as error:
            assert "\n" not in str(error)
        finally:
            shutil.rmtree(root, ignore_errors=True)


class Checkpoints:
    """Mutated bytes, and valid files of wrong content: a model of finite numbers, or ModelError."""

    def __init__(self):
        self.model, buffer = EfficientAD(image_size=(128, 128)), io.BytesIO()
        self.good = {"format": "efficientad", "config": self.model.config, "training": {}, "state": self.model.state_dict()}
        torch.save({"format": "x", "state": {"a": torch.ones(3), "b": torch.zeros(2, 2).half()}, "n": [1, (2.5, None)]}, buffer)
        self.files = [buffer.getvalue(), pickle.dumps({"a": 1}, 2), pickle.dumps([print, 1])]
        stored = io.BytesIO()  # another archive
        with zipfile.ZipFile(stored, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
        self.files.append(stored.getvalue())

    def case(self, rng, folder: Path) -> None:
        if rng.random() < 0.95:
            first = self.files[0] if rng.random() < 0.8 else self.files[rng.integers(len(self.files))]
            path = folder / "model.pt"
            path.write_bytes(mutated(rng, first, self.files[rng.integers(len(self.files))]))
            try:
                assert isinstance(read_checkpoint(str(path)), dict)
            except ModelError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            return
        content = {k: dict(v) if isinstance(v, dict) else v for k, v in self.good.items()}
        junk = [None, 0, -1, 2.5, "x", [], {}, [128], (160, 128), torch.ones(2), torch.tensor(torch.nan), "medium", True, ([],)]
        for _ in range(rng.integers(1, 3)):
            part = content if rng.random() < 0.3 else content[("config", "state")[rng.integers(2)]]
            if isinstance(part, dict) and part:
                key, value = list(part)[rng.integers(len(part))], junk[rng.integers(len(junk))]
                if isinstance(part[key], torch.Tensor) and rng.random() < 0.5:
                    value = part[key] * float(rng.choice([np.nan, np.inf, 2]))
                part[key] = value
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(efficientad, "read_checkpoint", lambda path: content)
                model = EfficientAD.load("model.pt")
            assert all_finite(v for k, v in model.state_dict().items() if k != "threshold")
        except ModelError as error:
            assert "model.pt" in str(error)


class Quantiles:
    """Against the definition in float64."""

    def case(self, rng, folder: Path) -> None:
        n = int(rng.choice([1, 2, 3, rng.integers(1, 50), rng.integers(1, 5000)]))
        x = rng.normal(0, 10.0 ** rng.integers(-30, 30), n).astype(np.float32)
        special = np.array([0, -0.0, 1e-45, -1e-38, 1, 3e38, -np.inf, np.inf, np.nan], np.float32)
        which = rng.random(n) < rng.choice([0, 0, 0.1, 0.9])
        x[which] = rng.choice(special[: int(rng.choice([6, 9]))], which.sum())
        x[rng.random(n) < rng.choice([0, 0.5])] = x[0]  # ties
        q = float(rng.choice([0, 1, 0.5, 0.999, rng.random(), np.nan, -0.1, 1.5]))
        if not 0 <= q <= 1:
            with pytest.raises(ValueError):
                quantile(torch.from_numpy(x), q)
            return
        found, position = quantile(torch.from_numpy(x), q).item(), q * (n - 1)
        if np.isnan(x).any():
            assert np.isnan(found)
            return
        low, high = np.sort(x)[[int(position), min(int(position) + 1, n - 1)]].astype(np.float64)
        if position == int(position) or (low == high and np.isfinite(low)):  # between infinities it is NaN, as NumPy's
            assert found == low
        elif np.isfinite([low, high]).all() and high - low < 3e38:
            expected = low + (position - int(position)) * (high - low)
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6 * (high - low) + 1e-44)
            assert low <= found <= high


class Metrics:
    """Properties: bounds; only the order of scores matters, the order of images does not; special cases agree."""

    def case(self, rng, folder: Path) -> None:
        levels = int(rng.choice([2, 5, 10**6]))
        shapes = [tuple(rng.integers(2, 12, 2)) for _ in range(rng.integers(1, 5))]
        maps = [(rng.integers(0, levels, s) / 7).astype(np.float32) for s in shapes]
        masks = [rng.random(s) < rng.choice([0, 0.1, 0.5]) for s in shapes]
        if rng.random() < 0.1:
            maps[0][0, 0] = rng.choice([np.nan, np.inf])
        limit = float(rng.choice([0.01, 0.3, 1, rng.random() + 1e-6]))
        try:
            area = au_pro(maps, masks, limit)
        except ValueError:
            everything = np.concatenate([m.ravel() for m in masks])
            assert everything.all() or not everything.any() or not all(np.isfinite(m).all() for m in maps) or limit > 1
            return
        assert 0 <= area <= 1
        fpr, pro = pro_curve(maps, masks)
        assert all(np.diff(v).min() >= 0 and (v[0], v[-1]) == (0, 1) for v in (fpr, pro))
        areas = [area_under_curve(fpr, pro, x) * x for x in (0.1, 0.4, 1)]
        assert all(a <= b + 1e-12 for a, b in pairwise(areas))
        ranks = np.unique(np.concatenate([m.ravel() for m in maps]), return_inverse=True)[1].astype(np.float64)
        ranked = [r.reshape(s) for r, s in zip(np.split(ranks, np.cumsum([m.size for m in maps])[:-1]), shapes)]
        assert au_pro([np.sqrt(r) for r in ranked], masks, limit) == pytest.approx(area, abs=1e-12)
        order = rng.permutation(len(maps))
        assert au_pro([maps[i] for i in order], [masks[i] for i in order], limit) == pytest.approx(area, abs=1e-12)
        boxes = [np.zeros(s, bool) for s in shapes]
        for box in boxes:
            i, j = (int(rng.integers(1, n + 1)) for n in box.shape)
            box[: max(1, i - 1), : max(1, j - 1)] = True
        if not all(b.all() for b in boxes):
            regions = [[(b, int(b.sum()))] for b in boxes]
            assert au_spro(maps, regions, limit) == pytest.approx(au_pro(maps, boxes, limit), abs=1e-12)
            part = [[(b, float(rng.uniform(0.1, b.sum())))] for b in boxes]  # found sooner, so never less
            assert 1 >= au_spro(maps, part, limit) >= au_spro(maps, regions, limit) - 1e-12

        normal = np.concatenate([m[~k] for m, k in zip(maps, masks)])
        anomalous = np.concatenate([m[k] for m, k in zip(maps, masks)])
        auroc, precision = image_auroc(normal, anomalous), average_precision(normal, anomalous)
        assert pixel_metrics(maps, masks) == pytest.approx((auroc, precision), abs=1e-9)
        assert auroc == pytest.approx(1 - image_auroc(anomalous, normal), abs=1e-12) and 0 < precision <= 1 + 1e-12
        assert 0 < best_f1(normal, anomalous)[0] <= 1 + 1e-12
        recalls = [recall_at_fpr(normal, anomalous, x) for x in (0, 0.05, 0.5, 1)]
        assert recalls == sorted(recalls) and recalls[-1] == 1


@pytest.mark.parametrize("kind", [Images, Layouts, Checkpoints, Quantiles, Metrics])
@pytest.mark.filterwarnings("ignore")
def test_fuzz(kind, tmp_path):
    cases, number = kind(), [Images, Layouts, Checkpoints, Quantiles, Metrics].index(kind)
    for i in range(CASES):
        try:
            cases.case(np.random.default_rng((SEED, number, i)), tmp_path)
        except Exception as error:
            raise AssertionError(f"{kind.__name__}, case {i} of FUZZ_SEED={SEED}: {type(error).__name__}: {error}") from error
