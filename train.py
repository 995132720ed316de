"""Train EfficientAD on a category, or on each one of a collection (sections 3.2 to 3.4 of arXiv 2303.14535).

    python train.py                                  # the built-in demo set
    python train.py --data mvtec/bottle              # then: python evaluate.py
    python train.py --data mvtec_loco/pushpins --size medium --pretraining-images imagenet/train
    python train.py --resume runs/bottle-small       # go on after an interruption
    python train.py --data mvtec --seeds 0,1,2       # every category × seed; the same command goes on after an interruption
    torchrun --nproc-per-node 4 train.py --data visa # the same, shared by four GPUs
    python train.py --data mvtec/bottle --ablation   # the trainings behind the paper's tables 3 to 5

Every random choice of a step is a function of the seed and the step's number, so a resumed run equals an uninterrupted one.
"""

import argparse
import math
import os
import signal
import sys
import time
import traceback
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from appearance import range_of
from data import DataError, Images, PhotographCrops, list_categories, list_images, open_category
from efficientad import (
    EfficientAD,
    ModelError,
    all_finite,
    check_image_size,
    check_losses,
    false_alarms,
    pick_device,
    read_checkpoint,
    write_checkpoint,
)
from runfolder import TEMPORARY, lock, log_entry, open_log, remove_leftovers, write

PAPER_STEPS, CPU_STEPS = 70000, 1500
PAPER_LR, SHORT_LR = 1e-4, 3e-4  # for runs below 10,000 steps: learned faster on bottle
ABLATION = {  # the distinct trainings behind tables 3 to 5; rows about map normalization only calibrate one of them anew
    "default": {},
    "p_hard-0": {"p_hard": 0.0},
    "p_hard-0.9": {"p_hard": 0.9},
    "p_hard-0.99": {"p_hard": 0.99},
    "p_hard-0.9999": {"p_hard": 0.9999},
    "p_hard-0.99999": {"p_hard": 0.99999},
    "no-penalty": {"pretraining_images": "none"},
    "p_hard-0-no-penalty": {"p_hard": 0.0, "pretraining_images": "none"},
}


def integers(text: str) -> list[int]:
    return list(dict.fromkeys(map(int, text.split(","))))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a run; with --resume those of the interrupted run. Exits with status 2 on an impossible option."""
    p = argparse.ArgumentParser(description="Train EfficientAD on normal images.", argument_default=argparse.SUPPRESS)
    p.add_argument("--data", help="a category (MVTec AD, MVTec LOCO, VisA), a folder of normal images, 'demo' (default), or a"
                   " folder of categories: then one run each in runs/DATA/, finished ones skipped, interrupted ones resumed")
    p.add_argument("--categories", metavar="A,B", help="of a folder of categories only these")
    p.add_argument("--seeds", type=integers, metavar="0,1,2", help="a run for each seed, into runs/DATA/ as well")
    p.add_argument("--ablation", action="store_true", help="the trainings that the paper's tables 3 to 5 need on a category, into"
                   " runs/DATA-SIZE-ablation/")
    p.add_argument("--size", choices=["small", "medium"], help="EfficientAD-S (default) or EfficientAD-M")
    p.add_argument("--steps", type=int, help=f"default {PAPER_STEPS} as in the paper; {CPU_STEPS} without a GPU")
    p.add_argument("--teacher", help="teacher file; default weights/teacher_SIZE.pt beside this script")
    p.add_argument("--pretraining-images", help="folder of photos for the pretraining penalty, or 'none' for no penalty;"
                   " default: random crops of the two photographs that scikit-learn ships")
    p.add_argument("--image-size", type=int, nargs="+", help="H W, or one number for both; multiples of 32 from 128;"
                   " default 256, but 128 for the demo set")
    p.add_argument("--padding", action="store_true", help="zero padding inside teacher and student; the paper has none")
    p.add_argument("--batch-size", type=int, help="default 1, the paper's")
    p.add_argument("--lr", type=float, help="Adam's learning rate, × 0.1 at 95 %% of the steps; default 1e-4 as in the paper;"
                   " 3e-4 below 10,000 steps")
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
    p.add_argument("--resume", metavar="DIR", help="go on with the interrupted run in this folder; takes no other option")
    given = vars(p.parse_args(argv))
    defaults = dict(data="demo", categories=None, seeds=None, ablation=False, size="small", steps=None, teacher=None,
                    pretraining_images=None, image_size=None, padding=False, batch_size=1, lr=None, p_hard=0.999, a=0.9, b=0.995,
                    map_normalization="quantile", seed=0, device=None, precision="auto", out=None, skip_bad_images=False,
                    checkpoint_every=60.0, resume=None)  # fmt: skip

    if "resume" in given:
        if len(given) > 1:
            p.error("--resume takes its options from the run; give no other option with it")
        folder = Path(given["resume"])
        if not (folder / "resume.pt").exists() and (folder / "model.pt").exists():
            raise ModelError(f"{folder}: this run is complete; evaluate it with: python evaluate.py --run {folder}")
        if folder.is_dir() and not (folder / "resume.pt").exists() and not holds_results(folder) and any(folder.iterdir()):
            raise ModelError(f"{folder}: interrupted before anything was saved; start it again, with --out {folder}")
        state = read_checkpoint(str(folder / "resume.pt"))
        if state.get("format") != "efficientad-resume":
            raise ModelError(f"{folder / 'resume.pt'}: not a training state of this program")
        pick_device(state["options"]["device"])
        return argparse.Namespace(**{**defaults, **state["options"], "resume": str(folder)})

    args = argparse.Namespace(**{**defaults, **given})
    args.device = str(pick_device(args.device))
    if args.steps is None:
        args.steps = PAPER_STEPS if args.device.startswith("cuda") else CPU_STEPS
    if args.lr is None:
        args.lr = PAPER_LR if args.steps >= 10000 else SHORT_LR
    size = args.image_size or [128 if args.data == "demo" else 256]
    args.image_size = [size[0], size[-1]]
    try:
        check_image_size(tuple(size) if len(size) <= 2 else (0, 0))
    except ValueError as error:
        p.error(f"--image-size: {error}")
    if args.steps < 1 or args.batch_size < 1 or not 0 < args.lr < math.inf or min([args.seed, *(args.seeds or [])]) < 0:
        p.error("need --steps >= 1, --batch-size >= 1, --lr > 0 and --seed >= 0")
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
    if args.precision == "auto":
        cuda = args.device.startswith("cuda")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
        args.precision = "bf16" if bf16 else "fp32"
    args.teacher = args.teacher or str(Path(__file__).parent / "weights" / f"teacher_{args.size}.pt")
    if not Path(args.teacher).exists():
        raise ModelError(f"{args.teacher}: no such teacher; make one with: python distill.py --size {args.size} --images PHOTOS"
                         " --backbone-weights FILE (see weights/README.md), and name it with --teacher")  # fmt: skip
    return args


def holds_results(folder: Path) -> bool:
    """Whether there is anything in a folder but what a run leaves that was killed before it had saved anything."""
    return any(p.name not in (".lock", "log.jsonl") and not TEMPORARY.search(p.name) for p in folder.iterdir())


def new_run_folder(args: argparse.Namespace, name: str) -> Path:
    """Create the folder of a new run; never one that exists, unless --out names one without results."""
    if args.out:
        folder = Path(args.out)
        if folder.exists() and (not folder.is_dir() or holds_results(folder)):
            raise DataError(f"{folder}: exists; choose another --out, or go on with --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for i in range(1, 10000):
        folder = Path("runs") / (f"{name}-{args.size}" + (f"-{i}" if i > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise DataError(f"{folder}: too many runs; name one with --out")


@lru_cache(maxsize=4)
def permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


def shuffled(images, step: int, batch_size: int, *seed: int) -> Tensor:
    """The batch of step `step` in an endless reshuffled order, uint8 N×3×H×W: each epoch visits every image once."""
    batch = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(i, len(images))
        batch.append(torch.from_numpy(images[int(permutation(len(images), *seed, epoch)[position])]))
    return torch.stack(batch)


def luma(images: Tensor) -> Tensor:
    """float N×3×H×W -> N×1×H×W, ITU-R 601."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def augment(images: Tensor) -> Tensor:
    """J: brightness, contrast or saturation of each image (uint8 N×3×H×W), chosen at random, times a factor uniform in
    [0.8, 1.2]. float N×3×H×W in 0–1. Draws from torch's CPU generator."""
    images, n = images.float() / 255, len(images)
    factor = torch.empty(n, 1, 1, 1).uniform_(0.8, 1.2).to(images.device)
    choice = torch.randint(3, (n, 1, 1, 1)).to(images.device)
    gray = luma(images)
    reference = torch.where(choice == 0, 0.0, torch.where(choice == 1, gray.mean((2, 3), keepdim=True), gray))
    return (reference + factor * (images - reference)).clamp(0, 1)


def random_gray(images: Tensor, probability: float = 0.3) -> Tensor:
    """uint8 N×3×H×W -> float 0–1, each image gray with this probability. Draws from torch's CPU generator."""
    images = images.float() / 255
    gray = (torch.rand(len(images), 1, 1, 1) < probability).to(images.device)
    return torch.where(gray, luma(images), images)


def train(args: argparse.Namespace) -> Path:
    """One run: the model of a category, in its run folder, which is returned. With args.resume the rest of a run."""
    device, size = torch.device(args.device), tuple(args.image_size)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32

    # Data: normal images only, a tenth of them (or the set's own validation images) held out for calibration.
    category = open_category(args.data)
    training, validation = (Images(paths, size) for paths in category.split(args.seed))
    for images in (training, validation):
        images.skip_bad = args.skip_bad_images
        images.check(tqdm(range(len(images)), "decoding", unit="image"))
    skipped, counts = [*training.errors.values(), *validation.errors.values()], [len(training), len(validation)]
    usual = range_of([*training.looks.values(), *validation.looks.values()])
    print("".join(f"skipped: {error}\n" for error in skipped), end="", file=sys.stderr)
    if args.pretraining_images == "none":
        pretraining, penalty = None, "no pretraining penalty"
    elif args.pretraining_images:
        paths = list_images(args.pretraining_images, recursive=True)
        seen_again = len(paths) < args.steps * args.batch_size  # else keeping decoded photos would gain nothing
        pretraining = Images(paths, size, zoom=2, cache_bytes=4 * 2**30 if seen_again else 0)
        pretraining.skip_bad = args.skip_bad_images
        penalty = f"{len(pretraining)} pretraining images from {args.pretraining_images}"
    else:
        pretraining, penalty = PhotographCrops(size), "pretraining images: random crops of scikit-learn's two photographs"

    # Model: new, or as an interrupted run left it.
    torch.manual_seed(args.seed)
    model = EfficientAD(size=args.size, image_size=size, padding=args.padding)
    folder, start, seconds = Path(args.resume or "."), 0, 0.0
    if args.resume:
        held = lock(folder / ".lock")
        state = read_checkpoint(str(folder / "resume.pt"))
        try:
            model.load_state_dict(state["model"])
            start, seconds = state["step"], state["seconds"]
        except (RuntimeError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{folder / 'resume.pt'}: damaged, or of another model; start the run again") from None
        if state.get("images", counts) != counts:
            raise DataError(f"{category.root}: has other images than when the run began; put them back, or start a new run")
    else:
        model.load_teacher(args.teacher)
        folder = new_run_folder(args, category.name)
        held = lock(folder / ".lock")
        if holds_results(folder):  # another process was faster
            raise DataError(f"{folder}: exists; choose another --out")
    remove_leftovers(folder)
    model = model.to(device, memory_format=torch.channels_last)

    def batches(images):
        for i in tqdm(range(len(images)), desc="teacher statistics" if images is training else "calibration", unit="image"):
            yield torch.from_numpy(images[i])[None].to(device)

    print(f"{folder}: {category.name}, {len(training)} training and {len(validation)} validation images, {args.steps} steps of"
          f" {args.batch_size} at {size[0]}×{size[1]}, {args.precision} on {args.device}; {penalty}", file=sys.stderr)
    if args.steps < PAPER_STEPS:
        print(f"note: a short run; the paper's has {PAPER_STEPS} steps and lr {PAPER_LR}, this one lr {args.lr}", file=sys.stderr)
    parameters = [*model.student.parameters(), *model.autoencoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, weight_decay=1e-5, fused=True)
    if args.resume:
        try:
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
                 "images": counts}  # fmt: skip
        write_checkpoint(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, str(folder / "resume.pt"))

    if start == 0:  # saved first: from its first second on a run can be resumed
        save_state(0)
        model.fit_teacher_statistics(batches(training))

    # Training.
    stop = []  # Ctrl-C ends the run after the step at hand; a second one at once
    previous = signal.signal(signal.SIGINT, lambda *_: (stop.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)))
    started = saved = time.time()
    log = open_log(folder / "log.jsonl", start)
    bar = tqdm(range(start, args.steps), "training", initial=start, total=args.steps, unit="step", mininterval=0.5)
    model.train()
    for step in bar:
        torch.manual_seed(args.seed * 1_000_003 + step)
        if step == int(0.95 * args.steps):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * 0.1
        images = shuffled(training, step, args.batch_size, args.seed, 0).to(device)
        photos = None
        if pretraining is not None:
            photos = random_gray(shuffled(pretraining, step, args.batch_size, args.seed, 1).to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            losses = model.losses(images, augment(images), photos, args.p_hard)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        recent.append(sum(loss.detach() for loss in losses.values()))
        if step % 10 == 0 or step == args.steps - 1:
            check_losses(recent, step, folder)
            values = {name: loss.item() for name, loss in losses.items()}
            bar.set_postfix({name: f"{v:.3f}" for name, v in values.items()})
            log_entry(log, {"step": step, "lr": optimizer.param_groups[0]["lr"], **values})
        if stop or time.time() - saved >= args.checkpoint_every:
            save_state(step + 1)
            saved = time.time()
        if stop:
            print(f"\ninterrupted after {step + 1} steps; go on with: python train.py --resume {folder}", file=sys.stderr)
            raise SystemExit(130)
    save_state(args.steps)
    seconds += time.time() - started
    signal.signal(signal.SIGINT, previous)

    # Map normalization and threshold, from validation images; then the model as one file.
    model.calibrate(batches(validation), args.a, args.b, args.map_normalization == "gaussian")
    skipped += getattr(pretraining, "errors", {}).values()
    options = {k: v for k, v in vars(args).items() if k not in ("resume", "out", "checkpoint_every", "categories", "seeds")}
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


def list_jobs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each run of a collection, of several seeds or of an ablation, with its folder; empty for a single run."""
    categories = list_categories(args.data)
    if not (categories or args.categories or args.seeds or args.ablation):
        return []
    if args.ablation and categories:
        raise DataError(f"{args.data}: --ablation takes one category: {', '.join(map(str, categories))}")
    if args.categories and not categories:
        raise DataError(f"{args.data}: --categories takes a folder of categories; this is none, name the one above it")
    if args.categories:
        known, chosen = {c.name: c for c in categories}, dict.fromkeys(args.categories.split(","))
        if not known.keys() >= chosen.keys():
            raise DataError(f"{args.data}: has no category {', '.join(chosen.keys() - known.keys())}; it has: {', '.join(known)}")
        categories = [known[c] for c in chosen]
    name = Path(args.data).resolve().name if categories else open_category(args.data).name
    folder = Path(args.out or f"runs/{name}" + (f"-{args.size}-ablation" if args.ablation else ""))
    if folder.is_file():
        raise DataError(f"{folder}: is a file; choose another --out")
    if (folder / "log.jsonl").exists():
        raise DataError(f"{folder}: is a single run, not a folder of runs; choose another --out")
    jobs = []
    for data in categories or [Path(args.data)]:
        for run, options in (ABLATION if args.ablation else {f"{data.resolve().name}-{args.size}": {}}).items():
            for seed in args.seeds or [args.seed]:
                out = folder / (f"{run}-seed{seed}" if args.seeds else run)
                jobs.append(argparse.Namespace(**{**vars(args), **options, "data": str(data), "seed": seed, "out": str(out)}))
    return jobs


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
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():  # torchrun: from here "cuda" is this process's own GPU
        torch.cuda.set_device(pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    args = parse_arguments(argv)
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
