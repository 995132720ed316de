"""4×4 convolution + bias + ReLU + 2×2 average pooling with stride 2: a stage of the PDN, fused.

The pooling windows do not overlap, so a program that computes the four convolution outputs of its
windows needs no other program's. The map before pooling, four times the result, is never written.
The kernel is an implicit GEMM. A row of the left matrix is the 4×4×C window under one output,
gathered from the channels-last image. The right matrix is the weights. Products accumulate in fp32.
Three colour channels become four, the last one 0: a pixel is one load of 8 bytes, and K = 4·4·4 =
64 in the first stage. `split`: see conv_rows.py, which on Hopper computes the
second stage of the fast form without padding.

Cost of a 256² image without padding in fp16 or bf16 (126² and 61² positions after pooling), on an
H200 at 4.3 TB/s and 790 TFLOP/s:

    stage    K     output channels   operations     bytes     time floor
    S 1      64    128               1.04 GFLOP     4.6 MB    1.3 µs (operations)
    S 2      2048  256               15.6 GFLOP     7.0 MB    20 µs (operations)
    M 1      64    256               2.08 GFLOP     8.6 MB    2.6 µs (operations)
    M 2      4096  512               62.4 GFLOP     16.1 MB   79 µs (operations)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import check_tensors, jit, operator, split_convolution, tl, triton

# A program computes BLOCK_P pooled positions (four times as many matrix rows) of BLOCK_O channels.
# All have four warps: with eight, a flattened loop over KH·KW·C was miscompiled (pytorch #173068).
CONFIGS = {
    # K = 64 in one step: nothing to pipeline. Other programs of the multiprocessor hide latency.
    "first": {"BLOCK_P": 32, "BLOCK_O": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1},
    # 128×128 sums are the most that the registers of four warps hold. Four stages of 32 take 64 KB
    # of shared memory; steps of 64 spill on sm_80 and sm_89, whose tensor cores read registers.
    "second": {"BLOCK_P": 32, "BLOCK_O": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    # fp32 is for checking: exact products on CUDA cores. The next larger tile spills on sm_89.
    "fp32": {"BLOCK_P": 8, "BLOCK_O": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
}
LAST = torch.channels_last


def reference(x, weight, bias, padding, pool_padding, split):
    """The same in plain torch."""
    y = split_convolution(x, weight, bias, padding, split).relu()
    return F.avg_pool2d(y, 2, 2, pool_padding).contiguous(memory_format=LAST)


@jit
def conv_relu_pool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sizes,
    C: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PADDING: tl.constexpr,
    POOL_PADDING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    positions, H, W, POOLED_H, POOLED_W = sizes
    # Neighbouring programs differ in the output channels: the image comes from the cache.
    o_first = tl.program_id(0) % tl.cdiv(OUT, BLOCK_O) * BLOCK_O
    o = o_first + tl.arange(0, BLOCK_O)
    first = tl.program_id(0) // tl.cdiv(OUT, BLOCK_O) * BLOCK_P

    # Matrix rows are the four convolution outputs of each pooling window, in such an order that one
    # thread holds all four of a window's sums: in a tensor core's result of 16 rows a thread has
    # rows r and r + 8, and a warp has such results 2·BLOCK_P rows apart. Pooling moves no data.
    row = tl.arange(0, 4 * BLOCK_P)
    position = first + row // 16 % (BLOCK_P // 8) * 8 + row % 8
    n = position // (POOLED_H * POOLED_W)
    y = 2 * (position // POOLED_W % POOLED_H) - POOL_PADDING + row // (2 * BLOCK_P)
    x = 2 * (position % POOLED_W) - POOL_PADDING + row // 8 % 2  # before pooling
    inside = (position < positions) & (y >= 0) & (y < H + 2 * PADDING - 3)
    inside = inside & (x >= 0) & (x < W + 2 * PADDING - 3)
    y -= PADDING  # the window's corner in the image
    x -= PADDING
    PITCH: tl.constexpr = 2 * C if SPLIT > 0 else C  # from pixel to pixel
    corner = ((n.to(tl.int64) * H + y) * W + x) * PITCH
    if SPLIT > 0:
        corner += tl.where(o_first >= SPLIT, C, 0)

    total = tl.zeros((4 * BLOCK_P, BLOCK_O), tl.float32)
    for step in range(16 * C // BLOCK_K):
        # (window row, window column, channel), the order of image and weights in memory
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = inside[:, None]
        if PADDING > 0:
            ky, kx = y[:, None] + k // (4 * C), x[:, None] + k // C % 4
            mask &= (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
        offset = (k // (4 * C) * W + k // C % 4) * PITCH + k % C
        a = tl.load(x_ptr + corner[:, None] + offset, mask=mask, other=0)
        b = tl.load(weight_ptr + k[:, None] + o[None, :] * (16 * C), mask=o[None, :] < OUT, other=0)
        total = tl.dot(a, b, total, input_precision="ieee")

    total += tl.load(bias_ptr + o, mask=o < OUT, other=0).to(tl.float32)
    total = tl.maximum(total, 0, propagate_nan=tl.PropagateNan.ALL)  # NaN stays, as in torch's ReLU
    if POOL_PADDING > 0:
        total = tl.where(inside[:, None], total, 0)  # the pool's padding counts in the mean
    windows = tl.reshape(total, (2, BLOCK_P // 8, 2, 8, BLOCK_O))
    pooled = tl.reshape(tl.sum(tl.sum(windows, 2), 0), (BLOCK_P, BLOCK_O)) * 0.25
    position = first + tl.arange(0, BLOCK_P)[:, None]
    out = out_ptr + position.to(tl.int64) * OUT + o
    tl.store(out, pooled.to(out_ptr.dtype.element_ty), mask=(position < positions) & (o < OUT))


@operator("efficientad::conv_relu_pool", reference)
def op(
    x: Tensor, weight: Tensor, bias: Tensor, padding: int, pool_padding: int, split: int
) -> Tensor:
    if x.shape[1] % 4:
        x, weight = (F.pad(t, (0, 0, 0, 0, 0, -t.shape[1] % 4)) for t in (x, weight))
    x, weight = (t.contiguous(memory_format=LAST) for t in (x, weight))  # no copy if they are
    (n, _, h, w), (channels, c, *_) = x.shape, weight.shape
    pooled_h, pooled_w = ((side + 2 * (padding + pool_padding) - 3) // 2 for side in (h, w))
    positions = n * pooled_h * pooled_w
    out = x.new_empty(n, pooled_h, pooled_w, channels).permute(0, 3, 1, 2)
    config = CONFIGS["fp32" if x.dtype == torch.float32 else "first" if c % 32 else "second"]
    programs = triton.cdiv(positions, config["BLOCK_P"]) * triton.cdiv(channels, config["BLOCK_O"])
    sizes = (positions, h, w, pooled_h, pooled_w)
    constants = (c, channels, split, padding, pool_padding)
    conv_relu_pool_kernel[(programs,)](x, weight, bias, out, sizes, *constants, **config)
    return out


def conv_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0, pool_padding: int = 0, split: int = 0
) -> Tensor:
    """x N×C×H×W, weight O×C×4×4, bias O -> N×O×h×w, channels last. With `split`, a multiple of 128
    below O, x has 2·C channels, see conv_rows.py, and C is a multiple of 32.

    x and weight are both float16 or bfloat16, or float32, for checking (slow); they are not copied
    if they are channels last. `padding`: zeros around the image, 0 to 3. `pool_padding`: zeros
    around the map before pooling, 0 or 1; they count in the mean. No gradient. Raises TypeError or
    ValueError for other input."""
    if x.dtype != weight.dtype or not bias.is_floating_point():
        dtypes = f"{x.dtype}, {weight.dtype} and {bias.dtype}"
        raise TypeError(f"x and weight must have one dtype, bias be floating point, got {dtypes}")
    x, weight, bias = x.detach(), weight.detach(), bias.detach().to(x.dtype).contiguous()
    (o, c), groups = weight.shape[:2], 2 if split else 1
    fit = x.ndim == 4 and x.shape[1] == groups * c and weight.shape[2:] == (4, 4)
    fit = fit and bias.shape == (o,) and 0 <= split < o and split % 128 == 0
    fit = fit and not (split and c % 32)
    expected = "x N×C×H×W, weight O×C×4×4, bias O; with split x N×2·C×H×W, C % 32 = split % 128 = 0"
    check_tensors(expected, fit, x=x, weight=weight, bias=bias)
    if not 0 <= padding <= 3 or pool_padding not in (0, 1):
        raise ValueError(f"need padding 0 to 3, pool_padding 0 or 1, got {padding}, {pool_padding}")
    outputs = min(x.shape[2:]) + 2 * padding - 3
    if outputs < 1 or outputs + 2 * pool_padding < 2:
        raise ValueError(f"x {tuple(x.shape)} is too small for a 4×4 window and a 2×2 pool")
    return op(x, weight, bias, padding, pool_padding, split)
