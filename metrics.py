"""Evaluation metrics: numpy in, numbers out. Knows no model and no path."""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score


def image_auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Area under the ROC curve of separating two sets of anomaly scores (1-D, any float dtype), in [0, 1]; ties count half.
    Raises ValueError if one of them is empty or a score is not finite."""
    return float(roc_auc_score(*_labelled(normal, anomalous)))


def average_precision(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """Average precision of detecting the anomalous among all scores, in [0, 1]; arguments and errors as in `image_auroc`."""
    return float(average_precision_score(*_labelled(normal, anomalous)))


def _labelled(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    normal, anomalous = np.asarray(normal, np.float64).ravel(), np.asarray(anomalous, np.float64).ravel()
    if not normal.size or not anomalous.size:
        raise ValueError(f"need scores of both kinds, got {normal.size} normal and {anomalous.size} anomalous")
    scores = np.concatenate([normal, anomalous])
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return np.repeat([0, 1], [normal.size, anomalous.size]), scores
