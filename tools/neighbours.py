"""How well a teacher's features alone tell defects: image AU-ROC of nearest neighbours.

    python -m tools.neighbours --data mvtec/bottle mvtec/screw
    python -m tools.neighbours --size medium --teacher teacher_medium.pt --data mvtec/bottle

12,000 random vectors of 120 training images at 256² are kept, channels standardized. An image's
score is the largest distance of its positions to the nearest of them. A PDN's 56² positions are
averaged two by two before: on the finer grid chance decides more than the features do.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from efficientad import EfficientAD
from support.checkpoints import load_teacher
from support.data import open_category
from support.fast import has_bf16
from support.images import DataError
from support.metrics import image_auroc
from support.options import OptionError, option, parse_options, pick_device
from support.report import table
from support.runs import run_command
from support.scoring import read

USAGE = "python -m tools.neighbours --data DIR [DIR ...] [options]"
IMAGES, VECTORS = 120, 12000


@dataclass
class Options:
    """Judge a teacher by nearest neighbours of its features, without training."""

    data: list[str] = option([], "categories with test images", metavar="DIR", required=True)
    size: str = option("small", "size of the teacher", choices=["small", "medium"])
    teacher: str | None = option(None, "default weights/teacher_SIZE.pt", metavar="FILE")
    seeds: int = option(3, "random choices of images and vectors")
    device: str | None = option(None, "cuda or cpu; default cuda if there is one")

    def __post_init__(self) -> None:
        self.device = str(pick_device(self.device))
        weights = Path(__file__).parent.parent / "weights"
        self.teacher = self.teacher or str(weights / f"teacher_{self.size}.pt")
        if self.seeds < 1:
            raise OptionError("--seeds must be at least 1")


def features_of(model: EfficientAD, paths: list[Path]) -> list[Tensor]:
    """The teacher's output for each image, 28·28×384."""
    device, found = model.threshold.device, []
    for path in tqdm(paths, f"{paths[0].parent.name} images", unit="image"):
        x = read(path, model.image_size)[1].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            output = model.teacher(model.normalize(x))
        found.append(F.avg_pool2d(output.float(), 2)[0].flatten(1).T)
    return found


def scores_of(test: list[Tensor], train: list[Tensor], seed: int) -> np.ndarray:
    """An image's score is its largest distance to the vectors that the seed chooses."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(train))[:IMAGES]
    vectors = torch.cat([train[i] for i in chosen])
    vectors = vectors[torch.from_numpy(rng.permutation(len(vectors))[:VECTORS])]
    std, mean = torch.std_mean(vectors, 0)
    vectors = (vectors - mean) / std
    distances = (torch.cdist((x - mean) / std, vectors).amin(1).max().item() for x in test)
    return np.fromiter(distances, float)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, USAGE, argv)
    categories = [open_category(data) for data in options.data]
    model = EfficientAD(size=options.size)
    load_teacher(model.teacher, options.size, options.teacher)
    model.to(options.device, memory_format=torch.channels_last)
    rows = [["category", "image AU-ROC, %", *(f"seed {i}" for i in range(options.seeds))]]
    for category in categories:
        good = np.array([sample.defect == "good" for sample in category.test])
        if good.all() or not good.any():
            raise DataError(f"{category.root}: needs good and defective test images")
        train = features_of(model, category.train)
        test = features_of(model, [sample.path for sample in category.test])
        scores = [scores_of(test, train, seed) for seed in range(options.seeds)]
        values = [100 * image_auroc(s[good], s[~good]) for s in scores]
        rows.append([category.name, *(f"{value:.1f}" for value in (np.mean(values), *values))])
    print(table(rows))


if __name__ == "__main__":
    run_command(main, "tools.neighbours")
