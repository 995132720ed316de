"""What tools.benchmark times against each other: ours, plain torch and other runtimes."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import efficientad
import kernels
from efficientad import EfficientAD
from kernels.conv_relu_pool import reference as conv_relu_pool_reference
from kernels.conv_rows import pool_reference
from kernels.conv_rows import reference as rows_reference
from kernels.distance_map import combined_map_reference, distance_map_reference
from kernels.runtime import has_tma
from support import int8
from support.fast import has_bf16, optimize
from support.optimizers import make_adam
from support.training import Step, augment, draw, teacher_outputs, turn_gray
from train import losses_of


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, or in a function that it decorates, no Triton kernel runs."""
    before, efficientad.KERNELS = efficientad.KERNELS, False
    try:
        yield
    finally:
        efficientad.KERNELS = before


def in_half(model: nn.Module) -> nn.Module:
    """A copy whose networks have half-precision weights and input, as one usually does it."""
    model = copy.deepcopy(model)
    dtype = torch.float16 if model.threshold.is_cuda else torch.bfloat16
    for network in model.children():
        layers = [m for m in network.to(dtype).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for part in (network, *layers[:1]):  # a shared stem is called by itself
            part.register_forward_pre_hook(
                lambda _, xs: tuple(x if x is None else x.to(dtype) for x in xs)
            )
    return model


# ------------------------------------------------------------------------------------- inference
# Each takes a model, fp32 on its device, and images, uint8 N×3×H×W on the CPU. It returns a
# function: images -> anomaly map N×1×H×W on the CPU.


def eager(model: nn.Module, images: Tensor) -> Callable:
    return without_kernels()(lambda x: model(x.to(model.threshold.device))[0].cpu())


def compiled(model: nn.Module, images: Tensor) -> Callable:
    model = in_half(model).to(memory_format=torch.channels_last)
    return eager(torch.compile(model, mode="max-autotune"), images)


def onnx_runtime(model: nn.Module, images: Tensor, int8: bool = False) -> Callable:
    """With `int8` convolutions are quantized by onnxruntime, the rest stays in float."""
    import onnxruntime

    provider = "CUDAExecutionProvider" if model.threshold.is_cuda else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ImportError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # else its threads would spin on, in the time of the row behind it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (images.to(model.threshold.device),), path, verbose=False)
        if int8:
            path = quantized_onnx(path, images)
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def quantized_onnx(path: str, images: Tensor) -> str:
    """Write an ONNX file with int8 convolutions beside another one; its path."""
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    once = iter([{"images": images.numpy()}])
    reader = SimpleNamespace(get_next=lambda: next(once, None))
    quant_pre_process(path, f"{path}.folded")
    convolutions = {"op_types_to_quantize": ["Conv", "Relu"], "per_channel": True}
    quantize_static(f"{path}.folded", f"{path}.int8", reader, **convolutions)
    return f"{path}.int8"


def openvino(model: nn.Module, images: Tensor, int8: bool = False) -> Callable:
    """With `int8` quantized by NNCF, in docs/export.md's way: what follows the networks stays in
    float."""
    import openvino

    if model.threshold.is_cuda:
        raise ImportError("OpenVINO runs on CPUs")
    network = openvino.convert_model(model, example_input=images)
    if int8:
        import nncf

        tail = ["Subtract", "Power", "ReduceMean", "Interpolate"]
        tail = nncf.IgnoredScope(types=tail, validate=False)
        network = nncf.quantize(network, nncf.Dataset([images.numpy()]), ignored_scope=tail)
    precision = "bf16" if has_bf16(images.device) else "f32"
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    network = openvino.compile_model(network, "CPU", hints)
    return lambda x: torch.from_numpy(network(x.numpy())[0].copy())


def ours_int8(model: nn.Module, images: Tensor) -> Callable:
    if not isinstance(model, EfficientAD):
        raise ImportError("int8 is for EfficientAD")
    model = copy.deepcopy(model)
    model.training_info["int8"] = info = {}  # no quantiles: the map on the model's own scale
    if reason := int8.problem(model):
        raise ImportError(reason)
    info["maxima"] = int8.measure_maxima(model, [images])
    fast = optimize(model, "int8", (len(images),))
    return lambda x: fast(x)[0].cpu()


def ours(model: nn.Module, images: Tensor) -> Callable:
    make = optimize if isinstance(model, EfficientAD) else type(model).optimize
    fast = make(model, batch_sizes=(len(images),))

    def function(x: Tensor) -> Tensor:
        return fast(x)[0].cpu()

    function.choice = getattr(fast, "choice", "")
    return function


# A row's ceiling, measured in the same run; half precision where the device has it.
FP32, HALF = "matrix product in fp32, TFLOP/s", "matrix product in half precision, TFLOP/s"
ROWS = {
    "eager fp32": (eager, FP32),
    "eager half": (lambda model, images: eager(in_half(model), images), HALF),
    "torch.compile max-autotune, half": (compiled, HALF),
    "ONNX Runtime fp32": (onnx_runtime, FP32),
    "OpenVINO half": (openvino, HALF),
    "ONNX Runtime int8": (partial(onnx_runtime, int8=True), HALF),
    "OpenVINO int8": (partial(openvino, int8=True), HALF),
    "ours": (ours, HALF),
    "ours int8": (ours_int8, HALF),
}

# -------------------------------------------------------------------------------------- training
# Each takes a model that it may train, the precision, images and photos, uint8 1×3×H×W on the CPU.
# It returns a function that takes a step and waits for a loss.


def plain_step(model: EfficientAD, precision: str, images: Tensor, photos: Tensor) -> Callable:
    """The paper's losses and torch's Adam, eager."""
    device, learned = model.threshold.device, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=1e-4, weight_decay=1e-5)

    @without_kernels()
    def step() -> None:
        gray, factor, kind = draw(1).to(device)
        i, p = images.to(device), turn_gray(photos.to(device), gray)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = sum(model.losses(i, augment(i, factor, kind), p).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def our_step(model: EfficientAD, precision: str, images: Tensor, photos: Tensor) -> Callable:
    """train.py's, with the training images and the teacher's outputs for them on the device."""
    device, learned = model.threshold.device, [p for p in model.parameters() if p.requires_grad]
    images, model = images.to(device), model.to(memory_format=torch.channels_last)
    teacher = teacher_outputs(model, [images], precision)
    optimizer = make_adam([{"params": learned, "lr": 1e-4}], device)
    take_step = Step(partial(losses_of, model=model, p_hard=0.999), [optimizer], device, precision)
    batch = {"images": images, "photos": photos, "teacher": teacher}
    return lambda: take_step({**batch, "draws": draw(1)})["hard"].item()


# --------------------------------------------------------------------------------------- kernels


def sort_quantile(x: Tensor, q: float) -> Tensor:
    """By sorting: torch.quantile takes 2²⁴ elements at most."""
    x, position = x.flatten().sort().values, q * (x.numel() - 1)
    return torch.lerp(x[int(position)], x[int(position) + 1], position % 1)


def plain_hard_loss(teacher: Tensor, student: Tensor, p_hard: float) -> Tensor:
    d = (teacher - student).square()
    hard = d >= sort_quantile(d.detach(), p_hard)
    return (d * hard).sum() / hard.sum()


def row_cases(random: Callable, batch: int, side: int, size: str, width: int) -> Iterator[tuple]:
    """Teacher and student in one launch: stage 2, the 3×3 and the last 4×4 convolution."""
    x, h = random(batch, width, side // 2 - 2, side // 2 - 2), side // 4 - 3
    arguments = x, random(2 * width, width // 2, 4, 4), random(2 * width), width
    yield f"conv_rows_pool {size} stage 2", kernels.conv_rows_pool, pool_reference, arguments
    x, weight = random(batch, 2 * width, h, h), random(2 * width, width, 3, 3)
    arguments = x, weight, random(2 * width), width, True
    yield f"conv_rows {size} 3×3", kernels.conv_rows, rows_reference, arguments
    x, weight = random(batch, 2 * width, h - 2, h - 2), random(1152, width, 4, 4)
    arguments = x, weight, random(1152), 384, False
    yield f"conv_rows {size} 4×4", kernels.conv_rows, rows_reference, arguments


def kernel_cases(batch: int, side: int, device: torch.device) -> Iterator[tuple]:
    """(name, kernel, the same in plain torch, their arguments) at the sizes of EfficientAD-S and -M
    for images of `side`²; features are channels last."""

    def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        x = torch.randn(shape, dtype=dtype, device=device)
        return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x

    for size, width in (("S", 128), ("M", 256)):
        for stage, c, o, s in ((1, 4, width, side), (2, width, 2 * width, (side - 3) // 2)):
            arguments = random(batch, c, s, s), random(o, c, 4, 4), random(o), 0, 0, 0
            name = f"conv_relu_pool {size} stage {stage}"
            yield name, kernels.conv_relu_pool, conv_relu_pool_reference, arguments
        if has_tma(device) or device.type == "cpu":
            yield from row_cases(random, batch, side, size, 2 * width)
    h, quantiles = side // 4 - 8, torch.tensor([[1.0, 2.0], [1.0, 2.0]], device=device)
    teacher, student, autoencoder = (random(batch, c, h, h) for c in (384, 768, 384))
    arguments = teacher, student[:, :384]
    yield "distance_map", kernels.distance_map, distance_map_reference, arguments
    arguments = teacher, student, autoencoder, quantiles
    yield "combined_map", kernels.combined_map, combined_map_reference, arguments
    teacher, student = (random(batch, 384, h, h, dtype=torch.float32) for _ in range(2))
    yield "quantile", kernels.quantile, sort_quantile, (teacher, 0.999)
    arguments = teacher, student.requires_grad_(), 0.999
    yield "hard loss + gradient", kernels.hard_feature_loss, plain_hard_loss, arguments
