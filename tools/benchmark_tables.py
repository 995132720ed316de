"""Figures of tools.benchmark as Markdown tables, and a picture of the costs."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

from support import report
from support.data import DataError


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
    """Print the tables of a file that --json wrote, and draw its costs beside it. Raises DataError
    for another file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        print(section(results))
    except (ValueError, TypeError, AttributeError):
        raise DataError(f"{path}: --show takes a file that --json wrote") from None
    if "cost" in results:
        plot(results["cost"], path.with_suffix(".svg"))


def plot(costs: list[dict], path: Path) -> None:
    """SVG: ms against batch size, image size and number of images. Raises DataError without
    matplotlib."""
    if find_spec("matplotlib") is None:
        raise DataError(f"{path}: drawing it needs matplotlib: pip install matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure, lines = Figure((12, 3.6), layout="constrained"), {}
    for point in costs:
        line = lines.setdefault(point["cost against"], {}).setdefault(point["row"], [])
        line.append((point["at"], point["ms"]))
    for axes, (cost, rows) in zip(figure.subplots(1, len(lines)), lines.items()):
        for row, line in rows.items():
            axes.loglog(*zip(*line), "o-", label=row)
        ticks = [x for x, _ in line]
        axes.set_xticks(ticks, ticks)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter())  # if there is less than a decade
        axes.set(xlabel=cost, ylabel="ms altogether" if cost == "images" else "ms an image")
        axes.legend()
    with rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
