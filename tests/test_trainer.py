"""Trainer.fit: what it computes and records, how it ends, what it refuses. Resuming is tested in test_files.py."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.data import split_indices
from gpumlp.losses import LOSSES
from gpumlp.metrics import METRICS
from gpumlp.optimizers import OPTIMIZERS
from gpumlp.schedules import SCHEDULES

N, FEATURES, CLASSES, BATCH, SEED = 50, 5, 3, 8, 3  # 50 rows in batches of 8: the last holds 2
STEPS = 7  # of an epoch
MINI_BATCH = [name for name, row in OPTIMIZERS.items() if not row.full_batch]
SOFTMAX = "softmax_cross_entropy"


def table(n=N, seed=0):
    """X (n, FEATURES) float32 and labels (n,) that depend on it; every class occurs."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, FEATURES)).astype(np.float32)
    y = (X @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1)
    y[:CLASSES] = np.arange(CLASSES)
    return X, y


def targets(loss, n=N, outputs=CLASSES):
    """Targets of the kind that ``loss`` takes."""
    X, y = table(n)
    kind = LOSSES[loss].targets
    if kind == "labels or probabilities":
        return y
    return np.eye(outputs)[y] if kind == "binary" else np.exp(0.3 * X[:, :outputs])


def network(outputs=CLASSES, seed=SEED, **options):
    return gm.Network([gm.Dense(7, "tanh"), gm.Dense(outputs)], n_features=FEATURES, seed=seed, **options)


def trained(X, y, *, loss=SOFTMAX, optimizer="adam", net=None, schedule=None, augment=(), **options):
    """Trains two epochs and returns the trainer."""
    trainer = gm.Trainer(net or network(), loss, optimizer, schedule=schedule, augment=augment)
    trainer.fit(X, y, **{"epochs": 2, "batch_size": BATCH} | options)
    return trainer


def same_weights(one, other):
    np.testing.assert_array_equal(one.network.flat, other.network.flat)


class Steps(gm.Callback):
    """Counts steps and epochs, and does something at one step."""

    def __init__(self, at=0, action=None):
        self.at, self.action, self.steps, self.epochs, self.ended, self.losses = at, action, 0, 0, 0, []

    def on_step_end(self, trainer, loss):
        self.steps += 1
        self.losses.append(loss.copy())
        if self.steps == self.at:
            self.action()

    def on_epoch_end(self, trainer, record):
        self.epochs += 1

    def on_fit_end(self, trainer):
        self.ended += 1


# --- the arithmetic: fit is the loop that a user could write ---------------------------------------------------------


def by_hand(X, y, net, loss, optimizer, *, epochs=2, rates=None, shuffle=True, weight=None, first_epoch=0):
    """The loop with nothing hidden; returns each epoch's mean loss."""
    means, rates = [], iter(rates if rates is not None else [])
    for epoch in range(first_epoch, first_epoch + epochs):
        total = share = 0.0
        for X_batch, rows in gm.batches(
            X, np.arange(len(X)), batch_size=BATCH, seed=int(net.seeds[0]), epoch=epoch, shuffle=shuffle
        ):
            w = None if weight is None else weight[rows]
            value, dz = loss(net.forward(X_batch), y[rows], w)
            net.backward(dz)
            optimizer.step(net, next(rates, None))
            n = len(rows) if w is None else np.sum(w, dtype=np.float64)
            total, share = total + value * n, share + n
        means.append(total / share)
    return means


def deep(**options):
    """Everything that a step can hold: dropout, batch normalisation, a largest norm."""
    return gm.Network(
        [gm.Dense(7, "relu", norm="batch", dropout=0.3), gm.Dense(6, "tanh", max_norm=0.8), gm.Dense(CLASSES)],
        n_features=FEATURES,
        seed=SEED,
        input_dropout=0.1,
        **options,
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MINI_BATCH)
def test_fit_is_the_loop_written_by_hand(name, dtype):
    (X, y), net = table(), deep(dtype=dtype)
    X = X.astype(dtype)
    trainer = trained(X, y, optimizer=OPTIMIZERS[name](l2=0.01, clip_norm=1.0), net=deep(dtype=dtype))
    means = by_hand(X, y, net, gm.Loss(SOFTMAX), OPTIMIZERS[name](l2=0.01, clip_norm=1.0))
    np.testing.assert_array_equal(trainer.network.flat, net.flat)
    for key, values in net.statistics.items():
        np.testing.assert_array_equal(trainer.network.statistics[key], values)
    np.testing.assert_allclose(trainer.history["loss"], means, rtol=1e-12)
    assert net.steps.tolist() == trainer.network.steps.tolist() == [2 * STEPS]


@pytest.mark.parametrize("loss", LOSSES)
def test_fit_is_the_loop_written_by_hand_for_every_loss(loss):
    (X, _), y, net = table(), targets(loss), network()
    trainer = trained(X, y, loss=loss, optimizer="sgd")
    means = by_hand(X, y, net, gm.Loss(loss), gm.SGD())
    np.testing.assert_array_equal(trainer.network.flat, net.flat)
    np.testing.assert_allclose(trainer.history["loss"], means, rtol=1e-12)


def test_lbfgs_takes_the_full_batch_in_one_step_an_epoch():
    (X, y), net, optimizer, loss = table(), network(), gm.LBFGS(), gm.Loss(SOFTMAX)
    trainer = trained(X, y, optimizer="lbfgs", epochs=4, batch_size=3)

    def evaluate():
        value, dz = loss(net.forward(X), y)
        net.backward(dz)
        return value

    means = [optimizer.step(net, evaluate=evaluate) for _ in range(4)]
    assert trainer.steps_per_epoch == 1
    np.testing.assert_allclose(trainer.history["loss"], means, rtol=1e-12)
    same_weights(trainer, SimpleNamespace(network=net))


def test_history_and_counters():
    (X, y), seen = table(), Steps()
    trainer = trained(X, y, epochs=3, callbacks=[seen])
    assert list(trainer.history) == ["epoch", "loss", "learning_rate", "seconds"]
    assert trainer.history["epoch"] == [1, 2, 3] and trainer.history["learning_rate"] == [1e-3] * 3
    assert all(type(value) is float for name in ("loss", "learning_rate", "seconds") for value in trainer.history[name])
    assert (seen.steps, seen.epochs, seen.ended) == (3 * STEPS, 3, 1)
    assert trainer.steps_per_epoch == STEPS and trainer.network.steps.tolist() == [3 * STEPS]
    assert trainer.stopped == "epochs" and (trainer.epoch, trainer.epochs_done, trainer.position) == (3, 3, 0)
    own = np.concatenate(seen.losses).reshape(3, STEPS)  # the epoch's loss is the mean over rows: the last batch has 2
    np.testing.assert_allclose(trainer.history["loss"], np.average(own, axis=1, weights=[8] * 6 + [2]), rtol=1e-12)


def test_a_fleet_records_lists():
    X, y = table()
    trainer = trained(X, y, net=network(models=2), optimizer=gm.SGD([0.1, 0.01]), validation_data=(X, y))
    history = trainer.history
    assert history["learning_rate"] == [[0.1, 0.01]] * 2
    assert all(len(values) == 2 for name in ("loss", "val_loss", "val_accuracy") for values in history[name])
    assert all(type(value) is float for name in ("loss", "val_loss") for value in history[name][0])


@pytest.mark.parametrize("models", [None, 1])
def test_a_list_of_one_learning_rate(models):
    X, y = table()
    net = network(models=models)
    history = trained(X, y, net=net, optimizer=gm.Adam([0.01])).history
    assert np.ravel(history["learning_rate"]).tolist() == [0.01, 0.01]
    np.testing.assert_array_equal(trained(X, y, optimizer=gm.Adam(0.01)).network.flat, net.flat)


def test_a_second_fit_trains_on():
    (X, y), net = table(), deep()
    trainer = trained(X, y, net=deep())
    first = trainer.history
    second = trainer.fit(X, y, epochs=1, batch_size=BATCH)
    by_hand(X, y, net, gm.Loss(SOFTMAX), gm.Adam(), epochs=3)
    np.testing.assert_array_equal(trainer.network.flat, net.flat)
    assert second["epoch"] == [1] and second is trainer.history and first["epoch"] == [1, 2]


def test_the_trainer_takes_a_fresh_copy_of_the_optimizer():
    (X, y), optimizer = table(), gm.Adam()
    one, other = (trained(X, y, optimizer=optimizer) for _ in range(2))
    same_weights(one, other)
    optimizer.step(network())  # still belongs to no network
    assert one.optimizer is not optimizer


# --- batches, weights, labels, layouts -------------------------------------------------------------------------------


def test_rows_stay_in_order_without_shuffle():
    (X, y), net = table(), network()
    trainer = trained(X, y, optimizer="sgd", shuffle=False)
    by_hand(X, y, net, gm.Loss(SOFTMAX), gm.SGD(), shuffle=False)
    np.testing.assert_array_equal(trainer.network.flat, net.flat)
    assert (trainer.network.flat != trained(X, y, optimizer="sgd").network.flat).any()


@pytest.mark.parametrize("batch_size", [1, 49, 50, 1000])
def test_every_batch_size(batch_size):
    (X, y), seen = table(), Steps()
    trained(X, y, epochs=1, batch_size=batch_size, callbacks=[seen])
    assert seen.steps == {1: 50, 49: 2, 50: 1, 1000: 1}[batch_size]


def test_sample_weight():
    (X, y), net = table(), network()
    weight = np.random.default_rng(1).uniform(0, 2, N).astype(np.float32)
    weight[::4] = 0
    trainer = trained(X, y, optimizer="sgd", sample_weight=weight)
    means = by_hand(X, y, net, gm.Loss(SOFTMAX), gm.SGD(), weight=weight)
    np.testing.assert_array_equal(trainer.network.flat, net.flat)
    np.testing.assert_allclose(trainer.history["loss"], means, rtol=1e-6)
    changed = X.copy()
    changed[::4] = 9.0  # rows of weight zero count for nothing
    same_weights(trainer, trained(changed, y, optimizer="sgd", sample_weight=weight))


@pytest.mark.parametrize("kind", ["balanced", "dict", "array"])
def test_class_weight_is_a_sample_weight(kind):
    X, y = table()
    per_class = N / (CLASSES * np.bincount(y)) if kind == "balanced" else np.array([1.0, 3.0, 0.5])
    class_weight = {"balanced": "balanced", "dict": {1: 3.0, 2: 0.5}, "array": [1.0, 3.0, 0.5]}[kind]
    weighted = trained(X, y, loss=gm.Loss(SOFTMAX, class_weight=class_weight))
    same_weights(weighted, trained(X, y, sample_weight=per_class[y]))
    both = trained(X, y, loss=gm.Loss(SOFTMAX, class_weight=class_weight), sample_weight=np.arange(N))
    np.testing.assert_allclose(
        both.network.flat, trained(X, y, sample_weight=per_class[y] * np.arange(N)).network.flat, rtol=1e-5
    )


def test_class_weight_of_one_sigmoid_output():
    X, y = table()
    loss = gm.Loss("binary_cross_entropy", class_weight=[1.0, 4.0])
    weighted = trained(X, y == 0, loss=loss, net=network(1))
    same_weights(
        weighted, trained(X, y == 0, loss="binary_cross_entropy", net=network(1), sample_weight=1 + 3.0 * (y == 0))
    )


def test_rows_of_a_single_network():
    X, y = table()
    rows = np.arange(3, 40)
    same_weights(trained(X, y, rows=[rows], shuffle=False), trained(X[rows], y[rows], shuffle=False))


def test_rows_of_a_fleet_are_those_of_the_models_alone():
    X, y = table()
    rows = [np.arange(50), np.arange(0, 50, 2), np.arange(7)]
    seeds, smoothing = [1, 2, 3], [0.0, 0.1, 0.3]
    optimizer, loss = gm.AdamW([0.01, 0.02, 0.03], l2=[0.0, 0.1, 0.2]), gm.Loss(SOFTMAX, label_smoothing=smoothing)
    net = network(models=3, seed=seeds, standardize=True)
    fleet = trained(X, y, net=net, rows=rows, epochs=3, optimizer=optimizer, loss=loss)
    for i, part in enumerate(rows):
        net, loss = network(seed=seeds[i], standardize=True), gm.Loss(SOFTMAX, label_smoothing=smoothing[i])
        alone = trained(X[part], y[part], net=net, epochs=3, optimizer=optimizer.for_model(i), loss=loss)
        np.testing.assert_allclose(fleet.network.shift[i], X[part].mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(fleet.network[i].flat, alone.network.flat, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([loss[i] for loss in fleet.history["loss"]], alone.history["loss"], rtol=1e-5)
    assert fleet.network.steps.tolist() == [21, 12, 3]


@pytest.mark.parametrize(
    "names",
    [
        np.array(["cat", "dog", "fox"]),
        np.array(["cat", "dog", "fox"], dtype=object),
        np.array(["cat", "dog", "fox"], dtype=np.dtypes.StringDType()),
        np.array([10, 20, 30], dtype=object),
    ],
    ids=["text", "objects", "StringDType", "numbers"],
)
def test_labels_that_are_names(names):
    X, y = table()
    trainer = trained(X, names[y], validation_data=(X, names[y][::-1]))
    same_weights(trainer, trained(X, y))
    assert trainer.network.classes.tolist() == names.tolist()
    predicted = trainer.network.predict(X)
    assert set(predicted.tolist()) <= set(names.tolist())
    assert trainer.evaluate(X, names[y])["accuracy"] == np.mean(predicted == names[y].astype(predicted.dtype))


@pytest.mark.parametrize("outputs, loss", [(2, SOFTMAX), (1, "binary_cross_entropy")])
def test_bool_labels_and_two_names(outputs, loss):
    X, y = table()
    y = y == 1
    bools = trained(X, y, loss=loss, net=network(outputs))
    assert bools.network.predict(X).dtype == bool
    same_weights(bools, trained(X, y.astype(int), loss=loss, net=network(outputs)))
    names = trained(X, np.where(y, "yes", "no"), loss=loss, net=network(outputs))
    same_weights(bools, names)
    np.testing.assert_array_equal(names.network.predict(X) == "yes", bools.network.predict(X))
    assert bools.evaluate(X, y.astype(int)) == bools.evaluate(X, y)


@pytest.mark.parametrize("form", [lambda y: y[:, None], lambda y: y.astype(float), lambda y: y.astype(np.uint8), list])
def test_forms_of_labels(form):
    X, y = table()
    same_weights(trained(X, form(y)), trained(X, y))


def test_bools_are_numbers_to_a_network_that_learned_numbers():
    X, y = table()
    trainer = trained(X, (y == 1).astype(int), net=network(2), validation_data=(X, y == 1))
    assert trainer.history["val_accuracy"][-1] == np.mean(trainer.network.predict(X) == (y == 1))


def test_forms_of_values():
    X, _ = table()
    y = X[:, 0] ** 2
    one = trained(X, y, loss="squared_error", net=network(1))
    same_weights(one, trained(X, y[:, None], loss="squared_error", net=network(1)))
    assert one.network.predict(X).shape == (N,)


LAYOUTS = {
    "float64": lambda X: X.astype(np.float64),
    "float16": lambda X: X.astype(np.float16),
    "uint8": lambda X: np.abs(40 * X).astype(np.uint8),
    "int16": lambda X: (100 * X).astype(np.int16),
    "bool": lambda X: X > 0,
    "big endian": lambda X: X.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "every second column": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "list": lambda X: X.tolist(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_float32(layout):
    X, y = table()
    X = LAYOUTS[layout](X)
    plain = np.ascontiguousarray(X, np.float32)
    trainer = trained(X, y, validation_data=(X, y))
    same_weights(trainer, trained(plain, y))
    assert trainer.evaluate(X, y) == trainer.evaluate(plain, y)


def test_inputs_are_not_modified():
    X, _ = table()
    arrays = {
        "X": X.astype(np.float32),
        "y": targets("squared_error").astype(np.float32),
        "w": np.linspace(0, 1, N, dtype=np.float32),
        "rows": np.arange(N - 1),
        "X_val": X.copy(),
    }
    kept = {name: array.copy() for name, array in arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    trainer = gm.Trainer(
        network(standardize=True, standardize_targets=True), "squared_error", augment=[gm.GaussianNoise(), gm.Mixup()]
    )
    a = SimpleNamespace(**arrays)
    trainer.fit(
        a.X, a.y, sample_weight=a.w, rows=[a.rows], validation_data=(a.X_val, a.y, a.w), epochs=2, batch_size=BATCH
    )
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, kept[name])


def test_standardisation_is_learned_from_the_training_rows_and_once():
    X, y = table()
    X[:, 1] = 4.0  # constant
    trainer = trained(X, y, net=network(standardize=True), validation_split=0.2)
    train, _ = split_indices(N, 0.2, seed=SEED, stratify=y)
    np.testing.assert_allclose(trainer.network.shift[0], X[train].mean(axis=0), rtol=1e-5)
    kept = trainer.network.shift.copy()
    trainer.fit(X + 3, y, epochs=1)
    np.testing.assert_array_equal(trainer.network.shift, kept)


def test_standardised_targets_predict_in_the_units_of_y():
    X, _ = table(200)
    y = np.column_stack([1e4 + 1e3 * X[:, 0], 1e-3 * X[:, 1]])
    net = network(2, standardize_targets=True)
    trainer = trained(X, y, loss="squared_error", net=net, epochs=150, optimizer=gm.Adam(0.01), validation_data=(X, y))
    assert trainer.history["val_r2"][-1] > 0.97
    assert abs(net.predict(X)[:, 0].mean() - 1e4) < 300 and net.predict(X)[:, 1].std() < 2e-3
    assert trainer.history["val_loss"][-1] < 0.1  # in the units that the network fits, as the training loss


# --- randomness ------------------------------------------------------------------------------------------------------

SCRIPT = """
import hashlib, numpy as np, gpumlp as gm
rng = np.random.default_rng(0)
X, y = rng.normal(size=(50, 5)).astype(np.float32), np.arange(50) % 3
net = gm.Network([gm.Dense(7, "relu", dropout=0.3, norm="batch"), gm.Dense(3)], n_features=5, seed={seed})
gm.Trainer(net, "softmax_cross_entropy", augment=[gm.GaussianNoise(), gm.Mixup()]).fit(X, y, epochs=2, batch_size=8)
digest = hashlib.sha256(net.flat.tobytes()).hexdigest()
"""


def test_the_same_seed_gives_the_same_bits_in_a_fresh_process():
    digests = {}
    for seed in (1, 2):
        space: dict = {}
        exec(SCRIPT.format(seed=seed), space)
        digests[seed] = space["digest"]
    root = Path(gm.__file__).parents[1]  # the package under test, installed or not
    fresh = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(seed=1) + "print(digest)"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
    )
    assert fresh.stdout.strip() == digests[1] != digests[2]


def test_numpy_s_global_generator_is_neither_read_nor_moved():
    X, y = table()
    one = trained(X, y, net=deep())
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    other = trained(X, y, net=deep())
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    same_weights(one, other)


# --- validation ------------------------------------------------------------------------------------------------------


def test_validation_data_are_what_evaluate_says():
    (X, y), (X_val, y_val) = table(), table(20, seed=1)
    weight = np.arange(20.0)
    plain = trained(X, y, validation_data=(X_val, y_val))
    weighted = trained(X, y, validation_data=[X_val, y_val, weight])
    for trainer, found in ((plain, plain.evaluate(X_val, y_val)), (weighted, weighted.evaluate(X_val, y_val, weight))):
        assert (
            trainer.history["val_loss"][-1] == found["loss"]
            and trainer.history["val_accuracy"][-1] == found["accuracy"]
        )
    assert plain.history["val_loss"] != weighted.history["val_loss"]
    same_weights(plain, trained(X, y))


def test_validation_split_holds_rows_out():
    X, y = table()
    weight = np.linspace(1, 2, N)
    trainer = trained(X, y, validation_split=0.2, sample_weight=weight)
    train, held = split_indices(N, 0.2, seed=SEED, stratify=y)
    other = trained(X[train], y[train], sample_weight=weight[train], validation_data=(X[held], y[held], weight[held]))
    same_weights(trainer, other)
    assert trainer.history["val_loss"] == other.history["val_loss"]


def test_validation_split_of_values():
    X, _ = table()
    trainer = trained(X, X[:, :2], loss="squared_error", net=network(2), validation_split=0.5)
    train, _ = split_indices(N, 0.5, seed=SEED)
    same_weights(trainer, trained(X[train], X[train, :2], loss="squared_error", net=network(2)))
    assert set(trainer.history) >= {"val_loss", "val_r2"}


@pytest.mark.parametrize("metrics", ["f1", ["f1", "accuracy"], []])
def test_metrics_are_named_in_the_history(metrics):
    X, y = table()
    trainer = gm.Trainer(network(), SOFTMAX, metrics=metrics)
    trainer.fit(X, y, epochs=1, validation_data=(X, y))
    names = [metrics] if isinstance(metrics, str) else metrics
    assert [name for name in trainer.history if name.startswith("val_")] == ["val_loss", *(f"val_{n}" for n in names)]


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "plateau"])
def test_schedules_set_the_rate_of_every_step(name):
    (X, y), net, schedule = table(), network(), SCHEDULES[name]()
    trainer = trained(X, y, optimizer=gm.SGD(0.1), schedule=name, epochs=12)
    times = np.arange(12 * STEPS) / STEPS
    rates = 0.1 * schedule(times, 12)
    by_hand(X, y, net, gm.Loss(SOFTMAX), gm.SGD(0.1), epochs=12, rates=rates)
    np.testing.assert_allclose(trainer.network.flat, net.flat, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(trainer.history["learning_rate"], rates[STEPS - 1 :: STEPS], rtol=1e-12)


def test_plateau_watches_the_validation_loss():
    (X, y), watched = table(), gm.ReduceOnPlateau(patience=1, factor=0.5)
    trainer = trained(
        X,
        y,
        optimizer=gm.SGD(1.0),
        schedule=gm.ReduceOnPlateau(patience=1, factor=0.5),
        epochs=8,
        validation_data=(X, y),
    )
    rates = []
    for value in trainer.history["val_loss"]:
        rates.append(float(watched(0.0, 8)[0]))
        watched.observe(np.array([value]))
    assert trainer.history["learning_rate"] == rates and min(rates) < 1
    trainer.fit(X, y, epochs=1)
    assert trainer.history["learning_rate"] == [1.0]  # its memory is of one fit


def test_plateau_of_a_fleet_has_a_rate_for_each_model():
    X, y = table()
    schedule = gm.ReduceOnPlateau(patience=1, factor=0.5)
    trainer = trained(X, y, net=network(models=2), optimizer=gm.SGD([0.0001, 30.0]), schedule=schedule, epochs=5)
    slow, fast = np.transpose(trainer.history["learning_rate"])
    assert (slow == 0.0001).all() and fast[-1] < 30.0


def test_a_function_is_a_schedule():
    X, y = table()
    same_weights(trained(X, y, schedule=lambda epoch, epochs: 0.5), trained(X, y, optimizer=gm.Adam(0.5e-3)))


# --- how a fit ends --------------------------------------------------------------------------------------------------


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def ctrl_c_from_a_thread():
    thread = threading.Thread(target=ctrl_c)
    thread.start()
    thread.join()


@pytest.mark.parametrize("press", [ctrl_c, ctrl_c_from_a_thread])
@pytest.mark.parametrize("at", [1, 10, 2 * STEPS, 5 * STEPS])
def test_ctrl_c_ends_the_fit_after_the_step(press, at):
    (X, y), seen, before = table(), Steps(at, press), signal.getsignal(signal.SIGINT)
    trainer = gm.Trainer(network(), SOFTMAX)
    where = f"in epoch {at // STEPS + 1} of 5" if at % STEPS else f"after epoch {at // STEPS} of 5"
    with pytest.warns(UserWarning, match=f"fit was interrupted {where}; the network is usable as it is"):
        history = trainer.fit(X, y, epochs=5, batch_size=BATCH, callbacks=[seen])
    assert trainer.stopped == "interrupted" and (seen.steps, seen.ended) == (at, 1)
    assert len(history.get("loss", [])) == at // STEPS
    assert signal.getsignal(signal.SIGINT) is before
    net, rows = network(), iter(gm.batches(X, y, batch_size=BATCH, seed=SEED))
    if at == 1:  # the step in hand was finished
        X_batch, y_batch = next(rows)
        net.backward(gm.Loss(SOFTMAX)(net.forward(X_batch), y_batch)[1])
        gm.Adam().step(net)
        np.testing.assert_array_equal(trainer.network.flat, net.flat)


class AtEpochEnd(gm.Callback):
    def __init__(self, epoch, action):
        self.epoch, self.action = epoch, action

    def on_epoch_end(self, trainer, record):
        if record["epoch"] == self.epoch:
            self.action()


@pytest.mark.parametrize("epoch", [1, 3])
def test_ctrl_c_between_epochs_is_not_lost(epoch):
    X, y = table()
    trainer = gm.Trainer(network(), SOFTMAX)
    with pytest.warns(UserWarning, match="interrupted"):
        trainer.fit(X, y, epochs=3, batch_size=BATCH, callbacks=[AtEpochEnd(epoch, ctrl_c)])
    assert trainer.stopped == "interrupted" and trainer.network.steps[0] == (STEPS + 1 if epoch == 1 else 3 * STEPS)


def test_ctrl_c_puts_the_best_weights_back():
    (X, y), best = table(), {}

    class Watch(gm.Callback):
        def on_epoch_end(self, trainer, record):
            best.setdefault("loss", np.inf)
            if record["val_loss"] < best["loss"]:
                best.update(loss=record["val_loss"], flat=trainer.network.flat.copy())

    trainer = gm.Trainer(network(), SOFTMAX, gm.SGD(20.0))  # so large that the loss goes up and down
    seen = Steps(5 * STEPS + 3, ctrl_c)
    with pytest.warns(UserWarning, match="interrupted"):
        trainer.fit(
            X, y, epochs=9, batch_size=BATCH, validation_data=(X, y), callbacks=[gm.EarlyStopping(8), Watch(), seen]
        )
    np.testing.assert_array_equal(trainer.network.flat, best["flat"])
    assert trainer.evaluate(X, y)["loss"] == min(trainer.history["val_loss"]) < trainer.history["val_loss"][-1]


def test_a_second_ctrl_c_raises():
    (X, y), before = table(), signal.getsignal(signal.SIGINT)

    def twice():
        ctrl_c()
        ctrl_c()

    seen, stopping = Steps(STEPS + 2, twice), gm.EarlyStopping(3)
    trainer = gm.Trainer(network(), SOFTMAX)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(X, y, epochs=5, batch_size=BATCH, callbacks=[stopping, seen])
    assert (seen.steps, seen.ended) == (STEPS + 2, 1) and signal.getsignal(signal.SIGINT) is before
    np.testing.assert_array_equal(trainer.network.flat, stopping.best_weights["flat"])
    assert trainer.fit(X, y, epochs=1)["epoch"] == [1]  # the trainer works on


def test_fit_in_a_thread_leaves_signals_alone():
    (X, y), found = table(), {}
    before = signal.getsignal(signal.SIGINT)

    def work():
        seen = Steps(1, lambda: found.update(handler=signal.getsignal(signal.SIGINT)))
        found["trainer"] = trained(X, y, callbacks=[seen])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["handler"] is before
    same_weights(found["trainer"], trained(X, y))


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when it is told to."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr("gpumlp.trainer.time", SimpleNamespace(monotonic=lambda: now.time))
    return now


class OneSecondAStep(gm.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_step_end(self, trainer, loss):
        self.clock.time += 1


@pytest.mark.parametrize("limit, steps", [(0.5, 1), (9.5, 10), (1000, 5 * STEPS)])
def test_time_limit(clock, limit, steps):
    (X, y), seen = table(), Steps()
    trainer = gm.Trainer(network(), SOFTMAX)
    trainer.fit(X, y, epochs=5, batch_size=BATCH, time_limit=limit, callbacks=[OneSecondAStep(clock), seen])
    assert seen.steps == steps and trainer.stopped == ("time limit" if limit < 1000 else "epochs")
    assert trainer.history.get("seconds", []) == [float(STEPS * (e + 1)) for e in range(steps // STEPS)]


def test_nan_stops_with_step_rate_and_advice():
    X, _ = table()
    net, seen = network(1), Steps()
    trainer = gm.Trainer(net, "squared_error", gm.SGD(1e30))
    kept = {}
    seen.at, seen.action = 1, lambda: kept.update(flat=net.flat.copy())
    message = (
        r"the loss is (inf|nan) at step 2 of epoch 1 with learning rate 1e\+30; try a smaller learning rate, "
        r"clip_norm=1.0 in the optimizer, or standardize=True in the network"
    )
    with pytest.raises(gm.DivergedError, match=message):
        trainer.fit(X, X[:, 0], epochs=2, batch_size=BATCH, callbacks=[seen])
    np.testing.assert_array_equal(net.flat, kept["flat"])  # the bad step changed nothing
    assert seen.ended == 1 and issubclass(gm.DivergedError, ArithmeticError)


def test_one_model_of_a_fleet_diverges_alone():
    X, _ = table()
    y = X[:, 0]
    trainer = gm.Trainer(network(1, models=3, seed=[1, 2, 3]), "squared_error", gm.SGD([0.01, 1e30, 0.02]))
    with pytest.warns(
        UserWarning, match=r"the loss of model 1 is not finite at step 2 of epoch 1: it is left as it is; try"
    ):
        history = trainer.fit(X, y, epochs=3, batch_size=BATCH)
    for i, rate in ((0, 0.01), (2, 0.02)):
        alone = trained(X, y, loss="squared_error", net=network(1, seed=i + 1), optimizer=gm.SGD(rate), epochs=3)
        np.testing.assert_allclose(trainer.network[i].flat, alone.network.flat, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([loss[i] for loss in history["loss"]], alone.history["loss"], rtol=1e-5)
    assert np.isfinite(trainer.network.flat).all() and trainer.network.steps.tolist() == [21, 1, 21]
    assert not np.isfinite([loss[1] for loss in history["loss"]]).any()


def test_all_models_of_a_fleet_diverge():
    X, _ = table()
    trainer = gm.Trainer(network(1, models=2), "squared_error", gm.SGD([1e30, 1e31]))
    with pytest.raises(gm.DivergedError, match=r"with learning rate \[1e\+30, 1e\+31\]; try"):
        trainer.fit(X, X[:, 0], epochs=3, batch_size=BATCH)


def test_a_model_that_diverges_after_the_others_stopped_early_is_no_error():
    X, _ = table()

    class StopFirst(gm.Callback):
        def on_epoch_end(self, trainer, record):
            return [True, False]

    schedule = lambda epoch, epochs: np.where(np.asarray(epoch) < 1, 1.0, 1e32)  # noqa: E731
    trainer = gm.Trainer(network(1, models=2), "squared_error", gm.SGD(0.01), schedule=schedule)
    with pytest.warns(UserWarning, match="the loss of model 1 is not finite at step 2 of epoch 2"):
        trainer.fit(X, X[:, 0], epochs=5, batch_size=BATCH, callbacks=[StopFirst()])
    assert trainer.stopped == "early" and trainer.network.steps.tolist() == [STEPS, STEPS + 1]


# --- bad input -------------------------------------------------------------------------------------------------------


def spoiled(array, index, value):
    array = np.array(array, dtype=np.float64)
    array[index] = value
    return array


X, Y = table()
BAD_DATA = {
    "1-D X": (X[:, 0], Y, ValueError, r"X is one-dimensional, shape \(50,\)"),
    "3-D X": (X[None], Y, ValueError, r"X has shape \(1, 50, 5\); expected \(samples, features\)"),
    "narrow X": (X[:, :4], Y, ValueError, "the network takes 5 features, X has 4"),
    "no rows": (X[:0], Y[:0], ValueError, r"X has no rows, shape \(0, 5\)"),
    "no columns": (X[:, :0], Y, ValueError, "X has no columns"),
    "ragged X": ([[1, 2], [3]], Y, ValueError, "X cannot be made an array: row 0 has 2 values, row 1 has 1"),
    "text X": (X.astype(str), Y, ValueError, "X has dtype <U.*text"),
    "complex X": (X.astype(complex), Y, ValueError, "X has dtype complex128"),
    "object X": (X.astype(object), Y, ValueError, "X has dtype object"),
    "no X": (None, Y, TypeError, "X is a single NoneType"),
    "NaN": (spoiled(X, (17, 3), np.nan), Y, ValueError, r"X\[17, 3\] is nan; every value must be finite"),
    "infinity": (spoiled(X, (4, 0), -np.inf), Y, ValueError, r"X\[4, 0\] is -inf"),
    "beyond float32": (spoiled(X, (4, 0), 1e39), Y, ValueError, r"X\[4, 0\] is 1e\+39, beyond the largest float32"),
    "short y": (X, Y[:-1], ValueError, "y has 49 rows, X has 50"),
    "no y": (X, None, TypeError, "y is a single NoneType"),
    "ragged y": (X, [[1, 2], [3]], ValueError, "y cannot be made an array: row 0 has 2 values"),
    "wide y": (X, np.ones((50, 2)), ValueError, r"y has shape \(50, 2\); expected \(50, 3\)"),
    "label too large": (X, spoiled(Y, 9, 3), ValueError, r"y\[9\] is 3.0; labels must be integers in \[0, 3\)"),
    "negative label": (X, spoiled(Y, 9, -1), ValueError, r"y\[9\] is -1"),
    "broken label": (X, spoiled(Y, 9, 0.5), ValueError, r"y\[9\] is 0.5; labels must be integers"),
    "NaN label": (X, spoiled(Y, 9, np.nan), ValueError, r"y\[9\] is nan"),
    "one class": (X, 0 * Y, ValueError, r"y has one class only \(0\)"),
    "one name": (X, ["a"] * N, ValueError, r"y has one class only \(0\)"),
    "two names": (X, np.array(["a", "b", "b"])[Y], ValueError, "y has 2 classes, but the network has outputs for 3"),
    "four names": (X, np.arange(N).astype(str), ValueError, "y has 50 classes, but the network has outputs for 3"),
    "missing name": (X, ["a", None] * 25, ValueError, r"y\[1\] is None; classes must be all text"),
    "bytes": (
        X,
        np.array([b"a", b"b"])[Y % 2],
        ValueError,
        r"y has dtype \|S1; classes must be text, bools or numbers",
    ),
    "probabilities": (X, np.full((N, 3), 0.5), ValueError, r"y\[0\] sums to 1.5"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case):
    X, y, error, message = BAD_DATA[case]
    net = network()
    before = net.flat.copy()
    trainer = gm.Trainer(net, SOFTMAX)
    with pytest.raises(error, match=message):
        trainer.fit(X, y)
    np.testing.assert_array_equal(net.flat, before)
    assert net.classes is None and trainer.fit(*table(), epochs=1)["epoch"] == [1]  # nothing is left behind


BAD_TARGETS = {
    "values": ("squared_error", 1, spoiled(X[:, 0], 3, np.inf), r"y\[3\] is inf; every value must be finite"),
    "columns": ("squared_error", 2, X[:, 0], r"y has shape \(50,\); expected \(50, 2\)"),
    "text": ("squared_error", 1, ["a"] * N, "y holds text or mixed types"),
    "counts": ("poisson", 1, spoiled(X[:, 0] ** 2, 3, -1), r"y\[3\] is -1.*; counts must be >= 0"),
    "binary": (
        "binary_cross_entropy",
        1,
        spoiled(Y == 0, 3, 2),
        r"y\[3\] is 2.*; probabilities must be between 0 and 1",
    ),
    "one class": ("binary_cross_entropy", 1, np.ones(N), r"y has one class only \(1\)"),
    "one name": ("binary_cross_entropy", 1, ["a"] * N, r"y has one class only \(0\)"),
    "names of several labels": ("binary_cross_entropy", 3, np.array(["a", "b", "c"])[Y], r"y has shape \(50,\)"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets(case):
    loss, outputs, y, message = BAD_TARGETS[case]
    with pytest.raises(ValueError, match=message):
        gm.Trainer(network(outputs), loss).fit(X, y)


BAD_FIT = {
    "epochs 0": ({"epochs": 0}, ValueError, "epochs is 0; it must be an integer >= 1"),
    "epochs 1.5": ({"epochs": 1.5}, TypeError, "epochs is 1.5"),
    "batch_size": ({"batch_size": 0}, ValueError, "batch_size is 0; it must be an integer >= 1"),
    "time_limit": ({"time_limit": 0}, ValueError, r"time_limit is 0; it must be a number in \(0, inf\)"),
    "time_limit text": ({"time_limit": "1"}, TypeError, "time_limit is '1'"),
    "both validations": (
        {"validation_data": (X, Y), "validation_split": 0.5},
        ValueError,
        "give validation_data or validation_split, not both",
    ),
    "validation_data": (
        {"validation_data": X},
        ValueError,
        r"validation_data must be \(X, y\) or \(X, y, sample_weight\)",
    ),
    "validation X": ({"validation_data": (X[:, :2], Y)}, ValueError, "takes 5 features, validation X has 2"),
    "validation y": ({"validation_data": (X, Y + 1)}, ValueError, r"validation y\[\d+\] is 3; labels must be"),
    "validation names": (
        {"validation_data": (X, Y.astype(str))},
        ValueError,
        "validation y holds names, but the network was trained on labels 0 to 2; give those",
    ),
    "validation weight": ({"validation_data": (X, Y, X)}, ValueError, r"sample_weight has shape \(50, 5\)"),
    "validation_split": (
        {"validation_split": 1.0},
        ValueError,
        r"validation_split is 1.0; it must be a number in \(0, 1\)",
    ),
    "split and rows": (
        {"validation_split": 0.5, "rows": [np.arange(9)]},
        ValueError,
        "validation_split would cut across rows; give validation_data",
    ),
    "sample_weight": ({"sample_weight": -np.ones(N)}, ValueError, r"sample_weight\[0\] is -1.0; weights must be >= 0"),
    "short sample_weight": ({"sample_weight": np.ones(9)}, ValueError, r"sample_weight has shape \(9,\)"),
    "zero sample_weight": ({"sample_weight": np.zeros(N)}, ValueError, "sample_weight is zero for every sample"),
    "rows": ({"rows": 5}, TypeError, "rows=5 must be a list with the row numbers of each model"),
    "too many rows": ({"rows": [[0], [1]]}, ValueError, "rows has 2 entries for 1 models"),
    "row number": ({"rows": [[0, 50]]}, ValueError, r"rows\[0\] must hold integers from 0 to 49, at least one"),
    "no row": ({"rows": [[]]}, ValueError, r"rows\[0\] must hold"),
    "row mask": ({"rows": [np.ones(N, bool)]}, ValueError, r"rows\[0\] must hold"),
    "one callback": ({"callbacks": gm.EarlyStopping()}, TypeError, "callbacks=.* must be a list"),
    "callback class": (
        {"callbacks": [gm.EarlyStopping]},
        TypeError,
        r"callbacks holds the class EarlyStopping; give an object, EarlyStopping\(...\)",
    ),
    "no callback": ({"callbacks": [5]}, TypeError, "callbacks holds 5, which has no method of gm.Callback"),
}


@pytest.mark.parametrize("case", BAD_FIT)
def test_bad_arguments_of_fit(case):
    options, error, message = BAD_FIT[case]
    trainer = gm.Trainer(network(), SOFTMAX)
    with pytest.raises(error, match=message):
        trainer.fit(X, Y, **options)
    assert not trainer.network.steps.any() and trainer.history == {}


BAD_TRAINER = {
    "network": ((5, SOFTMAX), {}, TypeError, "network=5 must be a gm.Network"),
    "loss": ((network(), "mse"), {}, ValueError, "loss='mse' is unknown; allowed: squared_error, "),
    "optimizer": ((network(), SOFTMAX, "adm"), {}, ValueError, "optimizer='adm' is unknown; allowed: sgd, "),
    "schedule": (
        (network(), SOFTMAX),
        {"schedule": "cos"},
        ValueError,
        "schedule='cos' is unknown; use one of constant",
    ),
    "metric": ((network(), SOFTMAX), {"metrics": ["acc"]}, ValueError, "metric='acc' is unknown; use one of accuracy"),
    "augment": (
        (network(), SOFTMAX),
        {"augment": ["noise"]},
        TypeError,
        "augment holds 'noise'; allowed: GaussianNoise",
    ),
    "one output": ((network(1), SOFTMAX), {}, ValueError, "at least 2; for one, use binary_cross_entropy"),
    "scaled targets": (
        (network(standardize_targets=True), "poisson"),
        {},
        ValueError,
        "standardize_targets fits losses over values; 'poisson' reads its targets as they are",
    ),
    "smoothing": (
        (network(models=2), gm.Loss(SOFTMAX, label_smoothing=[0.1, 0.2, 0.3])),
        {},
        ValueError,
        "label_smoothing has 3 values for 2 models",
    ),
}


@pytest.mark.parametrize("case", BAD_TRAINER)
def test_bad_arguments_of_trainer(case):
    args, options, error, message = BAD_TRAINER[case]
    with pytest.raises(error, match=message):
        gm.Trainer(*args, **options)
    assert not isinstance(args[0], gm.Network) or args[0].loss is None


FITTING = {  # by loss and number of outputs
    (SOFTMAX, 3): {"accuracy", "balanced_accuracy", "f1", "log_loss"},
    (SOFTMAX, 2): {"accuracy", "balanced_accuracy", "f1", "log_loss", "roc_auc"},
    ("binary_cross_entropy", 1): {"accuracy", "balanced_accuracy", "f1", "log_loss", "roc_auc"},
    ("binary_cross_entropy", 3): {"subset_accuracy"},
    ("squared_error", 3): {"mean_squared_error", "root_mean_squared_error", "mean_absolute_error", "r2"},
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("loss, outputs", FITTING)
def test_a_metric_fits_the_loss_or_is_refused_at_once(loss, outputs, metric):
    if metric not in FITTING[loss, outputs]:
        with pytest.raises(ValueError, match=f"metric '{metric}' does not fit '{loss}' over .* with {outputs} outputs"):
            gm.Trainer(network(outputs), loss, metrics=[metric])
        return
    y = Y % outputs if loss == SOFTMAX else Y == 0 if outputs == 1 else targets(loss)
    trainer = gm.Trainer(network(outputs), loss, metrics=[metric])
    assert np.isfinite(trainer.fit(X, y, epochs=1, validation_data=(X, y))[f"val_{metric}"]).all()


def test_names_after_numbers_and_unknown_names():
    trainer = trained(X, Y)
    with pytest.raises(ValueError, match="y holds names, but the network was trained on labels 0 to 2"):
        trainer.fit(X, Y.astype(str))
    named = trained(X, np.array(["a", "b", "c"])[Y])
    with pytest.raises(ValueError, match=r"evaluation y\[1\] is 'd', an unknown class; known are 'a', 'b', 'c'"):
        named.evaluate(X[:2], ["a", "d"])
    with pytest.raises(ValueError, match=r"validation y\[0\] is 'x', an unknown class"):
        gm.Trainer(network(), SOFTMAX).fit(X, np.array(["a", "b", "c"])[Y], validation_data=(X[:1], ["x"]))


def test_save_state_needs_a_fit(tmp_path):
    with pytest.raises(RuntimeError, match="nothing to save yet: call fit first, or save_state from a callback"):
        gm.Trainer(network(), SOFTMAX).save_state(tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_scales_are_learned_where_there_are_none_and_forgotten_by_initialize():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 3)) + 5, rng.integers(0, 2, 60)
    network = gm.Network([gm.Dense(2)], n_features=3, standardize=True)
    optimizer, loss = gm.SGD(0.1), gm.Loss("softmax_cross_entropy")
    _, dz = loss(network.forward(X), y)
    network.backward(dz)
    optimizer.step(network)
    gm.Trainer(network, "softmax_cross_entropy").fit(X, y, epochs=1)
    np.testing.assert_allclose(network.shift[0], X.mean(axis=0), rtol=1e-5)
    network.initialize()
    gm.Trainer(network, "softmax_cross_entropy").fit(X + 100, y, epochs=1)
    np.testing.assert_allclose(network.shift[0], X.mean(axis=0) + 100, rtol=1e-5)
    values = gm.Network([gm.Dense(1)], n_features=3, standardize_targets=True)
    values.steps += 1  # a loop of one's own has been here
    gm.Trainer(values, "squared_error").fit(X, y + 7.0, epochs=1)
    np.testing.assert_allclose(values.target_shift[0], [y.mean() + 7], rtol=1e-5)


def test_a_last_batch_of_one_row_does_not_move_running_statistics():
    X, y = np.random.default_rng(0).standard_normal((17, 3)), np.arange(17) % 2
    network = gm.Network([gm.Dense(4, "relu", norm="batch"), gm.Dense(2)], n_features=3)
    seen = []

    class Watch(gm.Callback):
        def on_step_end(self, trainer, loss):
            seen.append(network.statistics["dense_0.variance"].copy())

    gm.Trainer(network, "softmax_cross_entropy").fit(X, y, epochs=1, batch_size=16, callbacks=[Watch()])
    np.testing.assert_array_equal(seen[0], seen[1])


def test_class_weights_count_in_the_loss_of_evaluation_too():
    X, y = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32), np.arange(50) % 2
    network = gm.Network([gm.Dense(2)], n_features=3)
    loss = gm.Loss("softmax_cross_entropy", class_weight={0: 10})
    found = gm.Trainer(network, loss).evaluate(X, y)
    assert found["loss"] == pytest.approx(loss(network.logits(X), y)[0], rel=1e-5)


def test_a_resumed_state_is_not_saved_before_it_goes_on(tmp_path):
    X, y = np.random.default_rng(0).standard_normal((50, 3)), np.arange(50) % 2
    trainer = gm.Trainer(gm.Network([gm.Dense(2)], n_features=3), "softmax_cross_entropy")
    trainer.fit(X, y, epochs=1)
    trainer.save_state(tmp_path / "a")
    trainer.resume(tmp_path / "a")
    with pytest.raises(RuntimeError, match="nothing to save yet"):
        trainer.save_state(tmp_path / "b")


def test_a_validation_split_of_rows_without_weight_is_refused_and_binary_labels_are_stratified():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 3)), np.arange(40) % 4 == 0
    trainer = gm.Trainer(gm.Network([gm.Dense(1)], n_features=3), "binary_cross_entropy")
    trainer.fit(X, y.astype(int), epochs=1, validation_split=0.2)
    weight = np.zeros(40)
    weight[0] = 1
    with pytest.raises(ValueError, match="zero"):
        trainer.fit(X, y.astype(int), epochs=1, validation_split=0.2, sample_weight=weight)
