"""Unpadded convolution of channels-last images for Hopper, whose Tensor Memory Accelerator (TMA)
copies rows of pixels.

Seen as a matrix of N·H·W rows (pixels) and C columns, an image needs no gathering: for the output
at pixel m, window offset (ky, kx) reads row m + ky·W + kx, whatever m is. So a tile's left operand
is a plain box of neighbouring rows, which the TMA copies into shared memory while tensor cores
compute, and from where they read it. Outputs whose window would wrap around the image's edge are
computed too (3 to 11 % more at 256²) and not stored.

Teacher and student run in one launch: with `split`, the first `split` output channels read the
first C channels of x, the others the C behind them. `conv_rows` adds bias and, if wanted, ReLU;
`conv_rows_pool` bias, ReLU and the 2×2 average pool. Its four sums are those of the four positions
of a pooling window, so that pooling adds registers of one thread: columns are read in pairs, as a
matrix of N·H·W/2 rows and 2·C columns, which takes an even W.

Cost of teacher and student of S for a 256² image in fp16, without padding, on an H200 at 790
TFLOP/s:

    layer                 K       channels       operations    bytes     time floor
    stage 2 with pool     2048    2·256          31 GFLOP      14 MB     40 µs
    convolution 3×3       2304    2·256          8.2 GFLOP     9.7 MB    10 µs
    last 4×4              4096    384 + 768      30 GFLOP      20 MB     38 µs
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import TensorDescriptor, check_tensors, jit, operator, split_convolution, tl, triton

# A program's tile is 256×128 (128×128 where that gives too few programs): 85 operations a byte from
# the L2 cache. Eight warps are two warp groups. Three steps of 64 channels fill shared memory.
CONFIG = {"BLOCK_O": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
BIG_TILES_FROM = 100  # programs; with fewer too many of an H200's 132 multiprocessors are idle
LAST = torch.channels_last


def reference(x, weight, bias, split, relu):
    """The same in plain torch."""
    y = split_convolution(x, weight, bias, 0, split)
    return (y.relu() if relu else y).contiguous(memory_format=LAST)


def pool_reference(x, weight, bias, split):
    """The same in plain torch."""
    y = split_convolution(x, weight, bias, 0, split).relu()
    return F.avg_pool2d(y, 2).contiguous(memory_format=LAST)


@jit
def activate(total, bias):
    return tl.maximum(total + bias, 0, propagate_nan=tl.PropagateNan.ALL)  # as torch's ReLU


@jit
def conv_rows_kernel(
    x,
    weight,
    bias_ptr,
    out_ptr,
    images,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    OUT: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x: boxes BLOCK_M×BLOCK_K of pixels × channels; weight: BLOCK_O×BLOCK_K of OUT × SIZE²·C."""
    OUT_H: tl.constexpr = H - SIZE + 1
    OUT_W: tl.constexpr = W - SIZE + 1
    BLOCKS: tl.constexpr = OUT // BLOCK_O
    o_first, first = tl.program_id(0) % BLOCKS * BLOCK_O, tl.program_id(0) // BLOCKS * BLOCK_M
    channel = tl.where(o_first >= SPLIT, C, 0) if SPLIT > 0 else 0
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for step in range(SIZE * SIZE * C // BLOCK_K):
        k = step * BLOCK_K
        tap = k // C
        a = x.load([first + tap // SIZE * W + tap % SIZE, channel + k % C])
        b = weight.load([o_first, k])
        total = tl.dot(a, b.T, total)

    o = o_first + tl.arange(0, BLOCK_O)
    bias = tl.load(bias_ptr + o).to(tl.float32)
    total = activate(total, bias) if RELU else total + bias
    pixel = first + tl.arange(0, BLOCK_M)
    n, y, column = pixel // (H * W), pixel // W % H, pixel % W
    position = ((n * OUT_H + y) * OUT_W + column).to(tl.int64)
    inside = (n < images) & (y < OUT_H) & (column < OUT_W)
    out = out_ptr + position[:, None] * OUT + o
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@jit
def conv_rows_pool_kernel(
    x,
    weight,
    bias_ptr,
    out_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    PITCH: tl.constexpr,
    OUT: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_P pooled positions of a row. x: boxes BLOCK_P×BLOCK_K of pairs of pixels × the channels
    of both, PITCH each; weight as above."""
    POOLED_H: tl.constexpr = (H - SIZE + 1) // 2
    POOLED_W: tl.constexpr = (W - SIZE + 1) // 2
    BLOCKS: tl.constexpr = OUT // BLOCK_O
    TILES: tl.constexpr = (POOLED_W + BLOCK_P - 1) // BLOCK_P
    o_first, tile = tl.program_id(0) % BLOCKS * BLOCK_O, tl.program_id(0) // BLOCKS
    row, first = tile // TILES, tile % TILES * BLOCK_P  # the pooled row, of all images'
    corner = (row // POOLED_H * H + 2 * (row % POOLED_H)) * (W // 2) + first
    channel = tl.where(o_first >= SPLIT, C, 0) if SPLIT > 0 else 0
    total00 = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)  # of the window's upper left position, …
    total01 = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    total10 = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    total11 = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for step in range(SIZE * SIZE * C // BLOCK_K):
        k = step * BLOCK_K
        ky, kx, c = k // C // SIZE, k // C % SIZE, channel + k % C
        upper = corner + ky * (W // 2)
        left, right = upper + kx // 2, upper + (kx + 1) // 2
        c_left, c_right = kx % 2 * PITCH + c, (kx + 1) % 2 * PITCH + c
        b = weight.load([o_first, k]).T
        total00 = tl.dot(x.load([left, c_left]), b, total00)
        total01 = tl.dot(x.load([right, c_right]), b, total01)
        total10 = tl.dot(x.load([left + W // 2, c_left]), b, total10)
        total11 = tl.dot(x.load([right + W // 2, c_right]), b, total11)

    o = o_first + tl.arange(0, BLOCK_O)
    bias = tl.load(bias_ptr + o).to(tl.float32)
    upper = activate(total00, bias) + activate(total01, bias)
    pooled = 0.25 * (upper + activate(total10, bias) + activate(total11, bias))
    column = first + tl.arange(0, BLOCK_P)
    out = out_ptr + (row * POOLED_W + column)[:, None].to(tl.int64) * OUT + o
    tl.store(out, pooled.to(out_ptr.dtype.element_ty), mask=(column < POOLED_W)[:, None])


def matrices(x: Tensor, weight: Tensor, pixels: int, rows: int) -> tuple:
    """Descriptors of x, `pixels` neighbours in a matrix row and `rows` rows in a box, and of the
    weight."""
    (n, channels, h, w), pitch, o = x.shape, x.stride(3), len(weight)
    shape = [n * h * w // pixels, pitch * (pixels - 1) + channels]
    weight = weight if weight.data_ptr() % 16 == 0 else weight.clone()  # for the TMA
    x = TensorDescriptor(x, shape, [pixels * pitch, 1], [rows, CONFIG["BLOCK_K"]])
    k = weight[0].numel()
    box = [CONFIG["BLOCK_O"], CONFIG["BLOCK_K"]]
    return x, TensorDescriptor(weight, [o, k], [k, 1], box)


def rows_in_order(x: Tensor) -> Tensor:
    """x if its pixels lie behind each other in memory, channels together and each pixel at 16
    bytes, as the TMA wants it; else a copy. A slice of channels is not copied."""
    (_, _, h, w), (sn, sc, sh, sw) = x.shape, x.stride()
    in_order = sc == 1 and sh == w * sw and sn == h * sh and sw * x.element_size() % 16 == 0
    return x if in_order and x.data_ptr() % 16 == 0 else x.clone(memory_format=LAST)


@operator("efficientad::conv_rows", reference, tma=True)
def op(x: Tensor, weight: Tensor, bias: Tensor, split: int, relu: bool) -> Tensor:
    x, weight = rows_in_order(x), weight.contiguous(memory_format=LAST)
    (n, _, h, w), (o, c, size, _) = x.shape, weight.shape
    blocks, out_h, out_w = o // CONFIG["BLOCK_O"], h - size + 1, w - size + 1
    pixels = n * h * w - (size - 1) * (w + 1)  # up to the last output
    block_m = 256 if triton.cdiv(pixels, 256) * blocks >= BIG_TILES_FROM else 128
    out = x.new_empty(n, out_h, out_w, o).permute(0, 3, 1, 2)
    boxes = matrices(x, weight, 1, block_m)
    constants = (n, h, w, c, o, size, split, relu, block_m)
    grid = (triton.cdiv(pixels, block_m) * blocks,)
    conv_rows_kernel[grid](*boxes, bias, out, *constants, **CONFIG)
    return out


@operator("efficientad::conv_rows_pool", pool_reference, tma=True)
def pool_op(x: Tensor, weight: Tensor, bias: Tensor, split: int) -> Tensor:
    x, weight = rows_in_order(x), weight.contiguous(memory_format=LAST)
    (n, _, h, w), (o, c, size, _) = x.shape, weight.shape
    pooled_h, pooled_w, block_p = (h - size + 1) // 2, (w - size + 1) // 2, 64
    out = x.new_empty(n, pooled_h, pooled_w, o).permute(0, 3, 1, 2)
    boxes, pitch = matrices(x, weight, 2, block_p), x.stride(3)
    grid = (n * pooled_h * triton.cdiv(pooled_w, block_p) * (o // CONFIG["BLOCK_O"]),)
    constants = (h, w, c, pitch, o, size, split, block_p)
    conv_rows_pool_kernel[grid](*boxes, bias, out, *constants, **CONFIG)
    return out


def check(x: Tensor, weight: Tensor, bias: Tensor, split: int) -> tuple[Tensor, ...]:
    """The arguments without gradient. Raises TypeError or ValueError as `conv_rows`."""
    dtypes = {x.dtype, weight.dtype, bias.dtype}
    if dtypes not in ({torch.float16}, {torch.bfloat16}):
        found = f"{x.dtype}, {weight.dtype} and {bias.dtype}"
        raise TypeError(f"x, weight and bias must all be float16 or all bfloat16, got {found}")
    (o, c), groups = weight.shape[:2], 2 if split else 1
    fit = x.ndim == weight.ndim == 4 and x.shape[1] == groups * c and bias.shape == (o,)
    fit = fit and weight.shape[2] == weight.shape[3] <= min(x.shape[2:])
    fit = fit and c % CONFIG["BLOCK_K"] == o % CONFIG["BLOCK_O"] == split % CONFIG["BLOCK_O"] == 0
    expected = "x N×C×H×W (2·C if split), weight O×C×k×k, bias O, C a multiple of 64, O and split"
    tensors = {"x": x, "weight": weight, "bias": bias}
    check_tensors(f"{expected} of 128", fit and 0 <= split < o, **tensors)
    return x.detach(), weight.detach(), bias.detach().contiguous()


def conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor, split: int = 0, relu: bool = False
) -> Tensor:
    """x N×C×H×W, weight O×C×k×k, bias O, all float16 or all bfloat16 -> N×O×h×w, channels last,
    without padding. C is a multiple of 64, O of 128. With `split`, a multiple of 128 below O, x has
    2·C channels; see above. x may be a slice of channels. No gradient. Raises TypeError or
    ValueError for other input."""
    return op(*check(x, weight, bias, split), split, relu)


def conv_rows_pool(x: Tensor, weight: Tensor, bias: Tensor, split: int = 0) -> Tensor:
    """`conv_rows` with ReLU, then a 2×2 average pool with stride 2; W must be even."""
    arguments = check(x, weight, bias, split)
    if x.shape[3] % 2 or min(x.shape[2:]) <= weight.shape[2]:
        raise ValueError(f"need an even width and at least 2×2 outputs, got {tuple(x.shape)}")
    return pool_op(*arguments, split)
