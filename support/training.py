"""How a training step is computed fast: order of the batches, augmentation, the four losses with
one student pass, kept teacher outputs, fixed buffers and a CUDA graph."""

import copy
import ctypes
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from efficientad import (
    CHANNELS,
    EfficientAD,
    ModelError,
    autoencoder_loss,
    hard_feature_loss,
    pretraining_penalty,
    student_autoencoder_loss,
)
from support.graphs import Graphed, beside, side_stream
from support.images import Images, PhotographCrops, in_threads, list_images

KEPT_BYTES = 2 * 2**30  # on the device, each: decoded training images, teacher outputs for them

# ------------------------------------------------------------------------------ order of batches


@lru_cache(maxsize=4)
def permutation(n: int, *seed: int) -> np.ndarray:
    """A permutation of 0 … n − 1 that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(n)


def shuffled(images: Sequence, step: int, batch_size: int, *seed: int) -> Tensor:
    """The batch of step `step` in an endless reshuffled order: each epoch visits every image once.
    `images` gives an array or tensor for an index; uint8 3×H×W makes N×3×H×W."""
    batch = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(i, len(images))
        batch.append(images[int(permutation(len(images), *seed, epoch)[position])])
    if isinstance(batch[0], Tensor):
        return torch.stack(batch)
    return torch.from_numpy(np.stack(batch))  # by numpy: torch would start threads in each thread


def batches_of(images: Sequence, steps: range, batch_size: int, *seed: int) -> Iterator[Tensor]:
    """The batch of each step, see `shuffled`; files are decoded by threads."""
    in_turn = in_threads if isinstance(images, (Images, PhotographCrops)) else map
    return in_turn(lambda step: shuffled(images, step, batch_size, *seed), steps)


def quarters(batches: Iterator[Tensor], steps: range, seed: int) -> Iterator[Tensor]:
    """A random part of half the height and width of each step's images N×3×H×W."""
    for step, images in zip(steps, batches):
        height, width = images.shape[2] // 2, images.shape[3] // 2
        rng = np.random.default_rng((seed, step))
        top, left = rng.integers(0, height, endpoint=True), rng.integers(0, width, endpoint=True)
        yield images[:, :, top : top + height, left : left + width]


def one_by_one(images: Sequence, device: torch.device, purpose: str) -> Iterator[Tensor]:
    """Each image as a batch 1×3×H×W on the device, under a progress bar."""
    for i in tqdm(range(len(images)), purpose, unit="image"):
        yield torch.as_tensor(images[i])[None].to(device)


def keep_on_device(images: Images, device: torch.device) -> Images | Tensor:
    """All images as uint8 N×3×H×W on the device, if they take no more than KEPT_BYTES; `images`
    then keeps none itself."""
    if len(images) * 3 * math.prod(images.size) > KEPT_BYTES:
        return images
    decoded = in_threads(lambda i: torch.as_tensor(images[i]), range(len(images)))
    stacked = torch.stack(list(decoded)).to(device)
    images.kept.clear()
    return stacked


# ---------------------------------------------------------------------------------- augmentation


def luma(images: Tensor) -> Tensor:
    """float N×3×H×W -> N×1×H×W, ITU-R 601."""
    r, g, b = images.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def draw(n: int, unchanged: float = 0.0) -> Tensor:
    """The random choices of a step for n images, float32 3×N×1×1×1, from torch's CPU generator:
    whether photo P is gray; factor, uniform in [0.8, 1.2] or, in a share `unchanged` of the images,
    1, and kind of the augmentation."""
    gray = torch.rand(n, 1, 1, 1) < 0.3
    factor = torch.empty(n, 1, 1, 1).uniform_(0.8, 1.2)
    if unchanged:
        factor = torch.where(torch.rand(n, 1, 1, 1) < unchanged, 1.0, factor)
    return torch.stack([gray.float(), factor, torch.randint(3, (n, 1, 1, 1)).float()])


def augment(images: Tensor, factor: Tensor, kind: Tensor) -> Tensor:
    """J (supplementary material): brightness (kind 0), contrast (1) or saturation (2) of each image
    times its factor. Images uint8 N×3×H×W, factor and kind N×1×1×1 -> float N×3×H×W in 0–1."""
    images = images.float() / 255
    gray = luma(images)
    contrast = torch.where(kind == 1, gray.mean((2, 3), keepdim=True), gray)
    reference = torch.where(kind == 0, 0.0, contrast)
    return (reference + factor * (images - reference)).clamp(0, 1)


def turn_gray(images: Tensor, gray: Tensor) -> Tensor:
    """P: uint8 N×3×H×W -> float 0–1, gray where `gray`, N×1×1×1, is not 0."""
    images = images.float() / 255
    return torch.where(gray != 0, luma(images), images)


# ---------------------------------------------------------------------------------------- a step


def fast_losses(
    model: EfficientAD,
    images: tuple[Tensor, Tensor, Tensor | None],
    p_hard: float,
    teacher: Tensor | None = None,
) -> dict[str, Tensor]:
    """`EfficientAD.losses` of the images (I, J, P) with less work. The student runs once over all
    three, and its last layer computes only the half that each loss needs. `teacher`: the teacher's
    output for I, N×384×h×w, if it is known."""
    i, j, p = images
    n, x = len(i), torch.cat([model.normalize(i), model.normalize(j)])

    def pdns() -> tuple[Tensor, ...]:
        """T(I) and T(J), S'(J), S(I) and S(P)."""
        if teacher is None:
            teacher_i, teacher_j = model.teacher_features(x).split(n)
        else:
            teacher_i, teacher_j = teacher, model.teacher_features(x[n:])
        both = x if p is None else torch.cat([x, model.normalize(p)])
        hidden, last = model.student.hidden(model.student.stem(both)), model.student[-1]
        weight, weight_ae = last.weight.split(CHANNELS)
        bias, bias_ae = last.bias.split(CHANNELS)
        student_j = F.conv2d(hidden[n : 2 * n], weight_ae, bias_ae)
        student = F.conv2d(torch.cat([hidden[:n], hidden[2 * n :]]), weight, bias)
        return teacher_i, teacher_j, student_j, student

    features, autoencoder_j = beside(pdns, partial(model.autoencoder, x[n:]), side_stream(x.device))
    teacher_i, teacher_j, student_j, student = features
    losses = {
        "hard": hard_feature_loss(teacher_i, student[:n], p_hard),
        "autoencoder": autoencoder_loss(teacher_j, autoencoder_j),
        "student_autoencoder": student_autoencoder_loss(autoencoder_j, student_j),
    }
    if p is not None:
        losses["penalty"] = pretraining_penalty(student[n:])
    return losses


def short_losses(
    model: EfficientAD, j: Tensor, p: Tensor | None, p_hard: float
) -> dict[str, Tensor]:
    """`EfficientAD.losses` with J in place of I: one pass of the student less. A stem that teacher
    and student share is computed once."""
    x = model.normalize(j)
    pdns, autoencoder = partial(model.pdn_features, x), partial(model.autoencoder, x)
    (teacher, student), autoencoder = beside(pdns, autoencoder, side_stream(x.device))
    student, student_ae = student.split(CHANNELS, 1)
    losses = {
        "hard": hard_feature_loss(teacher, student, p_hard),
        "autoencoder": autoencoder_loss(teacher, autoencoder),
        "student_autoencoder": student_autoencoder_loss(autoencoder, student_ae),
    }
    if p is not None:
        student = model.student(model.normalize(p, any_size=True))
        losses["penalty"] = pretraining_penalty(student[:, :CHANNELS])
    return losses


def extra_losses(batch: dict[str, Tensor], model: EfficientAD) -> dict[str, Tensor]:
    """L_AE of images I whose teacher outputs are known, see `keep_teacher_outputs`."""
    teacher = batch["extra_teacher"].permute(0, 3, 1, 2)
    autoencoder = model.autoencoder(model.normalize(batch["extra"]))
    return {"autoencoder": autoencoder_loss(teacher, autoencoder)}


@torch.no_grad()
def teacher_outputs(model: EfficientAD, batches: Iterable[Tensor], precision: str) -> Tensor:
    """`teacher_features` of batches of images as a training step computes them, N×h×w×384."""

    def features() -> Iterator[Tensor]:
        for batch in batches:
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
                output = model.teacher_features(model.normalize(batch))
            yield output

    return kept(features(), precision)


def kept(features: Iterable[Tensor], precision: str) -> Tensor:
    """Features N×C×h×w as N×h×w×C, those of a bf16 step in fp16."""
    dtype = torch.float32 if precision == "fp32" else torch.float16
    return torch.cat([x.permute(0, 2, 3, 1).to(dtype).contiguous() for x in features])


def keep_teacher_outputs(model: EfficientAD, data: dict, precision: str, fit=False) -> None:
    """Add "teacher" to `data`: the teacher's outputs for the images, if they take no more than
    KEPT_BYTES. Recipe short adds "extra", as many of the images as there is room for, evenly
    spread, and "extra_teacher", their outputs. What is there already stays. With `fit` (recipe
    short) passes over all images set the teacher's mean and deviation as well."""
    images, device = data["images"], model.threshold.device
    size = CHANNELS * math.prod(model.map_size) * (4 if precision == "fp32" else 2)
    every, name = math.ceil(len(images) / max(1, KEPT_BYTES // size)), "teacher"
    if "extra_teacher" in data or (every > 1 and not model.shared_stem):
        return
    if model.shared_stem:
        chosen = [torch.as_tensor(images[i]) for i in range(0, len(images), every)]
        data["extra"] = images = torch.stack(chosen).to(device)
        name = "extra_teacher"
    each = one_by_one(data["images"] if fit else images, device, "teacher outputs")
    if not fit:
        data[name] = teacher_outputs(model, each, precision)
        return
    outputs, passes = [], itertools.count()

    def keep(module: nn.Module, x: tuple, output: Tensor) -> None:
        if next(passes) % every == 0:
            outputs.append(output)

    with model.teacher.register_forward_hook(keep):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            model.fit_teacher_statistics(each)
    raw = (outputs.pop(0) for _ in range(len(outputs)))  # they may be large
    data[name] = kept(((x - model.teacher_mean) / model.teacher_std for x in raw), precision)


def start_from_teacher(model: EfficientAD) -> None:
    """Give the student the teacher's layers where both have the same shape: all but the last ones.
    A short training need not learn them."""
    for own, teachers in zip(model.student, model.teacher):
        if isinstance(own, nn.Conv2d) and own.weight.shape == teachers.weight.shape:
            own.load_state_dict(teachers.state_dict())


def process_start() -> float:
    """About when this process began, in seconds since 1970: its imports took a while. By CPU time,
    so waiting for a disk does not count. The system's record would count what a shell did before it
    became this process."""
    return time.time() - time.process_time()


def steps_until(
    end: float, take_step: Callable[[int], dict], model: EfficientAD, validation: Sequence
) -> int:
    """How many training steps fit in before the time `end`, calibration included. Takes some steps
    to time them. Raises ModelError if fewer than 50 fit."""
    image, device = torch.as_tensor(validation[0])[None], model.threshold.device
    too_late = "preparation and calibration leave time for {} steps; give more --minutes, for 50"
    if time.time() > end:
        raise ModelError(f"{too_late.format(0)} at least")
    moments, seconds = [], min(60, 0.02 * (end - time.time()))
    while len(moments) < 3 or moments[-1] - moments[0] < seconds:
        losses = [take_step(5 * len(moments) + i) for i in range(5)][-1]
        sum(losses.values()).item()  # a GPU is waited for now and then only, as in training
        moments.append(time.time())
    calibration, on_cpu = 0.0, copy.deepcopy(model).cpu() if device.type == "cuda" else model
    for m, passes in ((model, 1), (on_cpu, 2)):  # the latter for int8
        for _ in range(2):  # the first pass prepares: a GPU tunes its convolutions for seconds
            begun = time.time()
            with torch.no_grad():
                m.raw_maps(image.to(m.threshold.device))[0].cpu()
        calibration += passes * len(validation) * (time.time() - begun)
    step = (moments[-1] - moments[0]) / 5 / (len(moments) - 1)  # the first ones are slow
    steps = int((end - calibration - time.time()) / step)
    if steps < 50:
        raise ModelError(f"{too_late.format(max(0, steps))} at least")
    return steps


class Step:
    """A training step. Called with a batch (tensors by name, on whatever device, of the same shapes
    each time) it takes a step of each optimizer and returns the losses by name, tensors that the
    next call overwrites. `losses` computes them from the batch on the device. The batch is copied
    to fixed buffers there, so that all else is one CUDA graph on a GPU; nothing waits for it."""

    def __init__(
        self,
        losses: Callable[[dict], dict],
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        precision: str,
    ):
        self.losses, self.optimizers, self.precision = losses, optimizers, precision
        self.device, self.buffers = device, {}
        self.graph = Graphed(self.compute, device)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, x in batch.items():
            x = x.contiguous().pin_memory() if self.device.type == "cuda" and not x.is_cuda else x
            if name not in self.buffers:
                self.buffers[name] = torch.empty_like(x, device=self.device)
            self.buffers[name].copy_(x, non_blocking=True)
        return self.graph()

    def compute(self) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.losses(self.buffers)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        sum(losses.values()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


def pretraining_images(
    folder: str | None, size: tuple[int, int], needed: int, skip_bad: bool
) -> tuple[Images | PhotographCrops | None, str]:
    """The images P of the penalty, and what they are, in words. `folder`: of photos; "none" for no
    penalty; None for crops of the two photographs that scikit-learn ships. `needed`: how many a run
    takes; decoded photos are kept if it takes them more than once."""
    if folder == "none":
        return None, "no pretraining penalty"
    if folder is None:
        return PhotographCrops(size), "pretraining images: crops of scikit-learn's two photographs"
    paths = list_images(folder, recursive=True)
    cache_bytes = 4 * 2**30 if len(paths) < needed else 0
    images = Images(paths, size, zoom=2, cache_bytes=cache_bytes, skip_bad=skip_bad)
    return images, f"{len(images)} pretraining images from {folder}"


def prepare_torch(seed: int) -> None:
    """Seed torch. On a GPU fp32 means fp32, and convolutions choose their fastest algorithm. On a
    CPU large blocks of memory are kept for the next step."""
    keep_memory()
    torch.manual_seed(seed)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def keep_memory() -> None:
    """Tell glibc to keep large blocks that are freed. It would give each back to the system, which
    clears it anew at the next use: a fifth to a third of a step on a CPU. Another C library keeps
    its ways."""
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # mallopt's names for its parameters
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)
