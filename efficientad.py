"""EfficientAD: accurate visual anomaly detection at millisecond-level latencies.

Batzner, Heckler, König, WACV 2024, arXiv 2303.14535. This file says what is computed, in the
paper's words, and needs torch (from 2.7 on) alone: copy it into your project.

    model = EfficientAD(size="small", image_size=(256, 256))
    model.teacher.load_state_dict(torch.load("weights/teacher_small.pt"))
    model.fit_teacher_statistics(batches)                    # normal images, N×3×256×256
    losses = model.losses(images, augmented, pretraining)    # I, J and P, each N×3×256×256
    sum(losses.values()).backward()                          # then Adam: lr 1e-4, weight decay 1e-5
    model.calibrate(validation_batches)                      # held out; switches to eval mode
    model.save("model.pt")

    model = EfficientAD.load("model.pt")
    with torch.inference_mode():
        anomaly_map, score = model(images)                   # N×1×256×256 and N
    normal = score <= model.threshold

Images are RGB, uint8 0–255 or float 0–1. Triton kernels beside this file (kernels/) are used on a
GPU; without them plain torch computes the same.
"""

import math
import os
import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from kernels import conv_relu_pool, distance_map, runs_on
    from kernels import hard_feature_loss as hard_feature_loss_kernel
    from kernels import quantile as quantile_kernel
except Exception as error:
    runs_on = None
    here = os.path.dirname(globals().get("__file__", ""))  # a notebook has none
    if os.path.exists(os.path.join(here, "kernels/conv_relu_pool.py")):  # there are other `kernels`
        warnings.warn(f"kernels/ cannot be used, plain torch computes the same: {error!r}")

CHANNELS = 384  # C, the teacher's output channels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KERNELS = os.environ.get("EFFICIENTAD_KERNELS") != "0"


class ModelError(ValueError):
    """A model, checkpoint or teacher is unusable; the message names the remedy."""


def use_kernels(*tensors: Tensor) -> bool:
    """The model's rule: it asks for a kernel if kernels/ was imported and EFFICIENTAD_KERNELS is
    not 0, on GPU tensors that need no gradient, unless a graph is being exported."""
    there = KERNELS and runs_on is not None and runs_on(*tensors)
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return there and not exporting and not gradient


# -------------------------------------------------------------------------------------- networks


class PDN(nn.Sequential):
    """Patch description network (section 3.1, figure 2), for teacher and student.

    Normalized images N×3×H×W float -> N×`channels`×h×w. Each output vector describes a 33×33 patch;
    patches are 4 pixels apart. h = H/4 with zero padding, H/4 − 8 without. `size` is "small" (S:
    four convolutions) or "medium" (M: six, section 4); raises ValueError otherwise."""

    def __init__(self, size: str = "small", channels: int = CHANNELS, padding: bool = False):
        if size not in ("small", "medium"):
            raise ValueError(f"size must be 'small' or 'medium', got {size!r}")
        p, width = int(padding), 128 if size == "small" else 256
        layers = [
            nn.Conv2d(3, width, 4, padding=3 * p),
            nn.ReLU(),
            nn.AvgPool2d(2, 2, padding=p),  # padding counts in the mean
            nn.Conv2d(width, 2 * width, 4, padding=3 * p),
            nn.ReLU(),
            nn.AvgPool2d(2, 2, padding=p),
        ]
        if size == "medium":
            layers += [nn.Conv2d(2 * width, 2 * width, 1), nn.ReLU()]
        layers += [nn.Conv2d(2 * width, 2 * width, 3, padding=p), nn.ReLU()]
        layers += [nn.Conv2d(2 * width, channels, 4)]
        if size == "medium":
            layers += [nn.ReLU(), nn.Conv2d(channels, channels, 1)]
        super().__init__(*layers)

    def forward(self, x: Tensor, stem: Tensor | None = None) -> Tensor:
        """Input and output: see the class. `stem`: `self.stem(x)`, if it is known."""
        return self[-1](self.hidden(self.stem(x) if stem is None else stem))

    def stem(self, x: Tensor) -> Tensor:
        """The first two convolutions, each with ReLU and pooling: at 256² N×256×61×61 (M: 512)."""
        return pooled_stage(pooled_stage(x, *list(self)[:3]), *list(self)[3:6])

    def hidden(self, x: Tensor) -> Tensor:
        """The stem's output -> the input of the last convolution."""
        for layer in list(self)[6:-1]:
            x = layer(x)
        return x


def pooled_stage(x: Tensor, convolution: nn.Module, relu: nn.Module, pool: nn.Module) -> Tensor:
    """Convolution, ReLU and average pool; one kernel in half precision on a GPU."""
    device, weight, bias = x.device.type, convolution.weight, convolution.bias
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype == torch.float32 or not use_kernels(x, weight, bias):  # the fp32 kernel is for checks
        return pool(relu(convolution(x)))
    padding = convolution.padding[0]
    return conv_relu_pool(x.to(dtype), weight.to(dtype), bias, padding, pool.padding)


class Autoencoder(nn.Sequential):
    """Autoencoder (section 3.3): normalized images N×3×H×W float -> N×384×h×w.

    (h, w) = `output_size`, the PDN's. The bottleneck is 1×1×64 for any image size: the last encoder
    kernel and the decoder's sizes scale with the image. 256×256 is the paper's. Raises ValueError
    unless height and width are multiples of 32 and at least 128."""

    def __init__(self, image_size=(256, 256), output_size=(56, 56)):
        check_image_size(image_size)
        layers, channels = [], 3
        for width in (32, 32, 64, 64, 64):
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.Conv2d(64, 64, tuple(s // 32 for s in image_size)))  # N×64×1×1, no ReLU
        for divisor, less in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1)):
            target = tuple(s // divisor - less for s in image_size)  # 3, 8, 15, 32, 63, 127 at 256²
            layers += [nn.Upsample(target, mode="bilinear"), nn.Conv2d(64, 64, 4, padding=2)]
            layers += [nn.ReLU(), nn.Dropout(0.2)]
        layers += [nn.Upsample(output_size, mode="bilinear"), nn.Conv2d(64, 64, 3, padding=1)]
        layers += [nn.ReLU(), nn.Conv2d(64, CHANNELS, 3, padding=1)]
        super().__init__(*layers)


def check_image_size(image_size: tuple[int, int]) -> None:
    """Raise ValueError unless (H, W) are multiples of 32 and at least 128."""
    if len(image_size) != 2 or any(s < 128 or s % 32 for s in image_size):
        raise ValueError(f"height and width must be multiples of 32 from 128 on, got {image_size}")


def quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of all elements of `x` (float, any shape), a scalar: `torch.quantile` without
    that function's limit of 2²⁴ elements, the position q·(n−1) in float64. NaN if any element is.
    Raises ValueError for q outside [0, 1] or no element."""
    x, n = x.detach().flatten(), x.numel()
    if not 0 <= q <= 1 or n == 0:
        raise ValueError(f"quantile needs 0 <= q <= 1 and an element, got q = {q} of {n} elements")
    if x.dtype == torch.float32 and use_kernels(x):
        return quantile_kernel(x, q)
    position = q * (n - 1)
    low, high = math.floor(position), math.ceil(position)  # the neighbours' places in order
    if n - low <= n // 64:  # few are larger
        top = x.topk(n - low).values  # descending; plain indices copy nothing to a GPU
        value, above = top[-1], top[low - high - 1]  # above: top[-2], or top[-1] if high == low
    else:
        value, above = x.kthvalue(low + 1).values, x.kthvalue(high + 1).values
    value = torch.lerp(value, above, position - low) if high > low else value
    return torch.where(x.isnan().any(), math.nan, value)  # NaN is sorted last


def channel_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation per channel of batches N×C×h×w, float32 1×C×1×1.
    Merged in float64 with Chan's update: nothing cancels. Raises ValueError without a batch."""
    count, mean, squares = 0, 0.0, 0.0
    for batch in batches:
        batch = batch.double()
        n = batch.numel() // batch.shape[1]
        batch_mean = batch.mean((0, 2, 3), keepdim=True)
        delta, total = batch_mean - mean, count + n
        squares = squares + (batch - batch_mean).square().sum((0, 2, 3), keepdim=True)
        squares = squares + delta.square() * (count * n / total)
        mean, count = mean + delta * (n / total), total
    if count == 0:
        raise ValueError("channel statistics need at least one batch")
    return mean.float(), (squares / count).sqrt().float()


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Channel mean of (a − b)²: N×C×h×w twice, any float dtype -> float32 N×1×h×w."""
    if use_kernels(a, b):
        return distance_map(a, b)
    return (a - b).float().square().mean(1, keepdim=True)


# ---------------------------------------------------------------------------------------- losses
# All take features N×C×h×w (any float dtype) and give a float32 scalar.


def hard_feature_loss(teacher: Tensor, student: Tensor, p_hard: float = 0.999) -> Tensor:
    """L_hard (section 3.2): mean of the squared differences (T − S)² that are at least as large as
    their p_hard-quantile over all elements of the batch. p_hard = 0 is the plain student–teacher
    loss. No gradient flows through the quantile."""
    if not teacher.requires_grad and use_kernels(teacher, student.detach()):
        return hard_feature_loss_kernel(teacher, student, p_hard)  # with a gradient of its own
    d = (teacher.float() - student.float()).square()
    hard = d >= quantile(d, p_hard)
    return (d * hard).sum() / hard.sum()


def pretraining_penalty(student: Tensor) -> Tensor:
    """Mean of S(P)² (section 3.2): the student should not imitate the teacher on other images."""
    return student.float().square().mean()


def autoencoder_loss(teacher: Tensor, autoencoder: Tensor) -> Tensor:
    """L_AE (section 3.3): mean of (T − A)²."""
    return F.mse_loss(autoencoder.float(), teacher.float())


def student_autoencoder_loss(autoencoder: Tensor, student: Tensor) -> Tensor:
    """L_STAE (section 3.3): mean of (A − S')². The gradient reaches both, as in reproductions."""
    return F.mse_loss(student.float(), autoencoder.float())


# ----------------------------------------------------------------------------------------- model


class EfficientAD(nn.Module):
    """Teacher, student and autoencoder with all that is needed to score an image (figure 5).

    `size`: "small" (S) or "medium" (M). `image_size`: (H, W), multiples of 32 from 128. `padding`:
    zero padding inside teacher and student; published: while distilling only. `shared_stem` (not in
    the paper): the student's stem is the teacher's, frozen. Raises ValueError for an impossible
    option. Buffers: teacher_mean and teacher_std 1×384×1×1; quantiles [[q_a, q_b] of the local, of
    the global map]; threshold, above which an image is anomalous (infinite until `calibrate`)."""

    format = "efficientad"  # of a checkpoint
    floor = 0.0  # q_a on a map's scale, where heat colours begin: most normal pixels lie below

    def __init__(self, *, size="small", image_size=(256, 256), padding=False, shared_stem=False):
        super().__init__()
        image_size = tuple(image_size)
        self.config = {"size": size, "image_size": image_size}
        self.config |= {"padding": padding, "shared_stem": shared_stem}
        self.training_info: dict = {}  # how it was trained; saved, never used here
        self.image_size, self.padding, self.shared_stem = image_size, padding, shared_stem
        self.teacher = PDN(size, CHANNELS, padding).requires_grad_(False)
        self.student = PDN(size, 2 * CHANNELS, padding)  # S, and S' for the autoencoder
        if shared_stem:
            self.student[0], self.student[3] = self.teacher[0], self.teacher[3]
        self.map_size = tuple(s // 4 - (0 if padding else 8) for s in image_size)  # h, w
        self.autoencoder = Autoencoder(image_size, self.map_size)
        self.register_buffer("teacher_mean", torch.zeros(1, CHANNELS, 1, 1))
        self.register_buffer("teacher_std", torch.ones(1, CHANNELS, 1, 1))
        self.register_buffer("quantiles", torch.tensor([[0.0, 0.1], [0.0, 0.1]]))  # identity
        self.register_buffer("threshold", torch.tensor(math.inf))
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images N×3×H×W, uint8 0–255 or float 0–1 -> combined anomaly map N×1×H×W and anomaly
        score N, its maximum. Call it in `torch.inference_mode()`."""
        maps, scores = self.predict(images)
        return maps["combined"], scores["combined"]

    def predict(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Maps N×1×H×W and scores N by name: combined (the model's own), local, global."""
        maps = self.maps(images)
        return maps, {name: m.amax((1, 2, 3)) for name, m in maps.items()}

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The combined, the local and the global anomaly map by name, each N×1×H×W."""
        return self.normalize_maps(*self.raw_maps(images))

    def raw_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global map before normalization, each N×1×h×w: channel means of (T − S)²
        (section 3.2) and (A − S')² (section 3.3)."""
        teacher, student, autoencoder = self.features(images)
        student, student_ae = student.split(CHANNELS, 1)
        return squared_distance(teacher, student), squared_distance(autoencoder, student_ae)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of teacher N×384×h×w, student N×768×h×w and autoencoder N×384×h×w."""
        x = self.normalize(images)
        return *self.pdn_features(x), self.autoencoder(x)

    def pdn_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images -> the outputs of teacher and student; a shared stem runs once."""
        stem = self.teacher.stem(x) if self.shared_stem else None
        return self.teacher_features(x, stem), self.student(x, stem)

    def normalize(self, images: Tensor, any_size: bool = False) -> Tensor:
        """Images N×3×H×W (with `any_size` other H and W too), uint8 0–255 or float 0–1 -> float32
        with ImageNet's mean and standard deviation. Raises ValueError for another shape or, on the
        CPU, floats clearly outside 0–1 (a GPU would have to wait), TypeError for another dtype."""
        self.check_shape(images, any_size)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise TypeError(f"images must be uint8 (0–255) or float (0–1), got {images.dtype}")
        elif images.device.type == "cpu" and not torch.compiler.is_exporting():
            low, high = images.aminmax()
            if not (low > -0.1 and high < 1.1):  # NaN neither
                raise ValueError(f"float images must be in 0–1, got {low:.3g} to {high:.3g}")
        return (images.float() - self.mean) / self.std

    def check_shape(self, images: Tensor, any_size: bool = False) -> None:
        height, width = images.shape[-2:] if any_size else self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(f"images must be N×3×{height}×{width}, got {tuple(images.shape)}")

    @torch.no_grad()
    def teacher_features(self, x: Tensor, stem: Tensor | None = None) -> Tensor:
        """Normalized images N×3×H×W -> the teacher's output N×384×h×w, (T − μ)/σ per channel."""
        return (self.teacher(x, stem) - self.teacher_mean) / self.teacher_std

    def normalize_maps(self, local_map: Tensor, global_map: Tensor) -> dict[str, Tensor]:
        """Raw maps N×1×h×w -> maps by name, N×1×H×W: q_a becomes 0, q_b 0.1 (section 3.4); the
        combined map is the mean of both (section 3.3)."""
        normalized = []
        for raw, (q_a, q_b) in zip((local_map, global_map), self.quantiles):
            normalized.append(self.resize(0.1 * (raw - q_a) / (q_b - q_a)))
        local_map, global_map = normalized
        combined_map = 0.5 * (local_map + global_map)
        return {"combined": combined_map, "local": local_map, "global": global_map}

    def resize(self, m: Tensor) -> Tensor:
        """Map N×1×h×w -> N×1×H×W. No patch of an unpadded PDN is centred on the outer 4 positions:
        there the map is 0, the level of q_a, as in reproductions."""
        m = m if self.padding else F.pad(m, (4, 4, 4, 4))
        return F.interpolate(m, self.image_size, mode="bilinear")

    @torch.no_grad()
    def fit_teacher_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set teacher_mean μ and teacher_std σ (the supplement's) from the training images, batches
        N×3×H×W. Raises ModelError if a channel of the teacher is constant over them."""
        mean, std = channel_statistics(self.teacher(self.normalize(b)) for b in batches)
        if not bool((std > 0).all()):
            raise ModelError("a teacher channel is constant over the training images: use another")
        self.teacher_mean.copy_(mean)
        self.teacher_std.copy_(std)

    def losses(self, images: Tensor, augmented: Tensor, pretraining: Tensor | None, p_hard=0.999):
        """The loss terms of a training step by name; their sum is minimized: L_hard on the training
        images I and the penalty on pretraining images P of any size (None: none), section 3.2; L_AE
        and L_STAE (3.3) on J, I with jittered colour (supplement). Each N×3×H×W, uint8 or float."""
        i, j = self.normalize(images), self.normalize(augmented)
        student = self.student(i)[:, :CHANNELS]
        student_ae = self.student(j)[:, CHANNELS:]
        autoencoder = self.autoencoder(j)
        losses = {
            "hard": hard_feature_loss(self.teacher_features(i), student, p_hard),
            "autoencoder": autoencoder_loss(self.teacher_features(j), autoencoder),
            "student_autoencoder": student_autoencoder_loss(autoencoder, student_ae),
        }
        if pretraining is not None:
            p = self.normalize(pretraining, any_size=True)
            losses["penalty"] = pretraining_penalty(self.student(p)[:, :CHANNELS])
        return losses

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], a: float = 0.9, b: float = 0.995) -> Tensor:
        """Set quantiles and threshold from normal images held out of training, batches N×3×H×W, and
        return their scores (section 3.4). Switches to eval mode. Raises as `fit_normalization`."""
        self.eval()
        return self.fit_normalization([self.raw_maps(x) for x in batches], a, b)

    def fit_normalization(self, raw: list, a: float = 0.9, b: float = 0.995) -> Tensor:
        """`calibrate` from a list of `raw_maps`: q_a and q_b are of all their pixels. Raises
        ValueError without an image or for an impossible a or b, ModelError as `set_quantiles`."""
        if not 0 <= a < b <= 1 or not raw:
            raise ValueError(f"needs images and 0 <= a < b <= 1, got {len(raw)}, {a} and {b}")
        pixels = [torch.cat(maps).flatten() for maps in zip(*raw)]
        return self.set_quantiles(raw, [[quantile(x, a), quantile(x, b)] for x in pixels])

    def set_quantiles(self, raw: list, quantiles: list) -> Tensor:
        """Take these quantiles. The paper sets no threshold; ours is the highest score, or the mean
        plus 3 standard deviations if that is higher. ModelError if a map is constant or NaN."""
        self.quantiles.copy_(torch.tensor(quantiles))
        if not bool((self.quantiles[:, 1] > self.quantiles[:, 0]).all()):
            raise ModelError("a map is constant or NaN on the validation images: train anew")
        scores = torch.cat([self.normalize_maps(*m)["combined"].amax((1, 2, 3)) for m in raw])
        self.threshold.copy_(max(scores.max(), scores.mean() + 3 * scores.std(correction=0)))
        return scores

    def checkpoint(self) -> dict:
        """What `save` writes: config, weights, statistics, quantiles, threshold, training_info."""
        about = {"format": self.format, "config": self.config, "training": self.training_info}
        return {**about, "state": self.state_dict()}

    def save(self, path: str) -> None:
        """Write one file that holds all that scoring needs and that torch.load(weights_only=True)
        reads. It is written under a temporary name and renamed."""
        torch.save(self.checkpoint(), f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path: str) -> "EfficientAD":
        """Read a model that `save` wrote, on the CPU, in eval mode. Executes no code from the file.
        Raises ModelError for a file of another kind, torch.load's errors for a damaged one."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != cls.format:
            raise ModelError(f"{path}: not a model that {cls.__name__}.save wrote")
        model = cls(**checkpoint["config"])
        model.load_state_dict(checkpoint["state"])
        model.training_info = checkpoint["training"]
        return model.eval()
