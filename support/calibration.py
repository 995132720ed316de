"""Map normalization and threshold of a trained model, from normal images held out of training."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from efficientad import EfficientAD
from support import int8
from support.fast import FastEfficientAD
from support.tiling import TiledEfficientAD
from support.training import one_by_one


def fit_gaussian(model: EfficientAD, raw: list) -> Tensor:
    """The ablation's baseline in place of `EfficientAD.fit_normalization`: mean 0 and variance 1
    over all pixels of all `raw_maps`, the same linear map with q_a = μ and q_b = μ + 0.1·σ. Returns
    the images' scores."""
    quantiles = []
    for maps in zip(*raw):
        pixels = torch.cat(maps).double()
        mean, std = pixels.mean(), pixels.std(correction=0)
        quantiles.append([mean, mean + 0.1 * std])
    return model.set_quantiles(raw, quantiles)


@torch.no_grad()
def calibrate(
    model: nn.Module, images: Sequence, normalization="quantile", a=0.9, b=0.995
) -> list[float]:
    """Set a model's threshold from normal images, uint8 3×H×W by index; of an EfficientAD first its
    map normalization (section 3.4; "gaussian": `fit_gaussian`). With quantiles it is then
    calibrated for int8 too, on the CPU, where it is left. Returns the images' scores, which are
    kept in its training_info too, sorted."""
    batches = one_by_one(images, model.threshold.device, "calibration")
    quantiles = isinstance(model, EfficientAD) and normalization == "quantile"
    if normalization == "gaussian":
        model.eval()
        scores = fit_gaussian(model, [model.raw_maps(x) for x in batches])
    else:
        scores = model.calibrate(batches, a, b) if quantiles else model.calibrate(batches)
    model.training_info["scores"] = sorted(scores.tolist())
    if quantiles:
        calibrate_int8(model.cpu(), one_by_one(images, torch.device("cpu"), "int8"), a, b)
    return scores.tolist()


@torch.no_grad()
def calibrate_int8(model: EfficientAD, batches: Iterable[Tensor], a=0.9, b=0.995) -> None:
    """What int8 needs, from normal images held out of training, uint8 N×3×H×W, into the model's
    training_info: ranges of the activations, and quantiles, scores and threshold measured in int8,
    whose noise lifts the maps. It is taken out where int8 cannot run, or for images beyond TILE.
    Switches to eval mode."""
    model.eval().training_info["int8"] = {}  # `problem` wants it
    batches = [] if int8.problem(model) else [x for batch in batches for x in batch.split(1)]
    del model.training_info["int8"]
    tiled = isinstance(model, TiledEfficientAD)
    if not batches or (tiled and model.oversized(batches[0])):
        return
    info = {"maxima": int8.measure_maxima(model, batches)}
    model.training_info["int8"] = info
    fast = FastEfficientAD(model, "int8", ())
    if fast.dtype != torch.bfloat16:  # here the autoencoder is not in int8: nowhere then
        del info["maxima"]["autoencoder"]
    scores = fast.fit_normalization([fast.raw_maps(x) for x in batches], a, b)
    info |= {"quantiles": fast.quantiles.tolist(), "scores": sorted(scores.tolist())}
    info["threshold"] = fast.threshold.item()
