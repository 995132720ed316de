"""Evaluation metrics: numpy in, numbers out. Knows no model and no path."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

LIMITS = (0.01, 0.05, 0.1, 0.3, 1)  # false-positive rates up to which AU-PRO and AU-sPRO are given
Curve = tuple[np.ndarray, np.ndarray]  # (false-positive rate, overlap or recall), float64 in [0, 1]
Regions = Iterable[tuple[np.ndarray, float]]  # of an image: (mask h×w, saturation area in pixels)

# --------------------------------------------------------------------------------- scores of images


def image_auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Area under the ROC curve of separating two sets of anomaly scores (1-D, any float dtype), in
    [0, 1]; ties count half. Raises ValueError if a set is empty or a score is not finite."""
    return float(roc_auc_score(*_labelled(normal, anomalous)))


def average_precision(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Average precision of detecting the anomalous among all scores, in [0, 1]. Arguments and
    errors as in `image_auroc`."""
    return float(average_precision_score(*_labelled(normal, anomalous)))


def roc_curve(normal: np.ndarray, anomalous: np.ndarray) -> Curve:
    """(fpr, tpr) at every distinct score, from (0, 0) to (1, 1). Arguments and errors as in
    `image_auroc`."""
    fpr, tpr, _ = sklearn_roc_curve(*_labelled(normal, anomalous), drop_intermediate=False)
    return fpr, tpr


def best_f1(normal: np.ndarray, anomalous: np.ndarray) -> tuple[float, float]:
    """(F1, threshold): the highest F1 that any threshold gives; anomalous is score >= threshold.
    The threshold is chosen on the scores that it is measured on: F1 is an upper bound, not an
    estimate. Arguments and errors as in `image_auroc`."""
    precision, recall, thresholds = precision_recall_curve(*_labelled(normal, anomalous))
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12)
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def recall_at_fpr(normal: np.ndarray, anomalous: np.ndarray, fpr: float) -> float:
    """The largest share of anomalous scores that a threshold finds while at most a share `fpr` in
    [0, 1] of the normal scores lies at or above it. Arguments and errors as in `image_auroc`."""
    if not 0 <= fpr <= 1:
        raise ValueError(f"a false-positive rate is within [0, 1], got {fpr}")
    rates, recalls = roc_curve(normal, anomalous)
    return float(recalls[rates <= fpr].max())


def false_alarms(n: int) -> tuple[float, float]:
    """What a threshold at the highest score of n normal images means for further normal images of
    the same kind: (the expected share of false alarms, its upper bound at 95 % confidence). The
    share is Beta(1, n)-distributed whatever the distribution of the scores: its mean is 1/(n + 1),
    and it exceeds x with probability (1 − x)ⁿ."""
    return 1 / (n + 1), 1 - 0.05 ** (1 / n)


def _labelled(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    normal = np.asarray(normal, np.float64).ravel()
    anomalous = np.asarray(anomalous, np.float64).ravel()
    if not normal.size or not anomalous.size:
        given = f"{normal.size} normal and {anomalous.size} anomalous"
        raise ValueError(f"need scores of both kinds, got {given}")
    scores = np.concatenate([normal, anomalous])
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return np.repeat([0, 1], [normal.size, anomalous.size]), scores


def image_metrics(
    scores: dict[str, np.ndarray], defects: Sequence[str], threshold: float, average_types: bool
) -> dict:
    """Figures of telling defective images from good ones. `scores`: of each image, by map; the
    first map's are the model's own. `defects`: of each image "good" or its defect type.

    Returns the figures of all defective images together, the share of good images above the
    threshold (`false_alarms`), and under "types" the figures of each defect type against all good
    images. With `average_types`, as MVTec LOCO's authors define it, the overall figures are the
    means of the types'. Raises ValueError without a good image or without a defective one."""
    defects = np.asarray(defects)
    good = defects == "good"
    if good.all() or not good.any():
        raise ValueError("image metrics need good images and at least one defect type")
    own = next(iter(scores))

    def measure(chosen: np.ndarray) -> dict:
        entry = {"images": int(chosen.sum())}
        for name, values in scores.items():
            suffix = "" if name == own else f"_{name}"
            entry[f"image_auroc{suffix}"] = image_auroc(values[good], values[chosen])
            entry[f"image_ap{suffix}"] = average_precision(values[good], values[chosen])
        normal, anomalous = scores[own][good], scores[own][chosen]
        entry["best_f1"], entry["best_f1_threshold"] = best_f1(normal, anomalous)
        entry["recall_at_fpr_0.05"] = recall_at_fpr(normal, anomalous, 0.05)
        entry["detected"] = float((anomalous > threshold).mean())
        return entry

    types = {name: measure(defects == name) for name in dict.fromkeys(defects[~good].tolist())}
    overall = measure(~good)
    if average_types:
        for key in overall.keys() - {"images", "best_f1_threshold"}:
            overall[key] = float(np.mean([entry[key] for entry in types.values()]))
    overall |= {"good_images": int(good.sum()), "threshold": threshold}
    overall["false_alarms"] = float((scores[own][good] > threshold).mean())
    return {**overall, "types": types}


# ------------------------------------------------------------------------------------ localization


def pixel_metrics(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[float, float]:
    """(AU-ROC, average precision) of telling defective from defect-free pixels, each in [0, 1];
    ties count as in scikit-learn, which needs 90 bytes a pixel where this needs the maps' own size
    once more. Arguments as in `pro_curve`. Raises ValueError for mismatched shapes, or if one kind
    of pixel is missing."""
    pairs = [(np.asarray(m), np.asarray(k) != 0) for m, k in zip(maps, masks, strict=True)]
    if any(m.shape != k.shape for m, k in pairs):
        raise ValueError("a mask differs in shape from its map")
    normal = np.concatenate([m[~k] for m, k in pairs])
    defective = np.concatenate([m[k] for m, k in pairs])
    if not normal.size or not defective.size:
        given = f"{normal.size} defect-free and {defective.size} defective"
        raise ValueError(f"need pixels of both kinds, got {given}")
    normal.sort()
    scores, counts = np.unique(defective, return_counts=True)
    below, up_to = (np.searchsorted(normal, scores, side) for side in ("left", "right"))
    auroc = np.sum(counts * (below + up_to) / 2) / normal.size / defective.size
    # True positives at each threshold; the normal pixels that are not below it are false positives.
    found = np.cumsum(counts[::-1])[::-1]
    average = np.sum(counts * found / (found + normal.size - below)) / defective.size
    return float(auroc), float(average)


def pro_curve(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Curve:
    """Per-region overlap against false-positive rate (MVTec AD), exact. `maps`: anomaly maps, float
    h×w. `masks`: bool or uint8 h×w, nonzero where defective, all zero for a good image. Sizes may
    differ between images. Regions are the 8-connected components of the masks. Returns (fpr, pro),
    float64 in [0, 1], from (0, 0) to (1, 1).

    Every distinct score is a threshold, and equal scores move together; points between which the
    curve is straight are left out. Raises ValueError for mismatched shapes, a score that is not
    finite, no region, or no defect-free pixel."""

    def components(mask: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        labels, n = ndimage.label(np.asarray(mask) != 0, np.ones((3, 3)))
        for i in range(n):
            region = labels == i + 1
            yield region, int(region.sum())

    return spro_curve(maps, [components(mask) for mask in masks])


def spro_curve(maps: Sequence[np.ndarray], regions: Sequence[Regions]) -> Curve:
    """Saturated per-region overlap against false-positive rate (MVTec LOCO), exact. `regions`: for
    each map its (mask h×w, saturation area in pixels), none for a good image. The overlap of a
    region is min(pixels found, saturation)/saturation. A false positive is a pixel outside all
    regions of its image. Returns and raises as `pro_curve`, and ValueError for a saturation area
    that is not within (0, area]."""
    if len(maps) != len(regions):
        raise ValueError(f"{len(maps)} maps but masks for {len(regions)}")
    normals, found, gains = [], [], []
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
                raise ValueError(
                    f"saturation area {saturation} of a region of {len(scores)} pixels"
                )
            whole = int(np.ceil(saturation))  # only the highest scores count, until it is saturated
            gain = np.full(whole, 1 / saturation)
            gain[-1] -= (whole - saturation) / saturation
            found.append(scores[:whole])
            gains.append(gain)
            outside &= ~mask
        normals.append(values[outside])
    normal = np.concatenate(normals) if normals else np.empty(0)
    del normals  # most of the memory and of the time goes here
    normal.sort()
    if not found or not normal.size:
        given = f"{len(found)} and {normal.size}"
        raise ValueError(f"need at least one region and one defect-free pixel, got {given}")

    # The overlap grows only at a score that occurs in a region; up to the next one it is constant.
    scores, position = np.unique(np.concatenate(found), return_inverse=True)
    after = np.cumsum(np.bincount(position, np.concatenate(gains))[::-1])
    after /= after[-1]  # the number of regions
    sides = ("right", "left")  # the normal pixels above each score, and those at or above it
    counts = [normal.size - np.searchsorted(normal, scores[::-1], side) for side in sides]
    fpr = np.stack(counts, 1).ravel() / normal.size
    pro = np.stack([np.concatenate([[0.0], after[:-1]]), after], 1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], pro, [1.0]])


def area_under_curve(fpr: np.ndarray, pro: np.ndarray, limit: float) -> float:
    """Area under a curve (fpr ascending) up to fpr = `limit`, divided by `limit`: in [0, 1]. The
    curve is interpolated at the limit. Raises ValueError unless 0 < limit <= 1."""
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
    """Area under `pro_curve` up to a false-positive rate of `limit`, divided by it; MVTec AD
    reports 0.3."""
    return area_under_curve(*pro_curve(maps, masks), limit)


def au_spro(maps: Sequence[np.ndarray], regions: Sequence[Regions], limit: float = 0.05) -> float:
    """Area under `spro_curve` up to a false-positive rate of `limit`, divided by it; MVTec LOCO
    reports 0.05 first."""
    return area_under_curve(*spro_curve(maps, regions), limit)


def localization_metrics(
    maps: Sequence[np.ndarray], truths: Sequence, defects: Sequence[str], saturated: bool
) -> tuple[dict[str, dict[str, float]], dict[str, Curve]]:
    """(areas, curves). `defects`: of each image "good" or its defect type. `truths`: of each image
    a bool mask; with `saturated` (MVTec LOCO) a list of regions, see `spro_curve`. Both results are
    empty unless every defective image has a region.

    Areas: {defect type: {limit: AU-PRO}} against the good images, for "0.01" to "1" (LIMITS), and
    "overall" of all types together; with `saturated` AU-sPRO, and overall the mean of the types.
    Curves: {defect type: (fpr, pro)}. Raises as `spro_curve`."""
    located = [  # of each defective image
        len(truth) if saturated else truth.any()
        for truth, defect in zip(truths, defects, strict=True)
        if defect != "good"
    ]
    if not located or not all(located):
        return {}, {}

    def curve(chosen: set[str]) -> Curve:
        which = [i for i, defect in enumerate(defects) if defect in chosen]
        function = spro_curve if saturated else pro_curve
        return function([maps[i] for i in which], [truths[i] for i in which])

    def areas_under(c: Curve) -> dict[str, float]:
        return {str(limit): area_under_curve(*c, limit) for limit in LIMITS}

    types = [name for name in dict.fromkeys(defects) if name != "good"]
    curves = {name: curve({name, "good"}) for name in types}
    areas = {name: areas_under(c) for name, c in curves.items()}
    if saturated:
        overall = {k: float(np.mean([areas[name][k] for name in types])) for k in areas[types[0]]}
    else:
        overall = areas_under(curve({*types, "good"}))
    return areas | {"overall": overall}, curves
