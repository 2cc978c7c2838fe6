import numpy as np
import pytest

from gpumlp import random
from gpumlp.perceptron import Perceptron, threshold

CORNERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
AND, OR, XOR = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])


def separable(n=80, n_features=3, margin=0.2, seed=0):
    """Returns rows on both sides of a known hyperplane u · (x, 1), |u| = 1, each at least ``margin`` from it."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=n_features + 1)
    u[-1] *= 0.2  # keep rows on both sides
    u /= np.linalg.norm(u)
    X = rng.normal(size=(10 * n, n_features))
    z = X @ u[:-1] + u[-1]
    X, z = X[np.abs(z) > margin][:n], z[np.abs(z) > margin][:n]
    return X, (z > 0).astype(int), np.abs(z).min()


def test_threshold_takes_the_lower_side_at_zero():
    tiny = np.nextafter(0, 1)
    assert threshold(np.array([-1.0, -tiny, -0.0, 0.0, tiny, 1.0])).tolist() == [0, 0, 0, 0, 1, 1]
    assert threshold(2.0) == 1


@pytest.mark.parametrize("y", [AND, OR], ids=["and", "or"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_and_and_or(y, seed):
    unit = Perceptron(seed=seed).fit(CORNERS, y)
    assert unit.converged and unit.mistakes[-1] == 0 and all(unit.mistakes[:-1])
    np.testing.assert_array_equal(unit.predict(CORNERS), y)
    assert unit.w.shape == (2,) and unit.w.dtype == np.float64 and isinstance(unit.b, float)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cannot_learn_xor(seed):
    unit = Perceptron(epochs=200, seed=seed).fit(CORNERS, XOR)
    assert not unit.converged
    assert len(unit.mistakes) == 200 and min(unit.mistakes) >= 1
    assert (unit.predict(CORNERS) == XOR).sum() <= 3


@pytest.mark.parametrize("seed", range(5))
def test_rosenblatt_convergence_within_novikoff_bound(seed):
    X, y, margin = separable(seed=seed)
    unit = Perceptron(epochs=10_000, seed=seed).fit(X, y)
    radius_squared = (X**2).sum(axis=1).max() + 1  # of the vectors (x, 1)
    assert unit.converged
    assert 0 < sum(unit.mistakes) <= radius_squared / margin**2
    np.testing.assert_array_equal(unit.predict(X), y)


def test_first_update_by_hand():
    # z = 0 is output 0: the row of class 0 is right at once, the row of class 1 moves w to η x and b to η.
    unit = Perceptron(learning_rate=0.5, epochs=1).fit([[3.0, -1.0], [0.0, 0.0]], [1, 0])
    if unit.mistakes == [1]:  # the row of class 0 came first
        np.testing.assert_array_equal(unit.w, [1.5, -0.5])
        assert unit.b == 0.5
    else:  # it came second, when b = 0.5 puts it on the wrong side: b goes back
        np.testing.assert_array_equal(unit.w, [1.5, -0.5])
        assert unit.mistakes == [2] and unit.b == 0.0


def test_learning_rate_scales_the_weights_only():
    X, y, _ = separable()
    one, half = Perceptron(1.0, seed=3).fit(X, y), Perceptron(0.5, seed=3).fit(X, y)
    assert one.mistakes == half.mistakes
    np.testing.assert_allclose(half.w, 0.5 * one.w)
    assert half.b == pytest.approx(0.5 * one.b)


def test_seed_decides_the_order():
    X, y, _ = separable()
    first, again, other = (Perceptron(seed=seed).fit(X, y) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.w, again.w)
    assert first.mistakes == again.mistakes
    assert not np.array_equal(first.w, other.w)


def test_each_epoch_has_an_order_of_its_own(monkeypatch):
    asked, permutation = [], random.permutation

    def spy(n, *, seed, step):
        asked.append((n, seed, step))
        return permutation(n, seed=seed, step=step)

    monkeypatch.setattr(random, "permutation", spy)
    Perceptron(epochs=3, seed=5).fit(CORNERS, XOR)
    assert asked == [(4, 5, 0), (4, 5, 1), (4, 5, 2)]


def test_fit_starts_anew():
    unit = Perceptron().fit(CORNERS, XOR).fit(CORNERS, OR)
    np.testing.assert_array_equal(unit.w, Perceptron().fit(CORNERS, OR).w)
    assert unit.converged


@pytest.mark.parametrize("classes", [(-1, 1), (3, 8), ("no", "yes"), (False, True)])
def test_classes_of_any_values(classes):
    classes = np.array(classes)
    unit = Perceptron().fit(CORNERS.astype(np.float32), classes[OR])
    np.testing.assert_array_equal(unit.classes, classes)
    predicted = unit.predict(CORNERS)
    np.testing.assert_array_equal(predicted, classes[OR])
    assert predicted.dtype == classes.dtype
    np.testing.assert_array_equal(unit.decision_function(CORNERS) > 0, OR == 1)


@pytest.mark.parametrize(
    ("y", "message"), [([0, 1, 2, 1], r"y has 3 classes \(0, 1, 2\)"), ([1] * 4, r"y has 1 classes")]
)
def test_refuses_other_than_two_classes(y, message):
    with pytest.raises(ValueError, match=message + ".*exactly two apart"):
        Perceptron().fit(CORNERS, y)


def test_names_some_of_many_classes():
    with pytest.raises(ValueError, match=r"y has 7 classes \(0, 1, 2, 3, 4, \.\.\.\)"):
        Perceptron().fit(np.arange(7.0)[:, None], np.arange(7))


def test_refuses_bad_rows():
    with pytest.raises(ValueError, match=r"y of shape \(3,\) must be \(4,\)"):
        Perceptron().fit(CORNERS, OR[:3])
    with pytest.raises(ValueError, match=r"y of shape \(4, 1\) must be \(4,\)"):
        Perceptron().fit(CORNERS, OR[:, None])
    with pytest.raises(ValueError, match="X"):
        Perceptron().fit(CORNERS[0], OR[:2])
    with pytest.raises(ValueError, match="X"):
        Perceptron().fit([[0.0, np.nan], [1.0, 2.0]], [0, 1])
    with pytest.raises(ValueError, match="X"):
        Perceptron().fit(CORNERS, OR).predict(np.ones((2, 3)))


def test_refuses_to_predict_before_fit():
    with pytest.raises(RuntimeError, match=r"call fit\(X, y\) first"):
        Perceptron().predict(CORNERS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate=0 must be a finite number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"learning_rate": "1"}, "learning_rate='1'"),
        ({"epochs": 0}, "epochs=0 must be an integer >= 1"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"seed": -1}, "seed=-1 must be an integer >= 0"),
        ({"seed": None}, "seed=None"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Perceptron(**settings)
