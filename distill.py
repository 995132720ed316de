"""Make a teacher: distil a pretrained ResNet into a patch description network (section 3.1 of EfficientAD, arXiv 2303.14535).

    python distill.py --images imagenet/train --backbone-weights wide_resnet101_2-32ee1156.pth      # the paper's teacher
    python distill.py --images photos --backbone resnet18 --backbone-weights resnet18.pth \\
        --image-size 128 --crops 0.1 0.7 --steps 2000 --lr 1e-3 --schedule cosine                   # a quick one
    torchrun --nproc-per-node 8 distill.py ...                                                      # the same on eight GPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 distill.py ...   # on each of two hosts

The backbone sees the image at twice the PDN's size, so that its layer 2 has the PDN's output grid (512² and 256² give 64²).
Under torchrun each process takes its share of every batch, so that any number of them learns the same; the first one writes.
"""

import argparse
import glob
import json
import math
import os
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from backbone import ARCHITECTURES, PatchFeatures, ResNet, WeightsError, load_weights
from data import DataError, list_images, read_image
from efficientad import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PDN,
    ModelError,
    all_finite,
    channel_statistics,
    pick_device,
    read_checkpoint,
    write_checkpoint,
)
from runs import check_losses, fingerprint, last_line, lock, log_entry, open_log, remove_leftovers


class Views(Dataset):
    """What step after step sees: item i -> (key, PDN input uint8 3×S×S, backbone input uint8 3×2S×2S). A pure function of
    (seed, i): every epoch is a new permutation of the photos, and photo p has view e in epoch e, or e mod `views` if views > 0
    (then features can be cached by key). A view is the whole photo, or a random resized crop that covers a share
    of its area within `crops`, flipped with probability 0.5; gray with probability 0.1 (both inputs alike)."""

    def __init__(self, paths: list[Path], length: int, args: argparse.Namespace):
        self.paths, self.length, self.args, self.decoded = paths, length, args, {}
        self.room = args.cache_gib * 2**30 / max(1, args.workers)  # every worker process keeps photos of its own

    def __len__(self):
        return self.length

    def photo(self, p: int) -> Image.Image:
        if p not in self.decoded:
            image = read_image(self.paths[p])
            self.room -= 3 * image.width * image.height
            if self.room < 0:
                return image
            self.decoded[p] = image
        return self.decoded[p]

    def __getitem__(self, i: int):
        epoch, position = divmod(i, len(self.paths))
        p = int(permutation(len(self.paths), self.args.seed, epoch)[position])
        view = epoch % self.args.views if self.args.views else epoch
        key, rng = view * len(self.paths) + p, np.random.default_rng((self.args.seed, p, view))
        image, box = self.photo(p), None
        if self.args.crops:
            area = image.width * image.height * rng.uniform(*self.args.crops)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = min(math.sqrt(area * ratio), image.width), min(math.sqrt(area / ratio), image.height)
            x, y = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
            box = (x, y, x + w, y + h)
        if rng.random() < 0.1:
            image = image.convert("L").convert("RGB")
        flip = self.args.crops and rng.random() < 0.5
        inputs = []
        for s in (self.args.image_size, 2 * self.args.image_size):
            view = np.asarray(image.resize((s, s), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
            inputs.append(np.ascontiguousarray(view[..., ::-1] if flip else view))
        return key, *inputs


@lru_cache(maxsize=2)
def permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


class Targets:
    """Normalized features of a batch of views, cached by key in half precision when every view of the run fits."""

    def __init__(self, features: PatchFeatures, views: int, args: argparse.Namespace):
        self.features, self.args, self.device = features, args, args.device
        self.mean, self.std = torch.zeros(1, 384, 1, 1), torch.ones(1, 384, 1, 1)
        fits = views * 384 * (args.image_size // 4) ** 2 * 2 <= args.cache_gib * 2**30
        self.cache: dict[int, torch.Tensor] | None = {} if args.views and fits else None

    def raw(self, large: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return self.features(normalize(large, self.device)).float()

    def __call__(self, keys: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
        keys = keys.tolist()
        if self.cache is None:
            return self.compute(large)
        if not all(k in self.cache for k in keys):
            self.cache.update(zip(keys, self.compute(large).half().cpu()))
        return torch.stack([self.cache[k] for k in keys]).to(self.device).float()

    def compute(self, large: torch.Tensor) -> torch.Tensor:
        return (self.raw(large) - self.mean.to(self.device)) / self.std.to(self.device)


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 N×3×H×W -> float32 with ImageNet's mean and standard deviation, channels last, on `device`."""
    x = images.to(device, memory_format=torch.channels_last, non_blocking=True).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def merged_statistics(mean: torch.Tensor, std: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every process's mean and standard deviation (1×C×1×1) of so many images -> those of all images together."""
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (mean.double(), std.double(), count))
    total = sum(n for *_, n in shares)
    mean = sum(m * n for m, _, n in shares) / total
    variance = sum((s.square() + (m - mean).square()) * n for m, s, n in shares) / total
    return mean.float(), variance.sqrt().float()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Constant, as in the paper, or cosine: linear warm-up over the first 5 % of the steps, then half a cosine down to 0."""
    if args.schedule == "constant":
        return args.lr
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Distil a pretrained ResNet into an EfficientAD teacher.")
    p.add_argument("--images", nargs="+", required=True, metavar="DIR", help="folders of photos, searched recursively")
    p.add_argument("--backbone", default="wide_resnet101_2", choices=ARCHITECTURES, help="default wide_resnet101_2, the paper's")
    p.add_argument("--backbone-weights", required=True, metavar="FILE", help="torchvision's weight file of the backbone")
    p.add_argument("--size", default="small", choices=["small", "medium"])
    p.add_argument("--steps", type=int, default=60000)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--schedule", default="constant", choices=["constant", "cosine"])
    p.add_argument("--image-size", type=int, default=256, help="the PDN's input; the backbone sees twice that (default 256)")
    p.add_argument("--crops", type=float, nargs=2, metavar=("MIN", "MAX"), help="random crops of this share of the area, and"
                   " flips; without it the whole photo, as in the paper")
    p.add_argument("--views", type=int, default=0, help="different views of a photo; 0 (default): a new one every epoch")
    p.add_argument("--statistics-images", type=int, default=10000, help="views that normalize the features (default 10000)")
    p.add_argument("--cache-gib", type=float, default=8, help="memory bound of a host, each, for decoded photos and for"
                   " target features")
    p.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    p.add_argument("--device", help="cuda or cpu; default cuda if there is one")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", metavar="FILE", help="default runs/distill-SIZE/teacher_SIZE.pt")
    p.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    p.add_argument("--resume", action="store_true", help="go on from FILE.resume, with the same options")
    args = p.parse_args(argv)
    rank, world, local_rank, local_world = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))  # torchrun sets these
    )
    args.rank, args.world = rank, world
    args.device = pick_device(args.device)
    if args.device.type == "cuda" and world > 1:
        args.device = pick_device(f"cuda:{local_rank}")
    args.out = Path(args.out or f"runs/distill-{args.size}/teacher_{args.size}.pt")
    if args.image_size % 32 or args.image_size < 32:
        p.error("--image-size must be a multiple of 32")
    if min(args.steps, args.batch_size, args.statistics_images, args.checkpoint_every) < 1:
        p.error("--steps, --batch-size, --statistics-images and --checkpoint-every must be at least 1")
    if not 0 < args.lr < math.inf or args.views < 0 or not 0 <= args.seed < 2**32:
        p.error("need --lr > 0, --views >= 0 and --seed >= 0 and < 2**32")
    if args.batch_size % world or args.statistics_images < world:
        p.error(f"--batch-size must be a multiple of the {world} processes, and --statistics-images at least as many")
    args.workers = 0 if args.device.type == "cpu" else max(1, min(12, ((os.cpu_count() or 1) - 2) // local_world))
    args.cache_gib /= local_world
    if args.crops and not 0 < args.crops[0] <= args.crops[1] <= 1:
        p.error("--crops needs 0 < MIN <= MAX <= 1")
    if args.out.exists():
        p.error(f"{args.out} exists; choose another --out or remove it")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, rank, world, resume_file = args.device, args.rank, args.world, Path(f"{args.out}.resume")
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    held = None if rank else lock(args.out.with_name(f".{args.out.name}.lock"))
    for path in () if rank else (args.out, resume_file, args.out.with_suffix(".jsonl")):
        remove_leftovers(args.out.parent, glob.escape(path.name))
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.backends.cudnn.benchmark = True  # of one shape, many steps

    # Photos: every 40th is held out, at most 64, to measure the loss on photos that the teacher has not seen.
    paths = [path for folder in args.images for path in list_images(folder, recursive=True)]
    photos = fingerprint(paths)
    held_out = paths[::40][:64] if len(paths) >= 40 else []
    unseen = set(held_out)
    paths = [path for path in paths if path not in unseen]
    views = Views(paths, args.steps * args.batch_size, args)

    # Networks.
    trunk = ResNet(args.backbone)
    load_weights(trunk, args.backbone_weights)
    features = PatchFeatures(trunk).to(device, memory_format=torch.channels_last)
    targets = Targets(features, len(paths) * args.views, args)
    pdn = PDN(args.size, padding=True).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(pdn.parameters(), lr=args.lr, weight_decay=1e-5, fused=True)

    # Feature statistics, or the state of an interrupted run.
    indifferent = ("device", "resume", "out", "checkpoint_every", "cache_gib", "workers", "rank", "world")
    options = {k: v for k, v in vars(args).items() if k not in indifferent}
    start = 0
    if args.resume and not resume_file.exists():
        print(f"{resume_file}: nothing saved yet, begins at the first step", file=sys.stderr)
    if args.resume and resume_file.exists():
        state = read_checkpoint(str(resume_file))
        if state.get("options") != options:
            raise ModelError(f"{resume_file}: made with other options; repeat the command that made it, with --resume")
        if state.get("photos") != photos:
            raise DataError(f"{args.images[0]}: other photos than when the run began; put them back, or remove {resume_file}")
        try:
            start, targets.mean, targets.std = state["step"], state["mean"], state["std"]
            pdn.load_state_dict(state["pdn"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
            raise ModelError(f"{resume_file}: damaged; remove it and start again") from None
    else:
        share = range(min(args.statistics_images, len(paths)))[rank::world]  # of the first views: as many different photos
        if not share:
            raise DataError(f"{args.images[0]}: {len(paths)} photos are too few for {world} processes")
        loader = DataLoader(Subset(views, share), args.batch_size // world, num_workers=args.workers)
        progress = tqdm(loader, "feature statistics", unit="batch", disable=rank > 0)
        targets.mean, targets.std = (s.cpu() for s in channel_statistics(targets.raw(large) for _, _, large in progress))
        if world > 1:
            targets.mean, targets.std = merged_statistics(targets.mean, targets.std, len(share))
    network = torch.nn.parallel.DistributedDataParallel(pdn) if world > 1 else pdn

    recent = []  # losses since they were looked at

    def save(step: int) -> None:
        if recent:
            check_losses(recent, step - 1, args.out)
        if not all_finite(pdn.parameters()):
            raise ModelError(f"{args.out}: step {step - 1}: it left weights that are not finite; lower --lr and start again")
        state = {"step": step, "options": options, "photos": photos, "mean": targets.mean, "std": targets.std}
        write_checkpoint(state | {"pdn": pdn.state_dict(), "optimizer": optimizer.state_dict()}, str(resume_file))

    if start == 0 and rank == 0:
        save(0)  # the statistics took a while

    # Training.
    share = args.batch_size // world  # of every batch
    todo = [i for i in range(start * args.batch_size, len(views)) if i % args.batch_size // share == rank]
    loader = DataLoader(Subset(views, todo), share, num_workers=args.workers, pin_memory=args.workers > 0)
    log = open(os.devnull, "wb", buffering=0) if rank else open_log(args.out.with_suffix(".jsonl"), start)
    stop = []  # Ctrl-C ends the run after the step at hand; a second one at once
    previous = signal.signal(signal.SIGINT, lambda *_: (stop.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)))
    started, running, stopping = time.time(), None, False
    bar = tqdm(loader, f"distilling {args.size}", initial=start, total=args.steps, unit="step", mininterval=1,
               disable=rank > 0)  # fmt: skip
    for step, (keys, small, large) in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        target = targets(keys, large)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            output = network(normalize(small, device))
        loss = F.mse_loss(output.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(loss.detach())
        if step % 20 == 0 or step == args.steps - 1:
            news = torch.stack([loss.detach(), torch.tensor(len(stop), device=device)])
            if world > 1:
                dist.all_reduce(news)  # all stop at the same step
            value, stopping = news[0].item() / world, bool(news[1])
            check_losses(recent, step, args.out)
            running = value if running is None else 0.9 * running + 0.1 * value
            bar.set_postfix(loss=f"{running:.4f}")
            entry = {"step": step, "loss": value, "lr": learning_rate(step, args), "seconds": time.time() - started}
            log_entry(log, entry)
        if world == 1:
            stopping = bool(stop)
        if rank == 0 and (stopping or ((step + 1) % args.checkpoint_every == 0 and step + 1 < args.steps)):
            save(step + 1)
        if stopping:
            print(f"\ninterrupted after {step + 1} steps; go on with the same command and --resume", file=sys.stderr)
            raise SystemExit(130)
    signal.signal(signal.SIGINT, previous)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    # The loss on photos that were held out, and the teacher in half precision.
    result = {"step": args.steps, "seconds": time.time() - started}
    if held_out:
        errors = []
        with torch.no_grad():
            for _, small, large in DataLoader(Views(held_out, len(held_out), args), args.batch_size):
                errors += (pdn(normalize(small, device)) - targets.compute(large)).square().mean((1, 2, 3)).tolist()
        result["held_out_loss"] = sum(errors) / len(errors)
    log_entry(log, result)
    print(json.dumps(result))
    if not all_finite(pdn.parameters()):
        raise ModelError(f"{args.out}: the last step left weights that are not finite; lower --lr and start again")
    write_checkpoint({k: v.half().contiguous().cpu() for k, v in pdn.state_dict().items()}, str(args.out))
    resume_file.unlink(missing_ok=True)
    if held:
        held.close()
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, WeightsError, ModelError, OSError) as error:
        print(f"distill.py: {last_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step or after the last; during training see `stop`
        print("\ndistill.py: interrupted", file=sys.stderr)
        sys.exit(130)
