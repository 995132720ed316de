"""Tables over several runs, with the paper's values beside ours. Knows the content of results.json;
no model, no file."""

import json
from collections.abc import Callable, Iterable
from statistics import mean, stdev

from support.report import AU_PRO, AU_SPRO, label

COLLECTIONS = {
    "MVTec AD": "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile "
    "toothbrush transistor wood zipper",
    "VisA": "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 "
    "pipe_fryum",
    "MVTec LOCO": "breakfast_box juice_bottle pushpins screw_bag splicing_connectors",
}
LOGICAL, STRUCTURAL = "logical_anomalies/image_auroc", "structural_anomalies/image_auroc"
COLUMNS = {
    "image_auroc": "image AU-ROC",
    LOGICAL: "logical",
    STRUCTURAL: "structural",
    **{key: f"{name} {limit}" for key, name, limit in (AU_PRO, AU_SPRO)},
    "pixel_auroc": "pixel AU-ROC",
    "image_ap": "image AP",
}
LOCATED = ("image_auroc", AU_PRO[0], AU_SPRO[0])  # what SimpleNet's ablation shows
PAPER = {  # percent; tables 1 and 2, and two categories from the supplementary material
    ("small", "MVTec AD"): {"image_auroc": 98.8},
    ("small", "VisA"): {"image_auroc": 97.5},
    ("small", "MVTec LOCO"): {"image_auroc": 90.0, LOGICAL: 85.8, STRUCTURAL: 94.1},
    ("medium", "MVTec AD"): {"image_auroc": 99.1},
    ("medium", "VisA"): {"image_auroc": 98.1},
    ("medium", "MVTec LOCO"): {"image_auroc": 90.7, LOGICAL: 86.8, STRUCTURAL: 94.7},
    ("simplenet", "MVTec AD"): {"image_auroc": 98.2},  # as EfficientAD's authors measured it
    ("simplenet", "VisA"): {"image_auroc": 87.9},
    ("simplenet", "MVTec LOCO"): {"image_auroc": 77.6},
    ("small", "bottle"): {"image_auroc": 99.9, "au_pro": 95.2},
    ("small", "screw"): {"image_auroc": 97.9, "au_pro": 95.6},
}

QUANTILES, GAUSSIAN = (0.9, 0.995), None  # map normalization: (a, b), or mean 0 and variance 1
PAPER_BY_A = {0.5: 95.9, 0.8: 95.9, 0.9: 96.0, 0.95: 95.9, 0.98: 95.9, 0.99: 95.8}
PAPER_BY_B = {0.95: 95.8, 0.98: 95.9, 0.99: 96.0, 0.995: 96.0, 0.998: 95.9, 0.999: 95.9}
PAPER_BY_P_HARD = {0: 94.9, 0.9: 94.9, 0.99: 95.7, 0.999: 96.0, 0.9999: 95.8, 0.99999: 95.7}
TABLES = {  # title: rows of (name, the paper's AU-ROC, p_hard, penalty?, map normalization)
    "Table 3, quantile a (paper: EfficientAD-M)": [
        (f"a = {a}", paper, 0.999, True, (a, 0.995)) for a, paper in PAPER_BY_A.items()
    ],
    "Table 3, quantile b (paper: EfficientAD-M)": [
        (f"b = {b}", paper, 0.999, True, (0.9, b)) for b, paper in PAPER_BY_B.items()
    ],
    "Table 3, mining factor (paper: EfficientAD-M)": [
        (f"p_hard = {p}", paper, p, True, QUANTILES) for p, paper in PAPER_BY_P_HARD.items()
    ],
    "Table 4, cumulative (paper: EfficientAD-S)": [
        ("PDN", 93.2, 0, False, GAUSSIAN),
        ("+ map normalization", 94.0, 0, False, QUANTILES),
        ("+ hard feature loss", 95.0, 0.999, False, QUANTILES),
        ("+ pretraining penalty: EfficientAD", 95.4, 0.999, True, QUANTILES),
    ],
    "Table 5, isolated (paper: EfficientAD-S)": [
        ("EfficientAD", 95.4, 0.999, True, QUANTILES),
        ("without map normalization", 94.7, 0.999, True, GAUSSIAN),
        ("without hard feature loss", 94.7, 0, True, QUANTILES),
        ("without pretraining penalty", 95.0, 0.999, False, QUANTILES),
    ],
}
SIMPLENET_DEFAULTS = {"noise": 0.015, "adaptor": True, "layers": [2, 3]}  # what its ablation varies


def normalizations(p_hard: float, penalty: bool) -> list[tuple[float, float] | None]:
    """The map normalizations under which the tables want a training with these options."""
    rows = [row for table in TABLES.values() for row in table]
    return list(dict.fromkeys(n for _, _, p, q, n in rows if (p, q) == (p_hard, penalty)))


def variant(training: dict) -> str:
    """A run's "training" -> "small", "medium" or "simplenet"."""
    return training.get("size") or training["model"]


def duration(training: dict) -> str:
    """A run's "training" -> how long it trained. SimpleNet's steps depend on the category."""
    epochs, steps = training.get("epochs"), training["steps"]
    return f"{epochs} epochs" if epochs else f"{steps} steps"


def spread(values: list[float]) -> dict:
    """{"mean", "std" (of the sample, n − 1; None for one value), "values"}, in percent."""
    values = [100 * v for v in values]
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": mean(values), "std": deviation, "values": values}


def reduce(function: Callable, figures: list[dict], metrics: Iterable[str] = COLUMNS) -> dict:
    """{metric: function(its values in `figures`)} for each metric that all of them have."""
    shared = [m for m in metrics if all(m in f for f in figures)]
    return {m: function([f[m] for f in figures]) for m in shared}


def cells(columns: dict[str, str], rows: list[dict]) -> list[list[str]]:
    """Rows for `table`, from rows by the names of columns; the titles come first."""

    def text(row: dict, column: str) -> str:
        value = row.get(column)
        if column.endswith("diff"):
            return "" if value is None else f"{value:+.1f}"
        if isinstance(value, dict):  # a `spread`
            plus_minus = "" if value["std"] is None else f" ± {value['std']:.1f}"
            return f"{value['mean']:.1f}{plus_minus}"
        return f"{value:.1f}" if isinstance(value, float) else value or "–"

    return [[*columns.values()], *([text(row, column) for column in columns] for row in rows)]


def summarize_collection(results: list[dict], size: str) -> dict:
    """One `variant` in numbers: categories {name: {"seeds", metric: `spread`}}, the mean
    over categories, seed by seed, for the seeds that all have, the paper's values. "collection" is
    None unless the categories are exactly those of one. Raises ValueError for two runs of one
    category and seed."""
    results, runs, seeds = [r for r in results if variant(r["training"]) == size], {}, {}
    for r in results:
        by_type = {f"{kind}/{k}": v for kind, entry in r["types"].items() for k, v in entry.items()}
        runs[r["category"], r["training"]["seed"]] = r | by_type
    if len(runs) < len(results):
        raise ValueError(f"two {size} runs of one category with the same seed; move one elsewhere")
    for category, seed in sorted(runs):
        seeds.setdefault(category, []).append(seed)
    categories = {
        name: {"seeds": s, **reduce(spread, [runs[name, seed] for seed in s])}
        for name, s in seeds.items()
    }
    common = sorted(set.intersection(*map(set, seeds.values())))
    means = [reduce(mean, [runs[name, seed] for name in seeds]) for seed in common]
    collection = next((c for c, names in COLLECTIONS.items() if {*names.split()} == {*seeds}), None)
    training = [r["training"] for r in results]
    models, durations = {label(t) for t in training}, {duration(t) for t in training}
    return {
        "collection": collection,
        "size": size,
        "steps": sorted({t["steps"] for t in training}),
        "name": f"{'/'.join(sorted(models))}, {' or '.join(sorted(durations))}",
        "categories": categories,
        "mean": {"seeds": common, **reduce(spread, means)} if common else None,
        "paper": {name: PAPER.get((size, name), {}) for name in (*seeds, collection) if name},
    }


def collection_rows(*summaries: dict) -> list[list[str]]:
    """Rows for `table`: one for each category, then their mean. A column of the paper's values
    follows each metric that has any. Several models stand side by side, with a row for each."""

    def row(s: dict, name: str, entry: dict, published: str) -> dict:
        paper = {f"{m} paper": value for m, value in s["paper"].get(published, {}).items()}
        about = {"percent": name, "model": s["name"], "runs": str(len(entry["seeds"]))}
        return about | entry | paper

    rows = [row(s, name, e, name) for s in summaries for name, e in s["categories"].items()]
    rows.sort(key=lambda r: r["percent"])
    for s in summaries:
        name = f"mean of {s['collection'] or 'these {}'.format(len(s['categories']))}"
        rows.append(row(s, name, s["mean"] or {"seeds": []}, s["collection"]))
    columns = {name: name for name in ("percent", "model", "runs")}
    if len(summaries) == 1:
        del columns["model"]
    for metric, title in COLUMNS.items():
        if any(metric in r for r in rows):
            columns[metric] = title
            if metric == "image_auroc" or any(f"{metric} paper" in r for r in rows):
                columns[f"{metric} paper"] = "paper"
    return cells(columns, rows)


def ablation_rows(results: list[dict]) -> dict[str, list[dict]]:
    """Results of an ablation's runs -> {title: [{"row", "paper", "ours": `spread` over the seeds,
    or None without such a run}]}. Tables 4 and 5 have differences too, "paper_diff" and "diff":
    from the row above, or from the first one."""
    scores = {}
    for entry in (entry for r in results for entry in r.get("ablation", [])):
        quantiles = tuple(entry["quantiles"]) if entry["quantiles"] else GAUSSIAN
        key = entry["p_hard"], entry["penalty"], quantiles
        scores.setdefault(key, []).append(entry["image_auroc"])
    tables = {}
    for title, table in TABLES.items():
        tables[title] = rows = []
        for name, paper, *key in table:
            ours = scores.get(tuple(key))
            rows.append({"row": name, "paper": paper, "ours": ours and spread(ours)})
        for i, row in enumerate(rows if title.startswith(("Table 4", "Table 5")) else []):
            other = rows[0 if "isolated" in title else max(0, i - 1)]
            both = i > 0 and row["ours"] and other["ours"]
            row["paper_diff"] = row["paper"] - other["paper"] if i > 0 else None
            row["diff"] = row["ours"]["mean"] - other["ours"]["mean"] if both else None
    return tables


def simplenet_ablation_rows(results: list[dict]) -> dict[str, list[dict]]:
    """The same for SimpleNet: runs that differ from the defaults in one option, by that option. The
    paper's values are not known here. Rows are {"row", metric: `spread`}."""
    tables = {}
    for option, default in SIMPLENET_DEFAULTS.items():
        others, by_value = {k: v for k, v in SIMPLENET_DEFAULTS.items() if k != option}, {}
        for r in sorted(results, key=lambda r: r["training"][option]):
            if others.items() <= r["training"].items():
                by_value.setdefault(json.dumps(r["training"][option]), []).append(r)
        tables[f"SimpleNet, {option}"] = rows = []
        for value, runs in by_value.items():
            name = f"{option} {value}" + (" (default)" if value == json.dumps(default) else "")
            rows.append({"row": name, **reduce(spread, runs, LOCATED)})
    return tables


def summarize_runs(results: list[dict]) -> tuple[dict, dict[str, list[list[str]]]]:
    """Results of the runs in a folder -> (numbers, {title: rows for `table`}). Runs of one category
    and model that differ in what an ablation varies give tables 3 to 5, or SimpleNet's; others one
    table. Raises ValueError for runs that do not belong together."""
    training = [r["training"] for r in results]
    if not results:
        return {"collections": []}, {}
    if not is_ablation(results):
        known = {variant(t) for t in training}
        sizes = [size for size in ("small", "medium", "simplenet") if size in known]
        summaries = [summarize_collection(results, size) for size in sizes]
        names = " and ".join(sorted({s["collection"] or "Collection" for s in summaries}))
        title = f"{names}, {'; '.join(s['name'] for s in summaries)}"
        return {"collections": summaries}, {title: collection_rows(*summaries)}
    kinds = {(r["category"], label(t), duration(t)) for r, t in zip(results, training)}
    if len(kinds) > 1:
        reason = "an ablation's runs are of one category, model and number of steps"
        raise ValueError(f"{reason}; move the others elsewhere")
    (category, _, steps), size = kinds.pop(), variant(training[0])
    if size == "simplenet":
        tables, columns = simplenet_ablation_rows(results), {"row": f"{category}, percent"}
        columns |= {m: COLUMNS[m] for m in LOCATED if any(m in r for r in results)}
    else:
        tables, columns = ablation_rows(results), {"row": "image AU-ROC, percent", "paper": "paper"}
        ours = f"{category}, {size[0].upper()}"
        columns |= {"paper_diff": "diff.", "ours": ours, "diff": "diff."}
    content = {"category": category, "size": size, "steps": training[0]["steps"], "tables": tables}
    sections = {f"{title}; ours: {steps}": cells(columns, rows) for title, rows in tables.items()}
    return content, sections


def is_ablation(results: list[dict]) -> bool:
    """Whether runs of one category and model differ in what an ablation varies."""
    settings = {}
    for r in results:
        training = r["training"]
        setting = [training.get(option) for option in ("p_hard", *SIMPLENET_DEFAULTS)]
        setting.append(training.get("pretraining_images") == "none")
        settings.setdefault((r["category"], variant(training)), []).append(setting)
    return any(setting != known[0] for known in settings.values() for setting in known)
