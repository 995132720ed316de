"""support/backbone.py: ResNet against reference outputs, weight files, PatchCore's features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientad import ModelError
from support.backbone import ARCHITECTURES, PatchFeatures, ResNet, fold_batch_norms, load_weights


def random_trunk(architecture: str) -> ResNet:
    """A trunk whose batch norms have seen something, so that folding them has an effect."""
    trunk = ResNet(architecture).eval()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.2)
    return trunk


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


@pytest.mark.parametrize("name", ARCHITECTURES)
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


def test_weight_files(tmp_path):
    source, trunk, path = ResNet("resnet18"), ResNet("resnet18"), tmp_path / "weights.pth"
    unused = {"fc.weight": torch.zeros(1000, 512), "layer4.0.bn1.weight": torch.zeros(512)}
    torch.save(source.state_dict() | unused, path)  # as published
    load_weights(trunk, str(path))
    pairs = zip(source.state_dict().values(), trunk.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    remedy = "pass torchvision's weight file of resnet"
    with pytest.raises(ModelError, match=f"not the weights of resnet34; {remedy}34"):
        load_weights(ResNet("resnet34"), str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"weights.pth: not a readable .*; {remedy}18"):
        load_weights(trunk, str(path))
    with pytest.raises(ModelError, match=f"missing.pth: no such file; {remedy}18"):
        load_weights(trunk, str(tmp_path / "missing.pth"))


def test_folded_batch_norms():
    trunk, x = random_trunk("resnet50"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trunk(x)
        fold_batch_norms(trunk)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(trunk(x), expected))
    assert not [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    "channels, width, layers",
    [(384, 1024, (2, 3)), (1536, 1536, (2, 3)), (1536, 1536, (2,)), (1536, 1536, (1, 2, 3))],
)
def test_patch_features_are_patchcores(channels, width, layers):
    """The folded 3×3 convolutions against the definition, step by step. Layer 2 of ResNet-18 has
    1,152 numbers at a position: they are pooled up to 1,536."""
    trunk, x = random_trunk("resnet18"), torch.randn(2, 3, 64, 96)
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


def test_any_trunk_with_outputs_and_channels_by_layer():
    class Constant(nn.Module):
        channels = {1: 5, 2: 7}

        def forward(self, x, layers):
            return [torch.full((1, self.channels[i], 8 // i, 8 // i), float(i)) for i in layers]

    y = PatchFeatures(Constant(), 4, 6, (1, 2))(torch.zeros(1, 3, 32, 32))
    assert y.shape == (1, 4, 8, 8)
    assert y[0, :, 4, 4].tolist() == pytest.approx([1, 1, 2, 2])


def test_impossible_options():
    with pytest.raises(ValueError, match="unknown backbone 'vgg': choose one of resnet18, "):
        ResNet("vgg")
    trunk = ResNet("resnet18")
    for layers in ((3, 2), (), (4,)):
        with pytest.raises(ValueError, match="some of 1, 2, 3 in this order"):
            PatchFeatures(trunk, layers=layers)
    with pytest.raises(ValueError, match="a multiple of 2 layers, got 383"):
        PatchFeatures(trunk, 383)
