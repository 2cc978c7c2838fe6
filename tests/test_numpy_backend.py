"""The backend's verbs against plain formulas, in blocks and without; a step neither reads back nor allocates."""

import inspect
import tracemalloc

import numpy as np
import pytest

import gpumlp as gm
from gpumlp import random
from gpumlp.activations import ACTIVATIONS
from gpumlp.averaging import WeightAverage
from gpumlp.backends import get_backend, numpy_backend
from gpumlp.backends.base import Backend, Batch, Draw, Dropout, Join, Norm
from gpumlp.backends.numpy_backend import BLOCK, NumpyBackend, norm_backward, norm_forward
from gpumlp.optimizers import OPTIMIZERS
from gpumlp.train_step import TrainStep

BACKEND = NumpyBackend()


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- which backend


def test_get_backend_says_why():
    backend, reason = get_backend("cpu")
    assert isinstance(backend, NumpyBackend) and reason == "cpu: asked for"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "", None, 0])
def test_an_unknown_device_is_an_error(device):
    with pytest.raises(ValueError, match=r"device=.* is unknown; allowed: 'auto', 'cpu', 'cuda', 'cuda:<index>'"):
        get_backend(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:12"])
def test_cuda_never_falls_back(device):
    with pytest.raises(RuntimeError, match=f"device='{device}'"):
        get_backend(device)


def test_every_verb_of_the_protocol_is_there_with_its_arguments():
    verbs = {name: f for name, f in vars(Backend).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert len(verbs) >= 12
    for name, verb in verbs.items():
        assert list(inspect.signature(verb).parameters) == list(
            inspect.signature(getattr(NumpyBackend, name)).parameters
        )
    own = {name for name, f in vars(NumpyBackend).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert own == set(verbs), "a verb that the protocol does not name is one that a second backend will lack"


# --- the batch


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64, np.float64])
@pytest.mark.parametrize("models", [1, 3])
def test_gather_takes_casts_and_standardises(dtype, models):
    X, y, weight = (10 * np.abs(draw(20, 4))).astype(dtype), draw(20, 2, dtype=np.float32), draw(20, dtype=np.float32)
    copies = X.copy(), y.copy(), weight.copy()
    rows = np.array([[3, 3, 19, 0, 7], [1, 2, 3, 4, 5], [19, 18, 0, 0, 2]])[:models]
    shift, scale = draw(models, 1, 4, seed=1, dtype=np.float32), draw(models, 1, 4, seed=2, dtype=np.float32)
    batch = Batch(
        X=X,
        y=y,
        weight=weight,
        raw=None if dtype == np.float32 else np.empty((models, 5, 4), dtype),
        x=np.empty((models, 5, 4), np.float32),
        targets=np.empty((models, 5, 2), np.float32),
        weights=np.empty((models, 5), np.float32),
        shift=shift,
        scale=scale,
        target_shift=np.full((models, 1, 2), 2, np.float32),
        target_scale=np.full((models, 1, 2), 0.5, np.float32),
    )
    BACKEND.gather(batch, rows)
    np.testing.assert_allclose(batch.x, (X[rows].astype(np.float32) - shift) * scale, rtol=1e-6)
    np.testing.assert_allclose(batch.targets, (y[rows] - 2) / 2, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(batch.weights, weight[rows])
    for array, before in zip((X, y, weight), copies, strict=True):
        np.testing.assert_array_equal(array, before)
    batch.shift = batch.target_shift = batch.weight = None
    BACKEND.gather(batch, rows)
    np.testing.assert_array_equal(batch.x, X[rows].astype(np.float32))
    np.testing.assert_array_equal(batch.targets, y[rows])


# --- layers

# models, batch, widths: several small models in one block, a large layer in several, a row longer than a block
SHAPES = {
    "one block": (1, 5, (4, 7, 3)),
    "grouped models": (70, 9, (4, 30, 3)),
    "blocks of rows": (2, 301, (4, 130, 3)),
    "a row beyond a block": (1, 3, (2, BLOCK + 5, 1)),
}


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "gelu"])
@pytest.mark.parametrize("case", SHAPES)
def test_dense_layers_in_blocks_are_the_plain_formula(case, activation):
    models, batch, (fan_in, hidden, outputs) = SHAPES[case]
    layers = [gm.Dense(hidden, activation), gm.Dense(outputs)]
    network = gm.Network(layers, n_features=fan_in, models=models, seed=1, dtype="float64")
    network.parameters["dense_0.b"][...] = draw(models, hidden, seed=1)
    X, dz = draw(models, batch, fan_in, seed=2), draw(models, batch, outputs, seed=3)
    logits = network.forward(X)
    network.backward(dz)
    W0, b0, W1, b1 = (network.parameters[name] for name in ("dense_0.W", "dense_0.b", "dense_1.W", "dense_1.b"))
    row = ACTIVATIONS[activation]
    z = X @ W0.swapaxes(1, 2) + b0[:, None, :]  # (models, batch, hidden)
    a = row.f(z)
    np.testing.assert_allclose(logits, a @ W1.swapaxes(1, 2) + b1[:, None, :], rtol=1e-10, atol=1e-10)
    dz0 = (dz @ W1) * row.f_grad(z, a)  # (models, batch, hidden)
    expected = {
        "dense_1.W": dz.swapaxes(1, 2) @ a,
        "dense_1.b": dz.sum(axis=1),
        "dense_0.W": dz0.swapaxes(1, 2) @ X,
        "dense_0.b": dz0.sum(axis=1),
    }
    for name, gradient in expected.items():
        np.testing.assert_allclose(network.gradients[name], gradient, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("models", [slice(1, 2), slice(0, 3)])
@pytest.mark.parametrize("rows", [4, 2])
def test_a_part_of_the_models_and_rows_touches_no_other(models, rows):
    """The views that the last batches of an epoch are made of."""
    layers = [gm.Dense(6, "gelu", norm="batch", dropout=0.5), gm.Dense(2)]
    network = gm.Network(layers, n_features=3, models=3, seed=1)
    whole = network.workspace(4, True)
    X = draw(3, 4, 3, dtype=np.float32)
    part = whole.view(models, rows)
    part.x[...] = X[models, :rows]
    statistics = {name: values.copy() for name, values in network.statistics.items()}
    network.flat_gradient[...] = 7
    z = part.forward().copy()
    part.dz[...] = 1
    part.backward()
    others = np.ones(3, bool)
    others[models] = False
    assert (network.flat_gradient[others] == 7).all() and not (network.gradients["dense_0.W"][~others] == 7).any()
    for name, values in statistics.items():
        np.testing.assert_array_equal(network.statistics[name][others], values[others])
        assert not np.array_equal(network.statistics[name][~others], values[~others])
    for i in range(models.start, models.stop):
        np.testing.assert_allclose(network[i].forward(X[i, :rows]), z[i - models.start], rtol=1e-5, atol=1e-6)


# --- normalisation


def make_norm(kind, models=2, batch=6, units=4, in_place=False):
    x = 3 * draw(models, batch, units) + 1
    return Norm(
        kind=kind,
        x=x,
        x_hat=x if in_place else np.empty_like(x),
        inverse_std=np.empty((models, 1, units) if kind == "batch" else (models, batch, 1)),
        out=np.empty_like(x),
        gamma=draw(models, units, seed=1),
        beta=draw(models, units, seed=2),
        dgamma=np.empty((models, units)),
        dbeta=np.empty((models, units)),
        d=draw(models, batch, units, seed=3),
        running_mean=np.zeros((models, units)) if kind == "batch" else None,
        running_variance=np.ones((models, units)) if kind == "batch" else None,
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_normalisation_and_its_gradient(kind, in_place):
    norm = make_norm(kind, in_place=in_place)
    x, d, over = norm.x.copy(), norm.d.copy(), {"batch": 1, "layer": 2}[kind]
    norm_forward(norm, training=True, update_running=True)
    x_hat = (x - x.mean(axis=over, keepdims=True)) / np.sqrt(x.var(axis=over, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm.out, norm.gamma[:, None] * x_hat + norm.beta[:, None], rtol=1e-12)
    norm_backward(norm)
    np.testing.assert_allclose(norm.dgamma, (d * x_hat).sum(axis=1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(norm.dbeta, d.sum(axis=1), rtol=1e-12)
    direction, h, sums = draw(*x.shape, seed=7), 1e-6, []
    for sign in (1, -1):
        moved = make_norm(kind)
        moved.x[...] = x + sign * h * direction
        norm_forward(moved, training=True, update_running=False)
        sums.append((moved.out * d).sum())
    assert (norm.d * direction).sum() == pytest.approx((sums[0] - sums[1]) / (2 * h), rel=1e-7)


def test_running_statistics_move_a_tenth_and_predict():
    norm = make_norm("batch")
    x, n = norm.x.copy(), 6
    mean, variance = 0.1 * x.mean(axis=1), 0.9 + 0.1 * x.var(axis=1) * n / (n - 1)  # unbiased, as torch
    norm_forward(norm, training=True, update_running=False)
    assert not norm.running_mean.any()
    norm_forward(norm, training=True, update_running=True)
    np.testing.assert_allclose(norm.running_mean, mean)
    np.testing.assert_allclose(norm.running_variance, variance)
    norm_forward(norm, training=False, update_running=True)
    x_hat = (x - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5)
    np.testing.assert_allclose(norm.out, norm.gamma[:, None] * x_hat + norm.beta[:, None], rtol=1e-12)
    np.testing.assert_allclose(norm.running_mean, mean)


@pytest.mark.parametrize("kind", ["batch", "layer"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_normalisation_of_what_does_not_vary_is_the_shift(kind, shape):
    batch, units = shape
    norm = make_norm(kind, batch=batch, units=units)
    norm.x[...] = 5.0
    norm_forward(norm, training=True, update_running=True)
    np.testing.assert_allclose(norm.out, np.broadcast_to(norm.beta[:, None], norm.out.shape))
    norm_backward(norm)
    assert np.isfinite(norm.d).all() and np.isfinite(norm.dgamma).all()
    if kind == "batch":
        assert np.isfinite(norm.running_variance).all()


# --- dropout, joins, updates


def test_dropout_is_a_function_of_seed_step_model_and_layer():
    x = draw(2, 50, 4)
    draws = Draw(np.array([3, 9], np.uint64), np.array([0, 5]), np.array([2, 7]))
    dropout = Dropout(layer=4, rates=np.array([0.2, 0.6]), x=x, keep=np.empty_like(x), out=np.empty_like(x), d=None)
    BACKEND.dropout_forward(dropout, draws)
    mask = np.stack(
        [
            random.dropout_scale(np.empty((50, 4)), 0.2, seed=3, step=2, model=0, layer=4),
            random.dropout_scale(np.empty((50, 4)), 0.6, seed=9, step=7, model=5, layer=4),
        ]
    )
    np.testing.assert_array_equal(dropout.out, x * mask)
    np.testing.assert_array_equal(mask == 0, dropout.keep == 0)
    assert 0.1 < (mask[0] == 0).mean() < 0.3 and 0.5 < (mask[1] == 0).mean() < 0.7
    BACKEND.dropout_forward(dropout, None)
    np.testing.assert_array_equal(dropout.out, x)


@pytest.mark.parametrize("concat", [False, True])
def test_join_and_split(concat):
    widths = (2, 3, 4) if concat else (3, 3, 3)
    parts = [draw(2, 5, width, seed=width + i) for i, width in enumerate(widths)]
    expected = np.concatenate(parts, axis=-1) if concat else parts[0] + parts[1] + parts[2]
    d = draw(*expected.shape, seed=9)
    first, second = np.full_like(parts[0], np.nan), np.ones_like(parts[1])
    join = Join(parts, np.empty_like(expected), concat, d, [(first, False), (second, True), (None, False)])
    BACKEND.join(join)
    np.testing.assert_array_equal(join.out, expected)
    BACKEND.split(join)
    np.testing.assert_array_equal(first, d[..., :2] if concat else d)
    np.testing.assert_array_equal(second, 1 + (d[..., 2:5] if concat else d))


def test_limit_norms():
    network = gm.Network([gm.Dense(3)], n_features=4, models=2, dtype="float64")
    W = network.parameters["dense_0.W"]
    W[...] = draw(2, 3, 4)
    W[0, 1] = 0
    before, norms = W.copy(), np.linalg.norm(W, axis=2)
    BACKEND.limit_norms(network, "dense_0.W", 1.5, slice(0, 2))
    assert (norms > 1.5).any() and (norms < 1.5).any()
    np.testing.assert_allclose(np.linalg.norm(W, axis=2), np.minimum(norms, 1.5))
    np.testing.assert_array_equal(W[norms < 1.5], before[norms < 1.5])


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_the_weighted_mean_and_its_gradient(weighted):
    z, y = draw(2, 5, 3), np.array([[0, 2, 1, 1, 0]])
    weight = np.abs(draw(1, 5, seed=4)) if weighted else None
    dz = np.empty_like(z)
    batch = Batch(*[None] * 5, targets=y, weights=weight, shift=None, scale=None, target_shift=None, target_scale=None)
    loss = BACKEND.loss(gm.Loss("softmax_cross_entropy"), z, batch, dz)
    expected, expected_dz = gm.Loss("softmax_cross_entropy")(z, y[0], None if weight is None else weight[0])
    np.testing.assert_allclose(loss, expected)
    np.testing.assert_allclose(dz, expected_dz)
    assert loss.dtype == np.float64


def test_update_moves_the_models_that_it_is_given():
    network = gm.Network([gm.Dense(3)], n_features=4, models=3, seed=0)
    network.flat_gradient[...] = 1
    before = network.flat.copy()
    BACKEND.update(gm.SGD(0.5).bind(network), slice(1, 2), 0.25)
    np.testing.assert_array_equal(network.flat[[0, 2]], before[[0, 2]])
    np.testing.assert_allclose(network.flat[1], before[1] - 0.25)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_average_moves_the_models_that_it_is_given(dtype):
    network = gm.Network([gm.Dense(3, norm="batch")], n_features=4, models=3, seed=0, dtype=dtype)
    average, beta = WeightAverage(network, [0.5, 0.9, 0.99]), np.array([[0.5], [0.9], [0.99]])
    weights = {"flat": network.flat, **network.statistics}
    assert average.averages.keys() == weights.keys() and len(weights) == 3
    for i, values in enumerate(average.averages.values()):
        values[...] = draw(*values.shape, seed=i)
    before = {name: values.copy() for name, values in average.averages.items()}
    BACKEND.average(average, slice(1, 3))
    for name, w in weights.items():
        expected = beta * before[name] + (1 - beta) * w
        np.testing.assert_array_equal(average.averages[name][0], before[name][0])
        np.testing.assert_allclose(average.averages[name][1:], expected[1:], rtol=1e-5 if dtype == "float32" else 1e-14)


# --- a whole step


class Watched(NumpyBackend):
    """A backend that refuses, within a step, to move data between host and device, and to make arrays."""

    in_step = False

    def refuse(self, verb):
        assert not self.in_step, f"a training step calls {verb}"

    def to_numpy(self, array):
        self.refuse("to_numpy")
        return super().to_numpy(array)

    def asarray(self, values, dtype=None):
        self.refuse("asarray")
        return super().asarray(values, dtype)


def watched(monkeypatch, layer, backend=None, models=2):
    """A network on a watched backend; TrainStep.run tells the backend when a step is under way."""
    network = gm.Network([gm.Dense(6, "relu", **layer), gm.Dense(3)], n_features=4, models=models, seed=0)
    network.backend = backend or Watched()
    run = TrainStep.run

    def run_watched(step, *args, **kwargs):
        network.backend.in_step = True
        try:
            return run(step, *args, **kwargs)
        finally:
            network.backend.in_step = False

    monkeypatch.setattr(TrainStep, "run", run_watched)
    return network


LAYERS = {
    "plain": {},
    "everything": {"norm": "batch", "dropout": [0.2, 0.4], "max_norm": 1.0},
    "layer norm after": {"norm": "layer", "norm_after": True},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_moves_nothing_between_host_and_device(monkeypatch, optimizer, layer):
    network = watched(monkeypatch, LAYERS[layer])
    before = network.flat.copy()
    trainer = gm.Trainer(network, "softmax_cross_entropy", optimizer)
    X, y = draw(33, 4), np.arange(33) % 3
    trainer.fit(X, y, sample_weight=np.ones(33), epochs=2, batch_size=8, rows=[np.arange(20), np.arange(33)])
    assert not np.array_equal(network.flat, before) and network.steps.all()


def test_a_step_with_averages_does_not_either(monkeypatch):
    network = watched(monkeypatch, LAYERS["everything"])
    trainer = gm.Trainer(network, "softmax_cross_entropy", ema=[0.5, 0.9])
    trainer.fit(draw(33, 4), np.arange(33) % 3, epochs=2, batch_size=8, rows=[np.arange(20), np.arange(33)])
    assert all(values.any() for values in trainer.average.averages.values())


@pytest.mark.parametrize("augment", [gm.GaussianNoise(0.1), gm.Mixup(), gm.RandomShift(1, (2, 2))], ids=repr)
def test_an_augmented_step_does_not_either(monkeypatch, augment):
    network = watched(monkeypatch, {})
    gm.Trainer(network, "softmax_cross_entropy", "sgd", augment=augment).fit(draw(20, 4), np.arange(20) % 3, epochs=1)
    assert network.steps.all()


def test_predictions_come_back_through_the_verb(monkeypatch):
    calls = []

    class Counts(Watched):
        def refuse(self, verb):
            super().refuse(verb)
            calls.append(verb)

    network = watched(monkeypatch, {}, Counts())
    X = draw(20, 4)
    gm.Trainer(network, "softmax_cross_entropy", "sgd").fit(X, np.arange(20) % 3, epochs=2)
    assert calls == []
    network.predict(X)
    network.forward(X)
    assert calls == ["to_numpy", "to_numpy"]


def test_the_watch_would_notice(monkeypatch):
    class Reads(Watched):
        def loss(self, loss, z, batch, dz):
            return super().loss(loss, self.to_numpy(z), batch, dz)

    network = watched(monkeypatch, {}, Reads())
    with pytest.raises(AssertionError, match="a training step calls to_numpy"):
        gm.Trainer(network, "softmax_cross_entropy", "sgd").fit(draw(20, 4), np.arange(20) % 3, epochs=1)


MINI_BATCH = [name for name, row in OPTIMIZERS.items() if not row.full_batch]


@pytest.mark.parametrize("optimizer, ema", [*((name, None) for name in MINI_BATCH), ("adam", 0.999)])
def test_a_step_keeps_its_buffers_and_makes_no_new_ones(optimizer, ema):
    """After the first step, nothing near the size of an activation or of the parameters is allocated, nor kept."""
    batch, hidden = 1024, 256
    network = gm.Network([gm.Dense(hidden, "relu"), gm.Dense(4)], n_features=300, seed=0)
    trainer, peaks = gm.Trainer(network, "softmax_cross_entropy", optimizer, ema=ema), []
    flat, gradient = network.flat, network.flat_gradient

    class Measure(gm.Callback):
        def on_step_end(self, trainer, loss):
            if tracemalloc.is_tracing():
                peaks.append(tracemalloc.get_traced_memory())
                tracemalloc.reset_peak()
            else:
                tracemalloc.start()  # after the first step, which makes what is left to make

    try:
        trainer.fit(
            draw(4 * batch, 300, dtype=np.float32),
            np.arange(4 * batch) % 4,
            epochs=1,
            batch_size=batch,
            callbacks=[Measure()],
        )
    finally:
        tracemalloc.stop()
    assert network.flat is flat and network.flat_gradient is gradient
    activation = 4 * batch * hidden  # bytes, 1 MB; the parameters take 0.3 MB
    assert len(peaks) == 3
    for kept, peak in peaks[1:]:
        assert peak - peaks[0][0] < activation // 8, "a step allocates"
        assert kept - peaks[0][0] < 20_000, "a step keeps what it allocates"


def test_block_size_does_not_change_a_result(monkeypatch):
    outcomes = []
    for block in (BLOCK, 64, 7):
        monkeypatch.setattr(numpy_backend, "BLOCK", block)
        network = gm.Network([gm.Dense(30, "tanh", norm="layer"), gm.Dense(3)], n_features=4, models=3, seed=1)
        z = network.forward(draw(17, 4))
        network.backward(np.ones_like(z))
        outcomes.append((z, network.flat_gradient.copy()))
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
