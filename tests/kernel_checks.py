"""Every kernel against plain torch in float64. test_kernels.py runs this file in processes of its
own: in Triton's interpreter (TRITON_INTERPRET=1 must be set before kernels are imported; float32
and float16, tiny images), and on a GPU if there is one (bfloat16 and real sizes too).
Uninitialized memory is NaN throughout, so that a missed element shows."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import efficientad
import kernels

MODULES = {name: m for name, m in sys.modules.items() if name.startswith("kernels.")}
GPU = not MODULES["kernels.runtime"].INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]
# RMS error / RMS of the result. Rounding the output of a half type alone gives up to 2⁻¹¹/√3 =
# 2.8e-4 and 2.3e-3.
BOUNDS = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.4e-3}
DTYPES = list(BOUNDS) if GPU else [torch.float32, torch.float16]  # bfloat16 is wrong there

if GPU and not torch.cuda.is_available():
    sys.exit("kernel_checks.py needs TRITON_INTERPRET=1 or a GPU; run test_kernels.py")


@pytest.fixture(autouse=True)
def strict():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    assert torch.empty(7, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def noise(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=layout) if len(shape) == 4 else x


def rms_error(x, expected):
    difference = (x.double() - expected).square().mean()
    return (difference / expected.double().square().mean()).sqrt().item()


# -------------------------------------------------------------------------------- conv_relu_pool

PADDINGS = [(0, 0), (3, 1), (0, 1), (3, 0), (1, 1)]
# N, C, O, H, W, padding, pool_padding
SMALL = [(3, 3, 5, *size, *p) for size in ((5, 5), (9, 14), (20, 17)) for p in PADDINGS]
SMALL += [(2, 64, 33, 7, 10, *p) for p in PADDINGS[:2]]
SMALL += [(1, 128, 130, 8, 5, 0, 0), (1, 3, 1, 1, 1, 3, 1), (2, 64, 33, 1, 1, 3, 1)]
SMALL += [(1, 3, 130, 20, 20, 3, 1), (2, 5, 7, 1, 19, 3, 1)]
STAGES = [(3, 128, 256), (3, 256, 256), (128, 256, 126), (256, 512, 126)]
REAL = [(n, c, o, s, s, *p) for n in (1, 16) for p in PADDINGS[:2] for c, o, s in STAGES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, c, o, h, w, padding, pool_padding", SMALL + REAL * GPU)
def test_conv_relu_pool(n, c, o, h, w, padding, pool_padding, dtype):
    if dtype == torch.float32 and c >= 64 and not GPU:
        c //= 16  # float32 has one configuration for every c, and small blocks: slow here
    x, bias = noise(n, c, h, w, dtype=dtype), noise(o, dtype=dtype)
    weight = noise(o, c, 4, 4, dtype=dtype) / (4 * math.sqrt(c))
    y = kernels.conv_relu_pool(x, weight, bias, padding, pool_padding)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    for i in range(n):
        z = F.conv2d(x[i : i + 1].double(), weight.double(), bias.double(), padding=padding)
        expected = F.avg_pool2d(z.relu(), 2, 2, pool_padding)
        assert y[i : i + 1].shape == expected.shape
        assert rms_error(y[i : i + 1], expected) < BOUNDS[dtype]


def test_conv_relu_pool_reads_any_layout_and_keeps_nan():
    x, weight, bias = (noise(*s, dtype=torch.float16) for s in ((2, 3, 9, 8), (5, 3, 4, 4), (5,)))
    y = kernels.conv_relu_pool(x, weight, bias)
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(kernels.conv_relu_pool(other, weight, bias.float()), y)
    weight = weight.to(memory_format=torch.channels_last)
    assert torch.equal(kernels.conv_relu_pool(x, weight, bias), y)
    assert torch.equal(kernels.conv_relu_pool(x, weight, bias[:, None].repeat(1, 2)[:, 0]), y)
    x[:, 0, 0, 0] = math.nan
    y = kernels.conv_relu_pool(x, weight, bias)
    assert y[:, :, 0, 0].isnan().all() and not y[:, :, 1:].isnan().any()


def test_conv_relu_pool_split():
    """Teacher and student in one launch."""
    dtype = torch.float16
    x, bias = noise(1, 64, 9, 11, dtype=dtype, layout=torch.channels_last), noise(256, dtype=dtype)
    weight = noise(256, 32, 4, 4, dtype=dtype) / 23
    y = kernels.conv_relu_pool(x, weight, bias, 0, 0, 128)
    for part, o in zip(x.split(32, 1), (slice(128), slice(128, None))):
        assert torch.equal(y[:, o], kernels.conv_relu_pool(part, weight[o], bias[o]))


# ------------------------------------------------------------------------------------- conv_rows

TMA = not GPU or MODULES["kernels.runtime"].has_tma(torch.device("cuda"))
# N, C, O, H, W, kernel size, split
ROWS = [(2, 64, 128, 7, 8, 3, 0), (1, 64, 256, 5, 6, 4, 128), (2, 128, 128, 3, 4, 1, 0)]
ROWS += [(1, 64, 384, 6, 70, 3, 128)]
REAL_ROWS = [(n, w, 4 * w, 126, 126, 4, 2 * w) for w in (128, 256) for n in (1, 16)]
REAL_ROWS += [(n, 256, 512, 61, 61, 3, 256) for n in (1, 16)]
REAL_ROWS += [(n, 512, 1152, 59, 59, 4, 384) for n in (1, 16)]


@pytest.mark.skipif(not TMA, reason="needs a GPU with a TMA (sm_90)")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("n, c, o, h, w, size, split", ROWS + REAL_ROWS * GPU)
def test_conv_rows(n, c, o, h, w, size, split, dtype):
    groups, bound = 2 if split else 1, BOUNDS[dtype]
    x = noise(n, groups * c, h, w, dtype=dtype, layout=torch.channels_last)
    weight, bias = noise(o, c, size, size, dtype=dtype) / (size * c**0.5), noise(o, dtype=dtype)
    reference = MODULES["kernels.conv_rows"].reference
    expected = reference(x.double(), weight.double(), bias.double(), split, False)
    for relu in (False, True):
        y = kernels.conv_rows(x, weight, bias, split, relu)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert rms_error(y, expected.relu() if relu else expected) < bound
    if w % 2 == 0 and min(h, w) > size:
        y = kernels.conv_rows_pool(x, weight, bias, split)
        assert rms_error(y, F.avg_pool2d(expected.relu(), 2)) < bound


def at_8_bytes(x):
    """A copy in channels last whose memory does not begin at a multiple of 16 bytes."""
    n, c, h, w = x.shape
    return x.new_empty(x.numel() + 4)[4:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


@pytest.mark.skipif(not TMA, reason="needs a GPU with a TMA (sm_90)")
def test_conv_rows_reads_slices_and_keeps_nan():
    dtype = torch.float16
    x = noise(1, 192, 5, 6, dtype=dtype, layout=torch.channels_last)
    weight, bias = noise(128, 64, 3, 3, dtype=dtype) / 24, noise(128, dtype=dtype)
    part = x[:, 64:128]
    for function in (kernels.conv_rows, kernels.conv_rows_pool):
        y = function(part, weight, bias)  # where it lies
        assert torch.equal(y, function(part.contiguous(), weight, bias))
        assert torch.equal(y, function(at_8_bytes(part), at_8_bytes(weight), bias))
        assert torch.equal(y, function(part, weight, bias[:, None].repeat(1, 2)[:, 0]))
    part[:, 0, 0, 0] = math.nan
    for relu in (False, True):
        y = kernels.conv_rows(part, weight, bias, 0, relu)
        assert y[:, :, 0, 0].isnan().all() and not y[:, :, 1:].isnan().any()
    y = kernels.conv_rows_pool(part, weight, bias)
    assert y[:, :, 0, 0].isnan().all() and not y[:, :, 0, 1:].isnan().any()


# ---------------------------------------------------------------------------------- distance_map

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 17), (1, 130, 20, 1), (1, 33, 2, 65)]


def squared_distance(a, b):
    return (a.double() - b.double()).square().mean(1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("n, c, h, w", SHAPES + [(16, 384, 56, 56)] * GPU)
def test_maps(n, c, h, w, layout, dtype):
    teacher = noise(n, c, h, w, dtype=dtype, layout=layout)
    autoencoder = noise(n, c, h, w, dtype=dtype)
    student = noise(n, 2 * c, h, w, dtype=dtype, layout=layout)
    quantiles = torch.tensor([[0.3, 1.4], [-0.2, 0.9]], device=DEVICE)
    expected = 0
    for a, b, q in zip((teacher, autoencoder), student.split(c, 1), quantiles.double()):
        d, exact = kernels.distance_map(a, b), squared_distance(a, b)  # b is a slice, not a copy
        assert d.dtype == torch.float32 and d.shape == (n, 1, h, w)
        assert rms_error(d, exact) < 1e-6  # the inputs are exact
        expected += 0.5 * 0.1 * (exact - q[0]) / (q[1] - q[0])
    combined = kernels.combined_map(teacher, student, autoencoder, quantiles)
    assert combined.dtype == torch.float32 and combined.shape == (n, 1, h, w)
    assert rms_error(combined, expected) < 2e-6  # the normalization subtracts q_a


def test_maps_of_any_strides_and_mixed_types():
    a, b = noise(2, 6, 3, 17), noise(2, 6, 3, 17, dtype=torch.float16)
    for c in (a, a.to(memory_format=torch.channels_last), a.mT.contiguous().mT):
        assert rms_error(kernels.distance_map(c, b), squared_distance(a, b)) < 1e-6
    part = kernels.distance_map(a[:, ::2, 1:, ::3], b[:, ::2, 1:, ::3])
    assert torch.equal(part, kernels.distance_map(a[:, ::2], b[:, ::2])[..., 1:, ::3])


# -------------------------------------------------------------------------------------- quantile

QS = [0, 0.1, 0.9, 0.995, 1]


def kinds(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    one, two = torch.ones(n), torch.full((n,), 2.0)
    yield "normal", x
    yield "ties", x.round()
    yield "equal", torch.full((n,), -2.5)
    yield "denormals", torch.where(x > 0.5, x, x * 1e-39)
    yield "zeros", torch.where(x > 1, x, 0.0) * torch.where(torch.arange(n) % 2 == 0, 1, -1)
    yield "one value apart", torch.nextafter(one, two).where(x > 0, one)
    yield "infinite", torch.where(x > 1.2, math.inf, torch.where(x < -1.2, -math.inf, x))


@pytest.mark.parametrize("n", [1, 2, 3, 100, 2049, 5001] + [1_204_224, 20_000_003] * GPU)
def test_quantile(n):
    for kind, x in kinds(n):
        x = x.to(DEVICE)
        ordered = x.sort().values
        for q in QS:
            position, value = q * (n - 1), kernels.quantile(x, q)
            low = math.floor(position)
            if position == low:
                assert value == ordered[low], (kind, q)  # exactly
                continue
            expected = torch.lerp(ordered[low], ordered[low + 1], position - low)
            size = ordered[low : low + 2].abs().max()
            unit = torch.nextafter(size, torch.full_like(size, math.inf)) - size
            close = value == expected or (value - expected).abs() <= unit
            assert close or value.isnan() and expected.isnan(), (kind, q)  # inf − inf


def test_quantile_strides_and_nan():
    x = noise(2, 3, 4, 5)
    expected = kernels.quantile(x, 0.3)
    assert expected.shape == ()
    for y in (x.to(memory_format=torch.channels_last), x.mT, torch.cat([x, 9 * x], 1)[:, :3]):
        assert torch.equal(kernels.quantile(y, 0.3), expected)
    for nan in (math.nan, -math.nan):
        x = torch.tensor([1.0, nan, math.inf], device=DEVICE)
        assert kernels.quantile(x, 0).isnan() and kernels.quantile(x, 1).isnan()


# ----------------------------------------------------------------------------- hard feature loss

FEATURES = [(1, 1, 1, 1), (2, 5, 3, 7), (1, 17, 20, 9)]
FEATURES += [(1, 384, 56, 56), (16, 384, 56, 56)] * GPU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, c, h, w", FEATURES)
@pytest.mark.parametrize("p_hard", [0, 0.5, 0.999, 1])
def test_hard_feature_loss(n, c, h, w, p_hard, dtype):
    teacher = noise(n, c, h, w, layout=torch.channels_last)
    both = noise(n, 2 * c, h, w, dtype=dtype, layout=FORMATS[n % 2])
    student = both.requires_grad_()[:, :c]  # with gaps in memory, as in the model
    loss = kernels.hard_feature_loss(teacher, student, p_hard)
    (3 * loss).backward()
    d = (teacher - student.detach().float()).square()
    ordered, position = d.flatten().sort().values, p_hard * (d.numel() - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    hard = d >= torch.lerp(low, high, position % 1)
    assert loss.dtype == torch.float32 and rms_error(loss, d.double()[hard].mean()) < 1e-6
    gradient = 6 * (student.detach().double() - teacher.double()) / hard.sum()
    expected = torch.zeros_like(both, dtype=torch.float64)
    expected[:, :c] = torch.where(hard, gradient, 0)
    assert both.grad.dtype == dtype and rms_error(both.grad, expected) < BOUNDS[dtype]


def test_a_slice_of_channels_is_copied_in_its_order():
    part = noise(2, 6, 3, 4, layout=torch.channels_last)[:, :3]
    copy = MODULES["kernels.runtime"].storage_order(part)
    assert copy.is_contiguous(memory_format=torch.channels_last) and torch.equal(copy, part)


# ------------------------------------------------------------------------- operators and dispatch

SHAPE = (2, 3, 6, 5)
ARGUMENTS = {  # shapes of the tensors, other arguments
    "conv_relu_pool": ([SHAPE, (4, 3, 4, 4), (4,)], [3, 1, 0]),
    "conv_rows": ([(1, 64, 4, 6), (128, 64, 3, 3), (128,)], [0, True]),
    "conv_rows_pool": ([(1, 64, 4, 6), (128, 64, 3, 3), (128,)], [0]),
    "distance_map": ([SHAPE, SHAPE], []),
    "combined_map": ([SHAPE, (2, 6, 6, 5), SHAPE, (2, 2)], []),
    "quantile": ([SHAPE], [0.9]),
    "hard_feature_loss": ([SHAPE, SHAPE], [0.9]),
    "hard_feature_loss_backward": ([(), SHAPE, SHAPE, ()], []),
}


def arguments(name, layout=torch.contiguous_format):
    shapes, others = ARGUMENTS[name]
    dtype = torch.float16 if "rows" in name else torch.float32
    tensors = [noise(*shape, dtype=dtype, layout=layout) for shape in shapes]
    if name == "hard_feature_loss":
        tensors[1].requires_grad_()
    return (*tensors, *others)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", [name for name in ARGUMENTS if TMA or "rows" not in name])
def test_operators(name, layout, monkeypatch):
    """The kernel's output has the shape, dtype and strides of its reference's, which are all that a
    compiled program knows of it, and the same values."""
    args, operator = arguments(name, layout), getattr(torch.ops.efficientad, name)
    torch.library.opcheck(operator.default, args)
    result = operator(*args)
    for module in MODULES.values():
        for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, None)
    with pytest.raises(TypeError, match="NoneType"):  # it does launch a kernel
        operator(*args)
    monkeypatch.setattr(MODULES["kernels.runtime"], "runs_on", lambda *tensors: False)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if "rows" in name else {}  # the order of sums in fp16
    torch.testing.assert_close(operator(*args), result, **tolerance)


def test_rule(monkeypatch):
    x = noise(2, 3)
    weight = noise(2, 3).requires_grad_()
    assert efficientad.use_kernels(x)
    assert not efficientad.use_kernels(x, weight) and not efficientad.use_kernels(x.double())
    with torch.no_grad():
        assert efficientad.use_kernels(x, weight)

    class Quantile(torch.nn.Module):
        def forward(self, x):
            return efficientad.quantile(x, 0.5)

    graph = torch.export.export(Quantile(), (x,)).graph
    assert not any("efficientad" in str(node.target) for node in graph.nodes)
    monkeypatch.setattr(efficientad, "KERNELS", False)
    assert not efficientad.use_kernels(x)


class Called(TorchDispatchMode):
    """Within it, `names` collects the operators of this package that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "efficientad":
            self.names.append(operator._opname)
        return operator(*args, **(kwargs or {}))


def test_model_with_and_without_kernels(monkeypatch):
    """The same model: raw maps, quantiles, map, score, loss and gradient differ by rounding."""
    if not GPU:  # larger blocks: the interpreter's time goes with the number of programs
        for config in MODULES["kernels.distance_map"].CONFIGS.values():
            monkeypatch.setitem(config, "BLOCK_C", 512)
        for name in ("kernels.quantile", "kernels.hard_feature_loss"):
            monkeypatch.setitem(MODULES[name].CONFIG, "BLOCK", 65536)
    model = efficientad.EfficientAD(image_size=(128, 128)).to(DEVICE).eval()
    images = torch.randint(256, (1, 3, 128, 128), dtype=torch.uint8, device=DEVICE)
    results = {}
    for on in (True, False):
        monkeypatch.setattr(efficientad, "KERNELS", on)
        with Called() as called:
            model.calibrate([images], 0.5, 0.9)
            with torch.no_grad():
                results[on] = [*model.raw_maps(images), model.quantiles.clone(), *model(images)]
            loss = model.losses(images, images, None, 0.9)["hard"]
            results[on] += [loss.detach(), *torch.autograd.grad(loss, model.student[-1].weight)]
        used = {"distance_map", "quantile", "hard_feature_loss", "hard_feature_loss_backward"}
        assert set(called.names) == (used if on else set())
    for with_kernels, without in zip(results[True], results[False]):
        assert with_kernels.shape == without.shape
        # q_b − q_a is small beside q_a in an untrained model
        assert rms_error(with_kernels, without) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", ["small"] + ["medium"] * GPU)
def test_pdn_with_and_without_kernels(size, padding, dtype, monkeypatch):
    """Under autocast and in the half type. In float32 and with gradients torch's stays."""
    net = efficientad.PDN(size, padding=padding).to(DEVICE)
    x = noise(1, 3, *((10, 13) if padding else (34, 37)))
    with Called() as called:
        expected = net(x)
        assert not called.names
        with torch.no_grad():
            with torch.autocast(DEVICE, dtype):
                outputs = [net(x)]
            outputs.append(net.to(dtype)(x.to(dtype)))
            assert called.names == ["conv_relu_pool"] * 4
            monkeypatch.setattr(efficientad, "KERNELS", False)
            outputs.append(net(x.to(dtype)))
            assert len(called.names) == 4
    errors = [rms_error(y, expected) for y in outputs]
    # Without kernels the map before pooling is rounded too.
    assert max(errors[:2]) < 1.1 * errors[2] < 5 * BOUNDS[dtype]
