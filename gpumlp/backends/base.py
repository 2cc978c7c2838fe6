"""What a backend is: a dozen verbs over arrays that the caller owns, and the bundles of arrays that they take.

The list does not grow when an activation, a loss or an optimizer is added. Every array argument is written in place;
a verb allocates nothing that lasts. ``numpy_backend`` is the definition of each verb. An Array is NumPy's own on the
host and a ``device.DeviceArray`` on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..activations import Activation

Array = Any  # the backend's own array type


@dataclass(slots=True)
class Draw:
    """Where the random numbers of a pass come from: one entry for each model (see gpumlp.random)."""

    seeds: Array  # (models,) uint64
    streams: Array  # (models,) the counter's word "model"
    steps: Array  # (models,) the counter's word "step"; on the host a view that the caller advances


@dataclass(slots=True)
class Dropout:
    """Inverted dropout of one node: out = x · keep, keep = 0 or 1 / (1 - rate)."""

    layer: int  # the counter's word "layer"
    rates: np.ndarray  # (models,)
    x: Array  # (models or 1, batch, units)
    keep: Array | None  # (models, batch, units); None where the backend draws the mask again instead of keeping it
    out: Array  # (models, batch, units)
    d: Array  # gradient with respect to out, becomes the one with respect to x
    work: Any = None  # what a backend keeps for it


@dataclass(slots=True)
class Norm:
    """Normalisation of one node: x̂ = (x - mean) / √(variance + 1e-5), out = γ x̂ + β."""

    kind: str  # "batch": over the batch's rows; "layer": over a row's units
    x: Array  # (models, batch, units)
    x_hat: Array  # the same shape; may be x itself
    inverse_std: Array  # (models, 1, units) for batch, (models, batch, 1) for layer
    out: Array  # (models, batch, units)
    gamma: Array  # (models, units)
    beta: Array
    dgamma: Array
    dbeta: Array
    d: Array  # gradient with respect to out, becomes the one with respect to x
    running_mean: Array | None  # (models, units), batch normalisation only
    running_variance: Array | None
    valid: Array | None = None  # (models,) rows that count, where that is less than the batch; on a device alone


@dataclass(slots=True)
class Dense:
    """Linear part and non-linearity of one node: z = x Wᵀ + b, a = f(z), with their gradients."""

    f: Activation
    x: Array  # (models or 1, batch, fan_in)
    W: Array  # (models, fan_out, fan_in), in the type that products read
    b: Array | None  # (models, fan_out)
    working_b: Array | None  # the same in the type of W
    z: Array  # (models, batch, fan_out)
    u: Array  # what f reads: z, or its normalisation
    a: Array  # f(u); u itself where the activation works in place
    dW: Array
    db: Array | None
    d: Array  # gradient with respect to a, becomes the one with respect to z
    dx: Array | None  # where the gradient with respect to x goes; None at the input
    dx_adds: bool  # add to what other paths left there
    before: Norm | None
    after: Norm | None
    dropout: Dropout | None
    out: Array  # what later operations read: a, or its normalisation or dropout
    tf32: bool = False  # products may round their factors
    work: Any = None  # what a backend prepares once


@dataclass(slots=True)
class Join:
    """The sum of several nodes, or their outputs side by side."""

    parts: list[Array]  # each (models or 1, batch, units of the part)
    out: Array
    concat: bool
    d: Array  # gradient with respect to out
    to: list[tuple[Array | None, bool]]  # of each part: where its gradient goes (None at the input), and whether to add


@dataclass(slots=True)
class Embed:
    """Categories as vectors: out = [the numbers of x, for each column of codes the row of E that its code says]."""

    x: Array  # (models or 1, batch, numbers + columns); the columns of codes stand last
    E: Array  # (models, codes of all columns, units)
    starts: np.ndarray  # (columns + 1,) int64: where in E the codes of each column begin, and end
    out: Array  # (models, batch, numbers + columns · units)
    dE: Array | None
    d: Array | None  # gradient with respect to out
    work: Any = None  # what a backend keeps for it

    @property
    def numbers(self) -> int:
        return self.x.shape[2] - len(self.starts) + 1


@dataclass(slots=True)
class Batch:
    """A batch of rows: where it comes from and the buffers that it is gathered into."""

    X: Array  # (n_samples, n_features), any real dtype
    y: Array  # (n_samples,) int64 or (n_samples, outputs)
    weight: Array | None  # (n_samples,)
    raw: Array | None  # (models or 1, batch, n_features) in X's dtype, where that is not the network's
    x: Array  # (models or 1, batch, n_features)
    targets: Array  # (models or 1, batch[, outputs])
    weights: Array | None  # (models or 1, batch)
    shift: Array | None  # (models or 1, 1, n_features): x ← (x - shift) · scale
    scale: Array | None
    target_shift: Array | None  # (models or 1, 1, outputs): the same for targets
    target_scale: Array | None


class Backend(Protocol):
    """The verbs. Shapes as in the bundles above; M models, dtype float32 or float64 throughout."""

    name: str
    device: str
    is_device: bool  # arrays live on a device, and a fit records its steps there
    keeps_masks: bool
    prediction_rows: int  # that a prediction handles at a time

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...
    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array: ...
    def asarray(self, values: Any, dtype: Any = None) -> Array: ...
    def to_numpy(self, array: Array) -> np.ndarray:
        """The values on the host: the array itself where it lives there, else a copy that waits for the device."""

    def adopt(self, values: Any) -> Array | None:
        """A device's array of another library, without a copy; None for anything that lies on the host.

        Raises:
            TypeError: it lies on a device that this backend cannot read.
        """

    def export(self, values: np.ndarray, like: Any) -> Any:
        """The values as an array of the library that ``like``, which was adopted, belongs to."""

    def draw(self, seeds: np.ndarray, streams: np.ndarray, steps: np.ndarray) -> Draw: ...
    def storage(self, dtype: np.dtype, precision: str) -> Any:
        """The type of a layer's buffers for parameters of ``dtype``."""

    def fill(self, x: Array, rows: Any) -> None:
        """x ← rows, cast: an array of the host, or one of the backend's own."""

    def prepare(self, dense: Dense) -> None:
        """Make once what ``dense_forward`` and ``dense_backward`` need at every step."""

    def gather(self, batch: Batch, rows: Any) -> None:
        """Fill the batch's buffers from ``rows`` (models or 1, batch); cast and standardise."""

    def standardize(self, x: Array, shift: Array | None, scale: Array | None) -> None:
        """x ← (x - shift) · scale, where there is a shift."""

    def augment(self, row: Any, batch: Batch, draw: Draw) -> None:
        """Apply a row of gpumlp.augment to the batch."""

    def dense_forward(self, dense: Dense, draw: Draw | None, update_running: bool) -> None:
        """Affine map, normalisation, non-linearity, dropout; ``draw`` is None for prediction."""

    def dense_backward(self, dense: Dense, draw: Draw) -> None:
        """From the gradient with respect to the output, in place, to dW, db, dγ, dβ and dx."""

    def dropout_forward(self, dropout: Dropout, draw: Draw | None) -> None:
        """Draw the mask and apply it; for prediction pass x on."""

    def embed_forward(self, embed: Embed) -> None:
        """Numbers as they are, codes as their vectors; a code that the column does not have counts as 0."""

    def embed_backward(self, embed: Embed) -> None:
        """dE ← for each code the sum of d over the rows that have it, in their order."""

    def join(self, join: Join) -> None: ...
    def split(self, join: Join) -> None:
        """The gradient of ``join``, into or onto the buffers that it names."""

    def loss(self, loss: Any, z: Array, batch: Batch, dz: Array) -> Any:
        """Mean loss of the batch, and its derivative in ``dz``.

        The loss is (models,) float64 on the host; on a device it stays there and this returns None.
        """

    def update(self, bound: Any, models: slice, learning_rate: Any) -> None:
        """One optimizer step over the flat buffer for ``models``."""

    def limit_norms(self, network: Any, name: str, max_norm: float, models: slice) -> None:
        """Scale the rows of the weights ``name`` whose Euclidean norm exceeds ``max_norm`` down to it."""

    def average(self, average: Any, models: slice) -> None:
        """Move the averages of the weights of ``models`` by one update; see ``gpumlp.averaging``."""

    def dot(self, a: Array, b: Array | None) -> np.ndarray:
        """Each model's Σ a b over (models, n), or Σ |a| where b is None: (models,) float64 on the host."""

    def combine(self, out: Array, alpha: np.ndarray | None, x: Array, beta: np.ndarray | None, y: Array | None) -> None:
        """out ← alpha x + beta y for every model, (models, n); alpha and beta (models,), None for 1; y None for 0."""

    def penalize(self, bound: Any) -> None:
        """Add the gradient of the penalties, l2 w + l1 sign(w), for L-BFGS."""
