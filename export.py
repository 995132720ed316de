"""A trained model for use without this program: ONNX (ONNX Runtime, OpenVINO, TensorRT) or torch.export's .pt2.

Input "images": uint8 N×H×W×3, RGB, any N, of the model's image size; that is how Pillow and cameras give them (OpenCV: BGR).
Outputs "map": float32 N×1×H×W, and "score": float32 N (EfficientAD: the map's maximum). Metadata, as strings: threshold, height,
width, and as JSON config and training.
"""

import io
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from efficientad import ModelError
from runs import write


class Exported(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(images.permute(0, 3, 1, 2))


def metadata(model: nn.Module) -> dict[str, str]:
    height, width = model.image_size
    return {
        "threshold": repr(model.threshold.item()),
        "height": str(height),
        "width": str(width),
        "config": json.dumps(model.config),
        "training": json.dumps(model.training_info),
    }


@torch.no_grad()
def export(model: nn.Module, path: Path) -> None:
    """Write the model to `path`, under a temporary name first. Raises ModelError for another ending than .onnx or .pt2, if there is
    no such folder, or if a package is missing."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ModelError(f"{path}: --export writes .onnx or .pt2")
    if not path.parent.is_dir() or path.is_dir():
        raise ModelError(f"{path}: " + ("is a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401 - torch.onnx needs both
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ModelError(f"{path}: needs one more package ({error.name}): pip install onnx onnxscript") from None
    height, width = model.image_size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)  # two: torch.export would take a one for a constant
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Exported(model.float().cpu().eval()), (example,), dynamic_shapes=shapes)
    if path.suffix == ".pt2":
        buffer = io.BytesIO()  # torch reports a full disk by ending the process
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata(model))})
        write(path, buffer.getvalue())
    else:
        write(path, _onnx(program, metadata(model)))
    print(f"wrote {path}: uint8 images N×{height}×{width}×3 -> map N×1×{height}×{width}, score N; threshold"
          f" {model.threshold:.4f} in its metadata")  # fmt: skip


def _onnx(program: torch.export.ExportedProgram, entries: dict[str, str]) -> bytes:
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.onnx.export(program, output_names=["map", "score"], dynamo=True, verbose=False).model_proto
    for key, value in entries.items():
        content.metadata_props.add(key=key, value=value)
    return content.SerializeToString()
