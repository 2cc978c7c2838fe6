"""Networks: building, forward and backward, prediction by each loss, fleets, standardisation, copies, and errors."""

import copy
import pickle
import re
import sys
import threading

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.activations import ACTIVATIONS
from gpumlp.backends.numpy_backend import NumpyBackend
from gpumlp.losses import LOSSES
from gpumlp.network import ALIGNMENT

FEATURES, OUTPUTS = 5, 3
AT_ONCE = NumpyBackend.prediction_rows


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def make(outputs=OUTPUTS, layer=None, **options):
    """A chain with batch norm and dropout, so that training and prediction differ; no parameter is where it starts."""
    layer = {"norm": "batch", "dropout": 0.3} if layer is None else layer
    layers = [gm.Dense(7, "tanh", **layer), gm.Dense(4, "gelu", norm="layer"), gm.Dense(outputs)]
    network = gm.Network(layers, n_features=FEATURES, **({"seed": 1} | options))
    for name, values in {**network.parameters, **network.statistics}.items():
        values += np.abs(0.2 * draw(*values.shape, seed=len(name)))
    return network


def standardized(network, X=None, y=None, rows=None):
    X = 3 * draw(40, FEATURES, seed=8) + 2 if X is None else X
    y = 5 * draw(len(X), network.n_outputs, seed=9) - 7 if y is None else y
    network.learn_standardization(X, y, rows)
    return network


# --- prediction


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize(
    ("loss", "outputs"),
    [(loss, n) for loss in (None, *LOSSES) for n in (1, OUTPUTS) if n > 1 or loss != "softmax_cross_entropy"],
)
def test_predictions_of_each_loss(loss, outputs, models):
    row = LOSSES[loss] if loss else None
    network, X = make(outputs, models=models), draw(11, FEATURES)
    network.loss = loss
    lead = () if models is None else (models,)
    z, found = network.logits(X), network.predict(X)
    assert z.shape == (*lead, 11, outputs) and z.dtype == np.float32
    np.testing.assert_array_equal(network.decide(z), found)
    if row is None:
        np.testing.assert_array_equal(found, z)
    elif row.output == "softmax":
        np.testing.assert_array_equal(found, z.argmax(axis=-1))
    elif row.output == "sigmoid":
        labels = (z > 0).astype(np.int64)
        np.testing.assert_array_equal(found, labels if outputs > 1 else labels[..., 0])
        assert found.dtype == np.int64
    else:
        values = np.exp(z) if row.output == "exp" else z
        np.testing.assert_allclose(found, values if outputs > 1 else values[..., 0], rtol=1e-6)
    assert not np.shares_memory(found, network.logits(X))

    if row is None or not row.is_classifier:
        with pytest.raises(RuntimeError, match="predict_proba needs a loss over classes; the network's loss is"):
            network.predict_proba(X)
        return
    p = network.predict_proba(X)
    assert p.shape == (*lead, 11, 2 if outputs == 1 else outputs) and ((p >= 0) & (p <= 1)).all()
    if row.output == "sigmoid":
        np.testing.assert_allclose(
            p[..., 1] if outputs == 1 else p, 1 / (1 + np.exp(-(z[..., 0] if outputs == 1 else z)))
        )
    else:
        np.testing.assert_allclose(p, np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True), rtol=1e-5)
    if row.output == "softmax" or outputs == 1:
        np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(p.argmax(axis=-1), found)


@pytest.mark.parametrize(("loss", "outputs"), [("softmax_cross_entropy", 3), ("binary_cross_entropy", 1)])
@pytest.mark.parametrize("models", [None, 2])
def test_labels_are_the_networks_classes(loss, outputs, models):
    network, X = make(outputs, models=models), draw(50, FEATURES)
    network.loss = loss
    labels = network.predict(X)
    assert len(np.unique(labels)) > 1
    network.classes = np.array(["ant", "bee", "cow"][: max(2, outputs)])
    np.testing.assert_array_equal(network.predict(X), network.classes[labels])


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("models", [None, 3])
def test_regression_answers_in_the_units_of_y(outputs, models):
    network, X = make(outputs, models=models, standardize_targets=True), draw(11, FEATURES)
    network.loss = "huber"
    rows = None if models is None else [np.arange(10), np.arange(5, 40), np.arange(40)]
    y = 5 * draw(40, outputs, seed=9) - 7
    standardized(network, y=y, rows=rows)
    z = np.atleast_3d(network.logits(X).T).T.reshape(-1, 11, outputs)
    found = np.reshape(network.predict(X), (-1, 11, outputs))
    for i in range(network.models):
        part = y if rows is None else y[rows[i]]
        np.testing.assert_allclose(found[i], z[i] * part.std(axis=0) + part.mean(axis=0), rtol=1e-5, atol=1e-5)
    assert network.predict(X).shape == (() if models is None else (3,)) + ((11,) if outputs == 1 else (11, 2))


@pytest.mark.parametrize("models", [None, 2])
@pytest.mark.parametrize("rows", [1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE + 3])
def test_predictions_in_stretches_are_those_of_single_rows(rows, models):
    """A prediction depends on its row alone, however many rows go with it, up to the rounding of a matrix product."""
    network, X = make(models=models), draw(rows, FEATURES)
    z = network.logits(X)
    for start in {0, rows // 2, rows - 1}:
        alone = network.logits(X[start : start + 1])
        np.testing.assert_allclose(alone[..., 0, :], z[..., start, :], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(network.logits(X[::-1])[..., ::-1, :], z, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(network.logits(X), z)


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("own_scaling", [False, True])
def test_forward_without_training_is_prediction(models, own_scaling):
    """Dropout is off, running statistics normalise and stay; also where each model of a fleet has its own scaling."""
    rows = [np.arange(i, 20 + i) for i in range(models)] if own_scaling and models else None
    network = standardized(make(models=models, standardize=True, input_dropout=0.4), rows=rows)
    X = draw(9, FEATURES)
    network.forward(X)  # leaves dropped values and batch statistics in the buffers
    kept = {name: values.copy() for name, values in network.statistics.items()}
    np.testing.assert_allclose(network.forward(X, training=False), network.logits(X), rtol=1e-6, atol=1e-6)
    for name, values in kept.items():
        np.testing.assert_array_equal(network.statistics[name], values)
    if models:
        np.testing.assert_allclose(
            network.forward(np.stack([X] * models), training=False), network.logits(X), rtol=1e-6, atol=1e-6
        )
    with pytest.raises(RuntimeError, match="backward needs what forward keeps"):
        network.backward(network.logits(X))


def test_training_forward_differs_from_prediction_and_repeats_within_a_step():
    network, X = make(), draw(9, FEATURES)
    z = network.forward(X)
    assert np.abs(z - network.logits(X)).max() > 0.01
    np.testing.assert_array_equal(network.forward(X), z)
    network.after_update(slice(0, 1))
    assert not np.array_equal(network.forward(X), z)


def test_prediction_leaves_everything_as_it_was():
    network, X = standardized(make(standardize=True)), draw(9, FEATURES)
    network.loss = "softmax_cross_entropy"
    twin, X_before = network.copy(), X.copy()
    network.predict(X), network.predict_proba(X), network.logits(X)
    for name in ("flat", "flat_gradient", "steps", "shift", "scale"):
        np.testing.assert_array_equal(getattr(network, name), getattr(twin, name))
    for name, values in twin.statistics.items():
        np.testing.assert_array_equal(network.statistics[name], values)
    np.testing.assert_array_equal(X, X_before)


def test_logits_and_gradients_survive_a_prediction_in_between():
    network, X = make(), draw(9, FEATURES)
    network.forward(X)
    network.backward(np.ones((9, OUTPUTS)))
    expected = network.flat_gradient.copy()
    z = network.forward(X)
    kept = z.copy()
    network.predict(draw(20, FEATURES, seed=2))
    network.backward(np.ones((9, OUTPUTS)))
    np.testing.assert_array_equal(network.flat_gradient, expected)
    np.testing.assert_array_equal(z, kept)


def test_two_threads_may_predict_at_once():
    network, X = make(models=2), draw(300, FEATURES)
    parts = [X[:150], X[150:], X[50:90], X[:1]]
    expected = [network.logits(part) for part in parts]
    wrong = []

    def work(part, z):
        for _ in range(60):
            if not np.array_equal(network.logits(part), z):
                wrong.append(len(part))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=pair) for pair in zip(parts, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


# --- forward and backward


def test_forward_of_smaller_and_larger_batches_and_of_own_rows():
    """Buffers are made for the largest batch so far; what an earlier batch left in them does not show."""
    network = make(models=2, layer={"norm": "layer"})
    for shape in [(4,), (9,), (2, 9), (3,), (2, 5), (12,), (1,)]:
        X = draw(*shape, FEATURES)
        z = network.forward(X)
        network.backward(np.ones_like(z))
        fresh = network.copy()
        np.testing.assert_allclose(fresh.forward(X), z, rtol=1e-6)
        fresh.backward(np.ones_like(z))
        np.testing.assert_allclose(network.flat_gradient, fresh.flat_gradient, rtol=1e-5, atol=1e-6)


def test_backward_does_not_change_dz_nor_forward_x():
    network, X, dz = make(), draw(9, FEATURES).astype(np.float32), draw(9, OUTPUTS, seed=1).astype(np.float32)
    copies = X.copy(), dz.copy()
    network.forward(X)
    network.backward(dz)
    np.testing.assert_array_equal(X, copies[0])
    np.testing.assert_array_equal(dz, copies[1])


def test_the_loop_in_the_open_is_the_trainers():
    """gm.batches, forward, a loss, backward, optimizer.step: the same steps as one fit without shuffling."""
    X, y = draw(50, FEATURES), np.arange(50) % OUTPUTS
    own, fitted = make(standardize=True), make(standardize=True)
    own.learn_standardization(X, y)
    loss, optimizer = gm.Loss("softmax_cross_entropy"), gm.Adam(0.01)
    for _ in range(2):
        for start in range(0, 50, 16):
            value, dz = loss(own.forward(X[start : start + 16]), y[start : start + 16])
            own.backward(dz)
            optimizer.step(own)
    history = gm.Trainer(fitted, loss, gm.Adam(0.01)).fit(X, y, epochs=2, batch_size=16, shuffle=False)
    np.testing.assert_allclose(fitted.flat, own.flat, rtol=1e-5, atol=1e-6)
    assert own.steps == fitted.steps == 8 and len(history["loss"]) == 2 and value > 0


# --- parameters


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_are_aligned_views_of_one_buffer_weights_first(dtype):
    network = make(models=3, dtype=dtype)
    assert network.flat.flags.c_contiguous and network.flat.shape == network.flat_gradient.shape
    assert network.flat.dtype == network.flat_gradient.dtype == dtype and network.flat.shape[1] % ALIGNMENT == 0
    assert ALIGNMENT * np.dtype("float32").itemsize == 128
    for views, buffer in ((network.parameters, network.flat), (network.gradients, network.flat_gradient)):
        seen = np.zeros(buffer.shape[1], int)
        for name, values in views.items():
            assert np.shares_memory(values, buffer) and values.shape[0] == 3
            start, rest = divmod(values.ctypes.data - buffer.ctypes.data, buffer.itemsize)
            assert rest == 0 and start % ALIGNMENT == 0
            assert (start < network.n_weights) == name.endswith(".W")
            seen[start : start + values[0].size] += 1
        assert seen.max() == 1 and seen.sum() == network.n_parameters
    assert network.n_parameters == 7 * 5 + 7 * 2 + 4 * 7 + 4 * 3 + 3 * 4 + 3  # W γ β, W b γ β, W b
    assert network.parameters["dense_0.W"].shape == network.gradients["dense_0.W"].shape == (3, 7, FEATURES)
    assert network.statistics["dense_0.mean"].shape == (3, 7)


def test_what_a_new_network_starts_from():
    network = gm.Network([gm.Dense(7, norm="batch"), gm.Dense(3)], n_features=2, seed=0)
    start = {name: float(values.flat[0]) for name, values in {**network.parameters, **network.statistics}.items()}
    assert {name: value for name, value in start.items() if not name.endswith("W")} == {
        "dense_0.gamma": 1,
        "dense_0.beta": 0,
        "dense_1.b": 0,
        "dense_0.mean": 0,
        "dense_0.variance": 1,
    }
    assert network.parameters["dense_0.W"].std() > 0.1 and not network.steps.any()


def weights(**options):
    return gm.Network([gm.Dense(7, "relu"), gm.Dense(3)], n_features=FEATURES, **options).flat


def test_the_seed_decides_the_weights():
    np.testing.assert_array_equal(weights(seed=5), weights(seed=5))
    assert not np.array_equal(weights(seed=5), weights(seed=6))
    np.testing.assert_array_equal(weights(seed=2**64 - 1), weights(seed=np.uint64(2**64 - 1)))
    fleet = weights(seed=5, models=3)
    np.testing.assert_array_equal(fleet[:1], weights(seed=5))
    assert len(np.unique(fleet[:, 0])) == 3
    np.testing.assert_array_equal(
        weights(seed=[8, 5, 8], models=3), np.concatenate([weights(seed=s) for s in (8, 5, 8)])
    )
    np.testing.assert_allclose(weights(seed=5, dtype="float64"), weights(seed=5), rtol=1e-7)


def test_layers_of_one_shape_start_apart():
    network = gm.Network([gm.Dense(4), gm.Dense(4)], n_features=4, seed=0)
    assert not np.array_equal(network.parameters["dense_0.W"], network.parameters["dense_1.W"])


def test_numpys_global_random_state_is_neither_read_nor_moved():
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first = weights(seed=3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    np.random.seed(1)
    np.testing.assert_array_equal(weights(seed=3), first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_default_initializer_follows_the_activation(activation):
    default = gm.Network([gm.Dense(6, activation)], n_features=FEATURES, seed=2)
    named = gm.Network(
        [gm.Dense(6, activation, initializer=ACTIVATIONS[activation].initializer)], n_features=FEATURES, seed=2
    )
    np.testing.assert_array_equal(default.flat, named.flat)


def test_initialize_draws_the_weights_anew():
    network = gm.Network([gm.Dense(6, norm="layer"), gm.Dense(2)], n_features=FEATURES, models=2, seed=2)
    start = network.flat.copy()
    network.flat[...] = 7
    network.initialize()
    np.testing.assert_array_equal(network.flat, start)


# --- standardisation


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_are_standardized_and_a_constant_one_becomes_zero(dtype):
    X = 3 * draw(40, FEATURES) + 100
    X[:, 2] = 7.5
    network = gm.Network([gm.Dense(FEATURES)], n_features=FEATURES, seed=0, standardize=True, dtype=dtype)
    network.parameters["dense_0.W"][0] = np.eye(FEATURES)
    np.testing.assert_allclose(network.logits(X), X, rtol=1e-6)  # nothing is learned yet
    network.learn_standardization(X, X)
    found = network.logits(X)
    constant = np.arange(FEATURES) == 2
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=0), np.where(constant, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(found[:, 2], 0)
    assert network.shift.dtype == network.scale.dtype == network.logits(X).dtype == dtype


def test_global_standardization_takes_one_mean_and_deviation():
    X = draw(40, FEATURES) * np.arange(FEATURES) + 3  # column 0 is constant, and stays as far from 0 as it is
    network = gm.Network([gm.Dense(FEATURES)], n_features=FEATURES, seed=0, standardize="global")
    network.parameters["dense_0.W"][0] = np.eye(FEATURES)
    network.learn_standardization(X, X)
    np.testing.assert_allclose(network.logits(X), (X - X.mean()) / X.std(), rtol=1e-4, atol=1e-5)


def test_each_model_standardizes_by_the_rows_that_it_sees():
    X, rows = 3 * draw(40, FEATURES) + 2, [np.arange(10), np.arange(5, 40)]
    fleet = standardized(make(models=2, standardize=True, seed=[1, 2]), X, rows=rows)
    for i, part in enumerate(rows):
        np.testing.assert_allclose(fleet.shift[i], X[part].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(fleet.scale[i], 1 / X[part].std(axis=0), rtol=1e-5)
        np.testing.assert_allclose(fleet.logits(X)[i], fleet[i].logits(X), rtol=1e-5, atol=1e-6)


def test_a_fit_of_shared_rows_after_one_of_own_rows_keeps_each_models_scaling():
    """The second fit's batches hold the same rows for all models, which scale them differently."""
    X, y, rows = 3 * draw(40, FEATURES) + 2, 2 * draw(40, 1, seed=3) + 5, [np.arange(10), np.arange(5, 40)]
    layers = [gm.Dense(4, "tanh"), gm.Dense(1)]
    options = {"n_features": FEATURES, "standardize": True, "standardize_targets": True}
    fleet = gm.Network(layers, models=2, seed=[1, 2], **options)
    trainer = gm.Trainer(fleet, "squared_error", gm.SGD(0.05))
    trainer.fit(X, y, epochs=1, rows=rows, shuffle=False)
    trainer.fit(X, y, epochs=2, shuffle=False)
    for i, part in enumerate(rows):
        alone = gm.Network(layers, seed=i + 1, **options)
        trainer = gm.Trainer(alone, "squared_error", gm.SGD(0.05))
        trainer.fit(X, y, epochs=1, rows=[part], shuffle=False)
        trainer.fit(X, y, epochs=2, shuffle=False)
        np.testing.assert_allclose(fleet.predict(X)[i], alone.predict(X), rtol=1e-4)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, ">f4"])
def test_input_of_any_dtype_equals_its_float_copy(dtype, standardize):
    X = (np.abs(draw(20, FEATURES)) * 100).astype(dtype)
    outcomes = []
    for given in (X, X.astype(np.float32)):
        network = make(standardize=standardize, layer={})
        gm.Trainer(network, "softmax_cross_entropy", gm.SGD(0.01)).fit(given, np.arange(20) % 3, epochs=2, batch_size=6)
        outcomes.append([network.flat.copy(), network.logits(given), network.forward(given)])
    for a, b in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_values_are_fine_in_float64_only():
    X = np.full((2, FEATURES), 1e39)
    assert np.isfinite(make(dtype="float64", layer={}).logits(X)).all()
    with pytest.raises(ValueError, match="beyond the largest float32"):
        make(layer={}).logits(X)


# --- a network as a thing


def everything(models=None):
    """A graph with a scalar and, in a fleet, a listed dropout rate, scaling, classes and a loss."""
    x = gm.Input(FEATURES, 0.1)
    rate = 0.2 if models is None else [0.05 * (i + 1) for i in range(models)]
    h = gm.Dense(4, "leaky_relu(0.2)", norm="batch", dropout=rate, name="first")(x)
    out = gm.Dense(OUTPUTS)(gm.Concat()(h, gm.Add()(h, gm.Dense(4, "tanh", max_norm=2.0)(h)), x))
    network = gm.Network(x, out, models=models, seed=7, standardize=True)
    standardized(network, rows=None if models is None else [np.arange(10 + i) for i in range(models)])
    network.classes = np.array(["ant", "bee", "cow"])
    smoothing = 0.1 if models is None else [0.1 * i for i in range(models)]
    network.loss = gm.Loss("softmax_cross_entropy", label_smoothing=smoothing)
    network.steps[...] = 5 + np.arange(network.models)
    network.statistics["first.mean"] += 0.3
    return network


COPIES = {
    "copy": lambda network: network.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
}


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_the_same_network_with_memory_of_its_own(way, models):
    network, X = everything(models), draw(9, FEATURES)
    twin = COPIES[way](network)
    np.testing.assert_array_equal(twin.predict(X), network.predict(X))
    np.testing.assert_array_equal(twin.predict_proba(X), network.predict_proba(X))
    np.testing.assert_array_equal(twin.forward(X), network.forward(X))  # the same dropout masks, too
    for name in ("seeds", "streams", "steps", "flat", "shift", "scale"):
        np.testing.assert_array_equal(getattr(twin, name), getattr(network, name))
        assert not np.shares_memory(getattr(twin, name), getattr(network, name)), name
    if way == "copy":
        assert [place.layer for place in twin.places] == [place.layer for place in network.places]
    assert twin.summary().splitlines()[:-1] == network.summary().splitlines()[:-1]
    assert repr(twin.loss) == repr(network.loss) and twin.is_fleet == network.is_fleet
    twin.flat[...] = 0
    for values in twin.statistics.values():
        values[...] = 0
    assert network.flat.any() and all(values.any() for values in network.statistics.values())


@pytest.mark.parametrize("i", [0, 2, -1])
def test_a_model_of_a_fleet_is_a_network_of_its_own(i):
    fleet, X = everything(3), draw(9, FEATURES)
    one = fleet[i]
    assert not one.is_fleet and one.models == 1 and len(fleet) == 3
    np.testing.assert_allclose(one.logits(X), fleet.logits(X)[i], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(one.predict(X), fleet.predict(X)[i])
    np.testing.assert_allclose(one.forward(X), fleet.forward(X)[i], rtol=1e-5, atol=1e-6)  # its dropout rate and masks
    assert one.places[1].layer.dropout == pytest.approx([0.05, 0.1, 0.15][i])
    assert one.loss.options["label_smoothing"] == pytest.approx([0.0, 0.1, 0.2][i])
    assert one.steps == fleet.steps[i] and list(one.classes) == list(fleet.classes)
    one.flat[...] = 0
    assert fleet.flat[i].any()


def test_indexing_ends_where_the_models_end():
    fleet = everything(3)
    assert [int(network.steps[0]) for network in fleet] == [5, 6, 7]
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"model {i} of a network with 3"):
            fleet[i]


def test_a_copy_in_another_dtype():
    network, X = everything(), draw(9, FEATURES)
    wide = network.copy(dtype="float64")
    assert wide.dtype == wide.flat.dtype == wide.shift.dtype == wide.logits(X).dtype == np.float64
    np.testing.assert_array_equal(wide.flat.astype(np.float32), network.flat)
    np.testing.assert_allclose(wide.logits(X), network.logits(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(wide.copy(dtype=np.float32).flat, network.flat)


def test_a_custom_activation_row_is_taken():
    row = gm.Activation(
        "sine",
        lambda z, out=None: np.sin(z, out=out),
        lambda z, a, out=None: np.cos(z, out=out),
        "nowhere",
        "he_normal",
    )
    network = gm.Network([gm.Dense(4, row), gm.Dense(1)], n_features=2, seed=0, dtype="float64")
    assert "sine" in network.summary()
    assert max(network.gradient_check(draw(5, 2), draw(5, 1), "squared_error").values()) < 1e-6


def test_summary():
    assert everything(2).summary().splitlines() == [
        "layer     reads                units  activation       norm   dropout      parameters",
        "--------  -------------------  -----  ---------------  -----  -----------  ----------",
        "input                          5                              0.1",
        "first     input                4      leaky_relu(0.2)  batch  0.05 to 0.1  28",
        "dense_1   first                4      tanh                                 20",
        "add_0     first, dense_1       4",
        "concat_0  first, add_0, input  13",
        "dense_2   concat_0             3      identity                             42",
        f"90 parameters in each of 2 models, float32, on {everything().device_reason}",
    ]
    assert make(layer={"norm": "layer", "norm_after": True}).summary().count("layer after") == 1
    assert (
        make(dtype="float64", device="cpu").summary().splitlines()[-1] == "104 parameters, float64, on cpu: asked for"
    )
    assert repr(make()) == "<Network 5-7-4-3, 104 parameters>"
    assert repr(make(models=2)) == "<Network 5-7-4-3, 2 models, 104 parameters>"


def test_loss_may_be_a_name_a_loss_or_none():
    network = make()
    network.loss = "huber"
    assert network.loss.name == "huber"
    network.loss = None
    assert network.loss is None
    with pytest.raises(ValueError, match="loss='hubris' is unknown"):
        network.loss = "hubris"


# --- errors

LAYERS, NODE = [gm.Dense(3)], gm.Input(4)
ERRORS = [
    (lambda: gm.Network(LAYERS, n_features=4, models=0), "models=0 must be an integer of at least 1, or None"),
    (lambda: gm.Network(LAYERS, n_features=4, models=2.0), "models=2.0 must be an integer"),
    (lambda: gm.Network(LAYERS, n_features=4, models=True), "models=True must be an integer"),
    (
        lambda: gm.Network(LAYERS, n_features=4, dtype="float16"),
        "dtype='float16' is not supported; allowed: float32, float64",
    ),
    (lambda: gm.Network(LAYERS, n_features=4, dtype="bfloat16"), "dtype='bfloat16' is not supported"),
    (
        lambda: gm.Network(LAYERS, n_features=4, standardize="rows"),
        "standardize='rows' is unknown; allowed: False, True, 'co",
    ),
    (lambda: gm.Network(LAYERS, n_features=4, standardize=["columns"]), "standardize=['columns'] is unknown"),
    (lambda: gm.Network(LAYERS, n_features=4, device="gpu"), "device='gpu' is unknown; allowed: 'auto', 'cpu', 'cuda'"),
    (lambda: gm.Network(LAYERS, n_features=4, device="cuda:x"), "device='cuda:x' is unknown"),
    (lambda: gm.Network(LAYERS, n_features=4, seed=-1), "seed=-1 must be at least 0"),
    (
        lambda: gm.Network(LAYERS, n_features=4, seed=[1, 2]),
        "seed has 2 values for 1 models; give one integer, or one for each",
    ),
    (lambda: gm.Network(LAYERS, n_features=4, models=2, seed=[1, -2]), "seed=-2 must be at least 0"),
    (lambda: gm.Network(LAYERS), "a network from a list of layers needs n_features, the number of columns of X"),
    (lambda: gm.Network(LAYERS, n_features=0), "n_features=0 must be an integer of at least 1"),
    (lambda: gm.Network(LAYERS, n_features=4, input_dropout=1.0), "dropout=1.0 must be a number in [0, 1)"),
    (
        lambda: gm.Network([], n_features=4),
        "the list of layers is empty; the last layer, say gm.Dense(10), gives the outputs",
    ),
    (lambda: gm.Network([NODE, gm.Dense(3)], n_features=4), "perhaps a gm.Embedding before them, got Node("),
    (lambda: gm.Network([gm.Add()], n_features=4), "perhaps a gm.Embedding before them, got Add()"),
    (
        lambda: gm.Network(),
        "Network takes a list of layers, or two nodes: Network([Dense(10)], n_features=4), Network(x, out)",
    ),
    (lambda: gm.Network(gm.Dense(3), n_features=4), "Network takes a list of layers, or two nodes"),
    (lambda: gm.Network(NODE, gm.Dense(3)), "Network takes a list of layers, or two nodes"),
    (lambda: gm.Network(NODE, gm.Dense(3)(NODE), n_features=4), "n_features and input_dropout belong to gm.Input(...)"),
    (
        lambda: gm.Network(NODE, gm.Dense(3)(NODE), input_dropout=0.1),
        "n_features and input_dropout belong to gm.Input(...)",
    ),
    (
        lambda: gm.Network([gm.Dense(3, name="a.b")], n_features=4),
        "layer name 'a.b' must be a string, unique and without a dot",
    ),
    (lambda: gm.Network([gm.Dense(3, name="input")], n_features=4), "layer name 'input' must be a string, unique"),
    (
        lambda: gm.Network([gm.Dense(3, name="dense_1"), gm.Dense(2)], n_features=4),
        "layer name 'dense_1' must be a string, uniq",
    ),
    (lambda: gm.Network([gm.Dense(3, name=7)], n_features=4), "layer name 7 must be a string"),
    (
        lambda: gm.Network([gm.Dense(3, dropout=[0.1, 0.2])], n_features=4, models=3),
        "dropout of dense_0 has 2 values for 3 models; give one, or one for each",
    ),
    (lambda: gm.Network(LAYERS, n_features=4, input_dropout=[0.1, 0.2]), "dropout of input has 2 values for 1 models"),
    (lambda: make().forward(draw(2, 4)), "X has shape (2, 4); forward takes (batch, 5), batch at least 1"),
    (lambda: make().forward(draw(5)), "X has shape (5,); forward takes (batch, 5)"),
    (lambda: make().forward(draw(0, 5)), "X has shape (0, 5); forward takes (batch, 5), batch at least 1"),
    (lambda: make().forward(draw(2, 3, 5)), "X has shape (2, 3, 5); forward takes (batch, 5)"),
    (
        lambda: make(models=3).forward(draw(2, 3, 5)),
        "X has shape (2, 3, 5); forward takes (batch, 5) or (3, batch, 5), batch",
    ),
    (lambda: make().logits(draw(2, 4)), "the network takes 5 features, X has 4"),
    (lambda: make().predict(draw(0, 5)), "X has no rows"),
    (lambda: make().predict([[1, 2, 3, 4, np.nan]]), "X[0, 4] is nan"),
    (lambda: make().predict(draw(5)), "X is one-dimensional"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("seed", [1.0, "1", None, True, [1.5]], ids=str)
def test_a_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match=r"seed=.* must be an integer"):
        gm.Network(LAYERS, n_features=4, seed=seed)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_cannot_be_had_is_an_error(device):
    with pytest.raises(RuntimeError, match=f"device='{device}': .*use device='cpu' or device='auto'"):
        gm.Network(LAYERS, n_features=4, device=device)


def test_auto_says_what_it_took_and_why():
    assert gm.Network(LAYERS, n_features=4).device_reason.startswith("cpu: ")


def test_backward_wants_one_forward_each():
    network, X = make(), draw(4, FEATURES)
    with pytest.raises(
        RuntimeError, match="backward needs what forward keeps: call forward first, once for each backward"
    ):
        network.backward(np.ones((4, OUTPUTS)))
    network.forward(X)
    with pytest.raises(ValueError, match=r"dz has shape \(4,\); the last forward returned logits of shape \(4, 3\)"):
        network.backward(np.ones(4))
    network.backward(np.ones((4, OUTPUTS)))  # the wrong dz did no harm
    with pytest.raises(RuntimeError, match="backward needs what forward keeps"):
        network.backward(np.ones((4, OUTPUTS)))
    fleet = make(models=2)
    fleet.forward(X)
    with pytest.raises(ValueError, match=r"the last forward returned logits of shape \(2, 4, 3\)"):
        fleet.backward(np.ones((4, OUTPUTS)))
