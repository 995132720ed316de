"""support/fast.py and support/tiling.py: the same maps, sooner or in less memory; precision."""

import copy
from contextlib import contextmanager
from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO_SIZE, rms_ratio
from torch.utils._python_dispatch import TorchDispatchMode

import efficientad
import support.tiling
from efficientad import EfficientAD, ModelError
from support import fast_gpu
from support.fast import has_bf16, optimize
from support.graphs import BatchGraphs, Graphed, beside
from support.tiling import TiledEfficientAD

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()


@pytest.mark.parametrize(
    "size, padding, shared_stem, steps",
    [("small", False, True, 8), ("small", True, False, 0), ("medium", True, True, 0)],
)
def test_fast_form_computes_the_same(size, padding, shared_stem, steps, demo_images, trained):
    """In fp32 but for rounding; in bf16 within 5 % RMS, and scores in the same order wherever they
    differ by more."""
    model = trained(steps, size=size, padding=padding, shared_stem=shared_stem)
    x = demo_images[-7:] if steps else demo_images[-2:]
    with torch.inference_mode():
        expected, scores = model(x)
        plain_maps = model.maps(x[:1])
    exact = optimize(model, "fp32", batch_sizes=(2,))
    for batch in (x[:2], x[:1].clone(memory_format=torch.channels_last)):
        n = len(batch)  # the batch size that it was made for, and another
        anomaly_map, score = exact(batch)
        assert anomaly_map.shape == (n, 1, *DEMO_SIZE)
        assert anomaly_map.dtype == score.dtype == torch.float32
        assert rms_ratio(anomaly_map, expected[:n]) < 2e-5
        torch.testing.assert_close(score, scores[:n], rtol=1e-4, atol=1e-5)
    maps, predicted = exact.predict(x[:1])
    assert list(maps) == list(predicted) == list(plain_maps)
    for name, m in plain_maps.items():
        assert rms_ratio(maps[name], m) < 2e-5
        assert predicted[name].item() == pytest.approx(m.max().item(), rel=1e-4, abs=1e-5)

    half = optimize(model, "bf16")
    with torch.inference_mode():
        anomaly_map, score = half(x)
    assert rms_ratio(anomaly_map, expected) < 0.05 and half.threshold == model.threshold
    differ = (scores[:, None] - scores) > 0.05 * scores.std()
    assert bool((score[:, None] > score)[differ].all()) and (differ.any() or not steps)


@pytest.mark.parametrize(
    "size, padding, shared_stem",
    [
        ("small", False, False),
        ("small", False, True),
        ("small", True, False),
        ("medium", False, True),
    ],
)
def test_the_gpus_form_computes_the_same(size, padding, shared_stem, monkeypatch):
    """Teacher and student in one launch a layer, by kernels, without, and by some of both. On a CPU
    the kernels compute their references."""
    monkeypatch.setattr(fast_gpu, "serves", lambda device, dtype: True)
    monkeypatch.setattr(fast_gpu, "has_tma", lambda device: True)
    model = EfficientAD(size=size, padding=padding, shared_stem=shared_stem, image_size=DEMO_SIZE)
    model.teacher_std.uniform_(0.01, 0.02)
    model.eval()
    x = torch.randint(256, (1, 3, 128, 128), dtype=torch.uint8)
    fast = optimize(model, "bf16")
    assert fast.choice.startswith("no kernels; chosen in ")
    with torch.inference_mode():
        expected = [y.float() for y in model.features(x)]
        layers = [layer.kernel and layer.kernel.__name__ for layer in fast.pair.layers]
        pools, rows = ["relu_pool", "rows_pool"], ["rows", "rows"]
        if padding:
            assert layers == ["relu_pool", "relu_pool", None, "rows"]
        else:  # the last layer of M has no common width
            assert layers == pools + (["rows", *rows, None] if size == "medium" else rows)
        for some in (0, 1, 2, 3):
            chosen = [bool(i % 2) if some > 1 else bool(some) for i in range(len(layers))]
            chosen = [c != (some == 3) and k is not None for c, k in zip(chosen, layers)]
            fast.pair.with_kernels[1] = chosen
            for y, plain in zip(fast.features(x), expected, strict=True):
                assert rms_ratio(y.float(), plain) < 0.03, chosen


def test_the_gpus_form_takes_what_is_faster(monkeypatch):
    """Each layer's kernel against cuDNN, and the mixture against either alone."""
    monkeypatch.setattr(fast_gpu, "serves", lambda device, dtype: True)
    monkeypatch.setattr(fast_gpu, "has_tma", lambda device: True)
    pair = optimize(EfficientAD(image_size=DEMO_SIZE).eval(), "bf16", ()).pair
    monkeypatch.setattr(fast_gpu, "use_kernels", lambda *tensors: True)
    x = torch.zeros(1, 4, 128, 128, dtype=torch.bfloat16)

    def choose(*times: float) -> tuple[list[bool], str]:
        clock = iter(times)
        choice = pair.choose(x, lambda function: next(clock))
        assert next(clock, None) is None
        return pair.with_kernels[1], choice

    inf = float("inf")
    layers = (2, 1, 2, 1, 1, 2, inf, 3)  # cuDNN, kernel of each
    for totals, expected in (((7, 5, 6), [1, 1, 0, 1]), ((7, 5, 4), [1] * 4), ((4, 5, 6), [0] * 4)):
        chosen, words = choose(*layers, *totals)
        assert chosen == [bool(e) for e in expected]
        assert words.startswith("batch 1: ")
        assert f"{min(totals):.3f} ms, cuDNN alone {totals[0]:.3f}" in words
    assert choose(*[inf] * 11)[0] == [False] * 4  # nothing can be measured
    right = pair.layers[1].rows_pool
    monkeypatch.setattr(pair.layers[1], "kernel", wraps(right)(lambda x: 0 * right(x)))
    with pytest.warns(UserWarning, match="cuDNN instead of kernel .*off by"):  # a compiler's fault
        assert choose(2, 1, 2, 2, 1, 2, 1, 4, 3, 3)[0] == [True, False, True, True]
    monkeypatch.setenv("EFFICIENTAD_KERNELS", "1")
    assert choose()[0] == [True] * 4
    monkeypatch.setattr(fast_gpu, "use_kernels", lambda *tensors: False)
    assert choose() == ([False] * 4, "no kernels")


def test_cudnn_fuses_relu_where_it_is_right_and_faster(monkeypatch):
    """Stand-ins for cuDNN's convolutions with ReLU: right, wrong, reading stale memory, missing."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU())
    x = torch.rand(1, 4, 5, 5)
    expected = network(x)
    fast_gpu.join_relu(network)

    def plain(x, weight, bias, *arguments):
        return F.conv2d(x, weight, bias, *arguments).relu()

    def wrong(*arguments):
        return plain(*arguments) * 1.02

    def clean(x, weight, z, alpha, bias, *arguments):
        return plain(x, weight, bias, *arguments)

    def stale(x, weight, z, alpha, bias, *arguments):
        return plain(x, weight, bias, *arguments) + alpha * z

    def missing(*_):
        raise RuntimeError("no engine")

    cases = (plain, clean, 1, True), (plain, clean, 3, False), (wrong, clean, 1, False)
    cases += (plain, stale, 1, False), (missing, clean, 1, False)
    for relu, add_relu, after, fused in cases:
        monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
        clock = iter((2, after))
        told = fast_gpu.fuse_if_faster(network, lambda: network(x), lambda call: next(clock))
        right = (relu, add_relu) == (plain, clean)
        assert told == f"cuDNN can fuse {int(right)} ReLUs: 2.000 -> {after}.000 ms"
        assert network[0].fused == fused
        torch.testing.assert_close(network(x), expected)
    network[0].fused = True
    torch.testing.assert_close(network(x), expected)  # it cannot for this many images


def test_fast_form_leaves_the_model_alone_and_refuses_what_it_cannot_do(demo_images, trained):
    model = trained(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = optimize(model)
    assert fast.precision == ("bf16" if has_bf16(CPU) else "fp32")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    image = demo_images[:1]
    fast.train()
    assert torch.equal(fast(image)[0], fast(image)[0])  # no dropout, whatever the mode
    with pytest.raises(TypeError, match="uint8"):
        fast(image.float())
    with pytest.raises(ValueError, match="N×3×128×128"):
        fast(image[:, :, :96])
    moves = (lambda _: fast.save("m.pt"), lambda _: copy.deepcopy(fast), lambda _: fast.to("meta"))
    for forbidden in (fast.losses, fast.calibrate, *moves):
        with pytest.raises(TypeError, match="for inference"):
            forbidden(image)
    with pytest.raises(ValueError, match="'int4'"):
        optimize(model, "int4")
    model.teacher[0].weight.data *= 1e9
    with pytest.raises(ModelError, match="beyond fp16"):
        optimize(model, "fp16")


def test_a_capture_that_fails_leaves_ordinary_calls(monkeypatch):
    """Without a GPU: torch's graph objects are stood in for. Its own context, left by an error,
    neither restores the stream nor ends the allocation for the graph."""
    current, ended = ["caller's"], []

    class Failing:
        def __enter__(self):
            current[0] = "capture"

        def __exit__(self, *_):
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextmanager
    def stream(name: str):
        try:
            yield
        finally:
            current[0] = name

    stand_ins = {"CUDAGraph": object, "graph_pool_handle": lambda: "pool", "stream": stream}
    stand_ins |= {"graph": lambda *_, **__: Failing(), "current_device": lambda: 0}
    for name, stand_in in (stand_ins | {"current_stream": lambda: current[0]}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        end = partial(lambda *about: ended.append(about), name)
        monkeypatch.setattr(torch._C, name, end, raising=False)
    graphed = Graphed(lambda: 7, CPU)
    graphed.stream = object()
    with pytest.warns(UserWarning, match="no CUDA graph"):
        graphed.capture()
    assert graphed.graph is None and graphed() == 7
    assert current == ["caller's"] and [name[6:9] for name, *_ in ended] == ["end", "rel"]


def test_work_beside_each_other_is_forked_and_joined(monkeypatch):
    """A graph keeps the waits: the side stream begins behind the current one, which then waits."""
    calls = []
    current, side = (SimpleNamespace(device=CPU, name=name) for name in ("current", "side"))

    def wait(stream, other):
        calls.append(f"{stream.name} waits for {other.name}")

    for stream in (current, side):
        stream.wait_stream = partial(wait, stream)

    @contextmanager
    def within(stream):
        calls.append(f"begin {stream.name}")
        yield
        calls.append(f"end {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", within)
    first, second = (lambda: calls.append("first") or 1), (lambda: calls.append("second") or 2)
    assert beside(first, second, side) == (1, 2) == beside(first, second, None)
    order = ["side waits for current", "begin side", "second", "end side", "first"]
    assert calls == [*order, "current waits for side", "first", "second"]


class Recorder:
    """Stands in for streams, events and tensors of a GPU: notes what is called of it."""

    dtype, shape, device, is_cuda = torch.uint8, (1, 3, 4, 4), CPU, False

    def __init__(self, name: str, calls: list, pinned: bool = False):
        self.name, self.calls, self.is_pinned = name, calls, lambda: pinned

    def __len__(self) -> int:
        return 1

    def __getattr__(self, method: str):
        def call(*_, **options):
            self.calls.append((self.name, method, *options.values()))
            return self

        return call


def test_autocast_of_the_caller_does_not_reach_a_fast_form():
    passes = BatchGraphs(lambda images: images.float() @ torch.ones(4, 4), (4, 4), CPU, ())
    with torch.autocast("cpu", torch.bfloat16):
        assert passes(torch.ones(1, 3, 4, 4, dtype=torch.uint8)).dtype == torch.float32


@pytest.mark.parametrize("pinned", [False, True])
def test_graph_calls_take_turns_and_leave_the_callers_memory(pinned, monkeypatch):
    """A caller may refill its own pinned memory when the call returns: it is not copied later."""
    calls = []
    names = "stream", "buffer", "result", "copied"
    stream, buffer, result, copied = (Recorder(name, calls) for name in names)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    passes = BatchGraphs(None, (4, 4), CPU, ())
    passes.done, passes.copied = Recorder("done", calls), copied

    def graph() -> tuple:
        assert passes.turn.locked()
        calls.append(("graph",))
        return result, result

    passes.graphs[1] = buffer, graph
    passes(Recorder("images", calls, pinned))
    assert (("images", "pin_memory") in calls) == (not pinned)
    order = [("stream", "wait_event"), ("buffer", "copy_", True), ("copied", "record"), ("graph",)]
    order += [("result", "clone"), ("result", "clone"), ("done", "record")]
    order += [("copied", "synchronize")] * pinned
    assert [call for call in calls if call[0] != "images"] == order and not passes.turn.locked()
    passes.graphs, calls[:] = {}, []  # of another batch size
    passes.function = lambda images: calls.append(("pass", passes.turn.locked()))
    passes(Recorder("images", calls))
    order = [("stream", "wait_event"), ("images", "to"), ("pass", True), ("done", "record")]
    assert calls == order


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kernels", ["0", "1", "auto"])
@pytest.mark.parametrize(
    "size, padding, shared_stem",
    [("small", False, True), ("small", True, False), ("medium", False, False)],
)
def test_cuda_graphs_compute_what_eager_calls_do(
    size, padding, shared_stem, kernels, demo_images, trained, monkeypatch
):
    """Without, with every, and with the faster kernels."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # TF32 is as coarse as fp16
    monkeypatch.setenv("EFFICIENTAD_KERNELS", kernels)
    monkeypatch.setattr(efficientad, "KERNELS", kernels != "0")
    model = trained(4, size=size, padding=padding, shared_stem=shared_stem).cuda()
    with torch.inference_mode():
        expected, _ = model(demo_images[:3].cuda())
        raw = [m[:1] for m in model.maps(demo_images[:3].cuda()).values()]
    fast = optimize(model, batch_sizes=(1, 2))
    for n in (1, 2, 3, 1):
        images = demo_images[:n]
        assert rms_ratio(fast(images)[0], expected[:n]) < 0.01  # fp16, through pinned memory
        assert torch.equal(fast(images)[0], fast(images.cuda())[0])
    for m, plain in zip(fast.predict(demo_images[:1])[0].values(), raw):
        assert rms_ratio(m, plain) < 0.02
    for passes, sizes in ((fast.passes, (1, 2)), (fast.predictions, (1, 2))):
        assert all(passes.graphs[n][1].graph for n in sizes)  # captured


# ------------------------------------------------------------------------------------ precision


def differences(a: EfficientAD, b: EfficientAD, half: bool = False) -> list[float]:
    """Of losses and raw maps, between devices or (with half) between autocast and float32."""
    images, results = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), []
    for model, enabled in ((a, half), (b, False)):
        device = model.threshold.device.type
        x = images.to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=enabled):
            values = [*model.losses(x, x, x).values(), *model.raw_maps(x)]
        results.append([v.float().cpu() for v in values])
    return [((x - y).norm() / y.norm()).item() for x, y in zip(*results)]


def test_half_precision_stays_close(model):
    assert 0 < max(differences(model, model, half=True)) < 0.02


@pytest.mark.skipif(not GPU, reason="compares CPU and GPU: there is no GPU")
def test_gpu_stays_close(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gpu = EfficientAD(image_size=DEMO_SIZE)
    gpu.load_state_dict(model.state_dict())
    gpu = gpu.eval().cuda()
    assert max(differences(gpu, model)) < 1e-4
    assert max(differences(gpu, model, half=True)) < 0.02
    monkeypatch.setattr(efficientad, "KERNELS", False)
    assert max(differences(gpu, model)) < 1e-4


# --------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize(
    "size, padding, n", [("small", False, 3), ("small", True, 1), ("medium", True, 1)]
)
def test_strips_have_no_seams(size, padding, n, monkeypatch):
    """Large batches are divided, large images computed strip by strip: the same maps from smaller
    tensors."""
    config = {"size": size, "padding": padding, "shared_stem": size == "small"}
    plain = EfficientAD(image_size=(192, 128), **config).eval()
    model = TiledEfficientAD(**plain.config).eval()
    model.load_state_dict(plain.state_dict())
    images = torch.randint(0, 256, (n, 3, 192, 128), dtype=torch.uint8)
    with torch.no_grad(), Largest() as whole:
        expected = plain.raw_maps(images)
    cases = (model.activation // 3, 0.9 / n), (2 * model.activation, 0.7)
    for tile, bound in cases if n > 2 else cases[:1]:
        monkeypatch.setattr(support.tiling, "TILE", tile)
        with torch.no_grad(), Largest() as parts:
            found = model.raw_maps(images)
        assert parts.elements < bound * whole.elements
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not model.oversized(images)  # with gradient nothing is divided


def test_large_images_do_not_take_more_memory_to_optimize(monkeypatch):
    """oneDNN orders a PDN's weights for a strip of the image."""
    model, shapes = TiledEfficientAD(image_size=(192, 128)).eval(), []
    monkeypatch.setattr(support.tiling, "TILE", model.activation // 3)
    monkeypatch.setattr("support.fast.fuse_relu", lambda _, x: shapes.append(x.shape))
    optimize(model, "fp32")
    assert shapes == [(1, 3, 192, 128), (1, 3, 64, 128), (1, 3, 64, 128)]
