"""Networks against reference outputs, published parameter counts and the properties that the paper states."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbone import ARCHITECTURES, PatchFeatures, ResNet, WeightsError, load_weights
from efficientad import PDN, Autoencoder, EfficientAD, ModelError, check_image_size


def noise(n: int, salt: int) -> torch.Tensor:
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
        state[key] = (noise(value.numel(), (k + 1) * 40503) * (24 / fan_in) ** 0.5).reshape(value.shape).float()
    net.load_state_dict(state)
    with torch.no_grad():
        y = net((noise(2 * 3 * 256 * 256, 977) * 4).reshape(2, 3, 256, 256).float())
    assert list(y.shape) == expected["shape"]
    reference = np.load(shared / "oracles/networks/outputs.npz")[name]
    rms = np.sqrt(np.mean((y[:, ::16, ::5, ::5].numpy() - reference) ** 2) / np.mean(reference**2))
    assert rms < 1e-5  # summation order; measured 0 with the build that made the reference
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


@pytest.mark.parametrize("image_size", [(128, 128), (160, 288), (256, 128), (320, 352)])
@pytest.mark.parametrize("padding", [False, True])
def test_any_image_size(image_size, padding):
    model = EfficientAD(image_size=image_size, padding=padding).eval()
    x = torch.randint(0, 256, (2, 3, *image_size), dtype=torch.uint8)
    with torch.no_grad():
        assert nn.Sequential(*list(model.autoencoder)[:11])(model.normalize(x)).shape == (2, 64, 1, 1)  # the bottleneck
        assert model.raw_maps(x)[0].shape[2:] == tuple(s // 4 - (0 if padding else 8) for s in image_size)
        anomaly_map, score = model(x)
    assert anomaly_map.shape == (2, 1, *image_size) and score.shape == (2,)
    assert torch.equal(score, anomaly_map.amax((1, 2, 3)))


@pytest.mark.parametrize("image_size", [(96, 256), (256, 250), (0, 0)])
def test_impossible_image_size(image_size):
    with pytest.raises(ValueError, match="multiples of 32"):
        check_image_size(image_size)
    with pytest.raises(ValueError, match="multiples of 32"):
        EfficientAD(image_size=image_size)


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_teacher_in_both_published_layouts(size, dtype, tmp_path):
    source = PDN(size).to(dtype)
    state = source.state_dict()
    indices = [k.split(".")[0] for k in state if k.endswith("weight")]
    named = {f"conv{indices.index(k.split('.')[0]) + 1}.{k.split('.')[1]}": v for k, v in state.items()}
    x = torch.randn(1, 3, 128, 128)
    for i, layout in enumerate((state, named)):
        torch.save(layout, tmp_path / f"{i}.pt")
        model = EfficientAD(size=size, image_size=(128, 128))
        model.load_teacher(str(tmp_path / f"{i}.pt"))
        assert torch.equal(model.teacher(x), source.float()(x))
        assert not any(p.requires_grad for p in model.teacher.parameters())


def test_teacher_errors_name_file_and_remedy(tmp_path):
    model, path = EfficientAD(image_size=(128, 128)), tmp_path / "teacher.pt"
    with pytest.raises(ModelError, match="teacher.pt: no such file"):
        model.load_teacher(str(path))
    for content in (PDN("medium").state_dict(), {"conv1.weight": torch.zeros(1)}, {"x": 1}):
        torch.save(content, path)
        with pytest.raises(ModelError, match="teacher.pt: not a small teacher; .*distill.py"):
            model.load_teacher(str(path))
    state = PDN("small").state_dict()
    state["0.weight"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(ModelError, match="not finite"):
        model.load_teacher(str(path))
    path.write_bytes(b"junk")
    with pytest.raises(ModelError, match="not a readable checkpoint"):
        model.load_teacher(str(path))


# ---------------------------------------------------------------------------------------------------------------- backbone


def test_resnet18_matches_reference(shared):
    trunk = ResNet("resnet18")
    load_weights(trunk, str(shared / "weights/resnet18_imagenet1k_v1_layer1-3.pth"))
    j = torch.arange(3 * 128 * 160, dtype=torch.float64)
    x = (torch.sin(0.0131 * j) + torch.cos(0.00037 * j)).float().reshape(1, 3, 128, 160)
    with torch.no_grad():
        outputs = trunk.eval()(x)
    reference = np.load(shared / "oracles/resnet18/outputs.npz")
    for name, y in zip(("layer2", "layer3"), outputs):
        r = reference[name]
        # the weight file stores convolutions in fp16 (11-bit significand), the reference was made before that rounding
        assert np.sqrt(np.mean((y[:, ::8].numpy() - r) ** 2) / np.mean(r**2)) < 2**-10


def test_backbone_shapes_and_names():
    channels = {"resnet18": (128, 256), "resnet34": (128, 256)}
    blocks = {"101": 23, "resnet18": 2}
    for name in ARCHITECTURES:
        with torch.device("meta"):
            trunk = ResNet(name)
            layer2, layer3 = trunk(torch.zeros(1, 3, 64, 96))
        c2, c3 = channels.get(name, (512, 1024))
        assert layer2.shape == (1, c2, 8, 12) and layer3.shape == (1, c3, 4, 6) and trunk.channels == (c2, c3)
        assert len(trunk.layer3) == next((n for key, n in blocks.items() if key in name), 6)
    with torch.device("meta"):
        state = ResNet("wide_resnet101_2").state_dict()
    assert state["layer1.0.conv2.weight"].shape == (128, 128, 3, 3)  # torchvision: the width is doubled inside the block
    assert state["layer3.22.conv3.weight"].shape == (1024, 512, 1, 1)
    assert state["layer2.0.downsample.0.weight"].shape == (512, 256, 1, 1)


def test_backbone_weights_load_and_errors(tmp_path):
    source, trunk = ResNet("resnet18"), ResNet("resnet18")
    path = tmp_path / "weights.pth"
    extra = {"fc.weight": torch.zeros(1000, 512), "layer4.0.conv1.weight": torch.zeros(512, 256, 3, 3)}
    torch.save(source.state_dict() | extra, path)  # as published: with the layers that are not used
    load_weights(trunk, str(path))
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), trunk.state_dict().values()))
    with pytest.raises(WeightsError, match="not the weights of resnet34"):
        load_weights(ResNet("resnet34"), str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="weights.pth: not a readable"):
        load_weights(trunk, str(path))
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(trunk, str(tmp_path / "missing.pth"))


def test_patch_features_are_patchcores():
    """The folded 3×3 convolutions against the definition, step by step."""
    trunk = ResNet("resnet18").eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        layers, grids = trunk(x), []
        for layer in layers:
            n, c, h, w = layer.shape
            patches = F.unfold(layer, 3, padding=1).reshape(n, c * 9, h, w)  # channel-first neighbourhoods
            patches = F.interpolate(patches, layers[0].shape[-2:], mode="bilinear", align_corners=False)
            grids.append(F.adaptive_avg_pool1d(patches.permute(0, 2, 3, 1).reshape(-1, 1, c * 9), 1024))
        expected = F.adaptive_avg_pool1d(torch.cat(grids, 2), 384).reshape(2, 8, 12, 384).permute(0, 3, 1, 2)
        y = PatchFeatures(trunk)(x)
    assert y.shape == expected.shape
    assert (y - expected).norm() / expected.norm() < 1e-5
