"""Trainer(ema=...): averages of the weights, held against a plain loop; who sees them, and what a state keeps.
Fleets are in test_fleets.py, kernels in test_kernels_optimizers.py, whole fits on a device in test_gpu_training.py."""

import signal

import numpy as np
import pytest
from test_files import EPOCHS, STEPS, Crash, Saver, crash, everything, same

import gpumlp as gm
from gpumlp.averaging import WeightAverage
from gpumlp.optimizers import OPTIMIZERS

FIRST_ORDER = [name for name, row in OPTIMIZERS.items() if not row.full_batch]
SOFTMAX = "softmax_cross_entropy"
N, FEATURES, CLASSES, BATCH = 50, 5, 3, 8  # 7 steps an epoch
BETA = 0.8


def table(n=N, seed=0):
    """X (n, FEATURES) and labels (n,) that depend on it; every class occurs."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, FEATURES))
    y = (X @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1)
    y[:CLASSES] = np.arange(CLASSES)
    return X, y


def network(**options):
    """All that changes in a step: running statistics, a largest norm; and dropout."""
    layers = [gm.Dense(7, "relu", norm="batch", dropout=0.2), gm.Dense(6, "tanh", max_norm=0.8), gm.Dense(CLASSES)]
    return gm.Network(layers, **{"n_features": FEATURES, "seed": 3, "dtype": "float64"} | options)


def weights_of(net):
    return {"flat": net.flat.copy()} | {name: values.copy() for name, values in net.statistics.items()}


def train(ema=BETA, *, net=None, optimizer="adam", callbacks=(), **options):
    trainer = gm.Trainer(net or network(), SOFTMAX, optimizer, ema=ema)
    trainer.fit(*table(), **{"epochs": 3, "batch_size": BATCH, "callbacks": list(callbacks)} | options)
    return trainer


class Loop(gm.Callback):
    """Averages copies of the weights after every step, and looks at the network at every step, epoch and the end."""

    def __init__(self, beta=BETA):
        self.beta, self.t, self.raw, self.epochs, self.end, self.mean = beta, 0, [], [], None, {}

    def on_step_end(self, trainer, loss):
        self.raw.append(weights_of(trainer.network))
        self.t += 1
        for name, w in self.raw[-1].items():
            self.mean[name] = self.beta * self.mean.get(name, 0) + (1 - self.beta) * w

    def corrected(self):
        return {name: mean / (1 - self.beta**self.t) for name, mean in self.mean.items()}

    def on_epoch_end(self, trainer, record):
        self.epochs.append((weights_of(trainer.network), self.corrected(), record))

    def on_fit_end(self, trainer):
        self.end = weights_of(trainer.network)


def assert_close(found, wanted, rtol=1e-12):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=rtol, err_msg=name)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


# --- the averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_the_network_gets_what_a_plain_loop_averages(name):
    loop, plain = Loop(), Loop()
    trainer = train(optimizer=name, callbacks=[loop])
    for held, wanted, _ in loop.epochs:
        assert_close(held, wanted)
    assert_equal(weights_of(trainer.network), loop.end)
    assert_close(loop.end, loop.corrected())
    assert_close(trainer.average.averages, loop.mean)
    # Training itself does not notice.
    train(None, optimizer=name, callbacks=[plain])
    for with_average, without in zip(loop.raw, plain.raw, strict=True):
        assert_equal(with_average, without)
    assert (loop.end["flat"] != plain.end["flat"]).any()


def test_in_float32():
    loop = Loop(0.999)
    trainer = train(0.999, net=network(dtype="float32"), callbacks=[loop], epochs=20)
    assert_close(weights_of(trainer.network), loop.corrected(), rtol=1e-5)
    assert trainer.network.flat.dtype == trainer.average.averages["flat"].dtype == np.float32


def test_after_one_step_it_is_the_weights():
    loop = Loop(0.9999)
    train(0.9999, callbacks=[loop], time_limit=1e-9)
    assert loop.t == 1
    assert_close(loop.end, loop.raw[0], rtol=1e-11)


def test_of_more_parameters_than_a_block_holds(monkeypatch):
    monkeypatch.setattr("gpumlp.optimizer_state.BLOCK", 50)
    loop = Loop()
    assert_close(weights_of(train(callbacks=[loop]).network), loop.corrected())


def test_each_model_has_its_own():
    betas, loops = [0.5, 0.9], [Loop(0.5), Loop(0.9)]
    fleet = train(betas, net=network(models=2), callbacks=loops).network
    for i, loop in enumerate(loops):
        wanted = {name: values[i] for name, values in loop.corrected().items()}
        assert_close({name: values[i] for name, values in weights_of(fleet).items()}, wanted)


def test_a_model_without_an_update_keeps_its_weights():
    """One diverges at its first step; and a fit that ends before one."""
    net = gm.Network([gm.Dense(4, "relu"), gm.Dense(1)], n_features=2, models=2)
    net.parameters["dense_0.W"][1] = 1e30
    before, X = net.flat.copy(), np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    trainer = gm.Trainer(net, "squared_error", "sgd", ema=0.9)
    with pytest.warns(UserWarning, match="the loss of model 1 is not finite at step 1"):
        trainer.fit(X, X[:, :1], epochs=2, batch_size=8)
    np.testing.assert_array_equal(net.flat[1], before[1])
    assert (net.flat[0] != before[0]).any() and np.isfinite(net.flat).all()

    class Fails(gm.Callback):
        def on_fit_begin(self, trainer):
            raise Crash

    net = network()
    before = weights_of(net)
    with pytest.raises(Crash):
        train(net=net, callbacks=[Fails()])
    assert_equal(weights_of(net), before)


# --- who sees them --------------------------------------------------------------------------------------------------


def test_validation_sees_the_averaged_weights():
    loop, validation = Loop(), table(30, seed=1)
    trainer = train(callbacks=[loop], validation_data=validation)
    for (_, wanted, record), loss in zip(loop.epochs, trainer.history["val_loss"], strict=True):
        judge = gm.Trainer(network(), SOFTMAX)
        judge.network.set_weights(wanted, np.ones(1, bool))
        found = judge.evaluate(*validation)
        assert record["val_loss"] == loss == pytest.approx(found["loss"], rel=1e-12)
        assert record["val_accuracy"] == found["accuracy"]
    assert trainer.evaluate(*validation)["loss"] == trainer.history["val_loss"][-1]


def test_early_stopping_keeps_the_best_averaged_weights():
    loop, stop, validation = Loop(), gm.EarlyStopping(2), table(30, seed=1)
    trainer = train(callbacks=[stop, loop], optimizer=gm.Adam(0.3), epochs=30, validation_data=validation)
    losses = trainer.history["val_loss"]
    assert trainer.stopped == "early" and losses[-1] > min(losses)
    assert_equal(weights_of(trainer.network), loop.epochs[int(np.argmin(losses))][0])
    assert trainer.evaluate(*validation)["loss"] == min(losses)
    assert_equal(trainer._last, loop.raw[-1])  # from which training would go on


@pytest.mark.parametrize("at", [3, 7, 9])
def test_after_ctrl_c(at):
    class CtrlC(gm.Callback):
        def on_step_end(self, trainer, loss):
            if trainer.network.steps[0] == at:
                signal.raise_signal(signal.SIGINT)

    loop = Loop()
    with pytest.warns(UserWarning, match="fit was interrupted"):
        trainer = train(callbacks=[loop, CtrlC()])
    assert loop.t == at
    assert_close(weights_of(trainer.network), loop.corrected())


@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end"])
def test_after_an_error(hook):
    class Fails(gm.Callback):
        pass

    def fail(*_):
        raise Crash

    setattr(Fails, hook, fail)
    loop, net = Loop(), network()
    with pytest.raises(Crash):
        train(net=net, callbacks=[loop, Fails()])
    assert_close(weights_of(net), loop.corrected())


@pytest.mark.parametrize("stopping", [[], [gm.EarlyStopping(9)]], ids=["", "early stopping"])
def test_a_further_fit_goes_on_from_the_weights_that_training_reached(stopping):
    def fits(ema):
        loop = Loop()
        trainer = train(ema, callbacks=[loop, *stopping], validation_data=table(30, seed=1))
        trainer.fit(*table(), epochs=2, batch_size=BATCH, callbacks=[loop])
        return loop

    loop = fits(BETA)
    assert_close(loop.end, loop.corrected())  # over the updates of both
    assert loop.t == 5 * 7
    if not stopping:  # which has a fit without averages go on from the best
        for with_average, without in zip(loop.raw, fits(None).raw, strict=True):
            assert_equal(with_average, without)


def test_a_fit_of_no_steps_holds_the_averaged_weights_too():
    loop = Loop()

    class Stop(gm.Callback):
        def on_fit_begin(self, trainer):
            raise Crash

    trainer = train(callbacks=[loop])
    with pytest.raises(Crash):
        trainer.fit(*table(), epochs=1, batch_size=BATCH, callbacks=[Stop()])
    assert_equal(weights_of(trainer.network), loop.end)


# --- states ---------------------------------------------------------------------------------------------------------


def stopping():
    return gm.EarlyStopping(2, monitor="val_accuracy")


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resume_is_exact(optimizer, models, tmp_path):
    ema = 0.9 if models is None else [0.9, 0.5, 0.99]
    whole = everything(optimizer, models, ema=ema)
    whole.fit()
    for at in (1, STEPS, STEPS + 3, STEPS * whole.trainer.epochs_done):
        broken, resumed = everything(optimizer, models, ema=ema), everything(optimizer, models, ema=ema)
        with pytest.raises(Crash):
            broken.fit(callbacks=[stopping(), Saver(tmp_path / "state", at, crash)])
        for net in (broken.trainer.network, resumed.trainer.network):
            net.flat[...] = 9.0  # all of it comes from the file
        for run in (resumed, broken):  # a fresh trainer, and the one that was broken off
            run.trainer.resume(tmp_path / "state")
            run.fit()
            same(whole.trainer, run.trainer)


class SaveEpoch(gm.Callback):
    """Saves at the end of the second epoch, and ends the fit there."""

    def __init__(self, path=None):
        self.path = path

    def on_epoch_end(self, trainer, record):
        if self.path is not None and record["epoch"] == 2:
            trainer.save_state(self.path)
            raise Crash


def test_a_state_between_epochs(tmp_path):
    """The network then holds averaged weights, and the file those that training had reached."""
    whole, broken, resumed = (everything(ema=0.9) for _ in range(3))
    whole.fit(callbacks=[stopping(), SaveEpoch()])
    with pytest.raises(Crash):
        broken.fit(callbacks=[stopping(), SaveEpoch(tmp_path / "state")])
    resumed.trainer.resume(tmp_path / "state")
    resumed.fit(callbacks=[stopping(), SaveEpoch()])
    same(whole.trainer, resumed.trainer)


def test_a_state_behind_the_fit(tmp_path):
    """The network holds the best averaged weights."""
    longer, shorter, resumed = (everything(ema=0.9, epochs=epochs) for epochs in (EPOCHS + 2, EPOCHS, EPOCHS + 2))
    longer.fit(callbacks=[gm.EarlyStopping(9)])
    shorter.fit(callbacks=[gm.EarlyStopping(9)])
    assert (shorter.trainer._last["flat"] != shorter.trainer.network.flat).any()
    shorter.trainer.save_state(tmp_path / "state")
    resumed.trainer.resume(tmp_path / "state")
    np.testing.assert_array_equal(resumed.trainer.network.flat, shorter.trainer._last["flat"])
    resumed.fit(callbacks=[gm.EarlyStopping(9)])
    same(longer.trainer, resumed.trainer)


@pytest.mark.parametrize("options", [{}, {"every_steps": 3}], ids=str)
def test_a_folder_of_checkpoints(options, tmp_path):
    class Break(gm.Callback):
        def __init__(self, at=0):
            self.at = at

        def on_step_end(self, trainer, loss):
            if trainer.epochs_done * trainer.steps_per_epoch + trainer.position == self.at:
                raise Crash

    def fit(run, folder, at=0):
        run.fit(
            callbacks=[stopping(), Break(at), gm.Checkpoint(tmp_path / folder, **options)], resume=tmp_path / folder
        )

    whole = everything(ema=0.9)
    fit(whole, "whole")
    for at in (2, STEPS, STEPS + 1, 2 * STEPS + 5):
        with pytest.raises(Crash):
            fit(everything(ema=0.9), "run", at)
    resumed = everything(ema=0.9)
    fit(resumed, "run")
    same(whole.trainer, resumed.trainer)
    again = everything(ema=0.9)  # when all epochs are done: nothing is left but to show the averages
    fit(again, "run")
    np.testing.assert_array_equal(again.trainer.network.flat, whole.trainer.network.flat)


@pytest.mark.parametrize("saved, now", [(0.9, None), (None, 0.9), (0.9, 0.99)])
def test_another_ema_is_refused(saved, now, tmp_path):
    broken, other = everything(ema=saved), everything(ema=now)
    with pytest.raises(Crash):
        broken.fit(callbacks=[stopping(), Saver(tmp_path / "state", 2, crash)])
    found, wanted = (None if ema is None else rf"\[{ema}\]" for ema in (saved, now))
    with pytest.raises(ValueError, match=f"the state was saved with another ema: {found}; this trainer has {wanted}$"):
        other.trainer.resume(tmp_path / "state")


def test_one_number_is_that_number_for_each_model(tmp_path):
    broken, other = everything(models=3, ema=0.9), everything(models=3, ema=[0.9] * 3)
    with pytest.raises(Crash):
        broken.fit(callbacks=[stopping(), Saver(tmp_path / "state", 2, crash)])
    other.trainer.resume(tmp_path / "state")


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ema", [0, 1, 0.0, 1.0, -0.1, 1.5, np.nan, np.inf, True, "0.9", [[0.9]], [0.9, 1.0], [0.9, [0.8]]]
)
def test_ema_is_within_0_and_1(ema):
    with pytest.raises(
        ValueError, match=r"^ema=.* is out of range: a number, or one for each model, in \(0, 1\); None"
    ):
        gm.Trainer(network(models=2), SOFTMAX, ema=ema)


def test_ema_has_one_value_for_each_model():
    for net, ema in ((network(models=3), [0.9, 0.8]), (network(), [0.9, 0.8]), (network(models=3), [])):
        with pytest.raises(
            ValueError, match=r"^ema has [02] values for [13] models; give one number, or one for each$"
        ):
            gm.Trainer(net, SOFTMAX, ema=ema)


def test_lbfgs_is_refused():
    message = (
        "^ema=0.9 averages over many small steps, and LBFGS makes few large ones: leave ema=None, or take a first-"
    )
    for optimizer in ("lbfgs", gm.LBFGS()):
        with pytest.raises(ValueError, match=message):
            gm.Trainer(network(), SOFTMAX, optimizer, ema=0.9)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_averages_lie_in_the_same_memory_all_the_time():
    net = network()
    trainer = gm.Trainer(net, SOFTMAX, ema=0.9)
    arrays = [net.flat, *net.statistics.values(), *trainer.average.averages.values(), *trainer.average.reached.values()]
    for _ in range(2):
        trainer.fit(*table(), epochs=2)
    now = [net.flat, *net.statistics.values(), *trainer.average.averages.values(), *trainer._last.values()]
    assert all(a is b for a, b in zip(arrays, now, strict=True))


def test_blocks_cover_every_weight_once(monkeypatch):
    for block in (7, 50, 32_768):
        monkeypatch.setattr("gpumlp.optimizer_state.BLOCK", block)
        average = WeightAverage(network(models=3), 0.5)
        for models in (slice(0, 3), slice(1, 2)):
            for mean, _, _, scratch in average.blocks(models):
                assert mean.size == scratch.size <= block
                mean += 1
        for values in average.averages.values():
            assert (values == [[1], [2], [1]]).all()
