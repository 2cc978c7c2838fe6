"""Layers and graphs: gradients of whole networks of every make, agreement with torch, and what is refused."""

import re

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.activations import ACTIVATIONS
from gpumlp.initializers import INITIALIZERS
from gpumlp.layers import NORMS

ROWS, FEATURES, OUTPUTS = 7, 5, 3
NORMALISED = [(None, False), *((norm, after) for norm in NORMS for after in (False, True))]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def away_from_symmetry(network, seed=4):
    """Give biases and the scales and shifts of normalisation values that are not 0 and 1, so that they count."""
    for name, values in network.parameters.items():
        if not name.endswith(".W"):
            values += 0.3 * draw(*values.shape, seed=seed)
    return network


def slope_error(network, X, seed=0):
    """Relative error of the gradient of Σ logits · c along one random direction through all parameters, each model's.

    Every forward is one of the same step, so dropout masks are the same.
    """
    logits = network.forward(X)
    c = draw(*logits.shape, seed=11)
    network.backward(c)
    direction, start, h = draw(*network.flat.shape, seed=seed), network.flat.copy(), 1e-6
    analytic = (network.flat_gradient * direction).sum(axis=1)
    sums = []
    for sign in (1, -1):
        network.flat[...] = start + sign * h * direction
        sums.append((network.forward(X) * c).reshape(network.models, -1).sum(axis=1))
    network.flat[...] = start
    numeric = (sums[0] - sums[1]) / (2 * h)
    assert (np.abs(numeric) > 1e-3).all(), "the direction must see a slope"
    return np.abs(analytic - numeric).max() / np.abs(numeric).max()


# --- gradients of whole networks, float64, unequal widths


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("norm", "after"), NORMALISED)
@every_activation
def test_gradient_of_a_chain(activation, norm, after, dropout):
    layer = {"norm": norm, "norm_after": after, "dropout": dropout}
    layers = [gm.Dense(6, activation, **layer), gm.Dense(4, activation, **layer), gm.Dense(OUTPUTS)]
    network = gm.Network(layers, n_features=FEATURES, seed=3, dtype="float64", input_dropout=dropout / 2)
    assert slope_error(away_from_symmetry(network), draw(ROWS, FEATURES)) < 1e-6


def residual(width=6):
    x = gm.Input(FEATURES)
    h = gm.Dense(width, "tanh")(x)
    return x, gm.Dense(OUTPUTS)(gm.Add()(h, gm.Dense(width, "silu", dropout=0.2)(h)))


def diamond():
    x = gm.Input(FEATURES)
    h = gm.Dense(4, "tanh")(x)
    left, right = gm.Dense(6, "gelu", norm="layer")(h), gm.Dense(2, "softplus", norm="batch", norm_after=True)(h)
    return x, gm.Dense(OUTPUTS)(gm.Concat()(left, right))


def many_consumers():
    """One node read by two layers, a sum and the output's concatenation: four paths meet at it."""
    x = gm.Input(FEATURES)
    h = gm.Dense(4, "sigmoid", dropout=0.25)(x)
    a, b = gm.Dense(4, "tanh")(h), gm.Dense(6, "mish", norm="batch")(h)
    return x, gm.Dense(OUTPUTS)(gm.Concat()(b, gm.Add()(h, a, h), h))


def input_read_twice():
    x = gm.Input(FEATURES, 0.2)
    return x, gm.Dense(OUTPUTS, "tanh")(gm.Concat()(x, gm.Dense(4, "tanh")(gm.Concat()(x, gm.Dense(2, "elu")(x))), x))


def input_in_a_sum():
    x = gm.Input(FEATURES)
    return x, gm.Dense(OUTPUTS)(gm.Add()(x, gm.Dense(FEATURES, "tanh")(x)))


def layer_used_twice():
    x, layer = gm.Input(FEATURES), gm.Dense(FEATURES, "tanh")
    return x, gm.Dense(OUTPUTS)(layer(layer(x)))


def join_at_the_end():
    x = gm.Input(FEATURES)
    h = gm.Dense(OUTPUTS, "tanh")(x)
    return x, gm.Add()(h, gm.Dense(OUTPUTS)(h), h)


def concatenation_at_the_end():
    x = gm.Input(FEATURES)
    h = gm.Dense(1, "tanh")(x)
    return x, gm.Concat()(gm.Dense(2)(h), h)


def deep_residual():
    x = gm.Input(FEATURES)
    h = gm.Dense(4)(x)
    for _ in range(5):
        h = gm.Add()(h, gm.Dense(4)(gm.Dense(6, "tanh", norm="layer", dropout=0.1)(h)))
    return x, gm.Dense(OUTPUTS)(h)


GRAPHS = [
    residual,
    diamond,
    many_consumers,
    input_read_twice,
    input_in_a_sum,
    layer_used_twice,
    join_at_the_end,
    concatenation_at_the_end,
    deep_residual,
]
every_graph = pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)


@every_graph
def test_gradient_along_all_paths_of_a_graph(graph):
    network = away_from_symmetry(gm.Network(*graph(), seed=5, dtype="float64"))
    assert network.n_outputs == OUTPUTS
    for seed in range(2):
        assert slope_error(network, draw(ROWS, FEATURES), seed) < 1e-6


@every_graph
@pytest.mark.parametrize("shared", [True, False], ids=["shared rows", "own rows"])
def test_gradient_of_a_fleet(graph, shared):
    """Each model of a fleet has the slope and the gradient of that model alone."""
    fleet = away_from_symmetry(gm.Network(*graph(), models=3, seed=[1, 2, 3], dtype="float64"))
    X = draw(ROWS, FEATURES) if shared else draw(3, ROWS, FEATURES)
    assert slope_error(fleet, X) < 1e-6
    c = draw(3, ROWS, OUTPUTS, seed=11)
    logits = fleet.forward(X)
    fleet.backward(c)
    for i in range(3):
        alone = fleet[i]
        np.testing.assert_allclose(alone.forward(X if shared else X[i]), logits[i], rtol=1e-12, atol=1e-13)
        alone.backward(c[i])
        np.testing.assert_allclose(alone.flat_gradient[0], fleet.flat_gradient[i], rtol=1e-10, atol=1e-12)


def test_a_layer_at_two_places_has_weights_of_its_own_at_each():
    network = gm.Network(*layer_used_twice(), seed=1)
    first, second = network.parameters["dense_0.W"], network.parameters["dense_1.W"]
    assert not np.shares_memory(first, second) and not np.array_equal(first, second)
    assert [place.name for place in network.places] == ["input", "dense_0", "dense_1", "dense_2"]


def test_a_graph_computes_what_it_says():
    x = gm.Input(2)
    h = gm.Dense(2, name="h")(x)
    network = gm.Network(x, gm.Concat()(gm.Add()(h, x, h), x), seed=0)
    network.parameters["h.W"][...], network.parameters["h.b"][...] = [[1, 2], [3, 4]], [10, 20]
    np.testing.assert_allclose(network.forward([[1.0, -1.0]]), [[2 * 9 + 1, 2 * 19 - 1, 1, -1]])
    network.backward([[1.0, 10.0, 100.0, 1000.0]])
    np.testing.assert_allclose(network.gradients["h.b"], [[2, 20]])
    np.testing.assert_allclose(network.gradients["h.W"], [[[2, -2], [20, -20]]])


def test_places_that_the_output_does_not_read_are_left_out():
    x = gm.Input(FEATURES)
    h = gm.Dense(4)(x)
    gm.Dense(9)(h)
    assert [place.units for place in gm.Network(x, gm.Dense(OUTPUTS)(h)).places] == [FEATURES, 4, OUTPUTS]


def test_places_stand_in_the_order_in_which_they_are_read():
    """Names, and with them seeds and files, depend on it: each place after what it reads, the first branch first."""
    network = gm.Network(*diamond())
    assert [(place.name, place.units) for place in network.places] == [
        ("input", FEATURES),
        ("dense_0", 4),
        ("dense_1", 6),
        ("dense_2", 2),
        ("concat_0", 8),
        ("dense_3", OUTPUTS),
    ]


def test_a_chain_longer_than_the_recursion_limit():
    x = h = gm.Input(1)
    layer = gm.Dense(1, "tanh")
    for _ in range(1500):
        h = layer(h)
    assert len(gm.Network(x, h).places) == 1501


# --- the parts of a layer


def test_dropout_scales_what_it_keeps_and_draws_anew_at_each_step():
    """Activations are 1, so the last layer's gradient is each unit's sum of its scaled mask, 0 or 4/3 for each row."""
    network = gm.Network([gm.Dense(200, dropout=0.25, initializer="zeros"), gm.Dense(1)], n_features=2, seed=0)
    network.parameters["dense_0.b"][...], network.parameters["dense_1.W"][...] = 1.0, 1.0
    sums = []
    for _ in range(2):
        network.forward(np.zeros((50, 2)))
        network.backward(np.ones((50, 1)))
        sums.append(network.gradients["dense_1.W"][0, 0].copy())
        np.testing.assert_allclose(network.gradients["dense_0.b"][0], sums[-1], rtol=1e-5)  # the same mask going back
        kept = sums[-1] * 0.75
        np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
        assert kept.mean() == pytest.approx(0.75 * 50, rel=0.02)
        network.after_update(slice(0, 1))
    assert not np.array_equal(*sums)


def test_dropout_rates_of_a_fleet_are_each_models_own():
    layers = [gm.Dense(300, dropout=[0.0, 0.5], initializer="zeros"), gm.Dense(1)]
    network = gm.Network(layers, n_features=2, models=2, seed=[4, 4])
    network.parameters["dense_0.b"][...], network.parameters["dense_1.W"][...] = 1.0, 1.0
    logits = network.forward(np.zeros((20, 2)))
    np.testing.assert_array_equal(logits[0], 300)
    assert logits[1].std() > 1 and logits[1].mean() == pytest.approx(300, rel=0.05)


def test_max_norm_holds_every_units_weights_after_an_update():
    network = gm.Network([gm.Dense(6, "relu", max_norm=0.5), gm.Dense(OUTPUTS)], n_features=FEATURES, seed=0)
    network.parameters["dense_0.W"][0, 0] = 0.01
    small, free = network.parameters["dense_0.W"][0, 0].copy(), network.parameters["dense_1.W"].copy()
    before = network.parameters["dense_0.W"][0, 1].copy()
    network.flat_gradient[...] = 0
    gm.SGD(0.1).step(network)
    norms = np.linalg.norm(network.parameters["dense_0.W"][0], axis=1)
    assert norms.max() <= 0.5 * (1 + 1e-6) and (norms > 0.49).any()
    np.testing.assert_array_equal(network.parameters["dense_0.W"][0, 0], small)
    np.testing.assert_array_equal(network.parameters["dense_1.W"], free)
    after = network.parameters["dense_0.W"][0, 1]
    np.testing.assert_allclose(after / np.linalg.norm(after), before / np.linalg.norm(before), rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("norm", "after"), NORMALISED)
def test_training_with_max_norm_and_everything_else(norm, after, dropout):
    """The bound holds after every step of a fit, and the gradient at the bound is right."""
    layer = {"norm": norm, "norm_after": after, "dropout": dropout, "max_norm": 0.4}
    network = gm.Network(
        [gm.Dense(6, "tanh", **layer), gm.Dense(OUTPUTS)], n_features=FEATURES, seed=0, dtype="float64"
    )
    X = draw(ROWS, FEATURES)
    optimizer, loss = gm.Adam(0.05), gm.Loss("squared_error")
    for _ in range(3):
        _, dz = loss(network.forward(X), draw(ROWS, OUTPUTS, seed=1))
        network.backward(dz)
        optimizer.step(network)
        assert np.linalg.norm(network.parameters["dense_0.W"][0], axis=1).max() <= 0.4 * (1 + 1e-12)
    assert slope_error(network, X) < 1e-6


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (gm.Dense(2), ["W", "b"]),
        (gm.Dense(2, bias=False), ["W"]),
        (gm.Dense(2, norm="batch"), ["W", "gamma", "beta"]),  # the shift does what the bias would
        (gm.Dense(2, norm="batch", bias=True), ["W", "b", "gamma", "beta"]),
        (gm.Dense(2, norm="batch", norm_after=True), ["W", "b", "gamma", "beta"]),
        (gm.Dense(2, norm="layer"), ["W", "b", "gamma", "beta"]),
        (gm.Dense(2, norm="layer", bias=False), ["W", "gamma", "beta"]),
    ],
    ids=str,
)
def test_which_parameters_a_layer_has(layer, names):
    network = away_from_symmetry(gm.Network([layer, gm.Dense(1)], n_features=FEATURES, dtype="float64"))
    assert [name for name in network.parameters if name.startswith("dense_0.")] == [f"dense_0.{name}" for name in names]
    X = draw(ROWS, FEATURES)
    network.forward(X)
    network.backward(draw(ROWS, 1, seed=2))
    if layer.bias and layer.norm == "batch":  # a bias before batch normalisation is cancelled
        np.testing.assert_allclose(network.gradients["dense_0.b"], 0, atol=1e-12)
    assert slope_error(network, X) < 1e-6


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_a_layers_initializer_is_the_one_it_names(initializer):
    network = gm.Network([gm.Dense(300, initializer=initializer)], n_features=200, seed=1)
    W = network.parameters["dense_0.W"][0]
    deviation = {
        "zeros": 0,
        "normal": 0.01,
        "glorot": (2 / 500) ** 0.5,
        "he": 0.1,
        "lecun": 200**-0.5,
        "orthogonal": 300**-0.5,
    }
    assert W.std() == pytest.approx(deviation[initializer.split("_")[0]], rel=0.02)


# --- against torch


def torch_twin(torch, network):
    """torch's layers with the network's weights, and a function that computes logits as the network's graph says."""
    modules = torch.nn.ModuleDict()
    f = {"relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu, "identity": lambda z: z}
    for place in network.places:
        if not place.is_dense:
            continue
        own = {"linear": torch.nn.Linear(place.fan_in, place.units, bias=place.layer.has_bias)}
        if place.layer.norm:
            own["norm"] = (torch.nn.BatchNorm1d if place.layer.norm == "batch" else torch.nn.LayerNorm)(place.units)
        modules[place.name] = torch.nn.ModuleDict(own)
    modules.to(getattr(torch, network.dtype.name))
    with torch.no_grad():
        for name, values in network.parameters.items():
            torch_parameter(modules, name).copy_(torch.tensor(values[0]))

    def forward(x):
        values = [torch.tensor(x)]
        for place in network.places[1:]:
            parts = [values[i] for i in place.inputs]
            if place.layer.kind == "add":
                values.append(sum(parts[1:], parts[0]))
            elif place.layer.kind == "concat":
                values.append(torch.cat(parts, dim=1))
            else:
                own, layer = modules[place.name], place.layer
                z = own["linear"](parts[0])
                z = own["norm"](z) if layer.norm and not layer.norm_after else z
                a = f[layer.f.name](z)
                values.append(own["norm"](a) if layer.norm and layer.norm_after else a)
        return values[-1]

    return modules, forward


def torch_parameter(modules, name):
    layer, kind = name.split(".")
    part, attribute = {"W": ("linear", "weight"), "b": ("linear", "bias"), "gamma": ("norm", "weight")}.get(
        kind, ("norm", "bias")
    )
    return getattr(modules[layer][part], attribute)


def chain(**layer):
    x = gm.Input(FEATURES)
    return lambda: (x, gm.Dense(OUTPUTS)(gm.Dense(4, "relu", **layer)(gm.Dense(6, "tanh", **layer)(x))))


def residual_without_dropout():
    x = gm.Input(FEATURES)
    h = gm.Dense(6, "tanh")(x)
    return x, gm.Dense(OUTPUTS)(
        gm.Concat()(gm.Add()(h, gm.Dense(6, "gelu", norm="layer")(h)), gm.Dense(4, norm="batch")(x))
    )


PEERS = {
    "chain": chain(),
    "batch norm": chain(norm="batch"),
    "batch norm after": chain(norm="batch", norm_after=True),
    "layer norm": chain(norm="layer"),
    "layer norm after": chain(norm="layer", norm_after=True),
    "residual": residual_without_dropout,
}


@pytest.mark.peer
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("graph", PEERS)
def test_forward_gradients_and_ten_steps_are_torchs(graph, dtype, tolerance):
    torch = pytest.importorskip("torch")
    network = away_from_symmetry(gm.Network(*PEERS[graph](), seed=2, dtype=dtype))
    modules, forward = torch_twin(torch, network)
    loss, optimizer = gm.Loss("softmax_cross_entropy"), gm.Adam(1e-3)
    theirs = torch.optim.Adam(modules.parameters(), lr=1e-3)
    for step in range(10):
        X, y = draw(33, FEATURES, seed=20 + step).astype(dtype), np.arange(33) * (step + 1) % OUTPUTS
        value, dz = loss(network.forward(X), y)
        network.backward(dz)
        their_logits = forward(X)
        their_loss = torch.nn.functional.cross_entropy(their_logits, torch.tensor(y))
        theirs.zero_grad()
        their_loss.backward()
        assert value == pytest.approx(their_loss.item(), rel=tolerance)
        if step == 0:
            np.testing.assert_allclose(network.forward(X), their_logits.detach(), rtol=tolerance, atol=tolerance)
            for name, values in network.gradients.items():
                grad = torch_parameter(modules, name).grad.numpy()
                np.testing.assert_allclose(
                    values[0], grad, rtol=tolerance, atol=tolerance * np.abs(grad).max(), err_msg=name
                )
            for name, values in network.statistics.items():  # the forward above moved them a second time
                values[...] = 0.0 if name.endswith("mean") else 1.0
            network.forward(X)
        optimizer.step(network)
        theirs.step()
    for name, values in network.parameters.items():
        np.testing.assert_allclose(
            values[0], torch_parameter(modules, name).detach(), rtol=tolerance, atol=tolerance, err_msg=name
        )
    for name, values in network.statistics.items():
        layer, kind = name.split(".")
        running = {"mean": "running_mean", "variance": "running_var"}[kind]
        np.testing.assert_allclose(
            values[0], getattr(modules[layer]["norm"], running), rtol=tolerance, atol=tolerance, err_msg=name
        )
    modules.eval()
    X = draw(50, FEATURES, seed=99).astype(dtype)
    np.testing.assert_allclose(network.logits(X), forward(X).detach(), rtol=tolerance, atol=10 * tolerance)


# --- errors

x5, x4 = gm.Input(5), gm.Input(4)
ERRORS = [
    (lambda: gm.Dense(0), ValueError, "units=0 must be an integer of at least 1"),
    (lambda: gm.Dense(3.0), ValueError, "units=3.0 must be an integer"),
    (lambda: gm.Dense(True), ValueError, "units=True must be an integer"),
    (lambda: gm.Dense("3"), ValueError, "units='3' must be an integer"),
    (lambda: gm.Input(-1), ValueError, "n_features=-1 must be an integer of at least 1"),
    (lambda: gm.Input(3, dropout=1.0), ValueError, "dropout=1.0 must be a number in [0, 1), or one for each model"),
    (lambda: gm.Dense(3, dropout=-0.1), ValueError, "dropout=-0.1 must be a number in [0, 1)"),
    (lambda: gm.Dense(3, dropout=[0.1, 1.2]), ValueError, "dropout=[0.1, 1.2] must be"),
    (lambda: gm.Dense(3, dropout=[[0.1]]), ValueError, "dropout=[[0.1]] must be"),
    (lambda: gm.Dense(3, dropout=None), ValueError, "dropout=None must be a number"),
    (lambda: gm.Dense(3, dropout="half"), ValueError, "dropout='half' must be a number"),
    (lambda: gm.Dense(3, dropout=np.nan), ValueError, "dropout=nan must be a number"),
    (lambda: gm.Dense(3, "rely"), ValueError, "activation='rely' is unknown; allowed: identity, sigmoid"),
    (lambda: gm.Dense(3, bias="no"), ValueError, "bias='no' must be True, False or None"),
    (lambda: gm.Dense(3, norm="group"), ValueError, "norm='group' is unknown; allowed: None, 'batch', 'layer'"),
    (
        lambda: gm.Dense(3, initializer="xavier"),
        ValueError,
        "initializer='xavier' is unknown; use one of zeros, normal",
    ),
    (lambda: gm.Dense(3, max_norm=0), ValueError, "max_norm=0 must be a positive number or None"),
    (lambda: gm.Dense(3, max_norm=np.inf), ValueError, "max_norm=inf must be a positive number or None"),
    (lambda: gm.Dense(3, max_norm="1"), ValueError, "max_norm='1' must be a positive number or None"),
    (lambda: gm.Dense(3)(np.ones((2, 5))), TypeError, "Dense was called on ndarray; call it on gm.Input(...)"),
    (
        lambda: gm.Add()(x5, gm.Dense(5)),
        TypeError,
        "Add was called on Dense; call it on gm.Input(...) or a layer's result",
    ),
    (lambda: gm.Dense(3)(), ValueError, "Dense reads one node, got 0; join nodes with gm.Add() or gm.Concat()"),
    (lambda: gm.Dense(3)(x5, x5), ValueError, "Dense reads one node, got 2"),
    (lambda: gm.Add()(x5), ValueError, "Add joins two nodes or more, got 1"),
    (lambda: gm.Concat()(x5), ValueError, "Concat joins two nodes or more, got 1"),
    (
        lambda: gm.Network(x5, gm.Add()(x5, gm.Dense(4)(x5))),
        ValueError,
        "Add joins nodes of one width, got widths [5, 4]",
    ),
    (lambda: gm.Network(x5, x5), ValueError, "the network's output does not depend on its Input"),
    (lambda: gm.Network(x5, gm.Dense(2)(x4)), ValueError, "the network's output does not depend on its Input"),
    (
        lambda: gm.Network(gm.Dense(2)(x5), gm.Dense(2)(x5)),
        ValueError,
        "the network's output does not depend on its Input",
    ),
    (lambda: gm.Network(x5, gm.Concat()(x5, x4)), ValueError, "reads an Input that was not passed to Network"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS, ids=[m[:40] for _, _, m in ERRORS])
def test_errors_name_the_value_and_what_is_allowed(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_layers_are_descriptions():
    """Plain frozen data: equal where their fields are, and never changed by the networks that use them."""
    layer = gm.Dense(4, "relu", dropout=0.1)
    gm.Network([layer, layer], n_features=4)
    assert layer == gm.Dense(4, "relu", dropout=0.1) and repr(layer).startswith("Dense(units=4")
    with pytest.raises(AttributeError):
        layer.units = 5
