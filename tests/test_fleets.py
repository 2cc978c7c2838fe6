"""Fleets: model i of a fleet is the network of its seed, settings and rows trained alone."""

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.optimizers import OPTIMIZERS
from gpumlp.schedules import SCHEDULES

MODELS = 3
SEEDS = [11, 5, 42]
DROPOUT, INPUT_DROPOUT, SMOOTHING = [0.0, 0.2, 0.5], [0.1, 0.0, 0.3], [0.1, 0.0, 0.3]
TOLERANCE = 1e-6  # relative to the largest value of a tensor; equal bits where a stack of products is made one by one
RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, size=(60, 6)).astype(np.float32)
Y = RNG.integers(0, 4, 60)
ROWS = [RNG.permutation(60)[:n] for n in (51, 37, 48)]  # batches of 16: 4, 3 and 3 steps; the last of 3, 5 and 16 rows
X_VAL, Y_VAL = RNG.normal(2.0, 3.0, size=(40, 6)).astype(np.float32), RNG.integers(0, 4, 40)
EVERYWHERE = dict(l1=[1e-3, 0.0, 1e-2], l2=[0.0, 1e-1, 1e-2])
STEPWISE = EVERYWHERE | dict(weight_decay=[0.5, 0.0, 0.1], clip_norm=[0.5, 9.0, 1.0], clip_value=[0.2, 9.0, 0.1])
SETTINGS = {  # of each optimizer, all that may differ from model to model
    "sgd": dict(learning_rate=[0.1, 0.01, 0.03], momentum=[0.0, 0.5, 0.9], **STEPWISE),
    "rmsprop": dict(learning_rate=[0.01, 0.001, 0.003], rho=[0.0, 0.5, 0.9], epsilon=[1e-8, 1e-2, 0.1], **STEPWISE),
    "adagrad": dict(learning_rate=[0.1, 0.01, 0.03], epsilon=[1e-8, 1e-2, 0.1], **STEPWISE),
    "adadelta": dict(learning_rate=[0.1, 1.0, 0.3], rho=[0.0, 0.5, 0.9], epsilon=[1e-8, 1e-2, 0.1], **STEPWISE),
    "adam": dict(
        learning_rate=[0.01, 0.001, 0.03],
        beta1=[0.0, 0.5, 0.9],
        beta2=[0.9, 0.0, 0.99],
        epsilon=[1e-8, 1e-2, 0.1],
        **STEPWISE,
    ),
    "adamw": dict(learning_rate=[0.01, 0.001, 0.03], beta1=[0.0, 0.5, 0.9], **STEPWISE),
    "nadam": dict(beta1=[0.0, 0.5, 0.9], beta2=[0.9, 0.0, 0.99], momentum_decay=[0.0, 0.004, 0.5], **STEPWISE),
    "lbfgs": dict(learning_rate=[1.0, 0.1, 0.5], **EVERYWHERE),
}


def of(values, i):
    """The value of model ``i``; the whole list for a fleet (``i`` None)."""
    return values if i is None or np.ndim(values) == 0 else values[i]


def build(i=None, *, seed=None, standardize=True, dtype="float32"):
    """The fleet, or its model ``i`` as a network of its own."""
    layers = [
        gm.Dense(7, "tanh", norm="batch", dropout=of(DROPOUT, i), max_norm=1.5),
        gm.Dense(5, "relu", norm="layer", norm_after=True),
        gm.Dense(4),
    ]
    return gm.Network(
        layers,
        n_features=6,
        models=MODELS if i is None else None,
        seed=of(SEEDS, i) if seed is None else seed,
        standardize=standardize,
        dtype=dtype,
        input_dropout=of(INPUT_DROPOUT, i),
    )


def softmax(i=None):
    return gm.Loss("softmax_cross_entropy", label_smoothing=of(SMOOTHING, i))


def train(network, i, optimizer="adam", *, loss=None, schedule=None, augment=(), ema=None, rows=ROWS, x=X, y=Y, **fit):
    """Train the fleet on its rows, or model ``i``'s twin on its own."""
    trainer = gm.Trainer(network, loss or softmax(i), optimizer, schedule=schedule, augment=augment, ema=of(ema, i))
    fit = dict(epochs=4, batch_size=16) | fit
    if i is None:
        trainer.fit(x, y, rows=rows, **fit)
    else:
        own = slice(None) if rows is None else rows[i]
        fit["sample_weight"] = None if fit.get("sample_weight") is None else fit["sample_weight"][own]
        trainer.fit(x[own], y[own], **fit)
    return trainer


def assert_same(fleet, i, alone, tolerance=TOLERANCE):
    """Parameters, running statistics, standardisation, step count and predictions of model ``i`` and its twin."""
    assert fleet.steps[i] == alone.steps[0]
    pairs = [(values[i], alone.parameters[name][0]) for name, values in fleet.parameters.items()]
    pairs += [(values[i], alone.statistics[name][0]) for name, values in fleet.statistics.items()]
    names = [name for name in ("shift", "scale", "target_shift", "target_scale") if getattr(fleet, name) is not None]
    pairs += [(getattr(fleet, name)[i], getattr(alone, name)[0]) for name in names]
    pairs += [(fleet.logits(X_VAL)[i], alone.logits(X_VAL))]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


# --- model i is the network alone -----------------------------------------------------------------------------------


def test_every_optimizer_has_its_settings_here():
    assert SETTINGS.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_model_is_its_lone_run(name):
    """With everything on: dropout, normalisation, standardisation, augmentation, shuffling, max-norm, smoothing."""
    optimizer = OPTIMIZERS[name](**SETTINGS[name])
    augment = [gm.RandomShift(1, (2, 3)), gm.GaussianNoise(0.05), gm.Mixup(0.4)]
    fleet = build()
    start = fleet.flat.copy()
    together = train(fleet, None, optimizer, augment=augment, validation_data=(X_VAL, Y_VAL))
    assert fleet.steps.tolist() == ([4, 4, 4] if optimizer.full_batch else [16, 12, 12])
    for i in range(MODELS):
        alone = build(i)
        np.testing.assert_array_equal(alone.flat[0], start[i])
        history = train(alone, i, optimizer.for_model(i), augment=augment, validation_data=(X_VAL, Y_VAL)).history
        assert (fleet.flat[i] != start[i]).any()
        assert_same(fleet, i, alone)
        for key in ("loss", "val_loss", "val_accuracy", "learning_rate"):
            shared = [np.broadcast_to(values, MODELS)[i] for values in together.history[key]]
            np.testing.assert_allclose(shared, history[key], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not OPTIMIZERS[name].full_batch])
def test_each_models_averaged_weights_are_its_lone_runs(name):
    """Bit for bit, though the models make unequal numbers of updates, and one of them stops before the others."""
    optimizer, ema = OPTIMIZERS[name](**SETTINGS[name]), [0.9, 0.5, 0.99]

    class Retire(gm.Callback):
        def __init__(self, models):
            self.models = models

        def on_epoch_end(self, trainer, record):
            return self.models if record["epoch"] == 3 else None

    def arguments(retired):
        callbacks = [gm.EarlyStopping(9), Retire(np.array(retired))]
        return dict(ema=ema, validation_data=(X_VAL, Y_VAL), epochs=6, callbacks=callbacks)

    def weights(trainer):
        shown = {"shown.flat": trainer.network.flat} | trainer.network.statistics
        kept = {f"average.{key}": values for key, values in trainer.average.averages.items()}
        return shown | kept | {f"reached.{key}": values for key, values in trainer._last.items()}

    fleet = build()
    together = train(fleet, None, optimizer, **arguments([False, True, False]))
    assert fleet.steps.tolist() == [24, 9, 18]
    for i in range(MODELS):
        alone = build(i)
        own = train(alone, i, optimizer.for_model(i), **arguments([i == 1]))
        assert_same(fleet, i, alone)
        for key, values in weights(own).items():
            np.testing.assert_array_equal(weights(together)[key][i], values[0])


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_with_one_seed_model_0_is_the_lone_network(name):
    fleet, alone = build(seed=7), build(0, seed=7)
    train(fleet, None, name)
    train(alone, 0, name)
    assert_same(fleet, 0, alone)
    assert len({values.tobytes() for values in fleet.flat}) == MODELS


def graph(i):
    x = gm.Input(6, of(INPUT_DROPOUT, i))
    h = gm.Dense(5, "gelu", dropout=of(DROPOUT, i))(x)
    both = gm.Concat()(x, gm.Add()(h, gm.Dense(5, "tanh", norm="layer")(h)))
    return gm.Network(x, gm.Dense(4)(both), models=MODELS if i is None else None, seed=of(SEEDS, i))


def regression(i):
    layers = [gm.Dense(7, "tanh"), gm.Dense(2)]
    models = MODELS if i is None else None
    return gm.Network(
        layers, n_features=6, models=models, seed=of(SEEDS, i), standardize="global", standardize_targets=True
    )


VARIANTS = {  # how a network is built, and the arguments of train
    "graph": (graph, {}),
    "regression from bytes with weights": (
        regression,
        dict(loss="huber", x=RNG.integers(0, 256, size=(60, 6), dtype=np.uint8), y=RNG.normal(5, 9, size=(60, 2))),
    ),
    "float64": (lambda i: build(i, dtype="float64"), {}),
    "one batch": (build, dict(batch_size=1000)),
    "rows one by one": (
        build,
        dict(batch_size=1, epochs=1, rows=[r[:n] for r, n in zip(ROWS, (9, 4, 6), strict=True)]),
    ),
    "without shuffling": (build, dict(shuffle=False)),
    "shared rows": (build, dict(rows=None)),
    "shared rows without shuffling": (build, dict(rows=None, shuffle=False)),
    "shared rows with noise alone": (build, dict(rows=None, shuffle=False, augment=gm.GaussianNoise(0.1))),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_and_data(variant, weighted):
    make, arguments = VARIANTS[variant]
    weight = np.random.default_rng(3).uniform(0.1, 2, 60) if weighted else None
    fleet = make(None)
    train(fleet, None, sample_weight=weight, **arguments)
    for i in range(MODELS):
        alone = make(i)
        train(alone, i, sample_weight=weight, **arguments)
        assert_same(fleet, i, alone, TOLERANCE if fleet.dtype == "float32" else 1e-14)


def test_a_larger_fleet_in_blocks():
    """Weights of a model fill more than a block of the optimizer, and a layer more than one of the backend."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 150)).astype(np.float32), rng.integers(0, 10, 200)
    rows = [rng.permutation(200)[:n] for n in (200, 130)]

    def large(i=None):
        layers = [gm.Dense(140, "relu"), gm.Dense(10)]
        return gm.Network(layers, n_features=150, models=2 if i is None else None, seed=of(SEEDS[:2], i))

    fleet = large()
    trainer = gm.Trainer(fleet, "softmax_cross_entropy", gm.AdamW([1e-3, 1e-2]))
    trainer.fit(x, y, rows=rows, batch_size=128, epochs=2)
    for i in range(2):
        alone = large(i)
        gm.Trainer(alone, "softmax_cross_entropy", gm.AdamW([1e-3, 1e-2][i])).fit(
            x[rows[i]], y[rows[i]], batch_size=128, epochs=2
        )
        for ours, theirs in zip(fleet.parameters.values(), alone.parameters.values(), strict=True):
            np.testing.assert_allclose(ours[i], theirs[0], rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("per_model", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_by_each_models_own_time(name, per_model):
    """Models with fewer rows make fewer steps in an epoch; a plateau is each model's own."""
    schedule = gm.ReduceOnPlateau(0.5, patience=1, tolerance=0.01) if name == "plateau" else SCHEDULES[name]()
    rate = [0.05, 0.3, 0.1] if per_model else 0.1
    fleet = build()
    trainer = train(fleet, None, gm.SGD(rate), schedule=schedule, epochs=6, validation_data=(X_VAL, Y_VAL))
    rates = np.array([np.broadcast_to(values, MODELS) for values in trainer.history["learning_rate"]])
    for i in range(MODELS):
        alone = build(i)
        history = train(
            alone,
            i,
            gm.SGD(of(rate, i) if per_model else rate),
            schedule=schedule,
            epochs=6,
            validation_data=(X_VAL, Y_VAL),
        ).history
        np.testing.assert_allclose(rates[:, i], history["learning_rate"], rtol=1e-12)
        assert_same(fleet, i, alone)
    if name == "plateau":
        relative = rates / rates[0]
        assert (relative[-1] < 1).any() and len({tuple(column) for column in relative.T}) > 1  # not all at once


# --- models that stop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore_best", [True, False])
@pytest.mark.parametrize("optimizer", [gm.Adam([0.003, 0.03, 0.1]), gm.LBFGS()], ids=["adam", "lbfgs"])
def test_early_stopping_is_each_models_own(optimizer, restore_best):
    stopping = gm.EarlyStopping(2, restore_best=restore_best)
    arguments = dict(epochs=25, validation_data=(X_VAL, Y_VAL))
    fleet = build()
    trainer = train(fleet, None, optimizer, callbacks=[stopping], **arguments)
    ends = []
    for i in range(MODELS):
        alone, own = build(i), gm.EarlyStopping(2, restore_best=restore_best)
        history = train(alone, i, optimizer.for_model(i), callbacks=[own], **arguments).history
        ends.append(len(history["epoch"]))
        assert own.best_epoch[0] == stopping.best_epoch[i]
        losses = np.array([values[i] for values in trainer.history["loss"]])
        np.testing.assert_allclose(losses[: ends[-1]], history["loss"], rtol=1e-5)
        assert np.isnan(losses[ends[-1] :]).all()
        assert_same(fleet, i, alone)
    assert len(trainer.history["loss"]) == max(ends) and len(set(ends)) > 1  # of which some stop before others


EXPLODING = [0.05, 1e25, 0.02]


def exploding(i=None):
    models = MODELS if i is None else None
    return gm.Network([gm.Dense(7, "relu", norm="batch"), gm.Dense(4)], n_features=6, models=models, seed=of(SEEDS, i))


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("rows", [ROWS, None], ids=["own rows", "shared rows"])
def test_a_diverging_model_leaves_the_others_alone(rows, ema):
    y = RNG.normal(size=(60, 4))
    fleet = exploding()
    arguments = dict(loss="squared_error", y=y, rows=rows, validation_data=(X_VAL, RNG.normal(size=(40, 4))), ema=ema)
    message = (
        "the loss of model 1 is not finite at step 2 of epoch 1: it is left as it is; try a smaller learning rate, "
        r"clip_norm=1.0 in the optimizer, or standardize=True in the network"
    )
    with pytest.warns(UserWarning, match=f"^{message}$") as caught:
        trainer = train(fleet, None, gm.SGD(EXPLODING), **arguments)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert fleet.steps[1] == 1 and np.isfinite(fleet.flat).all()
    losses = np.array(trainer.history["loss"])
    assert not np.isfinite(losses[:, 1]).any() and np.isfinite(losses[:, [0, 2]]).all()
    for i in (0, 2):
        alone = exploding(i)
        train(alone, i, gm.SGD(EXPLODING[i]), **arguments)
        with np.errstate(over="ignore", invalid="ignore"):  # model 1 predicts what it can
            assert_same(fleet, i, alone, tolerance=0)  # bit for bit


def test_all_models_diverging_is_an_error():
    y = RNG.normal(size=(60, 4))
    with (
        pytest.warns(UserWarning, match="the loss of model 1 is not finite at step 2 of epoch 1"),
        pytest.raises(
            gm.DivergedError, match=r"the loss is (inf|nan) at step \d of epoch \d with learning rate \[1000"
        ),
    ):
        train(
            gm.Network([gm.Dense(4)], n_features=6, models=2),
            None,
            gm.SGD([1e3, 1e30]),
            y=y,
            rows=None,
            loss="squared_error",
            epochs=50,
        )


def test_divergence_after_the_others_stopped_early_is_no_error():
    y = RNG.normal(size=(60, 4))
    fleet = exploding()

    class StopOthers(gm.Callback):
        def on_epoch_end(self, trainer, record):
            trainer.network.flat[1] *= 1e30 if record["epoch"] == 1 else 1
            return np.array([True, False, True])

    with pytest.warns(UserWarning, match="the loss of model 1 is not finite at step 1 of epoch 2"):
        trainer = train(fleet, None, gm.SGD(0.01), y=y, loss="squared_error", callbacks=[StopOthers()])
    assert trainer.stopped == "early" and len(trainer.history["loss"]) == 2


# --- a model taken out ----------------------------------------------------------------------------------------------


def test_a_model_taken_out_is_a_network_of_its_own():
    fleet = build()
    train(fleet, None)
    for i in range(-MODELS, MODELS):
        one = fleet[i]
        assert (one.models, one.is_fleet, one.logits(X_VAL).shape) == (1, False, (40, 4))
        assert_same(fleet, i, one, tolerance=0)
        np.testing.assert_array_equal(one.predict(X_VAL), fleet.predict(X_VAL)[i])
        np.testing.assert_array_equal(one.predict_proba(X_VAL), fleet.predict_proba(X_VAL)[i])
        assert one.loss.options["label_smoothing"] == SMOOTHING[i]
        assert [place.dropout.tolist() for place in one.places] == [[INPUT_DROPOUT[i]], [DROPOUT[i]], [0], [0]]
        arrays = [
            one.flat,
            one.flat_gradient,
            one.shift,
            one.scale,
            *one.statistics.values(),
            one.steps,
            one.seeds,
            one.streams,
        ]
        theirs = [fleet.flat, fleet.flat_gradient, fleet.shift, fleet.scale, *fleet.statistics.values(), fleet.steps]
        assert not any(np.shares_memory(a, b) for a in arrays for b in [*theirs, fleet.seeds, fleet.streams])
    assert len(fleet) == MODELS


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name", ["nadam", "lbfgs"])
def test_a_model_taken_out_trains_on_as_in_the_fleet(name, seed):
    """Seed, stream and step count come along: the same batches, masks and noise."""
    fleet = build(seed=seed)
    train(fleet, None)
    alone = [fleet[i] for i in range(MODELS)]
    noise = gm.GaussianNoise(0.1)
    train(fleet, None, OPTIMIZERS[name](**SETTINGS[name]), augment=noise)
    for i in range(MODELS):
        train(alone[i], i, OPTIMIZERS[name](**SETTINGS[name]).for_model(i), augment=noise)
        assert_same(fleet, i, alone[i])


@pytest.mark.parametrize("i", [MODELS, -MODELS - 1])
def test_a_model_that_is_not_there(i):
    with pytest.raises(IndexError, match=rf"^model {i} of a network with {MODELS}$"):
        build()[i]


# --- shapes, the user's own loop ------------------------------------------------------------------------------------


def test_a_fleet_of_one_keeps_the_leading_axis():
    layers = [gm.Dense(5, "tanh", norm="batch", dropout=[0.2]), gm.Dense(4)]
    fleet = gm.Network(layers, n_features=6, models=1, seed=[7], standardize=True)
    alone = gm.Network(
        [gm.Dense(5, "tanh", norm="batch", dropout=0.2), gm.Dense(4)], n_features=6, seed=7, standardize=True
    )
    loss = gm.Loss("softmax_cross_entropy", label_smoothing=[0.1])
    trainer = gm.Trainer(fleet, loss, gm.Adam([0.01], l2=[0.1]), schedule="plateau")
    history = trainer.fit(X, Y, rows=[ROWS[1]], epochs=3, batch_size=16, validation_data=(X_VAL, Y_VAL))
    own = train(alone, 1, gm.Adam(0.01, l2=0.1), loss=gm.Loss("softmax_cross_entropy", label_smoothing=0.1), epochs=3)
    assert_same(fleet, 0, alone, tolerance=0)
    assert history["loss"] == [[value] for value in own.history["loss"]]
    assert (fleet.is_fleet, len(fleet), fleet[0].is_fleet) == (True, 1, False)
    assert fleet.logits(X).shape == fleet.predict_proba(X).shape == fleet.forward(X).shape == (1, 60, 4)
    assert fleet.predict(X).shape == (1, 60) and alone.predict(X).shape == (60,)
    assert fleet.copy().is_fleet and fleet.copy().logits(X).shape == (1, 60, 4)
    assert all(isinstance(values[0], list) for name, values in history.items() if name.startswith(("loss", "val_")))


def test_history_and_evaluation_are_lists_of_one_value_for_each_model():
    fleet = build()
    trainer = train(fleet, None, epochs=2, validation_data=(X_VAL, Y_VAL))
    for name in ("loss", "val_loss", "val_accuracy"):
        assert np.shape(trainer.history[name]) == (2, MODELS)
    found = trainer.evaluate(X_VAL, Y_VAL)
    assert found == {name: trainer.history[f"val_{name}"][-1] for name in ("loss", "accuracy")}
    for i in range(MODELS):
        own = gm.Trainer(fleet[i], softmax(i)).evaluate(X_VAL, Y_VAL)
        assert own == {name: pytest.approx(values[i], rel=1e-6) for name, values in found.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("per_model_rows", [False, True])
def test_the_users_own_loop(name, per_model_rows):
    """forward, loss, backward, step on a fleet with shared or own rows, against each model alone."""
    x = np.stack([X[rows[:30]] for rows in ROWS]) if per_model_rows else X
    y = np.stack([Y[rows[:30]] for rows in ROWS]) if per_model_rows else Y

    def loop(network, loss, optimizer, x, y):
        def evaluate():
            value, dz = loss(network.forward(x), y)
            network.backward(dz)
            return value

        values = []
        for _ in range(3):
            if optimizer.full_batch:
                values.append(optimizer.step(network, evaluate=evaluate))
            else:
                values.append(evaluate())
                optimizer.step(network)
        return values

    optimizer, fleet = OPTIMIZERS[name](**SETTINGS[name]), build(standardize=False)
    values = loop(fleet, softmax(), optimizer, x, y)
    assert np.shape(values) == (3, MODELS)
    for i in range(MODELS):
        alone, own = build(i, standardize=False), (x[i], y[i]) if per_model_rows else (x, y)
        np.testing.assert_allclose(
            np.array(values)[:, i], loop(alone, softmax(i), optimizer.for_model(i), *own), rtol=1e-6
        )
        assert_same(fleet, i, alone)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [0, -1, 2.0, True, "3"])
def test_models_is_a_positive_integer(models):
    with pytest.raises(ValueError, match=r"^models=.* must be an integer of at least 1, or None for one network$"):
        gm.Network([gm.Dense(2)], n_features=3, models=models)


def test_lists_have_one_value_for_each_model():
    with pytest.raises(ValueError, match=r"^seed has 2 values for 3 models; give one integer, or one for each$"):
        gm.Network([gm.Dense(2)], n_features=3, models=3, seed=[1, 2])
    with pytest.raises(ValueError, match=r"^dropout of dense_0 has 2 values for 3 models; give one, or one for each$"):
        gm.Network([gm.Dense(2, dropout=[0.1, 0.2]), gm.Dense(2)], n_features=3, models=3)
    with pytest.raises(ValueError, match=r"^dropout of input has 3 values for 1 models; give one, or one for each$"):
        gm.Network([gm.Dense(2)], n_features=3, input_dropout=[0.1, 0.2, 0.0])
    with pytest.raises(
        ValueError, match=r"^label_smoothing has 2 values for 3 models; give one number, or one for each$"
    ):
        gm.Trainer(build(), gm.Loss("softmax_cross_entropy", label_smoothing=[0.1, 0.2]))
    with pytest.raises(ValueError, match=r"^rows has 2 entries for 3 models; give each model its row numbers$"):
        train(build(), None, rows=ROWS[:2])


@pytest.mark.parametrize("part", [[], [0, 60], [-1, 2], [0.0, 1.0], [[1, 2]], [True] * 60])
def test_rows_are_row_numbers(part):
    with pytest.raises(ValueError, match=r"^rows\[1\] must hold integers from 0 to 59, at least one$"):
        train(build(), None, rows=[ROWS[0], part, ROWS[2]])


def test_validation_split_would_cut_across_rows():
    with pytest.raises(ValueError, match="validation_split would cut across rows; give validation_data"):
        train(build(), None, validation_split=0.2)
