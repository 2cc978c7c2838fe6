"""What callbacks see and do: early stopping, progress, logs, and objects of your own."""

import builtins
import csv
import io
import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import gpumlp as gm

N, FEATURES, BATCH, STEPS = 50, 4, 8, 7
LOSS = "squared_error"


def table(n=N, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, FEATURES)).astype(np.float32)
    return X, X[:, :1] * X[:, 1:2] + 0.1 * rng.normal(size=(n, 1)).astype(np.float32)


def trainer(models=None, rate=0.05, **options):
    net = gm.Network([gm.Dense(5, "tanh", norm="batch"), gm.Dense(1)], n_features=FEATURES, seed=2, models=models)
    return gm.Trainer(net, LOSS, gm.SGD(rate), **options)


def fit(run, *callbacks, **options):
    return run.fit(*table(), **{"epochs": 4, "batch_size": BATCH, "callbacks": list(callbacks)} | options)


class Play(gm.Callback):
    """Puts a given value into each epoch's record, and keeps the weights of each epoch."""

    def __init__(self, values, name="played"):
        self.values, self.name, self.flats, self.means = values, name, [], []

    def on_epoch_end(self, trainer, record):
        record[self.name] = self.values[record["epoch"] - 1]
        self.flats.append(trainer.network.flat.copy())
        self.means.append(trainer.network.statistics["dense_0.mean"].copy())


# --- early stopping --------------------------------------------------------------------------------------------------

PLAYS = {  # monitor, values, options, epochs made, best epoch
    "a loss": ("val_loss", [3.0, 2.0, 2.0, 2.5, 1.0], {"patience": 2}, 4, 2),
    "one more improvement": ("val_loss", [3.0, 2.0, 2.5, 1.9, 2.5, 2.5, 1.0], {"patience": 2}, 6, 4),
    "patience 1": ("val_loss", [3.0, 3.0, 1.0], {"patience": 1}, 2, 1),
    "min_delta": ("val_loss", [3.0, 2.6, 2.4, 2.3, 2.2], {"patience": 2, "min_delta": 0.5}, 5, 3),
    "larger is better": ("val_accuracy", [0.1, 0.7, 0.6, 0.7, 0.9], {"patience": 2}, 4, 2),
    "training metric": ("r2", [0.1, 0.0, 0.9], {"patience": 1}, 2, 1),
    "own name": ("played", [1.0, 2.0, 3.0], {"patience": 1}, 2, 1),
    "NaN first": ("val_loss", [np.nan, 2.0, 1.0, 1.5, 1.5], {"patience": 2}, 5, 3),
    "NaN later": ("val_loss", [2.0, np.nan, np.nan, 1.0], {"patience": 2}, 3, 1),
    "falls": ("val_loss", [5.0, 4.0, 3.0, 2.0, 1.0], {"patience": 1}, 5, 5),
}


@pytest.mark.parametrize("case", PLAYS)
def test_early_stopping(case):
    monitor, values, options, epochs, best = PLAYS[case]
    run, play = trainer(), Play(values, monitor)
    stopping = gm.EarlyStopping(monitor=monitor, **options)
    history = fit(run, play, stopping, epochs=len(values))
    assert history["epoch"] == list(range(1, epochs + 1)) and stopping.best_epoch.tolist() == [best]
    assert run.stopped == ("early" if epochs < len(values) or case in ("min_delta", "NaN first") else "epochs")
    np.testing.assert_array_equal(run.network.flat, play.flats[best - 1])
    np.testing.assert_array_equal(run.network.statistics["dense_0.mean"], play.means[best - 1])
    assert (play.flats[best - 1] != play.flats[-1]).any() or best == epochs


def test_early_stopping_may_leave_the_last_weights():
    run, play = trainer(), Play([1.0, 2.0, 3.0])
    fit(run, play, gm.EarlyStopping(2, monitor="played", restore_best=False), epochs=9)
    np.testing.assert_array_equal(run.network.flat, play.flats[2])


@pytest.mark.parametrize("validation_data, name", [(None, "loss"), (table(20, 1), "val_loss")])
def test_early_stopping_watches_the_validation_loss_if_there_is_one(validation_data, name):
    run, stopping = trainer(rate=0.3), gm.EarlyStopping(2)
    history = fit(run, stopping, validation_data=validation_data, epochs=30)
    assert stopping.best[0] == min(history[name]) == history[name][stopping.best_epoch[0] - 1]


def test_every_model_of_a_fleet_stops_by_itself():
    run = trainer(models=3)
    values = [[3.0, 1.0, 5.0], [2.0, 2.0, 4.0], [2.0, 0.5, 3.0], [2.0, 0.1, 2.0], [2.0, 0.1, 1.0]]
    play, stopping = Play(values), gm.EarlyStopping(2, monitor="played")
    history = fit(run, play, stopping, epochs=5)
    assert stopping.best_epoch.tolist() == [2, 4, 5] and history["epoch"] == [1, 2, 3, 4, 5]
    assert run.network.steps.tolist() == [4 * STEPS, 5 * STEPS, 5 * STEPS] and run.stopped == "epochs"
    for i, best in enumerate(stopping.best_epoch):
        np.testing.assert_array_equal(run.network.flat[i], play.flats[best - 1][i])
    np.testing.assert_array_equal(play.flats[4][0], play.flats[3][0])  # model 0 stood still
    assert np.isnan(history["loss"][4][0]) and np.isfinite(history["loss"][4][1:]).all()


def test_a_model_without_a_best_epoch_keeps_its_last_weights():
    run, play = trainer(models=2), Play([[1.0, np.nan], [2.0, np.nan], [3.0, np.nan]])
    fit(run, play, gm.EarlyStopping(9, monitor="played"), epochs=3)
    np.testing.assert_array_equal(run.network.flat[0], play.flats[0][0])
    np.testing.assert_array_equal(run.network.flat[1], play.flats[2][1])


def test_early_stopping_begins_anew_with_every_fit():
    run, stopping = trainer(), gm.EarlyStopping(2, monitor="played")
    for _ in range(2):
        history = fit(run, Play([1.0, 2.0, 3.0, 0.0]), stopping, epochs=4)
        assert history["epoch"] == [1, 2, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patience": 0}, "patience=0 must be an integer of at least 1"),
        ({"patience": 1.5}, "patience=1.5 must be"),
        ({"patience": True}, "patience=True must be"),
        ({"min_delta": -1.0}, "min_delta=-1.0 must be a number of at least 0"),
        ({"min_delta": np.nan}, "min_delta=nan must be"),
    ],
)
def test_bad_arguments_of_early_stopping(options, message):
    with pytest.raises(ValueError, match=message):
        gm.EarlyStopping(**options)


def test_an_unknown_monitor():
    run = trainer()
    with pytest.raises(
        ValueError, match="EarlyStopping monitors 'val_loss'; this fit records epoch, loss, learning_rate, seconds"
    ):
        fit(run, gm.EarlyStopping(monitor="val_loss"))


# --- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def replace(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


@pytest.mark.parametrize(
    "progress, stream, shown",
    [(None, io.StringIO, 0), (None, Terminal, 1), (True, io.StringIO, 1), (False, Terminal, 0)],
)
def test_progress_is_quiet_off_a_terminal_unless_asked_for(progress, stream, shown, stderr, capsys):
    text = stderr(stream())
    history = fit(trainer(), progress=progress, validation_data=table(20, 1))
    if not shown:
        assert text.getvalue() == ""
        return
    last = text.getvalue().rstrip().split("\r")[-1]
    assert re.search(r"^epoch 4/4: 100%.* 28/28 \[.*step/s, loss=", last)
    assert (
        f"loss={history['loss'][-1]:.4g}, val_loss={history['val_loss'][-1]:.4g}, val_r2={history['val_r2'][-1]:.4g}"
        in last
    )
    assert capsys.readouterr().out == ""


def test_the_bar_shows_the_loss_before_an_epoch_ends(stderr, monkeypatch):
    text, now = stderr(io.StringIO()), iter(range(1, 10**6))
    monkeypatch.setattr("gpumlp.callbacks.time", SimpleNamespace(monotonic=lambda: next(now)))
    seen = []

    class First(gm.Callback):
        def on_step_end(self, trainer, loss):
            seen.append(float(loss[0]))

    fit(trainer(), First(), epochs=1, progress=True)
    first = text.getvalue().split("\r")[2]
    assert first.startswith("epoch 1/1:  14%|") and " 1/7 [" in first and f"loss={seen[0]:.4g}]" in first


def test_a_bar_of_your_own_replaces_the_built_in_one(stderr):
    text = stderr(Terminal())
    fit(trainer(), gm.ProgressBar(show=True), epochs=1)
    assert len(re.findall("100%", text.getvalue().split("\r")[-1])) == 1 and "\n\r" not in text.getvalue()
    text = stderr(Terminal())
    fit(trainer(), gm.ProgressBar(show=False), epochs=1)
    assert text.getvalue() == ""


def test_a_bar_hidden_in_one_fit_is_shown_in_the_next(stderr):
    bar = gm.ProgressBar()
    stderr(io.StringIO())
    fit(trainer(), bar, epochs=1)
    text = stderr(Terminal())
    fit(trainer(), bar, epochs=1)
    assert "7/7" in text.getvalue()


def test_the_bar_of_a_fleet_shows_means_of_the_models_that_train(stderr):
    text = stderr(io.StringIO())

    class Stop(gm.Callback):
        def on_epoch_end(self, trainer, record):
            return [True, False, False]

    history = fit(trainer(models=3), Stop(), epochs=2, progress=True)
    assert np.isnan(history["loss"][1][0])
    assert f"loss={np.nanmean(history['loss'][1]):.4g}" in text.getvalue().split("\r")[-1]


def test_the_bar_shows_batches_without_weight(stderr):
    stderr(io.StringIO())
    fit(trainer(), epochs=1, progress=True, sample_weight=np.r_[np.zeros(N - 1), 1.0], shuffle=False)


# --- logs ------------------------------------------------------------------------------------------------------------


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_the_history(tmp_path):
    path = tmp_path / "log.csv"
    history = fit(trainer(), gm.CSVLogger(path), validation_data=table(20, 1))
    rows = read(path)
    assert list(rows[0]) == list(history) == ["epoch", "loss", "val_loss", "val_r2", "learning_rate", "seconds"]
    for name, values in history.items():
        assert [float(row[name]) for row in rows] == values
    assert b"\r" not in path.read_bytes()


def test_csv_spreads_the_models_of_a_fleet(tmp_path):
    history = fit(trainer(models=2, rate=[0.1, 0.01]), gm.CSVLogger(str(tmp_path / "log.csv")), epochs=2)
    rows = read(tmp_path / "log.csv")
    assert list(rows[0]) == ["epoch", "loss.0", "loss.1", "learning_rate.0", "learning_rate.1", "seconds"]
    assert [[float(row["loss.0"]), float(row["loss.1"])] for row in rows] == history["loss"]


def test_csv_is_written_epoch_by_epoch_and_anew_by_a_new_fit(tmp_path):
    path, lines = tmp_path / "log.csv", []
    log = gm.CSVLogger(path)

    class Count(gm.Callback):
        def on_epoch_end(self, trainer, record):
            lines.append(len(path.read_text().splitlines()))

    run = trainer()
    fit(run, log, Count())
    fit(run, log, epochs=2)
    assert lines == [2, 3, 4, 5] and [row["epoch"] for row in read(path)] == ["1", "2"]


class Stop(Exception):
    pass


class SaveThenFail(gm.Callback):
    """Saves the state after one step, and fails after a later one."""

    def __init__(self, path=None, save=0, fail=0):
        self.path, self.save, self.fail, self.steps = path, save, fail, 0

    def on_step_end(self, trainer, loss):
        self.steps += 1
        if self.steps == self.save:
            trainer.save_state(self.path)
        if self.steps == self.fail:
            raise Stop


@pytest.mark.parametrize("kept", [True, False])
def test_csv_goes_on_where_a_resumed_fit_was_saved(tmp_path, kept):
    path, state = tmp_path / "log.csv", tmp_path / "state"
    whole = fit(trainer(), gm.CSVLogger(tmp_path / "whole.csv"), SaveThenFail())
    with pytest.raises(Stop):  # saved in epoch 2, and gone on to epoch 4: epochs 2 and 3 come again
        fit(trainer(), gm.CSVLogger(path), SaveThenFail(state, STEPS + 3, 3 * STEPS + 2))
    assert [row["epoch"] for row in read(path)] == ["1", "2", "3"]
    if not kept:
        path.unlink()
    run = trainer()
    run.resume(state)
    fit(run, gm.CSVLogger(path), SaveThenFail())
    rows = read(path)
    assert [row["epoch"] for row in rows] == (["1", "2", "3", "4"] if kept else ["2", "3", "4"])
    assert [float(row["loss"]) for row in rows] == whole["loss"][-len(rows) :]


def test_csv_in_a_folder_that_is_not_there(tmp_path):
    run = trainer()
    with pytest.raises(FileNotFoundError):
        fit(run, gm.CSVLogger(tmp_path / "none" / "log.csv"))
    assert not run.network.steps.any()


def events(folder):
    """(name, step) → value of every scalar in a folder of event files."""
    record = pytest.importorskip("tensorboardX.record_writer")
    from tensorboardX.proto.event_pb2 import Event

    assert record
    found = {}
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return found


def test_tensorboard_files_hold_the_history(tmp_path):
    pytest.importorskip("tensorboardX")
    board = gm.TensorBoard(tmp_path)
    history = fit(trainer(models=2), board, validation_data=table(20, 1), epochs=3)
    found = events(tmp_path)
    for epoch in (1, 2, 3):
        for i in (0, 1):
            for name in ("loss", "val_loss", "val_r2"):
                assert found[f"{name}.{i}", epoch] == pytest.approx(history[name][epoch - 1][i], rel=1e-6)
        assert found["learning_rate", epoch] == pytest.approx(0.05) and ("seconds", epoch) in found
    assert len(found) == 3 * 8
    fit(trainer(models=2), board, epochs=1)  # it can be used again, and keeps what was written before
    assert len(list(tmp_path.iterdir())) == 2
    assert not any("EventLogger" in type(thread).__name__ for thread in threading.enumerate())


def test_tensorboard_without_its_package(tmp_path, monkeypatch):
    whole = builtins.__import__

    def missing(name, *args):
        if name == "tensorboardX":
            raise ImportError(name)
        return whole(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ImportError, match=re.escape('TensorBoard needs tensorboardX: pip install "gpumlp[tensorboard]"')
    ):
        gm.TensorBoard(tmp_path)


# --- callbacks of your own -------------------------------------------------------------------------------------------


class Calls(gm.Callback):
    """Notes what is called, and fails where told to."""

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []

    def note(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise Stop(name)

    def on_fit_begin(self, trainer):
        self.note("begin")

    def on_step_end(self, trainer, loss):
        self.note("step")

    def on_epoch_end(self, trainer, record):
        self.note("epoch")

    def on_fit_end(self, trainer):
        self.note("end")


def test_the_order_of_calls():
    calls = Calls()
    fit(trainer(), calls, epochs=2)
    assert calls.calls == ["begin", *(["step"] * STEPS + ["epoch"]) * 2, "end"]


@pytest.mark.parametrize("method", ["on_fit_begin", "on_step_end", "on_epoch_end", "on_fit_end"])
def test_any_object_with_one_method_will_do(method):
    calls = []
    fit(trainer(), SimpleNamespace(**{method: lambda *args: calls.append(len(args))}), epochs=2)
    assert calls == {"on_fit_begin": [1], "on_step_end": [2] * 14, "on_epoch_end": [2, 2], "on_fit_end": [1]}[method]


@pytest.mark.parametrize("fails", ["begin", "step", "epoch", "end"])
def test_an_error_in_a_callback_ends_them_all(fails):
    before, bad, after = Calls(), Calls(fails), Calls()
    run = trainer()
    with pytest.raises(Stop, match=fails):
        fit(run, before, bad, after)
    assert before.calls[-1] == "end" and bad.calls[-1] == "end"
    assert after.calls == [] if fails == "begin" else after.calls[-1] == "end"  # what did not begin does not end
    assert fit(run, epochs=1)["epoch"] == [1]


def test_an_error_before_it_began_does_not_put_old_weights_back():
    run, stopping = trainer(), gm.EarlyStopping(1, monitor="played")
    fit(run, Play([1.0, 2.0, 3.0]), stopping)
    fit(run, epochs=1)
    flat = run.network.flat.copy()
    with pytest.raises(Stop):
        fit(run, Calls("begin"), stopping)
    np.testing.assert_array_equal(run.network.flat, flat)


@pytest.mark.parametrize("done", [True, [True], np.array([True]), np.array([1])])
def test_a_callback_that_is_done_ends_the_fit(done):
    run = trainer()
    history = fit(run, SimpleNamespace(on_epoch_end=lambda trainer, record: done if record["epoch"] == 2 else None))
    assert history["epoch"] == [1, 2] and run.stopped == "early"


def test_what_a_callback_can_read():
    seen = []

    class Read(gm.Callback):
        def on_step_end(self, trainer, loss):
            assert loss.shape == (1,) and loss.dtype == np.float64
            seen.append(
                (
                    trainer.epoch,
                    trainer.epochs,
                    trainer.position,
                    trainer.steps_per_epoch,
                    len(trainer.history.get("loss", [])),
                )
            )

    fit(trainer(), Read(), epochs=2)
    assert seen == [(epoch, 2, step, STEPS, epoch) for epoch in range(2) for step in range(1, STEPS + 1)]
