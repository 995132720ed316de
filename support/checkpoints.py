"""Model files read and written with care: whole or not at all, every failure one line."""

import contextlib
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from efficientad import PDN, ModelError


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element of any tensor is infinite or NaN; waits for the GPU once."""
    return bool(torch.stack([t.detach().isfinite().all() for t in tensors]).all())


TOO_LITTLE_MEMORY = "too little memory; take smaller images or batches, or another --device"


def out_of_memory(error: Exception) -> bool:
    """Whether an error, of torch or its libraries, says that memory is too small."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, MemoryError)


@contextlib.contextmanager
def filling(message: str) -> Iterator[None]:
    """Within, something is filled from a checkpoint: what a damaged or foreign one raises becomes a
    ModelError with this message."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise ModelError(message) from None


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """torch.save under a temporary name in the same folder, then rename: a reader never sees half a
    file, and what `path` held stays whole if this fails. Raises ModelError if it fails."""
    temporary, content = f"{path}.unfinished{os.getpid()}", io.BytesIO()
    torch.save(checkpoint, content)  # in memory: torch reports a full disk as a bug of its own
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # the name must not survive a power failure alone
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); what it held before is untouched"
        raise ModelError(f"{path}: {reason}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def is_url(path: str | Path | None) -> bool:
    return str(path).startswith(("https://", "http://"))


def fetch(url: str) -> Path:
    """The file behind a URL, in torch's cache. The hash is checked that torch.hub reads from a name
    such as resnet18-f37072fd.pth; a name without one gets the URL's own."""
    name = url.split("?")[0].rsplit("/", 1)[-1]
    hashed = re.search(r"-[0-9a-f]{8,}\.", name) is not None  # and teacher-2.pt is not
    if not hashed:  # two sites may call their files the same
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    if not file.exists():
        about = {"map_location": "cpu", "check_hash": hashed, "weights_only": True}
        torch.hub.load_state_dict_from_url(url, file_name=name, **about)
    return file


def check_sums(path: str | Path) -> None:
    """Raise BadZipFile if a part of the checkpoint differs from its check sum: torch.load does not
    look at it. Files of earlier kinds, without one, pass; those of torch's set_crc32_options(False)
    do not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                raise zipfile.BadZipFile(part)


def read_checkpoint(path: str | Path) -> dict:
    """A dict that torch.load(weights_only=True) reads, on the CPU, from a file or a URL. Raises
    ModelError otherwise."""
    file = path
    try:
        if is_url(path):
            file = fetch(str(path))
        check_sums(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        reason = f"cannot be read ({error.strerror or getattr(error, 'reason', error)})"
        remedy = "; fetch it on another machine and pass the file" if is_url(path) else ""
        raise ModelError(f"{path}: {reason}{remedy}") from None
    except Exception as error:  # torch.load raises many kinds for a foreign or damaged file
        if out_of_memory(error):
            raise
        reason = "not a readable checkpoint (damaged, or of another program)"
        raise ModelError(f"{file}: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise ModelError(f"{path}: not a checkpoint of this program")
    return checkpoint


def load_model(path: str | Path, *classes: type[nn.Module]) -> nn.Module:
    """The model in a file that `save` wrote, of that one of the classes whose format it has, on the
    CPU, in eval mode. Raises ModelError if it is missing, damaged, foreign or not finite."""
    checkpoint = read_checkpoint(path)
    by_format = {cls.format: cls for cls in classes}
    cls = by_format.get(str(checkpoint.get("format")))
    if cls is None:
        raise ModelError(
            f"{path}: not a model of this program; pass a model.pt that train.py wrote"
        )
    with filling(f"{path}: damaged model file; train again or restore it from a copy"):
        model = cls(**checkpoint["config"])
        model.load_state_dict(checkpoint["state"])
        model.training_info = dict(checkpoint["training"])
    if not all_finite(t for name, t in model.state_dict().items() if name != "threshold"):
        raise ModelError(f"{path}: holds a weight or statistic that is not a number; train again")
    if "usual" in model.training_info:  # the name that earlier versions gave it
        model.training_info["appearance"] = model.training_info.pop("usual")
    return model.eval()


def load_teacher(teacher: PDN, size: str, path: str | Path) -> None:
    """Load a teacher file into a PDN of this size: weights in fp16 or fp32, named "0.weight", … or,
    as other implementations do, "conv1.weight", …. Raises ModelError if it is missing, damaged,
    foreign, not finite or of the other size."""
    state = read_checkpoint(path)
    indices = [name.split(".")[0] for name in teacher.state_dict() if "weight" in name]
    layers = {f"conv{i}": index for i, index in enumerate(indices, 1)}
    renamed = {}
    for name, tensor in state.items():
        layer, _, rest = str(name).partition(".")
        renamed[f"{layers.get(layer, layer)}.{rest}"] = tensor
    remedy = f"pass one that `python -m tools.distill --size {size}` made"
    with filling(f"{path}: not a {size} teacher; {remedy}"):
        teacher.load_state_dict(renamed)
    if not all_finite(teacher.parameters()):
        raise ModelError(f"{path}: the teacher's weights are not finite; distil it again")
