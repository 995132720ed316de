"""baselines/simplenet.py: the definition, the file, and the real script, run tiny."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, log_of, random_norms, rows_of, same
from torch import nn

from baselines.simplenet import CachedFeatures, Options, SimpleNet, crop_size
from efficientad import ModelError
from support.backbone import ResNet
from support.checkpoints import read_checkpoint
from support.images import list_images, read_image, to_array

SIZE = (80, 96)  # crop 64×80 (70.0 and 84.0 before rounding), layer 2's grid 8×10


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *SIZE), dtype=torch.uint8)


def small(**options) -> SimpleNet:
    return random_norms(SimpleNet(**{"backbone": "resnet18", "image_size": SIZE, **options}))


def test_shapes_are_the_papers():
    with torch.device("meta"):  # without arithmetic
        model = SimpleNet().eval()
        anomaly_map, score = model(torch.empty(2, 3, 329, 329))
        assert model.features(torch.empty(2, 3, 329, 329)).shape == (2, 36, 36, 1536)
    assert anomaly_map.shape == (2, 1, 329, 329) and score.shape == (2,)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 1536 * 1536 + 1536 + 1536 * 1024 + 1024 + 2 * 1024 + 1024
    assert crop_size((329, 329)) == (288, 288) and crop_size((256, 512)) == (224, 448)
    with pytest.raises(ValueError, match="at least 64"):
        crop_size((63, 200))


def test_features_are_the_patch_features_of_the_centre():
    model, x = small(), images(2)
    centre = x[:, :, 8:72, 8:88].float() / 255
    expected = model.patch_features((centre - model.mean) / model.std).permute(0, 2, 3, 1)
    assert torch.allclose(model.features(x), expected, atol=1e-5)


def test_map_is_resized_and_blurred_with_its_edges_repeated():
    from scipy.ndimage import gaussian_filter

    model, raw = small(), torch.randn(1, 1, 8, 10)
    centre = F.interpolate(raw, (64, 80), mode="bilinear")[0, 0].numpy()
    padded = np.pad(centre, 8 + 20, mode="edge")
    expected = gaussian_filter(padded, 4, truncate=4)[20:-20, 20:-20]
    assert np.abs(model.resize(raw)[0, 0].numpy() - expected).max() < 1e-5


@torch.no_grad()
def test_predict():
    """The score is the largest −D, taken before resizing and blurring."""
    model, x = small(), images(2)
    d = model.discriminator(model.adaptor(model.features(x).flatten(0, 2))).view(2, 1, 8, 10)
    maps, scores = model.predict(x)
    assert list(maps) == list(scores) == ["anomaly"]
    assert torch.allclose(maps["anomaly"], model.resize(-d), atol=1e-5)
    assert torch.allclose(scores["anomaly"], -d.amin((1, 2, 3)), atol=1e-5)


@torch.no_grad()
def test_calibration():
    model, batches = small(), [images(1), images(2)]
    scores = model.train().calibrate(batches)
    assert not model.training and model.threshold == scores.max()
    raw = torch.cat([model.raw_map(x) for x in batches])
    assert torch.equal(scores, raw.amax((1, 2, 3))) and model.floor == raw.median()
    with pytest.raises(ValueError, match="at least one image"):
        model.calibrate([])
    model.discriminator[-1].weight.data.zero_()
    with pytest.raises(ModelError, match="constant or NaN"):
        model.calibrate(batches)


@pytest.mark.parametrize("adaptor", [True, False])
@pytest.mark.parametrize("precision, error", [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01)])
def test_fast_form_computes_the_same(precision, error, adaptor):
    model, x = small(adaptor=adaptor), images(2)
    model.calibrate([x])
    fast = model.optimize(precision)
    with torch.no_grad():
        expected, y = model(x), fast(x)
    assert fast.threshold == model.threshold and fast.floor == model.floor
    for a, b in zip(y, expected):
        assert a.dtype == torch.float32 and (a - b).norm() <= error * b.norm()
    assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert isinstance(model.discriminator[1], nn.BatchNorm1d)  # the model itself is untouched
    with pytest.raises(TypeError, match="for inference"):
        fast.save("m.pt")


def test_int8_is_not_for_it():
    with pytest.warns(UserWarning, match="int8 is for EfficientAD"):
        assert small().optimize("int8").precision in ("bf16", "fp32")


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("adaptor", [True, False])
def test_losses_and_gradients_are_the_definitions(adaptor):
    """Adapt, add noise, discriminate both together. The model does it with half the arithmetic."""
    model, features = small(adaptor=adaptor).train(), torch.randn(2, 3, 4, 1536)
    torch.manual_seed(1)
    losses = model.losses(features)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.patch_features.parameters())
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    torch.manual_seed(1)
    real = model.adaptor(features.reshape(-1, 1536))
    noise = 0.015 * torch.randn(real.shape)
    d_real, d_fake = model.discriminator(torch.cat([real, real + noise])).chunk(2)
    expected = {"real": F.relu(0.5 - d_real).mean(), "fake": F.relu(0.5 + d_fake).mean()}
    sum(expected.values()).backward()
    assert all(abs(losses[name] - expected[name]) < 1e-5 for name in expected)
    for name, gradient in gradients.items():
        if name not in ("adaptor.bias", "discriminator.0.bias"):  # the batch norm removes them
            p = model.get_parameter(name)
            assert (gradient - p.grad).norm() < 1e-3 * p.grad.norm(), name


def test_cache_is_bounded_and_changes_nothing():
    model, data, computed = small(), [x.numpy() for x in images(3)], []
    features = model.features
    model.features = lambda x: computed.append(1) or features(x)
    for room, count in ((4 * 2**30, 3), (2 * 2 * 1536 * 8 * 10, 4), (0, 6)):
        computed.clear()
        cache = CachedFeatures(model, data, room)
        first, second = [cache[i] for i in range(3)], [cache[i] for i in range(3)]
        assert len(computed) == count and len(cache) == 3
        assert sum(f.nbytes for f in cache.kept.values()) <= room
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        assert torch.equal(first[2], features(torch.from_numpy(data[2])[None])[0].half())


# ----------------------------------------------------------------------------------------- files


def test_backbone_file_is_not_needed_again(tmp_path):
    """A model computes the same after save and load, with the weight file gone."""
    torch.save(small().patch_features.trunk.state_dict(), tmp_path / "resnet18.pth")
    model = small(layers=(1, 2), noise=0.1)
    model.load_backbone(str(tmp_path / "resnet18.pth"))
    (tmp_path / "resnet18.pth").unlink()
    model.calibrate([images(2)])
    model.training_info = {"category": "bottle", "steps": 3}
    model.save(str(tmp_path / "model.pt"))
    loaded = SimpleNet.load(str(tmp_path / "model.pt"))
    assert loaded.config == model.config and loaded.training_info == model.training_info
    x = images(2)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), loaded(x)))
    state = torch.load(tmp_path / "model.pt", weights_only=True)["state"]
    assert state["patch_features.trunk.conv1.weight"].dtype == torch.float16
    assert state["adaptor.weight"].dtype == torch.float32


def test_a_backbone_beyond_half_precision(tmp_path):
    state = ResNet("resnet18").state_dict()
    torch.save(state | {"conv1.weight": state["conv1.weight"] * 1e9}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="x.pth: not finite in half precision"):
        small().load_backbone(str(tmp_path / "x.pth"))


def test_scaled_features_are_saved(tmp_path):
    """The scale belongs to the model: one that was saved without it has 1."""
    net = SimpleNet(backbone="efficientnet_lite0", image_size=(64, 64), scale=1 / 30)
    net.save(str(tmp_path / "scaled.pt"))
    del net.config["scale"]
    net.save(str(tmp_path / "plain.pt"))
    images = torch.rand(1, 3, 64, 64)
    scaled, plain = (
        SimpleNet.load(str(tmp_path / f)).features(images) for f in ("scaled.pt", "plain.pt")
    )
    torch.testing.assert_close(30 * scaled, plain, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- script


@pytest.fixture
def command(resnet18, tiny_demo):
    options = ("--backbone", "resnet18", "--backbone-weights", resnet18, "--data", tiny_demo)
    return ("baselines.simplenet", *options, "--image-size", 64)


def test_train_and_evaluate(command, tiny_demo, run_script, tmp_path):
    options = ("--epochs", 2, "--layers", "1,3", "--no-adaptor", "--device", "cpu")
    options += ("--noise", 0.02, "--lr", 3e-4, "--schedule", "constant")
    status, out, err = run_script(*command, *options)
    assert status == 0 and "wrote runs/tiny-simplenet/model.pt" in out, err
    run = tmp_path / "runs/tiny-simplenet"
    log = log_of(run)
    assert [e["step"] for e in log] == [0, 4]  # 2 epochs of 5 images, 2 a step
    assert log[0].keys() == {"step", "lr", "real", "fake"} and log[0]["lr"] == log[1]["lr"] == 3e-4
    model = SimpleNet.load(str(run / "model.pt"))
    assert model.training_info["epochs"] == 2 and model.training_info["steps"] == 5
    assert Options(device="cpu").epochs == 40
    assert model.threshold.item() == model.training_info["scores"][-1]  # for p-values
    assert model.config["layers"] == (1, 3) and not model.config["adaptor"]
    assert model.noise == 0.02

    status, out, err = run_script("evaluate.py", "--device", "cpu")
    assert status == 0 and "local" not in out and "AU-sPRO" in out, err
    rows = {row["image"]: row for row in rows_of(run / "scores.csv")}
    image = to_array(read_image(tiny_demo / "test/good/001.png"), (64, 64))
    with torch.no_grad():
        score = model(torch.from_numpy(image)[None])[1]
    assert float(rows["good/001"]["score"]) == pytest.approx(score.item(), abs=1e-5)

    good = tiny_demo / "test/good"
    arrays = [to_array(read_image(path), (64, 64)) for path in list_images(good)]
    with torch.no_grad():
        expected = [model(torch.from_numpy(x)[None])[1].item() for x in arrays]
    options = ("--images", good, "--precision", "fp32", "--device", "cpu")
    assert run_script("evaluate.py", *options)[0] == 0
    found = [float(row["score"]) for row in rows_of(run / "images/scores.csv")]
    assert found == pytest.approx(expected, abs=1e-5)
    assert run_script("evaluate.py", "--accept", good, "--yes", "--device", "cpu")[0] == 0
    new = SimpleNet.load(str(run / "model.pt"))
    assert new.threshold.item() == pytest.approx(max(expected), abs=1e-5)
    assert (run / "model-1.pt").exists()


def test_resumed_equals_uninterrupted(command, run_script, tmp_path, interrupt_at):
    assert run_script(*command, "--epochs", 2, "--out", "whole")[0] == 0
    with interrupt_at(3):
        status, _, err = run_script(*command, "--epochs", 2, "--out", "cut")
    assert status == 130 and "--resume cut" in err
    groups = read_checkpoint(tmp_path / "cut/resume.pt")["optimizers"][0]["param_groups"]
    assert [group["full_lr"] for group in groups] == [1e-4, 2e-4]  # adaptor's, discriminator's
    status, _, err = run_script("baselines.simplenet", "--resume", "cut")
    assert status == 0, err
    assert same(tmp_path / "whole/model.pt", tmp_path / "cut/model.pt")
    rates = [entry["lr"] for entry in log_of(tmp_path / "cut")]  # half a cosine
    assert rates == pytest.approx([1e-4, 0.5e-4 * (1 + math.cos(0.75 * math.pi))])


def test_bad_options_get_one_line(command, run_script, tmp_path):
    file = "--backbone-weights takes the published weight file of"
    for options, *words in (
        ((command[0], "--backbone-weights", "none.pth"), "none.pth: no such file", file),
        ((*command, "--backbone", "resnet34"), f"not the weights of resnet34; {file} resnet34"),
        ((*command, "--layers", "3,2"), "--layers takes some of 1,2,3"),
        ((*command, "--noise", -1), "--noise >= 0"),
        ((*command, "--epochs", 1, "--steps", 1), "--steps or --epochs"),
    ):
        assert_refused(run_script(*options), *words)
    assert not list(tmp_path.iterdir())
