"""The peers of `train_step.py`: one function each, run in a child process of its own.

A peer is a function `peer(problem, device, precision) -> Training`. `Training.check()` trains the problem's fixed batches
from its weights and returns the losses, so that the parent can tell that everyone computes the same step;
`Training.train(epochs)` is what is timed. To add a peer, write one such function and give it a row in `PEERS`.

`device` is "cpu" or "cuda"; `precision` is "float32" (TF32 off), "tf32" (matrix products may round their float32 factors)
or "bf16" (layers compute in bfloat16; parameters, optimizer and loss stay in float32).

Libraries are imported inside the functions: a child loads its own peer's thread pools and nobody else's.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8  # Adam as published (Kingma & Ba 2015, algorithm 1)
CHECK_STEPS = 10
WARM_UP = 2  # epochs that nobody's figure holds: compiling, page faults, thread pools, recording
STEPS_IN_GRAPH = 32  # that PyTorch's whole-step graph holds, where an epoch divides so; gpumlp records as many
NO_END = 10**9  # epochs: the clock ends the fit

Checks = dict[str, list[float]]
Plan = Generator[int, float, tuple[int, list[float]]]


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
    check_steps: int = CHECK_STEPS
    check_rows: int = 0  # different rows of each checked batch, which repeats them until it is full; 0: batch_size

    @property
    def layer_sizes(self) -> list[int]:
        return [self.X.shape[1], *(len(b) for b in self.biases)]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.X) // self.batch_size

    @property
    def check_order(self) -> np.ndarray:
        """Rows of the checked batches, one after another: 0, 1, 2, ..., from 0 again where the data set ends."""
        batch, place = np.divmod(np.arange(self.check_steps * self.batch_size), self.batch_size)
        rows = self.check_rows or self.batch_size
        return (batch * rows + place % rows) % len(self.X)

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {"X": self.X, "y": self.y}
        arrays |= {name: getattr(self, name) for name in ("batch_size", "check_steps", "check_rows")}
        arrays |= {f"W{i}": W for i, W in enumerate(self.weights)} | {f"b{i}": b for i, b in enumerate(self.biases)}
        np.savez(path, **arrays)

    @staticmethod
    def load(path: Path) -> Problem:
        with np.load(path) as file:
            n_layers = sum(name.startswith("W") for name in file.files)
            weights = [file[f"W{i}"] for i in range(n_layers)]
            biases = [file[f"b{i}"] for i in range(n_layers)]
            sizes = [int(file[name]) for name in ("batch_size", "check_steps", "check_rows")]
            return Problem(file["X"], file["y"], weights, biases, *sizes)


class Training(NamedTuple):
    """What a peer offers.

    check() trains the rows of `problem.check_order` batch by batch and returns losses to compare: under "steps" one for
    each step, before its update; under "epochs" the mean of each pass over these rows. Neither: it cannot be checked, and
    `note` says why.
    train(epochs) trains whole epochs, each in a fresh order, and returns after the last update; from where is all one.
    follow(plan) trains and times what the plan asks for, where a peer cannot train epochs apart (see `follow`).
    """

    check: Callable[[], Checks]
    train: Callable[[int], Any]
    note: str = ""
    follow: Callable[[Plan], tuple[int, list[float]]] | None = None


# --- gpumlp ---------------------------------------------------------------------------------------------------------


def gpumlp(problem: Problem, device: Any = "cpu", precision: str = "float32") -> Training:
    """This library, timed through `Trainer.fit`: shuffling, history and all else that fit does is in the figure.

    On the CPU a block is a fit. On a GPU all blocks lie within one fit, measured from the end of an epoch to the end of a
    later one: the beginning of a fit moves the data and records the steps, which the peers have done before their clock.
    """
    import gpumlp as gm

    n_features, *hidden, n_classes = problem.layer_sizes
    layers = [*(gm.Dense(units, "relu") for units in hidden), gm.Dense(n_classes)]
    network = gm.Network(layers, n_features=n_features, seed=0, device=device, precision=precision)
    on_gpu = network.backend.is_device

    def start() -> None:
        for i, (W, b) in enumerate(zip(problem.weights, problem.biases, strict=True)):
            network.parameters[f"dense_{i}.W"][...] = W
            network.parameters[f"dense_{i}.b"][...] = b

    def fit(X: np.ndarray, y: np.ndarray, epochs: int, trainer: Any = None, **options: Any) -> Any:
        optimizer = gm.Adam(learning_rate=LEARNING_RATE)
        trainer = trainer or gm.Trainer(network, loss="softmax_cross_entropy", optimizer=optimizer)
        trainer.fit(X, y, epochs=epochs, batch_size=problem.batch_size, progress=False, **options)
        return trainer

    def own_loop() -> list[float]:
        start()
        loss_of, optimizer = gm.Loss("softmax_cross_entropy"), gm.Adam(learning_rate=LEARNING_RATE)
        losses = []
        for rows in problem.check_order.reshape(problem.check_steps, -1):
            loss, dz = loss_of(network.forward(problem.X[rows]), problem.y[rows])
            network.backward(dz)
            optimizer.step(network)
            losses.append(np.asarray(loss).item())
        return losses

    def fit_in_order() -> list[float]:
        start()
        X, y = problem.X[problem.check_order], problem.y[problem.check_order]
        passes = 2 if on_gpu else 1  # the second replays what was recorded
        return fit(X, y, passes, shuffle=False).history["loss"]

    trainer = None

    def train(epochs: int) -> None:
        nonlocal trainer
        trainer = fit(problem.X, problem.y, epochs, trainer)

    def follow(plan: Plan) -> tuple[int, list[float]]:
        clock = Clock(plan)
        fit(problem.X, problem.y, NO_END, callbacks=[clock])
        return clock.found

    return Training(lambda: {"steps": own_loop(), "epochs": fit_in_order()}, train, follow=follow if on_gpu else None)


class Clock:
    """A callback that times a plan's epochs within one fit, and ends the fit when the plan has all that it wants."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.left, self.since = plan, next(plan), time.perf_counter()
        self.found: tuple[int, list[float]] = (0, [])

    def on_epoch_end(self, trainer: Any, record: Any) -> np.ndarray | None:
        self.left -= 1
        if self.left > 0:
            return None
        now = time.perf_counter()  # fit has waited for the device and read the epoch's losses
        try:
            self.left = self.plan.send(now - self.since)
        except StopIteration as end:
            self.found = end.value
            return np.ones(1, bool)  # the model has nothing more to learn: the fit ends
        self.since = now
        return None


# --- PyTorch --------------------------------------------------------------------------------------------------------


def torch_eager(problem: Problem, device: str = "cpu", precision: str = "float32") -> Training:
    """PyTorch as most people write it, with its fastest Adam and the data resident in one tensor."""
    return _torch_loop(problem, device, precision, compiled=False)


def torch_compile(problem: Problem, device: str = "cpu", precision: str = "float32") -> Training:
    """The same with network and loss through torch.compile, on a GPU in its mode "reduce-overhead" (CUDA graphs).

    It needs a C++ compiler; on a GPU Triton's.
    """
    return _torch_loop(problem, device, precision, compiled=True)


def torch_graph(problem: Problem, device: str = "cuda", precision: str = "float32") -> Training:
    """PyTorch with whole steps in a CUDA graph: gather, forward, backward and Adam, nothing from the host in between."""
    return _torch_graph(problem, device, precision, compiled=False)


def torch_compile_graph(problem: Problem, device: str = "cuda", precision: str = "float32") -> Training:
    """The same with network and loss through torch.compile: fused kernels within the whole-step graph."""
    return _torch_graph(problem, device, precision, compiled=True)


def _torch_parts(problem: Problem, device: str, precision: str) -> tuple[Any, ...]:
    """Data, network, loss and the options of Adam, on the device and at the precision: what PyTorch's modes share."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch left alone may take the physical cores only
    if device == "cuda":
        if not torch.cuda.is_available():
            raise Unavailable(
                f"PyTorch {torch.__version__} finds no GPU; pytorch.org says how to install one that does"
            )
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    X, y = (torch.from_numpy(values).to(device) for values in (problem.X, problem.y))
    modules: list[torch.nn.Module] = []
    for W, b in zip(problem.weights, problem.biases, strict=True):
        linear = torch.nn.Linear(W.shape[1], W.shape[0])
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(W))
            linear.bias.copy_(torch.from_numpy(b))
        modules += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*modules[:-1]).to(device)  # no ReLU after the logits

    def loss_of(X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if precision != "bf16":
            return cross_entropy(model(X), y)
        # A step uses each weight once: a cache of their bfloat16 copies would serve nobody.
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return cross_entropy(model(X), y)

    return X, y, model, loss_of, {"lr": LEARNING_RATE, "betas": (BETA1, BETA2), "eps": EPSILON, "fused": True}


def _compiled(loss_of: Callable, X: Any, y: Any, **options: Any) -> Callable:
    """The loss through torch.compile, tried on one batch; Unavailable where that cannot be done here."""
    import torch

    compiled = torch.compile(loss_of, **options)
    try:
        compiled(X, y).backward()
    except Exception as error:  # no compiler, no Python headers, an unsupported Python: each raises its own type
        reason = str(error).strip().splitlines() or [""]
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {reason[0][:160]}") from error
    return compiled


def _torch_loop(problem: Problem, device: str, precision: str, compiled: bool) -> Training:
    """A loop in Python, a step at a time."""
    import torch

    X, y, model, loss_of, options = _torch_parts(problem, device, precision)
    batch_size = problem.batch_size
    optimizer = torch.optim.Adam(model.parameters(), **options)
    keep = torch.Tensor.detach
    if compiled and device == "cuda":
        loss_of = _compiled(loss_of, X[:batch_size], y[:batch_size], mode="reduce-overhead")
        keep = torch.Tensor.clone  # what a graph returns is overwritten by its next replay
    elif compiled:
        loss_of = _compiled(loss_of, X[:batch_size], y[:batch_size])

    def epoch(order: torch.Tensor) -> torch.Tensor:
        losses = []
        for rows in order.split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(X.index_select(0, rows), y.index_select(0, rows))
            loss.backward()
            optimizer.step()
            losses.append(keep(loss.detach()))
        return torch.stack(losses)

    def train(epochs: int) -> None:
        for _ in range(epochs):
            epoch(torch.randperm(len(X), device=device))
        if device == "cuda":
            torch.cuda.synchronize()

    return Training(lambda: {"steps": epoch(torch.from_numpy(problem.check_order).to(device)).tolist()}, train)


def _torch_graph(problem: Problem, device: str, precision: str, compiled: bool) -> Training:
    """Steps that find their batch by themselves, in the order and at the place that lie in tensors; without a GPU eager."""
    import torch

    X, y, model, loss_of, options = _torch_parts(problem, device, precision)
    batch_size, together = problem.batch_size, math.gcd(problem.steps_per_epoch, STEPS_IN_GRAPH)
    optimizer = torch.optim.Adam(model.parameters(), capturable=True, **options)
    initial = [p.detach().clone() for p in model.parameters()]
    order = torch.arange(len(X), device=device)
    first = torch.arange(together * batch_size, device=device)
    place = first.clone()  # in the order, of the rows that come next
    losses = torch.zeros(together, device=device)
    if compiled:
        loss_of = _compiled(loss_of, X[:batch_size], y[:batch_size])

    def steps() -> None:
        rows = order.index_select(0, place)
        place.add_(len(place)).remainder_(len(order))
        for i, batch in enumerate(rows.split(batch_size)):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(X.index_select(0, batch), y.index_select(0, batch))
            loss.backward()
            optimizer.step()
            losses[i].copy_(loss.detach())

    run = _captured(steps, optimizer) if device == "cuda" else steps

    def restart() -> None:
        """The first state again, in the memory that the graph knows."""
        for p, value in zip(model.parameters(), initial, strict=True):
            p.detach().copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    def check() -> Checks:
        restart()
        found: list[float] = []
        for rows in torch.from_numpy(problem.check_order).to(device).split(len(place)):
            order[: len(rows)] = rows
            place.copy_(first)
            run()
            found += losses.tolist()
        return {"steps": found[: problem.check_steps]}

    def train(epochs: int) -> None:
        place.copy_(first)
        for _ in range(epochs):
            order.copy_(torch.randperm(len(X), device=device))
            for _ in range(problem.steps_per_epoch // together):
                run()
        if device == "cuda":
            torch.cuda.synchronize()

    return Training(check, train)


def _captured(steps: Callable[[], None], optimizer: Any) -> Callable[[], None]:
    """The steps as a CUDA graph, recorded as PyTorch's documentation asks: warm-up on a side stream, no gradients left."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            steps()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)  # so that the graph's backward makes its own, in the graph's memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return functools.partial(_replay, graph, steps)


def _replay(graph: Any, _captured: Callable[[], None]) -> None:
    """A graph keeps no tensor alive that it was recorded with; the function that launched it does."""
    graph.replay()


# --- JAX ------------------------------------------------------------------------------------------------------------


def jax_step(problem: Problem, device: str = "cpu", precision: str = "float32") -> Training:
    """JAX with a jit of the whole step: gather, forward, backward, Adam; the state donated, so updates are in place."""
    return _jax(problem, device, precision, scan=False)


def jax_scan(problem: Problem, device: str = "cpu", precision: str = "float32") -> Training:
    """The same step under lax.scan, an epoch a call: no dispatch between steps, at the price of no visible loop."""
    return _jax(problem, device, precision, scan=True)


def _jax(problem: Problem, device: str, precision: str, scan: bool) -> Training:
    import jax
    import jax.numpy as jnp

    if device == "cuda":
        # Left alone, JAX multiplies float32 matrices in TF32 where the GPU can.
        products = {"float32": "float32", "tf32": "tensorfloat32", "bf16": None}[precision]
        jax.config.update("jax_default_matmul_precision", products)
        try:
            jax.devices("cuda")
        except Exception as error:  # without its plugin it fails an assertion
            raise Unavailable(f'JAX {jax.__version__} finds no GPU: pip install "jax[cuda13]" ({error})') from error
    X, y, batch_size = jnp.asarray(problem.X), jnp.asarray(problem.y, jnp.int32), problem.batch_size
    compute = jnp.bfloat16 if precision == "bf16" else jnp.float32
    # (fan_in, fan_out), as JAX code has it. Each tree has buffers of its own: a donated buffer may be passed once only.
    parameters = [(jnp.array(W.T), jnp.array(b)) for W, b in zip(problem.weights, problem.biases, strict=True)]
    m, v = (jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))

    def loss_of(parameters: Any, X: Any, y: Any) -> Any:
        a = X.astype(compute)
        parameters = jax.tree.map(lambda p: p.astype(compute), parameters)
        for W, b in parameters[:-1]:
            a = jax.nn.relu(a @ W + b)
        W, b = parameters[-1]
        log_p = jax.nn.log_softmax((a @ W + b).astype(jnp.float32))
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()

    def step(state: Any, X: Any, y: Any, order: Any) -> tuple[Any, Any]:
        parameters, m, v, t = state
        # The step number lives on the device: the host passes nothing that changes.
        start = (t * batch_size) % len(order)
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

    def check() -> Checks:
        return {"steps": np.ravel(epoch(jnp.asarray(problem.check_order, jnp.int32))).tolist()}

    return Training(check, train)


# --- scikit-learn ---------------------------------------------------------------------------------------------------


def scikit_learn(problem: Problem, device: str = "cpu", precision: str = "float32") -> Training:
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

    def check() -> Checks:
        X, y = problem.X[problem.check_order], problem.y[problem.check_order]
        one_epoch = classifier(max_iter=1, shuffle=False, warm_start=True)
        one_epoch.fit(X, y)  # creates the arrays; with warm_start the next fit starts from whatever they then hold
        one_epoch.coefs_ = [W.T.copy() for W in problem.weights]
        one_epoch.intercepts_ = [b.copy() for b in problem.biases]
        return {"epochs": [one_epoch.fit(X, y).loss_curve_[-1]]}

    def train(epochs: int) -> None:
        classifier(max_iter=epochs, shuffle=True).fit(problem.X, problem.y)

    if problem.layer_sizes[-1] == 2:
        return Training(dict, train, "not checked: for two classes it trains one logistic output, not two logits")
    return Training(check, train)


# --- the table, and what a child does -------------------------------------------------------------------------------


class Peer(NamedTuple):
    package: str  # what it imports; where that is missing the peer is reported as not installed
    build: Callable[[Problem, str, str], Training]
    devices: tuple[str, ...] = ("cpu", "cuda")


PEERS = {
    "gpumlp": Peer("gpumlp", gpumlp),
    "torch-eager": Peer("torch", torch_eager),
    "torch-compile": Peer("torch", torch_compile),
    "torch-graph": Peer("torch", torch_graph, ("cuda",)),
    "torch-compile-graph": Peer("torch", torch_compile_graph, ("cuda",)),
    "jax": Peer("jax", jax_step),
    "jax-scan": Peer("jax", jax_scan),
    "scikit-learn": Peer("sklearn", scikit_learn, ("cpu",)),
}


def block_plan(repeats: int, block_seconds: float) -> Plan:
    """Says how many epochs to train next and is sent the seconds that they took.

    After a warm-up it asks for blocks of equally many epochs, each of about `block_seconds` or more. Returns the epochs
    of a block and the seconds of each of the last `repeats`.
    """
    yield WARM_UP
    epochs = 1
    while (taken := (yield epochs)) < block_seconds:
        epochs = max(epochs + 1, math.ceil(epochs * min(10.0, 1.1 * block_seconds / taken)))
    blocks = []
    for _ in range(repeats):
        blocks.append((yield epochs))
    return epochs, blocks


def follow(plan: Plan, train: Callable[[int], Any]) -> tuple[int, list[float]]:
    """Trains and times what the plan asks for; returns what it returns."""
    epochs = next(plan)
    while True:
        before = time.perf_counter()
        train(epochs)
        try:
            epochs = plan.send(time.perf_counter() - before)
        except StopIteration as end:
            return end.value


def time_blocks(training: Training, steps_per_epoch: int, repeats: int, block_seconds: float) -> dict[str, Any]:
    """Times `repeats` blocks of whole epochs, each of about `block_seconds` or more.

    Returns steps_per_block and blocks_us: microseconds per step, one for each block.
    """
    plan = block_plan(repeats, block_seconds)
    epochs, blocks = training.follow(plan) if training.follow else follow(plan, training.train)
    steps = epochs * steps_per_epoch
    return {"steps_per_block": steps, "blocks_us": [round(seconds / steps * 1e6, 3) for seconds in blocks]}


def main(
    name: str, problem_path: str, result_path: str, repeats: str, seconds: str, device: str, precision: str
) -> None:
    """Checks and times one peer on one problem and writes what it found as JSON. `train_step.py` starts this."""
    problem, peer = Problem.load(Path(problem_path)), PEERS[name]
    result: dict[str, Any]
    try:
        training = peer.build(problem, device, precision)
        result = {"note": training.note, "checks": training.check()}
        result |= time_blocks(training, problem.steps_per_epoch, int(repeats), float(seconds))
    except Unavailable as reason:
        result = {"unavailable": str(reason)}
    result["version"] = str(getattr(sys.modules[peer.package], "__version__", "unknown"))
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
