"""Anomaly maps from features: one read of each feature tensor, one number a position written.

`distance_map`: channel mean of (A − B)², sections 3.2 and 3.3. `combined_map`: both maps from teacher T, student [S, S'] and
autoencoder A, each normalized with its quantiles (section 3.4) and averaged. Arguments may have any strides: a channel slice, say
the student's first half, is read where it lies.

Bytes at 256² (56² positions, 384 channels, the same for S and M), one image in fp16: distance_map 2·384·56²·2 = 4.8 MB, 1.1 µs on
an H200 at 4.3 TB/s; combined_map 4·384·56²·2 = 9.6 MB, 2.2 µs; batch 16: 18 and 36 µs. Three operations for two values read:
memory alone counts. Not measured on a GPU yet.
"""

import torch
from torch import Tensor

from .triton_or_not import cdiv, jit, runs_on, tl

# A program takes BLOCK_W positions of a row and goes through the channels in steps of BLOCK_C: the longer side is the one that
# is contiguous in memory. 16 positions give 224 programs for one 56² map, more than an H200's 132 multiprocessors. The loop over
# the channels is not unrolled: unrolled, the loads of the channels-first form spill.
CONFIGS = {
    "channels last": {"BLOCK_W": 16, "BLOCK_C": 128, "num_warps": 4},
    "channels first": {"BLOCK_W": 64, "BLOCK_C": 32, "num_warps": 4},
}


def distance_map_reference(a: Tensor, b: Tensor) -> Tensor:
    """The same in plain torch: N×C×h×w twice -> N×1×h×w float32."""
    return (a.float() - b.float()).square().mean(1, keepdim=True)


def combined_map_reference(teacher: Tensor, student: Tensor, autoencoder: Tensor, quantiles: Tensor) -> Tensor:
    """The same in plain torch: combined, local and global map in the channels of N×3×h×w float32."""
    student, student_ae = student.chunk(2, 1)
    maps = [distance_map_reference(teacher, student), distance_map_reference(autoencoder, student_ae)]
    local_map, global_map = (0.1 * (m - q[0]) / (q[1] - q[0]) for m, q in zip(maps, quantiles.float()))
    return torch.cat([0.5 * (local_map + global_map), local_map, global_map], 1)


@jit
def distance(a_ptr, a_stride, b_ptr, b_stride, n, h, w, W, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean over the C channels of (a − b)² at the positions w of row h of image n."""
    total = tl.zeros((w.shape[0], BLOCK_C), tl.float32)
    a_ptr += n.to(tl.int64) * a_stride[0] + h * a_stride[2]
    b_ptr += n.to(tl.int64) * b_stride[0] + h * b_stride[2]
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        inside = (c < C) & (w[:, None] < W)
        a = tl.load(a_ptr + c * a_stride[1] + w[:, None] * a_stride[3], mask=inside, other=0).to(tl.float32)
        b = tl.load(b_ptr + c * b_stride[1] + w[:, None] * b_stride[3], mask=inside, other=0).to(tl.float32)
        total += (a - b) * (a - b)
    return tl.sum(total, 1) / C


@jit
def distance_map_kernel(
    a_ptr, a_stride, b_ptr, b_stride, out_ptr, H, W, C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr
):
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    d = distance(a_ptr, a_stride, b_ptr, b_stride, n, h, w, W, C, BLOCK_C)
    tl.store(out_ptr + tl.program_id(0) * W + w, d, mask=w < W)


@jit
def combined_map_kernel(
    teacher_ptr, teacher_stride, student_ptr, student_stride, autoencoder_ptr, autoencoder_stride, quantiles_ptr, out_ptr,
    H, W, CHANNELS_OUT: tl.constexpr, C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    student_ae_ptr = student_ptr + C * student_stride[1]
    local_map = distance(teacher_ptr, teacher_stride, student_ptr, student_stride, n, h, w, W, C, BLOCK_C)
    global_map = distance(autoencoder_ptr, autoencoder_stride, student_ae_ptr, student_stride, n, h, w, W, C, BLOCK_C)
    q_a, q_b = tl.load(quantiles_ptr), tl.load(quantiles_ptr + 1)
    local_map = 0.1 * (local_map - q_a) / (q_b - q_a)
    q_a, q_b = tl.load(quantiles_ptr + 2), tl.load(quantiles_ptr + 3)
    global_map = 0.1 * (global_map - q_a) / (q_b - q_a)
    out_ptr += (n * CHANNELS_OUT * H + h) * W + w
    tl.store(out_ptr, 0.5 * (local_map + global_map), mask=w < W)
    if CHANNELS_OUT == 3:
        tl.store(out_ptr + H * W, local_map, mask=w < W)
        tl.store(out_ptr + 2 * H * W, global_map, mask=w < W)


def config_of(x: Tensor) -> dict:
    return CONFIGS["channels last" if x.stride(1) == 1 else "channels first"]


@torch.library.custom_op("efficientad::distance_map", mutates_args=())
def distance_map_op(a: Tensor, b: Tensor) -> Tensor:
    if not runs_on(a, b):
        return distance_map_reference(a, b)
    (n, c, h, w), config = a.shape, config_of(a)
    out = a.new_empty(n, 1, h, w, dtype=torch.float32)
    with torch.cuda.device_of(a):
        distance_map_kernel[(n * h, cdiv(w, config["BLOCK_W"]))](a, a.stride(), b, b.stride(), out, h, w, C=c, **config)
    return out


@distance_map_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], 1, *a.shape[2:], dtype=torch.float32)


@torch.library.custom_op("efficientad::combined_map", mutates_args=())
def combined_map_op(teacher: Tensor, student: Tensor, autoencoder: Tensor, quantiles: Tensor, singles: bool) -> Tensor:
    if not runs_on(teacher, student, autoencoder, quantiles):
        return combined_map_reference(teacher, student, autoencoder, quantiles)[:, : 3 if singles else 1].contiguous()
    (n, c, h, w), config = teacher.shape, config_of(teacher)
    out = teacher.new_empty(n, 3 if singles else 1, h, w, dtype=torch.float32)
    with torch.cuda.device_of(teacher):
        combined_map_kernel[(n * h, cdiv(w, config["BLOCK_W"]))](
            teacher, teacher.stride(), student, student.stride(), autoencoder, autoencoder.stride(),
            quantiles.float().contiguous(), out, h, w, CHANNELS_OUT=out.shape[1], C=c, **config,
        )  # fmt: skip
    return out


@combined_map_op.register_fake
def _(teacher: Tensor, student: Tensor, autoencoder: Tensor, quantiles: Tensor, singles: bool) -> Tensor:
    return teacher.new_empty(teacher.shape[0], 3 if singles else 1, *teacher.shape[2:], dtype=torch.float32)


def check_features(**features: Tensor) -> None:
    for name, x in features.items():
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
        if x.ndim != 4 or x.numel() == 0:
            raise ValueError(f"{name} must be N×C×h×w with at least one element, got {tuple(x.shape)}")
    if len({x.device for x in features.values()}) > 1:
        raise ValueError("all arguments must be on one device, got " + ", ".join(f"{k} on {x.device}" for k, x in features.items()))


def distance_map(a: Tensor, b: Tensor) -> Tensor:
    """Channel mean of (a − b)²: N×C×h×w twice (float32, float16 or bfloat16, any strides) -> N×1×h×w float32. No gradient.
    Raises TypeError or ValueError for other input."""
    check_features(a=a, b=b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return distance_map_op(a.detach(), b.detach())


def combined_map(teacher: Tensor, student: Tensor, autoencoder: Tensor, quantiles: Tensor, singles: bool = False) -> Tensor:
    """Teacher N×C×h×w, student N×2C×h×w, autoencoder N×C×h×w (float32, float16 or bfloat16, any strides) and quantiles
    [[q_a, q_b] of the local, of the global map] -> combined map N×1×h×w float32; with `singles` N×3×h×w, the normalized local
    and global map being channels 1 and 2. No gradient. Raises TypeError or ValueError for other input."""
    check_features(teacher=teacher, student=student, autoencoder=autoencoder)
    n, c, *size = teacher.shape
    if tuple(student.shape) != (n, 2 * c, *size) or autoencoder.shape != teacher.shape:
        raise ValueError(f"teacher {tuple(teacher.shape)} needs a student with twice the channels and an autoencoder of its"
                         f" shape, got {tuple(student.shape)} and {tuple(autoencoder.shape)}")  # fmt: skip
    if tuple(quantiles.shape) != (2, 2) or quantiles.device != teacher.device:
        raise ValueError(f"quantiles must be 2×2 on {teacher.device}, got {tuple(quantiles.shape)} on {quantiles.device}")
    return combined_map_op(teacher.detach(), student.detach(), autoencoder.detach(), quantiles.detach(), singles)
