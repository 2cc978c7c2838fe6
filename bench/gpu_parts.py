"""The correctness parts of gpu_check.py: each yields named checks, functions that raise where something is wrong.

What a check returns is kept as its detail; ``Skip`` says that it cannot be made here. All of them run on a GPU, and on the
emulated device with sizes that it takes seconds for.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import machine  # puts the checkout on the path
import numpy as np

import gpumlp as gm
from gpumlp.activations import ACTIVATIONS
from gpumlp.backends.device import DeviceArray, DeviceMemoryError, Product
from gpumlp.backends.gpu_backend import GpuBackend
from gpumlp.device_step import CHECK
from gpumlp.losses import LOSSES

TESTS = machine.ROOT / "tests"
Check = tuple[str, Callable[[], Any]]


class Skip(Exception):
    """Why a check cannot be made here."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run."""

    runtime: Any
    emulated: bool = False
    quick: bool = False

    @property
    def backend(self) -> GpuBackend:
        return GpuBackend(self.runtime)

    def put(self, values: Any, type: str = "f32") -> DeviceArray:
        array = DeviceArray.empty(self.runtime, np.shape(values), type)
        array[...] = values
        return array


def expect(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


# --- the intrinsics that kernels lean on ----------------------------------------------------------------------------


def conformance(setting: Setting) -> Iterator[Check]:
    """Launches, shuffles, votes, barriers, atomics, conversions, wide loads, tensor cores: NumPy says to the last bit."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from emulator import conformance

    runtime = setting.runtime
    launch = None if setting.emulated else compiled(runtime, conformance.cuda_source())
    for name, right, detail in conformance.check(runtime, launch):
        if name.startswith("mma") and getattr(runtime, "capability", (8, 0)) < (8, 0):
            yield name, partial(skip, "products of bfloat16 in tensor cores begin with compute capability 8.0")
        else:
            yield name, partial(expect, right, detail)


def skip(reason: str) -> None:
    raise Skip(reason)


def compiled(runtime: Any, source: str) -> Callable[..., None]:
    """A launch of kernels that are not gpumlp's own; it waits on both sides, since CuPy has a stream of its own."""
    import cupy  # type: ignore

    module = cupy.RawModule(code=source, options=("-std=c++17",))

    def launch(instance: Any, grid: tuple, block: tuple, values: list) -> None:
        runtime.synchronize()
        module.get_function(instance.name)(grid, block, tuple(values))
        cupy.cuda.get_current_stream().synchronize()

    return launch


# --- products and kernels in a graph --------------------------------------------------------------------------------


def capture(setting: Setting) -> Iterator[Check]:
    """Two products of cuBLASLt and a kernel, recorded, replayed three times: the bits of the launches one by one."""
    for type, tf32 in (("f32", False), ("f32", True), ("bf16", False), ("f64", False)):
        for epilogue in ("", "bias", "relu_bias"):
            name = f"{'tf32' if tf32 else type}, {epilogue.replace('_', ' ') or 'no epilogue'}"
            yield name, partial(replays_like_launches, setting, type, tf32, epilogue)


def replays_like_launches(setting: Setting, type: str, tf32: bool, epilogue: str) -> str:
    """x ← x + (x W) V, three times; each time x is another one, so that nothing recorded may be a value."""
    runtime, backend, rng = setting.runtime, setting.backend, np.random.default_rng(3)
    m, k, n = 48, 64, 80
    start = rng.standard_normal((1, m, k))
    x, h, y = setting.put(start, type), setting.put(np.zeros((1, m, n)), type), setting.put(np.zeros((1, m, k)), type)
    W, V = (setting.put(rng.standard_normal(shape) / 9, type) for shape in ((1, n, k), (1, n, k)))
    bias = setting.put(rng.standard_normal((1, n)), type) if epilogue else None
    try:
        first = runtime.product(Product(x, W.swapaxes(1, 2), h, epilogue=epilogue, bias=bias, tf32=tf32))
    except ValueError as error:
        raise Skip(f"cuBLASLt has no such product: {error}") from error
    second = runtime.product(Product(h, V, y, tf32=tf32))

    def step() -> None:
        first()
        second()
        backend.add_columns(y, x, adds=True)

    def three(run: Callable[[], None]) -> list[np.ndarray]:
        x[...] = start
        found = []
        for _ in range(3):
            run()
            found.append(x.get())
        return found

    launched = three(step)  # which loads the kernel, before it is recorded
    replayed = three(runtime.capture(step))
    for i, (a, b) in enumerate(zip(launched, replayed, strict=True), start=1):
        expect(np.array_equal(a, b), f"replay {i} differs from launches by {np.abs(a - b).max():.1e}")
    wanted = first_by_numpy(start, W.get(), V.get(), None if bias is None else bias.get(), epilogue)
    off = float(np.abs(launched[0] - wanted).max() / np.abs(wanted).max())
    allowed = {"f64": 1e-12, "f32": 4e-3 if tf32 else 1e-5, "bf16": 3e-2}[type]
    expect(off <= allowed, f"the first step is off by {off:.1e} of the largest value, allowed is {allowed:.0e}")
    return f"three replays equal three launches; off NumPy by {off:.0e}"


def first_by_numpy(x: np.ndarray, W: np.ndarray, V: np.ndarray, bias: Any, epilogue: str) -> np.ndarray:
    h = x @ W.swapaxes(1, 2) + (0 if bias is None else bias[:, None])
    return x + (np.maximum(h, 0) if epilogue.startswith("relu") else h) @ V


# --- the tests that need a GPU --------------------------------------------------------------------------------------

ALONE = "test_kernels_agree_with_numpy"  # for each file of kernels' tests one, which compiles for long: side by side


def tests(setting: Setting) -> Iterator[Check]:
    """pytest -m gpu; what takes long runs side by side, and not at all where it has to be quick."""
    if importlib.util.find_spec("pytest") is None:
        yield "pytest", partial(skip, "pytest is not installed: pip install pytest")
        return
    if not TESTS.is_dir():
        yield "pytest", partial(skip, f"there is no {TESTS}: run this from a checkout")
        return
    done = run_pytest("--collect-only", "-q", "-m", "gpu", str(TESTS))
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    if not ids:
        yield (
            "collect",
            partial(expect, False, f"pytest finds no test that needs a GPU: {(done.stdout + done.stderr)[-2000:]}"),
        )
        return
    alone, files = [id for id in ids if ALONE in id], sorted({id.split("::")[0] for id in ids})
    jobs = {"all but the kernels' own tests": ["-k", f"not {ALONE}", *files]}
    if not setting.quick:
        jobs |= {re.sub(r".*\[(.*)\]", r"\1", id): [id] for id in alone}
    with ThreadPoolExecutor(max(2, machine.n_cores() // 2)) as pool:
        running = {name: pool.submit(outcome_of, arguments) for name, arguments in jobs.items()}
        for name, future in running.items():
            yield name, future.result


def run_pytest(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=machine.ROOT, env=os.environ | {"PYTHONPATH": path}
    )


def outcome_of(arguments: list[str]) -> str:
    """How many tests passed; raises with the names of those that did not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.xml"
        done = run_pytest("-q", "-m", "gpu", f"--junitxml={path}", *arguments)
        if not path.is_file():
            raise AssertionError(f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        cases = list(ElementTree.parse(path).iter("testcase"))
    bad = [(case.get("name", ""), part.text or part.get("message") or "") for case in cases for part in failures(case)]
    skipped = sum(case.find("skipped") is not None for case in cases)
    expect(not bad, "\n".join(f"{name}: {text[-1500:]}" for name, text in bad))
    if len(cases) == skipped:
        raise Skip(f"all {skipped} tests were skipped")
    return f"{len(cases) - skipped} passed" + f", {skipped} skipped" * bool(skipped)


def failures(case: ElementTree.Element) -> list[ElementTree.Element]:
    return [*case.findall("failure"), *case.findall("error")]


# --- the same training on both --------------------------------------------------------------------------------------

FEATURES = 12
OUTPUTS = {"labels or probabilities": 5, "binary": 1, "counts": 3, "values": 3}  # by the targets that a loss takes
SOFTMAX = "softmax_cross_entropy"
OPTIMIZERS = {
    "SGD": gm.SGD(0.05),
    "momentum": gm.SGD(0.02, momentum=0.9),
    "Nesterov": gm.SGD(0.02, momentum=0.9, nesterov=True),
    "RMSprop": gm.RMSprop(1e-3),
    "Adagrad": gm.Adagrad(1e-2),
    "Adadelta": gm.Adadelta(),
    "Adam": gm.Adam(),
    "AdamW": gm.AdamW(l1=1e-3, clip_norm=0.5),
    "NAdam": gm.NAdam(l2=1e-2, clip_value=0.05),
}


def no_options(rows: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """A training that is the same everywhere: 4 epochs of 5 steps. ``fit`` gives options for so many rows."""

    name: str
    layers: Any = ()  # hidden ones, or a function of the number of outputs that gives a graph's two ends
    loss: str = SOFTMAX
    optimizer: Any = "adam"
    network: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    fit: Callable[[int], dict[str, Any]] = no_options
    data_type: Any = np.float32
    tolerance: float = 1e-3  # relative, of losses; of logits 20 times that, relative to the largest
    steps: int = 5  # of an epoch

    def train(self, device: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The losses of the epochs, of the training and of validation, and what the network then says about the rows."""
        n, row = (self.steps - 1) * batch + batch // 2, LOSSES[self.loss]  # the last batch is a short one
        outputs, rng = OUTPUTS[row.targets], np.random.default_rng(7)
        X = (40 * rng.standard_normal((n, FEATURES)) + 128).clip(0, 255).astype(np.uint8)
        X = X if self.data_type == np.uint8 else ((X - 128.0) / 40).astype(self.data_type)
        y: Any = {
            "labels or probabilities": lambda: rng.integers(outputs, size=n),
            "binary": lambda: rng.integers(2, size=n),
            "counts": lambda: rng.poisson(1.5, (n, outputs)),
            "values": lambda: rng.standard_normal((n, outputs)),
        }[row.targets]()
        if callable(self.layers):
            network = gm.Network(*self.layers(outputs), seed=5, device=device, **self.network)
        else:
            layers = [*self.layers, gm.Dense(outputs)]
            network = gm.Network(layers, **{"n_features": FEATURES, "seed": 5, "device": device, **self.network})
        trainer = gm.Trainer(network, self.loss, self.optimizer, **self.trainer)
        history = trainer.fit(X, y, epochs=4, batch_size=batch, progress=False, **self.fit(n))
        losses = [history["loss"], *([history["val_loss"]] if "val_loss" in history else [])]
        return np.array(losses), np.asarray(network.logits(X))


def table_cases(dtype: str, tolerance: float) -> Iterator[Case]:
    """Every activation, every loss and every optimizer, with dropout."""
    losses, optimizers = list(LOSSES), list(OPTIMIZERS)
    for i, activation in enumerate(ACTIVATIONS):
        loss, optimizer = losses[i % len(losses)], optimizers[i % len(optimizers)]
        layers = (gm.Dense(17, activation, dropout=0.2), gm.Dense(9, activation))
        name = f"{dtype}, {activation}, {loss}, {optimizer}"
        yield Case(name, layers, loss, OPTIMIZERS[optimizer], {"dtype": dtype}, tolerance=tolerance)


def graph(outputs: int) -> tuple[Any, Any]:
    """Sums and joins, and the input read twice."""
    x = gm.Input(FEATURES, dropout=0.1)
    h = gm.Dense(9, "tanh")(x)
    joined = gm.Concat()(gm.Add()(h, gm.Dense(9, "relu", dropout=0.3)(h)), x)
    return x, gm.Dense(outputs)(joined)


def categories(outputs: int) -> tuple[Any, Any]:
    """The last column, bytes, as 256 categories."""
    x = gm.Input(FEATURES)
    return x, gm.Dense(outputs)(gm.Dense(17, "relu")(gm.Embedding((256,), 5)(x)))


def special_cases() -> Iterator[Case]:
    """What training can do besides."""
    hidden = (gm.Dense(17, "relu"), gm.Dense(9, "gelu_tanh"))
    fleet = {"models": 3, "seed": [5, 6, 7]}
    images = (gm.RandomShift(1, (3, 4)), gm.GaussianNoise(0.1), gm.Mixup(0.3))
    yield Case(
        "batch normalisation", (gm.Dense(17, "relu", norm="batch"), gm.Dense(9, "tanh", norm="batch", norm_after=True))
    )
    yield Case(
        "layer normalisation", (gm.Dense(17, "relu", norm="layer"), gm.Dense(9, "silu", norm="layer", dropout=0.2))
    )
    yield Case("a graph of layers", graph, "squared_error")
    of_bytes = {"data_type": np.uint8, "network": {"standardize": True}}
    yield Case("vectors of categories", categories, "squared_error", **of_bytes)
    half = {"standardize": True, "precision": "bf16"}
    yield Case("vectors of categories, bf16", categories, data_type=np.uint8, network=half, tolerance=5e-2)
    averages = {"trainer": {"ema": 0.9}, "fit": lambda n: {"validation_split": 0.2}}
    yield Case("averaged weights", (gm.Dense(17, "relu", norm="batch"),), **averages)
    yield Case("limited norms", (gm.Dense(17, "relu", max_norm=0.7),), optimizer=gm.Adam(1e-2))
    yield Case(
        "uint8, augmented", hidden, network={"standardize": "global"}, trainer={"augment": images}, data_type=np.uint8
    )
    yield Case("standardised both", hidden, "huber", network={"standardize": True, "standardize_targets": True})
    yield Case(
        "weights and validation", hidden, fit=lambda n: {"sample_weight": np.linspace(0, 2, n), "validation_split": 0.2}
    )
    rates = gm.Adam(np.array([1e-3, 3e-3, 1e-2]), l2=np.array([0.0, 1e-3, 1e-2]))
    parts = [lambda n, i=i: np.arange(i, n - 3 * i) for i in range(3)]  # of unequal length
    yield Case("a fleet", hidden, optimizer=rates, network=fleet, trainer={"schedule": "cosine"})
    yield Case("a fleet, rows of its own", hidden, network=fleet, fit=lambda n: {"rows": [part(n) for part in parts]})
    yield Case("L-BFGS", (gm.Dense(9, "tanh"),), "squared_error", gm.LBFGS(), {"dtype": "float64"}, tolerance=1e-6)
    yield Case("graphs of 32 steps", hidden, steps=70)
    yield Case("tf32", hidden, network={"precision": "tf32"}, tolerance=2e-2)
    yield Case("bf16", hidden, network={"precision": "bf16"}, tolerance=5e-2)


def parity(setting: Setting) -> Iterator[Check]:
    """Networks, losses and optimizers trained for 20 steps on CPU and device: the losses and the network agree."""
    os.environ[CHECK] = "1"  # each first replay is also held against its launches, to the bit
    cases = [*table_cases("float32", 1e-3), *([] if setting.quick else table_cases("float64", 1e-7)), *special_cases()]
    for case in cases:
        yield case.name, partial(agrees, setting, case)


def agrees(setting: Setting, case: Case) -> str:
    batch = 8 if setting.emulated else 32
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training steps could not be recorded")
        (wanted, z), (losses, values) = case.train("cpu", batch), case.train(setting.backend, batch)
    error = float((np.abs(losses - wanted) / np.maximum(np.abs(wanted), 1e-3)).max())
    of_values = float(np.abs(values - z).max() / np.abs(z).max())
    told = f"losses differ by {error:.1e}, logits by {of_values:.1e} of the largest"
    expect(np.isfinite(losses).all() and error <= case.tolerance, f"{told}; allowed for losses is {case.tolerance:.0e}")
    expect(of_values <= 20 * case.tolerance, f"{told}; allowed for logits is {20 * case.tolerance:.0e}")
    return told


# --- memory ---------------------------------------------------------------------------------------------------------


def memory(setting: Setting) -> Iterator[Check]:
    """A limit makes data stream; too little memory is an error that leaves everything usable; nothing is kept for good."""
    yield "streamed data train as resident ones do", partial(streams, setting)
    yield "an array larger than the device", partial(too_large_an_array, setting)
    yield "a fit larger than what is free", partial(too_large_a_fit, setting)
    yield "repeated fits hold no more memory", partial(no_leak, setting)


def fit(device: Any, network: Any = None, rows: int = 300, width: int = 17, batch: int = 16, **options: Any) -> tuple:
    rng = np.random.default_rng(2)
    X, y = rng.standard_normal((rows, 11)).astype(np.float32), rng.integers(3, size=rows)
    layers = [gm.Dense(width, "relu", dropout=0.1), gm.Dense(3)]
    network = network or gm.Network(layers, n_features=11, seed=4, device=device)
    history = gm.Trainer(network, SOFTMAX).fit(X, y, epochs=2, batch_size=batch, progress=False, **options)
    return network, history["loss"], np.asarray(network.logits(X))


def streams(setting: Setting) -> str:
    rows, batch = (300, 4) if setting.emulated else (20_000, 64)  # several chunks of 32 steps
    _, losses, z = fit(setting.backend, rows=rows, batch=batch)
    _, streamed, z_streamed = fit(setting.backend, rows=rows, batch=batch, memory_limit=0)
    expect(losses == streamed, f"losses of resident data {losses}, of streamed ones {streamed}")
    expect(np.array_equal(z, z_streamed), "the trained networks differ")
    return f"the same bits over {2 * -(-rows // batch)} steps"


def too_large_an_array(setting: Setting) -> str:
    return refused(lambda: DeviceArray.empty(setting.runtime, (setting.runtime.free_bytes() + 2**30,), "u8"))


def refused(attempt: Callable[[], Any]) -> str:
    """The message of the error for too little memory."""
    try:
        attempt()
    except DeviceMemoryError as error:
        expect(
            len(re.findall(r"\d[\d.,]*\d", str(error))) >= 2, f"the message names not both numbers of bytes: {error}"
        )
        return str(error)
    raise AssertionError("nothing was raised")


def too_large_a_fit(setting: Setting) -> str:
    left, big = (1 << 18, {"rows": 1500, "width": 64, "batch": 1500})
    if not setting.emulated:
        left, big = (1 << 29, {"rows": 120_000, "width": 1024, "batch": 120_000})
    network, _, before = fit(setting.backend, width=big["width"])
    gc.collect()
    hog = DeviceArray.empty(setting.runtime, (setting.runtime.free_bytes() - left,), "u8")
    told = refused(lambda: fit(setting.backend, network, **big))
    del hog
    gc.collect()
    after = fit_logits(network)
    expect(np.array_equal(before, after), "the network has changed although it was not trained")
    fit(setting.backend, network, **big)
    return told


def fit_logits(network: Any) -> np.ndarray:
    """The network on the rows that ``fit`` has as its default."""
    return np.asarray(network.logits(np.random.default_rng(2).standard_normal((300, 11)).astype(np.float32)))


def no_leak(setting: Setting) -> str:
    size, allowed = ({}, 1 << 10) if setting.emulated else ({"rows": 4096, "width": 4096, "batch": 2048}, 1 << 25)
    free = []
    for _ in range(5):
        fit(setting.backend, **size)
        gc.collect()
        free.append(setting.runtime.free_bytes())
    lost = free[1] - free[-1]  # the first fit loads kernels
    expect(lost <= allowed, f"bytes free after each of five fits: {free}")
    return f"{lost:,} bytes fewer are free after the fifth fit than after the second"


# --- arrays that are on the device already --------------------------------------------------------------------------


def arrays(setting: Setting) -> Iterator[Check]:
    """X is read where it lies, trains as the host's X does, and predictions come back in kind."""
    kinds = (
        {"emulator": emulated_array}
        if setting.emulated
        else {"CuPy": cupy_array, "PyTorch": torch_array, "DLPack": dlpack}
    )
    for name, make in kinds.items():
        yield name, partial(taken_where_it_lies, setting, make)


def taken_where_it_lies(setting: Setting, make: Callable[[Setting, np.ndarray], tuple[Any, int, Any]]) -> str:
    """``make`` gives the array, its pointer and the type that answers have."""
    rng = np.random.default_rng(8)
    X, y = rng.standard_normal((130, 11)).astype(np.float32), rng.integers(3, size=130)
    there, pointer, kind = make(setting, X)

    def trained(X: Any) -> tuple[Any, Any]:
        network = gm.Network([gm.Dense(17, "relu"), gm.Dense(3)], n_features=11, seed=4, device=setting.backend)
        taken = network.check_X(X)
        expect(X is not there or taken.pointer == pointer, "the array was copied")
        history = gm.Trainer(network, SOFTMAX).fit(X, y, epochs=2, batch_size=16, progress=False)
        return history["loss"], network.predict_proba(X)

    (losses, p), (own, answer) = trained(X), trained(there)
    expect(losses == own, f"losses of the host's array {losses}, of the device's {own}")
    expect(isinstance(answer, kind), f"the answer is a {type(answer).__name__}, not a {kind.__name__}")
    back = answer.get() if hasattr(answer, "get") else answer.cpu().numpy()
    expect(np.array_equal(back, p), f"predictions differ by {np.abs(back - p).max():.1e}")
    return "read without a copy"


def emulated_array(setting: Setting, X: np.ndarray) -> tuple[Any, int, Any]:
    from emulator import ForeignArray

    array = setting.put(X)
    return ForeignArray(array), array.pointer, ForeignArray


def cupy_array(setting: Setting, X: np.ndarray) -> tuple[Any, int, Any]:
    import cupy  # type: ignore

    array = cupy.asarray(X)
    return array, array.data.ptr, cupy.ndarray


def torch_array(setting: Setting, X: np.ndarray) -> tuple[Any, int, Any]:
    if importlib.util.find_spec("torch") is None:
        raise Skip("PyTorch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Skip("this PyTorch has no CUDA")
    array = torch.from_numpy(X).cuda()
    return array, array.data_ptr(), torch.Tensor


class Capsule:
    """An array of which nothing is known but DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def dlpack(setting: Setting, X: np.ndarray) -> tuple[Any, int, Any]:
    array, pointer, kind = cupy_array(setting, X)
    return Capsule(array), pointer, kind


PARTS = {part.__name__: part for part in (conformance, capture, tests, parity, memory, arrays)}
