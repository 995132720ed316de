"""Statistics, losses, calibration and files of the model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import efficientad
from efficientad import (
    EfficientAD,
    ModelError,
    autoencoder_loss,
    channel_statistics,
    hard_feature_loss,
    pretraining_penalty,
    quantile,
    student_autoencoder_loss,
)

# -------------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [1, 2, 3, 10, 999, 100_001])
@pytest.mark.parametrize("q", [0, 0.1, 0.5, 0.9, 0.995, 0.999, 1])
def test_quantile_is_numpys(n, q):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x[::3] = x[0]  # ties
    expected = np.quantile(x.numpy().astype(np.float64), q)
    assert quantile(x, q).item() == pytest.approx(expected, rel=2e-7, abs=1e-7)


def test_quantile_beyond_torchs_limit():
    n = 2**24 + 3
    x = torch.arange(n, dtype=torch.int32).flip(0).float() % 1000
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5)
    for q in (0.9, 0.995):
        assert quantile(x, q).item() == pytest.approx(np.quantile(x.numpy(), q), rel=1e-6)


def test_quantile_special_values():
    assert quantile(torch.tensor([1.0, torch.nan, 2.0]), 0.0).isnan()  # as torch.quantile
    assert quantile(torch.tensor([-torch.inf, 0.0, 1.0]), 0.0).item() == -torch.inf
    assert quantile(torch.zeros(2, 3), 0.7).shape == ()
    for q, x in ((-0.1, torch.ones(3)), (1.1, torch.ones(3)), (0.5, torch.ones(0))):
        with pytest.raises(ValueError, match="quantile needs"):
            quantile(x, q)


def test_channel_statistics_do_not_cancel():
    x = 1e4 + torch.randn(6, 5, 7, 9, generator=torch.Generator().manual_seed(1))  # E[x²] − E[x]² in fp32 would be noise
    batches = [x[:1], x[1:4], x[4:]]
    mean, std = channel_statistics(batches)
    expected = x.double()
    assert mean.shape == std.shape == (1, 5, 1, 1) and mean.dtype == torch.float32
    torch.testing.assert_close(mean, expected.mean((0, 2, 3), keepdim=True).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(std, expected.std((0, 2, 3), correction=0, keepdim=True).float(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="at least one batch"):
        channel_statistics([])


# ------------------------------------------------------------------------------------------------------------------ losses


def test_hard_feature_loss_is_the_mean_of_the_largest():
    teacher, student = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5, requires_grad=True)
    d = (teacher - student).detach().square().flatten()
    loss = hard_feature_loss(teacher, student, 0.9)
    assert loss.item() == pytest.approx(d.sort().values[-40:].mean().item(), rel=1e-6)  # 400 elements
    loss.backward()
    assert (student.grad != 0).sum() == 40
    torch.testing.assert_close(hard_feature_loss(teacher, student, 0), torch.nn.functional.mse_loss(student, teacher))
    assert hard_feature_loss(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3), 0.999).item() == 1  # all equal: all are hard


def test_loss_terms_and_where_their_gradients_go():
    """The batched step of `losses` against the plain definition, value and gradient."""
    model = EfficientAD(image_size=(128, 128)).eval()  # eval: no dropout, so that both computations agree
    model.teacher_mean.normal_(), model.teacher_std.uniform_(0.5, 2)
    images, pretraining = (torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8) for _ in range(2))
    augmented = torch.rand(2, 3, 128, 128)
    losses = model.losses(images, augmented, pretraining, p_hard=0.99)
    sum(losses.values()).backward()
    fast = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    i, j, p = (model.normalize(x) for x in (images, augmented, pretraining))
    expected = {
        "hard": hard_feature_loss(model.teacher_features(i), model.student(i)[:, :384], 0.99),
        "penalty": pretraining_penalty(model.student(p)[:, :384]),
        "autoencoder": autoencoder_loss(model.teacher_features(j), model.autoencoder(j)),
        "student_autoencoder": student_autoencoder_loss(model.autoencoder(j), model.student(j)[:, 384:]),
    }
    sum(expected.values()).backward()
    assert losses.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        if name.startswith("teacher"):
            assert parameter.grad is None
        else:
            assert (fast[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()

    model.zero_grad()
    model.losses(images, augmented, None)["student_autoencoder"].backward()
    assert model.autoencoder[0].weight.grad.abs().sum() > 0  # published: it reaches autoencoder and student alike
    assert model.student[0].weight.grad.abs().sum() > 0
    assert "penalty" not in model.losses(images, augmented, None)


# --------------------------------------------------------------------------------------------------------------- inference


def random_model(**config) -> EfficientAD:
    """A model of which every buffer is set; not trained."""
    model = EfficientAD(**{"image_size": (128, 128), **config})
    batches = [torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8) for _ in range(2)]
    model.fit_teacher_statistics(batches)
    model.calibrate(batches)
    return model.eval()


def test_uint8_and_float_images_agree():
    model = random_model()
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], model(images.float() / 255)[0])
    with pytest.raises(ValueError, match="N×3×128×128"):
        model(images[..., :96])
    with pytest.raises(TypeError, match="uint8"):
        model(images.int())


def test_teacher_statistics_whiten_the_teacher():
    model = EfficientAD(image_size=(128, 128))
    images = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8)
    model.fit_teacher_statistics([images[:1], images[1:]])
    features = model.teacher_features(model.normalize(images))
    assert features.mean((0, 2, 3)).abs().max() < 1e-4
    assert (features.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("padding", [False, True])
def test_calibration_maps_the_quantiles_to_0_and_01(padding):
    model = EfficientAD(image_size=(128, 128), padding=padding)
    batches = [torch.rand(2, 3, 128, 128) for _ in range(3)]
    scores = model.calibrate(iter(batches), a=0.8, b=0.98)
    with torch.no_grad():
        raw = [torch.cat(m) for m in zip(*(model.raw_maps(b) for b in batches))]
        for m, (q_a, q_b) in zip(raw, model.quantiles):
            normalized = 0.1 * (m - q_a) / (q_b - q_a)
            assert normalized.quantile(0.8).item() == pytest.approx(0, abs=1e-5)
            assert normalized.quantile(0.98).item() == pytest.approx(0.1, abs=1e-5)
        torch.testing.assert_close(scores, torch.cat([model(b)[1] for b in batches]))
        local_map, global_map = model.maps(batches[0])
        torch.testing.assert_close(model(batches[0])[0], (local_map + global_map) / 2)
    assert model.threshold == scores.max()
    model.calibrate(batches, gaussian=True)
    with torch.no_grad():
        for m, (q_a, q_b) in zip(raw, model.quantiles):
            normalized = 0.1 * (m - q_a) / (q_b - q_a)
            assert normalized.mean().item() == pytest.approx(0, abs=1e-4)
            assert normalized.var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_calibration_refuses_what_it_cannot_do():
    model = EfficientAD(image_size=(128, 128))
    with pytest.raises(ValueError, match="at least one image"):
        model.calibrate([])
    with pytest.raises(ValueError, match="0 <= a < b <= 1"):
        model.calibrate([torch.rand(1, 3, 128, 128)], a=0.9, b=0.9)
    for p in model.student.parameters():
        p.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="constant or not a number"):
        model.calibrate([torch.rand(1, 3, 128, 128)])


# ------------------------------------------------------------------------------------------------------------------- files


def test_checkpoint_round_trip(tmp_path):
    model = random_model(padding=True)
    model.training_info = {"steps": 3, "data": "x"}
    path = str(tmp_path / "model.pt")
    model.save(path)
    loaded = EfficientAD.load(path)
    assert loaded.config == model.config and loaded.training_info == model.training_info and not loaded.training
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded(x)[0], model(x)[0])
    assert loaded.threshold == model.threshold
    assert os.listdir(tmp_path) == ["model.pt"]  # no temporary file is left


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "model.pt"
    random_model().save(str(path))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x80\x04junk"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="model.pt: not a readable checkpoint"):
            EfficientAD.load(str(path))
    torch.save({"weights": 1}, path)
    with pytest.raises(ModelError, match="not a model of this program"):
        EfficientAD.load(str(path))
    torch.save(torch.zeros(3), path)
    with pytest.raises(ModelError, match="not a checkpoint"):
        EfficientAD.load(str(path))
    torch.save({"format": "efficientad", "config": {"size": "small"}, "training": {}, "state": {}}, path)
    with pytest.raises(ModelError, match="damaged model file"):
        EfficientAD.load(str(path))


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_loading_never_executes_code(tmp_path):
    path, victim = tmp_path / "model.pt", tmp_path / "executed"
    torch.save({"format": "efficientad", "config": Exploit(str(victim))}, path)
    with pytest.raises(ModelError):
        EfficientAD.load(str(path))
    assert not victim.exists()


def test_model_file_alone(tmp_path):
    """efficientad.py copied into an empty folder trains a step, scores, saves and loads."""
    shutil.copy(efficientad.__file__, tmp_path)
    program = """
import torch
from efficientad import EfficientAD
model = EfficientAD(image_size=(128, 128))
images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
model.fit_teacher_statistics([images])
optimizer = torch.optim.Adam([*model.student.parameters(), *model.autoencoder.parameters()], lr=1e-3)
totals = []
for _ in range(3):
    total = sum(model.losses(images, images, images).values())
    optimizer.zero_grad(); total.backward(); optimizer.step()
    totals.append(total.item())
assert totals[-1] < totals[0], totals
model.calibrate([images]); model.save("model.pt")
with torch.no_grad():
    score = model.eval()(images)[1]
    assert torch.equal(EfficientAD.load("model.pt")(images)[1], score) and score.isfinite().all()
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in Path(tmp_path).iterdir()} - {"__pycache__"} == {"efficientad.py", "model.pt"}
