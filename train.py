"""Train EfficientAD on normal images (sections 3.2 to 3.4 of arXiv 2303.14535).

    python train.py                                  # the built-in demo set
    python train.py --data mvtec/bottle              # then: python evaluate.py
    python train.py --data mvtec_loco/pushpins --size medium --pretraining-images imagenet/train
    python train.py --resume runs/bottle-small       # go on after an interruption

A folder of categories, several seeds and the paper's ablations: python -m tools.sweep. Every random
choice of a step is a function of the seed and the step's number, so a resumed run equals an
uninterrupted one.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from efficientad import EfficientAD, ModelError, check_image_size
from support.checkpoints import load_teacher
from support.data import DataError, is_demo, load_normal_images
from support.options import OptionError, RunOptions, option, parse_options, refuse_several_runs
from support.runs import Run, check_free, run_command
from support.tiling import TiledEfficientAD
from support.training import (
    Step,
    augment,
    batches_of,
    calibrate_gaussian,
    draw,
    fast_losses,
    keep_on_device,
    make_adam,
    one_by_one,
    outputs_fit,
    prepare_torch,
    pretraining_images,
    set_rate,
    teacher_outputs,
    turn_gray,
)

PAPER_STEPS, CPU_STEPS = 70000, 1500
PAPER_LR = 1e-4
SHORT_LR = 3e-4  # below 10,000 steps: it learned faster on MVTec AD's bottle
USAGE = "python train.py [--data DIR] [options]"


@dataclass
class Options(RunOptions):
    """Train EfficientAD on normal images. The paper's values are the defaults."""

    command = "python train.py"
    size: str = option("small", "EfficientAD-S or -M", choices=["small", "medium"])
    steps: int | None = option(None, f"default {PAPER_STEPS}; {CPU_STEPS} without a GPU")
    teacher: str | None = option(None, "default weights/teacher_SIZE.pt", metavar="FILE")
    pretraining_images: str | None = option(
        None, "photos for the penalty, or none; default crops of two photographs", metavar="DIR"
    )
    padding: bool = option(False, "zero padding inside teacher and student; not in the paper")
    lr: float | None = option(None, "learning rate of Adam; default 1e-4, 3e-4 below 10,000 steps")
    p_hard: float = option(0.999, "mining factor of the hard feature loss; 0: none")
    a: float = option(0.9, "map normalization: the quantile that becomes 0")
    b: float = option(0.995, "map normalization: the quantile that becomes 0.1")
    map_normalization: str = option(
        "quantile", "gaussian: the ablation's baseline", choices=["quantile", "gaussian"]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.image_size or ([128, 128] if is_demo(self.data) else [256, 256])
        try:
            check_image_size(tuple(self.image_size))
        except ValueError as error:
            raise OptionError(f"--image-size: {error}") from None
        if self.steps is None:
            self.steps = PAPER_STEPS if self.device.startswith("cuda") else CPU_STEPS
        if self.lr is None:
            self.lr = PAPER_LR if self.steps >= 10000 else SHORT_LR
        self.check_rate(self.lr)
        if self.steps < 1 or not 0 <= self.p_hard <= 1 or not 0 <= self.a < self.b <= 1:
            raise OptionError("need --steps >= 1, 0 <= --p-hard <= 1 and 0 <= --a < --b <= 1")
        if self.map_normalization == "gaussian" and (self.a, self.b) != (Options.a, Options.b):
            raise OptionError("--a and --b belong to --map-normalization quantile")
        weights = Path(__file__).parent / "weights"
        self.teacher = self.teacher or str(weights / f"teacher_{self.size}.pt")
        if not self.resume and not Path(self.teacher).exists():
            remedy = f"make one with python -m tools.distill --size {self.size}"
            raise ModelError(f"{self.teacher}: no such teacher; {remedy}, see weights/README.md")


def losses_of(batch: dict[str, Tensor], model: EfficientAD, p_hard: float) -> dict[str, Tensor]:
    """The losses of a step by name: hard, autoencoder, student_autoencoder, penalty."""
    gray, factor, kind = batch["draws"]
    i = batch["images"]  # I: training images
    j = augment(i, factor, kind)  # J: the same with jittered brightness, contrast or saturation
    p = turn_gray(batch["photos"], gray) if "photos" in batch else None  # P: pretraining images
    teacher = batch["teacher"].permute(0, 3, 1, 2) if "teacher" in batch else None  # T(I), if kept
    return fast_losses(model, (i, j, p), p_hard, teacher)


def train(options: Options) -> Path:
    """One run: the model of a category, in its run folder, which is returned."""
    device, size, n = torch.device(options.device), tuple(options.image_size), options.batch_size
    prepare_torch(options.seed)
    check_free(options)

    # Data: normal images I, a tenth of them (or the set's own validation images) held out, and
    # photos P. All normal images are decoded now: a damaged one is not found an hour later.
    normal = load_normal_images(options.data, size, options.seed, options.skip_bad_images)
    photos, penalty = pretraining_images(
        options.pretraining_images, size, options.steps * n, options.skip_bad_images
    )

    # Teacher, student and autoencoder (section 3). Adam learns the latter two.
    model = TiledEfficientAD(size=options.size, image_size=size, padding=options.padding)
    if not options.resume:
        load_teacher(model, options.teacher)
    model = model.to(device, memory_format=torch.channels_last)
    learned = [*model.student.parameters(), *model.autoencoder.parameters()]
    optimizer = make_adam([{"params": learned, "lr": options.lr}], device)

    # The run folder: a new one, or as an interrupted run left it.
    run = Run(options, normal, options.size, photos)
    run.attach(model, optimizer)
    run.describe(f"{options.steps} steps of {n}", penalty)
    if options.steps < PAPER_STEPS:
        paper = f"the paper's has {PAPER_STEPS} steps and lr {PAPER_LR}"
        print(f"note: a short run; {paper}, this one lr {options.lr}", file=sys.stderr)

    # μ and σ of the teacher over the training images (section 3.2). The teacher's outputs for them
    # are kept if the run sees an image more than once.
    images = keep_on_device(normal.training, device)
    if run.step == 0:
        model.fit_teacher_statistics(one_by_one(images, device, "teacher statistics"))
    streams = {"images": batches_of(images, run.left(options.steps), n, options.seed, 0)}
    if len(images) <= options.steps * n and outputs_fit(model, len(images), options.precision):
        each = one_by_one(images, device, "teacher outputs")
        teacher = teacher_outputs(model, each, options.precision)
        streams["teacher"] = batches_of(teacher, run.left(options.steps), n, options.seed, 0)
    if photos is not None:
        streams["photos"] = batches_of(photos, run.left(options.steps), n, options.seed, 1)

    # Training: the sum of the losses is minimized; the rate drops to a tenth at 95 % of the steps.
    losses = partial(losses_of, model=model, p_hard=options.p_hard)
    take_step = Step(losses, optimizer, device, options.precision)
    model.train()
    for step in run.steps(options.steps):
        torch.manual_seed(options.seed * 1_000_003 + step)
        factor = 0.1 if step >= int(0.95 * options.steps) else 1
        set_rate(optimizer, factor)
        batch = {name: next(batches) for name, batches in streams.items()}
        run.record(step, take_step({**batch, "draws": draw(n)}), options.lr * factor)

    # Map normalization and threshold from the validation images (section 3.4).
    each = one_by_one(normal.validation, device, "calibration")
    if options.map_normalization == "gaussian":
        calibrate_gaussian(model, each)
    else:
        model.calibrate(each, options.a, options.b)
    return run.finish(model)


def main(argv: list[str] | None = None) -> Path:
    argv = sys.argv[1:] if argv is None else argv
    refuse_several_runs(argv, "")
    if "--model" in argv:
        raise DataError("--model is gone; for SimpleNet use: python -m baselines.simplenet")
    return train(parse_options(Options, USAGE, argv))


if __name__ == "__main__":
    run_command(main, "train.py")
