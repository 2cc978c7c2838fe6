"""Metrics: what a person reads about a model, computed on the host in float64.

One row per metric; each is ``f(y_true, y_pred, sample_weight=None) -> float``. A row of weight zero counts as absent.
NaN among predicted probabilities or values (a training that diverged) gives NaN, not an error. The values agree
with scikit-learn's functions of the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Function = Callable[..., float]


@dataclass(frozen=True)
class Metric:
    """One metric.

    ``f(y_true, y_pred, sample_weight=None)`` returns a float; ``takes`` says what ``y_pred`` holds: "labels" (predicted
    classes), "probabilities" (one per class) or "values" (of a regression). ``y_true`` holds labels or values
    accordingly; ``sample_weight`` is (n_samples,), >= 0.
    """

    name: str
    f: Function
    larger_is_better: bool
    takes: Literal["labels", "probabilities", "values"]


# Classification by labels.


def accuracy(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """Share of rows with the right label: mean(y_true == y_pred); labels (n_samples,) of any one kind."""
    y_true, y_pred, weight = _labels(y_true, y_pred, sample_weight)
    return float(np.average(y_true == y_pred, weights=weight))


def balanced_accuracy(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """Mean recall over the classes that occur in ``y_true``, (n_samples,): each class counts the same."""
    hits, true, _ = _class_weights(*_labels(y_true, y_pred, sample_weight))
    return float(np.mean(hits[true > 0] / true[true > 0]))


def f1(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """Macro F1: the mean over the classes in ``y_true`` or ``y_pred`` of 2 TP / (2 TP + FP + FN); labels (n_samples,).

    The macro average is the mean of the F1s, not the F1 of mean precision and mean recall.

    Source: van Rijsbergen 1979 (chapter 7).
    """
    hits, true, predicted = _class_weights(*_labels(y_true, y_pred, sample_weight))
    return float(np.mean(2.0 * hits / (true + predicted)))


def subset_accuracy(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """Multi-label "exact match": share of rows of which all labels are right; (n_samples, n_labels) of 0 and 1."""
    y_true, y_pred, weight = _rows(np.asarray(y_true), np.asarray(y_pred), sample_weight)
    if y_true.ndim != 2 or y_true.shape != y_pred.shape:
        raise ValueError(
            f"y_true {y_true.shape} and y_pred {y_pred.shape} must both be (n_samples, n_labels); for one label per "
            "row use accuracy"
        )
    for name, y in (("y_true", y_true), ("y_pred", y_pred)):
        if not np.isin(y, (0, 1)).all():
            raise ValueError(f"{name} must hold 0 and 1 only; threshold the probabilities first, e.g. y_pred > 0.5")
    return float(np.average((y_true == y_pred).all(axis=1), weights=weight))


# Classification by probabilities.


def log_loss(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """Cross-entropy in nats: the mean of -log p(true class).

    p is clipped to [ε, 1 - ε] with the ε of the dtype of ``y_pred``, so that one confident error costs 16 (float32) or
    36 (float64) and not infinity.

    Args:
        y_true: class indices 0 ... n_classes - 1, (n_samples,).
        y_pred: probabilities, (n_samples, n_classes); or of class 1, (n_samples,).
    """
    p = np.asarray(y_pred)
    epsilon = np.finfo(p.dtype if p.dtype.kind == "f" else np.float64).eps
    p = p.astype(np.float64)
    y_true, p, weight = _rows(np.asarray(y_true), np.stack([1.0 - p, p], axis=1) if p.ndim == 1 else p, sample_weight)
    if y_true.ndim != 1 or p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(
            f"y_true {y_true.shape} must be (n_samples,) class indices and y_pred {np.shape(y_pred)} probabilities "
            "(n_samples, n_classes), or (n_samples,) of class 1"
        )
    if ((p < -1e-6) | (p > 1.0 + 1e-6)).any():
        raise ValueError(
            f"y_pred must hold probabilities in [0, 1], not {np.nanmin(p):.4g} ... {np.nanmax(p):.4g}; apply softmax "
            "or sigmoid to logits first"
        )
    labels = _indices("y_true", y_true, p.shape[1])
    p_true = np.clip(p[np.arange(labels.size), labels], epsilon, 1.0 - epsilon)
    return float(np.average(-np.log(p_true), weights=weight))


def roc_auc(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """The probability that a random positive scores above a random negative, a tie counting half (midranks).

    Args:
        y_true: two classes, (n_samples,); the larger value is the positive class.
        y_pred: any scores that grow with the positive class, (n_samples,); of (n_samples, 2) the second column counts.

    Raises:
        ValueError: if ``y_true`` has not exactly two classes: the area is then undefined.

    Source: Hanley & McNeil 1982 (the area is the Mann-Whitney statistic).
    """
    score = np.asarray(y_pred, np.float64)
    y_true, score, weight = _rows(
        np.asarray(y_true), score[:, 1] if score.ndim == 2 and score.shape[1] == 2 else score, sample_weight
    )
    if y_true.ndim != 1 or score.ndim != 1:
        raise ValueError(
            f"y_true {y_true.shape} must be (n_samples,) and y_pred {np.shape(y_pred)} scores (n_samples,) or "
            "probabilities (n_samples, 2); roc_auc is for two classes"
        )
    classes = np.unique(y_true)
    if len(classes) != 2:
        raise ValueError(
            f"roc_auc needs rows of exactly two classes in y_true (with weight above zero), not {len(classes)}; "
            + ("score a larger or stratified set" if len(classes) < 2 else "score one class against the rest")
        )
    if np.isnan(score).any():
        return float("nan")
    levels, level = np.unique(score, return_inverse=True)
    positive = y_true == classes[1]
    above = np.bincount(level, weight * positive, len(levels))
    below = np.bincount(level, weight * ~positive, len(levels))
    beaten = np.cumsum(below) - 0.5 * below  # weight of the negatives under each level, half of those at it
    return float(above @ beaten / (above.sum() * below.sum()))


# Regression.


def mean_squared_error(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """mean((y_true - y_pred)²) over rows, then over outputs; (n_samples,) or (n_samples, n_outputs)."""
    y_true, y_pred, weight = _values(y_true, y_pred, sample_weight)
    return float(np.mean(np.average((y_true - y_pred) ** 2, axis=0, weights=weight)))


def root_mean_squared_error(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """sqrt(mean((y_true - y_pred)²)) over rows, then the mean of the roots over outputs; shapes as above."""
    y_true, y_pred, weight = _values(y_true, y_pred, sample_weight)
    return float(np.mean(np.sqrt(np.average((y_true - y_pred) ** 2, axis=0, weights=weight))))


def mean_absolute_error(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """mean(|y_true - y_pred|) over rows, then over outputs; shapes as above."""
    y_true, y_pred, weight = _values(y_true, y_pred, sample_weight)
    return float(np.mean(np.average(np.abs(y_true - y_pred), axis=0, weights=weight)))


def r2(y_true: Any, y_pred: Any, sample_weight: Any = None) -> float:
    """Coefficient of determination, 1 - Σ(y_true - y_pred)² / Σ(y_true - mean)², mean over outputs; shapes as above.

    A constant target has no variance to explain: 1.0 where it is predicted exactly, else 0.0. One row alone
    is such a target.
    """
    y_true, y_pred, weight = _values(y_true, y_pred, sample_weight)
    residual = np.average((y_true - y_pred) ** 2, axis=0, weights=weight)
    variance = np.average((y_true - np.average(y_true, axis=0, weights=weight)) ** 2, axis=0, weights=weight)
    # By value too: the rounding of the mean leaves a constant target a tiny variance.
    constant = (y_true == y_true[0]).all(axis=0) | (variance == 0)
    explained = 1.0 - residual / np.where(constant, 1.0, variance)
    return float(np.mean(np.where(constant & ~np.isnan(residual), np.where(residual == 0, 1.0, 0.0), explained)))


METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric("accuracy", accuracy, True, "labels"),
        Metric("balanced_accuracy", balanced_accuracy, True, "labels"),
        Metric("f1", f1, True, "labels"),
        Metric("subset_accuracy", subset_accuracy, True, "labels"),
        Metric("log_loss", log_loss, False, "probabilities"),
        Metric("roc_auc", roc_auc, True, "probabilities"),
        Metric("mean_squared_error", mean_squared_error, False, "values"),
        Metric("root_mean_squared_error", root_mean_squared_error, False, "values"),
        Metric("mean_absolute_error", mean_absolute_error, False, "values"),
        Metric("r2", r2, True, "values"),
    )
}


def get_metric(name: str) -> Metric:
    """Returns the row of `METRICS` with this name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is unknown; use one of {', '.join(METRICS)}")
    return METRICS[name]


def confusion_matrix(y_true: Any, y_pred: Any, n_classes: int) -> np.ndarray:
    """Counts the rows of true class i that were predicted as class j.

    Args:
        y_true, y_pred: class indices 0 ... n_classes - 1, (n_samples,) each.
        n_classes: number of classes, also of those that do not occur.

    Returns:
        Counts, (n_classes, n_classes) int64; rows are true classes, columns predicted ones.

    Raises:
        ValueError: for other shapes, or labels that are no such index.
    """
    y_true, y_pred, _ = _labels(y_true, y_pred, None)
    true, predicted = _indices("y_true", y_true, n_classes), _indices("y_pred", y_pred, n_classes)
    counts = np.bincount(true * n_classes + predicted, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64, copy=False)


# Checks.


def _rows(y_true: np.ndarray, y_pred: np.ndarray, sample_weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks the lengths and the weights; leaves out the rows of weight zero. Returns y_true, y_pred, weight."""
    if not y_true.ndim or not y_pred.ndim or len(y_true) != len(y_pred):
        raise ValueError(f"y_true {y_true.shape} and y_pred {y_pred.shape} must have the same number of rows")
    if not len(y_true):
        raise ValueError("y_true and y_pred have no rows; a metric needs at least one")
    if sample_weight is None:
        return y_true, y_pred, np.ones(len(y_true))
    weight = np.asarray(sample_weight, np.float64)
    if weight.shape != (len(y_true),):
        raise ValueError(f"sample_weight {weight.shape} must be ({len(y_true)},): one per row of y_true")
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise ValueError("sample_weight must be finite and >= 0, with at least one weight above zero")
    kept = weight > 0
    return y_true[kept], y_pred[kept], weight[kept]


def _labels(y_true: Any, y_pred: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y_true, y_pred, weight = _rows(np.asarray(y_true), np.asarray(y_pred), sample_weight)
    if y_true.ndim != 1 or y_pred.ndim != 1:
        raise ValueError(
            f"y_true {y_true.shape} and y_pred {y_pred.shape} must be (n_samples,) labels; for multi-label rows use "
            "subset_accuracy, for probabilities take argmax(axis=1) first"
        )
    if (y_true.dtype.kind in "biuf") != (y_pred.dtype.kind in "biuf"):  # they would compare as unequal in silence
        raise ValueError(
            f"y_true ({y_true.dtype}) and y_pred ({y_pred.dtype}) must hold the same kind of labels: both numbers or "
            "both names"
        )
    return y_true, y_pred, weight


def _class_weights(y_true: np.ndarray, y_pred: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the weight of the hits, the true and the predicted rows of each class in either; (n_classes,) each."""
    classes, index = np.unique(np.concatenate([y_true, y_pred]), return_inverse=True)
    true, predicted = np.split(index, 2)
    return tuple(
        np.bincount(labels, weights, len(classes))
        for labels, weights in ((true, weight * (true == predicted)), (true, weight), (predicted, weight))
    )


def _indices(name: str, labels: np.ndarray, n_classes: int) -> np.ndarray:
    allowed = labels.dtype.kind in "biuf" and np.isin(labels, np.arange(n_classes))
    if not np.all(allowed):
        wrong = labels[~allowed][0] if labels.dtype.kind in "biuf" else labels[0]
        raise ValueError(
            f"{name} holds {wrong.item()!r}; labels must be class indices 0 ... {n_classes - 1} "
            f"(n_classes={n_classes}): map other labels with np.unique(y, return_inverse=True)"
        )
    return labels.astype(np.int64)


def _values(y_true: Any, y_pred: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y_true, y_pred, weight = _rows(np.asarray(y_true, np.float64), np.asarray(y_pred, np.float64), sample_weight)
    # (n,) and (n, 1) mean the same; left as they are, they would broadcast to (n, n) in silence.
    columns = [y[:, None] if y.ndim == 1 else y for y in (y_true, y_pred)]
    if columns[0].ndim != 2 or columns[0].shape != columns[1].shape:
        raise ValueError(
            f"y_true {y_true.shape} and y_pred {y_pred.shape} must have the same shape: (n_samples,) or "
            "(n_samples, n_outputs)"
        )
    return columns[0], columns[1], weight
