"""The fast form of a trained model (`EfficientAD.optimize`), and CUDA graphs: for it, for SimpleNet's and for the training step."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from efficientad import EfficientAD, ModelError, cpu_has_bf16, use_kernels


class FastEfficientAD(EfficientAD):
    """What `EfficientAD.optimize` makes: uint8 N×3×H×W, on any device -> the model's map and score up to rounding. It takes no
    float images (TypeError) and can neither be trained nor saved.

    The networks have half-precision weights, channels last. Scaling to ImageNet's statistics lies in their first convolutions; the
    mean colour is still subtracted from the image, as it turns from uint8 to float, because zero padding has to mean it. The
    teacher's mean and standard deviation lie in its last convolution. On a GPU a batch of one of `batch_sizes` is one CUDA graph
    launch behind an asynchronous copy of the images; on a CPU oneDNN applies ReLU within the convolutions, and the images of a
    batch go one by one: 16 at once took 10 to 14 % longer (AMD EPYC, M and S)."""

    def __init__(self, model: EfficientAD, precision: str, batch_sizes: tuple[int, ...]):
        super().__init__(**model.config)
        device = model.threshold.device
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if precision == "auto":
            precision = "fp16" if device.type == "cuda" else "bf16" if cpu_has_bf16(device) else "fp32"
        if precision not in dtypes:
            raise ValueError(f"precision must be auto, fp32, bf16 or fp16, got {precision!r}")
        self.precision, self.dtype, self.training_info = precision, dtypes[precision], model.training_info
        self.load_state_dict(model.state_dict())
        self.to(device).eval().requires_grad_(False)

        for i, layer in enumerate(self.autoencoder):
            if isinstance(layer, nn.Dropout):
                self.autoencoder[i] = nn.Identity()
        networks, last = (self.teacher, self.student, self.autoencoder), self.teacher[-1]
        for network in networks:
            network[0].weight /= 255 * self.std
        self.mean *= 255
        last.weight /= self.teacher_std.view(-1, 1, 1, 1)
        last.bias.sub_(self.teacher_mean.flatten()).div_(self.teacher_std.flatten())
        for network in networks:
            network.to(dtype=self.dtype, memory_format=torch.channels_last)
        if not all(bool(p.isfinite().all()) for p in self.parameters()):
            raise ModelError(f"a weight of this model is beyond {precision}: choose another precision")
        x = torch.zeros(1, 3, *self.image_size, dtype=self.dtype, device=device)
        fusible = device.type == "cpu" and torch.backends.mkldnn.is_available() and not use_kernels(x)
        if fusible and (precision == "fp32" or precision == "bf16" and cpu_has_bf16(device)):
            for network in networks:
                fuse_relu(network, x)

        self.passes = BatchGraphs(super().forward, self.image_size, device, batch_sizes)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 N×3×H×W -> what the first convolutions take: minus 255 times the mean colour, in half precision."""
        self.check_shape(images)
        if images.dtype != torch.uint8:
            raise TypeError(f"the fast form takes uint8 images (0–255), got {images.dtype}")
        images = images.to(self.mean.device, non_blocking=True)
        return (images - self.mean).to(self.dtype, memory_format=torch.channels_last)

    def teacher_features(self, x: Tensor) -> Tensor:
        return self.teacher(x)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) == 1 or self.threshold.device.type != "cpu":
            return self.passes(images)
        passes = [self.passes(image) for image in images.split(1)]
        return torch.cat([m for m, _ in passes]), torch.cat([score for _, score in passes])

    def save(self, *_):
        raise TypeError("the fast form is for inference: train, calibrate and save the model that it was made from")

    losses = fit_teacher_statistics = calibrate = load_teacher = optimize = save


class Graphed:
    """A function of no arguments as one CUDA graph; the tensors that it reads and writes must stay where they are. The first calls
    are ordinary ones on a side stream, as torch wants before a capture; from then on a call launches all kernels at once and its
    result lies in the same tensors each time. On another device every call is ordinary."""

    WARM_UP = 3

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.device, self.calls, self.graph, self.result = function, device, 0, None, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self):
        if self.stream is None:
            return self.function()
        with torch.cuda.device(self.device):
            self.calls += 1
            if self.calls <= self.WARM_UP:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    result = self.function()
                torch.cuda.current_stream().wait_stream(self.stream)
                return result
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):  # records, computes nothing
                    self.result = self.function()
            self.graph.replay()
            return self.result


class BatchGraphs:
    """A model's forward pass, uint8 N×3×H×W on any device -> (map, score). On a GPU a batch of one of `batch_sizes` is one graph
    launch behind an asynchronous copy of the images; everything else goes to `forward` as it is."""

    def __init__(self, forward: Callable, image_size: tuple[int, int], device: torch.device, batch_sizes: tuple[int, ...]):
        self.forward, self.graphs = forward, {}  # by batch size: the images' buffer, and the graph that reads it
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # choose the best algorithms once
        for n in batch_sizes if device.type == "cuda" else ():
            buffer = torch.zeros(n, 3, *image_size, dtype=torch.uint8, device=device)
            self.graphs[n] = buffer, Graphed(partial(forward, buffer), device)
            for _ in range(Graphed.WARM_UP + 1):
                self.graphs[n][1]()
        torch.backends.cudnn.benchmark = benchmark

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        buffer, graph = self.graphs.get(len(images), (None, None))
        if graph is None or images.dtype != buffer.dtype or images.shape != buffer.shape:
            return self.forward(images)
        buffer.copy_(images if images.is_cuda else images.contiguous().pin_memory(), non_blocking=True)
        m, score = graph()
        return m.clone(), score.clone()  # the next call overwrites the graph's own


class ConvReLU(nn.Module):
    """A convolution, and the ReLU behind it if `relu`, as one oneDNN call whose weights are laid out for it beforehand. `shape`
    is its input's. 12 % off a bf16 pass on an AMD EPYC with AVX512-BF16, of which ReLU is the most."""

    def __init__(self, convolution: nn.Conv2d, shape: torch.Size, relu: bool):
        super().__init__()
        c, self.relu = convolution, "relu" if relu else "none"
        self.padding, self.bias, self.arguments = c.padding, c.bias, (list(c.padding), list(c.stride), list(c.dilation), 1)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(c.weight.detach(), *self.arguments, list(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.arguments, self.relu, [], "")


def fuse_relu(network: nn.Sequential, x: Tensor) -> None:
    """Replace the convolutions of a network in place; x N×3×H×W as it will come. Layers keep their places."""
    for i, layer in enumerate(network):
        shape, x = x.shape, layer(x)
        if isinstance(layer, nn.Conv2d):
            relu = i + 1 < len(network) and isinstance(network[i + 1], nn.ReLU)
            network[i] = ConvReLU(layer, shape, relu)
            if relu:
                network[i + 1] = nn.Identity()
