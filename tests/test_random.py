"""Counter-based randomness: the words are Philox's, the draws follow from the words, and nothing is remembered."""

import threading

import numpy as np
import pytest

from gpumlp import random
from gpumlp.random import Purpose

STREAM = {"seed": 2**63 + 11, "purpose": Purpose.NOISE, "step": 5, "model": 3, "layer": 2}


def philox(counter, key):
    """Philox4x64-10 in plain integers, written from the paper alone."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & mask, (p0 >> 64) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_the_reference_gives_the_published_words():
    """Known answers of Random123 (kat_vectors, philox4x64 10)."""
    ones = 2**64 - 1
    pi = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
    key = [0x452821E638D01377, 0xBE5466CF34E90C6C]
    assert [f"{w:016x}" for w in philox([0] * 4, [0] * 2)] == [
        "16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b",
    ]  # fmt: skip
    assert [f"{w:016x}" for w in philox([ones] * 4, [ones] * 2)] == [
        "87b092c3013fe90b", "438c3c67be8d0224", "9cc7d7c69cd777b6", "a09caebf594f0ba0",
    ]  # fmt: skip
    assert [f"{w:016x}" for w in philox(pi, key)] == [
        "a528f45403e61d95", "38c72dbd566e9788", "a5a1610e72fd18b5", "57bd43b5e52b7fe6",
    ]  # fmt: skip


def test_words_are_those_of_the_definition():
    expected = [w for block in range(3) for w in philox([block + 1, 5, 3, 2], [2**63 + 11, Purpose.NOISE])]
    got = random.words(11, **STREAM)
    assert got.dtype == np.uint64
    assert got.tolist() == expected[:11]


def test_words_of_the_largest_integers():
    top = 2**64 - 1
    got = random.words(4, seed=top, purpose=top, step=top, model=top, layer=top)
    assert got.tolist() == philox([1, top, top, top], [top, top])


def test_a_draw_remembers_nothing():
    first = random.words(7, **STREAM)
    random.words(3, **STREAM)
    np.testing.assert_array_equal(random.words(7, **STREAM), first)
    np.testing.assert_array_equal(random.words(101, **STREAM)[:7], first)
    assert random.words(0, **STREAM).shape == (0,)


@pytest.mark.parametrize("word", STREAM)
def test_every_part_of_the_stream_matters(word):
    first = random.words(50, **STREAM)
    assert not np.isin(random.words(50, **(STREAM | {word: STREAM[word] + 1})), first).any()


def test_purposes_are_fixed():
    assert {p.name: p.value for p in Purpose} == {
        "WEIGHTS": 1, "SHUFFLE": 2, "DROPOUT": 3, "NOISE": 4, "MIXUP": 5, "SHIFT": 6, "SPLIT": 7, "DATA": 8,
    }  # fmt: skip


def test_results_are_fixed():
    """Files and published results depend on these: a change here breaks them."""
    s = {"seed": 1, "purpose": Purpose.WEIGHTS}
    assert random.words(2, **s).tolist() == philox([1, 0, 0, 0], [1, 1])[:2]
    assert random.permutation(6, seed=1).tolist() == np.argsort(random.words(6, seed=1, purpose=2)).tolist()
    assert random.permutation(6, seed=1).tolist() == [4, 2, 0, 1, 5, 3]
    assert random.integers(6, 0, 100, **s).tolist() == [21, 7, 28, 98, 30, 94]
    np.testing.assert_allclose(
        random.normal(3, **s), [2.2634107731043493, -0.23125605586529766, -0.10618331944830484], rtol=1e-12
    )


# --- draws ------------------------------------------------------------------------------------------------------------


def test_generator_starts_at_the_first_word():
    rng = random.generator(**STREAM)
    np.testing.assert_array_equal(rng.bit_generator.random_raw(9), random.words(9, **STREAM))
    np.testing.assert_array_equal(random.generator(**STREAM).normal(size=5), random.generator(**STREAM).normal(size=5))


def test_generators_are_independent_of_other_draws():
    expected = random.generator(**STREAM).normal(size=6)
    rng = random.generator(**STREAM)
    pieces = [rng.normal(size=2)]
    random.words(5, seed=1, purpose=1)
    other = random.generator(seed=4, purpose=Purpose.DATA)
    other.normal(size=3)
    pieces.append(rng.normal(size=4))
    np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_permutation_is_the_argsort_of_the_words():
    order = random.permutation(1003, seed=8, step=2, model=1)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(1003))
    key = random.words(1003, seed=8, purpose=Purpose.SHUFFLE, step=2, model=1)
    assert (np.diff(key[order].astype(object)) > 0).all()
    assert not np.array_equal(order, random.permutation(1003, seed=8, step=3, model=1))


def test_permutations_are_uniform():
    """Each of the 24 orders of 4 rows comes up 1 time in 24 (chi-square, 23 degrees of freedom, 0.1% level: 49.7)."""
    draws = 2400
    orders = [tuple(random.permutation(4, seed=0, step=i).tolist()) for i in range(draws)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert np.sum((counts - draws / 24) ** 2 / (draws / 24)) < 49.7


def test_uniform_is_the_documented_formula():
    u = random.uniform(9, **STREAM)
    assert u.dtype == np.float64
    assert u.tolist() == [((w >> 12) + 0.5) / 2**52 for w in random.words(9, **STREAM).tolist()]


def test_uniform_never_reaches_its_ends():
    ends = random._unit_interval(np.array([0, 2**64 - 1], np.uint64))
    assert ends.tolist() == [2.0**-53, 1.0 - 2.0**-53]


def test_uniform_moments():
    u = random.uniform(100_000, **STREAM)
    assert u.mean() == pytest.approx(0.5, abs=0.004)
    assert u.var() == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8])
def test_normal_is_the_documented_formula(n):
    u = random.uniform(8, **STREAM).reshape(4, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:n]
    x = random.normal(n, **STREAM)
    assert x.shape == (n,) and x.dtype == np.float64
    np.testing.assert_allclose(x, expected, rtol=1e-13)


def test_normal_moments():
    x = random.normal(100_000, **STREAM)
    assert x.mean() == pytest.approx(0.0, abs=0.015)
    assert x.var() == pytest.approx(1.0, abs=0.02)
    assert np.mean(x**4) == pytest.approx(3.0, abs=0.15)
    assert np.corrcoef(x[0::2], x[1::2])[0, 1] == pytest.approx(0.0, abs=0.02)


def lanes_of(stream, n):
    return [lane for w in random.words((n + 1) // 2, **stream).tolist() for lane in (w & 0xFFFFFFFF, w >> 32)][:n]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 10), (-7, 6), (5, 5 + 2**32), (-(2**40), -(2**40) + 3)])
def test_integers_are_the_documented_formula(low, high):
    got = random.integers(101, low, high, **STREAM)
    assert got.dtype == np.int64
    assert got.tolist() == [low + (lane * (high - low) >> 32) for lane in lanes_of(STREAM, 101)]


def test_integers_cover_the_range_evenly():
    counts = np.bincount(random.integers(70_000, 0, 7, **STREAM), minlength=7)
    assert np.abs(counts - 10_000).max() < 400


@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 2), (0, 2**32 + 1)])
def test_integers_refuses_an_impossible_range(low, high):
    with pytest.raises(ValueError, match=f"low={low}, high={high} must be integers with low < high <= low"):
        random.integers(3, low, high, **STREAM)


# --- dropout ----------------------------------------------------------------------------------------------------------

DROPOUT = {"seed": 9, "step": 4, "model": 1, "layer": 3}


def test_keep_threshold():
    assert random.keep_threshold(0.0) == 0
    assert random.keep_threshold(0.5) == 2**31
    assert random.keep_threshold(0.1) == round(0.1 * 2**32)
    assert random.keep_threshold(1 - 2.0**-40) == 2**32 - 1  # still fits a lane


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"rate=.* must be at least 0 and below 1"):
        random.keep_threshold(rate)
    with pytest.raises(ValueError, match=r"rate=.* must be at least 0 and below 1"):
        random.dropout_scale(np.empty(3), rate, **DROPOUT)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (5, 3), (8,)])
@pytest.mark.parametrize("rate", [0.25, np.float64(0.25), np.float32(0.25)])
def test_dropout_keeps_the_lanes_that_reach_the_threshold(dtype, shape, rate):
    out = np.full(shape, np.nan, dtype)
    assert random.dropout_scale(out, rate, **DROPOUT) is out
    lanes = lanes_of({**DROPOUT, "purpose": Purpose.DROPOUT}, out.size)
    expected = [dtype(1 / 0.75) if lane >= 2**30 else 0.0 for lane in lanes]
    np.testing.assert_array_equal(out.ravel(), np.array(expected, dtype))


def test_a_lane_equal_to_the_threshold_is_kept():
    lanes = lanes_of({**DROPOUT, "purpose": Purpose.DROPOUT}, 5)
    for e, lane in enumerate(lanes):
        assert random.dropout_scale(np.empty(5), lane / 2**32, **DROPOUT)[e] > 0
        assert random.dropout_scale(np.empty(5), (lane + 1) / 2**32, **DROPOUT)[e] == 0


def test_dropout_at_rate_zero_keeps_everything():
    np.testing.assert_array_equal(random.dropout_scale(np.empty(1001, np.float32), 0.0, **DROPOUT), 1.0)


def test_dropout_keeps_the_mean():
    for rate in (0.1, 0.5, 0.9):
        scale = random.dropout_scale(np.empty(100_000), rate, **DROPOUT)
        assert np.mean(scale == 0.0) == pytest.approx(rate, abs=0.005)
        assert scale.mean() == pytest.approx(1.0, abs=0.03)


def test_dropout_refuses_a_view_with_gaps():
    with pytest.raises(ValueError, match="out must be C-contiguous"):
        random.dropout_scale(np.empty((4, 6))[:, ::2], 0.5, **DROPOUT)


# --- what the arguments may be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1, np.int64(7), np.uint64(2**64 - 1)])
def test_seeds_that_are_allowed(seed):
    assert random.check_seed(seed) == int(seed)
    assert type(random.check_seed(seed)) is int
    np.testing.assert_array_equal(random.words(3, seed=seed, purpose=1), random.words(3, seed=int(seed), purpose=1))


@pytest.mark.parametrize("seed", [-1, 2**64, np.int64(-3)])
def test_seeds_out_of_range(seed):
    for refuse in (
        random.check_seed,
        lambda s: random.words(1, seed=s, purpose=1),
        lambda s: random.permutation(3, seed=s),
    ):
        with pytest.raises(ValueError, match=rf"seed={seed} must be at least 0 and below 2\*\*64"):
            refuse(seed)


@pytest.mark.parametrize("seed", [None, 1.0, "1", True, np.True_, [1], np.float64(3)])
def test_seeds_that_are_no_integers(seed):
    for refuse in (random.check_seed, lambda s: random.generator(seed=s, purpose=1)):
        with pytest.raises(TypeError, match=r"seed=.* must be an integer, not \w+"):
            refuse(seed)


@pytest.mark.parametrize("word", ["purpose", "step", "model", "layer"])
def test_the_other_words_are_checked_too(word):
    with pytest.raises(ValueError, match=f"{word}=-1 must be at least 0"):
        random.words(1, **(STREAM | {word: -1}))
    with pytest.raises(TypeError, match=rf"{word}=1.5 must be an integer, not float"):
        random.words(1, **(STREAM | {word: 1.5}))


def test_a_negative_count_is_refused():
    for draw in (random.words, random.uniform, random.normal, lambda n, **s: random.integers(n, 0, 2, **s)):
        with pytest.raises(ValueError, match="n=-1 must be at least 0"):
            draw(-1, **STREAM)


# --- state and threads ------------------------------------------------------------------------------------------------


def test_numpys_global_state_is_never_touched():
    np.random.seed(12)
    before = np.random.get_state()
    random.words(5, **STREAM)
    random.generator(**STREAM).normal(size=3)
    random.permutation(5, seed=1)
    random.normal(5, **STREAM)
    random.integers(5, 0, 3, **STREAM)
    random.dropout_scale(np.empty(5), 0.5, **DROPOUT)
    after = np.random.get_state()
    assert before[0] == after[0] and before[2:] == after[2:]
    np.testing.assert_array_equal(before[1], after[1])


def test_threads_do_not_disturb_each_other():
    expected = [random.words(301, seed=s, purpose=1) for s in range(4)]
    wrong = []
    start = threading.Barrier(4)

    def draw(s):
        start.wait()
        for _ in range(150):
            if not np.array_equal(random.words(301, seed=s, purpose=1), expected[s]):
                wrong.append(s)

    threads = [threading.Thread(target=draw, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_equal_words_keep_their_order(monkeypatch):
    """Two equal words of 64 bits are rare; a stable sort decides then, as it does on a device."""
    drawn = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint64)
    monkeypatch.setattr(random, "words", lambda n, **_: drawn[:n])
    np.testing.assert_array_equal(random.permutation(2000, seed=1), np.argsort(drawn, kind="stable"))
