"""Rosenblatt's rule and its bound; scikit-learn's own checks, and its own Perceptron beside ours."""

import pickle
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.peer
pytest.importorskip("sklearn")

import sklearn.linear_model as theirs  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_digits, make_classification  # noqa: E402
from sklearn.exceptions import ConvergenceWarning, NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

import gpumlp as gm  # noqa: E402
from gpumlp import perceptron, random  # noqa: E402
from gpumlp.perceptron import Perceptron, rosenblatt, threshold  # noqa: E402

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


def mixed(n_classes=2, n=300):
    """Returns rows of classes that overlap."""
    return make_classification(
        n, 12, n_informative=8, n_classes=n_classes, flip_y=0.1, class_sep=0.7, random_state=n_classes
    )


def test_threshold_takes_the_lower_side_at_zero():
    tiny = np.nextafter(0, 1)
    assert threshold(np.array([-1.0, -tiny, -0.0, 0.0, tiny, 1.0])).tolist() == [0, 0, 0, 0, 1, 1]
    assert threshold(2.0) == 1


# --- the rule


@pytest.mark.parametrize("y", [AND, OR], ids=["and", "or"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_and_and_or(y, seed):
    unit = Perceptron(tol=None, random_state=seed).fit(CORNERS, y)
    assert unit.converged_ and unit.mistakes_[-1] == 0 and all(unit.mistakes_[:-1])
    np.testing.assert_array_equal(unit.predict(CORNERS), y)
    assert unit.coef_.shape == (1, 2) and unit.coef_.dtype == unit.intercept_.dtype == np.float64
    assert unit.intercept_.shape == (1,) and unit.n_iter_ == len(unit.mistakes_) and unit.t_ == 1 + 4 * unit.n_iter_


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cannot_learn_xor(seed):
    unit = Perceptron(max_iter=200, tol=None, random_state=seed).fit(CORNERS, XOR)
    assert not unit.converged_
    assert len(unit.mistakes_) == unit.n_iter_ == 200 and min(unit.mistakes_) >= 1
    assert (unit.predict(CORNERS) == XOR).sum() <= 3


@pytest.mark.parametrize("seed", range(5))
def test_rosenblatt_convergence_within_novikoff_bound(seed):
    X, y, margin = separable(seed=seed)
    unit = Perceptron(max_iter=10_000, tol=None, random_state=seed).fit(X, y)
    radius_squared = (X**2).sum(axis=1).max() + 1  # of the vectors (x, 1)
    assert unit.converged_
    assert 0 < sum(unit.mistakes_) <= radius_squared / margin**2
    np.testing.assert_array_equal(unit.predict(X), y)


def test_first_updates_by_hand():
    # z = 0 is a mistake for both classes: the first row moves w to η x and b to η.
    unit = Perceptron(eta0=0.5, max_iter=1, tol=None, shuffle=False).fit([[3.0, -1.0], [4.0, 0.0]], [1, 0])
    # The second, of class 0 and with z = 6.5, moves them by -η x and -η.
    np.testing.assert_array_equal(unit.coef_, [[-0.5, -0.5]])
    assert unit.intercept_ == [0.0] and unit.mistakes_ == [2]


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("ahead", [1, 24, 1 << 17])  # elements: one row, four rows, all rows of five
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.4])
def test_several_rows_at_a_time_are_row_by_row(noise, ahead, fit_intercept, monkeypatch):
    monkeypatch.setattr(perceptron, "AHEAD", ahead)
    rng = np.random.default_rng(0)
    X = rng.integers(-9, 10, (400, 5)).astype(float)  # so that sums are exact in any order
    y = np.where((X @ [1, -2, 3, 0, 1] > 2) != (rng.uniform(size=400) < noise), 1.0, -1.0)
    eta = rng.integers(0, 3, 400).astype(float)
    w, b = expected_w, expected_b = np.zeros(5), 0.0
    for _ in range(6):
        expected_w, mistakes, loss = expected_w.copy(), 0, 0.0
        for i in range(400):
            z = expected_w @ X[i] + expected_b
            if y[i] * z <= 0:
                loss += -y[i] * z
                expected_w += eta[i] * y[i] * X[i]
                expected_b += eta[i] * y[i] * fit_intercept
                mistakes += eta[i] > 0
        before = w.copy()
        after, b, *counted = rosenblatt(X, y, eta, w, b, fit_intercept)
        np.testing.assert_array_equal(w, before)
        np.testing.assert_array_equal(after, expected_w)
        assert (b, *counted) == (expected_b, mistakes, loss)
        w = after
    assert (mistakes > 50) == (noise == 0.4) and fit_intercept == (b != 0)


def test_eta0_scales_the_weights_only():
    X, y, _ = separable()
    one, half = (Perceptron(eta0=eta0, tol=None, random_state=3).fit(X, y) for eta0 in (1.0, 0.5))
    assert one.mistakes_ == half.mistakes_
    np.testing.assert_array_equal(half.coef_, 0.5 * one.coef_)
    np.testing.assert_array_equal(half.intercept_, 0.5 * one.intercept_)


def test_random_state_decides_the_order():
    X, y, _ = separable()
    first, again, other = (Perceptron(random_state=seed).fit(X, y) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.coef_, again.coef_)
    assert first.mistakes_ == again.mistakes_
    assert not np.array_equal(first.coef_, other.coef_)
    assert Perceptron(random_state=np.random.RandomState(1)).fit(X, y).mistakes_ == first.mistakes_
    Perceptron(random_state=None).fit(X, y)


def test_each_epoch_has_an_order_of_its_own(monkeypatch):
    asked, permutation = [], random.permutation

    def spy(n, *, seed, step):
        asked.append((n, seed, step))
        return permutation(n, seed=seed, step=step)

    monkeypatch.setattr(random, "permutation", spy)
    unit = Perceptron(max_iter=3, tol=None, random_state=5).fit(CORNERS, XOR)
    unit.partial_fit(CORNERS[:3], XOR[:3]).partial_fit(CORNERS, XOR)
    seed = asked[0][1]
    assert asked == [(4, seed, 0), (4, seed, 4), (4, seed, 8), (3, seed, 12), (4, seed, 15)]
    Perceptron(max_iter=3, tol=None, random_state=5, shuffle=False).fit(CORNERS, XOR)
    assert len(asked) == 5


# --- scikit-learn's own checks


AS_THEIRS = "their Perceptron fails it too: a heavy row is one long step, a row given twice is up to two"


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [Perceptron()],
    expected_failed_checks=lambda estimator: {
        f"check_sample_weight_equivalence_on_{kind}_data": AS_THEIRS for kind in ("dense", "sparse")
    },
)
def test_scikit_learn_s_checks(estimator, check):
    check(estimator)


def test_parameters_and_defaults_are_theirs():
    ours = Perceptron().get_params()
    assert ours.items() <= theirs.Perceptron().get_params().items()
    missing = theirs.Perceptron().get_params().keys() - ours.keys()
    assert missing == {"penalty", "alpha", "l1_ratio", "early_stopping", "validation_fraction", "n_jobs"}


# --- the same numbers as scikit-learn's own class


@pytest.mark.filterwarnings("ignore:Maximum number of iteration")
@pytest.mark.parametrize("tol", [1e-3, None])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 1: 0.3}])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_without_shuffling_a_fit_is_theirs(n_classes, class_weight, weighted, fit_intercept, tol):
    X, y = mixed(n_classes)
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 2, len(y)) * (rng.uniform(size=len(y)) > 0.1) if weighted else None
    options = {"class_weight": class_weight, "fit_intercept": fit_intercept, "tol": tol, "eta0": 0.7, "shuffle": False}
    expected = theirs.Perceptron(max_iter=30, **options).fit(X, y, sample_weight=weight)
    found = Perceptron(max_iter=30, **options).fit(X, y, sample_weight=weight)
    for _ in range(2):
        np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.intercept_, expected.intercept_, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.decision_function(X), expected.decision_function(X), rtol=1e-7, atol=1e-9)
        np.testing.assert_array_equal(found.predict(X), expected.predict(X))
        for name in ("n_iter_", "t_", "n_features_in_"):
            assert getattr(found, name) == getattr(expected, name), name
        assert tol is None or class_weight is not None or found.n_iter_ < 30  # tol ended it
        if class_weight == "balanced":
            break
        for model in (found, expected):
            model.partial_fit(X[::2], y[::2], sample_weight=None if weight is None else weight[::2])


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_starts_where_theirs_starts(n_classes, fit_intercept):
    X, y = mixed(n_classes)
    rng = np.random.default_rng(0)
    units = 1 if n_classes == 2 else n_classes
    start = {"coef_init": rng.normal(size=(units, 12)), "intercept_init": rng.normal(size=units)}
    options = {"shuffle": False, "fit_intercept": fit_intercept, "max_iter": 3, "tol": None}
    given = start["coef_init"].copy()
    expected = theirs.Perceptron(**options).fit(X, y, **{name: value.copy() for name, value in start.items()})
    found = Perceptron(**options, warm_start=True).fit(X, y, **start)
    np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-9)
    np.testing.assert_allclose(found.intercept_, expected.intercept_, rtol=1e-9)
    assert fit_intercept or (found.intercept_ == start["intercept_init"]).all()
    np.testing.assert_array_equal(start["coef_init"], given)
    again = found.fit(X, y, start["coef_init"], start["intercept_init"])  # before the present weights
    np.testing.assert_allclose(again.coef_, expected.coef_, rtol=1e-9)
    if n_classes == 2:
        flat = Perceptron(**options).fit(X, y, start["coef_init"][0], start["intercept_init"][0])
        np.testing.assert_array_equal(flat.coef_, found.coef_)


def test_accuracy_on_digits_is_theirs_within_noise():
    X, y = load_digits(return_X_y=True)
    train, test, y_train, y_test = train_test_split(X, y, random_state=0, stratify=y)
    expected, found = (
        np.mean([make(random_state=seed).fit(train, y_train).score(test, y_test) for seed in range(5)])
        for make in (theirs.Perceptron, Perceptron)
    )
    assert found > expected - 0.012


# --- when it stops


def test_stops_after_an_epoch_without_a_mistake():
    X, y, _ = separable()
    expected = theirs.Perceptron(tol=None, max_iter=100, shuffle=False).fit(X, y)
    unit = Perceptron(tol=None, max_iter=100, shuffle=False).fit(X, y)
    np.testing.assert_allclose(unit.coef_, expected.coef_, rtol=1e-9)
    assert unit.converged_ and unit.n_iter_ < expected.n_iter_ == 100
    several = Perceptron(tol=None).fit(np.eye(5), range(5))
    assert several.converged_ and several.mistakes_[-1] == 0 and several.score(np.eye(5), range(5)) == 1.0


def test_a_row_without_weight_is_no_mistake():
    X, y = [[-1.0], [1.0], [2.0]], [0, 1, 0]
    unit = Perceptron(tol=None).fit(X, y, sample_weight=[1, 1, 0])
    assert unit.converged_ and unit.predict(X).tolist() == [0, 1, 1]


def test_a_fit_that_needs_longer_says_so():
    X, y = mixed()
    with pytest.warns(ConvergenceWarning, match="Maximum number of iteration.* increasing max_iter=3 ") as caught:
        Perceptron(max_iter=3).fit(X, y)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Perceptron(max_iter=3, tol=None).fit(X, y)  # asked for three epochs, as in scikit-learn
        Perceptron(max_iter=3).partial_fit(X, y, [0, 1])
        n_iter = Perceptron(n_iter_no_change=2).fit(X, y).n_iter_
        Perceptron(n_iter_no_change=2, max_iter=n_iter).fit(X, y)  # tol ends it just in time
        separated = separable()[:2]
        n_iter = Perceptron().fit(*separated).n_iter_
        assert Perceptron(max_iter=n_iter).fit(*separated).converged_


def test_converged_is_about_every_unit():
    X, y = [[-2.0], [0.0], [1.0], [2.0]], [0, 1, 1, 2]  # no unit tells the middle from the rest
    unit = Perceptron(tol=None, max_iter=300).fit(X, y)
    assert not unit.converged_ and unit.n_iter_ == 300
    alone = [Perceptron(tol=None, max_iter=300).fit(X, np.equal(y, k)) for k in range(3)]
    assert [a.converged_ for a in alone] == [True, False, True]
    padded = [a.mistakes_ + [0] * (300 - a.n_iter_) for a in alone]
    assert unit.mistakes_ == np.sum(padded, axis=0).tolist()


def test_verbose_prints_each_epoch(capsys):
    X, y = mixed(3)
    unit = Perceptron(verbose=1).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == unit.n_iter_
    assert lines[0].startswith(f"Epoch 1, mistakes = {unit.mistakes_[0]}, loss = ")


# --- fit once more


def test_fit_starts_anew():
    unit = Perceptron().fit(CORNERS, XOR).fit(CORNERS, OR)
    np.testing.assert_array_equal(unit.coef_, Perceptron().fit(CORNERS, OR).coef_)
    assert unit.converged_ and unit.mistakes_ == Perceptron().fit(CORNERS, OR).mistakes_
    unit.fit(np.eye(3), ["a", "b", "c"])
    assert unit.coef_.shape == (3, 3) and unit.classes_.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("n_classes", [2, 5])
def test_partial_fit_epochs_are_those_of_one_fit(n_classes):
    X, y = mixed(n_classes)
    whole = Perceptron(max_iter=4, tol=None).fit(X, y)
    parts = Perceptron()
    for _ in range(4):
        parts.partial_fit(X, y, classes=range(n_classes))
    np.testing.assert_array_equal(parts.coef_, whole.coef_)
    assert parts.mistakes_ == whole.mistakes_ and parts.t_ == whole.t_ and parts.n_iter_ == 1


def test_partial_fit_meets_classes_one_by_one():
    X, y = mixed(5)
    unit = Perceptron()
    for label in range(5):
        unit.partial_fit(X[y == label], y[y == label], classes=range(5))
    assert unit.coef_.shape == (5, 12) and unit.t_ == 301 and len(unit.mistakes_) == 5
    with pytest.raises(ValueError, match=r"`y` has classes not in `self\.classes_`.*'y' has \[5"):
        unit.partial_fit(X, y + 5)
    with pytest.raises(ValueError, match=r"`y` has classes not in `self\.classes_`"):
        unit.partial_fit(X, y.astype(str))


def test_warm_start_goes_on():
    X, y = mixed()
    unit = Perceptron(warm_start=True, max_iter=2, tol=None, shuffle=False).fit(X, y)
    unit.fit(X, y)
    np.testing.assert_array_equal(unit.coef_, Perceptron(max_iter=4, tol=None, shuffle=False).fit(X, y).coef_)
    assert unit.n_iter_ == len(unit.mistakes_) == 2 and unit.t_ == 601
    with pytest.raises(ValueError, match="warm_start can only be used where `y` has the same classes"):
        unit.fit(X, y + 1)


# --- scikit-learn's tools


def test_pipeline_grid_search_clone_and_pickle():
    X, y = mixed(3)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Perceptron()), {"perceptron__fit_intercept": [False, True]}, cv=2
    )
    search.fit(X + 20, y)
    again = clone(search.best_estimator_).fit(X + 20, y)
    np.testing.assert_array_equal(again.predict(X + 20), search.predict(X + 20))
    copied = pickle.loads(pickle.dumps(again))
    np.testing.assert_array_equal(copied.decision_function(X), again.decision_function(X))
    np.testing.assert_array_equal(copied[-1].partial_fit(X, y).coef_, again[-1].partial_fit(X, y).coef_)


def test_cross_validation_in_processes():
    X, y = mixed(3)
    apart = cross_val_score(gm.Perceptron(), X, y, cv=2, n_jobs=2)
    np.testing.assert_array_equal(apart, cross_val_score(gm.Perceptron(), X, y, cv=2))


def test_set_output_of_a_step_before_reaches_the_names_of_columns():
    table = pytest.importorskip("pandas").DataFrame(mixed()[0]).add_prefix("x")
    pipeline = make_pipeline(StandardScaler(), Perceptron()).set_output(transform="pandas").fit(table, mixed()[1])
    assert pipeline[-1].feature_names_in_[3] == "x3" and pipeline[-1].n_features_in_ == 12


@pytest.mark.parametrize("n_classes", [2, 5])
def test_sparse_input_gives_what_dense_input_gives(n_classes):
    from scipy import sparse

    X, y = mixed(n_classes)
    X = np.where(X > 0, X, 0)
    dense = Perceptron().fit(X, y)
    for kind in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array):
        unit = Perceptron().fit(kind(X), y)
        np.testing.assert_array_equal(unit.coef_, dense.coef_)
        np.testing.assert_array_equal(unit.intercept_, dense.intercept_)
        np.testing.assert_allclose(unit.decision_function(kind(X)), dense.decision_function(X), rtol=1e-10)
        assert unit.partial_fit(kind(X), y).predict(kind(X)).shape == y.shape


@pytest.mark.parametrize("classes", [(-1, 1), (3, 8), ("no", "yes"), (False, True)])
def test_classes_of_any_values(classes):
    classes = np.array(classes)
    unit = Perceptron().fit(CORNERS.astype(np.float32), classes[OR])
    np.testing.assert_array_equal(unit.classes_, classes)
    predicted = unit.predict(CORNERS)
    np.testing.assert_array_equal(predicted, classes[OR])
    assert predicted.dtype == classes.dtype
    np.testing.assert_array_equal(unit.decision_function(CORNERS) > 0, OR == 1)


# --- wrong input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eta0": 0}, "The 'eta0' parameter of Perceptron must be a float in the range"),
        ({"eta0": "1"}, "The 'eta0' parameter"),
        ({"max_iter": 0}, "The 'max_iter' parameter"),
        ({"max_iter": 1.5}, "The 'max_iter' parameter"),
        ({"tol": -1e-3}, "The 'tol' parameter"),
        ({"n_iter_no_change": 0}, "The 'n_iter_no_change' parameter"),
        ({"random_state": -1}, "The 'random_state' parameter"),
        ({"class_weight": "heavy"}, "The 'class_weight' parameter"),
        ({"shuffle": "yes"}, "The 'shuffle' parameter"),
        ({"eta0": np.inf}, r"must be a float in the range \(0\.0, inf\)"),
    ],
)
def test_parameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Perceptron(**options).fit(CORNERS, OR)


@pytest.mark.parametrize(
    "X, start", [([[1e200], [2e200]], [1e200]), ([[1e308, 1e308], [-1e308, 1e308]], [1.0, -1.0])], ids=["inf", "nan"]
)
def test_numbers_too_large(X, start):
    with pytest.raises(ValueError, match=r"the weights are no longer finite after epoch 1; scale X"):
        Perceptron().fit(X, [0, 1], coef_init=np.multiply(start, 1e10))


def test_wrong_input():
    X, y = mixed(3)
    with pytest.raises(ValueError, match="y has one class only, 1; a perceptron takes at least two classes"):
        Perceptron().fit(CORNERS, [1] * 4)
    with pytest.raises(ValueError, match="y has one class only"):
        Perceptron().partial_fit(CORNERS, [1] * 4, classes=[1])
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        Perceptron().partial_fit(X, y)
    with pytest.raises(ValueError, match="class_weight='balanced' counts all rows"):
        Perceptron(class_weight="balanced").partial_fit(X, y, classes=range(3))
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        Perceptron().fit(X, X[:, 0])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        Perceptron().fit(CORNERS, OR[:3])
    with pytest.raises(ValueError, match="contains NaN"):
        Perceptron().fit([[0.0, np.nan], [1.0, 2.0]], [0, 1])
    with pytest.raises(ValueError, match="X has 3 features, but Perceptron is expecting 2"):
        Perceptron().fit(CORNERS, OR).predict(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"sample_weight\[1\] is -1; weights must be >= 0"):
        Perceptron().fit(CORNERS, OR, sample_weight=[1, -1, 1, 1])
    with pytest.raises(ValueError, match=r"coef_init of shape \(12,\) must be finite numbers of shape \(3, 12\)"):
        Perceptron().fit(X, y, coef_init=np.zeros(12))
    with pytest.raises(ValueError, match=r"coef_init of shape \(3,\) must be .* of shape \(1, 2\) or \(2,\)"):
        Perceptron().fit(CORNERS, OR, coef_init=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"intercept_init of shape \(\) must be finite numbers of shape \(1,\) or \(\)"
    ):
        Perceptron().fit(CORNERS, OR, intercept_init=np.nan)


def test_refuses_to_predict_before_fit():
    with pytest.raises(NotFittedError, match="This Perceptron instance is not fitted yet"):
        Perceptron().predict(CORNERS)
    unit = Perceptron()
    with pytest.raises(ValueError, match="at least two classes"):
        unit.fit(CORNERS, [1] * 4)
    with pytest.raises(NotFittedError):
        unit.predict(CORNERS)
