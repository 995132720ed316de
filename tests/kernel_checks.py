"""Every kernel against plain torch in float64. `test_kernels.py` runs this file in processes of their own: in Triton's
interpreter (TRITON_INTERPRET=1, which must be set before kernels are imported; float32 and float16, tiny images), and on a GPU
if there is one (bfloat16 and real sizes too). Uninitialized memory is NaN throughout, so that a missed element shows."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import efficientad
import kernels

# Bounds on RMS error / RMS of the result. Half types: rounding the output once gives up to 2⁻¹¹/√3 = 2.8e-4 and 2.3e-3.
BOUNDS = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.4e-3}
GPU = not sys.modules["kernels.triton_or_not"].INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
DTYPES = list(BOUNDS) if GPU else [torch.float32, torch.float16]  # the interpreter computes bfloat16 wrongly
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def strict():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(7, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def noise(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=layout) if len(shape) == 4 else x


def rms_error(x, reference):
    return ((x.double() - reference).square().mean() / reference.double().square().mean()).sqrt().item()


# --------------------------------------------------------------------------------------------------------- conv_relu_pool

SMALL = [(n, c, o, h, w, 3, 1) for n, c, o, h, w in ((1, 3, 1, 1, 1), (2, 64, 33, 1, 1), (1, 3, 130, 20, 20), (2, 5, 7, 1, 19))]
SMALL += [(3, 3, 5, h, w, p, pp) for h, w in ((5, 5), (9, 14), (20, 17)) for p, pp in ((0, 0), (3, 1), (0, 1), (3, 0), (1, 1))]
SMALL += [(2, 64, 33, 7, 10, p, pp) for p, pp in ((0, 0), (3, 1))] + [(1, 128, 130, 8, 5, 0, 0)]
REAL = [(n, c, o, size, size, 3 * p, p) for n in (1, 16) for p in (0, 1)
        for c, o, size in ((3, 128, 256), (3, 256, 256), (128, 256, 126), (256, 512, 126))]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, c, o, h, w, padding, pool_padding", SMALL + (REAL if GPU else []))
def test_conv_relu_pool(n, c, o, h, w, padding, pool_padding, dtype):
    if dtype == torch.float32 and c >= 64 and not GPU:
        c //= 16  # float32 has one configuration for every c, and small blocks: slow here
    x, weight, bias = noise(n, c, h, w, dtype=dtype), noise(o, c, 4, 4, dtype=dtype) / (4 * math.sqrt(c)), noise(o, dtype=dtype)
    y = kernels.conv_relu_pool(x, weight, bias, padding, pool_padding)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    for i in range(n):
        z = F.conv2d(x[i : i + 1].double(), weight.double(), bias.double(), padding=padding)
        reference = F.avg_pool2d(z.relu(), 2, 2, pool_padding)
        assert y[i : i + 1].shape == reference.shape and rms_error(y[i : i + 1], reference) < BOUNDS[dtype]


def test_conv_relu_pool_reads_any_layout():
    x, weight, bias = noise(2, 3, 9, 8, dtype=torch.float16), noise(5, 3, 4, 4, dtype=torch.float16), noise(5)
    y = kernels.conv_relu_pool(x, weight, bias.half())
    for layout in FORMATS:
        torch.testing.assert_close(kernels.conv_relu_pool(x.to(memory_format=layout), weight, bias), y, rtol=0, atol=0)
    assert torch.equal(kernels.conv_relu_pool(x.mT.contiguous().mT, weight.to(memory_format=torch.channels_last), bias), y)


def test_conv_relu_pool_keeps_nan():
    x, weight, bias = noise(1, 3, 9, 8, dtype=torch.float16), noise(5, 3, 4, 4, dtype=torch.float16), noise(5)
    x[0, 0, 0, 0] = math.nan
    y = kernels.conv_relu_pool(x, weight, bias)
    assert y[0, :, 0, 0].isnan().all() and not y[0, :, 1:].isnan().any()


# ----------------------------------------------------------------------------------------------------------- distance_map


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("n, c, h, w", [(1, 1, 1, 1), (2, 5, 3, 17), (1, 130, 20, 1), (1, 33, 2, 65), *([(16, 384, 56, 56)] * GPU)])
def test_maps(n, c, h, w, layout, dtype):
    teacher, autoencoder = noise(n, c, h, w, dtype=dtype, layout=layout), noise(n, c, h, w, dtype=dtype)
    student = noise(n, 2 * c, h, w, dtype=dtype, layout=layout)
    quantiles = torch.tensor([[0.3, 1.4], [-0.2, 0.9]], device=DEVICE)
    halves = student.split(c, 1)  # slices, not copies
    maps = [(a.double() - b.double()).square().mean(1, keepdim=True) for a, b in zip((teacher, autoencoder), halves)]
    for a, b, reference in ((teacher, halves[0], maps[0]), (autoencoder, halves[1], maps[1])):
        d = kernels.distance_map(a, b)
        assert d.dtype == torch.float32 and d.shape == (n, 1, h, w) and rms_error(d, reference) < 1e-6  # inputs are exact
    maps = [0.1 * (m - q[0]) / (q[1] - q[0]) for m, q in zip(maps, quantiles.double())]
    expected = torch.cat([(maps[0] + maps[1]) / 2, *maps], 1)
    combined = kernels.combined_map(teacher, student, autoencoder, quantiles)
    singles = kernels.combined_map(teacher, student, autoencoder, quantiles, singles=True)
    assert combined.shape == (n, 1, h, w) and torch.equal(combined[:, 0], singles[:, 0])
    for i in range(3):
        assert rms_error(singles[:, i], expected[:, i]) < 2e-6  # the normalization subtracts q_a


def test_maps_of_any_strides():
    a, b = noise(2, 6, 3, 17), noise(2, 6, 3, 17)
    d = kernels.distance_map(a, b)
    for c in (a.to(memory_format=torch.channels_last), a.mT.contiguous().mT):
        assert rms_error(kernels.distance_map(c, b), d) < 1e-6
    part = kernels.distance_map(a[:, ::2, 1:, ::3], b[:, ::2, 1:, ::3])
    assert torch.equal(part, kernels.distance_map(a[:, ::2], b[:, ::2])[..., 1:, ::3])


def test_maps_of_mixed_types():
    a, b = noise(2, 6, 3, 4), noise(2, 6, 3, 4, dtype=torch.float16)
    assert rms_error(kernels.distance_map(a, b), (a.double() - b.double()).square().mean(1, keepdim=True)) < 1e-6


# --------------------------------------------------------------------------------------------------------------- quantile

QS = [0.1, 0.9, 0.995]


def kinds(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    yield "normal", x
    yield "ties", x.round()
    yield "equal", torch.full((n,), -2.5)
    yield "denormals", torch.where(x > 0.5, x, x * 1e-39)
    yield "zeros", torch.where(x > 1, x, 0.0) * torch.where(torch.arange(n) % 2 == 0, 1, -1)
    yield "one value apart", torch.nextafter(torch.ones(n), torch.full((n,), 2.0)).where(x > 0, torch.ones(n))
    yield "infinite", torch.where(x > 1.2, math.inf, torch.where(x < -1.2, -math.inf, x))


@pytest.mark.parametrize("n", [1, 2, 3, 100, 2049, 5001, *([1_204_224, 20_000_003] * GPU)])
def test_quantile(n):
    for kind, x in kinds(n):
        x = x.to(DEVICE)
        if kind == "normal":
            assert torch.equal(kernels.quantile(x, [0, 1]), torch.stack([x.min(), x.max()]))
        ordered, values = x.sort().values, kernels.quantile(x, QS)
        for q, value in zip(QS, values):
            position = q * (n - 1)
            low = math.floor(position)
            if position == low:
                assert value == ordered[low], (kind, q)  # exactly
                continue
            expected = torch.lerp(ordered[low], ordered[low + 1], position - low)
            size = ordered[low : low + 2].abs().max()
            unit = torch.nextafter(size, torch.full_like(size, math.inf)) - size
            assert torch.equal(value.isnan(), expected.isnan()), (kind, q)  # inf − inf
            assert expected.isnan() or value == expected or (value - expected).abs() <= unit, (kind, q)


def test_quantile_strides_and_nan():
    x = noise(2, 3, 4, 5)
    expected = kernels.quantile(x, [0.3, 0.9])
    assert expected.shape == (2,) and kernels.quantile(x, 0.3).shape == ()
    for y in (x.to(memory_format=torch.channels_last), x.mT, torch.cat([x, x])[:2], x.flip(3)):
        assert torch.equal(kernels.quantile(y, [0.3, 0.9]), expected)
    for nan in (math.nan, -math.nan):
        assert kernels.quantile(torch.tensor([1.0, nan, math.inf], device=DEVICE), [0, 1]).isnan().all()


# ------------------------------------------------------------------------------------------------------ hard feature loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 7), (1, 17, 20, 9), *([(1, 384, 56, 56), (16, 384, 56, 56)] * GPU)])
@pytest.mark.parametrize("p_hard", [0, 0.5, 0.999, 1])
def test_hard_feature_loss(shape, p_hard, dtype):
    n, c, *size = shape
    teacher = noise(*shape, layout=torch.channels_last)
    both = noise(n + 1, c, *size, dtype=dtype, layout=FORMATS[n % 2]).requires_grad_()  # for odd n of the teacher's layout
    student = both[:n]
    loss = kernels.hard_feature_loss(teacher, student, p_hard)
    (3 * loss).backward()
    d = (teacher - student.detach().float()).square()
    ordered, position = d.flatten().sort().values, p_hard * (d.numel() - 1)
    low = math.floor(position)
    hard = d >= torch.lerp(ordered[low], ordered[min(low + 1, d.numel() - 1)], position - low)
    assert loss.dtype == torch.float32 and rms_error(loss, d.double()[hard].mean()) < 1e-6
    expected = torch.zeros_like(both, dtype=torch.float64)
    expected[:n] = torch.where(hard, 6 * (student.detach().double() - teacher.double()) / hard.sum(), 0)
    assert both.grad.dtype == dtype and rms_error(both.grad, expected) < BOUNDS[dtype]


# ---------------------------------------------------------------------------------------------------------------- dispatch


def samples():
    x = noise(2, 3, 6, 5)
    yield torch.ops.efficientad.conv_relu_pool, (x, noise(4, 3, 4, 4), noise(4), 3, 1)
    yield torch.ops.efficientad.distance_map, (x, noise(2, 3, 6, 5))
    yield torch.ops.efficientad.combined_map, (x, noise(2, 6, 6, 5), noise(2, 3, 6, 5), noise(2, 2), True)
    yield torch.ops.efficientad.quantile, (x, [0.1, 0.9])
    yield torch.ops.efficientad.hard_feature_loss, (x, noise(2, 3, 6, 5).requires_grad_(), 0.9)
    yield torch.ops.efficientad.hard_feature_loss_backward, (noise(1)[0], x, noise(2, 3, 6, 5), noise(1)[0].abs())


@pytest.mark.parametrize("i", range(6))
def test_operators(i):
    operator, arguments = list(samples())[i]
    torch.library.opcheck(operator.default, arguments)


def test_rule(monkeypatch):
    x = noise(2, 3)
    weight = noise(2, 3).requires_grad_()
    assert efficientad.use_kernels(x) and not efficientad.use_kernels(x, weight) and not efficientad.use_kernels(x.double())
    with torch.no_grad():
        assert efficientad.use_kernels(x, weight)

    class Quantile(torch.nn.Module):
        def forward(self, x):
            return efficientad.quantile(x, 0.5)

    graph = torch.export.export(Quantile(), (x,)).graph
    assert not any("efficientad" in str(node.target) for node in graph.nodes)
    monkeypatch.setattr(efficientad, "KERNELS", False)
    assert not efficientad.use_kernels(x)


@pytest.fixture
def few_programs(monkeypatch):
    """Larger blocks than a GPU's: the interpreter's time goes with the number of programs."""
    if not GPU:
        names = ("conv_relu_pool", "distance_map", "quantile", "hard_feature_loss")
        module = {name: sys.modules[f"kernels.{name}"] for name in names}
        monkeypatch.setitem(module["conv_relu_pool"].CONFIGS["first"], "BLOCK_P", 1024)
        monkeypatch.setitem(module["conv_relu_pool"].CONFIGS["second"], "BLOCK_P", 1024)
        monkeypatch.setitem(module["distance_map"].CONFIGS["channels first"], "BLOCK_C", 512)
        monkeypatch.setitem(module["distance_map"].CONFIGS["channels last"], "BLOCK_C", 512)
        monkeypatch.setitem(module["quantile"].CONFIG, "BLOCK", 65536)
        monkeypatch.setitem(module["hard_feature_loss"].CONFIG, "BLOCK", 65536)


@pytest.fixture
def called(monkeypatch):
    """The names of the kernels that efficientad.py calls, as it does."""
    names = []
    for name in ("combined_map", "conv_relu_pool", "distance_map", "hard_feature_loss_kernel", "quantile_kernel"):
        kernel = getattr(efficientad, name)
        monkeypatch.setattr(efficientad, name, lambda *a, kernel=kernel, name=name: (names.append(name), kernel(*a))[1])
    return names


def test_model_with_and_without_kernels(few_programs, called, monkeypatch):
    """The same model: raw maps, quantiles, map, score, loss and gradient differ by rounding and by no more."""
    model = efficientad.EfficientAD(image_size=(128, 128)).to(DEVICE).eval()
    images = torch.randint(256, (1, 3, 128, 128), dtype=torch.uint8, device=DEVICE)
    results = {}
    for on in (True, False):
        monkeypatch.setattr(efficientad, "KERNELS", on)
        called.clear()
        model.calibrate([images], 0.5, 0.9)
        with torch.no_grad():
            results[on] = [*model.raw_maps(images), model.quantiles.clone(), *model(images)]
        loss = model.losses(images, images, None, 0.9)["hard"]
        results[on] += torch.autograd.grad(loss, model.student[-1].weight) + (loss.detach(),)
        used = {"combined_map", "distance_map", "hard_feature_loss_kernel", "quantile_kernel"}
        assert set(called) == (used if on else set())
    for with_kernels, without in zip(results[True], results[False]):
        assert with_kernels.shape == without.shape
        assert rms_error(with_kernels, without) < 2e-5  # q_b − q_a is small beside q_a in an untrained model


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", ["small", *["medium"] * GPU])
def test_pdn_with_and_without_kernels(size, padding, dtype, called, monkeypatch):
    """Under autocast, and with weights of the half type; in float32 and with gradients the kernel is not called."""
    net, x = efficientad.PDN(size, padding=padding).to(DEVICE), noise(1, 3, *((10, 13) if padding else (34, 37)))
    expected = net(x)
    assert not called
    with torch.no_grad():
        with torch.autocast(DEVICE, dtype):
            outputs = [net(x)]
        outputs.append(net.to(dtype)(x.to(dtype)))
    assert called == ["conv_relu_pool"] * 4
    monkeypatch.setattr(efficientad, "KERNELS", False)
    with torch.no_grad():
        outputs.append(net(x.to(dtype)))
    assert len(called) == 4
    errors = [rms_error(y, expected) for y in outputs]  # without kernels the map before pooling is rounded too
    assert max(errors[:2]) < 1.1 * errors[2] < 5 * BOUNDS[dtype]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_cuda_graph():
    """The quantile and the loss in a CUDA graph: no host synchronization in them, and replays see new data."""
    teacher, student = noise(1, 384, 56, 56), noise(1, 384, 56, 56)
    kernels.hard_feature_loss(teacher, student)  # compiles
    kernels.quantile(student, [0.9, 0.995])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, loss = kernels.quantile(student, [0.9, 0.995]), kernels.hard_feature_loss(teacher, student)
    for _ in range(2):
        student.copy_(noise(1, 384, 56, 56) * 3)
        graph.replay()
        assert torch.equal(values, kernels.quantile(student, [0.9, 0.995]))
        assert torch.equal(loss, kernels.hard_feature_loss(teacher, student))


if GPU and not torch.cuda.is_available():
    sys.exit("kernel_checks.py needs TRITON_INTERPRET=1 or a GPU; run test_kernels.py")
