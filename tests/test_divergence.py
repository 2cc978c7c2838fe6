"""A training that blows up: found at the very step whose loss is not finite, named with step and learning rate, and never
saved. What a fleet does when one of its models diverges is in test_trainer.py and test_gpu_training.py.
"""

import random
import re
import signal

import numpy as np
import pytest
from emulator import EmulatedRuntime

import gpumlp as gm
from gpumlp import checkpoints, container, device_step
from gpumlp.backends import gpu_backend, gpu_work

N, FEATURES, BATCH, STEPS = 40, 5, 8, 5  # steps of an epoch
ADVICE = "try a smaller learning rate, clip_norm=1.0 in the optimizer, or standardize=True in the network"


@pytest.fixture(scope="module")
def backend():
    """An emulated device; sums over the parameters of small networks need no 64 blocks there."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (gpu_backend, gpu_work):
            patch.setattr(module, "PARTIALS", 3)
        yield gpu_backend.GpuBackend(EmulatedRuntime(prefer=1))


@pytest.fixture(params=["cpu", "device"])
def device(request):
    return "cpu" if request.param == "cpu" else request.getfixturevalue("backend")


def table(n=N):
    X = np.random.default_rng(0).normal(size=(n, FEATURES)).astype(np.float32)
    return X, X[:, :1] ** 2


def trainer_on(device="cpu", rate=0.01, models=None, schedule=None, optimizer=gm.SGD):
    layers = [gm.Dense(6, "relu", norm="batch"), gm.Dense(1)]
    net = gm.Network(layers, n_features=FEATURES, seed=1, device=device, models=models)
    return gm.Trainer(net, "squared_error", optimizer(rate), schedule=schedule)


def fit(trainer, *callbacks, n=N, epochs=2, **options):
    return trainer.fit(*table(n), epochs=epochs, batch_size=BATCH, callbacks=callbacks, **options)


def flat_of(trainer):
    return trainer.network.backend.to_numpy(trainer.network.flat).copy()


class Watch(gm.Callback):
    """Keeps the losses and weights of every step."""

    def __init__(self):
        self.losses, self.flats = [], []

    def on_step_end(self, trainer, loss):
        self.losses.append(float(loss[0]))
        self.flats.append(flat_of(trainer))


class Spoil(gm.Callback):
    """Puts what is no number among the weights, or the running statistics, at the first chance after step ``at``."""

    def __init__(self, at, value=np.nan, of="flat", index=0, every_step=True):
        self.at, self.value, self.of, self.index, self.every_step = at, value, of, index, every_step
        self.done = 0  # steps that were made by then

    def on_step_end(self, trainer, loss):
        made = trainer.epochs_done * trainer.steps_per_epoch + trainer.position
        if not self.done and made >= self.at:
            self.done, network = made, trainer.network
            values = network.flat if self.of == "flat" else network.statistics[self.of]
            values[:, self.index : self.index + 1] = self.value


def where(step):
    """How a message calls a step of the fit, counted from 1."""
    return f"at step {(step - 1) % STEPS + 1} of epoch {(step - 1) // STEPS + 1}"


# --- R11: found at once ------------------------------------------------------------------------------------------------


def test_a_learning_rate_that_is_far_too_large(device):
    trainer, watch = trainer_on(device, rate=1e10), Watch()
    with pytest.raises(gm.DivergedError) as error:
        fit(trainer, watch, epochs=9)
    step = len(watch.losses) + 1
    message = rf"the loss is (inf|nan) {where(step)} with learning rate 10000000000\.0; {re.escape(ADVICE)}"
    assert re.fullmatch(message, str(error.value)) and 1 < step < STEPS
    assert np.isfinite(watch.losses).all() and np.isfinite(watch.flats[-1]).all()
    assert flat_of(trainer).tobytes() == watch.flats[-1].tobytes() and trainer.network.steps[0] == step - 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [1, 4, 5, 7, 9])
def test_a_weight_that_is_no_number_shows_at_the_next_step(at, value, device):
    trainer, watch = trainer_on(device), Watch()
    with pytest.raises(gm.DivergedError, match=f"{where(at + 1)} with learning rate 0.01; "):
        fit(trainer, Spoil(at, value), watch)
    assert len(watch.losses) == at and trainer.network.steps[0] == at
    assert flat_of(trainer).tobytes() == watch.flats[-1].tobytes()  # the others are those of step ``at``


@pytest.mark.parametrize("at", [1, 31, 32, 50, 64, 90])
def test_within_a_graph(at, backend):
    """Of 32 steps, of which the host hears at the epoch's end: the device stands still at the first that goes wrong."""
    trainer, spoil = trainer_on(backend), Spoil(at, every_step=False)
    with pytest.raises(gm.DivergedError) as error:
        fit(trainer, spoil, n=100 * BATCH)
    assert f"at step {spoil.done + 1} of epoch 1 with learning rate 0.01; " in str(error.value)
    assert trainer.network.steps[0] == spoil.done < at + 32
    left = flat_of(trainer)
    assert np.isnan(left[0, 0]) and np.isfinite(left[0, 1:]).all()


def test_in_a_long_epoch_the_host_hears_with_the_next_table(backend, monkeypatch):
    """Of learning rates: 4,096 steps, here 64."""
    monkeypatch.setattr(device_step, "TABLE", 64)
    positions = []

    class Seldom(gm.Callback):
        every_step = False

        def on_step_end(self, trainer, loss):
            positions.append(trainer.position)

    with pytest.raises(gm.DivergedError, match="at step 33 of epoch 1"):
        fit(trainer_on(backend), Spoil(32, every_step=False), Seldom(), n=300 * BATCH)
    assert positions[-1] <= 64


@pytest.mark.parametrize("ends", ["time limit", "interrupted"])
def test_a_fit_that_ends_within_an_epoch_still_says_so(ends, device, monkeypatch):
    class End(gm.Callback):
        every_step = False

        def on_step_end(self, trainer, loss):
            if trainer.position >= 64 and ends == "interrupted":
                signal.raise_signal(signal.SIGINT)
            elif trainer.position >= 64:
                monkeypatch.setattr("gpumlp.trainer.time.monotonic", lambda: 1e12)

    options = {"time_limit": 3600} if ends == "time limit" else {}
    with pytest.raises(gm.DivergedError, match="at step 33 of epoch 1"):
        fit(trainer_on(device), Spoil(32, every_step=False), End(), n=100 * BATCH, **options)


def last_step(factor):
    """A schedule with another factor on the learning rate of the last step of two epochs."""
    return lambda epoch, epochs: np.where(np.asarray(epoch) * STEPS > 2 * STEPS - 1.5, factor, 1.0)


def test_weights_that_the_last_step_breaks(device):
    """No loss tells of them any more."""
    trainer, watch = trainer_on(device, schedule=last_step(1e42)), Watch()
    with pytest.raises(gm.DivergedError) as error:
        fit(trainer, watch)
    message = (
        f"the weights are NaN or infinite after the last step, step 10 of the fit, with learning rate 1e+40; {ADVICE}"
    )
    assert str(error.value) == message
    assert np.isfinite(watch.losses).all() and not np.isfinite(watch.flats[-1]).all()


def test_weights_of_one_model_that_the_last_step_breaks(device):
    trainer = trainer_on(device, models=2, schedule=last_step([1.0, 1e42]))
    message = (
        "the weights of model 1 are NaN or infinite after the last step, step 10 of the fit, with|after the last step"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        history = fit(trainer)
    assert caught[0].filename == __file__ and len(history["loss"]) == 2
    assert np.isfinite(flat_of(trainer)).all(axis=1).tolist() == [True, False]


def test_the_best_weights_are_no_error(device):
    """That early stopping puts back, whatever the last step did."""
    trainer, stop = trainer_on(device), gm.EarlyStopping(9)
    fit(trainer, Spoil(2 * STEPS), stop, validation_data=table())
    assert np.isfinite(flat_of(trainer)).all() and stop.best_epoch[0] == 1


# --- R11: never saved ---------------------------------------------------------------------------------------------------


def saved(folder):
    """Number and tensors of each checkpoint, the newest first."""
    found = []
    for path in checkpoints.checkpoints(folder):
        _, tensors = container.unpack(path.read_bytes(), path, "state", None)
        found.append((int(path.name[5:15]), tensors))
    return found


def resumed(folder, spoil=None, **options):
    trainer = trainer_on(**options)
    fit(trainer, spoil or Spoil(10**9), gm.Checkpoint(folder, every_steps=1), resume=folder)
    return trainer


@pytest.mark.filterwarnings("ignore:no checkpoint at step")
def test_no_checkpoint_holds_weights_that_are_no_numbers(tmp_path):
    """100 trials: spoiled at any step and place, or by a learning rate. The newest checkpoint is of the step before, and a
    fit that goes on from it ends as one that nothing happened to."""
    whole, rng = flat_of(resumed(tmp_path / "whole")).tobytes(), random.Random(0)
    places = [("flat", i) for i in range(30)] + [("dense_0.mean", 2), ("dense_0.variance", 5)]
    for trial in range(80):
        folder, at = tmp_path / f"spoiled {trial}", rng.randint(1, 2 * STEPS)
        of, index = rng.choice(places)
        spoil = Spoil(at, rng.choice([np.nan, np.inf, -np.inf]), of, index)
        try:
            resumed(folder, spoil)
        except gm.DivergedError as error:
            assert (where(at + 1) if at < 2 * STEPS else "after the last step") in str(error)
        found = saved(folder)
        # Running statistics take no part in training: it goes on, and no later step is saved.
        assert [number for number, _ in found] == [n for n in (at - 1, at - 2) if n > 0]
        for _, tensors in found:
            assert all(
                np.isfinite(v).all() for name, v in tensors.items() if name.startswith(("weights.", "optimizer."))
            )
        assert flat_of(resumed(folder)).tobytes() == whole
    for trial in range(20):
        folder, at = tmp_path / f"rate {trial}", rng.randint(1, 2 * STEPS - 3)
        rates = 10 ** rng.uniform(12, 38)
        options = {"schedule": lambda e, n, at=at, rates=rates: np.where(np.asarray(e) * STEPS > at - 0.5, rates, 1.0)}
        errors = []
        for _ in range(2):
            with pytest.raises(gm.DivergedError) as error:
                resumed(folder, **options)
            errors.append(str(error.value))
        assert errors[0] == errors[1]  # it goes on, to the same end
        assert all(np.isfinite(t["weights.flat"]).all() and np.isfinite(t["log"]).all() for _, t in saved(folder))


# --- R11: estimators ----------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_estimators_raise_and_fit_again(name, solver):
    pytest.importorskip("sklearn")
    X, y = table()
    y = y[:, 0] if name == "MLPRegressor" else (y[:, 0] > 1).astype(int)
    options = {"hidden_layer_sizes": (6,), "solver": solver, "max_iter": 3, "batch_size": BATCH, "device": "cpu"}
    model = getattr(gm, name)(random_state=0, **options, tol=0, n_iter_no_change=99)
    for at in (1, 4, 5, 7, 15):
        with pytest.raises(ValueError, match="Solver produced non-finite parameter weights") as error:
            model.set_params(callbacks=[Spoil(at)]).fit(X, y)
        assert isinstance(error.value.__cause__, gm.DivergedError)
        place = where(at + 1) if at < 15 else "after the last step, step 15 of the fit,"
        rate = 0.0005 if (name, solver) == ("MLPRegressor", "sgd") else 0.001  # of a loss that is halved
        assert f"{place} with learning rate {rate}; {ADVICE}" in str(error.value.__cause__)
    with pytest.warns(match="hasn't converged yet"):
        assert np.isfinite(model.set_params(callbacks=None).fit(X, y).coefs_[0]).all()


@pytest.mark.peer
def test_a_learning_rate_of_1e10_in_an_estimator():
    pytest.importorskip("sklearn")
    X, y = table()
    model = gm.MLPRegressor("squared_error", (6,), solver="sgd", learning_rate_init=1e10, random_state=0, device="cpu")
    with pytest.raises(ValueError, match="non-finite parameter weights") as error:
        model.fit(X, y[:, 0])
    assert re.search(r"at step \d of epoch \d+ with learning rate 5000000000.0; ", str(error.value.__cause__))


@pytest.mark.peer
def test_an_estimator_keeps_the_best_weights_before():
    sklearn = pytest.importorskip("sklearn.exceptions")
    X, y = table()
    model = gm.MLPRegressor(
        "squared_error",
        (6,),
        early_stopping=True,
        batch_size=BATCH,
        random_state=0,
        device="cpu",
        callbacks=[Spoil(12)],
    )
    with pytest.warns(sklearn.ConvergenceWarning, match="the best weights before that are kept"):
        model.fit(X, y[:, 0])
    assert np.isfinite(model.predict(X)).all()
