"""Evaluation metrics: numpy in, numbers out. Knows no model and no path."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

LIMITS = (0.01, 0.05, 0.1, 0.3, 1)  # false-positive rates up to which AU-PRO and AU-sPRO are given
Curve = tuple[np.ndarray, np.ndarray]  # (false-positive rate, overlap or recall), float64 in [0, 1]
Regions = Sequence[tuple[np.ndarray, float]]  # of an image: (mask h×w, saturation area in pixels)

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
    """What a threshold not below the highest score of n normal images means for further images of
    the same kind: (the most false alarms that are expected, as a share; their upper bound at 95 %
    confidence). At the highest score the share is Beta(1, n)-distributed, whatever the distribution
    of the scores: its mean is 1/(n + 1), and it exceeds x with probability (1 − x)ⁿ."""
    return 1 / (n + 1), 1 - 0.05 ** (1 / n)


def p_value(score: float, known: Sequence[float]) -> float:
    """The probability that a normal image scores as high, judged by the `known` scores of n normal
    images that were not trained on: (1 + the number of those at least as high)/(n + 1). It is valid
    whatever the distribution: at most a share p of normal images of the same kind gets p or less.
    """
    return (1 + sum(k >= score for k in known)) / (len(known) + 1)


def threshold_for(rate: float, known: Sequence[float]) -> float:
    """The lowest threshold above which, in expectation, no more than a share `rate` of normal
    images scores: those whose `p_value` is at most `rate`. Raises ValueError, with the number that
    it takes, if there are too few `known` scores, and for a rate outside (0, 1)."""
    if not 0 < rate < 1:
        raise ValueError(f"a rate of false alarms is between 0 and 1, got {rate:g}")
    allowed = int(rate * (len(known) + 1) + 1e-9)
    if allowed < 1:
        needed = int(np.ceil(1 / rate - 1e-9)) - 1
        numbers = f"{needed} normal images held out of training, the model has {len(known)}"
        raise ValueError(f"{100 * rate:g} % false alarms need {numbers}")
    return sorted(known)[-allowed]


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


def rounded(scores: np.ndarray) -> np.ndarray:
    """Scores with 16 significant bits; their order is kept."""
    mantissa, exponent = np.frexp(scores)
    return np.ldexp(np.round(mantissa * 2**16), exponent - 16)


class Steps:
    """What rises as a threshold falls: the overlap with regions, and the defective pixels found.
    Scores, and by how much both rise at each. Counts the normal pixels below each, and up to it."""

    def __init__(self):
        self.scores, self.rises = [np.zeros(0, np.float32)], [np.zeros((2, 0))]

    def add(self, scores: np.ndarray, overlap: np.ndarray | float, pixels: float) -> None:
        self.scores.append(scores)
        self.rises.append(np.stack([np.broadcast_to(x, scores.shape) for x in (overlap, pixels)]))

    def merge(self, change: Callable = np.asarray) -> int:
        """Sort by score, `change` of it before; equal scores become one. Returns their number."""
        scores, position = np.unique(change(np.concatenate(self.scores)), return_inverse=True)
        rises = np.concatenate(self.rises, 1)
        self.rises = [np.stack([np.bincount(position, x, len(scores)) for x in rises])]
        self.scores = [scores]
        return len(scores)

    def start(self) -> None:
        n, self.normal = self.merge(), 0
        self.below, self.up_to = np.zeros(n, np.int64), np.zeros(n, np.int64)

    def count(self, normal: np.ndarray) -> None:
        """Sorted scores of normal pixels."""
        self.normal += len(normal)
        self.below += np.searchsorted(normal, self.scores[0], "left")
        self.up_to += np.searchsorted(normal, self.scores[0], "right")

    def curve(self) -> Curve:
        """(false-positive rate, overlap) from (0, 0) to (1, 1). Both change only at a score that
        occurs; up to the next one the overlap is constant."""
        after = np.cumsum(self.rises[0][0, ::-1])
        if not len(after) or not self.normal:
            given = f"{self.rises[0][0].sum():.0f} and {self.normal}"
            raise ValueError(f"need at least one region and one defect-free pixel, got {given}")
        after /= after[-1]
        # The normal pixels above each score, and those at or above it.
        positives = self.normal - np.stack([self.up_to, self.below], 1)[::-1]
        overlap = np.stack([np.concatenate([[0.0], after[:-1]]), after], 1)
        fpr, overlap = positives.ravel() / self.normal, overlap.ravel()
        return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], overlap, [1.0]])


class Localization:
    """How well anomaly maps show the defects, from two looks at each: `add` them one by one, then
    `measure` them in the same order. AU-PRO of MVTec AD; with `saturated` AU-sPRO of MVTec LOCO.

    Exact: every distinct score is a threshold, and equal scores move together. Memory grows with
    the defective pixels alone, to 2 GiB for 2²³ of them. With more, scores are rounded to 16 bits,
    which moves no figure by 1e-5, and memory grows no further."""

    limit = 2**23  # scores of defective, and of normal pixels, that are held at once

    def __init__(self, saturated: bool = False):
        self.saturated, self.change, self.held = saturated, np.asarray, 0
        self.types: dict[str, Steps] = {}
        self.images: list[tuple[str, bytes | None]] = []  # defect type and, packed, the mask
        self.located = True  # every defective image has a region

    def add(self, values: np.ndarray, truth: np.ndarray | Regions, defect: str) -> None:
        """`values`: an anomaly map, float h×w. `truth`: its mask, bool or uint8 h×w, nonzero where
        defective, whose 8-connected components are the regions; with `saturated` the regions
        themselves, of which one overlaps by min(pixels found, saturation)/saturation. `defect`:
        "good" or the defect type. Raises ValueError for another shape, a value that is not finite,
        or a saturation area that is not within (0, area]."""
        values = np.asarray(values)
        mask = np.zeros(values.shape, bool)
        if not np.isfinite(values).all():
            raise ValueError("an anomaly map has a value that is not finite")
        steps = self.types.setdefault(defect, Steps())
        for region in (region for region, _ in truth) if self.saturated else (truth,):
            if np.shape(region) != values.shape:
                shapes = f"mask of shape {np.shape(region)} for a map of shape {values.shape}"
                raise ValueError(shapes)
        regions = ((..., *known) for known in truth) if self.saturated else components(truth)
        for box, region, saturation in regions:
            region = np.asarray(region) != 0
            scores = np.sort(values[box][region])[::-1]
            if not 0 < saturation <= len(scores):
                area = f"saturation area {saturation}"
                raise ValueError(f"{area} of a region of {len(scores)} pixels")
            whole = int(np.ceil(saturation))  # only the highest scores count, until it is saturated
            gain = np.full(whole, 1 / saturation)
            gain[-1] -= (whole - saturation) / saturation
            self._hold(steps, scores[:whole], gain, 0 if self.saturated else 1)
            mask[box] |= region
        if self.saturated:  # regions may overlap
            self._hold(steps, values[mask], 0, 1)
        self.located &= defect == "good" or bool(mask.any())
        self.images.append((defect, zlib.compress(np.packbits(mask), 1) if mask.any() else None))

    def _hold(self, steps: Steps, scores: np.ndarray, overlap: np.ndarray | int, pixels: int):
        steps.add(self.change(scores), overlap, pixels)
        self.held += len(scores)
        if self.held > self.limit:
            self.change = rounded
            self.held = sum(steps.merge(rounded) for steps in self.types.values())

    def measure(self, maps: Iterable[np.ndarray]) -> None:
        """The second look: the same maps in the same order. Counts their normal pixels: those of a
        good image for each defect type, those of a defective one for its own type."""
        self.all = Steps()
        for steps in self.types.values():
            self.all.scores += steps.scores
            self.all.rises += steps.rises
        for steps in (self.all, *self.types.values()):
            steps.start()
        normals, held = {defect: [] for defect in self.types}, 0

        def count() -> None:
            for defect, chunks in normals.items():
                scores = self.change(np.concatenate([*chunks, np.zeros(0, np.float32)]))
                chunks.clear()
                scores.sort()
                own = self.types.values() if defect == "good" else [self.types[defect]]
                for steps in (*own, self.all):
                    steps.count(scores)

        for values, (defect, packed) in zip(maps, self.images, strict=True):
            values = np.asarray(values).ravel()
            if packed is not None:
                mask = np.frombuffer(zlib.decompress(packed), np.uint8)
                values = values[np.unpackbits(mask, count=values.size) == 0]
            normals[defect].append(values)
            held += values.size
            if held > self.limit:
                count()
                held = 0
        count()

    def pixel_metrics(self) -> tuple[float, float]:
        """(AU-ROC, average precision) of telling defective from defect-free pixels, each in [0, 1];
        ties count as in scikit-learn. Raises ValueError if one kind of pixel is missing."""
        n, below, counts = self.all.normal, self.all.below, self.all.rises[0][1]
        defective = counts.sum()
        if not n or not defective:
            given = f"{n} defect-free and {defective:.0f} defective"
            raise ValueError(f"need pixels of both kinds, got {given}")
        auroc = np.sum(counts * (below + self.all.up_to) / 2) / n / defective
        # True positives at each threshold; the normal pixels not below it are false positives.
        found = np.cumsum(counts[::-1])[::-1]
        average = np.sum(counts * found / (found + n - below)) / defective
        return float(auroc), float(average)

    def areas(self) -> dict[str, dict[str, float]]:
        """{defect type: {limit: AU-PRO}} against the good images, for "0.01" to "1" (LIMITS), and
        "overall" of all types together; with `saturated` AU-sPRO, and overall the mean of the
        types. Raises ValueError without a region of each type or without a defect-free pixel."""

        def under(curve: Curve) -> dict[str, float]:
            return {str(limit): area_under_curve(*curve, limit) for limit in LIMITS}

        areas = {name: under(curve) for name, curve in self.curves()}
        if not self.saturated:
            return areas | {"overall": under(self.all.curve())}
        means = {
            k: float(np.mean([entry[k] for entry in areas.values()])) for k in map(str, LIMITS)
        }
        return areas | {"overall": means}

    def curves(self) -> Iterator[tuple[str, Curve]]:
        """(defect type, (false-positive rate, overlap)) in turn, float64 in [0, 1]. Raises as
        `areas`."""
        return ((name, s.curve()) for name, s in self.types.items() if name != "good")


def components(mask: np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray, int]]:
    """The 8-connected components of a mask: the box around it, which of the box's pixels belong to
    it, and its area."""
    labels, _ = ndimage.label(np.asarray(mask) != 0, np.ones((3, 3)))
    for i, box in enumerate(ndimage.find_objects(labels)):
        region = labels[box] == i + 1
        yield box, region, int(region.sum())


def area_under_curve(fpr: np.ndarray, pro: np.ndarray, limit: float) -> float:
    """Area under a curve (fpr ascending) up to fpr = `limit`, divided by `limit`: in [0, 1]. The
    curve is interpolated at the limit. Raises ValueError unless 0 < limit <= 1."""
    if not 0 < limit <= 1:
        raise ValueError(f"the integration limit must be within (0, 1], got {limit}")
    end = np.searchsorted(fpr, limit, "right")
    x, y = np.append(fpr[:end], limit), np.append(pro[:end], np.interp(limit, fpr, pro))
    return float(np.trapezoid(y, x) / limit)
