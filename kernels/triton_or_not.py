"""Triton, if it is installed, and where its kernels run. Without it `jit` leaves functions as they are and `runs_on` is False, so
that every operator of this package computes its plain-torch reference."""

import os

from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows

    class tl:
        constexpr = None  # all that the kernels' signatures name; their bodies never run

    triton = None

    def jit(function):
        return function


INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter: kernels run on the CPU


def runs_on(*tensors: Tensor) -> bool:
    """Whether Triton kernels can read these tensors."""
    return triton is not None and all(t.is_cuda or INTERPRETED for t in tensors)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
