"""Reading IDX, npz and CSV: what is read, and what every kind of damage says."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from gpumlp.data import Dataset, load, load_table, read_columns, read_idx, read_rows
from gpumlp.data.readers import infer_task
from gpumlp.data.table import BLOCK_CELLS

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("GPUMLP_DATA", REPOSITORY.parent / "shared" / "data"))
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
    head = struct.pack(">BBBB", 0, 0, CODES[array.dtype.str[1:]], array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 5), dtype=np.uint8)
LABELS = np.array([2, 5, 9, 5, 2, 9], dtype=np.uint8)


def idx_folder(folder, end="", dot="-", test=True):
    for part, rows in (("train", slice(None)), ("t10k", slice(0, 2))):
        if part == "train" or test:
            write(folder / f"{part}-images{dot}idx3-ubyte{end}", idx_bytes(IMAGES[rows]))
            write(folder / f"{part}-labels{dot}idx1-ubyte{end}", idx_bytes(LABELS[rows]))
    return folder


# IDX files


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", ["a-ubyte", "a-ubyte.gz"])
def test_idx_dtypes(tmp_path, dtype, name):
    array = (np.arange(24).reshape(2, 3, 4) * 3 - 20).astype(dtype)
    read = read_idx(write(tmp_path / name, idx_bytes(array)))
    assert read.dtype == np.dtype(dtype) and read.dtype.isnative and read.flags.writeable
    assert np.array_equal(read, array)


def test_idx_is_recognised_as_gzip_by_content_not_by_name(tmp_path):
    path = tmp_path / "unpacked.gz"
    path.write_bytes(idx_bytes(LABELS))
    assert np.array_equal(read_idx(str(path)), LABELS)
    path = tmp_path / "packed-ubyte"
    path.write_bytes(gzip.compress(idx_bytes(LABELS)))
    assert np.array_equal(read_idx(path), LABELS)


GOOD = idx_bytes(IMAGES)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"is not an IDX file: it starts with the bytes \(none\)"),
        (b"\x00\x00\x08", "is not an IDX file: it starts with the bytes 00 00 08"),
        (b"\x01" + GOOD[1:], "is not an IDX file: it starts with the bytes 01 00 08 03"),
        (b"\x00\x00\x0a" + GOOD[3:], "is not an IDX file"),
        (b"\x00\x00\x08\x00" + GOOD[4:], "is not an IDX file"),
        (GOOD[:10], "is truncated: it ends within its header of 16 bytes"),
        (GOOD[:-1], r"is truncated: shape \(6, 3, 5\) uint8 takes 106 bytes, it has 105"),
        (GOOD + b"\x00", r"has trailing bytes: .* takes 106 bytes, it has 107"),
        (b"\x00\x00\x0e\x03" + b"\xff" * 12, "is truncated: shape"),
        (gzip.compress(GOOD)[:-12], "is a damaged gzip file"),
        (gzip.compress(GOOD)[:-8] + b"\x00" * 8, "is a damaged gzip file: CRC check failed"),
        (b"\x1f\x8b\x08\x00" + b"\xff" * 40, "is a damaged gzip file"),
    ],
)
def test_damaged_idx(tmp_path, content, message):
    path = tmp_path / "damaged-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged-ubyte {message}"):
        read_idx(path)


def test_idx_cut_anywhere_is_noticed(tmp_path):
    path = tmp_path / "cut"
    for content in (GOOD, gzip.compress(GOOD)):
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match="cut "):
                read_idx(path)


# IDX folders


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_folder(tmp_path, end, dot):
    data = load(idx_folder(tmp_path, end, dot))
    assert (data.name, data.task, data.image_shape) == (tmp_path.name, "classification", (3, 5))
    assert data.X.dtype == np.uint8 and np.array_equal(data.X, IMAGES.reshape(6, 15))
    assert data.classes.tolist() == [2, 5, 9] and data.y.dtype == np.int64 and data.y.tolist() == [0, 1, 2, 1, 0, 2]
    assert np.array_equal(data.X_test, IMAGES[:2].reshape(2, 15)) and data.y_test.tolist() == [0, 1]
    assert np.array_equal(read_rows(tmp_path)[0], data.X_test) and read_rows(tmp_path)[1] is None


def test_idx_folder_without_test_rows(tmp_path):
    data = load(str(idx_folder(tmp_path, test=False)))
    assert data.X_test is None and data.y_test is None and "no test rows" in repr(data)
    with pytest.raises(FileNotFoundError, match=r"has no test images .t10k-images-idx3-ubyte.; pass the images file"):
        read_rows(tmp_path)
    X, names = read_rows(tmp_path / "train-images-idx3-ubyte")
    assert np.array_equal(X, data.X) and names is None


def test_idx_folder_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no train images: looked for .'train-images-idx3-ubyte'.*found nothing"
    ):
        load(tmp_path)
    idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no t10k labels: .*found t10k-images-idx3-ubyte, train-images"):
        load(tmp_path)
    write(tmp_path / "t10k-labels-idx1-ubyte", idx_bytes(LABELS[:3]))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte has 3 labels, t10k-images-idx3-ubyte has 2 images"):
        load(tmp_path)
    write(tmp_path / "t10k-labels-idx1-ubyte", idx_bytes(LABELS[:2].reshape(2, 1)))
    with pytest.raises(ValueError, match=r"has shape \(2, 1\); expected one label per image"):
        load(tmp_path)
    write(tmp_path / "t10k-labels-idx1-ubyte", idx_bytes(np.array([2, 4], dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"test labels\[1\] is 4, an unknown class; known are 2, 5, 9"):
        load(tmp_path)
    write(tmp_path / "t10k-images-idx3-ubyte", idx_bytes(IMAGES[:2, :2]))
    write(tmp_path / "t10k-labels-idx1-ubyte", idx_bytes(LABELS[:2]))
    with pytest.raises(ValueError, match=r"train images have shape \(3, 5\), test images \(2, 5\)"):
        load(tmp_path)
    write(tmp_path / "train-images-idx3-ubyte", idx_bytes(LABELS))
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte has shape \(6,\); expected \(images, rows, columns\)"
    ):
        load(tmp_path)
    write(tmp_path / "train-images-idx3-ubyte", idx_bytes(IMAGES[:0]))
    with pytest.raises(ValueError, match=r"has no images, shape \(0, 3, 5\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is one file of an IDX set; pass its folder"):
        load(tmp_path / "train-images-idx3-ubyte")


def test_real_fashion_mnist():
    folder = REAL / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set GPUMLP_DATA)")
    data = load(folder)
    assert data.X.shape == (60000, 784) and data.X_test.shape == (10000, 784) and data.X.dtype == np.uint8
    assert data.image_shape == (28, 28) and data.classes.tolist() == list(range(10))
    assert np.bincount(data.y).tolist() == [6000] * 10 and np.bincount(data.y_test).tolist() == [1000] * 10
    assert data.X.mean() == pytest.approx(72.94, abs=0.01)


# npz


def test_npz(tmp_path):
    X, y = np.arange(12, dtype=np.float64).reshape(4, 3), np.array(["b", "a", "b", "a"])
    np.savez(tmp_path / "t.v1.npz", X=X, y=y, X_test=X[:2], y_test=y[:2])
    data = load(tmp_path / "t.v1.npz")
    assert (data.name, data.task) == ("t.v1", "classification")
    assert data.X.dtype == np.float64 and np.array_equal(data.X, X) and data.classes.tolist() == ["a", "b"]
    assert data.y.tolist() == [1, 0, 1, 0] and data.y_test.tolist() == [1, 0] and data.X_test.shape == (2, 3)
    rows, names = read_rows(tmp_path / "t.v1.npz")
    assert np.array_equal(rows, X) and names is None


def test_npz_as_keras_writes_it(tmp_path):
    np.savez_compressed(tmp_path / "m.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:1], y_test=LABELS[:1])
    data = load(tmp_path / "m.npz")
    assert data.X.shape == (6, 15) and data.X.dtype == np.uint8 and data.image_shape == (3, 5)
    assert data.classes.tolist() == [2, 5, 9] and data.X_test.shape == (1, 15)


def test_npz_regression(tmp_path):
    np.savez(tmp_path / "r.npz", X=np.ones((3, 2), dtype=np.float32), y=np.array([0.5, 1.5, 2.5]))
    data = load(tmp_path / "r.npz")
    assert data.task == "regression" and data.y.shape == (3, 1) and data.y.dtype == np.float32 and data.classes is None
    np.savez(tmp_path / "r.npz", X=np.ones((3, 2)), y=np.eye(3, dtype=int))
    data = load(tmp_path / "r.npz")
    assert data.task == "regression" and np.array_equal(data.y, np.eye(3)) and "3 outputs" in repr(data)
    np.savez(tmp_path / "r.npz", X=np.ones((3, 2)), y=[1, 2, 2])
    assert load(tmp_path / "r.npz").task == "classification"
    assert load(tmp_path / "r.npz", task="regression").y.tolist() == [[1.0], [2.0], [2.0]]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"a": np.ones(2), "b": np.ones(2)}, r'holds "a", "b"; expected X and y, or x_train and y_train'),
        ({"X": np.ones((2, 2))}, r'holds "x"; expected X and y'),
        ({"x_train": np.ones((2, 2)), "y": np.ones(2)}, r'holds "x_train", "y"; expected X and y'),
        ({"X": np.ones((2, 2)), "y": [0, 1], "X_test": np.ones((1, 2))}, "x_test and y_test go together"),
        ({"X": np.ones((2, 2)), "y": [0, 1, 1]}, r"y has shape \(3,\), X has 2 rows"),
        ({"X": np.ones((2, 2)), "y": 1}, r"y has shape \(\), X has 2 rows"),
        ({"X": np.ones((2, 2)), "y": np.ones((2, 0))}, r"y has shape \(2, 0\); expected \(2, 1\)"),
        ({"X": np.ones((2, 2)), "y": [0.5, np.nan]}, r"y\[1\] is nan"),
        ({"X": [[1.0, np.inf]], "y": [0.5]}, r"X\[0, 1\] is inf"),
        ({"X": np.ones(2), "y": [0, 1]}, "X is one-dimensional"),
        ({"X": np.ones((0, 2, 2)), "y": []}, r"X has shape \(0, 2, 2\)"),
        ({"X": np.ones((2, 2)), "y": np.array([0, None])}, "cannot be read as .npz: Object arrays cannot be loaded"),
        (
            {"X": np.ones((2, 2)), "y": [0, 1], "X_test": np.ones((1, 3)), "y_test": [0]},
            "X has 2 features, X_test has 3",
        ),
        (
            {"X": np.ones((2, 2)), "y": [0, 1], "X_test": np.ones((1, 2)), "y_test": [7]},
            r"y_test\[0\] is 7, an unknown class",
        ),
        (
            {"X": np.ones((2, 2)), "y": [0, 1], "X_test": np.ones((1, 2)), "y_test": [0, 1]},
            r"y_test has shape \(2,\), X_test has 1 rows",
        ),
        (
            {"X": np.ones((2, 2)), "y": np.ones((2, 3)), "X_test": np.ones((1, 2)), "y_test": np.ones((1, 2))},
            "y has 3 outputs, y_test has 2",
        ),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad.npz")


def test_npz_damaged(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, X=np.ones((2, 2)), y=[0, 1])
    content = path.read_bytes()
    for part in (b"", content[:100], content[:-10], b"not a zip file", content[: len(content) // 2]):
        path.write_bytes(part)
        with pytest.raises(
            ValueError, match=r"bad.npz is not an .npz file as numpy.savez writes it, or it is truncated"
        ):
            load(path)
    path.write_bytes(content.replace(np.ones(4).tobytes(), np.zeros(4).tobytes()))
    with pytest.raises(ValueError, match=r"bad.npz cannot be read as .npz: .*CRC"):
        load(path)


def test_npz_rows_errors(tmp_path):
    np.savez(tmp_path / "a.npz", Z=np.ones((2, 2)))
    with pytest.raises(ValueError, match='holds "z"; expected X'):
        read_rows(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"target is 'y', but .* names its targets itself"):
        load(tmp_path / "a.npz", target="y")


# CSV: what is read


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "T.CSV"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv(tmp_path, name, line_end, mark):
    lines = ["size, weight ,kind,age", '1.5,-2,cat,"3"', "", "  4 ,5e-1, dog ,6", '7,8,"cat",9']
    data = load(write(tmp_path / name, mark + line_end.join(lines)), target="kind")
    assert isinstance(data, Dataset) and (data.name.lower(), data.task) == ("t", "classification")
    assert data.X.dtype == np.float32 and data.X.tolist() == [[1.5, -2, 3], [4, 0.5, 6], [7, 8, 9]]
    assert data.y.tolist() == [0, 1, 0] and data.classes.tolist() == ["cat", "dog"]
    assert data.feature_names == ["size", "weight", "age"] and data.target_names == ["kind"]


def csv(tmp_path, *lines):
    return write(tmp_path / "t.csv", "\n".join(lines) + "\n")


def test_csv_several_targets(tmp_path):
    data = load(csv(tmp_path, "a,y1,b,y2", "1,2,3,4", "5,6,7,8"), target="y2, y1")
    assert data.task == "regression" and data.y.dtype == np.float32 and data.y.tolist() == [[4, 2], [8, 6]]
    assert data.X.tolist() == [[1, 3], [5, 7]] and data.target_names == ["y2", "y1"] and data.classes is None


def test_csv_target_name_may_hold_a_comma(tmp_path):
    data = load(csv(tmp_path, 'a,"price, net"', "1,2.5", "3,4.5"), target="price, net")
    assert data.y.tolist() == [[2.5], [4.5]] and data.target_names == ["price, net"]


@pytest.mark.parametrize(
    "cells, task, expected, classes",
    [
        (["6", "5", "6"], None, "classification", [5, 6]),
        (["6.0", "5", "6"], None, "classification", [5, 6]),
        (["6.5", "5", "6"], None, "regression", None),
        (["6", "5", "6"], "regression", "regression", None),
        (["6.5", "5", "6"], "classification", "classification", [5.0, 6.0, 6.5]),
        (["yes", "no", "yes"], None, "classification", ["no", "yes"]),
        (["2", "3+", "2"], None, "classification", ["2", "3+"]),
        ([str(i % 20) for i in range(50)], None, "classification", list(range(20))),
        ([str(i % 21) for i in range(50)], None, "regression", None),
        ([f"k{i:02}" for i in range(50)], None, "classification", [f"k{i:02}" for i in range(50)]),
        ([*map(str, range(30)), "x"], "classification", "classification", sorted([*map(str, range(30)), "x"])),
    ],
)
def test_csv_task(tmp_path, cells, task, expected, classes):
    data = load(csv(tmp_path, "a,y", *(f"1,{cell}" for cell in cells)), target="y", task=task)
    assert data.task == expected and (None if data.classes is None else data.classes.tolist()) == classes
    if classes is None:
        assert data.y.ravel().tolist() == [float(cell) for cell in cells]
    else:
        kind = str if isinstance(classes[0], str) else float
        assert [kind(name) for name in data.classes[data.y].tolist()] == [kind(cell) for cell in cells]


def test_infer_task():
    assert infer_task(np.array([True, False])) == "classification"
    assert infer_task(np.zeros((5, 1))) == "classification"
    assert infer_task(np.zeros((5, 2))) == "regression"
    assert infer_task(np.array([1.0, np.nan])) == "regression"


def test_csv_over_several_blocks(tmp_path):
    rows = 2 * BLOCK_CELLS // 40 + 17
    X = np.random.default_rng(0).integers(0, 1000, (rows, 40))
    text = "\n".join(",".join(map(str, row)) for row in X.tolist())
    path = write(tmp_path / "t.csv", ",".join(f"c{i}" for i in range(40)) + "\n" + text + "\n")
    data = load(path, target="c3")
    assert np.array_equal(data.X, np.delete(X, 3, axis=1)) and np.array_equal(data.y.ravel(), X[:, 3])
    X, _ = read_rows(path)
    write(path, path.read_text()[: -len("\n")].rpartition(",")[0] + ",x\n")
    with pytest.raises(ValueError, match=rf'line {rows + 1}, column "c39": \'x\' is not a number'):
        load(path, target="c3")


def test_csv_column_numbers_as_names(tmp_path):
    data = load(csv(tmp_path, "0,1,2", "5,6,7.5", "8,9,1.5"), target="2")
    assert data.feature_names == ["0", "1"] and data.y.tolist() == [[7.5], [1.5]]


def test_csv_quoted_line_breaks_keep_line_numbers_right(tmp_path):
    path = csv(tmp_path, '"a', 'b",kind', '1,"x', 'y"', "", "oops,z")
    with pytest.raises(ValueError, match=r"line 6, column \"a\nb\": 'oops' is not a number"):
        load(path, target="kind")


def test_csv_columns_of_every_kind(tmp_path):
    path = csv(tmp_path, "n,c,gaps,zip,flag,none", "1,a,,007,True,", "2.5,?, 3 ,010,False,?", "-1e3,b,?,7,True,")
    for as_text in ((), ("zip",)):
        columns = read_columns(path, as_text)
        assert list(columns) == ["n", "c", "gaps", "zip", "flag", "none"]
        assert columns["n"].tolist() == [1, 2.5, -1000] and columns["c"] == ["a", "?", "b"]
        np.testing.assert_array_equal(columns["gaps"], [np.nan, 3, np.nan])
        assert columns["flag"] == ["True", "False", "True"] and np.isnan(columns["none"]).all()
        zips = columns["zip"]
        assert zips == ["007", "010", "7"] if as_text else zips.tolist() == [7, 10, 7]
    data = load_table(path, target="flag", as_text=["zip"])
    assert data.classes.tolist() == ["False", "True"] and data.X["zip"] == ["007", "010", "7"] and "flag" not in data.X
    with pytest.raises(ValueError, match="has a header but no rows"):
        read_columns(csv(tmp_path, "a,b"))


# CSV: what is refused


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a,b,y", "1,2,0", "3,abc,1"], r"""t\.csv, line 3, column "b": 'abc' is not a number; encode or drop"""),
        (["a,b,y", "1,2,0", "3,,1"], r'line 3, column "b": the cell is empty; fill in a number or drop the row'),
        (["a,b,y", "1, ,0", "3,4,1"], r'line 2, column "b": the cell is empty'),
        (["a,b,y", "1,2,0", "nan,4,1"], r"""line 3, column "a": 'nan' is not a finite number"""),
        (["a,b,y", "1,2,0", "3,-inf,1"], r"""line 3, column "b": '-inf' is not a finite number"""),
        (["a,b,y", "1,1e39,0"], r"""line 2, column "b": '1e39' is too large for float32"""),
        (["a,b,y", "1,2,0", "", "3,4"], r"t\.csv, line 4: 2 cells, the header has 3"),
        (["a,b,y", "1,2,0,9"], r"line 2: 4 cells, the header has 3"),
        (["a,b,y", "1,2,"], r'line 2, column "y": the cell is empty; drop the row'),
        (["a,b,y", "1,2,0.5", "1,2,nan"], r"""line 3, column "y": 'nan' is not a finite number"""),
        (["a,y,a", "1,2,3"], r't\.csv: column "a" appears twice in the header'),
        ([",a,y", "0,1,2"], r"column 1 has no name in the header .*index=False"),
        (["5.1,3.5,0", "4.9,3.0,1"], "t.csv has no header: line 1 holds numbers"),
        (["a,b,y"], r"t\.csv has a header but no rows"),
        ([""], r"t\.csv is empty"),
        (["y", "1"], r"has no columns besides the target"),
        (["a,b,y", '1,"2,0', "3,4,1"], r"t\.csv, line 3: unexpected end of data"),
        (["a,b,y", '1,"2"3,0'], r"t\.csv, line 2: ',' expected after '\"'"),
    ],
)
def test_csv_errors(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load(csv(tmp_path, *lines), target="y")


def test_csv_a_slip_in_a_column_of_numbers_is_not_a_class(tmp_path):
    path = csv(tmp_path, "a,y", *(f"1,{i}.5" for i in range(30)), "1,3o.5")
    with pytest.raises(ValueError, match=r"""line 32, column "y": '3o.5' is not a number"""):
        load(path, target="y")
    path = csv(tmp_path, "a,y", "1,2", "1,x")
    with pytest.raises(ValueError, match="""line 3, column "y": 'x' is not a number"""):
        load(path, target="y", task="regression")


def test_csv_target_errors(tmp_path):
    path = csv(tmp_path, "a,b,y", "1,2,0", "3,4,1")
    with pytest.raises(ValueError, match=r'which column is the target.*the columns are "a", "b", "y"'):
        load(path)
    with pytest.raises(ValueError, match='has no target column "label"; the columns are "a", "b", "y"'):
        load(path, target="label")
    with pytest.raises(ValueError, match='has no target column "z", ""'):
        load(path, target="y,z,")
    with pytest.raises(ValueError, match="target names a column twice: 'y,y'"):
        load(path, target="y,y")
    with pytest.raises(ValueError, match='classification has one target column, target names 2: "b", "y"'):
        load(path, target="b,y", task="classification")
    with pytest.raises(ValueError, match="task is 'clustering'; it must be 'classification', 'regression' or None"):
        load(path, target="y", task="clustering")
    wide = csv(tmp_path, ",".join(f"c{i}" for i in range(50)), ",".join("1" * 50))
    with pytest.raises(ValueError, match=r'"c28", \.\.\., "c49" \(50 in all\)'):
        load(wide)


def test_csv_encoding_and_damage(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("a,größe\n1,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv, after line 0: not UTF-8 .*save it as UTF-8"):
        load(path, target="a")
    path = tmp_path / "t.csv.gz"
    content = gzip.compress(os.urandom(300).hex().encode() + b",b\n1,2\n")
    for damaged in (content[:-9], content[:-8] + b"\x00" * 8, content[:200]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t.csv.gz is a damaged gzip file"):
            load(path, target="b")


# rows to predict for


def test_rows_of_csv(tmp_path):
    path = csv(tmp_path, "a,note,b", "1,x,2", "3,y,4")
    X, names = read_rows(path, ["b", "a"])
    assert X.dtype == np.float32 and X.tolist() == [[2, 1], [4, 3]] and names == ["b", "a"]
    with pytest.raises(ValueError, match='lacks the features "c", "d"; its columns are "a", "note", "b"'):
        read_rows(path, ["a", "c", "d"])
    with pytest.raises(ValueError, match="""line 2, column "note": 'x' is not a number"""):
        read_rows(path)
    X, names = read_rows(csv(tmp_path, "a,b", "1,2"))
    assert X.tolist() == [[1, 2]] and names == ["a", "b"]


# sources


@pytest.mark.parametrize("read", [load, read_rows])
def test_sources_that_are_not_there(tmp_path, read):
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder .*gone.csv .looked in .*digits, moons, circles, spirals"
    ):
        read(tmp_path / "gone.csv")
    (tmp_path / "t.xlsx").write_text("x")
    with pytest.raises(
        ValueError, match=r"t\.xlsx has an unknown ending; allowed are a folder of IDX files, \.npz, \.csv"
    ):
        read(tmp_path / "t.xlsx")
    with pytest.raises(TypeError, match="source is a ndarray; expected a path or the name of a built-in set"):
        read(np.ones((2, 2)))


def test_options_that_a_source_does_not_take(tmp_path):
    with pytest.raises(ValueError, match="target is 'x', but only CSV files have target columns; moons has its own"):
        load("moons", target="x")
    with pytest.raises(ValueError, match="task is 'regression', but moons is for classification"):
        load("moons", task="regression")
    assert load("moons", task="classification").name == "moons"
    with pytest.raises(ValueError, match="target is 'x', but only CSV"):
        load(idx_folder(tmp_path), target="x")


def test_a_file_named_like_a_built_in_set_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    idx_folder(tmp_path / "digits")
    assert load("digits").X.shape == (1437, 64)
    assert load("./digits").X.shape == (6, 15) and load(Path("digits")).X.shape == (6, 15)


def test_a_number_has_no_underscores(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n1_2,3\n")
    with pytest.raises(ValueError, match=r"line 3, column \"a\": '1_2' is not a number"):
        load(path, target="b")
