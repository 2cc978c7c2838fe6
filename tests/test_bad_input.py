"""Wrong and odd data: what is no number, or comes in another form. The answer is that of the plain float array, or an error
that says what was expected and what was given; never other weights, and never a changed input.

The single checks are tested in test_data_checks.py, the arguments of ``fit`` in test_trainer.py.
"""

import copy
import functools
import tempfile
import types
import warnings
from functools import partial

import numpy as np
import pytest
from emulator import EmulatedRuntime, ForeignArray, on_device

import gpumlp as gm
from gpumlp.backends import gpu_backend, gpu_work

N, FEATURES, CLASSES = 61, 6, 3
SOFTMAX = "softmax_cross_entropy"
OWN_WAY = object()  # scikit-learn takes it as the names, the columns or the numbers that it is
peer = pytest.mark.peer
pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass")  # np.matrix is in the table


@pytest.fixture(scope="module")
def backend():
    """An emulated device; sums over the parameters of small networks need no 64 blocks there."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (gpu_backend, gpu_work):
            patch.setattr(module, "PARTIALS", 3)
        yield gpu_backend.GpuBackend(EmulatedRuntime(prefer=1))


def estimators(**options):
    pytest.importorskip("sklearn")
    given = {"hidden_layer_sizes": (5,), "max_iter": 2, "random_state": 0, "device": "cpu"} | options
    return gm.MLPClassifier(**given), gm.MLPRegressor(**given)


def quietly(call, *args, **options):
    """Without the warnings of a fit that is too short to converge, and of NumPy about what the table holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


# --- R10: NaN and infinity, wherever they stand and however the data come -------------------------------------------------

ROWS = {"first": 0, "middle": N // 2, "last": N - 1}
COLUMNS = {"first": 2, "middle": 0, "last": FEATURES - 1}
NOT_FINITE = (np.nan, np.inf, -np.inf)
PLACES = [
    (argument, where, dtype) for argument in ("X", "y", "sample_weight") for where in ROWS for dtype in "f4 f8".split()
]


def as_frame(values):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(values) if values.ndim == 2 else pandas.Series(values)


def good(dtype):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, FEATURES)).astype(dtype)
    return {"X": X, "y": X[:, 0] ** 2, "sample_weight": rng.uniform(1, 2, N).astype(dtype)}


def spoiled(argument, where, dtype, value):
    """Data with one bad value, and how a message names its place."""
    data, row, column = good(dtype), ROWS[where], COLUMNS[where]
    data[argument][(row, column) if argument == "X" else row] = value
    place = f"{argument}[{row}, {column}]" if argument == "X" else f"{argument}[{row}]"
    return data, f"{place} is {value}; every value must be finite"


@pytest.mark.parametrize("form", ["array", "device", "stream", pytest.param("frame", marks=peer)])
@pytest.mark.parametrize("argument, where, dtype", PLACES)
def test_a_value_that_is_not_finite_is_named_and_moves_no_weight(argument, where, dtype, form, backend):
    """In 72 places: of the data on the host, on the device, on their way there, and in data frames."""
    give = {"device": lambda values: ForeignArray(on_device(backend.runtime, values)), "frame": as_frame}
    give = give.get(form, lambda values: values)
    network = gm.Network(
        [gm.Dense(5, "relu", norm="batch"), gm.Dense(1)], n_features=FEATURES, dtype=np.dtype(dtype),
        device=backend if form in ("device", "stream") else "cpu", standardize=True,
    )  # fmt: skip
    trainer = gm.Trainer(network, "squared_error")
    options = {"epochs": 1, "batch_size": 16} | ({"memory_limit": 0} if form == "stream" else {})
    here = network.backend.to_numpy
    for value in NOT_FINITE:
        data, message = spoiled(argument, where, dtype, value)
        data = {name: give(values) for name, values in data.items()}
        before = here(network.flat).tobytes()
        with pytest.raises(ValueError) as error:
            trainer.fit(**data, **options)
        assert message in str(error.value)
        for call in [trainer.evaluate, *([] if argument != "X" else [lambda X, y, sample_weight: network.predict(X)])]:
            with pytest.raises(ValueError) as error:
                call(**data)
            assert message in str(error.value)
        assert here(network.flat).tobytes() == before and not network.steps.any() and network.shift is None
    trainer.fit(**{name: give(values) for name, values in good(dtype).items()}, **options)
    assert network.steps[0] == 4 and np.isfinite(here(network.flat)).all()


@peer
@pytest.mark.parametrize("form", ["array", "frame", "sparse"])
@pytest.mark.parametrize("argument, where, dtype", PLACES)
def test_estimators_name_a_value_that_is_not_finite_and_move_no_weight(argument, where, dtype, form):
    sparse = pytest.importorskip("scipy.sparse")
    labels = (np.arange(N) % CLASSES).astype(dtype)
    for model in estimators():
        classifies = isinstance(model, gm.MLPClassifier)
        first, classes = good(dtype), {"classes": range(CLASSES)} if classifies else {}
        quietly(model.partial_fit, first["X"], labels if classifies else first["y"], **classes)
        network, before = model.network_, model.network_.flat.tobytes()
        for value in NOT_FINITE:
            data, message = spoiled(argument, where, dtype, value)
            if classifies:
                data["y"] = np.where(np.isfinite(data["y"]), labels, data["y"])
            give = {"frame": as_frame, "sparse": lambda v: sparse.csr_matrix(v) if v.ndim == 2 else v}
            data = {name: give.get(form, lambda values: values)(values) for name, values in data.items()}
            calls = [model.fit, model.partial_fit]
            if form == "frame" and argument == "X":  # where NaN is a missing cell; see tests/test_estimator_tables.py
                calls = calls[1:]
            calls += [lambda X, y, sample_weight, model=model: model.predict(X)] if argument == "X" else []
            for call in calls:
                with pytest.raises(ValueError) as error:
                    call(**data)
                assert message in str(error.value)
            assert model.network_ is network and network.flat.tobytes() == before and network.steps[0] == 1


def test_a_number_beyond_float32_is_refused_on_the_device_too(backend):
    X, y = good("f8")["X"], np.arange(N) % CLASSES
    X[17, 3] = -1e39
    network = gm.Network([gm.Dense(CLASSES)], n_features=FEATURES, device=backend)
    there = ForeignArray(on_device(backend.runtime, X))
    message = r"X\[17, 3\] is -1e\+39, beyond the largest float32 \(3.403e\+38\); scale it or train in float64"
    for data in (X, there):
        for call in (network.predict, lambda X: gm.Trainer(network, SOFTMAX).fit(X, y)):
            with pytest.raises(ValueError, match=message):
                call(data)
    wide = gm.Network([gm.Dense(CLASSES)], n_features=FEATURES, device=backend, dtype="float64")
    assert np.isfinite(wide.logits(there).get()).all()


# --- R12: odd forms of X --------------------------------------------------------------------------------------------------

X = np.random.default_rng(0).integers(0, 2, (24, 4)).astype(np.float32)  # numbers that every dtype holds
Y = np.arange(24) % CLASSES


class Subclass(np.ndarray):
    pass


class HasArray:
    """Anything that knows how to become an array."""

    def __array__(self, dtype=None, copy=None):
        return X.astype(dtype or np.float32)


def read_only(values):
    values = values.copy()
    values.flags.writeable = False
    return values


def frame(types):
    return lambda: as_frame(X).astype(types)


def with_missing():
    table = as_frame(X).astype("Float64")
    table.iloc[5, 2] = None
    return table


def sparse(kind):
    return lambda: getattr(pytest.importorskip("scipy.sparse"), kind)(X)


def memory_map():
    with tempfile.TemporaryFile() as file:
        X.tofile(file)
        file.flush()
        return np.memmap(file, np.float32, "r", shape=X.shape)


FORMS = {  # that give what the plain array gives
    "float64": lambda: X.astype("f8"),
    "float16": lambda: X.astype("f2"),
    "long double": lambda: X.astype("g"),
    "bool": lambda: X > 0,
    "int8": lambda: X.astype("i1"),
    "uint8": lambda: X.astype("u1"),
    "int64": lambda: X.astype("i8"),
    "uint64": lambda: X.astype("u8"),
    "big-endian float32": lambda: X.astype(">f4"),
    "big-endian float64": lambda: X.astype(">f8"),
    "big-endian int16": lambda: X.astype(">i2"),
    "Fortran order": lambda: np.asfortranarray(X),
    "every second column": lambda: np.repeat(X, 2, axis=1)[:, ::2],
    "rows backwards": lambda: X[::-1].copy()[::-1],
    "transposed twice": lambda: X.T.copy().T,
    "off its alignment": lambda: np.frombuffer(b"?" + X.tobytes(), np.uint8)[1:].view(np.float32).reshape(X.shape),
    "read-only": lambda: read_only(X),
    "nested lists": lambda: X.tolist(),
    "nested tuples": lambda: tuple(map(tuple, X.tolist())),
    "a list of rows": lambda: list(X),
    "a memory map": memory_map,
    "a masked array without masked values": lambda: np.ma.masked_array(X),
    "a subclass": lambda: X.view(Subclass),
    "an object that becomes an array": HasArray,
    "a data frame": frame("float32"),
    "a data frame of integers": frame("int8"),
    "a frame of polars": lambda: pytest.importorskip("polars").DataFrame(X),
}
DIFFER = {  # (core, estimators): None where it gives what the plain array gives, else the error
    "np.matrix": (lambda: np.matrix(X), None, (TypeError, "np.matrix is not supported")),
    "objects that are numbers": (lambda: X.astype(object), (ValueError, r"X has dtype object \(mixed types\)"), None),
    "columns of several types": (
        frame({0: "int64", 1: "bool"}),
        (ValueError, r"dtype object .*X\.astype\(np\.float32\)"),
        None,
    ),
    "columns that may miss values": (frame("Float64"), (ValueError, "X has dtype object"), None),
    "missing values": (with_missing, (ValueError, "X has dtype object"), OWN_WAY),
    "None among numbers": (
        lambda: [[1, None, 2, 3]] * 24,
        (ValueError, r"X has dtype object \(mixed types\)"),
        (ValueError, "X.* NaN|X has dtype object"),
    ),
    "sparse rows": (sparse("csr_matrix"), (TypeError, r"X is a sparse matrix \(csr_matrix\); use X\.toarray"), None),
    "sparse columns": (sparse("csc_array"), (TypeError, r"sparse matrix \(csc_array\)"), None),
    "sparse coordinates": (sparse("coo_matrix"), (TypeError, r"sparse matrix \(coo_matrix\)"), None),
    "text": (
        lambda: np.full(X.shape, "a"),
        (ValueError, r"X has dtype <U1 \(text\); bool, integer or float is needed"),
        (ValueError, "could not convert string to float|dtype='numeric' is not compatible"),
    ),
    "bytes": (
        lambda: np.full(X.shape, b"a"),
        (ValueError, r"X has dtype \|S1 \(bytes\)"),
        (ValueError, "could not convert string to float|dtype='numeric' is not compatible"),
    ),
    "complex": (
        lambda: X + 1j,
        (ValueError, r"X has dtype complex64 \(complex numbers\)"),
        (ValueError, "Complex data not supported"),
    ),
    "structured": (
        lambda: np.zeros(24, [("a", "f4"), ("b", "f4")]),
        (ValueError, r"X is one-dimensional, shape \(24,\); expected \(samples, features\)"),
        ((TypeError, ValueError), "Cannot cast array data|Expected 2D array, got 1D array"),
    ),
    "raw memory": (
        lambda: np.zeros((24, 4), "V4"),
        (ValueError, r"X has dtype \|V4 \(not numbers\)"),
        (ValueError, "setting an array element|dtype='numeric' is not compatible"),
    ),
    "no rows": (
        lambda: X[:0],
        (ValueError, r"X has no rows, shape \(0, 4\)"),
        (ValueError, r"0 sample\(s\).*minimum of 1"),
    ),
    "no columns": (
        lambda: X[:, :0],
        (ValueError, r"X has no columns, shape \(24, 0\); at least one"),
        (ValueError, r"0 feature\(s\)"),
    ),
    "1-D": (
        lambda: X[:, 0],
        (ValueError, r"X is one-dimensional, shape \(24,\); expected \(samples, features\)"),
        (ValueError, "Expected 2D array, got 1D array"),
    ),
    "a series": (
        lambda: as_frame(X[:, 0]),
        (ValueError, "X is one-dimensional"),
        (ValueError, "Expected a 2-dimensional container but got .*Series"),
    ),
    "3-D": (
        lambda: X[None],
        (ValueError, r"X has shape \(1, 24, 4\); expected \(samples, features\)"),
        (ValueError, "Found array with dim 3, while dim <= 2 is required"),
    ),
    "a number": (lambda: np.float32(3), (TypeError, "X is a single float32"), (ValueError, "got scalar array")),
    "None": (lambda: None, (TypeError, "X is a single NoneType; expected an array"), (ValueError, "got scalar array")),
    "a word": (
        lambda: "word",
        (TypeError, "X is a single str; expected an array"),
        (ValueError, "could not convert string|got scalar array"),
    ),
    "a dict": (
        lambda: {"a": 1},
        (TypeError, "X is a single dict; expected an array"),
        ((TypeError, ValueError), "not 'dict'|got scalar array|expected an array, a list or a series"),
    ),
    "a set": (
        lambda: {1, 2},
        (TypeError, "X is a single set"),
        ((TypeError, ValueError), "not 'set'|got scalar array"),
    ),
    "a generator": (
        lambda: (row for row in X),
        (TypeError, "X is a single generator"),
        ((TypeError, ValueError), "not 'generator'|got scalar array"),
    ),
    "ragged lists": (
        lambda: [[1, 2, 3, 4], [5]],
        (ValueError, "X cannot be made an array: row 0 has 4 values, row 1 has 1"),
        (ValueError, "inhomogeneous shape"),
    ),
    "ragged arrays": (
        lambda: [np.ones(4), np.ones(3)],
        (ValueError, "X cannot be made an array: row 0 has 4 values, row 1 has 3"),
        (ValueError, "inhomogeneous shape"),
    ),
    "masked values": (
        lambda: np.ma.masked_array(X, mask=X > 0),
        (ValueError, r"X is a masked array with masked values; fill them with X\.filled"),
        (ValueError, r"X is a masked array with masked values; fill them with X\.filled"),
    ),
    "beyond float16": (
        lambda: np.full(X.shape, np.inf, "f2"),  # what 70,000 becomes
        (ValueError, r"X\[0, 0\] is inf; every value must be finite"),
        (ValueError, r"X\[0, 0\] is inf; every value must be finite"),
    ),
    "beyond float32": (
        lambda: np.full(X.shape, 1e39),
        (ValueError, r"X\[0, 0\] is 1e\+39, beyond the largest float32"),
        (ValueError, r"X\[0, 0\] is 1e\+39, beyond the largest float32"),
    ),
    "times": (
        lambda: X.astype("i8").astype("m8[s]"),
        (ValueError, r"X has dtype timedelta64\[s\] \(not numbers\)"),
        OWN_WAY,
    ),
    "too few columns": (lambda: X[:, :3], (ValueError, "the network takes 4 features, X has 3"), OWN_WAY),
    "too many columns": (lambda: np.ones((24, 5)), (ValueError, "the network takes 4 features, X has 5"), OWN_WAY),
}
CASES = {name: (make, None, None) for name, make in FORMS.items()} | DIFFER
NEED_OTHERS = ("frame", "series", "columns", "missing", "sparse")  # pandas, polars, scipy


def in_core(table):
    return [pytest.param(name, marks=peer if any(word in name for word in NEED_OTHERS) else ()) for name in table]


def in_estimators(table):
    return [name for name, (_, _, outcome) in table.items() if outcome is not OWN_WAY]


def core(loss=SOFTMAX, outputs=CLASSES):
    return gm.Trainer(gm.Network([gm.Dense(5, "tanh"), gm.Dense(outputs)], n_features=4, device="cpu"), loss)


def fitted(trainer, X=X, y=Y, **options):
    trainer.fit(X, y, **{"epochs": 2, "batch_size": 8} | options)
    return trainer


@functools.cache
def plain(loss=SOFTMAX, outputs=CLASSES):
    """Trained on the plain arrays."""
    return fitted(core(loss, outputs), X, Y if loss == SOFTMAX else Y.astype(np.float32))


def bits(trainer):
    return trainer.network.flat.tobytes()


def kept(value):
    """A copy to compare with later; None of what can be read only once."""
    return None if isinstance(value, types.GeneratorType) else copy.deepcopy(value)


def assert_untouched(value, before):
    if before is None:
        return
    assert type(value) is type(before)
    if hasattr(value, "toarray"):
        value, before = value.toarray(), before.toarray()
    if hasattr(value, "equals"):
        assert value.equals(before)
    elif isinstance(value, np.ndarray):
        assert (value.dtype, value.shape) == (before.dtype, before.shape)
        np.testing.assert_array_equal(value, before)
    elif isinstance(value, list):
        assert all(np.array_equal(a, b) for a, b in zip(value, before, strict=True))
    elif not isinstance(value, HasArray):
        assert value == before


def check(call, outcome, expected):
    """Call, and hold its answer against the plain array's, or its error against the table."""
    if outcome is None:
        assert quietly(call) == expected
        return
    error, message = outcome
    with pytest.raises(error, match=message):
        quietly(call)


@pytest.mark.parametrize("name", in_core(CASES))
def test_forms_of_X(name):
    make, outcome, _ = CASES[name]
    given, trained = make(), plain()
    before = kept(given)
    fresh = core()
    start = bits(fresh)
    check(lambda: bits(fitted(fresh, given)), outcome, bits(trained))
    check(lambda: trained.network.logits(given).tobytes(), outcome, trained.network.logits(X).tobytes())
    check(lambda: trained.network.predict(given).tolist(), outcome, trained.network.predict(X).tolist())
    check(lambda: trained.evaluate(given, Y), outcome, trained.evaluate(X, Y))
    assert_untouched(given, before)
    if outcome is not None:
        assert bits(fresh) == start and fresh.history == {}


def weights_of(model, *data):
    return model.fit(*data).network_.flat.tobytes()


@functools.cache
def plain_estimators():
    return [quietly(model.fit, X, Y) for model in estimators(dtype="float32")]


@peer
@pytest.mark.parametrize("name", in_estimators(CASES))
def test_forms_of_X_in_estimators(name):
    make, _, outcome = CASES[name]
    for model, trained in zip(estimators(dtype="float32"), plain_estimators(), strict=True):
        given = make()
        before = kept(given)
        check(partial(weights_of, model, given, Y), outcome, trained.network_.flat.tobytes())
        assert_untouched(given, before)
        given = make()  # a generator is used up
        check(lambda: trained.predict(given).tolist(), outcome, trained.predict(X).tolist())  # noqa: B023
        assert_untouched(given, before)


@peer
@pytest.mark.parametrize("columns", [3, 5])
def test_another_number_of_columns_at_predict(columns):
    for model in plain_estimators():
        with pytest.raises(ValueError, match=f"X has {columns} features, but MLP.* is expecting 4 features as input"):
            model.predict(np.ones((2, columns)))


def test_one_row():
    """One row can be predicted, and values be learned from it; one label is one class."""
    network = plain().network
    np.testing.assert_allclose(network.logits(X[:1]), network.logits(X)[:1], rtol=1e-5, atol=1e-6)
    history = core("squared_error", 1).fit(X[:1], [1.0], epochs=300)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    with pytest.raises(ValueError, match=r"y has one class only \(2\); training a classifier takes at least two"):
        core().fit(X[:1], [2])


# --- R12: odd forms of y and of sample_weight -------------------------------------------------------------------------

TEXT = np.array(["ape", "bee", "cow"])
LABELS = {  # (labels, core, estimators): None where weights and predictions are those of plain labels
    "int8": (lambda: Y.astype("i1"), None, None),
    "uint8": (lambda: Y.astype("u1"), None, None),
    "uint64": (lambda: Y.astype("u8"), None, None),
    "big-endian int32": (lambda: Y.astype(">i4"), None, None),
    "float64": (lambda: Y.astype("f8"), None, None),
    "float16": (lambda: Y.astype("f2"), None, None),
    "objects that are numbers": (lambda: Y.astype(object), None, (ValueError, "Unknown label type: unknown")),
    "a list": (lambda: Y.tolist(), None, None),
    "a tuple": (lambda: tuple(Y.tolist()), None, None),
    "a column": (lambda: Y[:, None], None, None),
    "every second one": (lambda: np.repeat(Y, 2)[::2], None, None),
    "backwards": (lambda: Y[::-1].copy()[::-1], None, None),
    "read-only": (lambda: read_only(Y), None, None),
    "text": (lambda: TEXT[Y], None, None),
    "text as objects": (lambda: TEXT[Y].astype(object), None, None),
    "a masked array without masked values": (lambda: np.ma.masked_array(Y), None, None),
    "a series": (lambda: as_frame(Y), None, None),
    "a series of categories": (lambda: as_frame(TEXT[Y]).astype("category"), None, None),
    "bytes": (
        lambda: TEXT[Y].astype("S"),
        (ValueError, r"y has dtype \|S3; classes must be text, bools or numbers"),
        OWN_WAY,
    ),
    "short": (
        lambda: Y[:-1],
        (ValueError, "y has 23 rows, X has 24; they must have the same number"),
        (ValueError, r"inconsistent numbers of samples: \[24, 23\]"),
    ),
    "long": (
        lambda: np.append(Y, 0),
        (ValueError, "y has 25 rows, X has 24"),
        (ValueError, r"inconsistent numbers of samples: \[24, 25\]"),
    ),
    "no rows": (lambda: Y[:0], (ValueError, "y has 0 rows, X has 24"), (ValueError, r"samples: \[24, 0\]|0 sample")),
    "None": (lambda: None, (TypeError, "y is a single NoneType"), (ValueError, "requires y to be passed")),
    "a number": (
        lambda: 1,
        (TypeError, "y is a single int"),
        ((TypeError, ValueError), "scalar|Singleton|input should be"),
    ),
    "a dict": (
        lambda: {"a": 1},
        (TypeError, "y is a single dict"),
        ((TypeError, ValueError), "got scalar|label type"),
    ),
    "two columns": (
        lambda: np.stack([Y, Y], axis=1),
        (ValueError, r"y has shape \(24, 2\); expected \(24, 3\) or labels of shape \(24,\)"),
        (ValueError, "Multioutput target data is not supported"),
    ),
    "3-D": (
        lambda: Y[:, None, None],
        (ValueError, r"y has shape \(24, 1, 1\)"),
        (ValueError, "dim 3|Unknown label type"),
    ),
    "ragged": (
        lambda: [[0], [1, 2]] * 12,
        (ValueError, "y cannot be made an array: row 0 has 1 values, row 1 has 2"),
        (ValueError, "inhomogeneous|sequence of sequences"),
    ),
    "complex": (lambda: Y + 1j, (ValueError, "y has dtype complex128"), (ValueError, "Complex data not supported")),
    "fractions": (
        lambda: Y + 0.5,
        (ValueError, r"y\[0\] is 0.5; labels must be integers in \[0, 3\), since the network has 3 outputs"),
        (ValueError, "Unknown label type: continuous"),
    ),
    "too large a label": (lambda: Y + 1, (ValueError, r"y\[2\] is 3; labels must be integers in \[0, 3\)"), OWN_WAY),
    "a negative label": (lambda: Y - 1, (ValueError, r"y\[0\] is -1; labels must be"), OWN_WAY),
    "numbers and text": (
        lambda: np.array([0, "b", 2] * 8, dtype=object),
        (ValueError, r"y\[1\] is 'b'; classes must be all text, all bools or all numbers"),
        ((TypeError, ValueError), "not supported between|mix|uniformly|Unknown label type"),
    ),
    "None among text": (
        lambda: np.array(["a", None, "c"] * 8, dtype=object),
        (ValueError, r"y\[1\] is None; classes must be all text"),
        ((TypeError, ValueError), "None|not supported between|uniformly"),
    ),
    "masked values": (
        lambda: np.ma.masked_array(Y, mask=Y > 1),
        (ValueError, r"y is a masked array with masked values; fill them with y\.filled"),
        (ValueError, r"y is a masked array with masked values; fill them with y\.filled"),
    ),
    "one class": (lambda: np.ones(24, int), (ValueError, r"y has one class only \(1\)"), OWN_WAY),
    "a missing category": (
        lambda: as_frame(TEXT[Y]).where(Y > 0),
        (ValueError, r"y\[0\] is nan; classes must be all text"),
        ((TypeError, ValueError), "NaN|not supported between"),
    ),
}


@pytest.mark.parametrize("name", in_core(LABELS))
def test_forms_of_labels(name):
    make, outcome, _ = LABELS[name]
    given, fresh = make(), core()
    before, start = kept(given), bits(fresh)
    check(lambda: bits(fitted(fresh, X, given)), outcome, bits(plain()))
    if outcome is None:
        assert fresh.evaluate(X, given) == plain().evaluate(X, Y)
        names = np.asarray(given).reshape(-1)
        assert (fresh.network.predict(X) == names).mean() == (plain().network.predict(X) == Y).mean()
    else:
        assert bits(fresh) == start and fresh.network.classes is None
    assert_untouched(given, before)


@peer
@pytest.mark.parametrize("name", in_estimators(LABELS))
def test_forms_of_labels_in_estimators(name):
    make, _, outcome = LABELS[name]
    given = make()
    before = kept(given)
    model, expected = estimators(dtype="float32")[0], plain_estimators()[0]
    check(partial(weights_of, model, X, given), outcome, expected.network_.flat.tobytes())
    if outcome is None:
        assert (model.predict(X) == np.asarray(given).reshape(-1)).mean() == (expected.predict(X) == Y).mean()
    assert_untouched(given, before)


def test_a_class_that_training_has_not_seen():
    named = fitted(core(), X, TEXT[Y])
    with pytest.raises(
        ValueError, match=r"evaluation y\[0\] is 'dog', an unknown class; known are 'ape', 'bee', 'cow'"
    ):
        named.evaluate(X, ["dog"] * 24)
    with pytest.raises(ValueError, match=r"y\[2\] is 'dog', an unknown class"):
        named.fit(X, np.where(Y == 2, "dog", TEXT[Y]))


@peer
def test_a_class_that_an_estimator_has_not_seen():
    model = copy.deepcopy(plain_estimators()[0])
    with pytest.raises(ValueError, match=r"`y` has classes not in `self\.classes_`"):
        model.partial_fit(X, Y + 1)
    one = quietly(estimators()[0].fit, X, np.full(24, 7))
    assert one.predict(X).tolist() == [7] * 24


AS_NUMBERS = object()  # of its own values
VALUES = {
    "float64": (lambda: Y.astype("f8"), None, None),
    "float16": (lambda: Y.astype("f2"), None, None),
    "long double": (lambda: Y.astype("g"), None, None),
    "bool": (lambda: Y > 0, AS_NUMBERS, AS_NUMBERS),
    "int8": (lambda: Y.astype("i1"), None, None),
    "big-endian": (lambda: Y.astype(">f4"), None, None),
    "a list": (lambda: Y.tolist(), None, None),
    "a column": (lambda: Y[:, None].astype("f4"), None, None),
    "every second one": (lambda: np.repeat(Y, 2)[::2].astype("f4"), None, None),
    "read-only": (lambda: read_only(Y.astype("f4")), None, None),
    "a series": (lambda: as_frame(Y.astype("f4")), None, None),
    "text": (lambda: TEXT[Y], (ValueError, "y holds text or mixed types"), (ValueError, "y holds text or mixed types")),
    "complex": (lambda: Y + 1j, (ValueError, "y has dtype complex128"), (ValueError, "Complex data not supported")),
    "two columns": (
        lambda: np.stack([Y, Y], 1),
        (ValueError, r"shape \(24, 2\); expected \(24, 1\) or \(24,\)"),
        OWN_WAY,
    ),
    "beyond float16": (
        lambda: np.full(24, np.inf, "f2"),
        (ValueError, r"y\[0\] is inf; every value must be finite"),
        (ValueError, r"y\[0\] is inf; every value must be finite"),
    ),
    "beyond float32": (
        lambda: np.full(24, 1e39),
        (ValueError, r"y\[0\] is 1e\+39, beyond the largest float32"),
        (ValueError, r"y\[0, 0\] is 1e\+39, beyond the largest float32"),
    ),
    "masked values": (
        lambda: np.ma.masked_array(Y, mask=Y > 1),
        (ValueError, "y is a masked array with masked values"),
        (ValueError, "y is a masked array with masked values"),
    ),
}


@pytest.mark.parametrize("name", in_core(VALUES))
def test_forms_of_values(name):
    make, outcome, _ = VALUES[name]
    given, fresh = make(), core("squared_error", 1)
    before = kept(given)
    if outcome is AS_NUMBERS:
        expected = fitted(core("squared_error", 1), X, given.astype(np.float32))
        outcome = None
    else:
        expected = plain("squared_error", 1)
    check(lambda: bits(fitted(fresh, X, given)), outcome, bits(expected))
    assert_untouched(given, before)


@peer
@pytest.mark.parametrize("name", in_estimators(VALUES))
def test_forms_of_values_in_estimators(name):
    make, _, outcome = VALUES[name]
    given, model, expected = make(), estimators(dtype="float32")[1], plain_estimators()[1]
    if outcome is AS_NUMBERS:
        expected, outcome = quietly(estimators(dtype="float32")[1].fit, X, given.astype(np.float32)), None
    before = kept(given)
    check(partial(weights_of, model, X, given), outcome, expected.network_.flat.tobytes())
    assert_untouched(given, before)


WEIGHT = np.arange(24) % 4
WEIGHTS = {
    "int8": (lambda: WEIGHT.astype("i1"), None, None),
    "float16": (lambda: WEIGHT.astype("f2"), None, None),
    "big-endian": (lambda: WEIGHT.astype(">f8"), None, None),
    "a list": (lambda: WEIGHT.tolist(), None, None),
    "every second one": (lambda: np.repeat(WEIGHT, 2)[::2].astype("f4"), None, None),
    "read-only": (lambda: read_only(WEIGHT.astype("f4")), None, None),
    "a series": (lambda: as_frame(WEIGHT), None, None),
    "short": (
        lambda: WEIGHT[:-1],
        (ValueError, r"sample_weight has shape \(23,\); expected one weight per sample, shape \(24,\)"),
        (ValueError, r"sample_weight.shape == \(23,\), expected \(24,\)"),
    ),
    "a column": (
        lambda: WEIGHT[:, None],
        (ValueError, r"sample_weight has shape \(24, 1\); expected"),
        (ValueError, "Sample weights must be 1D"),
    ),
    "negative": (
        lambda: WEIGHT - 1.0,
        (ValueError, r"sample_weight\[0\] is -1.0; weights must be >= 0"),
        (ValueError, r"sample_weight\[0\] is -1.0; weights must be >= 0"),
    ),
    "zero": (
        lambda: np.zeros(24),
        (ValueError, "sample_weight is zero for every sample"),
        (ValueError, "zero"),
    ),
    "text": (
        lambda: TEXT[Y],
        (ValueError, "sample_weight has dtype <U3"),
        (ValueError, "could not convert string|not compatible"),
    ),
    "a number": (lambda: 2.0, (TypeError, "sample_weight is a single float"), OWN_WAY),
    "masked values": (
        lambda: np.ma.masked_array(WEIGHT, mask=WEIGHT > 1),
        (ValueError, "sample_weight is a masked array with masked values"),
        (ValueError, "sample_weight is a masked array with masked values"),
    ),
}


@pytest.mark.parametrize("name", in_core(WEIGHTS))
def test_forms_of_sample_weight(name):
    make, outcome, _ = WEIGHTS[name]
    given, fresh = make(), core()
    before, expected = kept(given), fitted(core(), sample_weight=WEIGHT.astype(np.float32))
    check(lambda: bits(fitted(fresh, sample_weight=given)), outcome, bits(expected))
    assert_untouched(given, before)


@peer
@pytest.mark.parametrize("name", in_estimators(WEIGHTS))
def test_forms_of_sample_weight_in_estimators(name):
    make, _, outcome = WEIGHTS[name]
    for model, reference in zip(estimators(dtype="float32"), estimators(dtype="float32"), strict=True):
        given = make()
        before, expected = kept(given), quietly(reference.fit, X, Y, WEIGHT.astype(np.float32))
        check(partial(weights_of, model, X, Y, given), outcome, expected.network_.flat.tobytes())
        assert_untouched(given, before)
