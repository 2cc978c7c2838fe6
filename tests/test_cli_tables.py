"""The command line over tables: categories and missing cells without a flag, one file that takes raw rows."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.cli import main
from gpumlp.data import load_table

DATA = Path(os.environ.get("GPUMLP_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Models land in the present folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def people(n=400, seed=0):
    """Rows in which age, city and a code of 120 kinds decide who buys; every tenth cell is missing."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        age, city, kind = rng.integers(18, 80), rng.choice(["Oslo", "Rome", "Kyiv"]), rng.integers(120)
        buys = (age > 45) ^ (city == "Rome") ^ (kind % 2 == 0 and age > 70)
        cells = [str(age), city, f"k{kind}", rng.choice(["yes", "no"])]
        cells = [rng.choice(["", "?"]) if rng.random() < 0.1 else cell for cell in cells[:1]] + cells[1:]
        rows.append([*cells, "buys" if buys else "leaves"])
    return ["age", "city", "kind", "member", "outcome"], rows


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def shop(tmp_path):
    return write(tmp_path / "shop.csv", *people())


def test_no_flag_is_needed(capsys, shop, here):
    code, out, err = run(capsys, "train", shop, "--target", "outcome")
    assert code == 0 and out.startswith("test: loss ") and out.rstrip().endswith("model: shop.safetensors")
    age, city, kind, member = (line for line in err.splitlines() if line.startswith(("age", "city", "kind", "member")))
    assert "number, standard scaling" in age and "missing cells filled with" in age and "and an indicator" in age
    assert "3 categories, one-hot" in city and "2 categories, one-hot" in member
    assert "categories, as codes 0 to" in kind
    code, out, _ = run(capsys, "evaluate", "shop.safetensors", shop, "--json")
    found = json.loads(out)
    assert code == 0 and found["rows"] == 400 and found["accuracy"] > 0.8
    network = gm.load("shop.safetensors")
    assert network.classes.tolist() == ["buys", "leaves"] and network.feature_names == ["age", "city", "kind", "member"]
    assert len(network.code_sizes) == 1


def test_raw_rows_go_in_again(capsys, shop, here):
    run(capsys, "train", shop, "--target", "outcome", "--epochs", 3, "--quiet", "--output", "m.safetensors")
    new = write(here / "new.csv", ["member", "more", "kind", "age", "city"], [["yes", "-", "unseen", "", "Rome"]] * 3)
    code, out, _ = run(capsys, "predict", "m.safetensors", new)
    assert code == 0 and set(out.split()[1:]) <= {"buys", "leaves"} and len(out.split()) == 4
    code, out, _ = run(capsys, "predict", "m.safetensors", new, "--proba", "--json")
    found = json.loads(out)
    assert found["columns"] == ["probability_buys", "probability_leaves"]
    np.testing.assert_allclose(np.sum(found["rows"], axis=1), 1, atol=1e-6)
    assert not (here / "new.safetensors").exists()


def test_a_regression_over_a_table(capsys, here):
    rng = np.random.default_rng(1)
    kinds = rng.choice(["flat", "house", "boat"], 600)
    size = rng.uniform(20, 200, 600)
    price = 1000 * size * (1 + (kinds == "house")) + 50_000 * (kinds == "boat")
    rows = [[k, f"{s:.2f}", f"{p:.1f}"] for k, s, p in zip(kinds, size, price, strict=True)]
    path = write(here / "homes.csv", ["kind", "size", "price"], rows)
    code, out, _ = run(capsys, "train", path, "--target", "price", "--json", "--quiet")
    found = json.loads(out)
    assert code == 0 and found["test"]["r2"] > 0.97 and found["columns"][0] == {
        "kind": "one-hot", "name": "kind", "missing": 0, "categories": 3,
    }  # fmt: skip
    code, out, _ = run(capsys, "predict", "homes.safetensors", path)
    assert np.abs(np.array(out.split()[1:], float) - price).mean() < 0.1 * price.std()  # in the units of the target


def test_parquet(capsys, shop, here):
    pa = pytest.importorskip("pyarrow", reason="the extra parquet")
    import pyarrow.parquet as parquet

    header, rows = people()
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    columns["age"] = [None if cell in ("", "?") else float(cell) for cell in columns["age"]]
    parquet.write_table(pa.table({name: list(cells) for name, cells in columns.items()}), here / "shop.parquet")
    options = ("--target", "outcome", "--epochs", 4, "--quiet", "--json")
    results = []
    for path in (here / "shop.parquet", shop):
        code, out, _ = run(capsys, "train", path, *options, "--output", f"{path.suffix[1:]}.safetensors")
        assert code == 0
        results.append(json.loads(out))
    assert results[0]["test"] == results[1]["test"] and results[0]["columns"] == results[1]["columns"]
    for rows in ("shop.parquet", shop):
        assert run(capsys, "evaluate", "parquet.safetensors", rows)[0] == 0
    data = load_table(here / "shop.parquet", target="outcome")
    assert data.classes.tolist() == ["buys", "leaves"] and "4 columns of a table" in repr(data)
    with pytest.raises(ValueError, match=r'shop.parquet, row \d+, column "age": the cell is empty; drop the row'):
        load_table(here / "shop.parquet", target="age")
    (here / "bad.parquet").write_bytes(b"PAR1 no")
    code, _, err = run(capsys, "train", "bad.parquet", "--target", "x")
    assert code == 2 and "bad.parquet cannot be read as Parquet" in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--scaling", "piecewise", "--impute", "mean"],
        ["--scaling", "none", "--one-hot-limit", "1000"],
        ["--scaling", "quantile", "--one-hot-limit", "0", "--embedding-size", "3"],
        ["--scaling", "robust", "--categorical", "age,city,kind,member"],
        ["--ema", "0.99", "--patience", "0", "--epochs", "5", "--schedule", "one_cycle"],
    ],
)
def test_flags_of_tables(capsys, shop, flags):
    code, _, _ = run(capsys, "train", shop, "--target", "outcome", "--epochs", 2, "--quiet", *flags)
    assert code == 0 and run(capsys, "evaluate", "shop.safetensors", shop)[0] == 0


def test_parquets_own_types_are_those_of_csv(capsys, here):
    pa = pytest.importorskip("pyarrow", reason="the extra parquet")
    from decimal import Decimal

    import pyarrow.parquet as parquet

    n = 60
    x, yes = [float(i) for i in range(n)], [i % 2 == 0 for i in range(n)]
    parquet.write_table(
        pa.table({"x": x, "yes": yes, "cost": [Decimal(f"{i}.5") for i in range(n)]}), here / "t.parquet"
    )
    write(here / "t.csv", ["x", "yes", "cost"], [[a, b, f"{int(a)}.5"] for a, b in zip(x, yes, strict=True)])
    for target in ("yes", "cost"):
        assert run(capsys, "train", "t.parquet", "--target", target, "--epochs", 2, "--quiet")[0] == 0
        for path in ("t.parquet", "t.csv"):
            code, _, err = run(capsys, "evaluate", "t.safetensors", path)
            assert code == 0, err
    with pytest.raises(ValueError, match=r"unknown ending; allowed are .*; load_table reads it"):
        gm.data.load(here / "t.parquet", target="yes")


def test_a_handful_of_rows(capsys, here):
    path = write(here / "few.csv", ["x", "y"], [[i, "ab"[i % 2]] for i in range(8)])
    code, out, err = run(capsys, "train", path, "--target", "y", "--epochs", 2, "--quiet")
    assert code == 0 and "2 epochs" in out, err


def test_a_boundary_over_a_table_of_numbers(capsys, here):
    pytest.importorskip("matplotlib", reason="the extra plot")
    rng = np.random.default_rng(0)
    X = 100 + 30 * rng.normal(size=(200, 2))
    rows = [[f"{a:.3f}", f"{b:.3f}", "in" if np.hypot(a - 100, b - 100) < 30 else "out"] for a, b in X]
    path = write(here / "disc.csv", ["a", "b", "where"], rows)
    pictures = ["--boundary", "b.png", "--confusion", "c.png", "--plot", "p.png"]
    code, _, _ = run(capsys, "train", path, "--target", "where", "--epochs", 3, "--quiet", *pictures)
    assert code == 0 and all((here / name).read_bytes().startswith(b"\x89PNG") for name in pictures[1::2])
    code, _, err = run(capsys, "train", path, "--target", "b", "--boundary", "b.png")
    assert code == 2 and "--boundary draws two features of a classification or one of a regression" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--scaling", "robust"], "--scaling is for tables (.csv, .csv.gz, .parquet); digits is none"),
        (["digits", "--one-hot-limit", "3"], "--one-hot-limit is for tables"),
        (["shop.csv", "--target", "outcome", "--standardize", "global"], "--standardize global is for arrays"),
        (["shop.csv", "--target", "outcome", "--categorical", "aeg"], "shop.csv: categorical_features names 'aeg'"),
        (["shop.csv", "--target", "outcome", "--embedding-size", "3", "--one-hot-limit", "999"], "there are none"),
        (["shop.csv", "--target", "age"], 'shop.csv, line 2, column "age": the cell is empty'),
        (["shop.csv"], "which column is the target? Name it with target"),
        (["gaps.csv", "--target", "y", "--boundary", "b.png"], "--boundary: the test rows[0, 0] is nan"),
        (
            ["unknown.csv", "--target", "y"],
            "unknown.csv, line 3, column \"y\": the cell is '?', nothing known; drop the row",
        ),
        (["wrong.csv", "--target", "y"], 'wrong.csv: column "x", row 1: inf is infinite; correct the cell'),
    ],
)
def test_what_is_refused(capsys, here, arguments, message):
    header, rows = people(50)
    rows[0][0] = ""
    write(here / "shop.csv", header, rows)
    write(here / "wrong.csv", ["x", "y"], [["1", "a"], ["inf", "b"], ["2", "a"], ["3", "b"]] * 3)
    write(here / "gaps.csv", ["a", "b", "y"], [["", i, "uv"[i % 2]] for i in range(90)])
    write(here / "unknown.csv", ["x", "y"], [["1", "a"], ["2", "?"]])
    code, out, err = run(capsys, "train", *arguments)
    assert code == 2 and message in err and not out and not list(here.glob("*.safetensors"))


def test_adult(capsys):
    """The figure that README.md names: without a flag, on the official test rows."""
    folder = DATA / "adult"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set GPUMLP_DATA)")
    assert run(capsys, "train", folder / "train.csv.gz", "--target", "income", "--quiet")[0] == 0
    code, out, _ = run(capsys, "evaluate", "train.safetensors", folder / "test.csv.gz", "--json")
    found = json.loads(out)
    assert code == 0 and found["rows"] == 16281 and found["accuracy"] >= 0.852
