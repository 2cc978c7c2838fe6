import math

import numpy as np
import pytest

from gpumlp.metrics import METRICS, confusion_matrix, get_metric


def sample(name, n=60, seed=0):
    """Returns y_true, y_pred and weights (some of them zero) for a metric, with ties and unequal classes."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 4, n).astype(float)
    if name == "subset_accuracy":
        return rng.integers(0, 2, (n, 3)), rng.integers(0, 2, (n, 3)), weight
    if name == "roc_auc":
        return rng.integers(0, 2, n), rng.integers(0, 8, n) / 8, weight
    if name == "log_loss":
        return rng.integers(0, 4, n), rng.dirichlet(np.ones(4), n), weight
    if METRICS[name].takes == "labels":
        return rng.choice(4, n, p=[0.5, 0.3, 0.1, 0.1]), rng.integers(0, 4, n), weight
    y_true = rng.normal(size=(n, 3))
    return y_true, y_true * [0.5, 0.9, 1.1] + rng.normal(size=(n, 3)), weight


@pytest.mark.parametrize("name", METRICS)
def test_row_and_get(name):
    metric = get_metric(name)
    assert metric is METRICS[name] and metric.name == name
    assert type(metric.f(*sample(name)[:2])) is float


def test_get_metric_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"metric='auc' is unknown; use one of accuracy, .*roc_auc"):
        get_metric("auc")


@pytest.mark.parametrize("name", METRICS)
def test_larger_is_better_says_the_truth(name):
    metric, (y_true, y_pred, _) = get_metric(name), sample(name)
    perfect = np.eye(4)[y_true] if name == "log_loss" else y_true
    assert (metric.f(y_true, perfect) > metric.f(y_true, y_pred)) == metric.larger_is_better


@pytest.mark.parametrize("name", METRICS)
def test_a_weight_is_a_number_of_copies(name):
    f, (y_true, y_pred, weight) = get_metric(name).f, sample(name)
    copies = weight.astype(int)
    expected = f(np.repeat(y_true, copies, axis=0), np.repeat(y_pred, copies, axis=0))
    assert f(y_true, y_pred, weight) == pytest.approx(expected, rel=1e-12)
    assert f(y_true, y_pred, 7 * weight) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_bad_rows_and_weights(name):
    f, (y_true, y_pred, weight) = get_metric(name).f, sample(name)
    with pytest.raises(ValueError, match="must have the same number of rows"):
        f(y_true, y_pred[:-1])
    with pytest.raises(ValueError, match="have no rows"):
        f(y_true[:0], y_pred[:0])
    with pytest.raises(ValueError, match=r"sample_weight \(59,\) must be \(60,\)"):
        f(y_true, y_pred, weight[:-1])
    for bad in (-weight, weight * np.nan, weight * 0):
        with pytest.raises(ValueError, match="sample_weight must be finite and >= 0"):
            f(y_true, y_pred, bad)


def test_by_hand():
    y_true, y_pred = [0, 0, 0, 1, 2], [0, 0, 1, 1, 1]
    assert METRICS["accuracy"].f(y_true, y_pred) == 3 / 5
    assert METRICS["balanced_accuracy"].f(y_true, y_pred) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert METRICS["f1"].f(y_true, y_pred) == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert METRICS["subset_accuracy"].f([[0, 1], [1, 1]], [[0, 1], [1, 0]]) == 0.5
    assert METRICS["log_loss"].f([1, 0], [[0.5, 0.5], [0.75, 0.25]]) == pytest.approx(-np.log([0.5, 0.75]).mean())
    assert METRICS["roc_auc"].f([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8]) == (1 + 0.5 + 1 + 1) / 4
    assert METRICS["mean_squared_error"].f([1.0, 2.0], [2.0, 4.0]) == 2.5
    assert METRICS["root_mean_squared_error"].f([1.0, 2.0], [2.0, 4.0]) == math.sqrt(2.5)
    assert METRICS["mean_absolute_error"].f([1.0, 2.0], [2.0, 4.0]) == 1.5
    assert METRICS["r2"].f([1.0, 3.0], [1.0, 2.0]) == 0.5


def test_labels_may_be_names():
    y_true, y_pred = np.array(["ham", "spam", "ham"]), np.array(["ham", "ham", "egg"])
    assert METRICS["accuracy"].f(y_true, y_pred) == pytest.approx(1 / 3)
    assert METRICS["balanced_accuracy"].f(y_true, y_pred) == 0.25
    assert METRICS["roc_auc"].f(y_true, [0.1, 0.9, 0.2]) == 1.0
    with pytest.raises(ValueError, match="must hold the same kind of labels"):
        METRICS["accuracy"].f(y_true, [0, 0, 1])


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "f1"])
def test_labels_must_be_one_column(name):
    with pytest.raises(
        ValueError, match=r"y_pred \(3, 2\) must be \(n_samples,\) labels; for multi-label rows use subset"
    ):
        METRICS[name].f([0, 1, 1], np.ones((3, 2)))


def test_subset_accuracy_refuses_other_input():
    f = METRICS["subset_accuracy"].f
    with pytest.raises(ValueError, match="for one label per row use accuracy"):
        f([0, 1], [0, 1])
    with pytest.raises(ValueError, match="y_pred must hold 0 and 1 only"):
        f([[0, 1]], [[0.2, 0.7]])
    with pytest.raises(ValueError, match="y_true must hold 0 and 1 only"):
        f([[0, 2]], [[0, 1]])


def test_log_loss_clips_by_dtype():
    f = METRICS["log_loss"].f
    for dtype in (np.float32, np.float64):
        epsilon = np.finfo(dtype).eps
        assert f([0], np.array([[0, 1]], dtype)) == pytest.approx(-np.log(epsilon))
        assert f([1], np.array([[0, 1]], dtype)) == pytest.approx(epsilon)
    assert f([0], [[0, 1]]) == pytest.approx(-np.log(np.finfo(np.float64).eps))


def test_log_loss_takes_the_probability_of_class_1():
    y_true, p = np.array([0, 1, 1]), np.array([0.2, 0.7, 0.4])
    assert METRICS["log_loss"].f(y_true, p) == METRICS["log_loss"].f(y_true, np.stack([1 - p, p], axis=1))
    assert METRICS["roc_auc"].f(y_true, p) == METRICS["roc_auc"].f(y_true, np.stack([1 - p, p], axis=1))


def test_log_loss_refuses_other_input():
    f = METRICS["log_loss"].f
    with pytest.raises(ValueError, match=r"y_true \(1, 2\) must be \(n_samples,\) class indices"):
        f([[0, 1]], [[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"y_pred \(2, 1\) probabilities"):
        f([0, 1], [[0.5], [0.5]])
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], not -3 \.\.\. 4; apply softmax"):
        f([0, 1], [[-3, 4], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"y_true holds 2; labels must be class indices 0 \.\.\. 1"):
        f([0, 2], [[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(ValueError, match="y_true holds 'ham'; labels must be class indices"):
        f(["ham", "egg"], [[0.5, 0.5], [0.5, 0.5]])


def test_roc_auc_refuses_other_input():
    f = METRICS["roc_auc"].f
    with pytest.raises(ValueError, match=r"exactly two classes in y_true .*, not 1; score a larger or stratified set"):
        f([1, 1], [0.2, 0.3])
    with pytest.raises(ValueError, match="not 1"):
        f([0, 1], [0.2, 0.3], [0, 1])  # the other class has no weight
    with pytest.raises(ValueError, match="not 3; score one class against the rest"):
        f([0, 1, 2], [0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match=r"y_pred \(2, 3\) scores"):
        f([0, 1], np.ones((2, 3)))


def test_regression_takes_a_column_for_a_vector_and_refuses_other_shapes():
    y_true, y_pred = np.arange(4.0), np.arange(4.0)[::-1]
    for name in ("mean_squared_error", "root_mean_squared_error", "mean_absolute_error", "r2"):
        f = METRICS[name].f
        assert f(y_true, y_pred[:, None]) == f(y_true[:, None], y_pred) == f(y_true, y_pred)
        with pytest.raises(ValueError, match=r"y_true \(4, 2\) and y_pred \(4, 3\) must have the same shape"):
            f(np.ones((4, 2)), np.ones((4, 3)))


def test_r2_of_a_constant_target():
    f, constant = METRICS["r2"].f, np.full(7, 0.1)
    assert f(constant, constant) == 1.0
    assert f(constant, constant + 1e-9) == 0.0
    assert f([3.0], [3.0]) == 1.0 and f([3.0], [2.0]) == 0.0
    assert f(np.stack([constant, np.arange(7)], 1), np.stack([constant + 1, np.arange(7)], 1)) == 0.5


@pytest.mark.parametrize("name", ["log_loss", "roc_auc", "mean_squared_error", "mean_absolute_error", "r2"])
def test_a_diverged_prediction_gives_nan(name):
    y_true, y_pred, _ = sample(name)
    y_pred = np.array(y_pred, float)
    y_pred[:] = np.nan
    assert math.isnan(METRICS[name].f(y_true, y_pred))
    if name == "r2":
        assert math.isnan(METRICS[name].f(np.ones(3), np.full(3, np.nan)))


def test_an_infinite_prediction_gives_no_warning():
    y_pred = np.array([np.inf, 1.0], np.float32)
    assert METRICS["mean_squared_error"].f([1.0, 2.0], y_pred) == np.inf
    assert METRICS["mean_squared_error"].f([1.0, 2.0], y_pred, [0, 1]) == 1.0
    assert METRICS["r2"].f([1.0, 2.0], y_pred) == -np.inf


def test_confusion_matrix():
    counts = confusion_matrix([0, 0, 1, 3, 3, 3], [0, 1, 1, 0, 3, 3], n_classes=5)
    expected = np.zeros((5, 5), int)
    expected[[0, 0, 1, 3], [0, 1, 1, 0]] = 1
    expected[3, 3] = 2
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(confusion_matrix([True, False], [1.0, 1.0], 2), [[0, 1], [0, 1]])


def test_confusion_matrix_refuses_other_labels():
    with pytest.raises(ValueError, match=r"y_pred holds 2; labels must be class indices 0 \.\.\. 1 \(n_classes=2\)"):
        confusion_matrix([0, 1], [0, 2], 2)
    with pytest.raises(ValueError, match="y_true holds -1"):
        confusion_matrix([0, -1], [0, 1], 2)
    with pytest.raises(ValueError, match=r"y_true holds 0\.5"):
        confusion_matrix([0, 0.5], [0, 1], 2)
    with pytest.raises(ValueError, match=r"must be \(n_samples,\) labels"):
        confusion_matrix(np.ones((2, 2)), np.ones((2, 2)), 2)


@pytest.mark.peer
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_agrees_with_sklearn(name, weighted):
    peer = pytest.importorskip("sklearn.metrics")
    theirs = {
        "accuracy": peer.accuracy_score,
        "balanced_accuracy": peer.balanced_accuracy_score,
        "f1": lambda *args, **options: peer.f1_score(*args, average="macro", **options),
        "subset_accuracy": peer.accuracy_score,
        "log_loss": peer.log_loss,
        "roc_auc": peer.roc_auc_score,
        "mean_squared_error": peer.mean_squared_error,
        "root_mean_squared_error": peer.root_mean_squared_error,
        "mean_absolute_error": peer.mean_absolute_error,
        "r2": peer.r2_score,
    }[name]
    for seed in range(5):
        y_true, y_pred, weight = sample(name, seed=seed)
        weight = weight if weighted else None
        assert METRICS[name].f(y_true, y_pred, weight) == pytest.approx(
            theirs(y_true, y_pred, sample_weight=weight), rel=1e-12
        )


@pytest.mark.peer
def test_confusion_matrix_agrees_with_sklearn():
    peer = pytest.importorskip("sklearn.metrics")
    y_true, y_pred, _ = sample("accuracy")
    np.testing.assert_array_equal(
        confusion_matrix(y_true, y_pred, 6), peer.confusion_matrix(y_true, y_pred, labels=range(6))
    )
