import builtins
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpumlp import plots

pytest.importorskip("matplotlib")


def history(n=30, models=None, every=1):
    """Returns a plausible history: validation worsens after the middle, and is measured every few epochs."""
    t = np.linspace(0, 1, n)
    loss, val_loss = 0.1 + np.exp(-6 * t), 0.3 + np.exp(-6 * t) + 0.4 * t**2
    if models:
        spread = np.linspace(0.8, 1.2, models)
        loss, val_loss = loss[:, None] * spread, val_loss[:, None] * spread
    return {
        "epoch": list(range(1, n + 1)),
        "loss": loss.tolist(),
        "val_loss": [v if i % every == 0 else None for i, v in enumerate(val_loss.tolist())],
        "val_accuracy": (1 - val_loss / 3).tolist(),
        "learning_rate": [0.1] * n,
        "seconds": [1.0] * n,
    }


class Linear:
    """Classes by distance to fixed centres; its predict is a curve."""

    def __init__(self, n_classes=2):
        self.centres = np.array([[-1.0, 0], [1, 0.3], [0, 1.5]])[:n_classes]

    def predict_proba(self, X):
        p = np.exp(-((X[:, None] - self.centres) ** 2).sum(-1))
        return p / p.sum(axis=1, keepdims=True)

    def predict(self, X):
        return np.sin(X[:, 0])


def points(n=40, n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    return Linear(n_classes).centres[y] + 0.5 * rng.normal(size=(n, 2)), y


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def each_figure(path=None):
    X, y = points()
    yield lambda: plots.learning_curves(history(), path)
    yield lambda: plots.confusion_matrix([0, 1, 1], [0, 1, 0], path=path)
    yield lambda: plots.decision_boundary(Linear(), X, y, path)
    yield lambda: plots.regression_curve(Linear(), X[:, :1], X[:, 1], path)


@pytest.mark.parametrize("extension", ["png", "svg", "pdf", "PNG"])
def test_saves_by_extension(tmp_path, extension):
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[extension.lower()]
    path = tmp_path / f"picture.{extension}"
    for draw in each_figure(path):
        path.unlink(missing_ok=True)
        draw()
        assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_refuses_other_extensions_and_missing_folders(tmp_path):
    for draw in each_figure(tmp_path / "picture.jpg"):
        with pytest.raises(ValueError, match=r"picture\.jpg' must end in one of \.png, \.svg, \.pdf"):
            draw()
    for draw in each_figure(str(tmp_path / "absent" / "picture.png")):
        with pytest.raises(FileNotFoundError, match=r"absent' does not exist; create it first"):
            draw()
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        plots.learning_curves(history(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_names_the_extra(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for draw in each_figure():
        with pytest.raises(ImportError, match=r'pip install "gpumlp\[plot\]"'):
            draw()


def test_import_is_light_and_pyplot_is_never_used():
    program = (
        "import sys; from gpumlp import plots; assert 'matplotlib' not in sys.modules;"
        "plots.learning_curves({'loss': [2.0, 1.0]}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


# Learning curves.


def test_learning_curves_panels_and_best_epoch():
    loss, metric = plots.learning_curves(history()).axes
    best = int(np.argmin(history()["val_loss"]))
    assert labels_of(loss)[:2] == ["training", "validation"]
    assert labels_of(loss)[2] == f"best validation: {history()['val_loss'][best]:.4g} at epoch {best + 1}"
    assert loss.get_ylabel() == "Loss" and metric.get_ylabel() == "Accuracy"
    assert loss.get_xlabel() == metric.get_xlabel() == "Epoch"
    assert loss.get_yscale() == "linear"
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), history()["loss"])


def test_learning_curves_of_losses_alone():
    (axes,) = plots.learning_curves({"loss": [3.0, 2.0, 1.0]}).axes
    assert labels_of(axes) == ["training"]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])  # no "epoch" column
    (axes,) = plots.learning_curves({"loss": [3.0, 2.0], "val_loss": [None, None]}).axes
    assert labels_of(axes) == ["training"]


def test_learning_curves_connect_measured_epochs():
    axes = plots.learning_curves(history(31, every=5)).axes[0]
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [1, 6, 11, 16, 21, 26, 31])


def test_learning_curves_of_one_epoch_has_visible_points():
    for axes in plots.learning_curves(history(1)).axes:
        assert axes.lines[0].get_marker() == "o"
        assert axes.get_xticks().tolist() == [1]


def test_learning_curves_split_scores_and_errors():
    columns = {"loss": [2.0, 1.0]} | {
        name: [0.5, 0.4] for name in ("roc_auc", "val_roc_auc", "val_f1", "own", "val_root_mean_squared_error")
    }
    _, score, error = plots.learning_curves(columns).axes
    assert labels_of(score) == ["ROC AUC, training", "ROC AUC, validation", "F1, validation", "own, training"]
    assert score.get_ylabel() == "Score" and error.get_ylabel() == "Root mean squared error"
    training, validation = score.lines[:2]
    assert training.get_color() == validation.get_color() and training.get_alpha() < validation.get_alpha()


def test_learning_curves_logarithmic_beyond_two_decades():
    def scale(loss):
        return plots.learning_curves({"loss": loss, "val_accuracy": [0.001, 0.9]}).axes

    assert scale([100.0, 1.0])[0].get_yscale() == "linear"
    assert scale([100.1, 1.0])[0].get_yscale() == "log"
    assert scale([100.1, 1.0])[1].get_yscale() == "linear"  # a score is a share, whatever its range
    assert scale([100.1, -1.0])[0].get_yscale() == "linear"  # a negative loss has no logarithm
    assert scale([1e9, float("inf")])[0].get_yscale() == "linear"


def test_learning_curves_of_a_fleet_draws_each_model_and_the_mean():
    columns = history(30, models=4)
    axes = plots.learning_curves(columns).axes[0]
    assert labels_of(axes)[0] == "training (mean of 4)"
    assert len(axes.lines) == 2 * (4 + 1) + 2  # the best epoch adds a line and a ring
    np.testing.assert_allclose(axes.lines[4].get_ydata(), np.mean(columns["loss"], axis=1))


def test_learning_curves_leave_diverged_models_out_of_the_mean():
    columns = {"loss": [[2.0, 4.0], [1.0, float("nan")], [0.5, float("inf")], [float("nan")] * 2]}
    axes = plots.learning_curves(columns).axes[0]
    np.testing.assert_array_equal(axes.lines[2].get_ydata(), [3.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"history has the columns \[\]; it needs 'loss' or 'val_loss'"),
        ({"accuracy": [1.0]}, r"columns \['accuracy'\]; it needs"),
        ({"loss": [1.0, 2.0], "val_loss": [1.0]}, r"equally long.*'val_loss': 1"),
        ({"loss": []}, "history has no epochs"),
        ({"loss": [float("nan"), None]}, "history has no finite loss"),
        ({"loss": [[1.0, 2.0], [1.0]]}, r"history\['loss'\] must hold one number, or one list of a fixed length"),
        ({"loss": [[[1.0]], [[2.0]]]}, r"history\['loss'\] must hold"),
    ],
)
def test_learning_curves_refuse_a_bad_history(columns, message):
    with pytest.raises(ValueError, match=message):
        plots.learning_curves(columns)


# Confusion matrix.


def test_confusion_matrix_counts_names_and_shares():
    figure = plots.confusion_matrix([0, 0, 0, 1, 2], [0, 0, 1, 1, 0], ["ham", "spam", "egg"])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ham", "spam", "egg"]
    cells = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}  # (column, row)
    assert cells == {(0, 0): "2", (1, 0): "1", (1, 1): "1", (0, 2): "1"}
    np.testing.assert_allclose(axes.images[0].get_array()[0], [2 / 3, 1 / 3, 0])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted class", "True class")


def test_confusion_matrix_labels_by_value_or_name():
    by_value = plots.confusion_matrix(["b", "a", "c"], ["b", "b", "c"]).axes[0]
    by_name = plots.confusion_matrix(["b", "a", "c"], ["b", "b", "c"], ["c", "b", "a"]).axes[0]
    assert [t.get_text() for t in by_value.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in by_name.get_xticklabels()] == ["c", "b", "a"]
    assert by_value.images[0].get_array()[0].tolist() == [0, 1, 0]  # the one "a" was called "b"
    assert by_name.images[0].get_array()[2].tolist() == [0, 1, 0]
    assert [t.get_text() for t in plots.confusion_matrix([3, 8], [3, 3]).axes[0].get_xticklabels()] == ["3", "8"]


def test_confusion_matrix_of_a_class_without_rows_or_of_many_classes():
    assert plots.confusion_matrix([0, 0], [0, 1], ["a", "b"]).axes[0].images[0].get_array()[1].tolist() == [0, 0]
    y = np.arange(100)
    axes = plots.confusion_matrix(y, y).axes[0]
    assert not axes.texts and len(axes.get_xticklabels()) <= 40


def test_confusion_matrix_wraps_and_slants_long_names():
    long = "a customer who stays with the company"
    axes = plots.confusion_matrix([0, 1], [0, 1], [long, "leaves"]).axes[0]
    text = axes.get_xticklabels()[0]
    assert "\n" in text.get_text() and text.get_rotation() == 45


def test_confusion_matrix_refuses_other_labels():
    with pytest.raises(ValueError, match=r"y_pred holds 2; labels must be class indices 0 \.\.\. 1"):
        plots.confusion_matrix([0, 1], [0, 2], ["a", "b"])
    with pytest.raises(ValueError, match=r"y_true holds 'c', which is not among classes=\['a', 'b'\]"):
        plots.confusion_matrix(["a", "c"], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="must hold one kind of labels, or give classes"):
        plots.confusion_matrix(["a", "b"], [0, 1])
    with pytest.raises(ValueError, match="same number of rows"):
        plots.confusion_matrix([0, 1], [0])


# Boundaries and curves.


@pytest.mark.parametrize("n_classes", [2, 3])
def test_decision_boundary(n_classes):
    X, y = points(n_classes=n_classes)
    axes = plots.decision_boundary(Linear(n_classes), X.astype(np.float32), y).axes[0]
    assert labels_of(axes) == [str(k) for k in range(n_classes)]
    picture = axes.images[0].get_array()
    assert picture.shape[-1] == 3 and 0 <= picture.min() < picture.max() <= 1
    assert sum(len(points.get_offsets()) for points in axes.collections if points.get_label() in "012") == len(X)
    low, high = axes.get_xlim()
    assert low < X[:, 0].min() and X[:, 0].max() < high


def test_decision_boundary_is_where_two_classes_are_equal():
    X, y = points()
    axes = plots.decision_boundary(Linear(), X, y).axes[0]
    (line,) = [c for c in axes.collections if hasattr(c, "levels")]
    on_line = np.concatenate([path.vertices for path in line.get_paths()])
    np.testing.assert_allclose(Linear().predict_proba(on_line), 0.5, atol=1e-3)


def test_decision_boundary_names_other_labels_and_allows_an_absent_class():
    X, y = points()
    assert labels_of(plots.decision_boundary(Linear(), X, np.array(["no", "yes"])[y]).axes[0]) == ["no", "yes"]
    assert labels_of(plots.decision_boundary(Linear(3), X, y).axes[0]) == ["0", "1", "2"]


def test_decision_boundary_of_a_sure_network_has_no_line():
    class Sure:
        def predict_proba(self, X):
            return np.tile([1.0, 0.0], (len(X), 1))

    axes = plots.decision_boundary(Sure(), *points()).axes[0]
    assert not any(hasattr(c, "levels") for c in axes.collections)


def test_decision_boundary_refuses_other_input():
    X, y = points()
    with pytest.raises(ValueError, match=r"X of shape \(40, 3\) must be \(n_samples, 2\).*use regression_curve"):
        plots.decision_boundary(Linear(), np.ones((40, 3)), y)
    with pytest.raises(ValueError, match=r"y of shape \(39,\) must have one entry per row of X \(40\)"):
        plots.decision_boundary(Linear(), X, y[:-1])
    with pytest.raises(ValueError, match="X has no rows"):
        plots.decision_boundary(Linear(), X[:0], y[:0])
    with pytest.raises(ValueError, match="X must hold finite numbers"):
        plots.decision_boundary(Linear(), X * np.nan, y)
    with pytest.raises(ValueError, match=r"y has 5 classes, but the network predicts 2; pass class indices 0 \.\.\. 1"):
        plots.decision_boundary(Linear(), X, np.arange(40) % 5)

    class Labels:
        def predict_proba(self, X):
            return np.zeros(len(X))

    with pytest.raises(ValueError, match=r"predict_proba returned shape \(40000,\) for 40000 rows"):
        plots.decision_boundary(Labels(), X, y)


def test_regression_curve():
    x = np.linspace(-2, 2, 30)
    for X in (x, x[:, None]):
        axes = plots.regression_curve(Linear(), X, np.sin(x)).axes[0]
        assert labels_of(axes) == ["data", "prediction"]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), np.sin(axes.lines[0].get_xdata()))


def test_regression_curve_of_several_outputs_and_of_one_point():
    class Two:
        def predict(self, X):
            return np.concatenate([X, -X], axis=1)

    x = np.linspace(-2, 2, 30)
    axes = plots.regression_curve(Two(), x, np.stack([x, -x], axis=1)).axes[0]
    assert labels_of(axes) == ["data 1", "prediction 1", "data 2", "prediction 2"]
    assert plots.regression_curve(Linear(), [1.0], [2.0]).axes[0].get_xlim() == (0, 2)


def test_regression_curve_refuses_other_input():
    with pytest.raises(ValueError, match=r"X of shape \(5, 2\) must be .* a curve needs exactly one feature"):
        plots.regression_curve(Linear(), np.ones((5, 2)), np.ones(5))
    with pytest.raises(ValueError, match=r"y of shape \(4,\) must have one entry per row of X \(5\)"):
        plots.regression_curve(Linear(), np.ones(5), np.ones(4))
    with pytest.raises(ValueError, match="predict returned 1 outputs per row, but y has 3"):
        plots.regression_curve(Linear(), np.ones(5), np.ones((5, 3)))
