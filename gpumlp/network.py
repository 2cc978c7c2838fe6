"""A network: layers in topological order over one flat parameter buffer, forward, backward, predict, summary."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from . import random
from .backends import get_backend
from .data.checks import check_codes, check_X, not_finite
from .data.encoding import Encoded, TableEncoder
from .data.scaling import standardization
from .initializers import get_initializer
from .layers import Embedding
from .losses import Loss, get_loss, output_values
from .places import arrange, connect, graph, tensor_shapes
from .workspace import Workspace

ALIGNMENT = 32  # elements: every tensor starts at a multiple of 128 bytes in float32
PREDICTION_BYTES = 1 << 28  # that the layers' buffers may take in a prediction
SCALINGS = ("shift", "scale", "target_shift", "target_scale")
DTYPES = ("float32", "float64")
PRECISIONS = ("float32", "tf32", "bf16")
STANDARDIZE = {False: None, True: "columns", None: None, "columns": "columns", "global": "global"}


class Network:
    """A multi-layer perceptron, or a fleet of ``models`` of one shape.

    Args:
        architecture: a list of layers, with ``n_features``; or two nodes, the ``Input`` and the output of a graph.
        n_features: columns of X, for a list of layers.
        models: None is one network. A number makes a fleet: arrays then carry a leading axis ``models``.
        seed: an integer, from which every model draws its own stream; or one integer for each model. Model i of a fleet
            with ``seed=[s0, s1, ...]`` equals ``Network(..., seed=s_i)``; with one seed, model 0 does.
        device: "auto", "cpu", "cuda", "cuda:1", or a backend. ``device_reason`` says what was taken and why.
        dtype: "float32" or "float64", of parameters and arithmetic.
        precision: what a GPU may do with float32: "float32" nothing, "tf32" multiply matrices with 10 bits of mantissa,
            "bf16" keep the layers' values in bfloat16 as well. Parameters, sums and the optimizer stay in float32. NumPy
            computes in float32 whatever is allowed.
        standardize: learn each column's mean and standard deviation from the training rows and keep them in the model:
            True or "columns"; "global" takes one mean and deviation for all columns, right for images. x' = (x - μ) / σ.
        standardize_targets: learn the mean and standard deviation of each column of y too: the network then fits
            (y - μ) / σ, and predictions are in the units of y. For losses over values.
        input_dropout: rate at the input, for a list of layers.
        encoder: a fitted ``gm.TableEncoder``: X is then a table as it comes, wherever the network takes data, and the file
            of the model holds what the encoder learned. ``n_features`` follows from it, and a list of layers gets an
            ``Embedding`` at its head where the encoder has columns of codes.

    Attributes:
        parameters: name → array, say "dense_0.W" (models, fan_out, fan_in) and "dense_0.b" (models, fan_out). Views of
            ``flat`` (models, n): assign with ``[...] =``.
        gradients: name → array in the same shapes, as ``backward`` left them.
        statistics: name → running mean and variance of batch normalisation, (models, units).
        loss: the loss that predictions are read by; ``Trainer`` sets it, a name may be assigned.
        classes: the labels that outputs stand for, or None for 0, 1, ...
        encoder: what makes numbers of tables, or None; may be assigned.
        feature_names, target_names: of the columns of X and y, where somebody set them; kept in the model's file.

    Raises:
        ValueError: layers that do not fit, unknown names, values out of range.
        RuntimeError: a device that cannot be had.
    """

    def __init__(
        self,
        *architecture: Any,
        n_features: int | None = None,
        models: int | None = None,
        seed: Any = 0,
        device: Any = "auto",
        dtype: Any = "float32",
        precision: str = "float32",
        standardize: bool | str | None = False,
        standardize_targets: bool = False,
        input_dropout: Any = 0.0,
        encoder: TableEncoder | None = None,
    ) -> None:
        self.backend, self.device_reason = get_backend(device)
        self.is_fleet = models is not None
        if models is not None and (isinstance(models, bool) or not isinstance(models, int | np.integer) or models < 1):
            raise ValueError(f"models={models!r} must be an integer of at least 1, or None for one network")
        self.models = 1 if models is None else int(models)
        self.dtype = _dtype(dtype)
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown; allowed: {', '.join(PRECISIONS)}")
        if precision != "float32" and self.dtype != np.float32:
            raise ValueError(
                f"precision={precision!r} is for dtype='float32'; this network has dtype={self.dtype.name!r}"
            )
        self.precision = precision
        self.storage = self.backend.storage(self.dtype, precision)  # of the layers' buffers
        if not isinstance(standardize, bool | str | None) or standardize not in STANDARDIZE:
            raise ValueError(f"standardize={standardize!r} is unknown; allowed: False, True, 'columns', 'global'")
        self.standardize, self.standardize_targets = STANDARDIZE[standardize], bool(standardize_targets)
        self.seeds, self.streams = self._seeds(seed)
        self.steps = np.zeros(self.models, np.int64)  # updates made to each model
        if encoder is not None:
            architecture, n_features = _for_tables(encoder, architecture, n_features)
        self.places = arrange(*graph(architecture, n_features, input_dropout), self.models)
        # Of each column of codes, which stand last in X, how many there are.
        self.code_sizes: tuple[int, ...] = sum((p.layer.sizes for p in self.places if p.is_embedding), ())
        self._limits = [
            (f"{p.name}.W", p.layer.max_norm) for p in self.places if p.is_dense and p.layer.max_norm is not None
        ]
        self.n_features, self.n_outputs = self.places[0].units, self.places[-1].units
        self.encoder = encoder
        self._allocate()
        self.initialize()
        self.feature_names: list[str] | None = None if encoder is None else encoder.feature_names
        self.target_names: list[str] | None = None
        self._loss: Loss | None = None
        self._training: Workspace | None = None
        self._ready: Workspace | None = None  # where the last forward left what backward needs
        self._prediction: Workspace | None = None

    # --- building

    def _seeds(self, seed: Any) -> tuple[np.ndarray, np.ndarray]:
        if np.ndim(seed) == 0:
            random.check_seed(seed)
            return np.full(self.models, seed, np.uint64), np.arange(self.models)
        if len(seed) != self.models:
            raise ValueError(f"seed has {len(seed)} values for {self.models} models; give one integer, or one for each")
        for one in seed:
            random.check_seed(one)
        return np.array([int(one) for one in seed], np.uint64), np.zeros(self.models, np.int64)

    def _allocate(self) -> None:
        offsets, end, self.n_weights = {}, 0, 0
        for name, shape in tensor_shapes(self.places).items():
            offsets[name] = (end, shape)
            end += -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
            if name.endswith(".W"):
                self.n_weights = end
        self.n_parameters = sum(int(np.prod(shape)) for _, shape in offsets.values())
        self.flat = self.backend.zeros((self.models, end), self.dtype)
        self.flat_gradient = self.backend.zeros((self.models, end), self.dtype)

        self._offsets = offsets
        views = self._views
        self.parameters, self.gradients = views(self.flat), views(self.flat_gradient)
        # What products read: the parameters, or a copy of them in bfloat16 that every update renews.
        self.shadow = None if self.storage == self.dtype else self.backend.zeros((self.models, end), self.storage)
        self.working = self.parameters if self.shadow is None else views(self.shadow)
        self.statistics = {
            f"{place.name}.{name}": self.backend.zeros((self.models, place.units), self.dtype)
            for place in self.places
            if place.is_dense and place.layer.norm == "batch"
            for name in ("mean", "variance")
        }

    def _views(self, buffer: Any) -> dict[str, Any]:
        """The tensors of a flat buffer (models, n), by name."""
        return {
            name: buffer[:, start : start + int(np.prod(shape))].reshape(self.models, *shape)
            for name, (start, shape) in self._offsets.items()
        }

    def initialize(self) -> None:
        """Begin anew from the seeds: W by each layer's initializer, b = 0, γ = 1, β = 0, nothing learned of the data."""
        self.steps[...] = 0
        self.shift: np.ndarray | None = None  # (models, n_features), with scale: what standardisation learned
        self.scale: np.ndarray | None = None
        self.target_shift: np.ndarray | None = None  # (models, n_outputs), with target_scale
        self.target_scale: np.ndarray | None = None
        self.classes = None
        flat = np.zeros(self.flat.shape, self.dtype)  # drawn on the host
        parameters = self._views(flat)
        for place in self.places:
            if not (place.is_dense or place.is_embedding):
                continue
            initializer = get_initializer(place.layer.initializer or place.layer.f.initializer)
            drawn = parameters[f"{place.name}.{'W' if place.is_dense else 'E'}"]
            for i in range(self.models):
                generator = random.generator(
                    seed=int(self.seeds[i]),
                    purpose=random.Purpose.WEIGHTS,
                    model=int(self.streams[i]),
                    layer=place.index,
                )
                drawn[i] = initializer.draw(generator, *drawn.shape[1:])
            if place.is_embedding:
                drawn[:, np.cumsum([0, *place.layer.sizes[:-1]])] = 0.0  # of each column's code 0
            if f"{place.name}.gamma" in parameters:
                parameters[f"{place.name}.gamma"][...] = 1.0
        self.flat[...] = flat
        for name, values in self.statistics.items():
            values[...] = 1.0 if name.endswith(".variance") else 0.0

    # --- training, piece by piece

    def forward(self, X: Any, training: bool = True) -> np.ndarray:
        """Logits of a batch, keeping what ``backward`` needs.

        Args:
            X: (batch, n_features), or (models, batch, n_features) where each model of a fleet has rows of its own.
            training: draw dropout masks and normalise by the batch's statistics; False computes as ``predict`` does, and
                keeps nothing for ``backward``.

        Returns:
            (batch, n_outputs); (models, batch, n_outputs) for a fleet.

        Raises:
            ValueError: another shape.
        """
        there, given = self.backend.adopt(X), X
        X = np.asarray(X) if there is None else there
        own_rows = X.ndim == 3
        fits = X.ndim in (2, 3) and X.shape[-1] == self.n_features and X.shape[-2] > 0
        if not fits or (own_rows and len(X) != self.models):
            own = f" or ({self.models}, batch, {self.n_features})" if self.is_fleet else ""
            raise ValueError(f"X has shape {X.shape}; forward takes (batch, {self.n_features}){own}, batch at least 1")
        per_model = own_rows or self.scales_apart
        workspace = self.workspace(X.shape[-2], per_model)
        self._load(workspace, X)
        self._ready = workspace if training else None
        logits = self.backend.to_numpy(workspace.forward(training))
        return self._like(logits.copy() if self.is_fleet else logits[0].copy(), given)

    def backward(self, dz: Any) -> None:
        """Fill ``gradients`` from dz, the gradient with respect to the logits of the last ``forward``.

        Args:
            dz: in the shape that ``forward`` returned. Not modified.

        Raises:
            RuntimeError: no ``forward`` of training before it.
            ValueError: another shape.
        """
        workspace = self._ready
        if workspace is None:
            raise RuntimeError("backward needs what forward keeps: call forward first, once for each backward")
        there = self.backend.adopt(dz)
        dz = np.asarray(dz) if there is None else there
        expected = workspace.dz.shape if self.is_fleet else workspace.dz.shape[1:]
        if dz.shape != expected:
            raise ValueError(f"dz has shape {dz.shape}; the last forward returned logits of shape {expected}")
        self.backend.fill(workspace.dz, dz)
        self._ready = None
        workspace.backward()

    def check_X(self, X: Any, name: str = "X") -> Any:
        """X (n_samples, n_features) checked, as an array of the host, or without a copy where it lies on the network's GPU.

        With an encoder X is a table, and the answer what it becomes: for a loop of one's own.

        Raises:
            TypeError, ValueError: as ``gpumlp.data.checks.check_X``, or as ``TableEncoder.transform``; an array on a device
                that the network is not on; a code that no column has.
        """
        if isinstance(X, Encoded):
            return X.X
        if self.encoder is not None:
            try:
                return self.encoder.transform(X)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(str(error) if name == "X" else f"{name}: {error}") from error
        there, first = self.backend.adopt(X), self.n_features - len(self.code_sizes)
        if there is None:
            X = check_X(X, self.n_features, name=name, dtype=self.dtype)
            check_codes(X[:, first:], self.code_sizes, first, name)
            return X
        if there.ndim != 2 or there.shape[1] != self.n_features or not len(there):
            raise ValueError(
                f"{name} has shape {there.shape}; expected (n_samples, {self.n_features}), n_samples at least 1"
            )
        if not there.is_contiguous:
            raise ValueError(f"{name} on the GPU must be C-contiguous: pass cupy.ascontiguousarray({name})")
        at = self.backend.first_nonfinite(there, self.dtype)  # type: ignore[attr-defined]
        if at is not None:
            row, column = divmod(at, self.n_features)
            raise not_finite(there[row, column : column + 1].get()[0], f"{name}[{row}, {column}]", self.dtype)
        if self.code_sizes:
            check_codes(there[:, first:].get(), self.code_sizes, first, name)
        return there

    def _like(self, values: np.ndarray, X: Any) -> Any:
        """An answer on the side where the question lay; names of classes are for the host alone."""
        there = not isinstance(X, np.ndarray) and values.dtype.kind in "fiu" and self.backend.adopt(X) is not None
        return self.backend.export(values, X) if there else values

    def _load(self, workspace: Workspace, X: Any) -> None:
        """X, cast and standardised, into a workspace whose own copies are brought up to date."""
        self.renew()
        if self.backend.is_device:
            workspace.draw.steps[...] = self.steps[workspace.models]
        self.backend.fill(workspace.x[:, : X.shape[-2]], X)
        self.backend.standardize(workspace.x, *self.standardization_of(workspace.models, workspace.per_model_rows))

    def renew(self) -> None:
        """Bring the parameters that products read up to date with ``flat``, which may have been assigned to."""
        if self.shadow is not None:
            self.backend.fill(self.shadow, self.flat)

    def workspace(self, batch: int, per_model_rows: bool) -> Workspace:
        """Training buffers for ``batch`` rows: a view of the largest made so far, or a new one."""
        held = self._training
        if held is None or held.batch < batch or held.per_model_rows != per_model_rows:
            held = self._training = Workspace(self, batch, training=True, per_model_rows=per_model_rows)
        return held.view(slice(0, self.models), batch)

    def after_update(self, models: slice) -> None:
        """Count an update of ``models`` and hold their weights within the layers' largest norms."""
        self.steps[models] += 1
        for name, max_norm in self._limits:
            self.backend.limit_norms(self, name, max_norm, models)

    # --- standardisation

    def learn_standardization(self, X: np.ndarray, y: np.ndarray, rows: list[np.ndarray] | None = None) -> None:
        """Learn shift and scale of the input, and of the targets, where the network was built to.

        Args:
            X: (n_samples, n_features).
            y: (n_samples, n_outputs); not read where targets stay as they are.
            rows: the rows that each model sees; None for all.
        """
        numbers = self.n_features - len(self.code_sizes)
        if self.standardize is not None and numbers:
            self.shift, self.scale = np.zeros((2, self.models, self.n_features), self.dtype)
            self.scale[...] = 1.0  # codes stay as they are
            self.shift[:, :numbers], self.scale[:, :numbers] = self._learn(X, rows, self.standardize, slice(0, numbers))
        if self.standardize_targets:
            self.target_shift, self.target_scale = self._learn(y, rows, "columns")
            self.target_scale[self.target_scale == 0] = 1.0  # predictions divide by it

    def _learn(
        self, values: np.ndarray, rows: list[np.ndarray] | None, mode: str, columns: slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        values = self.backend.to_numpy(values)[:, columns]
        parts: list[Any] = list(rows) if rows else [None]
        learned = [standardization(values, part, mode=mode) for part in parts]
        shape = (self.models, values.shape[1])
        shift, scale = (
            np.broadcast_to(np.stack(stacked), shape).astype(self.dtype) for stacked in zip(*learned, strict=True)
        )
        return shift, scale

    def standardization_of(self, models: slice, per_model_rows: bool) -> tuple[Any, Any]:
        """Shift and scale (models or 1, 1, n_features) for a batch of ``models``; None and None where there are none."""
        return self._part(("shift", "scale"), models if per_model_rows else slice(0, 1))

    @property
    def scales_apart(self) -> bool:
        """Whether the models standardise by means and deviations of their own, so that they cannot share a batch."""
        learned = (getattr(self, name) for name in SCALINGS)
        return self.models > 1 and any(bool((values != values[:1]).any()) for values in learned if values is not None)

    def target_scaling_of(self, models: slice, per_model_rows: bool) -> tuple[Any, Any]:
        """The same for targets, (models or 1, 1, n_outputs)."""
        return self._part(("target_shift", "target_scale"), models if per_model_rows else slice(0, 1))

    def _part(self, names: tuple[str, str], models: slice) -> tuple[Any, Any]:
        return tuple(  # type: ignore[return-value]
            None if values is None else self.backend.asarray(values[models, None, :])
            for values in (getattr(self, name) for name in names)
        )

    # --- prediction

    @property
    def encoder(self) -> TableEncoder | None:
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: TableEncoder | None) -> None:
        """A copy is kept: what becomes of the encoder later changes no network."""
        if encoder is not None:
            made = (encoder.n_features, tuple(encoder.code_sizes))
            if made != (self.n_features, self.code_sizes):
                raise ValueError(
                    f"the encoder makes {made[0]} columns, with codes of sizes {list(made[1])} at their end; the network "
                    f"takes {self.n_features}, with codes of sizes {list(self.code_sizes)}"
                )
        self._encoder = copy(encoder)

    @property
    def classes(self) -> np.ndarray | None:
        return self._classes

    @classes.setter
    def classes(self, classes: Any) -> None:
        self._classes = None if classes is None else np.asarray(classes)

    @property
    def loss(self) -> Loss | None:
        return self._loss

    @loss.setter
    def loss(self, loss: str | Loss | None) -> None:
        self._loss = None if loss is None else get_loss(loss)

    def logits(self, X: Any) -> np.ndarray:
        """Values of the output layer for X (n_samples, n_features): (n_samples, n_outputs), a fleet's with a leading axis.

        An array on the network's GPU (CuPy, PyTorch, anything with DLPack or ``__cuda_array_interface__``) is read where it
        lies, and the answer is one of its kind; so it is with every prediction.

        Raises:
            ValueError: wrong shape or dtype, no rows, NaN or infinity (row and column named).
        """
        return self._like(self._logits(X), X)

    def _logits(self, X: Any) -> np.ndarray:
        X = self.check_X(X)
        z = np.empty((self.models, len(X), self.n_outputs), self.dtype)
        for start, part in self.logits_of(X):
            z[:, start : start + part.shape[1]] = part
        return z if self.is_fleet else z[0]

    def logits_of(self, X: Any) -> Iterator[tuple[int, np.ndarray]]:
        """First row and logits (models, rows, n_outputs) of each stretch of a checked X; the buffer is reused."""
        # The buffers are taken for the time of the call, so that two threads may predict at once.
        per_model = self.scales_apart
        bytes_per_row = self.models * self.dtype.itemsize * sum(place.units for place in self.places)
        most = min(self.backend.prediction_rows, max(1, PREDICTION_BYTES // bytes_per_row))
        at_once = min(most, self._rounded(len(X)))
        held = vars(self).pop("_prediction", None)  # in one go, which a swap is not
        if held is None or held.batch < at_once or held.per_model_rows != per_model:
            held = Workspace(self, at_once, training=False, per_model_rows=per_model)
        for start in range(0, len(X), held.batch):
            rows = X[start : start + held.batch]
            workspace = held.view(slice(0, self.models), min(held.batch, self._rounded(len(rows))))
            self._load(workspace, rows)
            yield start, self.backend.to_numpy(workspace.forward(training=False)[:, : len(rows)])
        self._prediction = held

    def _rounded(self, rows: int) -> int:
        """On a device a number of rows costs plans for its products: a power of two serves many."""
        return 1 << (rows - 1).bit_length() if self.backend.is_device else rows

    def predict(self, X: Any) -> np.ndarray:
        """Labels (n_samples,) after a loss over classes, else values (n_samples,) or (n_samples, n_outputs).

        Several sigmoid outputs give (n_samples, n_outputs) of 0 and 1. A fleet's answer has a leading axis ``models``.
        Without a loss (``network.loss``), the values of the output layer.

        Raises:
            ValueError: as ``logits``.
        """
        return self._like(self.decide(self._logits(X)), X)

    def decide(self, z: np.ndarray) -> np.ndarray:
        """Predictions from logits (..., n_samples, n_outputs)."""
        output = self._loss.row.output if self._loss is not None else "identity"
        if output == "softmax":
            labels = z.argmax(axis=-1)
        elif output == "sigmoid":
            labels = (z > 0).astype(np.int64)
            if self.n_outputs > 1:
                return labels
            labels = labels[..., 0]
        else:
            values = self.values(z, output)
            return values[..., 0] if self.n_outputs == 1 and self._loss is not None else values
        return labels if self.classes is None else self.classes[labels]

    def values(self, z: np.ndarray, output: str = "identity") -> np.ndarray:
        """Predicted values in the units of y from logits (n_samples, n_outputs) or (models, n_samples, n_outputs)."""
        values = output_values(z, output)
        if self.target_shift is None or self.target_scale is None:
            return values
        shift, scale = self.target_shift[:, None, :], self.target_scale[:, None, :]
        return values / scale + shift if z.ndim == 3 else values / scale[0] + shift[0]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n_samples, classes); one sigmoid output gives the two columns P(0), P(1).

        Raises:
            ValueError: as ``logits``.
            RuntimeError: the network's loss is not one over classes, or is not known.
        """
        if self._loss is None or not self._loss.row.is_classifier:
            known = (
                "is not set: assign network.loss, or train with a Trainer"
                if self._loss is None
                else f"is {self._loss.name!r}"
            )
            raise RuntimeError(f"predict_proba needs a loss over classes; the network's loss {known}")
        p = output_values(self._logits(X), self._loss.row.output)
        if self._loss.row.output == "sigmoid" and self.n_outputs == 1:
            p = np.concatenate([1 - p, p], axis=-1)
        return self._like(p, X)

    # --- a network as a thing

    def copy_weights(self, into: dict[str, Any], models: np.ndarray) -> None:
        """Copy parameters and running statistics of the models in the mask into ``into``, made where it is empty."""
        for name, values in {"flat": self.flat, **self.statistics}.items():
            if name not in into:
                into[name] = self.backend.empty(values.shape, self.dtype)
                into[name][...] = values
            else:
                into[name] = self.backend.asarray(into[name])  # a resumed fit brings them from the host
                _copy_models(into[name], values, models)

    def set_weights(self, weights: dict[str, Any], models: np.ndarray) -> None:
        """Take parameters and running statistics for the models in the mask, as ``copy_weights`` left them."""
        for name, values in {"flat": self.flat, **self.statistics}.items():
            _copy_models(values, weights[name], models)
        self.renew()

    def __getitem__(self, i: int) -> Network:
        """Model ``i`` as a network of its own: a copy. Raises IndexError out of range."""
        if not -self.models <= i < self.models:
            raise IndexError(f"model {i} of a network with {self.models}")
        return self.copy(model=i % self.models)

    def __len__(self) -> int:
        return self.models

    def copy(self, *, model: int | None = None, dtype: Any = None, device: Any = None) -> Network:
        """The same network with memory of its own, in another ``dtype``, on another ``device``; or one ``model`` of it."""
        part = slice(0, self.models) if model is None else slice(model, model + 1)
        layers = [
            replace(place.layer, dropout=float(place.dropout[model]))
            if model is not None and hasattr(place.layer, "dropout")
            else place.layer
            for place in self.places
        ]
        new = Network(
            *connect(layers, [place.inputs for place in self.places]),
            models=self.models if model is None and self.is_fleet else None,
            seed=self.seeds[part],
            device=device or self.backend,
            dtype=dtype or self.dtype,
            precision=self.precision if dtype is None else "float32",
            standardize=self.standardize,
            standardize_targets=self.standardize_targets,
            encoder=self.encoder,
        )
        new.streams, new.steps = self.streams[part].copy(), self.steps[part].copy()
        here = self.backend.to_numpy
        new.flat[...] = here(self.flat)[part]
        for name, values in self.statistics.items():
            new.statistics[name][...] = here(values)[part]
        for name in SCALINGS:
            if getattr(self, name) is not None:
                setattr(new, name, getattr(self, name)[part].astype(new.dtype))
        new.classes, new.feature_names, new.target_names = self.classes, self.feature_names, self.target_names
        new.device_reason = new.device_reason if device else self.device_reason
        new._loss = self._loss if self._loss is None or model is None else self._loss.for_model(model)
        return new

    def summary(self) -> str:
        """A table of the layers with their widths and parameters, ready to print."""
        header = ("layer", "reads", "units", "activation", "norm", "dropout", "parameters")
        table = [header]
        for place in self.places:
            layer = place.layer
            own = sum(int(np.prod(v.shape[1:])) for k, v in self.parameters.items() if k.startswith(f"{place.name}."))
            rates = sorted(set(place.dropout.tolist()))
            table.append(
                (
                    place.name,
                    ", ".join(self.places[i].name for i in place.inputs),
                    str(place.units),
                    layer.f.spec if place.is_dense else "",
                    (layer.norm or "") + (" after" if layer.norm_after else "") if place.is_dense else "",
                    " to ".join(f"{rate:g}" for rate in dict.fromkeys((rates[0], rates[-1])) if rates[-1] > 0),
                    f"{own:,}" if own else "",
                )
            )
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        fleet = f" in each of {self.models} models" if self.is_fleet else ""
        lines.append(f"{self.n_parameters:,} parameters{fleet}, {self.dtype.name}, on {self.device_reason}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        sizes = "-".join(str(place.units) for place in self.places)
        return (
            f"<Network {sizes}{f', {self.models} models' if self.is_fleet else ''}, {self.n_parameters:,} parameters>"
        )

    def save(self, path: Any) -> None:
        """Write the model to one safetensors file; see ``gpumlp.files``. Raises ValueError, OSError."""
        from .files import save_network

        save_network(self, path)

    def __reduce__(self) -> tuple:
        from .files import from_bytes, to_bytes

        return from_bytes, (to_bytes(self),)

    def gradient_check(self, X: Any, y: Any, loss: Any = None) -> dict[str, float]:
        """Relative error of each parameter's gradient against central differences; see ``gpumlp.diagnostics``."""
        from .diagnostics import gradient_check

        return gradient_check(self, X, y, loss)

    def diagnose(self, X: Any, y: Any = None, loss: Any = None) -> Any:
        """The health of each layer, in numbers and sentences; see ``gpumlp.diagnostics``."""
        from .diagnostics import diagnose

        return diagnose(self, X, y, loss)


def _for_tables(encoder: TableEncoder, architecture: tuple, n_features: int | None) -> tuple[tuple, int | None]:
    """The architecture behind an encoder, and its width: a list of layers gets what makes vectors of codes."""
    if not isinstance(encoder, TableEncoder):
        raise TypeError(f"encoder={encoder!r} must be a gm.TableEncoder that was fitted")
    if len(architecture) != 1:  # a graph has an Input of its own
        return architecture, n_features
    if n_features not in (None, encoder.n_features):
        raise ValueError(
            f"n_features={n_features} but the encoder makes {encoder.n_features} columns; leave n_features out"
        )
    layers = list(architecture[0]) if isinstance(architecture[0], list | tuple) else architecture[0]
    if encoder.code_sizes and isinstance(layers, list) and not isinstance(layers[:1] and layers[0], Embedding):
        layers = [Embedding(tuple(encoder.code_sizes)), *layers]
    return (layers,), encoder.n_features


def _copy_models(into: Any, values: Any, models: np.ndarray) -> None:
    if models.all():
        into[...] = values
        return
    for i in np.flatnonzero(models):
        into[i : i + 1] = values[i : i + 1]


def _dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found.name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    return found
