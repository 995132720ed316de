"""Figures of benchmark.py as text: tables, a plot, the README's section on speed. Measures nothing."""

import json
import math
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- speed: written by benchmark.py --readme -->", "<!-- end of speed -->"
COLOURS = ("#888888", "#c0392b", "#2471a3")


def number(value: float) -> str:
    """Three digits; nothing where there is nothing."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "–"


def inference_rows(results: dict) -> list[list[str]]:
    """Header and rows of the table of latencies; × is how many times as fast as the first row of the same model and batch."""
    header = "model, batch||mean ms|median ms|images/s|×|TFLOP/s|of ceiling|peak MiB|passes"
    table, base = [header.split("|")], {}
    for r in results.get("inference", []):
        name = f"{r['model']}, {r['batch']}"
        if "ms" not in r:
            table.append([name, r["row"], "–", *[""] * 7])
            continue
        base.setdefault(name, r["ms"])
        table.append([name, r["row"], number(r["ms"]), number(r["median_ms"]), number(r["images_s"]), f"{base[name] / r['ms']:.2f}",
                      number(r["tflop_s"]), f"{r['fraction_of_ceiling']:.0%}", number(r["memory_mib"] or 0),
                      str(r["passes"])])  # fmt: skip
    return table


def training_rows(results: dict) -> list[list[str]]:
    table, base = [["model", "", "steps/s", "×", "minutes for 70,000 steps", "steps measured"]], {}
    for r in results.get("training", []):
        base.setdefault(r["model"], r["steps_s"])
        table.append([r["model"], r["row"], number(r["steps_s"]), f"{r['steps_s'] / base[r['model']]:.2f}",
                      number(r["minutes_70000"]), str(r["steps"])])  # fmt: skip
    return table


def cost_rows(results: dict) -> list[list[str]]:
    table = [["cost against", "", "ms"]]
    for name, points in results.get("cost", {}).items():
        for row in dict.fromkeys(p["row"] for p in points):
            table.append([name, row, ", ".join(f"{p['x']}: {number(p['ms'])}" for p in points if p["row"] == row)])
    return table


def headline(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = f"{results['device']}; {versions}; `{results['command']}`"
    if "matmul_tflop_s" in results:
        fp32, half = (number(results["matmul_tflop_s"][k]) for k in ("fp32", "half"))
        text += f"; matrix products in the same run: {fp32} TFLOP/s in fp32, {half} in half precision"
    if "load_average" in results:
        text += f"; load average {results['load_average']:.1f} before"
        text += ", other programs were running: compare the rows alone" if results["load_average"] > 1 else ""
    return text


def print_tables(results: dict) -> None:
    if "device" in results and "command" in results:
        print(headline(results))
    for rows in (inference_rows(results), training_rows(results), cost_rows(results)):
        if len(rows) > 1:
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            print()
            for row in rows:
                print("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))
    for r in results.get("inference", []):
        if "missing" in r:
            print(f"not measured: {r['model']}, batch {r['batch']}, {r['row']}: {r['missing']}")


def markdown(rows: list[list[str]]) -> str:
    line = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], line, *rows[1:]))


def speed_section(files: list[Path]) -> str:
    """The README's section, Markdown, from files that benchmark.py --json wrote."""
    parts = []
    for path in files:
        results = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"{headline(results)} ([figures]({path.parent.name}/{path.name})):")
        parts += [markdown(rows) for rows in (inference_rows(results), training_rows(results), cost_rows(results)) if len(rows) > 1]
        if path.with_suffix(".svg").exists():
            parts.append(f"![Cost against batch size, image size and number of images]({path.parent.name}/{path.stem}.svg)")
    return "\n\n".join(parts)


def write_readme(files: list[str]) -> None:
    """Put that section between the README's two marks. One line and exit status 2 if a file or a mark is missing."""
    text = README.read_text(encoding="utf-8")
    try:
        section = speed_section([Path(f) for f in files])
        before, _, rest = text.partition(BEGIN)
        _, mark, after = rest.partition(END)
        if not mark:
            raise ValueError(f"README.md: the marks {BEGIN} and {END} are missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"benchmark.py: --readme: {error!r}; give files that benchmark.py --json wrote", file=sys.stderr)
        sys.exit(2)
    README.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}", encoding="utf-8")


def plot(results: dict) -> str:
    """SVG: a panel for each cost, both axes logarithmic."""
    width, height, left, top = 300, 190, 60, 40
    units = {"batch size": "ms an image", "image size": "ms an image", "images": "ms altogether"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * (width + 90)}" height="{height + 110}" font-family="sans-serif"',
        f' font-size="12"><rect width="100%" height="100%" fill="white"/><text x="{left}" y="16">{results["device"]}</text>',
    ]
    for i, (name, points) in enumerate(results["cost"].items()):
        x0, ticks = left + i * (width + 90), sorted({p["x"] for p in points})
        low, high = (math.log(f(p["ms"] for p in points)) for f in (min, max))
        low, high = low - 0.1, high + 0.1

        def place(x: float, ms: float, x0=x0, ticks=ticks, low=low, high=high) -> tuple[float, float]:
            share = math.log(x / ticks[0]) / max(math.log(ticks[-1] / ticks[0]), 1e-9)
            return round(x0 + width * share, 1), round(top + height * (1 - (math.log(ms) - low) / (high - low)), 1)

        parts.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>')
        parts.append(f'<text x="{x0 + width / 2}" y="{top + height + 36}" text-anchor="middle">{name}: {units[name]}</text>')
        for x in ticks:
            parts.append(f'<text x="{place(x, 1)[0]}" y="{top + height + 16}" text-anchor="middle">{x}</text>')
        for ms in (math.exp(low + 0.1), math.exp((low + high) / 2), math.exp(high - 0.1)):
            parts.append(f'<text x="{x0 - 6}" y="{place(ticks[0], ms)[1] + 4}" text-anchor="end">{number(ms)}</text>')
        for k, row in enumerate(dict.fromkeys(p["row"] for p in points)):
            colour = COLOURS[0] if row.startswith("eager") else COLOURS[1 + k % 2]
            line = [place(p["x"], p["ms"]) for p in points if p["row"] == row]
            path = " ".join(f"{x},{y}" for x, y in line)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in line]
            parts.append(f'<text x="{x0 + 8}" y="{top + 16 + 15 * k}" fill="{colour}">{row}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
