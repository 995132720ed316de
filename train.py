"""Train EfficientAD on normal images (sections 3.2 to 3.4 of arXiv 2303.14535).

    python train.py                                  # the built-in demo set
    python train.py --data mvtec/bottle --minutes 5  # then: python evaluate.py
    python train.py --resume runs/bottle-small       # go on after an interruption

Recipe paper is the paper's training; teacher, photos P and precision differ by default. Recipe
short, ours, learns more in minutes: docs/options.md. A step's random choices follow from the seed
and its number: on a CPU a resumed run equals an uninterrupted one. Several runs: tools.sweep.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from efficientad import EfficientAD, ModelError, check_image_size
from support import training
from support.calibration import calibrate
from support.checkpoints import is_url, load_teacher
from support.data import load_normal_images
from support.optimizers import cosine, make_optimizers, matrices_of, set_rate
from support.options import OptionError, RunOptions, option, parse_options, refuse_several_runs
from support.runs import Run, check_free, run_command
from support.tiling import TiledEfficientAD

PAPER_STEPS, CPU_STEPS, PAPER_FROM = 70000, 1500, 10000  # below PAPER_FROM: recipe short
LR = {"paper": 1e-4, "short": 2e-3}
ORDER_SEEDS = {"images": 0, "teacher": 0, "photos": 1, "extra": 2, "extra_teacher": 2}
USAGE = "python train.py [--data DIR] [options]"


@dataclass
class Options(RunOptions):
    """Train EfficientAD on normal images: by the paper's recipe, or in minutes by a short one."""

    command = "python train.py"
    size: str = option("small", "EfficientAD-S or -M", choices=["small", "medium"])
    recipe: str | None = option(None, f"default short below {PAPER_FROM} steps", choices=[*LR])
    steps: int | None = option(None, f"default {PAPER_STEPS}; {CPU_STEPS} without a GPU")
    minutes: float | None = option(None, "all done in so many minutes; default recipe short")
    teacher: str | None = option(None, "default weights/teacher_SIZE.pt", metavar="FILE")
    pretraining_images: str | None = option(
        None, "photos for the penalty, or none; default crops of two photographs", metavar="DIR"
    )
    padding: bool = option(False, "zero padding inside teacher and student; published runs: none")
    lr: float | None = option(None, "learning rate; default 1e-4, recipe short 2e-3")
    p_hard: float = option(0.999, "mining factor of the hard feature loss; 0: none")
    a: float = option(0.9, "map normalization: the quantile that becomes 0")
    b: float = option(0.995, "map normalization: the quantile that becomes 0.1")
    map_normalization: str = option(
        "quantile", "gaussian: the ablation's baseline", choices=["quantile", "gaussian"]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.image_size or ([128, 128] if self.data == "demo" else [256, 256])
        try:
            check_image_size(tuple(self.image_size))
        except ValueError as error:
            raise OptionError(f"--image-size: {error}") from None
        if self.minutes is not None:
            if not 0 < self.minutes < float("inf") or self.steps and not self.resume:
                raise OptionError("--minutes takes a number above 0, without --steps")
        if self.steps is None and self.minutes is None:
            self.steps = PAPER_STEPS if self.device.startswith("cuda") else CPU_STEPS
        steps = 1 if self.steps is None else self.steps  # of --minutes: chosen later
        self.recipe = self.recipe or ("paper" if steps >= PAPER_FROM else "short")
        self.lr = LR[self.recipe] if self.lr is None else self.lr
        self.check_rate(self.lr)
        if steps < 1 or not 0 <= self.p_hard <= 1 or not 0 <= self.a < self.b <= 1:
            raise OptionError("need --steps >= 1, 0 <= --p-hard <= 1 and 0 <= --a < --b <= 1")
        if self.map_normalization == "gaussian" and (self.a, self.b) != (Options.a, Options.b):
            raise OptionError("--a and --b belong to --map-normalization quantile")
        weights = Path(__file__).parent / "weights"
        self.teacher = self.teacher or str(weights / f"teacher_{self.size}.pt")
        if not (self.resume or is_url(self.teacher) or Path(self.teacher).exists()):
            remedy = f"make one with python -m tools.distill --size {self.size}"
            raise ModelError(f"{self.teacher}: no such teacher; {remedy}, see weights/README.md")


def losses_of(batch: dict[str, Tensor], model: EfficientAD, p_hard: float) -> dict[str, Tensor]:
    """The losses of a step by name: hard, autoencoder, student_autoencoder, penalty. I: training
    images; J: I with jittered colour (recipe short: half of J is I); P: photos."""
    gray, factor, kind = batch["draws"]
    i, p = batch["images"], batch.get("photos")
    j = training.augment(i, factor, kind)
    p = p if p is None else training.turn_gray(p, gray)
    if model.shared_stem:  # recipe short
        return training.short_losses(model, j, p, p_hard)
    teacher = batch["teacher"].permute(0, 3, 1, 2) if "teacher" in batch else None  # T(I), if kept
    return training.fast_losses(model, (i, j, p), p_hard, teacher)


def rate_factor(step: int, options: Options) -> float:
    """The paper's learning rate drops to a tenth at 95 % of the steps, ours follows a cosine."""
    if options.recipe == "short":
        return cosine(step, options.steps)
    return 0.1 if step >= int(0.95 * options.steps) else 1


def optimizers_of(model: EfficientAD, options: Options) -> list[torch.optim.Optimizer]:
    """Adam; recipe short: Muon, at half the rate, for the autoencoder's later convolutions."""
    learned = [*model.student.parameters(), *model.autoencoder.parameters()]
    matrices = matrices_of(model.autoencoder) if options.recipe == "short" else []
    return make_optimizers(learned, options.lr, matrices, options.lr / 2)


def make_step(model: EfficientAD, optimizers: list, options: Options, data: dict) -> Callable:
    """A function that takes the step of a given number and returns its losses; `data`: inputs."""
    device, n, streams = torch.device(options.device), options.batch_size, {}
    about = optimizers, device, options.precision
    compute = training.Step(partial(losses_of, model=model, p_hard=options.p_hard), *about)
    compute_extra = training.Step(partial(training.extra_losses, model=model), *about)
    model.train().autoencoder.train(not model.shared_stem)  # recipe short: no dropout

    def take_step(step: int) -> dict[str, Tensor]:
        if not streams:  # a resumed run begins in the middle
            steps, seed = range(step, options.steps), options.seed
            for name, images in data.items():
                if images is not None:
                    streams[name] = training.batches_of(images, steps, n, seed, ORDER_SEEDS[name])
            if "photos" in streams and model.shared_stem:
                streams["photos"] = training.quarters(streams["photos"], steps, seed)
        torch.manual_seed(options.seed * 1_000_003 + step)
        set_rate(optimizers, rate_factor(step, options))
        batch = {name: next(batches) for name, batches in streams.items()}
        if "extra" in batch:  # recipe short: a step more for the autoencoder
            compute_extra({name: batch.pop(name) for name in ("extra", "extra_teacher")})
        return compute({**batch, "draws": training.draw(n, unchanged=0.5 * model.shared_stem)})

    return take_step


def train(options: Options, began: float | None = None) -> Path:
    """One run: the model of a category, in its run folder, which is returned. --minutes counts from
    `began`, seconds since 1970, or from now."""
    end = (began or time.time()) + 60 * (options.minutes or math.inf)
    device, size, n = torch.device(options.device), tuple(options.image_size), options.batch_size
    training.prepare_torch(options.seed)
    check_free(options)

    # Data: normal images I, a tenth of them (or the set's own validation images) held out, and
    # photos P. All normal images are decoded now: a damaged one is not found an hour later.
    normal = load_normal_images(options.data, size, options.seed, options.skip_bad_images)
    wanted, folder = (options.steps or math.inf) * n, options.pretraining_images
    photos, penalty = training.pretraining_images(folder, size, wanted, options.skip_bad_images)
    data = {"images": training.keep_on_device(normal.training, device), "photos": photos}

    # Teacher, student, autoencoder; the teacher's μ and σ over the training images (supplement).
    short = options.recipe == "short"
    shape = {"size": options.size, "image_size": size, "padding": options.padding}
    model = TiledEfficientAD(**shape, shared_stem=short)
    model.to(device, memory_format=torch.channels_last)
    if not options.resume:
        load_teacher(model.teacher, options.size, options.teacher)
        if short:
            training.start_from_teacher(model)
            training.keep_teacher_outputs(model, data, options.precision, fit=True)
        else:
            each = training.one_by_one(data["images"], device, "teacher statistics")
            model.fit_teacher_statistics(each)
    if options.steps is None:
        options.steps, trial = 10**6, copy.deepcopy(model)  # enough for the copy to measure
        take_step = make_step(trial, optimizers_of(trial, options), options, data)
        options.steps = training.steps_until(end, take_step, model, normal.validation)
        del trial, take_step

    optimizers = optimizers_of(model, options)
    run = Run(options, normal, options.size, photos)  # new, or as an interrupted run left it
    run.attach(model, optimizers)
    run.describe(f"recipe {options.recipe}: {options.steps} steps of {n}", penalty)

    # The teacher's outputs for I are kept if they are wanted more than once.
    if short or len(data["images"]) <= options.steps * n:
        training.keep_teacher_outputs(model, data, options.precision)

    # Training: the sum of the losses is minimized.
    take_step = make_step(model, optimizers, options, data)
    for step in run.steps(options.steps):
        run.record(step, take_step(step), options.lr * rate_factor(step, options))

    # Map normalization and threshold from the validation images (section 3.4).
    calibrate(model, normal.validation, options.map_normalization, options.a, options.b)
    return run.finish(model)


def main(argv: list[str] | None = None) -> Path:
    options = parse_options(Options, USAGE, refuse_several_runs(argv, ""))
    return train(options, None if argv else training.process_start())


if __name__ == "__main__":
    run_command(main, "train.py")
