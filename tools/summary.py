"""Tables over several runs, with the paper's values beside ours. Knows the content of results.json;
no model, no file."""

from collections.abc import Callable
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
METRICS = {
    "image_auroc": "image AU-ROC",
    LOGICAL: "logical",
    STRUCTURAL: "structural",
    **{key: f"{name} {limit}" for key, name, limit in (AU_PRO, AU_SPRO)},
    "pixel_auroc": "pixel AU-ROC",
    "image_ap": "image AP",
}
COLUMNS = {name: name for name in ("percent", "model", "runs")}  # key of a row: title
for metric, title in (*METRICS.items(), ("difference", "diff.")):
    COLUMNS |= {metric: title, f"{metric} paper": "paper"}
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

QUANTILES, GAUSSIAN = (0.9, 0.995), ()  # map normalization: (a, b), or mean 0 and variance 1
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
SIZES = ("small", "medium", "simplenet")  # what distinguishes the models: `variant`


def normalizations(p_hard: float, penalty: bool) -> list[tuple[float, ...]]:
    """The map normalizations under which the tables want a training with these options."""
    rows = [row for table in TABLES.values() for row in table]
    return list(dict.fromkeys(n for _, _, p, q, n in rows if (p, q) == (p_hard, penalty)))


def variant(training: dict) -> str:
    """A run's "training" -> one of SIZES."""
    return training.get("size") or training["model"]


def describe(training: dict) -> str:
    """A run's "training" -> model and length. SimpleNet's steps depend on the category."""
    epochs, steps, batch = (training.get(key) for key in ("epochs", "steps", "batch_size"))
    length = f"{epochs} epochs" + f" in batches of {batch}" * bool(batch)
    return f"{label(training)}, " + (length if epochs else f"{steps} steps")


def spread(values: list[float]) -> dict:
    """{"mean", "std" (of the sample, n − 1; None for one value), "values"}, in percent."""
    values = [100 * v for v in values]
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": mean(values), "std": deviation, "values": values}


def reduce(function: Callable, figures: list[dict]) -> dict:
    """{metric: function(its values in `figures`)} for each metric that all of them have."""
    shared = [m for m in METRICS if figures and all(m in f for f in figures)]
    return {m: function([f[m] for f in figures]) for m in shared}


def collection_rows(results: list[dict]) -> list[dict]:
    """Rows for one `variant`: each category, then the mean over categories, seed by seed for the
    seeds that all have. The paper's mean stands beside a complete collection's alone. Raises
    ValueError for two runs of one category and seed."""
    size, runs, seeds = variant(results[0]["training"]), {}, {}
    for r in sorted(results, key=lambda r: (r["category"], r["training"]["seed"])):
        category, seed = r["category"], r["training"]["seed"]
        if (category, seed) in runs:
            raise ValueError(f"two {size} runs of {category} with seed {seed}; move one elsewhere")
        by_type = {f"{kind}/{k}": v for kind, entry in r["types"].items() for k, v in entry.items()}
        runs[category, seed] = r | by_type
        seeds.setdefault(category, []).append(seed)
    complete = [c for c, names in COLLECTIONS.items() if {*names.split()} == {*seeds}]
    collection = complete[0] if complete else f"these {len(seeds)}"
    common = sorted(set.intersection(*map(set, seeds.values())))
    figures = {name: [runs[name, seed] for seed in own] for name, own in seeds.items()}
    figures[collection] = [reduce(mean, [runs[name, seed] for name in seeds]) for seed in common]

    model, rows = " or ".join(sorted({describe(r["training"]) for r in results})), []
    for name, entries in figures.items():
        paper = {f"{m} paper": value for m, value in PAPER.get((size, name), {}).items()}
        about = {"percent": name, "model": model, "runs": len(entries)}
        rows.append(about | reduce(spread, entries) | paper)
    rows[-1]["percent"] = f"mean of {collection}"
    return rows


def ablation_tables(results: list[dict]) -> dict[str, list[dict]]:
    """Results of an ablation's runs -> {title: rows}, ours as the `spread` over the seeds, or None
    without such a run. Tables 4 and 5 have differences too: from the row above, or the first. They
    are of the recipe that most runs have; the last table compares the recipes."""
    entries = [entry for r in results for entry in r.get("ablation", [])]
    recipes = [entry.get("recipe", "paper") for entry in entries]
    by_run = [r["ablation"][0].get("recipe", "paper") for r in results if r.get("ablation")]
    recipe, scores, tables = max(by_run, key=by_run.count, default="paper"), {}, {}
    for entry, name in zip(entries, recipes):
        key = name, entry["p_hard"], entry["penalty"], tuple(entry["quantiles"] or GAUSSIAN)
        scores.setdefault(key, []).append(entry["image_auroc"])
    for title, table in TABLES.items():
        tables[title] = rows = []
        for name, paper, *setting in table:
            ours = scores.get((recipe, *setting))
            row = {"percent": name, "image_auroc": ours and spread(ours)}
            rows.append(row | {"image_auroc paper": paper})
        for i, row in enumerate(rows[1:] if title.startswith(("Table 4", "Table 5")) else []):
            other = rows[0 if "isolated" in title else i]
            both = row["image_auroc"] and other["image_auroc"]
            row["difference"] = both and row["image_auroc"]["mean"] - other["image_auroc"]["mean"]
            row["difference paper"] = row["image_auroc paper"] - other["image_auroc paper"]
    tables["Recipe (not in the paper)"] = rows = []
    for name in ("paper", "short"):  # shared stem and all
        ours = scores.get((name, 0.999, True, QUANTILES))
        rows.append({"percent": f"recipe {name}", "image_auroc": ours and spread(ours)})
    return tables


def is_ablation(results: list[dict]) -> bool:
    """Whether runs of one category and model differ in what the ablation varies."""
    settings = {}
    for r in results:
        training = r["training"]
        setting = training.get("p_hard"), training.get("pretraining_images") == "none"
        settings.setdefault((r["category"], variant(training)), set()).add(setting)
    return any(len(known) > 1 for known in settings.values())


def summarize(results: list[dict]) -> dict[str, list[dict]]:
    """Results of the runs in a folder -> {title: rows}: tables 3 to 5 of an ablation's, one table
    of others. Raises ValueError for runs that do not belong together."""
    if is_ablation(results):
        kinds = {f"{r['category']}, {describe(r['training'])}" for r in results}
        if len(kinds) > 1:
            reason = "an ablation's runs are of one category, model and number of steps"
            raise ValueError(f"{reason}; move the others elsewhere")
        (ours,) = kinds
        return {f"{title}; ours: {ours}": rows for title, rows in ablation_tables(results).items()}
    by_size = [[r for r in results if variant(r["training"]) == size] for size in SIZES]
    parts = [collection_rows(part) for part in by_size if part]
    rows = sorted((row for part in parts for row in part[:-1]), key=lambda row: row["percent"])
    rows += [part[-1] for part in parts]
    title = "; ".join(part[-1]["model"] for part in parts)
    if len(parts) == 1:
        rows = [{k: v for k, v in row.items() if k != "model"} for row in rows]
    return {title: rows} if rows else {}


def cells(rows: list[dict]) -> list[list[str]]:
    """Rows of a summary -> rows for `table`, with the columns that any of them has. The paper's
    values stand only beside ours."""

    def text(column: str, value: object) -> str:
        if isinstance(value, dict):  # a `spread`
            plus_minus = "" if value["std"] is None else f" ± {value['std']:.1f}"
            return f"{value['mean']:.1f}{plus_minus}"
        if isinstance(value, float):
            return f"{value:+.1f}" if "difference" in column else f"{value:.1f}"
        return "–" if value is None else str(value)

    known = {k for row in rows for k in row}
    columns = {k: v for k, v in COLUMNS.items() if {k, k.removesuffix(" paper")} <= known}
    return [[*columns.values()], *([text(k, row.get(k)) for k in columns] for row in rows)]
