"""Figures of tools.benchmark as text: tables, a plot, the generated section of docs/speed.md."""

import json
import math
import os
from pathlib import Path

from support.data import DataError
from support.runs import write

DOCS = Path(__file__).parent.parent / "docs/speed.md"
BEGIN, END = "<!-- written by python -m tools.benchmark --docs -->", "<!-- end of tables -->"


def text(value: object, digits: int = 3) -> str:
    """So many digits of a float; a dash where there is nothing."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    rounded = float(f"{value:.{digits}g}")
    decimals = digits - 1 - math.floor(math.log10(rounded)) if value > 0 else 0
    return f"{value:,.{max(0, decimals)}f}"


def table(rows: list[dict]) -> str:
    """Markdown, its source aligned; the rows' keys are the heads of the columns."""
    columns = []
    for key in dict.fromkeys(key for row in rows for key in row):
        words = all(isinstance(row.get(key, ""), str) for row in rows)
        cells = [key, "---" if words else "--:", *(text(row.get(key)) for row in rows)]
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if words else cell.rjust(width) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


def section(results: dict) -> str:
    """All figures as Markdown: single ones as a list, then the tables."""
    single = [f"- {k}: {text(v, 4)}" for k, v in results.items() if not isinstance(v, list)]
    tables = [table(value) for value in results.values() if isinstance(value, list)]
    return "\n\n".join(["\n".join(single), *tables])


def docs_section(files: list[Path]) -> str:
    """The generated section of docs/speed.md, from files that --json wrote."""
    parts = []
    for path in files:
        name = os.path.relpath(path.with_suffix(""), DOCS.parent)
        try:
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, AttributeError):
            raise DataError(f"{path}: --docs takes files that --json wrote") from None
        parts.append(f"[These figures as JSON]({name}.json)")
        if path.with_suffix(".svg").exists():
            parts.append(f"![Cost]({name}.svg)")
    return "\n\n".join(parts)


def write_docs(files: list[Path]) -> None:
    """Put that section between the two marks of docs/speed.md."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise DataError(f"{DOCS}: --docs needs the marks {BEGIN} and {END}")
    write(DOCS, f"{before}{BEGIN}\n\n{docs_section(files)}\n\n{END}{after}")


def plot(costs: list[dict], path: str) -> None:
    """SVG: ms against batch size, image size and number of images. Needs matplotlib."""
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
