"""gm.Checkpoint and fit(..., resume=folder): what is kept, what is taken up, what is refused; resumed fits have the bits of
whole ones. What kills and disks do to it is in test_faults.py."""

import builtins
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatedRuntime
from test_files import CLASSES, EPOCHS, FEATURES, STEPS, Crash, N, everything, same, table

import gpumlp as gm
from gpumlp import checkpoints, container, training_state
from gpumlp.backends.gpu_backend import GpuBackend
from gpumlp.fit_data import Data

SOFTMAX = "softmax_cross_entropy"


class Break(gm.Callback):
    """Raises after step ``at`` of the fit; 0 never does. A Checkpoint behind it has not saved that step."""

    def __init__(self, at=0):
        self.at = at

    def on_step_end(self, trainer, loss):
        if trainer.epochs_done * trainer.steps_per_epoch + trainer.position == self.at:
            raise Crash


def with_checkpoint(folder, at=0, **options):
    return [gm.EarlyStopping(2, monitor="val_accuracy"), Break(at), gm.Checkpoint(folder, **options)]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def name(step):
    return f"step-{step:010d}.safetensors"


def simple(device="cpu", models=None, optimizer="adam"):
    net = gm.Network(
        [gm.Dense(4, "tanh"), gm.Dense(CLASSES)], n_features=FEATURES, seed=1, device=device, models=models
    )
    return gm.Trainer(net, SOFTMAX, optimizer)


# --- resume is exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"every_steps": 1}, {"every_steps": 4}, {}, {"every_seconds": 1e-9}], ids=str)
@pytest.mark.parametrize("models", [None, 3])
def test_a_chain_of_crashes_ends_with_the_bits_of_a_whole_fit(models, options, tmp_path):
    whole = everything(models=models)
    whole.fit(callbacks=with_checkpoint(tmp_path / "whole"))
    for at in (1, 2, STEPS, STEPS + 1, 2 * STEPS - 1, 2 * STEPS + 4):
        with pytest.raises(Crash):
            everything(models=models).fit(
                callbacks=with_checkpoint(tmp_path / "run", at, **options), resume=tmp_path / "run"
            )
    resumed = everything(models=models)
    resumed.fit(callbacks=with_checkpoint(tmp_path / "run", **options), resume=str(tmp_path / "run"))
    same(whole.trainer, resumed.trainer)
    assert len(names(tmp_path / "run")) == 2


def test_the_newest_two_are_kept(tmp_path):
    X, y = table()
    seen = []

    class Look(gm.Callback):
        def on_step_end(self, trainer, loss):
            seen.append(names(tmp_path))

    simple().fit(X, y, epochs=1, batch_size=8, callbacks=[gm.Checkpoint(tmp_path, every_steps=2), Look()])
    two = [name(2)], [name(2), name(4)], [name(4), name(6)]
    assert seen == [[], two[0], two[0], two[1], two[1], two[2], two[2]]
    assert names(tmp_path) == [name(6), name(7)]  # and the end of the fit


def test_without_options_every_epoch_ends_with_one(tmp_path):
    X, y = table()
    with pytest.raises(Crash):
        simple().fit(X, y, epochs=3, batch_size=8, callbacks=[Break(STEPS * 2 + 3), gm.Checkpoint(tmp_path)])
    assert names(tmp_path) == [name(STEPS), name(2 * STEPS)]


def test_seconds(tmp_path, monkeypatch):
    X, y = table()
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    seen = []

    class Tick(gm.Callback):
        def on_step_end(self, trainer, loss):
            now[0] += 1.0
            seen.append(names(tmp_path)[-1:])

    simple().fit(X, y, epochs=1, batch_size=8, callbacks=[gm.Checkpoint(tmp_path, every_seconds=2.5), Tick()])
    assert seen == [[], [], [], [name(4)], [name(4)], [name(4)], [name(7)]]


def test_a_time_limit_ends_with_a_checkpoint(tmp_path):
    whole, short, resumed = everything(), everything(), everything()
    whole.fit(callbacks=with_checkpoint(tmp_path / "whole"))
    short.fit(callbacks=with_checkpoint(tmp_path / "run", every_steps=1000), time_limit=1e-9)
    assert short.trainer.stopped == "time limit" and names(tmp_path / "run") == [name(1)]
    resumed.fit(callbacks=with_checkpoint(tmp_path / "run", every_steps=1000), resume=tmp_path / "run")
    same(whole.trainer, resumed.trainer)


def test_a_finished_fit_is_prolonged_and_an_early_stop_stays(tmp_path):
    X, y = table()
    whole, run = simple(), simple()
    whole.fit(X, y, epochs=4, batch_size=8, callbacks=[gm.Checkpoint(tmp_path / "whole")])
    for epochs in (2, 2, 4):
        run.fit(X, y, epochs=epochs, batch_size=8, callbacks=[gm.Checkpoint(tmp_path / "run")], resume=tmp_path / "run")
        assert run.history["epoch"] == list(range(1, epochs + 1))
    same(whole, run)
    stopped, again = everything(optimizer=gm.SGD(5.0)), everything(optimizer=gm.SGD(5.0))
    for one in (stopped, again):
        one.fit(
            callbacks=[gm.EarlyStopping(1), gm.Checkpoint(tmp_path / "early")], epochs=50, resume=tmp_path / "early"
        )
    assert stopped.trainer.stopped == again.trainer.stopped == "early"
    same(stopped.trainer, again.trainer)


def test_inside_an_error_handler_a_fit_still_ends_with_a_checkpoint(tmp_path):
    X, y = table()
    try:
        raise Crash
    except Crash:
        simple().fit(X, y, epochs=1, batch_size=8, callbacks=[gm.Checkpoint(tmp_path, every_steps=1000)])
    assert names(tmp_path) == [name(STEPS)]


def test_after_an_error_nothing_more_is_saved(tmp_path):
    X, y = table()
    with pytest.raises(Crash):
        simple().fit(X, y, batch_size=8, callbacks=[Break(5), gm.Checkpoint(tmp_path, every_steps=3)])
    assert names(tmp_path) == [name(3)]


@pytest.mark.parametrize("models", [None, 2])
def test_on_a_device_at_the_first_chance(models, tmp_path, monkeypatch):
    """Steps are made four at a time; a checkpoint falls between two graphs, and the resumed fit has the same bits."""
    from gpumlp import device_step

    monkeypatch.setattr(device_step, "STEPS", 4)
    backend = GpuBackend(EmulatedRuntime(prefer=1))
    X, y = table(80)  # 10 steps: 2 one by one, then 1, 1, 4, 2
    fit = dict(epochs=2, batch_size=8)
    whole, broken, resumed = (simple(backend, models) for _ in range(3))
    whole.fit(X, y, callbacks=[gm.Checkpoint(tmp_path / "whole", every_steps=3)], **fit)

    class Stop(gm.Callback):
        every_step = False

        def on_step_end(self, trainer, loss):
            if trainer.epochs_done == 1 and trainer.position == 8:
                raise Crash

    with pytest.raises(Crash):
        broken.fit(X, y, callbacks=[Stop(), gm.Checkpoint(tmp_path / "run", every_steps=3)], **fit)
    at = [int(path[5:15]) for path in names(tmp_path / "run")]
    assert at[-1] > 10 and at[-1] % 10 in (0, 4) and at[-1] - at[0] >= 3
    Stop.on_step_end = lambda *args: None
    resumed.fit(
        X, y, callbacks=[Stop(), gm.Checkpoint(tmp_path / "run", every_steps=3)], resume=tmp_path / "run", **fit
    )
    np.testing.assert_array_equal(resumed.network.flat.get(), whole.network.flat.get())
    assert resumed.history["loss"] == whole.history["loss"]


# --- which is taken up -----------------------------------------------------------------------------------------------


def saved(folder, at=9, every=2):
    with pytest.raises(Crash):
        everything().fit(callbacks=with_checkpoint(folder, at, every_steps=every))
    return names(folder)


def test_a_damaged_one_is_passed_over_and_goes(tmp_path):
    whole, resumed = everything(), everything()
    whole.fit(callbacks=with_checkpoint(tmp_path / "whole"))
    run = tmp_path / "run"
    assert saved(run) == [name(6), name(8)]
    data = bytearray((run / name(8)).read_bytes())
    data[-5] ^= 1
    (run / name(8)).write_bytes(data)
    (run / name(99)).mkdir()  # no file, no checkpoint
    (run / "step-11.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"resumed from {name(6)}; a newer .* cannot be read: .*{name(8)}: .*damaged"):
        with pytest.raises(Crash):
            resumed.fit(callbacks=with_checkpoint(run, 8, every_steps=1), resume=run)
    # The damaged one takes no good one's place.
    assert names(run) == [name(6), name(7), name(99), "step-11.safetensors"]
    with pytest.raises(Crash):
        everything().fit(callbacks=with_checkpoint(run, 9, every_steps=1), resume=run)
    again = everything()
    again.fit(callbacks=with_checkpoint(run, every_steps=1), resume=run)
    same(whole.trainer, again.trainer)


def test_where_all_are_damaged_nothing_begins_anew_unseen(tmp_path):
    saved(tmp_path)
    for path in checkpoints.checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(gm.FileError, match=rf"none of its checkpoints can be read: .*{name(8)}: .*; .*{name(6)}: "):
        everything().fit(callbacks=with_checkpoint(tmp_path), resume=tmp_path)


@pytest.mark.parametrize("made", [True, False])
def test_an_empty_folder_begins_anew(made, tmp_path):
    folder = tmp_path / "a folder" / "läufe"
    if made:
        folder.mkdir(parents=True)
        (folder / ".step-0000000003.safetensors.0a1b2c3d.part").write_bytes(b"cut off")
        (folder / "notes.txt").write_text("mine")
    whole, run = everything(), everything()
    whole.fit(callbacks=with_checkpoint(tmp_path / "whole"))
    run.fit(callbacks=with_checkpoint(folder), resume=folder)
    same(whole.trainer, run.trainer)
    assert [n for n in names(folder) if not n.startswith("step-")] == (["notes.txt"] if made else [])


def test_clocks_do_not_matter(tmp_path):
    saved(tmp_path)
    os.utime(tmp_path / name(8), (0, 0))
    os.utime(tmp_path / name(6), (2**32, 2**32))
    trainer = everything().trainer
    checkpoints.resume_newest(trainer, tmp_path)
    assert trainer.epochs_done * STEPS + trainer.position == 8


def test_one_that_vanishes_while_it_is_looked_at(tmp_path):
    """The writer of the folder has moved on."""
    saved(tmp_path)
    trainer = everything().trainer
    load, paths = trainer.resume, []

    def resume(path):
        paths.append(path.name)
        if len(paths) == 1:
            path.rename(tmp_path / name(12))
        load(path)

    trainer.resume = resume
    checkpoints.resume_newest(trainer, tmp_path)
    assert paths == [name(8), name(12)]


def test_a_file_is_no_folder(tmp_path):
    X, y = table()
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match=r"run' is a file: give the folder of gm\.Checkpoint"):
        simple().fit(X, y, resume=tmp_path / "run")
    with pytest.raises(FileExistsError):
        simple().fit(X, y, callbacks=[gm.Checkpoint(tmp_path / "run")])


# --- one fit at a time -----------------------------------------------------------------------------------------------


def test_checkpoints_of_another_fit_are_not_overwritten(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=rf"holds checkpoints of another fit \({name(8)}\): go on from them with fit"):
        everything().fit(callbacks=with_checkpoint(tmp_path))
    assert names(tmp_path) == [name(6), name(8)]
    everything().fit(callbacks=with_checkpoint(tmp_path), resume=tmp_path)  # the lock was given back


def test_a_second_trainer_is_refused(tmp_path):
    X, y = table()

    class Second(gm.Callback):
        def on_epoch_end(self, trainer, record):
            with pytest.raises(
                RuntimeError, match=r"another fit is at work in .*: wait until it has ended, or give each"
            ):
                simple().fit(X, y, epochs=2, callbacks=[gm.Checkpoint(tmp_path), Second()], resume=tmp_path)

    trainer = simple()
    trainer.fit(X, y, epochs=2, callbacks=[gm.Checkpoint(tmp_path, every_steps=1), Second()])
    assert trainer.history["epoch"] == [1, 2]


def test_another_process_is_refused_until_the_first_one_dies(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from gpumlp.checkpoints import _locked;"
        "_locked(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(gm.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=env) as other:
        try:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(RuntimeError, match="another fit is at work"):
                checkpoints._locked(tmp_path)
        finally:
            other.kill()
    os.close(checkpoints._locked(tmp_path))


def test_without_fcntl_it_says_so(tmp_path, monkeypatch):
    X, y = table()
    import_ = builtins.__import__

    def without(name, *args, **options):
        if name == "fcntl":
            raise ImportError(name)
        return import_(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.warns(UserWarning, match="no fcntl: see to it yourself that one fit alone writes to"):
        simple().fit(X, y, epochs=1, callbacks=[gm.Checkpoint(tmp_path)])
    assert names(tmp_path) == [name(1)]


def test_a_lock_that_the_file_system_does_not_have(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    X, y = table()

    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="not supported"):
        simple().fit(X, y, epochs=1, callbacks=[gm.Checkpoint(tmp_path)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_steps": 0}, ValueError, "every_steps is 0|every_steps=0"),
        ({"every_steps": 1.5}, TypeError, "every_steps is 1.5|every_steps=1.5"),
        ({"every_seconds": 0}, ValueError, "every_seconds is 0; it must be"),
        ({"every_seconds": float("nan")}, ValueError, "every_seconds is nan; it must be"),
        ({"on_error": "ignore"}, ValueError, "on_error='ignore' must be 'raise' or 'warn'"),
    ],
)
def test_wrong_options(options, error, message, tmp_path):
    with pytest.raises((error, ValueError), match=message):
        gm.Checkpoint(tmp_path, **options)


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    X, y = table()

    class Poison(gm.Callback):
        def on_step_end(self, trainer, loss):
            if trainer.position == 4:
                trainer.network.flat[:, 0] = np.nan

    trainer = simple()
    with pytest.warns(UserWarning, match="no checkpoint at step 4: weights are NaN or infinite"):
        with pytest.raises(gm.DivergedError):
            trainer.fit(X, y, batch_size=8, callbacks=[Poison(), gm.Checkpoint(tmp_path, every_steps=1)])
    assert names(tmp_path) == [name(2), name(3)]


@pytest.mark.parametrize("device", ["cpu", "device"])
def test_a_loss_that_blows_up_is_never_saved(device, tmp_path):
    X, y = table(80)
    backend = "cpu" if device == "cpu" else GpuBackend(EmulatedRuntime(prefer=1))
    trials = range(12 if device == "cpu" else 3)
    for trial in trials:
        folder = tmp_path / str(trial)
        trainer = simple(backend, optimizer=gm.SGD([1e10, 1e20, 1e30][trial % 3] * (1 + trial)))
        X[::] = table(80, seed=trial)[0] * 1e3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                trainer.fit(X, y, epochs=2, batch_size=8, callbacks=[gm.Checkpoint(folder, every_steps=1)])
            except gm.DivergedError:
                pass
        for path in checkpoints.checkpoints(folder):
            _, tensors = container.unpack(path.read_bytes(), path, "state", None)
            assert np.isfinite(tensors["log"]).all() and np.isfinite(tensors["weights.flat"]).all()


def test_a_fleet_goes_on_without_the_model_that_diverged(tmp_path):
    X, y = table()
    trainer = simple(models=2, optimizer=gm.SGD([0.1, 1e38]))
    with pytest.warns(UserWarning) as caught:
        trainer.fit(X * 1e3, y, epochs=2, batch_size=8, callbacks=[gm.Checkpoint(tmp_path, every_steps=1)])
    assert any("the loss of model 1 is not finite" in str(w.message) for w in caught)
    assert names(tmp_path) == [name(2 * STEPS - 1), name(2 * STEPS)]


# --- R23: other data, another machine --------------------------------------------------------------------------------


def shuffled(X, y):
    return X[::-1], y[::-1]


def one_value(X, y):
    X = X.copy()
    X[17, 3] += 1e-3
    return X, y


def one_label(X, y):
    y = y.copy()
    y[30] = (y[30] + 1) % CLASSES
    return X, y


OTHER_DATA = {
    "one value": (one_value, {}, "X has other values; give the same, or begin anew"),
    "one label": (one_label, {}, "y has other values"),
    "the order": (shuffled, {}, "X has other values; y has other values"),
    "the type": (lambda X, y: (X.astype(np.float64), y), {}, "X has dtype float(32|64), it had float32"),
    "no weights": (lambda X, y: (X, y), {"sample_weight": None}, "sample_weight is not given, it was;"),
    "other weights": (lambda X, y: (X, y), {"sample_weight": np.ones(N)}, "sample_weight has other values"),
    "more rows": (lambda X, y: (np.vstack([X, X[:1]]), np.append(y, y[0])), {}, "had n_samples 50, this fit has 51"),
}


@pytest.mark.parametrize("case", OTHER_DATA)
def test_other_data_are_refused(case, tmp_path):
    change, options, message = OTHER_DATA[case]
    X, y = table()
    weight = np.linspace(0.5, 1.5, N)
    fit = dict(epochs=2, batch_size=8, sample_weight=weight)
    with pytest.raises(Crash):
        simple().fit(X, y, callbacks=[Break(9), gm.Checkpoint(tmp_path, every_steps=1)], **fit)
    resumed = simple()
    with pytest.raises(ValueError, match=message):
        if case == "more rows":
            options = {"sample_weight": np.append(weight, 1.0)}
        resumed.fit(*change(X, y), callbacks=[Break(), gm.Checkpoint(tmp_path)], resume=tmp_path, **fit | options)
    resumed.fit(X, y, callbacks=[Break(), gm.Checkpoint(tmp_path)], resume=tmp_path, **fit)


def test_weights_that_were_not_there(tmp_path):
    X, y = table()
    simple().fit(X, y, epochs=1, batch_size=8, callbacks=[gm.Checkpoint(tmp_path)])
    with pytest.raises(ValueError, match="sample_weight is given, it was not;"):
        simple().fit(X, y, batch_size=8, sample_weight=np.ones(N), callbacks=[gm.Checkpoint(tmp_path)], resume=tmp_path)


def test_of_large_data_rows_are_sampled():
    X = np.zeros((10_000, 20))
    y = np.zeros((10_000, 20))
    before = training_state.data_facts(Data(X, y, None, None))
    assert X.nbytes > training_state.WHOLE and before["X"]["shape"] == [10_000, 20]
    X[[0, -1]] = 1.0
    y[:] = np.arange(10_000)[:, None]
    with pytest.raises(ValueError, match="X has other values; y has other values"):
        training_state.check_data(before, Data(X, y, None, None))
    training_state.check_data(before, Data(np.zeros((10_000, 20)), np.zeros((10_000, 20)), None, None))


def test_shape_and_dtype_are_named():
    y = np.zeros(9)
    before = training_state.data_facts(Data(np.zeros((9, 2)), y, None, None))
    with pytest.raises(ValueError, match=r"X has shape \[9, 3\], it had \[9, 2\] and dtype float32, it had float64;"):
        training_state.check_data(before, Data(np.zeros((9, 3), np.float32), y, None, None))


def test_data_on_a_device_have_the_same_fingerprint():
    backend = GpuBackend(EmulatedRuntime(prefer=1))
    for rows in (50, 40_000):
        X = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
        assert training_state._fingerprint(X) == training_state._fingerprint(backend.asarray(X))


def test_another_environment_is_a_warning(tmp_path, monkeypatch):
    X, y = table()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with pytest.raises(Crash):
        simple().fit(X, y, batch_size=8, callbacks=[Break(9), gm.Checkpoint(tmp_path, every_steps=1)])
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.setattr(training_state, "_cpu", lambda: "another one")
    with pytest.warns(
        UserWarning, match="another environment, and may round otherwise: threads '3', was '1'; CPU 'another"
    ):
        simple().fit(X, y, batch_size=8, callbacks=[Break(), gm.Checkpoint(tmp_path)], resume=tmp_path)


def test_the_environment_names_what_rounding_depends_on(monkeypatch):
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    here = training_state._environment(simple().network)
    assert here["numpy"] == np.__version__ and int(here["threads"]) >= 1 and here["device"] == "cpu"
    assert here["CPU"] and here["BLAS"]
    there = training_state._environment(simple(GpuBackend(EmulatedRuntime(prefer=1))).network)
    assert there["device"] == "a CUDA emulator on the host"


# --- R22: odd folders ------------------------------------------------------------------------------------------------


def test_a_path_that_is_too_long(tmp_path):
    X, y = table()
    with pytest.raises(OSError, match="too long"):
        simple().fit(X, y, callbacks=[gm.Checkpoint(tmp_path / ("x" * 300))])


def test_a_folder_that_is_removed_during_the_fit(tmp_path):
    X, y = table()
    folder = tmp_path / "run"

    class Remove(gm.Callback):
        def on_step_end(self, trainer, loss):
            if trainer.position == 3 and folder.exists():
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()

    with pytest.raises(FileNotFoundError, match=f"{name(3)} cannot be written: there is no folder"):
        simple().fit(X, y, batch_size=8, callbacks=[Remove(), gm.Checkpoint(folder, every_steps=1)])
    with pytest.warns(UserWarning, match="no checkpoint at step .*, training goes on: .* there is no folder"):
        trainer = simple()
        trainer.fit(
            X, y, epochs=1, batch_size=8, callbacks=[Remove(), gm.Checkpoint(folder, every_steps=1, on_error="warn")]
        )
    assert trainer.stopped == "epochs"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path):
    X, y = table()
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        simple().fit(X, y, callbacks=[gm.Checkpoint(tmp_path)])


def test_off_the_main_thread(tmp_path):
    X, y = table()
    trainers = [simple() for _ in range(3)]
    threads = [
        threading.Thread(
            target=trainer.fit,
            args=(X, y),
            kwargs=dict(epochs=EPOCHS, batch_size=8, callbacks=[gm.Checkpoint(tmp_path / str(i), every_steps=1)]),
        )
        for i, trainer in enumerate(trainers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = [(tmp_path / str(i) / name(EPOCHS * STEPS)) for i in range(3)]
    states = [container.unpack(path.read_bytes(), path, "state", None)[1] for path in files]
    for state in states[1:]:
        np.testing.assert_array_equal(state["weights.flat"], states[0]["weights.flat"])


# --- R24: a reader while a writer commits ----------------------------------------------------------------------------


def reader_beside_writer(folder, commits, loads):
    """Every load is of one commit as a whole, and they are in order."""
    done, problems = threading.Event(), []

    def write():
        try:
            for number in range(1, commits + 1):
                tensors = {"a": np.full(500, number), "b": np.full(500, -number)}
                container.write_atomically(folder / name(number), container.pack("state", {"number": number}, tensors))
                checkpoints._forget(folder, number)
        except BaseException as error:
            problems.append(error)
        finally:
            done.set()

    class Reader:
        seen = 0

        def resume(self, path):
            config, tensors = container.unpack(path.read_bytes(), path, "state", None)
            assert (tensors["a"] == config["number"]).all() and (tensors["b"] == -config["number"]).all()
            assert int(path.name[5:15]) == config["number"] >= self.seen
            self.seen, self.loads = config["number"], self.loads + 1

        loads = 0

    reader, thread = Reader(), threading.Thread(target=write)
    thread.start()
    try:
        while reader.loads < loads or not done.is_set():
            checkpoints.resume_newest(reader, folder)
            time.sleep(0)
    finally:
        thread.join()
    assert not problems
    checkpoints.resume_newest(reader, folder)
    assert reader.seen == commits


def test_a_reader_while_a_writer_commits(tmp_path):
    reader_beside_writer(tmp_path, commits=150, loads=150)


@pytest.mark.long
def test_a_reader_while_a_writer_commits_long(tmp_path):
    reader_beside_writer(tmp_path, commits=2000, loads=2000)


def test_what_is_saved_is_plain_json(tmp_path):
    saved(tmp_path)
    path = tmp_path / name(8)
    config, _ = container.unpack(path.read_bytes(), path, "state", None)
    assert set(config["data"]) == {"X", "y", "sample_weight"} and config["data"]["X"]["shape"] == [N, FEATURES]
    assert set(config["environment"]) == {"numpy", "BLAS", "threads", "CPU", "device"}
    json.dumps(config)
