"""What benchmark.py times against each other: ours, the plain implementation and other runtimes. Measures nothing."""

import copy
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efficientad
import train
from efficientad import EfficientAD, cpu_has_bf16


def half_type(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def in_half(model: nn.Module) -> nn.Module:
    """A copy whose networks have half-precision weights and get half-precision input: the usual implementation."""
    model = copy.deepcopy(model)
    dtype = half_type(next(model.parameters()).device)
    for network in model.children():
        network.to(dtype).register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
    return model


# Each makes from (model in fp32 on its device, images uint8 N×3×H×W on the CPU) a function images -> map N×1×H×W on the CPU.


def eager(model: nn.Module, images: Tensor) -> Callable:
    device = next(model.parameters()).device
    return lambda x: model(x.to(device))[0].cpu()


def compiled(model: nn.Module, images: Tensor) -> Callable:
    return eager(torch.compile(in_half(model).to(memory_format=torch.channels_last), mode="max-autotune"), images)


def onnx_runtime(model: nn.Module, images: Tensor) -> Callable:
    import onnxruntime

    device = next(model.parameters()).device
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ImportError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (images.to(device),), path, input_names=["images"], output_names=["map", "score"], verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    return lambda x: torch.from_numpy(session.run(["map"], {"images": x.numpy()})[0])


def openvino(model: nn.Module, images: Tensor) -> Callable:
    import openvino

    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ImportError("OpenVINO runs on CPUs")
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if cpu_has_bf16(device) else "f32", "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    network = openvino.compile_model(openvino.convert_model(model, example_input=images), "CPU", hints)
    return lambda x: torch.from_numpy(network(x.numpy())[0].copy())


def ours(model: nn.Module, images: Tensor) -> Callable:
    fast = model.optimize(batch_sizes=(len(images),))
    return lambda x: fast(x)[0].cpu()


ROWS = {  # name: (how, in half precision where the device has one, our kernels allowed)
    "eager fp32": (eager, False, False),
    "eager half": (lambda model, images: eager(in_half(model), images), True, False),
    "torch.compile max-autotune, half": (compiled, True, False),
    "ONNX Runtime fp32": (onnx_runtime, False, False),
    "OpenVINO half": (openvino, True, False),
    "ours": (ours, True, True),
}


def with_kernels(allowed: bool, function: Callable) -> Callable:
    """The function, which then runs with or without the Triton kernels."""

    def call(*arguments):
        before, efficientad.KERNELS = efficientad.KERNELS, allowed and efficientad.KERNELS
        try:
            return function(*arguments)
        finally:
            efficientad.KERNELS = before

    return call


def plain_step(model: EfficientAD, optimizer: torch.optim.Optimizer, half: bool, batch: dict[str, Tensor]) -> None:
    """A training step as the paper describes it, line by line; `batch` as `train.Step` takes it, without teacher outputs."""
    device, (gray, factor, kind) = model.threshold.device, batch["draws"].to(model.threshold.device)
    images, photos = batch["images"].to(device), batch["photos"].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        i, j = model.normalize(images), model.normalize(train.augment(images, factor, kind))
        teacher, teacher_j = model.teacher_features(i), model.teacher_features(j)
        student, student_j = model.student(i)[:, :384], model.student(j)[:, 384:]
        autoencoder, penalty = model.autoencoder(j), model.student(model.normalize(train.turn_gray(photos, gray)))[:, :384]
    d = (teacher.float() - student.float()).square()
    hard = d >= efficientad.quantile(d, 0.999)
    loss = d[hard].mean() + penalty.float().square().mean()
    loss = loss + F.mse_loss(autoencoder.float(), teacher_j.float()) + F.mse_loss(student_j.float(), autoencoder.float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
