import contextlib
import csv
import json
import os
import re
import runpy
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from efficientad import EfficientAD  # noqa: E402
from support import demo  # noqa: E402
from support.appearance import appearance_of, appearance_range  # noqa: E402
from support.backbone import ResNet  # noqa: E402
from support.checkpoints import load_teacher, read_checkpoint  # noqa: E402
from support.images import list_images, read_image, to_array  # noqa: E402
from support.optimizers import make_adam  # noqa: E402
from support.tiling import TiledEfficientAD  # noqa: E402
from support.training import Step, draw  # noqa: E402
from train import losses_of  # noqa: E402

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
DEMO_SIZE = (128, 128)
CPU = ("--device", "cpu")
TINY = ("--image-size", 128, *CPU, "--pretraining-images", "none")


def put(path: Path, content=PHOTO, **options) -> Path:
    """Write bytes, or an image or array with Pillow's options, in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content)
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path, **options)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """The content of each file below a folder, by its path there."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def log_of(path: Path) -> list[dict]:
    """The entries of a run's log; `path`: the file or the run's folder."""
    path = path / "log.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def content_of(page: Path) -> dict:
    """What a report.html shows."""
    html = page.read_text(encoding="utf-8")
    return json.loads(html.split('id="data" type="application/json">')[1].split("</script>")[0])


def same(a, b) -> bool:
    """Whether two checkpoints, or their files, hold the same, tensors and all."""
    a, b = (read_checkpoint(x) if isinstance(x, Path) else x for x in (a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def rms_ratio(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """RMS difference over the standard deviation of `plain`."""
    return ((ours.cpu() - plain.cpu()).square().mean().sqrt() / plain.cpu().std()).item()


def assert_refused(result: tuple[int, str, str], *words: object) -> None:
    """Exit status 2, and the last line alone says why; argparse writes the usage before it."""
    status, _, err = result
    assert status == 2 and "Traceback" not in err, err
    line = err.splitlines()[-1].split("\r")[-1]
    assert all(str(word) in line for word in words), err
    assert re.match(r"(train|evaluate)\.py: |(tools|baselines)\.\w+: ", line), err


def random_norms(network: nn.Module) -> nn.Module:
    """The network in eval mode, as if its batch norms had seen something: folding them has an
    effect."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.2)
    return network.eval()


@pytest.fixture(scope="module")
def model():
    """Calibrated on noise; says that its training images looked like PHOTO."""
    torch.manual_seed(0)
    model = EfficientAD(image_size=(128, 128))
    model.fit_teacher_statistics([torch.rand(2, 3, 128, 128)])
    model.calibrate([torch.rand(2, 3, 128, 128)])
    appearance = appearance_range([appearance_of(PHOTO)])
    model.training_info = {"validation_images": 2, "appearance": appearance}
    return model


@pytest.fixture
def run(model, tmp_path):
    """A run folder with that model alone."""
    (tmp_path / "run").mkdir()
    model.save(str(tmp_path / "run/model.pt"))
    return tmp_path / "run"


@pytest.fixture
def own(model, tiny_demo, tmp_path):
    """A run folder whose model says that it was trained on tiny_demo."""
    (tmp_path / "own").mkdir()
    info = {"data": str(tiny_demo.resolve()), "category": "tiny", "steps": 3, "seed": 5}
    checkpoint = model.checkpoint()
    checkpoint["training"] = model.training_info | info
    torch.save(checkpoint, tmp_path / "own/model.pt")
    return tmp_path / "own"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference values and data that lie beside the checkout; not part of the project."""
    path = Path(os.environ.get("EFFICIENTAD_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"reference data {path} is not here")
    return path


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory) -> Path:
    """A weight file of ResNet-18, untrained."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(ResNet("resnet18").state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path, resnet18) -> tuple:
    """42 blurred photos in photos/; the options of a small distillation of them."""
    for i in range(42):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)
        put(tmp_path / f"photos/{i:02}.png", image)
    sources = ("--images", tmp_path / "photos", "--backbone-weights", resnet18)
    sizes = ("--image-size", 32, "--steps", 8, "--batch-size", 2, "--statistics-images", 6)
    how = ("--lr", 1e-3, "--precision", "fp32", *CPU)
    return (*sources, "--backbone", "resnet18", *sizes, *how)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory) -> Path:
    """The demo set with very few images."""
    counts = {"train/good": 5, "validation/good": 2, "test/good": 3}
    counts |= {"test/logical_anomalies": 3, "test/structural_anomalies": 3}
    root = tmp_path_factory.mktemp("sets") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_SPLITS", counts)
        demo.make_demo(root)
    return root


@pytest.fixture(scope="session")
def demo_images(tiny_demo) -> torch.Tensor:
    """The tiny demo set's training and test images, uint8 N×3×128×128."""
    paths = list_images(tiny_demo / "train/good")
    paths += list_images(tiny_demo / "test", recursive=True)
    return torch.stack([torch.from_numpy(to_array(read_image(p), DEMO_SIZE)) for p in paths])


@pytest.fixture
def trained(demo_images):
    """trained(steps, **config): a model trained for so many steps on demo_images, calibrated."""

    def make(steps: int, **config) -> TiledEfficientAD:
        torch.manual_seed(1)
        model = TiledEfficientAD(image_size=DEMO_SIZE, **config)
        if config.get("size", "small") == "small":
            load_teacher(model.teacher, "small", ROOT / "weights/teacher_small.pt")
        model.fit_teacher_statistics([demo_images[:2]])
        learned = [*model.student.parameters(), *model.autoencoder.parameters()]
        device = demo_images.device
        optimizer = make_adam([{"params": learned, "lr": 3e-4}], device)
        step = Step(partial(losses_of, model=model, p_hard=0.999), [optimizer], device, "fp32")
        for i in range(steps):
            step({"images": demo_images[i % 5][None], "draws": draw(1)})
        model.calibrate([demo_images[3:5]])
        return model

    return make


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    """run_script("train.py", "--steps", 2), or ("tools.distill", …), runs the real script in an
    empty folder -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                    runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            status = exit.code
        return (status or 0, *capfd.readouterr())

    return run


@pytest.fixture
def interrupt_at(monkeypatch):
    """interrupt_at(n): within the context, the n-th step of Adam comes with a Ctrl-C. Recipe short
    takes two of them in a step of training."""

    @contextlib.contextmanager
    def context(n: int):
        step, calls = torch.optim.Adam.step, []

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGINT)
            return step(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", counted)
            yield

    return context


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
