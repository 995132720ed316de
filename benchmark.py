"""Measure this implementation, each figure against a baseline in the same run.

    python benchmark.py --metrics                    # AU-PRO: seconds, bytes a pixel, ratio to a plain port of the definition
"""

import argparse
import time
import tracemalloc

import numpy as np
from scipy import ndimage

from metrics import area_under_curve, au_pro


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


def benchmark_metrics() -> None:
    count, shape = 200, (300, 500)
    maps, masks = draw_maps(count, shape)
    pixels = count * shape[0] * shape[1]
    print(f"AU-PRO of {count} float32 maps of {shape[0]}×{shape[1]}, {100 * np.mean(masks):.1f} % of the pixels defective")
    plain, plain_seconds, plain_peak = measure(lambda: area_under_curve(*plain_pro_curve(maps, masks), 0.3))
    area, seconds, peak = measure(lambda: au_pro(maps, masks, 0.3))
    print(f"plain port   {plain_seconds:6.2f} s  {plain_peak / pixels:6.1f} bytes a pixel  area {plain:.9f}")
    print(f"metrics.py   {seconds:6.2f} s  {peak / pixels:6.1f} bytes a pixel  area {area:.9f}")
    print(f"ratio        {plain_seconds / seconds:6.1f} ×  {plain_peak / peak:6.1f} ×")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure this implementation.")
    parser.add_argument("--metrics", action="store_true", help="speed and memory of AU-PRO")
    args = parser.parse_args()
    if not args.metrics:
        parser.error("nothing to measure; give --metrics")
    benchmark_metrics()
