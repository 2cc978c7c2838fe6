"""Pictures of a training and of what was learned (the extra `plot`).

Each function returns a matplotlib Figure. None of them goes through pyplot, so nothing global is touched and no
display is needed. With ``path`` the picture is also saved, whole or not at all.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import metrics
from .container import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")

# Okabe & Ito 2008 for lines (told apart with any colour vision), Petroff 2021 for up to ten classes.
BLUE, ORANGE = "#0072B2", "#D55E00"
LINE_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CLASS_COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
CLASS_MARKERS = "osD^vP*X<>"  # shape as well as colour, for those who see few colours
GREY = "#555555"
LEGEND: dict[str, Any] = {"fontsize": 8, "edgecolor": "none", "framealpha": 0.85}

NOT_CURVES = ("epoch", "learning_rate", "seconds")  # columns of a history that are no metric
GRID = 200  # points along each axis of a decision boundary


def learning_curves(history: Mapping[str, Sequence[Any]], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws losses, and metrics if there are any, over the epochs.

    The losses ("loss", "val_loss") are in the left panel, with the epoch of the best validation loss marked. The
    metrics are to the right: in one panel those of which larger is better, in another the errors. For a fleet each
    model is a thin line and the mean over the models a thick one. Losses and errors that span more than two decades get
    a logarithmic axis.

    Args:
        history: columns of equal length, one entry per epoch: "loss", "val_loss", metrics and "val_" metrics; "epoch"
            gives the numbers on the axis (default 1, 2, ...); "learning_rate" and "seconds" are not drawn. An entry is
            a number, a list of one number per model, or None where nothing was measured.
        path: where to save, by extension .png, .svg or .pdf.

    Returns:
        The figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a history without epochs or losses, columns of unequal length, or another extension.
    """
    figure_class = require_matplotlib()
    path = check_path(path)
    epoch, columns = _history_columns(history)
    losses: dict[str, np.ndarray] = {name: columns.pop(name) for name in ("loss", "val_loss") if name in columns}
    scores = {name: values for name, values in columns.items() if _larger_is_better(name)}
    errors = {name: values for name, values in columns.items() if name not in scores}
    panels = [panel for panel in (("Loss", losses), ("Score", scores), ("Error", errors)) if panel[1]]

    figure = figure_class(figsize=(1.0 + 4.6 * len(panels), 3.8), dpi=150, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_curves(axes, epoch, title, curves)
        if "val_loss" in curves:
            _mark_best(axes, epoch, _mean(curves["val_loss"]))
        if title != "Score" and _spans_two_decades(curves.values()):
            axes.set_yscale("log")
        _tidy(axes)
        axes.legend(**LEGEND)
    return _saved(figure, path)


def confusion_matrix(
    y_true: Any,
    y_pred: Any,
    classes: Sequence[Any] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws the counts of each true class (rows) and predicted class (columns), shaded by their share of the row.

    Args:
        y_true, y_pred: labels, (n_samples,) each: class indices, or names that occur in ``classes``.
        classes: the class names in the order of their indices; None takes the sorted labels that occur.
        path: where to save, by extension .png, .svg or .pdf.

    Returns:
        The figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: for labels that ``classes`` does not cover, unequal lengths, or another extension.
    """
    figure_class = require_matplotlib()
    path = check_path(path)
    y_true, y_pred, names = _class_indices(np.asarray(y_true), np.asarray(y_pred), classes)
    n = len(names)
    counts = metrics.confusion_matrix(y_true, y_pred, n)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)

    # Sizes in inches; 0.085 is about the width of a letter at 10 points.
    cell = float(np.clip(6.5 / n, 0.3, 1.2)) if n <= 30 else 9.0 / n
    names = [_wrapped(name) for name in names]
    letters = 0.085 * max(len(line) for name in names for line in name.split("\n"))
    step = 1 + (n - 1) // 40  # more names than 40 would run into each other
    slanted = letters > step * cell
    figure = figure_class(
        figsize=(n * cell + letters + 1.9, n * cell + (0.75 * letters + 0.5 if slanted else 0.8)),
        dpi=150,
        layout="compressed",
    )
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    shown = range(0, n, step)
    axes.set_xticks(shown, [names[k] for k in shown])
    axes.set_yticks(shown, [names[k] for k in shown])
    if slanted:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel("Predicted class")
    axes.set_ylabel("True class")
    axes.tick_params(length=0, labelsize=8 if n > 12 else 10)
    axes.spines[:].set_visible(False)
    if n <= 30:  # white lines between the cells
        axes.set_xticks(np.arange(n - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(n - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
    if cell >= 0.4:
        fontsize = 9 if cell >= 0.6 else 7
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[i, j] > 0.55 else "black"
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize=fontsize)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], aspect=20 if n > 4 else 12)
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label("Share of the true class")
    bar.outline.set_visible(False)  # type: ignore[operator]  # an artist at run time
    return _saved(figure, path)


def decision_boundary(network: Any, X: Any, y: Any, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws which class a network of two features predicts where, paler where it is less sure, with the data on top.

    Args:
        network: has ``predict_proba(X)``, which returns (n, n_classes) probabilities of the classes in sorted order.
        X: the points, (n_samples, 2).
        y: their classes, (n_samples,): class indices, or any labels if all classes occur.
        path: where to save, by extension .png, .svg or .pdf.

    Returns:
        The figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: if X has not two features, y does not fit, or for another extension.
    """
    figure_class = require_matplotlib()
    path = check_path(path)
    X, y = np.asarray(X), np.asarray(y)
    if X.ndim != 2 or X.shape[1] != 2:
        raise ValueError(
            f"X of shape {X.shape} must be (n_samples, 2): a boundary can be drawn over two features only; for a "
            "regression over one feature use regression_curve"
        )
    _check_rows(X, y, (1,))
    xs, ys = _span(X[:, 0]), _span(X[:, 1])
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    p = np.asarray(network.predict_proba(grid.astype(X.dtype if X.dtype.kind == "f" else np.float64)))
    if p.ndim != 2 or len(p) != len(grid) or p.shape[1] < 2:
        raise ValueError(
            f"network.predict_proba returned shape {p.shape} for {len(grid)} rows; it must be ({len(grid)}, n_classes)"
        )
    n_classes = p.shape[1]
    labels, names = _labels_for(y, n_classes)
    field = p.reshape(GRID, GRID, n_classes)  # (rows of the picture, columns, classes)

    figure = figure_class(figsize=(5.6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        _shaded(field), extent=(xs[0], xs[-1], ys[0], ys[-1]), origin="lower", aspect="auto", interpolation="bilinear"
    )
    _outline_regions(axes, xs, ys, field)
    size = float(np.clip(9000 / len(X), 1.5, 28))
    for k in range(n_classes):
        points = X[labels == k]
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=size,
            color=0.75 * _class_colour(k),  # darker than its region
            alpha=1.0 if size > 4 else 0.6,
            marker=CLASS_MARKERS[k % len(CLASS_MARKERS)],
            edgecolor="white" if size > 12 else "none",
            linewidth=0.5,
            label=_wrapped(names[k]),
            rasterized=len(X) > 5000,  # keeps svg and pdf small
        )
    axes.set_xlim(xs[0], xs[-1])
    axes.set_ylim(ys[0], ys[-1])
    columns = getattr(network, "feature_names", None) or ("Feature 1", "Feature 2")
    axes.set_xlabel(columns[0])
    axes.set_ylabel(columns[1])
    _tidy(axes, grid=False)
    legend = axes.legend(
        title="Class",
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        frameon=False,
        borderaxespad=0,
        handletextpad=0.2,
        alignment="left",
        markerscale=(30 / size) ** 0.5,  # of one size, however small the points
    )
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1.0)
    return _saved(figure, path)


def regression_curve(network: Any, X: Any, y: Any, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws what a network of one feature predicts, as a curve over the data.

    Args:
        network: has ``predict(X)``, which returns (n,) or (n, n_outputs) values for X (n, 1).
        X: the feature, (n_samples,) or (n_samples, 1).
        y: the targets, (n_samples,) or (n_samples, n_outputs).
        path: where to save, by extension .png, .svg or .pdf.

    Returns:
        The figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: if X has more than one feature, y does not fit, or for another extension.
    """
    figure_class = require_matplotlib()
    path = check_path(path)
    X, y = np.asarray(X), np.asarray(y)
    if not (X.ndim == 1 or (X.ndim == 2 and X.shape[1] == 1)):
        raise ValueError(
            f"X of shape {X.shape} must be (n_samples,) or (n_samples, 1): a curve needs exactly one feature"
        )
    X = X.reshape(-1)
    _check_rows(X, y, (1, 2))
    xs = _span(X)
    curve = np.asarray(network.predict(xs[:, None].astype(X.dtype if X.dtype.kind == "f" else np.float64)))
    curve, y = curve.reshape(len(xs), -1), y.reshape(len(y), -1)
    if curve.shape[1] != y.shape[1]:
        raise ValueError(f"network.predict returned {curve.shape[1]} outputs per row, but y has {y.shape[1]}")

    figure = figure_class(figsize=(5.6, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    size = float(np.clip(9000 / len(X), 2, 22))
    for k in range(y.shape[1]):
        colour = LINE_COLOURS[k % len(LINE_COLOURS)]
        which = f" {k + 1}" if y.shape[1] > 1 else ""
        axes.scatter(
            X, y[:, k], s=size, color=colour, alpha=0.35, linewidth=0, label=f"data{which}", rasterized=len(X) > 5000
        )
        axes.plot(xs, curve[:, k], color=colour, linewidth=2, label=f"prediction{which}")
    axes.set_xlim(xs[0], xs[-1])
    axes.set_xlabel((getattr(network, "feature_names", None) or ("Feature",))[0])
    axes.set_ylabel("Target")
    _tidy(axes)
    axes.legend(**LEGEND, markerscale=(22 / size) ** 0.5)
    return _saved(figure, path)


# Drawing.


def _draw_curves(axes: Axes, epoch: np.ndarray, title: str, curves: Mapping[str, np.ndarray]) -> None:
    """Draws the curves of one panel: in two colours, or, of several metrics, in one each and training paler."""
    from matplotlib.ticker import MaxNLocator

    bases = list(dict.fromkeys(name.removeprefix("val_") for name in curves))
    for name, values in curves.items():
        base, validation = name.removeprefix("val_"), name.startswith("val_")
        part = "validation" if validation else "training"
        if len(bases) == 1:  # then colour is free to tell the two apart, and the axis says what they are
            colour, label, alpha = (ORANGE if validation else BLUE), part, 1.0
        else:
            colour, label = LINE_COLOURS[bases.index(base) % len(LINE_COLOURS)], f"{_readable(base)}, {part}"
            alpha = 1.0 if validation else 0.4
        _draw_curve(axes, epoch, values, label, color=colour, alpha=alpha)
    axes.set_xlabel("Epoch")
    axes.set_ylabel(_capital(_readable(bases[0])) if len(bases) == 1 else title)
    if len(epoch) > 1:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    else:  # an axis around one point would show fractions of an epoch
        axes.set_xticks(epoch)


def _draw_curve(axes: Axes, epoch: np.ndarray, values: np.ndarray, label: str, color: str, alpha: float) -> None:
    """Draws (epochs, models) values, NaN where not measured: the mean, and under it each model if there are several."""
    measured = ~np.isnan(values).all(axis=1)
    epoch, values = epoch[measured], values[measured]
    if values.shape[1] > 1:
        axes.plot(epoch, values, color=color, linewidth=0.6, alpha=0.3 * alpha)
        label = f"{label} (mean of {values.shape[1]})"
    marker = "o" if len(epoch) <= 20 else ""  # a line through one point is invisible
    axes.plot(epoch, _mean(values), color=color, alpha=alpha, linewidth=1.8, marker=marker, markersize=4, label=label)


def _mark_best(axes: Axes, epoch: np.ndarray, values: np.ndarray) -> None:
    if np.isnan(values).all():
        return
    best = int(np.nanargmin(values))
    if len(epoch) > 1:
        axes.axvline(epoch[best], color=GREY, linewidth=0.9, linestyle=":", zorder=1)
    label = f"best validation: {values[best]:.4g} at epoch {epoch[best]:g}"
    axes.plot(
        epoch[best],
        values[best],
        "o",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor=GREY,
        label=label,
        zorder=4,
    )


def _shaded(field: np.ndarray) -> np.ndarray:
    """Returns an RGB picture of (rows, columns, n_classes) probabilities: the class colour, paler where less sure."""
    n_classes = field.shape[-1]
    colours = np.array([_class_colour(k) for k in range(n_classes)])
    sure = (field.max(axis=-1, keepdims=True) - 1 / n_classes) / (1 - 1 / n_classes)  # 0: all classes alike, 1: certain
    strength = 0.12 + 0.38 * np.clip(sure, 0, 1)
    return np.clip(1 - strength * (1 - colours[field.argmax(axis=-1)]), 0, 1)


def _outline_regions(axes: Axes, xs: np.ndarray, ys: np.ndarray, field: np.ndarray) -> None:
    """Draws the lines where two classes are equally probable."""
    for k in range(field.shape[-1] if field.shape[-1] > 2 else 1):
        lead = field[..., k] - np.delete(field, k, axis=-1).max(axis=-1)
        if lead.min() < 0 < lead.max():  # matplotlib warns about a level that does not occur
            axes.contour(xs, ys, lead, levels=[0], colors=GREY, linewidths=1)


def _tidy(axes: Axes, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)


def _class_colour(k: int) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array(to_rgb(CLASS_COLOURS[k % len(CLASS_COLOURS)]))


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 20)) or name


# What is drawn.


def _history_columns(history: Mapping[str, Sequence[Any]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the epochs, (epochs,), and each curve as (epochs, models) float64 with NaN where nothing was measured."""
    lengths = {name: len(column) for name, column in history.items()}
    if not {"loss", "val_loss"} & set(lengths):
        raise ValueError(f"history has the columns {sorted(lengths)}; it needs 'loss' or 'val_loss'")
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the columns of history must be equally long, one entry per epoch; their lengths are {lengths}"
        )
    if not lengths.popitem()[1]:
        raise ValueError("history has no epochs; draw it after fit")
    columns = {name: _curve(name, column) for name, column in history.items() if name not in NOT_CURVES}
    epoch = np.asarray(history.get("epoch", range(1, 1 + len(next(iter(columns.values()))))))
    columns = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    if not {"loss", "val_loss"} & set(columns):
        raise ValueError("history has no finite loss; there is nothing to draw (did training diverge at once?)")
    return epoch, columns


def _curve(name: str, column: Sequence[Any]) -> np.ndarray:
    rows = [None if entry is None else np.atleast_1d(np.asarray(entry, np.float64)) for entry in column]
    shapes = {row.shape for row in rows if row is not None}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"history[{name!r}] must hold one number, or one list of a fixed length, for each epoch")
    models = shapes.pop()[0] if shapes else 1
    values = np.array([np.full(models, np.nan) if row is None else row for row in rows])
    return np.where(np.isfinite(values), values, np.nan)  # an infinite loss has no place on an axis


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the models that have a value: a diverged one must not hide the others. NaN where none has."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.divide(total, known.sum(axis=1), out=np.full(len(values), np.nan), where=known.any(axis=1))


def _larger_is_better(name: str) -> bool:
    metric = metrics.METRICS.get(name.removeprefix("val_"))
    return metric is None or metric.larger_is_better


def _spans_two_decades(curves: Any) -> bool:
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    return values.size > 0 and values.min() > 0 and values.max() > 100 * values.min()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]  # str.capitalize would make "Roc auc"


def _readable(name: str) -> str:
    return {"roc_auc": "ROC AUC", "r2": "R²", "f1": "F1"}.get(name, name.replace("_", " "))


def _class_indices(y_true: np.ndarray, y_pred: np.ndarray, classes: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if classes is None:
        if (y_true.dtype.kind in "biuf") != (y_pred.dtype.kind in "biuf"):
            raise ValueError(
                f"y_true ({y_true.dtype}) and y_pred ({y_pred.dtype}) must hold one kind of labels, or give classes"
            )
        classes = np.unique(np.concatenate([y_true.ravel(), y_pred.ravel()]))
        return np.searchsorted(classes, y_true), np.searchsorted(classes, y_pred), [str(c) for c in classes.tolist()]
    names = [str(c) for c in classes]
    position = {name: k for k, name in enumerate(names)}
    out = []
    for argument, y in (("y_true", y_true), ("y_pred", y_pred)):
        if y.dtype.kind not in "biuf":
            unknown = [label for label in y.ravel().tolist() if str(label) not in position]
            if unknown:
                raise ValueError(f"{argument} holds {unknown[0]!r}, which is not among classes={names}")
            y = np.array([position[str(label)] for label in y.ravel().tolist()], np.int64).reshape(y.shape)
        out.append(y)
    return out[0], out[1], names


def _labels_for(y: np.ndarray, n_classes: int) -> tuple[np.ndarray, list[str]]:
    """Returns class indices, (n_samples,), and the name of each class."""
    if y.dtype.kind in "biu" and y.min() >= 0 and y.max() < n_classes:
        return y.astype(np.int64), [str(k) for k in range(n_classes)]
    classes, labels = np.unique(y, return_inverse=True)
    if len(classes) != n_classes:
        raise ValueError(
            f"y has {len(classes)} classes, but the network predicts {n_classes}; pass class indices "
            f"0 ... {n_classes - 1}, or labels of which every class occurs"
        )
    return labels, [str(c) for c in classes.tolist()]


def _span(values: np.ndarray) -> np.ndarray:
    """GRID points over the range of ``values`` and 5 % more on both sides."""
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    return np.linspace(low - margin, high + margin, GRID)


def _check_rows(X: np.ndarray, y: np.ndarray, y_ndim: tuple[int, ...]) -> None:
    if y.ndim not in y_ndim or len(y) != len(X):
        raise ValueError(f"y of shape {y.shape} must have one entry per row of X ({len(X)})")
    if not len(X):
        raise ValueError("X has no rows; there is nothing to draw")
    if X.dtype.kind not in "biuf" or not np.isfinite(X).all():
        raise ValueError("X must hold finite numbers")


# Matplotlib and files.


def require_matplotlib() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed; run: pip install "gpumlp[plot]"') from error
    return Figure


def check_path(path: str | os.PathLike[str] | None) -> Path | None:
    """Checks before anything is drawn that the picture can be saved there."""
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise ValueError(f"path={str(path)!r} must end in one of {', '.join('.' + f for f in FORMATS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first")
    return path


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is None:
        return figure
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower().removeprefix("."))
    write_atomically(path, picture.getvalue())
    return figure
