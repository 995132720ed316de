"""What the kernels share: Triton if it is installed, their dispatch, and the check of arguments."""

import os
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # macOS, Windows
    triton = None

    class tl:
        constexpr = None  # named in the kernels' signatures; their bodies never run

    def jit(function):
        return function


try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # nor do early versions of Triton have it
    TensorDescriptor = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU


@lru_cache(maxsize=8)
def launches(device: torch.device) -> bool:
    """Whether Triton can launch kernels on this GPU. Warns if not: it supports none before sm_80,
    and compiles its launcher with the machine's C compiler and Python's headers."""
    if INTERPRETED:
        return True
    problem = "Triton needs a GPU from sm_80 on"
    if torch.cuda.get_device_capability(device)[0] >= 8:
        try:
            return triton.runtime.driver.active is not None
        except Exception as error:  # the compiler is missing or fails
            problem = " ".join(str(error).split()) or type(error).__name__
    warnings.warn(f"plain torch instead of Triton kernels: {problem}")
    return False


def runs_on(*tensors: Tensor) -> bool:
    """Whether Triton kernels can read these tensors: on a GPU, not in float64."""
    there = triton is not None and all(t.is_cuda or INTERPRETED for t in tensors)
    return there and all(t.dtype != torch.float64 for t in tensors)


@lru_cache(maxsize=8)
def has_tma(device: torch.device) -> bool:
    """Whether the GPU has a Tensor Memory Accelerator (TMA), which copies boxes of a matrix by
    itself (since Hopper, sm_90), and the 144 KiB of shared memory that conv_rows.py takes."""
    if TensorDescriptor is None or device.type != "cuda":
        return INTERPRETED and TensorDescriptor is not None
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)  # ROCm says none
    return properties.major >= 9 and shared >= 144 * 1024 + 256


def operator(name: str, reference, tma: bool = False):
    """Register a function that launches kernels as a torch operator. Where they cannot run, or the
    TMA that they need is missing, the operator calls `reference`. torch.compile and torch.export
    take it whole; its shapes are those that `reference` gives for tensors without data."""

    def register(launch):
        def dispatch(*arguments):
            tensors = [x for x in arguments if isinstance(x, Tensor)]
            with torch.cuda.device_of(tensors[0]):
                device, can = tensors[0].device, runs_on(*tensors)
                can = can and launches(device) and (not tma or has_tma(device))
                return launch(*arguments) if can else reference(*arguments)

        schema = torch.library.infer_schema(launch, mutates_args=())
        op = torch.library.custom_op(name, dispatch, mutates_args=(), schema=schema)
        op.register_fake(reference)
        return op

    return register


def check_tensors(expected: str, shapes_fit: bool, **tensors: Tensor) -> None:
    """Raise TypeError unless the tensors are float32, float16 or bfloat16, ValueError unless their
    shapes fit, each has an element and all are on one device."""
    for name, x in tensors.items():
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    devices, sizes = {x.device for x in tensors.values()}, [x.numel() for x in tensors.values()]
    if not shapes_fit or len(devices) > 1 or min(sizes) == 0:
        got = ", ".join(f"{name} {tuple(x.shape)} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"need {expected}, none empty, all on one device, got {got}")


def storage_order(x: Tensor) -> Tensor:
    """x without gaps in memory, channels last if a slice of such a tensor's channels; a copy only
    if x is not so already."""
    last = x.ndim == 4 and x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def split_convolution(x: Tensor, weight: Tensor, bias: Tensor, padding: int, split: int) -> Tensor:
    """Convolution; with `split` the first `split` output channels read the first C channels of x,
    N×2·C×H×W, the others the C behind them. weight O×C×k×k."""
    if not split:
        return F.conv2d(x, weight, bias, padding=padding)
    parts = zip(x.split(weight.shape[1], 1), (slice(split), slice(split, None)))
    return torch.cat([F.conv2d(x, weight[o], bias[o], padding=padding) for x, o in parts], 1)
