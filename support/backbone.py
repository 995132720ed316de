"""ResNet trunks and PatchCore's patch features, for distillation and for SimpleNet.

    trunk = ResNet("wide_resnet101_2")
    load_weights(trunk, "wide_resnet101_2-32ee1156.pth")  # torchvision's published file
    target = PatchFeatures(trunk)(images)                 # N×3×512×512 -> N×384×64×64

Parameters have torchvision's names, so its weight files load as they are; layer 4 and the
classifier are not built. The patch features are those of PatchCore (Roth et al., arXiv 2106.08265),
which section 3.1 of EfficientAD (arXiv 2303.14535) distils.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from efficientad import ModelError
from support.checkpoints import read_checkpoint

# name: (bottleneck blocks?, blocks in layers 1 to 3, relative width of the 3×3 convolutions)
ARCHITECTURES = {
    "resnet18": (False, (2, 2, 2), 1),
    "resnet34": (False, (3, 4, 6), 1),
    "resnet50": (True, (3, 4, 6), 1),
    "resnet101": (True, (3, 4, 23), 1),
    "wide_resnet50_2": (True, (3, 4, 6), 2),
    "wide_resnet101_2": (True, (3, 4, 23), 2),
}


def convolution(c_in: int, c_out: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution H×W -> H/stride×W/stride without bias, and the batch norm that follows it."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out)


class Block(nn.Module):
    """Residual block, N×c_in×h×w -> N×c_out×h/stride×w/stride: two 3×3 convolutions, or 1×1, 3×3
    and 1×1 when `bottleneck`, with `width` channels in between."""

    def __init__(self, c_in: int, width: int, c_out: int, stride: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv1, self.bn1 = convolution(c_in, width, 1)
            self.conv2, self.bn2 = convolution(width, width, 3, stride)
            self.conv3, self.bn3 = convolution(width, c_out, 1)
        else:
            self.conv1, self.bn1 = convolution(c_in, width, 3, stride)
            self.conv2, self.bn2 = convolution(width, c_out, 3)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(*convolution(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet through layer 3. Images N×3×H×W, float, normalized with ImageNet's mean and standard
    deviation -> the outputs of `layers`, some of 1, 2 and 3, whose grids are H/4, H/8 and H/16.
    `channels` has each layer's number. Raises ValueError for an unknown architecture."""

    unused = ("layer4.", "fc.")  # in torchvision's files

    def __init__(self, architecture: str):
        super().__init__()
        if architecture not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            raise ValueError(f"unknown backbone '{architecture}': choose one of {names}")
        bottleneck, depths, widening = ARCHITECTURES[architecture]
        self.architecture, self.channels = architecture, {}
        self.conv1, self.bn1 = convolution(3, 64, 7, 2)
        c_in = 64
        for i, depth in enumerate(depths, 1):
            width, c_out = 32 * 2**i * widening, 32 * 2**i * (4 if bottleneck else 1)
            first = Block(c_in, width, c_out, 1 if i == 1 else 2, bottleneck)
            others = [Block(c_out, width, c_out, 1, bottleneck) for _ in range(depth - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *others))
            self.channels[i] = c_in = c_out

    def forward(self, x: Tensor, layers: Sequence[int] = (2, 3)) -> list[Tensor]:
        x, outputs = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1), []
        for i in range(1, max(layers) + 1):
            x = getattr(self, f"layer{i}")(x)
            if i in layers:
                outputs.append(x)
        return outputs


def load_weights(trunk: ResNet, path: str) -> None:
    """Load torchvision's weight file, of any float dtype, into a trunk. No code in the file is ever
    executed. Raises ModelError if it cannot be read or belongs to another architecture."""
    remedy = f"pass torchvision's weight file of {trunk.architecture}"
    try:
        state = read_checkpoint(path)
    except ModelError as error:
        raise ModelError(f"{error}; {remedy}") from None
    state = {k: v for k, v in state.items() if not str(k).startswith(trunk.unused)}
    try:
        trunk.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError):
        raise ModelError(f"{path}: not the weights of {trunk.architecture}; {remedy}") from None


def fold_batch_norms(trunk: nn.Module) -> None:
    """Multiply each batch norm of a trunk in eval mode into the convolution registered before it:
    the same outputs up to rounding, fewer passes over memory."""
    for module in list(trunk.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())


class PatchFeatures(nn.Module):
    """PatchCore's features of some `layers` of a frozen trunk, in eval mode: normalized images
    N×3×H×W -> N×`channels`×h×w, the grid of the first of the layers. They are the target of
    distillation (section 3.1) and, with `channels` and `width` 1536, SimpleNet's features.

    The definition: the zero-padded 3×3 neighbourhood of every position of a layer, flattened
    channel-first (C·9 numbers), is average-pooled adaptively to `width`; each layer is resized
    bilinearly to the first one's grid; all are concatenated and pooled again to `channels`.
    Neighbourhood and poolings are one linear map of the layer's 3×3 windows, so a layer needs a
    single convolution, whose weight is the pooling of an identity matrix. Pooling acts on channels
    and resizing on positions, so their order is free. The second pooling splits evenly between the
    layers. Raises ValueError if `channels` is no multiple of their number, or a layer impossible.
    The poolings follow from the options and are not part of the state."""

    def __init__(self, trunk: nn.Module, channels: int = 384, width: int = 1024, layers=(2, 3)):
        super().__init__()
        if not layers or list(layers) != sorted(set(layers) & trunk.channels.keys()):
            raise ValueError(f"layers must be some of 1, 2, 3 in this order, got {layers}")
        share, rest = divmod(channels, len(layers))
        if rest:
            raise ValueError(f"channels must be a multiple of {len(layers)} layers, got {channels}")
        self.trunk, self.layers = trunk.requires_grad_(False), tuple(layers)
        for i in self.layers:
            c = trunk.channels[i]
            pooling = F.adaptive_avg_pool1d(torch.eye(c * 9), width)
            pooling = F.adaptive_avg_pool1d(pooling, share).T.reshape(share, c, 3, 3)
            self.register_buffer(f"pooling{i}", pooling.contiguous(), persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> "PatchFeatures":
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        features = []
        for i, y in zip(self.layers, self.trunk(x, self.layers)):
            y = F.conv2d(y, getattr(self, f"pooling{i}"), padding=1)
            y = F.interpolate(y, features[0].shape[-2:], mode="bilinear") if features else y
            features.append(y)
        return torch.cat(features, 1)
