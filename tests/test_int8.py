"""support/int8.py: convolutions against integers, the model against the exact one, refusals."""

import pytest
import torch
import torch.nn.functional as F
from conftest import rms_ratio

from efficientad import EfficientAD
from support.calibration import calibrate, calibrate_int8
from support.checkpoints import load_model
from support.fast import has_bf16, optimize
from support.int8 import Int8Conv, ToInt8, round_in_turn
from support.tiling import TiledEfficientAD

vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="this CPU has no int8 instructions"
)


def reference_int8(layer, weight, x, relu):
    """The layer of these weights, its integers in float64."""
    stride, padding, _, groups = layer.geometry
    scale = weight.abs().amax((1, 2, 3)) / 127
    integers = round_in_turn(weight / scale.view(-1, 1, 1, 1)).double()
    y = F.conv2d(x.double(), integers, None, stride, padding, 1, groups)
    y = y * (scale.double() * layer.scale).view(1, -1, 1, 1)
    y = y if layer.bias is None else y + layer.bias.double().view(1, -1, 1, 1)
    return y.relu() if relu else y


def test_rounding_errors_of_neighbouring_taps_cancel():
    weight = torch.randn(8, 4, 3, 4) * 20
    rounded = round_in_turn(weight)
    error = weight - rounded
    assert torch.equal(rounded, rounded.round()) and 0.5 < error.abs().max() <= 1
    error[:, :, 1] = error[:, :, 1].flip(2)  # the second row is taken backwards
    assert error.flatten(2).cumsum(2).abs().max() < 0.5001
    assert round_in_turn(torch.full((1, 1, 1, 2), 127.4)).tolist() == [[[[127, 127]]]]


@vnni
@pytest.mark.parametrize("pool", [False, True])
def test_int8_convolution_is_the_integers(pool):
    x = torch.randint(0, 256, (1, 16, 9, 11), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 1, 2, 2) if pool else torch.randn(32, 16, 3, 3)
    bias = None if pool else torch.randn(32)
    for out_scale in (None, 0.05):
        layer = Int8Conv(weight, bias, x.shape, 0.01, out_scale, not pool, pool)
        y, expected = layer(x), reference_int8(layer, weight, x, not pool)
        if out_scale is None:
            torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-8, atol=1e-3)
        else:
            difference = (y - (expected / out_scale).round().clamp(0, 255)).abs()
            assert difference.max() <= 1 and (difference > 0).double().mean() < 1e-2  # ties


@vnni
@pytest.mark.parametrize("size, shared_stem", [("small", True), ("small", False), ("medium", True)])
def test_int8_from_a_checkpoint(size, shared_stem, tmp_path, monkeypatch):
    """Near the model's own maps; what it needs survives saving; threshold and quantiles are its
    own."""
    cls = TiledEfficientAD if size == "small" else EfficientAD
    model = cls(size=size, image_size=(128, 160), shared_stem=shared_stem)
    images = torch.randint(0, 256, (3, 3, 128, 160), dtype=torch.uint8)
    model.fit_teacher_statistics(images.split(1))
    calibrate(model, images, "quantile", 0.9, 0.995)
    model.save(str(tmp_path / "model.pt"))
    fast = optimize(load_model(tmp_path / "model.pt", cls), "int8")
    assert fast.precision == "int8" and fast.threshold != model.threshold
    with torch.inference_mode():
        anomaly_map, score = fast(images)
        maps, scores = fast.predict(images)
        for own, expected in zip(fast.raw_maps(images), model.raw_maps(images)):
            error = (own - expected).square().mean().sqrt() / expected.mean()
            assert 0 < error < 0.05
    torch.testing.assert_close(anomaly_map, maps["combined"], rtol=0, atol=1e-5)
    with torch.inference_mode():
        for each in (model, fast):
            known = torch.tensor(each.training_info["scores"])
            torch.testing.assert_close(each(images)[1].sort().values, known, rtol=0, atol=1e-5)
            expected = known.mean() + 3 * known.std(correction=0)  # three are never that far
            assert each.threshold.item() == pytest.approx(expected.item(), abs=1e-5)
    with torch.inference_mode():
        own, expected = (m.autoencoder(m.normalize(images[:1])) for m in (fast, model))
    assert rms_ratio(own.float(), expected) < 0.03

    def int8_layers(of: EfficientAD) -> int:
        return sum(isinstance(layer, Int8Conv) for layer in optimize(of, "int8").autoencoder)

    assert int8_layers(model) == 4 * has_bf16(torch.device("cpu"))
    monkeypatch.setattr("support.fast.has_bf16", lambda device: False)
    assert int8_layers(model) == 0
    monkeypatch.setattr("support.tiling.TILE", 128 * 128 * 160)  # three at once are too much
    calibrate_int8(model, [images])
    monkeypatch.undo()
    assert int8_layers(model) == 0 and optimize(model, "int8").precision == "int8"


def test_resizing_to_int8():
    x = torch.rand(1, 8, 9, 9) * 255
    y = ToInt8(torch.nn.Upsample((20, 20)))(x)
    error = y - F.interpolate(x.double(), (20, 20), mode="bilinear")
    assert y.dtype == torch.uint8 and error.abs().max() < 1.6 and error.mean().abs() < 0.05
    assert bool((ToInt8(torch.nn.Upsample((3, 3)))(x + 255) == 255).all())  # nothing wraps around


def test_int8_where_it_cannot_run(monkeypatch):
    model = TiledEfficientAD(image_size=(128, 128))
    for name, value, reason in (
        ("nothing", None, "no ranges for int8: recalibrate it with evaluate.py --accept"),
        ("padding", True, "without padding"),
        ("training_info", {"int8": {}}, "no int8 convolution of the expected kind"),
        ("vnni", False, "needs a CPU with VNNI"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, "_is_vnni_supported", lambda name=name: name != "vnni")
            if name == "training_info":
                patch.setattr("support.int8.Int8Conv.forward", lambda *_: 1 / torch.missing)
            if hasattr(model, name):
                patch.setattr(model, name, value)
            with pytest.warns(UserWarning, match=reason):
                assert optimize(model, "int8").precision in ("bf16", "fp32")
