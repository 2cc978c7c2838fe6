"""Augmentation: what is drawn, where in a step it happens, and that it repeats."""

from types import SimpleNamespace

import numpy as np
import pytest

import gpumlp as gm
from gpumlp import random
from gpumlp.backends.base import Draw
from gpumlp.random import Purpose

ROWS, COLUMNS = 4, 3
FEATURES, CLASSES, N, BATCH, SEED = ROWS * COLUMNS, 3, 30, 8, 5
SOFTMAX = "softmax_cross_entropy"


def draw(models=1, step=0, seed=SEED):
    return Draw(np.full(models, seed, np.uint64), np.arange(models), np.full(models, step))


def applied(row, x, targets=None, weights=None, **where):
    """Copies of x (models, batch, features), targets and weights after one augmentation."""
    batch = SimpleNamespace(
        x=x.copy(),
        targets=None if targets is None else targets.copy(),
        weights=None if weights is None else weights.copy(),
    )
    if targets is None:
        batch.targets = np.zeros((*x.shape[:2], 1), x.dtype)
    row.apply(batch, draw(len(x), **where))
    return batch


def table(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(1, 2, (n, FEATURES)).astype(np.float32), np.arange(n) % CLASSES


# --- each by itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.05, 2.0])
def test_noise_is_normal_with_the_given_deviation(std):
    x = np.full((2, 500, 40), 3.0, np.float32)
    noise = applied(gm.GaussianNoise(std), x).x.astype(np.float64) - 3.0
    n = noise.size
    assert abs(noise.mean()) < 4 * std / np.sqrt(n)
    assert abs(noise.std() / std - 1) < 4 / np.sqrt(2 * n)
    assert abs((noise**4).mean() / std**4 - 3) < 4 * np.sqrt(96 / n)  # of the normal distribution
    one, other = noise.reshape(2, -1)
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(n / 2)  # each model has its own


def test_noise_of_zero_and_its_dtype():
    x = table()[0][None]
    np.testing.assert_array_equal(applied(gm.GaussianNoise(0), x).x, x)
    assert applied(gm.GaussianNoise(), x.astype(np.float64)).x.dtype == np.float64


@pytest.mark.parametrize("row", [gm.GaussianNoise(), gm.Mixup(0.5), gm.RandomShift(1, (ROWS, COLUMNS))])
def test_a_draw_is_a_function_of_seed_step_and_model(row):
    x = np.random.default_rng(0).normal(size=(2, BATCH, FEATURES)).astype(np.float32)
    x[1] = x[0]
    once, again = applied(row, x, step=3).x, applied(row, x, step=3).x
    np.testing.assert_array_equal(once, again)
    assert (once[0] != once[1]).any()
    assert (once != applied(row, x, step=4).x).any() and (once != applied(row, x, step=3, seed=6).x).any()
    np.testing.assert_array_equal(applied(row, x[:1], step=3).x[0], once[0])  # alone as in the fleet


def test_mixup_mixes_each_row_with_its_mirror():
    rng = np.random.default_rng(1)
    x, targets = rng.normal(size=(2, 5, 4)), rng.dirichlet(np.ones(3), (2, 5))
    weights = rng.uniform(size=(2, 5))
    mixed = applied(gm.Mixup(0.7), x, targets, weights, step=2)
    shares = []
    for i in (0, 1):
        share = random.generator(seed=SEED, purpose=Purpose.MIXUP, step=2, model=i).beta(0.7, 0.7)
        for before, after in ((x[i], mixed.x[i]), (targets[i], mixed.targets[i]), (weights[i], mixed.weights[i])):
            np.testing.assert_allclose(after, share * before + (1 - share) * before[::-1], rtol=1e-12)
        shares.append(share)
    assert shares[0] != shares[1]
    np.testing.assert_allclose(mixed.targets.sum(axis=-1), 1.0)
    np.testing.assert_allclose(mixed.x[:, 2], x[:, 2])  # the middle of five is its own mirror


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_share_of_mixup_is_beta_distributed(alpha):
    x = np.array([[[1.0], [0.0]]])
    shares = np.array([applied(gm.Mixup(alpha), x, step=step).x[0, 0, 0] for step in range(2000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert 0 <= shares.min() and shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(variance / 2000) and abs(shares.var() / variance - 1) < 0.15


def shifted(image, down, right):
    """The image moved by whole pixels, zeros where nothing was."""
    out = np.zeros_like(image)
    for r in range(len(image)):
        for c in range(image.shape[1]):
            if 0 <= r - down < len(image) and 0 <= c - right < image.shape[1]:
                out[r, c] = image[r - down, c - right]
    return out


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_every_image_is_moved_by_whole_pixels_and_every_move_occurs(pixels):
    image = np.arange(1.0, FEATURES + 1).reshape(ROWS, COLUMNS)
    span = range(-pixels, pixels + 1)
    moves = [(down, right) for down in span for right in span]
    possible = np.array([shifted(image, *move).ravel() for move in moves])
    n = 200 * len(moves)
    x = np.tile(image.ravel(), (1, n, 1))
    found = applied(gm.RandomShift(pixels, (ROWS, COLUMNS)), x).x[0]
    keys, counts = np.unique(possible, axis=0, return_counts=True)  # moves that push the whole image out look alike
    seen, times = np.unique(found, axis=0, return_counts=True)
    np.testing.assert_array_equal(seen, keys)
    assert (np.abs(times - 200 * counts) < 5 * np.sqrt(200 * counts)).all()


def test_images_move_on_their_own():
    """Rows of a batch are not moved together, nor up and left together."""
    image = np.arange(1.0, FEATURES + 1).reshape(ROWS, COLUMNS)
    x = applied(gm.RandomShift(1, (ROWS, COLUMNS)), np.tile(image.ravel(), (1, 900, 1))).x[0].reshape(-1, ROWS, COLUMNS)
    down = np.select([(x[:, 0] == 0).all(1), (x[:, -1] == 0).all(1)], [1, -1])
    right = np.select([(x[:, :, 0] == 0).all(1), (x[:, :, -1] == 0).all(1)], [1, -1])
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.13 and abs(np.corrcoef(down[1:], down[:-1])[0, 1]) < 0.13


# --- in a step -------------------------------------------------------------------------------------------------------


def network(standardize=False, seed=SEED, **options):
    layers = [gm.Dense(5, "tanh", dropout=0.2), gm.Dense(CLASSES)]
    return gm.Network(layers, n_features=FEATURES, seed=seed, standardize=standardize, **options)


def test_a_step_shifts_then_standardises_then_adds_noise_and_mixes():
    X, y = table()
    rows = [gm.Mixup(0.4), gm.GaussianNoise(0.3), gm.RandomShift(1, (ROWS, COLUMNS))]  # as listed, but scaling between
    trained, plain = network(standardize=True), network()
    gm.Trainer(trained, SOFTMAX, gm.SGD(0.1), augment=rows).fit(X, y, epochs=2, batch_size=BATCH)
    loss, optimizer, step = gm.Loss(SOFTMAX), gm.SGD(0.1), 0
    targets = np.eye(CLASSES, dtype=np.float32)[y]
    for epoch in (0, 1):
        for x, t in gm.batches(X, targets, batch_size=BATCH, seed=SEED, epoch=epoch):
            batch = applied(rows[2], x[None], t[None], step=step)
            batch.x[...] = (batch.x - trained.shift) * trained.scale
            for row in rows[:2]:
                batch = applied(row, batch.x, batch.targets, step=step)
            _, dz = loss(plain.forward(batch.x[0]), batch.targets[0])
            plain.backward(dz)
            optimizer.step(plain)
            step += 1
    np.testing.assert_array_equal(trained.flat, plain.flat)


@pytest.mark.parametrize(
    "loss, y",
    [
        (SOFTMAX, table()[1]),
        (SOFTMAX, np.random.default_rng(0).dirichlet(np.ones(CLASSES), N)),
        ("binary_cross_entropy", np.eye(CLASSES)[table()[1]]),
        ("squared_error", table()[0][:, :CLASSES]),
    ],
    ids=["labels", "probabilities", "several labels", "values"],
)
def test_a_fleet_augments_each_model_as_alone(loss, y):
    X, _ = table()
    rows = [gm.RandomShift(1, (ROWS, COLUMNS)), gm.GaussianNoise(0.3), gm.Mixup(0.4)]
    weight = np.linspace(0.5, 1.5, N)

    def trained(net):
        gm.Trainer(net, loss, augment=rows).fit(X, y, epochs=2, batch_size=BATCH, sample_weight=weight)
        return net

    fleet = trained(network(seed=[3, 4], models=2, standardize=True))
    for i, seed in enumerate((3, 4)):
        np.testing.assert_allclose(
            fleet[i].flat, trained(network(seed=seed, standardize=True)).flat, rtol=1e-5, atol=1e-6
        )


def test_uint8_images_are_shifted_before_they_are_scaled():
    X, y = (100 * table()[0]).astype(np.uint8), table()[1]
    one, other = network(standardize="global"), network(standardize="global")
    augment = gm.RandomShift(1, [ROWS, COLUMNS])  # one alone needs no list
    gm.Trainer(one, SOFTMAX, augment=augment).fit(X, y, epochs=1)
    gm.Trainer(other, SOFTMAX, augment=[augment]).fit(X.astype(np.float32), y, epochs=1)
    np.testing.assert_array_equal(one.flat, other.flat)


def test_neither_validation_nor_prediction_is_augmented():
    X, y = table()
    trainer = gm.Trainer(network(), SOFTMAX, augment=gm.GaussianNoise(50.0))
    history = trainer.fit(X, y, epochs=1, validation_data=(X, y))
    loss, _ = gm.Loss(SOFTMAX)(trainer.network.logits(X), y)
    assert history["val_loss"][0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: gm.GaussianNoise(-0.1), ValueError, r"std is -0.1; it must be a number in \[0, inf\)"),
        (lambda: gm.GaussianNoise("1"), TypeError, "std is '1'"),
        (lambda: gm.Mixup(0), ValueError, r"alpha is 0; it must be a number in \(0, inf\)"),
        (
            lambda: gm.RandomShift(0, (2, 2)),
            ValueError,
            r"RandomShift\(pixels=0, .*\): pixels must be an integer of at least 1",
        ),
        (lambda: gm.RandomShift(1.5, (2, 2)), ValueError, r"pixels=1.5.* must be an integer"),
        (lambda: gm.RandomShift(True, (2, 2)), ValueError, "pixels=True"),
        (lambda: gm.RandomShift(1, 4), ValueError, r"image_shape=4\): .* image_shape \(rows, columns\)"),
        (lambda: gm.RandomShift(1, (2, 2, 3)), ValueError, r"image_shape=\(2, 2, 3\)"),
        (lambda: gm.RandomShift(1, (2, 0)), ValueError, r"image_shape=\(2, 0\)"),
        (
            lambda: gm.Trainer(network(), SOFTMAX, augment=gm.RandomShift(1, (5, 3))),
            ValueError,
            r"RandomShift has image_shape \(5, 3\), 15 pixels, but the network takes 12 features",
        ),
        (
            lambda: gm.Trainer(network(), SOFTMAX, augment=gm.GaussianNoise),
            TypeError,
            "augment holds <class .*; allowed: ",
        ),
        (
            lambda: gm.Trainer(network(), SOFTMAX, augment=[None]),
            TypeError,
            "augment holds None; allowed: GaussianNoise, Mixup",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
