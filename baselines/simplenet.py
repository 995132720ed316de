"""SimpleNet: a simple network for image anomaly detection and localization.

Liu, Zhou, Xu, Wang, CVPR 2023, arXiv 2303.15140. A frozen network describes every 8×8 cell of an
image by 1,536 numbers. A linear adaptor and a small discriminator D learn to tell these features of
normal images from the same with Gaussian noise. At test time −D is the anomaly map.

    python -m baselines.simplenet --data mvtec/bottle --backbone resnet18
    python evaluate.py

    model = SimpleNet.load("runs/bottle-simplenet/model.pt")       # backbone and all
    with torch.inference_mode():
        anomaly_map, score = model(images)                         # N×1×329×329 and N
"""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad import IMAGENET_MEAN, IMAGENET_STD, EfficientAD, ModelError
from support.backbone import (
    ARCHITECTURES,
    EFFICIENTNETS,
    PatchFeatures,
    fold_batch_norms,
    load_weights,
    make_trunk,
)
from support.calibration import calibrate
from support.checkpoints import all_finite, is_url
from support.data import load_normal_images
from support.fast import DTYPES, choose_precision
from support.graphs import BatchGraphs
from support.optimizers import cosine, make_adam, set_rate
from support.options import (
    OptionError,
    RunOptions,
    option,
    parse_options,
    pick_device,
    refuse_several_runs,
)
from support.runs import Run, check_free, run_command
from support.training import Step, batches_of, prepare_torch

CHANNELS, HIDDEN = 1536, 1024  # of a feature, of the discriminator's hidden layer
# The first is the paper's; as many steps without a GPU, each on a quarter of the images.
EPOCHS, CPU_EPOCHS, BATCH, CPU_BATCH = 160, 40, 8, 2
USAGE = "python -m baselines.simplenet [--data DIR] [options]"


def crop_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """The centre that the network sees: 288 of 329 pixels as published, in this proportion for
    another size, a multiple of 8. Raises ValueError below 64 pixels."""
    if min(image_size) < 64:
        raise ValueError(f"SimpleNet needs a height and width of at least 64, got {image_size}")
    return tuple(s * 288 // 329 // 8 * 8 for s in image_size)


class SimpleNet(nn.Module):
    """Trunk, patch features, adaptor and discriminator: all that is needed to score an image.

    `backbone`: a name in ARCHITECTURES. `layers`: some of its layers 1, 2, 3. `image_size`: (H, W)
    from 64 on; the network sees the centre, `crop_size`. `adaptor`: False leaves it out. `noise`:
    σ, for training only. `scale`: of the features. Raises ValueError for an impossible option.
    Buffers: threshold, the score above which an image is called anomalous (infinite until
    `calibrate`); floor, an ordinary position's value in a map, where heat colours begin: the
    validation images' median."""

    format = "simplenet"  # of a checkpoint
    normalize, check_shape = EfficientAD.normalize, EfficientAD.check_shape  # the same for both
    save, load = EfficientAD.save, classmethod(EfficientAD.load.__func__)

    def __init__(
        self,
        *,
        backbone: str = "wide_resnet50_2",
        image_size: tuple[int, int] = (329, 329),
        layers: Sequence[int] = (2, 3),
        adaptor: bool = True,
        noise: float = 0.015,
        scale: float = 1.0,
    ):
        super().__init__()
        image_size, layers = tuple(image_size), tuple(layers)
        self.config = {"backbone": backbone, "image_size": image_size, "layers": layers}
        self.config |= {"adaptor": adaptor, "noise": noise, "scale": scale}
        self.training_info: dict = {}  # how it was trained; saved, never used here
        self.graphs: BatchGraphs | None = None  # the fast form's
        self.image_size, self.crop, self.noise = image_size, crop_size(image_size), noise
        starts = [(s - c) // 2 for s, c in zip(image_size, self.crop)]
        self.rows, self.columns = (slice(s, s + c) for s, c in zip(starts, self.crop))
        self.patch_features = PatchFeatures(make_trunk(backbone), CHANNELS, CHANNELS, layers)
        for i in layers:
            getattr(self.patch_features, f"pooling{i}").mul_(scale)
        self.adaptor = nn.Linear(CHANNELS, CHANNELS) if adaptor else nn.Identity()
        hidden, last = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, 1, bias=False)
        norm = nn.BatchNorm1d(HIDDEN)
        self.discriminator = nn.Sequential(hidden, norm, nn.LeakyReLU(0.2), last)
        for module in (self.adaptor, hidden, last):
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
        blur = torch.exp(-0.5 * (torch.arange(-16, 17) / 4).square())  # σ = 4 pixels, out to 4 σ
        self.register_buffer("threshold", torch.tensor(math.inf))
        self.register_buffer("floor", torch.tensor(0.0))
        self.register_buffer("blur", blur / blur.sum(), persistent=False)
        for name, values in {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}.items():
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    # ---- inference

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images N×3×H×W, uint8 0–255 or float 0–1 -> anomaly map N×1×H×W and anomaly score N, the
        largest −D before resizing and blurring. Call it in `torch.inference_mode()`."""
        return self.forward_pass(images) if self.graphs is None else self.graphs(images)

    def forward_pass(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.raw_map(images)
        return self.resize(raw), raw.amax((1, 2, 3))

    def predict(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Maps N×1×H×W and scores N by name; there is one of each."""
        anomaly_map, score = self(images)
        return {"anomaly": anomaly_map}, {"anomaly": score}

    def features(self, images: Tensor) -> Tensor:
        """Images N×3×H×W -> patch features N×h×w×1536 without gradient; 36×36 for 288×288."""
        x = self.normalize(images)[:, :, self.rows, self.columns]
        x = x.to(next(self.patch_features.parameters()).dtype, memory_format=torch.channels_last)
        return self.patch_features(x).permute(0, 2, 3, 1)

    def raw_map(self, images: Tensor) -> Tensor:
        """−D at every position, float32 N×1×h×w."""
        x = self.features(images)
        d = self.discriminator(self.adaptor(x.flatten(0, 2)))
        return -d.float().view(x.shape[:3]).unsqueeze(1)

    def resize(self, m: Tensor) -> Tensor:
        """Raw map N×1×h×w -> N×1×H×W: bilinear to the crop, its edges repeated out to the image's
        (the network has seen nothing there), Gaussian blur with σ = 4 pixels."""
        (height, width), rows, columns = self.image_size, self.rows, self.columns
        rims = (columns.start, width - columns.stop, rows.start, height - rows.stop)
        m = F.interpolate(m, self.crop, mode="bilinear")
        m = F.pad(m, [rim + len(self.blur) // 2 for rim in rims], mode="replicate")
        return F.conv2d(F.conv2d(m, self.blur.view(1, 1, -1, 1)), self.blur.view(1, 1, 1, -1))

    @torch.no_grad()
    def optimize(self, precision: str = "auto", batch_sizes: tuple = (1,)) -> "SimpleNet":
        """A copy for inference alone, on the same device; arguments are those of
        `support.fast.optimize`, except that "int8" becomes "auto", with a warning. Batch norms and
        the adaptor are multiplied into the layers beside them. A batch of one of `batch_sizes` is
        one CUDA graph launch on a GPU."""
        if precision == "int8":
            warnings.warn("int8 is for EfficientAD; auto instead")
            precision = "auto"
        device, fast = self.threshold.device, copy.deepcopy(self).eval().requires_grad_(False)
        fast.precision = choose_precision(precision, device)
        dtype = DTYPES[fast.precision]
        fold_batch_norms(fast.patch_features.trunk)
        linear, norm = fast.discriminator[:2]
        weight, bias = fast.first_layer()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        linear.weight.copy_(weight * scale[:, None])
        linear.bias.copy_((bias - norm.running_mean) * scale + norm.bias)
        fast.adaptor, fast.discriminator[1] = nn.Identity(), nn.Identity()
        for part in (fast.patch_features, fast.discriminator):
            part.to(dtype, memory_format=torch.channels_last)
        fast.graphs = BatchGraphs(fast.forward_pass, self.image_size, device, batch_sizes)
        return fast

    # ---- training

    def losses(self, features: Tensor) -> dict[str, Tensor]:
        """The two loss terms by name: mean max(0, 0.5 − D(real)) and mean max(0, 0.5 + D(fake)).
        `features` x, N×h×w×1536, are of normal images: real is Ax with the adaptor A, fake Ax + n
        with noise n ~ N(0, σ²). The batch norm sees both together. W(Ax + n), with the
        discriminator's first layer W, is computed as (WA)x + Wn: half the arithmetic, and bf16 does
        not blur the small Wn by rounding Ax + n."""
        x = features.reshape(-1, CHANNELS).float()
        n = torch.randn(x.shape, device=x.device) * self.noise
        real = F.linear(x, *self.first_layer()).float()
        fake = real + F.linear(n, self.discriminator[0].weight).float()
        with torch.autocast(x.device.type, enabled=False):
            real, fake = self.discriminator[1:](torch.cat([real, fake])).split(len(x))
        return {"real": (0.5 - real).clamp(min=0).mean(), "fake": (0.5 + fake).clamp(min=0).mean()}

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """WA and its bias: weight 1024×1536 and bias of adaptor and first layer in one."""
        linear, adaptor = self.discriminator[0], self.adaptor
        if isinstance(adaptor, nn.Identity):
            return linear.weight, linear.bias
        return linear.weight @ adaptor.weight, F.linear(adaptor.bias, linear.weight, linear.bias)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> Tensor:
        """Set threshold, the highest score, and floor from normal images held out of training,
        batches N×3×H×W; return their scores. Switches to eval mode. Raises ValueError without an
        image, ModelError if a map is constant or not a number."""
        self.eval()
        maps = [self.raw_map(batch) for batch in batches]
        if not maps:
            raise ValueError("calibration needs at least one image")
        raw = torch.cat(maps)
        scores = raw.amax((1, 2, 3))
        if not bool(scores.max() > raw.median()):
            raise ModelError("the map is constant or NaN on the validation images: train anew")
        self.threshold.copy_(scores.max())
        self.floor.copy_(raw.median())
        return scores

    # ---- files

    def load_backbone(self, path: str | None) -> None:
        """Load the trunk's weight file (None: the published one), its convolutions rounded to half
        precision, as `save` stores them. Raises ModelError as `load_weights`."""
        load_weights(self.patch_features.trunk, path)
        self.load_state_dict(self.checkpoint()["state"])
        if not all_finite(self.patch_features.state_dict().values()):
            file = path or self.config["backbone"]
            raise ModelError(f"{file}: not finite in half precision; download it again")

    def checkpoint(self) -> dict:
        """What `save` writes: config, training_info and state. The backbone is in it, its
        convolutions in half precision (50 MB for wide_resnet50_2)."""
        if self.graphs is not None:
            raise TypeError("the fast form is for inference: save its model")
        checkpoint = EfficientAD.checkpoint(self)
        for name, tensor in self.patch_features.state_dict(prefix="patch_features.").items():
            if tensor.ndim == 4:
                checkpoint["state"][name] = tensor.half()
        return checkpoint


class CachedFeatures:
    """The patch features of images (uint8 arrays 3×H×W by index) by index, float16 h×w×1536 on the
    model's device, kept while they fit into `cache_bytes` (4 MB an image of 329²). They come from
    one image alone and in fp32: what is kept and the step's precision make no difference."""

    def __init__(self, model: SimpleNet, images: Sequence, cache_bytes: int = 4 * 2**30):
        self.model, self.images, self.kept, self.free_bytes = model, images, {}, cache_bytes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        image = torch.as_tensor(self.images[index])[None].to(self.model.threshold.device)
        features = self.model.features(image)[0].half().contiguous()
        if features.nbytes <= self.free_bytes:
            self.kept[index] = features
            self.free_bytes -= features.nbytes
        return features


def integers(text: str) -> list[int]:
    return list(dict.fromkeys(map(int, text.split(","))))  # each once, in order


@dataclass
class Options(RunOptions):
    """Train SimpleNet on normal images. On a GPU the paper's values are the defaults, but for
    --schedule."""

    command = "python -m baselines.simplenet"
    by_device = RunOptions.by_device | {"epochs", "batch_size"}
    backbone: str = option(
        "wide_resnet50_2", "the frozen trunk", choices=ARCHITECTURES, metavar="NAME"
    )
    backbone_weights: str | None = option(
        None, "its weights; by default the published ones are found", metavar="FILE"
    )
    image_size: list[int] | None = option(None, "H W, or one number; default 329, demo set 128")
    batch_size: int | None = option(None, f"images a step; {BATCH}, or {CPU_BATCH} on a CPU")
    epochs: int | None = option(None, f"default {EPOCHS}; {CPU_EPOCHS} without a GPU")
    steps: int | None = option(None, "instead of --epochs")
    lr: float = option(1e-4, "the adaptor's; the discriminator's is twice that")
    schedule: str = option(
        "cosine", "warm-up and half a cosine, or the paper's", choices=["constant", "cosine"]
    )
    noise: float = option(0.015, "standard deviation of the noise on features")
    no_adaptor: bool = option(False, "leave out the feature adaptor")
    layers: list[int] = option([2, 3], "default 2,3", type=integers, nargs=None, metavar="1,2,3")

    def __post_init__(self) -> None:
        cuda = pick_device(self.device).type == "cuda"
        if self.batch_size is None:
            self.batch_size = BATCH if cuda else CPU_BATCH
        super().__post_init__()
        self.image_size = self.image_size or ([128, 128] if self.data == "demo" else [329, 329])
        if self.resume:  # checked when the run began
            return
        if self.steps is None and self.epochs is None:
            self.epochs = EPOCHS if cuda else CPU_EPOCHS
        elif self.steps is not None and self.epochs is not None:
            raise OptionError("give --steps or --epochs")
        self.check_rate(self.lr)
        length = self.epochs if self.steps is None else self.steps
        if length < 1 or min(self.image_size) < 64 or not self.noise >= 0:
            raise OptionError("need --epochs or --steps >= 1, --image-size >= 64, --noise >= 0")
        if not self.layers or self.layers != sorted(set(self.layers) & {1, 2, 3}):
            raise OptionError("--layers takes some of 1,2,3 in this order")
        weights = self.backbone_weights
        if weights and not is_url(weights) and not Path(weights).exists():
            remedy = f"--backbone-weights takes the published weight file of {self.backbone}"
            raise ModelError(f"{weights}: no such file; {remedy}")


def train(options: Options) -> Path:
    """One run: the model of a category, in its run folder, which is returned."""
    device, size, n = torch.device(options.device), tuple(options.image_size), options.batch_size
    prepare_torch(options.seed)
    check_free(options)

    # Data: normal images, a tenth of them (or the set's own validation images) held out.
    normal = load_normal_images(options.data, size, options.seed, options.skip_bad_images)
    options.steps = options.steps or math.ceil(options.epochs * len(normal.training) / n)

    # The model. Adam learns adaptor and discriminator.
    choices = {"layers": options.layers, "noise": options.noise, "adaptor": not options.no_adaptor}
    if options.backbone in EFFICIENTNETS:  # σ is meant for ResNets: features spread a 30th as far
        choices["scale"] = 1 / 30
    model = SimpleNet(backbone=options.backbone, image_size=size, **choices)
    if not options.resume:
        model.load_backbone(options.backbone_weights)
    model = model.to(device, memory_format=torch.channels_last)
    groups = [{"params": list(model.adaptor.parameters()), "lr": options.lr}]
    groups += [{"params": list(model.discriminator.parameters()), "lr": 2 * options.lr}]
    optimizer = make_adam(groups, device)

    # The run folder: a new one, or as an interrupted run left it.
    run = Run(options, normal, model.format)
    run.attach(model, [optimizer])
    run.describe(f"{options.steps} steps of {n}", f"SimpleNet on {options.backbone}")

    # Training on the features of normal images. The sum of the losses is minimized.
    features, left = CachedFeatures(model, normal.training), range(run.step, options.steps)
    batches = batches_of(features, left, n, options.seed, 0)
    take_step = Step(lambda batch: model.losses(**batch), [optimizer], device, options.precision)
    model.train()
    for step in run.steps(options.steps):
        torch.manual_seed(options.seed * 1_000_003 + step)
        factor = cosine(step, options.steps) if options.schedule == "cosine" else 1
        set_rate([optimizer], factor)
        run.record(step, take_step({"features": next(batches)}), options.lr * factor)

    # Threshold and floor from the validation images.
    calibrate(model, normal.validation)
    return run.finish(model)


def main(argv: list[str] | None = None) -> Path:
    argv = refuse_several_runs(argv, "--model simplenet")
    return train(parse_options(Options, USAGE, argv))


if __name__ == "__main__":
    run_command(main, "baselines.simplenet")
