"""The table of activations: derivatives, kinks, dtypes, aliasing, stability, and agreement with torch."""

import copy
import math
import pickle

import numpy as np
import pytest

from gpumlp.activations import ACTIVATIONS, Activation, get_activation, normal_cdf

# Where a row bends, the slope on each side and the documented slope at the bend itself.
KINKS = {
    "relu": [(0.0, 0.0, 1.0, 0.0)],
    "leaky_relu": [(0.0, 0.01, 1.0, 0.01)],
    "leaky_relu(0.2)": [(0.0, 0.2, 1.0, 0.2)],
    "elu(0.5)": [(0.0, 0.5, 1.0, 0.5)],
    "selu": [(0.0, 1.7580993408473766, 1.0507009873554805, 1.7580993408473766)],
    "hard_sigmoid": [(-3.0, 0.0, 1 / 6, 0.0), (3.0, 1 / 6, 0.0, 0.0)],
    "hard_tanh": [(-1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0)],
    "hard_silu": [(-3.0, 0.0, -0.5, 0.0), (3.0, 1.5, 1.0, 1.0)],
    "relu6": [(0.0, 0.0, 1.0, 0.0), (6.0, 1.0, 0.0, 0.0)],
}
SPECS = [*ACTIVATIONS, "leaky_relu(0.2)", "elu(0.5)"]
DTYPES = [np.float32, np.float64]
every_row = pytest.mark.parametrize("spec", SPECS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def sample(dtype=np.float64):
    z = np.random.default_rng(5).normal(0.0, 4.0, 347).astype(dtype)
    ends = [0.0, -0.0, 1e-3, -1e-3, 20.0, -20.0, 90.0, -90.0, 800.0, -800.0, 1e4, -1e4]
    return np.concatenate([z, np.array(ends, dtype)])


@every_row
def test_derivative_is_the_central_difference(spec):
    row = get_activation(spec)
    h = 1e-6
    z = np.linspace(-8.0, 8.0, 1601) + 1e-4  # no point within h of a kink
    slope = (row.f(z + h) - row.f(z - h)) / (2 * h)
    np.testing.assert_allclose(row.f_grad(z, row.f(z)), slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("spec", KINKS)
@both_dtypes
def test_both_sides_of_each_kink_and_the_kink_itself(spec, dtype):
    row = get_activation(spec)
    for kink, left, right, at in KINKS[spec]:
        z = np.array([kink - 1e-5, kink, kink + 1e-5], dtype)
        np.testing.assert_allclose(row.f_grad(z, row.f(z)), [left, at, right], atol=2e-5)


def test_no_kink_is_forgotten():
    """A row not in KINKS has no jump in its derivative, so the two sides of every integer agree."""
    z = np.arange(-8.0, 9.0)
    for spec in set(SPECS) - set(KINKS):
        row = get_activation(spec)
        left, right = (row.f_grad(x, row.f(x)) for x in (z - 1e-7, z + 1e-7))
        np.testing.assert_allclose(left, right, atol=1e-6, err_msg=spec)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_gradient_is_one_for_the_smallest_number(dtype):
    tiny = np.nextafter(dtype(0), dtype(1), dtype=dtype)
    a = get_activation("relu").f(np.array([-tiny, 0.0, tiny], dtype))
    np.testing.assert_array_equal(a, np.array([0.0, 0.0, tiny], dtype))
    np.testing.assert_array_equal(get_activation("relu").f_grad(a, a), [0, 0, 1])


@every_row
@both_dtypes
def test_dtype_and_shape_are_kept(spec, dtype):
    row = get_activation(spec)
    for shape in [(2, 3, 5), (4,), (), (0,)]:
        z = np.full(shape, 0.7, dtype)
        a = row.f(z)
        slope = row.f_grad(z, a)
        assert a.dtype == slope.dtype == dtype
        assert a.shape == slope.shape == shape


@every_row
@both_dtypes
def test_out_is_used_and_may_be_any_argument(spec, dtype):
    row = get_activation(spec)
    z = sample(dtype)
    kept = z.copy()
    a = row.f(z)
    slope = row.f_grad(z, a)
    np.testing.assert_array_equal(z, kept)

    out = np.full_like(z, np.nan)
    assert row.f(z, out=out) is out
    np.testing.assert_array_equal(out, a)
    assert row.f_grad(z, a, out=out) is out
    np.testing.assert_array_equal(out, slope)

    alias = z.copy()
    assert row.f(alias, out=alias) is alias
    np.testing.assert_array_equal(alias, a)
    alias = z.copy()
    np.testing.assert_array_equal(row.f_grad(alias, a, out=alias), slope)
    alias = a.copy()
    np.testing.assert_array_equal(row.f_grad(z, alias, out=alias), slope)

    strided = np.empty((z.size, 2), dtype)[:, 1]  # a view with gaps
    np.testing.assert_array_equal(row.f(z, out=strided), a)
    np.testing.assert_array_equal(row.f_grad(z, strided, out=strided), slope)


@every_row
def test_derivative_reads_a_alone_in_place_and_z_alone_otherwise(spec):
    row = get_activation(spec)
    z = sample()
    a = row.f(z)
    slope = row.f_grad(z, a)
    junk = np.full_like(z, np.nan)
    unread = row.f_grad(junk, a) if row.in_place else row.f_grad(z, junk)
    np.testing.assert_array_equal(unread, slope)
    if row.in_place:
        np.testing.assert_array_equal(row.f_grad(a, a, out=a), slope)


@every_row
@both_dtypes
def test_large_z_is_finite_without_a_warning(spec, dtype):
    """Warnings are errors in this suite, so an overflow or an invalid value fails here."""
    row = get_activation(spec)
    z = np.concatenate([np.linspace(-1e4, 1e4, 4001), np.linspace(-120.0, 120.0, 4001)]).astype(dtype)
    a = row.f(z)
    assert np.isfinite(a).all()
    assert np.isfinite(row.f_grad(z, a)).all()


@every_row
@both_dtypes
def test_nan_stays_nan(spec, dtype):
    row = get_activation(spec)
    z = np.array([1.0, np.nan, -2.0] * 7, dtype)  # long enough for the SIMD loops and their tails
    a = row.f(z)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(z))
    if spec != "identity":
        np.testing.assert_array_equal(np.isnan(row.f_grad(z, a)), np.isnan(z))


@every_row
def test_floor_and_ceiling_are_the_limits_of_a(spec):
    row = get_activation(spec)
    for z, limit in [(-1e4, row.floor), (1e4, row.ceiling)]:
        a = row.f(np.array([z]))
        slope = row.f_grad(np.array([z]), a)
        if limit is None:
            assert abs(a[0]) > 1.0 and slope[0] != 0.0
        else:
            np.testing.assert_allclose(a, limit, atol=1.1e-4)  # softsign is 1e-4 away there
            np.testing.assert_allclose(slope, 0.0, atol=1.1e-8)


@every_row
def test_every_row_says_where_it_comes_from_and_how_its_weights_start(spec):
    row = get_activation(spec)
    assert row.source
    assert row.initializer in {"glorot_uniform", "he_normal", "lecun_normal"}
    assert row.f(np.zeros(1)).shape == (1,)


def test_default_initializers():
    chosen = {name: ACTIVATIONS[name].initializer for name in ("relu", "gelu", "tanh", "sigmoid", "selu", "identity")}
    assert chosen == {
        "relu": "he_normal",
        "gelu": "he_normal",
        "tanh": "glorot_uniform",
        "sigmoid": "glorot_uniform",
        "selu": "lecun_normal",
        "identity": "glorot_uniform",
    }


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_by_hand():
    def at(spec, z):
        return float(get_activation(spec).f(np.array([z]))[0])

    assert at("identity", -1.5) == -1.5
    assert at("relu", -1.5) == 0.0 and at("relu", 1.5) == 1.5
    assert at("leaky_relu", -2.0) == -0.02 and at("leaky_relu(0.2)", -2.0) == -0.4
    assert at("elu", -1.0) == pytest.approx(math.expm1(-1.0), rel=1e-15)
    assert at("elu(0.5)", -1.0) == pytest.approx(math.expm1(-1.0) / 2, rel=1e-15)
    assert at("sigmoid", math.log(3.0)) == pytest.approx(0.75, rel=1e-15)
    assert at("softplus", 0.0) == pytest.approx(math.log(2.0), rel=1e-15)
    assert at("softsign", -3.0) == -0.75
    assert at("hard_sigmoid", -3.0) == 0.0 and at("hard_sigmoid", 0.0) == 0.5 and at("hard_sigmoid", 3.0) == 1.0
    assert at("hard_tanh", -7.0) == -1.0 and at("hard_tanh", 0.25) == 0.25
    assert at("hard_silu", 1.0) == pytest.approx(4 / 6, rel=1e-15)
    assert at("relu6", 7.0) == 6.0 and at("relu6", -1.0) == 0.0
    assert at("gelu", 1.0) == pytest.approx(0.8413447460685429, rel=1e-15)
    assert at("mish", 1.0) == pytest.approx(math.tanh(math.log1p(math.e)), rel=1e-15)


def test_selu_keeps_mean_and_variance():
    """The constants' defining property: standard normal in, mean 0 and variance 1 out (Klambauer et al. 2017)."""
    z = np.linspace(-12.0, 12.0, 200_001)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    a = ACTIVATIONS["selu"].f(z)
    assert np.sum(a * density) == pytest.approx(0.0, abs=1e-8)
    assert np.sum(a * a * density) == pytest.approx(1.0, abs=1e-8)


@both_dtypes
def test_sigmoid_is_accurate_in_the_lower_tail(dtype):
    z = np.linspace(-80.0, 0.0, 801).astype(dtype)
    exact = np.array([math.exp(v) / (1.0 + math.exp(v)) for v in z.tolist()])
    np.testing.assert_allclose(ACTIVATIONS["sigmoid"].f(z), exact, rtol=4 * np.finfo(dtype).eps)


def test_sigmoid_of_extremes():
    for dtype in DTYPES:
        z = np.array([-np.inf, -1e4, 1e4, np.inf], dtype)
        np.testing.assert_array_equal(ACTIVATIONS["sigmoid"].f(z), [0, 0, 1, 1])


def test_normal_cdf_against_erfc():
    z = np.concatenate([np.linspace(-37.0, 37.0, 7001), [0.0, -0.0]])
    exact = np.array([math.erfc(-v * math.sqrt(0.5)) / 2 for v in z.tolist()])
    phi = normal_cdf(z)
    np.testing.assert_allclose(phi, exact, rtol=0, atol=1e-15)
    lower = z < 0
    # erfc(-z √½) itself is off by as much as z² roundings, because its argument is rounded
    assert np.all(np.abs(phi / exact - 1)[lower] <= 1e-15 * (1 + z * z)[lower])

    z32 = z.astype(np.float32)
    exact32 = np.array([math.erfc(-v * math.sqrt(0.5)) / 2 for v in z32.tolist()])
    phi32 = normal_cdf(z32)
    assert phi32.dtype == np.float32
    np.testing.assert_allclose(phi32, exact32, rtol=0, atol=1.5e-7)
    lower = (z32 < 0) & (z32 > -12)
    assert np.all(np.abs(phi32 / exact32 - 1)[lower] <= 4e-7 * (1 + z32.astype(float) ** 2)[lower])


def test_normal_cdf_of_extremes():
    for dtype in DTYPES:
        phi = normal_cdf(np.array([-np.inf, -1e4, 0.0, -0.0, 1e4, np.inf, np.nan], dtype))
        np.testing.assert_array_equal(phi, np.array([0, 0, phi[2], phi[2], 1, 1, np.nan], dtype))
        assert float(phi[2]) == pytest.approx(0.5, abs=float(np.finfo(dtype).eps))


def torch_function(name):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    return {
        "identity": lambda z: z * 1,
        "sigmoid": F.sigmoid,
        "tanh": F.tanh,
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "leaky_relu(0.2)": lambda z: F.leaky_relu(z, 0.2),
        "elu": F.elu,
        "elu(0.5)": lambda z: F.elu(z, 0.5),
        "selu": F.selu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "silu": F.silu,
        "mish": F.mish,
        "softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),  # F.softplus is linear from 20 on: off by 2e-9
        "softsign": F.softsign,
        "hard_sigmoid": F.hardsigmoid,
        "hard_tanh": F.hardtanh,
        "hard_silu": F.hardswish,
        "relu6": F.relu6,
    }[name]


@pytest.mark.peer
@every_row
@both_dtypes
def test_torch_agrees(spec, dtype):
    torch = pytest.importorskip("torch")
    row = get_activation(spec)
    z = sample(dtype)
    tensor = torch.tensor(z, requires_grad=True)
    value = torch_function(spec)(tensor)
    value.sum().backward()
    a = row.f(z)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-14}
    np.testing.assert_allclose(a, value.detach().numpy(), **close)
    if spec == "hard_sigmoid":
        close["rtol"] = 1e-5  # torch's 1/6 has float32's digits even in float64
    np.testing.assert_allclose(row.f_grad(z, a), tensor.grad.numpy(), **close)


# --- get_activation --------------------------------------------------------------------------------------------------


def test_a_name_gives_its_row():
    assert get_activation("relu") is ACTIVATIONS["relu"]
    assert get_activation(" tanh ") is ACTIVATIONS["tanh"]
    assert get_activation("leaky_relu").alpha == 0.01
    assert get_activation("elu").alpha == 1.0


def test_alpha_by_argument_and_by_name():
    z = np.array([-2.0, 3.0])
    for row in [
        get_activation("leaky_relu", 0.2),
        get_activation("leaky_relu(0.2)"),
        get_activation("leaky_relu ( 0.2 )"),
    ]:
        assert row.alpha == 0.2
        np.testing.assert_array_equal(row.f(z), [-0.4, 3.0])
    assert get_activation("leaky_relu", 1).alpha == 1.0
    assert get_activation("elu", alpha=np.float32(0.5)).floor == -0.5


@every_row
def test_spec_gives_the_row_back(spec):
    row = get_activation(spec)
    again = get_activation(row.spec)
    assert (again.name, again.alpha, again.spec) == (row.name, row.alpha, row.spec)


def test_spec_strings():
    assert get_activation("relu").spec == "relu"
    assert get_activation("leaky_relu(0.2)").spec == "leaky_relu(0.2)"
    assert get_activation("elu").spec == "elu(1.0)"


@every_row
def test_rows_can_be_copied_and_pickled(spec):
    row = get_activation(spec)
    z = sample()
    for twin in (pickle.loads(pickle.dumps(row)), copy.deepcopy(row)):
        np.testing.assert_array_equal(twin.f(z), row.f(z))


def test_a_row_of_your_own_passes_through():
    own = Activation(
        "cube", lambda z, out=None: np.power(z, 3, out=out), lambda z, a, out=None: 3 * z * z, "mine", "he_normal"
    )
    assert get_activation(own) is own
    assert own.spec == "cube"


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"activation='rleu' is unknown; allowed: identity, sigmoid, .*relu6, or an"):
        get_activation("rleu")
    with pytest.raises(ValueError, match=r"activation='rleu\(0.1\)' is unknown"):
        get_activation("rleu(0.1)")
    with pytest.raises(ValueError, match=r"activation='relu\(' is unknown"):
        get_activation("relu(")


@pytest.mark.parametrize("spec", [None, 3, np.tanh, ("relu",)])
def test_a_wrong_type_is_refused(spec):
    with pytest.raises(TypeError, match=r"activation=.* must be a name or an Activation, not \w+"):
        get_activation(spec)


def test_alpha_for_a_row_without_one_is_refused():
    for arguments in [("relu", 0.1), ("relu(0.1)",)]:
        with pytest.raises(ValueError, match="activation 'relu' has no alpha; those with one: leaky_relu, elu"):
            get_activation(*arguments)


def test_alpha_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"activation='elu\(0.5\)' names its alpha already; leave out alpha=0.5"):
        get_activation("elu(0.5)", 0.5)
    with pytest.raises(ValueError, match=r"alpha=0.5 goes with an activation's name; an Activation \(elu\(1.0\)\)"):
        get_activation(ACTIVATIONS["elu"], 0.5)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, math.nan, math.inf, "x", True, [0.1]])
def test_alpha_of_leaky_relu_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"of leaky_relu must be a finite number with 0 < alpha <= 1"):
        get_activation("leaky_relu", alpha)


@pytest.mark.parametrize("spec", ["elu(0)", "elu(-1)", "elu(inf)", "elu(nan)", "elu()", "elu(a)"])
def test_alpha_of_elu_out_of_range_is_refused(spec):
    with pytest.raises(ValueError, match=r"of elu must be a finite number with alpha > 0"):
        get_activation(spec)
