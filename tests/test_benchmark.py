"""tools.benchmark, tiny; docs/speed.md shows the committed figures. No times are tested."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused

from support.data import DataError
from tools import benchmark, benchmark_tables
from tools.benchmark_rows import FP32, ROWS, kernel_cases


def test_inference_and_training(tmp_path, monkeypatch, capsys):
    """A runtime that is not installed is named; the other rows compute the same map."""

    def missing(model, images):
        raise ImportError("No module named 'abacus'")

    monkeypatch.setitem(ROWS, "abacus", (missing, FP32))
    rows = "eager fp32", "abacus", "eager half", "ours"
    scope = benchmark.Scope(("EfficientAD-S",), rows, (1,), (2,), (128,), (1,), side=128)
    monkeypatch.setattr(benchmark, "QUICK", scope)
    options = f"--quick --budget 0.001 --device cpu --json {tmp_path / 'x.json'}"
    benchmark.main(options.split())
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert f"- command: python -m tools.benchmark {options}" in printed
    plain, abacus, half, ours = results["inference"]
    assert abacus["missing"] == "ImportError: No module named 'abacus'" in printed
    assert plain["map error"] == 0 < half["map error"] < 0.05 > ours["map error"] > 0
    for row in (plain, half, ours):
        assert row["passes"] == 3 and row["images/s"] > 0 and row["% of ceiling"] > 0
    flops = ours["TFLOP/s"] * ours["mean ms"] * 1e9
    layers = (125, 3, 4, 128), (59, 128, 4, 256), (27, 256, 3, 256)  # side, channels, kernel
    pdn = sum(side**2 * c * k * k * out for side, c, k, out in layers)
    networks = 2 * pdn + 24**2 * 256 * 16 * (384 + 768)  # teacher and student
    assert networks < flops / 2 < 1.1 * networks  # the autoencoder is the rest
    costs = [(row["cost against"], row["at"]) for row in results["cost"] if "ours" in row["row"]]
    assert costs == [("batch size", 2), ("image size", 128), ("images", 1)]
    assert {"plain fp32", "ours"} <= {row["row"] for row in results["training"]}
    pytest.importorskip("matplotlib")
    benchmark_tables.plot(results["cost"], tmp_path / "x.svg")
    assert "batch size" in (tmp_path / "x.svg").read_text()


def test_kernels_section_on_a_cpu(monkeypatch):
    """There the kernels compute their references; the benchmark's plain forms agree with them."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cpu = torch.device("cpu")
    for name, kernel, plain, arguments in kernel_cases(1, 64, cpu):
        torch.testing.assert_close(kernel(*arguments), plain(*arguments), msg=name)
    rows = benchmark.kernels_section(cpu, 64, (1,))["kernels"]
    assert len(rows) == 8 and all(row["ms"] > 0 and row["% of ceiling"] > 0 for row in rows)


def test_rows_take_turns():
    turns = []
    benchmark.take_turns({name: partial(turns.append, name) for name in "ab"}, budget=0)
    assert turns == list("ababab")


def test_accuracy(model, run, tiny_demo, run_script, monkeypatch):
    script = "tools.benchmark", "--device", "cpu", "--accuracy", run
    assert_refused(run_script(*script), run, "a run of train.py")
    monkeypatch.setitem(model.training_info, "data", str(tiny_demo))
    model.save(str(run / "model.pt"))
    status, out, err = run_script(*script, "--json", "accuracy.json")
    assert status == 0, err
    figures = json.loads(Path("accuracy.json").read_text())
    assert figures["test images"] == 9 and "- test images: 9" in out
    assert 0 < figures["mean map error"] <= figures["largest map error"] < 0.05
    assert figures["pairs in another order"] <= figures["pairs of images"] == 36


def test_bad_options(run_script, monkeypatch):
    assert_refused(run_script("tools.benchmark", "--kernels", "--device", "cpu"), "needs a GPU")
    assert_refused(run_script("tools.benchmark", "--training", "--plot", "x.svg"), "--inference")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(run_script("tools.benchmark", "--plot", "x.svg"), "pip install matplotlib")


def test_docs_show_the_committed_figures():
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    part = text.partition(benchmark_tables.BEGIN)[2].partition(benchmark_tables.END)[0]
    files = sorted((ROOT / "docs/benchmarks").glob("*.json"))
    assert files and part.strip() == benchmark_tables.docs_section(files)


def test_docs_are_rewritten_between_the_marks(tmp_path, monkeypatch):
    marks = benchmark_tables.BEGIN, benchmark_tables.END
    rows = [{"row": "plain", "steps/s": 2.0, "steps": 3}, {"row": "ours", "steps/s": 1234.5}]
    figures, docs = tmp_path / "x.json", tmp_path / "speed.md"
    figures.write_text(json.dumps({"device": "an abacus", "training": rows}))
    docs.write_text("before\n{}\nold\n{}\nafter\n".format(*marks))
    monkeypatch.setattr(benchmark_tables, "DOCS", docs)
    for _ in range(2):
        benchmark.main(["--docs", str(figures)])
        text = docs.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert "- device: an abacus" in text and "| ours  |   1,234 |     – |" in text
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="files that --json wrote"):
        benchmark.main(["--docs", str(tmp_path / "list.json")])
    docs.write_text("no marks")
    with pytest.raises(DataError, match="needs the marks"):
        benchmark.main(["--docs", str(figures)])
    assert docs.read_text() == "no marks"
