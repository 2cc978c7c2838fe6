"""All buffers of a forward and backward pass at one batch size, and the two passes over them.

Buffers are made once and reused at every step. A smaller batch (the last of an epoch), or some of a fleet's models, is a
view of the same memory: :meth:`Workspace.view`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .backends.base import Dense, Dropout, Embed, Join, Norm
from .layers import Concat

if TYPE_CHECKING:
    from .network import Network
    from .places import Place

Array = Any


class Workspace:
    """Buffers for ``batch`` rows of the models in ``models``.

    Args:
        training: with what ``backward`` needs, and dropout; otherwise for prediction alone.
        per_model_rows: every model has rows of its own, x is (models, batch, n_features); otherwise (1, batch, n_features).
        valid: on a device, (models,) rows of the batch that count for each model.
    """

    def __init__(
        self,
        network: Network,
        batch: int,
        *,
        training: bool,
        per_model_rows: bool,
        models: slice | None = None,
        memory: dict[tuple, Array] | None = None,
        valid: Array | None = None,
    ) -> None:
        self.network, self.backend, self.batch, self.training = network, network.backend, batch, training
        self.models = models or slice(0, network.models)
        self.per_model_rows = per_model_rows
        self.valid = valid
        self._memory: dict[tuple, Array] = {} if memory is None else memory
        self._views: dict[tuple, Workspace] = {}
        self.draw = self.backend.draw(*(v[self.models] for v in (network.seeds, network.streams, network.steps)))
        self._build()

    def view(self, models: slice, batch: int) -> Workspace:
        """The same memory, for the first ``batch`` rows of ``models``."""
        if models == self.models and batch == self.batch:
            return self
        key = (models.start, models.stop, batch)
        if key not in self._views:
            self._views[key] = Workspace(
                self.network,
                batch,
                training=self.training,
                per_model_rows=self.per_model_rows,
                models=models,
                memory=self._memory,
            )
        return self._views[key]

    # --- the passes

    def forward(self, training: bool = True, update_running: bool = True) -> Array:
        """Logits (models, batch, outputs) of the rows in ``x``; ``training`` draws dropout and takes batch statistics."""
        backend = self.backend
        draw = self.draw if training else None
        if self.input_dropout is not None:
            backend.dropout_forward(self.input_dropout, draw)
        for operation in self.operations:
            if isinstance(operation, Dense):
                backend.dense_forward(operation, draw, update_running)
            elif isinstance(operation, Embed):
                backend.embed_forward(operation)
            else:
                backend.join(operation)
        return self.logits

    def backward(self) -> None:
        """From the gradient with respect to the logits, in ``dz``, to every parameter's gradient. ``dz`` is overwritten."""
        backend = self.backend
        for operation in reversed(self.operations):
            if isinstance(operation, Dense):
                backend.dense_backward(operation, self.draw)
            elif isinstance(operation, Embed):
                backend.embed_backward(operation)
            else:
                backend.split(operation)

    # --- the buffers

    def _build(self) -> None:
        places = self.network.places
        rows_of = self.models if self.per_model_rows else slice(0, 1)
        # Two bytes hold no code beyond 256, so columns of codes lie in the type of the parameters.
        self.x = self._buffer(
            "x", places[0].units, models=rows_of, dtype=self.network.dtype if self.network.code_sizes else None
        )
        outputs: list[Array] = []  # of each place
        gradients: list[Array] = []  # with respect to them
        self.input_dropout = self._dropout(places[0], self.x, None)
        outputs.append(self.x if self.input_dropout is None else self.input_dropout.out)
        gradients.append(None)
        self.operations: list[Dense | Embed | Join] = []
        for place in places[1:]:
            d = self._buffer(f"{place.index}.d", place.units) if self.training else None
            operation: Dense | Embed | Join
            if place.is_dense:
                operation = self._dense(place, outputs[place.inputs[0]], d)
            elif place.is_embedding:
                operation = self._embed(place, d)
            else:
                out = self._buffer(f"{place.index}.out", place.units)
                operation = Join([outputs[i] for i in place.inputs], out, isinstance(place.layer, Concat), d, [])
            self.operations.append(operation)
            outputs.append(operation.out)
            gradients.append(d)
        self.logits, self.dz = outputs[-1], gradients[-1]
        if self.training:
            self._route_gradients(places, gradients)
        for operation in self.operations:
            if isinstance(operation, Dense):
                self.backend.prepare(operation)

    def _route_gradients(self, places: list[Place], gradients: list[Array]) -> None:
        """Say where each operation leaves the gradient of its inputs: the first path writes, later ones add."""
        written: set[int] = set()
        for place, operation in zip(reversed(places[1:]), reversed(self.operations), strict=True):
            for i in place.inputs:
                if isinstance(operation, Embed):
                    continue  # nobody asks for the gradient of a code
                if isinstance(operation, Join):
                    operation.to.append((gradients[i], i in written))
                else:
                    operation.dx, operation.dx_adds = gradients[i], i in written
                written.add(i)

    def _embed(self, place: Place, d: Array | None) -> Embed:
        network, m, name = self.network, self.models, f"{place.name}.E"
        return Embed(
            x=self.x,
            E=network.parameters[name][m],
            starts=np.cumsum([0, *place.layer.sizes], dtype=np.int64),
            out=self._buffer(f"{place.index}.out", place.units),
            dE=network.gradients[name][m] if self.training else None,
            d=d,
        )

    def _dense(self, place: Place, x: Array, d: Array | None) -> Dense:
        n, m, layer = self.network, self.models, place.layer
        parameters, gradients = n.parameters, n.gradients if self.training else {}
        working = n.working  # what products read

        def of(arrays: dict[str, Array], name: str) -> Array | None:
            found = arrays.get(f"{place.name}.{name}")
            return None if found is None else found[m]

        def norm(x: Array, in_place: bool) -> Norm:
            width = place.units if layer.norm == "batch" else 1
            rows = 1 if layer.norm == "batch" else self.batch
            return Norm(
                kind=layer.norm,
                x=x,
                x_hat=x if in_place else self._buffer(f"{place.index}.x_hat", place.units),
                inverse_std=self._buffer(f"{place.index}.inverse_std", width, rows=rows, dtype=n.dtype),
                out=self._buffer(f"{place.index}.norm", place.units),
                gamma=of(parameters, "gamma"),
                beta=of(parameters, "beta"),
                dgamma=of(gradients, "gamma"),
                dbeta=of(gradients, "beta"),
                d=d,
                running_mean=of(n.statistics, "mean"),
                running_variance=of(n.statistics, "variance"),
                valid=self.valid,
            )

        f = layer.f
        z = self._buffer(f"{place.index}.z", place.units)
        before = norm(z, in_place=True) if layer.norm and not layer.norm_after else None
        u = before.out if before is not None else z
        a = u if f.in_place else self._buffer(f"{place.index}.a", place.units)
        after = norm(a, in_place=False) if layer.norm and layer.norm_after else None
        normed = a if after is None else after.out
        dropout = self._dropout(place, normed, d)
        return Dense(
            f=f,
            x=x,
            W=working[f"{place.name}.W"][m],
            b=of(parameters, "b"),
            working_b=of(working, "b"),
            z=z,
            u=u,
            a=a,
            dW=of(gradients, "W"),
            db=of(gradients, "b"),
            d=d,
            dx=None,
            dx_adds=False,
            before=before,
            after=after,
            dropout=dropout,
            out=normed if dropout is None else dropout.out,
            tf32=n.precision == "tf32",
        )

    def _dropout(self, place: Place, x: Array, d: Array | None) -> Dropout | None:
        rates = place.dropout[self.models]
        if not self.training or not rates.any():
            return None
        keep = self._buffer(f"{place.index}.keep", place.units) if self.backend.keeps_masks else None
        out = self._buffer(f"{place.index}.dropped", place.units)
        return Dropout(layer=place.index, rates=rates, x=x, keep=keep, out=out, d=d)

    def _buffer(
        self, name: str, width: int, *, rows: int | None = None, models: slice | None = None, dtype: Any = None
    ) -> Array:
        """The part of a named buffer that belongs to this workspace; made at the size of the first, largest one."""
        models, rows = models or self.models, self.batch if rows is None else rows
        key = (name, width)
        if key not in self._memory:
            shape = (models.stop - models.start, rows, width)
            self._memory[key] = self.backend.empty(shape, dtype or self.network.storage)
        return self._memory[key][models, :rows]
