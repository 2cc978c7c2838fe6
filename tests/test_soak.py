"""Many fits in one process: memory, open files and threads stay as they are, and no temporary file is left."""

import gc
import os
import tempfile
import warnings

import numpy as np
import pytest

import gpumlp as gm

WARM_UP = 500  # fits, in which caches and the allocator's arenas grow
SLOPE = 1024  # bytes that the process may grow by with a fit
N, FEATURES, CLASSES = 64, 6, 3


def table():
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, FEATURES)).astype(np.float32), np.arange(N) % CLASSES


def one_fit(i, folder):
    """All that a fit may leave behind: buffers of another size each time, files, callbacks, errors, copies."""
    X, y = table()
    layers = [gm.Dense(4 + i % 13, "relu", norm="batch", dropout=0.1), gm.Dense(CLASSES)]
    net = gm.Network(layers, n_features=FEATURES, seed=i, device="cpu", models=(None, 2)[i % 4 == 0], standardize=True)
    optimizer = ("adam", "sgd", "lbfgs")[i % 3]
    trainer = gm.Trainer(net, "softmax_cross_entropy", optimizer, schedule="cosine", augment=[gm.GaussianNoise(0.1)])
    run, path = os.path.join(folder, "run"), os.path.join(folder, "model.safetensors")
    callbacks = [gm.EarlyStopping(3), *([gm.Checkpoint(run)] if i % 10 == 0 else [])]
    options = {"epochs": 2, "batch_size": 16 + i % 7, "validation_data": (X, y), "callbacks": callbacks}
    trainer.fit(X, y, **options)
    net.predict(X)
    trainer.evaluate(X, y)
    if i % 10 == 0:
        again = gm.Trainer(net.copy(), "softmax_cross_entropy", optimizer, schedule="cosine", augment=trainer.augment)
        again.fit(X, y, **options | {"resume": run, "epochs": 3})
        for name in os.listdir(run):
            os.unlink(os.path.join(run, name))
        net.save(path)
        gm.load(path, device="cpu").predict(X)
        with pytest.raises(ValueError, match="rows"):
            trainer.fit(X, y[:-1])
        with pytest.raises(gm.DivergedError), warnings.catch_warnings(action="ignore"):
            gm.Trainer(net, "softmax_cross_entropy", gm.SGD(1e38)).fit(X * 1e3, y, epochs=9)


def one_estimator(i, folder):
    X, y = table()
    kind = gm.MLPRegressor if i % 2 else gm.MLPClassifier
    options = {"early_stopping": i % 3 == 0, "solver": ("adam", "sgd", "lbfgs")[i % 3], "random_state": i}
    model = kind(hidden_layer_sizes=(4 + i % 13,), max_iter=2, device="cpu", **options)
    with warnings.catch_warnings(action="ignore"):
        model.fit(X, y).score(X, y)
        if model.solver != "lbfgs" and not model.early_stopping:
            model.partial_fit(X, y)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where everything is written, temporary files too."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield tmp_path
    left = {
        os.path.relpath(os.path.join(where, name), tmp_path) for where, _, names in os.walk(tmp_path) for name in names
    }
    assert left <= {"model.safetensors"}


def resident():
    """Bytes of memory that the process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files_and_threads():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def soak(fit, fits, folder):
    """The slope of the memory over the fits behind the warm-up, in bytes a fit; files and threads stay what they are."""
    at, used, before = [], [], None
    for i in range(fits):
        fit(i, folder)
        if i >= WARM_UP and i % 50 == 0:
            gc.collect()
            at.append(i)
            used.append(resident())
            before = before or open_files_and_threads()
            assert open_files_and_threads() == before
    slope = float(np.polyfit(at, used, 1)[0])
    print(f"{slope:.1f} bytes a fit, {used[0]:,} bytes after {at[0]:,} fits, {used[-1]:,} after {at[-1]:,}")
    return slope


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory in /proc")
def test_memory_over_10_000_fits(folder):
    assert soak(one_fit, 10_000, folder) < SLOPE


@pytest.mark.long
@pytest.mark.peer
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory in /proc")
def test_memory_over_10_000_estimators(folder):
    pytest.importorskip("sklearn")
    assert soak(one_estimator, 10_000, folder) < SLOPE


@pytest.mark.parametrize("fit", [one_fit, pytest.param(one_estimator, marks=pytest.mark.peer)])
def test_a_fit_leaves_no_objects_behind(fit, folder):
    """The collector knows as many after 60 fits as after 30: what a fit keeps for good shows, however small."""
    if fit is one_estimator:
        pytest.importorskip("sklearn")
    counts = []
    for _ in range(3):
        for i in range(30):
            fit(i, folder)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] <= counts[1] + 5
