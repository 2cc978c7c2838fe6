"""The command line as a user meets it: output, files, exit codes, messages."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.cli import main

FAST = ["--epochs", "3", "--hidden", "16", "--quiet"]


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(path):
    return list(csv.reader(path.read_text().splitlines()))


@pytest.fixture
def houses(tmp_path):
    """A CSV file for regression: price = 3 rooms + size, some noise."""
    rng = np.random.default_rng(0)
    rooms, size = rng.integers(1, 9, 300), rng.uniform(20, 200, 300)
    path = tmp_path / "houses.csv"
    lines = [f"{r},{s:.3f},{1000 * (3 * r + 0.2 * s) + rng.normal():.2f}" for r, s in zip(rooms, size, strict=True)]
    path.write_text("\n".join(["rooms,size,price", *lines]) + "\n")
    return path


@pytest.fixture
def flowers(tmp_path):
    """A CSV file with text labels."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 150)
    path = tmp_path / "flowers.csv"
    lines = [f"{k + rng.normal() / 5:.4f},{-k + rng.normal() / 5:.4f},{['rose', 'tulip', 'lily'][k]}" for k in kind]
    path.write_text("\n".join(["length,width,kind", *lines]) + "\n")
    return path


def test_train_digits_writes_a_picture_and_learns(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot")
    picture, confusion = tmp_path / "curves.png", tmp_path / "confusion.svg"
    code, out, _ = run(capsys, "train", "digits", "--quiet", "--plot", picture, "--confusion", confusion, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["test"]["accuracy"] > 0.95
    assert len(found["history"]["loss"]) == found["epochs"] == 20
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in confusion.read_bytes()


def test_messages_go_to_standard_error(capsys):
    code, out, err = run(capsys, "train", "xor", "--epochs", "1")
    assert code == 0
    assert out.startswith("test: loss ") and out.count("\n") == 1
    assert "800 rows to train on, 200 to test on" in err and "parameters" in err


def test_train_evaluate_predict_with_names(capsys, tmp_path, flowers):
    model, scores = tmp_path / "model.safetensors", tmp_path / "scores.csv"
    code, out, _ = run(
        capsys,
        "train",
        flowers,
        "--target",
        "kind",
        "--epochs",
        40,
        "--batch-size",
        16,
        "--quiet",
        "--output",
        model,
        "--json",
    )
    assert code == 0 and json.loads(out)["test"]["accuracy"] > 0.9
    code, out, _ = run(capsys, "evaluate", model, flowers, "--json")
    assert code == 0 and json.loads(out)["accuracy"] > 0.9 and json.loads(out)["rows"] == 150
    code, out, _ = run(capsys, "predict", model, flowers)
    lines = out.splitlines()
    assert code == 0 and lines[0] == "prediction" and set(lines[1:]) == {"rose", "tulip", "lily"}
    code, out, _ = run(capsys, "predict", model, flowers, "--proba", "--output", scores, "--json")
    table = rows_of(scores)
    assert table[0] == ["probability_lily", "probability_rose", "probability_tulip"]
    assert np.allclose(np.array(table[1:], float).sum(axis=1), 1, atol=1e-5)
    assert json.loads(out)["rows"] == 150


def test_columns_of_a_table_may_stand_in_another_order(capsys, tmp_path, flowers):
    model = tmp_path / "model.safetensors"
    run(capsys, "train", flowers, "--target", "kind", *FAST, "--output", model)
    before = run(capsys, "predict", model, flowers)[1]
    rows = rows_of(flowers)
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join(f"{k},{w},{l}" for l, w, k in rows) + "\n")
    assert run(capsys, "predict", model, turned)[1] == before
    assert run(capsys, "evaluate", model, turned)[1] == run(capsys, "evaluate", model, flowers)[1]


def test_regression_answers_in_the_units_of_the_target(capsys, tmp_path, houses):
    model = tmp_path / "model.safetensors"
    arguments = ["--target", "price", "--task", "regression", "--hidden", "32,16", "--activation", "gelu"]
    code, out, _ = run(
        capsys,
        "train",
        houses,
        *arguments,
        "--schedule",
        "cosine",
        "--epochs",
        60,
        "--quiet",
        "--output",
        model,
        "--json",
    )
    assert code == 0 and json.loads(out)["test"]["r2"] > 0.95
    code, out, _ = run(capsys, "predict", model, houses)
    price = np.array([float(row[2]) for row in rows_of(houses)[1:]])
    assert np.abs(np.array(out.splitlines()[1:], float) - price).mean() < 0.1 * price.std()
    assert run(capsys, "evaluate", model, houses)[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "lbfgs"],
        ["--optimizer", "sgd", "--learning-rate", "0.1", "--schedule", "step"],
        ["--norm", "batch", "--dropout", "0.2", "--input-dropout", "0.1", "--noise", "0.1", "--mixup", "0.2"],
        ["--shift", "1", "--label-smoothing", "0.1", "--l1", "1e-5", "--l2", "1e-4", "--clip-norm", "1"],
        ["--patience", "1", "--time-limit", "60", "--weight-decay", "0.01", "--optimizer", "adamw"],
        ["--hidden", "none", "--standardize", "columns", "--schedule", "cosine", "--warmup", "1"],
    ],
)
def test_options_reach_the_training(capsys, options):
    code, out, err = run(capsys, "train", "digits", *FAST, *options, "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["accuracy"] > 0.2


def test_binary_cross_entropy_has_one_output(capsys, tmp_path):
    model = tmp_path / "m.safetensors"
    code, _, err = run(capsys, "train", "moons", *FAST, "--loss", "binary_cross_entropy", "--output", model)
    assert code == 0, err
    assert gm.load(model).n_outputs == 1


def test_boundaries_and_curves_are_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot")
    for source in ("moons", "sine"):
        path = tmp_path / f"{source}.png"
        assert run(capsys, "train", source, *FAST, "--boundary", path)[0] == 0
        assert path.stat().st_size > 5000


def test_info(capsys):
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    found = json.loads(out)
    assert (
        found["gpumlp"] == gm.__version__ and found["numpy"] == np.__version__ and found["device"].startswith("cpu: ")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere"], "no file or folder nowhere"),
        (["train", "digits", "--activation", "swoosh"], "activation='swoosh' is unknown; allowed: identity"),
        (["train", "digits", "--loss", "huber"], "--loss huber does not fit classification; losses for it:"),
        (["train", "digits", "--loss", "nonsense"], "loss='nonsense' is unknown; allowed:"),
        (["train", "digits", "--loss", "binary_cross_entropy"], "needs two classes; digits has 10"),
        (["train", "digits", "--dropout", "1"], "dropout=1.0 must be a number in [0, 1)"),
        (["train", "digits", "--epochs", "0"], "epochs"),
        (["train", "digits", "--output", "/no/such/folder/m.safetensors"], "does not exist"),
        (["train", "digits", "--target", "x"], "only CSV files have target columns"),
        (["train", "moons", "--shift", "1"], "--shift moves images"),
        (["train", "sine", "--confusion", "c.png"], "--confusion needs classes"),
        (["train", "digits", "--boundary", "c.png"], "--boundary draws two features"),
        (["train", "digits", "--plot", "curves.gif"], "png"),
        (["train", "digits", "--schedule", "zigzag"], "zigzag"),
        (["train", "digits", "--device", "cuda"], "use device='cpu'"),
        (["evaluate", "nowhere.safetensors", "digits"], "nowhere.safetensors"),
    ],
)
def test_bad_use_is_explained(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == (1 if "cuda" in arguments else 2)
    assert message in err and out == ""
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train"], ["train", "digits", "--hidden", "12,x"], ["train", "digits", "--hidden", "0"]]
)
def test_bad_usage_exits_with_2(capsys, arguments):
    assert main(arguments) == 2
    assert "usage: gpumlp" in capsys.readouterr().err


def test_a_model_for_other_data_is_refused(capsys, tmp_path, flowers, houses):
    model = tmp_path / "m.safetensors"
    run(capsys, "train", flowers, "--target", "kind", *FAST, "--output", model)
    code, _, err = run(capsys, "predict", model, houses)
    assert code == 2 and f"{houses}: the table lacks the columns" in err
    code, _, err = run(capsys, "evaluate", model, "digits")
    assert code == 2 and "was trained on a table; give a file that is one" in err
    code, _, err = run(capsys, "evaluate", model, houses, "--target", "price")
    assert code == 2
    regression = tmp_path / "r.safetensors"
    run(capsys, "train", houses, "--target", "price", *FAST, "--output", regression)
    code, _, err = run(capsys, "predict", regression, houses, "--proba")
    assert code == 2 and "predicts values" in err
    model.write_bytes(model.read_bytes()[:-7])
    code, _, err = run(capsys, "predict", model, flowers)
    assert code == 2 and "m.safetensors" in err


def test_a_failed_picture_leaves_the_model(capsys, tmp_path, flowers):
    model = tmp_path / "m.safetensors"
    run(capsys, "train", flowers, "--target", "kind", *FAST, "--output", model, "--log", tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text().startswith("epoch,loss,val_loss,val_accuracy")
    assert model.exists()


def test_the_module_and_the_script_are_the_same_command():
    found = subprocess.run([sys.executable, "-m", "gpumlp", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"gpumlp {gm.__version__}"


def test_a_model_without_classes_is_evaluated_by_its_label_numbers(capsys, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    X = np.eye(3)[y] + 0.1 * rng.standard_normal((300, 3))
    network = gm.Network([gm.Dense(16, "relu"), gm.Dense(3)], n_features=3)
    gm.Trainer(network, "softmax_cross_entropy", gm.Adam(0.01)).fit(X, y, epochs=10, batch_size=16)
    network.save(tmp_path / "m.safetensors")
    rows = [(x, label) for x, label in zip(X, y, strict=True) if label > 0]  # class 0 does not occur in the file
    lines = ["a,b,c,kind", *(f"{x[0]},{x[1]},{x[2]},{label}" for x, label in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    code, out, err = run(
        capsys, "evaluate", tmp_path / "m.safetensors", tmp_path / "rows.csv", "--target", "kind", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["accuracy"] > 0.95


def test_the_test_rows_choose_nothing(capsys):
    for choosing in (["--patience", "50"], ["--schedule", "plateau"]):
        found = json.loads(run(capsys, "train", "moons", *FAST, *choosing, "--json")[1])
        assert found["history"]["val_loss"][-1] != found["test"]["loss"]
    found = json.loads(run(capsys, "train", "moons", *FAST, "--json")[1])
    assert found["history"]["val_loss"][-1] == found["test"]["loss"]


def test_classes_that_are_other_integers(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot")
    rng = np.random.default_rng(0)
    lines = ["a,b,kind", *(f"{k + rng.normal() / 9},{rng.normal()},{5 + k}" for k in rng.integers(0, 2, 100))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    code, _, err = run(
        capsys, "train", tmp_path / "rows.csv", "--target", "kind", *FAST, "--confusion", tmp_path / "c.png"
    )
    assert code == 0, err


def test_a_time_limit_before_the_first_epoch_ends(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot")
    code, out, err = run(
        capsys, "train", "digits", "--time-limit", "1e-6", "--plot", tmp_path / "c.png", "--epochs", "2"
    )
    assert code == 0 and out.startswith("test: loss")
    assert "is not drawn" in err and not (tmp_path / "c.png").exists()


def test_a_folder_is_no_file_and_a_fleet_no_model(capsys, tmp_path):
    code, _, err = run(capsys, "train", "digits", *FAST, "--output", tmp_path)
    assert code == 2 and "is a folder" in err
    gm.Network([gm.Dense(2)], n_features=2, models=3).save(tmp_path / "fleet.safetensors")
    for command in ("predict", "evaluate"):
        code, _, err = run(capsys, command, tmp_path / "fleet.safetensors", "moons")
        assert code == 2 and "holds a fleet of 3 models; save one of them" in err
    code, _, err = run(capsys, "train", "digits", *FAST, "--schedule", "one_cycle", "--warmup", "2")
    assert code == 2 and "--warmup belongs to --schedule cosine" in err
