"""MLPClassifier and MLPRegressor over tables as they come: categories, missing cells, several libraries' tables."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:Stochastic Optimizer"),
    pytest.mark.filterwarnings("ignore:lbfgs failed"),
]
pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")

from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.metrics import r2_score  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer  # noqa: E402

import gpumlp as gm  # noqa: E402
from gpumlp import MLPClassifier, MLPRegressor  # noqa: E402

DATA = Path(os.environ.get("GPUMLP_DATA", Path(__file__).parents[2] / "shared" / "data"))
SMALL = {"hidden_layer_sizes": (16,), "max_iter": 30, "random_state": 0, "device": "cpu", "learning_rate_init": 0.02}


def homes(n=400, seed=0):
    """Prices by size, kind and one of 90 streets, with missing cells; and whether a home was sold."""
    rng = np.random.default_rng(seed)
    size, kind, street = rng.uniform(20, 200, n), rng.choice(["boat", "flat", "house"], n), rng.integers(0, 90, n)
    price = 1000 * size * np.where(kind == "house", 2.0, 1.0) + 2000 * street
    table = pd.DataFrame(
        {"size": size, "kind": pd.Categorical(kind), "street": [f"s{s}" for s in street], "garden": rng.random(n) < 0.5}
    )
    table.loc[::11, "size"] = np.nan
    table.loc[::13, "kind"] = None
    return table, price, np.where(price > np.median(price), "sold", "free")


def small(cls=MLPClassifier, **options):
    return cls(**(SMALL | options))


def test_a_table_is_encoded_and_learned():
    table, price, sold = homes()
    model = small().fit(table, sold)
    assert model.score(table, sold) > 0.93 and model.classes_.tolist() == ["free", "sold"]
    assert model.feature_names_in_.tolist() == list(table) and model.n_features_in_ == 4
    assert model.encoder_.code_names == ["street"] and "missing cells filled with" in model.encoder_.report()
    codes = 1 + table["street"].nunique()
    assert model.network_.code_sizes == (codes,)
    assert model.network_.parameters["embedding_0.E"].shape == (1, codes, 8)
    assert model.coefs_[0].shape == (model.encoder_.n_features - 1 + 8, 16)
    regressor = small(MLPRegressor, max_iter=60).fit(table, price)
    assert regressor.score(table, price) > 0.97 and regressor.network_.standardize_targets
    assert np.abs(regressor.predict(table).mean() / price.mean() - 1) < 0.05


def test_columns_by_name_unknown_categories_and_missing_cells_later():
    table, _, sold = homes()
    model = small().fit(table, sold)
    p = model.predict_proba(table)
    turned = table[list(table)[::-1]].assign(more="ignored")
    np.testing.assert_array_equal(model.predict_proba(turned), p)
    new = pd.DataFrame(
        {"size": [np.nan, 50.0], "kind": ["castle", None], "street": ["s1", "nowhere"], "garden": [True, None]}
    )
    assert np.isfinite(model.predict_proba(new)).all()
    with pytest.raises(ValueError, match="the table lacks the columns 'kind'"):
        model.predict(table.drop(columns="kind"))


@pytest.mark.parametrize("library", ["polars", "pyarrow", "dict"])
def test_tables_of_other_libraries(library):
    table, _, sold = homes()
    columns = {name: [None if pd.isna(v) else v for v in table[name]] for name in table}
    if library == "polars":
        other = pytest.importorskip("polars").DataFrame(columns)
    elif library == "pyarrow":
        other = pytest.importorskip("pyarrow").table(columns)
    else:
        other = columns
    ours = small(max_iter=3).fit(table, sold)
    theirs = small(max_iter=3).fit(other, sold)
    np.testing.assert_array_equal(theirs.predict_proba(other), ours.predict_proba(table))
    np.testing.assert_array_equal(ours.predict_proba(other), ours.predict_proba(table))


def test_numbers_alone_stay_as_scikit_learn_leaves_them():
    X, y = load_digits(return_X_y=True)
    X, y = X[:300], y[:300]
    frame = pd.DataFrame(X, columns=[f"p{i}" for i in range(64)])
    array, named = small(max_iter=3).fit(X, y), small(max_iter=3).fit(frame, y)
    assert named.encoder_ is None and array.encoder_ is None
    np.testing.assert_array_equal(named.predict_proba(frame), array.predict_proba(X))
    scaled = small(max_iter=3, scaling="standard").fit(X, y)
    assert scaled.encoder_ is not None and scaled.n_features_in_ == 64
    piecewise = small(max_iter=3, scaling="piecewise").fit(frame, y)
    assert piecewise.encoder_.n_features > 64 and piecewise.score(frame, y) > 0.3
    codes = small(max_iter=3, categorical_features=[3, 4], one_hot_limit=0).fit(X, y)
    assert codes.encoder_.code_names == ["x3", "x4"]


@pytest.mark.parametrize("y", ["sold", "price"])
def test_early_stopping_learns_nothing_from_held_out_rows(y):
    table, price, sold = homes(120)
    table["street"] = [f"only {i}" for i in range(len(table))]  # each row a category of its own
    cls, y = (MLPClassifier, sold) if y == "sold" else (MLPRegressor, price)
    model = small(cls, early_stopping=True, one_hot_limit=500, scoring=None if cls is MLPRegressor else "roc_auc").fit(
        table, y
    )
    words = len(model.encoder_.columns[2].words)
    assert words == 108 and len(model.validation_scores_) == model.n_iter_
    assert model.n_features_in_ == 4 and np.isfinite(model.validation_scores_).all()


def test_own_validation_rows():
    table, price, _ = homes()
    model = small(MLPRegressor, max_iter=10)
    model.fit(table[:300], price[:300], X_val=table[300:], y_val=price[300:])
    assert len(model.validation_scores_) == 10
    assert model.validation_scores_[-1] == pytest.approx(r2_score(price[300:], model.predict(table[300:])), abs=1e-5)


def test_searches_pipelines_clones_and_pickles():
    table, _, sold = homes(200)
    model = small(max_iter=4)
    search = GridSearchCV(
        model, {"scaling": ["standard", "piecewise", None], "one_hot_limit": [3, 200]}, cv=2, n_jobs=2
    )
    assert search.fit(table, sold).best_score_ > 0.5
    steps = make_pipeline(FunctionTransformer(lambda t: t[["size", "kind"]]), clone(model))
    assert np.isfinite(cross_val_score(steps, table, sold, cv=2)).all()
    fitted = clone(model).fit(table, sold)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(table), fitted.predict_proba(table))


def test_a_file_takes_raw_rows(tmp_path):
    table, price, sold = homes()
    for model, y in ((small(max_iter=3), sold), (small(MLPRegressor, max_iter=3), price)):
        model.fit(table, y).network_.save(tmp_path / "model.safetensors")
        network = gm.load(tmp_path / "model.safetensors")
        np.testing.assert_allclose(np.asarray(network.logits(table)), model.network_.logits(table))
        if y is sold:
            assert (network.predict(table) == model.predict(table)).all()
        else:
            np.testing.assert_allclose(network.predict(table), model.predict(table), rtol=1e-6)


def test_going_on():
    table, _, sold = homes()
    model = small(warm_start=True, max_iter=2).fit(table[:200], sold[:200])
    encoder = model.encoder_
    model.fit(table[200:], sold[200:])
    assert model.encoder_ is encoder
    steps = small()
    for start in range(0, 400, 100):
        steps.partial_fit(table[start : start + 100], sold[start : start + 100], classes=["free", "sold"])
    assert steps.encoder_ is not None and steps.t_ == 400 and set(steps.predict(table)) <= {"free", "sold"}


def test_averaged_weights():
    table, _, sold = homes()
    plain, averaged = small(max_iter=8).fit(table, sold), small(max_iter=8, ema=0.9).fit(table, sold)
    assert averaged.score(table, sold) > 0.7 and not np.array_equal(plain.coefs_[0], averaged.coefs_[0])
    assert averaged.loss_curve_ == pytest.approx(plain.loss_curve_, rel=0.05)
    with pytest.raises(ValueError, match=r"ema=0\.9 averages over a whole fit, which partial_fit is not"):
        small(ema=0.9).partial_fit(table, sold, classes=["free", "sold"])
    with pytest.raises(ValueError, match="ema"):
        small(ema=0.9, solver="lbfgs").fit(table, sold)


@pytest.mark.parametrize(
    "options", [{"solver": "lbfgs"}, {"solver": "sgd"}, {"loss": "quantile", "quantiles": (0.1, 0.9)}]
)
def test_every_solver_and_loss(options):
    table, price, _ = homes()
    model = small(MLPRegressor, **options).fit(table, price)
    predicted = model.predict(table)
    assert np.isfinite(predicted).all() and 0.3 < predicted.mean() / price.mean() < 3
    poisson = small(MLPRegressor, loss="poisson").fit(table, price / 1e5)
    assert not poisson.network_.standardize_targets and (poisson.predict(table) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "minmax"}, "The 'scaling' parameter of MLPClassifier must be"),
        ({"impute": "zero"}, "The 'impute' parameter of MLPClassifier must be"),
        ({"embedding_size": 0}, "The 'embedding_size' parameter"),
        ({"one_hot_limit": -1}, "The 'one_hot_limit' parameter"),
        ({"ema": 1.0}, "The 'ema' parameter"),
        ({"categorical_features": ["knid"]}, "categorical_features names 'knid', which the table does not have"),
    ],
)
def test_parameters_out_of_range(options, message):
    table, _, sold = homes(40)
    with pytest.raises(ValueError, match=message):
        small(**options).fit(table, sold)


def test_wrong_tables():
    from scipy.sparse import csr_array

    table, _, sold = homes(40)
    with pytest.raises(ValueError, match="scaling='standard' is for tables, X is sparse"):
        small(scaling="standard").fit(csr_array(np.eye(4)), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        small().fit(table, sold[:-1])
    with pytest.raises(ValueError, match='column "size", row 3: inf is infinite'):
        small().fit(table.assign(size=[1.0, 2.0, 3.0, np.inf, *range(36)]), sold)
    with pytest.raises(ValueError, match="Input X contains NaN"):  # an array with NaN is refused, as scikit-learn does
        small().fit(np.array([[1.0, np.nan], [2.0, 3.0]]), [0, 1])
    assert small(scaling="standard").fit(np.array([[1.0, np.nan], [2.0, 3.0]] * 5), [0, 1] * 5).encoder_ is not None


@pytest.mark.parametrize("cls", [MLPClassifier, MLPRegressor])
def test_a_fit_that_fails_leaves_the_estimator_as_it_was(cls):
    table, price, sold = homes(60)
    y = sold if cls is MLPClassifier else price
    model = small(cls, max_iter=2).fit(table, y)
    before, encoder = model.predict(table), model.encoder_
    wrong = table.rename(columns={"size": "area"})
    wrong.loc[3, "area"] = np.inf
    with pytest.raises(ValueError, match='column "area", row 3: inf is infinite'):
        model.fit(wrong, y)
    with pytest.raises(ValueError, match="activation='nonsense' is unknown"):
        model.set_params(activation="nonsense").fit(table.rename(columns={"size": "area"}), y)
    assert model.encoder_ is encoder and model.feature_names_in_.tolist() == list(table)
    np.testing.assert_array_equal(model.predict(table), before)


def test_a_first_fit_that_fails_leaves_nothing():
    from sklearn.exceptions import NotFittedError

    table, _, sold = homes(60)
    model = small()
    with pytest.raises(ValueError, match="is infinite"):
        model.fit(table.assign(size=np.inf), sold)
    with pytest.raises(NotFittedError):
        model.predict(table)


def test_a_scorer_of_ones_own_sees_the_table():
    table, _, sold = homes(200)
    seen = []

    def scorer(estimator, X, y):
        seen.append((type(X), list(X), len(X), len(y)))
        return (estimator.predict(X) == y).mean()

    model = small(max_iter=3, early_stopping=True, scoring=scorer).fit(table, sold)
    assert seen == [(pd.DataFrame, list(table), 20, 20)] * 3 and len(model.validation_scores_) == 3
    model.fit(table, sold, X_val=table[:50], y_val=sold[:50])
    assert seen[-1][2:] == (50, 50)


def test_columns_of_numbers_in_a_dict():
    numbers = {"a": [1.0, 2.0, 3.0, 4.0] * 10, "b": list(range(40))}
    model = small(MLPRegressor, max_iter=2).fit(numbers, numbers["a"])
    assert model.encoder_.scaling is None and model.feature_names_in_.tolist() == ["a", "b"]
    array = small(MLPRegressor, max_iter=2, standardize_targets=True).fit(
        np.array(list(numbers.values())).T, numbers["a"]
    )
    np.testing.assert_allclose(model.predict(numbers), array.predict(np.array(list(numbers.values())).T), rtol=1e-6)


def test_a_file_read_as_a_table(tmp_path):
    table, _, sold = homes(80)
    table.assign(sold=sold).to_csv(tmp_path / "homes.csv", index=False)
    data = gm.data.load_table(tmp_path / "homes.csv", target="sold")
    ours = small(max_iter=2).fit(data.X, data.classes[data.y])
    np.testing.assert_array_equal(ours.predict_proba(data.X), small(max_iter=2).fit(table, sold).predict_proba(table))


def test_while_it_is_fitted_a_network_takes_tables(tmp_path):
    table, _, sold = homes(80)

    class Saves(gm.Callback):
        def on_epoch_end(self, trainer, record):
            trainer.network.save(tmp_path / "model.safetensors")
            assert np.isfinite(model.predict_proba(table)).all()

    model = small(max_iter=2, callbacks=[Saves()])
    model.fit(table, sold)
    np.testing.assert_allclose(gm.load(tmp_path / "model.safetensors").logits(table), model.network_.logits(table))


def test_lbfgs_computes_in_float64():
    table, price, _ = homes(80)
    assert small(MLPRegressor, solver="lbfgs", max_iter=2).fit(table, price).network_.dtype == np.float64


def test_bools_among_numbers_are_numbers():
    X = np.random.default_rng(0).normal(size=(60, 3))
    X[:, 1] = X[:, 1] > 0
    y = (X[:, 0] > 0).astype(int)
    frame = pd.DataFrame(X).astype({1: "bool"})
    model = small(max_iter=2).fit(frame.rename(columns=str), y)
    assert model.encoder_ is None
    np.testing.assert_array_equal(model.coefs_[0], small(max_iter=2).fit(X, y).coefs_[0])


def test_adult():
    """README.md's figures: with early stopping, and the recipe; on the official test rows."""
    folder = DATA / "adult"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set GPUMLP_DATA)")
    train, test = pd.read_csv(folder / "train.csv.gz"), pd.read_csv(folder / "test.csv.gz")
    y, y_test = train.pop("income"), test.pop("income")
    model = MLPClassifier(early_stopping=True, random_state=0, device="cpu").fit(train, y)
    assert model.score(test, y_test) >= 0.852
