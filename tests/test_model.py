"""efficientad.py: networks against reference outputs, statistics, losses, calibration, files."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, put
from torch import nn

from efficientad import (
    PDN,
    Autoencoder,
    EfficientAD,
    ModelError,
    channel_statistics,
    hard_feature_loss,
    quantile,
)
from support.calibration import calibrate
from support.training import fast_losses, short_losses

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 128, 128), np.uint8))

# -------------------------------------------------------------------------------------- networks


def noise(n: int, salt: int) -> torch.Tensor:
    """The oracles' weights and input: float64 in [-0.5, 0.5) from integers."""
    j = torch.arange(n, dtype=torch.int64)
    h = (j * 2654435761 + salt) % 2**32
    h = (h ^ (h >> 15)) * 2246822519 % 2**32
    return (h ^ (h >> 13)).double() / 2**32 - 0.5


NETWORKS = {
    "teacher_small": lambda: PDN("small"),
    "teacher_small_padded": lambda: PDN("small", padding=True),
    "student_small": lambda: PDN("small", 768),
    "teacher_medium": lambda: PDN("medium"),
    "teacher_medium_padded": lambda: PDN("medium", padding=True),
    "student_medium": lambda: PDN("medium", 768),
    "autoencoder": lambda: Autoencoder(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_match_reference(name, shared):
    expected = json.loads((shared / "oracles/networks/meta.json").read_text())[name]
    net = NETWORKS[name]().eval()
    state = net.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == expected["keys"]
    for k, (key, value) in enumerate(state.items()):
        fan_in = value[0].numel() if value.ndim > 1 else 100
        weights = noise(value.numel(), (k + 1) * 40503) * (24 / fan_in) ** 0.5
        state[key] = weights.reshape(value.shape).float()
    net.load_state_dict(state)
    with torch.no_grad():
        y = net((noise(2 * 3 * 256 * 256, 977) * 4).reshape(2, 3, 256, 256).float())
    assert list(y.shape) == expected["shape"]
    reference = np.load(shared / "oracles/networks/outputs.npz")[name]
    error = np.mean((y[:, ::16, ::5, ::5].numpy() - reference) ** 2) / np.mean(reference**2)
    assert error < 1e-10  # summation order; measured 0 with the build that made the reference
    assert y.mean().item() == pytest.approx(expected["mean"], abs=1e-5)


def test_parameter_counts():
    counts = [sum(p.numel() for p in make().parameters()) for make in NETWORKS.values()]
    assert counts == [2694144, 2694144, 4267392, 8026624, 8026624, 11615488, 1096320]


@pytest.mark.parametrize("size", ["small", "medium"])
def test_receptive_field_is_33(size):
    x = torch.randn(1, 3, 65, 65, requires_grad=True)
    y = PDN(size)(x)
    y[0, :, y.shape[2] // 2, y.shape[3] // 2].sum().backward()
    touched = x.grad[0].abs().sum(0).nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [33, 33]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("image_size", [(128, 128), (160, 288)])
def test_any_image_size(image_size, padding):
    model = EfficientAD(image_size=image_size, padding=padding).eval()
    x = torch.randint(0, 256, (1, 3, *image_size), dtype=torch.uint8)
    with torch.no_grad():
        bottleneck = nn.Sequential(*list(model.autoencoder)[:11])(model.normalize(x))
        raw = model.raw_maps(x)
        anomaly_map = model.normalize_maps(*raw)["combined"]
    size = tuple(s // 4 - (0 if padding else 8) for s in image_size)
    assert bottleneck.shape == (1, 64, 1, 1)
    assert raw[0].shape == raw[1].shape == (1, 1, *size)
    assert anomaly_map.shape == (1, 1, *image_size)


def test_impossible_options_and_images():
    for image_size in ((96, 256), (256, 250), (0, 0), (128, 192, 256)):
        with pytest.raises(ValueError, match="multiples of 32"):
            EfficientAD(image_size=image_size)
    with pytest.raises(ValueError, match="'large'"):
        EfficientAD(size="large")
    model = EfficientAD(image_size=(128, 128)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES[:1])[0], model(IMAGES[:1].float() / 255)[0])
    with pytest.raises(ValueError, match="N×3×128×128"):
        model(IMAGES[..., :96])
    nan = torch.full((1, 3, 128, 128), torch.nan)
    for x in (IMAGES[:1].float(), IMAGES[:1] / 127.5 - 1, nan):  # 0–255, −1–1
        with pytest.raises(ValueError, match="float images must be in 0–1"):
            model(x)
    with pytest.raises(TypeError, match="uint8"):
        model(IMAGES.int())


# ------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("n", [1, 2, 10, 999, 100_001])
@pytest.mark.parametrize("q", [0, 0.1, 0.5, 0.995, 0.999, 1])
def test_quantile_is_numpys(n, q):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x[::3] = x[0]  # ties
    expected = np.quantile(x.numpy().astype(np.float64), q)
    assert quantile(x, q).item() == pytest.approx(expected, rel=2e-7, abs=1e-7)


def test_quantile_beyond_torchs_limit_and_special_values():
    x = torch.arange(2**24 + 3, dtype=torch.int32).flip(0).float() % 1000
    assert quantile(x, 0.995).item() == pytest.approx(np.quantile(x.numpy(), 0.995), rel=1e-6)
    assert quantile(torch.tensor([1.0, torch.nan, 2.0]), 0.0).isnan()  # as torch.quantile
    assert quantile(torch.tensor([-torch.inf, 0.0, 1.0]), 0.0).item() == -torch.inf
    for q, x in ((-0.1, torch.ones(3)), (1.1, torch.ones(3)), (0.5, torch.ones(0))):
        with pytest.raises(ValueError, match="quantile needs"):
            quantile(x, q)


def test_channel_statistics_do_not_cancel():
    x = 1e4 + torch.randn(6, 5, 7, 9, generator=torch.Generator().manual_seed(1))
    mean, std = channel_statistics([x[:1], x[1:4], x[4:]])
    expected = x.double().mean((0, 2, 3), keepdim=True).float()
    deviation = x.double().std((0, 2, 3), correction=0, keepdim=True).float()
    torch.testing.assert_close(mean, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(std, deviation, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="at least one batch"):
        channel_statistics([])


# ---------------------------------------------------------------------------------------- losses


def test_hard_feature_loss_is_the_mean_of_the_largest():
    teacher, student = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5, requires_grad=True)
    d = (teacher - student).detach().square().flatten()
    loss = hard_feature_loss(teacher, student, 0.9)
    assert loss.item() == pytest.approx(d.sort().values[-40:].mean().item(), rel=1e-6)
    loss.backward()
    assert (student.grad != 0).sum() == 40  # of 400 elements
    plain = hard_feature_loss(teacher, student, 0)
    torch.testing.assert_close(plain, F.mse_loss(student, teacher))
    assert hard_feature_loss(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)).item() == 1  # ties


def narrow(pdn: PDN) -> None:
    """An eighth of the hidden channels: the same layers, far less arithmetic."""
    places, c = [i for i, layer in enumerate(pdn) if isinstance(layer, nn.Conv2d)], 3
    for i in places:
        width = pdn[i].out_channels // (1 if i == places[-1] else 8)
        pdn[i], c = nn.Conv2d(c, width, pdn[i].kernel_size), width


def double_model(size: str, shared_stem: bool = False) -> EfficientAD:
    """In float64, narrow, without dropout."""
    model = EfficientAD(size=size, image_size=(128, 128), shared_stem=shared_stem)
    for pdn in (model.teacher, model.student):
        narrow(pdn)
    model.teacher.requires_grad_(False)
    if shared_stem:
        model.student[0], model.student[3] = model.teacher[0], model.teacher[3]
    model = model.double().eval()
    model.teacher_mean.normal_()
    model.teacher_std.uniform_(0.5, 2)
    model.normalize = lambda x, any_size=False: x.double() / (1 + 254 * (x.dtype == torch.uint8))
    return model


def assert_same_losses(model: EfficientAD, plain: Callable, fast: Callable) -> None:
    """Two functions give the same losses and the same gradients, none of them for the teacher."""
    results = []
    for function in (plain, fast):
        model.zero_grad()
        losses = function()
        sum(losses.values()).backward()
        gradients = {n: q.grad for n, q in model.named_parameters() if q.grad is not None}
        results.append((losses, gradients))
    (plain, gradients), (fast, fast_gradients) = results
    assert plain.keys() == fast.keys() and gradients.keys() == fast_gradients.keys()
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-6, atol=0)
    assert not any(name.startswith("teacher") for name in gradients)
    for name, gradient in gradients.items():
        assert (fast_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("size", ["small", "medium"])
def test_losses_are_the_papers_and_the_fast_ones_are_the_same(size):
    """Each term by hand; then `fast_losses` in float64, losses and gradients, with the teacher's
    output known and not, with and without photos; and `short_losses`, which take J for I."""
    model = double_model(size)
    i, j, p = IMAGES[:1], torch.rand(1, 3, 128, 128), IMAGES[1:2]
    losses = {name: loss.double() for name, loss in model.losses(i, j, p, 0.99).items()}
    both = model.autoencoder[0].weight, model.student[0].weight  # the gradient reaches both
    torch.autograd.grad(losses["student_autoencoder"], both, retain_graph=True)
    x, y, z = (model.normalize(images) for images in (i, j, p))
    s, s_ae, a = model.student(x)[:, :384], model.student(y)[:, 384:], model.autoencoder(y)
    d = (model.teacher_features(x) - s).square()
    hard = d.numel() - math.ceil(0.99 * (d.numel() - 1))  # so many lie above the quantile
    expected = d.flatten().topk(hard).values.mean().item()
    assert losses["hard"].item() == pytest.approx(expected, rel=1e-5)
    expected = (a - model.teacher_features(y)).square().mean().item()
    assert losses["autoencoder"].item() == pytest.approx(expected, rel=1e-6)
    expected = (a - s_ae).square().mean().item()
    assert losses["student_autoencoder"].item() == pytest.approx(expected, rel=1e-6)
    expected = model.student(z)[:, :384].square().mean().item()
    assert losses["penalty"].item() == pytest.approx(expected, rel=1e-6)

    cases = [(p, model.teacher_features(x)), (p, None), (None, None)]
    for photos, known in cases if size == "small" else cases[:1]:
        assert_same_losses(
            model,
            lambda: model.losses(i, j, photos, 0.99),
            lambda: fast_losses(model, (i, j, photos), 0.99, known),
        )
    model = double_model(size, shared_stem=True)
    for photos in (IMAGES[1:2, :, :64, :96], None):  # of another size
        assert_same_losses(
            model,
            lambda: model.losses(j, j, photos, 0.99),
            lambda: short_losses(model, j, photos, 0.99),
        )


def test_a_shared_stem_is_computed_and_stored_once(tmp_path):
    files = []
    for shared_stem in (False, True):
        files.insert(0, tmp_path / f"{shared_stem}.pt")
        model = EfficientAD(image_size=(128, 128), shared_stem=shared_stem)
        model.save(files[0])
    stem = sum(p.numel() for i in (0, 3) for p in model.teacher[i].parameters())
    saved = files[1].stat().st_size - files[0].stat().st_size
    assert saved == pytest.approx(4 * stem, rel=0.01)
    model, calls = EfficientAD.load(files[0]), []
    for layer in (model.teacher[3], model.student[3]):
        layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        model(IMAGES[:1])
    assert len(calls) == 2  # one call with both hooks: it is one layer
    model.teacher[0].weight.data.zero_()
    assert not model.student[0].weight.any()


# ----------------------------------------------------------------------------------- calibration


def test_teacher_statistics_whiten_the_teacher():
    model = EfficientAD(image_size=(128, 128))
    model.fit_teacher_statistics([IMAGES[:1], IMAGES[1:]])
    features = model.teacher_features(model.normalize(IMAGES))
    assert features.mean((0, 2, 3)).abs().max() < 1e-4
    assert (features.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("padding", [False, True])
def test_calibration_maps_the_quantiles_to_0_and_01(padding):
    model = EfficientAD(image_size=(128, 128), padding=padding)
    batches = [torch.rand(2, 3, 128, 128) for _ in range(2)]
    scores = model.calibrate(iter(batches), a=0.8, b=0.98)
    with torch.no_grad():
        raw = [torch.cat(m) for m in zip(*(model.raw_maps(b) for b in batches))]
        maps, predicted = model.predict(batches[0])
    for m, (q_a, q_b) in zip(raw, model.quantiles):
        normalized = 0.1 * (m - q_a) / (q_b - q_a)
        assert normalized.quantile(0.8).item() == pytest.approx(0, abs=1e-5)
        assert normalized.quantile(0.98).item() == pytest.approx(0.1, abs=1e-5)
    q_a, q_b = (
        model.quantiles[:, i].view(2, 1, 1, 1, 1).expand(2, 1, 1, *raw[0].shape[2:]) for i in (0, 1)
    )
    hot = torch.zeros_like(raw[0][:1])
    hot[0, 0, 3, 5] = 1  # output i is centred 4·i + 16 pixels from the edge, 4·i with padding
    y, x = divmod(model.resize(hot).flatten().argmax().item(), 128)
    rim = 0 if padding else 4
    assert abs(y - 4 * (3 + rim) - 1.5) <= 1 and abs(x - 4 * (5 + rim) - 1.5) <= 1
    for q, expected in ((q_a, 0), (q_b, 0.1), (2 * q_b - q_a, 0.2)):
        for name, m in model.normalize_maps(*q).items():
            assert m[0, 0, 64, 64].item() == pytest.approx(expected, abs=1e-5), name
    assert list(maps) == ["combined", "local", "global"] == list(predicted)
    torch.testing.assert_close(maps["combined"], (maps["local"] + maps["global"]) / 2)
    torch.testing.assert_close(scores[:2], maps["combined"].amax((1, 2, 3)))
    assert model.threshold == scores.mean() + 3 * scores.std(correction=0) > scores.max()
    calibrate(model, torch.cat(batches), "gaussian", 0.9, 0.995)
    for m, (q_a, q_b) in zip(raw, model.quantiles):
        normalized = 0.1 * (m - q_a) / (q_b - q_a)
        assert normalized.mean().item() == pytest.approx(0, abs=1e-4)
        assert normalized.var(correction=0).item() == pytest.approx(1, abs=1e-3)
    one = [m[:1] for m in raw]
    assert model.fit_normalization([one]) == model.threshold  # alone it has no deviation
    scores = model.fit_normalization([one] * 11 + [[2 * m for m in one]])
    assert model.threshold == scores[11] == scores.max() > scores[0]  # far above the others


def test_what_cannot_be_calibrated():
    model = EfficientAD(image_size=(128, 128))
    with pytest.raises(ValueError, match="needs images"):
        model.calibrate([])
    with pytest.raises(ValueError, match="0 <= a < b <= 1"):
        model.calibrate([IMAGES[:1]], a=0.9, b=0.9)
    for p in model.student.parameters():
        p.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="constant or NaN"):
        model.calibrate([IMAGES[:1]])
    for p in model.teacher.parameters():
        p.data.zero_()
    with pytest.raises(ModelError, match="teacher channel is constant"):
        model.fit_teacher_statistics([IMAGES])


# ----------------------------------------------------------------------------------------- files


def test_model_file_alone(tmp_path, tmp_path_factory):
    """efficientad.py copied into an empty folder trains, scores, saves and loads."""
    shutil.copy(ROOT / "efficientad.py", tmp_path)
    program = """
import torch
from efficientad import EfficientAD, ModelError
model = EfficientAD(image_size=(128, 128))
images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
model.teacher.load_state_dict({k: v.half() for k, v in model.teacher.state_dict().items()})
model.fit_teacher_statistics([images])
learned = [*model.student.parameters(), *model.autoencoder.parameters()]
optimizer, totals = torch.optim.Adam(learned, lr=1e-3), []
for _ in range(3):
    total = sum(model.losses(images, images, images).values())
    optimizer.zero_grad(); total.backward(); optimizer.step()
    totals.append(total.item())
assert totals[-1] < totals[0], totals
model.calibrate([images]); model.training_info = {"steps": 3}; model.save("model.pt")
loaded = EfficientAD.load("model.pt")
assert loaded.config == model.config and loaded.training_info == {"steps": 3}
assert not loaded.training and loaded.threshold == model.threshold
with torch.inference_mode():
    assert all(torch.equal(a, b) for a, b in zip(loaded(images), model.eval()(images)))
torch.save({"weights": 1}, "other.pt")
try: EfficientAD.load("other.pt")
except ModelError as error: assert "other.pt: not a model" in str(error)
"""
    other = put(tmp_path_factory.mktemp("other") / "kernels/__init__.py", b"")  # PyPI has some
    environment = os.environ | {"PYTHONPATH": str(other.parents[1])}
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = {p.name for p in tmp_path.iterdir()} - {"__pycache__"}
    assert names == {"efficientad.py", "model.pt", "other.pt"}  # no temporary file is left


def test_broken_kernels_are_not_silent(tmp_path, monkeypatch):
    """A kernels/ that cannot be imported for a reason of its own gets a warning, not slow torch
    without a word."""
    monkeypatch.syspath_prepend(tmp_path)
    for content in (b"from .gone import runs_on", b"runs_on = None", b"1 +"):
        for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
            monkeypatch.delitem(sys.modules, name)
        put(tmp_path / "kernels/__init__.py", content)
        with pytest.warns(UserWarning, match="kernels/ cannot be used"):
            assert runpy.run_path(str(ROOT / "efficientad.py"))["runs_on"] is None
