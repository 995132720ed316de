"""Measure this implementation, each figure against a baseline in the same run.

    python benchmark.py                                 # inference: EfficientAD-S, -M, SimpleNet, batch 1 and 16; training: S and M
    python benchmark.py --quick --json quick.json       # S and SimpleNet at batch 1; the figures also as a file
    python benchmark.py --json benchmarks/x.json --plot benchmarks/x.svg
    python benchmark.py --readme benchmarks/*.json      # the README's section on speed from these files; measures nothing
    python benchmark.py --accuracy runs/bottle-small    # what the fast form changes of a trained run's maps and scores
    python benchmark.py --metrics                       # AU-PRO: seconds, bytes a pixel, ratio to a plain port of the definition
    python benchmark.py --kernels                       # the Triton kernels: EfficientAD-S and -M at 256², batch 1 and 16

Inference: a pass is what the paper times, image copied in, map copied out, by the clock on the wall. The rows take turns, a pass
each, so that whatever slows the machine slows all of them. Latency is the mean over the last half of the passes, as in the paper
(there 1,000 of 2,000), and the median over the same; there are 2,000 passes, or as many as --budget allows. Compilation, export and
warm-up are excluded. Memory: the peak during a pass beyond what was there before the row: the fp32 model was, a row's copy of its
weights was not. Operations: of convolutions and linear layers, two for a multiplication and addition; the ceiling is a matrix
product in the row's precision.
Training: steps on images in memory. The plain step runs fp32 (or autocast) eager torch, the student on each image by itself with
all channels, the teacher anew every step, Adam as torch has it by default, and waits for its loss.
"""

import argparse
import copy
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

import train
from benchmarks.figures import plot, print_tables, write_readme
from benchmarks.kernel_section import kernel_section
from benchmarks.rows import ROWS, half_type, ours, plain_step, with_kernels
from data import DataError, Images, open_category
from efficientad import EfficientAD, ModelError, cpu_has_bf16, pick_device
from evaluate import load
from metrics import area_under_curve, au_pro, image_auroc
from simplenet import SimpleNet

# --------------------------------------------------------------------------------------------------- inference and training


def environment(device: torch.device) -> dict:
    """Hardware and versions, for the head of a table; of a CPU also how busy it was beforehand."""
    versions = {"Python": platform.python_version()}
    for package in ("torch", "triton", "onnxruntime", "openvino"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "versions": versions}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    name = f"{names[0]}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    for extension, there in (("AMX", torch.cpu._is_amx_tile_supported()), ("AVX512-BF16", cpu_has_bf16(device))):
        name += f", {extension}" * there
    return {"device": name, "versions": versions, "load_average": load}


def memory(device: torch.device, peak: bool = False) -> int | None:
    """Bytes in use now or, with `peak`, at most since the last call without it: on a GPU torch's, on a CPU the process's, which
    Linux alone tells."""
    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    try:
        if not peak:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def take_turns(functions: dict[str, Callable], budget: float) -> dict[str, dict]:
    """Latencies in ms: 2,000 calls of each in turn, or as many as fit into `budget` seconds, but three at least."""
    times, start = {name: [] for name in functions}, time.perf_counter()
    while times and len(next(iter(times.values()))) < 2000:
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - before))
        passes = len(times[name])
        if passes >= 3 and (time.perf_counter() - start) * (passes + 1) / passes > budget:
            break
    last = {name: t[len(t) // 2 :] for name, t in times.items()}
    return {name: {"ms": statistics.mean(t), "median_ms": statistics.median(t), "passes": passes} for name, t in last.items()}


def operations(model: nn.Module, images: Tensor) -> int:
    """Of a pass: two for each multiplication and addition in convolutions and linear layers."""
    counts, hooks = [], []
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            hooks.append(m.register_forward_hook(lambda m, _, y: counts.append(2 * y.numel() * m.weight[0].numel())))
    model(images.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def matmul_tflop_s(dtype: torch.dtype, device: torch.device) -> float:
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)

    def product():
        (a @ a)[0, 0].item()

    product()
    return 2 * n**3 / take_turns({"": product}, 1)[""]["median_ms"] / 1e9


def draw_images(n: int, size: int, device: torch.device) -> Tensor:
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images.pin_memory() if device.type == "cuda" else images


@torch.no_grad()
def measure_rows(model: nn.Module, images: Tensor, names: list[str], budget: float) -> list[dict]:
    """Every row's latency, memory and, to show that it computes the same at all, the RMS difference of its map from the first
    row's, relative to the map's deviation (of an untrained model: smaller than of a trained one)."""
    device, functions, rows, first = next(model.parameters()).device, {}, {}, None
    for name in names:
        size = getattr(model, "config", {}).get("size", "")
        print(f"{type(model).__name__} {size} {tuple(images.shape)}: {name}", file=sys.stderr)
        how, _, allowed = ROWS[name]
        before = memory(device)
        try:
            with warnings.catch_warnings(action="ignore"):
                function = with_kernels(allowed, with_kernels(allowed, how)(model, images))
                function(images)
            memory(device)
            anomaly_map = function(images)
        except Exception as error:  # whatever an exporter or a compiler raises, or that it is not installed
            rows[name] = {"row": name, "missing": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        mib = None if before is None else (memory(device, peak=True) - before) / 2**20
        first = anomaly_map if first is None else first
        error = ((anomaly_map.float() - first).square().mean().sqrt() / first.std()).item()
        rows[name], functions[name] = {"row": name, "memory_mib": mib, "map_error": error}, partial(function, images)
    for name, latency in take_turns(functions, budget).items():
        rows[name] |= latency | {"images_s": 1e3 * len(images) / latency["ms"]}
    return list(rows.values())


def models(names: list[str], device: torch.device, side: int | None = None) -> dict[str, nn.Module]:
    """What is timed, by name; any module that takes uint8 N×3×H×W, gives (map, score) and has `image_size` and `optimize`. The
    weights are random: time does not depend on them. `side`: of EfficientAD's images, 256 by default; SimpleNet has its own."""
    torch.manual_seed(0)
    size = (side or 256,) * 2
    makers = {
        "EfficientAD-S": lambda: EfficientAD(image_size=size),
        "EfficientAD-M": lambda: EfficientAD(size="medium", image_size=size),
        "SimpleNet": SimpleNet,  # on wide_resnet50_2
    }
    return {name: makers[name]().to(device).eval() for name in names}


def inference_section(device: torch.device, quick: bool, budget: float) -> dict:
    half = half_type(device) if device.type == "cuda" or cpu_has_bf16(device) else torch.float32
    ceilings = {False: matmul_tflop_s(torch.float32, device), True: matmul_tflop_s(half, device)}
    names, rows, costs = list(ROWS), [], {"batch size": [], "image size": [], "images": []}
    if quick:
        names.remove("torch.compile max-autotune, half")  # compiling takes long
    timed = ["EfficientAD-S", "SimpleNet"] if quick else ["EfficientAD-S", "EfficientAD-M", "SimpleNet"]
    for name, model in models(timed, device).items():
        for batch in (1,) if quick else (1, 16):
            images = draw_images(batch, model.image_size[0], device)
            with torch.no_grad():
                count = operations(model, images)
            for row in measure_rows(model, images, names, budget):
                if "ms" in row:
                    row["tflop_s"] = count / row["ms"] / 1e9
                    row["fraction_of_ceiling"] = row["tflop_s"] / ceilings[ROWS[row["row"]][1]]
                rows.append({"model": name, "image_size": model.image_size[0], "batch": batch, **row})

    batches = (1, 4) if quick else (1, 2, 4, 8, 16, 32)
    sides = (128, 256) if quick else (128, 256, 512, 768, 1024)
    for cost, batch, side in [("batch size", n, 256) for n in batches] + [("image size", 1, side) for side in sides]:
        model, x = models(["EfficientAD-S"], device, side)["EfficientAD-S"], batch if cost == "batch size" else side
        for row in measure_rows(model, draw_images(batch, side, device), ["eager half", "ours"], budget / 10):
            if "ms" in row:
                costs[cost].append({"x": x, "ms": row["ms"] / batch, "row": row["row"]})
    for n in (1, 4, 8) if quick else (1, 10, 100) if device.type == "cpu" else (1, 10, 100, 1000, 10000):
        model, image = models(["EfficientAD-S"], device)["EfficientAD-S"], draw_images(1, 256, device)
        start, function = time.perf_counter(), ours(model, image)
        for _ in range(n):
            function(image)
        costs["images"].append({"x": n, "ms": 1e3 * (time.perf_counter() - start), "row": "ours, optimize() included"})
    return {"matmul_tflop_s": {"fp32": ceilings[False], "half": ceilings[True]}, "inference": rows, "cost": costs}


def training_section(device: torch.device, quick: bool, budget: float) -> dict:
    """Steps a second of the plain step, in fp32 and under autocast, and of train.py's; batch 1, 256²."""
    rows = []
    bf16 = device.type == "cuda" or cpu_has_bf16(device)
    steps_a_call = 50 if device.type == "cuda" else 1  # between two waits for the device
    for name, model in models(["EfficientAD-S"] if quick else ["EfficientAD-S", "EfficientAD-M"], device).items():
        batch = {"images": draw_images(1, 256, device), "photos": draw_images(1, 256, device).flip(-1)}

        def several(step: Callable, batch: dict[str, Tensor]) -> None:
            for _ in range(steps_a_call):
                step({**batch, "draws": train.draw(1)})
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        functions = {}
        for row, half in (("plain fp32", False), ("plain bf16 autocast", True)):
            plain = copy.deepcopy(model).train()
            optimizer = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-5)
            functions[row] = partial(several, with_kernels(False, partial(plain_step, plain, optimizer, half)), batch)
        fast = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
        kept = {**batch, "images": batch["images"].to(device)}
        kept["teacher"] = train.teacher_outputs(fast, [kept["images"]], "bf16" if bf16 else "fp32")
        step = train.Step(fast, train.make_optimizer(fast, 1e-4), "bf16" if bf16 else "fp32")
        functions["ours"] = partial(several, step, kept)
        if quick or not bf16:
            del functions["plain bf16 autocast"]
        for function in functions.values():
            function()
        for row, latency in take_turns(functions, budget).items():
            per_step = latency["median_ms"] / steps_a_call
            rows.append({"model": name, "row": row, "steps_s": 1e3 / per_step, "minutes_70000": 70000 * per_step / 60e3,
                         "steps": latency["passes"] * steps_a_call})  # fmt: skip
    return {"training": rows}


@torch.no_grad()
def accuracy_section(run: Path, device: torch.device) -> dict:
    """How far the fast form of a run's model is from the model itself, eager fp32, on its category's test images; printed, and
    returned. Raises ModelError or DataError if there is no such run or category."""
    model = load(run, device)
    if "data" not in model.training_info:
        raise DataError(f"{run}: the model does not say what it was trained on; name a run of train.py")
    category, fast, errors, scores = open_category(model.training_info["data"]), model.optimize(), [], []
    good = np.array([sample.defect == "good" for sample in category.test])
    if good.all() or not good.any():
        raise DataError(f"{category.root}: --accuracy needs good and defective test images")
    images = Images([sample.path for sample in category.test], model.image_size, cache_bytes=0)
    for i in tqdm(range(len(images)), "images"):
        x = torch.as_tensor(images[i])[None].to(device)
        (exact_map, exact), (fast_map, approximate) = with_kernels(False, model)(x), fast(x)
        errors.append(((fast_map.float() - exact_map).square().mean().sqrt() / exact_map.std()).item())
        scores.append((exact.item(), approximate.item()))
    exact, approximate = np.array(scores).T
    order = [np.sign(s[:, None] - s) for s in (exact, approximate)]
    figures = {
        "images": len(images),
        "image_auroc": image_auroc(exact[good], exact[~good]),
        "image_auroc_fast": image_auroc(approximate[good], approximate[~good]),
        "map_error_mean": float(np.mean(errors)),
        "map_error_max": max(errors),
        "score_error_max": float(np.abs(approximate - exact).max() / exact.std()),
        "pairs": len(images) * (len(images) - 1) // 2,
        "pairs_in_other_order": int((order[0] != order[1]).sum() // 2),
        "other_verdicts": int(((exact > model.threshold.item()) != (approximate > model.threshold.item())).sum()),
    }
    print(f"{run}, {category.name}, {getattr(fast, 'precision', 'fast form')} against eager fp32:")
    print(*(f"  {name.replace('_', ' ')}: {value:.5g}" for name, value in figures.items()), sep="\n")
    return figures


def draw_maps(count: int, shape: tuple[int, int], seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(maps float32 h×w, masks bool h×w) like a category's: smooth maps, resized bilinearly as evaluate.py does; two images of
    three have one to three round defects (about 3 % of all pixels), over which the map tends to be higher."""
    rng, maps, masks = np.random.default_rng(seed), [], []
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    for i in range(count):
        mask = np.zeros(shape, bool)
        for _ in range(rng.integers(1, 4) if i % 3 else 0):
            y, x, radius = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(0.07, 0.15) * min(shape)
            mask |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        small = ndimage.gaussian_filter(rng.normal(0, 1, (64, 64)), 2)
        values = ndimage.zoom(small, (shape[0] / 64, shape[1] / 64), order=1) + rng.uniform(0, 0.5) * mask
        maps.append(values.astype(np.float32))
        masks.append(mask)
    return maps, masks


def plain_pro_curve(maps: list[np.ndarray], masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The definition of `metrics.pro_curve` in a few lines, the way the official evaluation code goes about it: sort all pixels
    and add up each one's share of the false-positive rate or of its region's overlap."""
    fpr_change, pro_change, regions = [], [], 0
    for mask in masks:
        labels, n = ndimage.label(mask, np.ones((3, 3)))
        pro_change.append(np.zeros(mask.shape))
        for k in range(1, n + 1):
            pro_change[-1][labels == k] = 1 / (labels == k).sum()
        fpr_change.append(labels == 0)
        regions += n
    values = np.concatenate([m.ravel() for m in maps])
    order = np.argsort(values, kind="stable")[::-1]
    normal = np.concatenate([c.ravel() for c in fpr_change])
    fpr = np.cumsum(normal[order].astype(np.float64)) / normal.sum()
    pro = np.cumsum(np.concatenate([c.ravel() for c in pro_change])[order]) / regions
    last = np.append(np.diff(values[order]) != 0, True)  # equal scores move together
    return np.append(0, fpr[last]), np.append(0, np.minimum(pro[last], 1))


def measure(function) -> tuple[float, float, int]:
    """(result, seconds: the best of three runs, peak memory in bytes beyond the arguments)."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()  # in a run of its own, for it slows allocation down
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, min(seconds), peak


def metrics_section() -> dict:
    """Time AU-PRO and its plain port, print both, return the figures."""
    count, shape = 200, (300, 500)
    maps, masks = draw_maps(count, shape)
    pixels = count * shape[0] * shape[1]
    print(f"AU-PRO of {count} float32 maps of {shape[0]}×{shape[1]}, {100 * np.mean(masks):.1f} % of the pixels defective")
    plain, plain_seconds, plain_peak = measure(lambda: area_under_curve(*plain_pro_curve(maps, masks), 0.3))
    area, seconds, peak = measure(lambda: au_pro(maps, masks, 0.3))
    print(f"plain port   {plain_seconds:6.2f} s  {plain_peak / pixels:6.1f} bytes a pixel  area {plain:.9f}")
    print(f"metrics.py   {seconds:6.2f} s  {peak / pixels:6.1f} bytes a pixel  area {area:.9f}")
    print(f"ratio        {plain_seconds / seconds:6.1f} ×  {plain_peak / peak:6.1f} ×")
    return {"pixels": pixels, "seconds": seconds, "bytes_a_pixel": peak / pixels, "plain_seconds": plain_seconds,
            "plain_bytes_a_pixel": plain_peak / pixels}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="Measure this implementation.")
    p.add_argument("--inference", action="store_true", help="latency and throughput; with --training the default")
    p.add_argument("--training", action="store_true", help="steps a second")
    p.add_argument("--accuracy", metavar="RUN", help="maps and scores of a trained run's fast form against eager fp32")
    p.add_argument("--metrics", action="store_true", help="speed and memory of AU-PRO against a plain port")
    p.add_argument("--kernels", action="store_true", help="each Triton kernel against eager and compiled torch; needs a GPU")
    p.add_argument("--quick", action="store_true", help="EfficientAD-S at batch 1 only, and SimpleNet's inference")
    p.add_argument("--budget", type=float, help="seconds for the passes of a table's rows together; default 120, with --quick 10")
    p.add_argument("--device", help="cuda or cpu; default cuda if there is one")
    p.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    p.add_argument("--plot", metavar="FILE", help="draw cost against batch size, image size and number of images (SVG)")
    p.add_argument("--readme", nargs="+", metavar="FILE", help="rewrite the README's section on speed from these files of figures")
    args = p.parse_args(argv)
    if args.readme:
        return write_readme(args.readme)
    device = pick_device(args.device)
    if args.kernels and device.type != "cuda":
        print("benchmark.py: --kernels needs a GPU that torch can use, and there is none", file=sys.stderr)
        sys.exit(2)
    if not (args.inference or args.training or args.accuracy or args.metrics or args.kernels):
        args.inference = args.training = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.backends.cudnn.benchmark = True  # eager convolutions choose their best algorithm
    results, budget = {}, args.budget or (10 if args.quick else 120)
    if args.accuracy:
        results["accuracy"] = accuracy_section(Path(args.accuracy), device)
    if args.metrics:
        results["metrics"] = metrics_section()
    if args.kernels:
        results["kernels"] = kernel_section()
    if args.inference or args.training:
        command = "python benchmark.py" + " --quick" * args.quick + (f" --budget {args.budget:g}" if args.budget else "")
        results |= {"command": command, **environment(device)}
    if args.inference:
        results |= inference_section(device, args.quick, budget)
    if args.training:
        results |= training_section(device, args.quick, budget)
    print_tables(results)
    if args.plot and "cost" in results:
        Path(args.plot).write_text(plot(results), encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ModelError, DataError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
