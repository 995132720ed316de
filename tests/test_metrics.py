"""Metrics by hand, against scikit-learn, the official evaluation code and their definitions."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from support import metrics
from support.data import Category, Sample
from support.metrics import area_under_curve, average_precision, image_auroc


def test_image_scores_by_hand():
    assert image_auroc([0, 1], [2, 3]) == 1 and image_auroc([2, 3], [0, 1]) == 0
    # of the pairs in order a tie counts half
    assert image_auroc([0, 1, 2], [1, 5]) == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    # ranked: anomalous, normal, anomalous; the precision at the two hits is 1 and 2/3
    assert average_precision([2], [3, 1]) == pytest.approx((1 + 2 / 3) / 2)
    normal, anomalous = [0, 1, 2, 5], [3, 4, 6]
    f1, threshold = metrics.best_f1(normal, anomalous)  # finds all three, and one normal image
    assert f1 == pytest.approx(2 * 3 / (2 * 3 + 1)) and threshold == 3
    recalls = [metrics.recall_at_fpr(normal, anomalous, fpr) for fpr in (0, 0.25)]
    assert recalls == [pytest.approx(1 / 3), 1]
    assert metrics.recall_at_fpr([1, 1], [1, 1], 0.5) == 0  # one tie: all or nothing


def test_false_alarms_against_simulation():
    """Of the share of new scores above the highest of n; uniform scores stand for any others."""
    rng = np.random.default_rng(0)
    for n in (2, 21, 200):
        shares = 1 - rng.random((20000, n)).max(1)
        expected, bound = metrics.false_alarms(n)
        assert shares.mean() == pytest.approx(expected, rel=0.03)
        assert (shares < bound).mean() == pytest.approx(0.95, abs=0.01)


def test_p_values_and_thresholds_by_hand_and_simulation():
    known = [1.0, 2, 3, 4]
    assert [metrics.p_value(x, known) for x in (5, 4, 2.5, 0)] == [0.2, 0.4, 0.6, 1]
    assert metrics.threshold_for(0.2, known) == 4 and metrics.threshold_for(0.4, known) == 3
    with pytest.raises(ValueError, match="1 % false alarms need 99 normal images.* has 4"):
        metrics.threshold_for(0.01, known)
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.threshold_for(1, known)
    rng, alarms = np.random.default_rng(0), 0.0
    for _ in range(4000):
        scores = rng.random(39)
        threshold = metrics.threshold_for(0.05, scores)
        alarms += 1 - threshold
        new = rng.random()
        assert (new > threshold) == (metrics.p_value(new, scores) <= 0.05)
    assert alarms / 4000 == pytest.approx(0.05, rel=0.05)


def test_image_metrics_by_hand():
    scores = {"combined": np.array([1, 4, 2, 3, 5.0]), "local": np.array([1, 2, 3, 4, 5.0])}
    defects = ["good", "good", "a", "b", "b"]
    found = metrics.image_metrics(scores, defects, 2.5, average_types=False)
    types = found["types"]
    assert {t: (v["images"], v["detected"]) for t, v in types.items()} == {"a": (1, 0), "b": (2, 1)}
    assert [types[t]["image_auroc"] for t in "ab"] == [0.5, 0.75]
    assert found["image_auroc"] == pytest.approx(4 / 6) and found["image_auroc_local"] == 1
    assert found["images"] == 3 and found["good_images"] == 2 and found["false_alarms"] == 0.5
    assert found["detected"] == pytest.approx(2 / 3) and found["threshold"] == 2.5
    assert found["recall_at_fpr_0.05"] == pytest.approx(1 / 3)
    assert (found["best_f1"], found["best_f1_threshold"]) == (pytest.approx(6 / 7), 2)
    means = metrics.image_metrics(scores, defects, 2.5, average_types=True)
    assert means["image_auroc"] == 0.625 and means["detected"] == 0.5 and means["images"] == 3
    assert means["types"] == types and means["best_f1_threshold"] == 2


def localize(maps, truths, defects, saturated, limit=None):
    localization = metrics.Localization(saturated)
    localization.limit = limit or localization.limit
    for values, truth, defect in zip(maps, truths, defects):
        localization.add(values, truth, defect)
    localization.measure(maps)
    return localization


def area(maps, truths, saturated, limit):
    """AU-PRO of maps in memory or, with `saturated`, AU-sPRO."""
    curve = localize(maps, truths, ["any"] * len(maps), saturated).all.curve()
    return area_under_curve(*curve, limit)


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_pixel_metrics_are_scikit_learns(levels):
    rng = np.random.default_rng(levels)
    maps = [rng.integers(0, levels, shape).astype(np.float32) for shape in ((20, 30), (7, 9))]
    masks = [rng.random(m.shape) < 0.2 for m in maps]
    normal, defective = (
        np.concatenate([m[mask == kind] for m, mask in zip(maps, masks)]) for kind in (False, True)
    )
    expected = image_auroc(normal, defective), average_precision(normal, defective)
    found = localize(maps, masks, ["any", "any"], saturated=False).pixel_metrics()
    assert found == pytest.approx(expected, abs=1e-12)


def test_au_pro_is_the_official_one(shared):
    official = json.loads((shared / "oracles/mvtec_ad/expected.json").read_text())
    cases = np.load(shared / "oracles/mvtec_ad/cases.npz")
    for name, values in official.items():
        maps, masks = cases[f"{name}_maps"], cases[f"{name}_masks"]
        curve = localize(maps, masks, ["any"] * len(maps), saturated=False).all.curve()
        for limit, expected in values["au_pro"].items():
            # The official code adds up 1e5 float32 steps of 1/pixels, which errs by 3e-9.
            found = area_under_curve(*curve, float(limit))
            assert found == pytest.approx(expected, abs=5e-9), name


def test_au_spro_is_the_official_one(shared):
    oracle = shared / "oracles/mvtec_loco"
    expected = json.loads((oracle / "expected.json").read_text())
    category = Category("toy", "loco", oracle / "toy", [])
    maps, regions, defects = [], [], []
    for defect in ("good", "logical_anomalies", "structural_anomalies"):
        for path in sorted((oracle / f"anomaly_maps/toy/test/{defect}").glob("*.tiff")):
            masks = sorted((oracle / f"toy/ground_truth/{defect}/{path.stem}").glob("*.png"))
            maps.append(np.asarray(Image.open(path)))
            regions.append(category.regions(Sample(path, defect, tuple(masks)), maps[-1].shape))
            defects.append(defect)
    areas = localize(maps, regions, defects, saturated=True).areas()
    for thresholds, tolerance in (("all", 1e-12), ("refined", 1e-4)):
        official = expected[f"official_{thresholds}_thresholds"]["auc_spro"]
        for kind, by_limit in official.items():
            found = areas["overall" if kind == "mean" else kind]
            values = {limit.removesuffix(".0"): area for limit, area in by_limit.items()}
            assert found == pytest.approx(values, abs=tolerance)


def by_definition(maps, regions, limit):
    """AU-sPRO: every distinct score is a threshold, and all pixels are compared with it."""
    points, normal = [(0.0, 0.0)], []
    for m, rs in zip(maps, regions):
        normal.append(m[~np.any([np.zeros(m.shape, bool), *(region for region, _ in rs)], 0)])
    normal = np.concatenate(normal)
    for t in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        overlap = [min((m[r] >= t).sum(), s) / s for m, rs in zip(maps, regions) for r, s in rs]
        points.append(((normal >= t).mean(), np.mean(overlap)))
    return area_under_curve(*np.array(points).T, limit)


@pytest.mark.parametrize("seed", range(9))
def test_au_spro_and_au_pro_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    maps, regions, masks = [], [], []
    for i in range(5):
        shape, levels = tuple(rng.integers(6, 14, 2)), (4, 30, 10**6)[seed % 3]
        scores = (rng.integers(0, levels, shape) - levels // 3) / 7  # many ties, some, none
        maps.append(scores.astype(np.float32))
        regions.append([])
        for _ in range(rng.integers(0, 3) if i else 1):
            mask = rng.random(shape) < rng.uniform(0.02, 0.5)
            mask[0, 0] = True
            regions[-1].append((mask, mask.sum() * rng.uniform(0.1, 1)))
        masks.append(np.any([region for region, _ in regions[i]] or [np.zeros(shape)], 0))
    labels = [ndimage.label(mask, np.ones((3, 3))) for mask in masks]
    parts = [[(x == k, (x == k).sum()) for k in range(1, n + 1)] for x, n in labels]
    defects = ["ab"[i % 2] if mask.any() else "good" for i, mask in enumerate(masks)]
    areas = localize(maps, masks, defects, saturated=False).areas()
    for limit in (0.01, 0.3, 1):
        expected = by_definition(maps, regions, limit)
        assert area(maps, regions, True, limit) == pytest.approx(expected, abs=1e-12)
        expected = by_definition(maps, parts, limit)
        assert areas["overall"][str(limit)] == pytest.approx(expected, abs=1e-12)
        chosen = [i for i, defect in enumerate(defects) if defect in ("a", "good")]
        expected = by_definition([maps[i] for i in chosen], [parts[i] for i in chosen], limit)
        assert areas["a"][str(limit)] == pytest.approx(expected, abs=1e-12)


def test_area_under_a_curve_by_hand():
    fpr, pro = np.array([0, 0.2, 0.2, 1]), np.array([0, 0.4, 0.6, 1])
    assert area_under_curve(fpr, pro, 0.1) == pytest.approx(0.1)
    assert area_under_curve(fpr, pro, 0.6) == pytest.approx((0.04 + 0.4 * 0.7) / 0.6)
    assert area_under_curve(fpr, pro, 1) == pytest.approx(0.04 + 0.8 * 0.8)


def test_what_has_no_value_is_refused():
    def pixel_metrics(maps, masks):
        return localize(maps, masks, ["any"], saturated=False).pixel_metrics()

    zeros, ones, scores = np.zeros((4, 4), np.float32), np.ones((4, 4), bool), {"map": np.ones(2)}
    for function, arguments, reason in (
        (image_auroc, ([], [1]), "0 normal and 1 anomalous"),
        (average_precision, ([np.nan], [1]), "not finite"),
        (metrics.recall_at_fpr, ([0], [1], 1.5), "within"),
        (metrics.image_metrics, (scores, ["good"] * 2, 0, False), "at least one defect type"),
        (metrics.image_metrics, (scores, ["a"] * 2, 0, False), "need good images"),
        (pixel_metrics, ([zeros], [zeros]), "16 defect-free and 0 defective"),
        (area, ([zeros], [zeros], False, 1), "one region and one defect-free pixel, got 0 and 16"),
        (area, ([zeros * np.nan, zeros], [ones, zeros], False, 1), "not finite"),
        (area, ([zeros], [ones[1:]], False, 1), "mask of shape"),
        (area, ([zeros, zeros], [[(ones, 17)], []], True, 1), "saturation area 17"),
        (area, ([zeros, zeros], [ones, zeros], False, 0), "limit"),
    ):
        with pytest.raises(ValueError, match=reason):
            function(*arguments)


def test_localization_needs_a_region_in_every_defective_image():
    empty, defect = np.zeros((4, 4), bool), np.eye(4) > 0
    for last, located in ((defect, True), (empty, False)):
        for saturated in (False, True):
            localization = metrics.Localization(saturated)
            for mask, kind in ((empty, "good"), (defect, "a"), (last, "a")):
                truth = ([(mask, 2)] if mask.any() else []) if saturated else mask
                localization.add(np.eye(4), truth, kind)
            assert localization.located == located


@pytest.mark.parametrize("saturated", [False, True])
def test_many_defective_pixels(saturated):
    """Above the limit, scores are rounded; no figure moves by 1e-5, and few scores are held."""
    rng = np.random.default_rng(0)
    maps, truths, defects = [], [], []
    for i in range(30):
        mask = ndimage.gaussian_filter(rng.normal(size=(200, 300)), 10) > 0.02 * (i > 5)
        mask &= i % 3 > 0
        scores = rng.beta(2 + i / 10 + mask, 4, mask.shape)
        maps.append((1 + scores).astype(np.float32))  # 2¹⁵ of these have 16 bits
        regions = [(mask, mask.sum() / 2)] if mask.any() else []
        truths.append(regions if saturated else mask)
        defects.append(["good", "a", "b"][i % 3])
    exact = localize(maps, truths, defects, saturated)
    few = localize(maps, truths, defects, saturated, limit=100_000)
    assert exact.held > 300_000 and few.held < 100_000
    for name, by_limit in exact.areas().items():
        assert few.areas()[name] == pytest.approx(by_limit, abs=1e-5)
        assert few.areas()[name] != by_limit
    assert few.pixel_metrics() == pytest.approx(exact.pixel_metrics(), abs=1e-5)
