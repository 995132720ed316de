"""Train EfficientAD on a category, or on each one of a collection (sections 3.2 to 3.4 of arXiv 2303.14535).

    python train.py                                  # the built-in demo set
    python train.py --data mvtec/bottle              # then: python evaluate.py
    python train.py --data mvtec_loco/pushpins --size medium --pretraining-images imagenet/train
    python train.py --resume runs/bottle-small       # go on after an interruption
    python train.py --data mvtec --seeds 0,1,2       # every category × seed; the same command goes on after an interruption
    torchrun --nproc-per-node 4 train.py --data visa # the same, shared by four GPUs
    python train.py --data mvtec/bottle --ablation   # the trainings behind the paper's tables 3 to 5
    python train.py --model simplenet --data mvtec/bottle --backbone-weights FILE    # SimpleNet, arXiv 2303.15140

Every random choice of a step is a function of the seed and the step's number, so a resumed run equals an uninterrupted one.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backbone import ARCHITECTURES
from data import DataError, Images, PhotographCrops, list_images, open_category, range_of
from efficientad import (
    CHANNELS,
    EfficientAD,
    ModelError,
    all_finite,
    check_image_size,
    cpu_has_bf16,
    false_alarms,
    pick_device,
    read_checkpoint,
    write_checkpoint,
)
from fast import Graphed
from runs import (
    check_losses,
    fingerprint,
    holds_results,
    list_jobs,
    lock,
    log_entry,
    new_run_folder,
    open_log,
    remove_leftovers,
    write,
)
from simplenet import CachedFeatures, SimpleNet, crop_size

PAPER_STEPS, CPU_STEPS = 70000, 1500
PAPER_LR, SHORT_LR = 1e-4, 3e-4  # for runs below 10,000 steps: learned faster on bottle
KEPT_BYTES = 2 * 2**30  # on the device, each: decoded training images, and the teacher's outputs for them
SIMPLENET_EPOCHS, SIMPLENET_CPU_EPOCHS = 160, 40
OWN_OPTIONS = {  # of one model alone
    "efficientad": ("size", "teacher", "pretraining_images", "padding", "p_hard", "a", "b", "map_normalization"),
    "simplenet": ("backbone", "backbone_weights", "epochs", "noise", "no_adaptor", "layers"),
}


def integers(text: str) -> list[int]:
    return list(dict.fromkeys(map(int, text.split(","))))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a run; with --resume those of the interrupted run. Exits with status 2 on an impossible option."""
    p = argparse.ArgumentParser(description="Train EfficientAD or SimpleNet on normal images.", argument_default=argparse.SUPPRESS)
    p.add_argument("--data", help="a category (MVTec AD, MVTec LOCO, VisA), a folder of normal images, 'demo' (default), or a"
                   " folder of categories: then one run each in runs/DATA/, finished ones skipped, interrupted ones resumed")
    p.add_argument("--categories", metavar="A,B", help="of a folder of categories only these")
    p.add_argument("--seeds", type=integers, metavar="0,1,2", help="a run for each seed, into runs/DATA/ as well")
    p.add_argument("--ablation", action="store_true", help="the trainings that the paper's tables 3 to 5 need on a category, into"
                   " runs/DATA-SIZE-ablation/; for SimpleNet noise, adaptor and layers")
    p.add_argument("--model", choices=["efficientad", "simplenet"], help="default efficientad")
    p.add_argument("--size", choices=["small", "medium"], help="EfficientAD-S (default) or EfficientAD-M")
    p.add_argument("--steps", type=int, help=f"default {PAPER_STEPS} as in the paper; {CPU_STEPS} without a GPU")
    p.add_argument("--epochs", type=int, help=f"SimpleNet, instead of --steps: default {SIMPLENET_EPOCHS} as in the paper;"
                   f" {SIMPLENET_CPU_EPOCHS} without a GPU")
    p.add_argument("--backbone", choices=ARCHITECTURES, help="SimpleNet: default wide_resnet50_2, the paper's")
    p.add_argument("--backbone-weights", metavar="FILE", help="SimpleNet: torchvision's weight file of the backbone")
    p.add_argument("--noise", type=float, help="SimpleNet: standard deviation of the noise on features; default 0.015")
    p.add_argument("--no-adaptor", action="store_true", help="SimpleNet: without the feature adaptor")
    p.add_argument("--layers", type=integers, metavar="2,3", help="SimpleNet: layers of the backbone, of 1, 2, 3; default 2,3")
    p.add_argument("--teacher", help="teacher file; default weights/teacher_SIZE.pt beside this script")
    p.add_argument("--pretraining-images", help="folder of photos for the pretraining penalty, or 'none' for no penalty;"
                   " default: random crops of the two photographs that scikit-learn ships")
    p.add_argument("--image-size", type=int, nargs="+", help="H W, or one number for both; multiples of 32 from 128;"
                   " default 256, but 128 for the demo set; SimpleNet: anything from 64, default 329, but 128")
    p.add_argument("--padding", action="store_true", help="zero padding inside teacher and student; the paper has none")
    p.add_argument("--batch-size", type=int, help="default 1, the paper's; SimpleNet 8")
    p.add_argument("--lr", type=float, help="Adam's learning rate, × 0.1 at 95 %% of the steps; default 1e-4 as in the paper;"
                   " 3e-4 below 10,000 steps; SimpleNet: the adaptor's, constant, default 1e-4; the discriminator's is twice that")
    p.add_argument("--p-hard", type=float, help="mining factor of the hard feature loss; default 0.999; 0 disables it")
    p.add_argument("--a", type=float, help="map normalization: the quantile that becomes 0; default 0.9")
    p.add_argument("--b", type=float, help="map normalization: the quantile that becomes 0.1; default 0.995")
    p.add_argument("--map-normalization", choices=["quantile", "gaussian"], help="gaussian: the ablation's baseline")
    p.add_argument("--seed", type=int, help="default 0")
    p.add_argument("--device", help="cuda or cpu; default cuda if there is one")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], help="of the training step; auto: bf16 where the hardware"
                   " has it. Losses, optimizer, calibration and evaluation are always fp32")
    p.add_argument("--out", help="run folder; default runs/DATA-SIZE, or …-2, …-3 if that exists")
    p.add_argument("--skip-bad-images", action="store_true", help="leave out images that cannot be read, and list them, instead of"
                   " stopping")
    p.add_argument("--checkpoint-every", type=float, metavar="SECONDS", help="default 60")
    p.add_argument("--resume", metavar="DIR", help="go on with the interrupted run in this folder; takes no other option but"
                   " --device")
    given = vars(p.parse_args(argv))
    defaults = dict(data="demo", categories=None, seeds=None, ablation=False, model="efficientad", size="small", steps=None,
                    teacher=None, pretraining_images=None, image_size=None, padding=False, batch_size=None, lr=None, p_hard=0.999,
                    a=0.9, b=0.995, map_normalization="quantile", seed=0, device=None, precision="auto", out=None,
                    skip_bad_images=False, checkpoint_every=60.0, resume=None, epochs=None, backbone="wide_resnet50_2",
                    backbone_weights=None, noise=0.015, no_adaptor=False, layers=[2, 3])  # fmt: skip

    if "resume" in given:
        if given.keys() - {"resume", "device"}:
            p.error("--resume takes its options from the run; give no other option but --device with it")
        folder = Path(given["resume"])
        if not (folder / "resume.pt").exists() and (folder / "model.pt").exists():
            raise ModelError(f"{folder}: this run is complete; evaluate it with: python evaluate.py --run {folder}")
        if folder.is_dir() and not (folder / "resume.pt").exists() and not holds_results(folder) and any(folder.iterdir()):
            raise ModelError(f"{folder}: interrupted before anything was saved; start it again, with --out {folder}")
        state = read_checkpoint(str(folder / "resume.pt"))
        if state.get("format") != "efficientad-resume":
            raise ModelError(f"{folder / 'resume.pt'}: not a training state of this program")
        return argparse.Namespace(**{**defaults, **state["options"], **given, "resume": str(folder)})

    args = argparse.Namespace(**{**defaults, **given})
    args.device = str(pick_device(args.device))
    simplenet = args.model == "simplenet"
    foreign = [k for name, own in OWN_OPTIONS.items() if name != args.model for k in own if k in given]
    if foreign:
        p.error(f"--{foreign[0].replace('_', '-')} is no option of --model {args.model}")
    if simplenet:
        if args.epochs is None and args.steps is None:
            args.epochs = SIMPLENET_EPOCHS if args.device.startswith("cuda") else SIMPLENET_CPU_EPOCHS
        if args.steps is not None and args.epochs is not None:
            p.error("give --steps or --epochs")
        if (args.epochs is not None and args.epochs < 1) or not args.noise >= 0:
            p.error("need --epochs >= 1 and --noise >= 0")
        if args.layers != sorted(set(args.layers) & {1, 2, 3}):
            p.error("--layers takes some of 1,2,3 in this order")
    elif args.steps is None:
        args.steps = PAPER_STEPS if args.device.startswith("cuda") else CPU_STEPS
    if args.batch_size is None:
        args.batch_size = 8 if simplenet else 1
    if args.lr is None:
        args.lr = PAPER_LR if simplenet or args.steps >= 10000 else SHORT_LR
    size = args.image_size or [128 if args.data == "demo" else 329 if simplenet else 256]
    args.image_size = [size[0], size[-1]]
    try:
        (crop_size if simplenet else check_image_size)(tuple(size) if len(size) <= 2 else (0, 0))
    except ValueError as error:
        p.error(f"--image-size: {error}")
    steps = 1 if args.steps is None else args.steps  # SimpleNet: from --epochs, when the number of images is known
    seeds = [args.seed, *(args.seeds or [])]
    if steps < 1 or args.batch_size < 1 or not 0 < args.lr < math.inf or min(seeds) < 0 or max(seeds) >= 2**32:
        p.error("need --steps >= 1, --batch-size >= 1, --lr > 0 and --seed >= 0 and < 2**32")
    if not 0 <= args.p_hard <= 1 or not 0 <= args.a < args.b <= 1:
        p.error("need 0 <= --p-hard <= 1 and 0 <= --a < --b <= 1")
    if not args.checkpoint_every >= 0:
        p.error("need --checkpoint-every >= 0")
    if args.map_normalization == "gaussian" and given.keys() & {"a", "b"}:
        p.error("--a and --b belong to --map-normalization quantile")
    if args.seeds and "seed" in given:
        p.error("give --seed or --seeds")
    if args.ablation and (given.keys() & {"p_hard", "a", "b", "map_normalization"} or args.pretraining_images == "none"):
        p.error("--ablation chooses --p-hard, --a, --b, --map-normalization and --pretraining-images none by itself")
    if args.ablation and given.keys() & {"noise", "no_adaptor", "layers"}:
        p.error("--ablation chooses --noise, --no-adaptor and --layers by itself")
    if args.precision == "auto":
        device = torch.device(args.device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16(device)
        args.precision = "bf16" if bf16 else "fp32"
    if simplenet:
        file = f"torchvision's weight file of {args.backbone}"
        file += " (wide_resnet50_2-95faca4d.pth)" if args.backbone == "wide_resnet50_2" else ""
        if not args.backbone_weights:
            raise ModelError(f"--model simplenet needs --backbone-weights FILE: {file}; or --backbone and the file of another one")
        if not Path(args.backbone_weights).exists():
            raise ModelError(f"{args.backbone_weights}: no such file; --backbone-weights takes {file}")
        return args
    args.teacher = args.teacher or str(Path(__file__).parent / "weights" / f"teacher_{args.size}.pt")
    if not Path(args.teacher).exists():
        raise ModelError(f"{args.teacher}: no such teacher; make one with: python distill.py --size {args.size} --images PHOTOS"
                         " --backbone-weights FILE (see weights/README.md), and name it with --teacher")  # fmt: skip
    return args


@lru_cache(maxsize=4)
def permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


def shuffled(images, step: int, batch_size: int, *seed: int) -> Tensor:
    """The batch of step `step` in an endless reshuffled order: each epoch visits every image once. `images` is anything that gives
    an array or tensor for an index; uint8 3×H×W makes N×3×H×W."""
    batch = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(i, len(images))
        batch.append(images[int(permutation(len(images), *seed, epoch)[position])])
    if isinstance(batch[0], Tensor):
        return torch.stack(batch)
    return torch.from_numpy(np.stack(batch))  # by numpy: torch would start threads of its own in each one that decodes


def ahead(function: Callable, arguments: range, threads: int = 4) -> Iterator:
    """function(i) for each i in turn, computed by threads a little before it is wanted."""
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(function, i) for i in arguments[: 2 * threads]]
        for i in arguments:
            yield pending.pop(0).result()
            if i + 2 * threads < arguments.stop:
                pending.append(pool.submit(function, i + 2 * threads))


def luma(images: Tensor) -> Tensor:
    """float N×3×H×W -> N×1×H×W, ITU-R 601."""
    r, g, b = images.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def draw(n: int, gray_probability: float = 0.3) -> Tensor:
    """The random choices of a step for n images, float32 3×N×1×1×1, from torch's CPU generator: whether photo P is gray; factor,
    uniform in [0.8, 1.2], and kind of the augmentation."""
    gray = torch.rand(n, 1, 1, 1) < gray_probability
    factor = torch.empty(n, 1, 1, 1).uniform_(0.8, 1.2)
    return torch.stack([gray.float(), factor, torch.randint(3, (n, 1, 1, 1)).float()])


def augment(images: Tensor, factor: Tensor, kind: Tensor) -> Tensor:
    """J: brightness (kind 0), contrast (1) or saturation (2) of each image times its factor. Images uint8 N×3×H×W, factor and kind
    N×1×1×1 -> float N×3×H×W in 0–1."""
    images = images.float() / 255
    gray = luma(images)
    reference = torch.where(kind == 0, 0.0, torch.where(kind == 1, gray.mean((2, 3), keepdim=True), gray))
    return (reference + factor * (images - reference)).clamp(0, 1)


def turn_gray(images: Tensor, gray: Tensor) -> Tensor:
    """uint8 N×3×H×W -> float 0–1, gray where `gray`, N×1×1×1, is not 0."""
    images = images.float() / 255
    return torch.where(gray != 0, luma(images), images)


def make_optimizer(model: EfficientAD | SimpleNet, lr: float) -> torch.optim.Adam:
    """On a GPU the learning rate is a tensor there: a CUDA graph reads it anew every step."""
    groups, device = model.parameter_groups(lr), model.threshold.device
    cuda = device.type == "cuda"
    groups = [{**g, "lr": torch.tensor(g["lr"], device=device) if cuda else g["lr"], "full_lr": g["lr"]} for g in groups]
    return torch.optim.Adam(groups, weight_decay=1e-5, fused=True, capturable=cuda)


def set_rate(optimizer: torch.optim.Adam, factor: float) -> None:
    """Every group's learning rate: `factor` times what it began with."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["full_lr"] * factor)
        else:
            group["lr"] = group["full_lr"] * factor


@torch.no_grad()
def teacher_outputs(model: EfficientAD, batches: Iterable[Tensor], precision: str) -> Tensor:
    """`teacher_features` of batches of images as a training step computes them, N×h×w×384; of a bf16 step kept as fp16."""
    outputs = []
    for batch in batches:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model.teacher_features(model.normalize(batch)).permute(0, 2, 3, 1)
        outputs.append(output.to(torch.float32 if precision == "fp32" else torch.float16).contiguous())
    return torch.cat(outputs)


class Step:
    """The training step. Called with a batch it trains on it and returns the losses by name, tensors that the next call overwrites.
    The batch, on whatever device, in the same shapes each time: images I and photos P (absent: no penalty) uint8 N×3×H×W; draws,
    see `draw`; teacher N×h×w×384, the teacher's output for I (absent: computed). It is copied to fixed buffers, so that all the
    rest is one CUDA graph on a GPU; nothing waits for the device. SimpleNet's batch has "features", N×h×w×1536, alone."""

    def __init__(self, model: EfficientAD | SimpleNet, optimizer: torch.optim.Adam, precision: str, p_hard: float = 0.999):
        self.model, self.optimizer, self.precision, self.p_hard = model, optimizer, precision, p_hard
        self.device, self.buffers = model.threshold.device, {}
        self.graph = Graphed(self.compute, self.device)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, x in batch.items():
            x = x.pin_memory() if self.device.type == "cuda" and not x.is_cuda else x
            if name not in self.buffers:
                self.buffers[name] = torch.empty_like(x, device=self.device)
            self.buffers[name].copy_(x, non_blocking=True)
        return self.graph()

    def losses(self) -> dict[str, Tensor]:
        if "features" in self.buffers:
            return self.model.losses(self.buffers["features"].permute(0, 3, 1, 2))
        images, (gray, factor, kind) = self.buffers["images"], self.buffers["draws"]
        photos = turn_gray(self.buffers["photos"], gray) if "photos" in self.buffers else None
        teacher = self.buffers["teacher"].permute(0, 3, 1, 2) if "teacher" in self.buffers else None
        return self.model.losses(images, augment(images, factor, kind), photos, self.p_hard, teacher)

    def compute(self) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.losses()
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


def new_model(args: argparse.Namespace) -> EfficientAD | SimpleNet:
    """The model of a run, with its teacher or backbone unless an interrupted run has all weights."""
    torch.manual_seed(args.seed)
    if args.model == "simplenet":
        options = dict(backbone=args.backbone, layers=args.layers, adaptor=not args.no_adaptor, noise=args.noise)
        model = SimpleNet(image_size=tuple(args.image_size), **options)
    else:
        model = EfficientAD(size=args.size, image_size=tuple(args.image_size), padding=args.padding)
    if not args.resume and args.model == "simplenet":
        model.load_backbone(args.backbone_weights)
    elif not args.resume:
        model.load_teacher(args.teacher)
    return model


def pretraining_images(args: argparse.Namespace) -> tuple[Images | PhotographCrops | None, str]:
    """The images of the pretraining penalty (None: no penalty), and what they are, in words."""
    size = tuple(args.image_size)
    if args.pretraining_images == "none":
        return None, "no pretraining penalty"
    if not args.pretraining_images:
        return PhotographCrops(size), "pretraining images: random crops of scikit-learn's two photographs"
    paths = list_images(args.pretraining_images, recursive=True)
    seen_again = len(paths) < args.steps * args.batch_size  # else keeping decoded photos would gain nothing
    images = Images(paths, size, zoom=2, cache_bytes=4 * 2**30 if seen_again else 0)
    images.skip_bad = args.skip_bad_images
    return images, f"{len(images)} pretraining images from {args.pretraining_images}"


def train(args: argparse.Namespace) -> Path:
    """One run: the model of a category, in its run folder, which is returned. With args.resume the rest of a run."""
    device, size = torch.device(args.device), tuple(args.image_size)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.backends.cudnn.benchmark = True  # of one shape, many steps

    # Model and data: normal images only, a tenth of them (or the set's own validation images) held out for calibration. All are
    # decoded now, so that a damaged one is not found an hour later.
    category, simplenet = open_category(args.data), args.model == "simplenet"
    model = new_model(args)
    training, validation = (Images(paths, size) for paths in category.split(args.seed))
    for images in (training, validation):
        images.skip_bad = args.skip_bad_images
        images.check(tqdm(range(len(images)), "decoding", unit="image"))
    skipped, counts = [*training.errors.values(), *validation.errors.values()], [len(training), len(validation)]
    usual = range_of([*training.looks.values(), *validation.looks.values()])
    print("".join(f"skipped: {error}\n" for error in skipped), end="", file=sys.stderr)
    args.steps = args.steps or math.ceil(args.epochs * counts[0] / args.batch_size)
    pretraining, penalty = (None, f"SimpleNet on {args.backbone}") if simplenet else pretraining_images(args)
    bad_photos = getattr(pretraining, "errors", {})  # by index, grows during training
    files = {"data": [*training.paths, *validation.paths], "pretraining_images": getattr(pretraining, "paths", [])}
    files = {option: fingerprint(paths) for option, paths in files.items()}

    # Run folder: new, or as an interrupted run left it.
    folder, start, seconds = Path(args.resume) if args.resume else new_run_folder(args, category.name), 0, 0.0
    held = lock(folder / ".lock")
    if args.resume:
        state = read_checkpoint(str(folder / "resume.pt"))
        try:
            model.load_state_dict(state["model"])
            start, seconds = state["step"], state["seconds"]
            bad_photos |= state["bad_photos"]
            changed = [name for name in files if files[name] != state["files"][name]]
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
            raise ModelError(f"{folder / 'resume.pt'}: damaged, or of another model; start the run again") from None
        if changed:
            where = getattr(args, changed[0])
            raise DataError(f"{where}: has other images than when the run began; put them back, or start a new run")
    elif holds_results(folder):  # another process was faster
        raise DataError(f"{folder}: exists; choose another --out")
    remove_leftovers(folder)
    model = model.to(device, memory_format=torch.channels_last)

    def batches(images, purpose):
        for i in tqdm(range(len(images)), purpose, unit="image"):
            yield torch.as_tensor(images[i])[None].to(device)

    print(f"{folder}: {category.name}, {len(training)} training and {len(validation)} validation images, {args.steps} steps of"
          f" {args.batch_size} at {size[0]}×{size[1]}, {args.precision} on {args.device}; {penalty}", file=sys.stderr)
    if args.steps < PAPER_STEPS and not simplenet:
        print(f"note: a short run; the paper's has {PAPER_STEPS} steps and lr {PAPER_LR}, this one lr {args.lr}", file=sys.stderr)
    # Kept on the device, if there is room: SimpleNet's features; else the images, and the teacher's outputs for them (in a run that
    # sees them again).
    n, teacher = args.batch_size, None
    if simplenet:
        training = CachedFeatures(model, training)
    elif counts[0] * 3 * math.prod(size) <= KEPT_BYTES:
        training = torch.stack(list(ahead(lambda i, images=training: torch.as_tensor(images[i]), range(counts[0])))).to(device)
    optimizer = make_optimizer(model, args.lr)
    if args.resume:
        try:
            state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # a rate on the GPU stays there
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{folder / 'resume.pt'}: damaged, or of another model; start the run again") from None
    recent, started = [], time.time()  # total losses since they were looked at

    def save_state(step: int) -> None:
        if recent:
            check_losses(recent, step - 1, folder)
        if not all_finite(model.parameters()):
            raise ModelError(f"{folder}: step {step - 1}: it left weights that are not finite; lower --lr or use --precision fp32")
        options = {k: v for k, v in vars(args).items() if k != "resume"}
        state = {"format": "efficientad-resume", "options": options, "step": step, "seconds": seconds + time.time() - started,
                 "files": files, "bad_photos": dict(bad_photos)}  # fmt: skip
        write_checkpoint(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, str(folder / "resume.pt"))

    if start == 0:  # saved first: from its first second on a run can be resumed
        save_state(0)
    if not simplenet:
        if start == 0:
            model.fit_teacher_statistics(batches(training, "teacher statistics"))
        outputs = counts[0] * CHANNELS * math.prod(model.map_size) * (4 if args.precision == "fp32" else 2)  # bytes
        if outputs <= KEPT_BYTES and counts[0] <= args.steps * n:
            teacher = teacher_outputs(model, batches(training, "teacher outputs"), args.precision)

    # Training.
    stop = []  # Ctrl-C ends the run after the step at hand; a second one at once
    previous = signal.signal(signal.SIGINT, lambda *_: (stop.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)))
    started = saved = time.time()
    log = open_log(folder / "log.jsonl", start)
    bar = tqdm(range(start, args.steps), "training", initial=start, total=args.steps, unit="step", mininterval=0.5)
    model.train()
    take_step = Step(model, optimizer, args.precision, args.p_hard)

    def stream(images, order: int) -> Iterator[Tensor]:
        """The batch of each step; files are decoded by threads."""
        in_turn = ahead if isinstance(images, (Images, PhotographCrops)) else map
        return in_turn(lambda step: shuffled(images, step, n, args.seed, order), range(start, args.steps))

    streams = {"features" if simplenet else "images": stream(training, 0)}
    if teacher is not None:
        streams["teacher"] = stream(teacher, 0)
    if pretraining is not None:
        streams["photos"] = stream(pretraining, 1)
    for step in bar:
        torch.manual_seed(args.seed * 1_000_003 + step)
        factor = 0.1 if step >= int(0.95 * args.steps) and not simplenet else 1
        set_rate(optimizer, factor)
        batch = {name: next(batches_of) for name, batches_of in streams.items()}
        if not simplenet:
            batch["draws"] = draw(n)
        losses = take_step(batch)
        recent.append(sum(losses.values()))
        if step % 10 == 0 or step == args.steps - 1:
            check_losses(recent, step, folder)
            values = {name: loss.item() for name, loss in losses.items()}
            bar.set_postfix({name: f"{v:.3f}" for name, v in values.items()})
            log_entry(log, {"step": step, "lr": args.lr * factor, **values})
        if stop or time.time() - saved >= args.checkpoint_every:
            save_state(step + 1)
            saved = time.time()
        if stop:
            print(f"\ninterrupted after {step + 1} steps; go on with: python train.py --resume {folder}", file=sys.stderr)
            raise SystemExit(130)
    save_state(args.steps)
    take_step.graph = None  # the memory of a GPU's graph is free for the next run of a collection
    seconds += time.time() - started
    signal.signal(signal.SIGINT, previous)

    # Map normalization and threshold, from validation images; then the model as one file.
    normalization = () if simplenet else (args.a, args.b, args.map_normalization == "gaussian")
    model.calibrate(batches(validation, "calibration"), *normalization)
    skipped += [error for _, error in sorted(bad_photos.items())]  # threads found them in any order
    foreign = [k for name, own in OWN_OPTIONS.items() if name != args.model for k in own]
    foreign += ["resume", "out", "checkpoint_every", "categories", "seeds"]
    options = {k: v for k, v in vars(args).items() if k not in foreign}
    model.training_info = {**options, "category": category.name, "data": str(category.root.resolve()),
                           "training_images": counts[0], "validation_images": counts[1], "skipped_images": skipped,
                           "usual": usual}  # fmt: skip
    if skipped:
        write(folder / "skipped.txt", "\n".join(skipped) + "\n")
    model.cpu().save(str(folder / "model.pt"))
    (folder / "resume.pt").unlink(missing_ok=True)
    held.close()
    expected, bound = (100 * share for share in false_alarms(len(validation)))
    print(f"threshold {model.threshold:.4f}: the highest score of {len(validation)} validation images; expect {expected:.2g} %"
          f" false alarms on normal images, with 95 % confidence less than {bound:.2g} %")
    print(f"trained in {seconds / 60:.1f} minutes, wrote {folder / 'model.pt'}; now: python evaluate.py --run {folder}")
    return folder


def train_all(jobs: list[argparse.Namespace]) -> Path:
    """This process's share of the runs, one after another: finished ones are skipped, interrupted ones resumed, one that fails
    does not stop the rest. Returns the folder that they lie in."""
    # torchrun sets these. The shares depend on nothing else, so no two processes ever write the same run. They do not talk to each
    # other, and torchrun ends all as soon as one exits with an error: then a failed run is reported, but the exit status stays 0.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    failed, share, interrupt = [], jobs[rank::world], signal.getsignal(signal.SIGINT)
    for job in share:
        folder = Path(job.out)
        try:
            if (folder / "model.pt").exists():
                print(f"{folder}: finished, skipped", file=sys.stderr)
                continue
            if (folder / "resume.pt").exists():
                print(f"{folder}: interrupted, goes on with the options that it began with", file=sys.stderr)
                device, job = job.device, parse_arguments(["--resume", job.out])
                job.device = device
            train(job)
        except Exception as error:
            if not isinstance(error, (DataError, ModelError, OSError)):
                traceback.print_exc()
            print(f"train.py: {folder}: failed: {error}", file=sys.stderr)
            failed.append(f"{folder}: {error}")
            with contextlib.suppress(OSError):  # evaluate.py names what it finds without a model
                folder.mkdir(parents=True, exist_ok=True)
        finally:
            signal.signal(signal.SIGINT, interrupt)
    folder = Path(jobs[0].out).parent
    print(f"{len(share) - len(failed)} of {len(share)} runs complete in {folder}; now: python evaluate.py --run {folder}")
    if failed:
        print("train.py: failed runs (the same command tries them again):", *failed, sep="\n  ", file=sys.stderr)
        if world == 1:
            raise SystemExit(1)
    return folder


def main(argv: list[str] | None = None) -> Path:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank < torch.cuda.device_count():  # torchrun: from here "cuda" is this process's own GPU
        torch.cuda.set_device(rank)
    args = parse_arguments(argv)
    if args.device.startswith("cuda") and rank >= torch.cuda.device_count():
        raise ModelError(f"torchrun: process {rank} has no GPU of its own; start as many as there are, or use --device cpu")
    if args.resume:
        pick_device(args.device)
    jobs = [] if args.resume else list_jobs(args)
    if jobs:
        return train_all(jobs)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DataError("several processes share the runs of a folder of categories, of --seeds or of --ablation; this is one run")
    return train(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        main()
    except (DataError, ModelError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step or after the last; during training see `stop`
        print("\ntrain.py: interrupted", file=sys.stderr)
        sys.exit(130)
