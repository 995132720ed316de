"""Run folders: one writer at a time, no half-written file, a state to go on from after any end."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from efficientad import ModelError
from support.checkpoints import (
    TOO_LITTLE_MEMORY,
    all_finite,
    filling,
    is_url,
    out_of_memory,
    read_checkpoint,
    write_checkpoint,
)
from support.data import NormalImages
from support.images import DataError
from support.metrics import false_alarms
from support.options import RunOptions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATH_OPTIONS = ("data", "teacher", "pretraining_images", "backbone_weights")
TEMPORARY = re.compile(r"\.unfinished\d+$")  # names of files that are being written


def run_command(main: Callable[[], object], name: str) -> None:
    """Run a script's main function. Bad input, or too little memory, ends in one line and exit
    status 2, Ctrl-C in 130."""
    if sys.stdout:  # not closed
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        main()
    except (DataError, ModelError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: {TOO_LITTLE_MEMORY}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------------------- files


def lock(path: Path) -> BinaryIO:
    """Take the lock file `path`, until it is closed or the process ends. Raises DataError if
    another process has it, or the folder cannot be written. A record lock rather than flock: loader
    workers, which outlive a killed run by seconds, do not inherit it."""
    try:
        file = open(path, "ab")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        remedy = "make it writable, or take another folder"
        raise DataError(f"{path.parent}: cannot be written; {remedy}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EAGAIN, errno.EACCES):
            file.close()
            remedy = "wait until it ends, or choose another folder"
            raise DataError(f"{path.parent}: in use by another process; {remedy}") from None
        warning = "no locks here; let no second process write into it"
        print(f"note: {path.parent}: {warning}", file=sys.stderr)
    return file


def remove_leftovers(folder: Path, pattern: str = "**/*") -> None:
    """Remove what killed processes were writing, of files whose names match. Only for whoever holds
    their lock: folders below that have locks of their own are left alone."""
    for path in folder.glob(f"{pattern}.unfinished*"):
        below = path.parents[: len(path.relative_to(folder).parts) - 1]
        if TEMPORARY.search(path.name) and not any(any(p.glob(".*lock")) for p in below):
            path.unlink(missing_ok=True)


def write(path: Path, content: str | bytes | Image.Image) -> None:
    """Write a text, bytes or an image under a temporary name, then rename: a reader never sees half
    a file. Raises OSError that names the file."""
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, Image.registered_extensions()[path.suffix.lower()])
        content = buffer.getvalue()
    elif isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # file names need not be UTF-8
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name if len(os.fsencode(path.name)) < 200 else fingerprint([path])
    temporary = path.with_name(f"{short}.unfinished{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # a full disk's has no file name
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(paths: list[Path], root: str | Path | None = None) -> int:
    """A number that changes when files come or go; their names count, below `root` if given."""
    names = [os.path.relpath(path, root) if root else str(path) for path in paths]
    return zlib.crc32("\n".join(names).encode(errors="surrogateescape"))


def checksum(path: Path) -> int:
    """Of a file's content."""
    return zlib.crc32(path.read_bytes())


class Log:
    """log.jsonl of a run that goes on with step `step`: what an interrupted run has logged of this
    and later steps goes; so does a line cut short."""

    def __init__(self, path: Path, step: int):
        kept = []
        for line in path.read_bytes().splitlines(keepends=True) if step and path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                kept += [line] if json.loads(line)["step"] < step else []
        write(path, b"".join(kept))
        self.file = open(path, "ab", buffering=0)  # neither kill -9 nor a full disk cuts a line

    def add(self, entry: dict) -> None:
        """Append a line. Raises OSError that names the file."""
        line = json.dumps(entry).encode() + b"\n"
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from None


# ------------------------------------------------------------------------------------- training


class Interrupt:
    """While it is entered, Ctrl-C only sets `asked`; a second one interrupts at once."""

    def __enter__(self) -> "Interrupt":
        self.asked, self.previous = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.previous)


class LossCheck:
    """Finds the first step whose loss is not finite without making each step wait for the GPU."""

    def __init__(self, place: object):
        self.place, self.losses = place, []

    def add(self, loss: Tensor) -> None:
        """The loss of the next step, a scalar on the training device."""
        self.losses.append(loss.detach())

    def look(self, step: int) -> None:
        """Check the losses added since the last look, up to that of `step`. Raises ModelError."""
        finite = torch.stack(self.losses).isfinite().tolist() if self.losses else []
        self.losses.clear()
        if not all(finite):
            step += 1 - len(finite) + finite.index(False)
            remedy = "lower --lr or use --precision fp32"
            raise ModelError(f"{self.place}: step {step}: the loss is not finite; {remedy}")


def find_run(folder: str | None) -> Path:
    """The run in a folder; by default that in runs/, or in a collection's folder there, whose model
    was written last, and a line on stderr names it. Raises DataError if none is complete."""
    if folder:
        run, name = Path(folder), shlex.quote(folder)
        if not (run / "model.pt").exists() and any(run.glob("*/model.pt")):
            command = f"python -m tools.sweep --evaluate {name}"
            raise DataError(f"{run}: is a folder of runs. Use: {command}")
        if not (run / "model.pt").exists() and (run / "resume.pt").exists():
            remedy = f"go on with: python train.py --resume {name}"
            raise DataError(f"{run}: not trained to the end; {remedy}")
        return run
    files = [path for depth in ("", "[!.]*/") for path in Path("runs").glob(f"[!.]*/{depth}*.pt")]
    files.sort(key=lambda path: path.stat().st_mtime)
    models, remedy = [path for path in files if path.name == "model.pt"], ""
    for path in files[files.index(models[-1]) if models else 0 :]:
        if path.name == "resume.pt":
            remedy = f"; {path.parent} is not trained to the end: go on with --resume"
    if not models:
        remedy = remedy or "; run train.py first, or name one with --run"
        raise DataError(f"runs/: no trained model{remedy}")
    print(f"{models[-1].parent}: the newest model{remedy}", file=sys.stderr)
    return models[-1].parent


def holds_results(folder: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed before it had saved, and
    what file managers put there."""
    names = {path.name for path in folder.iterdir()} - {"log.jsonl", "Thumbs.db", "desktop.ini"}
    return any(name[0] != "." and not TEMPORARY.search(name) for name in names)


def new_run_folder(out: str | None, name: str) -> Path:
    """Create the folder of a new run: `out`, or runs/`name` with a number if that exists."""
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    for i in range(1, 10000):
        folder = Path("runs") / (name if i == 1 else f"{name}-{i}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise DataError(f"{folder}: too many runs; name one with --out")


def check_free(options: RunOptions) -> None:
    """Raise DataError if the run's folder is in use, holds another run or cannot be written: before
    images are decoded for minutes, not after."""
    folder = Path(options.resume or options.out or "runs")
    if options.resume:
        lock(folder / ".lock").close()
    elif options.out and folder.exists() and (not folder.is_dir() or holds_results(folder)):
        remedy = f"choose another --out, or go on with --resume {shlex.quote(options.out)}"
        raise DataError(f"{folder}: exists; {remedy}")
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        remedy = "make it writable" if options.resume else "name another folder with --out"
        raise DataError(f"{place}: cannot be written; {remedy}")


def absolute(option: str, value: object) -> object:
    """An option's value as it is saved: from any folder it means the same file."""
    if option not in PATH_OPTIONS or value in (None, "none", "demo") or is_url(value):
        return value
    return os.path.abspath(value)


class Run:
    """The folder of a training run, locked: its log, its saved state, its end.

    `normal`: the images that are trained on. `model`: what is trained, for the folder's name.
    `photos`: the pretraining images, whose errors may grow during training. An interrupted run
    (options.resume) goes on at `step`; if its files have changed, DataError says so.
    """

    def __init__(self, options: RunOptions, normal: NormalImages, model: str, photos=None):
        self.options, self.normal, self.errors = options, normal, getattr(photos, "errors", {})
        paths = [*normal.training.paths, *normal.validation.paths]
        self.files = {"data": fingerprint(paths, normal.category.root)}
        folder = getattr(options, "pretraining_images", None)
        names = fingerprint(photos.paths, folder) if hasattr(photos, "paths") else folder
        self.files["pretraining_images"] = names
        name = f"{normal.category.name}-{model}"
        self.folder = Path(options.resume) if options.resume else new_run_folder(options.out, name)
        self.lock = lock(self.folder / ".lock")
        self.step, self.seconds, self.state = 0, 0.0, None
        if options.resume:
            self.state = read_checkpoint(self.folder / "resume.pt")
        elif holds_results(self.folder):  # another process was faster
            raise DataError(f"{self.folder}: exists; choose another --out")
        remove_leftovers(self.folder)

    def attach(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Fill them from the interrupted run, or save a first state: from its first second on a run
        can be resumed. Raises ModelError for a state that does not fit."""
        self.model, self.optimizers = model, optimizers
        self.check, self.started = LossCheck(self.folder), time.time()
        if self.state is None:
            self.save()
            return
        path, state = self.folder / "resume.pt", self.state
        with filling(f"{path}: damaged, or of another model; start the run again"):
            before = state["files"]  # earlier versions had only folders there
            changed = [name for name, now in self.files.items() if now != before.get(name, now)]
            if not changed:
                model.load_state_dict(state["model"])
                for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                    groups = optimizer.state_dict()["param_groups"]  # a rate on the GPU stays there
                    optimizer.load_state_dict({**saved, "param_groups": groups})
                self.step, self.seconds = state["step"], state["seconds"]
                self.errors |= state["errors"]
                torch.set_num_threads(state["threads"])  # sums depend on it in their last bits
        if changed:
            where = getattr(self.options, changed[0])
            remedy = "put them back, or start a new run"
            raise DataError(f"{where}: has other images than when the run began; {remedy}")

    def describe(self, *words: str) -> None:
        """Say what is trained on what."""
        normal, (height, width) = self.normal, self.options.image_size
        images = f"{len(normal.training)} training and {len(normal.validation)} validation images"
        how = f"{height}×{width}, {self.options.precision} on {self.options.device}"
        name = normal.category.name
        print(f"{self.folder}: {name}, {images}, {how}; {'; '.join(words)}", file=sys.stderr)

    def save(self) -> None:
        """Write resume.pt: all that `step` and the later steps depend on."""
        self.check.look(self.step - 1)
        if not all_finite(self.model.parameters()):
            problem = "it left weights that are not finite; lower --lr or use --precision fp32"
            raise ModelError(f"{self.folder}: step {self.step - 1}: {problem}")
        options = {k: absolute(k, v) for k, v in vars(self.options).items() if k != "resume"}
        seconds = self.seconds + time.time() - self.started
        state = {"format": "run", "options": options, "step": self.step, "seconds": seconds}
        state |= {"files": self.files, "errors": dict(self.errors)}
        state |= {"threads": torch.get_num_threads(), "command": self.options.command}
        state |= {"model": self.model.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        write_checkpoint(state, self.folder / "resume.pt")

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left of `total`, under a progress bar. In between, the state is saved
        every options.checkpoint_every seconds. Ctrl-C saves it and ends the process."""
        self.total, self.log = total, Log(self.folder / "log.jsonl", self.step)
        self.started = saved = time.time()
        arguments = {"initial": self.step, "total": total, "unit": "step", "mininterval": 0.5}
        self.bar = tqdm(range(self.step, total), "training", **arguments)
        with Interrupt() as interrupt:
            for step in self.bar:
                yield step
                self.step = step + 1
                if interrupt.asked or time.time() - saved >= self.options.checkpoint_every:
                    self.save()
                    saved = time.time()
                if interrupt.asked:
                    command = f"{self.options.command} --resume {shlex.quote(str(self.folder))}"
                    end = f"\ninterrupted after {self.step} steps; go on with {command}"
                    print(end, file=sys.stderr)
                    raise SystemExit(130)
            self.save()
        self.seconds += time.time() - self.started

    def record(self, step: int, losses: dict[str, Tensor], lr: float) -> None:
        """Take note of a step's losses, scalars on the device; every tenth step logs and shows
        them. Raises ModelError if one is not finite."""
        self.check.add(sum(losses.values()))
        if step % 10 == 0 or step == self.total - 1:
            self.check.look(step)
            values = dict(zip(losses, torch.stack([*losses.values()]).tolist()))  # one wait
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            self.log.add({"step": step, "lr": lr, **values})

    def finish(self, model: nn.Module) -> Path:
        """Write the calibrated model, and how it was trained, as model.pt: the run is complete."""
        own, normal = ("resume", "out", "checkpoint_every"), self.normal
        skipped = normal.skipped + [error for _, error in sorted(self.errors.items())]
        info = {k: absolute(k, v) for k, v in vars(self.options).items() if k not in own}
        info |= {"category": normal.category.name, "data": str(normal.category.root.resolve())}
        info |= {"training_images": len(normal.training), "appearance": normal.appearance}
        info |= {"validation_images": len(normal.validation), "skipped_images": skipped}
        info["threads"] = torch.get_num_threads()
        model.training_info |= info
        if skipped:
            write(self.folder / "skipped.txt", "\n".join(skipped) + "\n")
        write_checkpoint(model.cpu().checkpoint(), self.folder / "model.pt")
        (self.folder / "resume.pt").unlink(missing_ok=True)
        self.lock.close()
        print(f"threshold {model.threshold:.4f}: {threshold_meaning(len(normal.validation))}")
        print(f"trained in {self.seconds / 60:.1f} minutes, wrote {self.folder / 'model.pt'}; now:")
        print(f"python evaluate.py --run {shlex.quote(str(self.folder))}")
        return self.folder


def threshold_meaning(n: int | None) -> str:
    """What a threshold promises, in words. No score of the n images that it was calibrated on is
    above it."""
    if not n:
        return "the model does not say how many images it was calibrated on"
    expected, bound = (100 * share for share in false_alarms(n))
    promise = f"expect at most {expected:.2g} % false alarms on normal images"
    promise += f", with 95 % confidence less than {bound:.2g} %"
    return f"none of the {n} images that it was calibrated on is above it: {promise}"
