"""How images look, so that a model can tell images of another kind from those it was trained on."""

import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageStat

DRIFT = {  # a look, and the words for less and for more of it
    "brightness": ("darker", "brighter"),
    "contrast": ("lower in contrast", "higher in contrast"),
    "tint": ("bluer", "redder"),
}


class Appearance(NamedTuple):
    """What is compared of an image with the known normal images."""

    width: int
    height: int
    gray: bool  # all channels are equal, whatever the file's mode is
    brightness: float  # mean luma, 0 to 255
    contrast: float = 0.0  # standard deviation of the luma
    tint: float = 0.0  # mean of red minus blue
    fingerprint: int = 0  # of the pixels


def appearance_of(image: Image.Image) -> Appearance:
    """RGB image -> its appearance."""
    red, *others = image.split()
    gray = not any(ImageChops.difference(red, other).getbbox() for other in others)
    luma, colours = ImageStat.Stat(image.convert("L")), ImageStat.Stat(image)
    contrast = max(0.0, luma.var[0]) ** 0.5  # rounding may leave less than 0
    looks = luma.mean[0], contrast, colours.mean[0] - colours.mean[2]
    return Appearance(*image.size, gray, *looks, zlib.crc32(image.tobytes()))


def appearance_range(appearances: list[Appearance]) -> dict:
    """Appearances of normal images -> what is kept of them with the model: {"width", "height",
    "aspect", "brightness": [least, greatest], "gray": share of gray images, "looks": {name: [mean,
    standard deviation]} of the three in DRIFT}."""
    columns = dict(zip(Appearance._fields, zip(*appearances)))
    columns["aspect"] = [w / h for w, h in zip(columns["width"], columns["height"])]
    kept = {k: [min(columns[k]), max(columns[k])] for k in ("width", "height", "aspect")}
    kept["brightness"] = [min(columns["brightness"]), max(columns["brightness"])]
    kept["gray"] = sum(columns["gray"]) / len(appearances)
    looks = {name: [float(np.mean(columns[name])), float(np.std(columns[name]))] for name in DRIFT}
    return kept | {"looks": looks}


def differences(appearance: Appearance, known: dict) -> list[str]:
    """How an image differs from the known normal images, in words: size or aspect outside their
    range; gray among coloured ones, or coloured among gray ones; darker or brighter than all by
    more than a quarter of their range and by more than 5 of 255. (By chance a new image lies a
    little outside the range of n others, with probability 2/(n + 1).) `known`: `appearance_range`
    of those. Empty if it does not differ."""
    width, height, gray, brightness, *_ = appearance
    found, (least, greatest) = [], known["brightness"]
    sizes = {"width": width, "height": height, "aspect": width / height}.items()
    if not all(known[k][0] <= value <= known[k][1] for k, value in sizes):
        found.append(f"size {width}×{height}")
    if known["gray"] == (0 if gray else 1):
        found.append("gray" if gray else "coloured")
    margin = max(5, (greatest - least) / 4)
    if not least - margin <= brightness <= greatest + margin:
        found.append(f"{'darker' if brightness < least else 'brighter'}: {brightness:.0f}")
    return found


def drift(appearances: list[Appearance], known: dict) -> str:
    """How a set of images differs on the whole from the known normal images, in words and in
    standard deviations of these, for each look in DRIFT whose median is more than one of them, and
    more than three standard errors, from their mean. `known` as in `differences`; without "looks",
    as earlier versions kept it, nothing is found. Empty if the set does not differ."""
    found, n = [], len(appearances)
    for name, (mean, deviation) in known.get("looks", {}).items():
        median = float(np.median([getattr(a, name) for a in appearances]))
        deviations = (median - mean) / max(deviation, 0.5)  # half a gray level is nothing
        if abs(deviations) > max(1, 3 / n**0.5):
            word = DRIFT[name][deviations > 0]
            values = f"{name} {median:.1f} instead of {mean:.1f}"
            found.append(f"{word} by {abs(deviations):.1f} standard deviations ({values})")
    return " and ".join(found)
