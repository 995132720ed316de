"""ResNet trunk (conv1 to layer 3) and PatchCore's patch features: a teacher is distilled from them, SimpleNet works on them.

    trunk = ResNet("wide_resnet101_2")
    load_weights(trunk, "wide_resnet101_2-32ee1156.pth")         # torchvision's published file
    target = PatchFeatures(trunk)(images)                        # N×3×512×512 -> N×384×64×64

Parameters have torchvision's names, so that its weight files load as they are; layer 4 and the classifier are not used and
not built. The patch features are those of PatchCore (Roth et al., arXiv 2106.08265), which section 3.1 of EfficientAD
(arXiv 2303.14535) distils.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# name: (bottleneck blocks?, blocks in layers 1 to 3, width of the 3×3 convolutions relative to a plain ResNet)
ARCHITECTURES = {
    "resnet18": (False, (2, 2, 2), 1),
    "resnet34": (False, (3, 4, 6), 1),
    "resnet50": (True, (3, 4, 6), 1),
    "resnet101": (True, (3, 4, 23), 1),
    "wide_resnet50_2": (True, (3, 4, 6), 2),
    "wide_resnet101_2": (True, (3, 4, 23), 2),
}


class WeightsError(ValueError):
    """A weight file is missing, damaged or made for another network; the message names the file and the remedy."""


class Block(nn.Module):
    """Residual block: two 3×3 convolutions, or 1×1, 3×3, 1×1 when `bottleneck`. N×C_in×h×w -> N×C_out×h/stride×w/stride."""

    def __init__(self, channels_in: int, channels: int, stride: int, bottleneck: bool, widening: int):
        super().__init__()
        channels_out = channels * 4 if bottleneck else channels
        width = channels * widening
        if bottleneck:
            self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels_out)
        else:
            self.conv1 = nn.Conv2d(channels_in, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, channels_out, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.conv1.out_channels)
        self.bn2 = nn.BatchNorm2d(self.conv2.out_channels)
        self.downsample = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet through layer 3. Images normalized with ImageNet's mean and standard deviation, N×3×H×W float ->
    (layer 2: N×C×H/8×W/8, layer 3: N×2C×H/16×W/16); C is 128, or 512 for the networks with bottleneck blocks.
    Raises ValueError for an architecture that is not in ARCHITECTURES."""

    def __init__(self, architecture: str):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"unknown backbone '{architecture}': choose one of {', '.join(ARCHITECTURES)}")
        bottleneck, depths, widening = ARCHITECTURES[architecture]
        self.architecture = architecture
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels_in = 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(Block(channels_in, 64 * 2**i, 2 if i and not j else 1, bottleneck, widening))
                channels_in = 64 * 2**i * (4 if bottleneck else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.channels = (channels_in // 2, channels_in)  # of layers 2 and 3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.layers(x)[1:])

    def layers(self, x: Tensor, last: int = 3) -> list[Tensor]:
        """The outputs of layers 1 to `last`; layer 1's is N×C/2×H/4×W/4."""
        x, outputs = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1), []
        for layer in (self.layer1, self.layer2, self.layer3)[:last]:
            x = layer(x)
            outputs.append(x)
        return outputs


def load_weights(trunk: ResNet, path: str) -> None:
    """Load a torchvision weight file (of any float dtype; layer 4 and fc are skipped) into `trunk`. No code in the file is
    ever executed. Raises WeightsError, naming the file, when it cannot be read or belongs to another architecture."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v for k, v in state.items() if not k.startswith(("layer4.", "fc."))}
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; give torchvision's weight file of {trunk.architecture}") from None
    except Exception:  # torch.load raises many kinds of errors for a foreign or damaged file
        raise WeightsError(f"{path}: not a readable torch weight file; download it again") from None
    try:
        trunk.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError):
        raise WeightsError(f"{path}: not the weights of {trunk.architecture}; pass the backbone they belong to") from None


def fold_batch_norms(trunk: ResNet) -> None:
    """Multiply each batch norm of a trunk in eval mode into the convolution before it: the same outputs up to rounding, fewer
    passes over memory."""
    for module in trunk.modules():
        if isinstance(module, (ResNet, Block)):
            for i in (1, 2, 3):
                if isinstance(getattr(module, f"bn{i}", None), nn.BatchNorm2d):
                    setattr(module, f"conv{i}", fuse_conv_bn_eval(getattr(module, f"conv{i}"), getattr(module, f"bn{i}")))
                    setattr(module, f"bn{i}", nn.Identity())
        if isinstance(module, Block) and module.downsample is not None and len(module.downsample) == 2:
            module.downsample = nn.Sequential(fuse_conv_bn_eval(*module.downsample))


class PatchFeatures(nn.Module):
    """PatchCore's features of some of the `layers` 1, 2, 3: the target of distillation (section 3.1), and SimpleNet's features
    (`channels` and `width` 1536). N×3×H×W normalized -> N×`channels`×h×w, the grid of the first of the layers; layer 2's is H/8.

    The definition: the zero-padded 3×3 neighbourhood of every position of a layer, flattened channel-first (C·9 numbers),
    average-pooled adaptively to `width`; each layer resized bilinearly to the first one's grid; all concatenated (2048 numbers
    for two layers of width 1024) and pooled again to `channels`. Neighbourhood and poolings are one linear map of the layer's
    3×3 windows, so each layer needs a single 3×3 convolution whose weight is the pooling of an identity matrix. Pooling acts on
    channels and resizing on positions, so their order is free. The layers stay apart because the second pooling splits evenly
    between them when `channels` is a multiple of their number. Raises ValueError if it is not, or for an impossible layer.

    The trunk is frozen and stays in eval mode. The poolings are functions of the options and are not part of the state."""

    def __init__(self, trunk: ResNet, channels: int = 384, width: int = 1024, layers: tuple[int, ...] = (2, 3)):
        super().__init__()
        if not layers or list(layers) != sorted(set(layers) & {1, 2, 3}):
            raise ValueError(f"layers must be some of 1, 2, 3 in this order, got {layers}")
        if channels % len(layers):
            raise ValueError(f"channels must be a multiple of the number of layers, {len(layers)}, got {channels}")
        self.trunk = trunk.requires_grad_(False)
        self.layers, share = tuple(layers), channels // len(layers)
        for i in self.layers:
            c = trunk.channels[1] // 2 ** (3 - i)
            pooled = F.adaptive_avg_pool1d(F.adaptive_avg_pool1d(torch.eye(c * 9), width), share)  # C·9 × share
            self.register_buffer(f"pooling{i}", pooled.T.reshape(share, c, 3, 3).contiguous(), persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> "PatchFeatures":
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        outputs, features = self.trunk.layers(x, self.layers[-1]), []
        for i in self.layers:
            y = F.conv2d(outputs[i - 1], getattr(self, f"pooling{i}"), padding=1)
            features.append(F.interpolate(y, features[0].shape[-2:], mode="bilinear") if features else y)
        return torch.cat(features, 1)
