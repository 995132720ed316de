"""The kernels without a GPU: kernel_checks.py in Triton's interpreter, every shipped configuration
compiled for three GPU generations, wrong arguments, and efficientad.py without the kernels."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import kernels
from efficientad import PDN
from support import fast_gpu

ROOT = Path(__file__).parent.parent
MODULES = [module for name, module in sys.modules.items() if name.startswith("kernels.")]
LAST = torch.channels_last


def run(*command, cwd=ROOT, **environment) -> str:
    """The output of a Python process, which must succeed."""
    command, environment = [sys.executable, *map(str, command)], os.environ | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernel_checks.py"))


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """kernel_checks.py in Triton's interpreter, a minute on one core while others compile."""
    alone = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command, environment = [sys.executable, *CHECKS], os.environ | alone
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        yield process
        process.kill()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    assert " passed" in run(*CHECKS, TRITON_INTERPRET="0")


def shape_alone(x: torch.Tensor, convolution: torch.nn.Module) -> torch.Tensor:
    """Stands in for a convolution that is torch's own."""
    c = convolution.convolution
    height, width = (side + 2 * c.padding[0] - c.kernel_size[0] + 1 for side in x.shape[2:])
    return x.new_empty(len(x), height, width, c.out_channels).permute(0, 3, 1, 2)


def launch_fast_forms(dtype: torch.dtype, batches: tuple[int, ...]) -> None:
    """Every kernel of the fast form of S and M, padded or not, with a shared stem or not."""
    for size, padding, shared, n in itertools.product(("small", "medium"), (0, 1), (0, 1), batches):
        teacher, student = PDN(size, 384, padding), PDN(size, 768, padding)
        if shared:
            student[0], student[3] = teacher[0], teacher[3]
        for first in {teacher[0], student[0]}:
            fast_gpu.four_channels(first)
        for pdn in (teacher, student):
            pdn.to(dtype, memory_format=LAST).requires_grad_(False)
        pair = fast_gpu.Pair(teacher, student)
        pair.with_kernels[n] = [layer.kernel is not None for layer in pair.layers]
        pair(torch.empty(n, 4, 256, 256, dtype=dtype, memory_format=LAST))


def launch_everything(dtypes: tuple, batches: tuple[int, ...]) -> None:
    """Each kernel with each configuration, dtype and shape that the models at 256² have."""
    for dtype in dtypes:
        for c, size, o in ((3, 256, 128), (3, 256, 256), (128, 126, 256), (256, 126, 512)):
            x = torch.empty(1, c, size, size, dtype=dtype, memory_format=LAST)
            weight = torch.empty(o, c, 4, 4, dtype=dtype, memory_format=LAST)
            for padding in (0, 1):  # the plain model
                kernels.conv_relu_pool(x, weight, weight[:, 0, 0, 0], 3 * padding, padding)
        if dtype != torch.float32:
            launch_fast_forms(dtype, batches if dtype == torch.float16 else (1,))
    for layout in (LAST, torch.contiguous_format):
        for dtype in dtypes:
            sizes = ((1, 768, 56, 56), (1, 384, 56, 56), (1, 384, 56, 56))
            features = [torch.empty(s, dtype=dtype, memory_format=layout) for s in sizes]
            student, teacher, autoencoder = features
            for normalized in (teacher, teacher.float()):  # its statistics are float32
                kernels.distance_map(normalized, student[:, :384])
                kernels.combined_map(normalized, student, autoencoder, torch.empty(2, 2))
    kernels.quantile(torch.empty(384 * 56 * 56), 0.999)
    for dtype in dtypes:
        student = torch.empty(1, 384, 56, 56, dtype=dtype, requires_grad=True)
        kernels.hard_feature_loss(torch.empty(1, 384, 56, 56), student).backward()


def check_machine_code(name: str, sass: str, room: tuple[int, int], capability: int) -> None:
    """What the kernels' files claim of it. `room`: for how many programs a multiprocessor has
    registers, and shared memory."""
    programs = min(room)
    half = "HMMA" in sass or "HGMMA" in sass  # float32 is for checking
    if "conv" in name and half:
        assert "SHFL" not in sass, f"{name}: pooling moves data between threads"
        # of 4 bytes they would be misaligned where rows begin at 2: only a GPU would tell
        copies = set(re.findall(r"LDGSTS\S*", sass))
        assert copies <= {"LDGSTS.E.BYPASS.128"}, copies
    if name == "conv_relu_pool_kernel" and half:
        assert "LDGSTS" in sass or "LDG.E.64" in sass  # stage 1: a pixel at once
        assert programs >= 2
    if "conv_rows" in name:
        operands = re.findall(r"HGMMA\S* R\d+, (\S+)\[", sass)
        assert operands and set(operands) == {"gdesc"}, operands  # both in shared memory
        assert len(operands) == len(re.findall("HGMMA", sass)) and "UTMALDG.2D" in sass
        assert room[0] >= room[1] >= 1  # shared memory decides
    if name == "count_kernel":
        assert "MEMBAR" not in sass and "ATOMG" not in sass  # nothing waits for global memory
        assert programs >= (3 if capability == 90 else 2)  # as PROGRAMS wants
    if name in ("distance_map_kernel", "combined_map_kernel") and "LDG.E.128" in sass:
        assert programs >= 4  # channels last


def test_plain_torch_where_triton_cannot_launch(monkeypatch):
    class Drivers:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    runtime, fine = sys.modules["kernels.runtime"], SimpleNamespace(active=object())
    for drivers, capability, problem in (
        (fine, (8, 0), None),
        (fine, (7, 5), "needs a GPU from sm_80 on"),
        (Drivers(), (9, 0), "Failed to find C compiler"),
    ):
        triton = SimpleNamespace(runtime=SimpleNamespace(driver=drivers))
        monkeypatch.setattr(runtime, "triton", triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        runtime.launches.cache_clear()
        with pytest.warns(match=problem) if problem else contextlib.nullcontext():
            assert runtime.launches(torch.device("cuda", 0)) == (problem is None)
    runtime.launches.cache_clear()


# fp32 is for checking; the half types compile to much the same code
SHIPPED = {80: ((torch.float16,), (1,)), 89: ((torch.bfloat16, torch.float32), (1,))}
SHIPPED[90] = (torch.float16, torch.bfloat16, torch.float32), (1, 16)


@pytest.mark.parametrize("capability, shared_kib", [(80, 163), (89, 99), (90, 227)])
def test_shipped_configurations_compile(capability, shared_kib, monkeypatch, tmp_path):
    """A launch only compiles, with the arguments' real types, alignments and block sizes. No
    register is spilled to memory, a program's shared memory is within the limit, and the machine
    code is as the kernels' files say."""
    triton = pytest.importorskip("triton", reason="no Triton for this platform")
    from triton.backends.compiler import GPUTarget  # not at the top: Triton may be missing
    from triton.runtime.jit import JITFunction

    binaries, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        binaries[kernel.asm["cubin"]] = (self.__name__, kernel)

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    for name in ("runs_on", "launches"):
        monkeypatch.setattr(sys.modules["kernels.runtime"], name, lambda *tensors: True)
    for module in (sys.modules["kernels.runtime"], fast_gpu):
        monkeypatch.setattr(module, "has_tma", lambda device: capability >= 90)
    monkeypatch.setattr(fast_gpu.Layer, "by_cudnn", lambda self, x, c: shape_alone(x, c))
    launch_everything(*SHIPPED[capability])
    tools, file = Path(triton.__file__).parent / "backends/nvidia/bin", tmp_path / "kernel.cubin"

    def output(tool: str, option: str) -> str:
        command = [tools / tool, option, file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for binary, (name, kernel) in binaries.items():
        file.write_bytes(binary)
        usage = output("cuobjdump", "--dump-resource-usage")
        numbers = {what: int(n) for what, n in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        shared = numbers["SHARED"] + kernel.metadata.shared
        assert numbers["STACK"] == numbers["LOCAL"] == 0, (name, usage)
        assert shared <= shared_kib * 1024, (name, usage)
        # the interpreter's maximum keeps NaN whatever the kernel says
        if "conv" in name and "max." in kernel.asm["ptx"]:
            assert "max.NaN.f32" in kernel.asm["ptx"]
        sass = output("nvdisasm", "-c")
        threads, registers = 32 * kernel.metadata.num_warps, -(-numbers["REG"] // 8) * 8
        room = 2**16 // (threads * registers), shared_kib * 1024 // max(1, shared)
        check_machine_code(name, sass, room, capability)
    all_kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    expected = {name for name in all_kernels if capability >= 90 or "conv_rows" not in name}
    assert {name for name, _ in binaries.values()} == expected
    assert len(binaries) >= (50 if capability == 90 else 25)


X, W, B, META = torch.ones(1, 3, 8, 8), torch.ones(2, 3, 4, 4), torch.ones(2), torch.device("meta")
ODD, ROWS = torch.ones(1, 64, 5, 5).half(), torch.ones(128, 64, 3, 3).half()
X2, Q = torch.ones(1, 6, 8, 8), torch.ones(2, 2)
WRONG = [
    ("conv_relu_pool", (X.double(), W.double(), B), TypeError, "float64"),
    ("conv_relu_pool", (X.half(), W, B), TypeError, "torch.float16, torch.float32"),
    ("conv_relu_pool", (X, W, B.int()), TypeError, "bias be floating point"),
    ("conv_relu_pool", (X, W[:, :2], B), ValueError, r"x \(1, 3, 8, 8\).*weight \(2, 2, 4, 4\)"),
    ("conv_relu_pool", (X, W, B, 4), ValueError, "padding 0 to 3"),
    ("conv_relu_pool", (X, W, B, 0, 2), ValueError, "pool_padding 0 or 1"),
    ("conv_relu_pool", (X[:, :, :4], W, B), ValueError, "too small"),
    ("conv_relu_pool", (X[:, :, :3], W, B, 0, 1), ValueError, "too small"),
    ("conv_relu_pool", (X[:0], W, B), ValueError, "none empty"),
    ("conv_rows", (X, W, B, 0), TypeError, "all be float16 or all bfloat16"),
    ("conv_rows", (X.half(), W.half(), B.half(), 0), ValueError, "C a multiple of 64"),
    ("conv_rows_pool", (ODD, ROWS, ROWS[:, 0, 0, 0]), ValueError, "even width"),
    ("distance_map", (X, X.double()), TypeError, "b must be float32"),
    ("distance_map", (X, X[:, :2]), ValueError, "a and b N×C×h×w"),
    ("distance_map", (X[0], X[0]), ValueError, "a and b N×C×h×w"),
    ("distance_map", (X, X.to(META)), ValueError, "b .* on meta"),
    ("combined_map", (X, X, X, Q), ValueError, "student N×2C×h×w"),
    ("combined_map", (X, X2, X2, Q), ValueError, "autoencoder"),
    ("combined_map", (X, X2, X, B), ValueError, "quantiles 2×2"),
    ("quantile", (X.half(), 0.5), TypeError, "float32"),
    ("quantile", (X, 1.1), ValueError, "0 <= q <= 1"),
    ("quantile", (X[:0], 0.5), ValueError, "of 0 elements"),
    ("hard_feature_loss", (X, X.int()), TypeError, "student must be"),
    ("hard_feature_loss", (X, X[:, :1]), ValueError, "one shape"),
    ("hard_feature_loss", (X, X, 1.5), ValueError, "p_hard"),
]


@pytest.mark.parametrize("name, args, error, message", WRONG)
def test_wrong_arguments(name, args, error, message):
    with pytest.raises(error, match=message):
        getattr(kernels, name)(*args)


SCORE = """
import efficientad, torch
x = torch.randn(1, 3, 40, 40)
assert not efficientad.use_kernels(x)
assert efficientad.quantile(efficientad.PDN()(x), 0.9).isfinite()
"""
NO_TRITON = "import sys, torch; sys.modules['triton'] = None; import kernels;"
NO_TRITON += "assert kernels.quantile(torch.tensor([1.0, 2.0]), 0.5) == 1.5\n"


def test_efficientad_needs_no_kernels():
    """Without Triton; switched off."""
    run("-c", NO_TRITON + SCORE)
    run("-c", SCORE, TRITON_INTERPRET="1", EFFICIENTAD_KERNELS="0")


def test_in_the_interpreter(interpreter):  # the last one: it has run meanwhile
    triton = pytest.importorskip("triton", reason="no Triton for this platform")
    versions = [[int(n) for n in m.__version__.split(".")[:2]] for m in (triton, numpy)]
    if versions[0] < [3, 7] and versions[1] >= [2, 4]:
        pytest.skip("the interpreter of Triton < 3.7 fails on numpy >= 2.4")
    output, _ = interpreter.communicate()
    assert interpreter.returncode == 0 and " passed" in output, output[-5000:]
