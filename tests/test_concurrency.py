"""Fits beside each other, in threads, in processes, one after the other: each gives the bits of the fit alone, and the same
seed always the same ones. One network is fitted once at a time.

What has to run in a process of its own is a script of this file: ``python test_concurrency.py ACTION ...``.
"""

import copy
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from test_faults import ENV

import gpumlp as gm

SOFTMAX = "softmax_cross_entropy"
N, FEATURES, CLASSES = 90, 6, 3
peer = pytest.mark.peer
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


def table():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, FEATURES)).astype(np.float32)
    return X, (X @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1)


def layers():
    return [gm.Dense(9, "relu", norm="batch", dropout=0.2), gm.Dense(7, "gelu", max_norm=1.0), gm.Dense(CLASSES)]


def trainer_of(seed, device="cpu"):
    """Another kind of training for each of eight seeds, and every one holds random numbers."""
    fleet = {"models": 3} if seed % 8 == 1 else {}
    dtype = "float64" if seed % 8 == 2 else "float32"
    net = gm.Network(layers(), n_features=FEATURES, seed=seed, device=device, dtype=dtype, standardize=True, **fleet)
    optimizer = {3: "lbfgs", 4: gm.SGD(0.1, momentum=0.9), 5: gm.AdamW(0.01, clip_norm=1.0)}.get(seed % 8, "adam")
    augment = [gm.GaussianNoise(0.1), gm.Mixup(0.3)] if seed % 8 == 6 else []
    return gm.Trainer(net, SOFTMAX, optimizer, schedule="cosine" if seed % 2 else None, augment=augment)


def fitted(seed, *callbacks, device="cpu"):
    trainer, data = trainer_of(seed, device), table()
    stop = gm.EarlyStopping(2)
    trainer.fit(*data, epochs=3, batch_size=16, validation_data=data, callbacks=[stop, *callbacks])
    return trainer


def digest(trainer):
    """SHA-256 of all that a fit leaves."""
    net, history = trainer.network, {name: v for name, v in trainer.history.items() if name != "seconds"}
    here = net.backend.to_numpy
    arrays = [here(net.flat), *(here(v) for v in net.statistics.values()), net.shift, here(net.logits(table()[0]))]
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays) + repr(history).encode()
    return hashlib.sha256(content).hexdigest()


class At(gm.Callback):
    """Calls ``action`` after step ``step``."""

    def __init__(self, action, step=5):
        self.action, self.step, self.made = action, step, 0

    def on_step_end(self, trainer, loss):
        self.made += 1
        if self.made == self.step:
            self.action(trainer)


def in_threads(jobs):
    """Run them all at once; raise what one of them raises."""
    errors, start = [], threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def often():
    """Have threads take turns a thousand times as often as they do by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


# --- R17: threads ------------------------------------------------------------------------------------------------------


def test_fits_in_threads_have_the_bits_of_fits_alone(often):
    """Eight threads make the same eight fits, each in an order of its own; NumPy's global generator stays as it is."""
    alone = {seed: digest(fitted(seed)) for seed in range(8)}
    assert len(set(alone.values())) == 8
    np.random.seed(3)
    before, found = np.random.get_state(), [{} for _ in range(8)]

    def eight(i):
        for seed in np.random.default_rng(i).permutation(8).tolist():
            found[i][seed] = digest(fitted(seed))

    in_threads([lambda i=i: eight(i) for i in range(8)])
    assert all(one == alone for one in found)
    for one, other in zip(before, np.random.get_state(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer", "ignore:lbfgs failed")
@peer
def test_estimators_in_threads_have_the_bits_of_fits_alone(often):
    pytest.importorskip("sklearn")
    alone = {seed: weights(fitted_estimator(seed)) for seed in range(8)}
    np.random.seed(3)
    before, found = np.random.get_state(), [{} for _ in range(8)]

    def eight(i):
        for seed in np.random.default_rng(i).permutation(8).tolist():
            found[i][seed] = weights(fitted_estimator(seed))

    in_threads([lambda i=i: eight(i) for i in range(8)])
    assert all(one == alone for one in found)
    for one, other in zip(before, np.random.get_state(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_predictions_beside_fits(often):
    """Of other networks, and of the one that is being fitted: that answers with weights of some moment, undisturbed."""
    alone, other, (X, _) = digest(fitted(0)), fitted(4).network, table()
    expected, answers, done = other.logits(X).tobytes(), [], threading.Event()
    trainer, data = trainer_of(0), table()

    def fit():
        try:
            trainer.fit(
                *data, epochs=3, batch_size=16, validation_data=data, callbacks=[gm.EarlyStopping(2), At(wait, 2)]
            )
        finally:
            done.set()

    def wait(trainer):
        while not answers:  # a prediction within the fit, however short that is
            pass

    def predict(network):
        while not done.is_set():
            answers.append((network is other, network.logits(X)))

    in_threads([fit, *[lambda network=network: predict(network) for network in (other, trainer.network) * 2]])
    assert digest(trainer) == alone
    assert {answer.tobytes() for mine, answer in answers if mine} <= {expected}
    assert all(answer.shape == (N, CLASSES) and np.isfinite(answer).all() for _, answer in answers)


BUSY = (
    "this {} is being fitted already, in another thread or by a fit around this one: wait until that fit has ended, or "
)


def test_one_network_is_fitted_once_at_a_time():
    """Not by another trainer, in another thread, or within a callback; the fit under way goes on undisturbed."""
    alone, refused = digest(fitted(0)), []

    def again(trainer):
        for other in (trainer, gm.Trainer(trainer.network, SOFTMAX)):
            with pytest.raises(RuntimeError, match=BUSY.format("network")):
                other.fit(*table(), epochs=1)
            refused.append(1)

    def again_elsewhere(trainer):
        in_threads([lambda: again(trainer)])

    trainer = fitted(0, At(again), At(again_elsewhere, 9))
    assert len(refused) == 4 and digest(trainer) == alone
    trainer.fit(*table(), epochs=1)  # that one is over


def test_many_threads_at_one_network():
    """One of them fits, the others are told so at once."""
    trainer, came, refused = trainer_of(0), threading.Semaphore(0), []

    def fit():
        try:
            trainer.fit(*table(), epochs=1, batch_size=16, callbacks=[At(wait, 1)])
        except RuntimeError as error:
            refused.append(str(error))
            came.release()

    def wait(trainer):
        for _ in range(7):
            assert came.acquire(timeout=60)

    in_threads([fit] * 8)
    assert len(refused) == 7 and trainer.network.steps[0] == 6


class Stop(Exception):
    pass


def test_a_fit_that_fails_leaves_the_network_free():
    def fail(trainer):
        raise Stop

    trainer = trainer_of(0)
    with pytest.raises(Stop):
        trainer.fit(*table(), callbacks=[At(fail, 1)])
    with pytest.raises(ValueError, match="X has no rows"):
        trainer.fit(table()[0][:0], [])
    assert trainer.fit(*table(), epochs=1)["epoch"] == [1]


def test_a_copy_of_a_network_that_is_being_fitted_is_free():
    made = []

    def copies(trainer):
        net = trainer.network
        for one in (net.copy(), copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net[0]):
            made.append(gm.Trainer(one, SOFTMAX).fit(*table(), epochs=1)["epoch"])

    fitted(0, At(copies))
    assert made == [[1]] * 4


@fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_fork_of_a_fit_is_free():
    """The fit under way is the parent's."""
    codes = []

    def child(trainer):
        trainer.fit(*table(), epochs=1, callbacks=[])

    def forks(trainer):
        process = multiprocessing.get_context("fork").Process(target=child, args=(trainer,))
        process.start()
        process.join(60)
        codes.append(process.exitcode)

    alone = digest(fitted(0))
    assert digest(fitted(0, At(forks))) == alone and codes == [0]


@peer
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_one_estimator_is_fitted_once_at_a_time(name):
    pytest.importorskip("sklearn")
    X, y = table()
    model = getattr(gm, name)(hidden_layer_sizes=(5,), max_iter=3, random_state=0, device="cpu")
    alone, refused = weights(copy.deepcopy(model).fit(X, y)), []

    def again(trainer):
        for fit in (model.fit, model.partial_fit):
            with pytest.raises(RuntimeError, match=BUSY.format(name)):
                in_threads([lambda fit=fit: fit(X, y)])
            refused.append(1)

    assert weights(model.set_params(callbacks=[At(again, 2)]).fit(X, y)) == alone and len(refused) == 2
    assert weights(model.set_params(callbacks=None).fit(X, y)) == alone
    with pytest.raises(ValueError):
        model.fit(X, y[:-1])
    assert weights(model.fit(X, y)) == alone


# --- R18: processes ------------------------------------------------------------------------------------------------------


def start(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", __file__, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=ENV | environment)


def output(process):
    with process:
        out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return json.loads(out)


def workers(method):
    """Fits in two workers of a pool; this process has fitted before, so that its BLAS has started its threads."""
    alone = [digest(fitted(seed)) for seed in range(4)]
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        trained = pool.map(fitted, range(4), chunksize=1)  # trainers travel back
    return alone, [digest(trainer) for trainer in trained]


JOBLIB = ("loky", "multiprocessing", "threading")


def joblib_workers():
    """Digests of fits alone and in two workers of each kind; and what a grid search finds in one process, and in two."""
    import joblib
    from sklearn.model_selection import GridSearchCV

    found = {"alone": [weights(fitted_estimator(seed)) for seed in range(4)]}
    for backend in JOBLIB:
        with joblib.parallel_config(backend=backend):
            trained = joblib.Parallel(n_jobs=2)(joblib.delayed(fitted_estimator)(seed) for seed in range(4))
        found[backend] = [weights(model) for model in trained]
    for jobs in (1, 2):
        model = gm.MLPClassifier((7,), max_iter=4, random_state=0, device="cpu")
        grid = {"learning_rate_init": [1e-3, 1e-2], "solver": ["adam", "lbfgs"]}
        search = GridSearchCV(model, grid, cv=3, n_jobs=jobs, scoring="neg_log_loss").fit(*table())
        scores = {name: v.tolist() for name, v in search.cv_results_.items() if "test_score" in name}
        found[f"search in {jobs}"] = scores, weights(search.best_estimator_), search.best_params_
    return found


def fitted_estimator(seed):
    """Another solver for each seed."""
    kind = gm.MLPRegressor if seed % 2 else gm.MLPClassifier
    solver = ("adam", "sgd", "lbfgs")[seed % 3]
    options = {"early_stopping": seed % 3 == 0, "dropout": 0.2 if seed % 3 else 0.0}
    return kind(hidden_layer_sizes=(7,), solver=solver, max_iter=4, random_state=seed, device="cpu", **options).fit(
        *table()
    )


def weights(model):
    return hashlib.sha256(b"".join(array.tobytes() for array in model.coefs_ + model.intercepts_)).hexdigest()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_fits_in_worker_processes_have_the_bits_of_fits_alone(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no {method}")
    alone, found = output(start("workers", method))
    assert found == alone and len(set(alone)) == 4


@functools.cache
def by_joblib():
    pytest.importorskip("sklearn")
    return output(start("joblib_workers"))


@peer
@pytest.mark.parametrize("backend", JOBLIB)
def test_estimators_in_joblib_s_workers_have_the_bits_of_fits_alone(backend):
    found = by_joblib()
    assert found[backend] == found["alone"] and len(set(found["alone"])) == 4


@peer
def test_a_grid_search_in_two_processes_has_the_scores_of_one():
    found = by_joblib()
    assert found["search in 2"] == found["search in 1"] and len(found["search in 1"][0]) == 6


# --- R19: the same seed, the same bits -----------------------------------------------------------------------------------


def repeat(n):
    """Digests of the same fit, made anew each time, among memory that lies elsewhere each time."""
    litter, found = [], []
    for i in range(int(n)):
        found.append(digest(fitted(6)))
        litter.append(np.empty(1000 + 77 * i))
    return found


def repeat_estimator(n):
    return [weights(fitted_estimator(4)) + weights(fitted_estimator(3)) for _ in range(int(n))]


def fresh(action, times, at_once=2):
    """What an action finds once in each of so many processes, each with a hash seed of its own."""
    found = []
    for first in range(0, times, at_once):
        running = [start(action, 1, PYTHONHASHSEED=str(i)) for i in range(first, min(first + at_once, times))]
        found += [output(process)[0] for process in running]
    return found


@pytest.mark.parametrize("processes", [4, pytest.param(20, marks=pytest.mark.long)])
def test_one_seed_one_digest(processes):
    """Of 20 fits in one process, and one in each of several."""
    found = output(start("repeat", 20)) + fresh("repeat", processes)
    assert len(found) == 20 + processes and len(set(found)) == 1


@peer
@pytest.mark.parametrize("processes", [2, pytest.param(20, marks=pytest.mark.long)])
def test_one_seed_one_digest_in_estimators(processes):
    pytest.importorskip("sklearn")
    found = output(start("repeat_estimator", 20)) + fresh("repeat_estimator", processes)
    assert len(set(found)) == 1


def test_one_seed_one_digest_on_a_device():
    from emulator import EmulatedRuntime  # which the scripts need not wait for

    from gpumlp.backends.gpu_backend import GpuBackend

    found = {digest(fitted(6, device=GpuBackend(EmulatedRuntime()))) for _ in range(20)}
    assert len(found) == 1


if __name__ == "__main__":
    actions = {f.__name__: f for f in (workers, joblib_workers, repeat, repeat_estimator)}
    print(json.dumps(actions[sys.argv[1]](*sys.argv[2:])))
