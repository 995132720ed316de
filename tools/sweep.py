"""Several runs, one after another: the categories of a collection, several seeds, an ablation.

    python -m tools.sweep --data mvtec --seeds 0,1,2         # into runs/mvtec/
    python -m tools.sweep --data mvtec/bottle --ablation     # the trainings behind tables 3 to 5
    python -m tools.sweep --data mvtec --model simplenet
    torchrun --nproc-per-node 4 -m tools.sweep --data visa   # the runs are shared by four GPUs
    python -m tools.sweep --evaluate runs/mvtec              # a table, with the paper's values

All other options are those of train.py, or of baselines.simplenet. The same command goes on after
an interruption: finished runs are skipped, interrupted ones resumed.
"""

import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import evaluate
import train
from baselines import simplenet
from efficientad import EfficientAD, ModelError
from support import data
from support.calibration import fit_gaussian
from support.checkpoints import TOO_LITTLE_MEMORY, filling, is_url, out_of_memory, read_checkpoint
from support.images import DataError, Images
from support.metrics import image_metrics
from support.options import OptionError, RunOptions, make_parser, option, parse_options
from support.report import table
from support.runs import (
    PATH_OPTIONS,
    checksum,
    holds_results,
    lock,
    remove_leftovers,
    run_command,
    write,
)
from support.training import one_by_one
from tools.summary import cells, is_ablation, normalizations, summarize

USAGE = "python -m tools.sweep --data DIR [training options] | --evaluate DIR [--data DIR] [--tiff]"
MODELS = {"efficientad": train, "simplenet": simplenet}
ABLATION = {  # the distinct trainings behind tables 3 to 5, by the name of the run
    "default": {},
    **{f"p_hard-{p}": {"p_hard": p} for p in (0, 0.9, 0.99, 0.9999, 0.99999)},
    "no-penalty": {"pretraining_images": "none"},
    "p_hard-0-no-penalty": {"p_hard": 0, "pretraining_images": "none"},
}


@dataclass
class Options:
    """Train several runs, one after another; or evaluate the runs in a folder."""

    data: str = option("demo", "a folder of categories, or one category")
    categories: str | None = option(None, "only these of a folder of categories", metavar="A,B")
    seeds: list[int] = option([], "a run each", type=simplenet.integers, nargs=None, metavar="0,1")
    ablation: bool = option(
        False, "the trainings behind the paper's tables 3 to 5, and the other recipe"
    )
    model: str = option("efficientad", "what is trained", choices=list(MODELS))
    out: str | None = option(None, "folder of the runs; default runs/DATA", metavar="DIR")
    evaluate: str | None = option(None, "evaluate the runs in DIR, sum them up", metavar="DIR")


@contextlib.contextmanager
def failures(failed: dict[str, str], run: Path) -> Iterator[None]:
    """Take note of what goes wrong with a run, and go on."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            error = TOO_LITTLE_MEMORY
        elif not isinstance(error, (DataError, ModelError, OSError)):
            traceback.print_exc()
        print(f"tools.sweep: {run}: failed: {error}", file=sys.stderr)
        failed[run.name] = str(error)


# -------------------------------------------------------------------------------------- training


def list_jobs(sweep: Options, base: RunOptions) -> list[RunOptions]:
    """The options of each run, with its folder. `base`: what they have in common."""
    known = {path.name: path for path in data.list_categories(sweep.data)}
    name, variant = Path(os.path.abspath(sweep.data)).name, getattr(base, "size", sweep.model)
    if sweep.ablation and known:
        raise DataError(f"{sweep.data}: --ablation takes one category: {', '.join(known)}")
    wanted = sweep.categories.split(",") if sweep.categories else [*known]
    unknown = ", ".join(category for category in wanted if category not in known)
    if unknown:
        there = ", ".join(known) or "none: name the folder above it"
        raise DataError(f"{sweep.data}: has no category {unknown}; it has: {there}")
    categories = {n: known[n] for n in wanted} or {name: data.open_category(sweep.data).root}
    if not (known or sweep.seeds or sweep.ablation):
        command = f"{base.command} --data {shlex.quote(sweep.data)}"
        raise DataError(f"{sweep.data}: this is one run; use: {command}")
    folder = Path(sweep.out or f"runs/{name}" + (f"-{variant}-ablation" if sweep.ablation else ""))
    if folder.is_file() or (folder / "log.jsonl").exists():
        raise DataError(f"{folder}: is not a folder of runs; choose another --out")
    jobs = []
    for name, path in categories.items():
        place = "./demo" if str(path) == "demo" else str(path)  # the word is the built-in set
        runs = {f"{name}-{variant}": {}}
        if sweep.ablation:
            other = "short" if base.recipe == "paper" else "paper"
            runs = ABLATION | {f"recipe-{other}": {"recipe": other, "lr": None}}
        for run, changes in runs.items():
            for seed in dict.fromkeys(sweep.seeds or [base.seed]):
                out = str(folder / (f"{run}-seed{seed}" if sweep.seeds else run))
                jobs.append(replace(base, data=place, seed=seed, out=out, **changes))
    return jobs


def changed_options(job: RunOptions, known: dict) -> list[str]:
    """What a run was begun with and `job` wants otherwise, in words."""
    ignored, found = {"out", "resume", "checkpoint_every", "device", "skip_bad_images"}, []
    if known.get("device", job.device).split(":")[0] != job.device.split(":")[0]:
        ignored |= job.by_device
    for name, wanted in vars(job).items():
        value = known.get(name, wanted)
        same = value == wanted or (name == "steps" and wanted is None)  # SimpleNet: from --epochs
        if name in PATH_OPTIONS and value and wanted:
            same = os.path.realpath(value) == os.path.realpath(wanted)
            moved = not (is_url(value) or os.path.exists(value))  # the project, or the data
            tails = [Path(os.path.abspath(path)).parts[-2:] for path in (value, wanted)]
            same |= moved and tails[0] == tails[1]
        if not same and name not in ignored:
            found.append(f"--{name.replace('_', '-')} {value}, not {wanted}")
    return found


def train_run(job: RunOptions, train: Callable[[RunOptions], Path]) -> None:
    """Train a run, or what is left of it. Raises DataError if it was begun with other options."""
    path, key = Path(job.out) / "model.pt", "training"
    if not path.exists():
        path, key = Path(job.out) / "resume.pt", "options"
    if not path.exists():
        train(job)
        return
    saved = read_checkpoint(path)
    with filling(f"{path}: not of a run of this program; move it away"):
        found = "; ".join(changed_options(job, saved[key]))
    if found:
        remedy = "choose another --out, or move this run away"
        raise DataError(f"was begun with other options: {found}; {remedy}")
    if key == "training":
        print(f"{job.out}: finished, skipped", file=sys.stderr)
    else:
        print(f"{job.out}: interrupted, goes on", file=sys.stderr)
        options = ["--resume", job.out, "--device", job.device, "--data", job.data]
        options += ["--skip-bad-images"] * job.skip_bad_images
        if photos := getattr(job, "pretraining_images", None):
            options += ["--pretraining-images", photos]
        threads = torch.get_num_threads()  # a resumed run takes as many as it began with
        try:
            train(parse_options(type(job), USAGE, options))
        finally:
            torch.set_num_threads(threads)


def train_all(jobs: list[RunOptions], train: Callable[[RunOptions], Path]) -> None:
    """This process's share of the runs. One that fails does not stop the others."""
    # torchrun sets these. The shares depend on nothing else: no two processes write the same run.
    # torchrun ends all processes as soon as one fails; so there a failed run is reported, but the
    # exit status stays 0.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    failed, share, folder = {}, jobs[rank::world], Path(jobs[0].out).parent
    for job in share:
        with failures(failed, Path(job.out)):
            train_run(job, train)
        with contextlib.suppress(OSError):  # --evaluate names folders without a model
            Path(job.out).mkdir(parents=True, exist_ok=True)
    done = f"{len(share) - len(failed)} of {len(share)} runs complete in {folder}"
    print(f"{done}; now: python -m tools.sweep --evaluate {shlex.quote(str(folder))}")
    if failed:
        print("failed runs, which the same command tries again:", *failed, file=sys.stderr)
        if world == 1:
            raise SystemExit(1)


# ------------------------------------------------------------------------------------ evaluation


def place_of(run: Path, model: nn.Module, options: evaluate.Options) -> str | None:
    """Where a run's category lies now, by --data: that, or the folder of its name in it."""
    if options.data is None:
        return None
    known, name = data.list_categories(options.data), model.training_info.get("category")
    found = [str(path) for path in known if path.name == name]
    place = found[0] if found else options.data
    own = not known or found
    if not own or not evaluate.find_tests(run, model, replace(options, data=place))[2]:
        raise DataError(f"{place}: neither is nor holds the set {name} that was trained on")
    return place


def results_of(run: Path, options: evaluate.Options) -> dict:
    """A run's results.json. The run is evaluated first, unless it has one that is whole, of this
    model, and of the data that it was trained on."""
    path = run / "results.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        results = json.loads(path.read_text())
        same = results["model_checksum"] == checksum(run / "model.pt")
        summarize([results])  # it has all that a summary wants
        if results["own_data"] and same and not options.tiff:
            return results
    print(f"{run}:", file=sys.stderr)
    with lock(run / ".lock"):
        remove_leftovers(run)
        model = evaluate.load_run(run, options.device)
        return evaluate.evaluate(run, model, replace(options, data=place_of(run, model, options)))


@torch.no_grad()
def ablation_scores(model: EfficientAD, place: str) -> list[dict]:
    """Image AU-ROC of a run under each map normalization that tables 3 to 5 want of it: the same
    weights, calibrated anew on its validation images. `place`: its category's folder."""
    info, size, device = model.training_info, model.image_size, model.threshold.device
    skip_bad = info.get("skip_bad_images", False)
    normal = data.load_normal_images(place, size, info["seed"], skip_bad)
    tests, loco = normal.category.test, normal.category.layout == "loco"

    test_images = Images([test.path for test in tests], size, cache_bytes=0)
    test_images.remedy = ""
    validation, raw_maps = (
        [model.raw_maps(x) for x in one_by_one(images, device, "ablation")]
        for images in (normal.validation, test_images)
    )
    entries, penalty = [], info["pretraining_images"] != "none"
    for quantiles in normalizations(info["p_hard"], penalty):
        if quantiles:
            model.fit_normalization(validation, *quantiles)
        else:
            fit_gaussian(model, validation)
        scores = [model.normalize_maps(*maps)["combined"].max().item() for maps in raw_maps]
        by_map, defects = {"combined": np.array(scores)}, [test.defect for test in tests]
        found = image_metrics(by_map, defects, model.threshold.item(), average_types=loco)
        entry = {"p_hard": info["p_hard"], "penalty": penalty, "quantiles": quantiles}
        entry["recipe"] = info.get("recipe", "paper")
        entries.append(entry | {"image_auroc": found["image_auroc"]})
    return entries


def evaluate_runs(folder: Path, options: evaluate.Options) -> None:
    """Evaluate each run where it is needed; write and print the summary. A run that fails does not
    stop the others; it makes the exit status 1, as does an unfinished one."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --evaluate takes a folder of runs")
    results, failed = {}, {}
    for run in sorted(path for path in folder.glob("[!.]*") if path.is_dir()):
        with failures(failed, run):
            if (run / "model.pt").exists():
                results[run] = results_of(run, options)
            elif (run / "resume.pt").exists() or not holds_results(run):
                failed[run.name] = "not trained to the end"
    wanted = results if is_ablation([*results.values()]) else {}
    for run, entry in wanted.items():
        if "ablation" not in entry and entry["training"]["p_hard"] is not None:
            with failures(failed, run), lock(run / ".lock"):
                model = evaluate.load_run(run, options.device)
                place = place_of(run, model, options) or model.training_info["data"]
                entry["ablation"] = ablation_scores(model, place)
                write(run / "results.json", json.dumps(entry, indent=1) + "\n")
    if not results and not failed:
        raise DataError(f"{folder}: has no runs in it")
    try:
        tables = summarize([*results.values()])
    except ValueError as error:
        raise DataError(f"{folder}: {error}") from None
    text = "\n".join(f"### {title}\n\n{table(cells(rows))}\n" for title, rows in tables.items())
    text += "".join(f"\nfailed: {name}: {reason}\n" for name, reason in failed.items())
    with lock(folder / ".lock"):
        remove_leftovers(folder, "*")
        content = {"tables": tables, "failed": failed}
        write(folder / "summary.json", json.dumps(content, indent=1) + "\n")
        write(folder / "summary.md", text)
    print(f"\n{text}\nwrote {folder / 'summary.json'} and summary.md")
    if failed:
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> None:
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank < gpus:  # torchrun: from here "cuda" is this process's own GPU
        torch.cuda.set_device(rank)
    parser = make_parser(Options, USAGE)
    known, rest = parser.parse_known_args(argv)
    sweep = Options(**vars(known))
    if sweep.evaluate is not None:
        options = parse_options(evaluate.Options, USAGE, rest)
        others = options.run, options.images, options.accept
        if vars(known).keys() - {"evaluate", "data"} or any(value is not None for value in others):
            parser.error("with --evaluate go only --data, --tiff and --device")
        evaluate_runs(Path(sweep.evaluate), replace(options, data=vars(known).get("data")))
        return
    model = MODELS[sweep.model]
    given = vars(make_parser(model.Options, USAGE).parse_args(rest))
    chosen = {"p_hard", "a", "b", "map_normalization"} & given.keys()
    if sweep.ablation and (chosen or given.get("pretraining_images") == "none"):
        names = "--p-hard, --a, --b, --map-normalization"
        parser.error(f"--ablation chooses {names} and the penalty by itself")
    if sweep.ablation and "minutes" in given:
        parser.error("--ablation takes --steps: its runs are compared after the same number")
    if sweep.ablation and sweep.model != "efficientad":
        parser.error("--ablation trains EfficientAD")
    if "resume" in given or (sweep.seeds and "seed" in given):
        parser.error("give --seed or --seeds; --resume belongs to the training of one run")
    try:
        jobs = list_jobs(sweep, model.Options(data=sweep.data, **given))
    except OptionError as error:
        parser.error(str(error))
    processes, device = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), jobs[0].device
    if device.startswith("cuda") and rank >= gpus:
        reason = "start as many as there are, or use --device cpu"
        raise ModelError(f"torchrun: process {rank} has no GPU of its own; {reason}")
    if device.startswith("cuda") and processes > 1:
        if device != "cuda":
            parser.error(f"--device {device}: with torchrun each process takes a GPU of its own")
        torch.set_num_threads(max(1, os.cpu_count() // processes))  # torchrun gives them one
    train_all(jobs, model.train)


if __name__ == "__main__":
    run_command(main, "tools.sweep")
