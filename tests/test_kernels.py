"""The kernels without a GPU: all of kernel_checks.py in Triton's interpreter, every shipped configuration compiled for three
GPU generations, the operators through torch.compile and torch.export, and efficientad.py with and without the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

ROOT = Path(__file__).parent.parent
MODULES = [sys.modules[f"kernels.{name}"] for name in ("conv_relu_pool", "distance_map", "quantile", "hard_feature_loss")]
LAST = torch.channels_last


def run_checks(**environment):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests/kernel_checks.py")]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="no Triton for this platform")
    run_checks(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    run_checks(TRITON_INTERPRET="0")


# --------------------------------------------------------------------------------------------- compiled for three generations


class FakeDriver:
    """Tells Triton's compiler that a GPU of this compute capability is there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Within the test, launching a kernel only compiles it, with the arguments' real types, alignments and block sizes, and
    appends (name, compiled kernel) to this list."""
    triton = pytest.importorskip("triton", reason="no Triton for this platform")
    from triton.runtime.jit import JITFunction  # not at the top: Triton may be missing

    launched, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for module in MODULES:
        monkeypatch.setattr(module, "runs_on", lambda *tensors: True)
    yield launched


def launch_everything():
    """Each kernel with each configuration, dtype and shape that the models at 256² have: S and M, with and without padding."""
    halves = (torch.float16, torch.bfloat16)
    for dtype in (*halves, torch.float32):
        for c, size, o in ((3, 256, 128), (3, 256, 256), (128, 126, 256), (256, 126, 512)):
            for padding in (0, 1):
                x, weight = (torch.empty(s, dtype=dtype, memory_format=LAST) for s in ((1, c, size, size), (o, c, 4, 4)))
                kernels.conv_relu_pool(x, weight, torch.empty(o, dtype=dtype), 3 * padding, padding)
    for layout in (LAST, torch.contiguous_format):
        for dtype in (*halves, torch.float32):
            student = torch.empty(1, 768, 56, 56, dtype=dtype, memory_format=layout)
            for other in {dtype, torch.float32}:  # the teacher's statistics are fp32
                teacher, autoencoder = (torch.empty(1, 384, 56, 56, dtype=t, memory_format=layout) for t in (other, dtype))
                kernels.distance_map(teacher, student[:, :384])
                kernels.combined_map(teacher, student, autoencoder, torch.empty(2, 2), dtype == torch.float16)
    for q in (0.999, [0.9, 0.995]):
        kernels.quantile(torch.empty(384 * 56 * 56), q)
    for dtype in (*halves, torch.float32):
        student = torch.empty(1, 384, 56, 56, dtype=dtype, requires_grad=True)
        kernels.hard_feature_loss(torch.empty(1, 384, 56, 56), student).backward()


@pytest.mark.parametrize("capability, shared_kib", [(80, 163), (89, 99), (90, 227)])
def test_shipped_configurations_compile(capability, shared_kib, compiled, tmp_path, monkeypatch):
    """No register spilled to memory, and shared memory within what a program may have; both read from the machine code."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver(capability))
    launch_everything()
    kernels_seen = set()
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binaries = {kernel.asm["cubin"]: (name, kernel) for name, kernel in compiled}
    for binary, (name, kernel) in binaries.items():
        (tmp_path / "kernel.cubin").write_bytes(binary)
        command = [cuobjdump, "--dump-resource-usage", tmp_path / "kernel.cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack, static, local = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("STACK", "SHARED", "LOCAL"))
        assert stack == local == 0, (name, usage)
        assert static + kernel.metadata.shared <= shared_kib * 1024, (name, static, kernel.metadata.shared)
        kernels_seen.add(name)
    assert kernels_seen == {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert len(binaries) >= 50


# ------------------------------------------------------------------------------------- the operators, computing their references


def arguments():
    x, y = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    return {
        "conv_relu_pool": (x, torch.randn(4, 3, 4, 4), torch.randn(4), 3, 1),
        "distance_map": (x, y),
        "combined_map": (x, torch.randn(2, 6, 6, 5), y, torch.randn(2, 2), True),
        "quantile": (x, [0.1, 0.9]),
        "hard_feature_loss": (x, y.clone().requires_grad_(), 0.9),
    }


@pytest.mark.parametrize("name", arguments())
def test_opcheck_compile_and_export(name):
    args = arguments()[name]
    torch.library.opcheck(getattr(torch.ops.efficientad, name).default, args)
    function = getattr(kernels, name)
    expected = function(*args)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*args), expected, rtol=0, atol=0)

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = torch.export.export(Module(), args)
    assert f"efficientad.{name}" in str(program.graph)
    torch.testing.assert_close(program.module()(*args), expected, rtol=0, atol=0)


def test_hard_feature_loss_trains_when_compiled():
    teacher, student = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5, requires_grad=True)
    gradients = []
    for function in (kernels.hard_feature_loss, torch.compile(kernels.hard_feature_loss, fullgraph=True, backend="aot_eager")):
        gradients += torch.autograd.grad(function(teacher, 2 * student, 0.9), student)
    assert torch.equal(*gradients) and gradients[0].count_nonzero() == 18  # of 180


X, W, B = torch.ones(1, 3, 8, 8), torch.ones(2, 3, 4, 4), torch.ones(2)


@pytest.mark.parametrize("name, args, error, message", [
    ("conv_relu_pool", (X.double(), W.double(), B), TypeError, "float64"),
    ("conv_relu_pool", (X.half(), W, B), TypeError, "float16 and torch.float32"),
    ("conv_relu_pool", (X, W, B.int()), TypeError, "bias must be floating point"),
    ("conv_relu_pool", (X, W[:, :2], B), ValueError, r"got \(1, 3, 8, 8\), \(2, 2, 4, 4\)"),
    ("conv_relu_pool", (X, W, B.to("meta")), ValueError, "one device"),
    ("conv_relu_pool", (X, W, B, 4), ValueError, "padding must be 0 to 3"),
    ("conv_relu_pool", (X, W, B, 0, 2), ValueError, "pool_padding 0 or 1"),
    ("conv_relu_pool", (X[:, :, :4], W, B), ValueError, "too small"),
    ("distance_map", (X, X.double()), TypeError, "b must be float32"),
    ("distance_map", (X, X[:, :2]), ValueError, "same shape"),
    ("distance_map", (X, X.to("meta")), ValueError, "one device"),
    ("distance_map", (X[0], X[0]), ValueError, "N×C×h×w"),
    ("combined_map", (X, X, X, torch.ones(2, 2)), ValueError, "twice the channels"),
    ("combined_map", (X, torch.ones(1, 6, 8, 8), X, torch.ones(2)), ValueError, "quantiles must be 2×2"),
    ("quantile", (X.half(), 0.5), TypeError, "float32"),
    ("quantile", (X, [0.5, 1.1]), ValueError, "0 <= q <= 1"),
    ("quantile", (X, []), ValueError, "quantile needs"),
    ("quantile", (X[:0], 0.5), ValueError, "of 0 elements"),
    ("hard_feature_loss", (X, X.int()), TypeError, "student must be"),
    ("hard_feature_loss", (X, X[:, :1]), ValueError, "one shape"),
    ("hard_feature_loss", (X, X, 1.5), ValueError, "p_hard"),
])  # fmt: skip
def test_wrong_arguments(name, args, error, message):
    with pytest.raises(error, match=message):
        getattr(kernels, name)(*args)


# ----------------------------------------------------------------------------------------------- with and without the package

SCORE = """
import sys, torch
{before}
import efficientad
torch.manual_seed(0)
x = torch.randn(1, 3, 40, 40)
assert efficientad.use_kernels(x) == {expected}
with torch.no_grad():
    print(efficientad.quantile(efficientad.PDN()(x), 0.9).item())
"""


def score(folder: Path, expected: bool, before: str = "", **environment) -> float:
    code = SCORE.format(before=before, expected=expected)
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


def test_efficientad_needs_no_kernels(tmp_path):
    """Alone, beside a foreign package named kernels, without Triton, switched off: the same number."""
    shutil.copy(ROOT / "efficientad.py", tmp_path)
    expected = score(tmp_path, False)
    (tmp_path / "kernels.py").write_text("quantile = print  # no other name of ours")
    assert score(tmp_path, False) == expected
    no_triton = "sys.modules['triton'] = None; import kernels; print(kernels.quantile(torch.ones(3), 0.5).item(), file=sys.stderr)"
    assert score(ROOT, False, no_triton) == expected
    pytest.importorskip("triton", reason="no Triton for this platform")
    assert score(ROOT, False, TRITON_INTERPRET="1", EFFICIENTAD_KERNELS="0") == expected
