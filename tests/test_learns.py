"""Networks learn: the small problems of a lecture in seconds, Fashion-MNIST in minutes (pytest -m long)."""

import os
from pathlib import Path

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.data import load
from gpumlp.data.builtin import digits, moons, sine, spirals, xor
from gpumlp.optimizers import OPTIMIZERS

SOFTMAX = "softmax_cross_entropy"
DATA = Path(os.environ.get("GPUMLP_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.parametrize("outputs, loss", [(1, "binary_cross_entropy"), (2, SOFTMAX)])
def test_two_layers_learn_xor(outputs, loss):
    data = xor(n=4, noise=0)
    fleet = gm.Network([gm.Dense(4, "tanh"), gm.Dense(outputs)], n_features=2, models=5)
    gm.Trainer(fleet, loss, gm.Adam(0.1)).fit(data.X, data.y, epochs=300, batch_size=4)
    assert fleet.predict(data.X).tolist() == [[0, 1, 1, 0]] * 5
    assert fleet.predict_proba(data.X)[:, [0, 1, 2, 3], [0, 1, 1, 0]].min() > 0.95


def test_one_layer_cannot_learn_xor():
    data = xor(n=4, noise=0)
    fleet = gm.Network([gm.Dense(1)], n_features=2, models=5)
    gm.Trainer(fleet, "binary_cross_entropy", gm.Adam(0.1)).fit(data.X, data.y, epochs=300, batch_size=4)
    assert max(gm.Trainer(fleet, "binary_cross_entropy").evaluate(data.X, data.y)["accuracy"]) <= 0.75


@pytest.mark.parametrize("make, epochs, widths, accuracy", [(spirals, 60, (40, 30), 0.97), (moons, 30, (16,), 0.97)])
def test_curved_borders(make, epochs, widths, accuracy):
    data = make()
    layers = [*(gm.Dense(width, "relu") for width in widths), gm.Dense(2)]
    network = gm.Network(layers, n_features=2, standardize=True)
    trainer = gm.Trainer(network, SOFTMAX, gm.Adam(0.02), schedule="cosine")
    trainer.fit(data.X, data.y, epochs=epochs, batch_size=32)
    assert trainer.evaluate(data.X_test, data.y_test)["accuracy"] > accuracy


@pytest.mark.parametrize(
    "widths, activation, optimizer, epochs",
    [((30,), "tanh", gm.LBFGS(), 200), ((40, 20), "relu", gm.Adam(0.01), 100)],
    ids=["one hidden layer", "two"],
)
def test_a_sine_is_approximated(widths, activation, optimizer, epochs):
    data = sine()  # noisy rows to learn from
    layers = [*(gm.Dense(width, activation) for width in widths), gm.Dense(1)]
    fleet = gm.Network(layers, n_features=1, models=3, standardize=True)
    trainer = gm.Trainer(fleet, "squared_error", optimizer, schedule="constant" if optimizer.full_batch else "cosine")
    trainer.fit(data.X, data.y, epochs=epochs, batch_size=32)
    assert min(trainer.evaluate(data.X_test, np.sin(2 * np.pi * data.X_test))["r2"]) > 0.98


def digits_trained(optimizer="adam", epochs=10):
    data = digits()
    network = gm.Network([gm.Dense(64, "relu"), gm.Dense(10)], n_features=64, standardize=True)
    trainer = gm.Trainer(network, SOFTMAX, optimizer)
    trainer.fit(data.X, data.y, epochs=epochs, batch_size=32)
    return trainer, trainer.evaluate(data.X_test, data.y_test)


def test_digits_with_plain_settings():
    _, found = digits_trained()
    assert found["accuracy"] > 0.95


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_digits(name):
    """With the learning rate that it comes with."""
    trainer, found = digits_trained(name, epochs=5)
    loss = trainer.history["loss"]
    assert loss[-1] < 0.5 * loss[0] and found["loss"] < 0.9 and found["accuracy"] > 0.75


def test_every_part_together_learns_digits():
    """Graph, both normalisations, dropout, schedule, augmentation, weight decay, clipping, a fleet, early stopping."""
    data = digits()
    x = gm.Input(64, dropout=0.05)
    h = gm.Dense(64, "gelu", norm="batch", dropout=[0.1, 0.0])(x)
    out = gm.Dense(10)(gm.Add()(h, gm.Dense(64, "silu", norm="layer")(h)))
    fleet = gm.Network(x, out, models=2, standardize="global")
    trainer = gm.Trainer(
        fleet,
        gm.Loss(SOFTMAX, label_smoothing=0.05),
        gm.AdamW(5e-3, clip_norm=1.0),
        schedule=gm.OneCycle(),
        augment=[gm.RandomShift(1, (8, 8)), gm.GaussianNoise(0.05), gm.Mixup(0.1)],
    )
    trainer.fit(data.X, data.y, epochs=12, batch_size=32, validation_split=0.1, callbacks=[gm.EarlyStopping(8)])
    assert min(trainer.evaluate(data.X_test, data.y_test)["accuracy"]) > 0.9


# --- Fashion-MNIST ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fashion():
    folder = DATA / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set GPUMLP_DATA to the folder that holds fashion-mnist")
    return load(folder)


def test_a_tenth_of_fashion_mnist_in_one_epoch(fashion):
    network = gm.Network([gm.Dense(128, "relu"), gm.Dense(10)], n_features=784, standardize="global")
    trainer = gm.Trainer(network, SOFTMAX)
    trainer.fit(fashion.X[:6000], fashion.y[:6000], epochs=1, batch_size=64)
    assert trainer.evaluate(fashion.X_test, fashion.y_test)["accuracy"] > 0.76


@pytest.mark.long
def test_fashion_mnist_with_plain_settings(fashion):
    network = gm.Network([gm.Dense(256, "relu"), gm.Dense(10)], n_features=784, standardize="global")
    trainer = gm.Trainer(network, SOFTMAX)
    trainer.fit(fashion.X, fashion.y, epochs=10)
    assert trainer.evaluate(fashion.X_test, fashion.y_test)["accuracy"] >= 0.88


@pytest.mark.long
def test_fashion_mnist_with_normalisation_dropout_schedule_and_augmentation(fashion):
    layers = [*(gm.Dense(width, "relu", norm="batch", dropout=0.2) for width in (512, 256)), gm.Dense(10)]
    network = gm.Network(layers, n_features=784, standardize="global")
    trainer = gm.Trainer(
        network,
        gm.Loss(SOFTMAX, label_smoothing=0.1),
        gm.AdamW(2e-3),
        schedule="one_cycle",
        augment=gm.GaussianNoise(0.1),
    )
    trainer.fit(fashion.X, fashion.y, epochs=15, batch_size=256)
    assert trainer.evaluate(fashion.X_test, fashion.y_test)["accuracy"] >= 0.90
