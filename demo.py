"""The built-in demo set: an inspection station, a tray with four fasteners, seen from above.

Each place takes one kind of part, anywhere within a few pixels and turned by any angle. A patch as small as the PDN's sees at
most one part, so a missing, surplus or misplaced part looks normal everywhere, and only the arrangement of the whole image gives it
away.
"""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

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
