"""Write a trained model as ONNX or torch.export's .pt2, for use without this program.

python -m tools.export --run runs/bottle-small model.onnx    # see docs/export.md
"""

import argparse
import importlib.util
import io
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from efficientad import ModelError
from evaluate import load_run
from support.runs import find_run, run_command, write


class Exported(nn.Module):
    """A model for uint8 images N×H×W×3."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(images.permute(0, 3, 1, 2))


def metadata(model: nn.Module) -> dict[str, str]:
    """JSON values by name, as docs/export.md lists them; of paths the names alone."""
    height, width = model.image_size
    info = {k: Path(v).name if isinstance(v, str) else v for k, v in model.training_info.items()}
    info.pop("int8", None)  # for this program's own fast form
    info["skipped_images"] = len(info.get("skipped_images", []))  # the messages name paths
    values = {"threshold": model.threshold.item(), "height": height, "width": width}
    values |= {"config": model.config, "training": info}
    return {name: json.dumps(value) for name, value in values.items()}


@torch.no_grad()
def export(model: nn.Module, path: Path) -> None:
    """Write the model to `path`, under a temporary name first. Raises ModelError for another ending
    than .onnx or .pt2, if there is no such folder, or if a package is missing."""
    if path.suffix not in (".onnx", ".pt2") or path.is_dir() or not path.parent.is_dir():
        raise ModelError(f"{path}: name a file in an existing folder that ends in .onnx or .pt2")
    needed = ("onnx", "onnxscript") if path.suffix == ".onnx" else ()
    if any(importlib.util.find_spec(package) is None for package in needed):
        raise ModelError(f"{path}: needs more packages: pip install onnx onnxscript")
    height, width = model.image_size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)  # of one: it would be a constant
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    network = Exported(model.float().cpu().eval())
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's files
    if path.suffix == ".onnx":
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            exported = torch.onnx.export(program, output_names=["map", "score"], verbose=False)
        exported.model.metadata_props.update(metadata(model))
        content = exported.model_proto.SerializeToString()
    else:
        buffer = io.BytesIO()  # torch reports a full disk by ending the process
        files = {"metadata.json": json.dumps(metadata(model))}
        torch.export.save(program, buffer, extra_files=files)
        content = buffer.getvalue()
    write(path, content)
    sizes = f"uint8 images N×{height}×{width}×3 -> map N×1×{height}×{width}, score N"
    print(f"wrote {path}: {sizes}; threshold {model.threshold:.4f} in its metadata")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("tools.export", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", type=Path, help="FILE.onnx or FILE.pt2")
    parser.add_argument("--run", metavar="DIR", help="default the newest in runs/")
    options = parser.parse_args(argv)
    export(load_run(find_run(options.run), "cpu"), options.file)


if __name__ == "__main__":
    run_command(main, "tools.export")
