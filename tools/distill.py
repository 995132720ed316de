"""Make a teacher: distil pretrained networks into a patch description network (section 3.1).

    python -m tools.distill --images imagenet/train         # the paper's; others: weights/README.md
    torchrun --nproc-per-node 8 -m tools.distill ...        # the same on eight GPUs

The backbone sees the image at twice the PDN's size, so that its layer 2 has the PDN's output grid
(512² and 256² give 64²). Under torchrun each process takes its share of every batch: any number of
them learns the same. The first one writes.
"""

import dataclasses
import datetime
import glob
import json
import math
import os
import sys
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from efficientad import CHANNELS, IMAGENET_MEAN, IMAGENET_STD, PDN, ModelError, channel_statistics
from support.backbone import (
    ARCHITECTURES,
    PatchFeatures,
    fold_batch_norms,
    load_weights,
    make_trunk,
)
from support.checkpoints import all_finite, filling, load_teacher, read_checkpoint, write_checkpoint
from support.fast import has_bf16
from support.images import DataError, in_threads, list_images, read_image
from support.optimizers import cosine, make_optimizers, matrices_of, set_rate
from support.options import OptionError, option, parse_options, pick_device
from support.runs import Interrupt, Log, LossCheck, fingerprint, lock, remove_leftovers, run_command
from support.training import permutation, prepare_torch

USAGE = "python -m tools.distill --images DIR [DIR ...] [options]"
# What torchrun says: number and count of the processes, of all and of this host.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@dataclasses.dataclass
class Options:
    """Distil pretrained networks into a teacher of EfficientAD. Defaults are the paper's values."""

    images: list[str] = option([], "folders of photos, at any depth", metavar="DIR", required=True)
    backbone: list[str] = option(
        ["wide_resnet101_2"],
        "what is distilled: wide_resnet101_2 as in the paper, or others, which share the channels",
        choices=ARCHITECTURES,
        metavar="NAME",
    )
    backbone_weights: list[str] | None = option(
        None, "their files, in turn; by default the published ones are found", metavar="FILE"
    )
    size: str = option("small", "size of the teacher", choices=["small", "medium"])
    start: str | None = option(None, "begin with this teacher's weights", metavar="FILE")
    steps: int = option(60000, "steps of the optimizer")
    batch_size: int = option(16, "images a step, of all processes together")
    lr: float = option(1e-4, "learning rate")
    optimizer: str = option("adam", "muon: for all layers but the first", choices=["adam", "muon"])
    schedule: str = option("constant", "how the learning rate goes", choices=["constant", "cosine"])
    image_size: int = option(256, "the PDN's input; the backbone sees twice that")
    interior: bool = option(
        False, "loss only where the 33×33 patch lies inside the view: no padding"
    )
    crops: list[float] | None = option(
        None, "random crops of this share of a photo, with flips", nargs=2, metavar=("MIN", "MAX")
    )
    statistics_images: int = option(10000, "views that normalize the features")
    cache_gib: float = option(8.0, "a host's memory for decoded photos")
    precision: str = option(
        "auto",
        "of the step; auto: bf16 if the hardware has it; the paper names none",
        choices=["auto", "bf16", "fp32"],
    )
    device: str | None = option(None, "cuda or cpu; default cuda if there is one")
    seed: int = option(0, "seed of all random choices")
    out: str | None = option(None, "default runs/distill-SIZE/teacher_SIZE.pt", metavar="FILE")
    checkpoint_every: int = option(500, "steps between two saved states")
    resume: bool = option(False, "go on from FILE.resume, with the same options")

    def __post_init__(self) -> None:
        if WORLD > 1 and (self.device or "cuda").startswith("cuda") and torch.cuda.is_available():
            self.device = f"cuda:{LOCAL_RANK}"
        self.device = str(pick_device(self.device))
        if self.precision == "auto":
            self.precision = "bf16" if has_bf16(torch.device(self.device)) else "fp32"
        self.out = self.out or f"runs/distill-{self.size}/teacher_{self.size}.pt"
        if min(self.steps, self.batch_size, self.statistics_images, self.checkpoint_every) < 1:
            counts = "--steps, --batch-size, --statistics-images and --checkpoint-every"
            raise OptionError(f"{counts} must be at least 1")
        if not 0 < self.lr < math.inf or not 0 <= self.seed < 2**32:
            raise OptionError("need --lr > 0, --seed >= 0 and < 2**32")
        if self.image_size % 32 or self.image_size < 32:
            raise OptionError("--image-size must be a multiple of 32")
        if self.image_size < 64 and self.interior:
            raise OptionError("--interior needs --image-size 64 or more")
        if len(self.backbone_weights or ()) > len(self.backbone):
            raise OptionError("--backbone-weights has more files than --backbone has names")
        if CHANNELS % (2 * len(self.backbone)):
            raise OptionError("--backbone takes 1, 2, 3, 4 or 6 names")
        if self.batch_size % WORLD:
            raise OptionError(f"--batch-size must be a multiple of the {WORLD} processes")
        if self.crops and not 0 < self.crops[0] <= self.crops[1] <= 1:
            raise OptionError("--crops needs 0 < MIN <= MAX <= 1")
        if Path(self.out).exists():
            raise DataError(f"{self.out}: exists; choose another --out or remove it")
        if Path(f"{self.out}.resume").exists() and not self.resume:
            remedy = "go on with --resume, or remove it"
            raise DataError(f"{self.out}.resume: an interrupted distillation; {remedy}")

    def saved(self) -> dict:
        """The options that decide what is learned."""
        others = ("device", "resume", "out", "checkpoint_every", "cache_gib", "images")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in others}


class Views:
    """What step after step sees: index i -> (the PDN's input uint8 3×S×S, the backbone's uint8
    3×2S×2S), a function of the seed and i. Every epoch is a new permutation of the photos. A view
    is the whole photo, or a random crop that covers a share of its area within `crops`, flipped
    with probability 0.5. Both inputs are gray with probability 0.1."""

    def __init__(self, paths: list[Path], options: Options):
        self.paths, self.options, self.decoded = paths, options, {}
        again = options.steps * options.batch_size > len(paths)  # else each is seen once
        self.room = again * options.cache_gib * 2**30 / LOCAL_WORLD

    def photo(self, p: int) -> Image.Image:
        """Photo p, decoded; kept while there is room."""
        try:
            image = self.decoded.get(p) or read_image(self.paths[p])
        except DataError as error:
            remedy = "to go on with --resume, put a readable photo of this name there"
            raise DataError(f"{error}; {remedy}") from None
        if p not in self.decoded and self.room > 0:
            self.decoded[p] = image
            self.room -= 4 * image.width * image.height
        return image

    def __getitem__(self, i: int) -> list[np.ndarray]:
        options, box, inputs = self.options, None, []
        epoch, position = divmod(i, len(self.paths))
        p = int(permutation(len(self.paths), options.seed, epoch)[position])
        rng, image = np.random.default_rng((options.seed, p, epoch)), self.photo(p)
        if options.crops:  # the aspect is from 3:4 to 4:3
            area = image.width * image.height * rng.uniform(*options.crops)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width = min(math.sqrt(area * ratio), image.width)
            height = min(math.sqrt(area / ratio), image.height)
            x, y = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
            box = (x, y, x + width, y + height)
        if rng.random() < 0.1:
            image = image.convert("L").convert("RGB")
        flip = options.crops and rng.random() < 0.5
        for side in (options.image_size, 2 * options.image_size):
            resized = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
            pixels = np.asarray(resized).transpose(2, 0, 1)
            inputs.append(pixels[..., ::-1] if flip else pixels)
        return inputs

    def batches(self, indices: range, name: str, share: slice = slice(None)) -> tqdm:
        """The views of these indices in batches, of each one the share: uint8 N×3×S×S and
        N×3×2S×2S, under a progress bar. Raises DataError for a photo that cannot be read."""
        n, threads = self.options.batch_size, ((os.cpu_count() or 1) - 2) // LOCAL_WORLD
        steps = range(indices.start // n, math.ceil(indices.stop / n))

        def batch(step: int) -> list[Tensor]:
            views = [self[i] for i in range(step * n, min((step + 1) * n, indices.stop))[share]]
            return [torch.from_numpy(np.stack(inputs)) for inputs in zip(*views)]

        prepared = in_threads(batch, steps, max(1, min(12, threads)))
        return tqdm(prepared, name, steps.stop, initial=steps.start, disable=RANK > 0)


def held_out_of(paths: list[Path]) -> list[Path]:
    """The photos that measure the loss and are not learned: every 40th, and of 2,700 or more 64
    that are spread over all of them."""
    every = 40 if len(paths) < 2700 else len(paths) // 64
    return paths[::every][:64] if len(paths) >= 40 else []


class Distillation:
    """A teacher in the making: photos, networks, optimizer, and the files of the run, locked."""

    def __init__(self, options: Options):
        self.options, self.step, self.check = options, 0, LossCheck(options.out)
        self.seconds = 0.0
        self.out, self.state_file = Path(options.out), Path(f"{options.out}.resume")
        self.log_file = Path(f"{options.out.removesuffix('.pt')}.jsonl")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            self.lock = lock(self.out.with_name(f".{self.out.name}.lock"))
            for path in (self.out, self.state_file, self.log_file):
                remove_leftovers(self.out.parent, glob.escape(path.name))
        found = [list_images(root, recursive=True) for root in options.images]
        self.photos = [*map(fingerprint, found, options.images)]
        paths = [path for part in found for path in part]
        unseen = held_out_of(paths)
        self.held_out, unseen = Views(unseen, options), set(unseen)
        self.views = Views([path for path in paths if path not in unseen], options)

        self.device = device = torch.device(options.device)
        self.features = nn.ModuleList()
        for name, file in zip_longest(options.backbone, options.backbone_weights or ()):
            trunk = make_trunk(name).eval()
            load_weights(trunk, file)
            fold_batch_norms(trunk)
            self.features.append(PatchFeatures(trunk, CHANNELS // len(options.backbone)))
        self.features.to(device, memory_format=torch.channels_last)
        self.pdn = PDN(options.size, padding=not options.interior)
        if options.start and not (options.resume and self.state_file.exists()):
            load_teacher(self.pdn, options.size, options.start)
        self.pdn.to(device, memory_format=torch.channels_last)
        matrices = matrices_of(self.pdn) if options.optimizer == "muon" else []
        self.optimizers = make_optimizers(self.pdn.parameters(), options.lr, matrices, options.lr)
        constants = (IMAGENET_MEAN, IMAGENET_STD)  # copied once: a copy in each step would wait
        self.imagenet = [torch.tensor(v, device=device).view(1, 3, 1, 1) for v in constants]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 N×3×H×W -> float32 with ImageNet's mean and standard deviation, on the device."""
        images = images.pin_memory() if self.device.type == "cuda" else images
        x = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        mean, std = self.imagenet
        return (x.float() / 255 - mean) / std

    def compute(self, network: nn.Module, images: Tensor) -> Tensor:
        """The float32 output of backbone or PDN for uint8 images, in the step's precision."""
        half = self.options.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return network(self.normalize(images)).float()

    def target(self, large: Tensor) -> Tensor:
        """Features with mean 0 and variance 1 in each channel, on the PDN's grid: uint8 N×3×2S×2S
        -> N×384×S/4×S/4, or S/4 − 8 in the interior."""
        features = (self.measure(large) - self.mean) / self.std
        return features[..., 4:-4, 4:-4] if self.options.interior else features

    def measure(self, large: Tensor) -> Tensor:
        """The features of the backbones, side by side."""
        return torch.cat([self.compute(features, large) for features in self.features], 1)

    def begin(self) -> None:
        """Take the saved state, or measure mean and standard deviation of the features."""
        if self.options.resume and self.state_file.exists():
            return self.restore(read_checkpoint(self.state_file))
        if self.options.resume:
            print(f"{self.state_file}: nothing saved yet, begins at step 0", file=sys.stderr)
        count = min(self.options.statistics_images, len(self.views.paths))
        batches = self.views.batches(range(count), "feature statistics")
        features = (self.measure(large) for _, large in batches)
        self.mean, self.std = channel_statistics(features)
        self.started = time.time()
        if RANK == 0:
            self.save()  # the statistics took a while

    def restore(self, state: dict) -> None:
        """Go on where the interrupted run was. Raises ModelError or DataError if it was another."""
        file = self.state_file
        if state.get("options") != self.options.saved():
            remedy = "repeat the command that made it, with --resume"
            raise ModelError(f"{file}: made with other options; {remedy}")
        if state.get("photos") != self.photos:
            changed = f"{self.options.images[0]}: other photos than when the run began"
            raise DataError(f"{changed}; put them back, or remove {file}")
        with filling(f"{file}: damaged; remove it and start again"):
            self.step, self.seconds = state["step"], state["seconds"]
            self.mean, self.std = (state[name].to(self.device) for name in ("mean", "std"))
            self.pdn.load_state_dict(state["pdn"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]  # a rate on the GPU stays there
                optimizer.load_state_dict({**saved, "param_groups": groups})
            torch.set_num_threads(state["threads"])  # sums depend on it in their last bits

    def save(self) -> None:
        """Write FILE.resume: all that the later steps depend on. Raises ModelError if a loss or a
        weight is not finite."""
        self.check.look(self.step - 1)
        if not all_finite(self.pdn.parameters()):
            reason = "it left weights that are not finite; lower --lr and start again"
            raise ModelError(f"{self.out}: step {self.step - 1}: {reason}")
        state = {"step": self.step, "options": self.options.saved(), "photos": self.photos}
        state |= {"mean": self.mean, "std": self.std, "pdn": self.pdn.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        state |= {"seconds": self.elapsed(), "threads": torch.get_num_threads()}
        write_checkpoint(state, self.state_file)

    def elapsed(self) -> float:
        """Seconds of all steps so far, those before an interruption too."""
        return self.seconds + time.time() - self.started

    def train(self) -> None:
        """The steps that are left. Ctrl-C saves the state and ends the process; under torchrun all
        processes end after the same step, the next one that is logged."""
        options, n = self.options, self.options.batch_size
        if WORLD > 1:
            seen = [None] * WORLD
            dist.all_gather_object(seen, (str(self.photos), self.step))
            if len(set(seen)) > 1:
                differ = "the hosts see other photos, or another interrupted run"
                raise DataError(f"{self.out}: {differ}; they take a common file system")
        network = nn.parallel.DistributedDataParallel(self.pdn) if WORLD > 1 else self.pdn
        left, own = range(self.step * n, options.steps * n), slice(RANK, None, WORLD)
        batches = self.views.batches(left, "distilling", own)
        self.log = Log(self.log_file, self.step) if RANK == 0 else None
        self.started = time.time()
        with Interrupt() as interrupt:
            for small, large in batches:
                factor = cosine(self.step, options.steps) if options.schedule == "cosine" else 1
                set_rate(self.optimizers, factor)
                loss = F.mse_loss(self.compute(network, small), self.target(large))
                self.pdn.zero_grad()
                loss.backward()
                for optimizer in self.optimizers:
                    optimizer.step()
                self.check.add(loss)
                stopping = interrupt.asked and WORLD == 1
                if self.step % 20 == 0 or self.step == options.steps - 1:
                    news = torch.stack([loss.detach(), loss.new_tensor(interrupt.asked)])
                    if WORLD > 1:
                        dist.all_reduce(news)
                    self.check.look(self.step)
                    mean, stopping = news[0].item() / WORLD, news[1].item() > 0
                    batches.set_postfix(loss=f"{mean:.4f}")
                    entry = {"step": self.step, "loss": mean, "lr": options.lr * factor}
                    if RANK == 0:
                        self.log.add({**entry, "seconds": self.elapsed()})
                self.step += 1
                if RANK == 0 and (stopping or self.step % options.checkpoint_every == 0):
                    self.save()
                if stopping:
                    if WORLD > 1:  # torchrun ends all processes when the first one ends
                        dist.barrier()
                    remedy = "go on with the same command and --resume"
                    print(f"\ninterrupted after {self.step} steps; {remedy}", file=sys.stderr)
                    raise SystemExit(130)

    @torch.no_grad()
    def finish(self) -> None:
        """Measure the loss on the held-out photos, and write the teacher in half precision."""
        self.save()
        result, errors = {"step": self.step, "seconds": self.elapsed()}, []
        for small, large in self.held_out.batches(range(len(self.held_out.paths)), "held-out loss"):
            output = self.pdn(self.normalize(small))
            errors += (output - self.target(large)).square().mean((1, 2, 3)).tolist()
        if errors:
            result["held_out_loss"] = sum(errors) / len(errors)
        self.log.add(result)
        print(json.dumps(result))
        state = self.pdn.state_dict()
        write_checkpoint({k: v.half().contiguous().cpu() for k, v in state.items()}, self.out)
        self.state_file.unlink(missing_ok=True)
        print(f"wrote {self.out}")


def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, USAGE, argv)
    prepare_torch(options.seed)
    if WORLD > 1:
        cuda = options.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(options.device)
        hour = datetime.timedelta(hours=1)  # listing and measuring photos may take long
        dist.init_process_group("nccl" if cuda else "gloo", timeout=hour)
    run = Distillation(options)
    run.begin()
    run.train()
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK == 0:
        run.finish()


if __name__ == "__main__":
    run_command(main, "tools.distill")
