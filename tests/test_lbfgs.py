"""L-BFGS: convex problems to the last digits, the line search, the memory, and its place in Trainer.fit."""

from itertools import pairwise

import numpy as np
import pytest

from gpumlp import LBFGS, Callback, Dense, DivergedError, EarlyStopping, GaussianNoise, Loss, Network, Trainer
from gpumlp.backends.numpy_backend import NumpyBackend
from gpumlp.lbfgs import CURVATURE, SUFFICIENT_DECREASE, iterate, set_direction


class Problem:
    """A function of a vector as the loss of a network of one row of weights."""

    def __init__(self, function, start, **options):
        self.function, self.evaluations = function, 0
        self.network = Network([Dense(1, bias=False)], n_features=len(start), dtype="float64")
        self.network.parameters["dense_0.W"][0, 0] = start
        self.optimizer = LBFGS(**options)

    @property
    def w(self):
        return self.network.parameters["dense_0.W"][0, 0].copy()

    def evaluate(self):
        self.evaluations += 1
        value, self.network.gradients["dense_0.W"][0, 0] = self.function(self.w)
        return value

    def steps(self, n):
        return [self.optimizer.step(self.network, evaluate=self.evaluate) for _ in range(n)]


def rosenbrock(w):
    x, y = w
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2, np.array([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)])


def barrier(w):
    """-log w - log(1 - w), NaN outside (0, 1)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(-np.log(w[0]) - np.log(1 - w[0])), -1 / w + 1 / (1 - w)


def labels(n=80, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 4))
    return X, (X @ rng.normal(size=(4, 3)) + rng.normal(size=(n, 3))).argmax(axis=1)


def own_loop(network, loss, optimizer, X, y):
    """An ``evaluate`` as users write it."""

    def evaluate():
        value, dz = loss(network.forward(X), y)
        network.backward(dz)
        return value

    return lambda: optimizer.step(network, evaluate=evaluate)


# --- how good -------------------------------------------------------------------------------------------------------


def test_rosenbrock():
    problem = Problem(rosenbrock, [-1.2, 1.0])
    losses = problem.steps(45)
    np.testing.assert_allclose(problem.w, [1, 1], atol=1e-9)
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[0] == rosenbrock(np.array([-1.2, 1.0]))[0]  # the loss before the step


def test_ridge_regression_reaches_the_closed_form():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 7)) * np.logspace(-0.5, 0.5, 7)
    y = X @ rng.normal(size=7) + 3 + rng.normal(size=50)
    network = Network([Dense(1)], n_features=7, dtype="float64", seed=1)
    Trainer(network, "squared_error", LBFGS(l2=0.1)).fit(X, y, epochs=60)
    ones = np.column_stack([X, np.ones(50)])
    penalty = np.diag([0.1] * 7 + [0])  # not on the bias
    solution = np.linalg.solve(2 / 50 * ones.T @ ones + penalty, 2 / 50 * ones.T @ y)
    np.testing.assert_allclose(network.parameters["dense_0.W"][0, 0], solution[:7], rtol=1e-9)
    np.testing.assert_allclose(network.parameters["dense_0.b"][0], solution[7:], rtol=1e-9)


def test_lasso_reaches_the_closed_form():
    X = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 5)))[0] * np.sqrt(40 / 2)  # 2/n XᵀX = 1
    y = X @ np.array([3.0, -2.0, 1.0, -1.0, 4.0])
    network = Network([Dense(1, bias=False)], n_features=5, dtype="float64", seed=1)
    Trainer(network, "squared_error", LBFGS(l1=0.25)).fit(X, y, epochs=30)
    np.testing.assert_allclose(network.parameters["dense_0.W"][0, 0], [2.75, -1.75, 0.75, -0.75, 3.75], rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 2e-6)])
def test_logistic_regression_to_a_zero_gradient(dtype, tolerance):
    X, y = labels()
    network = Network([Dense(3)], n_features=4, dtype=dtype)
    history = Trainer(network, "softmax_cross_entropy", LBFGS(l2=1e-2)).fit(X, y, epochs=60)
    _, dz = Loss("softmax_cross_entropy")(network.forward(X), y)
    network.backward(dz)
    assert np.abs(network.gradients["dense_0.W"] + 1e-2 * network.parameters["dense_0.W"]).max() < tolerance
    assert np.abs(network.gradients["dense_0.b"]).max() < tolerance
    # It stays there: beyond convergence rounding decides about every trial.
    assert abs(history["loss"][-1] - history["loss"][30]) < tolerance * 10


def test_a_network_learns_what_it_can_represent():
    X = np.random.default_rng(0).uniform(-1, 1, size=(60, 3))
    teacher = Network([Dense(4, "tanh"), Dense(2)], n_features=3, seed=1, dtype="float64")
    network = Network([Dense(6, "tanh"), Dense(2)], n_features=3, seed=2, dtype="float64")
    history = Trainer(network, "squared_error", "lbfgs").fit(X, teacher.logits(X), epochs=100)
    assert history["loss"][0] > 0.1 and history["loss"][-1] < 1e-4


# --- direction, line search, memory ---------------------------------------------------------------------------------


def test_direction_is_minus_h_g():
    """The two-loop recursion against equation 7.19's matrices, for two models of which one has dropped a pair."""
    rng = np.random.default_rng(0)
    s, y = rng.normal(size=(2, 3, 2, 5))  # (history, models, n), the newest pair first
    y += 4 * s
    rho = 1 / np.einsum("hmn,hmn->hm", s, y)
    rho[1, 0] = 0.0
    g, scale = rng.normal(size=(2, 5)), np.array([0.7, 1.3])
    found = np.empty_like(g)
    set_direction(NumpyBackend(), dict(s=s, y=y, rho=rho, scale=scale, gradient=g, direction=found))
    for m in range(2):
        H = scale[m] * np.eye(5)
        for k in (2, 1, 0):
            if rho[k, m]:
                V = np.eye(5) - rho[k, m] * np.outer(y[k, m], s[k, m])
                H = V.T @ H @ V + rho[k, m] * np.outer(s[k, m], s[k, m])
        np.testing.assert_allclose(found[m], -H @ g[m], rtol=1e-12)


def test_every_step_satisfies_the_weak_wolfe_conditions():
    problem = Problem(rosenbrock, [-1.2, 1.0])
    for _ in range(25):
        before = problem.w
        problem.steps(1)
        s = problem.w - before
        (f0, g0), (f1, g1) = rosenbrock(before), rosenbrock(problem.w)
        assert s.any() and f1 <= f0 + SUFFICIENT_DECREASE * g0 @ s and g1 @ s >= CURVATURE * g0 @ s


@pytest.mark.parametrize("start", [0.999, 0.001])
def test_trials_that_are_not_numbers_are_shortened(start):
    problem = Problem(barrier, [start], learning_rate=64.0)
    losses = problem.steps(12)
    assert np.isfinite(losses).all() and problem.evaluations > 12 + 1
    np.testing.assert_allclose(problem.w, [0.5], atol=1e-8)


def test_a_finite_loss_with_an_infinite_gradient_is_no_decrease():
    def edge(w):
        return -abs(w[0]), np.array([-np.sign(w[0]) if abs(w[0]) < 3 else np.inf])

    problem = Problem(edge, [1.0])
    problem.steps(5)
    assert 1 < problem.w[0] < 3


def test_a_search_that_finds_nothing_stays_where_it_was():
    problem = Problem(lambda w: (float(w @ w), -2 * w), [1.0, -2.0], max_evaluations=7)  # a gradient of the wrong sign
    problem.steps(3)
    assert problem.w.tolist() == [1.0, -2.0] and problem.evaluations == 3 * (1 + 7 + 1)


def test_a_search_that_runs_out_keeps_the_longest_decrease():
    problem = Problem(lambda w: (float(-w[0]), np.array([-1.0])), [0.0], max_evaluations=4)  # endless descent
    problem.steps(1)
    assert problem.w.tolist() == [8.0]  # of the trials 1, 2, 4, 8


@pytest.mark.parametrize("line_search", [True, False])
def test_nothing_moves_without_slope_or_from_nan(line_search):
    at_minimum = Problem(lambda w: (float(w @ w), 2 * w), [0.0, 0.0], line_search=line_search)
    assert at_minimum.steps(3) == [0.0] * 3 and not at_minimum.w.any()
    for value, gradient in ((np.nan, np.nan), (np.inf, 1.0), (np.nan, 0.0), (1.0, np.inf), (1.0, np.nan)):
        broken = Problem(lambda w, v=value, g=gradient: (v, np.full(2, g)), [1.0, -2.0], line_search=line_search)
        broken.steps(2)
        assert broken.w.tolist() == [1.0, -2.0]


def test_a_fixed_length_is_the_learning_rate():
    """The first step is at most ``learning_rate`` long in the sum of absolute values, as PyTorch's."""
    steep = Problem(lambda w: (float(5 * w @ w), 10 * w), [3.0, -1.0], learning_rate=0.5, line_search=False)
    steep.steps(1)
    np.testing.assert_allclose(steep.w, [3 - 0.5 * 0.75, -1 + 0.5 * 0.25])
    steep.steps(1)  # one pair knows the curvature of this bowl: half way to its bottom
    np.testing.assert_allclose(steep.w, [2.625 / 2, -0.875 / 2])
    assert steep.evaluations == 4
    flat = Problem(lambda w: (float(0.05 * w @ w), 0.1 * w), [3.0, -1.0], learning_rate=0.5, line_search=False)
    flat.steps(1)
    np.testing.assert_allclose(flat.w, [3 - 0.5 * 0.3, -1 + 0.5 * 0.1])


def test_history_bounds_the_memory():
    problem = Problem(rosenbrock, [-1.2, 1.0], history=2)
    problem.steps(60)
    np.testing.assert_allclose(problem.w, [1, 1], atol=1e-6)
    assert problem.optimizer._bound.states["s"].shape[0] == 2


def test_same_data_spares_an_evaluation_and_changes_no_bit():
    problems = [Problem(rosenbrock, [-1.2, 1.0]) for _ in range(2)]
    for same_data, problem in zip((False, True), problems, strict=True):
        bound = problem.optimizer.bind(problem.network)
        problem.losses = [
            iterate(problem.optimizer, bound, problem.evaluate, 1.0, same_data=same_data) for _ in range(20)
        ]
    again, spared = problems
    assert spared.losses == again.losses and (spared.w == again.w).all()
    assert spared.evaluations == again.evaluations - 19


def test_a_direction_that_leads_uphill_is_not_taken():
    problem = Problem(lambda w: (float(w @ w), 2 * w), [1.0, -2.0])
    memory = problem.optimizer.bind(problem.network).states
    problem.steps(1)
    memory["rho"][...], memory["scale"][...] = 0.0, -1.0
    (loss,) = problem.steps(1)
    assert problem.w @ problem.w < loss


def test_a_pair_without_curvature_counts_for_nothing():
    problem = Problem(lambda w: (float(-w @ w), -2 * w), [1.0, -2.0], line_search=False)
    problem.steps(3)
    memory = problem.optimizer._bound.states
    assert memory["s"][:3].any(axis=(1, 2)).all() and not memory["rho"].any() and memory["scale"] == 1


FUNCTIONS = {  # searches of different lengths, one of which runs out, and one that finds nothing
    "rosenbrock": rosenbrock,
    "bowl": lambda w: (float(w @ w), 2 * w),
    "steep bowl": lambda w: (float(500 * w @ w), 1000 * w),
    "endless": lambda w: (float(-w[0]), np.array([-1.0, 0.0])),
    "wrong sign": lambda w: (float(w @ w), -2 * w),
    "nan": lambda w: (np.nan, np.full(2, np.nan)),
}


@pytest.mark.parametrize("line_search", [True, False])
def test_each_model_searches_by_itself(line_search):
    options = dict(line_search=line_search, max_evaluations=6, history=3)
    alone = [Problem(function, [-1.2, 1.0], **options) for function in FUNCTIONS.values()]
    fleet = Network([Dense(1, bias=False)], n_features=2, models=len(FUNCTIONS), dtype="float64")
    W, dW = fleet.parameters["dense_0.W"][:, 0], fleet.gradients["dense_0.W"][:, 0]
    W[...] = [-1.2, 1.0]

    def evaluate():
        found = [function(w) for function, w in zip(FUNCTIONS.values(), W, strict=True)]
        dW[...] = [gradient for _, gradient in found]
        return np.array([value for value, _ in found])

    optimizer = LBFGS(**options)
    for _ in range(12):
        losses = optimizer.step(fleet, evaluate=evaluate)
        np.testing.assert_array_equal(losses, [problem.steps(1)[0] for problem in alone])
        np.testing.assert_array_equal(W, [problem.w for problem in alone])


def test_inactive_models_stay():
    fleet = Network([Dense(3)], n_features=4, models=3, seed=[1, 2, 3], dtype="float64")
    X, y = labels()
    loss, optimizer = Loss("softmax_cross_entropy"), LBFGS()

    def evaluate():
        value, dz = loss(fleet.forward(X), y)
        fleet.backward(dz)
        return value

    start = fleet.flat.copy()
    for _ in range(3):
        iterate(optimizer, optimizer.bind(fleet), evaluate, 1.0, active=np.array([True, False, True]))
    assert ((fleet.flat != start).any(axis=1) == [True, False, True]).all()
    assert optimizer.bind(fleet).t.tolist() == [3, 0, 3]


# --- in Trainer.fit -------------------------------------------------------------------------------------------------

VARIANTS = {  # layer's options, optimizer's options
    "plain": ({}, {}),
    "fixed length": ({}, dict(line_search=False, learning_rate=0.3)),
    "penalties": ({}, dict(l1=1e-3, l2=1e-2)),
    "max_norm": (dict(max_norm=0.8), {}),
    "dropout": (dict(dropout=0.3), {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fit_is_the_users_own_loop(variant):
    """Bit for bit, though fit reuses the last evaluation where it still holds; also over a second fit on other rows."""
    layer, options = VARIANTS[variant]
    networks = [Network([Dense(6, "tanh", **layer), Dense(3)], n_features=4, seed=3) for _ in range(2)]
    trainer = Trainer(networks[0], "softmax_cross_entropy", LBFGS(**options))
    loss, optimizer = Loss("softmax_cross_entropy"), LBFGS(**options)
    for seed in (0, 1):
        X, y = labels(seed=seed)
        losses = trainer.fit(X, y, epochs=6, batch_size=16)["loss"]  # of 16 rows nothing is left: the batch is full
        step = own_loop(networks[1], loss, optimizer, X, y)
        assert losses == [step() for _ in range(6)]
        np.testing.assert_array_equal(networks[0].flat, networks[1].flat)
    assert networks[0].steps.tolist() == [12]


class Forget(Callback):
    """Makes every step evaluate anew."""

    def on_step_end(self, trainer, loss):
        trainer._step._repeats = False


@pytest.mark.parametrize("augment", [(), GaussianNoise(0.2)], ids=["", "noise"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_reuse_changes_no_bit_of_a_fit(norm, augment):
    X, y = labels()
    networks = [
        Network([Dense(6, "tanh", norm=norm), Dense(3)], n_features=4, seed=3, standardize=True) for _ in range(2)
    ]
    histories = [
        Trainer(n, "softmax_cross_entropy", "lbfgs", augment=augment).fit(X, y, epochs=8, callbacks=callbacks)["loss"]
        for n, callbacks in zip(networks, ([], [Forget()]), strict=True)
    ]
    assert histories[0] == histories[1]
    np.testing.assert_array_equal(networks[0].flat, networks[1].flat)
    for name, values in networks[0].statistics.items():
        np.testing.assert_array_equal(values, networks[1].statistics[name])


def test_reuse_spares_evaluations(monkeypatch):
    X, y = labels()
    counts = []
    for callbacks in ([], [Forget()]):
        network = Network([Dense(6, "tanh"), Dense(3)], n_features=4, seed=3)
        backend, counted = network.backend, []
        monkeypatch.setattr(backend, "gather", lambda *a, b=backend, c=counted: (c.append(1), type(b).gather(b, *a))[1])
        Trainer(network, "softmax_cross_entropy", "lbfgs").fit(X, y, epochs=8, callbacks=callbacks)
        counts.append(len(counted))
    assert counts[0] == counts[1] - 7


def test_weights_put_back_are_evaluated_anew():
    """A second fit after EarlyStopping begins at other weights than L-BFGS saw last."""
    X, y = labels()
    network = Network([Dense(6, "tanh"), Dense(3)], n_features=4, seed=3)
    trainer = Trainer(network, "softmax_cross_entropy", LBFGS(line_search=False))
    X_val, y_val = labels(seed=5)
    trainer.fit(X, y, epochs=8, validation_data=(X_val, y_val), callbacks=[EarlyStopping(2)])
    loss_now = trainer.evaluate(X, y)["loss"]
    assert trainer.fit(X, y, epochs=1)["loss"][0] == pytest.approx(loss_now, rel=1e-6)


@pytest.mark.parametrize("line_search", [True, False])
def test_running_statistics_move_once_an_iteration(line_search):
    """Not with every trial: they follow the weights that are taken, and a trial that overflowed leaves no trace."""
    X, y = labels()
    network = Network([Dense(6, "tanh", norm="batch"), Dense(3)], n_features=4, seed=3, dtype="float64")
    fresh = network.copy()
    Trainer(network, "softmax_cross_entropy", LBFGS(1e3, line_search=line_search)).fit(X, y, epochs=1)
    assert (network.flat != fresh.flat).any()
    fresh.flat[...] = network.flat
    fresh.forward(X)
    for name, values in network.statistics.items():
        np.testing.assert_allclose(values, fresh.statistics[name], rtol=1e-12)


def test_dropout_and_augmentation_hold_still_within_an_iteration():
    """Otherwise the search would compare different functions, and fail now and then."""
    X, y = labels()
    network = Network([Dense(16, "tanh", dropout=0.3), Dense(3)], n_features=4, seed=3, dtype="float64")
    trainer = Trainer(network, "softmax_cross_entropy", "lbfgs", augment=GaussianNoise(0.3))
    moved = []

    class Watch(Callback):
        def on_step_end(self, trainer, loss):
            moved.append(trainer.optimizer._bound.states["s"][0].any())

    losses = trainer.fit(X, y, epochs=15, callbacks=[Watch()])["loss"]
    assert all(moved) and losses[-1] < 0.8 * losses[0]


def test_the_loss_of_history_has_no_penalty():
    X, y = labels()
    network = Network([Dense(3)], n_features=4, seed=3)
    before = Loss("softmax_cross_entropy")(network.logits(X), y)[0]
    history = Trainer(network, "softmax_cross_entropy", LBFGS(l1=5.0, l2=5.0)).fit(X, y, epochs=1)
    assert history["loss"] == [pytest.approx(before, rel=1e-6)]


def test_a_diverged_network_raises():
    X, y = labels()
    network = Network([Dense(6), Dense(1)], n_features=4, seed=3)
    trainer = Trainer(network, "squared_error", LBFGS(1e30, line_search=False))
    with pytest.raises(
        DivergedError, match=r"at step 1 of epoch 2 with learning rate 1e\+30; try a smaller learning rate"
    ):
        trainer.fit(X, y.astype(float), epochs=5)


def test_a_stopped_model_has_no_more_loss():
    """As with the other optimizers: NaN in history, its weights as they were."""
    X, y = labels()
    fleet = Network([Dense(6, "tanh"), Dense(3)], n_features=4, models=2, seed=[3, 4])

    class StopFirst(Callback):
        def on_epoch_end(self, trainer, record):
            self.at = fleet.flat[0].copy() if record["epoch"] == 2 else self.at if record["epoch"] > 2 else None
            return np.array([record["epoch"] == 2, False])

    stop = StopFirst()
    losses = np.array(
        Trainer(fleet, "softmax_cross_entropy", LBFGS(l2=0.1)).fit(X, y, epochs=6, callbacks=[stop])["loss"]
    )
    assert np.isnan(losses[2:, 0]).all() and np.isfinite(losses[:2, 0]).all() and np.isfinite(losses[:, 1]).all()
    np.testing.assert_array_equal(fleet.flat[0], stop.at)
    assert fleet.steps.tolist() == [2, 6]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [dict(weight_decay=0.1), dict(clip_norm=1.0), dict(clip_value=1.0)])
def test_what_would_break_the_line_search_is_refused(option):
    with pytest.raises(
        ValueError, match="L-BFGS takes l1 and l2; weight_decay, clip_norm and clip_value would break its line"
    ):
        LBFGS(**option)


@pytest.mark.parametrize("name", ["history", "max_evaluations"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "10", [3, 4]])
def test_counts_are_integers(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.* must be an integer of at least 1$"):
        LBFGS(**{name: value})
    assert getattr(LBFGS(**{name: np.int64(1)}), name) == 1


def test_step_needs_evaluate():
    with pytest.raises(ValueError, match=r"several times a step: call step\(network, evaluate=function\)"):
        LBFGS().step(Network([Dense(1)], n_features=2))
