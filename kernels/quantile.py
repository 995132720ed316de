"""Exact quantiles of any number of fp32 elements, without sorting.

q is the element at position q·(n − 1) of the sorted elements, between two neighbours interpolated linearly: `torch.quantile`
without its limit of 2²⁴ elements. If any element is NaN, so is the result. The position is computed in float64.

Radix selection: the 32 bits of a float, mapped to an unsigned integer of the same order, are read as six digits. A pass counts
the values of one digit among the elements whose higher digits are those of the wanted element, which gives its next digit. The
two neighbours of each q are selected side by side ("targets"). All decisions are taken on the device: nothing waits for the
host, and a CUDA graph can hold the call.

Cost: n elements are read six times, 24·n bytes. Hard feature loss at 256², one image: n = 384·56² = 1.2 M for S and M alike, 29 MB,
7 µs at 4.3 TB/s (from the L2 cache faster), so that the eight launches are the larger part; batch 16, n = 19.3 M: 462 MB, 108 µs.
Counting is meant to stay below that: `tl.histogram` spends one population count per 32 bins, element and target.
Not measured on a GPU yet.
"""

import math

import torch
from torch import Tensor

from .triton_or_not import cdiv, jit, runs_on, tl

SHIFTS, WIDTHS = (26, 20, 15, 10, 5, 0), (6, 6, 5, 5, 5, 5)  # digits, most significant first
# 64 bins and not the usual 256: the cost of tl.histogram grows with the bins, and six passes over memory cost less than four
# with four times the population counts. Eight elements a thread: with more, the counts' registers leave a multiprocessor room
# for one program only. 396 programs are three, as many as fit, on each of an H200's 132; each strides through its share.
CONFIG, PROGRAMS = {"BINS": 64, "BLOCK": 2048, "num_warps": 8}, 396


def quantile_reference(x: Tensor, q: list[float]) -> Tensor:
    """The same in plain torch, by sorting. float32 tensor of q's length."""
    x, n, values = x.flatten().sort().values, x.numel(), []  # NaN last
    for position in (p * (n - 1) for p in q):
        low = math.floor(position)
        value = torch.lerp(x[low], x[low + 1], position - low) if position > low else x[low]
        values.append(torch.where(x[-1].isnan(), math.nan, value))
    return torch.stack(values)


# A row of `state` belongs to a pass and a target: counts of BINS digits, then the target's higher digits and its rank among the
# elements that share them. One more row counts NaN.


@jit
def ordered(x):
    """fp32 -> uint32 in the same order: −0 just below +0, every NaN above +inf."""
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, 0xFFFFFFFF, key)


@jit
def narrow(row, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """A finished row -> the target's digits with that pass's digit, and its rank among the elements that share these."""
    counts = tl.load(row + tl.arange(0, BINS))
    digits, rank = tl.load(row + BINS), tl.load(row + BINS + 1)
    below = tl.cumsum(counts) <= rank
    digit = tl.sum(below.to(tl.int64))
    return digits | (digit << SHIFT), rank - tl.sum(tl.where(below, counts, 0))


@jit
def count_kernel(
    x_ptr, n, position_ptr, row, nan_row,
    TARGETS: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, PREVIOUS_SHIFT: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass; `row` is the pass's first. Each program finishes the previous pass by itself, so that no launch lies between."""
    FIRST: tl.constexpr = PREVIOUS_SHIFT is None
    wanted = ()  # the digits of each target so far
    for target in tl.static_range(TARGETS):
        own = row + target * (BINS + 2)
        if FIRST:
            position = tl.load(position_ptr + target // 2)
            digits, rank = tl.zeros((), tl.int64), position.to(tl.int64)
            rank += (position > rank).to(tl.int64) * (target % 2)
        else:
            digits, rank = narrow(own - TARGETS * (BINS + 2), PREVIOUS_SHIFT, BINS)
        if tl.program_id(0) == 0:
            tl.store(own + BINS, digits)
            tl.store(own + BINS + 1, rank)
        wanted = wanted + (digits.to(tl.uint32),)

    bins = tl.arange(0, BINS)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        inside = tl.arange(0, BLOCK) < n - start
        x = tl.load(x_ptr + start + tl.arange(0, BLOCK), mask=inside, other=0)
        key = ordered(x)
        digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        if FIRST:
            tl.atomic_add(nan_row, tl.sum((x != x).to(tl.int64)))
            counts = tl.histogram(digit, BINS, mask=inside)  # the same for every target
        for target in tl.static_range(TARGETS):
            if not FIRST:
                match = ((key ^ wanted[target]) >> (SHIFT + WIDTH)) == 0
                counts = tl.histogram(digit, BINS, mask=match & inside)
            tl.atomic_add(row + target * (BINS + 2) + bins, counts.to(tl.int64), mask=counts > 0)


@jit
def interpolate_kernel(position_ptr, row, nan_row, out_ptr, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """One program a q: its two neighbours from the last pass, and the value between them, as torch.lerp computes it."""
    q = tl.program_id(0)
    low = value_of(narrow(row + (2 * q) * (BINS + 2), SHIFT, BINS)[0])
    high = value_of(narrow(row + (2 * q + 1) * (BINS + 2), SHIFT, BINS)[0])
    position = tl.load(position_ptr + q)
    weight = (position - position.to(tl.int64)).to(tl.float32)
    value = tl.where(weight < 0.5, low + weight * (high - low), high - (high - low) * (1 - weight))
    value = tl.where(weight == 0, low, value)  # inf − inf is NaN
    tl.store(out_ptr + q, tl.where(tl.load(nan_row) > 0, float("nan"), value))


@jit
def value_of(key):
    """The inverse of `ordered`."""
    key = key.to(tl.uint32)
    return tl.where(key >> 31 == 1, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


def storage_order(x: Tensor) -> Tensor:
    """x if its elements fill its storage without gaps, in whatever order; else a contiguous copy."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


@torch.library.custom_op("efficientad::quantile", mutates_args=())
def quantile_op(x: Tensor, q: list[float]) -> Tensor:
    if not runs_on(x):
        return quantile_reference(x, q)
    x, n, targets, bins = storage_order(x), x.numel(), 2 * len(q), CONFIG["BINS"]
    positions = x.new_empty(len(q), dtype=torch.float64)
    for i, p in enumerate(q):
        positions[i].fill_(p * (n - 1))  # the number travels inside the launch: no copy from the host to wait for
    state = x.new_zeros(len(SHIFTS) * targets + 1, bins + 2, dtype=torch.int64)
    out = x.new_empty(len(q))
    with torch.cuda.device_of(x):
        for i, (shift, width) in enumerate(zip(SHIFTS, WIDTHS)):
            count_kernel[(min(cdiv(n, CONFIG["BLOCK"]), PROGRAMS),)](
                x, n, positions, state[i * targets], state[-1],
                TARGETS=targets, SHIFT=shift, WIDTH=width, PREVIOUS_SHIFT=SHIFTS[i - 1] if i else None, **CONFIG,
            )  # fmt: skip
        interpolate_kernel[(len(q),)](positions, state[-1 - targets], state[-1], out, SHIFT=SHIFTS[-1], BINS=bins, num_warps=1)
    return out


@quantile_op.register_fake
def _(x: Tensor, q: list[float]) -> Tensor:
    return x.new_empty(len(q))


def quantile(x: Tensor, q: float | list[float]) -> Tensor:
    """The q-quantile of all elements of x (float32, any shape, on any device) as a scalar, or for a list of q a tensor of its
    length. No gradient. Raises TypeError for another dtype, ValueError for q outside [0, 1], no q and an empty x."""
    qs = [float(q)] if isinstance(q, (int, float)) else [float(p) for p in q]
    if x.dtype != torch.float32:
        raise TypeError(f"quantile needs float32, got {x.dtype}")
    if not qs or not all(0 <= p <= 1 for p in qs) or x.numel() == 0:
        raise ValueError(f"quantile needs 0 <= q <= 1 and at least one element, got q = {q} of {x.numel()} elements")
    values = quantile_op(x.detach(), qs)
    return values[0] if isinstance(q, (int, float)) else values
