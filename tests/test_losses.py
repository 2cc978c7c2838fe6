"""The table of losses: derivatives, weights, stability, what users call, and agreement with torch."""

import warnings

import numpy as np
import pytest

from gpumlp.data.checks import TARGET_KINDS
from gpumlp.losses import LOSSES, Loss, LossRow, get_loss, output_values, over_outputs, weighted_mean
from gpumlp.metrics import METRICS

MODELS, BATCH, OUTPUTS = 2, 5, 3
# Further values of an option, beside its default; a row with an option of another name is tested at its default.
OPTIONS = {
    "delta": [0.3, 2.5],
    "quantile": [0.1, [0.2, 0.5, 0.9]],  # one for all, one for each output
    "label_smoothing": [0.1, [0.0, 0.3]],  # one for all, one for each model
}
CASES = [
    (name, options)
    for name, row in LOSSES.items()
    for options in [{}, *({key: value} for key in row.options for value in OPTIONS.get(key, []))]
]
every_row = pytest.mark.parametrize("name", LOSSES)
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
both_dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)], ids=["f32", "f64"]
)


def logits(dtype=np.float64, shape=(MODELS, BATCH, OUTPUTS), seed=0):
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def targets(kind, shape=(1, BATCH, OUTPUTS), dtype=np.float64, seed=1):
    """All forms of targets that a kind of loss takes, (1, batch[, outputs]): labels, hard and soft."""
    rng = np.random.default_rng(seed)
    if kind == "values":
        return [rng.standard_normal(shape).astype(dtype)]
    if kind == "counts":
        return [rng.poisson(2.0, shape).astype(dtype)]
    soft = rng.random(shape).astype(dtype)
    if kind == "binary":
        return [(soft > 0.5).astype(dtype), soft]
    assert kind == "labels or probabilities", f"write targets for {kind!r} here"
    return [rng.integers(0, shape[-1], shape[:-1]), soft / soft.sum(axis=-1, keepdims=True)]


def samples(loss, z, y):
    """Losses (models, batch) and their derivative by z."""
    dz = np.full_like(z, np.nan)
    return loss.f(z, y, dz), dz


# --- the rows


@every_row
def test_a_row_names_what_exists(name):
    row = LOSSES[name]
    assert row.name == name
    assert row.targets in TARGET_KINDS and row.metric in METRICS and row.source
    assert row.is_classifier == (row.output in ("sigmoid", "softmax"))
    assert output_values(logits(), row.output).shape == (MODELS, BATCH, OUTPUTS)


@every_case
def test_derivative_is_the_central_difference(name, options):
    loss, z, h = Loss(name, **options), logits(), 1e-6
    for y in targets(loss.row.targets):
        _, dz = samples(loss, z, y)
        for k in range(OUTPUTS):  # samples do not know each other: one output of all is moved at once
            step = np.zeros(OUTPUTS)
            step[k] = h
            slope = (samples(loss, z + step, y)[0] - samples(loss, z - step, y)[0]) / (2 * h)
            np.testing.assert_allclose(dz[..., k], slope, rtol=1e-7, atol=1e-9)


@pytest.mark.peer
@every_case
@both_dtypes
def test_values_and_derivative_are_torchs(name, options, dtype, tolerance):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    ours, z = Loss(name, **options), logits(dtype)

    def smoothed(y, i, rest):
        e = np.broadcast_to(options.get("label_smoothing", 0.0), MODELS)[i]
        return (1 - e) * y + e * rest

    def pinball(z, y, i):
        e, q = y - z, torch.tensor(options.get("quantile", 0.5), dtype=z.dtype)
        return torch.where(e > 0, q * e, (q - 1) * e)

    def cross_entropy(z, y, i):
        e = float(np.broadcast_to(options.get("label_smoothing", 0.0), MODELS)[i])
        return F.cross_entropy(z, y, label_smoothing=e, reduction="none")

    twins = {  # (z, y, model) -> losses (batch,) or (batch, outputs)
        "squared_error": lambda z, y, i: F.mse_loss(z, y, reduction="none"),
        "absolute_error": lambda z, y, i: F.l1_loss(z, y, reduction="none"),
        "huber": lambda z, y, i: F.huber_loss(z, y, reduction="none", delta=options.get("delta", 1.0)),
        "quantile": pinball,
        "poisson": lambda z, y, i: F.poisson_nll_loss(z, y, log_input=True, reduction="none"),
        "binary_cross_entropy": lambda z, y, i: F.binary_cross_entropy_with_logits(
            z, smoothed(y, i, 0.5), reduction="none"
        ),
        "softmax_cross_entropy": cross_entropy,
    }
    for y in targets(ours.row.targets, dtype=dtype):
        values, dz = samples(ours, z, y)
        for i in range(MODELS):
            z_torch = torch.tensor(z[i], requires_grad=True)
            theirs = twins[name](z_torch, torch.tensor(y[0]), i)
            theirs = theirs.mean(dim=1) if theirs.ndim == 2 else theirs
            theirs.sum().backward()
            np.testing.assert_allclose(values[i], theirs.detach(), rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(dz[i], z_torch.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.peer
@both_dtypes
def test_class_weights_are_torchs(dtype, tolerance):
    torch = pytest.importorskip("torch")
    weight, z, y = [0.5, 2.0, 1.25], logits(dtype)[0], targets("labels or probabilities")[0][0]
    value, dz = Loss("softmax_cross_entropy", class_weight=weight)(z, y)
    z_torch = torch.tensor(z, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        z_torch, torch.tensor(y), weight=torch.tensor(weight, dtype=z_torch.dtype)
    )
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=tolerance)
    np.testing.assert_allclose(dz, z_torch.grad, rtol=tolerance, atol=tolerance)


def test_each_formula_by_hand():
    """Numbers worked out on paper: the factors (no one half, mean over outputs) stand in the docstrings."""
    z, y = np.array([[[1.0, -2.0]]]), np.array([[[3.0, -2.5]]])
    by_hand = {  # errors z - y: -2 and 0.5
        "squared_error": ((4 + 0.25) / 2, [-2.0, 0.5]),
        "absolute_error": ((2 + 0.5) / 2, [-0.5, 0.5]),
        "huber": ((1.5 + 0.125) / 2, [-0.5, 0.25]),
        "quantile": ((0.5 * 2 + 0.5 * 0.5) / 2, [-0.25, 0.25]),
    }
    for name, (value, slope) in by_hand.items():
        values, dz = samples(Loss(name), z, y)
        np.testing.assert_allclose(values, [[value]], err_msg=name)
        np.testing.assert_allclose(dz, [[slope]], err_msg=name)
    value, dz = Loss("poisson")(np.array([[np.log(2.0)]]), [[3.0]])
    assert value == pytest.approx(2 - 3 * np.log(2)) and dz == pytest.approx(-1.0)
    value, dz = Loss("binary_cross_entropy")(np.array([[0.0]]), [1])
    assert value == pytest.approx(np.log(2)) and dz == pytest.approx(-0.5)
    value, dz = Loss("softmax_cross_entropy")(np.zeros((1, 4)), [2])
    assert value == pytest.approx(np.log(4))
    np.testing.assert_allclose(dz, [[0.25, 0.25, -0.75, 0.25]])


@pytest.mark.parametrize(
    ("name", "options", "error", "slopes"),
    [  # the error z - y where the row bends: derivative left of it, at it, right of it
        ("absolute_error", {}, 0.0, (-1.0, 0.0, 1.0)),
        ("quantile", {"quantile": 0.2}, 0.0, (-0.2, 0.0, 0.8)),
        ("huber", {"delta": 0.5}, 0.5, (0.5, 0.5, 0.5)),
        ("huber", {"delta": 0.5}, -0.5, (-0.5, -0.5, -0.5)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_sides_of_each_kink_and_the_kink_itself(name, options, error, slopes, dtype):
    z = np.array([error - 1e-6, error, error + 1e-6], dtype).reshape(1, 3, 1)
    _, dz = samples(Loss(name, **options), z, np.zeros_like(z))
    np.testing.assert_allclose(dz[0, :, 0], slopes, atol=2e-6)


@every_case
def test_large_logits_in_float32_neither_overflow_nor_warn(name, options):
    z = np.array([-1e4, -200, -89, -1, 0, 1, 89, 200, 1e4, 9.9e3], np.float32)
    z = np.stack([np.roll(z, shift) for shift in range(OUTPUTS)], axis=-1)[None].repeat(MODELS, axis=0)
    z = np.ascontiguousarray(np.concatenate([z, np.full_like(z, 1e4)], axis=1))  # rows of large numbers alone, too
    loss = Loss(name, **options)
    for y in targets(loss.row.targets, (1, z.shape[1], OUTPUTS), np.float32):
        with warnings.catch_warnings(), np.errstate(over="raise", divide="raise", invalid="raise"):
            warnings.simplefilter("error")
            values, dz = samples(loss, z, y)
            mean, _ = loss(z, y[0])
            assert np.isfinite(output_values(z, loss.row.output)).all()
        assert values.dtype == dz.dtype == np.float32
        assert np.isfinite(values).all() and np.isfinite(dz).all() and np.isfinite(mean).all()
        exact, exact_dz = samples(loss, z.astype(np.float64), y if y.dtype.kind == "i" else y.astype(np.float64))
        np.testing.assert_allclose(values, exact, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(dz, exact_dz, rtol=1e-5, atol=1e-6)


@every_row
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_passes_in_value_and_derivative(name, dtype):
    loss, z = Loss(name), logits(dtype)
    z[0, 2, 1] = np.nan
    for y in targets(loss.row.targets, dtype=dtype):
        values, dz = samples(loss, z, y)
        np.testing.assert_array_equal(np.argwhere(np.isnan(values)), [[0, 2]])
        assert np.isnan(dz[0, 2, 1])
        assert np.isnan(dz).sum() in (1, OUTPUTS)  # softmax joins the outputs of a sample, nothing joins samples
        assert np.isnan(loss(z, y[0])[0]).tolist() == [True, False]


# --- weights and means


def random_weight(seed=3, shape=(BATCH,)):
    return np.random.default_rng(seed).uniform(0.2, 3.0, shape)


@every_case
def test_weighted_mean_and_its_gradient(name, options):
    """One direction through all logits, against the sum Σ w l / Σ w written out."""
    loss, z, weight, h = Loss(name, **options), logits(), random_weight(), 1e-6
    direction = logits(seed=9)
    for y in targets(loss.row.targets):
        value, dz = loss(z, y[0], weight)
        expected = (samples(loss, z, y)[0] * weight).sum(axis=1) / weight.sum()
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        slope = (loss(z + h * direction, y[0], weight)[0] - loss(z - h * direction, y[0], weight)[0]) / (2 * h)
        np.testing.assert_allclose((dz * direction).sum(axis=(1, 2)), slope, rtol=1e-6, atol=1e-9)


@every_row
def test_a_weight_is_a_number_of_repetitions(name):
    loss, z, times = Loss(name), logits()[0], np.array([1, 3, 0, 2, 1])
    for y in targets(loss.row.targets):
        value, dz = loss(z, y[0], times)
        repeated, dz_repeated = loss(np.repeat(z, times, axis=0), np.repeat(y[0], times, axis=0))
        assert value == pytest.approx(repeated, rel=1e-12)
        starts = np.cumsum(times) - times
        np.testing.assert_allclose(dz[times > 0], times[times > 0, None] * dz_repeated[starts[times > 0]], rtol=1e-12)
        assert not dz[times == 0].any()


def test_zero_total_weight_gives_no_loss_and_no_gradient():
    rows, dz = np.ones((2, 3), np.float32), np.ones((2, 3, 4), np.float32)
    loss = weighted_mean(rows, np.array([[0, 0, 0], [0, 1, 3]], np.float32), dz)
    np.testing.assert_array_equal(loss, [0, 1])
    assert loss.dtype == np.float64 and dz.dtype == np.float32
    np.testing.assert_array_equal(dz[..., 0], [[0, 0, 0], [0, 0.25, 0.75]])


@pytest.mark.parametrize("shape", [(1, 3), (2, 3)])
def test_weights_are_shared_or_one_row_for_each_model(shape):
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    expected = np.average(rows, axis=1, weights=np.broadcast_to(weight, (2, 3)))
    np.testing.assert_allclose(weighted_mean(rows, weight, np.ones((2, 3, 1), np.float32)), expected, rtol=1e-6)


CLASS_WEIGHTS = {
    "array": ([0.5, 2.0, 1.25], [0.5, 2.0, 1.25]),
    "dict": ({2: 4.0}, [1.0, 1.0, 4.0]),
    "dict of numpy integers": ({np.int64(0): 0.0, np.int64(1): 2.0}, [0.0, 2.0, 1.0]),
    "balanced": ("balanced", [6 / (3 * 3), 6 / (3 * 1), 6 / (3 * 2)]),
}


@pytest.mark.parametrize("case", CLASS_WEIGHTS)
def test_class_weight_multiplies_the_weights_of_its_rows(case):
    given, weights = CLASS_WEIGHTS[case]
    y, z = np.array([0, 2, 0, 1, 0, 2]), logits(shape=(6, 3))
    np.testing.assert_allclose(Loss("softmax_cross_entropy", class_weight=given).class_weights(y, 3), weights)
    own = random_weight(shape=(6,))
    value, dz = Loss("softmax_cross_entropy", class_weight=given)(z, y, own)
    expected, dz_expected = Loss("softmax_cross_entropy")(z, y, own * np.array(weights)[y])
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(dz, dz_expected, rtol=1e-12)


@pytest.mark.parametrize("given", [[1.0, 3.0], {1: 3.0}, {True: 3.0}, {1.0: 3.0}], ids=str)
def test_class_weight_of_one_sigmoid_output(given):
    y, z = np.array([0, 1, 1, 0]), logits(shape=(4, 1))
    value, dz = Loss("binary_cross_entropy", class_weight=given)(z, y)
    expected, dz_expected = Loss("binary_cross_entropy")(z, y, 1.0 + 2.0 * y)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(dz, dz_expected, rtol=1e-12)


def test_balanced_does_not_divide_by_an_absent_class():
    weights = Loss("softmax_cross_entropy", class_weight="balanced").class_weights(np.array([0, 0, 2]), 3)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights[[0, 2]], [3 / (3 * 2), 3 / (3 * 1)])


def test_label_smoothing_of_labels_and_of_one_hot_rows_is_one_thing():
    loss, y = Loss("softmax_cross_entropy", label_smoothing=0.2), targets("labels or probabilities")[0][0]
    for a, b in zip(loss(logits(), y), loss(logits(), np.eye(OUTPUTS)[y]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


# --- what users call


@every_case
def test_a_fleets_loss_is_each_models_own(name, options):
    loss, z = Loss(name, **options), logits(np.float32)
    for y in targets(loss.row.targets, (MODELS, BATCH, OUTPUTS), np.float32):
        weight = random_weight(shape=(MODELS, BATCH))
        value, dz = loss(z, y, weight)
        shared, dz_shared = loss(z, y[0], weight[0])
        assert value.shape == shared.shape == (MODELS,) and dz.shape == z.shape and dz.dtype == z.dtype
        for i in range(MODELS):
            alone, dz_alone = loss.for_model(i)(z[i], y[i], weight[i])
            assert isinstance(alone, float) and alone == pytest.approx(value[i], rel=1e-6)
            np.testing.assert_allclose(dz_alone, dz[i], rtol=1e-6)
            alone, dz_alone = loss.for_model(i)(z[i], y[0], weight[0])
            assert alone == pytest.approx(shared[i], rel=1e-6)
            np.testing.assert_allclose(dz_alone, dz_shared[i], rtol=1e-6)


@every_row
def test_a_fleet_of_one_model_takes_targets_with_and_without_its_axis(name):
    loss, z = Loss(name), logits(shape=(1, BATCH, OUTPUTS))
    for y in targets(loss.row.targets):
        np.testing.assert_array_equal(loss(z, y)[1], loss(z, y[0])[1])


def test_shared_targets_are_not_taken_for_one_row_of_each_model():
    """Three models, three rows, three outputs: the shapes of shared targets and of the fleet's rows meet."""
    z, y = logits(shape=(3, 3, 3)), targets("values", (1, 3, 3))[0][0]
    _, dz = Loss("squared_error")(z, y)
    for i in range(3):
        np.testing.assert_array_equal(Loss("squared_error")(z[i], y)[1], dz[i])


@every_row
def test_arguments_stay_as_they_are_and_float64_keeps_its_digits(name):
    loss, z, weight = Loss(name), logits(), random_weight()
    for y in targets(loss.row.targets):
        copies = z.copy(), y.copy(), weight.copy()
        value, _ = loss(z, y[0], weight)
        for array, copy in zip((z, y, weight), copies, strict=True):
            np.testing.assert_array_equal(array, copy)
        np.testing.assert_allclose(value, np.average(samples(loss, z, y)[0], axis=1, weights=weight), rtol=1e-13)


def test_lists_and_integers_are_taken():
    value, dz = Loss("squared_error")([[1], [2]], [3, 2])
    assert value == 2.0
    np.testing.assert_array_equal(dz, [[-2.0], [0.0]])
    value, dz = Loss("softmax_cross_entropy")(np.zeros((1, 2), np.int64), np.array([1.0]))
    np.testing.assert_array_equal(dz, [[0.5, -0.5]])


def test_a_row_of_your_own():
    def cubic(z, y, dz, power=3.0):
        error = z - y
        dz[...] = power * np.abs(error) ** (power - 1) * np.sign(error)
        return (np.abs(error) ** power).sum(axis=-1)

    row = LossRow("cubic", cubic, "values", "identity", "r2", "nowhere", {"power": 3.0})
    value, dz = get_loss(row)(np.array([[2.0, 0.0]]), [[0.0, 1.0]])
    assert value == 9.0
    np.testing.assert_array_equal(dz, [[12.0, -3.0]])
    assert Loss(row, power=2)(np.array([[2.0]]), [0.0])[0] == 4.0


@every_case
def test_described_and_built_again(name, options):
    loss = Loss(name, **options)
    again = Loss(**loss.describe())
    z = logits()
    for y in targets(loss.row.targets):
        np.testing.assert_array_equal(again(z, y[0])[1], loss(z, y[0])[1])
    assert repr(again) == repr(loss) and name in repr(loss)
    assert all(str(key) in repr(loss) for key in options)


def test_repr_tells_losses_apart():
    losses = [Loss("softmax_cross_entropy", class_weight=w) for w in (None, "balanced", [1.0, 2.0], {1: 2.0})]
    assert len({repr(loss) for loss in losses}) == len(losses)


def test_get_loss():
    loss = Loss("huber", delta=2.0)
    assert get_loss(loss) is loss
    assert get_loss("huber").options == {"delta": 1.0}


# --- errors

SOFTMAX, Z, Y = "softmax_cross_entropy", np.zeros((4, 3)), np.array([0, 1, 2, 1])
BUILDING = [
    (lambda: Loss("mse"), r"loss='mse' is unknown; allowed: squared_error, .*softmax_cross_entropy"),
    (lambda: get_loss("mse"), r"loss='mse' is unknown"),
    (lambda: Loss("huber", beta=1), r"loss 'huber' has no option 'beta'; its options: delta"),
    (lambda: Loss("poisson", delta=1), r"loss 'poisson' has no option 'delta'; its options: none"),
    (lambda: Loss("huber", delta=0.0), r"delta=0.0 is out of range: it must lie in \(0, inf\)"),
    (lambda: Loss("huber", delta=np.inf), r"delta=inf is out of range"),
    (lambda: Loss("huber", delta=[1.0, 2.0]), r"delta=\[1.0, 2.0\] must be one number"),
    (lambda: Loss("quantile", quantile=[[0.5]]), r"quantile=\[\[0.5\]\] must be one number, or a list of them"),
    (lambda: Loss("quantile", quantile=1.0), r"quantile=1.0 is out of range: it must lie in \(0, 1\)"),
    (lambda: Loss("quantile", quantile=[0.5, 0.0]), r"quantile=\[0.5, 0.0\] is out of range"),
    (lambda: Loss(SOFTMAX, label_smoothing=1.0), r"label_smoothing=1.0 is out of range: it must lie in \[0, 1\)"),
    (lambda: Loss(SOFTMAX, label_smoothing=[0.1, -0.1]), r"label_smoothing=\[0.1, -0.1\] is out of range"),
    (lambda: Loss(SOFTMAX, label_smoothing=np.nan), r"label_smoothing=nan is out of range"),
    (lambda: Loss(SOFTMAX, label_smoothing="much"), r"label_smoothing='much' is out of range"),
    (lambda: Loss("huber", class_weight=[1, 2]), r"class_weight needs a loss over labels; 'huber' takes values"),
]
CALLING = [
    (lambda: Loss(SOFTMAX)(np.zeros(3), [0]), r"logits have shape \(3,\); expected \(batch, outputs\) or"),
    (lambda: Loss(SOFTMAX)(Z, Y[:3]), r"y has 3 rows, X has 4"),
    (lambda: Loss(SOFTMAX)(Z, Y + 1), r"y\[2\] is 3; labels must be integers in \[0, 3\)"),
    (lambda: Loss("squared_error")(Z, np.zeros((4, 2))), r"y has shape \(4, 2\); expected \(4, 3\)"),
    (lambda: Loss("poisson")(Z, -np.ones((4, 3))), r"y\[0, 0\] is -1.0; counts must be >= 0"),
    (lambda: Loss("binary_cross_entropy")(Z, 2 * np.ones((4, 3))), r"y\[0, 0\] is 2.0; probabilities must be"),
    (lambda: Loss(SOFTMAX)(Z, Y, np.ones(3)), r"sample_weight has shape \(3,\); expected one weight per sample"),
    (lambda: Loss(SOFTMAX)(Z, Y, -np.ones(4)), r"sample_weight\[0\] is -1.0; weights must be >= 0"),
    (lambda: Loss(SOFTMAX)(Z, Y, np.ones((2, 4))), r"sample_weight has shape \(2, 4\); expected \(4,\)"),
    (lambda: Loss(SOFTMAX)(np.zeros((3, 4, 3)), Y, np.ones((2, 4))), r"shape \(2, 4\); expected \(4,\) or \(3, 4\)"),
    (lambda: Loss(SOFTMAX, label_smoothing=[0, 0.1])(Z, Y), r"label_smoothing has 2 values for 1 model; give one"),
    (lambda: Loss("quantile", quantile=[0.1, 0.9])(Z, Z), r"quantile has 2 values for 3 outputs; give one number"),
    (lambda: Loss(SOFTMAX, class_weight="even")(Z, Y), r"class_weight='even' is unknown; allowed: 'balanced'"),
    (lambda: Loss(SOFTMAX, class_weight={3: 1.0})(Z, Y), r"class_weight names label 3; labels are 0 to 2"),
    (lambda: Loss(SOFTMAX, class_weight={"cat": 1.0})(Z, Y), r"class_weight names label 'cat'; labels are 0 to 2"),
    (lambda: Loss(SOFTMAX, class_weight=[1, 2])(Z, Y), r"class_weight has shape \(2,\); it needs one number for each"),
    (lambda: Loss(SOFTMAX, class_weight=[1, -2, 1])(Z, Y), r"weights must be finite, not negative and not all zero"),
    (lambda: Loss(SOFTMAX, class_weight=[1, np.inf, 1])(Z, Y), r"weights must be finite"),
    (lambda: Loss(SOFTMAX, class_weight={0: 0, 1: 0, 2: 0})(Z, Y), r"not all zero"),
    (lambda: Loss(SOFTMAX, class_weight=[1, 2, 3])(Z, np.eye(3)[Y]), r"class_weight needs labels: give y as labels"),
    (lambda: Loss("binary_cross_entropy", class_weight=[1, 2, 3])(Z, Z), r"class_weight needs labels"),
]


@pytest.mark.parametrize(("call", "message"), BUILDING + CALLING, ids=[m[:40] for _, m in BUILDING + CALLING])
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_short_batch_of_a_fleet_is_no_contiguous_array():
    """The last batch of an epoch is a view of larger buffers: what is written has to arrive there."""
    row = LOSSES["softmax_cross_entropy"]
    z, dz = np.random.default_rng(0).standard_normal((2, 3, 7, 4))
    y = np.arange(15).reshape(3, 5) % 4
    np.testing.assert_array_equal(
        row.f(z[:, :5], y, dz[:, :5]), row.f(z[:, :5].copy(), y, expected := np.empty((3, 5, 4)))
    )
    np.testing.assert_array_equal(dz[:, :5], expected)


@pytest.mark.parametrize("outputs", [2, 9, 20, 33])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_sums_over_outputs_are_the_same_alone_and_in_a_fleet(rows, outputs):
    z = np.random.default_rng(0).normal(size=(3, rows, outputs)).astype(np.float32)
    for ufunc in (np.add, np.maximum):
        together = over_outputs(ufunc, z)
        np.testing.assert_allclose(together[..., 0], ufunc.reduce(z, axis=-1), atol=1e-5)
        for i in range(3):
            np.testing.assert_array_equal(over_outputs(ufunc, z[i : i + 1]), together[i : i + 1])
