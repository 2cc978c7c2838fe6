"""Built-in sets: sizes, determinism, and that each is the problem that it claims to be."""

from pathlib import Path

import numpy as np
import pytest

from gpumlp.data import builtin, load
from gpumlp.data.builtin import BUILTIN, circles, moons, sine, spirals, xor

PLANE = [moons, circles, spirals, xor]


@pytest.mark.parametrize("name", BUILTIN)
def test_every_set_loads_by_name_and_is_the_same_each_time(name):
    data, again = load(name), load(name)
    assert data.name == name and len(data.X) == len(data.y) and len(data.X_test) == len(data.y_test)
    assert np.array_equal(data.X, again.X) and np.array_equal(data.y_test, again.y_test)
    assert data.X.flags.c_contiguous and data.X.shape[1] == data.X_test.shape[1]
    if data.task == "classification":
        assert data.y.dtype == data.y_test.dtype == np.int64 and set(data.y) == set(range(len(data.classes)))
    else:
        assert data.y.dtype == np.float32 and data.y.ndim == 2 and data.classes is None


def test_digits():
    data = load("digits")
    assert data.X.shape == (1437, 64) and data.X_test.shape == (360, 64) and data.X.dtype == np.uint8
    X = np.concatenate([data.X, data.X_test])
    assert X.min() == 0 and X.max() == 16 and data.image_shape == (8, 8) and data.classes.tolist() == list(range(10))
    everything = np.bincount(np.concatenate([data.y, data.y_test]))
    assert everything.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.all(np.abs(np.bincount(data.y_test) - everything * 360 / 1797) < 1)


@pytest.mark.peer
def test_digits_are_those_of_scikit_learn():
    peer = pytest.importorskip("sklearn.datasets").load_digits()
    data = load("digits")
    ours = {(*row, label) for row, label in zip(data.X.tolist(), data.y.tolist(), strict=True)}
    ours |= {(*row, label) for row, label in zip(data.X_test.tolist(), data.y_test.tolist(), strict=True)}
    theirs = {(*row, label) for row, label in zip(peer.data.astype(int).tolist(), peer.target.tolist(), strict=True)}
    assert ours == theirs


def test_digits_are_cited_where_they_lie():
    assert "10.24432/C50P49" in builtin.digits.__doc__ and "CC BY 4.0" in builtin.digits.__doc__
    readme = (Path(builtin.__file__).parent / "README.md").read_text()
    assert "10.24432/C50P49" in readme and "CC BY 4.0" in readme


@pytest.mark.parametrize("make", [*PLANE, sine])
def test_generated_sets_have_the_asked_size_and_depend_on_the_seed(make):
    data, other, same = make(n=205, seed=3), make(n=205, seed=4), make(n=205, seed=3)
    assert len(data.X) == 164 and len(data.X_test) == 41 and data.X.dtype == data.X_test.dtype == np.float32
    assert np.array_equal(data.X, same.X) and not np.array_equal(data.X, other.X)
    if data.task == "classification":
        assert abs(int(np.bincount(data.y_test)[0]) - 20.5) <= 0.5


@pytest.mark.parametrize("make", [*PLANE, sine])
def test_noise_is_noise(make):
    clean, noisy = make(n=4000, noise=0), make(n=4000, noise=0.3)
    if make is xor:  # the clean set keeps all rows
        assert clean.X_test is None
        deviation = noisy.X - np.round(noisy.X.clip(0, 1))
        assert 0.2 < deviation.std() < 0.3
    elif make is sine:
        assert (noisy.y - np.sin(2 * np.pi * noisy.X)).std() == pytest.approx(0.3, abs=0.02)
    else:
        assert (noisy.X - clean.X).std() == pytest.approx(0.3, abs=0.02) and np.array_equal(noisy.y, clean.y)


def test_moons_lie_on_their_half_circles():
    data = moons(noise=0)
    outer, inner = data.X[data.y == 0], data.X[data.y == 1]
    assert np.allclose(np.hypot(*outer.T), 1, atol=1e-6) and outer[:, 1].min() >= 0
    assert np.allclose(np.hypot(inner[:, 0] - 1, inner[:, 1] - 0.5), 1, atol=1e-6) and inner[:, 1].max() <= 0.5


def test_circles_have_their_radii():
    data = circles(noise=0)
    assert np.allclose(np.hypot(*data.X.T), np.where(data.y == 0, 1.0, 0.5), atol=1e-6)


def test_spirals_have_two_arms_one_half_turn_apart():
    data = spirals(noise=0)
    r, angle = np.hypot(*data.X.T), np.arctan2(data.X[:, 1], data.X[:, 0])
    expected = 3 * np.pi * r + np.pi * data.y
    off = np.angle(np.exp(1j * (angle - expected)))
    assert np.abs(off[r > 0.05]).max() < 1e-4 and r.max() <= 1 + 1e-6


def test_xor_truth_table():
    data = xor(n=4, noise=0)
    assert data.X.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and data.y.tolist() == [0, 1, 1, 0]
    assert data.X_test is None and data.y_test is None


def test_xor_quadrants():
    data = xor(noise=0.05)
    corner = data.X > 0.5
    assert np.array_equal(corner[:, 0] ^ corner[:, 1], data.y == 1)


def test_sine():
    data = sine(noise=0)
    assert data.X.shape == (800, 1) and data.y.shape == (800, 1) and data.task == "regression"
    assert np.allclose(data.y, np.sin(2 * np.pi * data.X), atol=1e-5)
    assert -1 <= data.X.min() < -0.98 and 0.98 < data.X.max() <= 1


@pytest.mark.parametrize("make", [*PLANE, sine])
def test_arguments_are_checked(make):
    with pytest.raises(ValueError, match="n is 3; it must be an integer >= 4"):
        make(n=3)
    with pytest.raises(TypeError, match=r"n is 10.0"):
        make(n=10.0)
    with pytest.raises(ValueError, match=r"noise is -1; it must be a number in \[0, inf\)"):
        make(noise=-1)
