"""What people look at after an evaluation: tables, overlays, report.html. Knows the content of
results.json; no model and no data set."""

import base64
import contextlib
import csv
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from support.metrics import Curve, roc_curve
from support.runs import threshold_meaning, write

# How well a map finds the defects: the key in results.json, the name, and the false-positive rate
# up to which the data set's authors integrate.
AU_PRO = ("au_pro", "AU-PRO", "0.3")  # MVTec AD, VisA
AU_SPRO = ("au_spro", "AU-sPRO", "0.05")  # MVTec LOCO
COLUMNS = {  # key in results.json: title of a table's column
    "image_auroc": "image AU-ROC",
    "image_auroc_local": "local only",
    "image_auroc_global": "global only",
    "image_ap": "AP",
    "detected": "above threshold",
    **{key: f"{name} {limit}" for key, name, limit in (AU_PRO, AU_SPRO)},
}
SIDE = 256  # pixels, the width of an overlay's pictures
VERDICTS = "reject", "check", "ok"  # of unlabelled images, in the order of their report
REPORTED, LISTED = 300, 20  # unlabelled images in a report at most, and in its table
Scale = tuple[float, float]  # of heat colours: where they begin, and the threshold in their middle


def label(training: dict) -> str:
    """A model's config, or the "training" of results.json -> the model's name."""
    if "backbone" in training:
        return f"SimpleNet ({training['backbone']})"
    return f"EfficientAD-{training['size'][0].upper()}"


def explanation(results: dict) -> str:
    """What the threshold means and how it fared, and what the model was trained on if it is another
    set."""
    training, n = results["training"], results["calibration"]["validation_images"]
    text = f"threshold {results['threshold']:.4f}: {threshold_meaning(n)}"
    if not results["own_data"]:
        origin = f"{training['category']} ({training['data']})"
        text = f"trained on {origin}, for whose images the threshold is meant; {text}"
    observed, images = 100 * results["false_alarms"], results["good_images"]
    text += f"; observed {observed:.3g} % on {images} good test images"
    if results["drift"]:
        text += f", which are {results['drift']} than the known normal images"
    if seen := results.get("seen"):
        text += f"; {seen} of these the model was trained or calibrated on: take them out"
    return text


# ---------------------------------------------------------------------------------------- tables


def csv_text(rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def scores_header(scores: dict[str, float]) -> list[str]:
    """Names of the columns for scores by map; the first map's is the image's own."""
    return ["score", *(f"score_{name}" for name in list(scores)[1:])]


def table(rows: list[list[str]]) -> str:
    """Rows as aligned Markdown. The first row is the header; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *cells]) + " |")
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def results_table(results: dict) -> list[list[str]]:
    """Rows for `table`: one for each defect type, then overall, then the good images."""
    columns = {key: title for key, title in COLUMNS.items() if key in results}
    rows = [[results["category"], "images", *columns.values()]]
    for name, entry in {**results["types"], "overall": results}.items():
        rows.append([name, str(entry["images"]), *(f"{100 * entry[key]:.1f}" for key in columns)])
    alarms = f"{100 * results['false_alarms']:.1f}"
    good = [alarms if key == "detected" else "" for key in columns]
    return [*rows, ["good", str(results["good_images"]), *good]]


# -------------------------------------------------------------------------------------- pictures


def heat(values: np.ndarray) -> np.ndarray:
    """Map in 0–1 (h×w) -> RGB uint8 h×w×3: black, violet, red, yellow, white. Outside it is
    clipped."""
    stops = [[0, 0, 0], [70, 20, 110], [200, 40, 60], [250, 170, 30], [255, 255, 220]]
    position = np.clip(values, 0, 1) * (len(stops) - 1)
    channels = [np.interp(position, range(len(stops)), channel) for channel in zip(*stops)]
    return np.stack(channels, -1).astype(np.uint8)


def heat_layer(values: np.ndarray, size: tuple[int, int], how: int, scale: Scale) -> np.ndarray:
    """Map h×w -> its heat colours and their opacity, at most 0.8: float h×w×4 of `size` (W, H)."""
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, how))
    floor, threshold = scale
    floor = min(floor, threshold - 0.01)
    values = (values - floor) / (2 * (threshold - floor))
    return np.dstack([heat(values), np.clip(values * 2, 0, 0.8)])


def overlay(
    image: Image.Image,
    mask: np.ndarray | None,
    maps: dict[str, np.ndarray],
    scores: dict[str, float],
    scale: Scale,
) -> Image.Image:
    """One row: input, mask (if given), and the input under each map's heat colours, on one scale
    for all pictures of a run. The image's verdict stands above the first map."""
    height = round(SIDE * image.height / image.width)
    size = (SIDE, min(4 * SIDE, max(1, height)))  # a thin strip would be a mile high
    image = image.resize(size, Image.Resampling.BILINEAR)
    panels = [("input", image)]
    if mask is not None:
        panels.append(("mask", Image.fromarray(mask).convert("RGB").resize(size)))
    score, threshold = next(iter(scores.values())), scale[1]
    verdict = f": score {score:.3f} {'<=' if score <= threshold else '>'} threshold {threshold:.3f}"
    for name, values in maps.items():
        layer = heat_layer(values, size, Image.Resampling.BILINEAR, scale)
        colours, weight = layer[..., :3], layer[..., 3:]
        blended = np.asarray(image) * (1 - weight) + colours * weight
        panels.append((name + verdict, Image.fromarray(blended.astype(np.uint8))))
        verdict = ""
    sheet = Image.new("RGB", (len(panels) * (SIDE + 4) - 4, size[1] + 18), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels):
        sheet.paste(panel, (i * (SIDE + 4), 18))
        draw.text((i * (SIDE + 4) + 4, 3), title, "black")
    return sheet


@contextlib.contextmanager
def new_folder(old: Path) -> Iterator[Path]:
    """A folder that takes the place of `old` at the end; after an error that one stays. A link
    stays too: the folder that it names is replaced."""
    old = old.resolve()
    new, former = old.with_name(f"{old.name}.new"), old.with_name(f".{old.name}.old")

    def tidy() -> None:
        if former.exists() and not old.exists():  # the end came between the two renamings
            former.rename(old)
        for folder in (new, former):
            shutil.rmtree(folder, ignore_errors=True)

    tidy()
    new.mkdir(parents=True)
    try:
        yield new
        if old.exists():
            old.rename(former)
        new.rename(old)
    finally:
        tidy()


# ----------------------------------------------------------------------------------- report.html


def data_uri(image: Image.Image, kind: str) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def report_entry(
    image: Image.Image, mask: np.ndarray | None, maps: dict[str, np.ndarray], scale: Scale
) -> dict:
    """An image in the report, about 25 KB: its input as JPEG, its maps as translucent 64-pixel PNGs
    (the browser enlarges them) on the scale of `overlay`, and the outline of its mask, if any."""
    size = (240, min(960, max(1, round(240 * image.height / image.width))))
    small = (64, max(1, 64 * size[1] // size[0]))
    entry = {"input": data_uri(image.resize(size), "jpeg"), "maps": {}}
    for name, values in maps.items():
        layer = heat_layer(values, small, Image.Resampling.BOX, scale) * [1, 1, 1, 255]
        entry["maps"][name] = data_uri(Image.fromarray(layer.astype(np.uint8)), "png")
    if mask is not None and mask.any():
        inside = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR)
        inside = inside.point(lambda v: 255 if v else 0)  # small defects too
        edge = ImageChops.difference(inside.filter(ImageFilter.MaxFilter(3)), inside)
        outline = Image.new("RGBA", size)
        outline.paste((90, 255, 255, 255), mask=edge)
        entry["outline"] = data_uri(outline.quantize(4), "png")
    return entry


def html_report(results: dict, entries: list[dict], curves: dict[str, Curve]) -> str:
    """report.html of an evaluation: one file that needs nothing else."""
    scores = {name: [] for name in ("good", *results["types"])}
    for entry in entries:
        scores[entry["defect"]].append(entry["score"])
    roc = {name: roc_curve(scores["good"], scores[name]) for name in results["types"]}
    _, name, limit = AU_SPRO if "au_spro" in results else AU_PRO
    grid = float(limit) * np.linspace(0, 1, 150) ** 2  # a curve may have millions of points
    overlap = {name: (grid, np.interp(grid, *curve)) for name, curve in curves.items()}

    def points(curves: dict[str, Curve]) -> dict[str, list]:
        return {name: np.stack(curve, 1).round(5).tolist() for name, curve in curves.items()}

    known = {k: v for k, v in results["training"].items() if v is not None}
    about = [f"{k} {v}" for k, v in known.items() if k not in ("model", "category", "data")]
    content = {
        "model": label(results["training"]),
        **{name: results[name] for name in ("category", "floor", "threshold")},
        "origin": f"{', '.join(about)}; {explanation(results)}",
        "table": results_table(results),
        "roc": points(roc),
        "overlap": points(overlap),
        "overlap_metric": [name, float(limit)],
        "images": entries,
    }
    return fill_page(content)


def fill_page(content: dict) -> str:
    """report.html with this content, as its script reads it."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("@DATA@", json.dumps(content).replace("<", "\\u003c"))


def write_results(folder: Path, results: dict, entries: list[dict], curves: dict) -> None:
    """Write and print an evaluation. `entries`: `report_entry` of each image, with its "name",
    "defect" and "scores" by map. `curves`: overlap with the defects against false positives, by
    defect type."""
    rows = [["image", "defect", *scores_header(entries[0]["scores"]), "anomalous"]]
    for entry in entries:
        entry["score"], *others = entry.pop("scores").values()
        anomalous = int(not entry["score"] <= results["threshold"])
        rows.append([entry["name"], entry["defect"], entry["score"], *others, anomalous])
    text = f"{table(results_table(results))}\n\npercent; {explanation(results)}\n"
    write(folder / "scores.csv", csv_text(rows))
    write(folder / "results.md", text)
    write(folder / "report.html", html_report(results, entries, curves))
    # results.json comes last: with it the evaluation counts as done.
    write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    print(text, end="")
    print(f"wrote {folder / 'report.html'}, results.json, results.md, scores.csv and overlays/")


def worst(entries: list[dict], n: int = REPORTED) -> list[dict]:
    """The n unlabelled images that need a look most: by verdict, then by falling score, of which
    None stands for NaN."""

    def key(entry: dict) -> tuple:
        score = entry["score"]
        return VERDICTS.index(entry["verdict"]), -math.inf if score is None else -score

    return sorted(entries, key=key)[:n]


def write_scores(folder: Path, rows: list[list], skipped: list[list], content: dict) -> None:
    """Write and print the scores of unlabelled images. `rows`: scores.csv's, the header first; the
    last columns are verdict, whether it is anomalous, and the differences in words from the known
    normal images: those of training and validation, or accepted ones. `skipped`: (name, reason) of
    files that were left out. `content`: of report.html; its "origin" says what the threshold means,
    its "images" are the `worst`."""
    write(folder / "scores.csv", csv_text(rows))
    write(folder / "skipped.csv", csv_text([["image", "reason"], *skipped]))
    images = rows[1:]
    summary = f"{sum(row[-2] for row in images)} of {len(images)} images above the"
    verdicts = [row[-3] for row in images]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in reversed(VERDICTS))
    listed = [["image", "score", "p-value", "verdict", "unlike normal images in"]]
    for e in content["images"][:LISTED]:
        numbers = ["–" if e[k] is None else f"{e[k]:.3g}" for k in ("score", "p_value")]
        listed.append([e["name"], *numbers, e["verdict"], e["unlike"]])
    content = {**content, "origin": f"{summary} {content['origin']}; {counts}"}
    write(folder / "report.html", fill_page({**content, "total": len(images), "table": listed}))
    print(f"{table(listed)}\n\n{content['origin']}")
    unlike = [row for row in images if row[-1]]
    if unlike:
        what = "images are unlike the known normal images in size, colour or brightness"
        first = f"the first is {unlike[0][0]} ({unlike[0][-1]})"
        print(f"{len(unlike)} of {len(images)} {what}: do not trust their scores; {first}")
    if skipped:
        print(f"{len(skipped)} skipped, the last is {skipped[-1][0]}: {skipped[-1][1]}")
    print(f"wrote {folder / 'report.html'}, scores.csv, skipped.csv and overlays/")
