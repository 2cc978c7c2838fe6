"""Splits and batches: every row once, exact counts, the same for the same seed."""

import numpy as np
import pytest

from gpumlp.data import batches, kfold_indices, split_indices
from gpumlp.random import permutation

LABELS = np.repeat([3, 0, 7], [50, 13, 5])  # 68 rows, unequal classes


def counts(rows):
    return [int((LABELS[rows] == label).sum()) for label in (3, 0, 7)]


# split_indices


@pytest.mark.parametrize("stratify", [None, LABELS, LABELS.astype(str)])
@pytest.mark.parametrize("fraction, held", [(0.25, 17), (0.1, 7), (0.5, 34), (0.9, 61)])
def test_split_is_a_partition_of_the_promised_size(stratify, fraction, held):
    train, held_out = split_indices(68, fraction, seed=4, stratify=stratify)
    assert train.dtype == held_out.dtype == np.int64
    assert len(held_out) == held and np.all(np.diff(train) > 0) and np.all(np.diff(held_out) > 0)
    assert sorted([*train, *held_out]) == list(range(68))


def test_split_depends_on_the_seed_alone():
    first, again, other = (split_indices(68, 0.25, seed=seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    "held, expected",
    [
        (17, [13, 3, 1]),  # quotas 12.5, 3.25, 1.25: the first remainder is the largest
        (7, [5, 1, 1]),  # quotas 5.15, 1.34, 0.51: the last remainder is the largest
        (34, [25, 7, 2]),  # quotas 25, 6.5, 2.5: of equal remainders the first class (0 sorts before 7)
        (65, [49, 12, 4]),  # each class keeps a row
    ],
)
def test_stratified_counts_are_those_of_the_largest_remainder(held, expected):
    for seed in range(5):
        _, held_out = split_indices(68, held / 68, seed=seed, stratify=LABELS)
        assert counts(held_out) == expected


def test_rare_classes_stay_in_training():
    labels = np.array([0] * 100 + [1, 2, 3, 4, 5])
    train, held_out = split_indices(105, 50 / 105, seed=0, stratify=labels)
    assert len(held_out) == 50 and set(labels[train]) == {0, 1, 2, 3, 4, 5} and not labels[held_out].any()


def test_stratified_split_picks_different_rows_for_different_seeds():
    assert len({tuple(split_indices(68, 0.25, seed=seed, stratify=LABELS)[1]) for seed in range(20)}) == 20


def test_every_row_is_held_out_about_equally_often():
    held = np.zeros(68)  # times that each row was held out
    for seed in range(400):
        held[split_indices(68, 0.25, seed=seed, stratify=LABELS)[1]] += 1
    share = held / 400
    assert np.all(np.abs(share - np.repeat([13 / 50, 3 / 13, 1 / 5], [50, 13, 5])) < 0.11)  # five deviations


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, np.nan])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"fraction is .*; it must be a number in \(0, 1\)"):
        split_indices(10, fraction, seed=0)


def test_split_errors():
    with pytest.raises(TypeError, match=r"fraction is '0.1'"):
        split_indices(10, "0.1", seed=0)
    with pytest.raises(ValueError, match="n is 1; it must be an integer >= 2"):
        split_indices(1, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"fraction 0\.01 of 10 rows holds out 0; .*from 0\.1 to 0\.9"):
        split_indices(10, 0.01, seed=0)
    with pytest.raises(ValueError, match=r"fraction 0\.99 of 10 rows holds out 10; both sides need"):
        split_indices(10, 0.99, seed=0)
    with pytest.raises(ValueError, match=r"stratify has shape \(9,\); expected one label per row, shape \(10,\)"):
        split_indices(10, 0.5, seed=0, stratify=np.zeros(9))
    with pytest.raises(ValueError, match="cannot hold out 5 of 10 rows and keep one row of each of 6 classes"):
        split_indices(10, 0.5, seed=0, stratify=[0, 0, 0, 0, 1, 2, 3, 4, 5, 0])


# kfold_indices


@pytest.mark.parametrize("stratify", [None, LABELS])
@pytest.mark.parametrize("folds", [2, 5, 68])
def test_folds_hold_out_every_row_once(stratify, folds):
    pairs = kfold_indices(68, folds, seed=1, stratify=stratify)
    assert len(pairs) == folds
    assert sorted(np.concatenate([held for _, held in pairs])) == list(range(68))
    for train, held in pairs:
        assert train.dtype == held.dtype == np.int64
        assert np.all(np.diff(train) > 0) and np.all(np.diff(held) > 0)
        assert sorted([*train, *held]) == list(range(68)) and len(held) in (68 // folds, -(-68 // folds))


def test_stratified_folds_have_equal_shares():
    for _, held in kfold_indices(68, 5, seed=1, stratify=LABELS):
        for count, total in zip(counts(held), (50, 13, 5), strict=True):
            assert count in (total // 5, -(-total // 5))


def test_folds_depend_on_the_seed_alone():
    first, again, other = (kfold_indices(68, 3, seed=seed)[0][1] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_kfold_errors():
    with pytest.raises(ValueError, match="folds is 1; it must be an integer >= 2"):
        kfold_indices(10, 1, seed=0)
    with pytest.raises(ValueError, match="folds is 11; 10 rows allow at most 10"):
        kfold_indices(10, 11, seed=0)
    with pytest.raises(ValueError, match=r"stratify has shape \(3,\)"):
        kfold_indices(10, 2, seed=0, stratify=[0, 1, 0])


# batches


def test_batches_follow_the_order_of_the_trainer():
    X, y = np.arange(22, dtype=np.uint8).reshape(11, 2), np.arange(11)
    for epoch in (0, 3):
        order = permutation(11, seed=9, step=epoch)
        parts = list(batches(X, y, batch_size=4, seed=9, epoch=epoch))
        assert [len(labels) for _, labels in parts] == [4, 4, 3]
        assert np.array_equal(np.concatenate([labels for _, labels in parts]), order)
        assert np.array_equal(np.concatenate([rows for rows, _ in parts]), X[order])
    assert all(rows.dtype == np.float32 and labels.dtype == np.int64 for rows, labels in parts)


@pytest.mark.parametrize("given, expected", [("u1", "f4"), ("i8", "f4"), ("f4", "f4"), ("f8", "f8"), ("?", "f4")])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batch_dtype(given, expected, shuffle):
    (rows,) = batches(np.ones((3, 2), dtype=given), batch_size=5, shuffle=shuffle)
    assert rows.dtype == np.dtype(expected) and rows.shape == (3, 2)


def test_batches_of_lists():
    ((rows, labels),) = batches([[1, 2], [3, 4]], ["a", "b"], batch_size=2, shuffle=False)
    assert rows.tolist() == [[1, 2], [3, 4]] and labels.tolist() == ["a", "b"]


def test_batches_in_the_given_order_and_without_the_rest():
    X = np.arange(11.0).reshape(11, 1)
    assert [rows.ravel().tolist() for rows in batches(X, batch_size=5, shuffle=False)][-1] == [10.0]
    assert [len(rows) for rows in batches(X, batch_size=5, drop_last=True)] == [5, 5]
    assert [len(rows) for rows in batches(X, batch_size=11, drop_last=True)] == [11]
    assert list(batches(X, batch_size=12, drop_last=True)) == []


def test_batch_errors_come_at_the_call():
    X = np.ones((4, 2))
    with pytest.raises(ValueError, match="batch_size is 0; it must be an integer >= 1"):
        batches(X, batch_size=0)
    with pytest.raises(TypeError, match=r"batch_size is 2.5"):
        batches(X, batch_size=2.5)
    with pytest.raises(ValueError, match="y has 3 rows, X has 4"):
        batches(X, np.ones(3), batch_size=2)
