"""Teacher and student of the fast form on a GPU: a layer of both is one launch of a Triton kernel,
or two of cuDNN's side by side, whichever is faster there."""

import math
import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from efficientad import PDN, use_kernels
from kernels.runtime import has_tma, launches
from support.graphs import beside, graph_milliseconds, side_stream


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fast form is of this kind: in half precision on a GPU."""
    return device.type == "cuda" and dtype != torch.float32


def four_channels(convolution: nn.Conv2d) -> None:
    """Give a first convolution a fourth input channel that counts nothing: a pixel is 8 bytes."""
    weight = F.pad(convolution.weight.detach(), (0, 0, 0, 0, 0, 1))
    convolution.weight = nn.Parameter(weight, requires_grad=False)


class Convolution(nn.Module):
    """A convolution and, if `relu`, the ReLU behind it: as one call of cuDNN if `fused`. None: not
    decided; the next call tries it."""

    def __init__(self, convolution: nn.Conv2d, relu: bool):
        super().__init__()
        self.convolution, self.relu, self.fused = convolution, relu, False
        c = convolution
        self.arguments = c.stride, c.padding, c.dilation, c.groups

    def forward(self, x: Tensor) -> Tensor:
        c = self.convolution
        if self.fused is None:
            self.fused = self.relu and self.fuses(x)
        if self.fused:
            try:
                return torch.cudnn_convolution_relu(x, c.weight, c.bias, *self.arguments)
            except RuntimeError:  # not for this many images
                self.fused = False
        y = c(x)
        return y.relu() if self.relu else y

    def fuses(self, x: Tensor) -> bool:
        """Whether cuDNN computes both in one call, and rightly. It is said to add 0 times whatever
        lies in the output's memory: NaN must not come through."""
        c, expected = self.convolution, self.convolution(x).relu()
        stale = torch.full_like(expected, math.nan)
        try:
            y = torch.cudnn_convolution_relu(x, c.weight, c.bias, *self.arguments)
            z = torch.cudnn_convolution_add_relu(x, c.weight, stale, 0.0, c.bias, *self.arguments)
            return relative_error((y, z), (expected, expected)) < 0.01
        except RuntimeError:  # this cuDNN cannot, or memory is short
            return False


def join_relu(network: nn.Sequential) -> None:
    """Replace each convolution that a ReLU follows, in place. Layers keep their places."""
    for i, layer in enumerate(list(network)[:-1]):
        if isinstance(layer, nn.Conv2d) and isinstance(network[i + 1], nn.ReLU):
            network[i], network[i + 1] = Convolution(layer, True), nn.Identity()


def relative_error(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest RMS difference over the RMS of what is expected; NaN is infinitely wrong."""
    errors = []
    for y, e in zip(outputs, expected):  # one at a time: they may be large
        error = (y.float() - e.float()).norm() / e.float().norm()
        errors.append(error.nan_to_num(math.inf).item())
    return max(errors)


def fuse_if_faster(
    network: nn.Module, call: Callable, milliseconds: Callable = graph_milliseconds
) -> str:
    """Let cuDNN apply ReLU within the network's convolutions where it can, if `call()`, a pass of
    the network, is faster so. Returns what came of it, in words."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, Convolution)]
    before = milliseconds(call)
    for layer in convolutions:
        layer.fused = None
    call()  # each convolution decides
    can, after = sum(bool(layer.fused) for layer in convolutions), milliseconds(call)
    if not after < before:
        for layer in convolutions:
            layer.fused = False
    return f"cuDNN can fuse {can} ReLUs: {before:.3f} -> {after:.3f} ms"


Features = tuple[Tensor | None, tuple[Tensor, ...]]  # one tensor; the teacher's and the student's


class Layer(nn.Module):
    """A convolution of teacher and student, with ReLU and pool if they follow. A kernel computes
    both in one tensor; the parts are slices of it. cuDNN computes each by itself, side by side."""

    def __init__(
        self, teacher: nn.Conv2d, student: nn.Conv2d, after: list[nn.Module], common: bool
    ):
        super().__init__()
        self.relu = any(isinstance(layer, nn.ReLU) for layer in after)
        own = [teacher] if teacher is student else [teacher, student]
        self.own = nn.ModuleList(Convolution(c, self.relu) for c in own)
        self.pool = next((layer for layer in after if isinstance(layer, nn.AvgPool2d)), None)
        self.common = common  # both read one tensor
        self.padding = teacher.padding[0]
        self.kernel = self.find_kernel(teacher, student)
        if self.kernel:  # the weights of both in one; cuDNN's are slices of them
            weight, self.bias = torch.cat([c.weight for c in own]), torch.cat([c.bias for c in own])
            self.weight = weight = weight.contiguous(memory_format=torch.channels_last)
            self.outputs = [len(c.weight) for c in own]
            self.split = 0 if common else self.outputs[0]
            for c, w in zip(own, weight.split(self.outputs)):
                c.weight = nn.Parameter(w, requires_grad=False)

    def find_kernel(self, teacher: nn.Conv2d, student: nn.Conv2d) -> Callable | None:
        """The kernel that can compute the layer here, if there is one."""
        c = teacher.weight.shape[1]
        if student.weight.shape[1] != c:
            return None
        rows = has_tma(teacher.weight.device) and not self.padding and c % 64 == 0
        if self.pool is None:
            return self.rows if rows else None
        return self.rows_pool if rows else self.relu_pool

    def rows(self, x: Tensor) -> Tensor:
        return kernels.conv_rows(x, self.weight, self.bias, self.split, self.relu)

    def rows_pool(self, x: Tensor) -> Tensor:
        return kernels.conv_rows_pool(x, self.weight, self.bias, self.split)

    def relu_pool(self, x: Tensor) -> Tensor:
        paddings = self.padding, self.pool.padding
        return kernels.conv_relu_pool(x, self.weight, self.bias, *paddings, self.split)

    def forward(self, features: Features, with_kernel: bool) -> Features:
        whole, parts = features
        if with_kernel:
            whole = self.kernel(torch.cat(parts, 1) if whole is None else whole)
            return whole, whole.split(self.outputs, 1)
        inputs = parts * len(self.own) if self.common else parts
        calls = [partial(self.by_cudnn, x, c) for x, c in zip(inputs, self.own)]
        if len(calls) == 1:
            output = calls[0]()
            return output, (output,)
        return None, beside(*calls, side_stream(parts[0].device, "student"))

    def kernel_is_right(self, features: Features) -> bool:
        """Whether the kernel computes here what cuDNN does, up to rounding. A compiler may fail."""
        try:
            error = relative_error(self(features, True)[1], self(features, False)[1])
            reason = f"is off by {error:.2g}"
        except Exception as failure:  # of Triton or the driver
            error, reason = math.inf, f"{type(failure).__name__}: {failure}".splitlines()[0]
        if not error < 0.01:
            warnings.warn(f"cuDNN instead of kernel {self.kernel.__name__}: it {reason}")
        return error < 0.01

    def by_cudnn(self, x: Tensor, convolution: Convolution) -> Tensor:
        y = convolution(x)
        return y if self.pool is None else self.pool(y)


class Pair(nn.Module):
    """Teacher and student: normalized images N×4×H×W in half precision -> their outputs N×384×h×w
    and N×768×h×w. `with_kernels`: of each layer, whether its kernel computes it, by the number of
    images; for another number as for the first."""

    def __init__(self, teacher: PDN, student: PDN):
        super().__init__()
        places = [i for i, layer in enumerate(teacher) if isinstance(layer, nn.Conv2d)]
        self.layers, common = nn.ModuleList(), True
        for i, following in zip(places, [*places[1:], len(teacher)]):
            own, after = (teacher[i], student[i]), list(teacher)[i + 1 : following]
            self.layers.append(Layer(*own, after, common))
            common = common and own[0] is own[1]
        self.with_kernels: dict[int, list[bool]] = {}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, first = (x, (x,)), next(iter(self.with_kernels.values()))
        for layer, chosen in zip(self.layers, self.with_kernels.get(len(x), first)):
            features = layer(features, chosen)
        return features[1]

    def choose(self, x: Tensor, milliseconds: Callable = graph_milliseconds) -> str:
        """Choose for each layer what is faster for as many images as x has, and check that the
        mixture beats all kernels and no kernel. Returns what was chosen, in words.

        EFFICIENTAD_KERNELS=1 takes every kernel and 0 none, without measuring."""
        n, none = len(x), [False] * len(self.layers)
        if not use_kernels(x):
            self.with_kernels[n] = none
            return "no kernels"
        can = not x.is_cuda or launches(x.device)
        there = [can and layer.kernel is not None for layer in self.layers]
        if os.environ.get("EFFICIENTAD_KERNELS") == "1":
            self.with_kernels[n] = there
            return "every kernel, by EFFICIENTAD_KERNELS=1"
        relu = ""
        if not self.with_kernels:
            self.with_kernels[n] = none
            relu = f"; {fuse_if_faster(self, partial(self, x), milliseconds)}"
        mixture, features = [], (x, (x,))
        for i, layer in enumerate(self.layers):
            times = {}
            there[i] = there[i] and layer.kernel_is_right(features)
            for with_kernel in (False, True) if there[i] else (False,):
                times[with_kernel] = milliseconds(partial(layer, features, with_kernel))
            mixture.append(min(times, key=times.get))
            features = layer(features, mixture[-1])
        candidates, totals = [none, mixture, there], []
        for candidate in candidates:
            self.with_kernels[n] = candidate
            totals.append(milliseconds(partial(self, x)))
        self.with_kernels[n] = candidates[totals.index(min(totals))]
        names = ["kernel" if chosen else "cuDNN" for chosen in self.with_kernels[n]]
        times = f"{min(totals):.3f} ms, cuDNN alone {totals[0]:.3f}"
        return f"batch {n}: {', '.join(names)}: {times}{relu}"
