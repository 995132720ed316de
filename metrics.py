"""Evaluation metrics: numpy in, numbers out. Knows no model and no path."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve


def image_auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Area under the ROC curve of separating two sets of anomaly scores (1-D, any float dtype), in [0, 1]; ties count half.
    Raises ValueError if one of them is empty or a score is not finite."""
    return float(roc_auc_score(*_labelled(normal, anomalous)))


def average_precision(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Average precision of detecting the anomalous among all scores, in [0, 1]; arguments and errors as in `image_auroc`."""
    return float(average_precision_score(*_labelled(normal, anomalous)))


def roc_curve(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(fpr, tpr) at every distinct score, from (0, 0) to (1, 1); arguments and errors as in `image_auroc`."""
    fpr, tpr, _ = sklearn_roc_curve(*_labelled(normal, anomalous), drop_intermediate=False)
    return fpr, tpr


def best_f1(normal: np.ndarray, anomalous: np.ndarray) -> tuple[float, float]:
    """(F1, threshold): the highest F1 that any threshold gives (anomalous where score >= threshold). It is chosen on the very
    scores it is measured on: an upper bound, not an estimate. Arguments and errors as in `image_auroc`."""
    precision, recall, thresholds = precision_recall_curve(*_labelled(normal, anomalous))
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12)
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def recall_at_fpr(normal: np.ndarray, anomalous: np.ndarray, fpr: float) -> float:
    """The largest share of anomalous scores that a threshold finds while at most a share `fpr` in [0, 1] of the normal ones lies
    at or above it. Arguments and errors as in `image_auroc`."""
    if not 0 <= fpr <= 1:
        raise ValueError(f"a false-positive rate is within [0, 1], got {fpr}")
    rates, recalls = roc_curve(normal, anomalous)
    return float(recalls[rates <= fpr].max())


def _labelled(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    normal, anomalous = np.asarray(normal, np.float64).ravel(), np.asarray(anomalous, np.float64).ravel()
    if not normal.size or not anomalous.size:
        raise ValueError(f"need scores of both kinds, got {normal.size} normal and {anomalous.size} anomalous")
    scores = np.concatenate([normal, anomalous])
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return np.repeat([0, 1], [normal.size, anomalous.size]), scores


# ------------------------------------------------------------------------------------------------------------ localization


def pixel_metrics(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[float, float]:
    """(AU-ROC, average precision) of telling defective from defect-free pixels, each in [0, 1]; ties as in scikit-learn, which
    needs 90 bytes a pixel where this needs the maps' own size once more. Arguments as in `pro_curve`. Raises ValueError for
    mismatched shapes, or if one kind of pixel is missing."""
    pairs = [(np.asarray(m), np.asarray(k) != 0) for m, k in zip(maps, masks, strict=True)]
    if any(m.shape != k.shape for m, k in pairs):
        raise ValueError("a mask differs in shape from its map")
    normal, defective = np.concatenate([m[~k] for m, k in pairs]), np.concatenate([m[k] for m, k in pairs])
    if not normal.size or not defective.size:
        raise ValueError(f"need pixels of both kinds, got {normal.size} defect-free and {defective.size} defective")
    normal.sort()
    scores, counts = np.unique(defective, return_counts=True)
    below, up_to = (np.searchsorted(normal, scores, side) for side in ("left", "right"))
    auroc = np.sum(counts * (below + up_to) / 2) / normal.size / defective.size
    found = np.cumsum(counts[::-1])[::-1]  # true positives at each threshold; the normal pixels not below it are the false ones
    return float(auroc), float(np.sum(counts * found / (found + normal.size - below)) / defective.size)


def pro_curve(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Per-region overlap against false-positive rate (MVTec AD), exact. `maps`: anomaly maps, float h×w; `masks`: bool or uint8
    h×w, nonzero where defective, all zero for a good image; sizes may differ between images. Regions are the 8-connected
    components of the masks. Returns (fpr, pro), float64 in [0, 1], from (0, 0) to (1, 1).

    Every distinct score is a threshold and equal scores move together; points between which the curve is straight are left out.
    Raises ValueError for mismatched shapes, a score that is not finite, no region, or no defect-free pixel."""

    def components(mask: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        labels, n = ndimage.label(np.asarray(mask) != 0, np.ones((3, 3)))
        for i in range(n):
            region = labels == i + 1
            yield region, int(region.sum())

    return spro_curve(maps, [components(mask) for mask in masks])


def spro_curve(
    maps: Sequence[np.ndarray], regions: Sequence[Iterable[tuple[np.ndarray, float]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Saturated per-region overlap against false-positive rate (MVTec LOCO), exact. `regions`: for each map a list of (mask h×w,
    saturation area in pixels), empty for a good image. The overlap of a region is min(pixels found, saturation)/saturation; a
    false positive is a pixel outside all regions of its image. Returns and raises as `pro_curve`, and ValueError for a saturation
    area that is not within (0, area]."""
    normal, found, gains = [], [], []
    if len(maps) != len(regions):
        raise ValueError(f"{len(maps)} maps but masks for {len(regions)}")
    for values, image_regions in zip(maps, regions):
        values, outside = np.asarray(values), np.ones(np.shape(values), bool)
        if not np.isfinite(values).all():
            raise ValueError("an anomaly map has a value that is not finite")
        for mask, saturation in image_regions:
            mask = np.asarray(mask) != 0
            if mask.shape != values.shape:
                raise ValueError(f"mask of shape {mask.shape} for a map of shape {values.shape}")
            scores = np.sort(values[mask])[::-1]
            if not 0 < saturation <= len(scores):
                raise ValueError(f"saturation area {saturation} of a region of {len(scores)} pixels")
            whole = int(np.ceil(saturation))  # only the highest scores count: after them the region is saturated
            gain = np.full(whole, 1 / saturation)
            gain[-1] -= (whole - saturation) / saturation
            found.append(scores[:whole])
            gains.append(gain)
            outside &= ~mask
        normal.append(values[outside])
    normal = np.concatenate(normal) if normal else np.empty(0)
    normal.sort()  # in place: most of the time and of the memory goes here
    if not found or not normal.size:
        raise ValueError(f"need at least one region and one defect-free pixel, got {len(found)} and {normal.size}")

    # Only at a score that occurs in a region does the overlap grow; until the next one the curve is flat.
    scores, position = np.unique(np.concatenate(found), return_inverse=True)
    gain = np.bincount(position, np.concatenate(gains))[::-1]
    after = np.cumsum(gain)
    after /= after[-1]  # the number of regions
    above, at_least = (normal.size - np.searchsorted(normal, scores[::-1], side) for side in ("right", "left"))
    fpr = np.stack([above, at_least], 1).ravel() / normal.size
    pro = np.stack([np.concatenate([[0.0], after[:-1]]), after], 1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], pro, [1.0]])


def area_under_curve(fpr: np.ndarray, pro: np.ndarray, limit: float) -> float:
    """Area under a curve (fpr ascending) up to fpr = `limit`, divided by `limit`: in [0, 1]. The curve is interpolated at the
    limit. Raises ValueError unless 0 < limit <= 1."""
    if not 0 < limit <= 1:
        raise ValueError(f"the integration limit must be within (0, 1], got {limit}")
    inside = fpr <= limit
    end = np.flatnonzero(inside)[-1]
    x, y = fpr[inside], pro[inside]
    if x[-1] < limit:
        share = (limit - fpr[end]) / (fpr[end + 1] - fpr[end])
        x, y = np.append(x, limit), np.append(y, pro[end] + share * (pro[end + 1] - pro[end]))
    return float(np.trapezoid(y, x) / limit)


def au_pro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], limit: float = 0.3) -> float:
    """Area under `pro_curve` up to a false-positive rate of `limit`, divided by it; MVTec AD reports 0.3."""
    return area_under_curve(*pro_curve(maps, masks), limit)


def au_spro(maps: Sequence[np.ndarray], regions: Sequence[Sequence[tuple[np.ndarray, float]]], limit: float = 0.05) -> float:
    """Area under `spro_curve` up to a false-positive rate of `limit`, divided by it; MVTec LOCO reports 0.05 first."""
    return area_under_curve(*spro_curve(maps, regions), limit)
