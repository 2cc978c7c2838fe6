"""gm.Embedding: codes of categories as vectors, their gradient, and networks over tables that have an encoder."""

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.data.encoding import TableEncoder

SIZES = (4, 7)


def rows(n=60, seed=0):
    """Two numbers and two columns of codes, and labels that hang on a code alone and on a number with a code."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(1, size, n) for size in SIZES], axis=1)
    X = np.concatenate([rng.normal(size=(n, 2)), codes], axis=1)
    return X, ((codes[:, 1] % 2 == 1) ^ (X[:, 0] > 0)).astype(int)


def network(**options):
    layers = [gm.Embedding(SIZES, units=3), gm.Dense(9, "tanh"), gm.Dense(2)]
    return gm.Network(layers, **{"n_features": 4, "seed": 3} | options)


def test_what_it_computes():
    net = network(dtype="float64")
    E = net.parameters["embedding_0.E"][0]
    assert E.shape == (11, 3) and not E[[0, 4]].any() and E[[1, 2, 3, 5]].any(axis=1).all()
    X = np.array([[0.5, -1.0, 2, 6], [0.0, 3.0, 0, 1]])
    seen = np.concatenate([X[:, :2], E[[2, 0]], E[[4 + 6, 4 + 1]]], axis=1)
    p = net.parameters
    z = np.tanh(seen @ p["dense_0.W"][0].T + p["dense_0.b"][0]) @ p["dense_1.W"][0].T + p["dense_1.b"][0]
    np.testing.assert_allclose(net.logits(X), z, rtol=1e-12)
    assert "embedding_0" in net.summary() and net.n_parameters == 33 + 9 * 8 + 9 + 18 + 2


@pytest.mark.parametrize("models", [None, 3])
def test_its_gradient(models):
    X, y = rows()
    net = network(models=models, dtype="float64")
    net.loss = "softmax_cross_entropy"
    errors = net.gradient_check(X, y)
    assert set(errors) == set(net.parameters) and max(errors.values()) < 1e-6


def test_codes_that_no_row_has_get_no_gradient():
    X, y = rows()
    net = network()
    value, dz = gm.Loss("softmax_cross_entropy")(net.forward(X), y)
    net.backward(dz)
    dE = net.gradients["embedding_0.E"][0]
    assert not dE[[0, 4]].any() and dE[[1, 2, 3]].any(axis=1).all() and np.isfinite(value)


@pytest.mark.parametrize("options", [{"standardize": True}, {"standardize": "global"}, {}])
def test_it_learns_and_codes_stay_codes(options):
    X, y = rows(600)
    X[:, :2] = 5 + 3 * X[:, :2]
    net = network(**options)
    trainer = gm.Trainer(net, "softmax_cross_entropy", gm.Adam(learning_rate=0.02))
    trainer.fit(X, y, epochs=40, batch_size=32, progress=False)
    assert trainer.evaluate(X, y)["accuracy"] > 0.97
    if options:
        assert (net.shift[:, 2:] == 0).all() and (net.scale[:, 2:] == 1).all() and (net.scale[:, :2] < 1).all()


def test_models_of_a_fleet_are_their_lone_twins():
    X, y = rows(200)
    fleet = network(models=3, seed=[5, 6, 7])
    gm.Trainer(fleet, "softmax_cross_entropy").fit(X, y, epochs=2, batch_size=16, progress=False)
    for i, seed in enumerate((5, 6, 7)):
        alone = network(seed=seed)
        gm.Trainer(alone, "softmax_cross_entropy").fit(X, y, epochs=2, batch_size=16, progress=False)
        np.testing.assert_array_equal(alone.flat[0], fleet.flat[i])


def test_files_and_copies(tmp_path):
    X, y = rows()
    net = network(standardize=True)
    gm.Trainer(net, "softmax_cross_entropy").fit(X, y, epochs=1, progress=False)
    net.save(tmp_path / "model.safetensors")
    for again in (gm.load(tmp_path / "model.safetensors"), net.copy()):
        np.testing.assert_array_equal(again.logits(X), net.logits(X))
        assert again.code_sizes == SIZES


def test_a_training_goes_on_with_the_same_bits(tmp_path):
    X, y = rows()
    options = {"epochs": 4, "batch_size": 16, "progress": False}
    whole = gm.Trainer(network(), "softmax_cross_entropy")
    whole.fit(X, y, **options)
    first = gm.Trainer(network(), "softmax_cross_entropy")
    first.fit(X, y, **options | {"epochs": 2}, callbacks=[gm.Checkpoint(tmp_path)])
    second = gm.Trainer(network(), "softmax_cross_entropy")
    second.fit(X, y, **options, callbacks=[gm.Checkpoint(tmp_path)], resume=tmp_path)
    np.testing.assert_array_equal(second.network.flat, whole.network.flat)


def test_in_a_graph():
    x = gm.Input(4)
    seen = gm.Embedding(SIZES, units=2)(x)
    net = gm.Network(x, gm.Dense(2)(gm.Concat()(seen, gm.Dense(5, "relu")(seen))), dtype="float64", seed=1)
    X, y = rows()
    net.loss = "softmax_cross_entropy"
    assert max(net.gradient_check(X, y).values()) < 1e-6
    assert gm.Network(x, gm.Dense(1)(seen)).code_sizes == SIZES


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gm.Embedding(()), r"sizes=\(\) must be a list with the number of codes of each column"),
        (lambda: gm.Embedding(5), "sizes=5 must be a list with the number of codes of each column"),
        (lambda: gm.Embedding((3, 0)), "sizes=0 must be an integer of at least 1"),
        (lambda: gm.Embedding((3,), 0), "units=0 must be an integer of at least 1"),
        (lambda: gm.Embedding((3,), initializer="ones"), "initializer='ones' is unknown"),
        (
            lambda: gm.Network([gm.Dense(3), gm.Embedding((3,))], n_features=4),
            "a list of layers holds gm.Dense layers, and perhaps a gm.Embedding before them",
        ),
        (
            lambda: gm.Network([gm.Embedding((3,) * 5), gm.Dense(3)], n_features=4),
            "embedding_0 has sizes for 5 columns of codes, the Input has 4 columns",
        ),
        (
            lambda: gm.Network([gm.Embedding((3,)), gm.Dense(3)], n_features=4, input_dropout=0.1),
            "input dropout would make 0 of codes",
        ),
        (
            lambda: gm.Trainer(network(), "softmax_cross_entropy", augment=gm.GaussianNoise(0.1)),
            "augment changes numbers, and this network's rows hold codes",
        ),
        (
            lambda: network().predict([[0.0, 0.0, 1, 7]]),
            r"X holds 7 at row 0, column 3, a column of codes; they are whole numbers from 0 to 6",
        ),
        (lambda: network().predict([[0.0, 0.0, 0.5, 1]]), r"X holds 0.5 at row 0, column 2, a column of codes"),
    ],
)
def test_what_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_nothing_else_reads_codes():
    x = gm.Input(4)
    both = gm.Concat()(gm.Embedding(SIZES)(x), gm.Dense(3)(x))
    with pytest.raises(ValueError, match=r"embedding_0 must read the Input, and nothing else may.*\(now: dense_0\)"):
        gm.Network(x, gm.Dense(1)(both))
    deep = gm.Embedding(SIZES)(gm.Dense(4)(x))
    with pytest.raises(ValueError, match="embedding_0 must read the Input"):
        gm.Network(x, gm.Dense(1)(deep))


# --- networks over tables


TABLE = {
    "age": [30.0, None, 50.0, 41.0, 29.0, 33.0] * 20,
    "city": ["Oslo", "Rome", None, "Bonn", "Kyiv", "Rome"] * 20,
    "member": [True, False, True, True, False, False] * 20,
}
BOUGHT = ["no", "yes", "no", "no", "yes", "yes"] * 20


@pytest.mark.parametrize("one_hot_limit", [0, 3, 64])
def test_a_network_over_a_table(one_hot_limit, tmp_path):
    encoder = TableEncoder(one_hot_limit=one_hot_limit).fit(TABLE)
    net = gm.Network([gm.Dense(8, "relu"), gm.Dense(2)], encoder=encoder, seed=1)
    assert net.code_sizes == tuple(encoder.code_sizes) and net.feature_names == ["age", "city", "member"]
    trainer = gm.Trainer(net, "softmax_cross_entropy", gm.Adam(learning_rate=0.02))
    trainer.fit(TABLE, BOUGHT, epochs=20, batch_size=16, validation_split=0.2, progress=False)
    assert trainer.evaluate(TABLE, BOUGHT)["accuracy"] == 1.0
    net.save(tmp_path / "model.safetensors")
    again = gm.load(tmp_path / "model.safetensors")
    assert again.encoder.report() == encoder.report()
    new = {"member": [True, None], "city": ["Atlantis", ""], "age": ["?", 12], "more": [object(), object()]}
    np.testing.assert_array_equal(again.predict_proba(new), net.predict_proba(new))
    assert set(again.predict(new)) <= {"no", "yes"}
    np.testing.assert_array_equal(net.copy().predict_proba(new), net.predict_proba(new))
    (tmp_path / "second.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert gm.load(tmp_path / "second.safetensors").encoder.describe() == encoder.describe()


def test_a_loop_of_ones_own_over_a_table():
    net = gm.Network([gm.Dense(2)], encoder=TableEncoder(one_hot_limit=0).fit(TABLE))
    X = net.check_X(TABLE)
    assert net.forward(X[:5]).shape == (5, 2)
    np.testing.assert_array_equal(net.forward(X, training=False), net.logits(TABLE))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda e: gm.Network([gm.Dense(2)], encoder=e, n_features=2),
            ValueError,
            "n_features=2 but the encoder makes 5 columns; leave n_features out",
        ),
        (
            lambda e: gm.Network([gm.Dense(2)], encoder="auto"),
            TypeError,
            "encoder='auto' must be a gm.TableEncoder that",
        ),
        (
            lambda e: gm.Network([gm.Dense(2)], encoder=TableEncoder()),
            RuntimeError,
            "has learned nothing yet; call fit",
        ),
        (
            lambda e: gm.Network([gm.Embedding((3,)), gm.Dense(2)], encoder=e),
            ValueError,
            r"the encoder makes 5 columns, with codes of sizes \[6\] at their end; .* takes 5, with codes of sizes \[3\]",
        ),
        (
            lambda e: gm.Network([gm.Dense(2)], encoder=e).predict({"age": [1.0], "member": [True]}),
            ValueError,
            "the table lacks the columns 'city'",
        ),
    ],
)
def test_encoders_that_do_not_fit(build, error, message):
    with pytest.raises(error, match=message):
        build(TableEncoder(one_hot_limit=3).fit(TABLE))


def test_a_network_keeps_the_encoder_as_it_was(tmp_path):
    encoder = TableEncoder(one_hot_limit=3).fit(TABLE)
    net = gm.Network([gm.Dense(2)], encoder=encoder)
    before = net.logits(TABLE)
    encoder.fit({"age": [1.0, 2.0], "city": ["x", "y"], "member": [True, False]})
    np.testing.assert_array_equal(net.logits(TABLE), before)
    with pytest.raises(ValueError, match="the encoder makes 5 columns"):
        net.encoder = encoder
    net.save(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(gm.load(tmp_path / "model.safetensors").logits(TABLE), before)


def test_a_network_over_tables_explains_itself():
    net = gm.Network([gm.Dense(6, "tanh"), gm.Dense(2)], encoder=TableEncoder(one_hot_limit=3).fit(TABLE), seed=1)
    gm.Trainer(net, "softmax_cross_entropy").fit(TABLE, BOUGHT, epochs=2, progress=False)
    assert "dense_0" in str(net.diagnose(TABLE, BOUGHT))
    assert max(net.gradient_check(TABLE, BOUGHT).values()) < 1e-5
    with pytest.raises(ValueError, match="validation X: the table lacks the columns 'city'"):
        rest = {name: cells for name, cells in TABLE.items() if name != "city"}
        gm.Trainer(net, "softmax_cross_entropy").fit(TABLE, BOUGHT, validation_data=(rest, BOUGHT))
