"""4×4 convolution + bias + ReLU + 2×2 average pooling with stride 2: the first two stages of the PDN, each in one kernel.

PDN's pooling windows do not overlap, so a program that computes the four convolution outputs of each of its windows needs no
other's, and the map before pooling, four times the size of the result, is never written. Implicit GEMM: a row of the left matrix is
the 4×4×C window under one convolution output, gathered from the channels-last image when needed; the right matrix is the
weights; products accumulate in fp32. The three colour channels are not padded: K = 4·4·3 = 48 for the first stage.

For one 256² image without padding, fp16 or bf16 (126² and 61² positions after pooling), on an H200 at 4.3 TB/s and 790 TFLOP/s:

    stage    K     output channels   operations     bytes     time floor
    S 1      48    128               0.78 GFLOP     4.5 MB    1.0 µs (bytes)
    S 2      2048  256               15.6 GFLOP     7.0 MB    20 µs (operations)
    M 1      48    256               1.56 GFLOP     8.5 MB    2.0 µs
    M 2      4096  512               62.4 GFLOP     16.1 MB   79 µs

Not measured on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_or_not import cdiv, jit, runs_on, tl

# A program computes BLOCK_P pooled positions (four times as many matrix rows) of BLOCK_O channels. Four warps throughout: a
# flattened loop over KH·KW·C has been miscompiled with eight (pytorch #173068).
CONFIGS = {
    # K = 48 is three steps of 16, exactly. Small tile: it is bound by memory, and more programs hide its latency.
    "first": {"BLOCK_P": 16, "BLOCK_O": 128, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    # 128×128 sums a program, the most that four warps' registers hold. Steps of 32 in four stages, 64 KB of shared memory: with
    # steps of 64, sm_80 and sm_89, whose tensor cores read registers, spill.
    "second": {"BLOCK_P": 32, "BLOCK_O": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    # fp32 is for checking: exact products on CUDA cores. The next larger tile spills on sm_89.
    "fp32": {"BLOCK_P": 4, "BLOCK_O": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
}


def conv_relu_pool_reference(x: Tensor, weight: Tensor, bias: Tensor, padding: int, pool_padding: int) -> Tensor:
    """The same in plain torch."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=padding).relu(), 2, 2, pool_padding)


@jit
def conv_relu_pool_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, positions, H, W, POOLED_H, POOLED_W,
    C: tl.constexpr, OUT: tl.constexpr, PADDING: tl.constexpr, POOL_PADDING: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share the image and differ in the output channels, so the image comes from the cache.
    o_blocks = tl.cdiv(OUT, BLOCK_O)
    o = tl.program_id(0) % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tl.program_id(0) // o_blocks * BLOCK_P

    # Matrix rows: the four convolution outputs of the first pooling window, then those of the second, …
    row = tl.arange(0, 4 * BLOCK_P)
    position = first + row // 4
    n, y, x = position // (POOLED_H * POOLED_W), position // POOLED_W % POOLED_H, position % POOLED_W
    y = 2 * y - POOL_PADDING + row % 4 // 2  # in the map before pooling
    x = 2 * x - POOL_PADDING + row % 2
    inside = (position < positions) & (y >= 0) & (y < H + 2 * PADDING - 3) & (x >= 0) & (x < W + 2 * PADDING - 3)
    y -= PADDING  # the window's corner in the image
    x -= PADDING
    corner = ((n.to(tl.int64) * H + y) * W + x) * C

    total = tl.zeros((4 * BLOCK_P, BLOCK_O), tl.float32)
    for step in range(16 * C // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)  # (window row, window column, channel), as image and weights lie in memory
        mask = inside[:, None]
        if PADDING > 0:
            ky, kx = k // (4 * C), k // C % 4
            mask &= (y[:, None] + ky >= 0) & (y[:, None] + ky < H) & (x[:, None] + kx >= 0) & (x[:, None] + kx < W)
        a = tl.load(x_ptr + corner[:, None] + (k // (4 * C) * (W * C) + k % (4 * C)), mask=mask, other=0)
        b = tl.load(weight_ptr + k[:, None] + o[None, :] * (16 * C), mask=o[None, :] < OUT, other=0)
        total = tl.dot(a, b, total, input_precision="ieee")

    total += tl.load(bias_ptr + o, mask=o < OUT, other=0).to(tl.float32)
    total = tl.maximum(total, 0, propagate_nan=tl.PropagateNan.ALL)  # as torch's ReLU: NaN must not pass for 0
    if POOL_PADDING > 0:
        total = tl.where(inside[:, None], total, 0)  # the pool's padding counts in the mean
    pooled = tl.sum(tl.reshape(total, (BLOCK_P, 4, BLOCK_O)), 1) * 0.25
    position = first + tl.arange(0, BLOCK_P)
    out = out_ptr + position[:, None].to(tl.int64) * OUT + o
    tl.store(out, pooled.to(out_ptr.dtype.element_ty), mask=(position[:, None] < positions) & (o < OUT))


def pooled_size(x: Tensor, padding: int, pool_padding: int) -> tuple[int, int]:
    return tuple((s + 2 * padding - 3 + 2 * pool_padding) // 2 for s in x.shape[2:])


def empty_output(x: Tensor, weight: Tensor, padding: int, pool_padding: int) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *pooled_size(x, padding, pool_padding))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("efficientad::conv_relu_pool", mutates_args=())
def conv_relu_pool_op(x: Tensor, weight: Tensor, bias: Tensor, padding: int, pool_padding: int) -> Tensor:
    if not runs_on(x, weight, bias):
        return conv_relu_pool_reference(x, weight, bias, padding, pool_padding).contiguous(memory_format=torch.channels_last)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))  # no copy if they are
    out = empty_output(x, weight, padding, pool_padding)
    (_, c, h, w), (n, channels, pooled_h, pooled_w) = x.shape, out.shape
    config = CONFIGS["fp32" if x.dtype == torch.float32 else "first" if c % 32 else "second"]
    positions = n * pooled_h * pooled_w
    with torch.cuda.device_of(x):
        conv_relu_pool_kernel[(cdiv(positions, config["BLOCK_P"]) * cdiv(channels, config["BLOCK_O"]),)](
            x, weight, bias, out, positions, h, w, pooled_h, pooled_w,
            C=c, OUT=channels, PADDING=padding, POOL_PADDING=pool_padding, **config,
        )  # fmt: skip
    return out


@conv_relu_pool_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, padding: int, pool_padding: int) -> Tensor:
    return empty_output(x, weight, padding, pool_padding)


def conv_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0, pool_padding: int = 0) -> Tensor:
    """x N×C×H×W, weight O×C×4×4, bias O -> N×O×h×w, channels last; x and weight of one dtype, float16 or bfloat16 (float32 is
    for checking, and slow). Channels-last x and weight are read without a copy. `padding`: zeros around the image, 0 to 3;
    `pool_padding`: zeros around the map before pooling, 0 or 1, which count in the mean. No gradient. Raises TypeError or
    ValueError for other input."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        raise TypeError(f"x and weight must both be float16, bfloat16 or float32, got {x.dtype} and {weight.dtype}")
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    if x.ndim != 4 or weight.ndim != 4 or tuple(weight.shape[1:]) != (x.shape[1], 4, 4) or tuple(bias.shape) != (len(weight),):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(f"need x N×C×H×W, weight O×C×4×4 and bias O, got {shapes}")
    if not x.device == weight.device == bias.device:
        raise ValueError(f"x, weight and bias must be on one device, got {x.device}, {weight.device} and {bias.device}")
    if not 0 <= padding <= 3 or pool_padding not in (0, 1):
        raise ValueError(f"padding must be 0 to 3 and pool_padding 0 or 1, got {padding} and {pool_padding}")
    if x.numel() == 0 or min(pooled_size(x, padding, pool_padding)) < 1:
        raise ValueError(f"x {tuple(x.shape)} is too small for a 4×4 window and a 2×2 pool")
    return conv_relu_pool_op(x.detach(), weight.detach(), bias.detach().to(x.dtype), padding, pool_padding)
