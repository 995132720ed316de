"""Anomaly maps from features; each feature is read once, one number a position is written.

`distance_map` is the channel mean of (A − B)² (sections 3.2 and 3.3). `combined_map` computes the
local map of teacher T and student S and the global map of autoencoder A and student S', normalizes
each with its quantiles (section 3.4) and averages them. Arguments may have any strides: a channel
slice, for example the student's first half, is read where it lies.

Cost of a 256² image in fp16 (56² positions, 384 channels, for S and M alike): distance_map reads
2·384·56²·2 = 4.8 MB, 1.1 µs on an H200 at 4.3 TB/s, combined_map twice that; batch 16: 18 and
36 µs. With three operations for two values read, memory alone counts.
"""

import torch
from torch import Tensor

from .runtime import check_tensors, jit, operator, tl, triton

# A program takes BLOCK_P positions, of whatever rows, and goes through the channels in steps of
# BLOCK_C; the longer side is contiguous in memory. 16 positions give 196 programs for a 56² map,
# more than the 132 multiprocessors of an H200. An unrolled loop over the channels would spill
# (channels first).
CONFIGS = {
    "channels last": {"BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4},
    "channels first": {"BLOCK_P": 32, "BLOCK_C": 32, "num_warps": 4},
}


def distance_map_reference(a, b):
    """The same in plain torch."""
    return (a.float() - b.float()).square().mean(1, keepdim=True)


def combined_map_reference(teacher, student, autoencoder, quantiles):
    """The same in plain torch."""
    student, student_ae = student.chunk(2, 1)
    maps = distance_map_reference(teacher, student), distance_map_reference(autoencoder, student_ae)
    q_a, q_b = quantiles.view(2, 2, 1, 1).unbind(1)
    return (0.1 * (torch.cat(maps, 1) - q_a) / (q_b - q_a)).mean(1, keepdim=True)


@jit
def distance(a, b, position, sizes, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channel mean of (a − b)² at the program's positions; a and b are pairs (pointer, strides)."""
    count, H, W = sizes
    n, y, x = position // (H * W), position // W % H, position % W
    a_ptr, a_stride = a
    b_ptr, b_stride = b
    n, y = n.to(tl.int64), y.to(tl.int64)  # a large map has more than 2³¹ elements
    a_ptr += (n * a_stride[0] + y * a_stride[2] + x * a_stride[3])[:, None]
    b_ptr += (n * b_stride[0] + y * b_stride[2] + x * b_stride[3])[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        mask = (c < C) & (position[:, None] < count)
        a_value = tl.load(a_ptr + c * a_stride[1], mask=mask, other=0)
        b_value = tl.load(b_ptr + c * b_stride[1], mask=mask, other=0)
        difference = a_value.to(tl.float32) - b_value.to(tl.float32)
        total += difference * difference
    return tl.sum(total, 1) / C


@jit
def distance_map_kernel(
    a, b, out_ptr, sizes, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = distance(a, b, position, sizes, C, BLOCK_P, BLOCK_C)
    tl.store(out_ptr + position, d, mask=position < sizes[0])


@jit
def combined_map_kernel(
    t, s, a, q_ptr, out_ptr, sizes, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """t, s and a are teacher, student and autoencoder, each (pointer, strides)."""
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    local_map = distance(t, s, position, sizes, C, BLOCK_P, BLOCK_C)
    student_ae = (s[0] + C * s[1][1], s[1])
    global_map = distance(a, student_ae, position, sizes, C, BLOCK_P, BLOCK_C)
    q_a, q_b = tl.load(q_ptr), tl.load(q_ptr + 1)
    local_map = 0.1 * (local_map - q_a) / (q_b - q_a)
    q_a, q_b = tl.load(q_ptr + 2), tl.load(q_ptr + 3)
    global_map = 0.1 * (global_map - q_a) / (q_b - q_a)
    tl.store(out_ptr + position, 0.5 * (local_map + global_map), mask=position < sizes[0])


def launch(kernel, features, *others):
    n, c, h, w = features[0].shape
    config = CONFIGS["channels last" if features[0].stride(1) == 1 else "channels first"]
    pairs = [(x, x.stride()) for x in features]
    out = features[0].new_empty(n, 1, h, w, dtype=torch.float32)
    grid = (triton.cdiv(n * h * w, config["BLOCK_P"]),)
    kernel[grid](*pairs, *others, out, (n * h * w, h, w), c, **config)
    return out


@operator("efficientad::distance_map", distance_map_reference)
def distance_map_op(a: Tensor, b: Tensor) -> Tensor:
    return launch(distance_map_kernel, (a, b))


@operator("efficientad::combined_map", combined_map_reference)
def combined_map_op(teacher: Tensor, student: Tensor, autoencoder: Tensor, q: Tensor) -> Tensor:
    return launch(combined_map_kernel, (teacher, student, autoencoder), q.contiguous())


def distance_map(a: Tensor, b: Tensor) -> Tensor:
    """Channel mean of (a − b)²: N×C×h×w twice, float32, float16 or bfloat16 with any strides ->
    N×1×h×w float32. No gradient. Raises TypeError or ValueError for other input."""
    check_tensors("a and b N×C×h×w", a.ndim == 4 and a.shape == b.shape, a=a, b=b)
    return distance_map_op(a.detach(), b.detach())


def combined_map(
    teacher: Tensor, student: Tensor, autoencoder: Tensor, quantiles: Tensor
) -> Tensor:
    """Teacher N×C×h×w, student N×2C×h×w and autoencoder N×C×h×w, each float32, float16 or bfloat16
    with any strides, and quantiles [[q_a, q_b] of the local, of the global map] -> combined map
    N×1×h×w float32. No gradient. Raises TypeError or ValueError for other input."""
    tensors = {"teacher": teacher, "student": student, "autoencoder": autoencoder}
    tensors["quantiles"] = quantiles.float()
    fit = teacher.ndim == student.ndim == 4 and quantiles.shape == (2, 2)
    fit = fit and [x.shape for x in (autoencoder, *student.chunk(2, 1))] == 3 * [teacher.shape]
    check_tensors("N×C×h×w, a student N×2C×h×w and quantiles 2×2", fit, **tensors)
    return combined_map_op(*(x.detach() for x in tensors.values()))
