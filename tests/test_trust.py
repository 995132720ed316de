"""What a user relies on: no weights that are not finite, whole files on a full disk, the threshold's meaning, flat memory."""

import contextlib
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTO, TINY, assert_refused, put
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import distill
import efficientad
import evaluate
import runs
from backbone import ResNet
from data import DataError, list_images, look_of, range_of, read_image, unlike
from efficientad import EfficientAD, ModelError, false_alarms, read_checkpoint, write_checkpoint
from runs import last_line, write
from train import permutation

# ---------------------------------------------------------------------------------------------------- NaN, and a full disk


@pytest.fixture
def command(tmp_path, teacher):
    for i in range(3):
        put(tmp_path / f"part/train/good/{i}.png", PHOTO.rotate(90 * i))
    return ("train.py", "--data", "part", *TINY, "--teacher", teacher, "--precision", "fp32", "--out", "o")


def test_a_loss_that_is_not_finite_stops_training(command, run_script, tmp_path, monkeypatch):
    losses, calls = EfficientAD.losses, []

    def spoiled(*args):
        calls.append(1)
        return losses(*args) | ({"penalty": torch.tensor(torch.nan, requires_grad=True)} if len(calls) == 4 else {})

    monkeypatch.setattr(EfficientAD, "losses", spoiled)
    assert_refused(run_script(*command, "--steps", 9), "o: step 3: the loss is not finite; lower --lr")
    state = read_checkpoint(str(tmp_path / "o/resume.pt"))
    assert state["step"] == 0 and all(v.isfinite().all() for k, v in state["model"].items() if k != "threshold")
    assert not (tmp_path / "o/model.pt").exists()
    assert_refused(run_script(*command[:-1], "p", "--steps", 9, "--lr", 1e30), "the loss is not finite")  # the real thing


def test_photos_left_out_and_photos_changed_while_a_run_was_interrupted(command, run_script, tmp_path, interrupt_at):
    """The junk is the first photo seen, and is seen no more after the interruption before step 3."""
    order = permutation(4, 0, 1, 0).tolist()  # of epoch 0
    for i in range(4):
        put(tmp_path / f"photos/{i}.png", b"junk" if i == order[0] else PHOTO)
    with interrupt_at(3):
        options = ("--steps", 4, "--pretraining-images", "photos", "--skip-bad-images")
        assert run_script(*command, *options)[0] == 130
    assert read_checkpoint(str(tmp_path / "o/resume.pt"))["step"] == 3
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/9.png")
    assert_refused(run_script("train.py", "--resume", "o"), "photos: has other images than when the run began; put them back")
    (tmp_path / "photos/9.png").rename(tmp_path / "photos/0.png")
    assert run_script("train.py", "--resume", "o")[0] == 0
    assert f"photos/{order[0]}.png" in (tmp_path / "o/skipped.txt").read_text()


def test_weights_that_are_not_finite_are_never_saved(command, run_script, tmp_path, monkeypatch):
    step, calls = torch.optim.Adam.step, []

    def spoil(self, *args, **kwargs):
        calls.append(1)
        result = step(self, *args, **kwargs)
        if len(calls) == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] = torch.inf
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    assert_refused(run_script(*command, "--steps", 9, "--checkpoint-every", 0), "o: step 1: it left weights that are not finite")
    assert read_checkpoint(str(tmp_path / "o/resume.pt"))["step"] == 1


@contextlib.contextmanager
def file_limit(size: int):
    """No file may grow beyond so many bytes: to the writer like a full disk, and no disk need be filled."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(command, run, run_script, tmp_path, monkeypatch, model):
    monkeypatch.setattr(EfficientAD, "load", lambda path: model)
    with file_limit(2**20):
        assert_refused(run_script(*command, "--steps", 1), "o/resume.pt: cannot be written (File too large)")
    assert {p.name for p in (tmp_path / "o").iterdir()} == {".lock"}  # no half file
    assert run_script(*command, "--steps", 1)[0] == 0
    put(tmp_path / "o/model.pt", b"earlier")
    with file_limit(2**20), pytest.raises(ModelError, match="what it held before is untouched"):
        model.save(str(tmp_path / "o/model.pt"))
    assert (tmp_path / "o/model.pt").read_bytes() == b"earlier"
    with pytest.raises(ModelError, match="gone/m.pt: cannot be written .No such file or directory"):
        write_checkpoint({}, str(tmp_path / "gone/m.pt"))
    write_checkpoint({"data": "caf\udce9"}, str(tmp_path / "caf\udce9.pt"))  # names that are not UTF-8
    assert read_checkpoint(str(tmp_path / "caf\udce9.pt")) == {"data": "caf\udce9"}

    put(tmp_path / "in/a.png"), put(tmp_path / "run/images/scores.csv", b"earlier")
    with file_limit(2**12):
        assert_refused(run_script("evaluate.py", "--run", run, "--images", "in", "--device", "cpu"), "File too large", "a.png.png")
        assert_refused(run_script("evaluate.py", "--run", run, "--export", "m.pt2"), "File too large", "m.pt2")
    assert (run / "images/scores.csv").read_bytes() == b"earlier" and not (tmp_path / "m.pt2").exists()
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]
    write(tmp_path / "whole.txt", "first")
    with file_limit(2), pytest.raises(OSError, match="whole.txt"):
        write(tmp_path / "whole.txt", "second")
    assert (tmp_path / "whole.txt").read_text() == "first"


def test_distillation_refuses(run_script, tmp_path):
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "resnet18.pth")
    for i in range(3):
        put(tmp_path / f"photos/{i}.png", PHOTO.rotate(90 * i))
    command = ("distill.py", "--backbone", "resnet18", "--backbone-weights", "resnet18.pth", "--image-size", 32, "--steps", 3,
               "--batch-size", 1, "--device", "cpu", "--precision", "fp32")  # fmt: skip
    put(tmp_path / "file", b"mine"), put(tmp_path / "bad/a.png", b"junk")
    assert_refused(run_script(*command, "--images", "photos", "--out", "file/t.pt"), "file")
    assert_refused(run_script(*command, "--images", "photos", "--lr", "inf"), "--lr > 0")
    assert_refused(run_script(*command, "--images", "bad", "--out", "o/t.pt"), "bad/a.png: not an image")
    views = distill.Views([Path("bad/a.png")], 1, distill.parse_arguments(["--images", "bad", "--backbone-weights", "x"]))
    with pytest.raises(DataError) as error:  # a loader's worker sends its traceback along
        next(iter(DataLoader(views, 1, num_workers=1)))
    assert len(str(error.value).splitlines()) > 3 and last_line(error.value).startswith("bad/a.png: not an image")
    assert_refused(run_script(*command, "--images", "photos", "--out", "o/t.pt", "--lr", 1e30), "the loss is not finite")
    state = read_checkpoint(str(tmp_path / "o/t.pt.resume"))
    assert state["step"] == 0 and all(v.isfinite().all() for v in state["pdn"].values())


# --------------------------------------------------------------------------------------- calibration, repeatability, load


def test_false_alarms_against_simulation():
    """The share of new scores above the highest of n has this mean, and keeps the bound in 95 % of cases, whatever the scores'
    distribution: uniform ones do."""
    rng = np.random.default_rng(0)
    for n in (2, 21, 200):
        shares = 1 - rng.random((20000, n)).max(1)
        expected, bound = false_alarms(n)
        assert shares.mean() == pytest.approx(expected, rel=0.03)
        assert (shares < bound).mean() == pytest.approx(0.95, abs=0.01)


def test_what_is_unlike_the_training_images():
    usual = range_of([(100, 80, False, 100.0), (120, 80, False, 140.0)])
    assert usual == {"width": [100, 120], "height": [80, 80], "aspect": [1.25, 1.5], "brightness": [100, 140], "gray": 0}
    assert unlike((110, 80, False, 91), usual) == []  # within a quarter of the range
    assert unlike((110, 80, False, 89), usual) == ["darker: 89"]
    assert unlike((100, 81, True, 151), usual) == ["size 100×81", "gray", "brighter: 151"]
    assert unlike((9, 9, False, 5), range_of([(9, 9, True, 0.0)])) == ["coloured"]
    assert unlike((9, 9, True, 0), range_of([(9, 9, True, 0.0), (9, 9, False, 0.0)])) == []
    assert look_of(Image.new("RGB", (3, 2), (255, 0, 0))) == (3, 2, False, 76.0)
    with pytest.raises(ValueError):
        range_of([])


def test_views_do_not_depend_on_the_number_of_workers(tmp_path):
    for i in range(3):
        put(tmp_path / f"{i}.png", PHOTO.rotate(90 * i))
    options = ["--images", str(tmp_path), "--backbone-weights", "x", "--image-size", "32", "--crops", "0.2", "0.9"]
    views = distill.Views(list_images(tmp_path), 8, distill.parse_arguments(options))
    alone, shared = (list(DataLoader(views, 2, num_workers=n)) for n in (0, 2))
    assert all(torch.equal(a, b) for x, y in zip(alone, shared, strict=True) for a, b in zip(x, y, strict=True))


def rms_ratio(a, b) -> float:
    return ((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()).item()


def differences(a: EfficientAD, b: EfficientAD, dtype=None) -> dict[str, float]:
    """Of losses and raw maps, between devices or (with dtype) between autocast and float32."""
    torch.manual_seed(1)
    images, results = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), []
    for model, half in ((a, dtype), (b, None)):
        device = model.threshold.device.type
        x = images.to(device)
        with torch.no_grad(), torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
            values = model.losses(x, x, x) | dict(zip(("local", "global"), model.raw_maps(x)))
        results.append({k: v.cpu() for k, v in values.items()})
    return {k: rms_ratio(results[0][k], results[1][k]) for k in results[0]}


def test_half_precision_stays_close(model):
    found = differences(model, model, torch.bfloat16)
    assert 0 < max(found.values()) < 0.02, found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CPU and GPU: there is no GPU")
def test_gpu_stays_close(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gpu = EfficientAD(image_size=(128, 128))
    gpu.load_state_dict(model.state_dict())
    gpu = gpu.eval().cuda()
    assert max(differences(gpu, model).values()) < 1e-4
    assert max(differences(gpu, model, torch.bfloat16).values()) < 0.02
    monkeypatch.setattr(efficientad, "KERNELS", False)
    assert max(differences(gpu, model).values()) < 1e-4


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_strips_have_no_seams(size, padding, monkeypatch):
    """Large batches are divided, large images computed strip by strip: the same maps from smaller tensors."""
    model = EfficientAD(size=size, image_size=(192, 128), padding=padding).eval()
    images = torch.randint(0, 256, (3, 3, 192, 128), dtype=torch.uint8)
    with torch.no_grad(), Largest() as whole:
        expected = model.raw_maps(images)
    for tile, bound in ((model.activation // 3, 0.3), (2 * model.activation, 0.7)):
        monkeypatch.setattr(efficientad, "TILE", tile)
        with torch.no_grad(), Largest() as parts:
            found = model.raw_maps(images)
        assert parts.elements < bound * whole.elements
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected))
    assert not model.oversized(images)  # with gradient nothing is divided


def test_many_images_at_flat_memory(run, tmp_path, monkeypatch, model, capsys):
    """Scoring keeps no image: after the first few, 300 more need next to nothing."""
    import tracemalloc

    image = put(tmp_path / "image.png", PHOTO.resize((200, 160)))
    maps = {name: np.zeros((128, 128), np.float32) for name in evaluate.MAPS}
    predict = [(read_image(image), maps, dict.fromkeys(evaluate.MAPS, 0.0))]
    monkeypatch.setattr(evaluate, "predict", lambda *_: (predict[0][0].copy(), *predict[0][1:]))
    monkeypatch.setattr(evaluate, "list_images", lambda *_, **__: iter(paths()))
    sizes = []

    def paths():
        for i in range(330):
            if i in (30, 329):
                sizes.append(tracemalloc.get_traced_memory()[0])
            yield tmp_path / f"{i:05}.png"

    tracemalloc.start()
    try:
        evaluate.score_folder(run, model, str(tmp_path), False)
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 400_000, sizes  # rows of a table: an image alone has 96,000 bytes
    assert "of 330 images" in capsys.readouterr().out


def test_check_of_losses():
    losses = [torch.tensor(1.0), torch.tensor(torch.inf), torch.tensor(torch.nan)]
    with pytest.raises(ModelError, match="here: step 8: the loss is not finite"):
        runs.check_losses(losses, 9, "here")
    assert losses == [] and efficientad.all_finite([torch.ones(2)])
    assert not efficientad.all_finite([torch.ones(2), torch.tensor([torch.nan])])
