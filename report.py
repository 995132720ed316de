"""What people look at: tables, overlays, report.html, and tables over several runs with the paper's values beside ours.
Knows the content of results.json; no model and no data set."""

import base64
import io
import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from metrics import roc_curve

LOCALIZATION = {False: ("au_pro", "AU-PRO", "0.3"), True: ("au_spro", "AU-sPRO", "0.05")}  # LOCO? key, name, limit to report


# The categories of the three collections: the paper's means hold for all of them together, not for some.
COLLECTIONS = {
    "MVTec AD": "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper",
    "VisA": "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum",
    "MVTec LOCO": "breakfast_box juice_bottle pushpins screw_bag splicing_connectors",
}
LOGICAL, STRUCTURAL = "logical_anomalies/image_auroc", "structural_anomalies/image_auroc"
COLUMNS = {"image_auroc": "image AU-ROC", LOGICAL: "logical", STRUCTURAL: "structural", "au_pro": "AU-PRO 0.3",
           "au_spro": "AU-sPRO 0.05", "pixel_auroc": "pixel AU-ROC", "image_ap": "image AP"}  # fmt: skip
PAPER = {  # percent; (variant, collection or category): tables 1 and 2 and, for two categories, the supplementary material
    ("small", "MVTec AD"): {"image_auroc": 98.8},
    ("small", "VisA"): {"image_auroc": 97.5},
    ("small", "MVTec LOCO"): {"image_auroc": 90.0, LOGICAL: 85.8, STRUCTURAL: 94.1},
    ("medium", "MVTec AD"): {"image_auroc": 99.1},
    ("medium", "VisA"): {"image_auroc": 98.1},
    ("medium", "MVTec LOCO"): {"image_auroc": 90.7, LOGICAL: 86.8, STRUCTURAL: 94.7},
    ("simplenet", "MVTec AD"): {"image_auroc": 98.2},  # SimpleNet as EfficientAD's authors measured it, with wide_resnet50_2
    ("simplenet", "VisA"): {"image_auroc": 87.9},
    ("simplenet", "MVTec LOCO"): {"image_auroc": 77.6},
    ("small", "bottle"): {"image_auroc": 99.9, "au_pro": 95.2},
    ("small", "screw"): {"image_auroc": 97.9, "au_pro": 95.6},
}

QUANTILES, GAUSSIAN = (0.9, 0.995), None  # map normalization: (a, b), or None for mean 0 and variance 1
ABLATION = {  # table: (row, the paper's AU-ROC, p_hard, penalty?, map normalization)
    "Table 3, quantile a (paper: EfficientAD-M)": [
        (f"a = {a}", paper, 0.999, True, (a, 0.995))
        for a, paper in {0.5: 95.9, 0.8: 95.9, 0.9: 96.0, 0.95: 95.9, 0.98: 95.9, 0.99: 95.8}.items()
    ],
    "Table 3, quantile b (paper: EfficientAD-M)": [
        (f"b = {b}", paper, 0.999, True, (0.9, b))
        for b, paper in {0.95: 95.8, 0.98: 95.9, 0.99: 96.0, 0.995: 96.0, 0.998: 95.9, 0.999: 95.9}.items()
    ],
    "Table 3, mining factor (paper: EfficientAD-M)": [
        (f"p_hard = {p}", paper, float(p), True, QUANTILES)
        for p, paper in {"0": 94.9, "0.9": 94.9, "0.99": 95.7, "0.999": 96.0, "0.9999": 95.8, "0.99999": 95.7}.items()
    ],
    "Table 4, cumulative (paper: EfficientAD-S)": [
        ("PDN", 93.2, 0.0, False, GAUSSIAN),
        ("+ map normalization", 94.0, 0.0, False, QUANTILES),
        ("+ hard feature loss", 95.0, 0.999, False, QUANTILES),
        ("+ pretraining penalty: EfficientAD", 95.4, 0.999, True, QUANTILES),
    ],
    "Table 5, isolated (paper: EfficientAD-S)": [
        ("EfficientAD", 95.4, 0.999, True, QUANTILES),
        ("without map normalization", 94.7, 0.999, True, GAUSSIAN),
        ("without hard feature loss", 94.7, 0.0, True, QUANTILES),
        ("without pretraining penalty", 95.0, 0.999, False, QUANTILES),
    ],
}


SIMPLENET_DEFAULTS = {"noise": 0.015, "adaptor": True, "layers": [2, 3]}  # the options of SimpleNet's ablation


def variant(result: dict) -> str:
    """What was trained: EfficientAD's size "small" or "medium", or "simplenet"."""
    return "simplenet" if result["training"].get("model") == "simplenet" else result["training"]["size"]


def label(training: dict) -> str:
    """A run's "training" -> the model's name."""
    if training.get("model") == "simplenet":
        return f"SimpleNet ({training['backbone']})"
    return f"EfficientAD-{training['size'][0].upper()}"


def duration(training: dict) -> str:
    """A run's "training" -> how long it trained: SimpleNet's number of steps depends on the category, its epochs do not."""
    return f"{training['epochs']} epochs" if training.get("epochs") else f"{training['steps']} steps"


def normalizations(p_hard: float, penalty: bool) -> list[tuple[float, float] | None]:
    """The map normalizations under which the tables want a training with these options."""
    return list(dict.fromkeys(n for rows in ABLATION.values() for _, _, p, q, n in rows if (p, q) == (p_hard, penalty)))


def spread(values: list[float]) -> dict:
    """{"mean", "std" (of the sample, n − 1; None for one value), "values"}, in percent."""
    values = [100 * v for v in values]
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": values}


def cell(entry: dict | None) -> str:
    if not entry:
        return "–"
    return f"{entry['mean']:.1f}" + (f" ± {entry['std']:.1f}" if entry["std"] is not None else "")


def summarize_collection(results: list[dict], size: str) -> dict:
    """Contents of results.json of several runs -> those of one `variant` as {"collection", "size", "steps", "name", "categories":
    {name: {"seeds", metric: `spread`}}, "mean": {"seeds", metric: `spread`}, "paper": {name: {metric: percent}}}.

    The mean is over categories, seed by seed, and its spread over the seeds that every category has (None without one); a metric
    that a category lacks has no mean. A LOCO category's own value is already the mean of logical and structural (evaluate.py).
    "collection" is None unless the categories are exactly those of one. Raises ValueError for two runs of one category and seed."""
    results = [r for r in results if variant(r) == size]
    runs = {(r["category"], r["training"]["seed"]): r for r in results}
    if len(runs) < len(results):
        raise ValueError(f"two {size} runs of one category with the same seed; move one elsewhere")
    names = list(dict.fromkeys(category for category, _ in sorted(runs)))
    seeds = {name: sorted(seed for category, seed in runs if category == name) for name in names}
    common = sorted(set.intersection(*(set(s) for s in seeds.values())))
    collection = next((c for c, categories in COLLECTIONS.items() if set(names) == set(categories.split())), None)

    def value(name: str, seed: int, metric: str) -> float | None:
        kind, _, key = metric.rpartition("/")
        entry = runs[name, seed]["types"].get(kind, {}) if kind else runs[name, seed]
        return entry.get(key)

    categories = {}
    for name in names:
        values = {m: [v for s in seeds[name] if (v := value(name, s, m)) is not None] for m in COLUMNS}
        categories[name] = {"seeds": seeds[name], **{m: spread(v) for m, v in values.items() if v}}
    overall = {"seeds": common} if common else None
    for metric in COLUMNS if common else ():
        values = [[value(name, seed, metric) for name in names] for seed in common]
        if all(v is not None for row in values for v in row):
            overall[metric] = spread([mean(row) for row in values])
    durations = sorted({duration(r["training"]) for r in results})
    return {"collection": collection, "size": size, "steps": sorted({r["training"]["steps"] for r in results}),
            "name": f"{'/'.join(sorted({label(r['training']) for r in results}))}, {' or '.join(durations)}",
            "categories": categories, "mean": overall,
            "paper": {name: PAPER.get((size, name), {}) for name in [*names, *([collection] if collection else [])]}}  # fmt: skip


def collection_rows(*summaries: dict) -> list[list[str]]:
    """Rows for `table`, the first one the header: a row for each category, then their mean; a column of the paper's values
    follows each metric that has any. Several summaries, of different models, stand side by side: a row for each model."""
    rows = {}  # (category or mean, model): (metrics, the paper's)
    for summary in summaries:
        collection, entries = summary["collection"], summary["categories"]
        rows |= {(name, summary["name"]): (entry, summary["paper"][name]) for name, entry in entries.items()}
    names = list(dict.fromkeys(name for name, _ in rows))
    for summary in summaries:
        collection = summary["collection"]
        name = f"mean of {collection}" if collection else f"mean of these {len(summary['categories'])}"
        rows[name, summary["name"]] = (summary["mean"] or {"seeds": []}, summary["paper"].get(collection, {}))
    order = {name: i for i, name in enumerate(names)}
    metrics = [m for m in COLUMNS if any(m in entry for entry, _ in rows.values())]
    with_paper = {m for m in metrics if m == "image_auroc" or any(m in published for _, published in rows.values())}
    header = [c for m in metrics for c in ([COLUMNS[m], "paper"] if m in with_paper else [COLUMNS[m]])]
    cells = [["percent", *(["model"] if len(summaries) > 1 else []), "runs", *header]]
    for (name, model), (entry, published) in sorted(rows.items(), key=lambda row: order.get(row[0][0], len(order))):
        cells.append([name, *([model] if len(summaries) > 1 else []), str(len(entry["seeds"]))])
        for m in metrics:
            value = f"{published[m]:.1f}" if m in published else "–"
            cells[-1] += [cell(entry.get(m)), *([value] if m in with_paper else [])]
    return cells


def ablation_rows(results: list[dict]) -> dict[str, list[dict]]:
    """Contents of results.json of an ablation's runs -> the tables' rows, {table: [{"row", "paper", "ours": `spread` over the
    seeds, or None without such a run}]}. Where the paper has a column of differences, "paper_diff" and "diff" too (None without
    both runs): table 4's are from the row above, table 5's from the first."""
    scores = {}
    for entry in (entry for r in results for entry in r["ablation"]):
        key = (entry["p_hard"], entry["penalty"], tuple(entry["quantiles"]) if entry["quantiles"] else GAUSSIAN)
        scores.setdefault(key, []).append(entry["image_auroc"])
    tables = {
        table: [
            {"row": row, "paper": paper, "ours": spread(scores[key]) if (key := (p_hard, penalty, norm)) in scores else None}
            for row, paper, p_hard, penalty, norm in rows
        ]
        for table, rows in ABLATION.items()
    }
    for table, rows in tables.items():
        for i, row in enumerate(rows if table.startswith(("Table 4", "Table 5")) else []):
            other = rows[0 if "isolated" in table else max(0, i - 1)]
            both = row["ours"] and other["ours"] and row is not other
            row["paper_diff"] = row["paper"] - other["paper"] if row is not other else None
            row["diff"] = row["ours"]["mean"] - other["ours"]["mean"] if both else None
    return tables


def signed(difference: float | None) -> str:
    return "" if difference is None else f"{difference:+.1f}"


def simplenet_ablation_rows(results: list[dict]) -> dict[str, list[dict]]:
    """The same for SimpleNet: runs that differ from the defaults in one option, by this option. The paper's values are not known
    here; [{"row", metric: `spread`}] has AU-PRO or AU-sPRO too where there are masks."""
    tables = {}
    for option, default in SIMPLENET_DEFAULTS.items():
        others = {k: v for k, v in SIMPLENET_DEFAULTS.items() if k != option}
        chosen = [r for r in results if all(r["training"][k] == v for k, v in others.items())]
        values = sorted({json.dumps(r["training"][option]) for r in chosen}, key=json.loads)
        rows = []
        for value in values:
            runs = [r for r in chosen if json.dumps(r["training"][option]) == value]
            metrics = [m for m in ("image_auroc", "au_pro", "au_spro") if all(m in r for r in runs)]
            name = f"{option} {value}" + (" (default)" if value == json.dumps(default) else "")
            rows.append({"row": name, **{m: spread([r[m] for r in runs]) for m in metrics}})
        tables[f"SimpleNet, {option}"] = rows
    return tables


def summarize_runs(results: list[dict]) -> tuple[dict, dict[str, list[list[str]]]]:
    """Contents of results.json of the runs in a folder -> (numbers, {title: rows of a table}): tables 3 to 5, or SimpleNet's, if
    they are an ablation's, else one table. Raises ValueError for runs that do not belong together."""
    ablation = [r for r in results if "ablation" in r]
    if not ablation:
        known = {variant(r) for r in results}
        summaries = [summarize_collection(results, v) for v in ("small", "medium", "simplenet") if v in known]
        names = sorted({summary["collection"] or "Collection" for summary in summaries})
        title = f"{' and '.join(names)}, {'; '.join(summary['name'] for summary in summaries)}"
        return {"collections": summaries}, {title: collection_rows(*summaries)}
    kinds = {(r["category"], variant(r), label(r["training"]), duration(r["training"])) for r in results}
    if len(ablation) < len(results) or len(kinds) > 1:
        raise ValueError("an ablation's runs are of one category, model and number of steps; move the others elsewhere")
    category, size, name, steps = kinds.pop()
    if size == "simplenet":
        tables = simplenet_ablation_rows(results)
        metrics = [m for m in ("image_auroc", "au_pro", "au_spro") if any(m in r for r in results)]
        header = [f"{category}, percent", *(COLUMNS[m] for m in metrics)]
        rows = {title: [[r["row"], *(cell(r.get(m)) for m in metrics)] for r in rows] for title, rows in tables.items()}
    else:
        tables = ablation_rows(ablation)
        header = ["image AU-ROC, percent", "paper", "diff.", f"{category}, {size[0].upper()}", "diff."]

        def cells(r: dict) -> list[str]:
            return [r["row"], f"{r['paper']:.1f}", signed(r.get("paper_diff")), cell(r["ours"]), signed(r.get("diff"))]

        rows = {title: [cells(r) for r in rows] for title, rows in tables.items()}
    content = {"category": category, "size": size, "steps": results[0]["training"]["steps"], "tables": tables}
    return content, {f"{title}; ours: {steps}": [header, *body] for title, body in rows.items()}


# ------------------------------------------------------------------------------------------------------------------ one run


def table(rows: list[list[str]]) -> str:
    """Rows (the first is the header) as aligned Markdown; all columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))) + " |" for r in rows]
    return "\n".join([lines[0], "|" + "|".join(("-" * (w + 1) + ":") if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|",
                      *lines[1:]])  # fmt: skip


def heat(values: np.ndarray) -> np.ndarray:
    """Map in 0–1 (h×w) -> RGB uint8 h×w×3: black, violet, red, yellow, white. Outside it is clipped."""
    stops = np.array([[0, 0, 0], [70, 20, 110], [200, 40, 60], [250, 170, 30], [255, 255, 220]], float)
    position = np.clip(values, 0, 1) * (len(stops) - 1)
    return np.stack([np.interp(position, range(len(stops)), stops[:, c]) for c in range(3)], -1).astype(np.uint8)


def heat_scale(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Map -> `heat`'s 0–1, where `scale` is (an ordinary position's value -> 0, the threshold -> 0.5)."""
    floor, threshold = scale
    return (values - floor) / (2 * max(threshold - floor, 1e-6))


def overlay(
    image: Image.Image, mask: np.ndarray | None, maps: dict[str, np.ndarray], score: float, scale: tuple[float, float]
) -> Image.Image:
    """One row: input, mask (if given), and the input under each map's heat colours, on one `heat_scale` for every picture of a
    run. Above the first map stands the image's verdict."""
    side, threshold = 256, scale[1]
    size = (side, min(4 * side, max(1, round(side * image.height / image.width))))  # a thin strip would be a mile high
    image = image.resize(size, Image.Resampling.BILINEAR)
    panels = [("input", image)]
    if mask is not None:
        panels.append(("mask", Image.fromarray(mask).convert("RGB").resize(size)))
    for name, values in maps.items():
        values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
        values = heat_scale(values, scale)
        weight = np.clip(values * 2, 0, 0.8)[..., None]
        panels.append((name, Image.fromarray((np.asarray(image) * (1 - weight) + heat(values) * weight).astype(np.uint8))))
    sheet = Image.new("RGB", (len(panels) * (side + 4) - 4, size[1] + 18), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, panel) in enumerate(panels):
        sheet.paste(panel, (i * (side + 4), 18))
        if name == next(iter(maps)):
            name += f": score {score:.3f} {'>' if score > threshold else '<='} threshold {threshold:.3f}"
        draw.text((i * (side + 4) + 4, 3), name, "black")
    return sheet


def data_uri(image: Image.Image, kind: str) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def report_entry(image: Image.Image, mask: np.ndarray, maps: dict[str, np.ndarray], scale: tuple[float, float]) -> dict:
    """A test image in the report: its input as JPEG, its maps as translucent 64-pixel PNGs (the browser enlarges them), on the
    scale of `overlay`, and the outline of its mask. About 25 KB."""
    size = (240, min(960, max(1, round(240 * image.height / image.width))))
    entry = {"input": data_uri(image.resize(size), "jpeg")}
    for key, values in maps.items():
        small = Image.fromarray(values.astype(np.float32)).resize((64, max(1, 64 * size[1] // size[0])), Image.Resampling.BOX)
        values = heat_scale(np.asarray(small), scale)
        alpha = (255 * np.clip(values * 2, 0, 0.8)).astype(np.uint8)
        entry[key] = data_uri(Image.fromarray(np.dstack([heat(values), alpha])), "png")
    if mask.any():
        inside = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR).point(lambda v: 255 if v > 127 else 0)
        edge = ImageChops.difference(inside.filter(ImageFilter.MaxFilter(3)), inside)
        outline = Image.new("RGBA", size)
        outline.paste((90, 255, 255, 255), mask=edge)
        entry["outline"] = data_uri(outline.quantize(4), "png")
    return entry


def results_table(results: dict) -> list[list[str]]:
    columns = {"image_auroc": "image AU-ROC", "image_auroc_local": "local only", "image_auroc_global": "global only",
               "image_ap": "AP", "detected": "above threshold"}  # fmt: skip
    columns |= {key: f"{name} {limit}" for key, name, limit in LOCALIZATION.values()}
    columns = {key: name for key, name in columns.items() if key in results}
    rows = [[results["category"], "images", *columns.values()]]
    for name, entry in {**results["types"], "overall": results}.items():
        rows.append([name, str(entry["images"]), *(f"{100 * entry[c]:.1f}" for c in columns)])
    good = {"detected": f"{100 * results['false_alarms']:.1f}"}
    rows.append(["good", str(results["good_images"]), *(good.get(c, "") for c in columns)])
    return rows


def html_report(results: dict, run: str, rows: list[list[str]], entries: list[dict], curves: dict) -> str:
    """report.html: one file that needs nothing else. `entries` are report_entry's, with their "defect"."""
    scores = {d: [e["score"] for e in entries if e["defect"] == d] for d in ["good", *results["types"]]}
    roc = {t: list(zip(*(v.round(4).tolist() for v in roc_curve(scores["good"], scores[t])))) for t in results["types"]}
    _, name, limit = LOCALIZATION["au_spro" in results]
    grid = float(limit) * np.linspace(0, 1, 150) ** 2  # curves have up to millions of points
    pro = {t: [[round(x, 5), round(float(np.interp(x, *c)), 4)] for x in grid.tolist()] for t, c in curves.items()}
    maps = [key for key in entries[0] if key in ("combined", "local", "global", "anomaly")]
    content = {"category": results["category"], "model": label(results["training"]), "maps": maps,
               "threshold": results["threshold"], "floor": results["floor"], "run": run, "table": rows, "roc": roc,
               "pro": pro, "pro_name": name, "pro_limit": float(limit), "images": entries}  # fmt: skip
    template = (Path(__file__).parent / "assets/report.html").read_text(encoding="utf-8")
    return template.replace("@DATA@", json.dumps(content).replace("<", "\\u003c"))
