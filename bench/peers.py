"""The peers of `train_step.py`: one function each, run in a child process of its own.

A peer is a function `peer(problem) -> Training`. `Training.check()` trains the problem's fixed batches from its weights
and returns the losses, so that the parent can tell that everyone computes the same step; `Training.train(epochs)` is
what is timed. To add a peer, write one such function and give it a row in `PEERS`.

Libraries are imported inside the functions: a child loads its own peer's thread pools and nobody else's.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8  # Adam as published (Kingma & Ba 2015, algorithm 1)
CHECK_STEPS = 10


class Unavailable(Exception):
    """The peer is installed but cannot run here; its message is shown in place of a figure."""


@dataclass(frozen=True)
class Problem:
    """What every peer trains: data, initial weights and batch size.

    X is (n_samples, n_features) float32, y is (n_samples,) int64 class indices; layer i has float32 weights[i]
    (fan_out, fan_in) and biases[i] (fan_out,). n_samples is a multiple of batch_size, so an epoch has no short batch.
    """

    X: np.ndarray
    y: np.ndarray
    weights: list[np.ndarray]
    biases: list[np.ndarray]
    batch_size: int

    @property
    def layer_sizes(self) -> list[int]:
        return [self.X.shape[1], *(len(b) for b in self.biases)]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.X) // self.batch_size

    @property
    def check_order(self) -> np.ndarray:
        """Rows of the checked batches, one after another: 0, 1, 2, ..., from 0 again where the data set ends."""
        return np.arange(CHECK_STEPS * self.batch_size) % len(self.X)

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {"X": self.X, "y": self.y, "batch_size": self.batch_size}
        arrays |= {f"W{i}": W for i, W in enumerate(self.weights)} | {f"b{i}": b for i, b in enumerate(self.biases)}
        np.savez(path, **arrays)

    @staticmethod
    def load(path: Path) -> Problem:
        with np.load(path) as file:
            n_layers = sum(name.startswith("W") for name in file.files)
            weights = [file[f"W{i}"] for i in range(n_layers)]
            biases = [file[f"b{i}"] for i in range(n_layers)]
            return Problem(file["X"], file["y"], weights, biases, int(file["batch_size"]))


class Training(NamedTuple):
    """What a peer offers.

    check() trains the rows of `problem.check_order` batch by batch and returns lists of losses to compare: CHECK_STEPS
    losses, one per step before its update, or their mean alone. No list at all: cannot be checked, and `note` says why.
    train(epochs) trains whole epochs, each in a fresh order, and returns after the last update; from where is all one.
    """

    check: Callable[[], list[list[float]]]
    train: Callable[[int], Any]
    note: str = ""


def gpumlp(problem: Problem) -> Training:
    """This library, timed through `Trainer.fit`: shuffling, history and all else that fit does is in the figure."""
    import gpumlp as gm

    n_features, *hidden, n_classes = problem.layer_sizes
    layers = [*(gm.Dense(units, "relu") for units in hidden), gm.Dense(n_classes)]
    network = gm.Network(layers, n_features=n_features, seed=0, device="cpu")

    def start() -> None:
        for i, (W, b) in enumerate(zip(problem.weights, problem.biases, strict=True)):
            network.parameters[f"dense_{i}.W"][...] = W
            network.parameters[f"dense_{i}.b"][...] = b

    def new_trainer() -> Any:
        return gm.Trainer(network, loss="softmax_cross_entropy", optimizer=gm.Adam(learning_rate=LEARNING_RATE))

    def own_loop() -> list[float]:
        start()
        loss_of, optimizer = gm.Loss("softmax_cross_entropy"), gm.Adam(learning_rate=LEARNING_RATE)
        losses = []
        for rows in problem.check_order.reshape(CHECK_STEPS, -1):
            loss, dz = loss_of(network.forward(problem.X[rows]), problem.y[rows])
            network.backward(dz)
            optimizer.step(network)
            losses.append(np.asarray(loss).item())
        return losses

    def fit_once() -> list[float]:
        start()
        X, y = problem.X[problem.check_order], problem.y[problem.check_order]
        history = new_trainer().fit(X, y, epochs=1, batch_size=problem.batch_size, shuffle=False, progress=False)
        return [np.asarray(history["loss"][0]).item()]

    trainer = new_trainer()

    def train(epochs: int) -> None:
        trainer.fit(problem.X, problem.y, epochs=epochs, batch_size=problem.batch_size, progress=False)

    return Training(lambda: [own_loop(), fit_once()], train)


def torch_eager(problem: Problem) -> Training:
    """PyTorch as most people write it, with its fastest CPU Adam and the data resident in one tensor."""
    return _torch(problem, compiled=False)


def torch_compile(problem: Problem) -> Training:
    """The same with network and loss through torch.compile (default mode). It needs a C++ compiler."""
    return _torch(problem, compiled=True)


def _torch(problem: Problem, compiled: bool) -> Training:
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch left alone may take the physical cores only
    X, y, batch_size = torch.from_numpy(problem.X), torch.from_numpy(problem.y), problem.batch_size
    modules: list[torch.nn.Module] = []
    for W, b in zip(problem.weights, problem.biases, strict=True):
        linear = torch.nn.Linear(W.shape[1], W.shape[0])
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(W))
            linear.bias.copy_(torch.from_numpy(b))
        modules += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*modules[:-1])  # no ReLU after the logits
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPSILON, fused=True)

    def loss_of(X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(X), y)

    if compiled:
        loss_of = torch.compile(loss_of)
        try:
            loss_of(X[:batch_size], y[:batch_size]).backward()
        except Exception as error:  # no compiler, no Python headers, an unsupported Python: each raises its own type
            reason = str(error).strip().splitlines() or [""]
            raise Unavailable(f"torch.compile failed: {type(error).__name__}: {reason[0][:160]}") from error

    def epoch(order: torch.Tensor) -> list[float]:
        losses = []
        for rows in order.split(batch_size):
            loss = loss_of(X.index_select(0, rows), y.index_select(0, rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def train(epochs: int) -> None:
        for _ in range(epochs):
            epoch(torch.randperm(len(X)))

    return Training(lambda: [epoch(torch.from_numpy(problem.check_order))], train)


def jax_step(problem: Problem) -> Training:
    """JAX with a jit of the whole step: gather, forward, backward, Adam; the state donated, so updates are in place."""
    return _jax(problem, scan=False)


def jax_scan(problem: Problem) -> Training:
    """The same step under lax.scan, an epoch a call: no dispatch between steps, at the price of no visible loop."""
    return _jax(problem, scan=True)


def _jax(problem: Problem, scan: bool) -> Training:
    import jax
    import jax.numpy as jnp

    X, y, batch_size = jnp.asarray(problem.X), jnp.asarray(problem.y, jnp.int32), problem.batch_size
    # (fan_in, fan_out), as JAX code has it. Each tree has buffers of its own: a donated buffer may be passed once only.
    parameters = [(jnp.array(W.T), jnp.array(b)) for W, b in zip(problem.weights, problem.biases, strict=True)]
    m, v = (jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))

    def loss_of(parameters: Any, X: Any, y: Any) -> Any:
        a = X
        for W, b in parameters[:-1]:
            a = jax.nn.relu(a @ W + b)
        W, b = parameters[-1]
        log_p = jax.nn.log_softmax(a @ W + b)
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()

    def step(state: Any, X: Any, y: Any, order: Any) -> tuple[Any, Any]:
        parameters, m, v, t = state
        start = (t * batch_size) % len(
            order
        )  # the step number lives on the device: the host passes nothing that changes
        rows = jax.lax.dynamic_slice(order, (start,), (batch_size,))
        loss, gradient = jax.value_and_grad(loss_of)(parameters, X[rows], y[rows])
        t = t + 1
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, gradient)
        m_scale, v_scale = 1 / (1 - BETA1**t), 1 / (1 - BETA2**t)
        parameters = jax.tree.map(
            lambda p, m, v: p - LEARNING_RATE * (m * m_scale) / (jnp.sqrt(v * v_scale) + EPSILON), parameters, m, v
        )
        return (parameters, m, v, t), loss

    def scan_epoch(state: Any, X: Any, y: Any, order: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda state, _: step(state, X, y, order), state, None, length=len(order) // batch_size)

    jitted = jax.jit(scan_epoch if scan else step, donate_argnums=0)
    state = (parameters, m, v, jnp.zeros((), jnp.int32))
    key = jax.random.key(0)

    def epoch(order: Any) -> list[Any]:
        nonlocal state
        losses = []
        for _ in range(1 if scan else len(order) // batch_size):
            state, loss = jitted(state, X, y, order)
            losses.append(loss)
        return losses

    def train(epochs: int) -> None:
        nonlocal key
        for _ in range(epochs):
            key, now = jax.random.split(key)
            epoch(jax.random.permutation(now, len(X)))
        jax.block_until_ready(state)

    def check() -> list[list[float]]:
        return [np.ravel(epoch(jnp.asarray(problem.check_order, jnp.int32))).tolist()]

    return Training(check, train)


def scikit_learn(problem: Problem) -> Training:
    """scikit-learn's MLPClassifier through `fit`, without early stopping and L2. It tells epochs' mean losses only."""
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.neural_network import MLPClassifier  # type: ignore[import-untyped]

    warnings.simplefilter("ignore", ConvergenceWarning)  # it is told to stop after a fixed number of epochs

    def classifier(**options: Any) -> MLPClassifier:
        adam = {
            "solver": "adam",
            "learning_rate_init": LEARNING_RATE,
            "beta_1": BETA1,
            "beta_2": BETA2,
            "epsilon": EPSILON,
        }
        never_early = {"tol": 0.0, "n_iter_no_change": 10**9}
        hidden, batch_size = problem.layer_sizes[1:-1], problem.batch_size
        return MLPClassifier(hidden, batch_size=batch_size, alpha=0.0, random_state=0, **adam, **never_early, **options)

    def check() -> list[list[float]]:
        X, y = problem.X[problem.check_order], problem.y[problem.check_order]
        one_epoch = classifier(max_iter=1, shuffle=False, warm_start=True)
        one_epoch.fit(X, y)  # creates the arrays; with warm_start the next fit starts from whatever they then hold
        one_epoch.coefs_ = [W.T.copy() for W in problem.weights]
        one_epoch.intercepts_ = [b.copy() for b in problem.biases]
        return [[one_epoch.fit(X, y).loss_curve_[-1]]]

    def train(epochs: int) -> None:
        classifier(max_iter=epochs, shuffle=True).fit(problem.X, problem.y)

    if problem.layer_sizes[-1] == 2:
        return Training(list, train, "not checked: for two classes it trains one logistic output, not two logits")
    return Training(check, train)


class Peer(NamedTuple):
    package: str  # what it imports; where that is missing the peer is reported as not installed
    build: Callable[[Problem], Training]


PEERS = {
    "gpumlp": Peer("gpumlp", gpumlp),
    "torch-eager": Peer("torch", torch_eager),
    "torch-compile": Peer("torch", torch_compile),
    "jax": Peer("jax", jax_step),
    "jax-scan": Peer("jax", jax_scan),
    "scikit-learn": Peer("sklearn", scikit_learn),
}


def time_blocks(
    train: Callable[[int], Any], steps_per_epoch: int, repeats: int, block_seconds: float
) -> dict[str, Any]:
    """Times `repeats` blocks of whole epochs, each of about `block_seconds` or more, after a warm-up of one such block.

    Returns steps_per_block and blocks_us: microseconds per step, one for each block.
    """

    def seconds(epochs: int) -> float:
        before = time.perf_counter()
        train(epochs)
        return time.perf_counter() - before

    seconds(1)  # compiling, page faults and thread pools belong to nobody's step
    epochs = 1
    while (taken := seconds(epochs)) < block_seconds:
        epochs = max(epochs + 1, math.ceil(epochs * min(10.0, 1.1 * block_seconds / taken)))
    steps = epochs * steps_per_epoch
    return {"steps_per_block": steps, "blocks_us": [round(seconds(epochs) / steps * 1e6, 3) for _ in range(repeats)]}


def main(name: str, problem_path: str, result_path: str, repeats: str, block_seconds: str) -> None:
    """Checks and times one peer on one problem and writes what it found as JSON. `train_step.py` starts this."""
    problem, peer = Problem.load(Path(problem_path)), PEERS[name]
    result: dict[str, Any]
    try:
        training = peer.build(problem)
        checks: Sequence[Sequence[float]] = training.check()
        result = {"note": training.note, "checks": checks}
        result |= time_blocks(training.train, problem.steps_per_epoch, int(repeats), float(block_seconds))
    except Unavailable as reason:
        result = {"unavailable": str(reason)}
    result["version"] = str(getattr(sys.modules[peer.package], "__version__", "unknown"))
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
