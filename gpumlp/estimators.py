"""MLPClassifier and MLPRegressor: scikit-learn's manners over the library's networks (the extra ``sklearn``).

Parameters, defaults, attributes and messages are those of scikit-learn 1.9's classes of the same names, so that changing
the import line is enough. With its four activations the initial weights are drawn as it draws them, and so is the held-out
part: without shuffling, fits in float64 agree step by step. What its classes do not have follows as further keywords; by
default only ``dtype`` and tables differ from theirs. A table with text, missing cells or categorical columns, which
scikit-learn refuses, goes through a ``TableEncoder`` that the fit learns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, _fit_context  # type: ignore
from sklearn.exceptions import ConvergenceWarning  # type: ignore
from sklearn.metrics import d2_pinball_score, get_scorer  # type: ignore
from sklearn.model_selection import train_test_split  # type: ignore
from sklearn.preprocessing import LabelBinarizer  # type: ignore
from sklearn.utils import check_random_state, column_or_1d  # type: ignore
from sklearn.utils._param_validation import Interval, Options, StrOptions  # type: ignore
from sklearn.utils.class_weight import compute_sample_weight  # type: ignore
from sklearn.utils.metaestimators import available_if  # type: ignore
from sklearn.utils.multiclass import (  # type: ignore
    _check_partial_fit_first_call,
    check_classification_targets,
    type_of_target,
    unique_labels,
)
from sklearn.utils.validation import (  # type: ignore
    _check_sample_weight,
    _check_y,
    check_is_fitted,
    validate_data,
)

from .activations import Activation
from .data.checks import not_finite, refuse_masked, require_finite
from .data.encoding import IMPUTATIONS, SCALINGS, Encoded, TableEncoder
from .data.frames import is_table, n_rows, needs_encoding, take_rows
from .data.table import Table
from .layers import Dense, Embedding
from .losses import Loss, output_values
from .network import Network
from .optimizers import LBFGS, SGD, Adam, Optimizer
from .schedules import Schedule
from .sklearn_training import (
    Adaptive,
    Monitor,
    Rows,
    Task,
    inverse_scaling,
    probabilities_if_one_class,
    sklearn_weights,
)
from .trainer import DivergedError, Trainer, one_at_a_time

OWN_NAMES = {"logistic": "sigmoid"}  # scikit-learn's name of an activation → the table's
OUT_ACTIVATIONS = {"identity": "identity", "exp": "exp", "sigmoid": "logistic", "softmax": "softmax"}
SPARSE_ROWS = 4096  # of a sparse X that are made dense at a time in a prediction


_AT_LEAST_ONE = Interval(Integral, 1, None, closed="left")
_NOT_NEGATIVE = Interval(Real, 0, None, closed="left")
_POSITIVE = Interval(Real, 0, None, closed="neither")
_SHARE = Interval(Real, 0, 1, closed="left")


class _MLP(BaseEstimator):
    """What classifier and regressor share."""

    encoder_: TableEncoder | None

    _parameter_constraints: dict = {  # noqa: RUF012
        "hidden_layer_sizes": ["array-like", _AT_LEAST_ONE],
        "activation": [str, list, tuple, Activation],
        "solver": [StrOptions({"lbfgs", "sgd", "adam"})],
        "alpha": [_NOT_NEGATIVE],
        "batch_size": [StrOptions({"auto"}), _AT_LEAST_ONE],
        "learning_rate": [StrOptions({"constant", "invscaling", "adaptive"})],
        "learning_rate_init": [_POSITIVE],
        "power_t": [_NOT_NEGATIVE],
        "max_iter": [_AT_LEAST_ONE],
        "shuffle": ["boolean"],
        "random_state": ["random_state"],
        "tol": [_NOT_NEGATIVE],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
        "momentum": [_SHARE],
        "nesterovs_momentum": ["boolean"],
        "early_stopping": ["boolean"],
        "validation_fraction": [_SHARE],
        "beta_1": [_SHARE],
        "beta_2": [_SHARE],
        "epsilon": [_POSITIVE],
        "n_iter_no_change": [_AT_LEAST_ONE, Options(Real, {np.inf})],
        "max_fun": [_AT_LEAST_ONE],
        "dropout": [_SHARE],
        "norm": [StrOptions({"batch", "layer"}), None],
        "schedule": [str, callable, None],
        "max_grad_norm": [_POSITIVE, None],
        "scoring": [str, callable, None],
        "callbacks": [list, tuple, None],
        "time_limit": [_POSITIVE, None],
        "ema": [Interval(Real, 0, 1, closed="neither"), None],
        "categorical_features": [StrOptions({"auto"}), "array-like", None],
        "one_hot_limit": [Interval(Integral, 0, None, closed="left")],
        "embedding_size": [_AT_LEAST_ONE],
        "impute": [StrOptions(set(IMPUTATIONS))],
        "scaling": [StrOptions({"auto", *filter(None, SCALINGS)}), None],
        "device": "no_validation",
        "dtype": [StrOptions({"float32", "float64"}), None],
    }

    # --- fit

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Any:  # fmt: skip
        """Fit the network to X and y.

        Args:
            X: (n_samples, n_features), dense or sparse; a sparse X is made dense as a whole. Or a table, pandas, polars,
                pyarrow or a dict of columns: where it has categories or missing cells, or where ``scaling`` or
                ``categorical_features`` ask for it, the fit learns how its columns become numbers (``encoder_``).
            y: (n_samples,) or (n_samples, n_outputs).
            sample_weight: (n_samples,), not negative.
            X_val, y_val, sample_weight_val: validation data of your own. ``validation_scores_`` and
                ``validation_loss_curve_`` follow them, and ``early_stopping=True`` decides by them and holds out nothing.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: data or parameters that do not fit; the message says which and what is allowed.
        """
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val belong together: give both, or neither")
        if sample_weight_val is not None and X_val is None:
            raise ValueError("sample_weight_val weighs the rows of X_val: give X_val and y_val too")
        held_out = None if X_val is None else (X_val, y_val, sample_weight_val)
        with one_at_a_time(self, type(self).__name__):
            return self._fit(X, y, sample_weight, held_out, incremental=False)

    def _is_stochastic(self) -> bool:
        if self.solver not in ("sgd", "adam"):
            raise AttributeError(
                f"partial_fit is only available for stochastic optimizers. {self.solver} is not stochastic."
            )
        return True

    def _fit(self, X: Any, y: Any, sample_weight: Any, held_out: tuple | None, incremental: bool) -> Any:
        sizes = self._hidden_sizes()
        first = not hasattr(self, "network_") or not (self.warm_start or incremental)
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")
        if self.schedule is not None and (incremental or self.learning_rate != "constant"):
            why = "partial_fit has no end to plan for" if incremental else f"learning_rate={self.learning_rate!r}"
            raise ValueError(f"schedule={self.schedule!r} cannot be joined with this: {why}; leave out one of them")
        if self.ema is not None and incremental:
            raise ValueError(f"ema={self.ema!r} averages over a whole fit, which partial_fit is not; leave it out")
        encoder = self._new_encoder(X) if first else self.encoder_
        X, y = self._check_data(X, y, incremental, first, encoder)
        targets = self._encode(y)
        task = self._task(targets)
        random_state = check_random_state(self.random_state)
        split = None
        if first and encoder is not None:  # what is held out is not to be learned from
            split = self._split(targets, held_out, task, random_state)
            encoder.fit(X, split[0])
        table, X = X, _numbers(X, encoder)
        rows = Rows(X, targets, _checked_weight(sample_weight, X))
        if first:
            self._begin(task)
            vectors = len(_code_sizes(encoder)) * (self.embedding_size - 1)  # columns that they add
            widths = [X.shape[1] + vectors, *sizes, task.outputs]
            drawn = sklearn_weights(random_state, widths, self._activations(sizes))
        chosen, held = split or self._split(targets, held_out, task, random_state)
        train = rows if chosen is None else rows[chosen]
        validation = self._given(held_out, encoder) if held is None else self._held(rows, table, held, encoder)
        if first:
            seed = int(random_state.randint(np.iinfo(np.int32).max))
            self.network_ = self._network(sizes, task, rows.X, seed, drawn, encoder)
            self._take_columns(encoder)
        train = self._weigh_classes(train, y if len(train) == len(rows) else None)
        self._train(task, train, validation, incremental)
        return self

    # --- tables

    def _new_encoder(self, X: Any) -> TableEncoder | None:
        """What will make numbers of a table; None where X is what scikit-learn takes too."""
        asked = [
            f"{name}={value!r}"
            for name, value in (("scaling", self.scaling), ("categorical_features", self.categorical_features))
            if value is not None and not (isinstance(value, str) and value == "auto")
        ]
        if asked and hasattr(X, "toarray"):
            raise ValueError(f"{asked[0]} is for tables, X is sparse; scale it before, or pass it dense")
        table = is_table(X)
        needed = table and needs_encoding(X)
        if not (asked or needed or (table and isinstance(X, Mapping | Table))):
            return None
        return TableEncoder(
            categorical_features=self.categorical_features,
            one_hot_limit=self.one_hot_limit,
            impute=self.impute,
            scaling=("standard" if needed else None) if self.scaling == "auto" else self.scaling,
        )

    def _for_network(self, X: np.ndarray) -> Any:
        return X if self.encoder_ is None else Encoded(X)

    def _take_columns(self, encoder: TableEncoder | None) -> None:
        self.encoder_ = self.network_.encoder = encoder
        if encoder is not None:
            self.n_features_in_ = len(encoder.columns)  # type: ignore[arg-type]
            self.__dict__.pop("feature_names_in_", None)
            if encoder.feature_names is not None:
                self.feature_names_in_ = np.array(encoder.feature_names, object)
        self.network_.feature_names = self.feature_names_in_.tolist() if hasattr(self, "feature_names_in_") else None

    def _check_data(
        self, X: Any, y: Any, incremental: bool, reset: bool, encoder: TableEncoder | None
    ) -> tuple[Any, np.ndarray]:
        """X as scikit-learn checks it, or the table as it is, and y."""
        if encoder is None:
            kinds = {"accept_sparse": "csr", "multi_output": True, "dtype": (np.float64, np.float32)}
            with _saying_where(X=X, y=y):
                X, y = validate_data(self, X, y, y_numeric=self._y_is_numeric, reset=reset, **kinds)
        else:
            with _saying_where(y=y):
                y = _check_y(y, multi_output=True, y_numeric=self._y_is_numeric, estimator=self)
            if n_rows(X) != len(y):
                raise ValueError(f"Found input variables with inconsistent numbers of samples: {[n_rows(X), len(y)]}")
        y = _dense(y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        self._check_targets(y, incremental)
        return X, y

    def _begin(self, task: Task) -> None:
        self.n_iter_ = self.t_ = 0
        self._epochs, self._no_improvement_count, self._rate_factor = 0, 0, 1.0
        self._optimizer_state: dict[str, np.ndarray] = {}
        self.n_outputs_ = task.outputs
        self.n_layers_ = len(self._hidden_sizes()) + 2
        self.out_activation_ = OUT_ACTIVATIONS[task.loss.row.output]
        self.validation_scores_: list[float] | None = None
        self.validation_loss_curve_: list[float] | None = None
        self.best_validation_score_: float | None = None
        for name in ("loss_curve_", "best_loss_"):  # of a fit before, maybe by another solver
            self.__dict__.pop(name, None)

    def _hidden_sizes(self) -> list[int]:
        sizes = self.hidden_layer_sizes
        sizes = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if np.any(np.array(sizes) <= 0):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
        return [int(size) for size in sizes]

    def _activations(self, sizes: list[int]) -> list:
        """One activation for each hidden layer."""
        if not isinstance(self.activation, list | tuple):
            return [self.activation] * len(sizes)
        if len(self.activation) != len(sizes):
            raise ValueError(
                f"activation={self.activation!r} has {len(self.activation)} entries for {len(sizes)} hidden layers; "
                "give one name for all, or one for each"
            )
        return list(self.activation)

    def _network(
        self, sizes: list[int], task: Task, X: np.ndarray, seed: int, drawn: list | None, encoder: TableEncoder | None
    ) -> Network:
        hidden = [
            Dense(n, OWN_NAMES.get(f, f) if isinstance(f, str) else f, norm=self.norm, dropout=self.dropout)
            for n, f in zip(sizes, self._activations(sizes), strict=True)
        ]
        codes = _code_sizes(encoder)
        vectors = [Embedding(tuple(codes), self.embedding_size)] if codes else []
        network = Network(
            [*vectors, *hidden, Dense(task.outputs)],
            n_features=X.shape[1],
            seed=seed,
            device=self.device,
            dtype=self.dtype or ("float32" if self.solver != "lbfgs" else X.dtype if encoder is None else "float64"),
            standardize_targets=self._scales_targets(task, encoder is not None),
        )
        for i, (W, b) in enumerate(drawn or ()):
            network.parameters[f"dense_{i}.W"][...] = np.ascontiguousarray(W.T, network.dtype)[None]
            if f"dense_{i}.b" in network.parameters:
                network.parameters[f"dense_{i}.b"][...] = b.astype(network.dtype)[None]
        return network

    def _split(
        self, targets: np.ndarray, given: tuple | None, task: Task, random_state: Any
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The numbers of the rows to train on and of those held out; None for all, and for none."""
        if given is not None or not self.early_stopping or self.solver == "lbfgs":
            return None, None
        stratify = targets if self._stratifies(task) else None
        train, held = train_test_split(
            np.arange(len(targets)), random_state=random_state, test_size=self.validation_fraction, stratify=stratify
        )
        if len(held) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        return train, held

    def _given(self, held_out: tuple | None, encoder: TableEncoder | None) -> tuple[Rows, Any, Any] | None:
        """The user's own validation rows; see ``_held``."""
        if held_out is None:
            return None
        X, y = self._check_data(held_out[0], held_out[1], True, False, encoder)
        numbers = _numbers(X, encoder)
        rows = Rows(numbers, self._encode(y), _checked_weight(held_out[2], numbers))
        return rows, numbers if encoder is None else X, y

    def _held(self, rows: Rows, table: Any, held: np.ndarray, encoder: TableEncoder | None) -> tuple[Rows, Any, Any]:
        """Rows that were held out, and what a scorer is given: X, of a table as the user wrote it, and y."""
        own = rows[held]
        return own, own.X if encoder is None else take_rows(table, held), self._decode(own.y)

    def _train(self, task: Task, train: Rows, validation: tuple[Rows, Any, Any] | None, incremental: bool) -> None:
        n, network = len(train), self.network_
        batch = n if self.solver == "lbfgs" else self._batch_size(n)
        total = 1.0 if train.weight is None else float(train.weight.mean())
        steps = -(-n // batch)
        trainer = Trainer(
            network,
            task.loss,
            self._optimizer(task, self.alpha / (batch * (total or 1.0))),
            schedule=self._schedule(n, incremental),
            metrics=task.metric,
            ema=self.ema,
        )
        trainer.epoch = self._epochs  # so that a further fit shuffles anew
        if incremental:
            self._restore_optimizer(trainer)
        score = None if validation is None else self._scorer(task, validation)
        if validation is not None and self.validation_scores_ is None:
            self.validation_scores_, self.validation_loss_curve_ = [], []
            self.best_validation_score_ = -np.inf
        if self.solver != "lbfgs":
            self.loss_curve_: list[float] = getattr(self, "loss_curve_", [])
            best = getattr(self, "best_loss_", None)
            self.best_loss_ = None if self.early_stopping else np.inf if best is None else best
        monitor = Monitor(self, task, train, 0.5 * self.alpha * steps / (n * (total or 1.0)), score)
        held = validation and (self._for_network(validation[0].X), validation[0].y, validation[0].weight)
        self.n_iter_, diverged = 0, False
        try:
            trainer.fit(
                self._for_network(train.X),
                probabilities_if_one_class(train.y, task, network.dtype),
                epochs=1 if incremental else self.max_iter,
                batch_size=batch,
                sample_weight=train.weight,
                validation_data=held if held is None or held[2] is not None else held[:2],
                shuffle=self.shuffle,
                callbacks=[monitor, *(self.callbacks or ())],
                progress=False,
                time_limit=self.time_limit,
            )
        except DivergedError as error:
            if not monitor.best_weights:
                raise ValueError(
                    "Solver produced non-finite parameter weights. The input data may contain large values and need to "
                    "be preprocessed; or try a smaller learning_rate_init, or max_grad_norm=1.0."
                ) from error
            diverged = True
            message = f"the loss is no longer finite after epoch {self.n_iter_}; the best weights before that are kept"
            warnings.warn(message, ConvergenceWarning, stacklevel=5)
        self._epochs = trainer.epoch
        if self.n_iter_ == 0:  # a time limit or Ctrl-C within the first epoch
            self.loss_ = task.factor * float(trainer.epoch_loss()[0])
        if self.solver != "lbfgs":
            self._keep_optimizer(trainer)
        if self.early_stopping and monitor.best_weights:
            network.set_weights(monitor.best_weights, np.ones(1, bool))
        self._name_outputs(network)
        ran_out = trainer.stopped == "epochs" or monitor.out_of_calls
        if ran_out and not (incremental or monitor.converged or diverged):
            warnings.warn(self._not_converged(), ConvergenceWarning, stacklevel=5)

    def _not_converged(self) -> str:
        if self.solver == "lbfgs":
            return (
                f"lbfgs failed to converge after {self.n_iter_} iteration(s): a limit, max_iter={self.max_iter} or "
                f"max_fun={self.max_fun}, was reached. Increase it, or scale the data."
            )
        return (
            f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization hasn't "
            "converged yet."
        )

    def _batch_size(self, n: int) -> int:
        if self.batch_size == "auto":
            return min(200, n)
        if self.batch_size > n:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=6
            )
        return int(min(self.batch_size, n))

    def _optimizer(self, task: Task, l2: float) -> Optimizer:
        """The solver, with its hyper-parameters in the units of the library's gradient."""
        l2, slope = l2 / task.slope, task.slope
        clip = None if self.max_grad_norm is None else self.max_grad_norm / slope
        if self.solver == "lbfgs":
            if clip is not None:
                raise ValueError(f"max_grad_norm={self.max_grad_norm!r} is for solver='adam' or 'sgd', not 'lbfgs'")
            return LBFGS(l2=l2)
        if self.solver == "sgd":
            nesterov = bool(self.nesterovs_momentum and self.momentum > 0)
            return SGD(self.learning_rate_init * slope, self.momentum, nesterov, l2=l2, clip_norm=clip)
        return Adam(self.learning_rate_init, self.beta_1, self.beta_2, self.epsilon / slope, l2=l2, clip_norm=clip)

    def _schedule(self, n_samples: int, incremental: bool) -> str | Schedule | Callable | None:
        if self.solver != "sgd" or self.learning_rate == "constant":
            return self.schedule
        if not incremental:
            self._rate_factor = 1.0
        if self.learning_rate == "adaptive":
            return Adaptive(self)
        return inverse_scaling(self.power_t, n_samples, self.t_, incremental)

    def _keep_optimizer(self, trainer: Trainer) -> None:
        """The optimizer's memory as arrays, for a later partial_fit, also of a copy or after pickling."""
        bound, to_numpy = trainer.optimizer.bind(self.network_), self.network_.backend.to_numpy
        self._optimizer_state = {"t": bound.t.copy()} | {k: np.array(to_numpy(v)) for k, v in bound.states.items()}

    def _restore_optimizer(self, trainer: Trainer) -> None:
        bound = trainer.optimizer.bind(self.network_)
        if self._optimizer_state.keys() == {"t", *bound.states}:
            bound.t[...] = self._optimizer_state["t"]
            for name, values in bound.states.items():
                values[...] = self._optimizer_state[name]

    def _scorer(self, task: Task, validation: tuple[Rows, Any, Any]) -> Callable[[dict], float]:
        """The validation score of an epoch from its record."""
        if self.scoring is None:
            if task.metric is None:
                return lambda record: -record["val_loss"]
            return lambda record: record[f"val_{task.metric}"]
        scorer = self.scoring if callable(self.scoring) else get_scorer(self.scoring)
        rows, X, y = validation
        extra = {} if rows.weight is None else {"sample_weight": rows.weight}
        view = self
        if self.encoder_ is None:  # without the names of columns, which an array does not have
            view = object.__new__(type(self))
            view.__dict__.update({k: v for k, v in vars(self).items() if k != "feature_names_in_"})
        return lambda record: float(scorer(view, X, y, **extra))

    # --- what differs between labels and values

    _y_is_numeric = False

    def _check_targets(self, y: np.ndarray, incremental: bool) -> None: ...

    def _scales_targets(self, task: Task, encoded: bool) -> bool:
        return False

    def _stratifies(self, task: Task) -> bool:
        return False

    def _decode(self, y: np.ndarray) -> np.ndarray:
        return y

    def _weigh_classes(self, train: Rows, y: Any) -> Rows:
        return train

    def _name_outputs(self, network: Network) -> None: ...

    # --- the fitted network

    @property
    def coefs_(self) -> list[np.ndarray]:
        """The weights of each layer, (fan_in, fan_out): copies of ``network_.parameters``."""
        return [self._parameter(f"dense_{i}.W").T for i in range(self._fitted_layers())]

    @property
    def intercepts_(self) -> list[np.ndarray]:
        """The biases of each layer, (fan_out,): copies; zeros where batch normalisation takes their place."""
        names = [f"dense_{i}" for i in range(self._fitted_layers())]
        there = self.network_.parameters
        return [
            self._parameter(f"{name}.b") if f"{name}.b" in there else np.zeros(there[f"{name}.W"].shape[1])
            for name in names
        ]

    def _fitted_layers(self) -> int:
        if "network_" not in vars(self):
            raise AttributeError(f"this {type(self).__name__} is not fitted yet: call fit first")
        return self.n_layers_ - 1

    def _parameter(self, name: str) -> np.ndarray:
        return np.array(self.network_.backend.to_numpy(self.network_.parameters[name])[0])

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        if self.encoder_ is not None:
            return self.network_.logits(X)
        with _saying_where(X=X):
            X = validate_data(self, X, accept_sparse="csr", reset=False)
        if not hasattr(X, "toarray"):
            return self.network_.logits(X)
        starts = range(0, X.shape[0], SPARSE_ROWS)
        return np.concatenate([self.network_.logits(_dense(X[i : i + SPARSE_ROWS])) for i in starts])

    def __sklearn_is_fitted__(self) -> bool:
        return "network_" in vars(self)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class MLPClassifier(ClassifierMixin, _MLP):
    """A multi-layer perceptron for classes or several labels a row, with scikit-learn's parameters.

    Minimises the log loss: softmax over several classes, one sigmoid for two, a sigmoid for each label of a row.

    Args:
        hidden_layer_sizes: widths of the hidden layers.
        activation: of the hidden layers, a name of ``gpumlp.activations.ACTIVATIONS``; "logistic" is "sigmoid". A list has
            one for each hidden layer.
        solver: "adam", "sgd" or "lbfgs".
        alpha: L2 penalty. As in scikit-learn it is divided by the rows of a batch: the loss has ½ alpha Σw² / batch_size
            over the weights, not the biases (divided by the mean of ``sample_weight`` too). An epoch's shorter last batch
            takes the same penalty, where scikit-learn's grows.
        batch_size: rows of a step; "auto" is min(200, n_samples).
        learning_rate, learning_rate_init, power_t: "constant"; "invscaling" and "adaptive" are for sgd.
        max_iter: largest number of epochs, or of iterations of lbfgs.
        shuffle: a new order in every epoch.
        random_state: of the initial weights (scikit-learn's own draw), the held-out part, shuffling and dropout. The order
            of the rows is the library's own, so that numbers differ from scikit-learn's where it shuffles.
        tol, n_iter_no_change: a fit ends after that many epochs in a row that improve by less than tol.
        verbose: print each epoch's loss.
        warm_start: a further fit goes on from the present weights; what was learned of a table's columns stays.
        momentum, nesterovs_momentum: of sgd; momentum is less than 1.
        early_stopping, validation_fraction: hold rows out, stop by their score, put the best weights back.
        beta_1, beta_2, epsilon: of adam; epsilon stands outside the bias correction (Kingma & Ba 2015, algorithm 1), in
            scikit-learn inside.
        max_fun: of lbfgs; each iteration counts as one call, whatever its line search took.
        dropout: share of each hidden layer's outputs set to zero in training.
        norm: None, "batch" or "layer", in each hidden layer.
        class_weight: None, "balanced" or {label: weight}; multiplies ``sample_weight``.
        label_smoothing: in [0, 1).
        schedule: a name of ``gpumlp.schedules.SCHEDULES`` or a schedule, over ``max_iter`` epochs; with
            ``learning_rate="constant"``.
        max_grad_norm: largest norm of a step's gradient.
        scoring: any scorer of scikit-learn, a name or a function (estimator, X, y), for validation; None is accuracy.
        callbacks: objects with methods of ``gm.Callback``.
        time_limit: seconds after which a fit ends.
        ema: in (0, 1), say 0.999: predict with an exponential moving average of the weights, of which so much is kept at
            each step; validation is by the average too. For adam and sgd, not in ``partial_fit``.
        categorical_features: of a table, "auto", or names or positions of columns, None for none. Columns of numbers alone
            are left as they are, as scikit-learn does; a table with categories or missing cells is encoded by a
            ``gm.TableEncoder``, which says what each option does. So is an array where ``scaling`` or this asks for it.
        one_hot_limit: a column with more categories than this becomes learned vectors (``gm.Embedding``), which ``alpha``
            does not reach.
        embedding_size: length of such a vector.
        impute: "median" or "mean" for missing numbers, beside an indicator column.
        scaling: of numbers: None, "standard", "robust", "quantile", "piecewise"; "auto" is "standard" where a table is
            encoded, and nothing else.
        device: "auto", "cpu", "cuda"; see ``gm.Network``.
        dtype: "float32" or "float64", of parameters and arithmetic. None is "float32" for adam and sgd, where scikit-learn
            takes X's own, and X's own for lbfgs, whose line search needs the digits.

    Attributes:
        network_: the ``gm.Network``; ``network_.save(path)`` writes a file that ``gm.load`` and the command line read, and
            that takes tables as the estimator does.
        encoder_: the ``gm.TableEncoder`` that X goes through, or None; ``print(encoder_.report())`` says what it learned.
        classes_, coefs_, intercepts_, n_layers_, n_outputs_, out_activation_, n_features_in_, feature_names_in_, n_iter_,
            t_, loss_, and for adam and sgd loss_curve_, best_loss_, validation_scores_, best_validation_score_: as
            scikit-learn's. The penalty in a loss is that of the weights at the epoch's end.
        validation_loss_curve_: the loss on the validation rows after each epoch, without penalty; None without them.

    Raises:
        ValueError: parameters out of range, when ``fit`` is called.
    """

    _parameter_constraints: dict = {  # noqa: RUF012
        **_MLP._parameter_constraints,
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
        "label_smoothing": [_SHARE],
    }

    def __init__(
        self, hidden_layer_sizes=(100,), activation="relu", *, solver="adam", alpha=0.0001, batch_size="auto",
        learning_rate="constant", learning_rate_init=0.001, power_t=0.5, max_iter=200, shuffle=True, random_state=None,
        tol=1e-4, verbose=False, warm_start=False, momentum=0.9, nesterovs_momentum=True, early_stopping=False,
        validation_fraction=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-8, n_iter_no_change=10, max_fun=15000,
        dropout=0.0, norm=None, class_weight=None, label_smoothing=0.0, schedule=None, max_grad_norm=None, scoring=None,
        callbacks=None, time_limit=None, ema=None, categorical_features="auto", one_hot_limit=64, embedding_size=8,
        impute="median", scaling="auto", device="auto", dtype=None,
    ):  # fmt: skip
        _keep(locals())

    @available_if(lambda self: self._is_stochastic())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> MLPClassifier:
        """Train for one epoch on these rows; the first call needs all ``classes``. Errors as in ``fit``.

        Of a table, the first call learns categories, fills and scales, from its rows alone.
        """
        if self.class_weight == "balanced":
            raise ValueError("class_weight='balanced' counts all rows, which partial_fit does not see; give a dict")
        with one_at_a_time(self, type(self).__name__):
            if _check_partial_fit_first_call(self, classes):
                self._learn_labels(y if type_of_target(y).startswith("multilabel") else classes)
            return self._fit(X, y, sample_weight, None, incremental=True)

    def _learn_labels(self, y: Any) -> None:
        self._label_binarizer = LabelBinarizer().fit(y)
        self.classes_ = self._label_binarizer.classes_

    @property
    def _is_multilabel(self) -> bool:
        return self._label_binarizer.y_type_.startswith("multilabel")

    def _check_targets(self, y: np.ndarray, incremental: bool) -> None:
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            check_classification_targets(y)
            self._learn_labels(y)
            return
        classes = unique_labels(y)
        if self.warm_start and not incremental and set(classes) != set(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
                f"Previously got {self.classes_}, `y` has {classes}"
            )
        if len(np.setdiff1d(classes, self.classes_, assume_unique=True)):
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {classes}."
            )

    def _encode(self, y: np.ndarray) -> np.ndarray:
        """Labels (n,) of several classes, or (n, n_outputs) of 0 and 1."""
        if self._is_multilabel:
            return np.asarray(y, np.float64)
        labels = np.searchsorted(self.classes_, y)
        return labels if len(self.classes_) > 2 else labels[:, None]

    def _decode(self, y: np.ndarray) -> np.ndarray:
        return y.astype(int) if self._is_multilabel else self.classes_[y.reshape(-1)]

    def _task(self, y: np.ndarray) -> Task:
        if y.ndim == 1:
            loss = Loss("softmax_cross_entropy", label_smoothing=self.label_smoothing)
            return Task(loss, len(self.classes_), "accuracy", 1.0, 1.0)
        outputs = y.shape[1]
        loss = Loss("binary_cross_entropy", label_smoothing=self.label_smoothing)
        return Task(loss, outputs, "subset_accuracy" if outputs > 1 else "accuracy", outputs, outputs)

    def _stratifies(self, task: Task) -> bool:
        return task.outputs == 1  # as scikit-learn: two classes only

    def _weigh_classes(self, train: Rows, y: Any) -> Rows:
        if self.class_weight is None:
            return train
        weight = compute_sample_weight(self.class_weight, self._decode(train.y) if y is None else y)
        return Rows(train.X, train.y, weight if train.weight is None else weight * train.weight)

    def _name_outputs(self, network: Network) -> None:
        """Let ``network_.predict`` answer with the labels too, where they are of a kind that a model's file holds."""
        names = self.classes_
        if names.dtype == object and all(isinstance(name, str) for name in names):
            names = names.astype(str)
        if not self._is_multilabel and len(names) > 1 and names.dtype.kind in "iuU":
            network.classes = names

    def predict(self, X: Any) -> np.ndarray:
        """Labels (n_samples,), or (n_samples, n_outputs) of 0 and 1. Raises ValueError, NotFittedError."""
        z = self._logits(X)
        if self._is_multilabel:
            return (z > 0).astype(int)
        if len(self.classes_) == 1:
            return np.repeat(self.classes_, len(z))
        return self.classes_[(z[:, 0] > 0).astype(int) if z.shape[1] == 1 else z.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n_samples, n_classes) in the order of ``classes_``. Raises ValueError, NotFittedError."""
        z = self._logits(X)
        p = output_values(z, "softmax" if self.out_activation_ == "softmax" else "sigmoid")
        return np.concatenate([1 - p, p], axis=1) if p.shape[1] == 1 else p

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The logarithm of ``predict_proba``, in its shape. Raises ValueError, NotFittedError."""
        p = self.predict_proba(X)
        with np.errstate(divide="ignore"):
            return np.log(p, out=p)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, _MLP):
    """A multi-layer perceptron for values, with scikit-learn's parameters.

    Args:
        loss: "squared_error" (halved, as scikit-learn's), "poisson" (half the deviance; the output is an exponential);
            and "absolute_error", "huber" (δ = 1, in the units of y) and "quantile".
        quantiles: of ``loss="quantile"``, each in (0, 1), ascending. Several give one output each, for one column of y;
            ``predict`` sorts a row's, so that they never cross (Chernozhukov et al. 2010).
        scoring: as ``MLPClassifier``; None is R², for quantiles the negative loss.
        standardize_targets: fit (y - mean) / deviation; predictions are in the units of y, losses are not. "auto" does so
            where a table is encoded, except with "poisson".

    All other parameters and attributes are those of ``MLPClassifier``, less those about classes.

    Raises:
        ValueError: parameters out of range, when ``fit`` is called.
    """

    _parameter_constraints: dict = {  # noqa: RUF012
        **_MLP._parameter_constraints,
        "loss": [StrOptions({"squared_error", "poisson", "absolute_error", "huber", "quantile"})],
        "quantiles": [list, tuple, np.ndarray],
        "standardize_targets": [StrOptions({"auto"}), "boolean"],
    }

    def __init__(
        self, loss="squared_error", hidden_layer_sizes=(100,), activation="relu", *, solver="adam", alpha=0.0001,
        batch_size="auto", learning_rate="constant", learning_rate_init=0.001, power_t=0.5, max_iter=200, shuffle=True,
        random_state=None, tol=1e-4, verbose=False, warm_start=False, momentum=0.9, nesterovs_momentum=True,
        early_stopping=False, validation_fraction=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-8, n_iter_no_change=10,
        max_fun=15000, quantiles=(0.5,), dropout=0.0, norm=None, schedule=None, max_grad_norm=None, scoring=None,
        callbacks=None, time_limit=None, ema=None, categorical_features="auto", one_hot_limit=64, embedding_size=8,
        impute="median", scaling="auto", standardize_targets="auto", device="auto", dtype=None,
    ):  # fmt: skip
        _keep(locals())

    @available_if(lambda self: self._is_stochastic())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """Train for one epoch on these rows. Errors as in ``fit``.

        What the first call learns of y and of a table's columns stays.
        """
        with one_at_a_time(self, type(self).__name__):
            return self._fit(X, y, sample_weight, None, incremental=True)

    _y_is_numeric = True

    def _scales_targets(self, task: Task, encoded: bool) -> bool:
        if self.standardize_targets != "auto":
            return bool(self.standardize_targets)
        return encoded and task.loss.row.output == "identity"

    def _encode(self, y: np.ndarray) -> np.ndarray:
        y = y if y.ndim == 2 else y[:, None]
        if self.loss != "quantile":
            return y
        if y.shape[1] > 1:
            raise ValueError(f"loss='quantile' takes one column of y, got {y.shape[1]}; fit an estimator for each")
        return np.repeat(y, len(self._checked_quantiles()), axis=1)

    def _decode(self, y: np.ndarray) -> np.ndarray:
        return y[:, 0] if y.shape[1] == 1 or self.loss == "quantile" else y

    def _checked_quantiles(self) -> np.ndarray:
        q = np.asarray(self.quantiles, np.float64)
        if q.ndim != 1 or not len(q) or not ((q > 0) & (q < 1)).all() or (np.diff(q) <= 0).any():
            raise ValueError(f"quantiles={self.quantiles!r} must be numbers in (0, 1), ascending, at least one")
        return q

    def _task(self, y: np.ndarray) -> Task:
        outputs = y.shape[1]
        if self.loss == "quantile":
            return Task(Loss("quantile", quantile=self._checked_quantiles()), outputs, None, 1.0, outputs)
        # scikit-learn reports the mean over outputs of squared errors, and the sum of Poisson deviances.
        factor = {"squared_error": 0.5, "poisson": float(outputs)}.get(self.loss, 1.0)
        return Task(Loss(self.loss), outputs, "r2", factor, outputs * min(factor, 1.0))

    def predict(self, X: Any) -> np.ndarray:
        """Values (n_samples,) or (n_samples, n_outputs); several quantiles ascending. Raises ValueError, NotFittedError."""
        z = self._logits(X)
        values = self.network_.values(z, self.out_activation_)
        if self.loss == "quantile":
            values = np.sort(values, axis=1)
        return values[:, 0] if values.shape[1] == 1 else values

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R²; of quantiles, the mean D² of the pinball loss (scikit-learn's ``d2_pinball_score``)."""
        if self.loss != "quantile":
            return super().score(X, y, sample_weight)
        predicted = self.predict(X).reshape(len(y), -1).T
        return float(
            np.mean(
                [
                    d2_pinball_score(y, p, alpha=q, sample_weight=sample_weight)
                    for p, q in zip(predicted, self._checked_quantiles(), strict=True)
                ]
            )
        )


# --- parts


def _keep(values: dict[str, Any]) -> None:
    """Store a constructor's arguments as they are, which ``clone`` and ``get_params`` rely on."""
    self: Any = values.pop("self")
    values.pop("__class__", None)
    vars(self).update(values)


@contextmanager
def _saying_where(**given: Any) -> Iterator[None]:
    """Within, scikit-learn's complaints about NaN and infinity also name the place; masked values are refused."""
    for name, values in given.items():
        refuse_masked(values, name)
    try:
        yield
    except ValueError as error:
        if "NaN" in str(error) or "infinity" in str(error):
            for name, values in given.items():
                if place := _not_finite_at(values, name):
                    raise ValueError(f"{error}\n{place}") from None
        raise


def _not_finite_at(values: Any, name: str) -> str:
    """What stands where in numbers that are not all finite; "" where they are, or are no numbers."""
    if hasattr(values, "tocoo"):
        entries = values.tocoo()
        for i in np.flatnonzero(~np.isfinite(entries.data))[:1]:
            return str(not_finite(entries.data[i], f"{name}[{entries.row[i]}, {entries.col[i]}]", np.float64))
        return ""
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O" and hasattr(values, "to_numpy"):  # pandas, with missing values of its own
            array = values.to_numpy(np.float64, na_value=np.nan)
        array = array if array.dtype.kind == "f" else array.astype(np.float64)
        require_finite(array.reshape(len(array), -1), name, np.float64, flat=array.ndim == 1)
    except TypeError:
        return ""
    except ValueError as error:
        return str(error)
    return ""


def _checked_weight(weight: Any, X: Any) -> np.ndarray | None:
    if weight is None:
        return None
    with _saying_where(sample_weight=weight):
        return _check_sample_weight(weight, X)


def _numbers(X: Any, encoder: TableEncoder | None) -> np.ndarray:
    return _dense(X) if encoder is None else encoder.transform(X)


def _code_sizes(encoder: TableEncoder | None) -> list[int]:
    return [] if encoder is None else encoder.code_sizes


def _dense(X: Any) -> np.ndarray:
    return X.toarray() if hasattr(X, "toarray") else X
