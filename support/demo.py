"""The built-in demo set: an inspection station, a tray with four fasteners, seen from above.

Each place takes one kind of part, within a few pixels and at any angle. A patch as small as the
PDN's sees one part at most. A missing, surplus or misplaced part therefore looks normal in every
patch, and only the arrangement of the whole image gives it away.
"""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageChops, ImageDraw, ImageFilter

DEMO_PLACES = {"nut": (70, 70), "washer": (186, 70), "screw": (70, 186), "gear": (186, 186)}  # x, y
DEMO_LOGICAL, DEMO_STRUCTURAL = ("missing", "surplus", "misplaced"), ("scratch", "stain", "foreign")
DEMO_SPLITS = {  # folder: number of images
    "train/good": 160,
    "validation/good": 32,
    "test/good": 40,
    "test/logical_anomalies": 36,
    "test/structural_anomalies": 36,
}
SCALE = 2  # drawn at twice the size, for smooth edges


def make_demo(root: str | Path) -> None:
    """Draw the demo set into the new folder `root`, in MVTec LOCO's layout: 304 RGB images of
    256×256 pixels, and masks for every defect. They are the same every time. The folder appears
    when it is complete. Raises OSError if it exists."""
    root = Path(root)
    # Hidden, since what is left of a killed process must not pass for a category.
    temporary = root.with_name(f".{root.name}.tmp{os.getpid()}")
    defects = {"logical_anomalies": DEMO_LOGICAL, "structural_anomalies": DEMO_STRUCTURAL}
    values = {name: 255 - i for i, name in enumerate(DEMO_LOGICAL + DEMO_STRUCTURAL)}
    shutil.rmtree(temporary, ignore_errors=True)  # in a container numbers of processes repeat
    try:
        for split, (folder, count) in enumerate(DEMO_SPLITS.items()):
            kinds = defects.get(folder.split("/")[1], (None,))
            (temporary / folder).mkdir(parents=True)
            for i in range(count):
                defect = kinds[i % len(kinds)]
                image, masks = draw_demo_image(default_rng((0, split, i)), defect)
                image.save(temporary / folder / f"{i:03d}.png")
                truth = temporary / folder.replace("test", "ground_truth") / f"{i:03d}"
                for j, mask in enumerate(masks):
                    truth.mkdir(parents=True, exist_ok=True)
                    mask.point([0] * 128 + [values[defect]] * 128).save(truth / f"{j:03d}.png")
        saturation = {"saturation_threshold": 1.0, "relative_saturation": True}
        config = [{"defect_name": d, "pixel_value": v, **saturation} for d, v in values.items()]
        (temporary / "defects_config.json").write_text(json.dumps(config, indent=1))
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def draw_demo_image(rng: Generator, defect: str | None) -> tuple[Image.Image, list[Image.Image]]:
    """One image of the demo set, RGB 256×256, and the masks of its defect (mode L, 0 to 255; none
    for a normal image). `defect` is None or one of DEMO_LOGICAL and DEMO_STRUCTURAL."""
    canvas = _tray(rng, 256 * SCALE)
    parts, masks = _arrange(rng, defect)
    for kind, x, y in parts:
        alpha = _place(canvas, kind, x, y, rng)
        if DEMO_PLACES[kind] != (x, y):  # surplus or misplaced
            masks.append(alpha)
    if defect in DEMO_STRUCTURAL:
        masks.append(_damage(canvas, defect, rng))
    image = np.asarray(canvas.resize((256, 256), Image.Resampling.BOX), np.float64)
    noise = rng.normal(0, 2.5, (256, 256, 3))
    slope = np.linspace(-1, 1, 256)
    light = 1 + np.add.outer(slope * rng.uniform(-0.06, 0.06), slope * rng.uniform(-0.06, 0.06))
    pixels = image * light[..., None] * rng.uniform(0.95, 1.05) + noise
    image = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
    return image, [mask.resize((256, 256)) for mask in masks]


def _arrange(rng: Generator, defect: str | None) -> tuple[list[list], list[Image.Image]]:
    """The parts as [kind, x, y], and the masks of the places where one is missing."""
    parts = [[kind, *place] for kind, place in DEMO_PLACES.items()]
    masks = []
    if defect == "missing":
        _, x, y = parts.pop(int(rng.integers(4)))
        masks.append(_place_mask(x, y))
    elif defect == "misplaced" and rng.random() < 0.5:  # two parts have changed places
        i, j = rng.choice(4, 2, replace=False)
        parts[i][0], parts[j][0] = parts[j][0], parts[i][0]
    elif defect == "misplaced":  # one part lies too far off, at most in the middle of the tray
        i, share = rng.integers(4), rng.uniform(0.2, 0.9)
        kind, x, y = parts[i]
        masks.append(_place_mask(x, y))
        parts[i] = [kind, x + share * (128 - x), y + share * (128 - y)]
    elif defect == "surplus":
        x, y = ((128, 128), (128, 70), (70, 128), (186, 128), (128, 186))[rng.integers(5)]
        parts.append([("nut", "washer", "gear")[rng.integers(3)], x, y])
    return parts, masks


def _place_mask(x: float, y: float) -> Image.Image:
    mask = Image.new("L", (256 * SCALE, 256 * SCALE))
    ImageDraw.Draw(mask).circle((SCALE * x, SCALE * y), SCALE * 26, fill=255)
    return mask


def _tray(rng: Generator, size: int) -> Image.Image:
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
        draw.circle((x, y), r, fill=(tone, tone + 6, tone))
    return image


def _part(kind: str, rng: Generator) -> Image.Image:
    """A part, RGBA 144×144 at twice the final scale."""
    tile = Image.new("RGBA", (144, 144))
    draw, c, tone = ImageDraw.Draw(tile), 72, rng.uniform(0.92, 1.08)
    hole = (0, 0, 0, 0)

    def colour(*rgb):
        return tuple(int(min(255, v * tone)) for v in rgb) + (255,)

    def disc(radius, **options):
        draw.circle((c, c), radius, **options)

    def polygon(radii, **options):
        angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
        corners = [(c + r * math.cos(a), c + r * math.sin(a)) for r, a in zip(radii, angles)]
        draw.polygon(corners, **options)

    if kind == "nut":
        polygon([48] * 6, fill=colour(176, 146, 78), outline=colour(112, 88, 40))
        disc(41, width=3, outline=colour(222, 196, 128))
        disc(25, width=4, outline=colour(120, 96, 48))
        disc(22, fill=hole)
    elif kind == "washer":
        disc(44, fill=colour(168, 174, 180), outline=colour(96, 100, 106))
        disc(41, width=3, outline=colour(216, 220, 226))
        disc(33, width=1, outline=colour(140, 146, 152))
        disc(19, fill=hole)
    elif kind == "gear":
        polygon([50, 50, 40, 40] * 12, fill=colour(176, 60, 48), outline=colour(104, 30, 24))
        disc(32, width=3, outline=colour(214, 104, 90))
        disc(16, width=3, outline=colour(120, 36, 28))
        disc(13, fill=hole)
    else:  # screw, lying
        draw.rectangle([c - 12, c - 34, c + 12, c + 60], fill=colour(120, 122, 132))
        for y in range(c - 22, c + 58, 8):
            draw.line([c - 12, y + 3, c + 12, y - 3], fill=colour(66, 68, 78), width=3)
        draw.line([c - 5, c - 34, c - 5, c + 60], fill=colour(172, 174, 184), width=2)
        head = [c - 28, c - 60, c + 28, c - 34]
        draw.rounded_rectangle(head, 8, fill=colour(138, 140, 150), outline=colour(70, 72, 80))
        draw.line([c - 22, c - 53, c + 22, c - 53], fill=colour(196, 198, 206), width=3)
    return tile


def _place(canvas: Image.Image, kind: str, x: float, y: float, rng: Generator) -> Image.Image:
    """Put a part and its shadow on the tray, near (x, y) and at any angle. Returns its mask."""
    tile = _part(kind, rng)
    left, top = (round(SCALE * (v + rng.uniform(-7, 7))) - 72 for v in (x, y))
    tile = tile.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    alpha = tile.getchannel("A")
    shadow = alpha.filter(ImageFilter.GaussianBlur(6)).point(lambda v: v * 0.55)
    canvas.paste((18, 24, 22), (left + 7, top + 9), shadow)
    canvas.paste(tile.convert("RGB"), (left, top), alpha)
    mask = Image.new("L", canvas.size)
    mask.paste(alpha, (left, top))
    return mask


def _damage(canvas: Image.Image, defect: str, rng: Generator) -> Image.Image:
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
        bright, tone = Image.new("L", canvas.size), int(rng.integers(120, 256))
        ImageDraw.Draw(bright).line(points, fill=tone, width=width // 2, joint="curve")
        canvas.paste((206, 214, 208), mask=bright)
    elif defect == "stain":  # oil: soft, dark, translucent
        for _ in range(6):
            radius = rng.uniform(8, 20)
            dx, dy = rng.uniform(-18, 18, 2)
            draw.circle((x + dx, y + dy), radius, fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(3))
        strength = rng.uniform(0.2, 0.7)
        canvas.paste((44, 34, 22), mask=mask.point(lambda v: v * strength))
    else:  # a chip of plastic or metal, or a fibre
        tint = [(214, 200, 60), (70, 120, 200), (222, 222, 226), (150, 80, 160)][rng.integers(4)]
        if rng.random() < 0.5:
            turns = (np.arange(6) + rng.uniform(-0.35, 0.35, 6)) * math.pi / 3
            radii = rng.uniform(7, 20, (6, 2))
            points = [(x + r * math.cos(t), y + s * math.sin(t)) for t, (r, s) in zip(turns, radii)]
            draw.polygon(points, fill=255)
        else:
            start, box = rng.uniform(0, 360), [x - 34, y - 34, x + 34, y + 34]
            draw.arc(box, start, start + rng.uniform(110, 220), fill=255, width=5)
        shadow = ImageChops.offset(mask, 5, 6).filter(ImageFilter.GaussianBlur(4))
        canvas.paste((18, 24, 22), mask=shadow.point(lambda v: v * 0.5))
        canvas.paste(tint, mask=mask)
    return mask
