"""Run folders: one writer at a time, no half-written file, a log that goes on where the run does; and the runs of a collection, of
several seeds or of an ablation."""

import argparse
import errno
import io
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from data import DataError, list_categories, open_category
from efficientad import ModelError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = re.compile(r"\.tmp\d+$")  # names of files that are being written: write's and write_checkpoint's


def lock(path: Path) -> BinaryIO:
    """Take the lock file `path`, until it is closed or the process ends, however it ends. Raises DataError if another process has
    it. A record lock rather than flock: loader workers do not inherit it, which outlive a killed run by seconds."""
    file = open(path, "ab")
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise DataError(f"{path.parent}: in use by another process; wait until it ends, or choose another folder") from None
        print(f"note: {path.parent}: no locks here ({error.strerror}); let no second process write into it", file=sys.stderr)
    return file


def remove_leftovers(folder: Path, pattern: str = "**/*") -> None:
    """Remove what processes were writing when they were killed, of files whose names match. Only for whoever holds their lock."""
    for path in folder.glob(f"{pattern}.tmp*"):
        if TEMPORARY.search(path.name):
            path.unlink(missing_ok=True)


def write(path: Path, content: str | bytes | Image.Image) -> None:
    """Write a text, bytes or an image under a temporary name, then rename: a reader never sees half a file. Names that are not
    UTF-8 appear in a text with escapes. Raises OSError that names the file."""
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, Image.registered_extensions()[path.suffix.lower()])
        content = buffer.getvalue()
    elif isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # a full disk's has no file name
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def open_log(path: Path, step: int) -> BinaryIO:
    """The log of a run that goes on with step `step`: one JSON object a line. What an interrupted run has logged of this and later
    steps goes; so does a line cut short."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if step and path.exists() else ():
        try:
            kept += [line] if json.loads(line)["step"] < step else []
        except (ValueError, TypeError, KeyError):
            pass
    write(path, b"".join(kept))
    return open(path, "ab", buffering=0)  # nothing is kept back: neither kill -9 nor a full disk can cut an earlier line


def log_entry(log: BinaryIO, entry: dict) -> None:
    """Append a line. Raises OSError that names the file."""
    line = json.dumps(entry).encode() + b"\n"
    try:
        if log.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, log.name) from None


def fingerprint(paths: list[Path]) -> int:
    """Of file names: tells whether files came or went while a run was interrupted."""
    return zlib.crc32("\n".join(map(str, paths)).encode(errors="surrogateescape"))


def last_line(error: Exception) -> str:
    """What an error says. One from a loader's worker process comes with the worker's whole traceback, and says it at the end."""
    return str(error).splitlines()[-1].removeprefix("data.DataError: ")


def check_losses(losses: list[Tensor], step: int, place: object) -> None:
    """Raise ModelError, "`place`: step …", with the first step whose loss is not finite. `losses`, scalars on the training device,
    are those of the steps up to `step` that were not looked at yet; the list is emptied. So no step waits for the GPU."""
    finite = torch.stack(losses).isfinite().tolist()
    losses.clear()
    if not all(finite):
        step += 1 - len(finite) + finite.index(False)
        raise ModelError(f"{place}: step {step}: the loss is not finite; lower --lr or use --precision fp32")


# ------------------------------------------------------------------------------------------------------------- lists of runs

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
SIMPLENET_ABLATION = {
    "default": {},
    **{f"noise-{noise}": {"noise": noise} for noise in (0.0015, 0.005, 0.05, 0.15)},
    "no-adaptor": {"no_adaptor": True},
    **{f"layers-{'-'.join(map(str, layers))}": {"layers": layers} for layers in ([2], [3], [1, 2, 3])},
}


def variant(args: argparse.Namespace) -> str:
    """What is trained, in folder names."""
    return "simplenet" if args.model == "simplenet" else args.size


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
        folder = Path("runs") / (f"{name}-{variant(args)}" + (f"-{i}" if i > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise DataError(f"{folder}: too many runs; name one with --out")


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
    folder = Path(args.out or f"runs/{name}" + (f"-{variant(args)}-ablation" if args.ablation else ""))
    if folder.is_file():
        raise DataError(f"{folder}: is a file; choose another --out")
    if (folder / "log.jsonl").exists():
        raise DataError(f"{folder}: is a single run, not a folder of runs; choose another --out")
    jobs = []
    for data in categories or [Path(args.data)]:
        ablation = SIMPLENET_ABLATION if args.model == "simplenet" else ABLATION
        for run, options in (ablation if args.ablation else {f"{data.resolve().name}-{variant(args)}": {}}).items():
            for seed in args.seeds or [args.seed]:
                out = folder / (f"{run}-seed{seed}" if args.seeds else run)
                jobs.append(argparse.Namespace(**{**vars(args), **options, "data": str(data), "seed": seed, "out": str(out)}))
    return jobs
