import numpy as np
import pytest

from metrics import average_precision, image_auroc


def test_image_auroc_by_hand():
    assert image_auroc([0, 1], [2, 3]) == 1
    assert image_auroc([2, 3], [0, 1]) == 0
    assert image_auroc([0, 1, 2], [1, 5]) == pytest.approx((1 + 0.5 + 0 + 3) / 6)  # pairs in order; a tie counts half
    assert image_auroc([1, 1], [1]) == 0.5


def test_average_precision_by_hand():
    # ranking: anomalous, normal, anomalous -> precision 1 and 2/3 at the two hits
    assert average_precision([2], [3, 1]) == pytest.approx((1 + 2 / 3) / 2)


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
