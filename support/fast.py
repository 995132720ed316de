"""The fast form of a trained EfficientAD."""

import time
import warnings
from collections.abc import Sequence
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad import EfficientAD, ModelError, use_kernels
from kernels import combined_map
from support import fast_gpu, int8, tiling
from support.graphs import BatchGraphs, beside, cudnn_tunes, side_stream
from support.tiling import TiledEfficientAD

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAPS = "combined", "local", "global"
PRECISIONS = ["auto", *DTYPES, "int8"]


def optimize(model: EfficientAD, precision: str = "auto", batch_sizes=(1,)) -> "FastEfficientAD":
    """The fast form of a model, on the same device, for inference alone. `precision`: see
    `choose_precision`; "int8" becomes "auto", with a warning, where it cannot run. `batch_sizes`:
    each gets a CUDA graph; others run too. Raises ValueError for another precision, ModelError if a
    weight overflows it."""
    if precision == "int8" and (reason := int8.problem(model)):
        precision = choose_precision("auto", model.threshold.device)
        warnings.warn(f"{reason}; {precision} instead")
    return FastEfficientAD(model, precision, batch_sizes)


def choose_precision(precision: str, device: torch.device) -> str:
    """ "fp32", "bf16", "fp16" or "int8" as it is; "auto" is fp16 on a GPU, bf16 on a CPU with
    instructions for it, else fp32. fp16 is as fast as bf16 on a GPU and rounds eight times finer;
    nothing in the networks comes near its limit of 65,504. Raises ValueError for another one."""
    if precision == "auto":
        on_cpu = "bf16" if has_bf16(device) else "fp32"
        return "fp16" if device.type == "cuda" else on_cpu
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 by itself; CPUs with AMX have AVX512-BF16 too."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


class FastEfficientAD(TiledEfficientAD):
    """What `optimize` makes: uint8 N×3×H×W, on any device -> the model's map and score up to
    rounding. It takes no float images (TypeError) and can neither be trained nor saved. With int8
    teacher and student are in int8, the autoencoder's large convolutions too if it is in bf16.

    Weights are in half precision, channels last. Scaling to ImageNet's statistics lies in the first
    convolutions; the mean colour is still subtracted from the image, because zero padding has to
    mean it. The teacher's mean and standard deviation lie in its last convolution. On a GPU a batch
    of one of `batch_sizes` is one CUDA graph launch, the autoencoder runs beside the others, and
    `choice` says which layers kernels compute, see fast_gpu.py. On a CPU oneDNN applies ReLU within
    the convolutions, and the images of a batch go one by one: 16 at once took 10 to 14 % longer
    (AMD EPYC, M and S).
    """

    @torch.no_grad()
    def __init__(self, model: EfficientAD, precision: str, batch_sizes: Sequence[int]):
        super().__init__(**model.config)
        device = model.threshold.device
        self.precision = choose_precision(precision, device)
        small = self.precision == "int8"
        half = "bf16" if has_bf16(device) else "fp32"  # of what is not in int8
        self.dtype = DTYPES.get(self.precision, DTYPES[half])
        self.training_info = model.training_info
        self.load_state_dict(model.state_dict())
        self.to(device).eval().requires_grad_(False)
        self.pair, self.choice, self.side = None, "", side_stream(device)
        self.paired = fast_gpu.serves(device, self.dtype)
        self.fold()
        if not all(bool(p.isfinite().all()) for p in self.parameters()):
            raise ModelError(f"a weight is beyond {self.precision}: choose another precision")
        if self.paired:
            fast_gpu.join_relu(self.autoencoder)
            self.pair = fast_gpu.Pair(self.teacher, self.student)
            began = time.time()
            with BatchGraphs.turn, cudnn_tunes(), torch.cuda.device_of(self.threshold):
                if device.type == "cuda":  # other models' work on the same streams is over
                    torch.cuda.synchronize()
                choices = [self.choose(n) for n in batch_sizes or (1,)]
            self.choice = "; ".join([*choices, f"chosen in {time.time() - began:.1f} s"])
        elif device.type == "cpu":
            if small:  # before ReLUs are fused: it looks for convolutions
                self.quantize(**model.training_info["int8"])
            self.fuse_relu(() if small else (self.teacher, self.student), DTYPES[half])
        if small:
            self.autoencoder = int8.Centred(self.autoencoder, self.mean, self.dtype)
        self.passes = BatchGraphs(self.forward_pass, self.image_size, device, batch_sizes)
        self._apply = self.refuse  # .to(device) and the like

    @cached_property
    def predictions(self) -> BatchGraphs:
        """What `predict` runs."""
        device, batch_sizes = self.threshold.device, list(self.passes.graphs)
        return BatchGraphs(self.all_maps, self.image_size, device, batch_sizes)

    @property
    def rows(self) -> int:
        """How many rows of an image the PDNs see at once."""
        return max(64, tiling.TILE * self.image_size[0] // self.activation)

    def choose(self, n: int) -> str:
        """Choose how the layers are computed for n images, or for as many, or as many rows of one,
        as are computed at once. Returns it in words."""
        height, width = self.image_size
        n = min(n, max(1, tiling.TILE // self.activation))
        images = torch.randint(256, (n, 3, height, width), generator=torch.Generator())
        x = self.normalize(images.to(torch.uint8))
        relu = ""
        if use_kernels(x) and not self.pair.with_kernels:
            fused = fast_gpu.fuse_if_faster(self.autoencoder, partial(self.autoencoder, x))
            relu = f"autoencoder: {fused}; "
        return relu + self.pair.choose(x[:, :, : self.rows])

    def fuse_relu(self, pdns: Sequence[nn.Module], half: torch.dtype) -> None:
        """Let oneDNN apply the ReLUs of autoencoder and `pdns`, where it computes in their type."""
        x = torch.zeros(1, 3, *self.image_size, dtype=self.dtype)
        native = self.dtype in (torch.float32, half) and torch.backends.mkldnn.is_available()
        if native and not use_kernels(x):
            fuse_relu(self.autoencoder, x)
            for network in pdns:
                fuse_relu(network, x[:, :, : self.rows])

    def fold(self) -> None:
        """Multiply the constants of normalization into the weights, and convert these."""
        for i, layer in enumerate(self.autoencoder):
            if isinstance(layer, nn.Dropout):
                self.autoencoder[i] = nn.Identity()
        networks, last = (self.teacher, self.student, self.autoencoder), self.teacher[-1]
        for first in {network[0] for network in networks}:  # teacher and student may share theirs
            first.weight /= 255 * self.std
            if self.paired:
                fast_gpu.four_channels(first)
        self.mean *= 255
        last.weight /= self.teacher_std.view(-1, 1, 1, 1)
        last.bias.sub_(self.teacher_mean.flatten()).div_(self.teacher_std.flatten())
        for network in networks[2:] if self.precision == "int8" else networks:
            network.to(dtype=self.dtype, memory_format=torch.channels_last)

    def quantize(
        self, maxima: dict, quantiles: list | None = None, scores: list = (), threshold=None
    ) -> None:
        """Put int8 networks in the place of teacher and student, and int8 layers into an
        autoencoder in bf16 if its maxima are known; take their calibration."""
        for name in ("teacher", "student"):
            pdn = int8.Int8PDN(getattr(self, name), maxima[name], self.image_size, self.mean)
            setattr(self, name, pdn)
        if "autoencoder" in maxima and self.dtype == torch.bfloat16:
            x = torch.zeros(1, 3, *self.image_size, dtype=self.dtype)
            int8.quantize_autoencoder(self.autoencoder, maxima["autoencoder"], x)
        if quantiles:
            self.quantiles.copy_(torch.tensor(quantiles))
            self.threshold.fill_(scores[-1] if threshold is None else threshold)
            self.training_info = {**self.training_info, "scores": scores}

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 N×3×H×W -> what the first convolutions take: minus 255 times the mean colour."""
        if images.dtype != torch.uint8:
            raise TypeError(f"the fast form takes uint8 images (0–255), got {images.dtype}")
        self.check_shape(images)
        images = images.to(self.mean.device)
        if self.paired:
            padded = F.pad(images - self.mean, (0, 0, 0, 0, 0, 1))
            return padded.to(self.dtype, memory_format=torch.channels_last)
        if self.precision == "int8":  # the networks subtract the mean
            return images.contiguous(memory_format=torch.channels_last)
        return (images - self.mean).to(self.dtype, memory_format=torch.channels_last)

    def teacher_features(self, x: Tensor, stem: Tensor | None = None) -> Tensor:
        return self.teacher(x, stem)  # normalized by its last convolution

    def pdn_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().pdn_features(x) if self.pair is None else self.pair(x)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.normalize(images)
        pdns, autoencoder = partial(self.pdn_features, x), partial(self.autoencoder, x)
        (teacher, student), autoencoder = beside(pdns, autoencoder, self.side)
        return teacher, student, autoencoder

    def forward_pass(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> combined map and score; one resize serves both maps."""
        if use_kernels(self.quantiles) and not self.oversized(images):
            raw = combined_map(*self.features(images), self.quantiles)
        else:
            (local_map, global_map), (q_a, q_b) = self.raw_maps(images), self.quantiles.T
            scale = 0.05 / (q_b - q_a)
            raw = local_map * scale[0] + global_map * scale[1] - (q_a * scale).sum()
        m = self.resize(raw)
        return m, m.amax((1, 2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) == 1 or self.threshold.device.type != "cpu":
            return self.passes(images)
        maps, scores = zip(*(self.passes(image) for image in images.split(1)))
        return torch.cat(maps), torch.cat(scores)

    def all_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Each map, then each score."""
        maps, scores = super().predict(images)
        return *maps.values(), *scores.values()

    def predict(self, images: Tensor) -> tuple[dict, dict]:
        """As EfficientAD's."""
        results = self.predictions(images)
        return dict(zip(MAPS, results[:3])), dict(zip(MAPS, results[3:]))

    def refuse(self, *_) -> None:
        raise TypeError("the fast form is for inference, where it was made: use its model instead")

    # graphs, and weights that oneDNN has laid out, can neither be copied nor moved
    losses = calibrate = checkpoint = __deepcopy__ = __reduce_ex__ = refuse


class ConvReLU(nn.Module):
    """A convolution, and the ReLU behind it if `relu`, as one oneDNN call whose weights are laid
    out for it beforehand. `shape` is its input's. It takes 12 % off a bf16 pass (AMD EPYC)."""

    def __init__(self, convolution: nn.Conv2d, shape: torch.Size, relu: bool):
        super().__init__()
        c, self.relu = convolution, "relu" if relu else "none"
        self.bias = c.bias
        self.arguments = (list(c.padding), list(c.stride), list(c.dilation), 1)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = reorder(c.weight.detach(), *self.arguments, list(shape))

    def forward(self, x: Tensor) -> Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self.weight, self.bias, *self.arguments, self.relu, [], "")


def fuse_relu(network: nn.Sequential, x: Tensor) -> None:
    """Replace the convolutions of a network in place; x N×3×H×W as it will come. Layers keep their
    places."""
    for i, layer in enumerate(network):
        shape, x = x.shape, layer(x)
        if isinstance(layer, nn.Conv2d):
            relu = i + 1 < len(network) and isinstance(network[i + 1], nn.ReLU)
            network[i] = ConvReLU(layer, shape, relu)
            if relu:
                network[i + 1] = nn.Identity()
