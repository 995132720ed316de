"""int8 for teacher, student and the autoencoder's large convolutions on a CPU, by oneDNN.

Weights are signed, a scale for each output channel, rounded so that the errors cancel. Activations
are unsigned, a scale for each layer: the largest value that normal images gave, times HEADROOM.
Percentiles of normal images would clip what anomalies excite. A PDN's channels with small values
are made larger, and the weights behind them smaller: ReLU and pool let factors pass. The image
itself is exact. Distances are never quantized.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad import PDN, EfficientAD

HEADROOM = 1.25
EQUALIZATION = 0.25  # the exponent of (a channel's maximum / the layer's), its factor's inverse


class Int8Conv(nn.Module):
    """Convolution with bias, and ReLU: uint8 N×C×H×W -> uint8, or bfloat16 without `out_scale`. A
    number stands for itself times its scale. The only user of torch's private int8 operators."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        scale: float,
        out_scale: float | None,
        relu: bool = False,
        pool: bool = False,
        padding: int = 0,
    ):
        super().__init__()
        self.relu, self.bias = "relu" if relu else "none", bias
        self.dtype = torch.uint8 if out_scale else torch.bfloat16
        self.scale, self.out_scale = scale, out_scale or 1.0
        self.weight_scale = weight.abs().amax((1, 2, 3)).clamp(min=1e-12) / 127
        self.zero = torch.zeros(len(weight), dtype=torch.int64)
        groups = len(weight) if pool else 1
        self.geometry = ([2, 2] if pool else [1, 1], 2 * [padding], [1, 1], groups)
        weight = round_in_turn(weight / self.weight_scale.view(-1, 1, 1, 1)).to(torch.int8)
        prepack = torch.ops.onednn.qconv_prepack
        self.weight = prepack(weight, self.weight_scale, scale, 0, *self.geometry, list(shape))

    def forward(self, x: Tensor) -> Tensor:
        convolve, weight = torch.ops.onednn.qconv2d_pointwise, (self.weight, self.weight_scale)
        inputs = (x, self.scale, 0, *weight, self.zero, self.bias, *self.geometry)
        return convolve(*inputs, self.out_scale, 0, self.dtype, self.relu, [], "")


def round_in_turn(weight: Tensor) -> Tensor:
    """Round O×C×h×w to −127 … 127, each tap with the error that the tap before it left: pixels
    resemble their neighbours, so that the errors of a kernel's taps cancel."""
    rounded, error = torch.empty_like(weight), 0.0
    for y in range(weight.shape[2]):
        for x in range(weight.shape[3])[:: -1 if y % 2 else 1]:  # there and back
            wanted = weight[:, :, y, x] + error
            rounded[:, :, y, x] = wanted.round().clamp(-127, 127)
            error = wanted - rounded[:, :, y, x]
    return rounded


class Int8PDN(nn.Module):
    """A PDN without padding in int8: uint8 images N×3×H×W -> bfloat16 N×C×h×w, with the interface
    of PDN. `maxima`: of each layer's output. `mean`: what its first convolution expects to be
    subtracted from the images, 1×3×1×1."""

    def __init__(
        self, pdn: PDN, maxima: list[list[float]], image_size: tuple[int, int], mean: Tensor
    ):
        super().__init__()
        layers, scale, x = [], 1.0, torch.zeros(1, 3, *image_size, dtype=torch.uint8)
        before = torch.ones(3)  # what each channel of x is to be multiplied by
        for i, layer in enumerate(pdn):
            convolution, last = isinstance(layer, nn.Conv2d), i + 1 == len(pdn)
            if convolution:
                weight, bias = layer.weight * before.view(1, -1, 1, 1), layer.bias
                bias = bias - (weight * mean).sum((1, 2, 3)) if i == 0 else bias
            elif isinstance(layer, nn.AvgPool2d):  # of 4 pixels: a convolution, each channel alone
                weight, bias = before.view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 4, None
            else:
                continue  # ReLU is done with the convolution before it
            if last:
                layers.append(Int8Conv(weight, bias, x.shape, scale, None))
                break
            highest = torch.tensor(maxima[i + convolution])  # behind the ReLU
            before = (highest / highest.max()).clamp(min=1e-4) ** EQUALIZATION
            weight = weight / before.view(-1, 1, 1, 1)
            bias = None if bias is None else bias / before
            out_scale = HEADROOM * (highest / before).max().item() / 255
            layers.append(
                Int8Conv(weight, bias, x.shape, scale, out_scale, convolution, bias is None)
            )
            x, scale = layers[-1](x), out_scale
        self.layers = nn.ModuleList(layers)

    def stem(self, x: Tensor) -> Tensor:
        """The first two convolutions, each with its pool."""
        for layer in self.layers[:4]:
            x = layer(x)
        return x

    def forward(self, x: Tensor, stem: Tensor | None = None) -> Tensor:
        x = self.stem(x) if stem is None else stem
        for layer in self.layers[4:]:
            x = layer(x)
        return x


class ToInt8(nn.Module):
    """Resize N×C×h×w in bfloat16 and round to uint8. Values above 255 become 255."""

    def __init__(self, upsample: nn.Upsample):
        super().__init__()
        self.size = upsample.size

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(max=255).to(torch.bfloat16)
        return F.interpolate(x, self.size, mode="bilinear").round_().to(torch.uint8)


def quantize_autoencoder(network: nn.Sequential, maxima: list[list[float]], x: Tensor) -> None:
    """Put int8 convolutions in the place of the last four of an autoencoder in bfloat16: nine
    tenths of its arithmetic. `maxima`: of each layer's output. x: its input as it will come."""
    first = [i for i, layer in enumerate(network) if isinstance(layer, nn.Conv2d)][-5]
    scale = HEADROOM * max(*maxima[first + 1], 1e-6) / 255  # of a ReLU's output
    network[first].weight /= scale  # ReLU and resizing let the factor pass
    network[first].bias /= scale
    for layer in list(network)[: first + 2]:
        x = layer(x)
    for i in range(first + 2, len(network)):
        layer, last = network[i], i + 1 == len(network)
        if isinstance(layer, nn.Conv2d):
            weight, bias, padding = layer.weight.float(), layer.bias.float(), layer.padding[0]
            out_scale = None if last else HEADROOM * max(*maxima[i + 1], 1e-6) / 255
            inputs = weight, bias, x.shape, scale, out_scale
            network[i], scale = Int8Conv(*inputs, not last, padding=padding), out_scale
        elif isinstance(layer, nn.Upsample):
            network[i] = ToInt8(layer)
        else:  # ReLU is done with the convolution before it
            network[i] = nn.Identity()
        x = network[i](x)


class Centred(nn.Sequential):
    """A network for uint8 images minus their mean, in `dtype`."""

    def __init__(self, network: nn.Sequential, mean: Tensor, dtype: torch.dtype):
        super().__init__(*network)
        self.mean, self.dtype = mean, dtype

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean).to(self.dtype, memory_format=torch.channels_last))


@torch.no_grad()
def measure_maxima(model: EfficientAD, batches: Iterable[Tensor]) -> dict[str, list[list]]:
    """The largest output in each channel of each layer of the networks over normal images
    N×3×H×W."""
    found = {"teacher": [], "student": [], "autoencoder": []}
    for batch in batches:
        images = model.normalize(batch)
        for name, maxima in found.items():
            x = images
            for i, layer in enumerate(getattr(model, name)):
                x = layer(x)
                highest = x.amax((0, 2, 3))
                maxima[i : i + 1] = [torch.stack([*maxima[i : i + 1], highest]).amax(0)]
    return {name: [m.tolist() for m in maxima] for name, maxima in found.items()}


def problem(model: EfficientAD) -> str | None:
    """Why a model cannot run in int8 here, in words."""
    if model.threshold.device.type != "cpu" or not torch.cpu._is_vnni_supported():
        return "int8 needs a CPU with VNNI instructions"
    if model.padding:
        return "int8 is for models without padding"
    if "int8" not in model.training_info:
        return (
            "the model has no ranges for int8: recalibrate it with evaluate.py --accept, but with "
            "Gaussian normalization or for very large images there are none"
        )
    try:
        weight, bias = torch.eye(16).view(16, 16, 1, 1), torch.zeros(16)
        x = torch.arange(16, dtype=torch.uint8).view(1, 16, 1, 1)
        right = torch.equal(Int8Conv(weight, bias, x.shape, 1.0, 1.0, True)(x), x)
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"torch has no int8 convolution of the expected kind ({error})"
    return None if right else "torch's int8 convolution computes something else here"
