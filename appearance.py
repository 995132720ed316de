"""How the training images look, and which others do not: size, colour mode and mean brightness. Knows no model and no file."""

from PIL import Image, ImageChops, ImageStat

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
