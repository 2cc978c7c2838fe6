import numpy as np
import pytest

from gpumlp.initializers import INITIALIZERS, get_initializer

FAN_OUT, FAN_IN = 300, 700
VARIANCE = {
    "zeros": 0.0,
    "normal": 1e-4,
    "glorot_uniform": 2 / 1000,
    "glorot_normal": 2 / 1000,
    "he_uniform": 2 / 700,
    "he_normal": 2 / 700,
    "lecun_uniform": 1 / 700,
    "lecun_normal": 1 / 700,
    "orthogonal": 1 / 700,  # 300 orthonormal rows of 700
}


def draw(name, fan_out=FAN_OUT, fan_in=FAN_IN, seed=0):
    return get_initializer(name).draw(np.random.default_rng(seed), fan_out, fan_in)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_shape_dtype_and_determinism(name):
    W = draw(name)
    assert W.shape == (FAN_OUT, FAN_IN) and W.dtype == np.float64 and W.flags.c_contiguous
    np.testing.assert_array_equal(W, draw(name))
    assert name == "zeros" or not np.array_equal(W, draw(name, seed=1))
    assert draw(name, 1, 1).shape == (1, 1)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_row_says_its_name_and_source(name):
    assert INITIALIZERS[name].name == name and INITIALIZERS[name].source


@pytest.mark.parametrize("name", INITIALIZERS)
def test_mean_and_variance(name):
    W = draw(name)
    n, variance = W.size, VARIANCE[name]
    # Five standard errors; a normal has the largest spread of its sample variance among these.
    assert abs(W.mean()) <= 5 * np.sqrt(variance / n)
    assert abs(W.var() - variance) <= 5 * variance * np.sqrt(2 / n)


@pytest.mark.parametrize("name", [name for name in INITIALIZERS if name.endswith("uniform")])
def test_uniform_fills_its_bounds(name):
    bound = np.sqrt(3 * VARIANCE[name])
    assert 0.999 * bound < np.abs(draw(name)).max() <= bound


@pytest.mark.parametrize("name", [name for name in INITIALIZERS if name.endswith("normal")])
def test_normals_are_not_truncated(name):
    W = draw(name) / np.sqrt(VARIANCE[name])
    assert 0.042 < (np.abs(W) > 2).mean() < 0.049  # 0.0455 of a normal


@pytest.mark.parametrize(("fan_out", "fan_in"), [(5, 13), (13, 5), (7, 7), (1, 4), (4, 1)])
def test_orthogonal(fan_out, fan_in):
    W = draw("orthogonal", fan_out, fan_in)
    gram = W @ W.T if fan_out <= fan_in else W.T @ W
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


def test_orthogonal_is_uniform_over_both_signs():
    # Without the sign fix the corner keeps the sign that LAPACK gives it.
    corners = [draw("orthogonal", 3, 3, seed)[0, 0] for seed in range(200)]
    assert 60 < sum(corner > 0 for corner in corners) < 140


def test_get_initializer_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="initializer='xavier' is unknown; use one of zeros, normal, glorot_uniform"):
        get_initializer("xavier")
