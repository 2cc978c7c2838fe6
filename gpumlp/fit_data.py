"""What a fit reads: arrays checked, labels encoded, rows held out, scales learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .data.checks import check_number, check_sample_weight, check_targets, encode_labels
from .data.splits import split_indices
from .losses import Loss

if TYPE_CHECKING:
    from .network import Network


@dataclass(frozen=True)
class Data:
    """What a fit reads: checked arrays, and which rows each model sees."""

    X: Any  # (n_samples, n_features), on the host, or on the network's device where the user gave it there
    y: np.ndarray  # (n_samples,) int64 labels or (n_samples, n_outputs)
    weight: np.ndarray | None  # (n_samples,)
    rows: list[np.ndarray] | None  # of each model; None for all rows


def prepare(
    network: Network,
    loss: Loss,
    X: Any,
    y: Any,
    sample_weight: Any,
    rows: Sequence[Any] | None,
    validation_data: Any,
    validation_split: float | None,
    learn: bool,
) -> tuple[Data, tuple[Any, Any, Any] | None]:
    """Check everything: what the training reads, and what validation reads, (X, y, weight) or None.

    Args:
        learn: take classes and scales from these rows; scales also where the network has none yet.

    Raises:
        ValueError, TypeError: as ``Trainer.fit``.
    """
    X = network.check_X(X)
    y, sample_weight = on_host(network, y), on_host(network, sample_weight)
    if validation_split is not None:
        check_number(validation_split, "validation_split", 0, 1, "()")
        if validation_data is not None:
            raise ValueError("give validation_data or validation_split, not both")
        if not isinstance(X, np.ndarray):
            raise ValueError("validation_split picks rows on the host; for X on the GPU give validation_data or rows")
        if rows is not None:
            raise ValueError("validation_split would cut across rows; give validation_data")
    y = targets_for(network, loss, y, len(X), learn_classes=learn)
    weight = None if sample_weight is None else check_sample_weight(sample_weight, len(X), dtype=network.dtype)
    validation = None
    if validation_data is not None:
        if not isinstance(validation_data, tuple | list) or len(validation_data) not in (2, 3):
            raise ValueError("validation_data must be (X, y) or (X, y, sample_weight)")
        X_val = network.check_X(validation_data[0], "validation X")
        y_val, *given = (on_host(network, values) for values in validation_data[1:])
        weight_val = check_sample_weight(given[0], len(X_val)) if given else None
        validation = (X_val, targets_for(network, loss, y_val, len(X_val), "validation y"), weight_val)
    if rows is not None:
        rows = _check_rows(rows, network.models, len(X))
        if isinstance(loss.class_weight, str):
            raise ValueError(
                "class_weight='balanced' counts all rows, but rows gives each model its own: give numbers instead"
            )
    if validation_split is not None:
        labels = y if y.ndim == 1 else y[:, 0] if loss.row.is_classifier and y.shape[1] == 1 else None
        train, held = split_indices(len(X), validation_split, seed=int(network.seeds[0]), stratify=labels)
        validation = (X[held], y[held], None)
        if weight is not None:
            validation = (X[held], y[held], check_sample_weight(weight[held], len(held)))
            weight = check_sample_weight(weight[train], len(train), dtype=network.dtype)
        X, y = X[train], y[train]
    by_class = loss.class_weight_of(y, network.n_outputs)
    if by_class is not None:
        weight = (by_class if weight is None else by_class * weight).astype(network.dtype)
    lacks_scales = network.standardize is not None and network.shift is None
    lacks_target_scales = network.standardize_targets and network.target_shift is None
    if learn or lacks_scales or lacks_target_scales:
        network.learn_standardization(X, y, rows)
    return Data(X, y, weight, rows), validation


def on_host(network: Network, values: Any) -> Any:
    """Targets and weights, which are checked on the host wherever they lie."""
    there = network.backend.adopt(values)
    return values if there is None else network.backend.to_numpy(there)


def targets_for(
    network: Network, loss: Loss, y: Any, n: int, name: str = "y", learn_classes: bool = False
) -> np.ndarray:
    """Labels (n,) or targets (n, outputs) as the loss reads them; labels that are no numbers are encoded."""
    row = loss.row
    known = None if learn_classes else network.classes
    classes = None
    kind = _names_kind(y) if row.is_classifier else ""
    if kind == "b" and known is None and not learn_classes:
        kind = ""  # to a network that learned from numbers, bools are numbers as well
    if kind:
        if known is None and not learn_classes:
            numbers = f"labels 0 to {network.n_outputs - 1}"
            raise ValueError(f"{name} holds names, but the network was trained on {numbers}; give those")
        y, classes = encode_labels(y, known, name=name)
        expected = max(network.n_outputs, 2)
        if 1 < len(classes) != expected:  # one class alone is refused below
            raise ValueError(f"{name} has {len(classes)} classes, but the network has outputs for {expected}")
    values = check_targets(
        y, n, network.n_outputs, row.targets, name=name, dtype=network.dtype, allow_one_class=name != "y"
    )
    if learn_classes and classes is not None:
        network.classes = classes
    return values


def scaled_targets(network: Network, y: np.ndarray) -> np.ndarray:
    """Targets (models or 1, rows[, outputs]) in the units that the network fits."""
    if network.target_shift is None or network.target_scale is None:
        return y[None]
    return (y[None] - network.target_shift[:, None, :]) * network.target_scale[:, None, :]


def _check_rows(rows: Any, models: int, n: int) -> list[np.ndarray]:
    if not isinstance(rows, list | tuple | np.ndarray):
        raise TypeError(f"rows={rows!r} must be a list with the row numbers of each model")
    if len(rows) != models:
        raise ValueError(f"rows has {len(rows)} entries for {models} models; give each model its row numbers")
    checked = []
    for i, part in enumerate(rows):
        part = np.asarray(part)
        if part.ndim != 1 or not len(part) or part.dtype.kind not in "iu" or part.min() < 0 or part.max() >= n:
            raise ValueError(f"rows[{i}] must hold integers from 0 to {n - 1}, at least one")
        checked.append(part.astype(np.int64))
    return checked


def _names_kind(y: Any) -> str:
    """The dtype kind of one column of text, bools or objects, which are to be numbered; "" for anything else."""
    try:
        values = np.asarray(y)
    except ValueError:  # ragged, which check_targets explains
        return ""
    return values.dtype.kind if values.ndim == 1 and values.dtype.kind in "OUSTb" else ""
