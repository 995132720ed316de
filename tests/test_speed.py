"""The fast forms: of the model for inference, of a training step, of distillation. What they compute is what the plain ones do."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import benchmark
import distill
import efficientad
import train
from backbone import ResNet
from benchmarks import figures
from data import list_images, read_image, to_array
from efficientad import EfficientAD, ModelError

SIZE = (128, 128)
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def images(tiny_demo) -> torch.Tensor:
    """The tiny demo set's training and test images, uint8."""
    paths = [*list_images(tiny_demo / "train/good"), *list_images(tiny_demo / "test", recursive=True)]
    return torch.stack([torch.from_numpy(to_array(read_image(p), SIZE)) for p in paths])


def make_model(images: torch.Tensor, steps: int, **config) -> EfficientAD:
    """A model trained for so many steps and calibrated."""
    torch.manual_seed(1)
    model = EfficientAD(image_size=SIZE, **config)
    if config.get("size", "small") == "small":
        model.load_teacher(str(ROOT / "weights/teacher_small.pt"))
    model.fit_teacher_statistics([images[:2]])
    precision = "bf16" if efficientad.cpu_has_bf16(images.device) else "fp32"
    step = train.Step(model.to(memory_format=torch.channels_last), train.make_optimizer(model, 3e-4), precision)
    for i in range(steps):
        step({"images": images[i % 5][None], "draws": train.draw(1)})
    model.calibrate([images[3:5]])
    return model


def rms_ratio(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return ((ours - plain).square().mean().sqrt() / plain.std()).item()


@pytest.mark.parametrize("size, padding, steps", [("small", False, 8), ("small", True, 0), ("medium", True, 0)])
def test_fast_form_computes_the_same(size, padding, steps, images):
    """In fp32 but for rounding; in bf16 within 5 % RMS, and scores in the same order wherever they differ by more."""
    model = make_model(images, steps, size=size, padding=padding)
    x = images[-7:] if steps else images[-2:]
    with torch.no_grad():
        expected, scores = model(x)
        local_map, global_map = model.maps(x[:1])
    exact = model.optimize("fp32", batch_sizes=(2,))
    for batch in (x[:2], x[:1].clone(memory_format=torch.channels_last)):  # the batch size that it was made for, and another
        anomaly_map, score = exact(batch)
        assert anomaly_map.shape == (len(batch), 1, *SIZE) and anomaly_map.dtype == score.dtype == torch.float32
        assert rms_ratio(anomaly_map, expected[: len(batch)]) < 2e-5
        torch.testing.assert_close(score, scores[: len(batch)], rtol=1e-4, atol=1e-5)
    for ours, plain in zip(exact.maps(x[:1]), (local_map, global_map)):
        assert rms_ratio(ours, plain) < 2e-5

    half = model.optimize("bf16")
    anomaly_map, score = half(x)
    assert rms_ratio(anomaly_map, expected) < 0.05 and half.threshold == model.threshold
    differ = (scores[:, None] - scores) > 0.05 * scores.std()
    assert bool((score[:, None] > score)[differ].all())
    if size == "small":
        assert differ.sum() > 0


def test_fast_form_leaves_the_model_alone_and_refuses_what_it_cannot_do(images, tmp_path):
    model = make_model(images, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = model.optimize()
    assert fast.precision == ("bf16" if efficientad.cpu_has_bf16(images.device) else "fp32")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fast.train()
    assert torch.equal(fast(images[:1])[0], fast(images[:1])[0])  # no dropout, whatever the mode
    with pytest.raises(TypeError, match="uint8"):
        fast(images[:1].float())
    with pytest.raises(ValueError, match="N×3×128×128"):
        fast(images[:1, :, :96])
    for forbidden in (lambda: fast.save(str(tmp_path / "m.pt")), lambda: fast.losses(images, images, None), fast.optimize):
        with pytest.raises(TypeError, match="for inference"):
            forbidden()
    with pytest.raises(ValueError, match="'int8'"):
        model.optimize("int8")
    model.teacher[0].weight.data *= 1e9
    with pytest.raises(ModelError, match="beyond fp16"):
        model.optimize("fp16")


@pytest.mark.parametrize("batch_size, penalty", [(1, True), (2, False)])
def test_step_has_the_plain_steps_gradients(batch_size, penalty, images, monkeypatch):
    """In fp32: teacher outputs known beforehand, one student pass over all images, buffers; against the definition."""
    model = make_model(images, 0).eval()  # eval: no dropout, so that both agree
    x, photos = images[:batch_size], images[5 : 5 + batch_size] if penalty else None
    batch = {"images": x, "draws": train.draw(batch_size), "teacher": train.teacher_outputs(model, x[:, None], "fp32")}
    batch |= {"photos": photos} if penalty else {}
    optimizer = train.make_optimizer(model, 1e-4)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    step = train.Step(model, optimizer, "fp32", p_hard=0.99)
    step({k: torch.zeros_like(v) for k, v in batch.items()})  # the buffers hold something else first
    losses = step(batch)
    fast = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    gray, factor, kind = batch["draws"]
    i, j = model.normalize(x), model.normalize(train.augment(x, factor, kind))
    expected = {
        "hard": efficientad.hard_feature_loss(model.teacher_features(i), model.student(i)[:, :384], 0.99),
        "autoencoder": (model.teacher_features(j) - model.autoencoder(j)).square().mean(),
        "student_autoencoder": (model.autoencoder(j) - model.student(j)[:, 384:]).square().mean(),
    }
    if penalty:
        expected["penalty"] = model.student(model.normalize(train.turn_gray(photos, gray)))[:, :384].square().mean()
    sum(expected.values()).backward()
    assert losses.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name].detach(), rtol=1e-5, atol=0)
    for name, gradient in fast.items():
        plain = model.get_parameter(name).grad
        assert (gradient - plain).norm() <= 1e-4 * plain.norm(), name


def test_teacher_outputs_are_kept_as_far_as_there_is_room(tiny_demo, run_script, monkeypatch, tmp_path):
    """The same training with and without room; fp32, where keeping rounds nothing."""
    options = ("--data", tiny_demo, "--steps", 5, "--precision", "fp32", "--image-size", 128, "--pretraining-images", "none")
    states = []
    for name, room in (("kept", 1 << 30), ("anew", 0)):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(train, "KEPT_BYTES", room)
        folder = train.main([*map(str, options), "--device", "cpu", "--out", name])
        states.append(EfficientAD.load(str(folder / "model.pt")).student.state_dict())
    for a, b in zip(*(s.values() for s in states)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_computed_ahead_in_order():
    def slowest_first(i: int) -> int:
        time.sleep(0.02 if i % 4 == 0 else 0)
        return i * i

    assert list(train.ahead(slowest_first, range(3, 30))) == [i * i for i in range(3, 30)]
    assert list(train.ahead(slowest_first, range(0))) == []
    with pytest.raises(ZeroDivisionError):
        list(train.ahead(lambda i: 1 // (5 - i), range(9)))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_cuda_graphs_compute_what_eager_calls_do(images):
    model = make_model(images, 4).cuda()
    fast = model.optimize(batch_sizes=(1, 2))
    with torch.no_grad():
        expected, _ = model(images[:3].cuda())
    for n in (1, 2, 3, 1):
        assert rms_ratio(fast(images[:n])[0], expected[:n]) < 0.01  # from the CPU, through pinned memory; fp16
        assert torch.equal(fast(images[:n])[0], fast(images[:n].cuda())[0])
    weights = []
    for warm_up in (3, 100):  # a graph from the fourth step on, or never
        torch.manual_seed(0)
        trained = EfficientAD(image_size=SIZE)
        trained.load_state_dict(model.state_dict())
        step = train.Step(trained.cuda(), train.make_optimizer(trained, 1e-4), "fp32")
        step.graph.WARM_UP = warm_up
        for i in range(8):
            torch.manual_seed(i)
            train.set_rate(step.optimizer, 1 / (i + 1))
            losses = step({"images": images[i % 5][None], "photos": images[i][None], "draws": train.draw(1)})
        weights.append([losses["hard"], *trained.student.state_dict().values()])
    for graph, eager in zip(*weights):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- distill


def test_distill_in_two_processes_is_distill_in_one(tmp_path, monkeypatch):
    """gloo on a CPU; an odd number of photos, so that the processes' statistics weigh differently."""
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(tmp_path / f"photos/{i}.png")
    options = ["--images", "photos", "--backbone", "resnet18", "--backbone-weights", "resnet18.pth", "--image-size", 32,
               "--steps", 3, "--batch-size", 4, "--lr", 1e-3, "--device", "cpu", "--precision", "fp32"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    monkeypatch.chdir(tmp_path)
    distill.main([*map(str, options), "--out", "one.pt"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "distill.py"]
    result = subprocess.run([*map(str, [*launcher, *options]), "--out", "two.pt"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("wrote two.pt") == 1, result.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    start = torch.cat([v.flatten().float() for v in one.values()])
    difference = torch.cat([(one[k].float() - two[k].float()).flatten() for k in one])
    assert difference.norm() < 2e-3 * start.norm() and len((tmp_path / "two.jsonl").read_text().splitlines()) == 3


# --------------------------------------------------------------------------------------------------------------- benchmark


def test_readme_and_committed_figures_agree():
    text = figures.README.read_text(encoding="utf-8")
    section = text.partition(figures.BEGIN)[2].partition(figures.END)[0].strip()
    files = sorted((ROOT / "benchmarks").glob("*.json"))
    assert files and section == figures.speed_section(files)
    for path in files:
        picture, results = path.with_suffix(".svg"), json.loads(path.read_text(encoding="utf-8"))
        assert not picture.exists() or picture.read_text(encoding="utf-8") == figures.plot(results)


def test_readme_is_rewritten_between_its_marks(tmp_path, monkeypatch, capsys):
    rates = {"plain": 2, "ours": 9}
    rows = [{"model": "S", "row": row, "steps_s": s, "minutes_70000": 70000 / s / 60, "steps": 3} for row, s in rates.items()]
    results = {"device": "an abacus", "versions": {"torch": "9.9"}, "command": "python benchmark.py --quick", "training": rows}
    (tmp_path / "x.json").write_text(json.dumps(results))
    monkeypatch.setattr(figures, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    for _ in range(2):
        benchmark.main(["--readme", str(tmp_path / "x.json")])
        text = (tmp_path / "README.md").read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert "an abacus; torch 9.9" in text and "| S | ours | 9.00 | 4.50 | 130 | 3 |" in text
    (tmp_path / "README.md").write_text("no marks")
    for file in ("x.json", "none.json"):
        with pytest.raises(SystemExit) as exit:
            benchmark.main(["--readme", str(tmp_path / file)])
        assert exit.value.code == 2 and "--readme" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "no marks"


def test_benchmark_measures(tmp_path, monkeypatch, capsys):
    """Rows, operations and turns on images of 128²; a runtime that is missing is named."""

    def missing(model, images):
        raise ImportError("No module named 'abacus'")

    monkeypatch.setitem(benchmark.ROWS, "abacus", (missing, False, False))
    cpu = torch.device("cpu")
    model, images = benchmark.models(["EfficientAD-S"], cpu, 128)["EfficientAD-S"], benchmark.draw_images(1, 128, cpu)
    rows = {r["row"]: r for r in benchmark.measure_rows(model, images, ["eager fp32", "abacus", "eager half", "ours"], 0)}
    assert rows["abacus"] == {"row": "abacus", "missing": "ImportError: No module named 'abacus'"}
    assert rows["eager fp32"]["map_error"] == 0 < rows["ours"]["map_error"] < 0.05 > rows["eager half"]["map_error"]
    for row in (rows["eager fp32"], rows["ours"]):
        assert row["passes"] == 3 and row["ms"] > 0 and row["images_s"] > 0 and isinstance(row["memory_mib"], float)
    with torch.no_grad():
        count = benchmark.operations(model, images)
    layers = ((125, 3, 4, 128), (59, 128, 4, 256), (27, 256, 3, 256))  # side, channels in, kernel, channels out, of a PDN at 128²
    pdn = sum(side**2 * c * k * k * out for side, c, k, out in layers)
    student, teacher = pdn + 24**2 * 256 * 16 * 768, pdn + 24**2 * 256 * 16 * 384
    assert teacher + student < count / 2 < 1.1 * (teacher + student)  # the autoencoder is the rest
    turns = []
    latencies = benchmark.take_turns({"a": lambda: turns.append("a"), "b": lambda: (turns.append("b"), time.sleep(0.01))}, 0.045)
    assert turns[:6] == list("ababab") and latencies["a"]["passes"] == len(turns) // 2 <= 5 and latencies["b"]["ms"] >= 10
