"""The losses: one row of a table each, computed from logits, with the derivative beside the value.

A row's function ``f(z, y, dz, **options)`` takes

- ``z`` (models, batch, outputs), the logits,
- ``y`` (models or 1, batch) labels, or (models or 1, batch, outputs) targets,
- ``dz``, a buffer in the shape of ``z``,

writes the derivative of each sample's loss into ``dz`` and returns the samples' losses, (models, batch). Weights and the
mean over the batch are the same for every row and enter once, in :func:`weighted_mean`.

The non-linearity of the output belongs to the loss (softmax with categorical cross-entropy, sigmoid with binary
cross-entropy, identity with squared error): the row names it, and prediction reads it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from .activations import ACTIVATIONS

FEW_OUTPUTS = 32  # up to which columns of logits are reduced side by side
LARGEST_EXPONENT = 80.0  # exp(80) = 5.5e34: float32 holds it, and a sum of 6,000 of them


# --- the rows -----------------------------------------------------------------------------------------------------


def squared_error(z, y, dz):
    """l = mean over outputs of (z - y)², without a factor ½ (as PyTorch; scikit-learn halves it)."""
    np.subtract(z, y, out=dz)
    loss = np.einsum("mbk,mbk->mb", dz, dz) / z.shape[-1]
    dz *= 2.0 / z.shape[-1]  # dl/dz = 2 (z - y) / outputs
    return loss


def absolute_error(z, y, dz):
    """l = mean over outputs of |z - y|; the derivative at z = y is 0."""
    np.subtract(z, y, out=dz)
    loss = np.abs(dz).mean(axis=-1)
    np.sign(dz, out=dz)  # dl/dz = sign(z - y) / outputs
    dz /= z.shape[-1]
    return loss


def huber(z, y, dz, delta=1.0):
    """l = mean over outputs of ½ e² where |e| <= δ, δ (|e| - ½ δ) elsewhere, e = z - y."""
    np.subtract(z, y, out=dz)
    size = np.abs(dz)
    near = np.minimum(size, delta)
    loss = (near * (size - 0.5 * near)).mean(axis=-1)
    np.clip(dz, -delta, delta, out=dz)  # dl/dz = clip(e, -δ, δ) / outputs
    dz /= z.shape[-1]
    return loss


def quantile(z, y, dz, quantile=0.5):
    """l = mean over outputs of max(q e, (q - 1) e), e = y - z (the pinball loss); the derivative at e = 0 is 0.

    ``quantile`` is one number in (0, 1), or one for each output.
    """
    q = np.asarray(quantile, dtype=z.dtype)
    error = y - z
    loss = np.maximum(q * error, (q - 1) * error).mean(axis=-1)
    np.sign(error, out=dz)
    dz *= np.where(error < 0, q - 1, -q)  # dl/dz = -q where e > 0, 1 - q where e < 0, over outputs
    dz /= z.shape[-1]
    return loss


def poisson(z, y, dz):
    """l = mean over outputs of exp(z) - y z, the negative log-likelihood of a Poisson rate exp(z) less log(y!).

    The exponent stops at 80, so that the loss stays a number in float32.
    """
    np.exp(np.minimum(z, LARGEST_EXPONENT), out=dz)
    loss = (dz - y * z).mean(axis=-1)
    dz -= y  # dl/dz = (exp(z) - y) / outputs
    dz /= z.shape[-1]
    return loss


def binary_cross_entropy(z, y, dz, label_smoothing=0.0):
    """l = mean over outputs of max(z, 0) - z t + log(1 + exp(-|z|)), t = (1 - ε) y + ε / 2.

    One output, or several independent ones (multi-label). The form of the logits never overflows.
    """
    t, outputs = y, z.shape[-1]
    if isinstance(label_smoothing, np.ndarray) or label_smoothing:
        smoothing = per_model(label_smoothing, z)
        t = y * (1 - smoothing) + 0.5 * smoothing
    tail = np.abs(z)
    np.log1p(np.exp(np.negative(tail, out=tail), out=tail), out=tail)
    loss = np.maximum(z, 0)
    loss -= z * t
    loss += tail
    ACTIVATIONS["sigmoid"].f(z, out=dz)
    dz -= t  # dl/dz = (sigmoid(z) - t) / outputs
    if outputs == 1:  # of small batches the calls are what takes time
        return loss[..., 0]
    dz /= outputs
    return loss.mean(axis=-1)


def softmax_cross_entropy(z, y, dz, label_smoothing=0.0):
    """l = -Σ t log softmax(z), t = (1 - ε) y + ε / outputs; y are labels or probabilities that sum to 1.

    Through the log-sum-exp of z less its largest value (Szegedy et al. 2016, section 7, for the smoothing).
    """
    outputs = z.shape[-1]
    np.subtract(z, over_outputs(np.maximum, z), out=dz)
    labels_alone = y.ndim == 2 and not (isinstance(label_smoothing, np.ndarray) or label_smoothing)
    labels_alone &= dz.flags.c_contiguous  # flat below is to be dz itself: not so where a fleet's batch is a short one
    if labels_alone:
        flat, own = dz.reshape(-1), (_first_elements(z.shape) + y).reshape(-1)  # own: where each sample's label stands
        picked = flat[own].reshape(z.shape[:2])
    else:
        smoothing = per_model(label_smoothing, z)
        t = y if y.ndim == 3 else np.eye(outputs, dtype=z.dtype)[y]
        t = t * (1 - smoothing) + smoothing / outputs
        picked = (dz * t).sum(axis=-1)
    np.exp(dz, out=dz)
    total = over_outputs(np.add, dz)
    np.divide(dz, total, out=dz)
    if labels_alone:
        flat[own] -= 1  # dl/dz = softmax(z) - t
    else:
        dz -= t
    return np.log(total[..., 0]) - picked


@lru_cache(maxsize=64)
def _first_elements(shape: tuple[int, int, int]) -> np.ndarray:
    """Where each sample's logits begin in the flat array, (models, batch)."""
    models, batch, outputs = shape
    return np.arange(0, models * batch * outputs, outputs).reshape(models, batch)


def over_outputs(ufunc: np.ufunc, z: np.ndarray) -> np.ndarray:
    """The ufunc's reduction over the last axis, which is kept with length 1.

    Over a transposed copy where outputs are few: reduce takes some 50 ns to begin each row. Of one row, though, a lone
    model's copy would be a vector, whose sum NumPy makes in another order than that of a fleet's columns.
    """
    if z.shape[-1] > FEW_OUTPUTS or z.shape[-2] == 1:
        return ufunc.reduce(z, axis=-1, keepdims=True)
    return ufunc.reduce(z.transpose(2, 0, 1).copy(), axis=0)[..., None]


def per_model(option, z) -> np.ndarray:
    """A number, or one for each model, as (models or 1, 1, 1) in the dtype of ``z``."""
    return np.asarray(option, dtype=z.dtype).reshape(-1, 1, 1)


@dataclass(frozen=True)
class LossRow:
    """One loss of the table: its function, what it takes, and the non-linearity that its logits go through."""

    name: str
    f: Callable[..., np.ndarray]
    targets: str  # a kind of gpumlp.data.checks.check_targets
    output: str  # "identity" | "exp" | "sigmoid" | "softmax"
    metric: str  # what is reported beside it unless asked otherwise
    source: str
    options: dict[str, Any] = field(default_factory=dict)  # name and default

    @property
    def is_classifier(self) -> bool:
        return self.output in ("sigmoid", "softmax")


LOSSES = {
    row.name: row
    for row in (
        LossRow("squared_error", squared_error, "values", "identity", "r2", "Gauss 1809"),
        LossRow("absolute_error", absolute_error, "values", "identity", "mean_absolute_error", "Laplace 1774"),
        LossRow("huber", huber, "values", "identity", "r2", "Huber 1964, eq. 2.7", {"delta": 1.0}),
        LossRow(
            "quantile",
            quantile,
            "values",
            "identity",
            "mean_absolute_error",
            "Koenker & Bassett 1978",
            {"quantile": 0.5},
        ),
        LossRow("poisson", poisson, "counts", "exp", "r2", "Nelder & Wedderburn 1972"),
        LossRow(
            "binary_cross_entropy",
            binary_cross_entropy,
            "binary",
            "sigmoid",
            "accuracy",
            "Bishop 2006, eq. 4.90",
            {"label_smoothing": 0.0},
        ),
        LossRow(
            "softmax_cross_entropy",
            softmax_cross_entropy,
            "labels or probabilities",
            "softmax",
            "accuracy",
            "Bishop 2006, eq. 4.108",
            {"label_smoothing": 0.0},
        ),
    )
}


# --- weights and the mean over the batch ---------------------------------------------------------------------------


def weighted_mean(rows: np.ndarray, weight: np.ndarray | None, dz: np.ndarray) -> np.ndarray:
    """The mean of the samples' losses by their weights, (models,) float64; ``dz`` becomes its derivative.

    loss = Σ w l / Σ w and dz ← dz w / Σ w. A batch whose weights are all zero has loss 0 and gradient 0.
    """
    if weight is None:
        share = 1.0 / rows.shape[1]
        dz *= share
        return np.add.reduce(rows, axis=1, dtype=np.float64) * share
    total = weight.sum(axis=1, dtype=np.float64, keepdims=True)
    share = (weight / np.where(total > 0, total, 1.0)).astype(dz.dtype)
    dz *= share[..., None]
    return np.einsum("mb,mb->m", rows, np.broadcast_to(share, rows.shape), dtype=np.float64)


def output_values(z: np.ndarray, output: str) -> np.ndarray:
    """What the logits stand for: values, rates, or probabilities along the last axis. Pure."""
    if output == "sigmoid":
        return ACTIVATIONS["sigmoid"].f(z)
    if output == "softmax":
        shares = np.exp(z - z.max(axis=-1, keepdims=True))
        return shares / shares.sum(axis=-1, keepdims=True)
    if output == "exp":
        return np.exp(np.minimum(z, LARGEST_EXPONENT))
    return z.copy()


# --- what users hold ------------------------------------------------------------------------------------------------


class Loss:
    """A loss with its options: ``loss, dz = Loss("huber", delta=0.5)(logits, y)``.

    Args:
        name: a row of ``LOSSES``: "squared_error", "absolute_error", "huber", "quantile", "poisson",
            "binary_cross_entropy", "softmax_cross_entropy"; or a ``LossRow`` of your own.
        class_weight: for labels: (classes,) numbers, a dict {label: number} (others weigh 1), or "balanced",
            n_samples / (classes · count of the class), which ``Trainer.fit`` learns from the training labels.
        options: the row's own: ``delta`` (huber), ``quantile``, ``label_smoothing`` in [0, 1) (both cross-entropies; a
            number, or one for each model of a fleet).

    Raises:
        ValueError: an unknown loss or option, or a value out of its range; the message names what is allowed.
    """

    def __init__(self, name: str | LossRow, *, class_weight: Any = None, **options: Any) -> None:
        if not isinstance(name, LossRow) and name not in LOSSES:
            raise ValueError(f"loss={name!r} is unknown; allowed: {', '.join(LOSSES)}")
        self.row = name if isinstance(name, LossRow) else LOSSES[name]
        for option in options:
            if option not in self.row.options:
                allowed = ", ".join(self.row.options) or "none"
                raise ValueError(f"loss {self.row.name!r} has no option {option!r}; its options: {allowed}")
        self.options = self.row.options | options
        self._check_options()
        if class_weight is not None and self.row.targets not in ("labels or probabilities", "binary"):
            raise ValueError(f"class_weight needs a loss over labels; {self.row.name!r} takes {self.row.targets}")
        self.class_weight = class_weight

    def _check_options(self) -> None:
        ranges = {"label_smoothing": (0.0, 1.0), "quantile": (0.0, 1.0), "delta": (0.0, np.inf)}
        for option in self.options.keys() & ranges.keys():
            value, (low, high) = self.options[option], ranges[option]
            try:
                numbers = np.asarray(value, dtype=np.float64)
            except (TypeError, ValueError):
                numbers = np.array(np.nan)
            above = numbers >= low if option == "label_smoothing" else numbers > low
            if not (np.isfinite(numbers) & above & (numbers < high)).all():
                bracket = "[" if option == "label_smoothing" else "("
                raise ValueError(f"{option}={value!r} is out of range: it must lie in {bracket}{low:g}, {high:g})")
            if numbers.ndim > (option != "delta"):
                allowed = "one number" if option == "delta" else "one number, or a list of them"
                raise ValueError(f"{option}={value!r} must be {allowed}")
            self.options[option] = numbers if numbers.ndim else float(numbers)

    def check_fits(self, models: int, outputs: int) -> None:
        """Raises ValueError where an option has another number of values than there are models (quantile: outputs)."""
        for option, value in self.options.items():
            n, what = (outputs, "output") if option == "quantile" else (models, "model")
            if np.ndim(value) and len(value) != n:
                plural = what if n == 1 else f"{what}s"
                raise ValueError(f"{option} has {len(value)} values for {n} {plural}; give one number, or one for each")

    @property
    def name(self) -> str:
        return self.row.name

    def f(self, z: np.ndarray, y: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """The row's function with this loss's options: samples' losses (models, batch), their derivative in ``dz``."""
        return self.row.f(z, y, dz, **self.options)

    def for_model(self, i: int) -> Loss:
        """The loss of model ``i`` where options differ from model to model."""
        picked = {
            k: v if np.ndim(v) == 0 or k == "quantile" else np.asarray(v)[i].item() for k, v in self.options.items()
        }
        return Loss(self.row, class_weight=self.class_weight, **picked)

    def class_weights(self, labels: np.ndarray, n_classes: int) -> np.ndarray:
        """(n_classes,) float64 weights, "balanced" learned from ``labels``; ones where none were asked for.

        Raises:
            ValueError: wrong length, an unknown label, or negative or non-finite numbers.
        """
        if isinstance(self.class_weight, str):
            if self.class_weight != "balanced":
                raise ValueError(
                    f"class_weight={self.class_weight!r} is unknown; allowed: 'balanced', a dict, an array"
                )
            counts = np.bincount(labels, minlength=n_classes)
            return len(labels) / (n_classes * np.maximum(counts, 1))
        weights = np.ones(n_classes)
        if self.class_weight is None:
            return weights
        if isinstance(self.class_weight, dict):
            for label, weight in self.class_weight.items():
                if label not in range(n_classes):
                    raise ValueError(f"class_weight names label {label!r}; labels are 0 to {n_classes - 1}")
                weights[int(label)] = weight  # True would be a mask
        else:
            weights = np.asarray(self.class_weight, dtype=np.float64)
            if weights.shape != (n_classes,):
                raise ValueError(
                    f"class_weight has shape {weights.shape}; it needs one number for each of {n_classes} classes"
                )
        if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
            raise ValueError(
                f"class_weight={self.class_weight!r}: weights must be finite, not negative and not all zero"
            )
        return weights

    def __call__(self, logits: Any, y: Any, sample_weight: Any = None) -> tuple[Any, np.ndarray]:
        """The mean loss over the batch and its derivative, for your own loop.

        Args:
            logits: (batch, outputs), or (models, batch, outputs) of a fleet.
            y: (batch,) labels or (batch, outputs) targets, shared by the models of a fleet, or with a leading axis
                ``models``.
            sample_weight: (batch,) or (models, batch).

        Returns:
            The loss (a float; (models,) for a fleet) and dz in the shape of ``logits``.

        Raises:
            ValueError: shapes that do not fit, or targets out of range.
        """
        from .data.checks import check_sample_weight, check_targets

        logits = np.asarray(logits)
        logits = logits if logits.dtype.kind == "f" else logits.astype(np.float64)
        z = logits if logits.ndim == 3 else logits[None]
        if z.ndim != 3:
            raise ValueError(f"logits have shape {logits.shape}; expected (batch, outputs) or (models, batch, outputs)")
        models, batch, outputs = z.shape
        self.check_fits(models, outputs)
        y = np.asarray(y)
        # Where (batch, outputs) and (models, batch) are one shape, y is targets that all models share.
        per_model_y = logits.ndim == 3 and y.shape[:2] == (models, batch) and y.shape != (batch, outputs)
        parts = [
            check_targets(part, batch, outputs, self.row.targets, dtype=z.dtype, allow_one_class=True)
            for part in (y if per_model_y else [y])
        ]
        stacked = np.stack(parts)
        weight = self.class_weight_of(stacked, outputs)
        if sample_weight is not None:
            given = np.asarray(sample_weight)
            if given.ndim > 1 and (logits.ndim == 2 or given.shape != (models, batch)):
                expected = f"({batch},)" + (f" or ({models}, {batch})" if logits.ndim == 3 else "")
                raise ValueError(f"sample_weight has shape {given.shape}; expected {expected}")
            rows = given if given.ndim > 1 else [given]
            given = np.stack([check_sample_weight(row, batch, z.dtype) for row in rows])
            weight = given if weight is None else weight * given
        dz = np.empty_like(z)
        loss = weighted_mean(self.f(z, stacked, dz), weight, dz)
        return (loss, dz) if logits.ndim == 3 else (float(loss[0]), dz[0])

    def class_weight_of(self, y: np.ndarray, outputs: int) -> np.ndarray | None:
        """Each sample's weight by its label, in the shape of ``y`` less its outputs; None where none were asked for."""
        if self.class_weight is None:
            return None
        if self.row.output == "sigmoid" and outputs == 1:
            labels = (y[..., 0] > 0.5).astype(np.int64)
            return self.class_weights(labels.reshape(-1), 2)[labels]
        if not np.issubdtype(y.dtype, np.integer):
            raise ValueError("class_weight needs labels: give y as labels, or weigh the rows with sample_weight")
        return self.class_weights(y.reshape(-1), outputs)[y]

    def describe(self) -> dict[str, Any]:
        """The name, the class weights and the options that differ from the row's defaults, as plain data."""
        changed = {k: np.asarray(v).tolist() for k, v in self.options.items() if np.any(v != self.row.options[k])}
        weight = self.class_weight
        if isinstance(weight, dict):
            weight = {int(label): np.asarray(number).item() for label, number in weight.items()}
        elif weight is not None and not isinstance(weight, str):
            weight = np.asarray(weight).tolist()
        return {"name": self.name} | changed | ({} if weight is None else {"class_weight": weight})

    def __repr__(self) -> str:
        weight = {} if self.class_weight is None else {"class_weight": self.class_weight}
        values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in (self.options | weight).items()}
        return f"Loss({', '.join([repr(self.name)] + [f'{k}={v!r}' for k, v in values.items()])})"


def get_loss(spec: str | Loss | LossRow) -> Loss:
    """The loss that a name, a row or a ``Loss`` stands for. Raises ValueError on an unknown name."""
    return spec if isinstance(spec, Loss) else Loss(spec)
