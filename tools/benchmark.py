"""Measure this implementation, each figure against a baseline in the same run (docs/speed.md).

    python -m tools.benchmark                      # inference, its cost, training
    python -m tools.benchmark --quick              # S, with shared stem too, and SimpleNet, batch 1
    python -m tools.benchmark --sections kernels   # on a GPU
    python -m tools.benchmark --accuracy runs/bottle-small
    python -m tools.benchmark --json x.json        # then --show x.json: x.svg too
    python -m tools.benchmark --first-gpu --minutes 9 --json gpu.json  # then --show gpu.json

A pass is what the paper times: the image is copied in, the map is copied out. The rows take turns,
a pass each, so that whatever slows the machine slows all of them. As in the paper the last half of
the passes counts: of 2,000, or of as many as --budget allows. Compilation, export and warm-up are
excluded. Memory is the peak during a pass beyond what was in use before the row was made: the fp32
model is not in it, a row's own copy of the weights is. The ceiling is a matrix product in the row's
precision. Weights are random: time does not depend on them.
"""

import copy
import ctypes
import gc
import importlib.metadata
import itertools
import os
import platform
import re
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from baselines.simplenet import SimpleNet
from efficientad import EfficientAD
from evaluate import load_run
from support.data import Category, open_category
from support.fast import DTYPES, PRECISIONS, choose_precision, has_bf16
from support.images import DataError, Images, read_image
from support.metrics import Localization, image_auroc
from support.options import OptionError, option, parse_options, pick_device
from support.runs import run_command
from support.scoring import fast_form
from support.training import one_by_one, prepare_torch
from tools.benchmark_rows import FP32, HALF, ROWS, kernel_cases, our_step, plain_step
from tools.benchmark_tables import section, show
from tools.first_gpu import ROOT, first_gpu, save

USAGE = "python -m tools.benchmark [options]"
SHARED_STEM = "EfficientAD-S, shared stem"  # recipe short's


class Scope(NamedTuple):
    """What is measured, and in how many seconds a table."""

    budget: float = 120
    models: tuple = ("EfficientAD-S", SHARED_STEM, "EfficientAD-M", "SimpleNet")
    rows: tuple = tuple(ROWS)
    batches: tuple = (1, 16)
    cost_batches: tuple = (1, 2, 4, 8, 16, 32)
    cost_sides: tuple = (128, 256, 512, 768, 1024)
    cost_images: tuple = (1, 10, 100)
    side: int = 256  # of EfficientAD's images, but for the cost against it


FAST_TO_MAKE = tuple(name for name in ROWS if "compile" not in name)
QUICK_MODELS = ("EfficientAD-S", SHARED_STEM, "SimpleNet")
QUICK = Scope(10, QUICK_MODELS, FAST_TO_MAKE, (1,), (1, 4), (128, 256), (1, 4, 8))
FIRST = Scope(10, ("EfficientAD-S", "EfficientAD-M"))  # of --first-gpu


# ------------------------------------------------------------------------------------- measuring


def environment(device: torch.device) -> dict:
    """Hardware and versions; of a CPU also how busy it was beforehand."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    names = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "openvino")
    versions = [f"{name} {installed[name]}" for name in names if name in installed]
    software = ", ".join([f"Python {platform.python_version()}", *versions])
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "software": software}
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    words = [name[1] if name else platform.processor()]
    words.append(f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    words += ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    words += ["AVX512-BF16"] if device.type == "cpu" and has_bf16(device) else []
    load = os.getloadavg()[0]
    return {"device": ", ".join(words), "software": software, "load average before": load}


def memory(device: torch.device, peak: bool = False) -> float:
    """MiB in use now or, with `peak`, at most since the last call without it. On a GPU what torch
    has reserved, as a CUDA graph's intermediates are, on a CPU the process's."""
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_reserved(device) / 2**20
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device) / 2**20
    if not peak:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    field = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def take_turns(functions: dict[str, Callable], budget: float) -> dict[str, dict]:
    """Latencies: 2,000 calls of each in turn, or as many as `budget` seconds allow, at least 3."""
    times, start, passes, seconds = {name: [] for name in functions}, time.perf_counter(), 0, 0.0
    while passes < 3 or (passes < 2000 and seconds * (passes + 1) / passes < budget):
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - before))
        passes, seconds = passes + 1, time.perf_counter() - start
    latencies = {}
    for name, ms in times.items():
        mean, median = statistics.mean(ms[passes // 2 :]), statistics.median(ms[passes // 2 :])
        latencies[name] = {"mean ms": mean, "median ms": median, "passes": passes}
    return latencies


def milliseconds(function: Callable, device: torch.device) -> float:
    """The time of a call by itself. On a GPU the calls are one CUDA graph: the host takes longer to
    launch a short kernel than the kernel takes. Arguments that fit come from the cache."""
    if device.type == "cpu":
        return take_turns({"": function}, 0.2)[""]["median ms"]
    from triton.testing import do_bench_cudagraph

    gc.collect()
    gc.disable()  # a graph that is collected while another is captured ends the capture
    try:
        with torch.cuda.device(device):  # the graph's stream is on the current one
            return do_bench_cudagraph(function, rep=50, return_mode="median")
    finally:
        gc.enable()


def matrix_products(device: torch.device) -> dict[str, float]:
    """TFLOP/s in fp32, and in half precision if the device has it."""
    n, rates = 8192 if device.type == "cuda" else 2048, {}
    for key, precision in ((FP32, "fp32"), (HALF, choose_precision("auto", device))):
        a = torch.randn(n, n, device=device).to(DTYPES[precision])
        rates[key] = 2 * n**3 / milliseconds(lambda: a @ a, device) / 1e9
    return rates


def make_model(name: str, device: torch.device, side: int) -> nn.Module:
    """A model with random weights. SimpleNet, on wide_resnet50_2, has an image size of its own."""
    torch.manual_seed(0)
    if name == "SimpleNet":
        return SimpleNet().to(device).eval()
    size = "medium" if name == "EfficientAD-M" else "small"
    shape = {"size": size, "image_size": (side, side), "shared_stem": name == SHARED_STEM}
    return EfficientAD(**shape).to(device).eval()


def draw_images(n: int, side: int, device: torch.device) -> Tensor:
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return images.pin_memory() if device.type == "cuda" else images


def map_error(m: Tensor, exact: Tensor) -> float:
    """RMS difference over the exact map's standard deviation."""
    return ((m - exact).square().mean().sqrt() / exact.std()).item()


@torch.no_grad()
def measure_rows(model: nn.Module, images: Tensor, names: tuple, budget: float) -> list[dict]:
    """Each row's latency, memory, and the error of its map against the first row's: they compute
    the same. A row that fails says why instead."""
    device, functions, about, first = model.threshold.device, {}, {}, None
    for name in names:
        print(f"{type(model).__name__} {tuple(images.shape)}: {name}", file=sys.stderr)
        before = memory(device)
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                function = ROWS[name][0](model, images)
                function(images)
            memory(device)
            m = function(images)
        except Exception as error:  # a compiler's or exporter's, or it is not installed
            about[name] = {"missing": f"{type(error).__name__}: {error}".splitlines()[0][:80]}
            continue
        peak = memory(device, peak=True) - before
        first = m if name == names[0] else first
        about[name] = {"peak MiB": peak}
        if first is not None:
            about[name]["map error"] = map_error(m, first)
        if choice := getattr(function, "choice", ""):
            ours = [str(note.message) for note in notes if str(ROOT) in note.filename]
            about[name]["how"] = "; ".join([choice, *ours])
        functions[name] = partial(function, images)
    latencies = take_turns(functions, budget)
    for name, latency in latencies.items():
        latency["images/s"] = 1e3 * len(images) / latency["mean ms"]
        if names[0] in latencies:
            latency["×"] = latencies[names[0]]["mean ms"] / latency["mean ms"]
    return [{"row": name, **latencies.get(name, {}), **about[name]} for name in names]


# -------------------------------------------------------------------------------------- sections


def inference_section(scope: Scope, device: torch.device) -> dict:
    """Every row for every model and batch size."""
    rows, products = [], matrix_products(device)
    for name, batch in itertools.product(scope.models, scope.batches):
        model = make_model(name, device, scope.side)
        images = draw_images(batch, model.image_size[0], device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images[:1].to(device))
        for row in measure_rows(model, images, scope.rows, scope.budget):
            if "mean ms" in row:
                row["TFLOP/s"] = batch * counter.get_total_flops() / row["mean ms"] / 1e9
                row["% of ceiling"] = 100 * row["TFLOP/s"] / products[ROWS[row["row"]][1]]
            rows.append({"model": name, "batch": batch, **row})
    return {**products, "inference": rows}


@torch.no_grad()
def cost_section(scope: Scope, device: torch.device) -> dict:
    """EfficientAD-S: ms an image against batch size and image size; ms of so many images."""
    points = [("batch size", n, n, scope.side) for n in scope.cost_batches]
    points += [("image size", side, 1, side) for side in scope.cost_sides]
    costs = []
    for cost, x, batch, side in points:
        model, images = make_model("EfficientAD-S", device, side), draw_images(batch, side, device)
        for row in measure_rows(model, images, ("eager half", "ours"), scope.budget / 10):
            if "mean ms" in row:
                point = {"cost against": cost, "row": row["row"], "at": x}
                costs.append({**point, "ms": row["mean ms"] / batch})
    for n in scope.cost_images + ((1000, 10000) if device.type == "cuda" else ()):
        image, start = draw_images(1, scope.side, device), time.perf_counter()
        function = ROWS["ours"][0](make_model("EfficientAD-S", device, scope.side), image)
        for _ in range(n):
            function(image)
        ms = 1e3 * (time.perf_counter() - start)
        costs.append({"cost against": "images", "row": "ours, with optimize()", "at": n, "ms": ms})
    return {"cost": costs}


def training_section(scope: Scope, device: torch.device) -> dict:
    """Steps a second of batch 1: the plain step, in fp32 and under autocast, and train.py's."""
    rows, best = [], "bf16" if has_bf16(device) else "fp32"
    makers = {"plain fp32": (plain_step, "fp32"), f"plain {best}": (plain_step, best)}
    makers["ours"] = our_step, best
    for name in scope.models:
        if name in ("SimpleNet", SHARED_STEM):  # the steps are the paper's
            continue
        model, functions = make_model(name, device, scope.side).train(), {}
        images, photos = (draw_images(1, scope.side, device) for _ in range(2))
        for row, (make, precision) in makers.items():
            functions[row] = make(copy.deepcopy(model), precision, images, photos)
        latencies = take_turns(functions, scope.budget)
        for row, latency in latencies.items():
            ms, first = latency["median ms"], latencies["plain fp32"]["median ms"]
            times = {"×": first / ms, "minutes for 70,000 steps": 70 * ms / 60}
            about = {"steps/s": 1e3 / ms, **times, "steps": latency["passes"]}
            rows.append({"model": name, "row": row, **about})
    return {"training": rows}


def kernels_section(scope: Scope, device: torch.device) -> dict:
    """Each Triton kernel against plain torch. At the ceiling every argument is read and every
    result is written once as fast as a copy does it, and a convolution is as fast as a matrix
    product. On a CPU the kernels compute their references: it can be tried there, no more."""
    source, rows, products = torch.zeros(2**26, device=device), [], matrix_products(device)
    copy_gb_s = 2 * source.nbytes / milliseconds(source.clone, device) / 1e6
    for batch in scope.batches:
        for name, kernel, plain, arguments in kernel_cases(batch, scope.side, device):
            print(f"{name}, batch {batch}", file=sys.stderr)

            def call(function: Callable) -> tuple[Tensor, ...]:
                result = function(*arguments)
                if not result.requires_grad:
                    return (result,)
                # Detached: no node of this stream outlives the call, or a later capture fails.
                return result.detach(), *torch.autograd.grad(result, arguments[1])

            with FlopCounterMode(display=False) as counter:
                tensors = [x for x in (*arguments, *call(plain)) if isinstance(x, Tensor)]
            least_ms = sum(x.nbytes for x in tensors) / copy_gb_s / 1e6
            least_ms = max(least_ms, counter.get_total_flops() / products[HALF] / 1e9)
            functions = {"ms": kernel, "eager ms": plain}
            if any("compile" in row for row in scope.rows):
                torch.compiler.reset()
                # without graphs of its own: no graph can be captured within another
                compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs")
                functions["compiled ms"] = compiled
            times = {key: milliseconds(partial(call, f), device) for key, f in functions.items()}
            share = {"% of ceiling": 100 * least_ms / times["ms"]}
            rows.append({"kernel": name, "batch": batch, **times, **share})
    return {"copy, GB/s": copy_gb_s, **products, "kernels": rows}


@torch.no_grad()
def accuracy_section(run: Path, device: torch.device, precision: str) -> dict:
    """How far the fast form of a run's model is from the model, eager fp32, on its category's test
    images; AU-PRO is at the model's size. Raises ModelError or DataError if there is no such run or
    category."""
    model = load_run(run, device)
    if "data" not in model.training_info:
        raise DataError(f"{run}: does not say what it was trained on; name a run of train.py")
    category = open_category(model.training_info["data"])
    forms = {"eager fp32": model, "fast form": fast_form(model, precision)}
    good = np.array([sample.defect == "good" for sample in category.test])
    if good.all() or not good.any():
        raise DataError(f"{category.root}: --accuracy needs good and defective test images")
    images = Images([sample.path for sample in category.test], model.image_size, cache_bytes=0)
    images.remedy = ""
    maps, scores, errors = {name: [] for name in forms}, {name: [] for name in forms}, []
    for x in one_by_one(images, device, "images"):
        for name, form in forms.items():
            m, score = form(x)
            maps[name].append(m[0, 0].float().cpu().numpy())
            scores[name].append(score.item())
        pairs = zip(*(raw_maps(form, x) for form in forms.values()))
        errors.append([map_error(fast, exact) for exact, fast in pairs])
    exact, approximate = (np.array(values) for values in scores.values())
    orders = [np.sign(s[:, None] - s) for s in (exact, approximate)]
    verdicts = [np.array(s) > forms[name].threshold.item() for name, s in scores.items()]
    results = {"run": str(run), "precision": getattr(forms["fast form"], "precision", "fp32")}
    results["test images"] = len(images)
    for name, values in zip(forms, (exact, approximate)):
        results[f"image AU-ROC, {name}"] = image_auroc(values[good], values[~good])
        results[f"AU-PRO 0.3, {name}"] = au_pro_of(maps[name], category)
    return results | {
        "mean error of local and of global map": ", ".join(f"{e:.3g}" for e in np.mean(errors, 0)),
        "largest error of a map": float(np.max(errors)),
        "pairs of images": len(images) * (len(images) - 1) // 2,
        "pairs in another order": int((orders[0] != orders[1]).sum() // 2),
        "other verdicts": int((verdicts[0] != verdicts[1]).sum()),
    }


def raw_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """A model's maps before their normalization, which int8 has of its own."""
    return model.raw_maps(images) if isinstance(model, EfficientAD) else (model(images)[0],)


def au_pro_of(maps: list[np.ndarray], category: Category) -> float | None:
    """AU-PRO of the test images' maps, or None without masks."""
    localization = Localization()
    for m, sample in zip(maps, category.test):
        mask = Image.fromarray(np.uint8(255) * sample.mask(read_image(sample.path).size[::-1]))
        mask = mask.resize(m.shape[::-1], Image.Resampling.BOX)  # a small defect stays
        localization.add(m, np.asarray(mask) > 0, sample.defect)
    if not localization.located:
        return None
    localization.measure(maps)
    return localization.areas()["overall"]["0.3"]


# --------------------------------------------------------------------------------------- command

SECTIONS = {"inference": inference_section, "cost": cost_section}
SECTIONS |= {"training": training_section, "kernels": kernels_section}


@dataclass
class Options:
    """Measure this implementation, each figure against a baseline in the same run."""

    sections: list[str] = option(
        list(SECTIONS)[:3], "default all but kernels, which needs a GPU", choices=list(SECTIONS)
    )
    accuracy: str | None = option(None, "instead: a run's fast form against eager", metavar="RUN")
    precision: str = option("auto", "of --accuracy", choices=PRECISIONS)
    quick: bool = option(False, "EfficientAD-S, with shared stem too, and SimpleNet, batch 1")
    budget: float | None = option(None, "seconds for a table; default 120, 10 with --quick")
    device: str | None = option(None, "cuda or cpu; default cuda if there is one")
    json: str | None = option(None, "write the figures to this file too", metavar="FILE")
    show: str | None = option(None, "instead: such a file's tables and picture", metavar="FILE")
    first_gpu: bool = option(False, "tests and figures in order of worth, in --minutes")
    minutes: float = option(9, "of --first-gpu, which ends in time")

    def __post_init__(self) -> None:
        self.device = str(pick_device(self.device))
        if "kernels" in self.sections and not self.device.startswith("cuda"):
            raise OptionError("--sections kernels needs a GPU that torch can use")
        if self.first_gpu and (not self.json or not self.minutes > 0):
            raise OptionError("--first-gpu takes --json FILE and --minutes above 0")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(Options, USAGE, argv)
    if options.show:
        return show(Path(options.show))
    prepare_torch(0)
    device = torch.device(options.device)
    scope = FIRST if options.first_gpu else QUICK if options.quick else Scope()
    if options.budget is not None:
        scope = scope._replace(budget=options.budget)
    command = shlex.join(["python", "-m", "tools.benchmark", *argv])
    results = {"command": command, **environment(device)}
    if options.first_gpu:
        save(Path(options.json), results)
        results = first_gpu(Path(options.json), SECTIONS, scope, device, options.minutes)
    elif options.accuracy:
        results |= accuracy_section(Path(options.accuracy), device, options.precision)
    else:
        for name in options.sections:
            results |= SECTIONS[name](scope, device)
            if options.json:  # a later section may fail
                save(Path(options.json), results)
    print(section(results))
    if options.json:
        save(Path(options.json), results)


if __name__ == "__main__":
    run_command(main, "tools.benchmark")
