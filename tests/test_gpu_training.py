"""Trainer.fit on an emulated device against NumPy's, step by step the same; and what a device adds: recorded steps, data
that stream, memory that ends.

The emulator replays a graph with the arguments of its capture, as CUDA does: what should change from step to step and does
not, or is read on the host, shows in the curves.
"""

import gc
import linecache
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatedRuntime, ForeignArray, on_device

import gpumlp as gm
from gpumlp import device_step, random
from gpumlp.activations import ACTIVATIONS
from gpumlp.backends import gpu_backend, gpu_work
from gpumlp.backends.device import DeviceArray, DeviceMemoryError
from gpumlp.backends.gpu_backend import GpuBackend
from gpumlp.data import load
from gpumlp.device_step import DeviceStep
from gpumlp.evaluation import Evaluation
from gpumlp.fit_data import Data
from gpumlp.losses import LOSSES
from gpumlp.optimizers import OPTIMIZERS
from gpumlp.schedules import SCHEDULES

DATA = Path(os.environ.get("GPUMLP_DATA", Path(__file__).parents[2] / "shared" / "data"))
SOFTMAX = "softmax_cross_entropy"
N, FEATURES, CLASSES, BATCH = 61, 6, 3, 8  # 8 steps an epoch, the last of 5 rows
STEPS = 8
SEEDS = [11, 5, 42]


def gpu(**options):
    return GpuBackend(EmulatedRuntime(**options))


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    """Sums over the parameters of small networks need no 64 blocks, which an emulator runs one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (gpu_backend, gpu_work):
            patch.setattr(module, "PARTIALS", 3)
        yield


@pytest.fixture(scope="module")
def backend():
    return gpu(prefer=1)


@pytest.fixture
def every_four(monkeypatch):
    """Graphs of four steps: an epoch then takes two, and a streamed one two chunks."""
    monkeypatch.setattr(device_step, "STEPS", 4)


@pytest.fixture
def no_collector():
    """What is freed is freed because nothing holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def table(n=N, dtype=np.float32, seed=0):
    """X (n, FEATURES) and labels that depend on it, in one way for all seeds."""
    X = np.random.default_rng(seed).normal(1.0, 2.0, (n, FEATURES)).astype(dtype)
    y = (X @ np.random.default_rng(9).normal(size=(FEATURES, CLASSES))).argmax(axis=1)
    y[:CLASSES] = np.arange(CLASSES)
    return X, y


def targets_of(loss, n=N):
    X, y = table(n)
    kind = LOSSES[loss].targets
    if kind == "labels or probabilities":
        return y
    return np.eye(CLASSES)[y] if kind == "binary" else np.exp(0.2 * X[:, :CLASSES])


def network(*layers, outputs=CLASSES, **options):
    layers = layers or (gm.Dense(9, "tanh"), gm.Dense(7, "relu"))
    return gm.Network([*layers, gm.Dense(outputs)], **{"n_features": FEATURES, "seed": 3, "device": "cpu"} | options)


def busy(i=None, **options):
    """Everything that a step of a fleet can hold, or model ``i`` of it alone."""
    of = lambda values: values if i is None else values[i]  # noqa: E731
    layers = [
        gm.Dense(9, "relu", norm="batch", dropout=of([0.0, 0.2, 0.5]), max_norm=1.0),
        gm.Dense(8, "gelu_tanh", norm="layer", norm_after=True),
        gm.Dense(5, "tanh", dropout=of([0.3, 0.0, 0.1])),
    ]
    given = dict(models=3 if i is None else None, seed=of(SEEDS), input_dropout=of([0.1, 0.0, 0.2]), standardize=True)
    return network(*layers, **given | options)


AUGMENT = [gm.RandomShift(1, (2, 3)), gm.GaussianNoise(0.1), gm.Mixup(0.3)]
ROWS = [
    np.random.default_rng(4).permutation(N)[:n] for n in (61, 37, 48)
]  # 8, 5 and 6 steps; the last of 5, 5 and 8 rows


def fitted(
    net, X=None, y=None, *, loss=SOFTMAX, optimizer="adam", schedule=None, augment=(), metrics=None, ema=None, **fit
):
    """A trainer that has trained three epochs."""
    X = table()[0] if X is None else X
    y = targets_of(loss if isinstance(loss, str) else loss.name) if y is None else y
    trainer = gm.Trainer(net, loss, optimizer, schedule=schedule, augment=augment, metrics=metrics, ema=ema)
    trainer.fit(X, y, **{"epochs": 3, "batch_size": BATCH} | fit)
    return trainer


def both(make, backend, *data, **options):
    """The same fit on the host and on the device; the trainers. Networks that ``make`` builds take a device."""
    return [fitted(make(device=device), *data, **options) for device in ("cpu", backend)]


def history_of(trainer):
    return {name: values for name, values in trainer.history.items() if name != "seconds"}


def weights_of(net):
    here = net.backend.to_numpy
    return {name: here(values) for name, values in (net.parameters | net.statistics).items()}


def bits_of(trainer):
    """All that a fit leaves, to the last bit."""
    return repr(history_of(trainer)), {name: values.tobytes() for name, values in weights_of(trainer.network).items()}


def assert_same_fit(host, device, rtol=1e-5, weights=1e-4):
    assert device.history.keys() == host.history.keys()
    for name, values in history_of(host).items():
        if name in ("epoch", "learning_rate"):
            assert device.history[name] == values
        else:
            np.testing.assert_allclose(device.history[name], values, rtol=rtol, err_msg=name)
    assert device.network.steps.tolist() == host.network.steps.tolist()
    assert (device.stopped, device.epoch, device.position) == (host.stopped, host.epoch, host.position)
    ours, theirs = weights_of(device.network), weights_of(host.network)
    for name, expected in theirs.items():
        scale = max(np.abs(expected).max(), 0.1)
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=weights * scale, err_msg=name)


class Losses(gm.Callback):
    """What on_step_end is told."""

    def __init__(self):
        self.losses, self.positions = [], []

    def on_step_end(self, trainer, loss):
        self.losses.append(loss.copy())
        self.positions.append(trainer.position)


class Stop(Exception):
    """What a test ends a fit with."""


# --- the curves are NumPy's ------------------------------------------------------------------------------------------

TRIOS = [list(ACTIVATIONS)[i::7] for i in range(7)]  # of the activations, two or three in a network
DESIGN = [(trio, list(LOSSES)[(i + j) % 7], name) for i, trio in enumerate(TRIOS) for j, name in enumerate(OPTIMIZERS)]


def test_the_design_holds_every_pair():
    """Of activation and loss, activation and optimizer, loss and optimizer."""
    cells = {(activation, loss, name) for trio, loss, name in DESIGN for activation in trio}
    tables = [set(ACTIVATIONS), set(LOSSES), set(OPTIMIZERS)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(cell[a], cell[b]) for cell in cells} == {(x, y) for x in tables[a] for y in tables[b]}


@pytest.mark.parametrize("activations, loss, name", DESIGN, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_every_activation_loss_and_optimizer(activations, loss, name, backend):
    """24 steps, L-BFGS 4 in float64, as its line search turns rounding into other steps."""
    full_batch = OPTIMIZERS[name].full_batch
    optimizer = gm.LBFGS(history=2, max_evaluations=6) if full_batch else OPTIMIZERS[name]()
    dtype, epochs = ("float64", 4) if full_batch else ("float32", 3)

    def make(**options):
        layers = [gm.Dense(width, f) for width, f in zip((9, 6, 5), activations, strict=False)]
        return network(*layers, dtype=dtype, standardize=True, **options)

    host, device = both(make, backend, loss=loss, optimizer=optimizer, epochs=epochs)
    assert_same_fit(host, device, rtol=1e-8 if full_batch else 1e-5)
    assert host.history["loss"][-1] < host.history["loss"][0]


@pytest.mark.parametrize("augment", [(), *AUGMENT, AUGMENT], ids=["none", "shift", "noise", "mixup", "all"])
@pytest.mark.parametrize("models", [None, 3])
def test_with_dropout_and_augmentation(models, augment, backend):
    """The same masks, noise and shares are drawn on both sides, also in the ragged last batch."""

    def make(**options):
        layers = [gm.Dense(9, "relu", dropout=0.3), gm.Dense(16, "silu", norm="batch", dropout=0.5)]
        return network(*layers, models=models, standardize=True, input_dropout=0.2, **options)

    host, device = both(make, backend, augment=augment, epochs=4, optimizer=gm.SGD(0.1, momentum=0.5))
    assert_same_fit(host, device)
    assert host.history["loss"][-1] != host.history["loss"][0]


@pytest.mark.parametrize("loss", LOSSES)
def test_augmentation_of_every_kind_of_target(loss, backend):
    host, device = both(network, backend, loss=loss, augment=AUGMENT, sample_weight=np.linspace(0, 2, N))
    assert_same_fit(host, device)


def test_mixup_of_probabilities(backend):
    y = np.random.default_rng(0).dirichlet(np.ones(CLASSES), N)
    assert_same_fit(*both(network, backend, None, y, augment=gm.Mixup(0.5)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float64_agrees_to_its_own_rounding(dtype, backend):
    host, device = both(lambda **o: busy(dtype=dtype, **o), backend, augment=AUGMENT)
    assert_same_fit(host, device, **({} if dtype == "float32" else dict(rtol=1e-12, weights=1e-11)))


@pytest.mark.parametrize("precision, rtol", [("tf32", 2e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("models", [None, 2])
def test_lower_precision_learns_the_same(precision, rtol, models, backend):
    def make(**options):
        layers = [gm.Dense(9, "tanh", norm="batch", max_norm=2.0), gm.Dense(8, "silu", norm="layer")]
        return network(*layers, models=models, precision=precision, standardize=True, **options)

    data = table()
    host, device = both(make, backend, schedule="cosine", validation_data=data, metrics=["accuracy"])
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=rtol)
        assert device.history[name] != host.history[name]
    again = fitted(make(device=gpu(prefer=1)), schedule="cosine", validation_data=data)
    assert bits_of(again)[1] == bits_of(device)[1]


def test_fashion_mnist_as_bytes(backend):
    """A piece of it: images of 784 bytes stay bytes on the device."""
    folder = DATA / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set GPUMLP_DATA to the folder that holds fashion-mnist")
    data = load(folder)
    X, y, kinds = data.X[:300], data.y[:300], []

    class Types(gm.Callback):
        def on_epoch_end(self, trainer, record):
            step = trainer._step
            kinds.append(step._batch.X.type if isinstance(step, DeviceStep) else step.data.X.dtype.name)

    def make(**options):
        return gm.Network(
            [gm.Dense(24, "relu"), gm.Dense(10)], n_features=784, standardize="global", device=options["device"]
        )

    host, device = both(make, backend, X, y, batch_size=32, validation_data=(X[:50], y[:50]), callbacks=[Types()])
    assert_same_fit(host, device)
    assert host.history["loss"][-1] < 0.8 * host.history["loss"][0] and set(kinds) == {"uint8", "u8"}


# --- weights, options, schedules, penalties --------------------------------------------------------------------------


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_sample_weights(loss, models, backend):
    """Some are 0, and so is every one of a whole batch."""
    weight = np.random.default_rng(1).uniform(0, 2, N)
    weight[8:16] = 0
    arguments = dict(sample_weight=weight, validation_data=(table()[0], targets_of(loss), weight), shuffle=False)
    for shuffle in (False, True):
        host, device = both(
            lambda **o: network(models=models, **o), backend, loss=loss, **arguments | dict(shuffle=shuffle)
        )
        assert_same_fit(host, device)


@pytest.mark.parametrize("class_weight", ["balanced", [1.0, 0.0, 3.0], {0: 5.0}])
def test_class_weights(class_weight, backend):
    loss = gm.Loss(SOFTMAX, class_weight=class_weight)
    assert_same_fit(*both(network, backend, loss=loss, validation_data=table(40, seed=2)))


OPTIONS = {
    "smoothing": (SOFTMAX, dict(label_smoothing=0.2)),
    "smoothing of each model": (SOFTMAX, dict(label_smoothing=[0.1, 0.0, 0.3])),
    "binary smoothing of each model": ("binary_cross_entropy", dict(label_smoothing=[0.1, 0.0, 0.3])),
    "quantile": ("quantile", dict(quantile=0.8)),
    "quantile of each output": ("quantile", dict(quantile=[0.1, 0.5, 0.9])),
    "delta": ("huber", dict(delta=0.2)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_losses(case, backend):
    name, options = OPTIONS[case]
    data = table()[0][:20], targets_of(name, 20)
    assert_same_fit(
        *both(lambda **o: network(models=3, **o), backend, loss=gm.Loss(name, **options), validation_data=data)
    )


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name, models, backend):
    """The rate of each step stands in a table on the device."""
    schedule = gm.ReduceOnPlateau(0.5, patience=1, tolerance=10.0) if name == "plateau" else SCHEDULES[name]()
    if name == "step":
        schedule = gm.StepDecay(0.5)
    rows = None if models is None else ROWS
    host, device = both(
        lambda **o: network(models=models, **o),
        backend,
        optimizer=gm.Adam(0.02),
        schedule=schedule,
        rows=rows,
        epochs=5,
    )
    assert_same_fit(host, device)
    assert name == "constant" or host.history["learning_rate"][0] != host.history["learning_rate"][-1]


def test_a_schedule_of_ones_own(backend):
    schedule = lambda epoch, epochs: 1.0 / (1.0 + np.asarray(epoch)) ** 2  # noqa: E731
    assert_same_fit(*both(network, backend, optimizer=gm.SGD(0.5, momentum=0.9), schedule=schedule))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_penalties_clipping_and_largest_norms(name, backend):
    """Every one of them each model's own; L-BFGS takes penalties alone."""
    numbers = dict(l1=[1e-3, 0.0, 1e-2], l2=[0.0, 1e-1, 1e-2])
    if OPTIMIZERS[name].full_batch:
        optimizer, dtype, epochs = gm.LBFGS([1.0, 0.1, 0.5], history=2, max_evaluations=6, **numbers), "float64", 3
    else:
        numbers |= dict(weight_decay=[0.5, 0.0, 0.1], clip_norm=[0.5, 9.0, 1.0], clip_value=[0.2, 9.0, 0.1])
        optimizer, dtype, epochs = OPTIMIZERS[name]([0.01, 0.1, 0.003], **numbers), "float32", 3

    def make(**options):
        layers = [gm.Dense(9, "tanh", max_norm=0.9), gm.Dense(7, "silu", max_norm=0.5)]
        return network(*layers, models=3, dtype=dtype, **options)

    assert_same_fit(*both(make, backend, optimizer=optimizer, epochs=epochs, rows=ROWS))


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgds_three_forms(momentum, nesterov, backend):
    optimizer = gm.SGD(0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    assert_same_fit(*both(network, backend, optimizer=optimizer, schedule="cosine"))


def test_standardized_targets(backend):
    X, y = table(dtype=np.float64)[0], 1000 + 50 * targets_of("huber")
    for models, rows in ((None, None), (3, ROWS)):
        make = lambda models=models, **o: network(  # noqa: E731
            models=models, standardize=True, standardize_targets=True, **o
        )
        host, device = both(make, backend, X, y, loss="huber", rows=rows, validation_data=(X[:20], y[:20]))
        assert_same_fit(host, device)
        np.testing.assert_allclose(device.network.predict(X), host.network.predict(X), rtol=1e-4)


CODES = (3, 200)  # two bytes hold no code beyond 256, and none is held in them


def coded(n=N):
    X, _ = table(n)
    X = np.concatenate([X, np.random.default_rng(5).integers(0, CODES, (n, 2))], axis=1)
    return X, ((X[:, -1] % 3) + X[:, -2]).astype(int) % 3


@pytest.mark.parametrize(
    ("precision", "models", "tolerances"),
    [("float32", None, {}), ("float32", 3, {}), ("bf16", 3, dict(rtol=0.05, weights=0.2))],
)
def test_codes_of_categories(precision, models, tolerances, backend):
    def make(device):
        layers = [gm.Embedding(CODES, units=3), gm.Dense(7, "relu"), gm.Dense(CLASSES)]
        options = dict(models=models, seed=3, standardize=True, precision=precision, device=device)
        return gm.Network(layers, n_features=FEATURES + 2, **options)

    X, y = coded()
    host, device = both(make, backend, X, y, validation_data=(X, y))
    assert_same_fit(host, device, **tolerances)
    np.testing.assert_allclose(device.network.logits(X), host.network.logits(X), atol=0.05 if tolerances else 1e-4)


def test_a_code_that_is_none_is_refused_on_the_device_too(backend):
    layers = [gm.Embedding(CODES, units=3), gm.Dense(CLASSES)]
    net = gm.Network(layers, n_features=FEATURES + 2, device=backend)
    X, _ = coded()
    X = X.astype(np.float32)
    X[5, -1] = 200
    with pytest.raises(ValueError, match="X holds 200 at row 5, column 7, a column of codes"):
        net.predict(ForeignArray(on_device(backend.runtime, X)))


@pytest.mark.parametrize("batch_size", [1, 7, 20, 60, 61, 1000])
def test_batches_of_any_size(batch_size, backend):
    """The last of one row, of all but one, alone; batch normalisation in each."""
    make = lambda **o: network(gm.Dense(9, "tanh", norm="batch"), **o)  # noqa: E731
    for models in (None, 2):
        host, device = both(
            lambda models=models, **o: make(models=models, **o), backend, batch_size=batch_size, epochs=2
        )
        assert_same_fit(host, device)


def test_one_row(backend):
    X, y = table()
    assert_same_fit(*both(network, backend, X[:1], np.eye(CLASSES)[y[:1]], batch_size=4))


# --- fleets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [ROWS, None], ids=["own rows", "shared rows"])
def test_a_fleet_with_everything_on(rows, shuffle, backend):
    options = dict(rows=rows, shuffle=shuffle, augment=AUGMENT, validation_data=table(40, seed=2), epochs=4)
    optimizer = gm.AdamW([0.01, 0.003, 0.03], weight_decay=0.1, clip_norm=[1.0, 0.5, 2.0])
    assert_same_fit(*both(busy, backend, optimizer=optimizer, sample_weight=np.linspace(0.1, 2, N), **options))


def test_models_that_share_their_batches(backend):
    """Without shuffling, rows of their own and augmentation there is one batch for all."""
    for loss in (SOFTMAX, "squared_error"):
        make = lambda **o: network(gm.Dense(9, "tanh", dropout=0.3), models=3, **o)  # noqa: E731
        host, device = both(make, backend, loss=loss, shuffle=False, sample_weight=np.linspace(0, 2, N))
        assert_same_fit(host, device)


@pytest.mark.parametrize("name", ["adam", "nadam", "lbfgs"])
def test_model_i_of_a_fleet_is_the_lone_model_i(name, backend):
    """Unequal rows, rates, dropout, smoothing and seeds, all on the device."""
    full_batch = OPTIMIZERS[name].full_batch
    optimizer = gm.LBFGS(history=2, max_evaluations=6) if full_batch else OPTIMIZERS[name]([0.01, 0.001, 0.03])
    dtype, augment = ("float64", ()) if full_batch else ("float32", AUGMENT)
    loss = gm.Loss(SOFTMAX, label_smoothing=[0.1, 0.0, 0.3])
    X, y = table()
    validation = table(40, seed=2)
    fleet = fitted(
        busy(device=backend, dtype=dtype), X, y, loss=loss, optimizer=optimizer, augment=augment, rows=ROWS,
        validation_data=validation, schedule="cosine",
    )  # fmt: skip
    for i in range(3):
        alone = fitted(
            busy(i, device=backend, dtype=dtype), X[ROWS[i]], y[ROWS[i]], loss=loss.for_model(i),
            optimizer=optimizer.for_model(i), augment=augment, validation_data=validation, schedule="cosine",
        )  # fmt: skip
        assert fleet.network.steps[i] == alone.network.steps[0]
        for key in ("loss", "val_loss"):
            np.testing.assert_allclose([v[i] for v in fleet.history[key]], alone.history[key], rtol=1e-5)
        own, lone = weights_of(fleet.network[i]), weights_of(alone.network)
        for key, values in lone.items():
            np.testing.assert_allclose(own[key], values, rtol=0, atol=1e-5 * max(np.abs(values).max(), 0.1))


# --- the order of the rows -------------------------------------------------------------------------------------------


def device_step_of(net, n, rows=None, **options):
    data = Data(np.zeros((n, FEATURES), np.float32), np.zeros(n, np.int64), None, rows)
    given = dict(batch_size=BATCH, shuffle=True, augment=()) | options
    return DeviceStep(net, gm.Loss(SOFTMAX), gm.Adam(), data, **given)


@pytest.mark.parametrize("n", [1, 2, 61, 1024, 1025, 2500])
def test_the_order_is_the_hosts(n, backend):
    step = device_step_of(network(device=backend, seed=9), n)
    for epoch in (0, 1, 12):
        step.begin_epoch(epoch)
        np.testing.assert_array_equal(step._order.get(), [random.permutation(n, seed=9, step=epoch)])


def test_the_order_of_each_models_rows(backend):
    counts, n = (1500, 1, 700), 2000
    rows = [np.random.default_rng(i).permutation(n)[:count] for i, count in enumerate(counts)]
    step = device_step_of(network(device=backend, models=3, seed=SEEDS), n, rows)
    for epoch in (0, 3):
        step.begin_epoch(epoch)
        for i, own in enumerate(rows):
            expected = own[random.permutation(len(own), seed=SEEDS[i], step=epoch)]
            np.testing.assert_array_equal(step._order.get()[i, : len(own)], expected)
    unshuffled = device_step_of(network(device=backend, models=3, seed=SEEDS), n, rows, shuffle=False)
    unshuffled.begin_epoch(3)
    for i, own in enumerate(rows):
        np.testing.assert_array_equal(unshuffled._order.get()[i, : len(own)], own)


def test_models_of_one_seed_have_orders_of_their_own(backend):
    step = device_step_of(network(device=backend, models=3, seed=7), 50)
    step.begin_epoch(2)
    expected = [random.permutation(50, seed=7, step=2, model=i) for i in range(3)]
    np.testing.assert_array_equal(step._order.get(), expected)


# --- validation, callbacks, stopping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [None, 3])
def test_validation_after_each_epoch(models, backend, monkeypatch):
    """In stretches with a ragged end; recorded once, replayed after every epoch with the weights of the time."""
    monkeypatch.setattr(GpuBackend, "prediction_rows", 16)
    validation = (*table(41, seed=2), np.linspace(0, 1, 41))
    options = dict(metrics=["accuracy", "f1"], validation_data=validation, epochs=4)
    host, device = both(
        lambda **o: network(gm.Dense(9, "relu", norm="batch"), models=models, standardize=True, **o), backend, **options
    )
    assert_same_fit(host, device)
    expected, found = (trainer.evaluate(*validation) for trainer in (host, device))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
        np.testing.assert_allclose(found[name], device.history[f"val_{name}"][-1], rtol=1e-6)


def test_a_part_held_out(backend):
    assert_same_fit(*both(network, backend, validation_split=0.3))


def test_callbacks_are_told_each_steps_loss(backend):
    """Steps are then made one by one, and give the same bits."""
    quiet, losses = fitted(network(device=backend)), []
    for device in ("cpu", backend):
        told = Losses()
        trainer = fitted(network(device=device), callbacks=[told])
        losses.append(told.losses)
        assert told.positions == [*range(1, STEPS + 1)] * 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert bits_of(trainer) == bits_of(quiet)


def test_losses_of_a_fleet_whose_models_have_unequal_rows(backend):
    losses = []
    for device in ("cpu", backend):
        told = Losses()
        fitted(busy(device=device), rows=ROWS, callbacks=[told])
        losses.append(told.losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert np.isnan(losses[1][5]).tolist() == [False, True, False]  # of the sixth step


def test_a_callback_may_leave_out_steps(backend):
    """One that says so is called after those made together, and the fit takes graphs."""

    class Seldom(gm.Callback):
        every_step = False

        def __init__(self):
            self.positions = []

        def on_step_end(self, trainer, loss):
            assert loss is None
            self.positions.append(trainer.position)

    seldom = Seldom()
    X, y = table(n=70 * BATCH)
    trainer = fitted(network(device=backend), X, y, callbacks=[seldom], epochs=2)
    first, second = seldom.positions[:-3], seldom.positions[-3:]
    assert first[:2] == [1, 2] and first[-3:] == [32, 64, 70] and second == [32, 64, 70]
    assert bits_of(trainer) == bits_of(fitted(network(device=backend), X, y, epochs=2))


def test_the_progress_bar(backend, capsys):
    """It shows a loss, counts all steps, and changes no bit; nor does asking for the mean so far."""

    class Mean(gm.Callback):
        every_step = False

        def __init__(self):
            self.means = []

        def on_step_end(self, trainer, loss):
            self.means.append(trainer.epoch_loss().tolist())

    mean = Mean()
    shown = fitted(network(device=backend), progress=True, callbacks=[mean])
    text = capsys.readouterr().err
    assert "epoch 3/3" in text and "24/24" in text and f"loss={shown.history['loss'][-1]:.4g}" in text
    assert bits_of(shown) == bits_of(fitted(network(device=backend), progress=False))
    assert mean.means[-1] == [shown.history["loss"][-1]]


def test_early_stopping_and_the_best_weights(backend):
    """Each model stops by itself; the others go on; in the end each has the weights of its best epoch."""
    validation = table(30, seed=5)
    options = dict(optimizer=gm.Adam([0.1, 0.0005, 0.05]), epochs=12, validation_data=validation)
    trainers, stops = [], []
    for device in ("cpu", backend):
        stop = gm.EarlyStopping(2)
        trainers.append(fitted(network(device=device, models=3, seed=SEEDS), callbacks=[stop], **options))
        stops.append((stop.best_epoch.tolist(), trainers[-1].network.steps.tolist()))
    assert_same_fit(*trainers)
    assert stops[0] == stops[1] and len(set(stops[0][1])) > 1
    best = [min(values[i] for values in trainers[1].history["val_loss"]) for i in range(3)]
    np.testing.assert_allclose(trainers[1].evaluate(*validation)["loss"], best, rtol=1e-6)


def test_the_best_weights_are_evaluated_in_bf16(backend):
    """What products read follows the weights that were put back."""
    validation, stop = table(30, seed=5), gm.EarlyStopping(9)
    net = network(device=backend, precision="bf16")
    trainer = fitted(net, optimizer=gm.Adam(0.1), epochs=5, validation_data=validation, callbacks=[stop])
    values = trainer.history["val_loss"]
    assert values[-1] > min(values) == trainer.evaluate(*validation)["loss"]
    assert np.argmin(values) + 1 == stop.best_epoch[0]


def test_all_models_stopped_ends_the_fit(backend):
    stop = gm.EarlyStopping(1, monitor="loss", min_delta=100.0)
    host, device = both(network, backend, epochs=9, callbacks=[stop])
    assert_same_fit(host, device)
    assert device.stopped == "early" and device.epochs_done == 2


@pytest.mark.parametrize("models", [None, 2])
def test_a_time_limit_ends_a_fit_between_steps(models, backend, monkeypatch):
    """After those that were made together; the counts say how many."""
    X, y = table(n=100 * BATCH)
    trainer = fitted(network(models=models, device=backend), X, y, time_limit=1e-9)
    assert (trainer.stopped, trainer.position, trainer.history) == ("time limit", 1, {})
    assert trainer.network.steps.tolist() == [1] * (models or 1)
    clock = iter(range(1000))
    monkeypatch.setattr("gpumlp.trainer.time.monotonic", lambda: next(clock))
    trainer = fitted(network(models=models, device=backend), X, y, time_limit=33)
    assert trainer.stopped == "time limit" and 0 < trainer.position < 100
    assert trainer.network.steps.tolist() == [100 * trainer.epochs_done + trainer.position] * (models or 1)
    assert np.isfinite(trainer.epoch_loss()).all()


def test_ctrl_c_ends_a_fit_behind_the_steps_under_way(backend):
    class Interrupt(gm.Callback):
        every_step = False

        def on_step_end(self, trainer, loss):
            if trainer.position >= 32:
                signal.raise_signal(signal.SIGINT)

    net, (X, y) = network(device=backend), table(n=100 * BATCH)
    with pytest.warns(UserWarning, match="fit was interrupted in epoch 1 of 3; the network is usable as it is"):
        trainer = fitted(net, X, y, callbacks=[Interrupt()])
    assert (trainer.stopped, trainer.position, net.steps.tolist()) == ("interrupted", 32, [32])
    assert net.predict(X).shape == y.shape


def test_a_second_fit_goes_on(backend):
    trainers = both(network, backend, augment=AUGMENT)
    for trainer in trainers:
        trainer.fit(*table(30, seed=8), epochs=2, batch_size=7, validation_data=table(20, seed=3))
    assert_same_fit(*trainers)
    assert trainers[1].epoch == 5


# --- averaged weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if not row.full_batch])
def test_averaged_weights(name, dtype, backend):
    """Of parameters, after the largest norm, and of running statistics; validation and the network have them."""

    def make(**options):
        layers = [gm.Dense(9, "relu", norm="batch", max_norm=0.9), gm.Dense(7, "tanh")]
        return network(*layers, dtype=dtype, standardize=True, **options)

    host, device = both(make, backend, optimizer=name, ema=0.8, validation_data=table(30, seed=2))
    assert_same_fit(host, device, **({} if dtype == "float32" else dict(rtol=1e-12, weights=1e-11)))
    reached = device._last["flat"].get()
    np.testing.assert_allclose(reached, host._last["flat"], rtol=0, atol=1e-4)
    assert (np.abs(reached - device.network.flat.get()) > 1e-3).any()  # training goes on from others


def test_averaged_weights_of_a_fleet(backend):
    """Each model its own, with unequal rows, early stopping, and one that diverges."""
    trainers = []
    for device in ("cpu", backend):
        stop = gm.EarlyStopping(2, monitor="loss")
        options = dict(rows=ROWS, augment=AUGMENT, optimizer=gm.Adam([0.01, 0.1, 0.003]), callbacks=[stop], epochs=5)
        trainers.append(fitted(busy(device=device), ema=[0.9, 0.5, 0.99], validation_data=table(30, seed=2), **options))
    assert_same_fit(*trainers)
    diverged = []
    for device in ("cpu", backend):
        _net, run = unstable(device, models=3, rate=[0.003, 3.0, 0.001], ema=0.9)
        with pytest.warns(UserWarning, match="the loss of model 1 is not finite at step"):
            diverged.append(run())
    for name, values in weights_of(diverged[0].network).items():
        np.testing.assert_allclose(weights_of(diverged[1].network)[name], values, rtol=1e-3, atol=1e-5)


def test_training_does_not_notice_that_it_is_averaged(backend):
    """The weights that it reaches have the bits of a fit without; also where products read a copy in bfloat16."""
    for precision in ("float32", "bf16"):
        make = lambda p=precision: network(gm.Dense(9, "relu", norm="batch"), device=backend, precision=p)  # noqa: E731
        averaged, plain = (fitted(make(), *table(37 * BATCH), ema=ema, schedule="cosine") for ema in (0.99, None))
        assert averaged.history["loss"] == plain.history["loss"]
        np.testing.assert_array_equal(averaged._last["flat"].get(), plain.network.flat.get())
        averaged.fit(*table(), epochs=1, batch_size=BATCH)
        plain.fit(*table(), epochs=1, batch_size=BATCH)
        assert averaged.history["loss"] == plain.history["loss"]


def test_averaged_weights_are_evaluated_in_bf16(backend):
    """What products read follows them."""
    validation = table(30, seed=5)
    averaged = fitted(network(device=backend, precision="bf16"), ema=0.95, epochs=2, validation_data=validation)
    net = network(device=backend, precision="bf16")
    net.flat[...] = averaged.network.flat
    found = gm.Trainer(net, SOFTMAX).evaluate(*validation)["loss"]
    assert averaged.history["val_loss"][-1] == averaged.evaluate(*validation)["loss"] == found


@pytest.mark.parametrize("step", [1, 5, 8, 13, 24])
def test_averages_are_resumed(step, tmp_path, backend, every_four):
    options = dict(rows=ROWS, optimizer=gm.Adam([0.01, 0.003, 0.02]), augment=AUGMENT, ema=[0.9, 0.5, 0.99])
    path = tmp_path / "state"
    whole = fitted(busy(device=backend), **options)
    saved_at(busy(device=backend), step, path, False, **options)
    assert bits_of(resumed(busy(device=backend), path, **options)) == bits_of(whole)


def test_averages_travel_between_devices(tmp_path, backend):
    options = dict(optimizer=gm.AdamW(0.01), ema=0.9)
    whole = fitted(busy(device="cpu"), **options)
    saved_at(busy(device=backend), 13, tmp_path / "state", **options)
    with pytest.warns(UserWarning, match="goes on in another environment"):
        there = resumed(busy(device="cpu"), tmp_path / "state", **options)
    assert_same_fit(whole, there)


# --- losses that are not finite --------------------------------------------------------------------------------------


def unstable(device, models=None, rate=1.0, **options):
    """It diverges within some steps at a large rate, and later at a smaller one."""
    X = table()[0]
    net = network(gm.Dense(9, "relu"), models=models, device=device)
    return net, lambda: fitted(net, 3 * X, X[:, :CLASSES], loss="squared_error", optimizer=gm.SGD(rate), **options)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("rate", [3.0, 0.1, 0.05])
def test_a_network_that_diverges(rate, told, backend):
    """The error names loss, step and rate as on the host, the weights are those before the step."""
    found, nets, seen = [], [], []
    for device in ("cpu", backend):
        losses = Losses()
        net, run = unstable(device, rate=rate, schedule="cosine", callbacks=[losses] if told else [])
        with pytest.raises(gm.DivergedError) as error:
            run()
        found.append(str(error.value))
        nets.append(net)
        seen.append(len(losses.losses))
    assert found[1] == found[0] and "with learning rate" in found[0]
    assert seen[1] == seen[0]
    assert nets[1].steps.tolist() == nets[0].steps.tolist()
    host, device = (weights_of(net) for net in nets)
    for name, values in host.items():
        assert np.isfinite(device[name]).all()
        np.testing.assert_allclose(device[name], values, rtol=1e-3, atol=1e-4 * np.abs(values).max())


def test_a_model_that_diverges_alone(backend):
    """It is left as it was, with a warning that names it, its step and epoch; the others do not notice."""
    found, trainers = [], []
    for device in ("cpu", backend):
        _net, run = unstable(device, models=3, rate=[0.003, 3.0, 0.001])
        with pytest.warns(UserWarning, match="the loss of model 1 is not finite at step") as caught:
            trainers.append(run())
        found.append([(str(w.message), w.filename) for w in caught])
    assert found[1] == found[0] and len(found[0]) == 1
    host, device = trainers
    assert device.network.steps.tolist() == host.network.steps.tolist() and len(set(device.network.steps.tolist())) == 2
    np.testing.assert_allclose(
        [[v[0], v[2]] for v in device.history["loss"]], [[v[0], v[2]] for v in host.history["loss"]], rtol=1e-5
    )
    alone = fitted(
        network(gm.Dense(9, "relu"), models=3, device=backend), 3 * table()[0], table()[0][:, :CLASSES],
        loss="squared_error", optimizer=gm.SGD([0.003, 0.003, 0.001]),
    )  # fmt: skip
    for i in (0, 2):
        np.testing.assert_array_equal(device.network.flat.get()[i], alone.network.flat.get()[i])


@pytest.mark.parametrize("weight", [None, np.linspace(0.5, 2, N)], ids=["plain", "weighted"])
def test_models_that_share_a_batch_with_one_that_diverged(weight, backend):
    """The first of them stops; the batch is still filled for the others."""
    trainers = []
    for device in ("cpu", backend):
        _net, run = unstable(device, models=3, rate=[3.0, 0.003, 0.001], shuffle=False, sample_weight=weight)
        with pytest.warns(UserWarning, match="the loss of model 0 is not finite"):
            trainers.append(run())
    host, device = ([v[1:] for v in trainer.history["loss"]] for trainer in trainers)
    np.testing.assert_allclose(device, host, rtol=1e-5)
    assert trainers[1].network.steps.tolist() == trainers[0].network.steps.tolist()


def test_models_that_diverge_at_different_steps_of_an_epoch(backend):
    """Each warning has the facts of its own models."""
    found = []
    for device in ("cpu", backend):
        _net, run = unstable(device, models=3, rate=[3.0, 0.003, 0.07])
        with pytest.warns(UserWarning) as caught:
            run()
        found.append([str(w.message) for w in caught])
    assert found[1] == found[0] and len(found[0]) == 2


def test_a_fleet_whose_models_all_diverge(backend):
    found = []
    for device in ("cpu", backend):
        _net, run = unstable(device, models=2, rate=[3.0, 3.0])
        with pytest.raises(gm.DivergedError) as error:
            run()
        found.append(str(error.value))
    assert found[1] == found[0]


def test_a_trial_of_lbfgs_that_overflows_is_shortened(backend):
    """Its loss is no loss of the fit: the model goes on."""
    optimizer = gm.LBFGS([1e22, 1.0], history=2, max_evaluations=100)
    host, device = both(
        lambda **o: network(gm.Dense(5, "tanh"), models=2, **o), backend, loss="squared_error", optimizer=optimizer
    )
    assert_same_fit(host, device, rtol=1e-4, weights=1e-2)
    assert device.network.steps.tolist() == [3, 3]
    assert (np.diff(device.history["loss"], axis=0) < 0).all()


@pytest.mark.parametrize("models", [None, 3])
def test_lbfgs_draws_once_an_iteration(models, backend):
    """Masks, noise and shares are a step's: all trials of its line search have the same, the next step has others."""

    def make(**options):
        layers = [gm.Dense(9, "tanh", norm="batch", dropout=0.3)]
        return network(*layers, models=models, dtype="float64", standardize=True, **options)

    optimizer = gm.LBFGS(history=2, max_evaluations=6)
    assert_same_fit(*both(make, backend, optimizer=optimizer, augment=AUGMENT), rtol=1e-8)


# --- states ----------------------------------------------------------------------------------------------------------


class SaveAt(gm.Callback):
    """Saves the state at a step and ends the fit there."""

    def __init__(self, step, path, every_step=True):
        self.step, self.path, self.every_step, self.made = step, path, every_step, 0

    def on_step_end(self, trainer, loss):
        if trainer.epochs_done * trainer.steps_per_epoch + trainer.position >= self.step:
            trainer.save_state(self.path)
            raise Stop


def saved_at(net, step, path, every_step=True, **options):
    with pytest.raises(Stop):
        fitted(net, callbacks=[SaveAt(step, path, every_step)], **options)


def resumed(net, path, *, loss=SOFTMAX, optimizer="adam", schedule=None, augment=(), ema=None, **fit):
    trainer = gm.Trainer(net, loss, optimizer, schedule=schedule, augment=augment, ema=ema)
    trainer.resume(path)
    callbacks = fit.pop("callbacks", [SaveAt(10**9, path, False)])
    trainer.fit(table()[0], targets_of(loss), **{"epochs": 3, "batch_size": BATCH, "callbacks": callbacks} | fit)
    return trainer


@pytest.mark.parametrize("step", [1, 5, 8, 13, 24])
@pytest.mark.parametrize("every_step", [True, False])
def test_a_resumed_fit_has_the_same_bits(step, every_step, tmp_path, backend, every_four):
    """Wherever it was stopped; with a schedule, dropout, augmentation and models of unequal rows."""
    options = dict(rows=ROWS, optimizer=gm.Adam([0.01, 0.003, 0.02]), schedule="one_cycle", augment=AUGMENT)
    path = tmp_path / "state"
    whole = fitted(busy(device=backend), **options)
    saved_at(busy(device=backend), step, path, every_step, **options)
    assert bits_of(resumed(busy(device=backend), path, **options)) == bits_of(whole)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam"])
def test_every_optimizers_state_is_kept(name, tmp_path, backend):
    optimizer = gm.LBFGS(history=2, max_evaluations=6) if name == "lbfgs" else OPTIMIZERS[name]()
    if name == "sgd":
        optimizer = gm.SGD(0.1, momentum=0.9)
    options = dict(optimizer=optimizer, loss=SOFTMAX)
    whole = fitted(network(device=backend), **options)
    saved_at(network(device=backend), 2 if name == "lbfgs" else 13, tmp_path / "state", **options)
    assert bits_of(resumed(network(device=backend), tmp_path / "state", **options)) == bits_of(whole)


@pytest.mark.parametrize("there", ["cpu", "device"])
def test_a_state_travels_between_devices(there, tmp_path, backend):
    """Saved on one side and taken up on the other, it goes on as if it had been there all along, but for rounding."""
    options = dict(optimizer=gm.AdamW(0.01), schedule="cosine", augment=AUGMENT)
    devices = ("cpu", backend) if there == "cpu" else (backend, "cpu")
    whole = fitted(busy(device="cpu"), **options)
    saved_at(busy(device=devices[0]), 13, tmp_path / "state", **options)
    with pytest.warns(UserWarning, match="goes on in another environment, and may round otherwise: device '.*', was '"):
        there = resumed(busy(device=devices[1]), tmp_path / "state", **options)
    assert_same_fit(whole, there)


@pytest.mark.parametrize("at", [3, 13])
def test_early_stopping_is_taken_up(at, tmp_path, backend):
    """With the best weights that it keeps, which come from the file to the device."""
    options = dict(optimizer=gm.Adam([0.05, 0.01]), epochs=4, validation_data=table(30, seed=5))
    make = lambda: network(device=backend, models=2)  # noqa: E731
    whole = fitted(make(), callbacks=[gm.EarlyStopping(3), SaveAt(10**9, None, False)], **options)
    with pytest.raises(Stop):
        fitted(make(), callbacks=[gm.EarlyStopping(3), SaveAt(at, tmp_path / "state", False)], **options)
    callbacks = [gm.EarlyStopping(3), SaveAt(10**9, None, False)]
    assert bits_of(resumed(make(), tmp_path / "state", callbacks=callbacks, **options)) == bits_of(whole)


def test_a_state_after_the_fit(tmp_path, backend):
    """The device's memory is given back by then; what training had reached is what is saved."""
    path = tmp_path / "state"
    trainer = fitted(network(device=backend), callbacks=[SaveAt(10**9, path, False)], epochs=2)
    trainer.save_state(path)
    assert bits_of(resumed(network(device=backend), path)) == bits_of(fitted(network(device=backend)))


def test_a_state_after_the_best_weights_were_put_back(tmp_path, backend):
    """The network has the best weights, the file those that training had reached."""
    options = dict(optimizer=gm.Adam(0.05), validation_data=table(30, seed=5))
    path, stop = tmp_path / "state", lambda: [gm.EarlyStopping(9)]
    trainer = fitted(network(device=backend), callbacks=stop(), epochs=3, **options)
    assert np.argmin(trainer.history["val_loss"]) < 2
    trainer.save_state(path)
    whole = fitted(network(device=backend), callbacks=stop(), epochs=5, **options)
    assert bits_of(resumed(network(device=backend), path, callbacks=stop(), **options | dict(epochs=5))) == bits_of(
        whole
    )


def test_a_state_of_a_fit_in_which_a_model_diverged(tmp_path, backend):
    options = dict(optimizer=gm.SGD([0.003, 3.0]), loss="squared_error")

    def run(callback):
        net, X = network(gm.Dense(9, "relu"), models=2, device=backend), table()[0]
        return fitted(net, 3 * X, targets_of("squared_error"), callbacks=[callback], **options)

    with pytest.warns(UserWarning, match="model 1 is not finite"):
        whole = run(SaveAt(10**9, None))
    with pytest.warns(UserWarning, match="model 1 is not finite"), pytest.raises(Stop):
        run(SaveAt(13, tmp_path / "state"))
    trainer = gm.Trainer(network(gm.Dense(9, "relu"), models=2, device=backend), "squared_error", options["optimizer"])
    trainer.resume(tmp_path / "state")
    trainer.fit(
        3 * table()[0], targets_of("squared_error"), epochs=3, batch_size=BATCH, callbacks=[SaveAt(10**9, None)]
    )
    assert bits_of(trainer) == bits_of(whole)


# --- graphs ----------------------------------------------------------------------------------------------------------


def long_fit(device, n=40, epochs=3, **options):
    """Epochs of 40 steps, more than a graph makes: graphs of 32, of 8 and of single steps."""
    X, y = table(n * BATCH - 3)
    return fitted(network(device=device), X, y, epochs=epochs, **{"schedule": "cosine"} | options)


class Counting(EmulatedRuntime):
    """Counts what is captured, replayed and allocated."""

    def __init__(self, **options):
        super().__init__(**options)
        self.captured, self.allocated = [], 0

    def allocate(self, nbytes):
        assert self._recording is None
        self.allocated += 1
        return super().allocate(nbytes)

    def capture(self, function):
        replay = super().capture(function)
        self.captured.append(sum(getattr(work, "name", "").startswith("update_") for work in replay.args[0]))
        return replay


def test_recorded_steps_are_the_steps():
    host, device = both(lambda device: network(device=device), gpu(), *table(37 * BATCH), schedule="cosine", epochs=3)
    assert_same_fit(host, device)
    never = fitted(network(device=gpu(can_capture=False)), *table(37 * BATCH), schedule="cosine", epochs=3)
    assert bits_of(device) == bits_of(never)


def test_what_is_recorded():
    """Single steps to reach a multiple of 32, 32, and the rest of an epoch; each once."""
    runtime = Counting()
    trainer = long_fit(GpuBackend(runtime))
    assert sorted(runtime.captured) == [1, 8, 32]
    trainer.fit(*table(40 * BATCH - 3), epochs=1, batch_size=BATCH)
    assert sorted(runtime.captured[3:]) == [1, 8]  # 2 steps to load kernels, 30 alone, 8: a fit records anew
    trainer.fit(*table(40 * BATCH - 3), epochs=2, batch_size=16)
    assert sorted(runtime.captured[5:]) == [1, 20]
    assert trainer.network.steps.tolist() == [40 * 4 + 20 * 2]


def test_an_evaluation_is_recorded_once():
    runtime = Counting()
    long_fit(GpuBackend(runtime), validation_data=table(50))
    assert sorted(runtime.captured) == [0, 1, 8, 32]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("validated", [False, True])
def test_the_host_asks_once_an_epoch(validated, ema):
    """However many steps it has: for losses and counts, and for logits and losses of the validation's rows."""
    downloads = {}
    for n in (40, 80):
        backend, at = gpu(), []

        class Epochs(gm.Callback):
            def on_epoch_end(self, trainer, record, at=at, backend=backend):
                at.append(backend.runtime.downloads)

        long_fit(backend, n, 4, validation_data=table(50) if validated else None, callbacks=[Epochs()], ema=ema)
        downloads[n] = np.diff(at).tolist()
    assert downloads[40] == downloads[80] == [3 if validated else 1] * 3


@pytest.mark.parametrize("ema", [None, 0.9])
def test_steps_allocate_nothing_and_download_nothing(ema):
    """The second epoch's steps find all that they need."""
    runtime, counts = Counting(), []

    class Steps(gm.Callback):
        every_step = False

        def on_step_end(self, trainer, loss):
            counts.append((trainer.epochs_done, trainer.position, runtime.allocated, runtime.downloads))

    long_fit(GpuBackend(runtime), callbacks=[Steps()], augment=AUGMENT, validation_data=table(50), ema=ema)
    for epochs in [(1,), (2,)] if ema else [(1, 2)]:  # between two the factors of the bias correction are sent
        assert len({allocated for done, _, allocated, _ in counts if done in epochs}) == 1
    for epoch in (0, 1, 2):
        within = [downloads for done, position, _, downloads in counts if done == epoch and position < 40]
        assert len(set(within)) == 1


def bake_in(monkeypatch, what, while_recording):
    """Have a verb read what it read at its first step, or have a graph read what stood there when it was recorded."""
    verb, copies = getattr(GpuBackend, what), {}

    def frozen(backend, array):
        recording = backend.runtime._recording is not None
        if id(array) not in copies:
            copies[id(array)] = array, GpuBackend._copy(backend, array)
        _, copy = copies[id(array)]
        if while_recording and not recording:  # of the latest step made launch by launch
            copy[...] = array
        return copy

    def optimizer_step(backend, bound, models, current, counters):
        return verb(backend, bound, models, frozen(backend, current), counters)

    def gather(backend, batch, rows=None):
        there, own = frozen(backend, batch.step), batch.step
        batch.step = there
        try:
            return verb(backend, batch, rows)
        finally:
            batch.step = own

    monkeypatch.setattr(GpuBackend, what, {"optimizer_step": optimizer_step, "gather": gather}[what])


@pytest.mark.parametrize("while_recording", [False, True])
@pytest.mark.parametrize("what", ["optimizer_step", "gather"])
def test_what_should_change_and_does_not_shows_in_the_curves(what, while_recording, monkeypatch):
    """Learning rate and bias corrections, or the place in the epoch, as they were at one step."""
    right = long_fit(gpu(), epochs=2)
    bake_in(monkeypatch, what, while_recording)
    wrong = long_fit(gpu(), epochs=2)
    with pytest.raises(AssertionError):
        assert_same_fit(right, wrong)


@pytest.mark.parametrize("what", [None, "optimizer_step", "gather"])
def test_a_graph_is_checked_on_request(what, monkeypatch):
    """Against launches one by one, from the same state; what a capture made constant is found."""
    plain = long_fit(gpu(), augment=AUGMENT, ema=0.9)
    monkeypatch.setenv("GPUMLP_CHECK_GRAPH", "1")
    if what is None:
        assert bits_of(long_fit(gpu(), augment=AUGMENT, ema=0.9)) == bits_of(plain)
        assert_same_fit(*both(busy, gpu(), optimizer=gm.Adam(clip_norm=1.0), rows=ROWS, augment=AUGMENT))
        return
    bake_in(monkeypatch, what, while_recording=True)
    with pytest.raises(AssertionError, match="a replayed graph differs from its launches in <DeviceArray"):
        long_fit(gpu(), augment=AUGMENT)


def test_a_graph_of_lower_precision_is_checked(monkeypatch):
    monkeypatch.setenv("GPUMLP_CHECK_GRAPH", "1")
    net = network(gm.Dense(9, "relu", norm="batch", max_norm=0.5), device=gpu(), precision="bf16")
    assert np.isfinite(fitted(net).history["loss"]).all()


class Refusing(EmulatedRuntime):
    """Captures nothing, or nothing of more than ``most`` launches."""

    def __init__(self, most=0, **options):
        super().__init__(**options)
        self.most = most

    def capture(self, function):
        replay = super().capture(function)
        if len(replay.args[0]) > self.most:
            raise RuntimeError("no room for a graph")
        return replay


@pytest.mark.parametrize("most", [0, 60], ids=["none", "single steps"])
@pytest.mark.parametrize("n", [40, 62])
def test_where_nothing_can_be_recorded(n, most):
    """One warning, then launch by launch, with the same bits; 62 steps have a graph of 30 behind the first two."""
    right = long_fit(gpu(), n, 2, validation_data=table(50))
    with pytest.warns(RuntimeWarning) as caught:
        found = long_fit(GpuBackend(Refusing(most)), n, 2, validation_data=table(50))
    assert bits_of(found) == bits_of(right)
    assert [str(w.message) for w in caught] == [
        "training steps could not be recorded as a CUDA graph and run launch by launch, which is slower: "
        "no room for a graph"
    ]


def test_the_warning_names_the_call_of_fit():
    with pytest.warns(RuntimeWarning) as caught:
        long_fit(GpuBackend(Refusing()))
    assert caught[0].filename == __file__
    assert linecache.getline(__file__, caught[0].lineno).strip().startswith("trainer.fit(")


def test_a_device_without_graphs_is_not_asked():
    device = gpu(can_capture=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = long_fit(device, validation_data=table(50))
    assert bits_of(found) == bits_of(long_fit(gpu(), validation_data=table(50)))


@pytest.mark.parametrize("models", [None, 3])
def test_a_short_table_of_coefficients(models, monkeypatch, every_four):
    """Filled anew in the middle of an epoch, also where models have made unequal numbers of steps."""
    options = dict(optimizer=gm.NAdam(0.01), schedule="cosine", augment=AUGMENT)
    options["rows"] = ROWS if models else None
    right = fitted(network(models=models, device=gpu()), **options)
    monkeypatch.setattr(device_step, "TABLE", 3)
    assert bits_of(fitted(network(models=models, device=gpu()), **options)) == bits_of(right)
    monkeypatch.setattr(device_step, "AHEAD", 0)
    assert bits_of(fitted(network(models=models, device=gpu()), **options)) == bits_of(right)


@pytest.mark.parametrize("steps", [1, 3, 8, 50])
def test_the_length_of_a_graph_changes_no_bit(steps, monkeypatch):
    right = fitted(busy(device=gpu()), rows=ROWS, augment=AUGMENT)
    monkeypatch.setattr(device_step, "STEPS", steps)
    assert bits_of(fitted(busy(device=gpu()), rows=ROWS, augment=AUGMENT)) == bits_of(right)


# --- bits ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_whatever_the_order_of_threads():
    """Of a whole fit with everything on, validation included."""
    options = dict(rows=ROWS, augment=AUGMENT, sample_weight=np.linspace(0, 1, N), validation_data=table(30))
    options["optimizer"] = gm.Adam(l1=1e-4, clip_norm=0.5)
    found = [bits_of(fitted(busy(device=gpu(schedule=schedule)), **options)) for schedule in (0, 0, 1, 2, 3)]
    assert all(other == found[0] for other in found[1:])
    assert bits_of(fitted(busy(device=gpu(), seed=[1, 2, 3]), **options)) != found[0]


def test_lbfgs_has_the_same_bits_whatever_the_order_of_threads():
    optimizer = gm.LBFGS(history=2, max_evaluations=4, l2=0.01)
    found = [bits_of(fitted(network(device=gpu(schedule=schedule)), optimizer=optimizer)) for schedule in (0, 1, 2)]
    assert found[1] == found[2] == found[0]


def test_epilogues_change_a_fit_by_rounding_alone():
    found = [fitted(network(device=gpu(prefer=prefer)), optimizer=gm.SGD(0.1)) for prefer in (0, 1)]
    assert_same_fit(*found, rtol=1e-6)


# --- data that stay on the host --------------------------------------------------------------------------------------

STREAMED = {
    "one network": (network, {}),
    "a fleet": (busy, dict(rows=ROWS)),
    "a fleet on all rows": (busy, {}),
    "one batch for all models": (lambda **o: network(models=2, **o), dict(shuffle=False)),
    "weights": (network, dict(sample_weight=np.linspace(0, 2, N))),
    "a fleet with weights": (busy, dict(rows=ROWS, sample_weight=np.linspace(0, 2, N))),
    "augmented": (busy, dict(rows=ROWS, augment=AUGMENT)),
    "values": (network, dict(loss="huber")),
    "in order": (network, dict(shuffle=False)),
    "validated": (network, dict(validation_data=table(30))),
    "float64": (lambda **o: network(dtype="float64", **o), {}),
    "lbfgs": (network, dict(optimizer=gm.LBFGS(history=2, max_evaluations=4))),
    "one step at a time": (network, dict(callbacks=[Losses()])),
    "bf16": (lambda **o: network(precision="bf16", **o), {}),
}


BYTES = [("one network", kind) for kind in ("u1", "u4", "f8", "?")] + [("a fleet with weights", "u1")]


@pytest.mark.parametrize("case, kind", [*((case, "f4") for case in STREAMED), *BYTES])
def test_streamed_data_give_the_same_bits(case, kind, every_four):
    make, options = STREAMED[case]
    X = np.random.default_rng(0).integers(0, 9, (N, FEATURES)).astype(kind)
    make_one = lambda: make(device=gpu(), standardize=True)  # noqa: E731
    resident = fitted(make_one(), X, **options)
    streamed = fitted(make_one(), X, memory_limit=100, **options)
    if case == "validated":  # its passes are not recorded: products of other lengths may round otherwise
        assert_same_fit(resident, streamed, rtol=1e-6)
    else:
        assert bits_of(streamed) == bits_of(resident)


def test_the_limit_decides_what_streams(every_four, monkeypatch):
    """Data of its size do not yet; without one, four fifths of what is free are the limit."""
    X, y = table()

    def streams(device=None, **options):
        seen = []

        class Look(gm.Callback):
            def on_epoch_end(self, trainer, record):
                seen.append(trainer._step._stream is not None)

        fitted(network(device=device or gpu()), X, y, epochs=1, callbacks=[Look()], **options)
        return seen[0]

    assert not streams() and not streams(memory_limit=X.nbytes)
    assert streams(memory_limit=X.nbytes - 1) and streams(memory_limit=0)
    monkeypatch.setattr("gpumlp.streaming.FREE_SHARE", 1e-9)
    assert streams() and not streams(memory_limit=X.nbytes)


def test_data_larger_than_the_device():
    """They never lie there as a whole: 128 KB in a device of 100 KB."""
    X = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    y = np.arange(2000) % CLASSES
    make = lambda memory: gm.Network(  # noqa: E731
        [gm.Dense(8, "tanh"), gm.Dense(CLASSES)], n_features=16, device=gpu(memory=memory)
    )
    small = fitted(make(100_000), X, y, batch_size=4, epochs=1)
    assert bits_of(small) == bits_of(fitted(make(1 << 30), X, y, batch_size=4, epochs=1))


def test_few_rows_take_no_more_room_than_they_need():
    """Slots are as long as the data where those are fewer rows than a graph's steps take."""
    X, y = np.zeros((300, 50), np.float32), np.arange(300) % 2
    device = gpu(memory=250_000)
    net = gm.Network([gm.Dense(2)], n_features=50, device=device)
    assert len(fitted(net, X, y, batch_size=100, memory_limit=1000).history["loss"]) == 3


def test_a_streamed_fit_is_resumed(tmp_path, backend, every_four):
    options = dict(rows=ROWS, augment=AUGMENT, memory_limit=10)
    whole = fitted(busy(device=backend), **options)
    for step in (2, 6, 8, 13):
        saved_at(busy(device=backend), step, tmp_path / "state", **options)
        assert bits_of(resumed(busy(device=backend), tmp_path / "state", **options)) == bits_of(whole)


def test_data_on_the_device_do_not_stream(backend):
    X, y = table()
    there = ForeignArray(on_device(backend.runtime, X))
    limited = fitted(network(device=backend), there, y, memory_limit=0)
    assert bits_of(limited) == bits_of(fitted(network(device=backend), X, y))


def test_an_evaluation_streams_too(backend):
    X, y = table(100)
    trainer = fitted(network(device=backend))
    assert isinstance(trainer._evaluation(X, y, None, 10), Evaluation)
    resident, streamed = (trainer._evaluation(X, y, None, limit).run() for limit in (None, 10))
    np.testing.assert_allclose(streamed["loss"], resident["loss"], rtol=1e-6)
    np.testing.assert_array_equal(streamed["accuracy"], resident["accuracy"])


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_device_with_too_little_memory():
    """The error says what is needed and free; the network then predicts, and trains with a smaller batch."""
    device = gpu(memory=400_000)
    net = gm.Network([gm.Dense(64, "relu"), gm.Dense(CLASSES)], n_features=FEATURES, device=device)
    X, y = table(4000)
    expected = net.logits(X[:50])
    trainer = gm.Trainer(net, SOFTMAX)
    with pytest.raises(
        DeviceMemoryError, match=r"cuda:0 has [\d,]+ bytes free and an array needs [\d,]+: try a smaller"
    ):
        trainer.fit(X, y, batch_size=4000, epochs=1)
    np.testing.assert_array_equal(net.logits(X[:50]), expected)
    gc.collect()
    losses = trainer.fit(X, y, batch_size=100, epochs=2)["loss"]
    host = gm.Network([gm.Dense(64, "relu"), gm.Dense(CLASSES)], n_features=FEATURES, device="cpu")
    np.testing.assert_allclose(losses, gm.Trainer(host, SOFTMAX).fit(X, y, batch_size=100, epochs=2)["loss"], rtol=1e-5)


def test_a_fit_gives_its_memory_back(no_collector):
    """Data, buffers and graphs, when it is over, however it ended; the optimizer's own state stays."""
    device = gpu()
    net = network(device=device)
    trainer = fitted(net, validation_data=table(30), epochs=1)
    after_one = device.runtime.free_bytes()
    for _ in range(3):
        trainer.fit(*table(), epochs=1, batch_size=BATCH, validation_data=table(30))
        assert device.runtime.free_bytes() == after_one
    with pytest.raises(Stop):
        trainer.fit(*table(), batch_size=BATCH, callbacks=[SaveAt(3, os.devnull)])
    assert device.runtime.free_bytes() == after_one


def test_a_fit_keeps_a_view_of_no_more_than_it_made(backend):
    """A network's arrays are the same ones after a fit: views that a user holds see the training."""
    net = network(device=backend)
    W, flat = net.parameters["dense_0.W"], net.flat
    before = W.get()
    fitted(net)
    assert net.flat is flat and isinstance(W, DeviceArray) and (W.get() != before).any()
    np.testing.assert_array_equal(W.get(), net.parameters["dense_0.W"].get())


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_model_that_diverges_keeps_its_running_statistics(device):
    """It is left as it was, and that is not NaN."""
    network = gm.Network(
        [gm.Dense(5, "relu", norm="batch"), gm.Dense(1)],
        n_features=2,
        models=2,
        seed=SEEDS[:2],
        device=gpu() if device == "gpu" else "cpu",
    )
    X = np.random.default_rng(0).standard_normal((24, 2)).astype(np.float32)
    network.parameters["dense_0.W"][1] = np.full((5, 2), np.inf)
    with pytest.warns(UserWarning, match="the loss of model 1 is not finite at step 1"):
        gm.Trainer(network, "squared_error", "sgd").fit(X, X[:, :1], epochs=1, batch_size=8)
    mean, variance = (network.backend.to_numpy(network.statistics[f"dense_0.{name}"]) for name in ("mean", "variance"))
    np.testing.assert_array_equal(mean[1], 0)
    np.testing.assert_array_equal(variance[1], 1)
    assert mean[0].any()


@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end"])
def test_a_callback_may_assign_to_the_parameters(hook):
    """Products then read what was assigned, in bfloat16 too."""

    class Zero(gm.Callback):
        def act(self, trainer, *_):
            trainer.network.flat[...] = 0

    setattr(Zero, hook, Zero.act)
    network = gm.Network([gm.Dense(5, "relu"), gm.Dense(CLASSES)], n_features=3, device=gpu(), precision="bf16")
    X, y = np.random.default_rng(0).standard_normal((16, 3)), np.arange(16) % CLASSES
    history = gm.Trainer(network, SOFTMAX, "sgd").fit(X, y, epochs=3, batch_size=16, callbacks=[Zero()])
    np.testing.assert_allclose(history["loss"][1:], np.log(CLASSES), rtol=1e-2)


def test_a_stream_is_waited_for_before_its_memory_is_given_back(monkeypatch, every_four):
    waited, backend = [], gpu()
    upload = backend.runtime.upload_async

    def upload_async(*arguments):
        event = upload(*arguments)
        monkeypatch.setattr(event, "wait", lambda: waited.append(event), raising=False)
        uploads.append(event)
        return event

    class Stop(gm.Callback):
        def on_step_end(self, trainer, loss):
            if trainer.position == 4:
                raise RuntimeError("enough")

    uploads: list = []
    monkeypatch.setattr(backend.runtime, "upload_async", upload_async)
    network = gm.Network([gm.Dense(CLASSES)], n_features=3, device=backend)
    X, y = np.random.default_rng(0).standard_normal((64, 3)), np.arange(64) % CLASSES
    with pytest.raises(RuntimeError, match="enough"):
        gm.Trainer(network, SOFTMAX, "sgd").fit(X, y, batch_size=8, memory_limit=0, callbacks=[Stop()])
    last = uploads[1::2]  # X and y travel one behind the other: who waits for y has waited for X
    assert len(last) == 2 and {id(event) for event in last} <= {id(event) for event in waited}
