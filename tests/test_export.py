"""The exported model against torch, in the programs that run it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from efficientad import EfficientAD, ModelError
from export import export, metadata


def random_model(size: str, padding: bool) -> EfficientAD:
    torch.manual_seed(3)
    model = EfficientAD(size=size, image_size=(128, 160), padding=padding)
    batch = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8)
    model.fit_teacher_statistics([batch])
    model.calibrate([batch])
    model.training_info = {"category": "bottle", "validation_images": 2}
    return model


def check(outputs, model: EfficientAD, images: np.ndarray) -> None:
    with torch.no_grad():
        expected = [t.numpy() for t in model(torch.from_numpy(images).permute(0, 3, 1, 2))]
    for found, value in zip(outputs, expected, strict=True):
        assert found.shape == value.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-4)
    assert expected[0].std() > 1e-3  # or there is nothing to compare


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (n, 128, 160, 3), np.uint8) for n in (1, 3)]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_onnx(size, padding, tmp_path, capsys):
    """In ONNX Runtime and OpenVINO, for one image and for three."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnx onnxscript")
    model, path = random_model(size, padding), tmp_path / "model.onnx"
    export(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"] and "uint8 images N×128×160×3" in capsys.readouterr().out
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for images in batches():
        check(session.run(["map", "score"], {"images": images}), model, images)
    entries = session.get_modelmeta().custom_metadata_map
    assert entries == metadata(model) and np.float32(entries["threshold"]) == model.threshold.numpy()
    try:
        import openvino
    except ImportError:
        pytest.skip("ONNX Runtime agrees; OpenVINO is not installed")
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # else bf16 on CPUs that have it
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    for images in batches():
        result = compiled(images)
        check([result["map"], result["score"]], model, images)


def test_simplenet(tmp_path):
    simplenet = pytest.importorskip("simplenet", reason="SimpleNet is not here")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnx onnxscript")
    torch.manual_seed(3)
    model = simplenet.SimpleNet(backbone="resnet18", image_size=(128, 160)).eval()
    model.threshold.fill_(1.0)
    export(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for images in batches():
        check(session.run(["map", "score"], {"images": images}), model, images)


@pytest.mark.parametrize("size, padding", [("small", False), ("medium", True)])
def test_pt2(size, padding, tmp_path):
    model, path = random_model(size, padding), tmp_path / "model.pt2"
    export(model, path)
    extra = {"metadata.json": ""}
    program = torch.export.load(str(path), extra_files=extra).module()
    for images in batches():
        with torch.no_grad():
            check([t.numpy() for t in program(torch.from_numpy(images))], model, images)
    assert json.loads(extra["metadata.json"]) == metadata(model)


def test_export_by_command_and_example_of_the_readme(run_script, tmp_path, monkeypatch):
    """evaluate.py --export, then the README's program, which knows neither torch nor this project."""
    model = random_model("small", False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ModelError, match="pip install onnx onnxscript"):
            export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnx onnxscript")
    (tmp_path / "run").mkdir()
    model.save(str(tmp_path / "run/model.pt"))
    status, out, err = run_script("evaluate.py", "--run", "run", "--export", "model.onnx", "--device", "cpu")
    assert status == 0 and "wrote model.onnx" in out, err
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 70, 3), np.uint8))
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos/a.png")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = readme.split("<!-- without torch -->\n```python\n")[1].split("```")[0]
    assert len(program.splitlines()) <= 25 and "torch" not in program
    program = program.replace("new_photos", "photos") + "\nimport sys; assert 'torch' not in sys.modules\n"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    with torch.no_grad():
        pixels = np.asarray(image.resize((160, 128), Image.Resampling.BILINEAR))
        score = model(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[1].item()
    assert result.returncode == 0, result.stderr
    name, found = result.stdout.split(",")[0].split(": ")
    assert name.endswith("a.png") and float(found) == pytest.approx(score, abs=2e-4)
    assert ("anomalous" if score > model.threshold else "normal") in result.stdout
