"""Tables as people keep them, numbers beside categories and missing cells, as the numbers that a network reads.

What `TableEncoder.fit` learns is plain data, a configuration and arrays, so that a model file can hold it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from .cells import LARGEST, Cells, factorize, is_category, label_of, listed, numbers_of
from .frames import all_cells, open_table
from .table import is_number

MAX_CATEGORIES = 1 << 18  # of all columns together: their texts take 40 MB while a file is read
MAX_QUANTILES = 1000
PIECES = 64  # of the range of a number, at most
IMPUTATIONS = ("median", "mean")
SCALINGS = (None, "standard", "robust", "quantile", "piecewise")
OPTIONS = ("categorical_features", "one_hot_limit", "impute", "scaling")
NUMBER, ONE_HOT, CODES = "noc"  # what becomes of a column, in a configuration
TINY = float(np.finfo(np.float32).tiny)  # a spread below this is none: 1/spread would overflow float32
ROUNDING = 1e-12  # nor is one below this part of the values: that is float64's rounding of the sums


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows that went through an encoder already: a network that takes tables takes these as they are.

    Fields:
        X: (n, n_features) float32, as `TableEncoder.transform` gave it.
    """

    X: np.ndarray


@dataclass(frozen=True, eq=False)
class NumberColumn:
    """x → (x - shift) · scale, or through quantiles; missing cells become `fill` first.

    Fields:
        missing: how many cells were missing in `fit`; where there were any, an indicator stands behind the number.
        quantiles: (q,) float64, ascending: values of the column.
        scores: (q,) float64, ascending: the normal scores that the quantiles go to; without them, each stretch between two
            quantiles is a piece, with a column of its own behind the number.
    """

    name: str | None
    missing: int
    fill: float
    shift: float = 0.0
    scale: float = 1.0
    quantiles: np.ndarray | None = None
    scores: np.ndarray | None = None

    @property
    def pieces(self) -> int:
        return 0 if self.quantiles is None or self.scores is not None else len(self.quantiles) - 1

    @property
    def width(self) -> int:
        return 1 + self.pieces + (self.missing > 0)


@dataclass(frozen=True, eq=False)
class CategoryColumn:
    """Category i of `words` has code i + 1, a missing cell the code after them; code 0 is everything else.

    Fields:
        missing: how many cells were missing in `fit`; where there were none, a missing cell has code 0.
        words: the categories' texts, ascending.
        coded: passed on as codes instead of one-hot.
    """

    name: str | None
    missing: int
    words: tuple[str, ...]
    coded: bool

    @property
    def n_codes(self) -> int:
        return 1 + len(self.words) + (self.missing > 0)

    @property
    def width(self) -> int:
        return 0 if self.coded else self.n_codes - 1


class TableEncoder:
    """Learns in `fit` how a table's columns become numbers, and does it in `transform`.

    Numbers: missing cells become the median (or mean), with an indicator column where `fit` saw any; then scaling.
    Categories: one-hot or, where there are many, codes for an `Embedding`; missing cells are a category of their
    own where `fit` saw any. A category that `fit` did not see becomes all zeros, or code 0.
    Missing are None, NaN, pandas' NA and NaT, masked Arrow cells, and texts that are empty or "?".

    Arguments:
        categorical_features: "auto": text, bools, categorical dtypes, and objects that are not all numbers; or the names
            or positions of the columns; None for none. Text without a type (from a CSV file or a NumPy array of text) is
            a number where every cell is one.
        one_hot_limit: a column with more categories than this, a missing cell counted as one, becomes codes.
        impute: "median" or "mean".
        scaling: of numbers:
            - None;
            - "standard": (x - mean) / standard deviation;
            - "robust": (x - median) / (75 % - 25 % quantile), or by the standard deviation where these are equal;
            - "quantile": to a normal distribution, piecewise linear through up to 1,000 quantiles and constant beyond
              the smallest and largest: outliers lose their leverage;
            - "piecewise": as "standard", and behind each number how much of each of up to 64 pieces of its range lies
              below it, (x - q_i) / (q_i+1 - q_i) within [0, 1], the q_i being quantiles: a layer can then fit any
              function of one column (piecewise linear encoding, Gorishniy et al. 2022, equation 1).

    Fields: `columns`, a `NumberColumn` or `CategoryColumn` for each column of the table; None before `fit`.

    Raises: ValueError for an option that is not among these.
    """

    def __init__(
        self,
        *,
        categorical_features: Literal["auto"] | Sequence[str | int] | None = "auto",
        one_hot_limit: int = 64,
        impute: str = "median",
        scaling: str | None = "standard",
    ) -> None:
        if impute not in IMPUTATIONS:
            raise ValueError(f"impute is {impute!r}; it must be 'median' or 'mean'")
        if scaling not in SCALINGS:
            raise ValueError(f"scaling is {scaling!r}; it must be None, {_or(SCALINGS[1:])}")
        if isinstance(one_hot_limit, bool) or not isinstance(one_hot_limit, int | np.integer) or one_hot_limit < 0:
            raise ValueError(f"one_hot_limit is {one_hot_limit!r}; it must be a whole number, at least 0")
        self.categorical_features = _plain_choice(categorical_features)
        self.one_hot_limit, self.impute, self.scaling = int(one_hot_limit), impute, scaling
        self.columns: list[NumberColumn | CategoryColumn] | None = None

    # learning and applying

    def fit(self, table: Any, rows: np.ndarray | None = None) -> "TableEncoder":
        """Learn categories, fills and scales; returns the encoder itself.

        Arguments:
            table: a pandas, polars or pyarrow table, a dict of columns, a `Table` whose columns were all read as text,
                a NumPy array (n, columns) of numbers, text or objects, or a list of rows.
            rows: (n,) indices of the training rows, or a bool mask; None takes all. What held-out rows hold must not
                be learned. Whether a column is a number or a category is seen from all rows.

        Raises:
            TypeError: not a table, or cells that are lists, dates or complex numbers.
            ValueError: no rows or columns, names that repeat, columns of different lengths, a number that is infinite
                or beyond float32, a number column with other text in it, more than 262,144 categories; the message
                names the column, and the row where there is one (from 0).
        """
        names, raw = open_table(table)
        cells = all_cells(names, raw)
        chosen = self._chosen(names, len(cells))
        use = slice(None) if rows is None else np.asarray(rows)
        if rows is not None and len(cells[0].values[use]) == 0:
            raise ValueError("rows chooses no rows; the encoder needs at least one")
        columns: list[NumberColumn | CategoryColumn] = []
        for position, column in enumerate(cells):
            label, name = label_of(names, position), names[position] if names else None
            categorical = is_category(column, label) if chosen is None else position in chosen
            if categorical:
                columns.append(_learn_category(name, column, use, label, self.one_hot_limit))
            else:
                columns.append(_learn_number(name, numbers_of(column, label)[use], self.impute, self.scaling))
        _check_categories(columns)
        self.columns = columns  # at the end: a fit that fails leaves the encoder as it was
        return self

    def transform(self, table: Any) -> np.ndarray:
        """What a network reads of a table: (n, n_features) float32.

        First numbers, indicators of missing cells and one-hot categories, in the order of the columns; behind them, for
        each column of many categories, a code as a whole number: which one, or 0 for one never seen in `fit`.

        Where `fit` saw names, columns are taken by name and others are ignored; a nameless array must have as many
        columns as `fit` saw.

        Raises: RuntimeError before `fit`; TypeError and ValueError as `fit`; ValueError naming the columns that are not
            there.
        """
        columns = self._fitted()
        names, raw = self._in_order(*open_table(table))  # before cells are looked at: what is ignored may hold anything
        cells = all_cells(names, raw)
        X = np.zeros((len(cells[0].values), self.n_features), dtype=np.float32)
        start, coded = 0, self.n_features - len(self.code_sizes)
        for position, (column, values) in enumerate(zip(columns, cells, strict=True)):
            label, out = label_of(names, position), X[:, start : start + column.width]
            if isinstance(column, NumberColumn):
                _encode_number(column, numbers_of(values, label), label, out)
            elif column.coded:
                X[:, coded] = _codes(column, values, label)
                coded += 1
            else:
                code = _codes(column, values, label)
                seen = np.flatnonzero(code)
                out[seen, code[seen] - 1] = 1.0
            start += column.width
        return X

    # what was learned

    @property
    def feature_names(self) -> list[str] | None:
        """The names of the columns that `fit` saw, None where they had none."""
        names = [column.name for column in self._fitted()]
        return None if names[0] is None else [str(name) for name in names]

    @property
    def n_features(self) -> int:
        """Columns of what `transform` returns."""
        return sum(column.width for column in self._fitted()) + len(self.code_sizes)

    @property
    def output_names(self) -> list[str]:
        """A name for each column of what `transform` returns: "age", "age missing", "sex=Male", "zip code" (its codes)."""
        found: list[str] = []
        for position, column in enumerate(self._fitted()):
            name = _name(column, position)
            missing = [f"{name} missing"] if column.missing else []
            if isinstance(column, NumberColumn):
                found += [name, *(f"{name} piece {i}" for i in range(column.pieces)), *missing]
            elif not column.coded:
                found += [*(f"{name}={word}" for word in column.words), *missing]
        return found + self.code_names

    @property
    def category_names(self) -> list[str]:
        """The columns that are categories, where columns have names."""
        return [
            column.name for column in self._fitted() if isinstance(column, CategoryColumn) and column.name is not None
        ]

    @property
    def code_names(self) -> list[str]:
        """The columns that become codes, in the order of the codes."""
        return [_name(column, position) for position, column in enumerate(self._fitted()) if _is_coded(column)]

    @property
    def code_sizes(self) -> list[int]:
        """For each coded column the number of its codes, code 0 included."""
        return [column.n_codes for column in self._fitted() if isinstance(column, CategoryColumn) and column.coded]

    def facts(self) -> list[dict[str, Any]]:
        """What `report` says, as plain data: of each column name, kind ("number", "one-hot" or "codes") and missing cells;
        of categories how many there are."""
        found = []
        for position, column in enumerate(self._fitted()):
            kind = "number" if isinstance(column, NumberColumn) else "codes" if column.coded else "one-hot"
            counts = {"categories": len(column.words)} if isinstance(column, CategoryColumn) else {}
            found.append({"name": _name(column, position), "kind": kind, "missing": column.missing, **counts})
        return found

    def report(self) -> str:
        """A line for each column: what was inferred, and what becomes of it."""
        columns = self._fitted()
        labels = [_name(column, position) for position, column in enumerate(columns)]
        wide = min(max(map(len, labels)), 30)
        return "\n".join(f"{label:<{wide}}  {self._line(c)}" for label, c in zip(labels, columns, strict=True))

    def _line(self, column: NumberColumn | CategoryColumn) -> str:
        if isinstance(column, NumberColumn):
            line = "number" if self.scaling is None else f"number, {self.scaling} scaling"
            if column.missing:
                line += f"; {_counted(column.missing, 'missing cell')} filled with {column.fill:g}, and an indicator"
            return line
        line = _counted(len(column.words), "category", "categories")
        line += f", as codes 0 to {column.n_codes - 1:,}" if column.coded else ", one-hot"
        if column.missing:
            line += f"; {_counted(column.missing, 'missing cell')}, a category of their own"
        others = [word for word in column.words if not is_number(word)]
        if 0 < len(others) < len(column.words) / 2:  # perhaps a slip in a column of numbers
            which = f"{listed(others, 3)} {'is' if len(others) == 1 else 'are'} not"
            line += f"; all but {len(others):,} of them are numbers ({which})"
        return line

    # as plain data

    def describe(self) -> dict[str, Any]:
        """All that was learned, as far as JSON can hold it; the rest is in `tensors`."""
        columns, learned = self._fitted(), self.tensors()
        return {
            **{option: getattr(self, option) for option in OPTIONS},
            "n_quantiles": learned["quantiles"].shape[1] if "quantiles" in learned else 0,
            "n_word_bytes": len(learned["words"]) if "words" in learned else 0,
            "names": self.feature_names,
            "kinds": "".join(NUMBER if isinstance(c, NumberColumn) else CODES if c.coded else ONE_HOT for c in columns),
            "missing": [column.missing for column in columns],
            "words": [len(column.words) for column in columns if isinstance(column, CategoryColumn)],
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays that were learned, those of no elements left out; `tensor_forms` tells their dtypes and shapes.

        Returns:
            numbers: (number columns, 3) float64: fill, shift and scale.
            quantiles: (number columns, q) float64, with scaling "quantile" or "piecewise"; the last one fills up a row.
            scores: (number columns, q) float64, with scaling "quantile".
            words: (bytes,) uint8: the texts of all categories in UTF-8, one behind the other.
            word_ends: (categories,) int64: where in `words` each ends.
        """
        columns = self._fitted()
        numbers = [column for column in columns if isinstance(column, NumberColumn)]
        words = [
            word.encode("utf-8", "surrogatepass") for c in columns if isinstance(c, CategoryColumn) for word in c.words
        ]
        found: dict[str, np.ndarray] = {}
        if numbers:
            found["numbers"] = np.array([(c.fill, c.shift, c.scale) for c in numbers])
        spread = [column.quantiles for column in numbers if column.quantiles is not None]
        if spread:
            most = max(map(len, spread))
            found["quantiles"] = np.array([np.append(q, np.full(most - len(q), q[-1])) for q in spread])
        if self.scaling == "quantile" and numbers:
            found["scores"] = np.array([column.scores for column in numbers])
        if words:
            found["words"] = np.frombuffer(b"".join(words), np.uint8).copy()
            found["word_ends"] = np.cumsum([len(word) for word in words], dtype=np.int64)
        return found

    @classmethod
    def from_description(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> "TableEncoder":
        """The encoder that `describe` and `tensors` came from.

        Raises: ValueError for a configuration that no encoder writes, and tensors that do not belong to it.
        """
        forms = tensor_forms(config)
        there = {name: (values.dtype, values.shape) for name, values in tensors.items()}
        if there != forms:
            raise ValueError(f"a table encoder with the tensors {there}; its configuration describes {forms}")
        _check_learned(tensors)
        encoder = cls(**{option: config[option] for option in OPTIONS})
        texts = iter(_texts(tensors))
        numbers = iter(range(len(tensors.get("numbers", ()))))
        columns: list[NumberColumn | CategoryColumn] = []
        counts, names = iter(config["words"]), config["names"] or [None] * len(config["kinds"])
        for name, kind, missing in zip(names, config["kinds"], config["missing"], strict=True):
            if kind == NUMBER:
                row = next(numbers)
                spread = [tensors[key][row].copy() for key in ("quantiles", "scores") if key in tensors]
                if config["scaling"] == "piecewise":
                    spread = [np.unique(spread[0])]
                columns.append(NumberColumn(name, missing, *tensors["numbers"][row].tolist(), *spread))
                continue
            words = tuple(next(texts) for _ in range(next(counts)))
            if any(a >= b for a, b in pairwise(words)):
                raise ValueError(f"a table encoder whose categories of {name!r} are not in ascending order")
            columns.append(CategoryColumn(name, missing, words, kind == CODES))
        encoder.columns = columns
        return encoder

    # details

    def _fitted(self) -> list[NumberColumn | CategoryColumn]:
        if self.columns is None:
            raise RuntimeError("the encoder has learned nothing yet; call fit first")
        return self.columns

    def _chosen(self, names: list[str] | None, n_columns: int) -> set[int] | None:
        """The positions of the categorical columns; None where each column is to be looked at."""
        if self.categorical_features == "auto":
            return None
        found = set()
        for feature in self.categorical_features or ():
            if isinstance(feature, str):
                if names is None or feature not in names:
                    there = f"its columns are {listed(names)}" if names else "its columns have no names; use positions"
                    raise ValueError(f"categorical_features names {feature!r}, which the table does not have; {there}")
                found.add(names.index(feature))
            elif 0 <= feature < n_columns:
                found.add(feature)
            else:
                raise ValueError(f"categorical_features has {feature}; positions go from 0 to {n_columns - 1}")
        return found

    def _in_order(self, names: list[str] | None, raw: list[Any]) -> tuple[list[str] | None, list[Any]]:
        """The columns that `fit` saw, in its order."""
        expected = self.feature_names
        if expected is not None and names is not None:
            place = {name: position for position, name in enumerate(names)}
            lacking = [name for name in expected if name not in place]
            if lacking:
                raise ValueError(f"the table lacks the columns {listed(lacking)}; its columns are {listed(names)}")
            return expected, [raw[place[name]] for name in expected]
        if len(raw) != len(self._fitted()):
            raise ValueError(
                f"the table has {len(raw)} columns, the encoder was fitted to {len(self._fitted())}; "
                "without names in both their number must be the same"
            )
        return names, raw


def tensor_forms(config: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor that belongs to a configuration of `TableEncoder.describe`.

    Raises: ValueError for a configuration that no encoder writes.
    """
    try:
        kinds, names, _ = config["kinds"], config["names"], [config[option] for option in OPTIONS]
        categories = len(kinds) - kinds.count(NUMBER)
        numbers, words = kinds.count(NUMBER), sum(map(_count, config["words"]))
        n_quantiles, n_bytes = _count(config["n_quantiles"]), _count(config["n_word_bytes"])
        sound = (
            isinstance(kinds, str)
            and isinstance(names, list | None)
            and len(kinds) > 0
            and set(kinds) <= {NUMBER, ONE_HOT, CODES}
        )
        sound &= len(list(map(_count, config["missing"]))) == len(kinds) and len(config["words"]) == categories
        sound &= names is None or (
            len(set(names)) == len(names) == len(kinds) and all(isinstance(n, str) for n in names)
        )
        sound &= words <= MAX_CATEGORIES and n_quantiles <= MAX_QUANTILES
        sound &= (n_quantiles > 0) == (numbers > 0 and config["scaling"] in ("quantile", "piecewise"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a table encoder's configuration: {type(error).__name__}: {error}") from error
    if not sound:
        raise ValueError("not a table encoder's configuration: its columns do not fit together")
    forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    if numbers:
        forms["numbers"] = np.dtype(np.float64), (numbers, 3)
    if n_quantiles:
        forms["quantiles"] = np.dtype(np.float64), (numbers, n_quantiles)
    if n_quantiles and config["scaling"] == "quantile":
        forms["scores"] = forms["quantiles"]
    if words:
        forms |= {"words": (np.dtype(np.uint8), (n_bytes,)), "word_ends": (np.dtype(np.int64), (words,))}
    return forms


# numbers


def _learn_number(name: str | None, values: np.ndarray, impute: str, scaling: str | None) -> NumberColumn:
    """values: (n,) float64, NaN for missing."""
    present = values[~np.isnan(values)]
    missing = len(values) - len(present)
    if not len(present):
        present = np.zeros(1)
    fill = float(np.median(present) if impute == "median" else present.mean())
    if scaling == "quantile":
        return NumberColumn(name, missing, fill, 0.0, 1.0, *_normal_scores(present, min(MAX_QUANTILES, len(values))))
    if scaling == "piecewise":
        edges = np.unique(np.quantile(present, np.linspace(0.0, 1.0, PIECES + 1)))
        return NumberColumn(name, missing, fill, *_shift_and_scale(present, "standard"), edges)
    return NumberColumn(name, missing, fill, *_shift_and_scale(present, scaling))


def _shift_and_scale(values: np.ndarray, scaling: str | None) -> tuple[float, float]:
    if scaling is None:
        return 0.0, 1.0
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    shift, spread = (median, high - low) if scaling == "robust" else (values.mean(), 0.0)
    least = max(TINY, ROUNDING * float(np.abs(values).max()))
    if spread <= least:
        spread = values.std()
    if spread <= least:
        return float(median), 1.0  # constant: exactly 0, where the mean may miss the constant by a rounding
    return float(shift), 1.0 / float(spread)


def _normal_scores(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the values and the normal scores of their ranks, each (count,).

    A value that fills several quantiles gets the score of the middle of its ranks. The ends are half a quantile inside
    0 and 1: ±3.29 with 1,000 quantiles.
    """
    ranks = np.linspace(0.0, 1.0, count)
    from statistics import NormalDist  # which takes longer to import than all else here

    quantiles = np.maximum.accumulate(np.quantile(values, ranks))  # interpolation may round a tie downwards
    first = ranks[np.searchsorted(quantiles, quantiles, "left")]
    last = ranks[np.searchsorted(quantiles, quantiles, "right") - 1]
    middle = np.clip((first + last) / 2, 0.5 / count, 1.0 - 0.5 / count)
    return quantiles, np.array([NormalDist().inv_cdf(rank) for rank in middle.tolist()])


def _encode_number(column: NumberColumn, values: np.ndarray, label: str, out: np.ndarray) -> None:
    absent = np.isnan(values)
    values[absent] = column.fill
    if column.quantiles is not None and column.scores is not None:
        scaled = np.interp(values, column.quantiles, column.scores)
    else:
        scaled = (values - column.shift) * column.scale
    beyond = np.abs(scaled) > LARGEST
    if beyond.any():
        row = int(np.argmax(beyond))
        raise ValueError(f"{label}, row {row}: {values[row]:g} is beyond float32 once scaled; correct the cell")
    out[:, 0] = scaled
    for i in range(column.pieces):
        low, high = column.quantiles[i : i + 2]  # type: ignore[index]
        with np.errstate(over="ignore"):
            out[:, 1 + i] = np.clip((values - low) / (high - low), 0.0, 1.0)
    if column.missing:
        out[:, -1] = absent


# categories


def _learn_category(name: str | None, cells: Cells, use: Any, label: str, one_hot_limit: int) -> CategoryColumn:
    codes, texts = factorize(cells, label)
    counts = np.bincount(codes[use], minlength=len(texts)).tolist()
    words = {text for text, count in zip(texts, counts, strict=True) if count and text is not None}
    missing = sum(count for text, count in zip(texts, counts, strict=True) if text is None)
    return CategoryColumn(name, missing, tuple(sorted(words)), len(words) + (missing > 0) > one_hot_limit)


def _check_categories(columns: Sequence[NumberColumn | CategoryColumn]) -> None:
    counts = [len(column.words) if isinstance(column, CategoryColumn) else 0 for column in columns]
    if sum(counts) > MAX_CATEGORIES:
        most = int(np.argmax(counts))
        raise ValueError(
            f"the table has {sum(counts):,} categories, at most {MAX_CATEGORIES:,} are allowed; "
            f"{_name(columns[most], most)!r} has {counts[most]:,}: leave such a column out "
            "(an identifier says nothing about new rows), or make it numbers"
        )


def _codes(column: CategoryColumn, cells: Cells, label: str) -> np.ndarray:
    """(n,) int32"""
    place: dict[str | None, int] = {word: code for code, word in enumerate(column.words, start=1)}
    if column.missing:
        place[None] = column.n_codes - 1
    codes, texts = factorize(cells, label)
    return np.array([place.get(text, 0) for text in texts], dtype=np.int32)[codes]


# plain data and words for messages


def _plain_choice(features: Any) -> Any:
    """categorical_features as JSON holds it."""
    if features is None or (isinstance(features, str) and features == "auto"):
        return features
    if isinstance(features, str) or not isinstance(features, Iterable):
        raise ValueError(
            f"categorical_features is {features!r}; it must be 'auto', None, or a list of names or positions"
        )
    found: list[str | int] = []
    for feature in features:
        if isinstance(feature, bool | np.bool_) or not isinstance(feature, str | int | np.integer):
            raise ValueError(f"categorical_features has {feature!r}; it must hold names or positions of columns")
        found.append(str(feature) if isinstance(feature, str) else int(feature))
    return found


def _check_learned(tensors: Mapping[str, np.ndarray]) -> None:
    for name, values in tensors.items():
        if values.dtype == np.float64 and not np.isfinite(values).all():
            raise ValueError(f"a table encoder whose {name} are not all finite")
        if name in ("quantiles", "scores") and (np.diff(values) < 0).any():
            raise ValueError(f"a table encoder whose {name} are not in ascending order")


def _texts(tensors: Mapping[str, np.ndarray]) -> list[str]:
    if "words" not in tensors:
        return []
    data, ends = tensors["words"].tobytes(), tensors["word_ends"].tolist()
    starts = [0, *ends[:-1]]
    if ends[-1] != len(data) or any(start > end for start, end in zip(starts, ends, strict=True)):
        raise ValueError("a table encoder whose word_ends do not divide its words")
    spans = zip(starts, ends, strict=True)
    return [
        data[start:end].decode("utf-8", "surrogatepass") for start, end in spans
    ]  # UnicodeDecodeError: a ValueError


def _or(words: Sequence[Any]) -> str:
    return f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"


def _is_coded(column: NumberColumn | CategoryColumn) -> bool:
    return isinstance(column, CategoryColumn) and column.coded


def _name(column: NumberColumn | CategoryColumn, position: int) -> str:
    return f"x{position}" if column.name is None else column.name


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
