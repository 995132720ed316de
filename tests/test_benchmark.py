"""tools.benchmark, tiny; docs/speed.md shows the committed figures. No times are tested."""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import CPU, ROOT, assert_refused, rows_of

from tools import benchmark, first_gpu
from tools.benchmark_rows import FP32, ROWS, in_half, kernel_cases
from tools.benchmark_tables import section


def test_inference_and_training(tmp_path, monkeypatch, capsys):
    """A runtime that is not installed is named; the other rows compute the same map."""

    def missing(model, images):
        raise ImportError("No module named 'abacus'")

    monkeypatch.setitem(ROWS, "abacus", (missing, FP32))
    rows = "eager fp32", "abacus", "eager half", "ours"
    scope = benchmark.Scope(120, ("EfficientAD-S",), rows, (1,), (2,), (128,), (1,), side=128)
    monkeypatch.setattr(benchmark, "QUICK", scope)
    options = f"--quick --budget 0.001 --device cpu --json {tmp_path / 'x.json'}"
    benchmark.main(options.split())
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert f"- command: python -m tools.benchmark {options}" in printed
    plain, abacus, half, ours = results["inference"]
    assert abacus["missing"] == "ImportError: No module named 'abacus'" in printed
    assert 0 < half["map error"] < 0.05 > ours["map error"] > 0
    flops = ours["TFLOP/s"] * ours["mean ms"] * 1e9
    layers = (125, 3, 4, 128), (59, 128, 4, 256), (27, 256, 3, 256)  # side, channels, kernel
    pdn = sum(side**2 * c * k * k * out for side, c, k, out in layers)
    networks = 2 * pdn + 24**2 * 256 * 16 * (384 + 768)  # teacher and student
    assert networks < flops / 2 < 1.1 * networks  # the autoencoder is the rest
    costs = [(row["cost against"], row["at"]) for row in results["cost"] if "ours" in row["row"]]
    assert costs == [("batch size", 2), ("image size", 128), ("images", 1)]
    assert {"plain fp32", "ours"} <= {row["row"] for row in results["training"]}
    model = benchmark.make_model(benchmark.SHARED_STEM, torch.device("cpu"), 128)
    with torch.inference_mode():
        m = in_half(model)(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))[0]
    assert model.shared_stem and m.shape == (1, 1, 128, 128)
    pytest.importorskip("matplotlib")
    benchmark.main(["--show", str(tmp_path / "x.json")])
    assert capsys.readouterr().out.strip() in printed
    assert "batch size" in (tmp_path / "x.svg").read_text()


def test_first_row_fails(monkeypatch):
    """The others have no × and no error of their map, since those are against the first row."""

    def too_large(model, images):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(ROWS, "eager fp32", (too_large, FP32))
    model = benchmark.make_model("EfficientAD-S", torch.device("cpu"), 128)
    images = benchmark.draw_images(1, 128, torch.device("cpu"))
    first, half = benchmark.measure_rows(model, images, ("eager fp32", "eager half"), 0)
    assert first == {"row": "eager fp32", "missing": "RuntimeError: out of memory"}
    assert half["mean ms"] > 0 and not {"×", "map error"} & half.keys()


def test_later_section_fails(monkeypatch, tmp_path):
    """What was measured before is in the file."""
    monkeypatch.setitem(benchmark.SECTIONS, "cost", lambda *_: {"measured": 1})
    monkeypatch.setitem(benchmark.SECTIONS, "training", Mock(side_effect=RuntimeError))
    with pytest.raises(RuntimeError):
        options = ("--device", "cpu", "--json", str(tmp_path / "x.json"))
        benchmark.main(["--sections", "cost", "training", *options])
    assert json.loads((tmp_path / "x.json").read_text())["measured"] == 1


def test_kernels_section_on_a_cpu(monkeypatch):
    """There kernels compute their references; the benchmark's own plain forms agree with them."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cpu = torch.device("cpu")
    cases = list(kernel_cases(1, 64, cpu))[-2:]  # the others' plain form is the reference itself
    assert [case[0] for case in cases] == ["quantile", "hard loss + gradient"]
    for name, kernel, plain, arguments in cases:
        torch.testing.assert_close(kernel(*arguments), plain(*arguments), msg=name)
    scope = benchmark.Scope(batches=(1,), side=64)
    rows = benchmark.kernels_section(scope, cpu)["kernels"]
    assert len(rows) == 14


def test_first_gpu(tmp_path, monkeypatch, capsys):
    """Parts in order of worth; one that fails, or that ends its process, leaves the others, time
    ends in the middle of one. Stand-ins for what a GPU measures."""

    def inference(scope, device):
        if scope.models == ("EfficientAD-M",):
            time.sleep(100)  # a compiler
        if scope.batches == (16,):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"inference": [{"row": "ours", "ms": float(scope.batches[0])}]}

    def kernels(scope, device):
        if scope.batches == (16,):
            raise RuntimeError("no kernel image\nis available")
        return {"copy, GB/s": 3000.0, "kernels": [{"kernel": "quantile", "ms": 0.25}]}

    sections = {"inference": inference, "kernels": kernels, "training": kernels}
    monkeypatch.setattr(benchmark, "SECTIONS", sections)
    monkeypatch.setattr(first_gpu, "START", "fork")  # the stand-ins are this process's
    monkeypatch.setattr(first_gpu, "correctness", lambda tests, *_: {tests: "3 passed"})
    options = f"--first-gpu --minutes 0.08 --device cpu --json {tmp_path / 'gpu.json'}"
    benchmark.main(options.split())
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["tests/kernel_checks.py"] == "3 passed"
    assert results["command"].endswith("gpu.json")
    assert results["kernels, batch 16"] == "RuntimeError: no kernel image"
    assert results["EfficientAD-S, batch 16"] == f"exit status {-signal.SIGKILL}"
    assert results["EfficientAD-M, batch 1"] == "cut short" and len(results["inference"]) == 1
    assert list(results)[-1] == "EfficientAD-M, batch 1"
    assert "| ours |" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="exit status 2: .*no such"):
        first_gpu.command("evaluate.py", "--run", tmp_path / "gone")
    warn = "import warnings; warnings.warn('no CUDA graph')"
    assert first_gpu.command("-c", warn) == "no CUDA graph"


def test_first_gpus_tests(tmp_path):
    """What pytest says is kept; what fails is named, with its reason; time may end before it."""
    test, log = tmp_path / "test_a.py", tmp_path / "gpu.log"
    test.write_text("def test_cuda(): assert 2 == 3\ndef test_gpu(): pass\ndef test_b(): 1 / 0\n")
    found = first_gpu.correctness(str(test), log, torch.device("cpu"), 60)[str(test)]
    assert "1 failed, 1 passed, 1 deselected" in found and "assert 2 == 3" in found
    assert "def test_cuda" in log.read_text()
    found = first_gpu.correctness(str(test), log, torch.device("cpu"), 0.01)[str(test)]
    assert found.startswith("longer than 0 s")


def test_rows_take_turns():
    turns = []
    benchmark.take_turns({name: partial(turns.append, name) for name in "ab"}, budget=0)
    assert turns == list("ababab")


def test_accuracy(run, own, run_script):
    script = "tools.benchmark", *CPU, "--json", "accuracy.json", "--accuracy"
    assert_refused(run_script(*script, run), run, "a run of train.py")
    status, out, err = run_script(*script, own)
    assert status == 0, err
    figures = json.loads(Path("accuracy.json").read_text())
    assert figures["test images"] == 9 and "- test images: 9" in out
    errors = [float(e) for e in figures["mean error of local and of global map"].split(",")]
    assert 0 < max(errors) <= figures["largest error of a map"] < 0.05 and len(errors) == 2
    assert figures["pairs of images"] == 36 and figures["pairs in another order"] < 9
    assert abs(figures["AU-PRO 0.3, fast form"] - figures["AU-PRO 0.3, eager fp32"]) < 0.02
    assert run_script("evaluate.py", "--run", own, *CPU)[0] == 0
    rows = rows_of(own / "scores.csv")
    scores = [(row["defect"] != "good", float(row["score"])) for row in rows]
    pairs = [a < b for bad_a, a in scores for bad_b, b in scores if bad_b > bad_a]
    assert figures["image AU-ROC, eager fp32"] == pytest.approx(sum(pairs) / len(pairs))


def test_refusals(run_script, tmp_path, monkeypatch):
    command = ("tools.benchmark", *CPU)
    assert_refused(run_script(*command, "--sections", "cost", "kernels"), "needs a GPU")
    for content in ("[]", '{"cost": [{"at": 1}]}'):
        (tmp_path / "x.json").write_text(content)
        assert_refused(run_script(*command, "--show", "x.json"), "x.json: --show takes a file")
    point = {"cost against": "images", "row": "ours", "at": 1, "ms": 2.0}
    (tmp_path / "x.json").write_text(json.dumps({"cost": [point]}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(run_script(*command, "--show", "x.json"), "x.svg", "pip install matplotlib")


def test_docs_show_the_committed_figures():
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))
    files = sorted((ROOT / "docs/benchmarks").glob("*.json"))
    for path in files:
        assert section(json.loads(path.read_text(encoding="utf-8"))) in text
        assert f"({path.relative_to(ROOT / 'docs').with_suffix('.svg')})" in text
    assert files
