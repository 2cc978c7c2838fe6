"""What users pass in: accepted forms, and an error with the place of the fault for everything else."""

import tracemalloc

import numpy as np
import pytest

from gpumlp.data import check_sample_weight, check_targets, check_X, encode_labels
from gpumlp.data.checks import check_integer, check_number


class SparseLike:
    """Looks like a scipy.sparse matrix to those who ask politely."""

    nnz = 3

    def toarray(self):
        raise AssertionError("a check must not unpack a sparse matrix")


# check_X: what it accepts


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u4", "i8", "f4", "f8", "?"])
def test_X_keeps_dtype_and_is_not_copied(dtype):
    X = np.ones((5, 3), dtype=dtype)
    assert check_X(X) is X
    assert check_X(X, 3) is X


@pytest.mark.parametrize("given, expected", [("f2", "f4"), ("g", "f8"), (">f4", "=f4"), (">f8", "=f8"), (">i4", "=i4")])
def test_X_in_a_form_that_kernels_do_not_know_is_converted(given, expected):
    X = np.arange(15).reshape(5, 3).astype(given)
    before = X.copy()
    checked = check_X(X)
    assert checked.dtype == np.dtype(expected) and checked.dtype.isnative
    assert np.array_equal(checked, before) and np.array_equal(X, before) and X.dtype == before.dtype


@pytest.mark.parametrize(
    "X",
    [
        np.asfortranarray(np.arange(15.0).reshape(5, 3)),
        np.arange(60.0).reshape(10, 6)[::2, ::2],
        np.arange(15.0).reshape(5, 3)[::-1],
    ],
)
def test_X_of_any_layout_becomes_contiguous(X):
    checked = check_X(X)
    assert checked.flags.c_contiguous and np.array_equal(checked, X)


def test_X_may_be_read_only():
    X = np.ones((5, 3))
    X.flags.writeable = False
    assert check_X(X) is X


def test_X_of_nested_lists():
    assert np.array_equal(check_X([[1, 2], [3, 4], [5, 6]]), [[1, 2], [3, 4], [5, 6]])
    assert check_X([[1.5, 2]]).shape == (1, 2)
    assert check_X(((True, False),)).dtype == bool


def test_X_largest_float32_is_finite_and_float64_has_its_own_limit():
    largest = float(np.finfo(np.float32).max)
    assert check_X(np.array([[largest, -largest]])).dtype == np.float64
    assert check_X(np.array([[1e300, -1e300]]), dtype=np.float64)[0, 0] == 1e300


def test_X_check_needs_little_memory():
    X = np.ones((20_000, 250), dtype=np.float32)  # 20 MB
    X[-1, -1] = np.nan
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"X\[19999, 249\] is nan"):
        check_X(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# check_X: what it refuses


@pytest.mark.parametrize(
    "X, message",
    [
        (np.ones(4), r"X is one-dimensional.*X\.reshape\(-1, 1\).*X\.reshape\(1, -1\)"),
        ([1, 2, 3], "X is one-dimensional"),
        (np.ones((5, 2, 3)), r"shape \(5, 2, 3\).*X\.reshape\(len\(X\), -1\)"),
        (np.ones((0, 3)), r"X has no rows, shape \(0, 3\)"),
        (np.ones((3, 0)), r"X has no columns, shape \(3, 0\)"),
        (np.array([[1, "a"]], dtype=object), r"X has dtype object \(mixed types\).*X\.astype\(np\.float32\)"),
        ([["a", "b"]], r"X has dtype <U1 \(text\)"),
        (np.array([[b"a"]]), r"\(bytes\)"),
        (np.ones((2, 2), dtype=complex), r"complex128 \(complex numbers\)"),
        (np.zeros((2, 2), dtype="M8[s]"), r"datetime64\[s\] \(not numbers\)"),
        ([[1, 2], [3, 4], [5]], r"X cannot be made an array: row 0 has 2 values, row 2 has 1"),
        ([[1, 2], 3], r"X cannot be made an array: some rows are lists and some are single values"),
        ([[[1], [2]], [[3], [4, 5]]], r"X cannot be made an array: .*inhomogeneous"),
        (np.ma.masked_array([[1.0, 2.0]], mask=[[True, False]]), r"masked.*X\.filled"),
    ],
)
def test_X_wrong_content(X, message):
    with pytest.raises(ValueError, match=message):
        check_X(X)


@pytest.mark.parametrize(
    "X, message",
    [
        (None, "X is a single NoneType"),
        (3.0, "X is a single float"),
        ("text", "X is a single str"),
        ({"a": 1}, "X is a single dict"),
        (SparseLike(), r"X is a sparse matrix \(SparseLike\); use X\.toarray\(\)"),
    ],
)
def test_X_wrong_kind_of_object(X, message):
    with pytest.raises(TypeError, match=message):
        check_X(X)


def test_X_real_sparse_matrix():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"csr_matrix.*toarray"):
        check_X(sparse.csr_matrix((3, 4)))


def test_X_wrong_width():
    with pytest.raises(ValueError, match="the network takes 784 features, X has 783"):
        check_X(np.zeros((2, 783)), 784)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g", ">f4"])
@pytest.mark.parametrize("row, column", [(0, 0), (3, 17), (1999, 29)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_X_not_finite(dtype, row, column, value):
    X = np.ones((2000, 30), dtype=dtype)
    X[row, column] = value
    with pytest.raises(ValueError, match=rf"rows\[{row}, {column}\] is {value}; every value must be finite"):
        check_X(X, name="rows")


@pytest.mark.parametrize("value", [1e39, -1e39])
def test_X_beyond_float32(value):
    X = np.ones((40, 7))
    X[3, 5] = value
    with pytest.raises(ValueError, match=r"X\[3, 5\] is -?1e\+39, beyond the largest float32 \(3\.403e\+38\).*float64"):
        check_X(X)
    assert check_X(X, dtype=np.float64) is X


def test_X_long_double_beyond_float64():
    if np.finfo(np.longdouble).max == np.finfo(np.float64).max:
        pytest.skip("long double is float64 here")
    X = np.full((2, 2), np.longdouble(10) ** 1000)
    with pytest.raises(ValueError, match=r"X\[0, 0\] is inf"):
        check_X(X, dtype=np.float64)


# check_targets: labels


@pytest.mark.parametrize(
    "y",
    [
        [0, 2, 1, 2],
        np.array([0, 2, 1, 2], dtype=np.uint8),
        np.array([0, 2, 1, 2], dtype=">i4"),
        np.array([0.0, 2.0, 1.0, 2.0], dtype=np.float16),
        np.array([[0], [2], [1], [2]]),
        np.array([0, 9, 2, 9, 1, 9, 2])[::2],
    ],
)
@pytest.mark.parametrize("kind", ["labels", "labels or probabilities"])
def test_labels(y, kind):
    labels = check_targets(y, 4, 3, kind)
    assert labels.dtype == np.int64 and labels.dtype.isnative and labels.tolist() == [0, 2, 1, 2]


def test_labels_of_a_dtype_narrower_than_the_number_of_outputs():
    assert check_targets(np.array([0, 255], dtype=np.uint8), 2, 1000, "labels").tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"y\[1\] is -1; labels must be integers in \[0, 1000\)"):
        check_targets(np.array([0, -1], dtype=np.int8), 2, 1000, "labels")


def test_labels_int64_are_not_copied_and_bools_are_labels():
    y = np.array([0, 1, 1])
    assert np.shares_memory(check_targets(y, 3, 2, "labels"), y)
    assert check_targets([True, False, True], 3, 2, "labels").tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "y, message",
    [
        ([0, 1, 3], r"y\[2\] is 3; labels must be integers in \[0, 3\), since the network has 3 outputs"),
        ([0, -1, 2], r"y\[1\] is -1; labels"),
        ([0, 1.5, 2], r"y\[1\] is 1\.5; labels"),
        ([0, 1, np.nan], r"y\[2\] is nan; labels"),
        ([0, np.inf, 1], r"y\[1\] is inf; labels"),
        (np.array([0, 1, 2**63], dtype=np.uint64), r"y\[2\] is 9223372036854775808; labels"),
        ([0, 1], "y has 2 rows, X has 3"),
        ([1, 1, 1], r"y has one class only \(1\)"),
        (np.zeros((3, 3)), r"y has shape \(3, 3\); expected one label per row, shape \(3,\)"),
        (["a", "b", "c"], r"y holds text.*encode_labels\(y\)"),
        (np.array([0, None, 1]), r"y holds text or mixed types \(dtype object\)"),
        (np.zeros(3, complex), r"y has dtype complex128"),
        ([[0], [1, 2], [3]], "y cannot be made an array: row 0 has 1 values, row 1 has 2"),
    ],
)
def test_wrong_labels(y, message):
    with pytest.raises(ValueError, match=message):
        check_targets(y, 3, 3, "labels")


def test_one_class_is_allowed_where_asked_for():
    assert check_targets([1, 1, 1], 3, 3, "labels", allow_one_class=True).tolist() == [1, 1, 1]


def test_targets_wrong_kind_of_object():
    with pytest.raises(TypeError, match="y is a single NoneType"):
        check_targets(None, 3, 3, "labels")
    with pytest.raises(TypeError, match="y is a sparse matrix"):
        check_targets(SparseLike(), 3, 3, "values")


# check_targets: the other kinds


def test_probabilities():
    y = np.array([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    checked = check_targets(y, 2, 3, "labels or probabilities")
    assert checked.dtype == np.float32 and np.array_equal(checked, y)
    assert check_targets(y, 2, 3, "labels or probabilities", dtype=np.float64) is y
    assert check_targets(np.eye(3, dtype=int), 3, 3, "labels or probabilities").dtype == np.float32


def test_probabilities_sum_to_one_within_a_thousandth():
    y = np.array([[0.5, 0.5, 0.0], [0.5, 0.2, 0.3009]])
    check_targets(y, 2, 3, "labels or probabilities")
    with pytest.raises(ValueError, match=r"y\[1\] sums to 1\.0011; the probabilities of a row must sum to 1"):
        check_targets(y + np.array([[0, 0, 0], [0, 0, 0.0002]]), 2, 3, "labels or probabilities")
    with pytest.raises(ValueError, match=r"y\[0\] sums to 0\.9989"):
        check_targets(y - np.array([[0, 0.0011, 0], [0, 0, 0]]), 2, 3, "labels or probabilities")


@pytest.mark.parametrize("kind, what", [("labels or probabilities", "probabilities"), ("binary", "probabilities")])
def test_probabilities_out_of_range(kind, what):
    with pytest.raises(ValueError, match=rf"y\[1, 0\] is -0\.5; {what} must be between 0 and 1"):
        check_targets([[0.5, 0.5], [-0.5, 1.5]], 2, 2, kind)
    with pytest.raises(ValueError, match=rf"y\[0, 1\] is 1\.5; {what} must be between 0 and 1"):
        check_targets([[0.0, 1.5], [0.5, 0.5]], 2, 2, kind)


def test_probabilities_of_wrong_shape():
    with pytest.raises(ValueError, match=r"y has shape \(2, 4\); expected \(2, 3\) or labels of shape \(2,\)"):
        check_targets(np.ones((2, 4)) / 4, 2, 3, "labels or probabilities")


@pytest.mark.parametrize("kind", ["binary", "values", "counts"])
def test_one_output_takes_one_dimension(kind):
    for y in ([0, 1, 1], [[0], [1], [1]], [False, True, True]):
        checked = check_targets(y, 3, 1, kind)
        assert checked.shape == (3, 1) and checked.dtype == np.float32 and checked.ravel().tolist() == [0, 1, 1]


@pytest.mark.parametrize("kind", ["binary", "values", "counts"])
def test_several_outputs(kind):
    y = np.asfortranarray(np.array([[0, 1, 1], [1, 0, 1]], dtype=">f8"))
    checked = check_targets(y, 2, 3, kind)
    assert checked.dtype == np.float32 and checked.flags.c_contiguous and np.array_equal(checked, y)
    with pytest.raises(ValueError, match=r"y has shape \(2,\); expected \(2, 3\): one column for each"):
        check_targets([0, 1], 2, 3, kind)
    with pytest.raises(ValueError, match=r"y has shape \(2, 3\); expected \(2, 1\) or \(2,\)"):
        check_targets(y, 2, 1, kind)


def test_counts_are_not_negative_and_values_may_be():
    assert check_targets([-3.5, 2.0], 2, 1, "values").ravel().tolist() == [-3.5, 2.0]
    assert check_targets([7.5, 2000.0], 2, 1, "counts").ravel().tolist() == [7.5, 2000.0]
    with pytest.raises(ValueError, match=r"y\[1\] is -2\.0; counts must be >= 0"):
        check_targets([3.5, -2.0], 2, 1, "counts")


@pytest.mark.parametrize("kind", ["binary", "values", "counts", "labels or probabilities"])
def test_targets_are_finite_in_their_dtype(kind):
    y = np.full((4, 2), 0.5)
    y[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"target\[2, 1\] is nan; every value must be finite"):
        check_targets(y, 4, 2, kind, name="target")
    y[2, 1] = 1e40
    with pytest.raises(ValueError, match=r"y\[2, 1\] is 1e\+40, beyond the largest float32"):
        check_targets(y, 4, 2, kind)
    with pytest.raises(ValueError, match=r"y\[2\] is 1e\+40, beyond"):
        check_targets(y[:, 1], 4, 1, "values")


def test_value_targets_of_length_other_than_X():
    with pytest.raises(ValueError, match="y has 99 rows, X has 100"):
        check_targets(np.zeros((99, 2)), 100, 2, "values")


def test_an_unknown_kind_is_our_own_bug():
    with pytest.raises(AssertionError):
        check_targets([0, 1], 2, 2, "label")


# encode_labels


@pytest.mark.parametrize(
    "y, expected, labels",
    [
        (["b", "a", "c", "a"], ["a", "b", "c"], [1, 0, 2, 0]),
        (np.array(["b", "a", "b"], dtype=object), ["a", "b"], [1, 0, 1]),
        (np.array([["b"], ["a"]]), ["a", "b"], [1, 0]),
        ([True, False, True], [False, True], [1, 0, 1]),
        (np.array([7, -1, 7], dtype=">i2"), [-1, 7], [1, 0, 1]),
        (np.array([3, 1], dtype=object), [1, 3], [1, 0]),
        ([3.0, 1.0], [1, 3], [1, 0]),
        (np.array([3.0, 1.0], dtype=np.float16), [1, 3], [1, 0]),
        ([0.5, 0.25], [0.25, 0.5], [1, 0]),
    ],
)
def test_encode_labels(y, expected, labels):
    encoded, classes = encode_labels(y)
    assert encoded.dtype == np.int64 and encoded.tolist() == labels
    assert classes.tolist() == expected and type(classes[0].item()) is type(expected[0])
    again, same = encode_labels(y, classes)
    assert again.dtype == np.int64 and again.tolist() == labels and same.tolist() == expected


def test_encode_labels_string_dtype():
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("this NumPy has no StringDType")
    encoded, classes = encode_labels(np.array(["yes", "no"], dtype=np.dtypes.StringDType()))
    assert encoded.tolist() == [1, 0] and classes.dtype.kind == "U"


def test_known_classes_may_stand_in_any_order():
    labels, classes = encode_labels(["low", "high", "low"], ["low", "mid", "high"])
    assert labels.tolist() == [0, 2, 0] and classes.tolist() == ["low", "mid", "high"]


@pytest.mark.parametrize(
    "y, classes, message",
    [
        (["a", "x"], ["a", "b"], r"y\[1\] is 'x', an unknown class; known are 'a', 'b'"),
        (["zz"], ["a", "b"], r"y\[0\] is 'zz'"),
        ([1, 5], [1, 2], r"y\[1\] is 5, an unknown class; known are 1, 2"),
        (["1"], [1, 2], r"y\[0\] is '1', an unknown class; known are 1, 2"),
        ([1], ["1", "2"], r"y\[0\] is 1, an unknown class; known are '1', '2'"),
        ([99], np.arange(25), r"known are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(25 in all\)$"),
    ],
)
def test_unknown_class(y, classes, message):
    with pytest.raises(ValueError, match=message):
        encode_labels(y, classes)


@pytest.mark.parametrize(
    "y, message",
    [
        (np.array(["a", None], dtype=object), r"y\[1\] is None; classes must be all text"),
        (np.array(["a", np.nan], dtype=object), r"y\[1\] is nan; classes must be all text"),
        (np.array([np.nan, "a"], dtype=object), r"y\[0\] is nan; classes must be all text"),
        (np.array([None, None], dtype=object), r"y\[0\] is None; classes must be all text"),
        (np.array([1, "a"], dtype=object), r"y\[1\] is 'a'; classes must be all text"),
        (np.array([1.0, np.nan]), r"y\[1\] is nan; drop rows whose class is missing"),
        (np.zeros((2, 2)), r"y has shape \(2, 2\); expected one class per row, shape \(2,\)"),
        (np.zeros(2, complex), r"y has dtype complex128; classes must be text, bools or numbers"),
        ([], "y has no rows"),
    ],
)
def test_encode_labels_wrong_content(y, message):
    with pytest.raises(ValueError, match=message):
        encode_labels(y)


# weights and single numbers


def test_sample_weight():
    w = np.array([0.0, 2.0, 1.0], dtype=np.float32)
    assert check_sample_weight(w, 3) is w
    assert check_sample_weight([0, 2, 1], 3).dtype == np.float32
    assert check_sample_weight([0, 2, 1], 3, dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize(
    "w, message",
    [
        ([1.0, 2.0], r"sample_weight has shape \(2,\); expected one weight per sample, shape \(3,\)"),
        (np.ones((3, 1)), r"sample_weight has shape \(3, 1\)"),
        ([1.0, np.nan, 1.0], r"sample_weight\[1\] is nan"),
        ([1.0, np.inf, 1.0], r"sample_weight\[1\] is inf"),
        ([1.0, 1.0, -1.0], r"sample_weight\[2\] is -1\.0; weights must be >= 0"),
        ([0, 0, 0], "sample_weight is zero for every sample"),
        (["a", "b", "c"], "sample_weight has dtype <U1"),
    ],
)
def test_wrong_sample_weight(w, message):
    with pytest.raises(ValueError, match=message):
        check_sample_weight(w, 3)


def test_sample_weight_wrong_kind_of_object():
    with pytest.raises(TypeError, match="sample_weight is a single float"):
        check_sample_weight(1.0, 3)


def test_check_integer():
    assert check_integer(3, "batch_size", 3) == 3
    assert type(check_integer(np.int32(4), "batch_size", 1)) is int
    with pytest.raises(ValueError, match="batch_size is 0; it must be an integer >= 1"):
        check_integer(0, "batch_size", 1)
    for value in (2.0, "2", None, True, np.True_):
        with pytest.raises(
            TypeError, match=rf"batch_size is {value!r}; it must be an integer >= 1".replace("(", r"\(")
        ):
            check_integer(value, "batch_size", 1)


def test_check_number():
    for interval, allowed in (("[]", (0, 1)), ("[)", (0,)), ("(]", (1,)), ("()", ())):
        for value in (0, 1):
            if value in allowed:
                assert check_number(value, "rate", 0, 1, interval) == value
            else:
                with pytest.raises(ValueError, match=rf"rate is {value}; it must be a number in .0, 1.$"):
                    check_number(value, "rate", 0, 1, interval)
    assert type(check_number(np.float32(0.5), "rate", 0, 1)) is float
    for value in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="rate is"):
            check_number(value, "rate", 0, 1)
    for value in ("0.5", None, True):
        with pytest.raises(TypeError, match=r"rate is .*; it must be a number in"):
            check_number(value, "rate", 0, 1)
