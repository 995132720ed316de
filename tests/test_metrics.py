import json

import numpy as np
import pytest
from PIL import Image

from data import Category, Sample
from metrics import (
    area_under_curve,
    au_pro,
    au_spro,
    average_precision,
    best_f1,
    image_auroc,
    pixel_metrics,
    pro_curve,
    recall_at_fpr,
    spro_curve,
)


def test_image_auroc_by_hand():
    assert image_auroc([0, 1], [2, 3]) == 1
    assert image_auroc([2, 3], [0, 1]) == 0
    assert image_auroc([0, 1, 2], [1, 5]) == pytest.approx((1 + 0.5 + 0 + 3) / 6)  # pairs in order; a tie counts half
    assert image_auroc([1, 1], [1]) == 0.5


def test_average_precision_by_hand():
    # ranking: anomalous, normal, anomalous -> precision 1 and 2/3 at the two hits
    assert average_precision([2], [3, 1]) == pytest.approx((1 + 2 / 3) / 2)


def test_operating_points_by_hand():
    f1, threshold = best_f1([0, 1, 2, 5], [3, 4, 6])
    assert f1 == pytest.approx(2 * 3 / (2 * 3 + 1)) and threshold == 3  # finds all three, and one normal image
    assert recall_at_fpr([0, 1, 2, 5], [3, 4, 6], 0) == pytest.approx(1 / 3)
    assert recall_at_fpr([0, 1, 2, 5], [3, 4, 6], 0.25) == 1
    assert recall_at_fpr([1, 1], [1, 1], 0.5) == 0  # one tie: all or nothing
    with pytest.raises(ValueError, match="within"):
        recall_at_fpr([0], [1], 1.5)


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_pixel_metrics_are_scikit_learns(levels):
    rng = np.random.default_rng(levels)
    maps = [rng.integers(0, levels, shape).astype(np.float32) for shape in ((20, 30), (7, 9))]
    masks = [rng.random(m.shape) < 0.2 for m in maps]
    normal, defective = (np.concatenate([m[k == want] for m, k in zip(maps, masks)]) for want in (False, True))
    assert pixel_metrics(maps, masks) == pytest.approx(
        (image_auroc(normal, defective), average_precision(normal, defective)), abs=1e-12
    )
    with pytest.raises(ValueError, match="shape"):
        pixel_metrics([np.zeros((2, 2))], [np.zeros((2, 3))])
    with pytest.raises(ValueError, match="4 defect-free and 0 defective"):
        pixel_metrics([np.zeros((2, 2))], [np.zeros((2, 2))])


def test_invariant_to_monotone_transforms():
    rng = np.random.default_rng(0)
    normal, anomalous = rng.normal(0, 1, 50), rng.normal(1, 1, 30)
    assert image_auroc(normal, anomalous) == image_auroc(np.exp(normal), np.exp(anomalous))
    assert image_auroc(normal, anomalous) == pytest.approx(1 - image_auroc(anomalous, normal))


def test_impossible_scores():
    with pytest.raises(ValueError, match="0 normal and 1 anomalous"):
        image_auroc([], [1])
    with pytest.raises(ValueError, match="not finite"):
        average_precision([np.nan], [1])


# ------------------------------------------------------------------------------------------------------------ localization


def test_au_pro_is_the_official_one(shared):
    expected = json.loads((shared / "oracles/mvtec_ad/expected.json").read_text())
    cases = np.load(shared / "oracles/mvtec_ad/cases.npz")
    for name, values in expected.items():
        maps, masks = cases[f"{name}_maps"], cases[f"{name}_masks"]
        curve = pro_curve(maps, masks)
        for limit, area in values["au_pro"].items():
            # the official code adds up false-positive rates in float32 steps of 1/pixels: 3e-9 over the 1e5 of a case
            assert area_under_curve(*curve, float(limit)) == pytest.approx(area, abs=5e-9), name
        scores, defective = maps.max((1, 2)), masks.any((1, 2))
        if defective.any() and not defective.all():
            assert image_auroc(scores[~defective], scores[defective]) == pytest.approx(values["image_auroc"], abs=1e-12)


def test_au_spro_is_the_official_one(shared):
    oracle = shared / "oracles/mvtec_loco"
    expected = json.loads((oracle / "expected.json").read_text())
    category = Category("toy", "loco", oracle / "toy", [])
    for kind in ("logical_anomalies", "structural_anomalies"):
        maps, regions = [], []
        for defect in ("good", kind):
            for path in sorted((oracle / f"anomaly_maps/toy/test/{defect}").glob("*.tiff")):
                masks = sorted((oracle / f"toy/ground_truth/{defect}/{path.stem}").glob("*.png"))
                maps.append(np.asarray(Image.open(path)))
                regions.append(category.regions(Sample(path, defect, tuple(masks)), maps[-1].shape))
        for limit, area in expected["official_all_thresholds"]["auc_spro"][kind].items():
            assert au_spro(maps, regions, float(limit)) == pytest.approx(area, abs=1e-12)
        for limit, area in expected["official_refined_thresholds"]["auc_spro"][kind].items():
            assert au_spro(maps, regions, float(limit)) == pytest.approx(area, abs=1e-4)


def by_definition(maps, regions, limit):
    """AU-sPRO straight from its definition: every distinct score a threshold, all pixels compared."""
    points = [(0.0, 0.0)]
    outside = [~np.any([np.zeros(m.shape, bool), *(r for r, _ in rs)], 0) for m, rs in zip(maps, regions)]
    normal = np.concatenate([m[o] for m, o in zip(maps, outside)])
    for t in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        overlap = [min((m[r] >= t).sum(), s) / s for m, rs in zip(maps, regions) for r, s in rs]
        points.append(((normal >= t).mean(), np.mean(overlap)))
    x, y = np.array(points).T
    grid = np.append(x[x <= limit], limit)
    after = np.flatnonzero(x > limit)
    at_limit = y[-1]
    if len(after):
        i = after[0]
        at_limit = y[i - 1] + (y[i] - y[i - 1]) * (limit - x[i - 1]) / (x[i] - x[i - 1])
    return np.trapezoid(np.append(y[x <= limit], at_limit), grid) / limit


@pytest.mark.parametrize("seed", range(12))
def test_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    maps, regions = [], []
    for i in range(5):
        shape = tuple(rng.integers(6, 14, 2))
        maps.append(rng.integers(0, (4, 30, 10**6)[seed % 3], shape).astype(np.float32))  # many ties, some, none
        regions.append([])
        for _ in range(rng.integers(0, 3) if i else 1):
            mask = rng.random(shape) < rng.uniform(0.02, 0.5)
            mask[0, 0] = True
            regions[-1].append((mask, int(rng.integers(1, mask.sum() + 1))))
    for limit in (0.02, 0.3, 1):
        assert au_spro(maps, regions, limit) == pytest.approx(by_definition(maps, regions, limit), abs=1e-12)
    # one region a mask whose pixels hang together: sPRO with saturation = area is PRO
    masks = [np.zeros(m.shape, np.uint8) for m in maps]
    masks[0][1:4, 2:4] = 255
    whole = [[(m > 0, int((m > 0).sum()))] if m.any() else [] for m in masks]
    assert au_pro(maps, masks, 0.3) == au_spro(maps, whole, 0.3)
    assert au_pro([np.exp(m / 1e6) for m in maps], masks) == pytest.approx(au_pro(maps, masks), abs=1e-12)
    assert au_pro(maps[::-1], masks[::-1]) == pytest.approx(au_pro(maps, masks), abs=1e-12)


def test_localization_refuses_what_has_no_value():
    zeros, ones = np.zeros((4, 4), np.float32), np.ones((4, 4), bool)
    with pytest.raises(ValueError, match="at least one region and one defect-free pixel, got 0 and 16"):
        au_pro([zeros], [zeros])
    with pytest.raises(ValueError, match="got 1 and 0"):
        au_pro([zeros], [ones])
    with pytest.raises(ValueError, match="not finite"):
        au_pro([zeros * np.nan, zeros], [ones, zeros])
    with pytest.raises(ValueError, match="mask of shape"):
        au_pro([zeros], [np.ones((4, 5))])
    with pytest.raises(ValueError, match="1 maps but masks for 2"):
        au_pro([zeros], [ones, ones])
    with pytest.raises(ValueError, match="saturation area 17"):
        spro_curve([zeros, zeros], [[(ones, 17)], []])
    with pytest.raises(ValueError, match="limit"):
        au_pro([zeros, zeros], [ones, zeros], 0)
