"""Command lines from dataclasses: each option with its default and its help stands once."""

import argparse
import dataclasses
import math
import os
import shlex
import sys
import types
import typing
from pathlib import Path

import torch

from efficientad import ModelError
from support.checkpoints import read_checkpoint
from support.data import list_categories
from support.fast import has_bf16
from support.images import DataError


class OptionError(ValueError):
    """An impossible option; the command line answers with it and exit status 2."""


def option(default: object, text: str, **arguments) -> typing.Any:
    """A field of an options dataclass: default, help, and what else argparse shall know of it."""
    metadata = {"help": text, **arguments}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def make_parser(cls: type, usage: str) -> argparse.ArgumentParser:
    """A parser with an option for each field of the dataclass `cls`; its docstring's first line is
    the description. A field's type is a plain type, a list (several values) or "| None"."""
    parser = argparse.ArgumentParser(
        prog=usage.removeprefix("python -m ").removeprefix("python ").split()[0],
        usage=usage,
        description=cls.__doc__.split("\n")[0],
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, arguments = hints[field.name], dict(field.metadata)
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
            arguments.setdefault("nargs", "+")
        if kind is bool:
            arguments["action"] = "store_true"
        else:
            arguments.setdefault("type", kind)
            if not arguments.get("choices"):
                arguments.setdefault("metavar", {int: "N", float: "X"}.get(kind, "S"))
            if field.default not in (None, dataclasses.MISSING):
                arguments["help"] += f" (default {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **arguments)
    return parser


def parse_options(cls: type, usage: str, argv: list[str] | None = None) -> typing.Any:
    """The options of a command line as an instance of `cls`; with --resume those of the interrupted
    run. Exits with status 2 for an impossible option."""
    parser = make_parser(cls, usage)
    given = vars(parser.parse_args(argv))
    try:
        if isinstance(given.get("resume"), str):  # a run's folder
            moved = {"data", "pretraining_images"}
            if given.keys() - {"resume", "device", "skip_bad_images"} - moved:
                reason = "with it go --device, --skip-bad-images and, if they moved, --data and"
                reason += " --pretraining-images"
                raise OptionError(f"--resume takes its options from the run; {reason}")
            given = {**saved_options(Path(given["resume"]), cls), **given}
        return cls(**given)
    except OptionError as error:
        parser.error(str(error))


def saved_options(folder: Path, cls: type) -> dict:
    """The options of the interrupted run in a folder. Raises ModelError if there is none."""
    path = folder / "resume.pt"
    if not path.exists() and (folder / "model.pt").exists():
        remedy = f"evaluate it with: python evaluate.py --run {shlex.quote(str(folder))}"
        raise ModelError(f"{folder}: this run is complete; {remedy}")
    if not path.exists() and (folder / ".lock").exists():
        remedy = f"start it again, with --out {shlex.quote(str(folder))}"
        raise ModelError(f"{folder}: interrupted before anything was saved; {remedy}")
    state = read_checkpoint(path)
    if state.get("command", cls.command) != cls.command:
        command = f"{state['command']} --resume {shlex.quote(str(folder))}"
        raise ModelError(f"{path}: a run of another kind; go on with: {command}")
    names = {field.name for field in dataclasses.fields(cls)}
    if state.get("format") != "run" or not set(state["options"]) <= names:
        raise ModelError(f"{path}: of another program or an earlier version; start the run again")
    return state["options"]


@dataclasses.dataclass
class RunOptions:
    """What every training run has."""

    command: typing.ClassVar[str]  # what starts such a run
    # options whose defaults depend on the device
    by_device: typing.ClassVar = {"steps", "lr", "precision", "recipe"}
    data: str = option("demo", "a category's folder, a folder of normal images, or demo")
    image_size: list[int] | None = option(None, "H W, or one number; default 256, demo set 128")
    batch_size: int = option(1, "images in a step")
    seed: int = option(0, "seed of all random choices")
    device: str | None = option(None, "cuda or cpu; default cuda if there is one")
    precision: str = option(
        "auto",
        "precision of the training step; auto: bf16 if the hardware has it",
        choices=["auto", "fp32", "bf16"],
    )
    out: str | None = option(None, "run folder; default runs/DATA-MODEL", metavar="DIR")
    skip_bad_images: bool = option(False, "leave out and list images that cannot be read")
    checkpoint_every: float = option(60.0, "seconds between two saved states")
    resume: str | None = option(None, "go on with the interrupted run in DIR", metavar="DIR")

    def __post_init__(self) -> None:
        self.device = str(pick_device(self.device))
        if self.precision == "auto":
            self.precision = "bf16" if has_bf16(torch.device(self.device)) else "fp32"
        if self.image_size:
            if len(self.image_size) > 2:
                given = f"{len(self.image_size)} numbers"
                raise OptionError(f"--image-size takes H W or one number, got {given}")
            self.image_size = [self.image_size[0], self.image_size[-1]]
        if self.batch_size < 1 or not 0 <= self.seed < 2**32 or not self.checkpoint_every >= 0:
            needed = "--batch-size >= 1, --seed >= 0 and < 2**32, --checkpoint-every >= 0"
            raise OptionError(f"need {needed}")

    def check_rate(self, lr: float) -> None:
        if not 0 < lr < math.inf:
            raise OptionError("need --lr > 0")


def refuse_several_runs(argv: list[str] | None, model: str) -> list[str]:
    """The command line (None: the process's) of one run's training. Raises DataError, with the
    command of tools.sweep, if it names several seeds, an ablation, or a folder of categories."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word.split("=")[0] for word in argv]
    values = dict(zip(words, [*argv[1:], ""])) | dict(w.split("=", 1) for w in argv if "=" in w)
    several = {"--seeds", "--ablation", "--categories"} & {*words}
    if "--resume" not in words and (several or list_categories(values.get("--data", "demo"))):
        command = shlex.join(["python", "-m", "tools.sweep", *model.split(), *argv])
        raise DataError(f"these are several runs; this command trains one. Use: {command}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DataError("torchrun shares several runs (torchrun -m tools.sweep); this is one run")
    return argv


def share(text: str) -> float:
    """A share such as 1% or 0.01, of an option."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"takes a share such as 1%, got {text}")
    return value


def pick_device(name: str | None) -> torch.device:
    """The device of this name; by default the GPU if there is one, else the CPU. Raises ModelError
    if torch cannot use it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # others lack float64 or more
            raise ValueError
        torch.empty(1, device=device).item()
    except Exception:  # each kind of device fails in its own way
        reason = "torch cannot use it on this machine; try --device cpu"
        raise ModelError(f"--device {name}: {reason}") from None
    return device
