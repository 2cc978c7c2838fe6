"""Trainer.evaluate: the loss and the metrics of a network on data, without training."""

import numpy as np
import pytest

import gpumlp as gm
from gpumlp import metrics
from gpumlp.backends.numpy_backend import NumpyBackend
from gpumlp.losses import LOSSES

FEATURES, OUTPUTS, N = 4, 3, 2 * NumpyBackend.prediction_rows + 5  # three stretches, the last one short
SOFTMAX = "softmax_cross_entropy"


def inputs(n=N, seed=0):
    return np.random.default_rng(seed).normal(size=(n, FEATURES)).astype(np.float32)


def targets(loss, n=N, outputs=OUTPUTS):
    rng, kind = np.random.default_rng(1), LOSSES[loss].targets
    if kind == "labels or probabilities":
        return rng.integers(0, outputs, n)
    return rng.integers(0, 2, (n, outputs)) if kind == "binary" else rng.uniform(0, 3, (n, outputs))


def network(outputs=OUTPUTS, **options):
    layers = [gm.Dense(6, "tanh", dropout=0.5, norm="batch"), gm.Dense(outputs)]
    return gm.Network(layers, n_features=FEATURES, seed=3, dtype="float64", **options)


@pytest.mark.parametrize("models", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_logits(name, weighted, models):
    X, y, net = inputs(), targets(name), network(models=models)
    weight = np.random.default_rng(2).uniform(0, 2, N).astype(np.float32) if weighted else None
    found = gm.Trainer(net, name).evaluate(X, y, weight)
    expected, _ = gm.Loss(name)(net.logits(X), y, weight)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
    assert type(found["loss"]) is (float if models is None else list)


@pytest.mark.parametrize("name", [SOFTMAX, "binary_cross_entropy"])
def test_label_smoothing_of_each_model(name):
    X, y, net = inputs(), targets(name), network(models=2)
    loss = gm.Loss(name, label_smoothing=[0.0, 0.3])
    expected, _ = loss(net.logits(X), y)
    np.testing.assert_allclose(gm.Trainer(net, loss).evaluate(X, y)["loss"], expected, rtol=1e-9)


CASES = {  # loss, outputs, metric: what the metric compares, from the network's own predictions
    (SOFTMAX, 3): {
        "accuracy": lambda net, X, y: metrics.accuracy(y, net.predict(X)),
        "balanced_accuracy": lambda net, X, y: metrics.balanced_accuracy(y, net.predict(X)),
        "f1": lambda net, X, y: metrics.f1(y, net.predict(X)),
        "log_loss": lambda net, X, y: metrics.log_loss(y, net.predict_proba(X)),
    },
    (SOFTMAX, 2): {"roc_auc": lambda net, X, y: metrics.roc_auc(y, net.predict_proba(X)[:, 1])},
    ("binary_cross_entropy", 1): {
        "accuracy": lambda net, X, y: metrics.accuracy(y[:, 0], net.predict(X)),
        "f1": lambda net, X, y: metrics.f1(y[:, 0], net.predict(X)),
        "log_loss": lambda net, X, y: metrics.log_loss(y[:, 0], net.predict_proba(X)),
        "roc_auc": lambda net, X, y: metrics.roc_auc(y[:, 0], net.predict_proba(X)[:, 1]),
    },
    ("binary_cross_entropy", 3): {"subset_accuracy": lambda net, X, y: metrics.subset_accuracy(y, net.predict(X))},
    ("squared_error", 3): {
        "r2": lambda net, X, y: metrics.r2(y, net.predict(X)),
        "mean_squared_error": lambda net, X, y: metrics.mean_squared_error(y, net.predict(X)),
        "root_mean_squared_error": lambda net, X, y: metrics.root_mean_squared_error(y, net.predict(X)),
        "mean_absolute_error": lambda net, X, y: metrics.mean_absolute_error(y, net.predict(X)),
    },
    ("poisson", 1): {"r2": lambda net, X, y: metrics.r2(y, net.predict(X))},
    ("quantile", 3): {"mean_absolute_error": lambda net, X, y: metrics.mean_absolute_error(y, net.predict(X))},
}


@pytest.mark.parametrize("case", CASES, ids=[f"{loss} {outputs}" for loss, outputs in CASES])
def test_metrics_are_those_of_the_predictions(case):
    loss, outputs = case
    X, y, net = inputs(), targets(loss, outputs=outputs), network(outputs)
    found = gm.Trainer(net, loss, metrics=list(CASES[case])).evaluate(X, y)
    assert list(found) == ["loss", *CASES[case]]
    for name, expected in CASES[case].items():
        assert found[name] == pytest.approx(expected(net, X, y), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_the_usual_metric_of_every_loss(name):
    X, y = inputs(50), targets(name, 50)
    found = gm.Trainer(network(), name).evaluate(X, y)
    usual = "subset_accuracy" if name == "binary_cross_entropy" else LOSSES[name].metric
    assert list(found) == ["loss", usual] and np.isfinite(found[usual])


def test_probabilities_as_targets_count_by_the_largest():
    X, net = inputs(), network()
    y = np.random.default_rng(0).dirichlet(np.ones(OUTPUTS), N)
    found = gm.Trainer(net, SOFTMAX).evaluate(X, y)
    assert found["accuracy"] == np.mean(net.predict(X) == y.argmax(axis=1))
    assert found["loss"] == pytest.approx(gm.Loss(SOFTMAX)(net.logits(X), y)[0], rel=1e-6)


@pytest.mark.parametrize("loss", [SOFTMAX, "squared_error"])
def test_rows_of_weight_zero_count_for_nothing(loss):
    X, y, weight = inputs(60), targets(loss, 60), np.r_[np.ones(20), np.zeros(40)]
    trainer = gm.Trainer(network(), loss)
    weighted, alone = trainer.evaluate(X, y, weight), trainer.evaluate(X[:20], y[:20])
    assert weighted == pytest.approx(alone, rel=1e-12) and weighted != trainer.evaluate(X, y)


def test_scaled_targets():
    """The loss is in the units that the network fits, metrics are in the units of y."""
    X = inputs(200)
    y = 1000 + 50 * X[:, :2]
    net = network(2, standardize=True, standardize_targets=True, models=2)
    trainer = gm.Trainer(net, "squared_error", metrics="mean_absolute_error")
    trainer.fit(X, y, epochs=2)
    found = trainer.evaluate(X, y)
    for i in (0, 1):
        z = (y - net.target_shift[i]) * net.target_scale[i]
        assert found["loss"][i] == pytest.approx(np.mean((net.logits(X)[i] - z) ** 2), rel=1e-5)
        assert found["mean_absolute_error"][i] == pytest.approx(np.abs(net.predict(X)[i] - y).mean(), rel=1e-5)
        assert net[i].predict(X) == pytest.approx(net.predict(X)[i], rel=1e-9)


def test_evaluation_changes_nothing_and_repeats():
    X, y, net = inputs(), targets(SOFTMAX), network(models=2)
    trainer = gm.Trainer(net, SOFTMAX)
    kept = {"flat": net.flat.copy(), **{name: values.copy() for name, values in net.statistics.items()}}
    X.flags.writeable = y.flags.writeable = False
    assert trainer.evaluate(X, y) == trainer.evaluate(X, y)  # no dropout, running statistics
    for name, values in {"flat": net.flat, **net.statistics}.items():
        np.testing.assert_array_equal(values, kept[name])
    assert not net.steps.any() and trainer.history == {}


def test_one_row_and_one_class():
    trainer = gm.Trainer(network(), SOFTMAX)
    assert trainer.evaluate(inputs(1), [2])["accuracy"] in (0.0, 1.0)
    assert 0 <= trainer.evaluate(inputs(9), [1] * 9)["accuracy"] <= 1
    assert gm.Trainer(network(1), "binary_cross_entropy").evaluate(inputs(9), np.ones(9))["loss"] > 0


@pytest.mark.parametrize(
    "X, y, weight, message",
    [
        (inputs(9)[:, :3], np.zeros(9), None, "the network takes 4 features, X has 3"),
        (inputs(9), np.zeros(8), None, "evaluation y has 8 rows, X has 9"),
        (inputs(9), np.full(9, 3), None, r"evaluation y\[0\] is 3; labels must be integers in \[0, 3\)"),
        (inputs(9), ["a"] * 9, None, "evaluation y holds names, but the network was trained on labels 0 to 2"),
        (inputs(9), np.zeros(9), np.ones(8), r"sample_weight has shape \(8,\)"),
        (inputs(9), np.zeros(9), np.zeros(9), "sample_weight is zero for every sample"),
        (np.full((2, FEATURES), np.nan), np.zeros(2), None, r"X\[0, 0\] is nan"),
    ],
)
def test_bad_input(X, y, weight, message):
    with pytest.raises(ValueError, match=message):
        gm.Trainer(network(), SOFTMAX).evaluate(X, y, weight)
