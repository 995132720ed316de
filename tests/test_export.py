"""The exported model against torch, in the programs that run it."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, put
from PIL import Image

from baselines.simplenet import SimpleNet
from efficientad import EfficientAD
from tools.export import export, metadata


def random_model(size: str) -> torch.nn.Module:
    if size == "simplenet":
        model = SimpleNet(backbone="resnet18", image_size=(128, 160)).eval()
        model.threshold.fill_(1.0)
        return model
    model = EfficientAD(size=size, image_size=(128, 160), padding=size == "medium")
    batch = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8)
    model.fit_teacher_statistics([batch])
    model.calibrate([batch])
    model.training_info = {"data": "/home/me/bottle", "skipped_images": ["/home/me/a.png: damaged"]}
    return model


def check(model: torch.nn.Module, run) -> None:
    """run(images) -> map and score, for one image and for three, are the model's."""
    for n in (1, 3):
        images = np.random.default_rng(n).integers(0, 256, (n, 128, 160, 3), np.uint8)
        with torch.inference_mode():
            expected = [t.numpy() for t in model(torch.from_numpy(images).permute(0, 3, 1, 2))]
        assert expected[0].std() > 1e-3  # or there is nothing to compare
        for found, value in zip(run(images), expected, strict=True):
            assert found.shape == value.shape and found.dtype == np.float32
            np.testing.assert_allclose(found, value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", ["small", "medium", "simplenet"])
def test_onnx(size, tmp_path):
    """In ONNX Runtime, and in OpenVINO if it is there."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = random_model(size), tmp_path / "model.onnx"
    export(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert b"efficientad.py" not in path.read_bytes()  # nor any other file of this machine
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    check(model, lambda images: session.run(["map", "score"], {"images": images}))
    assert session.get_modelmeta().custom_metadata_map == metadata(model)
    openvino = pytest.importorskip("openvino", reason="ONNX Runtime agrees; no OpenVINO is here")
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # else bf16 on CPUs that have it
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    check(model, lambda images: [compiled(images)[name] for name in ("map", "score")])


@pytest.mark.parametrize("size", ["small", "medium"])
def test_pt2(size, tmp_path):
    model, path = random_model(size), tmp_path / "model.pt2"
    export(model, path)
    with zipfile.ZipFile(path) as archive:
        assert not any(b"efficientad.py" in archive.read(name) for name in archive.namelist())
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    check(model, lambda images: [t.detach().numpy() for t in program(torch.from_numpy(images))])
    entries = json.loads(extra["metadata.json"])
    assert entries == metadata(model)
    assert np.float32(json.loads(entries["threshold"])) == model.threshold.numpy()
    assert json.loads(entries["training"]) == {"data": "bottle", "skipped_images": 1}


def test_refusals(run, run_script, tmp_path, monkeypatch):
    assert_refused(run_script("tools.export", "model.onnx"), "runs/: no trained model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for name, words in (
        ("model.txt", "ends in .onnx or .pt2"),
        ("nowhere/model.pt2", "name a file in an existing folder"),
        ("model.onnx", "needs more packages: pip install onnx onnxscript"),
    ):
        assert_refused(run_script("tools.export", "--run", run, name), f"{name}: ", words)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_example_without_torch(run_script, tmp_path):
    """The newest run by command, then the example of docs/export.md on it, which knows neither
    torch nor this project."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = random_model("small")
    (tmp_path / "runs/new").mkdir(parents=True)
    model.save(str(tmp_path / "runs/new/model.pt"))
    status, out, err = run_script("tools.export", "model.onnx")
    assert status == 0 and "model.onnx: uint8 images N×128×160×3" in out, err
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 70, 3), np.uint8))
    put(tmp_path / "new_photos/a.png", image)
    text = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    program = text.split("<!-- without torch -->\n```python\n")[1].split("```")[0]
    command = [sys.executable, "-c", f"{program}\nimport sys; assert 'torch' not in sys.modules"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    resized = np.asarray(image.resize((160, 128), Image.Resampling.BILINEAR)).copy()
    with torch.inference_mode():
        score = model(torch.from_numpy(resized).permute(2, 0, 1)[None])[1].item()
    name, found = result.stdout.split(",")[0].split(": ")
    assert name.endswith("a.png") and float(found) == pytest.approx(score, abs=2e-4)
    assert ("anomalous" if score > model.threshold else "normal") in result.stdout
