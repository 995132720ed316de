"""Figures as Markdown tables and as a picture: those of tools.benchmark, and docs/results.md's
curve."""

import io
import json
import math
from importlib.util import find_spec
from pathlib import Path

from support import report
from support.images import DataError
from support.runs import write


def text(value: object, digits: int = 3) -> str:
    """So many digits of a float; a dash where there is nothing."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    rounded = float(f"{value:.{digits}g}")
    decimals = digits - 1 - math.floor(math.log10(rounded)) if 0 < value < math.inf else 0
    return f"{value:,.{max(0, decimals)}f}"


def table(rows: list[dict]) -> str:
    """Markdown; the rows' keys are the heads of the columns."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return report.table([keys, *([text(row.get(key)) for key in keys] for row in rows)])


def section(results: dict) -> str:
    """All figures as Markdown: single ones as a list, then the tables."""
    single = [f"- {k}: {text(v, 4)}" for k, v in results.items() if not isinstance(v, list)]
    tables = [table(value) for value in results.values() if isinstance(value, list)]
    return "\n\n".join(["\n".join(single), *tables])


def show(path: Path) -> None:
    """Print the tables of a file that --json wrote, and draw its "cost" or its "curve" beside it.
    Raises DataError for another file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        text = section(results)
        points = [(r["cost against"], r["row"], r["at"], r["ms"]) for r in results.get("cost", [])]
        for figure in ("image AU-ROC", "AU-PRO"):
            rows = (row for row in results.get("curve", []) if figure in row)
            points += [(figure, row["training"], row["minutes"], row[figure]) for row in rows]
    except (ValueError, TypeError, AttributeError, KeyError):
        raise DataError(f"{path}: --show takes a file that --json wrote") from None
    print(text)
    if points:
        plot(points, "cost" in results, path.with_suffix(".svg"))


def plot(points: list[tuple], costs: bool, path: Path) -> None:
    """SVG of points (panel, line, x, y): ms against batch size and so on, or percent against
    minutes. Raises DataError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise DataError(f"{path}: drawing it needs matplotlib: pip install matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure, panels = Figure((12, 3.6), layout="constrained"), {}
    for panel, line, x, y in points:
        panels.setdefault(panel, {}).setdefault(line, []).append((x, y))
    for i, (panel, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), i)
        for name, line in lines.items():
            axes.semilogx(*zip(*line), "o-", label=name)
        ticks = sorted({x for line in lines.values() for x, _ in line})
        axes.set_xticks(ticks, ticks)
        axes.set_xticks([], minor=True)
        axes.set(xlabel=panel, ylabel="ms altogether" if panel == "images" else "ms an image")
        if costs:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter())  # if there is less than a decade
        else:
            axes.set(xlabel="minutes", ylabel=f"{panel}, percent")
        axes.legend()
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    write(path, picture.getvalue())
