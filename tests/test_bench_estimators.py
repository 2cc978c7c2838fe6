"""The benchmark of the estimators on real tables: reading, preparing, its check, its noise, its report. No time matters."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_bench import BENCH

ROWS = 90
DTYPES = ("default", "float64", "float32")
SETS = ["adult", "california-housing", "yeast-multilabel"]


@pytest.fixture
def bench(monkeypatch):
    """The scripts as they see each other; `bench` is a folder of scripts, not a package."""
    if not BENCH.exists():
        pytest.skip("the benchmarks are not shipped with an installed package")
    monkeypatch.syspath_prepend(str(BENCH))
    import estimator_peers
    import estimators
    import tables
    import train_step

    modules = (estimator_peers, estimators, tables, train_step)
    return SimpleNamespace(**{module.__name__: module for module in modules})


def write_csv(path, header, rows):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in [header, *rows])


@pytest.fixture
def data(tmp_path):
    """Three sets in the form of the real ones: categories, missing cells, a category that only test rows have."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()

    def people(n, workclass):
        ages = rng.integers(20, 60, n)
        return [(age, workclass[age % 3], age % 7, ">50K" if age > 40 else "<=50K") for age in ages.tolist()]

    header = ("age", "workclass", "hours", "income")
    write_csv(folder / "adult" / "train.csv.gz", header, people(ROWS, ["Private", "None", "?"]))
    write_csv(folder / "adult" / "test.csv.gz", header, people(30, ["Private", "State", "?"]))
    rooms = rng.uniform(1, 9, ROWS).round(3)
    houses = [("" if i % 9 == 0 else room, "INLAND" if i % 2 else "ISLAND", 5 * room) for i, room in enumerate(rooms)]
    header = ("total_bedrooms", "ocean_proximity", "median_house_value")
    write_csv(folder / "california-housing" / "housing.csv.gz", header, houses)
    X = rng.standard_normal((ROWS, 4)).astype(np.float32)
    Y = (X[:, :3] > 0).astype(np.uint8)
    (folder / "yeast-multilabel").mkdir()
    arrays = {"X_train": X[:60], "Y_train": Y[:60], "X_test": X[60:], "Y_test": Y[60:]}
    np.savez(folder / "yeast-multilabel" / "yeast-multilabel.npz", **arrays)
    return folder


@pytest.fixture
def in_this_process(bench, monkeypatch, tmp_path):
    """Peers without processes of their own; what they are asked for is noted."""
    asked = []

    def run(script, library, source, rest, environment):
        name, dtypes, epochs, seed = rest
        asked.append((name, library, dtypes, epochs, seed, environment["OMP_NUM_THREADS"]))
        bench.estimator_peers.main(library, str(source), str(tmp_path / "found.json"), *rest)
        return json.loads((tmp_path / "found.json").read_text())

    monkeypatch.setattr(bench.estimators, "run_script", run)
    return asked


def fits(*scores, seconds=1.0, **more):
    """What a library found in each round."""
    return [{"seconds": seconds, "score": score, "check_error": 1e-7, **more} for score in scores]


def paired(theirs, ours):
    return [
        {"scikit-learn": {"float64": a}, "gpumlp": {"float64": b}} for a, b in zip(theirs, ours, strict=True)
    ]  # fmt: skip


# --- scores and report: without scikit-learn


def test_a_score_may_be_behind_by_noise_alone(bench):
    theirs = fits(0.80, 0.81, 0.82, seconds=3.0)
    found = bench.estimators.summarise(paired(theirs, fits(0.79, 0.80, 0.81, seconds=2.0)), "float64", "")
    assert found["noise"] == pytest.approx(4 * np.sqrt(2 * 0.01**2 / 3))
    assert (found["status"], found["note"], found["ratio"]) == ("ok", "", 1.5)
    assert found["peers"]["scikit-learn"]["score"] == {"median": 0.81, "rounds": [0.80, 0.81, 0.82]}
    found = bench.estimators.summarise(paired(theirs, fits(0.76, 0.77, 0.78)), "float64", "")
    assert (found["status"], found["note"]) == ("behind", "gpumlp's score is 0.0400 lower, noise explains 0.0327")
    found = bench.estimators.summarise(paired(theirs, fits(0.96, 0.97, 0.98)), "float64", "")
    assert found["status"] == "ok"


def test_a_set_without_all_it_needs_has_no_figures(bench):
    summarise = bench.estimators.summarise
    few = paired(fits(0.8, 0.8), fits(0.8, 0.8))
    assert summarise(few, "float64", "")["status"] == "no time"
    assert summarise(few, "float64", "no room") == {"status": "failed", "note": "no room"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets", "iris"], "iris is not known; choose from adult, california-housing, diamonds"),
        (["--repeats", "2"], "2 is not allowed; give 3 or more, fewer tell no noise"),
        (["--repeats", "many"], "many is not allowed; give 3 or more"),
        (["--epochs", "0"], "0 is not allowed; give a number above 0"),
        (["--seconds", "-1"], "-1 is not allowed; give a number above 0"),
    ],
)
def test_wrong_arguments_name_what_is_allowed(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench.estimators.main(arguments)
    assert message in capsys.readouterr().err


def test_what_is_measured_unless_asked_otherwise(bench):
    usual, raw = bench.estimators.parse([]), bench.estimators.parse(["--raw"])
    assert usual.sets == list(bench.tables.SOURCES)
    assert raw.sets == ["adult", "california-housing", "diamonds"]
    assert (usual.repeats, usual.epochs, usual.seconds) == (5, None, np.inf)
    assert bench.estimators.parse(["--raw", "--sets", "diamonds,adult"]).sets == ["diamonds", "adult"]
    assert [source.epochs for source in bench.tables.SOURCES.values()] == [20, 20, 20, 5, 20, 20, 20]


def test_every_second_round_goes_backwards(bench):
    assert [bench.estimators.turn("abc", i) for i in range(3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_what_is_not_installed_is_named(bench, monkeypatch):
    monkeypatch.setattr(bench.estimators.importlib.util, "find_spec", lambda name: None if name == "pandas" else name)
    with pytest.raises(SystemExit, match=r"needs scikit-learn and pandas: pip install pandas$"):
        bench.estimators.main([])


def test_a_folder_without_any_set_is_an_error(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.estimators.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match="holds none of adult, diamonds: name the folder with --data or GPUMLP_DATA"):
        bench.estimators.main(["--data", str(tmp_path), "--sets", "adult,diamonds"])


# --- tables


@pytest.fixture
def pandas():
    pytest.importorskip("sklearn")
    return pytest.importorskip("pandas")


@pytest.mark.peer
def test_an_official_split_is_kept_and_missing_cells_are_missing(bench, data, pandas):
    rows = bench.tables.read("adult", data)
    assert (rows.X.shape, rows.X_test.shape) == ((ROWS, 3), (30, 3))
    assert list(rows.X) == ["age", "workclass", "hours"]
    assert set(rows.y) == {"<=50K", ">50K"} and rows.y.dtype.kind == "U"
    assert set(rows.X["workclass"].dropna()) == {"Private", "None"}  # a word, not a missing cell
    assert rows.X["workclass"].isna().any()
    prepared = bench.tables.prepare(rows)
    assert (prepared.X.shape, prepared.X_test.shape) == ((ROWS, 5), (30, 5))  # two numbers, three categories
    assert np.allclose(prepared.X[:, :2].mean(axis=0), 0) and np.allclose(prepared.X[:, :2].std(axis=0), 1)
    assert (prepared.X[:, 2:].sum(axis=1) == 1).all()
    unseen = (rows.X_test["workclass"] == "State").to_numpy()
    assert unseen.any() and (prepared.X_test[:, 2:].sum(axis=1) == ~unseen).all()


@pytest.mark.peer
def test_one_file_is_split_the_same_way_every_time_and_values_are_standardised(bench, data, pandas):
    rows, again = (bench.tables.read("california-housing", data) for _ in range(2))
    assert (len(rows.X), len(rows.X_test)) == (72, 18)
    assert rows.X.equals(again.X) and np.array_equal(rows.y_test, again.y_test)
    assert not set(rows.X.index) & set(rows.X_test.index)
    assert rows.y.mean() == pytest.approx(0) and rows.y.std() == pytest.approx(1)
    lines = np.concatenate([rows.X.index, rows.X_test.index])
    assert sorted(lines) == list(range(ROWS))
    prepared = bench.tables.prepare(rows)
    assert prepared.X.shape == (72, 4)  # a number, whether it is missing, two categories
    missing = rows.X["total_bedrooms"].isna().to_numpy()
    assert missing.any() and np.array_equal(prepared.X[:, 1], missing)
    assert (prepared.X[missing, 0] == 0).all()
    assert np.isfinite(prepared.X_test).all()


@pytest.mark.peer
def test_prepared_rows_survive_their_file(bench, data, pandas, tmp_path):
    for name in SETS:
        rows = bench.tables.prepare(bench.tables.read(name, data))
        assert rows.X.dtype == np.float64
        rows.save(tmp_path / f"{name}.npz")
        for saved, array in zip(bench.tables.Rows.load(tmp_path / f"{name}.npz"), rows, strict=True):
            assert np.array_equal(saved, array)


def test_absent_files_are_named(bench, data):
    assert bench.tables.absent("adult", data) == []
    (data / "adult" / "test.csv.gz").unlink()
    assert bench.tables.absent("adult", data) == ["adult/test.csv.gz"]
    assert bench.tables.absent("diamonds", Path("nowhere")) == ["diamonds/diamonds.csv.gz"]


# --- both libraries


@pytest.fixture
def run(bench, data, pandas, in_this_process, tmp_path):
    """Runs the script and returns its report."""

    def run(*arguments):
        path = tmp_path / "new folder" / "result.json"
        fixed = ["--data", str(data), "--repeats", "3", "--epochs", "2", "--threads", "1", "--json", str(path)]
        try:
            bench.estimators.main([*fixed, *arguments])
        finally:
            run.report = json.loads(path.read_text())
        return run.report

    return run


@pytest.mark.peer
def test_both_train_the_same_and_the_report_is_complete(bench, run, in_this_process, capsys):
    report = run("--sets", ",".join([*SETS, "diamonds"]))
    assert set(report) == {
        *("benchmark", "date", "device", "machine", "versions", "protocol", "skipped", "results"),
    }  # fmt: skip
    assert set(report["versions"]) >= {"python", "numpy", "gpumlp", "blas", "scikit-learn", "pandas"}
    assert report["versions"]["blas"]["threads"] == report["protocol"]["threads"] == 1
    assert report["skipped"] == {"diamonds": ["diamonds/diamonds.csv.gz"]}
    results = report["results"]
    assert [(r["set"], r["dtype"]) for r in results] == [(name, d) for name in SETS for d in DTYPES]
    assert [(r["rows"], r["test_rows"], r["columns"]) for r in results[::3]] == [(90, 30, 5), (72, 18, 4), (60, 30, 4)]
    for r in results:
        assert r["status"] == "ok" and r["epochs"] == 2
        for peer in r["peers"].values():
            assert max(peer["check_error"]["rounds"]) <= bench.estimators.TOLERANCES[r["dtype"]]
            assert len(peer["seconds"]["rounds"]) == 3 and peer["seconds"]["median"] > 0
            assert ("label_score" in peer) == (r["task"] == "labels")
    orders = [[asked[:2] for asked in in_this_process if asked[4] == seed] for seed in "012"]
    assert orders[0] == [(name, library) for name in SETS for library in ("scikit-learn", "gpumlp")]
    assert orders[1] == orders[0][::-1] and orders[2] == orders[0]
    assert {asked[2:4] + asked[5:] for asked in in_this_process} == {("default,float64,float32", "2", "1")}
    printed = capsys.readouterr().out
    assert "| adult 90 × 5, classes | float64 | 2 | 0." in printed
    assert "| adult 90 × 5, classes | by default: float64, float32 | 2 | 0." in printed
    assert "- diamonds: skipped, diamonds/diamonds.csv.gz not there" in printed


@pytest.mark.peer
def test_another_training_gets_no_figure_and_the_run_ends_with_an_error(bench, run, monkeypatch, capsys):
    usual = bench.estimator_peers.LIBRARIES["gpumlp"]

    def faster(*arguments, **options):
        return usual(*arguments, **options | {"learning_rate_init": 1.1e-3})

    monkeypatch.setitem(bench.estimator_peers.LIBRARIES, "gpumlp", faster)
    with pytest.raises(SystemExit, match="behind scikit-learn's, or a fit failed: see the notes"):
        run("--sets", "yeast-multilabel")
    assert [(r["status"], "peers" in r) for r in run.report["results"]] == [("failed", False)] * 3
    printed = capsys.readouterr().out
    assert printed.count("- yeast-multilabel: gpumlp trains something else than scikit-learn on yeast-multilabel") == 1
    assert "| yeast-multilabel 60 × 4, labels | float32 | 2 | failed |" in printed


@pytest.mark.peer
def test_a_worse_score_ends_the_run_with_an_error(bench, run, monkeypatch, capsys):
    measure = bench.estimator_peers.measure

    def worse(library, *arguments):
        found = measure(library, *arguments)
        return found | {"score": found["score"] - 2.0 * (library == "gpumlp")}

    monkeypatch.setattr(bench.estimator_peers, "measure", worse)
    with pytest.raises(SystemExit, match="gpumlp's score is behind scikit-learn's"):
        run("--sets", "california-housing")
    assert [r["status"] for r in run.report["results"]] == ["behind"] * 3
    assert "- california-housing float32: gpumlp's score is 2." in capsys.readouterr().out


@pytest.mark.peer
def test_no_further_set_is_begun_when_the_time_is_over(run, capsys):
    report = run("--sets", "adult", "--seconds", "1e-9")
    assert [r["status"] for r in report["results"]] == ["no time"] * 3
    assert "- adult: 0 of the 3 rounds that noise is told by" in capsys.readouterr().out


@pytest.mark.peer
def test_raw_tables_go_to_gpumlp_as_they_are(bench, run, monkeypatch):
    seen = []

    usual = bench.estimator_peers.LIBRARIES["gpumlp"]

    def watched(task, dtype, raw, **options):
        model = usual(task, dtype, raw, **options)
        fit = model.fit
        monkeypatch.setattr(
            model, "fit", lambda X, y: seen.append((list(X), len(X), dtype)) or fit(X, y), raising=False
        )
        return model

    monkeypatch.setitem(bench.estimator_peers.LIBRARIES, "gpumlp", watched)
    report = run("--raw", "--sets", "adult")
    assert report["protocol"]["raw"] is True
    assert [(r["columns"], r["status"], r["ratio"] > 0) for r in report["results"]] == [(3, "ok", True)] * 3
    assert seen == [(["age", "workclass", "hours"], ROWS, dtype) for dtype in DTYPES for _ in "ab"] * 3


@pytest.mark.peer
def test_the_peers_run_in_processes_of_their_own(bench, data, pandas, tmp_path):
    bench.tables.prepare(bench.tables.read("yeast-multilabel", data)).save(tmp_path / "yeast.npz")
    args = SimpleNamespace(epochs=2, threads=1, raw=False)
    found = bench.estimators.run_pair(args, "yeast-multilabel", tmp_path / "yeast.npz", 0)
    assert {library: set(by_dtype) for library, by_dtype in found.items()} == {
        library: set(DTYPES) for library in ("scikit-learn", "gpumlp")
    }
    with pytest.raises(bench.train_step.PeerError, match=r"(?s)process of gpumlp ended with status 1.*No such file"):
        bench.estimators.run_pair(args, "yeast-multilabel", tmp_path / "missing.npz", 1)
