"""kernels/optimizers.cu against gpumlp/optimizers.py and optimizer_state.py: every rule, all before it, whole steps."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from emulator import EmulatedRuntime, launch, on_device

from gpumlp.averaging import WeightAverage
from gpumlp.backends.device import DeviceArray, bf16_to_float32, float32_to_bf16
from gpumlp.backends.kernel_source import instances, kernel_path
from gpumlp.backends.numpy_backend import NumpyBackend
from gpumlp.optimizer_state import OptimizerState
from gpumlp.optimizers import OPTIMIZERS, SGD, Adam, AdamW

SOURCE = kernel_path("optimizers.cu").read_text(encoding="utf-8")
RULES = {  # name: states, coefficients
    name: (int(states), int(coefficients))
    for name, states, coefficients in re.findall(
        r"struct (\w+) \{\s+static constexpr int states = (\d+), coefficients = (\d+);", SOURCE
    )
}
MODELS, N, N_WEIGHTS = 3, 1003, 701
TO_16 = 16 - N % 16
DTYPES = {"f32": np.float32, "f64": np.float64}
TOLERANCES = {"f32": 1e-5, "f64": 1e-12}
# Every first-order row, SGD in each of its forms; each hyper-parameter once a number and once one for each model.
FORMS = {name: row for name, row in OPTIMIZERS.items() if not row.full_batch} | {
    "heavy_ball": lambda **given: SGD(**({"momentum": 0.9} | given)),
    "nesterov": lambda **given: SGD(**({"momentum": 0.8, "nesterov": True} | given)),
}
PER_MODEL = {
    "learning_rate": [0.1, 0.01, 0.001],
    "momentum": [0.5, 0.9, 0.99],
    "rho": [0.5, 0.9, 0.99],
    "beta1": [0.5, 0.9, 0.95],
    "beta2": [0.9, 0.99, 0.999],
    "epsilon": [1e-4, 1e-6, 1e-8],
    "momentum_decay": [1e-3, 4e-3, 0.1],
    "l1": [0.0, 1e-3, 0.1],
    "l2": [0.0, 1e-2, 0.1],
    "weight_decay": [0.0, 0.1, 1.0],
    "clip_norm": [0.5, 100.0, 3.0],
    "clip_value": [0.3, 1.0, 100.0],
}
every_form = pytest.mark.parametrize("form", FORMS)
every_type = pytest.mark.parametrize("type", DTYPES)


# --- what the tests are made of


class Twins:
    """The same optimizer on the same numbers twice: by NumPy and by the kernels.

    On the device the models lie ``gap`` elements apart; w, g, the shadow and the states begin ``offsets`` elements
    behind 256 bytes; everything else there is NaN.
    """

    def __init__(
        self, optimizer, type="f32", models=MODELS, n=N, n_weights=N_WEIGHTS, *, gap=0, offsets=(0, 0, 0, 0, 0),
        schedule=0, grid=(2, 2), norm_grid=(3, 2)
    ):  # fmt: skip
        self.optimizer, self.type, self.shape, self.n_weights = optimizer, type, (models, n), n_weights
        self.grid, self.norm_grid, self.stride, self.runtime = grid, norm_grid, n + gap, EmulatedRuntime(schedule)
        self.rng = np.random.default_rng(5)
        w = self.rng.standard_normal(self.shape).astype(DTYPES[type])
        w[:, ::7] = 0  # l1 does nothing there
        self.network = SimpleNamespace(
            flat=w, flat_gradient=np.zeros_like(w), models=models, n_weights=n_weights, dtype=w.dtype,
            backend=NumpyBackend()
        )  # fmt: skip
        self.state = OptimizerState(optimizer, self.network)
        of_w, of_g, of_shadow, *of_states = offsets
        self.w, self.g, self.shadow = self.put(w, of_w), self.put(w, of_g), self.put(w, of_shadow, "bf16")
        self.buffers = [self.put(np.zeros_like(w), o) for o, _ in zip(of_states, optimizer.states, strict=False)]

    def put(self, values, offset, type=None):
        store = DeviceArray.empty(self.runtime, (offset + len(values) * self.stride,), type or self.type)
        array = store[offset:].reshape(len(values), self.stride)[:, : values.shape[1]]
        array[...] = values
        return array

    def numbers(self, values):
        """A hyper-parameter, (models,) on the device; None where it is not asked for."""
        if values is None or not np.any(values):
            return None
        return on_device(self.runtime, np.resize(np.asarray(values, self.network.dtype), self.shape[0]))

    def step(self, gradient=None, valid=None, ok=None):
        """One step on both sides with a gradient that both know, by default of sizes from 0.001 to 1."""
        models, n = self.shape
        if gradient is None:
            gradient = self.rng.standard_normal(self.shape) * 10.0 ** self.rng.integers(-3, 1, self.shape)
        self.network.flat_gradient[...] = self.g[...] = gradient.astype(self.network.dtype)
        self.state.step(slice(0, models), self.optimizer.learning_rate)
        flags = [None if f is None else on_device(self.runtime, np.array(f, np.int32)) for f in (valid, ok)]
        arrays = [self.w, self.g, *[*self.buffers, None, None][:2]]
        sizes = [self.stride, n, self.n_weights]
        arguments = [
            *arrays,
            *sizes,
            *self.coefficients(),
            *self.penalties(),
            *self.limits(),
            self.shadow,
            *flags,
            models,
        ]
        launch(self.runtime, f"update_{self.optimizer.rule}_{self.type}", self.grid, (64,), *arguments)
        return self

    def coefficients(self):
        """Of this step, with NaN behind each row, and the row's length."""
        c = np.pad(self.state.c, ((0, 0), (0, 2)), constant_values=np.nan)
        return on_device(self.runtime, c), c.shape[1]

    def penalties(self):
        shrink = self.state.shrink if self.state.has_decay else None
        return [self.numbers(values) for values in (self.optimizer.l1, self.optimizer.l2, shrink)]

    def limits(self):
        """clip_value, clip_norm, and the parts of the norm with their number."""
        clip_value, clip_norm = self.numbers(self.optimizer.clip_value), self.numbers(self.optimizer.clip_norm)
        if clip_norm is None:
            return clip_value, None, None, 0
        return clip_value, clip_norm, self.gradient_norm(clip_value), self.norm_grid[0]

    def gradient_norm(self, clip_value):
        models, n = self.shape
        parts = DeviceArray.empty(self.runtime, (models, self.norm_grid[0]), self.type)
        arguments = [self.g, self.stride, n, clip_value, parts, models]
        launch(self.runtime, f"gradient_norm_{self.type}", self.norm_grid, (64,), *arguments)
        return parts

    def agree(self):
        tolerance = TOLERANCES[self.type]
        for got, wanted in zip([self.w, *self.buffers], [self.network.flat, *self.state.states.values()], strict=True):
            np.testing.assert_allclose(got.get(), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
        np.testing.assert_array_equal(self.shadow.get(), to_bf16(self.w.get()))

    def bits(self):
        return [array.get() for array in (self.w, *self.buffers, self.shadow)]


def to_bf16(values):
    return bf16_to_float32(float32_to_bf16(values))


def make(form, *, everything=False):
    """The optimizer at its defaults, or with every hyper-parameter different for each model."""
    optimizer = FORMS[form]()
    if not everything:
        return optimizer
    names = [n for n in PER_MODEL if hasattr(optimizer, n) and not (n == "momentum" and form == "sgd")]
    return FORMS[form](**{name: PER_MODEL[name] for name in names})


# --- the table


def test_every_first_order_row_has_its_rule_and_no_rule_is_left_over():
    rules = {name: make(name) for name in FORMS}
    for name, optimizer in rules.items():
        assert optimizer.rule in RULES, f"{name}: the rule {optimizer.rule!r} has no struct in kernels/optimizers.cu"
        assert RULES[optimizer.rule] == (len(optimizer.states), len(optimizer.coefficients(1, 0.1))), name
        for type in DTYPES:
            assert f"update_{optimizer.rule}_{type}" in instances()
    assert {optimizer.rule for optimizer in rules.values()} == set(RULES)
    updates = {name for name in instances() if name.startswith("update_")}
    assert updates == {f"update_{rule}_{type}" for rule in RULES for type in DTYPES}


def test_the_forms_take_every_hyper_parameter_in_turn():
    named = {f for form in FORMS for f in vars(make(form)) if not f.startswith("_")}
    assert named - {"nesterov", "states", "rule", "update"} == set(PER_MODEL)


# --- steps


@every_form
@every_type
def test_steps_agree(form, type):
    twins = Twins(make(form), type)
    for _ in range(6):
        twins.step().agree()


@every_form
@every_type
def test_steps_agree_where_every_model_has_its_own_numbers(form, type):
    twins = Twins(make(form, everything=True), type)
    for _ in range(6):
        twins.step().agree()


@every_form
@pytest.mark.parametrize(
    "given",
    [
        {"l1": 0.1},
        {"l2": 0.1},
        {"weight_decay": 0.5},
        {"clip_value": 0.2},
        {"clip_norm": 0.7},
        {"l1": 0.1, "clip_norm": 0.7},
    ],
    ids=str,
)
def test_each_part_agrees_by_itself(form, given):
    twins = Twins(FORMS[form](**given), "f64")
    for _ in range(3):
        twins.step().agree()


@pytest.mark.parametrize(
    ("n", "n_weights"), [(1, 1), (1, 0), (7, 3), (8, 8), (31, 9), (33, 33), (64, 40), (1000, 996), (1009, 0)]
)
@every_type
def test_any_number_of_parameters_and_weights(n, n_weights, type):
    for form in ("sgd", "heavy_ball", "adam"):
        for models in (1, 3):
            optimizer = FORMS[form](l1=0.1, l2=0.1, weight_decay=0.1, clip_norm=1.0)
            twins = Twins(optimizer, type, models, n, n_weights)
            for _ in range(2):
                twins.step().agree()


@every_form
@pytest.mark.parametrize(
    ("gap", "offsets"),
    [
        (TO_16, [16] * 5),
        (5, [0] * 5),
        (0, [1] * 5),
        (TO_16, [2] * 5),
        *((TO_16, alone) for alone in np.eye(5, dtype=int)),
    ],
)
@every_type
def test_arrays_may_begin_anywhere(form, type, gap, offsets):
    twins = Twins(make(form, everything=True), type, gap=gap, offsets=offsets)
    twins.step().step().agree()
    for array in (twins.w, twins.shadow, *twins.buffers):  # what lies between the models stays as it was: NaN
        whole = DeviceArray(array.memory, array.pointer, (MODELS - 1, twins.stride), (twins.stride, 1), array.type)
        assert np.isnan(whole.get()[:, N:]).all()


@every_form
def test_a_shadow_is_not_needed(form):
    twins, bare = Twins(make(form)), Twins(make(form))
    bare.shadow = None
    np.testing.assert_array_equal(twins.step().w.get(), bare.step().w.get())


@every_form
@pytest.mark.parametrize(
    ("valid", "ok", "left"),
    [([5, 0, 7], None, [1]), (None, [0, 1, 1], [0]), ([5, 0, 7, 9], [0, 1, 1], [0, 1]), ([1, 2, 3], [1, 1, 1], [])],
)
def test_a_model_without_rows_or_with_a_loss_that_is_no_number_stays(form, valid, ok, left):
    twins, free = (Twins(make(form, everything=True)).step() for _ in range(2))
    before, gradient = twins.bits(), np.random.default_rng(6).standard_normal((MODELS, N))
    gradient[left] = np.nan
    twins.step(gradient, valid, ok)
    free.step(gradient)
    for now, earlier, moved in zip(twins.bits(), before, free.bits(), strict=True):
        for m in range(MODELS):
            np.testing.assert_array_equal(now[m], earlier[m] if m in left else moved[m])


# --- before the rule


def test_a_gradient_within_its_limits_is_not_touched():
    free, clipped = Twins(SGD(0.1)), Twins(SGD(0.1, clip_norm=1e6, clip_value=1e6))
    np.testing.assert_array_equal(free.step().w.get(), clipped.step().w.get())


def test_clipping_by_value_comes_before_clipping_by_norm():
    gradient = np.zeros((1, 16))
    gradient[0, :2] = 100.0, -1.0
    twins = Twins(SGD(1.0, clip_value=3.0, clip_norm=1.0), "f64", 1, 16, 16)
    before = twins.w.get()
    moved = before - twins.step(gradient).w.get()
    np.testing.assert_allclose(moved[0, :2], [3 / np.sqrt(10), -1 / np.sqrt(10)])


def test_penalties_and_decay_spare_what_is_behind_the_weights():
    twins = Twins(SGD(0.1, l1=1.0, l2=1.0, weight_decay=1.0))
    before = twins.w.get()
    after = twins.step(np.zeros((MODELS, N))).w.get()
    np.testing.assert_array_equal(after[:, N_WEIGHTS:], before[:, N_WEIGHTS:])
    own = before[:, :N_WEIGHTS]
    np.testing.assert_array_equal(after[:, :N_WEIGHTS] == own, own == 0)


@every_form
def test_nan_in_a_gradient_reaches_that_models_parameters(form):
    """Nothing hides it: a clipped norm of NaN spreads it over the model, as in NumPy."""
    for given in ({}, {"clip_value": 1.0}, {"clip_norm": 1.0}):
        twins, gradient = Twins(FORMS[form](**given)), np.random.default_rng(6).standard_normal((MODELS, N))
        gradient[1, 5] = np.nan
        got = twins.step(gradient).w.get()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(twins.network.flat))
        assert np.isnan(got[1, 5]) and np.isfinite(got[[0, 2]]).all()


@every_type
@pytest.mark.parametrize("n", [1, 8, 31, 1003])
@pytest.mark.parametrize("models", [1, 3])
def test_the_parts_of_a_norm_add_up(type, n, models):
    for clip_value, grid in [(None, (1, 1)), (0.5, (1, 3)), (None, (2, 1)), ([0.1, 0.5, 9.0][:models], (37, 2))]:
        twins = Twins(SGD(), type, models, n, 0, norm_grid=grid)
        g = np.random.default_rng(7).standard_normal((models, n)).astype(DTYPES[type])
        twins.g[...] = g
        limit = np.inf if clip_value is None else np.reshape(clip_value, (-1, 1))
        got = twins.gradient_norm(twins.numbers(clip_value)).get()
        np.testing.assert_allclose(got.sum(axis=1), np.square(np.clip(g, -limit, limit)).sum(axis=1), rtol=1e-5)


@every_type
@pytest.mark.parametrize(("l1", "l2"), [([0.0, 0.1, 1.0], None), (None, 0.3), (0.2, [0.1, 0.2, 0.3]), (None, None)])
@pytest.mark.parametrize(
    ("gap", "offsets"), [(TO_16, [0] * 5), (5, [3] * 5), *((TO_16, alone) for alone in np.eye(2, 5, dtype=int))]
)
def test_penalties_alone_agree(type, l1, l2, gap, offsets):
    for n_weights in (0, 1, 8, N_WEIGHTS):
        twins = Twins(SGD(l1=l1 or 0.0, l2=l2 or 0.0), type, n_weights=n_weights, gap=gap, offsets=offsets)
        g = np.random.default_rng(8).standard_normal(twins.shape).astype(DTYPES[type])
        state, wanted, own = twins.state, g.copy(), np.s_[:, :n_weights]
        w = twins.network.flat[own]
        state.regularise(w, wanted[own], np.empty_like(w), state.l1, state.l2, 1)
        sizes, penalties = [twins.stride, n_weights], [twins.numbers(l1), twins.numbers(l2)]
        for schedule in (0, 1):
            twins.runtime.schedule, twins.g[...] = schedule, g
            arguments = [twins.g, twins.w, *sizes, *penalties, MODELS]
            launch(twins.runtime, f"penalize_{type}", (2, 2), (64,), *arguments)
            np.testing.assert_allclose(twins.g.get(), wanted, rtol=TOLERANCES[type], atol=TOLERANCES[type])


# --- averages


class Averages:
    """The same averages of the same weights twice: by NumPy and by the kernel; on the device as ``Twins`` puts them."""

    def __init__(self, type="f32", models=MODELS, n=N, *, gap=0, offsets=(0, 0), schedule=0, grid=(2, 2)):
        self.twins = twins = Twins(SGD(), type, models, n, gap=gap, schedule=schedule)
        twins.network.statistics, twins.network.copy_weights = {}, lambda into, models: None
        self.host = WeightAverage(twins.network, np.linspace(0.5, 0.99, models))
        self.type, self.grid, of_mean, self.of_w = type, grid, *offsets
        self.mean, self.rest = twins.put(self.host.averages["flat"], of_mean), on_device(twins.runtime, self.host.rest)

    def move(self, w=None, valid=None, ok=None):
        """One move on both sides, on the host of every model."""
        twins, (models, n) = self.twins, self.twins.shape
        twins.network.flat[...] = twins.rng.standard_normal(twins.shape) if w is None else w
        NumpyBackend().average(self.host, slice(0, models))
        flags = [None if f is None else on_device(twins.runtime, np.array(f, np.int32)) for f in (valid, ok)]
        arguments = [self.mean, twins.put(twins.network.flat, self.of_w), twins.stride, n, self.rest, *flags, models]
        launch(twins.runtime, f"average_{self.type}", self.grid, (64,), *arguments)
        return self

    def agree(self):
        wanted, tolerance = self.host.averages["flat"], TOLERANCES[self.type]
        np.testing.assert_allclose(self.mean.get(), wanted, rtol=tolerance, atol=tolerance)


@every_type
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("n", [1, 7, 8, 31, 64, 1003])
def test_averages_agree(n, models, type):
    averages = Averages(type, models, n)
    for _ in range(4):
        averages.move().agree()


@every_type
@pytest.mark.parametrize(
    ("gap", "offsets"), [(TO_16, (16, 16)), (5, (0, 0)), (0, (1, 1)), (TO_16, (2, 0)), (TO_16, (0, 3))]
)
def test_averages_may_lie_anywhere(gap, offsets, type):
    averages = Averages(type, gap=gap, offsets=offsets)
    averages.move().move().agree()
    stride = averages.twins.stride
    whole = DeviceArray(averages.mean.memory, averages.mean.pointer, (MODELS - 1, stride), (stride, 1), type)
    assert np.isnan(whole.get()[:, N:]).all()


@pytest.mark.parametrize(
    ("valid", "ok", "left"),
    [([5, 0, 7], None, [1]), (None, [0, 1, 1], [0]), ([5, 0, 7, 9], [0, 1, 1], [0, 1]), ([1, 2, 3], [1, 1, 1], [])],
)
def test_the_average_of_a_model_that_made_no_step_stays(valid, ok, left):
    averages, free = Averages().move(), Averages().move()
    before, w = averages.mean.get(), np.random.default_rng(6).standard_normal((MODELS, N))
    w[left] = np.nan
    now, moved = averages.move(w, valid, ok).mean.get(), free.move(w).mean.get()
    for m in range(MODELS):
        np.testing.assert_array_equal(now[m], before[m] if m in left else moved[m])


def test_neither_the_grid_nor_the_schedule_changes_a_bit_of_an_average():
    wanted = Averages().move().move().mean.get()
    for given in [{"grid": (1, 1)}, {"grid": (5, 3)}, *({"schedule": s} for s in (1, 2, 3))]:
        np.testing.assert_array_equal(Averages(**given).move().move().mean.get(), wanted)


# --- the order of sums


@every_form
def test_neither_the_grid_nor_the_schedule_changes_a_bit(form):
    def bits(**given):
        return Twins(make(form, everything=True), **given).step().step().bits()

    wanted = bits()
    changes = [{"grid": (1, 1)}, {"grid": (5, 3)}, *({"schedule": s} for s in (1, 2, 3))]
    for given in changes:
        for got, expected in zip(bits(**given), wanted, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_a_clipped_step_takes_any_number_of_parts():
    for norm_grid in [(1, 1), (63, 3), (64, 1), (65, 2), (130, 1)]:
        twins = Twins(Adam(clip_norm=0.5), "f64", norm_grid=norm_grid)
        twins.step().step().agree()


def test_decay_is_decoupled():
    """AdamW is the rule of Adam with a shrink, and moves parameters differently."""
    assert AdamW().rule == Adam().rule
    free, decayed = Twins(Adam(weight_decay=0.0)).step(), Twins(AdamW(weight_decay=0.5)).step()
    np.testing.assert_array_equal(decayed.buffers[0].get(), free.buffers[0].get())
    assert (decayed.w.get() != free.w.get())[:, :N_WEIGHTS].any()
