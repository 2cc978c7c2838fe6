"""Tables of numbers, categories and missing cells: what is inferred, learned, encoded, refused and stored."""

import csv
import gzip
import json
import os
from decimal import Decimal
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from gpumlp.data import encoding
from gpumlp.data.encoding import CategoryColumn, NumberColumn, TableEncoder, tensor_forms
from gpumlp.data.table import Table, read_table

REAL = Path(os.environ.get("GPUMLP_DATA", Path(__file__).parents[2] / "shared" / "data"))
NAN = float("nan")
PEOPLE = {
    "age": [20, None, 40, 60, 30, NAN],
    "city": ["Rome", " Oslo", None, "?", "Rome", ""],
    "member": [True, False, True, None, True, False],
    "income": np.array([1.5, 2.5, 3.5, 4.5, 5.5, 6.5]),
}


def fitted(table, **options):
    return TableEncoder(**options).fit(table)


def one_number(values, **options):
    """The number of a lone column, encoded."""
    return fitted({"x": values}, **options).transform({"x": values})[:, 0]


def kinds(encoder):
    return ["number" if isinstance(column, NumberColumn) else "category" for column in encoder.columns]


# what is inferred


def test_people():
    encoder = fitted(PEOPLE, scaling=None)
    encoded = encoder.transform(PEOPLE)
    assert encoder.output_names == [
        *("age", "age missing", "city=Oslo", "city=Rome", "city missing"),
        *("member=False", "member=True", "member missing", "income"),
    ]
    assert encoded.dtype == np.float32 and encoded.flags.c_contiguous
    assert encoded.tolist() == [
        [20, 0, 0, 1, 0, 0, 1, 0, 1.5],
        [35, 1, 1, 0, 0, 1, 0, 0, 2.5],
        [40, 0, 0, 0, 1, 0, 1, 0, 3.5],
        [60, 0, 0, 0, 1, 0, 0, 1, 4.5],
        [30, 0, 0, 1, 0, 0, 1, 0, 5.5],
        [35, 1, 0, 0, 1, 1, 0, 0, 6.5],
    ]
    assert encoder.n_features == 9 and encoder.feature_names == list(PEOPLE)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([1, 2.5, None], "number"),
        ([Decimal("1.5"), np.float32(2), "?"], "number"),
        (np.array([1, 2], np.uint8), "number"),
        (np.array([1, None], object), "number"),
        (np.array([NAN, NAN]), "number"),
        ([None, None], "category"),  # nothing says that these are numbers
        ([True, False], "category"),
        (np.array([True, False]), "category"),
        (["1", "2"], "category"),
        (np.array(["1", "2"]), "category"),
        ([b"a", "a"], "category"),
        ([1, "a"], "category"),
        ([1, True], "category"),
    ],
)
def test_auto(cells, kind):
    encoder = fitted({"x": cells})
    assert kinds(encoder) == [kind]
    assert np.isfinite(encoder.transform({"x": cells})).all()


def test_text_without_a_type_is_a_number_where_every_cell_is():
    text = {"n": ["1", "", "3"], "c": ["1", "a", "?"], "m": ["?", "?", ""]}
    encoder = fitted(Table(np.empty((3, 0), np.float32), text, np.arange(3)))
    assert kinds(encoder) == ["number", "category", "category"] and encoder.columns[0].fill == 2.0
    assert kinds(fitted(np.array([["1", "a"], ["2", "b"]]))) == ["number", "category"]
    assert kinds(fitted(np.array([[b"1", b"a"], [b"2", b"b"]]))) == ["number", "category"]


def test_csv_reader(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("size,colour\n1,red\n 3, blue\n")
    encoder = fitted(read_table(path, [], ["size", "colour"]), scaling=None)
    assert encoder.transform({"colour": ["blue"], "size": [7]}).tolist() == [[7, 1, 0]]
    with pytest.raises(ValueError, match=r"the Table has 1 columns of numbers, whose names it does not know; read all"):
        encoder.transform(read_table(path, ["size"], ["colour"]))


def test_arrays_and_lists_of_rows():
    rows = [[39, "State-gov", NAN], [50, None, 2.0]]
    for table in (rows, np.array(rows, dtype=object)):
        encoder = fitted(table, scaling=None)
        assert encoder.feature_names is None
        assert encoder.output_names == ["x0", "x1=State-gov", "x1 missing", "x2", "x2 missing"]
        assert encoder.transform(table).tolist() == [[39, 1, 0, 2, 1], [50, 0, 1, 2, 0]]
    assert kinds(fitted(np.eye(3, dtype=bool))) == ["category"] * 3
    assert kinds(fitted(np.eye(3, dtype="f2"))) == ["number"] * 3


def test_chosen_columns():
    X = np.array([[1, 5.0], [2, 6.0], [1, NAN]])
    assert fitted(X, categorical_features=[0]).output_names == ["x0=1", "x0=2", "x1", "x1 missing"]
    table = {"a": X[:, 0], "b": X[:, 1], "c": [True, False, None]}
    assert kinds(fitted(table, categorical_features=["a", np.int64(1)])) == ["category", "category", "number"]
    assert kinds(fitted(table, categorical_features=None)) == ["number"] * 3
    assert fitted(table, categorical_features=None, scaling=None).transform(table)[:, -2].tolist() == [1, 0, 0.5]


def test_a_category_is_known_by_its_text():
    encoder = fitted({"x": [1, 2, None]}, categorical_features=["x"])
    assert encoder.columns[0].words == ("1", "2")
    for cells in (["1", " 2", "?"], np.array([1.0, 2.0, NAN]), np.array([1, 2, NAN], "f4"), [1, "2", ""]):
        assert encoder.transform({"x": cells}).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    single = fitted({"x": np.array([0.1, 2.5], "f4")}, categorical_features=["x"])
    assert single.columns[0].words == ("0.1", "2.5")
    for cells in ([True, 1], [1, True]):  # equal keys of a dict, but not the same category
        assert fitted({"x": cells}).columns[0].words == ("1", "True")


# categories


def test_many_categories_become_codes():
    table = {"few": list("abab"), "many": ["z", "x", None, "y"], "n": [1, 2, 3, 4]}
    encoder = fitted(table, one_hot_limit=3)
    encoded = encoder.transform(table)
    assert encoder.code_names == ["many"] and encoder.code_sizes == [5] and encoder.n_features == 4
    assert encoder.output_names == ["few=a", "few=b", "n", "many"]
    assert encoded[:, -1].tolist() == [3, 1, 4, 2] and encoded[:, :2].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert fitted(table, one_hot_limit=4).code_names == []  # a missing cell counts as a category
    assert fitted(table, one_hot_limit=0).code_sizes == [3, 5]


def test_unknown_categories():
    table = {"a": ["x", "y", "x"], "b": ["p", "q", "r"]}
    encoder = fitted(table, one_hot_limit=2)
    encoded = encoder.transform({"a": ["new", None, "y"], "b": ["new", None, "r"]})
    assert encoded.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 3]]


def test_the_number_of_categories_is_bounded(monkeypatch):
    monkeypatch.setattr(encoding, "MAX_CATEGORIES", 3)
    fitted({"id": list("abc")})
    message = "the table has 4 categories, at most 3 are allowed; 'id' has 3: leave such a column out"
    with pytest.raises(ValueError, match=message):
        fitted({"x": list("aaa"), "id": list("abc")})


# numbers


def test_imputation():
    table = {"x": [0.0, 1.0, NAN, 8.0], "y": [1.0, 2.0, 3.0, 4.0]}
    encoder = fitted(table, impute="mean", scaling=None)
    assert encoder.output_names == ["x", "x missing", "y"]
    assert encoder.transform({"x": [NAN], "y": [NAN]}).tolist() == [[3.0, 1.0, 2.5]]
    assert fitted(table, scaling=None).transform({"x": [NAN], "y": [NAN]}).tolist() == [[1.0, 1.0, 2.5]]
    empty = fitted({"x": np.array([NAN, NAN])})
    assert empty.transform({"x": [NAN, 3.0]}).tolist() == [[0, 1], [3, 0]]


def test_the_table_is_left_as_it_was():
    values = np.array([1.0, NAN, 3.0])
    one_number(values)
    assert np.isnan(values[1]) and values[0] == 1.0


def test_standard_scaling():
    x = np.random.default_rng(0).normal(1.7e9, 40.0, 5000)  # seconds since 1970, beyond float32's digits
    scaled = one_number(x)
    assert abs(scaled.mean()) < 1e-5 and scaled.std() == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(scaled, (x - x.mean()) / x.std(), atol=1e-5)


def test_robust_scaling():
    x = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 1000])
    assert np.allclose(one_number(x, scaling="robust"), (x - 4) / 4)
    mostly = np.array([0.0] * 9 + [50.0])  # quartiles equal: by the deviation
    assert np.allclose(one_number(mostly, scaling="robust"), mostly / mostly.std())


@pytest.mark.parametrize("scaling", ["standard", "robust", "quantile", "piecewise"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e-40])
def test_constant_columns_become_zero(scaling, value):
    assert not one_number(np.full(7, value), scaling=scaling).any()


def test_quantile_scaling():
    x = np.random.default_rng(1).exponential(size=20_000) ** 3
    encoder = fitted({"x": x}, scaling="quantile")
    z = encoder.transform({"x": x})[:, 0]
    assert encoder.columns[0].quantiles.shape == (1000,)
    assert abs(z.mean()) < 0.01 and z.std() == pytest.approx(1.0, abs=0.01)
    assert (np.diff(z[np.argsort(x)]) >= 0).all()
    end = NormalDist().inv_cdf(1 - 0.5 / 1000)
    beyond = encoder.transform({"x": [-1e9, x.min(), x.max(), 1e9]})[:, 0]
    assert np.allclose(beyond, [-end, -end, end, end], atol=1e-6)
    assert one_number([3.0, 1.0, 2.0], scaling="quantile") == pytest.approx([0.9674, -0.9674, 0.0], abs=1e-4)


def test_quantile_scaling_of_ties():
    """A value with many cells gets the score of the middle of their ranks: here 90 % of the cells are 0."""
    z = one_number(np.array([0.0] * 900 + list(range(1, 101))), scaling="quantile")
    assert z[0] == pytest.approx(NormalDist().inv_cdf(0.45), abs=2e-3)
    assert np.allclose(z[:900], z[0]) and (np.diff(z[900:]) > 0).all() and z[900] > 1.2


def test_piecewise_scaling():
    """Equation 1 of Gorishniy et al. 2022, and the standardised number before it."""
    x = np.random.default_rng(1).exponential(size=5_000)
    encoder = fitted({"x": x}, scaling="piecewise")
    edges, X = encoder.columns[0].quantiles, encoder.transform({"x": x})
    assert len(edges) == 65 and X.shape == (5_000, 65) and encoder.output_names[1:3] == ["x piece 0", "x piece 1"]
    assert np.allclose(X[:, 0], (x - x.mean()) / x.std(), atol=1e-5)
    lengths = np.diff(edges)
    assert np.allclose(
        X[:, 1:] @ lengths, x - edges[0], atol=1e-5
    )  # so any piecewise linear function is one product away
    within = ((X[:, 1:] > 0) & (X[:, 1:] < 1)).sum(axis=1)
    assert within.max() == 1 and (np.diff(X[:, 1:], axis=1) <= 0).all()  # whole pieces, one in part, empty ones
    beyond = encoder.transform({"x": [-1.0, 1e6]})
    assert not beyond[0, 1:].any() and (beyond[1, 1:] == 1).all() and beyond[1, 0] > 1e5


def test_pieces_of_few_values():
    table = {"x": [0.0, 0.0, 0.0, 5.0], "constant": [3.0] * 4, "gap": [1.0, NAN, 2.0, 2.0]}
    encoder = fitted(table, scaling="piecewise")
    widths = [column.pieces for column in encoder.columns]
    assert widths[1] == 0 and encoder.n_features == sum(widths) + 4
    X = encoder.transform(table)
    assert np.isfinite(X).all() and X[:, -1].tolist() == [0, 1, 0, 0]
    assert np.isfinite(encoder.transform({**table, "x": [1e-300, 3e38, -3e38, NAN]})[:, 1 : widths[0]]).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r'column "x", row 1: -?inf is infinite; correct the cell, or make it missing'):
        fitted({"x": [1.0, value]})


def test_numbers_beyond_float32_are_refused():
    with pytest.raises(ValueError, match=r'column "x", row 1: 1e\+300 is too large for float32'):
        fitted({"x": [1.0, 1e300]})
    encoder = fitted({"x": np.array([0.0, 1e-20])})
    with pytest.raises(ValueError, match=r'column "x", row 1: 1e\+20 is beyond float32 once scaled; correct the cell'):
        encoder.transform({"x": [1.0, 1e20]})


# rows, columns and their names


def test_only_the_training_rows_are_learned():
    table = {"n": [1.0, 3.0, 99.0, NAN], "c": ["a", "b", "held out", None]}
    for rows in ([0, 1], np.array([True, True, False, False])):
        encoder = TableEncoder(scaling=None).fit(table, rows)
        assert encoder.output_names == ["n", "c=a", "c=b"]
        assert encoder.transform(table).tolist() == [[1, 1, 0], [3, 0, 1], [99, 0, 0], [2, 0, 0]]
    with pytest.raises(ValueError, match="rows chooses no rows"):
        TableEncoder().fit(table, np.zeros(4, bool))


def test_columns_are_taken_by_name():
    encoder = fitted(PEOPLE)
    turned = dict(reversed({**PEOPLE, "ignored": np.zeros(6, "M8[D]")}.items()))
    assert np.array_equal(encoder.transform(turned), encoder.transform(PEOPLE))
    with pytest.raises(
        ValueError, match=r"the table lacks the columns 'city', 'income'; its columns are 'age', 'member'"
    ):
        encoder.transform({name: PEOPLE[name] for name in ("age", "member")})


def test_without_names_the_width_must_match():
    encoder = fitted(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="the table has 2 columns, the encoder was fitted to 3; without names in both"):
        encoder.transform(np.zeros((2, 2)))
    assert encoder.transform({"a": [1.0], "b": [0.0], "c": [0.0]}).tolist() == [[1, 0, 0]]
    named = fitted({"a": [1, 2], "b": ["x", "y"]}, scaling=None)
    assert named.transform([[3, "y"]]).tolist() == [[3, 0, 1]]


def test_a_fit_that_fails_leaves_the_encoder_as_it_was():
    encoder = fitted({"x": [1.0, 2.0]}, scaling=None)
    with pytest.raises(ValueError, match="infinite"):
        encoder.fit({"y": [1.0, np.inf]})
    assert encoder.transform({"x": [5.0]}).tolist() == [[5.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impute": "zero"}, "impute is 'zero'; it must be 'median' or 'mean'"),
        (
            {"scaling": "minmax"},
            "scaling is 'minmax'; it must be None, 'standard', 'robust', 'quantile' or 'piecewise'",
        ),
        ({"one_hot_limit": -1}, "one_hot_limit is -1; it must be a whole number, at least 0"),
        ({"one_hot_limit": True}, "one_hot_limit is True"),
        ({"one_hot_limit": 2.5}, "one_hot_limit is 2.5"),
        ({"categorical_features": "city"}, "categorical_features is 'city'; it must be 'auto', None, or a list"),
        ({"categorical_features": 3}, "categorical_features is 3; it must be 'auto'"),
        ({"categorical_features": [1.5]}, "categorical_features has 1.5; it must hold names or positions"),
        ({"categorical_features": [True]}, "categorical_features has True; it must hold names or positions"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TableEncoder(**options)


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        (None, {}, TypeError, "the table is a NoneType; expected a pandas, polars or pyarrow table, a dict of columns"),
        ("adult.csv", {}, TypeError, "the table is a str"),
        (np.ma.zeros((2, 2)), {}, TypeError, "the table is a masked array; pass table.astype"),
        (np.zeros(3), {}, ValueError, r"the table has shape \(3,\); expected \(samples, features\)"),
        ([1, 2], {}, ValueError, r"the table has shape \(2,\)"),
        ([[1, 2], [3]], {}, ValueError, r"the table has shape \(2,\)|different lengths"),
        ({}, {}, ValueError, "the table has no columns"),
        (np.zeros((3, 0)), {}, ValueError, "the table has no columns"),
        (np.zeros((0, 3)), {}, ValueError, "the table has no rows"),
        ({"a": []}, {}, ValueError, "the table has no rows"),
        ({"a": [1], "b": [1, 2]}, {}, ValueError, 'column "a" has 1 cells, column "b" has 2; all columns'),
        ({"a": [1], 0: [1]}, {}, ValueError, "the column name 0 is not text, others are; make all names text"),
        ({"a": 3}, {}, TypeError, 'column "a" is a int; expected an array, a list or a series'),
        ({"a": np.ma.zeros(2)}, {}, TypeError, 'column "a" is a MaskedArray'),
        ({"a": np.zeros((2, 2))}, {}, ValueError, r'column "a" has shape \(2, 2\); a column must be one-dimensional'),
        (
            {"a": np.array(["2020"], "M8[D]")},
            {},
            TypeError,
            r'column "a" holds dates or times .*; make numbers of them',
        ),
        ({"a": [np.datetime64("2020")]}, {}, TypeError, 'column "a" holds dates or times'),
        ({"a": np.zeros(2, complex)}, {}, TypeError, 'column "a" has dtype complex128; expected numbers, text, bools'),
        (
            {"a": [1j]},
            {},
            TypeError,
            'column "a" holds cells of type complex; a cell must be a number, a text or a bool',
        ),
        ({"a": [{}, None]}, {}, TypeError, 'column "a" holds cells of type dict'),
        (
            {"a": ["1", "x"]},
            {"categorical_features": None},
            ValueError,
            "row 1: 'x' is not a number; correct the cell, or",
        ),
        ({"a": ["1_0"]}, {"categorical_features": None}, ValueError, "row 0: '1_0' is not a number"),
        (
            {"a": [1]},
            {"categorical_features": ["b"]},
            ValueError,
            "names 'b', which the table does not have; its columns",
        ),
        (np.eye(2), {"categorical_features": ["b"]}, ValueError, "its columns have no names; use positions"),
        (np.eye(2), {"categorical_features": [2]}, ValueError, "categorical_features has 2; positions go from 0 to 1"),
        (np.eye(2), {"categorical_features": [-1]}, ValueError, "categorical_features has -1"),
    ],
)
def test_wrong_tables(table, options, error, message):
    with pytest.raises(error, match=message):
        fitted(table, **options)


def test_before_fit():
    for use in (lambda e: e.transform(PEOPLE), TableEncoder.describe, TableEncoder.report, lambda e: e.n_features):
        with pytest.raises(RuntimeError, match="the encoder has learned nothing yet; call fit first"):
            use(TableEncoder())


def test_a_number_column_refuses_text_later():
    encoder = fitted(PEOPLE)
    with pytest.raises(ValueError, match="column \"age\", row 2: 'old' is not a number"):
        encoder.transform({**PEOPLE, "age": ["20", 30, "old", 1, 2, 3]})


# report and plain data


def test_report():
    table = {**PEOPLE, "id": ["1", "2", "3", "4", "5x", "6"]}
    assert fitted(table, one_hot_limit=4).report().split("\n") == [
        "age     number, standard scaling; 2 missing cells filled with 35, and an indicator",
        "city    2 categories, one-hot; 3 missing cells, a category of their own",
        "member  2 categories, one-hot; 1 missing cell, a category of their own",
        "income  number, standard scaling",
        "id      6 categories, as codes 0 to 6; all but 1 of them are numbers ('5x' is not)",
    ]
    assert fitted(np.ones((2, 1)), scaling=None).report() == "x0  number"


OPTIONS = [
    {},
    {"scaling": None, "impute": "mean", "categorical_features": ["age", 1, 2]},
    {"scaling": "quantile", "one_hot_limit": 2},
    {"scaling": "robust", "one_hot_limit": 0},
    {"scaling": "piecewise"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("named", [True, False])
def test_plain_data_and_back(options, named):
    table = PEOPLE if named else np.array(list(PEOPLE.values()), dtype=object).T
    if not named and "categorical_features" in options:
        options = {**options, "categorical_features": [0, 1, 2]}
    encoder = fitted(table, **options)
    config, tensors = json.loads(json.dumps(encoder.describe(), allow_nan=False)), encoder.tensors()
    assert {name: (values.dtype, values.shape) for name, values in tensors.items()} == tensor_forms(config)
    again = TableEncoder.from_description(config, tensors)
    assert again.describe() == config and again.report() == encoder.report()
    assert again.feature_names == encoder.feature_names and again.output_names == encoder.output_names
    for name, values in again.tensors().items():
        assert values.dtype == tensors[name].dtype and np.array_equal(values, tensors[name])
    assert np.array_equal(again.transform(table), encoder.transform(table))


def test_only_numbers_or_only_categories_have_no_empty_arrays():
    assert fitted(np.eye(2)).tensors().keys() == {"numbers"}
    assert fitted({"a": ["ü", "\ud800"]}).tensors().keys() == {"words", "word_ends"}
    nothing = fitted({"a": [None, None]})
    assert nothing.tensors() == {} and nothing.n_features == 1
    for encoder in (fitted({"a": ["ü", "\ud800", "日本"]}), nothing):
        again = TableEncoder.from_description(encoder.describe(), encoder.tensors())
        assert again.columns[0].words == encoder.columns[0].words


def test_wrong_configurations():
    encoder = fitted(PEOPLE, scaling="quantile")
    config, tensors = encoder.describe(), encoder.tensors()
    assert config["kinds"] == "noon" and config["words"] == [2, 2]
    for change in (
        *({"kinds": value} for value in (3, "", [], None, "noo", "noox", "noonn", {}, ["n", "o", "o", "n"])),
        *({"names": value} for value in (3, [], ["a"] * 4, [1, 2, 3, 4], ["a", "b", "c"], {}, "abcd")),
        *({"missing": [value, 0, 0, 0]} for value in (-1, True, 0.5, None)),
        *({"missing": value} for value in ([], 3, None, "0000")),
        *({"words": [2, value]} for value in (-1, 1 << 40, "2", 1)),
        *({"words": value} for value in ([], [4], 3, None)),
        *({"n_quantiles": value} for value in (-1, 0, 1 << 40, 5, None)),
        *({"n_word_bytes": value} for value in (-1, 3, None)),
        *({"scaling": value} for value in (None, "x", [])),
        *({"impute": value} for value in (None, {})),
    ):
        with pytest.raises(ValueError, match=r"table encoder|impute is"):
            TableEncoder.from_description({**config, **change}, tensors)
    for key in config:
        with pytest.raises(ValueError, match="not a table encoder's configuration: KeyError"):
            tensor_forms({name: value for name, value in config.items() if name != key})


def test_wrong_tensors():
    encoder = fitted(PEOPLE, scaling="quantile")
    config, tensors = encoder.describe(), encoder.tensors()

    def refused(name, values, message):
        with pytest.raises(ValueError, match=message):
            TableEncoder.from_description(config, {**tensors, name: values})

    refused("numbers", tensors["numbers"][:1], "with the tensors .* its configuration describes")
    refused("numbers", tensors["numbers"].astype("f4"), "with the tensors .* its configuration describes")
    refused("numbers", tensors["numbers"] * NAN, "whose numbers are not all finite")
    refused("scores", tensors["scores"][:, ::-1], "whose scores are not in ascending order")
    refused("word_ends", tensors["word_ends"][::-1].copy(), "whose word_ends do not divide its words")
    refused("word_ends", tensors["word_ends"] - 1, "whose word_ends do not divide its words")
    refused("words", np.full_like(tensors["words"], 255), "codec can't decode")
    refused("words", np.full_like(tensors["words"], 97), "categories of 'member' are not in ascending order|of 'city'")
    with pytest.raises(ValueError, match="with the tensors"):
        TableEncoder.from_description(config, {**tensors, "more": np.zeros(1)})


def test_deterministic():
    rng = np.random.default_rng(2)
    table = {"n": rng.normal(size=500), "c": rng.choice(list("abcdefg"), 500), "o": [None, "x", 3, True] * 125}
    order = rng.permutation(500)
    turned = {name: np.array(column, dtype=object)[order] for name, column in table.items()}
    for options in ({"scaling": "quantile"}, {"scaling": "robust", "one_hot_limit": 3}):
        first, second = fitted(table, **options), fitted(turned, **options)
        assert first.describe() == second.describe()  # the order of the rows does not matter
        assert all(np.array_equal(values, second.tensors()[name]) for name, values in first.tensors().items())
        assert np.array_equal(first.transform(table)[order], second.transform(turned))


# other libraries' tables


def like(table, reference=PEOPLE, **options):
    """Whether a table is encoded as the dict of the same content is."""
    encoder, expected = fitted(table, **options), fitted(reference, **options)
    assert encoder.describe() == expected.describe()
    assert np.array_equal(encoder.transform(table), expected.transform(reference))
    assert np.array_equal(expected.transform(table), expected.transform(reference))
    return encoder


def test_pandas():
    pd = pytest.importorskip("pandas")
    like(pd.DataFrame(PEOPLE))
    like(pd.DataFrame(PEOPLE, index=list("uvwxyz")))
    types = {"age": "Int64", "city": "category", "member": "boolean", "income": "Float32"}
    like(pd.DataFrame(PEOPLE).astype(types))
    like({name: pd.Series(column) for name, column in PEOPLE.items()})
    codes = pd.DataFrame({"k": pd.Categorical([3, 1, None, 3])})
    assert fitted(codes).columns[0].words == ("1", "3") and fitted(codes).columns[0].missing == 1
    assert fitted(pd.DataFrame(np.eye(2))).feature_names is None
    with pytest.raises(ValueError, match="two columns are named 'a'; rename one"):
        fitted(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    dates = pd.DataFrame({"t": pd.to_datetime(["2020-01-01", None])})
    for frame in (dates, dates.astype(object), dates["t"].dt.tz_localize("UTC").to_frame()):
        with pytest.raises(TypeError, match='column "t" holds dates or times'):
            fitted(frame)
    with pytest.raises(TypeError, match="the table is a Series"):
        fitted(dates["t"])


def test_polars():
    pl = pytest.importorskip("polars")
    table = pl.DataFrame({**PEOPLE, "age": [20, None, 40, 60, 30, None]})
    like(table)
    like(table.with_columns(pl.col("city").cast(pl.Categorical), pl.col("age").cast(pl.Decimal(10, 2))))
    with pytest.raises(TypeError, match="the table is a LazyFrame"):
        fitted(table.lazy())
    with pytest.raises(ValueError, match="a column must be one-dimensional"):
        fitted(table.select(pl.struct("age", "income").alias("both")))
    with pytest.raises(TypeError, match='column "age" holds dates or times'):
        fitted(table.select(pl.col("age").cast(pl.Date)))


def test_pyarrow():
    pa = pytest.importorskip("pyarrow")
    table = pa.table({**PEOPLE, "age": [20, None, 40, 60, 30, None]})
    like(table)
    like(table.to_batches()[0])
    like({name: table.column(name) for name in table.column_names})
    place = table.column_names.index("city")
    coded = table.set_column(place, "city", table.column("city").dictionary_encode())
    like(coded)
    like(coded.to_batches()[0])
    numbers = pa.table({"k": pa.array([3, 1, None, 3]).dictionary_encode()})
    assert fitted(numbers).columns[0].words == ("1", "3")
    with pytest.raises(TypeError, match='column "t" holds dates or times'):
        fitted(pa.table({"t": pa.array([1, None], pa.date32())}))


# real data


def adult(part):
    path = REAL / "adult" / f"{part}.csv.gz"
    if not path.is_file():
        pytest.skip(f"no real data: {path} is absent (set GPUMLP_DATA)")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines)
    text = {name: list(cells) for name, cells in zip(header, zip(*rows, strict=True), strict=True)}
    return Table(np.empty((len(rows), 0), np.float32), text, np.arange(2, len(rows) + 2))


def test_real_adult():
    train, test = adult("train"), adult("test")
    del train.text["income"]
    encoder = fitted(train, scaling="quantile")
    numbers = [column.name for column in encoder.columns if isinstance(column, NumberColumn)]
    assert numbers == ["age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week"]
    missing = {
        c.name: (len(c.words), c.missing) for c in encoder.columns if isinstance(c, CategoryColumn) and c.missing
    }
    assert missing == {"workclass": (8, 1836), "occupation": (14, 1843), "native-country": (41, 583)}
    X = encoder.transform(train)
    assert X.shape == (32561, encoder.n_features) and np.isfinite(X).all() and np.abs(X).max() < 3.3
    unseen = encoder.transform(test)  # the column of the target is ignored
    assert unseen.shape == (16281, 108)
    assert np.allclose(X.mean(axis=0), unseen.mean(axis=0), atol=0.03)
    coded = fitted(train, one_hot_limit=20)
    assert coded.code_names == ["native-country"] and coded.code_sizes == [43]
    assert coded.transform(train)[:, -1].min() == 1


def test_whole_numbers_are_one_category_in_every_writing():
    encoder = fitted({"c": [1.0, 2.0, NAN, 30.0]}, categorical_features=["c"])
    assert encoder.columns[0].words == ("1", "2", "30")
    for cells in ([1, 2, None, 30], ["1", "2.0", "", "30.000"], [1.0, 2, "?", np.int8(30)]):
        assert encoder.transform({"c": cells}).tolist() == np.eye(4)[[0, 1, 3, 2]].tolist()
    assert fitted({"c": ["1.50", "-4.0", "v1.0", "007"]}).columns[0].words == ("-4", "007", "1.50", "v1.0")


def test_large_integers_stay_apart():
    large = [2**60 + i for i in range(3)]
    pd = pytest.importorskip("pandas")
    for cells in (pd.array(large, dtype="Int64"), pd.array([*large, None], dtype="Int64")):
        encoder = fitted(pd.DataFrame({"id": cells}), categorical_features=["id"])
        assert encoder.columns[0].words == tuple(map(str, large))
    pa = pytest.importorskip("pyarrow")
    encoder = fitted(pa.table({"id": [*large, None]}), categorical_features=["id"])
    assert encoder.columns[0].words == tuple(map(str, large)) and encoder.columns[0].missing == 1
    numbers = fitted(pd.DataFrame({"n": pd.array([1, None, 3], dtype="Int64")}), scaling=None)
    assert numbers.transform(pd.DataFrame({"n": pd.array([None, 5], dtype="Int64")})).tolist() == [[2, 1], [5, 0]]


def test_a_wide_table_fits_into_a_files_header():
    table = {f"gene_{i:06d}": np.zeros(2) for i in range(20_000)}
    encoder = fitted(table)
    assert len(json.dumps(encoder.describe())) < 500_000
    again = TableEncoder.from_description(json.loads(json.dumps(encoder.describe())), encoder.tensors())
    assert again.feature_names == list(table)


def test_cells_without_a_text_of_their_own_are_refused():
    with pytest.raises(
        TypeError, match='column "x" holds cells of type object; a cell must be a number, a text or a bool'
    ):
        fitted({"x": [object(), object()]})
    assert fitted({"x": [Decimal("sNaN"), Decimal(2)]}).columns[0].missing == 1
