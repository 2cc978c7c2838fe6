"""MLPClassifier and MLPRegressor: scikit-learn's own checks, its own classes beside them, and what they add."""

import copy
import pickle
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.peer
pytest.importorskip("sklearn")

import sklearn.neural_network as theirs  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_digits, make_multilabel_classification, make_regression  # noqa: E402
from sklearn.exceptions import ConvergenceWarning, NotFittedError  # noqa: E402
from sklearn.metrics import d2_pinball_score, roc_auc_score  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer, StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

import gpumlp as gm  # noqa: E402
import gpumlp.backends.gpu_backend  # noqa: E402
from gpumlp import MLPClassifier, MLPRegressor  # noqa: E402

unconverged = pytest.mark.filterwarnings("ignore:Stochastic Optimizer", "ignore:lbfgs failed")
BOTH = pytest.mark.parametrize("cls", [MLPClassifier, MLPRegressor])


def digits(n=600):
    X, y = load_digits(return_X_y=True)
    return X[:n] / 16, y[:n]


def regression(n=400, targets=1):
    X, y = make_regression(n, 8, n_targets=targets, noise=5, random_state=0)
    return X, y / y.std()


def small(cls=MLPClassifier, **options):
    return cls(**{"hidden_layer_sizes": (16,), "max_iter": 5, "random_state": 0, "device": "cpu"} | options)


def data_for(cls):
    return digits(300) if cls is MLPClassifier else regression()


# --- scikit-learn's own checks: no failure is expected


def expected_failures(estimator):
    """None in float64. scikit-learn runs these two checks on its own classes with other settings than the defaults, too."""
    rounds = estimator.dtype is None and estimator.solver != "lbfgs"
    names = ("dense", "sparse") if rounds else ()
    why = "weights and repeated rows agree to float32's rounding, 1e-7, which is what the check allows"
    return {f"check_sample_weight_equivalence_on_{name}_data": why for name in names}


CHECKED = [
    cls(max_iter=100, device="cpu", **options)
    for cls in (MLPClassifier, MLPRegressor)
    for options in ({}, {"dtype": "float64"}, {"solver": "lbfgs"})
]


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(CHECKED, expected_failed_checks=expected_failures)
def test_scikit_learn_s_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    "ours, other", [(MLPClassifier, theirs.MLPClassifier), (MLPRegressor, theirs.MLPRegressor)]
)  # fmt: skip
def test_parameters_and_defaults_are_theirs(ours, other):
    assert other().get_params().items() <= ours().get_params().items()


# --- the same numbers as scikit-learn's own classes


@unconverged
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "sgd"},
        {"solver": "sgd", "learning_rate": "adaptive", "momentum": 0.0, "tol": 0.5, "n_iter_no_change": 1},
        {"solver": "sgd", "learning_rate": "invscaling", "momentum": 0.0, "learning_rate_init": 0.5},
        {"solver": "sgd", "nesterovs_momentum": False, "alpha": 1.0},
        {"activation": "logistic", "hidden_layer_sizes": (12, 7)},
        {"activation": "tanh", "early_stopping": True, "validation_fraction": 0.2},
        {"hidden_layer_sizes": ()},
    ],
)
@pytest.mark.parametrize("problem", ["binary", "several", "labels of a row", "values", "two values", "poisson"])
def test_without_shuffling_a_fit_is_theirs(problem, options):
    X, y = digits(500) if problem in ("binary", "several") else regression(500, 2 if problem == "two values" else 1)
    if problem == "binary":
        y = y % 2
    elif problem == "labels of a row":
        X, y = make_multilabel_classification(500, 12, random_state=0)
        X = X / 10
    elif problem == "poisson":
        y, options = np.round(np.exp(y)), options | {"loss": "poisson"}
    weight = np.tile(np.linspace(0.5, 2, 50), 10)
    kind = "MLPRegressor" if problem in ("values", "two values", "poisson") else "MLPClassifier"
    if options.get("early_stopping"):
        weight = None
    # Adam's epsilon stands elsewhere; too small to count, it leaves the rest comparable.
    options = {
        "epsilon": 1e-14,
        "hidden_layer_sizes": (12,),
        "max_iter": 8,
        "shuffle": False,
        "batch_size": 50,
    } | options
    expected = getattr(theirs, kind)(random_state=1, **options).fit(X, y, weight)
    found = getattr(gm, kind)(random_state=1, device="cpu", **options).fit(X, y, weight)
    for a, b in zip(expected.coefs_ + expected.intercepts_, found.coefs_ + found.intercepts_, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(found.predict(X), expected.predict(X), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=5e-3)
    if options.get("early_stopping"):
        np.testing.assert_allclose(found.validation_scores_, expected.validation_scores_, rtol=1e-3, atol=1e-3)
    for name in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(found, name) == getattr(expected, name), name
    if kind == "MLPClassifier":
        np.testing.assert_allclose(found.predict_proba(X), expected.predict_proba(X), atol=1e-3)
        np.testing.assert_array_equal(found.classes_, expected.classes_)


@unconverged
def test_lbfgs_finds_the_same_minimum():
    X, y = regression()
    options = {"solver": "lbfgs", "alpha": 50.0, "hidden_layer_sizes": (), "random_state": 0, "tol": 1e-8}
    expected = theirs.MLPRegressor(**options).fit(X, y)
    found = MLPRegressor(**options, device="cpu").fit(X, y)
    np.testing.assert_allclose(found.coefs_[0], expected.coefs_[0], atol=1e-5)
    np.testing.assert_allclose(found.loss_, expected.loss_, rtol=1e-8)
    assert 1 < found.n_iter_ < 30 and not hasattr(found, "loss_curve_")


@unconverged
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
def test_accuracy_on_digits_is_theirs_within_noise(solver):
    X, y = digits(1797)
    train, test, y_train, y_test = train_test_split(X, y, random_state=0, stratify=y)
    options = {"solver": solver, "hidden_layer_sizes": (50,), "max_iter": 30, "learning_rate_init": 0.01}
    scores = {
        kind: [make(random_state=seed, **options).fit(train, y_train).score(test, y_test) for seed in range(3)]
        for kind, make in (("theirs", theirs.MLPClassifier), ("ours", MLPClassifier))
    }
    assert np.mean(scores["ours"]) > np.mean(scores["theirs"]) - 0.012, scores


@unconverged
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
def test_r2_is_theirs_within_noise(solver):
    X, y = regression(800)
    train, test, y_train, y_test = train_test_split(X, y, random_state=0)
    options = {"solver": solver, "hidden_layer_sizes": (50,), "max_iter": 40, "learning_rate_init": 0.01}
    scores = {
        kind: [make(random_state=seed, **options).fit(train, y_train).score(test, y_test) for seed in range(3)]
        for kind, make in (("theirs", theirs.MLPRegressor), ("ours", MLPRegressor))
    }
    assert np.mean(scores["ours"]) > np.mean(scores["theirs"]) - 0.01, scores


# --- scikit-learn's tools


@unconverged
@BOTH
def test_pipeline_grid_search_and_clone(cls):
    X, y = data_for(cls)
    pipeline = make_pipeline(StandardScaler(), small(cls))
    search = GridSearchCV(pipeline, {f"{cls.__name__.lower()}__learning_rate_init": [1e-5, 1e-2]}, cv=2).fit(X, y)
    assert search.best_params_ == {f"{cls.__name__.lower()}__learning_rate_init": 1e-2}
    again = clone(search.best_estimator_).fit(X, y)
    np.testing.assert_array_equal(again.predict(X), search.predict(X))


@pytest.mark.filterwarnings("ignore")  # of the workers, too
def test_cross_validation_in_processes():
    X, y = digits(200)
    apart = cross_val_score(small(), X, y, cv=2, n_jobs=2)
    np.testing.assert_array_equal(apart, cross_val_score(small(), X, y, cv=2))


@unconverged
def test_set_output_of_a_step_before_reaches_the_names_of_columns():
    table = pytest.importorskip("pandas").DataFrame(digits(100)[0]).add_prefix("pixel")
    pipeline = make_pipeline(FunctionTransformer(), small()).set_output(transform="pandas")
    pipeline.fit(table, digits(100)[1])
    assert pipeline[-1].feature_names_in_[3] == pipeline[-1].network_.feature_names[3] == "pixel3"


@unconverged
@BOTH
def test_pickle_joblib_and_deepcopy(cls, tmp_path):
    import joblib

    X, y = data_for(cls)
    fitted = small(cls).fit(X, y)
    joblib.dump(fitted, tmp_path / "model")
    for copied in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted), joblib.load(tmp_path / "model")):
        np.testing.assert_array_equal(copied.predict(X), fitted.predict(X))
        reference = copy.deepcopy(fitted).partial_fit(X, y)  # with the optimizer's memory
        np.testing.assert_array_equal(copied.partial_fit(X, y).coefs_[0], reference.coefs_[0])


@unconverged
def test_sparse_input_gives_what_dense_input_gives():
    from scipy import sparse

    X, y = digits()
    dense = small().fit(X, y)
    for kind in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array):
        fitted = small().fit(kind(X), y)
        np.testing.assert_array_equal(fitted.coefs_[0], dense.coefs_[0])
        np.testing.assert_allclose(fitted.predict_proba(kind(X)), dense.predict_proba(X), rtol=1e-10)


# --- fit once more


@unconverged
def test_partial_fit_meets_classes_one_by_one():
    X, y = digits(300)
    for labels in (y, y % 2):
        model = small(learning_rate_init=0.01)
        for label in np.unique(labels):
            model.partial_fit(X[labels == label], labels[labels == label], classes=np.unique(labels))
        assert model.n_iter_ == 1 and len(model.loss_curve_) == len(np.unique(labels)) and model.t_ == 300
        for _ in range(80):
            model.partial_fit(X, labels)
        assert model.score(X, labels) > 0.9
    with pytest.raises(ValueError, match=r"`y` has classes not in `self\.classes_`"):
        model.partial_fit(X, labels + 5)


@unconverged
def test_partial_fit_epochs_are_those_of_one_fit():
    X, y = digits(300)
    whole = small(max_iter=4).fit(X, y)
    parts = small()
    for _ in range(4):
        parts.partial_fit(X, y, classes=np.unique(y))
    np.testing.assert_array_equal(parts.coefs_[0], whole.coefs_[0])


@unconverged
def test_warm_start_goes_on():
    X, y = digits(300)
    model = small(warm_start=True).fit(X, y)
    before = model.loss_
    model.fit(X, y)
    assert model.loss_ < before and len(model.loss_curve_) == 10 and model.n_iter_ == 5
    model.set_params(solver="lbfgs").fit(X, y).set_params(solver="sgd", early_stopping=True).fit(X, y)
    assert model.best_loss_ is None and len(model.validation_scores_) == 5
    assert not hasattr(model.set_params(solver="lbfgs", warm_start=False).fit(X, y), "loss_curve_")
    model = small(warm_start=True).fit(X, y)
    with pytest.raises(ValueError, match="warm_start can only be used where `y` has the same classes"):
        model.fit(X[y > 0], y[y > 0])


def test_a_fit_that_needs_longer_says_so():
    X, y = digits(300)
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(5\) reached"):
        small().fit(X, y)
    with pytest.warns(ConvergenceWarning, match="lbfgs failed to converge after 5 iteration"):
        small(solver="lbfgs").fit(X, y)
    with pytest.warns(ConvergenceWarning, match="max_fun=3"):
        assert small(solver="lbfgs", max_fun=3).fit(X, y).n_iter_ == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(tol=10, max_iter=50).fit(X, y).n_iter_ == 12  # scikit-learn's count: the first, and 11 no better


def test_verbose_prints_what_scikit_learn_prints(capsys):
    X, y = digits(300)
    small(verbose=True, tol=10, n_iter_no_change=1, max_iter=9, early_stopping=True).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Iteration 1, loss = ") and lines[1].startswith("Validation score: ")
    assert lines[-1] == ("Validation score did not improve more than tol=10.000000 for 1 consecutive epochs. Stopping.")


# --- what they add


@unconverged
def test_an_activation_for_each_layer_norm_and_dropout():
    X, y = digits()
    model = small(hidden_layer_sizes=(20, 10), activation=["gelu", "leaky_relu(0.2)"], norm="batch", dropout=0.1)
    model.set_params(max_iter=40, learning_rate_init=0.02).fit(X, y)
    assert model.score(X, y) > 0.95
    assert [c.shape for c in model.coefs_] == [(64, 20), (20, 10), (10, 10)]
    assert [b.shape for b in model.intercepts_] == [(20,), (10,), (10,)] and not model.intercepts_[0].any()
    assert [place.layer.f.spec for place in model.network_.places[1:]] == ["gelu", "leaky_relu(0.2)", "identity"]


@pytest.mark.parametrize("loss", ["absolute_error", "huber", "poisson", "squared_error"])
@unconverged
def test_other_losses_learn(loss):
    X, y = regression()
    y = np.round(np.exp(y)) if loss == "poisson" else y
    model = small(MLPRegressor, loss=loss, max_iter=100, learning_rate_init=0.01).fit(X, y)
    assert model.score(X, y) > 0.8


@unconverged
def test_quantiles_do_not_cross_and_cover():
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (1500, 2))
    y = X[:, 0] + rng.normal(0, 0.2 + 0.3 * (X[:, 1] > 0))
    model = small(MLPRegressor, loss="quantile", quantiles=(0.05, 0.5, 0.95), max_iter=60, learning_rate_init=0.01)
    bands = model.set_params(early_stopping=True).fit(X, y).predict(X)
    assert bands.shape == (1500, 3) and (np.diff(bands, axis=1) >= 0).all()
    assert 0.85 < ((bands[:, 0] < y) & (y < bands[:, 2])).mean() < 0.95
    expected = np.mean([d2_pinball_score(y, bands[:, i], alpha=q) for i, q in enumerate((0.05, 0.5, 0.95))])
    assert model.score(X, y) == pytest.approx(expected)
    assert model.validation_scores_[0] == -model.validation_loss_curve_[0]
    assert small(MLPRegressor, loss="quantile").fit(X, y).predict(X).shape == (1500,)


@unconverged
def test_class_weight_is_sample_weight():
    X, y = digits(300)
    y = np.where(y == 0, "rare", "common")
    by_class = small(class_weight={"rare": 3.0}).fit(X, y)
    by_row = small().fit(X, y, np.where(y == "rare", 3.0, 1.0))
    np.testing.assert_array_equal(by_class.coefs_[0], by_row.coefs_[0])
    options = {"early_stopping": True, "learning_rate_init": 0.01, "max_iter": 8}
    held, plain = small(class_weight="balanced", **options).fit(X, y), small(**options).fit(X, y)
    assert (held.predict(X) == "rare").sum() > (plain.predict(X) == "rare").sum()
    np.testing.assert_array_equal(by_class.network_.predict(X), by_class.predict(X))


@unconverged
def test_own_validation_rows_and_scorer():
    X, y = digits(500)
    y = y % 2
    model = small(scoring="roc_auc", max_iter=12)
    model.fit(X[:400], y[:400], X_val=X[400:], y_val=y[400:])
    assert len(model.validation_scores_) == len(model.validation_loss_curve_) == 12
    last = roc_auc_score(y[400:], model.predict_proba(X[400:])[:, 1])
    assert model.validation_scores_[-1] == pytest.approx(last)
    log_loss = -np.log(model.predict_proba(X[400:])[np.arange(100), y[400:]]).mean()
    assert model.validation_loss_curve_[-1] == pytest.approx(log_loss)
    stopped = small(early_stopping=True, scoring="roc_auc", max_iter=100, n_iter_no_change=3, learning_rate_init=0.02)
    stopped.fit(X[:400], y[:400], X_val=X[400:], y_val=y[400:])
    assert stopped.n_iter_ < 100
    best = roc_auc_score(y[400:], stopped.predict_proba(X[400:])[:, 1])
    assert best == pytest.approx(stopped.best_validation_score_) == max(stopped.validation_scores_)


@unconverged
def test_schedule_clipping_smoothing_callbacks_time_and_dtype():
    X, y = digits(300)

    class Seen:
        rates: list = []  # noqa: RUF012

        def on_epoch_end(self, trainer, record):
            self.rates.append(record["learning_rate"])

    model = small(schedule="cosine", max_grad_norm=1.0, label_smoothing=0.1, callbacks=[Seen()], dtype="float32")
    model.fit(X, y)
    assert len(Seen.rates) == 5 and (np.diff(Seen.rates) < 0).all()
    assert model.coefs_[0].dtype == np.float32 and small().fit(X, y).coefs_[0].dtype == np.float32
    assert small(dtype="float64").fit(X, y).coefs_[0].dtype == np.float64
    assert small(solver="lbfgs").fit(X, y).coefs_[0].dtype == np.float64  # X's own
    assert small().fit(X.astype("float32"), y).coefs_[0].dtype == np.float32
    short = small(max_iter=1_000_000, tol=0, time_limit=0.2).fit(X, y)
    assert 0 < short.n_iter_ < 1_000_000


def test_diverging():
    X, y = regression()
    with pytest.raises(ValueError, match="Solver produced non-finite parameter weights"):
        small(MLPRegressor, solver="sgd", learning_rate_init=1e6, max_iter=100).fit(X, y)
    model = small(
        MLPRegressor, solver="sgd", activation="identity", learning_rate_init=9.0, early_stopping=True, max_iter=99
    )
    with pytest.warns(ConvergenceWarning, match="the best weights before that are kept"):
        model.set_params(n_iter_no_change=np.inf).fit(10 * X, y)
    assert np.isfinite(model.predict(X)).all() and np.isfinite(model.best_validation_score_)


@unconverged
@pytest.mark.parametrize(
    "options",
    [{"early_stopping": True}, {"solver": "lbfgs"}, {"solver": "sgd", "learning_rate": "adaptive", "tol": 9.0}],
)
@BOTH
def test_on_an_emulated_device_as_on_the_host(cls, options, monkeypatch):
    emulator = pytest.importorskip("emulator")
    for module in (gm.backends.gpu_backend, gm.backends.gpu_work):
        monkeypatch.setattr(module, "PARTIALS", 3)
    X, y = (digits(60)[0][:, 20:26], digits(60)[1] % 3) if cls is MLPClassifier else (v[:60] for v in regression())
    options = {"max_iter": 3, "hidden_layer_sizes": (7,), "batch_size": 20, "n_iter_no_change": 1} | options
    options |= {"dtype": "float32", "random_state": 0}
    device = gm.backends.gpu_backend.GpuBackend(emulator.EmulatedRuntime(prefer=1))
    there = cls(device=device, **options).fit(X, y)
    here = cls(device="cpu", **options).fit(X, y)
    np.testing.assert_allclose(there.coefs_[0], here.coefs_[0], atol=2e-4)
    np.testing.assert_allclose(there.loss_, here.loss_, rtol=1e-3)
    assert there.n_iter_ == here.n_iter_
    if here.solver != "lbfgs":
        for model in (there, here):
            model.set_params(early_stopping=False).partial_fit(X, y)
        np.testing.assert_allclose(there.coefs_[0], here.coefs_[0], atol=4e-4)


# --- wrong input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_layer_sizes": (3, 0)}, r"hidden_layer_sizes must be > 0, got \[3, 0\]"),
        ({"activation": "swoosh"}, "activation='swoosh' is unknown"),
        ({"activation": ["relu", "tanh"]}, "has 2 entries for 1 hidden layers"),
        ({"solver": "newton"}, "The 'solver' parameter of MLP"),
        ({"alpha": -1}, "The 'alpha' parameter of MLP"),
        ({"momentum": 1.0}, "The 'momentum' parameter of MLP"),
        ({"dropout": 1.0}, "The 'dropout' parameter of MLP"),
        ({"norm": "group"}, "The 'norm' parameter of MLP"),
        ({"dtype": "float16"}, "The 'dtype' parameter of MLP"),
        ({"time_limit": 0}, "The 'time_limit' parameter of MLP"),
        ({"schedule": "zigzag"}, "schedule='zigzag' is unknown"),
        ({"schedule": "cosine", "solver": "sgd", "learning_rate": "adaptive"}, "cannot be joined with this"),
        ({"max_grad_norm": 1.0, "solver": "lbfgs"}, "max_grad_norm=1.0 is for solver='adam' or 'sgd'"),
        ({"scoring": "beauty", "early_stopping": True}, "beauty"),
        ({"early_stopping": True, "validation_fraction": 0.001}, "The validation set is too small"),
    ],
)
@BOTH
def test_parameters_out_of_range(cls, options, message):
    with pytest.raises(ValueError, match=message):
        small(cls, **options).fit(*data_for(cls))


@unconverged
def test_wrong_input():
    X, y = digits(100)
    for quantiles in [(), (0.5, 0.1), (0.0, 0.5), 0.5]:
        with pytest.raises(ValueError, match="quantiles"):
            small(MLPRegressor, loss="quantile", quantiles=quantiles).fit(X, y)
    with pytest.raises(ValueError, match="loss='quantile' takes one column of y, got 2"):
        small(MLPRegressor, loss="quantile").fit(X, np.stack([y, y], axis=1))
    with pytest.raises(ValueError, match="X_val and y_val belong together"):
        small().fit(X, y, X_val=X)
    with pytest.raises(ValueError, match="sample_weight_val weighs the rows of X_val"):
        small().fit(X, y, sample_weight_val=y)
    with pytest.raises(ValueError, match=r"`y` has classes not in `self\.classes_`"):
        small().fit(X[y < 9], y[y < 9], X_val=X, y_val=y)
    with pytest.raises(ValueError, match="class_weight='balanced' counts all rows"):
        small(class_weight="balanced").partial_fit(X, y, classes=range(10))
    with pytest.raises(ValueError, match="partial_fit does not support early_stopping=True"):
        small(early_stopping=True).partial_fit(X, y, classes=range(10))
    with pytest.raises(ValueError, match="partial_fit has no end to plan for"):
        small(schedule="cosine").partial_fit(X, y, classes=range(10))
    with pytest.warns(UserWarning, match="It is going to be clipped"):
        small(batch_size=500).fit(X, y)
    with pytest.raises(AttributeError, match="partial_fit"):
        small(solver="lbfgs").partial_fit  # noqa: B018
    with pytest.raises(AttributeError, match="this MLPClassifier is not fitted yet: call fit first"):
        small().coefs_  # noqa: B018
    with pytest.raises(NotFittedError):
        small().predict(X)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        small().fit(X, X[:, 20] / 3)
