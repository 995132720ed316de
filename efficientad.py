"""EfficientAD: accurate visual anomaly detection at millisecond-level latencies (Batzner, Heckler, König, arXiv 2303.14535).

The whole model in one file that needs torch alone: copy it into your project. Read it from top to bottom: networks, losses,
then `EfficientAD`, which holds everything needed to score an image.

    model = EfficientAD(size="small", image_size=(256, 256))
    model.load_teacher("weights/teacher_small.pt")               # section 3.1; distill.py makes one
    model.fit_teacher_statistics(batches)                        # batches: uint8 or float N×3×256×256, normal images
    losses = model.losses(images, augmented, pretraining)        # sections 3.2 and 3.3; train.py has the loop
    sum(losses.values()).backward()
    model.calibrate(validation_batches)                          # section 3.4; normal images held out of training
    map, score = model.eval()(images)                            # N×1×256×256 and N; anomalous where score > model.threshold
    model.save("model.pt"); model = EfficientAD.load("model.pt")
    fast = model.optimize()                                      # the same from uint8 images, sooner; needs fast.py too
"""

import io
import math
import os
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:  # Triton kernels beside this file; optional
    from kernels import combined_map, conv_relu_pool, distance_map, runs_on
    from kernels import hard_feature_loss as hard_feature_loss_kernel
    from kernels import quantile as quantile_kernel
except Exception:  # not there, or a foreign package of that name: whatever it raises, plain torch does the same

    def runs_on(*tensors):
        return False


CHANNELS = 384  # C, the teacher's output channels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TILE = 2**28  # elements of a PDN's first activation that inference computes at once: 1 GiB in float32, all of 32 images of 256² (S)
KERNELS = os.environ.get("EFFICIENTAD_KERNELS") != "0"


class ModelError(ValueError):
    """A checkpoint or teacher is missing, damaged, foreign or unusable; the message names it and the remedy."""


def pick_device(name: str | None = None) -> torch.device:
    """The device of this name; by default the GPU if there is one, else the CPU. Raises ModelError if torch cannot use it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"--device {name}: torch cannot use it on this machine; try --device cpu") from None
    return device


def use_kernels(*tensors: Tensor) -> bool:
    """The one rule: kernels run where they are there and wanted (EFFICIENTAD_KERNELS is not 0), on GPU tensors that need no
    gradient, unless a graph is being exported. Their results differ from plain torch's by rounding alone."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return KERNELS and runs_on(*tensors) and not exporting and not gradient and all(t.dtype != torch.float64 for t in tensors)


def cpu_has_bf16(device: torch.device) -> bool:
    """Whether this is a CPU with bf16 instructions; those with AMX have AVX512-BF16 too."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


# ---------------------------------------------------------------------------------------------------------------- networks


class PDN(nn.Sequential):
    """Patch description network (section 3.1, figure 2), for teacher and student. Normalized images N×3×H×W float ->
    N×`channels`×h×w: every output vector describes a 33×33 patch, one each 4 pixels. h = H/4 with zero padding, and H/4 − 8
    without, for H a multiple of 4. `size` is "small" or "medium" (EfficientAD-M); raises ValueError otherwise."""

    def __init__(self, size: str = "small", channels: int = CHANNELS, padding: bool = False):
        if size not in ("small", "medium"):
            raise ValueError(f"size must be 'small' or 'medium', got {size!r}")
        p, width = int(padding), 128 if size == "small" else 256
        layers = [
            nn.Conv2d(3, width, 4, padding=3 * p),
            nn.ReLU(),
            nn.AvgPool2d(2, 2, padding=p),  # padding counts in the mean, as published
            nn.Conv2d(width, 2 * width, 4, padding=3 * p),
            nn.ReLU(),
            nn.AvgPool2d(2, 2, padding=p),
        ]
        if size == "medium":
            layers += [nn.Conv2d(2 * width, 2 * width, 1), nn.ReLU()]
        layers += [nn.Conv2d(2 * width, 2 * width, 3, padding=p), nn.ReLU(), nn.Conv2d(2 * width, channels, 4)]
        if size == "medium":
            layers += [nn.ReLU(), nn.Conv2d(channels, channels, 1)]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self[-1](self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """The input of the last layer."""
        layers = list(self)[:-1]
        for convolution, relu, pool in (layers[:3], layers[3:6]):
            device, weight, bias = x.device.type, convolution.weight, convolution.bias
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            if dtype != torch.float32 and use_kernels(x, weight, bias):  # in float32 torch's convolution is the faster one
                x = conv_relu_pool(x.to(dtype), weight.to(dtype), bias, convolution.padding[0], pool.padding)
            else:
                x = pool(relu(convolution(x)))
        for layer in layers[6:]:
            x = layer(x)
        return x


class Autoencoder(nn.Sequential):
    """Autoencoder (section 3.3). Normalized images N×3×H×W float -> N×`CHANNELS`×h×w, with (h, w) = `output_size`, the PDN's.
    The bottleneck is 1×1×64 for any image size that is a multiple of 32 and at least 128: the last encoder kernel and the
    decoder's sizes scale with the image; 256×256 is the paper's. Raises ValueError for another image size."""

    def __init__(self, image_size: tuple[int, int] = (256, 256), output_size: tuple[int, int] = (56, 56)):
        check_image_size(image_size)
        layers, c = [], 3
        for width in (32, 32, 64, 64, 64):
            layers += [nn.Conv2d(c, width, 4, stride=2, padding=1), nn.ReLU()]
            c = width
        layers.append(nn.Conv2d(64, 64, tuple(s // 32 for s in image_size)))  # no ReLU: N×64×1×1
        for divisor, less in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1)):  # at 256²: 3, 8, 15, 32, 63, 127
            target = tuple(s // divisor - less for s in image_size)
            layers += [nn.Upsample(target, mode="bilinear"), nn.Conv2d(64, 64, 4, padding=2), nn.ReLU(), nn.Dropout(0.2)]
        layers += [nn.Upsample(output_size, mode="bilinear"), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
        layers.append(nn.Conv2d(64, CHANNELS, 3, padding=1))
        super().__init__(*layers)


def check_image_size(image_size: tuple[int, int]) -> None:
    """Raise ValueError unless height and width are multiples of 32 and at least 128."""
    if any(s < 128 or s % 32 for s in image_size):
        raise ValueError(f"image height and width must be multiples of 32 and at least 128, got {image_size}")


# -------------------------------------------------------------------------------------------------------------- statistics


def quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of all elements of `x` (float, any shape and number of elements), as a scalar; exact, with linear
    interpolation between neighbours. It is `torch.quantile` without that function's limit of 2²⁴ elements and with the
    position q·(n−1) in float64. NaN if any element is. Raises ValueError for q outside [0, 1] and for an empty x."""
    x, n = x.detach().flatten(), x.numel()
    if not 0 <= q <= 1 or n == 0:
        raise ValueError(f"quantile needs 0 <= q <= 1 and at least one element, got q = {q} of {n} elements")
    if x.dtype == torch.float32 and use_kernels(x):
        return quantile_kernel(x, q)
    position = q * (n - 1)
    low = math.floor(position)
    value = x.kthvalue(low + 1).values
    if position > low:
        value = torch.lerp(value, x.kthvalue(low + 2).values, position - low)
    return torch.where(x.isnan().any(), math.nan, value)  # kthvalue sorts NaN last


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element of any tensor is infinite or NaN; waits for the GPU once."""
    return bool(torch.stack([t.detach().isfinite().all() for t in tensors]).all())


def false_alarms(n: int) -> tuple[float, float]:
    """What a threshold at the highest score of n normal images means for further ones of the same kind: (the expected share of
    false alarms, a bound that this share keeps with 95 % confidence). The share is Beta(1, n)-distributed whatever the scores'
    distribution is: mean 1/(n + 1), and it exceeds x with probability (1 − x)ⁿ."""
    return 1 / (n + 1), 1 - 0.05 ** (1 / n)


def channel_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation per channel over batches N×C×h×w -> two float32 1×C×1×1. One pass: per-batch
    moments in float64, merged with Chan's update, so that nothing cancels. Raises ValueError if there is no batch."""
    count, mean, squares = 0, None, None
    for batch in batches:
        batch = batch.double()
        n = batch.numel() // batch.shape[1]
        m = batch.mean((0, 2, 3), keepdim=True)
        s = (batch - m).square().sum((0, 2, 3), keepdim=True)
        if mean is None:
            count, mean, squares = n, m, s
            continue
        delta, total = m - mean, count + n
        mean = mean + delta * (n / total)
        squares = squares + s + delta.square() * (count * n / total)
        count = total
    if mean is None:
        raise ValueError("channel statistics need at least one batch")
    return mean.float(), (squares / count).sqrt().float()


# ------------------------------------------------------------------------------------------------------------------ losses
# All take features N×C×h×w (any float dtype) and give a float32 scalar.


def hard_feature_loss(teacher: Tensor, student: Tensor, p_hard: float = 0.999) -> Tensor:
    """L_hard (section 3.2): mean of the squared differences that are at least as large as their p_hard-quantile, taken over
    all elements of the batch. p_hard = 0 is the plain student–teacher loss. No gradient flows through the quantile."""
    if not teacher.requires_grad and use_kernels(teacher, student.detach()):  # the kernel has its own gradient for the student
        return hard_feature_loss_kernel(teacher, student, p_hard)
    d = (teacher.float() - student.float()).square()
    hard = d >= quantile(d, p_hard)
    return (d * hard).sum() / hard.sum()


def pretraining_penalty(student: Tensor) -> Tensor:
    """Mean of S(P)² for a pretraining image P (section 3.2): the student shall not imitate the teacher on other images."""
    return student.float().square().mean()


def autoencoder_loss(teacher: Tensor, autoencoder: Tensor) -> Tensor:
    """L_AE (section 3.3): mean squared difference between teacher and autoencoder."""
    return F.mse_loss(autoencoder.float(), teacher.float())


def student_autoencoder_loss(autoencoder: Tensor, student: Tensor) -> Tensor:
    """L_STAE (section 3.3): mean squared difference between autoencoder and the student's second half S'. The gradient reaches
    both."""
    return F.mse_loss(student.float(), autoencoder.float())


# ------------------------------------------------------------------------------------------------------------------- model


class EfficientAD(nn.Module):
    """Teacher, student and autoencoder with all that is needed to score an image; figure 5 of the paper.

    `size`: "small" (S) or "medium" (M). `image_size`: (H, W), multiples of 32 from 128. `padding`: zero padding inside teacher
    and student; the published models have none, and their maps are padded by 4 positions of 4 pixels before they are resized.
    Images are RGB N×3×H×W, uint8 0–255 or float 0–1; they are normalized here. Raises ValueError for an impossible option.

    Buffers: teacher_mean, teacher_std 1×384×1×1; quantiles [[q_a, q_b] of the local, of the global map]; threshold, the score
    above which an image is called anomalous (infinite until `calibrate`)."""

    def __init__(self, *, size: str = "small", image_size: tuple[int, int] = (256, 256), padding: bool = False):
        super().__init__()
        image_size = tuple(image_size)
        check_image_size(image_size)
        self.config = {"size": size, "image_size": image_size, "padding": padding}
        self.training_info: dict = {}  # how it was trained; saved, never used here
        self.image_size, self.padding = image_size, padding
        self.teacher = PDN(size, CHANNELS, padding).requires_grad_(False)
        self.student = PDN(size, 2 * CHANNELS, padding)  # first half S predicts the teacher, second half S' the autoencoder
        self.activation = self.student[0].out_channels * math.prod(image_size)  # elements of a PDN's first one, its largest
        self.map_size = tuple(s // 4 - (0 if padding else 8) for s in image_size)  # h, w
        self.autoencoder = Autoencoder(image_size, self.map_size)
        self.register_buffer("teacher_mean", torch.zeros(1, CHANNELS, 1, 1))
        self.register_buffer("teacher_std", torch.ones(1, CHANNELS, 1, 1))
        self.register_buffer("quantiles", torch.tensor([[0.0, 0.1], [0.0, 0.1]]))  # 0 and 0.1: leaves the maps as they are
        self.register_buffer("threshold", torch.tensor(math.inf))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    # ---- inference

    def normalize(self, images: Tensor) -> Tensor:
        """RGB N×3×H×W, uint8 0–255 or float 0–1 -> float32 with ImageNet's mean and standard deviation. Raises ValueError for
        another shape, TypeError for another dtype."""
        self.check_shape(images)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise TypeError(f"images must be uint8 (0–255) or float (0–1), got {images.dtype}")
        return (images.float() - self.mean) / self.std

    def check_shape(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(f"images must be N×3×{self.image_size[0]}×{self.image_size[1]}, got {tuple(images.shape)}")

    @torch.no_grad()
    def teacher_features(self, x: Tensor) -> Tensor:
        """Normalized images N×3×H×W -> the teacher's output N×384×h×w, (T − μ)/σ per channel."""
        return (self.teacher(x) - self.teacher_mean) / self.teacher_std

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of teacher (normalized, N×384×h×w), student (N×768×h×w) and autoencoder (N×384×h×w)."""
        x = self.normalize(images)
        return self.teacher_features(x), self.student(x), self.autoencoder(x)

    def raw_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global anomaly map before normalization, each N×1×h×w: channel means of (T − S)² (section 3.2) and
        (A − S')² (section 3.3). What exceeds `TILE` is computed image by image and strip by strip, to the same maps."""
        if self.oversized(images):
            n = max(1, TILE // self.activation)
            parts = [self.raw_maps_in_strips(x) if n == 1 else self.raw_maps(x) for x in images.split(n)]
            return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        teacher, student, autoencoder = self.features(images)
        student, student_ae = student.split(CHANNELS, 1)
        if use_kernels(teacher, student, autoencoder):
            return distance_map(teacher, student), distance_map(autoencoder, student_ae)
        local_map = (teacher - student).float().square().mean(1, keepdim=True)
        global_map = (autoencoder - student_ae).float().square().mean(1, keepdim=True)
        return local_map, global_map

    def oversized(self, images: Tensor) -> bool:
        return not torch.is_grad_enabled() and not torch.compiler.is_exporting() and len(images) * self.activation > TILE

    def raw_maps_in_strips(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`raw_maps` without gradient and with little memory: teacher and student see a strip of the image at a time, with all that
        the receptive fields of its outputs cover, so there are no seams. The autoencoder needs the whole image."""
        x = self.normalize(images)
        autoencoder = self.autoencoder(x)
        height, maps = autoencoder.shape[2], []
        step = max(8, TILE * height // (len(images) * self.activation))
        for top in range(0, height, step):
            bottom = min(top + step, height)
            if self.padding:  # rows within 9 of a strip's inner edge would see its zeros, not the image
                first, last = max(0, top - 9), min(height, bottom + 9)
                strip = x[:, :, 4 * first : 4 * last]
            else:  # output row i sees the input rows 4i to 4i + 32
                first, strip = top, x[:, :, 4 * top : 4 * bottom + 29]
            rows = slice(top - first, bottom - first)
            student, student_ae = self.student(strip)[:, :, rows].split(CHANNELS, 1)
            local_map = (self.teacher_features(strip)[:, :, rows] - student).float().square().mean(1, keepdim=True)
            global_map = (autoencoder[:, :, top:bottom] - student_ae).float().square().mean(1, keepdim=True)
            maps.append((local_map, global_map))
        return torch.cat([m[0] for m in maps], 2), torch.cat([m[1] for m in maps], 2)

    def normalize_maps(self, local_map: Tensor, global_map: Tensor) -> tuple[Tensor, Tensor]:
        """Raw maps N×1×h×w -> normalized (section 3.4: q_a becomes 0, q_b 0.1) and resized to the image, each N×1×H×W."""
        maps = []
        for m, (q_a, q_b) in zip((local_map, global_map), self.quantiles):
            maps.append(self.resize(0.1 * (m - q_a) / (q_b - q_a)))
        return maps[0], maps[1]

    def resize(self, m: Tensor) -> Tensor:
        """Normalized map N×1×h×w -> N×1×H×W, the image's size."""
        if not self.padding:
            m = F.pad(m, (4, 4, 4, 4))
        return F.interpolate(m, self.image_size, mode="bilinear")

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global anomaly map, normalized and resized, each N×1×H×W. The combined map is their mean."""
        return self.normalize_maps(*self.raw_maps(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """RGB N×3×H×W, uint8 0–255 or float 0–1 -> combined anomaly map N×1×H×W and anomaly score N, its maximum."""
        if use_kernels(images, *self.parameters()) and not self.oversized(images):
            m = self.resize(combined_map(*self.features(images), self.quantiles))  # linear: one resize serves both maps
            return m, m.amax((1, 2, 3))
        return self.combine(*self.maps(images))

    @staticmethod
    def combine(local_map: Tensor, global_map: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized local and global map N×1×H×W -> combined map N×1×H×W and anomaly score N (section 3.3)."""
        combined_map = 0.5 * (local_map + global_map)
        return combined_map, combined_map.amax((1, 2, 3))

    def optimize(self, precision: str = "auto", batch_sizes: tuple[int, ...] = (1,)) -> "EfficientAD":
        """This model's fast form, on the same device, for inference alone: see `FastEfficientAD` in fast.py, which must lie beside
        this file. `precision`: "fp32", "bf16", "fp16", or "auto": bf16 on a CPU with instructions for it, else fp32; fp16 on a
        GPU, as it is as fast as bf16 and rounds eight times finer, while nothing comes near its limit of 65,504 (in an S trained on
        bottle, on its images, on photos and on noise: image less mean 151, activations 32). `batch_sizes`: each gets a CUDA
        graph; others run too, without one. Raises ValueError for another precision, ModelError if a weight overflows it."""
        from fast import FastEfficientAD  # here: whoever copies this file alone can do without

        return FastEfficientAD(self, precision, batch_sizes)

    # ---- training

    def losses(
        self, images: Tensor, augmented: Tensor, pretraining: Tensor | None, p_hard: float = 0.999, teacher: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The four loss terms of a step, by name; their sum is minimized. `images` I, `augmented` J (I with jittered colour) and
        `pretraining` P (None leaves the penalty out) are N×3×H×W, uint8 or float. `teacher`: `teacher_features` of the normalized
        I, if known. The student runs once over all three, and its last layer computes only the half that each loss needs."""
        n = len(images)
        x = torch.cat([self.normalize(images), self.normalize(augmented)])
        if teacher is None:
            teacher, teacher_j = self.teacher_features(x).split(n)
        else:
            teacher_j = self.teacher_features(x[n:])
        autoencoder_j = self.autoencoder(x[n:])
        if pretraining is not None:
            x = torch.cat([x, self.normalize(pretraining)])
        hidden, last = self.student.hidden(x), self.student[-1]
        student_j = F.conv2d(hidden[n : 2 * n], last.weight[CHANNELS:], last.bias[CHANNELS:])  # S'(J)
        hidden = torch.cat([hidden[:n], hidden[2 * n :]])
        student = F.conv2d(hidden, last.weight[:CHANNELS], last.bias[:CHANNELS])  # S(I), S(P)
        losses = {
            "hard": hard_feature_loss(teacher, student[:n], p_hard),
            "autoencoder": autoencoder_loss(teacher_j, autoencoder_j),
            "student_autoencoder": student_autoencoder_loss(autoencoder_j, student_j),
        }
        if pretraining is not None:
            losses["penalty"] = pretraining_penalty(student[n:])
        return losses

    def parameter_groups(self, lr: float = 1e-4) -> list[dict]:
        """For the optimizer: what is trained, student and autoencoder."""
        return [{"params": [*self.student.parameters(), *self.autoencoder.parameters()], "lr": lr}]

    @torch.no_grad()
    def fit_teacher_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set teacher_mean and teacher_std from the training images (batches N×3×H×W, uint8 or float). Raises ModelError if a
        channel of the teacher is constant over them."""
        mean, std = channel_statistics(self.teacher(self.normalize(b)) for b in batches)
        if not bool((std > 0).all()):
            raise ModelError("a teacher channel is constant over the training images: use a teacher that distill.py made")
        self.teacher_mean.copy_(mean)
        self.teacher_std.copy_(std)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], a: float = 0.9, b: float = 0.995, gaussian: bool = False) -> Tensor:
        """Set quantiles and threshold from normal images held out of training (batches N×3×H×W) and return their scores.
        q_a and q_b are over all pixels of all maps (section 3.4). `gaussian` is the ablation's baseline instead, mean 0 and
        variance 1 over those pixels: the same linear map with q_a = μ and q_b = μ + 0.1·σ. The threshold is the highest score
        of these images: of n + 1 normal images, the new one exceeds it with probability 1/(n + 1). Switches to eval mode. Raises
        ValueError without an image or for an impossible a or b, and ModelError if a map is constant or not a number."""
        if not 0 <= a < b <= 1:
            raise ValueError(f"map normalization needs 0 <= a < b <= 1, got a = {a}, b = {b}")
        self.eval()
        raw = [self.raw_maps(batch) for batch in batches]
        if not raw:
            raise ValueError("calibration needs at least one image")
        for i, maps in enumerate(zip(*raw)):
            m = torch.cat(maps).flatten()
            m = m.double() if gaussian else m
            q_a, q_b = (m.mean(), m.mean() + 0.1 * m.std(correction=0)) if gaussian else (quantile(m, a), quantile(m, b))
            if not bool(q_b > q_a):
                name = ("local", "global")[i]
                raise ModelError(f"the {name} map is constant or not a number on the validation images: train anew")
            self.quantiles[i, 0], self.quantiles[i, 1] = q_a, q_b
        scores = torch.cat([self.combine(*self.normalize_maps(*maps))[1] for maps in raw])
        self.threshold.copy_(scores.max())
        return scores

    # ---- files

    def load_teacher(self, path: str) -> None:
        """Load a teacher file: the PDN's weights, fp16 or fp32, named as an nn.Sequential ("0.weight", …) or as "conv1.weight", ….
        Raises ModelError if it is missing, damaged, foreign or of the other size."""
        state = read_checkpoint(path)
        convolutions = {k for k in state if isinstance(k, str) and k.endswith(".weight") and k.startswith("conv")}
        if convolutions:
            indices = [k.split(".")[0] for k in self.teacher.state_dict() if k.endswith(".weight")]
            names = {f"conv{i + 1}": index for i, index in enumerate(indices)}
            state = {".".join([names.get(k.split(".")[0], k), *k.split(".")[1:]]): v for k, v in state.items()}
        try:
            self.teacher.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError):
            size = self.config["size"]
            raise ModelError(f"{path}: not a {size} teacher; pass one that `distill.py --size {size}` made") from None
        if not all_finite(self.teacher.parameters()):
            raise ModelError(f"{path}: the teacher's weights are not finite; make it again with distill.py")

    def save(self, path: str) -> None:
        """Write config, weights, statistics, quantiles, threshold and training_info to one file that
        `torch.load(weights_only=True)` reads. Written under a temporary name and renamed."""
        write_checkpoint(
            {"format": "efficientad", "config": self.config, "training": self.training_info, "state": self.state_dict()}, path
        )

    @classmethod
    def load(cls, path: str) -> "EfficientAD":
        """Read a model that `save` wrote, on the CPU, in eval mode. Executes no code from the file. Raises ModelError if it
        is missing, damaged, not finite or of another program."""
        return read_model(cls, "efficientad", path)


def read_model(cls: type[nn.Module], form: str, path: str) -> nn.Module:
    """`load` of a model class, here and in simplenet.py; `form` is what its `save` writes as "format"."""
    checkpoint = read_checkpoint(path)
    if checkpoint.get("format") != form:
        raise ModelError(f"{path}: not a model of this program, or not a {cls.__name__}; pass a model.pt that train.py wrote")
    try:
        model = cls(**checkpoint["config"])
        model.load_state_dict(checkpoint["state"])
        model.training_info = dict(checkpoint["training"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        raise ModelError(f"{path}: damaged model file; train again or restore it from a copy") from None
    if not all_finite(tensor for name, tensor in model.state_dict().items() if name != "threshold"):
        raise ModelError(f"{path}: holds a weight or statistic that is not a number; train again")
    return model.eval()


def write_checkpoint(checkpoint: dict, path: str) -> None:
    """torch.save under a temporary name in the same folder, then rename: a reader never sees half a file, and what `path` held
    stays whole if this fails. Raises ModelError if it cannot be written."""
    temporary, content = f"{path}.tmp{os.getpid()}", io.BytesIO()
    torch.save(checkpoint, content)  # into memory: torch reports a full disk as one of its own bugs, and at length
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # the name must not survive a power failure without the content
        os.replace(temporary, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror}); what it held before is untouched") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_checkpoint(path: str) -> dict:
    """A dict that torch.load(weights_only=True) reads, on the CPU. Raises ModelError otherwise."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # torch.load raises many kinds of errors for a foreign or damaged file, and for one that would execute code
        raise ModelError(f"{path}: not a readable checkpoint (damaged, or of another program)") from None
    if not isinstance(checkpoint, dict):
        raise ModelError(f"{path}: not a checkpoint of this program")
    return checkpoint
