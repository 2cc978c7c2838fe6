"""Gradient check and diagnosis: they must see what is wrong, not only say that all is well."""

import re

import numpy as np
import pytest

import gpumlp as gm

RNG = np.random.default_rng(3)
X = RNG.standard_normal((40, 7)).astype(np.float32)
Y = RNG.integers(0, 3, 40)


def network(*hidden, **options):
    return gm.Network([*hidden, gm.Dense(3)], n_features=7, seed=1, **options)


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_a_right_gradient_passes(norm):
    net = network(gm.Dense(9, "tanh", norm=norm, dropout=0.3), gm.Dense(5, "gelu", norm=norm, norm_after=True))
    before = net.flat.copy()
    errors = net.gradient_check(X, Y, "softmax_cross_entropy")
    assert set(errors) == set(net.parameters)
    assert max(errors.values()) < 1e-5
    assert (net.flat == before).all()


def test_a_fleet_is_checked_model_by_model():
    errors = network(gm.Dense(9, "sigmoid"), models=3).gradient_check(X, Y, gm.Loss("softmax_cross_entropy"))
    assert max(errors.values()) < 1e-5


def test_a_wrong_derivative_is_seen():
    tanh = gm.Activation("mine", np.tanh, lambda z, a, out=None: np.multiply(1 - a * a, 1.01, out=out), "", "he_normal")
    errors = network(gm.Dense(9, tanh)).gradient_check(X, Y, "softmax_cross_entropy")
    assert errors["dense_0.W"] > 1e-3
    assert errors["dense_1.W"] < 1e-5


def test_the_check_needs_a_loss():
    with pytest.raises(ValueError, match=r"gradient_check needs a loss: pass one, or assign network\.loss"):
        network().gradient_check(X, Y)


def test_a_healthy_network_gets_no_sentence():
    net = network(gm.Dense(32, "relu"))
    before = net.flat.copy(), net.flat_gradient.copy(), net.steps.copy()
    found = net.diagnose(X)
    assert found.messages == []
    assert "Nothing looks wrong." in str(found)
    assert [row.name for row in found.layers] == ["dense_0", "dense_1"]
    for old, new in zip(before, (net.flat, net.flat_gradient, net.steps), strict=True):
        assert (old == new).all()


@pytest.mark.parametrize(
    ("hidden", "spoil", "sentence"),
    [
        ([gm.Dense(6, "tanh", initializer="zeros")], None, "dense_0: its 6 units have equal weights"),
        ([gm.Dense(20, "relu")], lambda p: p["dense_0.b"].fill(-50), "dense_0: 100% of the units are dead"),
        ([gm.Dense(20, "tanh")], lambda p: p["dense_0.W"].__imul__(40), "dense_0: .*of the activations are saturated"),
        ([gm.Dense(20, "sigmoid", initializer="normal")] * 4, None, "The gradient vanishes: rms dz falls from"),
        (
            [gm.Dense(20, "relu")] * 4,
            lambda p: [p[f"dense_{i}.W"].__imul__(20) for i in (1, 2, 3)],
            "The gradient explodes",
        ),
    ],
)
def test_what_is_wrong_is_said(hidden, spoil, sentence):
    net = network(*hidden)
    if spoil:
        spoil(net.parameters)
    found = net.diagnose(X, Y, "softmax_cross_entropy")
    assert any(re.search(sentence, message) for message in found.messages), str(found)


def test_large_inputs_are_noticed():
    assert any("standardize=True" in message for message in network(gm.Dense(5)).diagnose(X * 100).messages)
    net = network(gm.Dense(5), standardize=True)
    net.learn_standardization(X * 100, None)
    assert not any("standardize=True" in message for message in net.diagnose(X * 100).messages)


def test_diagnose_refuses_a_fleet_and_a_missing_loss():
    with pytest.raises(ValueError, match="take a model of the fleet"):
        network(models=2).diagnose(X)
    with pytest.raises(ValueError, match="diagnose needs a loss for y"):
        network().diagnose(X, Y)


def test_targets_are_those_of_a_training_step():
    rng = np.random.default_rng(0)
    y = 1e6 + 1e5 * rng.standard_normal(40)
    net = gm.Network([gm.Dense(8, "tanh"), gm.Dense(1)], n_features=7, standardize_targets=True)
    gm.Trainer(net, "squared_error", gm.Adam(1e-3)).fit(X, y, epochs=1, batch_size=8)
    assert net.diagnose(X, y).layers[-1].gradient < 1
    assert max(net.gradient_check(X, y).values()) < 1e-4
    named = gm.Network([gm.Dense(8, "tanh"), gm.Dense(3)], n_features=7)
    names = np.array(["a", "b", "c"])[Y]
    gm.Trainer(named, "softmax_cross_entropy").fit(X, names, epochs=1)
    assert max(named.gradient_check(X, names).values()) < 1e-4
    assert named.diagnose(X, names).layers
    with pytest.raises(ValueError, match="100"):
        named.diagnose(X, np.zeros(100, int))


def test_scales_that_a_fit_will_learn_are_no_complaint():
    net = network(gm.Dense(5), standardize=True)
    assert not any("standardize=True" in message for message in net.diagnose(X * 100).messages)
    assert net.shift is None
