"""SimpleNet: a simple network for image anomaly detection and localization (Liu, Zhou, Xu, Wang, arXiv 2303.15140).

The second system of the comparison, behind the interface of `EfficientAD`: needs torch, backbone.py and efficientad.py. Read it
from top to bottom: losses, then `SimpleNet`.

    model = SimpleNet(backbone="wide_resnet50_2", image_size=(329, 329))
    model.load_backbone("wide_resnet50_2-95faca4d.pth")          # torchvision's published file
    losses = model.losses(model.features(batch))                 # batch: uint8 or float N×3×329×329, normal images
    sum(losses.values()).backward()                              # train.py has the loop
    model.calibrate(validation_batches)                          # normal images held out of training
    map, score = model.eval()(images)                            # N×1×329×329 and N; anomalous where score > model.threshold
    model.save("model.pt"); model = SimpleNet.load("model.pt")

Training distinguishes the features of normal images from the same features with Gaussian noise; that classifier scores test images.
"""

import copy
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import PatchFeatures, ResNet, WeightsError, fold_batch_norms, load_weights
from efficientad import IMAGENET_MEAN, IMAGENET_STD, ModelError, cpu_has_bf16, read_model, write_checkpoint

CHANNELS, HIDDEN = 1536, 1024  # of a feature, of the discriminator's hidden layer


def crop_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """The centre that the network sees: 288 of 329 pixels as published, in this proportion for another size, rounded down to a
    multiple of 8 (layer 2's stride). Raises ValueError below 64 pixels."""
    if min(image_size) < 64:
        raise ValueError(f"SimpleNet needs an image height and width of at least 64, got {image_size}")
    return tuple(s * 288 // 329 // 8 * 8 for s in image_size)


def truncated_l1_losses(real: Tensor, fake: Tensor, th: float = 0.5) -> dict[str, Tensor]:
    """The two loss terms: mean max(0, th − D(real)) and mean max(0, th + D(fake)), float32 scalars. A feature that is judged
    rightly by more than th has no gradient."""
    return {"real": (th - real.float()).clamp(min=0).mean(), "fake": (th + fake.float()).clamp(min=0).mean()}


class SimpleNet(nn.Module):
    """Frozen trunk, patch features, adaptor and discriminator, with all that is needed to score an image.

    `backbone`: an architecture of backbone.py; `layers`: those of its layers 1, 2, 3 that are used; `image_size`: (H, W) from 64
    on, of which the network sees the centre, `crop_size`; `adaptor`: False leaves it out; `noise`: σ, used in training only.
    Images are RGB N×3×H×W, uint8 0–255 or float 0–1; they are normalized here. Raises ValueError for an impossible option.

    Buffers: threshold, the score above which an image is called anomalous (infinite until `calibrate`); floor, the median of the
    validation images' maps: an ordinary position's value (scores are −D, so they have no natural zero)."""

    def __init__(self, *, backbone: str = "wide_resnet50_2", image_size: tuple[int, int] = (329, 329),
                 layers: Sequence[int] = (2, 3), adaptor: bool = True, noise: float = 0.015):  # fmt: skip
        super().__init__()
        image_size, layers = tuple(image_size), tuple(layers)
        self.config = {"backbone": backbone, "image_size": image_size, "layers": layers, "adaptor": adaptor, "noise": noise}
        self.training_info: dict = {}  # how it was trained; saved, never used here
        self.image_size, self.crop, self.noise = image_size, crop_size(image_size), noise
        self.patch_features = PatchFeatures(ResNet(backbone), CHANNELS, CHANNELS, layers)
        self.adaptor = nn.Linear(CHANNELS, CHANNELS) if adaptor else None
        self.discriminator = nn.Sequential(
            nn.Linear(CHANNELS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1, bias=False)
        )
        for module in (self.adaptor, *self.discriminator):
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
        x = torch.arange(-16, 17).float()  # four standard deviations to either side
        blur = torch.exp(-0.5 * (x / 4).square())
        self.register_buffer("threshold", torch.tensor(math.inf))
        self.register_buffer("floor", torch.tensor(0.0))
        self.register_buffer("blur", blur / blur.sum(), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    # ---- inference

    def normalize(self, images: Tensor) -> Tensor:
        """RGB N×3×H×W, uint8 0–255 or float 0–1 -> float32, the centre crop, with ImageNet's mean and standard deviation. Raises
        ValueError for another shape, TypeError for another dtype."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(f"images must be N×3×{self.image_size[0]}×{self.image_size[1]}, got {tuple(images.shape)}")
        (top, left), (h, w) = self.rim(), self.crop
        images = images[:, :, top : top + h, left : left + w]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise TypeError(f"images must be uint8 (0–255) or float (0–1), got {images.dtype}")
        return (images.float() - self.mean) / self.std

    def rim(self) -> tuple[int, int]:
        """Rows above and columns left of the crop."""
        return tuple((s - c) // 2 for s, c in zip(self.image_size, self.crop))

    def features(self, images: Tensor) -> Tensor:
        """Images N×3×H×W -> patch features N×1536×h×w, no gradient; 36×36 for the published 288×288 crop."""
        x = self.normalize(images).to(self.patch_features.trunk.conv1.weight.dtype)
        return self.patch_features(x.contiguous(memory_format=torch.channels_last))

    def raw_map(self, images: Tensor) -> Tensor:
        """−D at every position, float32 N×1×h×w."""
        x = self.features(images).permute(0, 2, 3, 1)  # a view: features are channels last
        n, h, w, _ = x.shape
        x = x.reshape(n * h * w, CHANNELS)
        x = x if self.adaptor is None else self.adaptor(x)
        return -self.discriminator(x).float().view(n, 1, h, w)

    def resize(self, m: Tensor) -> Tensor:
        """Raw map N×1×h×w -> N×1×H×W: bilinear to the crop, repeated at its edges out to the image's, Gaussian blur with σ = 4
        pixels. The network has seen nothing outside the crop; the map says there what it says at the crop's edge."""
        m = F.interpolate(m, self.crop, mode="bilinear")
        (top, left), r = self.rim(), len(self.blur) // 2
        bottom, right = (s - c - rim for s, c, rim in zip(self.image_size, self.crop, (top, left)))
        m = F.pad(m, (left + r, right + r, top + r, bottom + r), mode="replicate")
        return F.conv2d(F.conv2d(m, self.blur.view(1, 1, -1, 1)), self.blur.view(1, 1, 1, -1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """RGB N×3×H×W, uint8 0–255 or float 0–1 -> anomaly map N×1×H×W and anomaly score N, the largest −D. The score is taken
        before resizing and blurring, so it is at least the map's maximum."""
        m = self.raw_map(images)
        return self.resize(m), m.amax((1, 2, 3))

    def optimize(self, precision: str = "auto", batch_sizes: tuple[int, ...] = (1,)) -> "SimpleNet":
        """A copy for inference with the same interface: batch norms and the adaptor multiplied into the layers beside them, and
        weights in `precision` "fp16", "bf16" or "fp32", channels last; "auto" is fp16 on a GPU, and on a CPU bf16 if it has
        instructions for that, else fp32. On a GPU a batch of one of `batch_sizes` is one CUDA graph launch (fast.py, which must
        lie beside this file). Call it on the device that it shall run on; it cannot be trained."""
        device = self.threshold.device
        if precision == "auto":
            precision = "fp16" if device.type == "cuda" else "bf16" if cpu_has_bf16(device) else "fp32"
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
        if precision not in dtypes:
            raise ValueError(f"precision must be one of auto, {', '.join(dtypes)}, got {precision!r}")
        model = copy.deepcopy(self).eval().requires_grad_(False)
        fold_batch_norms(model.patch_features.trunk)
        linear, norm = model.discriminator[:2]
        linear.weight.data, linear.bias.data = model.first_layer()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        linear.weight.data *= scale[:, None]
        linear.bias.data = (linear.bias - norm.running_mean) * scale + norm.bias
        model.adaptor, model.discriminator[1] = None, nn.Identity()
        for part in (model.patch_features, model.discriminator):
            part.to(dtypes[precision], memory_format=torch.channels_last)
        if device.type == "cuda":
            from fast import BatchGraphs  # here: CPUs can do without

            model.forward = BatchGraphs(model.forward, model.image_size, device, batch_sizes)
        return model

    # ---- training

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Weight 1024×1536 and bias of adaptor and discriminator's first layer in one: no nonlinearity stands between them."""
        linear = self.discriminator[0]
        if self.adaptor is None:
            return linear.weight, linear.bias
        return linear.weight @ self.adaptor.weight, F.linear(self.adaptor.bias, linear.weight, linear.bias)

    def losses(self, features: Tensor) -> dict[str, Tensor]:
        """The two loss terms of a step, by name; their sum is minimized. `features` N×1536×h×w, any float dtype, of normal images.
        Fake features are the adapted ones plus noise N(0, σ²); the batch norm sees both together.

        Computed as W(Ax + n) = (WA)x + Wn, with the adaptor A and the discriminator's first layer W. It is the same function
        and gradient with half the arithmetic (no gradient with respect to a feature is ever needed), and keeps the
        small difference Wn, which bf16 would blur by rounding Ax + n."""
        x = features.permute(0, 2, 3, 1).reshape(-1, CHANNELS).float()
        n = torch.randn(x.shape, device=x.device) * self.noise
        real = F.linear(x, *self.first_layer()).float()
        fake = real + F.linear(n, self.discriminator[0].weight).float()
        with torch.autocast(x.device.type, enabled=False):
            d = self.discriminator[1:](torch.cat([real, fake]))
        return truncated_l1_losses(*d.split(len(x)))

    def parameter_groups(self, lr: float = 1e-4) -> list[dict]:
        """For the optimizer: the adaptor learns with `lr`, the discriminator with twice that."""
        groups = [{"params": list(self.discriminator.parameters()), "lr": 2 * lr}]
        return groups if self.adaptor is None else [{"params": list(self.adaptor.parameters()), "lr": lr}, *groups]

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> Tensor:
        """Set threshold and floor from normal images held out of training (batches N×3×H×W) and return their scores. The threshold
        is the highest score of these images: of n + 1 normal images, the new one exceeds it with probability 1/(n + 1). Switches
        to eval mode. Raises ValueError without an image, and ModelError if a map is constant or not a number."""
        self.eval()
        raw = [self.raw_map(batch) for batch in batches]
        if not raw:
            raise ValueError("calibration needs at least one image")
        scores, values = torch.cat([m.amax((1, 2, 3)) for m in raw]), torch.cat([m.flatten() for m in raw])
        if not bool(scores.max() > values.median()):
            raise ModelError("the anomaly map is constant or not a number on the validation images: train anew")
        self.threshold.copy_(scores.max())
        self.floor.copy_(values.median())
        return scores

    # ---- files

    def load_backbone(self, path: str) -> None:
        """Load torchvision's weight file of the backbone. Its convolutions are rounded to half precision, as `save` stores them, so
        that a saved model computes what the trained one did. Raises ModelError if the file is missing, damaged or of
        another architecture."""
        trunk = self.patch_features.trunk
        try:
            load_weights(trunk, path)
        except WeightsError as error:
            raise ModelError(str(error)) from None
        for tensor in trunk.state_dict().values():
            if tensor.ndim == 4:
                tensor.copy_(tensor.half())
            if not bool(tensor.isfinite().all()):
                raise ModelError(f"{path}: has weights that are not finite in half precision; download it again")

    def save(self, path: str) -> None:
        """Write config, weights, threshold and training_info to one file that `torch.load(weights_only=True)` reads. The backbone
        is in it, once, its convolutions in half precision (50 MB for wide_resnet50_2): the file scores images by itself, and no
        other file can go missing or differ. Written under a temporary name and renamed."""
        state = {k: v.half() if k.startswith("patch_features.") and v.ndim == 4 else v for k, v in self.state_dict().items()}
        write_checkpoint({"format": "simplenet", "config": self.config, "training": self.training_info, "state": state}, path)

    @classmethod
    def load(cls, path: str) -> "SimpleNet":
        """Read a model that `save` wrote, on the CPU, in eval mode. Executes no code from the file. Raises ModelError if it
        is missing, damaged, not finite or of another program."""
        return read_model(cls, "simplenet", path)


class CachedFeatures:
    """The patch features of `images` (of data.py: uint8 arrays 3×H×W by index) by index, float16 h×w×1536 on the model's device:
    computed on first use, and kept while they fit into `cache_bytes` (a 36×36 grid takes 4 MB, so 1,000 images), else computed
    anew. Always of one image alone and in fp32, so that a feature depends neither on what is kept nor on the step's precision."""

    def __init__(self, model: SimpleNet, images: Sequence, cache_bytes: int = 4 * 2**30):
        self.model, self.images, self.kept, self.room = model, images, {}, cache_bytes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        image = torch.as_tensor(self.images[index])[None].to(self.model.threshold.device)
        features = self.model.features(image)[0].permute(1, 2, 0).half().contiguous()  # they lie channels last already
        if features.nbytes <= self.room:
            self.kept[index] = features
            self.room -= features.nbytes
        return features
