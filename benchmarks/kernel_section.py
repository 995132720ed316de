"""benchmark.py --kernels: each Triton kernel against the same expression in eager torch and in torch.compile (max-autotune),
channels-last tensors too, on a GPU. Ceilings, a copy of 1 GiB and an 8192³ matrix product, are measured in the same run. A time is
the median of calls between CUDA events, after warm-up, the L2 cache overwritten before each; compilation is excluded.
"""

import platform
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import kernels

LAST = torch.channels_last


def milliseconds(function: Callable, calls: int = 50) -> float:
    """Median time of a call on the GPU."""
    for _ in range(5):
        function()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2 cache
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def ceilings() -> dict[str, float]:
    """Copy bandwidth in GB/s (read + written) and half-precision matrix products in TFLOP/s, as this GPU does them now."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    return {
        "copy_gb_s": 2 * (1 << 30) / milliseconds(lambda: target.copy_(source)) / 1e6,
        "matmul_tflop_s": 2 * 8192**3 / milliseconds(lambda: a @ a) / 1e9,
    }


# Each case: name, kernel, the same in plain torch, the operations and bytes that it cannot do without. No arguments are left
# to the functions, so that all are called alike.


def convolution_cases(batch: int):
    for size, stages in (("S", ((3, 256, 128), (128, 126, 256))), ("M", ((3, 256, 256), (256, 126, 512)))):
        for i, (c, side, o) in enumerate(stages):
            x = torch.randn(batch, c, side, side, dtype=torch.float16, device="cuda").to(memory_format=LAST)
            weight = (torch.randn(o, c, 4, 4, dtype=torch.float16, device="cuda") / (4 * c**0.5)).to(memory_format=LAST)
            bias = torch.randn(o, dtype=torch.float16, device="cuda")
            pooled = (side - 3) // 2

            def plain(x, weight, bias):
                return F.avg_pool2d(F.conv2d(x, weight, bias).relu(), 2, 2)

            operations = 2 * batch * (2 * pooled) ** 2 * 16 * c * o
            moved = 2 * (x.numel() + weight.numel() + o + batch * o * pooled**2)
            yield f"conv_relu_pool {size} stage {i + 1}", kernels.conv_relu_pool, plain, (x, weight, bias), operations, moved


def map_cases(batch: int):
    """The same shapes for S and M."""
    teacher, student, autoencoder = (
        torch.randn(batch, c, 56, 56, dtype=torch.float16, device="cuda").to(memory_format=LAST) for c in (384, 768, 384)
    )
    quantiles = torch.tensor([[1.0, 2.0], [1.0, 2.0]], device="cuda")

    def distance(a, b):
        return (a.float() - b.float()).square().mean(1, keepdim=True)

    def combined(teacher, student, autoencoder, quantiles):
        maps = distance(teacher, student[:, :384]), distance(autoencoder, student[:, 384:])
        local_map, global_map = (0.1 * (m - q[0]) / (q[1] - q[0]) for m, q in zip(maps, quantiles))
        return 0.5 * (local_map + global_map)

    positions = batch * 56 * 56
    bytes_of_one = 2 * 384 * positions
    yield "distance_map S, M", kernels.distance_map, distance, (teacher, student[:, :384]), 0, 2 * bytes_of_one + 4 * positions
    arguments = (teacher, student, autoencoder, quantiles)
    yield "combined_map S, M", kernels.combined_map, combined, arguments, 0, 4 * bytes_of_one + 4 * positions


def quantile_of(x, q):
    """By sorting: torch.quantile ends at 2²⁴ elements."""
    x, position = x.flatten().sort().values, q * (x.numel() - 1)
    low = int(position)
    return torch.lerp(x[low], x[min(low + 1, len(x) - 1)], position - low)


def selection_cases(batch: int):
    """The same shapes for S and M. Bytes: six reads of fp32 for the quantile, as kernels/quantile.py says."""
    teacher, student = (torch.randn(batch, 384, 56, 56, device="cuda").to(memory_format=LAST) for _ in "TS")
    student.requires_grad_()
    n = teacher.numel()
    d = (teacher - student.detach()).square()

    def loss(teacher, student, p_hard):
        d = (teacher - student).square()
        hard = d >= quantile_of(d.detach(), p_hard)
        return (d * hard).sum() / hard.sum()

    yield "quantile S, M", kernels.quantile, quantile_of, (d, 0.999), 0, 24 * n
    if batch == 16:
        yield "quantile 20 M", kernels.quantile, quantile_of, (torch.randn(20_000_000, device="cuda"), 0.999), 0, 24 * 20_000_000
    arguments = (teacher, student, 0.999)
    yield "hard loss + gradient S, M", kernels.hard_feature_loss, loss, arguments, 0, 52 * n


@torch.no_grad()
def forward(function: Callable, arguments: tuple) -> None:
    function(*arguments)


def forward_and_gradient(function: Callable, arguments: tuple) -> None:
    torch.autograd.grad(function(*arguments), arguments[1])


def kernel_section() -> dict:
    """Time every kernel, print the table, return all figures."""
    torch.backends.cudnn.benchmark = True  # eager convolutions choose their best algorithm
    limits, rows = ceilings(), []
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}; copy {limits['copy_gb_s']:.0f} GB/s, fp16 matmul"
          f" {limits['matmul_tflop_s']:.0f} TFLOP/s measured in this run")  # fmt: skip
    print(f"{'kernel':28}{'batch':>6}{'ms':>10}{'rate':>16}{'of ceiling':>12}{'× eager':>10}{'× compiled':>12}")
    for batch in (1, 16):
        for cases in (convolution_cases, map_cases, selection_cases):
            for name, kernel, plain, arguments, operations, moved in cases(batch):
                torch.compiler.reset()
                functions = kernel, plain, torch.compile(plain, mode="max-autotune")
                timed = forward_and_gradient if "gradient" in name else forward
                ms, eager, best = (milliseconds(partial(timed, f, arguments)) for f in functions)
                gb_s, tflop_s = moved / ms / 1e6, operations / ms / 1e9
                fraction = max(gb_s / limits["copy_gb_s"], tflop_s / limits["matmul_tflop_s"])
                bound = tflop_s / limits["matmul_tflop_s"] == fraction
                row = {"kernel": name, "batch": batch, "ms": ms, "gb_s": gb_s, "tflop_s": tflop_s, "fraction_of_ceiling": fraction,
                       "eager_ms": eager, "compiled_ms": best}  # fmt: skip
                rows.append(row)
                rate = f"{tflop_s:.0f} TFLOP/s" if bound else f"{gb_s:.0f} GB/s"
                print(f"{name:28}{batch:6}{ms:10.4f}{rate:>16}{fraction:12.0%}{eager / ms:10.2f}{best / ms:12.2f}", flush=True)
    return {"device": torch.cuda.get_device_name(), "versions": versions, **limits, "kernels": rows}
